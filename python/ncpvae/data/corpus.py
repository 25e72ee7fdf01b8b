"""Text: one example per line, tokens between white space; and the vocabulary that makes ids of them and back."""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .._files import read_json, write_atomic
from .._tokens import BOS, EOS, PAD, SPECIAL, UNK
from .dataset import Dataset, Splits, splitter
from .hub import check_folder

MAX_ELEMENTS = 1 << 31  # of a padded split

Lines = list[list[str]]
VOCABULARY = "vocabulary"  # in the file of one


@dataclass(frozen=True)
class Corpus:
    """A text that papers report on, as it lies in a data folder.

    Attributes:
        caution: what to say beside every figure.
        train_lines: with so many lines of training text it is what papers mean, and needs no caution.
        unknown: the token that stands for a rare word in it already.
    """

    caution: str
    train_lines: int | None = None
    unknown: str = SPECIAL[UNK]


#: name, which is also that of its folder → what is known of it
CORPORA = {
    "war_and_peace": Corpus(
        "lines of a book cut at white space alone: figures cannot be compared with those of tokenised text"
    ),
    "yahoo": Corpus(
        "made of the published validation and test files, the 100,000 lines of training text being absent: figures "
        "cannot be compared with published ones",
        train_lines=100_000,
        unknown="_UNK",
    ),
}


def load_corpus(
    name: str,
    folder: str | os.PathLike | None = None,
    max_vocabulary: int = 20_000,
    max_length: int | None = None,
) -> Dataset:
    """The text `name` of `CORPORA`.

    Args:
        folder: holds it in a folder of that name; `NCPVAE_DATA` by default.
        max_vocabulary, max_length: see `text_lines`, whose errors these are too.

    Raises:
        OSError: where it is not there.
    """
    known, path = CORPORA[name], check_folder(name, folder)
    if path is None:
        raise OSError(f"data set '{name}' is not on the hub: give a data folder that holds {name!r}")
    dataset = text_lines(path, max_vocabulary, max_length, known.unknown)
    cautions = [] if len(dataset.splits.train) == known.train_lines else [known.caution]
    cautions += [dataset.caution] if dataset.caution else []
    return replace(dataset, name=name, source=f"folder {name}", caution="; ".join(cautions))


def text_lines(
    path: str | os.PathLike,
    max_vocabulary: int = 20_000,
    max_length: int | None = None,
    unknown: str = SPECIAL[UNK],
) -> Dataset:
    """A folder with `train.txt`, `validation.txt` and `test.txt`, or one file: an example per line that is not blank.

    An example is `<bos>`, its tokens and `<eos>`, filled up with `<pad>`. The vocabulary is that of the training split:
    after the four special tokens the most frequent ones, those of equal frequency in alphabetical order; all others
    are `<unk>`, as is that token in the text itself. A split that is missing is a fixed random tenth of the training
    lines, before the vocabulary is made. Where lines are cut to `max_length`, the data set's caution says how many.

    Args:
        path: a folder or a file, UTF-8.
        max_vocabulary: tokens with an id, the special ones included.
        max_length: tokens kept of a line, the rest being cut off; all by default.
        unknown: a token that stands for an unknown word in the text, which becomes `<unk>`.

    Raises:
        OSError: for a file that cannot be read.
        ValueError: for a file without text, bytes that are no UTF-8 (with the line), the other special tokens in the
            text, and lines so long that the padded tensor would not fit.
    """
    for name, value, least in (("max_vocabulary", max_vocabulary, 5), ("max_length", max_length, 1)):
        if value is not None and value < least:
            raise ValueError(f"text_lines: {name} must be ≥ {least}, got {value}")
    files = _files(Path(path))
    read = {split: _read(file, unknown) for split, file in files.items()}
    cut = splitter(f"text_lines: {str(path)!r}", {split: len(lines) for split, lines in read.items()})
    rows = cut({split: torch.arange(len(lines)) for split, lines in read.items()})
    parts = [
        [read.get(split, read["train"])[i] for i in part.tolist()]
        for split, part in zip(Splits._fields, rows, strict=True)
    ]
    caution = _cut_lines(parts, max_length)
    parts = [[line[:max_length] for line in lines] for lines in parts]
    vocabulary = _vocabulary(parts[0], max_vocabulary)
    ids = {token: i for i, token in enumerate(vocabulary)}
    tensors = [_pad(f"text_lines: {str(path)!r}", lines, ids) for lines in parts]
    splits, lengths = (Splits(*x) for x in zip(*tensors, strict=True))
    name = f"text:{Path(path).resolve().name}"
    return Dataset(name, "text", splits, name, lengths=lengths, vocabulary=vocabulary, caution=caution)


