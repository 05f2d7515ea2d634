"""The objective against the truth by enumeration: policies so small that every batch can be written down.

J = E[R(y)] and KL(pi || ref) are sums over all completions, their gradients autograd's. A loss is right if its gradient,
averaged over every batch that can be sampled, is that of -J or of the KL. All in float64.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.diagnostics.metrics import policy_metrics
from pipeline.policy.sampling import Rollout
from pipeline.reinforce.advantages import BASELINES, advantages, with_kl_penalty, zero_spread
from pipeline.reinforce.loss import kl_loss_k2, policy_loss, token_weights
from pipeline.reinforce.step import accumulate_gradient, loss_mask
from tests.models import (
    all_completions,
    difference,
    gradient,
    mask_of,
    plain_logits,
    plain_logprobs,
    recipe,
    rollout_of,
    tabular_logprobs,
    tiny_neox,
    token_lists,
)

VOCABULARY = 3
COEF = 0.3


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class World:
    """Tabular policies of B prompts, a reference, and the rewards of every completion. K completions of T tokens."""

    def __init__(self, limit: int, prompts: int = 1) -> None:
        self.ids, self.lengths = all_completions(VOCABULARY, limit)
        self.mask = mask_of(self.lengths, limit)
        self.table = random(prompts, limit, VOCABULARY ** (limit - 1), VOCABULARY, seed=0).requires_grad_()
        reference = random(prompts, limit, VOCABULARY ** (limit - 1), VOCABULARY, seed=1)
        self.rewards = 2 + random(prompts, len(self.ids), seed=2)  # not centred: a wrong baseline must show
        self.logprobs, self.ref_logprobs = (
            torch.stack([tabular_logprobs(one, self.ids) for one in tables]) for tables in (self.table, reference)
        )  # [B, K, T]
        self.log_p, self.log_q = ((x * self.mask).sum(2) for x in (self.logprobs, self.ref_logprobs))  # [B, K]
        self.p = self.log_p.exp()

    def grad(self, scalar: Tensor) -> Tensor:
        return torch.autograd.grad(scalar, self.table, retain_graph=True)[0].flatten()

    def policy_gradient(self) -> Tensor:
        """Of J = mean over prompts of sum_y pi(y | x) R(x, y)."""
        return self.grad((self.p * self.rewards).sum(1).mean())

    def kl_gradient(self) -> Tensor:
        """Of KL(pi || ref) = sum_y pi(y) log(pi(y) / ref(y)), mean over prompts."""
        return self.grad((self.p * (self.log_p - self.log_q)).sum(1).mean())

    def expected(self, loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], group: int) -> Tensor:
        """Mean gradient of loss(rewards [B, G], logprobs, ref_logprobs, mask [B * G, T]) over every batch there is."""
        prompts, total = len(self.p), torch.zeros((), dtype=torch.float64)
        for batch in itertools.product(range(len(self.ids)), repeat=prompts * group):
            rows = torch.tensor(batch).view(prompts, group)
            b = torch.arange(prompts)[:, None]
            chance = self.p.detach()[b, rows].prod()
            arguments = (self.logprobs[b, rows].flatten(0, 1), self.ref_logprobs[b, rows].flatten(0, 1))
            total = total + chance * loss(self.rewards[b, rows], *arguments, self.mask[rows].flatten(0, 1))
        return self.grad(total)


@functools.cache
def world(limit: int = 2, prompts: int = 1) -> World:
    return World(limit, prompts)


def reinforce(
    baseline: str, norm: str = "none", aggregation: str = "sequence_sum", coef: float = 0.0
) -> Callable[..., Tensor]:
    """The loss as `train_step` puts it together."""

    def loss(rewards: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
        if coef:
            rewards = with_kl_penalty(rewards, logprobs, ref_logprobs, mask, coef)
        advantage = advantages(rewards, BASELINES[baseline](rewards), norm)
        return policy_loss(logprobs, advantage.flatten(), token_weights(mask, aggregation))

    return loss


def test_the_enumeration_is_whole() -> None:
    for limit in (1, 2, 3):
        torch.testing.assert_close(world(limit).p.sum(), torch.ones((), dtype=torch.float64))


# --- baselines


@pytest.mark.parametrize(("limit", "group"), [(1, 3), (2, 2), (2, 3), (3, 2)])
@pytest.mark.parametrize("baseline", list(BASELINES))
def test_baselines_leave_the_policy_gradient_where_they_claim_to(baseline: str, limit: int, group: int) -> None:
    """One prompt: none and leave-one-out are unbiased, a mean over G with the sample itself shrinks by (G - 1) / G."""
    shrinks = {"none": 1.0, "rloo": 1.0, "group": (group - 1) / group, "batch": (group - 1) / group}
    measured = world(limit).expected(reinforce(baseline), group)
    assert difference(measured, -shrinks[baseline] * world(limit).policy_gradient()) < 1e-12


@pytest.mark.parametrize(("baseline", "shrinks"), [("none", 1), ("rloo", 1), ("group", 1 / 2), ("batch", 3 / 4)])
def test_baselines_of_two_prompts(baseline: str, shrinks: float) -> None:
    """B = G = 2: the batch mean holds BG samples, of which one is the sample's own."""
    measured = world(2, 2).expected(reinforce(baseline), group=2)
    assert difference(measured, -shrinks * world(2, 2).policy_gradient()) < 1e-12


