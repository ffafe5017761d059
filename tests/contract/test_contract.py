"""What every method keeps, row by row of the settings, under SGD and AdamW."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.amp import GradScaler

from lightning_prune.callbacks.mask_sparsity import MaskSparsity
from lightning_prune.callbacks.structural import StructuralPruning
from lightning_prune.errors import PlanError
from tests.callbacks.nets import OPTIMIZERS, Classifier, image_loader, seeded, trainer
from tests.callbacks.test_inject import Synchronising
from tests.settings import BATCHES, EPOCHS, SETTINGS, Setting

ROWS = pytest.mark.parametrize("row", SETTINGS)
EITHER_OPTIMIZER = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def prune(setting: Setting, optimizer: str, *before: Callback) -> tuple[Any, Any]:
    """The callback and the network after a run with surgery that goes on for one epoch after it."""
    callback, module = setting.build(), Classifier(seeded(setting.net), optimizer)
    surgery = StructuralPruning(latency_batches=(), report_file=None)
    trainer(*before, callback, surgery, max_epochs=EPOCHS + 1).fit(module, image_loader(BATCHES))
    return callback, module.net


def distance(first: nn.Module, second: nn.Module) -> float:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


class Outputs(Callback):
    """The network's outputs on one batch just before and just after surgery, in both modes."""

    def __init__(self) -> None:
        self.images = next(iter(image_loader(1)))[0]
        self.seen: list[list[Tensor]] = []

    def look(self, net: nn.Module) -> None:
        twin = copy.deepcopy(net)
        with torch.no_grad():
            self.seen.append([twin.eval()(self.images), twin.train()(self.images)])

    def on_train_epoch_start(self, run: Trainer, pl_module: Any) -> None:
        self.seen.clear()
        self.look(pl_module.net)

    def on_train_batch_start(self, run: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if run.current_epoch == EPOCHS and batch_idx == 0:
            self.look(pl_module.net)


@ROWS
@EITHER_OPTIMIZER
@pytest.mark.filterwarnings("ignore:.*energy was left")
def test_it_trains_and_half_of_every_layer_is_left(row: str, optimizer: str) -> None:
    setting, outputs = SETTINGS[row], Outputs()
    callback, net = prune(setting, optimizer, outputs)
    assert set(setting.left(net)) == {0.5}
    assert callback.phase == "done" and callback.energy() == 0
    assert all(parameter.isfinite().all() for parameter in net.parameters())
    before, after = outputs.seen
    if setting.exact:
        for dense, slim in zip(before, after, strict=True):
            assert (dense - slim).abs().max() < 1e-5 * dense.abs().max()


@ROWS
@EITHER_OPTIMIZER
@pytest.mark.filterwarnings("ignore:.*energy was left")
def test_it_is_quiet_after_surgery(row: str, optimizer: str) -> None:
    """The epoch after surgery is that of a run without the callback, from the same weights and optimiser state.

    Of single weights it is one in which what is zero stays zero.
    """

    class Copy(Callback):
        def on_before_zero_grad(self, run: Trainer, pl_module: Any, _: Any) -> None:
            if run.current_epoch == EPOCHS and not hasattr(self, "module"):
                self.module = Classifier(copy.deepcopy(pl_module.net), optimizer)
                self.state = copy.deepcopy(run.optimizers[0].state_dict())

    class Restore(Callback):
        def on_train_start(self, run: Trainer, pl_module: Any) -> None:
            run.optimizers[0].load_state_dict(kept.state)

    kept = Copy()
    callback, net = prune(SETTINGS[row], optimizer, kept)
    assert callback.phase == "done" and callback.strength == 0
    for parameter in kept.module.parameters():
        parameter.grad = None
    finetune = [build() for build in SETTINGS[row].finetune]
    trainer(Restore(), *finetune, max_epochs=1).fit(kept.module, image_loader(BATCHES))
    assert distance(net, kept.module.net) == 0.0


# The penalty, held against autograd and against the loss that a user would have written.


@ROWS
@EITHER_OPTIMIZER
def test_value_and_gradients_are_autograds_of_the_formula(row: str, optimizer: str) -> None:
    """In the middle of the stage; parameters that the formula doesn't name get nothing at all."""
    setting = SETTINGS[row]
    callback, net = setting.build(), seeded(setting.net).double()
    seen: dict[str, Any] = {}

    class Look(Callback):
        def on_after_backward(self, run: Trainer, pl_module: Any) -> None:
            if run.global_step == 11:
                gone = callback.removal() if setting.formula else {}
                seen.update(found=callback.penalty(), twin=copy.deepcopy(net), strength=callback.strength, gone=gone)

    run = trainer(callback, Look(), max_epochs=EPOCHS, precision="64-true")
    run.fit(Classifier(net, optimizer), image_loader(BATCHES))
    if setting.formula is None:
        assert seen["found"] is None and seen["strength"] == 0
        return
    if setting.method is MaskSparsity and optimizer == "adamw":  # scales are soft-thresholded instead
        assert seen["found"] is None and seen["strength"] > 0
        return
    value = setting.formula(seen["twin"], seen["gone"], seen["strength"])
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    gradients = {names[id(p)]: g for p, g in zip(seen["found"].parameters, seen["found"].gradients, strict=True)}
    twins = {name: parameter for name, parameter in seen["twin"].named_parameters() if parameter.requires_grad}
    wanted = dict(zip(twins, torch.autograd.grad(value, list(twins.values()), allow_unused=True), strict=True))
    assert torch.allclose(seen["found"].value, value.detach(), rtol=1e-12) and gradients.keys() <= twins.keys()
    for name, gradient in wanted.items():
        if gradient is None or not gradient.any():
            assert name not in gradients or not gradients[name].any()
        else:
            assert torch.allclose(gradients[name], gradient, rtol=1e-12, atol=1e-15), name


class Given(torch.autograd.Function):
    """A callback's value and gradients, as something a training step can add to its loss."""

    @staticmethod
    def forward(ctx: Any, found: Any, *parameters: Tensor) -> Tensor:
        ctx.gradients = found.gradients
        return found.value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # type: ignore[override]
        return None, *[upstream * gradient for gradient in ctx.gradients]


class Written(LightningModule):
    """The network in training; with a callback given, that callback's penalty is written into the loss.

    Under AdamW its gradient, times the learning rate, comes off the weights after each step, as weight decay does.
    """

    def __init__(self, net: nn.Module, optimizer: str, callback: Any, manual: bool) -> None:
        super().__init__()
        self.net = net
        self.kind = optimizer
        self.callback = callback
        self.automatic_optimization = not manual
        if callback is not None:
            self.penalty = callback.penalty
            callback.penalty = lambda: None

    def written(self) -> Tensor:
        """The callback's clock runs as it would in its own hook, which comes later."""
        self.callback.capture.build()
        manual = not self.automatic_optimization
        self.callback._advance(self.trainer, self.callback._ticks if manual else self.trainer.global_step)
        if self.kind == "adamw":
            return torch.zeros(())
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            found = self.penalty()
        return torch.zeros(()) if found is None else Given.apply(found, *found.parameters)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        loss = nn.functional.cross_entropy(self.net(batch[0]).float(), batch[1])
        if self.callback is not None:
            loss = loss + self.written()
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.kind](self.parameters())
        if self.callback is not None and self.kind == "adamw":
            optimizer.register_step_post_hook(self.decayed)
        return optimizer

    @torch.no_grad()
    def decayed(self, optimizer: Any, *_: Any) -> None:
        found = self.penalty() if self.callback._acts else None
        if found is not None:
            for parameter, gradient in zip(found.parameters, found.gradients, strict=True):
                parameter.sub_(gradient * optimizer.param_groups[0]["lr"])


