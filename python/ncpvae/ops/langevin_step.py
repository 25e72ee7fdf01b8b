"""One step of unadjusted Langevin dynamics, with the gradient of a Normal base prior fused in."""

import torch
from torch import Tensor

from . import _check, _library, reference

_ARGUMENTS = (
    "Tensor score, Tensor seed, float step_size, Tensor? base_mean=None, Tensor? base_std=None, float temperature=1.0"
)


def _in_place(z: Tensor, *arguments) -> None:
    z.copy_(reference.langevin_step(z, *arguments))


_library.define(
    f"langevin_step(Tensor z, {_ARGUMENTS}) -> Tensor",
    reference.langevin_step,
    lambda z, *_, **__: torch.empty_like(z, memory_format=torch.contiguous_format),
)
_library.define(f"langevin_step_(Tensor(a!) z, {_ARGUMENTS}) -> ()", _in_place, lambda z, *_, **__: None)


def _setup_context(ctx, inputs, output):
    z, _, _, ctx.step_size, base_mean, base_std, _ = inputs
    ctx.save_for_backward(*([] if base_mean is None else [z, base_mean, base_std]))


def _backward(ctx, grad):
    """The step is affine in z, score and mean; the noise does not depend on any of them."""
    half, saved = 0.5 * ctx.step_size, ctx.saved_tensors
    if not saved:
        return grad, half * grad, None, None, None, None, None
    z, mean, std = saved
    dmean = half * grad / std / std
    dstd = -2 * (mean - z) / std * dmean
    return grad - dmean, half * grad, None, None, dmean.sum_to_size(mean.shape), dstd.sum_to_size(std.shape), None


_OP = _library.autograd("langevin_step", _backward, _setup_context)


def _check_arguments(op, z, score, seed, step_size, base_mean, base_std, temperature) -> None:
    _check.floating(op, "z", z)
    _check.like(op, "score", score, "z", z)
    shape = z.shape
    _check.shape(op, "score", score, shape, "z's")
    _check.seed(op, seed, "z", z)
    _check.number(op, "step_size", step_size, 0.0, strict=True)
    _check.number(op, "temperature", temperature, 0.0)
    if (base_mean is None) != (base_std is None):
        raise ValueError(f"{op}: base_mean and base_std must be given together, got only one of them")
    fits = None
    for name, value in (("base_mean", base_mean), ("base_std", base_std)):
        if value is None:
            continue
        _check.like(op, name, value, "z", z)
        have = value.shape
        if have == fits:
            continue
        fits = have
        trailing = shape[-len(have) :] if have else have
        if have == trailing:
            continue
        if len(have) > len(shape) or any(h not in (1, w) for h, w in zip(have, trailing, strict=True)):
            raise ValueError(f"{op}: {name} must broadcast to z's shape {tuple(shape)}, got {tuple(have)}")


def langevin_step(
    z: Tensor,
    score: Tensor,
    seed: Tensor,
    step_size: float,
    base_mean: Tensor | None = None,
    base_std: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """z + ½λ·(score + (mean − z)/std²) + √(λ·temperature)·ε, with ε standard Normal.

    Args:
        z: any shape, the chain's state; float16, bfloat16, float32 or float64.
        score: z's shape and dtype: ∇ log r(z) where a Normal base is given, else the whole ∇ log p(z).
        seed: int64 [2] from `draw_seed`; add the step's number to its stream along a chain.
        step_size: λ > 0, in squared units of z.
        base_mean, base_std: the Normal base prior, broadcastable to z, both or neither.
        temperature: ≥ 0; 0 is gradient ascent on the log-density.

    Returns:
        The next state, a new tensor of z's shape and dtype; differentiable in z, score, mean and std.

    Source: NCP-VAE, section 3.3, with E(z) = −log r(z) − log p(z).
    """
    _check_arguments("langevin_step", z, score, seed, step_size, base_mean, base_std, temperature)
    return _library.call(_OP, z, score, seed, step_size, base_mean, base_std, temperature)


def langevin_step_(
    z: Tensor,
    score: Tensor,
    seed: Tensor,
    step_size: float,
    base_mean: Tensor | None = None,
    base_std: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """`langevin_step` written into z, which is returned. It has no gradient: call it under `torch.no_grad()`."""
    _check_arguments("langevin_step_", z, score, seed, step_size, base_mean, base_std, temperature)
    inputs = [t for t in (z, score, base_mean, base_std) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        raise ValueError("langevin_step_: no argument may require grad; use langevin_step, or torch.no_grad()")
    torch.ops.ncpvae.langevin_step_(z, score, seed, step_size, base_mean, base_std, temperature)
    torch.autograd.graph.increment_version(z)  # autograd must see the change, whichever kernel made it
    return z
