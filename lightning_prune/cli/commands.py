"""What each command does: arguments in, exit status out."""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lightning_prune.cli import tables
from lightning_prune.cli.models import dense_model
from lightning_prune.cli.preview import Preview, preview_of, round_to_of
from lightning_prune.errors import ConfigurationError, PlanError, PruningError
from lightning_prune.reports import export as export_
from lightning_prune.reports import read_report
from lightning_prune.reports.report import write_text
from lightning_prune.reports.wording import first_line
from lightning_prune.structure import Plan, PruningPlan, choose, load_slim, prune_, save_slim, trace
from lightning_prune.structure.slim_file import read_slim
from lightning_prune.structure.sparsity import plan_from_json

_CONFIGS = (".yaml", ".yml", ".json")


def plan(asked: argparse.Namespace, rest: Sequence[str]) -> int:
    """Preview a configured run, or one model."""
    if asked.model is not None:
        if asked.config or asked.script:
            raise ConfigurationError(
                "--model is a preview of its own; leave out --config, --script and their arguments."
            )
        preview = _preview_of_model(asked)
    elif asked.config or asked.script:
        _refuse_what_belongs_to_a_model(asked)
        preview = _preview_of_run(asked, rest)
    else:
        raise ConfigurationError("Say what to preview: --config or --script of a run, or --model with --input.")
    if asked.out:
        write_text(asked.out, preview.plan.to_json() + "\n")
    if asked.json:
        sys.stdout.write(preview.to_json())
    else:
        tables.show(Console(), preview)
        if asked.out:
            sys.stdout.write(f"Plan: {asked.out}\n")
    return 0


def _refuse_what_belongs_to_a_model(asked: argparse.Namespace) -> None:
    """A configured run has its own; silence would pass for consent."""
    for name, unsaid in asked.of_model.items():
        if getattr(asked, name) != unsaid:
            flag = f"--{name.rstrip('_').replace('_', '-')}"
            raise ConfigurationError(
                f"{flag} belongs to --model; a configured run has its own. What is meant for the script comes after --."
            )


def _preview_of_model(asked: argparse.Namespace) -> Preview:
    if not asked.input:
        raise ConfigurationError("--model needs the shape of its input too: --input 1,3,224,224.")
    model, inputs = dense_model(asked), _inputs(asked)
    graph = trace(model, inputs)
    found = choose(
        graph,
        asked.ratio,
        budget=asked.budget,
        score=asked.score,
        scope=asked.scope,
        round_to=asked.round_to,
        global_=asked.global_,
        ignore=asked.ignore,
    )
    least = graph.plan({group.name: range(group.size - 1) for group in graph.groups})
    wanted: Any = {"batches": asked.batch or (1,), "variants": asked.variant or ("eager",)}
    return preview_of(graph, found, found, least, (inputs, {}), **wanted)


def _preview_of_run(asked: argparse.Namespace, rest: Sequence[str]) -> Preview:
    from lightning_prune.cli.rehearsal import Over, rehearsing

    for config in asked.config:
        if Path(config).suffix in _CONFIGS and "://" not in config and not Path(config).is_file():
            raise FileNotFoundError(f"There is no file {config}.")
    configs = [part for config in asked.config for part in ("--config", config)]
    rest = list(rest[1:] if rest[:1] == ["--"] else rest)
    if rest[:1] == ["fit"] and (configs or not asked.script):
        del rest[0]  # copied from the command that trains
    sys.path.insert(0, str(Path(asked.script).resolve().parent) if asked.script else "")
    with rehearsing(asked.batch or (1,), asked.variant or ("eager",)) as found:
        try:
            if asked.script:
                _run_script(asked.script, ["fit", *configs, *rest] if configs else rest)
            else:
                _run_configured(["fit", *configs, *rest])
        except Over:
            pass
        except PruningError:
            raise
        except Exception as error:
            refusal = _refusal_in(error)
            if refusal is not None:
                raise refusal from error
            if not found.passed:
                raise
            raise ConfigurationError(
                f"{asked.script or 'The run'} stopped after a fit without pruning callbacks ({first_line(error)}). One"
                " batch of that was run, and of its files only those of ModelCheckpoint are there to be loaded."
            ) from error
        finally:
            sys.path.pop(0)
    if found.error is not None:
        raise found.error
    if found.preview is None and found.passed:
        raise ConfigurationError(
            "There is no regulariser among the trainer's callbacks, in none of the fits; add one, such as GReg1, and"
            " StructuralPruning."
        )
    if found.preview is None:
        raise ConfigurationError(f"{asked.script} never called Trainer.fit, so there is no run to preview.")
    if found.passed:
        sys.stderr.write(
            f"One batch was run of each fit without pruning callbacks that came first ({found.passed}); the widths go"
            " by the weights after that.\n"
        )
    return found.preview


def _refusal_in(error: BaseException | None) -> PruningError | None:
    """What the library has said, where LightningCLI has wrapped it in sentences of its own."""
    while error is not None and not isinstance(error, PruningError):
        error = error.__cause__ or error.__context__
    return error


