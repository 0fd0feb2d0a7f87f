"""`dualtoken analyze layers | clusters | feature-space | codebooks | cost`, for any backbone or tokenizer and pictures.

Pictures are looked at batch by batch in random order and let go of again. Each command writes NAME.json, with how it
was measured, and its pictures.
"""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dualtoken.analysis.clusters import Members, StreamedClusters
from dualtoken.analysis.codebooks import CodebookStatistics
from dualtoken.analysis.cost import Cost, check_both, mllm_costs, ratio, tokenizer_costs
from dualtoken.analysis.feature_space import Clouds, check_umap, embed, overlap
from dualtoken.analysis.layers import blocks, contrast, pooled_layers, stream_similarity, suggested_pixel_layer
from dualtoken.app.analysis_figures import draw_clouds, draw_depths, draw_similarities
from dualtoken.app.figures import draw_clusters
from dualtoken.app.look import Branches, Reading, backbone_of, device, kind_of, layers_of, small, tokenizer_of
from dualtoken.core.errors import UserError, at_least_one
from dualtoken.core.images import to_float
from dualtoken.eval.report import table, write_json
from dualtoken.mllm.config import DualTokenConfig
from dualtoken.mllm.presets import SHAPES, open_mllm
from dualtoken.tokenizer.presets import BUNDLED, meta_tokenizer, shapes

SHOWN, MEMBERS = 12, 8  # clusters in a picture, pictures of each
RULE = (
    "The layers are split into {parts} runs so that the mean cosine of pairs within a run, each layer with itself "
    "included, is highest; the suggested pixel layer is the last of the first run, the shallow one. Layers without "
    "structure give runs of one length: look at the cosines within and between runs."
)


def layers(
    backbones: str = "mini",
    data: str = "scenes",
    images: int = 1000,
    runs: int = 3,
    batch_size: int = 50,
    seed: int = 0,
    output: str = "analysis",
) -> dict[str, Any]:
    """How alike the layers of backbones are (equation 8), and which layer is suggested for pixels.

    Args:
        backbones: one, or several with commas between them: directories of tokenizers or image-text encoders, presets,
            or any other --encoder of train-tokenizer.
        data: "scenes" (unseen ones), a folder of pictures, webdataset shards, or "photographs".
        images: how many, at most.
        runs: parts that the layers are split into.
        seed: of the order of pictures.
        output: folder for layers.json and layers.png.
    """
    found, rows, result = {}, [], {}
    for name in _names(backbones, "--backbones"):
        backbone = backbone_of(name, "--backbones")
        reading = Reading(data, backbone.image_size, images, batch_size, seed)
        cosines = stream_similarity(backbone, (batch.images for batch in reading))
        parts = blocks(cosines, runs)
        layer, (within, between) = suggested_pixel_layer(parts), contrast(cosines, parts)
        found[name] = (cosines, parts, layer)
        said = ", ".join(f"{first}-{last}" for first, last in parts)
        rows.append((name, backbone.layers, said, layer, within, between))
        result[name] = {
            "layers": backbone.layers, "runs": parts, "suggested_pixel_layer": layer,
            "pixel_layer": backbone.pixel_layer, "cosine_within_runs": within, "cosine_between_runs": between,
            "cosines": cosines.tolist(), **reading.protocol,
        }  # fmt: skip
    print(table(("backbone", "layers", "runs", "pixel layer", "cosine within", "between runs"), rows))
    print(RULE.format(parts=runs))
    titles = _titles(found)
    draw_similarities(Path(output) / "layers.png", {titles[name]: value for name, value in found.items()})
    return _written(output, "layers", {"rule": RULE.format(parts=runs), "backbones": result})


