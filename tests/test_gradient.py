"""The gradient of one batch: the formula's, whatever the micro-batches, the padding, the order and the processes."""

import dataclasses
import itertools
import math
import socket
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, multiprocessing
from transformers import TopKLogitsWarper, TopPLogitsWarper

from pipeline.config.schema import Recipe
from pipeline.distributed.dist_context import DistContext
from pipeline.distributed.sharding import gather_full, shard
from pipeline.rl.advantages import with_kl_penalty
from pipeline.rl.loss import LossNormalizers, kl_loss_k2, policy_loss, token_weights
from pipeline.rl.micro_batch import Batch
from pipeline.rl.update import backward, make_loss_mask, signal_to_noise
from tests.enumeration import COEF, random, size_of
from tests.models import EOS, difference, gradient, plain_logits, recipe, rollout_of, tiny_neox, token_lists

pytestmark = pytest.mark.numeric


GROUP = 2
LONGEST = 11  # train.max_tokens, longer than any completion here
ORDER = list(range(6))
RECIPES = {
    "stable": {},
    "correct, padding counted": {"padding": "counted"},
    "shifted": {"alignment": "shifted"},
    "sequence_mean": {"aggregation": "sequence_mean"},
    "token_mean": {"aggregation": "token_mean", "temperature": 0.5},
    "constant_length": {"aggregation": "constant_length"},
    "loss_k2": {"kl": "loss_k2", "kl_coef": COEF},
    "loss_k3": {"kl": "loss_k3", "kl_coef": COEF},
    "entropy bonus": {"entropy_coef": 0.4, "aggregation": "token_mean"},
    "entropy bonus, padding counted": {"entropy_coef": 0.4, "padding": "counted"},
    "as sampled": {"loss_distribution": "sampler", "top_k": 3, "top_p": 0.9, "kl": "loss_k2", "kl_coef": COEF},
    "of the full softmax, though sampled from less": {"loss_distribution": "full", "top_k": 3, "top_p": 0.9},
    "as sampled, k3": {"loss_distribution": "sampler", "top_k": 3, "kl": "loss_k3", "kl_coef": COEF},
    "importance": {"importance": "sequence"},
    "importance, padding counted": {"importance": "sequence", "padding": "counted"},
    "importance of tokens, clipped": {"importance": "token", "clip_range": 0.2},
    "importance of tokens, clipped less above": {"importance": "token", "clip_range": 0.2, "clip_range_high": 0.4},
    "shifted loss_k2": {"alignment": "shifted", "padding": "counted", "kl": "loss_k2", "kl_coef": COEF},
}  # fmt: skip


PROMPTS = [p for p in token_lists([2, 5, 1], 7) for _ in range(GROUP)]
COMPLETIONS = [[*c[:-1], EOS] if len(c) % 2 else c for c in token_lists([4, 1, 2, 6, 3, 3], 7, seed=1)]
ADVANTAGES, REF_LOGPROBS, OLD_LOGPROBS = random(6, seed=2), random(6, 6, seed=3), random(6, 6, seed=4) - 2


def make_batch(chosen: Recipe, dtype: torch.dtype, order: list[int] = ORDER, **padding: int) -> Batch:
    """The rows in this order; padding: of `rollout_of`."""
    rollout = rollout_of([PROMPTS[i] for i in order], [COMPLETIONS[i] for i in order], **padding)
    counted = make_loss_mask(rollout, GROUP, chosen.padding)
    behind = (0, padding.get("longer", 0))
    ref, old = (F.pad(x[order], behind, value=9).to(dtype) for x in (REF_LOGPROBS, OLD_LOGPROBS))
    return Batch(rollout, ADVANTAGES[order], counted, ref, size_of(counted, LONGEST), chosen.kl_coef, old)


def some_flat(batch: Batch, *rows: int) -> Batch:
    """The batch with advantages of zero in these rows."""
    advantages = batch.advantages.index_fill(0, torch.tensor(rows, dtype=torch.long), 0.0)
    return dataclasses.replace(batch, advantages=advantages)


def loss_and_gradient(
    chosen: Recipe, order: list[int], micro_batch: int, dtype: torch.dtype = torch.float64, **padding: int
) -> tuple[float, Tensor]:
    model = tiny_neox(dtype=dtype)
    loss = backward(model, make_batch(chosen, dtype, order, **padding), chosen, micro_batch).loss
    return loss, gradient(model)


