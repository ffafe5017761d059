"""A report as one page: no server, no other file, no JavaScript; for phones and desks, light and dark."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from lightning_prune.reports.charts import Series, bar, epochs, line_chart, linear, logarithmic
from lightning_prune.reports.report import PruningReport, write_text
from lightning_prune.reports.wording import (
    advice,
    count,
    difference,
    metric,
    milliseconds,
    percent,
    size,
    times,
    uncounted,
)

_STAGES = {
    "dense": "dense",
    "before": "just before surgery",
    "after": "right after surgery",
    "finetuned": "finetuned",
}
BRAND = '<p class="brand">lightning_prune</p>'
"""By this a page is known to be ours."""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def report_html(report: PruningReport) -> str:
    """The page; every name in it is escaped, and it loads nothing.

    >>> from lightning_prune.reports.cost import Cost
    >>> page = report_html(PruningReport([("<script>", 16, 8)], Cost(800, 100), Cost(200, 30), versions={}))
    >>> "<script>" in page, "&lt;script&gt;" in page
    (False, True)
    """
    unit = report.unit
    parts = [
        _heading(report),
        _warnings(report),
        _section("Accuracy", _accuracy(report)),
        _section("Cost", _cost(report)),
        _section("Latency", _latency(report)),
        _section(f"{unit.capitalize()} per layer", _layers(report)),
        _section("The sparse stage", _history(report)),
        _section("Proof", _proof(report)),
        _section("Exported files", _exports(report)),
        _section("How it was made", _origin(report)),
    ]
    style = files("lightning_prune.reports").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(_title(report))}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, parts))
        + "\n</main>\n</body>\n</html>\n"
    )


def write_html(report: PruningReport, path: str | os.PathLike[str]) -> None:
    """Write the page; a reader sees the old file or the new one, never a part."""
    write_text(path, report_html(report))


# The parts, each empty where nothing is known.


def _title(report: PruningReport) -> str:
    return "From dense to slim" if report.unit == "channels" else "From dense to sparse"


def _heading(report: PruningReport) -> str:
    tiles = [
        ("MACs per sample", count(report.cost_before.macs), count(report.cost_after.macs)),
        ("parameters", count(report.cost_before.parameters), count(report.cost_after.parameters)),
        ("weights in a file", size(report.bytes_before), size(report.bytes_after)),
    ]
    changes = [
        percent(report.cost_before.macs, report.cost_after.macs),
        percent(report.cost_before.parameters, report.cost_after.parameters),
        percent(report.bytes_before, report.bytes_after),
    ]
    if report.monitor is not None:
        values = report.accuracy["dense"], report.accuracy["finetuned"]
        tiles.append((report.monitor, metric(values[0]), metric(values[1])))
        changes.append(difference(*values))
    cards = "".join(
        f'<div class="tile"><h2>{escape(name)}</h2><p class="big">{escape(after)}</p>'
        f'<p class="from">from {escape(before)} <b>{escape(change)}</b></p></div>'
        for (name, before, after), change in zip(tiles, changes, strict=True)
    )
    head = f"<header>{BRAND}<h1>{_title(report)}</h1></header>"
    return f'{head}<div class="tiles">{cards}</div>'


def _warnings(report: PruningReport) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in report.warnings)
    return f'<aside class="warnings"><ul>{items}</ul></aside>' if items else ""


def _accuracy(report: PruningReport) -> str:
    if report.monitor is None:
        return '<p class="none">No metric was named: StructuralPruning(monitor=...) fills this part.</p>'
    dense = report.accuracy["dense"]
    steps = "".join(
        f'<li><span class="stage">{words}</span><span class="value">{metric(report.accuracy[stage])}</span>'
        f'<span class="change">{"" if stage == "dense" else difference(dense, report.accuracy[stage])}</span></li>'
        for stage, words in _STAGES.items()
    )
    name = escape(report.monitor)
    lead = f"<p>{name} of the validation set; changes are against the dense network.</p>"
    return f'{lead}<ol class="stages">{steps}</ol>{_validations(report)}'


def _validations(report: PruningReport) -> str:
    known = [each for each in report.validations if each.value is not None]
    if len(known) < 2:
        return ""
    points = [
        (float(each.epoch), each.value, f"epoch {each.epoch}, step {each.step}: {metric(each.value)}")
        for each in known
        if each.value is not None
    ]
    surgery = next((float(each.epoch) for each in known if each.slim), None)
    mark = None if surgery is None else (surgery, "surgery")
    x, y = epochs(points[0][0], points[-1][0]), linear([value for _, value, _ in points])
    return line_chart(f"{report.monitor} by epoch", [Series(str(report.monitor), points)], x, y, mark)


def _cost(report: PruningReport) -> str:
    before, after = report.cost_before, report.cost_after
    sizes = report.bytes_before, report.bytes_after
    rows = [
        ("MACs per sample", count(before.macs), count(after.macs), percent(before.macs, after.macs)),
        (
            "parameters",
            count(before.parameters),
            count(after.parameters),
            percent(before.parameters, after.parameters),
        ),
        ("weights in a file", size(sizes[0]), size(sizes[1]), percent(*sizes)),
    ]
    notes = [f"MACs are multiply-adds, counted by fvcore{uncounted(after.uncounted)}."]
    notes += [f"B{str(outcome)[1:]}." for outcome in report.budgets]
    notes += [f"{report.distilled}."] if report.distilled is not None else []
    notes += [f"Widths are multiples of {report.round_to}."] if report.round_to > 1 else []
    return _table(("", "before", "after", "change"), rows) + f'<p class="note">{escape(" ".join(notes))}</p>'


def _latency(report: PruningReport) -> str:
    taken = report.latency_after
    if not taken:
        return ""
    variants = list(dict.fromkeys(each.variant for each in taken))
    tables = [_latency_of(report, variant, len(variants) > 1) for variant in variants]
    note = (
        f"Milliseconds per batch, median (interquartile range), on {taken[0].device}, {taken[0].threads} thread(s);"
        " dense and slim network turn by turn. In theory time falls as the MACs do."
    )
    fastest = advice((each.batch, each.variant) for each in report.fastest)
    lead = f"<p>{escape(fastest)}</p>" if fastest else ""
    return f'{lead}{"".join(tables)}<p class="note">{escape(note)}</p>'


def _latency_of(report: PruningReport, variant: str, is_named: bool) -> str:
    before, after = (
        [each for each in taken if each.variant == variant] for taken in (report.latency_before, report.latency_after)
    )
    speed = [each for each in report.speed if each.variant == variant]
    rows = [
        ("before", *(milliseconds(each.median_ms, each.iqr_ms) for each in before)),
        ("after", *(milliseconds(each.median_ms, each.iqr_ms) for each in after)),
        ("measured speed-up", *(times(each.measured) for each in speed)),
        ("speed-up in theory", *(times(each.theoretical) for each in speed)),
        ("measured of theory", *("?" if each.share is None else f"{100 * each.share:.0f} %" for each in speed)),
    ]
    return _table((variant if is_named else "", *(f"batch {each.batch}" for each in after)), rows)


def _layers(report: PruningReport) -> str:
    largest = max((before for _, before, _ in report.layers), default=1)
    rows = "".join(
        f'<li><span class="name">{escape(name)}</span>{bar(before, after, largest)}'
        f'<span class="widths">{before} to {after} <b>{percent(before, after)}</b></span></li>'
        for name, before, after in report.layers
    )
    return f'<ul class="layers">{rows}</ul>' if rows else '<p class="none">No layer lost any.</p>'


def _history(report: PruningReport) -> str:
    if not report.history:
        return ""
    parts = []
    for name, title, is_log in (
        ("energy", "energy: share of squared weight left in what goes", True),
        ("separation", "separation: size of a weight that stays over that of one that goes", True),
        ("penalty", "penalty, in units of the loss", True),
        ("strength", "strength of the penalty", False),
    ):
        series = [Series(method, _points(report, method, name)) for method in _methods(report)]
        series = [each for each in series if each.points]
        values = [value for each in series for _, value, _ in each.points]
        if values and any(values):
            ends = [moment.epoch for moment in report.history]
            axis = logarithmic(values) if is_log else linear([*values, 0.0])
            parts.append(line_chart(f"{title}, by epoch", series, epochs(min(ends), max(ends)), axis))
    heads = ("method", "epoch", "step", "phase", "strength", "penalty", "energy", "separation")
    rows = [
        (
            *(each.method, str(each.epoch), str(each.step), each.phase),
            *map(_short, (each.strength, each.penalty, each.energy, each.separation)),
        )
        for each in report.history
    ]
    return f'<div class="charts">{"".join(parts)}</div>{_details("The numbers", _table(heads, rows, names=1))}'


def _methods(report: PruningReport) -> list[str]:
    return list(dict.fromkeys(moment.method for moment in report.history))


def _points(report: PruningReport, method: str, quantity: str) -> list[tuple[float, float, str]]:
    own = [(each, getattr(each, quantity)) for each in report.history if each.method == method]
    return [
        (float(each.epoch), value, f"{method}, epoch {each.epoch}, {each.phase}: {_short(value)}")
        for each, value in own
        if value is not None
    ]


def _proof(report: PruningReport) -> str:
    if report.unit == "weights":
        return "<p>Every weight that the mask removes was found to be zero right after surgery.</p>"
    lines = [
        f"<p>Slim network against masked network, on a training batch: the outputs differ by at most"
        f" <b>{report.error:.1e}</b> of the largest one; allowed was {report.tolerance:.1e}.</p>"
    ]
    if report.renormalised:
        names = ", ".join(map(escape, report.renormalised))
        lines.append(f"<p>Statistics that are now taken over fewer channels: {names}.</p>")
    return "".join(lines)


def _exports(report: PruningReport) -> str:
    return "".join(
        f"<p><b>{escape(each.file)}</b>: {escape(each.kind)}, {size(each.size)}, departs by {each.error:.1e} of the"
        f" network's largest output at batch {' and '.join(map(str, each.batches))}; allowed was {each.tolerance:.1e}."
        "</p>"
        for each in report.exports
    )


def _origin(report: PruningReport) -> str:
    parts = []
    if report.commit is not None:
        clean, is_changed = report.commit.rstrip("+"), report.commit.endswith("+")
        changed = ", with changes that are not committed" if is_changed else ""
        parts.append(f"<p>Commit <code>{escape(clean)}</code>{changed}.</p>")
    for name, arguments in report.config.items():
        rows = [(key, _value(value)) for key, value in arguments.items()]
        parts.append(_details(name, _table(("argument", "value"), rows, names=2)))
    if report.versions:
        parts.append(_details("Versions", _table(("package", "version"), list(report.versions.items()), names=2)))
    operators = [(operator,) for operator in report.cost_after.uncounted]
    if operators:
        parts.append(_details("Operators without a rule for MACs", _table(("operator",), operators, names=1)))
    return "".join(parts)


# The elements.


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _details(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _table(heads: Iterable[str], rows: Sequence[Sequence[str]], names: int = 1) -> str:
    """A table that scrolls by itself where it is too wide; all but the first columns are numbers."""
    head = "".join(f'<th scope="col">{escape(each)}</th>' for each in heads)
    body = "".join(
        "<tr>"
        + "".join(f"<td{' class=num' if place >= names else ''}>{escape(cell)}</td>" for place, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    kind = "names" if names > 1 else "numbers"
    table = f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll" tabindex="0">{table}</div>'


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _value(value: Any) -> str:
    if isinstance(value, (Mapping, list, tuple)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
