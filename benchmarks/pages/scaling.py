"""How costs grow with the network and with the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.markdown import listed, on, table
from benchmarks.pages import Section
from benchmarks.scaling import FAMILIES, MODELS, QUANTITIES, STAGES, points, slope

ABOUT = """Processor seconds of one thread, the least of a few repeats, one picture of 224 x 224, half of the channels.
*Trace*: from the network to its channel groups. *Proof*: masked and slim network side by side in double precision.
*Surgery*: with SGD's momentum. *Penalty*: strength and penalty of one step in a live fit. *Clusters*: the end of an
epoch of ASCP there, from the weights to the reconstructed channels. *Exponent*: b of seconds = a * size^b, by least
squares of the logarithms, with its standard error. A cost grows faster than the size where b is above 1 by more than
two standard errors. Every layer has a cost of its own, however narrow, and in the ResNets the layers multiply faster
than the parameters; so both sizes are shown."""
COMMAND = "python -m benchmarks.scaling"
SIZES = ("parameters", "layers")


def exponents(rows: Sequence[dict[str, Any]], names: Sequence[str], size: str) -> dict[str, tuple[float, float]]:
    """Of every quantity that at least three of these networks have: exponent and standard error."""
    known = {quantity: points(rows, quantity, names, size) for quantity in QUANTITIES}
    return {quantity: slope(own) for quantity, own in known.items() if len(own) >= 3}


def faster(found: dict[str, tuple[float, float]]) -> dict[str, float]:
    """What grows faster than the size, with its exponent."""
    return {quantity: b for quantity, (b, error) in found.items() if b - 2 * error > 1}


def costs(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Seconds per network."""
    lines = []
    for name in dict.fromkeys(row["model"] for row in rows):
        own = {row["quantity"]: row for row in rows if row["model"] == name}
        facts = next(iter(own.values()))
        seconds = (f"{own[quantity]['processor']:.2g}" if quantity in own else "" for quantity in QUANTITIES)
        macs = f"{facts['macs'] / 1e9:.1f}"
        lines.append((name, f"{facts['parameters'] / 1e6:.1f}", macs, facts["layers"], *seconds))
    return table(("network", "M parameters", "G MACs", "layers", *QUANTITIES), lines)


def growth(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Exponents, and whether anything grows faster than the parameters."""
    choices = {"ResNets": FAMILIES["ResNet"], "all networks": MODELS}
    columns = {(label, size): exponents(rows, names, size) for label, names in choices.items() for size in SIZES}
    lines = []
    for quantity in QUANTITIES:
        cells = [found.get(quantity) for found in columns.values()]
        lines.append((quantity, *("" if cell is None else f"{cell[0]:.2f} ± {cell[1]:.2f}" for cell in cells)))
    text = table(("exponent", *(f"{label}, by {size}" for label, size in columns)), lines)
    text.append("")
    for label in choices:
        by = {size: faster(columns[label, size]) for size in SIZES}
        said = ", ".join(f"{quantity} ({b:.2f})" for quantity, b in by["parameters"].items()) or "nothing"
        both = ", ".join(quantity for quantity in by["parameters"] if quantity in by["layers"]) or "nothing"
        text.append(
            f"- {label[0].upper()}{label[1:]}: faster than the parameters grows {said}; faster than both sizes, {both}."
        )
    return text


def by_ranks(rows: Sequence[dict[str, Any]], key: str = "processor") -> list[str]:
    """Seconds of the hand-over, and how much more the most ranks take than one."""
    ranks = sorted({row["ranks"] for row in rows})
    lines = []
    for stage, label in STAGES.items():
        own = {row["ranks"]: row[key] for row in rows if row["stage"] == stage}
        times = f"{own[ranks[-1]] / own[ranks[0]]:.2f}"
        lines.append((label, *(f"{own[count]:.4f}" for count in ranks), times))
    heads = (f"{count} rank{'s' if count > 1 else ''}" for count in ranks)
    return table((f"{key} seconds of the longest rank", *heads, f"{ranks[-1]} ranks : {ranks[0]}"), lines)


def body(found: Sequence[Any]) -> list[str]:
    """Tables and pictures."""
    whole = found[0]
    text = [on(whole["machine"], "1 thread"), "", *costs(whole["rows"]), "", *growth(whole["rows"])]
    missing = [name for name in MODELS if all(row["model"] != name for row in whole["rows"])]
    text += [f"- Not measured yet: {', '.join(missing)}."] if missing else []
    text += ["", "![Seconds against parameters](images/scaling.svg)", ""]
    text += [line.format(cheapest=cheapest(whole["rows"], "penalty: MaskSparsity")) for line in WHY]
    if whole["ranks"]:
        text += ["", RANKS, "", *by_ranks(whole["ranks"]), "", *by_ranks(whole["ranks"], "clock"), ""]
        text += [waiting(whole), "", "![Seconds against ranks](images/scaling_ranks.svg)"]
    return text


def waiting(whole: dict[str, Any]) -> str:
    """The hand-over by the clock, and the machine."""
    known = {row["ranks"]: row["clock"] for row in whole["ranks"] if row["stage"] == "handover"}
    seconds, ranks = listed(f"{known[count]:.3f}" for count in sorted(known)), listed(map(str, sorted(known)))
    return (
        f"By the clock all of the hand-over takes {seconds} s on {ranks} ranks of one machine "
        f"({whole['machine']['cpu']}), where the ranks share the cores and wait for each other; the processor's "
        "seconds do not show that."
    )


def cheapest(rows: Sequence[dict[str, Any]], quantity: str) -> str:
    """On how many networks a quantity is the least of all."""
    own = {row["model"]: row["processor"] for row in rows if row["quantity"] == quantity}
    least = {name: min(row["processor"] for row in rows if row["model"] == name) for name in own}
    return f"{sum(own[name] <= least[name] for name in own)} of the {len(own)} networks that have it"


WHY = (
    "- In the ResNets trace and surgery go nearly by the number of layers; where layers are as large as in VGG's head, "
    "surgery goes by their weights.",
    "- MaskSparsity's penalty works on the norms of inner layers alone: one in a block of ResNet-18 and 34, two in a "
    "block of the deeper ones. It is the least of all quantities on {cheapest}.",
    "- ASCP and TPP multiply filters with filters: per weight as many products as the layer has channels (of TPP: as "
    "many as go). In deeper networks of the same widths that is constant. The layers of VGG's head have 4096 channels: "
    "there these two do grow faster than the parameters, for that is the method.",
    "- A penalty's gradients and what surgery leaves are new tensors, in VGG's head very large ones.",
    "- Surgery under DDP is paid once in a run.",
)

RANKS = """On several ranks, an 8-layer residual network of width 16 under DDP over gloo. *Pick, agreed on*: the
method's choice of channels on rank 0, and its way to the others. *Plan, agreed on*: the same of the plan, when surgery
begins. *Proof*: of every rank. *Surgery*: of network and optimiser, and wrapping the network in DDP anew. *All of the
hand-over*: what lies between the last step before surgery and the first after it, with all of these but the pick."""
SECTION = Section("Growth of the costs", ABOUT, COMMAND, "scaling.json", body)
