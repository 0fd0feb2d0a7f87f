"""The paper's own numbers, to stand beside ours: tables and figures of `numbers.yaml`, read once."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from dualtoken.core.errors import UserError

FILE = Path(__file__).with_name("numbers.yaml")


@dataclass(frozen=True)
class PaperColumn:
    """What a column measures. better: "higher" or "lower"; benchmark: the data, with its split where it has one."""

    key: str
    unit: str
    better: str
    benchmark: str


@dataclass(frozen=True)
class PaperRow:
    """A row. values: column key -> number, None where the paper has none; ours: DualToken's; group: kind of method."""

    name: str
    values: dict[str, float | None]
    group: str | None = None
    ours: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PaperTable:
    """A table. settings hold for all rows."""

    id: str
    title: str
    columns: tuple[PaperColumn, ...]
    rows: tuple[PaperRow, ...]
    settings: dict[str, Any]

    def row(self, name: str) -> PaperRow:
        """The row of that name. Raises UserError for an unknown one."""
        return _pick({row.name: row for row in self.rows}, name, f"{self.id} of the paper has no row")


@dataclass(frozen=True)
class PaperFigure:
    """A figure: what the paper concludes from it, and how it was made."""

    id: str
    title: str
    claim: str
    settings: dict[str, Any]


def paper_table(id: str) -> PaperTable:
    """A table by id: table1 to table12 (5 is table5a and table5b), appendixD. Raises UserError for an unknown one."""
    return _pick(paper_tables(), id, "the paper has no table")


def paper_figure(id: str) -> PaperFigure:
    """A figure by id: fig3, fig5 to fig8. Raises UserError for an unknown one."""
    return _pick(paper_figures(), id, "no figure of the paper is noted as")


@lru_cache
def paper_tables() -> dict[str, PaperTable]:
    """All tables by id, in the paper's order."""
    return {id: _table(id, **table) for id, table in _content()["tables"].items()}


@lru_cache
def paper_figures() -> dict[str, PaperFigure]:
    """All figures by id, in the paper's order."""
    return {id: PaperFigure(id, **figure) for id, figure in _content()["figures"].items()}


@lru_cache
def _content() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))


def _table(id: str, title: str, columns: list, rows: list, settings: dict[str, Any] | None = None) -> PaperTable:
    columns, rows = tuple(PaperColumn(**c) for c in columns), tuple(PaperRow(**r) for r in rows)
    return PaperTable(id, title, columns, rows, settings or {})


def _pick(table: dict[str, Any], name: str, problem: str) -> Any:
    if name in table:
        return table[name]
    raise UserError(f"{problem} {name!r}; {_hint(table, name)}")


def _hint(names: Iterable[str], name: str) -> str:
    near = get_close_matches(name, names, 3, 0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"
