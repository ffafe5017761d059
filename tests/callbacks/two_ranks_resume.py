"""Every method resumed on two ranks: ``python -m tests.callbacks.two_ranks_resume FOLDER``.

From checkpoints in the sparse stage, at the epoch of surgery, and in the finetune stage; with weight averages, and with
a finetune stage that goes on or begins anew. Both ranks note hashes of all that is left at the end.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging

from lightning_prune.callbacks.neighbours import average_models
from lightning_prune.callbacks.structural import StructuralPruning
from tests.callbacks.nets import Classifier, image_loader, seeded, trainer
from tests.callbacks.two_ranks_rows import METHODS, digest
from tests.settings import EPOCHS, SETTINGS

CASES: dict[str, dict[str, Any]] = {
    **{row: {"row": row, "finetune": ("continue", "restart")[number % 2]} for number, row in enumerate(METHODS)},
    "averages": {"row": "greg1", "averages": "ema", "finetune": "continue"},
    "averages, anew": {"row": "mask_sparsity", "averages": "ema", "finetune": "restart"},
    "stochastic averages": {"row": "tpp", "averages": "swa", "finetune": "continue"},
}
MOMENTS = {"in the stage": 0, "at surgery": EPOCHS - 1, "in the finetune stage": EPOCHS}


def average(kind: str | None) -> list[Any]:
    if kind is None:
        return []
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    return [EMAWeightAveraging(decay=0.9) if kind == "ema" else swa]


def train(folder: Path, case: str, path: Path | None = None) -> list[str]:
    """Hashes of weights, momenta, averages, and of what the method remembers."""
    settings = CASES[case]
    method, averages = SETTINGS[settings["row"]].build(), average(settings.get("averages"))
    surgery = StructuralPruning(latency_batches=(), report_file=None, finetune=settings["finetune"])
    module = Classifier(seeded(SETTINGS[settings["row"]].net, seed=0 if path is None else 1))
    keeper = [] if path else [ModelCheckpoint(folder / case, "{epoch}", save_top_k=-1)]
    kinds = {"enable_checkpointing": not path, "strategy": "ddp", "devices": 2, "max_epochs": EPOCHS + 2}
    run = trainer(method, surgery, *averages, *keeper, use_distributed_sampler=True, **kinds)
    run.fit(module, image_loader(14), ckpt_path=path)
    twins = [dict(twin.named_parameters()) for twin in average_models(run)]
    state = [list(run.optimizers[0].state[p].values()) for p in module.parameters()]
    return [method.phase, *map(digest, (dict(module.named_parameters()), state, twins, method.state_dict()))]


def main(folder: Path) -> None:
    """One line per case: whole, and from each moment."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = {}
    for case in CASES:
        found[case] = {"whole": train(folder, case)}
        for moment, epoch in MOMENTS.items():
            found[case][moment] = train(folder, case, folder / case / f"epoch={epoch}.ckpt")
    rank = torch.distributed.get_rank()
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
