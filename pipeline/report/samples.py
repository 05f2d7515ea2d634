"""Which completions of training the page shows, token by token: as many as its size allows, by a stated rule."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from pipeline.file_io import finite_or_none
from pipeline.paths import RUN_FILES
from pipeline.report.inputs import Inputs
from pipeline.report.style import signed
from pipeline.report.term_report import reward_words
from pipeline.report.text import parts

LIMIT = 8_000_000  # bytes of JSON
DIGITS = 3  # of a logprob; with more, logprobs would be most of the page
ROWS = 256  # of all.parquet, read at once
COLUMNS = [
    "step", "group", "prompt", "completion", "reward", "terms", "advantage", "ending", "pieces", "token_logprobs",
]  # fmt: skip
# JSON has these only inside strings. Once they are escaped, no string ends the script element or opens a comment in it.
ESCAPES = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"})
Prompt = dict[str, Any]  # a prompt and its completions, as browser.js shows them


class Shown(NamedTuple):
    """The completions that the page shows."""

    prompts: dict[int, list[Prompt]]  # by step
    rule: str  # how many of how many, and which
    rest: str  # where the others are, or what would keep them


def shown_samples(inputs: Inputs, limit: int = LIMIT) -> Shown:
    """The first completions of each step. If all were kept, also whole prompts: the first prompts of each step with all
    of their completions, as many as there is room for, the same number for each step. If there is no room even for the
    first completions, only those of evenly spread steps."""
    rows = itertools.groupby(inputs.samples, lambda row: int(row["step"]))
    first = {step: _by_prompt(list(group)) for step, group in rows}
    sizes = {step: _size(prompts) for step, prompts in first.items()}
    chosen = evenly_spread(sizes, inputs.diagnosis["onset"], limit)
    whole: dict[int, list[Prompt]] = {}
    most = 0
    if inputs.all_samples and len(chosen) == len(first):
        whole, most = whole_prompts(inputs.all_samples, limit - sum(sizes.values()))
    beside = {step: first[step][len(whole.get(step, [])) :] for step in chosen}
    prompts = {step: [*whole.get(step, []), *beside[step]] for step in chosen}
    shown = sum(len(prompt["completions"]) for of_step in prompts.values() for prompt in of_step)
    which = "the first completions of each step"
    if most:
        which = f"of each step all completions of the first {'prompt' if most == 1 else f'{most} prompts'}"
        which += ", and the first ones of others" * any(beside.values())
    elif len(chosen) < len(first):
        which = f"the first completions of {len(chosen):,} of {len(first):,} steps, evenly spread"
    return Shown(prompts, *_words(inputs, shown, which, len(chosen) == len(first), limit))


def _words(inputs: Inputs, shown: int, which: str, every_step: bool, limit: int) -> tuple[str, str]:
    """Which completions are shown and how many of how many, and where the others are."""
    total = inputs.kept["completions"]
    if shown == total:
        return f"All {total:,} completions of training.", ""
    room = f"The page has room for {limit / 1e6:.0f} MB of them"
    rest = "train.keep_samples=all keeps every one."
    if inputs.all_samples:
        rest = f"{room}; all are in {RUN_FILES.all_samples}."
    elif not every_step:
        rest = f"{room}; the first ones of every step are in {RUN_FILES.samples}."
    return f"{shown:,} of {total:,} completions of training: {which}.", rest


def whole_prompts(path: Path, limit: int) -> tuple[dict[int, list[Prompt]], int]:
    """The first prompts of each step with all of their completions: the largest number per step that fits into `limit`
    bytes for all steps, and this number. Never holds more than these prompts and a few rows."""
    import pyarrow.compute
    import pyarrow.parquet

    found: dict[tuple[int, int], Prompt] = {}
    sizes: Counter[int] = Counter()  # bytes of the first prompts of all steps so far, of the second ones, ...
    most = 2**31 - 1
    with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        for batch in file.iter_batches(batch_size=ROWS, columns=COLUMNS):
            for row in batch.filter(pyarrow.compute.less(batch["group"], most)).to_pylist():
                step, group = row["step"], row["group"]
                if group >= most:
                    continue
                prompt = found.setdefault((step, group), {"prompt": parts(row["prompt"]), "completions": []})
                prompt["completions"].append(_completion(of_parquet(row)))
                new = prompt if len(prompt["completions"]) == 1 else prompt["completions"][-1]
                sizes[group] += _size(new) + 1  # a comma
                while sizes and sizes.total() > limit:
                    most = max(sizes)
                    del sizes[most]
                    found = {place: kept for place, kept in found.items() if place[1] < most}
    by_step = itertools.groupby(found, lambda place: place[0])
    return {step: [found[place] for place in places] for step, places in by_step}, len(sizes)


def evenly_spread(sizes: dict[int, int], onset: int | None, limit: int) -> list[int]:
    """Steps evenly spread from the first to the last, as many as fit, and the onset, at which the page opens.

    sizes: bytes of each step; limit: of all that are chosen.
    """
    steps, number = list(sizes), len(sizes)
    while True:
        spread = {steps[place * (len(steps) - 1) // max(number - 1, 1)] for place in range(number)}
        chosen = [step for step in steps if step in spread or step == onset]
        size = sum(sizes[step] for step in chosen)
        if size <= limit or number <= 1:
            return chosen
        number = max(1, min(number - 1, number * limit // size))


def of_parquet(row: dict[str, Any]) -> dict[str, Any]:
    """A row of all.parquet as one of samples.jsonl: the terms as a mapping."""
    return row | {"ended": row["ending"] != "limit", "terms": dict(row["terms"] or ())}


def _by_prompt(rows: list[dict[str, Any]]) -> list[Prompt]:
    """A step's rows by prompt, in the order of the file."""
    return [_prompt(list(group)) for _, group in itertools.groupby(rows, lambda row: row["prompt"])]


def _prompt(rows: list[dict[str, Any]]) -> Prompt:
    return {"prompt": parts(rows[0]["prompt"]), "completions": [_completion(row) for row in rows]}


def _completion(row: dict[str, Any]) -> dict[str, Any]:
    """A completion's tokens with their logprobs; `text` only if the reward read another text than that of the
    tokens."""
    pieces, advantage = row["pieces"], row["advantage"]
    same = row["completion"] in ("".join(pieces), "".join(pieces[:-1] if row["ended"] else pieces))
    logprobs = (None if x is None else finite_or_none(x) for x in row["token_logprobs"])
    return {
        "reward": reward_words(row),
        "advantage": signed(None if advantage is None else finite_or_none(advantage)),
        "pieces": [_piece(piece) for piece in pieces],
        "logprobs": [None if x is None else round(x, DIGITS) for x in logprobs],
        **({} if same else {"text": parts(row["completion"])}),
    }


def _piece(piece: str) -> str | list[str]:
    """A token's text cut by `parts`; as it is if nothing in it is marked, as in most tokens."""
    cut = parts(piece, ends=False)
    return cut[0] if len(cut) == 1 else cut


def script_json(value: Any) -> Markup:
    """JSON that may stand inside a script element, whatever its strings hold."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.translate(ESCAPES))  # the escaping is done


def _size(value: Any) -> int:
    return len(script_json(value).encode())
