"""The pictures of `dualtoken analyze`, drawn with matplotlib into PNG files.

Shapes: L layers, M points, D depth.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from torch import Tensor

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from dualtoken.app.figures import PIXEL, SEMANTIC

Runs = Sequence[tuple[int, int]]


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def draw_similarities(path: Path, found: dict[str, tuple[Tensor, Runs, int]]) -> Path:
    """Heat maps of several backbones side by side, on one scale, layer 1 at the lower left.

    Args: found: by name, cosines of layers [L, L], the runs of layers to be framed, and the suggested pixel layer.
    """
    figure, axes = plt.subplots(
        1, len(found), figsize=(4.3 * len(found) + 0.8, 4.2), squeeze=False, layout="constrained"
    )
    low = min(float(cosines.min()) for cosines, _, _ in found.values())
    for place, (name, (cosines, runs, layer)) in zip(axes[0], found.items(), strict=True):
        edges = (0.5, len(cosines) + 0.5) * 2
        image = place.imshow(cosines.numpy(), origin="lower", extent=edges, cmap="viridis", vmin=low, vmax=1)
        for first, last in runs:
            side = last - first + 1
            place.add_patch(plt.Rectangle((first - 0.5, first - 0.5), side, side, fill=False, color="white", lw=1.5))
        place.axvline(layer, color="white", ls=":", lw=1)
        place.set_title(f"{name}: pixel layer {layer}", fontsize=9)
        place.set_xlabel("layer")
    axes[0, 0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="cosine")
    return _save(figure, path)


def draw_clouds(path: Path, found: dict[str, tuple[np.ndarray, np.ndarray, float]], names: tuple[str, str]) -> Path:
    """Maps of two kinds of features each, side by side.

    Args: found: by title, points [M, 2] of the first and of the second kind, and their overlap; names: of both kinds.
    """
    figure, axes = plt.subplots(1, len(found), figsize=(4.2 * len(found), 4.4), squeeze=False, layout="constrained")
    for place, (title, (*clouds, overlap)) in zip(axes[0], found.items(), strict=True):
        for points, color, name in zip(clouds, (PIXEL, SEMANTIC), names, strict=True):
            place.scatter(points[:, 0], points[:, 1], s=6, color=color, label=name, alpha=0.6, linewidths=0)
        place.set_title(f"{title}: overlap {overlap:.2f}", fontsize=9)
        place.set_xticks([])
        place.set_yticks([])
    axes[0, 0].legend(fontsize=8, markerscale=2)
    return _save(figure, path)


def draw_depths(path: Path, entropies: dict[str, Sequence[float]], most: dict[str, float]) -> Path:
    """Bits of the codes at each depth, a line for each vocabulary, and dashed what there could be."""
    figure, place = plt.subplots(figsize=(4.6, 3.4), layout="constrained")
    for (name, bits), color in zip(entropies.items(), (PIXEL, SEMANTIC), strict=True):
        place.plot(range(1, len(bits) + 1), bits, "o-", color=color, label=f"{name} codes")
        place.axhline(most[name], color=color, ls="--", lw=1)
    place.set_xticks(range(1, max(map(len, entropies.values())) + 1))
    place.set_ylim(bottom=0)
    place.set_xlabel("depth")
    place.set_ylabel("entropy [bits]; dashed: all codes alike")
    place.legend(fontsize=8)
    return _save(figure, path)
