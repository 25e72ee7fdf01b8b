"""Other people's code to compare with, where it is installed: torch.compile, KeOps, torchebm."""

import contextlib
import importlib
import io
import logging
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import torch

from .case import Absent

VERSIONED = ("pykeops", "torchebm", "numpy", "triton")


def versions() -> dict[str, str]:
    """Of the peers that are installed."""
    found = {}
    for name in VERSIONED:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def imported(name: str) -> ModuleType:
    """A peer's module; `Absent` where it is not installed or cannot be imported."""
    package = name.partition(".")[0]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # KeOps tells on import what it did not find
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        own = (error.name or "").partition(".")[0] == package
        missing = f"{package} is not installed" if own else f"{package} needs {error.name}"
        raise Absent(f"{missing}: pip install 'ncpvae[bench]'") from error
    except Exception as error:  # whatever a peer's import raises, the others can be timed
        raise Absent(f"{package} cannot be imported: {_first_line(error)}") from error


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under torch.compile. Compilation happens at the first call, which is not timed."""
    torch._dynamo.reset()  # at its limit of recompilations torch.compile would go on in eager mode, and not say so
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    return torch.compile(function, dynamic=False)


def keops() -> ModuleType:
    """`pykeops.torch`, on as many threads as torch; it compiles at the first call, which is not timed."""
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # its own OpenMP runtime reads it when it is loaded
    os.environ.setdefault("PYKEOPS_VERBOSE", "0")
    return imported("pykeops.torch")


def reason(error: Exception) -> str:
    """Why a contender does not take part, in one line."""
    return str(error) if isinstance(error, Absent) else f"failed: {type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
