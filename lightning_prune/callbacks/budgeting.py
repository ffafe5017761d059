"""A budget in a training run: rank 0 finds the widths, and every rank goes by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_prune.callbacks.ranks import agreed
from lightning_prune.door import check
from lightning_prune.errors import PlanError
from lightning_prune.reports.cost import count_cost
from lightning_prune.structure import Budget, ChannelGraph
from lightning_prune.structure.choice import spend
from lightning_prune.structure.counting import count_macs
from lightning_prune.structure.resolve import Resolution


def refuse_all_but_one(**given: object) -> None:
    """Refuse several answers to the question how much goes, and none.

    >>> refuse_all_but_one(ratio=None, budget={"macs": 0.5})
    """
    names = [f"{name}=..." for name in given]
    is_one = sum(value is not None for value in given.values()) == 1
    check(is_one, f"Give exactly one of {', '.join(names[:-1])} and {names[-1]}.")


def spend_together(
    trainer: Trainer,
    graph: ChannelGraph,
    budget: Budget,
    share: Mapping[str, float],
    ratios: Mapping[str, float] | None,
    prices: Mapping[str, Sequence[float]] | None = None,
    *,
    round_to: int,
    label: str,
    progress: float = 1.0,
) -> Resolution:
    """What a budget comes to, by rank 0, on every rank; see :func:`lightning_prune.structure.choice.spend`.

    Raises:
        ConfigurationError: it can't be reached; on other ranks :class:`~lightning_prune.PruningError`.
    """

    def recount(network: nn.Module) -> int:
        """As the report counts; with our own counter what fvcore can't trace."""
        args, kwargs = graph.inputs
        try:
            return count_cost(network, args, kwargs or None).macs or 0
        except Exception:  # of foreign code that is scripted, or that fvcore doesn't know
            return count_macs(network, graph.inputs)

    def work() -> Resolution | None:
        if not trainer.is_global_zero:
            return None
        device = next((parameter.device.type for parameter in graph.model.parameters()), "cpu")
        with torch.autocast(device, enabled=False):
            return spend(graph, budget, share, ratios, prices, round_to=round_to, progress=progress, recount=recount)

    found = agreed(trainer, work, label)
    if found is None:
        raise PlanError("Rank 0 has sent no widths for the budget.")
    return found
