"""Data sets that need no file: 25 Gaussians, which are drawn, and scikit-learn's digits."""

import math

import torch
from torch import Tensor

from .dataset import Dataset, Splits
from .transforms import to_float

GAUSSIANS_STD = 0.05
GAUSSIANS_SPACING = 2.0
DIGITS_LEVELS = 16


def gaussian_grid_means() -> Tensor:
    """[25, 2]: the modes at 2·{−2, −1, 0, 1, 2}²."""
    axis = torch.arange(-2, 3).float() * GAUSSIANS_SPACING
    return torch.cartesian_prod(axis, axis)


def gaussian_grid_entropy() -> float:
    """Differential entropy of the 25-Gaussians distribution, nats: log 25 + log(2πeσ²), its modes being 40σ apart.

    Minus this is the best mean log-likelihood any model can have on data from it.
    """
    return math.log(25) + math.log(2 * math.pi * math.e * GAUSSIANS_STD**2)


def gaussians(num_samples: int, seed: int = 0) -> Tensor:
    """[num_samples, 2] float32 draws from 25 Gaussians on a grid, σ = 0.05 (NCP-VAE, Appendix I)."""
    return _labelled_gaussians(num_samples, seed)[0]


def _labelled_gaussians(num_samples: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mode = torch.randint(0, 25, (num_samples,), generator=generator)
    x = gaussian_grid_means()[mode] + GAUSSIANS_STD * torch.randn(num_samples, 2, generator=generator)
    return x, mode


def load_gaussians(seed: int = 0) -> Dataset:
    """200,000, 10,000 and 50,000 draws with the seeds `seed`, `seed` + 1 and `seed` + 2; labels are the modes."""
    draws = [_labelled_gaussians(count, seed + i) for i, count in enumerate((200_000, 10_000, 50_000))]
    splits, labels = (Splits(*parts) for parts in zip(*draws, strict=True))
    return Dataset("gaussians", "vector", splits, f"drawn with seed {seed}", labels=labels)


def digits(seed: int = 0) -> Splits:
    """scikit-learn's 1,797 handwritten digits, uint8 [N, 1, 8, 8] in 0…16, split 1,297 / 200 / 300.

    A pixel counts the set ones among 4×4 of a 32×32 bitmap.

    Source: UCI "Optical recognition of handwritten digits" test set, Alpaydin and Kaynak, 1998.
    """
    return _labelled_digits(seed)[0]


def _labelled_digits(seed: int) -> tuple[Splits, Splits]:
    try:
        from sklearn.datasets import load_digits as read
    except ImportError as error:
        raise ImportError("the data set 'digits' needs scikit-learn: pip install 'ncpvae[data]'") from error
    found = read()
    images = torch.from_numpy(found.images).to(torch.uint8)[:, None]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    sizes = [len(images) - 500, 200, 300]
    images, labels = images[order], torch.from_numpy(found.target).long()[order]
    return Splits(*images.split(sizes)), Splits(*labels.split(sizes))


def load_digits() -> Dataset:
    """`digits(0)` with labels 0…9. Models see the counts 0…16 in float32, for a binomial likelihood."""
    splits, labels = _labelled_digits(0)
    source = "scikit-learn's load_digits"
    return Dataset("digits", "image", splits, source, DIGITS_LEVELS, labels, preprocess=to_float)
