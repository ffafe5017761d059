"""The report as data and as a table."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from lightning_prune.errors import ConfigurationError
from lightning_prune.reports import Cost, Latency, PruningReport, surgery_table

LATENCY = Latency(2.0, 0.125, batch=1, device="cpu of a test", threads=3, repeats=40)
REPORT = PruningReport(
    [("net.conv1", 64, 32), ("net.conv2", 10, 1)],
    Cost(4_112_000_000, 25_557_032, ("aten::add_",)),
    Cost(2_056_000_000, 12_000_000, tuple(f"aten::op{number}" for number in range(8))),
    [LATENCY],
    [replace(LATENCY, median_ms=1.5)],
    monitor="val_acc",
    accuracy={"dense": 0.98, "before": 0.97, "after": 0.965},
    error=2.5e-16,
    tolerance=1e-8,
    renormalised=["net.norm"],
    warnings=["Something to know."],
)


def drawn(report: PruningReport, width: int = 80) -> str:
    stream = io.StringIO()
    Console(width=width, color_system=None, file=stream).print(surgery_table(report))
    return stream.getvalue()


def test_json_there_and_back() -> None:
    assert PruningReport.from_json(REPORT.to_json()) == REPORT
    values = json.loads(REPORT.to_json())
    assert list(values) == sorted(values)
    assert values["accuracy"] == {"dense": 0.98, "before": 0.97, "after": 0.965, "finetuned": None}
    assert "multiply-adds per sample" in values["units"]["macs"]
    assert values["versions"]["torch"]


def test_what_is_not_a_number_is_unknown() -> None:
    report = replace(REPORT, accuracy={"dense": math.nan, "after": math.inf})
    assert set(report.accuracy.values()) == {None}
    assert PruningReport.from_json(report.to_json()) == report


def test_faults_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="'final'"):
        replace(REPORT, accuracy={"final": 1.0})
    with pytest.raises(ConfigurationError, match=r"batches \[1\] before and \[\] after"):
        replace(REPORT, latency_after=[])
    with pytest.raises(ConfigurationError, match=r"variants \['eager'\] before and \['compiled'\] after"):
        replace(REPORT, latency_after=[replace(LATENCY, variant="compiled")])
    with pytest.raises(ConfigurationError, match="format 99"):
        PruningReport.from_json(REPORT.to_json().replace('"format": 1', '"format": 99'))


def test_writing_replaces_the_file_and_leaves_no_other(tmp_path: Path) -> None:
    target = tmp_path / "new" / "report.json"
    REPORT.write(target)
    replace(REPORT, warnings=()).write(target)
    assert PruningReport.from_json(target.read_text()).warnings == ()
    assert [path.name for path in target.parent.iterdir()] == ["report.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    REPORT.write(target)
    with pytest.raises(TypeError):
        replace(REPORT, warnings=[object()]).write(target)  # type: ignore[list-item]
    assert PruningReport.from_json(target.read_text()) == REPORT
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_the_table_says_it_all_in_eighty_columns() -> None:
    text = drawn(REPORT)
    assert max(map(len, text.splitlines())) <= 80
    cells = [[cell.strip() for cell in line.split("│")[1:5]] for line in text.splitlines() if "│" in line]
    assert {name: rest for name, *rest in cells} == {
        "net.conv1": ["64", "32", "-50.0 %"],
        "net.conv2": ["10", "1", "-90.0 %"],
        "MACs per sample": ["4.112 G", "2.056 G", "-50.0 %"],
        "parameters": ["25.56 M", "12 M", "-53.0 %"],
        "latency, batch 1, ms": ["2 (0.12)", "1.5 (0.12)", "-25.0 %"],
        "val_acc, dense -> finetuned": ["0.9800", "?", ""],
        "val_acc, before -> after surgery": ["0.9700", "0.9650", "-0.0050"],
    }
    prose = " ".join(text.split())
    for sentence in (
        "counted by fvcore without op0, op1, op2, op3, op4, op5 and 2 more.",
        "median (interquartile range) on cpu of a test, 3 thread(s).",
        "2.5e-16 of the largest output.",
        "Statistics over fewer channels than before: net.norm.",
        "Something to know.",
    ):
        assert sentence in prose


def test_a_bare_report_has_a_table_too() -> None:
    text = drawn(PruningReport([], Cost(0, 0), Cost(0, 0)))
    assert "MACs per sample" in text
    assert "latency" not in text.lower()
