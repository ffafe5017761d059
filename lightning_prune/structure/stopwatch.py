"""Latency of slim copies beside the dense network's, turn by turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lightning_prune.errors import ConfigurationError
from lightning_prune.structure.batches import resized
from lightning_prune.structure.counting import slim
from lightning_prune.structure.graph import ChannelGraph
from lightning_prune.structure.replica import quiet_room, to_device, uncompiled

ROUNDS = 5, 11
"""Turns of each network, of which the median counts: the fewest, and as many as there is time for."""

TURN = 0.01
"""Seconds that one turn lasts at least."""

PATIENCE = 1.0
"""Seconds for all turns of one network, where they take no longer."""


class Stopwatch:
    """Times networks of other widths; a machine that is busy slows both of a pair, and the ratio stays.

    Args:
        graph: of the dense network, and one sample of its inputs.
        batch: samples in the batch.
        device: where to measure; ``None`` where the network is.

    Raises:
        ConfigurationError: there is no such device, or the network doesn't run on it with such a batch.
    """

    def __init__(self, graph: ChannelGraph, batch: int, device: str | None) -> None:
        self._graph, self._device = graph, device
        try:
            self._network = self._ready({})
            self._inputs = to_device(resized(graph.inputs, batch), device)
            with quiet_room():
                once = max(self._turn(self._network, 2), 1e-6)
                self._passes = max(1, round(TURN / once))
                self._rounds = min(max(ROUNDS[0], int(PATIENCE / (once * self._passes))), ROUNDS[1])
                self.dense = 1e3 * statistics.median(self._turn(self._network, self._passes) for _ in self._turns)
        except Exception as error:  # of the network's own code, or of a device that isn't there
            first = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
            where = device or "its own device"
            raise ConfigurationError(
                f"Latency can't be measured on {where} with a batch of {batch} ({first})."
            ) from error

    def time(self, widths: Mapping[str, int]) -> float:
        """Milliseconds of one forward pass with so many channels in each group."""
        network = self._ready(widths)
        with quiet_room():
            self._turn(network, 2)
            pairs = [(self._turn(network, self._passes), self._turn(self._network, self._passes)) for _ in self._turns]
        return self.dense * statistics.median(own / dense for own, dense in pairs)

    @property
    def _turns(self) -> range:
        return range(self._rounds)

    def _ready(self, widths: Mapping[str, int]) -> nn.Module:
        return uncompiled(slim(self._graph, widths, self._device)).eval()

    def _turn(self, network: nn.Module, passes: int) -> float:
        args, kwargs = self._inputs
        return seconds(lambda: network(*args, **kwargs), passes)


def seconds(work: Callable[[], Any], passes: int = 1) -> float:
    """Time of one pass, averaged over some, in seconds; a GPU is waited for."""
    _wait()
    begin = time.perf_counter()
    for _ in range(passes):
        work()
    _wait()
    return (time.perf_counter() - begin) / passes


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
