"""params.yaml -> frozen, validated objects. Every mistake in the file is one line that names its key."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.errors import UserError, did_you_mean

PARAMS_FILE = Path("params.yaml")
MOST_VALUES = 100_000  # in the file with its aliases written out: a few lines of them can stand for billions
MOST_DIGITS = 4300  # of an integer: Python prints no longer one, and YAML can write it in hexadecimal
MOST_TOKENS = 10**9  # that a step draws: their random numbers alone are 8 GB
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
Revision = Annotated[str, Field(pattern=r"^\w[\w-]*([./][\w-]+)*$", max_length=200)]  # as in git, no ..
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
REPO, REVISION, SHA256 = "owner/name on the hub", "a commit, tag or branch", "a sha256: 64 hexadecimal digits"
Count = Annotated[int, Field(ge=1, le=10_000_000)]


class Model(Table):
    """A causal LM: a hub repository at a revision, or a directory (`source`)."""

    repo: RepoId | None = Field(None, description=REPO)
    revision: Revision | None = Field(None, description=REVISION)
    source: Text | None = None
    # for a source outside the project, which DVC does not watch
    manifest_sha256: Sha256 | None = Field(None, description=SHA256)

    @model_validator(mode="after")
    def one_origin(self) -> "Model":
        _exactly_one(self, "repo", "source")
        return self


class PromptSet(Table):
    """Messages in OASST1's schema and the filter that makes prompts of them."""

    repo: RepoId | None = Field(None, description=REPO)
    revision: Revision | None = Field(None, description=REVISION)
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

    repo: RepoId | None = Field(None, description=REPO)
    revision: Revision | None = Field(None, description=REVISION)
    source: Text | None = None
    package: RepoId | None = Field(None, description="the name of a Python package")
    sha256: Sha256 | None = Field(None, description=f"{SHA256}, of model.safetensors; verified on use")

    @model_validator(mode="after")
    def one_origin(self) -> "Encoder":
        _exactly_one(self, "repo", "source", "package")
        return self


class EmbeddingReward(Table):
    kind: Literal["embedding"]
    target: Text = Field(description="the sentence to be near to")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of the encoder")


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
    params: dict[Key, JsonValue] = {}


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
    loss_distribution: Literal["full", "sampler"]
    prompt_sampling: Literal["shuffled", "replacement"]
    length_limit: Literal["completion", "total"]
    padding: Literal["masked", "counted"]
    special_tokens: Literal["strip", "keep"]
    temperature: float = Field(gt=0, le=100)
    top_k: int = Field(ge=0, description="0 is off")
    top_p: float = Field(gt=0, le=1, description="1 is off")
    baseline: Literal["none", "batch", "group", "rloo", "running", "greedy"]
    baseline_decay: float = Field(ge=0, lt=1, description="share of the running mean that a step keeps")
    advantage_norm: Literal["none", "group", "batch"]
    aggregation: Literal["sequence_sum", "sequence_mean", "token_mean", "constant_length"]
    importance: Literal["none", "token", "sequence"]
    clip_range: float = Field(ge=0, description="0 is off")
    epochs: int = Field(ge=1, le=1000, description="updates on each batch")
    kl: Literal["none", "reward_k1", "loss_k2", "loss_k3"]
    kl_coef: float = Field(ge=0, description="reward units per nat")
    kl_target: float = Field(ge=0, description="nats per completion; 0 keeps kl_coef fixed")
    entropy_coef: float = Field(ge=0, description="reward units per nat; 0 is off")
    optimizer: Literal["adam", "sgd"]
    lr: float = Field(gt=0, le=1000, description="learning rate")
    adam_eps: float = Field(gt=0, le=1)
    warmup_steps: int = Field(ge=0, le=1_000_000, description="steps of linear warm-up")
    lr_decay: Literal["none", "linear", "cosine"]
    max_grad_norm: float = Field(ge=0, description="0 is off")
    precision: Literal["float32", "bfloat16"]

    @model_validator(mode="after")
    def consistent(self) -> "Recipe":
        if self.alignment == "shifted" and self.loss_distribution == "sampler":
            raise ValueError(
                "loss_distribution: sampler needs alignment: correct; the sampler never drew the shifted tokens"
            )
        if self.importance == "none" and (self.epochs > 1 or self.clip_range > 0):
            key, value = ("epochs", self.epochs) if self.epochs > 1 else ("clip_range", self.clip_range)
            raise ValueError(f"{key} = {value} needs importance: token or sequence, the ratio that it weighs or clips")
        if self.kl_target > 0 and (self.kl == "none" or self.kl_coef == 0):
            raise ValueError(f"kl_target = {self.kl_target} needs a kl other than none and a kl_coef above 0 to adapt")
        return self


