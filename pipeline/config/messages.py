"""The wording of errors in params.yaml: one line that names the key and what would be right."""

from typing import Any

from pydantic import ValidationError

from pipeline.config.schema import (
    REWARD_KINDS,
    SELECTORS,
    Classifier,
    CustomReward,
    Encoder,
    Evaluate,
    Model,
    Params,
    PromptSet,
    Recipe,
    Table,
    Term,
    Train,
)
from pipeline.errors import did_you_mean

# keys of earlier versions
RENAMED = {"draw": "prompt_sampling", "rescored_share": "kl_probe_fraction", "scoring": "loss_distribution"}


def suggest(wrong: Any, known: Any) -> str:
    """`; did you mean x?` if a key is similar, else the list of keys."""
    return did_you_mean(str(wrong), map(str, known)) or f" (there are: {', '.join(map(str, known)) or 'none'})"


def explain(failure: ValidationError, tree: dict[str, Any]) -> str:
    """Describe one error. An unknown key comes first, since it often explains a missing one."""
    errors = sorted(failure.errors(), key=lambda error: error["type"] != "extra_forbidden")
    error = errors[0]
    kind, context = error["type"], error.get("ctx", {})
    path, model = _locate(error["loc"])
    where, value = ".".join(map(str, path)), _at(tree, path)
    if kind == "extra_forbidden" and path[-1] in RENAMED:
        return f"unknown key {where}: it is called {RENAMED[str(path[-1])]} now"
    if kind == "extra_forbidden":
        return f"unknown key {where}{suggest(path[-1], model.model_fields if model else {})}"
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
    """What would be right, in plain words instead of pydantic's."""
    if kind == "string_type" and isinstance(value, int | float):
        return "should be text: put it in quotes"
    if kind in ("dict_type", "model_type", "model_attributes_type"):
        return "should be a table of keys"
    message = message.removeprefix("Input ").replace("Tuple should", "should").replace(" after validation", "")
    return message[:1].lower() + message[1:].replace("tuple", "list")


def _locate(loc: tuple[int | str, ...]) -> tuple[list[int | str], type[Table] | None]:
    """The path of a key in the file, without pydantic's tags of unions, and the table that holds it."""
    sections: dict[str, type[Table]] = {"train": Train, "evaluate": Evaluate}
    tables: dict[str, type[Table]] = {
        "models": Model, "prompt_sets": PromptSet, "encoders": Encoder, "recipes": Recipe,
        "classifiers": Classifier,
    }  # fmt: skip
    head = str(loc[0]) if loc else ""
    path = [part for part in loc if part != "[key]"]
    if head in sections:
        return path, sections[head]
    if head in tables:
        if "chat_template_options" in path[2:]:
            path = path[: path.index("chat_template_options", 2) + 2]  # below it pydantic's path also holds types
        return path, tables[head] if len(path) > 2 else None
    if head == "rewards" and len(path) > 2:
        model: type[Table] | None = REWARD_KINDS.get(str(path[2]))
        path = path[:2] + path[3:]
        if path[2:3] == ["terms"] and len(path) > 4:
            model = Term
            if path[4] == "reward" and len(path) > 5:
                model = REWARD_KINDS.get(str(path[5]))
                path = path[:5] + path[6:]
        if model is CustomReward and "params" in path[2:]:
            path = path[: path.index("params", 2) + 2]  # below it pydantic's path also holds types
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
