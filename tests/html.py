"""What a page of HTML holds."""

import re
from html.parser import HTMLParser


class Elements(HTMLParser):
    """The elements of a page with their attributes, and what its script and style elements hold."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[str] = []  # of script and style, in the order of the page
        self.comments: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag in self.CDATA_CONTENT_ELEMENTS:
            self.raw.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem:
            self.raw[-1] += data

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)


def words_of(html: str) -> str:
    """What the page says, on one line. A link is a part of its sentence; every other element stands apart."""
    text = re.sub(r"</?a\b[^>]*>", "", html.split("<script")[0])
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text))
