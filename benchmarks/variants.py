"""What the ablations compare: every variant by the name it has in the tables, and the stand-ins that no method is.

A variant makes the callbacks of one fit, and the arguments of its ``StructuralPruning``. The stand-ins do what papers
compare with and what the library has no argument for: cut the same set at once, forget the smallest softly, pull at
all scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_prune import ASCP, TPP, ASCPSchedule, GReg1, GReg1Schedule, GReg2, Magnitude, MaskSparsity
from lightning_prune.callbacks.base import Regulariser
from lightning_prune.callbacks.targets import zero_out_
from lightning_prune.schedules import Dynamics

ZEROS = 0.9
"""Share of the single weights that goes."""

MOMENTUM = 0.9
"""Of SGD, in all runs."""

PUBLISHED = 5e-4
"""Strength of the papers' L1 penalty on scales."""


@dataclass(frozen=True)
class Stage:
    """The sparse stage in which a variant acts.

    Args:
        start: epoch at which it begins.
        epochs: its length.
        steps: optimiser steps of an epoch.
        ratio: of the channels that goes, in every layer alike.
        rate: learning rate at its beginning, from which a cosine goes to zero.
        weight_decay: of everything, at all times.
    """

    start: int
    epochs: int
    steps: int
    ratio: float
    rate: float
    weight_decay: float


Recipe = tuple[Sequence[Callback], Mapping[str, Any]]
Variant = Callable[[Stage], Recipe]


class SameSet(Regulariser):
    """The channels that GReg-1 picks, at the same moment, without its penalty: cut at once, or when its stage ends.

    Args:
        ratio: of the channels that goes.
        at_once: whether they are zero from the pick on, which is as good as cut; else they are trained until surgery.
        common: arguments of every method.
    """

    collapses = False

    def __init__(self, ratio: float, *, at_once: bool, **common: Any) -> None:
        super().__init__(ratio, **common)
        self.at_once = at_once

    def reach(self, group: Any) -> Sequence[tuple[str, int]]:
        """Everything that leaves with a channel."""
        return group.members  # type: ignore[no-any-return]

    def after_step(self, optimizer: Optimizer) -> None:
        """What is cut stays cut."""
        if self.at_once and self._picked:
            zero_out_(self._targets)


class SoftNorm(Regulariser):
    """Soft filter pruning by norm: at every epoch's end the smallest filters become zero and may come back.

    How many grows along ASCP's schedule, so that only the choice differs: the smallest instead of the most alike.

    Args:
        ratio: of the channels that goes.
        common: arguments of every method.

    Source: He et al., Asymptotic Soft Filter Pruning, arXiv 1808.07471.
    """

    collapses = False

    def reach(self, group: Any) -> Sequence[tuple[str, int]]:
        """Everything that leaves with a channel."""
        return group.members  # type: ignore[no-any-return]

    def picks(self, step: int) -> bool:
        """At the end of the stage."""
        return False

    def known_after(self, schedule: Any, steps: int | None) -> int:
        """At the end of the stage."""
        return steps or 1

    @torch.no_grad()
    def end_epoch(self, finished: int) -> None:
        """Set the filters of least norm to zero."""
        graph, share = self.capture.graph, ASCPSchedule.derive(self.epochs or 1).share(finished)
        if graph is None or not share:
            return
        for name, numbers in self.smallest(graph, score="l2", share=share).items():
            group = self._groups[name]
            for member, dim in group.outputs:
                parameter = self._parameters[member]
                index = group.index[member, dim][list(numbers)].flatten()
                parameter.index_fill_(dim, index.to(parameter.device), 0)

    def choose(self, graph: Any) -> Mapping[str, Sequence[int]]:
        """Those that have just become zero."""
        return self.smallest(graph, score="l2")

    def conclude(self) -> None:
        """For good, with everything that leaves with them."""
        zero_out_(self._targets)


