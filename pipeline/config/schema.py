"""The tables of params.yaml: each key with its type and bounds."""

import itertools
from dataclasses import dataclass, field
from string import Formatter
from typing import Annotated, Any, Literal, get_args

import regex
from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

# arguments of apply_chat_template that are no options of a template, and what templates are given besides
NO_OPTIONS = (
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "max_length", "messages",
    "padding", "raise_exception", "return_assistant_tokens_mask", "return_dict", "return_tensors",
    "sanitize_control_tokens", "strftime_now", "tokenize", "tokenizer_kwargs", "truncation",
)  # fmt: skip
# names that a reward is given besides the columns of the prompts
GIVEN_TO_REWARDS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
LIKELIHOOD = "ref_logprob_per_token"  # a key beside the rewards in the files of `evaluate`: no reward has this name
NO_REWARD = ("reference", "none")  # values of evaluate.independent that name no reward
MOST_TOKENS = 10**9  # of a step: their random numbers alone take 8 GB
SELECTORS = {
    "model": "models",
    "prompts": "prompt_sets",
    "reward": "rewards",
    "encoder": "encoders",
    "recipe": "recipes",
}


class Table(BaseModel):
    """A table of params.yaml. "3" is no integer, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


Split = Annotated[str, Field(pattern=r"^\w[\w.-]*$", max_length=200)]
Key = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", max_length=64)]  # no dots: DVC and -S cannot address them
Text = Annotated[str, Field(min_length=1, max_length=10_000)]
Pattern = Annotated[str, Field(min_length=1, max_length=1000)]
RepoId = Annotated[str, Field(pattern=r"^[\w-][\w.-]*(/[\w-][\w.-]*)?$", max_length=200)]
Revision = Annotated[str, Field(pattern=r"^\w[\w-]*([./][\w-]+)*$", max_length=200)]  # as in git, no ..
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
REPO, REVISION, SHA256 = "owner/name on the hub", "a commit, tag or branch", "a sha256: 64 hexadecimal digits"
Count = Annotated[int, Field(ge=1, le=10_000_000)]


@dataclass(frozen=True)
class ChatParams:
    """What a chat model's template is given besides the prompt."""

    system: str | None = None  # message before the prompt
    options: dict[str, Any] = field(default_factory=dict)  # the template's own, such as enable_thinking


class Model(Table):
    """A causal LM: a hub repository at a revision, or a directory (`source`); and how it is spoken to."""

    repo: RepoId | None = Field(None, description=REPO)
    revision: Revision | None = Field(None, description=REVISION)
    source: Text | None = None
    # for a source outside the project, which DVC does not watch
    manifest_sha256: Sha256 | None = Field(None, description=SHA256)
    # auto: prompts go through the tokenizer's chat template, if it has one; none: they are plain text to be continued
    chat_template: Literal["auto", "none"] = "none"
    system: Text | None = Field(None, description="the system message")
    chat_template_options: dict[Key, JsonValue] = Field({}, description="what the template is given by name")

    @property
    def chat(self) -> ChatParams | None:
        """What the chat template is given; None where prompts are plain text."""
        return ChatParams(self.system, dict(self.chat_template_options)) if self.chat_template == "auto" else None

    @model_validator(mode="after")
    def one_origin(self) -> "Model":
        _exactly_one(self, "repo", "source")
        _goes_with_repo(self, "revision")
        if self.manifest_sha256 is not None and self.source is None:
            raise ValueError("manifest_sha256 needs source: a repository is pinned by its revision")
        return self

    @model_validator(mode="after")
    def effective(self) -> "Model":
        for name in ("system", "chat_template_options"):
            if self.chat_template == "none" and getattr(self, name):
                raise ValueError(f"{name} needs chat_template: auto; without the template nobody reads it")
        for name in self.chat_template_options:
            if name in NO_OPTIONS:
                raise ValueError(f"chat_template_options.{name} is no option of a template: the pipeline sets it")
        return self


