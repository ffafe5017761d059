"""A look ahead: what validation would say if what goes went now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_prune.callbacks.accuracy import validation_pass
from lightning_prune.callbacks.base import Regulariser
from lightning_prune.callbacks.decision import Decision
from lightning_prune.callbacks.neighbours import average_models
from lightning_prune.errors import ConfigurationError
from lightning_prune.structure import Plan, SparsityPlan, masked_state
from lightning_prune.structure.plan import named_tensors, submodule


class Outlook(NamedTuple):
    """One metric of the network as it is, and of the same without what goes."""

    whole: float
    masked: float

    @property
    def change(self) -> float:
        """What cutting now would do to the metric.

        >>> Outlook(whole=0.75, masked=0.5).change
        -0.25
        """
        return self.masked - self.whole


def look_ahead(trainer: Trainer, pl_module: LightningModule, decision: Decision, monitor: str) -> Outlook:
    """Validate twice, once without what goes; afterwards everything is as it was, bit for bit.

    Every rank has to call it, and gets rank 0's numbers.

    Args:
        trainer: in the middle of ``fit``, between two batches, with validation.
        pl_module: in training, dense.
        decision: what goes, the same on all ranks.
        monitor: name of a metric that ``validation_step`` logs.

    Raises:
        ConfigurationError: validation doesn't log the metric.
    """
    whole = validation_pass(trainer, monitor, logs=False)
    with masked(trainer, pl_module, decision):
        without = validation_pass(trainer, monitor, logs=False)
    if whole is None or without is None:
        logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
        raise ConfigurationError(f"monitor={monitor!r} isn't logged in validation; logged are: {logged}.")
    return Outlook(*trainer.strategy.broadcast((whole, without), src=0))


def log_outlook(pl_module: LightningModule, monitor: str, seen: Outlook) -> None:
    """Log what the metric would be and how much that changes it, as ``if_cut/...``."""
    for name, value in ((monitor, seen.masked), (f"{monitor}_change", seen.change)):
        key = f"if_cut/{name}"
        pl_module.log(key, value, prog_bar=True, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)


def is_settled(regulariser: Regulariser) -> bool:
    """Whether it is known for good what goes, so that its going can be tried."""
    return regulariser.phase in ("grow", "hold", "ready") and regulariser.settled()


def refuse_nothing_to_await(regularisers: Iterable[Regulariser]) -> None:
    """Refuse to wait for a safe moment with a method that brings none about.

    Raises:
        ConfigurationError: in that case.
    """
    for regulariser in regularisers:
        if not regulariser.collapses:
            raise ConfigurationError(
                f'{type(regulariser).__name__} shrinks nothing before it cuts, so cut_when="safe" would wait for'
                " nothing; leave it out, or take another method."
            )


@contextmanager
def masked(trainer: Trainer, pl_module: LightningModule, decision: Decision) -> Iterator[None]:
    """The module in training and its weight averages compute for a while what they will after surgery."""
    swaps: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.no_grad():
        for whole in (pl_module, *average_models(trainer)):
            network = submodule(whole, decision.module)
            tensors = named_tensors(network)
            state = _state(network, decision.plan)
            swaps += [(tensors[name], tensors[name].detach().clone(), value) for name, value in state.items()]
        for tensor, _, value in swaps:
            tensor.copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before, _ in swaps:
                tensor.copy_(before)


def _state(network: nn.Module, plan: Plan) -> dict[str, Tensor]:
    if not isinstance(plan, SparsityPlan):
        return masked_state(network, plan)
    masks, tensors = plan.masks(network), named_tensors(network)
    parameters = {name: tensors[name] for name in plan.kept}
    return {name: each.detach().masked_fill(~masks[each], 0) for name, each in parameters.items()}  # type: ignore[index]
