"""Learning from the dense network in the finetune stage: what enters the loss, and where the teacher comes from."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Sequence
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
from torch import Tensor, nn

from lightning_prune import GReg1, LoadPruned, Magnitude, save_slim
from lightning_prune.callbacks.distillation import Distillation
from lightning_prune.callbacks.structural import StructuralPruning
from lightning_prune.callbacks.teacher import FILE
from lightning_prune.cli import main
from lightning_prune.errors import ConfigurationError, PruningError
from lightning_prune.reports.files import read_report
from lightning_prune.reports.report import PruningReport
from tests.callbacks.nets import image_loader, seeded
from tests.callbacks.slimming import BATCHES, Picker, Residual, Run, Task, assert_equal, run, weights
from tests.callbacks.test_leaks import hooks
from tests.contract.test_contract import half_precision

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory", "ignore:.*callbacks used to create", "ignore:The dirpath"
)
ASKED = {"temperature": 3.0, "weight": 0.75}


def surgeon(**arguments: Any) -> StructuralPruning:
    return StructuralPruning(**{"latency_batches": (), "report_file": None, "distill": ASKED, **arguments})


def distilled(folder: Path, *callbacks: Callback, surgery: StructuralPruning | None = None, **settings: Any) -> Run:
    """Surgery after epoch 2 of 4, and a checkpoint after each epoch."""
    keeper = ModelCheckpoint(folder / "kept", "{epoch}", save_top_k=-1)
    surgery = surgeon() if surgery is None else surgery
    return run(folder, *callbacks, keeper, surgery=surgery, enable_checkpointing=True, **settings)


class Written(Task):
    """The same, written out by hand: the teacher is a copy of the network that the module keeps to itself."""

    def __init__(self, as_dict: bool = False, **arguments: Any) -> None:
        super().__init__(as_dict=as_dict, **arguments)
        self.teacher: list[nn.Module] = []
        self.parts: list[float] = []

    def on_train_start(self) -> None:
        self.teacher = [copy.deepcopy(self.net).eval().requires_grad_(False)]

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        student = self.logits(batch[0])
        loss = nn.functional.cross_entropy(student, batch[1])
        self.losses.append(float(loss.detach()))
        if self.trainer.current_epoch < 2:
            return loss
        with torch.no_grad():
            teacher = self.teacher[0](batch[0])
        temperature, weight = ASKED["temperature"], ASKED["weight"]
        with torch.autocast("cpu", enabled=False):
            soft = [each.float() if each.dtype != torch.double else each for each in (student, teacher)]
            p, q = (soft[1] / temperature).softmax(1), (soft[0] / temperature).log_softmax(1)
            divergence = (p * (p.log() - q)).sum() / len(p)
        self.parts.append(float(temperature**2 * divergence.detach()))
        return (1 - weight) * loss + weight * temperature**2 * divergence


PRECISE: dict[str, Any] = {"precision": "64-true"}
CONFIGURATIONS: dict[str, Any] = {
    "double precision": lambda: PRECISE,
    "accumulation": lambda: {"accumulate_grad_batches": 4, **PRECISE},
    "clipping": lambda: {"gradient_clip_val": 0.1, **PRECISE},
    "bf16": lambda: {"precision": "bf16-mixed"},
    "fp16": half_precision,
    "fp16 and accumulation": lambda: {"accumulate_grad_batches": 2, **half_precision()},
}


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_it_is_the_loss_that_one_would_write(configuration: str, tmp_path: Path) -> None:
    """Weights at the end, to rounding; and they are not those of a run without."""
    ends = []
    for task, surgery in ((Written, surgeon(distill=None)), (Task, surgeon()), (Task, surgeon(distill=None))):
        settings = CONFIGURATIONS[configuration]()
        extra = settings.pop("callbacks", []) if "callbacks" in settings else []
        ends.append(weights(run(tmp_path, *extra, task=seeded(task), surgery=surgery, **settings).task))
    written, injected, without = ends
    nearness = 1e-11 if "precision" in (made := CONFIGURATIONS[configuration]()) and "64" in made["precision"] else 1e-5
    for name, value in written.items():
        assert torch.allclose(value.double(), injected[name].double(), rtol=nearness, atol=nearness), name
    assert not torch.allclose(injected["net.head.weight"], without["net.head.weight"], atol=1e-3)


def test_the_loss_in_the_log_is_the_divergence_and_falls(tmp_path: Path) -> None:
    class Logged(Callback):
        def __init__(self) -> None:
            self.found: list[float] = []

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if "distillation/loss" in trainer.callback_metrics:
                self.found.append(float(trainer.callback_metrics["distillation/loss"]))

    logged, task = Logged(), seeded(Written)
    run(tmp_path, task=task, surgery=surgeon(distill=None))
    distilled(tmp_path, logged, task=seeded(Task))
    assert logged.found == pytest.approx(task.parts, rel=1e-4) and len(logged.found) == 2 * BATCHES
    one = distilled(tmp_path / "alone", again := Logged(), surgery=surgeon(distill={"weight": 1.0}), max_epochs=8)
    assert sum(again.found[-BATCHES:]) < 0.7 * sum(again.found[:BATCHES])
    assert one.surgery.report is not None


class Forwarding(Task):
    """Its own forward gives the logits."""

    def forward(self, images: Tensor) -> Any:
        return self.net(images)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize("task", [Task, Forwarding])
def test_logits_are_the_same_wherever_they_are_taken(task: type[Task], tmp_path: Path) -> None:
    names = ["net", "net.head", None]
    ends = [weights(distilled(tmp_path, task=seeded(task), surgery=surgeon(logits_from=name)).task) for name in names]
    assert_equal(ends[0], ends[1])
    assert_equal(ends[0], ends[2])


def test_outputs_with_several_tensors(tmp_path: Path) -> None:
    """What is called logits counts."""
    whole = distilled(tmp_path, task=seeded(Task, as_dict=True))
    assert_equal(weights(whole.task), weights(distilled(tmp_path, task=seeded(Task)).task))


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


# What can't work.


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"distill": {"temperature": 0}}, "temperature=0 must be a positive number"),
        ({"distill": {"temperature": "4"}}, "temperature='4' must be a positive number"),
        ({"distill": {"temperature": float("inf")}}, "temperature=inf must"),
        ({"distill": {"weight": 0}}, r"weight=0 must lie in \(0, 1\]"),
        ({"distill": {"weight": 1.5}}, r"weight=1.5 must lie in \(0, 1\]"),
        ({"distill": {"weight": True}}, "weight=True must"),
        ({"distill": {"dim": 1.0}}, "dim=1.0 must be a whole number"),
        ({"distill": {"temprature": 4}}, "distill knows temperature, weight, dim, not 'temprature'"),
        ({"distill": 0.5}, "distill=0.5 must be a mapping"),
        ({"distill": None, "teacher": "dense.ckpt"}, "teacher='dense.ckpt' needs distill"),
        ({"distill": None, "logits_from": "net"}, "logits_from='net' needs distill"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        surgeon(**arguments)


def test_good_arguments_are_known() -> None:
    assert surgeon(distill={}).distill == Distillation(4.0, 0.5)
    assert surgeon(distill=Distillation(2, 1)).distill == Distillation.of({"temperature": 2, "weight": 1})


class Manual(Task):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Own(Task):
    """Calls the layers one after the other."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        hidden = self.net.norm(self.net.stem(batch[0])).relu()
        hidden = (hidden + self.net.norm2(self.net.conv2(self.net.norm1(self.net.conv1(hidden)).relu()))).relu()
        return nn.functional.cross_entropy(self.net.head(hidden.mean(dim=(2, 3))), batch[1])


