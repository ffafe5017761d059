"""What is left of the accuracy at equal epochs and equal multiply-adds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.judging import RULE, difference
from benchmarks.markdown import counted, listed, on, spread, table
from benchmarks.pages import Section
from benchmarks.presets import PRESETS as TRAINED
from benchmarks.presets import judged_images

Runs = Mapping[str, Sequence[dict[str, Any]]]

BASELINE = "Magnitude"
STAGES = ("dense", "before", "after", "finetuned")
SIDES = ("latency_before", "latency_after")
HEADERS = ("method", "seeds", "dense", "before", "right after", "finetuned", "M MACs", "parameters")
LATENCY = ("ms, batch 1", "ms, batch 64")
RESIDUAL = "A residual network of 8 layers, 16 to 64 channels wide."
PAPERS = "The papers' networks and shares of multiply-adds; one recipe of {} epochs for every method."
PRESETS = {
    "digits": ("scikit-learn's digits, on a processor", RESIDUAL),
    "cpu": ("CIFAR-10, on a processor", RESIDUAL),
    "resnet56": ("CIFAR-10 and ResNet-56, on a GPU", PAPERS),
    "resnet110": ("CIFAR-10 and ResNet-110, on a GPU", PAPERS),
    "vgg19": ("CIFAR-100 and VGG-19, on a GPU", PAPERS),
}
"""Title and what is trained."""
LEAST = {("resnet56", "2.55"): 93.4, ("resnet56", "3.59"): 92.4, ("resnet56", "11.40"): 89.7}
"""This project's own targets in percent, by preset and how many times fewer multiply-adds."""
ABOUT = f"""## Accuracy

Validation accuracy in percent, mean ± standard deviation over the seeds, always of the last epoch. Every method has the
same epochs: dense, sparse, finetuning; {BASELINE} trains on densely instead of a sparse stage. *Dense*: at the end of
the first stage. *Before*: as the sparse stage leaves the network, nothing set to zero. *Right after*: the slim network
before any further step, which is the masked network's accuracy too, for both compute the same. Multiply-adds by fvcore;
milliseconds of a forward pass, dense -> slim: of both in turns after the runs (`--latency`), or else as measured at
surgery. CIFAR's validation images are its test set. What is demanded of a table is a target of this project's own.

{RULE}

A run whose result lies in the folder of results is not repeated; without `--results` that folder is below `runs/`.
"""


def section(preset: str) -> Section:
    """What one preset has shown."""
    title, about = PRESETS[preset]
    data = "" if preset == "digits" else " --root DIR"
    command = f"python benchmarks/accuracy.py --preset {preset}{data} --minutes 60"
    command += f" --results benchmarks/results/accuracy/{preset}"
    about = about.format(" + ".join(map(str, TRAINED[preset].epochs)))
    files, remark = f"accuracy/{preset}/*.json", "call it again to go on"
    return Section(title, about, command, files, _body(preset), level=3, options=_threads, remark=remark)


def _threads(found: Sequence[Any]) -> str:
    """As an option, where all runs had as many."""
    known = {count for run in found for count in _counts(run)}
    return f" --threads {known.pop()}" if len(known) == 1 else ""


def _counts(run: Mapping[str, Any]) -> list[int]:
    """Numbers of threads of a run, in ascending order."""
    timed = [run["latency"]] if "latency" in run else [each for side in SIDES for each in run["report"][side]]
    return sorted({each["threads"] for each in timed if each.get("threads")})


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
            said = [*beside(preset, runs), *demanded(preset, times, runs), *longer(runs), *alike(runs)]
            text += [*(f"- {sentence}" for sentence in said), ""]
        return text[:-1]

    return body


def conditions(found: Sequence[Any]) -> list[str]:
    """Epochs, device and versions; several, where the runs differ."""
    lines = []
    for run in found:
        epochs = " + ".join(map(str, run["epochs"]))
        small = f"A miniature of {run['few']} images; " if run.get("few") else ""
        precision = run.get("precision", "32-true")
        lines.append(f"{small}{epochs} epochs in {precision}; {on(run['versions'], *map(counted, _counts(run)))}")
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


def beside(preset: str, runs: Runs) -> list[str]:
    """Who ends above the baseline by more than chance, and who below: a sentence per number of common seeds."""
    found: dict[int, dict[str, list[str]]] = {}
    for method, own in runs.items():
        images = min(run.get("images") or judged_images(TRAINED[preset], run.get("few")) for run in own)
        change = difference(_finetuned(own), _finetuned(runs.get(BASELINE, ())), images)
        if method != BASELINE and change is not None:
            sides = found.setdefault(change.seeds, {"above": [], "level": [], "below": []})
            sides[change.side].append(f"{method} ({change.gain:+.2f})")
    return [
        f"Finetuned beside {BASELINE}, in points, {seeds} seed{'s' * (seeds > 1)}: above by more than chance: "
        f"{listed(sides['above'])}; not told apart: {listed(sides['level'])}; below by more than chance: "
        f"{listed(sides['below'])}."
        for seeds, sides in found.items()
    ]


def longer(runs: Runs) -> list[str]:
    """The dense network after the sparse stage's epochs, which is what the finetuned ones belong beside."""
    first, second, third = runs[BASELINE][0]["epochs"] if BASELINE in runs else (0, 0, 0)
    if not first:
        return []
    before = spread([100 * run["report"]["accuracy"]["before"] for run in runs[BASELINE]])
    return [
        f"*Dense* is after {first} of {first + second + third} epochs, *finetuned* after all. {BASELINE}'s *before* is "
        f"the dense network after {first + second} of them: {before}."
    ]


def alike(runs: Runs) -> list[str]:
    """Whether the rows' milliseconds are those of the same widths."""
    widths = [run["report"]["layers"] for own in runs.values() for run in own]
    if len(runs) < 2 or any(each != widths[0] for each in widths):
        return []
    return ["The slim networks have equal widths: differences between the rows' milliseconds are noise."]


def _finetuned(runs: Sequence[dict[str, Any]]) -> dict[int, float]:
    return {run["seed"]: 100 * run["report"]["accuracy"]["finetuned"] for run in runs}


def demanded(preset: str, times: str, runs: Runs) -> list[str]:
    """Who reaches what this project demands of itself."""
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
    missed = listed(each for each in ends if each not in met)
    return [f"This project demands {what}. Reached by {listed(met)}; missed by {missed}."]


SECTIONS = tuple(map(section, PRESETS))
