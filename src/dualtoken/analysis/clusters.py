"""Which pictures a layer puts together: k-means of its features (paper Fig. 3 right, Fig. 8, appendix F.2).

`StreamedClusters` and `Members` take features batch by batch, in two passes, and hold nothing that grows with the
number of pictures.

Shapes: M pictures, B pictures of a batch, C width, K clusters, L labels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import entropy
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.metrics import adjusted_mutual_info_score, mutual_info_score
from sklearn.metrics.cluster import expected_mutual_information
from torch import Tensor

from dualtoken.core.errors import UserError

CHUNK = 4096  # features that a step of mini-batch k-means sees at least


def _check(clusters: int, pictures: int) -> None:
    if not 1 <= clusters <= pictures:
        raise UserError(f"{clusters} clusters of {pictures} pictures: give at most one a picture")


class StreamedClusters:
    """k-means of features that come batch by batch: `learn` each, then `finish`, then `assign`.

    Up to max(CHUNK, 10 clusters) features it is plain k-means; of more, mini-batch k-means in steps of so
    many. Let the batches come in random order: each step should see what the whole is like.
    """

    def __init__(self, clusters: int, seed: int = 0):
        self.clusters, self.seed, self.pictures = clusters, seed, 0
        self.chunk = max(CHUNK, 10 * clusters)
        self.held: list[np.ndarray] = []
        self.model: KMeans | MiniBatchKMeans | None = None

    def learn(self, features: Tensor) -> None:
        """One more batch [B, C]."""
        self.held.append(features.float().cpu().numpy())
        self.pictures += len(features)
        if sum(len(part) for part in self.held) > self.chunk:
            self._step()

    def finish(self) -> None:
        """All were seen. Raises UserError for more clusters than pictures."""
        _check(self.clusters, self.pictures)
        if self.model is None:
            self.model = KMeans(self.clusters, n_init=4, random_state=self.seed).fit(np.concatenate(self.held))
        elif self.held:
            self._step()
        self.held = []

    def assign(self, features: Tensor) -> np.ndarray:
        """Cluster of each picture of a batch [B, C] -> int [B]."""
        return self.model.predict(features.float().cpu().numpy())

    def _step(self) -> None:
        if self.model is None:
            self.model = MiniBatchKMeans(self.clusters, random_state=self.seed, batch_size=self.chunk)
        self.model.partial_fit(np.concatenate(self.held))
        self.held = []


class Members:
    """What is in K clusters: how many pictures, which labels, and the first few pictures themselves."""

    def __init__(self, clusters: int, labels: int, members: int):
        self.counts = np.zeros(clusters, np.int64)
        self.table = np.zeros((clusters, labels), np.int64)
        self.most, self.first = members, [[] for _ in range(clusters)]

    def add(self, assigned: np.ndarray, labels: Sequence[int], pictures: Tensor) -> None:
        """A batch: clusters [B], labels [B] with -1 for none, and pictures uint8 [B, 3, s, s] to be shown."""
        self.counts += np.bincount(assigned, minlength=len(self.counts))
        for one, label, picture in zip(assigned, labels, pictures, strict=True):
            if label >= 0:
                self.table[one, label] += 1
            if len(self.first[one]) < self.most:
                self.first[one].append(picture.clone())

    def largest(self, count: int) -> list[Tensor]:
        """The first pictures [k, 3, s, s] of each of the `count` largest clusters."""
        order = np.argsort(-self.counts, kind="stable")[:count]
        return [torch.stack(self.first[one]) for one in order if self.first[one]]

    @property
    def agreement(self) -> float | None:
        """Of clusters and labels, as `agreement`; None without labels."""
        return table_agreement(self.table) if self.table.any() else None


def agreement(assigned: np.ndarray, labels: Sequence[Any]) -> float:
    """Adjusted mutual information of clusters and what is known of the pictures: 0 by chance, 1 for the same split."""
    return float(adjusted_mutual_info_score([str(label) for label in labels], assigned))


def table_agreement(table: np.ndarray) -> float:
    """The same from how often each cluster met each label, int [K, L]."""
    table = table[table.any(1)][:, table.any(0)]
    if 1 in table.shape:
        return float(table.shape == (1, 1))
    chance = expected_mutual_information(table, int(table.sum()))
    mean = (entropy(table.sum(0)) + entropy(table.sum(1))) / 2
    return float((mutual_info_score(None, None, contingency=table) - chance) / (mean - chance))
