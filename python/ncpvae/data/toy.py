"""Data sets that need no file: mixtures of Gaussians, which are drawn, and scikit-learn's digits."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from .dataset import Dataset, Splits
from .transforms import to_float

GAUSSIANS_STD = 0.05
GAUSSIANS_SPACING = 2.0
DIGITS_LEVELS = 16
MIXTURE_CLASSES, MIXTURE_DIM, MIXTURE_EXAMPLES = 10, 16, 20_000  # examples of each class
MIXTURE_RADIUS, MIXTURE_VARIANCE = 40.0, 8.0  # the largest


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


class Entropy(NamedTuple):
    """A differential entropy estimated from draws, nats."""

    value: float
    standard_error: float


def gaussian_mixture_parameters(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Means [10, 16] and standard deviations [10], float64, of the mixture behind `toy-gmm`, all weights alike.

    The mixture is itself random: a mean is a direction uniform on the sphere times a radius U(0, 40), and the
    covariance is U(0, 8) times the identity. Each seed has its own, and entropies differ between them by some nats.
    """
    return _draw_mixture(torch.Generator().manual_seed(seed))


def _draw_mixture(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    direction = torch.randn(MIXTURE_CLASSES, MIXTURE_DIM, generator=generator, dtype=torch.float64)
    radius, variance = torch.rand(2, MIXTURE_CLASSES, 1, generator=generator, dtype=torch.float64)
    mean = MIXTURE_RADIUS * radius * direction / direction.norm(dim=1, keepdim=True)
    return mean, (MIXTURE_VARIANCE * variance[:, 0]).sqrt()


def _draw_classes(per_class: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mixture's means and standard deviations, and `per_class` draws [N, 16] of each class with labels [N]."""
    mean, std = _draw_mixture(generator)
    label = torch.arange(MIXTURE_CLASSES).repeat_interleave(per_class)
    noise = torch.randn(len(label), MIXTURE_DIM, generator=generator, dtype=torch.float64)
    return mean, std, mean[label] + std[label, None] * noise, label


def gaussian_mixture_entropy(seed: int = 0, per_class: int = 20_000) -> Entropy:
    """Entropy of the mixture behind `toy-gmm` with that seed: the least mean negative log-likelihood of any model.

    The entropies of the classes are known, so that only E[log N(x; class) − log p(x)] is estimated, the information
    that x has on its class.

    Args:
        seed: of the mixture.
        per_class: draws from each of its 10 Gaussians.

    Returns:
        nats per example, with the standard error of the estimate.
    """
    if per_class < 2:
        raise ValueError(f"gaussian_mixture_entropy: per_class must be ≥ 2, got {per_class}")
    mean, std, x, label = _draw_classes(per_class, torch.Generator().manual_seed(seed))
    log_std = std.log()[:, None].expand_as(mean).contiguous()
    log_weight = torch.full_like(std, -math.log(MIXTURE_CLASSES))
    log_p = ops.gaussian_logsumexp(x, mean, log_std, log_weight)
    square = (x - mean[label]).square().sum(1) / std[label].square()
    log_p_class = -0.5 * square - MIXTURE_DIM * (std[label].log() + 0.5 * math.log(2 * math.pi))
    entropies = MIXTURE_DIM * (std.log() + 0.5 * math.log(2 * math.pi * math.e))
    information = (log_p_class - log_p).view(MIXTURE_CLASSES, per_class)
    error = float((information.var(1).sum() / per_class).sqrt()) / MIXTURE_CLASSES  # draws are stratified by class
    return Entropy(float(entropies.mean() + information.mean()), error)


def load_gaussian_mixture(seed: int = 0) -> Dataset:
    """20,000 draws from each of 10 random Gaussians in 16 dimensions, shuffled: 162,000 / 18,000 / 20,000 of them.

    The seed governs the mixture (`gaussian_mixture_parameters`) as well as the draws; labels are its classes.
    """
    generator = torch.Generator().manual_seed(seed)
    _, _, x, label = _draw_classes(MIXTURE_EXAMPLES, generator)
    order = torch.randperm(len(x), generator=generator)
    sizes = [162_000, 18_000, 20_000]
    splits, labels = Splits(*x[order].float().split(sizes)), Splits(*label[order].split(sizes))
    return Dataset("toy-gmm", "vector", splits, f"mixture and draws with seed {seed}", labels=labels)


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
