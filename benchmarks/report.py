"""What was measured as a table, as JSON, and as plots of growth; the tables' places in docs/benchmarks.md."""

import re
from pathlib import Path
from typing import Any

Result = dict[str, Any]  # a case's group, name, role, rows, series, and what `Measured` holds, or "error"


def table(results: list[Result]) -> str:
    """Markdown: a line for each case, ratios to ours of the same group with the range over repeats."""
    lines = [
        "| | seconds (least to most) | ratio to ours | extra memory [MiB] | memory to ours | |",
        "|---|---|---|---|---|---|",
    ]
    for group in dict.fromkeys(r["group"] for r in results):
        members = [r for r in results if r["group"] == group]
        ours = next((r for r in members if r["role"] == "ours" and "seconds" in r), None)
        lines.append(f"| **{group}** | | | | | |")
        lines += [_line(r, ours) for r in members]
    found = [f"- {r['group']}, {r['name']}: {_facts(r['facts'])}" for r in results if r.get("facts")]
    return "\n".join([*lines, *(["", *found] if found else [])])


def _line(result: Result, ours: Result | None) -> str:
    name = result["name"] if result["role"] != "limit" else f"*limit: {result['name']}*"
    if "error" in result:
        return f"| {name} | {result['error']} | | | | |"
    times = result["seconds"]
    low, middle, high = min(times), result["median"], max(times)
    spread = f"{_number(middle)} ({_number(low)} to {_number(high)})" if len(times) > 1 else f"{_number(middle)} (once)"
    ratio = memory = ""
    if ours is not None and result is not ours:
        mine = ours["seconds"]
        ratio = f"{_number(middle / ours['median'])} ({_number(low / max(mine))} to {_number(high / min(mine))})"
        memory = _number(result["extra_mib"] / max(ours["extra_mib"], 1))  # below 1 MiB is noise
    speed = f"{_number(result['units'] / middle)} {result['unit']}/s" if result["unit"] else ""
    return f"| {name} | {spread} | {ratio} | {_number(result['extra_mib'])} | {memory} | {speed} |"


def _number(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _facts(facts: dict[str, Any]) -> str:
    return ", ".join(f"{k} {_number(v) if isinstance(v, float) else v}" for k, v in facts.items())


def plot(results: list[Result], path: Path, title: str) -> bool:
    """Time and memory over rows, one line a series; False where nothing grows."""
    series: dict[str, list[Result]] = {}
    for result in results:
        if result["series"] and "seconds" in result:
            series.setdefault(result["series"], []).append(result)
    series = {name: points for name, points in series.items() if len(points) > 1}
    if not series:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, points in series.items():
        points.sort(key=lambda r: r["rows"])
        rows = [r["rows"] for r in points]
        style = "--" if points[0]["role"] == "limit" else "-"
        axes[0].plot(rows, [r["median"] for r in points], style, marker="o", markersize=3, label=name)
        axes[1].plot(rows, [max(r["extra_mib"], 0.1) for r in points], style, marker="o", markersize=3, label=name)
    for axis, label in zip(axes, ("seconds", "extra memory [MiB]"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="rows", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.suptitle(title)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return True


def insert(page: Path, name: str, text: str) -> None:
    """Put text between the marks of a name in a page. Raises ValueError where it has none."""
    marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
    old = page.read_text()
    pattern = re.compile(f"{re.escape(marks[0])}.*?{re.escape(marks[1])}", re.DOTALL)
    if not pattern.search(old):
        raise ValueError(f"{page} has no marks {marks[0]} and {marks[1]}")
    page.write_text(pattern.sub(lambda _: f"{marks[0]}\n{text}\n{marks[1]}", old))
