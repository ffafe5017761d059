"""Every benchmark in a miniature: it runs to its end, and says what it has measured."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch.nn import functional as F

from benchmarks import accuracy
from benchmarks.images import Images

SMALL = ["--threads", "1", "--runs", "1", "--few", "16", "--batch", "4", "--epochs", "1", "1", "1"]


@pytest.fixture(autouse=True)
def _leave_no_trace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    threads, logger = torch.get_num_threads(), logging.getLogger("lightning.pytorch")
    level = logger.level
    yield
    torch.set_num_threads(threads)
    logger.setLevel(level)


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both data sets in the layout that torchvision reads, of noise."""
    root, chance = tmp_path_factory.mktemp("cifar"), np.random.default_rng(0)

    def write(path: Path, labels: str, classes: int) -> None:
        path.parent.mkdir(exist_ok=True)
        pixels = chance.integers(0, 256, (8, 3 * 32 * 32), dtype=np.uint8)
        path.write_bytes(pickle.dumps({"data": pixels, labels: chance.integers(0, classes, 8).tolist()}))

    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        write(root / "cifar-10-batches-py" / name, "labels", 10)
    for name in ("train", "test"):
        write(root / "cifar-100-python" / name, "fine_labels", 100)
    names = pickle.dumps({"label_names": list("abcdefghij"), "fine_label_names": [str(each) for each in range(100)]})
    (root / "cifar-10-batches-py" / "batches.meta").write_bytes(names)
    (root / "cifar-100-python" / "meta").write_bytes(names)
    return root


