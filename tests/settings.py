"""One row per method: arguments that finish in about 20 optimiser steps on a tiny network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from lightning_prune.callbacks.ascp import ASCP
from lightning_prune.callbacks.base import Regulariser
from lightning_prune.callbacks.greg import GReg1, GReg2
from lightning_prune.callbacks.magnitude import Magnitude
from lightning_prune.callbacks.mask_sparsity import MaskSparsity
from lightning_prune.callbacks.tpp import TPP
from lightning_prune.schedules import ASCPSchedule, GReg1Schedule, GReg2Schedule, TPPSchedule
from lightning_prune.structure import Budget, masked_state, trace
from tests.callbacks.nets import conv_net

EPOCHS = 3
"""Epochs of every row's stage; ``BATCHES`` each."""

BATCHES = 7


Formula = Callable[[nn.Module, dict[str, tuple[int, ...]], float], Tensor]
"""What a method adds to the loss, for autograd: of the network, the channels that go, and the strength."""


def everything(net: nn.Module, removal: dict[str, tuple[int, ...]], strength: float) -> Tensor:
    """Half the squared weights of all that leaves with the channels."""
    plan = trace(net, torch.zeros(2, 3, 6, 6, dtype=next(net.parameters()).dtype)).plan(removal)
    without, weights = masked_state(net, plan), dict(net.named_parameters())
    parts = [(weights[name] * (weights[name].detach() != without[name])) ** 2 for name in without if name in weights]
    return strength / 2 * torch.stack([part.sum() for part in parts]).sum()


def rows(names: dict[str, tuple[str, ...]]) -> Formula:
    """Half the squared rows of the named parameters, one tuple of names per group."""

    def formula(net: nn.Module, removal: dict[str, tuple[int, ...]], strength: float) -> Tensor:
        weights = dict(net.named_parameters())
        parts = [weights[name][list(removal[group])] for group in removal for name in names[group]]
        return strength / 2 * torch.stack([part.square().sum() for part in parts]).sum()

    return formula


def absolute(*names: str) -> Formula:
    """MaskSparsity: absolute scales, and biases if named, of the norms "1" of group "0" and "4" of group "3"."""

    def formula(net: nn.Module, removal: dict[str, tuple[int, ...]], strength: float) -> Tensor:
        norms = {"0": net.get_submodule("1"), "3": net.get_submodule("4")}
        parts = [getattr(norms[group], name)[list(gone)] for group, gone in removal.items() for name in names]
        return strength * torch.stack([part.abs().sum() for part in parts]).sum()

    return formula


def with_kept(kept: float) -> Formula:
    """GReg-2: as :func:`everything`, and the kept rows of the convolutions with a strength of their own."""

    def formula(net: nn.Module, removal: dict[str, tuple[int, ...]], strength: float) -> Tensor:
        value = everything(net, removal, strength)
        for group, gone in removal.items():
            weight = net.get_submodule(group).weight
            stay = [channel for channel in range(len(weight)) if channel not in gone]
            read = [column for column in range(weight.shape[1]) if group != "3" or column not in removal["0"]]
            value = value + kept / 2 * weight[stay][:, read].square().sum()
        return value

    return formula


def decorrelated(gram: float, rest: Formula) -> Formula:
    """TPP: the Gram matrix's entries in pruned rows or columns, and the rest."""

    def formula(net: nn.Module, removal: dict[str, tuple[int, ...]], strength: float) -> Tensor:
        value = rest(net, removal, strength)
        for group, gone in removal.items():
            flat = net.get_submodule(group).weight.flatten(1)
            mask = torch.zeros(len(flat), len(flat), dtype=flat.dtype)
            mask[list(gone)] = mask[:, list(gone)] = 1
            value = value + strength * gram * (mask * (flat @ flat.T) ** 2).mean()
        return value

    return formula


def apart(net: nn.Module, removal: dict[str, tuple[int, ...]], strength: float) -> Tensor:
    """ASCP: half the squared distance to the clusters' means; a channel that goes is alike the last that stays."""
    value = torch.zeros((), dtype=next(net.parameters()).dtype)
    for group, gone in removal.items():
        labels = torch.tensor([channel not in gone for channel in range(8)]).cumsum(0) - 1
        for layer in (net.get_submodule(group), net.get_submodule(str(int(group) + 1))):
            for weight in layer.parameters():
                members = [weight[labels == label] for label in range(int(labels.max()) + 1)]
                value = value + strength / 2 * sum((one - one.mean(dim=0)).square().sum() for one in members)
    return value


