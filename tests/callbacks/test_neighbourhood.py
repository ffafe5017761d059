"""Runs as users have them: mixed precision behind a stem, resumed dense runs, other callbacks in any order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import Tensor, nn

from lightning_prune import (
    ASCP,
    TPP,
    ConfigurationError,
    GReg1,
    GReg1Schedule,
    LoadPruned,
    MaskSparsity,
    StructuralPruning,
    choose,
    choose_weights,
    load_slim,
    prune_,
    save_slim,
    trace,
)
from tests.callbacks.nets import Classifier, conv_net, image_loader, seeded, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*energy was left", "ignore:.*too few optimiser steps", "ignore:Be aware that when using `ckpt_path`"
)
IMAGES = torch.zeros(2, 3, 6, 6)


def surgery(**arguments: Any) -> StructuralPruning:
    return StructuralPruning(**{"latency_batches": (), "report_file": None, **arguments})


@pytest.mark.parametrize("method", [GReg1, MaskSparsity, ASCP, TPP])
def test_a_network_behind_a_stem_under_autocast(method: Any) -> None:
    """What autocast hands over in half precision is looked at in the weights' own."""

    class Behind(Classifier):
        def __init__(self) -> None:
            super().__init__(seeded(conv_net))
            self.stem = nn.Conv2d(3, 3, 1)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(self.stem(batch[0])).float(), batch[1])

    pruning = surgery(module="net", latency_batches=(2,))
    trainer(method(0.5, epochs=2), pruning, max_epochs=3, precision="bf16-mixed").fit(Behind(), image_loader(8))
    assert pruning.report is not None and not [w for w in pruning.report.warnings if "could not" in w]
    assert pruning.report.cost_after.macs < pruning.report.cost_before.macs


@pytest.mark.parametrize("epochs", [2, 4])
def test_a_dense_run_resumed_behind_the_start_has_the_whole_stage(epochs: int, tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, "dense")
    trainer(keeper, max_epochs=3, enable_checkpointing=True).fit(Classifier(seeded(conv_net)), image_loader(4))
    method, pruning = GReg1(0.5, epochs=epochs), surgery()
    run = trainer(method, pruning, max_epochs=4 + epochs)
    run.fit(Classifier(seeded(conv_net)), image_loader(4), ckpt_path=tmp_path / "dense.ckpt")
    state = method.state_dict()
    assert (state["began"], state["origin"], state["ended"]) == (3, 12, epochs)
    assert pruning.plan is not None
    with pytest.raises(ConfigurationError, match=f"start=3 and epochs={epochs} don't fit into max_epochs={2 + epochs}"):
        trainer(GReg1(0.5, epochs=epochs), surgery(), max_epochs=2 + epochs).fit(
            Classifier(seeded(conv_net)), image_loader(4), ckpt_path=tmp_path / "dense.ckpt"
        )


def test_a_changing_window_is_not_refused_by_batches() -> None:
    method = GReg1(0.5, start=1, epochs=2)
    run = trainer(method, GradientAccumulationScheduler({0: 4, 1: 2}), max_epochs=-1, max_steps=24)
    run.fit(Classifier(seeded(conv_net)), image_loader(16))
    assert run.global_step == 24 and method.ready


def test_parameter_groups_are_judged_by_their_own_rate() -> None:
    class Groups(Classifier):
        def configure_optimizers(self) -> Any:
            body, head = list(self.net[:5].parameters()), list(self.net[5:].parameters())
            return torch.optim.AdamW([{"params": body, "lr": 1e-3}, {"params": head, "lr": 1e-2}])

    method = GReg1(0.5, schedule=GReg1Schedule(20.0, 200.0, 1, 5), coupled=False)
    trainer(method, max_epochs=2).fit(Groups(seeded(conv_net)), image_loader(10))
    assert method.ready


@pytest.mark.parametrize("arguments", [{"passes": 2}, {"global_epochs": 1, "restart_from": "baseline"}], ids=str)
def test_a_dry_run_of_mask_sparsity(arguments: dict[str, Any]) -> None:
    run = trainer(MaskSparsity(0.5, epochs=3, **arguments), surgery(), fast_dev_run=1)
    run.fit(Classifier(seeded(conv_net)), image_loader(4))


def test_a_restart_that_would_undo_another_method_is_refused() -> None:
    first = GReg1(0.5, epochs=2, ignore=["0"])
    second = MaskSparsity(0.5, epochs=6, global_epochs=3, restart_from="baseline", ignore=["3"])
    with pytest.raises(ConfigurationError, match="would undo at epoch 3 what GReg1 does from epoch 0 on"):
        trainer(first, second, max_epochs=7).fit(Classifier(seeded(conv_net)), image_loader(4))


@pytest.mark.parametrize("comes_first", [True, False])
@pytest.mark.parametrize("average", [EMAWeightAveraging, lambda: StochasticWeightAveraging(0.01, 1)])
def test_averages_in_any_order_beside_a_slim_file(average: Any, comes_first: bool, tmp_path: Path) -> None:
    net = seeded(conv_net)
    plan = choose(trace(net, IMAGES))
    prune_(net, plan)
    save_slim(net, tmp_path / "slim", plan)
    pair = [average(), LoadPruned(tmp_path / "slim", module="net")]
    module = Classifier(seeded(conv_net))
    trainer(*(pair if comes_first else pair[::-1]), max_epochs=3).fit(module, image_loader(4))
    assert module.net[0].out_channels == 4


@pytest.mark.parametrize("finetune", ["continue", "restart"])
def test_a_files_zeros_outlive_another_stages_optimiser(finetune: Any, tmp_path: Path) -> None:
    net = seeded(conv_net)
    plan = choose_weights(net, 0.5)
    prune_(net, plan)
    save_slim(net, tmp_path / "sparse", plan)
    method = GReg1(0.8, epochs=2, granularity="weight", ignore=["8"])
    module = Classifier(seeded(conv_net))
    callbacks = [LoadPruned(tmp_path / "sparse", module="net"), method, surgery(finetune=finetune)]
    trainer(*callbacks, max_epochs=4).fit(module, image_loader(8))
    head = module.net[8].weight
    assert int((head == 0).sum()) == head.numel() // 2


def test_layers_that_are_built_in_configure_model(tmp_path: Path) -> None:
    class Late(Classifier):
        def __init__(self) -> None:
            super().__init__(nn.Identity())
            self.net: Any = None

        def configure_model(self) -> None:
            if self.net is None:
                self.net = seeded(conv_net)

    module, pruning = Late(), surgery(module="net")
    trainer(MaskSparsity(0.5, epochs=2), pruning, max_epochs=3).fit(module, image_loader(8))
    assert module.net[0].out_channels == 4 and pruning.plan is not None
    save_slim(module, tmp_path / "slim", pruning.plan)
    again = Late()
    trainer(LoadPruned(tmp_path / "slim"), max_epochs=1).fit(again, image_loader(2))
    assert again.net[0].out_channels == 4


def test_metadata_may_have_numbers_as_keys(tmp_path: Path) -> None:
    net = seeded(conv_net)
    plan = choose(trace(net, IMAGES))
    prune_(net, plan)
    save_slim(net, tmp_path / "slim", plan, per_class={2: 0.1, 10: 0.2, -1: 0.3})
    assert load_slim(tmp_path / "slim", seeded(conv_net)) == plan
