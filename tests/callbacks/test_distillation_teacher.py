"""Where the teacher comes from, what knows of it, and where it is after a resume."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file, save_file

from lightning_prune import GReg1, LoadPruned, Magnitude, save_slim
from lightning_prune.callbacks.distillation import Distillation
from lightning_prune.callbacks.structural import StructuralPruning
from lightning_prune.callbacks.teacher import FILE
from lightning_prune.cli import main
from lightning_prune.errors import ConfigurationError, PruningError
from lightning_prune.reports.files import read_report
from lightning_prune.reports.report import PruningReport
from tests.callbacks.distilling import ASKED, distilled, surgeon
from tests.callbacks.nets import image_loader, seeded
from tests.callbacks.slimming import BATCHES, Picker, Residual, Task, assert_equal, run, weights
from tests.callbacks.test_checkpointing import Resumable
from tests.callbacks.test_leaks import hooks

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory", "ignore:.*callbacks used to create", "ignore:The dirpath"
)


class Begins(Callback):
    """The network's state right before the first batch of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            self.state = weights(pl_module)


def test_the_teacher_is_the_network_as_the_sparse_stage_begins(tmp_path: Path) -> None:
    """Running statistics too; the earliest of several stages counts. It is written once, beside the checkpoints."""
    begins, picker = Begins(1), Picker(start=1, epochs=1)
    done = distilled(tmp_path, begins, picker=picker)
    assert sorted(path.name for path in (tmp_path / "kept").glob("*.safetensors")) == [FILE]
    assert_equal(begins.state, load_file(tmp_path / "kept" / FILE))
    twin = done.surgery._distiller._teacher.network
    assert twin is not None and not twin.training
    assert_equal(begins.state, weights(twin))
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    assert done.surgery.report is not None and done.surgery.report.distilled is not None
    assert done.surgery.report.distilled.teacher == "the dense network as of epoch 1"


