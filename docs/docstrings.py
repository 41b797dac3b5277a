"""The docstrings of the package, which are plain text, as Markdown for the reference of the site.

An argument, `name: what it is`, becomes an item of a list. Below it, a line that begins with a quoted value is an item
of its own, columns stay columns, and other lines are the rest of the sentence. An indented paragraph is code.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

FIELD = re.compile(r"(?P<names>[a-z]\w*(?:, (?:\.\.\.)?\w+)*): (?P<text>.*)")
COLUMNS = re.compile(r"\S {2,}\S")


def markdown(docstring: str) -> str:
    """The docstring, cleaned of its indentation, as Markdown."""
    return "\n\n".join(_paragraph(lines) for lines in _paragraphs(docstring))


def _paragraphs(text: str) -> list[list[str]]:
    return [block.splitlines() for block in re.split(r"\n\s*\n", text.strip("\n"))]


def _paragraph(lines: list[str]) -> str:
    if lines[0].startswith("    "):
        return "```text\n" + "\n".join(line.removeprefix("    ") for line in lines) + "\n```"
    parts: list[str] = []
    in_columns = in_value = False
    for line in lines:
        below, text = line.startswith("    "), line.strip()
        columns = below and bool(COLUMNS.search(text) or (in_columns and line.startswith(" " * 20)))
        if field := FIELD.fullmatch(line):
            parts.append(f"\n- **`{field['names']}`**: {field['text']}")
        elif columns:
            parts += [] if in_columns else ["\n    ```text"]
            parts.append(line)
        elif below and text.startswith('"'):
            parts.append(f"    - {text}")
        else:
            parts.append(f"{'        ' if in_value else '    '}{text}" if below else line)
        if in_columns and not columns:
            parts.insert(-1, "    ```\n")
        in_value = below and not columns and (in_value or text.startswith('"'))
        in_columns = columns
    return "\n".join([*parts, "    ```"] if in_columns else parts).strip("\n")


class PlainText(griffe.Extension):
    """Rewrites every docstring as it is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
