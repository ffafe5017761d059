"""What goes: the regularisers' choices, merged into one plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule, Trainer

from lightning_prune.callbacks.base import Regulariser
from lightning_prune.callbacks.capture import Capture
from lightning_prune.callbacks.grains import weight_graph
from lightning_prune.callbacks.neighbours import callbacks_of
from lightning_prune.errors import ConfigurationError
from lightning_prune.structure import Bits, ChannelGraph, Plan, SparsityPlan, signature
from lightning_prune.structure.bits import compact, from_plain, to_plain
from lightning_prune.structure.plan import Member, named_tensors, submodule
from lightning_prune.structure.sparsity import plan_from_json


class Decision(NamedTuple):
    """What goes, as the regularisers say it and as plans.

    Args:
        removal: group name -> channels or weights, as the regularisers have it.
        merges: group name -> channel that goes -> channel that stands for it, where something does.
        module: name of the pruned submodule, ``""`` for the LightningModule itself.
        plan: for that submodule; surgery and checkpoints use it, for the rest of the module may change between runs.
        whole: the same for the LightningModule, by the names that its users see.
    """

    removal: dict[str, Sequence[int]]
    merges: dict[str, dict[int, int]]
    module: str
    plan: Plan
    whole: Plan

    def to_plain(self) -> dict[str, Any]:
        """The same in values that torch loads with ``weights_only=True``."""
        removal = {group: to_plain(numbers) for group, numbers in self.removal.items()}
        plans = {"plan": self.plan.to_json(), "whole": self.whole.to_json()}
        return {"removal": removal, "merges": self.merges, "module": self.module, **plans}

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> Decision:
        """Reads what :meth:`to_plain` wrote."""
        removal = {group: from_plain(numbers) for group, numbers in values["removal"].items()}
        plans = (plan_from_json(values[name]) for name in ("plan", "whole"))
        return cls(removal, values["merges"], values["module"], *plans)


def find_partners(trainer: Trainer, who: str = "StructuralPruning") -> list[Regulariser]:
    """The regularisers among a trainer's callbacks.

    Args:
        trainer: with all of its callbacks.
        who: asks.

    Raises:
        ConfigurationError: there are none, or some remove channels and others single weights.
    """
    partners = [callback for callback in callbacks_of(trainer) if isinstance(callback, Regulariser)]
    if not partners:
        raise ConfigurationError(f"{who} found no regulariser among the trainer's callbacks; add one, such as GReg1.")
    if len({partner.granularity for partner in partners}) > 1:
        kinds = ", ".join(f"{type(partner).__name__} {partner.granularity!r}" for partner in partners)
        raise ConfigurationError(f"One run removes either channels or single weights: let granularity agree ({kinds}).")
    return partners


def decide(
    pl_module: LightningModule, partners: Iterable[Regulariser], capture: Capture, loaded: Decision | None
) -> Decision | None:
    """Merge what the regularisers have picked.

    Args:
        pl_module: the module in training, dense.
        partners: every one of them has picked.
        capture: knows the graph, unless this process has been resumed and has not seen a batch yet.
        loaded: the decision as a checkpoint has it; serves as long as the regularisers still say the same.

    Returns:
        The decision; ``None`` where this process can't translate the choices yet.

    Raises:
        PlanError: a regulariser has not picked.
        ConfigurationError: two of them have picked channels of the same group.
    """
    removal: dict[str, Sequence[int]] = {}
    merges: dict[str, dict[int, int]] = {}
    partners = list(partners)
    for partner in partners:
        for group, numbers in partner.removal().items():
            if group in removal:
                raise ConfigurationError(f"Two regularisers have picked channels of {group!r}; let one ignore it.")
            removal[group] = compact(numbers)
        merges |= partner.merges()
    if capture.graph is not None and capture.name is not None:
        plan = plan_of(capture.graph, removal, merges, common_multiple(partners))
        return Decision(removal, merges, capture.name, plan, rooted(plan, pl_module, capture.name))
    return loaded if loaded is not None and (loaded.removal, loaded.merges) == (removal, merges) else None


def plan_of(
    graph: ChannelGraph,
    removal: Mapping[str, Sequence[int]],
    merges: Mapping[str, Mapping[int, int]],
    round_to: int = 1,
) -> Plan:
    """The plan by which these channels or single weights of the traced model go."""
    weights = {name: numbers for name, numbers in removal.items() if isinstance(numbers, Bits)}
    return weight_graph(graph).plan(weights) if weights else graph.plan(removal, merges, round_to)


def common_multiple(partners: Iterable[Regulariser]) -> int:
    """What the widths of all regularisers together are multiples of."""
    return math.gcd(*(partner.multiple for partner in partners))


def rooted(plan: Plan, pl_module: LightningModule, module: str) -> Plan:
    """A submodule's plan as one for the whole (dense) module.

    Args:
        plan: for the submodule.
        pl_module: the whole.
        module: the submodule's name in it.
    """
    if not module:
        return plan
    # By identity: a tensor that hangs in several places goes by the first of its names.
    names = {id(tensor): name for name, tensor in named_tensors(pl_module).items()}
    own = {name: names[id(tensor)] for name, tensor in named_tensors(submodule(pl_module, module)).items()}

    if isinstance(plan, SparsityPlan):
        kept = {own[name]: bits for name, bits in plan.kept.items()}
        return SparsityPlan(kept, {own[name]: shape for name, shape in plan.shapes.items()}, signature(pl_module))

    def member(key: Member) -> Member:
        return own[key[0]], key[1]

    return replace(
        plan,
        kept={member(key): value for key, value in plan.kept.items()},
        sizes={member(key): value for key, value in plan.sizes.items()},
        signature=signature(pl_module),
        outputs=tuple(map(member, plan.outputs)),
        numbers={f"{module}.{name}": value for name, value in plan.numbers.items()},
        renormalised=tuple(own[name] for name in plan.renormalised),
        merged={member(key): value for key, value in plan.merged.items()},
        summed=tuple(map(member, plan.summed)),
        joined=tuple(f"{module}.{name}" for name in plan.joined),
    )