class Registered(Callback):
    """What the module, the optimiser and the device hold while the finetune stage runs."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.names = list(pl_module.state_dict())
        self.modules = len(list(pl_module.modules()))
        held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
        self.held = sum(parameter.numel() for parameter in held)


def test_nobody_else_knows_the_teacher(tmp_path: Path) -> None:
    """It is no part of module, optimiser, checkpoint or report; and no hook stays on the module."""
    seen = {}
    for asked in (None, ASKED):
        registered, folder = Registered(), tmp_path / str(asked is None)
        task = seeded(Task)
        before = hooks(task)
        done = distilled(folder, registered, task=task, surgery=surgeon(distill=asked))
        assert hooks(task) == before
        stored = torch.load(folder / "kept" / "epoch=3.ckpt", weights_only=True)
        report = done.surgery.report
        assert report is not None
        found = registered.names, registered.modules, registered.held
        seen[asked is None] = (found, list(stored["state_dict"]), report.cost_after, report.bytes_after)
        assert (folder / "kept" / FILE).exists() is (asked is not None)
    assert seen[True] == seen[False]


def test_the_teacher_is_on_the_cpu_and_weights_alone_until_surgery(tmp_path: Path) -> None:
    class Looks(Callback):
        def __init__(self) -> None:
            self.found: list[bool] = []

        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, index: int) -> None:
            teacher = surgery._distiller._teacher
            self.found.append(teacher.network is None)
            held = {} if teacher._weights is None else teacher._weights
            assert all(value.device.type == "cpu" for value in held.values())
            assert not surgery._distiller._calls and surgery._distiller._call is None

    surgery = surgeon()
    distilled(tmp_path, looks := Looks(), surgery=surgery)
    assert looks.found == [True] * 2 * BATCHES + [False] * 2 * BATCHES


# Resume.


@pytest.mark.parametrize("path", [None, "dense.pt"])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_resumed_run_ends_with_the_same_bits(path: str | None, epoch: int, tmp_path: Path) -> None:
    """From before the sparse stage, from within it, and from the finetune stage; in another folder."""

    def surgery() -> StructuralPruning:
        return surgeon(teacher=path and str(tmp_path / path))

    torch.save(seeded(Residual, seed=5).state_dict(), tmp_path / "dense.pt")
    arguments: Any = {"picker": Picker(start=1, epochs=1)}
    full = distilled(tmp_path / "full", surgery=surgery(), **arguments)
    start = tmp_path / "full" / "kept" / f"epoch={epoch}.ckpt"
    arguments = {"picker": Picker(start=1, epochs=1), "task": seeded(Task, seed=7)}
    again = distilled(tmp_path / "again", surgery=surgery(), ckpt_path=start, **arguments)
    assert_equal(weights(full.task), weights(again.task))
    both = [load_file(tmp_path / name / "kept" / FILE) for name in ("full", "again")]
    assert_equal(*both)
    assert full.surgery.report is not None and again.surgery.report is not None
    assert full.surgery.report.distilled == again.surgery.report.distilled


def test_it_resumes_at_every_step(tmp_path: Path) -> None:
    """The sparse stage begins with step 6 and the finetune stage with step 12."""
    keeper = ModelCheckpoint(tmp_path / "steps", "{step}", save_top_k=-1, every_n_train_steps=1)
    settings: Any = {"picker": Picker(start=1, epochs=1), "train": Resumable()}
    full = run(tmp_path, keeper, surgery=surgeon(), enable_checkpointing=True, **settings)
    for step in (1, 5, 7, 8, 11, 13, 16, 19):
        settings = {"picker": Picker(start=1, epochs=1), "train": Resumable(), "task": seeded(Task, seed=7)}
        again = run(tmp_path, surgery=surgeon(), ckpt_path=tmp_path / "steps" / f"step={step}.ckpt", **settings)
        assert_equal(weights(full.task), weights(again.task))


@pytest.mark.filterwarnings("ignore:.*energy was left", "ignore:.*too few optimiser steps")
def test_a_stage_that_has_begun_once_is_not_the_teacher(tmp_path: Path) -> None:
    """A resume within the sparse stage reads the file; the network of that moment is another one."""
    full = distilled(tmp_path / "full", picker=GReg1(0.5, epochs=2))
    start = tmp_path / "full" / "kept" / "epoch=0.ckpt"
    again = distilled(tmp_path / "again", picker=GReg1(0.5, epochs=2), task=seeded(Task, seed=7), ckpt_path=start)
    assert_equal(weights(full.task), weights(again.task))


def moved(folder: Path) -> Path:
    """A run whose checkpoints were taken elsewhere afterwards; the first folder is gone."""
    distilled(folder / "first")
    shutil.move(folder / "first" / "kept", folder / "elsewhere")
    shutil.rmtree(folder / "first")
    return folder / "elsewhere"


@pytest.mark.parametrize("epoch", [1, 2])
def test_checkpoints_move_with_their_teacher(epoch: int, tmp_path: Path) -> None:
    elsewhere = moved(tmp_path)
    distilled(tmp_path / "again", task=seeded(Task, seed=7), ckpt_path=elsewhere / f"epoch={epoch}.ckpt")
    assert_equal(load_file(elsewhere / FILE), load_file(tmp_path / "again" / "kept" / FILE))


@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("fault", ["missing", "another"])
def test_without_its_teacher_a_run_does_not_go_on(epoch: int, fault: str, tmp_path: Path) -> None:
    elsewhere = moved(tmp_path)
    known = load_file(elsewhere / FILE)
    (elsewhere / FILE).unlink()
    if fault == "another":
        save_file({**known, "net.head.bias": known["net.head.bias"] + 1}, elsewhere / FILE)
    start = elsewhere / f"epoch={epoch}.ckpt"
    with pytest.raises(ConfigurationError, match=r"teacher.safetensors' with SHA-256 .* neither beside the checkpoint"):
        distilled(tmp_path / "again", task=seeded(Task, seed=7), ckpt_path=start)
    save_file(known, tmp_path / "given.safetensors")
    given = surgeon(teacher=tmp_path / "given.safetensors")
    again = distilled(tmp_path / "again", task=seeded(Task, seed=7), ckpt_path=start, surgery=given)
    whole = distilled(tmp_path / "whole")
    assert_equal(weights(whole.task), weights(again.task))


def test_a_foreign_file_stays(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / FILE).write_bytes(b"somebody else's")
    first = distilled(tmp_path)
    assert (tmp_path / "kept" / FILE).read_bytes() == b"somebody else's"
    second = distilled(tmp_path, task=seeded(Task, seed=7), ckpt_path=tmp_path / "kept" / "epoch=2.ckpt")
    assert_equal(weights(first.task), weights(second.task))
    assert [path.name for path in sorted((tmp_path / "kept").glob("*.safetensors"))] == [
        "teacher-1.safetensors",
        "teacher.safetensors",
    ]


def test_a_checkpoint_of_a_run_without_distillation(tmp_path: Path) -> None:
    """Before the sparse stage the teacher is still to be had, later only from a file."""
    arguments: Any = {"picker": Picker(start=1, epochs=1)}
    distilled(tmp_path / "plain", surgery=surgeon(distill=None), **arguments)
    kept, asked = tmp_path / "plain" / "kept", {"task": seeded(Task, seed=7), "picker": Picker(start=1, epochs=1)}
    distilled(tmp_path / "early", ckpt_path=kept / "epoch=0.ckpt", **asked)
    for epoch in (1, 2):
        asked = {"task": seeded(Task, seed=7), "picker": Picker(start=1, epochs=1)}
        with pytest.raises(ConfigurationError, match="knows no teacher"):
            distilled(tmp_path / "late", ckpt_path=kept / f"epoch={epoch}.ckpt", **asked)
        asked = {"task": seeded(Task, seed=7), "picker": Picker(start=1, epochs=1)}
        given = surgeon(teacher=kept / "epoch=0.ckpt")
        late = distilled(tmp_path / "late", ckpt_path=kept / f"epoch={epoch}.ckpt", surgery=given, **asked)
        known = torch.load(kept / "epoch=0.ckpt", weights_only=True)["state_dict"]
        assert_equal(known, load_file(tmp_path / "late" / "kept" / FILE))
        assert late.surgery.finished


def test_a_full_disk_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> str:
        raise OSError("no space left")

    monkeypatch.setattr("lightning_prune.callbacks.teacher._write", full)
    with pytest.warns(UserWarning, match="teacher can't be written .*no space left"):
        done = distilled(tmp_path)
    assert done.surgery.finished
    with pytest.raises(ConfigurationError, match="neither beside the checkpoint"):
        distilled(tmp_path, task=seeded(Task), ckpt_path=tmp_path / "kept" / "epoch=2.ckpt")


def test_checkpoints_in_a_cloud(tmp_path: Path) -> None:
    """Any file system that Lightning writes checkpoints to."""
    from lightning_prune.callbacks.teacher import _found, _is_it, _write
    from lightning_prune.structure.weight_file import digest_of

    folder, digest = "memory://run/kept", digest_of(b"weights")
    assert [_write(folder, b"weights", digest) for _ in range(2)] == [FILE, FILE]
    assert _write(folder, b"others", digest_of(b"others")) == "teacher-1.safetensors"
    assert _is_it(f"{folder}/{FILE}", digest) and not _is_it(f"{folder}/nothing", digest)
    assert _found({"file": FILE, "digest": digest}, [str(tmp_path), folder]) == b"weights"
    assert _found({"file": None, "digest": digest}, [folder]) is None


# A teacher from a file.


@pytest.mark.parametrize("kind", ["ckpt", "pt", "safetensors"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_teacher_from_a_file(kind: str, whole: bool, tmp_path: Path) -> None:
    """Of the LightningModule, or of the network in it."""
    known = seeded(Task, seed=5)
    state = known.state_dict() if whole else known.net.state_dict()
    path = tmp_path / f"dense.{kind}"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 1} if kind == "ckpt" else state, path)
    done = distilled(tmp_path, surgery=surgeon(teacher=path))
    twin = done.surgery._distiller._teacher.network
    assert twin is not None
    assert_equal(known.net.state_dict(), twin.net.state_dict())  # type: ignore[arg-type, union-attr, operator]
    assert done.surgery.report is not None and done.surgery.report.distilled is not None
    assert done.surgery.report.distilled.teacher == str(path)


def test_a_teacher_that_does_not_fit_is_refused_before_the_first_step(tmp_path: Path) -> None:
    def refused(match: str, path: Path) -> None:
        task = seeded(Task)
        with pytest.raises(ConfigurationError, match=match):
            distilled(tmp_path, task=task, surgery=surgeon(teacher=path))
        assert not task.losses

    refused("teacher='.*nothing.pt' is no file of weights", tmp_path / "nothing.pt")
    (tmp_path / "text.safetensors").write_text("weights")
    refused("teacher='.*text.safetensors' is no file of weights", tmp_path / "text.safetensors")
    torch.save(Residual(width=6).state_dict(), tmp_path / "slim.pt")
    refused("does not fit: 'net.stem.weight' has shape", tmp_path / "slim.pt")
    state = Residual().state_dict()
    torch.save({name: value for name, value in state.items() if "head" not in name}, tmp_path / "part.pt")
    refused("does not fit: .* lacks", tmp_path / "part.pt")
    torch.save(Residual(), tmp_path / "module.pt")
    refused("is no file of weights", tmp_path / "module.pt")


# With others.


@pytest.mark.parametrize("finetune", ["continue", "restart"])
@pytest.mark.parametrize("average", ["ema", "swa", None])
def test_with_weight_averages_and_a_new_optimiser(average: str | None, finetune: Any, tmp_path: Path) -> None:
    """A resume behind surgery ends with the same bits, and the averages don't know the teacher."""

    def averages() -> list[Callback]:
        swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)
        return {"ema": [EMAWeightAveraging(decay=0.9)], "swa": [swa], None: []}[average]

    full = distilled(tmp_path / "full", *averages(), surgery=surgeon(finetune=finetune))
    start = tmp_path / "full" / "kept" / "epoch=2.ckpt"
    settings: Any = {"surgery": surgeon(finetune=finetune), "task": seeded(Task, seed=7)}
    again = distilled(tmp_path / "again", *averages(), ckpt_path=start, **settings)
    assert_equal(weights(full.task), weights(again.task))


