"""Labels: one integer per (parameter or buffer, dim, index), and which of them live and die together.

Letters: ``n`` labels of one tensor dim, ``A`` atoms in the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]

#: Belongs to nobody and never leaves: what stands on a padded or otherwise fixed position.
FIXED = 0


class Axis(NamedTuple):
    """What is known of one tensor dim whose positions may leave.

    ``labels`` has one label per position. ``vanishes`` says that a position whose label is removed holds exact zeros
    in the masked network, so that a sum over the dim doesn't notice its absence.
    A dim of fixed positions (batch, space, the network's input) has no ``Axis``; it is ``None``.
    """

    labels: Ints
    vanishes: bool


Axes = tuple["Axis | None", ...]

#: Which operator, in which module.
Place = tuple[str, str]


class Solution(NamedTuple):
    """Connected labels: ``root[label]`` is the smallest label of its class; ``reasons[root]`` says why it is pinned."""

    root: Ints
    reasons: dict[int, str]

    def held(self) -> NDArray[np.bool_]:
        """Which labels may not leave."""
        pinned = np.zeros(self.root.size, dtype=np.bool_)
        pinned[np.fromiter(self.reasons, dtype=np.int64)] = True
        return pinned[self.root]


class Labels:
    """Hands out labels and remembers which are united, which are pinned and why.

    Attributes:
        dims: the model's own dims, in the order of their labels.
        starts: the first label of each of them, and one past the last.
        atoms: labels that stand for a model's own element (and ``FIXED``) are below it; later ones are helpers.
        place: where unions are made at present.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.dims = [(name, dim) for name, tensor in tensors.items() for dim in range(tensor.dim())]
        sizes = [size for tensor in tensors.values() for size in tensor.shape]
        self.starts: Ints = np.cumsum([1, *sizes], dtype=np.int64)
        self._count = self.atoms = int(self.starts[-1])
        whole = np.split(np.arange(self._count, dtype=np.int64), self.starts)[1:-1]
        self._numbers = {id(labels): number for number, labels in enumerate(whole) if labels.size}
        self._whole: dict[str, list[Axis]] = {name: [] for name in tensors}
        for (name, _), labels in zip(self.dims, whole, strict=True):
            self._whole[name].append(Axis(labels, vanishes=True))
        self.place: Place = ("", "")
        self._united: list[tuple[Ints, Ints]] = []
        self._places: list[Place] = []
        self._pinned: list[tuple[Ints, str]] = []
        self._marked: dict[str, list[Ints]] = {}

    def of(self, name: str) -> Axes:
        """The atoms of one parameter or buffer, a dim at a time."""
        return tuple(self._whole[name])

    def first(self, name: str, dim: int) -> int:
        """The label of the first position along a dim of a parameter or buffer."""
        return int(self._whole[name][dim].labels[0])

    def fresh(self, size: int) -> Ints:
        """Labels of a dim that any size would suit, such as that of ``zeros(...)``: they bind nothing by themselves."""
        start, self._count = self._count, self._count + size
        return np.arange(start, self._count, dtype=np.int64)

    def member_ids(self, labels: Ints) -> Ints:
        """Positions in ``dims`` of the parameter dims that these labels belong to."""
        if (number := self._numbers.get(id(labels))) is not None:
            return np.array([number])
        atoms = labels[(labels > FIXED) & (labels < self.atoms)]
        if atoms.size == 0:
            return atoms
        first, last = np.searchsorted(self.starts, [atoms[0], atoms[-1]], side="right") - 1
        if first == last and atoms[-1] - atoms[0] == atoms.size - 1:
            return np.array([first])
        return np.unique(np.searchsorted(self.starts, atoms, side="right") - 1)

    def unite(self, a: Ints, b: Ints) -> None:
        """Positions of ``a`` and ``b`` (broadcast against each other) live and die together, pair by pair."""
        if a is not b:
            left, right = (a, b) if a.shape == b.shape else np.broadcast_arrays(a, b)
            self._united.append((left.ravel(), right.ravel()))
            self._places.append(self.place)

    def unions(self) -> Iterator[tuple[Ints, Ints, Place]]:
        """What was united, pair by pair, and where."""
        for (left, right), place in zip(self._united, self._places, strict=True):
            yield left, right, place

    def pin(self, labels: Ints, reason: str) -> None:
        """Forbid these labels to leave."""
        self._pinned.append((labels, reason))

    def mark(self, labels: Ints, mark: str) -> None:
        """Note something about positions that may leave.

        ``"bound"``: they are summed over as they are, so that none can stand for another.
        """
        self._marked.setdefault(mark, []).append(labels)

    def solve(self) -> Solution:
        """Unite everything at once (hook every root to a smaller one, then compress paths, until nothing moves)."""
        root = np.arange(self._count, dtype=np.int64)
        left = np.concatenate([pair[0] for pair in self._united] or [root[:0]])
        right = np.concatenate([pair[1] for pair in self._united] or [root[:0]])
        while left.size:
            left, right = root[left], root[right]
            apart = left != right
            left, right = np.minimum(left, right)[apart], np.maximum(left, right)[apart]
            root[right] = left
            while not np.array_equal(left, above := root[left]):
                root[right] = left = above
        while not np.array_equal(root, above := root[root]):
            root = above
        return Solution(root, self._reasons(root))

    def _reasons(self, root: Ints) -> dict[int, str]:
        """Of each class that is pinned the first reason."""
        first = np.full(root.size, len(self._pinned))
        for number in reversed(range(len(self._pinned))):
            first[root[self._pinned[number][0]]] = number
        held = np.flatnonzero(first < len(self._pinned))
        held = held[np.argsort(first[held], kind="stable")]
        reasons = {int(root[FIXED]): "It is tied to a position that is fixed, such as padding."}
        for label, number in zip(held.tolist(), first[held].tolist(), strict=True):
            reasons.setdefault(label, self._pinned[number][1])
        return reasons

    def marked_roots(self, mark: str, root: Ints) -> set[int]:
        """Classes that carry a mark."""
        found = self._marked.get(mark, [])
        return set(np.unique(root[np.concatenate(found)]).tolist()) if found else set()
