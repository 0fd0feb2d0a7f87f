"""`dualtoken report FILES`: results of `eval` and `reproduce`, as one page that needs nothing but itself."""

import json
from pathlib import Path
from typing import Any

from dualtoken.app.report import SCALES, Page, typed
from dualtoken.core.errors import UserError
from dualtoken.paper.summary import add_result
from dualtoken.tokenizer.presets import BUNDLED

UNITS = {  # of what ends in this name
    "psnr": "dB", "psnr_median": "dB", "seconds": "s", "minutes": "min", "bits": "bit", "bytes": "bytes",
    **dict.fromkeys(("share", "interval", "usage", "ssim", "commonest_answer"), "share of 1"),
}  # fmt: skip
SHARES = ("codes", "teacher", "jointly")  # of 1, by their whole name


def report(files: str | list[str], output: str = "report.html", title: str = "Results") -> None:
    """Put results into one page.

    Args:
        files: JSON files written by `eval --output` or `reproduce`, one or several.
        output: the page.
        title: its title.
    """
    command = typed("dualtoken report", report, locals())
    write_page([Path(f) for f in ([files] if isinstance(files, str) else files)], Path(output), title, command)


def write_page(paths: list[Path], output: Path, title: str, command: str) -> None:
    """Results as one page, with the command that made it. Raises UserError for files that hold none."""
    results = [(path, _read(path)) for path in paths]
    scales = {scale_of(result) for _, result in results}
    scale = scales.pop() if len(scales) == 1 else None
    page = Page(title, scale, command)
    for path, result in results:
        try:
            _add(page, path, result)
        except FileNotFoundError as error:
            raise UserError(f"FILES {path}: its picture {error.filename} is missing; keep them together") from None
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(f"FILES {path}: no result of eval or reproduce ({type(error).__name__} {error})") from None
    output.parent.mkdir(parents=True, exist_ok=True)
    page.write(output)
    print(f"written: {output}")


def _add(page: Page, path: Path, result: dict[str, Any]) -> None:
    if {"rows", "title", "scale"} <= set(result):
        return add_result(page, path.parent, result)
    scale = scale_of(result)
    page.heading(f"{path.stem} ({SCALES[scale]})" if scale else path.stem)
    rows = [(name, value, unit(name)) for name, value in flat(result) if name != "scale"]
    page.table(("measure", "value", "unit"), rows)


def scale_of(result: dict[str, Any]) -> str | None:
    """ "mini" or "full" as the result says; else by its model, None where that does not tell."""
    return result.get("scale") or ("mini" if result.get("model") in BUNDLED else None)


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
    if last in SHARES:
        return "share of 1"
    return next((text for end, text in UNITS.items() if last.endswith(end)), "")


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"FILES {path}: no such file") from None
    except (ValueError, OSError) as error:
        raise UserError(f"FILES {path}: no JSON that can be read ({error})") from None
    known = isinstance(found, dict) and isinstance(found.get("model") or "", str)
    if not known or found.get("scale") not in (None, *SCALES):
        raise UserError(f"FILES {path}: no result of eval or reproduce")
    return found
