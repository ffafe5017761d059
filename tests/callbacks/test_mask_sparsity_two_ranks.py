"""Two ranks agree on a MACs target, on where to set out from, and on what is folded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def test_two_ranks_agree(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.callbacks.two_ranks_mask", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["removals"] == second["removals"] and len(first["removals"]) == 1
    for mine, theirs in zip(first["states"], second["states"], strict=True):
        assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    assert first["states"][3]["0.weight"].shape[0] < 8
    assert "ConfigurationError: budget macs=0.001 can't be reached" in first["errors"][0]
    assert "failed on rank 0: ConfigurationError: budget macs=0.001 can't be reached" in second["errors"][0]
