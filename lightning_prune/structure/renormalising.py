"""Statistics over what stays: how a masked network runs norms over channels, and weights that are standardised.

A norm over channels is known by its scale, or by what has been made of that (``1 + weight``). An average of
activations is taken over those channels that a plan keeps, of the groups that it names, where all others are zero. A
standardised weight is followed from the parameter on, through layout and arithmetic position by position. A mean, a
deviation or a batch norm over it takes what is left alone, and where that meets the weight, the result is zero
wherever the plan keeps nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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


def makes_weight(call: Call, rule: Rule, is_weight: Callable[[Tensor], bool]) -> bool:
    """Whether a result is followed as a weight: moved, it is made of weights alone, combined, of any."""
    if not carries(call.name, rule) or not call.inputs:
        return False
    if rule is normalisation.batch_norm or call.name.endswith("_as"):  # the others scale it or lend their shape
        return is_weight(call.inputs[0])
    return (all if _moves(rule) else any)(map(is_weight, call.inputs))


def meetings(call: Call, rule: Rule) -> tuple[list[Tensor], list[Tensor]]:
    """Of an operator over weights: the tensors that it combines position by position, and the results to follow.

    A statistic that meets the weight it was taken of standardises it. One that goes elsewhere, into a penalty or an
    activation, tells how many channels there are.
    """
    followed = rule is reduction.statistic or carries(call.name, rule)
    return call.inputs if _by_position(rule) else [], call.outputs if followed else []


def standardises(rule: Rule, met: bool) -> bool:
    """Whether an operator over a weight combines it with statistics of its own; ``met``: one is among what it reads."""
    return met or rule is normalisation.batch_norm


def _moves(rule: Rule) -> bool:
    return rule.__module__ == layout.__name__


def _by_position(rule: Rule) -> bool:
    return rule.__module__ == elementwise.__name__


class Renormalising:
    """Runs the operators of a masked network, those that take statistics over what stays among them.

    Args:
        plan: which norms, weights and averages are renormalised, and what of them stays.
        tensors: the network's parameters and buffers by name.
        sizes: of what the slim network takes statistics over, one after another, where that is known.
    """

    def __init__(self, plan: PruningPlan, tensors: Mapping[str, Tensor], sizes: Iterable[torch.Size] = ()) -> None:
        #: tensor -> which of its positions stay, of the same shape
        self._stays: Any = WeakIdKeyDictionary()
        #: statistics of these, and what has been made of them alone
        self._statistics: Any = WeakIdKeyDictionary()
        #: length of a dim -> which of its channels may stay, fewest first
        self._choices: dict[int, list[Tensor]] = {}
        self._sizes = iter(sizes)
        for name in plan.renormalised:
            tensor = tensors[name]
            stays = tensor.new_ones(tensor.shape, dtype=torch.bool)
            for dim in range(tensor.dim()):
                if (name, dim) in plan.kept:
                    line = tensor.new_zeros(tensor.shape[dim], dtype=torch.bool)
                    line[torch.tensor(plan.kept[name, dim], device=tensor.device)] = True
                    stays.index_fill_(dim, (~line).nonzero().flatten(), False)
                    self._choices.setdefault(len(line), []).append(line)
            self._stays[tensor] = stays
        for lines in self._choices.values():
            lines.sort(key=lambda line: int(line.sum()))

    def run(self, func: Any, name: str, rule: Rule, args: Any, kwargs: Any) -> Any:
        """The result of an operator, over what stays where statistics are taken."""
        scale = args[2] if name in NORMS and len(args) > 2 else None
        if scale is not None and scale in self._stays:
            return _over_kept(func, name, args, kwargs, self._stays[scale].nonzero().flatten())
        if rule is reduction.statistic:
            dims = kwargs.get("dim", args[1] if len(args) > 1 and not isinstance(args[1], bool) else None)
            left = next(self._sizes, None)
            result = func(self._gathered(args[0], several(dims, args[0].dim()), left), *args[1:], **kwargs)
            if args[0] in self._stays or args[0] in self._statistics:
                self._note_statistics(result)
            return result
        operands = list(tensors_in((args, kwargs)))
        met = any(tensor in self._statistics for tensor in operands)
        if not any(tensor in self._stays for tensor in operands):
            result = func(*args, **kwargs)
            if met and carries(name, rule):
                self._note_statistics(result)
            return result
        if rule is normalisation.batch_norm:
            if args[0] not in self._stays:
                return func(*args, **kwargs)
            result = self._batch_norm(func, *args, **kwargs)
            self._stays[result] = self._stays[args[0]]
            return result
        result = func(*args, **kwargs)
        if carries(name, rule):
            self._carry(func, rule, args, kwargs, result, met)
        return result

    def _note_statistics(self, result: Any) -> None:
        for tensor in tensors_in(result):
            self._statistics[tensor] = True

    def _carry(self, func: Any, rule: Rule, args: Any, kwargs: Any, result: Any, met: bool) -> None:
        """What an operator moves is moved along; of what it combines stays what all of them keep."""
        if _moves(rule):
            moved = func(*pytree.tree_map(self._known, args), **kwargs)
            for tensor, stays in zip(tensors_in(result), tensors_in(moved), strict=True):
                self._stays[tensor] = stays
            if met:  # `expand_as` reads the weight only for its shape
                self._note_statistics(result)
            return
        for tensor in tensors_in(result):
            stays = tensor.new_ones(tensor.shape, dtype=torch.bool)
            for operand in tensors_in((args, kwargs)):
                stays = stays & self._known(operand)
            self._stays[tensor] = stays
            if standardises(rule, met):
                tensor.masked_fill_(~stays, 0)

    def _known(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return self._stays[leaf] if leaf in self._stays else leaf.new_ones(leaf.shape, dtype=torch.bool)

    def _gathered(self, tensor: Tensor, dims: Collection[int], left: torch.Size | None = None) -> Tensor:
        """What stays along some dims."""
        for dim, line in self._lines(tensor, dims, left).items():
            tensor = tensor.index_select(dim, line.nonzero().flatten())
        return tensor

    def _lines(self, tensor: Tensor, dims: Collection[int], left: torch.Size | None = None) -> dict[int, Tensor]:
        """Along each of some dims, which positions stay.

        Of activations those are told by the zeros of the others, and by how many are left, where that is known.
        """
        if tensor in self._stays:
            stays = self._stays[tensor]
            return {dim: stays.movedim(dim, 0).reshape(stays.shape[dim], -1).any(1) for dim in dims}
        found = {}
        for dim in dims:
            lines: Sequence[Tensor] = self._choices.get(tensor.shape[dim], ())
            if left is not None and len(left) == tensor.dim():
                lines = [line for line in lines if int(line.sum()) == left[dim]]
            if (line := next((line for line in lines if _holds_only(tensor, dim, line)), None)) is not None:
                found[dim] = line
        return found

    def _batch_norm(self, func: Any, source: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        """Statistics over all dims but the second; what does not stay is zero."""
        dims = [dim for dim in range(source.dim()) if dim != 1]
        place = torch.ones_like(source, dtype=torch.bool)
        for dim, line in self._lines(source, dims).items():
            place &= line.reshape([-1 if k == dim else 1 for k in range(source.dim())])
        result = func(self._gathered(source, dims), *rest, **kwargs)
        return torch.zeros_like(source).masked_scatter_(place, result)


def _holds_only(tensor: Tensor, dim: int, line: Tensor) -> bool:
    """Whether all but these positions along a dim are zero."""
    return not bool(tensor.index_select(dim, (~line).nonzero().flatten()).any())


#: Norms over channels that are known by their scale.
NORMS = ("layer_norm", "group_norm", "rms_norm")


def _over_kept(func: Any, name: str, args: Any, kwargs: Any, kept: Tensor) -> Tensor:
    """A norm over the kept channels; the others come out as zero."""
    source, second, scale, *rest = args
    dim = 1 if name == "group_norm" else source.dim() - 1
    size = second if name == "group_norm" else [len(kept)]
    if name != "rms_norm" and rest and rest[0] is not None:
        rest[0] = rest[0][kept]
    normed = func(source.index_select(dim, kept), size, scale[kept], *rest, **kwargs)
    return torch.zeros_like(source).index_copy_(dim, kept, normed)
