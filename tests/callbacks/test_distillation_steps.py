"""What users' modules and steps do, and which of their calls the teacher is asked about."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor, nn
from torch.nn import functional

from lightning_prune import Magnitude
from lightning_prune.callbacks import distillation
from lightning_prune.callbacks.structural import StructuralPruning
from lightning_prune.callbacks.teacher import Teacher, _folder
from lightning_prune.errors import ConfigurationError
from tests.callbacks.distilling import surgeon
from tests.callbacks.nets import feature_loader, linear_net, seeded, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory",
    "ignore:.*callbacks used to create",
    "ignore:The dirpath",
)

TAUGHT = 8  # batches behind surgery


class Whole(LightningModule):
    """Calls its own forward."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net: Any = linear_net() if net is None else net

    def forward(self, features: Tensor) -> Any:
        return self.net(features)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Direct(Whole):
    """Calls its network."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])


def fit(folder: Path, task: Any, surgery: StructuralPruning | None = None, start: int = 1) -> StructuralPruning:
    """Surgery after epoch 2 of 4."""
    surgery = surgeon() if surgery is None else surgery
    run = trainer(surgery, Magnitude(0.5, start=start, epochs=2 - start), max_epochs=4, default_root_dir=folder)
    run.fit(task, feature_loader(4))
    return surgery


Pairs = list[tuple[Tensor, Tensor]]


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> Pairs:
    """The student's and the teacher's logits of every call that counted."""
    found: Pairs = []
    plain = distillation.distillation

    def noted(student: Tensor, teacher: Tensor, *rest: Any) -> Any:
        found.append((student.detach().clone(), teacher.detach().clone()))
        return plain(student, teacher, *rest)

    monkeypatch.setattr(distillation, "distillation", noted)
    return found


LAST = list(feature_loader(4))[-1][0]


@pytest.mark.parametrize("kind", [Whole, Direct])
def test_a_hook_that_changes_the_inputs_changes_the_teachers_once(
    kind: type[Whole], pairs: Pairs, tmp_path: Path
) -> None:
    task = seeded(kind)
    (task if kind is Whole else task.net).register_forward_pre_hook(lambda _, args: ((args[0] - 5) / 2,))
    twin: Any = fit(tmp_path, task)._distiller._teacher.network
    expected = nn.Sequential.forward(twin.net, (LAST - 5) / 2)
    assert len(pairs) == TAUGHT
    assert torch.allclose(pairs[-1][1], expected, atol=1e-5)


class Split(nn.Module):
    """Two parts that are called by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(features))
        return logits


def test_a_head_on_frozen_features_is_refused(tmp_path: Path) -> None:
    """They don't depend on what is learnt, but they are the slim network's."""

    class Frozen(Whole):
        def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
            with torch.no_grad():
                features = self.net.body(batch[0])
            return functional.cross_entropy(self.net.head(features), batch[1])

    task = seeded(lambda: Frozen(Split()))
    with pytest.raises(ConfigurationError, match=r"'net.head' is called with what other layers have computed"):
        fit(tmp_path, task, surgeon(logits_from="net.head", module="net.body"))


def test_a_network_beside_the_forward_counts_where_it_has_all(pairs: Pairs, tmp_path: Path) -> None:
    """The pruned network is the LightningModule then."""

    class Beside(Whole):
        def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
            self(batch[0])
            return functional.cross_entropy(self.net(batch[0].flip(0)), batch[1].flip(0))

    fit(tmp_path, seeded(Beside), surgeon(logits_from="net"))
    assert len(pairs) == TAUGHT


# What the loss comes of.


class Adversarial(Whole):
    """An attack on the input, whose graph is used up as the loss comes."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        features = batch[0].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(functional.cross_entropy(self(features), batch[1]), features)
        return functional.cross_entropy(self((batch[0] + 0.01 * gradient.sign()).detach()), batch[1])


class Virtual(Whole):
    """A step in direction of the gradient, twice, from a point that is learnt itself."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        change = torch.zeros_like(batch[0]).requires_grad_()
        for _ in range(2):
            loss = functional.cross_entropy(self(batch[0] + change), batch[1])
            change = (change + 0.01 * torch.autograd.grad(loss, change)[0].sign()).detach().requires_grad_()
        return functional.cross_entropy(self(batch[0] + change.detach()), batch[1])


