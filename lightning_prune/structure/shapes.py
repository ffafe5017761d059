"""What common operators return on the meta device, as an empty tensor of the right shape.

Torch works such shapes out in Python, through decompositions that take a millisecond for a linear layer: most of the
time of a watched pass. Whatever does not fit or is unusual is left to torch, which then says what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Shape = Sequence[int]

#: Pointwise operators whose result has the type of their floating-point operands.
_POINTWISE = {"abs", "add", "clamp", "div", "elu", "exp", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu"}
_POINTWISE |= {"mish", "mul", "neg", "pow", "relu", "rsqrt", "rsub", "sigmoid", "silu", "softplus", "sqrt", "square"}
_POINTWISE |= {"sub", "tanh"}


def foretell(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The result of an operator on meta tensors, or nothing where torch had better work it out.

    >>> source, weight = torch.empty(2, 3, device="meta"), torch.empty(5, 3, device="meta")
    >>> tuple(foretell("linear", (source, weight), {}).shape), foretell("linear", (weight, source.T), {})
    ((2, 5), None)
    """
    first = args[0] if args else None
    if name == "cat" and isinstance(first, (list, tuple)):
        return _cat(first, *args[1:], **kwargs)
    if not isinstance(first, Tensor) or not first.is_meta or "out" in kwargs or "dtype" in kwargs:
        return None
    if name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        return _recurrent(name, *args)
    if name in _POINTWISE:
        shape = _broadcast(first, args[1:])
    elif name.endswith("_") and name[:-1] in _POINTWISE:
        return first if _broadcast(first, args[1:]) == tuple(first.shape) else None
    elif name in SHAPES:
        tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
        alike = all(tensor.dtype == first.dtype for tensor in tensors)
        shape = SHAPES[name](*args, **kwargs) if alike else None
    else:
        return None
    return None if shape is None else torch.empty(tuple(shape), dtype=first.dtype, device=first.device)


def _cat(parts: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    shape, rank = list(parts[0].shape), parts[0].dim()
    dim = dim % rank if rank else 0
    for part in parts:
        rest = (*part.shape[:dim], *part.shape[dim + 1 :])
        if (
            not part.is_meta
            or part.dtype != parts[0].dtype
            or part.dim() != rank
            or rest != (*shape[:dim], *shape[dim + 1 :])
        ):
            return None
    shape[dim] = sum(part.shape[dim] for part in parts)
    return torch.empty(tuple(shape), dtype=parts[0].dtype, device=parts[0].device)


def _broadcast(first: Tensor, others: Sequence[Any]) -> Shape | None:
    shape = tuple(first.shape)
    if not first.dtype.is_floating_point:
        return None
    for other in others:
        if not isinstance(other, Tensor):
            if isinstance(other, complex):
                return None
        elif other.dtype != first.dtype:
            return None
        elif (size := tuple(other.shape)) != shape:
            rank = max(len(size), len(shape))
            pairs = zip((1,) * (rank - len(size)) + size, (1,) * (rank - len(shape)) + shape, strict=True)
            both = list(pairs)
            if any(a != b and a != 1 and b != 1 for a, b in both):
                return None
            shape = tuple(b if a == 1 else a for a, b in both)
    return shape


def _linear(source: Tensor, weight: Tensor, bias: Tensor | None = None) -> Shape | None:
    fits = weight.dim() == 2 and source.dim() > 0 and source.shape[-1] == weight.shape[1]
    fits = fits and (bias is None or bias.shape == weight.shape[:1])
    return (*source.shape[:-1], weight.shape[0]) if fits else None


def _matmul(a: Tensor, b: Tensor) -> Shape | None:
    fits = a.dim() >= 2 and b.dim() >= 2 and a.shape[-1] == b.shape[-2]
    return (*a.shape[:-1], b.shape[-1]) if fits and (b.dim() == 2 or a.shape[:-2] == b.shape[:-2]) else None


def _bmm(a: Tensor, b: Tensor) -> Shape | None:
    return _matmul(a, b) if a.dim() == b.dim() == 3 else None


def _layer_norm(
    source: Tensor, shape: Shape, weight: Tensor | None = None, bias: Tensor | None = None, *rest: Any
) -> Shape | None:
    last = tuple(source.shape[source.dim() - len(shape) :])
    fits = last == tuple(shape) and all(t is None or tuple(t.shape) == last for t in (weight, bias))
    return source.shape if fits else None


def _group_norm(
    source: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, *rest: Any
) -> Shape | None:
    channels = source.shape[1]
    fits = channels % groups == 0 and all(t is None or tuple(t.shape) == (channels,) for t in (weight, bias))
    return source.shape if fits else None


def _batch_norm(source: Tensor, *rest: Any) -> Shape | None:
    fits = all(tuple(tensor.shape) == (source.shape[1],) for tensor in rest[:4] if tensor is not None)
    return source.shape if fits else None


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Shape | None:
    fits = q.shape[:-2] == k.shape[:-2] == v.shape[:-2] and q.shape[-1] == k.shape[-1] and k.shape[-2] == v.shape[-2]
    return (*q.shape[:-1], v.shape[-1]) if fits and attn_mask is None and not enable_gqa else None


def _convolution(space: int) -> Callable[..., Shape | None]:
    def shape(
        source: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Shape | None:
        if source.dim() != space + 2 or isinstance(padding, str):
            return None
        rows, columns, *kernel = weight.shape
        if source.shape[1] != columns * groups or rows % groups or not (bias is None or bias.shape == weight.shape[:1]):
            return None
        numbers = zip(source.shape[2:], kernel, *(_each(n, space) for n in (stride, padding, dilation)), strict=True)
        sizes = [(size + 2 * pad - dil * (width - 1) - 1) // step + 1 for size, width, step, pad, dil in numbers]
        return (source.shape[0], rows, *sizes) if min(sizes) > 0 else None

    return shape


def _each(number: Any, times: int) -> list[int]:
    numbers = [number] if isinstance(number, int) else list(number)
    return numbers * times if len(numbers) == 1 else numbers


def _adaptive(space: int) -> Callable[..., Shape | None]:
    def shape(source: Tensor, size: Any) -> Shape | None:
        sizes = _each(size, space)
        return None if None in sizes or source.dim() < space + 1 else (*source.shape[:-space], *sizes)

    return shape


def _recurrent(name: str, source: Tensor, state: Any, weights: Any, *rest: Any) -> tuple[Tensor, ...] | None:
    """Outputs and last states; packed sequences, whose arguments come in another order, are left to torch."""
    if isinstance(state, Tensor):
        state = (state,)
    if not isinstance(weights, (list, tuple)) or source.shape[-1] != weights[0].shape[1]:
        return None
    directions = 2 if rest[4] else 1
    first = source.new_empty((*source.shape[:-1], state[0].shape[-1] * directions))
    return (first, *(torch.empty_like(each) for each in state))


def _same(source: Tensor, *rest: Any, **options: Any) -> Shape | None:
    return source.shape


#: Operator -> the shape of its result, or nothing.
SHAPES: dict[str, Callable[..., Shape | None]] = {
    "linear": _linear,
    "matmul": _matmul,
    "bmm": _bmm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
    "scaled_dot_product_attention": _attention,
    "roll": _same,
    "softmax": _same,
    "dropout": _same,
    **{f"conv{space}d": _convolution(space) for space in (1, 2, 3)},
    **{f"adaptive_avg_pool{space}d": _adaptive(space) for space in (1, 2, 3)},
}
