"""An injected penalty leaves the weights of a run exactly where the same penalty, written in training_step, does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.plugins import TorchSyncBatchNorm
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.amp import GradScaler

from lightning_prune.callbacks.inject import Penalty, add_to_gradients_, add_to_loss_, uses_loss
from lightning_prune.penalties import weighted_l2
from tests.callbacks.nets import feature_loader, linear_net, seeded, trainer

STRENGTH = 0.0625


def weights(net: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in net.parameters() if parameter.dim() == 2]


class Injected(Callback):
    """The thinnest possible user of the injection."""

    def penalty(self, pl_module: LightningModule) -> Callable[[], Penalty]:
        def compute() -> Penalty:
            assert not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
            found = weights(pl_module)
            value, gradients = weighted_l2(found, [torch.full_like(weight, STRENGTH) for weight in found])
            return Penalty(value, found, gradients)

        return compute

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if uses_loss(trainer, pl_module):
            add_to_loss_(loss, self.penalty(pl_module), trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if not uses_loss(trainer, pl_module):
            add_to_gradients_(self.penalty(pl_module), optimizer, trainer)


class Automatic(LightningModule):
    """Cross-entropy, with or without the penalty written out."""

    def __init__(self, net: nn.Module, written: bool, optimizer: Callable[[Any], Any]) -> None:
        super().__init__()
        self.net = net
        self.written = written
        self.optimizer = optimizer
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]).float(), batch[1])
        self.losses.append(loss.item())
        return loss + written(self.net) if self.written else loss

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


class Compiled(Automatic):
    """The network is compiled before it is fitted."""

    def __init__(self, net: nn.Module, written: bool, optimizer: Callable[[Any], Any]) -> None:
        super().__init__(torch.compile(net, backend="aot_eager"), written, optimizer)  # type: ignore[arg-type]


class CompiledAltogether(Automatic):
    """The training step is compiled as well."""


class Normed(Automatic):
    """With batch norm between the layers."""

    def __init__(self, net: nn.Module, written: bool, optimizer: Callable[[Any], Any]) -> None:
        layers: Any = net
        super().__init__(nn.Sequential(layers[0], nn.BatchNorm1d(12), *layers[1:]), written, optimizer)

    def on_train_end(self) -> None:
        assert isinstance(self.net[1], nn.SyncBatchNorm)  # type: ignore[index]


class Synchronising(SingleDeviceStrategy):
    """Exchanges the norms where DDP does, after all callbacks' setup."""

    def setup(self, trainer: Trainer) -> None:
        self.model = TorchSyncBatchNorm().apply(self.model)  # type: ignore[arg-type]
        super().setup(trainer)


class Clock(Timer):
    """What ``max_time`` makes, but a second is an optimiser step."""

    def __init__(self, seconds: int) -> None:
        super().__init__({"seconds": seconds}, verbose=False)
        self.seconds = 0

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self.seconds += 1
        super().on_train_batch_end(trainer, *args, **kwargs)

    def time_elapsed(self, stage: Any = None) -> float:
        return float(self.seconds)


class Adversaries(LightningModule):
    """Two optimisers that step in turns under manual optimisation."""

    def __init__(self, net: nn.Module, written: bool, optimizer: Callable[[Any], Any]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = net
        self.written = written
        self.optimizer = optimizer

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        front, back = self.optimizers()  # type: ignore[attr-defined]
        halves = [(front, self.net[:2])]
        if batch_idx % 2:
            halves.append((back, self.net[2:]))
        for optimizer, half in halves:
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss + written(half) if self.written else loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.net[:2].parameters()), self.optimizer(self.net[2:].parameters())


def written(net: nn.Module) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return sum((STRENGTH / 2 * weight**2).sum() for weight in weights(net))  # type: ignore[return-value]


