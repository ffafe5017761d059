"""Who may read what is written: whom the umask says, as of any file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_prune.reports import Cost, PruningReport, export, write_report
from lightning_prune.structure import choose, prune_, save_slim, trace

IMAGES = torch.zeros(2, 4)


def slim(path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    plan = choose(trace(model, IMAGES), ratio=0.5)
    prune_(model, plan)
    save_slim(model, path, plan)


def report(path: Path) -> None:
    write_report(PruningReport([("0", 8, 4)], Cost(800, 100), Cost(200, 30), versions={}), path)


def archive(path: Path) -> None:
    export(nn.Linear(4, 2), path, IMAGES, format="torch_export")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
@pytest.mark.parametrize("write", [slim, report, archive])
def test_files_are_for_whom_the_umask_says(
    write: Callable[[Path], None], umask: int, mode: int, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "file.json")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {mode}
