"""``docs/coverage.md``: which networks the engine cuts, how fast, with how much memory."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.markdown import line, number, on, table
from benchmarks.pages import RESULTS

TOLERANCE = 1e-9
OURS, THEIRS = "lightning_prune", "torch_pruning"
COLUMNS = ("exact", "groups", "layers", "left", "seconds")
LIMIT = 60
LATE = f"more than {LIMIT} s"
MADE = "Made by `python -m benchmarks.tables`: tables and verdicts are generated, remarks between them are written."


def exact(row: dict[str, Any]) -> str:
    """The judge's verdict in a few words."""
    if "late" in row:
        return f"no end within {LIMIT} s" if row["late"] == "engine" else "not judged in time"
    if "crash" in row:
        return f"fails: {row['crash'].partition(':')[0]}"
    if "wrong" in row:
        words = row["wrong"].partition(":")[2 if not row["wrong"].startswith("does not run") else 0] or row["wrong"]
        return "does not run" if row["wrong"].startswith("does not run") else f"wrong:{words}".strip()[:60]
    if "judged" not in row:
        return "not judged"
    if row["left"] == 1:
        return "nothing goes"
    return "yes" if row["error"] <= TOLERANCE else f"wrong by {row['error']:.0e}"


def cells(row: dict[str, Any] | None) -> list[str]:
    """What one engine made of a network, by columns."""
    if row is None:
        return [""] * len(COLUMNS)
    formats = {"groups": "d", "layers": ".0%", "left": ".3f", "seconds": ".2f"}
    return [exact(row), *(number(row, key, how) for key, how in formats.items())]


def coverage(results: Path) -> list[str]:
    """The zoo."""
    whole = json.loads((results / "coverage.json").read_text())
    rows = {(row["engine"], row["model"]): row for row in whole["rows"]}
    names = list(dict.fromkeys(row["model"] for row in whole["rows"]))
    text = [
        "## The zoo",
        "",
        "`python -m benchmarks.coverage`: every network and engine in a process of its own, one thread, at "
        "most 60 s of the processor; "
        "ratio 0.5, residual streams included. Networks that the file of results has are not repeated; `--out FILE` "
        "writes one of its own. *Exact*: the judge of the tests finds the slim network equal to the "
        "masked dense one. *Layers*: share of the convolutions and linear layers that shrink. *Left*: share of the "
        "parameters. *Seconds*: of the processor for trace, choice and surgery. TP: Torch-Pruning.",
        "",
        on(whole["machine"]),
        "",
        *summary(rows, names),
        "",
        line(("network", *COLUMNS, *(f"TP: {column}" for column in COLUMNS))),
        line(("---", *2 * ("---", "---:", "---:", "---:", "---:"))),
    ]
    for name in names:
        engines = (rows.get((engine, name)) for engine in (OURS, THEIRS))
        text.append(line((name, *(cell for row in engines for cell in cells(row)))))
    failed = [(name, row) for name in names if (row := rows.get((OURS, name))) and exact(row) != "yes"]
    text += ["", "Networks of which this library's result is not exact and smaller:", ""] if failed else []
    text += [f"- {name}: {exact(row)}. {row.get('wrong', row.get('crash', ''))}".rstrip() for name, row in failed]
    return text


def summary(rows: dict[tuple[str, str], dict[str, Any]], names: Sequence[str]) -> list[str]:
    """How many are exact, and medians."""
    found = []
    for engine in (OURS, THEIRS):
        own = [rows[engine, name] for name in names if (engine, name) in rows]
        good = [row for row in own if exact(row) == "yes"]
        if good:
            medians = (statistics.median(row[key] for row in good) for key in ("left", "seconds"))
            found.append((engine, len(own), len(good), *(f"{value:.3f}" for value in medians)))
    text = table(("engine", "networks", "exact and smaller", "median left", "median seconds"), found)
    both = [
        [rows[engine, name] for engine in (OURS, THEIRS)]
        for name in names
        if all((engine, name) in rows and exact(rows[engine, name]) == "yes" for engine in (OURS, THEIRS))
    ]
    if both:
        left, seconds = (
            [statistics.median(pair[k][key] for pair in both) for k in (0, 1)] for key in ("left", "seconds")
        )
        text += [
            "",
            f"Over the {len(both)} networks that both cut exactly: median left {left[0]:.3f} (Torch-Pruning "
            f"{left[1]:.3f}), median seconds {seconds[0]:.3f} ({seconds[1]:.3f}). Many of the zoo's pictures are of "
            "64 x 64 pixels, and Torch-Pruning runs the network on them, which is cheap there; larger ones are below. "
            "An empty cell has no value, for that engine did not come so far.",
        ]
    probes = {name: rows[OURS, name]["probe"] for name in names if "probe" in rows.get((OURS, name), {})}
    if probes:
        longest = max(probes, key=lambda name: probes[name])
        took = f"{probes[longest]:.2f} s of the processor ({longest})"
        text += [
            "",
            f"The longest of {len(probes)} probes takes {took}, the median {statistics.median(probes.values()):.3f} s.",
        ]
    return text