def _run_script(script: str, arguments: list[str]) -> None:
    if not Path(script).is_file():
        raise FileNotFoundError(f"There is no script {script}.")
    before = sys.argv
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        sys.argv = before


def _run_configured(arguments: list[str]) -> None:
    from lightning.pytorch.cli import LightningCLI

    from lightning_prune import callbacks

    for name in callbacks.__all__:
        getattr(callbacks, name)  # LightningCLI knows by their short names the classes that exist
    wanted: Any = {"subclass_mode_model": True, "subclass_mode_data": True, "save_config_callback": None}
    try:
        LightningCLI(**wanted, parser_kwargs={"prog": "lightning-prune plan"}, args=arguments)
    except SystemExit as stopped:
        if stopped.code and not _names_a_model(arguments):
            sys.stderr.write("No model is named: where the script that trains does, add it, as in --script train.py.\n")
        raise


def _names_a_model(arguments: Sequence[str]) -> bool:
    files = [Path(each) for each in arguments if Path(each).suffix in _CONFIGS and Path(each).is_file()]
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in files)
    found = any(line.startswith(("model:", "fit:")) for text in texts for line in text.splitlines())
    return found or any(each.startswith("--model") for each in arguments)


def diff(asked: argparse.Namespace, rest: Sequence[str]) -> int:
    """Print where two plans differ; exit status 1 where they do."""
    first, second = _plan_at(asked.first), _plan_at(asked.second)
    if not isinstance(first, PruningPlan) or not isinstance(second, PruningPlan):
        raise PlanError("Plans of single weights hold too many positions to list; compare their files by inspect.")
    if first.signature != second.signature:
        sys.stdout.write(f"They are for different models: {first.signature} and {second.signature}.\n")
    difference = first.diff(second)
    sys.stdout.write(f"{difference}\n" if difference else "")
    return int(bool(difference) or first.signature != second.signature)


def apply(asked: argparse.Namespace, rest: Sequence[str]) -> int:
    """Cut a dense model and save what is left."""
    found, model = _plan_at(asked.file), dense_model(asked)
    before = sum(parameter.numel() for parameter in model.parameters())
    prune_(model, found)
    save_slim(model, asked.out, found)
    after, multiple = sum(parameter.numel() for parameter in model.parameters()), round_to_of(found)
    if asked.json:
        values = {"parameters_before": before, "parameters_after": after, "round_to": multiple, "file": asked.out}
        sys.stdout.write(json.dumps(values) + "\n")
    else:
        rounded = f", widths are multiples of {multiple}" if multiple > 1 else ""
        sys.stdout.write(f"{before:,} -> {after:,} parameters{rounded}: {asked.out}\n")
    return 0


def inspect(asked: argparse.Namespace, rest: Sequence[str]) -> int:
    """Print what a slim file or a plan holds."""
    found, header = _content_at(asked.file)
    if asked.json:
        values = {"layers": tables.counts(found), "signature": found.signature, "round_to": round_to_of(found)}
        values |= {name: header[name] for name in ("metadata", "versions") if name in header}
        sys.stdout.write(json.dumps(values, indent=2, sort_keys=True) + "\n")
    else:
        tables.show_file(Console(), asked.file, found, header)
    return 0


def export(asked: argparse.Namespace, rest: Sequence[str]) -> int:
    """Load a slim file and write it in another format."""
    model = dense_model(asked)
    report = _report_of(asked.file, load_slim(asked.file, model), asked.report)
    made = export_(
        model,
        asked.out,
        _inputs(asked),
        format=asked.format,
        dynamic_batch=not asked.fixed_batch,
        tolerance=asked.tolerance,
        report=report,
    )
    named = f"Named in {report} and on its page.\n" if report else ""
    sys.stdout.write(made.to_json() if asked.json else f"{made}\n{named}")
    return 0


def _report_of(file: str, plan: Plan, asked: str | None) -> Path | None:
    """The report of the surgery that made a slim file: the one asked for, or the latest that lies beside it."""
    if asked:
        if not _is_report_of(plan, Path(asked)):
            raise ConfigurationError(f"{asked} is the report of another surgery than the one that made {file}.")
        return Path(asked)
    near = sorted(Path(file).parent.glob("report*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in near:
        try:
            if _is_report_of(plan, path):
                return path
        except ConfigurationError:
            continue
    return None


def _is_report_of(plan: Plan, path: Path) -> bool:
    report = read_report(path)
    return {name: (before, after) for name, before, after in report.layers} == tables.counts(plan)


def _inputs(asked: argparse.Namespace) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator) for shape in asked.input)


def _plan_at(path: str) -> Plan:
    return _content_at(path)[0]


def _content_at(path: str) -> tuple[Plan, dict[str, Any]]:
    """The plan in a plan's or slim file, and what else a slim file's header has."""
    if path.endswith(".safetensors"):
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no file {path}.")
        found = read_slim(path)
        return found.plan, found.header
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PlanError(f"{path} is no plan: it is not even text.") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no file {path}.") from error
    return plan_from_json(text), {}
