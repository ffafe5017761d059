"""Constants go into the next layers where that is exact, and nowhere else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn

from lightning_prune.callbacks.folding import find_fold, fold_
from lightning_prune.callbacks.mask_sparsity import MaskSparsity
from lightning_prune.callbacks.structural import StructuralPruning
from lightning_prune.schedules import MaskSparsityStrength
from lightning_prune.structure import prune_, trace
from tests.callbacks.nets import OPTIMIZERS, Classifier, image_loader, seeded, trainer

EITHER_OPTIMIZER = pytest.mark.parametrize("optimizer", OPTIMIZERS)
WEAK = pytest.mark.filterwarnings("ignore:.*moves a scale by at most")
IMAGES = next(iter(image_loader(1)))[0]


def chain(*middle: nn.Module, head: int = 8, flat: bool = False) -> nn.Sequential:
    """A padded convolution of 8 channels with a norm, what reads it, and a head."""
    pool = nn.Identity() if flat else nn.AdaptiveAvgPool2d(1)
    first = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
    return nn.Sequential(*first, *middle, pool, nn.Flatten(), nn.Linear(head, 4))


def reader(**options: Any) -> list[nn.Module]:
    """A convolution that reads the first one's channels, after a ReLU."""
    return [nn.ReLU(), nn.Conv2d(8, 8, **{"kernel_size": 3, **options})]


def unpadded() -> nn.Sequential:
    """Two groups, each read by a layer that takes constants exactly."""
    return chain(*reader(bias=False), nn.BatchNorm2d(8), nn.ReLU())


EXACT: dict[str, Callable[[], nn.Module]] = {
    "a bias": lambda: chain(*reader()),
    "a bias before a norm": lambda: chain(*reader(), nn.BatchNorm2d(8), nn.ReLU()),
    "a norm behind": unpadded,
    "a norm without affine parameters": lambda: chain(*reader(bias=False), nn.BatchNorm2d(8, affine=False)),
    "a norm without statistics": lambda: chain(*reader(bias=False), nn.BatchNorm2d(8, track_running_stats=False)),
    "1x1": lambda: chain(*reader(kernel_size=1)),
    "replicated borders": lambda: chain(*reader(padding=1, padding_mode="replicate")),
    "same, 1x1": lambda: chain(*reader(kernel_size=1, padding="same")),
    "a stride and valid padding": lambda: chain(*reader(stride=2, padding="valid")),
    "sigmoid": lambda: chain(nn.Sigmoid(), nn.Conv2d(8, 8, 3)),
    "linear behind a pool": lambda: chain(nn.ReLU()),
    "linear behind flattened images": lambda: chain(nn.ReLU(), head=288, flat=True),
    "max pool": lambda: chain(nn.ReLU(), nn.MaxPool2d(3, padding=1), nn.Conv2d(8, 8, 1)),
}


class Branches(nn.Module):
    """One group that is read in two places."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.one, self.two = nn.Conv2d(8, 4, 3, padding=padding), nn.Conv2d(8, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.norm(self.conv(images)).relu()
        return self.one(hidden).mean(dim=(2, 3)) + self.two(hidden).mean(dim=(2, 3))


class Squeezed(nn.Module):
    """What is read is the channel times a gate that depends on the image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.gate, self.head = nn.Linear(3, 1), nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.norm(self.conv(images)).relu() * self.gate(images.mean(dim=(2, 3)))[..., None, None]
        return self.head(hidden.mean(dim=(2, 3)))


class Twice(nn.Module):
    """One convolution is called with two different constants."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.read = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.norm(self.conv(images))
        return (self.read(hidden.relu()) + self.read(2 * hidden.relu())).mean(dim=(2, 3))


class Tied(nn.Module):
    """Two layers read with one weight; only one of them is known by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.one, self.two = nn.Linear(8, 4), nn.Linear(8, 4)
        self.two.weight = self.one.weight

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.norm(self.conv(images)).relu().mean(dim=(2, 3))
        return self.one(hidden) * self.two(hidden)


