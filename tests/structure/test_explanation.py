"""What a graph says in words: of one layer, and of all in a table."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from lightning_prune.errors import PlanError, PruningError, UnknownLayerError
from lightning_prune.structure import ChannelGraph, trace
from tests.structure.cases import CASES, Case
from tests.structure.test_cases import watched


class Wired(nn.Module):
    """A cat that is added to, a depthwise and a grouped convolution, a product, and a layer that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 8, 1)
        self.both, self.gate = nn.Conv2d(3, 12, 1), nn.Conv2d(3, 12, 1)
        self.inside = nn.Sequential(nn.Conv2d(12, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU())
        self.grouped = nn.Conv2d(8, 12, 1, groups=2)
        self.spare = nn.Conv2d(1, 1, 1)
        self.head = nn.Linear(12 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = (torch.cat([self.left(x), self.right(x)], 1) + self.both(x)) * self.gate(x)
        return self.head(self.grouped(self.inside(x)).flatten(1))


class Tied(nn.Module):
    """The output layer is the input table, as in language models."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.inner = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8))
        self.out = nn.Linear(8, 20, bias=False)
        self.out.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        return self.out(x + self.inner(x))


class Shuffled(nn.Module):
    """Channels are dealt out in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.channel_shuffle(self.first(x), 3))


@pytest.fixture(scope="module")
def resnet() -> ChannelGraph:
    return trace(models.resnet18(weights=None), torch.zeros(1, 3, 64, 64))


@pytest.fixture(scope="module")
def wired() -> ChannelGraph:
    return trace(Wired(), torch.zeros(1, 3, 4, 4))


@pytest.fixture(scope="module")
def tied() -> ChannelGraph:
    return trace(Tied(), torch.zeros(1, 3, dtype=torch.long))


def test_a_residual_stream(resnet: ChannelGraph) -> None:
    said = resnet.explain("layer3.0.conv2")
    assert said.startswith("'layer3.0.conv2' (Conv2d) makes the 256 channels of group 'layer3.0.conv2'. ")
    assert "tied to those of layer3.0.downsample.0 (add in 'layer3.0') and layer3.1.conv2 (add in 'layer3.1')." in said
    assert "the norms layer3.0.bn2, layer3.0.downsample.1 and layer3.1.bn2." in said
    assert "read by layer3.1.conv1, layer4.0.conv1 and layer4.0.downsample.0." in said
    assert "At most 255 of the 256 can go. One that is like another may be merged into it." in said
    assert said.endswith("It reads channels of group 'layer3.0.conv1'.")
    assert "\n" not in said


def test_who_is_not_the_first_of_its_group(resnet: ChannelGraph) -> None:
    said = resnet.explain("layer1.1.conv2")
    assert "makes the 64 channels of group 'conv1'" in said
    assert "tied to those of layer1.0.conv2 (add in 'layer1.1') and conv1 (add in 'layer1.0')." in said


def test_the_ends(resnet: ChannelGraph) -> None:
    assert resnet.explain("fc") == (
        "'fc' (Linear) keeps all of its 1000 channels. Its channels are the network's output. "
        "It reads channels of group 'layer4.0.conv2'."
    )
    assert resnet.explain("conv1").endswith("What it reads stays as it is.")


def test_norms_and_what_has_no_parameters(resnet: ChannelGraph) -> None:
    said = resnet.explain("layer1.0.bn1")
    assert "'layer1.0.bn1' (BatchNorm2d) scales the 64 channels of group 'layer1.0.conv1'." in said
    assert "those of layer1.0.conv1 (batch_norm in 'layer1.0.bn1')" in said
    assert "no parameters" in resnet.explain("maxpool") and "channels of 'conv1' pass" in resnet.explain("maxpool")
    assert "holds 10 layers: layer2.0.conv1, " in resnet.explain("layer2")
    assert "(ResNet) holds 41 layers" in resnet.explain("")


@pytest.mark.parametrize("name", ["net.layer3.0.conv2", "layer3.0.conv2", "net._orig_mod.layer3.0.conv2"])
def test_names_count_from_either_module(resnet: ChannelGraph, name: str) -> None:
    assert replace(resnet, root="net").explain(name) == resnet.explain("layer3.0.conv2")


def test_an_unknown_name(resnet: ChannelGraph) -> None:
    with pytest.raises(UnknownLayerError) as caught:
        resnet.explain("layer3.0.conv9")
    assert isinstance(caught.value, PruningError) and isinstance(caught.value, KeyError)
    near = "near it are 'layer3.0.conv2', 'layer3.0.conv1' and 'layer4.0.conv2'."
    assert str(caught.value) == f"There is no layer 'layer3.0.conv9'; {near}"
    with pytest.raises(UnknownLayerError, match="There is no layer 'zzzz'; print"):
        resnet.explain("zzzz")


def test_a_graph_made_by_hand_can_not_explain() -> None:
    with pytest.raises(PlanError, match="that trace has made"):
        ChannelGraph(nn.Linear(1, 1), (), {}, {}).explain("")


def test_cat_then_add_then_product(wired: ChannelGraph) -> None:
    said = wired.explain("left")
    assert "makes the 4 channels of group 'left'" in said
    assert "both (add in the model's own forward)" in said
    assert "gate (mul in the model's own forward)" in said
    assert "stand beside others after cat in the model's own forward" in said
    assert "right" not in said
    assert "inside.0 (4 of its 12 inputs)" in said
    said = wired.explain("both")
    assert "makes the 4 channels of group 'left' and the 8 channels of group 'right'" in said
    assert "Those of group 'right' are read by inside.0 (8 of its 12 inputs). At most 7 of the 8 can go." in said


def test_depthwise_and_grouped(wired: ChannelGraph) -> None:
    said = wired.explain("inside.0")
    assert "They pass the depthwise filters of inside.1. They pass the norm inside.2." in said
    assert "grouped conv2d in 'grouped'" in said
    assert "filters" in wired.explain("inside.1") and "inside.0 (conv2d in 'inside.1')" in wired.explain("inside.1")
    said = wired.explain("grouped")
    assert "makes 12 channels, 2 at a time for each of the 6 of group 'grouped'." in said
    assert "head (8 inputs for each)" in said and "At most 5 of the 6 can go." in said


def test_a_layer_that_nobody_uses(wired: ChannelGraph) -> None:
    assert wired.explain("spare") == "'spare' (Conv2d) stays as it is. It is not used by this forward pass."


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_hard_case_has_a_word_for_every_name(case: Case) -> None:
    graph, _ = watched(case.name)
    paths = {path for path, _ in graph.model.named_modules(remove_duplicate=False)}
    paths |= {path for path, _ in graph.model.named_parameters(remove_duplicate=False)}
    for said in map(graph.explain, paths):
        assert said.endswith(".") and "\n" not in said
    assert max(map(len, str(graph).splitlines())) <= 120


def test_shuffled_channels() -> None:
    said = trace(Shuffled(), torch.zeros(1, 3, 4, 4)).explain("first")
    assert "makes 12 channels, 3 at a time for each of the 4 of group 'first'" in said
    assert "tied to each other by" in said and "in the model's own forward" in said


def test_tied_weights_and_renormalised_channels(tied: ChannelGraph) -> None:
    assert tied.explain("out").startswith("'out' (Linear) shares its weight with table.")
    said = tied.explain("table")
    assert "makes the 8 channels of group 'table'" in said
    assert "inner.3 (add in the model's own forward)" in said
    assert "Norms take their statistics over them (inner.0)" in said and "none can stand for another" in said
    assert "merged" not in said


def test_channels_that_are_summed_up() -> None:
    class Lengths(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x).sum(1)

    graph = trace(Lengths(), torch.zeros(1, 4))
    assert "read by no layer. At most 7 of the 8 can go. They are summed up as they are" in graph.explain("first")
    assert "not mergeable" in str(graph)


def test_some_channels_stay() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(torch.cat([x[:, :3].detach(), x[:, 3:]], 1))

    said = trace(Counted(), torch.zeros(1, 4)).explain("first")
    assert "makes the 5 channels of group 'first' and 3 that stay. Its channels are counted off by a slice" in said


def test_the_table_of_a_residual_network(resnet: ChannelGraph) -> None:
    lines = str(resnet).splitlines()
    assert lines[0].split() == ["group", "channels", "tied", "to", "read", "by"]
    assert [line.split()[:2] for line in lines[2:14]] == [[group.name, str(group.size)] for group in resnet.groups]
    assert ["layer4.0.conv2", "512", "layer4.0.downsample.0,", "layer4.1.conv2", "layer4.1.conv1,", "fc"] in [
        line.split() for line in lines
    ]
    assert lines[-3:] == ["What stays, and why:", "* Its channels are the network's output.", "    fc"]
    assert max(map(len, lines)) <= 120


def test_the_table_says_what_is_special(tied: ChannelGraph, wired: ChannelGraph) -> None:
    table = [line.split() for line in str(tied).splitlines()]
    assert ["table", "8", "inner.3", "table,", "inner.1", "renormalised"] in table
    table = [line.split() for line in str(wired).splitlines()]
    assert table[0] == ["group", "channels", "unit", "tied", "to", "read", "by"]
    assert ["grouped", "6", "2", "head"] in table
    assert ["inside.0", "4", "2", "inside.1", "grouped"] in table
    assert ["left", "4", "both,", "gate", "inside.0"] in table


def test_long_lists_are_shortened_and_reasons_that_are_alike_are_one() -> None:
    table = str(trace(models.vit_b_16(weights=None, image_size=32), torch.zeros(1, 3, 32, 32)))
    lines = table.splitlines()
    assert max(map(len, lines)) <= 120
    assert table.count("Its channels are the network's output.") == 1
    assert len(lines) < 12 + 24  # a line per group, and few for all that stays


def test_nothing_can_go() -> None:
    assert str(trace(nn.Linear(4, 2), torch.zeros(1, 4))).startswith("No channel can go.")
