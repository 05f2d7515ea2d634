"""What the stages write of a run: the shape of each file, and one reader for all of them."""

from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic asks for this one below Python 3.12

from pipeline.errors import UserError
from pipeline.file_io import read_csv, read_json, read_jsonl


class RunParams(TypedDict):
    """What was chosen. The selected tables stand beside it as dotted keys: recipe.lr."""

    model: str
    prompts: str
    reward: str
    encoder: str
    recipe: str
    seed: int


class Run(TypedDict):
    train_key: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    code: str
    prompts: str
    checkpoint: str
    params: RunParams


class Summary(TypedDict):
    steps: int


class Sample(TypedDict):
    step: int
    prompt: str
    completion: str
    reward: float
    advantage: float | None  # null where it was not finite
    tokens: list[int]
    pieces: list[str]  # the text of each token
    token_logprobs: list[float | None]
    ended: bool
    terms: NotRequired[dict[str, float | None]]  # of a sum: what each term adds to the reward; null: it has no value


def check_tokens(sample: Sample) -> Sample:
    if not len(sample["tokens"]) == len(sample["pieces"]) == len(sample["token_logprobs"]):
        raise ValueError("tokens, pieces and token_logprobs differ in length")
    return sample


class Kept(TypedDict):
    """Which completions of training were kept, and how many there were."""

    keep_samples: Literal["some", "all"]
    completions: int
    sha256: NotRequired[str]  # of all.parquet, where all are kept


class TermRow(TypedDict):
    """A term of the trained sum at a step. null is undefined."""

    step: int
    term: str
    weight: float
    scored_share: float
    mean: float | None
    mean_weighted: float | None
    std_within: float | None
    std_within_weighted: float | None
    share: float | None


def by_term(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of terms.jsonl by the term's name, in the order of params.yaml."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["term"], []).append(row)
    return found


TERM_COLUMNS = ("scored_share", "mean", "mean_weighted", "std_within", "std_within_weighted", "share")


class Healthy(TypedDict):
    step: int


class Best(TypedDict):
    step: int | None  # None: nothing was measured


class HeldoutRow(TypedDict):
    step: int
    prompt: str
    completion: str
    reward: float


class Interval(TypedDict):
    """A mean with its bootstrap 95% interval; None is undefined, such as the interval of one prompt."""

    mean: float | None
    low: float | None
    high: float | None


def gain_text(difference: Interval, digits: str = ".3g") -> str:
    """Did it learn? +0.48 (95% interval +0.20 to +0.80): the held-out gain, policy minus reference.

    digits: a format.
    """
    mean, low, high = (difference[name] for name in ("mean", "low", "high"))
    if mean is None:
        return "undefined"
    interval = "no interval" if low is None else f"95% interval {low:+{digits}} to {high:+{digits}}"
    return f"{mean:+{digits}} ({interval})"


class Sides(TypedDict):
    checkpoint: Any
    policy: Any


class Compared(TypedDict):
    """On held-out prompts: the reference, the trained policy, their difference."""

    checkpoint: Interval
    policy: Interval
    difference: Interval


class Comparison(Compared):
    """One reward."""

    win_rate: float | None
    pass_at: NotRequired[dict[str, Compared]]  # by k, of a reward of 0 or 1
    terms: NotRequired[dict[str, "ComparedTerm"]]  # of a sum


class ComparedTerm(Compared):
    """What a term adds to a sum; `unweighted`: its own value."""

    weight: float
    unweighted: Sides


class Evaluation(TypedDict, extra_items=Comparison):  # type: ignore[call-arg]  # mypy does not know it yet
    """The rewards by name, and beside them:"""

    text: Sides
    ref_logprob_per_token: Sides


Measured = TypedDict(
    "Measured",
    {
        "policy": dict[str, str],
        "prompts": str,
        "params": Any,
        "metrics.json": str,
        "completions.jsonl": str,
        "curve.jsonl": str,
        "heldout.jsonl": str,
    },
)


class CurveRow(Interval):
    """A reward of the held-out curve at a step."""

    step: int
    reward: str
    gain: Interval
    spread: float | None
    sqrt_kl: float | None
    best_step: int
    since_best: Interval
    trained_since_best: Interval


class Completion(TypedDict):
    prompt: str
    sample: int
    checkpoint: str
    policy: str
    rewards: dict[str, tuple[float, float]]


class Evidence(TypedDict):
    """A metric whose value at a step lies on one side of a threshold; untouched: of the reference, before training."""

    metric: str
    step: int
    value: float | None
    untouched: float | None
    spread: float | None
    threshold: float | None
    side: Literal["above", "below"]


class Shown(TypedDict):
    """A completion that shows what a finding says."""

    step: int
    prompt: str
    completion: str
    reward: float | None


class Finding(TypedDict):
    kind: str
    title: str
    onset: int
    summary: str
    evidence: list[Evidence]
    completions: list[Shown]
    changes: dict[str, Any]
    reason: str
    source: str


class Note(TypedDict):
    """A note on a term of the sum. It makes no verdict, and has no changes if none would help."""

    kind: Literal["dominant", "dead"]
    term: str
    text: str
    changes: dict[str, Any]
    command: str | None


class Cure(TypedDict):
    changes: dict[str, Any]
    command: str


class Diagnosis(TypedDict):
    """The verdict on a run: `healthy`, or the kind of its earliest finding."""

    verdict: str
    onset: int | None
    headline: str
    steps: int
    findings: list[Finding]
    notes: list[Note]
    cure: Cure | None
    healthy_step: int
    independent: str
    over_optimisation: str
    best: Best | None


# file -> the stage that writes it, its shape
RESULTS: dict[str, tuple[str, Any]] = {
    "prepare.json": ("prepare", dict[str, Any]),
    "run.json": ("train", Run),
    "summary.json": ("train", Summary),
    "history.csv": ("train", list[dict[str, float]]),
    "calibration.csv": ("train", list[dict[str, float]]),
    "samples.jsonl": ("train", list[Annotated[Sample, AfterValidator(check_tokens)]]),
    "kept.json": ("train", Kept),
    "healthy.json": ("train", Healthy),
    "best.json": ("train", Best),
    "terms.jsonl": ("train", list[TermRow]),
    "heldout.jsonl": ("train", list[HeldoutRow]),
    "diagnosis.json": ("diagnose", Diagnosis),
    "metrics.json": ("evaluate", Evaluation),
    "measured.json": ("evaluate", Annotated[list[Measured], Field(min_length=1)]),
    "completions.jsonl": ("evaluate", list[Completion]),
    "curve.jsonl": ("evaluate", list[CurveRow]),
}
READERS = {".json": read_json, ".jsonl": read_jsonl, ".csv": read_csv}


def read_result(file: Path) -> Any:
    """The content of a file as it is. Raises UserError where it is missing or not what its stage writes."""
    stage, shape = RESULTS[file.name]
    try:
        content = READERS[file.suffix](file)
        TypeAdapter(shape).validate_python(content)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; {how_to_remake(stage)}") from None
    except ValidationError as failure:
        first = failure.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        wrong = f"has no {where}" if first["type"] == "missing" else f"{where}: {first['msg'].lower()}"
        raise UserError(f"{file}: {wrong}; {how_to_remake(stage)}") from None
    except ValueError as error:
        raise UserError(f"{file}: not what the stage writes: {error}; {how_to_remake(stage)}") from None
    return content


def how_to_remake(stage: str) -> str:
    """The advice for a file of a stage that is missing or broken."""
    return f"run `dvc repro {stage}`, or `dvc repro -f -s {stage}` where that does nothing"
