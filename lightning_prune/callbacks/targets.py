"""Which slices of which parameters a regulariser pulls at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_prune.penalties import slices
from lightning_prune.structure import ChannelGroup
from lightning_prune.structure.plan import plain_name


class Target:
    """One parameter that a regulariser pulls at: a mask per channel group that has slices in it.

    Args:
        parameter: the parameter.
        masks: group name to a mask that broadcasts to the parameter.
    """

    def __init__(self, parameter: nn.Parameter, masks: Mapping[str, Tensor]) -> None:
        self.parameter = parameter
        self.masks = dict(masks)

    def union(self) -> Tensor:
        """One where any of the groups' masks is one, in the smallest shape that broadcasts to the parameter."""
        masks = list(self.masks.values())
        whole = masks[0]
        for mask in masks[1:]:
            whole = torch.maximum(whole, mask)
        return whole


FAR = 1e6
"""What a separation is cut off at; zeros would be infinitely far from the rest."""


def aim(
    channels: Mapping[str, Sequence[int]],
    groups: Mapping[str, ChannelGroup],
    reach: Callable[[ChannelGroup], Sequence[tuple[str, int]]],
    parameters: Mapping[str, nn.Parameter],
) -> list[Target]:
    """One target per parameter that has slices of the given channels; tied names are one parameter.

    Args:
        channels: group name to channel numbers.
        groups: the groups by name.
        reach: which members of a group are meant; buffers among them are passed over.
        parameters: parameters by every name they have.
    """
    masks: dict[int, tuple[nn.Parameter, dict[str, Tensor]]] = {}
    for name, numbers in channels.items():
        for member, dim in reach(groups[name]):
            if member not in parameters:
                continue
            parameter = parameters[member]
            mask = slices(parameter, dim, groups[name].index[member, dim][list(numbers)])
            known = masks.setdefault(id(parameter), (parameter, {}))[1]
            known[name] = torch.maximum(known[name], mask) if name in known else mask
    return [Target(parameter, masked) for parameter, masked in masks.values()]


def parameters_of(network: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by every name they have, whatever ``torch.compile`` has wrapped."""
    return {plain_name(name): parameter for name, parameter in network.named_parameters(remove_duplicate=False)}


@torch.no_grad()
def zero_out_(targets: Sequence[Target]) -> None:
    """Set everything to zero that the targets' masks cover.

    Where they cover all members of channel groups, that is what leaves with the channels: rows and biases of the
    layers that produce them, scales and shifts of norms, and what the next layers read from them; then the channels'
    removal changes no output. Behind a scale and a shift of zero running statistics don't matter.
    """
    for target in targets:
        target.parameter.masked_fill_(target.union().to(torch.bool), 0)


def squared_norm(targets: Sequence[Target]) -> Tensor:
    """Squared norm of everything that the targets' masks cover."""
    weights = [target.parameter.detach() for target in targets]
    parts = torch._foreach_norm(torch._foreach_mul(weights, [target.union() for target in targets]))
    return _stacked(parts).square().sum()


def separation(targets: Sequence[Target]) -> Tensor:
    r"""How far what the targets' masks cover stands apart from the rest, in the median tensor; at most :data:`FAR`.

    .. math:: \sqrt{\frac{\lVert W_{stays} \rVert^2 / N_{stays}}{\lVert W_{goes} \rVert^2 / N_{goes}}}

    >>> weight = nn.Parameter(torch.tensor([[3.0, 3.0], [0.5, -0.5]]))
    >>> separation([Target(weight, {"0": torch.tensor([[0.0], [1.0]])})])
    tensor(6.)
    """
    weights, masks = [target.parameter.detach() for target in targets], [target.union() for target in targets]
    sizes = [float(weight.numel()) for weight in weights]
    shares = [size / mask.numel() for size, mask in zip(sizes, masks, strict=True)]
    count = _stacked(torch._foreach_mul(torch._foreach_norm([mask.float() for mask in masks], 1), shares))
    rest = _stacked(torch._foreach_add(list((-count).unbind()), sizes))
    goes = _stacked(torch._foreach_norm(torch._foreach_mul(weights, masks))).square()
    stays = (_stacked(torch._foreach_norm(weights)).square() - goes).clamp_min(0)
    return ((stays / rest) / (goes / count)).sqrt().nanmedian().clamp_max(FAR)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([part.float() for part in parts])
