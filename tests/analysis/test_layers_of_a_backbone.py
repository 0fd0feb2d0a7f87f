"""Similarity of layers, their runs, and clusters of pictures."""

import numpy as np
import pytest
import torch

from dualtoken.analysis.clusters import StreamedClusters, agreement
from dualtoken.analysis.layers import blocks, contrast, layer_similarity, pooled_layers
from dualtoken.core.errors import UserError
from dualtoken.core.images import to_float
from tests import tiny


def test_pooled_layers_are_the_means_of_the_taps():
    backbone = tiny.tokenizer().backbone.eval()
    images = torch.randint(0, 256, (5, 3, tiny.SIZE, tiny.SIZE), dtype=torch.uint8)
    found = pooled_layers(backbone, [images[:3], images[3:]])
    assert found.shape == (backbone.layers, 5, backbone.width)
    with torch.no_grad():
        last = backbone.taps(to_float(images), (backbone.layers,))[0][:, backbone.prefix :].mean(1)
    assert torch.allclose(found[-1], last, atol=1e-6)
    assert torch.allclose(pooled_layers(backbone, [images], (1,))[0], found[0], atol=1e-6)
    with pytest.raises(UserError, match="no pictures"):
        pooled_layers(backbone, [])


def test_similarity_is_the_mean_cosine_of_each_pair():
    pooled = torch.randn(4, 7, 9, generator=torch.Generator().manual_seed(0))
    found = layer_similarity(pooled)
    by_hand = torch.nn.functional.cosine_similarity(pooled[1], pooled[3], dim=-1).mean()
    assert torch.allclose(found.diagonal(), torch.ones(4)) and torch.allclose(found, found.t())
    assert torch.allclose(found[1, 3], by_hand)


def test_runs_are_found_where_they_are():
    truth = [(1, 3), (4, 8), (9, 10)]
    similarity = torch.full((10, 10), 0.2)
    for first, last in truth:
        similarity[first - 1 : last, first - 1 : last] = 0.9
    similarity.fill_diagonal_(1)
    assert blocks(similarity) == truth
    within, between = contrast(similarity, truth)
    assert within == pytest.approx(0.9) and between == pytest.approx(0.2)
    with pytest.raises(UserError, match="2 layers cannot be split into 3 runs"):
        blocks(torch.eye(2))


def test_clusters_agree_with_what_made_them():
    rng = torch.Generator().manual_seed(1)
    labels = torch.arange(60) % 4
    features = 10 * torch.eye(4)[labels] + torch.randn(60, 4, generator=rng)
    found = StreamedClusters(4)
    found.learn(features)
    found.finish()
    assigned = found.assign(features)
    assert agreement(assigned, labels.tolist()) > 0.95
    shuffled = np.random.default_rng(0).permutation(labels.numpy())
    assert abs(agreement(assigned, shuffled.tolist())) < 0.2