class HasScaler(Callback):
    """A run that was meant to scale its gradients, and does."""

    def on_train_end(self, run: Trainer, pl_module: LightningModule) -> None:
        scaler = run.precision_plugin.scaler
        assert scaler is not None and scaler.get_scale() > 1


def half_precision() -> dict[str, Any]:
    plugin = MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=1024.0))
    return {"plugins": [plugin], "callbacks": [HasScaler()]}


CONFIGURATIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "accumulation": lambda: {"accumulate_grad_batches": 4},
    "bf16": lambda: {"precision": "bf16-mixed"},
    "clipping": lambda: {"gradient_clip_val": 0.1},
    "clipping by value": lambda: {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "averages": lambda: {"callbacks": [EMAWeightAveraging(decay=0.9)]},
    "fp16": half_precision,
    "fp16 and accumulation": lambda: {"accumulate_grad_batches": 4, **half_precision()},
    "manual": lambda: {"manual": True},
}


@ROWS
@EITHER_OPTIMIZER
@pytest.mark.filterwarnings("ignore:.*too few optimiser steps")
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_the_penalty_equals_the_one_written_in_training_step(row: str, optimizer: str, configuration: str) -> None:
    setting = SETTINGS[row]

    def outcome(is_written: bool) -> nn.Module:
        settings = CONFIGURATIONS[configuration]()
        extra, manual = settings.pop("callbacks", []), settings.pop("manual", False)
        # two steps an epoch where gradients are accumulated: as many epochs as the stage has steps, halved
        callback, epochs = setting.build(), 11 if "accumulate_grad_batches" in settings else EPOCHS
        module = Written(seeded(setting.net), optimizer, callback if is_written else None, manual)
        trainer(callback, *extra, max_epochs=epochs, **settings).fit(module, image_loader(BATCHES))
        assert callback.ready
        return module.net

    written, injected = outcome(True), outcome(False)
    assert distance(written, injected) == 0.0
    assert distance(written, seeded(setting.net)) > 0.01


