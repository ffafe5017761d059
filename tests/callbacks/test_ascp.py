"""ASCP in training: rates, clusters, reconstructions, the finish, the statistics, and a surgery nobody notices."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn

from lightning_prune.callbacks import likeness
from lightning_prune.callbacks.ascp import ASCP
from lightning_prune.callbacks.structural import StructuralPruning
from lightning_prune.clusters import average, gram, partition
from lightning_prune.errors import ConfigurationError, PlanError
from lightning_prune.schedules import ASCPSchedule
from lightning_prune.structure import ChannelGroup, kept_channels, prune_, trace
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
from tests.callbacks.slimming import Residual, assert_equal, weights

EITHER_OPTIMIZER = pytest.mark.parametrize("optimizer", OPTIMIZERS)
EITHER_FINISH = pytest.mark.parametrize("finish", ["centripetal", "plain"])
TWO_SHAPES = {"weight": (3, 3, 3), "bias": ()}
PARTIAL = "ignore:Be aware that when using `ckpt_path`"


def grouped_net() -> nn.Sequential:
    """A depthwise layer, a norm and a per-channel slope between producer and consumer."""
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.PReLU(8)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 36, 4))


def distinct(tensor: Tensor) -> int:
    return len(tensor.detach().unique(dim=0))


class Look(Callback):
    """The network's own tensors at every batch's beginning and, as validation would see them, at every epoch's end."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Tensor]] = []
        self.ended: list[dict[str, Tensor]] = []
        self.shown: list[dict[str, float]] = []
        self.phases: list[str] = []

    def on_train_batch_start(self, run: Any, pl_module: LightningModule, *_: Any) -> None:
        self.begun.append(weights(pl_module.net))  # type: ignore[arg-type]

    def on_train_epoch_end(self, run: Any, pl_module: LightningModule) -> None:
        self.ended.append(weights(pl_module.net))  # type: ignore[arg-type]
        self.phases.append(run.callbacks[0].phase)

    def on_train_epoch_start(self, run: Any, pl_module: LightningModule) -> None:
        self.shown.append({key: float(value) for key, value in run.callback_metrics.items()})


def fit(
    method: ASCP, net: nn.Module, optimizer: str = "sgd", *callbacks: Any, loader: Any = None, **kwargs: Any
) -> Look:
    look = Look()
    data = image_loader(4) if loader is None else loader
    trainer(method, *callbacks, look, **kwargs).fit(Classifier(net, optimizer), data)
    return look


# Rates and clusters.


@EITHER_OPTIMIZER
@EITHER_FINISH
@pytest.mark.parametrize("rate", ["exp", "linear", "cosine", "poly3", "const"])
def test_every_epoch_ends_with_as_many_filters_as_the_rate_says(rate: Any, finish: Any, optimizer: str) -> None:
    method = ASCP(0.6, start=1, epochs=5, rate=rate, finish=finish)
    look = fit(method, seeded(conv_net), optimizer, max_epochs=7)
    schedule = ASCPSchedule(5, rate, ramp=0.75, freeze_after=0.75)
    counts = [schedule.clusters(epoch, 8, 0.6, final=3) for epoch in range(1, 6)]
    for name in ("0.weight", "3.weight"):
        assert [distinct(state[name]) for state in look.ended] == [8, *counts, 3 if finish == "centripetal" else 8]
        final = len(look.begun) if finish == "plain" else 4 * (1 + schedule.freeze_epoch)
        assert all(distinct(state[name]) == 8 for index, state in enumerate(look.begun[:final]) if index % 4)
        assert all(distinct(state[name]) == 3 for state in look.begun[final:])
    assert look.phases[0] == "wait" and look.phases[1] == "pick" and look.phases[5:] == ["ready", "ready"]


