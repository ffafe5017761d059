"""MaskSparsity: who goes is decided first, then the norm scales of those, and only those, are pulled to zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, final

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_prune import structure
from lightning_prune.callbacks.base import Regulariser
from lightning_prune.callbacks.dynamics import dynamics_of
from lightning_prune.callbacks.inject import Penalty
from lightning_prune.callbacks.masks import doomed_channels, scales_of
from lightning_prune.callbacks.targets import zero_out_
from lightning_prune.callbacks.watching import check
from lightning_prune.errors import ConfigurationError, PlanError
from lightning_prune.penalties import masked_l1, soft_threshold_
from lightning_prune.schedules import MASK_SPARSITY, Dynamics, MaskSparsityStrength
from lightning_prune.structure.plan import layer_of

HOLD = 0.2
"""Share of a derived masked stage, at its end, in which the scales that will go are exactly zero."""

GLOBAL_TRAVEL = 0.5
"""How far a derived global strength can move a scale of 1: enough to tell the scales apart, not to collapse them."""


@dataclass(frozen=True)
class MaskStage:
    """When a sparse stage does what, in optimiser steps from its beginning.

    Args:
        length: of the whole stage.
        picks: steps before which the mask is made, ascending; the global stage lies before the first.
        hold: steps at the end in which the scales that will go are kept at zero.

    >>> stage = MaskStage(length=100, picks=(20, 60), hold=8)
    >>> stage.pick_step, stage.last_event
    (20, 92)
    """

    length: int
    picks: tuple[int, ...]
    hold: int

    @property
    def pick_step(self) -> int:
        """The step before which the mask is made for the first time."""
        return self.picks[0]

    @property
    def last_event(self) -> int:
        """The first step of the hold."""
        return self.length - self.hold


@final
class MaskSparsity(Regulariser):
    r"""MaskSparsity: an L1 penalty on the norm scales of the channels that will go, and on no others.

    See :func:`~lightning_prune.penalties.masked_l1` for the penalty. The mask is made from the absolute scales and then
    frozen; with ``global_epochs`` a weak L1 penalty on all scales comes first, so that they tell what the loss can
    spare. Where several norms share channels, as in a residual stream, they share one mask.

    A channel of scale 0 still emits its norm's bias. The masked stage therefore pulls at the biases too and ends in a
    hold in which both are exactly zero, so that surgery changes nothing.

    Adaptive optimisers divide a penalty's gradient by its own size; there the scales are soft-thresholded by learning
    rate times strength after each step instead (the log says so).

    Args:
        ratio: fraction of channels to remove, in (0, 1); or
        threshold: absolute scale up to which a channel goes; at least one channel stays in every layer.
        epochs: length of the sparse stage, global stage and hold included.
        global_epochs: epochs at the beginning of the sparse stage in which all scales are penalised.
        mask_at: epochs of the trainer at whose beginning the mask is made again, inside the masked stage.
        penalize_bias: pull at the norms' biases too. ``False`` is the published form, where surgery takes a constant
            away from the next layer.
        group_rule: how norms that share channels agree: by their mean absolute scale, or by vote.
        constants: ``"imagenet"`` or a record of your own instead of a strength derived for this stage; then there is no
            correction and no hold, as published.
        ratios: name patterns to ratios in [0, 1); 0 leaves a layer alone.
        ignore: name patterns of layers to leave alone.
        scope: ``"inner"`` for groups with one producer, ``"all"`` for residual streams too.
        round_to: kept widths are multiples of this.
        start: epoch at which the sparse stage begins.
        module: name of the pruned module inside the LightningModule; ``None`` finds it in the first training batch.
        name: tells instances of one class apart in checkpoints and logs.

    Raises:
        ConfigurationError: an argument is out of its range, or not exactly one of ``ratio`` and ``threshold`` is given.

    Source: Jiang et al., Pruning-aware Sparse Regularization for Network Pruning, Machine Intelligence Research 2023,
    arXiv 2201.06776, and its published code.

    >>> MaskSparsity(0.5, start=3, epochs=5).phase
    'wait'
    """

    schedule_type = MaskStage
    needs = "a norm with scales"

    _record: MaskSparsityStrength
    _masked_at: int | None
    _checked_at: int
    _weighed: tuple[float, list[Tensor]] | None

    def __init__(
        self,
        ratio: float | None = None,
        *,
        epochs: int,
        threshold: float | None = None,
        global_epochs: int = 0,
        mask_at: Sequence[int] = (),
        penalize_bias: bool = True,
        group_rule: Literal["mean", "vote"] = "mean",
        constants: MaskSparsityStrength | Literal["imagenet"] | None = None,
        ratios: Mapping[str, float] | None = None,
        ignore: Sequence[str] = (),
        scope: Literal["inner", "all"] = "inner",
        round_to: int = 1,
        start: int = 0,
        module: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            ratio,
            ratios=ratios,
            ignore=ignore,
            scope=scope,
            round_to=round_to,
            start=start,
            epochs=epochs,
            module=module,
            name=name,
        )
        check((ratio is None) != (threshold is None), "Give exactly one of ratio=... and threshold=....")
        check(threshold is None or 0 < threshold < float("inf"), f"threshold={threshold} must be a positive scale.")
        check(threshold is None or not any((ratios or {}).values()), "With threshold=... ratios can only be 0.")
        check(0 <= global_epochs < epochs, f"global_epochs={global_epochs} must lie in [0, {epochs}), below epochs.")
        first, last = start + global_epochs + 1, start + epochs - 1
        check(
            list(mask_at) == sorted(set(mask_at)) and all(first <= epoch <= last for epoch in mask_at),
            f"mask_at={list(mask_at)} must be ascending epochs from {first} to {last}, inside the masked stage.",
        )
        check(group_rule in ("mean", "vote"), f"group_rule={group_rule!r} must be 'mean' or 'vote'.")
        check(
            constants is None or constants == "imagenet" or isinstance(constants, MaskSparsityStrength),
            f"constants={constants!r} must be 'imagenet' or a MaskSparsityStrength.",
        )
        self.threshold = threshold
        self.global_epochs = global_epochs
        self.mask_at = tuple(mask_at)
        self.penalize_bias = penalize_bias
        self.group_rule = group_rule
        self.constants = constants

    # What the base asks.

    def begin(self, steps: int | None, dynamics: Dynamics) -> MaskStage:
        """The epochs of global stage, masks and hold in optimiser steps."""
        length, epochs = steps or 1, self.epochs or 1
        moments = [self.global_epochs, *(epoch - self.start for epoch in self.mask_at)]
        picks = tuple(length * moment // epochs for moment in moments)
        hold = 0 if self.constants is not None else max(1, round(HOLD * (length - picks[-1])))
        return MaskStage(length, picks, hold)

    def entered(self, trainer: Trainer, dynamics: Dynamics) -> None:
        """Say how the penalty acts, where it can't act through gradients."""
        if dynamics.decoupled:
            name = type(self._keeper).__name__
            rank_zero_info(
                f"{self._label}: {name} rescales gradients, so scales are soft-thresholded after each step instead."
            )

    def reach(self, group: structure.ChannelGroup) -> Sequence[tuple[str, int]]:
        """The norms' scales, and in the masked stage their biases."""
        if not (self._picked and self.penalize_bias):
            return group.scales
        norms = {layer_of(name) for name, _ in group.scales}
        return [*group.scales, *(member for member in group.shifts if layer_of(member[0]) in norms)]

    def suits(self, group: structure.ChannelGroup) -> bool:
        """Without a scale there is nothing to pull at."""
        return bool(group.scales)

    def picks(self, step: int) -> bool:
        """At the end of the global stage, and where ``mask_at`` says so."""
        made = -1 if self._masked_at is None else self._masked_at
        return any(made < pick <= step for pick in self._schedule.picks)

    def known_after(self, schedule: Any, steps: int | None) -> int:
        """After the first step with a mask."""
        return int(schedule.pick_step) + 1

    def choose(self, graph: structure.ChannelGraph) -> dict[str, list[int]]:
        """The channels of smallest scale: as many as the ratios say, or all up to the threshold."""
        shares = structure.select(graph, self.ratio or 0.5, ratios=self.ratios, ignore=self.ignore, scope=self.scope)
        small, chosen = 0, {}
        for name, group in self._groups.items():
            doomed = doomed_channels(
                scales_of(group, self._parameters),
                count=group.size - structure.kept_channels(group.size, shares[name]),
                threshold=self.threshold,
                rule=self.group_rule,
            )
            small += len(doomed)
            share = len(doomed) / group.size
            kept = structure.kept_channels(group.size, share, unit=group.unit, round_to=self.round_to)
            chosen[name] = sorted(doomed[: group.size - kept])
        total = sum(group.size for group in self._groups.values())
        if self.threshold is not None and small in (0, total):
            raise ConfigurationError(
                f"{self._label}: {small} of {total} norm scales are at most threshold={self.threshold:g}; choose "
                f"{'a larger' if small == 0 else 'a smaller'} one, or a ratio."
            )
        return chosen

    def growing(self, step: int) -> bool:
        """Until the hold begins."""
        return step < int(self._schedule.last_event)

    def update(self, step: int) -> None:
        """Derive the strength where a mask is new, and correct it where scales don't move."""
        if not self._picked:
            self._strength = self._global_strength()
            return
        if self.picks(step):
            self._masked_at = self._checked_at = step
            self._weighed = None
            self._record = self._derive(self._schedule.last_event - step)
        elif self._is_check(step):
            self._checked_at = step
            largest = self.agreed(self._largest())
            # a scale that swings around zero has arrived, and momentum carries it three swings beyond; more strength
            # would only widen them
            if largest > 4 * self._record.swing(self._dynamics()):
                self._record = self._record.corrected(largest)
        self._strength = self._record.strength

    def penalty(self) -> Penalty | None:
        """Absolute scales of the channels that will go; of all in the global stage. After the step under Adam."""
        if self.decoupled:
            return None
        pairs = [pair for pair in zip(self._targets, self._weights(), strict=True) if pair[0].parameter.requires_grad]
        if not pairs:
            return None
        parameters = [target.parameter for target, _ in pairs]
        value, gradients = masked_l1(parameters, [weight for _, weight in pairs])
        return Penalty(value, parameters, gradients)

    def after_step(self, optimizer: Optimizer) -> None:
        """Soft-threshold under adaptive optimisers; in the hold keep at zero what will go."""
        if self.decoupled:
            weights = {
                id(target.parameter): weight for target, weight in zip(self._targets, self._weights(), strict=True)
            }
            for group in optimizer.param_groups:
                own = [parameter for parameter in group["params"] if id(parameter) in weights]
                soft_threshold_(own, [group["lr"] * weights[id(parameter)] for parameter in own])
        if self._picked and self._step is not None and self._step >= self._schedule.last_event:
            self.conclude()

    def conclude(self) -> None:
        """Set to zero what will go, unless published constants are asked for."""
        if self._schedule.hold:
            zero_out_(self._targets)

    def memory(self) -> dict[str, Any]:
        """The strength in use, and when mask and strength were last looked at."""
        return {"record": asdict(self._record), "masked_at": self._masked_at, "checked_at": self._checked_at}

    def remember(self, memory: dict[str, Any]) -> None:
        """Take over what :meth:`memory` had saved."""
        self._record = MaskSparsityStrength(**memory["record"])
        self._masked_at = memory["masked_at"]
        self._checked_at = memory["checked_at"]

    def _forget(self) -> None:
        super()._forget()
        self._record = MASK_SPARSITY
        self._masked_at = None
        self._checked_at = 0

    def _leave(self) -> None:
        super()._leave()
        self._weighed = None

    # Strength.

    def _global_strength(self) -> float:
        """The given one, or the one that moves a scale of 1 by half of that during the global stage."""
        if self.constants is not None:
            return self._given().global_strength
        return GLOBAL_TRAVEL / MaskSparsityStrength(strength=1.0).travel(self._schedule.pick_step, self._dynamics())

    def _given(self) -> MaskSparsityStrength:
        return self.constants if isinstance(self.constants, MaskSparsityStrength) else MASK_SPARSITY

    def _dynamics(self) -> Dynamics:
        if self._keeper is None:
            raise PlanError(f"{self._label} has met no optimiser yet; it does in the first batch.")
        return dynamics_of(self._keeper, [target.parameter for target in self._targets])

    def _derive(self, steps: int) -> MaskSparsityStrength:
        """The strength of the masked stage, for so many steps before its hold."""
        dynamics, largest = self._dynamics(), self.agreed(self._largest())
        if self.constants is None:
            return MaskSparsityStrength.derive(max(1, steps), dynamics, largest=largest)
        travel = self._given().travel(steps, dynamics)
        if travel < largest:
            rank_zero_warn(
                f"{self._label}: strength {self._given().strength:g} moves a scale by at most {travel:.2g} in {steps} "
                f"optimiser steps, but the largest that will go is {largest:.2g}; raise it, or give no constants."
            )
        return self._given()

    def _is_check(self, step: int) -> bool:
        if self.constants is not None or self._masked_at is None:
            return False
        moments = self._record.checks(self._schedule.length - self._masked_at)
        return any(self._checked_at < self._masked_at + moment <= step for moment in moments)

    @torch.no_grad()
    def _largest(self) -> float:
        """Largest absolute scale or bias of the channels that will go; waits for the device."""
        doomed = torch._foreach_mul([t.parameter.detach() for t in self._targets], [t.union() for t in self._targets])
        return max(float(norm) for norm in torch._foreach_norm(doomed, float("inf")))

    def _weights(self) -> list[Tensor]:
        """Strength times mask, one per target."""
        if self._weighed is None or self._weighed[0] != self._strength:
            self._weighed = (self._strength, [self._strength * target.union() for target in self._targets])
        return self._weighed[1]
