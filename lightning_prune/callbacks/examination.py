"""What is looked at around surgery: proof, cost and latency, and the report made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_prune.callbacks.decision import Decision
from lightning_prune.callbacks.ranks import on_first_rank, run_together
from lightning_prune.door import check, is_whole, once_each
from lightning_prune.errors import ProofError
from lightning_prune.reports.cost import Cost, count_cost
from lightning_prune.reports.latency import VARIANTS, Latency, race
from lightning_prune.reports.origin import commit
from lightning_prune.reports.report import PruningReport
from lightning_prune.reports.wording import first_line
from lightning_prune.structure import Outcome, Plan, Proof, PruningPlan, SparsityPlan, prove, prune_
from lightning_prune.structure.batches import resized, sample_count
from lightning_prune.structure.replica import replica
from lightning_prune.structure.slim_file import stored_bytes

SAMPLES = 16
"""How much of a batch the proof looks at."""

LONG_MS = 5.0
"""Milliseconds of a forward pass from which on its time says something about widths."""

PROMISED = 0.9
"""Share of the speed-up by MACs that the clock should show."""

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class Look(NamedTuple):
    """What a network costs, its latencies, why any of that is missing, and its bytes on disk."""

    cost: Cost
    latency: tuple[Latency, ...]
    warnings: tuple[str, ...]
    stored: int | None = None


class Examination(NamedTuple):
    """What is known before surgery; ranks other than 0 don't look at cost. Single weights are proved afterwards."""

    proof: Proof | None
    dense: Look | None
    slim_latency: tuple[Latency, ...] = ()


