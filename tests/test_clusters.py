"""Clusters on the Gram matrix: against scikit-learn and the plain formulas, and what must always hold."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import AgglomerativeClustering, KMeans
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from lightning_prune import clusters
from lightning_prune.clusters import (
    average,
    churn,
    features,
    gram,
    inertia,
    kmeans,
    medoids,
    partition,
    reconstruct,
    representatives,
    ward,
)
from lightning_prune.errors import ConfigurationError


def vectors(layers: int, channels: int, length: int, seed: int = 0) -> Tensor:
    return torch.randn(layers, channels, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clustered(layers: int, centres: int, members: int, noise: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Well separated clusters in shuffled order, and the truth."""
    generator = torch.Generator().manual_seed(seed)
    means = 10 * torch.randn(layers, centres, 12, generator=generator, dtype=torch.float64)
    order = torch.stack([torch.randperm(centres * members, generator=generator) for _ in range(layers)])
    truth = order % centres
    points = means.gather(1, truth.unsqueeze(2).expand(-1, -1, 12))
    return points + noise * torch.randn(points.shape, generator=generator, dtype=torch.float64), truth


def plain_inertia(points: Tensor, labels: Tensor) -> Tensor:
    """The sum of squares, cluster by cluster, from the vectors themselves."""
    sums = []
    for layer, own in zip(points, labels, strict=True):
        groups = [layer[own == label] for label in own.unique()]
        sums.append(sum((group - group.mean(dim=0)).square().sum() for group in groups))
    return torch.stack(sums)  # type: ignore[arg-type]


def assert_partition(labels: Tensor, count: int) -> None:
    """Exactly so many clusters, none empty, numbered by their first channel."""
    assert labels.dtype == torch.int64
    for row in labels.tolist():
        assert list(dict.fromkeys(row)) == list(range(count))


@pytest.mark.parametrize("method", ["kmeans", "ward", "even", "imbalanced", "random"])
@pytest.mark.parametrize("count", [1, 2, 7, 11, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_method_makes_exactly_so_many_clusters(method: clusters.Method, count: int, dtype: torch.dtype) -> None:
    products = gram(vectors(3, 12, 5)).to(dtype)
    labels = partition(products, count, method, generator=torch.Generator().manual_seed(0))
    assert_partition(labels, count)
    assert torch.allclose(inertia(products, labels), plain_inertia(vectors(3, 12, 5), labels).to(dtype), atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 14).flatmap(
        lambda channels: st.tuples(
            st.integers(1, channels),
            # few values: many exact ties and duplicates
            st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), min_size=channels, max_size=channels),
        )
    ),
    st.booleans(),
    st.integers(1, 14),
)
def test_no_cluster_is_ever_empty_whatever_the_ties(
    case: tuple[int, list[tuple[int, int]]], warm: bool, before: int
) -> None:
    count, points = case
    products = gram(torch.tensor([points], dtype=torch.float32))
    start = partition(products, min(before, len(points)), "even") if warm else None
    labels = kmeans(products, count, start)
    assert_partition(labels, count)
    assert_partition(ward(products, count), count)
    if start is None and count >= len(set(points)):
        assert inertia(products, labels) == 0


def test_distances_are_those_of_the_vectors() -> None:
    points, labels = vectors(4, 20, 33), partition(gram(vectors(4, 20, 33)), 6, "even")
    counts, distances = clusters._distances(gram(points), labels, 6)
    for layer, label in itertools.product(range(4), range(6)):
        members = points[layer][labels[layer] == label]
        assert counts[layer, label] == len(members)
        wanted = (points[layer] - members.mean(dim=0)).square().sum(dim=1)
        assert torch.allclose(distances[layer, label], wanted, rtol=1e-12)


@pytest.mark.parametrize("count", [3, 8, 20, 29])
def test_kmeans_is_not_above_scikit_learns(count: int) -> None:
    points = vectors(6, 32, 40)
    ours = inertia(gram(points), kmeans(gram(points), count))
    theirs = torch.tensor([KMeans(count, n_init=1, random_state=0).fit(layer.numpy()).inertia_ for layer in points])
    assert ours.sum() <= 1.02 * theirs.sum()


def test_kmeans_finds_clusters_that_are_there() -> None:
    points, truth = clustered(5, centres=6, members=7)
    labels = kmeans(gram(points), 6)
    assert torch.equal(churn(labels, truth), torch.zeros(5, dtype=torch.float64))


def test_kmeans_is_below_the_splits_that_look_at_nothing() -> None:
    points, _ = clustered(5, centres=6, members=7)
    products = gram(points)
    for count in (4, 6, 12, 25):
        best = inertia(products, kmeans(products, count))
        for method in ("even", "imbalanced", "random"):
            other = partition(products, count, method, generator=torch.Generator().manual_seed(1))
            assert (best < inertia(products, other)).all()


