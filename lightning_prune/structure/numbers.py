"""Sizes that Python keeps or works out: where a trial fails at one, which numbers follow, and which modules join."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import nn

from lightning_prune.structure.elastic import can_join
from lightning_prune.structure.knowledge import Knowledge
from lightning_prune.structure.labels import Ints
from lightning_prune.structure.plan import submodule

#: Names under which modules keep numbers of heads, and widths of one head.
HEADS: tuple[str, ...] = ("num_heads", "n_heads", "nheads", "heads", "n_head", "nhead", "num_attention_heads")
HEADS += ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads", "n_kv_head")
HEAD_WIDTHS = ("head_dim", "dim_head", "d_head", "head_size", "attention_head_size", "dim_per_head", "head_width")

#: Names under which modules keep numbers of channels, unlike those of pixels, positions, windows or classes.
_CHANNELS = re.compile(r"dim|channel|feature|width|hidden|embe?d|inner|model|head|plane|filter|unit|chs|^c$|^dh?$")
_OTHERS = re.compile(r"image|img|patch|window|kernel|grid|pool|stride|seq|len|class|layer|group|depth")


class Fault(NamedTuple):
    """Where Python does not agree with the sizes that the labels foretell.

    Args:
        guilty: labels of the dims that it counts.
        reason: why it does not, as a sentence.
        where: name of the module whose code it is.
        joins: whether all that is wrong is the last size that a reshape asks for.
        meant: a dim of as many positions whose count Python takes for that of the one guilty dim, if there is one.
    """

    guilty: list[Ints]
    reason: str
    where: str
    joins: bool = False
    meant: Ints | None = None


def answer(known: Knowledge, faults: Iterable[Fault]) -> None:
    """Let a module's numbers follow, or let it join what is left; what has been tried in vain is pinned.

    Two dims of which Python takes the one's count for the other's live and die together.
    """
    taken: dict[str, Ints] = {}
    joined: dict[str, bool] = {}
    for fault in faults:
        new = {key: labels for labels in fault.guilty for key in _untried(known, fault.where, labels.size)}
        if fault.meant is not None:
            known.labels.unite(fault.guilty[0], fault.meant)
        elif new:
            taken = {**new, **taken}
        elif fault.joins and fault.where not in known.joined and can_join(known.model, fault.where):
            joined[fault.where] = True
        else:
            for labels in fault.guilty:
                known.labels.pin(labels, fault.reason)
            if fault.joins and known.joined.get(fault.where):
                known.joined[fault.where] = False
    known.sizes.update(taken)
    known.joined.update(joined)


def joining(known: Knowledge) -> tuple[str, ...]:
    """The modules that join what is left."""
    return tuple(name for name, helps in known.joined.items() if helps)


def _untried(known: Knowledge, where: str, size: int) -> list[str]:
    """Numbers of this size that a module keeps, or else one around it, and that don't follow any channels yet."""
    parts = where.split(".") if where else []
    for depth in range(len(parts), -1, -1):
        path = ".".join(parts[:depth])
        keys = [f"{path}.{name}" if path else name for name in _numbers(submodule(known.model, path), size)]
        if new := [key for key in keys if key not in known.sizes]:
            return new
    return []


def _numbers(module: nn.Module, size: int) -> Iterator[str]:
    for name, value in vars(module).items():
        if _OTHERS.search(name) or name in HEAD_WIDTHS:
            continue
        if type(value) is int and value == size and _CHANNELS.search(name):
            yield name
        elif isinstance(value, (list, tuple)) and name.endswith("shape"):
            yield from (f"{name}.{place}" for place, each in enumerate(value) if type(each) is int and each == size)