def uneven() -> nn.Module:
    """As :func:`conv_net`, but of scales that differ, and nearly all MACs are the second convolution's."""
    net: Any = conv_net()
    net[0] = nn.Conv2d(3, 8, 1)
    with torch.no_grad():
        net[1].weight.copy_(torch.linspace(0.5, 1.5, 8))
        net[4].weight.copy_(torch.linspace(1.5, 0.5, 8))
    return net


def unpadded() -> nn.Module:
    """As :func:`conv_net`, but every reading layer takes constants exactly."""
    net: Any = conv_net()
    net[3] = nn.Conv2d(8, 8, 3, bias=False)
    return net


def singly(kept: float = 0.0) -> Formula:
    """Half the squares of the single weights that go, and of the others with a strength of their own."""

    def formula(net: nn.Module, removal: Mapping[str, Sequence[int]], strength: float) -> Tensor:
        value = torch.zeros((), dtype=next(net.parameters()).dtype)
        for layer, gone in removal.items():
            squares = net.get_submodule(layer).weight.flatten() ** 2
            goes = torch.zeros(len(squares), dtype=squares.dtype)
            goes[list(gone)] = 1
            value = value + (strength / 2 * goes * squares + kept / 2 * (1 - goes) * squares).sum()
        return value

    return formula


def with_frozen_head() -> nn.Module:
    """Its single weights can go in the layers "0" and "3" only."""
    net = conv_net()
    net[8].requires_grad_(False)  # type: ignore[index]
    return net


def widths(net: Any) -> list[float]:
    """Share of the channels that is left, in what "0" and "3" produce and in what reads it."""
    return [count / 8 for count in (net[0].out_channels, net[3].out_channels, net[3].in_channels, net[8].in_features)]


def densities(net: Any) -> list[float]:
    """Share of the weights of "0" and "3" that isn't zero."""
    return [float((net[layer].weight != 0).float().mean()) for layer in (0, 3)]


