"""How much of the speed-up on paper is one by the clock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.markdown import counted, on, table
from benchmarks.pages import Section

ABOUT = """A network at half of its multiply-adds, widths in multiples of 8 and any widths, beside the one that
Torch-Pruning leaves at equal multiply-adds. Forward passes take turns; medians. *Efficiency* is the speed-up by the
clock over that on paper; 90 % is demanded of the first slim network."""
COMMAND = "python benchmarks/speed.py --out benchmarks/results/speed.json"
HEADERS = ("network", "G MACs", "ms", "on paper", "by the clock", "efficiency")


def body(found: Sequence[Any]) -> list[str]:
    """A table per file."""
    text: list[str] = []
    for whole in found:
        rows = [
            (
                row["network"],
                f"{row['macs'] / 1e9:.3f}",
                f"{row['ms']:.1f}",
                f"{row['on_paper']:.2f}x",
                f"{row['by_the_clock']:.2f}x",
                f"{row['efficiency']:.0%}",
            )
            for row in whole["rows"]
        ]
        about = on({"device": whole["device"], **whole["versions"]}, counted(whole["threads"]))
        text += [f"`python {whole['command']}`: {about}", "", *table(HEADERS, rows), ""]
    return text[:-1]


SECTION = Section("Speed-up by the clock", ABOUT, COMMAND, "speed*.json", body)
