"""What is pruned, what it is called with, and that the watching leaves no trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from lightning_prune import ASCP, GReg1, StructuralPruning
from lightning_prune.callbacks.base import PruningCallback
from lightning_prune.callbacks.capture import Capture
from lightning_prune.errors import ConfigurationError, TraceError
from tests.callbacks.nets import Classifier, conv_net, feature_loader, image_loader, linear_net, seeded, trainer


class Watcher(PruningCallback):
    """A pruning callback that only looks."""

    @property
    def finished(self) -> bool:
        return False


class Forwards(Classifier):
    """Calls its own forward, with a keyword."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.net(x) * scale

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0], scale=2.0), batch[1])


class Speaking(Forwards):
    """Logs in its own forward."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        outputs = self.net(x) * scale
        self.log("calls", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
        self.log("largest", outputs.detach().max())
        return outputs


class Twins(Classifier):
    """Two networks, both called."""

    def __init__(self) -> None:
        super().__init__(linear_net())
        self.other = linear_net()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]) + self.other(batch[0]), batch[1])


class Criterion(Classifier):
    """A loss module without parameters beside the network."""

    def __init__(self) -> None:
        super().__init__(linear_net())
        self.criterion = nn.CrossEntropyLoss()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.criterion(self.net(batch[0]), batch[1])


class Bypass(Classifier):
    """Manual optimisation that never tells Lightning about its backward."""

    def __init__(self) -> None:
        super().__init__(linear_net())
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        super().training_step(batch, batch_idx).backward()
        optimizer.step()


def hooks(module: nn.Module) -> int:
    return sum(len(part._forward_pre_hooks) + len(part._forward_hooks) for part in module.modules())


def watched(built: LightningModule, *callbacks: Any, module: str | None = None, **kwargs: Any) -> Watcher:
    watcher = Watcher(module)
    trainer(watcher, *callbacks, **kwargs).fit(built, feature_loader(3))
    return watcher


@pytest.mark.parametrize(
    ("module", "name"),
    [(lambda: Classifier(linear_net()), "net"), (lambda: Forwards(linear_net()), ""), (Criterion, "net")],
)
def test_the_pruned_module_is_found(module: Any, name: str) -> None:
    built = module()
    watcher = watched(built)
    assert watcher.capture.name == name
    assert watcher.capture.graph is not None
    assert watcher.capture.graph.model is built.get_submodule(name)
    assert {group.producers for group in watcher.capture.graph.groups} == {
        (f"{'net.' if name == '' else ''}{layer}",) for layer in (0, 2)
    }


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_a_first_batch_without_a_loss_is_waited_out() -> None:
    class Late(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

    watcher = watched(Late(linear_net()))
    assert watcher.capture.name == "net" and watcher.capture.graph is not None


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_a_scripted_network_is_refused() -> None:
    with pytest.raises(TraceError, match="'net' is scripted"):
        watched(Classifier(torch.jit.script(linear_net())))


def test_several_candidates_are_one_clear_error() -> None:
    with pytest.raises(ConfigurationError, match=r"several modules \(net, other\)"):
        watched(Twins())


def test_a_name_decides_between_candidates() -> None:
    assert watched(Twins(), module="other").capture.name == "other"


def test_unknown_and_uncalled_names_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="no part of the LightningModule; its children are: net"):
        watched(Classifier(linear_net()), module="nett")
    built = Classifier(linear_net())
    built.spare = nn.Linear(2, 2)  # type: ignore[assignment]
    with pytest.raises(ConfigurationError, match="isn't called by training_step"):
        watched(built, module="spare")


def test_a_bare_forward_is_refused() -> None:
    class Bare(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(batch[0] @ self.net[0].weight.T, batch[1])

    with pytest.raises(ConfigurationError, match="calls no module"):
        watched(Bare(linear_net()))


def test_the_latest_batch_is_kept_detached() -> None:
    seen: list[Any] = []
    batches: list[Any] = []

    class Look(Callback):
        def on_train_batch_end(self, run: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(watcher.capture.inputs)
            batches.append(batch[0])

    watcher = Watcher()
    trainer(watcher, Look()).fit(Forwards(linear_net()), feature_loader(3))
    for (args, kwargs), batch in zip(seen, batches, strict=True):
        assert torch.equal(args[0], batch) and not args[0].requires_grad
        assert kwargs == {"scale": 2.0}


@pytest.mark.parametrize("kind", [lambda: Classifier(linear_net()), lambda: Forwards(linear_net())])
def test_nothing_is_left_behind(kind: Any) -> None:
    built = kind()
    torch.manual_seed(5)
    watcher = watched(built)
    after = torch.rand(1)
    assert hooks(built) == 0
    assert watcher.capture.inputs is None
    torch.manual_seed(5)
    trainer().fit(built, feature_loader(3))
    assert torch.equal(after, torch.rand(1))


def test_nothing_is_left_behind_after_an_error() -> None:
    class Fail(Callback):
        def on_train_batch_end(self, run: Any, pl_module: LightningModule, *_: Any) -> None:
            assert hooks(pl_module) == 1
            raise ZeroDivisionError

    built = Classifier(linear_net())
    with pytest.raises(ZeroDivisionError):
        watched(built, Fail())
    assert hooks(built) == 0


def test_watching_changes_no_weight() -> None:
    plain, seen = (Classifier(copy.deepcopy(seeded(linear_net))) for _ in range(2))
    trainer().fit(plain, feature_loader(3))
    watched(seen)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), seen.parameters(), strict=True))


def test_manual_optimisation_without_backward_hooks_is_caught_before_the_first_step() -> None:
    class First(Callback):
        def on_before_optimizer_step(self, run: Any, pl_module: Any, optimizer: Any) -> None:
            assert watcher.capture.graph is not None
            assert not optimizer.state

    watcher = Watcher()
    trainer(watcher, First(), max_steps=1).fit(Bypass(), feature_loader(3))


def test_all_callbacks_share_one_capture() -> None:
    first, second = Watcher(), Watcher("net")
    trainer(first, second).fit(Classifier(linear_net()), feature_loader(2))
    assert first.capture is second.capture and first.capture.name == "net"


def test_callbacks_that_name_different_modules_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="different modules: net, other"):
        trainer(Watcher("net"), Watcher("other")).fit(Twins(), feature_loader(2))


def test_a_second_trainer_watches_anew() -> None:
    watcher = Watcher()
    for built in (Classifier(linear_net()), Forwards(linear_net())):
        trainer(watcher).fit(built, feature_loader(2))
        assert watcher.capture.graph is not None
        assert watcher.capture.graph.model is (built if isinstance(built, Forwards) else built.net)


def test_under_ddp_the_wrappers_own_call_is_not_the_users(tmp_path: Any) -> None:
    """Lightning leads the wrapper's forward into ``training_step`` through the module's; this pins how."""
    watcher = watched(Classifier(linear_net()), strategy="ddp", default_root_dir=tmp_path)
    assert watcher.capture.name == "net"
    assert watched(Forwards(linear_net()), strategy="ddp", default_root_dir=tmp_path).capture.name == ""


@pytest.mark.parametrize("how", ["the child", "the child in place", "the whole module"])
def test_compiled_modules_are_seen_too(how: str) -> None:
    """A hook inside a compiled call would be passed by, so the first batch runs without the compiler."""
    built = Classifier(seeded(linear_net))
    whole: Any = built
    if how == "the child":
        built.net = torch.compile(built.net, backend="eager")  # type: ignore[assignment]
    elif how == "the child in place":
        built.net.compile(backend="eager")
    else:
        whole = torch.compile(built, backend="eager")
    watcher = Watcher()
    trainer(watcher).fit(whole, feature_loader(3))
    assert watcher.capture.name == "net" and watcher.capture.graph is not None
    assert len(watcher.capture.graph.groups) == 2
    assert hooks(built) == 0


def test_without_a_fit_there_is_no_capture() -> None:
    with pytest.raises(ConfigurationError, match="belongs to no fit"):
        _ = Watcher().capture
    with pytest.raises(ConfigurationError, match="known only after"):
        _ = Capture(Classifier(linear_net())).module


@pytest.mark.filterwarnings("ignore:.*too few optimiser steps", "ignore:.*of the energy was left")
@pytest.mark.parametrize("method", [GReg1, ASCP])
def test_what_a_forward_logs_is_logged_for_the_batches_of_the_run_alone(method: Any) -> None:
    """And neither while the network is traced and proved, nor while its statistics are taken anew."""
    counts = []

    class Count(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
            counts.append(trainer.callback_metrics["calls"].item())

    built = Speaking(seeded(conv_net))
    pruning = StructuralPruning(latency_batches=(2,), report_file=None)
    trainer(method(0.5, epochs=2), pruning, Count(), max_epochs=4).fit(built, image_loader(5))
    assert pruning.report is not None and pruning.report.latency_after
    assert pruning.plan is not None and pruning.plan.widths()["net.0"] == (8, 4)
    assert counts == [5] * 4
    assert "log" not in vars(built)
