"""Magnitude pruning: the smallest channels are cut off, and that is all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

from torch.optim import Optimizer

from lightning_prune import structure
from lightning_prune.callbacks.base import Regulariser
from lightning_prune.callbacks.budgeting import refuse_all_but_one
from lightning_prune.callbacks.targets import zero_out_
from lightning_prune.door import check, whole
from lightning_prune.structure import Budget
from lightning_prune.structure.choice import SCORES, WEIGHT_SCORES


@final
class Magnitude(Regulariser):
    r"""Magnitude: trains on without any penalty, then the channels of least score go; the baseline of every method.

    In one shot the network is dense until surgery. In ``steps`` the ratio grows in equal parts,

    .. math:: r_k = \frac{k}{n} \, r, \qquad k = 1, \dots, n

    each at the end of an epoch, as evenly over the stage as whole epochs allow. What has been picked is zero from then
    on and stays so; the last part goes at surgery.

    See :mod:`lightning_prune.scores` for the scores.

    Args:
        ratio: fraction of channels, or of each layer's weights, to remove, in (0, 1).
        budget: instead of ``ratio`` what may be left of the network, such as ``{"macs": 0.5}``; see
            :class:`~lightning_prune.Budget`.
        score: ``"l1"`` (mean absolute weight), ``"l2"`` (root mean square), ``"bn_scale"`` (absolute scale of the
            norm), or ``"random"``.
        steps: parts in which channels go, at most one per epoch of the stage.
        seed: of ``score="random"``.
        ratios: name patterns to ratios in [0, 1); 0 leaves a layer alone.
        ignore: name patterns of layers to leave alone.
        scope: ``"inner"`` for groups with one producer, ``"all"`` for residual streams too.
        round_to: kept widths are multiples of this; ``"auto"`` measures in the first batch what is fast on the device.
        granularity: ``"channel"``, or ``"weight"``: of every convolution, linear layer and their like the fraction of
            least absolute weight is set to zero and stays there; ``scope``, ``round_to`` and ``"bn_scale"`` say
            nothing about those.
        start: epoch at which the stage begins.
        epochs: length of the stage; surgery follows at its end.
        module: name of the pruned module inside the LightningModule; ``None`` finds it in the first training batch.
        name: tells instances of one class apart in checkpoints and logs.

    Raises:
        ConfigurationError: an argument is out of its range.

    Source: Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, arXiv 1608.08710.

    >>> Magnitude(0.5, start=10).epochs, Magnitude(0.5, steps=3, epochs=6).cuts
    (1, (2, 4, 6))
    """

    collapses = False

    def __init__(
        self,
        ratio: float | None = None,
        *,
        budget: Budget | Mapping[str, Any] | None = None,
        score: Literal["l1", "l2", "bn_scale", "random"] = "l1",
        steps: int = 1,
        seed: int = 0,
        ratios: Mapping[str, float] | None = None,
        ignore: Sequence[str] = (),
        scope: Literal["inner", "all"] = "inner",
        round_to: int | Literal["auto"] = 1,
        granularity: Literal["channel", "weight"] = "channel",
        start: int = 0,
        epochs: int = 1,
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
        check(score in SCORES, f"score={score!r} must be one of {', '.join(SCORES)}.")
        check(
            granularity == "channel" or score in WEIGHT_SCORES,
            f"score={score!r} ranks channels; with granularity='weight' it must be one of {', '.join(WEIGHT_SCORES)}.",
        )
        whole("steps", steps)
        whole("seed", seed)
        check(1 <= steps <= epochs, f"steps={steps} must lie in 1..epochs={epochs}: one step takes an epoch.")
        self.score = score
        self.steps = steps
        self.seed = seed
        self.needs = "a norm with a scale"

    @property
    def cuts(self) -> tuple[int, ...]:
        """After how many epochs of the stage each part of the channels goes."""
        epochs = self.epochs or 1
        return tuple(math.ceil(part * epochs / self.steps) for part in range(1, self.steps + 1))

    def suits(self, group: structure.ChannelGroup) -> bool:
        """Scores that are read from a norm need one."""
        return self.score != "bn_scale" or bool(group.scales)

    def reach(self, group: structure.ChannelGroup) -> Sequence[tuple[str, int]]:
        """Everything that leaves with a channel."""
        return group.members

    def known_after(self, schedule: Any, steps: int | None) -> int:
        """After the epoch that has the first cut."""
        return (steps or 0) * self.cuts[0] // (self.epochs or 1)

    def picks(self, step: int) -> bool:
        """Never before a step: channels go at the end of epochs."""
        return False

    def settled(self) -> bool:
        """After the last cut."""
        return self._ended >= self.cuts[-1]

    def choose(self, graph: structure.ChannelGraph) -> Mapping[str, Sequence[int]]:
        """The channels of least score, as many as the epochs that are over allow; those picked before among them."""
        share = max(1, sum(cut <= self._ended for cut in self.cuts)) / self.steps
        return self.smallest(graph, score=self.score, share=share, seed=self.seed)

    def end_epoch(self, finished: int) -> None:
        """Pick the next part, and set it to zero unless it is the last."""
        if finished in self.cuts:
            self._pick()
        if finished != self.epochs:
            self._hide()

    def after_step(self, optimizer: Optimizer) -> None:
        """What has been picked stays zero."""
        if not self.ready:
            self._hide()

    def _hide(self) -> None:
        if self._picked:
            zero_out_(self._targets)
