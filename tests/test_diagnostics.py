"""Metrics against pandas, numpy and torch.distributions; text statistics against examples done by hand."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.diagnosis.bootstrap import interval
from pipeline.diagnosis.text import distinct_ngrams, empty_share, repeated_ngrams, text_statistics, top_token_share
from pipeline.rl.advantages import BASELINES, advantages
from pipeline.rl.calibrate import shuffle_tokens
from pipeline.rl.metrics import (
    HISTORY_COLUMNS,
    largest_gap,
    longest_runs,
    nonfinite_share,
    policy_metrics,
    reference_metrics,
    reward_metrics,
    text_cost,
    token_mean_error,
    update_metrics,
    zero_spread,
)
from tests.enumeration import random
from tests.models import EOS, mask_of, rollout_of

pytestmark = pytest.mark.numeric

PROMPTS, GROUP = 5, 4


# --- rewards


def test_a_prompt_teaches_nothing_where_all_its_samples_score_alike() -> None:
    assert zero_spread(torch.tensor([[1.0, 1.0], [1.0, 1.1]])).tolist() == [True, False]


def test_reward_metrics_are_pandas_s() -> None:
    rewards = random(PROMPTS, GROUP, seed=0)
    rewards[2] = 1.5  # one prompt whose samples all earn the same
    baseline = BASELINES["rloo"](rewards)
    advantage = advantages(rewards, baseline, "none")
    measured = reward_metrics(rewards, baseline, advantage)
    table = pd.DataFrame(rewards.numpy().T)  # a column a prompt
    truth = {
        "reward_mean": table.stack().mean(),
        "reward_se": table.mean().sem(),
        "reward_std_within": math.sqrt(table.var().mean()),
        "reward_std_between": table.mean().std(),
        "baseline": baseline.numpy().mean(),
        "advantage_std": np.std(advantage.numpy()),
        "zero_spread_share": (table.nunique() == 1).mean(),
    }
    assert measured == pytest.approx(truth, rel=1e-12)
    assert truth["zero_spread_share"] == 1 / PROMPTS
    one = reward_metrics(rewards[:1], baseline[:1], advantage[:1])
    assert one["reward_std_within"] == pytest.approx(table[0].std(), rel=1e-12)
    assert math.isnan(one["reward_se"])  # the spread between prompts needs two
    assert math.isnan(one["reward_std_between"])


# --- policy


def test_policy_metrics_are_masked_means_of_the_formulas() -> None:
    lengths, columns = torch.tensor([3, 1, 4]), 4
    mask = mask_of(lengths, columns)
    logprobs, ref, entropy = (-random(3, columns, seed=seed).abs() for seed in (1, 2, 3))
    rows = [(i, t) for i, n in enumerate(lengths.tolist()) for t in range(n)]
    pi, q, h = (np.array([x[i, t].item() for i, t in rows]) for x in (logprobs, ref, entropy))
    per_completion = np.split(pi - q, np.cumsum(lengths.numpy())[:-1])
    truth = {
        "entropy": h.mean(),
        "ref_kl_k1": (pi - q).mean(),
        "ref_kl_k3": (np.exp(q) / np.exp(pi) - 1 - (q - pi)).mean(),
        "ref_kl_sequence": np.mean([d.sum() for d in per_completion]),
        "ref_logprob": q.mean(),
        "policy_logprob": pi.mean(),
    }
    for filler in (0.0, torch.nan, -torch.inf):  # what stands behind the ends does not matter
        one, two, three = (x.masked_fill(~mask, filler) for x in (logprobs, ref, entropy))
        measured = policy_metrics(one, three, mask) | reference_metrics(one, two, mask, 1)
        assert {name: measured[name] for name in truth} == pytest.approx(truth, rel=1e-12)
        update = update_metrics(one, two, mask, 1)["update_kl"]  # KL(pi || q) on samples of pi, by k3 as well
        assert update == pytest.approx((np.exp(q - pi) - 1 - (q - pi)).mean(), rel=1e-12)


def test_the_standard_error_is_that_of_prompts() -> None:
    """Completions of one length: that of the prompts' means. Of any length: the spread of the ratio over resamples."""
    values, full = random(PROMPTS * GROUP, 3, seed=4), torch.ones(PROMPTS * GROUP, 3, dtype=torch.bool)
    means = pd.Series(values.view(PROMPTS, -1).mean(1).numpy())
    assert token_mean_error(values, full, GROUP) == pytest.approx(means.sem(), rel=1e-12)

    prompts = 400
    lengths = torch.randint(1, 7, (prompts * 2,), generator=torch.Generator().manual_seed(0))
    mask = mask_of(lengths, 6)
    values = 1 + random(prompts * 2, 6, seed=5) + random(prompts, seed=6).repeat_interleave(2)[:, None]
    totals, tokens = ((x * mask).sum(1).view(prompts, 2).sum(1).numpy() for x in (values, torch.ones_like(values)))
    drawn = np.random.default_rng(0).integers(prompts, size=(4000, prompts))
    spread = (totals[drawn].sum(1) / tokens[drawn].sum(1)).std()
    assert token_mean_error(values, mask, 2) == pytest.approx(spread, rel=0.05)
    assert math.isnan(token_mean_error(values[:2], mask[:2], 2))


