"""Whether, how and from when on a run has collapsed: pure functions of its history and of batches of the reference.

docs/DETECTOR.md measures them and says how the thresholds were chosen.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pipeline.diagnosis.calibration import FALSE_ALARMS, Limit, Row, Spread
from pipeline.diagnosis.thresholds import LARGE_UPDATE, THRESHOLDS, Thresholds
from pipeline.file_io import total

Kind = Literal[
    "numeric", "misaligned", "starved", "hacking", "empty", "repetition", "gibberish", "mode", "step-size",
    "over-optimised", "heldout",
]  # fmt: skip
# where several begin together, the first of these names the verdict: the cause before what follows from it
ORDER: tuple[Kind, ...] = (
    "numeric", "misaligned", "starved", "hacking", "empty", "repetition", "gibberish", "mode", "step-size",
    "over-optimised", "heldout",
)  # fmt: skip
IN_TRAINING = ORDER[:-2]  # what a history shows
TITLES: dict[Kind, str] = {
    "numeric": "Numeric failure", "misaligned": "Misaligned objective", "starved": "Starved of signal",
    "hacking": "Reward hacking", "empty": "Empty completions", "repetition": "Repetition", "gibberish": "Gibberish",
    "mode": "Mode collapse", "step-size": "Step-size failure", "over-optimised": "Over-optimised",
    "heldout": "Held-out text fallen apart",
}  # fmt: skip
CAUSES = ("numeric", "misaligned", "starved")  # lead to the others; all others are what became of the texts or rewards
# limits that chance could pass, a step: a rise of the reward alarms only beside another, and where either sign by the
# byte is passed, the lower limit of the two is
COMPARISONS = 7


class Evidence(NamedTuple):
    """A limit that is passed, the step and the value that pass it."""

    limit: Limit
    step: int
    value: float


@dataclass(frozen=True)
class Finding:
    """One kind of collapse, confirmed."""

    kind: Kind
    onset: int  # first step
    shown_at: int  # the step of the evidence: the last one that shows it
    evidence: tuple[
        Evidence, ...
    ]  # the limits that are passed there, and an update before the onset that was too large
    words: str = ""  # what it says, where the numbers are none of a step of training

    def passes(self, metric: str) -> bool:
        return any(shown.limit.metric == metric for shown in self.evidence)


def findings(
    rows: Sequence[Row], spreads: dict[str, Spread], steps: int, thresholds: Thresholds = THRESHOLDS
) -> list[Finding]:
    """Every kind of collapse in the history so far, by onset; [] = healthy.

    rows: of history.csv, from step 0; spreads: see `null_statistics`; steps: the planned length of the run. A kind
    counts once its signs have held for `patience` steps in a row. Where metrics are normal over batches, a run that
    does not learn passes any limit at any step with a chance below FALSE_ALARMS (Bonferroni over steps and metrics).
    Shares beyond `certain` always count.
    """
    found = [detect_nonfinite(rows), misaligned(rows, thresholds), zero_reward_variance(rows, spreads, thresholds)]
    limits = limits_of_run(spreads, steps, thresholds)
    found += [
        detect_sustained(kind, rows, alternatives, thresholds.patience)
        for kind, alternatives in detection_rules(limits).items()
    ]
    return sorted(filter(None, found), key=lambda finding: (finding.onset, ORDER.index(finding.kind)))


def confirmed_healthy_steps(found: Sequence[Finding], done: int, thresholds: Thresholds = THRESHOLDS) -> int:
    """Return how many of the first `done` steps lie before any collapse, whatever later steps show.

    The finding "starved" does not count: rewards may still begin to differ.
    """
    onsets = [finding.onset for finding in found if finding.kind != "starved"]
    return min([*onsets, done - thresholds.patience + 1])


def limits_of_run(spreads: dict[str, Spread], steps: int, thresholds: Thresholds) -> dict[str, Limit]:
    """The limits that both chance and the effect sizes set, by name."""
    tail = FALSE_ALARMS / (steps * COMPARISONS)

    def limit(metric: str, side: Literal["above", "below"], effect: float) -> Limit:
        """`effect` away from the reference's mean, or farther where chance goes farther."""
        spread = spreads.get(metric)
        if spread is None:
            return Limit(metric, side, math.nan)
        distance = max(effect, spread.margin(tail))
        return Limit(metric, side, spread.mean + (distance if side == "above" else -distance), spread)

    def share(metric: str, least: float) -> Limit:
        """At least `least`, whatever the reference does, and beyond chance as far as a share can be."""
        spread = spreads.get(metric)
        chance = 0.0 if spread is None else spread.mean + spread.margin(tail)
        return Limit(metric, "above", max(least, min(thresholds.certain, chance)), spread)

    def ratio(metric: str, least: float) -> Limit:
        """At most `least` of the reference's mean."""
        spread = spreads.get(metric)
        return limit(metric, "below", (1 - least) * spread.mean if spread else math.nan)

    to_shuffled = distances_to_shuffled(spreads)
    # without any spread among the rewards there is no scale to call a change large on
    within = spreads["reward_std_within"].mean if "reward_std_within" in spreads else 0.0
    change = thresholds.reward * within or math.nan
    return {
        "empty": share("empty_share", thresholds.empty),
        "repetition": share("repeated_3grams", thresholds.repeated),
        "alike": ratio("distinct_completions", thresholds.distinct),
        "certain": ratio("entropy", thresholds.entropy),
        "unlikely": limit("ref_logprob", "below", thresholds.unlikely),
        "broken": limit("ref_bits_per_byte", "above", thresholds.broken * to_shuffled["ref_bits_per_byte"]),
        "costly": limit("ref_bits_per_byte", "above", thresholds.costly * to_shuffled["ref_bits_per_byte"]),
        "atypical": limit("ref_typicality", "below", thresholds.atypical * to_shuffled["ref_typicality"]),
        "fallen": limit("reward_mean", "below", change),
        "risen": limit("reward_mean", "above", change),
    }


