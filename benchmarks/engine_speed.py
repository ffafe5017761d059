"""How long trace, choice and surgery take, and how much memory, beside Torch-Pruning in the same process.

    python -m benchmarks.engine_speed
    python -m benchmarks.engine_speed --zoo

One thread, one picture of 224 x 224. Both engines take turns on fresh copies of one network, and the median of the
rounds counts, as seconds of the processor and of the clock. Torch-Pruning: construction and step of its
``MagnitudePruner``, scope and ratio alike, told which layers make the outputs. Where it does not end within 60 seconds
of the processor, this library runs alone. ``--zoo`` repeats that for every classifier of the zoo.

Peak memory: the largest resident size while an engine works (``VmHWM`` after a reset through ``clear_refs``) minus the
size before, after a run on a small network, median of three processes; ``planned`` counts trace and choice alone, and
``slim`` is what the slim tensors take, which surgery would need if it made them all before it lets a dense one go.
``peak`` comes after ``planned`` in one process, above what that has left allocated, and so is too low by at most
``planned``.
``surgery``: ``prune_`` on ResNet-50 with SGD and momentum for every parameter, two threads, without the proof.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from benchmarks.machine import machine
from lightning_prune.structure import choose, probe, prune_, trace, tracing
from tests.structure.zoo import CLASSIFIERS

ROOT = Path(__file__).parent.parent
FIVE = ("resnet50", "densenet121", "vit_b_16", "convnext_tiny", "swin_t")
LIMIT, ROUNDS, TRIES = 60, 5, 3
Engine = Callable[[nn.Module, Tensor], Any]


def network(name: str) -> tuple[nn.Module, Tensor]:
    """A network in evaluation mode and one picture for it."""
    torch.manual_seed(0)
    if name in FIVE:
        return getattr(models, name)(weights=None).eval(), torch.randn(1, 3, 224, 224)
    entry = CLASSIFIERS[name]
    size = entry.size if entry.fixed or entry.size > 224 else 224
    return entry.build().eval(), torch.randn(1, 3, size, size)


def ours(model: nn.Module, picture: Tensor) -> None:
    """Trace, choose, prune."""
    prune_(model, choose(trace(model, picture), 0.5, scope="all"))


def theirs(model: nn.Module, picture: Tensor) -> None:
    """Torch-Pruning's counterpart."""
    import torch_pruning

    ends = [module for module in model.modules() if getattr(module, "out_features", 0) == 1000]
    importance = torch_pruning.importance.MagnitudeImportance(p=1)
    pruner = torch_pruning.pruner.MagnitudePruner(
        model, picture, importance=importance, pruning_ratio=0.5, ignored_layers=ends
    )
    pruner.step()


ENGINES: dict[str, Engine] = {"lightning_prune": ours, "torch_pruning": theirs}


@contextmanager
def seconds(into: dict[str, list[float]]) -> Iterator[None]:
    """Note the seconds of the processor and of the clock that a block takes."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    into.setdefault("cpu", []).append(time.process_time() - cpu)
    into.setdefault("wall", []).append(time.perf_counter() - wall)


def timed(name: str, engines: list[str], rounds: int) -> None:
    """Rounds of both engines on fresh copies, and the seconds that the probe takes of one trace."""
    model, picture = network(name)
    found: dict[str, dict[str, list[float]]] = {engine: {} for engine in engines}
    for number in range(rounds + 1):
        for engine in engines:
            fresh, taken = copy.deepcopy(model), found[engine] if number else {}
            signal.setitimer(signal.ITIMER_PROF, LIMIT)
            try:
                with seconds(taken):
                    ENGINES[engine](fresh, picture)
            except Exception as error:
                engines = [each for each in engines if each != engine]
                say(engine, failed=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            signal.setitimer(signal.ITIMER_PROF, 0)
    for engine in engines:
        say(engine, **{clock: statistics.median(values) for clock, values in found[engine].items()})
    say("probe", cpu=probing(model, picture))


def probing(model: nn.Module, picture: Tensor) -> float:
    """Processor seconds of a trace that are spent in the probe."""
    with probed() as taken:
        trace(model, picture)
    return sum(taken)


@contextmanager
def probed() -> Iterator[list[float]]:
    """Note the processor seconds that the probe takes of every trace in a block."""
    taken: list[float] = []

    def watched(*args: Any) -> Any:
        started = time.process_time()
        try:
            return probe.probe(*args)
        finally:
            taken.append(time.process_time() - started)

    tracing.probe, plain = watched, tracing.probe
    try:
        yield taken
    finally:
        tracing.probe = plain


def remembered(name: str, engine: str) -> None:
    """Megabytes at the peak above what the network takes."""
    ENGINES[engine](models.resnet18(weights=None).eval(), torch.randn(1, 3, 224, 224))
    model, picture = network(name)
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    facts = {}
    if engine == "lightning_prune":
        with peak(facts, "planned"):
            plan = choose(trace(model, picture), 0.5, scope="all")
        del plan
    with peak(facts, "peak"):
        ENGINES[engine](model, picture)
    facts["slim"] = sum(tensor.nbytes for tensor in model.state_dict().values()) / 2**20
    say(engine, **facts)


@contextmanager
def peak(into: dict[str, float], name: str) -> Iterator[None]:
    """Note by how many megabytes the resident size grew at most."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    yield
    into[name] = resident("VmHWM") - before


