"""Timing: what is timed, at which batch, and that it leaves no trace."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.errors import ConfigurationError
from lightning_prune.reports import compare_latency, measure_latency
from lightning_prune.reports.latency import VARIANTS
from tests.reports.untouched import untouched


class Recorder(nn.Module):
    """Remembers the shapes it was called with; copies of it write into the same list."""

    seen: set[tuple[int, ...]] = set()  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, images: Tensor, *, other: Tensor, table: Tensor, factor: float) -> Tensor:
        self.seen.add((len(images), len(other), len(table), self.training, torch.is_grad_enabled()))
        return self.linear(images) * factor


def test_the_batch_is_resized_and_the_rest_is_not() -> None:
    Recorder.seen.clear()
    kwargs = {"other": torch.zeros(2), "table": torch.zeros(7, 3), "factor": 2.0}
    latency = measure_latency(Recorder(), torch.randn(2, 3), kwargs, batch=5, min_seconds=0.01)
    assert Recorder.seen == {(5, 5, 7, False, False)}
    assert latency.batch == 5


def test_numbers_and_names_are_there() -> None:
    latency = measure_latency(nn.Linear(4, 4), torch.randn(1, 4), min_seconds=0.01)
    assert latency.median_ms > 0
    assert latency.iqr_ms >= 0
    assert latency.repeats >= 5
    assert latency.threads == torch.get_num_threads()
    assert latency.device.startswith("cpu ")


def test_more_work_takes_longer() -> None:
    small, large = (
        measure_latency(nn.Conv2d(8, width, 3), torch.randn(1, 8, 32, 32), batch=8, min_seconds=0.05)
        for width in (8, 512)
    )
    assert small.median_ms < large.median_ms


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_is_left_as_it_was(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU())
    images, strides = torch.randn(2, 3, 8, 8), model[0].weight.stride()
    with untouched(model):
        latency = measure_latency(model, images, batch=3, variant=variant, min_seconds=0.01)
    assert (latency.variant, latency.batch) == (variant, 3) and latency.median_ms > 0
    assert model[0].weight.stride() == strides and images.is_contiguous()


class Layouts(nn.Module):
    """Remembers how its weights and inputs lie in memory, and what it is called by."""

    seen: list[tuple[bool, bool, bool]] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        lies = [each.is_contiguous(memory_format=torch.channels_last) for each in (self.conv.weight, images)]
        self.seen.append((lies[0], lies[1], torch.compiler.is_compiling()))
        return self.conv(images)


def test_each_variant_is_what_it_is_called() -> None:
    for variant, expected in (("eager", (False, False, False)), ("channels_last", (True, True, False))):
        Layouts.seen.clear()
        measure_latency(Layouts(), torch.randn(2, 3, 8, 8), variant=variant, min_seconds=0.01)
        assert set(Layouts.seen) == {expected}


def test_what_is_compiled_is_the_whole_network_once_for_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """More often than torch compiles one piece of code, and without a trace in what the user compiles."""
    compiled: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(sum(node.op.startswith("call_") for node in graph.graph.nodes))
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    network = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 7))
    for batch in range(2, 14):
        measure_latency(network, torch.randn(2, 5), batch=batch, variant="compiled", min_seconds=0.001)
    assert compiled == [3] * 12


def test_variants_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="variant='fast' must be one of eager, channels_last, compiled"):
        measure_latency(nn.Linear(4, 4), torch.randn(1, 4), variant="fast")
    with pytest.raises(ConfigurationError, match="weights of four dims, and the network has none"):
        measure_latency(nn.Linear(4, 4), torch.randn(1, 4), variant="channels_last")


def test_several_models_take_turns() -> None:
    calls: list[int] = []

    class Named(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

        def forward(self, images: Tensor) -> Tensor:
            calls.append(self.number)
            return images

    found = compare_latency((Named(0), Named(1)), torch.randn(1, 4), min_seconds=0.001)
    turns = [number for number, before in zip(calls, [None, *calls], strict=False) if number != before]
    assert turns == [0, 1] * (len(turns) // 2) and len(turns) >= 2 * (1 + 5)
    assert [each.repeats >= 5 for each in found] == [True, True]
