"""Attention whose inner width need not be the embedding width, so that whole heads can go.

Some attention modules work out the width of a head anew from the width of what they read (``C // num_heads``). Each
has an elastic twin here: a subclass with the same parameters and results, whose forward reads the inner width off its
own weights. A copy to be watched consists of twins; surgery turns a module into its twin where its own forward would
no longer do, and nowhere else. Which ones these are follows from the shapes, so that no plan needs to say it.

Of foreign classes only one thing is known: they fail where they join their heads (``reshape(B, N, C)``). Their twin,
:class:`Joined`, runs the forward that they have and lets the last dim take what is left. Plans name these modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_prune.structure.plan import named_modules, submodule


class Elastic(nn.Module):
    """What all twins share: they are pickled and copied by the class that they stand for."""

    @staticmethod
    def widths(module: Any) -> tuple[int, ...]:
        """Widths of what is read, between and returned; the original forward wants them to be equal."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        whole = super().__reduce_ex__(max(2, protocol))
        bases = type(self).__bases__
        return (_revive, bases, *whole[2:]) if _made.get(bases) is type(self) else whole


class MultiheadAttention(Elastic):
    r"""Twin of :class:`torch.nn.MultiheadAttention`: ``num_heads`` heads of width ``head_dim``.

    .. math:: y = W_o \, \mathrm{concat}_h \, \mathrm{softmax}(q_h k_h^\top / \sqrt{d}) \, v_h + b_o

    with the head's width :math:`d` of the dense module. All arguments are those of the original.
    """

    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    q_proj_weight: Tensor
    k_proj_weight: Tensor
    v_proj_weight: Tensor
    bias_k: Tensor | None
    bias_v: Tensor | None
    out_proj: nn.Linear

    @staticmethod
    def widths(module: Any) -> tuple[int, ...]:
        """See :meth:`Elastic.widths`."""
        first = module.q_proj_weight if module.in_proj_weight is None else module.in_proj_weight
        return (first.shape[1], *module.out_proj.weight.shape)

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """Torch's fused kernels of whole encoder layers ask for this; they know one width only."""
        return False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See :class:`torch.nn.MultiheadAttention`."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is only a hint at what attn_mask holds; give attn_mask as well.")
        batched, alone = query.dim() == 3, query is key and key is value
        q, k, v = self._project([self._batch_first(x, batched) for x in (query, key, value)], alone)
        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        hinted = is_causal and key_padding_mask is None and not need_weights
        mask = None if hinted else _total_mask(q, k.shape[2] - self._extra, attn_mask, key_padding_mask)
        if mask is not None and self._extra:
            mask = F.pad(mask, (0, self._extra))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            out = weights @ v
            weights = weights if batched else weights.squeeze(0)
            weights = weights.mean(-3) if average_attn_weights else weights
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, hinted)
        out = F.linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return out.squeeze(0), weights
        return (out if self.batch_first else out.transpose(0, 1)), weights

    @property
    def _extra(self) -> int:
        """Positions that are looked at beyond those of the keys."""
        return (self.bias_k is not None) + bool(self.add_zero_attn)

    def _batch_first(self, x: Tensor, batched: bool) -> Tensor:
        if not batched:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _project(self, inputs: list[Tensor], alone: bool) -> list[Tensor]:
        """Queries, keys and values, each ``(batch, heads, positions, head_dim)``."""
        if self.in_proj_weight is not None and alone:
            found = list(F.linear(inputs[0], self.in_proj_weight, self.in_proj_bias).chunk(3, -1))
        else:
            separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            weights = separate if self.in_proj_weight is None else self.in_proj_weight.chunk(3)
            biases: Sequence[Tensor | None] = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            found = [F.linear(*operands) for operands in zip(inputs, weights, biases, strict=True)]
        if self.bias_k is not None and self.bias_v is not None:
            extra = (bias.expand(found[0].shape[0], -1, -1) for bias in (self.bias_k, self.bias_v))
            found[1:] = [torch.cat([x, bias], 1) for x, bias in zip(found[1:], extra, strict=True)]
        heads = [x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in found]
        if self.add_zero_attn:
            heads[1:] = [F.pad(x, (0, 0, 0, 1)) for x in heads[1:]]
        return heads


def _total_mask(q: Tensor, keys: int, attn_mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
    """What is added to the scores, broadcastable to ``(batch, heads, queries, keys)``."""
    batch, heads, queries, _ = q.shape
    masks = []
    if attn_mask is not None:
        rows = {2: (1, 1), 3: (batch, heads)}.get(attn_mask.dim(), ())
        if not rows or attn_mask.numel() != math.prod(rows) * queries * keys:
            raise RuntimeError(
                f"attn_mask must have shape ({queries}, {keys}) or ({batch * heads}, {queries}, {keys}), "
                f"not {tuple(attn_mask.shape)}."
            )
        masks.append(attn_mask.view(*rows, queries, keys))
    if padding is not None:
        masks.append(padding.view(batch, 1, 1, keys))
    added = [
        torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -math.inf) if mask.dtype == torch.bool else mask
        for mask in masks
    ]
    return sum(added[1:], added[0]).to(q.dtype) if added else None


