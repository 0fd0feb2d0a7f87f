"""Figures of the backbone's layers: inter-layer similarity (fig3, fig7) and image clusters (fig3, fig8)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dualtoken.analysis.clusters import agreement, cluster, largest
from dualtoken.analysis.layers import blocks, contrast, layer_similarity, pooled_layers
from dualtoken.app.figures import draw_clusters, draw_similarity
from dualtoken.data.images import DataConfig, open_source, read_in_order
from dualtoken.data.scenes import Scene, scene
from dualtoken.paper.experiment import Result, Row, Setting
from dualtoken.tokenizer.backbone import Backbone, BackboneConfig
from dualtoken.tokenizer.initial import load_backbone

BATCH, SHOWN, MEMBERS = 50, 6, 8
FACTS: dict[str, Callable[[Scene], object]] = {  # what is known of a scene: how it looks, and what is in it
    "background": lambda s: s.background,
    "color": lambda s: s.objects[0].color,
    "texture": lambda s: s.objects[0].texture,
    "shape": lambda s: s.objects[0].shape,
    "number": lambda s: len(s.objects),
}


def similarity(setting: Setting, id: str) -> Result:
    """Cosine similarity of layers, and the runs of layers that belong together."""
    backbone = _open(setting)
    found = layer_similarity(_look(backbone, setting, None, setting.count(1000, 50000)).pooled)
    runs = blocks(found)
    within, between = contrast(found, runs)
    draw_similarity(setting.out / f"{id}_similarity.png", found, runs)
    rows = [Row(f"layers {first} to {last}", {"mean cosine": contrast_of(found, first, last)}) for first, last in runs]
    rows.append(Row("layers of different runs", {"mean cosine": between}))
    first = runs[0][1]
    said = (
        f"The shallow run ends at layer {first} of {backbone.layers}; the pixel tap of the tokenizer is layer "
        f"{backbone.pixel_layer}, the first quarter. Layers of one run have cosine {within:.3f}, of different runs "
        f"{between:.3f}: " + ("runs show as bright squares." if within - between > 0.2 else "no sharp squares here.")
    )
    return Result(rows, [said], {f"{id}_similarity.png": "Cosine of every pair of layers, averaged over pictures"})


def contrast_of(found: Tensor, first: int, last: int) -> float | None:
    """Mean cosine of different layers of a run; None where it has one layer."""
    square = found[first - 1 : last, first - 1 : last]
    other = ~torch.eye(len(square), dtype=torch.bool)
    return float(square[other].mean()) if len(square) > 1 else None


def clusters(setting: Setting, id: str) -> Result:
    """k-means of a shallow and a deep layer: pictures of the largest clusters, and what the clusters agree with."""
    backbone = _open(setting)
    taps = (backbone.pixel_layer, backbone.semantic_layer)
    seen = _look(backbone, setting, taps, setting.count(2000, 50000))
    names = seen.names
    number = min(1000 if setting.scale == "full" else 48, len(names))
    rows, files = [], {}
    for layer, features in zip(taps, seen.pooled, strict=True):
        assigned = cluster(features, number, setting.seed)
        groups = largest(assigned, SHOWN, min(MEMBERS, len(names) // number or 1))
        file = f"{id}_layer{layer}.png"
        draw_clusters(setting.out / file, [seen.pictures[torch.from_numpy(group)] for group in groups])
        files[file] = f"The largest of {number} clusters of layer {layer}, a row each"
        if setting.source == "scenes":
            drawn = [scene(int(name.rsplit("-", 1)[1]), "test") for name in names]
            alone = [i for i, s in enumerate(drawn) if len(s.objects) == 1]
            measured = {}
            for fact, of in FACTS.items():
                some = range(len(drawn)) if fact in ("background", "number") else alone
                measured[fact] = agreement(assigned[list(some)], [of(drawn[i]) for i in some])
            rows.append(Row(f"layer {layer}", measured))
    said = []
    if rows:
        said.append("Adjusted mutual information of clusters and facts, 0 by chance, 1 for the same split.")
    for fact in FACTS if rows else ():
        shallow, deep = (row.measured[fact] for row in rows)
        said.append(f"{fact}: layer {taps[0]} {shallow:.3f}, layer {taps[1]} {deep:.3f}.")
    return Result(rows, said, files)


def figure3(setting: Setting) -> Result:
    """Both halves of the figure."""
    left, right = similarity(setting, "fig3"), clusters(setting, "fig3")
    return Result(left.rows + right.rows, left.findings + right.findings, left.pictures | right.pictures)


figure7, figure8 = partial(similarity, id="fig7"), partial(clusters, id="fig8")


@dataclass
class Seen:
    """Pictures and what the backbone's layers make of them. names: of the M pictures."""

    pooled: Tensor  # [L, M, C]
    pictures: Tensor  # uint8 [M, 3, S, S], on the CPU
    names: list[str]


def _open(setting: Setting) -> Backbone:
    shape, state = load_backbone(setting.encoder or "mini", BackboneConfig(""))
    backbone = Backbone(shape)
    backbone.load_state_dict(state)
    return backbone.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _look(backbone: Backbone, setting: Setting, layers: tuple[int, ...] | None, count: int) -> Seen:
    source = open_source(DataConfig(setting.source), backbone.image_size, "test", "--data")
    pooled, pictures, names = [], [], []
    for batch in read_in_order(source, count, BATCH, []):
        pooled.append(pooled_layers(backbone, [batch.images], layers))
        pictures.append(batch.images)
        names += batch.names
    return Seen(torch.cat(pooled, 1), torch.cat(pictures), names)