INEXACT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "zero padding": (lambda: chain(*reader(padding=1)), "3 pads with zeros"),
    "zero padding around 1x1": (lambda: chain(*reader(kernel_size=1, padding=1)), "3 pads with zeros"),
    "same": (lambda: chain(*reader(padding="same")), "3 pads with zeros"),
    "no bias": (lambda: chain(*reader(bias=False)), "3 has neither a bias nor a batch norm right behind it"),
    "a norm not right behind": (lambda: chain(*reader(bias=False), nn.Tanh(), nn.BatchNorm2d(8)), "3 has neither"),
    "changed in place": (lambda: chain(*reader(bias=False), nn.ReLU(inplace=True), nn.BatchNorm2d(8)), "3 has neither"),
    "a depthwise one between": (
        lambda: chain(nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)),
        "4 reads what varies",
    ),
    "a transposed one": (lambda: chain(nn.ReLU(), nn.ConvTranspose2d(8, 8, 3)), "3 is no linear layer"),
    "an average with padding": (lambda: chain(nn.ReLU(), nn.AvgPool2d(3, 1, 1), nn.Conv2d(8, 8, 1)), "4 reads what"),
    "one of two branches": (lambda: Branches(padding=1), "one pads with zeros"),
    "a gate": (Squeezed, "head reads what varies"),
    "two constants": (Twice, "read reads what varies"),
    "a tied weight": (Tied, "the network's outputs would change"),
}


def ready(build: Callable[[], nn.Module], bias: float = 0.5) -> tuple[nn.Module, Any, dict[str, list[int]]]:
    """A network in double precision with statistics of its own; its first group loses half of its channels."""
    model = seeded(build).double()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d) and module.affine]
    model.train()(IMAGES.double())
    with torch.no_grad():
        for norm in norms:
            norm.bias.copy_(torch.linspace(bias, 2 * bias, 8))
        norms[0].weight[[1, 2, 5, 7]] = 0
    graph = trace(model.eval(), IMAGES.double())
    return model, graph, {graph.groups[0].name: [1, 2, 5, 7]}


@pytest.mark.parametrize("case", EXACT)
def test_a_fold_and_the_removal_after_it_change_no_output(case: str) -> None:
    model, graph, gone = ready(EXACT[case])
    groups = {group.name: group for group in graph.groups}
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        before = model(IMAGES.double())
        dropped = copy.deepcopy(model)
        prune_(dropped, graph.plan(gone))
        fold = find_fold(model, groups, gone, ((IMAGES.double(),), {}))
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
        assert (fold.groups, fold.refused) == (tuple(gone), {})
        fold_(model, groups, gone, fold)
        folded = model(IMAGES.double())
        prune_(model, graph.plan(gone))
        slim = model(IMAGES.double())
    size = before.abs().max()
    assert (folded - before).abs().max() < 1e-13 * size and (slim - before).abs().max() < 1e-13 * size
    if fold.added:
        assert (dropped(IMAGES.double()) - before).abs().max() > 1e-3 * size


def test_a_fold_into_two_branches_is_exact() -> None:
    model, graph, gone = ready(lambda: Branches(padding=0))
    groups = {group.name: group for group in graph.groups}
    before = model(IMAGES.double())
    fold = find_fold(model, groups, gone, ((), {"images": IMAGES.double()}))
    assert set(fold.added) == {"one.bias", "two.bias"}
    fold_(model, groups, gone, fold)
    assert (model(IMAGES.double()) - before).abs().max() < 1e-13 * before.abs().max()


@pytest.mark.parametrize("case", INEXACT)
def test_where_it_is_not_exact_nothing_is_folded_and_the_layer_is_named(case: str) -> None:
    build, reason = INEXACT[case]
    model, graph, gone = ready(build)
    fold = find_fold(model, {group.name: group for group in graph.groups}, gone, ((IMAGES.double(),), {}))
    assert (fold.added, fold.groups) == ({}, ())
    assert list(fold.refused) == list(gone) and reason in fold.refused[next(iter(gone))]


