"""log-density of a mixture of diagonal Gaussians, without the N×K×D broadcast."""

import torch
from torch import Tensor

from . import _check, _library, reference


def _fake_backward(grad, z, mean, log_std, log_weight, lse):
    like = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (z, mean, log_std))
    weight_dtype = lse.dtype if log_weight is None else log_weight.dtype
    return *like, mean.new_empty(mean.shape[0], dtype=weight_dtype)


_library.define(
    "gaussian_logsumexp(Tensor z, Tensor mean, Tensor log_std, Tensor? log_weight=None) -> Tensor",
    reference.gaussian_logsumexp,
    lambda z, mean, log_std, log_weight=None: z.new_empty(z.shape[0], dtype=reference.accumulation_dtype(z.dtype)),
)
_library.define(
    "gaussian_logsumexp_backward(Tensor grad, Tensor z, Tensor mean, Tensor log_std, Tensor? log_weight, Tensor lse)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference.gaussian_logsumexp_backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output):
    *tensors, log_weight = inputs
    ctx.has_weight = log_weight is not None
    ctx.save_for_backward(*tensors, output, *([log_weight] if ctx.has_weight else []))


def _backward(ctx, grad):
    z, mean, log_std, lse, *weight = ctx.saved_tensors
    # Under create_graph the plain-torch formula runs, because it can be differentiated once more.
    twice = torch.is_grad_enabled()
    formula = reference.gaussian_logsumexp_backward if twice else torch.ops.ncpvae.gaussian_logsumexp_backward
    *grads, dlog_weight = formula(grad, z, mean, log_std, weight[0] if weight else None, lse)
    return *grads, dlog_weight if ctx.has_weight else None


_OP = _library.autograd("gaussian_logsumexp", _backward, _setup_context)


def gaussian_logsumexp(z: Tensor, mean: Tensor, log_std: Tensor, log_weight: Tensor | None = None) -> Tensor:
    """log Σ_k w_k N(z_n; mean_k, diag(std_k²)), normalising constants included.

    Args:
        z: [N, D]; float16, bfloat16, float32 or float64. N may be 0.
        mean, log_std: [K, D], of z's dtype; log_std is the natural log of the standard deviation.
        log_weight: [K], of z's dtype, nats, need not be normalised; all zero (a plain sum) by default.

    Returns:
        [N], nats, float32 (float64 for float64 input). Differentiable in all four, twice.

    The aggregate posterior is log q(z) = gaussian_logsumexp(z, means, log_stds) − log K, with one component
    per data point (Hoffman and Johnson, "ELBO surgery", 2016). The square is formed as ((z − mean)/std)²
    and never expanded, which at small std costs all accuracy.
    """
    op = "gaussian_logsumexp"
    _check.floating(op, "z", z, dims=2)
    _check.at_least_one(op, "z", z, 1, "D")
    _check.like(op, "mean", mean, "z", z)
    _check.floating(op, "mean", mean, dims=2)
    _check.shape(op, "mean", mean, (mean.shape[0], z.shape[1]), "[K, D]")
    _check.at_least_one(op, "mean", mean, 0, "K")
    _check.like(op, "log_std", log_std, "z", z)
    _check.shape(op, "log_std", log_std, tuple(mean.shape), "mean's [K, D]")
    if log_weight is not None:
        _check.like(op, "log_weight", log_weight, "z", z)
        _check.shape(op, "log_weight", log_weight, (mean.shape[0],), "[K]")
    return _library.call(_OP, z, mean, log_std, log_weight)
