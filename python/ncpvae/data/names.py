"""Data sets by name."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .arrays import npz_file
from .corpus import CORPORA, load_corpus, text_lines
from .dataset import Dataset
from .folder import image_folder
from .hub import HUB, data_folder, load_hub
from .toy import load_digits, load_gaussian_mixture, load_gaussians

READERS: dict[str, Callable[..., Dataset]] = {"imagefolder": image_folder, "npz": npz_file, "text": text_lines}
NAMES = ("gaussians", "toy-gmm", "digits", *HUB, *CORPORA, *(f"{kind}:PATH" for kind in READERS))


def load(
    name: str,
    folder: str | os.PathLike | None = None,
    seed: int = 0,
    max_vocabulary: int | None = None,
    max_length: int | None = None,
) -> Dataset:
    """The data set of that name, one of `NAMES`, in memory.

    Args:
        name: `gaussians`, `toy-gmm`, `digits`, a name of `ncpvae.data.hub` (`mnist`, …) or of `ncpvae.data.corpus`
            (`yahoo`, …), or the path of one's own data: `imagefolder:PATH`, `npz:PATH`, `text:PATH`. A path that does
            not exist as given is looked up in the folder.
        folder: holds data sets in the hub's layout; `NCPVAE_DATA` by default, and then images that are not there come
            from the hub. `cifar10` is CIFAR-10 alone: the JPEG subset has a name of its own, `cifar10_jpeg_subset`.
        seed: of what is drawn: `gaussians`, and `toy-gmm`, of which another seed is another distribution. How other
            data are split is fixed, and does not depend on it.
        max_vocabulary, max_length: of text, and of nothing else; as `text_lines` has them.

    Raises:
        ValueError: for a name that is none, and contents of another kind than expected (with file and row).
        OSError: for what cannot be read or decoded (with file and row).
    """
    if not isinstance(name, str):
        raise TypeError(f"load: name must be a string, got {type(name).__name__}")
    kind, _, path = name.partition(":")
    given = {"max_vocabulary": max_vocabulary, "max_length": max_length}
    options: dict[str, Any] = {option: value for option, value in given.items() if value is not None}
    if options and name not in CORPORA and kind != "text":
        raise ValueError(f"load: {', '.join(options)} can be given for text only, not for {name!r}")
    if name == "gaussians":
        return load_gaussians(seed)
    if name == "toy-gmm":
        return load_gaussian_mixture(seed)
    if name == "digits":
        return load_digits()
    if name in HUB:
        return load_hub(name, folder)
    if name in CORPORA:
        return load_corpus(name, folder, **options)
    if kind not in READERS or not path:
        raise ValueError(f"load: name must be one of {', '.join(NAMES)}, got {name!r}")
    return READERS[kind](_find(path, folder), **options)


def _find(path: str, folder: str | os.PathLike | None) -> Path:
    """The path as given, else in the data folder; OSError where it is in neither."""
    given = Path(path).expanduser()
    if given.exists():
        return given
    root = data_folder(folder)
    if root is not None and (root / path).exists():
        return root / path
    raise OSError(f"load: {path!r} does not exist" + (f", nor in the data folder {str(root)!r}" if root else ""))
