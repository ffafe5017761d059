"""The one place where a penalty enters the training: into the loss, into ``.grad``, or into the weights themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.optim import Optimizer


class Penalty(NamedTuple):
    """A penalty's scalar value, the parameters (or what was computed of them) it pulls at, and its gradients there.

    Args:
        value: of the penalty.
        parameters: that it pulls at.
        gradients: one per parameter.
        fresh: whether the gradients were made for this penalty and nobody else holds their memory; they are changed in
            place then, instead of copied.
    """

    value: Tensor
    parameters: Sequence[Tensor]
    gradients: Sequence[Tensor]
    fresh: bool = False


def uses_loss(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Whether the penalty goes into the loss; otherwise it goes into ``.grad`` before the optimiser's step.

    Under manual optimisation the loss is the user's own tensor, and two backward passes would count the penalty twice.
    DDP that looks for unused parameters would see those ready twice that only the penalty uses.
    """
    strategy = trainer.strategy
    unused = isinstance(strategy, DDPStrategy) and strategy._ddp_kwargs.get("find_unused_parameters", False)
    return pl_module.automatic_optimization and not unused


def add_to_loss_(loss: Tensor, penalty: Callable[[], Penalty | None], trainer: Trainer, instead: float = 0.0) -> None:
    """Add a penalty to the loss in ``on_before_backward``: as if ``training_step`` had returned it in the sum.

    There the loss is already divided by the accumulation factor and, in 16-bit mixed precision, multiplied by the
    gradient scale; the penalty gets both. Second derivatives (``create_graph=True``) don't see it.

    Args:
        loss: is changed in place.
        penalty: gives it, or nothing.
        trainer: of this step.
        instead: of which share of the loss the penalty takes the place.
    """
    with quietly(loss.device.type):
        found = penalty()
    if found is None:
        return
    with torch.enable_grad():
        value = _WithGradients.apply(found.value, tuple(found.gradients), found.fresh, *found.parameters)
        share = value / trainer.accumulate_grad_batches
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if instead:
            loss.mul_(1 - instead)
        loss.add_((share if scaler is None else scaler.scale(share)).to(loss.dtype))


@torch.no_grad()
def add_to_gradients_(penalty: Callable[[], Penalty | None], optimizer: Optimizer, trainer: Trainer) -> None:
    """Add a penalty to the gradients of one optimiser's parameters, in ``on_before_optimizer_step``.

    The gradients are unscaled there, except for optimisers that unscale in their own step (the fused ones).
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    held = {id(parameter) for parameter in parameters}
    with quietly(parameters[0].device.type):
        found = penalty()
    if found is None:
        return
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scaled = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
    for parameter, gradient in zip(found.parameters, found.gradients, strict=True):
        if id(parameter) not in held:
            continue
        share = scaler.scale(gradient) if scaled and scaler is not None else gradient
        if parameter.grad is None:
            parameter.grad = share.to(parameter.dtype, copy=True)
        else:
            parameter.grad.add_(share)


@torch.no_grad()
def shrink_(penalty: Callable[[], Penalty | None], optimizer: Optimizer, device: str) -> None:
    """Take learning rate times penalty gradient off one optimiser's parameters, after its step."""
    with quietly(device):
        found = penalty()
    if found is None:
        return
    pulls = {id(p): (p, g) for p, g in zip(found.parameters, found.gradients, strict=True)}
    for group in optimizer.param_groups:
        pairs = [pulls[id(parameter)] for parameter in group["params"] if id(parameter) in pulls]
        if pairs:
            torch._foreach_sub_([p for p, _ in pairs], torch._foreach_mul([g for _, g in pairs], group["lr"]))


@contextmanager
def quietly(device: str) -> Iterator[None]:
    """Without autograd, and in full precision."""
    with torch.no_grad(), torch.autocast(device, enabled=False):
        yield


class _WithGradients(torch.autograd.Function):
    """A value whose gradients are known beforehand."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: tuple[Tensor, ...], fresh: bool, *parameters: Tensor) -> Tensor:
        ctx.gradients, ctx.fresh = gradients, fresh
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("The penalty's gradients were handed over in the first backward pass; retain its graph.")
        if not ctx.fresh or torch._C._autograd._get_current_graph_task_keep_graph():  # there may be another pass
            return None, None, None, *torch._foreach_mul(ctx.gradients, upstream)
        # What nobody else holds is added to in place: as large as the weights, a copy costs as much as the penalty.
        gradients, ctx.gradients = ctx.gradients, None
        if upstream.device.type != "cpu" or upstream != 1:  # elsewhere the question would wait for the device
            torch._foreach_mul_(gradients, upstream)
        return None, None, None, *gradients
