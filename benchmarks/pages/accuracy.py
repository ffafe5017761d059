"""What is left of the accuracy at equal epochs and equal multiply-adds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.markdown import counted, listed, on, spread, table
from benchmarks.pages import Section

Runs = Mapping[str, Sequence[dict[str, Any]]]

BASELINE = "Magnitude"
STAGES = ("dense", "before", "after", "finetuned")
SIDES = ("latency_before", "latency_after")
HEADERS = ("method", "seeds", "dense", "before", "right after", "finetuned", "M MACs", "parameters")
LATENCY = ("ms, batch 1", "ms, batch 64")
PRESETS = {
    "digits": ("scikit-learn's digits, on a processor", "A residual network of 8 layers, 16 to 64 channels wide."),
    "cpu": ("CIFAR-10, on a processor", "A residual network of 8 layers, 16 to 64 channels wide."),
    "resnet56": ("CIFAR-10 and ResNet-56, on a GPU", "The papers' recipe."),
    "resnet110": ("CIFAR-10 and ResNet-110, on a GPU", "The papers' recipe."),
    "vgg19": ("CIFAR-100 and VGG-19, on a GPU", "The papers' recipe."),
}
"""Title and what is trained."""
LEAST = {("resnet56", "2.55"): 93.4, ("resnet56", "3.59"): 92.4, ("resnet56", "11.40"): 89.7}
"""Percent that are demanded, by preset and how many times fewer multiply-adds."""
ABOUT = f"""## Accuracy

Validation accuracy in percent, mean ± standard deviation over the seeds, always of the last epoch. Every method has the
same epochs: dense, sparse, finetuning; {BASELINE} trains on densely instead of a sparse stage. *Dense*: at the end of
the first stage. *Before*: as the sparse stage leaves the network, nothing set to zero. *Right after*: the slim network
before any further step, which is the masked network's accuracy too, for both compute the same. Multiply-adds by fvcore;
milliseconds of a forward pass, dense -> slim: of both in turns after the runs (`--latency`), or else as measured at
surgery.
"""


def section(preset: str) -> Section:
    """What one preset has shown."""
    title, about = PRESETS[preset]
    data = "" if preset == "digits" else " --root DIR"
    command = f"python benchmarks/accuracy.py --preset {preset}{data} --minutes 60"
    command += f" --results benchmarks/results/accuracy/{preset}    # call it again to go on"
    return Section(title, about, command, f"accuracy/{preset}/*.json", _body(preset), level=3)


def _body(preset: str) -> Callable[[Sequence[Any]], list[str]]:
    def body(found: Sequence[Any]) -> list[str]:
        """A table per share of multiply-adds."""
        error = max(run["report"]["error"] for run in found)
        proof = f"Slim and masked networks differ by at most {error:.0e} of the largest output."
        text = [*conditions(found), "", proof, ""]
        for share in sorted({round(run["share"], 4) for run in found}, reverse=True):
            runs: dict[str, list[dict[str, Any]]] = {}
            for run in found:
                if round(run["share"], 4) == share:
                    runs.setdefault(run["method"], []).append(run)
            times = f"{1 / share:.2f}"
            text += [f"#### {100 * (1 - share):.0f} % of the multiply-adds removed ({times}x)", "", *rows(runs), ""]
            text += [f"- {sentence}" for sentence in [*beside(runs), *demanded(preset, times, runs)]] + [""]
        return text[:-1]

    return body


def conditions(found: Sequence[Any]) -> list[str]:
    """Epochs, device and versions; several, where the runs differ."""
    lines = []
    for run in found:
        timed = [run["latency"]] if "latency" in run else [each for side in SIDES for each in run["report"][side]]
        threads = sorted({each["threads"] for each in timed if each.get("threads")})
        epochs = " + ".join(map(str, run["epochs"]))
        small = f"A miniature of {run['few']} images; " if run.get("few") else ""
        precision = run.get("precision", "32-true")
        lines.append(f"{small}{epochs} epochs in {precision}; {on(run['versions'], *map(counted, threads))}")
    return list(dict.fromkeys(lines))


def rows(runs: Runs) -> list[str]:
    """The table."""
    latencies = len(latency(next(iter(runs.values()))[0]))
    cells = []
    for method, own in sorted(runs.items(), key=lambda each: (each[0] != BASELINE, each[0])):
        reports = [run["report"] for run in own]
        accuracy = [spread([100 * report["accuracy"][stage] for report in reports]) for stage in STAGES]
        macs, parameters = (
            statistics.mean(report["cost_after"][key] for report in reports) for key in ("macs", "parameters")
        )
        every = [latency(run) for run in own]
        times = [
            " -> ".join(f"{statistics.median(each[k][side] for each in every):.3g}" for side in (0, 1))
            for k in range(latencies)
        ]
        cells.append((method, len(own), *accuracy, f"{macs / 1e6:.2f}", f"{parameters:,.0f}", *times))
    return table((*HEADERS, *LATENCY[:latencies]), cells)


def latency(run: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Milliseconds of the dense and the slim network at each batch size: measured in turns, or else at surgery."""
    if "latency" in run:
        return [(row["dense_ms"], row["slim_ms"]) for row in run["latency"]["rows"]]
    before, after = (run["report"][side] for side in SIDES)
    return [(dense["median_ms"], slim["median_ms"]) for dense, slim in zip(before, after, strict=True)]


