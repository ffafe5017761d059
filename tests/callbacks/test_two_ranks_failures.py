"""One of two ranks fails, wherever it may: both stop with one sentence, and nobody is left waiting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.callbacks.two_ranks_failures import FIRST_ONLY, POINTS

ROOT = Path(__file__).parents[2]


def test_a_rank_that_fails_takes_the_other_down(tmp_path: Path) -> None:
    """In tracing, scoring, clustering, the choice, its exchange, the plan, the proof, surgery and what follows it.

    The rank that fails raises what it met, the other one says which rank that was; a wait of 30 seconds would be a
    third kind of error.
    """
    command = [sys.executable, "-m", "tests.callbacks.two_ranks_failures", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    points = [(point, culprit) for point in POINTS for culprit in ((0,) if point in FIRST_ONLY else (0, 1))]
    points += [("reading", 0), ("reading", 1)]
    assert len(points) == 37
    for (point, culprit), first, second in zip(points, *said, strict=True):
        assert first[:2] == second[:2] == [point, culprit]
        own, other = (said[rank][points.index((point, culprit))][2] for rank in (culprit, 1 - culprit))
        cause = "SlimFileError" if point == "reading" else "BrokenError: It broke."
        assert own.startswith(cause), (point, own)
        assert other.startswith("PruningError: ") and f"failed on rank {culprit}: {cause}" in other, (point, other)
        assert "\n" not in other