class ShiftedWindowAttention(Elastic):
    """Twin of torchvision's attention in (shifted) windows, Swin and Swin V2: ``x`` is ``(batch, H, W, C)``.

    In films it is ``(batch, T, H, W, C)``, and windows are no larger than the film.
    """

    num_heads: int
    window_size: list[int]
    shift_size: list[int]
    attention_dropout: float
    dropout: float
    qkv: nn.Linear
    proj: nn.Linear
    get_relative_position_bias: Callable[..., Tensor]

    @staticmethod
    def widths(module: Any) -> tuple[int, ...]:
        """See :meth:`Elastic.widths`."""
        return (module.qkv.weight.shape[1], *module.proj.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        """See torchvision's ``shifted_window_attention`` and ``shifted_window_attention_3d``."""
        batch, *space, channels = x.shape
        rank, window, film = len(space), self.window_size, len(space) == 3
        if film:
            window = [min(pair) for pair in zip(window, space, strict=True)]
        bias = self.get_relative_position_bias(window) if film else self.get_relative_position_bias()
        rests = [rest for size, side in zip(space, window, strict=True) for rest in (-size % side, 0)]
        x = F.pad(x, (0, 0, *reversed(rests)))
        padded, dims = x.shape[1:-1], tuple(range(1, rank + 1))
        counts = [size // side for size, side in zip(padded, window, strict=True)]
        shift = [each if count > 1 else 0 for each, count in zip(self.shift_size, counts, strict=True)]
        if any(shift):
            x = torch.roll(x, [-each for each in shift], dims)
        pairs = [size for pair in zip(counts, window, strict=True) for size in pair]
        x = x.view(batch, *pairs, channels).permute(0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), -1)
        x = x.reshape(batch * math.prod(counts), math.prod(window), channels)
        mask = _regions(x, list(zip(counts, window, shift, strict=True))) if any(shift) else None
        out = self._attend(x, bias, mask)
        back = [dim for pair in zip(dims, range(rank + 1, 2 * rank + 1), strict=True) for dim in pair]
        x = out.view(batch, *counts, *window, out.shape[-1]).permute(0, *back, -1)
        x = x.reshape(batch, *padded, out.shape[-1])
        if any(shift):
            x = torch.roll(x, shift, dims)
        return x[(slice(None), *map(slice, space))].contiguous()

    def _attend(self, x: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        """Attention within each window; ``x`` is ``(windows, positions, C)``, ``mask`` one per window of an image."""
        windows, positions, _ = x.shape
        cosine: Tensor | None = getattr(self, "logit_scale", None)
        shift: Tensor | None = self.qkv.bias
        if cosine is not None and shift is not None:
            length, shift = shift.numel() // 3, shift.clone()
            shift[length : 2 * length].zero_()
        qkv = F.linear(x, self.qkv.weight, shift)
        width = qkv.shape[-1] // 3 // self.num_heads
        q, k, v = qkv.reshape(windows, positions, 3, self.num_heads, width).permute(2, 0, 3, 1, 4).unbind(0)
        if cosine is not None:
            scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
            scores = scores * cosine.clamp(max=math.log(100.0)).exp()
        else:
            scores = (q * width**-0.5) @ k.transpose(-2, -1)
        scores = scores + bias
        if mask is not None:
            scores = scores.view(-1, mask.shape[0], self.num_heads, positions, positions) + mask.unsqueeze(1)
            scores = scores.view(windows, self.num_heads, positions, positions)
        weights = F.dropout(scores.softmax(-1), self.attention_dropout, self.training)
        out = (weights @ v).transpose(1, 2).flatten(2)
        return F.dropout(F.linear(out, self.proj.weight, self.proj.bias), self.dropout, self.training)


def _regions(x: Tensor, sides: Sequence[tuple[int, int, int]]) -> Tensor:
    """-100 where two positions of a shifted window come from different edges of the image, else 0."""
    rank, image = len(sides), torch.zeros((), dtype=x.dtype, device=x.device)
    for dim, (count, size, shift) in enumerate(sides):
        line = torch.zeros(count * size, dtype=x.dtype, device=x.device)
        if shift:
            line[-size:-shift] = 1
            line[-shift:] = 2
        image = 3 * image + line.reshape([-1 if each == dim else 1 for each in range(rank)])
    image = image.view([size for count, side, _ in sides for size in (count, side)])
    image = image.permute(*range(0, 2 * rank, 2), *range(1, 2 * rank, 2))
    flat = image.reshape(-1, math.prod(side for _, side, _ in sides))
    return (flat[:, None] != flat[:, :, None]).to(x.dtype) * -100.0


class RelativePositionalAttention(Elastic):
    """Twin of torchvision's attention in MaxViT; ``x`` is ``(batch, partitions, positions, C)``."""

    n_heads: int
    head_dim: int
    scale_factor: float
    to_qkv: nn.Linear
    merge: nn.Linear
    get_relative_positional_bias: Callable[[], Tensor]

    @staticmethod
    def widths(module: Any) -> tuple[int, ...]:
        """See :meth:`Elastic.widths`."""
        return (module.to_qkv.weight.shape[1], *module.merge.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        """See torchvision's ``RelativePositionalMultiHeadAttention``."""
        heads = (part.unflatten(-1, (self.n_heads, self.head_dim)) for part in self.to_qkv(x).chunk(3, -1))
        q, k, v = (part.transpose(2, 3) for part in heads)
        scores = q @ (k * self.scale_factor).transpose(-2, -1) + self.get_relative_positional_bias()
        out: Tensor = self.merge((scores.softmax(-1) @ v).transpose(2, 3).flatten(3))
        return out


#: Where a forward comes from -> the twin of its class; a subclass with a forward of its own has none.
TWINS: dict[str, type[Elastic]] = {
    "torch.nn.modules.activation.MultiheadAttention.forward": MultiheadAttention,
    "torchvision.models.swin_transformer.ShiftedWindowAttention.forward": ShiftedWindowAttention,
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2.forward": ShiftedWindowAttention,
    "torchvision.models.video.swin_transformer.ShiftedWindowAttention3d.forward": ShiftedWindowAttention,
    "torchvision.models.maxvit.RelativePositionalMultiHeadAttention.forward": RelativePositionalAttention,
}


class Joined(Elastic):
    """Twin of a module that asks, at a reshape, for a width which it takes from elsewhere."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, in which the last dim of a reshape takes what is left where it would fail."""
        with _Rest():
            return super().forward(*args, **kwargs)


class _Rest(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in RESHAPES and not kwargs and len(args) > 1 and not isinstance(args[1], torch.dtype):
            wanted = args[1] if isinstance(args[1], (tuple, list)) else args[1:]
            sizes = [int(size) if isinstance(size, Tensor) else size for size in wanted]
            if -1 not in sizes and math.prod(sizes) != args[0].numel():
                return func(args[0], (*sizes[:-1], -1))
        return func(*args, **(kwargs or {}))


RESHAPES = (Tensor.reshape, Tensor.view, torch.reshape)

_made: dict[tuple[type, ...], type[Elastic]] = {}


def _make(twin: type[Elastic], kind: type[nn.Module]) -> type[Elastic]:
    """The class that is both; always the same."""
    if (twin, kind) not in _made:
        made = type(f"Elastic{kind.__name__}", (twin, kind), {"__module__": __name__})
        _made[twin, kind] = cast("type[Elastic]", made)
    return _made[twin, kind]


def _twin_of(kind: type[nn.Module]) -> type[Elastic] | None:
    """The elastic class that stands for a class, if it has one."""
    forward = next(vars(base)["forward"] for base in kind.__mro__ if "forward" in vars(base))
    twin = TWINS.get(f"{getattr(forward, '__module__', '')}.{getattr(forward, '__qualname__', '')}")
    return None if twin is None else _make(twin, kind)


def _revive(twin: type[Elastic], kind: type[nn.Module]) -> nn.Module:
    """A module that a pickle or a deep copy will fill."""
    made = _make(twin, kind)
    return made.__new__(made)


def loosen_(model: nn.Module, joined: Iterable[str] = ()) -> nn.Module:
    """Turn all attention of a copy that is to be watched into its elastic twins; see :func:`outgrown`."""
    for name in joined:
        module = submodule(model, name)
        module.__class__ = _make(Joined, type(module))
    for _, module in named_modules(model):
        twin = _twin_of(type(module))
        if twin is not None:
            module.__class__ = twin
    return model


def can_join(model: nn.Module, name: str) -> bool:
    """Whether this part of a model (not the whole) has a class whose forward a twin can run."""
    module = submodule(model, name)
    if not name or isinstance(module, (Elastic, torch.jit.ScriptModule)) or "forward" in vars(module):
        return False
    try:
        _make(Joined, type(module))
    except Exception:  # a class may object to subclasses in any words
        return False
    return True


def outgrown(model: nn.Module, joined: Iterable[str]) -> Iterator[tuple[nn.Module, type[nn.Module]]]:
    """Modules whose own forward no longer does, with the twin that does; ``joined`` are those that a plan names."""
    for name in joined:
        module = submodule(model, name)
        if not isinstance(module, Joined):
            yield module, _make(Joined, type(module))
    for _, module in named_modules(model):
        twin = _twin_of(type(module))
        if twin is not None and len(set(twin.widths(module))) > 1:
            yield module, twin


def nests(encoder: nn.TransformerEncoder) -> bool:
    """Whether all layers of an encoder still take padded batches as nested tensors, which only torch's kernels do."""
    attentions = [getattr(layer, "self_attn", None) for layer in encoder.layers]
    return all(
        isinstance(each, nn.MultiheadAttention) and each._qkv_same_embed_dim and each.num_heads % 2 == 0
        for each in attentions
    )
