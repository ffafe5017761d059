"""Timing: what is timed, at which batch, and that it leaves no trace."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_prune.reports import measure_latency
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


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU())
    images = torch.randn(2, 3, 8, 8)
    with untouched(model):
        measure_latency(model, images, batch=3, min_seconds=0.01)
