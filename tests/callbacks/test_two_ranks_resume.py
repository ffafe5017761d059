"""On two ranks a resumed run ends where the uninterrupted one does, to the bit, whatever the method."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.callbacks.two_ranks_resume import CASES, MOMENTS

ROOT = Path(__file__).parents[2]


def test_every_method_resumes_on_two_ranks(tmp_path: Path) -> None:
    """Equal hashes of weights, optimiser state, weight averages, masks, clusters and schedules."""
    command = [sys.executable, "-m", "tests.callbacks.two_ranks_resume", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and list(first) == list(CASES)
    for case, ends in first.items():
        assert list(ends) == ["whole", *MOMENTS] and ends["whole"][0] == "done"
        for moment, end in ends.items():
            assert end == ends["whole"], (case, moment)
