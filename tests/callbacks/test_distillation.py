"""Learning from the dense network in the finetune stage: what enters the loss, and where the teacher comes from."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_prune.callbacks.distillation import Distillation
from lightning_prune.errors import ConfigurationError
from tests.callbacks.distilling import ASKED, distilled, surgeon
from tests.callbacks.nets import image_loader, seeded
from tests.callbacks.slimming import BATCHES, Task, assert_equal, run, weights
from tests.contract.test_contract import half_precision

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory", "ignore:.*callbacks used to create", "ignore:The dirpath"
)


class Written(Task):
    """The same, written out by hand: the teacher is a copy of the network that the module keeps to itself."""

    def __init__(self, as_dict: bool = False, **arguments: Any) -> None:
        super().__init__(as_dict=as_dict, **arguments)
        self.teacher: list[nn.Module] = []
        self.parts: list[float] = []

    def on_train_start(self) -> None:
        self.teacher = [copy.deepcopy(self.net).eval().requires_grad_(False)]

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        student = self.logits(batch[0])
        loss = nn.functional.cross_entropy(student, batch[1])
        self.losses.append(float(loss.detach()))
        if self.trainer.current_epoch < 2:
            return loss
        with torch.no_grad():
            teacher = self.teacher[0](batch[0])
        temperature, weight = ASKED["temperature"], ASKED["weight"]
        with torch.autocast("cpu", enabled=False):
            soft = [each.float() if each.dtype != torch.double else each for each in (student, teacher)]
            p, q = (soft[1] / temperature).softmax(1), (soft[0] / temperature).log_softmax(1)
            divergence = (p * (p.log() - q)).sum() / len(p)
        self.parts.append(float(temperature**2 * divergence.detach()))
        return (1 - weight) * loss + weight * temperature**2 * divergence


PRECISE: dict[str, Any] = {"precision": "64-true"}
CONFIGURATIONS: dict[str, Any] = {
    "double precision": lambda: PRECISE,
    "accumulation": lambda: {"accumulate_grad_batches": 4, **PRECISE},
    "clipping": lambda: {"gradient_clip_val": 0.1, **PRECISE},
    "bf16": lambda: {"precision": "bf16-mixed"},
    "fp16": half_precision,
    "fp16 and accumulation": lambda: {"accumulate_grad_batches": 2, **half_precision()},
}


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_it_is_the_loss_that_one_would_write(configuration: str, tmp_path: Path) -> None:
    """Weights at the end, to rounding; and they are not those of a run without."""
    ends = []
    for task, surgery in ((Written, surgeon(distill=None)), (Task, surgeon()), (Task, surgeon(distill=None))):
        settings = CONFIGURATIONS[configuration]()
        extra = settings.pop("callbacks", []) if "callbacks" in settings else []
        ends.append(weights(run(tmp_path, *extra, task=seeded(task), surgery=surgery, **settings).task))
    written, injected, without = ends
    nearness = 1e-11 if "precision" in (made := CONFIGURATIONS[configuration]()) and "64" in made["precision"] else 1e-5
    for name, value in written.items():
        assert torch.allclose(value.double(), injected[name].double(), rtol=nearness, atol=nearness), name
    assert not torch.allclose(injected["net.head.weight"], without["net.head.weight"], atol=1e-3)


def test_the_loss_in_the_log_is_the_divergence_and_falls(tmp_path: Path) -> None:
    class Logged(Callback):
        def __init__(self) -> None:
            self.found: list[float] = []

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if "distillation/loss" in trainer.callback_metrics:
                self.found.append(float(trainer.callback_metrics["distillation/loss"]))

    logged, task = Logged(), seeded(Written)
    run(tmp_path, task=task, surgery=surgeon(distill=None))
    distilled(tmp_path, logged, task=seeded(Task))
    assert logged.found == pytest.approx(task.parts, rel=1e-4) and len(logged.found) == 2 * BATCHES
    one = distilled(tmp_path / "alone", again := Logged(), surgery=surgeon(distill={"weight": 1.0}), max_epochs=8)
    assert sum(again.found[-BATCHES:]) < 0.7 * sum(again.found[:BATCHES])
    assert one.surgery.report is not None


class Forwarding(Task):
    """Its own forward gives the logits."""

    def forward(self, images: Tensor) -> Any:
        return self.net(images)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize("task", [Task, Forwarding])
def test_logits_are_the_same_wherever_they_are_taken(task: type[Task], tmp_path: Path) -> None:
    names = ["net", "net.head", None]
    ends = [weights(distilled(tmp_path, task=seeded(task), surgery=surgeon(logits_from=name)).task) for name in names]
    assert_equal(ends[0], ends[1])
    assert_equal(ends[0], ends[2])


@dataclass
class Output:
    """Of a class that torch knows nothing of."""

    hidden: Tensor
    logits: Tensor


def test_outputs_with_several_tensors(tmp_path: Path) -> None:
    """What is called logits counts."""

    class Objects(Task):
        def forward(self, images: Tensor) -> Output:
            return Output(images, self.net(images))

        def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]).logits, batch[1])

    plain = weights(distilled(tmp_path, task=seeded(Task)).task)
    assert_equal(plain, weights(distilled(tmp_path, task=seeded(Task, as_dict=True)).task))
    assert_equal(plain, weights(distilled(tmp_path, task=seeded(Objects), surgery=surgeon(module="net")).task))


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    run(tmp_path, surgery=surgeon(), fast_dev_run=2)
    assert not list(tmp_path.rglob("*"))


# What can't work.


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"distill": {"temperature": 0}}, "temperature=0 must be a positive number"),
        ({"distill": {"temperature": "4"}}, "temperature='4' must be a positive number"),
        ({"distill": {"temperature": float("inf")}}, "temperature=inf must"),
        ({"distill": {"weight": 0}}, r"weight=0 must lie in \(0, 1\]"),
        ({"distill": {"weight": 1.5}}, r"weight=1.5 must lie in \(0, 1\]"),
        ({"distill": {"weight": True}}, "weight=True must"),
        ({"distill": {"dim": 1.0}}, "dim=1.0 must be a whole number"),
        ({"distill": {"temprature": 4}}, "distill knows temperature, weight, dim, not 'temprature'"),
        ({"teacher": 5}, "teacher=5 must be a name"),
        ({"distill": 0.5}, "distill=0.5 must be a mapping"),
        ({"distill": None, "teacher": "dense.ckpt"}, "teacher='dense.ckpt' needs distill"),
        ({"distill": None, "logits_from": "net"}, "logits_from='net' needs distill"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        surgeon(**arguments)


def test_good_arguments_are_known() -> None:
    assert surgeon(distill={}).distill == Distillation(4.0, 0.5)
    assert surgeon(distill=Distillation(2, 1)).distill == Distillation.of({"temperature": 2, "weight": 1})


class Manual(Task):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Modes(Task):
    """Losses in training, logits in evaluation, as detectors have it."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.fails = fails

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            return self.net(images)
        if self.fails:
            raise ValueError("targets are missing")
        return self.net(images)[:, :2]

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


