"""The gradient of one batch: the formula's, whatever the micro-batches, the padding, the order and the processes."""

import functools
import itertools
import math
import socket
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, distributed, multiprocessing
from transformers import TopKLogitsWarper, TopPLogitsWarper

from pipeline.config.schema import Recipe
from pipeline.distributed.dist_context import DistContext
from pipeline.distributed.sharding import gather_full, shard
from pipeline.models.sampling import Rollout
from pipeline.rl.advantages import with_kl_penalty
from pipeline.rl.loss import LossNormalizers, kl_loss_k2, policy_loss, token_weights
from pipeline.rl.update import Batch, backward, make_loss_mask, signal_to_noise
from tests.enumeration import COEF, random, size_of
from tests.models import difference, gradient, plain_logits, plain_logprobs, recipe, rollout_of, tiny_neox, token_lists

pytestmark = pytest.mark.numeric


def accumulate(
    model: torch.nn.Module, rollout: Rollout, advantage: Tensor, chosen: object, micro_batch: int, group: int = 1,
    ref_logprobs: Tensor | None = None, old_logprobs: Tensor | None = None,
) -> float:  # fmt: skip
    counted = make_loss_mask(rollout, group, chosen.padding)  # type: ignore[attr-defined]
    ref = torch.zeros(rollout.completions.shape, dtype=torch.float64) if ref_logprobs is None else ref_logprobs
    batch = Batch(rollout, advantage, counted, ref, size_of(counted, LONGEST), chosen.kl_coef, old_logprobs)  # type: ignore[attr-defined]
    return backward(model, batch, chosen, micro_batch).loss  # type: ignore[arg-type]


GROUP = 2
LONGEST = 11  # train.max_tokens, longer than any completion here
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
    "sampler's distribution": {
        "loss_distribution": "sampler",
        "top_k": 3,
        "top_p": 0.9,
        "kl": "loss_k2",
        "kl_coef": COEF,
    },
    "sampler's distribution, k3": {"loss_distribution": "sampler", "top_k": 3, "kl": "loss_k3", "kl_coef": COEF},
    "importance": {"importance": "sequence"},
    "importance, padding counted": {"importance": "sequence", "padding": "counted"},
    "importance of tokens, clipped": {"importance": "token", "clip_range": 0.2},
    "shifted loss_k2": {"alignment": "shifted", "padding": "counted", "kl": "loss_k2", "kl_coef": COEF},
}


@functools.cache
def batch() -> tuple[list[list[int]], list[list[int]], Tensor, Tensor, Tensor]:
    """Prompts [N], completions [N] (EOS included where they have one), advantages [N], ref_logprobs and those of the
    policy that sampled [N, T]."""
    prompts = [p for p in token_lists([2, 5, 1], 7) for _ in range(GROUP)]
    completions = token_lists([4, 1, 2, 6, 3, 3], 7, seed=1)
    return (
        prompts,
        [[*c[:-1], 0] if len(c) % 2 else c for c in completions],
        random(6, seed=2),
        random(6, 6, seed=3),
        random(6, 6, seed=4) - 2,
    )


def rollout_of_batch(order: list[int], wider: int = 0, longer: int = 0, garbage: int = 0) -> Rollout:
    prompts, completions = batch()[:2]
    lengths = torch.tensor([len(completions[i]) for i in order])
    columns = 6 + longer
    ids = torch.tensor([completions[i] + [0] * (columns - len(completions[i])) for i in order])
    rollout = rollout_of([prompts[i] for i in order], ids, lengths)
    if wider:
        rollout = Rollout(
            torch.nn.functional.pad(torch.where(rollout.prompt_mask, rollout.prompt_ids, garbage), (wider, 0), value=garbage),
            torch.nn.functional.pad(rollout.prompt_mask, (wider, 0)),
            torch.where(rollout.completion_mask, ids, garbage), lengths, rollout.logprobs, rollout.logprobs,
        )  # fmt: skip
    return rollout


