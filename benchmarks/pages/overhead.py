"""What a method adds to a training step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.markdown import code, counted, listed, on, quartiles, table
from benchmarks.pages import Section

ABOUT = """What a method adds to a training step, beside a plain restatement: Python loops over layers, clusters and
pruned filters that add to the gradients, as the papers' published code does. Of ASCP there is none; its loops pull at
every step, while the library averages at an epoch's end and, once the clusters are final, gradients in every step: a
row of its own, whose loops average gradients, too. Dense steps, the method's and the restatement's take turns in
one run. *Whole step*: its time over that of the dense steps around it, median and quartiles over the turns. *Own time*:
1 plus the time inside the callback's hooks and in the penalty's backward pass, over the dense step, on a processor in
its own seconds; what else the machine does touches it much less. The targets are this project's own. Where a method
works at an epoch's end (the row ASCP), its row holds that too, spread over the steps of an epoch of the data set. TPP's
row has the published constants, which decorrelate at every step; with `epochs=N` it does so more rarely where that
would add more than a hundredth to training's multiply-adds.

The two sides don't do the same work. The library's rows penalise everything that leaves with a channel, the loops the
weights of convolutions alone (MaskSparsity's: scales of norms). In ResNet-56 the loops take all 55 convolutions of
3 x 3, while the library by default prunes the 27 inner ones, so that there TPP's loops also do twice the products.

What the file of results has is measured anew with `--again`; each table has the whole command."""
COMMAND = "python benchmarks/overhead.py --network resnet56 --minutes 30"
REMARK = "resnet50, vgg19; call it again to go on"
HEADERS = ("method", "target", "whole step", "own time", "loops: whole step", "loops: own time", "dense step, ms")


def body(found: Sequence[Any]) -> list[str]:
    """A table per network and device."""
    rows: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in found[0]["rows"]:
        rows.setdefault((row["network"], row["batch"], row["device"], row["threads"]), []).append(row)
    text: list[str] = []
    for (network, batch, device, threads), own in rows.items():
        about = on({"device": device, **own[0]["versions"]}, counted(threads))
        text += [f"### {network}, batch {batch}, {device}", "", about, "", asked(own), ""]
        text += [*table(HEADERS, map(_cells, own)), ""]
        text += [verdict(own, key, name) for key, name in (("ours", "whole step"), ("own", "own time"))]
        text += [*beside(own), *lazily(own), *over_a_stage(own), ""]
    return text[:-1]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    ours, loops = (f"{quartiles(amortised(row, key))}" for key in ("ours", "loops"))
    own, theirs = (quartiles(amortised(row, key), ".4f") if key in row else "" for key in ("own", "own_loops"))
    return code(row["method"]), f"{row['target']:.2f}", ours, own, loops, theirs, f"{row['dense_ms']:.1f}"


def amortised(row: dict[str, Any], key: str) -> list[float]:
    """Quartiles, with what happens at an epoch's end where that is the library's."""
    more = 0.0 if key.endswith("loops") else row.get("epoch_end", 0.0)
    return [value + more for value in row[key]]


def asked(rows: Sequence[dict[str, Any]]) -> str:
    """The command that repeats a table, and how many turns its rows have."""
    turns = [row["turns"] for row in rows if "turns" in row]
    options = f"--network {rows[0]['network']} --threads {rows[0]['threads']}"
    options += f" --turns {max(turns)}" if turns else ""
    said = " or ".join(map(str, sorted(set(turns)))) or "some"
    return f"`python benchmarks/overhead.py {options} --again`: {said} turns of whole steps."


def verdict(rows: Sequence[dict[str, Any]], key: str, name: str) -> str:
    """Who is within the target, and who is not; of a row whose quartiles are further apart, neither is said."""
    known = [row for row in rows if key in row]
    if not known:
        return f"- The {name} has not been measured."
    clear = [row for row in known if _noise(row, key) < row["target"] - 1]
    met = [row["method"] for row in clear if amortised(row, key)[1] <= row["target"]]
    missed = [row["method"] for row in clear if row["method"] not in met]
    noisy = [row["method"] for row in known if row not in clear]
    said = f"- By the {name}, at or below the target: {listed(map(code, met))}; above: {listed(map(code, missed))}"
    if not noisy:
        return f"{said}."
    return f"{said}; noise larger than what is to be shown, by the quartiles' distance: {listed(map(code, noisy))}."


def _noise(row: dict[str, Any], key: str) -> float:
    """Distance of the quartiles."""
    low, _, high = row[key]
    return float(high - low)


def beside(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Whose own time is above its restatement's."""
    known = [row for row in rows if {"own", "own_loops"} <= row.keys()]
    above = [row["method"] for row in known if amortised(row, "own")[1] > amortised(row, "own_loops")[1]]
    below = [row["method"] for row in known if row["method"] not in above]
    said = f"{listed(map(code, above))}; at or below it: {listed(map(code, below))}"
    return [f"- Own time above the restatement's own time: {said}."] if known else []


def lazily(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What TPP adds where its decorrelation takes part in some steps only, by its rows with it and without."""
    known = {row["method"]: row["own"][1] for row in rows if "own" in row}
    if not {"TPP", "TPP, gram=0"} <= known.keys():
        return []
    rest = known["TPP, gram=0"]
    means = {every: rest + (known["TPP"] - rest) / every for every in (2, 4, 8, 16)}
    shown = ", ".join(f"{mean:.4f} with {code(f'gram_every={every}')}" for every, mean in means.items())
    return [
        "- TPP, own time, mean over the steps, computed from its two measured rows with the decorrelation and without: "
        f"{shown}."
    ]


def over_a_stage(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What ASCP adds to a derived stage, by its rows before and after the clusters are final."""
    known = {row["method"]: amortised(row, "own")[1] for row in rows if "own" in row}
    if not {"ASCP", "ASCP with final clusters"} <= known.keys():
        return []
    mean = 0.75 * known["ASCP"] + 0.25 * known["ASCP with final clusters"]
    return [
        f"- ASCP, own time, mean over a stage whose last quarter has final clusters: {mean:.4f}, computed from both."
    ]


SECTION = Section("Overhead of a training step", ABOUT, COMMAND, "overhead.json", body, remark=REMARK)
