"""Which networks the engine cuts, how far, and whether the slim one computes the same, beside Torch-Pruning.

    python -m benchmarks.coverage --jobs 2
    python -m benchmarks.coverage --models resnet50 timm/ghostnet_100 --out /tmp/some.json

Every network of the zoo (``tests/structure/zoo.py``), each engine in a process of its own, one thread, 60 seconds of
the processor for trace, choice and surgery. ``exact`` is the verdict of the tests' judge, who knows neither engine
(``tests/structure/oracle.py``): the slim network computes in double precision what the dense one does with everything
removed set to zero, for the plan at ratio 0.5 and, for this library, for another ratio in every group too.
Torch-Pruning is told which layers make the network's outputs; it prunes the rest with ``MetaPruner`` at ratio 0.5.
Seconds are the processor's, of the first run in a process. The table goes to ``benchmarks/results/coverage.json``, line
by line; what stands there already is not repeated (``--out`` names another file). ``python -m benchmarks.tables``
writes ``docs/coverage.md`` from it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.engine_speed import probed
from benchmarks.machine import machine
from lightning_prune.structure import choose, pick, prune_, trace
from tests.structure import oracle
from tests.structure.zoo import EVERYTHING, Entry

ROOT = Path(__file__).parent.parent
RATIO, LIMIT, PATIENCE = 0.5, 60, 4
ENGINES = ("lightning_prune", "torch_pruning")
LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


def say(**facts: Any) -> None:
    """One line for the parent process."""
    print(json.dumps(facts), flush=True)


def limited(seconds: float) -> None:
    """End this process once it has taken so many more seconds of the processor, whatever else the machine does."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def widths(model: nn.Module) -> dict[str, torch.Size]:
    """The weight shapes of a network's convolutions and linear layers."""
    return {name: module.weight.shape for name, module in model.named_modules() if isinstance(module, LAYERS)}


def ours(entry: Entry) -> None:
    """Trace, choose and prune with this library, then ask the judge."""
    model, inputs = built(entry), entry.inputs()
    before = widths(model), oracle.parameter_count(model)
    limited(LIMIT)
    started = time.process_time()
    with probed() as taken:
        graph = trace(model, inputs)
    traced = time.process_time()
    plan = choose(graph, RATIO, scope="all")
    chosen = time.process_time()
    chance = random.Random(1)
    ratios = {group.name: chance.uniform(0.1, 0.9) for group in graph.groups}
    mixed = graph.plan(pick(graph, RATIO, ratios=ratios, score="random", scope="all", renormalise=True))
    resumed = time.process_time()
    prune_(model, plan)
    seconds = time.process_time() - resumed + chosen - started
    say(seconds=seconds, trace=traced - started, probe=sum(taken), groups=len(graph.groups))
    say(**shrunk(model, *before))
    judged(entry, lambda net: prune_(net, plan), lambda net: prune_(net, mixed))


def theirs(entry: Entry) -> None:
    """The same with Torch-Pruning."""
    import torch_pruning

    model, inputs = built(entry), entry.inputs()
    ends = output_layers(entry)
    before = widths(model), oracle.parameter_count(model)

    def cut(net: nn.Module) -> int:
        torch.manual_seed(0)
        named = dict(net.named_modules())
        given = oracle.as_double(inputs) if next(net.parameters()).dtype == torch.float64 else inputs
        pruner = torch_pruning.pruner.MetaPruner(
            net,
            list(given) if isinstance(given, tuple) else given,
            importance=torch_pruning.importance.RandomImportance(),
            pruning_ratio=RATIO,
            ignored_layers=[named[name] for name in ends],
        )
        count = 0
        for group in pruner.step(interactive=True):  # each one is found in the network that the last one left
            group.prune()
            count += 1
        return count

    limited(LIMIT)
    started = time.process_time()
    groups = cut(model)
    ended = time.process_time()
    say(seconds=ended - started, groups=groups, **shrunk(model, *before))
    judged(entry, cut)


def output_layers(entry: Entry) -> list[str]:
    """Layers whose outputs are the network's, as this library's trace tells them."""
    try:
        pinned = trace(built(entry), entry.inputs()).pinned
    except Exception:
        return []
    return [name for name, reason in pinned.items() if "the network's output" in reason and "This holds" not in reason]


def built(entry: Entry) -> nn.Module:
    """A fresh network, for every process the same."""
    torch.manual_seed(0)
    return entry.build().train(entry.training)


def shrunk(model: nn.Module, before: dict[str, torch.Size], count: int) -> dict[str, Any]:
    """Share of layers that shrink and of parameters that are left."""
    smaller = [name for name, shape in widths(model).items() if shape != before[name]]
    return {"layers": len(smaller) / len(before), "left": oracle.parameter_count(model) / count}


def judged(entry: Entry, *cuts: Callable[[nn.Module], Any]) -> None:
    """The judge's verdict on each cut: largest relative error, or in words what is wrong."""
    for cut in cuts:
        limited(PATIENCE * LIMIT)
        try:
            verdict = oracle.judge(
                lambda: entry.build().train(entry.training),
                cut,
                entry.inputs(1),
                modes=(entry.training,),
                tolerance=float("inf"),
                objects=False,
            )
        except AssertionError as error:
            say(wrong=" ".join(str(error).split())[:300])
            return
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            say(wrong=f"does not run: {type(error).__name__}: {' '.join(str(error).split())[:300]} ({last.name})")
            return
        say(error=verdict.error)
    say(judged=True)


def child(engine: str, name: str) -> None:
    """One network, one engine; facts go to the standard output line by line."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    entry = EVERYTHING[name]
    if engine == "torch_pruning":
        import torch_pruning  # noqa: F401
    built(entry)
    say(ready=True)
    (ours if engine == "lightning_prune" else theirs)(entry)


def row(engine: str, name: str) -> dict[str, Any]:
    """Run one child process and put its facts together."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.coverage", "--child", engine, name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = process.communicate()
    facts: dict[str, Any] = {"engine": engine, "model": name}
    errors = []
    for line in out.splitlines():
        if line.startswith("{"):
            said = json.loads(line)
            errors += [said.pop("error")] if "error" in said else []
            facts.update(said)
    facts.pop("ready", None)
    if errors:
        facts["error"] = max(errors)
    if process.returncode == -signal.SIGPROF:
        facts["late"] = "judge" if "seconds" in facts else "engine"
    elif process.returncode:
        facts["crash"] = err.strip().splitlines()[-1][:300] if err.strip() else f"exit {process.returncode}"
    return facts


def main() -> None:
    """Run the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--engines", nargs="*", default=ENGINES, choices=ENGINES)
    parser.add_argument("--models", nargs="*", default=list(EVERYTHING))
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/coverage.json")
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    whole = json.loads(options.out.read_text()) if options.out.exists() else {"rows": []}
    whole["machine"] = machine("torch", "torchvision", "timm", "torch-pruning")
    done = {(known["engine"], known["model"]) for known in whole["rows"]}
    wanted = [(engine, name) for name in options.models for engine in options.engines if (engine, name) not in done]
    with ThreadPoolExecutor(options.jobs) as pool:
        for facts in pool.map(lambda pair: row(*pair), wanted):
            print(json.dumps(facts), flush=True)
            whole["rows"].append(facts)
            options.out.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
