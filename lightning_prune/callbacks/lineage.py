"""What a loss was computed of."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

from torch import Tensor
from torch.autograd.graph import Node


def comes_of(loss: Tensor, origins: Sequence[Node | None]) -> list[bool]:
    """Whether a loss was computed of each of some results, or else of what lies behind it and of all its parameters.

    Another loss that goes through such a result meets a graph that is still there, and reaches no parameter that the
    first one doesn't.

    Args:
        loss: with its graph.
        origins: the ``grad_fn`` of each result; ``None`` for one without gradients.

    >>> import torch
    >>> x = torch.ones(2, requires_grad=True)
    >>> logits, hidden, other = x.exp(), x.sin(), x.cos()
    >>> shown = hidden.abs()
    >>> comes_of((logits + hidden).sum(), [logits.grad_fn, shown.grad_fn, other.grad_fn, None])
    [True, True, False, False]
    """
    wanted = {origin for origin in origins if origin is not None}
    seen = _lineage(loss.grad_fn, wanted)
    return [origin is not None and (origin in seen or _is_beside(origin, seen)) for origin in origins]


def _is_beside(origin: Node, seen: Collection[Node]) -> bool:
    own = _lineage(origin)
    leaves = {node for node in own if not node.next_functions}
    return leaves <= set(seen) and any(node in seen for node in own - leaves)


def _lineage(last: Node | None, until: Collection[Node] = ()) -> set[Node]:
    """A node and all before it, nearest first; the search ends when it has found what it looks for, if anything."""
    if last is None:
        return set()
    seen, ahead, missing = {last}, deque([last]), set(until) - {last}
    while ahead and (missing or not until):
        for before, _ in ahead.popleft().next_functions:
            if before is not None and before not in seen:
                seen.add(before)
                missing.discard(before)
                ahead.append(before)
    return seen
