"""Killed at any moment, resumed from the last checkpoint: the same losses and the same weights, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.callbacks.nets import OPTIMIZERS, seeded
from tests.settings import SETTINGS

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("LIGHTNING_PRUNE_KILLS", "3"))
"""Per method; 20 in the long suite, which takes every row of the settings with either optimiser."""

SHORT = [("ascp", "sgd"), ("greg1", "sgd"), ("greg2", "adamw"), ("magnitude in steps", "adamw")]
SHORT += [("mask_sparsity", "sgd"), ("tpp", "adamw")]
ROWS = SHORT if KILLS <= 3 else [(row, optimizer) for row in SETTINGS for optimizer in OPTIMIZERS]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are children of one process, by fork")
@pytest.mark.parametrize(("row", "optimizer"), ROWS)
def test_a_run_that_is_killed_ends_like_one_that_is_not(row: str, optimizer: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.callbacks.kills", str(tmp_path), row, optimizer, str(KILLS), "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    deaths = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(deaths) == KILLS and {death["signal"] for death in deaths} == {signal.SIGKILL}
    whole, killed = (torch.load(tmp_path / name / "end.pt", weights_only=True) for name in ("whole", "killed"))
    assert killed["losses"] == whole["losses"]
    assert killed["weights"].keys() == whole["weights"].keys()
    assert all(torch.equal(killed["weights"][name], value) for name, value in whole["weights"].items())
    dense = seeded(SETTINGS[row].net).get_parameter("0.weight")
    assert whole["weights"]["net.0.weight"].count_nonzero() == dense.numel() // 2
