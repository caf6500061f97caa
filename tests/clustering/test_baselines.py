"""The baselines' clusterings, against plain references."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from atc_diffusion import bipartite_labels
from atc_diffusion.clustering.baselines import dpc_knn_labels, kmedoids_labels
from atc_diffusion.vit.reduce import prune_labels
from tests.helpers.labels import assert_valid

SIZES = (st.integers(0, 2**32 - 1), st.integers(1, 40), st.floats(0, 1))


def draw(seed: int, num_tokens: int, fraction: float) -> tuple[Tensor, int]:
    tokens = torch.randn(2, num_tokens, 6, generator=torch.Generator().manual_seed(seed))
    return tokens, 1 + round(fraction * (num_tokens - 1))


def canonical(names: list[int]) -> list[int]:
    """Number names in the order in which they first appear."""
    seen = list(dict.fromkeys(names))
    return [seen.index(name) for name in names]


def nearest(distance: list[list[float]], token: int, centers: list[int]) -> int:
    return token if token in centers else min(centers, key=lambda center: distance[token][center])


def reference_kmedoids(tokens: Tensor, num_clusters: int, weights: list[float] | None, iterations: int) -> list[int]:
    everyone = range(len(tokens))
    distance = [[math.dist(a, b) for b in tokens.tolist()] for a in tokens.tolist()]
    if weights is None:
        total = [sum(row) or 1.0 for row in distance]
        first = sorted(everyone, key=lambda i: sum(distance[i][j] / total[j] for j in everyone))
    else:
        first = sorted(everyone, key=lambda i: -weights[i])
    weight = weights or [1.0] * len(tokens)
    medoids = first[:num_clusters]
    for _ in range(iterations):
        joined = [nearest(distance, i, medoids) for i in everyone]
        members = [[i for i in everyone if joined[i] == medoid] for medoid in medoids]
        medoids = [min(own, key=lambda i: sum(weight[j] * distance[i][j] for j in own)) for own in members]
    return canonical([nearest(distance, i, medoids) for i in everyone])


def reference_dpc_knn(tokens: Tensor, num_clusters: int, neighbors: int) -> list[int]:
    everyone = range(len(tokens))
    distance = [[math.dist(a, b) / math.sqrt(tokens.shape[1]) for b in tokens.tolist()] for a in tokens.tolist()]
    near = [sorted(row)[:neighbors] for row in distance]
    density = [math.exp(-sum(d * d for d in row) / len(row)) for row in near]
    farthest = max(max(row) for row in distance)
    separation = [
        min((distance[i][j] for j in everyone if (density[j], i) > (density[i], j)), default=farthest) for i in everyone
    ]
    centers = sorted(everyone, key=lambda i: -density[i] * separation[i])[:num_clusters]
    return canonical([nearest(distance, i, centers) for i in everyone])


@given(*SIZES, st.booleans(), st.integers(0, 4))
def test_kmedoids_equals_its_definition(seed, num_tokens, fraction, weighted, iterations):
    tokens, num_clusters = draw(seed, num_tokens, fraction)
    weights = torch.rand(2, num_tokens, generator=torch.Generator().manual_seed(seed)) + 0.1 if weighted else None
    labels = kmedoids_labels(tokens, num_clusters, weights, iterations)
    for i in range(2):
        own = None if weights is None else weights[i].tolist()
        assert labels[i].tolist() == reference_kmedoids(tokens[i].double(), num_clusters, own, iterations)


@given(*SIZES, st.integers(1, 6))
def test_dpc_knn_equals_its_definition(seed, num_tokens, fraction, neighbors):
    tokens, num_clusters = draw(seed, num_tokens, fraction)
    labels = dpc_knn_labels(tokens, num_clusters, neighbors)
    for i in range(2):
        assert labels[i].tolist() == reference_dpc_knn(tokens[i].double(), num_clusters, neighbors)


def bipartite(tokens: Tensor, num_clusters: int, **options: Any) -> Tensor:
    return bipartite_labels(tokens, num_clusters, **{"destinations": torch.tensor([5])} | options)


CLUSTERINGS = [bipartite, kmedoids_labels, dpc_knn_labels]


@pytest.mark.parametrize("cluster", CLUSTERINGS)
@pytest.mark.parametrize("num_clusters", [1, 3, 8])
@pytest.mark.parametrize("value", [1.0, 0.0, 3e38, math.nan, math.inf, -math.inf])
def test_degenerate_tokens_still_give_every_cluster(cluster, num_clusters, value):
    tokens = torch.full((2, 8, 3), value)
    tokens[1, ::2] = torch.randn(4, 3)
    assert_valid(cluster(tokens, num_clusters), num_clusters)


@pytest.mark.parametrize("value", [0.0, -1.0, 3e38, math.nan, math.inf])
def test_degenerate_weights_still_give_every_cluster(value):
    weights = torch.tensor([[value], [1.0]]).repeat(1, 8)
    assert_valid(kmedoids_labels(torch.randn(2, 8, 3), 3, weights), 3)


@pytest.mark.parametrize("cluster", CLUSTERINGS)
@pytest.mark.parametrize(
    ("tokens", "num_clusters", "message"),
    [
        (torch.zeros(1, 8, 3), 0, "between 1 and the 8 tokens there are, got 0"),
        (torch.zeros(1, 8, 3), 9, "between 1 and the 8 tokens there are, got 9"),
        (torch.zeros(1, 8, 3), 2.5, "whole number, got 2.5"),
        (torch.zeros(8, 3), 2, r"\[B, N, C\], got torch.float32 \[8, 3\]"),
        (torch.zeros(8), 2, r"\[B, N, C\], got torch.float32 \[8\]"),
        (torch.zeros(1, 8, 3, dtype=torch.int64), 2, "got torch.int64"),
        ([[[0.0]]], 1, "got list"),
    ],
)
def test_bad_input_is_named(cluster, tokens, num_clusters, message):
    with pytest.raises(ValueError, match=message):
        cluster(tokens, num_clusters)


@pytest.mark.parametrize(
    ("cluster", "options", "message"),
    [
        (bipartite, {"destinations": torch.arange(3)}, "each of 3 destinations is a cluster, got num_clusters=2; ask"),
        (bipartite, {"destinations": torch.tensor([0, 0])}, r"distinct tokens from 0 to 7, got \[0, 0\]"),
        (bipartite, {"destinations": torch.tensor([8])}, r"distinct tokens from 0 to 7, got \[8\]"),
        (bipartite, {"destinations": torch.tensor([-1])}, r"distinct tokens from 0 to 7, got \[-1\]"),
        (bipartite, {"destinations": torch.tensor([], dtype=torch.int64)}, "at least one token, got none"),
        (bipartite, {"destinations": torch.zeros(2)}, r"int64 tensor \[D\], got torch.float32 \[2\]"),
        (bipartite, {"destinations": torch.zeros(1, 1, dtype=torch.int64)}, r"got torch.int64 \[1, 1\]"),
        (bipartite, {"destinations": [0, 1]}, r"int64 tensor \[D\], got \[0, 1\]"),
        (kmedoids_labels, {"iterations": -1}, "iterations must be a number from 0 up, got -1"),
        (kmedoids_labels, {"weights": torch.ones(8)}, r"weights must be a tensor \[1, 8\], got \[8\]"),
        (dpc_knn_labels, {"neighbors": 0}, "neighbors must be a whole number from 1 up, got 0"),
    ],
)
def test_bad_options_are_named(cluster, options, message):
    with pytest.raises(ValueError, match=message):
        cluster(torch.zeros(1, 8, 3), 2, **options)


@pytest.mark.parametrize("num_kept", [1, 4, 6])
def test_pruning_keeps_the_highest_scores(num_kept):
    scores = torch.rand(3, 7)
    labels, is_rest = prune_labels(scores, num_kept)
    for row, rest, score in zip(labels, is_rest, scores, strict=True):
        kept = set(score.argsort(descending=True)[:num_kept].tolist())
        assert row.tolist() == canonical([i if i in kept else -1 for i in range(7)])
        assert {i for i in range(7) if not rest[row[i]]} == kept
