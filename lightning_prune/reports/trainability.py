"""How well gradients pass through a network: the singular values of its Jacobians."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import ConfigurationError
from lightning_prune.structure.replica import quiet_room, replica

_CHUNK = 32


def mean_jacobian_singular_value(model: nn.Module, inputs: Tensor) -> float:
    r"""Mean singular value of the input-output Jacobian, in evaluation mode; works on a copy.

    .. math::

        \frac{1}{N} \sum_{n=1}^{N} \frac{1}{r} \sum_{i=1}^{r} \sigma_i(J_n), \qquad
        J_n = \frac{\partial f(x_n)}{\partial x_n} \in \mathbb{R}^{D_{out} \times D_{in}}, \quad
        r = \min(D_{out}, D_{in})

    Far below 1 the network hardly answers to its input, nor do its early layers to the loss: it trains slowly. Every
    sample goes through the network by itself, so that no other one has a part in its Jacobian.

    Args:
        model: takes one tensor of shape ``(N, ...)`` and returns one of shape ``(N, ...)``, both of floating point.
        inputs: samples, shape ``(N, ...)``, on the model's device.

    Returns:
        Units of output per unit of input.

    Raises:
        ConfigurationError: ``inputs`` or the output is no such tensor, or a derivative is not finite.

    Source: Saxe et al., Exact Solutions to the Nonlinear Dynamics of Learning in Deep Linear Neural Networks, ICLR
    2014, arXiv 1312.6120; as a measure of pruned networks: Lee et al., A Signal Propagation Perspective for Pruning
    Neural Networks at Initialization, ICLR 2020, arXiv 1906.06307.

    >>> scaling = nn.Linear(2, 2, bias=False)
    >>> _ = scaling.weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 0.5]]))
    >>> mean_jacobian_singular_value(scaling, torch.randn(5, 2))
    1.75
    """
    _check_inputs(inputs)
    with quiet_room(), torch.inference_mode(False), torch.enable_grad():
        samples = inputs.detach().clone()
        try:
            values = _mean_values(samples, _batched(_network(model)), _CHUNK)
        except ConfigurationError:
            raise
        except Exception:  # whatever a model does that can't be vectorised; what is wrong with it is told below
            with torch.backends.cudnn.flags(enabled=False):  # its recurrent layers have no backward in evaluation mode
                values = _mean_values(samples, _one_by_one(_network(model)), 1)
    return float(values)


def _check_inputs(inputs: Any) -> None:
    if not isinstance(inputs, Tensor):
        raise ConfigurationError(f"inputs is a {type(inputs).__name__}; give one tensor of samples, (N, ...).")
    if inputs.dim() == 0 or inputs.numel() == 0:
        raise ConfigurationError(f"inputs has shape {tuple(inputs.shape)}; give at least one sample, (N, ...).")
    if not inputs.is_floating_point():
        raise ConfigurationError(f"inputs is of {inputs.dtype}, which has no derivatives; give floating point numbers.")


def _network(model: nn.Module) -> nn.Module:
    """A fresh copy: an attempt may have left things behind on the last one."""
    return replica(model).eval().requires_grad_(False)


def _mean_values(samples: Tensor, jacobians: Callable[[Tensor], Tensor], chunk: int) -> Tensor:
    """Mean over samples and singular values, in single precision at least; ``chunk`` samples at a time."""
    means = []
    for part in samples.split(chunk):
        found = jacobians(part).detach()
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        if not bool(found.isfinite().all()):
            raise ConfigurationError("A derivative of the output is not finite, so there are no singular values.")
        means.append(torch.linalg.svdvals(found).mean(dim=1))
    return torch.cat(means).mean()


def _batched(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Jacobians of many samples at once: ``(N, ...)`` to ``(N, D_out, D_in)``."""

    def jacobians(samples: Tensor) -> Tensor:
        whole: Tensor = torch.func.vmap(torch.func.jacrev(lambda sample: _answer(network, sample)))(samples)
        return whole.flatten(2)

    return jacobians


def _one_by_one(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """The same row by row, for networks that can't be vectorised."""

    def jacobian(sample: Tensor) -> Tensor:
        sample = sample.clone().requires_grad_()
        outputs = _answer(network, sample)
        if not outputs.requires_grad:
            return sample.new_zeros(len(outputs), sample.numel())
        rows = [
            torch.autograd.grad(output, sample, retain_graph=True, materialize_grads=True)[0].flatten()
            for output in outputs
        ]
        return torch.stack(rows)

    return lambda samples: torch.stack([jacobian(sample) for sample in samples])


def _answer(network: nn.Module, sample: Tensor) -> Tensor:
    """All outputs for one sample, ``(D_out,)``."""
    output = network(sample.unsqueeze(0))
    if not isinstance(output, Tensor):
        raise ConfigurationError(
            f"The model returns a {type(output).__name__}; give one that returns a tensor, such as its logits."
        )
    if not output.is_floating_point():
        raise ConfigurationError(f"The model returns {output.dtype}, which has no derivatives; give its logits.")
    return output.flatten()
