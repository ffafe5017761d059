"""One pure function per penalty: tensors in, value and analytic gradient out.

No autograd graph is built: the gradients are known in closed form and are handed to the backward pass as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

_LARGE = 1 << 18
"""Entries of a weight above which one product keeps a device busy, and stacking copies more than it saves."""


def weighted_l2(weights: Sequence[Tensor], strengths: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    r"""Squared norm of many tensors, every entry with its own strength, and its gradient.

    .. math:: P(W) = \tfrac12 \sum_i \lambda_i W_i^2, \qquad \partial P / \partial W_i = \lambda_i W_i

    The half makes :math:`\lambda` comparable with an optimiser's ``weight_decay``. A negative strength lets an entry
    grow: GReg-2 cancels the weight decay of kept channels so.

    Args:
        weights: any shapes.
        strengths: :math:`\lambda`, one per weight and of a shape that broadcasts to it: ``(C, 1, 1, 1)`` for the
            output channels of a convolution, ``(1, C, 1, 1)`` for its input channels.

    Returns:
        The scalar value, and the gradients in the weights' shapes.

    Source: Wang et al., Neural Pruning via Growing Regularization, ICLR 2021, arXiv 2012.09243.

    >>> value, (gradient,) = weighted_l2([torch.tensor([[1.0, 2.0], [3.0, 0.0]])], [torch.tensor([[1.0], [0.5]])])
    >>> value, gradient
    (tensor(4.7500), tensor([[1.0000, 2.0000],
            [1.5000, 0.0000]]))
    """
    plain = [weight.detach() for weight in weights]
    gradients = list(torch._foreach_mul(plain, list(strengths)))
    parts = [_dot(weight, gradient) for weight, gradient in zip(plain, gradients, strict=True)]
    return 0.5 * torch.stack(parts).sum(), gradients


def slices(weight: Tensor, dim: int, indices: Tensor) -> Tensor:
    """One where a tensor's slices are meant, zero elsewhere, in the smallest shape that broadcasts to the tensor.

    Args:
        weight: gives shape, dtype and device.
        dim: the dimension that ``indices`` count.
        indices: integers, any shape.

    Returns:
        Shape ``(1, ..., C, ..., 1)`` with ``C = weight.shape[dim]``.

    >>> slices(torch.zeros(2, 3, 5), dim=1, indices=torch.tensor([0, 2]))
    tensor([[[1.],
             [0.],
             [1.]]])
    """
    mask = torch.zeros(weight.shape[dim], dtype=weight.dtype, device=weight.device)
    mask[indices.reshape(-1).to(weight.device)] = 1
    return mask.view([-1 if axis == dim % weight.dim() else 1 for axis in range(weight.dim())])


def masked_l1(scales: Sequence[Tensor], strengths: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    r"""Absolute values of the scales that will go, each with its own strength, and the subgradient.

    .. math:: P(\gamma) = \sum_i \lambda_i \lvert \gamma_i \rvert, \qquad
        \partial P / \partial \gamma_i = \lambda_i \, \mathrm{sign}(\gamma_i), \quad \mathrm{sign}(0) = 0

    MaskSparsity's strengths are :math:`\lambda m` with a mask :math:`m` that is one where a channel will go and zero
    elsewhere, so that the scales that stay are not touched at all. All ones is network slimming.

    Args:
        scales: any shapes; normalisation weights :math:`\gamma`, or their biases.
        strengths: :math:`\lambda \ge 0`, one per scale and of a shape that broadcasts to it.

    Returns:
        The scalar value, and the subgradients in the scales' shapes.

    Source: Jiang et al., Pruning-aware Sparse Regularization for Network Pruning, Machine Intelligence Research 2023,
    arXiv 2201.06776.

    >>> masked_l1([torch.tensor([-2.0, 3.0, 0.0])], [torch.tensor([0.5, 0.0, 0.5])])
    (tensor(1.), [tensor([-0.5000, 0.0000, 0.0000])])
    """
    plain = [scale.detach() for scale in scales]
    gradients = list(torch._foreach_mul(torch._foreach_sign(plain), list(strengths)))
    return _inner(plain, gradients), gradients


@torch.no_grad()
def soft_threshold_(scales: Sequence[Tensor], amounts: Sequence[Tensor]) -> None:
    r"""Move scales towards zero by an amount and not beyond it: :func:`masked_l1` for adaptive optimisers.

    .. math:: \gamma \leftarrow \mathrm{sign}(\gamma) \max(\lvert \gamma \rvert - a, 0), \qquad a = \eta \lambda

    Adam divides a subgradient by its own size, so that no strength makes a scale collapse; after the step the amount
    counts in full, and what reaches zero is exactly zero.

    Args:
        scales: changed in place.
        amounts: :math:`a \ge 0`, one per scale and of a shape that broadcasts to it.

    >>> scale = torch.tensor([-2.0, 3.0, 0.25])
    >>> soft_threshold_([scale], [torch.tensor([0.5, 0.0, 0.5])])
    >>> scale
    tensor([-1.5000,  3.0000,  0.0000])
    """
    for scale, amount in zip(scales, amounts, strict=True):
        scale.sub_(torch.clamp(scale, min=-amount, max=amount))


def gram_decorrelation(
    weights: Sequence[Tensor],
    pruned: Sequence[Tensor],
    *,
    reduction: Literal["mean", "sum"] = "mean",
    strength: float = 1.0,
) -> tuple[Tensor, list[Tensor]]:
    r"""Inner products of the filters that will go with all filters of their layer, and the gradient.

    With :math:`P` the filters that will go, :math:`K` the others and :math:`N` filters in all,

    .. math::

        R(W) = \frac{\lambda}{N^2} \left( 2 \lVert W_P W_K^\top \rVert_F^2 + \lVert W_P W_P^\top \rVert_F^2 \right),
        \qquad \frac{\partial R}{\partial W_P} = \frac{4 \lambda}{N^2} W_P W^\top W,
        \qquad \frac{\partial R}{\partial W_K} = \frac{4 \lambda}{N^2} W_K W_P^\top W_P

    What the kept filters compute no longer depends on the others then, so that their removal leaves the network
    trainable. Products of kept filters among themselves are neither penalised nor computed. ``sum`` leaves out the
    :math:`1 / N^2`. Small layers of equal shapes are computed together, in float32 at least, also under autocast.

    Args:
        weights: shapes ``(N, ...)``, one filter per entry of the first dimension.
        pruned: filter numbers of shape ``(n,)`` without repetition, one tensor per weight; ``n`` may be 0.
        reduction: ``mean`` over the Gram matrix, which produced the published numbers, or ``sum``.
        strength: :math:`\lambda`.

    Returns:
        The scalar value summed over the weights, and the gradients in their shapes and dtypes.

    Source: Wang and Fu, Trainability Preserving Neural Pruning, ICLR 2023, arXiv 2207.12534, and its published code.

    >>> weight = torch.tensor([[1.0, 1.0], [2.0, 0.0]])
    >>> gram_decorrelation([weight], [torch.tensor([1])], reduction="sum")
    (tensor(24.), [tensor([[16.,  0.],
            [40.,  8.]])])
    """
    batches: dict[tuple[Any, ...], list[int]] = {}
    for place, (weight, rows) in enumerate(zip(weights, pruned, strict=True)):
        if rows.numel():
            alone = place if weight.numel() > _LARGE else -1
            key = (alone, weight.shape[0], weight.numel(), rows.numel(), weight.dtype, weight.device)
            batches.setdefault(key, []).append(place)
    gradients: dict[int, Tensor] = {}
    values = []
    for (_, filters, _, _, dtype, device), places in batches.items():
        factor = strength / filters**2 if reduction == "mean" else strength
        with torch.autocast(device.type, enabled=False):
            flat = [weights[place].detach().reshape(1, filters, -1) for place in places]
            stacked = flat[0] if len(flat) == 1 else torch.cat(flat)
            rows = torch.stack([pruned[place].to(device) for place in places])
            value, gradient = _decorrelation(stacked.to(torch.promote_types(dtype, torch.float32)), rows, factor)
        values.append(value)
        for place, single in zip(places, gradient.to(dtype).unbind(), strict=True):
            gradients[place] = single.reshape(weights[place].shape)
    # a layer that loses nothing is not pulled at
    whole = [
        gradients[place] if place in gradients else torch.zeros_like(weight.detach())
        for place, weight in enumerate(weights)
    ]
    return _total(values, weights), whole


def spectral_norm(matrix: Tensor, steps: int = 32) -> Tensor:
    r"""Largest singular value, in time proportional to the matrix: it gives the decorrelation's steepness.

    .. math:: \sigma_1 = \max_{q \in K} \lVert W^\top q \rVert, \qquad
        K = \mathrm{span}(x, A x, \dots, A^{k-1} x), \quad A = W W^\top, \quad \lVert q \rVert = 1

    Lanczos' method: never above the value, exact for up to k rows, and within
    :math:`(\ln N / 2 k)^2` of it where no gap follows the largest value. A decomposition takes time proportional to
    :math:`N^2 D`: minutes for the widest layers of VGG. Nothing is random, and nobody waits for the device.

    Args:
        matrix: shape ``(N, D)``, float32 or float64.
        steps: :math:`k`, products with the matrix and its transpose.

    Returns:
        A scalar.

    >>> spectral_norm(torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]]))
    tensor(4.)
    """
    matrix = matrix.detach()
    # as good as random: no matrix that occurs has its first singular vector at a right angle to this
    vector = torch.arange(1, len(matrix) + 1, dtype=matrix.dtype, device=matrix.device).square().sin()
    found = matrix.new_zeros(0, len(matrix))
    for _ in range(min(steps, len(matrix))):
        for _ in range(2):  # once would leave rounding errors in it
            vector = vector - (found @ vector) @ found
            vector = vector / vector.norm().clamp_min(torch.finfo(matrix.dtype).tiny)
        found = torch.cat([found, vector.unsqueeze(0)])
        vector = matrix @ (vector @ matrix)
    image = (torch.linalg.qr(found.mT).Q.mT @ matrix).double()
    largest: Tensor = torch.linalg.eigvalsh(image @ image.mT)[-1]
    return largest.clamp_min(0).sqrt().to(matrix.dtype)


def cluster_pull(
    weights: Sequence[Tensor], averages: Sequence[Tensor], *, strength: float
) -> tuple[Tensor, list[Tensor]]:
    r"""Squared distance of every channel to the mean of its cluster, and the gradient.

    .. math:: P(W) = \tfrac{\epsilon}{2} \lVert W - M W \rVert_F^2, \qquad
        \partial P / \partial W = \epsilon \, (W - M W)

    The gradient is that of the formula because :math:`M` is a projection: :math:`(I - M)^\top (I - M) = I - M`. It
    sums to zero within each cluster, so the means move as without it.

    Args:
        weights: any shapes ``(C, ...)``.
        averages: :math:`M W`, one per weight: :func:`lightning_prune.clusters.average` of it.
        strength: :math:`\epsilon`.

    Returns:
        The scalar value, and the gradients in the weights' shapes.

    Source: Ding et al., Centripetal SGD, CVPR 2019, arXiv 1904.03837.

    >>> cluster_pull([torch.tensor([1.0, 4.0, 3.0])], [torch.tensor([2.0, 4.0, 2.0])], strength=0.5)
    (tensor(0.5000), [tensor([-0.5000,  0.0000,  0.5000])])
    """
    apart = torch._foreach_sub([weight.detach() for weight in weights], list(averages))
    gradients = list(torch._foreach_mul(apart, strength))
    return 0.5 * _inner(apart, gradients), gradients


def distillation(student: Tensor, teacher: Tensor, temperature: float, dim: int = 1) -> tuple[Tensor, Tensor]:
    r"""How far a student's softened predictions are from a teacher's, and the gradient by the student's logits.

    .. math::
        P(z) = \frac{T^2}{n} \sum_i \mathrm{KL}(p_i \,\Vert\, q_i), \quad p = \mathrm{softmax}(t / T),
        \quad q = \mathrm{softmax}(z / T), \qquad \partial P / \partial z = \frac{T}{n} (q - p)

    with :math:`n` predictions: samples, or positions where every position of a sample is classified. The factor
    :math:`T^2` keeps the gradient's size where it is without softening. A single logit is the log odds of one class
    against another one, whose logit is zero.

    Args:
        student: logits :math:`z`, any shape with classes along ``dim``; 1-d ones are single logits.
        teacher: logits :math:`t` of the same shape.
        temperature: :math:`T > 0`; a larger one shows more of what the teacher thinks of the wrong classes.
        dim: along which the classes lie.

    Returns:
        The scalar value and the gradient in the logits' shape, both in single precision at least.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531.

    >>> distillation(torch.zeros(1, 2), torch.tensor([[-torch.inf, 0.0]]), temperature=1.0)
    (tensor(0.6931), tensor([[ 0.5000, -0.5000]]))
    """
    if student.dim() == 1:
        value, gradient = distillation(student.unsqueeze(1), teacher.unsqueeze(1), temperature)
        return value, gradient.squeeze(1)
    wide = torch.promote_types(student.dtype, torch.float32)
    logits = [each.detach().to(wide) / temperature for each in (student, teacher)]
    is_single = student.shape[dim] == 1
    if is_single:
        logits = [torch.cat([each, torch.zeros_like(each)], dim) for each in logits]
    q, p = (each.log_softmax(dim) for each in logits)
    odds, count = p.exp(), student.numel() // student.shape[dim]
    parts = (odds * (p - q)).masked_fill(odds == 0, 0)  # a class that is out of the question
    gradient = (q.exp() - odds) * (temperature / count)
    return parts.sum() * (temperature**2 / count), gradient.narrow(dim, 0, 1) if is_single else gradient


def _decorrelation(weight: Tensor, rows: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Value and gradients of a batch: weights ``(L, N, D)``, pruned rows ``(L, n)``."""
    layers, filters, width = weight.shape
    stays = torch.ones(layers, filters, device=rows.device).scatter_(1, rows, 0)
    others = stays.argsort(dim=1, descending=True, stable=True)[:, : filters - rows.shape[1]]
    first = filters * torch.arange(layers, device=rows.device).unsqueeze(1)  # whole rows of all layers at once
    flat = weight.reshape(-1, width)
    gone = flat.index_select(0, (first + rows).flatten()).view(layers, -1, width)
    products = torch.bmm(gone, weight.mT)
    beside, among = (products.gather(2, which.unsqueeze(1).expand(-1, rows.shape[1], -1)) for which in (others, rows))
    value = factor * (2 * beside.square().sum() + among.square().sum())
    gradient = torch.empty_like(flat)
    for which, pull in (
        (rows, torch.bmm(products.mul_(4 * factor), weight)),
        (others, torch.bmm(beside.mul_(4 * factor).mT, gone)),
    ):
        gradient.index_copy_(0, (first + which).flatten(), pull.view(-1, width))
    return value, gradient.view_as(weight)


def _inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Sum of all entrywise products; each tensor's in its own dtype, their total in float32 at least."""
    return _total([torch.sum(one * other) for one, other in zip(left, right, strict=True)], left)


def _total(parts: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Sum of scalars in float32 at least; zero on the weights' device where there are none."""
    if not parts:
        like = weights[0].detach() if len(weights) else torch.zeros(())
        return like.new_zeros((), dtype=torch.promote_types(like.dtype, torch.float32))
    return torch.stack([part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts]).sum()


def _dot(first: Tensor, second: Tensor) -> Tensor:
    """Inner product, in at least single precision; without a copy where both lie alike in memory, in any format."""
    wide = torch.promote_types(first.dtype, torch.float32)
    if first.dtype == wide and first.stride() == second.stride():
        order = sorted(range(first.dim()), key=first.stride, reverse=True)
        one, other = first.permute(order), second.permute(order)
        if one.is_contiguous():
            return torch.dot(one.view(-1), other.view(-1))
    return torch.sum(first * second, dtype=wide)
