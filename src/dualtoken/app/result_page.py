"""`dualtoken report FILES`: results of `eval` and `reproduce`, as one page that needs nothing but itself."""

import json
from pathlib import Path
from typing import Any

from dualtoken.app.report import SCALES, Page
from dualtoken.core.errors import UserError
from dualtoken.paper.summary import add_result
from dualtoken.tokenizer.presets import BUNDLED

UNITS = {"psnr": "dB", "seconds": "s", "minutes": "min", "bits": "bit", "bytes": "bytes"}  # of what ends in this name
SHARES = ("share", "interval", "usage", "ssim", "codes", "teacher", "jointly")  # of 1


def report(files: str | list[str], output: str = "report.html", title: str = "Results") -> None:
    """Put results into one page.

    Args:
        files: JSON files written by `eval --output` or `reproduce`, one or several.
        output: the page.
        title: its title.
    """
    paths = [Path(f) for f in ([files] if isinstance(files, str) else files)]
    write_page(paths, Path(output), title, " ".join(["dualtoken report", *(str(p) for p in paths)]))


def write_page(paths: list[Path], output: Path, title: str, command: str) -> None:
    """Results as one page, with the command that made it."""
    results = [(path, _read(path)) for path in paths]
    scales = {scale_of(result) for _, result in results}
    scale = scales.pop() if len(scales) == 1 else None
    page = Page(title, scale, command)
    for path, result in results:
        if {"rows", "title", "scale"} <= set(result):
            add_result(page, path.parent, result)
        else:
            page.heading(f"{path.stem} ({SCALES[scale_of(result)]})")
            page.table(("measure", "value", "unit"), [(name, value, unit(name)) for name, value in flat(result)])
    output.parent.mkdir(parents=True, exist_ok=True)
    page.write(output)
    print(f"written: {output}")


def scale_of(result: dict[str, Any]) -> str:
    """ "mini" or "full": as the result says, else by its model."""
    return result.get("scale") or ("mini" if result.get("model", "mini") in BUNDLED else "full")


def flat(result: Any, name: str = "") -> list[tuple[str, Any]]:
    """Nested results as names with dots and values; lists in one cell, but for lists of results."""
    if isinstance(result, dict):
        return [entry for key, value in result.items() for entry in flat(value, f"{name}.{key}" if name else key)]
    if isinstance(result, list):
        if any(isinstance(value, (dict, list)) for value in result):
            return [entry for i, value in enumerate(result) for entry in flat(value, f"{name}.{i + 1}")]
        return [(name, ", ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in result))]
    return [(name, result)]


def unit(name: str) -> str:
    """The unit of a measure by the last part of its name."""
    last = name.split(".")[-1]
    if any(last.endswith(end) for end in SHARES):
        return "share of 1"
    return next((text for end, text in UNITS.items() if last.endswith(end)), "")


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"FILES {path}: no such file") from None
    except (ValueError, OSError) as error:
        raise UserError(f"FILES {path}: no JSON that can be read ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"FILES {path}: no result of eval or reproduce")
    return found