class PromptSet(Table):
    """Rows of a dataset, how each becomes a prompt, the columns that rewards read, and the filter that selects prompts.
    A rule of the filter is off if its key is left out. The defaults are OASST1's schema."""

    repo: RepoId | None = Field(None, description=REPO)
    revision: Revision | None = Field(None, description=REVISION)
    config: Text | None = Field(None, description="a configuration of the repository, such as main")
    source: Text | None = Field(None, description="a directory or a file")
    train_split: Split = Field("train", description="the name of a split")
    heldout_split: Split | None = Field(None, description="the name of a split; validation if left out")
    heldout_share: float | None = Field(None, gt=0, lt=1, description="of the prompts of train_split")
    heldout_seed: int = Field(0, ge=0, lt=2**63, description="which of the prompts heldout_share takes")
    prompt_column: Text | None = Field(None, description="of texts or lists of messages; text if left out")
    prompt_template: Text | None = Field(None, description='a text with columns in braces: "Question: {question}"')
    columns: tuple[Text, ...] = Field((), description="columns that rewards read", strict=False)
    language: Text | None = Field(None, description="a language code such as en")
    min_characters: Count = 1
    max_characters: Count | None = None
    first_character: Literal["upper", "any"] = "any"
    deduplicate: bool = False

    @model_validator(mode="after")
    def one_origin(self) -> "PromptSet":
        _exactly_one(self, "repo", "source")
        _goes_with_repo(self, "revision", "config")
        if self.max_characters is not None and self.min_characters > self.max_characters:
            raise ValueError(f"min_characters {self.min_characters} exceeds max_characters {self.max_characters}")
        if self.heldout_seed and self.heldout_share is None:
            raise ValueError("heldout_seed needs heldout_share; without it nothing is drawn")
        if self.heldout_split is not None and self.heldout_share is not None:
            raise ValueError("needs at most one of heldout_split, heldout_share")
        return self

    @model_validator(mode="after")
    def readable_columns(self) -> "PromptSet":
        if self.prompt_template is not None and self.prompt_column is not None:
            raise ValueError("needs at most one of prompt_column, prompt_template")
        if self.prompt_template is not None:
            _template_fields(self.prompt_template)
        for name in self.columns:
            if name in GIVEN_TO_REWARDS:
                raise ValueError(f"columns: {name!r} is what every reward is given; it cannot be a column too")
            if self.columns.count(name) > 1:
                raise ValueError(f"columns: {name!r} stands twice")
        return self

    @property
    def prompt_columns(self) -> tuple[str, ...]:
        """The columns that a prompt is made of."""
        return (self.prompt_column or "text",) if not self.prompt_template else _template_fields(self.prompt_template)


def _template_fields(template: str) -> tuple[str, ...]:
    """The columns in a template's braces, each once. Raises ValueError unless there is one, and each is a name."""
    try:
        fields = [field for field in Formatter().parse(template) if field[1] is not None]
    except ValueError as error:
        raise ValueError(f"prompt_template: {error}; a brace that is text is written twice") from None
    if not fields:
        raise ValueError("prompt_template has no column in braces, so that all prompts would be the same")
    for _, name, form, conversion in fields:
        if not name or form or conversion or set(name) & set(".[]"):
            raise ValueError(f"prompt_template: {name!r} in braces should be the name of a column, as in {{question}}")
    return tuple(dict.fromkeys(str(name) for _, name, _, _ in fields))


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
        _goes_with_repo(self, "revision")
        return self


class Classifier(Encoder):
    """A sequence-classification model, from where an encoder may be: a reward model, for example."""


class EmbeddingReward(Table):
    kind: Literal["embedding"]
    target: Text = Field(description="the sentence to be near to")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of the encoder")


class ClassifierReward(Table):
    """What a sequence-classification model says of a completion, or of its prompt and it."""

    kind: Literal["classifier"]
    classifier: Key = Field(description="the name of a table of classifiers")
    label: Text | None = Field(None, description="one of the model's labels; left out where it has one output")
    score: Literal["logit", "probability"] = "logit"
    input: Literal["completion", "prompt_completion"] = "completion"
    max_tokens: Count | None = Field(None, description="tokens of an input, fewer than the model can read")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of the classifier")


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


class MatchReward(Table):
    """1 where the answer in a completion is that of the prompt's row, else 0."""

    kind: Literal["match"]
    column: Text = Field(description="the column that holds the answer")
    compare: Literal["text", "number", "choice"] = "text"
    pattern: Pattern | None = Field(None, description="a regular expression; its group is the answer in a completion")
    column_pattern: Pattern | None = Field(None, description="the same for the text of the column")
    ignore_case: bool = True
    choices: str = Field("ABCD", pattern=r"^[A-Za-z0-9]{2,36}$", description="the letters of compare: choice")

    @model_validator(mode="after")
    def usable(self) -> "MatchReward":
        for name in ("pattern", "column_pattern"):
            if (pattern := getattr(self, name)) is not None:
                _compiled(name, pattern, groups=1)
        return self


