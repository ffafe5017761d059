"""How many channels go where a share of the multiply-adds is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from lightning_prune import structure
from lightning_prune.callbacks.masks import doomed_channels, ranked, rounded
from lightning_prune.errors import ConfigurationError
from lightning_prune.reports.cost import count_cost
from lightning_prune.structure.replica import replica

Removal = Mapping[str, Sequence[int]]


def fewest(left: Callable[[int], float], most: int, target: float) -> int | None:
    """The number at which a falling quantity comes down to a target, by bisection.

    Asks about ``2 + log2(most)`` times. Where the quantity isn't monotone, the answer is one of the numbers at which
    it crosses the target.

    Args:
        left: what is left after so many steps.
        most: the largest number.
        target: what may be left.

    Returns:
        A number that leaves no more than the target while its predecessor does; ``None`` where ``most`` leaves more.

    >>> fewest(lambda number: 1 - number / 10, most=10, target=0.35), fewest(lambda number: 1.0, most=10, target=0.35)
    (7, None)
    """
    if left(most) > target:
        return None
    if left(0) <= target:
        return 0
    above, within = 0, most
    while within - above > 1:
        middle = (above + within) // 2
        above, within = (middle, within) if left(middle) > target else (above, middle)
    return within


class Search(NamedTuple):
    """What is pruned down to a share of the MACs.

    Args:
        graph: of the dense network.
        inputs: its arguments; one sample of them is used.
        groups: the channel groups that take part, by name.
        fixed: group name to the channels that go whatever the MACs; these groups have no part in the search.
        scales: name of another group to its absolute scales, shape ``(norms, C)``.
        rule: how norms that share channels agree.
        round_to: widths afterwards are multiples of this.
    """

    graph: structure.ChannelGraph
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    groups: Mapping[str, structure.ChannelGroup]
    fixed: Mapping[str, Sequence[int]]
    scales: Mapping[str, Tensor]
    rule: Literal["mean", "vote"]
    round_to: int

    def down_to(self, target: float) -> tuple[dict[str, list[int]], float]:
        """As few channels as possible, the smallest scales of all layers first, and the share that is left then.

        Raises:
            ConfigurationError: that many MACs are left whatever goes, or they can't be counted.
        """
        ranks = ranked(self.scales, self.rule)

        def removal(number: int) -> dict[str, list[int]]:
            rest = {name: doomed_channels(each, 0, number - 0.5, self.rule) for name, each in ranks.items()}
            return {
                name: rounded(self.groups[name], gone, self.round_to) for name, gone in ({**self.fixed, **rest}).items()
            }

        count, most = macs_left(self.graph, self.inputs), sum(each.numel() for each in ranks.values())
        left = cache(lambda number: count(removal(number)))
        number = fewest(left, most, target)
        if number is None:
            least = f"{left(most):.4g} of the network's MACs are left, the smallest share there is"
            raise ConfigurationError(
                f"macs={target:g} can't be reached: {least}, with the fewest channels in each of the "
                f"{len(self.groups)} layers that may shrink."
            )
        return removal(number), left(number)


def macs_left(
    graph: structure.ChannelGraph, inputs: tuple[tuple[Any, ...], dict[str, Any]]
) -> Callable[[Removal], float]:
    """A function that says which share of a network's MACs is left without some channels, counted on a slim copy.

    Args:
        graph: of the dense network.
        inputs: its arguments; one sample of them is used.

    Raises:
        ConfigurationError: the network's MACs can't be counted.
    """

    def count(network: nn.Module) -> int:
        args, kwargs = inputs
        try:
            return count_cost(network, args, kwargs or None).macs or 0
        except Exception as error:
            first = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
            raise ConfigurationError(f"The network's MACs could not be counted ({first}); give a ratio.") from error

    dense = count(graph.model)
    if dense == 0:
        raise ConfigurationError("None of the network's operators has MACs that could be counted; give a ratio.")

    def left(removed: Removal) -> float:
        if not any(len(channels) for channels in removed.values()):
            return 1.0
        slim = replica(graph.model)
        structure.prune_(slim, graph.plan(removed))
        return count(slim) / dense

    return left
