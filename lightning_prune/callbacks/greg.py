"""Growing regularisation: a penalty that grows until the channels that will go are gone already."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from lightning_prune import structure
from lightning_prune.callbacks.budgeting import refuse_all_but_one
from lightning_prune.callbacks.grains import refuse_for_weights
from lightning_prune.callbacks.growing import Growing, constants
from lightning_prune.callbacks.inject import Penalty
from lightning_prune.door import switch
from lightning_prune.penalties import slices, weighted_l2
from lightning_prune.schedules import (
    GREG1_CIFAR,
    GREG1_IMAGENET,
    GREG2_CIFAR,
    GREG2_IMAGENET,
    Dynamics,
    GReg1Schedule,
    GReg2Schedule,
)
from lightning_prune.scores import l1
from lightning_prune.structure import Budget


class _Measure(NamedTuple):
    """One weight that a group is ranked by.

    Args:
        parameter: the weight.
        dim: along which its channels run.
        positions: positions of each channel along it, ``(C, k)``.
        goes: which channels go, ``(C,)``.
        stay: one at the slices of the others, in the smallest shape that broadcasts to the weight.
    """

    parameter: nn.Parameter
    dim: int
    positions: Tensor
    goes: Tensor
    stay: Tensor


class _GReg(Growing):
    """What GReg-1 and GReg-2 share: the growing L2 penalty, its coefficients per parameter, the early stop."""

    coupled: bool

    _stopped: dict[str, int]
    _seen: int
    _ratios: Tensor | None
    _measures: dict[str, list[_Measure]] | None
    _setting: tuple[Any, ...] | None
    _coefficients: list[Tensor]

    def reach(self, group: structure.ChannelGroup) -> Sequence[tuple[str, int]]:
        """Coupled: everything that leaves with a channel. Else as published: the producing weights alone."""
        return group.members if self.coupled else _weights(group)

    def picks(self, step: int) -> bool:
        """Once, at the schedule's step."""
        return not self._picked and step >= self._schedule.pick_step

    def known_after(self, schedule: Any, steps: int | None) -> int:
        """After the step of the pick."""
        return int(schedule.pick_step) + 1

    def update(self, step: int) -> None:
        """Set every group's strength, and the coefficients where any has changed."""
        schedule = self._schedule
        event = step // schedule.update_every
        if self._picked and step % schedule.update_every == 0 and event > max(self._seen, schedule.growth_event - 1):
            self._watch_ratios(event)
        self._seen = max(self._seen, event)
        share = self.learning_rate_share()
        # a group that has stopped keeps the strength of its last event
        strengths = {
            name: schedule.strength(min(event, self._stopped.get(name, event)) * schedule.update_every) / share
            for name in self._grain.sizes
        }
        kept = schedule.kept_strength(step) if self._picked else 0.0
        self._strength = max(strengths.values())
        setting = (strengths, kept, bool(self._picked))
        if setting != self._setting:
            self._setting = setting
            self._coefficients = self._weigh(strengths, kept)

    def penalty(self) -> Penalty | None:
        """Half the squared weights, each with its own strength."""
        pairs = [
            (target.parameter, strength)
            for target, strength in zip(self._targets, self._coefficients, strict=True)
            if target.parameter.requires_grad
        ]
        if not pairs:
            return None
        parameters = [parameter for parameter, _ in pairs]
        value, gradients = weighted_l2(parameters, [strength for _, strength in pairs])
        return Penalty(value, parameters, gradients, fresh=True)

    def memory(self) -> dict[str, Any]:
        """Running ratios, and which groups stopped at which event."""
        return {
            "stopped": dict(self._stopped),
            "seen": self._seen,
            "ratios": None if self._ratios is None else self._ratios.cpu(),
        }

    def remember(self, memory: dict[str, Any]) -> None:
        """Take over what :meth:`memory` had saved."""
        self._stopped = dict(memory["stopped"])
        self._seen = memory["seen"]
        self._ratios = memory["ratios"]

    @abstractmethod
    def _stop(self, reached: Mapping[str, bool], event: int) -> None:
        """Decide which groups stop growing at this event, from whose ratio has reached the limit."""

    def _forget(self) -> None:
        super()._forget()
        self._stopped = {}
        self._seen = -1
        self._ratios = None

    def _leave(self) -> None:
        super()._leave()
        self._measures = None
        self._setting = None
        self._coefficients = []

    def _growth_end(self) -> int:
        if self._picked and len(self._stopped) >= len(self._picked):
            return max(self._stopped.values()) * int(self._schedule.update_every)
        return int(self._schedule.last_event)

    def _weigh(self, strengths: Mapping[str, float], kept: float) -> list[Tensor]:
        """One coefficient per parameter, in the smallest shape that broadcasts to it.

        Where slices of two groups cross, the larger strength counts: together they would overshoot.
        """
        flat = [(mask, strengths[name]) for target in self._targets for name, mask in target.masks.items()]
        scaled = iter(torch._foreach_mul([mask for mask, _ in flat], [strength for _, strength in flat]))
        weighed = []
        for target in self._targets:
            own = [next(scaled) for _ in target.masks]
            whole = own[0]
            for other in own[1:]:
                whole = torch.maximum(whole, other)
            weighed.append(whole)
        return self._with_kept(weighed, kept) if kept else weighed

    def _with_kept(self, weighed: list[Tensor], kept: float) -> list[Tensor]:
        """Give the kept rows of the producing weights their own strength, where nothing that goes crosses them."""
        if self.granularity == "weight":
            return [torch.where(strength > 0, strength, kept) for strength in weighed]
        rows = {id(measure.parameter): measure.stay for measures in self._measured().values() for measure in measures}
        return [
            torch.where(strength > 0, strength, kept * rows[id(target.parameter)])
            if id(target.parameter) in rows
            else strength
            for target, strength in zip(self._targets, weighed, strict=True)
        ]

    def _measured(self) -> dict[str, list[_Measure]]:
        """By picked group what it is ranked by; made once per pick, on the parameters' device."""
        if self._measures is None:
            self._measures = {name: self._measures_of(name) for name in self._picked}
        return self._measures

    def _measures_of(self, name: str) -> list[_Measure]:
        group = self._groups[name]
        goes = torch.zeros(group.size, dtype=torch.bool)
        goes[list(self._picked[name])] = True
        found = []
        for member, dim in _weights(group):
            parameter = self._parameters.get(member)
            if parameter is not None:
                index = group.index[member, dim]
                stay = slices(parameter, dim, index[~goes])
                device = parameter.device
                found.append(_Measure(parameter, dim, index.to(device), goes.to(device), stay))
        return found

    @torch.no_grad()
    def _watch_ratios(self, event: int) -> None:
        """Update each group's running ratio of mean absolute weight, kept over pruned; look at it now and then."""
        schedule = self._schedule
        if schedule.stop_ratio is None or self.granularity == "weight" or len(self._stopped) == len(self._picked):
            return
        now = torch.stack([_ratio(measures) for measures in self._measured().values()])
        before = now if self._ratios is None else self._ratios.to(now.device)
        self._ratios = schedule.smoothing * before + (1 - schedule.smoothing) * now
        if event % schedule.check_every == 0:
            self._stop(self.agreed(self._reached), event)
        if event >= schedule.events - 1:
            self._stopped = {name: self._stopped.get(name, event) for name in self._picked}

    def _reached(self) -> dict[str, bool]:
        """Whose ratio is large enough; waits for the device."""
        ratios = [] if self._ratios is None else self._ratios.tolist()
        return {name: ratio >= self._schedule.stop_ratio for name, ratio in zip(self._picked, ratios, strict=True)}


