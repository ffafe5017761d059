"""A budget becomes a width for every group."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lightning_prune.errors import ConfigurationError
from lightning_prune.structure.budget import QUANTITIES, SUFFIXES, Budget, Outcome
from lightning_prune.structure.counting import Bill, macs_bill, parameters_bill, slim
from lightning_prune.structure.graph import ChannelGraph
from lightning_prune.structure.search import Ladder, by_clock, largest_terms, within
from lightning_prune.structure.stopwatch import Stopwatch

Ints = NDArray[np.int64]

TRIES = 6
"""How often the aim is corrected where the count of a slim network isn't what its widths foretold."""


class Resolution(NamedTuple):
    """What a budget comes to.

    Args:
        kept: group name -> channels that stay, for the groups that take part.
        outcome: what was asked for and what is left.
    """

    kept: dict[str, int]
    outcome: Outcome


def resolve(
    graph: ChannelGraph,
    budget: Budget,
    prices: Mapping[str, Sequence[float]],
    *,
    fixed: Mapping[str, int] | None = None,
    round_to: int = 1,
    keep_at_least: int = 1,
    progress: float = 1.0,
    recount: Callable[[nn.Module], int] | None = None,
) -> Resolution:
    r"""As many channels as a budget allows, by one threshold for all groups.

    MACs and parameters are never more than asked for, and at least 99 % of it or the nearest that the widths allow. Of
    latency 95 % is near enough.

    Args:
        graph: of the dense network.
        budget: what may be left.
        prices: group name -> what the threshold must exceed for its first, second, ... channel to go, not falling,
            ``(C,)``; groups without stay as they are.
        fixed: group name -> channels that stay whatever the budget; these groups have no part in the search.
        round_to: widths are multiples of this.
        keep_at_least: channels that stay in every group.
        progress: of several parts of the way, at which one: what is left is :math:`D (T / D)^p`, with :math:`D` of the
            dense network and :math:`T` the budget.
        recount: counts the MACs of a slim network, to hold against what its widths foretell.

    Raises:
        ConfigurationError: the budget can't be reached, or asks for no less than there is; or nothing can be counted.

    >>> import torch
    >>> from lightning_prune.structure import trace
    >>> net = nn.Sequential(nn.Linear(4, 100), nn.ReLU(), nn.Linear(100, 2))
    >>> found = resolve(trace(net, torch.zeros(1, 4)), Budget(macs=0.5), {"0": range(100)})
    >>> found.kept, str(found.outcome)
    ({'0': 50}, 'budget: 0.500 of MACs, reached 0.500')
    """
    fixed = dict(fixed or {})
    sizes = np.array([group.size for group in graph.groups], dtype=np.int64)
    start = np.array([fixed.get(group.name, group.size) for group in graph.groups], dtype=np.int64)
    bill = parameters_bill(graph) if budget.quantity == "params" else macs_bill(graph)
    dense = float(bill.at(sizes))
    if not dense and budget.quantity == "macs":
        raise ConfigurationError("None of the network's operators has MACs that could be counted; give a ratio.")
    least = {
        group.name: max(min(keep_at_least, group.size), group.size - int(budget.cap * group.size + 1e-9))
        for group in graph.groups
    }
    savings = dense - bill.at(sizes - np.eye(len(sizes), dtype=np.int64))
    ladder = Ladder(graph.groups, start, prices, least, round_to, savings)
    problem = _Problem(graph, budget, bill, ladder, {*prices, *fixed}, progress)
    if budget.quantity == "latency_ms":
        return problem.by_clock(Stopwatch(graph, budget.batch, budget.device))
    return problem.by_count(dense, recount if budget.quantity == "macs" else None)


