"""On two ranks the slim network learns what it learns on one, and a resumed run ends with the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.callbacks.slimming import assert_equal
from tests.callbacks.two_ranks_distilled import OPTIONS, train

ROOT = Path(__file__).parents[2]


@pytest.mark.filterwarnings(
    "ignore:Checkpoint directory",
    "ignore:The dirpath",
    "ignore:.*number of training batches",
    "ignore:The loss of this batch",
)
def test_two_ranks_are_one_and_resume(tmp_path: Path) -> None:
    alone = {option: train(tmp_path / "alone", 1, option)["weights"] for option in OPTIONS}
    command = [sys.executable, "-m", "tests.callbacks.two_ranks_distilled", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first.keys() == second.keys()
    for name, found in first.items():
        whole = first["norms" if "norms" in name else name if name in OPTIONS else "default"]
        assert len(found["weights"]) and len(found["teacher"])
        for part in ("weights", "teacher"):
            assert_equal(found[part], second[name][part])  # rank 0's running statistics, too
            assert_equal(found[part], whole[part])
    for option in OPTIONS:
        for name, value in first[option]["weights"].items():
            assert torch.allclose(value, alone[option][name], atol=1e-6), (option, name)
    # one per folder, and a second where another network's checkpoints lie
    files = [path.name for path in (tmp_path / "default").glob("*.safetensors")]
    assert sorted(files) == ["teacher-1.safetensors", "teacher.safetensors"]
    assert len(list((tmp_path / "static_graph").glob("*.safetensors"))) == 1
