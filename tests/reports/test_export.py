"""Exported files compute what the network does, or don't come to be."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_prune import ConfigurationError, ExportError, choose, export, prune_, trace
from lightning_prune.reports import Cost, PruningReport, read_report, surgery_table, write_report
from tests.reports.untouched import untouched

FORMATS = {"onnx": "net.onnx", "torch_export": "net.pt2"}
every_format = pytest.mark.parametrize("format", FORMATS)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, 3))


class TwoInputs(nn.Module):
    """Positional and named arguments, a flag, and a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 6), nn.Linear(5, 6)

    def forward(self, left: Tensor, *, right: Tensor, doubled: bool = False) -> dict[str, Tensor]:
        whole = self.left(left) + self.right(right)
        return {"sum": 2 * whole if doubled else whole, "left": left.sum(1)}


@every_format
def test_a_slim_network_is_exported_for_any_batch(format: str, tmp_path: Path) -> None:
    model, images = network(), torch.randn(1, 1, 6, 6)
    prune_(model, choose(trace(model, images), 0.5))
    with untouched(model):
        exported = export(model, tmp_path / FORMATS[format], images, format=format)
    assert exported.batches == (2, 3)
    assert 0 <= exported.error < 1e-5
    assert exported.size == (tmp_path / FORMATS[format]).stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == [FORMATS[format]]
    assert FORMATS[format] in str(exported) and '"error"' in exported.to_json()
    assert (exported.opset is None) == (format == "torch_export") and "opset" in exported.to_json()


def test_the_result_is_named_in_the_report(tmp_path: Path) -> None:
    """In the data, on the page and in the table; once per file, and nothing is written for a report that is none."""
    model, images, report = network(), torch.randn(2, 1, 6, 6), tmp_path / "report.json"
    write_report(PruningReport([("0", 16, 8)], Cost(800, 100), Cost(400, 50)), report)
    first, _, other = (
        export(model, tmp_path / name, images, format=format, report=report)
        for name, format in (("a.onnx", "onnx"), ("b.pt2", "torch_export"), ("b.pt2", "torch_export"))
    )
    named = read_report(report)
    assert named.exports == (first, other) and PruningReport.from_json(named.to_json()) == named
    page = (tmp_path / "report.html").read_text()
    assert "Exported files" in page and "a.onnx" in page and f"onnx (opset {first.opset})" in page
    assert f"Exported: {first}." in str(surgery_table(named).caption)
    (tmp_path / "foreign.json").write_text("{}")
    for path, said in (("foreign.json", "pruning report"), ("none.json", "can't be read: No such file")):
        with pytest.raises(ConfigurationError, match=said):
            export(model, tmp_path / "c.pt2", images, format="torch_export", report=tmp_path / path)
    assert not (tmp_path / "c.pt2").exists()


def test_onnx_runs_at_another_batch(tmp_path: Path) -> None:
    import onnxruntime

    model = network().eval()
    export(model, tmp_path / "net.onnx", torch.randn(4, 1, 6, 6))
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    images = torch.randn(9, 1, 6, 6)
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(images).detach(), rtol=1e-4, atol=1e-5)


@every_format
def test_named_arguments_and_several_outputs(format: str, tmp_path: Path) -> None:
    kwargs = {"right": torch.randn(2, 5), "doubled": True}
    exported = export(TwoInputs(), tmp_path / FORMATS[format], torch.randn(2, 4), kwargs, format=format)
    assert exported.error < 1e-5


@every_format
def test_a_lightning_module_brings_its_example(format: str, tmp_path: Path) -> None:
    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.example_input_array = torch.randn(3, 1, 6, 6)

        def forward(self, images: Tensor) -> Tensor:
            return self.net(images)

    exported = export(Module(), tmp_path / FORMATS[format], format=format, dynamic_batch=False)
    assert exported.batches == (3,)


class Fixed(nn.Module):
    """Works with four samples only."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.arange(1.0, 5.0)[:, None]


class Random(nn.Module):
    """Computes something else each time."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


@every_format
@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (Fixed(), {}, "dynamic_batch=False keeps"),
        (Random(), {}, "departs from the model"),
        (nn.Linear(4, 4), {"tolerance": 1e-30}, None),
    ],
    ids=["fixed", "random", "exact"],
)
def test_nothing_is_written_that_is_not_equal(
    format: str, model: nn.Module, options: dict[str, Any], said: str | None, tmp_path: Path
) -> None:
    target = tmp_path / FORMATS[format]
    if said is None and format == "torch_export":
        assert export(model, target, torch.randn(4, 4), format=format, **options).error == 0
        return
    with pytest.raises(ExportError, match=said):
        export(model, target, torch.randn(4, 4), format=format, **options)
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "net.onnx"
    with pytest.raises(ConfigurationError, match="format='pickle' must be one of onnx, torch_export"):
        export(network(), target, torch.zeros(2, 1, 6, 6), format="pickle")
    with pytest.raises(ConfigurationError, match="Give example_inputs"):
        export(network(), target)
    with pytest.raises(ConfigurationError, match="tolerance=0 must be positive"):
        export(network(), target, torch.zeros(2, 1, 6, 6), tolerance=0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnx" else sys)
    with pytest.raises(ConfigurationError, match=r"ONNX needs onnx, .*pip install 'lightning-prune\[export\]'"):
        export(network(), target, torch.zeros(2, 1, 6, 6))
