"""One pure function per penalty: tensors in, value and analytic gradient out.

No autograd graph is built: the gradients are known in closed form and are handed to the backward pass as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
    parts = [torch.sum(weight * gradient) for weight, gradient in zip(plain, gradients, strict=True)]
    # half precision weights are summed over the tensors in float32
    return 0.5 * torch.stack(
        [part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts]
    ).sum(), gradients


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
