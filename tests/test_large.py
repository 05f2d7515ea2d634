"""What large policies need: adapters, layers computed again, frozen weights in bfloat16, weights spread over
processes."""

import json
import math
import signal
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pipeline.__main__ import build_parser
from pipeline.commands import generate
from pipeline.config.load import load_params
from pipeline.distributed.dist_context import DistContext
from pipeline.distributed.weights import load_weights, trained_weights
from pipeline.errors import UserError
from pipeline.models.adapters import add_lora, without_lora
from pipeline.models.load import load_policy
from pipeline.models.memory import activation_checkpointing, cast_frozen_bf16
from pipeline.models.sampling import pad_prompts, sample
from pipeline.models.scoring import score
from pipeline.rl.context import build_context
from pipeline.rl.loss import LossNormalizers
from pipeline.rl.micro_batch import Batch
from pipeline.rl.update import backward
from pipeline.stages import evaluate, train
from tests.faults import fault
from tests.models import EOS, difference, gradient, recipe, rollout_of, tiny_gpt2, tiny_neox, token_lists, uniform
from tests.project import Project
from tests.training import (
    STEPS,
    assert_same_curve,
    configured,
    contents,
    curve,
    exactly,
    forget,
    history,
    interrupted,
    recorded,
    sampled,
    states,
    succeed,
)

pytestmark = pytest.mark.numeric

PROMPTS, LENGTHS = token_lists([3, 3, 2, 2], 7), torch.tensor([5, 2, 4, 1])


def batch(dtype: torch.dtype = torch.float64) -> Batch:
    rollout = rollout_of(PROMPTS, token_lists(LENGTHS.tolist(), 7, seed=1))
    advantages = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=dtype)
    counted = rollout.completion_mask
    return Batch(rollout, advantages, counted, None, LossNormalizers(4, int(counted.sum()), 5))


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def moved(policy: PreTrainedModel) -> PreTrainedModel:
    """With adapters that do something."""
    draw = seeded(3)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype) / 4)
    return policy


def scored(policy: PreTrainedModel) -> Tensor:
    rollout = batch().rollout
    with torch.no_grad():
        return score(policy, rollout.prompt_ids, rollout.prompt_mask, rollout.completions, lengths=LENGTHS).logprobs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lora", [False, True])
def test_layers_computed_again_give_the_same_gradient(dtype: torch.dtype, lora: bool) -> None:
    for precision in ("float32", "bfloat16"):
        found = []
        for again in (False, True):
            policy = tiny_neox(dtype=dtype)
            if lora:
                add_lora(policy, 2, 4, seeded())
                moved(policy)
            chosen = recipe("stable", kl="none", precision=precision)
            backward(policy, batch(dtype), chosen, 2, 2, gradient_checkpointing=again)
            found.append(gradient(policy))
        assert found[0].norm() > 0
        assert torch.equal(*found), precision