@pytest.mark.parametrize("kind", [Adversarial, Virtual])
def test_an_attack_is_not_taught(kind: type[Whole], pairs: Pairs, tmp_path: Path) -> None:
    assert fit(tmp_path, seeded(kind)).finished
    assert len(pairs) == TAUGHT


class Heads(nn.Module):
    """Of two heads the first one gives the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU())
        self.one, self.two = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        found = self.body(features)
        return {"logits": self.one(found), "two": self.two(found)}


class Turns(Whole):
    """The loss takes one head or the other."""

    def __init__(self) -> None:
        super().__init__(Heads())

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self(batch[0])["two" if batch_idx % 2 else "logits"], batch[1])


def test_logits_that_the_loss_does_not_use_are_not_taught(pairs: Pairs, tmp_path: Path) -> None:
    """Which is said once."""
    with pytest.warns(UserWarning, match="comes of no logits of the LightningModule") as said:
        assert fit(tmp_path, seeded(Turns)).finished
    assert len(pairs) == TAUGHT // 2
    assert sum("comes of no logits" in str(each.message) for each in said) == 1


@pytest.mark.parametrize("kind", [Whole, Direct])
def test_a_pass_for_the_log_alone_does_not_count(kind: type[Whole], pairs: Pairs, tmp_path: Path) -> None:
    """It may be another module's, and come now and then."""

    class Logging(Whole):
        def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
            if batch_idx == 0:
                self.log("mean", self(batch[0]).detach().mean())
            return kind.training_step(self, batch, batch_idx)

    assert fit(tmp_path, seeded(Logging), surgeon(logits_from="net" if kind is Direct else None)).finished
    assert len(pairs) == TAUGHT


# Copies of the module.


class Stubborn:
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("no copies")


HELD: dict[str, Any] = {
    "list": lambda: [threading.Lock()],
    "dict": lambda: {"a": ({threading.Lock()},)},
    "queue": multiprocessing.Queue,
    "any error": Stubborn,
}


