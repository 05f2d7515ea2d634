"""params.yaml -> frozen, validated objects. Every mistake in the file is one line that names its key."""

import difflib
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.errors import UserError

PARAMS_FILE = Path("params.yaml")
SELECTORS = {
    "model": "models",
    "prompts": "prompt_sets",
    "reward": "rewards",
    "encoder": "encoders",
    "recipe": "recipes",
}


class Table(BaseModel):
    """A table of params.yaml. Strict: "3" is no integer; closed: an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


Key = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", max_length=64)]  # no dots: DVC and -S cannot address them
Text = Annotated[str, Field(min_length=1, max_length=10_000)]
RepoId = Annotated[str, Field(pattern=r"^[\w-][\w.-]*(/[\w-][\w.-]*)?$", max_length=200)]
Revision = Annotated[str, Field(pattern=r"^\w[\w./-]*$", max_length=200)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=1, le=10_000_000)]


class Model(Table):
    """A causal LM: a hub repository at a revision, or a directory (`source`)."""

    repo: RepoId | None = None
    revision: Revision | None = None
    source: Text | None = None
    manifest_sha256: Sha256 | None = None  # for a source outside the project: DVC does not watch it

    @model_validator(mode="after")
    def one_origin(self) -> "Model":
        _exactly_one(self, "repo", "source")
        return self


class PromptSet(Table):
    """Messages in OASST1's schema and the filter that makes prompts of them."""

    repo: RepoId | None = None
    revision: Revision | None = None
    source: Text | None = None
    language: Text = Field(description="a language code such as en")
    min_characters: Count = 1
    max_characters: Count = 31
    first_character: Literal["upper", "any"] = "upper"
    deduplicate: bool = False

    @model_validator(mode="after")
    def one_origin(self) -> "PromptSet":
        _exactly_one(self, "repo", "source")
        if self.min_characters > self.max_characters:
            raise ValueError(f"min_characters {self.min_characters} exceeds max_characters {self.max_characters}")
        return self


class Encoder(Table):
    """A sentence encoder: a hub repository at a revision, a directory, or a Python package that ships one."""

    repo: RepoId | None = None
    revision: Revision | None = None
    source: Text | None = None
    package: RepoId | None = None
    sha256: Sha256 | None = Field(None, description="of model.safetensors, verified on use")

    @model_validator(mode="after")
    def one_origin(self) -> "Encoder":
        _exactly_one(self, "repo", "source", "package")
        return self


class EmbeddingReward(Table):
    kind: Literal["embedding"]
    target: Text = Field(description="the sentence to be near to")


class LengthReward(Table):
    kind: Literal["length"]
    target: int = Field(ge=0, le=1_000_000, description="characters")


class WordsReward(Table):
    kind: Literal["words"]
    words: tuple[Text, ...] = Field(min_length=1, description="lower-case words", strict=False)

    @model_validator(mode="after")
    def comparable(self) -> "WordsReward":
        for word in self.words:
            if word != word.lower() or word.split() != [word]:
                raise ValueError(f"{word!r} can never match: words are compared in lower case, split at white space")
        return self


class CustomReward(Table):
    kind: Literal["custom"]
    function: str = Field(pattern=r"^custom/[\w/-]+\.py:[A-Za-z_]\w*$", description="custom/file.py:function")
    params: dict[str, Any] = {}


class Term(Table):
    weight: float = Field(description="factor on the reward")
    reward: "EmbeddingReward | LengthReward | WordsReward | CustomReward" = Field(discriminator="kind")


class SumReward(Table):
    kind: Literal["sum"]
    terms: tuple[Term, ...] = Field(min_length=1, strict=False)


Reward = Annotated[EmbeddingReward | LengthReward | WordsReward | CustomReward | SumReward, Field(discriminator="kind")]


class Recipe(Table):
    """The algorithm: every choice that an ablation may want to change alone."""

    alignment: Literal["correct", "shifted"]
    draw: Literal["shuffled", "replacement"]
    length_limit: Literal["completion", "total"]
    padding: Literal["masked", "counted"]
    special_tokens: Literal["strip", "keep"]
    temperature: float = Field(gt=0, le=100)
    top_k: int = Field(ge=0, description="0 is off")
    top_p: float = Field(gt=0, le=1, description="1 is off")
    baseline: Literal["none", "batch", "group", "rloo"]
    advantage_norm: Literal["none", "group", "batch"]
    aggregation: Literal["sequence_sum", "sequence_mean", "token_mean"]
    kl: Literal["none", "reward_k1", "loss_k2"]
    kl_coef: float = Field(ge=0, description="reward units per nat")
    optimizer: Literal["adam", "sgd"]
    lr: float = Field(gt=0, le=1000, description="learning rate")
    adam_eps: float = Field(gt=0, le=1)
    warmup_steps: int = Field(ge=0, le=1_000_000, description="steps of linear warm-up")
    max_grad_norm: float = Field(ge=0, description="0 is off")
    precision: Literal["float32", "bfloat16"]


class Train(Table):
    steps: Count
    prompts_per_step: Count
    samples_per_prompt: int = Field(ge=2, le=100_000, description="a group of one has no spread")
    max_tokens: int = Field(ge=1, le=100_000, description="tokens")
    micro_batch: Count
    checkpoint_every: Count
    threads: int = Field(ge=1, le=4096, description="CPU threads")
    device: Literal["auto", "cpu", "cuda"]
    on_nonfinite: Literal["stop", "skip"]