class Train(Table):
    steps: Count
    prompts_per_step: Count
    samples_per_prompt: int = Field(ge=2, le=100_000, description="a group of one has no spread")
    max_tokens: int = Field(ge=1, le=100_000, description="tokens")
    micro_batch: Count
    checkpoint_every: Count
    kl_probe_fraction: float = Field(gt=0, le=1, description="of a step's prompts")
    calibration_batches: int = Field(ge=6, le=10_000, description="batches; fewer tell too little of chance")
    threads: int = Field(ge=1, le=4096, description="CPU threads")
    device: Literal["auto", "cpu", "cuda"]
    on_nonfinite: Literal["stop", "skip"]
    on_collapse: Literal["continue", "stop"]
    lora_rank: int = Field(ge=0, le=100_000, description="0 trains all weights")
    lora_alpha: float = Field(gt=0, le=1e6, description="adapters count alpha / rank")
    gradient_checkpointing: bool

    @model_validator(mode="after")
    def feasible(self) -> "Train":
        tokens = self.prompts_per_step * self.samples_per_prompt * self.max_tokens
        if tokens > MOST_TOKENS:
            raise ValueError(
                f"prompts_per_step * samples_per_prompt * max_tokens = {tokens}: should be at most {MOST_TOKENS}"
            )
        return self

    @property
    def kl_probe_prompts(self) -> int:
        return max(1, round(self.kl_probe_fraction * self.prompts_per_step))


class Evaluate(Table):
    prompts: int = Field(ge=0, le=10_000_000, description="0 is all")
    samples_per_prompt: Count
    bootstrap: int = Field(ge=100, le=1_000_000, description="resamples")


