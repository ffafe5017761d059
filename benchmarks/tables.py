"""Write ``docs/coverage.md`` and ``docs/benchmarks.md`` from the results in ``benchmarks/results``.

python -m benchmarks.tables
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.pages import (
    RESULTS,
    ROOT,
    Section,
    ablations,
    accuracy,
    coverage,
    overhead,
    scaling,
    speed,
    trainability,
)

PARTS: tuple[Section | str, ...] = (
    overhead.SECTION,
    speed.SECTION,
    accuracy.ABOUT,
    *accuracy.SECTIONS,
    trainability.SECTION,
    scaling.SECTION,
    ablations.SECTION,
)
"""Of ``docs/benchmarks.md``, in their order; each section says by itself whether it has been measured."""

HEAD = """# Benchmarks

Made by `python -m benchmarks.tables` from the JSON files in `benchmarks/results`: tables and verdicts are generated,
remarks between them are written, and a test makes the page again. Each section has its command, and the device and
versions that it ran on. Ties and losses are printed as they are. Targets, and what is demanded, are this project's own.

Overhead, accuracy and coverage go on from the results that are there, and pass over what these have. To measure anew,
call overhead with `--again`, accuracy without `--results` or with a folder of your own there, and coverage with a file
of your own as `--out`.
"""


def benchmarks(results: Path = RESULTS) -> str:
    """The page of costs and accuracies."""
    parts = (part if isinstance(part, str) else "\n".join(part.lines(results)) for part in PARTS)
    return "\n".join([HEAD, *parts])


def main() -> None:
    """Write the pages."""
    for name, page in {"coverage": coverage.page, "benchmarks": benchmarks}.items():
        (ROOT / "docs" / f"{name}.md").write_text(page(RESULTS), encoding="utf-8")


if __name__ == "__main__":
    main()
