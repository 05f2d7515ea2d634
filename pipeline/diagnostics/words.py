"""Findings in words that a person can check against the history."""

from collections.abc import Callable, Sequence

from pipeline.diagnostics.calibration import Row, Spread
from pipeline.diagnostics.verdict import THRESHOLDS, Finding


def summary(finding: Finding, rows: Sequence[Row], spreads: dict[str, Spread]) -> str:
    """One sentence: what happened, with the numbers of the step that shows it beside the untouched policy's."""
    row, step = rows[finding.shown_at], finding.shown_at
    since = f"From step {finding.onset} {'on' if step == len(rows) - 1 else f'to {step}'}"

    def before(metric: str) -> float:
        return spreads[metric].mean if metric in spreads else float("nan")

    reward = f"{row['reward_mean']:.4g} at step {step}, {before('reward_mean'):.4g} untouched"
    match finding.kind:
        case "numeric":
            return f"At step {finding.onset} the loss, the gradient or a log-probability is not a finite number."
        case "misaligned":
            return (
                f"Before the first update the loss scores tokens up to {row['logprob_gap']:.1f} nats away from the "
                "log-probabilities that they were sampled with: it is not the loss of what was said."
            )
        case "starved":
            share = sum(row["zero_spread_share"] for row in rows) / len(rows)
            return (
                f"In {len(rows)} steps {share:.0%} of the prompts gave all of their samples the same reward: there is "
                "nothing to learn from."
            )
        case "hacking":
            broken = " and ".join(_broken(row, before))
            return f"{since} the reward is higher ({reward}) for completions that have fallen apart: {broken}."
        case "empty":
            return f"{since} most completions are empty: {_shares(row, before, 'empty_share', step)}."
        case "repetition":
            return f"{since} completions repeat themselves: {_shares(row, before, 'repeated_3grams', step)} of their 3-grams."
        case "gibberish":
            return (
                f"{since} the untouched checkpoint finds the completions improbable: {row['ref_logprob']:.1f} nats a token "
                f"at step {step}, {before('ref_logprob'):.1f} for its own."
            )
        case "mode":
            return (
                f"{since} the policy says few things: {_shares(row, before, 'distinct_completions', step)} of completions "
                f"differ, at an entropy of {row['entropy']:.2g} nats a token ({before('entropy'):.2g} untouched)."
            )
        case "step-size":
            largest = max(range(finding.onset + 1), key=lambda t: rows[t]["update_kl"])
            return (
                f"{since} the reward is lower than before training: {reward}. The largest update until then, at step "
                f"{largest}, moved the policy by {rows[largest]['update_kl']:.2g} nats a token."
            )


def headline(found: Sequence[Finding], summaries: Sequence[str], steps: int) -> str:
    """The verdict in one or two sentences: the first finding, and the first one of the texts or rewards after it."""
    if not found:
        return f"No sign of collapse in {steps} steps."
    later = [text for finding, text in zip(found, summaries, strict=True) if finding.onset > found[0].onset]
    return " ".join([summaries[0], *later[:1]])


def _shares(row: Row, before: Callable[[str], float], metric: str, step: int) -> str:
    return f"{row[metric]:.0%} at step {step}, {before(metric):.0%} untouched"


def _broken(row: Row, before: Callable[[str], float]) -> list[str]:
    found = []
    if row["empty_share"] >= THRESHOLDS.empty:
        found.append(f"{row['empty_share']:.0%} are empty")
    if row["repeated_3grams"] >= THRESHOLDS.repeated:
        found.append(f"{row['repeated_3grams']:.0%} of their 3-grams are repeats")
    if row["ref_logprob"] <= before("ref_logprob") - THRESHOLDS.unlikely:
        found.append(
            f"the checkpoint finds them {before('ref_logprob') - row['ref_logprob']:.1f} nats a token less likely"
        )
    return found