def from_text(
    lines: Iterable[str], vocabulary: Sequence[str], max_length: int | None = None, truncate: bool = False
) -> Tensor:
    """Lines → token ids, int64 [N, T], as `text_lines` has them; words outside the vocabulary are `<unk>`.

    Args:
        lines: each an example, tokens between white space; a blank one is `<bos> <eos>`.
        vocabulary: the token of each id, the special ones first.
        max_length: the most words of a line.
        truncate: cut longer lines off there.

    Raises:
        TypeError: for lines that are one string.
        ValueError: for no lines, a line that is longer, and one that holds `<pad>`, `<bos>` or `<eos>`.
    """
    if isinstance(lines, str):
        raise TypeError("from_text: lines must be several strings, got one")
    if max_length is not None and max_length < 1:
        raise ValueError(f"from_text: max_length must be ≥ 1, got {max_length}")
    ids = {token: i for i, token in enumerate(checked_vocabulary("from_text", vocabulary))}
    tokens = [line.split() for line in lines]
    if not tokens:
        raise ValueError("from_text: lines must hold at least one line, got none")
    for number, line in enumerate(tokens, 1):
        _check_reserved(f"from_text: line {number}", line)
        if max_length is not None and len(line) > max_length and not truncate:
            raise ValueError(
                f"from_text: line {number} has {len(line)} words, more than max_length, {max_length}; "
                "truncate=True cuts it off there"
            )
    return _pad("from_text", [line[:max_length] for line in tokens], ids)[0]


def to_text(ids: Tensor, vocabulary: Sequence[str]) -> list[str]:
    """Token ids [..., T] → a line for each row, without `<pad>`, `<bos>` and what begins with `<eos>`.

    Raises:
        TypeError, ValueError: for what is not integers [..., T], and an id that is not of the vocabulary.
    """
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"to_text: ids must be a tensor of integers [..., T], got {got}")
    if ids.dim() < 1:
        raise ValueError("to_text: ids must be [..., T], got a single number")
    outside = ids[(ids < 0) | (ids >= len(vocabulary))]
    if len(outside):
        raise ValueError(f"to_text: ids must be in 0 … {len(vocabulary) - 1}, the vocabulary, got {int(outside[0])}")
    lines = []
    for row in ids.reshape(-1, ids.shape[-1]).tolist():
        end = row.index(EOS) if EOS in row else len(row)
        lines.append(" ".join(vocabulary[i] for i in row[:end] if i not in (PAD, BOS)))
    return lines


def save_vocabulary(path: str | os.PathLike, vocabulary: Sequence[str]) -> None:
    """Write the vocabulary as JSON, whole or not at all; ValueError for what `load_vocabulary` would not read."""
    content = {VOCABULARY: checked_vocabulary("save_vocabulary", vocabulary)}
    write_atomic(Path(path), json.dumps(content, ensure_ascii=False, indent=0) + "\n")


def load_vocabulary(path: str | os.PathLike) -> tuple[str, ...]:
    """The vocabulary that `save_vocabulary` wrote.

    Raises:
        OSError: for a file that cannot be read.
        ValueError: for one that holds no vocabulary.
    """
    found = read_json(Path(path), VOCABULARY).get(VOCABULARY)
    return checked_vocabulary(f"load_vocabulary: {str(path)!r}", found)


def checked_vocabulary(where: str, vocabulary: object) -> tuple[str, ...]:
    """The vocabulary, if it is one: the special tokens, then others, no two alike and none with white space."""
    if not isinstance(vocabulary, (list, tuple)) or tuple(vocabulary[: len(SPECIAL)]) != SPECIAL:
        raise ValueError(f"{where}: vocabulary must be a list that begins with {', '.join(SPECIAL)}")
    seen: set[str] = set()
    for i, token in enumerate(vocabulary):
        if not isinstance(token, str) or token.split() != [token] or token in seen:
            raise ValueError(
                f"{where}: vocabulary must hold distinct words without white space, got {str(token)[:100]!r} as id {i}"
            )
        seen.add(token)
    return tuple(vocabulary)


def _cut_lines(parts: list[Lines], max_length: int | None) -> str:
    """What to say of the lines that are cut off; nothing where there are none."""
    if max_length is None:
        return ""
    counts = [sum(len(line) > max_length for line in lines) for lines in parts]
    if not any(counts):
        return ""
    splits = zip(Splits._fields, counts, parts, strict=True)
    shares = ", ".join(f"{count / len(lines):.1%} of {split}" for split, count, lines in splits)
    return f"lines cut off after {max_length} words: {shares}"


def _files(path: Path) -> dict[str, Path]:
    if path.is_file():
        return {"train": path}
    found = {split: path / f"{split}.txt" for split in Splits._fields if (path / f"{split}.txt").is_file()}
    if "train" not in found:
        raise OSError(f"text_lines: {str(path)!r} is neither a file nor a folder with train.txt")
    return found


def _read(file: Path, unknown: str) -> Lines:
    """The tokens of every line that has any."""
    lines = []
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")  # files of Windows begin with a mark
                tokens = [sys.intern(token) for token in text.split()]
                tokens = [SPECIAL[UNK] if token == unknown else token for token in tokens]
            except UnicodeDecodeError as error:
                raise ValueError(f"text_lines: {str(file)!r}, line {number} is not UTF-8: {error}") from error
            _check_reserved(f"text_lines: {str(file)!r}, line {number}", tokens)
            if tokens:
                lines.append(tokens)
    if not lines:
        raise ValueError(f"text_lines: {str(file)!r} holds no text")
    return lines


def _check_reserved(where: str, tokens: list[str]) -> None:
    for token in (SPECIAL[PAD], SPECIAL[BOS], SPECIAL[EOS]):
        if token in tokens:
            raise ValueError(f"{where} holds the reserved token {token!r}")


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
