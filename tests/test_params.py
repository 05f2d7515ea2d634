"""params.yaml: what ships loads, and each mistake is one line that names the key, the value and what would be right."""

import copy
import functools
import operator
import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from ruamel.yaml import YAML

from pipeline.config.load import load_params, validate_params
from pipeline.config.overrides import experiment_command, option
from pipeline.config.schema import SELECTORS, Params
from pipeline.errors import UserError
from pipeline.file_io import flatten
from pipeline.runs.provenance import chosen_params
from tests.clones import Clone
from tests.error_lines import check_line
from tests.faults import fault, rounds

SHIPPED = Path(__file__).parents[1] / "params.yaml"
TEXT = SHIPPED.read_text(encoding="utf-8")
TREE = YAML(typ="safe", pure=True).load(TEXT)


# what a user adds for a reward that was learned
LEARNED = {
    "classifiers": {
        "mood": {"repo": "some/mood", "revision": "main", "sha256": "0" * 64},
        "taste": {"package": "some-taste"},
    },
    "rewards": {
        "mood": {
            "kind": "classifier", "classifier": "mood", "label": "good", "score": "probability",
            "input": "prompt_completion", "max_tokens": 512, "precision": "bfloat16",
        },
        "both": {
            "kind": "sum",
            "terms": [
                {"weight": 1.0, "reward": {"kind": "classifier", "classifier": "mood", "label": "good"}},
                {"weight": 0.5, "reward": {"kind": "classifier", "classifier": "taste"}},
            ],
        },
    },
}  # fmt: skip
TREE_LEARNED = {**TREE, "classifiers": LEARNED["classifiers"], "rewards": {**TREE["rewards"], **LEARNED["rewards"]}}


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "params.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


OWN = "params:\n      mark: '?'"  # of the reward `questions`


def edited(old: str, new: str) -> str:
    """The shipped file with the first `old` replaced; fails where the file no longer holds it."""
    assert old in TEXT, old
    return TEXT.replace(old, new, 1)


def refusal(path: Path) -> str:
    """The one line with which a file is refused, without the file's name at its start."""
    with pytest.raises(UserError) as caught:
        load_params(path)
    line = check_line(str(caught.value))
    assert line.startswith(str(path)), line
    return line.removeprefix(str(path)).removeprefix(":").strip()


def test_the_shipped_file_loads_as_written() -> None:
    params = load_params(SHIPPED)
    assert params.selected_recipe.lr == TREE["recipes"]["stable"]["lr"]
    assert params.selected_model.source == TREE["models"]["pocket"]["source"]
    assert list(params.rewards["words"].model_dump()["words"]) == TREE["rewards"]["words"]["words"]
    assert {name: list(getattr(params, table)) for name, table in SELECTORS.items()} == {
        name: list(TREE[table]) for name, table in SELECTORS.items()
    }
    assert params.rewards["short_greeting"].model_dump()["terms"][1]["reward"] == {"kind": "length", "target": 20}


@pytest.mark.parametrize(
    ("selector", "name"), [(selector, name) for selector, table in SELECTORS.items() for name in TREE[table]]
)
def test_every_table_that_ships_can_be_selected(selector: str, name: str) -> None:
    params = validate_params({**TREE, selector: name})
    assert params.selected(selector) is getattr(params, SELECTORS[selector])[name]


def test_frozen() -> None:
    params = load_params(SHIPPED)
    for table, key in (
        (params, "seed"), (params.train, "steps"), (params.selected_recipe, "lr"), (params.rewards["length"], "target"),
        (params.rewards["short_greeting"].terms[0], "weight"),  # type: ignore[union-attr]
    ):  # fmt: skip
        with pytest.raises(ValidationError, match="frozen"):
            setattr(table, key, 1)


def test_the_default_path_is_that_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^params.yaml: no such file; run from the project's root$"):
        load_params()
    write(tmp_path, TEXT)
    assert load_params() == load_params(SHIPPED)


# What DVC's -S leaves in the file, and what a user writes by hand.
NUMBERS = {"3e-05": 3e-05, "3e-5": 3e-05, "1E-4": 1e-4, "0.00003": 3e-05, "1": 1.0, "1.0e-08": 1e-8, ".5": 0.5}