def distances_to_shuffled(spreads: dict[str, Spread]) -> dict[str, float]:
    """How far the reference's own texts are from the same with their tokens shuffled, >= 0; NaN where not measured."""
    shuffled = {"ref_bits_per_byte": "shuffled_bits_per_byte", "ref_typicality": "shuffled_typicality"}
    return {
        own: abs(spreads[other].mean - spreads[own].mean) if own in spreads and other in spreads else math.nan
        for own, other in shuffled.items()
    }


def detection_rules(limits: dict[str, Limit]) -> dict[Kind, list[tuple[Limit, ...]]]:
    """By kind, the sets of limits each of which shows it when all of the set are passed at once."""
    empty, full = limits["empty"], not_passed(limits["empty"])
    # a text of short tokens is likely token by token; a list of names is costly, but no more surprising than expected
    gibberish = [(limits["unlikely"],), (limits["broken"],), (limits["costly"], limits["atypical"])]
    broken = [(empty,), (limits["repetition"],), *gibberish]
    return {
        "hacking": [(limits["risen"], *signs) for signs in broken],  # the reward pays for text that has fallen apart
        "empty": [(empty,)],
        "repetition": [(limits["repetition"],)],
        "gibberish": gibberish,
        # nothing said is the same text again, and certain: that is `empty`, not this
        "mode": [(limits["alike"], full), (limits["certain"], full)],
        "step-size": [(limits["fallen"],)],
    }


def heldout_finding(
    text: Mapping[str, Mapping[str, Any]],
    ref_logprob: Mapping[str, float | None],
    spreads: dict[str, Spread],
    steps: int,
    thresholds: Thresholds = THRESHOLDS,
) -> Finding | None:
    """What the held-out completions of the trained policy have lost beside the reference's on the same prompts, by the
    effect sizes of training; None = nothing.

    text, ref_logprob: of metrics.json, by `checkpoint` (the reference) and `policy`. steps: of the run.
    """
    before, after = ({**text[side], "ref_logprob": ref_logprob[side]} for side in ("checkpoint", "policy"))

    def fewer(metric: str, least: float) -> Limit:
        return worse_limit(before, metric, "below", least * or_nan(before, metric))

    signs = [
        (worse_limit(before, "empty_share", "above", thresholds.empty),),
        (worse_limit(before, "repeated_3grams", "above", thresholds.repeated),),
        (fewer("distinct_completions", thresholds.distinct),),
        (fewer("distinct_2", thresholds.distinct_pairs),),  # one phrase in versions that differ by a word
        *likelihood_signs(before, spreads, thresholds),
    ]
    last = steps - 1
    found = tuple(Evidence(limit, last, or_nan(after, limit.metric)) for limit in passed_limits(signs, after))
    return Finding("heldout", last, last, found) if found and steps else None


def likelihood_signs(
    before: Mapping[str, float | None], spreads: dict[str, Spread], thresholds: Thresholds
) -> list[tuple[Limit, ...]]:
    """By what the reference finds text broken, beside its own text, `before`."""
    logprob, bits, typicality = (
        or_nan(before, name) for name in ("ref_logprob", "ref_bits_per_byte", "ref_typicality")
    )
    to_shuffled = distances_to_shuffled(spreads)
    byte, typical = to_shuffled["ref_bits_per_byte"], to_shuffled["ref_typicality"]
    return [
        (worse_limit(before, "ref_logprob", "below", logprob - thresholds.unlikely),),
        (worse_limit(before, "ref_bits_per_byte", "above", bits + thresholds.broken * byte),),
        (
            worse_limit(before, "ref_bits_per_byte", "above", bits + thresholds.costly * byte),
            worse_limit(before, "ref_typicality", "below", typicality - thresholds.atypical * typical),
        ),
    ]


