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

from tests.callbacks.two_ranks_rows import METHODS, OPTIONS, train
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


def run_rows(folder: Path, devices: int) -> list[list[dict[str, Any]]]:
    """What every rank has noted, line by line."""
    command = [sys.executable, "-m", "tests.callbacks.two_ranks_rows", str(folder), str(devices)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(devices)]


def assert_equal_hashes(ranks: list[list[dict[str, Any]]]) -> None:
    for first, *others in zip(*ranks, strict=True):
        assert first["phase"] == "done" and len(first["found"]) == EPOCHS + 1
        assert len({tuple(epoch) for epoch in first["found"]}) == EPOCHS + 1  # hashes that never change say nothing
        for other in others:
            assert other == first


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("rows")
    return folder, run_rows(folder, 2)


def test_every_method_keeps_two_ranks_equal(both: Any) -> None:
    """After every epoch equal hashes of parameters, optimiser state, and of masks, clusters and schedules.

    Every row of the settings, and every method with each of DDP's options; SGD and AdamW take turns.
    """
    ranks = [[line for line in lines if "row" in line] for lines in both[1]]
    assert {line["row"] for line in ranks[0]} == set(SETTINGS)
    assert {(line["row"], line["option"]) for line in ranks[0]} >= {(row, o) for row in METHODS for o in OPTIONS}
    assert_equal_hashes(ranks)


def test_every_method_keeps_four_ranks_equal(tmp_path: Path) -> None:
    ranks = run_rows(tmp_path, 4)
    assert [line["row"] for line in ranks[0]] == METHODS and {line["option"] for line in ranks[0]} == set(OPTIONS)
    assert_equal_hashes(ranks)


def test_the_penalty_is_not_multiplied_by_the_number_of_ranks(both: Any) -> None:
    """Where the loss has no gradient, what reaches the optimiser is the penalty's gradient, once: bit for bit."""
    for lines in both[1]:
        found = [line for line in lines if "alone" in line]
        assert [line["alone"] for line in found] == [row for row in METHODS for _ in range(2)]
        for line in found:
            assert set(line["apart"]) <= {0.0}, line
            assert bool(line["apart"]) == (line["alone"] != "magnitude")
            assert line["alone"] == "magnitude" or max(line["largest"]) > 1e-4


@pytest.mark.filterwarnings("ignore:.*energy was left")
@pytest.mark.parametrize("row", METHODS)
def test_two_ranks_equal_one_process(row: str, both: Any) -> None:
    """With a network whose norms look at one sample each: the same global batches, the same surgery, in doubles."""
    alone = train(row, 1)
    for rank in (0, 1):
        found = torch.load(both[0] / f"{rank}.pt", weights_only=True)[row]
        assert found["plan"] == alone["plan"] != ""
        for name in ("weights", "momenta"):
            for mine, theirs in zip(alone[name], found[name], strict=True):
                assert mine.dtype == torch.float64 and torch.allclose(mine, theirs, rtol=0, atol=1e-12)