class ScaleL1(Callback):
    """Network slimming: an L1 penalty on the scales of all batch norms during the sparse stage.

    Args:
        strength: of the penalty.
        stage: in which it acts.

    Source: Liu et al., Learning Efficient Convolutional Networks through Network Slimming, arXiv 1708.06519.
    """

    def __init__(self, strength: float, stage: Stage) -> None:
        self.strength, self.stage = strength, stage

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the subgradient."""
        if self.stage.start <= trainer.current_epoch < self.stage.start + self.stage.epochs:
            for module in pl_module.modules():
                if isinstance(module, nn.BatchNorm2d) and module.weight.grad is not None:
                    module.weight.grad.add_(module.weight.sign(), alpha=self.strength)


@dataclass(frozen=True)
class FromZero(GReg1Schedule):
    """GReg-1's growth by TPP's rule: the strength is 0 until the first event, and one increment behind ever after."""

    def strength(self, step: int) -> float:
        """What the channels that will go are penalised with during ``step``."""
        return min(step // self.update_every, self.events - 1) * self.delta


def on(kind: Any, **options: Any) -> Variant:
    """A method at the stage's ratio."""
    return lambda stage: ([kind(stage.ratio, start=stage.start, epochs=stage.epochs, **options)], {})


def single(kind: Any) -> Variant:
    """A method on single weights."""
    return lambda stage: ([kind(ZEROS, start=stage.start, epochs=stage.epochs, granularity="weight")], {})


def slimming(travel: float) -> Variant:
    """An L1 penalty on all scales that moves each by so much, or with the published strength where that is 0."""

    def make(stage: Stage) -> Recipe:
        rates = stage.steps * stage.epochs * stage.rate / 2  # a cosine's mean
        strength = travel * (1 - MOMENTUM) / rates or PUBLISHED
        method = Magnitude(stage.ratio, score="bn_scale", start=stage.start, epochs=stage.epochs)
        return [method, ScaleL1(strength, stage)], {}

    return make


