"""Latency of slim copies beside the dense network's, turn by turn."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from lightning_prune.errors import ConfigurationError
from lightning_prune.structure.batches import resized
from lightning_prune.structure.counting import slim
from lightning_prune.structure.graph import ChannelGraph
from lightning_prune.structure.replica import quiet_room, to_device, uncompiled

TURN = 0.01
"""Seconds that one turn lasts at least."""

LEAST = 5
"""Turns of each network, of whose times (or their ratios) the median counts."""

SURE = 0.01
"""Relative error of the median from which on no more turns are taken."""

FINE = 1e-5
"""Seconds that a clock's ticks are apart at most, for it to be of use."""

PATIENCE = 3.0
"""Seconds after which no more turns are taken either."""


class Stopwatch:
    """Times networks of other widths; a machine that is busy slows both of a pair, and the ratio stays.

    On one thread of the CPU only the time counts in which that thread runs: what else the machine does isn't in it.

    Args:
        graph: of the dense network, and one sample of its inputs.
        batch: samples in the batch.
        device: where to measure; ``None`` where the network is.

    Raises:
        ConfigurationError: there is no such device, or the network doesn't run on it with such a batch.
    """

    def __init__(self, graph: ChannelGraph, batch: int, device: str | None) -> None:
        self._graph, self._device, self._clock = graph, device, time.perf_counter
        try:
            self._network = self._ready({})
            self._inputs = to_device(resized(graph.inputs, batch), device)
            self._clock = clock_of(self._network)
            with quiet_room():
                once = max(self._turn(self._network, 2), 1e-6)
                self._passes = max(1, round(TURN / once))
                self.dense = 1e3 * steady(lambda: self._turn(self._network, self._passes))
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
            share = steady(lambda: self._turn(network, self._passes) / self._turn(self._network, self._passes))
        return self.dense * share

    def _ready(self, widths: Mapping[str, int]) -> nn.Module:
        return uncompiled(slim(self._graph, widths, self._device)).eval()

    def _turn(self, network: nn.Module, passes: int) -> float:
        args, kwargs = self._inputs
        network(*args, **kwargs)  # the caches hold what the other network has read
        return seconds(lambda: network(*args, **kwargs), passes, self._clock)


def steady(draw: Callable[[], float]) -> float:
    """The median of so many draws that it stands firm, or of as many as there is time for.

    >>> steady(lambda: 2.0)
    2.0
    """
    begin, found = time.perf_counter(), list[float]()
    while True:
        found.append(draw())
        if len(found) < LEAST:
            continue
        low, median, high = statistics.quantiles(found, n=4, method="inclusive")
        if high - low <= SURE * median * math.sqrt(len(found)) or time.perf_counter() - begin > PATIENCE:
            return median


def clock_of(network: nn.Module) -> Callable[[], float]:
    """What to time a network with: its own thread's time, where that thread does all the work, else the wall clock.

    >>> clock_of(nn.Linear(1, 1, device="meta")) is time.perf_counter
    True
    """
    tensor = next(chain(network.parameters(), network.buffers()), torch.empty(0))
    is_alone = tensor.device.type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time if is_alone and time.get_clock_info("thread_time").resolution < FINE else time.perf_counter


def seconds(work: Callable[[], Any], passes: int = 1, clock: Callable[[], float] = time.perf_counter) -> float:
    """Time of one pass, averaged over some, in seconds; a GPU is waited for."""
    _wait()
    begin = clock()
    for _ in range(passes):
        work()
    _wait()
    return (clock() - begin) / passes


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