@pytest.mark.parametrize(("written", "value"), NUMBERS.items())
def test_numbers_are_numbers(tmp_path: Path, written: str, value: float) -> None:
    params = load_params(write(tmp_path, edited("    lr: 0.0003\n", f"    lr: {written}\n")))
    assert params.recipes["notebook"].lr == value


def test_a_file_that_dvc_has_rewritten_still_loads(tmp_path: Path) -> None:
    """`dvc exp run -S` goes through DVC's own reader and writer of YAML."""
    modify_yaml = pytest.importorskip("dvc.utils.serialize").modify_yaml
    path = write(tmp_path, TEXT)
    with modify_yaml(str(path)) as tree:
        tree["recipes"]["stable"]["lr"] = 3e-5
        tree["reward"] = "length"
    params = load_params(path)
    assert (params.recipes["stable"].lr, params.reward) == (3e-5, "length")
    assert params.rewards == load_params(SHIPPED).rewards


# An edit of the file, and what the line must name: the key, the value, what would be right.
EDITS: list[tuple[str | bytes, list[str]]] = [
    (TEXT + "zzz: 1\n", ["unknown key zzz", "there are: model, prompts, reward"]),
    (edited("kl_probe_fraction", "rescored_share"),
     ["unknown key train.rescored_share: it is called kl_probe_fraction now"]),
    (TEXT.replace("train:\n", "evaluate2:\n", 1), ["unknown key evaluate2", "'evaluate'"]),
    (re.sub(r"  steps: 50.*\n", "", TEXT), ["train.steps is missing"]),
    (edited("reward: embedding", "reward: lenght"),
     ["reward: there is no 'lenght' in rewards", "did you mean 'length'?"]),
    (edited("model: pocket", "model: gpt"), ["model: there is no 'gpt' in models", "pythia-70m"]),
    (edited("model: pocket", "model: pythia-2.8b"), ["there is no 'pythia-2.8b'", "did you mean 'pythia-2_8b'?"]),
    (edited("recipe: stable", "recipe: 3"), ["recipe = 3: should name one of recipes: notebook, stable"]),
    (edited("recipe: stable", "recipe:"), ["recipe = nothing: should name one of recipes"]),
    (edited("recipe: stable", "recipe: [stable]"), ["recipe = ['stable']: should name one of recipes"]),
    (edited("kind: length", "kind: lenght"),
     ["rewards.length.kind = 'lenght': should be one of 'embedding', 'classifier', 'length', 'words', 'match',"]),
    (edited("    kind: length\n", ""), ["rewards.length.kind is missing"]),
    (edited("        kind: length", "        kind: sum"),
     ["terms.1.reward.kind = 'sum'", "'embedding', 'classifier', 'length', 'words', 'match', 'format', 'custom'"]),
    (TEXT[: TEXT.index("    terms:")] + "    terms: []\n" + TEXT[TEXT.index("\nrecipes:") :],
     ["rewards.short_greeting.terms = []", "at least 1 item"]),
    (edited("steps: 50", 'steps: "50"'), ["train.steps = '50': should be a valid integer"]),
    (edited("steps: 50", "steps: 50.5"), ["train.steps = 50.5", "integer"]),
    (edited("steps: 50", "steps: true"), ["train.steps = true", "integer"]),
    (edited("temperature: 1.0", "temperature: true"), ["recipes.notebook.temperature = true", "number"]),
    (edited("keep_samples: some", "keep_samples: most"),
     ["train.keep_samples = 'most': should be 'some' or 'all'"]),
    (edited("keep_samples: some", "keep_samples: true"), ["train.keep_samples = true: should be 'some' or 'all'"]),
    (edited("steps: 50", "steps: 0"), ["train.steps = 0: should be greater than or equal to 1"]),
    (edited("samples_per_prompt: 8", "samples_per_prompt: 1"),
     ["train.samples_per_prompt = 1", "2 (a group of one has no spread)"]),
    (edited("lr: 0.0003", "lr: -0.1"), ["recipes.notebook.lr = -0.1: should be greater than 0 (learning rate)"]),
    (edited("top_p: 1.0", "top_p: 1.1"), ["recipes.notebook.top_p = 1.1: should be less than or equal to 1"]),
    (edited("steps: 50", "steps: " + "9" * 30), ["train.steps = 9999", "10000000"]),
    (edited("steps: 50", "steps: " + "9" * 5000), ["4300 digits"]),
    (edited("steps: 50", "steps: 0x" + "f" * 5000), ["train.steps: an integer of more than 4300 digits"]),
    (edited("recipe: stable", "recipe: 0x" + "f" * 5000), ["recipe: an integer of more than 4300 digits"]),
    (TEXT + "? 0x" + "f" * 5000 + "\n: 3\n", ["a key: an integer of more than 4300 digits"]),
    (edited(OWN, "params: {a: [1, -0x" + "f" * 5000 + "]}"),
     ["rewards.questions.params.a.1: an integer of more"]),
    (edited(OWN, "params: {a: !!set {0x" + "f" * 5000 + "}}"),
     ["rewards.questions.params.a.0: an integer of more"]),
    (edited("prompts_per_step: 16", "prompts_per_step: 10000000"),
     ["train: prompts_per_step * samples_per_prompt * max_tokens = 1600000000: should be at most 1000000000"]),
    (edited("kl_coef: 0.2", "kl_coef: " + "9" * 400), ["recipes.stable.kl_coef = 999", "number"]),
    (edited("kl_coef: 0.2", "kl_coef: 1e400"), ["recipes.stable.kl_coef = inf: should be a finite number"]),
    (edited("lr: 0.0003", "lr: .nan"), ["recipes.notebook.lr = nan: should be a finite number"]),
    (edited("combine: sum", "combine: product"),
     ["rewards.short_greeting.combine = 'product': should be 'sum' or 'normalized'"]),
    (edited("- weight: 1.0", "- name: a.b\n      weight: 1.0"), ["rewards.short_greeting.terms.0.name = 'a.b'"]),
    (edited("- weight: 1.0", "- name: x\n      weight: 1.0").replace("- weight: 0.02", "- name: x\n      weight: 0.02"),
     ["rewards.short_greeting: terms: the name 'x' stands twice"]),
    (edited("combine: sum", "combine: normalized").replace("reward: embedding ", "reward: short_greeting ").replace(
        "baseline: rloo", "baseline: greedy"),
     ["recipes.stable.baseline = greedy cannot go with rewards.short_greeting.combine = normalized", "choose rloo"]),
    (edited("weight: 0.02", "weight: .inf"), ["rewards.short_greeting.terms.1.weight = inf", "finite"]),
    (edited("seed: 0", "seed: -1"), ["seed = -1: should be greater than or equal to 0"]),
    (edited("baseline: group", "baseline: grup"),
     ["recipes.notebook.baseline = 'grup': should be 'none', 'batch', 'group', 'rloo', 'running' or 'greedy'"]),
    (edited("epochs: 1", "epochs: 2"), ["recipes.notebook: epochs = 2 needs importance: token or sequence"]),
    (edited("clip_range: 0.0", "clip_range: 0.2"), ["recipes.notebook: clip_range = 0.2 needs importance"]),
    (edited("clip_range: 0.0", "clip_range_high: 0.3"), ["recipes.notebook: clip_range_high = 0.3 needs clip_range"]),
    (edited("clip_range_high: 0.28", "clip_range_high: -1"), ["recipes.dapo.clip_range_high = -1: should be greater"]),
    (edited("overlong_buffer: 4 ", "overlong_buffer: 4.5"), ["recipes.dapo.overlong_buffer = 4.5", "valid integer"]),
    (edited("overlong_penalty: 1.0", "overlong_penalty: -1.0"), ["recipes.dapo.overlong_penalty = -1.0: should be gr"]),
    (edited("resample_rounds: 3 ", "resample_rounds: 1001"), ["recipes.dapo.resample_rounds = 1001: should be less"]),
    (edited("length_limit: total ", "overlong_buffer: 5\n    length_limit: total "),
     ["recipes.notebook: overlong_buffer needs length_limit: completion"]),
    (edited("recipe: stable ", "recipe: dapo ").replace("max_tokens: 20", "max_tokens: 3"),
     ["recipes.dapo.overlong_buffer 4 exceeds train.max_tokens 3"]),
    (re.sub(r"(rloo:\n(    .*\n)*?)    lr: .*\n", r"\1", TEXT), ["recipes.rloo.lr is missing"]),
    (edited("loss_distribution: full", "loss_distribution: sampler"),
     ["recipes.notebook: loss_distribution: sampler needs alignment: correct"]),
    (edited("kl: none", "kl:"), ["recipes.notebook.kl = nothing: should be 'none'"]),
    (edited("target: Hi there!", "target: 5"),
     ["rewards.embedding.target = 5: should be text: put it in quotes (the sentence to be near to)"]),
    (edited("lr: 0.0003", "lr: 2020-01-01"), ["recipes.notebook.lr", "number"]),
    (edited("    source: data/pocket/c", "    repo: a/b\n    source: data/pocket/c"),
     ["models.pocket: needs exactly one of repo, source"]),
    (edited("    source: data/pocket/checkpoint", "    revision: main"),
     ["models.pocket: needs exactly one of repo, source"]),
    (edited("    source: data/pocket/checkpoint", ""), ["models.pocket = nothing: should be a table of keys"]),
    (re.sub(r"train:\n(  .*\n)+", "train: []\n", TEXT), ["train = []: should be a table of keys"]),
    (edited("repo: EleutherAI/pythia-14m", "repo: https://host/a"),
     ["models.pythia-14m.repo = 'https://host/a': should be owner/name on the hub"]),
    (edited("revision: step143000", "revision: a/../../b"),
     ["models.pythia-14m.revision = 'a/../../b': should be a commit, tag or branch"]),
    (TEXT + "? " + "a" * 100_000 + "\n: 3\n", ["unknown key aaaa", "there are: model, prompts, reward"]),
    (edited("reward: embedding", "reward: " + "e" * 100_000),
    ["reward: there is no 'eeee", f"there are: {next(iter(TREE['rewards']))}"]),
    (TEXT + '"a\u202eb": 3\n', ["unknown key a\\u202eb"]),
    (edited("sha256: 53aa51", "sha256: 53AA51"), ["encoders.minilm.sha256 = '53AA51", "64 hexadecimal digits"]),
    (edited("custom/example.py:questions", "custom/../x.py:f"),
     ["rewards.questions.function = 'custom/../x.py:f': should be custom/file.py:function"]),
    (edited("min_characters: 1\n", "min_characters: 40\n"),
     ["prompt_sets.pocket: min_characters 40 exceeds max_characters 31"]),
    (edited("    - red", "    - Red"), ["rewards.words: 'Red' can never match"]),
    (edited("    - red", '    - ""'), ["rewards.words.words.0 = ''", "at least 1 character"]),
    (edited("    - red", "    - 3"), ["rewards.words.words.0 = 3: should be text: put it in quotes"]),
    (edited("  questions:", "  text:"), ["rewards: 'text' is taken"]),
    (edited("  pythia-2_8b:", "  pythia-2.8b:"), ["key models.pythia-2.8b", "no dots"]),
    (edited("  questions:", "  ques.tions:"), ["key rewards.ques.tions", "no dots"]),
    (edited(OWN, "params: {a.b: 1}"), ["key rewards.questions.params.a.b", "no dots"]),
    (edited(OWN, "params: {a: [.nan]}"), ["rewards.questions.params.a = [nan]: should be a finite number"]),
    (edited("  questions:", "  3:"), ["key rewards.3", "should be text"]),
    (edited("  questions:", "  ? [a, b]\n  :"), ["key rewards.", "should be text"]),
    (TEXT + "3: 4\n", ["key 3", "should be text"]),
    (edited(OWN, "params: {a: 2020-01-01}"), ["rewards.questions.params.a"]),
    (TEXT + "seed: 1\n", [f"line {TEXT.count(chr(10)) + 1}", 'duplicate key "seed"']),
    (edited("  steps: 50", "  steps: 50\n  steps: 51"), ["line 11", 'duplicate key "steps"']),
    (edited("target: Hi there!", "target: Hi: there"),
     ["line ", "not valid YAML: mapping values are not allowed here"]),
    (edited("steps: 50", "steps: [50"), ["line ", "not valid YAML"]),
    (TEXT + "\tx: 3\n", ["not valid YAML", "'\\t'"]),
    (TEXT + "---\na: 1\n", ["not valid YAML", "another document"]),
    (TEXT + "x: *nope\n", ["not valid YAML", "undefined alias 'nope'"]),
    (TEXT + "x: !!python/object/apply:os.system ['false']\n", ["not valid YAML", "tag"]),
    (TEXT + "x: !!bool abc\n", ["not valid YAML", "abc"]),
    (TEXT + "x: \x07\n", ["not valid YAML", "#x0007"]),
    (TEXT + '"a\\nb": 3\n', ["unknown key a b"]),
    (TEXT + '"a\\e[31mb": 3\n', ["unknown key a\\x1b[31mb"]),
    (edited("target: Hi there!", 'target: "\\ud800"'),
     ["rewards.embedding.target holds text that is not valid Unicode"]),
    (TEXT + '"\\ud800": 3\n', ["a key holds text that is not valid Unicode"]),
    (TEXT.replace("Hi there!", "Hé!").encode("latin-1"), ["line ", "should be UTF-8, byte 0xe9 is not"]),
    (TEXT.encode("utf-16"), ["line 1", "should be UTF-8"]),
    ("", ["should hold keys such as model"]),
    ("# a\n", ["should hold keys such as model"]),
    ("- model: pocket\n", ["should hold keys such as model, reward and train, not list"]),
    ("pocket\n", ["should hold keys such as model, reward and train, not str"]),
    (edited(OWN, "params: {a: " + "[" * 300 + "]" * 300 + "}"),
     ["rewards.questions.params.a: nested too deeply"]),
    ("a: " + "[" * 500, ["nested too deeply"]),
    (TEXT + "a: " + "[" * 500 + "]" * 500 + "\n", ["nested too deeply"]),
]  # fmt: skip


