"""Results as an aligned table on the screen and as JSON on disk."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from dualtoken.core.files import whole_or_not_at_all


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns of text, numbers to the right; None is printed as "-"."""
    cells = [[cell(value) for value in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
             for row in cells]  # fmt: skip
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def cell(value: Any) -> str:
    """A value as text: four digits of a float, "-" for None."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Share:
    """`right` of `total`, with its 95 % interval (Wilson)."""

    right: int
    total: int

    @property
    def value(self) -> float:
        """As a share of 1; not a number of nothing."""
        return self.right / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end, as shares of 1."""
        if not self.total:
            return math.nan, math.nan
        found = binomtest(self.right, self.total).proportion_ci(method="wilson")
        return float(found.low), float(found.high)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"

    def numbers(self) -> dict[str, Any]:
        """For JSON."""
        return {"share": self.value, "interval": list(self.interval), "right": self.right, "total": self.total}


def share(verdicts: Iterable[bool]) -> Share:
    """How many are true."""
    listed = [bool(v) for v in verdicts]
    return Share(sum(listed), len(listed))


def write_json(path: str | Path | None, result: dict[str, Any]) -> None:
    """Write a result; not-a-number becomes null. None = nowhere."""
    if path is None:
        return
    clean = {k: _finite(v) for k, v in result.items()}
    with whole_or_not_at_all(Path(path)) as draft:
        draft.write_text(json.dumps(clean, indent=1) + "\n")
    print(f"written: {path}")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
