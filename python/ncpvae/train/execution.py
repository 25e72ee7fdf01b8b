"""How training is carried out: precision, accumulation, averaging, checkpoints, and accelerate set up for it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .._distributed import world_size

if TYPE_CHECKING:  # accelerate adds to the warnings' filters when it is imported, which is for training to do
    from accelerate import Accelerator, PartialState

MAX_HALVINGS = 1000  # 2⁻¹⁰⁰⁰ is a number still


@dataclass(frozen=True)
class Execution:
    """How training is carried out, whatever is trained.

    Args:
        mixed_precision: "no", "bf16" or "fp16"; None leaves it to `accelerate launch`, "no" without it.
        gradient_accumulation: parts that each process's share of a batch is worked through in, to save memory.
        max_grad_norm: gradients are scaled down to this norm; None leaves them.
        skip_grad_norm: a step of finite loss whose gradient has a larger norm, or none that is finite, leaves the
            weights as they are; one device synchronisation each step. The log has the norm, this one where it is
            larger, and the share of steps that were skipped. Not with fp16, whose loss scale skips by itself.
        ema_decay: keep an exponential moving average of the weights, and validate and end with that.
        compile: the loss by torch.compile with this backend: "inductor" is the usual one.
        checkpoint_every: steps between checkpoints; with each validation by default. Only runs with a folder have any.
        keep_checkpoints: how many of the latest stay.
        check_every: steps between looks at the losses, one device synchronisation each. NaN, and signals in runs of
            several processes, are noticed that much later at most.
        halve_lr: how often a run that diverges, of which NaN is the sign, goes back to its last checkpoint and on from
            there with half the learning rate, in place of an error: the same steps at the same rate would only
            diverge again. It is half of what the schedule says, in all steps from then on. A run that comes no further
            for it goes back to the checkpoint before, if that is kept. Only runs with a folder; with this they have a
            checkpoint of step 0 too.
        trackers: of accelerate: "tensorboard", "wandb", …; `metrics.jsonl` is always written.
    """

    mixed_precision: str | None = None
    gradient_accumulation: int = 1
    max_grad_norm: float | None = None
    skip_grad_norm: float | None = None
    ema_decay: float | None = None
    compile: str | None = None
    checkpoint_every: int | None = None
    keep_checkpoints: int = 3
    check_every: int = 50
    halve_lr: int = 0
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.mixed_precision not in (None, "no", "bf16", "fp16"):
            raise ValueError(f"mixed_precision must be 'no', 'bf16' or 'fp16', got {self.mixed_precision!r}")
        for name in ("gradient_accumulation", "keep_checkpoints", "check_every"):
            check_count(name, getattr(self, name))
        check_count("halve_lr", self.halve_lr, minimum=0, below=MAX_HALVINGS + 1)
        if self.checkpoint_every is not None:
            check_count("checkpoint_every", self.checkpoint_every)
        for name in ("max_grad_norm", "skip_grad_norm"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        trackers: object = self.trackers
        if isinstance(trackers, str):
            raise ValueError(f"trackers must be a tuple of names, got {trackers!r}")
        if self.ema_decay is not None:
            check_positive("ema_decay", self.ema_decay)
        if self.ema_decay is not None and not 0.0 < self.ema_decay < 1.0:
            raise ValueError(f"ema_decay must be between 0 and 1, got {self.ema_decay!r}")


def processes(cpu: bool = False) -> "PartialState":
    """The processes that `torchrun` or `accelerate launch` has started, this one alone without them.

    Args:
        cpu: they compute on the CPU although there is a GPU. Only the first call in a process decides.
    """
    from accelerate import PartialState

    if PartialState._shared_state:
        return PartialState()
    return PartialState(cpu=cpu or not torch.cuda.is_available())  # accelerate asks for several on the CPU to be said


@contextmanager
def own_accelerator(execution: Execution, folder: Path | None, cpu: bool) -> "Iterator[Accelerator]":
    """An Accelerator of our own. Accelerate keeps its settings in shared state, which is put back as it was."""
    from accelerate import Accelerator, DistributedType, PartialState
    from accelerate.state import AcceleratorState, GradientState

    state = processes(cpu)
    if cpu and state.device.type != "cpu" and execution.mixed_precision not in (None, "no"):
        raise ValueError(f"mixed_precision must be 'no' for a model on the CPU beside {state.device}, got "
                         f"{execution.mixed_precision!r}")  # fmt: skip
    if not cpu and state.device.type == "cpu" and execution.mixed_precision not in (None, "no"):
        raise ValueError("mixed_precision must be 'no': this process was set up for the CPU by an earlier training, "
                         f"got {execution.mixed_precision!r}; start a new one for the GPU")  # fmt: skip
    shared = [(cls, dict(cls._shared_state)) for cls in (AcceleratorState, GradientState)]
    allow_tf32 = torch.backends.cuda.matmul.allow_tf32  # accelerate switches it on for compiled models
    several = dict(PartialState._shared_state)
    for cls, _ in shared:
        cls._reset_state()
    accelerator = None
    try:
        if state.num_processes > world_size():  # within `_distributed.alone`
            one = {"num_processes": 1, "process_index": 0, "local_process_index": 0}
            PartialState._shared_state.update(one, distributed_type=DistributedType.NO)
        accelerator = Accelerator(
            cpu=state.device.type == "cpu",
            device_placement=False,  # the model is trained where it is
            mixed_precision=execution.mixed_precision,
            gradient_accumulation_steps=execution.gradient_accumulation,
            dynamo_backend=execution.compile,
            log_with=list(execution.trackers) or None,
            project_dir=None if folder is None else str(folder),
        )
        if execution.skip_grad_norm is not None and accelerator.scaler is not None:
            raise ValueError(f"skip_grad_norm must be None with fp16, got {execution.skip_grad_norm!r}")
        if execution.trackers:
            accelerator.init_trackers("ncpvae")
        if str(accelerator.distributed_type).endswith("FSDP"):  # sharded files have an index that is a pickle
            plugin = accelerator.state.fsdp_plugin
            plugin.state_dict_config = plugin.optim_state_dict_config = None
            plugin.set_state_dict_type("FULL_STATE_DICT")
        yield accelerator
    finally:
        for tracker in accelerator.trackers if accelerator is not None else ():
            tracker.finish()  # and not end_training, which ends the process group too
        torch.backends.cuda.matmul.allow_tf32 = allow_tf32
        PartialState._shared_state.update(several)
        for cls, before in shared:
            cls._reset_state()
            cls._shared_state.update(before)


def check_count(name: str, value: object, minimum: int = 1, below: float = math.inf) -> None:
    """`value` is an integer from `minimum` on, `below` a limit."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if not minimum <= value < below:
        limit = "" if below == math.inf else f" and < {below}"
        raise ValueError(f"{name} must be ≥ {minimum}{limit}, got {value}")


def check_positive(name: str, value: object) -> None:
    """`value` is a finite number > 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and > 0, got {value!r}")