def test_the_group_mean_is_leave_one_out_scaled() -> None:
    rewards = random(5, 4, seed=3)
    group, rloo = (advantages(rewards, BASELINES[name](rewards), "none") for name in ("group", "rloo"))
    torch.testing.assert_close(group, rloo * 3 / 4)


def test_baselines_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
    truth = {
        "none": [[0, 0, 0], [0, 0, 0]],
        "batch": [[2, 2, 2], [2, 2, 2]],
        "group": [[3, 3, 3], [1, 1, 1]],
        "rloo": [[4, 3.5, 1.5], [1.5, 1.5, 0]],
    }
    assert {name: function(rewards).tolist() for name, function in BASELINES.items()} == truth
    assert zero_spread(torch.tensor([[1.0, 1.0], [1.0, 1.1]])).tolist() == [True, False]


def test_normalised_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 3.0], [2.0, 10.0]], dtype=torch.float64)
    centred = torch.tensor([[-1.0, 1.0], [-4.0, 4.0]], dtype=torch.float64)
    baseline = BASELINES["group"](rewards)
    torch.testing.assert_close(advantages(rewards, baseline, "none"), centred)
    # variances with ddof 1: 2 and 32 in the groups; about the mean 4, (9 + 1 + 4 + 36) / 3 in the batch
    spread = torch.tensor([[2.0], [32.0]], dtype=torch.float64).sqrt()
    torch.testing.assert_close(advantages(rewards, baseline, "group", eps=0.5), centred / (spread + 0.5))
    torch.testing.assert_close(advantages(rewards, baseline, "batch", eps=0.5), centred / ((50 / 3) ** 0.5 + 0.5))
    same = torch.ones(2, 2, dtype=torch.float64)
    assert advantages(same, BASELINES["group"](same), "group").tolist() == [[0, 0], [0, 0]]


OTHER_WEIGHTS: list[dict[str, Any]] = [
    {"norm": "group"},
    {"aggregation": "sequence_mean"},
    {"aggregation": "token_mean"},
]


@pytest.mark.parametrize("weights", OTHER_WEIGHTS)
def test_other_weights_give_another_direction(weights: dict[str, Any]) -> None:
    """Spread, lengths of completions, lengths of the batch: none is the policy gradient, nor parallel to it."""
    measured, truth = world().expected(reinforce("rloo", **weights), group=2), -world().policy_gradient()
    assert torch.cosine_similarity(measured, truth, dim=0) < 0.999  # rounding would leave 1 - 1e-15


# --- KL


@pytest.mark.parametrize("baseline", ["none", "rloo"])
@pytest.mark.parametrize("limit", [2, 3])
def test_k1_in_the_reward_is_the_gradient_of_reward_minus_kl(baseline: str, limit: int) -> None:
    truth = -(world(limit).policy_gradient() - COEF * world(limit).kl_gradient())
    assert difference(world(limit).expected(reinforce(baseline, coef=COEF), group=2), truth) < 1e-12


