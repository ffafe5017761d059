"""The generated pages say what the committed results say, and nothing else."""

from __future__ import annotations

import doctest
import json
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks import judging, markdown, presets, tables
from benchmarks.pages import RESULTS, ROOT, Section, accuracy, coverage, overhead, scaling


@pytest.mark.parametrize(("name", "page"), [("benchmarks", tables.benchmarks), ("coverage", coverage.page)])
def test_the_committed_page_is_the_generated_one(name: str, page: Any) -> None:
    assert (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") == page(RESULTS), "python -m benchmarks.tables"


def test_results_name_no_folder_of_the_machine_that_made_them() -> None:
    files = sorted(RESULTS.rglob("*.json"))
    assert len(files) >= 5
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert not any(word in text for word in ("/home/", "/root", "/tmp", "/work", "/Users/", "hostname")), path.name


def test_without_results_every_section_says_so(tmp_path: Path) -> None:
    page = tables.benchmarks(tmp_path)
    sections = [part for part in tables.PARTS if isinstance(part, Section)]
    assert len(sections) >= 8
    assert page.count("Not measured yet.") == len(sections)
    for section in sections:
        assert section.command in page
        assert page.count(f"# {section.title}\n") == 1


def test_words_and_tables() -> None:
    for module, least in ((markdown, 6), (judging, 2), (presets, 1)):
        found = doctest.testmod(module)
        assert found.attempted >= least
        assert not found.failed


def test_differences_are_judged_over_common_seeds() -> None:
    base = {0: 90.0, 1: 91.0, 2: 92.0, 3: 10.0}
    steady = judging.difference({0: 90.6, 1: 91.6, 2: 92.6}, base, 500)
    assert steady is not None
    assert (round(steady.gain, 6), steady.seeds, steady.side) == (0.6, 3, "above")
    few = judging.difference({0: 90.6, 1: 91.6, 2: 92.6}, base, 200)  # an image is half a point
    assert few is not None
    assert few.side == "level"
    one = judging.difference({3: 9.0}, base, 10_000)
    assert one is not None
    assert (one.seeds, one.side) == (1, "below")
    assert judging.difference({7: 9.0}, base, 500) is None


def test_variants_that_are_equal_are_told_apart_once_in_twenty() -> None:
    draws, found, trials = random.Random(0), 0, 2000
    for _ in range(trials):
        mine, others = ({seed: 80 + draws.gauss(0, 1) for seed in range(3)} for _ in range(2))
        change = judging.difference(mine, others, 10_000)
        found += change is not None and change.is_beyond
    assert 0.035 < found / trials < 0.065


def run(method: str, share: float, seed: int, finetuned: float, dense: float = 0.9) -> dict[str, Any]:
    """A result as ``accuracy.py`` writes it."""
    latency = [{"batch": batch, "median_ms": 2.0, "threads": 1} for batch in (1, 64)]
    report = {
        "accuracy": {"dense": dense, "before": 0.8, "after": 0.7, "finetuned": finetuned},
        "error": 1e-15 * (1 + seed),
        "cost_after": {"macs": 2_500_000, "parameters": 1234},
        "layers": [["net.3.conv1", 16, 7]],
        "latency_before": latency,
        "latency_after": [{**each, "median_ms": 1.0} for each in latency],
    }
    versions = {"device": "cpu X", "torch": "2.15.0"}
    return {"method": method, "share": share, "seed": seed, "epochs": [2, 2, 2], "report": report, "versions": versions}


def test_accuracies_are_means_and_deviations_over_the_seeds(tmp_path: Path) -> None:
    runs = [run(method, 0.5, seed, 0.8 + gain + seed / 100) for seed in (0, 1, 2) for method, gain in GAINS.items()]
    page = shown(tmp_path, "digits", [*runs, run("Magnitude", 0.25, 0, 0.7), run("TPP", 0.25, 0, 0.7)])
    assert "2 + 2 + 2 epochs in 32-true; cpu X, 1 thread; torch 2.15.0." in page
    assert "Slim and masked networks differ by at most 3e-15 of the largest output" in page
    assert "#### 50 % of the multiply-adds removed (2.00x)" in page
    line = (
        "| Magnitude | 3 | 90.00 ± 0.00 | 80.00 ± 0.00 | 70.00 ± 0.00 | 81.00 ± 1.00 | 2.50 | 1,234 | 2 -> 1 | 2 -> 1 |"
    )
    assert line in page.splitlines()
    assert (
        "- Finetuned beside Magnitude, in points, 3 seeds: above by more than chance: TPP (+2.00); "
        "not told apart: ASCP (-0.40), GReg1 (+0.40); below by more than chance: GReg2 (-3.00)." in page
    )
    assert "#### 75 % of the multiply-adds removed (4.00x)" in page
    assert (
        "1 seed: above by more than chance: none; not told apart: TPP (+0.00); below by more than chance: none." in page
    )
    assert "*Dense* is after 2 of 6 epochs, *finetuned* after all." in page
    assert "Magnitude's *before* is the dense network after 4 of them: 80.00 ± 0.00." in page
    assert page.count("The slim networks have equal widths") == 2
    assert "--preset digits --minutes 60 --results benchmarks/results/accuracy/digits --threads 1 " in page


GAINS = {"Magnitude": 0.0, "TPP": 0.02, "ASCP": -0.004, "GReg1": 0.004, "GReg2": -0.03}


def test_other_widths_are_not_called_equal() -> None:
    one, other = run("Magnitude", 0.5, 0, 0.8), run("TPP", 0.5, 0, 0.8)
    assert accuracy.alike({"Magnitude": [one], "TPP": [other]})
    other["report"]["layers"] = [["net.3.conv1", 16, 8]]
    assert accuracy.alike({"Magnitude": [one], "TPP": [other]}) == []


def test_only_seeds_that_both_have_are_compared() -> None:
    own = {"Magnitude": [run("Magnitude", 0.5, 0, 0.8), run("Magnitude", 0.5, 1, 0.1)]}
    (sentence,) = accuracy.beside("cpu", {**own, "TPP": [run("TPP", 0.5, 0, 0.78)]})
    assert "1 seed: " in sentence
    assert "below by more than chance: TPP (-2.00)" in sentence
    (sentence,) = accuracy.beside("digits", {**own, "TPP": [run("TPP", 0.5, 0, 0.78)]})  # fewer images
    assert "not told apart: TPP (-2.00)" in sentence
    assert accuracy.beside("cpu", own) == []


def test_what_is_demanded_stands_beside_what_is_reached(tmp_path: Path) -> None:
    papers = [run("Magnitude", 1 / 2.55, 0, 0.9339), run("TPP", 1 / 2.55, 0, 0.9340)]
    assert "This project demands at least 93.4 %. Reached by TPP; missed by Magnitude." in shown(
        tmp_path, "resnet56", papers
    )
    deep = [run("Magnitude", 0.37, 0, 0.9), run("TPP", 0.37, 0, 0.89)]
    assert "This project demands no loss. Reached by Magnitude; missed by TPP." in shown(tmp_path, "resnet110", deep)


def shown(folder: Path, preset: str, runs: list[dict[str, Any]]) -> str:
    """The page with these results alone."""
    own = folder / "accuracy" / preset
    own.mkdir(parents=True)
    for found in runs:
        (own / f"{found['method']}-{found['share']:.3f}-{found['seed']}.json").write_text(json.dumps(found))
    return tables.benchmarks(folder)


def test_what_an_epochs_end_costs_is_spread_over_its_steps() -> None:
    row = {"ours": [1.005, 1.01, 1.015], "loops": [1.0, 1.0, 1.0]}
    assert overhead.amortised(row, "ours") == row["ours"]
    slow = {**row, "epoch_end": 0.02, "method": "ASCP", "target": 1.02}
    assert overhead.amortised(slow, "ours") == pytest.approx([1.025, 1.03, 1.035])
    assert overhead.amortised(slow, "loops") == row["loops"]
    assert overhead.verdict([slow], "ours", "whole step").endswith("at or below the target: none; above: ASCP.")
    assert overhead.verdict([{**slow, "target": 1.03}], "ours", "whole step").endswith("target: ASCP; above: none.")


def test_final_clusters_count_for_a_quarter() -> None:
    free = {"method": "ASCP", "own": [1.0, 1.002, 1.004], "epoch_end": 0.002}
    final = {"method": "ASCP with final clusters", "own": [1.01, 1.02, 1.03]}
    (said,) = overhead.over_a_stage([free, final])
    assert "final clusters: 1.0080," in said
    assert overhead.over_a_stage([free]) == []


def test_a_noisy_row_is_not_judged() -> None:
    row = {"method": "GReg1", "target": 1.01, "ours": [0.95, 0.99, 1.03], "own": [1.004, 1.005, 1.006]}
    said = overhead.verdict([row], "ours", "whole step")
    assert "target: none; above: none; noise larger than what is to be shown" in said
    assert said.endswith(": GReg1.")
    assert overhead.verdict([row], "own", "own time").endswith("target: GReg1; above: none.")
    rows = [{**row, "own_loops": [1.001, 1.002, 1.003]}, {**row, "method": "TPP", "own_loops": [1.1, 1.2, 1.3]}]
    assert overhead.beside(rows) == ["- Own time above the restatement's own time: GReg1; at or below it: TPP."]
    assert overhead.beside([row]) == []


def test_the_least_of_all_is_counted() -> None:
    rows = [
        {"model": model, "quantity": quantity, "processor": seconds}
        for model, quantity, seconds in (("a", "x", 1.0), ("a", "y", 2.0), ("b", "x", 3.0), ("b", "y", 2.0))
    ]
    assert scaling.cheapest(rows, "x") == "1 of the 2 networks that have it"


def test_the_peak_is_not_below_what_was_taken_before_it(tmp_path: Path) -> None:
    row = {"lightning_prune": {"cpu": 1.0, "peak": 2.0, "planned": 29.0, "slim": 84.0}, "probe": {"cpu": 0.5}}
    whole = {"rounds": 1, "machine": {"cpu": "X"}, "rows": [{"model": "a", **row}]}
    (tmp_path / "engine_speed.json").write_text(json.dumps(whole))
    assert "| a | 1.00 |  | 0.50 | 29 | 29 | 84 |  |" in coverage.speed(tmp_path)


def test_the_longest_probe_is_named() -> None:
    facts = {"judged": True, "left": 0.5, "error": 0.0, "seconds": 1.0}
    rows = {
        ("lightning_prune", name): {**facts, "probe": probe} for name, probe in (("a", 0.5), ("b", 2.5), ("c", 1.0))
    }
    text = coverage.summary(rows, ["a", "b", "c"])
    assert text[-1] == "The longest of 3 probes takes 2.50 s of the processor (b), the median 1.000 s."
    assert text[2] == "| lightning_prune | 3 | 3 | 0.500 | 1.000 |"
