"""Prompts as tokens."""

from transformers import PreTrainedTokenizerBase

from pipeline.errors import UserError


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a text that is to be continued: with what the tokenizer puts before a text, without what it appends.

    Many tokenizers are saved so that every text ends with EOS or [SEP]; a completion would then start behind an end.
    Raises UserError for a text that has no token, and where the tokenizer changes a text's tokens at its ends.
    """
    whole = tokenizer(prompt)["input_ids"]
    text = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    places = [i for i in range(len(whole) - len(text) + 1) if whole[i : i + len(text)] == text]
    if not text:
        raise UserError(f"prompt {shown(prompt)}: the tokenizer gives it no token")
    if not places:
        raise UserError(f"prompt {shown(prompt)}: the tokenizer gives it other tokens without its special ones")
    ids = list(whole[: places[0] + len(text)])
    # a normalizer or a pre-tokenizer may append one too, as a part of the text
    while ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(str(tokenizer.eos_token)):
        ids.pop()
    if not ids:
        raise UserError(f"prompt {shown(prompt)}: the tokenizer gives it no token but an end")
    return ids


def shown(prompt: str) -> str:
    text = ascii(prompt) if not prompt.strip() else repr(prompt)
    return text if len(text) <= 60 else f"{text[:57]}..."