def worse_limit(
    before: Mapping[str, float | None], metric: str, side: Literal["above", "below"], threshold: float
) -> Limit:
    """A limit that nothing passes where the reference's own text does."""
    untouched = Spread(or_nan(before, metric), math.nan, 1, 1)
    worse = threshold > untouched.mean if side == "above" else threshold < untouched.mean
    return Limit(metric, side, threshold if worse else math.nan, untouched)


def passed_limits(signs: Sequence[tuple[Limit, ...]], after: Mapping[str, float | None]) -> list[Limit]:
    """The limits of the signs all of whose limits are passed."""
    row = {limit.metric: or_nan(after, limit.metric) for limits in signs for limit in limits}
    shown = [limits for limits in signs if all(limit.passed(row) for limit in limits)]
    return list(dict.fromkeys(limit for limits in shown for limit in limits))


def or_nan(row: Mapping[str, float | None], name: str) -> float:
    value = row.get(name)
    return math.nan if value is None else value


def not_passed(limit: Limit) -> Limit:
    return Limit(limit.metric, "below" if limit.side == "above" else "above", limit.threshold, limit.reference)


def detect_sustained(
    kind: Kind, rows: Sequence[Row], alternatives: list[tuple[Limit, ...]], patience: int
) -> Finding | None:
    """From the first to the last stretch of at least `patience` steps in which every step shows an alternative."""
    shown = [[limits for limits in alternatives if all(limit.passed(row) for limit in limits)] for row in rows]
    starts = [t for t in range(len(rows) - patience + 1) if all(shown[t : t + patience])]
    if not starts:
        return None
    onset, end = starts[0], starts[-1] + patience - 1
    passed = [limit for limits in shown[end] for limit in limits]
    return Finding(kind, onset, end, evidence(rows, end, passed) + large_update(rows[:onset]))


def evidence(rows: Sequence[Row], step: int, limits: Iterable[Limit]) -> tuple[Evidence, ...]:
    return tuple(Evidence(limit, step, rows[step][limit.metric]) for limit in dict.fromkeys(limits))


def large_update(rows: Sequence[Row]) -> tuple[Evidence, ...]:
    """The largest of these steps' updates, where it is larger than LARGE_UPDATE. No sign of collapse by itself."""
    sizes = [(row["update_kl"], step) for step, row in enumerate(rows) if math.isfinite(row["update_kl"])]
    if not sizes or max(sizes)[0] < LARGE_UPDATE:
        return ()
    return (Evidence(Limit("update_kl", "above", LARGE_UPDATE), max(sizes)[1], max(sizes)[0]),)


def detect_nonfinite(rows: Sequence[Row]) -> Finding | None:
    """Numbers that are not finite: one is enough."""
    limits = (Limit("nonfinite", "above", 1.0), Limit("nonfinite_logprobs", "above", 1e-9))
    for t, row in enumerate(rows):
        if passed := [limit for limit in limits if limit.passed(row)]:
            return Finding("numeric", t, t, evidence(rows, t, passed))
    return None


def misaligned(rows: Sequence[Row], thresholds: Thresholds) -> Finding | None:
    """Before the first update the loss scores other tokens than were sampled, beyond what the truncated sampler
    explains: |sampled - scored| <= |sampled - full softmax| + |full softmax - scored|, and the last is 0 if aligned."""
    if not rows:
        return None
    limit = Limit("logprob_gap", "above", thresholds.misaligned + rows[0]["truncation_gap"])
    return Finding("misaligned", 0, 0, evidence(rows, 0, [limit])) if limit.passed(rows[0]) else None


def zero_reward_variance(rows: Sequence[Row], spreads: dict[str, Spread], thresholds: Thresholds) -> Finding | None:
    """Before training and over all steps so far, all but a few prompts give each of their samples the same reward."""
    before = spreads.get("zero_spread_share")
    if len(rows) < thresholds.no_signal_steps or before is None:
        return None
    limit = Limit("zero_spread_share", "above", thresholds.no_signal, before)
    mean = total(row["zero_spread_share"] for row in rows) / len(rows)
    # a policy that collapses at once has no signal either, but that is not how it began
    without = min(mean, before.mean) >= thresholds.no_signal
    return Finding("starved", 0, len(rows) - 1, (Evidence(limit, len(rows) - 1, mean),)) if without else None
