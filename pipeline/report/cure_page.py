"""reports/cure.html: whether a change cured a collapse, both runs side by side. Every text in it is escaped."""

from importlib import resources
from typing import Any, NamedTuple

from markupsafe import Markup

from pipeline.config.overrides import experiment_command
from pipeline.report.browser import NUMBERS, key_numbers
from pipeline.report.cure_figure import PANELS
from pipeline.report.inputs import Inputs
from pipeline.report.page import (
    OPEN_EXAMPLES,
    base64_of,
    environment,
    examples,
    has_intervals,
    heldout_size,
    policy_for,
    text_rows,
    treated,
)

CAPTION = (
    "Each panel shows one column of history.csv for both runs: without the change dashed in red, with it in blue. "
    "What the reward and the completions are may itself depend on the change; dotted lines are each run's step 0."
)


class Answer(NamedTuple):
    title: str
    text: str  # what the answer rests on


def answer(collapsed: Inputs, after: Inputs) -> Answer:
    """Is the collapse gone? The verdicts on the run without and with the change, and the held-out reward, decide."""
    before = {finding["kind"]: finding for finding in collapsed.diagnosis["findings"]}
    found = {finding["kind"]: finding for finding in after.diagnosis["findings"]}
    gone = [finding["title"] for kind, finding in before.items() if kind not in found]
    if not found:
        title, text = "The collapse is gone", f"Healthy in all {after.diagnosis['steps']} steps."
    else:
        title = "Not gone" if before.keys() & found else "Another kind of collapse"
        text = f"With the change: {since(list(found.values()))}."
    text += f" Without it: {since(list(before.values()))}."
    text += f" Gone: {', '.join(gone)}." if title == "Not gone" and gone else ""
    difference = after.rewards[after.trained]["difference"]
    if not found and difference["high"] is not None and difference["high"] < 0:
        text += " But its held-out reward is below the reference model's."
    return Answer(title, text)


def since(findings: list[dict[str, Any]]) -> str:
    return ", ".join(f"{finding['title']} from step {finding['onset']} on" for finding in findings)


def render(collapsed: Inputs, after: Inputs, figure: bytes, narrow: bytes, name: str) -> str:
    """The page. figure, narrow: PNG bytes, the latter for a phone; name: of the experiment with the change."""
    folder = resources.files("pipeline.report")
    css = (folder / "page.css").read_text(encoding="utf-8")
    diagnosis, params = collapsed.diagnosis, collapsed.params
    further = after.diagnosis["cure"]
    rewards = sorted(collapsed.rewards.keys() & after.rewards, key=lambda reward: (reward != collapsed.trained, reward))
    return (
        environment()
        .get_template("cure.html.jinja")
        .render(
            policy=policy_for(css),
            style=Markup(css),  # our own text
            answer=answer(collapsed, after),
            params=params,
            runs=[("without the change", collapsed), ("with the change", after)],
            treated=treated(diagnosis),
            numbers=number_rows(collapsed, after),
            figure=base64_of(figure),
            narrow=base64_of(narrow),
            caption=CAPTION,
            drawn=list(PANELS),
            rewards=[(reward, collapsed.rewards[reward], after.rewards[reward]) for reward in rewards],
            reference_differs=any(
                collapsed.rewards[reward]["checkpoint"] != after.rewards[reward]["checkpoint"] for reward in rewards
            ),
            trained=collapsed.trained,
            intervals=has_intervals(collapsed),
            sizes=[heldout_size(collapsed), heldout_size(after)],
            text=statistics(collapsed, after),
            examples=beside(collapsed, after),
            open_examples=OPEN_EXAMPLES,
            name=name,
            command=experiment_command(params, diagnosis["cure"]["changes"], "--temp", "--name", name),
            original=experiment_command(params, {}),
            # the further cure is meant for the run with the change, which the workspace does not have
            further=further and experiment_command(params, diagnosis["cure"]["changes"] | further["changes"]),
            further_treated=treated(after.diagnosis) if further else [],
        )
    )


def number_rows(collapsed: Inputs, after: Inputs) -> list[tuple[str, list[str]]]:
    """NUMBERS before training, and in the last step without and with the change."""
    values = (key_numbers(collapsed)[0], key_numbers(collapsed)[-1], key_numbers(after)[-1])
    return [(column, row) for column, *row in zip(NUMBERS, *values, strict=True)]


def statistics(collapsed: Inputs, after: Inputs) -> list[tuple[str, list[Any]]]:
    """Each statistic of the held-out texts: of the reference, without and with the change."""
    changed = {name: value for name, _, value in text_rows(after)}
    return [(name, [before, without, changed.get(name)]) for name, before, without in text_rows(collapsed)]


def beside(collapsed: Inputs, after: Inputs) -> list[tuple[str, list[tuple[str, float | None, str]]]]:
    """Held-out prompts with the completions of the reference, without and with the change: (who, its reward, text)."""
    others = {(row["prompt"], row["sample"]): row for row in after.completions}
    rows = [row for row in collapsed.completions if (row["prompt"], row["sample"]) in others]
    made = []
    for row in examples(rows):
        other = others[row["prompt"], row["sample"]]
        rewards = [each["rewards"].get(collapsed.trained, (None, None)) for each in (row, other)]
        sides = [("reference model", rewards[0][0], row["checkpoint"])]
        sides += [("without the change", rewards[0][1], row["policy"])]
        sides += [("with the change", rewards[1][1], other["policy"])]
        made.append((row["prompt"], sides))
    return made
