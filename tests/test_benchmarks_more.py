"""The benchmarks of growth and of choices in miniature, and their sections of the page."""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from benchmarks import ablations, accuracy, scaling
from benchmarks.pages import ablations as choices
from benchmarks.pages import scaling as growth
from benchmarks.variants import ABLATIONS, VARIANTS, ScaleL1, SoftNorm, Stage
from lightning_prune import GReg1, Magnitude
from lightning_prune.callbacks import structural

STAGE = Stage(start=1, epochs=4, steps=2, ratio=0.5, rate=0.05, weight_decay=0.0)
FEW = {"few": 128, "root": ""}


@pytest.fixture(autouse=True)
def _as_before() -> Any:
    """The scripts choose the number of threads and silence Lightning."""
    threads, log = torch.get_num_threads(), logging.getLogger("lightning.pytorch")
    level = log.level
    yield
    torch.set_num_threads(threads)
    log.setLevel(level)


def test_every_variant_is_compared_with_another() -> None:
    compared = {name for ablation in ABLATIONS.values() for name in ablation.variants}
    assert compared == set(VARIANTS)
    assert len(ABLATIONS) == 12
    for ablation in ABLATIONS.values():
        assert {*ablation.against, *ablation.against.values()} <= set(ablation.variants)
        assert ablation.against
    for make in VARIANTS.values():
        callbacks, options = make(STAGE)
        assert callbacks
        assert set(options) <= {"finetune_optimizer", "finetune_scheduler"}


def test_a_miniature_of_the_ablations_is_done_once_and_joined(tmp_path: Path) -> None:
    arguments = ["--few", "128", "--epochs", "1", "2", "1", "--seeds", "0", "--only", "same_set"]
    arguments += ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "ablations")]
    ablations.main(arguments)
    whole = json.loads((tmp_path / "ablations" / "digits.json").read_text())
    assert [row["variant"] for row in whole["rows"]] == list(ABLATIONS["same_set"].variants)
    assert len({row["set"] for row in whole["rows"]}) == 1, "the same channels"
    assert len({row["macs"] for row in whole["rows"]}) == 1
    assert 0.1 < whole["rows"][0]["macs_left"] < 0.3
    assert all(0 <= value <= 1 for row in whole["rows"] for value in row["accuracy"].values())
    assert set(whole["rows"][0]["accuracy"]) == set(choices.COLUMNS)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*.json")}
    assert len(written) == 3
    ablations.main(arguments)
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*.json")}
    text = "\n".join(choices.SECTION.lines(tmp_path))
    assert "1 + 2 + 1 epochs in 32-true, 85% of the inner channels removed, 128 images" in text
    assert "With 1 of 1 seeds all plans were the same." in text


@pytest.mark.filterwarnings("ignore")  # so does the script
def test_a_run_in_pieces_ends_as_one_in_one_piece(tmp_path: Path) -> None:
    preset = replace(accuracy.PRESETS["digits"], epochs=(1, 2, 1))
    name, found = "GReg1, first event at zero", []
    for pieces in (False, True):
        out = tmp_path / str(pieces)
        out.mkdir()
        asked = argparse.Namespace(preset="digits", out=out, deadline=math.inf, **FEW)
        stage = ablations.stage_of(asked, preset)
        assert stage.steps == 2
        if pieces:
            asked.deadline = time.monotonic()
        calls = 1
        while not ablations.run(asked, preset, stage, name, 0):
            calls += 1
        assert calls == (3 if pieces else 1), "an epoch after the dense one, and then one at a time"
        row = json.loads(next(out.glob("*.json")).read_text())
        found.append((row["accuracy"], row["set"], row["layers"]))
    assert found[0] == found[1]


class Look(Callback):
    """How many filters of the first inner layer are zero at each epoch's end."""

    def __init__(self) -> None:
        self.zeros: list[int] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.zeros.append(int((pl_module.net[3].conv1.weight.flatten(1).abs().sum(dim=1) == 0).sum()))


@pytest.mark.filterwarnings("ignore")  # so does the script
def test_soft_pruning_by_norm_forgets_more_from_epoch_to_epoch(tmp_path: Path) -> None:
    asked, look = argparse.Namespace(deadline=math.inf, **FEW), Look()
    method = SoftNorm(0.5, epochs=12)
    preset = replace(accuracy.PRESETS["digits"], epochs=(1, 6, 6))
    accuracy.fit(asked, preset, 0, tmp_path, 12, [method, look], None)
    # of half of sixteen 71 % along the published exponential, then 92 %, rounded up
    assert look.zeros == [6, *[8] * 11]
    assert method.phase == "ready"


