"""A page of HTML from nested calls: every text is escaped, and nothing in a page is fetched or run."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TypeAlias

_VOID = {"img", "meta", "wbr"}  # elements without content

# A browser refuses whatever a page would fetch or run beside its own text, style and embedded pictures.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Markup(str):
    """Text that is HTML already; all other text is escaped where it enters a page."""


Child: TypeAlias = "str | Iterable[Child] | None"


def tag(name: str, *children: Child, **attributes: str | float | bool | None) -> Markup:
    """Make an element, of HTML or SVG.

    Args:
        name: Of the element.
        *children: Text, elements, None for nothing, or any nesting of these.
        **attributes: Their names with `_` for `-`; a last `_` is dropped (`class_`). None and False leave an attribute
            out, and True gives it no value.
    """
    words = [name]
    for key, value in attributes.items():
        attribute = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(attribute)
        elif value is not None and value is not False:
            words.append(f'{attribute}="{escape(str(value))}"')
    opening = f"<{' '.join(words)}>"
    return Markup(opening if name in _VOID else f"{opening}{join(children)}</{name}>")


def join(child: Child) -> Markup:
    """Put children together, escaping what is not HTML yet."""
    if child is None:
        return Markup()
    if isinstance(child, str):
        return child if isinstance(child, Markup) else Markup(escape(child))
    return Markup("".join(map(join, child)))


@dataclass(frozen=True)
class Section:
    """A part of a page, with its place in the table of contents.

    Attributes:
        title: Its heading.
        content: What stands below.
    """

    title: str
    content: Child

    @property
    def anchor(self) -> str:
        """Its id: the title's letters and digits."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.title.lower()).split())


def figure(content: Child, caption: Child, *, class_: str | None = None) -> Markup:
    """Something to look at, with the words that say what it is."""
    return tag("figure", content, tag("figcaption", caption), class_=class_)


def data_table(label: str, headings: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> Markup:
    """A table whose first column names the rows.

    Args:
        label: What it shows, for those who do not see it.
        headings: One a column.
        rows: Cells.
        words: How many of the first columns are aligned as words are; the others are as numbers.
    """
    head = tag(
        "tr",
        (
            tag("th", heading, scope="col", class_="word" if column < words else None)
            for column, heading in enumerate(headings)
        ),
    )
    body = (
        tag(
            "tr",
            tag("th", first, scope="row"),
            (tag("td", cell, class_="word" if column < words else None) for column, cell in enumerate(cells, start=1)),
        )
        for first, *cells in rows
    )
    table = tag("table", tag("thead", head), tag("tbody", body))
    return scrolling(label, table)


def scrolling(label: str, content: Child) -> Markup:
    """What may be wider than a phone: it scrolls in a box of its own, by the keyboard too."""
    return tag("div", content, class_="scroll", role="region", aria_label=label, tabindex=0)


def facts(pairs: Iterable[tuple[str, object]]) -> Markup:
    """A list of names and values of plain data."""
    items = ((tag("dt", name), tag("dd", _shown(value))) for name, value in pairs)
    return tag("dl", (tag("div", item) for item in items), class_="facts")


def _shown(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    return str(value)


def page(title: str, lead: Child, sections: Sequence[Section]) -> str:
    """A whole document in one file, which needs neither a network nor scripts.

    Args:
        title: Its first heading.
        lead: What stands between that and the table of contents.
        sections: In order.
    """
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    head = (
        tag("meta", charset="utf-8"),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", title),
        tag("style", Markup(style)),
    )
    links = (tag("li", tag("a", section.title, href=f"#{section.anchor}")) for section in sections)
    body = (
        tag("header", tag("h1", _breakable(title)), lead),
        tag("nav", tag("ol", links), aria_label="Contents"),
        tag(
            "main",
            (tag("section", tag("h2", section.title), section.content, id=section.anchor) for section in sections),
        ),
    )
    return f"<!doctype html>\n{tag('html', tag('head', head), tag('body', body), lang='en')}\n"


def _breakable(name: str) -> list[Child]:
    """A name that a narrow page may break after its dots."""
    first, *others = name.split(".")
    return [first, *((".", tag("wbr"), other) for other in others)]
