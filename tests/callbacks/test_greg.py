"""The contract of a regulariser, kept by GReg-1 and GReg-2 under SGD and AdamW."""

from __future__ import annotations

import copy
import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_prune.callbacks.base import PHASES, Regulariser
from lightning_prune.callbacks.greg import GReg1, GReg2
from lightning_prune.callbacks.structural import StructuralPruning
from lightning_prune.errors import ConfigurationError, PlanError
from lightning_prune.schedules import GREG1_CIFAR, GREG2_IMAGENET, Dynamics, GReg1Schedule, GReg2Schedule
from lightning_prune.structure import trace
from lightning_prune.structure.proof import masked_state
from tests.callbacks.nets import (
    OPTIMIZERS,
    Classifier,
    conv_net,
    feature_loader,
    image_loader,
    linear_net,
    seeded,
    trainer,
)

BOTH = pytest.mark.parametrize("method", [GReg1, GReg2])
EITHER_OPTIMIZER = pytest.mark.parametrize("optimizer", OPTIMIZERS)
SHORT = "ignore:.*too few optimiser steps"
PARTIAL = "ignore:Be aware that when using `ckpt_path`"

SMALL1 = GReg1Schedule(delta=0.1, ceiling=0.5, update_every=2, hold=5, stop_ratio=None)
SMALL2 = GReg2Schedule(0.01, 0.02, 0.1, 0.52, update_every=2, hold=5, kept=-0.01, stop_ratio=None)


def small(method: type[Any]) -> Any:
    return SMALL1 if method is GReg1 else SMALL2


class Diary(Callback):
    """Phase, strength and weights at every step, as they act in that step."""

    def __init__(self, regulariser: Regulariser) -> None:
        self.regulariser = regulariser
        self.phases: list[str] = []
        self.strengths: list[float] = []
        self.epoch_ends: list[str] = []
        self.shown: list[dict[str, float]] = []

    def on_after_backward(self, run: Any, pl_module: LightningModule) -> None:
        self.phases.append(self.regulariser.phase)
        self.strengths.append(self.regulariser.strength)

    def on_train_batch_end(self, run: Any, *_: Any) -> None:
        self.shown.append({key: float(value) for key, value in run.progress_bar_metrics.items()})

    def on_train_epoch_end(self, run: Any, pl_module: LightningModule) -> None:
        self.epoch_ends.append(self.regulariser.phase)


def fit(regulariser: Any, net: nn.Module, loader: Any, optimizer: str = "sgd", **kwargs: Any) -> Diary:
    callbacks = regulariser if isinstance(regulariser, list) else [regulariser]
    diary = Diary(callbacks[0])
    trainer(*callbacks, diary, *kwargs.pop("callbacks", []), **kwargs).fit(Classifier(net, optimizer), loader)
    return diary


# Schedules and phases.


@BOTH
@EITHER_OPTIMIZER
def test_the_strength_is_the_closed_form_at_every_step(method: Any, optimizer: str) -> None:
    schedule = small(method)
    diary = fit(method(0.5, schedule=schedule), seeded(linear_net), feature_loader(4), optimizer, max_epochs=6)
    assert diary.strengths == [schedule.strength(step) for step in range(24)]
    expected = [
        "pick" if step < schedule.pick_step else "grow" if step < schedule.last_event else "hold"
        for step in range(schedule.length)
    ]
    assert diary.phases == expected + ["ready"] * (24 - schedule.length)


