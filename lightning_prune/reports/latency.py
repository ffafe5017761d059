"""What a network costs by the clock."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_prune.reports.silence import silence
from lightning_prune.structure.batches import resized
from lightning_prune.structure.replica import arguments, quiet_room, replica, uncompiled

_LEAST_SAMPLES, _SAMPLES = 5, 25


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass in evaluation mode.

    Args:
        median_ms: median, milliseconds per batch.
        iqr_ms: interquartile range, milliseconds per batch, of samples that average over a few passes.
        batch: samples in the batch.
        device: kind and name of the device.
        threads: threads that torch may use for one operator on the CPU.
        repeats: number of forward passes timed.
    """

    median_ms: float
    iqr_ms: float
    batch: int
    device: str
    threads: int
    repeats: int


def measure_latency(
    model: nn.Module,
    example_inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    batch: int = 1,
    min_seconds: float = 0.2,
) -> Latency:
    """Time forward passes of a model in evaluation mode, without gradients; works on a copy, on the model's device.

    What ``torch.compile`` has wrapped is timed without it, so that no compilation is counted.

    Args:
        model: any module.
        example_inputs: a tuple is the forward's positional arguments; anything else is its only one. Samples are
            repeated or left out to make a batch of the wanted size.
        kwargs: the forward's keyword arguments.
        batch: samples in the batch.
        min_seconds: how long to measure at least, after a warm-up.

    >>> latency = measure_latency(nn.Linear(8, 4), torch.zeros(2, 8), batch=16, min_seconds=0.01)
    >>> latency.batch, latency.median_ms > 0
    (16, True)
    """
    with silence("torch.utils.cpp_extension"):  # its import may complain about a missing CUDA device
        from torch.utils.benchmark import Timer
    args, named = resized(arguments(example_inputs, kwargs), batch)
    network = uncompiled(replica(model)).eval()
    threads = torch.get_num_threads()
    timer = Timer(
        "network(*args, **named)", globals={"network": network, "args": args, "named": named}, num_threads=threads
    )
    with quiet_room():
        once = timer.timeit(2).mean
        samples = max(_LEAST_SAMPLES, min(_SAMPLES, int(min_seconds / once)))
        passes = max(1, round(min_seconds / samples / once))
        times = [timer.timeit(passes).mean * 1e3 for _ in range(samples)]
    quarters = statistics.quantiles(times, n=4, method="inclusive")
    spread = quarters[2] - quarters[0]
    return Latency(statistics.median(times), spread, batch, device_name(model), threads, passes * samples)


def device_name(model: nn.Module) -> str:
    """Kind and name of the device that the first parameter or buffer lies on.

    >>> device_name(nn.Linear(1, 1)).split()[0]
    'cpu'
    """
    tensor = next(chain(model.parameters(), model.buffers()), torch.empty(0))
    if tensor.device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(tensor.device)}"
    return f"cpu {_processor()}" if tensor.device.type == "cpu" else tensor.device.type


def _processor() -> str:
    table = Path("/proc/cpuinfo")
    lines = table.read_text(encoding="utf-8", errors="replace").splitlines() if table.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
