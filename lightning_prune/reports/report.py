"""What pruning did to a network, as data."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning_prune.errors import ConfigurationError
from lightning_prune.reports.cost import Cost
from lightning_prune.reports.exported import Export
from lightning_prune.reports.history import Moment, Validation, finite
from lightning_prune.reports.latency import Latency, fastest
from lightning_prune.structure.budget import Outcome
from lightning_prune.structure.drafts import draft_of

FORMAT = 1
STAGES = ("dense", "before", "after", "finetuned")
UNITS = {
    "budgets": "asked and reached, of the whole network: MACs per sample, parameters, or milliseconds per batch",
    "accuracy": "the monitored metric: dense, just before surgery, right after surgery, finetuned",
    "bytes": "of the network's weights in a file, without its header",
    "exports": "files made of the slim network; size in bytes, error relative to the largest output",
    "error": "largest difference between masked and pruned network, relative to the largest output",
    "fastest": "of the slim network's variants at each batch size the plainest that is as fast as the fastest",
    "history": "one entry per method and epoch of the sparse stage; strength, penalty in units of the loss",
    "layers": "name, number before, number after; channels or weights, as unit says",
    "latency": "milliseconds per batch: median and interquartile range; variant: eager, channels_last or compiled",
    "macs": "multiply-adds per sample, counted by fvcore; single weights save some with sparse kernels only",
    "parameters": "number of parameters; of single weights those that the mask keeps",
    "speed": "latency before over latency after (measured), MACs before over MACs after (theoretical), their quotient",
}


def versions() -> dict[str, str]:
    """Versions of what the numbers of a report depend on.

    >>> sorted(versions())
    ['fvcore', 'lightning', 'lightning-prune', 'torch']
    """
    return {name: _version(name) for name in ("fvcore", "lightning", "lightning-prune", "torch")}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


@dataclass(frozen=True)
class Speed:
    """How much faster the slim network is.

    Args:
        batch: samples in the batch.
        measured: latency before over latency after.
        theoretical: MACs before over MACs after; ``None`` where they could not be counted.
        variant: how both networks were run, see :class:`Latency`.
    """

    batch: int
    measured: float
    theoretical: float | None
    variant: str = "eager"

    @property
    def share(self) -> float | None:
        """Measured over theoretical: 1 where every multiply-add less saves its time."""
        return None if self.theoretical is None else self.measured / self.theoretical


@dataclass(frozen=True)
class Distilled:
    """What the finetune stage learns from beside its own loss.

    Args:
        temperature: by which both networks' logits are divided.
        weight: share of the loss that the teacher's part has.
        teacher: where its weights come from.
        logits_from: name of the module that gives the logits; ``""`` for the LightningModule.

    >>> print(Distilled(4, 0.5, "the dense network as of epoch 12", "net"))
    Distilled from the dense network as of epoch 12: temperature 4, weight 0.5, logits of net
    """

    temperature: float
    weight: float
    teacher: str
    logits_from: str

    def __str__(self) -> str:
        told = f"temperature {self.temperature:g}, weight {self.weight:g}, logits of {self.logits_from or 'forward'}"
        return f"Distilled from {self.teacher}: {told}"


@dataclass(frozen=True)
class PruningReport:
    """What one surgery did.

    Args:
        layers: name, channels (or weights) before and after, of every layer that lost any.
        cost_before: of the dense network.
        cost_after: of the slim network; of a network with single weights at zero, what dense kernels compute and the
            parameters that its mask keeps.
        latency_before: of the dense network, one per variant and batch size.
        latency_after: of the slim network, in the same variants and at the same batch sizes.
        monitor: name of the metric in ``accuracy``; ``None`` where none was asked for.
        accuracy: the metric of the dense network (``"dense"``: before the sparse stage, ``"before"``: just before
            surgery) and of the slim one (``"after"``: right after surgery, ``"finetuned"``); ``None`` where unknown.
        error: largest difference between masked and slim network on a training batch, relative to the largest output.
        tolerance: what was allowed for ``error``.
        unit: what ``layers`` counts, ``"channels"`` or ``"weights"``.
        budgets: what was asked for instead of a ratio, and what is left by the counts above (latency: as it was
            measured when the widths were found).
        round_to: what the widths are multiples of; of ``"auto"`` what was found.
        renormalised: whose statistics now run over fewer channels: scales of norms, weights, makers of channels.
        warnings: one sentence each.
        versions: package name -> version.
        bytes_before: size of the dense network's weights in a file without its header; ``None`` where unknown.
        bytes_after: of the slim network's; of single weights with bitmaps and kept values alone.
        history: how the methods stood at the end of each epoch of the sparse stage.
        validations: the metric at every validation; of very long runs at every second, fourth and so on.
        config: name of a callback, the trainer or an optimiser -> argument -> value, all that JSON can hold.
        commit: of the repository that the run was started in; ``None`` where there is none.
        exports: files that were made of the slim network, and how far each departs from it.
        distilled: how the finetune stage learns from the dense network; ``None`` where it doesn't.

    Raises:
        ConfigurationError: ``accuracy`` knows another stage, ``unit`` is another, or the latencies were taken at
            different batch sizes or in different variants.

    >>> cost = Cost(macs=800, parameters=100), Cost(macs=200, parameters=30)
    >>> report = PruningReport([("conv1", 16, 8)], *cost, accuracy={"dense": 0.98}, versions={})
    >>> PruningReport.from_json(report.to_json()) == report
    True
    """

    layers: Sequence[tuple[str, int, int]]
    cost_before: Cost
    cost_after: Cost
    latency_before: Sequence[Latency] = ()
    latency_after: Sequence[Latency] = ()
    monitor: str | None = None
    accuracy: Mapping[str, float | None] = field(default_factory=dict)
    error: float = 0.0
    tolerance: float = 0.0
    unit: str = "channels"
    budgets: Sequence[Outcome] = ()
    round_to: int = 1
    renormalised: Sequence[str] = ()
    warnings: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=versions)
    bytes_before: int | None = None
    bytes_after: int | None = None
    history: Sequence[Moment] = ()
    validations: Sequence[Validation] = ()
    config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    commit: str | None = None
    exports: Sequence[Export] = ()
    distilled: Distilled | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.accuracy) - set(STAGES))
        if unknown:
            raise ConfigurationError(f"accuracy knows {', '.join(STAGES)}, not {unknown[0]!r}.")
        if self.unit not in ("channels", "weights"):
            raise ConfigurationError(f"unit={self.unit!r} must be 'channels' or 'weights'.")
        taken = self.latency_before, self.latency_after
        for name, unit in (("batch", "batches"), ("variant", "variants")):
            before, after = ([getattr(latency, name) for latency in each] for each in taken)
            if before != after:
                raise ConfigurationError(f"Latency was taken at {unit} {before} before and {after} after.")
        # Lists and tuples would not compare equal after a round trip through JSON.
        lists = ("latency_before", "latency_after", "budgets", "renormalised", "warnings", "history", "validations")
        for name in (*lists, "exports"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "layers", tuple((name, int(old), int(new)) for name, old, new in self.layers))
        object.__setattr__(self, "accuracy", {stage: finite(self.accuracy.get(stage)) for stage in STAGES})

    @property
    def speed(self) -> tuple[Speed, ...]:
        """Measured and theoretical speed-up, one per variant and batch size."""
        macs = self.cost_before.macs, self.cost_after.macs
        theoretical = macs[0] / macs[1] if macs[0] and macs[1] else None
        pairs = zip(self.latency_before, self.latency_after, strict=True)
        return tuple(Speed(old.batch, old.median_ms / new.median_ms, theoretical, old.variant) for old, new in pairs)

    @property
    def fastest(self) -> tuple[Latency, ...]:
        """How to run the slim network: one latency per batch size, where several variants were measured.

        See :func:`~lightning_prune.reports.latency.fastest`.
        """
        return fastest(self.latency_after)

    def to_json(self) -> str:
        """Sorted, indented, with a format number and the units."""
        speed = [{**asdict(each), "share": each.share} for each in self.speed]
        fastest = [{"batch": each.batch, "variant": each.variant} for each in self.fastest]
        values = {"format": FORMAT, "units": UNITS, **asdict(self), "speed": speed, "fastest": fastest}
        return json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> PruningReport:
        """Reads what :meth:`to_json` wrote.

        Raises:
            ConfigurationError: another format.
        """
        values: dict[str, Any] = json.loads(text)
        found = values.pop("format", None)
        if found != FORMAT:
            raise ConfigurationError(f"This is a pruning report of format {found}; only {FORMAT} can be read.")
        for derived in ("units", "speed", "fastest"):
            values.pop(derived, None)
        for name in ("cost_before", "cost_after"):
            values[name] = Cost(**{**values[name], "uncounted": tuple(values[name]["uncounted"])})
        for name in ("latency_before", "latency_after"):
            values[name] = [Latency(**latency) for latency in values[name]]
        values["budgets"] = [Outcome(**outcome) for outcome in values.get("budgets", ())]
        values["history"] = [Moment(**moment) for moment in values.get("history", ())]
        distilled = values.get("distilled")
        values["distilled"] = None if distilled is None else Distilled(**distilled)
        values["exports"] = [Export(**each) for each in values.get("exports", ())]
        values["validations"] = [Validation(**validation) for validation in values.get("validations", ())]
        return cls(**values)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON; a reader sees the old file or the new one, never a part."""
        write_text(path, self.to_json())


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file at once: a reader sees the old one or the new one, never a part."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with draft_of(path) as draft, os.fdopen(os.open(draft, os.O_WRONLY), "w", encoding="utf-8") as file:
        file.write(text)
