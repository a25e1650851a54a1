"""The parts that the report's page is made of. They hold text and figures; `page.html.j2` says how each looks."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from perf.charts.style import encoded
from perf.findings import Findings
from perf.records import in_a_line

HERE = Path(__file__).resolve().parent
# Folders in messages tell of a machine, not of a result.
FOLDERS = re.compile(r"(?<![\w.])(?<!:/)/(?:[\w.+@~-]+/)+")


@dataclass(frozen=True)
class Block:
    """A part of the page; the template has a macro by the name of its class."""

    @property
    def kind(self) -> str:
        return type(self).__name__.lower()


@dataclass(frozen=True)
class Paragraph(Block):
    text: str
    style: str = ""


@dataclass(frozen=True)
class Heading(Block):
    text: str


@dataclass(frozen=True)
class Bullets(Block):
    """A list; an item may have details of its own below it."""

    items: Sequence[tuple[str, Sequence[str]]]
    style: str = ""


@dataclass(frozen=True)
class Cell:
    """An entry of a table. `warn` marks that it falls short; `shade`, from 0 to 1, colours its ground."""

    text: str
    warn: bool = False
    shade: float | None = None


@dataclass(frozen=True)
class Table(Block):
    """The first `words` and the last `notes` columns are words, the rest figures."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    words: int = 1
    notes: int = 0

    def is_words(self, place: int) -> bool:
        return place < self.words or place >= len(self.head) - self.notes


@dataclass(frozen=True)
class Bar:
    """A bar of parts, each a length and a colour, and the text behind it."""

    parts: Sequence[tuple[float, str]]
    text: str

    @property
    def length(self) -> float:
        return sum(length for length, _ in self.parts)


@dataclass(frozen=True)
class Bars(Block):
    """Bars to one scale, a few for each row and column.

    Args:
        legend: names and colours.
        mark: where a dashed line stands, or None.
    """

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Sequence[Bar]]]]
    legend: Sequence[tuple[str, str]] = ()
    mark: float | None = 1.0

    @property
    def widest(self) -> float:
        return max([bar.length for _, cells in self.rows for cell in cells for bar in cell] + [self.mark or 0.0])


@dataclass(frozen=True)
class Card:
    """Figures with their labels that belong to one title, which links to a section."""

    title: str
    figures: Sequence[tuple[str, str]]
    note: str
    section: str


@dataclass(frozen=True)
class Cards(Block):
    cards: Sequence[Card]


@dataclass(frozen=True)
class Picture(Block):
    """An image, such as image/png, and its caption."""

    data: bytes
    type: str
    caption: str

    @property
    def link(self) -> str:
        return f"data:{self.type};base64,{b64encode(self.data).decode()}"


def picture(findings: Findings, name: str, draw: Callable[[], Figure], caption: str) -> list[Block]:
    """Returns a picture; one that can't be drawn is a problem that the page tells, not the end of it."""
    try:
        return [Picture(encoded(draw()), "image/webp", caption)]
    except Exception as error:
        findings.problems.append(f"the picture of {name} could not be drawn: {in_a_line(error)}")
        return []


@dataclass(frozen=True)
class Fold(Block):
    """Blocks behind a title that opens them."""

    title: str
    blocks: Sequence[Block]
    note: str = ""
    opened: bool = False


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]


def text_of(value: Any) -> str:
    """Returns a table's text for a value: one decimal place from 10, three below; nothing for None."""
    if isinstance(value, float):
        return f"{value:,.{1 if abs(value) >= 10 else 3}f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def table_of(rows: Sequence[Mapping[str, Any]], words: int, notes: int = 0) -> Table:
    """Returns a table whose columns are named by the first row; values are Cells, or else shown as text."""
    cells = [[v if isinstance(v, Cell) else Cell(text_of(v)) for v in row.values()] for row in rows]
    return Table(list(rows[0]) if rows else [], cells, words, notes)


def slug(name: str) -> str:
    return re.sub(r"\W+", "-", name.lower()).strip("-")


def _shown(value: Any) -> Any:
    """Returns a value as it is shown: text without folders."""
    return FOLDERS.sub("…/", value) if isinstance(value, str) and not isinstance(value, Markup) else value


def render(title: str, subtitle: str, summary: Sequence[Block], sections: Sequence[Section]) -> str:
    """Returns the page, which needs no other file. Sections without blocks are left out."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["slug"] = slug
    files = {name: Markup((HERE / f"page.{name}").read_text()) for name in ("css", "js")}
    shown = [section for section in sections if section.blocks]
    template = environment.get_template("page.html.j2")
    return template.render(title=title, subtitle=subtitle, summary=summary, sections=shown, **files)
