"""Where a report goes: once to the terminal, and to a file in the run's directory whenever it changes."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console

from lightning_prune.reports.html import write_html
from lightning_prune.reports.report import PruningReport
from lightning_prune.reports.tables import surgery_table


class Publisher:
    """Prints and writes reports on rank 0; a full disk stops no training.

    Args:
        file: name of the report in the run's directory; the same as a page stands beside it under ``.html``. ``None``
            writes neither.
    """

    def __init__(self, file: str | None) -> None:
        self._file = file
        self._has_warned = False

    def show(self, report: PruningReport) -> None:
        """Print the table."""
        Console().print(surgery_table(report))

    def write(self, trainer: Trainer, report: PruningReport | None) -> None:
        """Write the files, if there is something to write. Every rank has to call it."""
        folder = trainer.log_dir or trainer.default_root_dir  # asks all ranks
        if report is None or self._file is None or not trainer.is_global_zero:
            return
        path = Path(folder) / self._file
        try:
            report.write(path)
            write_html(report, path.with_suffix(".html"))
        except OSError as error:
            if not self._has_warned:
                rank_zero_warn(f"The pruning report can't be written to {path}: {error}; training goes on.")
            self._has_warned = True