@pytest.mark.parametrize("step", [clusters._lloyd_step, clusters._exchange_step])
def test_no_iteration_makes_the_sum_larger(step: clusters.Step) -> None:
    products = gram(vectors(8, 48, 10))
    labels = partition(products, 9, "even")
    sums = [inertia(products, labels)]
    for _ in range(15):
        labels = step(products, labels, 9)
        sums.append(inertia(products, labels))
    assert all((after <= before + 1e-9).all() for before, after in itertools.pairwise(sums))
    assert (sums[-1] < 0.9 * sums[0]).all()


def test_a_result_is_a_fixed_point_and_no_single_move_helps() -> None:
    products = gram(vectors(3, 10, 4))
    labels = kmeans(products, 4, iterations=100)
    assert torch.equal(kmeans(products, 4, labels), labels)
    sums = inertia(products, labels)
    for channel, goal in itertools.product(range(10), range(4)):
        moved = labels.clone()
        moved[:, channel] = goal
        assert (inertia(products, moved) >= sums - 1e-9).all()


def test_an_empty_cluster_takes_the_worst_placed_channel() -> None:
    points = torch.tensor([[[0.0], [1.0], [9.0], [20.0]]], dtype=torch.float64)
    labels = clusters._filled(torch.tensor([[0, 0, 0, 2]]), torch.tensor([[3.0, 2.0, 6.0, 0.0]]), 4)
    assert labels.tolist() == [[3, 0, 1, 2]]
    assert_partition(kmeans(gram(points), 3, torch.zeros(1, 4, dtype=torch.int64)), 3)


def test_layers_in_a_batch_do_not_see_each_other() -> None:
    points = vectors(5, 24, 7)
    points[1] = 0
    points[2] *= 1e4
    together = kmeans(gram(points), 13)
    alone = torch.cat([kmeans(gram(layer.unsqueeze(0)), 13) for layer in points])
    assert torch.equal(together, alone)


def test_warm_start_costs_no_quality_and_changes_little() -> None:
    points, _ = clustered(4, centres=8, members=4, noise=1.0)
    products = gram(points)
    labels = kmeans(products, 20)
    for count in (19, 16, 12, 8):
        labels = kmeans(products, count, labels)
        assert_partition(labels, count)
        assert (inertia(products, labels) <= 1.02 * inertia(products, kmeans(products, count))).all()
    drifted = gram(points + 0.01 * vectors(4, 32, 12, seed=3))
    assert (churn(labels, kmeans(drifted, 8, labels)) < 0.2).all()
    assert_partition(kmeans(products, 11, labels), 11)


def test_warm_starts_of_different_size_share_a_batch() -> None:
    products = gram(vectors(3, 16, 6))
    start = torch.cat([partition(products[:1], count, "even") for count in (12, 6, 3)])
    assert_partition(kmeans(products, 6, start), 6)


def test_equal_runs_give_equal_labels_and_the_global_random_state_stays() -> None:
    products, state = gram(vectors(3, 40, 9)), torch.get_rng_state()
    first = [partition(products, 17, method) for method in ("kmeans", "ward")]
    assert all(map(torch.equal, first, [partition(products, 17, method) for method in ("kmeans", "ward")]))
    partition(products, 17, "random", generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)


def test_all_clusters_and_duplicates_leave_everything_as_it_is() -> None:
    unique = vectors(1, 7, 5).float()
    points = unique[:, torch.tensor([0, 1, 2, 0, 3, 4, 4, 5, 6, 0, 2])]
    for method in ("kmeans", "ward"):
        labels = partition(gram(points), 7, method)
        assert inertia(gram(points), labels) == 0
        assert torch.equal(average(points[0], labels[0]), points[0])
        assert torch.equal(partition(gram(points), 11, method), torch.arange(11).unsqueeze(0))


@pytest.mark.parametrize("count", [1, 5, 17, 30])
def test_ward_is_scikit_learns(count: int) -> None:
    points = vectors(3, 30, 8)
    for layer, labels in zip(points, ward(gram(points), count), strict=True):
        theirs = AgglomerativeClustering(count, linkage="ward").fit(layer.numpy()).labels_
        assert adjusted_rand_score(theirs, labels.numpy()) == 1


def test_ward_is_nested() -> None:
    products = gram(vectors(2, 20, 6))
    for count in range(2, 20):
        fine, coarse = ward(products, count), ward(products, count - 1)
        for layer in range(2):
            pairs = set(zip(fine[layer].tolist(), coarse[layer].tolist(), strict=True))
            assert len(pairs) == count


