"""What is looked at around surgery: proof, cost and latency, and the report made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning.pytorch import Trainer
from torch import nn

from lightning_prune.callbacks.accuracy import AccuracyColumns
from lightning_prune.callbacks.operation import on_first_rank, run_together
from lightning_prune.reports.cost import Cost, count_cost
from lightning_prune.reports.latency import Latency, measure_latency
from lightning_prune.reports.report import PruningReport
from lightning_prune.structure import Proof, PruningPlan, prove

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class Look(NamedTuple):
    """What a network costs; latency at each batch size."""

    cost: Cost
    latency: tuple[Latency, ...]


class Examination(NamedTuple):
    """What is known before surgery; ranks other than 0 don't look at cost."""

    proof: Proof
    dense: Look | None


def examine(
    trainer: Trainer,
    network: nn.Module,
    plan: PruningPlan,
    inputs: Inputs,
    tolerance: float | None,
    batches: Sequence[int],
) -> Examination:
    """Prove the plan on this rank's inputs, and look at the dense network. Every rank has to call it.

    Raises:
        ProofError: the slim network would not compute what the masked one does, on some rank.
    """
    args, kwargs = inputs
    proof = run_together(trainer, lambda: prove(network, plan, args, kwargs or None, tolerance))
    return Examination(proof, on_first_rank(trainer, lambda: look(network, inputs, batches)))


def look(network: nn.Module, inputs: Inputs, batches: Sequence[int]) -> Look:
    """Count and measure a network as it is."""
    args, kwargs = inputs
    latency = tuple(measure_latency(network, args, kwargs or None, batch=batch) for batch in batches)
    return Look(count_cost(network, args, kwargs or None), latency)


def conclude(
    trainer: Trainer,
    network: nn.Module,
    plan: PruningPlan,
    inputs: Inputs,
    seen: Examination,
    columns: AccuracyColumns,
    batches: Sequence[int],
) -> PruningReport | None:
    """Look at the slim network and write everything down, on rank 0. Every rank has to call it."""
    slim = on_first_rank(trainer, lambda: look(network, inputs, batches))
    if seen.dense is None or slim is None:
        return None
    return PruningReport(
        layers=[(name, before, after) for name, (before, after) in plan.widths().items()],
        cost_before=seen.dense.cost,
        cost_after=slim.cost,
        latency_before=seen.dense.latency,
        latency_after=slim.latency,
        monitor=columns.monitor,
        accuracy=columns.complete(),
        error=seen.proof.error,
        tolerance=seen.proof.tolerance,
        renormalised=list(plan.renormalised),
    )