class Params(Table):
    model: str
    prompts: str
    reward: str
    encoder: str
    recipe: str
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
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path} line {line}: should be UTF-8, byte 0x{error.object[error.start]:02x} is not") from None
    except RecursionError:
        raise UserError(f"{path}: not valid: nested too deeply") from None
    except (YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        # the last three: what ruamel raises for a value that its tag does not fit, such as !!bool abc
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        where = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML: {str(problem).partition(';')[0]}") from None
    return validate(tree, str(path))


def validate(tree: Any, name: str = "params.yaml") -> Params:
    """Validates a parsed parameter file. Raises UserError (see `load`)."""
    if not isinstance(tree, dict):
        raise UserError(f"{name}: should hold keys such as model, reward and train, not {type(tree).__name__}")
    if _values(tree) > MOST_VALUES:
        raise UserError(
            f"{name}: holds more than {MOST_VALUES} values; does an alias (*name) stand inside its own anchor?"
        )
    try:
        for path, value in _integers(tree):
            if abs(value) >= 10**MOST_DIGITS:
                raise UserError(f"{name}: {'.'.join(path) or 'a key'}: an integer of more than {MOST_DIGITS} digits")
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


def _values(tree: Any) -> int:
    """Keys and values of a tree, an alias counted wherever it stands; stops soon after MOST_VALUES."""
    waiting, count = [tree], 0
    while waiting and count <= MOST_VALUES:
        value = waiting.pop()
        count += 1
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
    return count


def _integers(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    """The integers of a tree with the path of their key; one that is a key itself has the path of its table."""
    if isinstance(tree, int):
        yield path, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _integers(key, path)
            yield from _integers(value, (*path, str(key)))
    elif isinstance(tree, list | tuple | set):
        for place, value in enumerate(tree):
            yield from _integers(value, (*path, str(place)))


def _suggest(wrong: Any, known: Any) -> str:
    """`; did you mean x?` where a key is near, else the list of keys."""
    return did_you_mean(str(wrong), map(str, known)) or f" (there are: {', '.join(map(str, known)) or 'none'})"


def _explain(failure: ValidationError, tree: dict[str, Any]) -> str:
    """The most telling error: an unknown key first, since it often explains a missing one."""
    errors = sorted(failure.errors(), key=lambda error: error["type"] != "extra_forbidden")
    error = errors[0]
    kind, context = error["type"], error.get("ctx", {})
    path, model = _locate(error["loc"])
    where, value = ".".join(map(str, path)), _at(tree, path)
    if kind == "extra_forbidden":
        return f"unknown key {where}{_suggest(path[-1], model.model_fields if model else {})}"
    if kind == "missing":
        return f"{where} is missing"
    if kind == "invalid_key" or error["loc"][-1:] == ("[key]",):
        return f"key {where}: should be text of 1 to 64 letters, digits, _ and -; no dots, which DVC reads as levels"
    if kind == "recursion_depth_exceeded":
        return f"{where}: nested too deeply"
    if kind == "string_unicode":
        return f"{where or 'a key'} holds text that is not valid Unicode"
    if kind == "value_error":
        return f"{where}: {context['error']}" if where else str(context["error"])
    if where in SELECTORS:
        return f"{where} = {_brief(value)}: should name one of {SELECTORS[where]}: {_keys(tree, SELECTORS[where])}"
    if kind == "union_tag_invalid":
        tags = context["expected_tags"]
        return f"{where}.kind = {_brief(value['kind'])}: should be one of {tags}"
    if kind == "union_tag_not_found":
        return f"{where}.kind is missing or no text: it says which reward this is"
    field = model.model_fields.get(str(path[-1])) if model else None
    unit = field.description if field and field.description else ""
    if kind == "string_pattern_mismatch" and unit:
        return f"{where} = {_brief(value)}: should be {unit}"
    return f"{where} = {_brief(value)}: {_rule(kind, error['msg'], value)}{f' ({unit})' if unit else ''}"


def _rule(kind: str, message: str, value: Any) -> str:
    """What would be right, without the validator's own terms."""
    if kind == "string_type" and isinstance(value, int | float):
        return "should be text: put it in quotes"
    if kind in ("dict_type", "model_type", "model_attributes_type"):
        return "should be a table of keys"
    message = message.removeprefix("Input ").replace("Tuple should", "should").replace(" after validation", "")
    return message[:1].lower() + message[1:].replace("tuple", "list")


def _locate(loc: tuple[int | str, ...]) -> tuple[list[int | str], type[Table] | None]:
    """The key path in the file (without the tags that pydantic puts in for unions) and the table that holds its end."""
    sections: dict[str, type[Table]] = {"train": Train, "evaluate": Evaluate}
    tables: dict[str, type[Table]] = {
        "models": Model, "prompt_sets": PromptSet, "encoders": Encoder, "recipes": Recipe,
    }  # fmt: skip
    rewards: dict[str, type[Table]] = {
        "embedding": EmbeddingReward, "length": LengthReward, "words": WordsReward,
        "custom": CustomReward, "sum": SumReward,
    }  # fmt: skip
    head = str(loc[0]) if loc else ""
    path = [part for part in loc if part != "[key]"]
    if head in sections:
        return path, sections[head]
    if head in tables:
        return path, tables[head] if len(path) > 2 else None
    if head == "rewards" and len(path) > 2:
        model: type[Table] | None = rewards.get(str(path[2]))
        path = path[:2] + path[3:]
        if path[2:3] == ["terms"] and len(path) > 4:
            model = Term
            if path[4] == "reward" and len(path) > 5:
                model = rewards.get(str(path[5]))
                path = path[:5] + path[6:]
        if model is CustomReward and "params" in path[2:]:
            path = path[: path.index("params", 2) + 2]  # below, the validator names types as well as keys
        return path, model if len(path) > 2 else None
    return path, Params if len(path) == 1 else None


def _at(tree: Any, path: list[int | str]) -> Any:
    for part in path:
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            break
    return tree


def _keys(tree: dict[str, Any], table: str) -> str:
    known = tree.get(table)
    return ", ".join(map(str, known)) if isinstance(known, dict) and known else "none"


def _brief(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
