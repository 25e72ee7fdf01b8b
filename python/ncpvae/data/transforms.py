"""What happens to a batch between memory and model, on the device where the batch is.

Every function maps a batch [B, …] to a batch and draws what it needs from torch's global generator of the batch's
device, so that the seeding of a training step governs it. Parameters are fixed with `functools.partial`:
`compose(random_flip, partial(quantize, bits=5), partial(scale, levels=31))`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Compose:
    """`functions`, the first one first."""

    functions: tuple[Transform, ...]

    def __call__(self, x: Tensor) -> Tensor:
        for function in self.functions:
            x = function(x)
        return x


def compose(*functions: Transform) -> Transform:
    """One transform out of several, the first one first; those that are `as_is` are left out."""
    rest = tuple(function for function in functions if function is not as_is)
    return rest[0] if len(rest) == 1 else Compose(rest) if rest else as_is


def as_is(x: Tensor) -> Tensor:
    """x itself."""
    return x


def to_float(x: Tensor) -> Tensor:
    """x in float32, its values unchanged."""
    return x.float()


def scale(x: Tensor, levels: int = 255) -> Tensor:
    """x / levels, float32: pixels in 0 … levels become [0, 1]."""
    if levels < 1:
        raise ValueError(f"scale: levels must be ≥ 1, got {levels}")
    return x.float() / levels


def binarize(x: Tensor, maximum: int = 255) -> Tensor:
    """Bernoulli(x / maximum) for every pixel of uint8 x, drawn anew at each call ("dynamic binarisation"); float32."""
    return (torch.rand(x.shape, device=x.device) * maximum < x).float()


def random_flip(x: Tensor) -> Tensor:
    """Each image of x [B, C, H, W] mirrored left to right with probability ½."""
    _check_images("random_flip", x)
    mirrored = torch.rand(len(x), device=x.device) < 0.5
    return torch.where(mirrored[:, None, None, None], x.flip(-1), x)


def pad(x: Tensor, size: int = 32) -> Tensor:
    """x [B, C, H, W] in the middle of [B, C, size, size], zeros around it (NVAE pads MNIST to 32)."""
    _check_images("pad", x)
    height, width = x.shape[-2:]
    if max(height, width) > size:
        raise ValueError(f"pad: size must be at least that of the images, {height}×{width}, got {size}")
    top, left = (size - height) // 2, (size - width) // 2
    return torch.nn.functional.pad(x, (left, size - width - left, top, size - height - top))


def quantize(x: Tensor, bits: int = 5) -> Tensor:
    """The `bits` most significant bits of uint8 x: floor(x / 2^(8 − bits)), uint8 in 0 … 2^bits − 1.

    Source: Glow's and NVAE's CelebA-HQ at 5 bits; levels are then 31.
    """
    if x.dtype != torch.uint8:
        raise TypeError(f"quantize: x must be uint8, got {x.dtype}")
    if not 1 <= bits <= 8:
        raise ValueError(f"quantize: bits must be in 1 … 8, got {bits}")
    return x >> (8 - bits)


def _check_images(owner: str, x: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"{owner}: x must be images [B, C, H, W], got shape {tuple(x.shape)}")
