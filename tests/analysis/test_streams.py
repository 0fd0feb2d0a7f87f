"""Analyses batch by batch equal those of everything at once, and what outside implementations give."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score, mutual_info_score

from dualtoken.analysis.clusters import Members, StreamedClusters, table_agreement
from dualtoken.analysis.codebooks import (
    CodebookStatistics,
    PairCounts,
    code_groups,
    entropy,
    mutual_information,
)
from dualtoken.analysis.feature_space import Clouds, embed, overlap
from dualtoken.analysis.layers import (
    blocks,
    layer_similarity,
    pooled_layers,
    stream_similarity,
    suggested_pixel_layer,
)
from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError
from dualtoken.tokenizer.quantizer import usage_and_perplexity
from tests import tiny


def blobs(count, centers=5, width=6, seed=0):
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, centers, (count,), generator=rng)
    places = 8 * torch.randn(centers, width, generator=torch.Generator().manual_seed(7))
    return places[labels] + torch.randn(count, width, generator=rng), labels


def inertia(features, assigned):
    parts = [features[assigned == one] for one in np.unique(assigned)]
    return sum(float((part - part.mean(0)).square().sum()) for part in parts)


def learnt(features, clusters, chunk=None):
    found = StreamedClusters(clusters)
    found.chunk = chunk or found.chunk
    for part in features.split(50):
        found.learn(part)
    found.finish()
    return found


def test_similarity_batch_by_batch_is_that_of_all_pictures():
    backbone = tiny.tokenizer().backbone
    images = torch.randint(0, 256, (7, 3, tiny.SIZE, tiny.SIZE), dtype=torch.uint8)
    found = stream_similarity(backbone, iter(images.split(3)))
    torch.testing.assert_close(found, layer_similarity(pooled_layers(backbone, [images])))
    with pytest.raises(UserError, match="no pictures"):
        stream_similarity(backbone, [])


def test_the_pixel_layer_is_the_end_of_the_shallow_run():
    similarity = torch.full((9, 9), 0.1)
    for first, last in ((1, 4), (5, 7), (8, 9)):
        similarity[first - 1 : last, first - 1 : last] = 0.9
    assert suggested_pixel_layer(blocks(similarity)) == 4


def test_inertia_of_streamed_clusters_is_near_that_of_scikit_learn():
    features, _ = blobs(1500)
    best = KMeans(5, n_init=10, random_state=1).fit(features.numpy()).inertia_
    whole, stream = learnt(features, 5), learnt(features, 5, chunk=300)
    assert type(whole.model).__name__ == "KMeans" and type(stream.model).__name__ == "MiniBatchKMeans"
    assert inertia(features, whole.assign(features)) == pytest.approx(best, rel=1e-4)
    assert best <= inertia(features, stream.assign(features)) * (1 + 1e-6)
    assert inertia(features, stream.assign(features)) < 1.5 * best
    noise = inertia(features, np.arange(len(features)) % 5)
    assert noise > 10 * best  # a bad split is told from a good one
    with pytest.raises(UserError, match="8 clusters of 5 pictures"):
        learnt(features[:5], 8)


def test_members_keep_a_few_pictures_and_agree_with_labels():
    features, labels = blobs(400)
    found = learnt(features, 6)
    members = Members(6, 5, 3)
    pictures = torch.arange(400, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    for rows in torch.arange(400).split(64):
        members.add(found.assign(features[rows]), labels[rows].tolist(), pictures[rows])
    assigned = found.assign(features)
    assert members.counts.tolist() == np.bincount(assigned, minlength=6).tolist()
    assert members.agreement == pytest.approx(adjusted_mutual_info_score(labels, assigned), abs=1e-6)
    assert [len(group) for group in members.largest(2)] == [3, 3]
    biggest = np.flatnonzero(assigned == np.argmax(members.counts))
    assert members.largest(1)[0][:, 0, 0, 0].tolist() == [int(i) % 256 for i in biggest[:3]]
    assert Members(2, 0, 1).agreement is None
    shuffled = np.random.default_rng(0).permutation(labels)
    table = np.zeros((6, 5), np.int64)
    np.add.at(table, (assigned, shuffled), 1)
    assert table_agreement(table) == pytest.approx(adjusted_mutual_info_score(shuffled, assigned), abs=1e-6)
    assert abs(table_agreement(table)) < 0.05


def test_entropy_and_information_equal_scikit_learn_and_known_values():
    rng = np.random.default_rng(3)
    first = rng.integers(0, 4, (30, 9))
    second = (first + (rng.random((30, 9)) < 0.3)) % 5
    pairs = PairCounts(4, 5)
    for rows in (slice(0, 10), slice(10, 30)):
        pairs.add(torch.from_numpy(first[rows]), torch.from_numpy(second[rows]))
    wanted = mutual_info_score(first.ravel(), second.ravel()) / np.log(2)
    assert pairs.information.bits == pytest.approx(wanted, abs=1e-9)
    assert pairs.information.by_chance < 0.3 * wanted
    assert entropy(torch.tensor([[5, 5, 5, 5], [9, 0, 0, 0]])).tolist() == [2.0, 0.0]
    assert mutual_information(torch.eye(8, dtype=torch.int64)) == pytest.approx(3)
    assert mutual_information(torch.ones(8, 8, dtype=torch.int64)) == pytest.approx(0)


def test_codebook_statistics_batch_by_batch():
    model = tiny.tokenizer()
    rng = torch.Generator().manual_seed(0)
    codes = DualCodes(*(torch.randint(0, 9, (20, 4, 2), generator=rng) for _ in range(2)))
    codes.semantic[..., 0] = codes.pixel[..., 0]  # at the first depth one vocabulary says all of the other
    labels = torch.arange(20) % 3 - 1
    counted = CodebookStatistics(model, labels=2)
    for rows in torch.arange(20).split(7):
        counted.add(codes[rows], labels[rows])
    found = counted.result()
    for name in ("pixel", "semantic"):
        usage, perplexity = usage_and_perplexity(getattr(codes, name), 16)
        one = found["vocabularies"][name]
        assert one.usage == pytest.approx(usage.tolist()) and one.perplexity == pytest.approx(perplexity.tolist())
        assert one.used == len(getattr(codes, name).unique()) / 16
        assert found["labels"][name].bits < 1.0  # two labels
    between = found["between"]
    assert between.bits == pytest.approx(found["vocabularies"]["pixel"].entropy[0]) and between.bits == between.at_most
    assert between.by_chance < 0.6 * between.bits
    assert counted.pictures == 20 and counted.labelled == int((labels >= 0).sum())
    assert CodebookStatistics(model).result()["labels"] == {}


def test_many_codes_are_grouped_with_those_near_them():
    quantizer = tiny.tokenizer().pixel.quantizer
    assert code_groups(quantizer).tolist() == list(range(16))
    groups = code_groups(quantizer, groups=4)
    assert groups.shape == (16,) and 1 < len(groups.unique()) <= 4
    rows = quantizer.lookup(torch.arange(16)[:, None])
    assert inertia(rows, groups.numpy()) < inertia(rows, np.arange(16) % 4)


def test_overlap_tells_mixed_clouds_from_disjoint_ones():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(200, 2)), rng.normal(size=(100, 2))
    assert overlap(first, second) == pytest.approx(1, abs=0.1)
    assert overlap(first, second + 50) == 0


def test_clouds_stop_at_their_size_and_may_be_of_any_shape():
    clouds = Clouds(5, 8)
    for _ in range(3):
        clouds.add(torch.randn(3, 4, 16), torch.randn(3, 9, 30))
    first, second = clouds.rows()
    assert first.shape == second.shape == (5, 8) and clouds.pictures == 5
    scaled = Clouds(5, 8)
    features = torch.randn(5, 4, 16)
    scaled.add(features, 100 * features)
    assert torch.allclose(*scaled.rows(normalize=True), atol=1e-3)
    whole = Clouds(1, 64)
    whole.add(features[:1], features[:1])
    assert torch.allclose(whole.rows()[0], features[:1].flatten(1))  # nothing is averaged


def test_a_map_keeps_groups_apart():
    with pytest.raises(UserError, match="3 points"):
        embed(torch.randn(3, 4))
    pytest.importorskip("umap")
    features, labels = blobs(60, centers=2)
    points = embed(features, seed=0)
    assert points.shape == (60, 2) and overlap(points[labels == 0], points[labels == 1]) < 0.2
    assert np.array_equal(points, embed(features, seed=0))
