"""What can be said on the command line."""

from __future__ import annotations

import argparse
import json
from typing import Any

from lightning_prune.cli import commands
from lightning_prune.reports.latency import VARIANTS

_EXAMPLES = """examples:
  lightning-prune plan --config base.yaml --config prune.yaml
  lightning-prune plan --script train.py --config base.yaml --config prune.yaml --trainer.max_epochs 30
  lightning-prune plan --model torchvision.models.resnet50 --input 1,3,224,224 --ratio 0.5 --out plan.json
  lightning-prune plan diff old.json new.json
  lightning-prune plan apply plan.json --model torchvision.models.resnet50 --weights dense.ckpt --out slim.safetensors
  lightning-prune inspect slim.safetensors
  lightning-prune export slim.safetensors --model torchvision.models.resnet50 --input 1,3,224,224 --out slim.onnx
"""


def parser_of() -> argparse.ArgumentParser:
    """The parser of all commands; each knows the function that runs it."""
    parser = argparse.ArgumentParser(
        prog="lightning-prune",
        description="Structural pruning: look before you train, and work with plans and slim files.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found = parser.add_subparsers(dest="command", required=True, metavar="command")
    _plan(found)
    inspect = found.add_parser("inspect", help="what a slim file or a plan holds")
    inspect.add_argument("file", help="slim file (.safetensors) or plan (.json)")
    _add_json(inspect)
    inspect.set_defaults(run=commands.inspect, takes_rest=False)
    export = found.add_parser("export", help="a slim file as ONNX or torch.export archive, compared")
    export.add_argument("file", help="slim file (.safetensors)")
    _add_model(export)
    _add_input(export)
    export.add_argument("--out", required=True, help="file to write")
    export.add_argument("--format", choices=("onnx", "torch_export"), default="onnx", help="default: %(default)s")
    export.add_argument("--fixed-batch", action="store_true", help="keep the number of samples of --input")
    export.add_argument("--tolerance", type=float, default=1e-4, help="relative to the largest output (%(default)s)")
    export.add_argument("--report", help="report.json to name it in; else the one of this network beside the slim file")
    _add_json(export)
    export.set_defaults(run=commands.export, takes_rest=False)
    return parser


def _plan(found: Any) -> None:
    plan = found.add_parser(
        "plan",
        help="what would go, what that costs, how long it takes; nothing is trained",
        description="Preview of a configured run (--config, --script), or of one model (--model, --input). Of a run the"
        " first batches are rehearsed on one process; further arguments go to its LightningCLI.",
        epilog="Also: plan diff A B, and plan apply PLAN; see their --help.",
        allow_abbrev=False,
    )
    plan.add_argument(
        "-c", "--config", action="append", default=[], help="LightningCLI's YAML; may be given several times"
    )
    plan.add_argument("--script", help="the script that trains, where the YAML names no classes")
    _add_model(plan, required=False)
    _add_input(plan, required=False)
    choice = plan.add_argument_group("with --model")
    choice.add_argument("--ratio", type=float, help="share of channels that goes (0.5)")
    choice.add_argument("--budget", type=_mapping, help="what may be left instead: '{\"macs\": 0.5}'")
    choice.add_argument("--score", default="l1", help="l1, l2, bn_scale or random (%(default)s)")
    choice.add_argument("--scope", choices=("inner", "all"), default="inner", help="all: residual streams too")
    choice.add_argument("--round-to", type=_multiple, default=1, help="widths are multiples of this, or auto (1)")
    choice.add_argument("--global", dest="global_", action="store_true", help="one threshold over all layers")
    choice.add_argument("--ignore", action="append", default=[], help="pattern of layers that stay; several times")
    plan.add_argument("--batch", type=_size, action="append", default=[], help="batch size for latency; several times")
    plan.add_argument(
        "--variant", choices=VARIANTS, action="append", default=[], help="how to run for latency (eager); several times"
    )
    plan.add_argument("--out", help="write the plan as JSON")
    _add_json(plan)
    own = ("input", "model_args", "weights", "ratio", "budget", "score", "scope", "round_to", "global_", "ignore")
    plan.set_defaults(run=commands.plan, takes_rest=True, of_model={name: plan.get_default(name) for name in own})
    diff = found.add_parser("plan diff", help="where two plans differ")
    diff.add_argument("first", help="plan (.json) or slim file (.safetensors)")
    diff.add_argument("second", help="the same")
    diff.set_defaults(run=commands.diff, takes_rest=False)
    apply = found.add_parser("plan apply", help="cut a dense model by a plan and save the slim file")
    apply.add_argument("file", help="plan (.json)")
    _add_model(apply)
    apply.add_argument("--out", required=True, help="slim file to write (.safetensors)")
    _add_json(apply)
    apply.set_defaults(run=commands.apply, takes_rest=False)


def _add_model(parser: argparse.ArgumentParser, required: bool = True) -> None:
    group = parser.add_argument_group("the dense model")
    group.add_argument("--model", required=required, help="dotted name of a class or function that makes it")
    group.add_argument("--model-args", type=_mapping, default={}, help="its keyword arguments: '{\"num_classes\": 10}'")
    group.add_argument("--weights", help="checkpoint, state dict or safetensors file to load into it")


def _add_input(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument(
        "--input", type=_shape, action="append", required=required, help="shape of an argument: 1,3,224,224"
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON for machines")


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; write it as 1,3,224,224")
    return shape


def _size(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _multiple(text: str) -> int | str:
    return text if text == "auto" else _size(text)


def _mapping(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError:
        values = None
    if not isinstance(values, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON object such as {{"name": 10}}')
    return values
