"""Named data sets as tensors: `gaussians` is made, `digits` ships with scikit-learn, `mnist` is read.

MNIST comes from the folder in `NCPVAE_DATA` (or `folder`) where it is there in the Hugging Face layout, and from
the hub otherwise, through the same `datasets.load_dataset`.
"""

import math
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class Splits(NamedTuple):
    """Training, validation and test examples, each [N, …]."""

    train: Tensor
    validation: Tensor
    test: Tensor


GAUSSIANS_STD = 0.05
GAUSSIANS_SPACING = 2.0


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
    generator = torch.Generator().manual_seed(seed)
    mode = torch.randint(0, 25, (num_samples,), generator=generator)
    return gaussian_grid_means()[mode] + GAUSSIANS_STD * torch.randn(num_samples, 2, generator=generator)


def digits(seed: int = 0) -> Splits:
    """scikit-learn's 1,797 handwritten digits, uint8 [N, 1, 8, 8] in 0…16, split 1,297 / 200 / 300.

    A pixel counts the set ones among 4×4 of a 32×32 bitmap.

    Source: UCI "Optical recognition of handwritten digits" test set, Alpaydin and Kaynak, 1998.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the data set 'digits' needs scikit-learn: pip install 'ncpvae[data]'") from error
    images = torch.from_numpy(load_digits().images).to(torch.uint8)[:, None]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return Splits(*images[order].split([len(images) - 500, 200, 300]))


def mnist(folder: str | os.PathLike | None = None) -> Splits:
    """MNIST, uint8 [N, 1, 28, 28]: the first 50,000 training images, the other 10,000, and the 10,000 test images.

    Args:
        folder: a folder that holds `mnist` in the hub's layout; `NCPVAE_DATA` by default. Without either, or where
            it holds no `mnist`, the hub's `ylecun/mnist` is read.

    Raises:
        OSError: where the folder does not exist or cannot be read.
    """
    train, test = (_images(_hub_dataset("mnist", "ylecun/mnist", folder, split)) for split in ("train", "test"))
    return Splits(train[:50_000], train[50_000:], test)


def _hub_dataset(name: str, hub_name: str, folder: str | os.PathLike | None, split: str):
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"the data set '{name}' needs datasets: pip install 'ncpvae[data]'") from error
    local = check_folder(name, folder)
    source = hub_name if local is None else str(local)
    try:
        return datasets.load_dataset(source, split=split)
    except Exception as error:  # the library raises many unrelated types for what is always an unreadable source
        raise OSError(f"data set '{name}' could not be read from {source!r}: {error}".splitlines()[0]) from error


def check_folder(name: str, folder: str | os.PathLike | None = None) -> Path | None:
    """Where the data set `name` lies, None for the hub; OSError for a folder that is none, or is given without it."""
    root = folder if folder is not None else os.environ.get("NCPVAE_DATA")
    if root is None:
        return None
    if not Path(root).is_dir():
        raise OSError(f"data folder {str(root)!r} (from NCPVAE_DATA or the data folder argument) is not a folder")
    if (Path(root) / name).is_dir():
        return Path(root) / name
    if folder is not None:
        raise OSError(f"data folder {str(root)!r} holds no {name!r}")
    return None


def _images(dataset) -> Tensor:
    import numpy

    return torch.from_numpy(numpy.stack([numpy.asarray(image) for image in dataset["image"]]))[:, None]


def binarize(x: Tensor, maximum: int = 255) -> Tensor:
    """Bernoulli(x / maximum) for every pixel of uint8 x, drawn anew at each call ("dynamic binarisation"); float32."""
    return (torch.rand(x.shape, device=x.device) * maximum < x).float()
