"""Image data sets in the layout of the Hugging Face hub, from a folder or the hub itself, by the same code.

| name | hub | training / validation / test | in memory |
|---|---|---|---|
| `mnist` | ylecun/mnist | first 50,000 / last 10,000 of "train" / 10,000 | [1, 28, 28] |
| `omniglot` | GATE-engine/omniglot | own splits, or all shuffled: 22,390 / 2,000 / 8,070 | [1, 28, 28], ink 255 |
| `cifar10` | uoft-cs/cifar10 | first 45,000 / last 5,000 of "train" / 10,000 | [3, 32, 32] |
| `cifar10_jpeg_subset` | none | first 9,000 / last 1,000 of "train" / 2,000 | [3, 32, 32] |
| `celeba64` | flwrlabs/celeba | 162,770 / 19,867 / 19,962 | [3, 64, 64] |
| `celebahq256` | korexyz/celeba-hq-256x256 | 27,000 / 1,000 / 2,000 of all in their order | [3, 256, 256] |

NVAE trains on all 50,000 images of CIFAR-10 and evaluates on its test images, and on CelebA-HQ evaluates on the 3,000
that are validation and test here: `torch.cat` joins splits where that is wanted.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dataset import Dataset, Splits
from .images import Prepare, celeba64, celebahq256, check_image, decode_images, omniglot28
from .transforms import Transform, as_is, binarize, compose, quantize, random_flip, scale

BATCH = 1000  # rows read from disk at once
SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid"), "test": ("test",)}


class Rows(NamedTuple):
    """Rows of one split of the source."""

    split: str
    indices: Sequence[int]


Plan = Callable[[str, dict[str, int]], dict[str, list[Rows]]]  # name, rows of each split of the source -> what to read


@dataclass(frozen=True)
class HubImages:
    """Where a data set of images lies, how it is cut and prepared, and NVAE's preprocessing of it.

    Attributes:
        repository: on the hub; None where there is none.
        folder: its name in a data folder.
        labels: the column that holds the class, the first that is there; none given: all columns of booleans.
    """

    repository: str | None
    folder: str
    prepare: Prepare
    plan: Plan
    labels: tuple[str, ...] = ("label",)
    levels: int = 255
    augment: Transform = as_is
    preprocess: Transform = scale
    caution: str = ""
    levels_in_memory: int | None = None


def load_hub(name: str, folder: str | os.PathLike | None = None) -> Dataset:
    """The data set `name` of `HUB` (see the table above).

    Args:
        folder: a folder that holds it in the hub's layout, under the name in `HUB`; `NCPVAE_DATA` by default. Without
            either, or where `NCPVAE_DATA` has no folder of that name, the hub is read.

    Raises:
        OSError: where the source cannot be read, or an image not be decoded.
        ValueError: for a missing split or column, and images of another size or mode than the data set's.
    """
    spec = HUB[name]
    source, found = _open(name, spec, folder)
    plan = spec.plan(name, {split: len(rows) for split, rows in found.items()})
    images = {part: _read_images(name, found, pieces, spec.prepare) for part, pieces in plan.items()}
    labels = {part: _read_labels(name, found, pieces, spec.labels) for part, pieces in plan.items()}
    known = {part: tensor for part, tensor in labels.items() if tensor is not None}
    return Dataset(
        name,
        "image",
        Splits(**images),
        source,
        spec.levels,
        Splits(**known) if len(known) == len(labels) else None,
        spec.augment,
        spec.preprocess,
        caution=spec.caution,
        levels_in_memory=spec.levels_in_memory,
    )


def mnist(folder: str | os.PathLike | None = None) -> Splits:
    """MNIST, uint8 [N, 1, 28, 28]: the first 50,000 training images, the other 10,000, and the 10,000 test images.

    Args:
        folder: a folder that holds `mnist` in the hub's layout; `NCPVAE_DATA` by default. Without either, or where
            it holds no `mnist`, the hub's `ylecun/mnist` is read.

    Raises:
        OSError: where the folder does not exist or cannot be read.
    """
    return load_hub("mnist", folder).splits


def check_folder(name: str, folder: str | os.PathLike | None = None) -> Path | None:
    """Where the data set `name` lies, None for the hub; OSError for a folder that is none, or is given without it."""
    root = data_folder(folder)
    if root is None:
        return None
    name = HUB[name].folder if name in HUB else name
    if (root / name).is_dir():
        return root / name
    if folder is not None:
        others = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir()))
        raise OSError(f"data folder {str(root)!r} holds no {name!r}" + (f", only {others}" if others else ""))
    return None


def data_folder(folder: str | os.PathLike | None = None) -> Path | None:
    """`folder`, or the one in `NCPVAE_DATA`; OSError where that is none."""
    root = folder if folder is not None else os.environ.get("NCPVAE_DATA") or None
    if root is not None and not Path(root).is_dir():
        raise OSError(f"data folder {str(root)!r} (from NCPVAE_DATA or the data folder argument) is not a folder")
    return None if root is None else Path(root)


def _open(name: str, spec: HubImages, folder: str | os.PathLike | None) -> tuple[str, dict[str, Any]]:
    """Provenance, and the source's splits as `datasets` has them."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"the data set '{name}' needs datasets: pip install 'ncpvae[data]'") from error
    local = check_folder(name, folder)
    if local is None and spec.repository is None:
        raise OSError(f"data set '{name}' is not on the hub: give a data folder that holds {spec.folder!r}")
    source = spec.repository if local is None else str(local)
    try:
        found = datasets.load_dataset(source)
    except Exception as error:  # the library raises many unrelated types for what is always an unreadable source
        hint = f"; to read it from a folder, have {spec.folder!r} in NCPVAE_DATA" if local is None else ""
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(f"data set '{name}' could not be read from {source!r}: {reason}{hint}") from error
    return (f"hub {source}" if local is None else f"folder {spec.folder}"), found


