"""A report page: one HTML file with its pictures inside, readable anywhere and without a network."""

import base64
import html
import inspect
import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from dualtoken.core.files import whole_or_not_at_all
from dualtoken.eval.report import cell

STYLE = """
:root { color-scheme: light dark; --text: #1c2430; --back: #fff; --quiet: #5a6677; --line: #d9dee6; --code: #f2f4f7 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e8ee; --back: #14181f; --quiet: #9aa5b4; --line: #323a46; --code: #1e242d } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem;
       color: var(--text); background: var(--back); overflow-wrap: break-word }
h1 { font-size: 1.7rem; line-height: 1.25; margin-bottom: .2rem } h2 { margin-top: 2.4rem; font-size: 1.25rem }
p { max-width: 46rem } figure { margin: 1rem 0 }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px }
figcaption { color: var(--quiet); font-size: .9rem; max-width: 46rem }
code { background: var(--code); padding: .1rem .3rem; border-radius: 3px; font-size: .9em }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0 }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left } tr.paper td { color: var(--quiet) }
@media (max-width: 600px) { body { margin: 1rem auto } h1 { font-size: 1.35rem } th, td { padding: .3rem .5rem } }
"""
SCALES = {"mini": "miniature", "full": "full scale"}


def typed(command: str, function: Callable[..., Any], given: dict[str, Any]) -> str:
    """The line that calls a command's function with what was given to it, without what is its default."""
    words = command.split()
    for name, parameter in inspect.signature(function).parameters.items():
        value = given[name]
        if value == parameter.default:
            continue
        if is_dataclass(value):
            value = {part: chosen for part, chosen in asdict(value).items() if chosen is not None}
        words += [f"--{name}"] * (parameter.default is not parameter.empty)
        words.append(value if isinstance(value, str) else json.dumps(value))
    return shlex.join(words)


class Page:
    """Parts in the order in which they are added; every text is escaped.

    Args: scale: "mini" or "full", said in the title; command: what makes the page again.
    """

    def __init__(self, title: str, scale: str | None = None, command: str | None = None):
        self.title = f"{title} ({SCALES[scale]})" if scale else title
        self.parts = [f"<h1>{html.escape(self.title)}</h1>"]
        if command:
            self.parts.append(f"<p>Made by <code>{html.escape(command)}</code></p>")

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

    def picture(self, path: Path, caption: str, alt: str = "") -> None:
        """A PNG file, taken into the page; `alt` says what is in it, else the caption does."""
        data = base64.b64encode(path.read_bytes()).decode()
        text = html.escape(caption)
        image = f'<img alt="{html.escape(alt or caption)}" src="data:image/png;base64,{data}">'
        self.parts.append(f"<figure>{image}<figcaption>{text}</figcaption></figure>")

    def write(self, path: Path) -> None:
        meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        head = f"{meta}<style>{STYLE}</style><title>{html.escape(self.title)}</title>"
        body = "".join(self.parts)
        with whole_or_not_at_all(path) as draft:
            draft.write_text(f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>')