def test_of_single_weights(tmp_path: Path) -> None:
    """Where nothing is cut, before and after a resume."""

    def method() -> Magnitude:
        return Magnitude(0.5, epochs=2, granularity="weight")

    plain = distilled(tmp_path / "plain", picker=method(), surgery=surgeon(distill=None))
    full = distilled(tmp_path / "full", picker=method())
    assert (full.task.net.conv1.weight == 0).float().mean() == 0.5
    assert not torch.equal(full.task.net.head.weight, plain.task.net.head.weight)
    start = tmp_path / "full" / "kept" / "epoch=2.ckpt"
    again = distilled(tmp_path / "again", picker=method(), task=seeded(Task, seed=7), ckpt_path=start)
    assert_equal(weights(full.task), weights(again.task))


def test_a_slim_file_may_be_the_dense_network(tmp_path: Path) -> None:
    """Another round from a slim file: the teacher is what the file holds, as it is trained on."""
    first = run(tmp_path, surgery=surgeon(distill=None))
    assert first.surgery.plan is not None
    save_slim(first.task, tmp_path / "slim.safetensors", first.surgery.plan)
    load = lambda: LoadPruned(str(tmp_path / "slim.safetensors"))  # noqa: E731
    full = distilled(tmp_path / "full", load(), task=seeded(Task, seed=7))
    assert load_file(tmp_path / "full" / "kept" / FILE)["net.conv1.weight"].shape[0] == 4
    start = tmp_path / "full" / "kept" / "epoch=2.ckpt"
    again = distilled(tmp_path / "again", load(), task=seeded(Task, seed=8), ckpt_path=start)
    assert full.task.net.conv1.out_channels == 2
    assert_equal(weights(full.task), weights(again.task))