class TwoOptimizers(Written):
    """Manual optimisation; each half of the network has an optimiser of its own."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        loss = nn.functional.cross_entropy(self.net(batch[0]).float(), batch[1])
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss if self.callback is None else loss + self.written())
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        layers: Any = self.net
        return [OPTIMIZERS[self.kind](half.parameters()) for half in (layers[:2], layers[2:])]


class Compiled(Written):
    """Compiled before it is fitted."""

    def __init__(self, net: nn.Module, *arguments: Any) -> None:
        super().__init__(torch.compile(net, backend="eager"), *arguments)  # type: ignore[arg-type]


def settings_of(name: str) -> dict[str, Any]:
    """One of the configurations that take longer or say less, for a row of every method."""
    return {
        "a window that changes": {"callbacks": [GradientAccumulationScheduler({0: 1, 1: 2})]},
        "compiled": {"kind": Compiled},
        "stochastic averages": {"callbacks": [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)]},
        "synchronised norms": {"strategy": Synchronising("cpu")},
        "two optimisers": {"kind": TwoOptimizers, "manual": True},
    }[name]


FURTHER = ["a window that changes", "compiled", "stochastic averages", "synchronised norms", "two optimisers"]


@pytest.mark.parametrize("row", ["ascp", "greg1", "greg2", "magnitude", "mask_sparsity", "tpp"])
@pytest.mark.parametrize("name", FURTHER)
@pytest.mark.filterwarnings("ignore:.*too few optimiser steps")
def test_so_it_does_in_rarer_configurations(row: str, name: str) -> None:
    setting = SETTINGS[row]

    def outcome(is_written: bool) -> nn.Module:
        settings = settings_of(name)
        extra, manual, kind = (
            settings.pop("callbacks", []),
            settings.pop("manual", False),
            settings.pop("kind", Written),
        )
        callback = setting.build()
        module = kind(seeded(setting.net), "sgd", callback if is_written else None, manual)
        trainer(callback, *extra, max_epochs=6, **settings).fit(module, image_loader(BATCHES))
        assert callback.ready
        return module.net

    written, injected = outcome(True), outcome(False)
    assert distance(written, injected) == 0.0
    assert distance(written, seeded(setting.net)) > 0.01


@pytest.mark.parametrize("row", [row for row, setting in SETTINGS.items() if setting.formula is None])
@EITHER_OPTIMIZER
def test_without_a_penalty_the_loss_is_bit_identical(row: str, optimizer: str) -> None:
    """Up to the first cut: the whole stage in one shot, its first epoch in steps."""
    setting = SETTINGS[row]
    losses: list[list[float]] = []

    class Loss(Callback):
        def on_train_batch_end(self, run: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
            losses[-1].append(outputs["loss"].item())

    callback = setting.build()
    for callbacks in ([callback], []):
        losses.append([])
        run = trainer(*callbacks, Loss(), max_epochs=EPOCHS)
        run.fit(Classifier(seeded(setting.net), optimizer), image_loader(BATCHES))
    same = callback.known_after(None, EPOCHS * BATCHES)
    assert losses[0][:same] == losses[1][:same]


# Checkpoints, arguments, neighbours.


@ROWS
@EITHER_OPTIMIZER
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_resumed_run_is_the_uninterrupted_one(row: str, optimizer: str, tmp_path: Path) -> None:
    """From checkpoints after each epoch of the stage but the last, which load with ``weights_only=True``."""
    setting = SETTINGS[row]
    keeper = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=BATCHES, save_top_k=-1)

    def outcome(path: Path | None) -> Any:
        callback = setting.build()
        module = Classifier(seeded(setting.net, seed=0 if path is None else 1), optimizer)
        extra = [keeper] if path is None else []
        run = trainer(callback, *extra, max_epochs=EPOCHS, enable_checkpointing=path is None)
        run.fit(module, image_loader(BATCHES), ckpt_path=path, weights_only=True)
        return callback, module.net

    callback, net = outcome(None)
    for step in (BATCHES, 2 * BATCHES):
        path = tmp_path / f"step={step}.ckpt"
        assert callback.state_key in torch.load(path, weights_only=True)["callbacks"]
        again, resumed = outcome(path)
        assert distance(net, resumed) == 0.0
        assert (again.phase, again.removal(), again.strength) == (callback.phase, callback.removal(), callback.strength)


@ROWS
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jsonargparse, about what LightningCLI calls as well
def test_arguments_are_stored_and_survive_yaml(row: str, tmp_path: Path) -> None:
    setting = SETTINGS[row]
    callback = setting.build(ignore=["0"], start=1, name="mine")
    names = list(inspect.signature(setting.method).parameters)
    values = {name: getattr(callback, name) for name in names}
    assert {"ratio": 0.5, **setting.arguments, "start": 1, "name": "mine"}.items() <= values.items()

    parser = LightningArgumentParser()
    parser.add_argument("--callback", type=setting.method)
    plain = {"ratio": 0.5, **setting.arguments, "ignore": ["0"], "start": 1, "name": "mine"}
    plain = {
        name: {"class_path": f"{type(value).__module__}.{type(value).__name__}", "init_args": asdict(value)}
        if is_dataclass(value) and not isinstance(value, type)
        else value
        for name, value in plain.items()
    }
    where = f"{setting.method.__module__}.{setting.method.__qualname__}"
    config = parser.parse_object({"callback": {"class_path": where, "init_args": plain}})
    (tmp_path / "config.yaml").write_text(parser.dump(config, skip_none=False))
    built = parser.instantiate_classes(parser.parse_path(tmp_path / "config.yaml")).callback
    assert type(built) is setting.method
    assert {name: getattr(built, name) for name in names} == values


@ROWS
def test_two_instances_share_nothing(row: str) -> None:
    """Side by side each does in its layer what it does alone, and neither writes into its arguments."""
    setting = SETTINGS[row]
    ignored = ["3"]
    first, second = setting.build(ignore=ignored), setting.build(ignore=["0"])
    trainer(first, second, max_epochs=EPOCHS).fit(Classifier(seeded(setting.net)), image_loader(BATCHES))
    assert set(first.removal()) == {"0"} and set(second.removal()) == {"3"}
    assert first.state_key != second.state_key and ignored == ["3"]
    untouched = setting.build()
    assert untouched.phase == "wait"
    with pytest.raises(PlanError, match=r"has picked no (channels|weights) yet"):
        untouched.removal()