@pytest.mark.faults
@pytest.mark.parametrize(("content", "expected"), EDITS, ids=[expected[0][:60] for _, expected in EDITS])
def test_a_mistake_is_one_line_that_says_what_would_be_right(
    tmp_path: Path, content: str | bytes, expected: list[str]
) -> None:
    with fault("mistake in params.yaml"):
        line = refusal(write(tmp_path, content))
        for part in expected:
            assert part in line


LEARNED_MISTAKES: list[tuple[str, Any, str]] = [
    ("classifiers", {}, "rewards.mood: there is no 'mood' in classifiers (there are: none)"),
    ("classifiers", [], "classifiers = []: should be a table of keys"),
    ("classifiers.mood", None, "classifiers.mood = nothing: should be a table of keys"),
    ("classifiers.mood.source", "models/local/x", "classifiers.mood: needs exactly one of repo, source, package"),
    ("classifiers.mood.repo", "https://x/y", "classifiers.mood.repo = 'https://x/y': should be owner/name on the hub"),
    ("classifiers.mood.revision", 3, "classifiers.mood.revision = 3: should be text: put it in quotes (a commit, tag"),
    ("classifiers.mood.sha256", "0", "classifiers.mood.sha256 = '0': should be a sha256: 64 hexadecimal digits"),
    ("classifiers.mood.label", "good", "unknown key classifiers.mood.label (there are: repo, revision, source"),
    ("rewards.mood.classifier", "mod", "rewards.mood: there is no 'mod' in classifiers; did you mean 'mood'?"),
    ("rewards.both.terms.1.reward.classifier", "x", "rewards.both: there is no 'x' in classifiers (there are: mood, "),
    ("rewards.mood.classifier", ["mood"], "rewards.mood.classifier = ['mood']: should be a valid string (the name of"),
    ("rewards.mood.label", 1, "rewards.mood.label = 1: should be text: put it in quotes (one of the model's labels"),
    ("rewards.mood.score", "logits", "rewards.mood.score = 'logits': should be 'logit' or 'probability'"),
    ("rewards.mood.input", "prompt", "rewards.mood.input = 'prompt': should be 'completion' or 'prompt_completion'"),
    ("rewards.mood.max_tokens", 0, "rewards.mood.max_tokens = 0: should be greater than or equal to 1 (tokens of an"),
    ("rewards.mood.precision", "float16", "rewards.mood.precision = 'float16': should be 'float32' or 'bfloat16'"),
    ("rewards.both.terms.0.reward.score", None, "rewards.both.terms.0.reward.score = nothing: should be 'logit' or"),
]  # fmt: skip


