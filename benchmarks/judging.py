"""Whether two variants differ by more than chance: the one rule of all pages."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import NamedTuple

from scipy import stats

LEVEL = 0.05
"""How often variants that are equally good are told apart all the same."""

RULE = (
    "*More than chance*: a two-sided paired t-test over the seeds that both have, for the variants of a seed share its "
    f"dense stage, at the level of {LEVEL:.0%}; the standard deviation of the differences counts as one validation "
    "image at least. Of one common seed: further apart than two standard errors of a difference of two accuracies on "
    f"so many images, in which the spread between seeds is not. About one in {1 / LEVEL:.0f} comparisons comes up by "
    "chance alone. Over few seeds only large differences are more than chance: *none* does not say that all are equal."
)
"""For the reader of a page."""


class Difference(NamedTuple):
    """Of one variant to another.

    Args:
        gain: mean over the seeds, in points.
        seeds: how many both have.
        is_beyond: whether it is more than chance.
    """

    gain: float
    seeds: int
    is_beyond: bool

    @property
    def side(self) -> str:
        """Where the first one ends, beside the second."""
        return "level" if not self.is_beyond else "above" if self.gain > 0 else "below"


def difference(mine: Mapping[int, float], others: Mapping[int, float], images: int) -> Difference | None:
    """Compare accuracies in percent by seed, each on so many images; ``None`` without a common seed.

    >>> difference({0: 91.0, 1: 92.0, 2: 93.0}, {0: 90.0, 1: 91.0, 2: 92.0}, images=500)
    Difference(gain=1.0, seeds=3, is_beyond=True)
    >>> difference({0: 91.0, 1: 92.0, 2: 95.0}, {0: 90.0, 1: 91.0, 2: 90.0}, images=500).side
    'level'
    """
    seeds = sorted(mine.keys() & others.keys())
    if not seeds:
        return None
    gains = [mine[seed] - others[seed] for seed in seeds]
    gain = statistics.mean(gains)
    if len(seeds) == 1:
        shares = [values[seeds[0]] / 100 for values in (mine, others)]
        error = 100 * math.sqrt(sum(share * (1 - share) for share in shares) / images)
        return Difference(gain, 1, abs(gain) > 2 * error)
    error = max(statistics.stdev(gains), 100 / images) / math.sqrt(len(seeds))
    return Difference(gain, len(seeds), 2 * float(stats.t.sf(abs(gain / error), len(seeds) - 1)) < LEVEL)
