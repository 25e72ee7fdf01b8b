"""The C++ compiler, for tests that build something: objects and links are kept in build/tests and made once."""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
BUILT = ROOT / "build" / "tests"
TORCH = Path(torch.__file__).parent
#: as CMakeLists.txt has them
KERNEL_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
ADDRESS_SANITIZER = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-g1",
]


def find() -> str | None:
    """The C++ compiler that CMake would take, or None."""
    names = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


@cache
def _identity() -> str:
    """What decides what a command makes of the same sources."""
    version = subprocess.run([str(find()), "--version"], capture_output=True, text=True, check=True).stdout
    return f"{find()} {version} torch {torch.__version__}"


def make(
    name: str, inputs: Iterable[bytes], arguments: Sequence[object], program: str | None = None, keep_log: bool = False
) -> Path:
    """Run a compiler with `arguments` and `-o <the result>`, unless it has done so with these `inputs` before.

    `program` is the C++ compiler unless given; `keep_log` keeps what it says, beside the result, in a file `….log`.
    """
    digest = hashlib.sha256(_identity().encode())
    for part in inputs:
        digest.update(hashlib.sha256(part).digest())
    stem, _, ending = name.rpartition(".")
    result = BUILT / f"{stem}-{digest.hexdigest()[:16]}.{ending}"
    if not result.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        partial = result.with_name(f"{os.getpid()}-{result.name}")  # another run may be making the same
        command = [program or str(find()), *map(str, arguments), "-o", str(partial)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{run.stderr}")
        if keep_log:
            result.with_suffix(".log").write_text(run.stderr)
        partial.rename(result)
    return result


def compile_object(source: Path, flags: Sequence[str], includes: Sequence[Path]) -> Path:
    """An object file from a C++ source, a .cu file included. A change of any header in `includes` makes it anew."""
    headers = sorted(path for folder in includes for path in folder.rglob("*.h"))
    inputs = [" ".join(flags).encode(), *(path.read_bytes() for path in (source, *headers))]
    folders = [f"-I{folder}" for folder in includes] + ["-isystem", str(TORCH / "include")]
    return make(f"{source.stem}.o", inputs, [*flags, *folders, "-x", "c++", "-c", source])


def link_kernels(name: str, objects: Sequence[Path], flags: Sequence[str] = ()) -> Path:
    """A library of kernels, which registers itself with torch when it is loaded. Flags may name linker scripts."""
    scripts = [Path(flag.rpartition(",")[2]).read_bytes() for flag in flags if flag.endswith(".ld")]
    libraries = [f"-L{TORCH}/lib", "-ltorch", "-ltorch_cpu", f"-Wl,-rpath,{TORCH}/lib"]
    return make(f"{name}.so", [*_names(flags, objects), *scripts], ["-shared", *flags, *objects, *libraries])


def link_program(name: str, objects: Sequence[Path], flags: Sequence[str] = ()) -> Path:
    return make(f"{name}.exe", _names(flags, objects), [*flags, *objects])


def _names(flags: Sequence[str], objects: Sequence[Path]) -> list[bytes]:
    """What a link depends on: the name of an object says what is in it."""
    return [part.encode() for part in [*flags, *(path.name for path in objects)]]


def in_parallel(function, items: Iterable) -> list:
    """`[function(item) for item in items]`, as many at once as there are processors for this process."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(function, items))


def sanitized_environment() -> dict[str, str]:
    """What a process needs that loads a library built with ADDRESS_SANITIZER although Python was built without."""
    located = subprocess.run(
        [str(find()), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    standard = subprocess.run(
        [str(find()), "-print-file-name=libstdc++.so.6"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return {
        "LD_PRELOAD": f"{located} {standard}",
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",  # Python and torch leave much behind at their end
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
