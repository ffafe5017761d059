"""What a channel is worth: tensors in, one number per channel out.

The number is comparable within one layer; the channels with the smallest go first. ``C`` is the number of channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def l1(weight: Tensor) -> Tensor:
    r"""Mean absolute weight of every channel.

    .. math:: s_c = \frac1K \sum_k \lvert W_{ck} \rvert

    The mean instead of the sum makes layers of different fan-in comparable; inside one layer the order is that of the
    L1 norm.

    Args:
        weight: shape ``(C, ...)``; a vector is read as ``C`` channels of one weight each.

    Returns:
        Shape ``(C,)``.

    Source: Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, arXiv 1608.08710.

    >>> l1(torch.tensor([[1.0, -3.0], [0.5, 0.5]]))
    tensor([2.0000, 0.5000])
    """
    return weight.detach().reshape(weight.shape[0], -1).abs().mean(dim=1)


def l2(weight: Tensor) -> Tensor:
    r"""Root mean square weight of every channel.

    .. math:: s_c = \sqrt{\frac1K \sum_k W_{ck}^2}

    Args:
        weight: shape ``(C, ...)``; a vector is read as ``C`` channels of one weight each.

    Returns:
        Shape ``(C,)``.

    >>> l2(torch.tensor([[3.0, 3.0], [0.0, 0.0]]))
    tensor([3., 0.])
    """
    return weight.detach().reshape(weight.shape[0], -1).square().mean(dim=1).sqrt()


def bn_scale(gamma: Tensor) -> Tensor:
    r"""Absolute scale :math:`\lvert \gamma_c \rvert` of a normalisation layer.

    Args:
        gamma: shape ``(C,)``.

    Returns:
        Shape ``(C,)``.

    Source: Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017, arXiv 1708.06519.

    >>> bn_scale(torch.tensor([-0.5, 2.0]))
    tensor([0.5000, 2.0000])
    """
    return gamma.detach().abs()


def random(channels: int, generator: torch.Generator) -> Tensor:
    """Uniform numbers in ``[0, 1)``: the baseline that every score has to beat.

    The generator is the caller's own, so the global random state doesn't move.

    Args:
        channels: ``C``.
        generator: a private generator on the CPU.

    Returns:
        Shape ``(C,)``, on the CPU.

    >>> random(3, torch.Generator().manual_seed(0))
    tensor([0.4963, 0.7682, 0.0885])
    """
    return torch.rand(channels, generator=generator)
