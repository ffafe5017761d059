"""Single weights: zero to the bit from surgery on, whatever trains them; everything else as for channels."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from rich.console import Console
from torch import Tensor, nn

from lightning_prune.callbacks import operation
from lightning_prune.callbacks.checkpointing import history, load_from_checkpoint
from lightning_prune.callbacks.greg import GReg1, GReg2
from lightning_prune.callbacks.loading import LoadPruned
from lightning_prune.callbacks.magnitude import Magnitude
from lightning_prune.callbacks.structural import StructuralPruning
from lightning_prune.errors import ConfigurationError, ProofError, TraceError
from lightning_prune.reports import surgery_table
from lightning_prune.reports.report import PruningReport
from lightning_prune.schedules import GReg1Schedule, GReg2Schedule
from lightning_prune.structure import Bits, SparsityPlan, load_slim, save_slim
from lightning_prune.structure.sparsity import plan_from_json
from tests.callbacks.nets import image_loader, seeded
from tests.callbacks.nets import trainer as quiet_trainer
from tests.callbacks.slimming import BATCHES, Task, assert_equal, run, weights
from tests.callbacks.test_checkpointing import HOOKS, Keeper, Resumable, checkpointed
from tests.callbacks.two_ranks_weights import train

pytestmark = pytest.mark.filterwarnings("ignore:.*of the energy was left in the weights")  # after stages this short

ROOT = Path(__file__).parents[2]
LAYERS = ("conv1", "conv2", "head", "stem")
PRECISIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "fp32": dict,
    "bf16": lambda: {"precision": "bf16-mixed"},
    "fp16": lambda: {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))},
}
GROWTH1 = GReg1Schedule(0.1, 0.5, 2, 2, stop_ratio=None)
GROWTH2 = GReg2Schedule(0.02, 0.04, 0.1, 0.34, 2, 2, kept=-0.01, stop_ratio=None)
METHODS: dict[str, Callable[..., Any]] = {
    "greg1": partial(GReg1, 0.5, schedule=GROWTH1, granularity="weight"),
    "greg2": partial(GReg2, 0.5, schedule=GROWTH2, granularity="weight"),
    "magnitude": partial(Magnitude, 0.5, epochs=2, steps=2, granularity="weight"),
}
surgeon = partial(StructuralPruning, latency_batches=(), report_file=None)


def magnitude(ratio: float = 0.5, **arguments: Any) -> Magnitude:
    return Magnitude(ratio, **{"epochs": 2, "granularity": "weight", **arguments})


def gone(plan: Any) -> dict[str, Tensor]:
    """Parameter name -> flat mask of what must be zero."""
    assert isinstance(plan, SparsityPlan)
    return {name: bits.others().mask() for name, bits in plan.kept.items()}


def all_zero(module: nn.Module, plan: Any) -> bool:
    named = dict(module.named_parameters())
    return all(not named[name].detach().flatten()[mask].any() for name, mask in gone(plan).items())


def no_momenta(trainer: Trainer, module: nn.Module, plan: Any) -> bool:
    """Whether no optimiser remembers anything of a masked weight."""
    masks = {id(parameter): gone(plan).get(name) for name, parameter in module.named_parameters()}
    held = [
        (value, masks[id(parameter)])
        for optimizer in trainer.optimizers
        for parameter, state in optimizer.state.items()
        for value in state.values()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    ]
    assert any(mask is not None for _, mask in held)
    return all(mask is None or not value.flatten()[mask].any() for value, mask in held)


class Zeros(Callback):
    """Whether, after each batch behind surgery, masked weights and their momenta are zero, and how many zeros are."""

    def __init__(self, surgery: StructuralPruning) -> None:
        self.surgery = surgery
        self.seen: list[bool] = []
        self.fractions: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        weight = pl_module.get_submodule("net.conv1").weight
        self.fractions.append(float((weight == 0).float().mean()))
        if self.surgery.plan is not None:
            plan = self.surgery.plan
            self.seen.append(all_zero(pl_module, plan) and no_momenta(trainer, pl_module, plan))


class Decayed(Task):
    """With weight decay, and every relative of SGD and Adam that may want to move a weight without a gradient."""

    def configure_optimizers(self) -> Any:
        kinds: dict[str, Any] = {
            "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
            "adamw": partial(torch.optim.AdamW, lr=1e-3, amsgrad=True),
            "rmsprop": partial(torch.optim.RMSprop, lr=1e-3, momentum=0.9, centered=True),
        }
        return kinds[self.hparams["optimizer"]](self.parameters())


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop"])
def test_masked_weights_stay_zero(tmp_path: Path, optimizer: str, precision: str, accumulate: int) -> None:
    surgery, task = surgeon(), seeded(Decayed, optimizer)
    zeros, before = Zeros(surgery), dict(task.named_parameters())
    settings = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5, **PRECISIONS[precision]()}
    run(tmp_path, zeros, task=task, surgery=surgery, picker=magnitude(), **settings)
    assert zeros.seen == [True] * 2 * BATCHES
    assert zeros.fractions == [0.0] * 2 * BATCHES + [0.5] * 2 * BATCHES
    assert surgery.plan is not None and surgery.plan.sparsity() == {f"net.{layer}": 0.5 for layer in LAYERS}
    assert {name: id(p) for name, p in task.named_parameters()} == {name: id(p) for name, p in before.items()}
    assert all(parameter.isfinite().all() for parameter in task.parameters())
    assert task.losses[-1] < task.losses[0]


def test_an_optimiser_that_moves_every_weight_moves_no_masked_one(tmp_path: Path) -> None:
    class Noisy(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            loss = super().step(closure)
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.add_(0.01)
            return loss

    surgery = surgeon(finetune_optimizer=partial(Noisy, lr=0.01, momentum=0.9))
    zeros = Zeros(surgery)
    run(tmp_path, zeros, surgery=surgery, picker=magnitude())
    assert zeros.seen == [True] * 2 * BATCHES


def test_gradients_of_masked_weights_count_in_no_norm(tmp_path: Path) -> None:
    surgery, norms = surgeon(), list[tuple[float, float]]()

    class Norms(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            if surgery.plan is not None:
                named = dict(pl_module.named_parameters())
                masked = [named[name].grad.flatten()[mask] for name, mask in gone(surgery.plan).items()]
                norms.append((float(torch.cat(masked).norm()), float(named["net.conv1.weight"].grad.norm())))

    run(tmp_path, Norms(), surgery=surgery, picker=magnitude())
    assert len(norms) == 2 * BATCHES
    assert all(masked == 0 < whole for masked, whole in norms)


@pytest.mark.parametrize(
    "finetune", [{"finetune": "restart"}, {"finetune_optimizer": partial(torch.optim.Adam, lr=1e-3)}]
)
def test_with_a_finetune_stage_of_its_own(tmp_path: Path, finetune: dict[str, Any]) -> None:
    surgery = surgeon(**finetune)
    zeros = Zeros(surgery)
    run(tmp_path, zeros, surgery=surgery, picker=magnitude(), task=seeded(Task, schedule="remaining"))
    assert zeros.seen == [True] * 2 * BATCHES


class Manual(Task):
    """Manual optimisation."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self.logits(batch[0]), batch[1]))
        optimizer.step()