@pytest.mark.parametrize("cluster", ["kmeans", "ward", "even", "imbalanced", "random"])
@pytest.mark.parametrize("representative", ["mean", "medoid"])
def test_whatever_acts_on_a_channel_is_alike_within_its_cluster(cluster: Any, representative: Any) -> None:
    for build, layers in ((conv_net, {"0": "01", "3": "34"}), (grouped_net, {"0": "0123"})):
        method = ASCP(0.5, epochs=2, cluster=cluster, representative=representative, recalibrate=0)
        look = fit(method, seeded(build), max_epochs=2)
        for group, labels in method.state_dict()["method"]["labels"].items():
            assert labels.max() == 3 and len(labels) == 8
            own = [value for name, value in look.ended[-1].items() if name[0] in layers[group] and value.dim()]
            assert len(own) >= 5 and all(torch.equal(value, average(value, labels)) for value in own)


def test_medoids_are_copies_of_what_was_there() -> None:
    class Before(Callback):
        """Runs after the optimiser's step, before the reconstruction."""

        def on_train_batch_end(self, run: Any, pl_module: Any, *_: Any) -> None:
            self.weights = weights(pl_module.net)

    before, net = Before(), seeded(conv_net)
    method = ASCP(0.5, epochs=1, representative="medoid", recalibrate=0)
    trainer(before, method, max_epochs=1).fit(Classifier(net), image_loader(4))
    for name, value in weights(net).items():
        if name.startswith(("0.", "1.", "3.", "4.")) and value.dim():
            rows = {
                tuple(row) for row in before.weights[name].flatten(1 if value.dim() > 1 else 0).reshape(8, -1).tolist()
            }
            assert {tuple(row) for row in value.reshape(8, -1).tolist()} < rows, name


@EITHER_OPTIMIZER
@pytest.mark.parametrize(("ratio", "round_to"), [(0.5, 1), (0.3, 1), (0.7, 4), (0.9, 1)])
def test_widths_are_those_of_every_other_method(ratio: float, round_to: int, optimizer: str, tmp_path: Path) -> None:
    method, net = ASCP(ratio, epochs=2, round_to=round_to), seeded(conv_net, 16)
    pruning = StructuralPruning(latency_batches=(), report_file=None)
    fit(method, net, optimizer, pruning, max_epochs=3, default_root_dir=tmp_path)
    width = kept_channels(16, ratio, round_to=round_to)
    assert net[0].weight.shape[0] == net[3].weight.shape[0] == net[6 - 2].num_features == width
    assert pruning.plan is not None and set(pruning.plan.widths().values()) == {(16, width)}


def test_the_partition_stays_once_it_is_final_and_its_churn_is_logged() -> None:
    labels: list[Any] = []

    class Note(Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            labels.append({name: value.tolist() for name, value in method.state_dict()["method"]["labels"].items()})

    method = ASCP(0.5, epochs=8)
    look = fit(method, seeded(conv_net, 16), "sgd", Note(), max_epochs=9)
    rates = ASCPSchedule.derive(8)
    freeze, first = rates.freeze_epoch, rates.clusters(1, 16, 0.5) / 16
    assert freeze < 8 and all(later == labels[freeze - 1] for later in labels[freeze:])
    churn = [shown.get("ascp/churn") for shown in look.shown[1:]]
    assert churn[0] is None and max(value or 0 for value in churn[:freeze]) > 0 and churn[freeze:] == [0.0, 0.0]
    assert look.shown[8]["ascp/distinct"] == 0.5 < look.shown[1]["ascp/distinct"] == first < 1.0


def test_intervals_and_own_schedules() -> None:
    schedule = ASCPSchedule(5, "linear", interval=2)
    look = fit(ASCP(0.5, schedule=schedule), seeded(conv_net), max_epochs=5)
    assert [distinct(state["0.weight"]) for state in look.ended] == [8, 7, 8, 5, 4]


# Between reconstructions.


@EITHER_OPTIMIZER
def test_clusters_part_in_a_plain_finish_and_stay_together_in_a_centripetal_one(optimizer: str) -> None:
    schedule = ASCPSchedule(4, "const", freeze_after=0.25)
    for finish in ("plain", "centripetal"):
        method, net = ASCP(0.5, schedule=schedule, finish=finish), seeded(conv_net)
        look = fit(method, net, optimizer, max_epochs=4)
        assert [distinct(state["0.weight"]) for state in look.begun[:5]] == [8, 8, 8, 8, 4]
        together = [distinct(state[name]) for state in look.begun[5:] for name in ("0.weight", "3.weight")]
        assert set(together) == ({4} if finish == "centripetal" else {4, 8})
        assert not torch.equal(look.begun[5]["0.weight"], look.begun[4]["0.weight"])
        # the next layer reads the members apart
        assert distinct(look.begun[-1]["3.weight"].movedim(1, 0)) == 8


@EITHER_FINISH
def test_sparse_gradients_wait_for_the_last_reconstruction(finish: Any, tmp_path: Path) -> None:
    layers = [nn.Embedding(20, 8, sparse=True), nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)]
    method, net = ASCP(0.5, schedule=ASCPSchedule(3, "const", freeze_after=0.3), finish=finish), nn.Sequential(*layers)
    data = torch.utils.data.TensorDataset(torch.randint(20, (32, 4)), torch.randint(4, (32,)))
    pruning, loader = StructuralPruning(latency_batches=(), report_file=None), torch.utils.data.DataLoader(data, 8)
    look = fit(method, net, "sgd", pruning, loader=loader, max_epochs=4, default_root_dir=tmp_path)
    assert net[0].weight.grad.is_sparse and net[0].weight.shape == (20, 4) and net[2].weight.shape == (8, 16)
    free, alike = (distinct(look.begun[6][name]) for name in ("0.weight", "2.weight"))
    assert free == 20 and alike == (8 if finish == "centripetal" else 16)
    assert distinct(look.ended[2]["0.weight"].T) == 4


