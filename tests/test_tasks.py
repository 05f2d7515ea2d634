"""Tasks: prompt sets of any layout, rewards that read the row, and rewards that check an answer."""

import json
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML

from pipeline.config.schema import MatchReward, PromptSet, Reward
from pipeline.data.prompts import Prompt, read_prompts
from pipeline.errors import UserError
from pipeline.rewards import verifiable
from pipeline.rewards.build import build_reward, check_rows
from pipeline.rewards.columns import check_columns, needed_columns
from pipeline.stages import prepare
from tests.asking import asking
from tests.project import ROOT, Project

CHAT = [
    {"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "2 + 2?"},
]  # fmt: skip


def table(**keys: Any) -> Any:
    return TypeAdapter(Reward).validate_python(keys)


def scored(completions: list[str], answers: list[Any], **keys: Any) -> list[float]:
    import torch

    reward = build_reward("mine", table(kind="match", column="answer", **keys), Path(), torch.device("cpu"))
    return asking(reward)([""] * len(completions), completions, answer=answers)  # type: ignore[no-any-return]


# --- answers


@pytest.mark.parametrize(("text", "number"), [
    ("The answer is 1,200.50.", "1200.5"), ("5-3=2", "2"), ("from 5-3", "3"), ("x = -3.5", "-3.5"), ("(−4)", "-4"),
    ("$1,234,567", "1234567"), ("3.", "3"), ("2e3", "2000"), ("#### 42", "42"), (".5", "0.5"), ("7%", "7"),
    ("+8", "8"), ("9" * 40, "9" * 40), ("no", None), ("", None), ("-$5", "-5"), ("1,00,000", "100000"), ("１２", "12"),
    ("答案是-3", "-3"), ("a-3", "3"),
])  # fmt: skip
def test_the_last_number_of_a_text(text: str, number: str | None) -> None:
    found = verifiable.normalized(MatchReward(kind="match", column="a", compare="number"), text)
    assert found == (None if number is None else Decimal(number))


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**12), max_value=10**12))
def test_a_number_is_found_however_it_is_written(value: Decimal) -> None:
    for written in (f"{value}", f"{value:,}", f"{value}00", f"= {value}.", f"so it is {value} apples"):
        assert scored([written], [str(value)], compare="number") == [1.0]
    assert scored([f"{value + 1}"], [str(value)], compare="number") == [0.0]


@pytest.mark.parametrize(("completion", "answer", "keys", "expected"), [
    ("  New\nYork ", "new york", {}, 1), ("New York", "new york", {"ignore_case": False}, 0),
    ("York", "New York", {}, 0),
    ("ｆｕｌｌ", "full", {}, 1), ("", "x", {}, 0), ("b", ["a", "B"], {}, 1), ("7", 7, {}, 1), ("true", True, {}, 1),
    ("18 of 20, so 18", "Natalia sold 48/2 = 24.\n#### 18", {"compare": "number"}, 1),
    ("A: 3. Answer: 4 is right", "4", {"pattern": r"Answer: (\S+)"}, 1),
    ("Answer: 3 Answer: 4", "4", {"pattern": r"Answer: (\S+)"}, 1),  # the last one counts
    ("4", "4", {"pattern": r"Answer: (\S+)"}, 0),
    ("yes", "x -> yes", {"column_pattern": "-> (.*)"}, 1),
    ("I think (B).", "B", {"compare": "choice"}, 1), ("A dog. B", "A", {"compare": "choice"}, 0),
    ("It's D", 3, {"compare": "choice"}, 1), ("BAD", "B", {"compare": "choice"}, 0),
    ("E", "A", {"compare": "choice"}, 0),
    ("E", "E", {"compare": "choice", "choices": "DE"}, 1), ("答案是B。", "B", {"compare": "choice"}, 1),
    ("B", "1", {"compare": "choice"}, 1), ("B", 1.0, {"compare": "choice"}, 1),
    ("2", 2, {"compare": "choice", "choices": "1234"}, 1), ("2", "2", {"compare": "choice", "choices": "1234"}, 1),
])  # fmt: skip
def test_match_compares_as_it_says(completion: str, answer: Any, keys: dict[str, Any], expected: int) -> None:
    assert scored([completion], [answer], **keys) == [expected]


