"""The finetune stage learns from the dense network: Hinton's loss on the logits of training_step's own forward."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from lightning_prune.callbacks.capture import is_redirected
from lightning_prune.callbacks.dynamics import logs_after
from lightning_prune.callbacks.inject import Penalty, add_to_loss_
from lightning_prune.callbacks.lineage import comes_of
from lightning_prune.callbacks.ranks import agreed, run_together
from lightning_prune.callbacks.teacher import Teacher
from lightning_prune.door import is_number, record
from lightning_prune.errors import ConfigurationError
from lightning_prune.penalties import distillation
from lightning_prune.reports.report import Distilled
from lightning_prune.structure.plan import original, plain_name, submodule


@dataclass(frozen=True)
class Distillation:
    r"""How the slim network learns from the dense one.

    .. math:: (1 - w) \, L + w \, T^2 \, \mathrm{KL}\bigl(\sigma(t / T) \,\Vert\, \sigma(z / T)\bigr)

    with the loss :math:`L` of ``training_step``, its logits :math:`z`, the teacher's :math:`t` and the softmax
    :math:`\sigma`. The shares add up to one, so that the loss keeps its scale and the learning rate its meaning. The
    divergence is the mean over samples, over positions that are classified each (segmentation), and over several calls
    in a batch.

    Args:
        temperature: :math:`T > 0`.
        weight: :math:`w` in ``(0, 1]``; 1 learns from the teacher alone.
        dim: along which the classes lie; ``None`` stands for 1, as ``cross_entropy`` has it, and is refused for 3-d
            logits, whose classes may be last (``-1``).

    Raises:
        ConfigurationError: a value is out of its range.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531.

    >>> Distillation.of({"temperature": 2, "weight": 0.9})
    Distillation(temperature=2, weight=0.9, dim=None)
    """

    temperature: float = 4.0
    weight: float = 0.5
    dim: int | None = None

    def __post_init__(self) -> None:
        if not is_number(self.temperature) or not 0 < self.temperature < float("inf"):
            raise ConfigurationError(f"distill temperature={self.temperature!r} must be a positive number.")
        if not is_number(self.weight) or not 0 < self.weight <= 1:
            raise ConfigurationError(f"distill weight={self.weight!r} must lie in (0, 1].")
        if self.dim is not None and type(self.dim) is not int:
            raise ConfigurationError(f"distill dim={self.dim!r} must be a whole number, such as 1 or -1.")

    @classmethod
    def of(cls, value: Distillation | Mapping[str, Any] | None) -> Distillation | None:
        """From its fields by name, as users write it; ``None`` stays ``None``."""
        return record(cls, "distill", value, example={"temperature": 4, "weight": 0.5})


@dataclass
class _Call:
    """A call of the outermost module on the way to the logits."""

    root: str
    derived: bool
    teacher: list[Tensor]
    student: list[Tensor] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)  # how often each had been changed in place by then
    origins: list[Node | None] = field(default_factory=list)
    counts: list[bool] = field(default_factory=list)  # which of them the loss comes of


class Distiller:
    """Puts the teacher's part into the loss of every batch after surgery; without being asked it does nothing.

    The logits are those of ``training_step``'s own forward passes, found by hooks; the teacher runs on the same inputs,
    in the same precision. Calls that the loss doesn't come of (without gradients, for an attack, for a log) don't
    count, and a batch without one that does has its own loss alone. In the first batch of a run, long before surgery,
    it is seen whether there are logits.

    Args:
        asked: how; ``None`` for not at all.
        path: of the teacher's weights, see :class:`Teacher`.
        logits_from: name of the module that gives the logits. ``None`` takes the LightningModule's forward or, where
            ``training_step`` doesn't call it, the pruned network if that was found without being named.

    Raises:
        ConfigurationError: a teacher, or logits, for no distillation.
    """

    def __init__(
        self, asked: Distillation | None, path: str | os.PathLike[str] | None = None, logits_from: str | None = None
    ) -> None:
        for name, value in (("teacher", path), ("logits_from", logits_from)):
            if value is not None and not isinstance(value, (str, os.PathLike)):
                raise ConfigurationError(f"{name}={value!r} must be a name.")
            if asked is None and value is not None:
                raise ConfigurationError(f"{name}={value!r} needs distill=..., such as {{'temperature': 4}}.")
        self._asked = asked
        self._teacher = Teacher(path)
        self._logits_from = logits_from
        self._name = logits_from
        self._handles: list[RemovableHandle] = []
        self._watching = False
        self._is_known = False
        self._has_warned = False
        self._stack: list[str | None] = []
        self._call: _Call | None = None
        self._calls: list[_Call] = []
        self._value: Tensor | None = None

    @property
    def summary(self) -> Distilled | None:
        """For the report."""
        if self._asked is None or self._teacher.record is None:
            return None
        return Distilled(self._asked.temperature, self._asked.weight, self._teacher.source, self._name or "")

    # Before the first step.

    def keep_dense(self, pl_module: LightningModule) -> None:
        """A checkpoint is about to cut this module."""
        if self._asked is not None:
            self._teacher.keep_dense(pl_module)

    def meet(self, trainer: Trainer, pl_module: LightningModule, is_dense: bool, is_slim: bool) -> None:
        """Refuse what can't work, and call the teacher back after a resume. Every rank has to call it.

        Args:
            trainer: about to begin.
            pl_module: in training.
            is_dense: whether no sparse stage has begun.
            is_slim: whether surgery is done.

        Raises:
            ConfigurationError: in that case.
        """
        if self._asked is None:
            return
        if not pl_module.automatic_optimization:
            raise ConfigurationError(
                "distill goes into the loss that training_step returns, and under manual optimisation there is none;"
                " leave it out, or write the loss yourself."
            )
        names = [plain_name(name) for name, _ in pl_module.named_modules(remove_duplicate=False)]
        if self._logits_from is not None and self._logits_from not in names:
            near = difflib.get_close_matches(self._logits_from, names[1:], n=3)
            children = ", ".join(near or [name for name, _ in pl_module.named_children()])
            what = "near names are" if near else "its children are"
            raise ConfigurationError(
                f"logits_from={self._logits_from!r} is no part of the LightningModule; {what}: {children}."
            )
        self._is_known = False
        self._teacher.meet(trainer, pl_module, is_dense)
        if is_slim:
            self.begin(trainer, pl_module)

    # The run.

    def take(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first sparse stage begins: the network as it is now will be the teacher."""
        if self._asked is not None:
            self._teacher.take(trainer, pl_module)

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Surgery comes next, or has been before a resume."""
        if self._asked is not None:
            self._teacher.build(trainer, pl_module)

    def begin_batch(self, pl_module: LightningModule) -> None:
        """Watch this batch's forward passes, if anybody will learn from them or doesn't know them yet."""
        if self._asked is None or (self._is_known and self._teacher.network is None):
            return
        if not self._handles:
            self._attach(pl_module)
        self._forget_calls()
        self._watching = True

    def go_on(self) -> None:
        """After a backward pass another forward pass may follow in the same batch, under LBFGS."""
        self._watching = bool(self._handles)

    def add_(self, loss: Tensor, trainer: Trainer, pruned: str, is_found: bool) -> None:
        """Put the teacher's part into the loss, in ``on_before_backward``.

        Args:
            loss: of this batch; changed in place after surgery.
            trainer: of this step.
            pruned: name of the network that is pruned.
            is_found: whether that was found without being named: then its output may be taken for the logits.

        Raises:
            ConfigurationError: there are no logits, or none that a teacher could be compared with.
        """
        if not self._watching or self._asked is None:
            return
        asked = self._asked
        self._watching = False  # checkpointed activations are computed once more in the backward pass
        calls = _counting(self._calls, loss)
        if self._name is None:
            self._name = agreed(trainer, lambda: "" if calls else pruned if is_found else None, "Distillation")
            if self._name:
                self._detach()  # its own hooks come in the next batch
                return

        def look() -> list[tuple[Tensor, Tensor]]:
            if not self._is_known:
                self._refuse(calls, trainer.lightning_module, pruned)
            return [pair for call in calls for pair in _pairs(call, self._name or "the LightningModule")]

        pairs = look() if self._is_known else run_together(trainer, look, "Distillation")
        self._is_known = True
        if self._teacher.network is None:
            self._detach()
        elif pairs:
            add_to_loss_(loss, lambda: self._penalty(pairs, asked), trainer, instead=asked.weight)
        elif not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"The loss of this batch comes of no logits of {self._name or 'the LightningModule'}: it is taken"
                " alone, without the teacher. Later batches of that kind are not told of."
            )
        self._forget_calls()

    def end_batch(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        """Let go of the batch, and log."""
        self._watching = False
        self._forget_calls()
        if self._value is not None and (batch_idx == 0 or logs_after(trainer, trainer.global_step)):
            pl_module.log("distillation/loss", self._value, prog_bar=True)
        self._value = None

    def close(self) -> None:
        """Leave no hook behind, and no device in use."""
        self._detach()
        self._watching = False
        self._forget_calls()
        self._teacher.sleep()

    def plain(self) -> dict[str, Any]:
        """What a checkpoint has to know."""
        return {"teacher": self._teacher.record, "given": self._teacher.given, "logits": self._name}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`plain` gave."""
        self._teacher.restore(state.get("teacher"), state.get("given"))
        self._name = state.get("logits") if self._logits_from is None else self._logits_from

    # The loss.

    def _penalty(self, pairs: Sequence[tuple[Tensor, Tensor]], asked: Distillation) -> Penalty:
        """The mean over the calls."""
        found = [distillation(z, t, asked.temperature, 1 if asked.dim is None else asked.dim) for z, t in pairs]
        self._value = torch.stack([value for value, _ in found]).mean()
        share = asked.weight / len(found)
        return Penalty(asked.weight * self._value, [z for z, _ in pairs], [share * gradient for _, gradient in found])

    def _refuse(self, calls: Sequence[_Call], pl_module: LightningModule, pruned: str) -> None:
        """Raises: ConfigurationError: no call gave logits, or they are computed of features, not of a batch."""
        name = self._name or "the LightningModule"
        if not calls:
            raise ConfigurationError(
                f"distill found no logits: training_step never calls {name} with gradients, or has its loss from"
                " elsewhere, or runs past it in compiled code; name the module that gives them with logits_from=...."
            )
        if any(call.derived or not _holds(pl_module, call.root, pruned) for call in calls):
            raise ConfigurationError(
                f"logits_from={name!r} is called with what other layers have computed, or without some that are pruned,"
                " and the teacher would have to run through them itself; call the whole network, and name that."
            )

    # The hooks.

    def _attach(self, pl_module: LightningModule) -> None:
        """To the module that gives the logits, and to what it lies in: the outermost call has the teacher's input."""
        parts = (self._name or "").split(".") if self._name else []
        path = ["", *(".".join(parts[: number + 1]) for number in range(len(parts)))]
        modules = dict[str, nn.Module]()
        for name, module in pl_module.named_modules(remove_duplicate=False):
            modules.setdefault(plain_name(name), module)  # of a compiled one the wrapper, which is called
        if self._teacher.network is not None and any(_is_compiled(modules[name]) for name in path):
            torch.compiler.reset()  # what is compiled already would run past the hooks of its parts
        for name in path:
            enter, leave = self._enter(name, modules[name], pl_module), self._leave(name, modules[name])
            # first of all: the teacher has copies of the user's own hooks, and changes its inputs by them itself
            self._handles.append(modules[name].register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
            self._handles.append(modules[name].register_forward_hook(leave, always_call=True))

    def _enter(self, name: str, module: nn.Module, pl_module: LightningModule) -> Callable[..., None]:
        # closures, not bound methods: copying a module must not copy this object and its teacher
        def enter(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._watching or called is not module:
                return
            counts = torch.is_grad_enabled() and not is_redirected(called)
            if counts and not any(entry is not None for entry in self._stack):
                said = map(self._logits, self._teacher.ask(name, self._name or "", args, kwargs, pl_module))
                leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
                self._call = _Call(name, any(leaf.grad_fn is not None for leaf in leaves), list(said))
            self._stack.append(name if counts else None)

        return _uncompiled(enter)

    def _leave(self, name: str, module: nn.Module) -> Callable[..., None]:
        def leave(called: nn.Module, args: Any, output: Any) -> None:
            if not self._watching or called is not module or not self._stack:
                return
            entry, call = self._stack.pop(), self._call
            if entry is None or call is None:
                return
            if name == (self._name or "") and output is not None:
                logits = self._logits(output)
                call.student.append(logits)
                call.versions.append(logits._version)
                call.origins.append(logits.grad_fn)
            if not any(entry is not None for entry in self._stack):
                self._calls.append(call)
                self._call = None

        return _uncompiled(leave)

    def _logits(self, output: Any) -> Tensor:
        return _logits_of(output, self._name or "the LightningModule", None if self._asked is None else self._asked.dim)

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _forget_calls(self) -> None:
        self._stack.clear()
        self._calls = []
        self._call = None


def _holds(pl_module: LightningModule, root: str, pruned: str) -> bool:
    """Whether one module has all that the pruned one has: what came before it would be the slim network's."""
    inside, wanted = (set(submodule(pl_module, name).parameters()) for name in (root, pruned))
    return wanted <= inside


def _is_compiled(module: nn.Module) -> bool:
    is_called_so = getattr(module, "_compiled_call_impl", None) is not None or original(module) is not module
    return is_called_so or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")


def _uncompiled(hook: Callable[..., None]) -> Callable[..., None]:
    """Runs as it is also where a compiler has the module that it hangs on."""
    found: Callable[..., None] = torch.compiler.disable(hook)
    return found


def _counting(calls: Sequence[_Call], loss: Tensor) -> list[_Call]:
    """Those that the loss comes of: an attack's graph, say, is used up, and nothing can be added to what it gave."""
    found = iter(comes_of(loss, [origin for call in calls for origin in call.origins]))
    for call in calls:
        call.counts = [next(found) for _ in call.origins]
    return [call for call in calls if any(call.counts)]


def _pairs(call: _Call, name: str) -> list[tuple[Tensor, Tensor]]:
    """The student's and the teacher's logits, one pair for each time the module was called and counts."""
    mine, theirs = call.student, call.teacher
    changed = [then != logits._version for then, logits in zip(call.versions, mine, strict=True)]
    if any(each and counts for each, counts in zip(changed, call.counts, strict=True)):
        raise ConfigurationError(
            f"training_step changes the logits of {name} in place, so the teacher has none to match."
        )
    if [each.shape for each in mine] != [each.shape for each in theirs]:
        shapes = " and ".join(str([tuple(each.shape) for each in side]) for side in (theirs, mine))
        raise ConfigurationError(f"The teacher's logits from {name} have other shapes than the student's: {shapes}.")
    return [(z, t) for z, t, counts in zip(mine, theirs, call.counts, strict=True) if counts]


def _logits_of(output: Any, name: str, dim: int | None) -> Tensor:
    """The tensor that is meant by an output: itself, what is called ``logits`` or ``out``, or the only one there is.

    Raises:
        ConfigurationError: none can be meant, or it isn't clear along which dim its classes lie.
    """
    found = output
    for key in ("logits", "out"):
        inner = output.get(key) if isinstance(output, Mapping) else getattr(output, key, None)
        if not isinstance(output, Tensor) and isinstance(inner, Tensor):
            found = inner
            break
    if not isinstance(found, Tensor):
        tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        if len(tensors) != 1:
            raise ConfigurationError(
                f"{name} gives {len(tensors)} tensors, none of them called 'logits' or 'out'; name the layer that gives"
                " the logits with logits_from=...."
            )
        found = tensors[0]
    shape = tuple(found.shape)
    if not found.is_floating_point() or not shape:
        raise ConfigurationError(f"{name} gives a tensor of shape {shape} and type {found.dtype}, which are no logits.")
    if dim is None and len(shape) == 3:
        raise ConfigurationError(
            f"{name} gives logits of shape {shape}; say along which dim the classes lie: distill={{'dim': 1}} or -1."
        )
    if dim is not None and not -len(shape) <= dim < len(shape):
        raise ConfigurationError(f"distill dim={dim} is out of range for logits of shape {shape}.")
    return found
