"""Running statistics of batch normalisation, taken anew from batches that training has seen."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_prune.callbacks.ranks import agreed
from lightning_prune.structure.batches import sample_count
from lightning_prune.structure.replica import quiet_room, to_device, unheard

Call = tuple[tuple[Any, ...], dict[str, Any]]


class RecentCalls:
    """The latest calls of a network, as many as hold a number of samples.

    Args:
        samples: how many at most, but always one call; 0 keeps none.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self._calls: deque[tuple[int, Call]] = deque()

    def keep(self, call: Call | None) -> None:
        """Remember one call; the oldest are dropped, and the latest one is not taken twice."""
        if call is None or self.samples == 0 or (self._calls and self._calls[-1][1] is call):
            return
        self._calls.append((_count(call), call))
        while len(self._calls) > 1 and sum(count for count, _ in self._calls) > self.samples:
            self._calls.popleft()

    def plain(self) -> list[Any]:
        """The calls on the CPU, for a checkpoint; none of them where one holds what torch doesn't load safely."""
        calls = [to_device(list(call), "cpu") for _, call in self._calls]
        return calls if _is_plain(calls) else []

    def restore(self, calls: list[Any], device: torch.device) -> None:
        """Remember what :meth:`plain` gave."""
        self.clear()
        for args, kwargs in calls:
            self.keep((to_device(tuple(args), device), to_device(kwargs, device)))

    def clear(self) -> None:
        """Let go of all of them."""
        self._calls.clear()

    def __iter__(self) -> Iterator[tuple[int, Call]]:
        return iter(self._calls)

    def __len__(self) -> int:
        return len(self._calls)


@torch.no_grad()
def recalibrate_(trainer: Trainer, network: nn.Module, calls: RecentCalls) -> None:
    """Set running means and variances to their averages over the given calls; rank 0's count on every rank.

    The norms run as in training, everything else as in evaluation, random numbers stay where they are. Norms that
    are held in evaluation mode or keep no statistics are left alone.

    Args:
        trainer: gives precision and ranks.
        network: in training.
        calls: of the same network; none at all changes nothing.
    """
    norms = {name: norm for name, norm in network.named_modules() if _counts(norm)}
    if norms and len(calls):
        everybodys = agreed(trainer, lambda: _statistics(trainer, network, norms, calls), "Recalibration")
        for name, norm in norms.items():
            for buffer, value in zip(_buffers(norm), everybodys[name], strict=True):
                buffer.copy_(value)


def _statistics(
    trainer: Trainer, network: nn.Module, norms: dict[str, nn.Module], calls: RecentCalls
) -> dict[str, list[Tensor]]:
    """Averages over the calls, in double precision, so that equal batches give equal numbers however many they are."""
    sums: dict[str, list[Tensor]] = {}
    with _observing(network, norms), quiet_room(), _as_written(), trainer.precision_plugin.forward_context():
        for count, (args, kwargs) in calls:
            network(*args, **kwargs)
            for name, norm in norms.items():
                parts = [buffer.detach().cpu().double() * count for buffer in _buffers(norm)]
                sums[name] = [one + two for one, two in zip(sums[name], parts, strict=True)] if name in sums else parts
    total = sum(count for count, _ in calls)
    return {name: [value / total for value in values] for name, values in sums.items()}


@contextmanager
def _observing(network: nn.Module, norms: dict[str, nn.Module]) -> Iterator[None]:
    """Running statistics are those of the last batch alone, and nothing is logged; afterwards all is as it was."""
    speakers = [vars(module) for module in network.modules() if isinstance(module, LightningModule)]
    spoken = [{name: value for name, value in speaker.items() if name == "log"} for speaker in speakers]
    modes = {module: module.training for module in network.modules()}
    before = {
        norm: (norm.momentum, [buffer.clone() for buffer in norm.buffers(recurse=False)]) for norm in norms.values()
    }
    network.eval()
    for speaker in speakers:
        speaker["log"] = unheard  # hides the method
    for norm in norms.values():
        norm.train()
        norm.momentum = 1.0  # type: ignore[assignment]  # a norm, whose momentum is a number
    try:
        yield
    finally:
        for norm, (momentum, buffers) in before.items():
            norm.momentum = momentum
            for buffer, value in zip(norm.buffers(recurse=False), buffers, strict=True):
                buffer.copy_(value)
        for speaker, own in zip(speakers, spoken, strict=True):
            del speaker["log"]  # the method is seen again, unless the module had something of its own there
            speaker.update(own)
        for module, mode in modes.items():
            module.training = mode


def _as_written() -> AbstractContextManager[Any]:
    """Without compiling a network anew for a few passes."""
    return torch.compiler.set_stance("force_eager") if hasattr(torch.compiler, "set_stance") else nullcontext()


def _counts(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) and module.running_mean is not None and module.training


def _buffers(norm: nn.Module) -> tuple[Tensor, Tensor]:
    return norm.running_mean, norm.running_var  # type: ignore[return-value]  # a norm that keeps statistics


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return type(value) is dict and all(map(_is_plain, (*value.keys(), *value.values())))
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple) and all(map(_is_plain, value))
    return value is None or type(value) in (Tensor, bool, int, float, str)


def _count(call: Call) -> int:
    """Samples of one call; one that says nothing of them counts as one."""
    found = sample_count(call)
    return 1 if found is None else found
