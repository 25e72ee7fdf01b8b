"""Row and column logsumexp of scaled dot products, without the N×K score matrix."""

import torch
from torch import Tensor

from . import _check, _library, reference

_library.define(
    "similarity_logsumexp(Tensor z, Tensor x, Tensor scale) -> (Tensor, Tensor)",
    reference.similarity_logsumexp,
    lambda z, x, scale: tuple(t.new_empty(t.shape[0], dtype=reference.accumulation_dtype(t.dtype)) for t in (z, x)),
)
_library.define(
    "similarity_logsumexp_backward(Tensor grad_z, Tensor grad_x, Tensor z, Tensor x, Tensor scale, "
    "Tensor lse_z, Tensor lse_x) -> (Tensor, Tensor, Tensor)",
    reference.similarity_logsumexp_backward,
    lambda grad_z, grad_x, z, x, scale, *_: tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (z, x, scale)
    ),
)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx, grad_z, grad_x):
    # Under create_graph the plain-torch formula runs, because it can be differentiated once more.
    twice = torch.is_grad_enabled()
    formula = reference.similarity_logsumexp_backward if twice else torch.ops.ncpvae.similarity_logsumexp_backward
    return formula(grad_z, grad_x, *ctx.saved_tensors)


_OP = _library.autograd("similarity_logsumexp", _backward, _setup_context)


def similarity_logsumexp(z: Tensor, x: Tensor, scale: Tensor | float) -> tuple[Tensor, Tensor]:
    """logsumexp over each row and each column of s = scale · z xᵀ, the scores never held at once.

    Args:
        z: [N, D]; float16, bfloat16, float32 or float64. N may be 0.
        x: [K, D], of z's dtype.
        scale: 0-dimensional tensor, or a number.

    Returns:
        lse_z [N] = logsumexp_k s_nk and lse_x [K] = logsumexp_n s_nk, float32 (float64 for float64 input).
        Differentiable in z, x and scale, twice.

    With cosine-normalised heads these are the two denominators of the neural and hybrid critics' InfoNCE
    objective: van den Oord, Li, Vinyals, "Representation learning with contrastive predictive coding", 2018.
    """
    op = "similarity_logsumexp"
    _check.floating(op, "z", z, dims=2)
    _check.at_least_one(op, "z", z, 1, "D")
    _check.like(op, "x", x, "z", z)
    _check.floating(op, "x", x, dims=2)
    _check.shape(op, "x", x, (x.shape[0], z.shape[1]), "[K, D]")
    _check.at_least_one(op, "x", x, 0, "K")
    if not isinstance(scale, Tensor):
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise TypeError(f"{op}: scale must be a number or a tensor without dimensions, got {type(scale).__name__}")
        scale = torch.tensor(float(scale), dtype=reference.accumulation_dtype(z.dtype), device=z.device)
    _check.floating(op, "scale", scale, dims=0)
    _check.same_device(op, "scale", scale, "z", z)
    return _library.call(_OP, z, x, scale)