@pytest.mark.parametrize(("answer", "keys", "said"), [
    (None, {}, "should hold text"), ("", {}, "should hold text"),
    ("none", {"compare": "number"}, "should hold a number"),
    (4, {"compare": "choice"}, "should hold one of A, B, C, D"), ([], {}, "no answer would be right"),
    ("x", {"column_pattern": "-> (.*)"}, "should hold text where column_pattern finds it"),
    ({}, {}, "should hold text"),
])  # fmt: skip
def test_a_row_without_an_answer_is_named(answer: Any, keys: dict[str, Any], said: str) -> None:
    prompts = [Prompt("One?", columns={"answer": "1"}), Prompt("Two?", columns={"answer": answer})]
    chosen = table(kind="match", column="answer", **keys)
    with pytest.raises(UserError, match=r"reward mine: column 'answer' of the prompt") as refusal:
        check_rows("mine", chosen, prompts[1:])
    assert said in str(refusal.value)
    with pytest.raises(UserError, match=r"column 'other' of the prompt 'One\?' is missing"):
        check_rows("mine", table(kind="match", column="other"), prompts)


def test_format_is_of_the_whole_completion() -> None:
    import torch

    reward = asking(
        build_reward("mine", table(kind="format", pattern=r"(?s)<a>.*</a>\s*"), Path(), torch.device("cpu"))
    )
    assert reward([""] * 4, ["<a>x\ny</a>\n", " <a></a>", "<a>", ""]) == [1.0, 0.0, 0.0, 0.0]


def test_a_pattern_that_takes_for_ever_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifiable, "PATIENCE", 0.2)
    for check in (
        lambda: verifiable.whole("mine", "(a|aa)+(b|c)+x", "a" * 60 + "b"),
        lambda: verifiable.last_group("mine", "^((a|aa)+(b|c)+x)$", "a" * 60 + "b"),
    ):
        with pytest.raises(UserError, match=r"reward mine: the pattern .* takes more than 0\.2 s on the text 'aaa"):
            check()


@pytest.mark.parametrize(("keys", "said"), [
    ({"pattern": "("}, "not a regular expression"), ({"pattern": "a"}, "has 0 groups; should have 1"),
    ({"pattern": "(a)(b)"}, "has 2 groups"), ({"column_pattern": "x(?:y)"}, "has 0 groups"),
    ({"choices": "A"}, "choices"),
    ({"column": ""}, "column"), ({"compare": "float"}, "compare"),
])  # fmt: skip
def test_a_mistake_in_a_table_is_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        table(**{"kind": "match", "column": "answer", **keys})


# --- rewards that read the row


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    import torch

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    (tmp_path / "custom").mkdir()

    def make(code: str) -> Any:
        (tmp_path / "custom/mine.py").write_text(code)
        function = table(kind="custom", function="custom/mine.py:reward")
        return asking(build_reward("mine", function, Path(), torch.device("cpu")))

    return make


# written for trl's documented signature: a column, token ids, a conversation, None, async
TRL = {
    "def reward(prompts, completions, answer, **kwargs):\n"
    "    return [float(a in c) for c, a in zip(completions, answer)]\n": [1.0, 0.0],
    "def reward(completion_ids, **kwargs):\n    return [float(len(ids)) for ids in completion_ids]\n": [3.0, 2.0],
    "def reward(completions, answer=None, trainer_state=None, **kwargs):\n"
    "    return [len(c) + trainer_state.global_step for c in completions]\n": [3.0, 2.0],
    "import asyncio\nONE = asyncio.Semaphore(1)\nasync def reward(answer, **kwargs):\n"
    "    async with ONE:\n        await asyncio.gather(asyncio.sleep(0))\n"
    "    return [1.0 if a == '1' else None for a in answer]\n": [1.0, 0.0],
    "def reward(completions, log_metric, log_extra, **kwargs):\n"
    "    log_metric('x', 1.0); log_extra('y', list(completions))\n    return [1.0] * len(completions)\n": [1.0, 1.0],
    "def reward(completions):\n    return [1.0] * len(completions)\n": [1.0, 1.0],
}


@pytest.mark.parametrize("code", TRL)
def test_functions_for_trl_run_unchanged(custom: Callable[[str], Any], code: str) -> None:
    reward = custom(code)
    for _ in range(2):
        assert reward(["One?", "Two?"], ["a 1", "no"], answer=["1", "2"]) == TRL[code]


