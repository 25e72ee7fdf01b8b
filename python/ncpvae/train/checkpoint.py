"""Checkpoints of a run: everything needed to go on as if it had never stopped.

`checkpoints/step-00000500/` holds accelerate's own state (weights, optimiser, gradient scaler), the best and the
averaged weights as safetensors, and `trainer.json`. It is written under a temporary name and renamed when complete.
"""

import json
import math
import pickle
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor, nn

from .._distributed import ranks
from .._files import atomic_folder, load_weights, read_json, save_tensors, write_atomic

if TYPE_CHECKING:
    from accelerate import Accelerator

FORMAT, VERSION = "ncpvae-checkpoint", 1
STATE_FILE = "trainer.json"
NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(ValueError):
    """A checkpoint cannot be resumed from; the message names the file and what is wrong with it."""


def checkpoints_in(folder: Path) -> list[Path]:
    """The complete checkpoints below `folder`, oldest first."""
    found = (p for p in folder.glob("step-*") if NAME.fullmatch(p.name) and (p / STATE_FILE).is_file())
    return sorted(found, key=number_of)


def number_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def save(
    folder: Path,
    accelerator: "Accelerator",
    step: int,
    state: dict[str, Any],
    tensors: dict[str, dict[str, Tensor]],
    keep: int,
) -> Path:
    """Write `folder/step-…` atomically and drop all but the last `keep`; all processes call it together.

    Args:
        state: JSON-able; what `load` returns.
        tensors: name → state dict, each written to `<name>.safetensors`.
    """
    path = folder / f"step-{step:08d}"
    main = accelerator.is_main_process
    with atomic_folder(path) if main else nullcontext() as temporary:
        writing = Path(ranks().gather(str(temporary))[0])
        accelerator.save_state(str(writing))
        if main:
            for name, state_dict in tensors.items():
                copies = {k: v.contiguous().clone() for k, v in state_dict.items()}
                save_tensors(copies, writing / f"{name}.safetensors")
        accelerator.wait_for_everyone()
        if main:
            sizes = {p.name: p.stat().st_size for p in sorted(writing.iterdir()) if p.is_file()}
            record = {"format": FORMAT, "version": VERSION, "step": step, "files": sizes, "state": state}
            write_atomic(writing / STATE_FILE, json.dumps(record) + "\n")
    if main:
        kept = [p for p in checkpoints_in(folder) if number_of(p) <= step]  # later ones are of a future given up
        for old in checkpoints_in(folder):
            if old not in kept[-keep:]:
                old.rename(folder / f".{old.name}.tmp")  # a kill while it is deleted leaves no half of a checkpoint
        for old in folder.glob(".step-*.tmp"):  # also what a process that was killed had begun to write
            shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()
    return path


