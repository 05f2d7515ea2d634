"""Logs that other trainers wrote: their columns under our names, what is compared with what, and which checks the log
lets us make. Pure functions; docs/DIAGNOSE.md says what each name means where it comes from."""

import itertools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.diagnosis.calibration import FALSE_ALARMS, Row, Spread, null_statistics
from pipeline.diagnosis.text import distinct_share, empty_share, repeated_ngrams
from pipeline.diagnosis.thresholds import THRESHOLDS
from pipeline.diagnosis.verdict import (
    COMPARISONS,
    ORDER,
    Finding,
    Kind,
    detection_rules,
    findings,
    limits_of_run,
)
from pipeline.file_io import total

STEPS = ("step", "global_step", "training/global_step", "_step", "Step")  # the first of them that is there counts
# ours -> trl's, OpenRLHF's and verl's key. Not here: what differs by an option that the log does not tell.
NAMES = {
    "reward_mean": ("reward", "critic/score/mean"),
    "reward_std_within": ("reward_std", "group_reward_std"),  # a scale: trl's holds the spread between prompts, too
    "zero_spread_share": ("frac_reward_zero_std",),
    "entropy": ("entropy_loss", "actor/entropy"),
    "loss": ("policy_loss", "actor/pg_loss"),
    "grad_norm": ("actor/grad_norm",),
    "completion_tokens": ("completions/mean_length", "response_length/mean", "response_length"),
    "cut_off_share": ("completions/clipped_ratio", "response_length/clip_ratio", "response_clip_ratio"),
    "token_kl": ("kl",),  # trl's, and so only beside another column of trl's: OpenRLHF's is by an option
}
OURS = {name: ours for ours, names in NAMES.items() for name in names}
SAMPLED = ("reward_mean", "zero_spread_share", "completion_tokens")  # a row has one of them: it tells of new samples
TEXTS = ("empty_share", "distinct_completions", "repeated_3grams")  # what completions tell
FALLS = {"entropy", "distinct_completions"}  # limits below a share of the start
FEWEST_TEXTS = 8  # completions a step: of fewer, one text is too large a share
# "?", "7", and at most four letters, as a tokenizer has them on average: no word is too long to repeat itself
PIECE = re.compile(r"[^\W\d_]{1,4}|\d|[^\w\s]|_")

# what a check needs that is no limit of `detection_rules`
OTHERS: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    ("numeric", ("nonfinite",)), ("misaligned", ("logprob_gap", "truncation_gap")), ("starved", ("zero_spread_share",)),
)  # fmt: skip
ADVICE: dict[Kind, str] = {
    "numeric": "a smaller learning rate, gradient clipping, rewards scaled to a spread near 1, float32",
    "misaligned": "score the tokens that were sampled, each given those before it, at the sampler's temperature",
    "starved": "more samples a prompt, easier prompts, or a reward that tells bad from worse",
    "hacking": "a reward that does not pay for such text; a KL term to the reference, or more of it; smaller steps",
    "empty": "strip special tokens before the reward reads the text; a KL term to the reference; smaller steps",
    "repetition": "a KL term to the reference, or more of it; smaller steps",
    "gibberish": "a baseline where there is none, no entropy bonus, a KL term to the reference, smaller steps",
    "mode": "a KL term to the reference, or more of it; smaller steps",
    "step-size": "smaller steps: a lower learning rate, a warm-up, gradient clipping",
}


@dataclass(frozen=True)
class Check:
    """One way in which a kind shows. `lacks`: what keeps it from being made; empty: it was made."""

    kind: Kind
    metrics: tuple[str, ...]
    lacks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judgement:
    found: list[Finding]
    checks: list[Check]
    rows: list[dict[str, float]]
    spreads: dict[str, Spread]
    first: int  # rows that stand in for batches without learning; 0: there are such batches


# --- columns


def base_name(column: str) -> str:
    """The name without what trackers put before it: `train/entropy`, `data/entropy`, `my run - train/entropy`."""
    return re.sub("^(train|data)/", "", column.rpartition(" - ")[2])


def known_columns(columns: Collection[str], history: Collection[str]) -> dict[str, list[str]]:
    """Ours -> the log's columns that mean it. history: the names of history.csv, which a log of ours has."""
    found: dict[str, list[str]] = {}
    for column in columns:
        name = base_name(column)
        ours = OURS.get(name, name if name in history and name != "step" else None)
        if ours is not None:
            found.setdefault(ours, []).append(column)
    if not any(base_name(column) == "completions/mean_length" for column in columns):
        found.pop("token_kl", None)
    return found


