"""sir_resample against softmax, torch.multinomial, logsumexp and the effective sample size in eager torch."""

import torch
from timing import DEVICES, compare

from ncpvae import ops

SIZES = [(1, 5000), (64, 1000), (64, 5000), (256, 5000), (16, 100_000)]


def eager(log_weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    p = torch.softmax(log_weights, 1)
    return torch.multinomial(p, 1, replacement=True), torch.logsumexp(log_weights, 1), 1 / p.square().sum(1)


for device in DEVICES:
    for B, M in SIZES:
        log_weights, seed = torch.randn(B, M, device=device), ops.draw_seed(device)
        compare(
            "sir_resample",
            {"B": B, "M": M, "n": 1, "dtype": "float32"},
            {
                "ncpvae": lambda w=log_weights, s=seed: ops.sir_resample(w, s),
                "eager": lambda w=log_weights: eager(w),
                "reference": lambda w=log_weights, s=seed: ops.reference.sir_resample(w, s),
            },
            device,
        )
