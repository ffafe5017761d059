"""What a network costs by the clock."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_prune.errors import ConfigurationError
from lightning_prune.reports.silence import silence
from lightning_prune.reports.wording import first_line
from lightning_prune.structure.batches import resized
from lightning_prune.structure.replica import arguments, quiet_room, replica, uncompiled
from lightning_prune.structure.stopwatch import clock_of

VARIANTS = ("eager", "channels_last", "compiled")
"""How a network may be run: as it is; with the memory layout that many convolutions prefer; by ``torch.compile``."""

_LEAST_SAMPLES, _SAMPLES = 5, 25
_CUDA = "torch.utils.cpp_extension"  # complains about a missing device where nobody has asked for one

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass in evaluation mode; on one thread of the CPU that thread's own time.

    Args:
        median_ms: median, milliseconds per batch.
        iqr_ms: interquartile range, milliseconds per batch, of samples that average over a few passes.
        batch: samples in the batch.
        device: kind and name of the device.
        threads: threads that torch may use for one operator on the CPU.
        repeats: number of forward passes timed.
        variant: how the network was run, one of :data:`VARIANTS`.
    """

    median_ms: float
    iqr_ms: float
    batch: int
    device: str
    threads: int
    repeats: int
    variant: str = "eager"


def measure_latency(
    model: nn.Module,
    example_inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    batch: int = 1,
    variant: str = "eager",
    min_seconds: float = 0.2,
) -> Latency:
    """Time forward passes of a model in evaluation mode, without gradients; works on a copy, on the model's device.

    On one thread of the CPU only the time counts in which that thread runs, for other programs are no matter of the
    network. What ``torch.compile`` has wrapped is timed without it, so that no compilation is counted. With
    ``variant="compiled"`` the whole copy is compiled before the clock runs, which takes up to minutes.

    Args:
        model: any module.
        example_inputs: a tuple is the forward's positional arguments; anything else is its only one. Samples are
            repeated or left out to make a batch of the wanted size.
        kwargs: the forward's keyword arguments.
        batch: samples in the batch.
        variant: ``"eager"``, ``"channels_last"`` (weights and inputs of four dims in that memory layout) or
            ``"compiled"`` (by ``torch.compile``, for this batch size).
        min_seconds: how long to measure at least, after a warm-up.

    Raises:
        ConfigurationError: another variant, or ``"channels_last"`` for a model without weights of four dims.

    >>> latency = measure_latency(nn.Linear(8, 4), torch.zeros(2, 8), batch=16, min_seconds=0.01)
    >>> latency.batch, latency.median_ms > 0
    (16, True)
    """
    settings: Any = {"batch": batch, "variant": variant, "min_seconds": min_seconds}
    return compare_latency((model,), example_inputs, kwargs, **settings)[0]


def compare_latency(
    models: Sequence[nn.Module],
    example_inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    batch: int = 1,
    variant: str = "eager",
    min_seconds: float = 0.2,
) -> tuple[Latency, ...]:
    """As :func:`measure_latency`, of several models turn by turn: what else the machine does slows all of them.

    >>> dense, slim = compare_latency((nn.Linear(64, 64), nn.Linear(64, 8)), torch.zeros(2, 64), min_seconds=0.01)
    >>> dense.repeats >= 5, slim.repeats >= 5
    (True, True)
    """
    with silence(_CUDA):
        from torch.utils.benchmark import Timer
    inputs = resized(arguments(example_inputs, kwargs), batch)
    threads = torch.get_num_threads()
    timers = []
    for model in models:
        run, (args, named) = _as_variant(variant, uncompiled(replica(model)).eval(), inputs)
        names = {"run": run, "args": args, "named": named}
        own: Any = {"timer": time.thread_time} if clock_of(model) is time.thread_time else {}  # torch's waits for GPUs
        timers.append(Timer("run(*args, **named)", globals=names, num_threads=threads, **own))
    with quiet_room(), silence(_CUDA), silence("torch._dynamo"), silence("torch._inductor"):
        once = [timer.timeit(2).mean for timer in timers]
        samples = max(_LEAST_SAMPLES, min(_SAMPLES, int(min_seconds / max(once))))
        passes = [max(1, round(min_seconds / samples / each)) for each in once]
        turns = [
            [timer.timeit(each).mean * 1e3 for timer, each in zip(timers, passes, strict=True)] for _ in range(samples)
        ]
    found = []
    for model, times, each in zip(models, zip(*turns, strict=True), passes, strict=True):
        low, _, high = statistics.quantiles(times, n=4, method="inclusive")
        rest = batch, device_name(model), threads, each * samples, variant
        found.append(Latency(statistics.median(times), high - low, *rest))
    return tuple(found)


