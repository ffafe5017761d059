"""Which channels go by the scales of their norms, where one norm or several have a say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_prune.errors import ConfigurationError
from lightning_prune.scores import bn_scale
from lightning_prune.structure import ChannelGroup, kept_channels


def vote(small: Tensor) -> Tensor:
    """Which channels go where several norms share them: those that most of the norms would let go.

    Begins with the channels that all norms agree on and lowers the majority until there are as many as the norm with
    the fewest would let go.

    Args:
        small: whether a norm would let a channel go, shape ``(norms, C)``.

    Returns:
        Shape ``(C,)``.

    >>> vote(torch.tensor([[True, True, False, False], [True, False, True, False], [False, True, True, True]]))
    tensor([ True,  True,  True, False])
    """
    votes, least = small.sum(dim=0), small.sum(dim=1).min()
    majority = next(number for number in range(len(small), 0, -1) if (votes >= number).sum() >= least)
    return votes >= majority


def doomed_channels(scales: Tensor, count: int, threshold: float | None, rule: Literal["mean", "vote"]) -> list[int]:
    """The channels that go, the least valuable first.

    Args:
        scales: absolute scales, shape ``(norms, C)``.
        count: how many go, where no threshold says so.
        threshold: scale up to which a channel goes.
        rule: ``"mean"`` over the norms, or ``"vote"``.

    >>> doomed_channels(torch.tensor([[0.1, 0.9, 0.2], [0.3, 0.1, 0.4]]), count=1, threshold=None, rule="mean")
    [0]
    """
    mean = scales.mean(dim=0)
    order = mean.argsort(stable=True)
    if rule == "mean":
        return order[: count if threshold is None else int((mean <= threshold).sum())].tolist()
    ranks = scales.argsort(dim=1, stable=True).argsort(dim=1)
    small = ranks < count if threshold is None else scales <= threshold
    order = order[small.sum(dim=0)[order].argsort(descending=True, stable=True)]
    return order[: count if threshold is None else int(vote(small).sum())].tolist()


def rounded(group: ChannelGroup, doomed: Sequence[int], round_to: int) -> list[int]:
    """As many of the channels, the first first, as may go: one stays at least, and widths are rounded up; ascending."""
    kept = kept_channels(group.size, len(doomed) / group.size, unit=group.unit, round_to=round_to)
    return sorted(doomed[: group.size - kept])


def prices_of(scales: Tensor, rule: Literal["mean", "vote"]) -> list[float]:
    """The thresholds at which a group's first, second, ... channel goes, not falling.

    Under ``"mean"`` the sorted mean scales; under ``"vote"`` those at which every norm would let so many go.

    Args:
        scales: absolute scales, shape ``(norms, C)``.
        rule: how the norms agree.

    >>> prices_of(torch.tensor([[3.0, 1.0, 2.0], [1.0, 5.0, 6.0]]), "mean")
    [2.0, 3.0, 4.0]
    >>> prices_of(torch.tensor([[3.0, 1.0, 2.0], [1.0, 5.0, 6.0]]), "vote")
    [1.0, 5.0, 6.0]
    """
    prices = scales.mean(dim=0).sort().values if rule == "mean" else scales.sort(dim=1).values.amax(dim=0)
    return [float(price) for price in prices]


def scales_of(group: ChannelGroup, tensors: Mapping[str, Tensor]) -> Tensor:
    """Absolute scales of every norm of a group, shape ``(norms, C)``, on the CPU."""
    found = []
    for name, dim in group.scales:
        rows = bn_scale(tensors[name].float().movedim(dim, 0))
        found.append(rows[group.index[name, dim].to(rows.device)].flatten(1).mean(dim=1).cpu())
    scales = torch.stack(found)
    if not scales.isfinite().all():
        raise ConfigurationError(f"The scales of group {group.name!r} are not all finite; its norms hold NaN or inf.")
    return scales
