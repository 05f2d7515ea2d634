"""Kinds of collapse of a run from held-out evaluations alone, by the rule of docs/DETECTOR.md."""

import math
import random
import statistics
from typing import Any

LASTING = 3  # evaluations in a row that must be bad


def labels(content: dict[str, Any]) -> dict[str, int]:
    """Kinds of collapse of a run with their onsets, by the rule of docs/DETECTOR.md; {} = healthy."""
    held_out, first = content["held_out"], content["held_out"][0]
    found = {}
    if content["alignment"] == "shifted":
        found["misaligned"] = 0
    if content["stopped"]:
        found["numeric"] = len(content["rows"]) - 1
    if all(len({reward for pair in evaluation["rewards"] for reward in pair}) == 1 for evaluation in held_out):
        found["starved"] = 0
    ways = [bad(evaluation, first) for evaluation in held_out]
    for kind in sorted(set().union(*ways)):
        for onset in range(len(ways)):
            if all(kind in way for way in ways[onset : onset + LASTING]):
                found[kind] = onset
                break
    return found


def bad(evaluation: dict[str, Any], first: dict[str, Any]) -> set[str]:
    """The ways in which one held-out evaluation is bad, compared with the reference's."""
    spread = math.sqrt(sum(statistics.variance(pair) for pair in first["rewards"]) / len(first["rewards"]))
    pairs = zip(evaluation["rewards"], first["rewards"], strict=True)
    differences = [statistics.fmean(after) - statistics.fmean(before) for after, before in pairs]
    change, (low, high) = statistics.fmean(differences), bootstrap_interval(differences)
    empty = evaluation["empty"] > 0.5
    found = {
        "empty": empty,
        "repetition": (evaluation["repeated"] or 0) > 0.5,
        "gibberish": evaluation["ref_logprob"] < first["ref_logprob"] - 2,
        "mode": not empty
        and (evaluation["distinct"] < 0.5 * first["distinct"] or evaluation["entropy"] < 0.2 * first["entropy"]),
        "step-size": high < 0 and change < -0.5 * spread,
    }
    broken = found["empty"] or found["repetition"] or found["gibberish"]
    found["hacking"] = broken and low > 0 and change > 0.5 * spread
    return {kind for kind, holds in found.items() if holds}


def bootstrap_interval(values: list[float], resamples: int = 500) -> tuple[float, float]:
    """The percentile 95% interval of the mean, always of the same resamples."""
    draw = random.Random(0)
    means = sorted(statistics.fmean(draw.choices(values, k=len(values))) for _ in range(resamples))
    return means[round(0.025 * resamples)], means[round(0.975 * resamples) - 1]