def history_rows(table: Sequence[Mapping[str, float | None]], history: Collection[str]) -> list[dict[str, float]]:
    """Rows with every column of history.csv, nan where the log does not say, in the order of the table.

    table: by our names and those of NAMES, None = not logged. A row without a new sample (an evaluation, a further
    update on one batch) is left out; a number in it that is not finite counts at the next row.
    """
    sampled = [name for name in SAMPLED if any(is_finite(row.get(name)) for row in table)]
    watched = any(name in row for row in table for name in ("loss", "grad_norm"))
    rows, broken = [], False
    for logged in table:
        broken |= has_nonfinite(logged)
        if not any(is_finite(logged.get(name)) for name in sampled or logged.keys() - {"step"}):
            continue
        row = dict.fromkeys((*history, *NAMES), math.nan) | {
            name: value for name, value in logged.items() if value is not None
        }
        if watched and logged.get("nonfinite") is None:
            row["nonfinite"] = float(broken)
        rows.append(row | derived(row))
        broken = False
    if broken and rows:  # an update after the last samples
        rows[-1]["nonfinite"] = 1.0
    return rows


def derived(row: Row) -> dict[str, float]:
    """What follows from other columns where it is not logged itself.

    ref_logprob: mean log ref(y_t) = -(entropy + KL(policy || reference)), both a token, in expectation over samples
    of the policy. empty_share, at least: lengths count the EOS and are 1 or more, so P(T = 1) >= 2 - mean T, and a
    completion of one token that was not cut off is an EOS alone.
    """
    more = {}
    if math.isnan(row["ref_logprob"]):
        more["ref_logprob"] = -(row["entropy"] + row["token_kl"])
    if math.isnan(row["empty_share"]) and math.isfinite(bound := 2 - row["completion_tokens"] - row["cut_off_share"]):
        more["empty_share"] = max(0.0, bound)
    return more


def is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def has_nonfinite(logged: Mapping[str, float | None]) -> bool:
    """Whether loss or gradient is infinite, or nan beside a number: a row of nothing but nan is an empty one."""
    watched = [value for name in ("loss", "grad_norm") if (value := logged.get(name)) is not None]
    others = any(is_finite(value) for name, value in logged.items() if name != "step")
    return any(math.isinf(value) or (math.isnan(value) and others) for value in watched)


# --- completions


def text_metrics(texts: Sequence[str]) -> dict[str, float]:
    """The text metrics of a step; none where it has too few completions. PIECE stands in for tokens."""
    if len(texts) < FEWEST_TEXTS:
        return {}
    repeated = repeated_ngrams([numbered(PIECE.findall(text.lower())) for text in texts], 3)
    return {
        "empty_share": empty_share(texts), "distinct_completions": distinct_share(texts), "repeated_3grams": repeated,
    }  # fmt: skip


def numbered(pieces: Sequence[str]) -> list[int]:
    numbers: dict[str, int] = {}
    return [numbers.setdefault(piece, len(numbers)) for piece in pieces]


# --- the verdict


