"""Figures of the backbone's layers: inter-layer similarity (fig3, fig7) and image clusters (fig3, fig8)."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dualtoken.analysis.clusters import Members, StreamedClusters, agreement
from dualtoken.analysis.layers import blocks, contrast, pooled_layers, stream_similarity
from dualtoken.app.figures import draw_clusters, draw_similarity
from dualtoken.app.look import Reading, small
from dualtoken.data.scenes import Scene, scene
from dualtoken.paper.ablations import deeper
from dualtoken.paper.experiment import Result, Row, Setting
from dualtoken.paper.trained import minutes, train_parts
from dualtoken.tokenizer.backbone import Backbone
from dualtoken.tokenizer.initial import open_backbone

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
    return _similarity(setting, f"{id}_similarity.png", open_backbone(setting.encoder or "mini"))


def _similarity(setting: Setting, file: str, backbone: Backbone, label: str = "") -> Result:
    reading = _reading(backbone, setting, setting.count(1000, 50000))
    found = stream_similarity(backbone, (batch.images for batch in reading))
    setting.skipped.extend(reading.skipped)
    runs = blocks(found)
    within, between = contrast(found, runs)
    draw_similarity(setting.out / file, found, runs)
    rows = [
        Row(f"{label}layers {first} to {last}", {"mean cosine": contrast_of(found, first, last)})
        for first, last in runs
    ]
    rows.append(Row(f"{label}layers of different runs", {"mean cosine": between}))
    first = runs[0][1]
    said = (
        f"{label}The shallow run ends at layer {first} of {backbone.layers}; the pixel tap of the tokenizer is layer "
        f"{backbone.pixel_layer}, the first quarter. Layers of one run have cosine {within:.3f}, of different runs "
        f"{between:.3f}: " + ("runs show as bright squares." if within - between > 0.2 else "no sharp squares here.")
    )
    return Result(rows, [said], {file: f"{label}Cosine of every pair of layers, averaged over pictures"})


def contrast_of(found: Tensor, first: int, last: int) -> float | None:
    """Mean cosine of different layers of a run; None where it has one layer."""
    square = found[first - 1 : last, first - 1 : last]
    other = ~torch.eye(len(square), dtype=torch.bool)
    return float(square[other].mean()) if len(square) > 1 else None


def clusters(setting: Setting, id: str) -> Result:
    """k-means of a shallow and a deep layer: pictures of the largest clusters, and what the clusters agree with."""
    backbone = open_backbone(setting.encoder or "mini")
    taps = (backbone.pixel_layer, backbone.semantic_layer)
    reading = _reading(backbone, setting, setting.count(2000, 50000))
    number = min(1000 if setting.scale == "full" else 48, reading.most)
    learnt, names = [StreamedClusters(number, setting.seed) for _ in taps], []
    for batch in reading:
        for one, features in zip(learnt, pooled_layers(backbone, [batch.images], taps), strict=True):
            one.learn(features)
        names += batch.names
    number = min(number, reading.used)  # some files may be no pictures
    for one in learnt:
        one.clusters = number
        one.finish()
    groups, assigned = [Members(number, 0, MEMBERS) for _ in taps], [[] for _ in taps]
    for batch in reading:
        pooled = pooled_layers(backbone, [batch.images], taps)
        for one, group, found, features in zip(learnt, groups, assigned, pooled, strict=True):
            found.append(one.assign(features))
            group.add(found[-1], [-1] * len(features), small(batch.images))
    setting.skipped.extend(reading.skipped)
    drawn = [scene(int(name.rsplit("-", 1)[1]), "test") for name in names] if setting.source == "scenes" else []
    alone = [i for i, s in enumerate(drawn) if len(s.objects) == 1]
    rows, files = [], {}
    for layer, group, found in zip(taps, groups, map(np.concatenate, assigned), strict=True):
        file = f"{id}_layer{layer}.png"
        draw_clusters(setting.out / file, group.largest(SHOWN))
        files[file] = f"The largest of {number} clusters of layer {layer}, a row each"
        measured = {}
        for fact, of in FACTS.items() if drawn else ():
            some = range(len(drawn)) if fact in ("background", "number") else alone
            measured[fact] = agreement(found[list(some)], [of(drawn[i]) for i in some])
        rows += [Row(f"layer {layer}", measured)] if measured else []
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


def figure7(setting: Setting) -> Result:
    """Other backbones: in miniature the bundled one, and the one of 12 blocks that Tables 7 to 9 train."""
    found = similarity(setting, "fig7")
    if setting.scale == "mini" and setting.encoder is None:
        part = deeper(setting)
        (place,) = train_parts([part], setting)
        other = _similarity(setting, "fig7_similarity_12.png", open_backbone(str(place)), "mini-12: ")
        found = Result(found.rows + other.rows, found.findings + other.findings, found.pictures | other.pictures)
        found.parts = minutes([part], setting)
    return found


figure8 = partial(clusters, id="fig8")


def _reading(backbone: Backbone, setting: Setting, count: int) -> Reading:
    return Reading(setting.source, backbone.image_size, count, BATCH, setting.seed)
