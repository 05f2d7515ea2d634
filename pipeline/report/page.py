"""reports/page/report.html: one self-contained page. Completions are untrusted, so every text is escaped."""

import base64
import hashlib
import re
from collections.abc import Iterable
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from pipeline.config.overrides import experiment_command, override
from pipeline.file_io import flatten
from pipeline.report.browser import NUMBERS, browser_data, key_numbers
from pipeline.report.figures import PANELS
from pipeline.report.inputs import Inputs
from pipeline.report.labels import measured, percent
from pipeline.report.samples import script_json, shown_samples
from pipeline.report.style import signed
from pipeline.report.term_report import reward_words, term_table
from pipeline.report.terms import Terms
from pipeline.report.text import visible
from pipeline.runs.results import gain_text

EXAMPLES, OPEN_EXAMPLES = 12, 4  # held-out prompts shown, and how many of them at once
SAMPLES = 4  # completions shown of a training step
CAPTIONS = {
    "overview": "The mean reward of each step with its standard error and the baseline that is subtracted; "
    "beside or below it, three signs of collapse.",
    "reward": "Mean reward of the sampled completions with standard error, spread and baseline; at the right the "
    "held-out means of the reference model (also the dashed line) and of the trained policy",
    "variance": "The policy gradient comes from reward differences within a prompt: where that variance ends, "
    "or many prompts give every sample the same reward, there is nothing left to learn from.",
    "collapse": "Each panel watches one way to fall apart; dotted lines are the reference model at step 0. "
    "A logprob gap above rounding at step 0 means that the loss does not score the tokens that were sampled.",
    "evaluate": "Both models on the same held-out prompts with the same random numbers, for every reward, "
    "each on its own scale",
    "terms": "Above, each term's share of the signal, the variance within a prompt of what is learnt from: near 100%, "
    "the others hardly count. Below, how far its mean, times its weight, has moved since the first step: the terms' "
    "moves add up to the reward's.",
    "curve": "Measured during training, a completion of each prompt, with 95% intervals. Each reward is in units of "
    "its spread over completions at step 0, or at the first measured step that has one. Over-optimisation: the "
    "trained reward rises and an independent one falls. "
    "Numbers are training steps; the ring is the policy in data/best",
}
DRAWN = {  # the terms that a figure shows
    "overview": ("reward_mean", "reward_se", "baseline", "entropy", "ref_kl_k1", "distinct_completions"),
    "reward": ("reward_mean", "reward_se", "reward_std_within", "reward_std_between", "baseline"),
    "variance": ("reward_std_within", "reward_std_between", "zero_spread_share"),
    "collapse": (*(column for series, _ in PANELS for column, _, _ in series), "logprob_gap", "nonfinite"),
    "evaluate": ("held-out gain", "win rate"),
    "terms": ("term", "share of the signal", "reward_mean"),
    "curve": ("held-out", "95% interval", "reward", "ref_kl_sequence", "ref_logprob"),
}
HOLLOW = "; a hollow grey point has an interval that includes zero"


def has_intervals(inputs: Inputs) -> bool:
    """False with one held-out prompt, which tells nothing about others."""
    return any(metric["difference"]["low"] is not None for metric in inputs.rewards.values())


def heldout_size(inputs: Inputs) -> str:
    """What an interval rests on: 200 held-out prompts × 4 samples."""
    samples = {row["sample"] for row in inputs.completions}
    prompts = sum(row["sample"] == 0 for row in inputs.completions)
    return f"{prompts} held-out prompt{'s' * (prompts != 1)} × {len(samples)} sample{'s' * (len(samples) != 1)}"


def render(inputs: Inputs, figures: dict[str, bytes], narrow: dict[str, bytes]) -> str:
    """The page for a run; `figures` maps a name of CAPTIONS to PNG bytes, `narrow` to those for a phone."""
    folder = resources.files("pipeline.report")
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "browser.js"))
    rewards = sorted(inputs.rewards.items(), key=lambda item: (item[0] != inputs.trained, item[0]))
    shown = shown_samples(inputs)
    browser = browser_data(inputs, shown.prompts)
    intervals = has_intervals(inputs)
    size = heldout_size(inputs)
    captions = CAPTIONS | {
        "reward": f"{CAPTIONS['reward']} ({size}).",
        "evaluate": f"{CAPTIONS['evaluate']} ({size}){HOLLOW if intervals else ''}.",
        "curve": f"{CAPTIONS['curve']}{best_words(inputs.diagnosis['best'])}.",
    }
    return (
        environment()
        .get_template("page.html.jinja")
        .render(
            run=inputs.run,
            params=inputs.params,
            sources=inputs.sources,
            policy=policy_for(style, script),
            style=Markup(style),  # our own text, as is the script
            script=Markup(script),
            command=experiment_command(inputs.params, {}),
            diagnosis=inputs.diagnosis,
            treated=treated(inputs.diagnosis) if inputs.diagnosis["cure"] else [],
            data=script_json(browser),
            onset=browser["onset"],
            steps=len(inputs.history),
            numbers=NUMBERS,
            key_numbers=key_numbers(inputs),
            figures=[(name, captions[name], base64_of(figures[name]), base64_of(narrow[name])) for name in figures],
            drawn=DRAWN,
            rewards=rewards,
            solved=solved_rows(rewards),
            trained=inputs.trained,
            gained=inputs.rewards[inputs.trained]["difference"],
            size=size,
            intervals=intervals,
            text=text_rows(inputs),
            prepare=list(flatten(inputs.prepare).items()),
            examples=[(row["prompt"], sides(row, inputs.trained)) for row in examples(inputs.completions)],
            open_examples=OPEN_EXAMPLES,
            samples=samples(inputs.samples),
            shown=shown,
            parts=term_table(inputs.terms, inputs.rewards[inputs.trained].get("terms", {})),
            reward_words=reward_words,
        )
    )