@pytest.mark.faults
@pytest.mark.parametrize(("place", "value", "expected"), LEARNED_MISTAKES)
def test_a_mistake_in_a_reward_that_was_learned_is_one_line(place: str, value: Any, expected: str) -> None:
    tree = copy.deepcopy(TREE_LEARNED)
    *above, key = [int(part) if part.isdigit() else part for part in place.split(".")]
    functools.reduce(operator.getitem, above, tree)[key] = value
    with fault("mistake in params.yaml"):
        with pytest.raises(UserError) as caught:
            validate_params(tree)
        assert expected in check_line(str(caught.value))


@pytest.mark.parametrize(("table", "keys", "expected"), [
    ("models", {"source": "models/local/x", "revision": "main"}, "revision belongs to repo and does nothing"),
    ("prompt_sets", {"source": "data/local/x.csv", "revision": "0" * 40}, "revision belongs to repo and does nothing"),
    ("encoders", {"package": "some-encoder", "revision": "main"}, "revision belongs to repo and does nothing"),
    ("classifiers", {"source": "models/local/x", "revision": "main"}, "revision belongs to repo and does nothing"),
    ("models", {"repo": "a/b", "manifest_sha256": "0" * 64}, "manifest_sha256 needs source"),
])  # fmt: skip
def test_a_key_that_its_origin_has_not_is_refused(table: str, keys: dict[str, str], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        validate_params({**TREE, table: {**TREE.get(table, {}), "mine": keys}})
    assert f"{table}.mine: {expected}" in check_line(str(caught.value))


def bomb(indent: str, width: int = 9, depth: int = 9) -> str:
    """Nine lines that stand for 9^9 values."""
    lines = [f"{indent}a0: &a0 [{', '.join(['x'] * width)}]"]
    lines += [f"{indent}a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, depth)]
    return "\n".join(lines) + "\n"


ALIASES = {
    "bomb at the top": TEXT + bomb(""),
    "bomb in the parameters of a custom reward": edited(f"    {OWN}\n", "    params:\n" + bomb("      ")),
    "list in itself": TEXT + "x: &a [*a]\n",
    "table in itself": edited(f"    {OWN}\n", "    params: &a\n      x: *a\n"),
    "everything in itself": "&a\n" + TEXT.replace("model: pocket", "model: *a", 1),
}


@pytest.mark.faults
@pytest.mark.parametrize("case", ALIASES)
def test_aliases_that_stand_for_endless_values_are_refused(tmp_path: Path, case: str) -> None:
    with fault("mistake in params.yaml"):
        assert "more than 100000 values" in refusal(write(tmp_path, ALIASES[case]))


def test_anchors_that_end_are_allowed(tmp_path: Path) -> None:
    merged = TEXT + "  third:\n    <<: *stable\n    lr: 0.001\n"
    params = load_params(write(tmp_path, merged.replace("  stable:\n", "  stable: &stable\n")))
    assert params.recipes["third"] == params.recipes["stable"].model_copy(update={"lr": 0.001})


def test_a_path_that_cannot_be_read(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "nowhere.yaml")
    assert "cannot be read" in refusal(tmp_path)


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    assert load_params(write(tmp_path, b"\xef\xbb\xbf" + TEXT.encode())) == load_params(SHIPPED)


def paths(tree: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every key of a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in items for found in [(*prefix, key), *paths(value, (*prefix, key))]]


PATHS = paths(TREE_LEARNED)
HUGE = st.integers(0, 20_000).map(lambda bits: 2**bits)  # beyond what Python prints and pydantic takes
SCALARS = st.none() | st.booleans() | st.integers() | HUGE | st.floats() | st.text(max_size=8) | st.dates()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3), max_leaves=6
)
KEYS = st.sampled_from(sorted({key for path in PATHS for key in path if isinstance(key, str)})) | SCALARS


