"""What can't work is refused by one sentence before the first step: sharded, frozen and quantised networks."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.ao import quantization
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.utils._python_dispatch import return_and_correct_aliasing

from lightning_prune.callbacks.loading import LoadPruned
from lightning_prune.callbacks.magnitude import Magnitude
from lightning_prune.callbacks.structural import StructuralPruning
from lightning_prune.errors import ConfigurationError
from tests.callbacks.nets import Classifier, conv_net, feature_loader, image_loader, linear_net, seeded, trainer
from tests.callbacks.slimming import Picker
from tests.callbacks.test_capture import Twins
from tests.settings import SETTINGS

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max"),
]


class Steps(torch.optim.SGD):
    """Counts its steps, those of all instances together."""

    taken = 0

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        Steps.taken += 1
        return result


class Task(Classifier):
    """Trains whatever is left to be trained."""

    def configure_optimizers(self) -> Any:
        return Steps([*self.parameters(), nn.Parameter(torch.zeros(1))], lr=0.01)


def hooks_of(task: nn.Module) -> list[int]:
    """Numbers of hooks, module by module; observers bring some of their own."""
    return [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in task.modules()]


def refused(match: str, task: Classifier, *callbacks: Any, loader: Any = None) -> None:
    before, hooks = Steps.taken, hooks_of(task)
    with pytest.raises(ConfigurationError, match=match) as caught:
        trainer(*callbacks, max_epochs=4).fit(task, image_loader(2) if loader is None else loader)
    assert "\n" not in str(caught.value)
    assert Steps.taken == before
    assert not {"on_load_checkpoint", "on_save_checkpoint"} & vars(task).keys()
    assert hooks_of(task) == hooks


# Strategies and optimisers.

SHARDED: dict[str, Callable[[], Any]] = {
    "FSDPStrategy": FSDPStrategy,
    "ModelParallelStrategy": ModelParallelStrategy,
    # is built with deepspeed alone, which no test has
    "DeepSpeedStrategy": lambda: object.__new__(DeepSpeedStrategy),
}
CALLBACKS: dict[str, Callable[[], Any]] = {
    **{row: SETTINGS[row].build for row in ("ascp", "greg1", "greg2", "magnitude", "mask_sparsity", "tpp")},
    "surgery": StructuralPruning,
    "loading": lambda: LoadPruned("slim.safetensors"),
}


@pytest.mark.parametrize("strategy", SHARDED)
@pytest.mark.parametrize("callback", CALLBACKS)
def test_strategies_that_shard_parameters(callback: str, strategy: str) -> None:
    own = CALLBACKS[callback]()
    stand_in: Any = SimpleNamespace(strategy=SHARDED[strategy](), callbacks=[own], world_size=1, is_global_zero=True)
    task = Classifier(conv_net())
    with pytest.raises(ConfigurationError) as caught:
        own.setup(stand_in, task, "fit")
    assert str(caught.value) == f"{type(own).__name__} can't change shapes under {strategy}; use one device or DDP."
    assert not {"on_load_checkpoint", "on_save_checkpoint"} & vars(task).keys()


@pytest.mark.parametrize("row", ["ascp", "greg1", "greg2", "magnitude", "mask_sparsity", "tpp"])
def test_an_optimiser_that_shards_its_state(row: str) -> None:
    class Sharded(Task):
        def configure_optimizers(self) -> Any:
            return ZeroRedundancyOptimizer(self.parameters(), optimizer_class=Steps, lr=0.01)

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    refused("sharded state of ZeroRedundancyOptimizer can't be sliced", Sharded(conv_net()), SETTINGS[row].build())


# Frozen networks.


@pytest.mark.parametrize("row", ["ascp", "greg1", "greg2", "magnitude", "mask_sparsity", "tpp"])
def test_a_network_that_is_frozen_altogether(row: str) -> None:
    net = conv_net().requires_grad_(False)
    match = "every parameter of Task is frozen, so there is nothing to train or prune"
    refused(match, Task(net), SETTINGS[row].build(), StructuralPruning())


@pytest.mark.parametrize("row", ["ascp", "greg1", "greg2", "mask_sparsity", "tpp"])
def test_a_network_of_which_nothing_can_be_shrunk(row: str) -> None:
    net = conv_net().requires_grad_(False)

    class Headed(Task):
        def __init__(self) -> None:
            super().__init__(net)
            self.scale = nn.Parameter(torch.ones(()))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * self.scale

    refused("all weights that it is to shrink are frozen", Headed(), SETTINGS[row].build(), loader=image_loader(7))


def test_a_network_without_a_layer_that_may_go() -> None:
    refused("finds no layer to prune", Task(nn.Sequential(nn.Flatten(), nn.Linear(108, 4))), Magnitude(0.5))


class Averaging(nn.Module):
    """Divides what its layer makes by an average over it."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(108, 8), nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.hidden(images.flatten(1)).relu()
        return self.head(hidden / (1 + hidden.mean(1, keepdim=True)))


