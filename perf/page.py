"""HTML by hand: one page that needs nothing beside itself, and no script to be read."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

HERE = Path(__file__).resolve().parent
FILTERED = 40  # rows from which a table has a box to filter them
LONG = 48  # characters from which an entry is broken into lines
FOLDERS = re.compile(r"(?<![\w.])(?<!:/)/(?:[\w.+@~-]+/)+")
NOTHING_FROM_OUTSIDE = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def text(words: str) -> str:
    """Escaped, and without the folders of files that messages name: they tell of a machine, not of a result."""
    return escape(FOLDERS.sub("…/", words))


def styled(classes: str) -> str:
    """The attribute, where there are any."""
    return f' class="{classes}"' if classes else ""


@dataclass(frozen=True)
class Cell:
    """A table's entry; `warn` marks what falls short."""

    text: str
    warn: bool = False


Entry = str | Cell


@dataclass(frozen=True)
class Card:
    """A few figures, each with its label, that belong to one title."""

    title: str
    figures: Sequence[tuple[str, str]]
    note: str
    link: str = ""


def cards(items: Sequence[Card]) -> str:
    def card(item: Card) -> str:
        title = f'<a href="#{slug(item.link)}">{text(item.title)}</a>' if item.link else text(item.title)
        figures = "".join(f"<div><dt>{text(label)}</dt><dd>{text(big)}</dd></div>" for big, label in item.figures)
        return f'<div class="card"><h3>{title}</h3><dl>{figures}</dl><p>{text(item.note)}</p></div>'

    return f'<div class="cards">{"".join(map(card, items))}</div>' if items else ""


def table(head: Sequence[str], rows: Sequence[Sequence[Entry]], words: int = 1, notes: int = 0) -> str:
    """The first `words` and the last `notes` columns are words, the rest figures; short rows end in empty entries."""

    def cell(tag: str, place: int, entry: Entry) -> str:
        value = entry if isinstance(entry, Cell) else Cell(entry)
        is_words = place < words or place >= len(head) - notes
        named = {"text": is_words, "warn": value.warn, "long": is_words and len(value.text) > LONG}
        return f"<{tag}{styled(' '.join(name for name, holds in named.items() if holds))}>{text(value.text)}</{tag}>"

    def line(row: Sequence[Entry]) -> str:
        full = [*row, *[""] * (len(head) - len(row))]
        return "<tr>" + "".join(cell("td", place, entry) for place, entry in enumerate(full)) + "</tr>"

    header = "".join(cell("th", place, name) for place, name in enumerate(head))
    kind = styled("filtered" if len(rows) >= FILTERED else "")
    body = "".join(map(line, rows))
    return f'<div class="wide"><table{kind}><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>'


@dataclass(frozen=True)
class Bar:
    """From 0 to `low`, and paler up to `high`."""

    low: float
    high: float
    colour: str
    label: str


def span_text(low: float, high: float) -> str:
    first, last = f"{low:.2f}", f"{high:.2f}"
    return f"{first}×" if first == last else f"{first} to {last}×"


def bars(
    title: str,
    note: str,
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Sequence[Bar]]]],
    legend: Sequence[tuple[str, str]] = (),
) -> str:
    """For each row and column a few bars, all to one scale with a dashed line at 1; `legend`: names and colours."""
    widest = max((bar.high for _, cells in rows for cell in cells for bar in cell), default=1.0)
    unit = 100 / max(widest, 1.0)

    def drawn(bar: Bar) -> str:
        style = f"background:{bar.colour};width:"
        pale = f'<i class="pale" style="{style}{unit * bar.high:.2f}%"></i>'
        full = f'<i style="{style}{unit * bar.low:.2f}%"></i>'
        mark = f'<s style="left:{unit:.2f}%"></s>'
        return f'<div class="bar"><div>{pale}{full}{mark}</div><span>{text(bar.label)}</span></div>'

    head = "".join(f"<th>{text(column)}</th>" for column in columns)
    body = "".join(
        f"<tr><th>{text(name)}</th>" + "".join(f"<td>{''.join(map(drawn, cell))}</td>" for cell in cells) + "</tr>"
        for name, cells in rows
    )
    keys = "".join(f'<span><i style="background:{colour}"></i>{text(name)}</span>' for name, colour in legend)
    keys = f'<div class="legend">{keys}</div>' if keys else ""
    inner = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="bars"><h3>{text(title)}</h3>{keys}{inner}<p>{text(note)}</p></div>'


def details(title: str, inner: str, opened: bool = False, note: str = "") -> str:
    small = f"<small>{text(note)}</small>" if note else ""
    return f"<details{' open' if opened else ''}><summary>{text(title)}{small}</summary>{inner}</details>"


def figure(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img alt="{text(caption)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{text(caption)}</figcaption></figure>"


def heading(words: str) -> str:
    return f"<h3>{text(words)}</h3>"


def paragraph(words: str, style: str = "") -> str:
    return f"<p{styled(style)}>{text(words)}</p>"


def bullets(items: Sequence[str], style: str = "") -> str:
    listed = "".join(f"<li>{text(item)}</li>" for item in items)
    return f"<ul{styled(style)}>{listed}</ul>" if items else ""


def slug(name: str) -> str:
    return re.sub(r"\W+", "-", name.lower()).strip("-")


def page(title: str, subtitle: str, summary: str, sections: Sequence[tuple[str, str]]) -> str:
    """Sections without content are left out, of the links too."""
    named = [(slug(name), name, inner) for name, inner in sections if inner]
    links = "".join(f'<a href="#{anchor}">{text(name)}</a>' for anchor, name, _ in named)
    body = "".join(f'<section id="{anchor}"><h2>{text(name)}</h2>{inner}</section>' for anchor, name, inner in named)
    style, script = ((HERE / name).read_text() for name in ("page.css", "page.js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{NOTHING_FROM_OUTSIDE}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{text(title)}</title><style>{style}</style></head><body>'
        f'<header><h1>{text(title)}</h1><p class="soft">{text(subtitle)}</p></header><nav>{links}</nav>'
        f'<main><section id="summary">{summary}</section>{body}</main><script>{script}</script></body></html>\n'
    )