def test_a_conversation_reaches_a_reward_as_messages(custom: Callable[[str], Any]) -> None:
    code = (
        "def reward(prompts, completions, **kwargs):\n"
        "    assert prompts[0][-1] == {'role': 'user', 'content': '2 + 2?'}\n"
        "    return [len(c[0]['content']) if c[0]['role'] == 'assistant' else None for c in completions]\n"
    )
    assert custom(code)([Prompt("2 + 2?", tuple(CHAT))], ["four"]) == [4.0]


def test_a_reward_that_takes_texts_for_messages_is_told(custom: Callable[[str], Any]) -> None:
    told = "texts here: a prompt column of conversations makes them messages"
    with pytest.raises(UserError, match=told):
        custom("def reward(completions):\n    return [len(c[0]['content']) for c in completions]\n")(["Hi"], ["four"])
    itself = custom("def reward(completions):\n    return [str(c)['content'] for c in completions]\n")
    with pytest.raises(UserError, match="string indices must be integers") as refusal:
        itself([Prompt("Hi", tuple(CHAT))], ["four"])
    assert told not in str(refusal.value)


def test_a_reward_cannot_change_what_others_are_given(custom: Callable[[str], Any]) -> None:
    prompt = Prompt("Hi", tuple(CHAT), {"answer": ["a"]})
    code = "def reward(prompts, completions, answer):\n    answer[0].clear(); prompts[0].clear()\n    return [1.0]\n"
    assert custom(code)([prompt], ["x"]) == [1.0]
    assert prompt.columns == {"answer": ["a"]}
    assert prompt.content == CHAT


def test_a_term_that_says_nothing_is_left_out_of_a_sum(tmp_path: Path, custom: Callable[[str], Any]) -> None:
    import torch

    custom("def reward(completions):\n    return [None if c == 'x' else 2.0 for c in completions]\n")
    terms = [
        {"weight": 0.5, "reward": {"kind": "custom", "function": "custom/mine.py:reward"}},
        {"weight": 1.0, "reward": {"kind": "length", "target": 3}},
    ]
    reward = asking(build_reward("mine", table(kind="sum", terms=terms), Path(), torch.device("cpu")))
    assert reward(["", ""], ["x", "xxx"]) == [-2.0, 1.0]


@pytest.mark.parametrize(("code", "needed"), [
    ("def reward(prompts, completions, **kwargs): ...", set()),
    ("def reward(completions, answer, other, by=2): ...", {"answer", "other"}),
    ("def reward(completions, *, answer=None): ...", set()), ("def reward(completions, *, answer): ...", {"answer"}),
    ("@decorated\ndef reward(completions, answer): ...", set()),
])  # fmt: skip
def test_the_columns_of_a_custom_reward(
    tmp_path: Path, custom: Callable[[str], Any], code: str, needed: set[str]
) -> None:
    (tmp_path / "custom/mine.py").write_text(code)
    chosen = table(kind="custom", function="custom/mine.py:reward")
    assert needed_columns(chosen) == needed
    both = table(kind="sum", terms=[{"weight": 1.0, "reward": each.model_dump()} for each in (
        chosen, table(kind="match", column="level"))])  # fmt: skip
    assert needed_columns(both) == needed | {"level"}
    kept = PromptSet(source="x", columns=["answer"])
    with pytest.raises(UserError, match=r"which prompt_sets\.x does not keep \(columns: answer\); add it to"):
        check_columns("mine", both, kept, "prompt_sets.x")
    with pytest.raises(UserError, match=r"\(columns: levle\); is 'levle' the same, misspelt\? Else add it to"):
        check_columns("mine", table(kind="match", column="level"), PromptSet(source="x", columns=["levle"]), "x")


# --- prompt sets


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "data/local/set").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data/local/set"


def read_set(**keys: Any) -> tuple[list[dict[str, Any]], Any]:
    rules = PromptSet(**{"source": "data/local/set", **keys})
    return prepare.select(prepare.local_splits("prompt_sets.mine", rules)(rules.train_split)[1], rules)


def write(file: Path, *rows: Any) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_template_and_the_columns_of_a_row(place: Path) -> None:
    write(place / "train.jsonl", {"q": "1 + 1", "0": 2, "The answer": {"value": [2]}, "more": 0})
    write(place / "test.jsonl")
    found, _ = read_set(prompt_template="{{{q}}} in {0} words:", columns=["The answer"], heldout_split="test")
    assert found == [{"prompt": "{1 + 1} in 2 words:", "message_id": None, "columns": {"The answer": {"value": [2]}}}]