def loss_and_gradient(
    chosen: object, order: list[int], micro_batch: int, dtype: torch.dtype = torch.float64, **padding: int
) -> tuple[float, Tensor]:
    model = tiny_neox(dtype=dtype)
    longer = (0, padding.get("longer", 0))
    ref, old = (torch.nn.functional.pad(x[order], longer, value=9).to(dtype) for x in batch()[3:])
    rollout = rollout_of_batch(order, **padding)
    loss = accumulate(model, rollout, batch()[2][order], chosen, micro_batch, GROUP, ref, old)
    return loss, gradient(model)


def ratio_times_score(scored: Tensor, old: Tensor, n: int, advantage: Tensor, chosen: Recipe) -> Tensor:
    """[end] each term as often as its ratio says, over the completion's own n tokens; 0 where PPO cuts it."""
    ratios = (scored[:n] - old[:n]).detach().exp()
    if chosen.importance == "sequence":
        return ratios.prod() * scored
    beyond = (ratios - 1) * advantage.sign() > chosen.clip_range
    return torch.cat([torch.where(beyond, 0.0, ratios) * scored[:n], scored[n:]])


def sampler_logprobs(logits: Tensor, row: list[int], chosen: Recipe) -> Tensor:
    """[T] under top-k and top-p of transformers; a token that they leave out, which no sampler draws, stays in."""
    kept = TopPLogitsWarper(chosen.top_p)(None, TopKLogitsWarper(chosen.top_k)(None, logits))
    token = torch.tensor(row)[:, None]
    return kept.scatter(1, token, logits.gather(1, token)).log_softmax(-1).gather(1, token).squeeze(1)


@pytest.mark.parametrize("changes", RECIPES.values(), ids=RECIPES)
def test_the_gradient_of_a_batch_is_the_formula_s_on_compacted_sequences(changes: dict[str, object]) -> None:
    """Sequence by sequence, each alone and without padding, loss written out from its definition."""
    chosen, model, (prompts, completions, advantage, ref, old) = recipe("stable", **changes), tiny_neox(), batch()
    longest = [max(map(len, completions[i - i % GROUP : i - i % GROUP + GROUP])) for i in range(6)]
    ends = longest if chosen.padding == "counted" else list(map(len, completions))
    loss = torch.zeros((), dtype=torch.float64)
    for i, end in enumerate(ends):
        row = completions[i] + [0] * (end - len(completions[i]))
        logits = plain_logits(model, prompts[i], row) / chosen.temperature
        logprobs = logits.log_softmax(-1)
        correct, one_later = (torch.stack([logprobs[t + k, token] for t, token in enumerate(row)]) for k in (0, 1))
        scored = one_later if chosen.alignment == "shifted" else correct
        if chosen.loss_distribution == "sampler":
            correct = scored = sampler_logprobs(logits[:-1], row, chosen)
        normaliser = {
            "sequence_sum": 6, "sequence_mean": 6 * end, "token_mean": sum(ends), "constant_length": 6 * LONGEST,
        }[chosen.aggregation]  # fmt: skip
        n = len(completions[i])
        surrogate = scored
        if chosen.importance != "none":
            surrogate = ratio_times_score(scored, old[i], n, advantage[i], chosen)
        loss = loss - advantage[i] * surrogate.sum() / normaliser
        d = correct[:n] - ref[i, :n]
        if chosen.kl == "loss_k2":
            loss = loss + chosen.kl_coef * d.sum() ** 2 / 2 / 6
        if chosen.kl == "loss_k3":
            loss = loss + chosen.kl_coef * ((-d).exp() - 1 + d).sum() / 6
        entropy = torch.distributions.Categorical(logits=logits[:n] * chosen.temperature).entropy()
        loss = loss - chosen.entropy_coef * entropy.sum() / normaliser
    loss.backward()
    measured_loss, measured = loss_and_gradient(chosen, list(range(6)), micro_batch=4)
    assert measured_loss == pytest.approx(loss.item(), rel=1e-12)
    assert difference(measured, gradient(model)) < 1e-12


