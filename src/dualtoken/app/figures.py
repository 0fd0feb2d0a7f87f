"""The pictures of the demo report, drawn with matplotlib into PNG files.

Shapes: M pictures, S side in pixels, N = grid * grid positions, D depth.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from dualtoken.core.files import whole_or_not_at_all

PIXEL, SEMANTIC, TEACHER = "#2f6fb5", "#c2571a", "#8a93a3"


def _show(axes: Axes, pixels: Tensor, title: str = "") -> None:
    """A uint8 picture [3, S, S] or float map [h, w, 3], every pixel a square."""
    image = pixels.permute(1, 2, 0) if pixels.dtype == torch.uint8 else pixels
    axes.imshow(image.numpy(), interpolation="nearest")
    axes.set_title(title, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])


def _grid(rows: int, columns: int, labels: Sequence[str], side: float = 1.25) -> tuple[Any, Any]:
    """Figure and axes [rows, columns] with a label at the left of each row."""
    figure, axes = plt.subplots(
        rows, columns, figsize=(side * columns + 1, side * rows + 0.3), squeeze=False, layout="constrained"
    )
    for row, label in enumerate(labels):
        axes[row, 0].set_ylabel(label, fontsize=9 if len(label) < 20 else 7)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    with whole_or_not_at_all(path) as draft:
        figure.savefig(draft, dpi=110, format=path.suffix[1:])
    plt.close(figure)
    return path


def draw_reconstructions(path: Path, originals: Tensor, found: Tensor, names: Sequence[str]) -> Path:
    """Originals, reconstructions (both uint8 [M, 3, S, S]) and the size of the error, one picture a column."""
    figure, axes = _grid(3, len(originals), ("original", "from codes", "error"))
    error = (originals.float() - found.float()).abs().mean(1) / 255
    for i, name in enumerate(names):
        _show(axes[0, i], originals[i], name)
        _show(axes[1, i], found[i])
        last = axes[2, i].imshow(error[i].numpy(), cmap="magma", vmin=0, vmax=0.3)
        axes[2, i].set_xticks([])
        axes[2, i].set_yticks([])
    figure.colorbar(last, ax=axes[2, -1], label="|error|", shrink=0.9).ax.tick_params(labelsize=7)
    return _save(figure, path)


def draw_captioned(path: Path, pictures: Tensor, lines: Sequence[str]) -> Path:
    """Pictures uint8 [M, 3, S, S] side by side, each with its text below."""
    wrapped = [[part for row in line.split("\n") for part in textwrap.wrap(row, 24)] for line in lines]
    sizes = 1.9 * len(pictures), 2.05 + 0.16 * max(map(len, wrapped), default=0)
    figure, axes = plt.subplots(1, len(pictures), figsize=sizes, squeeze=False, layout="constrained")
    for place, picture, rows in zip(axes[0], pictures, wrapped, strict=False):
        _show(place, picture)
        place.set_xlabel("\n".join(rows), fontsize=8)
    return _save(figure, path)


def draw_grid(path: Path, pictures: Sequence[Tensor], lines: Sequence[str], columns: int = 4) -> Path:
    """Pictures, each uint8 [3, S, S], in rows of `columns`, each with its text below, cut after a few lines."""
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2 * columns, 2.7 * rows), squeeze=False, layout="constrained")
    for place in axes.flat[len(pictures) :]:
        place.axis("off")
    for place, picture, line in zip(axes.flat, pictures, lines, strict=False):
        _show(place, picture)
        place.set_xlabel("\n".join(textwrap.wrap(line, 26, max_lines=4)), fontsize=7, parse_math=False)
    return _save(figure, path)


def draw_rows(path: Path, rows: Sequence[Tensor], labels: Sequence[str], titles: Sequence[str]) -> Path:
    """Rows of pictures, each uint8 [M, 3, S, S], with a label at the left of each row and titles above the first."""
    figure, axes = _grid(len(rows), len(rows[0]), labels)
    for row, pictures in enumerate(rows):
        for i, picture in enumerate(pictures):
            _show(axes[row, i], picture, titles[i] if row == 0 else "")
    return _save(figure, path)


def code_colors(weight: Tensor) -> Tensor:
    """A color in [0, 1] for each row of a codebook [K, C] -> [K, 3]; near rows get near colors.

    The three first principal axes of the rows are red, green and blue, each by rank.
    """
    centered = weight - weight.mean(0)
    axes = torch.linalg.svd(centered, full_matrices=False).Vh[:3]
    rank = (centered @ axes.t()).argsort(0).argsort(0)
    return rank.float() / max(1, len(weight) - 1)


def draw_code_maps(path: Path, originals: Tensor, maps: dict[str, Tensor], names: Sequence[str]) -> Path:
    """Pictures uint8 [M, 3, S, S] above color maps [M, h, w, 3] of their codes, a row a vocabulary."""
    figure, axes = _grid(1 + len(maps), len(originals), ("picture", *maps))
    for i, name in enumerate(names):
        _show(axes[0, i], originals[i], name)
        for row, colors in enumerate(maps.values(), 1):
            _show(axes[row, i], colors[i])
    return _save(figure, path)


def draw_neighbors(path: Path, queries: Tensor, found: dict[str, Tensor]) -> Path:
    """Queries uint8 [M, 3, S, S], and for each vocabulary their neighbours uint8 [M, k, 3, S, S], side by side."""
    count = next(iter(found.values())).shape[1]
    figure, axes = _grid(len(queries), 1 + len(found) * (count + 1), [""] * len(queries), 0.95)
    for row, query in enumerate(queries):
        _show(axes[row, 0], query, "query" if row == 0 else "")
        for block, (name, pictures) in enumerate(found.items()):
            first = 1 + block * (count + 1)
            axes[row, first].axis("off")
            for k in range(count):
                _show(axes[row, first + 1 + k], pictures[row, k], f"by {name} codes" if row == k == 0 else "")
    return _save(figure, path)


def draw_similarity(path: Path, similarity: Tensor, runs: Sequence[tuple[int, int]]) -> Path:
    """Cosines of layers [L, L] as a heat map with layer 1 at the lower left; runs of layers (from 1) are framed."""
    figure, axes = plt.subplots(figsize=(5.2, 4.4), layout="constrained")
    layers = len(similarity)
    edges = (0.5, layers + 0.5, 0.5, layers + 0.5)
    image = axes.imshow(similarity.numpy(), origin="lower", extent=edges, cmap="viridis", vmax=1)
    for first, last in runs:
        side = last - first + 1
        axes.add_patch(plt.Rectangle((first - 0.5, first - 0.5), side, side, fill=False, color="white", lw=1.5))
    axes.set_xlabel("layer")
    axes.set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="cosine")
    return _save(figure, path)


def draw_curves(
    path: Path,
    curves: dict[str, Sequence[tuple[float, float]]],
    levels: dict[str, float],
    marks: dict[str, float],
    axes_names: tuple[str, str],
) -> Path:
    """Curves of points (x, y), levels as dashed lines over all x, marks as dotted lines over all y."""
    figure, axes = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", ms=4, lw=1.5, label=name)
    for number, (name, level) in enumerate(levels.items()):
        axes.axhline(level, ls="--", lw=1, color=(PIXEL, SEMANTIC)[number % 2], label=name)
    for name, mark in marks.items():
        axes.axvline(mark, ls=":", lw=1, color=TEACHER, label=name)
    axes.set_xlabel(axes_names[0])
    axes.set_ylabel(axes_names[1])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    return _save(figure, path)


def draw_scatter(path: Path, panels: dict[str, dict[str, Tensor]]) -> Path:
    """Panels side by side, each of named sets of points [M, 2]."""
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 4), squeeze=False, layout="constrained")
    for place, (title, sets) in zip(axes[0], panels.items(), strict=True):
        for (name, points), color in zip(sets.items(), (PIXEL, SEMANTIC), strict=False):
            place.scatter(*points.numpy().T, s=5, color=color, label=name)
        place.set_title(title, fontsize=9)
        place.set_xticks([])
        place.set_yticks([])
        place.legend(fontsize=7, frameon=False)
    return _save(figure, path)


def draw_clusters(path: Path, groups: Sequence[Tensor]) -> Path:
    """Clusters of pictures, each uint8 [k, 3, S, S], a row each."""
    figure, axes = _grid(
        len(groups), max(len(group) for group in groups), [f"{i + 1}" for i in range(len(groups))], 0.95
    )
    for row, group in enumerate(groups):
        for column, cell in enumerate(axes[row]):
            if column < len(group):
                _show(cell, group[column])
            else:
                cell.axis("off")
    return _save(figure, path)


def draw_zero_shot(
    path: Path, pictures: Tensor, scores: dict[str, Tensor], classes: Sequence[str], top: int = 4
) -> Path:
    """Pictures uint8 [M, 3, S, S] with bars of their likeliest classes; scores [M, L] sum to 1 for each reader."""
    figure, axes = plt.subplots(
        2, len(pictures), figsize=(1.75 * len(pictures) + 0.5, 3.4), squeeze=False, layout="constrained",
        height_ratios=(1.3, 1),
    )  # fmt: skip
    colors = dict(zip(scores, (SEMANTIC, TEACHER), strict=False))
    first = next(iter(scores.values()))
    for i, picture in enumerate(pictures):
        _show(axes[0, i], picture)
        best = first[i].topk(top).indices
        for n, (name, values) in enumerate(scores.items()):
            places = torch.arange(top) + 0.38 * n
            axes[1, i].barh(places.numpy(), values[i, best].numpy(), 0.36, color=colors[name], label=name)
        axes[1, i].set_yticks(torch.arange(top).numpy() + 0.19, [classes[b] for b in best], fontsize=7)
        axes[1, i].invert_yaxis()
        axes[1, i].set_xlim(0, 1)
        axes[1, i].tick_params(axis="x", labelsize=7)
        axes[1, i].spines[["top", "right"]].set_visible(False)
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return _save(figure, path)