def test_layers_that_only_another_scope_prunes_are_named() -> None:
    refused("hidden: Averages are taken over its channels.*scope='all' prunes it", Task(Averaging()), Magnitude(0.5))


# Quantised networks.


class Packed(Tensor):
    """A tensor that keeps its values in eight bits, as quantisation libraries have them."""

    def __new__(cls, values: Tensor, scale: Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)  # type: ignore[attr-defined]

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self.values, self.scale = values, scale

    def __tensor_flatten__(self) -> Any:
        return ["values", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, context: Any, size: Any, stride: Any) -> Any:
        return cls(inner["values"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def whole(value: Any) -> Any:
            return value.values.to(value.scale.dtype) * value.scale if isinstance(value, Packed) else value

        if func is torch.ops.aten.detach.default:
            return return_and_correct_aliasing(func, args, kwargs, Packed(args[0].values, args[0].scale))
        arguments = torch.utils._pytree.tree_map(whole, (args, kwargs or {}))
        return func(*arguments[0], **arguments[1])


def packed() -> nn.Module:
    net: Any = linear_net()
    values = torch.randint(-100, 100, (12, 12), dtype=torch.int8)
    net[2].weight = nn.Parameter(Packed(values, torch.tensor(0.01)), requires_grad=False)
    return net


def observed() -> nn.Module:
    net = linear_net()
    net.qconfig = quantization.get_default_qconfig("x86")  # type: ignore[assignment]
    return quantization.prepare(net.eval()).train()


def trained_for_it() -> nn.Module:
    net = linear_net().train()
    net.qconfig = quantization.get_default_qat_qconfig("x86")  # type: ignore[assignment]
    return quantization.prepare_qat(net)


class Eight(nn.Module):
    """Eight bits in a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(12, 12, dtype=torch.int8), requires_grad=False)

    def forward(self, features: Tensor) -> Tensor:
        return features @ self.weight.to(features.dtype)


QUANTISED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dynamically": (lambda: quantization.quantize_dynamic(linear_net(), {nn.Linear}), r"'net.0' is quantised \(Linear"),
    "observers": (observed, r"'net.0.activation_post_process' is quantised \(HistogramObserver\)"),
    "fake quantisation": (trained_for_it, r"'net.0' is quantised \(Linear\)"),
    "integers": (lambda: nn.Sequential(linear_net(12, 12), Eight()), r"'net.1' is quantised \(Eight of int8\)"),
    "a tensor subclass": (packed, r"'net.2' is quantised \(Linear of Packed\)"),
}


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("granularity", ["channel", "weight"])
@pytest.mark.parametrize("named", [False, True])
def test_quantised_networks(kind: str, granularity: str, named: bool) -> None:
    build, match = QUANTISED[kind]
    method = Magnitude(0.5, granularity=granularity, module="net" if named else None)  # type: ignore[arg-type]
    refused(match, Task(build()), method, StructuralPruning(), loader=feature_loader(2))


class Placed(nn.Module):
    """Positions and a mask as parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.order = nn.Parameter(torch.arange(6), requires_grad=False)
        self.mask = nn.Parameter(torch.ones(6, dtype=torch.bool), requires_grad=False)

    def forward(self, features: Tensor) -> Tensor:
        return features[:, self.order] * self.mask


def test_positions_and_masks_are_not_quantised() -> None:
    surgery = StructuralPruning(latency_batches=(), report_file=None)
    task = Classifier(nn.Sequential(Placed(), linear_net()))
    trainer(Magnitude(0.5), surgery, max_epochs=2).fit(task, feature_loader(2))
    assert surgery.plan is not None


class Distilled(Twins):
    """A quantised teacher beside the network in training."""

    def __init__(self, teaches: bool) -> None:
        super().__init__()
        self.other = trained_for_it()  # type: ignore[assignment]
        self.teaches = teaches

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        with torch.no_grad():
            aim = self.other(batch[0])
        loss = nn.functional.mse_loss(self.net(batch[0]), aim)
        return loss if self.teaches else super().training_step(batch, batch_idx)


def test_a_quantised_teacher_beside_the_network_is_welcome() -> None:
    task, surgery = Distilled(True), StructuralPruning(latency_batches=(), report_file=None)
    trainer(Picker(epochs=1, module="net"), surgery, max_epochs=2).fit(task, feature_loader(2))
    assert surgery.plan is not None
    refused(
        r"'other.0' is quantised \(Linear\)",
        seeded(Distilled, False),
        Magnitude(0.5, module="other"),
        loader=feature_loader(2),
    )