def test_under_manual_optimisation(tmp_path: Path) -> None:
    surgery = surgeon()
    zeros = Zeros(surgery)
    run(tmp_path, zeros, task=seeded(Manual), surgery=surgery, picker=magnitude())
    assert zeros.seen == [True] * 2 * BATCHES


# The sparse stage.


class Change(Callback):
    """How far surgery moves the network's outputs, relative to their size, and the energy just before it."""

    def __init__(self, picker: Any) -> None:
        self.picker = picker
        self.images = next(iter(image_loader(1)))[0]
        self.outputs: list[Tensor] = []
        self.energy = 1.0

    def look(self, pl_module: Any) -> None:
        twin = copy.deepcopy(pl_module.net).eval()
        with torch.no_grad():
            self.outputs.append(twin(self.images))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            self.look(pl_module)
            self.energy = float(self.picker.energy())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.current_epoch == 2 and len(self.outputs) == 1:
            self.look(pl_module)

    @property
    def moved(self) -> float:
        before, after = self.outputs
        return float((before - after).norm() / before.norm())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_after_a_sparse_stage_surgery_costs_little(tmp_path: Path, optimizer: str) -> None:
    """A single weight keeps its gradient however small it is, so it rests close to zero, not at zero."""

    def outcome(picker: Any) -> Change:
        change, task = Change(picker), seeded(Task, optimizer)
        run(tmp_path, change, surgery=surgeon(), picker=picker, task=task, train=image_loader(120), max_epochs=3)
        return change

    cut = outcome(magnitude())
    for method in (GReg1, GReg2):
        shrunk = outcome(method(0.5, epochs=2, granularity="weight"))
        assert shrunk.energy < 0.01 < cut.energy
        assert shrunk.moved < cut.moved / 3