def ratio_times_score(scored: Tensor, old: Tensor, n: int, advantage: Tensor, chosen: Recipe) -> Tensor:
    """[end] each term as often as its ratio says, over the completion's own n tokens; 0 where PPO cuts it."""
    ratios = (scored[:n] - old[:n]).detach().exp()
    if chosen.importance == "sequence":
        return ratios.prod() * scored
    limit = chosen.clip_range_high if advantage > 0 and chosen.clip_range_high else chosen.clip_range
    beyond = (ratios - 1) * advantage.sign() > limit
    return torch.cat([torch.where(beyond, 0.0, ratios) * scored[:n], scored[n:]])


def sampler_logprobs(logits: Tensor, row: list[int], chosen: Recipe) -> Tensor:
    """[T] under top-k and top-p of transformers; a token that they leave out, which no sampler draws, stays in."""
    kept = TopPLogitsWarper(chosen.top_p)(None, TopKLogitsWarper(chosen.top_k)(None, logits))
    token = torch.tensor(row)[:, None]
    return kept.scatter(1, token, logits.gather(1, token)).log_softmax(-1).gather(1, token).squeeze(1)


@pytest.mark.parametrize("changes", RECIPES.values(), ids=RECIPES)
def test_the_gradient_of_a_batch_is_the_formula_s_on_compacted_sequences(changes: dict[str, object]) -> None:
    """Sequence by sequence, each alone and without padding, loss written out from its definition."""
    chosen, model = recipe("stable", **changes), tiny_neox()
    longest = [max(map(len, COMPLETIONS[i - i % GROUP : i - i % GROUP + GROUP])) for i in ORDER]
    ends = longest if chosen.padding == "counted" else list(map(len, COMPLETIONS))
    loss = torch.zeros((), dtype=torch.float64)
    for i, (end, advantage) in enumerate(zip(ends, ADVANTAGES, strict=True)):
        n = len(COMPLETIONS[i])
        row = COMPLETIONS[i] + [EOS] * (end - n)
        logits = plain_logits(model, PROMPTS[i], row) / chosen.temperature
        logprobs = logits.log_softmax(-1)
        correct, one_later = (torch.stack([logprobs[t + k, token] for t, token in enumerate(row)]) for k in (0, 1))
        scored = one_later if chosen.alignment == "shifted" else correct
        if chosen.loss_distribution == "sampler":
            correct = scored = sampler_logprobs(logits[:-1], row, chosen)
        normaliser = {
            "sequence_sum": 6, "sequence_mean": 6 * end, "token_mean": sum(ends), "constant_length": 6 * LONGEST,
        }[chosen.aggregation]  # fmt: skip
        if chosen.importance != "none":
            scored = ratio_times_score(scored, OLD_LOGPROBS[i], n, advantage, chosen)
        loss = loss - advantage * scored.sum() / normaliser
        d = correct[:n] - REF_LOGPROBS[i, :n]
        if chosen.kl == "loss_k2":
            loss = loss + chosen.kl_coef * d.sum() ** 2 / 2 / 6
        if chosen.kl == "loss_k3":
            loss = loss + chosen.kl_coef * ((-d).exp() - 1 + d).sum() / 6
        entropy = torch.distributions.Categorical(logits=logits[:n] * chosen.temperature).entropy()
        loss = loss - chosen.entropy_coef * entropy.sum() / normaliser
    loss.backward()
    measured_loss, measured = loss_and_gradient(chosen, ORDER, micro_batch=4)
    assert measured_loss == pytest.approx(loss.item(), rel=1e-12)
    assert difference(measured, gradient(model)) < 1e-12


TOLERANCES = [(torch.float64, 1e-10), (torch.float32, 1e-5)]


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("changes", RECIPES.values(), ids=RECIPES)
def test_the_gradient_does_not_move(changes: dict[str, object], dtype: torch.dtype, tolerance: float) -> None:
    """With the size of the micro-batches, the order of the prompts, the width of the padding or what stands in it."""
    chosen = recipe("stable", **changes)
    loss, truth = loss_and_gradient(chosen, ORDER, 6, dtype)
    others = {
        **{f"micro-batches of {n}": loss_and_gradient(chosen, ORDER, n, dtype) for n in (1, 4, 100)},
        "order of prompts": loss_and_gradient(chosen, [4, 5, 0, 1, 2, 3], 4, dtype),
        "columns behind": loss_and_gradient(chosen, ORDER, 6, dtype, longer=3),
        "columns before": loss_and_gradient(chosen, ORDER, 6, dtype, wider=2),
    }
    if chosen.padding == "masked":
        others["garbage"] = loss_and_gradient(chosen, ORDER, 6, dtype, wider=2, longer=1, filler=5)
    for what, (other_loss, measured) in others.items():
        assert difference(measured, truth) < tolerance, what
        assert other_loss == pytest.approx(loss, rel=tolerance, abs=tolerance), what