def masked_late(stage: Stage) -> Recipe:
    """Half of the stage for the global penalty, half for the mask."""
    half = max(1, stage.epochs // 2)
    return [MaskSparsity(stage.ratio, start=stage.start, epochs=stage.epochs, global_epochs=half)], {}


def grown(kind: type[GReg1Schedule], events: int | None) -> Variant:
    """GReg-1 with constants in steps: as derived, or in so many larger increments."""

    def make(stage: Stage) -> Recipe:
        steps = stage.steps * stage.epochs
        found = asdict(GReg1Schedule.derive(steps, Dynamics(stage.rate, momentum=MOMENTUM)))
        if events is not None:
            every = max(1, steps * 2 // 3 // events)
            hold = steps - 1 - (events - 1) * every
            found |= {"delta": found["ceiling"] / events, "update_every": every, "hold": hold}
        method = GReg1(stage.ratio, start=stage.start, schedule=kind(**found))
        method.schedule_type = kind  # so that a resumed run has the same growth
        return [method], {}

    return make


def at_rate(kind: Any, rate: float) -> Variant:
    """Finetuned with a learning rate of its own, along a cosine."""

    def make(stage: Stage) -> Recipe:
        optimizer = partial(SGD, lr=rate, momentum=MOMENTUM, weight_decay=stage.weight_decay)
        scheduler = partial(CosineAnnealingLR, T_max=-1)
        options = {"finetune_optimizer": optimizer, "finetune_scheduler": scheduler}
        return on(kind)(stage)[0], options

    return make


def same_set(at_once: bool) -> Variant:
    """What GReg-1 picks, without its penalty."""
    return on(SameSet, at_once=at_once)


VARIANTS: dict[str, Variant] = {
    "Magnitude": on(Magnitude),
    "GReg1": on(GReg1),
    "GReg1, coupled=False": on(GReg1, coupled=False),
    "GReg2": on(GReg2),
    "GReg2, coupled=False": on(GReg2, coupled=False),
    "TPP": on(TPP),
    "TPP, coupled=False": on(TPP, coupled=False),
    'TPP, reduction="sum"': on(TPP, reduction="sum"),
    "TPP, gram=0": on(TPP, gram=0.0),
    "TPP, gram_every=4": on(TPP, gram_every=4),
    "TPP, gram_every=16": on(TPP, gram_every=16),
    "GReg1, first event at delta": grown(GReg1Schedule, None),
    "GReg1, first event at zero": grown(FromZero, None),
    "GReg1, 8 events, the first at delta": grown(GReg1Schedule, 8),
    "GReg1, 8 events, the first at zero": grown(FromZero, 8),
    "GReg1's set, cut at once": same_set(at_once=True),
    "GReg1's set, cut after the stage": same_set(at_once=False),
    "MaskSparsity": on(MaskSparsity),
    "MaskSparsity, penalize_bias=False": on(MaskSparsity, penalize_bias=False),
    "MaskSparsity, penalize_bias=False, fold_constant=True": on(MaskSparsity, penalize_bias=False, fold_constant=True),
    "MaskSparsity, fold_constant=True": on(MaskSparsity, fold_constant=True),
    "MaskSparsity, global_epochs: half": masked_late,
    "L1 on all scales, travel 0.5": slimming(0.5),
    "L1 on all scales, travel 2": slimming(2.0),
    "L1 on all scales, strength 5e-4": slimming(0.0),
    "ASCP": on(ASCP),
    'ASCP, finish="plain"': on(ASCP, finish="plain"),
    "ASCP, pull=0.3": on(ASCP, pull=0.3),
    'ASCP, finish="plain", pull=0.3': on(ASCP, finish="plain", pull=0.3),
    'ASCP, representative="medoid"': on(ASCP, representative="medoid"),
    "ASCP, recalibrate=0": on(ASCP, recalibrate=0),
    'ASCP, rate="cosine"': on(ASCP, rate="cosine"),
    'ASCP, rate="linear"': on(ASCP, rate="linear"),
    'ASCP, rate="poly3"': on(ASCP, rate="poly3"),
    'ASCP, rate="const"': on(ASCP, rate="const"),
    'ASCP, cluster="ward"': on(ASCP, cluster="ward"),
    'ASCP, cluster="even"': on(ASCP, cluster="even"),
    'ASCP, cluster="imbalanced"': on(ASCP, cluster="imbalanced"),
    'ASCP, cluster="random"': on(ASCP, cluster="random"),
    "the smallest, softly": on(SoftNorm),
    "Magnitude, a part each epoch": lambda stage: on(Magnitude, steps=stage.epochs)(stage),
    "Magnitude, finetuned at 1e-2": at_rate(Magnitude, 1e-2),
    "Magnitude, finetuned at 1e-3": at_rate(Magnitude, 1e-3),
    "TPP, finetuned at 1e-2": at_rate(TPP, 1e-2),
    "TPP, finetuned at 1e-3": at_rate(TPP, 1e-3),
    "Magnitude on single weights": single(Magnitude),
    "GReg1 on single weights": single(GReg1),
    "GReg2 on single weights": single(GReg2),
}
"""By the name in the tables."""


class Ablation(NamedTuple):
    """One choice.

    Args:
        title: of its table.
        question: what the table answers.
        variants: names, each default before what it is compared with.
        against: name of each variant that is compared to the name of the one it is compared with.
    """

    title: str
    question: str
    variants: Sequence[str]
    against: Mapping[str, str]


def _against(default: str, *others: str) -> tuple[Sequence[str], Mapping[str, str]]:
    return (default, *others), dict.fromkeys(others, default)


def _pairs(*pairs: tuple[str, str]) -> tuple[Sequence[str], Mapping[str, str]]:
    return tuple(name for pair in pairs for name in pair), {other: default for default, other in pairs}


ABLATIONS: dict[str, Ablation] = {
    "coupled": Ablation(
        "`coupled`",
        "Is everything penalised that leaves with a channel, or as published what produces it alone?",
        *_pairs(*((name, f"{name}, coupled=False") for name in ("GReg1", "GReg2", "TPP"))),
    ),
    "bias": Ablation(
        "`penalize_bias` and `fold_constant`",
        "What of the constant that a channel of scale zero still emits? Padded layers can't take it up, and this "
        "network has no others: there is nothing to fold.",
        *_against(
            *("MaskSparsity", "MaskSparsity, fold_constant=True", "MaskSparsity, penalize_bias=False"),
            "MaskSparsity, penalize_bias=False, fold_constant=True",
        ),
    ),
    "finish": Ablation(
        "ASCP: `finish`, `pull`, `representative`",
        "Do channels part again between reconstructions, and what stands for a cluster?",
        *_against(
            *("ASCP", 'ASCP, finish="plain"', "ASCP, pull=0.3", 'ASCP, finish="plain", pull=0.3'),
            'ASCP, representative="medoid"',
        ),
    ),
    "reduction": Ablation(
        "TPP: `reduction`, `gram`, `gram_every`",
        "Is the decorrelation a mean over the products, a sum, or left out? At every step, or at every k-th, k times "
        "as strong?",
        *_against("TPP", 'TPP, reduction="sum"', "TPP, gram=0", "TPP, gram_every=4", "TPP, gram_every=16"),
    ),
    "first_event": Ablation(
        "The first event",
        "Does the strength begin with one increment (GReg's code) or with nothing (TPP's)? "
        "With the derived increments, and with eight large ones. All four have constants in steps, whose strength does "
        "not rise as the learning rate falls, unlike the default GReg1's: their numbers stand beside each other, not "
        "beside that one's.",
        *_pairs(
            ("GReg1, first event at delta", "GReg1, first event at zero"),
            ("GReg1, 8 events, the first at delta", "GReg1, 8 events, the first at zero"),
        ),
    ),
    "recalibration": Ablation(
        "Statistics taken anew before the number right after surgery",
        "How much of what is lost at surgery do batch norms lose? Every table of this page has that column; here "
        "the methods side by side, and ASCP without its own recalibration.",
        (
            *("Magnitude", "GReg1", "GReg1, coupled=False", "TPP", "MaskSparsity"),
            *("MaskSparsity, penalize_bias=False", "ASCP", "ASCP, recalibrate=0"),
        ),
        {"ASCP, recalibrate=0": "ASCP"},
    ),
    "masked": Ablation(
        "Masked or global sparsity",
        "Is the pull at the scales that go alone (MaskSparsity), or at all (network slimming)? *Travel*: how far "
        "the penalty can move a scale. MaskSparsity's rows also have a larger travel, a pull at the biases and a hold "
        "at zero before surgery, which plain L1 on all scales has not: what they win is not the mask's alone.",
        *_against(
            *("MaskSparsity", "MaskSparsity, global_epochs: half", "L1 on all scales, travel 0.5"),
            *("L1 on all scales, travel 2", "L1 on all scales, strength 5e-4"),
        ),
    ),
    "same_set": Ablation(
        "The same channels, grown or cut",
        "GReg-1 and plain L1 remove the same channels: picked at the same moment from the same weights. At once, they "
        "have twice the epochs to finetune.",
        *_against("GReg1", "GReg1's set, cut at once", "GReg1's set, cut after the stage"),
    ),
    "rate": Ablation(
        "Learning rate of the finetune stage",
        "Is what a method wins over plain L1 still there where the finetune stage has a larger learning rate?",
        *_pairs(
            ("TPP, finetuned at 1e-2", "Magnitude, finetuned at 1e-2"),
            ("TPP, finetuned at 1e-3", "Magnitude, finetuned at 1e-3"),
        ),
    ),
    "schedules": Ablation(
        "ASCP: `rate`",
        "Which way do the clusters become fewer? The default is the published exponential.",
        *_against("ASCP", *(f'ASCP, rate="{shape}"' for shape in ("cosine", "linear", "poly3", "const"))),
    ),
    "clusters": Ablation(
        "Clusters or norms",
        "Does it help to merge what is alike? Clusters that look at no weight, filters chosen by their norm, softly "
        "(they may come back) and for good.",
        *_against(
            *("ASCP", *(f'ASCP, cluster="{kind}"' for kind in ("ward", "even", "imbalanced", "random"))),
            *("the smallest, softly", "Magnitude, a part each epoch", "Magnitude"),
        ),
    ),
    "weights": Ablation(
        f"Single weights, {ZEROS:.0%} zeros",
        "Growing regularisation or magnitudes, where each weight goes by itself? MACs are those of dense kernels.",
        *_against("Magnitude on single weights", "GReg1 on single weights", "GReg2 on single weights"),
    ),
}
"""By the name on the command line."""
