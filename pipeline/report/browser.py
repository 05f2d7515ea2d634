"""What browser.js shows: every step's key numbers and its completions, token by token, as JSON inside the page."""

from typing import Any

from pipeline.report.inputs import Inputs
from pipeline.report.labels import measured
from pipeline.report.samples import Prompt

NUMBERS = ("reward_mean", "entropy", "ref_logprob", "distinct_completions", "empty_share", "repeated_3grams")


def browser_data(inputs: Inputs, prompts: dict[int, list[Prompt]]) -> dict[str, Any]:
    """Steps in order with the prompts that are shown of them, how many completions a step had, and the place where the
    verdict sets in (None: nowhere). Texts are cut by `parts`."""
    steps = [int(step) for step in inputs.history["step"]]
    onset = inputs.diagnosis["onset"]
    return {
        "steps": [
            {"step": step, "numbers": numbers, "prompts": prompts.get(step, [])}
            for step, numbers in zip(steps, key_numbers(inputs), strict=True)
        ],
        "batch": inputs.kept["completions"] // len(steps),
        "onset": steps.index(onset) if onset in steps else None,
    }


def key_numbers(inputs: Inputs) -> list[list[str]]:
    """The values of NUMBERS, a row per step."""
    table = inputs.history[list(NUMBERS)].itertuples(index=False)
    return [[measured(value, name) for name, value in zip(NUMBERS, row, strict=True)] for row in table]