@pytest.mark.parametrize(("limit", "group"), [(2, 1), (2, 2), (3, 1)])
def test_k2_of_the_summed_log_ratio_has_the_gradient_of_the_kl(limit: int, group: int) -> None:
    def k2(rewards: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
        return kl_loss_k2(logprobs, ref_logprobs, mask, batch=len(mask))

    assert difference(world(limit).expected(k2, group), world(limit).kl_gradient()) < 1e-12


def test_k2_token_by_token_and_k3_in_the_loss_have_not() -> None:
    """Two that other trainers offer, written out here."""

    def token_k2(rewards: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
        return (0.5 * (logprobs - ref_logprobs).square() * mask).sum()

    def k3(rewards: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
        d = logprobs - ref_logprobs
        return (((-d).exp() - 1 + d) * mask).sum()

    for wrong in (token_k2, k3):
        assert difference(world(3).expected(wrong, 1), world(3).kl_gradient()) > 0.1


def test_the_kl_that_is_reported_has_the_exact_kl_for_mean() -> None:
    """k1 of whole completions, and k3 of single tokens, which is unbiased for their KL. Only lengths of one, so that a
    mean over tokens is one over completions."""
    for limit, name in ((1, "ref_kl_k1"), (1, "ref_kl_k3"), (3, "ref_kl_sequence")):
        one = world(limit)
        p, log_p, log_q = one.p[0].detach(), one.log_p[0].detach(), one.log_q[0]
        seen = [
            policy_metrics(one.logprobs[0, [k]].detach(), one.ref_logprobs[0, [k]], one.logprobs[0, [k]], one.mask[[k]])
            for k in range(len(p))
        ]
        mean = sum(chance * row[name] for chance, row in zip(p.tolist(), seen, strict=True))
        assert mean == pytest.approx((p * (log_p - log_q)).sum().item(), rel=1e-12)


# --- the shifted objective


@pytest.mark.parametrize(("alignment", "temperature"), [("correct", 1.0), ("correct", 0.6), ("shifted", 1.0)])
def test_only_the_correct_alignment_is_the_policy_gradient(alignment: str, temperature: float) -> None:
    """A GPT-NeoX of four tokens: each completion counts as often as it is sampled, N p(y) times its reward."""
    model, prompt = tiny_neox(vocabulary=4), [2, 1]
    ids, lengths = all_completions(4, 2)
    reward = random(len(ids), seed=5)
    rows = [(row[:n].tolist(), r) for row, n, r in zip(ids, lengths.tolist(), reward, strict=True)]
    p = torch.stack([plain_logprobs(model, prompt, row, temperature).sum().exp() for row, _ in rows])
    (p * reward).sum().backward()
    truth = -gradient(model)

    chosen = recipe("stable", alignment=alignment, temperature=temperature, kl="none")
    for baseline in (0.0, (p * reward).sum().item()):  # a constant leaves a policy gradient unchanged
        model.zero_grad()
        advantage = len(p) * p.detach() * (reward - baseline)
        accumulate(model, rollout_of([prompt] * len(ids), ids, lengths), advantage, chosen, 4)
        if alignment == "correct":
            assert difference(gradient(model), truth) < 1e-10
        else:  # far off in length, and in direction
            assert difference(gradient(model), truth) > 0.5
            assert torch.cosine_similarity(gradient(model), truth, dim=0) < 0.9


# --- the gradient of a batch


def accumulate(
    model: torch.nn.Module, rollout: Rollout, advantage: Tensor, chosen: object, micro_batch: int, group: int = 1,
    ref_logprobs: Tensor | None = None,
) -> float:  # fmt: skip
    counted = loss_mask(rollout, group, chosen.padding)  # type: ignore[attr-defined]
    ref = torch.zeros(rollout.completions.shape, dtype=torch.float64) if ref_logprobs is None else ref_logprobs
    return accumulate_gradient(model, rollout, advantage, counted, ref, chosen, micro_batch).loss  # type: ignore[arg-type]


GROUP = 2
RECIPES = {
    "stable": {},
    "correct, padding counted": {"padding": "counted"},
    "shifted": {"alignment": "shifted"},
    "sequence_mean": {"aggregation": "sequence_mean"},
    "token_mean": {"aggregation": "token_mean", "temperature": 0.5},
    "loss_k2": {"kl": "loss_k2", "kl_coef": COEF},
    "shifted loss_k2": {"alignment": "shifted", "padding": "counted", "kl": "loss_k2", "kl_coef": COEF},
}


@functools.cache
def batch() -> tuple[list[list[int]], list[list[int]], Tensor, Tensor]:
    """Prompts [N], completions [N] (EOS included where they have one), advantages [N], ref_logprobs [N, T]."""
    prompts = [p for p in token_lists([2, 5, 1], 7) for _ in range(GROUP)]
    completions = token_lists([4, 1, 2, 6, 3, 3], 7, seed=1)
    return prompts, [[*c[:-1], 0] if len(c) % 2 else c for c in completions], random(6, seed=2), random(6, 6, seed=3)


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
    ref = torch.nn.functional.pad(batch()[3][order], (0, padding.get("longer", 0)), value=9).to(dtype)
    loss = accumulate(model, rollout_of_batch(order, **padding), batch()[2][order], chosen, micro_batch, GROUP, ref)
    return loss, gradient(model)


@pytest.mark.parametrize("changes", RECIPES.values(), ids=RECIPES)
def test_the_gradient_of_a_batch_is_the_formula_s_on_compacted_sequences(changes: dict[str, object]) -> None:
    """Sequence by sequence, each alone and without padding, loss written out from its definition."""
    chosen, model, (prompts, completions, advantage, ref) = recipe("stable", **changes), tiny_neox(), batch()
    longest = [max(map(len, completions[i - i % GROUP : i - i % GROUP + GROUP])) for i in range(6)]
    ends = longest if chosen.padding == "counted" else list(map(len, completions))
    loss = torch.zeros((), dtype=torch.float64)
    for i, end in enumerate(ends):
        row = completions[i] + [0] * (end - len(completions[i]))
        logprobs = (plain_logits(model, prompts[i], row) / chosen.temperature).log_softmax(-1)
        correct, one_later = (torch.stack([logprobs[t + k, token] for t, token in enumerate(row)]) for k in (0, 1))
        scored = one_later if chosen.alignment == "shifted" else correct
        normaliser = {"sequence_sum": 6, "sequence_mean": 6 * end, "token_mean": sum(ends)}[chosen.aggregation]
        loss = loss - advantage[i] * scored.sum() / normaliser
        if chosen.kl == "loss_k2":
            n = len(completions[i])
            loss = loss + chosen.kl_coef * (correct[:n] - ref[i, :n]).sum() ** 2 / 2 / 6
    loss.backward()
    measured_loss, measured = loss_and_gradient(chosen, list(range(6)), micro_batch=4)
    assert measured_loss == pytest.approx(loss.item(), rel=1e-12)
    assert difference(measured, gradient(model)) < 1e-12


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
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


def test_gradients_of_two_batches_add_up() -> None:
    """`accumulate_gradient` adds to what is there, and leaves its inputs alone."""
    model, chosen, order = tiny_neox(), recipe("stable"), list(range(6))
    rollout, advantage = rollout_of_batch(order), batch()[2].clone()
    for _ in range(2):
        accumulate(model, rollout, advantage, chosen, 4, GROUP)
    assert difference(gradient(model), 2 * loss_and_gradient(chosen, order, 4)[1]) < 1e-12
    assert torch.equal(advantage, batch()[2])


def test_what_is_not_finite_behind_the_end_does_not_reach_the_loss() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    logprobs = torch.tensor([[-1.0, torch.nan], [-2.0, -3.0]], requires_grad=True)
    ref = torch.tensor([[-1.5, torch.inf], [-2.0, -1.0]])
    loss = policy_loss(logprobs, torch.tensor([1.0, 2.0]), token_weights(mask, "sequence_sum"))
    assert loss.item() == (1 + 2 * 5) / 2
    k2 = kl_loss_k2(logprobs, ref, mask, batch=2)
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
    }
    assert {name: token_weights(mask, name).tolist() for name in truth} == truth


def test_masks_of_the_loss() -> None:
    """Counted padding reaches to the end of the prompt's own group, no further."""
    rollout = rollout_of_batch(list(range(6)))
    lengths = rollout.lengths.tolist()
    assert loss_mask(rollout, GROUP, "masked").sum(1).tolist() == lengths
    assert loss_mask(rollout, GROUP, "counted").sum(1).tolist() == [4, 4, 6, 6, 3, 3]
    assert (loss_mask(rollout, GROUP, "counted").int().diff(dim=1) <= 0).all()  # no holes
