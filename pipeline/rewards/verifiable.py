"""Rewards that check a completion: against the answer that its prompt's row holds, or against a form."""

import unicodedata
from decimal import Decimal
from typing import Any

import regex

from pipeline.config.schema import FormatReward, MatchReward
from pipeline.data.prompts import Prompt
from pipeline.errors import UserError
from pipeline.rewards.batch import RewardBatch, TermReward

PATIENCE = 10.0  # seconds for a pattern on one text: some take for ever
# a whole row of digits and commas; $1,200.50, -3.5, -$5, .5, 2e3; the sign of a difference, as in 5-3, is none
NUMBER = regex.compile(
    r"(?:(?<![\p{Latin}\p{N}_)\]])[-+])?[$€£¥]?(?:(?<![0-9,])[0-9][0-9,]*(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
)


def match_reward(name: str, table: MatchReward) -> TermReward:
    """R(y) = 1 where the answer in y is an answer in the column of its prompt's row, else 0; also where y has none.

    `name` is used in messages. The reward raises UserError for a row whose column holds no answer.
    """

    def reward(batch: RewardBatch) -> list[float]:
        pairs = zip(batch.prompts, batch.completions, strict=True)
        return [float(answer_of(name, table, text) in row_answers(name, table, prompt)) for prompt, text in pairs]

    return reward


def format_reward(name: str, table: FormatReward) -> TermReward:
    """R(y) = 1 where the pattern matches the whole of y, else 0."""

    def reward(batch: RewardBatch) -> list[float]:
        return [float(whole(name, table.pattern, completion)) for completion in batch.completions]

    return reward


def answer_of(name: str, table: MatchReward, text: str) -> str | Decimal | None:
    """The answer in a completion, in a form that compares; None where there is none.

    With a pattern, of what its group holds where it matches last; else of the whole text.
    """
    return normalized(table, found) if (found := last_group(name, table.pattern, text)) is not None else None


def row_answers(name: str, table: MatchReward, prompt: Prompt) -> list[str | Decimal]:
    """The right answers: that of the column, or those of the list that it holds.

    Raises UserError for a row without the column, and for a column without an answer.
    """
    where = f"reward {name}: column {table.column!r} of the prompt {prompt.text[:60]!r}"
    if table.column not in prompt.columns:
        raise UserError(f"{where} is missing")
    value = prompt.columns[table.column]
    answers = []
    for one in value if isinstance(value, list) else [value]:
        answers.append(_row_answer(name, table, one))
        if answers[-1] is None:
            kind = {"text": "text", "number": "a number", "choice": f"one of {', '.join(table.choices)}"}
            behind = " where column_pattern finds it" if table.column_pattern else ""
            raise UserError(f"{where} holds {str(one)[:60]!r}: should hold {kind[table.compare]}{behind}")
    if not answers:
        raise UserError(f"{where} is an empty list: no answer would be right")
    return [answer for answer in answers if answer is not None]


def _row_answer(name: str, table: MatchReward, value: Any) -> str | Decimal | None:
    if value is None or isinstance(value, dict | list):
        return None
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    if table.compare == "choice" and text.isdecimal() and not any(map(str.isdecimal, table.choices)):
        return table.choices[int(text)] if int(text) < len(table.choices) else None  # a place, the first is 0
    found = last_group(name, table.column_pattern, text)
    return normalized(table, found) if found is not None else None


def normalized(table: MatchReward, text: str) -> str | Decimal | None:
    """What is compared; None where the text holds no answer.

    Of all in Unicode's NFKC. text: white space as single spaces and none at the ends, without case if `ignore_case`.
    number: the last one in the text, without commas and a currency's sign; 1200.0 and 1,200 are equal. choice: the last
    letter of `choices` with no Latin letter or digit beside it, as in "(B)" or "B.".
    """
    plain = " ".join(unicodedata.normalize("NFKC", text).split())
    match table.compare:
        case "text":
            return (plain.casefold() if table.ignore_case else plain) or None
        case "number":
            found = NUMBER.findall(plain.replace("\N{MINUS SIGN}", "-"))
            return Decimal(regex.sub("[,$€£¥]", "", found[-1])) if found else None
        case "choice":
            letters = regex.findall(rf"(?<![\p{{Latin}}\p{{N}}_'’])[{table.choices}](?![\p{{Latin}}\p{{N}}_'’])", plain)
            return letters[-1] if letters else None


def last_group(name: str, pattern: str | None, text: str) -> str | None:
    """What the group of the pattern holds where it matches last; the whole text without a pattern; None where it does
    not match."""
    if pattern is None:
        return text
    found = None
    try:
        for match in regex.finditer(pattern, text, timeout=PATIENCE):
            found = match.group(1)
    except TimeoutError:
        raise _slow(name, pattern, text) from None
    return found


def whole(name: str, pattern: str, text: str) -> bool:
    try:
        return regex.fullmatch(pattern, text, timeout=PATIENCE) is not None
    except TimeoutError:
        raise _slow(name, pattern, text) from None


def _slow(name: str, pattern: str, text: str) -> UserError:
    return UserError(
        f"reward {name}: the pattern {pattern[:60]!r} takes more than {PATIENCE:g} s on the text {text[:60]!r}: "
        "nested repetitions do; write it without"
    )