def test_a_conversation_ends_where_the_answer_begins(place: Path) -> None:
    write(place / "validation.jsonl")
    answered = [*CHAT, {"role": "assistant", "content": "4", "tool_calls": None}]
    write(place / "train.jsonl", {"chosen": answered}, {"chosen": CHAT[1:2]}, {"chosen": "plain"})
    found, _ = read_set(prompt_column="chosen")
    assert found[0]["messages"] == CHAT
    assert found[0]["prompt"] == "system: Be short.\nuser: Hi\nassistant: Hello\nuser: 2 + 2?"
    assert [row["prompt"] for row in found[1:]] == ["Hi", "plain"]
    assert "messages" not in found[2]


@pytest.mark.parametrize(("row", "keys", "said"), [
    ({"q": "x"}, {}, r"column 'text' is missing \(there are: q\)"),
    ({"q": "x"}, {"prompt_template": "{question}"}, r"column 'question' is missing \(there are: q\)"),
    ({"text": "x"}, {"columns": ["answer"]}, r"column 'answer' is missing \(there are: text\)"),
    ({"text": "x", "answer": 1}, {"columns": ["anwser"]}, r"\(there are: text, answer\); did you mean 'answer'\?"),
    ({"q": None}, {"prompt_template": "{q}"}, "q should be a string or a number for prompt_template, not null"),
    ({"q": [1]}, {"prompt_template": "{q}"}, "q should be a string or a number for prompt_template, not a list"),
    ({"text": "x", "a": float("nan")}, {"columns": ["a"]}, "a should be a string, a number, a list or an object"),
    ({"text": "x", "a": ["\ud800"]}, {"columns": ["a"]}, "a holds half of a surrogate pair"),
    ({"text": []}, {}, "the conversation has no message that could be answered"),
    ({"text": CHAT[:1]}, {}, "the conversation has no message that could be answered"),
    ({"text": ["Hi"]}, {}, "message 1 should be an object with role and content, not a string"),
    ({"text": [{"role": "user", "content": None}]}, {}, "content of message 1 should be a string, not null"),
])  # fmt: skip
def test_a_row_that_makes_no_prompt_is_named(place: Path, row: Any, keys: dict[str, Any], said: str) -> None:
    write(place / "train.jsonl", row)
    write(place / "validation.jsonl")
    with pytest.raises(UserError, match=said):
        read_set(**keys)


@pytest.mark.parametrize(("keys", "said"), [
    ({"prompt_template": "{q"}, "a brace that is text is written twice"),
    ({"prompt_template": "{}"}, "name of a column"),
    ({"prompt_template": "plain"}, "no column in braces"), ({"prompt_template": "{q.x}"}, "name of a column"),
    ({"prompt_template": "{q!r}"}, "name of a column"), ({"prompt_template": "{q:>9}"}, "name of a column"),
    ({"prompt_template": "{q}", "prompt_column": "q"}, "at most one of prompt_column, prompt_template"),
    ({"columns": ["prompts"]}, "cannot be a column too"), ({"heldout_seed": 1}, "heldout_seed needs heldout_share"),
    ({"columns": ["a", "a"]}, "stands twice"),
    ({"heldout_share": 0.1, "heldout_split": "test"}, "at most one of heldout_split, heldout_share"),
    ({"heldout_share": 1.0}, "heldout_share"), ({"config": "main"}, "config belongs to repo"),
    ({"train_split": ".."}, "split"),
])  # fmt: skip
def test_a_mistake_in_a_prompt_set_is_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        PromptSet(**{"source": "data/local/set", **keys})


