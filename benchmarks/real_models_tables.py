"""From finished runs on a real model to docs/real_models.jsonl, and from there to the tables of docs/REAL_MODELS.md."""

import gzip
import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks import text_labels
from benchmarks.detector_tables import of
from pipeline.config.load import PARAMS_FILE, load_params
from pipeline.file_io import finite_or_none, read_jsonl, write_jsonl
from pipeline.paths import REPORTS, RunFiles
from pipeline.runs.provenance import chosen_params
from pipeline.runs.results import read_result

FOUND = Path("docs/real_models.jsonl")  # a run a line: what is known of it, and ten of its completions
CORPUS = Path("data/local/train.jsonl.gz")
JUDGE = Path("data/pocket/checkpoint")  # shares neither weights nor vocabulary with the model that is trained
HALFWAY = 0.5  # the witness's limit, from the reference's own texts to the same with their words in random order
LEAST_FALL = -1.0  # nats a token that the reference's log-likelihood may fall by
SHOWN = 10  # completions a run
SLUR = re.compile(r"n.gg[ae]r?\w*", re.IGNORECASE)  # not printed again


def collect(plans: Sequence[Any], runs: Path) -> None:
    """One row a finished run, those of earlier days kept."""
    with gzip.open(CORPUS, "rt") as lines:
        known = text_labels.word_pairs(json.loads(line)["text"] for line in lines)
    judge = Judge()
    here = [plan for plan in plans if is_finished(plan, runs)]
    rows = {each["name"]: each for each in read_rows()}
    rows |= {plan.name: row(plan, files_of(plan, runs), known, judge) for plan in here}
    write_jsonl(FOUND, [rows[plan.name] for plan in plans if plan.name in rows])
    print(f"{FOUND}: {len(rows)} runs, {len(here)} of them from {runs}")


def files_of(plan: Any, runs: Path) -> RunFiles:
    return RunFiles(runs / plan.name / REPORTS)


def is_finished(plan: Any, runs: Path) -> bool:
    return files_of(plan, runs).diagnosis.is_file()


def read_rows() -> list[dict[str, Any]]:
    return read_jsonl(FOUND) if FOUND.exists() else []


def row(plan: Any, files: RunFiles, known: set[tuple[str, str]], judge: "Judge") -> dict[str, Any]:
    from benchmarks.rldoctor_alarms import verdict

    diagnosis = judged(files)
    metrics, completions = map(read_result, (files.metrics, files.completions))
    history, chosen = pd.read_csv(files.history), read_result(files.run)["params"]
    policy, reference = ([each[side] for each in completions] for side in ("policy", "checkpoint"))
    gain = metrics[chosen["reward"]]["difference"]
    found = text_labels.labels(policy, reference, known)
    found += ["reward"] if (gain["high"] or 0.0) < 0 else []
    found += ["misaligned"] if chosen["recipe.alignment"] == "shifted" else []
    found += (
        ["no signal"]
        if len({reward for each in completions for reward in each["rewards"][chosen["reward"]]}) == 1
        else []
    )
    broken = text_labels.shuffled(reference)
    likelihood = metrics["ref_logprob_per_token"]
    measured = {
        "known_pairs": text_labels.known_share(policy, known),
        "known_pairs_reference": text_labels.known_share(reference, known),
        "known_pairs_shuffled": text_labels.known_share(broken, known),
        "judge": judge.bits_per_byte(policy), "judge_reference": judge.bits_per_byte(reference),
        "judge_shuffled": judge.bits_per_byte(broken),
    }  # fmt: skip
    return {
        "group": plan.group, "name": plan.name, "model": chosen["model"], "reward": chosen["reward"],
        "seed": chosen["seed"], "changes": " ".join(plan.changes[3:]), "steps": diagnosis["steps"],
        "verdict": diagnosis["verdict"], "onset": diagnosis["onset"],
        "findings": " ".join(f"{each['kind']}:{each['onset']}" for each in diagnosis["findings"]),
        "labels": ", ".join(found),
        "reference_reward": metrics[chosen["reward"]]["checkpoint"]["mean"],
        "gain": gain["mean"], "gain_low": gain["low"], "gain_high": gain["high"],
        "ref_logprob_change": likelihood["policy"] - likelihood["checkpoint"],
        "kl_most": history["ref_kl_sequence"].max(),
        "different_pairs": metrics["text"]["policy"]["distinct_2"],  # None: of completions of one token at most
        "different_pairs_reference": metrics["text"]["checkpoint"]["distinct_2"],
        **{name: finite_or_none(value) for name, value in measured.items()},
        "rldoctor": " ".join(verdict(history)[0]),
        "cure": diagnosis["cure"]["changes"] if diagnosis["cure"] else {},
        "completions": [SLUR.sub("[a slur]", one["policy"]) for one in random.Random(0).sample(completions, SHOWN)],
    }  # fmt: skip


