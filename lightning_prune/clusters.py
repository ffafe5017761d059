r"""Which channels resemble each other, and what they become when each cluster acts as one.

Everything runs on Gram matrices: with :math:`G = X X^\top` every distance between a filter and a cluster's mean is
exact, and its cost no longer depends on the length of a filter. Layers with equally many channels and clusters are
clustered together. Nothing waits for the device but one look at the convergence, and nothing is random unless it says
so: the same Gram matrices give the same labels on every run and every rank.

Letters: ``L`` layers, ``C`` channels, ``d`` weights per channel, ``K`` clusters, :math:`1 \le K \le C`. Labels are
integers ``(L, C)`` in ``[0, K)``; no cluster is empty, and clusters are numbered by their first channel.

Source: Niu et al., Asymptotic Soft Cluster Pruning for Deep Neural Networks, 2022, arXiv 2206.08186, whose details are
not public; Ding et al., Centripetal SGD, CVPR 2019, arXiv 1904.03837.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_prune.errors import ConfigurationError

Method = Literal["kmeans", "ward", "even", "imbalanced", "random"]
Step = Callable[[Tensor, Tensor, int], Tensor]

ITERATIONS = 20
"""Most iterations of k-means, and most rounds of single moves after it."""


def features(weights: Sequence[Tensor], *, unit: bool = False) -> Tensor:
    r"""One vector per channel from all layers that produce it.

    .. math:: x_c = \mathrm{concat}_p \; s_p \, \mathrm{vec}(W_{p,c}), \qquad
        s_p = 1 / \mathrm{mean}_c \lVert W_{p,c} \rVert

    A single layer is taken as it is (:math:`s = 1`).

    Args:
        weights: at least one, shapes ``(C, ...)``; normalisation parameters are left out.
        unit: scale every vector to length one, since a normalisation behind the layer undoes its length.

    Returns:
        Shape ``(C, d)``.

    >>> features([torch.tensor([[3.0], [4.0]]), torch.tensor([[2.0, 0.0], [0.0, 2.0]])])
    tensor([[0.8571, 1.0000, 0.0000],
            [1.1429, 0.0000, 1.0000]])
    """
    rows = [weight.detach().reshape(weight.shape[0], -1) for weight in weights]
    if len(rows) > 1:
        rows = [row / row.norm(dim=1).mean().clamp(min=torch.finfo(row.dtype).tiny) for row in rows]
    vectors = torch.cat(rows, dim=1)
    return torch.nn.functional.normalize(vectors, dim=1) if unit else vectors


def gram(vectors: Tensor) -> Tensor:
    r"""Inner products of all pairs of channels, :math:`G = X X^\top`, in double precision where the device has it.

    Squared distances are differences of these numbers. Single precision would lose filters that are close together,
    all the more under TF32 or autocast, which leave double precision alone.

    Args:
        vectors: shape ``(..., C, d)``.

    Returns:
        Shape ``(..., C, C)``.

    >>> gram(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    tensor([[5., 2.],
            [2., 1.]], dtype=torch.float64)
    """
    exact = vectors.detach().to(torch.float32 if vectors.device.type == "mps" else torch.float64)
    return exact @ exact.mT


def partition(
    gram: Tensor,
    clusters: int,
    method: Method = "kmeans",
    *,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Labels by any method: :func:`kmeans`, :func:`ward`, or an index-based one for comparison.

    ``even`` cuts the channels into runs of nearly equal length, ``imbalanced`` puts all surplus channels into one
    cluster, ``random`` shuffles ``even``.

    Args:
        gram: shape ``(L, C, C)``, float32 or float64.
        clusters: ``K``.
        method: its name.
        start: labels to start k-means from.
        generator: private, on the CPU; ``random`` needs it.

    Returns:
        Labels of shape ``(L, C)``.

    Raises:
        ConfigurationError: ``clusters`` is not in ``[1, C]``, a Gram matrix is missing a dimension, a method has no
            such name, or ``random`` has no generator.

    >>> similar = gram(torch.tensor([[[0.0], [5.0], [0.1], [5.2], [9.0]]]))
    >>> partition(similar, 3).tolist(), partition(similar, 3, "even").tolist()
    ([[0, 1, 0, 1, 2]], [[0, 0, 1, 1, 2]])
    >>> partition(similar, 3, "imbalanced").tolist()
    [[0, 0, 0, 1, 2]]
    """
    if method == "kmeans":
        return kmeans(gram, clusters, start)
    if method == "ward":
        return ward(gram, clusters)
    _check(gram, clusters)
    layers, channels = gram.shape[:2]
    index = torch.arange(channels)
    even = (index * clusters).div(channels, rounding_mode="floor").expand(layers, -1)
    if method == "even":
        labels = even
    elif method == "imbalanced":
        labels = (index - (channels - clusters)).clamp(min=0).expand(layers, -1)
    elif method == "random" and generator is not None:
        order = torch.rand(layers, channels, generator=generator).argsort(dim=1)
        labels = even.gather(1, order)
    else:
        raise ConfigurationError(
            f"method={method!r} with generator={generator} can't cluster; take kmeans, ward, even, imbalanced, or "
            "random with a generator."
        )
    return _in_order(labels.to(gram.device), clusters)


@torch.no_grad()
def kmeans(gram: Tensor, clusters: int, start: Tensor | None = None, *, iterations: int = ITERATIONS) -> Tensor:
    r"""Labels whose squared distances to the clusters' means are small: k-means, then single moves.

    .. math:: \min_a \sum_c \lVert x_c - \mu_{a(c)} \rVert^2, \qquad
        \lVert x_c - \mu_k \rVert^2 = G_{cc} - 2 (GH)_{ck} / n_k + (H^\top G H)_{kk} / n_k^2

    The first centre is the longest filter, each next one the filter farthest from all centres so far. Lloyd's
    iterations follow: an empty cluster takes the worst placed filter, ties go to the lowest index, and no iteration
    makes the sum larger. Where nearly every cluster has one or two members Lloyd stops early, since a filter's own
    mean has moved towards it; rounds of single moves, rated by what they gain after both means have followed
    (Hartigan), then take off a few percent more.

    Args:
        gram: shape ``(L, C, C)``, float32 or float64, see :func:`gram`.
        clusters: ``K``.
        start: labels of shape ``(L, C)`` to start from, of an earlier call. If they have more clusters than ``K``,
            the pairs whose merger costs least are merged first.
        iterations: most of each kind.

    Returns:
        Labels of shape ``(L, C)``, int64.

    Raises:
        ConfigurationError: ``clusters`` is not in ``[1, C]``, or ``gram`` has another shape.

    >>> similar = gram(torch.tensor([[[0.0], [5.0], [0.1], [5.2], [9.0]]]))
    >>> labels = kmeans(similar, 3)
    >>> labels, kmeans(similar, 2, start=labels)
    (tensor([[0, 1, 0, 1, 2]]), tensor([[0, 1, 0, 1, 1]]))
    """
    _check(gram, clusters)
    if clusters == gram.shape[1]:
        return torch.arange(clusters, device=gram.device).repeat(gram.shape[0], 1)
    labels = _farthest_first(gram, clusters) if start is None else _merged(gram, start.to(gram.device), clusters)
    for step in (_lloyd_step, _exchange_step):
        labels = _repeat(step, gram, labels, clusters, iterations)
    return _in_order(labels, clusters)


@torch.no_grad()
def ward(gram: Tensor, clusters: int) -> Tensor:
    r"""Labels by merging, from single channels on, the pair that adds least to the squared distances.

    .. math:: \Delta(a, b) = \frac{n_a n_b}{n_a + n_b} \lVert \mu_a - \mu_b \rVert^2

    Partitions for different ``K`` are nested: with a growing rate, channels once together stay together as long as
    the features stay.

    Args:
        gram: shape ``(L, C, C)``, float32 or float64.
        clusters: ``K``.

    Returns:
        Labels of shape ``(L, C)``, int64.

    Raises:
        ConfigurationError: ``clusters`` is not in ``[1, C]``, or ``gram`` has another shape.

    Source: Ward, Hierarchical Grouping to Optimize an Objective Function, JASA 1963.

    >>> ward(gram(torch.tensor([[[0.0], [5.0], [0.1], [5.2], [9.0]]])), 3)
    tensor([[0, 1, 0, 1, 2]])
    """
    _check(gram, clusters)
    single = torch.arange(gram.shape[1], device=gram.device).repeat(gram.shape[0], 1)
    return _in_order(_merged(gram, single, clusters), clusters)


def inertia(gram: Tensor, labels: Tensor) -> Tensor:
    r"""Sum of squared distances of the channels to their clusters' means.

    Args:
        gram: shape ``(L, C, C)``.
        labels: shape ``(L, C)``.

    Returns:
        Shape ``(L,)``.

    >>> inertia(gram(torch.tensor([[[0.0], [2.0], [7.0]]])), torch.tensor([[0, 0, 1]]))
    tensor([2.], dtype=torch.float64)
    """
    return _own(_distances(gram, labels, gram.shape[1])[1], labels).sum(dim=1)


def medoids(gram: Tensor, labels: Tensor) -> Tensor:
    """The member nearest to the mean of each channel's cluster, the lowest index where several are.

    Args:
        gram: shape ``(L, C, C)``.
        labels: shape ``(L, C)``.

    Returns:
        Channel numbers of shape ``(L, C)``, the same for all members of a cluster.

    >>> medoids(gram(torch.tensor([[[0.0], [1.0], [4.0], [9.0]]])), torch.tensor([[0, 0, 0, 1]]))
    tensor([[1, 1, 1, 3]])
    """
    channels = gram.shape[1]
    residual = _own(_distances(gram, labels, channels)[1], labels)
    least = _per_cluster(residual, labels, channels, "amin").gather(1, labels)
    # both members of a pair are equally near, whatever the rounding
    nearest = residual <= least + _slack(gram)
    index = torch.arange(channels, device=labels.device).expand_as(labels)
    return _per_cluster(index.where(nearest, channels), labels, channels, "amin").gather(1, labels)


@torch.no_grad()
def average(weight: Tensor, labels: Tensor) -> Tensor:
    r"""Every channel becomes the mean of its cluster: :math:`M W` with :math:`M = H (H^\top H)^{-1} H^\top`.

    The mean is taken relative to the cluster's first member, so that equal members come out bit for bit as they
    went in, and averaging twice is averaging once. :math:`M` is never built.

    Args:
        weight: shape ``(C, ...)``.
        labels: shape ``(C,)``.

    Returns:
        A new tensor in the weight's shape and dtype.

    >>> average(torch.tensor([[1.0, 4.0], [0.0, 1.0], [3.0, 0.0]]), torch.tensor([0, 1, 0]))
    tensor([[2., 2.],
            [0., 1.],
            [2., 2.]])
    """
    rows = weight.detach().reshape(weight.shape[0], -1)
    means = cluster_means(rows, labels, *first_members(labels, weight.shape[0]))
    return means.index_select(0, labels).reshape(weight.shape).to(weight.dtype)


def first_members(labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """The first member of each cluster and how many it has: row 0 and at least 1 of an empty one.

    Args:
        labels: shape ``(n,)``.
        clusters: ``K``, more than the largest label.

    Returns:
        Two integer tensors of shape ``(K,)``.

    >>> first_members(torch.tensor([1, 0, 1, 1]), 3)
    (tensor([1, 0, 0]), tensor([1, 3, 1]))
    """
    counts = _per_cluster(torch.ones_like(labels).unsqueeze(0), labels.unsqueeze(0), clusters, "sum")[0]
    index = torch.arange(len(labels), device=labels.device)
    first = _per_cluster(index.unsqueeze(0), labels.unsqueeze(0), clusters, "amin")[0]
    return first.where(counts > 0, 0), counts.clamp_(min=1)


def cluster_means(rows: Tensor, labels: Tensor, first: Tensor, counts: Tensor) -> Tensor:
    """The mean of each cluster's rows, taken relative to the first: that of equal rows is that row, bit for bit.

    Args:
        rows: shape ``(n, d)``.
        labels: shape ``(n,)``.
        first: a row of each cluster, ``(K,)``; see :func:`first_members`.
        counts: how many rows each has, ``(K,)``.

    Returns:
        Shape ``(K, d)``, in float32 or wider.
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    base = rows.index_select(0, first)
    apart = base.index_select(0, labels)
    torch.sub(rows, apart, out=apart)  # into memory that is there: fresh pages cost more than the sums
    return base.add_(_add_rows(apart, labels, len(first)).div_(counts.unsqueeze(1)))


@torch.no_grad()
def reconstruct(weight: Tensor, labels: Tensor, *, medoids: Tensor | None = None, blend: float = 1.0) -> Tensor:
    r"""Make the channels of each cluster alike: :math:`(1 - \alpha) W + \alpha M W`.

    Args:
        weight: shape ``(C, ...)``: a layer's weight or bias, or a normalisation's.
        labels: shape ``(C,)``.
        medoids: shape ``(C,)``, see :func:`medoids`; the member to copy instead of taking the mean.
        blend: :math:`\alpha` in ``(0, 1]``; 1 makes them identical.

    Returns:
        A new tensor in the weight's shape and dtype.

    >>> weight, labels = torch.tensor([1.0, 4.0, 3.0]), torch.tensor([0, 1, 0])
    >>> reconstruct(weight, labels), reconstruct(weight, labels, blend=0.5)
    (tensor([2., 4., 2.]), tensor([1.5000, 4.0000, 2.5000]))
    >>> reconstruct(weight, labels, medoids=torch.tensor([2, 1, 2]))
    tensor([3., 4., 3.])
    """
    if not 0 < blend <= 1:
        raise ConfigurationError(f"blend={blend} must lie in (0, 1].")
    target = average(weight, labels) if medoids is None else weight.detach()[medoids]
    return target if blend == 1 else weight.detach().lerp(target, blend)


def representatives(labels: Tensor) -> Tensor:
    """The first member of each channel's cluster: the one that stays when the others are merged into it.

    Args:
        labels: shape ``(..., C)``.

    Returns:
        Channel numbers in the shape of the labels.

    >>> representatives(torch.tensor([0, 1, 0, 2, 1]))
    tensor([0, 1, 0, 3, 1])
    """
    index = torch.arange(labels.shape[-1], device=labels.device).expand(labels.shape)
    first = torch.full_like(labels, labels.shape[-1]).scatter_reduce(-1, labels, index, "amin")
    return first.gather(-1, labels)


def churn(before: Tensor, after: Tensor) -> Tensor:
    """How much a partition has changed: one minus the adjusted Rand index.

    0 means the same clusters, about 1 no more agreement than by chance.

    Args:
        before: labels, shape ``(L, C)``.
        after: labels, shape ``(L, C)``, with any number of clusters.

    Returns:
        Shape ``(L,)``, double precision.

    Source: Hubert and Arabie, Comparing Partitions, Journal of Classification 1985.

    >>> churn(torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]]), torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1]]))
    tensor([0.0000, 1.5000], dtype=torch.float64)
    """
    channels = before.shape[1]
    pairs = torch.ones(channels, channels, dtype=torch.bool, device=before.device).triu(1)
    first, second = (pairs & (labels.unsqueeze(2) == labels.unsqueeze(1)) for labels in (before, after))
    both, one, other = (pair.sum(dim=(1, 2)).double() for pair in (first & second, first, second))
    chance = one * other / max(1, channels * (channels - 1) // 2)
    return torch.where(one + other == 2 * both, 0.0, 1 - (both - chance) / ((one + other) / 2 - chance))


def _check(gram: Tensor, clusters: int) -> None:
    if gram.dim() != 3 or gram.shape[1] != gram.shape[2]:
        raise ConfigurationError(f"gram has shape {tuple(gram.shape)}, but must be (layers, channels, channels).")
    if not 1 <= clusters <= gram.shape[1]:
        raise ConfigurationError(f"clusters={clusters} must lie in [1, {gram.shape[1]}], the number of channels.")


def _farthest_first(gram: Tensor, clusters: int) -> Tensor:
    """Every channel's nearest centre, where each centre is the channel farthest from those before it."""
    square = gram.diagonal(dim1=1, dim2=2).contiguous()
    layers = torch.arange(gram.shape[0], device=gram.device)
    nearest = torch.full_like(square, torch.inf)
    labels = torch.zeros_like(square, dtype=torch.int64)
    centre = square.argmax(dim=1)
    for cluster in range(clusters):
        distance = (square + square[layers, centre].unsqueeze(1) - 2 * gram[layers, centre]).clamp_(min=0)
        closer = distance < nearest
        nearest = torch.where(closer, distance, nearest)
        labels.masked_fill_(closer, cluster)
        # a centre is never chosen again, not even among copies of it
        nearest[layers, centre] = -1
        labels[layers, centre] = cluster
        centre = nearest.argmax(dim=1)
    return labels


