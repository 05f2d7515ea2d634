"""Untrusted text for the page: nothing in it hides, reorders what stands around it, or is read as HTML."""

import unicodedata

from markupsafe import Markup

EMPTY = "(empty)"
MARKED = {"\n": "↵", "\t": "→"}  # shown by a mark, and kept


def parts(text: str, ends: bool = True) -> list[str]:
    """Cut the text into plain parts and marks in turn: the marks stand at the odd places.

    Line ends, tabs and, where `ends`, outer spaces are marked; control characters and what reorders or hides text
    (bidi controls, zero-width space) appear as their code point.
    """
    if not text:
        return ["", EMPTY]
    start = len(text) - len(text.lstrip(" ")) if ends else 0
    end = len(text) - len(text.rstrip(" ")) if ends and start < len(text) else 0
    body = text[start : len(text) - end]
    pairs = [("·" * start, ""), *map(_character, body), ("·" * end, "")]
    cut = [""]
    for mark, plain in pairs:
        if mark:
            cut += [mark, plain]
        else:
            cut[-1] += plain
    return cut


def visible(text: str) -> Markup:
    """The text as escaped HTML, with its marks."""
    if not text:
        return Markup('<span class="empty">{}</span>').format(EMPTY)
    shown = [_mark(part) if place % 2 else Markup.escape(part) for place, part in enumerate(parts(text))]
    return Markup("").join(shown)


def _character(character: str) -> tuple[str, str]:
    """(its mark, what stays of it)."""
    if character in MARKED:
        return MARKED[character], character
    joiner = character in "\u200c\u200d"  # part of ordinary words and emoji
    if not joiner and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return f"U+{ord(character):04X}", ""
    return "", character


def _mark(text: str) -> Markup:
    return Markup('<span class="mark">{}</span>').format(text)
