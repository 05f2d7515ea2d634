"""Token ids of prompts, plain or in a chat template, and checks that a text always has the same tokens."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.config.schema import ChatParams
from pipeline.errors import UserError, did_you_mean

PromptContent = str | Sequence[Mapping[str, str]]  # a text, or the messages of a conversation


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: PromptContent, chat: ChatParams | None) -> list[int]:
    """Token ids of a prompt as the model reads it: in the tokenizer's chat template, or as a text to continue if `chat`
    is None or the tokenizer has no template.

    Raises ChatTemplateError, also for a conversation without a template, and UserError, see `encode_chat` and
    `encode_text`.
    """
    if chat is not None and tokenizer.chat_template:
        return encode_chat(tokenizer, prompt, chat)
    if isinstance(prompt, str):
        return encode_text(tokenizer, prompt)
    way_out = "a tokenizer with a chat template" if chat else "chat_template: auto, and a tokenizer with a template"
    raise ChatTemplateError(f"prompt {shown(prompt)} is a conversation, which needs {way_out}")


class ChatTemplateError(UserError):
    """A chat template cannot be applied: the fault of the model's table, or of the prompt."""


def encode_chat(tokenizer: PreTrainedTokenizerBase, prompt: PromptContent, chat: ChatParams) -> list[int]:
    """Token ids of a prompt in the chat template, up to where the answer begins. The template itself writes BOS. The
    model's system message stands before a conversation that has none of its own.

    Raises ChatTemplateError where the template refuses the prompt.
    """
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(map(dict, prompt))
    system = [] if chat.system is None or has_system(prompt) else [{"role": "system", "content": chat.system}]
    messages = [*system, *asked]
    try:
        encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **chat.options)
    except Exception as error:  # a template is a program, and may raise anything
        raise ChatTemplateError(f"prompt {shown(prompt)}: the chat template refuses it: {error}") from None
    if not encoded["input_ids"]:
        raise ChatTemplateError(f"prompt {shown(prompt)}: the chat template gives it no token")
    return list(encoded["input_ids"])


def has_system(prompt: PromptContent) -> bool:
    """Whether a prompt is a conversation with a system message of its own."""
    return not isinstance(prompt, str) and prompt[0]["role"] == "system"


def check_chat(
    tokenizer: PreTrainedTokenizerBase, chat: ChatParams, prompts: Iterable[PromptContent], key: str
) -> None:
    """Raises UserError, naming the model by its key, where the chat template ignores what it is given, or gives a
    prompt other tokens on another day. It tries one prompt with a system message of its own and one without, since
    templates have a part for each."""
    template = tokenizer.chat_template
    if not template:
        if chat.system is not None or chat.options:
            name = "system" if chat.system is not None else "chat_template_options"
            raise UserError(f"{key}.{name} has no effect: the tokenizer has no chat template")
        return
    try:
        names = set(re.findall(r"[A-Za-z_]\w*", tokenizer.get_chat_template(tools=chat.options.get("tools"))))
        for name in chat.options:
            if name not in names:
                unknown = f"{key}.chat_template_options.{name}: the chat template has no such option"
                raise UserError(f"{unknown}{did_you_mean(name, sorted(names))}")
        kinds: dict[bool, PromptContent] = {}
        for prompt in prompts:
            kinds.setdefault(has_system(prompt), prompt)
        for own, prompt in kinds.items():
            ids = encode_chat(tokenizer, prompt, chat)
            given = chat.system is not None and not own
            if given and ids == encode_chat(tokenizer, prompt, replace(chat, system=None)):
                raise UserError(f"{key}.system has no effect: the chat template leaves the system message out")
    except (ChatTemplateError, ValueError) as error:  # ValueError: it has several templates, none of them the default
        raise UserError(f"{key}: {error}") from None
    try:
        for prompt in kinds.values():
            encode_chat(tokenizer, prompt, replace(chat, options={**chat.options, "strftime_now": None}))
    except ChatTemplateError:  # it called the clock
        dates = [name for name in sorted(names) if "date" in name.lower()]
        hint = f"; to fix it, set {key}.chat_template_options.{dates[0]}" if dates else ""
        raise UserError(f"{key}: the chat template writes today's date: each day has other prompts{hint}") from None


def unnamed_end_of_turn(tokenizer: PreTrainedTokenizerBase, chat: ChatParams, eos: tuple[int, ...]) -> str | None:
    """The special token that the chat template puts behind an answer, if it is not one of the ids `eos`; else None."""
    answer = "An answer."
    messages = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": answer}]
    try:
        after = str(tokenizer.apply_chat_template(messages, tokenize=False, **chat.options)).rpartition(answer)[2]
    except Exception:  # such as a template that requires a system message: then nothing is known
        return None
    ids = tokenizer(after.strip(), add_special_tokens=False)["input_ids"]
    token = tokenizer.convert_ids_to_tokens(ids[:1])[0] if ids else ""
    return token if token in tokenizer.get_added_vocab() and ids[0] not in eos else None


def encode_text(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a text to continue: with what the tokenizer puts before a text, without what it appends.

    Many tokenizers are saved so that every text ends with EOS or [SEP]; a completion would then start behind an end.
    The text's own tokens are kept, even an end-of-text token at its end. The text may spell out one of the model's, or
    end with a character that the tokenizer does not know, if the unknown token is the EOS.

    Raises UserError for a text that has no token, and where special tokens change the text's own tokens.
    """
    whole = tokenizer(prompt, return_special_tokens_mask=True)
    ids: list[int] = whole["input_ids"]
    text = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not text:
        raise UserError(f"prompt {shown(prompt)}: the tokenizer gives it no token")
    before = whole["special_tokens_mask"].index(0)  # number of tokens put before; the text may begin with the same ones
    if ids[before : before + len(text)] != text:
        raise UserError(f"prompt {shown(prompt)}: the tokenizer gives it other tokens without its special ones")
    return ids[: before + len(text)]


def check_vocabulary(prompt: PromptContent, ids: list[int], size: int) -> None:
    """Raises UserError where a prompt has ids that a model with a vocabulary of this size lacks, like a picture's."""
    if max(ids) >= size:
        raise UserError(
            f"prompt {shown(prompt)}: the tokenizer gives it the id {max(ids)}, the model has a vocabulary of {size}"
        )


def end_dropout(tokenizer: PreTrainedTokenizerBase) -> None:
    """Turns off BPE dropout in place. It leaves out merges at random (Provilkov et al., arXiv 1910.13267), and is meant
    for training on texts. The tokenizer is also saved without it."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if model is not None and getattr(model, "dropout", None):
        model.dropout = None


def check_certain(tokenizer: PreTrainedTokenizerBase, prompts: list[str], key: str) -> None:
    """Raises UserError, naming the model by its key, where a tokenizer draws at random how it splits a text (subword
    regularization): a prompt would have other tokens each time."""
    for prompt in prompts:
        if tokenizer(prompt)["input_ids"] != tokenizer(prompt)["input_ids"]:
            raise UserError(
                f"{key}: the tokenizer gives a text other tokens each time, such as {shown(prompt)}: it samples them"
            )


def shown(prompt: PromptContent) -> str:
    if not isinstance(prompt, str):
        prompt = " / ".join(message["content"] for message in prompt)
    text = ascii(prompt) if not prompt.strip() else repr(prompt)
    return text if len(text) <= 60 else f"{text[:57]}..."