class Shaped(Task):
    """Logits of another form, and a loss on them."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, images: Tensor) -> Any:
        logits = self.net(images)
        forms = {
            "sequence": logits.unsqueeze(1).expand(-1, 3, -1),
            "pixels": logits[:, :, None, None].expand(-1, -1, 2, 2),
            "two": (logits, logits),
            "numbers": logits.argmax(1),
            "scalar": logits.mean(),
            "silent": logits.detach(),
        }
        self.kept = logits
        return forms[self.form]

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        self(batch[0])
        return nn.functional.cross_entropy(self.kept, batch[1])


@pytest.mark.parametrize(
    ("build", "arguments", "match"),
    [
        (Manual, {}, "under manual optimisation"),
        (Task, {"logits_from": "net.haed"}, "logits_from='net.haed' is no part .* near names are: net.head"),
        (Task, {"logits_from": "xyz"}, "its children are: net, accuracy"),
        (Task, {"logits_from": "accuracy"}, "never calls accuracy with gradients"),
        (Task, {"module": "net"}, "never calls the LightningModule .*logits_from"),
        (lambda: Task(as_dict=True), {"distill": {"dim": 5}}, "dim=5 is out of range"),
        (lambda: Shaped("sequence"), {}, r"shape \(16, 3, 4\); say along which dim"),
        (lambda: Shaped("two"), {}, "gives 2 tensors, none of them called 'logits'"),
        (lambda: Shaped("numbers"), {}, "type torch.int64, which are no logits"),
        (lambda: Shaped("scalar"), {}, "shape .* are no logits"),
        (Modes, {"module": "net"}, r"other shapes than the student's: \[\(16, 2\)\] and \[\(16, 4\)\]"),
        (lambda: Modes(fails=True), {"module": "net"}, r"can't run in evaluation mode .*targets are missing"),
        (lambda: Shaped("silent"), {}, "never calls the LightningModule with gradients"),
    ],
)
def test_what_can_not_work_is_said_in_the_first_batch(
    build: Any, arguments: dict[str, Any], match: str, tmp_path: Path
) -> None:
    task = seeded(build)
    with pytest.raises(ConfigurationError, match=match):
        distilled(tmp_path, task=task, surgery=surgeon(**arguments))
    assert len(task.losses) <= 2  # long before surgery


def test_logits_of_features_are_refused(tmp_path: Path) -> None:
    class Split(Task):
        def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
            self.net(batch[0])
            return nn.functional.cross_entropy(self.net.head(self.net.stem(batch[0]).mean(dim=(2, 3))), batch[1])

    with pytest.raises(ConfigurationError, match="called with what other layers have computed"):
        distilled(tmp_path, task=seeded(Split), surgery=surgeon(logits_from="net.head", module="net"))


@pytest.mark.parametrize(("form", "asked"), [("sequence", {"dim": -1}), ("pixels", {})])
def test_logits_of_many_positions(form: str, asked: dict[str, Any], tmp_path: Path) -> None:
    """Repeated over positions, they are the same as once."""

    class Once(Shaped):
        def forward(self, images: Tensor) -> Tensor:
            self.kept = self.net(images)
            return self.kept

    one = distilled(tmp_path, task=seeded(Once, form), surgery=surgeon())
    many = distilled(tmp_path, task=seeded(Shaped, form), surgery=surgeon(distill={**ASKED, **asked}))
    for name, value in weights(one.task).items():
        assert torch.allclose(value.double(), weights(many.task)[name].double(), atol=1e-6), name


def test_a_change_in_place_is_noticed(tmp_path: Path) -> None:
    class Changing(Forwarding):
        def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]).mul_(2), batch[1])

    with pytest.raises(ConfigurationError, match=r"changes the logits of .* in place"):
        distilled(tmp_path, task=seeded(Changing))


# Steps of another kind.


def test_two_views_count_half_each_and_calls_without_gradients_do_not(tmp_path: Path) -> None:
    class Twice(Forwarding):
        def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
            with torch.no_grad():
                self(batch[0].flip(0))
            halves = [self(half) for half in batch[0].chunk(2)]
            return nn.functional.cross_entropy(torch.cat(halves), batch[1])

    class Still(Twice):
        """Without batch norm in training mode both are the same."""

        def on_train_batch_start(self, *_: Any) -> None:
            self.net.eval()

    class Whole(Still):
        def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

    ends = [weights(distilled(tmp_path, task=seeded(kind), precision="64-true").task) for kind in (Still, Whole)]
    for name, value in ends[0].items():
        assert torch.allclose(value.double(), ends[1][name].double(), atol=1e-12), name


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_batch_without_a_call_or_a_loss_passes(tmp_path: Path) -> None:
    class Skipping(Forwarding):
        def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor | None:  # type: ignore[override]
            if batch_idx == 2:
                return None
            if batch_idx == 4:
                return self.net.head.weight.square().sum()
            return super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="loss of this batch comes of no logits"):
        assert distilled(tmp_path, task=seeded(Skipping)).surgery.finished


def test_activations_that_are_computed_twice_count_once(tmp_path: Path) -> None:
    class Checkpointed(Forwarding):
        def forward(self, images: Tensor) -> Any:
            return torch.utils.checkpoint.checkpoint(self.net, images, use_reentrant=False)

        def on_train_batch_start(self, *_: Any) -> None:
            self.net.eval()  # running statistics would move twice

    class Plain(Checkpointed):
        def forward(self, images: Tensor) -> Any:
            return self.net(images)

    for name in ("net", None):
        ends = [
            weights(distilled(tmp_path, task=seeded(kind), surgery=surgeon(logits_from=name)).task)
            for kind in (Checkpointed, Plain)
        ]
        assert_equal(*ends)


@pytest.mark.filterwarnings("ignore:.*LBFGS")
def test_lbfgs_sees_the_teacher_in_every_closure(tmp_path: Path) -> None:
    class Closures(Written):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

        def on_train_batch_start(self, *_: Any) -> None:
            self.net.eval()

    class Plain(Closures):
        training_step = Task.training_step  # type: ignore[assignment]

    ends = [
        weights(run(tmp_path, task=seeded(kind), surgery=surgery, **PRECISE).task)
        for kind, surgery in ((Closures, surgeon(distill=None)), (Plain, surgeon()))
    ]
    for name, value in ends[0].items():
        assert torch.allclose(value.double(), ends[1][name].double(), rtol=1e-7, atol=1e-9), name


def test_what_the_teacher_logs_or_changes_is_not_seen(tmp_path: Path) -> None:
    """A forward that logs, counts and works on its input in place."""

    class Busy(Forwarding):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, images: Tensor) -> Any:
            self.calls += 1
            images.add_(0.125)
            self.log("mean", images.mean(), on_epoch=True)
            return self.net(images)

        def logits(self, images: Tensor) -> Tensor:
            return self.net(images)

    def train() -> Any:
        loader = image_loader(BATCHES)
        loader.dataset.tensors = tuple(tensor.clone() for tensor in loader.dataset.tensors)
        return loader

    class Means(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.last = float(trainer.callback_metrics["mean_epoch"])

    found = []
    for asked in (None, ASKED):
        means = Means()
        done = distilled(
            tmp_path, means, task=seeded(Busy), train=train(), surgery=surgeon(distill=asked, module="net")
        )
        found.append((means.last, float(done.task.calls)))  # type: ignore[arg-type]
    assert found[0] == found[1]
