"""HTML elements as values. A plain string is always escaped, so that text of a model or a file stays text."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


class Html(str):
    """Text that is HTML already. Only this module and the charts make it."""

    __slots__ = ()


def el(tag: str, *children: str, **attributes: object) -> Html:
    """An element. Children that are not Html are escaped, empty attributes left out; `cls` is the class."""
    written = "".join(
        f' {"class" if name == "cls" else name.replace("_", "-")}="{escape(str(value))}"'
        for name, value in attributes.items()
        if value not in ("", None)
    )
    return Html(f"<{tag}{written}>{join(children)}</{tag}>")


def join(parts: Iterable[str]) -> Html:
    """Parts one after the other, those that are not Html escaped."""
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in parts))


def table(rows: Iterable[Iterable[str]], head: Iterable[str] = ()) -> Html:
    """A table; a cell that is not an element itself becomes a <td>."""
    heads = [el("th", cell) for cell in head]
    first = [el("tr", *heads)] if heads else []
    body = [
        el(
            "tr",
            *(cell if isinstance(cell, Html) and cell.startswith("<td") else el("td", cell) for cell in row),
        )
        for row in rows
    ]
    return el("table", *first, *body)


def fold(title: str, aside: str, content: Html) -> Html:
    """A part that opens on a click."""
    return el("details", el("summary", title, el("small", aside)), el("div", content))


def section(title: str, parts: Iterable[Html], cls: str = "") -> Html:
    """A heading and its parts; nothing when there are none."""
    inside = join(parts)
    if not inside:
        return Html()
    return join([el("h2", title), el("div", inside, cls=cls) if cls else inside])


def swatch(number: int) -> Html:
    """The color of run `number`."""
    return el("span", cls="swatch", style=color(number))


def color(number: int) -> str:
    """The style that gives color 0 to 7 to an element; more begin again."""
    return f"--c:var(--c{number % 8})"
