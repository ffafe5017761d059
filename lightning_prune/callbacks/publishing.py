"""Where a report goes: once to the terminal, and to a file in the run's directory whenever it changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console

from lightning_prune.door import check, text
from lightning_prune.reports.files import free_path, is_replaceable, write_report
from lightning_prune.reports.report import PruningReport
from lightning_prune.reports.tables import surgery_table
from lightning_prune.reports.wording import first_line


class Publisher:
    """Prints and writes reports on rank 0; nothing that goes wrong here stops a training.

    Files that were there before the run stay as they are; the report takes the next free name then, as
    ``ModelCheckpoint`` does. A resumed run goes on with its own.

    Args:
        file: name of the report in the run's directory; the same as a page stands beside it under ``.html``. ``None``
            writes neither.

    Raises:
        ConfigurationError: the name is none of a data file.
    """

    def __init__(self, file: str | None) -> None:
        text("report_file", file)
        is_data = file is None or (Path(file).name and Path(file).suffix.lower() not in (".html", ".htm"))
        check(bool(is_data), f"report_file={file!r} names the data, such as report.json; a page comes too.")
        self._file = file
        self._chosen: dict[Path, Path] = {}
        self._told = set[str]()
        self._own: str | None = None
        self.path: Path | None = None

    @property
    def name(self) -> str | None:
        """Of the report's file, for a checkpoint; ``None`` before it is settled, and on other ranks than 0."""
        return next(reversed(self._chosen.values())).name if self._chosen else self._own

    def resume(self, name: str | None) -> None:
        """Go on with the file that this run had settled on before."""
        self._own = name

    def show(self, report: PruningReport) -> None:
        """Print the table."""
        self._carefully("The pruning report can't be printed", lambda: Console().print(surgery_table(report)))

    def settle(self, trainer: Trainer) -> None:
        """Choose the name before anything is written, so that every checkpoint knows it. Every rank has to call it."""
        wanted = self._wanted(trainer)
        if wanted is not None:
            self._carefully(f"The pruning report can't be written to {wanted}", lambda: self._settled(wanted))

    def write(self, trainer: Trainer, report: PruningReport | None) -> None:
        """Write the files, if there is something to write. Every rank has to call it."""
        wanted = self._wanted(trainer)
        if report is not None and wanted is not None:
            self._carefully(f"The pruning report can't be written to {wanted}", lambda: self._write(wanted, report))

    def _wanted(self, trainer: Trainer) -> Path | None:
        folder = trainer.log_dir or trainer.default_root_dir  # asks all ranks
        return None if self._file is None or not trainer.is_global_zero else Path(folder) / self._file

    def _write(self, wanted: Path, report: PruningReport) -> None:
        path = self._settled(wanted)
        write_report(report, path)
        self.path = path

    def _settled(self, wanted: Path) -> Path:
        if wanted not in self._chosen:
            own = None if self._own is None else wanted.with_name(self._own)
            path = own if own is not None and is_replaceable(own) else free_path(wanted)
            self._chosen[wanted] = path
            if path != wanted and path != own:
                tell = rank_zero_info if is_replaceable(wanted) else rank_zero_warn
                tell(f"The pruning report goes to {path}: there is a file of the usual name, and it stays.")
        return self._chosen[wanted]

    def _carefully(self, what: str, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:  # a full disk, a terminal without these letters, a page that can't be drawn
            if what not in self._told:
                said = str(error) if isinstance(error, OSError) else first_line(error)
                rank_zero_warn(f"{what}: {said}; training goes on, and StructuralPruning.report keeps it.")
            self._told.add(what)