@pytest.mark.parametrize("changes", RECIPES.values(), ids=RECIPES)
def test_completions_without_advantage_add_what_other_terms_have(changes: dict[str, object]) -> None:
    """The gradient is linear in the advantages: what zeros leave out of it is the rows' own part."""
    chosen = recipe("stable", **changes)
    batch, truth = make_batch(chosen, torch.float64), loss_and_gradient(chosen, ORDER, 6)[1]
    for micro_batch in (2, 4):  # the first rows are one of their own, or stand beside others
        models = [tiny_neox() for _ in range(3)]
        batches = [some_flat(batch, 0, 1, 4), some_flat(batch, 2, 3, 5), some_flat(batch, *ORDER)]
        found = [backward(m, part, chosen, micro_batch, GROUP) for m, part in zip(models, batches, strict=True)]
        one, other, neither = map(gradient, models)
        assert difference(one + other, truth + neither) < 1e-12
        torch.testing.assert_close(found[0].logprobs, found[2].logprobs, rtol=0, atol=1e-12)
        torch.testing.assert_close(found[0].entropy, found[2].entropy, rtol=0, atol=1e-12)


def test_completions_without_advantage_have_no_backward_pass() -> None:
    """Unless no completion has any: then all weights get a gradient of zero, for Adam's momentum goes on."""
    chosen, rows = recipe("stable"), []
    batch = make_batch(chosen, torch.float64)
    for flat in ([], [0, 1, 4], ORDER):
        model = tiny_neox()
        head = model.get_output_embeddings()
        count = 0

        def note(_: object, __: object, outputs: tuple[Tensor, ...]) -> None:
            nonlocal count
            count += outputs[0].shape[-2]

        head.register_full_backward_hook(note)
        backward(model, some_flat(batch, *flat), chosen, 4, GROUP)
        rows.append(count)
        assert all(p.grad is not None for p in model.parameters())
    tokens = list(map(len, COMPLETIONS))  # each is predicted at a position, the first ones of a prompt at the same
    assert rows == [sum(tokens) - 3, sum(tokens[i] for i in (2, 3, 5)) - 1, sum(tokens) - 3]


def test_bfloat16_keeps_the_gradient_of_rows_behind_flat_ones() -> None:
    """Autocast keeps weights that it has rounded: those of the first, flat micro-batch must not be without a graph."""
    chosen = recipe("stable", precision="bfloat16")
    batch, gradients = some_flat(make_batch(chosen, torch.float32), 0, 1), []
    for micro_batch in (2, 6):
        model = tiny_neox(dtype=torch.float32)
        backward(model, batch, chosen, micro_batch, GROUP)
        gradients.append(gradient(model))
    assert difference(*gradients) < 0.02


def test_the_signal_to_noise_ratio_is_that_of_the_prompts_gradients() -> None:
    """With a prompt in each micro-batch: |mean|^2 without its bias over the variance of the mean."""
    chosen, prompts = recipe("stable"), 3
    model, rows = tiny_neox(), rollout_of(PROMPTS, COMPLETIONS)
    whole = Batch(rows, ADVANTAGES, rows.completion_mask, None, size_of(rows.completion_mask))
    measured = backward(model, whole, chosen, GROUP, GROUP).snr
    singles = []
    for b in range(prompts):
        own = torch.arange(b * GROUP, (b + 1) * GROUP)
        model.zero_grad()
        part = rows.take(own)
        one = Batch(part, ADVANTAGES[own], part.completion_mask, None, LossNormalizers(GROUP, 1, 1))
        backward(model, one, chosen, GROUP, GROUP)
        singles.append(gradient(model))
    of_mean = torch.stack(singles).var(0).sum() / prompts
    signal = torch.stack(singles).mean(0).square().sum() - of_mean
    assert measured == pytest.approx((signal / of_mean).item(), rel=1e-9)
    for micro_batch in (3, 6, 100):  # half a prompt, or all in one: nothing is independent
        assert math.isnan(backward(tiny_neox(), whole, chosen, micro_batch, GROUP).snr)


def test_signal_and_noise_of_unequal_parts() -> None:
    """Its two numbers are right on average: many draws of parts with known mean and variance."""
    sizes, dimensions, draws = [1, 2, 5], 40, 4000
    g = random(dimensions, seed=1)
    prompts = g + 2 * random(draws, sum(sizes), dimensions, seed=2)
    parts = torch.stack([part.sum(1) / sum(sizes) for part in prompts.split(sizes, dim=1)], 1)  # [draws, 3, dimensions]
    whole, squares = parts.sum(1).square().sum(1), parts.square().sum(2)
    snrs = [signal_to_noise(w, s, sizes) for w, s in zip(whole.tolist(), squares.tolist(), strict=True)]
    signals = torch.tensor([snr * w / (1 + snr) for snr, w in zip(snrs, whole.tolist(), strict=True)])
    assert signals.mean().item() == pytest.approx(g.square().sum().item(), rel=0.05)
    assert (whole - signals).mean().item() == pytest.approx(4 * dimensions / sum(sizes), rel=0.05)


