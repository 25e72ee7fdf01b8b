"""Data sets by name."""

import os
from pathlib import Path

from .arrays import npz_file
from .corpus import text_lines
from .dataset import Dataset
from .folder import image_folder
from .hub import HUB, data_folder, load_hub
from .toy import load_digits, load_gaussian_mixture, load_gaussians

READERS = {"imagefolder": image_folder, "npz": npz_file, "text": text_lines}
NAMES = ("gaussians", "toy-gmm", "digits", *HUB, *(f"{kind}:PATH" for kind in READERS))


def load(name: str, folder: str | os.PathLike | None = None, seed: int = 0) -> Dataset:
    """The data set of that name, one of `NAMES`, in memory.

    Args:
        name: `gaussians`, `toy-gmm`, `digits`, a name of `ncpvae.data.hub` (`mnist`, …), or the path of one's own data:
            `imagefolder:PATH`, `npz:PATH`, `text:PATH`. A path that does not exist as given is looked up in the folder.
        folder: holds data sets in the hub's layout; `NCPVAE_DATA` by default. What is not there comes from the hub.
            `cifar10` is CIFAR-10 alone: the JPEG subset has a name of its own, `cifar10_jpeg_subset`.
        seed: of what is drawn: `gaussians`, and `toy-gmm`, of which another seed is another distribution. How other
            data are split is fixed, and does not depend on it.

    Raises:
        ValueError: for a name that is none, and contents of another kind than expected (with file and row).
        OSError: for what cannot be read or decoded (with file and row).
    """
    if not isinstance(name, str):
        raise TypeError(f"load: name must be a string, got {type(name).__name__}")
    if name == "gaussians":
        return load_gaussians(seed)
    if name == "toy-gmm":
        return load_gaussian_mixture(seed)
    if name == "digits":
        return load_digits()
    if name in HUB:
        return load_hub(name, folder)
    kind, _, path = name.partition(":")
    if kind not in READERS or not path:
        raise ValueError(f"load: name must be one of {', '.join(NAMES)}, got {name!r}")
    return READERS[kind](_find(path, folder))


def _find(path: str, folder: str | os.PathLike | None) -> Path:
    """The path as given, else in the data folder; OSError where it is in neither."""
    given = Path(path).expanduser()
    if given.exists():
        return given
    root = data_folder(folder)
    if root is not None and (root / path).exists():
        return root / path
    raise OSError(f"load: {path!r} does not exist" + (f", nor in the data folder {str(root)!r}" if root else ""))
