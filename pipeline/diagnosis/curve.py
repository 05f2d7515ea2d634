"""The held-out curve of training: every reward and the reference's likelihood over the measured steps."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.config.schema import LIKELIHOOD
from pipeline.diagnosis.bootstrap import interval_of, mean
from pipeline.file_io import finite_or_none, total

Statistic = Callable[[Tensor], Tensor]  # places of prompts [R, n] -> the statistic of each row [R]


def curve_rows(
    heldout: Sequence[Mapping[str, Any]], scores: Mapping[str, Tensor], trained: str, draw: Callable[[int], Tensor]
) -> list[dict[str, Any]]:
    """Rows of curve.jsonl: of each measured step, each reward and LIKELIHOOD.

    heldout: rows of heldout.jsonl. scores: rewards [steps, prompts] by name. draw: prompts -> resamples of so many.
    gain is over step 0, on all prompts. A reward's best step is chosen on the prompts at even places, as `record_steps`
    chooses that of data/best, and since_best is measured on the others: the largest of several noisy means is too
    large. trained_since_best: of the trained reward, from the same step on.
    """
    steps = list(dict.fromkeys(row["step"] for row in heldout))
    if not steps:
        return []
    prompts = len(heldout) // len(steps)

    def column(name: str) -> Tensor:
        values = [math.nan if row[name] is None else row[name] for row in heldout]
        return torch.tensor(values, dtype=torch.float64).view(len(steps), prompts)

    kl, nats, tokens = column("kl"), column("ref_logprob"), column("tokens")
    costs = [text_costs([row for row in heldout if row["step"] == step]) for step in steps]
    statistics = {name: [mean_of(values) for values in table] for name, table in scores.items()}
    statistics[LIKELIHOOD] = [ratio_of(top, bottom) for top, bottom in zip(nats, tokens, strict=True)]
    spreads = {name: first_spread(table) for name, table in {**scores, LIKELIHOOD: nats / tokens}.items()}
    everywhere = torch.arange(prompts)
    even, odd = everywhere[::2], everywhere[1::2]
    all_draws, odd_draws = draw(prompts), odd[draw(len(odd))]
    halves = {name: [mean(values[::2].tolist()) for values in table] for name, table in scores.items()}
    halves[LIKELIHOOD] = [statistic(even[None]).item() for statistic in statistics[LIKELIHOOD]]
    sound = [at == 0 or bool(values.isfinite().all()) for at, values in enumerate(kl)]
    best_of = {
        name: first_maximum([value if fine else math.nan for value, fine in zip(values, sound, strict=True)])
        for name, values in halves.items()
    }

    def difference(name: str, at: int, start: int, places: Tensor, draws: Tensor) -> dict[str, float | None]:
        later, earlier = statistics[name][at], statistics[name][start]
        return interval_of(lambda chosen: later(chosen) - earlier(chosen), places, draws)

    rows = []
    for at, step in enumerate(steps):
        distance = kl[at].mean().item()
        for name, by_step in statistics.items():
            best = best_of[name]
            rows.append({
                "step": step, "reward": name, **interval_of(by_step[at], everywhere, all_draws),
                "gain": difference(name, at, 0, everywhere, all_draws), "spread": finite_or_none(spreads[name]),
                "sqrt_kl": math.sqrt(max(0.0, distance)) if math.isfinite(distance) else None,
                "best_step": steps[best], "since_best": difference(name, at, best, odd, odd_draws),
                "trained_since_best": difference(trained, at, best, odd, odd_draws),
                **({"text": costs[at]} if name == LIKELIHOOD else {}),
            })  # fmt: skip
    return rows


def first_spread(table: Tensor) -> float:
    """Standard deviation over completions at the first step that has one, [steps, prompts]: a sparse reward may have
    none before it is learned. Of equal values it is 0, and not what rounding leaves of it."""
    spreads = [values.std().item() if values.max() > values.min() else 0.0 for values in table]
    return next((spread for spread in spreads if spread > 0), 0.0)


def first_maximum(values: Sequence[float]) -> int:
    """Its place; NaN is none."""
    return max(range(len(values)), key=lambda at: (-math.inf if math.isnan(values[at]) else values[at], -at))


def mean_of(values: Tensor) -> Statistic:
    return lambda places: values[places].mean(1)


def ratio_of(tops: Tensor, bottoms: Tensor) -> Statistic:
    """Of totals: a mean over tokens, where values [P] are sums over the tokens of a completion."""
    return lambda places: tops[places].sum(1) / bottoms[places].sum(1)


def text_costs(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """What the completions of one step cost the reference: as in training, from the sums that each row has."""

    def all_of(name: str) -> float:
        return total(math.nan if row[name] is None else row[name] for row in rows)

    nats, entropy, size, count = map(all_of, ("text_ref_logprob", "text_ref_entropy", "text_bytes", "text_tokens"))
    return {
        "ref_logprob": finite_or_none(all_of("ref_logprob") / all_of("tokens")),
        "ref_bits_per_byte": finite_or_none(-nats / math.log(2) / size) if size else None,
        "ref_typicality": finite_or_none((nats + entropy) / count) if count else None,
    }
