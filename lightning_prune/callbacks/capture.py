"""What the pruned network is called with, and how its channels hang together: watched once, in the first batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from lightning_prune import structure
from lightning_prune.callbacks.quantised import refuse_all_quantised, refuse_quantised
from lightning_prune.errors import ConfigurationError, TraceError
from lightning_prune.structure.plan import plain_name, submodule


class Capture:
    """Watches the forward calls of one fit: which module is pruned, its latest arguments, and its channel graph.

    One instance is shared by all pruning callbacks of a trainer. In the first training batch every module carries a
    hook; afterwards only the pruned module does, until :meth:`close`. Loaders are never iterated and random states
    don't move.

    Args:
        pl_module: the module in training.
        name: the pruned module's name inside ``pl_module``, ``""`` for itself. ``None`` takes the LightningModule if
            its ``forward`` is called, else its only outermost called child with parameters.
        traces: whether anybody asks how channels hang together; otherwise the graph has none, and any forward pass
            will do.

    Raises:
        ConfigurationError: no module has that name, or it is quantised.
    """

    def __init__(self, pl_module: LightningModule, name: str | None = None, traces: bool = True) -> None:
        modules = dict(pl_module.named_modules())
        if name is not None and name not in modules:
            children = ", ".join(key for key, _ in pl_module.named_children())
            raise ConfigurationError(
                f"module={name!r} is no part of the LightningModule; its children are: {children}."
            )
        if name is None:
            refuse_all_quantised(pl_module)
        else:
            refuse_quantised(modules[name], name)
        self._pl_module = pl_module
        self._traces = traces
        self._name = name
        self._graph: structure.ChannelGraph | None = None
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._depth = 0
        self._handles: list[RemovableHandle] = []
        self._stance: Any = None
        self._watching = False

    @property
    def name(self) -> str | None:
        """The pruned module's name inside the LightningModule; ``None`` until it is known."""
        return None if self._name is None else plain_name(self._name)

    @property
    def module(self) -> nn.Module:
        """The pruned module, without what ``torch.compile`` wraps; known at the latest when :attr:`graph` is."""
        if self._name is None:
            raise ConfigurationError("The pruned module is known only after the first training batch's forward pass.")
        return submodule(self._pl_module, plain_name(self._name))

    @property
    def _called(self) -> nn.Module:
        """The pruned module as it is called, compiled or not."""
        return self._pl_module.get_submodule(self._name or "")

    @property
    def graph(self) -> structure.ChannelGraph | None:
        """The channel graph; ``None`` until the first batch's backward."""
        return self._graph

    @property
    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Detached ``(args, kwargs)`` of the latest training batch's (first) call; ``None`` until the first."""
        return self._inputs

    def begin_batch(self) -> None:
        """Start watching one training batch; a second call for the same batch changes nothing."""
        if self._watching:
            return
        self._watching = True
        self._depth = 0
        if self._graph is None and self._stance is None and hasattr(torch.compiler, "set_stance"):
            # a compiled module would run past the hooks: the first batch runs without its compiler
            self._stance = torch.compiler.set_stance("force_eager")
        if not self._handles:
            names = dict(self._pl_module.named_modules()) if self._graph is None else {self._name or "": self._called}
            for name, module in names.items():
                if not isinstance(module, ScriptModule):  # takes no hooks
                    self._watch(name, module)
        self._calls.clear()

    def end_batch(self) -> None:
        """Stop watching until the next training batch."""
        self._watching = False

    def build(self) -> None:
        """Find the pruned module and trace it, unless that is done: before the first optimiser step.

        Raises:
            ConfigurationError: the pruned module wasn't called, or is quantised, or more than one candidate was called.
            TraceError: the module's forward pass can't be captured.
        """
        if self._graph is not None or not self._watching:
            return
        self._unhook()
        self._name = self._candidate()
        refuse_quantised(self.module, plain_name(self._name))
        self._inputs = self._calls[self._name]
        self._calls.clear()
        args, kwargs = self._inputs
        device = next((p.device.type for p in self.module.parameters()), "cpu")
        graph = structure.ChannelGraph(self.module, (), {}, {})
        if self._traces:
            with torch.autocast(device, enabled=False):
                graph = structure.trace(self.module, args, kwargs or None)
        self._graph = replace(graph, root=plain_name(self._name))
        self._compile_again()
        self._watch(self._name, self._called)

    def close(self) -> None:
        """Remove every hook and let go of the batch."""
        self._unhook()
        self._compile_again()
        self._calls.clear()
        self._inputs = None
        self._watching = False

    def _candidate(self) -> str:
        if self._name is not None:
            if self._name not in self._calls:
                parts = ", ".join(name for name in self._calls if name.startswith(f"{self._name}."))
                why = f" (only its parts {parts} are)" if parts else ""
                raise ConfigurationError(
                    f"module={self._name!r} isn't called by training_step, so it can't be pruned{why}; call it itself."
                )
            return self._name
        outermost = list(self._calls)
        if "" in outermost:
            return ""
        scripted = [name for name, module in self._pl_module.named_modules() if isinstance(module, ScriptModule)]
        if not outermost and scripted:
            raise TraceError(f"{scripted[0]!r} is scripted and can't be watched; prune the Python module instead.")
        if not outermost:
            raise ConfigurationError(
                "training_step calls no module that has parameters; call the network as a module, not its forward."
            )
        if len(outermost) > 1:
            names = ", ".join(outermost)
            raise ConfigurationError(
                f"training_step calls several modules ({names}); name one with module=..., or call what contains them."
            )
        return outermost[0]

    def _watch(self, name: str, module: nn.Module) -> None:
        self._handles.append(module.register_forward_pre_hook(self._enter(name, module), with_kwargs=True))
        if self._graph is None:
            self._handles.append(module.register_forward_hook(self._leave(module), always_call=True))

    def _enter(self, name: str, module: nn.Module) -> Callable[..., None]:
        # a closure, not a bound method: copying a module must not copy this object and the trainer behind it
        wanted = name == self._name if self._name is not None else any(True for _ in module.parameters())

        def enter(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._watching or called is not module or is_redirected(called):
                return
            outermost = self._depth == 0 or self._name is not None
            self._depth += 1
            if not wanted or not outermost or torch.compiler.is_compiling():
                return
            call = tree_map(_plain(module), (args, kwargs))
            if self._graph is None:
                self._calls.setdefault(name, call)
            elif not self._calls:
                self._calls[name] = call
                self._inputs = call

        return enter

    def _leave(self, module: nn.Module) -> Callable[..., None]:
        def leave(called: nn.Module, *_: Any) -> None:
            if self._watching and called is module and self._depth > 0:
                self._depth -= 1

        return leave

    def _compile_again(self) -> None:
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _plain(module: nn.Module) -> Callable[[Any], Any]:
    """How an argument is kept: detached, and in the weights' precision where autocast has made it half."""
    first = next((parameter for parameter in module.parameters() if parameter.is_floating_point()), None)
    is_half = first is not None and torch.is_autocast_enabled(first.device.type)

    def plain(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        widens = first is not None and is_half and value.is_floating_point()
        return value.detach().to(first.dtype) if widens and first is not None else value.detach()

    return plain


def is_redirected(module: nn.Module) -> bool:
    """Whether this call is the wrapper's way into ``training_step`` (under DDP), not the user's own call."""
    return getattr(module.__dict__.get("forward"), "__name__", "") == "wrapped_forward"
