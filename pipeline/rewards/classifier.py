"""The classifier reward: what a sequence-classification model says of a completion, or of its prompt and it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config.schema import ClassifierReward
from pipeline.data.prompts import Prompt
from pipeline.errors import UserError, did_you_mean
from pipeline.file_io import read_json
from pipeline.models.tokenization import check_certain
from pipeline.paths import CLASSIFIERS
from pipeline.rewards.batch import RewardBatch, TermReward
from pipeline.rewards.sequence_classifier import SequenceClassifier

# by so much a score may change with the texts beside it, of its own size or of 1, whichever is larger
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
LONG = 1024  # tokens: a model that reads no more is tried with as many
COMPLETIONS = ("Yes.", "", "I would say that it depends on what you mean; tell me more, and I will try again.")


@dataclass
class Cuts:
    """How many inputs classifiers have read, and how many of them were cut."""

    inputs: int = 0
    cut: int = 0

    def note(self, reward: str) -> str:
        return f"note: reward {reward}: {self.cut} of {self.inputs} inputs were too long for its classifier, and cut"


def classifier_reward(name: str, table: ClassifierReward, folder: Path, device: torch.device, cuts: Cuts) -> TermReward:
    """R(x, y) = the logit of a label, or its probability: the softmax over the labels, the sigmoid of its own logit
    where they do not exclude each other (problem_type multi_label_classification) or there is one. Of a model with one
    output, as reward models have, that.

    As transformers' pipeline for text classification. y is read alone, or x with it (`input`): in the model's chat
    template where its tokenizer has one, else as a pair of texts. What is longer than the model reads, or than
    max_tokens, is cut and counted in `cuts`: see `SequenceClassifier.rows`.

    folder: of the model and its tokenizer. `name` is used in messages. Raises UserError for a label that the model has
    not; the reward does for a prompt that the chat template refuses.
    """
    classifier = _load(name, table, folder, device)
    place = label_place(name, table, classifier.config)

    def reward(batch: RewardBatch) -> list[float]:
        pairs = zip(batch.prompts, batch.completions, strict=True)
        inputs = [classifier.input_of(prompt, completion) for prompt, completion in pairs]
        rows, cut = classifier.rows(inputs)
        cuts.inputs += len(inputs)
        cuts.cut += cut.count(True)
        values: list[float] = scores(classifier.logits(rows), place, table.score, classifier.config).tolist()
        return values

    return reward


def scores(logits: Tensor, place: int, score: str, config: Any) -> Tensor:
    """[N, labels] -> [N] in float64: of the label at `place`, its logit or its probability."""
    logits = logits.double()
    if score == "logit":
        return logits[:, place]
    alone = logits.shape[1] == 1 or config.problem_type == "multi_label_classification"
    return (logits.sigmoid() if alone else logits.softmax(1))[:, place]


def label_place(name: str, table: ClassifierReward, config: Any) -> int:
    """Which of the model's outputs the reward is. Raises UserError for a label that is not one of the model's, or
    missing, or given where there is one output."""
    where, model = f"reward {name}", f"classifiers.{table.classifier}"
    labels = [str(config.id2label.get(place, f"LABEL_{place}")) for place in range(config.num_labels)]
    if len(labels) == 1:
        if table.label is not None:
            raise UserError(f"{where}: {model} has one output, which has no label; leave label out")
        if table.score == "probability" and config.problem_type == "regression":
            raise UserError(f"{where}: {model} is a regression, whose output is no probability; take score: logit")
        return 0
    known = f"its labels are {', '.join(labels)}"
    if table.label is None:
        raise UserError(f"{where}: label is missing: {model} has {len(labels)} outputs; {known}")
    if labels.count(table.label) != 1:
        number = "several labels" if table.label in labels else "no label"
        hint = "" if table.label in labels else did_you_mean(table.label, labels)
        raise UserError(f"{where}: {model} has {number} {table.label!r}{hint}; {known}")
    return labels.index(table.label)


def stored_classifiers(*folders: Path) -> dict[str, Path]:
    """The folder of each classifier that `cache` stored in these, by name."""
    manifests = [folder / "manifest.json" for folder in folders]
    return {name: file.parent / name for file in manifests if file.is_file() for name in read_json(file)}


def folder_of(name: str, table: ClassifierReward, stored: Mapping[str, Path]) -> Path:
    """Raises UserError for a classifier that `cache` did not store."""
    if table.classifier not in stored:
        raise UserError(
            f"reward {name}: classifiers.{table.classifier} is not in {CLASSIFIERS}: `dvc repro cache` stores those of "
            "the selected and of the independent reward"
        )
    return stored[table.classifier]


def check_classifier_reward(
    name: str, table: ClassifierReward, folder: Path, device: torch.device, prompts: Sequence[Prompt]
) -> None:
    """Raises UserError where the model has no such label, cannot read these prompts, writes today's date into them, or
    says something else of a text where others stand beside it, or that is no finite number."""
    classifier, key = _load(name, table, folder, device), f"classifiers.{table.classifier}"
    place = label_place(name, table, classifier.config)
    inputs = [classifier.input_of(prompt, COMPLETIONS[0]) for prompt in prompts]
    probes = [classifier.input_of(prompt, text) for prompt in prompts[:2] for text in COMPLETIONS]
    if classifier.in_template and prompts:
        _check_dateless(classifier, prompts[0], str(inputs[0]))
    check_certain(classifier.tokenizer, [one if isinstance(one, str) else one[1] for one in probes], key)
    if classifier.room is not None and classifier.room <= LONG:
        probes += [classifier.input_of(prompt, "again and " * classifier.room) for prompt in prompts[:1]]
    try:
        rows, _ = classifier.rows(probes)
        together = scores(classifier.logits(rows), place, table.score, classifier.config)
        alone = scores(torch.cat([classifier.logits([row]) for row in rows]), place, table.score, classifier.config)
    except Exception as error:  # whatever a model makes torch or transformers raise: it cannot be used so
        raise UserError(f"{key}: cannot score texts: {type(error).__name__}: {str(error)[:200]}") from error
    for one, other in zip(together.tolist(), alone.tolist(), strict=True):
        if not abs(one) + abs(other) < float("inf"):
            raise UserError(f"{key}: its scores are not finite ({other})")
        if abs(one - other) > TOLERANCE[table.precision] * max(1.0, abs(other)):
            kind = classifier.config.model_type
            raise UserError(
                f"{key}: {kind} does not ignore padding: it gives a text {other:.6g} alone, {one:.6g} beside others"
            )


def _check_dateless(classifier: SequenceClassifier, prompt: Prompt, usual: str) -> None:
    try:
        same = classifier.conversation(prompt, COMPLETIONS[0], strftime_now=None) == usual
    except UserError:  # it called the clock
        same = False
    if not same:
        raise UserError(f"{classifier.key}: the chat template writes today's date: each day has other scores")


def _load(name: str, table: ClassifierReward, folder: Path, device: torch.device) -> SequenceClassifier:
    try:
        return SequenceClassifier(
            folder, f"classifiers.{table.classifier}", device, getattr(torch, table.precision),
            reads_prompts=table.input == "prompt_completion", max_tokens=table.max_tokens,
        )  # fmt: skip
    except UserError as error:
        raise UserError(f"reward {name}: {error}") from None
