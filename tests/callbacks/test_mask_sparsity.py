"""MaskSparsity: masks, strengths, the hold that makes surgery lossless, resume, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_prune.callbacks.checkpointing import load_from_checkpoint
from lightning_prune.callbacks.loading import LoadPruned
from lightning_prune.callbacks.mask_sparsity import MaskSparsity, MaskStage
from lightning_prune.callbacks.masks import doomed_channels, vote
from lightning_prune.callbacks.structural import StructuralPruning
from lightning_prune.errors import ConfigurationError
from lightning_prune.reports.cost import count_cost
from lightning_prune.schedules import MASK_SPARSITY, MaskSparsityStrength
from lightning_prune.structure import load_slim, masked_state, prune_, save_slim, trace
from tests.callbacks.nets import OPTIMIZERS, Classifier, conv_net, image_loader, linear_net, seeded, trainer
from tests.callbacks.slimming import Residual

EITHER_OPTIMIZER = pytest.mark.parametrize("optimizer", OPTIMIZERS)
PARTIAL = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`", "ignore:You're resuming from a checkpoint that ended before"
)
SLOW = pytest.mark.filterwarnings("ignore:.*moves a scale by at most")


class Diary(Callback):
    """Phase, strength and picked channels at every step, as they act in that step."""

    def __init__(self, method: MaskSparsity) -> None:
        self.method = method
        self.phases: list[str] = []
        self.strengths: list[float] = []
        self.picked: list[dict[str, tuple[int, ...]]] = []

    def on_after_backward(self, run: Any, pl_module: Any) -> None:
        self.phases.append(self.method.phase)
        self.strengths.append(self.method.strength)
        self.picked.append({} if self.method.phase in ("wait", "pick") else self.method.removal())


def net(width: int = 8) -> nn.Sequential:
    """Two groups with scales that differ from channel to channel."""
    built = seeded(conv_net, width)
    with torch.no_grad():
        for place in (1, 4):
            built[place].weight.copy_(torch.linspace(0.5, 1.5, width).roll(place))
    return built


def fit(method: MaskSparsity, model: nn.Module, optimizer: str = "sgd", batches: int = 8, **settings: Any) -> Diary:
    diary = Diary(method)
    callbacks = [method, diary, *settings.pop("callbacks", [])]
    trainer(*callbacks, **settings).fit(Classifier(model, optimizer), image_loader(batches))
    return diary


def removal_error(model: nn.Module, method: MaskSparsity) -> float:
    """Relative difference of the outputs with and without what will go, in eval mode."""
    images = next(iter(image_loader(20)))[0]
    model.eval()
    with torch.no_grad():
        dense = model(images)
        plan = trace(model, images).plan(method.removal())
        masked = torch.func.functional_call(model, masked_state(model, plan), (images,))
    assert dense.std() > 0.01
    return float((dense - masked).norm() / dense.norm())


def norms_of(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


# Removal without a trace.


@EITHER_OPTIMIZER
@pytest.mark.parametrize(("build", "scope"), [(conv_net, "inner"), (Residual, "all")])
def test_removal_after_the_stage_changes_nothing(optimizer: str, build: Any, scope: Any) -> None:
    model = seeded(build)
    method = MaskSparsity(0.5, start=1, epochs=4, scope=scope)
    diary = fit(method, model, optimizer, max_epochs=5)
    assert method.ready and method.energy() == 0
    assert removal_error(model, method) < 1e-6
    assert len(method.removal()) == 2
    assert diary.phases == ["wait"] * 8 + ["grow"] * 26 + ["hold"] * 6


@EITHER_OPTIMIZER
def test_outputs_before_and_after_surgery_are_equal(optimizer: str) -> None:
    images = next(iter(image_loader(8)))[0]
    outputs: dict[bool, Tensor] = {}

    class Look(Callback):
        def on_validation_epoch_end(self, run: Any, pl_module: Any) -> None:
            outputs[pruning.plan is not None] = pl_module.net(images).clone()

        def on_train_epoch_start(self, run: Any, pl_module: Any) -> None:
            if run.current_epoch == 4:
                run.should_stop = True

    class Validated(Classifier):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    pruning = StructuralPruning(monitor="accuracy", latency_batches=(), report_file=None)
    module, loader = Validated(net(), optimizer), image_loader(8)
    run = trainer(MaskSparsity(0.5, epochs=4), pruning, Look(), max_epochs=5, limit_train_batches=8)
    run.fit(module, loader, loader)
    assert module.net[0].weight.shape[0] == 4
    assert pruning.report is not None and pruning.report.accuracy["before"] == pruning.report.accuracy["after"]


@SLOW
def test_without_the_biases_a_constant_is_lost() -> None:
    """Why ``penalize_bias`` exists: the scales are zero all the same, and what is removed still emits act(bias)."""
    model, loader = net(), {"batches": 20, "max_epochs": 15}
    method = MaskSparsity(0.5, epochs=15, penalize_bias=False)
    with torch.no_grad():
        for norm in norms_of(model):
            norm.bias.fill_(0.5)
    fit(method, model, **loader)  # type: ignore[arg-type]
    for norm, channels in zip(norms_of(model), method.removal().values(), strict=True):
        assert not norm.weight[list(channels)].any() and norm.bias[list(channels)].all()
    assert removal_error(model, method) > 0.05


@EITHER_OPTIMIZER
@SLOW
def test_constants_of_the_paper_have_neither_correction_nor_hold(optimizer: str) -> None:
    model = net()
    diary = fit(MaskSparsity(0.5, epochs=2, constants="imagenet"), model, optimizer, max_epochs=2)
    assert set(diary.strengths) == {5e-4} and set(diary.phases) == {"grow"}
    assert all(norm.weight.all() for norm in norms_of(model))


def test_constants_too_weak_for_the_stage_are_said_to_be() -> None:
    with pytest.warns(UserWarning, match=r"0\.0005 moves a scale by at most 0\.002 in 8 optimiser steps.*is 0\.93"):
        fit(MaskSparsity(0.5, epochs=1, constants="imagenet"), net())


# Masks.


def test_the_smallest_scales_go() -> None:
    model = net()
    method = MaskSparsity(0.5, epochs=1)
    fit(method, model)
    # 0.5 to 1.5, rolled by 1 and by 4
    assert method.removal() == {"0": (1, 2, 3, 4), "3": (4, 5, 6, 7)}


def test_a_threshold_is_absolute_and_widths_are_rounded() -> None:
    method = MaskSparsity(threshold=0.93, epochs=1)
    fit(method, net())
    assert {name: len(gone) for name, gone in method.removal().items()} == {"0": 4, "3": 4}
    method = MaskSparsity(threshold=0.93, epochs=1, round_to=3, ignore=["3"])
    fit(method, net())
    assert {name: len(gone) for name, gone in method.removal().items()} == {"0": 2}


def test_one_channel_stays_below_a_threshold() -> None:
    model = net()
    with torch.no_grad():
        model[1].weight.mul_(0.1)
    method = MaskSparsity(threshold=0.2, epochs=1)
    fit(method, model)
    assert method.removal() == {"0": tuple(channel for channel in range(8) if channel != 0)}


@pytest.mark.parametrize(
    ("threshold", "message"),
    [(0.01, "0 of 16 norm scales are at most threshold=0.01; choose a larger"), (9.0, "16 of 16 .* a smaller")],
)
def test_a_threshold_that_removes_nothing_or_everything_is_refused(threshold: float, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        fit(MaskSparsity(threshold=threshold, epochs=1), net())
    assert "\n" not in str(caught.value)


def test_the_mask_is_frozen_and_made_again_where_asked() -> None:
    model = net()

    class Turn(Callback):
        """Turns the order of the scales around, twice."""

        def on_train_epoch_start(self, run: Any, pl_module: Any) -> None:
            with torch.no_grad():
                model[1].weight.copy_(
                    torch.linspace(0.5, 1.5, 8) if run.current_epoch in (0, 4) else torch.linspace(1.5, 0.5, 8)
                )

    late = {"0": (4, 5, 6, 7)}
    method = MaskSparsity(0.5, epochs=5, mask_at=[3], ignore=["3"])
    diary = fit(method, model, callbacks=[Turn()], max_epochs=5)
    assert diary.picked == [{"0": (0, 1, 2, 3)}] * 24 + [late] * 16
    assert diary.phases == ["grow"] * 37 + ["hold"] * 3
    assert diary.strengths[24] == pytest.approx(5 * 0.928571 / (13 * 0.5))
    assert removal_error(model, method) < 1e-6


@pytest.mark.parametrize(
    "target", [{"ratio": 0.75}, {"budget": {"macs": 0.4}}, {"ratio": None, "threshold": 0.4}], ids=str
)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_every_pass_begins_with_what_the_last_one_left(target: dict[str, Any], optimizer: str) -> None:
    """Equal factors, 5 and 4 of 8 channels twice; what is gone is zero from the next pass on, and goes in the end."""
    model = seeded(net)
    with torch.no_grad():
        model[1].weight.copy_(torch.linspace(0.3, 1.0, 8))
    method = MaskSparsity(**target, epochs=6, passes=3, ignore=["3"] if "ratio" in target else ())
    diary = fit(method, model, optimizer=optimizer, max_epochs=6)
    parts = list(dict.fromkeys(str(picked) for picked in diary.picked))
    assert len(parts) == (1 if "threshold" in target else 3)
    assert [number for number in range(1, 48) if diary.picked[number] != diary.picked[number - 1]] == (
        [] if "threshold" in target else [16, 32]
    )
    if target.get("ratio"):
        assert [len(diary.picked[step]["0"]) for step in (0, 16, 32)] == [3, 5, 6]
    for earlier, later in ((0, 16), (16, 32)):
        assert all(set(gone) <= set(diary.picked[later][name]) for name, gone in diary.picked[earlier].items())
    assert removal_error(model, method) < 1e-6


def test_passes_stay_at_zero_between_masks() -> None:
    model, seen = seeded(net), []

    class Look(Callback):
        def on_train_batch_end(self, run: Any, pl_module: Any, *_: Any) -> None:
            gone = [number for numbers in method._emptied.values() for number in numbers]
            seen.append([model[1].weight[gone].abs().sum().item(), model[1].bias[gone].abs().sum().item(), len(gone)])

    method = MaskSparsity(0.75, epochs=4, passes=2, ignore=["3"])
    fit(method, model, callbacks=[Look()], max_epochs=4)
    assert [row[2] for row in seen] == [0] * 16 + [4] * 16
    assert all(row[:2] == [0, 0] for row in seen[:16]) and all(row[:2] == [0, 0] for row in seen[16:])


@pytest.mark.parametrize(("rule", "gone"), [("mean", (0, 2)), ("vote", (0, 3))])
def test_norms_of_one_stream_share_a_mask(rule: Any, gone: tuple[int, ...]) -> None:
    model = seeded(Residual)
    with torch.no_grad():
        model.norm.weight.copy_(torch.tensor([0.1, 0.2, 0.3, 2.0, 2.0, 2.0, 2.0, 2.0]))
        model.norm2.weight.copy_(torch.tensor([2.0, 2.0, 0.3, 0.1, 0.2, 2.0, 2.0, 2.0]))
    method = MaskSparsity(0.25, epochs=1, scope="all", ignore=["conv1"], group_rule=rule)
    fit(method, model)
    assert list(method.removal().values()) == [gone]


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_a_vote_prefers_what_most_norms_would_let_go(threshold: float | None) -> None:
    scales = torch.tensor([[0.1, 0.2, 0.9, 0.9], [0.1, 0.9, 0.2, 0.9], [0.9, 0.49, 0.1, 0.9]])
    assert doomed_channels(scales, 2, threshold, "vote") == ([0, 2] if threshold is None else [0, 2, 1])
    assert vote(scales <= 0.5).tolist() == [True, True, True, False]


def test_layers_without_norm_are_left_alone_and_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(net(), nn.ReLU(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    method = MaskSparsity(0.5, epochs=1)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        fit(method, model)
    assert set(method.removal()) == {"0.0", "0.3"}
    assert any("2 of 4 layers stay as they are without a norm with scales: 0.8, 2" in said for said in caplog.messages)


def test_a_network_without_norms_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 6), linear_net())
    with pytest.raises(ConfigurationError, match=r"none of the 3 layers .* has a norm with scales") as caught:
        fit(MaskSparsity(0.5, epochs=1), model)
    assert "\n" not in str(caught.value)


# Strength.


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_derived_strength_is_a_travel_budget(optimizer: str) -> None:
    diary = fit(MaskSparsity(0.5, epochs=5), net(), optimizer, max_epochs=5)
    largest, before_hold = float(torch.linspace(0.5, 1.5, 8)[3]), 32
    rate = 0.05 / 0.1 if optimizer == "sgd" else 1e-3
    assert diary.strengths[0] == pytest.approx(5 * largest / (before_hold * rate), rel=1e-5)
    assert set(diary.strengths) == {diary.strengths[0]}


def test_scales_that_do_not_move_get_twice_the_strength_at_every_check() -> None:
    model = net()

    class Stuck(Callback):
        def on_train_batch_start(self, run: Any, *_: Any) -> None:
            with torch.no_grad():
                model[1].weight.fill_(1.0)

    diary = fit(MaskSparsity(0.5, epochs=5), model, "adamw", callbacks=[Stuck()], max_epochs=5)
    doublings = [step for step in range(1, 40) if diary.strengths[step] == 2 * diary.strengths[step - 1]]
    assert doublings == [12, 16, 20, 24, 28, 32] and len(set(diary.strengths)) == 7


def test_a_scale_that_swings_around_zero_gets_no_more_strength() -> None:
    diary = fit(MaskSparsity(0.5, epochs=2), net(), max_epochs=2)
    assert len(set(diary.strengths)) == 1


@EITHER_OPTIMIZER
@SLOW
def test_a_global_stage_comes_first(optimizer: str) -> None:
    constants = MaskSparsityStrength(strength=0.5, global_strength=0.25)
    diary = fit(MaskSparsity(0.5, epochs=3, global_epochs=1, constants=constants), net(), optimizer, max_epochs=3)
    assert diary.phases == ["pick"] * 8 + ["grow"] * 16
    assert diary.strengths == [0.25] * 8 + [0.5] * 16
    diary = fit(MaskSparsity(0.5, epochs=3, global_epochs=1), net(), optimizer, max_epochs=3)
    rate = 0.05 / 0.1 if optimizer == "sgd" else 1e-3
    assert diary.strengths[0] * 8 * rate == pytest.approx(0.5)


@EITHER_OPTIMIZER
@SLOW
def test_scales_that_stay_are_pulled_at_by_the_loss_alone(optimizer: str) -> None:
    """With hardly any strength and with much, one step moves the scales that stay to the same bits."""
    seen: list[list[Tensor]] = []
    for strength in (1e-30, 10.0):
        model = net()
        method = MaskSparsity(0.5, epochs=1, constants=MaskSparsityStrength(strength))
        fit(method, model, optimizer, batches=1)
        gone = torch.zeros(8, dtype=torch.bool)
        gone[list(method.removal()["0"])] = True
        affine = torch.stack([model[1].weight, model[1].bias]).detach()
        seen.append([affine[:, ~gone], affine[0, gone]])
    (stays, weak), (stays_too, strong) = seen
    assert torch.equal(stays, stays_too)
    assert torch.allclose(weak - strong, torch.tensor(10 * OPTIMIZERS[optimizer](model.parameters()).defaults["lr"]))


def test_the_log_says_what_happens_under_adam(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        fit(MaskSparsity(0.5, epochs=2), net(), "adamw", max_epochs=2)
    said = [record.message for record in caplog.records if "AdamW" in record.message]
    assert said == ["masksparsity: AdamW rescales gradients, so scales are soft-thresholded after each step instead."]


# Resume.


@EITHER_OPTIMIZER
@PARTIAL
def test_a_run_resumed_at_any_step_is_the_uninterrupted_run(optimizer: str, tmp_path: Path) -> None:
    # every batch is the same, so that it doesn't matter at which one a loader goes on
    images, labels = next(iter(image_loader(1)))
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images.repeat(4, 1, 1, 1), labels.repeat(4)), batch_size=len(images)
    )

    def run(folder: Path | None, ckpt: Path | None) -> tuple[nn.Module, MaskSparsity]:
        method = MaskSparsity(0.5, start=1, epochs=6, global_epochs=1, mask_at=[4])
        module = Classifier(net(), optimizer)
        saving = [] if folder is None else [ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)]
        settings: dict[str, Any] = {"max_epochs": 8, "enable_checkpointing": folder is not None}
        trainer(method, *saving, **settings).fit(module, loader, ckpt_path=ckpt, weights_only=True)
        return module.net, method

    whole, first = run(tmp_path, None)
    for step in (4, 5, 8, 9, 15, 16, 17, 25, 26, 28, 29):
        resumed, second = run(None, tmp_path / f"step={step}.ckpt")
        state, other = whole.state_dict(), resumed.state_dict()
        assert [name for name in state if not torch.equal(state[name], other[name])] == [], step
        assert second.removal() == first.removal() and second.phase == first.phase == "ready"


# A second pass.


def test_a_second_run_on_the_slim_module_prunes_further(tmp_path: Path) -> None:
    module, loader = Classifier(net(16)), image_loader(6)
    images = next(iter(loader))[0]
    shares, plans = [count_cost(module.net, images).macs], []
    for number in range(2):
        pruning = StructuralPruning(latency_batches=(), report_file=None)
        saving = ModelCheckpoint(tmp_path / str(number), save_last=True)
        run = trainer(
            MaskSparsity(budget={"macs": 0.5}, epochs=2), pruning, saving, max_epochs=3, enable_checkpointing=True
        )
        run.fit(module, loader)
        shares.append(count_cost(module.net, images).macs)
        plans.append(pruning.plan)
        assert 0.35 < shares[-1] / shares[-2] <= 0.5 and plans[-1] is not None
    outputs = module.eval().net(images)
    # a checkpoint knows both plans; a slim file knows the last
    loaded = load_from_checkpoint(Classifier, tmp_path / "1" / "last.ckpt", net=net(16)).eval()
    assert torch.equal(loaded.net(images), outputs)
    save_slim(module, tmp_path / "slim.safetensors", plans[1])
    fresh = Classifier(net(16)).eval()
    prune_(fresh, plans[0])
    load_slim(tmp_path / "slim.safetensors", fresh)
    assert torch.equal(fresh.net(images), outputs)


def test_a_second_pass_sets_out_from_a_slim_file(tmp_path: Path) -> None:
    loader, costs = image_loader(6), []
    for callbacks in ([], [LoadPruned(tmp_path / "slim.safetensors")]):
        module, pruning = Classifier(net(16)), StructuralPruning(latency_batches=(), report_file=None)
        trainer(*callbacks, MaskSparsity(budget={"macs": 0.5}, epochs=2), pruning, max_epochs=3).fit(module, loader)
        assert pruning.report is not None and pruning.plan is not None
        costs += [pruning.report.cost_before.macs, pruning.report.cost_after.macs]
        save_slim(module, tmp_path / "slim.safetensors", pruning.plan)
    assert costs[2] == costs[1] <= 0.5 * costs[0] and costs[3] <= 0.5 * costs[2]


# The door.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": None}, "exactly one of ratio"),
        ({"threshold": 0.1}, "exactly one of ratio"),
        ({"ratio": None, "threshold": 0.0}, "threshold=0.0"),
        ({"ratio": None, "threshold": float("nan")}, "threshold=nan"),
        ({"ratio": None, "threshold": 0.1, "ratios": {"0": 0.5}}, "ratios can only be 0"),
        ({"ratio": 1.5}, "ratio=1.5"),
        ({"epochs": 0}, "epochs=0"),
        ({"global_epochs": 4}, r"global_epochs=4 must lie in \[0, 4\)"),
        ({"global_epochs": -1}, "global_epochs=-1"),
        ({"passes": 0}, "passes=0 must be at least 1"),
        ({"passes": 2, "mask_at": [1]}, "can't go with mask_at"),
        ({"mask_at": [0]}, r"mask_at=\[0\] must be ascending epochs from 1 to 3"),
        ({"mask_at": [4]}, "mask_at"),
        ({"mask_at": [2, 1]}, "mask_at"),
        ({"mask_at": [2], "global_epochs": 2}, "from 3 to 3"),
        ({"group_rule": "max"}, "group_rule='max'"),
        ({"constants": "cifar"}, "constants='cifar'"),
    ],
)
def test_arguments_out_of_range_are_refused_in_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        MaskSparsity(**{"ratio": 0.5, "epochs": 4, **arguments})
    assert "\n" not in str(caught.value)


def test_scales_that_are_not_finite_are_refused() -> None:
    model = net()
    with torch.no_grad():
        model[4].weight[0] = float("nan")
    with pytest.raises(ConfigurationError, match="group '3' are not all finite"):
        fit(MaskSparsity(0.5, epochs=1), model)


def test_stages_count_in_optimiser_steps() -> None:
    method = MaskSparsity(0.5, start=2, epochs=5, global_epochs=1, mask_at=[5])
    assert method.begin(50, None) == MaskStage(50, (10, 30), 4)  # type: ignore[arg-type]
    paper = MaskSparsity(0.5, epochs=100, constants="imagenet")
    assert paper.begin(1000, None) == MaskStage(1000, (0,), 0)  # type: ignore[arg-type]
    assert MASK_SPARSITY.strength == 5e-4


def test_a_dry_run_needs_no_room() -> None:
    fit(MaskSparsity(0.5, epochs=5, start=2), net(), fast_dev_run=True)


@pytest.mark.filterwarnings("ignore:.*too few optimiser steps")
@pytest.mark.parametrize("arguments", [{"ratio": 0.5}, {"budget": {"params": 0.5}, "global_epochs": 1}])
def test_looking_ahead_between_passes_changes_nothing(arguments: dict[str, Any]) -> None:
    def trained(looks: bool) -> list[Tensor]:
        regulariser = MaskSparsity(epochs=4, passes=2, **arguments)

        class Looks(Classifier):
            def on_train_batch_end(self, *_: Any) -> None:
                if looks and regulariser._picked:
                    regulariser.foreseen()

        module = Looks(seeded(conv_net))
        trainer(regulariser, max_epochs=4).fit(module, image_loader())
        return list(module.state_dict().values())

    assert all(map(torch.equal, trained(False), trained(True)))
