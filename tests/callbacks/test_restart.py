"""The masked stage sets out from other weights than the global stage leaves."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.callbacks.mask_sparsity import MaskSparsity
from lightning_prune.callbacks.restart import read_weights
from lightning_prune.callbacks.structural import StructuralPruning
from lightning_prune.errors import ConfigurationError
from tests.callbacks.nets import OPTIMIZERS, Classifier, conv_net, image_loader, seeded, trainer

EITHER_OPTIMIZER = pytest.mark.parametrize("optimizer", OPTIMIZERS)
PARTIAL = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`", "ignore:You're resuming from a checkpoint that ended before"
)
BATCHES = 6


class Diary(Callback):
    """All weights and the optimiser's state at the beginning of every epoch."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.states: list[int] = []

    def on_train_epoch_start(self, run: Any, pl_module: Any) -> None:
        self.weights.append({name: value.clone() for name, value in pl_module.state_dict().items()})
        self.states.append(sum(bool(state) for state in run.optimizers[0].state.values()))


def fit(method: MaskSparsity, module: Classifier, *more: Callback, **settings: Any) -> Diary:
    diary = Diary()
    trainer(method, diary, *more, **{"max_epochs": 4, **settings}).fit(module, image_loader(BATCHES))
    return diary


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> set[str]:
    """Names of tensors that are the same in both."""
    return {name for name in first if torch.equal(first[name], second[name])}


def restarting(path: str = "baseline", **arguments: Any) -> MaskSparsity:
    return MaskSparsity(**{"ratio": 0.5, "start": 1, "epochs": 3, "global_epochs": 1, **arguments}, restart_from=path)


