"""The report's pictures for papers and notebooks; needs matplotlib, ``pip install 'lightning-prune[plots]'``.

Each function draws into the axes it is given, or into those of a new figure, and returns them: ``axes.figure.savefig``
goes on from there. No window is opened and nothing is remembered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_prune.errors import ConfigurationError
from lightning_prune.reports.history import Moment
from lightning_prune.reports.report import STAGES, PruningReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUANTITIES = {
    "energy": "share of squared weight left",
    "separation": "weights that stay over those that go",
    "penalty": "penalty, units of the loss",
    "strength": "strength",
}


def widths(report: PruningReport, axes: Axes | None = None) -> Axes:
    """Two bars per layer: channels (or weights) before, and those that are left.

    >>> from lightning_prune.reports.cost import Cost
    >>> axes = widths(PruningReport([("conv1", 16, 8)], Cost(800, 100), Cost(200, 30)))
    >>> [float(patch.get_width()) for patch in axes.patches]
    [16.0, 8.0]
    """
    axes = _axes(axes, 1.5 + 0.3 * len(report.layers))
    names = [name for name, _, _ in report.layers]
    axes.barh(names, [before for _, before, _ in report.layers], color="0.82", label="before")
    axes.barh(names, [after for _, _, after in report.layers], color="C0", label="after")
    axes.invert_yaxis()
    axes.set_xlabel(report.unit)
    axes.legend(frameon=False)
    return axes


def curves(
    history: Sequence[Moment],
    quantity: Literal["energy", "penalty", "separation", "strength"] = "energy",
    axes: Axes | None = None,
) -> Axes:
    """One line per method over the epochs of the sparse stage.

    Args:
        history: a report's.
        quantity: what to draw; all but the strength on a logarithmic axis, where zeros are left out.
        axes: to draw into.

    Raises:
        ConfigurationError: another quantity.

    >>> line, = curves([Moment("greg1", 0, 10, "grow", 0.1, energy=0.5)]).get_lines()
    >>> line.get_label(), float(line.get_ydata()[0])
    ('greg1', 0.5)
    """
    if quantity not in QUANTITIES:
        raise ConfigurationError(f"quantity={quantity!r} must be one of {', '.join(QUANTITIES)}.")
    axes = _axes(axes)
    is_log = quantity != "strength"
    for method in dict.fromkeys(moment.method for moment in history):
        own = [(each.epoch, getattr(each, quantity)) for each in history if each.method == method]
        known = [(epoch, value) for epoch, value in own if value is not None and (value > 0 or not is_log)]
        axes.plot([epoch for epoch, _ in known], [value for _, value in known], marker=".", label=method)
    if is_log:
        axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.set_ylabel(QUANTITIES[quantity])
    if axes.get_lines():
        axes.legend(frameon=False)
    return axes


def accuracy(report: PruningReport, axes: Axes | None = None) -> Axes:
    """The monitored metric at every validation, and a dashed line where surgery was; else the four stages.

    >>> from lightning_prune.reports.cost import Cost
    >>> report = PruningReport([], Cost(8, 1), Cost(8, 1), monitor="val_acc", accuracy={"dense": 0.9, "after": 0.8})
    >>> [float(value) for value in accuracy(report).get_lines()[0].get_ydata()]
    [0.9, 0.8]
    """
    axes = _axes(axes)
    known = [each for each in report.validations if each.value is not None]
    if known:
        axes.plot([each.epoch for each in known], [each.value or 0.0 for each in known], marker=".")
        surgery = next((each.epoch for each in known if each.slim), None)
        if surgery is not None:
            axes.axvline(surgery, color="0.5", linestyle="--", linewidth=1)
        axes.set_xlabel("epoch")
    else:
        stages = [(stage, report.accuracy[stage]) for stage in STAGES if report.accuracy[stage] is not None]
        axes.plot([stage for stage, _ in stages], [value or 0.0 for _, value in stages], marker="o")
    axes.set_ylabel(report.monitor or "")
    return axes


def latency(report: PruningReport, axes: Axes | None = None) -> Axes:
    """Measured speed-up at every batch size and in every variant, and a dashed line where the MACs would put it.

    >>> from lightning_prune.reports.cost import Cost
    >>> from lightning_prune.reports.latency import Latency
    >>> taken = [Latency(ms, 0.1, 1, "cpu", 1, 40) for ms in (3.0, 2.0)]
    >>> report = PruningReport([], Cost(800, 100), Cost(200, 30), taken[:1], taken[1:])
    >>> [float(patch.get_height()) for patch in latency(report).patches]
    [1.5]
    """
    axes = _axes(axes)
    names = [f"batch {each.batch}" + (f"\n{each.variant}" if each.variant != "eager" else "") for each in report.speed]
    axes.bar(names, [each.measured for each in report.speed])
    theoretical = next((each.theoretical for each in report.speed), None)
    if theoretical is not None:
        axes.axhline(theoretical, color="0.5", linestyle="--", linewidth=1)
    axes.set_ylabel("times faster")
    return axes


def pixels(axes: Axes) -> NDArray[np.uint8]:
    """The picture that some axes are part of: bytes of shape ``(height, width, 3)``, red, green and blue.

    >>> pixels(curves([])).shape[2]
    3
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import SubFigure

    figure = axes.get_figure()
    while isinstance(figure, SubFigure):
        figure = figure.figure
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _axes(axes: Axes | None, height: float = 3.5) -> Axes:
    if axes is not None:
        return axes
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError("Plots need matplotlib: pip install 'lightning-prune[plots]'.") from error
    return Figure(figsize=(6.4, height), layout="constrained").subplots()