def best_words(best: dict[str, Any] | None) -> str:
    """The step of data/best, and its gain on the prompts that were not used to choose it."""
    if best is None or "reported_on" not in best:
        return ""
    if best["step"] == 0:
        return ": no measured step was better than step 0"
    told = best["reported_on"]
    updates = f"{best['step']} update{'s' * (best['step'] != 1)}"
    gain, prompts = gain_text(told["difference"]), told["prompts"]
    return f", after {updates}: {gain} over step 0 on the {prompts} prompts that did not choose it"


def treated(diagnosis: dict[str, Any]) -> list[dict[str, Any]]:
    """The findings whose changes are in the cure, each with these changes alone."""
    chosen, found = dict(diagnosis["cure"]["changes"]), []
    for finding in diagnosis["findings"]:
        own = {key: value for key, value in finding["changes"].items() if key in chosen and chosen[key] == value}
        chosen = {key: value for key, value in chosen.items() if key not in own}
        found += [finding | {"changes": own}] if own else []
    return found


def environment() -> jinja2.Environment:
    """The template environment of one page. It escapes everything, and remembers which terms the page used."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(visible=visible, number=signed, percent=percent, measured=measured, command_line=command_line)
    made.globals.update(override=override, terms=Terms())
    return made


def base64_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


def policy_for(style: str, script: str | None = None) -> str:
    """A Content-Security-Policy that allows these texts, by their digest, and figures. Nothing else loads or runs."""

    def allowed(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    sources = f"img-src data:; style-src {allowed(style)}" + (f"; script-src {allowed(script)}" if script else "")
    return f"default-src 'none'; {sources}; base-uri 'none'; form-action 'none'"


def command_line(command: str) -> Markup:
    """A command that breaks only between its options if the page is too narrow. When it is copied, it is one line."""
    return Markup(" ").join(Markup("<span>{}</span>").format(visible(part)) for part in re.split(r" (?=-S )", command))


def solved_rows(rewards: Iterable[tuple[str, dict[str, Any]]]) -> list[tuple[str, int, Any]]:
    """(reward, k, its comparison) of the rewards of 0 or 1, in their order."""
    return [(name, int(k), each) for name, metric in rewards for k, each in metric.get("pass_at", {}).items()]


def text_rows(inputs: Inputs) -> list[tuple[str, Any, Any]]:
    """(statistic, reference, policy) of the held-out texts, in the order of the file."""
    before, after = flatten(inputs.text["checkpoint"]), flatten(inputs.text["policy"])
    rows = [(name, value, after.get(name)) for name, value in before.items()]
    score = inputs.ref_logprob
    return [*rows, ("ref_logprob", score["checkpoint"], score["policy"])]


def examples(completions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first sample of evenly spaced held-out prompts: a rule, so that nobody picks."""
    firsts = [row for row in completions if row["sample"] == 0] or completions
    return [firsts[place * len(firsts) // EXAMPLES] for place in range(EXAMPLES)] if len(firsts) > EXAMPLES else firsts


def sides(row: dict[str, Any], trained: str) -> list[tuple[str, float | None, str]]:
    """What both models say to a prompt: (who, its reward, text)."""
    before, after = row["rewards"].get(trained, (None, None))
    return [("reference model", before, row["checkpoint"]), ("trained policy", after, row["policy"])]


def samples(rows: list[dict[str, Any]]) -> list[tuple[int, list[dict[str, Any]]]]:
    """(step, its first completions) for the first, the middle and the last step that kept samples."""
    steps = sorted({row["step"] for row in rows})
    shown = sorted({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else []
    return [(step, [row for row in rows if row["step"] == step][:SAMPLES]) for step in shown]
