"""The plan travels in the checkpoint, so that a slim checkpoint loads into a fresh dense module.

Lightning loads weights before any callback hears of the checkpoint. The LightningModule's own ``on_load_checkpoint``
comes early enough: the callback wraps it on the instance (and ``on_save_checkpoint``, which weights-only checkpoints
call as well). Without a Trainer, :func:`load_from_checkpoint` or :class:`SlimCheckpointMixin` do the same.

A slim module remembers the plans it has been through, in order, each with the name of the pruned submodule. A
checkpoint holds the same list as plain strings under ``"lightning_prune"``, readable with ``weights_only=True``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lightning.pytorch import LightningModule
from lightning.pytorch.core.hooks import CheckpointHooks
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_prune.callbacks.neighbours import average_models, callbacks_of
from lightning_prune.callbacks.watching import PruningCallback
from lightning_prune.errors import PlanError
from lightning_prune.structure import Plan, prune_
from lightning_prune.structure.plan import named_tensors, plain_name, submodule
from lightning_prune.structure.sparsity import plan_from_json

KEY = "lightning_prune"
VERSION = 1
_MEMORY = "_pruning_history"
_HOOKS = ("on_load_checkpoint", "on_save_checkpoint")

Module = TypeVar("Module", bound=LightningModule)


class AppliedPlan(NamedTuple):
    """A plan and the submodule it was applied to (``""``: the LightningModule itself)."""

    module: str
    plan: Plan


def history(pl_module: LightningModule) -> tuple[AppliedPlan, ...]:
    """The plans that made this module as slim as it is, oldest first."""
    return tuple(vars(pl_module).get(_MEMORY, ()))


def remember_(pl_module: LightningModule, module: str, plan: Plan) -> None:
    """Note that ``plan`` has been applied to the submodule ``module``; later checkpoints will say so."""
    vars(pl_module)[_MEMORY] = (*history(pl_module), AppliedPlan(module, plan))


def attach_(pl_module: LightningModule) -> None:
    """Wrap the module's checkpoint hooks so that plans are saved and loaded; twice is the same as once."""
    for name, wrapper in zip(_HOOKS, (_load_hook, _save_hook), strict=True):
        if not _is_ours(vars(pl_module).get(name)):
            setattr(pl_module, name, partial(wrapper, pl_module, getattr(pl_module, name)))


def detach_(pl_module: LightningModule) -> None:
    """Unwrap the checkpoint hooks, except on a slim module: its checkpoints need the plan as long as it lives."""
    if history(pl_module):
        return
    for name in _HOOKS:
        hook = vars(pl_module).get(name)
        if isinstance(hook, partial) and _is_ours(hook):
            inner = hook.args[1]
            delattr(pl_module, name)
            if getattr(inner, "__func__", None) is not getattr(type(pl_module), name):
                setattr(pl_module, name, inner)


def adapt_(
    pl_module: LightningModule, checkpoint: Mapping[str, Any], reader: Callable[..., None] | None = None
) -> None:
    """Give the module, and its weight averages, the shapes that a checkpoint's weights have.

    Args:
        pl_module: dense or slim.
        checkpoint: whole, before its weights are loaded.
        reader: the module's own hook that sees the checkpoint next, and may rename weights in it.

    Raises:
        PlanError: checkpoint and module went through different surgeries, or the checkpoint's record is damaged; the
            module is as it was.
    """
    recorded, applied = _recorded(checkpoint), history(pl_module)
    if not recorded and not applied:
        return
    if _first_misfit(pl_module, checkpoint) is not None:
        missing = recorded[len(applied) :] if recorded[: len(applied)] == applied else ()
        misfit = _first_misfit(pl_module, checkpoint, missing)
        if misfit is not None:
            raise PlanError(_misfit_message(misfit, "slim" if recorded else "dense"))
        _refuse_other_names(pl_module, checkpoint, "slim" if recorded else "dense", reader)
        _lengths(pl_module, recorded)
        _announce(pl_module)
        try:
            for entry in missing:
                _apply_(pl_module, entry)
        except PlanError:
            _refuse_other_names(pl_module, checkpoint, "slim")
            raise
    else:
        _refuse_other_names(pl_module, checkpoint, "slim" if recorded else "dense", reader)
        for (name, dim), (length, own) in _lengths(pl_module, recorded).items():
            if length != own:
                raise PlanError(
                    f"The checkpoint's {KEY!r} entry leaves length {length} along dim {dim} of {name!r}, but module and"
                    f" weights have {own}."
                )
    if recorded:
        vars(pl_module)[_MEMORY] = recorded