@BOTH
@EITHER_OPTIMIZER
@pytest.mark.filterwarnings(SHORT)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_epochs_end_exactly(method: Any, optimizer: str, accumulate: int) -> None:
    regulariser = method(0.5, start=1, epochs=2)
    kwargs = {"max_epochs": 4, "accumulate_grad_batches": accumulate}
    diary = fit(regulariser, seeded(linear_net), feature_loader(8), optimizer, **kwargs)
    assert diary.epoch_ends[0] == "wait"
    assert diary.epoch_ends[1] in ("grow", "hold")
    assert diary.epoch_ends[2:] == ["ready", "ready"]
    assert set(diary.phases[:8]) == {"wait"} and set(diary.strengths[:8]) == {0.0}
    steps = -(-8 // accumulate)
    assert regulariser.state_dict()["origin"] == steps
    assert method.schedule_type(**regulariser.state_dict()["schedule"]).length == 2 * steps
    changes = [index for index in range(8, 24) if diary.strengths[index] != diary.strengths[index - 1]]
    assert all(index % 8 % accumulate == 0 for index in changes) and changes[0] == 8


def test_channels_are_picked_from_the_weights_at_the_start_epoch() -> None:
    net = seeded(linear_net)

    picks: dict[str, Any] = {}

    class Look(Callback):
        def on_train_epoch_start(self, run: Any, pl_module: Any) -> None:
            if run.current_epoch == 2:
                weight = net[2].weight.detach().abs().mean(1)
                picks["2"] = tuple(sorted(weight.argsort()[:6].tolist()))

    regulariser = GReg1(0.5, start=2, schedule=SMALL1, ignore=["0"])
    fit(regulariser, net, feature_loader(8), callbacks=[Look()], max_epochs=5)
    assert regulariser.removal() == picks


@pytest.mark.parametrize("width", [8, 16])
def test_widths_are_those_of_the_papers(width: int) -> None:
    regulariser = GReg1(0.75, schedule=SMALL1, ratios={"3": 0.9})
    fit(regulariser, seeded(conv_net, width), image_loader(2), max_epochs=8)
    kept = {name: width - len(channels) for name, channels in regulariser.removal().items()}
    assert kept == {"0": width // 4, "3": 1}


@BOTH
def test_a_ratio_that_stops_growth_stops_it_in_good_time(method: Any) -> None:
    """GReg-1 waits for every layer, GReg-2 stops each by itself; the hold counts from the last."""
    schedule = (
        GReg1Schedule(0.05, 5.0, 2, 9, stop_ratio=5.0, check_every=4)
        if method is GReg1
        else GReg2Schedule(0.01, 0.02, 0.05, 5.02, 2, 9, stop_ratio=5.0, check_every=4)
    )
    regulariser = method(0.5, schedule=schedule)
    diary = fit(regulariser, seeded(linear_net), feature_loader(8), max_epochs=40)
    stopped = regulariser.state_dict()["method"]["stopped"]
    assert set(stopped) == {"0", "2"}
    assert all(event % 4 == 0 and event < schedule.events - 1 for event in stopped.values())
    assert len(set(stopped.values())) == 1 or method is GReg2
    last = max(stopped.values()) * 2
    assert diary.phases.index("hold") == last
    assert diary.phases.index("ready") == last + 9 + 1
    assert set(diary.strengths[last:]) == {schedule.strength(last)}


@BOTH
def test_the_clock_counts_steps_of_the_optimiser_that_holds_the_channels(method: Any) -> None:
    class Two(Classifier):
        def __init__(self) -> None:
            super().__init__(seeded(linear_net))
            self.automatic_optimization = False
            self.temperature = nn.Parameter(torch.ones(1))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            other, net = self.optimizers()  # type: ignore[attr-defined]
            for optimizer in [other, other, net]:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(self.net(batch[0]) * self.temperature, batch[1])
                self.manual_backward(loss)
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([self.temperature], lr=0.01), torch.optim.SGD(self.net.parameters(), lr=0.05)

    schedule = small(method)
    regulariser = method(0.5, schedule=schedule)
    strengths: list[float] = []

    class Look(Callback):
        def on_train_batch_end(self, run: Any, *_: Any) -> None:
            strengths.append(regulariser.strength)

    run = trainer(regulariser, Look(), max_epochs=3)
    run.fit(Two(), feature_loader(8))
    assert run.global_step == 72
    assert strengths == [schedule.strength(step) for step in range(24)]
    assert regulariser.state_dict()["ticks"] == 24 and regulariser.ready


@pytest.mark.parametrize(("per_batch", "every"), [(3, 1), (1, 2)])
@BOTH
def test_a_derived_stage_counts_with_the_steps_that_a_batch_had_so_far(method: Any, per_batch: int, every: int) -> None:
    class Own(Classifier):
        def __init__(self) -> None:
            super().__init__(seeded(linear_net))
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            for _ in range(per_batch):
                optimizer.zero_grad()
                self.manual_backward(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
                if batch_idx % every == 0:
                    optimizer.step()

    regulariser, phases = method(0.5, start=1, epochs=2), []

    class Look(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            phases.append(regulariser.phase)

    with pytest.warns(UserWarning, match="too few optimiser steps"):
        trainer(regulariser, Look(), max_epochs=3).fit(Own(), feature_loader(8))
    state = regulariser.state_dict()
    assert (state["origin"], state["ticks"]) == (8 * per_batch // every, 24 * per_batch // every)
    assert method.schedule_type(**state["schedule"]).length == 16 * per_batch // every
    assert phases[8] in ("pick", "grow") and phases[22] == "hold" and regulariser.ready


# What is penalised.


def gradients(regulariser: Any, net: nn.Module, loader: Any, steps: int) -> list[list[Tensor]]:
    """In the last step: gradients, weights, and gradients of the loss alone."""
    seen: list[list[Tensor]] = []

    class Look(Callback):
        def on_after_backward(self, run: Any, pl_module: Any) -> None:
            seen[:] = [[p.grad.clone() for p in net.parameters()], [p.detach().clone() for p in net.parameters()]]

        def on_before_backward(self, run: Any, pl_module: Any, loss: Tensor) -> None:
            if run.global_step == steps - 1:
                plain[:] = loss_gradients(net, pl_module.batch)

    class Kept(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.batch = batch
            return super().training_step(batch, batch_idx)

    plain: list[Tensor] = []
    trainer(regulariser, Look(), max_steps=steps, max_epochs=-1).fit(Kept(net), loader)
    return [*seen, plain]


def loss_gradients(net: nn.Module, batch: list[Tensor]) -> list[Tensor]:
    twin = copy.deepcopy(net)
    twin.zero_grad()
    nn.functional.cross_entropy(twin(batch[0]), batch[1]).backward()
    return [parameter.grad for parameter in twin.parameters()]  # type: ignore[misc]


@pytest.mark.parametrize("coupled", [True, False])
@BOTH
def test_the_penalty_reaches_what_it_should(method: Any, coupled: bool) -> None:
    net, steps = seeded(conv_net), 24
    regulariser = method(0.5, schedule=small(method), coupled=coupled)
    with_penalty, weights, plain = gradients(regulariser, net, image_loader(8), steps)
    strength, kept = regulariser.strength, 0.0 if method is GReg1 else -0.01
    gone = {layer: list(channels) for layer, channels in regulariser.removal().items()}

    def rows(index: int, layer: str, along: int = 0, rest: float = 0.0) -> Tensor:
        factor = torch.full((weights[index].shape[along],), rest)
        factor[gone[layer]] = strength
        return factor.view([-1 if axis == along else 1 for axis in range(weights[index].dim())])

    expected: dict[int, Tensor] = {0: rows(0, "0", rest=kept), 4: rows(4, "3", rest=kept)}
    if coupled:
        columns = rows(4, "0", along=1)
        expected[4] = torch.where(torch.maximum(expected[4], columns) > 0, torch.tensor(strength), expected[4])
        expected |= {1: rows(1, "0"), 2: rows(2, "0"), 3: rows(3, "0"), 5: rows(5, "3"), 6: rows(6, "3")}
        expected[7] = rows(7, "3", along=1)
    for index, weight in enumerate(weights):
        wanted = expected.get(index, torch.zeros(1)) * weight
        found = with_penalty[index] - plain[index]
        assert torch.allclose(found, wanted, atol=2e-7, rtol=1e-4), index
        assert (index not in expected) or wanted.abs().max() > 0


@BOTH
@EITHER_OPTIMIZER
@pytest.mark.parametrize(("net", "loader"), [(conv_net, image_loader), (linear_net, feature_loader)])
def test_doomed_channels_collapse_and_leave_without_a_trace(method: Any, optimizer: str, net: Any, loader: Any) -> None:
    built, batches = seeded(net), loader(20)
    regulariser = method(0.5, start=2, epochs=15)
    diary = fit(regulariser, built, batches, optimizer, max_epochs=18)
    assert regulariser.ready
    assert 0 <= regulariser.energy() < 1e-6
    assert diary.shown[-1][f"{method.__name__.lower()}/energy"] < 1e-6
    images = next(iter(batches))[0]
    built.eval()
    with torch.no_grad():
        dense = built(images)
        slim = torch.func.functional_call(
            built, masked_state(built, trace(built, images).plan(regulariser.removal())), (images,)
        )
    assert (dense - slim).norm() / dense.norm() < 1e-3
    assert dense.std() > 0.01


def test_the_published_form_leaves_a_trace() -> None:
    """Why ``coupled`` exists: without it the consumers' columns and the norm make up for what shrinks."""
    built, batches = seeded(conv_net), image_loader(20)
    regulariser = GReg1(0.5, start=2, epochs=15, coupled=False)
    fit(regulariser, built, batches, max_epochs=18)
    images = next(iter(batches))[0]
    built.eval()
    with torch.no_grad():
        plan = trace(built, images).plan(regulariser.removal())
        slim = torch.func.functional_call(built, masked_state(built, plan), (images,))
        assert (built(images) - slim).norm() / built(images).norm() > 0.05


def test_adaptive_optimisers_get_a_decay_after_the_step(caplog: pytest.LogCaptureFixture) -> None:
    schedule = GReg1Schedule(delta=50.0, ceiling=200.0, update_every=3, hold=3, stop_ratio=None)
    net = seeded(linear_net)

    class Look(Callback):
        """AdamW's own step, seen between the gradients and the end of the batch."""

        def on_before_optimizer_step(self, run: Any, pl_module: Any, optimizer: Any) -> None:
            twin = copy.deepcopy(net)
            own = torch.optim.AdamW(twin.parameters(), lr=1e-3)
            own.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            for mine, theirs in zip(twin.parameters(), net.parameters(), strict=True):
                mine.grad = theirs.grad.clone()  # type: ignore[union-attr]
            own.step()
            self.expected = twin[2].weight.detach()[rows()] * (1 - 1e-3 * regulariser.strength)

        def on_train_batch_end(self, *_: Any) -> None:
            assert torch.allclose(net[2].weight.detach()[rows()], self.expected, atol=1e-7)

    regulariser = GReg1(0.5, schedule=schedule, ignore=["0"], coupled=False)

    def rows() -> list[int]:
        return list(regulariser.removal()["2"])

    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        fit(regulariser, net, feature_loader(8), "adamw", callbacks=[Look()], max_epochs=2)
    said = [record.message for record in caplog.records if "AdamW" in record.message]
    assert said == ["greg1: AdamW rescales gradients, so weights decay by it after each step instead."]


@pytest.mark.parametrize("gamma", [0.5, 3.0])
@pytest.mark.filterwarnings(SHORT)
def test_learning_rate_times_strength_outlives_learning_rate_schedules(gamma: float) -> None:
    class Scheduled(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=gamma)]

    products: list[float] = []

    class Look(Callback):
        def on_after_backward(self, run: Any, pl_module: Any) -> None:
            products.append(run.optimizers[0].param_groups[0]["lr"] * regulariser.strength)

    regulariser = GReg1(0.5, epochs=3)
    trainer(regulariser, Look(), max_epochs=3).fit(Scheduled(seeded(linear_net)), feature_loader(8))
    schedule = GReg1Schedule(**regulariser.state_dict()["schedule"])
    assert products == pytest.approx([0.05 * schedule.strength(step) for step in range(24)])


def test_frozen_parameters_are_left_alone() -> None:
    net = seeded(linear_net)
    net[0].requires_grad_(False)
    before = net[0].weight.clone()
    fit(GReg1(0.5, schedule=SMALL1), net, feature_loader(8), max_epochs=3)
    assert torch.equal(before, net[0].weight)


# Resume.


@BOTH
@EITHER_OPTIMIZER
@pytest.mark.filterwarnings(PARTIAL, "ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("early", [False, True])
def test_a_run_resumed_at_any_step_is_the_uninterrupted_run(
    method: Any, optimizer: str, early: bool, tmp_path: Path
) -> None:
    schedule: Any = small(method)
    if early:
        schedule = (
            GReg1Schedule(0.1, 5.0, 2, 5, stop_ratio=1.8, check_every=2)
            if method is GReg1
            else GReg2Schedule(0.01, 0.02, 0.1, 5.02, 2, 5, -0.01, stop_ratio=1.8, check_every=2)
        )

    # every batch is the same, so that it doesn't matter at which one a loader goes on
    images, labels = next(iter(feature_loader(1)))
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images.repeat(8, 1), labels.repeat(8)), batch_size=len(images)
    )

    def run(folder: Path | None, ckpt: Path | None) -> tuple[nn.Module, Any]:
        regulariser = method(0.5, start=1, schedule=schedule)
        built = Classifier(seeded(linear_net), optimizer)
        callbacks = [] if folder is None else [ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)]
        kwargs: dict[str, Any] = {"max_epochs": 16, "enable_checkpointing": folder is not None}
        trainer(regulariser, *callbacks, **kwargs).fit(built, loader, ckpt_path=ckpt, weights_only=True)
        return built.net, regulariser

    whole, first = run(tmp_path, None)
    stopped = first.state_dict()["method"]["stopped"]
    assert bool(stopped) is early
    steps = [3, 8, 9, 8 + schedule.pick_step + 1, 8 + schedule.pick_step + 2, 14, 19, 21, 25]
    for step in sorted(set(steps)):
        resumed, second = run(None, tmp_path / f"step={step}.ckpt")
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True)), step
        assert second.removal() == first.removal() and second.phase == first.phase == "ready"


@pytest.mark.filterwarnings(SHORT, PARTIAL)
def test_a_checkpoint_from_the_last_validation_of_the_stage_resumes_ready(tmp_path: Path) -> None:
    class Validated(Classifier):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.net(batch[0])

    def run(epochs: int, ckpt: Path | None, *callbacks: Any) -> Any:
        regulariser = GReg1(0.5, epochs=2)
        loader = feature_loader(8)
        settings: dict[str, Any] = {
            "max_epochs": epochs,
            "num_sanity_val_steps": 0,
            "enable_checkpointing": bool(callbacks),
        }
        trainer(regulariser, *callbacks, **settings).fit(
            Validated(seeded(linear_net)), loader, loader, ckpt_path=ckpt, weights_only=True
        )
        return regulariser

    run(2, None, ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=False))
    state = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["callbacks"]
    assert [value["phase"] for key, value in state.items() if key.startswith("GReg1")] == ["hold"]
    assert run(3, tmp_path / "epoch=1.ckpt").ready


