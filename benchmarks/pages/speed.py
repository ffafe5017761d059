"""How much of the speed-up on paper is one by the clock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.markdown import counted, on, table
from benchmarks.pages import Section

ABOUT = """The network that stands above a table at half of its multiply-adds, widths in multiples of 8 and any widths,
beside the one that Torch-Pruning leaves at equal multiply-adds. Forward passes take turns; medians. *Efficiency* is the
speed-up by the clock over that on paper; 90 % of the first slim network is this project's own target."""
COMMAND = "python benchmarks/speed.py"
OUT = "--out benchmarks/results/speed.json"
OLDER = {"network": "resnet50", "batch": 8, "side": 224}
"""What files were measured with that do not say it: the command's defaults."""
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
        network, batch, side = ({**OLDER, **whole}[key] for key in OLDER)
        text += [f"{network}, batch {batch}, pictures of {side} x {side}, `python {whole['command']}`: {about}", ""]
        text += [*table(HEADERS, rows), ""]
    return text[:-1]


def options(found: Sequence[Any]) -> str:
    """Of the first file."""
    return " " + (found[0]["command"].partition(" ")[2] if found else OUT)


SECTION = Section("Speed-up by the clock", ABOUT, COMMAND, "speed*.json", body, options=options)
