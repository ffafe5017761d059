"""Batches of another size."""

from __future__ import annotations

import pytest
import torch

from lightning_prune.errors import ConfigurationError
from lightning_prune.structure.batches import resized


def test_fewer_and_more_samples() -> None:
    batch = {"x": torch.arange(3.0).view(3, 1), "n": 3, "scalar": torch.tensor(4.0)}
    assert resized(batch, 2)["x"].flatten().tolist() == [0, 1]
    assert resized(batch, 7)["x"].flatten().tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert resized(batch, 7)["n"] == 3
    assert resized(batch, 7)["scalar"] is batch["scalar"]


def test_without_tensors_nothing_changes() -> None:
    assert resized(("a", 1), 4) == ("a", 1)


@pytest.mark.parametrize(("samples", "size"), [(3, 0), (0, 3)])
def test_impossible_batches_are_refused(samples: int, size: int) -> None:
    with pytest.raises(ConfigurationError, match=r"at least (1|one)"):
        resized(torch.zeros(samples, 2), size)