@pytest.fixture
def root(cifar: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, whose files have other sums than the real ones."""
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, *_: Path(path).exists())
    return cifar


def run(out: Path, *options: object) -> dict[str, Any]:
    """The results of one call of ``accuracy.py``, by the names of their files."""
    accuracy.main([*map(str, options), "--out", str(out)])
    return {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}


def test_there_is_a_miniature_of_every_preset() -> None:
    assert set(accuracy.PRESETS) == {"digits", *PRESETS}


PRESETS = {
    "cpu": ["ASCP", "GReg2", "MaskSparsity", "TPP"],
    "resnet56": ["Magnitude"],
    "resnet110": ["Magnitude"],
    "vgg19": ["Magnitude"],
}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs_to_its_end(
    preset: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = PRESETS[preset]
    found = run(tmp_path / "out", "--preset", preset, "--root", root, *SMALL, "--methods", *methods)
    share, seed = accuracy.PRESETS[preset].runs[0]
    assert set(found) == {f"{method}-{share:.3f}-{seed}" for method in methods}
    for values in found.values():
        report = values["report"]
        assert report["cost_after"]["macs"] <= share * report["cost_before"]["macs"]
        assert set(report["accuracy"]) == {"dense", "before", "after", "finetuned"}
        assert all(0 <= value <= 1 for value in report["accuracy"].values())
        assert values["preset"] == preset
        assert values["epochs"] == [1, 1, 1]
    shown = capsys.readouterr().out
    assert "A miniature of 16 images; 1 + 1 + 1 epochs" in shown
    assert all(f"\n| {method} | 1 | " in shown for method in methods)


DIGITS = ["--preset", "digits", "--threads", "1", "--runs", "1", "--few", "64", "--batch", "16"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run of two epochs a stage lies that nobody has interrupted."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out)
        run(out, *DIGITS, "--epochs", "2", "2", "2", "--methods", "GReg1", "Magnitude")
    return out


def results(out: Path) -> dict[str, Any]:
    """Of every run its accuracies and layers."""
    found = (json.loads(path.read_text()) for path in out.glob("*.json"))
    return {each["method"]: [each["report"][key] for key in ("accuracy", "layers", "validations")] for each in found}


def weights(out: Path, name: str) -> dict[str, torch.Tensor]:
    """Of a run's latest checkpoint."""
    state: dict[str, torch.Tensor] = torch.load(out / name / "last.ckpt", weights_only=True)["state_dict"]
    return state


def test_runs_in_pieces_end_as_whole_ones_do(whole: Path, tmp_path: Path) -> None:
    """Every call stops at the end of an epoch; the sixth epoch of the second method is the tenth of all."""
    options = [*DIGITS, "--epochs", "2", "2", "2", "--methods", "GReg1", "Magnitude", "--minutes", "0"]
    calls = 0
    while len(run(tmp_path, *options)) < 2:
        calls += 1
        assert calls < 12
    assert calls >= 4
    assert results(tmp_path) == results(whole)
    for name in ("dense-0", "GReg1-0.500-0", "Magnitude-0.500-0"):
        pieces, one = weights(tmp_path, name), weights(whole, name)
        assert pieces.keys() == one.keys()
        assert all(torch.equal(pieces[key], one[key]) for key in one)


def test_the_time_that_is_up_leaves_nothing_half_done(tmp_path: Path) -> None:
    assert run(tmp_path, *DIGITS, "--epochs", "3", "1", "1", "--methods", "Magnitude", "--minutes", "0") == {}
    state = torch.load(tmp_path / "dense-0" / "last.ckpt", weights_only=True)
    assert state["epoch"] == 0
    assert not (tmp_path / "dense-0.safetensors").exists()


def test_a_kept_dense_network_begins_other_runs(whole: Path, tmp_path: Path) -> None:
    dense = whole / "dense-0.safetensors"
    found = run(tmp_path, *DIGITS, "--epochs", "2", "2", "2", "--methods", "Magnitude", "--dense", dense)
    (values,) = found.values()
    assert values["epochs"] == [0, 2, 2]
    assert values["report"]["accuracy"]["dense"] == results(whole)["Magnitude"][0]["dense"]
    assert not list(tmp_path.glob("dense-*"))


def test_a_compiled_network_is_compiled_again_after_surgery(whole: Path, tmp_path: Path) -> None:
    """The compiler sees dense and slim weights, and the numbers stay those of the network as it is written."""
    shapes: set[tuple[int, ...]] = set()

    def look(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        shapes.update(tuple(each.shape) for each in inputs if isinstance(each, torch.Tensor) and each.dim() == 4)
        return graph.forward

    torch.compiler.reset()
    torch._dynamo.register_backend(look, name="look")
    options = [*DIGITS, "--epochs", "2", "2", "2", "--methods", "GReg1", "--compile", "look"]
    (values,) = run(tmp_path, *options).values()
    assert results(tmp_path)["GReg1"] == results(whole)["GReg1"]
    for _, before, after in values["report"]["layers"]:
        assert {width for shape in shapes for width in shape[:1]} >= {before, after}


def test_each_epoch_of_images_has_an_order_and_crops_of_its_own(root: Path) -> None:
    data = Images("cifar10", str(root), 4, 0)
    data.setup("fit")
    assert [len(images) for images, _ in data.parts] == [40, 8]
    first, again = (list(data.train_dataloader()) for _ in range(2))
    assert all(torch.equal(one, two) for pair in zip(first, again, strict=True) for one, two in zip(*pair, strict=True))
    other = Images("cifar10", str(root), 4, 1)
    other.setup("fit")
    assert not torch.equal(next(iter(other.train_dataloader()))[1], first[0][1])
    assert len(first) == 10
    assert sorted(torch.cat([labels for _, labels in first]).tolist()) == sorted(data.parts[0][1].tolist())


def test_crops_are_windows_of_the_padded_image(root: Path) -> None:
    data = Images("cifar10", str(root), 4, 0)
    data.setup("fit")
    loader = data.train_dataloader()
    assert loader.chances is not None
    seen = set()
    for (images, _), part, (shift, mirrored) in zip(loader, loader.parts, loader.chances, strict=True):
        padded = F.pad(data.parts[0][0][part], (4, 4, 4, 4))
        for image, source, down, right, is_mirrored in zip(
            images, padded, *shift[..., 0].tolist(), mirrored[:, 0].tolist(), strict=True
        ):
            window = source[:, down : down + 32, right : right + 32]
            assert torch.equal(image, window.flip(2) if is_mirrored else window)
            seen.add((down, right, is_mirrored))
    assert len(seen) > 20
    assert {each for down, right, _ in seen for each in (down, right)} == set(range(9))
