"""Weights that are gone stay gone: zero, to the bit, whatever the finetune stage does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_prune.structure import Plan, SparsityPlan


class _Held(NamedTuple):
    """An optimiser's masked parameters, and what stays of each: one or zero, in its dtype and layout."""

    parameters: list[Tensor]
    masks: list[Tensor]


class PermanentMask:
    """Keeps what a :class:`~lightning_prune.structure.SparsityPlan` masks at zero while optimisers step.

    Gradients of masked weights are zero before every step, so that momenta stay zero too and no norm counts them;
    after it the weights are set to zero again, for optimisers that move a weight without a gradient. Plans that remove
    channels leave nothing to keep.
    """

    def __init__(self) -> None:
        self._held: dict[int, _Held] = {}
        self._handles: list[RemovableHandle] = []
        self._seen: list[int] = []

    def knows(self, optimizers: Iterable[Optimizer]) -> bool:
        """Whether these are the optimisers that :meth:`hold_` has been told of."""
        return self._seen == [id(optimizer) for optimizer in optimizers]

    def hold_(self, network: nn.Module, plan: Plan, optimizers: Iterable[Optimizer]) -> None:
        """Begin to keep a plan's mask, or begin anew with other optimisers.

        Args:
            network: that the plan fits, on its final device.
            plan: applied already.
            optimizers: those whose steps count.
        """
        self.let_go()
        optimizers = list(optimizers)
        self._seen = [id(optimizer) for optimizer in optimizers]
        if not isinstance(plan, SparsityPlan):
            return
        masks = {parameter: kept.to(parameter.dtype) for parameter, kept in plan.masks(network).items()}
        for optimizer in optimizers:
            held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
            own = [parameter for parameter in masks if parameter in held]
            if own:
                self._held[id(optimizer)] = _Held([*own], [masks[parameter] for parameter in own])
                self._handles.append(optimizer.register_step_post_hook(_after_step(self._held[id(optimizer)])))

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """Set the gradients of masked weights to zero, once they are complete."""
        held = self._held.get(id(optimizer))
        if held is None:
            return
        pairs = [(p.grad, mask) for p, mask in zip(*held, strict=True) if p.grad is not None]
        if pairs:
            torch._foreach_mul_([gradient for gradient, _ in pairs], [mask for _, mask in pairs])

    def let_go(self) -> None:
        """Leave no hook behind."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._held = {}


def _after_step(held: _Held) -> Callable[..., None]:
    @torch.no_grad()
    def zero(*_: Any) -> None:
        torch._foreach_mul_(held.parameters, held.masks)

    return zero
