"""similarity_logsumexp, forward and backward, against logsumexp of the dense scores in eager torch."""

import torch
from timing import DEVICES, compare
from torch.nn.functional import normalize

from ncpvae import ops

SIZES = [(64, 128), (1024, 128), (4096, 128)]
SCALE = 1 / 0.07


def eager(z: torch.Tensor, x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    s = scale * (z @ x.T)
    return s.logsumexp(1), s.logsumexp(0)


def forward_backward(function, z: torch.Tensor, x: torch.Tensor, scale: torch.Tensor) -> None:
    a, b = function(z, x, scale)
    torch.autograd.grad(a.mean() + b.mean(), (z, x, scale))


for device in DEVICES:
    for N, D in SIZES:
        z, x = (normalize(torch.randn(N, D, device=device)).requires_grad_() for _ in range(2))
        arguments = (z, x, torch.tensor(SCALE, device=device, requires_grad=True))
        compare(
            "similarity_logsumexp",
            {"N": N, "K": N, "D": D, "dtype": "float32", "pass": "forward and backward"},
            {
                "ncpvae": lambda a=arguments: forward_backward(ops.similarity_logsumexp, *a),
                "eager": lambda a=arguments: forward_backward(eager, *a),
            },
            device,
        )