def latencies_wanted(batches: Sequence[int], variants: Sequence[str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Batch sizes and variants at which latency is measured, if they are any.

    Raises:
        ConfigurationError: they are not.

    >>> latencies_wanted([1, 64], ["eager"])
    ((1, 64), ('eager',))
    """
    sizes, known = once_each("latency_batches", batches, "batch sizes"), ", ".join(VARIANTS)
    check(all(is_whole(each) and each >= 1 for each in sizes), f"latency_batches={sizes} must be positive batch sizes.")
    ways = once_each("latency_variants", variants, known)
    check(all(each in VARIANTS for each in ways), f"latency_variants={ways!r} must be a list of {known}.")
    return tuple(sizes), tuple(ways)


def examine(
    trainer: Trainer,
    network: nn.Module,
    plan: Plan,
    inputs: Inputs,
    tolerance: float | None,
    batches: Sequence[int],
    variants: Sequence[str] = ("eager",),
) -> Examination:
    """Prove the plan on this rank's inputs, look at the dense network and time it beside the slim one.

    Every rank has to call it.

    Raises:
        ProofError: the slim network would not compute what the masked one does, or weights aren't finite, on some rank.
    """
    proof = None
    if isinstance(plan, PruningPlan):
        proof = run_together(trainer, lambda: _prove(network, plan, inputs, tolerance))
    else:
        run_together(trainer, lambda: _prove_finite(network, plan))

    def look_and_race() -> tuple[Look, tuple[Latency, ...]]:
        dense = look(network, inputs)
        before, after, missing = _race(network, plan, inputs, batches, variants)
        return dense._replace(latency=before, warnings=dense.warnings + missing), after

    seen = on_first_rank(trainer, look_and_race)
    return Examination(proof, None) if seen is None else Examination(proof, *seen)


def _prove(network: nn.Module, plan: PruningPlan, inputs: Inputs, tolerance: float | None) -> Proof:
    """On a few samples; on the whole batch where the network doesn't run with a part of it."""
    few = _few(inputs)
    try:
        return prove(network, plan, few[0], few[1] or None, tolerance)
    except ProofError:
        raise
    except Exception:
        if few is inputs:
            raise
    return prove(network, plan, inputs[0], inputs[1] or None, tolerance)


def _few(inputs: Inputs) -> Inputs:
    # The proof runs in double precision, twice: a large batch would cost minutes and show no more.
    few: Inputs = resized(inputs, SAMPLES) if (sample_count(inputs) or 0) > SAMPLES else inputs
    return few


def conclude(
    trainer: Trainer,
    network: nn.Module,
    decision: Decision,
    inputs: Inputs,
    seen: Examination,
    monitor: str | None,
    remarks: Sequence[str] = (),
    budgets: Sequence[Outcome] = (),
    round_to: int = 1,
    config: Mapping[str, Mapping[str, Any]] | None = None,
) -> PruningReport | None:
    """Look at the network after surgery and write everything down, on rank 0. Every rank has to call it.

    Raises:
        ProofError: a weight that should be zero is not, on some rank.
    """
    run_together(trainer, lambda: _prove_zeros(network, decision.plan))

    def write_down() -> PruningReport | None:
        dense = seen.dense
        if dense is None:
            return None
        slim = look(network, inputs, decision.plan)._replace(latency=seen.slim_latency)
        rows, cost, unit = _rows(decision.whole), slim.cost, "channels"
        if isinstance(decision.whole, SparsityPlan):
            zeros = sum(before - left for _, before, left in rows)
            cost, unit = replace(cost, parameters=cost.parameters - zeros), "weights"
        odd_widths = awkward(dense, slim, rows) if unit == "channels" else ()
        return PruningReport(
            layers=rows,
            unit=unit,
            cost_before=dense.cost,
            cost_after=cost,
            latency_before=dense.latency,
            latency_after=slim.latency,
            monitor=monitor,
            error=0.0 if seen.proof is None else seen.proof.error,
            tolerance=0.0 if seen.proof is None else seen.proof.tolerance,
            round_to=round_to,
            budgets=tuple(_counted(outcome, cost) for outcome in budgets),
            renormalised=decision.whole.renormalised if isinstance(decision.whole, PruningPlan) else (),
            warnings=tuple(dict.fromkeys((*remarks, *dense.warnings, *slim.warnings, *odd_widths))),
            bytes_before=dense.stored,
            bytes_after=slim.stored,
            config=config or {},
            commit=commit(),
        )

    return on_first_rank(trainer, write_down)


def awkward(dense: Look, slim: Look, rows: Sequence[tuple[str, int, int]]) -> tuple[str, ...]:
    """One sentence where odd widths keep a network slower than its MACs promise; none where that can't be told.

    It can't on forward passes of less than 5 ms, which are mostly overhead.
    """
    odd = sum(after % 8 != 0 for _, _, after in rows)
    for before, after in zip(dense.latency, slim.latency, strict=False):
        if not (dense.cost.macs and slim.cost.macs) or before.median_ms < LONG_MS or odd <= len(rows) / 2:
            continue
        if before.variant != "eager":
            continue
        promised, measured = dense.cost.macs / slim.cost.macs, before.median_ms / after.median_ms
        if measured < PROMISED * promised:
            return (
                f"{odd} of {len(rows)} widths are no multiples of 8, and at batch {before.batch} the slim network is"
                f" {measured:.2f}x as fast where its MACs promise {promised:.2f}x: round_to=8 or 'auto' may be faster.",
            )
    return ()


def _counted(outcome: Outcome, cost: Cost) -> Outcome:
    """The outcome of a budget by the counts of the report; what isn't counted stays as it was foretold."""
    found = {"macs": cost.macs, "params": cost.parameters}.get(outcome.quantity)
    return outcome if found is None else replace(outcome, reached=float(found))


def _rows(plan: Plan) -> list[tuple[str, int, int]]:
    counts = plan.weights() if isinstance(plan, SparsityPlan) else plan.widths()
    return [(name, before, after) for name, (before, after) in counts.items()]


@torch.no_grad()
def _prove_finite(network: nn.Module, plan: SparsityPlan) -> None:
    """Of channels the proof says so by itself."""
    norms = torch._foreach_norm([parameter.detach() for parameter in plan.masks(network)], float("inf"))
    for name, is_finite in zip(plan.kept, torch.stack([norm.isfinite() for norm in norms]).tolist(), strict=True):
        if not is_finite:
            raise ProofError(f"The weights of {name!r} are not all finite before surgery; training diverged.")


@torch.no_grad()
def _prove_zeros(network: nn.Module, plan: Plan) -> None:
    if not isinstance(plan, SparsityPlan):
        return
    masks = plan.masks(network)
    counts = [parameter.masked_fill(kept, 0).count_nonzero() for parameter, kept in masks.items()]
    for name, count in zip(plan.kept, torch.stack(counts).tolist(), strict=True):
        if count:
            raise ProofError(f"{count} weights of {name!r} should be zero after surgery and are not.")


def look(network: nn.Module, inputs: Inputs, plan: Plan | None = None) -> Look:
    """Count a network as it is. What can't be done is said: a report must not stop a training run.

    Args:
        network: dense or slim.
        inputs: of a training batch.
        plan: that made it slim, where it has.
    """
    args, kwargs = inputs
    parameters = sum(parameter.numel() for parameter in network.parameters())
    cost, warnings = Cost(None, parameters), []
    try:
        cost = count_cost(network, args, kwargs or None)
    except Exception as error:
        warnings.append(f"MACs could not be counted: {first_line(error)}.")
    return Look(cost, (), tuple(warnings), stored_bytes(network, plan))


def _race(
    network: nn.Module, plan: Plan, inputs: Inputs, batches: Sequence[int], variants: Sequence[str]
) -> tuple[tuple[Latency, ...], tuple[Latency, ...], tuple[str, ...]]:
    if not batches:
        return (), (), ()
    try:
        slim = replica(network)
        prune_(slim, plan)
    except Exception as error:  # of too little memory for one more copy
        return (), (), (f"Latency could not be measured: {first_line(error)}.",)
    return race(network, slim, inputs[0], inputs[1] or None, batches=batches, variants=variants)