def _repeat(step: Step, gram: Tensor, labels: Tensor, clusters: int, iterations: int) -> Tensor:
    """Apply a step until nothing changes; on an accelerator that is asked every fifth time only."""
    every = 1 if gram.device.type == "cpu" else 5
    for iteration in range(1, iterations + 1):
        before, labels = labels, step(gram, labels, clusters)
        if iteration % every == 0 and torch.equal(before, labels):
            break
    return labels


def _lloyd_step(gram: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Every channel to the nearest mean; it stays where it is if no other is nearer."""
    distances = _distances(gram, labels, clusters)[1]
    nearest, best = distances.min(dim=1)
    own = _own(distances, labels)
    moved = torch.where(nearest < own - _slack(gram), best, labels)
    return _filled(moved, torch.minimum(nearest, own), clusters)


def _filled(labels: Tensor, residual: Tensor, clusters: int) -> Tensor:
    """Give every empty cluster the worst placed channel whose cluster can spare it."""
    rank = _rank(residual.argsort(dim=1, stable=True))
    anchor = _per_cluster(rank, labels, clusters, "amin").gather(1, labels) == rank
    worst = torch.where(anchor, -1, rank).argsort(dim=1, descending=True)[:, :clusters]
    filled = _per_cluster(torch.ones_like(labels), labels, clusters, "sum").clamp_(max=1)
    empty = filled.argsort(dim=1, stable=True)
    place = torch.arange(clusters, device=labels.device)
    wanted = place < clusters - filled.sum(dim=1, keepdim=True)
    return labels.scatter(1, worst, torch.where(wanted, empty, labels.gather(1, worst)))


def _exchange_step(gram: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Single moves that lower the sum; those made together share no cluster, so that their gains add up."""
    counts, distances = _distances(gram, labels, clusters)
    size = counts.gather(1, labels)
    leave = torch.where(size > 1, _own(distances, labels) * size / (size - 1), 0.0)
    join = distances.mul_((counts / (counts + 1)).unsqueeze(2)).scatter_(1, labels.unsqueeze(1), torch.inf)
    cost, goal = join.min(dim=1)
    gain = leave - cost
    rank = _rank(gain.argsort(dim=1, descending=True, stable=True))
    rank = torch.where(gain > _slack(gram), rank, rank.shape[1])
    best = torch.minimum(_per_cluster(rank, labels, clusters, "amin"), _per_cluster(rank, goal, clusters, "amin"))
    moves = (rank < rank.shape[1]) & (best.gather(1, labels) == rank) & (best.gather(1, goal) == rank)
    return torch.where(moves, goal, labels)


def _merged(gram: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Merge the cheapest pairs until so many clusters are left, or fill up if there are too few."""
    channels = labels.shape[1]
    labels = _in_order(labels, channels)
    present = [int(count) for count in labels.amax(dim=1) + 1]
    if max(present) > clusters:
        counts, cost = _merging_costs(gram, labels, max(present))
        for left in range(max(present), clusters, -1):
            if left in present:
                active = [row for row, count in enumerate(present) if count >= left]
                rows = torch.tensor(active, device=gram.device)
            _merge_cheapest_(cost, counts, labels, rows)
        labels = _in_order(labels, channels)
    return _filled(labels, _own(_distances(gram, labels, clusters)[1], labels), clusters)


def _merging_costs(gram: Tensor, labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Sizes ``(L, K)``, and what merging any two clusters adds to the inertia, ``(L, K, K)``."""
    counts = _per_cluster(torch.ones_like(labels, dtype=gram.dtype), labels, clusters, "sum")
    halves = _cluster_sums(gram, labels, clusters).mT
    means = _cluster_sums(halves, labels, clusters) / (counts.unsqueeze(1) * counts.unsqueeze(2)).clamp_(min=1)
    square = means.diagonal(dim1=1, dim2=2)
    apart = (square.unsqueeze(1) + square.unsqueeze(2) - means - means.mT).clamp_(min=0)
    one, other = counts.unsqueeze(1), counts.unsqueeze(2)
    cost = apart * (one * other / (one + other).clamp(min=1))
    cost.masked_fill_((one == 0) | (other == 0), torch.inf)
    cost.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    return counts, cost


def _merge_cheapest_(cost: Tensor, counts: Tensor, labels: Tensor, rows: Tensor) -> None:
    """Merge one pair in each of these layers, the second into the first, and update the costs (Lance and Williams)."""
    clusters = counts.shape[1]
    pair = cost[rows].flatten(1).argmin(dim=1)
    one, other = pair.div(clusters, rounding_mode="floor"), pair % clusters
    size, size_other, rest = counts[rows, one, None], counts[rows, other, None], counts[rows]
    merged = (size + rest) * cost[rows, one] + (size_other + rest) * cost[rows, other]
    merged = (merged - rest * cost[rows, one, other].unsqueeze(1)) / (size + size_other + rest)
    merged.scatter_(1, one.unsqueeze(1), torch.inf)
    cost[rows, one] = merged
    cost[rows, :, one] = merged
    cost[rows, other] = torch.inf
    cost[rows, :, other] = torch.inf
    counts[rows, one] += counts[rows, other]
    counts[rows, other] = 0
    labels[rows] = torch.where(labels[rows] == other.unsqueeze(1), one.unsqueeze(1), labels[rows])


def _distances(gram: Tensor, labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Sizes ``(L, K)`` and squared distances ``(L, K, C)`` of all channels to all means; infinite to an empty one."""
    counts = _per_cluster(torch.ones_like(labels, dtype=gram.dtype), labels, clusters, "sum")
    inner = _cluster_sums(gram, labels, clusters).div_(counts.clamp(min=1).unsqueeze(2))
    square = _per_cluster(_own(inner, labels), labels, clusters, "sum").div_(counts)
    distances = inner.mul_(-2).add_(gram.diagonal(dim1=1, dim2=2).unsqueeze(1)).add_(square.unsqueeze(2))
    return counts, distances.clamp_(min=0).nan_to_num_(nan=torch.inf, posinf=torch.inf)


def _cluster_sums(rows: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Rows ``(L, C, n)`` added up per cluster: ``(L, K, n)``."""
    layers, channels, length = rows.shape
    offset = torch.arange(layers, device=labels.device).unsqueeze(1) * clusters
    flat = _add_rows(rows.reshape(layers * channels, length), (labels + offset).reshape(-1), layers * clusters)
    return flat.view(layers, clusters, length)


def _add_rows(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """Rows added up by index, in an order that is the same on every run."""
    sums = rows.new_zeros(count, rows.shape[1])
    # index_add_ adds atomically on an accelerator; accumulating index_put_ sorts first
    return sums.index_add_(0, index, rows) if rows.device.type == "cpu" else sums.index_put_((index,), rows, True)


def _per_cluster(values: Tensor, labels: Tensor, clusters: int, reduce: Literal["sum", "amin"]) -> Tensor:
    """Values ``(L, C)`` reduced to ``(L, K)``; the smallest of none is ``C``, or infinite."""
    if reduce == "sum":
        return _cluster_sums(values.unsqueeze(2), labels, clusters).squeeze(2)
    none = torch.inf if values.is_floating_point() else values.shape[1]
    return values.new_full((values.shape[0], clusters), none).scatter_reduce_(1, labels, values, "amin")


def _own(distances: Tensor, labels: Tensor) -> Tensor:
    """Of ``(L, K, C)``, every channel's entry for its own cluster: ``(L, C)``."""
    return distances.gather(1, labels.unsqueeze(1)).squeeze(1)


def _rank(order: Tensor) -> Tensor:
    """Places in an order: the inverse permutation."""
    return torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )


def _slack(gram: Tensor) -> Tensor:
    """Differences of squared distances up to this are rounding, shape ``(L, 1)``."""
    return gram.diagonal(dim1=1, dim2=2).amax(dim=1, keepdim=True) * (64 * torch.finfo(gram.dtype).eps)


def _in_order(labels: Tensor, clusters: int) -> Tensor:
    """The same clusters, numbered by their first channel."""
    index = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    first = _per_cluster(index, labels, clusters, "amin")
    return _rank(first.argsort(dim=1, stable=True)).gather(1, labels)
