"""What browser.js shows: every step's key numbers and its kept completions, token by token, as JSON inside the page."""

import itertools
import json
from typing import Any

from markupsafe import Markup

from pipeline.report.inputs import Inputs
from pipeline.report.labels import measured
from pipeline.report.style import signed
from pipeline.report.term_report import reward_words
from pipeline.report.text import parts

NUMBERS = ("reward_mean", "entropy", "ref_logprob", "distinct_completions", "empty_share", "repeated_3grams")
DIGITS = 3  # of a logprob; more would be most of the page
# JSON has these only inside strings. Escaped there, nothing ends the script element or opens a comment in it.
ESCAPES = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"})


def browser_data(inputs: Inputs) -> dict[str, Any]:
    """Steps in order, and the place among them where the verdict sets in (None: nowhere). Texts are cut by `parts`."""
    rows = {step: list(group) for step, group in itertools.groupby(inputs.samples, lambda row: row["step"])}
    steps = [int(step) for step in inputs.history["step"]]
    onset = inputs.diagnosis["onset"]
    return {
        "steps": [
            {"step": step, "numbers": numbers, "prompts": _prompts(rows.get(step, []))}
            for step, numbers in zip(steps, key_numbers(inputs), strict=True)
        ],
        "onset": steps.index(onset) if onset in steps else None,
    }


def key_numbers(inputs: Inputs) -> list[list[str]]:
    """The values of NUMBERS, a row per step."""
    table = inputs.history[list(NUMBERS)].itertuples(index=False)
    return [[measured(value, name) for name, value in zip(NUMBERS, row, strict=True)] for row in table]


def _prompts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A step's rows by prompt, in the order of the file."""
    groups = itertools.groupby(rows, lambda row: row["prompt"])
    return [{"prompt": parts(prompt), "completions": [_completion(row) for row in group]} for prompt, group in groups]


def _completion(row: dict[str, Any]) -> dict[str, Any]:
    """Its tokens with their logprobs; `text` only where the reward read something other than the tokens say."""
    pieces = row["pieces"]
    same = row["completion"] in ("".join(pieces), "".join(pieces[:-1] if row["ended"] else pieces))
    return {
        "reward": reward_words(row),
        "advantage": signed(row["advantage"]),
        "pieces": [_piece(piece) for piece in pieces],
        "logprobs": [None if x is None else round(x, DIGITS) for x in row["token_logprobs"]],
        **({} if same else {"text": parts(row["completion"])}),
    }


def _piece(piece: str) -> str | list[str]:
    """A token's text by `parts`; as it is where nothing in it is marked, as in most."""
    cut = parts(piece, ends=False)
    return cut[0] if len(cut) == 1 else cut


def script_json(value: Any) -> Markup:
    """JSON that may stand inside a script element, whatever its strings hold."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.translate(ESCAPES))  # the escaping is done