def load_from_checkpoint(cls: type[Module], path: str | Path, **arguments: Any) -> Module:
    """``cls.load_from_checkpoint`` for checkpoints from before and after surgery.

    Args:
        cls: the LightningModule's class.
        path: the checkpoint.
        **arguments: as for ``LightningModule.load_from_checkpoint``.

    Returns:
        The module, slim if the checkpoint is.

    Raises:
        PlanError: the checkpoint's plan doesn't fit what ``cls`` builds.
    """
    own = vars(cls).get(_HOOKS[0])
    inherited = cls.on_load_checkpoint

    def on_load_checkpoint(self: Module, checkpoint: dict[str, Any]) -> None:
        adapt_(self, checkpoint, inherited)
        inherited(self, checkpoint)

    setattr(cls, _HOOKS[0], on_load_checkpoint)
    try:
        module: Module = cls.load_from_checkpoint(path, **arguments)
    finally:
        delattr(cls, _HOOKS[0])
        if own is not None:
            setattr(cls, _HOOKS[0], own)
    attach_(module)
    return module


class SlimCheckpointMixin(LightningModule):
    """Makes ``Model.load_from_checkpoint`` read slim checkpoints.

    Write ``class Model(SlimCheckpointMixin, LightningModule)``. A class that overrides ``on_load_checkpoint`` or
    ``on_save_checkpoint`` itself has to call ``super()``.
    """

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the shapes that the checkpoint's weights have."""
        own, reader = type(self).on_load_checkpoint, super().on_load_checkpoint
        adapt_(self, checkpoint, reader if own is SlimCheckpointMixin.on_load_checkpoint else own)
        reader(checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the plans that this module has been through."""
        _record_(self, checkpoint)
        super().on_save_checkpoint(checkpoint)


def _load_hook(pl_module: LightningModule, inner: Callable[..., None], checkpoint: dict[str, Any]) -> None:
    adapt_(pl_module, checkpoint, inner)
    inner(checkpoint)


def _save_hook(pl_module: LightningModule, inner: Callable[..., None], checkpoint: dict[str, Any]) -> None:
    _record_(pl_module, checkpoint)
    inner(checkpoint)


def _is_ours(hook: Any) -> bool:
    # Partials of module-level functions: they can be copied with the module (EMA, SWA) and pickled.
    return isinstance(hook, partial) and hook.func in (_load_hook, _save_hook)


def _record_(pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
    plans = [{"module": entry.module, "plan": entry.plan.to_json()} for entry in history(pl_module)]
    if plans:
        checkpoint[KEY] = {"version": VERSION, "plans": plans}


def _recorded(checkpoint: Mapping[str, Any]) -> tuple[AppliedPlan, ...]:
    record = checkpoint.get(KEY)
    if record is None:
        return ()
    if not isinstance(record, Mapping) or record.get("version") != VERSION:
        raise PlanError(f"The checkpoint's {KEY!r} entry is not of version {VERSION}, which this library reads.")
    try:
        pairs = [(entry["module"], entry["plan"]) for entry in record["plans"]]
        return tuple(AppliedPlan(str(module), plan_from_json(plan)) for module, plan in pairs)
    except (KeyError, TypeError) as error:
        raise PlanError(f"The checkpoint's {KEY!r} entry is damaged: {error!r}.") from error


def _announce(pl_module: LightningModule) -> None:
    trainer = pl_module._trainer
    if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
        for callback in callbacks_of(trainer):
            if isinstance(callback, PruningCallback):
                callback.before_cut(pl_module)


def _apply_(pl_module: LightningModule, entry: AppliedPlan) -> None:
    trainer = pl_module._trainer
    averages = () if trainer is None else tuple(average_models(trainer))
    for module in (pl_module, *averages):
        prune_(submodule(module, entry.module), entry.plan)


def _lengths(pl_module: LightningModule, plans: tuple[AppliedPlan, ...]) -> dict[tuple[str, int], tuple[int, int]]:
    """What the plans leave along every dim that they cut, and what the module has there now.

    Raises:
        PlanError: the module has no such tensor.
    """
    lengths = {}
    for entry in plans:
        try:
            tensors = named_tensors(submodule(pl_module, entry.module))
        except AttributeError:
            raise PlanError(f"The checkpoint's plan cuts {entry.module!r}, which this module does not have.") from None
        for (name, dim), length in entry.plan.lengths().items():
            whole = f"{entry.module}.{name}" if entry.module else name
            if name not in tensors or dim >= tensors[name].dim():
                raise PlanError(f"The checkpoint's plan cuts dim {dim} of {whole!r}, which this module does not have.")
            lengths[whole, dim] = length, tensors[name].shape[dim]
    return lengths


class _Misfit(NamedTuple):
    name: str
    stored: tuple[int, ...]
    own: tuple[int, ...]


def _first_misfit(
    pl_module: LightningModule, checkpoint: Mapping[str, Any], plans: tuple[AppliedPlan, ...] = ()
) -> _Misfit | None:
    """The first weight whose shape in the checkpoint isn't what the module's will be after ``plans``."""
    stored = checkpoint.get("state_dict", {})
    tensors = {name: value for name, value in pl_module.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    # By identity, for a tied weight has several names and the plan uses one of them.
    shapes = {id(tensor): list(tensor.shape) for tensor in tensors.values()}
    plain = {plain_name(name): tensor for name, tensor in tensors.items()}
    for entry in plans:
        for (name, dim), length in entry.plan.lengths().items():
            tensor = plain.get(f"{entry.module}.{name}" if entry.module else name)
            if tensor is not None and dim < tensor.dim():
                shapes[id(tensor)][dim] = length
    for name, tensor in tensors.items():
        theirs, ours = stored.get(name), shapes[id(tensor)]
        if isinstance(theirs, Tensor) and list(theirs.shape) != ours:
            return _Misfit(name, tuple(theirs.shape), tuple(ours))
    return None


def _refuse_other_names(
    pl_module: LightningModule,
    checkpoint: Mapping[str, Any],
    kind: str,
    reader: Callable[..., None] | None = None,
) -> None:
    """Name the first weight that only one of them has; a module with a reader of its own may see to that by itself.

    Raises:
        PlanError: in that case.
    """
    reads_itself = reader is not None and getattr(reader, "__func__", reader) is not CheckpointHooks.on_load_checkpoint
    if reads_itself or not pl_module.strict_loading or "state_dict" not in checkpoint:
        return
    stored, own = list(checkpoint["state_dict"]), list(pl_module.state_dict(keep_vars=True))
    missing = next((name for name in own if name not in checkpoint["state_dict"]), None)
    unknown = next((name for name in stored if name not in set(own)), None)
    if missing is not None or unknown is not None:
        what = f"it lacks {missing!r}" if missing is not None else f"it holds {unknown!r}, which is not there"
        raise PlanError(
            f"The {kind} checkpoint doesn't fit this module: {what}; load it into a fresh module of the class it was"
            " trained with."
        )


def _misfit_message(misfit: _Misfit, kind: str) -> str:
    return (
        f"The {kind} checkpoint doesn't fit this module: {misfit.name!r} has shape {misfit.stored} there"
        f" and {misfit.own} here; load it into a fresh module of the class it was trained with."
    )
