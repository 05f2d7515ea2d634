"""Findings in words that a person can check against the history."""

import math
from collections.abc import Sequence
from typing import Any

from pipeline.diagnosis.calibration import Row, Spread
from pipeline.diagnosis.thresholds import THRESHOLDS
from pipeline.diagnosis.verdict import Evidence, Finding
from pipeline.file_io import finite_or_none

REFERENCE = "for the reference"

OF_TEXT = ("hacking", "empty", "repetition", "gibberish", "mode")  # kinds that held-out completions would show


def summary(finding: Finding, rows: Sequence[Row], spreads: dict[str, Spread], compared: str = REFERENCE) -> str:
    """One sentence: what happened, with the numbers of the step that shows it beside those it is compared with.

    compared: where those are of, `for the reference` or `in the first 8 rows`. Steps are named as the rows name them.
    """
    row = rows[finding.shown_at]
    onset, step = int(rows[finding.onset]["step"]), int(row["step"])
    since = f"From step {onset} on" if finding.shown_at == len(rows) - 1 else f"From step {onset} to step {step}"
    own = "its own" if compared == REFERENCE else f"those {compared}"

    def before(metric: str) -> float:
        return spreads[metric].mean if metric in spreads else math.nan

    def share(metric: str) -> str:
        beside = f", {before(metric):.0%} {compared}" if metric in spreads else ""
        return f"{row[metric]:.0%} at step {step}{beside}"

    bytewise = (
        f"{row['ref_bits_per_byte']:.1f} bits a byte at step {step}, {before('ref_bits_per_byte'):.1f} for {own}, "
        f"{before('shuffled_bits_per_byte'):.1f} with their tokens shuffled"
    )
    reward = f"{row['reward_mean']:.4g} at step {step}, {before('reward_mean'):.4g} {compared}"
    match finding.kind:
        case "numeric":
            return f"At step {onset} the loss, the gradient or a log-probability is not a finite number."
        case "misaligned":
            return (
                f"Before the first update the loss scores tokens up to {row['logprob_gap']:.1f} nats away from the "
                "log-probabilities that they were sampled with: it is not the loss of what was said."
            )
        case "starved":
            return (
                f"In {len(rows)} steps {finding.evidence[0].value:.0%} of the prompts gave all of their samples the "
                "same reward: there is nothing to learn from."
            )
        case "hacking":
            broken = {
                "empty_share": f"{row['empty_share']:.0%} are empty",
                "repeated_3grams": f"{row['repeated_3grams']:.0%} of their 3-grams are repeats",
                "ref_logprob": "the reference model finds them "
                f"{before('ref_logprob') - row['ref_logprob']:.1f} nats a token less likely than {own}",
                "ref_bits_per_byte": f"they cost the reference model {bytewise}",
            }
            said = " and ".join(text for metric, text in broken.items() if finding.passes(metric))
            return f"{since} the reward is higher ({reward}) for completions that have fallen apart: {said}."
        case "empty":
            return f"{since} most completions are empty: {share('empty_share')}."
        case "repetition":
            return f"{since} completions repeat themselves; repeats among their 3-grams: {share('repeated_3grams')}."
        case "gibberish":
            by_token = f"{row['ref_logprob']:.1f} nats a token at step {step}, {before('ref_logprob'):.1f} for {own}"
            cost = by_token if finding.passes("ref_logprob") else bytewise
            return f"{since} the reference model finds the completions improbable: {cost}."
        case "mode":
            signs = {
                "distinct_completions": f"different completions: {share('distinct_completions')}",
                "entropy": f"entropy: {row['entropy']:.2g} nats a token at step {step}, "
                f"{before('entropy'):.2g} {compared}",
            }
            said = "; ".join(text for metric, text in signs.items() if finding.passes(metric))
            return f"{since} the policy gives almost the same completion every time; {said}."
        case "heldout":
            return (
                "No step of training shows it, but the trained policy's held-out completions have fallen apart: "
                f"{' and '.join(cost_texts(finding.evidence))}."
            )
        case "over-optimised":
            return finding.words
        case "step-size":
            updates = [shown for shown in finding.evidence if shown.limit.metric == "update_kl"]
            large = "".join(
                f" The update of step {rows[u.step]['step']:.0f} moved it by {u.value:.2g} nats a token."
                for u in updates
            )
            return f"{since} the policy earns less than {compared.removeprefix('for ')}: {reward}.{large}"


def cost_texts(shown: Sequence[Evidence]) -> list[str]:
    """What held-out completions have lost, in the order of these."""
    values = {one.limit.metric: (one.value, one.limit.reference) for one in shown}
    formats = {
        "empty_share": "{:.0%} are empty ({:.0%} of the reference's)",
        "repeated_3grams": "{:.0%} of their 3-grams are repeats (the reference's {:.0%})",
        "distinct_completions": "{:.0%} are different (the reference's {:.0%})",
        "distinct_2": "of their pairs of neighbouring tokens {:.0%} are different (the reference's {:.0%})",
        "ref_logprob": "{:.1f} nats a token by the reference model (its own {:.1f})",
        "ref_bits_per_byte": "{:.1f} bits a byte by the reference model (its own {:.1f})",
    }
    return [
        text.format(value, math.nan if untouched is None else untouched.mean)
        for metric, text in formats.items() if metric in values
        for value, untouched in [values[metric]]
    ]  # fmt: skip


def headline(found: Sequence[Finding], summaries: Sequence[str], steps: int, heldout_sound: bool = False) -> str:
    """Return the verdict in one or two sentences: the first finding and the later one that is visible last, or what
    became of the held-out texts.

    The earliest onset breaks ties. heldout_sound: the held-out completions of the trained policy were judged and have
    lost nothing; where training shows broken text, the verdict says so.
    """
    if not found and steps < THRESHOLDS.patience:
        return f"No sign of collapse, but too short to tell: one has to last {THRESHOLDS.patience} steps to count."
    if not found:
        return f"No sign of collapse in {steps} steps."
    later = [
        place for place in range(1, len(found))
        if found[place].onset > found[0].onset or found[place].kind == "heldout"
    ]  # fmt: skip
    last = sorted(later, key=lambda place: (-found[place].shown_at, found[place].onset))
    texts = [summaries[place] for place in [0, *last[:1]]]
    if heldout_sound and any(finding.kind in OF_TEXT for finding in found):
        texts.append("The held-out completions of the trained policy do not show it.")
    return " ".join(texts)


def nothing_to_learn(found: Sequence[Finding], rows: Sequence[Row]) -> str:
    """What to say beside the verdict where at every step each prompt's completions had one and the same reward; ""
    elsewhere, and where `starved`, which takes THRESHOLDS.no_signal_steps steps, says so itself."""
    flat = bool(rows) and all(row["zero_spread_share"] == 1 for row in rows)
    if not flat or any(finding.kind == "starved" for finding in found):
        return ""
    return (
        "At every step all completions of a prompt had the same reward: there was nothing to learn from. Easier "
        "prompts, more samples a prompt (train.samples_per_prompt), or a second reward that pays for a part of the way "
        "(kind: sum) can change that."
    )


def evidence(shown: Evidence) -> dict[str, Any]:
    limit, spread = shown.limit, shown.limit.reference
    return {
        "metric": limit.metric, "step": shown.step, "value": finite_or_none(shown.value),
        "untouched": finite_or_none(spread.mean) if spread else None,
        "spread": finite_or_none(spread.std) if spread else None,
        "threshold": finite_or_none(limit.threshold), "side": limit.side,
    }  # fmt: skip
