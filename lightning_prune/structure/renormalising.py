"""Statistics over what stays: how a masked network runs norms over channels, and weights that are standardised.

A norm over channels is known by its scale. A standardised weight is followed from the parameter on, through layout and
arithmetic position by position, and is zero all the way wherever its plan keeps nothing; a mean, a deviation or a batch
norm over it takes what is left alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from lightning_prune.structure.call import Call, Rule, tensors_in
from lightning_prune.structure.plan import PruningPlan
from lightning_prune.structure.rules import elementwise, layout, normalisation, reduction
from lightning_prune.structure.rules.registry import several


def carries(name: str, rule: Rule) -> bool:
    """Whether what an operator makes of a weight is followed: another layout, or arithmetic position by position."""
    return rule is normalisation.batch_norm or (_moves(rule) and name != "_weight_norm") or _by_position(rule)


def meetings(call: Call, rule: Rule) -> tuple[list[Tensor], list[Tensor]]:
    """Of an operator over weights: the tensors that it combines position by position, and the results to follow.

    A statistic that meets the weight it was taken of standardises it. One that goes elsewhere, into a penalty or an
    activation, tells how many channels there are.
    """
    followed = rule is reduction.statistic or carries(call.name, rule)
    return call.inputs if _by_position(rule) else [], call.outputs if followed else []


def _moves(rule: Rule) -> bool:
    return rule.__module__ == layout.__name__


def _by_position(rule: Rule) -> bool:
    return rule.__module__ == elementwise.__name__


class Renormalising:
    """Runs those operators of a masked network that take statistics over what stays.

    Args:
        plan: which norms and weights are renormalised, and what of them stays.
        tensors: the network's parameters and buffers by name.
    """

    def __init__(self, plan: PruningPlan, tensors: Mapping[str, Tensor]) -> None:
        self._channels: dict[int, Tensor] = {}
        #: tensor -> which of its positions stay, of the same shape
        self._stays: Any = WeakIdKeyDictionary()
        for name in plan.renormalised:
            tensor = tensors[name]
            stays = tensor.new_ones(tensor.shape, dtype=torch.bool)
            for dim in range(tensor.dim()):
                if (name, dim) in plan.kept:
                    kept = torch.tensor(plan.kept[name, dim], device=tensor.device)
                    gone = tensor.new_ones(tensor.shape[dim], dtype=torch.bool).index_fill_(0, kept, False)
                    stays.index_fill_(dim, gone.nonzero().flatten(), False)
            self._stays[tensor] = stays
            if tensor.dim() == 1:
                self._channels[id(tensor)] = stays.nonzero().flatten()

    def channels(self, name: str, args: Any) -> Tensor | None:
        """Those that a layer norm or group norm is to run over, where others have gone."""
        scale = args[2] if name in ("layer_norm", "group_norm") and len(args) > 2 else None
        return None if scale is None else self._channels.get(id(scale))

    def reads(self, args: Any, kwargs: Any) -> bool:
        """Whether an operator reads a renormalised weight, or what was made of one."""
        return len(self._stays) > 0 and any(tensor in self._stays for tensor in tensors_in((args, kwargs)))

    def run(self, func: Any, name: str, rule: Rule, args: Any, kwargs: Any) -> Any:
        """The result of an operator that does."""
        if rule is reduction.statistic and args[0] in self._stays:
            dims = kwargs.get("dim", args[1] if len(args) > 1 and not isinstance(args[1], bool) else None)
            return func(self._gathered(args[0], several(dims, args[0].dim())), *args[1:], **kwargs)
        if rule is normalisation.batch_norm and args[0] in self._stays:
            result = self._batch_norm(func, *args, **kwargs)
            self._stays[result] = self._stays[args[0]]
            return result
        result = func(*args, **kwargs)
        if carries(name, rule):
            self._carry(func, rule, args, kwargs, result)
        return result

    def _carry(self, func: Any, rule: Rule, args: Any, kwargs: Any, result: Any) -> None:
        """What an operator moves is moved along; of what it combines stays what all of them keep."""
        if _moves(rule):
            moved = func(*pytree.tree_map(self._known, args), **kwargs)
            for tensor, stays in zip(tensors_in(result), tensors_in(moved), strict=True):
                self._stays[tensor] = stays
            return
        for tensor in tensors_in(result):
            stays = tensor.new_ones(tensor.shape, dtype=torch.bool)
            for operand in tensors_in((args, kwargs)):
                stays = stays & self._known(operand)
            self._stays[tensor] = stays
            tensor.masked_fill_(~stays, 0)

    def _known(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return self._stays[leaf] if leaf in self._stays else leaf.new_ones(leaf.shape, dtype=torch.bool)

    def _gathered(self, tensor: Tensor, dims: Collection[int]) -> Tensor:
        """What stays along some dims."""
        for dim, line in self._lines(tensor, dims).items():
            tensor = tensor.index_select(dim, line.nonzero().flatten())
        return tensor

    def _lines(self, tensor: Tensor, dims: Collection[int]) -> dict[int, Tensor]:
        """Along each of some dims, which positions stay."""
        stays = self._stays[tensor]
        return {dim: stays.movedim(dim, 0).reshape(stays.shape[dim], -1).any(1) for dim in dims}

    def _batch_norm(self, func: Any, source: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        """Statistics over all dims but the second; what does not stay is zero."""
        dims = [dim for dim in range(source.dim()) if dim != 1]
        place = torch.ones_like(source, dtype=torch.bool)
        for dim, line in self._lines(source, dims).items():
            place &= line.reshape([-1 if k == dim else 1 for k in range(source.dim())])
        result = func(self._gathered(source, dims), *rest, **kwargs)
        return torch.zeros_like(source).masked_scatter_(place, result)


def over_kept(func: Any, name: str, args: Any, kwargs: Any, kept: Tensor) -> Tensor:
    """A layer norm or group norm over the kept channels; the others come out as zero."""
    source, second, scale, shift, *rest = [*args, None][: max(len(args), 4)]
    dim = source.dim() - 1 if name == "layer_norm" else 1
    small = source.index_select(dim, kept)
    size = [len(kept)] if name == "layer_norm" else second
    normed = func(small, size, scale[kept], None if shift is None else shift[kept], *rest, **kwargs)
    return torch.zeros_like(source).index_copy_(dim, kept, normed)