def clusters(
    backbone: str = "mini",
    layers: str | None = None,
    data: str = "scenes",
    images: int = 2000,
    clusters: int = 48,
    batch_size: int = 50,
    seed: int = 0,
    output: str = "analysis",
) -> dict[str, Any]:
    """Pictures that layers put together: k-means of their features, mini-batch k-means beyond 4096 pictures.

    Args:
        backbone: directory of a tokenizer or image-text encoder, a preset, or any --encoder of train-tokenizer.
        layers: numbers with commas between them; without it the two layers that a tokenizer taps.
        data: "scenes" (unseen ones), a folder of pictures (its class folders are labels), shards, or "photographs".
        images: how many, at most; they are read twice.
        clusters: how many; the paper has 1000 at full scale.
        seed: of the order of pictures and the start of k-means.
        output: folder for clusters.json and a grid of pictures for each layer.
    """
    model = backbone_of(backbone, "--backbone")
    chosen, reading = layers_of(layers, model), Reading(data, model.image_size, images, batch_size, seed)
    learnt = [StreamedClusters(clusters, seed) for _ in chosen]
    for batch in reading:
        for one, features in zip(learnt, pooled_layers(model, [batch.images], chosen), strict=True):
            one.learn(features)
    for one in learnt:
        one.finish()
    groups = [Members(clusters, len(reading.source.classes), MEMBERS) for _ in chosen]
    for batch in reading:
        shown, pooled = small(batch.images), pooled_layers(model, [batch.images], chosen)
        for one, group, features in zip(learnt, groups, pooled, strict=True):
            group.add(one.assign(features), batch.labels.tolist(), shown)
    rows, result = [], {}
    for layer, group in zip(chosen, groups, strict=True):
        draw_clusters(Path(output) / f"clusters-layer-{layer}.png", group.largest(SHOWN))
        sizes = sorted(group.counts.tolist(), reverse=True)
        rows.append((layer, sizes[0], sizes[len(sizes) // 2], sum(size == 0 for size in sizes), group.agreement))
        result[str(layer)] = {"sizes": sizes, "agreement_with_labels": group.agreement}
    print(table(("layer", "largest", "median", "empty", "agreement with labels"), rows))
    print("Agreement is adjusted mutual information: 0 by chance, 1 for the same split.")
    kind = type(learnt[0].model).__name__
    protocol = reading.protocol | {"k-means": f"scikit-learn {kind}, {clusters} clusters"}
    return _written(output, "clusters", {"backbone": backbone, "layers": result, **protocol})


def feature_space(
    models: str = "mini",
    data: str = "scenes",
    images: int = 1000,
    width: int = 1024,
    quantized: bool = False,
    normalize: bool = False,
    batch_size: int = 50,
    seed: int = 0,
    output: str = "analysis",
) -> dict[str, Any]:
    """Pixel and semantic features in one map (UMAP), and how far both clouds overlap. Needs the extra `umap`.

    Args:
        models: one, or several with commas between them: directories of tokenizers, presets, or backbones. A+B takes
            the pixel features of A and the semantic features of B: two separate encoders.
        data: "scenes" (unseen ones), a folder of pictures, webdataset shards, or "photographs".
        images: how many, at most; the paper has 1000.
        width: to which flattened features are averaged.
        quantized: features from the codes, as the language model gets them, in place of the layers'.
        normalize: bring every picture's features to mean 0 and deviation 1, so that scale does not part the clouds.
        seed: of the order of pictures and of the map.
        output: folder for feature_space.json and feature_space.png.
    """
    wanted = {name: name.split("+") for name in _names(models, "--models")}
    for name, listed in wanted.items():
        if len(listed) > 2:
            raise UserError(f"--models {name}: A+B takes two encoders, {len(listed)} are given")
    check_umap()
    found, rows, result = {}, [], {}
    for name, listed in wanted.items():
        pair = [Branches(one, quantized, "--models") for one in listed]
        readings = [Reading(data, one.size, images, batch_size, seed) for one in pair]
        clouds = Clouds(images, width)
        for batches in zip(*readings, strict=True):
            both = [one(batch.images) for one, batch in zip(pair, batches, strict=True)]
            clouds.add(both[0][0], both[-1][1])
        first, second = clouds.rows(normalize)
        points = embed(torch.cat([first, second]), seed)
        maps = points[: len(first)], points[len(first) :]
        numbers = {"overlap": overlap(first, second), "overlap_in_the_map": overlap(*maps)}
        found[name] = (*maps, numbers["overlap_in_the_map"])
        rows.append((name, clouds.pictures, *numbers.values()))
        result[name] = numbers | readings[0].protocol
    print(table(("model", "pictures", "overlap", "in the map"), rows))
    print("Overlap: neighbours of the other kind over their share by chance; 0 apart, 1 as one cloud.")
    titles = _titles(found)
    found = {titles[name]: clouds for name, clouds in found.items()}
    draw_clouds(Path(output) / "feature_space.png", found, ("pixel features", "semantic features"))
    settings = {"width": width, "quantized": quantized, "normalize": normalize, "seed": seed}
    return _written(output, "feature_space", {"models": result, **settings})


@torch.inference_mode()
def codebooks(
    model: str = "mini",
    data: str = "scenes",
    images: int = 1000,
    batch_size: int = 50,
    seed: int = 0,
    output: str = "analysis",
) -> dict[str, Any]:
    """Use, entropy and perplexity of both vocabularies by depth, and what one says of the other and of labels.

    Args:
        model: directory of a tokenizer, or a preset.
        data: "scenes" (unseen ones), a folder of pictures (its class folders are labels), shards, or "photographs".
        images: how many, at most.
        seed: of the order of pictures, which makes the pairs by chance.
        output: folder for codebooks.json and codebooks.png.
    """
    tokenizer = tokenizer_of(model)
    reading = Reading(data, tokenizer.image_size, images, batch_size, seed)
    counted = CodebookStatistics(tokenizer, len(reading.source.classes), seed=seed)
    for batch in reading:
        counted.add(tokenizer.encode(to_float(batch.images.to(tokenizer.device))), batch.labels)
    found, rows = counted.result(), []
    for name, one in found["vocabularies"].items():
        for depth, values in enumerate(zip(one.usage, one.entropy, one.perplexity, strict=True), 1):
            rows.append((f"{name}, depth {depth}", *values))
    print(table(("vocabulary", "codes used", "entropy [bits]", "perplexity"), rows))
    told = {"pixel and semantic code of a position": found["between"]}
    told |= {f"{name} code and label": value for name, value in found["labels"].items()}
    rows = [(name, one.bits, one.by_chance, one.at_most) for name, one in told.items()]
    print(table(("mutual information at the first depth [bits]", "measured", "by chance", "at most"), rows))
    vocabularies = found["vocabularies"]
    most = {name: float(np.log2(one.codebook_size)) for name, one in vocabularies.items()}
    draw_depths(Path(output) / "codebooks.png", {name: one.entropy for name, one in vocabularies.items()}, most)
    groups = {name: int(of.max()) + 1 for name, of in counted.groups.items()}
    result = {
        "model": model, "vocabularies": {name: asdict(one) for name, one in vocabularies.items()},
        "mutual_information": {name: asdict(one) for name, one in told.items()},
        "groups": groups, "labelled": counted.labelled, **reading.protocol,
    }  # fmt: skip
    return _written(output, "codebooks", result)


def cost(
    model: str = "mini", text: int = 64, training: bool = False, repeats: int = 5, output: str = "analysis"
) -> dict[str, Any]:
    """Parameters, operations, memory and time of a tokenizer, and of a language model with one vocabulary and with two.

    Args:
        model: a preset, the directory of a tokenizer or multimodal model, or a shape by name (paper-3b, siglip-l-256)
            that is counted without weights, so without times.
        text: tokens of the prompt.
        training: also a step with gradients, of weights that all learn.
        repeats: of which times are the median.
        output: folder for cost.json.
    """
    at_least_one(text=text, repeats=repeats)
    kind = kind_of(model)
    if model in SHAPES:
        mllm = SHAPES[model].build()
        tokenizer = mllm.vision_tokenizer
    elif model in shapes():
        mllm, tokenizer = None, meta_tokenizer(model)
    elif model in BUNDLED or kind == DualTokenConfig.model_type:
        mllm = open_mllm(model)[0].to(device())
        tokenizer = mllm.vision_tokenizer
    else:
        mllm, tokenizer = None, tokenizer_of(model)
    check_both(mllm)
    parts = tokenizer_costs(tokenizer, 1, repeats)
    print(table(("tokenizer, one image", *COST), [(name, *_cost_row(one)) for name, one in parts.items()]))
    result: dict[str, Any] = {"tokenizer": {name: asdict(one) for name, one in parts.items()}}
    if mllm is not None:
        found, rows = mllm_costs(mllm, text, training, repeats), []
        for name, both in found.items():
            rows += [(f"{name}, {token} token", *_cost_row(one)) for token, one in both.items()]
            times = [ratio(both, field) for field in ("parameters", "flops", "memory", "seconds")]
            rows.append(("  dual / single", *(None if value is None else round(value, 4) for value in times)))
        print("\n" + table((f"language model, {text} tokens of text", *COST), rows))
        result["language_model"] = {
            name: {token: asdict(one) for token, one in both.items()} for name, both in found.items()
        }
    place = next(tokenizer.parameters()).device.type
    hardware = torch.cuda.get_device_name() if place == "cuda" else place
    protocol = {"device": hardware, "threads": torch.get_num_threads(), "repeats": repeats, "text": text, "batch": 1}
    return _written(output, "cost", {"model": model, **result, **protocol})


COST = ("parameters [M]", "GFLOPs", "memory [MB]", "time [ms]")


def _cost_row(one: Cost) -> tuple[float | None, ...]:
    seconds = None if one.seconds is None else 1e3 * one.seconds
    return one.parameters / 1e6, one.flops / 1e9, one.memory / 1e6, seconds


def _names(listed: str, option: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in listed.split(",") if name.strip()))
    if not names:
        raise UserError(f"{option} is empty: give a directory or preset")
    return names


def _titles(names: Iterable[str]) -> dict[str, str]:
    """Names by the last parts of their paths, as many as tell them apart."""
    listed = {name: [Path(one).parts for one in name.split("+")] for name in names}
    for parts in range(1, max(len(path) for paths in listed.values() for path in paths) + 1):
        found = {name: "+".join("/".join(path[-parts:]) for path in paths) for name, paths in listed.items()}
        if len(set(found.values())) == len(found):
            break
    return found


def _written(output: str, name: str, result: dict[str, Any]) -> dict[str, Any]:
    write_json(Path(output) / f"{name}.json", result)
    return result
