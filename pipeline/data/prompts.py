"""The prompts of a run, as `prepare` writes them and the other stages read them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.file_io import read_jsonl

Message = Mapping[str, str]  # role and content


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the other columns of its row."""

    text: str  # a conversation as it is shown, one message per line
    messages: tuple[Message, ...] | None = None  # those of a conversation, up to where the answer begins
    columns: Mapping[str, Any] = field(default_factory=dict)  # for rewards, JSON values by name

    @property
    def content(self) -> str | list[Message]:
        """What a model reads, and what a reward is given: the text, or the messages of a conversation."""
        return self.text if self.messages is None else list(self.messages)


def read_prompts(source: Path) -> list[Prompt]:
    """The prompts of a file that `prepare` wrote."""
    return [
        Prompt(row["prompt"], tuple(row["messages"]) if "messages" in row else None, row.get("columns", {}))
        for row in read_jsonl(source)
    ]


def conversation_text(messages: Sequence[Message]) -> str:
    """A conversation as it is shown; if it is a single message of the user, only the content."""
    if [message["role"] for message in messages] == ["user"]:
        return messages[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
