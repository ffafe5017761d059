"""The generated pages say what the committed results say, and nothing else."""

from __future__ import annotations

import doctest
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import markdown, tables
from benchmarks.pages import RESULTS, ROOT, Section, accuracy, coverage, overhead


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
    found = doctest.testmod(markdown)
    assert found.attempted >= 6
    assert not found.failed


def run(method: str, share: float, seed: int, finetuned: float, dense: float = 0.9) -> dict[str, Any]:
    """A result as ``accuracy.py`` writes it."""
    latency = [{"batch": batch, "median_ms": 2.0, "threads": 1} for batch in (1, 64)]
    report = {
        "accuracy": {"dense": dense, "before": 0.8, "after": 0.7, "finetuned": finetuned},
        "error": 1e-15 * (1 + seed),
        "cost_after": {"macs": 2_500_000, "parameters": 1234},
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
        "- Beside Magnitude, in points: above by more than one standard deviation: TPP (+2.00); "
        "within one: ASCP (-0.50), GReg1 (+0.50); below by more than one: GReg2 (-3.00)." in page
    )
    assert "#### 75 % of the multiply-adds removed (4.00x)" in page
    assert "one seed and so without a deviation: above: none; level: TPP (+0.00); below: none." in page


GAINS = {"Magnitude": 0.0, "TPP": 0.02, "ASCP": -0.005, "GReg1": 0.005, "GReg2": -0.03}


def test_only_seeds_that_both_have_are_compared() -> None:
    own = {"Magnitude": [run("Magnitude", 0.5, 0, 0.8), run("Magnitude", 0.5, 1, 0.1)]}
    (sentence,) = accuracy.beside({**own, "TPP": [run("TPP", 0.5, 0, 0.79)]})
    assert "below: TPP (-1.00)" in sentence
    assert accuracy.beside(own) == []


def test_what_is_demanded_stands_beside_what_is_reached(tmp_path: Path) -> None:
    papers = [run("Magnitude", 1 / 2.55, 0, 0.9339), run("TPP", 1 / 2.55, 0, 0.9340)]
    assert "Demanded: at least 93.4 %. Reached by TPP; missed by Magnitude." in shown(tmp_path, "resnet56", papers)
    deep = [run("Magnitude", 0.37, 0, 0.9), run("TPP", 0.37, 0, 0.89)]
    assert "Demanded: no loss. Reached by Magnitude; missed by TPP." in shown(tmp_path, "resnet110", deep)


def shown(folder: Path, preset: str, runs: list[dict[str, Any]]) -> str:
    """The page with these results alone."""
    own = folder / "accuracy" / preset
    own.mkdir(parents=True)
    for found in runs:
        (own / f"{found['method']}-{found['share']:.3f}-{found['seed']}.json").write_text(json.dumps(found))
    return tables.benchmarks(folder)


def test_what_an_epochs_end_costs_is_spread_over_its_steps() -> None:
    row = {"ours": [1.0, 1.01, 1.02], "loops": [1.0, 1.0, 1.0]}
    assert overhead.amortised(row, "ours") == row["ours"]
    slow = {**row, "epoch_end": 0.02, "method": "ASCP", "target": 1.02}
    assert overhead.amortised(slow, "ours") == pytest.approx([1.02, 1.03, 1.04])
    assert overhead.amortised(slow, "loops") == row["loops"]
    assert overhead.verdict([slow], "ours", "whole step").endswith("at or below the target: none; above: ASCP.")
    assert overhead.verdict([{**slow, "target": 1.03}], "ours", "whole step").endswith("target: ASCP; above: none.")


def test_the_longest_probe_is_named() -> None:
    facts = {"judged": True, "left": 0.5, "error": 0.0, "seconds": 1.0}
    rows = {
        ("lightning_prune", name): {**facts, "probe": probe} for name, probe in (("a", 0.5), ("b", 2.5), ("c", 1.0))
    }
    text = coverage.summary(rows, ["a", "b", "c"])
    assert text[-1] == "The longest of 3 probes takes 2.50 s of the processor (b), the median 1.000 s."
    assert text[2] == "| lightning_prune | 3 | 3 | 0.500 | 1.000 |"