@pytest.mark.faults
@given(st.data())
@settings(max_examples=rounds(4000, 150), deadline=None)
def test_no_mutation_raises_anything_else(data: st.DataObject) -> None:
    """Values replaced, keys removed, added and renamed, anywhere in the tree."""
    tree = copy.deepcopy(TREE_LEARNED)
    for _ in range(data.draw(st.integers(1, 3))):
        *above, key = data.draw(st.sampled_from(PATHS))
        try:
            table = functools.reduce(operator.getitem, above, tree)
            match data.draw(st.sampled_from(["replace", "remove", "add", "rename"])):
                case "replace":
                    table[key] = data.draw(VALUES)
                case "remove":
                    del table[key]
                case "add":
                    table[key][data.draw(KEYS)] = data.draw(VALUES)
                case "rename":
                    table[data.draw(KEYS)] = table.pop(key)
        except (KeyError, IndexError, TypeError):
            continue  # an earlier mutation has removed this place
    with fault("params.yaml changed at random"):
        try:
            assert isinstance(validate_params(tree), Params)
        except UserError as error:
            check_line(str(error))


@pytest.mark.faults
@given(st.binary(max_size=40), st.integers(0, len(TEXT)), st.integers(0, 40))
@settings(max_examples=rounds(800, 30), deadline=None)
def test_no_bytes_raise_anything_else(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, at: int, cut: int
) -> None:
    content = TEXT.encode()
    path = write(tmp_path_factory.mktemp("params"), content[:at] + noise + content[at + cut :])
    with fault("damaged bytes in params.yaml"):
        try:
            assert isinstance(load_params(path), Params)
        except UserError as error:
            check_line(str(error))


