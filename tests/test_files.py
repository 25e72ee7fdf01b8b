"""Files are written at once or not at all, and what is read cannot do more harm than an error."""

import json
import os
import pickle
import signal
import stat
import struct

import pytest
import torch
from safetensors.torch import save

from ncpvae import _files
from ncpvae._files import atomic_folder, load_weights, read_json, save_tensors, write_atomic


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_write_atomic_writes_text_and_bytes_and_makes_folders(tmp_path):
    write_atomic(tmp_path / "a" / "b" / "text", "σ")
    write_atomic(tmp_path / "bytes", b"\x00\xff")
    assert (tmp_path / "a/b/text").read_bytes() == "σ".encode()
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff"
    assert names(tmp_path) == ["a", "bytes"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_atomic(tmp_path / "x", "old")

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old" and names(tmp_path) == ["x"]


def test_a_name_as_long_as_a_file_system_takes_is_written(tmp_path):
    path = tmp_path / ("界" * 84 + ".j")  # 254 bytes
    write_atomic(path, "text")
    assert path.read_text() == "text" and len([*tmp_path.iterdir()]) == 1


def test_tensors_that_cannot_be_written_are_an_os_error(tmp_path):
    with pytest.raises(OSError, match="missing.x.safetensors' cannot be written"):
        save_tensors({"x": torch.zeros(2)}, tmp_path / "missing" / "x.safetensors")


def test_write_atomic_replaces_a_link_and_not_what_it_points_to(tmp_path):
    (tmp_path / "target").write_text("elsewhere")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_atomic(tmp_path / "link", "new")
    assert (tmp_path / "target").read_text() == "elsewhere" and not (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("exchange", [True, False], ids=["exchanged", "in two steps"])
def test_atomic_folder_replaces_a_folder_as_a_whole(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(_files, "_exchange", lambda a, b: False)
    for content in ("first", "second"):
        with atomic_folder(tmp_path / "up" / "run") as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / content).write_text(content)
    assert names(tmp_path / "up") == ["run"] and names(tmp_path / "up/run/sub") == ["second"]


def test_a_folder_is_on_the_disk_before_it_has_its_name_and_its_name_before_it_is_done(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(_files, "_flush", lambda path: flushed.append((path.name, (tmp_path / "run").exists())))
    with atomic_folder(tmp_path / "run") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").touch()
    assert flushed[-1] == (tmp_path.name, True)
    assert sorted(flushed[:-1]) == sorted([(folder.name, False), ("sub", False), ("file", False)])


def test_atomic_folder_that_fails_leaves_the_old_one(tmp_path):
    with atomic_folder(tmp_path / "run") as folder:
        (folder / "a").write_text("old")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), atomic_folder(tmp_path / "run") as folder:
            (folder / "b").write_text("new")
            raise error
    assert names(tmp_path) == ["run"] and names(tmp_path / "run") == ["a"]


def test_atomic_folder_where_the_second_step_fails_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a").write_text("old")
    rename, calls = os.rename, []

    def second_fails(a, b):
        calls.append(a)
        if len(calls) == 2:
            raise OSError("no")
        rename(a, b)

    monkeypatch.setattr(_files, "_exchange", lambda a, b: False)
    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="no"), atomic_folder(tmp_path / "run"):
        pass
    assert names(tmp_path) == ["run"] and names(tmp_path / "run") == ["a"]


def test_atomic_folder_follows_a_link_and_refuses_a_file(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_folder(tmp_path / "link") as folder:
        (folder / "a").touch()
    assert names(tmp_path / "real") == ["a"] and (tmp_path / "link").is_symlink()
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file"), atomic_folder(tmp_path / "file"):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_killed_at_any_moment_leaves_the_old_folder_or_the_new_one(tmp_path):
    target, seen, moment = tmp_path / "run", [], 0
    while True:
        with atomic_folder(target) as folder:
            (folder / "old").touch()
        if not killed_at(moment, lambda: replace(target)):
            break
        seen.append(names(target))
        moment += 1
    assert names(target) == ["new"]
    assert {tuple(s) for s in seen} == {("old",), ("new",)}
    assert all(name == "run" or name.startswith(".run.") for name in names(tmp_path))


def replace(target):
    with atomic_folder(target) as folder:
        (folder / "new").touch()


def killed_at(moment: int, action) -> bool:
    """Do it in a process that is killed before or after the system call of that number; whether it came to that."""
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    count = 0

    def passed():
        nonlocal count
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    def stopping(call):
        def wrapped(*args, **kwargs):
            passed()
            result = call(*args, **kwargs)
            passed()
            return result

        return wrapped

    try:
        for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
            setattr(os, name, stopping(getattr(os, name)))
        _files._exchange = stopping(_files._exchange)
        action()
    finally:
        os._exit(0)


def test_read_json_gives_what_was_written(tmp_path):
    write_atomic(tmp_path / "x", json.dumps({"a": [1, {"b": None}], "σ": 0.5}))
    assert read_json(tmp_path / "x", "config") == {"a": [1, {"b": None}], "σ": 0.5}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"[1]", "holds a list"),
        (b"null", "holds a NoneType"),
        (b'{"a": "\xff"}', "decode"),
        (b"\x80\x04\x95", "decode"),
        (b'{"a":' + b"[" * 200_000, "nested"),
        (b'{"a":' + b"[" * 101 + b"]" * 101 + b"}", "nested"),
        (b" " * (_files.MAX_JSON_BYTES + 1), "larger than"),
    ],
    ids=["empty", "cut off", "a list", "null", "no UTF-8", "a pickle", "very deep", "deep", "large"],
)
def test_what_is_no_usable_json_is_named(content, message, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_json(tmp_path / "x.json", "the recipe")
    assert str(caught.value).startswith(f"the recipe {tmp_path / 'x.json'}")


def test_json_nested_as_deeply_as_is_allowed_is_read(tmp_path):
    (tmp_path / "x").write_bytes(b'{"a":' + b"[" * 99 + b"]" * 99 + b"}")
    assert read_json(tmp_path / "x", "config")


@pytest.mark.parametrize("read", [lambda p: read_json(p, "config"), load_weights])
def test_what_is_not_a_file_is_named(read, tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        read(tmp_path / "missing")
    with pytest.raises(OSError, match="not a regular file"):
        read(tmp_path)
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(OSError, match="dangling"):
        read(tmp_path / "dangling")
    if hasattr(os, "mkfifo"):  # reading it would wait for ever
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(OSError, match="not a regular file"):
            read(tmp_path / "pipe")


def test_load_weights_gives_the_tensors_in_memory_of_their_own(tmp_path):
    given = {"a": torch.randn(2, 3), "b": torch.tensor(1, dtype=torch.int64), "c": torch.randn(4).bfloat16()}
    write_atomic(tmp_path / "w", save(given))
    read = load_weights(tmp_path / "w")
    (tmp_path / "w").write_bytes(b"")  # a file that is mapped into memory would be gone now
    for name, tensor in given.items():
        assert torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype
    assert len({tensor.untyped_storage().data_ptr() for tensor in read.values()}) == 3


class Payload:
    def __reduce__(self):
        return os.mkdir, ("pickle-was-loaded",)


def safetensors(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def entry(shape, stop, dtype="F32"):
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, stop]}}