@pytest.mark.parametrize("held", HELD)
def test_what_can_not_be_copied_is_shared_with_the_teacher(
    held: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is copied on the way that copies of the module leave out, such as its trainer."""
    monkeypatch.setattr(Trainer, "__deepcopy__", lambda *_: pytest.fail("the trainer is copied"), raising=False)
    task = seeded(Direct)
    task.held = HELD[held]()
    surgery = fit(tmp_path, task)
    twin: Any = surgery._distiller._teacher.network
    if held in ("queue", "any error"):
        assert twin.held is task.held
    assert surgery.finished


def test_a_module_that_can_not_be_copied_is_refused_in_the_first_batch(tmp_path: Path) -> None:
    class Uncopied(Whole):
        def __deepcopy__(self, memo: Any) -> Any:
            raise ValueError("there is one of me")

    task = seeded(Uncopied)
    with pytest.raises(ConfigurationError, match=r"Uncopied can't be copied .*there is one of me"):
        fit(tmp_path, task)
    assert task.trainer.global_step == 0


# What the teacher is made of.


class Growing(Whole):
    """Keeps a record, and a scale that isn't saved."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(0))
        self.register_buffer("scale", torch.ones(()), persistent=False)
        self.scales: list[float] = []

    def forward(self, features: Tensor) -> Any:
        return self.scale * self.net(features)

    def on_train_epoch_start(self) -> None:
        self.scales.append(float(self.scale))

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        self.seen = torch.cat([self.seen, batch[1][:1].float()])
        self.scale.mul_(1.1)
        return super().training_step(batch, batch_idx)


def test_buffers_that_grow_and_those_that_are_not_saved(pairs: Pairs, tmp_path: Path) -> None:
    task = seeded(Growing)
    twin: Any = fit(tmp_path, task)._distiller._teacher.network
    assert len(pairs) == TAUGHT
    assert twin.seen.tolist() == task.seen[:4].tolist()
    assert float(twin.scale) == task.scales[1] != task.scales[2]
    assert torch.equal(pairs[-1][1], twin.scale * nn.Sequential.forward(twin.net, LAST))


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("given", [True, False])
def test_a_network_without_shapes_is_refused_before_the_first_step(given: bool, tmp_path: Path) -> None:
    torch.save(seeded(Whole).state_dict(), tmp_path / "dense.pt")
    task = seeded(lambda: Whole(nn.Sequential(nn.LazyLinear(12), nn.Tanh(), nn.Linear(12, 4))))
    with pytest.raises(ConfigurationError, match=r"'net.0.weight' has no shape yet; call it once before fit"):
        fit(tmp_path, task, surgeon(teacher=tmp_path / "dense.pt") if given else None, start=0)
    assert task.trainer.global_step == 0


@pytest.mark.parametrize("odd", [torch.ones(2, 2).to_sparse(), torch.ones(2, dtype=torch.complex128)])
def test_what_the_file_can_not_hold_is_refused_before_the_first_step(odd: Tensor, tmp_path: Path) -> None:
    task = seeded(Whole)
    task.net.register_buffer("odd", odd)
    with pytest.raises(ConfigurationError, match=r"safetensors file, which can't hold 'net.odd'"):
        fit(tmp_path, task)
    assert task.trainer.global_step == 0


def test_a_second_name_of_a_module_is_a_name(pairs: Pairs, tmp_path: Path) -> None:
    class Aliased(Whole):
        def __init__(self) -> None:
            super().__init__()
            self.head = self.net[4]

    fit(tmp_path, seeded(Aliased), surgeon(logits_from="head"))
    assert len(pairs) == TAUGHT


def test_files_that_hold_no_weights_or_lie_elsewhere(tmp_path: Path) -> None:
    def given(content: Any) -> StructuralPruning:
        torch.save(content, tmp_path / "dense.pt")
        return surgeon(teacher=tmp_path / "dense.pt")

    with pytest.raises(ConfigurationError, match=r"dense.pt' does not fit: of 6 tensors .* lacks"):
        fit(tmp_path, seeded(Whole), given({"state_dict": None}))
    state = seeded(Whole, seed=5).state_dict()
    broken = {**state, "net.0.bias": state["net.0.bias"] * float("nan")}
    with pytest.raises(ConfigurationError, match=r"dense.pt' holds numbers in 'net.0.bias' that are none"):
        fit(tmp_path, seeded(Whole), given(broken))
    given(state)
    data = (tmp_path / "dense.pt").read_bytes()
    get_filesystem("memory://taught").pipe_file("memory://taught/dense.pt", data)
    twin: Any = fit(tmp_path, seeded(Whole), surgeon(teacher="memory://taught/dense.pt"))._distiller._teacher.network
    assert torch.equal(twin.net[0].weight, state["net.0.weight"])


def test_another_content_of_the_given_file_is_told(tmp_path: Path) -> None:
    """Before the sparse stage nothing has been learnt from the first one."""
    ends = {}
    for seed in (5, 6):
        torch.save(seeded(Whole, seed=seed).state_dict(), tmp_path / "dense.pt")
        teacher = Teacher(tmp_path / "dense.pt")
        teacher.restore(None, ends.get(5))
        said = pytest.warns(UserWarning, match="holds other weights than when") if ends else nullcontext()
        with said:
            teacher.meet(trainer(), seeded(Whole), is_dense=True)
        ends[seed] = teacher.given
    assert ends[5] != ends[6]


def test_the_teacher_lies_beside_the_checkpoints(tmp_path: Path) -> None:
    """And not where another callback would put what an exception leaves."""
    keepers = [OnExceptionCheckpoint(tmp_path / "failed"), ModelCheckpoint(tmp_path / "kept")]
    assert _folder(trainer(*keepers, enable_checkpointing=True)) == str(tmp_path / "kept")
