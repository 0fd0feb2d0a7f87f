"""How alike the layers of a backbone are, and where its shallow part ends (paper Fig. 3 left, Fig. 7, appendix F.1).

Shapes: L layers, M pictures, C width of the backbone.
"""

from collections.abc import Iterable, Sequence
from itertools import combinations, pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from dualtoken.core.errors import UserError
from dualtoken.core.images import to_float
from dualtoken.tokenizer.backbone import Backbone


@torch.no_grad()
def pooled_layers(backbone: Backbone, batches: Iterable[Tensor], layers: Sequence[int] | None = None) -> Tensor:
    """Features averaged over the positions: batches of uint8 [B, 3, S, S] -> float32 [L, M, C] on the CPU.

    Args: layers: which, ascending, counted from 1; None = all.
    Raises UserError where there are no pictures.
    """
    chosen = tuple(layers or range(1, backbone.layers + 1))
    device = next(backbone.parameters()).device
    parts = []
    for images in batches:
        found = backbone.taps(to_float(images.to(device)), chosen)
        parts.append(torch.stack([x[:, backbone.prefix :].float().mean(1) for x in found]))
    if not parts:
        raise UserError("no pictures to compare layers with")
    return torch.cat([part.cpu() for part in parts], 1)


def stream_similarity(backbone: Backbone, batches: Iterable[Tensor]) -> Tensor:
    """`layer_similarity` of all layers over batches of uint8 [B, 3, S, S], one in memory at a time -> [L, L].

    Raises UserError where there are no pictures.
    """
    total, pictures = torch.zeros(backbone.layers, backbone.layers, dtype=torch.float64), 0
    for images in batches:
        pooled = pooled_layers(backbone, [images])
        total += layer_similarity(pooled).double() * pooled.shape[1]
        pictures += pooled.shape[1]
    if not pictures:
        raise UserError("no pictures to compare layers with")
    return (total / pictures).float()


def layer_similarity(pooled: Tensor) -> Tensor:
    """Cosine of every pair of layers, averaged over the pictures (eq. 8): [L, M, C] -> [L, L]."""
    unit = F.normalize(pooled, dim=-1)
    return torch.einsum("kmc,lmc->kl", unit, unit) / pooled.shape[1]


def blocks(similarity: Tensor, parts: int = 3) -> list[tuple[int, int]]:
    """The split of L layers into so many runs whose inner similarity is highest: first and last layer, from 1.

    The paper reads its runs off the picture; here they maximise the mean similarity of pairs within a run, over all
    runs. A layer and itself count as a pair, so layers without structure fall into runs of one length.
    Raises UserError where there are fewer layers than runs.
    """
    layers = len(similarity)
    if not 1 <= parts <= layers:
        raise UserError(f"{layers} layers cannot be split into {parts} runs")

    def inner(cuts: tuple[int, ...]) -> float:
        ends = (0, *cuts, layers)
        squares = [similarity[a:b, a:b] for a, b in pairwise(ends)]
        return float(sum(square.sum() for square in squares) / sum(square.numel() for square in squares))

    best = max(combinations(range(1, layers), parts - 1), key=inner)
    ends = (0, *best, layers)
    return [(a + 1, b) for a, b in pairwise(ends)]


def suggested_pixel_layer(runs: Sequence[tuple[int, int]]) -> int:
    """Where to tap a backbone for pixels: the last layer of its first run, the shallow one (section 3.1, Fig. 3).

    The deepest layer that is still like the layers right behind the embedding: it has seen most of what the shallow
    part makes of a picture, and nothing of what comes after it.
    """
    return runs[0][1]


def contrast(similarity: Tensor, runs: list[tuple[int, int]]) -> tuple[float, float]:
    """Mean similarity of different layers of one run, and of layers of different runs."""
    run = torch.tensor([number for number, (first, last) in enumerate(runs) for _ in range(last - first + 1)])
    same = run[:, None] == run[None]
    other = ~torch.eye(len(run), dtype=torch.bool)
    within, between = similarity[same & other], similarity[~same]
    return float(within.mean()), float(between.mean())
