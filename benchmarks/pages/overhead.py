"""What a method adds to a training step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.markdown import code, counted, listed, on, quartiles, table
from benchmarks.pages import Section

ABOUT = """What a method adds to a training step, beside a plain restatement of how the papers' code does it (Python
loops over layers, clusters and pruned filters that add to the gradients). Dense steps, the method's and the
restatement's take turns in one run. *Whole step*: its time over that of the dense steps around it, median and quartiles
over the turns. *Own time*: 1 plus the time inside the callback's hooks and in the penalty's backward pass, over the
dense step, on a processor in its own seconds; what else the machine does hardly touches it. Where a method works at an
epoch's end (ASCP), its row holds that too, spread over the steps of an epoch of the data set. TPP's row has the
published constants, which decorrelate at every step; with `epochs=N` it does so more rarely where that would add more
than a hundredth to training's multiply-adds."""
COMMAND = "python benchmarks/overhead.py --network resnet56 --minutes 30    # resnet50, vgg19; call it again to go on"
HEADERS = ("method", "target", "whole step", "own time", "loops: whole step", "loops: own time", "dense step, ms")


def body(found: Sequence[Any]) -> list[str]:
    """A table per network and device."""
    rows: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in found[0]["rows"]:
        rows.setdefault((row["network"], row["batch"], row["device"], row["threads"]), []).append(row)
    text: list[str] = []
    for (network, batch, device, threads), own in rows.items():
        about = on({"device": device, **own[0]["versions"]}, counted(threads))
        text += [f"### {network}, batch {batch}, {device}", "", about, "", *table(HEADERS, map(_cells, own)), ""]
        text += [verdict(own, key, name) for key, name in (("ours", "whole step"), ("own", "own time"))]
        text += [*lazily(own), ""]
    return text[:-1]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    ours, loops = (f"{quartiles(amortised(row, key))}" for key in ("ours", "loops"))
    own, theirs = (quartiles(amortised(row, key), ".4f") if key in row else "" for key in ("own", "own_loops"))
    return code(row["method"]), f"{row['target']:.2f}", ours, own, loops, theirs, f"{row['dense_ms']:.1f}"


def amortised(row: dict[str, Any], key: str) -> list[float]:
    """Quartiles, with what happens at an epoch's end where that is the library's."""
    more = 0.0 if key.endswith("loops") else row.get("epoch_end", 0.0)
    return [value + more for value in row[key]]


def verdict(rows: Sequence[dict[str, Any]], key: str, name: str) -> str:
    """Who is within the target, and who is not."""
    known = [row for row in rows if key in row]
    if not known:
        return f"- The {name} has not been measured."
    met = [row["method"] for row in known if amortised(row, key)[1] <= row["target"]]
    missed = [row["method"] for row in known if row["method"] not in met]
    return f"- By the {name}, at or below the target: {listed(map(code, met))}; above: {listed(map(code, missed))}."


def lazily(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What TPP adds where its decorrelation takes part in some steps only, by its rows with it and without."""
    known = {row["method"]: row["own"][1] for row in rows if "own" in row}
    if not {"TPP", "TPP, gram=0"} <= known.keys():
        return []
    rest = known["TPP, gram=0"]
    means = {every: rest + (known["TPP"] - rest) / every for every in (2, 4, 8, 16)}
    shown = ", ".join(f"{mean:.3f} with {code(f'gram_every={every}')}" for every, mean in means.items())
    return [f"- TPP by its rows with and without the decorrelation, own time, mean over the steps: {shown}."]


SECTION = Section("Overhead of a training step", ABOUT, COMMAND, "overhead.json", body)