def test_channels_that_emit_zero_need_no_bias() -> None:
    """Behind a ReLU a negative bias is silence, whoever reads it."""
    model, graph, gone = ready(lambda: chain(*reader(padding=1, bias=False)), bias=-0.5)
    fold = find_fold(model, {group.name: group for group in graph.groups}, gone, ((IMAGES.double(),), {}))
    assert (fold.added, fold.groups, fold.refused) == ({}, tuple(gone), {})


# In training.


def biased(build: Callable[[], nn.Module]) -> nn.Module:
    model = seeded(build)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.fill_(0.5)
    return model


class Outputs(Callback):
    """The network's outputs in evaluation mode, at the end of every epoch and at the first batch of the next."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def look(self, run: Any, module: Any) -> None:
        net = copy.deepcopy(module.net).eval()
        with torch.no_grad():
            self.seen.append(net(IMAGES))

    def on_train_batch_start(self, run: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.look(run, module)

    on_train_epoch_end = look


def run(
    method: MaskSparsity, model: nn.Module, optimizer: str = "sgd", *more: Callback, epochs: int = 4, **settings: Any
) -> Classifier:
    module = Classifier(model, optimizer)
    pruning = StructuralPruning(latency_batches=(), report_file=None)
    trainer(method, pruning, *more, max_epochs=epochs, **settings).fit(module, image_loader(6))
    return module


@EITHER_OPTIMIZER
@pytest.mark.parametrize("build", [unpadded, EXACT["sigmoid"]], ids=["relu", "sigmoid"])
def test_biases_stay_free_and_surgery_is_lossless(optimizer: str, build: Any) -> None:
    outputs = Outputs()
    method = MaskSparsity(0.5, epochs=3, penalize_bias=False, fold_constant=True)
    module = run(method, biased(build), optimizer, outputs)
    assert module.net[0].weight.shape[0] == 4
    before, after = outputs.seen[5], outputs.seen[6]
    assert before.std() > 0.01 and (after - before).abs().max() < 1e-5 * before.abs().max()


def test_without_the_fold_the_same_run_loses_a_constant() -> None:
    outputs = Outputs()
    run(MaskSparsity(0.5, epochs=3, penalize_bias=False), biased(unpadded), "sgd", outputs)
    before, after = outputs.seen[5], outputs.seen[6]
    assert (after - before).abs().max() > 0.05 * before.abs().max()


@EITHER_OPTIMIZER
def test_the_fold_itself_changes_no_output(optimizer: str) -> None:
    seen: list[Tensor] = []

    class Around(Callback):
        """Before and after the regulariser's last batch end."""

        def on_train_batch_end(self, run: Any, module: Any, *_: Any) -> None:
            seen.append(copy.deepcopy(module.net).eval()(IMAGES).detach())

    method = MaskSparsity(0.5, epochs=3, penalize_bias=False, fold_constant=True)
    trainer(Around(), method, Around(), max_epochs=3).fit(Classifier(biased(unpadded), optimizer), image_loader(6))
    before, after = seen[-2:]
    assert method.ready and not torch.equal(before, after)
    assert (after - before).abs().max() < 1e-5 * before.abs().max()


def test_a_compiled_network_is_counted_restarted_and_folded_like_any() -> None:
    weights = []
    for compiled in (False, True):
        net = biased(unpadded)
        options: dict[str, Any] = {"global_epochs": 1, "restart_from": "baseline", "penalize_bias": False}
        method = MaskSparsity(budget={"macs": 0.4}, epochs=3, fold_constant=True, **options)
        run(method, torch.compile(net, backend="eager") if compiled else net)  # type: ignore[arg-type]
        weights.append([parameter.detach() for parameter in net.parameters()])
    assert weights[0][0].shape[0] < 8
    assert all(torch.equal(plain, compiled) for plain, compiled in zip(*weights, strict=True))


