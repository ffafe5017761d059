"""Sections of the generated pages: what is measured, by which command, and a function from JSON to Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Section:
    """A heading of ``docs/benchmarks.md`` and what stands below.

    Args:
        title: the heading.
        about: what is measured, and what the columns mean.
        command: repeats it.
        files: pattern of the results, below ``benchmarks/results``.
        body: the results in the order of their names to lines of Markdown; not asked without any.
        level: of the heading.
        options: of the command, as the results know them; asked without any, too.
        remark: behind the command.
    """

    title: str
    about: str
    command: str
    files: str
    body: Callable[[list[Any]], list[str]]
    level: int = 2
    options: Callable[[list[Any]], str] = field(default=lambda found: "")
    remark: str = ""

    def lines(self, results: Path = RESULTS) -> list[str]:
        """The section, with the results that there are."""
        found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob(self.files))]
        measured = self.body(found) if found else ["Not measured yet."]
        command = self.command + self.options(found) + (f"    # {self.remark}" if self.remark else "")
        head = ["#" * self.level + f" {self.title}", "", self.about, "", "```", command, "```", ""]
        return [*head, *measured, ""]