def test_the_state_of_the_optimiser_is_averaged_once() -> None:
    schedule = ASCPSchedule(2, "const", freeze_after=0.5)
    method, net = ASCP(0.5, schedule=schedule, finish="centripetal"), seeded(conv_net)
    module = Classifier(net, "adamw")
    run = trainer(method, max_epochs=2)
    run.fit(module, image_loader(4))
    labels = method.state_dict()["method"]["labels"]
    for parameter, name in ((net[0].weight, "0"), (net[1].weight, "0"), (net[0].bias, "0"), (net[3].weight, "3")):
        for key in ("exp_avg", "exp_avg_sq"):
            moment = run.optimizers[0].state[parameter][key]
            assert torch.equal(moment, average(moment, labels[name]))


@EITHER_OPTIMIZER
def test_the_pull_keeps_channels_closer(optimizer: str) -> None:
    schedule, spread = ASCPSchedule(3, "const"), {}
    for pull in (0.0, 2.0 if optimizer == "sgd" else 200.0):
        method = ASCP(0.5, schedule=schedule, pull=pull)
        look = fit(method, seeded(conv_net), optimizer, loader=image_loader(16), max_epochs=3)
        # free steps since the first reconstruction
        labels = torch.unique(look.ended[0]["0.weight"], dim=0, return_inverse=True)[1]
        weight = look.begun[31]["0.weight"]
        spread[pull] = float((weight - average(weight, labels)).norm())
    plain, pulled = spread.values()
    assert 0 < pulled < 0.7 * plain


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_pull_is_as_if_it_stood_in_training_step(accumulate: int) -> None:
    class Pulled(Classifier):
        """The formula, by autograd, with the averaging matrix spelled out."""

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            for name, labels in method.state_dict()["method"]["labels"].items():
                member = torch.nn.functional.one_hot(labels).double()
                mean = member @ (member.T @ member).inverse() @ member.T
                layers = (self.net[int(name)], self.net[int(name) + 1])
                for weight in [parameter for layer in layers for parameter in layer.parameters()]:
                    rows = weight.flatten(1) if weight.dim() > 1 else weight[:, None]
                    loss = loss + 0.25 * (rows - mean @ rows).square().sum()
            return loss

    loader = image_loader(4)
    images, labels = loader.dataset.tensors  # type: ignore[attr-defined]
    doubled = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images.double(), labels), batch_size=16)
    found = []
    for kind, pull in ((Classifier, 0.5), (Pulled, 0.0)):
        method, net = ASCP(0.5, schedule=ASCPSchedule(3, "const"), pull=pull), seeded(conv_net).double()
        run = trainer(method, max_epochs=3, accumulate_grad_batches=accumulate, precision="64-true")
        run.fit(kind(net), doubled)
        found.append(weights(net))
    assert all(torch.allclose(found[0][name], found[1][name], rtol=1e-10, atol=1e-12) for name in found[0])


