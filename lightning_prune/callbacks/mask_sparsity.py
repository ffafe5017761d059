"""MaskSparsity: who goes is decided first, then the norm scales of those, and only those, are pulled to zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, final

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune import structure
from lightning_prune.callbacks.base import Regulariser
from lightning_prune.callbacks.budgeting import refuse_all_but_one, spend_together
from lightning_prune.callbacks.dynamics import dynamics_of
from lightning_prune.callbacks.folding import Fold, find_fold, fold_, refusal
from lightning_prune.callbacks.inject import Penalty
from lightning_prune.callbacks.masks import doomed_channels, prices_of, rounded, scales_of
from lightning_prune.callbacks.neighbours import average_models
from lightning_prune.callbacks.restart import read_weights, restart_, weights_of
from lightning_prune.callbacks.targets import Target, aim, parameters_of, zero_out_
from lightning_prune.door import check, listed, number, switch, text, whole
from lightning_prune.errors import ConfigurationError, PlanError
from lightning_prune.penalties import masked_l1, soft_threshold_
from lightning_prune.schedules import MASK_SPARSITY, Dynamics, MaskSparsityStrength
from lightning_prune.structure import Budget, Outcome
from lightning_prune.structure.plan import layer_of, submodule

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
    hold in which both are exactly zero, so that surgery changes nothing; or what is emitted is folded into the next
    layers (see :func:`~lightning_prune.callbacks.folding.find_fold`).

    Adaptive optimisers divide a penalty's gradient by its own size; there the scales are soft-thresholded by learning
    rate times strength after each step instead (the log says so).

    Args:
        ratio: fraction of channels to remove, in (0, 1); or
        threshold: absolute scale up to which a channel goes; at least one channel stays in every layer; or
        budget: what may be left of the network, such as ``{"macs": 0.4}``; see :class:`~lightning_prune.Budget`. All
            layers lose the same share, or with ``global_epochs`` what one threshold for the scales of all says.
        epochs: length of the sparse stage, global stage and hold included.
        global_epochs: epochs at the beginning of the sparse stage in which all scales are penalised.
        mask_at: epochs of the trainer at whose beginning the mask is made again, inside the masked stage.
        passes: equal parts of the masked stage; each masks anew, beside what the parts before it have brought to zero,
            and the share that is left falls to its value by equal factors.
        restart_from: weights from which the masked stage sets out after the global stage: ``"baseline"``, those at the
            beginning of the sparse stage, or a path to a checkpoint or a ``state_dict``; ``None`` goes on with those
            that the global stage leaves.
        penalize_bias: pull at the norms' biases too. ``False`` is the published form, where surgery takes a constant
            away from the next layer.
        fold_constant: at the end of the sparse stage, put into the next layers' biases what the channels that go still
            emit, where that is exact; a warning names the layers where it isn't.
        group_rule: how norms that share channels agree: by their mean absolute scale, or by vote.
        constants: ``"imagenet"`` or a record of your own instead of a strength derived for this stage; then there is no
            correction and no hold, as published.
        ratios: name patterns to ratios in [0, 1); 0 leaves a layer alone. Beside a budget they hold as they are.
        ignore: name patterns of layers to leave alone.
        scope: ``"inner"`` for groups with one producer, ``"all"`` for residual streams too.
        round_to: kept widths are multiples of this; ``"auto"`` measures in the first batch what is fast on the device.
        start: epoch at which the sparse stage begins.
        module: name of the pruned module inside the LightningModule; ``None`` finds it in the first training batch.
        name: tells instances of one class apart in checkpoints and logs.

    Raises:
        ConfigurationError: an argument is out of its range, or not exactly one of ``ratio``, ``threshold`` and
            ``budget`` is given.

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
    _chosen: dict[str, list[int]] | None  # made before a restart, for the pick right after it
    _baseline: dict[str, Tensor]  # to go back to, on the CPU
    _folded: tuple[str, ...]  # groups that nobody reads any more
    _emptied: dict[str, Sequence[int]]  # channels that earlier passes have brought to zero
    _zeros: list[Target] | None  # what they have
    _weighed: tuple[float, list[Tensor]] | None

    def __init__(
        self,
        ratio: float | None = None,
        *,
        epochs: int,
        threshold: float | None = None,
        budget: Budget | Mapping[str, Any] | None = None,
        global_epochs: int = 0,
        mask_at: Sequence[int] = (),
        passes: int = 1,
        restart_from: str | None = None,
        penalize_bias: bool = True,
        fold_constant: bool = False,
        group_rule: Literal["mean", "vote"] = "mean",
        constants: MaskSparsityStrength | Literal["imagenet"] | None = None,
        ratios: Mapping[str, float] | None = None,
        ignore: Sequence[str] = (),
        scope: Literal["inner", "all"] = "inner",
        round_to: int | Literal["auto"] = 1,
        start: int = 0,
        module: str | None = None,
        name: str | None = None,
    ) -> None:
        refuse_all_but_one(ratio=ratio, threshold=threshold, budget=budget)
        super().__init__(
            ratio,
            budget=budget,
            ratios=ratios,
            ignore=ignore,
            scope=scope,
            round_to=round_to,
            start=start,
            epochs=epochs,
            module=module,
            name=name,
        )
        text("restart_from", restart_from)
        switch("penalize_bias", penalize_bias)
        switch("fold_constant", fold_constant)
        whole("epochs", epochs)
        whole("global_epochs", global_epochs)
        if threshold is not None:
            number("threshold", threshold)
        check(threshold is None or 0 < threshold < float("inf"), f"threshold={threshold} must be a positive scale.")
        check(threshold is None or not any((ratios or {}).values()), "With threshold=... ratios can only be 0.")
        check(0 <= global_epochs < epochs, f"global_epochs={global_epochs} must lie in [0, {epochs}), below epochs.")
        first, last = start + global_epochs + 1, start + epochs - 1
        masked = listed("mask_at", mask_at, "epochs")
        for epoch in masked:
            whole("mask_at", epoch)
        check(
            masked == sorted(set(masked)) and all(first <= epoch <= last for epoch in masked),
            f"mask_at={masked} must be ascending epochs from {first} to {last}, inside the masked stage.",
        )
        whole("passes", passes, least=1)
        is_plain = constants is None and not masked
        check(is_plain or passes == 1, f"passes={passes} can't go with mask_at=... or constants=....")
        check(
            restart_from is None or global_epochs > 0,
            f"restart_from={restart_from!r} needs a global stage before it: give global_epochs=....",
        )
        check(group_rule in ("mean", "vote"), f"group_rule={group_rule!r} must be 'mean' or 'vote'.")
        check(
            constants is None or constants == "imagenet" or isinstance(constants, MaskSparsityStrength),
            f"constants={constants!r} must be 'imagenet' or a MaskSparsityStrength.",
        )
        self.threshold = threshold
        self.global_epochs = global_epochs
        # scales of different layers compare only after a global stage has pulled at all of them alike
        self.ranks_all = global_epochs > 0
        self.mask_at = tuple(masked)
        self.passes = passes
        self.restart_from = restart_from
        self.penalize_bias = penalize_bias
        self.fold_constant = fold_constant
        self.group_rule = group_rule
        self.constants = constants

    # What the base asks.

    def begin(self, steps: int | None, dynamics: Dynamics) -> MaskStage:
        """The epochs of global stage, masks and hold in optimiser steps."""
        self._given_weights()
        self._refuse_restart()
        length, epochs = steps or 1, self.epochs or 1
        moments = [self.global_epochs, *(epoch - self.start for epoch in self.mask_at)]
        picks = tuple(length * moment // epochs for moment in moments)
        if self.passes > 1:
            masked = length - picks[0]
            fits = masked >= 2 * self.passes or bool(self._run()[0].fast_dev_run)  # type: ignore[attr-defined]
            check(fits, f"passes={self.passes} needs at least two optimiser steps each.")
            picks = tuple(picks[0] + masked * number // self.passes for number in range(self.passes))
        hold = 0 if self.constants is not None else max(1, round(HOLD * (length - picks[-1])))
        return MaskStage(length, picks, hold)

    def entered(self, trainer: Trainer, dynamics: Dynamics) -> None:
        """Keep the weights that will be needed again; say how the penalty acts, where it can't through gradients."""
        if self.restart_from == "baseline":
            self._baseline = weights_of(self._run()[1])
        if dynamics.decoupled:
            name = type(self._keeper).__name__
            rank_zero_info(
                f"{self._label}: {name} rescales gradients, so scales are soft-thresholded after each step instead."
            )

    def reach(self, group: structure.ChannelGroup) -> Sequence[tuple[str, int]]:
        """The norms' scales, and in the masked stage their biases; everything that leaves, once nobody reads it."""
        if group.name in self._folded:
            return group.members
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

    def choose(self, graph: structure.ChannelGraph) -> Mapping[str, Sequence[int]]:
        """The channels of smallest scale: as many as the ratios say, all up to the threshold, or within the budget."""
        chosen, outcome = self._rank(graph)
        if outcome is not None:
            self._note(outcome)
        return chosen

    def foresee(self, graph: structure.ChannelGraph) -> Mapping[str, Sequence[int]]:
        """Nothing where a threshold says it: nobody knows yet how small the scales will be."""
        return {} if self.threshold is not None else self._rank(graph)[0]

    def _pick(self) -> None:
        if self.passes > 1:
            self._emptied, self._zeros = dict(self._picked), None
        super()._pick()

    def _rank(self, graph: structure.ChannelGraph) -> tuple[Mapping[str, Sequence[int]], Outcome | None]:
        """Who goes by the scales as they are, and what that comes to where they are ranked for a budget."""
        if self._chosen is not None:
            return self._chosen, None
        scales = {name: scales_of(group, self._parameters) for name, group in self._groups.items()}
        for name, channels in self._masked_before().items():
            scales[name][:, list(channels)] = 0  # which they are after the next step: nobody comes back
        if self.budget is not None and self.ranks_all:
            return self._within(self.budget, graph, scales)
        doomed = self._doomed(scales)
        small, total = sum(map(len, doomed.values())), sum(group.size for group in self._groups.values())
        if self.threshold is not None and small in (0, total):
            raise ConfigurationError(
                f"{self._label}: {small} of {total} norm scales are at most threshold={self.threshold:g}; choose "
                f"{'a larger' if small == 0 else 'a smaller'} one, or a ratio."
            )
        return {name: rounded(self._groups[name], channels, self.multiple) for name, channels in doomed.items()}, None

    def settled(self) -> bool:
        """As soon as the last mask is made."""
        return bool(self._picked) and self._masked_at is not None and self._masked_at >= self._schedule.picks[-1]

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
            self._chosen = self._weighed = None
            self._warn_of_constants()
            self._record = self._derive(self._end_of_part() - step)
        elif self._is_check(step):
            self._checked_at = step
            largest = self.agreed(self._largest)
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
        return Penalty(value, parameters, gradients, fresh=True)

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
            zero_out_(self._silent())
        elif self._emptied and self._schedule.hold:
            if self._zeros is None:
                self._zeros = aim(self._emptied, self._groups, self.reach, self._parameters)
            zero_out_(self._zeros)

    def end_epoch(self, finished: int) -> None:
        """At the end of the global stage, decide the mask and go back to the weights from which to set out."""
        graph = self.capture.graph
        if self.restart_from is None or finished != self.global_epochs or graph is None:
            return
        if not self._picked:
            self._chosen = self.agreed(lambda: {name: list(numbers) for name, numbers in self.choose(graph).items()})
        weights = self._given_weights() or self._baseline
        restart_(*self._run(), weights)
        self._baseline = {}
        rank_zero_info(f"{self._label}: the mask is made; {len(weights)} tensors go back to {self.restart_from}.")

    def conclude(self) -> None:
        """Set to zero what will go, unless published constants are asked for; fold what it still emits."""
        graph, (trainer, _) = self.capture.graph, self._run()
        if graph is None:
            return
        twins = [submodule(twin, self.capture.name or "") for twin in average_models(trainer)]
        zero_out_(self._silent())
        if self.fold_constant and not self._folded:
            self._fold(graph.model, twins)
        for twin in twins:
            zero_out_(self._silent(twin))

    def memory(self) -> dict[str, Any]:
        """Strength in use, when mask and strength were last looked at, and what a restart or a fold needs."""
        return {
            "record": asdict(self._record),
            "masked_at": self._masked_at,
            "checked_at": self._checked_at,
            "chosen": self._chosen,
            "baseline": self._baseline,
            "folded": list(self._folded),
            "emptied": {name: list(channels) for name, channels in self._emptied.items()},
        }

    def remember(self, memory: dict[str, Any]) -> None:
        """Take over what :meth:`memory` had saved."""
        self._record = MaskSparsityStrength(**memory["record"])
        self._masked_at = memory["masked_at"]
        self._checked_at = memory["checked_at"]
        self._chosen = memory["chosen"]
        self._baseline = memory["baseline"]
        self._folded = tuple(memory["folded"])
        self._emptied = {name: tuple(channels) for name, channels in memory["emptied"].items()}

    def _forget(self) -> None:
        super()._forget()
        self._record = MASK_SPARSITY
        self._masked_at = None
        self._checked_at = 0
        self._chosen = None
        self._baseline = {}
        self._folded = ()
        self._emptied = {}

    def _leave(self) -> None:
        super()._leave()
        self._weighed = None
        self._zeros = None

    # The mask.

    def _doomed(self, scales: Mapping[str, Tensor]) -> dict[str, list[int]]:
        """Who goes by the ratios or the threshold, the smallest first."""
        shares = {name: self._so_far(share) for name, share in self._shares.items()}
        counts = {n: group.size - structure.kept_channels(group.size, shares[n]) for n, group in self._groups.items()}
        rule = self.group_rule
        return {name: doomed_channels(scales[name], counts[name], self.threshold, rule) for name in self._groups}

    def _within(
        self, budget: Budget, graph: structure.ChannelGraph, scales: Mapping[str, Tensor]
    ) -> tuple[dict[str, list[int]], Outcome]:
        """As few channels as the budget allows, beside those that have a ratio of their own."""
        shares = {name: self._so_far(share) for name, share in self._shares.items()}
        prices = {name: prices_of(each, self.group_rule) for name, each in scales.items()}
        options: Any = {"round_to": self.multiple, "progress": self._progress(), "label": self._label}
        found = spend_together(self._run()[0], graph, budget, shares, self.ratios, prices, **options)
        gone = {name: self._groups[name].size - kept for name, kept in found.kept.items()}
        before = self._masked_before()
        counts = {name: max(count, len(before.get(name, ()))) for name, count in gone.items()}
        rule = self.group_rule
        return {name: sorted(doomed_channels(scales[name], counts[name], None, rule)) for name in counts}, found.outcome

    def _masked_before(self) -> Mapping[str, Sequence[int]]:
        """What an earlier pass has brought to zero, as far as this mask is concerned."""
        return self._picked if self.passes > 1 else {}

    def _so_far(self, gone: float) -> float:
        """Share that goes up to the present pass, where so much goes in all: what is left falls by equal factors."""
        progress = self._progress()
        return gone if progress >= 1 else 1 - float((1 - gone) ** progress)

    def _progress(self) -> float:
        """Of the passes, which share has been begun."""
        if self.passes == 1 or self._schedule is None:  # before the stage a preview wants to know the end
            return 1.0
        begun = sum(pick <= (self._step or 0) for pick in self._schedule.picks)
        return float(min(1.0, max(1, begun) / self.passes))

    def _end_of_part(self) -> int:
        """The step before which the scales of the present mask should be gone."""
        later = (pick for pick in self._schedule.picks if self.passes > 1 and pick > (self._masked_at or 0))
        return int(next(later, self._schedule.last_event))

    # What comes before and after.

    def _refuse_restart(self) -> None:
        """Others would lose what they have done to the weights before."""
        if self.restart_from is None:
            return
        begun = self.start + self.global_epochs
        for other in self._run()[0].callbacks:  # type: ignore[attr-defined]  # Lightning sets it from afar
            if not isinstance(other, Regulariser):
                continue
            # another global stage is undone on purpose
            kept_from = other.start + (other.global_epochs if isinstance(other, MaskSparsity) else 0)
            if kept_from < begun:
                raise ConfigurationError(
                    f"{self._label}: restart_from={self.restart_from!r} would undo at epoch {begun} what"
                    f" {type(other).__name__} does from epoch {other.start} on; let that start later."
                )

    def _given_weights(self) -> dict[str, Tensor]:
        """Those of the file to restart from, if any."""
        if self.restart_from in (None, "baseline"):
            return {}
        return read_weights(str(self.restart_from), self._run()[1])

    def _silent(self, network: nn.Module | None = None) -> list[Target]:
        """What stays zero once it is: in the hold everything that is pulled at, else only what nobody reads."""
        if network is None and self._schedule.hold:
            return self._targets
        channels = self._picked if self._schedule.hold else {name: self._picked[name] for name in self._folded}
        return aim(channels, self._groups, self.reach, self._parameters if network is None else parameters_of(network))

    def _constants(self, network: nn.Module) -> Fold:
        """How they can be folded: rank 0 decides for all."""
        inputs, (trainer, _) = self.capture.inputs, self._run()
        if inputs is None:
            return Fold({}, (), dict.fromkeys(self._picked, "no batch has been seen"))
        nothing = Fold({}, (), {})
        return self.agreed(
            lambda: find_fold(network, self._groups, self._picked, inputs) if trainer.is_global_zero else nothing
        )

    def _fold(self, network: nn.Module, twins: Sequence[nn.Module]) -> None:
        """Let the network's layers do without what still is emitted, and likewise its weight averages'."""
        fold = self._constants(network)
        fold_(network, self._groups, self._picked, fold)
        for twin in twins:
            fold_(twin, self._groups, self._picked, self._constants(twin))
        self._folded, self._weighed = fold.groups, None
        self._aim(self._picked)
        if fold.refused:
            rank_zero_warn(f"{self._label}: " + refusal(fold.refused, len(self._picked), "is lost at surgery"))

    def _warn_of_constants(self) -> None:
        """Before a masked stage that leaves the biases alone: which constants could not be folded after it."""
        graph = self.capture.graph
        if self.fold_constant and not self.penalize_bias and graph is not None:
            refused, fate = self._constants(graph.model).refused, "will be lost at surgery, unless penalize_bias=True"
            if refused:
                rank_zero_warn(f"{self._label}: " + refusal(refused, len(self._picked), fate))

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
        dynamics, largest = self._dynamics(), self.agreed(self._largest)
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
        end = self._end_of_part()
        end = end if end < self._schedule.last_event else int(self._schedule.length)
        moments = self._record.checks(end - self._masked_at)
        return any(self._checked_at < self._masked_at + moment <= step for moment in moments)

    @torch.no_grad()
    def _largest(self) -> float:
        """Largest absolute scale or bias of the channels that will go; waits for the device once."""
        doomed = torch._foreach_mul([t.parameter.detach() for t in self._targets], [t.union() for t in self._targets])
        return float(torch.stack([norm.float() for norm in torch._foreach_norm(doomed, float("inf"))]).max())

    def _weights(self) -> list[Tensor]:
        """Strength times mask, one per target."""
        if self._weighed is None or self._weighed[0] != self._strength:
            self._weighed = (self._strength, [self._strength * target.union() for target in self._targets])
        return self._weighed[1]