def test_layers_computed_again_keep_less_and_sample_as_before() -> None:
    kept, policy = {}, tiny_neox(hidden=64)
    for again in (False, True):
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with (
            activation_checkpointing(policy, again),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            rollout = batch().rollout
            score(policy, rollout.prompt_ids, rollout.prompt_mask, rollout.completions).logprobs.sum().backward()
        kept[again] = sum(sizes)
    assert kept[True] < kept[False] / 2
    arguments = pad_prompts([[1, 2], [3]], EOS, torch.device("cpu")), torch.full((2,), 4), uniform(4, 4)
    before = sample(tiny_neox(hidden=64), *arguments[0], *arguments[1:], [EOS])
    after = sample(policy, *arguments[0], *arguments[1:], [EOS])
    assert torch.equal(before.completions, after.completions)
    assert torch.equal(before.logprobs, after.logprobs)


def tied() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=7, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True, bos_token_id=EOS, eos_token_id=EOS, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("make", [lambda: tiny_neox(dtype=torch.float32), tied], ids=["neox", "tied"])
def test_rounded_weights_score_as_autocast_does(make: object) -> None:
    policy = make()  # type: ignore[operator]
    with torch.autocast("cpu", torch.bfloat16):
        truth = scored(policy)
        cast_frozen_bf16(policy)
        assert torch.equal(scored(policy), truth), "all is trained: nothing was rounded"
        assert {p.dtype for p in policy.parameters()} == {torch.float32}
        policy.requires_grad_(False)
        cast_frozen_bf16(policy)
        assert torch.equal(scored(policy), truth)
    assert policy.get_input_embeddings().weight.dtype == torch.float32
    assert {m.weight.dtype for m in policy.get_submodule(policy.base_model_prefix).modules() if isinstance(m,
        nn.Linear)} == {
        torch.bfloat16
    }  # fmt: skip


@pytest.mark.parametrize("make", [tiny_neox, tiny_gpt2])
def test_an_adapted_policy_is_the_one_with_the_products_added(make: object) -> None:
    rank, alpha, plain, policy = 3, 12.0, make(), make()  # type: ignore[operator]
    add_lora(policy, rank, alpha, seeded())
    assert torch.equal(scored(policy), scored(plain)), "B is zero"
    moved(policy)
    weights = dict(policy.named_parameters())
    adapted = 0
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            place = name.removesuffix(".weight")
            if f"{place}.lora_A.default.weight" in weights:
                product = weights[f"{place}.lora_B.default.weight"] @ weights[f"{place}.lora_A.default.weight"]
                parameter += alpha / rank * (product.T if make is tiny_gpt2 else product)  # whose layers are transposed
                adapted += 1
    assert adapted == 8, "four layers in each of the two blocks, and not the head"
    torch.testing.assert_close(scored(policy), scored(plain), rtol=0, atol=1e-6 if make is tiny_gpt2 else 1e-10)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert len(trained) == 2 * adapted
    with without_lora(policy) as checkpoint:
        assert torch.equal(scored(checkpoint), scored(make()))  # type: ignore[operator]
    assert not torch.equal(scored(policy), scored(make()))  # type: ignore[operator]


def test_adapters_come_from_the_generator() -> None:
    drawn = []
    for number in (0, 0, 1):
        policy = tiny_neox()
        torch.manual_seed(torch.initial_seed() + 1)  # of no consequence
        add_lora(policy, 2, 4, seeded(number))
        drawn.append(trained_weights(policy))
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    first = next(name for name in drawn[0] if ".lora_A." in name)
    assert not torch.equal(drawn[0][first], drawn[2][first])
    assert drawn[0][first].abs().max() <= 1 / math.sqrt(drawn[0][first].shape[1])


def test_weights_of_another_policy_are_refused() -> None:
    policy = tiny_neox()
    weights = trained_weights(policy)
    load_weights(policy, weights)
    weights.pop(next(iter(weights)))
    with pytest.raises(ValueError, match="of another policy"):
        load_weights(policy, weights)


# The stage


@pytest.fixture
def adapted(ready: Project) -> Project:
    ready.edit(train__lora_rank=2, train__lora_alpha=8, train__steps=12, recipes__stable__lr=0.05,
               recipes__stable__precision="bfloat16")  # fmt: skip
    return ready


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_trained_adapters_load_in_peft_and_go_on_after_a_kill(
    adapted: Project, here: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main()
    rows, outputs = history(adapted), contents(adapted)
    assert {"data/policy/adapter_model.safetensors", "data/policy/adapter_config.json"} <= set(outputs)
    assert "data/policy/model.safetensors" not in outputs
    assert rows[0]["ref_kl_k1"] == pytest.approx(0, abs=1e-6)
    assert rows[-1]["ref_kl_k3"] > 0, "the policy has left the reference"
    forget(adapted)
    said = interrupted(adapted, {"PYTHONHASHSEED": "2"}, signal.SIGKILL)
    assert "Traceback" not in said
    assert states(adapted)
    train.main()
    assert contents(adapted) == outputs

    ours = load_policy(Path("data/policy"), torch.device("cpu"))
    base = AutoModelForCausalLM.from_pretrained(
        "data/checkpoint/policy", dtype=torch.float32, attn_implementation="eager"
    )
    theirs = PeftModel.from_pretrained(base, "data/policy")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
        # as the README says, and not rounded to the float16 that the checkpoint's weights are stored in
        plain = AutoModelForCausalLM.from_pretrained("data/policy")
        torch.testing.assert_close(plain(ids).logits, theirs(ids).logits)
        with without_lora(ours) as checkpoint:
            untouched = checkpoint(ids).logits
        assert not torch.allclose(ours(ids).logits, untouched)
    evaluate.main()
    metrics = json.loads((adapted.root / "reports/evaluate/metrics.json").read_text())
    assert metrics["ref_logprob_per_token"]["policy"] != metrics["ref_logprob_per_token"]["checkpoint"]
    generate.main(build_parser().parse_args(["generate", "Hello", "--max-tokens", "9"]))
    assert "policy: Hello" in capsys.readouterr().out


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_byte_of_the_policy(here: Project) -> None:
    here.edit(train__steps=3)
    train.main()
    plain = contents(here)
    forget(here)
    here.edit(train__gradient_checkpointing=True)
    train.main()
    again = contents(here)
    for name in ("data/policy/model.safetensors", "reports/train/history.csv"):
        assert again[name] == plain[name]


def spread(project: Project, count: int) -> dict[str, str]:
    """The environment that has accelerate spread the policy over so many processes."""
    environment = configured(project, count)
    config = project.root / "processes.yaml"
    lines = config.read_text().replace("MULTI_GPU", "FSDP") + "fsdp_config:\n  fsdp_version: 2\n"
    config.write_text(lines)
    return environment


@pytest.fixture
def exact(ready: Project) -> Project:
    return exactly(ready)


@pytest.mark.slow
def test_a_policy_spread_over_processes_trains_as_one_in_one_piece(exact: Project, here: Project) -> None:
    train.main()
    alone, run, samples, measured = history(exact), recorded(exact), sampled(exact), curve(exact)
    weights = load_policy(exact.root / "data/policy", torch.device("cpu")).state_dict()
    forget(exact)
    succeed(exact, **spread(exact, 2))
    assert recorded(exact) == {**run, "processes": ["2 sharded"]}
    assert [json.loads(x)["tokens"] for x in sampled(exact).splitlines()] == [
        json.loads(x)["tokens"] for x in samples.splitlines()
    ]
    assert_same_curve(exact, *measured)
    for row, truth in zip(history(exact), alone, strict=True):
        for name in set(truth) - {"grad_snr"}:  # not told of a spread policy
            assert row[name] == pytest.approx(truth[name], rel=1e-3, abs=1e-5, nan_ok=True), name
        assert math.isnan(row["grad_snr"])
    found = load_policy(exact.root / "data/policy", torch.device("cpu")).state_dict()
    assert max(difference(found[name], weights[name]) for name in weights) < 1e-4


@pytest.mark.slow
@pytest.mark.exhaustive  # tests/test_processes.py ends processes that are not spread
def test_a_spread_policy_that_was_stopped_goes_on_to_the_same_bytes(exact: Project) -> None:
    two = spread(exact, 2)
    succeed(exact, **two)
    outputs = contents(exact)
    forget(exact)
    interrupted(exact, two, signal.SIGTERM)
    succeed(exact, **two)
    assert contents(exact) == outputs


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.exhaustive  # tests/test_processes.py kills processes that are not spread
def test_a_spread_policy_that_was_killed_goes_on_in_one_piece(exact: Project) -> None:
    with fault("killed with a policy spread over two processes"):
        interrupted(exact, spread(exact, 2), signal.SIGKILL)
        succeed(exact)
        assert recorded(exact)["processes"] == ["2 sharded", 1]
        assert [row["step"] for row in history(exact)] == list(range(STEPS))


ALTERNATING = "def f(prompts, completions):\n    return [float(i % 2) for i in range(len(completions))]\n"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_spread_policy_trains_in_bfloat16_with_layers_computed_again(exact: Project, here: Project) -> None:
    """The first step is that of one process, whose rounding may differ: by one other token of 48, whatever the
    reward."""
    (exact.root / "custom/mine.py").write_text(ALTERNATING)
    exact.edit(reward="mine", rewards__mine={"kind": "custom", "function": "custom/mine.py:f"}, train__steps=2)
    exact.edit(train__gradient_checkpointing=True, recipes__stable__precision="bfloat16")
    train.main()
    alone = history(exact)
    forget(exact)
    succeed(exact, **spread(exact, 2))
    assert recorded(exact)["processes"] == ["2 sharded"]
    rows = history(exact)
    assert len(rows) == 2
    for name in ("reward_mean", "entropy", "grad_norm"):
        assert rows[0][name] == pytest.approx(alone[0][name], rel=0.05), name


@pytest.mark.slow
def test_adapters_are_not_spread(adapted: Project, here: Project) -> None:
    with pytest.raises(UserError, match=r"^train\.lora_rank: adapters need no spreading"):
        build_context(load_params(), torch.device("cpu"), DistContext(0, 2, sharded=True))