# What to read


def _find(name: str, sizes: dict[str, int], split: str) -> str:
    """The source's own name of a split that must be there and not be empty."""
    for alias in SPLIT_NAMES[split]:
        if sizes.get(alias):
            return alias
    given = ", ".join(f"{key!r} ({size:,} rows)" for key, size in sizes.items()) or "none"
    raise ValueError(f"data set '{name}' has no rows in a split {split!r}; its splits are {given}")


def _cut_train(parts: int, name: str, sizes: dict[str, int]) -> dict[str, list[Rows]]:
    """The source's test split, and of its training split the last one of `parts` for validation."""
    train, test = (_find(name, sizes, split) for split in ("train", "test"))
    cut = sizes[train] - sizes[train] // parts
    if cut == sizes[train]:
        raise ValueError(f"data set '{name}', split '{train}': {cut} rows are too few to hold out one in {parts}")
    return {
        "train": [Rows(train, range(cut))],
        "validation": [Rows(train, range(cut, sizes[train]))],
        "test": [Rows(test, range(sizes[test]))],
    }


def _own_splits(name: str, sizes: dict[str, int]) -> dict[str, list[Rows]]:
    """Training, validation and test as the source has them."""
    found = {split: _find(name, sizes, split) for split in SPLIT_NAMES}
    return {split: [Rows(own, range(sizes[own]))] for split, own in found.items()}


def _joined(shares: tuple[float, float], shuffle: bool, name: str, sizes: dict[str, int]) -> dict[str, list[Rows]]:
    """All the source's splits joined, shuffled once and for all or not, and cut: shares of training and validation."""
    rows = [(split, i) for split, size in sizes.items() for i in range(size)]
    if shuffle:
        rows = [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()]
    ends = [round(shares[0] * len(rows)), round((shares[0] + shares[1]) * len(rows)), len(rows)]
    plan: dict[str, list[Rows]] = {}
    for part, start, end in zip(SPLIT_NAMES, [0, *ends], ends, strict=False):
        if start == end:
            raise ValueError(f"data set '{name}': {len(rows)} rows are too few to be split in three")
        plan[part] = [Rows(split, [i for own, i in rows[start:end] if own == split]) for split in sizes]
    return plan


def _own_or_shuffled(name: str, sizes: dict[str, int]) -> dict[str, list[Rows]]:
    """The source's own three splits where it has them, else Burda's numbers for validation and test."""
    if all(any(alias in sizes for alias in aliases) for aliases in SPLIT_NAMES.values()):
        return _own_splits(name, sizes)
    return _joined((22_390 / 32_460, 2_000 / 32_460), True, name, sizes)


# Reading


def _read_images(name: str, found: dict[str, Any], pieces: list[Rows], prepare: Prepare) -> Tensor:
    """uint8 [N, C, H, W], the pieces one after the other."""
    places = [(piece.split, i) for piece in pieces for i in piece.indices]

    def where(row: int) -> str:
        split, index = places[row]
        return f"data set '{name}', split '{split}', row {index}"

    blobs = (blob for piece in pieces for blob in _blobs(name, piece, found[piece.split]))
    return decode_images(blobs, len(places), prepare, where)


