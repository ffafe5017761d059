"""What a run would do to its network, before it is trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from lightning_prune.reports import Cost, Latency, count_cost
from lightning_prune.reports.latency import race
from lightning_prune.structure import ChannelGraph, Plan, PruningPlan, SparsityPlan, prune_
from lightning_prune.structure.replica import replica

FORMAT = 1


@dataclass(frozen=True)
class Stage:
    """When a method does what.

    Args:
        method: its class.
        start: epoch in which its sparse stage begins.
        epochs: of that stage to surgery, where either is given in epochs.
        steps_per_epoch: optimiser steps of an epoch; ``None`` where the loader doesn't tell.
        known_after: optimiser steps of the stage after which it is known what goes.
        steps: optimiser steps of the stage to surgery.
        total_steps: optimiser steps of the whole run.
    """

    method: str
    start: int
    epochs: int | None
    steps_per_epoch: int | None
    known_after: int | None
    steps: int | None
    total_steps: int | None

    @property
    def dense_steps(self) -> int | None:
        """Optimiser steps before the stage."""
        return 0 if not self.start else None if self.steps_per_epoch is None else self.start * self.steps_per_epoch

    @property
    def finetune_steps(self) -> int | None:
        """Optimiser steps after surgery."""
        if self.total_steps is None or self.steps is None or self.dense_steps is None:
            return None
        return self.total_steps - self.dense_steps - self.steps


@dataclass(frozen=True)
class Row:
    """One group of channels, or the single weights of one layer.

    Args:
        name: of its first layer.
        before: channels or weights now.
        after: that would stay.
        tied: other layers whose channels go with it.
        readers: layers that read them.
    """

    name: str
    before: int
    after: int
    tied: tuple[str, ...] = ()
    readers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Preview:
    """What would go by the weights as they are, what that costs, and how long it takes.

    Args:
        rows: every group, also those that stay whole.
        pinned: layer -> why its channels stay.
        cost_before: of the dense network.
        cost_after: of the slim one.
        cost_least: with one channel left of every group that takes part; ``None`` for single weights.
        latency_before: of the dense network, one per variant and batch size.
        latency_after: of the slim one.
        missing: a sentence for each latency that could not be measured.
        stages: one per method; none without Lightning.
        dense_ms: milliseconds per training batch before the sparse stage, the fastest of a few.
        sparse_ms: milliseconds per training batch within it.
        plan: for the whole module, by which this would happen.
    """

    rows: tuple[Row, ...]
    pinned: Mapping[str, str]
    cost_before: Cost
    cost_after: Cost
    cost_least: Cost | None
    latency_before: tuple[Latency, ...]
    latency_after: tuple[Latency, ...]
    missing: tuple[str, ...]
    stages: tuple[Stage, ...]
    dense_ms: float | None
    sparse_ms: float | None
    plan: Plan

    def to_json(self) -> str:
        """Sorted and indented, with a format number; of the plan only what its widths are multiples of."""
        values = {name: value for name, value in vars(self).items() if name != "plan"}
        values |= {"format": FORMAT, "round_to": round_to_of(self.plan)}
        return json.dumps(values, default=_plain, indent=2, sort_keys=True) + "\n"


def round_to_of(plan: Plan) -> int:
    """What the widths that a plan cuts are multiples of."""
    return plan.round_to if isinstance(plan, PruningPlan) else 1


def _plain(value: Any) -> Any:
    return asdict(value)


def preview_of(
    graph: ChannelGraph,
    whole: Plan,
    plan: Plan,
    smallest: Plan | None,
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    stages: tuple[Stage, ...] = (),
    batches: Sequence[int] = (1,),
    variants: Sequence[str] = ("eager",),
) -> Preview:
    """Cut a copy of the traced model, count and measure both.

    Args:
        graph: of the model.
        whole: the plan by the names that its users see.
        plan: the same for the traced model.
        smallest: that removes as much as can go.
        inputs: arguments and keyword arguments of the traced model.
        stages: of the run.
        batches: batch sizes at which latency is measured.
        variants: how both networks are run for that, see :func:`~lightning_prune.reports.measure_latency`.
    """
    model, (args, kwargs) = graph.model, inputs
    slim = _cut(model, plan)
    before, after = (count_cost(network, args, kwargs) for network in (model, slim))
    least = None if smallest is None else count_cost(_cut(model, smallest), args, kwargs)
    slow, fast, missing = race(model, slim, args, kwargs, batches=batches, variants=variants)
    rows = _rows(graph, plan) if isinstance(plan, PruningPlan) else _rows_of_weights(whole)
    pinned = {_rooted(graph, layer): reason for layer, reason in graph.pinned.items()}
    return Preview(rows, pinned, before, after, least, slow, fast, missing, stages, None, None, whole)


def _cut(model: nn.Module, plan: Plan) -> nn.Module:
    slim = replica(model)
    prune_(slim, plan)
    return slim


def _rows(graph: ChannelGraph, plan: PruningPlan) -> tuple[Row, ...]:
    rows = []
    for group in graph.groups:
        member, index = next(iter(group.index.items()))
        stays = set(plan.kept.get(member, range(index.max() + 1)))
        kept = sum(position in stays for position in index[:, 0].tolist())
        tied, readers = (
            tuple(_rooted(graph, name) for name in names) for names in (group.producers[1:], group.consumers)
        )
        rows.append(Row(_rooted(graph, group.name), group.size, kept, tied, readers))
    return tuple(rows)


def _rooted(graph: ChannelGraph, name: str) -> str:
    """A layer's name as the LightningModule's users see it."""
    return f"{graph.root}.{name}" if graph.root else name


def _rows_of_weights(plan: Plan) -> tuple[Row, ...]:
    if not isinstance(plan, SparsityPlan):
        return ()
    return tuple(Row(name, before, after) for name, (before, after) in plan.weights().items())