class Evaluate(Table):
    prompts: int = Field(ge=0, le=10_000_000, description="0 is all")
    samples_per_prompt: Count
    bootstrap: int = Field(ge=100, le=1_000_000, description="resamples")


class Params(Table):
    model: Key
    prompts: Key
    reward: Key
    encoder: Key
    recipe: Key
    seed: int = Field(ge=0, lt=2**63)
    train: Train
    evaluate: Evaluate
    models: dict[Key, Model]
    prompt_sets: dict[Key, PromptSet]
    encoders: dict[Key, Encoder]
    rewards: dict[Key, Reward]
    recipes: dict[Key, Recipe]

    @model_validator(mode="after")
    def reward_names(self) -> "Params":
        for name in ("text", "ref_logprob_per_token"):
            if name in self.rewards:
                raise ValueError(f"rewards: {name!r} is taken: reports/evaluate/metrics.json has a key of that name")
        return self

    def selected(self, selector: str) -> Any:
        """The table that a selector names, for example selected("reward")."""
        return getattr(self, SELECTORS[selector])[getattr(self, selector)]


def load(path: Path = PARAMS_FILE) -> Params:
    """Reads and validates a parameter file.

    Raises UserError with one line naming file, key, value and what would be right.
    """
    # YAML 1.2 through ruamel: DVC writes lr as 3e-05, which YAML 1.1 parsers read as a string.
    try:
        tree = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run from the project's root") from None
    except (YAMLError, UnicodeDecodeError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    except RecursionError:
        raise UserError(f"{path}: not valid: nested too deeply") from None
    return validate(tree, str(path))


def validate(tree: Any, name: str = "params.yaml") -> Params:
    """Validates a parsed parameter file. Raises UserError (see `load`)."""
    if not isinstance(tree, dict):
        raise UserError(f"{name}: should hold keys such as model, reward and train, not {type(tree).__name__}")
    try:
        params = Params.model_validate(tree)
    except ValidationError as failure:
        raise UserError(f"{name}: {_explain(failure, tree)}") from None
    except RecursionError:
        raise UserError(f"{name}: not valid: nested too deeply") from None
    for selector, table in SELECTORS.items():
        chosen, known = getattr(params, selector), getattr(params, table)
        if chosen not in known:
            raise UserError(f"{name}: {selector}: there is no {chosen!r} in {table}{_suggest(chosen, known)}")
    return params


def _exactly_one(table: Table, *names: str) -> None:
    if sum(getattr(table, name) is not None for name in names) != 1:
        raise ValueError(f"needs exactly one of {', '.join(names)}")


def _suggest(wrong: Any, known: Any) -> str:
    """`; did you mean x?` where a key is near, else the list of keys."""
    near = difflib.get_close_matches(str(wrong), [str(key) for key in known], n=1)
    return f"; did you mean {near[0]!r}?" if near else f" (there are: {', '.join(map(str, known))})"


def _explain(failure: ValidationError, tree: dict[str, Any]) -> str:
    """One line for the most telling error: an unknown key first, since it often explains a missing one."""
    errors = sorted(failure.errors(), key=lambda error: error["type"] != "extra_forbidden")
    error = errors[0]
    path, model = _locate(error["loc"])
    where = ".".join(map(str, path))
    if error["type"] == "extra_forbidden":
        fields = model.model_fields if model else {}
        return f"unknown key {where}{_suggest(path[-1], fields)}"
    if error["type"] == "missing":
        return f"{where} is missing"
    value = _brief(_at(tree, path))
    message = error["msg"].removeprefix("Value error, ")
    field = model.model_fields.get(str(path[-1])) if model and path else None
    unit = f" ({field.description})" if field and field.description else ""
    return f"{where} = {value}: {message[:1].lower()}{message[1:]}{unit}"


def _locate(loc: tuple[int | str, ...]) -> tuple[list[int | str], type[Table] | None]:
    """The key path in the file (without the tags that pydantic puts in for unions) and the table that holds its end."""
    tables = {"models": Model, "prompt_sets": PromptSet, "encoders": Encoder, "recipes": Recipe}
    rewards: dict[str, type[Table]] = {
        "embedding": EmbeddingReward, "length": LengthReward, "words": WordsReward,
        "custom": CustomReward, "sum": SumReward,
    }  # fmt: skip
    head = loc[0] if loc else ""
    parts = [part for part in loc if part != "[key]"]
    if head in ("train", "evaluate"):
        return parts, {"train": Train, "evaluate": Evaluate}[str(head)]
    if head in tables:
        return parts, tables[str(head)] if len(parts) > 2 else None
    if head == "rewards" and len(parts) > 2:
        model: type[Table] | None = rewards.get(str(parts[2]))
        path = parts[:2] + parts[3:]
        if "terms" in path and len(path) > 4:
            model = Term
            if path[4] == "reward" and len(path) > 5:
                model = rewards.get(str(path[5]))
                path = path[:5] + path[6:]
        return path, model
    return parts, Params if len(parts) == 1 else None


def _at(tree: Any, path: list[int | str]) -> Any:
    for part in path:
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            break
    return tree


def _brief(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