def start_statistics(rows: Sequence[Row], prompts: int, steps: int) -> dict[str, Spread]:
    """Each metric's spread over a log's first rows, which stand in for batches without learning; `steps`: of the log.

    They do learn, and a drift would count as spread. So the variance is that of successive differences, half their
    mean square, with 2 (n - 1)^2 / (3n - 4) degrees of freedom (von Neumann et al. 1941). The reward's stays that of
    the prompts inside the batches, where the log has it. Where a run collapses in these very rows, chance seems to
    explain anything: of FALLS, what loses the share `certain` counts all the same.
    """
    spreads = null_statistics(rows, prompts)
    for name, spread in spreads.items():
        values = [row[name] for row in rows if math.isfinite(row[name])]
        if name == "reward_mean" and any(math.isfinite(row["reward_se"]) for row in rows):
            continue
        squares = [(after - before) * (after - before) for before, after in itertools.pairwise(values)]
        count = len(values)
        freedom = max(1, 2 * (count - 1) ** 2 // (3 * count - 4))
        spreads[name] = replace(spread, std=math.sqrt(total(squares) / len(squares) / 2), dof=freedom)
    for name in FALLS & spreads.keys():
        most, margin = (
            THRESHOLDS.certain * spreads[name].mean,
            spreads[name].margin(FALSE_ALARMS / (steps * COMPARISONS)),
        )
        if 0 < most < margin:
            spreads[name] = replace(spreads[name], std=spreads[name].std * most / margin)
    return spreads


def first_rows(count: int) -> int:
    """How many rows at the start stand in for batches without learning: a quarter of the log, 3 to 8; 0: too short."""
    return min(8, max(3, count // 4)) if count >= 3 + THRESHOLDS.patience else 0


def judge(rows: Sequence[Row], calibration: Sequence[Row], first: int) -> Judgement:
    """Findings, and what was and was not checked. calibration: batches without learning, or none: then the `first`
    rows are them. Rows without completions among others that have them are judged without, and those alone with."""
    # sqrt(B) of history.csv: reward_se = reward_std_between / sqrt(B)
    ratios = [row["reward_std_between"] / row["reward_se"] for row in rows if row["reward_se"] > 0]
    prompts = max(2, round(max([ratio * ratio for ratio in ratios if math.isfinite(ratio)], default=2.0)))
    spreads = null_statistics(calibration, prompts) if calibration else {}
    if first and not calibration:
        spreads = start_statistics(rows[:first], prompts, len(rows))
    checks = possible_checks(rows, spreads)
    read = [row for row in rows if math.isfinite(row["distinct_completions"])]
    if len(read) in (0, len(rows)):
        found = findings(assumed(rows), spreads, len(rows))
    else:
        unread = [{**row, **dict.fromkeys(TEXTS, math.nan)} for row in rows]
        blank = [row | derived(row) for row in unread]
        found = findings(assumed(blank), spreads, len(rows))
        places = [place for place, row in enumerate(rows) if math.isfinite(row["distinct_completions"])]
        by_text = [moved(finding, places) for finding in findings(assumed(read), spreads, len(rows))]
        if any(finding.kind == "empty" for finding in by_text):
            found = [finding for finding in found if finding.kind != "mode"]  # nothing said is certain, too
        kinds = {finding.kind for finding in found}
        found += [finding for finding in by_text if finding.kind not in kinds]
        found.sort(key=lambda finding: (finding.onset, ORDER.index(finding.kind)))
    return Judgement(found, checks, [dict(row) for row in rows], spreads, 0 if calibration else first)


def assumed(rows: Sequence[Row]) -> list[dict[str, float]]:
    """Completions that nobody has seen count as not empty: mode collapse is told by its other signs."""
    return [{**row, "empty_share": 0.0} if math.isnan(row["empty_share"]) else dict(row) for row in rows]


def moved(finding: Finding, places: Sequence[int]) -> Finding:
    """A finding among some of the rows, by the places of these rows among all."""
    shown = tuple(each._replace(step=places[each.step]) for each in finding.evidence)
    return replace(finding, onset=places[finding.onset], shown_at=places[finding.shown_at], evidence=shown)


def possible_checks(rows: Sequence[Row], spreads: dict[str, Spread]) -> list[Check]:
    """Each way in which each kind shows, and what it lacks: a column, or a limit that any value could pass."""
    lasting = {name for name in rows[0] if lasts(name, rows)} if rows else set()
    limits = limits_of_run(spreads, max(1, len(rows)), THRESHOLDS)
    checks = []
    for kind, metrics in OTHERS:
        lacks = [name for name in metrics if not any(math.isfinite(row[name]) for row in rows)]
        if kind == "starved" and not lacks:
            if "zero_spread_share" not in spreads:
                lacks = ["first rows to compare with"]
            elif len(rows) < THRESHOLDS.no_signal_steps:
                lacks = [f"{THRESHOLDS.no_signal_steps} rows"]
            elif not all(math.isfinite(row["zero_spread_share"]) for row in rows):
                lacks = ["zero_spread_share in every row"]
        checks.append(Check(kind, metrics, tuple(lacks)))
    for kind, alternatives in detection_rules(limits).items():
        for alternative in alternatives:
            needed = [limit for limit in alternative if limit.metric != "empty_share" or limit.side == "above"]
            lacks = [limit.metric for limit in needed if limit.metric not in lasting]
            for limit in needed if not lacks else ():
                if limit.metric == "reward_mean" and math.isnan(limit.threshold) and limit.metric in spreads:
                    lacks.append("reward_std_within above 0")
                elif math.isnan(limit.threshold):
                    lacks.append("first rows to compare with")
                elif limit.metric in FALLS and limit.threshold <= 0:
                    lacks.append(f"first rows with {limit.metric} above 0")
            checks.append(Check(kind, tuple(limit.metric for limit in needed), tuple(dict.fromkeys(lacks))))
    return sorted(checks, key=lambda check: ORDER.index(check.kind))


def lasts(name: str, rows: Sequence[Row]) -> bool:
    """Whether a column has a value in enough rows for a sign to last; text metrics may be logged more rarely."""
    there = [math.isfinite(row[name]) for row in rows]
    if name in TEXTS:
        return sum(there) >= THRESHOLDS.patience
    window = THRESHOLDS.patience
    return any(all(there[place : place + window]) for place in range(len(there) - window + 1))
