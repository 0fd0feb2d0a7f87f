"""The summary of `dualtoken reproduce all`: index.md, what follows from each; index.html, everything in one file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dualtoken.app.report import SCALES, Page
from dualtoken.paper.experiment import column_title, columns_of, command_of, shown, values_of


def write_summary(folder: Path, ids: Sequence[str]) -> Path:
    """Read ID.json of every id and write both pages; returns the HTML page, which needs no other file."""
    results = [json.loads((folder / f"{id}.json").read_text()) for id in ids]
    scale = SCALES["mini" if all(result["scale"] == "mini" for result in results) else "full"]
    options: dict[str, Any] = {}
    for name, value in (option for result in results for option in result.get("options", {}).items()):
        options[name] = options.get(name, {}) | value if isinstance(value, dict) else value
    command = command_of(results[0] | {"id": "all", "options": options})
    page = Page(f"The tables and figures of the paper, {scale}", command=command)
    lines = [f"# The tables and figures of the paper, {scale}", ""]
    for result in results:
        lines += [f"## [{result['title']}]({result['id']}.md)", "", f"The paper: {result['claim']}", ""]
        lines += [*(f"- {finding}" for finding in result["findings"]), ""]
        add_result(page, folder, result)
    (folder / "index.md").write_text("\n".join(lines))
    page.write(folder / "index.html")
    print(f"written: {folder / 'index.html'}")
    return folder / "index.html"


def write_result(folder: Path, id: str) -> None:
    """Read ID.json and write ID.html, which needs no other file."""
    result = json.loads((folder / f"{id}.json").read_text())
    page = Page(result["title"], result["scale"], command_of(result))
    add_result(page, folder, result)
    page.write(folder / f"{id}.html")
    print(f"written: {folder / id}.html")


def add_result(page: Page, folder: Path, result: dict[str, Any]) -> None:
    """One result: title, claim, numbers with the paper's beside them, findings, pictures, circumstances."""
    scale = SCALES[result["scale"]]
    page.heading(f"{result['id']}: {result['title']} ({scale})")
    page.text(f"The paper: {result['claim']}")
    columns = columns_of(result["rows"])
    header = ["", *(column_title(side, key) for side, key in columns)]
    rows = [[row["name"], *(shown(values_of(row, side), key) for side, key in columns)] for row in result["rows"]]
    page.table(header, rows, [i for i, row in enumerate(result["rows"]) if not row["measured"]])
    for finding in result["findings"]:
        page.text(finding)
    for name, caption in result["pictures"].items():
        page.picture(folder / name, caption, f"{result['title']}: {caption}")
    how = f"Seeds {result['seeds']}, commit {result['commit'] or 'unknown'}"
    took = f"{result['hardware']}, {result['minutes']} minutes"
    took += f", budget {result['budget']:g}" if "budget" in result else ""
    page.text(f"{how}, {took}: {command_of(result)}")
