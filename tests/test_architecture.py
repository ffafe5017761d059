"""The floors of the house: imports point down, and each floor knows only its own third parties."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_prune

PACKAGE = Path(lightning_prune.__file__).parent
FLOORS = {"structure": 1, "reports": 2, "callbacks": 3, "cli": 4, "__main__": 5, "__init__": 6}
FLOORS |= {"errors": -1, "short_names": -1}
FLOORS |= dict.fromkeys(("door", "penalties", "scores", "clusters", "schedules"), 0)
ALLOWED = {
    -1: set[str](),
    0: {"torch"},
    1: {"numpy", "safetensors", "torch"},
    2: {"fvcore", "matplotlib", "numpy", "onnxruntime", "rich", "torch"},
    3: {"lightning", "rich", "torch", "torchmetrics"},
    4: {"jsonargparse", "lightning", "rich", "safetensors", "torch"},
    5: set[str](),
    6: set[str](),
}
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def imports(source: str) -> set[str]:
    """Dotted names that a source imports, those inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found |= {f"{base}.{alias.name}" for alias in node.names} if base == "lightning_prune" else {base}
    return found


def faults(path: Path, source: str) -> list[str]:
    """What a file imports although its floor must not."""
    here, found = FLOORS[room(path)], []
    for name in sorted(imports(source)):
        head, _, rest = name.partition(".")
        inner = rest.partition(".")[0]
        if not head:
            found.append(f"{path}: relative import {name}")
        elif head == "lightning_prune":
            if FLOORS[inner] > here or (FLOORS[inner] == here and inner != room(path)):
                found.append(f"{path}: {name} is not below")
        elif head not in sys.stdlib_module_names and head not in ALLOWED[here]:
            found.append(f"{path}: {head} does not belong on floor {here}")
        elif head == "torch" and room(path) == "schedules":
            found.append(f"{path}: torch")
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_down(path: Path) -> None:
    assert faults(path, (PACKAGE / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("scores.py", "from lightning_prune.structure import trace"),
        ("scores.py", "from lightning_prune import penalties"),
        ("structure/graph.py", "import lightning_prune.reports.cost"),
        ("structure/graph.py", "def late():\n    from lightning.pytorch import Trainer"),
        ("reports/cost.py", "from lightning_prune import callbacks"),
        ("callbacks/greg.py", "from ..structure import trace"),
        ("schedules.py", "import torch"),
        ("errors.py", "from torch import nn"),
    ],
)
def test_a_planted_import_is_found(path: str, source: str) -> None:
    assert len(faults(Path(path), source)) == 1


@pytest.mark.parametrize("path", FILES, ids=str)
def test_the_package_neither_asserts_nor_prints_nor_exits(path: Path) -> None:
    tree = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    named = {call.id for call in calls if isinstance(call, ast.Name)}
    exits = [
        call for call in calls if isinstance(call, ast.Attribute) and ast.unparse(call) in ("sys.exit", "os._exit")
    ]
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree))
    assert not named & {"print", "exit", "quit"}
    assert not exits


def test_no_method_imports_another() -> None:
    methods = {"greg", "magnitude", "mask_sparsity", "tpp", "ascp"}
    for name in methods:
        path = PACKAGE / "callbacks" / f"{name}.py"
        if path.exists():
            imported = {item.rpartition(".")[2] for item in imports(path.read_text(encoding="utf-8"))}
            assert not imported & methods


@pytest.mark.parametrize("module", ["lightning_prune", "lightning_prune.structure", "lightning_prune.reports.cost"])
def test_lightning_is_not_loaded_below_the_callbacks(module: str) -> None:
    code = f"import sys, {module}; sys.exit(any(name.partition('.')[0] == 'lightning' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
