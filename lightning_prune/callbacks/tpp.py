"""Trainability preserving pruning: what stays is made independent of what goes, before that goes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, final

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune import structure
from lightning_prune.callbacks.budgeting import refuse_all_but_one
from lightning_prune.callbacks.growing import Growing, constants
from lightning_prune.callbacks.inject import Penalty, uses_loss
from lightning_prune.callbacks.neighbours import average_models
from lightning_prune.callbacks.targets import Target, aim, parameters_of, zero_out_
from lightning_prune.door import check, number, switch, whole
from lightning_prune.errors import ConfigurationError
from lightning_prune.penalties import gram_decorrelation, spectral_norm, weighted_l2
from lightning_prune.schedules import TPP_CIFAR, TPP_IMAGENET, Dynamics, TPPSchedule
from lightning_prune.structure import Budget
from lightning_prune.structure.batches import sample_count
from lightning_prune.structure.counting import count_macs
from lightning_prune.structure.plan import submodule

SHARE = 0.01
"""Of training's multiply-adds, what the products of a lazy decorrelation come to."""

LAZIEST = 16
"""Steps between two decorrelations: no more has been measured."""

FEWEST = 32
"""Decorrelations in a stage, at least."""

NOTHING = 10**8
"""Multiply-adds of one decorrelation that nobody notices: some milliseconds of one core."""


