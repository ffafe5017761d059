"""A budget instead of a ratio: what is asked for, and what came of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lightning_prune.door import is_number, record, text
from lightning_prune.errors import ConfigurationError

QUANTITIES = {"macs": "MACs", "params": "parameters", "latency_ms": "latency"}
"""What a budget can be of -> its name in a sentence."""

SUFFIXES = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}

ENOUGH = 0.99
"""Share of a budget of MACs or parameters from which on nothing is given back any more."""

MARGIN = 0.95
"""Share of a budget of latency that is near enough: clocks don't tell more."""


@dataclass(frozen=True)
class Budget:
    """What may be left of a network; exactly one of the first three is given.

    Args:
        macs: multiply-adds of one sample: the share that is kept, in ``(0, 1)``, or a count (``4_200_000``, ``"4.2M"``;
            k, M, G and T are thousands, millions and so on).
        params: parameters, likewise.
        latency_ms: milliseconds of one forward pass in evaluation mode, measured.
        batch: samples in the batch whose latency counts.
        device: on which latency is measured, as torch names it; ``None`` where the network is.
        cap: largest share of any layer's channels that may go, in ``(0, 1]``.

    Raises:
        ConfigurationError: none or several of them are given, or a value is out of its range.

    >>> Budget(params="300k").wanted(dense=1_000_000), Budget(macs=0.25).wanted(dense=1_000_000)
    (300000.0, 250000.0)
    """

    macs: int | float | str | None = None
    params: int | float | str | None = None
    latency_ms: float | None = None
    batch: int = 1
    device: str | None = None
    cap: float = 1.0

    def __post_init__(self) -> None:
        given = [name for name in QUANTITIES if getattr(self, name) is not None]
        if len(given) != 1:
            found = f", not {' and '.join(given)}" if given else ""
            raise ConfigurationError(f"A budget has exactly one of macs, params and latency_ms{found}.")
        if self.quantity == "latency_ms":
            if not is_number(self.latency_ms) or not 0 < float(self.latency_ms or 0) < float("inf"):
                raise ConfigurationError(f"budget latency_ms={self.latency_ms!r} must be a positive number.")
        else:
            _count_of(self.quantity, getattr(self, self.quantity))
            if (self.batch, self.device) != (1, None):
                raise ConfigurationError(
                    f"budget batch and device belong to latency_ms; leave them out beside {self.quantity}."
                )
        if type(self.batch) is not int or self.batch < 1:
            raise ConfigurationError(f"budget batch={self.batch!r} must be a whole number of at least 1.")
        if not is_number(self.cap) or not 0 < self.cap <= 1:
            raise ConfigurationError(f"budget cap={self.cap!r} must lie in (0, 1].")
        text("budget device", self.device)
        if self.device is not None:
            try:
                torch.device(self.device)
            except (RuntimeError, TypeError) as error:
                raise ConfigurationError(
                    f"budget device={self.device!r} is none that torch knows; write 'cpu' or 'cuda'."
                ) from error

    @classmethod
    def of(cls, value: Budget | Mapping[str, Any] | None) -> Budget | None:
        """A budget from its fields by name, as users write it; ``None`` stays ``None``.

        >>> Budget.of({"macs": 0.5}) == Budget(macs=0.5)
        True
        """
        return record(cls, "budget", value, example={"macs": 0.5})

    @property
    def quantity(self) -> str:
        """One of :data:`QUANTITIES`."""
        return next(name for name in QUANTITIES if getattr(self, name) is not None)

    @property
    def enough(self) -> float:
        """Share of the budget that has to be used where it can be."""
        return MARGIN if self.quantity == "latency_ms" else ENOUGH

    def wanted(self, dense: float) -> float:
        """What may be left at most, where a dense network has so much."""
        value = getattr(self, self.quantity)
        if self.quantity == "latency_ms":
            return float(value)
        count = _count_of(self.quantity, value)
        return count * dense if count < 1 else count

    def __str__(self) -> str:
        name = self.quantity
        return f"budget {name}={getattr(self, name)}"


@dataclass(frozen=True)
class Outcome:
    """What a budget asked for and what is left, of the whole network.

    Args:
        quantity: ``"macs"``, ``"params"`` or ``"latency_ms"``.
        asked: what may be left at most: MACs per sample, parameters, or milliseconds per batch.
        reached: what is left.
        dense: what there was.

    >>> print(Outcome("macs", asked=500, reached=498, dense=1000))
    budget: 0.500 of MACs, reached 0.498
    >>> print(Outcome("latency_ms", asked=4.0, reached=3.9, dense=7.0))
    budget: 4 ms of latency, reached 3.9 ms
    """

    quantity: str
    asked: float
    reached: float
    dense: float

    def __str__(self) -> str:
        name = QUANTITIES[self.quantity]
        if self.quantity == "latency_ms":
            return f"budget: {self.asked:.4g} ms of {name}, reached {self.reached:.4g} ms"
        asked, reached = self.asked / self.dense, self.reached / self.dense
        digits = next((n for n in (3, 4, 5) if f"{asked:.{n}f}" != f"{reached:.{n}f}" or asked == reached), 6)
        return f"budget: {asked:.{digits}f} of {name}, reached {reached:.{digits}f}"


def _count_of(name: str, value: Any) -> float:
    """A share in (0, 1), or a whole number above 1."""
    number = value
    if isinstance(value, str):
        parts = re.fullmatch(r"\s*(\d[\d_]*(?:\.\d+)?|\.\d+)\s*([kMGT]?)\s*", value)
        number = float(parts[1].replace("_", "")) * SUFFIXES.get(parts[2], 1) if parts else None
    is_share = is_number(number) and 0 < number < 1
    is_count = is_number(number) and 1 < number < float("inf") and abs(number - round(number)) < 1e-6 * number
    if not (is_share or is_count):
        raise ConfigurationError(
            f"budget {name}={value!r} must be the share that is kept, in (0, 1), or a whole count such as 2_000_000 or"
            " '2.0M' (with k, M, G or T)."
        )
    return float(number) if is_share else float(round(number))
