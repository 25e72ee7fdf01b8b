"""Images of one's own, in a folder."""

import os
from pathlib import Path

import torch
from torch import Tensor

from .dataset import Dataset, Splits, splitter
from .images import any_image, decode_images
from .transforms import scale

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm"}
SPLIT_FOLDERS = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}


def image_folder(path: str | os.PathLike, size: int | None = None) -> Dataset:
    """All images under a folder, grey or RGB, of one size; files in the order of their names.

    With a subfolder `train`, the splits are `train`, `validation` (or `valid`, `val`) and `test`; one that is missing
    is a fixed random tenth of `train`. Without, all images are split 80 / 10 / 10 in the same way. Labels are the
    subfolders right below, in the order of their names, where all images lie in such. Links to folders are followed.

    Args:
        size: crop every image in the middle and resize it, bilinearly, to size×size; as they are by default.

    Raises:
        OSError: for a folder that is none, or an image that cannot be decoded.
        ValueError: for a folder without images, or with other splits but no `train`, and images of different sizes or
            modes.
    """
    root = Path(path)
    if not root.is_dir():
        raise OSError(f"image_folder: {str(path)!r} is not a folder")
    if size is not None and size < 1:
        raise ValueError(f"image_folder: size must be ≥ 1, got {size}")
    roots = _split_folders(root)
    files = {split: _files(folder) for split, folder in roots.items()}
    for split, found in files.items():
        if not found:
            raise ValueError(f"image_folder: no images under {str(roots[split])!r} ({', '.join(sorted(SUFFIXES))})")
    paths = [file for found in files.values() for file in found]
    ends = torch.tensor([len(found) for found in files.values()]).cumsum(0).tolist()
    rows = {split: torch.arange(end - len(files[split]), end) for split, end in zip(files, ends, strict=True)}
    cut = splitter("image_folder", {split: len(found) for split, found in files.items()})(rows)
    classes = _labels(files, roots)
    images = (_decode([paths[i] for i in part.tolist()], size) for part in cut)
    splits = Splits(*images)
    shapes = {tuple(x.shape[1:]) for x in splits}
    if len(shapes) > 1:
        raise ValueError(f"image_folder: the splits' images have different shapes [C, H, W]: {sorted(shapes)}")
    labels = None if classes is None else Splits(*(classes[part] for part in cut))
    name = f"imagefolder:{root.resolve().name}"
    return Dataset(name, "image", splits, name, 255, labels, preprocess=scale)


def _split_folders(root: Path) -> dict[str, Path]:
    if not (root / "train").is_dir():
        others = [n for names in SPLIT_FOLDERS.values() for n in names if (root / n).is_dir()]
        if others:
            raise ValueError(
                f"image_folder: {str(root)!r} must have a subfolder 'train' beside {', '.join(map(repr, others))}"
            )
        return {"train": root}
    found = {split: [root / n for n in names if (root / n).is_dir()] for split, names in SPLIT_FOLDERS.items()}
    for split, folders in found.items():
        if len(folders) > 1:
            raise ValueError(
                f"image_folder: both {folders[0].name!r} and {folders[1].name!r} could be the {split} split"
            )
    return {split: folders[0] for split, folders in found.items() if folders}


def _files(folder: Path) -> list[Path]:
    """Files with the suffix of an image, but no hidden ones; links to folders are followed, each folder once."""
    found, known = [], set()
    for where, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        place = os.path.realpath(where)
        if place in known:
            folders.clear()
            continue
        known.add(place)
        files = (Path(where, name) for name in names if not name.startswith("."))
        found += [file for file in files if file.suffix.lower() in SUFFIXES and file.is_file()]
    return sorted(found)


def _labels(files: dict[str, list[Path]], roots: dict[str, Path]) -> Tensor | None:
    """int64, one for each file in the order of `files`; None where not every image lies in a folder of its class."""
    parts = {split: [f.relative_to(roots[split]).parts for f in found] for split, found in files.items()}
    if any(len(p) < 2 for found in parts.values() for p in found):
        return None
    names = sorted({p[0] for found in parts.values() for p in found})
    return torch.tensor([names.index(p[0]) for found in parts.values() for p in found])


def _decode(files: list[Path], size: int | None) -> Tensor:
    return decode_images(files, len(files), any_image(size), lambda row: f"image_folder: {str(files[row])!r}")
