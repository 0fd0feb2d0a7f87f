"""A report page: one HTML file with its pictures inside, readable anywhere and without a network."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dualtoken.eval.report import cell

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem;
       color: #1c2430; background: #fff; }
h1 { font-size: 1.7rem; margin-bottom: .2rem } h2 { margin-top: 2.4rem; font-size: 1.25rem }
p { max-width: 46rem } figure { margin: 1rem 0 } img { max-width: 100%; height: auto }
figcaption { color: #4a5568; font-size: .9rem; max-width: 46rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0 }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #d9dee6 }
th:first-child, td:first-child { text-align: left } tr.paper td { color: #6b7688 }
"""


class Page:
    """Parts in the order in which they are added; every text is escaped."""

    def __init__(self, title: str):
        self.title, self.parts = title, [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        self.parts.append(f"<p>{html.escape(text)}</p>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Any]], quiet: Sequence[int] = ()) -> None:
        """A table; rows whose numbers are in `quiet` are printed paler."""

        def line(tag: str, row: Sequence[Any], kind: str = "") -> str:
            return f"<tr{kind}>" + "".join(f"<{tag}>{html.escape(cell(v))}</{tag}>" for v in row) + "</tr>"

        body = [line("td", row, ' class="paper"' if i in quiet else "") for i, row in enumerate(rows)]
        self.parts.append(f'<div class="wide"><table>{line("th", header)}{"".join(body)}</table></div>')

    def picture(self, path: Path, caption: str) -> None:
        """A PNG file, taken into the page."""
        data = base64.b64encode(path.read_bytes()).decode()
        text = html.escape(caption)
        image = f'<img alt="{text}" src="data:image/png;base64,{data}">'
        self.parts.append(f"<figure>{image}<figcaption>{text}</figcaption></figure>")

    def write(self, path: Path) -> None:
        head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
        title = f"<title>{html.escape(self.title)}</title>"
        path.write_text(f'<!doctype html><html lang="en"><head>{head}{title}</head><body>{"".join(self.parts)}</body>')
