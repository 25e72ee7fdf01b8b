"""Arrays of one's own, in a NumPy archive."""

import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .dataset import Dataset, Splits, splitter
from .transforms import as_is, scale


def npz_file(path: str | os.PathLike) -> Dataset:
    """The arrays `train` and, where there, `validation` and `test` of an .npz file; pickled objects are never loaded.

    uint8 [N, H, W], [N, C, H, W] or [N, H, W, C] with C = 1 or 3 are images, floating point [N, D] are vectors. A split
    that is missing is a fixed random tenth of `train`. Integers `train_labels` (and `validation_labels`,
    `test_labels`), [N], are labels: of all the arrays or of none.

    Raises:
        OSError: for a file that cannot be read.
        ValueError: for pickled objects, no `train`, arrays of another kind, empty or not finite.
    """
    arrays = _read(path)
    where = f"npz_file: {str(path)!r}"
    if "train" not in arrays:
        raise ValueError(f"{where} has no array 'train', only {', '.join(map(repr, arrays)) or 'none'}")
    parts = {name: _examples(f"{where}, array {name!r}", arrays[name]) for name in Splits._fields if name in arrays}
    shapes = {name: (tuple(x.shape[1:]), x.dtype) for name, x in parts.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"{where}: the arrays' examples differ: {shapes}")
    cut = splitter(where, {name: len(x) for name, x in parts.items()})
    labels = {
        name: _labels(f"{where}, array '{name}_labels'", arrays[f"{name}_labels"], len(x))
        for name, x in parts.items()
        if f"{name}_labels" in arrays
    }
    if labels and len(labels) < len(parts):
        raise ValueError(f"{where}: labels must be there for all of {', '.join(parts)}, got {', '.join(labels)}")
    name, image = f"npz:{Path(path).name}", parts["train"].dtype == torch.uint8
    return Dataset(
        name,
        "image" if image else "vector",
        cut(parts),
        name,
        255 if image else None,
        cut(labels) if labels else None,
        preprocess=scale if image else as_is,
    )


def _read(path: str | os.PathLike) -> dict[str, Any]:
    """The arrays of the file that this module knows; of others only the names, with None."""
    import numpy

    known = [key for name in Splits._fields for key in (name, f"{name}_labels")]
    try:
        with open(path, "rb") as stream:
            is_archive = zipfile.is_zipfile(stream)
        if is_archive:
            with numpy.load(path, allow_pickle=False) as archive:
                return {key: archive[key] if key in known else None for key in archive.files}
    except (OSError, RuntimeError, zipfile.BadZipFile, zlib.error, EOFError) as error:  # RuntimeError: encrypted
        raise OSError(f"npz_file: {str(path)!r} could not be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"npz_file: {str(path)!r} holds pickled objects or a broken array: {error}") from error
    raise ValueError(f"npz_file: {str(path)!r} is not an .npz file (a zip archive of arrays), or is cut off")


def _examples(where: str, array: Any) -> Tensor:
    """uint8 [N, C, H, W] or float32 [N, D]."""
    import numpy

    if not isinstance(array, numpy.ndarray):
        raise ValueError(f"{where} is not in NumPy's format")
    if array.size == 0:
        raise ValueError(f"{where} is empty, shape {array.shape}")
    if array.dtype == "uint8" and array.ndim == 3:
        return torch.from_numpy(array)[:, None]
    if array.dtype == "uint8" and array.ndim == 4 and (array.shape[1] in (1, 3) or array.shape[3] in (1, 3)):
        images = torch.from_numpy(array)
        return images if array.shape[1] in (1, 3) else images.permute(0, 3, 1, 2).contiguous()
    if array.dtype.kind == "f" and array.ndim == 2:
        with numpy.errstate(over="ignore"):  # too large for float32: infinite, hence named below
            x = torch.from_numpy(array.astype("float32", copy=False))
        bad = (~x.isfinite()).any(1).nonzero()
        if len(bad):
            raise ValueError(f"{where}, row {int(bad[0])} is not finite in float32")
        return x
    raise ValueError(
        f"{where} must be uint8 images [N, H, W], [N, C, H, W] or [N, H, W, C] with C = 1 or 3, "
        f"or floating point [N, D], got {array.dtype} {list(array.shape)}"
    )


def _labels(where: str, array: Any, count: int) -> Tensor:
    import numpy

    if not isinstance(array, numpy.ndarray) or array.dtype.kind not in "bui" or array.shape != (count,):
        got = f"{getattr(array, 'dtype', type(array).__name__)} {list(getattr(array, 'shape', []))}"
        raise ValueError(f"{where} must hold {count} integers, got {got}")
    return torch.from_numpy(array.astype("int64"))
