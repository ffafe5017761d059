"""Rules of a user's own, for operators of ``torch.library`` and for modules that count as one operator."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from types import SimpleNamespace, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode_temporarily

from lightning_prune.errors import ConfigurationError
from lightning_prune.structure.call import OWN, Call, Rule, tensors_in
from lightning_prune.structure.labels import Axes
from lightning_prune.structure.plan import named_modules, plain_name
from lightning_prune.structure.probe import Listener, Prober
from lightning_prune.structure.rules import RULES
from lightning_prune.structure.rules.flow import Flow
from lightning_prune.structure.watch import Watcher, rule_for

_RUN = "module at work"
_PARTS = "parametrizations"
_MODULES: dict[type[nn.Module], ModuleOperator] = {}


class RuleHandle:
    """Takes a rule back: by ``remove()``, or at the end of a ``with`` block."""

    def __init__(self, key: str, module: type[nn.Module] | None) -> None:
        self._key, self._module, self._rule = key, module, RULES[key]

    def remove(self) -> None:
        """Take the rule back; once more makes no difference."""
        if RULES.get(self._key) is self._rule:
            del RULES[self._key]
            if self._module is not None:
                del _MODULES[self._module]
            rule_for.cache_clear()

    def __enter__(self) -> RuleHandle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()


def register_rule(
    operator: str | type[nn.Module], rule: Flow | Rule, *, fake: Callable[..., Any] | None = None
) -> RuleHandle:
    """Tell how channels flow through an operator or module of your own, which would pin them otherwise.

    Whatever a rule says, plans are proved: a wrong rule stops surgery with a :class:`ProofError`.

    Args:
        operator: name of an operator, such as ``"mylib::op"``, or a module class. Its modules then count as one
            operator whose inside nobody watches, such as a kernel; subclasses with another ``forward`` don't.
        rule: a :class:`Flow`, or a function that takes a :class:`Call` and returns the axes of each result.
        fake: for modules whose ``forward`` runs on their own device only: takes the module and what ``forward`` takes,
            and returns empty results of the right shape on the meta device. For an operator, ``register_fake`` of
            ``torch.library`` does this.

    Returns:
        A handle that takes the rule back.

    Raises:
        ConfigurationError: for an operator that doesn't exist, writes into its arguments or has a rule already, or a
            rule that names arguments which it doesn't have.

    >>> class Swish(nn.Module):
    ...     def forward(self, x):
    ...         return torch.from_numpy((x * x.sigmoid()).numpy())  # left to numpy: nobody can watch that
    >>> from lightning_prune import trace
    >>> net = nn.Sequential(nn.Linear(4, 8), Swish(), nn.Linear(8, 2))
    >>> with register_rule(Swish, Flow({"x": "... c"}, "... c"), fake=lambda module, x: torch.empty_like(x)):
    ...     print(trace(net, torch.zeros(1, 4)).groups[0].consumers)
    ('2',)
    """
    if isinstance(operator, str):
        if fake is not None:
            raise ConfigurationError(f"The fake of operator {operator!r} is registered by torch.library.register_fake.")
        schema, module = _schema_of(operator), None
        key, names = operator.removeprefix("aten::").replace("::", "."), [each.name for each in schema.arguments]
    elif isinstance(operator, type) and issubclass(operator, nn.Module):
        key, module = f"module.{operator.__name__}", operator
        names = list(inspect.signature(operator.forward).parameters)[1:]
    else:
        raise ConfigurationError(f"A rule is for an operator's name or a module class, not for {operator!r}.")
    if not callable(rule):
        raise ConfigurationError(f"The rule of {operator!r} must be a Flow or a function, not {rule!r}.")
    if key in RULES:
        raise ConfigurationError(f"{_shown(operator)} has a rule already; its handle's remove() takes it back.")
    if module is None and schema.is_mutable:
        raise ConfigurationError(f"{operator!r} writes into its arguments; a rule must be about one that doesn't.")
    if module is None and isinstance(rule, Flow):
        _check_names(operator, rule, names)
    RULES[key] = _Checked(rule, tuple(names))
    if module is not None:
        wanted = tuple(rule.inputs) if isinstance(rule, Flow) else ()
        _MODULES[module] = ModuleOperator(module, wanted, fake)
    rule_for.cache_clear()
    return RuleHandle(key, module)


def _shown(operator: Any) -> str:
    return repr(operator) if isinstance(operator, str) else operator.__name__


def _schema_of(operator: str) -> Any:
    """The schema of an operator by a name such as ``"mylib::op"``; of its first form, where there are several."""
    namespace, separator, name = operator.partition("::")
    try:
        packet = getattr(getattr(torch.ops, namespace), name)
    except (AttributeError, RuntimeError) as error:
        why = "" if separator else " (a name looks like 'mylib::op')"
        raise ConfigurationError(f"torch knows no operator {operator!r}{why}; define it before its rule.") from error
    return getattr(packet, packet.overloads()[0])._schema


def _check_names(operator: Any, rule: Flow, names: list[str]) -> None:
    if rule.sizes:
        raise ConfigurationError(f"Only modules have sizes; {operator!r} is an operator.")
    for name in rule.inputs:
        if name not in names:
            raise ConfigurationError(f"{operator!r} has no argument {name!r}; it has {', '.join(names)}.")


class _Checked:
    """A user's rule, with the names of the operator's arguments, and what it returns held against the results."""

    def __init__(self, rule: Rule, names: tuple[str, ...]) -> None:
        self.rule, self.names = rule, names

    def __call__(self, call: Call) -> list[Axes]:
        call.names = self.names
        said = self.rule(call)
        axes = said if isinstance(said, list) else [said] * len(call.outputs)
        if len(axes) != len(call.outputs):
            raise ConfigurationError(
                f"The rule of {call.name!r} speaks of {len(axes)} results; the operator has {len(call.outputs)}."
            )
        for known, tensor in zip(axes, call.outputs, strict=True):
            sizes = [None if axis is None else axis.labels.size for axis in known]
            if len(sizes) != tensor.dim() or any(a not in (None, b) for a, b in zip(sizes, tensor.shape, strict=True)):
                shape = tuple(tensor.shape)
                raise ConfigurationError(f"The rule of {call.name!r} foretells dims {sizes} for a result of {shape}.")
        return axes


class ModuleOperator:
    """Looks like one of torch's operators to whoever watches, and runs a whole module.

    Args:
        module: the class.
        wanted: names of operands, parameters and buffers among them.
        fake: see :func:`register_rule`.
    """

    namespace = "module"
    tags = ()
    _overloadname = "default"

    def __init__(self, module: type[nn.Module], wanted: tuple[str, ...], fake: Callable[..., Any] | None) -> None:
        self.module, self.wanted, self.fake = module, wanted, fake
        self.overloadpacket = SimpleNamespace(__name__=module.__name__)
        self.arguments = tuple(inspect.signature(module.forward).parameters)[1:]
        self._schema = _returning("Tensor")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it, or its fake where there is no memory."""
        module, own = kwargs.pop(_RUN), kwargs.pop(OWN)
        meta = any(tensor.is_meta for tensor in tensors_in((args, kwargs, own)))
        result = (self.fake if meta and self.fake else self.module.forward)(module, *args, **kwargs)
        self._schema = _returning("Tensor" if isinstance(result, Tensor) else "Tensor[]")
        return result

    def own(self, module: nn.Module) -> dict[str, Any]:
        """A module's parameters and buffers, and what else the rule names."""
        everything = (*module.named_parameters(), *module.named_buffers())
        held: dict[str, Any] = {plain_name(name): tensor for name, tensor in everything if _PARTS not in name}
        # a parametrized weight is computed here, where it is watched
        for name in (*self.wanted, *getattr(module, _PARTS, ())):
            if name not in self.arguments and name not in held:
                try:
                    held[name] = functools.reduce(getattr, name.split("."), module)
                except AttributeError as error:
                    kind = type(module).__name__
                    raise ConfigurationError(
                        f"{kind} has no argument, parameter or buffer {name!r}, of which its rule speaks."
                    ) from error
        return held


def _returning(kind: str) -> SimpleNamespace:
    return SimpleNamespace(returns=[SimpleNamespace(type=kind)])


def sealed(model: nn.Module) -> nn.Module:
    """The model, in which every module with a rule of its own counts as one operator from now on."""
    for _, module in named_modules(model) if _MODULES else ():
        operator = _operator_of(type(module))
        if operator is not None:
            vars(module)["forward"] = functools.partial(_at_work, operator, module)
    return model


def _operator_of(kind: type[nn.Module]) -> ModuleOperator | None:
    return next((_MODULES[base] for base in kind.__mro__ if base in _MODULES and kind.forward is base.forward), None)


def _at_work(operator: ModuleOperator, module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(_get_current_dispatch_mode(), (Watcher, Listener, Prober)):  # inside another such module, say
        return operator.module.forward(module, *args, **kwargs)
    named: Mapping[str, Any] = {**kwargs, OWN: operator.own(module), _RUN: module}
    with _pop_mode_temporarily() as mode:
        return mode.__torch_dispatch__(operator, (), args, named)
