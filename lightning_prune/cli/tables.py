"""What the command line shows to people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_prune.cli.preview import Preview, Stage, round_to_of
from lightning_prune.errors import ConfigurationError
from lightning_prune.reports import PruningReport, surgery_table
from lightning_prune.reports.latency import fastest
from lightning_prune.reports.wording import advice, clocked, count, percent
from lightning_prune.structure import Plan, SparsityPlan

_NAMED = 2


def show(console: Console, preview: Preview) -> None:
    """Groups, what is pinned and why, costs and latency, stages."""
    console.print(_groups(preview))
    for reason, layers in _by_reason(preview.pinned):
        console.print(f"pinned: {escape(_few(layers, 4))}. {escape(reason)}", highlight=False)
    console.print()
    console.print(_costs(preview))
    _show_multiple(console, preview.plan)
    best = advice((each.batch, each.variant) for each in fastest(preview.latency_after))
    for sentence in filter(None, (best, *preview.missing)):
        console.print(escape(sentence), highlight=False)
    if preview.stages:
        console.print()
        console.print(_stages(preview.stages))
    if preview.dense_ms is not None and preview.sparse_ms is not None:
        ratio = preview.sparse_ms / preview.dense_ms
        sentence = (
            f"A training batch takes {preview.dense_ms:.3g} ms before the sparse stage, {preview.sparse_ms:.3g} in it"
            f" ({ratio:.2f}x; the fastest of a few each, on this machine)."
        )
        console.print(sentence, highlight=False)


def show_file(console: Console, path: str, plan: Plan, header: Mapping[str, Any]) -> None:
    """Widths, and the metadata of a slim file; a report in it as its table."""
    unit = "weights" if isinstance(plan, SparsityPlan) else "channels"
    table = Table(title=escape(path), title_justify="left")
    table.add_column(unit, overflow="fold")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer, (before, after) in counts(plan).items():
        table.add_row(escape(layer), str(before), str(after), percent(before, after))
    console.print(table)
    _show_multiple(console, plan)
    console.print(f"For a dense model with signature {plan.signature}.", highlight=False)
    for name, value in dict(header.get("metadata", {})).items():
        report = _report(value)
        if report is not None:
            console.print(surgery_table(report))
        else:
            console.print(f"{escape(name)}: {escape(str(value))}", highlight=False)
    if "versions" in header:
        versions = ", ".join(f"{name} {version}" for name, version in sorted(header["versions"].items()))
        console.print(f"Written with {escape(versions)}.", highlight=False)


def _show_multiple(console: Console, plan: Plan) -> None:
    if round_to_of(plan) > 1:
        console.print(f"Widths are multiples of {round_to_of(plan)}.", highlight=False)


def counts(plan: Plan) -> dict[str, tuple[int, int]]:
    """Layer -> channels or weights before and after."""
    return plan.weights() if isinstance(plan, SparsityPlan) else plan.widths()


def _groups(preview: Preview) -> Table:
    table = Table(title="What would go, by the weights as they are", title_justify="left")
    for name in ("group", "tied to", "read by"):
        table.add_column(name, overflow="fold")
    for name in ("now", "then", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in preview.rows:
        names = (escape(row.name), escape(_few(row.tied)), escape(_few(row.readers)))
        table.add_row(*names, str(row.before), str(row.after), percent(row.before, row.after))
    return table


def _costs(preview: Preview) -> Table:
    before, after, least = preview.cost_before, preview.cost_after, preview.cost_least
    table = Table()
    for name in ("", "now", "then", "change", "least"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for label, each in (("MACs per sample", "macs"), ("parameters", "parameters")):
        now, then = getattr(before, each), getattr(after, each)
        table.add_row(label, count(now), count(then), percent(now, then), count(getattr(least, each, None)))
    for dense, slim in zip(preview.latency_before, preview.latency_after, strict=True):
        change = percent(dense.median_ms, slim.median_ms)
        row = clocked(dense.batch, dense.variant)
        table.add_row(row, f"{dense.median_ms:.3g}", f"{slim.median_ms:.3g}", change)
    if least is not None:
        table.caption = "least: with one channel left of every group that takes part"
        table.caption_justify = "left"
    return table


def _stages(stages: Iterable[Stage]) -> Table:
    table = Table(title="Stages", title_justify="left")
    for name in ("method", "stage"):
        table.add_column(name)
    for name in ("epochs", "steps"):
        table.add_column(name, justify="right")
    for stage in stages:
        end = None if stage.epochs is None else stage.start + stage.epochs
        per_epoch = stage.steps_per_epoch
        if end is None and stage.steps is not None and per_epoch:
            end = stage.start + -(-stage.steps // per_epoch)
        sparse = f"{stage.start} to {'?' if end is None else end - 1}"
        table.add_row(
            stage.method, "dense", f"0 to {stage.start - 1}" if stage.start else "none", _or(stage.dense_steps)
        )
        known = "" if stage.known_after in (None, 1) else f" (channels known after {stage.known_after})"
        table.add_row("", f"sparse{known}", sparse, _or(stage.steps))
        table.add_row("", "finetune", f"{'?' if end is None else end} to the end", _or(stage.finetune_steps))
    return table


def _or(number: int | None) -> str:
    return "?" if number is None else str(number)


def _few(names: Iterable[str], most: int = _NAMED) -> str:
    found = list(names)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more


def _by_reason(pinned: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    ordered = sorted(pinned.items(), key=lambda each: each[1])
    return [(reason, [layer for layer, _ in each]) for reason, each in groupby(ordered, key=lambda each: each[1])]


def _report(value: Any) -> PruningReport | None:
    if not isinstance(value, dict) or "cost_before" not in value:
        return None
    try:
        return PruningReport.from_json(json.dumps(value))
    except (ConfigurationError, KeyError, TypeError):
        return None
