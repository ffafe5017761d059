"""From a budget to widths: one threshold for all groups, then channels given back until nothing more fits.

Every group shrinks in steps, each to the next width that is allowed; a step's price is what a threshold must exceed for
it to be taken. Sorted by price the steps are one list, and a plan is a prefix of it: the shortest within the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_prune.structure.counting import Bill
from lightning_prune.structure.graph import ChannelGroup

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

PAIRED = 64
"""Groups up to which a step back in one is tried together with a step down in another."""


class Step(NamedTuple):
    """One group (by its number) shrinks to ``kept`` channels."""

    price: float
    number: int
    kept: int


def widths_of(size: int, least: int, unit: int, round_to: int) -> list[int]:
    """The widths that a group may have, falling, the dense one first.

    >>> widths_of(10, 1, 1, 4), widths_of(6, 2, 1, 1)
    ([10, 8, 4], [6, 5, 4, 3, 2])
    """
    return [size, *(kept for kept in range(size - 1, least - 1, -1) if kept * unit % round_to == 0)]


class Ladder:
    """The steps of some groups in the order of their prices.

    Args:
        groups: all groups of the graph, in its order.
        start: widths from which the search sets out, ``(G,)``.
        prices: group name -> what a threshold must exceed for its first, second, ... channel to go, not falling,
            ``(C,)``; groups without stay as they are.
        least: group name -> channels that stay.
        round_to: widths are multiples of this.
        savings: what one channel of each group saves in the dense network, ``(G,)``; of equal prices the larger goes
            first, so that the cheaper is given back first.
    """

    def __init__(
        self,
        groups: Sequence[ChannelGroup],
        start: Ints,
        prices: Mapping[str, Sequence[float]],
        least: Mapping[str, int],
        round_to: int,
        savings: Floats,
    ) -> None:
        self.start = start
        self.widths: dict[int, list[int]] = {}
        found = []
        for number, group in enumerate(groups):
            if group.name not in prices:
                continue
            own = prices[group.name]
            self.widths[number] = widths_of(group.size, least[group.name], group.unit, round_to)
            for kept in self.widths[number][1:]:
                found.append(Step(float(own[group.size - kept - 1]), number, kept))
        self.steps = sorted(found, key=lambda step: (step.price, -savings[step.number], step.number, -step.kept))

    def after(self, count: int) -> Ints:
        """Widths after so many steps, ``(G,)``."""
        widths = self.start.copy()
        for step in self.steps[:count]:
            widths[step.number] = step.kept
        return widths

    def neighbours(self, widths: Ints) -> Floats:
        """Plans next to this one: a step back in one group, alone or beside a step down in another, ``(N, G)``."""
        up, down = [], []
        for number, allowed in self.widths.items():
            place = allowed.index(int(widths[number]))
            if place:
                up.append((number, allowed[place - 1] - allowed[place]))
            if place + 1 < len(allowed):
                down.append((number, allowed[place + 1] - allowed[place]))
        pairs = [(a, b) for a in up for b in down if a[0] != b[0]] if len(self.widths) <= PAIRED else []
        found = np.repeat(widths[None].astype(np.float64), len(up) + len(pairs), axis=0)
        for row, moves in enumerate([*((a,) for a in up), *pairs]):
            for number, change in moves:
                found[row, number] += change
        return found


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


def within(bill: Bill, ladder: Ladder, target: float, enough: float) -> Ints | None:
    """Widths that cost no more than the target and, if the steps allow it, no less than a share of it.

    Args:
        bill: the cost, not rising where widths fall.
        ladder: which widths there are, and which go first.
        target: what may be left.
        enough: share of the target from which on nothing is given back.

    Returns:
        Shape ``(G,)``; ``None`` where even the fewest channels cost more.
    """
    count = fewest(lambda number: float(bill.at(ladder.after(number))), len(ladder.steps), target)
    if count is None:
        return None
    widths, cost = ladder.after(count), float(bill.at(ladder.after(count)))
    # what was taken last is worth most; of one price the cheapest comes back first
    for step in reversed(ladder.steps[:count]):
        if cost >= enough * target:
            break
        allowed = ladder.widths[step.number]
        if int(widths[step.number]) != step.kept:
            continue
        more = widths.copy()
        more[step.number] = allowed[allowed.index(step.kept) - 1]
        dearer = float(bill.at(more))
        if dearer <= target:
            widths, cost = more, dearer
    while cost < enough * target:
        candidates = ladder.neighbours(widths)
        costs = bill.at(candidates)
        fitting = np.flatnonzero((costs <= target) & (costs > cost))
        if not fitting.size:
            break
        best = fitting[costs[fitting].argmax()]
        widths, cost = candidates[best].astype(np.int64), float(costs[best])
    return widths


def by_clock(
    measure: Callable[[Ints], float],
    bill: Bill,
    ladder: Ladder,
    dense: float,
    target: float,
    enough: float,
    most: int = 12,
) -> tuple[Ints, float] | float:
    """Widths whose measured time is within the target, found by few measurements.

    Between a measurement above and one below, time is taken to be a straight line over MACs; every third guess halves
    the steps in between instead, for it may be none. What seems near enough is measured again before it is taken, and
    so are the ends where nothing is left between them, for a clock that wavers may have led there; the mean counts.

    Args:
        measure: the time at some widths; it needn't be monotone, nor twice the same.
        bill: MACs at some widths.
        ladder: which widths there are, and which go first.
        dense: the time before any step.
        target: time that may be left.
        enough: share of the target that is near enough.
        most: measurements at the most.

    Returns:
        Widths and their time, of the slowest that was within the target; the fastest time, where none was.
    """
    last, wanted = len(ladder.steps), target * (1 + enough) / 2
    drawn: dict[int, list[float]] = {}
    times: dict[int, float] = {}

    def cost(number: int) -> float:
        return float(bill.at(ladder.after(number)))

    def ends() -> tuple[int, int]:
        """Numbers of steps: the last one too slow and the first one within the target, or all steps."""
        below = min((number for number, time in times.items() if time <= target), default=last)
        return max((number for number, time in times.items() if time > target and number < below), default=0), below

    def guess(above: int, below: int, halve: bool) -> int:
        """More steps than the one, at most as many as the other, and fewer where that is known."""
        most = below - 1 if below in times else below
        if halve:
            return min((above + below) // 2, most)
        slow, fast = times.get(above, dense), times.get(below, 0.0)
        few, many = cost(above), cost(below) if below in times else 0.0
        number = fewest(cost, last, many + (few - many) * (wanted - fast) / max(slow - fast, 1e-12))
        return min(max(below if number is None else number, above + 1), most)

    for turn in range(most):
        above, below = ends()
        found = times.get(below, 0.0)
        if enough * target <= found or (below == last and found > target):
            asked = below
        elif below not in times or below - above > 1:
            asked = guess(above, below, turn % 3 == 2)
        else:
            asked = above if len(drawn.get(above, ())) == 1 else below
        if len(drawn.get(asked, ())) > 1:
            break
        drawn.setdefault(asked, []).append(measure(ladder.after(asked)))
        times[asked] = fmean(drawn[asked])
    number = max(
        (number for number, time in times.items() if time <= target), key=lambda each: times[each], default=None
    )
    return min(times.values(), default=dense) if number is None else (ladder.after(number), times[number])


def largest_terms(bill: Bill, widths: NDArray[Any], count: int = 3) -> list[tuple[str, float]]:
    """The layers that most of a cost is in, each with its share."""
    shares: dict[str, float] = {}
    terms = bill.terms(widths)
    for where, value in zip(bill.where, terms.tolist(), strict=True):
        shares[where] = shares.get(where, 0.0) + value
    total = max(float(terms.sum()), 1.0)
    return sorted(((where, value / total) for where, value in shares.items()), key=lambda pair: -pair[1])[:count]