def sgd(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def adam(parameters: Any) -> Any:
    return torch.optim.Adam(parameters, lr=1e-2)


def lbfgs(parameters: Any) -> Any:
    return torch.optim.LBFGS(parameters, lr=0.5, max_iter=3)


def half_precision() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", GradScaler("cpu"))


class HasScaler(Callback):
    """A run that was meant to scale its gradients, and does."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scaler = trainer.precision_plugin.scaler
        assert scaler is not None and scaler.get_scale() > 1


def outcome(kind: Any, optimizer: Any, is_written: bool, **kwargs: Any) -> tuple[nn.Module, Any]:
    module = kind(copy.deepcopy(seeded(linear_net)), is_written, optimizer)
    callbacks = [*kwargs.pop("callbacks", []), *([] if is_written else [Injected()])]
    whole = torch.compile(module, backend="eager") if kind is CompiledAltogether else module
    trainer(*callbacks, **kwargs).fit(whole, feature_loader(10, 8))  # type: ignore[arg-type]
    return module.net, module


def distance(first: nn.Module, second: nn.Module) -> float:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


CONFIGURATIONS: dict[str, tuple[Any, Any, Callable[[], dict[str, Any]]]] = {
    "fp32": (Automatic, sgd, lambda: {}),
    "accumulation with a short last window": (Automatic, sgd, lambda: {"accumulate_grad_batches": 4}),
    "a window that changes": (Automatic, sgd, lambda: {"callbacks": [GradientAccumulationScheduler({0: 2, 1: 4})]}),
    "a part of the batches": (Automatic, sgd, lambda: {"limit_train_batches": 0.5}),
    "an end in the middle of an epoch": (Automatic, adam, lambda: {"max_steps": 13}),
    "clipping": (Automatic, sgd, lambda: {"gradient_clip_val": 0.1}),
    "clipping by value": (Automatic, sgd, lambda: {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "averages": (Automatic, sgd, lambda: {"callbacks": [EMAWeightAveraging(decay=0.9)]}),
    "stochastic averages": (
        Automatic,
        sgd,
        lambda: {"callbacks": [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)], "max_epochs": 3},
    ),
    "compiled": (Compiled, sgd, lambda: {}),
    "compiled altogether": (CompiledAltogether, sgd, lambda: {}),
    "synchronised norms": (Normed, sgd, lambda: {"strategy": Synchronising("cpu")}),
    "an end after some time": (Automatic, sgd, lambda: {"callbacks": [Clock(13)]}),
    "a dry run": (Automatic, sgd, lambda: {"fast_dev_run": 7}),
    "adam": (Automatic, adam, lambda: {}),
    "lbfgs": (Automatic, lbfgs, lambda: {}),
    "bf16": (Automatic, sgd, lambda: {"precision": "bf16-mixed"}),
    "fp16": (Automatic, sgd, lambda: {"plugins": [half_precision()], "callbacks": [HasScaler()]}),
    "fp16 and accumulation": (
        Automatic,
        sgd,
        lambda: {"plugins": [half_precision()], "callbacks": [HasScaler()], "accumulate_grad_batches": 4},
    ),
    "double": (Automatic, sgd, lambda: {"precision": "64-true"}),
    "manual": (Adversaries, sgd, lambda: {}),
    "manual adam": (Adversaries, adam, lambda: {}),
    "manual fp16": (Adversaries, sgd, lambda: {"plugins": [half_precision()], "callbacks": [HasScaler()]}),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks at it
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_injected_equals_written(name: str) -> None:
    kind, optimizer, settings = CONFIGURATIONS[name]
    reference, _ = outcome(kind, optimizer, True, **{"max_epochs": 2, **settings()})
    injected, _ = outcome(kind, optimizer, False, **{"max_epochs": 2, **settings()})
    assert distance(reference, injected) == 0.0
    assert all(torch.equal(a, b) for a, b in zip(reference.buffers(), injected.buffers(), strict=True))
    begun = kind(seeded(linear_net), True, optimizer).net.to(next(reference.parameters()).dtype)
    assert distance(reference, begun) > 0.01


def test_the_penalty_is_felt() -> None:
    module = Automatic(copy.deepcopy(seeded(linear_net)), False, sgd)
    trainer(max_epochs=2).fit(module, feature_loader(10, 8))
    assert distance(module.net, outcome(Automatic, sgd, False, max_epochs=2)[0]) > 1e-3


def test_fused_optimisers_get_the_scaled_penalty() -> None:
    """They unscale in their own step, after the hook."""
    settings = {"plugins": [half_precision()], "callbacks": [HasScaler()], "max_epochs": 1}

    def fused(parameters: Any) -> Any:
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, fused=True)

    assert fused([nn.Parameter(torch.ones(1))])._step_supports_amp_scaling
    reference, _ = outcome(Adversaries, fused, True, **settings)
    settings["plugins"] = [half_precision()]
    injected, _ = outcome(Adversaries, fused, False, **settings)
    assert distance(reference, injected) < 1e-6


def test_the_users_loss_is_not_changed_in_the_log() -> None:
    """Lightning hands out a clone taken before the hook; this pins it."""

    seen: list[float] = []

    class Seen(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            seen.append(outputs["loss"].item())

    _, module = outcome(Automatic, sgd, False, callbacks=[Seen()])
    assert seen == module.losses


@pytest.mark.parametrize("unused", [True, False])
def test_unused_parameters_under_ddp_are_not_reached_through_the_loss(unused: bool) -> None:
    stand_in: Any = SimpleNamespace(strategy=DDPStrategy(find_unused_parameters=unused))
    assert uses_loss(stand_in, LightningModule()) is not unused


def handed_over(factor: float) -> tuple[Tensor, Tensor]:
    """A loss with a penalty of value 3 and gradient 2, times a factor; and the parameter."""
    parameter = nn.Parameter(torch.ones(4))
    loss = (5 * parameter).sum()
    penalty = Penalty(torch.tensor(3.0), [parameter], [torch.full((4,), 2.0)], fresh=True)
    add_to_loss_(loss, lambda: penalty, trainer())
    return factor * loss, parameter


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_loss_whose_graph_is_kept_gives_its_gradients_again(factor: float) -> None:
    loss, parameter = handed_over(factor)
    assert loss.item() == 23 * factor
    for passes in (1, 2):
        loss.backward(retain_graph=True)
        assert torch.equal(parameter.grad, torch.full((4,), 7 * factor * passes))
    loss.backward()
    assert torch.equal(parameter.grad, torch.full((4,), 7 * factor * 3))
    with pytest.raises(RuntimeError, match="retain"):
        loss.backward()


def test_gradients_that_nobody_else_holds_are_handed_over_without_a_copy() -> None:
    """As large as the weights, a copy would cost as much as the penalty itself."""
    parameter, gradient = nn.Parameter(torch.ones(4)), torch.full((4,), 2.0)
    place = gradient.data_ptr()
    loss = torch.zeros((), requires_grad=True).clone()
    found = [Penalty(torch.tensor(3.0), [parameter], [gradient], fresh=True)]
    del gradient
    add_to_loss_(loss, found.pop, trainer())
    loss.backward()
    assert parameter.grad is not None and parameter.grad.data_ptr() == place


def test_gradients_that_a_method_keeps_stay_as_they_are() -> None:
    """Such as a constant one, or the parameter itself, whose half square is penalised."""
    parameter, kept = nn.Parameter(torch.ones(4)), torch.full((4,), 2.0)
    for gradient in (kept, parameter.detach()):
        loss = (5 * parameter).sum()
        found = [Penalty(torch.tensor(3.0), [parameter], [gradient])]
        add_to_loss_(loss, found.pop, trainer(accumulate_grad_batches=4))
        parameter.grad = None
        loss.backward()
        assert torch.equal(parameter.grad, 5 + gradient / 4)
        parameter.grad.zero_()
    assert torch.equal(kept, torch.full((4,), 2.0))
    assert torch.equal(parameter.detach(), torch.ones(4))