def test_churn_is_one_minus_scikit_learns_index() -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randint(0, 5, (6, 30), generator=generator) for _ in range(2))
    wanted = [1 - adjusted_rand_score(*map(Tensor.numpy, pair)) for pair in zip(before, after, strict=True)]
    assert torch.allclose(churn(before, after), torch.tensor(wanted, dtype=torch.float64), atol=1e-12)
    for trivial in (torch.zeros(1, 4), torch.arange(4).unsqueeze(0), torch.zeros(1, 1)):
        assert churn(trivial, trivial) == 0


def test_the_projection_is_one() -> None:
    labels = kmeans(gram(vectors(1, 23, 4)), 9)[0]
    matrix = average(torch.eye(23, dtype=torch.float64), labels)
    one_hot = torch.nn.functional.one_hot(labels).double()
    assert torch.allclose(matrix, one_hot @ torch.linalg.inv(one_hot.T @ one_hot) @ one_hot.T, atol=1e-15)
    assert torch.allclose(matrix, matrix.T, atol=1e-15)
    assert torch.allclose(matrix @ matrix, matrix, atol=1e-15)
    assert torch.allclose(matrix.sum(dim=1), torch.ones(23, dtype=torch.float64), atol=1e-14)
    assert torch.linalg.matrix_rank(matrix) == 9
    identity = average(torch.eye(23), torch.arange(23))
    assert torch.equal(identity, torch.eye(23))


@pytest.mark.parametrize("shape", [(12,), (12, 5), (12, 3, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_reconstruction_makes_members_identical_and_happens_once(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype).requires_grad_()
    labels = partition(torch.eye(12).unsqueeze(0), 5, "random", generator=torch.Generator().manual_seed(0))[0]
    nearest = medoids(gram(weight.reshape(1, 12, -1)), labels.unsqueeze(0))[0]
    for merged in (reconstruct(weight, labels), reconstruct(weight, labels, medoids=nearest)):
        assert merged.shape == shape and merged.dtype == dtype and not merged.requires_grad
        assert len(merged.reshape(12, -1).unique(dim=0)) == 5
        assert torch.equal(merged, merged[representatives(labels)])
        assert torch.equal(reconstruct(merged, labels), merged)


def test_medoids_are_members_nearest_to_the_mean() -> None:
    points = vectors(2, 15, 3)
    labels = kmeans(gram(points), 4)
    chosen = medoids(gram(points), labels)
    assert torch.equal(labels.gather(1, chosen), labels)
    means = torch.stack([average(layer, own) for layer, own in zip(points, labels, strict=True)])
    residual = (points - means).square().sum(dim=2)
    for layer, channel in itertools.product(range(2), range(15)):
        members = labels[layer] == labels[layer, channel]
        nearest = residual[layer] <= residual[layer][members].min() + 1e-12
        assert chosen[layer, channel] == (members & nearest).nonzero().min()


def test_a_blend_goes_part_of_the_way() -> None:
    weight, labels = torch.randn(6, 4), torch.tensor([0, 1, 0, 2, 1, 0])
    wanted = 0.7 * weight + 0.3 * average(weight, labels)
    assert torch.allclose(reconstruct(weight, labels, blend=0.3), wanted)


def test_features_join_producers_at_equal_weight() -> None:
    one, other = torch.randn(6, 3, 3, 3), 100 * torch.randn(6, 4)
    assert torch.equal(features([one]), one.flatten(1))
    joined = features([one, other])
    assert joined.shape == (6, 31)
    assert torch.allclose(joined[:, :27].norm(dim=1).mean(), joined[:, 27:].norm(dim=1).mean())
    assert torch.allclose(features([one, other], unit=True).norm(dim=1), torch.ones(6))
    assert not features([torch.zeros(2, 2), torch.zeros(2, 2)], unit=True).isnan().any()


def test_close_filters_are_told_apart_under_autocast() -> None:
    base = torch.randn(1, 1, 4000)
    points = base + 1e-4 * torch.tensor([0.0, 1.0, 2.0, 5.0]).view(1, 4, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        labels = kmeans(gram(points), 2)
    assert labels.tolist() == [[0, 0, 0, 1]]


def test_bad_input_is_told() -> None:
    products = gram(vectors(1, 4, 2))
    for count in (0, 5):
        with pytest.raises(ConfigurationError, match=r"clusters=\d must lie in \[1, 4\]"):
            kmeans(products, count)
    with pytest.raises(ConfigurationError, match="shape"):
        ward(products[0], 2)
    with pytest.raises(ConfigurationError, match="generator"):
        partition(products, 2, "random")
    with pytest.raises(ConfigurationError, match="method='dbscan'"):
        partition(products, 2, "dbscan")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"blend=0 must lie in \(0, 1\]"):
        reconstruct(torch.ones(2), torch.tensor([0, 1]), blend=0)
