"""The front door: names, version, marker files."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from importlib import import_module
from pathlib import Path

import pytest

import lightning_prune

ROOT = Path(__file__).parent.parent


def test_public_names_are_sorted_and_found() -> None:
    assert lightning_prune.__all__ == sorted(lightning_prune.__all__)
    assert dir(lightning_prune) == lightning_prune.__all__
    for name in set(lightning_prune.__all__) - {"__version__"}:
        assert getattr(lightning_prune, name).__name__ == name


def test_the_version_is_that_of_the_package() -> None:
    assert lightning_prune.__version__ in (declared_version(), "unknown")


@pytest.mark.parametrize("room", ["callbacks", "reports", "schedules", "structure"])
def test_every_name_of_the_rooms_is_sorted_and_found(room: str) -> None:
    module = import_module(f"lightning_prune.{room}")
    assert module.__all__ == sorted(module.__all__)
    for name in module.__all__:
        assert hasattr(module, name)
    with pytest.raises(AttributeError, match="no attribute 'unknown'"):
        _ = module.unknown


@pytest.mark.parametrize(
    "imports",
    [
        "from lightning.pytorch.cli import LightningCLI\nimport lightning_prune",
        "import lightning_prune\nfrom lightning.pytorch.cli import LightningCLI",
        "import lightning_prune, lightning.pytorch\nfrom lightning.pytorch.cli import LightningCLI",
        "from lightning_prune import StructuralPruning\nfrom lightning.pytorch.cli import LightningCLI",
        "from lightning_prune.callbacks import Magnitude\nfrom lightning.pytorch.cli import LightningCLI",
        "from lightning_prune import choose\nfrom lightning.pytorch.cli import LightningCLI",
    ],
)
def test_lightning_cli_knows_short_names(imports: str) -> None:
    """As soon as a script has imported both, in whichever order."""
    code = """
        flags = ["--trainer.callbacks=GReg1", "--trainer.callbacks.ratio=0.5", "--trainer.callbacks.epochs=3"]
        flags += ["--trainer.callbacks+=StructuralPruning", "--model=BoringModel", "--trainer.logger=false"]
        cli = LightningCLI(subclass_mode_model=True, run=False, args=flags)
        assert [type(callback).__name__ for callback in cli.trainer.callbacks[:2]] == ["GReg1", "StructuralPruning"]
    """
    code = f"{imports}\nfrom lightning.pytorch.demos.boring_classes import BoringModel\n{textwrap.dedent(code)}"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'unknown'"):
        _ = lightning_prune.unknown


def test_the_type_marker_is_there() -> None:
    assert (Path(lightning_prune.__file__).parent / "py.typed").exists()


def declared_version() -> str:
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    return str(version)


def test_changelog_knows_the_version() -> None:
    assert f"## {declared_version()}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
