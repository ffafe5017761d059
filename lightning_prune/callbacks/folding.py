"""What channels still emit when their scales are zero goes into the biases of the layers that read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils import _pytree as pytree

from lightning_prune.callbacks.targets import aim, parameters_of, zero_out_
from lightning_prune.structure import ChannelGroup
from lightning_prune.structure.plan import layer_of, named_tensors, plain_name, submodule
from lightning_prune.structure.replica import quiet_room, replica, to_device, uncompiled

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class Fold(NamedTuple):
    """What can be folded, and what can't.

    Args:
        added: name of a bias or of a running mean -> what is added to it, on the CPU.
        groups: the channel groups whose constants that carries.
        refused: name of another group -> why, with the layer that can't take its constants exactly.
    """

    added: dict[str, Tensor]
    groups: tuple[str, ...]
    refused: dict[str, str]


class _InexactError(Exception):
    """A layer can't take a constant exactly; says why."""


class _Seen:
    """What one layer was called with, and who read what it gave.

    Args:
        module: the layer.
        positions: of its input that are looked at.
    """

    def __init__(self, module: nn.Module, positions: Tensor) -> None:
        self.module = module
        self.positions = positions
        self.constants: list[tuple[Tensor, Tensor]] = []  # per call: what stood there, and how much it varied
        self.norms: list[str] = []  # per call: the batch norm that read just what came out
        self._output: Tensor | None = None

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            dim = args[0].dim() - 1 - len(getattr(module, "kernel_size", ()))
            rows = args[0].movedim(dim, 0)[self.positions.to(args[0].device)].flatten(1)
            low, high = rows.aminmax(dim=1)
            self.constants.append(((low + high) / 2, high - low))

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._output = output.clone() if module.bias is None else None

    def norm(self, name: str, read: Any) -> None:
        output = self._output
        if output is not None and isinstance(read, Tensor) and output.shape == read.shape and torch.equal(output, read):
            self.norms.append(name)
            self._output = None


@torch.no_grad()
def find_fold(
    network: nn.Module, groups: Mapping[str, ChannelGroup], removal: Mapping[str, Sequence[int]], inputs: Inputs
) -> Fold:
    r"""How the layers behind can do without channels that emit nothing but a constant.

    A layer that reads the constants :math:`a_c` gives the same output without them if its bias grows by
    :math:`\sum_c a_c \sum_{hw} W_{:chw}`; where it has no bias, the running mean of the batch norm right behind it
    falls by that. This is exact for linear layers and for convolutions without zero padding; a constant beside padding
    is no constant, so there only zeros can go. A copy runs once in evaluation mode, with scales of zero, to see what
    is read; what varies over samples or positions is refused, and so is everything if the copy's outputs change.

    Args:
        network: left as it is.
        groups: channel groups by name.
        removal: group name to the channels that go.
        inputs: positional and named arguments of the network.
    """
    twin = uncompiled(replica(network)).eval()
    # weight averages may lie elsewhere than the network in training
    home = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    inputs = to_device(inputs[0], home), to_device(inputs[1], home)
    gone = {name: groups[name] for name in removal}
    zero_out_(aim(removal, gone, lambda group: group.scales, parameters_of(twin)))
    reads = {
        name: {member: group.index[member][list(removal[name])].flatten() for member in group.inputs}
        for name, group in gone.items()
    }
    seen = {
        member: _Seen(submodule(twin, layer_of(member[0])), positions)
        for members in reads.values()
        for member, positions in members.items()
    }
    with _watching(twin, list(seen.values())):
        before = _outputs(twin, inputs)
    added, refused = dict[str, Tensor](), dict[str, str]()
    for name, members in reads.items():
        try:
            parts = [_moved(twin, member, seen[member]) for member in members]
        except _InexactError as why:
            refused[name] = str(why)
            continue
        for key, value in (pair for part in parts for pair in part.items()):
            added[key] = added[key] + value if key in added else value
    fold = Fold(added, tuple(name for name in reads if name not in refused), refused)
    fold_(twin, groups, removal, fold)
    after = _outputs(twin, inputs)
    if fold.groups and not all(map(_alike, before, after)):
        return Fold({}, (), dict.fromkeys(reads, "the network's outputs would change"))
    return fold


