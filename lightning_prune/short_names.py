"""LightningCLI knows by their short names the classes that exist when it reads its arguments."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

CLI = "lightning.pytorch.cli"


class Follower(MetaPathFinder):
    """Lets a function follow the import of LightningCLI, whenever that comes, once.

    Args:
        load: imports the package's classes.
    """

    def __init__(self, load: Callable[[], None]) -> None:
        self._load = load

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """LightningCLI's own module, followed by ours; nothing else."""
        spec = PathFinder.find_spec(fullname, path, target) if fullname == CLI else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def execute(module: ModuleType) -> None:
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            if not is_underway():
                self._load()

        spec.loader.exec_module = execute  # type: ignore[method-assign]
        return spec


def is_underway() -> bool:
    """Whether a module of this package is being imported at the moment, so that others can't import it yet.

    >>> is_underway()
    False
    """
    package = __name__.partition(".")[0]
    ours = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == package]
    return any(getattr(getattr(module, "__spec__", None), "_initializing", False) for module in ours)
