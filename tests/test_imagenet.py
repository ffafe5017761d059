"""The ImageNet recipes: in a miniature each, and their arithmetic at full length."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from lightning_prune import schedules

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "imagenet"
IMAGES = 1_281_167
SHORT = {"schedule": "null", "epochs": "1"}
RECIPES: dict[str, tuple[dict[str, str], set[int] | None]] = {
    "resnet34_greg1": (SHORT, {32, 51, 153}),
    "resnet34_greg2": (SHORT, {32, 51, 153}),
    "resnet34_tpp": (SHORT, {32, 51, 153}),
    "resnet50_ascp": ({"epochs": "1"}, {38, 76, 153, 307}),
    "resnet50_greg1": (SHORT, {25, 51, 102, 404}),
    "resnet50_greg2": (SHORT, {25, 51, 102, 404}),
    "resnet50_mask_sparsity": ({"epochs": "2", "global_epochs": "1"}, None),
    "resnet50_tpp": (SHORT, {25, 51, 102, 404}),
}
"""What makes the sparse stage short, and the widths that the papers' ratios leave."""

LENGTHS = {
    "greg1": (schedules.GREG1_IMAGENET, 5),
    "greg2": (schedules.GREG2_IMAGENET, 5),
    "tpp": (schedules.TPP_IMAGENET, 18),
}


def recipe(name: str) -> dict[str, Any]:
    """A recipe's values."""
    found: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 images of noise in three classes, in the layout of ImageNet."""
    root, chance = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for label in ("n01", "n02", "n03"):
            (root / part / label).mkdir(parents=True)
            for number in range(count):
                pixels = chance.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / label / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def script() -> Any:
    """``train.py`` as a module."""
    spec = importlib.util.spec_from_file_location("imagenet_train", FOLDER / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_recipe_is_known() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {"base", *RECIPES}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs_on_a_folder_of_images(name: str, folder: Path, script: Any, tmp_path: Path) -> None:
    changes, widths = RECIPES[name]
    epochs = int(changes["epochs"]) + 1
    options = {
        **{f"--method.init_args.{key}": value for key, value in changes.items()},
        **{"--data.root": folder, "--data.side": 32, "--data.workers": 0, "--data.batch_sizes": "{0: 12, 1: 18}"},
        **{"--model.weights": "null", "--model.classes": 3, "--pruning.latency_batches": "[1]"},
        **{"--trainer.accelerator": "cpu", "--trainer.devices": 1, "--trainer.strategy": "auto"},
        **{"--trainer.precision": "32-true", "--trainer.benchmark": "false", "--trainer.max_epochs": epochs},
        **{"--trainer.enable_progress_bar": "false", "--trainer.enable_model_summary": "false"},
        **{"--trainer.logger.init_args.save_dir": tmp_path, "--trainer.default_root_dir": tmp_path},
    }
    given = [f"{key}={value}" for key, value in options.items()]
    script.main(["fit", "-c", str(FOLDER / "base.yaml"), "-c", str(FOLDER / f"{name}.yaml"), *given])
    (slim,) = tmp_path.rglob("slim.safetensors")
    (path,) = tmp_path.rglob("report.json")
    report = json.loads(path.read_text())
    assert slim.stat().st_size < report["bytes_before"]
    assert report["accuracy"]["finetuned"] is not None
    if widths is not None:
        assert {after for _, before, after in report["layers"] if after < before} == widths
    else:
        budget = recipe(name)["method"]["init_args"]["budget"]["macs"]
        assert report["cost_after"]["macs"] <= budget * report["cost_before"]["macs"]


@pytest.mark.parametrize("name", [name for name in RECIPES if name.rpartition("_")[2] in LENGTHS])
def test_published_constants_end_where_the_finetune_stage_begins(name: str) -> None:
    """90 epochs follow, at ten times the rate, that drops three times."""
    schedule, stage = LENGTHS[name.rpartition("_")[2]]
    values = recipe(name)
    rates, batches = values["model"]["learning_rates"], values["data"]["batch_sizes"]
    steps = IMAGES // batches[0]
    assert (stage - 1) * steps < schedule.length <= stage * steps
    assert list(rates) == [0, stage, stage + 30, stage + 60, stage + 75]
    assert list(rates.values()) == [1e-3, 1e-2, 1e-3, 1e-4, 1e-5]
    assert values["trainer"]["max_epochs"] == stage + 90
    assert set(batches) <= {0, stage}
    assert list(batches.values())[-1] == 256


def test_values_hold_until_the_next_epoch_named(script: Any) -> None:
    assert [script.at({0: 1.0, 2: 0.5}, epoch) for epoch in range(4)] == [1.0, 1.0, 0.5, 0.5]
