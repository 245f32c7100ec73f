"""Words from users and models, made inert where they are shown: they say what they say and do nothing.

A description, a prompt, a model's name or what a model writes may hold a link, an image that calls home, a table's bar,
a terminal's control sequence. The HTML page escapes by itself (Jinja's autoescape); here are the two other places.
"""

from __future__ import annotations

import re

_MARKDOWN = re.compile(r"([\\`\[\]|!*_~#])")


def markdown(text: object) -> str:
    """Text for Markdown, in one line: no HTML, links, images, code or table cells come of it.

    Plain words and numbers stay as they are: a mark between letters (`int4_g64`, `C#`) does nothing in Markdown.
    """
    line = " ".join(plain(str(text)).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(lambda found: _marked(found, line), line)


def _marked(found: re.Match[str], line: str) -> str:
    mark = found[0]
    inside = found.start() > 0 and found.end() < len(line)
    between = inside and line[found.start() - 1].isalnum() and line[found.end()].isalnum()
    harmless = mark in "_#!*~" and (between or (mark == "!" and line[found.end() : found.end() + 1] != "["))
    return mark if harmless else f"\\{mark}"


def plain(text: str) -> str:
    """Text for a terminal: control characters (escape sequences) become spaces; line breaks stay."""
    return "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in text)


def masked(uri: str) -> str:
    """The URI without a password."""
    scheme, separator, rest = uri.partition("://")
    credentials, at, host = rest.rpartition("@")
    return f"{scheme}{separator}***@{host}" if at and credentials else uri
