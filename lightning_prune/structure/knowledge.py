"""What is known while a forward pass is watched: the axes of live tensors, roles of parameters, where we are."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_prune.structure.labels import FIXED, Axes, Axis, Ints, Labels
from lightning_prune.structure.plan import submodule

#: Names under which modules keep where they cut a dim of channels, unlike numbers of heads, groups or pixels.
_WHERE_TO_CUT = re.compile(r"dim|chs|channel|width|plane|split|hidden|untouched|_c$")


class Record(NamedTuple):
    """What one operator read and wrote, so that a second pass can be held against the first."""

    operator: str
    where: str
    inputs: tuple[Axes, ...]
    outputs: tuple[Axes, ...]
    shapes: tuple[torch.Size, ...]
    scalars: tuple[float, ...]


class Known(NamedTuple):
    """What is known of one tensor.

    ``from_data``: it was computed from the network's input. ``is_weight``: it is the model's own, or was made of its
    own by operators that :func:`~lightning_prune.structure.renormalising.carries` knows.
    """

    reference: weakref.ref[Tensor]
    axes: Axes
    from_data: bool
    is_weight: bool


class Debt(NamedTuple):
    """What is noted of labels once a tensor is read that has mixed them: a statistic that nobody reads binds nobody.

    Args:
        labels: of a dim.
        reason: why they are pinned, as a sentence; ``None`` where the statistic is taken anew over what stays.
        by_others: pinned once others read it than the weight it is made of.
    """

    labels: Ints
    reason: str | None
    by_others: bool = False


class Knowledge:
    """The notebook of one watched pass.

    Args:
        model: the copy that runs.
        tensors: its parameters and buffers by name.

    Attributes:
        labels: of the whole model.
        roles: number of a parameter dim (see ``Labels.dims``) -> what it is to its group: ``"outputs"``,
            ``"inputs"``, ``"scales"``, ``"shifts"``, or ``"through"`` for depthwise filters.
        renormalised: numbers of parameter dims over which a norm, or whatever standardises a weight, takes statistics
            of the positions that stay; the masked network that a proof compares with does so too.
        used: names of the parameters and buffers that the pass has read.
        sizes: module attributes that count channels and that no tensor of the module tells -> what they count.
        joined: modules that ask for a width they can't have at a reshape -> whether :class:`elastic.Joined` helps.
        stack: names of the modules at work, outermost first.
    """

    def __init__(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        self.model = model
        self.labels = Labels(tensors)
        self.roles: dict[int, set[str]] = {}
        self.renormalised: set[int] = set()
        self.used: set[str] = set()
        self.sizes: dict[str, Ints] = {}
        self.joined: dict[str, bool] = {}
        self.stack: list[str] = []
        self._own = tensors
        self._names = {id(tensor): name for name, tensor in tensors.items()}
        self._known: dict[int, Known] = {}
        self._tainted: set[StorageWeakRef] = set()
        self._debts: dict[int, list[tuple[weakref.ref[Tensor], Debt]]] = {}

    @property
    def module(self) -> str:
        """Name of the innermost module at work."""
        return self.stack[-1] if self.stack else ""

    def axes(self, tensor: Tensor) -> Axes:
        """What is known of a tensor's dims; own parameters and buffers enter with their atoms, strangers are fixed."""
        known = self.look_up(tensor)
        if known is None:
            name = self._names.get(id(tensor))
            axes = self.labels.of(name) if name is not None else (None,) * tensor.dim()
            if name is not None:
                self.used.add(name)
            self.remember(tensor, axes, from_data=False, is_weight=name is not None)
            return axes
        if self._tainted and StorageWeakRef(tensor.untyped_storage()) in self._tainted:
            return tuple(axis and Axis(axis.labels, vanishes=False) for axis in known.axes)
        return known.axes

    def look_up(self, tensor: Tensor) -> Known | None:
        """The entry of this very tensor, not of an earlier one at the same address."""
        known = self._known.get(id(tensor))
        return known if known is not None and known.reference() is tensor else None

    def remember(self, tensor: Tensor, axes: Axes, from_data: bool, is_weight: bool = False) -> None:
        """Write down what is known of a tensor now. Views of one written in place must not go on promising zeros."""
        old = self.look_up(tensor)
        pairs = zip(old.axes, axes, strict=False) if old is not None else ()
        if any(a is not None and a.vanishes and not (b and b.vanishes) for a, b in pairs):
            self._tainted.add(StorageWeakRef(tensor.untyped_storage()))
        from_data = from_data or (old is not None and old.from_data)
        self._known.pop(id(tensor), None)  # in the order of the pass, wherever tensors come to lie
        self._known[id(tensor)] = Known(weakref.ref(tensor), axes, from_data, is_weight)

    def from_data(self, tensor: Tensor) -> bool:
        """Whether a tensor was computed from the network's input."""
        known = self.look_up(tensor)
        return known is not None and known.from_data

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor is a weight of the model's, or what has been made of one position by position."""
        self.axes(tensor)
        known = self.look_up(tensor)
        return known is not None and known.is_weight

    def restored(self, axes: Axes) -> Axes:
        """The dims of a weight in the masked network, which holds zeros where a renormalised one keeps nothing."""
        return tuple(axis and Axis(axis.labels, axis.vanishes or self._is_renormalised(axis.labels)) for axis in axes)

    def _is_renormalised(self, labels: Ints) -> bool:
        atoms = bool((labels > FIXED).all() and (labels < self.labels.atoms).all())
        return atoms and self.renormalised.issuperset(self.labels.member_ids(labels).tolist())

    def is_own(self, tensor: Tensor) -> bool:
        """Whether this is a parameter or buffer of the model itself."""
        return id(tensor) in self._names

    def own(self, name: str) -> Tensor:
        """A parameter or buffer of the model by its name."""
        return self._own[name]

    def live(self, also: Iterable[Tensor] = ()) -> list[Axes]:
        """Axes of the tensors that somebody still holds and that were computed from the input, or are in ``also``."""
        wanted = {id(tensor) for tensor in also}
        return [
            known.axes
            for key, known in self._known.items()
            if known.reference() is not None and (known.from_data or key in wanted)
        ]

    def owe(self, tensor: Tensor, debt: Debt) -> None:
        """Note something as soon as somebody reads the tensor; if nobody does, never."""
        self._debts.setdefault(id(tensor), []).append((weakref.ref(tensor), debt))

    def settle(self, tensor: Tensor, beside: Sequence[Tensor] = (), results: Sequence[Tensor] = ()) -> bool:
        """Note what is owed for a tensor that is read.

        Args:
            tensor: that is read.
            beside: weights that meet it position by position: a statistic meets its own, which is renormalised.
            results: what is made of it and owes as much, where that is to be followed.

        Returns:
            Whether it is a statistic that has met its own weight.
        """
        met = False
        for reference, debt in self._debts.pop(id(tensor), ()):
            if reference() is not tensor:
                continue
            if debt.by_others:
                self.owe(tensor, debt)
            if debt.by_others and any(self._runs_along(other, debt.labels) for other in beside):
                self.note_renormalised(debt.labels)
                met = True
            elif debt.by_others and results:
                for result in results:
                    if result is not tensor:
                        self.owe(result, debt)
            else:
                self._pay(debt)
        return met

    def settle_live(self) -> None:
        """Note what is owed for tensors that somebody still holds."""
        for debts in self._debts.values():
            for reference, debt in debts:
                if reference() is not None:
                    self._pay(debt)

    def _pay(self, debt: Debt) -> None:
        if debt.reason is None:
            self.note_renormalised(debt.labels)
        else:
            self.labels.pin(debt.labels, debt.reason)

    def _runs_along(self, tensor: Tensor, labels: Ints) -> bool:
        """Whether these labels are those of one of a weight's dims."""
        axes = self.axes(tensor) if self.is_weight(tensor) else ()
        return any(axis is not None and np.isin(labels, axis.labels).all() for axis in axes)

    def note_cut(self, *pieces: Ints) -> bool:
        """Note under which names the module at work keeps how long these pieces are, each or in a row; whether it does.

        Where a number follows the channels that stay, a cut falls between the same channels as before.
        """
        module, path = submodule(self.model, self.module), self.module
        lengths, found = [len(piece) for piece in pieces], False
        for name, value in vars(module).items():
            if not _WHERE_TO_CUT.search(name):
                continue
            if isinstance(value, (list, tuple)) and list(value) == lengths and len(lengths) > 1:
                for number, piece in enumerate(pieces):
                    self._follow(_full(path, f"{name}.{number}"), piece)
                return True
            if type(value) is int and value in lengths:
                self._follow(_full(path, name), pieces[lengths.index(value)])
                found = True
        return found

    def _follow(self, attribute: str, labels: Ints) -> None:
        """One number that counts two dims ties them."""
        self.labels.unite(self.sizes.setdefault(attribute, labels), labels)

    def note_role(self, labels: Ints, role: str) -> None:
        """Note what the parameter dim that these labels belong to is to its group."""
        for member in self.labels.member_ids(labels).tolist():
            self.roles.setdefault(member, set()).add(role)

    def labels_of(self, role: str) -> Ints:
        """The labels of all parameter dims that are this to their groups."""
        found = [number for number, roles in self.roles.items() if role in roles]
        starts = self.labels.starts
        return np.concatenate([np.arange(starts[n], starts[n + 1]) for n in found] or [starts[:0]])

    def note_renormalised(self, labels: Ints) -> None:
        """Note that statistics over the parameter dims that these labels belong to are those of what stays."""
        self.renormalised.update(self.labels.member_ids(labels).tolist())

    def note_size(self, attribute: str, axis: Axis | None) -> None:
        """Note that the module at work keeps the length of this dim as a number that no tensor of its own tells.

        Two dims that one number counts live and die together.
        """
        module = submodule(self.model, self.module)
        if axis is not None and getattr(module, attribute, None) == axis.labels.size:
            counted = self.sizes.setdefault(_full(self.module, attribute), axis.labels)
            self.labels.unite(counted, axis.labels)

    def number(self, names: Iterable[str], size: int) -> str | None:
        """Under which of these names the module at work keeps this number, if it does."""
        module = vars(submodule(self.model, self.module))
        return next((name for name in names if type(module.get(name)) is int and module[name] == size), None)


def _full(path: str, attribute: str) -> str:
    return f"{path}.{attribute}" if path else attribute
