"""Plots draw what the report says, into the axes they are given."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from lightning_prune.errors import ConfigurationError
from lightning_prune.reports import plots
from tests.reports.test_html import BARE, REPORT


def test_every_plot_draws_and_can_be_saved(tmp_path: Path) -> None:
    drawn = [plots.widths(REPORT), plots.accuracy(REPORT), plots.latency(REPORT)]
    drawn += [plots.curves(REPORT.history, quantity) for quantity in plots.QUANTITIES]  # type: ignore[arg-type]
    for number, axes in enumerate(drawn):
        axes.figure.savefig(tmp_path / f"{number}.png")
    assert [patch.get_width() for patch in drawn[0].patches] == [64, 10, 32, 1]
    assert list(drawn[1].get_lines()[0].get_ydata()) == [each.value for each in REPORT.validations]
    assert [patch.get_height() for patch in drawn[2].patches] == [1.5, 2.0]
    assert list(drawn[3].get_lines()[0].get_ydata()) == [moment.energy for moment in REPORT.history]


def test_they_take_the_axes_that_are_given() -> None:
    given = Figure().subplots()
    assert plots.widths(REPORT, given) is plots.latency(REPORT, given) is plots.accuracy(REPORT, given) is given
    assert plots.curves(REPORT.history, axes=given) is given


def test_a_bare_report_is_drawn_too() -> None:
    assert not plots.widths(BARE).patches and not plots.latency(BARE).patches and not plots.curves(()).get_lines()


def test_faults_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="quantity='loss' must be one of energy"):
        plots.curves(REPORT.history, "loss")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigurationError, match="pip install"):
        plots.latency(REPORT)


def test_reports_load_without_matplotlib() -> None:
    code = "import sys, lightning_prune.reports.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
