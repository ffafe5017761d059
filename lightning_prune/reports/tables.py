"""Reports as tables for the terminal."""

from __future__ import annotations

from rich.table import Table

from lightning_prune.reports.latency import Latency
from lightning_prune.reports.report import PruningReport
from lightning_prune.reports.wording import (
    advice,
    clocked,
    count,
    difference,
    metric,
    milliseconds,
    percent,
    uncounted,
)


def surgery_table(report: PruningReport) -> Table:
    """One table: channels or weights per layer, MACs, parameters, latency and accuracy, before and after surgery.

    >>> from rich.console import Console
    >>> from lightning_prune.reports.cost import Cost
    >>> report = PruningReport([("conv1", 16, 8)], Cost(1_264_000, 900), Cost(632_000, 500), versions={})
    >>> Console(width=70, color_system=None).print(surgery_table(report).columns[1]._cells)
    ['16', '1.264 M', '900']
    """
    title = "From dense to slim" if report.unit == "channels" else "From dense to sparse"
    table = Table(title=title, caption=_caption(report), caption_justify="left", title_justify="left")
    table.add_column(report.unit, overflow="fold")
    for header in ("before", "after", "change"):
        table.add_column(header, justify="right", no_wrap=True)
    for name, old, new in report.layers:
        table.add_row(name, str(old), str(new), percent(old, new))
    table.add_section()
    before, after = report.cost_before, report.cost_after
    table.add_row("MACs per sample", count(before.macs), count(after.macs), percent(before.macs, after.macs))
    table.add_row(
        "parameters", count(before.parameters), count(after.parameters), percent(before.parameters, after.parameters)
    )
    for dense, slim in zip(report.latency_before, report.latency_after, strict=True):
        change = percent(dense.median_ms, slim.median_ms)
        table.add_row(clocked(dense.batch, dense.variant), _time(dense), _time(slim), change)
    if report.monitor is not None:
        table.add_section()
        for label, first, second in (
            ("dense -> finetuned", "dense", "finetuned"),
            ("before -> after surgery", "before", "after"),
        ):
            values = report.accuracy[first], report.accuracy[second]
            table.add_row(f"{report.monitor}, {label}", *map(metric, values), difference(*values))
    return table


def _caption(report: PruningReport) -> str:
    lines = [f"MACs: multiply-adds, counted by fvcore{uncounted(report.cost_after.uncounted)}."]
    if report.latency_after:
        latency = report.latency_after[0]
        lines.append(f"Latency: median (interquartile range) on {latency.device}, {latency.threads} thread(s).")
    lines += filter(None, [advice((each.batch, each.variant) for each in report.fastest)])
    lines += [f"B{str(outcome)[1:]}." for outcome in report.budgets]
    lines += [f"{report.distilled}."] if report.distilled is not None else []
    lines += [f"Widths are multiples of {report.round_to}."] if report.round_to > 1 else []
    if report.unit == "channels":
        lines.append(f"Slim network against masked network: {report.error:.1e} of the largest output.")
    else:
        lines.append("Masked weights are zero; dense kernels compute them all the same, sparse ones would gain time.")
    if report.renormalised:
        names = ", ".join(report.renormalised)
        lines.append(f"Statistics over fewer channels than before: {names}.")
    lines += [f"Exported: {each}." for each in report.exports]
    return "\n".join([*lines, *report.warnings])


def _time(latency: Latency) -> str:
    return milliseconds(latency.median_ms, latency.iqr_ms)