# Through DVC's own reader of overrides: (override, what the line names)
OVERRIDES = [
    ("train.steps=0", "train.steps = 0: should be greater than or equal to 1"),
    ("+train.stepz=3", "unknown key train.stepz; did you mean 'steps'?"),
    ("recipes.stable.lr=.nan", "recipes.stable.lr"),
    ("train.steps=x", "train.steps = 'x': should be a valid integer"),
    ("recipes.stable.lr=1e999", "recipes.stable.lr = inf: should be a finite number"),
    ("seed=-1", "seed = -1: should be greater than or equal to 0"),
    ("recipes.stable.baseline=best", "recipes.stable.baseline = 'best': should be 'none', 'batch'"),
    ("rewards.length.kind=none", "rewards.length.kind = 'none': should be one of 'embedding'"),
    ("train.threads=[1,2]", "train.threads = [1, 2]: should be a valid integer"),
    ("models.pocket.source=../../etc", "models.pocket.source = '../../etc': no such directory"),
    ("rewards.questions.function=custom/../../x.py:f", "should be custom/file.py:function"),
    ("train.prompts_per_step=99999999", "train.prompts_per_step = 99999999: should be less than or equal to"),
]


@pytest.mark.slow
@pytest.mark.faults
def test_an_override_that_is_wrong_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    clone = Clone(tmp_path / "project", tmp_path / "cache")
    params = clone.root / "params.yaml"
    before = params.read_bytes()
    for override, expected in OVERRIDES[: rounds(len(OVERRIDES), 2)]:
        with fault("mistake in an override of `dvc exp run -S`"):
            said = clone("dvc", "exp", "run", "-S", override, fails=True)
            lines = [line for line in said.splitlines() if line.startswith("error: ")]
            assert len(lines) == 1, said
            assert expected in lines[0]
            assert "Traceback" not in said
            for made in ("data/policy", "data/checkpoint", "mlflow.db"):
                assert not (clone.root / made).exists()
            params.write_bytes(before)  # `git restore` may miss an edit of DVC's, which notes its time and size