def test_a_second_fit_goes_on(tmp_path: Path) -> None:
    done = distilled(tmp_path)
    done.trainer.fit_loop.max_epochs = 6
    before = weights(done.task)
    done.trainer.fit(done.task, image_loader(BATCHES), image_loader(3))
    assert not torch.equal(before["net.head.weight"], done.task.net.head.weight)
    assert "distillation/loss" in done.trainer.callback_metrics


def test_a_slim_module_is_no_dense_one(tmp_path: Path) -> None:
    done = distilled(tmp_path)
    with pytest.raises(PruningError, match="resume with a fresh dense module"):
        distilled(tmp_path, task=done.task, ckpt_path=tmp_path / "kept" / "epoch=3.ckpt", max_epochs=5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("name", [None, "net", "net.head"])
def test_compiled_networks(name: str | None, tmp_path: Path) -> None:
    ends = []
    for compiles in (False, True):
        task = seeded(Task)
        if compiles:
            task.net.compile(backend="eager")
        ends.append(weights(distilled(tmp_path, task=task, surgery=surgeon(logits_from=name)).task))
    for key, value in ends[0].items():
        assert torch.allclose(value.double(), ends[1][key].double(), atol=1e-6), key


# The report.


def test_the_report_says_so(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    surgery = surgeon(report_file="report.json", logits_from="net")
    distilled(tmp_path, surgery=surgery, logger=logger)
    report = read_report(next(tmp_path.rglob("report.json")))
    said = "Distilled from the dense network as of epoch 0: temperature 3, weight 0.75, logits of net"
    assert str(report.distilled) == said
    assert said in next(tmp_path.rglob("report.html")).read_text(encoding="utf-8")
    assert report.config["StructuralPruning"]["distill"]["weight"] == 0.75
    old = replace(report, distilled=None).to_json()
    without = "\n".join(line for line in old.splitlines() if '"distilled"' not in line)
    assert PruningReport.from_json(without).distilled is None
    metrics = next(tmp_path.rglob("metrics.csv")).read_text(encoding="utf-8")
    assert "distillation/loss" in metrics


# YAML, flags, preview.

PRUNE = """
trainer:
  max_epochs: 4
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_prune.Magnitude
      init_args: {ratio: 0.5, start: 1, epochs: 1}
    - class_path: lightning_prune.StructuralPruning
      init_args:
        latency_batches: []
        logits_from: net
        teacher: dense.pt
        distill: {temperature: 2, weight: 0.25}
"""


@pytest.fixture
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning uses jsonargparse's old names
    monkeypatch.setattr(sys, "argv", ["train"])  # LightningCLI warns of pytest's own arguments
    Path("prune.yaml").write_text(PRUNE)
    torch.save(seeded(Residual, seed=5).state_dict(), "dense.pt")


def cli(*args: str) -> LightningCLI:
    options: Any = {"run": False, "seed_everything_default": False, "save_config_callback": None}
    return LightningCLI(Task, args=["--config", "prune.yaml", *args], **options)


@pytest.mark.usefixtures("configured")
def test_it_is_written_in_yaml() -> None:
    made = cli()
    Path("prune.yaml").write_text(made.parser.dump(made.config))
    again = cli()
    assert made.parser.dump(made.config) == again.parser.dump(again.config)
    surgery = next(each for each in again.trainer.callbacks if isinstance(each, StructuralPruning))
    assert surgery.distill == Distillation(2.0, 0.25) and surgery.logits_from == "net" and surgery.teacher == "dense.pt"
    again.trainer.fit(again.model, image_loader(BATCHES), image_loader(3))
    assert surgery.finished and Path(FILE).exists()
    assert "distillation/loss" in again.trainer.callback_metrics


@pytest.mark.usefixtures("configured")
def test_flags_change_it() -> None:
    made = cli("--trainer.callbacks.distill.weight=0.5")
    surgery = next(each for each in made.trainer.callbacks if isinstance(each, StructuralPruning))
    assert surgery.distill == Distillation(2.0, 0.5)


@pytest.mark.usefixtures("configured")
def test_a_preview_neither_trains_nor_writes_a_teacher(capsys: pytest.CaptureFixture[str]) -> None:
    """What can't work is said there already."""
    Path("train.py").write_text(
        "from lightning.pytorch import Trainer\n"
        "from lightning_prune import Magnitude, StructuralPruning\n"
        "from tests.callbacks.nets import image_loader\n"
        "from tests.callbacks.slimming import Task\n"
        "import sys\n"
        "pruning = StructuralPruning(distill={'temperature': 4}, logits_from=sys.argv[1])\n"
        "trainer = Trainer(max_epochs=9, accelerator='cpu', callbacks=[Magnitude(0.5, epochs=3), pruning])\n"
        "trainer.fit(Task(), image_loader(6), image_loader(3))\n"
    )
    assert main(["plan", "--script", "train.py", "--json", "--", "net.head"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"]
    assert main(["plan", "--script", "train.py", "--json", "--", "accuracy"]) == 1
    assert "never calls accuracy" in capsys.readouterr().err
    assert not list(Path().rglob("teacher*"))