TOLERANCES = [(torch.float64, 1e-10), (torch.float32, 1e-5)]


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("changes", RECIPES.values(), ids=RECIPES)
def test_the_gradient_does_not_move(changes: dict[str, object], dtype: torch.dtype, tolerance: float) -> None:
    """With the size of the micro-batches, the order of the prompts, the width of the padding or what stands in it."""
    chosen, order = recipe("stable", **changes), list(range(6))
    loss, truth = loss_and_gradient(chosen, order, 6, dtype)
    others = {
        **{f"micro-batches of {n}": loss_and_gradient(chosen, order, n, dtype) for n in (1, 4, 100)},
        "order of prompts": loss_and_gradient(chosen, [4, 5, 0, 1, 2, 3], 4, dtype),
        "columns behind": loss_and_gradient(chosen, order, 6, dtype, longer=3),
        "columns before": loss_and_gradient(chosen, order, 6, dtype, wider=2),
    }
    if chosen.padding == "masked":
        others["garbage"] = loss_and_gradient(chosen, order, 6, dtype, wider=2, longer=1, garbage=5)
    for what, (other_loss, measured) in others.items():
        assert difference(measured, truth) < tolerance, what
        assert other_loss == pytest.approx(loss, rel=tolerance, abs=tolerance), what


def test_the_signal_to_noise_ratio_is_that_of_the_prompts_gradients() -> None:
    """A prompt a micro-batch: by the gradients of single prompts, |mean|^2 without its bias over the mean's variance."""
    chosen, order, prompts = recipe("stable"), list(range(6)), 3
    model, rows = tiny_neox(), rollout_of_batch(order)
    whole = Batch(rows, batch()[2], rows.completion_mask, None, size_of(rows.completion_mask))
    measured = backward(model, whole, chosen, GROUP, GROUP).snr
    singles = []
    for b in range(prompts):
        own = torch.arange(b * GROUP, (b + 1) * GROUP)
        model.zero_grad()
        part = rows.take(own)
        one = Batch(part, batch()[2][own], part.completion_mask, None, LossNormalizers(GROUP, 1, 1))
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
    model, chosen, order = tiny_neox(), recipe("stable"), list(range(6))
    rollout, advantage = rollout_of_batch(order), batch()[2].clone()
    for _ in range(2):
        accumulate(model, rollout, advantage, chosen, 4, GROUP)
    assert difference(gradient(model), 2 * loss_and_gradient(chosen, order, 4)[1]) < 1e-12
    assert torch.equal(advantage, batch()[2])


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.lists(st.integers(1, 6), min_size=2, max_size=2)), min_size=1, max_size=4),
    st.integers(1, 9),
)
def test_batches_of_any_shape(shapes: list[tuple[int, list[int]]], micro_batch: int) -> None:
    """Prompts and completions of any lengths: the loss is - mean of A sum log pi, one sequence at a time."""
    prompts = [p for p in token_lists([n for n, _ in shapes], 7) for _ in range(2)]
    completions = token_lists([n for _, pair in shapes for n in pair], 7, seed=1)
    model, advantage = tiny_neox(), random(len(prompts), seed=8)
    triples = zip(prompts, completions, advantage, strict=True)
    truth = -torch.stack([a * plain_logprobs(model, p, c).sum() for p, c, a in triples]).mean()
    truth.backward()
    expected = gradient(model)
    model.zero_grad()
    columns = max(map(len, completions))
    ids = torch.tensor([c + [0] * (columns - len(c)) for c in completions])
    rollout = rollout_of(prompts, ids, torch.tensor(list(map(len, completions))))
    assert accumulate(model, rollout, advantage, recipe("stable"), micro_batch) == pytest.approx(
        truth.item(), rel=1e-10, abs=1e-12
    )
    assert difference(gradient(model), expected) < 1e-10


ORDER = list(range(6))