@final
class TPP(Growing):
    r"""TPP: filters that will go are decorrelated from those that stay and shrunk with all that belongs to them.

    With a strength :math:`\lambda` that grows from zero, and :math:`P` the filters that will go,

    .. math::

        \lambda \left( g \, R(W) + \tfrac12 \sum_{c \in P} \lVert W_c \rVert^2 + b_c^2 + \gamma_c^2 + \beta_c^2 \right)

    where :math:`R` is the :func:`~lightning_prune.penalties.gram_decorrelation`, :math:`b` biases and
    :math:`\gamma, \beta` scales and shifts of norms. While the strength holds, layers are set to zero one after the
    other where channels will go, so that surgery changes no output. See
    :class:`~lightning_prune.schedules.TPPSchedule` for growth and hold.

    Args:
        ratio: fraction of channels to remove, in (0, 1).
        budget: instead of ``ratio`` what may be left of the network, such as ``{"macs": 0.5}``; see
            :class:`~lightning_prune.Budget`.
        epochs: length of the sparse stage; growth and hold are derived for this trainer's optimiser and steps.
        schedule: instead of ``epochs`` the constants in optimiser steps, or the published ones: ``"cifar"``,
            ``"imagenet"`` (made for a learning rate of 1e-3).
        reduction: of the decorrelation: ``"mean"`` over the Gram matrix, which produced the published numbers, or
            ``"sum"``.
        gram: :math:`g`, what the decorrelation's strength is multiplied with; ``None`` leaves it to the schedule, and
            with ``epochs`` lowers it until it is as steep as the other penalty; 0 is no decorrelation.
        gram_every: optimiser steps from one decorrelation to the next, which counts as many times as much (lazy
            regularisation). Its products take time proportional to N^2 D for N filters of D weights, whatever the
            batch: a sixth of a step for VGG-19 at 32 x 32. ``None`` leaves it to the schedule: 1 as published; with
            ``epochs`` as many (at most 16) as keep what they add at a hundredth of training's multiply-adds, unless
            ``gram`` is given or gradients are clipped.
        coupled: penalise also what the next layers read from the channels that will go; ``False`` is the published
            form, in which networks without normalisation make up for what shrinks.
        ratios: name patterns to ratios in [0, 1); 0 leaves a layer alone.
        ignore: name patterns of layers to leave alone.
        scope: ``"inner"`` for groups with one producer, ``"all"`` for residual streams too.
        round_to: kept widths are multiples of this; ``"auto"`` measures in the first batch what is fast on the device.
        start: epoch at which the sparse stage begins and the channels are picked.
        module: name of the pruned module inside the LightningModule; ``None`` finds it in the first training batch.
        name: tells instances of one class apart in checkpoints and logs.

    Raises:
        ConfigurationError: an argument is out of its range, or not exactly one of ``epochs`` and ``schedule`` is given.

    Source: Wang and Fu, Trainability Preserving Neural Pruning, ICLR 2023, arXiv 2207.12534; lazily: Karras et al.,
    Analyzing and Improving the Image Quality of StyleGAN, CVPR 2020, arXiv 1912.04958.

    >>> TPP(0.5, epochs=10, ignore=["stem*"]).phase
    'wait'
    """

    schedule_type = TPPSchedule
    needs = "weights that produce channels"

    _aimed: list[Target] | None
    _trained: list[bool]  # of these, which are not frozen
    _shrinking: list[nn.Parameter]
    _masks: list[Tensor]
    _filters: list[tuple[nn.Parameter, int, Tensor]]
    _zeros: list[Target]
    _zeroed: int
    _factor: float

    def __init__(
        self,
        ratio: float | None = None,
        *,
        budget: Budget | Mapping[str, Any] | None = None,
        epochs: int | None = None,
        schedule: TPPSchedule | Literal["cifar", "imagenet"] | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        gram: float | None = None,
        gram_every: int | None = None,
        coupled: bool = True,
        ratios: Mapping[str, float] | None = None,
        ignore: Sequence[str] = (),
        scope: Literal["inner", "all"] = "inner",
        round_to: int | Literal["auto"] = 1,
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
            start=start,
            epochs=epochs,
            module=module,
            name=name,
        )
        check(reduction in ("mean", "sum"), f"reduction={reduction!r} must be 'mean' or 'sum'.")
        switch("coupled", coupled)
        if gram is not None:
            number("gram", gram)
        check(gram is None or 0 <= gram < float("inf"), f"gram={gram} must be a finite number of at least 0, or None.")
        if gram_every is not None:
            whole("gram_every", gram_every, least=1)
        self.schedule = schedule
        self.reduction = reduction
        self.gram = gram
        self.gram_every = gram_every
        self.coupled = coupled
        self._constants = constants(epochs, schedule, {"cifar": TPP_CIFAR, "imagenet": TPP_IMAGENET})

    def derive(self, steps: int, dynamics: Dynamics) -> TPPSchedule:
        """See :meth:`~lightning_prune.schedules.TPPSchedule.derive`."""
        layers, every = max(1, len(self._groups)), self.gram_every or self._interval(steps)
        return TPPSchedule.derive(steps, dynamics, layers, self._steepness(), every)

    def entered(self, trainer: Trainer, dynamics: Dynamics) -> None:
        """Say also where the decorrelation is lazy without having been told to."""
        super().entered(trainer, dynamics)
        every = self._every
        if every > 1 and self._schedule.length < 2 * every:
            rank_zero_warn(
                f"{self._label}: gram_every={every} lets the decorrelation act in fewer than 2 of the "
                f"{self._schedule.length} optimiser steps; choose a smaller one, or gram=0."
            )
        if self._constants is None and self.gram_every is None and every > 1:
            rank_zero_info(
                f"{self._label}: the decorrelation would add more than {SHARE:.0%} to the multiply-adds of a step; it "
                f"acts in one step of {every}, {every} times as strong. gram_every=1 is the published form."
            )

    def suits(self, group: structure.ChannelGroup) -> bool:
        """There must be filters to decorrelate."""
        return bool(group.outputs)

    def reach(self, group: structure.ChannelGroup) -> Sequence[tuple[str, int]]:
        """What produces a channel and scales it; coupled: what reads it, too."""
        read = set() if self.coupled else {*group.inputs} - {*group.outputs}
        return [member for member in group.members if member not in read]

    def update(self, step: int) -> None:
        """Set the strength, and see what there is to penalise where that has changed."""
        self._strength = self._schedule.strength(step) / self.learning_rate_share()
        trained = [target.parameter.requires_grad for target in self._targets]
        if self._aimed is not self._targets or trained != self._trained:
            self._aimed, self._trained = self._targets, trained
            aimed = [target for target in self._targets if target.parameter.requires_grad]
            self._shrinking = [target.parameter for target in aimed]
            self._masks = [target.union() for target in aimed]
            self._filters = self._find_filters()
        lazily = 0 if step % self._every else self._every
        self._factor = lazily * self._strength * (self._schedule.gram if self.gram is None else self.gram)

    def penalty(self) -> Penalty | None:
        """Half the squared weights of what goes, and the decorrelation of its filters."""
        if not self._shrinking:
            return None
        strengths = torch._foreach_mul(self._masks, self._strength)
        value, gradients = weighted_l2(self._shrinking, strengths)
        pulls = {id(p): (p, g) for p, g in zip(self._shrinking, gradients, strict=True)}
        if self._factor and self._filters:
            weights = [parameter.movedim(dim, 0) for parameter, dim, _ in self._filters]
            rows = [numbers for _, _, numbers in self._filters]
            other, others = gram_decorrelation(weights, rows, reduction=self.reduction, strength=self._factor)
            value = value + other
            for (parameter, dim, _), gradient in zip(self._filters, others, strict=True):
                pulls[id(parameter)][1].add_(gradient.movedim(0, dim))
        return Penalty(value, [p for p, _ in pulls.values()], [g for _, g in pulls.values()], fresh=True)

    def after_step(self, optimizer: Optimizer) -> None:
        """Set the layers to zero whose time has come; what another optimiser holds waits for that one's step."""
        if self._picked and self._step is not None:
            others = [other for other in self._run()[0].optimizers if other is not optimizer]
            waits = {id(p) for other in others for group in other.param_groups for p in group["params"]}
            self._zero(self._schedule.zeroed(self._step, layers=len(self._picked)), waits)

    def conclude(self) -> None:
        """Set all layers to zero, whatever has been stepped or skipped, and those of weight averages."""
        self._zero(len(self._picked))
        for average in average_models(self._run()[0]):
            twin = submodule(average, self.capture.name or "")
            zero_out_(aim(self._picked, self._groups, lambda group: group.members, parameters_of(twin)))

    def _zero(self, layers: int, waits: Collection[int] = ()) -> None:
        if layers != self._zeroed:
            first = dict(list(self._picked.items())[:layers])
            self._zeros = aim(first, self._groups, lambda group: group.members, self._parameters)
            self._zeroed = layers
        zero_out_([target for target in self._zeros if id(target.parameter) not in waits])

    def _steepness(self) -> float | None:
        r"""Of the steepest layer as it is now: :math:`4 \lVert W \rVert_2^2 / N^2`, without the divisor for a sum."""
        found = []
        for parameter, dim, _ in self._producers():
            weight = parameter.detach().movedim(dim, 0).flatten(1).float()
            count = weight.shape[0] ** 2 if self.reduction == "mean" else 1
            found.append(4 * spectral_norm(weight).square() / count)
        return self.agreed(lambda: float(torch.stack(found).max())) if found else None

    @property
    def _every(self) -> int:
        """Optimiser steps from one decorrelation to the next: the given ones, or the schedule's."""
        return int(self.gram_every or self._schedule.gram_every)

    def _interval(self, steps: int) -> int:
        """Optimiser steps from one decorrelation to the next."""
        return self.agreed(lambda: self._affordable(steps)) if self._producers() else 1

    def _affordable(self, steps: int) -> int:
        r"""As many as keep the products at their share of multiply-adds, and some decorrelations in short stages.

        The products of n of N filters with D weights take :math:`n D (3N - n)` of them, training three times as many as
        the forward pass. A given g may be as steep as it likes, and a clipped step doesn't make up for those before it:
        there the decorrelation acts in every step.
        """
        graph, batch, (trainer, pl_module) = self.capture.graph, sample_count(self.capture.inputs), self._run()
        is_clipped = bool(trainer.gradient_clip_val) and not self.decoupled
        if graph is None or not batch or self.gram is not None or is_clipped:
            return 1
        products = sum(gone * (3 - gone / p.shape[dim]) * p.numel() for p, dim, gone in self._producers())
        if products < NOTHING:
            return 1
        try:
            training = 3 * batch * count_macs(graph.model, graph.inputs)
        except ConfigurationError:  # of networks that can't be counted; there it stays as published
            return 1
        if self.decoupled or not uses_loss(trainer, pl_module):  # once per step, not per batch
            training *= trainer.accumulate_grad_batches
        wanted = math.ceil(products / (SHARE * training)) if training else 1
        return max(1, min(wanted, LAZIEST, steps // FEWEST))

    def _producers(self) -> list[tuple[nn.Parameter, int, float]]:
        """Every weight that produces channels, the dim of its filters, and how many go in the end."""
        rows: dict[tuple[str, int], float] = {}
        for name, group in self._groups.items():
            for member in group.outputs:
                gone = self._shares.get(name, 0.0) * group.index[member].numel()
                rows[member] = rows.get(member, 0.0) + gone
        found = ((self._parameters.get(name), dim, gone) for (name, dim), gone in rows.items())
        return [(weight, dim, gone) for weight, dim, gone in found if weight is not None and weight.dim() > 1]

    def _find_filters(self) -> list[tuple[nn.Parameter, int, Tensor]]:
        """Every weight that produces picked channels, the dim of its filters, and which of them go."""
        found: dict[tuple[int, int], tuple[nn.Parameter, list[Tensor]]] = {}
        for name, numbers in self._picked.items():
            group = self._groups[name]
            for member, dim in group.outputs:
                parameter = self._parameters.get(member)
                if parameter is not None and parameter.requires_grad and parameter.dim() > 1:
                    rows = group.index[member, dim][list(numbers)].flatten()
                    found.setdefault((id(parameter), dim), (parameter, []))[1].append(rows)
        return [
            (parameter, dim, torch.cat(rows).unique().to(parameter.device))
            for (_, dim), (parameter, rows) in found.items()
        ]

    def _leave(self) -> None:
        super()._leave()
        self._aimed = None
        self._trained = []
        self._shrinking = []
        self._masks = []
        self._filters = []
        self._zeros = []
        self._zeroed = 0
        self._factor = 0.0