def speed(results: Path) -> list[str]:
    """The five, and the zoo's median."""
    whole = json.loads((results / "engine_speed.json").read_text())
    text = [
        "",
        "## Speed and memory",
        "",
        "`python -m benchmarks.engine_speed`: trace, choice and surgery on 1 x 3 x 224 x 224, one thread, processor "
        "seconds, both engines in turn in one process, median of "
        f"{whole['rounds']} rounds. *Probe*: its part of the trace. *Peak*: MB above the network's own; *planned*: "
        "that of trace and choice alone, measured first. The peak of the whole is measured after it in the same "
        "process, above what trace and choice have left allocated there, and so comes out too low, by at most "
        "*planned*: the larger of both numbers is shown. Torch-Pruning's has nothing before it. *Slim*: what the slim "
        "tensors take, which surgery would need if it made them all before it lets a dense one go.",
        "",
        on(whole["machine"]),
        "",
    ]
    found = []
    for row in whole["rows"]:
        mine, other = row[OURS], row.get(THEIRS, {})
        cells = [number(mine, "cpu", ".2f"), other.get("failed", number(other, "cpu", ".2f"))]
        highest = {"peak": max(mine[key] for key in ("peak", "planned") if key in mine)} if "peak" in mine else {}
        cells += [number(row["probe"], "cpu", ".2f"), number(highest, "peak", ".0f"), number(mine, "planned", ".0f")]
        cells.append(number(mine, "slim", ".0f"))
        found.append((row["model"], *cells, number(other, "peak", ".0f")))
    text += table(("network", "seconds", "TP: seconds", "probe", "peak", "planned", "slim", "TP: peak"), found)
    if "wall" in whole.get("surgery", {}):
        text += ["", f"Surgery on ResNet-50 with SGD's momentum, two threads: {whole['surgery']['wall']:.2f} s."]
    zoo = results / "engine_speed_zoo.json"
    return text + (median(json.loads(zoo.read_text())) if zoo.exists() else [])


def median(whole: dict[str, Any]) -> list[str]:
    """How much faster over the zoo: where both engines end, and with Torch-Pruning's limit where it doesn't."""
    rows = whole["rows"]
    mine = [row for row in rows if "cpu" in row.get(OURS, {})]
    times = [row[THEIRS]["cpu"] / row[OURS]["cpu"] for row in mine if "cpu" in row.get(THEIRS, {})]
    late = [LIMIT / row[OURS]["cpu"] for row in mine if row.get(THEIRS, {}).get("failed") == LATE]
    probes = max(row["probe"]["cpu"] for row in rows if "probe" in row)
    return [
        "",
        f"`python -m benchmarks.engine_speed --zoo --rounds {whole['rounds']}`: over the {len(times)} of {len(rows)} "
        f"classifiers that Torch-Pruning gets through, its time is {statistics.median(times):.2f} times this library's "
        f"in the median, and below it for {sum(each < 1 for each in times)}; with the {len(late)} on which it doesn't "
        f"end within {LIMIT} s, taken for {LIMIT} s, {statistics.median(times + late):.2f} times. On the others it "
        f"raises an error. The longest probe takes {probes:.2f} s.",
    ]


def page(results: Path = RESULTS) -> str:
    """The whole page."""
    head = ["# Coverage and speed of the engine", "", MADE, ""]
    text = head + coverage(results) + (speed(results) if (results / "engine_speed.json").exists() else [])
    return "\n".join(text) + "\n"