@pytest.mark.parametrize(
    "path",
    [path for path in PATHS if isinstance(path[-1], str) and "params" not in path[2:]],  # a custom reward's are its own
    ids=lambda path: ".".join(map(str, path)),
)
def test_every_misspelt_key_is_named(path: tuple[Any, ...]) -> None:
    """A doubled last letter: the line names the key where it stands, whatever else is then wrong."""
    *above, key = path
    tree = copy.deepcopy(TREE_LEARNED)
    table = functools.reduce(operator.getitem, above, tree)
    misspelt = key + key[-1]
    table[misspelt] = table.pop(key)
    free = len(path) == 2 and path[0] in SELECTORS.values()  # the name of a table is the user's own
    if free:
        selector = next(name for name, table_name in SELECTORS.items() if table_name == path[0])
        tree[selector] = key
    with pytest.raises(UserError) as caught:
        validate_params(tree)
    line = check_line(str(caught.value))
    if path[0] == "classifiers" and len(path) == 2:  # the user's own too
        assert f"there is no {key!r} in classifiers; did you mean {misspelt!r}?" in line
    elif free:
        assert f"{selector}: there is no {key!r} in {path[0]}; did you mean {misspelt!r}?" in line
    elif key == "kind":
        assert f"{'.'.join(map(str, path))} is missing" in line
    else:
        assert f"unknown key {'.'.join(map(str, [*above, misspelt]))}; did you mean {key!r}?" in line


