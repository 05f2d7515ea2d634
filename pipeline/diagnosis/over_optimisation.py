"""Over-optimisation: the trained reward rises while an independent measure falls (Gao et al. 2022, arXiv 2210.10760).

The trained reward is a stand-in for what is wanted. Nothing about it alone tells when it has stopped to be a good one.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.config.schema import LIKELIHOOD
from pipeline.diagnosis.calibration import Spread
from pipeline.diagnosis.explanations import cost_texts
from pipeline.diagnosis.thresholds import THRESHOLDS
from pipeline.diagnosis.verdict import Finding, likelihood_signs, passed_limits

OF_LIKELIHOOD = ("ref_logprob", "ref_bits_per_byte", "ref_typicality")


class Heldout(NamedTuple):
    """What was measured on held-out prompts, and what `evaluate.independent` names."""

    trained: str  # reward
    independent: str
    evaluation: Mapping[str, Any]  # metrics.json
    curve: Sequence[Mapping[str, Any]]  # rows of curve.jsonl; empty: nothing was measured during training
    best_step: int | None  # of data/best


def over_optimised(
    heldout: Heldout, broken: Finding | None, spreads: dict[str, Spread], steps: int, in_training: bool = False
) -> tuple[Finding | None, str]:
    """The finding, or None, and one line on what can be told.

    broken: what `heldout_finding` says of the final completions. steps: of the run. in_training: whether training shows
    a collapse already.
    """
    if heldout.independent == "none":
        return None, "Over-optimisation cannot be told without an independent reward: evaluate.independent is none."
    if not steps:
        return None, "No step was trained: nothing is over-optimised."
    if heldout.independent == "reference" and in_training:
        return None, "What the reference's likelihood tells is in the findings; another reward tells over-optimisation."
    if heldout.independent == "reference":
        return by_likelihood(heldout, broken, spreads, steps)
    return by_reward(heldout, steps)


def by_reward(heldout: Heldout, steps: int) -> tuple[Finding | None, str]:
    """By another reward: from its best measured step on it falls while the trained one rises; or, of the trained policy
    and the reference, it is below and the trained one above. By 95% intervals all of them."""
    trained, name = heldout.trained, heldout.independent
    before, after = (heldout.evaluation.get(reward, {}).get("difference", {}) for reward in (name, trained))
    last = next((row for row in reversed(heldout.curve) if row["reward"] == name), None)
    if last and below_zero(last["since_best"]) and above_zero(last["trained_since_best"]):
        onset, since = last["best_step"], f"from step {last['best_step']} on, where the latter was best"
        fall, rise = last["since_best"], last["trained_since_best"]
    elif below_zero(before) and above_zero(after):
        onset, since = (last["best_step"] if last else steps - 1), "compared with the reference model"
        since += f"; of the measured steps the latter was best at step {onset}" if last else ""
        fall, rise = before, after
    else:
        told = f"{interval_text(before)} over the reference model" if before else "not measured"
        return None, f"Not over-optimised by the independent reward {name}: {told}."
    words = f"Held-out, the trained reward {trained} has risen ({interval_text(rise)}) and {name}, which is "
    words += f"independent of it, has fallen ({interval_text(fall)}) {since}.{of_best(heldout, onset)}"
    return Finding("over-optimised", min(onset, steps - 1), steps - 1, (), words), words


def by_likelihood(
    heldout: Heldout, broken: Finding | None, spreads: dict[str, Spread], steps: int
) -> tuple[Finding | None, str]:
    """By the reference's likelihood, which falls a little in every training: only by the limits at which text counts as
    broken, between the reference's own texts and the same with their tokens shuffled."""
    shown = tuple(found for found in broken.evidence if found.limit.metric in OF_LIKELIHOOD) if broken else ()
    gain = heldout.evaluation.get(heldout.trained, {}).get("difference", {})
    if not shown or not above_zero(gain):
        return None, (
            "Not over-optimised by the reference's likelihood, which tells broken text alone: another reward as "
            "evaluate.independent tells more."
        )
    first = first_broken(heldout.curve, spreads)
    words = f"Held-out, the trained reward {heldout.trained} has risen ({interval_text(gain)}) and the reference "
    words += f"model no longer finds the completions likely: {' and '.join(cost_texts(shown))}."
    if first is not None:
        words += f" Of the measured steps all show it from step {first} on.{of_best(heldout, first - 1)}"
    elif heldout.curve:
        words += f" None of the measured steps shows it yet.{of_best(heldout, steps - 1, 'the one that shows it')}"
    onset = steps - 1 if first is None else min(first, steps - 1)
    return Finding("over-optimised", onset, steps - 1, shown, words), words


def first_broken(curve: Sequence[Mapping[str, Any]], spreads: dict[str, Spread]) -> int | None:
    """The first of the measured steps from which on all show broken text by the reference's likelihood; None where
    the last one does not."""
    measured = [row for row in curve if row["reward"] == LIKELIHOOD]
    signs = likelihood_signs(measured[0]["text"], spreads, THRESHOLDS) if measured else []
    first = None
    for row in reversed(measured):
        if not passed_limits(signs, row["text"]):
            break
        first = row["step"]
    return first


def of_best(heldout: Heldout, onset: int, otherwise: str = "later than that") -> str:
    step = heldout.best_step
    if step is None:
        return ""
    where = "no later than that" if step <= onset else f"{otherwise}: the trained reward chose it"
    return f" data/best is the policy after {step} update{'s' * (step != 1)}, {where}."


def above_zero(interval: Mapping[str, Any]) -> bool:
    return interval.get("low") is not None and interval["low"] > 0


def below_zero(interval: Mapping[str, Any]) -> bool:
    return interval.get("high") is not None and interval["high"] < 0


def interval_text(interval: Mapping[str, Any]) -> str:
    """+0.48, 95% interval +0.20 to +0.80"""
    mean, low, high = (interval[name] for name in ("mean", "low", "high"))
    if mean is None:
        return "undefined"
    return f"{mean:+.3g}, {'no interval' if low is None else f'95% interval {low:+.3g} to {high:+.3g}'}"