def test_adaptive_optimisers_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        fit(ASCP(0.5, epochs=2, pull=0.5), seeded(conv_net), "adamw", max_epochs=2)
        fit(ASCP(0.5, epochs=2), seeded(conv_net), "adamw", max_epochs=2)
    said = [record.message for record in caplog.records if "AdamW" in record.message]
    assert said == ["ascp: AdamW rescales gradients, so the pull acts after each step instead."]


# Surgery.


class Around(Callback):
    """What the network answers in evaluation just before surgery, and how its clusters look."""

    def __init__(self) -> None:
        self.images = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(5))
        self.network: nn.Module | None = None

    def on_train_epoch_start(self, run: Any, pl_module: Any) -> None:
        if run.current_epoch == 3:
            self.network = copy.deepcopy(pl_module.net).eval()


class After(Callback):
    """The same just after it."""

    def on_train_epoch_start(self, run: Any, pl_module: Any) -> None:
        if run.current_epoch == 3:
            self.network = copy.deepcopy(pl_module.net).eval()


@EITHER_OPTIMIZER
@EITHER_FINISH
@pytest.mark.parametrize("representative", ["mean", "medoid"])
@pytest.mark.parametrize(("build", "scope"), [(conv_net, "inner"), (grouped_net, "inner"), (Residual, "all")])
@torch.no_grad()
def test_surgery_changes_no_output(
    build: Any, scope: Any, representative: Any, finish: Any, optimizer: str, tmp_path: Path
) -> None:
    before, after, net = Around(), After(), seeded(build)
    method = ASCP(0.5, epochs=3, scope=scope, finish=finish, representative=representative)
    pruning = StructuralPruning(latency_batches=(), report_file=None)
    run = trainer(before, method, pruning, after, max_epochs=4, default_root_dir=tmp_path)
    with torch.enable_grad():
        run.fit(Classifier(net, optimizer), image_loader(4))
    assert before.network is not None and pruning.plan is not None
    dense, slim = before.network(before.images), after.network(before.images)
    assert torch.allclose(dense, slim, rtol=1e-5, atol=1e-5 * float(dense.abs().max()))
    widths = pruning.plan.widths()
    assert widths and all(now == was // 2 for was, now in widths.values())
    if build is Residual:
        assert {"net.stem", "net.conv1", "net.conv2"} == set(widths)
    # what the members' consumers read would be lost without the sum
    graph = trace(before.network, before.images)
    prune_(before.network, graph.plan(method.removal()))
    lost = (before.network(before.images) - dense).abs().max() / dense.abs().max()
    assert lost > 0.05


def test_removal_and_merges_name_the_first_of_each_cluster() -> None:
    method = ASCP(0.5, epochs=2)
    with pytest.raises(PlanError, match="has picked no channels yet"):
        method.removal()
    assert method.merges() == {}
    look = fit(method, seeded(conv_net), max_epochs=2)
    for name, merges in method.merges().items():
        weight = look.ended[-1][f"{name}.weight"]
        assert set(merges) == set(method.removal()[name])
        assert all(stays < gone and torch.equal(weight[gone], weight[stays]) for gone, stays in merges.items())


def test_weight_averages_are_made_alike_too(tmp_path: Path) -> None:
    answers: list[Tensor] = []

    class Ask(Around):
        def on_train_epoch_start(self, run: Any, pl_module: Any) -> None:
            if run.current_epoch == 3:
                twin = copy.deepcopy(average_callback._average_model.module.net).eval()  # type: ignore[union-attr]
                answers.append(twin(self.images).detach())

    average_callback = EMAWeightAveraging(decay=0.9)
    method, pruning = ASCP(0.5, epochs=3), StructuralPruning(latency_batches=(), report_file=None)
    run = trainer(Ask(), method, pruning, average_callback, Ask(), max_epochs=4, default_root_dir=tmp_path)
    run.fit(Classifier(seeded(conv_net)), image_loader(4))
    before, after = answers
    assert torch.allclose(before, after, rtol=1e-4, atol=1e-4)


# Statistics.


def test_statistics_are_those_of_batches_seen_in_training(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Keep(Callback):
        def on_train_batch_end(self, run: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if run.current_epoch == 1:
                seen.append(batch[0])
                states.append(torch.random.get_rng_state())

    states: list[Tensor] = []
    net = seeded(conv_net)
    net.append(nn.Dropout(0.5))
    net.append(nn.Linear(4, 4))
    method = ASCP(0.5, epochs=2, recalibrate=40)
    modes: list[list[bool]] = []

    class Modes(Callback):
        def on_train_epoch_end(self, run: Any, pl_module: Any) -> None:
            modes.append([module.training for module in pl_module.modules()])

    trainer(Keep(), method, Modes(), max_epochs=2).fit(Classifier(net), image_loader(4))
    assert torch.equal(torch.random.get_rng_state(), states[-1])
    assert all(all(mode) for mode in modes)
    fresh = copy.deepcopy(net).train()
    fresh[9].eval()
    for norm in (fresh[1], fresh[4]):
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        for images in seen[-2:]:
            fresh(images)
    for index in (1, 4):
        assert torch.allclose(net[index].running_mean, fresh[index].running_mean, rtol=1e-4, atol=1e-6)
        assert torch.allclose(net[index].running_var, fresh[index].running_var, rtol=1e-4, atol=1e-6)
        assert net[index].momentum == 0.1 and net[index].num_batches_tracked == 8


def test_frozen_statistics_are_only_averaged() -> None:
    class Held(Classifier):
        def on_train_epoch_start(self) -> None:
            self.net[1].eval()

    net = seeded(conv_net)
    nn.init.uniform_(net[1].running_mean)
    before = net[1].running_mean.clone()
    method = ASCP(0.5, epochs=1)
    trainer(method, max_epochs=1).fit(Held(net), image_loader(4))
    labels = method.state_dict()["method"]["labels"]["0"]
    assert torch.equal(net[1].running_mean, average(before, labels)) and not net[1].training


# Resume.


@EITHER_OPTIMIZER
@EITHER_FINISH
@pytest.mark.filterwarnings(PARTIAL, "ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_run_resumed_at_any_step_is_the_uninterrupted_run(finish: Any, optimizer: str, tmp_path: Path) -> None:
    # every batch is the same, so that it doesn't matter at which one a loader goes on
    images, labels = next(iter(image_loader(1)))
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images.repeat(4, 1, 1, 1), labels.repeat(4)), batch_size=len(images)
    )

    def run(folder: Path | None, ckpt: Path | None) -> tuple[nn.Module, ASCP]:
        method = ASCP(0.5, start=1, epochs=5, finish=finish, pull=0.1)
        pruning = StructuralPruning(latency_batches=(), report_file=None)
        built = Classifier(seeded(conv_net), optimizer)
        callbacks = [] if folder is None else [ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)]
        kwargs: dict[str, Any] = {"max_epochs": 7, "enable_checkpointing": folder is not None}
        kwargs["default_root_dir"] = tmp_path
        trainer(method, pruning, *callbacks, **kwargs).fit(built, loader, ckpt_path=ckpt, weights_only=True)
        return built.net, method

    whole, first = run(tmp_path, None)
    for step in (3, 8, 16, 18, 23, 24, 26):
        resumed, second = run(None, tmp_path / f"step={step}.ckpt")
        assert_equal(weights(whole), weights(resumed))
        assert (second.removal(), second.merges()) == (first.removal(), first.merges()), step


# Ranks.


@EITHER_FINISH
def test_two_ranks_have_one_partition_and_one_set_of_statistics(finish: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.callbacks.two_ranks_ascp", str(tmp_path), finish]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    finished = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["merges"] == second["merges"]
    for index, (mine, theirs) in enumerate(zip(first["states"], second["states"], strict=True)):
        assert all(torch.equal(mine["labels"][name], theirs["labels"][name]) for name in ("0", "3"))
        same = {name for name, value in mine["weights"].items() if torch.equal(value, theirs["weights"][name])}
        statistics = {name for name in mine["weights"] if "running" in name}
        # each rank has statistics of its own, until rank 0's count
        assert mine["weights"].keys() - same == (set() if index == 2 else statistics)
        assert mine["weights"]["0.weight"].shape[0] == (4 if index == 3 else 8)


# The door.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 1.0}, "ratio=1.0"),
        ({"epochs": None}, "exactly one of epochs"),
        ({"schedule": ASCPSchedule(3)}, "exactly one of epochs"),
        ({"rate": "sine"}, "rate='sine' must be one of exp, linear"),
        (
            {"epochs": None, "schedule": ASCPSchedule(3), "rate": "exp"},
            "a schedule has its own shape|A schedule has its",
        ),
        ({"cluster": "dbscan"}, "cluster='dbscan' must be one of kmeans"),
        ({"representative": "first"}, "representative='first'"),
        ({"pull": -1.0}, "pull=-1.0"),
        ({"pull": float("nan")}, "pull=nan"),
        ({"finish": "soft"}, "finish='soft'"),
        ({"recalibrate": -1}, "recalibrate=-1"),
    ],
)
def test_arguments_out_of_range_are_refused_in_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        ASCP(**{"ratio": 0.5, "epochs": 2, **arguments})
    assert "\n" not in str(caught.value)


