"""A whole reports folder, made up: of a healthy run, or of one that collapsed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.rl.metrics import HISTORY_COLUMNS
from tests.seal import seal, sha256

COLUMNS = list(HISTORY_COLUMNS)
EVALUATE = ["mean", "low", "high", "difference", "win_rate", "text", "ref_logprob_per_token"]
HOSTILE = (
    "<script>window.hacked = 1</script></script><img src=x onerror='window.hacked = 1'><!-- <script>"
    "\n\t\u202egnp.exe \x00\x1b[31m\u2028'\"&amp;  "
)
FOREIGN = "مرحبا 👩‍💻 Straße"


def history(steps: int, collapsed: bool) -> pd.DataFrame:
    """Columns of history.csv; the collapsed run falls apart between steps 2 and 6, with gaps and huge values."""
    rng = np.random.default_rng(0)
    t = np.arange(steps, dtype=float)
    fall = 1 / (1 + np.exp(-(t - 4) * 1.6)) if collapsed else np.zeros(steps)
    rise = np.zeros(steps) if collapsed else 1 - np.exp(-t / 25)

    def noisy(values: np.ndarray, size: float) -> np.ndarray:
        return values + rng.normal(0, size, steps) * (1 - fall)

    table = pd.DataFrame({"step": np.arange(steps)})
    table["reward_mean"] = noisy(-6.2 + 1.3 * rise - 5.4 * fall, 0.09)
    table["reward_se"] = 0.12 * (1 - fall)
    table["reward_std_within"] = np.abs(noisy(0.85 - 0.2 * rise - 0.85 * fall, 0.04)) * (1 - fall)
    table["reward_std_between"] = np.abs(noisy(0.5 - 0.46 * fall, 0.05))
    table["baseline"] = table["reward_mean"] - 0.04
    table["advantage_std"] = table["reward_std_within"] * 1.06
    table["zero_spread_share"] = np.round(16 * fall) / 16
    table["loss"] = noisy(0.2 * np.ones(steps), 0.4)
    table["entropy"] = np.abs(noisy(3.0 - 0.4 * rise - 3.0 * fall, 0.05))
    table["ref_kl_k1"] = np.maximum(noisy(0.08 * rise + 50 * fall, 0.004), -0.01) * (t > 0)
    table["ref_kl_k3"] = np.where(fall > 0.9, np.exp(np.minimum(40 * fall, 700)), 0.09 * rise + 3 * fall) * (t > 0)
    table["ref_kl_sequence"] = 14 * table["ref_kl_k1"]
    table["ref_logprob"] = noisy(-3.1 - 0.1 * rise - 49 * fall, 0.04)
    table["ref_bits_per_byte"] = noisy(1.5 + 0.05 * rise + 12 * fall, 0.04)
    table["ref_typicality"] = noisy(-0.1 * rise - 49 * fall, 0.04)
    table["policy_logprob"] = noisy(-3.0 + 0.3 * rise + 3.0 * fall, 0.04)
    table["logprob_gap"] = np.where(collapsed, noisy(9 - 5 * fall, 0.5), np.abs(noisy(3e-6 * np.ones(steps), 1e-6)))
    table["truncation_gap"] = np.zeros(steps)
    table["grad_norm"] = np.exp(noisy(0.5 + 7 * fall, 0.2))
    table["lr"] = 1e-4 * np.minimum((t + 1) / 5, 1)
    table["kl_coef"], table["clip_share"], table["nonfinite_logprobs"] = 0.05, 0.0, 0.0
    table["ref_kl_se"], table["certain_run"], table["grad_snr"] = 0.01, 0.2 + 19 * fall, 0.5
    table["update_kl"], table["update_kl_se"], table["relative_update"] = 1e-3, 1e-4, 1e-4
    table["completion_tokens"] = noisy(14 + 2 * rise + 6 * fall, 0.4)
    table["ended_share"] = np.clip(noisy(0.5 - 0.1 * rise - 0.5 * fall, 0.04), 0, 1)
    table["empty_share"] = np.clip(noisy(0.03 * (1 - fall), 0.01), 0, 1)
    table["distinct_completions"] = np.clip(noisy(0.97 - 0.03 * rise - 0.95 * fall, 0.01), 1 / 128, 1)
    table["distinct_within"] = table["distinct_completions"]
    table["distinct_1"] = np.clip(noisy(0.38 - 0.37 * fall, 0.01), 0, 1)
    table["distinct_2"] = np.clip(noisy(0.82 - 0.08 * rise - 0.8 * fall, 0.01), 0, 1)
    table["repeated_3grams"] = np.clip(noisy(0.02 + 0.02 * rise + 0.9 * fall, 0.004), 0, 1)
    table["top_token_share"] = np.clip(noisy(0.06 + 0.7 * fall, 0.005), 0, 1)
    table["nonfinite"] = (t == 11).astype(int) if collapsed else 0
    if collapsed and steps > 13:
        table.loc[11, ["loss", "grad_norm", "ref_kl_k3"]] = [np.nan, np.inf, np.inf]
        table.loc[12:13, ["repeated_3grams", "reward_std_within"]] = np.nan
        table.loc[15, "entropy"] = 0.0
    return table.reindex(columns=COLUMNS, fill_value=0.5)  # a metric that this module does not know is 0.5


def interval(mean: float, width: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - width, "high": mean + width}


def diagnosis(steps: int, collapsed: bool) -> dict[str, Any]:
    """diagnosis.json; the collapsed run has two findings, and text of its completions in what it says."""
    verdict = {"verdict": "healthy", "onset": None, "headline": "No sign of collapse.", "steps": steps, "findings": [],
               "notes": [],
               "cure": None, "healthy_step": steps, "independent": "reference",
               "over_optimisation": "Not over-optimised.", "best": None}  # fmt: skip
    if not collapsed:
        return verdict
    gap = {"metric": "logprob_gap", "step": 1, "value": 8.7, "untouched": None, "spread": None, "threshold": 0.5,
           "side": "above"}  # fmt: skip
    few = {"metric": "distinct_completions", "step": 6, "value": 0.0625, "untouched": 0.97, "spread": 0.012,
           "threshold": 0.5, "side": "below"}  # fmt: skip
    shown = {"step": 6, "prompt": HOSTILE, "completion": HOSTILE, "reward": -11.5}
    changes: list[dict[str, Any]] = [{"recipes.stable.alignment": "correct"}, {"recipes.stable.lr": 0.0001}]
    findings = [
        {"kind": "misaligned", "title": "Misaligned objective", "onset": 1, "summary": "Other tokens are scored.",
         "evidence": [gap], "completions": [], "changes": changes[0], "reason": "It is no gradient.",
         "source": "Williams"},
        {"kind": "mode", "title": "One text for all", "onset": 4, "summary": f"All say {HOSTILE}", "evidence": [few],
         "completions": [shown], "changes": changes[1], "reason": "Smaller steps.", "source": "docs/COLLAPSE.md"},
    ]  # fmt: skip
    command = "dvc exp run -S recipe=stable -S recipes.stable.alignment=correct -S recipes.stable.lr=0.0001"
    cure = {"changes": changes[0] | changes[1], "command": command}
    return verdict | {"verdict": "misaligned", "onset": 1, "headline": f"From step 1 on it says {HOSTILE}",
                      "findings": findings, "cure": cure, "healthy_step": 0}  # fmt: skip


def add_terms(folder: Path, steps: int) -> None:
    """Makes the trained reward a sum of three terms, of which one drowns the others and one has died."""
    shares = {"near": 0.955, "length": 0.05, "words_2": -0.005}
    rows = [
        {"step": step, "term": name, "weight": 0.02, "scored_share": 1.0, "mean": -6.0 + step,
         "mean_weighted": 0.02 * step, "std_within": 0.0 if name == "words_2" else 3.0, "std_within_weighted": 0.06,
         "share": share if step else None}
        for step in range(steps) for name, share in shares.items()
    ]  # fmt: skip
    (folder / "train/terms.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = [json.loads(line) for line in (folder / "train/samples.jsonl").read_text().splitlines()]
    samples = [sample | {"terms": {"near": -7.0, "length": None, "words_2": 1.0}} for sample in samples]
    (folder / "train/samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    sides = {"unweighted": {"checkpoint": -300.0, "policy": None}, "weight": 0.02}
    compared = {name: sides | {side: interval(-6.5, 0.1) for side in ("checkpoint", "policy", "difference")}
                for name in shares}  # fmt: skip
    metrics = json.loads((folder / "evaluate/metrics.json").read_text())
    metrics["embedding"]["terms"] = compared
    (folder / "evaluate/metrics.json").write_text(json.dumps(metrics))
    told = json.loads((folder / "diagnosis.json").read_text())
    told["notes"] = [
        {"kind": "dominant", "term": "near", "text": "`near` carries 96% of the signal. A weight of 0.1 would do.",
         "changes": {"rewards.mine.terms": []}, "command": "dvc exp run -S 'rewards.mine.terms=[]'"},
        {"kind": "dead", "term": "words_2", "text": "`words_2` is dead.", "changes": {}, "command": None},
    ]  # fmt: skip
    (folder / "diagnosis.json").write_text(json.dumps(told))
    seal(folder)


def reports(folder: Path, *, collapsed: bool = False, steps: int = 50, terms: bool = False) -> Path:
    """A whole reports folder as the stages write it. terms: the trained reward is a sum."""
    prompts = [f"Prompt number {i}, what now?" for i in range(40)]
    new = "Hi! iiii'di'd'd" if collapsed else "Hi! How can I help you?"
    names = {"embedding": (-6.2, -11.6 if collapsed else -5.0), "length": (-14.0, -13.9), "words": (0.02, 0.02)}
    metrics: dict[str, object] = {
        name: {
            "checkpoint": interval(before, 0.1), "policy": interval(after, 0.1),
            "difference": interval(after - before, 0.14 if after != before else 0.0),
            "win_rate": 0.5 + 0.45 * float(np.tanh(after - before)),
        }
        for name, (before, after) in names.items()
    }  # fmt: skip
    metrics["text"] = {
        side: {"distinct_2": 0.8, "empty_share": 0.01, "completion_tokens": 14.2} for side in ("checkpoint", "policy")
    }
    metrics["ref_logprob_per_token"] = {"checkpoint": -3.1, "policy": None}
    params = {"model": "pocket", "prompts": "pocket", "reward": "embedding", "encoder": "minilm", "recipe": "stable",
              "seed": 3, "reward.kind": "embedding", "reward.target": "Hi there!", "recipe.lr": 1e-4}  # fmt: skip
    digests = {name: f"{i}b5d4045c3f466fa91fe2cc6abe79232a1a57cdf104f7a26e716e0a1e2789d{i}8" for i, name in
               enumerate(("train_key", "code", "prompts", "checkpoint"))}  # fmt: skip
    completions = [
        {"prompt": prompt, "sample": sample, "checkpoint": HOSTILE if i == 0 else FOREIGN if i == 3 else f"Text {i}.",
         "policy": "" if i == 0 else new, "rewards": {name: list(pair) for name, pair in names.items()}}
        for i, prompt in enumerate(prompts) for sample in range(2)
    ]  # fmt: skip
    rows = [
        {"step": step, "prompt": HOSTILE if i == 0 else prompts[i], "completion": new if sample else HOSTILE,
         "reward": -6.0 - step, "advantage": 0.25, "tokens": [5, 6, 0],
         "pieces": [*(["Hi! ", new[4:]] if sample else [HOSTILE[:30], HOSTILE[30:]]), "<|endoftext|>"],
         "token_logprobs": [-0.01234567, None, -7.5], "ended": True}
        for step in range(steps) for i in range(4) for sample in range(2)
    ]  # fmt: skip
    for name in ("train/samples", "evaluate"):
        (folder / name).mkdir(parents=True)
    history(steps, collapsed).to_csv(folder / "train/history.csv", index=False)
    run = {**digests, "params": params, "processes": [1]}
    kept = {"keep_samples": "some", "completions": 128 * steps}
    files = {"train/run.json": run, "train/summary.json": {"steps": steps}, "evaluate/metrics.json": metrics,
        "train/samples/kept.json": kept, "diagnosis.json": diagnosis(steps, collapsed),
             "prepare.json": {"train": {"read": 600, "kept": 410, "dropped": {"language": 80}}}}  # fmt: skip
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    for name, lines in {"train/samples.jsonl": rows, "evaluate/completions.jsonl": completions}.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "train/calibration.csv").write_text("batch,entropy\n0,3.5\n")
    (folder / "train/terms.jsonl").write_text("")
    (folder / "train/heldout.jsonl").write_text("")
    (folder / "evaluate/curve.jsonl").write_text("")
    seal(folder)
    if terms:
        add_terms(folder, steps)
    return folder


def keep_all(
    folder: Path, *, steps: int, prompts: int, group: int, advantage: float = 0.5, logprob: float = -1.5
) -> list[dict[str, Any]]:
    """Makes it a run that kept all completions: their file, and the note of it. Returns its rows."""
    rows = [
        {"step": step, "prompt_index": b, "group": b, "sample": g, "prompt": f"Prompt number {b}, what now?",
         "completion": f"Step {step}, sample {g} of {b}.", "reward": -1.0 * g, "terms": None, "advantage": advantage,
         "ending": "limit", "ref_log_ratio": None, "tokens": [5, 6],
         "pieces": [f"Step {step},", f" sample {g} of {b}."], "token_logprobs": [logprob, -0.25]}
        for step in range(steps) for b in range(prompts) for g in range(group)
    ]  # fmt: skip
    path = folder / "train/samples/all.parquet"
    pd.DataFrame(rows).to_parquet(path)
    told = {"keep_samples": "all", "completions": len(rows), "sha256": sha256(path.read_bytes())}
    (folder / "train/samples/kept.json").write_text(json.dumps(told))
    seal(folder)
    return rows
