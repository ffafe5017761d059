"""One operator at work, as a rule sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from lightning_prune.structure.knowledge import Debt, Knowledge
from lightning_prune.structure.labels import Axes, Axis, Ints, Labels

#: Keyword under which a module that counts as one operator brings its parameters and buffers.
OWN = "parameters and buffers"


class Call:
    """An operator's name, arguments and results, and what is known of them.

    Args:
        known: the notebook of the pass.
        name: of the operator, without overload.
        args: positional arguments.
        kwargs: keyword arguments.
        outputs: the tensors among the results, in order.

    Attributes:
        inputs: the tensors among the arguments, in order.
        names: of the arguments, where the operator's rule is a user's.

    A rule of one's own, for channels that are dealt out to two halves; dims that stay have no axis:

    >>> import torch
    >>> from torch import nn
    >>> from lightning_prune import register_rule, trace
    >>> from lightning_prune.structure.rules import Axis, couple
    >>> class Halves(nn.Module):
    ...     def forward(self, x):
    ...         return torch.mul(*x.chunk(2, dim=1))
    >>> def rule(call):
    ...     batch, channels = call.axes(call.named("x"))
    ...     return [(batch, channels and Axis(couple(call, channels.labels, 2), vanishes=True))]
    >>> with register_rule(Halves, rule):
    ...     graph = trace(nn.Sequential(nn.Linear(3, 8), Halves(), nn.Linear(4, 2)), torch.zeros(1, 3))
    >>> graph["0"].index["0.weight", 0].tolist()
    [[0, 4], [1, 5], [2, 6], [3, 7]]
    """

    __slots__ = ("args", "inputs", "known", "kwargs", "name", "names", "outputs")

    def __init__(
        self, known: Knowledge, name: str, args: Sequence[Any], kwargs: dict[str, Any], outputs: list[Tensor]
    ) -> None:
        self.known, self.name, self.args, self.kwargs, self.outputs = known, name, args, kwargs, outputs
        self.inputs = list(tensors_in((args, kwargs)))
        self.names: tuple[str, ...] = ()

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or by name."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    def named(self, name: str) -> Any:
        """An argument, parameter or buffer by its name, for a user's rule; ``None`` where it is left out."""
        if name in self.names:
            return self.arg(self.names.index(name), name)
        return self.kwargs.get(OWN, {}).get(name)

    def axes(self, tensor: Tensor) -> Axes:
        """What is known of the dims of a tensor."""
        return self.known.axes(tensor)

    @property
    def labels(self) -> Labels:
        """The labels of the whole model."""
        return self.known.labels

    @property
    def where(self) -> str:
        """In which module this happens, for a sentence."""
        return f"in {self.known.module!r}" if self.known.module else "in the model's own forward"

    def pin(self, axes: Axis | Axes | None, why: str) -> None:
        """Forbid the positions of one dim, or of all dims of a tensor, to leave; ``why`` ends a sentence."""
        for axis in (axes,) if isinstance(axes, Axis) else axes or ():
            if axis is not None:
                self.labels.pin(axis.labels, self._reason(why))

    def pin_if_read(self, axis: Axis | None, why: str, by_others: bool = False) -> None:
        """As :meth:`pin`, once what this returns is read; ``by_others``: than the weight it is made of."""
        if axis is not None:
            for tensor in self.outputs:
                self.known.owe(tensor, Debt(axis.labels, self._reason(why), by_others))

    def renormalise_if_read(self, axis: Axis) -> None:
        """Note that what this returns is a statistic over what stays, once it is read.

        Where there are values, Python reads them unheard (``tolist``).
        """
        for tensor in self.outputs:
            if tensor.is_meta:
                self.known.owe(tensor, Debt(axis.labels, None))
            else:
                self.known.note_renormalised(axis.labels)

    def _reason(self, why: str) -> str:
        return f"Its channels {why} ({self.name} {self.where})."

    def role(self, labels: Ints, role: str) -> None:
        """Note what a parameter dim is to its group, see :class:`Knowledge`."""
        self.known.note_role(labels, role)


Rule = Callable[[Call], "Axes | list[Axes]"]


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors of an operator's arguments or results, in order (nested at most in lists, tuples, dicts)."""
    found: list[Tensor] = []
    _gather((tree,), found)
    return iter(found)


def _gather(items: Iterable[Any], found: list[Tensor]) -> None:
    for item in items:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (list, tuple)):
            _gather(item, found)
        elif isinstance(item, dict):
            _gather(item.values(), found)
