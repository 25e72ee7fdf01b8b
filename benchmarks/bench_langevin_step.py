"""langevin_step against the same update in eager torch with randn."""

import math

import torch
from timing import DEVICES, compare

from ncpvae import ops

SIZES = [(64, 128), (64, 5120), (64, 20, 16, 16), (64, 20, 32, 32)]
STEP = 1e-2


def eager(z: torch.Tensor, score: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    return z + 0.5 * STEP * (score + (mean - z) / std.square()) + math.sqrt(STEP) * torch.randn_like(z)


for device in DEVICES:
    for shape in SIZES:
        z, score = torch.randn(shape, device=device), torch.randn(shape, device=device)
        mean, std = torch.zeros(shape[1:], device=device), torch.ones(shape[1:], device=device)
        seed = ops.draw_seed(device)
        compare(
            "langevin_step",
            {"shape": list(shape), "dtype": "float32"},
            {
                "ncpvae": lambda a=(z, score, seed, STEP, mean, std): ops.langevin_step(*a),
                "eager": lambda a=(z, score, mean, std): eager(*a),
                "reference": lambda a=(z, score, seed, STEP, mean, std): ops.reference.langevin_step(*a),
            },
            device,
        )
