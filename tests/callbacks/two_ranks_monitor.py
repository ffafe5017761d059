"""Run as a script: on two ranks a run without the monitor, one with it, and one that ends early as that is safe."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from lightning_prune import GReg1, PruningMonitor, StructuralPruning
from tests.callbacks.slimming import Task, run


def digest(module: torch.nn.Module) -> str:
    whole = hashlib.sha256()
    for parameter in module.parameters():
        whole.update(parameter.detach().numpy().tobytes())
    return whole.hexdigest()


def main(folder: Path) -> None:
    found: dict[str, Any] = {}
    for name, extra, arguments in (
        ("plain", [], {}),
        ("watched", [PruningMonitor("val_loss")], {}),
        ("safe", [], {"cut_when": "safe", "safe_change": 0.1}),
    ):
        torch.manual_seed(0)
        surgery = StructuralPruning(monitor="val_loss", latency_batches=(), report_file=None, **arguments)
        settings: dict[str, Any] = {"devices": 2, "strategy": "ddp", "max_epochs": 6}
        result = run(folder, *extra, task=Task(), surgery=surgery, picker=GReg1(0.5, epochs=4), **settings)
        batches = len(result.watch.widths) // 6
        found[name] = {"weights": digest(result.task), "slim_from": result.watch.widths.index(4) / batches}
    (folder / f"{os.environ.get('LOCAL_RANK', '0')}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
    torch.distributed.barrier()  # nobody waits for the second process; its file has to be there
    torch.distributed.destroy_process_group()