def test_gradients_of_two_batches_add_up() -> None:
    """`backward` adds to what is there, and leaves its inputs alone."""
    model, chosen = tiny_neox(), recipe("stable")
    batch = make_batch(chosen, torch.float64)
    for _ in range(2):
        backward(model, batch, chosen, 4)
    assert difference(gradient(model), 2 * loss_and_gradient(chosen, ORDER, 4)[1]) < 1e-12
    assert torch.equal(batch.advantages, ADVANTAGES)


def one_process(rank: int, count: int, micro_batch: int, dtype: torch.dtype, port: int, results: str) -> None:
    """Save the gradient summed over the processes, and what each then knows of the batch: with a copy of the policy in
    each process, and with a sharded policy."""
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    torch.set_num_threads(1)
    found = {}
    for (name, changes), sharded in itertools.product(RECIPES.items(), (False, True)):
        chosen, model = recipe("stable", **changes), tiny_neox(dtype=dtype)
        if sharded:
            shard(model, torch.device("cpu"), count)
        processes = DistContext(rank, count, sharded)
        told = backward(model, make_batch(chosen, dtype), chosen, micro_batch, GROUP, processes, sharded)
        summed = gather_full({str(i): p.grad for i, p in enumerate(model.parameters())})
        numbers = torch.tensor([told.loss, told.snr, told.clip_share])
        found[name, sharded] = torch.cat([part.flatten() for part in summed.values()]), told.logprobs, numbers
    torch.save(found, f"{results}.{rank}")
    distributed.destroy_process_group()


@pytest.mark.slow
# 2 processes with 2 prompts and 1, so with more and fewer micro-batches; 3 with a prompt each
@pytest.mark.parametrize(
    ("count", "micro_batch", "precision"),
    [
        (2, GROUP, 0),
        *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in [(2, GROUP, 1), (3, 2 * GROUP, 0)]),
    ],
)
def test_the_gradient_does_not_move_with_the_number_of_processes(
    tmp_path: Path, count: int, micro_batch: int, precision: int
) -> None:
    """Nor do the numbers of the step's row, except for signal to noise where the micro-batches differ."""
    (dtype, tolerance), results = TOLERANCES[precision], str(tmp_path / "found")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(one_process, (count, micro_batch, dtype, port, results), nprocs=count)
    parts = [torch.load(f"{results}.{rank}") for rank in range(count)]
    for name, changes in RECIPES.items():
        chosen, model = recipe("stable", **changes), tiny_neox(dtype=dtype)
        alone = backward(model, make_batch(chosen, dtype), chosen, micro_batch, GROUP)
        truth = loss_and_gradient(chosen, ORDER, 6, dtype)[1]
        for part, sharded in itertools.product(parts, (False, True)):
            summed, logprobs, told = part[name, sharded]
            assert difference(summed, truth) < tolerance, name
            assert difference(logprobs, alone.logprobs) < tolerance, name
            snr = math.nan if sharded else alone.snr if micro_batch == GROUP else told[1]
            expected = torch.tensor([alone.loss, snr, alone.clip_share])
            torch.testing.assert_close(told, expected, rtol=1e-4, atol=1e-6, equal_nan=True, msg=name)


def test_what_is_not_finite_behind_the_end_does_not_reach_the_loss() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    logprobs = torch.tensor([[-1.0, torch.nan], [-2.0, -3.0]], requires_grad=True)
    ref = torch.tensor([[-1.5, torch.inf], [-2.0, -1.0]])
    loss = policy_loss(logprobs, torch.tensor([1.0, 2.0]), token_weights(mask, "sequence_sum", size_of(mask)))
    assert loss.item() == (1 + 2 * 5) / 2
    k2 = kl_loss_k2(logprobs, ref, mask, 2)
    assert k2.item() == (0.5**2 + 2**2) / 2 / 2
    (loss + k2).backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-0.5 + 0.25, 0], [-1.0 - 1, -1.0 - 1]]))
    penalised = with_kl_penalty(torch.tensor([[1.0, 1.0]]), logprobs, ref, mask, 0.5)
    assert penalised.tolist() == [[1 - 0.5 * 0.5, 1 + 0.5 * 2]]
    assert not penalised.requires_grad
