"""reports/report.html: one page that needs nothing else. Every text in it is escaped; completions are untrusted."""

import base64
import unicodedata
from collections.abc import Iterator
from typing import Any

import jinja2
from markupsafe import Markup, escape

from pipeline.report.inputs import Inputs
from pipeline.report.style import signed

EXAMPLES = 12  # held-out prompts shown
SAMPLES = 4  # completions shown of a training step
CAPTIONS = {
    "overview": "Left, the mean reward of each step with its standard error and the baseline that is subtracted; "
    "right, three signs of collapse.",
    "reward": "Mean reward of the sampled completions with standard error, spread and baseline; at the right the "
    "held-out means of the untouched checkpoint (also the dashed line) and of the trained policy.",
    "variance": "The policy gradient comes from reward differences within a prompt: where that variance ends, "
    "or many prompts give every sample the same reward, there is nothing left to learn from.",
    "collapse": "Each panel watches one way to fall apart; dotted lines are the untouched checkpoint at step 0. "
    "A logprob gap above rounding at step 0 means that the loss does not score the tokens that were sampled.",
    "evaluate": "Both models on the same held-out prompts with the same random numbers, for every reward, "
    "each on its own scale; a hollow grey point has an interval that includes zero.",
}


def render(inputs: Inputs, figures: dict[str, bytes]) -> str:
    """The page for a run; `figures` maps a name of CAPTIONS to PNG bytes."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(visible=visible, number=signed, percent=percent)
    params = inputs.run["params"]
    names = [name for name in ("model", "prompts", "reward", "encoder", "recipe", "seed") if name in params]
    return environment.get_template("page.html.jinja").render(
        run=inputs.run,
        params=params,
        command="dvc exp run " + " ".join(f"-S {name}={params[name]}" for name in names),
        steps=len(inputs.history),
        figures=[(name, CAPTIONS[name], base64.b64encode(content).decode()) for name, content in figures.items()],
        rewards=sorted(inputs.rewards.items(), key=lambda item: (item[0] != inputs.trained, item[0])),
        trained=inputs.trained,
        text=text_rows(inputs),
        prepare=list(flatten(inputs.prepare)),
        examples=examples(inputs.completions),
        samples=samples(inputs.samples),
    )


def visible(text: str) -> Markup:
    """Escaped text in which nothing hides: line ends, tabs and outer spaces are marked, control characters named.

    Characters that reorder or hide text (bidi controls, zero-width space) appear as their code point.
    """
    if not text:
        return Markup('<span class="empty">(empty)</span>')
    body = text.strip(" ")
    start = len(text) - len(text.lstrip(" ")) if body else len(text)
    parts = [_mark("·" * start)]
    parts += [_character(character) for character in body]
    parts += [_mark("·" * (len(text) - start - len(body)))]
    return Markup("").join(parts)


def _character(character: str) -> Markup:
    if character == "\n":
        return _mark("↵") + "\n"
    if character == "\t":
        return _mark("→") + "\t"
    joiner = character in "\u200c\u200d"  # part of ordinary words and emoji
    if not joiner and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return _mark(f"U+{ord(character):04X}")
    return escape(character)


def _mark(text: str) -> Markup:
    return Markup('<span class="mark">{}</span>').format(text) if text else Markup("")


def percent(share: float | None) -> str:
    return "undefined" if share is None else f"{100 * share:.1f}%"


def text_rows(inputs: Inputs) -> list[tuple[str, Any, Any]]:
    """(statistic, checkpoint, policy) of the held-out texts, in the order of the file."""
    before, after = dict(flatten(inputs.text["checkpoint"])), dict(flatten(inputs.text["policy"]))
    rows = [(name, value, after.get(name)) for name, value in before.items()]
    score = inputs.ref_logprob
    return [*rows, ("logprob by the checkpoint, nats a token", score["checkpoint"], score["policy"])]


def flatten(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dicts with their dotted path."""
    if not isinstance(tree, dict):
        yield path, tree
        return
    for name, value in tree.items():
        yield from flatten(value, f"{path}.{name}" if path else str(name))


def examples(completions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first sample of evenly spaced held-out prompts: a rule, so that nobody picks."""
    firsts = [row for row in completions if row["sample"] == 0] or completions
    return [firsts[place * len(firsts) // EXAMPLES] for place in range(EXAMPLES)] if len(firsts) > EXAMPLES else firsts


def samples(rows: list[dict[str, Any]]) -> list[tuple[int, list[dict[str, Any]]]]:
    """(step, its first completions) for the first, the middle and the last step that kept samples."""
    steps = sorted({row["step"] for row in rows})
    shown = sorted({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else []
    return [(step, [row for row in rows if row["step"] == step][:SAMPLES]) for step in shown]
