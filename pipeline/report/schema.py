"""What the files of a run hold, as far as the figures and the page read them."""

from typing import Any, Literal

from typing_extensions import TypedDict  # what pydantic asks for below Python 3.12


class Interval(TypedDict):
    """A mean with its bootstrap 95% interval; None is undefined, as the interval of one prompt."""

    mean: float | None
    low: float | None
    high: float | None


class Comparison(TypedDict):
    """One reward on held-out prompts: the untouched checkpoint, the trained policy, their difference."""

    checkpoint: Interval
    policy: Interval
    difference: Interval
    win_rate: float | None


class Sides(TypedDict):
    checkpoint: Any
    policy: Any


class Train(TypedDict):
    train_key: str
    code: str
    prompts: str
    checkpoint: str
    params: dict[str, Any]


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


class Completion(TypedDict):
    prompt: str
    sample: int
    checkpoint: str
    policy: str
    rewards: dict[str, tuple[float, float]]


class Evidence(TypedDict):
    """A metric whose value at a step lies on one side of a threshold; untouched: the checkpoint before training."""

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
    cure: Cure | None
    healthy_step: int
