"""Cutting with little memory: what stays and what goes change places within the memory that a model has.

A tensor is reordered into spare memory, what stays first along every dim, and a view of that is the slim tensor; the
memory where it was is the spare for the next tensor, which is no larger. Nothing is lost on the way, and the way back
is the same walk backwards: it takes no memory and ends with every tensor where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

#: Not documented by torch; without it nobody is known to be alone.
_count_holders: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)

#: Dim -> which of its positions come first, second, ...
Orders = Mapping[int, Tensor]

BESIDE = 8 * 2**20
"""Bytes of slim copies that are made in any case, which is faster."""

_BLOCK = 2**16
"""Bytes that are reordered along several dims at a time: too few for threads, which would wait for each other."""


def is_alone(tensor: Tensor) -> bool:
    """Whether a tensor lies in memory of its own that nobody else reads, so that it may be written over for a while.

    False for what lies on an accelerator, in a file, in memory that processes share or that another library has lent,
    and wherever a second tensor (a ``state_dict``, a view, a graph kept for its gradients) is in the same memory.
    """
    if type(tensor) is not nn.Parameter or tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return False
    if tensor.is_inference() or tensor.is_conj() or tensor.is_neg() or not _packed(tensor).is_contiguous():
        return False
    storage = tensor.untyped_storage()
    whole = 0 < storage.nbytes() == tensor.nbytes and storage.resizable() and not storage.is_shared()
    holders = _holders(tensor)
    return whole and holders is not None and holders == _holders(torch.empty(0, device="cpu"))


def _holders(tensor: Tensor) -> int | None:
    """How many hold a tensor's memory, this function included; ``None`` where torch doesn't tell."""
    storage = tensor.untyped_storage()
    return None if _count_holders is None else _count_holders(storage._cdata)


def worth_parting(sizes: Sequence[tuple[int, int]]) -> slice:
    """Which tensors are to be parted, so that this and slim copies of the others take little memory.

    Args:
        sizes: of each tensor the bytes that it takes and those that stay, largest first.

    >>> mb = 2**20
    >>> worth_parting([(100 * mb, 10 * mb), (50 * mb, 40 * mb), (40 * mb, 20 * mb), (9 * mb, 5 * mb)])
    slice(1, 3, None)
    """
    copied = [total for total in accumulate(slim for _, slim in reversed(sizes)) if total <= BESIDE]
    others = sizes[: len(sizes) - len(copied)]
    beside = accumulate((slim for _, slim in others), initial=0)
    spare = [*(dense for dense, _ in others), 0]
    total = [slim + dense for slim, dense in zip(beside, spare, strict=True)]
    return slice(total.index(min(total)), len(others))


def spare_for(tensor: Tensor) -> Tensor:
    """Memory for as much as a tensor holds."""
    return torch.empty(tensor.nbytes, dtype=torch.uint8, device=tensor.device)


def housed(tensor: Tensor, spare: Tensor) -> Tensor:
    """A tensor of the same kind, shape and strides in other memory, which is at least as large."""
    like = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return like.set_(spare.untyped_storage(), 0, tensor.size(), tensor.stride())


def reorder_(out: Tensor, source: Tensor, orders: Orders) -> None:
    """Write a tensor, reordered along some dims, into another one of its shape and strides.

    >>> out = torch.empty(2, 3)
    >>> reorder_(out, torch.arange(6.0).reshape(2, 3), {0: torch.tensor([1, 0]), 1: torch.tensor([2, 0, 1])})
    >>> out
    tensor([[5., 3., 4.],
            [2., 0., 1.]])
    """
    outermost = _order_in_memory(source)
    source, out = _packed(source), _packed(out)
    *others, (last, order) = sorted((outermost.index(dim), order) for dim, order in orders.items())
    rows = max(1, _BLOCK * len(source) // source.nbytes) if others else len(source)
    for start in range(0, len(source), rows):
        block = slice(start, start + rows)
        part = source if others and others[0][0] == 0 else source[block]
        for dim, positions in others:
            part = part.index_select(dim, positions[block] if dim == 0 else positions)
        torch.index_select(part, last, order, out=out[block])


def _packed(tensor: Tensor) -> Tensor:
    """A tensor with its dims as they lie in memory, outermost first: contiguous, unless it has gaps or overlaps."""
    return tensor.detach().permute(_order_in_memory(tensor))


def _order_in_memory(tensor: Tensor) -> list[int]:
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