class Shaped(Task):
    """Logits of another form, and a loss on them."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, images: Tensor) -> Any:
        logits = self.net(images)
        forms = {
            "sequence": logits.unsqueeze(1).expand(-1, 3, -1),
            "pixels": logits[:, :, None, None].expand(-1, -1, 2, 2),
            "two": (logits, logits),
            "numbers": logits.argmax(1),
            "scalar": logits.mean(),
            "silent": logits.detach(),
        }
        self.kept = logits
        return forms[self.form]

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        self(batch[0])
        return nn.functional.cross_entropy(self.kept, batch[1])


@pytest.mark.parametrize(
    ("build", "arguments", "match"),
    [
        (Manual, {}, "under manual optimisation"),
        (Task, {"logits_from": "net.haed"}, "logits_from='net.haed' is no part .* near names are: net.head"),
        (Task, {"logits_from": "xyz"}, "its children are: net, accuracy"),
        (Task, {"logits_from": "accuracy"}, "training_step never calls accuracy"),
        (Task, {"module": "net"}, "training_step never calls the LightningModule.*logits_from"),
        (lambda: Task(as_dict=True), {"distill": {"dim": 5}}, "dim=5 is out of range"),
        (lambda: Shaped("sequence"), {}, r"shape \(16, 3, 4\); say along which dim"),
        (lambda: Shaped("two"), {}, "gives 2 tensors, none of them called 'logits'"),
        (lambda: Shaped("numbers"), {}, "no logits with a gradient"),
        (lambda: Shaped("scalar"), {}, "shape .* are no logits"),
        (lambda: Shaped("silent"), {}, "no logits with a gradient"),
    ],
)
def test_what_can_not_work_is_said_in_the_first_batch(
    build: Any, arguments: dict[str, Any], match: str, tmp_path: Path
) -> None:
    task = seeded(build)
    with pytest.raises(ConfigurationError, match=match):
        distilled(tmp_path, task=task, surgery=surgeon(**arguments))
    assert len(task.losses) <= 2  # long before surgery


def test_logits_of_features_are_refused(tmp_path: Path) -> None:
    class Split(Task):
        def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
            self.net(batch[0])
            return nn.functional.cross_entropy(self.net.head(self.net.stem(batch[0]).mean(dim=(2, 3))), batch[1])

    with pytest.raises(ConfigurationError, match="called with what other layers have computed"):
        distilled(tmp_path, task=seeded(Split), surgery=surgeon(logits_from="net.head", module="net"))


@pytest.mark.parametrize(("form", "asked"), [("sequence", {"dim": -1}), ("pixels", {})])
def test_logits_of_many_positions(form: str, asked: dict[str, Any], tmp_path: Path) -> None:
    """Repeated over positions, they are the same as once."""

    class Once(Shaped):
        def forward(self, images: Tensor) -> Tensor:
            self.kept = self.net(images)
            return self.kept

    one = distilled(tmp_path, task=seeded(Once, form), surgery=surgeon())
    many = distilled(tmp_path, task=seeded(Shaped, form), surgery=surgeon(distill={**ASKED, **asked}))
    for name, value in weights(one.task).items():
        assert torch.allclose(value.double(), weights(many.task)[name].double(), atol=1e-6), name


def test_a_change_in_place_is_noticed(tmp_path: Path) -> None:
    class Changing(Forwarding):
        def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]).mul_(2), batch[1])

    with pytest.raises(ConfigurationError, match=r"changes the logits of .* in place"):
        distilled(tmp_path, task=seeded(Changing))


# Steps of another kind.


def test_two_views_count_half_each_and_calls_without_gradients_do_not(tmp_path: Path) -> None:
    class Twice(Forwarding):
        def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
            with torch.no_grad():
                self(batch[0].flip(0))
            halves = [self(half) for half in batch[0].chunk(2)]
            return nn.functional.cross_entropy(torch.cat(halves), batch[1])

    class Still(Twice):
        """Without batch norm in training mode both are the same."""

        def on_train_batch_start(self, *_: Any) -> None:
            self.net.eval()

    class Whole(Still):
        def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

    ends = [weights(distilled(tmp_path, task=seeded(kind), precision="64-true").task) for kind in (Still, Whole)]
    for name, value in ends[0].items():
        assert torch.allclose(value.double(), ends[1][name].double(), atol=1e-12), name


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_batch_without_a_call_or_a_loss_passes(tmp_path: Path) -> None:
    class Skipping(Forwarding):
        def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor | None:  # type: ignore[override]
            if batch_idx == 2:
                return None
            if batch_idx == 4:
                return self.net.head.weight.square().sum()
            return super().training_step(batch, batch_idx)

    assert distilled(tmp_path, task=seeded(Skipping)).surgery.finished


def test_activations_that_are_computed_twice_count_once(tmp_path: Path) -> None:
    class Checkpointed(Forwarding):
        def forward(self, images: Tensor) -> Any:
            return torch.utils.checkpoint.checkpoint(self.net, images, use_reentrant=False)

        def on_train_batch_start(self, *_: Any) -> None:
            self.net.eval()  # running statistics would move twice

    class Plain(Checkpointed):
        def forward(self, images: Tensor) -> Any:
            return self.net(images)

    for name in ("net", None):
        ends = [
            weights(distilled(tmp_path, task=seeded(kind), surgery=surgeon(logits_from=name)).task)
            for kind in (Checkpointed, Plain)
        ]
        assert_equal(*ends)


@pytest.mark.filterwarnings("ignore:.*LBFGS")
def test_lbfgs_sees_the_teacher_in_every_closure(tmp_path: Path) -> None:
    class Closures(Written):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

        def on_train_batch_start(self, *_: Any) -> None:
            self.net.eval()

    class Plain(Closures):
        training_step = Task.training_step  # type: ignore[assignment]

    ends = [
        weights(run(tmp_path, task=seeded(kind), surgery=surgery, **PRECISE).task)
        for kind, surgery in ((Closures, surgeon(distill=None)), (Plain, surgeon()))
    ]
    for name, value in ends[0].items():
        assert torch.allclose(value.double(), ends[1][name].double(), rtol=1e-7, atol=1e-9), name


def test_what_the_teacher_logs_or_changes_is_not_seen(tmp_path: Path) -> None:
    """A forward that logs, counts and works on its input in place."""

    class Busy(Forwarding):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, images: Tensor) -> Any:
            self.calls += 1
            images.add_(0.125)
            self.log("mean", images.mean(), on_epoch=True)
            return self.net(images)

        def logits(self, images: Tensor) -> Tensor:
            return self.net(images)

    def train() -> Any:
        loader = image_loader(BATCHES)
        loader.dataset.tensors = tuple(tensor.clone() for tensor in loader.dataset.tensors)
        return loader

    class Means(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.last = float(trainer.callback_metrics["mean_epoch"])

    found = []
    for asked in (None, ASKED):
        means = Means()
        done = distilled(
            tmp_path, means, task=seeded(Busy), train=train(), surgery=surgeon(distill=asked, module="net")
        )
        found.append((means.last, float(done.task.calls)))  # type: ignore[arg-type]
    assert found[0] == found[1]


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