def resident(line: str) -> float:
    """A number of ``/proc/self/status``, MB."""
    found = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(line))
    return int(found.split()[1]) / 1024


def operated() -> None:
    """Surgery on ResNet-50 in the middle of a fit: SGD has momentum for every parameter."""
    torch.set_num_threads(2)
    taken: dict[str, list[float]] = {}
    model, picture = network("resnet50")
    plan = choose(trace(model, picture), 0.5, scope="all")
    for _ in range(ROUNDS):
        fresh = copy.deepcopy(model)
        optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1, momentum=0.9)
        for parameter in fresh.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        with seconds(taken):
            prune_(fresh, plan, optimizer)
    say("surgery", wall=statistics.median(taken["wall"]))


def say(who: str, **facts: Any) -> None:
    """One line for the parent process."""
    print(json.dumps({who: facts}), flush=True)


def run(*arguments: str) -> dict[str, Any]:
    """A child process; what it said, by engine."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.engine_speed", "--child", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, capture_output=True, check=False
    )
    facts: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        facts.update(json.loads(line) if line.startswith("{") else {})
    if done.returncode == -signal.SIGPROF:
        facts["late"] = True
    elif done.returncode:
        facts["crash"] = done.stderr.strip().splitlines()[-1][:200]
    return facts


def row(name: str, rounds: int, memory: bool) -> dict[str, Any]:
    """Everything about one network."""
    facts = run("time", name, "both", str(rounds))
    if facts.get("late") or facts.get("crash"):
        alone = run("time", name, "lightning_prune", str(rounds))
        facts = {**alone, "torch_pruning": {"failed": f"more than {LIMIT} s" if facts.get("late") else facts["crash"]}}
    for engine in ENGINES if memory else ():
        found = [run("memory", name, engine).get(engine, {}) for _ in range(TRIES)]
        medians = {key: statistics.median(each.get(key, math.inf) for each in found) for key in found[0]}
        facts.setdefault(engine, {}).update(medians)
    return {"model": name, **facts}


def main() -> None:
    """Run the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--zoo", action="store_true", help="every classifier of the zoo instead of the five")
    parser.add_argument("--models", nargs="*")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.child:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        job, *rest = options.child
        if job == "time":
            timed(rest[0], list(ENGINES) if rest[1] == "both" else [rest[1]], int(rest[2]))
        elif job == "memory":
            remembered(rest[0], rest[1])
        else:
            operated()
        return
    out = options.out or ROOT / "benchmarks/results" / ("engine_speed_zoo.json" if options.zoo else "engine_speed.json")
    whole: dict[str, Any] = {"machine": machine("torch", "torch-pruning", "timm"), "rounds": options.rounds, "rows": []}
    if not options.zoo:
        whole["surgery"] = run("surgery").get("surgery", {})
    for name in options.models or (CLASSIFIERS if options.zoo else FIVE):
        whole["rows"].append(row(name, options.rounds, memory=not options.zoo))
        print(json.dumps(whole["rows"][-1]), flush=True)
        out.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