def one_process(rank: int, count: int, micro_batch: int, port: int, results: str) -> None:
    """The gradient of its share, summed over the processes; and what all of them then know of the batch. Of a policy that
    each process holds, and of one that is spread over them."""
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    torch.set_num_threads(1)
    found = {}
    for (name, changes), dtype, sharded in itertools.product(
        RECIPES.items(), (torch.float64, torch.float32), (False, True)
    ):
        chosen, model = recipe("stable", **changes), tiny_neox(dtype=dtype)
        if sharded:
            shard(model, torch.device("cpu"), count)
        processes = DistContext(rank, count, sharded)
        told = backward(model, batch_of(chosen, dtype), chosen, micro_batch, GROUP, processes, sharded)
        summed = gather_full({str(i): p.grad for i, p in enumerate(model.parameters())})
        found[f"{name} {dtype} {sharded}"] = (
            torch.cat([part.flatten() for part in summed.values()]),
            told.logprobs,
            torch.tensor([told.loss, told.snr, told.clip_share]),
        )
    torch.save(found, f"{results}.{rank}")
    distributed.destroy_process_group()


def batch_of(chosen: Recipe, dtype: torch.dtype) -> Batch:
    rollout = rollout_of_batch(ORDER)
    counted = make_loss_mask(rollout, GROUP, chosen.padding)
    size = LossNormalizers(len(ORDER), int(counted.sum()), LONGEST)
    ref, old = (x[ORDER].to(dtype) for x in batch()[3:])
    return Batch(rollout, batch()[2][ORDER], counted, ref, size, chosen.kl_coef, old)


@pytest.mark.slow
# shares of 2 and 1 prompts, so of more and fewer micro-batches; of 1 each
@pytest.mark.parametrize(
    ("count", "micro_batch"), [(2, GROUP), pytest.param(3, 2 * GROUP, marks=pytest.mark.exhaustive)]
)
def test_the_gradient_does_not_move_with_the_number_of_processes(tmp_path: Path, count: int, micro_batch: int) -> None:
    """Nor what the row of the step says of it; but for the ratio of signal to noise where the micro-batches differ."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = str(tmp_path / "found")
    multiprocessing.spawn(one_process, (count, micro_batch, port, results), nprocs=count)
    parts = [torch.load(f"{results}.{rank}") for rank in range(count)]
    for (name, changes), (dtype, tolerance) in itertools.product(RECIPES.items(), TOLERANCES):
        chosen, model = recipe("stable", **changes), tiny_neox(dtype=dtype)
        alone = backward(model, batch_of(chosen, dtype), chosen, micro_batch, GROUP)
        truth = loss_and_gradient(chosen, ORDER, 6, dtype)[1]
        for part, sharded in itertools.product(parts, (False, True)):
            summed, logprobs, told = part[f"{name} {dtype} {sharded}"]
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


def test_token_weights_by_hand() -> None:
    mask = torch.tensor([[True, False, False], [True, True, True]])
    truth = {
        "sequence_sum": [[1 / 2, 0, 0], [1 / 2] * 3],
        "sequence_mean": [[1 / 2, 0, 0], [1 / 6] * 3],
        "token_mean": [[1 / 4, 0, 0], [1 / 4] * 3],
        "constant_length": [[1 / 20, 0, 0], [1 / 20] * 3],
    }
    assert {name: token_weights(mask, name, size_of(mask, 10)).tolist() for name in truth} == truth


def test_masks_of_the_loss() -> None:
    """Counted padding reaches to the end of the prompt's own group, no further."""
    rollout = rollout_of_batch(list(range(6)))
    lengths = rollout.lengths.tolist()
    assert make_loss_mask(rollout, GROUP, "masked").sum(1).tolist() == lengths
    assert make_loss_mask(rollout, GROUP, "counted").sum(1).tolist() == [4, 4, 6, 6, 3, 3]
    assert (make_loss_mask(rollout, GROUP, "counted").int().diff(dim=1) <= 0).all()  # no holes
