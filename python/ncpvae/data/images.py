"""Encoded images into one uint8 tensor, without ever holding more than a few of them as Python objects."""

import io
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

if TYPE_CHECKING:
    from numpy import ndarray
    from PIL.Image import Image

Prepare = Callable[["Image"], "Image"]
T = TypeVar("T")

CHUNK = 256  # images decoded at once
THREADED_FROM = 64 * 64 * 3  # values per image: below, handing an image to a thread costs more than decoding it
CELEBA_SIZE = (178, 218)
CELEBA_BOX = (15, 40, 163, 188)  # left, upper, right, lower


def decode_images(
    blobs: Iterable[bytes | str | Path | None], count: int, prepare: Prepare, where: Callable[[int], str]
) -> Tensor:
    """uint8 [count, C, H, W] out of as many encoded images, by as many threads as torch has.

    Args:
        blobs: each the bytes of a file or its path.
        prepare: checks, crops and resizes one image; what it returns is "L" or "RGB", of one size for all.
        where: names a row in errors.

    Raises:
        OSError: for an image that cannot be decoded.
        ValueError: for one that `prepare` refuses, or of another shape than the first.
    """
    image_module("decode_images")

    def decode(row: int, blob: bytes | str | Path | None) -> "ndarray":
        return _decode(blob, prepare, lambda: where(row))

    images = None
    bar = tqdm(total=count, desc="decoding", unit="image", delay=5, leave=False, disable=None)
    with bar, ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for rows in _chunks(enumerate(blobs), CHUNK):
            threaded = images is not None and images[0].numel() >= THREADED_FROM and torch.get_num_threads() > 1
            run = pool.map if threaded else map
            for (row, _), pixels in zip(rows, run(decode, *zip(*rows, strict=True)), strict=True):
                chw = pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None]
                if images is None:
                    images = torch.empty((count, *chw.shape), dtype=torch.uint8)
                    array = images.numpy()
                if chw.shape != array.shape[1:]:
                    raise ValueError(
                        f"{where(row)} has shape {chw.shape} [C, H, W], the first image {array.shape[1:]}; "
                        "all must be of one size and mode"
                    )
                array[row] = chw
            bar.update(len(rows))
    if images is None:
        raise ValueError(f"{where(0)}: no images")
    return images


def image_module(owner: str):
    """PIL.Image, or the ImportError that says how to get it."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"{owner} needs Pillow: pip install 'ncpvae[data]'") from error
    return Image


def _decode(blob: bytes | str | Path | None, prepare: Prepare, where: Callable[[], str]) -> "ndarray":
    """[H, W] or [H, W, 3]."""
    import numpy
    from PIL import Image

    if not blob:
        raise OSError(f"{where()}: the image is missing")
    try:
        image = Image.open(io.BytesIO(blob) if isinstance(blob, bytes) else blob)
        image.load()
    except Exception as error:  # Pillow's plugins raise many unrelated types for what is always a broken file
        raise OSError(f"{where()}: the image cannot be decoded: {type(error).__name__}: {error}") from error
    with image:
        try:
            return numpy.asarray(prepare(image))
        except ValueError as error:
            raise ValueError(f"{where()}: {error}") from error


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def check_image(image: "Image", mode: str, size: tuple[int, int]) -> "Image":
    """The image itself, where it has this mode and (width, height); bilevel images become "L" with values 0 and 255."""
    if image.mode == "1" and mode == "L":
        image = image.convert("L")
    if (image.mode, image.size) != (mode, size):
        raise ValueError(f"image is {_describe(image)}, expected {size[0]}×{size[1]} {mode}")
    return image


def _describe(image: "Image") -> str:
    return f"{image.width}×{image.height} {image.mode}"


def celeba64(image: "Image") -> "Image":
    """An aligned CelebA image, 178×218: its box (15, 40, 163, 188), resized bilinearly to 64×64 (NVAE)."""
    resampling = image_module("celeba64").Resampling
    return check_image(image, "RGB", CELEBA_SIZE).crop(CELEBA_BOX).resize((64, 64), resampling.BILINEAR)


def celebahq256(image: "Image") -> "Image":
    """A square RGB image of at least 256×256, resized bilinearly to 256×256 (NVAE)."""
    resampling = image_module("celebahq256").Resampling
    if image.mode != "RGB" or image.width != image.height or image.width < 256:
        raise ValueError(f"image is {_describe(image)}, expected a square RGB image of at least 256×256")
    return image if image.width == 256 else image.resize((256, 256), resampling.BILINEAR)


def omniglot28(image: "Image") -> "Image":
    """28×28 "L" with ink 255 as it is; the original 105×105 drawings, whose ink is 0, box-filtered to that."""
    resampling = image_module("omniglot28").Resampling
    if image.size != (105, 105):
        return check_image(image, "L", (28, 28))
    return image.convert("L").point([255 - v for v in range(256)]).resize((28, 28), resampling.BOX)


def any_image(size: int | None) -> Prepare:
    """Grey or RGB as it is (palettes become RGB); with `size`, cropped in the middle and resized to size×size."""
    pil = image_module("image_folder")
    from PIL import ImageOps

    def prepare(image: "Image") -> "Image":
        if image.mode == "1":
            image = image.convert("L")
        if image.mode == "P" and "transparency" not in image.info:
            image = image.convert("RGB")
        if image.mode not in ("L", "RGB"):
            raise ValueError(f"image is {_describe(image)}, expected mode L or RGB")
        return image if size is None else ImageOps.fit(image, (size, size), pil.Resampling.BILINEAR)

    return prepare