def test_the_state_is_plain(tmp_path: Path) -> None:
    regulariser = GReg2(0.5, schedule=GReg2Schedule(0.01, 0.02, 0.1, 0.52, 2, 5, check_every=2))
    fit(regulariser, seeded(linear_net), feature_loader(8), max_epochs=3)
    torch.save(regulariser.state_dict(), tmp_path / "state.pt")
    twin = GReg2(0.5, schedule=SMALL2)
    twin.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (twin.phase, twin.removal()) == (regulariser.phase, regulariser.removal())


# Several regularisers, several trainers.


def test_two_of_one_class_work_side_by_side() -> None:
    first = GReg1(0.5, schedule=SMALL1, ignore=["2"])
    second = GReg1(0.25, schedule=SMALL1, ignore=["0"])
    assert first.state_key != second.state_key
    diary = fit([first, second], seeded(linear_net), feature_loader(8), max_epochs=3)
    assert set(first.removal()) == {"0"} and set(second.removal()) == {"2"}
    assert {"greg1/strength", "greg1_2/strength"} <= set(diary.shown[-1])


def test_two_for_the_same_layer_are_refused_before_the_first_step() -> None:
    both = [GReg1(0.5, schedule=SMALL1), GReg2(0.5, schedule=SMALL2, ignore=["0"])]
    with pytest.raises(ConfigurationError, match="Two regularisers have picked channels of '2'"):
        fit(both, seeded(linear_net), feature_loader(8), callbacks=[Untouched()], max_epochs=3)


