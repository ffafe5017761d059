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

from benchmarks import accuracy, overhead, speed, tables, trainability
from benchmarks.images import Images
from benchmarks.markdown import code
from benchmarks.networks import cifar_resnet
from benchmarks.pages import RESULTS

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


def test_latency_is_measured_again_where_it_is_quiet(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def timed(networks: dict[str, torch.nn.Module], inputs: dict[str, torch.Tensor], turns: int) -> Any:
        counts = [sum(each.numel() for each in networks[name].parameters()) for name in ("dense", "slim")]
        seen.append((counts[0], counts[1]))
        return speed.time_in_turns(networks, inputs, 3)

    monkeypatch.setattr(accuracy, "time_in_turns", timed)
    before = results(whole)
    for values in run(whole, *DIGITS, "--latency").values():
        report, (one, many) = values["report"], values["latency"]["rows"]
        assert [one["batch"], many["batch"]] == [1, 64]
        assert min(one["dense_ms"], one["slim_ms"]) > 0
        assert accuracy.page.latency(values)[1] == (many["dense_ms"], many["slim_ms"])
        assert (report["cost_before"]["parameters"], report["cost_after"]["parameters"]) in seen
    assert results(whole) == before


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


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options for a network that takes milliseconds instead of ResNet-56."""
    monkeypatch.setitem(overhead.NETWORKS, "resnet56", overhead.Case(lambda: cifar_resnet(1, 8), 2, 16, 10, 391))
    return ["--threads", "1", "--turns", "3", "--out", "overhead.json"]


def test_overhead_goes_on_method_by_method(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    names = list(overhead.TARGETS)
    for count in range(1, len(names) + 1):
        overhead.main([*tiny, "--minutes", "0"])
        rows = json.loads(Path("overhead.json").read_text())["rows"]
        assert [row["method"] for row in rows] == names[:count]
    for row in rows:
        for key in ("ours", "loops", "own", "own_loops"):
            low, middle, high = row[key]
            assert 0 < low <= middle <= high
        assert row["own"][0] > 1
        assert ("epoch_end" in row) == (row["method"] == "ASCP")
    shown = capsys.readouterr().out
    assert all(f"\n| {code(name)} | " in shown for name in names)
    assert " with `gram_every=16`." in shown and "whose last quarter has final clusters: 1." in shown
    before = Path("overhead.json").read_text()
    overhead.main(tiny)
    assert Path("overhead.json").read_text() == before
    rows[0].pop("own")  # as a file from before own times were measured
    Path("overhead.json").write_text(json.dumps({"rows": rows}))
    overhead.main([*tiny, "--methods", names[0]])
    rows = json.loads(Path("overhead.json").read_text())["rows"]
    assert all("own" in row for row in rows)
    overhead.main([*tiny, "--again", "--methods", "TPP"])
    again = json.loads(Path("overhead.json").read_text())["rows"]
    assert sorted(row["method"] for row in again) == sorted(names)
    assert [row for row in again if row["method"] != "TPP"] == [row for row in rows if row["method"] != "TPP"]


@pytest.mark.usefixtures("tiny")
@pytest.mark.filterwarnings("ignore")  # of constants for longer stages
@pytest.mark.parametrize("method", overhead.TARGETS)
def test_who_has_the_turn_penalises_and_nobody_else(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each turn's gradients beside those of the same weights without any callback."""
    pulled: dict[str, list[float]] = {}

    class Watch(overhead.Turns):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            images, labels = trainer.fit_loop._data_source.instance._batch
            plain = torch.autograd.grad(
                F.cross_entropy(pl_module.net(images), labels), [*pl_module.parameters()], retain_graph=False
            )
            pairs = zip(pl_module.parameters(), plain, strict=True)
            gap = max(float((parameter.grad - gradient).abs().max()) for parameter, gradient in pairs)
            pulled.setdefault(self._role(), []).append(gap)

    monkeypatch.setattr(overhead, "Turns", Watch)
    overhead.measure("resnet56", method, 2)
    assert set(pulled) == {*overhead.TURNS, *overhead.INSIDE}
    counted = {role: gaps[overhead.WARM :] for role, gaps in pulled.items()}
    assert [len(gaps) for gaps in counted.values()] == [2 + 2, 2, 2, 2, 2]  # dense: the first batch, and the last turn
    assert max(counted["dense"]) < 1e-6
    assert min(counted["loops"]) > 1e-6
    if method != "ASCP":  # which works at an epoch's end alone
        assert min(counted["ours"]) > 1e-6
    if not method.startswith("ASCP"):
        assert min(counted["ours, inside"]) > min(counted["ours"])  # the penalty comes once more


def test_speed_writes_what_it_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "find_spec", lambda name: None)  # what Torch-Pruning leaves takes a search
    options = ["--network", "resnet18", "--batch", "1", "--side", "32", "--turns", "2", "--threads", "1"]
    speed.main([*options, "--out", "speed.json"])
    found = json.loads(Path("speed.json").read_text())
    dense, slim, *_ = found["rows"]
    assert [dense["network"], slim["network"]] == ["dense", "slim"]
    assert dense["efficiency"] == 1
    assert 0.45 <= slim["macs"] / dense["macs"] <= 0.5
    assert slim["efficiency"] == pytest.approx(slim["by_the_clock"] / slim["on_paper"])
    assert found["command"].startswith("benchmarks/speed.py --network resnet18")
    assert f"{slim['on_paper']:.2f}x" in capsys.readouterr().out


def test_trainability_judges_by_what_it_has_measured(capsys: pytest.CaptureFixture[str]) -> None:
    trainability.main(["--epochs", "1", "--seeds", "2", "--output", "found/trainability.json"])
    found = json.loads(Path("found/trainability.json").read_text())
    assert list(found["rows"]) == list(trainability.ROWS)
    for name, runs in found["rows"].items():
        assert [each["seed"] for each in runs] == [0, 1]
        assert {*runs[0]["hidden_neurons"]} == {100 if name == "dense" else 20}
    singular = {
        name: sum(each["mean_jacobian_singular_value"] for each in runs) for name, runs in found["rows"].items()
    }
    assert found["verdict"]["times_l1"] == pytest.approx(singular["TPP"] / singular["L1"])
    assert singular["L1 + OrthP"] == pytest.approx(2, rel=1e-5)
    assert f"Targets met: {found['verdict']['targets_met']}" in capsys.readouterr().out
    assert found["verdict"] == trainability.judge(found["rows"])


def test_the_pages_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("docs").mkdir()
    monkeypatch.setattr(tables, "ROOT", Path())
    tables.main()
    assert Path("docs/benchmarks.md").read_text() == tables.benchmarks(RESULTS)
    assert Path("docs/coverage.md").read_text().startswith("# Coverage")
