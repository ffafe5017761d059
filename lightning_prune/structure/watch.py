"""One forward pass, watched operator by operator, while labels travel along.

A dispatch mode sees every operator before it is taken apart (``linear``, ``batch_norm``, ``flatten``, ...). A rule
(see ``rules``) says how labels flow through it; a composite operator without a rule is opened up, and any other one
pins what it reads. The pass runs on tensors without memory where the model allows it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.structure.labels import Axes, Axis, Ints, Labels
from lightning_prune.structure.replica import quiet_room
from lightning_prune.structure.rules import RULES, pointwise

Rule = Callable[["Call"], "Axes | list[Axes]"]


class Record(NamedTuple):
    """What one operator read and wrote, so that a second pass can be held against the first."""

    operator: str
    where: str
    inputs: tuple[Axes, ...]
    outputs: tuple[Axes, ...]
    shapes: tuple[torch.Size, ...]
    scalars: tuple[float, ...]


class Known(NamedTuple):
    """What is known of one live tensor."""

    reference: weakref.ref[Tensor]
    axes: Axes
    from_data: bool


class Call:
    """One operator at work, as a rule sees it."""

    __slots__ = ("args", "inputs", "kwargs", "name", "outputs", "watcher")

    def __init__(self, watcher: Watcher, name: str, args: Sequence[Any], kwargs: dict[str, Any], outputs: list[Tensor]):
        self.watcher, self.name, self.args, self.kwargs, self.outputs = watcher, name, args, kwargs, outputs
        self.inputs = list(tensors_in((args, kwargs)))

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or by name."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    def axes(self, tensor: Tensor) -> Axes:
        """What is known of the dims of a tensor."""
        return self.watcher.axes(tensor)

    @property
    def labels(self) -> Labels:
        """The labels of the whole model."""
        return self.watcher.labels

    @property
    def where(self) -> str:
        """In which module this happens, for a sentence."""
        return f"in {self.watcher.module!r}" if self.watcher.module else "in the model's own forward"

    def pin(self, axes: Axis | Axes | None, why: str) -> None:
        """Forbid the positions of one dim, or of all dims of a tensor, to leave; ``why`` ends a sentence."""
        for axis in (axes,) if isinstance(axes, Axis) else axes or ():
            if axis is not None:
                self.labels.pin(axis.labels, f"Its channels {why} ({self.name} {self.where}).")

    def role(self, labels: Ints, role: str) -> None:
        """Note what a parameter dim is to its group: ``outputs``, ``inputs``, ``scales`` or ``shifts``."""
        for member in self.labels.member_ids(labels).tolist():
            self.watcher.roles.setdefault(member, set()).add(role)


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors of an operator's arguments or results, in order (nested at most in lists, tuples, dicts)."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from tensors_in(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from tensors_in(item)


class Watcher(TorchDispatchMode):
    """The dispatch mode. ``tensors`` are the parameters and buffers of the copy that runs, by name."""

    def __init__(self, model: nn.Module, tensors: dict[str, Tensor], labels: Labels) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.labels = labels
        self.model = model
        self.roles: dict[int, set[str]] = {}
        self.records: list[Record] = []
        self.used: set[str] = set()
        self.sizes: dict[str, Ints] = {}
        self._after_branch: list[Axes] | None = None
        self._names = {id(tensor): name for name, tensor in tensors.items()}
        self._known: dict[int, Known] = {}
        self._own = list(tensors.values())
        self._tainted: set[int] = set()
        self._stack: list[str] = []
        self._on_meta = any(tensor.is_meta for tensor in self._own)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the forward pass; afterwards the labels and records are complete."""
        for name, module in self.model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                module.register_forward_pre_hook(self._entering(name), prepend=True)
                module.register_forward_hook(self._leaving, always_call=True)
        for tensor in tensors_in(pytree.tree_leaves((args, kwargs))):
            self._remember(tensor, (None,) * tensor.dim(), from_data=True)
        with quiet_room(), self:
            output = self.model(*args, **kwargs)
        self._pin_outputs(output)
        self._pin_unseen_branch()

    @property
    def module(self) -> str:
        """Name of the innermost module at work."""
        return self._stack[-1] if self._stack else ""

    def axes(self, tensor: Tensor) -> Axes:
        """What is known of a tensor's dims; own parameters and buffers enter with their atoms, strangers are fixed."""
        known = self._known.get(id(tensor))
        if known is None or known.reference() is not tensor:
            name = self._names.get(id(tensor))
            axes = self.labels.of(name, tensor.shape) if name is not None else (None,) * tensor.dim()
            if name is not None:
                self.used.add(name)
            self._remember(tensor, axes, from_data=False)
            return axes
        if self._tainted and tensor.untyped_storage()._cdata in self._tainted:
            return tuple(axis and Axis(axis.labels, vanishes=False) for axis in known.axes)
        return known.axes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = rule_for(func)
        if rule is None:
            opened = open_up(self, func, args, kwargs)
            if opened is not NotImplemented:
                return opened
        if self._on_meta:
            args, kwargs = on_meta(args, kwargs)
        result = compute(func, args, kwargs)
        self._follow(func, rule, args, kwargs, result)
        return result

    def _follow(self, func: Any, rule: Rule | None, args: Any, kwargs: Any, result: Any) -> None:
        outputs = list(tensors_in(result))
        name = operator_name(func)
        call = Call(self, name, args, kwargs, outputs)
        before = [self.axes(tensor) for tensor in call.inputs]
        from_data = any(self._known[id(tensor)].from_data for tensor in call.inputs)
        if from_data and not outputs and self._after_branch is None:
            live = (known for known in self._known.values() if known.reference() is not None)
            self._after_branch = [known.axes for known in live if known.from_data]
        axes = (rule or unknown)(call)
        written = axes if isinstance(axes, list) else [axes] * len(outputs)
        for tensor, new in zip(outputs, written, strict=True):
            old = self._known.get(id(tensor))
            if old is not None and old.reference() is tensor:
                self._taint(tensor, old.axes, new)
                from_data = from_data or old.from_data
            self._remember(tensor, new, from_data)
        if self._after_branch is not None:
            self._after_branch.extend(written)
        shapes = tuple(tensor.shape for tensor in outputs)
        scalars = scalars_of(func, args, kwargs)
        self.records.append(Record(name, self.module, tuple(before), tuple(written), shapes, scalars))

    def _taint(self, tensor: Tensor, old: Axes, new: Axes) -> None:
        """Views of a tensor that was written in place must not go on promising zeros."""
        if len(old) == len(new) and any(
            a is not None and a.vanishes and not (b and b.vanishes) for a, b in zip(old, new, strict=True)
        ):
            self._tainted.add(tensor.untyped_storage()._cdata)

    def _remember(self, tensor: Tensor, axes: Axes, from_data: bool) -> None:
        self._known[id(tensor)] = Known(weakref.ref(tensor), axes, from_data)

    def _pin_outputs(self, output: Any) -> None:
        """What the forward returned, or left behind on a module, keeps its channels."""
        returned = {id(tensor) for tensor in tensors_in(pytree.tree_leaves(output))}
        for key, known in self._known.items():
            tensor = known.reference()
            if tensor is not None and (key in returned or known.from_data):
                for axis in known.axes:
                    if axis is not None:
                        self.labels.pin(axis.labels, "Its channels are the network's output.")

    def from_data(self, tensor: Tensor) -> bool:
        """Whether a tensor (whose axes are known) was computed from the network's input."""
        return self._known[id(tensor)].from_data

    def is_own(self, tensor: Tensor) -> bool:
        """Whether this is a parameter or buffer of the model itself."""
        return id(tensor) in self._names

    def note_size(self, attribute: str, axis: Axis | None) -> None:
        """Note that the module at work keeps the length of this dim as a number that no tensor of its own tells."""
        module = self.model.get_submodule(self.module)
        if axis is not None and getattr(module, attribute, None) == axis.labels.size:
            self.sizes[f"{self.module}.{attribute}" if self.module else attribute] = axis.labels

    def _pin_unseen_branch(self) -> None:
        """Where Python looked at the data and layers stayed unused, another branch may read what was alive by then."""
        unused = any(name not in self.used for name, _ in self.model.named_parameters())
        if self._after_branch is not None and unused:
            for axis in (axis for axes in self._after_branch for axis in axes if axis is not None):
                self.labels.pin(axis.labels, "Its channels may be read by a branch that depends on the data.")

    def _entering(self, name: str) -> Callable[..., None]:
        return lambda module, inputs: self._stack.append(name)

    def _leaving(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._stack.pop()


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
    """Run an operator; without memory, what keeps the shape of its first tensor needs no work.

    On the meta device torch works out in Python what a norm or an in-place sum returns: half of the whole pass.
    """
    if args and isinstance(args[0], Tensor) and args[0].is_meta:
        if func is torch.ops.aten.batch_norm.default:
            return torch.empty_like(args[0])
        if torch.Tag.pointwise in func.tags and operator_name(func).endswith("_") and "out" not in kwargs:
            shapes = [tensor.shape for tensor in tensors_in((args, kwargs))]
            if torch.broadcast_shapes(*shapes) == args[0].shape:
                return args[0]
    return func(*args, **kwargs)


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


def scalars_of(func: Any, args: Any, kwargs: Any) -> tuple[float, ...]:
    """Numbers that enter an operator's arithmetic; whole ones only for pointwise operators, else they are sizes."""
    kinds = (int, float) if torch.Tag.pointwise in func.tags else (float,)
    return tuple(float(a) for a in (*args, *kwargs.values()) if isinstance(a, kinds) and not isinstance(a, bool))
