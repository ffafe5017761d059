"""What goes: the regularisers' choices, merged into one plan."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from lightning.pytorch import Trainer

from lightning_prune.callbacks.base import Regulariser
from lightning_prune.callbacks.capture import Capture
from lightning_prune.callbacks.neighbours import callbacks_of
from lightning_prune.errors import ConfigurationError
from lightning_prune.structure import PruningPlan


class Decision(NamedTuple):
    """Group name -> channels that go, and the same as a plan for one submodule of the LightningModule."""

    removal: dict[str, tuple[int, ...]]
    module: str
    plan: PruningPlan

    def to_plain(self) -> dict[str, Any]:
        """The same in values that torch loads with ``weights_only=True``."""
        removal = {group: list(channels) for group, channels in self.removal.items()}
        return {"removal": removal, "module": self.module, "plan": self.plan.to_json()}

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> Decision:
        """Reads what :meth:`to_plain` wrote."""
        removal = {group: tuple(channels) for group, channels in values["removal"].items()}
        return cls(removal, values["module"], PruningPlan.from_json(values["plan"]))


def find_partners(trainer: Trainer) -> list[Regulariser]:
    """The regularisers among a trainer's callbacks.

    Raises:
        ConfigurationError: there are none.
    """
    partners = [callback for callback in callbacks_of(trainer) if isinstance(callback, Regulariser)]
    if not partners:
        raise ConfigurationError(
            "StructuralPruning found no regulariser among the trainer's callbacks; add one, such as GReg1."
        )
    return partners


def decide(partners: Iterable[Regulariser], capture: Capture, loaded: Decision | None) -> Decision | None:
    """Merge what the regularisers have picked.

    Args:
        partners: every one of them has picked.
        capture: knows the graph, unless this process has been resumed and has not seen a batch yet.
        loaded: the decision as a checkpoint has it; serves as long as the regularisers still say the same.

    Returns:
        The decision; ``None`` where this process can't translate the choices yet.

    Raises:
        PlanError: a regulariser has not picked.
        ConfigurationError: two of them have picked channels of the same group.
    """
    removal: dict[str, tuple[int, ...]] = {}
    for partner in partners:
        for group, channels in partner.removal().items():
            if group in removal:
                raise ConfigurationError(f"Two regularisers have picked channels of {group!r}; let one ignore it.")
            removal[group] = tuple(channels)
    if capture.graph is not None and capture.name is not None:
        return Decision(removal, capture.name, capture.graph.plan(removal))
    return loaded if loaded is not None and loaded.removal == removal else None
