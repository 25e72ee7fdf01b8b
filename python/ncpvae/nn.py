"""Network parts: multilayer perceptrons and the residual cells of the NCP-VAE paper's Figure 5.

Letters: B batch, C channels, H and W height and width.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def mlp(sizes: Sequence[int], activation: type[nn.Module] = nn.SiLU) -> nn.Sequential:
    """Fully connected layers of the given sizes with `activation` between them, none after the last."""
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(pairwise(sizes)):
        layers += [activation()] if i else []
        layers.append(nn.Linear(before, after))
    return nn.Sequential(*layers)


class SqueezeExcitation(nn.Module):
    """Per-channel gates from the spatial mean: Hu, Shen, Sun, "Squeeze-and-excitation networks", CVPR 2018.

    Args:
        channels: C of the input [B, C, H, W].
        ratio: the hidden layer has max(C / ratio, 4) units.
    """

    def __init__(self, channels: int, ratio: int = 16):
        super().__init__()
        hidden = max(channels // ratio, 4)
        self.gate = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean((2, 3)))[..., None, None]


class FactorizedReduction(nn.Module):
    """Halve height and width by four 1×1 convolutions, each on its own quarter of the pixels, after a swish.

    Args:
        in_channels, out_channels: C before and after; out_channels must be a multiple of 4.

    Raises:
        ValueError: for an odd height or width, which has no such quarters.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        if out_channels % 4:
            raise ValueError(f"FactorizedReduction: out_channels must be a multiple of 4, got {out_channels}")
        self.quarters = nn.ModuleList(nn.Conv2d(in_channels, out_channels // 4, 1, stride=2) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(f"FactorizedReduction: height and width must be even, got input {tuple(x.shape)}")
        x = F.silu(x)
        offsets = ((0, 0), (1, 1), (0, 1), (1, 0))
        parts = zip(self.quarters, offsets, strict=True)
        return torch.cat([convolution(x[:, :, i:, j:]) for convolution, (i, j) in parts], dim=1)


class ResidualCell(nn.Module):
    """BN, swish, 3×3, BN, swish, 3×3, squeeze-excitation, and a skip connection (NCP-VAE, Figure 5).

    Block A keeps C and the size; block B (`downsample=True`) doubles C and halves the size, its skip being
    a factorised reduction.
    """

    def __init__(self, channels: int, downsample: bool = False):
        super().__init__()
        out = 2 * channels if downsample else channels
        self.residual = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.SiLU(),
            nn.Conv2d(channels, out, 3, stride=2 if downsample else 1, padding=1),
            nn.BatchNorm2d(out),
            nn.SiLU(),
            nn.Conv2d(out, out, 3, padding=1),
            SqueezeExcitation(out),
        )
        self.skip = FactorizedReduction(channels, out) if downsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.residual(x)