class FormatReward(Table):
    """1 where the whole completion has a form, else 0."""

    kind: Literal["format"]
    pattern: Pattern = Field(description="a regular expression for the whole completion")

    @model_validator(mode="after")
    def usable(self) -> "FormatReward":
        _compiled("pattern", self.pattern)
        return self


def _compiled(name: str, pattern: str, groups: int | None = None) -> None:
    """Raises ValueError unless a regular expression is valid and has `groups` groups; None: any number of groups."""
    try:
        found = regex.compile(pattern).groups
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(f"{name}: not a regular expression: {error}") from None
    if groups is not None and found != groups:
        raise ValueError(
            f"{name} has {found} groups; should have {groups}, in parentheses: the answer ((?:...) is none)"
        )


class CustomReward(Table):
    kind: Literal["custom"]
    function: str = Field(pattern=r"^custom/[\w/-]+\.py:[A-Za-z_]\w*$", description="custom/file.py:function")
    params: dict[Key, JsonValue] = {}


VERIFIABLE = MatchReward | FormatReward  # 1 where a completion is right, else 0

PlainReward = (
    EmbeddingReward | ClassifierReward | LengthReward | WordsReward | MatchReward | FormatReward | CustomReward
)


class Term(Table):
    name: Key | None = Field(None, description="what it is called in tables and figures")
    weight: float = Field(description="factor on the reward")
    reward: PlainReward = Field(discriminator="kind")


class SumReward(Table):
    kind: Literal["sum"]
    terms: tuple[Term, ...] = Field(min_length=1, strict=False)
    combine: Literal["sum", "normalized"] = Field("sum", description="what is learnt from; the reward is the sum")

    @model_validator(mode="after")
    def distinct_names(self) -> "SumReward":
        names = [term.name for term in self.terms if term.name is not None]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"terms: the name {name!r} stands twice; each term has one of its own")
        return self


Reward = Annotated[PlainReward | SumReward, Field(discriminator="kind")]


def plain_rewards(table: Reward) -> list[PlainReward]:
    """The rewards that a sum is made of; a reward of any other kind alone."""
    return [term.reward for term in table.terms] if isinstance(table, SumReward) else [table]


def classifier_rewards(table: Reward) -> list[ClassifierReward]:
    """The classifier rewards among `plain_rewards`."""
    return [plain for plain in plain_rewards(table) if isinstance(plain, ClassifierReward)]


def term_names(table: SumReward) -> list[str]:
    """Each term's own name; else its kind, or the function of a custom reward, with a number if the name is taken."""
    taken = {term.name for term in table.terms}
    names: list[str] = []
    for term in table.terms:
        plain = term.reward
        base = plain.function.rpartition(":")[2] if isinstance(plain, CustomReward) else plain.kind
        numbered = (base if number == 1 else f"{base}_{number}" for number in itertools.count(1))
        names.append(term.name or next(name for name in numbered if name not in taken))
        taken.add(names[-1])
    return names


REWARD_KINDS: dict[str, type[Table]] = {
    get_args(table.model_fields["kind"].annotation)[0]: table for table in (*get_args(PlainReward), SumReward)
}


@dataclass(frozen=True)
class SamplingParams:
    """The distribution that tokens are drawn from: softmax(logits / temperature), truncated by top-k, then top-p."""

    temperature: float = 1.0
    top_k: int = 0  # 0 is off
    top_p: float = 1.0  # 1 is off