@final
class GReg1(_GReg):
    r"""GReg-1: the channels with the smallest weights are picked first, then penalised ever more, until they are gone.

    See :class:`~lightning_prune.schedules.GReg1Schedule` for the growth, :func:`~lightning_prune.penalties.weighted_l2`
    for the penalty.

    Args:
        ratio: fraction of channels, or of each layer's weights, to remove, in (0, 1).
        budget: instead of ``ratio`` what may be left of the network, such as ``{"macs": 0.5}``; see
            :class:`~lightning_prune.Budget`.
        epochs: length of the sparse stage; growth and hold are derived for this trainer's optimiser and steps.
        schedule: instead of ``epochs`` the constants in optimiser steps, or the published ones: ``"cifar"``,
            ``"imagenet"`` (made for a learning rate of 1e-3).
        coupled: penalise everything that leaves with a channel: its weights, bias, norm scale and shift, and the
            consumers' input columns. ``False`` is the published form, which penalises the producing weights alone;
            there the rest grows to compensate, and removal is not harmless.
        ratios: name patterns to ratios in [0, 1); 0 leaves a layer alone.
        ignore: name patterns of layers to leave alone.
        scope: ``"inner"`` for groups with one producer, ``"all"`` for residual streams too.
        round_to: kept widths are multiples of this; ``"auto"`` measures in the first batch what is fast on the device.
        granularity: ``"channel"``, or ``"weight"``: the fraction of least absolute weight goes in every convolution,
            linear layer and their like, each weight by itself; ``coupled``, ``scope``, ``round_to`` and the
            schedule's early stop say nothing about those.
        start: epoch at which the sparse stage begins and the channels are picked.
        module: name of the pruned module inside the LightningModule; ``None`` finds it in the first training batch.
        name: tells instances of one class apart in checkpoints and logs.

    Raises:
        ConfigurationError: an argument is out of its range, or not exactly one of ``epochs`` and ``schedule`` is given.

    Source: Wang et al., Neural Pruning via Growing Regularization, ICLR 2021, arXiv 2012.09243.

    >>> GReg1(0.5, epochs=10, ignore=["stem*"]).phase
    'wait'
    """

    schedule_type = GReg1Schedule

    def __init__(
        self,
        ratio: float | None = None,
        *,
        budget: Budget | Mapping[str, Any] | None = None,
        epochs: int | None = None,
        schedule: GReg1Schedule | Literal["cifar", "imagenet"] | None = None,
        coupled: bool = True,
        ratios: Mapping[str, float] | None = None,
        ignore: Sequence[str] = (),
        scope: Literal["inner", "all"] = "inner",
        round_to: int | Literal["auto"] = 1,
        granularity: Literal["channel", "weight"] = "channel",
        start: int = 0,
        module: str | None = None,
        name: str | None = None,
    ) -> None:
        refuse_all_but_one(ratio=ratio, budget=budget)
        super().__init__(
            ratio,
            budget=budget,
            ratios=ratios,
            ignore=ignore,
            scope=scope,
            round_to=round_to,
            granularity=granularity,
            start=start,
            epochs=epochs,
            module=module,
            name=name,
        )
        switch("coupled", coupled)
        refuse_for_weights(granularity, "coupled", coupled, True)
        self.coupled = coupled
        self.schedule = schedule
        self._constants = constants(epochs, schedule, {"cifar": GREG1_CIFAR, "imagenet": GREG1_IMAGENET})

    def derive(self, steps: int, dynamics: Dynamics) -> GReg1Schedule:
        """See :meth:`~lightning_prune.schedules.GReg1Schedule.derive`."""
        return GReg1Schedule.derive(steps, dynamics)

    def _stop(self, reached: Mapping[str, bool], event: int) -> None:
        if all(reached.values()):
            self._stopped = dict.fromkeys(reached, event)


