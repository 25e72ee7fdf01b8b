"""gaussian_logsumexp, forward and backward, against the expanded matrix products and the broadcast in eager torch."""

import math

import torch
from timing import DEVICES, compare

from ncpvae import ops

SIZES = [(512, 512, 32), (2048, 2048, 32)]


def matmul(z: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """The square expanded into matrix products: fast, and inaccurate at small std."""
    precision = torch.exp(-2 * log_std)
    square = z.square() @ precision.T - 2 * z @ (mean * precision).T + (mean.square() * precision).sum(1)
    return torch.logsumexp(-0.5 * square - log_std.sum(1) - 0.5 * z.shape[1] * math.log(2 * math.pi), 1)


def broadcast(z: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """The square as it stands, through an N×K×D tensor."""
    square = ((z[:, None] - mean) * torch.exp(-log_std)).square().sum(2)
    return torch.logsumexp(-0.5 * square - log_std.sum(1) - 0.5 * z.shape[1] * math.log(2 * math.pi), 1)


def forward_backward(function, *arguments: torch.Tensor) -> None:
    torch.autograd.grad(function(*arguments).mean(), arguments)


for device in DEVICES:
    for N, K, D in SIZES:
        arguments = tuple(torch.randn(n, D, device=device).requires_grad_() for n in (N, K, K))
        peers = {"matmul": matmul} | ({"broadcast": broadcast} if N * K * D < 1 << 25 else {})
        for direction in ("forward", "forward and backward"):
            call = forward_backward if direction != "forward" else lambda f, *a: f(*(t.detach() for t in a))
            contenders = {"ncpvae": ops.gaussian_logsumexp} | peers
            compare(
                "gaussian_logsumexp",
                {"N": N, "K": K, "D": D, "dtype": "float32", "pass": direction},
                {name: lambda f=f, c=call, a=arguments: c(f, *a) for name, f in contenders.items()},
                device,
            )
