"""A method meets the model: which channels are its own, and which optimisers move them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer

from lightning_prune import structure
from lightning_prune.callbacks.targets import Target
from lightning_prune.errors import ConfigurationError
from lightning_prune.structure.choice import matches

if TYPE_CHECKING:
    from lightning_prune.callbacks.questions import Method


def taking_part(method: Method, graph: structure.ChannelGraph, label: str) -> dict[str, structure.ChannelGroup]:
    """The groups that a method's arguments mean and that suit it, by name; the log names those that don't.

    Raises:
        ConfigurationError: there are none, or one that doesn't suit is given a ratio of its own.
    """
    # where no ratio is given the method decides how much goes, not whether
    ratio = 0.5 if method.ratio is None else method.ratio
    shares = structure.select(graph, ratio, ratios=method.ratios, ignore=method.ignore, scope=method.scope)
    meant = [group for group in graph.groups if shares.get(group.name, 0.0) > 0]
    if not meant:
        why = "Averages are taken over its channels, or they run along a residual stream; scope='all' prunes it."
        others = {group.name: why for group in graph.groups if method.scope == "inner" and group.name not in shares}
        reasons = "; ".join(f"{layer}: {reason}" for layer, reason in list({**others, **graph.pinned}.items())[:3])
        raise ConfigurationError(f"{label} finds no layer to prune with scope={method.scope!r}. {reasons}".strip())
    unfit = [group for group in meant if not method.suits(group)]
    names = ", ".join(group.name for group in unfit[:3]) + (", ..." if len(unfit) > 3 else "")
    if len(unfit) == len(meant):
        raise ConfigurationError(
            f"{label}: none of the {len(meant)} layers it is to prune ({names}) has {method.needs}."
        )
    for pattern, ratio in (method.ratios or {}).items():
        named = next((group.name for group in unfit if ratio > 0 and matches(graph, group, pattern)), None)
        if named is not None:
            raise ConfigurationError(f"{label}: ratios[{pattern!r}] asks for {named}, which lacks {method.needs}.")
    if unfit:
        rank_zero_info(
            f"{label}: {len(unfit)} of {len(meant)} layers stay as they are without {method.needs}: {names}."
        )
    return {group.name: group for group in meant if method.suits(group)}


def refuse_shared_groups(own: Iterable[str], others: Iterable[Iterable[str]]) -> None:
    """Refuse two methods that mean the same groups, by name."""
    for other in others:
        for name in sorted(set(own) & set(other)):
            raise ConfigurationError(f"Two regularisers have picked channels of {name!r}; let one ignore it.")


def holders_of(
    targets: Iterable[Target], optimizers: Sequence[Optimizer], label: str
) -> tuple[Optimizer, list[Optimizer]]:
    """The optimiser that holds most of the targets, and all that hold any.

    Raises:
        ConfigurationError: none does.
    """
    aimed = {id(target.parameter) for target in targets}

    def held(optimizer: Optimizer) -> int:
        return sum(id(parameter) in aimed for group in optimizer.param_groups for parameter in group["params"])

    keeper = max(optimizers, key=held)
    if held(keeper) == 0:
        raise ConfigurationError(f"No optimiser holds the parameters that {label} is to prune.")
    return keeper, [optimizer for optimizer in optimizers if held(optimizer)]
