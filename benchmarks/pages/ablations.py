"""Every option against its alternatives, and which differences are more than chance."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.judging import LEVEL, RULE, Difference, difference
from benchmarks.markdown import code, counted, listed, on, spread, table
from benchmarks.pages import Section
from benchmarks.variants import ABLATIONS, Ablation

ABOUT = f"""Every option against its alternatives. The dense stage of a seed is trained once; from there every variant
has the same epochs for its sparse stage and for finetuning, and every inner layer loses the same share of its channels,
so that multiply-adds are equal. Accuracy in percent of last epochs, mean and standard deviation over the seeds.
*Before*: as the sparse stage leaves the network. *Right after*: after surgery, which is the masked network's accuracy.
*Statistics anew*: the same network, with running statistics of its batch norms from 1024 training images.

{RULE}

Some defaults, ASCP's `rate` and `finish` among them, were chosen by these very seeds and images, so that the tables
are no independent test of them; and CIFAR-10's validation images are its test set. A call joins its rows to those that
the file of results has of other variants and seeds; `--results DIR` names a folder of one's own."""
COMMAND = """python -m benchmarks.ablations --preset digits --only first_event finish --seeds 0 1 2 3 4 5 6 7 8
python -m benchmarks.ablations --preset digits --only schedules clusters --seeds 0 1 2 3 4 5 6 7 8
python -m benchmarks.ablations --preset digits"""
REMARK = "cpu --root DIR: CIFAR-10; call it again to go on"
COLUMNS = {
    "dense": "dense",
    "before": "before",
    "after": "right after",
    "recalibrated": "statistics anew",
    "finetuned": "finetuned",
}
TITLES = {
    "digits": "**Digits**: the 8 x 8 images of scikit-learn and an 8-layer residual network. A small problem: an image "
    "is {image:.1f} points, and whatever is trained again comes near the dense network. It shows what surgery destroys "
    "and which variants break; it can hardly decide between variants whose finetuned accuracies are within a point, "
    "nor say what holds for deep networks, long schedules and photographs.",
    "cpu": "**CIFAR-10**, the same network.",
}


def accuracies(rows: Sequence[dict[str, Any]], variant: str, column: str) -> list[float]:
    """In percent, of all seeds."""
    return list(_by_seed(rows, variant, column).values())


def differences(
    rows: Sequence[dict[str, Any]], ablation: Ablation, column: str, images: int
) -> dict[tuple[str, str], Difference]:
    """Of every variant to what it is compared with, by both names, where both are measured."""
    known = {name: _by_seed(rows, name, column) for name in ablation.variants}
    found = {pair: difference(known[pair[0]], known[pair[1]], images) for pair in ablation.against.items()}
    return {pair: change for pair, change in found.items() if change is not None}


def beyond(
    rows: Sequence[dict[str, Any]], ablation: Ablation, column: str, images: int
) -> list[tuple[str, float, str]]:
    """Variants that differ from what they are compared with by more than chance, by how much, and that."""
    found = differences(rows, ablation, column, images)
    return [(other, change.gain, default) for (other, default), change in found.items() if change.is_beyond]


def _by_seed(rows: Sequence[dict[str, Any]], variant: str, column: str) -> dict[int, float]:
    own = {row["seed"]: row["accuracy"].get(column) for row in rows if row["variant"] == variant}
    return {seed: 100 * value for seed, value in own.items() if value is not None}


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
    """How many alternatives end above and below their default, and how many would by chance."""
    found: dict[tuple[str, str], Difference] = {}
    for ablation in ABLATIONS.values():
        found |= differences(rows, ablation, "finetuned", images)
    sides: dict[str, list[str]] = {"above": [], "below": [], "level": []}
    for (other, default), change in found.items():
        sides[change.side].append(f"{code(other)} ({change.gain:+.1f} against {code(default)})")
    above, below = (f"{len(sides[side])} ({listed(sides[side])})" for side in ("above", "below"))
    return (
        f"Of {len(found)} measured comparisons, finetuned: alternatives above their default by more than chance: "
        f"{above}; below: {below}. About {LEVEL * len(found):.1f} of so many would be by chance alone."
    )


def body(found: Sequence[Any]) -> list[str]:
    """A table per choice and preset."""
    text: list[str] = []
    for whole in sorted(found, key=lambda each: list(TITLES).index(each["preset"])):
        few = f", {whole['few']} images" if whole["few"] else ""
        epochs, precision = " + ".join(map(str, whole["epochs"])), whole.get("precision", "32-true")
        setting = f"{epochs} epochs in {precision}, {whole['ratio']:.0%} of the inner channels removed{few}"
        rows, images = whole["rows"], whole["images"]
        text += [f"### {whole['preset']}", "", TITLES[whole["preset"]].format(image=100 / images), ""]
        text += [f"{setting}; {on(whole['machine'], counted(whole['threads']))}"]
        others = [on(row["machine"]) for row in rows if "machine" in row]
        text += [f"{others.count(other)} of {len(rows)} rows: {other}" for other in dict.fromkeys(others)]
        text += ["", verdict(rows, images), ""]
        for ablation in ABLATIONS.values():
            text += comparison(ablation, rows, images)
    return text[:-1]


SECTION = Section("Choices by evidence", ABOUT, COMMAND, "ablations/*.json", body, remark=REMARK)
