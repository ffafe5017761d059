"""What the judge knows of averages over channels: they are taken over the channels that the slim network has there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

AVERAGES = (Tensor.mean, torch.mean, Tensor.var, torch.var, Tensor.amax, torch.amax, Tensor.amin, torch.amin)


class HeardAverages(TorchFunctionMode):
    """Keeps what the slim network takes averages of, in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in AVERAGES:
            self.inputs.append(args[0].detach())
        return func(*args, **(kwargs or {}))


class KeptAverages(TorchFunctionMode):
    """The masked network takes an average over a dim along which the slim one has less of what that has there."""

    def __init__(self, heard: Sequence[Tensor]) -> None:
        super().__init__()
        self.heard = iter(heard)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in AVERAGES:
            return func(*args, **(kwargs or {}))
        dense, slim = args[0], next(self.heard)
        apart = [dim for dim in range(dense.dim()) if dense.shape[dim] != slim.shape[dim]]
        dims = (kwargs or {}).get("dim", args[1] if len(args) > 1 else None)
        listed = range(dense.dim()) if dims is None else [dims] if isinstance(dims, int) else dims
        if len(apart) != 1 or apart[0] not in [dim % dense.dim() for dim in listed]:
            return func(*args, **(kwargs or {}))
        line = match(dense, slim, apart).flatten().nonzero().flatten()
        return func(dense.index_select(apart[0], line), *args[1:], **(kwargs or {}))


def match(dense: Tensor, slim: Tensor, dims: Sequence[int], groups: int = 1) -> Tensor:
    """Indicator, broadcastable to ``dense``, of the slices along one of ``dims`` that the slim tensor holds too.

    Slices are compared by value, in order and within each of ``groups`` equal stretches; where two of one stretch are
    equal it makes no difference to a norm which of them is taken.
    """
    shrunk = [dim for dim in dims if dense.shape[dim] != slim.shape[dim]]
    mask = torch.ones([dense.shape[dim] if dim in dims else 1 for dim in range(dense.dim())], dtype=torch.float64)
    if not shrunk:
        return mask
    assert len(shrunk) == 1, f"a norm without weights met {tuple(dense.shape)} and {tuple(slim.shape)}"
    (dim,) = shrunk
    rows, wanted = dense.detach().movedim(dim, 0).flatten(1), slim.movedim(dim, 0).flatten(1)
    line = torch.zeros(len(rows), dtype=torch.float64)
    for have, want, seen in zip(rows.chunk(groups), wanted.chunk(groups), line.chunk(groups), strict=True):
        seen[_subsequence(have, want)] = 1.0
    return mask * line.reshape([-1 if d == dim else 1 for d in range(dense.dim())])


def _subsequence(rows: Tensor, wanted: Tensor) -> list[int]:
    close = torch.cdist(wanted, rows, compute_mode="donot_use_mm_for_euclid_dist") <= 1e-7 * (1 + rows.norm(dim=1))
    found: list[int] = []
    for number in range(len(wanted)):
        ahead = [row for row in close[number].nonzero().flatten().tolist() if not found or row > found[-1]]
        assert ahead, "a norm without weights saw channels that the dense one lacks"
        found.append(ahead[0])
    return found