def race(
    dense: nn.Module,
    slim: nn.Module,
    example_inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    batches: Sequence[int],
    variants: Sequence[str],
) -> tuple[tuple[Latency, ...], tuple[Latency, ...], tuple[str, ...]]:
    """:func:`compare_latency` of two networks in every variant and at every batch size; what fails is said.

    Returns:
        Latencies of the dense network, those of the slim one, and a sentence for each failure.
    """
    before, after, missing = list[Latency](), list[Latency](), dict[str, None]()
    for variant in variants:
        for batch in batches:
            try:
                pair = compare_latency((dense, slim), example_inputs, kwargs, batch=batch, variant=variant)
            except Exception as error:  # of the network's code, of a compiler that isn't there, of too little memory
                which = "" if variant == "eager" else f" of the {variant} network"
                missing[f"Latency{which} could not be measured: {first_line(error)}."] = None
                continue
            before.append(pair[0])
            after.append(pair[1])
    return tuple(before), tuple(after), tuple(missing)


def fastest(taken: Sequence[Latency]) -> tuple[Latency, ...]:
    """One latency per batch size at which several variants were measured.

    It is that of the plainest variant whose median is no more than an interquartile range above the least.

    >>> taken = [Latency(ms, 0.1, 1, "cpu", 1, 40, name) for ms, name in ((2.0, "eager"), (1.0, "compiled"))]
    >>> [latency.variant for latency in fastest(taken)], fastest(taken[:1])
    (['compiled'], ())
    """
    found = []
    for batch in dict.fromkeys(latency.batch for latency in taken):
        own = [latency for latency in taken if latency.batch == batch]
        best = min(own, key=lambda latency: latency.median_ms)
        near = (each for each in own if each.median_ms <= best.median_ms + best.iqr_ms)
        found += [min(near, key=lambda latency: VARIANTS.index(latency.variant))] if len(own) > 1 else []
    return tuple(found)


def _as_variant(variant: str, network: nn.Module, inputs: Inputs) -> tuple[Any, Inputs]:
    """What to call, and with what."""
    if variant == "channels_last":
        if not any(parameter.dim() == 4 for parameter in network.parameters()):
            raise ConfigurationError("channels_last is a layout of weights of four dims, and the network has none.")
        network.to(memory_format=torch.channels_last)
        return network, pytree.tree_map(_channels_last, inputs)
    if variant == "compiled":
        return torch.compile(_alone(network), dynamic=False), inputs
    if variant != "eager":
        raise ConfigurationError(f"variant={variant!r} must be one of {', '.join(VARIANTS)}.")
    return network, inputs


def _channels_last(leaf: Any) -> Any:
    return leaf.contiguous(memory_format=torch.channels_last) if isinstance(leaf, Tensor) and leaf.dim() == 4 else leaf


def _alone(network: nn.Module) -> Any:
    """A function of its own around a network: what is compiled is kept per code, and user code should keep its own."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return network(*args, **kwargs)

    run.__code__ = run.__code__.replace()  # another object, though it says the same
    return run


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
