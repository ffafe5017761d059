"""Every option against its alternatives, and which differences are more than chance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.markdown import code, counted, on, spread, table
from benchmarks.pages import Section
from benchmarks.variants import ABLATIONS, Ablation

ABOUT = """Every option against its alternatives. The dense stage of a seed is trained once; from there every variant
has the same epochs for its sparse stage and for finetuning, and every inner layer loses the same share of its channels,
so that multiply-adds are equal. Accuracy in percent of last epochs, mean and standard deviation over the seeds.
*Before*: as the sparse stage leaves the network. *Right after*: after surgery, which is the masked network's accuracy.
*Statistics anew*: the same network, with running statistics of its batch norms from 1024 training images. *More than
chance*: means that are further apart than either standard deviation; of one seed, further than two standard errors of a
difference on so many validation images, in which the spread between seeds is not."""
COMMAND = "python -m benchmarks.ablations --preset digits    # cpu --root DIR: CIFAR-10; call it again to go on"
COLUMNS = {
    "dense": "dense",
    "before": "before",
    "after": "right after",
    "recalibrated": "statistics anew",
    "finetuned": "finetuned",
}
TITLES = {
    "digits": "**Digits**: the 8 x 8 images of scikit-learn and an 8-layer residual network. A small problem: an image "
    "is 0.2 points, and whatever is trained again comes near the dense network. It shows what surgery destroys and "
    "which variants break; it can't decide between variants whose finetuned accuracies are within a point, nor say "
    "what holds for deep networks, long schedules and photographs.",
    "cpu": "**CIFAR-10**, the same network.",
}


def accuracies(rows: Sequence[dict[str, Any]], variant: str, column: str) -> list[float]:
    """In percent, of all seeds."""
    own = (row["accuracy"].get(column) for row in rows if row["variant"] == variant)
    return [100 * value for value in own if value is not None]


def beyond(
    rows: Sequence[dict[str, Any]], ablation: Ablation, column: str, images: int
) -> list[tuple[str, float, str]]:
    """Variants that differ from what they are compared with by more than chance, by how much, and that.

    More than either deviation; of one seed more than two standard errors of a difference on so many images.
    """
    found = []
    for other, default in ablation.against.items():
        ours, theirs = accuracies(rows, default, column), accuracies(rows, other, column)
        if not ours or not theirs:
            continue
        change = statistics.mean(theirs) - statistics.mean(ours)
        if abs(change) > _chance(ours, theirs, images):
            found.append((other, change, default))
    return found


def _chance(ours: Sequence[float], theirs: Sequence[float], images: int) -> float:
    if min(len(ours), len(theirs)) > 1:
        return max(statistics.stdev(ours), statistics.stdev(theirs))
    shares = [statistics.mean(each) / 100 for each in (ours, theirs)]
    return 200 * math.sqrt(sum(share * (1 - share) for share in shares) / images)


def comparison(ablation: Ablation, rows: Sequence[dict[str, Any]], images: int) -> list[str]:
    """One table, and what in it is more than chance."""
    text = [f"#### {ablation.title}", "", ablation.question, ""]
    known = [name for name in ablation.variants if accuracies(rows, name, "finetuned")]
    lines = []
    for name in known:
        own = [row for row in rows if row["variant"] == name]
        macs = f"{statistics.mean(row['macs_left'] for row in own):.1%}"
        cells = [accuracies(rows, name, column) for column in COLUMNS]
        lines.append((code(name), len(own), macs, *(spread(each, ".1f") if each else "" for each in cells)))
    text += [*table(("variant", "seeds", "MACs left", *COLUMNS.values()), lines), ""] if lines else []
    for column in ("after", "finetuned"):
        found = beyond(rows, ablation, column, images)
        said = [f"{code(other)} ({change:+.1f} against {code(default)})" for other, change, default in found]
        text.append(f"- {COLUMNS[column].capitalize()}, more than chance: {', '.join(said) or 'none'}.")
    if ablation is ABLATIONS["same_set"] and known:
        own = [row for row in rows if row["variant"] in known]
        sets = [{row["set"] for row in own if row["seed"] == seed} for seed in sorted({row["seed"] for row in own})]
        text.append(f"- With {sum(len(each) == 1 for each in sets)} of {len(sets)} seeds all plans were the same.")
    missing = [code(name) for name in ablation.variants if name not in known]
    text += [f"- Not measured yet: {', '.join(missing)}."] if missing else []
    return [*text, ""]


def verdict(rows: Sequence[dict[str, Any]], images: int) -> str:
    """Which defaults are beaten after finetuning."""
    beaten = [
        f"{code(default)} by {code(other)} ({change:+.1f})"
        for ablation in ABLATIONS.values()
        for other, change, default in beyond(rows, ablation, "finetuned", images)
        if change > 0
    ]
    pairs = {pair for ablation in ABLATIONS.values() for pair in ablation.against.items()}
    found = ", ".join(dict.fromkeys(beaten)) or "none"
    return f"Of {len(pairs)} comparisons, finetuned and beaten by more than chance: {found}."


def body(found: Sequence[Any]) -> list[str]:
    """A table per choice and preset."""
    text: list[str] = []
    for whole in sorted(found, key=lambda each: list(TITLES).index(each["preset"])):
        few = f", {whole['few']} images" if whole["few"] else ""
        epochs, precision = " + ".join(map(str, whole["epochs"])), whole.get("precision", "32-true")
        setting = f"{epochs} epochs in {precision}, {whole['ratio']:.0%} of the inner channels removed{few}"
        text += [f"### {whole['preset']}", "", TITLES[whole["preset"]], ""]
        rows, images = whole["rows"], whole["images"]
        text += [f"{setting}; {on(whole['machine'], counted(whole['threads']))}", "", verdict(rows, images), ""]
        for ablation in ABLATIONS.values():
            text += comparison(ablation, rows, images)
    return text[:-1]


SECTION = Section("Choices by evidence", ABOUT, COMMAND, "ablations/*.json", body)