def refusal(refused: Mapping[str, str], among: int, fate: str) -> str:
    """What to say of layers whose constants can't be folded: how many, what becomes of them, and why.

    >>> refusal({"conv1": "conv2 pads with zeros"}, among=3, fate="is lost")
    "what channels of 1 of 3 layers still emit can't be folded exactly and is lost (conv1: conv2 pads with zeros)."
    """
    reasons = "; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:5])
    more = ", ..." if len(refused) > 5 else ""
    layers = f"{len(refused)} of {among} layers"
    return f"what channels of {layers} still emit can't be folded exactly and {fate} ({reasons}{more})."


@torch.no_grad()
def fold_(
    network: nn.Module, groups: Mapping[str, ChannelGroup], removal: Mapping[str, Sequence[int]], fold: Fold
) -> None:
    """Add what was found, and set everything to zero that leaves with the folded channels: nobody reads them then."""
    tensors = named_tensors(network)
    for name, value in fold.added.items():
        tensors[name].add_(value.to(tensors[name].device, tensors[name].dtype))
    channels = {name: removal[name] for name in fold.groups}
    zero_out_(aim(channels, groups, lambda group: group.members, parameters_of(network)))


def _moved(network: nn.Module, member: tuple[str, int], seen: _Seen) -> dict[str, Tensor]:
    """What one layer's reading of constants adds to which tensor."""
    layer, module = layer_of(member[0]), seen.module
    weight = _readable(layer, module, member)
    if not seen.constants:
        raise _InexactError(f"{layer} is not called by itself")
    constants = [constant for constant, _ in seen.constants]
    allowed = min(1e3 * torch.finfo(weight.dtype).eps, 1e-2) * max(float(each.abs().max()) for each in constants)
    spread = [*(varied for _, varied in seen.constants), *(each - constants[0] for each in constants)]
    if any(float(part.abs().max()) > allowed for part in spread):
        raise _InexactError(f"{layer} reads what varies")
    if not constants[0].any():
        return {}
    if isinstance(module, _ConvNd) and _pads_zeros(module):
        raise _InexactError(f"{layer} pads with zeros")
    rows = weight.detach()[:, seen.positions.to(weight.device)].cpu().double()
    total = rows.unsqueeze(2).flatten(2).sum(dim=2) @ constants[0].cpu().double()
    if module.bias is not None:
        return {f"{layer}.bias" if layer else "bias": total}
    if len(seen.norms) != len(constants):
        raise _InexactError(f"{layer} has neither a bias nor a batch norm right behind it")
    buffers = named_tensors(network)
    # a norm without running statistics takes a constant away by itself
    return {f"{norm}.running_mean": -total for norm in set(seen.norms) if f"{norm}.running_mean" in buffers}


def _readable(layer: str, module: nn.Module, member: tuple[str, int]) -> Tensor:
    """The weight of a layer of a kind whose sums are known."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    is_plain = weight is not None and member == (f"{layer}.weight" if layer else "weight", 1)
    is_known = isinstance(module, nn.Linear) or (
        isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd)
    )
    if not is_known or not is_plain or weight is None or getattr(module, "groups", 1) != 1:
        raise _InexactError(f"{layer} is no linear layer or convolution of one group")
    return weight


def _pads_zeros(module: _ConvNd) -> bool:
    if module.padding_mode != "zeros" or module.padding == "valid":
        return False
    if module.padding == "same":
        return any(size > 1 for size in module.kernel_size)
    return any(int(width) > 0 for width in module.padding)


@contextmanager
def _watching(network: nn.Module, records: Sequence[_Seen]) -> Iterator[None]:
    """Note what the reading layers are called with, and which batch norms read just what they give."""

    def norm(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        for record in records:
            record.norm(name, args[0] if args else None)

    handles = []
    for record in records:
        if isinstance(record.module, (nn.Linear, _ConvNd)):
            handles.append(record.module.register_forward_pre_hook(record.enter))
            handles.append(record.module.register_forward_hook(record.leave))
    for name, module in network.named_modules():
        if isinstance(module, _NormBase):
            handles.append(module.register_forward_pre_hook(partial(norm, plain_name(name))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _outputs(network: nn.Module, inputs: Inputs) -> list[Tensor]:
    args, kwargs = inputs
    with quiet_room():
        leaves = pytree.tree_leaves(network(*args, **kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _alike(before: Tensor, after: Tensor) -> bool:
    allowed = torch.finfo(before.dtype).eps ** 0.5 * before.abs().max()
    return bool((before - after).abs().max() <= allowed) if before.numel() else True
