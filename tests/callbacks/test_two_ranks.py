"""Several ranks decide alike, stay equal, and train as one rank does with the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.settings import EPOCHS, SETTINGS

ROOT = Path(__file__).parents[2]


def launch(folder: Path, strategy: str, devices: int) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.callbacks.two_ranks", str(folder), strategy, str(devices)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return [torch.load(folder / f"{strategy}-{devices}-{rank}.pt", weights_only=True) for rank in range(devices)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return launch(tmp_path_factory.mktemp("alone"), "auto", 1)[0]


@pytest.mark.parametrize(
    ("strategy", "devices"), [("ddp", 2), ("ddp_find_unused_parameters_true", 2), ("ddp", 4)], ids=str
)
def test_several_ranks_are_one(strategy: str, devices: int, alone: dict[str, Any], tmp_path: Path) -> None:
    first, *others = launch(tmp_path, strategy, devices)
    assert first["picked"] == alone["picked"]
    assert first["stopped"] == alone["stopped"] != {}
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(first["weights"], alone["weights"], strict=True))
    for other in others:
        assert (other["picked"], other["stopped"]) == (first["picked"], first["stopped"])
        assert all(torch.equal(a, b) for a, b in zip(first["weights"], other["weights"], strict=True))


def test_every_method_keeps_the_ranks_equal(tmp_path: Path) -> None:
    """After every epoch equal hashes of parameters, optimiser state, and of masks, clusters and schedules."""
    command = [sys.executable, "-m", "tests.callbacks.two_ranks_rows", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr[-3000:]
    first, second = (
        [json.loads(line) for line in (tmp_path / f"{rank}.jsonl").read_text().splitlines()] for rank in (0, 1)
    )
    assert [line["row"] for line in first] == list(SETTINGS)
    for one, other in zip(first, second, strict=True):
        assert one["phase"] == other["phase"] == "done" and len(one["found"]) == EPOCHS + 1
        assert one["found"] == other["found"], one["row"]