def test_network_slimming_pulls_at_all_scales_within_its_stage(tmp_path: Path) -> None:
    (magnitude, pull), _ = VARIANTS["L1 on all scales, travel 0.5"](STAGE)
    assert isinstance(magnitude, Magnitude)
    assert isinstance(pull, ScaleL1)
    # a cosine's mean over 4 epochs of 2 steps, momentum 0.9
    assert pull.strength * 8 * 0.025 / 0.1 == pytest.approx(0.5)
    (_, published), _ = VARIANTS["L1 on all scales, strength 5e-4"](STAGE)
    assert published.strength == 5e-4
    model, trainer = accuracy.Classifier(accuracy.PRESETS["digits"]), argparse.Namespace(current_epoch=0)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for epoch, expected in ((0, 0.0), (1, pull.strength), (5, 0.0)):
        trainer.current_epoch = epoch
        for norm in norms:
            norm.weight.grad = torch.zeros_like(norm.weight)
        pull.on_before_optimizer_step(trainer, model, None)
        assert all(torch.equal(norm.weight.grad, torch.full_like(norm.weight, expected)) for norm in norms)


def test_growth_from_zero_is_one_increment_behind() -> None:
    ((delta,), _), ((zero,), _) = (VARIANTS[f"GReg1, 8 events, the first at {rule}"](STAGE) for rule in RULES)
    assert isinstance(delta, GReg1)
    assert delta.schedule.events == zero.schedule.events == 8
    strengths = [[method.schedule.strength(step) for step in range(8)] for method in (delta, zero)]
    assert strengths[1][0] == 0
    assert [a - b for a, b in zip(*strengths, strict=True)] == pytest.approx([delta.schedule.delta] * 8)
    assert delta.schedule.length == zero.schedule.length == 8
    assert zero.schedule_type is type(zero.schedule)


RULES = ("delta", "zero")


def rows(variant: str, finetuned: list[float], after: float = 0.5) -> list[dict[str, Any]]:
    """Results of some seeds."""
    base = {"dense": 0.9, "before": 0.8, "after": after, "recalibrated": 0.7}
    values = enumerate(finetuned)
    return [
        {"variant": variant, "seed": s, "accuracy": {**base, "finetuned": v}, "macs_left": 0.25, "set": variant}
        for s, v in values
    ]


def test_only_what_is_more_than_chance_counts(tmp_path: Path) -> None:
    found = [
        *rows("TPP", [0.90, 0.92, 0.94]),
        *rows("TPP, gram=0", [0.93, 0.95, 0.97], after=0.4),
        *rows('TPP, reduction="sum"', [0.92, 0.92, 0.95]),
    ]
    (gain,) = choices.beyond(found, ABLATIONS["reduction"], "finetuned", 500)
    assert gain == ("TPP, gram=0", pytest.approx(3.0), "TPP")
    said = choices.verdict(found, 500)
    assert said.startswith("Of 2 measured comparisons, finetuned: ")
    assert "by more than chance: 1 (`TPP, gram=0` (+3.0 against TPP)); below: 0 (none). About 0.1 of so many" in said
    single = rows("TPP", [0.9]) + rows("TPP, gram=0", [0.89])  # two standard errors: 2.8 points, or .86
    assert choices.beyond(single, ABLATIONS["reduction"], "finetuned", 1000) == []
    (loss,) = choices.beyond(single, ABLATIONS["reduction"], "finetuned", 10_000)
    assert loss == ("TPP, gram=0", pytest.approx(-1.0), "TPP")
    machine = {"cpu": "X", "torch": "2.15.0"}
    whole = {
        "preset": "cpu",
        "epochs": [6, 6, 6],
        "ratio": 0.75,
        "few": None,
        "images": 500,
        "machine": machine,
        "threads": 2,
    }
    text = choices.body([{**whole, "rows": found}])
    assert "| TPP | 3 | 25.0% | 90.0 ± 0.0 | 80.0 ± 0.0 | 50.0 ± 0.0 | 70.0 ± 0.0 | 92.0 ± 2.0 |" in text
    assert "6 + 6 + 6 epochs in 32-true, 75% of the inner channels removed; X, 2 threads; torch 2.15.0." in text
    assert "- Right after, more than chance: `TPP, gram=0` (-10.0 against TPP)." in text