def half_normed() -> nn.Sequential:
    """The second group's channels are normalised together, so none can stand for another."""
    layers = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4)]
    return nn.Sequential(*layers)


def test_groups_that_cannot_be_merged_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    method = ASCP(0.5, epochs=1, scope="all")
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        fit(method, seeded(half_normed), loader=feature_loader(4))
    assert set(method.removal()) == {"0"}
    said = "ascp: 1 of 2 layers stay as they are without channels that can be merged: 2."
    assert [record.message for record in caplog.records].count(said) == 1


def test_groups_that_cannot_be_merged_are_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match=r"ratios\['2'\] asks for 2, which lacks channels that can"):
        fit(ASCP(0.5, epochs=1, scope="all", ratios={"2": 0.5}), seeded(half_normed), loader=feature_loader(4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"round_to": 64}, "ratio=0.5 .*no channel"),
        ({"epochs": 3}, "epochs=3 don't fit into max_epochs=2"),
        ({"ignore": ["*"]}, "finds no layer to prune"),
        ({"pull": 20.0}, "learning rate 0.05 times pull=20 must stay below 1"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(arguments: dict[str, Any], message: str) -> None:
    class Untouched(Callback):
        def on_exception(self, run: Any, *_: Any) -> None:
            assert run.global_step == 0

    with pytest.raises(ConfigurationError, match=message):
        fit(ASCP(**{"ratio": 0.5, "epochs": 2, **arguments}), seeded(conv_net), "sgd", Untouched(), max_epochs=2)


def test_weights_that_are_not_finite_are_refused() -> None:
    class Spoil(Callback):
        def on_before_zero_grad(self, run: Any, pl_module: Any, optimizer: Any) -> None:
            pl_module.net[0].weight.data[0] = float("nan")

    with pytest.raises(ConfigurationError, match="group '0' are not all finite"):
        fit(ASCP(0.5, epochs=1), seeded(linear_net), "sgd", Spoil(), loader=feature_loader(4))


def test_a_dry_run_and_a_run_without_norms() -> None:
    fit(ASCP(0.5, epochs=4), seeded(conv_net), fast_dev_run=True)
    method = ASCP(0.5, epochs=2)
    look = fit(method, seeded(linear_net), loader=feature_loader(4), max_epochs=2)
    assert distinct(look.ended[-1]["0.weight"]) == 6 and method.ready


@EITHER_FINISH
def test_the_energy_is_the_distance_within_clusters_since_the_partition_is_final(finish: Any) -> None:
    energies: list[float] = []

    class Note(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            energies.append(float(method.energy()))

    schedule = ASCPSchedule(3, "const", freeze_after=0.3)
    method = ASCP(0.5, schedule=schedule, finish=finish)
    trainer(method, Note(), max_epochs=3).fit(Classifier(seeded(conv_net)), image_loader(4))
    assert energies[:3] == [1.0] * 3 and [energies[index] for index in (3, 7, 11)] == [0.0] * 3
    parted = [energies[index] for index in (4, 5, 6, 8, 9, 10)]
    assert all(0 < energy < 1 for energy in parted) if finish == "plain" else parted == [0.0] * 6


def test_nothing_is_left_behind() -> None:
    method = ASCP(0.5, epochs=2)
    pruning = StructuralPruning(latency_batches=(), report_file=None)
    fit(method, seeded(conv_net), "sgd", pruning, max_epochs=3)
    assert method.finished and method.energy() == 0 and not method._calls and not method._groups


@pytest.mark.parametrize("method", ["kmeans", "ward", "even"])
def test_tables_too_large_for_one_call_are_clustered_in_parts(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    similar = {name: gram(torch.randn(12, 5)) for name in "abcde"}
    sizes: list[int] = []

    def watched(tables: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sizes.append(len(tables))
        return partition(tables, *args, **kwargs)

    monkeypatch.setattr(likeness, "partition", watched)
    found = []
    for together in (likeness.TOGETHER, 2 * 12**2, 1):
        monkeypatch.setattr(likeness, "TOGETHER", together)
        found.append(likeness.cluster(similar, dict.fromkeys(similar, 7), method, {}, torch.Generator()))
    assert sizes == [5, 2, 2, 1, 1, 1, 1, 1, 1]
    for labels in found[1:]:
        assert_equal(labels, found[0])


def by_hand(name: str, size: int, index: dict[tuple[str, int], Tensor]) -> ChannelGroup:
    """A group of channels that run along the given dims, and whom nobody reads."""
    return ChannelGroup(name, size, index, (), (), (), (), (), (), (), mergeable=True)


@pytest.mark.parametrize("joined", [likeness.JOINED, 100, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_tensors_that_are_averaged_at_once_are_each_averaged(
    layout: torch.memory_format, dtype: torch.dtype, joined: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likeness, "JOINED", joined)
    plain, pairs = torch.arange(6).unsqueeze(1), torch.tensor([[13, 2], [4, 1], [0, 12], [9, 5], [6, 8], [10, 3]])
    one = {("conv", 0): plain, ("scale", 0): plain, ("linear", 1): plain, ("pairs", 0): pairs, ("both", 0): plain}
    other = {("both", 1): plain, ("same", 0): plain, ("count", 0): plain}
    groups = [by_hand("one", 6, one), by_hand("other", 6, other), by_hand("free", 6, {("alone", 0): plain})]
    labels = {"one": torch.tensor([0, 1, 0, 2, 1, 0]), "other": torch.tensor([0, 1, 2, 2, 3, 4])}
    made = torch.Generator().manual_seed(3)
    sizes = {"conv": (6, 3, 2, 2), "scale": (6,), "linear": (4, 6), "pairs": (14, 4), "both": (6, 6), "same": (6, 12)}
    values = {name: torch.randn(size, generator=made).to(dtype) for name, size in {**sizes, "alone": (6, 12)}.items()}
    values["conv"] = values["conv"].contiguous(memory_format=layout)
    values["same"][3] = values["same"][2]  # equal ones stay as they are, bit for bit
    values["count"] = torch.arange(6)
    wanted = {name: value.clone() for name, value in values.items()}
    for group, own in zip(groups[:2], labels.values(), strict=True):
        matrix = nn.functional.one_hot(own).double()
        mean = matrix @ torch.linalg.inv(matrix.T @ matrix) @ matrix.T
        for (name, dim), index in group.index.items():
            if wanted[name].is_floating_point():
                rows = wanted[name].movedim(dim, 0)
                rows[index] = torch.einsum("ij,j...->i...", mean, rows[index].double()).to(dtype)
    kept, where = {name: value.clone() for name, value in values.items()}, {k: v.data_ptr() for k, v in values.items()}
    averaging = likeness.Averaging(groups, labels)
    found = averaging.means(values)
    assert set(found) == {*sizes} and torch.equal(found["same"], kept["same"])
    assert_equal(values, kept)
    for some in ({"scale", "both"}, {"conv", "linear", "pairs", "same", "alone", "count"}):  # of two optimisers
        averaging.average_({name: values[name] for name in some})
    assert where == {name: value.data_ptr() for name, value in values.items()}
    precision = 1e-14 if dtype == torch.float64 else float(torch.finfo(dtype).eps)
    for name, value in values.items():
        assert torch.allclose(value.double(), wanted[name].double(), rtol=2 * precision, atol=2 * precision), name
        assert name not in found or torch.equal(found[name], value)
    assert torch.equal(values["alone"], kept["alone"]) and not torch.equal(values["conv"], kept["conv"])
    everyone = likeness.Averaging(groups, dict.fromkeys(labels, torch.arange(6)))  # in a cluster of its own
    assert_equal(everyone.means(kept), {name: kept[name] for name in sizes})


def test_a_step_of_many_layers_averages_once_per_shape_and_asks_nothing() -> None:
    plain, layers = torch.arange(8).unsqueeze(1), [str(number) for number in range(20)]
    groups = [by_hand(name, 8, {(f"{name}.weight", 0): plain, (f"{name}.bias", 0): plain}) for name in layers]
    averaging = likeness.Averaging(groups, dict.fromkeys(layers, torch.arange(8) // 2))
    values = {f"{name}.{part}": torch.randn(8, *shape) for name in layers for part, shape in TWO_SHAPES.items()}
    averaging.average_(values)
    with torch.profiler.profile() as profile:
        averaging.average_(values)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::index_add_"] == calls["aten::_foreach_copy_"] == 2
    assert not {"aten::_local_scalar_dense", "aten::nonzero", "aten::unique_consecutive", "aten::_unique2"} & set(calls)
    assert all(distinct(value) == 4 for value in values.values())


def test_sets_of_tensors_that_keep_changing_fill_no_memory() -> None:
    plain, layers = torch.arange(8).unsqueeze(1), [str(number) for number in range(6)]
    groups = [by_hand(name, 8, {(name, 0): plain, (name, 1): plain}) for name in layers]
    labels = dict.fromkeys(layers, torch.arange(8) // 2)
    averaging = likeness.Averaging(groups, labels)
    for kept in range(1, 2**6):  # every set there is, as if other layers were skipped in each step
        values = {name: torch.randn(8, 8) for name in layers if kept >> int(name) & 1}
        wanted = {name: average(average(value, labels[name]).T, labels[name]).T for name, value in values.items()}
        averaging.average_(values)
        assert_equal(values, wanted)
    assert len(averaging._tables) <= likeness.SETS + len(layers)


@pytest.mark.filterwarnings(PARTIAL)
def test_a_run_resumed_behind_a_plain_finish_stays_together_from_the_next_epoch_on(tmp_path: Path) -> None:
    schedule, looks = ASCPSchedule(4, "const", freeze_after=0.25), []
    saves = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, auto_insert_metric_name=False)
    for finish, others, start in (("plain", [saves], None), ("centripetal", [], tmp_path / "1.ckpt")):
        method, look = ASCP(0.5, schedule=schedule, finish=finish), Look()  # type: ignore[arg-type]
        settings: dict[str, Any] = {"enable_checkpointing": bool(others), "default_root_dir": tmp_path}
        run, module = trainer(method, look, *others, max_epochs=4, **settings), Classifier(seeded(conv_net), "adamw")
        run.fit(module, image_loader(4), ckpt_path=start, weights_only=True)
        looks.append([distinct(state["0.weight"]) for state in look.begun])
    assert looks == [[8, 8, 8, 8, 4, 8, 8, 8, 4, 8, 8, 8, 4, 8, 8, 8], [4, 8, 8, 8, 4, 4, 4, 4]]
