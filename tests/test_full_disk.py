"""A disk that is full, a folder that can't be written: no part of a file under its final name, and training goes on."""

from __future__ import annotations

import errno
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_prune.callbacks.structural import StructuralPruning
from lightning_prune.errors import SlimFileError
from lightning_prune.reports.report import PruningReport
from lightning_prune.structure import choose, load_slim, prune_, save_slim, slim_file, trace
from tests.callbacks.nets import conv_net, seeded
from tests.callbacks.slimming import run


@contextmanager
def little_room(monkeypatch: pytest.MonkeyPatch, size: int = 300) -> Iterator[None]:
    """The kernel itself refuses to let any file of this process grow beyond a few bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


@contextmanager
def half_a_slim_file(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def half(tensors: Any, path: str, metadata: Any) -> None:
        Path(path).write_bytes(b"half of it")
        raise full()

    with monkeypatch.context() as patch:
        patch.setattr(slim_file, "save_file", half)
        yield


@contextmanager
def half_a_report(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The text comes to an end in the middle, as the file object that writes it finds out."""

    class File:
        def __init__(self, handle: int) -> None:
            self.file = open(handle, "w", encoding="utf-8")  # noqa: SIM115 - closed below

        def __enter__(self) -> File:
            return self

        def __exit__(self, *_: Any) -> None:
            self.file.close()

        def write(self, text: str) -> None:
            self.file.write(text[: len(text) // 2])
            self.file.flush()
            raise full()

    with monkeypatch.context() as patch:
        patch.setattr("lightning_prune.reports.report.os.fdopen", lambda handle, *_, **__: File(handle))
        yield


def slim() -> tuple[Any, Any]:
    net = seeded(conv_net)
    plan = choose(trace(net, torch.zeros(2, 3, 6, 6)))
    prune_(net, plan)
    return net, plan


@pytest.mark.parametrize("fault", [half_a_slim_file, little_room])
def test_half_a_slim_file_has_no_name(fault: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, plan = slim()
    path = tmp_path / "slim.safetensors"
    with pytest.raises(SlimFileError, match="The slim file can't be written to") as caught, fault(monkeypatch):
        save_slim(net, path, plan)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []
    save_slim(net, path, plan, number=1)
    before = path.read_bytes()
    with pytest.raises(SlimFileError), fault(monkeypatch):
        save_slim(net, path, plan, number=2)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    fresh = seeded(conv_net, seed=1)
    load_slim(path, fresh)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), net.parameters(), strict=True))


def test_a_slim_file_in_a_folder_that_takes_none(tmp_path: Path) -> None:
    net, plan = slim()
    (tmp_path / "taken").write_text("")
    for path in (tmp_path / "none" / "slim", tmp_path / "taken" / "slim"):
        with pytest.raises(SlimFileError, match="can't be written"):
            save_slim(net, path, plan)


@pytest.mark.parametrize("fault", [half_a_report, little_room])
def test_training_goes_on_without_a_report(fault: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning, however often it would have been written; nothing lies in the folder but what belongs there."""
    whole = PruningReport.write

    def write(report: PruningReport, path: Any) -> None:
        with fault(monkeypatch):
            whole(report, path)

    monkeypatch.setattr(PruningReport, "write", write)
    surgery = StructuralPruning(monitor="val_acc", latency_batches=())
    with pytest.warns(UserWarning, match="can't be written") as caught:
        result = run(tmp_path, surgery=surgery, logger=CSVLogger(tmp_path))
    assert sum("can't be written" in str(warning.message) for warning in caught) == 1
    assert result.watch.widths[-1] == 4 and result.trainer.state.finished
    assert [path for path in tmp_path.rglob("*") if "report" in path.name] == []
    assert surgery.report is not None and surgery.report.accuracy["finetuned"] is not None


@pytest.mark.parametrize("fault", [half_a_report, little_room])
def test_the_last_whole_report_stays(fault: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, calls = PruningReport.write, []

    def write(report: PruningReport, path: Any) -> None:
        calls.append(path)
        if len(calls) < 2:
            whole(report, path)
        else:
            with fault(monkeypatch):
                whole(report, path)

    monkeypatch.setattr(PruningReport, "write", write)
    surgery = StructuralPruning(monitor="val_acc", latency_batches=())
    with pytest.warns(UserWarning, match="can't be written"):
        run(tmp_path, surgery=surgery)
    assert len(calls) > 2
    assert json.loads((tmp_path / "report.json").read_text())["accuracy"]["finetuned"] is None
    assert sorted(path.name for path in tmp_path.iterdir() if "report" in path.name) == ["report.html", "report.json"]