def test_rows_of_other_variants_and_seeds_stay_where_the_setting_is_the_same(tmp_path: Path) -> None:
    preset = replace(accuracy.PRESETS["digits"], epochs=(1, 2, 1))
    asked = argparse.Namespace(preset="digits", seeds=[1], threads=1, out=tmp_path / "runs", results=tmp_path, **FEW)
    asked.out.mkdir()

    def measured(variant: str, seed: int, finetuned: float) -> None:
        (row,) = rows(variant, [finetuned])
        (asked.out / f"{ablations.short(variant)}-{seed}.json").write_text(json.dumps({**row, "seed": seed}))

    def found() -> dict[tuple[str, int], float]:
        whole = json.loads((tmp_path / "digits.json").read_text())
        return {(row["variant"], row["seed"]): row["accuracy"]["finetuned"] for row in whole["rows"]}

    measured("TPP", 1, 0.5)
    ablations.collect(asked, preset)
    assert found() == {("TPP", 1): 0.5}
    (asked.out / "TPP-1.json").unlink()
    measured("GReg1", 1, 0.6)
    measured("TPP", 2, 0.7)  # of a seed that is not asked for
    ablations.collect(asked, preset)
    assert list(found().items()) == [(("GReg1", 1), 0.6), (("TPP", 1), 0.5)]
    measured("TPP", 1, 0.8)
    ablations.collect(asked, preset)
    assert found() == {("GReg1", 1): 0.6, ("TPP", 1): 0.8}
    whole = json.loads((tmp_path / "digits.json").read_text())
    assert not any("machine" in row for row in whole["rows"])
    (tmp_path / "digits.json").write_text(json.dumps({**whole, "machine": {"cpu": "another"}}))
    (asked.out / "TPP-1.json").unlink()
    ablations.collect(asked, preset)
    kept = json.loads((tmp_path / "digits.json").read_text())["rows"]
    assert [row.get("machine") for row in kept] == [None, {"cpu": "another"}]
    ablations.collect(asked, replace(preset, epochs=(1, 1, 1)))
    assert found() == {("GReg1", 1): 0.6}


def in_this_process(*arguments: str) -> str:
    """What a process of its own would say."""
    job, first, *rest = arguments
    if job == "model":
        return json.dumps(scaling.measure(first))
    scaling.live(int(first), Path(rest[0]))
    return ""


@pytest.mark.filterwarnings("ignore")  # so does the script
def test_a_miniature_of_growth_has_every_quantity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "child", in_this_process)
    monkeypatch.setattr(scaling, "REPEATS", 1)
    monkeypatch.setattr(structural, "operate_", structural.operate_)  # a clock is put around it
    out = tmp_path / "scaling.json"
    scaling.main(["--models", "tiny8", "--ranks", "1", "--out", str(out), "--images", str(tmp_path)])
    whole = json.loads(out.read_text())
    assert [row["quantity"] for row in whole["rows"]] == list(scaling.QUANTITIES)
    assert {row["model"] for row in whole["rows"]} == {"tiny8"}
    assert {row["layers"] for row in whole["rows"]} == {10}
    assert all(row["processor"] > 0 and row["clock"] > 0 for row in whole["rows"])
    assert [row["stage"] for row in whole["ranks"]] == list(scaling.STAGES)
    assert all(row["processor"] > 0 for row in whole["ranks"])
    assert (tmp_path / "scaling.svg").exists()


def invented(exponent: float) -> dict[str, Any]:
    """Seconds that grow with the parameters by this exponent, on as many layers."""
    sizes = {name: 10**count for count, name in enumerate(scaling.MODELS, start=3)}
    found = [
        {"model": name, "quantity": quantity, "parameters": size, "macs": size, "layers": 7 * count}
        | {"processor": 1e-6 * size**exponent, "clock": 1.0}
        for count, (name, size) in enumerate(sizes.items(), start=1)
        for quantity in scaling.QUANTITIES
    ]
    ranks = [
        {"ranks": count, "stage": stage, "processor": count / 10, "clock": 1.0}
        for count in (1, 2)
        for stage in scaling.STAGES
    ]
    return {"rows": found, "ranks": ranks, "machine": {"cpu": "X", "torch": "2.15.0"}}


def test_exponents_are_slopes_of_the_logarithms() -> None:
    for exponent, said in ((0.75, "nothing"), (1.25, "trace (1.25)")):
        text = growth.body([invented(exponent)])
        assert f"| trace | {exponent:.2f} ± 0.00 |" in "\n".join(text)
        assert any(line.startswith(f"- All networks: faster than the parameters grows {said}") for line in text)
    noisy = scaling.slope([(1.0, 1.0), (10.0, 30.0), (100.0, 100.0)])
    assert noisy[0] == pytest.approx(1.0)
    assert noisy[1] > 0.2
    assert "| proof | 0.1000 | 0.2000 | 2.00 |" in growth.by_ranks(invented(1.0)["ranks"])
    assert "| proof | 1.0000 | 1.0000 | 1.00 |" in growth.by_ranks(invented(1.0)["ranks"], "clock")
    assert "takes 1.000, 1.000 s on 1, 2 ranks of one machine (X)" in growth.waiting(invented(1.0))


def test_the_same_numbers_draw_the_same_pictures(tmp_path: Path) -> None:
    drawn = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        scaling.plot(invented(1.0), folder)
        drawn.append([path.read_bytes() for path in sorted(folder.iterdir())])
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 2
    scaling.plot(invented(1.1), tmp_path / "a")
    assert (tmp_path / "a" / "scaling.svg").read_bytes() != drawn[0][0]