def beside(runs: Runs) -> list[str]:
    """Who ends above the baseline, and who below, over the seeds that both have.

    One standard deviation is the root mean square of both methods' over the seeds.
    """
    if BASELINE not in runs or len(runs) < 2:
        return []
    base = _finetuned(runs[BASELINE])
    several: dict[str, list[str]] = {"above": [], "within": [], "below": []}
    single: dict[str, list[str]] = {"above": [], "level": [], "below": []}
    for method, own in runs.items():
        mine = _finetuned(own)
        seeds = sorted(base.keys() & mine.keys())
        if method == BASELINE or not seeds:
            continue
        ours, theirs = ([values[seed] for seed in seeds] for values in (mine, base))
        gain = statistics.mean(ours) - statistics.mean(theirs)
        shown = f"{method} ({gain:+.2f})"
        if len(seeds) > 1:
            deviation = math.sqrt((statistics.variance(ours) + statistics.variance(theirs)) / 2)
            several["within" if abs(gain) <= deviation else "above" if gain > 0 else "below"].append(shown)
        else:
            single["level" if gain == 0 else "above" if gain > 0 else "below"].append(shown)
    text = []
    if any(several.values()):
        text.append(
            f"Beside {BASELINE}, in points: above by more than one standard deviation: {listed(several['above'])}; "
            f"within one: {listed(several['within'])}; below by more than one: {listed(several['below'])}."
        )
    if any(single.values()):
        text.append(
            f"Beside {BASELINE}, in points, one seed and so without a deviation: above: {listed(single['above'])}; "
            f"level: {listed(single['level'])}; below: {listed(single['below'])}."
        )
    return text


def _finetuned(runs: Sequence[dict[str, Any]]) -> dict[int, float]:
    return {run["seed"]: 100 * run["report"]["accuracy"]["finetuned"] for run in runs}


def demanded(preset: str, times: str, runs: Runs) -> list[str]:
    """Who reaches what is demanded of the paper's table."""
    least = LEAST.get((preset, times))
    if preset != "resnet110" and least is None:
        return []
    ends = {method: list(_finetuned(own).values()) for method, own in runs.items()}
    starts = {method: [100 * run["report"]["accuracy"]["dense"] for run in own] for method, own in runs.items()}
    met = [
        method
        for method, values in ends.items()
        if statistics.mean(values) >= (statistics.mean(starts[method]) if least is None else least)
    ]
    what = "no loss" if least is None else f"at least {least:.1f} %"
    return [
        f"Demanded: {what}. Reached by {listed(met)}; missed by {listed(each for each in ends if each not in met)}."
    ]


SECTIONS = tuple(map(section, PRESETS))
