"""Several ranks, one outcome: what rank 0 decides holds everywhere, and where one rank fails, all of them stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from lightning.pytorch import Trainer

from lightning_prune.errors import PruningError

Result = TypeVar("Result")
_KNOWN = "_known_on_all_ranks"


def run_together(trainer: Trainer, work: Callable[[], Result], what: str = "Surgery") -> Result:
    """Do the same work on every rank; where one of them fails, all of them raise, and nobody is left waiting.

    The work may itself consist of such parts: a failure that all ranks know of is not told again.

    Args:
        trainer: every rank's own.
        work: the same on every rank, and without collectives other than those of this module.
        what: begins the sentence that the other ranks raise.

    Raises:
        PruningError: the work failed on another rank. A failure on this rank is raised as it is.
    """
    done: list[Result] = []
    failure: Exception | None = None
    try:
        done.append(work())
    except Exception as error:
        if hasattr(error, _KNOWN):
            raise
        failure = error
    messages = _gather(trainer, None if failure is None else f"{type(failure).__name__}: {failure}")
    rank = next((rank for rank, message in enumerate(messages) if message is not None), None)
    if failure is None and rank is None:
        return done[0]
    if failure is None:
        first = str(messages[rank or 0]).splitlines()[0]
        failure = PruningError(f"{what} failed on rank {rank}: {first}")
    vars(failure)[_KNOWN] = True
    raise failure


def on_first_rank(trainer: Trainer, work: Callable[[], Result], what: str = "Surgery") -> Result | None:
    """Do the work on rank 0 while the others wait; they get ``None``, or its failure."""
    return run_together(trainer, lambda: work() if trainer.is_global_zero else None, what)


def agreed(trainer: Trainer, decide: Callable[[], Result], what: str = "Surgery") -> Result:
    """Rank 0's decision on every rank. All of them decide, for on the way there they may change what they remember.

    Args:
        trainer: every rank's own.
        decide: gives what can be pickled; what other ranks than 0 get is dropped.
        what: as in :func:`run_together`.

    Raises:
        PruningError: another rank could not decide. A failure on this rank is raised as it is.
    """
    decision: Result = trainer.strategy.broadcast(run_together(trainer, decide, what), src=0)
    return decision


def _gather(trainer: Trainer, message: str | None) -> list[str | None]:
    if trainer.world_size == 1:
        return [message]
    messages: list[str | None] = [None] * trainer.world_size
    torch.distributed.all_gather_object(messages, message)
    return messages
