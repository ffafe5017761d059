"""Reports on disk: the data and the page beside it, which belong together and never replace anybody else's file."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import count
from pathlib import Path

from lightning_prune.errors import ConfigurationError
from lightning_prune.reports.exported import Export
from lightning_prune.reports.html import BRAND, write_html
from lightning_prune.reports.report import PruningReport


def read_report(path: str | os.PathLike[str]) -> PruningReport:
    """The report in a file that a run has written.

    Raises:
        ConfigurationError: there is none, or it is of another format.
    """
    name = os.fspath(path)
    try:
        return PruningReport.from_json(Path(path).read_text(encoding="utf-8"))
    except ConfigurationError:
        raise
    except OSError as error:
        raise ConfigurationError(f"The report {name} can't be read: {error.strerror}.") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigurationError(f"{name} is no pruning report; give the report.json of a run.") from error


def write_report(report: PruningReport, path: str | os.PathLike[str]) -> None:
    """Write the data under this name, and the page beside it under ``.html``."""
    report.write(path)
    write_html(report, page_of(path))


def add_export(path: str | os.PathLike[str], exported: Export) -> None:
    """Name an exported file in a report and on its page; one of the same name and format is replaced.

    Raises:
        ConfigurationError: there is no report of that name.
    """
    report = read_report(path)
    others = [each for each in report.exports if (each.file, each.format) != (exported.file, exported.format)]
    write_report(replace(report, exports=(*others, exported)), path)


def page_of(path: str | os.PathLike[str]) -> Path:
    """Where a report's page is.

    >>> page_of("runs/report.json").name
    'report.html'
    """
    return Path(path).with_suffix(".html")


def free_path(path: Path) -> Path:
    """The path itself, unless there is a file of that name, or of its page's; else one with a version, ``report-v1``.

    >>> free_path(Path("/nowhere/report.json")).name
    'report.json'
    """
    names = (path if not number else path.with_stem(f"{path.stem}-v{number}") for number in count())
    return next(name for name in names if not any(map(os.path.lexists, (name, page_of(name)))))


def is_replaceable(path: Path) -> bool:
    """Whether a report may be written there: what is there, and its page, are a run's own.

    >>> is_replaceable(Path("/nowhere/report.json"))
    True
    """
    return _is_ours(path) and _is_ours(page_of(path))


def _is_ours(path: Path) -> bool:
    """Whether nothing but a report is lost if the file is written."""
    if not os.path.lexists(path):
        return True
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return BRAND in text or ('"cost_before"' in text and '"units"' in text)
