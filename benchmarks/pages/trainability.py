"""How well a linear network can be trained after most of its neurons have gone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.markdown import code, on, spread, table
from benchmarks.pages import Section

ABOUT = """Seven linear layers with nothing between them on scikit-learn's digits, 80 % of the hidden neurons removed:
plain L1, L1 with orthogonal weights (OrthP), and TPP, each in as many epochs; TPP also without its decorrelation, and
with it at every k-th step only. *JSV*: mean singular value of the Jacobian where the finetune stage begins; mean and
standard deviation over the seeds, accuracy of the last epoch. Both demands are this project's own."""
COMMAND = "python benchmarks/trainability.py --output benchmarks/results/trainability.json"
HEADERS = ("method", "seeds", "neurons", "JSV", "after surgery, %", "finetuned, %")


def body(found: Sequence[Any]) -> list[str]:
    """The table, and what was demanded of TPP."""
    whole = found[0]
    rows = []
    for name, runs in whole["rows"].items():
        after = "" if name == "dense" else spread([100 * run["accuracy_before_finetuning"] for run in runs], ".1f")
        singular = spread([run["mean_jacobian_singular_value"] for run in runs], ".4f")
        finetuned = spread([100 * run["accuracy"] for run in runs])
        rows.append((code(name), len(runs), runs[0]["hidden_neurons"][0], singular, after, finetuned))
    verdict = whole["verdict"]
    return [
        on({"device": whole["device"], **whole["versions"]}),
        "",
        *table(HEADERS, rows),
        "",
        f"TPP's JSV is {verdict['times_l1']:.0f} times plain L1's; at least {verdict['least_times_l1']:.0f} times are "
        f"demanded. It ends {100 * verdict['accuracy_behind_orthp']:.2f} points behind L1 + OrthP; at most "
        f"{100 * verdict['most_accuracy_behind_orthp']:.2f}, the smaller standard deviation, is demanded. "
        f"Both demands are met: {'yes' if verdict['targets_met'] else 'no'}.",
    ]


SECTION = Section("Trainability", ABOUT, COMMAND, "trainability.json", body)
