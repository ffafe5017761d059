"""Asymptotic soft cluster pruning: filters become alike, cluster by cluster, until one can stand for the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lightning_prune import structure
from lightning_prune.callbacks.base import Regulariser
from lightning_prune.callbacks.budgeting import refuse_all_but_one
from lightning_prune.callbacks.inject import Penalty
from lightning_prune.callbacks.likeness import (
    Averaging,
    average_state_,
    cluster,
    make_alike_,
    nearest_members,
    own_members,
    similarities,
)
from lightning_prune.callbacks.neighbours import average_models
from lightning_prune.callbacks.recalibration import RecentCalls, recalibrate_
from lightning_prune.callbacks.targets import FAR
from lightning_prune.clusters import churn, representatives
from lightning_prune.door import check, number, whole
from lightning_prune.errors import ConfigurationError
from lightning_prune.penalties import cluster_pull
from lightning_prune.schedules import SHAPES, ASCPSchedule, Dynamics
from lightning_prune.structure import Budget
from lightning_prune.structure.plan import named_tensors, submodule

METHODS = ("kmeans", "ward", "even", "imbalanced", "random")


@dataclass(frozen=True)
class Pull:
    """How strongly the channels of one cluster are pulled together.

    Args:
        strength: of the penalty.
    """

    strength: float


@final
class ASCP(Regulariser):
    r"""ASCP: filters that resemble each other are made alike at every epoch's end, and trained on in between.

    After ``t`` epochs of the stage each group has :math:`K(t)` clusters, and everything that produces its channels or
    acts on them one by one becomes the cluster's mean,

    .. math:: W \leftarrow M W, \qquad M = H (H^\top H)^{-1} H^\top, \qquad H \in \{0, 1\}^{C \times K(t)}.

    Once :math:`K` is final and the partition stays, one channel can stand for each cluster: surgery adds what the next
    layer reads from the others to what it reads from that one, which changes no output.

    See :class:`~lightning_prune.schedules.ASCPSchedule` for :math:`K(t)`, :mod:`lightning_prune.clusters` for the
    clustering, :func:`~lightning_prune.penalties.cluster_pull` for the pull.

    Args:
        ratio: fraction of channels to remove, in (0, 1).
        budget: instead of ``ratio`` what may be left of the network, such as ``{"macs": 0.5}``; see
            :class:`~lightning_prune.Budget`.
        epochs: length of the soft stage; rate and freeze are derived for it.
        schedule: instead of ``epochs`` a record of constants; ``ASCPSchedule(200)`` with
            ``finish="plain"`` is the published form.
        rate: shape of the growing rate, where ``epochs`` is given; ``None`` is the published ``"exp"``.
        cluster: ``"kmeans"``, ``"ward"`` (nested partitions), or one that looks at no weight, for comparison:
            ``"even"``, ``"imbalanced"``, ``"random"``.
        representative: ``"mean"``, or ``"medoid"`` to copy the member nearest to it.
        pull: strength of the pull of each channel towards its cluster's mean between reconstructions; 0 is none.
        finish: ``"centripetal"`` averages gradients within clusters as soon as the partition is final, so that channels
            stay alike and the last reconstruction has nothing to take back; ``"plain"`` lets them part again.
        recalibrate: samples of the last epoch from which running statistics of batch normalisation are taken anew
            after the last reconstruction; the batches are kept in memory during that epoch, and in checkpoints that are
            written in it. 0 takes none.
        ratios: name patterns to ratios in [0, 1); 0 leaves a layer alone.
        ignore: name patterns of layers to leave alone.
        scope: ``"inner"`` for groups with one producer, ``"all"`` for residual streams too, one partition for each.
        round_to: kept widths are multiples of this; ``"auto"`` measures in the first batch what is fast on the device.
        start: epoch at which the soft stage begins.
        module: name of the pruned module inside the LightningModule; ``None`` finds it in the first training batch.
        name: tells instances of one class apart in checkpoints and logs.

    Raises:
        ConfigurationError: an argument is out of its range, or not exactly one of ``epochs`` and ``schedule`` is given.

    Source: Niu et al., Asymptotic Soft Cluster Pruning for Deep Neural Networks, 2022, arXiv 2206.08186; the pull and
    the centripetal finish: Ding et al., Centripetal SGD, CVPR 2019, arXiv 1904.03837.

    >>> ASCP(0.5, epochs=10, cluster="ward", ignore=["stem*"]).phase
    'wait'
    """

    schedule_type = Pull
    needs = "channels that can be merged"

    _labels: dict[str, Tensor]
    _averaging: Averaging | None
    _copied: dict[str, Tensor]
    _calls: RecentCalls
    _resumed: list[Any]

    def __init__(
        self,
        ratio: float | None = None,
        *,
        budget: Budget | Mapping[str, Any] | None = None,
        epochs: int | None = None,
        schedule: ASCPSchedule | None = None,
        rate: Literal["exp", "linear", "cosine", "poly3", "const"] | None = None,
        cluster: Literal["kmeans", "ward", "even", "imbalanced", "random"] = "kmeans",
        representative: Literal["mean", "medoid"] = "mean",
        pull: float = 0.0,
        finish: Literal["centripetal", "plain"] = "centripetal",
        recalibrate: int = 1024,
        ratios: Mapping[str, float] | None = None,
        ignore: Sequence[str] = (),
        scope: Literal["inner", "all"] = "inner",
        round_to: int | Literal["auto"] = 1,
        start: int = 0,
        module: str | None = None,
        name: str | None = None,
    ) -> None:
        check((epochs is None) != (schedule is None), "Give exactly one of epochs=... and schedule=....")
        check(schedule is None or isinstance(schedule, ASCPSchedule), f"schedule={schedule!r} must be an ASCPSchedule.")
        check(rate is None or schedule is None, "A schedule has its own shape; give rate=... with epochs=... only.")
        check(rate is None or rate in SHAPES, f"rate={rate!r} must be one of {', '.join(SHAPES)}.")
        check(cluster in METHODS, f"cluster={cluster!r} must be one of {', '.join(METHODS)}.")
        check(representative in ("mean", "medoid"), f"representative={representative!r} must be 'mean' or 'medoid'.")
        number("pull", pull)
        check(0 <= pull < float("inf"), f"pull={pull} must be a finite number of at least 0.")
        check(finish in ("centripetal", "plain"), f"finish={finish!r} must be 'centripetal' or 'plain'.")
        whole("recalibrate", recalibrate, least=0)
        refuse_all_but_one(ratio=ratio, budget=budget)
        super().__init__(
            ratio,
            budget=budget,
            ratios=ratios,
            ignore=ignore,
            scope=scope,
            round_to=round_to,
            start=start,
            epochs=epochs if schedule is None else schedule.epochs,
            module=module,
            name=name,
        )
        self.schedule = schedule
        self.rate = rate
        self.cluster = cluster
        self.representative = representative
        self.pull = pull
        self.finish = finish
        self.recalibrate = recalibrate
        self._rates = schedule if schedule is not None else _derived(int(epochs or 1), rate)

    # The stage.

    def begin(self, steps: int | None, dynamics: Dynamics) -> Pull:
        """The pull, unless it would overshoot; the rate has been known from the beginning."""
        if dynamics.learning_rate * self.pull >= 1:
            raise ConfigurationError(
                f"{self._label}: learning rate {dynamics.learning_rate:g} times pull={self.pull:g} must stay below 1; "
                "lower one of them."
            )
        return Pull(self.pull)

    def entered(self, trainer: Trainer, dynamics: Dynamics) -> None:
        """Say where the pull acts."""
        if self.pull and dynamics.decoupled:
            kind = type(self._keeper).__name__
            rank_zero_info(f"{self._label}: {kind} rescales gradients, so the pull acts after each step instead.")

    # The channels.

    def reach(self, group: structure.ChannelGroup) -> Sequence[tuple[str, int]]:
        """Whatever must be alike for channels to be alike."""
        return own_members(group)

    def suits(self, group: structure.ChannelGroup) -> bool:
        """Nothing may read its channels all together."""
        return group.mergeable

    def known_after(self, schedule: Any, steps: int | None) -> int:
        """After the epoch whose partition is final."""
        return (steps or 0) * self._rates.freeze_epoch // self._rates.epochs

    def picks(self, step: int) -> bool:
        """Channels are picked at an epoch's end."""
        return False

    def choose(self, graph: structure.ChannelGraph) -> Mapping[str, Sequence[int]]:
        """All but the first of each cluster."""
        stays = {name: representatives(labels).tolist() for name, labels in self._labels.items()}
        return {name: [c for c, first in enumerate(firsts) if c != first] for name, firsts in stays.items()}

    def foresee(self, graph: structure.ChannelGraph) -> Mapping[str, Sequence[int]]:
        """As many as will go; which ones the clusters say later."""
        return self.smallest(graph)

    def merges(self) -> dict[str, dict[int, int]]:
        """Into the first of its cluster."""
        stays = {name: representatives(self._labels[name]).tolist() for name in self._picked}
        return {name: {channel: stays[name][channel] for channel in gone} for name, gone in self._picked.items()}

    def left(self) -> Tensor:
        """Squared distance of the channels to their clusters' means: nothing right after a reconstruction."""
        means = self._averages().means({name: p.detach() for name, p in self._parameters.items()})
        apart = torch._foreach_sub([self._parameters[name].detach() for name in means], list(means.values()))
        return _square(apart)

    def apart(self) -> Tensor | None:
        """Size of the channels over their distance to their clusters' means, in the median tensor."""
        means = self._averages().means({name: p.detach() for name, p in self._parameters.items()})
        if not means:
            return None
        whole = [self._parameters[name].detach() for name in means]
        sizes, ways = torch._foreach_norm(whole), torch._foreach_norm(torch._foreach_sub(whole, list(means.values())))
        ratios = torch.stack([size.float() / way.float() for size, way in zip(sizes, ways, strict=True)])
        return ratios.nanmedian().clamp_max(FAR)

    # The steps.

    def update(self, step: int) -> None:
        """The pull's strength is constant."""
        self._strength = self._schedule.strength

    def penalty(self) -> Penalty | None:
        """The pull of every channel to its cluster's mean; nothing before the first reconstruction."""
        trained = {name: p.detach() for name, p in self._parameters.items() if p.requires_grad}
        means = self._averages().means(trained) if self._strength and not self.ready else {}
        if not means:
            return None
        value, gradients = cluster_pull(
            [trained[name] for name in means], list(means.values()), strength=self._strength
        )
        return Penalty(value, [self._parameters[name] for name in means], gradients, fresh=True)

    def before_step(self, optimizer: Optimizer) -> None:
        """Let clusters that are final move as one."""
        if not self._picked or self.finish == "plain":
            return
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        gradients = {name: p.grad for name, p in self._parameters.items() if p.grad is not None and id(p) in held}
        self._averages().average_(gradients)

    def after_step(self, optimizer: Optimizer) -> None:
        """Remember what the network was called with in the last epoch: each batch once, however many may step."""
        trainer, _ = self._run()
        is_last = trainer.current_epoch - self.first_epoch + 1 >= self._rates.epochs
        if is_last and optimizer is self._keeper:
            self._calls.keep(self.capture.inputs)

    def end_epoch(self, finished: int) -> None:
        """Cluster and reconstruct."""
        graph = self.capture.graph
        if graph is None or not self._rates.due(finished):
            return
        tensors, before = named_tensors(graph.model), self._labels
        self._copied = self._divide(finished, tensors)
        is_final = finished >= self._rates.freeze_epoch and not self._picked
        if is_final:
            self._pick()
        self._make_alike(tensors)
        if self._picked and self.finish == "centripetal":  # again after a resume, which may come from a plain finish
            trainer, _ = self._run()
            average_state_(trainer.optimizers, self._parameters, self._averages())
        self._tell(before)

    def conclude(self) -> None:
        """What surgery finds: alike in the weight averages too, with running statistics of the merged channels."""
        trainer, pl_module = self._run()
        network = submodule(pl_module, self.capture.name or "")
        for twin in average_models(trainer):
            self._make_alike(named_tensors(submodule(twin, self.capture.name or "")))
        recalibrate_(trainer, network, self._calls)
        self._calls.clear()
        buffers = {name: t for name, t in named_tensors(network).items() if not isinstance(t, torch.nn.Parameter)}
        Averaging(self._groups.values(), self._labels).average_(buffers)  # once: nothing to remember

    # The checkpoint.

    def memory(self) -> dict[str, Any]:
        """The partition, and in the last epoch the batches for the recalibration."""
        calls = self._calls.plain() if len(self._calls) else self._resumed
        return {"labels": {name: labels.cpu() for name, labels in self._labels.items()}, "calls": calls}

    def remember(self, memory: dict[str, Any]) -> None:
        """Take over what :meth:`memory` had saved."""
        self._labels, self._averaging = dict(memory["labels"]), None
        self._resumed = list(memory["calls"])

    # The machinery.

    def _divide(self, epoch: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Decide the partition and, for medoids, whom to copy: rank 0 decides for all."""
        if self._picked and self.representative == "mean":
            return {}
        counts = {name: self._count(name, epoch) for name in self._groups}
        names = [name for name, count in counts.items() if count < self._groups[name].size]
        similar = {name: similarities(self._groups[name], tensors) for name in names}
        for name, table in similar.items():
            check(bool(table.isfinite().all()), f"The weights of group {name!r} are not all finite; training diverged.")
        labels = self._labels
        if not self._picked:
            labels = cluster(similar, counts, self.cluster, labels, torch.Generator().manual_seed(epoch))
        copying = self.representative == "medoid"
        copied = {name: nearest_members(similar[name], labels[name]) for name in names if copying}
        plain = [{name: value.tolist() for name, value in part.items()} for part in (labels, copied)]
        self._labels, copied = (
            {name: torch.tensor(value, device=similar[name].device) for name, value in part.items()}
            for part in self.agreed(lambda: plain)
        )
        self._averaging = None
        return copied

    def _count(self, name: str, epoch: int) -> int:
        group, ratio = self._groups[name], self._shares[name]
        final = structure.kept_channels(group.size, ratio, unit=group.unit, round_to=self.multiple)
        return self._rates.clusters(epoch, group.size, ratio, final)

    def _make_alike(self, tensors: Mapping[str, Tensor]) -> None:
        for name, labels in self._labels.items():
            make_alike_(tensors, self._groups[name], labels, self._copied.get(name))

    def _averages(self) -> Averaging:
        """Of the partition as it is."""
        if self._averaging is None:
            self._averaging = Averaging(self._groups.values(), self._labels)
        return self._averaging

    def _tell(self, before: Mapping[str, Tensor]) -> None:
        """Log how much the partition has changed, and which share of the channels is one of a kind."""
        _, pl_module = self._run()
        pairs = [(before[name].to(now.device), now) for name, now in self._labels.items() if name in before]
        changes = [churn(old[None], now[None]) for old, now in pairs]
        merged = sum(len(labels) - int(labels.max()) - 1 for labels in self._labels.values())
        values = {"distinct": 1 - merged / sum(group.size for group in self._groups.values())}
        if changes:
            values["churn"] = float(torch.cat(changes).mean())
        for key, value in values.items():
            pl_module.log(f"{self._label}/{key}", value, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    def _join(self, trainer: Trainer, graph: structure.ChannelGraph) -> None:
        super()._join(trainer, graph)
        self._calls = RecentCalls(self.recalibrate)
        self._calls.restore(self._resumed, next(iter(self._parameters.values())).device)
        self._resumed = []
        if all(self._count(name, self._rates.epochs) == group.size for name, group in self._groups.items()):
            raise ConfigurationError(
                f"{self._label}: ratio={self.ratio} merges no channel; raise it or lower round_to."
            )

    def _forget(self) -> None:
        super()._forget()
        self._labels = {}
        self._resumed = []

    def _leave(self) -> None:
        super()._leave()
        self._averaging = None
        self._copied = {}
        self._calls = RecentCalls(0)


def _square(tensors: Sequence[Tensor]) -> Tensor:
    if not tensors:
        return torch.zeros(())
    return torch.stack([norm.float() for norm in torch._foreach_norm(list(tensors))]).square().sum()


def _derived(epochs: int, rate: Any) -> ASCPSchedule:
    """The schedule for a stage of so many epochs, with the rate's shape where one is asked for."""
    derived = ASCPSchedule.derive(epochs)
    return derived if rate is None else replace(derived, shape=rate)
