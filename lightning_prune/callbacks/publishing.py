"""Where a report goes: once to the terminal, and to a file in the run's directory whenever it changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console

from lightning_prune.reports.files import free_path, write_report
from lightning_prune.reports.report import PruningReport
from lightning_prune.reports.tables import surgery_table
from lightning_prune.reports.wording import first_line


class Publisher:
    """Prints and writes reports on rank 0; nothing that goes wrong here stops a training.

    A file that no run of ours has written stays as it is; the report takes the next free name then.

    Args:
        file: name of the report in the run's directory; the same as a page stands beside it under ``.html``. ``None``
            writes neither.
    """

    def __init__(self, file: str | None) -> None:
        self._file = file
        self._chosen: dict[Path, Path] = {}
        self._told = set[str]()
        self.path: Path | None = None

    def show(self, report: PruningReport) -> None:
        """Print the table."""
        self._carefully("The pruning report can't be printed", lambda: Console().print(surgery_table(report)))

    def write(self, trainer: Trainer, report: PruningReport | None) -> None:
        """Write the files, if there is something to write. Every rank has to call it."""
        folder = trainer.log_dir or trainer.default_root_dir  # asks all ranks
        if report is None or self._file is None or not trainer.is_global_zero:
            return
        wanted = Path(folder) / self._file
        self._carefully(f"The pruning report can't be written to {wanted}", lambda: self._write(wanted, report))

    def _write(self, wanted: Path, report: PruningReport) -> None:
        path = self._chosen.get(wanted)
        if path is None:
            path = self._chosen[wanted] = free_path(wanted)
            if path != wanted:
                rank_zero_warn(
                    f"The pruning report goes to {path}: a file of the usual name is none of ours, and stays."
                )
        write_report(report, path)
        self.path = path

    def _carefully(self, what: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # a full disk, a terminal without these letters, a page that can't be drawn
            if what not in self._told:
                said = str(error) if isinstance(error, OSError) else first_line(error)
                rank_zero_warn(f"{what}: {said}; training goes on, and StructuralPruning.report keeps it.")
            self._told.add(what)
