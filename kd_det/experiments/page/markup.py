"""HTML from Python values: everything that is not made here is escaped."""

import html
from collections.abc import Iterable, Sequence
from typing import Any

_EMPTY = ("img", "meta")


class Html(str):
    """Text that is HTML already."""


def text(value: Any) -> Html:
    """Return a value as HTML text; what is HTML already stays."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def join(parts: Iterable[Any], between: str = "") -> Html:
    """Return parts one after the other."""
    return Html(between.join(text(part) for part in parts))


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """
    Return an element.

    Args:
        name: of the element.
        children: texts, which are escaped, and elements.
        attributes: by name, with a trailing underscore where Python has a word of its own
            (`class_`); True for one without a value, None or False for none.
    """
    words = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(key)
        elif value is not None and value is not False:
            words.append(f'{key}="{html.escape(str(value))}"')
    opening = f"<{' '.join(words)}>"
    return Html(opening) if name in _EMPTY else Html(f"{opening}{join(children)}</{name}>")


def table(headers: Sequence[Any], rows: Iterable[Sequence[Any]], *, words: int = 1) -> Html:
    """
    Return a table in a box of its own that scrolls where the page is too narrow.

    Args:
        headers: of the columns.
        rows: cells.
        words: how many columns from the left hold words; the others hold numbers.
    """

    def line(kind: str, cells: Sequence[Any]) -> Html:
        return tag(
            "tr",
            *(tag(kind, cell, class_="n" if i >= words else None) for i, cell in enumerate(cells)),
        )

    body = [line("td", row) for row in rows]
    whole = tag("table", tag("thead", line("th", headers)), tag("tbody", *body))
    return tag("div", whole, class_="scroll", tabindex="0")


def section(name: str, title: str, *children: Any) -> Html:
    """Return a section with a heading that can be linked to."""
    return tag("section", tag("h2", title), *children, id=name)


def paragraph(*children: Any, class_: str | None = None) -> Html:
    """Return a paragraph."""
    return tag("p", *children, class_=class_)