WEIGHTS = save({"a": torch.ones(3)})
DAMAGED = {
    "empty": b"",
    "a pickle": pickle.dumps(Payload()),
    "cut off": WEIGHTS[:-1],
    "cut off in the header": WEIGHTS[:20],
    "too long": WEIGHTS + b"x",
    "no JSON": safetensors(b"nonsense"),
    "deep": safetensors(b'{"a":' + b"[" * 100_000),
    "a huge header": struct.pack("<Q", 1 << 62) + b"{}",
    "a negative shape": safetensors(entry([-1], 4), b"1234"),
    "a huge shape": safetensors(entry([10**12], 4 * 10**12), b"1234"),
    "a shape that overflows": safetensors(entry([2**62, 2**62], 4), b"1234"),
    "an empty shape that overflows": safetensors(entry([0, 10**18, 10**18], 0)),
    "an unknown dtype": safetensors(entry([1], 4, "F1000"), b"1234"),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_weights_that_are_no_complete_safetensors_are_named_and_never_unpickled(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors"):
        load_weights(tmp_path / "model.safetensors")
    assert names(tmp_path) == ["model.safetensors"]


def test_a_torch_checkpoint_is_never_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Payload()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors"):
        load_weights(tmp_path / "model.safetensors")
    assert names(tmp_path) == ["model.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_files_have_the_permissions_of_any_other_file(tmp_path):
    (tmp_path / "any").touch()
    (tmp_path / "folder").mkdir()
    write_atomic(tmp_path / "x", "x")
    with atomic_folder(tmp_path / "y"):
        pass
    assert mode(tmp_path / "x") == mode(tmp_path / "any") and mode(tmp_path / "y") == mode(tmp_path / "folder")


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)
