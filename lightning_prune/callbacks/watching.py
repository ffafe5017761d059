"""What all pruning callbacks share: one capture per fit, and a door that is shut to what can't work."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer

from lightning_prune.callbacks.capture import Capture
from lightning_prune.callbacks.ranks import run_together
from lightning_prune.errors import ConfigurationError, PlanError, PruningError


class PruningCallback(Callback, ABC):
    """Base of every callback that prunes: finds its partners, shares one :class:`Capture`, refuses what can't work.

    A subclass that overrides one of the hooks below calls ``super()``'s first.

    Args:
        module: name of the pruned module inside the LightningModule; ``None`` finds it in the first training batch.
    """

    def __init__(self, module: str | None = None) -> None:
        super().__init__()
        self.module = module
        self._capture: Capture | None = None

    @property
    def capture(self) -> Capture:
        """The watch over the pruned module that all pruning callbacks of this fit share; exists from ``setup`` on."""
        if self._capture is None:
            raise ConfigurationError(f"{type(self).__name__} belongs to no fit yet; the capture exists from setup on.")
        return self._capture

    @property
    @abstractmethod
    def finished(self) -> bool:
        """Whether this callback has nothing left to do in this fit, so that nothing needs to be watched for it."""

    @property
    def needs_channels(self) -> bool:
        """Whether it asks how channels hang together, so that the forward pass has to be traced."""
        return True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies that shard parameters, and share the capture of the first pruning callback."""
        if stage != "fit":
            return
        refuse_sharded_parameters(type(trainer.strategy), self)
        partners = [callback for callback in trainer.callbacks if isinstance(callback, PruningCallback)]  # type: ignore[attr-defined]
        first = partners[0] if self in partners else self
        if first is self:
            names = {partner.module for partner in [self, *partners] if partner.module is not None}
            if len(names) > 1:
                raise ConfigurationError(f"The pruning callbacks name different modules: {', '.join(sorted(names))}.")
            traces = any(partner.needs_channels for partner in [self, *partners])
            self._capture = Capture(configured_(pl_module), next(iter(names), None), traces)
        else:
            self._capture = first.capture

    def before_cut(self, pl_module: LightningModule) -> None:
        """A checkpoint of a slim network, about to be loaded for a fit, is going to cut this module."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch this batch's forward call."""
        if not self.finished:
            self.capture.begin_batch()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Trace the pruned module, in the first batch."""
        if not self.finished:
            self._build(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Trace the pruned module, if manual optimisation has bypassed ``on_before_backward``."""
        # under automatic optimisation a step without it is one without a loss, and perhaps without any call
        if not self.finished and not pl_module.automatic_optimization:
            self._build(trainer)

    def _build(self, trainer: Trainer) -> None:
        if self.capture.graph is None:
            run_together(trainer, self.capture.build, "Tracing")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop watching until the next batch."""
        if self._capture is not None:
            self._capture.end_batch()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        if self._capture is not None:
            self._capture.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind: Lightning calls no ``teardown`` after an error."""
        if self._capture is not None:
            self._capture.close()


@contextmanager
def reading_state(who: str) -> Iterator[None]:
    """Say in one sentence that a checkpoint's state of a callback can't be read.

    Raises:
        PlanError: something in it is missing, or is of another kind.
    """
    try:
        yield
    except PruningError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        first = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
        raise PlanError(
            f"The checkpoint's state of {who} can't be read ({first}); it is damaged or of another version."
        ) from error


def configured_(pl_module: LightningModule) -> LightningModule:
    """The module with the layers that it builds in ``configure_model``, which Lightning calls only after ``setup``.

    The hook may be called more than once, as its documentation says; weight averages do so too.
    """
    if is_overridden("configure_model", pl_module):
        pl_module.configure_model()
    return pl_module


def refuse_sharded_parameters(strategy: type, callback: Callback) -> None:
    """Refuse a class of strategies under which no rank has the whole of a parameter.

    Raises:
        ConfigurationError: in that case.
    """
    if not issubclass(strategy, (SingleDeviceStrategy, DDPStrategy)) or issubclass(strategy, DeepSpeedStrategy):
        raise ConfigurationError(
            f"{type(callback).__name__} can't change shapes under {strategy.__name__}; use one device or DDP."
        )
