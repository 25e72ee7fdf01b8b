"""A named data set in memory, and the one rule by which examples are held out where a source does not say."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .transforms import Transform, as_is, compose, pad

HELD_OUT = 10  # one in so many examples for validation, and as many for test


class Splits(NamedTuple):
    """Training, validation and test examples, each [N, …]."""

    train: Tensor
    validation: Tensor
    test: Tensor


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples as they lie in memory, and what turns a batch of them into what a model sees.

    Attributes:
        name: as given to `load`; of a path only its last part.
        kind: "image", "vector" or "text".
        splits: uint8 [N, C, H, W] of images, float32 [N, D] of vectors, int64 token ids [N, T] of text.
        source: where the examples came from. A local folder or file is named without its place on the machine.
        levels: pixels take the integer values 0 … levels once quantised; None for vectors and text.
        levels_in_memory: the same before that; None where nothing quantises them.
        labels: int64 [N] classes, or bool [N, A] attributes; None where the source has none.
        augment: random changes for training only, flips for example; from and to the dtype in memory.
        preprocess: for training and evaluation alike, after `augment`; from the dtype in memory to the model's.
        lengths: of text, int64 [N]: tokens of each example, `<bos>` and `<eos>` included, the rest being `<pad>`.
        vocabulary: of text, the token of each id.
        caution: what to say beside every figure measured on it; empty where there is nothing to say.
    """

    name: str
    kind: Literal["image", "vector", "text"]
    splits: Splits
    source: str
    levels: int | None = None
    labels: Splits | None = None
    augment: Transform = as_is
    preprocess: Transform = as_is
    lengths: Splits | None = None
    vocabulary: tuple[str, ...] | None = None
    caution: str = ""
    levels_in_memory: int | None = None

    @property
    def maximum(self) -> int | None:
        """The largest value that a pixel in memory may have; None for vectors and text."""
        return self.levels if self.levels_in_memory is None else self.levels_in_memory

    def transform(self, training: bool = True) -> Transform:
        """What a batch goes through on the device: augmentation where `training`, then preprocessing."""
        return compose(self.augment, self.preprocess) if training else self.preprocess

    def padded(self, size: int = 32) -> "Dataset":
        """The same with every image padded to `size` before `preprocess`, as NVAE has MNIST and Omniglot."""
        if self.kind != "image":
            raise ValueError(f"Dataset.padded: only images can be padded, got kind {self.kind!r}")
        return replace(self, preprocess=compose(partial(pad, size=size), self.preprocess))


def held_out(
    owner: str, num_examples: int, validation: bool = True, test: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of training, validation and test examples, ascending: a fixed random tenth for each of those asked for.

    Raises:
        ValueError: for fewer examples than parts.
    """
    if num_examples < 1 + validation + test:
        raise ValueError(f"{owner}: {num_examples} examples cannot be split into {1 + validation + test} parts")
    size = max(1, num_examples // HELD_OUT)
    order = torch.randperm(num_examples, generator=torch.Generator().manual_seed(0))
    sizes = [num_examples - size * (validation + test), size * validation, size * test]
    train, validation_part, test_part = (part.sort().values for part in order.split(sizes))
    return train, validation_part, test_part


def splitter(owner: str, sizes: dict[str, int]) -> Callable[[dict[str, Tensor]], Splits]:
    """What cuts tensors of these sizes, all alike, into three splits; one that is missing is held out of "train"."""
    missing = [name not in sizes for name in ("validation", "test")]
    if not any(missing):
        return lambda parts: Splits(**parts)
    indices = held_out(owner, sizes["train"], *missing)

    def cut(parts: dict[str, Tensor]) -> Splits:
        carved = (parts["train"][i] for i in indices)
        found = (parts.get(name) if name != "train" else None for name in Splits._fields)
        return Splits(*(c if f is None else f for c, f in zip(carved, found, strict=True)))

    return cut
