"""Pieces of HTML: everything that a run brings along is escaped here."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple


class Cell(NamedTuple):
    """A cell of a table.

    Attributes:
        html: what it shows.
        value: by which it is sorted; an empty text for none, which stays below.
        kind: "", "num" for numbers, or another class.
    """

    html: str
    value: str = ""
    kind: str = ""


class Head(NamedTuple):
    """A column's title, the class of its cells, and a line below the title."""

    title: str
    kind: str = ""
    below: str = ""


def _head(head: Head) -> str:
    below = f"<small>{escape(head.below)}</small>" if head.below else ""
    return f'<th scope="col" class="{head.kind}"><button type="button">{escape(head.title)}</button>{below}</th>'


def text_cell(text: str, kind: str = "") -> Cell:
    return Cell(escape(text), text, kind)


def number_cell(html: str, value: float | None, kind: str = "num") -> Cell:
    return Cell(html, "" if value is None else repr(value), kind)


def table(name: str, caption: str, heads: Sequence[Head], rows: Sequence[Sequence[Cell]]) -> str:
    """A table that sorts by a click on a head; the first cell of a row names it.

    Args:
        heads: of the columns.
    """
    head = "".join(map(_head, heads))
    body = []
    for row in rows:
        first = f'<th scope="row" data-value="{escape(row[0].value)}">{row[0].html}</th>'
        rest = "".join(
            f'<td class="{cell.kind}" data-value="{escape(cell.value)}">{cell.html}</td>' for cell in row[1:]
        )
        body.append(f"<tr>{first}{rest}</tr>")
    return (
        f'<div class="table" tabindex="0" role="group" aria-label="{escape(name)}"><table class="sorts" id="{name}">'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def pairs(items: Sequence[tuple[str, str]]) -> str:
    """Names and values as a list of definitions."""
    return f'<dl class="pairs">{"".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in items)}</dl>'


def notes(sentences: Sequence[str]) -> str:
    """A list that a reader must not miss; nothing when there is none."""
    if not sentences:
        return ""
    return f'<div class="notes"><ul>{"".join(f"<li>{escape(s)}</li>" for s in sentences)}</ul></div>'


def section(name: str, title: str, *content: str) -> str:
    head = f'<h2 id="{name}-title">{escape(title)}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-title">{head}{"".join(content)}</section>'


def fold(title: str, content: str) -> str:
    """Content that is seen when it is asked for."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"
