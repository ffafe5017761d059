"""The Python in README and docs runs, and their links lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_prune

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")


class Net(LightningModule):
    """What the pages mean by a LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.net = nn.Sequential(*layers, nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Data(LightningDataModule):
    """What the pages mean by data."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.randn(16, 1, 8, 8), torch.arange(16) % 10), batch_size=8)

    val_dataloader = train_dataloader


@pytest.fixture
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    files = [path for path in tmp_path.rglob("*") if path.is_file() and "tfevents" not in path.name]
    known = {".json", ".html", ".safetensors", ".ckpt", ".csv", ".png", ".pt2", ".yaml"}
    assert {path.suffix for path in files} <= known


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_runs(page: Path) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    names: dict[str, Any] = {
        **{"Net": Net, "Data": Data, "model": model, "data": Data()},
        **{"images": torch.randn(4, 1, 8, 8), "optimizer": optimizer},
    }
    for block in PYTHON.findall(page.read_text(encoding="utf-8")):
        exec(compile(block, str(page), "exec"), names)


def test_there_is_code_to_run() -> None:
    assert sum(len(PYTHON.findall(page.read_text(encoding="utf-8"))) for page in PAGES) >= 9


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        path = (page.parent / target) if target else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_reference_is_whole() -> None:
    """Every public name is in the API reference, and every page in the table of contents."""
    reference = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    documented = {name.rpartition(".")[2] for name in re.findall(r"^\.\. auto\w+:: ([\w.]+)$", reference, re.MULTILINE)}
    assert documented >= set(lightning_prune.__all__) - {"__version__"}
    contents = (ROOT / "docs" / "contents.md").read_text(encoding="utf-8")
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} - {"contents"} <= set(contents.split())
