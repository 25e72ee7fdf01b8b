"""Text of one's own: one example per line, tokens between white space."""

import os
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from .dataset import Dataset, Splits, splitter

PAD, UNK, BOS, EOS = range(4)
SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")
MAX_ELEMENTS = 1 << 31  # of a padded split

Lines = list[list[str]]


def text_lines(path: str | os.PathLike, max_vocabulary: int = 20_000, max_length: int | None = None) -> Dataset:
    """A folder with `train.txt`, `validation.txt` and `test.txt`, or one file: an example per line that is not blank.

    An example is `<bos>`, its tokens and `<eos>`, filled up with `<pad>`. The vocabulary is that of the training split:
    after the four special tokens the most frequent ones, those of equal frequency in alphabetical order; all others
    are `<unk>`, as is that token in the text itself. A split that is missing is a fixed random tenth of the training
    lines, before the vocabulary is made.

    Args:
        path: a folder or a file, UTF-8.
        max_vocabulary: tokens with an id, the special ones included.
        max_length: tokens kept of a line; all by default.

    Raises:
        OSError: for a file that cannot be read.
        ValueError: for a file without text, bytes that are no UTF-8 (with the line), the other special tokens in the
            text, and lines so long that the padded tensor would not fit.
    """
    for name, value, least in (("max_vocabulary", max_vocabulary, 5), ("max_length", max_length, 1)):
        if value is not None and value < least:
            raise ValueError(f"text_lines: {name} must be ≥ {least}, got {value}")
    files = _files(Path(path))
    read = {split: _read(file) for split, file in files.items()}
    cut = splitter(f"text_lines: {str(path)!r}", {split: len(lines) for split, lines in read.items()})
    rows = cut({split: torch.arange(len(lines)) for split, lines in read.items()})
    parts = [
        [read.get(split, read["train"])[i][:max_length] for i in part.tolist()]
        for split, part in zip(Splits._fields, rows, strict=True)
    ]
    vocabulary = _vocabulary(parts[0], max_vocabulary)
    ids = {token: i for i, token in enumerate(vocabulary)}
    tensors = [_pad(f"text_lines: {str(path)!r}", lines, ids) for lines in parts]
    splits, lengths = (Splits(*x) for x in zip(*tensors, strict=True))
    name = f"text:{Path(path).resolve().name}"
    return Dataset(name, "text", splits, name, lengths=lengths, vocabulary=vocabulary)


def _files(path: Path) -> dict[str, Path]:
    if path.is_file():
        return {"train": path}
    found = {split: path / f"{split}.txt" for split in Splits._fields if (path / f"{split}.txt").is_file()}
    if "train" not in found:
        raise OSError(f"text_lines: {str(path)!r} is neither a file nor a folder with train.txt")
    return found


def _read(file: Path) -> Lines:
    """The tokens of every line that has any."""
    lines = []
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                tokens = [sys.intern(token) for token in line.decode().split()]
            except UnicodeDecodeError as error:
                raise ValueError(f"text_lines: {str(file)!r}, line {number} is not UTF-8: {error}") from error
            for token in (SPECIAL[PAD], SPECIAL[BOS], SPECIAL[EOS]):
                if token in tokens:
                    raise ValueError(f"text_lines: {str(file)!r}, line {number} holds the reserved token {token!r}")
            if tokens:
                lines.append(tokens)
    if not lines:
        raise ValueError(f"text_lines: {str(file)!r} holds no text")
    return lines


def _vocabulary(lines: Lines, size: int) -> tuple[str, ...]:
    counts = Counter(token for line in lines for token in line)
    counts.pop(SPECIAL[UNK], None)
    ranked = sorted(counts, key=lambda token: (-counts[token], token))
    return (*SPECIAL, *ranked[: size - len(SPECIAL)])


def _pad(where: str, lines: Lines, ids: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Ids int64 [N, T] and lengths int64 [N]."""
    lengths = torch.tensor([len(line) + 2 for line in lines])
    longest = int(lengths.max())
    if len(lines) * longest > MAX_ELEMENTS:
        raise ValueError(f"{where}: {len(lines)} lines padded to {longest} tokens are too much; give max_length")
    tokens = torch.full((len(lines), longest), PAD)
    for row, line in zip(tokens.numpy(), lines, strict=True):
        row[: len(line) + 2] = [BOS, *(ids.get(token, UNK) for token in line), EOS]
    return tokens, lengths