class StillZero(Callback):
    """The finetune stage of single weights, restated: what is zero gets no gradient."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        for layer in (pl_module.net[0], pl_module.net[3]):
            layer.weight.grad[layer.weight == 0] = 0


@dataclass(frozen=True)
class Setting:
    """A method and what it promises.

    Args:
        method: the class.
        arguments: beside ``ratio=0.5`` or instead of it, ``epochs`` among them where the method takes any.
        formula: what it adds to the loss in the middle of the stage; ``None`` for nothing.
        exact: whether surgery changes no output, in eval and train mode, after any stage however short.
        net: builds a network of 8 channels in the layers "0" and "3" that suits it.
        left: what is left of each layer after surgery, as shares.
        finetune: callbacks that make plain training what the finetune stage is.
    """

    method: type[Regulariser]
    arguments: dict[str, Any] = field(default_factory=dict)
    formula: Formula | None = None
    exact: bool = False
    net: Callable[[], nn.Module] = conv_net
    left: Callable[[nn.Module], list[float]] = widths
    finetune: tuple[Callable[[], Callback], ...] = ()

    def build(self, **changes: Any) -> Any:
        """A new callback."""
        return self.method(**{"ratio": 0.5, **self.arguments, **changes})


def by(**budget: Any) -> dict[str, Any]:
    """A budget instead of a ratio; half of :func:`uneven` has 0.275 of its MACs and 0.29 of its parameters."""
    return {"ratio": None, "budget": Budget(**budget)}


GROWTH1 = GReg1Schedule(0.1, 0.8, 2, 5, stop_ratio=None)
GROWTH2 = GReg2Schedule(0.02, 0.06, 0.1, 0.56, 2, 4, kept=-0.01, stop_ratio=None)
GROWTH_TPP = TPPSchedule(0.1, 0.8, 2, 3, gram=2.0, zero_every=1)
FILTERS = rows({"0": ("0.weight",), "3": ("3.weight",)})
PUBLISHED = rows({"0": ("0.weight", "0.bias", "1.weight", "1.bias"), "3": ("3.weight", "4.weight", "4.bias")})

LATE = ASCPSchedule(EPOCHS, "linear", interval=EPOCHS)
ALL_AT_ONCE = ASCPSchedule(EPOCHS, "const", freeze_after=0.3)

SINGLE: dict[str, Any] = {"net": with_frozen_head, "left": densities, "finetune": (StillZero,)}

SETTINGS = {
    "ascp": Setting(
        ASCP, {"schedule": ALL_AT_ONCE, "cluster": "even", "pull": 0.5, "finish": "plain"}, apart, exact=True
    ),
    "ascp, centripetal": Setting(ASCP, {"schedule": ALL_AT_ONCE, "cluster": "even", "pull": 0.5}, apart, exact=True),
    "ascp without a pull": Setting(ASCP, {"schedule": LATE, "cluster": "ward"}, exact=True),
    "ascp, by a budget": Setting(
        ASCP,
        {**by(macs="6.5k"), "schedule": ALL_AT_ONCE, "cluster": "even", "pull": 0.5},
        apart,
        exact=True,
        net=uneven,
    ),
    "greg1": Setting(GReg1, {"schedule": GROWTH1}, everything),
    "greg1, by a budget": Setting(GReg1, {**by(macs=0.3), "schedule": GROWTH1}, everything, net=uneven),
    "greg1 as published": Setting(GReg1, {"schedule": GROWTH1, "coupled": False}, FILTERS),
    "greg1 on weights": Setting(GReg1, {"schedule": GROWTH1, "granularity": "weight"}, singly(), **SINGLE),
    "greg2": Setting(GReg2, {"schedule": GROWTH2}, with_kept(-0.01)),
    "greg2, by a budget": Setting(GReg2, {**by(params=200), "schedule": GROWTH2}, with_kept(-0.01), net=uneven),
    "greg2 on weights": Setting(GReg2, {"schedule": GROWTH2, "granularity": "weight"}, singly(-0.01), **SINGLE),
    "magnitude": Setting(Magnitude, {"epochs": EPOCHS}),
    "magnitude in steps": Setting(Magnitude, {"epochs": EPOCHS, "steps": 3, "score": "l2"}),
    "magnitude in steps, by a budget": Setting(Magnitude, {**by(params=0.3), "epochs": EPOCHS, "steps": 3}, net=uneven),
    "magnitude on weights": Setting(Magnitude, {"epochs": EPOCHS, "steps": 3, "granularity": "weight"}, **SINGLE),
    "mask_sparsity": Setting(MaskSparsity, {"epochs": EPOCHS}, absolute("weight", "bias"), exact=True),
    "mask_sparsity, in passes": Setting(
        MaskSparsity, {"epochs": EPOCHS, "passes": 2}, absolute("weight", "bias"), exact=True
    ),
    "mask_sparsity, scales alone": Setting(
        MaskSparsity, {"epochs": EPOCHS, "penalize_bias": False}, absolute("weight")
    ),
    "mask_sparsity, by a budget": Setting(
        MaskSparsity, {**by(macs=0.3), "epochs": EPOCHS}, absolute("weight", "bias"), exact=True, net=uneven
    ),
    "mask_sparsity, from the baseline": Setting(
        MaskSparsity,
        {"epochs": EPOCHS, "global_epochs": 1, "restart_from": "baseline"},
        absolute("weight", "bias"),
        exact=True,
    ),
    "mask_sparsity, folded": Setting(
        MaskSparsity,
        {"epochs": EPOCHS, "penalize_bias": False, "fold_constant": True},
        absolute("weight"),
        exact=True,
        net=unpadded,
    ),
    "tpp": Setting(TPP, {"schedule": GROWTH_TPP}, decorrelated(2.0, everything), exact=True),
    "tpp, by a budget": Setting(
        TPP, {**by(params="0.2k"), "schedule": GROWTH_TPP}, decorrelated(2.0, everything), exact=True, net=uneven
    ),
    "tpp as published": Setting(
        TPP, {"schedule": GROWTH_TPP, "coupled": False}, decorrelated(2.0, PUBLISHED), exact=True
    ),
}