def test_magnitude_in_steps_swaps_masks_at_epochs(tmp_path: Path) -> None:
    surgery, picker = surgeon(), magnitude(0.6, epochs=3, steps=3)
    zeros, picks = Zeros(surgery), list[set[int]]()

    class Picks(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch < 3:
                picks.append(set(picker.removal()["conv1"]))

    run(tmp_path, zeros, Picks(), surgery=surgery, picker=picker, max_epochs=5)
    assert [len(pick) for pick in picks] == [116, 231, 346]
    assert picks[0] < picks[1] < picks[2]
    wanted = [0, 116 / 576, 231 / 576, 346 / 576, 346 / 576]
    for first in (0, BATCHES - 2):  # of an epoch's batches; at the end of the last one the mask has grown already
        assert zeros.fractions[first::BATCHES] == pytest.approx(wanted)


def test_greg2_picks_after_its_first_phase(tmp_path: Path) -> None:
    picker, other = METHODS["greg2"](), METHODS["greg1"]()
    phases = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            phases.append(picker.phase)

    run(tmp_path, Look(), picker=picker, surgery=surgeon())
    assert phases[: GROWTH2.pick_step + 1] == ["pick"] * GROWTH2.pick_step + ["grow"]
    assert phases[-1] == "done" and "hold" in phases
    run(tmp_path, picker=other, surgery=surgeon())
    first, second = picker.removal(), other.removal()
    assert {name: (len(bits), type(bits)) for name, bits in first.items()} == {
        name: (len(bits), Bits) for name, bits in second.items()
    }


def test_ratios_and_patterns(tmp_path: Path) -> None:
    surgery = surgeon()
    run(tmp_path, surgery=surgery, picker=magnitude(ratios={"conv*": 0.75, "head": 0}, ignore=["stem"]))
    assert surgery.plan is not None
    assert surgery.plan.sparsity() == {"net.conv1": 0.75, "net.conv2": 0.75}
    assert str(surgery.plan) == "net.conv1  576 -> 144\nnet.conv2  576 -> 144"


def test_a_layer_frozen_after_the_pick_is_masked_all_the_same(tmp_path: Path) -> None:
    class Freeze(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 1:
                pl_module.get_submodule("net.conv2").requires_grad_(False)

    surgery = surgeon()
    zeros = Zeros(surgery)
    run(tmp_path, zeros, Freeze(), surgery=surgery, picker=magnitude(epochs=3, steps=3), max_epochs=5)
    assert zeros.seen == [True] * 2 * BATCHES
    assert surgery.plan is not None and surgery.plan.sparsity()["net.conv2"] == 0.5


def test_a_compiled_network(tmp_path: Path) -> None:
    task, surgery = seeded(Task), surgeon()
    task.net.conv1 = torch.compile(task.net.conv1, backend="eager")  # type: ignore[assignment]
    task.net = torch.compile(task.net, backend="eager")  # type: ignore[assignment]
    run(tmp_path, surgery=surgery, picker=magnitude(ignore=["net.stem"]), task=task)
    plain = run(tmp_path, surgery=surgeon(), picker=magnitude(ignore=["stem"]))
    assert surgery.plan is not None and surgery.plan.sparsity() == {f"net.{layer}": 0.5 for layer in LAYERS[:3]}
    pairs = zip(task.parameters(), plain.task.parameters(), strict=True)
    assert all(torch.equal(first, second) for first, second in pairs)


def test_two_regularisers_make_one_plan(tmp_path: Path) -> None:
    surgery = surgeon()
    first, second = magnitude(0.5, ignore=["conv2"]), METHODS["greg1"](ignore=["stem", "conv1", "head"])
    run(tmp_path, second, surgery=surgery, picker=first)
    assert surgery.plan is not None and surgery.plan.sparsity() == {f"net.{layer}": 0.5 for layer in LAYERS}


def test_surgery_at_an_epoch_of_choice_and_early_stopping_waits(tmp_path: Path) -> None:
    surgery = surgeon(at_epoch=3)
    zeros, stopper = Zeros(surgery), EarlyStopping("val_acc", mode="max", patience=1, min_delta=2.0)
    with pytest.warns(UserWarning, match="EarlyStopping on 'val_acc' would have ended this run"):
        run(tmp_path, zeros, stopper, surgery=surgery, picker=magnitude(epochs=1), max_epochs=9)
    assert zeros.fractions == [0.0] * 3 * BATCHES + [0.5] * 2 * BATCHES


def test_no_forward_pass_has_to_be_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing hangs together, so a network may do in its forward what nobody can follow."""

    def fail(*_: Any) -> Any:
        raise TraceError("The model can't be watched.")

    monkeypatch.setattr("lightning_prune.structure.trace", fail)
    with pytest.raises(TraceError):
        run(tmp_path, surgery=surgeon(), picker=Magnitude(0.5, epochs=2))
    surgery = surgeon()
    zeros = Zeros(surgery)
    run(tmp_path, zeros, surgery=surgery, picker=magnitude())
    assert zeros.seen == [True] * 2 * BATCHES


# Weight averages, checkpoints, further fits.


def average(kind: str) -> Any:
    if kind == "ema":
        return EMAWeightAveraging(decay=0.9)
    return StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_weight_averages_stay_zero_too(tmp_path: Path, kind: str) -> None:
    averaging, surgery, seen = average(kind), surgeon(monitor="val_acc"), list[bool]()

    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            model = averaging._average_model
            if surgery.plan is not None and model is not None:
                seen.append(all_zero(model.module if kind == "ema" else model, surgery.plan))

    result = run(tmp_path, averaging, Look(), surgery=surgery, picker=magnitude(), max_epochs=5)
    assert seen and all(seen)
    assert all_zero(result.task, surgery.plan)


@pytest.mark.parametrize("epoch", [1, 2, 3])
@pytest.mark.parametrize("when", HOOKS)
@pytest.mark.parametrize(("method", "optimizer"), [("greg1", "sgd"), ("greg2", "adamw"), ("magnitude", "adamw")])
def test_a_resumed_run_ends_with_the_same_bits(
    tmp_path: Path, method: str, optimizer: str, when: str, epoch: int
) -> None:
    def settings() -> dict[str, Any]:
        task = seeded(Task, optimizer, schedule="step")
        return {"surgery": surgeon(monitor="val_acc"), "picker": METHODS[method](), "when": when, "task": task}

    full, checkpoints = checkpointed(tmp_path / "full", **settings())
    again, _ = checkpointed(tmp_path / "again", ckpt_path=checkpoints[epoch * BATCHES], **settings())
    assert_equal(weights(full.task), weights(again.task))
    assert again.task.losses == full.task.losses[epoch * BATCHES :]
    assert again.surgery.plan == full.surgery.plan is not None
    assert all_zero(again.task, again.surgery.plan)
    assert again.surgery.report is not None and full.surgery.report is not None
    assert again.surgery.report.layers == full.surgery.report.layers


@pytest.mark.parametrize("method", METHODS)
def test_resumes_at_every_step(tmp_path: Path, method: str) -> None:
    settings: dict[str, Any] = {"max_epochs": 3}
    full, checkpoints = checkpointed(
        tmp_path / "full",
        when="every batch",
        task=seeded(Task),
        surgery=surgeon(),
        picker=METHODS[method](),
        train=Resumable(),
        **settings,
    )
    assert full.surgery.plan is not None
    for number, path in sorted(checkpoints.items())[:-1]:
        again = run(
            tmp_path / str(number),
            task=seeded(Task, seed=1),
            surgery=surgeon(),
            picker=METHODS[method](),
            train=Resumable(),
            ckpt_path=path,
            **settings,
        )
        assert_equal(weights(full.task), weights(again.task))
        assert again.task.losses == full.task.losses[number:]


@pytest.mark.parametrize("epoch", [1, 2, 3])
@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_weight_averages_resume_with_the_same_bits(tmp_path: Path, kind: str, epoch: int) -> None:
    def settings() -> dict[str, Any]:
        return {"task": seeded(Task), "surgery": surgeon(), "picker": magnitude()}

    full, checkpoints = checkpointed(tmp_path / "full", average(kind), **settings())
    again, _ = checkpointed(tmp_path / "again", average(kind), ckpt_path=checkpoints[epoch * BATCHES], **settings())
    assert_equal(weights(full.task), weights(again.task))
    assert all_zero(again.task, full.surgery.plan)


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_loads_into_a_fresh_module(tmp_path: Path, weights_only: bool) -> None:
    full, checkpoints = checkpointed(tmp_path, picker=magnitude(), surgery=surgeon(), weights_only=weights_only)
    path = checkpoints[4 * BATCHES]
    torch.load(path, weights_only=True)
    fresh = load_from_checkpoint(Task, path)
    assert_equal(weights(fresh), weights(full.task))
    assert history(fresh) == history(full.task) != ()
    dense = load_from_checkpoint(Task, checkpoints[BATCHES])
    assert history(dense) == ()


def test_a_second_fit_of_the_same_pair_keeps_the_mask(tmp_path: Path) -> None:
    surgery = surgeon()
    zeros = Zeros(surgery)
    result = run(tmp_path, zeros, surgery=surgery, picker=magnitude())
    between = [optimizer._optimizer_step_post_hooks for optimizer in result.trainer.optimizers]
    assert not any(between)
    result.trainer.fit_loop.max_epochs = 5
    result.trainer.fit(result.task, image_loader(BATCHES), image_loader(3))
    assert zeros.seen == [True] * 3 * BATCHES


def test_the_same_callbacks_with_another_module_begin_anew(tmp_path: Path) -> None:
    surgery, picker = surgeon(), magnitude()
    first, second = (run(tmp_path, surgery=surgery, picker=picker) for _ in range(2))
    assert_equal(weights(first.task), weights(second.task))


# Two ranks.


def test_two_ranks_are_one_and_resume(tmp_path: Path) -> None:
    alone = train(tmp_path, 1)
    plan = plan_from_json(alone["plan"])
    command = [sys.executable, "-m", "tests.callbacks.two_ranks_weights", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    whole = ranks[0]["whole"]["weights"]
    for found in (runs for rank in ranks for runs in rank.values()):
        assert plan_from_json(found["plan"]) == plan
        assert_equal(found["weights"], whole)
        for name, mask in gone(plan).items():
            assert not found["weights"][name].flatten()[mask].any()
            assert not found["momenta"][name].flatten()[mask].any()
    assert all(torch.allclose(weight, alone["weights"][name], atol=1e-6) for name, weight in whole.items())


# What is written down.


def test_the_report_speaks_of_weights(tmp_path: Path) -> None:
    surgery = StructuralPruning(monitor="val_acc", latency_batches=(1,))
    run(tmp_path, surgery=surgery, picker=magnitude(0.75))
    report = surgery.report
    assert report is not None and report.unit == "weights" and report.error == report.tolerance == 0
    assert report.layers == (
        *(("net.conv1", 576, 144), ("net.conv2", 576, 144)),
        *(("net.head", 32, 8), ("net.stem", 216, 54)),
    )
    assert report.cost_after.macs == report.cost_before.macs
    assert report.cost_before.parameters - report.cost_after.parameters == 432 + 432 + 24 + 162
    assert PruningReport.from_json((tmp_path / "report.json").read_text()) == report
    console = Console(width=150, file=io.StringIO(), color_system=None)
    console.print(surgery_table(report))
    text = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "From dense to sparse" in text and "-75.0 %" in text and "sparse ones would gain time" in text
    assert "channels" not in text


def test_the_slim_file_brings_it_back(tmp_path: Path) -> None:
    result = run(tmp_path, picker=magnitude(0.9), surgery=surgeon())
    assert result.surgery.plan is not None
    save_slim(result.task, tmp_path / "sparse.safetensors", result.surgery.plan)
    fresh = seeded(Task, seed=1)
    assert load_slim(tmp_path / "sparse.safetensors", fresh) == result.surgery.plan
    assert_equal(weights(fresh), weights(result.task))


def test_a_weight_that_is_not_zero_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operation, "prune_", lambda *_: None)
    with pytest.raises(ProofError, match=r"288 weights of 'conv1\.weight' should be zero"):
        run(tmp_path, picker=magnitude(), surgery=surgeon())


def test_a_run_from_the_slim_file_keeps_its_zeros(tmp_path: Path) -> None:
    first = run(tmp_path, picker=magnitude(), surgery=surgeon())
    assert first.surgery.plan is not None
    save_slim(first.task, tmp_path / "sparse.safetensors", first.surgery.plan)

    def finetuned(task: Task, path: Path | None = None) -> Task:
        zeros, keeper = list[bool](), Keeper(tmp_path / "kept")

        class Look(Callback):
            def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
                plan = first.surgery.plan
                zeros.append(all_zero(pl_module, plan) and no_momenta(trainer, pl_module, plan))

        loading = LoadPruned(tmp_path / "sparse.safetensors")
        trainer = quiet_trainer(loading, Look(), keeper, max_epochs=2, enable_checkpointing=True)
        trainer.fit(task, image_loader(BATCHES), image_loader(1), ckpt_path=path)
        assert zeros == [True] * BATCHES * (2 if path is None else 1)
        assert not trainer.optimizers[0]._optimizer_step_post_hooks
        return task

    whole = finetuned(seeded(Task, seed=1))
    assert [entry.plan for entry in history(whole)] == [first.surgery.plan]
    resumed = finetuned(seeded(Task, seed=2), tmp_path / "kept" / f"{BATCHES}.ckpt")
    assert_equal(weights(resumed), weights(whole))
    mixed = quiet_trainer(GReg1(0.5, epochs=2), LoadPruned(tmp_path / "sparse.safetensors"), max_epochs=3)
    with pytest.raises(ConfigurationError, match="no channels can be removed in this run"):
        mixed.fit(seeded(Task), image_loader(1), image_loader(1))


# At the door.


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: magnitude(scope="all"), "scope='all' has no meaning with granularity='weight'"),
        (lambda: magnitude(round_to=8), "round_to=8 has no meaning"),
        (lambda: magnitude(score="bn_scale"), "score='bn_scale' ranks channels"),
        (lambda: magnitude(granularity="filter"), "granularity='filter' must be one of channel, weight"),
        (lambda: GReg1(0.5, epochs=2, granularity="weight", coupled=False), "coupled=False has no meaning"),
        (lambda: GReg2(0.5, epochs=2, granularity="weight", round_to=4), "round_to=4 has no meaning"),
    ],
)
def test_what_has_no_meaning_is_refused(build: Callable[[], Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        build()


def refused(match: str, *callbacks: Callback) -> None:
    task = seeded(Task)
    before = weights(task)
    with pytest.raises(ConfigurationError, match=match) as caught:
        quiet_trainer(*callbacks, max_epochs=4).fit(task, image_loader(2), image_loader(2))
    assert "\n" not in str(caught.value)
    assert_equal(before, weights(task))


def test_channels_and_weights_dont_mix() -> None:
    refused(
        r"let granularity agree \(Magnitude 'weight', GReg1 'channel'\)",
        surgeon(),
        magnitude(ignore=["conv1"]),
        GReg1(0.5, epochs=2),
    )


def test_two_regularisers_must_not_overlap(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="Two regularisers"):
        run(tmp_path, METHODS["greg1"](), surgery=surgeon(), picker=magnitude())


def test_a_pattern_that_matches_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="'conv9' does not match a layer; these can: stem, conv1, conv2, head"):
        run(tmp_path, surgery=surgeon(), picker=magnitude(ratios={"conv9": 0.5}))


def test_a_network_without_a_layer_to_prune(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="magnitude finds no layer whose weights it is to prune"):
        run(tmp_path, surgery=surgeon(), picker=magnitude(ignore=["*"]))


def test_the_run_of_one_kind_is_not_the_state_of_the_other() -> None:
    assert magnitude().state_key != Magnitude(0.5, epochs=2).state_key
