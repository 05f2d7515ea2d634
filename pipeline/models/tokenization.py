"""Texts as tokens: prompts, and that a text always has the same ones."""

from transformers import PreTrainedTokenizerBase

from pipeline.errors import UserError


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a text that is to be continued: with what the tokenizer puts before a text, without what it appends.

    Many tokenizers are saved so that every text ends with EOS or [SEP]; a completion would then start behind an end.
    What the text itself gives is kept, at its end too: an end that is written out, whichever of a model's, or a
    character that the tokenizer does not know, where its unknown token is its EOS.

    Raises UserError for a text that has no token, and where the tokenizer changes a text's tokens at its ends.
    """
    whole = tokenizer(prompt, return_special_tokens_mask=True)
    ids: list[int] = whole["input_ids"]
    text = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not text:
        raise UserError(f"prompt {shown(prompt)}: the tokenizer gives it no token")
    before = whole["special_tokens_mask"].index(0)  # tokens that are put before; the text may begin with the same
    if ids[before : before + len(text)] != text:
        raise UserError(f"prompt {shown(prompt)}: the tokenizer gives it other tokens without its special ones")
    return ids[: before + len(text)]


def check_vocabulary(prompt: str, ids: list[int], size: int) -> None:
    """Raises UserError where a prompt has ids that a model with a vocabulary of this size lacks, as a picture's."""
    if max(ids) >= size:
        raise UserError(
            f"prompt {shown(prompt)}: the tokenizer gives it the id {max(ids)}, the model has a vocabulary of {size}"
        )


def end_dropout(tokenizer: PreTrainedTokenizerBase) -> None:
    """Ends BPE dropout, which leaves out merges at random (Provilkov et al., arXiv 1910.13267), in place: it is for
    models in training on texts. What is saved is without it too."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if model is not None and getattr(model, "dropout", None):
        model.dropout = None


def check_certain(tokenizer: PreTrainedTokenizerBase, prompts: list[str], key: str) -> None:
    """Raises UserError, naming the model by its key, where a tokenizer draws at random how it splits a text (subword
    regularization): a prompt would be another one each time."""
    for prompt in prompts:
        if tokenizer(prompt)["input_ids"] != tokenizer(prompt)["input_ids"]:
            raise UserError(
                f"{key}: the tokenizer gives a text other tokens each time, such as {shown(prompt)}: it samples them"
            )


def shown(prompt: str) -> str:
    text = ascii(prompt) if not prompt.strip() else repr(prompt)
    return text if len(text) <= 60 else f"{text[:57]}..."