def test_runs_of_near_certain_tokens_by_hand() -> None:
    marked = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 1]]).bool()
    assert longest_runs(marked).tolist() == [2, 0, 4, 3]
    p = torch.tensor([[0.995, 0.999, 0.98, 1.0], [0.5, 0.999, 0.999, 0.999]])
    mask = mask_of(torch.tensor([4, 2]), 4)  # the second run goes on behind the end
    assert policy_metrics(p.log(), p, mask)["certain_run"] == (2 + 1) / 2


def test_faults_are_counted() -> None:
    before, after = torch.tensor([-1.0, torch.nan, -torch.inf, -2.0]), torch.tensor([torch.inf, -3.0])
    assert nonfinite_share(before, after) == 0.5
    assert nonfinite_share(before[:1], after[1:]) == 0.0


def test_logprob_gap_is_the_largest_difference_of_a_token_that_counts() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    sampled = torch.tensor([[-1.0, -2.0, -9.0], [-3.0, 0.0, torch.nan]])
    scored = torch.tensor([[-1.0, -2.5, 0.0], [-2.0, 7.0, 1.0]])
    assert largest_gap(sampled, scored, mask) == 1.0
    assert largest_gap(sampled, sampled, mask) == 0.0


# --- text


def test_the_cost_of_texts_by_hand() -> None:
    """log p of 1/2, 1/4 and 1/8 are 1, 2 and 3 bits; the third completion is empty, its end does not count."""
    p = torch.tensor([[0.5, 0.25, 0.1], [0.125, 0.1, 0.1], [0.9, 0.1, 0.1]]).double()
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    entropy = torch.tensor([[1.0, 2.0, 9.0], [0.5, 9.0, 9.0], [9.0, 9.0, 9.0]]).double()
    measured = text_cost(p.log()[mask], entropy[mask], ["a\u00e9", "b", ""])  # four bytes
    assert measured == pytest.approx({"ref_bits_per_byte": 6 / 4, "ref_typicality": (3.5 - 6 * math.log(2)) / 3})
    nothing = text_cost(torch.zeros(0), torch.zeros(0), ["", "", ""])
    assert all(math.isnan(value) for value in nothing.values())


def test_cutting_a_text_into_likelier_tokens_does_not_make_it_cheaper() -> None:
    """One token of probability 1/64, or three of 1/4 each: the same text."""
    whole = text_cost(torch.tensor([1 / 64]).log(), torch.zeros(1), ["abc"])
    parts = text_cost(torch.full((3,), 1 / 4).log(), torch.zeros(3), ["abc"])
    assert whole["ref_bits_per_byte"] == pytest.approx(parts["ref_bits_per_byte"])
    assert parts["ref_typicality"] > whole["ref_typicality"] + 2  # which the mean over tokens calls likelier


