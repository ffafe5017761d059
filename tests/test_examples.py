"""The examples do what they say: the demo, and every YAML through LightningCLI."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
CONFIGS = sorted(EXAMPLES.glob("configs/*.yaml"))
SHORT = [
    "--trainer.enable_model_summary=false",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
    "--trainer.check_val_every_n_epoch=6",
    "--trainer.enable_progress_bar=false",
]


def run(script: str, *args: str | Path) -> str:
    """Standard output of an example in a process of its own."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(EXAMPLES / script), *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "100"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def demo(folder: Path, *options: str) -> tuple[dict[str, Any], dict[str, float]]:
    """The report and the accuracies that the demo ends in."""
    output = run("demo.py", "--out", folder, *options)
    report = json.loads((folder / "report.json").read_text())
    accuracy = {name: float(value) for name, value in re.findall(r"^  (\w.*?) +(\d\.\d{4})$", output, re.MULTILINE)}
    assert report["cost_after"]["macs"] <= 0.5 * report["cost_before"]["macs"]
    assert [latency["batch"] for latency in report["latency_after"]] == [1, 64]
    assert len(accuracy) == 6
    assert accuracy["masked network"] == accuracy["right after surgery"]
    assert accuracy["slim file, new process"] == accuracy["finetuned"]
    return report, accuracy


@pytest.mark.parametrize("options", [(), ("--optimizer", "adamw")], ids=["sgd", "adamw"])
def test_the_demo_keeps_its_promise(options: tuple[str, ...], tmp_path: Path) -> None:
    """At its full length: half the multiply-adds, within one point of dense, and nothing lost at surgery."""
    _, accuracy = demo(tmp_path, *options)
    assert accuracy["dense"] > 0.97
    assert accuracy["finetuned"] >= accuracy["dense"] - 0.01
    assert abs(accuracy["right after surgery"] - accuracy["just before surgery"]) <= 0.01


@pytest.mark.parametrize("method", ["ascp", "greg2", "magnitude", "mask_sparsity", "tpp"])
def test_the_demo_takes_every_method(method: str, tmp_path: Path) -> None:
    """In a quarter of the time; methods that promise an exact removal keep that however short the stage."""
    _, accuracy = demo(tmp_path, "--epochs", "3", "--method", method)
    assert accuracy["finetuned"] > 0.9
    if method in ("ascp", "mask_sparsity", "tpp"):
        assert abs(accuracy["right after surgery"] - accuracy["just before surgery"]) <= 0.005


def test_every_config_is_known() -> None:
    assert [path.name for path in CONFIGS] == [
        "ascp.yaml",
        "base.yaml",
        "ddp.yaml",
        "greg1.yaml",
        "greg2.yaml",
        "magnitude.yaml",
        "mask_sparsity.yaml",
        "tpp.yaml",
    ]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_runs(config: Path, tmp_path: Path) -> None:
    files = ["-c", EXAMPLES / "configs" / "base.yaml"] + (["-c", config] if config.stem != "base" else [])
    run("train.py", "fit", *files, *SHORT, f"--trainer.logger.save_dir={tmp_path}")
    written = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert ({"slim.safetensors", "report.json"} <= written) == (config.stem != "base")


def test_a_slim_file_begins_another_run(tmp_path: Path) -> None:
    base, greg1 = (["-c", EXAMPLES / "configs" / f"{name}.yaml"] for name in ("base", "greg1"))
    run("train.py", "fit", *base, *greg1, *SHORT, f"--trainer.logger.save_dir={tmp_path}")
    (path,) = tmp_path.rglob("slim.safetensors")
    second = ["--trainer.callbacks+=lightning_prune.LoadPruned", f"--trainer.callbacks.path={path}"]
    run("train.py", "fit", *base, *second, *SHORT, "--trainer.max_epochs=1", f"--trainer.logger.save_dir={tmp_path}")


def test_the_demo_on_two_processes(tmp_path: Path) -> None:
    """Half of each batch for either; its table is the one that the YAML for two processes ends in."""
    report, accuracy = demo(tmp_path / "demo", "--epochs", "3", "--devices", "2")
    assert accuracy["finetuned"] > 0.9
    assert [layer[1:] for layer in report["layers"]] == [[32, 12], [32, 12], [64, 25], [64, 25]]

    files = [part for name in ("base", "ddp") for part in ("-c", EXAMPLES / "configs" / f"{name}.yaml")]
    output = run("train.py", "fit", *files, *SHORT, f"--trainer.logger.save_dir={tmp_path}")
    (path,) = (path for path in tmp_path.rglob("report.json") if path.parent.name != "demo")
    other = json.loads(path.read_text())
    for part in ("layers", "unit", "cost_before", "cost_after", "monitor", "tolerance", "renormalised"):
        assert other[part] == report[part], part
    assert [each["batch"] for each in other["latency_after"]] == [each["batch"] for each in report["latency_after"]]
    assert output.count("From dense to slim") == 1
    for row in ("channels", "net.blocks.0.conv1", "MACs per sample", "parameters", "latency, batch 64, ms", "val_acc"):
        assert row in output


def test_the_callbacks_fit_on_the_command_line(tmp_path: Path) -> None:
    base = EXAMPLES / "configs" / "base.yaml"
    callbacks = ["--trainer.callbacks+=lightning_prune.GReg1", "--trainer.callbacks.ratio=0.5"]
    callbacks += ["--trainer.callbacks.epochs=1", "--trainer.callbacks+=lightning_prune.StructuralPruning"]
    short = [*SHORT, "--trainer.max_epochs=2", f"--trainer.logger.save_dir={tmp_path}"]
    output = run("train.py", "fit", "-c", base, *callbacks, *short, "--model.optimizer=adamw")
    assert "MACs per sample" in output


def test_train_is_short() -> None:
    assert len((EXAMPLES / "train.py").read_text().splitlines()) < 80


@pytest.mark.parametrize("name", ["classifier.py", "data.py"])
def test_model_and_data_know_nothing_of_pruning(name: str) -> None:
    imported = ast.dump(ast.parse((EXAMPLES / name).read_text()))
    assert "lightning_prune" not in imported


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_use_public_names(path: Path) -> None:
    import lightning_prune
    from lightning_prune import reports, structure

    public = {module.__name__: set(module.__all__) for module in (lightning_prune, reports, structure)}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_prune"):
            assert {alias.name for alias in node.names} <= public[node.module or ""]
