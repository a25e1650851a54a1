"""HTML by hand: one page that needs nothing beside itself."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

CSS = """
:root { color-scheme: light; --ink: #1d1f23; --soft: #5d6470; --line: #e4e6ea; --paper: #fff; --wash: #f6f7f9;
        --accent: #0072b2; --warn: #a63c00; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--wash); color: var(--ink); font: 15px/1.55 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 36px 24px 72px; }
h1 { font-size: 29px; margin: 0 0 4px; letter-spacing: -0.02em; }
h2 { font-size: 20px; margin: 44px 0 10px; letter-spacing: -0.01em; }
h3 { font-size: 15px; margin: 20px 0 8px; }
p { margin: 8px 0; max-width: 76ch; }
nav { margin: 14px 0 0; font-size: 14px; }
nav a { margin-right: 16px; color: var(--accent); text-decoration: none; }
nav a:hover { text-decoration: underline; }
.soft { color: var(--soft); }
.notice { background: #fff7e8; border: 1px solid #f0d9ae; border-radius: 8px; padding: 10px 14px;
          margin: 16px 0; max-width: none; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(215px, 1fr)); gap: 12px; margin: 16px 0; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 13px 16px; }
.card b { display: block; font-size: 23px; letter-spacing: -0.02em; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: 13px; line-height: 1.4; display: block; }
figure { margin: 14px 0; background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 14px; }
figure img { display: block; width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: 13px; margin-top: 8px; }
.wide { overflow-x: auto; background: var(--paper); border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: 12.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 7px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
th { background: var(--wash); font-weight: 600; color: var(--soft); position: sticky; top: 0; }
th.text, td.text { text-align: left; }
td.warn { color: var(--warn); font-weight: 600; }
details { margin: 10px 0; }
summary { cursor: pointer; padding: 6px 0; font-weight: 600; }
ul { padding-left: 20px; max-width: 90ch; }
code { font: 13px ui-monospace, monospace; background: var(--paper); padding: 1px 4px; border-radius: 4px; }
@media print { body { background: #fff; } details > * { display: block; } }
"""


@dataclass(frozen=True)
class Cell:
    """A table's entry; `warn` marks what falls short."""

    text: str
    warn: bool = False


Entry = str | Cell


def cards(items: Sequence[tuple[str, str]]) -> str:
    inner = "".join(f'<div class="card"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in items)
    return f'<div class="cards">{inner}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[Entry]], text_columns: int = 1) -> str:
    """The first `text_columns` columns are words, the rest figures."""

    def cell(tag: str, place: int, entry: Entry) -> str:
        value = entry if isinstance(entry, Cell) else Cell(entry)
        classes = " ".join(["text"] * (place < text_columns) + ["warn"] * value.warn)
        return (
            f'<{tag} class="{classes}">{escape(value.text)}</{tag}>'
            if classes
            else f"<{tag}>{escape(value.text)}</{tag}>"
        )

    header = "".join(cell("th", place, name) for place, name in enumerate(head))
    body = "".join("<tr>" + "".join(cell("td", i, entry) for i, entry in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>'


def details(title: str, inner: str, opened: bool = False) -> str:
    return f"<details{' open' if opened else ''}><summary>{escape(title)}</summary>{inner}</details>"


def figure(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def paragraph(text: str, style: str = "") -> str:
    return f'<p class="{style}">{escape(text)}</p>' if style else f"<p>{escape(text)}</p>"


def bullets(items: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def page(title: str, subtitle: str, summary: str, sections: Sequence[tuple[str, str]]) -> str:
    names = [(f"section-{number}", name, inner) for number, (name, inner) in enumerate(sections) if inner]
    links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name, _ in names)
    body = "".join(f'<section id="{anchor}"><h2>{escape(name)}</h2>{inner}</section>' for anchor, name, inner in names)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{CSS}</style></head><body><main>'
        f'<header><h1>{escape(title)}</h1><p class="soft">{escape(subtitle)}</p><nav>{links}</nav></header>'
        f"{summary}{body}</main></body></html>\n"
    )
