"""Pages that need no network and no other file: one style, tables and pictures inside."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.run import Metric

STYLE = """
:root { --ink: #0b0b0b; --muted: #52514e; --line: #e6e5e0; --paper: #fcfcfb; --accent: #2a78d6; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
       font: 15px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 48px 24px 96px; }
h1 { font-size: 30px; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 48px 0 12px; padding-top: 20px; border-top: 1px solid var(--line); }
h3 { font-size: 14px; margin: 20px 0 6px; color: var(--muted); font-weight: 600; }
p, li, .sub { color: var(--muted); }
.sub { margin: 0 0 24px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 12px; }
.tile { border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; background: #fff; }
.tile b { display: block; font-size: 25px; font-weight: 600; letter-spacing: -0.02em; }
.tile b i { color: var(--muted); font-style: normal; font-weight: 400; }
.tile span { color: var(--muted); font-size: 13px; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; display: block; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 20px; }
.pair img { width: 100%; border-radius: 6px; image-rendering: pixelated; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line);
         font-variant-numeric: tabular-nums; white-space: nowrap; }
th { color: var(--muted); font-weight: 500; }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere;
                                 min-width: 14em; }
ol { columns: 2; column-gap: 28px; font-size: 13.5px; padding-left: 26px; }
pre { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 14px;
      overflow: auto; font-size: 12.5px; line-height: 1.5; }
summary { cursor: pointer; color: var(--accent); }
@media (max-width: 640px) { .pair { grid-template-columns: 1fr; } ol { columns: 1; } }
"""


def document(title: str, sections: Sequence[str]) -> str:
    """A whole page; empty sections are left out."""
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def escape(value: Any) -> str:
    """Any value as text of a page."""
    return html.escape(str(value))


def picture(path: Path, alt: str) -> str:
    """A PNG file inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def number(value: float | int | None) -> str:
    """Four digits of a float, all of an int, nothing of None."""
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table that scrolls by itself where it is too wide."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in cells)}</tr>" for cells in lines)
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def metric_table(heading: str, metrics: Mapping[str, Metric]) -> str:
    """Metrics as a table with the columns that any of them uses."""
    order = ("value", "before", "after", "gain", "low", "high", "n")
    used = [key for key in order if any(key in metric for metric in metrics.values())]
    if not used:
        return ""
    names = {"low": "95% low", "high": "95% high"}
    lines = [[name, *(number(m.get(key)) for key in used)] for name, m in metrics.items()]
    head = ["metric", *(names.get(key, key) for key in used)]
    return f"<h2>{escape(heading)}</h2>{table(head, lines)}"