# --- commands that are printed


def after_command(command: str, path: Path) -> Params:
    """The parameters that `dvc exp run` would run with."""
    from dvc.utils.hydra import apply_overrides, to_hydra_overrides

    words = shlex.split(command)
    assert words[:3] == ["dvc", "exp", "run"]
    options = [after for before, after in pairwise(words) if before == "-S"]
    assert not any(each.is_sweep_override() for each in to_hydra_overrides(options))
    apply_overrides(path, options)
    return load_params(path)


NASTY = """it's "so": a\\ \\" \\' ${seed} \\${x} [1, 2], {a: 1} = # \u00e9\u4f60\n two\\"""
REWARDS = {
    "nasty": {"kind": "embedding", "target": NASTY},
    "mixed": {
        "kind": "sum",
        "terms": [
            {"weight": 0.5, "reward": {"kind": "words", "words": ["1", "null", "1e5"]}},
            {"weight": 1, "reward": {"kind": "embedding", "target": NASTY}},
        ],
    },
    "own": {
        "kind": "custom",
        "function": "custom/example.py:questions",
        "params": {"deep": {"rate": 1e-08, "on": True}},
    },
}


@pytest.mark.parametrize("reward", ["embedding", "words", "questions", "short_greeting", "both", *REWARDS])
def test_a_printed_command_makes_the_run_again_whatever_params_yaml_says(tmp_path: Path, reward: str) -> None:
    tree = copy.deepcopy(TREE_LEARNED)
    tree["rewards"] |= REWARDS
    tree["recipes"]["mine"] = {**tree["recipes"]["stable"], "lr": 3e-05}
    tree |= {"reward": reward, "recipe": "mine", "seed": 7, "model": "pythia-14m"}
    tree["train"] |= {"steps": 6, "on_collapse": "stop"}
    tree["evaluate"] |= {"prompts": 10}
    run = validate_params(tree)
    told = chosen_params(run) | flatten({"evaluate": run.evaluate.model_dump()})
    again = after_command(experiment_command(told, {}), write(tmp_path, TEXT))
    assert chosen_params(again) == chosen_params(run)
    assert again.evaluate == run.evaluate
    changed = after_command(experiment_command(told, {"recipes.mine.lr": 1e-05}, "--temp"), write(tmp_path, TEXT))
    assert changed.selected_recipe == run.selected_recipe.model_copy(update={"lr": 1e-05})


def test_a_change_of_a_key_that_params_yaml_leaves_out(tmp_path: Path) -> None:
    path = write(tmp_path, edited("    kl_target: 6.0 ", "    # "))
    assert (
        after_command(f"dvc exp run -S {option('recipes.stable.kl_target', 0.5)}", path).selected_recipe.kl_target
        == 0.5
    )