def _blobs(name: str, piece: Rows, rows: Any) -> Iterator[bytes | str | None]:
    """The encoded images of a piece: bytes, or the path of a file."""
    import datasets

    where = f"data set '{name}', split '{piece.split}'"
    columns = [key for key, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    columns += [key for key in ("image", "img") if key in rows.features]
    if not columns:
        raise ValueError(f"{where}: no column of images, only {', '.join(map(repr, rows.features))}")
    column = columns[0]
    try:
        encoded = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # pyarrow's and the library's own, for a column of something else
        raise ValueError(f"{where}: column {column!r} does not hold images: {rows.features[column]}") from error
    for batch in _batches(encoded, piece.indices):
        for cell in batch[column]:
            yield None if cell is None else cell["bytes"] or cell["path"]


def _batches(rows: Any, indices: Sequence[int]) -> Iterator[dict[str, Any]]:
    for start in range(0, len(indices), BATCH):
        part = indices[start : start + BATCH]
        yield rows[part.start : part.stop] if isinstance(part, range) else rows[part]


def _read_labels(name: str, found: dict[str, Any], pieces: list[Rows], columns: tuple[str, ...]) -> Tensor | None:
    """int64 [N], or bool [N, A] of A attributes; None where the source has no such column."""
    features = found[pieces[0].split].features
    if columns:
        chosen = [key for key in columns if key in features][:1]
    else:
        chosen = [key for key, feature in features.items() if getattr(feature, "dtype", None) == "bool"]
    if not chosen:
        return None
    parts = [_labels_of(name, piece, found[piece.split], chosen) for piece in pieces if len(piece.indices)]
    labels = torch.cat(parts)
    return labels if not columns else labels[:, 0].long()


def _labels_of(name: str, piece: Rows, rows: Any, columns: list[str]) -> Tensor:
    import numpy

    where = f"data set '{name}', split '{piece.split}'"
    missing = [column for column in columns if column not in rows.features]
    if missing:
        raise ValueError(f"{where}: no column {missing[0]!r}, only {', '.join(map(repr, rows.features))}")
    table = rows.select_columns(columns).with_format("numpy")
    batches = list(_batches(table, piece.indices))
    arrays = [numpy.concatenate([batch[column] for batch in batches]) for column in columns]
    for column, array in zip(columns, arrays, strict=True):
        if array.dtype.kind not in "bui":
            raise ValueError(f"{where}: column {column!r} must hold a label in every row, got {array.dtype}")
    return torch.from_numpy(numpy.stack(arrays, 1))


HUB: dict[str, HubImages] = {
    "mnist": HubImages(
        "ylecun/mnist",
        "mnist",
        partial(check_image, mode="L", size=(28, 28)),
        partial(_cut_train, 6),
        preprocess=binarize,
    ),
    "omniglot": HubImages(
        "GATE-engine/omniglot",
        "omniglot28",
        omniglot28,
        _own_or_shuffled,
        labels=("alphabet", "label"),
        preprocess=binarize,
        caution="28×28 by a box filter from 105×105, not Burda's chardata.mat: "
        "likelihoods are not comparable with those published for Omniglot",
    ),
    "cifar10": HubImages(
        "uoft-cs/cifar10",
        "cifar10",
        partial(check_image, mode="RGB", size=(32, 32)),
        partial(_cut_train, 10),
        augment=random_flip,
    ),
    "cifar10_jpeg_subset": HubImages(
        None,
        "cifar10_jpeg_subset",
        partial(check_image, mode="RGB", size=(32, 32)),
        partial(_cut_train, 10),
        augment=random_flip,
        caution="a JPEG-compressed subset of CIFAR-10: bits/dim and Fréchet distances are not those of CIFAR-10",
    ),
    "celeba64": HubImages("flwrlabs/celeba", "celeba64", celeba64, _own_splits, labels=(), augment=random_flip),
    "celebahq256": HubImages(
        "korexyz/celeba-hq-256x256",
        "celebahq256",
        celebahq256,
        partial(_joined, (0.9, 1 / 30), False),
        levels=31,
        levels_in_memory=255,
        augment=random_flip,
        preprocess=compose(partial(quantize, bits=5), partial(scale, levels=31)),
        caution="27,000 / 3,000 images in the order of their source, not the lists of Glow and NVAE",
    ),
}
