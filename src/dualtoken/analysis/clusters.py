"""Which pictures a layer puts together: k-means of its features (paper Fig. 3 right, Fig. 8, appendix F.2)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score
from torch import Tensor

from dualtoken.core.errors import UserError


def cluster(features: Tensor, clusters: int, seed: int = 0) -> np.ndarray:
    """Cluster of each picture, int [M], by k-means of features [M, C] averaged over the positions.

    Raises UserError for more clusters than pictures.
    """
    if not 1 <= clusters <= len(features):
        raise UserError(f"{clusters} clusters of {len(features)} pictures: give at most one a picture")
    return KMeans(clusters, n_init=4, random_state=seed).fit_predict(features.numpy())


def agreement(assigned: np.ndarray, labels: Sequence[Any]) -> float:
    """Adjusted mutual information of clusters and what is known of the pictures: 0 by chance, 1 for the same split."""
    return float(adjusted_mutual_info_score([str(label) for label in labels], assigned))


def largest(assigned: np.ndarray, count: int, members: int) -> list[np.ndarray]:
    """Numbers of up to `members` pictures of each of the `count` largest clusters that have so many."""
    order = np.argsort(-np.bincount(assigned), kind="stable")
    found = [np.flatnonzero(assigned == one) for one in order]
    return [pictures[:members] for pictures in found if len(pictures) >= members][:count]
