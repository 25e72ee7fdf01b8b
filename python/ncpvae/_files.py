"""Files that outlive a crash, and files that are not to be trusted.

Written: to a temporary name beside the target, flushed to the disk, renamed. So a reader sees the old content or the
new one, whatever happens; what a killed process leaves behind is hidden and named `.NAME.XXXXXXXX.tmp`.
Read: safetensors and JSON and nothing else, whose worst is an error that names the file.
"""

import ctypes
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

MAX_JSON_BYTES = 1 << 24
MAX_JSON_DEPTH = 100  # well below Python's own limit, so that what was read can be walked too


def read_json(path: Path, what: str) -> dict:
    """The JSON object in the file at `path`.

    Args:
        path: of the file, a link being followed.
        what: it is, for the message of an error: "checkpoint".

    Raises:
        OSError: where there is no such file or it cannot be read.
        ValueError: where it is no JSON object, larger than 16 MiB, or nested more than 100 deep.
    """
    return parse_json(_read(Path(path), what), f"{what} {path}")


def parse_json(content: bytes | str, source: str) -> dict:
    """`read_json` of what has been read already, `source` being its name in the message of an error."""
    try:
        value = json.loads(content)
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__} and not an object")
        check_depth(value)
    except RecursionError as error:
        raise ValueError(f"{source} is no usable JSON: it is nested too deeply") from error
    except ValueError as error:  # also what a wrong encoding raises
        raise ValueError(f"{source} is no usable JSON: {error}") from error
    return value


def _read(path: Path, what: str) -> bytes:
    _check_file(path, what)
    with path.open("rb") as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"{what} {path} is larger than {MAX_JSON_BYTES} bytes")
    return content


def _check_file(path: Path, what: str) -> None:
    """A regular file, since opening a pipe would wait for ever."""
    if path.is_file():
        return
    if os.path.lexists(path):
        raise OSError(errno.EINVAL, f"{what} is not a regular file", str(path))
    raise FileNotFoundError(errno.ENOENT, f"{what} not found", str(path))


def check_depth(value: object, depth: int = MAX_JSON_DEPTH) -> None:
    """Raise a ValueError where lists and dicts are nested more than `depth` deep."""
    level: list = [value]
    for _ in range(depth + 1):
        inner = [part for v in level for part in (v.values() if isinstance(v, dict) else v)]
        level = [part for part in inner if isinstance(part, (dict, list, tuple))]
        if not level:
            return
    raise ValueError(f"it is nested more than {depth} deep")


def load_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of the safetensors file at `path`, on the CPU, in memory of their own. No pickle is ever read.

    Raises:
        OSError: where there is no such file or it cannot be read.
        ValueError: where it is not a complete safetensors file.
    """
    with open_weights(path) as file:
        try:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except RuntimeError as error:  # of torch, for a shape beyond its limits
            raise ValueError(f"weights {path} hold a tensor that torch cannot: {error}") from error


@contextmanager
def open_weights(path: Path) -> Iterator:
    """The open safetensors file at `path`, its header checked; errors as `load_weights` has them."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    _check_file(path, "weights")
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"weights {path} is no complete safetensors file, the only kind read here: {error}") from error


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write the file at `path`, text as UTF-8, such that it holds the old content or the new one at any moment.

    Folders above it are made. A link at `path` is replaced, not followed.

    Raises:
        OSError: where it cannot be written; `path` is then as it was.
    """
    path = Path(path)
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """`write_atomic` for what is written by somebody else: yields the name of an empty file to write to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors replaces the file by one that its owner alone can read
        _flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file at `path`, mostly the temporary one of `atomic_file`.

    Raises:
        OSError: where it cannot be written, as on a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{str(path)!r} cannot be written: {error}") from error


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Write a folder that is at `path` as a whole or not at all.

    Yields a new, empty folder beside `path`. When the block ends its files are flushed to the disk and it takes the
    name `path`; whatever folder was there, its other files included, is deleted. When the block raises, the new
    folder is deleted and `path` stays as it was.

    Raises:
        OSError: where it cannot be written, or `path` is there and no folder.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                _flush(Path(folder, name))
            _flush(Path(folder))
        _move_folder(temporary, path)
    finally:  # here it is what was left half-written, or the folder that was replaced
        shutil.rmtree(temporary, ignore_errors=True)
    _flush(path.parent)


def _temporary(path: Path) -> Path:
    name = os.fsencode(path.name)[:100].decode(errors="ignore")  # file systems count bytes
    return path.with_name(f".{name}.{secrets.token_hex(4)}.tmp")


def _flush(path: Path) -> None:
    """fsync of a file or a folder; systems without folders that can be opened have no need of the latter."""
    if path.is_symlink() or (os.name == "nt" and path.is_dir()):
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_folder(new: Path, path: Path) -> None:
    """Give `new` the name `path`; a folder that was there has the name `new` afterwards."""
    if not path.exists():
        os.rename(new, path)
    elif not _exchange(new, path):  # two steps where the system has no exchange: the one moment without a `path`
        aside = _temporary(path)
        os.rename(path, aside)
        try:
            os.rename(new, path)
        except BaseException:
            os.rename(aside, path)
            raise
        os.rename(aside, new)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names at once, by Linux's renameat2 with RENAME_EXCHANGE; False where that is not to be had."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    with suppress(AttributeError, OSError, TypeError):
        return ctypes.CDLL(None).renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0
    return False