class _Problem(NamedTuple):
    graph: ChannelGraph
    budget: Budget
    bill: Bill
    ladder: Ladder
    meant: set[str]
    progress: float

    def by_count(self, dense: float, recount: Callable[[nn.Module], int] | None) -> Resolution:
        """What the widths foretell, held against a count of the slim network; the aim is corrected where it differs."""
        foreseen, dense = dense, dense if recount is None else float(recount(slim(self.graph, {})))
        target = self._target(dense)
        aim = target * foreseen / dense
        best: tuple[Ints, float] | None = None
        for _ in range(TRIES):
            widths = within(self.bill, self.ladder, aim, self.budget.enough)
            if widths is None:
                if best is None:
                    raise self._out_of_reach(dense)
                break
            reached = foretold = float(self.bill.at(widths))
            if recount is not None:
                reached = float(recount(slim(self.graph, self._named(widths))))
            if reached <= target and (best is None or reached > best[1]):
                best = widths, reached
            is_nearest = aim >= target and reached == foretold
            if reached <= target and (is_nearest or reached >= self.budget.enough * target):
                break
            aim *= target / reached * (1 if reached < target else 0.999)
        if best is None:
            raise self._out_of_reach(dense)
        return self._resolution(best, target, dense)

    def by_clock(self, clock: Stopwatch) -> Resolution:
        """The same by measurements."""
        target = self._target(clock.dense)
        rest = self.bill, self.ladder, clock.dense, target, self.budget.enough
        found = by_clock(lambda widths: clock.time(self._named(widths)), *rest)
        if isinstance(found, float):
            raise ConfigurationError(
                f"{self.budget} can't be reached: {found:.4g} ms is the least that was measured{self._cap()}, with the"
                f" fewest channels in each of the {len(self.ladder.widths)} layers that may shrink; dense it takes"
                f" {clock.dense:.4g} ms."
            )
        return self._resolution(found, target, clock.dense)

    def _target(self, dense: float) -> float:
        target = self.budget.wanted(dense)
        if target >= dense:
            raise ConfigurationError(
                f"{self.budget} asks for no less than the dense network has ({self._amount(dense)}); nothing would go."
            )
        return float(dense * (target / dense) ** self.progress)

    def _resolution(self, found: tuple[Ints, float], target: float, dense: float) -> Resolution:
        widths, reached = found
        return Resolution(self._named(widths), Outcome(self.budget.quantity, target, reached, dense))

    def _named(self, widths: Ints) -> dict[str, int]:
        pairs = zip(self.graph.groups, widths.tolist(), strict=True)
        return {group.name: kept for group, kept in pairs if group.name in self.meant}

    def _out_of_reach(self, dense: float) -> ConfigurationError:
        widths = self.ladder.after(len(self.ladder.steps))
        least, name = float(self.bill.at(widths)), QUANTITIES[self.budget.quantity]
        held = ", ".join(
            f"{where} ({share:.0%}, {self._why(where)})" for where, share in largest_terms(self.bill, widths)
        )
        return ConfigurationError(
            f"{self.budget} can't be reached: {least / dense:.4g} of the network's {name} are left, the smallest share"
            f" there is ({self._amount(least)} of {self._amount(dense)}), with the fewest channels in each of the"
            f" {len(self.ladder.widths)} layers that may shrink{self._cap()}; most of that is in {held}."
        )

    def _why(self, where: str) -> str:
        """What keeps a layer as large as it is."""
        own = [number for number, group in enumerate(self.graph.groups) if where in group.producers]
        if any(number in self.ladder.widths for number in own):
            return "at its fewest channels"
        if any(self.graph.groups[number].name in self.meant for number in own):
            return "by a ratio of its own"
        if own:
            return "left out by scope, ignore or the method"
        return "pinned" if where in self.graph.pinned else "no channels of its own"

    def _amount(self, number: float) -> str:
        if self.budget.quantity == "latency_ms":
            return f"{number:.4g} ms"
        unit = next((suffix for suffix in reversed(SUFFIXES) if number >= SUFFIXES[suffix]), "")
        return f"{number / SUFFIXES.get(unit, 1):.4g}{unit}"

    def _cap(self) -> str:
        return f" under cap={self.budget.cap:g}" if self.budget.cap < 1 else ""