def load(
    path: Path,
    accelerator: "Accelerator",
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    expected: dict[str, Any],
) -> tuple[int, dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Bring module and optimiser to where they were at `path`; the step, the state and the tensors that were saved.

    Args:
        expected: settings of the run that goes on, which must be those in the state's "settings".

    Raises:
        CheckpointError: for damaged or foreign files, other settings, or shapes that do not fit. Nothing in a file is
            ever executed: weights are safetensors, the rest is unpickled with `weights_only=True`, and folders, as
            torch's distributed checkpoints are, whose index is an unrestricted pickle, are refused.
    """
    try:
        record = read_json(path / STATE_FILE, "checkpoint")
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from error
    step, state = _checked(path, record, expected)
    names = [name for name in record["files"] if name.endswith(".safetensors") and not name.startswith("model")]
    try:
        tensors = {name.removesuffix(".safetensors"): load_weights(path / name) for name in names}
        if (path / "model.safetensors").is_file():  # absent where accelerate shards the weights (FSDP)
            _check_shapes(path / "model.safetensors", load_weights(path / "model.safetensors"), module)
        with _own_generators():
            accelerator.load_state(str(path))
    except CheckpointError:
        raise
    except (OSError, LookupError, ArithmeticError, AttributeError, EOFError, ImportError, RuntimeError, TypeError,
            ValueError, pickle.UnpicklingError) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"checkpoint {path} cannot be read ({type(error).__name__}): {reason}") from error
    for parameter, slots in optimizer.state.items():
        for name, slot in slots.items():
            if isinstance(slot, Tensor) and slot.dim() and slot.shape != parameter.shape:
                raise CheckpointError(
                    f"checkpoint {path}: the optimiser's {name} must have shape {tuple(parameter.shape)}, "
                    f"got {tuple(slot.shape)}"
                )
    return step, state, tensors


def _checked(path: Path, record: dict[str, Any], expected: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Step and state of a record whose format, files and settings are as they should be."""
    file = path / STATE_FILE
    if record.get("format") != FORMAT:
        raise CheckpointError(f"{file}: format must be {FORMAT!r}, got {record.get('format')!r}")
    if record.get("version") != VERSION:
        raise CheckpointError(
            f"{file}: version must be {VERSION}, got {record.get('version')!r}; it was written by another ncpvae"
        )
    step, state, files = (record.get(key) for key in ("step", "state", "files"))
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise CheckpointError(f"{file}: step must be an integer ≥ 0, got {step!r}")
    if NAME.fullmatch(path.name) and step != number_of(path):
        raise CheckpointError(f"{file}: step must be {number_of(path)}, as the folder is named, got {step}")
    if not isinstance(state, dict) or not isinstance(files, dict):
        raise CheckpointError(f"{file}: state and files must be objects")
    folders = sorted(p.name for p in path.iterdir() if p.is_dir())
    if folders:
        raise CheckpointError(f"checkpoint {path} must hold files alone, got the folder {folders[0]!r}")
    for name, size in files.items():
        if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
            raise CheckpointError(f"{file}: {name!r} is not the name of a file beside it")
        if (path / name).is_symlink() or not (path / name).is_file():
            raise CheckpointError(f"checkpoint {path}: file {name!r} is missing, or not a plain file")
        if (path / name).stat().st_size != size:
            raise CheckpointError(
                f"checkpoint {path}: file {name!r} must have {size} bytes, got {(path / name).stat().st_size}"
            )
    settings = state.get("settings")
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file}: settings must be an object, got {type(settings).__name__}")
    for key, value in expected.items():
        if settings.get(key) != value:
            raise CheckpointError(
                f"checkpoint {path} is of a run with {key} = {settings.get(key)!r}, this one has {value!r}"
            )
    return step, state


def _check_shapes(file: Path, weights: dict[str, Tensor], module: nn.Module) -> None:
    own = {
        name.removeprefix("module.").replace("_orig_mod.", ""): tensor.shape  # as DDP and torch.compile name them
        for name, tensor in module.state_dict().items()
    }
    for name, tensor in weights.items():
        if name not in own:
            raise CheckpointError(f"{file}: weight {name!r} is not one of the model's")
        if tensor.shape != own[name]:
            raise CheckpointError(f"{file}: {name!r} must have shape {tuple(own[name])}, got {tuple(tensor.shape)}")


@contextmanager
def _own_generators() -> Iterator[None]:
    """Python's and numpy's global generators, which accelerate sets to those of the file, stay the caller's."""
    of_python, of_numpy = random.getstate(), numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(of_python)
        numpy.random.set_state(of_numpy)


def finite(module: nn.Module) -> bool:
    """Whether all parameters are finite: a checkpoint of others would be of no use."""
    norms = [whole(p.detach().abs().max()) for p in module.parameters() if p.numel() and p.is_floating_point()]
    return not norms or math.isfinite(float(torch.stack([n.float() for n in norms]).max()))


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, gathered where it is sharded over processes (FSDP), all of which must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the module's whole state, from all processes where it is sharded."""
    return {name: whole(tensor.detach()).clone() for name, tensor in module.state_dict().items()}


def set_weights(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load what `weights_of` returned, into a module that may be sharded."""
    if any(hasattr(p, "full_tensor") for p in module.parameters()):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        set_model_state_dict(module, dict(weights), options=StateDictOptions(full_state_dict=True))
    else:
        module.load_state_dict(weights)


def described(setting: Any) -> Any:
    """A setting as checkpoints compare it: a number as it is, a dataclass by its fields, a function as a function."""
    if is_dataclass(setting) and not isinstance(setting, type):
        return {"class": type(setting).__name__, **asdict(setting)}
    return "a function" if callable(setting) else setting
