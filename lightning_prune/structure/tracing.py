"""``trace``: watch one forward pass, group what hangs together, and try whether Python agrees."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_prune.errors import ConfigurationError, TraceError
from lightning_prune.structure.batches import resized
from lightning_prune.structure.custom import sealed
from lightning_prune.structure.elastic import loosen_
from lightning_prune.structure.explanation import Notes
from lightning_prune.structure.graph import ChannelGraph
from lightning_prune.structure.grouping import graph_of
from lightning_prune.structure.numbers import Fault, answer, joining
from lightning_prune.structure.probe import probe
from lightning_prune.structure.replica import arguments, replica, to_device
from lightning_prune.structure.watch import Watcher


@contextmanager
def _uncollected() -> Iterator[None]:
    """Copies make so many objects at once that the collector would go through all of torch's again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_uncollected()
def trace(model: nn.Module, example_inputs: Any, kwargs: Mapping[str, Any] | None = None) -> ChannelGraph:
    """Watch one forward pass and find which channels hang together.

    The model runs in the mode it is in, as a copy without memory (or, where its Python code looks at values, as a
    copy on the CPU). The model itself, its buffers, flags and the random generators are left as they were.

    Args:
        model: any module.
        example_inputs: a tuple is the forward's positional arguments; anything else is its only one.
        kwargs: the forward's keyword arguments.

    Raises:
        TraceError: where the forward pass fails; the message names the statement.
        ConfigurationError: where a rule of :func:`register_rule` doesn't fit what it is for.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> graph = trace(net, torch.zeros(1, 4))
    >>> [(group.name, group.size, group.consumers) for group in graph.groups], sorted(graph.pinned)
    ([('0', 8, ('2',))], ['2'])
    """
    args, named = arguments(example_inputs, kwargs)
    try:
        watcher = _watch(model, args, named, "meta")
        device = "meta"
    except Exception:  # whatever it was, a pass with values says it better
        device = "cpu"
        try:
            watcher = _watch(model, args, named, device)
        except ConfigurationError:  # of a user's rule
            raise
        except Exception as error:  # any failure of foreign code is reported the same way
            raise TraceError(f"The model can't be watched: {_statement(error)}.") from error
    labels = watcher.known.labels
    solution = labels.solve()
    graph = graph_of(model, watcher.known, solution)

    def fresh() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        return loosen_(sealed(replica(model, device)), joining(watcher.known)), *to_device((args, named), device)

    def tried() -> list[Fault]:
        known = watcher.results.found, watcher.repeats
        return probe(watcher.records, labels, solution, graph, fresh, device == "meta", *known)

    while graph.groups and (faults := tried()):
        answer(watcher.known, faults)
        solution = labels.solve()
        graph = graph_of(model, watcher.known, solution)
    known = watcher.known
    notes = Notes(labels, solution, known.roles, known.used, watcher.records)
    return replace(graph, notes=notes, inputs=to_device(resized((args, named), 1), None))


def _watch(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], device: str) -> Watcher:
    watcher = Watcher(loosen_(sealed(replica(model, device))))
    watcher.run(*to_device((args, kwargs), device))
    return watcher


def _statement(error: Exception) -> str:
    """The innermost line of the user's own code on the way to an error, and what went wrong there."""
    frames = traceback.extract_tb(error.__traceback__)
    own, library = str(Path(__file__).parents[1]), str(Path(torch.__file__).parent)
    theirs = [frame for frame in frames if not frame.filename.startswith((own, library))] or frames
    where = f"{Path(theirs[-1].filename).name}:{theirs[-1].lineno} `{(theirs[-1].line or '').strip()}`"
    message = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return f"{where} raised {type(error).__name__}: {message[:300]}"