def test_what_nobody_reads_stays_zero_until_a_late_surgery() -> None:
    outputs = Outputs()
    method = MaskSparsity(0.5, epochs=2, penalize_bias=False, fold_constant=True)
    pruning = StructuralPruning(at_epoch=4, latency_batches=(), report_file=None)
    trainer(method, pruning, outputs, max_epochs=5).fit(Classifier(biased(unpadded)), image_loader(6))
    before, after = outputs.seen[7], outputs.seen[8]
    assert (after - before).abs().max() < 1e-5 * before.abs().max()
    assert not torch.equal(outputs.seen[3], before)


@WEAK
def test_published_constants_are_folded_with_scales_of_zero() -> None:
    model, constants = biased(unpadded), MaskSparsityStrength(strength=0.5)
    outputs = Outputs()
    method = MaskSparsity(0.5, epochs=3, penalize_bias=False, fold_constant=True, constants=constants)
    run(method, model, "sgd", outputs)
    assert (outputs.seen[6] - outputs.seen[5]).abs().max() < 1e-5 * outputs.seen[5].abs().max()


def test_layers_that_cannot_take_a_constant_are_named_before_and_after() -> None:
    method = MaskSparsity(0.5, epochs=3, penalize_bias=False, fold_constant=True)
    with pytest.warns(UserWarning, match="be folded exactly") as caught:
        run(method, biased(lambda: chain(*reader(padding=1), nn.BatchNorm2d(8), nn.ReLU())))
    said = [str(warning.message) for warning in caught]
    why = "masksparsity: what channels of 1 of 2 layers still emit can't be folded exactly and "
    assert [text.removeprefix(why) for text in said if "folded" in text] == [
        "will be lost at surgery, unless penalize_bias=True (0: 3 pads with zeros).",
        "is lost at surgery (0: 3 pads with zeros).",
    ]


def test_with_the_biases_at_zero_there_is_nothing_to_fold() -> None:
    plain = run(MaskSparsity(0.5, epochs=3), biased(lambda: chain(*reader(padding=1))))
    folded = run(MaskSparsity(0.5, epochs=3, fold_constant=True), biased(lambda: chain(*reader(padding=1))))
    assert all(torch.equal(a, b) for a, b in zip(plain.net.parameters(), folded.net.parameters(), strict=True))


@EITHER_OPTIMIZER
def test_weight_averages_lose_nothing_either(optimizer: str) -> None:
    averages = EMAWeightAveraging(decay=0.8)
    seen: list[Tensor] = []

    class Look(Callback):
        def on_train_epoch_end(self, run: Any, module: Any) -> None:
            self.look()

        def on_train_batch_start(self, run: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                self.look()

        def look(self) -> None:
            average: Any = averages._average_model
            seen.append(copy.deepcopy(average.module.net).eval()(IMAGES).detach())

    for arguments in ({"penalize_bias": False, "fold_constant": True}, {}):
        seen.clear()
        run(MaskSparsity(0.5, epochs=3, **arguments), biased(unpadded), optimizer, averages, Look())  # type: ignore[arg-type]
        assert (seen[6] - seen[5]).abs().max() < 1e-5 * seen[5].abs().max()


@EITHER_OPTIMIZER
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_resumed_around_the_fold_is_the_uninterrupted_run(optimizer: str, tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)

    def outcome(path: Path | None) -> nn.Module:
        method = MaskSparsity(0.5, epochs=2, penalize_bias=False, fold_constant=True)
        module = Classifier(biased(unpadded), optimizer)
        pruning = StructuralPruning(at_epoch=3, latency_batches=(), report_file=None)
        more = [keeper] if path is None else []
        settings: dict[str, Any] = {"max_epochs": 4, "enable_checkpointing": path is None}
        trainer(method, pruning, *more, **settings).fit(module, image_loader(6), ckpt_path=path, weights_only=True)
        return module.net

    whole = outcome(None).state_dict()
    for epoch in range(4):
        resumed = outcome(tmp_path / f"epoch={epoch}.ckpt").state_dict()
        assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == [], epoch