@given(st.lists(st.sampled_from("abcdefghij"), min_size=2), st.floats(0.01, 0.99), st.integers(0, 3))
def test_the_held_out_share(texts: list[str], share: float, seed: int) -> None:
    """Of the different prompts, none of which is on both sides; each one's side hangs on nothing but the seed."""
    rules = PromptSet(source="x", heldout_share=share, heldout_seed=seed)
    rows, counts = prepare.select([("", {"text": text}) for text in texts], rules)
    different = len(set(texts))
    if different < 2 or max(1, int(share * different + 0.5)) == different:
        with pytest.raises(UserError, match="leaves none to train on"):
            prepare.hold_out(rows, counts, rules, "x")
        return
    train, train_counts, heldout, heldout_counts = prepare.hold_out(rows, counts, rules, "x")
    sides = [{row["prompt"] for row in side} for side in (train, heldout)]
    assert not sides[0] & sides[1]
    assert len(sides[1]) == max(1, int(share * different + 0.5))
    assert len(train) + len(heldout) == train_counts["read"] + heldout_counts["read"] == len(texts)
    again = prepare.hold_out(rows[::-1], counts, rules, "x")
    assert {row["prompt"] for row in again[2]} == sides[1]


def test_questions_and_answers_of_a_csv_file(here: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the file to held-out rewards, with a reward that reads the row beside a match."""
    lines = ["question,answer,level", *(f"What is {i} + {i}?,{2 * i},{i % 3}" for i in range(40))]
    (here.root / "data/local").mkdir(parents=True, exist_ok=True)
    (here.root / "data/local/sums.csv").write_text("\n".join(lines) + "\n")
    (here.root / "custom").mkdir(exist_ok=True)
    (here.root / "custom/near.py").write_text(
        "def reward(completions, answer, **kwargs):\n"
        "    return [-abs(len(c) - len(a)) for c, a in zip(completions, answer)]\n"
        "def of_others(completions, **kwargs):\n"
        "    return [len(each) for each in kwargs['solution']]\n"
    )
    here.edit(
        prompts="sums", reward="right", train__steps=2, evaluate__prompts=4,
        prompt_sets__sums={
            "source": "data/local/sums.csv", "heldout_share": 0.2, "columns": ["answer"],
            "prompt_template": "Question: {question}\nAnswer:",
        },
        rewards__right={"kind": "sum", "terms": [
            {"weight": 1.0, "reward": {"kind": "match", "column": "answer", "compare": "number"}},
            {"weight": 0.1, "reward": {"kind": "custom", "function": "custom/near.py:reward"}},
        ]},
        rewards__of_others={"kind": "custom", "function": "custom/near.py:of_others"},
        rewards__absent={"kind": "match", "column": "solution"},
        rewards__other={"kind": "match", "column": "answer", "column_pattern": "#### (.+)"},  # of another task
    )  # fmt: skip
    for stage in ("check", "prepare", "cache", "train"):
        here.run(stage)
    assert "note: not measured: reward custom/near.py:of_others raised KeyError" in here.run("evaluate").stderr
    assert len(read_prompts(here.root / "data/prompts/heldout.jsonl")) == 8
    metrics = json.loads((here.root / "reports/evaluate/metrics.json").read_text())
    assert "right" in metrics
    assert not {"absent", "other", "of_others"} & metrics.keys()
    here.edit(reward="absent")
    said = "reward absent needs 'solution' of each prompt's row, which prompt_sets.sums does not keep (columns: answer)"
    assert said in here.refuse("check")


def test_the_page_that_goes_from_a_file_to_a_policy(here: Project) -> None:
    """Its questions, tables and function as they stand there; its model is on the hub."""
    page = (ROOT / "docs/YOUR_TASK.md").read_text()
    texts = dict(re.findall(r"^```(csv|python|yaml)\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    for file, language in (("data/local/questions.csv", "csv"), ("custom/right.py", "python")):
        (here.root / file).parent.mkdir(parents=True, exist_ok=True)
        (here.root / file).write_text(texts[language])
    tables = YAML(typ="safe").load(texts["yaml"])
    changed = {f"{table}__{name}": keys for table, named in tables.items() for name, keys in named.items()}
    here.edit(model="chat", prompts="quiz", reward="right", **changed)
    for stage in ("check", "prepare"):
        done = here.run(stage)
        assert not done.returncode, done.stderr
    rows = [row for name in ("train", "heldout") for row in read_prompts(here.root / f"data/prompts/{name}.jsonl")]
    assert {row.text: row.columns for row in rows}["What is 3 plus 4?"] == {"answer": "7"}
    space: dict[str, Any] = {}
    exec(texts["python"], space)
    said = [[{"role": "assistant", "content": "paris."}], "London"]
    assert space["right"]([], said, answer=["Paris", "Paris"]) == [1.0, 0.0]
    assert space["right"]([], ["It is 17.", "It is 7."], answer=["7", "7"]) == [0.0, 1.0]
