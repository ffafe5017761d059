"""The same classifier through LightningCLI: what is trained, and whether it is pruned, stands in YAML.

python examples/train.py fit -c examples/configs/base.yaml
python examples/train.py fit -c examples/configs/base.yaml -c examples/configs/greg1.yaml
python examples/train.py fit -c examples/configs/base.yaml -c examples/configs/greg1.yaml --model.optimizer adamw
python examples/train.py fit -c examples/configs/base.yaml -c examples/configs/ddp.yaml
"""

from __future__ import annotations

from pathlib import Path

import torch
from classifier import Classifier
from data import CIFAR10, Digits  # noqa: F401  # so that YAML may name them
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from lightning_prune import StructuralPruning, save_slim


class CLI(LightningCLI):
    """LightningCLI that writes a slim file beside the report, where something was pruned."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Threads of the CPU; a network this small gains little from more than one."""
        parser.add_argument("--threads", type=int, default=1)

    def before_instantiate_classes(self) -> None:
        """Set the threads before anything runs."""
        torch.set_num_threads(self.config[self.subcommand].threads)

    def after_fit(self) -> None:
        """Save what is left."""
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        for callback in self.trainer.callbacks:
            is_done = isinstance(callback, StructuralPruning) and callback.plan is not None
            if is_done and self.trainer.is_global_zero:
                save_slim(self.model, folder / "slim.safetensors", callback.plan, report=callback.report)


def main(args: ArgsType = None) -> None:
    """Run what the command line, or ``args``, says."""
    CLI(Classifier, LightningDataModule, subclass_mode_data=True, args=args)


if __name__ == "__main__":
    main()