def judged(files: RunFiles) -> dict[str, Any]:
    """The verdict by the present code, whatever was there when the run was made."""
    from pipeline.stages.diagnose import diagnose

    params = load_params(files.reports.parent / PARAMS_FILE.name)
    rows, calibration, metrics = map(read_result, (files.history, files.calibration, files.metrics))
    return diagnose(params, rows, calibration, [], chosen_params(params), metrics)


class Judge:
    """Another model's cost of texts: the pocket model's."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(JUDGE).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(JUDGE)

    def bits_per_byte(self, texts: Sequence[str]) -> float:
        """Of all texts together, each by itself after an end-of-text token; NaN where all are empty."""
        import torch

        nats, size = 0.0, 0
        for text in filter(None, texts):
            ids = torch.tensor([[self.tokenizer.eos_token_id, *self.tokenizer(text)["input_ids"]]])
            with torch.no_grad():
                logprobs = self.model(ids).logits[0, :-1].double().log_softmax(-1)
            nats -= logprobs.gather(1, ids[0, 1:, None]).sum().item()
            size += len(text.encode())
        return nats / math.log(2) / size if size else math.nan


def tables() -> None:
    """Markdown."""
    runs = pd.DataFrame(read_rows())
    for part in (stable_rows, other_rows, detection_rows, cure_shares, cure_rows):
        print(*part(runs), "", sep="\n")


def heading(*columns: str) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"


def stable_rows(runs: pd.DataFrame) -> Iterator[str]:
    """Point by point what `stable` promises, a row a model and reward."""
    yield from heading(
        "model", "reward", "seeds", "the model's own reward", "held-out gain of each seed, with its 95% interval",
        "reference's log-likelihood of what it says, change, nats a token", "verdicts", "labels",
    )  # fmt: skip
    for (model, reward), rows in runs[runs["group"] == "stable"].groupby(["model", "reward"], sort=False):
        gains = "; ".join(gain_text(one) for one in rows.itertuples())
        falls = ", ".join(f"{value:+.2f}" for value in rows["ref_logprob_change"])
        yield cells(f"`{model}`", f"`{reward}`", len(rows), f"{rows['reference_reward'].mean():.2f}", gains, falls,
                    counted(rows["verdict"]), counted(rows["labels"].replace("", "none")))  # fmt: skip


def other_rows(runs: pd.DataFrame) -> Iterator[str]:
    """A row a run."""
    yield from heading(
        "run", "labels", "findings: from step", "held-out gain", "likelihood, change", "known word pairs, %",
        "judge, bits a byte", "rldoctor",
    )  # fmt: skip
    for one in runs[runs["group"] == "other"].itertuples():
        pairs = (
            f"{100 * one.known_pairs:.0f} ({100 * one.known_pairs_reference:.0f}, {100 * one.known_pairs_shuffled:.0f})"
        )
        cost = f"{one.judge:.2f} ({one.judge_reference:.2f}, {one.judge_shuffled:.2f})"
        yield cells(f"`{one.name}`", one.labels or "none", one.findings or "none", gain_text(one),
                    f"{one.ref_logprob_change:+.2f}", pairs, cost, one.rldoctor or "silent")  # fmt: skip


def detection_rows(runs: pd.DataFrame) -> Iterator[str]:
    """False alarms and misses of each detector against the labels, and of the labels against the witness."""
    own = runs[~runs["labels"].str.contains("no signal")]
    bad = own["labels"] != ""
    way = (own["judge"] - own["judge_reference"]) / (own["judge_shuffled"] - own["judge_reference"])
    texts = own["labels"].str.contains("salad|repetition|empty")
    yield from heading("what", "alarms on runs without a label", "silent on runs with one")
    answers = {
        "the verdict": own["verdict"] != "healthy",
        "the verdict, without the held-out evaluation": ~own["verdict"].isin(("healthy", "heldout")),
        "rldoctor, critical": own["rldoctor"] != "",
    }
    for name, alarm in answers.items():
        yield cells(name, of(int(alarm[~bad].sum()), int((~bad).sum())), of(int((~alarm)[bad].sum()), int(bad.sum())))
    alarm = (way > HALFWAY) | own["judge"].isna()
    yield cells("the witness, of texts alone", of(int(alarm[~texts].sum()), int((~texts).sum())),
                of(int((~alarm)[texts].sum()), int(texts.sum())))  # fmt: skip


def cure_shares(runs: pd.DataFrame) -> Iterator[str]:
    """By the kind of collapse, how often the first change that was recommended helped."""
    yield from heading(
        "the verdict was", "changes tried", "healthy afterwards, and no label", "of the gain at least half, too"
    )
    before = runs.set_index("name")
    cured = runs[(runs["group"] == "cure") & ~runs["name"].str.startswith("cure-cure-")]
    first = before.loc[cured["name"].str.removeprefix("cure-")]
    held = (cured["verdict"].to_numpy() == "healthy") & (cured["labels"].to_numpy() == "")
    kept = held & (cured["gain"].to_numpy() >= first["gain"].to_numpy() / 2)
    for kind in [*first["verdict"].unique(), "any"]:
        those = (first["verdict"].to_numpy() == kind) | (kind == "any")
        tried = int(those.sum())
        yield cells(kind, tried, of(int(held[those].sum()), tried), of(int(kept[those].sum()), tried))


def cure_rows(runs: pd.DataFrame) -> Iterator[str]:
    """The recommended change of each collapsed run, tried."""
    yield from heading("run", "verdict", "the change", "gain before", "gain after", "verdict after", "labels after")
    before = runs.set_index("name")
    one: Any
    for one in runs[runs["group"] == "cure"].itertuples():
        first = before.loc[one.name.removeprefix("cure-")]  # of a second change, the run with the first
        added = " ".join(one.changes.split()[len(str(first["changes"]).split()) :])
        yield cells(f"`{first.name}`", first["verdict"], f"`{added}`", gain_text(first), gain_text(one), one.verdict,
                    one.labels or "none")  # fmt: skip


def gain_text(one: Any) -> str:
    return f"{one.gain:+.2f} ({one.gain_low:+.2f} to {one.gain_high:+.2f})"


def counted(values: pd.Series) -> str:
    return ", ".join(f"{count} {value}" for value, count in values.value_counts().items())


def cells(*values: object) -> str:
    return f"| {' | '.join(map(str, values))} |"


def texts() -> None:
    """Random completions of each run's policy."""
    for each in read_rows():
        print(f"\n`{each['name']}`:", ", ".join(f"`{text(one)}`" for one in each["completions"]))


def text(completion: str) -> str:
    return completion.replace("\n", "⏎").replace("`", "'").replace("|", "¦") or "(nothing)"