def test_a_name_is_the_whole_state_key() -> None:
    assert GReg1(0.5, schedule=SMALL1, name="a").state_key == GReg1(0.7, epochs=3, name="a").state_key
    assert GReg1(0.5, schedule=SMALL1, name="a").state_key != GReg2(0.5, schedule=SMALL2, name="a").state_key
    assert GReg1(0.5, epochs=3).state_key == GReg1(0.5, epochs=4).state_key


def test_a_second_trainer_begins_anew() -> None:
    regulariser = GReg1(0.5, schedule=SMALL1)
    fit(regulariser, seeded(linear_net), feature_loader(8), max_epochs=3)
    assert regulariser.ready
    diary = fit(regulariser, seeded(linear_net, seed=3), feature_loader(8), max_epochs=3)
    assert diary.phases[0] == "grow" and diary.strengths[0] == SMALL1.strength(0)


def test_a_second_fit_of_the_same_trainer_goes_on() -> None:
    regulariser = GReg1(0.5, schedule=SMALL1)
    module, run = Classifier(seeded(linear_net)), trainer(regulariser, max_epochs=3)
    run.fit(module, feature_loader(8))
    removal = regulariser.removal()
    run.fit_loop.max_epochs = 4
    run.fit(module, feature_loader(8))
    assert regulariser.ready and regulariser.removal() == removal and run.current_epoch == 4