@EITHER_OPTIMIZER
def test_the_mask_is_the_global_stages_and_the_weights_are_the_baselines(
    optimizer: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain = MaskSparsity(0.5, start=1, epochs=3, global_epochs=1)
    without = fit(plain, Classifier(seeded(conv_net), optimizer))
    method = restarting()
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        diary = fit(method, Classifier(seeded(conv_net), optimizer))
    assert method.removal() == plain.removal()
    # running statistics have seen the stage's first batch
    moved = {name for name in diary.weights[1] if "running" in name or "tracked" in name}
    assert equal(diary.weights[1], diary.weights[2]) == set(diary.weights[1]) - moved
    assert not equal(diary.weights[1], without.weights[2]) & {"net.0.weight", "net.1.weight", "net.8.bias"}
    parameters = sum(1 for _ in seeded(conv_net).parameters())
    assert diary.states == [0, parameters, 0, parameters]
    assert any("15 tensors go back to baseline" in said for said in caplog.messages)
    assert method.state_dict()["method"]["baseline"] == {}  # nothing is kept longer than needed


@EITHER_OPTIMIZER
def test_surgery_after_a_restart_is_lossless(optimizer: str) -> None:
    outputs: list[Tensor] = []

    class Look(Callback):
        def on_train_epoch_end(self, run: Any, pl_module: Any) -> None:
            self.look(pl_module)

        def on_train_batch_start(self, run: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                self.look(pl_module)

        def look(self, pl_module: Any) -> None:
            images = next(iter(image_loader(1)))[0]
            pl_module.net.eval()
            outputs.append(pl_module.net(images).detach())
            pl_module.net.train()

    pruning = StructuralPruning(latency_batches=(), report_file=None)
    module = Classifier(seeded(conv_net), optimizer)
    fit(restarting(ratio=None, budget={"macs": 0.5}), module, pruning, Look(), max_epochs=5)
    assert pruning.plan is not None
    assert (outputs[8] - outputs[7]).abs().max() < 1e-5 * outputs[7].abs().max()


@pytest.mark.parametrize("form", ["checkpoint", "state", "network"])
def test_weights_come_from_a_file(form: str, tmp_path: Path) -> None:
    other = Classifier(seeded(conv_net, seed=7))
    path = tmp_path / "other.pt"
    whole = other.state_dict()
    torch.save({"checkpoint": {"state_dict": whole}, "state": whole, "network": other.net.state_dict()}[form], path)
    diary = fit(restarting(str(path)), Classifier(seeded(conv_net)))
    assert equal(diary.weights[2], whole) == set(whole)
    assert not equal(diary.weights[1], whole) & {"net.0.weight"}


def test_weight_averages_begin_anew_too() -> None:
    averages = EMAWeightAveraging(decay=0.8)
    seen: list[dict[str, Tensor]] = []

    class Look(Callback):
        def on_train_epoch_start(self, run: Any, pl_module: Any) -> None:
            average: Any = averages._average_model
            seen.append({name: value.clone() for name, value in average.module.named_parameters()})

    diary = fit(restarting(), Classifier(seeded(conv_net)), averages, Look())
    # their last update of the epoch, which comes later, rounds
    assert all((value - diary.weights[2][name]).abs().max() < 1e-6 for name, value in seen[2].items())
    assert any((value - diary.weights[1][name]).abs().max() > 1e-3 for name, value in seen[3].items())


@EITHER_OPTIMIZER
@PARTIAL
def test_a_run_resumed_around_the_restart_is_the_uninterrupted_run(optimizer: str, tmp_path: Path) -> None:
    # every batch is the same, so that it doesn't matter at which one a loader goes on
    images, labels = next(iter(image_loader(1)))
    loader = DataLoader(TensorDataset(images.repeat(4, 1, 1, 1), labels.repeat(4)), batch_size=len(images))

    def run(folder: Path | None, ckpt: Path | None) -> tuple[nn.Module, MaskSparsity]:
        method = restarting(epochs=4, mask_at=[3])
        module = Classifier(seeded(conv_net), optimizer)
        saving = [] if folder is None else [ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)]
        settings: dict[str, Any] = {"max_epochs": 5, "enable_checkpointing": folder is not None}
        trainer(method, *saving, **settings).fit(module, loader, ckpt_path=ckpt, weights_only=True)
        return module.net, method

    whole, first = run(tmp_path, None)
    for step in (4, 5, 7, 8, 9, 12, 13):
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["callbacks"][first.state_key]
        assert bool(saved["method"]["baseline"]) == (4 < step < 8), step
        resumed, second = run(None, tmp_path / f"step={step}.ckpt")
        state, other = whole.state_dict(), resumed.state_dict()
        assert [name for name in state if not torch.equal(state[name], other[name])] == [], step
        assert second.removal() == first.removal()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no file of weights that can be read"),
        ({"net.0.weight": torch.zeros(8, 3, 3, 3)}, r"of 15 tensors by their names it lacks 'net\.0\.bias'"),
        ({**Classifier(conv_net()).state_dict(), "more": torch.zeros(1)}, "it holds 'more', which the module does not"),
        (
            Classifier(conv_net(4)).state_dict(),
            r"'net\.0\.weight' has shape \(4, 3, 3, 3\) there and \(8, 3, 3, 3\) here",
        ),
        ([1, 2], "it lacks"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_before_the_first_step(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    if content is not None:
        torch.save(content, path)
    module = Classifier(seeded(conv_net))
    with pytest.raises(ConfigurationError, match=message) as caught:
        fit(restarting(str(path)), module)
    assert "\n" not in str(caught.value) and "restart_from=" in str(caught.value)
    assert torch.equal(module.net.get_parameter("0.weight"), seeded(conv_net).get_parameter("0.weight"))


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save(Classifier(conv_net()), path)
    with pytest.raises(ConfigurationError, match="is no file of weights"):
        read_weights(str(path), Classifier(conv_net()))


def test_without_a_global_stage_there_is_nothing_to_go_back_from() -> None:
    with pytest.raises(ConfigurationError, match="restart_from='baseline' needs a global stage") as caught:
        MaskSparsity(0.5, epochs=3, restart_from="baseline")
    assert "\n" not in str(caught.value)
