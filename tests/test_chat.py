"""Chat models: prompts in the tokenizer's template, as apply_chat_template gives them, in every stage."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from pipeline.commands import generate
from pipeline.commands.export import prompt_code
from pipeline.config.load import load_params, validate_params
from pipeline.config.overrides import experiment_command
from pipeline.config.schema import ChatParams, Model
from pipeline.errors import UserError
from pipeline.file_io import read_jsonl
from pipeline.models.load import end_of_text_ids, load_tokenizer
from pipeline.models.sampling import Rollout
from pipeline.models.tokenization import check_chat, encode_chat, encode_prompt, unnamed_end_of_turn
from pipeline.rl import batch
from pipeline.runs.provenance import chosen_params
from pipeline.stages import cache, evaluate, train
from tests.models import PARAMS
from tests.project import Project
from tests.repositories import write_pythia
from tests.word_tokenizer import CHAT, chat_tokenizer, tokenizer

SYSTEM, SILENT = "Be brief.", {"enable_thinking": False}
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHAT
DATED = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}" + CHAT


def by_transformers(words: PreTrainedTokenizerFast, prompt: str, chat: ChatParams) -> list[int]:
    messages = [{"role": "system", "content": chat.system}] if chat.system else []
    messages += [{"role": "user", "content": prompt}]
    text = words.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **chat.options)
    return list(words(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("options", [{}, SILENT, {"enable_thinking": True}])
@pytest.mark.parametrize("system", [None, SYSTEM])
@pytest.mark.parametrize("prompt", ["Hi there", " Hi\n", "\u00fc\u2603", "<|im_end|> is written out", "<s>"])
def test_ids_are_those_of_apply_chat_template(prompt: str, system: str | None, options: dict[str, Any]) -> None:
    words, chat = chat_tokenizer(), ChatParams(system, options)
    ids = encode_prompt(words, prompt, chat)
    assert ids == by_transformers(words, prompt, chat)
    assert ids[0] == words.bos_token_id
    assert ids.count(words.bos_token_id) == 1 + prompt.count("<s>")  # no second one
    assert words.decode(ids).count(SYSTEM) == bool(system)
    assert words.decode(ids).endswith("<think></think>" if options == SILENT else "<|im_start|>assistant\n")


def test_without_a_template_a_prompt_is_plain_text() -> None:
    for words, chat in ((chat_tokenizer(None), ChatParams()), (chat_tokenizer(), None)):
        assert encode_prompt(words, "Hi", chat) == words("Hi")["input_ids"]
    assert encode_prompt(tokenizer("<bos> $A <eos>"), "say a word", ChatParams()) == [1, 4, 5, 6]


def test_the_default_of_several_templates_is_taken() -> None:
    several = chat_tokenizer({"default": CHAT, "rag": "{{ messages }}"})
    assert encode_prompt(several, "Hi", ChatParams()) == encode_prompt(chat_tokenizer(), "Hi", ChatParams())


@pytest.mark.parametrize(("template", "chat", "line"), [
    (None, ChatParams(SYSTEM), "models.mine.system has no effect: the tokenizer has no chat template"),
    (None, ChatParams(None, SILENT),
     "models.mine.chat_template_options has no effect: the tokenizer has no chat template"),
    (CHAT, ChatParams(None, {"enable_thinkin": False}),
     "models.mine.chat_template_options.enable_thinkin: the chat template has no such option; did you mean "
     "'enable_thinking'?"),
    (NO_SYSTEM, ChatParams(SYSTEM),
     "models.mine: prompt 'Hi': the chat template refuses it: System role not supported"),
    ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", ChatParams(SYSTEM),
     "models.mine.system has no effect: the chat template leaves the system message out"),
    (DATED, ChatParams(),
     "models.mine: the chat template writes today's date: each day has other prompts; to fix it, set "
     "models.mine.chat_template_options.date_string"),
    ("{{ messages.nope.nope }}", ChatParams(), "models.mine: prompt 'Hi': the chat template refuses it: "),
    ("{% if %}", ChatParams(), "models.mine: prompt 'Hi': the chat template refuses it: "),
    ({"rag": CHAT}, ChatParams(), "models.mine: This model has multiple chat templates with no default"),
    ("{{ '' }}", ChatParams(), "models.mine: prompt 'Hi': the chat template gives it no token"),
])  # fmt: skip
def test_what_a_template_cannot_do_is_one_line(template: Any, chat: ChatParams, line: str) -> None:
    with pytest.raises(UserError) as caught:
        check_chat(chat_tokenizer(template), chat, ["Hi"], "models.mine")
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(("template", "chat"), [
    (CHAT, ChatParams(SYSTEM, SILENT)), (NO_SYSTEM, ChatParams()), (None, ChatParams()),
    (DATED, ChatParams(None, {"date_string": "26 Jul 2024"})),
])  # fmt: skip
def test_what_a_template_can_do_is_accepted(template: str | None, chat: ChatParams) -> None:
    check_chat(chat_tokenizer(template), chat, ["Hi"], "models.mine")


@pytest.mark.parametrize("dated", ["==", "!="])
def test_conversations_with_and_without_a_system_message_are_both_tried(dated: str) -> None:
    """Templates have a part for each: here one of the two writes the date."""
    template = "{% if messages[0].role " + dated + " 'system' %}{{ strftime_now('%d') }}{% endif %}" + CHAT
    user = {"role": "user", "content": "Hi"}
    prompts = [[{"role": "system", "content": SYSTEM}, user], [user]]
    for mixed in (prompts, prompts[::-1]):
        with pytest.raises(UserError, match="the chat template writes today's date"):
            check_chat(chat_tokenizer(template), ChatParams(), mixed, "models.mine")


def test_an_end_of_turn_that_ends_no_completion_is_noticed() -> None:
    words = chat_tokenizer(eos="<|endoftext|>")
    end = words.convert_tokens_to_ids("<|im_end|>")
    assert unnamed_end_of_turn(words, ChatParams(), (words.eos_token_id,)) == "<|im_end|>"
    assert unnamed_end_of_turn(words, ChatParams(), (words.eos_token_id, end)) is None
    words.chat_template = "{{ messages }}"  # nothing behind the answer that could end it
    assert unnamed_end_of_turn(words, ChatParams(), (words.eos_token_id,)) is None


# --- params.yaml


def table(**keys: Any) -> Model:
    tree = {**PARAMS.model_dump(), "model": "mine"}
    return validate_params({**tree, "models": {"mine": {"source": "models/local/mine", **keys}}}).selected_model


def test_a_model_is_spoken_to_plainly_unless_told_otherwise() -> None:
    assert table().chat is None
    assert table(chat_template="auto").chat == ChatParams()
    full = table(chat_template="auto", system=SYSTEM, chat_template_options=SILENT)
    assert full.chat == ChatParams(SYSTEM, SILENT)


@pytest.mark.parametrize(("keys", "line"), [
    ({"chat_template": "jinja"}, "models.mine.chat_template = 'jinja': should be 'auto' or 'none'"),
    ({"chat_templat": "auto"}, "unknown key models.mine.chat_templat; did you mean 'chat_template'?"),
    ({"system": SYSTEM}, "models.mine: system needs chat_template: auto; without the template nobody reads it"),
    ({"chat_template": "none", "chat_template_options": SILENT}, "models.mine: chat_template_options needs chat_templ"),
    ({"chat_template": "auto", "system": ""}, "models.mine.system = '': "),
    ({"chat_template": "auto", "system": 3}, "models.mine.system = 3: should be text: put it in quotes"),
    ({"chat_template": "auto", "chat_template_options": {"tokenize": False}},
     "models.mine: chat_template_options.tokenize is no option of a template: the pipeline sets it"),
    ({"chat_template": "auto", "chat_template_options": ["a"]},
     "models.mine.chat_template_options = ['a']: should be a table of keys"),
    ({"chat_template": "auto", "chat_template_options": {"a": {"b": object()}}}, "models.mine.chat_template_options.a"),
    ({"chat_template": "auto", "chat_template_options": {"a.b": 1}}, "key models.mine.chat_template_options.a.b: "),
])  # fmt: skip
def test_a_mistake_is_one_line_that_names_the_key(keys: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        table(**keys)
    assert str(caught.value).startswith(f"params.yaml: {line}")


def test_the_command_of_a_run_and_its_model_card_say_how_it_was_spoken_to() -> None:
    tree = {**PARAMS.model_dump(), "model": "mine"}
    own = {"source": "models/local/mine", "chat_template": "auto", "system": SYSTEM, "chat_template_options": SILENT}
    chosen = chosen_params(validate_params({**tree, "models": {"mine": own}}))
    command = experiment_command(chosen, {})
    for part in ("chat_template=auto", 'system="Be brief."', "chat_template_options.enable_thinking=false"):
        assert f"++models.mine.{part}" in command
    found: dict[str, Any] = {"tokenizer": chat_tokenizer()}
    exec(prompt_code(chosen), found)
    truth = encode_chat(found["tokenizer"], "Hi there", ChatParams(SYSTEM, SILENT))
    assert found["prompt"]["input_ids"].tolist() == [truth]


# --- every stage


def test_every_stage_speaks_in_the_template(
    here: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`cache` counts these tokens, `train`, its calibration, `evaluate` and `generate` feed them to the model."""
    folder = here.root / "data/checkpoint/policy"
    write_pythia(tmp_path / "chat", None, vocabulary=260)
    for file in (tmp_path / "chat").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    chat_tokenizer().save_pretrained(folder)
    own = {"source": "models/local/mine", "chat_template": "auto", "system": SYSTEM, "chat_template_options": SILENT}
    here.edit(model="mine", models__mine=own, train__steps=2, recipes__stable__stop_strings=["e"])
    params, words, chat = load_params(), load_tokenizer(folder), ChatParams(SYSTEM, SILENT)
    expected = {
        file: [by_transformers(words, row["prompt"], chat) for row in read_jsonl(here.root / "data/prompts" / file)]
        for file in ("train.jsonl", "heldout.jsonl")
    }
    allowed = [*expected["train.jsonl"], *expected["heldout.jsonl"]]
    tokens, limits = cache.fitting_prompts(params, folder, words)
    assert tokens == allowed
    layout = json.loads((here.root / "data/checkpoint/layout.json").read_text())
    longest = max(len(ids) + limit for ids, limit in zip(tokens, limits, strict=True))
    (here.root / "data/checkpoint/layout.json").write_text(json.dumps({**layout, "longest": longest}))

    fed: list[list[int]] = []

    def watched(model: Any, ids: Any, mask: Any, *rest: Any, **more: Any) -> Rollout:
        fed.extend(row[counts].tolist() for row, counts in zip(ids, mask, strict=True))
        return sample(model, ids, mask, *rest, **more)

    sample = batch.sample
    for module in (batch, evaluate, generate):
        monkeypatch.setattr(module, "sample", watched)
    train.main()
    assert len(fed) == (2 + params.train.calibration_batches) * params.train.prompts_per_step
    assert all(ids in expected["train.jsonl"] for ids in fed)
    assert load_tokenizer(here.root / "data/policy").chat_template == CHAT
    fed.clear()
    evaluate.main()
    assert fed == 2 * expected["heldout.jsonl"][: len(fed) // 2]
    fed.clear()
    generate.main(Namespace(prompts=["Hi there"], max_tokens=12))
    assert fed == 2 * [by_transformers(words, "Hi there", chat)]
    assert f"policy: <s><|im_start|>system\n{SYSTEM}<|im_end|>" in capsys.readouterr().out

    # and stop strings end completions: none that ended goes on behind one, the shares say how each ended
    for row in read_jsonl(here.root / "reports/train/samples.jsonl"):
        said = words.decode(row["tokens"][:-1])
        assert "e" not in said
        assert row["completion"] == "".join(said.split("<|im_end|>")) or not row["ended"]
    text = json.loads((here.root / "reports/evaluate/metrics.json").read_text())["text"]
    for side in text.values():
        assert side["ended_share"] + side["stopped_share"] + side["limit_share"] == pytest.approx(1)


def test_a_prompt_that_a_template_refuses_is_named_with_the_model(here: Project) -> None:
    picky = "{% if messages[-1].content | length > 8 %}{{ raise_exception('too long') }}{% endif %}" + CHAT
    folder = here.root / "data/checkpoint/policy"
    chat_tokenizer(picky).save_pretrained(folder)
    here.edit(model="mine", models__mine={"source": "models/local/mine", "chat_template": "auto"})
    (here.root / "data/prompts/train.jsonl").write_text('{"prompt": "Hi"}\n{"prompt": "Hi there, you"}\n')
    with pytest.raises(
        UserError, match=r"^models\.mine: data/prompts/train\.jsonl: prompt 'Hi there, you': .*too long$"
    ):
        cache.fitting_prompts(load_params(), folder, load_tokenizer(folder))


def test_every_end_that_a_chat_model_s_files_name_ends_an_answer(tmp_path: Path) -> None:
    """As most have it: the tokenizer's EOS ends a text, generation_config.json names the end of a turn."""
    words = chat_tokenizer(eos="<|endoftext|>")
    end = words.convert_tokens_to_ids("<|im_end|>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, words.eos_token_id]}))
    assert end_of_text_ids(tmp_path, words) == (words.eos_token_id, end)