def test_a_released_regulariser_is_silent() -> None:
    regulariser = GReg1(0.5, schedule=SMALL1)

    class Surgeon(Callback):
        def on_train_epoch_start(self, run: Any, pl_module: Any) -> None:
            if regulariser.ready:
                regulariser.release()

    diary = fit(regulariser, seeded(linear_net), feature_loader(16), "adamw", callbacks=[Surgeon()], max_epochs=2)
    assert diary.phases[-16:] == ["done"] * 16 and diary.strengths[-16:] == [0.0] * 16
    assert regulariser.finished and not regulariser.ready and regulariser.energy() == 0
    assert regulariser.removal()


def test_models_that_return_dicts_are_welcome() -> None:
    class Dict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = linear_net()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.body(x)}

    class Module(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0])["logits"], batch[1])

    regulariser = GReg1(0.5, schedule=SMALL1)
    trainer(regulariser, max_epochs=3).fit(Module(Dict()), feature_loader(8))
    assert set(regulariser.removal()) == {"body.0", "body.2"}


def test_everything_is_logged() -> None:
    diary = fit(GReg1(0.5, schedule=SMALL1), seeded(linear_net), feature_loader(8), max_epochs=3, log_every_n_steps=1)
    assert [shown["greg1/strength"] for shown in diary.shown] == pytest.approx([SMALL1.strength(s) for s in range(24)])
    assert [PHASES[int(shown["greg1/phase"])] for shown in diary.shown] == [*diary.phases[:13], *["ready"] * 11]
    energies = [shown["greg1/energy"] for shown in diary.shown]
    assert energies[0] == pytest.approx(1, abs=0.1) and energies[-1] < energies[0]