def test_shuffling_moves_the_tokens_of_a_text_and_nothing_else() -> None:
    rollout = rollout_of([[1], [1], [1]], [[5, 6, 7, 8, 9, EOS], [EOS], [3, 4, 3, 4, 5, 6]])
    shuffled = shuffle_tokens(rollout, (EOS,), torch.Generator().manual_seed(0))
    before, after = rollout.completions.tolist(), shuffled.completions.tolist()
    assert [row[:5] for row in after[:1]] != [row[:5] for row in before[:1]]
    assert [sorted(row) for row in after] == [sorted(row) for row in before]
    assert [row[n:] for row, n in zip(after, (5, 0, 6), strict=True)] == [
        row[n:] for row, n in zip(before, (5, 0, 6), strict=True)
    ]
    assert torch.equal(rollout.text_mask((EOS,)).sum(1), torch.tensor([5, 0, 6]))


def test_ngrams_by_hand() -> None:
    completions = [[1, 2, 1, 2], [3], []]
    assert distinct_ngrams(completions, 1) == 3 / 5
    assert distinct_ngrams(completions, 2) == 2 / 3  # 12 21 12
    assert distinct_ngrams(completions, 4) == 1
    assert math.isnan(distinct_ngrams(completions, 5))
    assert repeated_ngrams([[7] * 5, [1, 2, 3]], 3) == pytest.approx((2 / 3 + 0) / 2)  # 777 three times; 123 once
    assert math.isnan(repeated_ngrams([[1, 2], []], 3))
    assert top_token_share(completions) == 2 / 5
    assert math.isnan(top_token_share([[], []]))


def test_text_statistics_by_hand() -> None:
    texts, tokens = ["a", "a", "a", "b", " \n\t", "c"], [[1], [1], [1], [2], [], [3, 1]]
    truth = {
        "empty_share": 1 / 6, "distinct_completions": 4 / 6, "distinct_within": (1 / 2 + 1 + 1) / 3,
        "distinct_1": 3 / 6, "distinct_2": 1.0, "repeated_3grams": math.nan, "top_token_share": 4 / 6,
    }  # fmt: skip
    assert text_statistics(texts, tokens, group=2) == pytest.approx(truth, nan_ok=True)
    assert empty_share(["", " b "]) == 1 / 2


# --- history and intervals


def test_every_metric_of_a_step_has_a_column() -> None:
    rewards, mask = random(2, 2, seed=0), torch.ones(4, 2, dtype=torch.bool)
    measured = {
        **reward_metrics(rewards, rewards, rewards),
        **policy_metrics(rewards, rewards, mask[:2]),
        **reference_metrics(rewards, rewards, mask[:2], 1),
        **update_metrics(rewards, rewards, mask[:2], 1),
        **text_statistics(["a"] * 4, [[1]] * 4, 2),
        **text_cost(rewards[0], rewards[0], ["a"] * 2),
    }
    assert set(measured) <= set(HISTORY_COLUMNS)
    assert len(set(HISTORY_COLUMNS)) == len(HISTORY_COLUMNS)


def test_the_bootstrap_interval_of_a_mean() -> None:
    """About the normal one, 1.96 standard errors to each side, where there are many prompts."""
    values = random(400, seed=7)
    indices = torch.randint(400, (4000, 400), generator=torch.Generator().manual_seed(0))
    measured = interval(values, indices)
    error = (values.std() / 400**0.5).item()
    assert measured["mean"] == pytest.approx(values.mean().item(), rel=1e-12)
    assert measured["low"] == pytest.approx(measured["mean"] - 1.96 * error, abs=0.1 * error)
    assert measured["high"] == pytest.approx(measured["mean"] + 1.96 * error, abs=0.1 * error)
    means = values.numpy()[indices.numpy()].mean(1)
    assert [measured["low"], measured["high"]] == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist(), rel=1e-9)
    one = interval(torch.tensor([2.5]), torch.zeros(100, 1, dtype=torch.int64))
    assert one == {"mean": 2.5, "low": None, "high": None}  # a prompt alone has none
