"""Do two kinds of features share a space? Both as points of one UMAP (paper Fig. 6, section 4.3, appendix F.3).

Shapes: B pictures of a batch, M points, N positions, C width.
"""

import warnings
from importlib.util import find_spec

import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.nn import functional as F

from dualtoken.core.errors import UserError

NEIGHBORS = 15  # of UMAP, and of `overlap`


def flat(features: Tensor, width: int) -> Tensor:
    """Features [B, N, C] of a picture as one row: flattened, then averaged to a common width (F.3) -> [B, width]."""
    return F.adaptive_avg_pool1d(features.float().flatten(1)[:, None], width)[:, 0]


def alike(features: Tensor) -> Tensor:
    """Rows [M, width] with mean 0 and deviation 1 each, so that the scale of an encoder does not tell it apart."""
    return F.layer_norm(features, features.shape[-1:])


def check_umap() -> None:
    """Raise UserError without umap-learn: best before the features are made."""
    if find_spec("umap") is None:
        raise UserError("the map of features needs the package umap-learn: pip install 'dualtoken[umap]'")


def embed(features: Tensor, seed: int = 0) -> np.ndarray:
    """Points on a plane, float32 [M, 2], by UMAP of features [M, C].

    Raises UserError without umap-learn, and for fewer points than neighbours.
    """
    if len(features) <= NEIGHBORS:
        raise UserError(f"{len(features)} points: a map of them needs more than {NEIGHBORS}")
    check_umap()
    import umap

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="n_jobs value")  # a seed means one thread, and that is wanted
        return umap.UMAP(n_neighbors=NEIGHBORS, random_state=seed).fit_transform(features.cpu().numpy())


def overlap(first: np.ndarray | Tensor, second: np.ndarray | Tensor) -> float:
    """How far two clouds of M and M' points lie in one another: 0 apart, 1 mixed as if they were one.

    The share of each point's neighbours that are of the other cloud, over the share that chance would give.
    """
    points = np.concatenate([np.asarray(first), np.asarray(second)])
    cloud = np.repeat([0, 1], [len(first), len(second)])
    found = NearestNeighbors(n_neighbors=min(NEIGHBORS, len(points) - 1)).fit(points).kneighbors(return_distance=False)
    other = (cloud[found] != cloud[:, None]).mean(1)
    chance = (len(points) - np.bincount(cloud)[cloud]) / (len(points) - 1)
    return float((other / chance).mean())


class Clouds:
    """Rows of two kinds of features, batch by batch, up to `most` pictures: a map needs them all at once."""

    def __init__(self, most: int, width: int):
        self.most, self.width, self.parts = most, width, ([], [])

    @property
    def pictures(self) -> int:
        """How many were taken."""
        return sum(len(part) for part in self.parts[0])

    def add(self, first: Tensor, second: Tensor) -> None:
        """Both features of a batch, [B, N, C] each; N and C may differ."""
        left = self.most - self.pictures
        for rows, features in zip(self.parts, (first, second), strict=True):
            rows.append(flat(features[:left], self.width).cpu())

    def rows(self, normalize: bool = False) -> tuple[Tensor, Tensor]:
        """All rows of both, [M, width] each."""
        first, second = (torch.cat(part) for part in self.parts)
        return (alike(first), alike(second)) if normalize else (first, second)