class Recipe(Table):
    """The algorithm. An ablation can change each choice alone.

    A key that is left out is REINFORCE as it is written down: no term besides the policy gradient.
    """

    alignment: Literal["correct", "shifted"] = "correct"
    loss_distribution: Literal["full", "sampler"] = "full"
    prompt_sampling: Literal["shuffled", "replacement"] = "shuffled"
    length_limit: Literal["completion", "total"]  # written in each recipe, since `cache` depends on it in dvc.yaml
    padding: Literal["masked", "counted"] = "masked"
    special_tokens: Literal["strip", "keep"] = "strip"
    temperature: float = Field(1.0, gt=0, le=100)
    top_k: int = Field(0, ge=0, description="0 is off")
    top_p: float = Field(1.0, gt=0, le=1, description="1 is off")
    stop_strings: tuple[Text, ...] = Field((), description="texts that end a completion", strict=False)
    baseline: Literal["none", "batch", "group", "rloo", "running", "greedy"]
    baseline_decay: float = Field(0.9, ge=0, lt=1, description="share of the running mean that a step keeps")
    scale_rewards: Literal["none", "calibration"] = "none"
    advantage_norm: Literal["none", "group", "batch"] = "none"
    aggregation: Literal["sequence_sum", "sequence_mean", "token_mean", "constant_length"] = "sequence_sum"
    importance: Literal["none", "token", "sequence"] = "none"
    clip_range: float = Field(0.0, ge=0, description="0 is off")
    clip_range_high: float = Field(0.0, ge=0, description="above 1; 0 = clip_range")
    epochs: int = Field(1, ge=1, le=1000, description="updates on each batch")
    kl: Literal["none", "reward_k1", "loss_k2", "loss_k3"] = "none"
    kl_coef: float = Field(0.0, ge=0, description="scaled reward units per nat")
    kl_target: float = Field(0.0, ge=0, description="nats per completion, above which kl_coef rises; 0 = fixed")
    entropy_coef: float = Field(0.0, ge=0, description="scaled reward units per nat; 0 is off")
    overlong_buffer: int = Field(0, ge=0, le=100_000, description="tokens before train.max_tokens; 0 is off")
    overlong_penalty: float = Field(1.0, ge=0, description="reward units, at train.max_tokens")
    resample_rounds: int = Field(0, ge=0, le=1000, description="draws for groups of equal rewards; 0 is off")
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = Field(gt=0, le=1000, description="learning rate")
    lr_base_width: int = Field(0, ge=0, le=1_000_000, description="hidden size that lr is for; 0 = every size")
    adam_eps: float = Field(1e-8, gt=0, le=1)
    warmup_steps: int = Field(5, ge=0, le=1_000_000, description="steps of linear warm-up")
    lr_decay: Literal["none", "linear", "cosine"] = "none"
    max_grad_norm: float = Field(1.0, ge=0, description="0 is off")
    precision: Literal["float32", "bfloat16"]  # as length_limit

    @property
    def sampling_params(self) -> SamplingParams:
        """The distribution that completions are drawn from."""
        return SamplingParams(self.temperature, self.top_k, self.top_p)

    @property
    def loss_params(self) -> SamplingParams:
        """The distribution that the loss scores: the full softmax, or the one that was sampled."""
        return self.sampling_params if self.loss_distribution == "sampler" else SamplingParams(self.temperature)

    @model_validator(mode="after")
    def consistent(self) -> "Recipe":
        if self.alignment == "shifted" and self.loss_distribution == "sampler":
            raise ValueError(
                "loss_distribution: sampler needs alignment: correct; the sampler never drew the shifted tokens"
            )
        if self.importance == "none" and (self.epochs > 1 or self.clip_range > 0):
            key, value = ("epochs", self.epochs) if self.epochs > 1 else ("clip_range", self.clip_range)
            raise ValueError(f"{key} = {value} needs importance: token or sequence, the ratio that it weighs or clips")
        if self.clip_range_high > 0 and self.clip_range == 0:
            raise ValueError(f"clip_range_high = {self.clip_range_high} needs clip_range, the limit below 1")
        if self.overlong_buffer and self.length_limit == "total":
            raise ValueError("overlong_buffer needs length_limit: completion, one limit for all completions")
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
    arithmetic: Literal["portable", "native"]
    on_nonfinite: Literal["stop", "skip"]
    on_collapse: Literal["continue", "stop"]
    lora_rank: int = Field(ge=0, le=100_000, description="0 trains all weights")
    lora_alpha: float = Field(gt=0, le=1e6, description="adapters count alpha / rank")
    gradient_checkpointing: bool
    keep_samples: Literal["some", "all"] = "some"

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
    every: int = Field(0, ge=0, le=10_000_000, description="steps; 0 is off")
    curve_prompts: int = Field(100, ge=2, le=10_000_000, description="prompts, one half of which chooses data/best")
    independent: str = Field("reference", description="reference, none, or the name of a reward")

    @model_validator(mode="after")
    def prompts_of_the_curve(self) -> "Evaluate":
        if self.every and 0 < self.prompts < self.curve_prompts:
            raise ValueError(f"curve_prompts {self.curve_prompts} exceeds prompts {self.prompts}, of which it is")
        return self


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
    classifiers: dict[Key, Classifier] = {}

    @model_validator(mode="after")
    def reward_names(self) -> "Params":
        for name in ("text", LIKELIHOOD):
            if name in self.rewards:
                raise ValueError(f"rewards: {name!r} is taken: reports/evaluate/metrics.json has a key of that name")
        for name in NO_REWARD:
            if name in self.rewards:
                raise ValueError(f"rewards: {name!r} is taken: evaluate.independent has a value of that name")
        return self

    @model_validator(mode="after")
    def buffer_within_completions(self) -> "Params":
        if self.recipe in self.recipes and (buffer := self.selected_recipe.overlong_buffer) > self.train.max_tokens:
            raise ValueError(
                f"recipes.{self.recipe}.overlong_buffer {buffer} exceeds train.max_tokens {self.train.max_tokens}"
            )
        return self

    @model_validator(mode="after")
    def independent_reward(self) -> "Params":
        name = self.evaluate.independent
        if name not in (*self.rewards, *NO_REWARD):
            known = ", ".join((*NO_REWARD, *self.rewards))
            raise ValueError(f"evaluate.independent: there is no reward {name!r}; should be one of {known}")
        if name == self.reward:
            raise ValueError(f"evaluate.independent: {name!r} is the trained reward; an independent one is another")
        return self

    @model_validator(mode="after")
    def scored_baseline(self) -> "Params":
        reward, recipe = self.rewards.get(self.reward), self.recipes.get(self.recipe)
        if isinstance(reward, SumReward) and reward.combine == "normalized" and recipe and recipe.baseline == "greedy":
            raise ValueError(
                f"recipes.{self.recipe}.baseline = greedy cannot go with rewards.{self.reward}.combine = normalized, "
                "which compares a prompt's samples with each other alone; choose rloo"
            )
        return self

    @property
    def selected_model(self) -> Model:
        return self.models[self.model]

    @property
    def selected_prompt_set(self) -> PromptSet:
        return self.prompt_sets[self.prompts]

    @property
    def selected_reward(self) -> Reward:
        return self.rewards[self.reward]

    @property
    def selected_encoder(self) -> Encoder:
        return self.encoders[self.encoder]

    @property
    def selected_recipe(self) -> Recipe:
        return self.recipes[self.recipe]

    @property
    def asked_rewards(self) -> list[str]:
        """The rewards that params.yaml asks for: the selected one, and the independent one if that is a reward."""
        return [name for name in (self.reward, self.evaluate.independent) if name in self.rewards]

    @property
    def selected_classifiers(self) -> dict[str, Classifier]:
        """The classifiers that the selected reward uses, by name."""
        return self._classifiers_of(self.reward)

    @property
    def independent_classifiers(self) -> dict[str, Classifier]:
        """The classifiers that the independent reward uses and the selected one does not."""
        asked = self._classifiers_of(self.evaluate.independent)
        return {name: table for name, table in asked.items() if name not in self.selected_classifiers}

    def _classifiers_of(self, reward: str) -> dict[str, Classifier]:
        needed = classifier_rewards(self.rewards[reward]) if reward in self.rewards else []
        return {name: self.classifiers[name] for name in sorted({each.classifier for each in needed})}

    def selected(self, selector: str) -> Table:
        """The table that a selector names, for code that goes over all of them."""
        return getattr(self, SELECTORS[selector])[getattr(self, selector)]


def _exactly_one(table: Table, *names: str) -> None:
    if sum(getattr(table, name) is not None for name in names) != 1:
        raise ValueError(f"needs exactly one of {', '.join(names)}")


def _goes_with_repo(table: Table, *names: str) -> None:
    """Raises ValueError if a key for repositories stands beside another origin: nothing would read it."""
    origin = next(name for name in ("repo", "source", "package") if getattr(table, name, None) is not None)
    for name in names:
        if origin != "repo" and getattr(table, name) is not None:
            raise ValueError(f"{name} belongs to repo and does nothing beside {origin}: leave it out")