@final
class GReg2(_GReg):
    r"""GReg-2: a weak penalty on all channels shows which ones the loss can spare; those then go as in GReg-1.

    Under a rising penalty a weight the loss cares about moves less than one it doesn't, so magnitudes come to reflect
    curvature, and the pick after a while differs from the pick at once.

    See :class:`~lightning_prune.schedules.GReg2Schedule` for the growth, :func:`~lightning_prune.penalties.weighted_l2`
    for the penalty.

    Args:
        ratio: fraction of channels, or of each layer's weights, to remove, in (0, 1).
        budget: instead of ``ratio`` what may be left of the network, such as ``{"macs": 0.5}``; see
            :class:`~lightning_prune.Budget`.
        epochs: length of the sparse stage; pick, growth and hold are derived for this trainer's optimiser and steps.
        schedule: instead of ``epochs`` the constants in optimiser steps, or the published ones: ``"cifar"``,
            ``"imagenet"`` (made for a learning rate of 1e-3).
        coupled: as in :class:`GReg1`.
        ratios: name patterns to ratios in [0, 1); 0 leaves a layer alone.
        ignore: name patterns of layers to leave alone.
        scope: ``"inner"`` for groups with one producer, ``"all"`` for residual streams too.
        round_to: kept widths are multiples of this; ``"auto"`` measures in the first batch what is fast on the device.
        granularity: ``"channel"``, or ``"weight"``: the fraction of least absolute weight goes in every convolution,
            linear layer and their like, each weight by itself; ``coupled``, ``scope``, ``round_to`` and the
            schedule's early stop say nothing about those.
        start: epoch at which the sparse stage, and with it the pick phase, begins.
        module: name of the pruned module inside the LightningModule; ``None`` finds it in the first training batch.
        name: tells instances of one class apart in checkpoints and logs.

    Raises:
        ConfigurationError: an argument is out of its range, or not exactly one of ``epochs`` and ``schedule`` is given.

    Source: Wang et al., Neural Pruning via Growing Regularization, ICLR 2021, arXiv 2012.09243.

    >>> GReg2(0.5, schedule="cifar").removal()
    Traceback (most recent call last):
    lightning_prune.errors.PlanError: greg2 has picked no channels yet; it is in phase 'wait'.
    """

    schedule_type = GReg2Schedule

    def __init__(
        self,
        ratio: float | None = None,
        *,
        budget: Budget | Mapping[str, Any] | None = None,
        epochs: int | None = None,
        schedule: GReg2Schedule | Literal["cifar", "imagenet"] | None = None,
        coupled: bool = True,
        ratios: Mapping[str, float] | None = None,
        ignore: Sequence[str] = (),
        scope: Literal["inner", "all"] = "inner",
        round_to: int | Literal["auto"] = 1,
        granularity: Literal["channel", "weight"] = "channel",
        start: int = 0,
        module: str | None = None,
        name: str | None = None,
    ) -> None:
        refuse_all_but_one(ratio=ratio, budget=budget)
        super().__init__(
            ratio,
            budget=budget,
            ratios=ratios,
            ignore=ignore,
            scope=scope,
            round_to=round_to,
            granularity=granularity,
            start=start,
            epochs=epochs,
            module=module,
            name=name,
        )
        switch("coupled", coupled)
        refuse_for_weights(granularity, "coupled", coupled, True)
        self.coupled = coupled
        self.schedule = schedule
        self._constants = constants(epochs, schedule, {"cifar": GREG2_CIFAR, "imagenet": GREG2_IMAGENET})

    def derive(self, steps: int, dynamics: Dynamics) -> GReg2Schedule:
        """See :meth:`~lightning_prune.schedules.GReg2Schedule.derive`."""
        return GReg2Schedule.derive(steps, dynamics)

    def _stop(self, reached: Mapping[str, bool], event: int) -> None:
        for name, over in reached.items():
            if over:
                self._stopped.setdefault(name, event)


def _weights(group: structure.ChannelGroup) -> Sequence[tuple[str, int]]:
    """The weights that the papers regularise and rank: the producing ones, the consuming ones where none produces."""
    return group.outputs or group.inputs


def _ratio(measures: Sequence[_Measure]) -> Tensor:
    """Mean absolute weight of the channels that stay over that of those that go."""
    rows = [l1(parameter.movedim(dim, 0))[positions].mean(dim=1) for parameter, dim, positions, *_ in measures]
    score, goes = torch.stack(rows).mean(dim=0), measures[0].goes
    return (score * ~goes).sum() / (~goes).sum() / ((score * goes).sum() / goes.sum())
