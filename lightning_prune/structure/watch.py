"""One forward pass, watched operator by operator, while labels travel along.

A dispatch mode sees every operator before it is taken apart (``linear``, ``batch_norm``, ``flatten``, ...). A rule
(see ``rules``) says how labels flow through it; a composite operator without a rule is opened up, and any other one
pins what it reads. The pass runs on tensors without memory where the model allows it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.structure.call import Call, Rule, tensors_in
from lightning_prune.structure.knowledge import Knowledge, Record
from lightning_prune.structure.labels import Axes, Ints
from lightning_prune.structure.plan import named_modules, named_parameters, named_tensors
from lightning_prune.structure.renormalising import makes_weight, meetings, standardises
from lightning_prune.structure.replica import quiet_room
from lightning_prune.structure.rules import RULES, pointwise
from lightning_prune.structure.shapes import foretell

ROOM = 128 * 2**20
"""Bytes of a pass's results that are kept."""


class Results:
    """What operators returned, by their number in the pass, as far as there is room.

    Wanted are those that read channels which may go and return none. Which these are is not known during the pass, but
    an operator that goes on with all that it reads is not among them, and one whose channels a later layer reads is
    not likely to be; these are forgotten first, then the largest.
    """

    def __init__(self, known: Knowledge) -> None:
        self.known = known
        self.found: dict[int, list[Tensor]] = {}
        self._axes: dict[int, tuple[Sequence[Axes], Sequence[Axes]]] = {}
        self._room = ROOM

    def keep(self, number: int, tensors: list[Tensor], read: Sequence[Axes], written: Sequence[Axes]) -> None:
        """Take copies, for operators in place may change the tensors."""
        size = _bytes(tensors)
        if size > ROOM:
            return
        self.found[number], self._axes[number] = tensors, (read, written)
        self._room -= size
        if self._room < 0:
            self._forget(ROOM // 4)
        if number in self.found:
            self.found[number] = [tensor.clone() for tensor in tensors]

    def _forget(self, room: int) -> None:
        """Forget until there is some room again."""
        root, reasons = self.known.labels.solve()
        consumed = np.zeros(root.size, dtype=bool)
        consumed[root[self.known.labels_of("inputs")]] = True
        pinned = np.zeros(root.size, dtype=bool)
        pinned[list(reasons)] = True
        order = []
        for number, tensors in self.found.items():
            read, written = (root[_labels_of(side)] for side in self._axes[number])
            goes_on = bool(np.isin(read[~pinned[read]], written).all())
            order.append((goes_on, bool(consumed[written].any()), _bytes(tensors), number))
        for goes_on, _, size, number in sorted(order, reverse=True):
            if self._room < room or goes_on:
                self._room += size
                del self.found[number], self._axes[number]


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _labels_of(tensors: Iterable[Axes]) -> Ints:
    found = [axis.labels for axes in tensors for axis in axes if axis is not None]
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


class Repeats:
    """Computes what costs the square of what is read only once for the same values, pass after pass."""

    #: Their results follow from their tensors' values and their numbers.
    OPERATORS = ("torchvision.nms",)

    def __init__(self) -> None:
        self._found: dict[tuple[Any, ...], Tensor] = {}

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """As :func:`compute`."""
        if operator_name(func) not in self.OPERATORS or any(tensor.is_meta for tensor in tensors_in(args)):
            return compute(func, args, kwargs)
        key = tuple(_contents(arg) if isinstance(arg, Tensor) else arg for arg in (*args, *kwargs.items()))
        if key not in self._found:
            self._found[key] = func(*args, **kwargs)
        return self._found[key].clone()


def _contents(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors have in common if and only if they are equal bit for bit."""
    whole = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tensor.shape, whole.numpy().tobytes()


class Watcher(TorchDispatchMode):
    """The dispatch mode that writes the notebook (``known``) and the ``records`` of one pass of ``model``, a copy.

    Where tensors have memory, some ``results`` are kept for those who go the same way again, and what ``repeats``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.model = model
        self.known = Knowledge(model, named_tensors(model))
        self.results = Results(self.known)
        self.repeats = Repeats()
        self.records: list[Record] = []
        self._after_branch: list[Axes] | None = None

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the forward pass; afterwards notebook and records are complete."""
        for name, module in named_modules(self.model):
            if not isinstance(module, torch.jit.ScriptModule):
                # cheaper than hooks, and around those that the module has
                vars(module)["_compiled_call_impl"] = self._within(name, module._call_impl)
        for tensor in tensors_in(pytree.tree_leaves((args, kwargs))):
            self.known.remember(tensor, (None,) * tensor.dim(), from_data=True)
        with quiet_room(), Constants(), self:
            output = self.model(*args, **kwargs)
        self.known.settle_live()
        # what was returned, or left behind on a module, keeps its channels
        self._pin_all(self.known.live(also=tensors_in(pytree.tree_leaves(output))), "are the network's output")
        if self._after_branch is not None and self._has_unused_layers():
            self._pin_all(self._after_branch, "may be read by a branch that depends on the data")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = rule_for(func)
        if rule is None:
            opened = open_up(self, func, args, kwargs)
            if opened is not NotImplemented:
                return opened
        args, kwargs = on_meta(args, kwargs)
        result = self.repeats.compute(func, args, kwargs)
        self._follow(func, rule or unknown, args, kwargs, result)
        return result

    def _follow(self, func: Any, rule: Rule, args: Any, kwargs: Any, result: Any) -> None:
        call = Call(self.known, operator_name(func), args, kwargs, list(tensors_in(result)))
        from_data = any(self.known.from_data(tensor) for tensor in call.inputs)
        is_weight = not from_data and makes_weight(call, rule, self.known.is_weight)
        beside, results = ([], []) if from_data else meetings(call, rule)
        met = [self.known.settle(tensor, beside, results) for tensor in call.inputs]
        read = tuple(call.axes(tensor) for tensor in call.inputs)
        if from_data and not call.outputs and self._after_branch is None:
            self._after_branch = self.known.live()
        self.known.labels.place = call.name, self.known.module
        axes = rule(call)
        written = axes if isinstance(axes, list) else [axes] * len(call.outputs)
        if is_weight and standardises(rule, any(met)):
            written = [self.known.restored(new) for new in written]
        for tensor, new in zip(call.outputs, written, strict=True):
            self.known.remember(tensor, new, from_data, is_weight)
        if self._after_branch is not None:
            self._after_branch.extend(written)
        if call.name in UNSEEN:
            return
        shapes = tuple(tensor.shape for tensor in call.outputs)
        scalars = scalars_of(func, args, kwargs)
        if any(axis is not None for axes in read for axis in axes) and not any(each.is_meta for each in call.outputs):
            self.results.keep(len(self.records), call.outputs, read, written)
        self.records.append(Record(call.name, self.known.module, read, tuple(written), shapes, scalars))

    def _pin_all(self, tensors: list[Axes], why: str) -> None:
        for axis in (axis for axes in tensors for axis in axes if axis is not None):
            self.known.labels.pin(axis.labels, f"Its channels {why}.")

    def _has_unused_layers(self) -> bool:
        return any(name not in self.known.used for name, _ in named_parameters(self.model))

    def _within(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """A module's call that says which module is at work."""
        stack = self.known.stack

        def run(*args: Any, **kwargs: Any) -> Any:
            stack.append(name)
            try:
                return call(*args, **kwargs)
            finally:
                stack.pop()

        return run


#: Operators that are skipped where there is nothing to do, which may depend on sizes.
UNSEEN = ("contiguous",)


@cache
def operator_name(func: Any) -> str:
    """``aten.add_.Tensor`` -> ``add_``; operators of other libraries keep their namespace."""
    packet = func.overloadpacket
    name: str = packet.__name__
    return name if func.namespace == "aten" else f"{func.namespace}.{name}"


@cache
def rule_for(func: Any) -> Rule | None:
    """The rule of an operator; in-place forms share that of the plain one, pointwise operators share one."""
    name = operator_name(func)
    if func._overloadname.endswith("out"):
        return unknown
    rule = RULES.get(name) or RULES.get(name.removesuffix("_"))
    if rule is None and torch.Tag.pointwise in func.tags:
        return pointwise
    return rule


def unknown(call: Call) -> list[Axes]:
    """No rule: whatever goes in keeps its channels."""
    for tensor in call.inputs:
        call.pin(call.axes(tensor), "pass through an operator that has no rule")
    return [(None,) * tensor.dim() for tensor in call.outputs]


def open_up(mode: TorchDispatchMode, func: Any, args: Any, kwargs: Any) -> Any:
    """Run a composite operator as the smaller ones it consists of, if it is composite."""
    with mode:
        return func.decompose(*args, **kwargs)


def compute(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator; without memory, only the shape of its result is needed."""
    found = foretell(operator_name(func), args, kwargs)
    return func(*args, **kwargs) if found is None else found


def on_meta(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Bring an operator's tensors and devices to the meta device, as soon as one tensor is there."""
    found = [tensor.is_meta for tensor in tensors_in((args, kwargs))]
    if not any(found):
        return args, kwargs

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and not leaf.is_meta and leaf.dim():
            return leaf.to("meta")
        return torch.device("meta") if isinstance(leaf, torch.device) else leaf

    if all(found) and not any(isinstance(leaf, torch.device) for leaf in (*args, *kwargs.values())):
        return args, kwargs
    return pytree.tree_map(move, args), pytree.tree_map(move, kwargs)


#: Whole numbers among the arguments of these are no sizes of what they return: values, places and kernels.
_NO_SIZES = re.compile(
    r"(new_)?full(_like)?|scalar_tensor|arange|linspace|fill|add(b?mm|mv)|baddbmm|tril|triu|diagonal|select|kthvalue|"
    r"roll|(avg|max)_pool[123]d(_with_indices)?"
)


def scalars_of(func: Any, args: Any, kwargs: Any) -> tuple[float, ...]:
    """Numbers that enter an operator's arithmetic, or a tensor that Python makes; elsewhere whole ones are sizes."""
    name, kinds, in_lists = _numbers_of(func)
    if name == "lift_fresh":
        return () if args[0].is_meta else tuple(map(_number, args[0].flatten().tolist()))
    if name == "group_norm":
        return (args[1],)
    given = [*args, *kwargs.values()]
    if in_lists:
        given = [item for arg in given for item in (arg if isinstance(arg, (list, tuple)) else (arg,))]
    return tuple([_number(a) for a in given if isinstance(a, kinds) and not isinstance(a, bool)])


@cache
def _numbers_of(func: Any) -> tuple[str, tuple[type, ...], bool]:
    """An operator's name, which kinds of numbers count, and whether those in lists do."""
    name = operator_name(func)
    whole = torch.Tag.pointwise in func.tags or _NO_SIZES.fullmatch(name.removesuffix("_")) is not None
    return name, (int, float) if whole else (float,), whole and "full" not in name  # the first list of those is a shape


def _number(value: Any) -> Any:
    """A number that is equal to itself."""
    return None if value != value else value


class Constants(TorchFunctionMode):
    """Tensors that Python makes of numbers keep their values until an operator has read them, on any device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _OF_NUMBERS:
            return func(*args, **kwargs)
        if func is Tensor.new_tensor:
            if not args[0].is_meta:
                return func(*args, **kwargs)
            kwargs = {"dtype": args[0].dtype, "device": args[0].device, **kwargs}
            func, args = torch.tensor, args[1:]
        device = kwargs.get("device")
        numbers = bool(args) and not isinstance(args[0], Tensor)
        if numbers and device is not None and torch.device(device).type == "meta":
            return func(*args, **{**kwargs, "device": "cpu"}).to(device)
        return func(*args, **kwargs)


_OF_NUMBERS = frozenset((torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor))