@pytest.mark.filterwarnings(SHORT, "ignore:.*energy was left")
def test_the_phase_that_is_shown_is_the_present_one(tmp_path: Path) -> None:
    """With Lightning's default of a log line every 50 steps, and through surgery to the end."""
    shown: list[int] = []

    class Bar(Callback):
        def on_train_batch_start(self, run: Any, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
            shown.append(int(run.progress_bar_metrics.get("greg1/phase", 0)))

    run = trainer(GReg1(0.5, epochs=2), StructuralPruning(), Bar(), max_epochs=4, default_root_dir=tmp_path)
    run.fit(Classifier(seeded(linear_net)), feature_loader(8))
    assert [PHASES[phase] for phase in dict.fromkeys(shown)] == ["wait", "grow", "hold", "done"]
    assert shown[17:] == [PHASES.index("done")] * 15
    assert run.progress_bar_metrics["greg1/strength"] == run.progress_bar_metrics["greg1/energy"] == 0


# The door.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 0.0}, "ratio=0.0"),
        ({"ratio": 1.0}, "ratio=1.0"),
        ({"ratio": float("nan")}, "ratio=nan"),
        ({"ratio": "0.5"}, "ratio='0.5' must be a number"),
        ({"ratios": {"a": "0.5"}}, "ratios\\['a'\\]='0.5' must be a number"),
        ({"round_to": 1.5}, "round_to=1.5 must be a whole number"),
        ({"start": None}, "start=None must be a whole number"),
        ({"ratios": {"a": 1.0}}, "ratios"),
        ({"ignore": "a"}, "list of patterns"),
        ({"scope": "some"}, "scope='some'"),
        ({"round_to": 0}, "round_to=0"),
        ({"start": -1}, "start=-1"),
        ({"epochs": 0}, "epochs=0"),
        ({"epochs": None}, "exactly one of epochs"),
        ({"schedule": "cifar"}, "exactly one of epochs"),
        ({"epochs": None, "schedule": "mnist"}, r"schedule='mnist' must be one of \['cifar', 'imagenet'\]"),
    ],
)
@BOTH
def test_arguments_out_of_range_are_refused_in_one_line(method: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        method(**{"ratio": 0.5, "epochs": 2, **arguments})
    assert "\n" not in str(caught.value)


class Untouched(Callback):
    """Asserts that a refused run has taken no step."""

    def on_exception(self, run: Any, pl_module: Any, exception: BaseException) -> None:
        assert run.global_step == 0 and not any(optimizer.state for optimizer in run.optimizers)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ({"epochs": 3}, {"max_epochs": 2}, "start=0 and epochs=3 don't fit into max_epochs=2"),
        ({"epochs": 1, "start": 2}, {"max_epochs": 2}, "start=2 and epochs=1 don't fit into max_epochs=2"),
        ({"epochs": 2}, {"max_steps": 9, "max_epochs": -1}, "don't fit into max_steps=9"),
        ({"schedule": SMALL1}, {"max_epochs": 1}, "14 optimiser steps of schedule don't fit into max_epochs=1 of 8"),
        ({"schedule": SMALL1, "start": 1}, {"max_epochs": 2}, "don't fit into max_epochs=2"),
        ({"schedule": SMALL1}, {"max_epochs": 2, "accumulate_grad_batches": 2}, "max_epochs=2 of 4 steps"),
        ({"schedule": SMALL1, "ignore": ["nothing*"]}, {"max_epochs": 3}, r"'nothing\*' does not match a layer"),
        ({"schedule": SMALL1, "ratios": {"nothing": 0.5}}, {"max_epochs": 3}, "'nothing' does not match a layer"),
        ({"schedule": SMALL1, "ignore": ["*"]}, {"max_epochs": 3}, "finds no layer to prune"),
        ({"schedule": SMALL1, "round_to": 64}, {"max_epochs": 3}, "removes no channel"),
        ({"schedule": GReg1Schedule(10.0, 30.0, 1, 1)}, {"max_epochs": 3}, "learning rate 0.05 times ceiling 30"),
        ({"schedule": SMALL1, "module": "nett"}, {"max_epochs": 3}, "'nett' is no part"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(
    arguments: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        fit(GReg1(0.5, **arguments), seeded(linear_net), feature_loader(8), callbacks=[Untouched()], **settings)
    assert "\n" not in str(caught.value)


def test_a_loader_without_length_needs_batches_or_steps() -> None:
    class Endless(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return itertools.repeat((torch.ones(6), 1), 64)

    loader = torch.utils.data.DataLoader(Endless(), batch_size=8)
    with pytest.raises(ConfigurationError, match="limit_train_batches"):
        fit(GReg1(0.5, epochs=1), seeded(linear_net), loader)
    fit(GReg1(0.5, schedule=SMALL1), seeded(linear_net), loader, max_epochs=3)


def test_weights_that_are_not_finite_are_refused() -> None:
    net = seeded(linear_net)
    with torch.no_grad():
        net[2].weight[0, 0] = float("nan")
    with pytest.raises(ConfigurationError, match="not all finite"):
        fit(GReg1(0.5, schedule=SMALL1), net, feature_loader(8), max_epochs=3)


def test_a_stage_too_short_to_collapse_is_said_to_be() -> None:
    with pytest.warns(UserWarning, match=r"too few optimiser steps \(8\).*exp\(-10\) is needed; give more epochs"):
        fit(GReg1(0.5, epochs=1), seeded(linear_net), feature_loader(8), max_epochs=1)


@BOTH
@pytest.mark.parametrize("length", [{"schedule": "cifar"}, {"epochs": 1}, {"epochs": 5, "start": 2}])
def test_a_dry_run_needs_no_room_for_the_schedule(method: Any, length: dict[str, Any]) -> None:
    fit(method(0.5, **length), seeded(linear_net), feature_loader(8), fast_dev_run=True)


def test_presets_are_the_published_constants() -> None:
    assert GReg1(0.5, schedule="cifar").begin(None, Dynamics(1e-3)) == GREG1_CIFAR
    assert GReg2(0.5, schedule="imagenet").begin(None, Dynamics(1e-3)) == GREG2_IMAGENET


@BOTH
def test_a_frozen_network_is_refused(method: Any) -> None:
    """Before the first step; what is thawed before the stage begins is no matter."""

    class Frozen(Classifier):
        def __init__(self) -> None:
            super().__init__(seeded(linear_net).requires_grad_(False))
            self.temperature = nn.Parameter(torch.ones(1))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step([batch[0] * self.temperature, batch[1]], batch_idx)

    with pytest.raises(ConfigurationError, match="to shrink are frozen; unfreeze them"):
        trainer(method(0.5, epochs=1), Untouched(), max_epochs=2).fit(Frozen(), feature_loader(4))


def test_removal_before_the_pick_is_an_error() -> None:
    with pytest.raises(PlanError, match="has picked no channels yet"):
        GReg1(0.5, epochs=2).removal()
