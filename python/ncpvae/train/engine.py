"""The one training loop: a loss function and its batches; everything else is here once.

A loss function maps a batch to named terms, tensors without dimensions; the first is what is minimised. Devices,
mixed precision, several processes and the resume state are accelerate's.

*Randomness belongs to the position, not to the process.* A step's batch is cut into shards, one for each process and
accumulation step, and every shard draws from generators seeded by (seed, step, shard). So a run that is killed and
resumed goes on exactly, and two processes do what one process with twice the gradient accumulation does.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from .. import _random
from .._distributed import check_alike, ranks
from . import checkpoint
from .batches import FETCH, VALIDATION, advanced, num_rows, shard_of
from .divergence import TrainingDiverged, check_finite, check_way_back, limited_gradients, way_back, what_is_left
from .execution import Execution, check_count, check_positive, own_accelerator
from .interrupt import StopRequest, TrainingInterrupted, catch_signals
from .log import RECOVERY, Means, MetricsLog
from .state import check_best, new_state, read_state

Batches = Iterable[Any] | Callable[[int], Iterable[Any]]
Schedule = str | Callable[[int], float]


@dataclass(frozen=True)
class TrainResult:
    """What a training run did.

    Attributes:
        steps: optimiser steps taken.
        seconds: wall-clock time, that before a resume included.
        history: one dict per evaluation: `step`, the training terms averaged since the last one, and the
            held-out terms as `validation_<name>`.
        best_step: the step whose weights the model now has.
        stopped_early: whether patience ran out before the steps did.
    """

    steps: int
    seconds: float
    history: list[dict[str, float]] = field(repr=False)
    best_step: int
    stopped_early: bool


def learning_rate_factor(schedule: Schedule, steps: int) -> Callable[[int], float]:
    """Multiplier of the learning rate at each step: "constant", or "cosine" to zero (Loshchilov, Hutter, 2017)."""
    if callable(schedule):
        return schedule
    if schedule == "constant":
        return lambda step: 1.0
    if schedule == "cosine":
        return lambda step: 0.5 * (1.0 + math.cos(math.pi * min(step, steps) / steps))
    raise ValueError(f"schedule must be 'constant' or 'cosine', got {schedule!r}")


def train(
    model: nn.Module,
    loss: Callable[[Any], dict[str, Tensor]],
    batches: Batches,
    *,
    steps: int,
    lr: float,
    schedule: Schedule = "cosine",
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    validate: Callable[[], dict[str, float]] | None = None,
    validate_every: int | None = None,
    patience: int | None = None,
    seed: int = 0,
    execution: Execution | None = None,
    folder: Path | None = None,
    resume: str | Path = "never",
    settings: dict[str, Any] | None = None,
    hooks: Sequence[Callable[[dict[str, float]], None]] = (),
    progress: bool = True,
    description: str = "training",
) -> TrainResult:
    """Minimise the loss over the model's parameters that require gradients, where the model is.

    Started by `torchrun` or `accelerate launch`, every process calls this with the same arguments; each works on its
    share of every batch, and gradients, logged terms and decisions are those of the whole.

    Args:
        model: trained in place; in train mode during steps, eval mode during `validate` and afterwards.
        loss: batch → named 0-dimensional terms, means over the batch, the first one minimised. It is called with
            shards of a batch; its randomness comes from torch's global generators.
        batches: at least `steps` of them: tensors, or tuples, lists and dicts of tensors, whose rows are shared out
            among processes. A function from the step to start at spares a resumed run the ones before.
        steps: optimiser steps.
        lr, schedule: of Adam, or of the optimiser that follows; the schedule is "cosine", "constant", or a function
            from the step, counted from 0, to a factor.
        optimizer: parameters → optimiser; Adam by default. The learning rates it sets are those the schedule scales.
        validate: called without gradients, with the same seed every time; its first value is compared, lower being
            better, and the weights with the lowest are the ones the model ends with.
        validate_every: steps between validations; 20 validations over the run by default.
        patience: stop after this many validations without improvement.
        seed: governs all randomness of the loss; torch's global generators are left as they were.
        execution: precision, accumulation, averaging, checkpoints.
        folder: of the run, for `metrics.jsonl` and `checkpoints/`; nothing is written without it.
        resume: "never" refuses a folder that has checkpoints; "auto" goes on from the newest where there is one; a
            path goes on from that one.
        settings: JSON-able; a checkpoint with other settings is refused.
        hooks: functions called with the record of every validation, in the main process; again where steps are made
            again.
        progress: show a progress bar.
        description: its label.

    Raises:
        TrainingDiverged: naming step and term, when one is NaN or infinite, and no halving of the rate is left.
        TrainingInterrupted: after SIGINT or SIGTERM, once the state is saved; runs without a folder have the usual
            KeyboardInterrupt.
        CheckpointError: where a checkpoint cannot be gone on from.

    Warns:
        RuntimeWarning: where the run goes back to a checkpoint with half the learning rate (`Execution.halve_lr`).
    """
    execution, folder = execution or Execution(), None if folder is None else Path(folder)
    check_count("steps", steps)
    for name, optional in (("validate_every", validate_every), ("patience", patience)):
        if optional is not None:
            check_count(name, optional)
    check_positive("lr", lr)
    check_count("seed", seed, minimum=0, below=1 << 62)
    if folder is None and resume != "never":
        raise ValueError(f"resume needs the folder of the run, got {str(resume)!r} without one")
    check_way_back(execution, folder, batches)
    factor = learning_rate_factor(schedule, steps)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(f"model must have parameters to train, got a {type(model).__name__} without")
    adam = torch.optim.Adam(parameters, lr=lr, fused=True) if optimizer is None else optimizer(parameters)
    known: dict[str, Any] = {"seed": seed, "steps": steps, "lr": lr}
    known |= {"validate_every": validate_every, "patience": patience}
    known |= {"ema_decay": execution.ema_decay, "max_grad_norm": execution.max_grad_norm}
    known |= {} if execution.skip_grad_norm is None else {"skip_grad_norm": execution.skip_grad_norm}
    known |= {"optimizer": type(adam).__name__, **(settings or {})}
    known |= {} if callable(schedule) else {"schedule": schedule}
    cpu = all(p.device.type == "cpu" for p in parameters)
    with _random.scoped(seed), own_accelerator(execution, folder, cpu) as accelerator:
        known["mixed_precision"] = accelerator.mixed_precision
        loop = _Loop(model, loss, adam, factor, accelerator, execution, folder, steps, seed, known)
        loop.validate, loop.patience = validate, patience
        loop.validate_every = validate_every or max(1, steps // 20)
        loop.hooks, loop.progress, loop.description = hooks, progress, description
        try:
            loop.resume(resume)
            loop.run(batches)
            loop.agree_on_buffers()
        finally:  # also after a failure the model is left usable, with the best weights there were
            loop.leave_best_weights()
    s = loop.state
    best_step = s["best_step"] if loop.best_weights is not None else s["step"]
    return TrainResult(s["step"], s["seconds"], s["history"], best_step, s["step"] < steps)


class _LossModule(nn.Module):
    """The loss as a module that holds the model: what DDP, FSDP, autocast and torch.compile wrap."""

    def __init__(self, model: nn.Module, loss: Callable[[Any], dict[str, Tensor]]):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> dict[str, Any]:
        return batch.function() if isinstance(batch, _Call) else self.loss(batch)


class _Call(NamedTuple):
    """Something else to compute within the wrapper's forward, where FSDP has the weights at hand."""

    function: Callable[[], dict[str, float]]


class _Loop:
    """A training run: its moving parts, and `state`, all that a checkpoint keeps of it beside weights."""

    validate: Callable[[], dict[str, float]] | None
    patience: int | None
    validate_every: int
    hooks: Sequence[Callable[[dict[str, float]], None]]
    progress: bool
    description: str

    def __init__(self, model, loss, optimizer, factor, accelerator, execution, folder, steps, seed, settings):
        self.model, self.factor, self.accelerator, self.execution = model, factor, accelerator, execution
        self.folder, self.steps, self.seed, self.settings = folder, steps, seed, settings
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        self.sharded = str(accelerator.distributed_type).endswith("FSDP")
        self.module, self.optimizer = accelerator.prepare(_LossModule(model, loss), optimizer)
        self.ema: AveragedModel | None = None
        if execution.ema_decay is not None:
            if self.sharded:
                raise ValueError("ema_decay must be None under FSDP, whose sharded weights are not averaged")
            self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(execution.ema_decay))
        self.state = new_state()
        self.best_weights: dict[str, Tensor] | None = None
        self.since_validation, self.since_log = Means(), Means()
        self.last_checkpoint: Path | None = None
        self.rows, self.looked_at = 0, time.perf_counter()

    @property
    def shards(self) -> int:
        return self.accelerator.num_processes * self.execution.gradient_accumulation

    # --- the way to the first step ---------------------------------------------------------------------------------

    def resume(self, resume: str | Path) -> None:
        """Load the state that `resume` asks for, and open the log at its step."""
        if self.folder is not None:
            found = ranks().gather(checkpoint.checkpoints_in(self.folder / "checkpoints"))[0]  # the first one's view
            if resume == "never" and found:
                raise checkpoint.CheckpointError(
                    f"{self.folder} has checkpoints of an earlier run: resume it with 'auto', or take an empty folder"
                )
            path = found[-1] if found else None
            if resume not in ("never", "auto"):
                path = Path(resume)
            if path is not None:
                self._load(path)
            check_alike("resume", ranks().gather({"step": self.state["step"]}))
        self._open_log()
        if self.execution.halve_lr and self.last_checkpoint is None:
            self._save()  # the untrained weights too are something to go back to

    def _open_log(self) -> None:
        folder = self.folder if self.accelerator.is_main_process else None
        self.log = MetricsLog(folder, self.state["step"], self.state["recoveries"])

    def _load(self, path: Path) -> None:
        expected = self.settings | {"shards": self.shards}
        step, state, tensors = checkpoint.load(path, self.accelerator, self.module, self.optimizer, expected)
        try:
            self.since_validation, self.since_log = Means(**state["since_validation"]), Means(**state["since_log"])
            self.state = read_state(state, step, self.steps)
            if self.ema is not None:
                self.ema.load_state_dict(tensors["ema"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise checkpoint.CheckpointError(
                f"checkpoint {path} does not hold what this run needs ({type(error).__name__}): {reason}"
            ) from error
        check_best(path, self.state, tensors.get("best"), self.model)
        self.best_weights, self.last_checkpoint = tensors.get("best"), path  # only now: a run that fails ends with them

    # --- steps -----------------------------------------------------------------------------------------------------

    def run(self, batches: Batches) -> None:
        """All steps that are left; where they diverge, again from a checkpoint on, as often as `halve_lr` says."""
        with catch_signals(self.folder is not None) as stop:  # one that came before a return is heeded after it
            while True:
                try:
                    return self._run_on(batches, stop)
                except TrainingDiverged as error:
                    halvings = len(self.state["recoveries"])
                    if halvings >= self.execution.halve_lr:
                        error.args = (f"{error}{what_is_left(self.last_checkpoint, halvings)}",)
                        raise
                    self._halve_rate(str(error))

    def _halve_rate(self, reason: str) -> None:
        """Go back to a checkpoint, and make it one of a run that goes on from there with half the learning rate."""
        assert self.folder is not None and self.last_checkpoint is not None
        noticed, seconds, recoveries = (self.state[key] for key in ("step", "seconds", "recoveries"))
        found = ranks().gather(checkpoint.checkpoints_in(self.folder / "checkpoints"))[0]
        self.optimizer.optimizer.zero_grad()  # a loss that raises by itself leaves those of half a step
        self._load(way_back(self.last_checkpoint, found, recoveries, noticed))
        step, halvings = self.state["step"], len(recoveries) + 1
        check_alike("halve_lr", ranks().gather({"step": step}))
        lr = self.base_lrs[0] * float(self.factor(step)) * 0.5**halvings
        record = {"step": step, "split": RECOVERY, "halvings": halvings, "lr": lr, "noticed_at": noticed}
        self.state |= {"seconds": seconds, "recoveries": [*recoveries, record | {"reason": reason}]}
        self._save()
        self._open_log()  # only now: whenever the run is killed, its log can be made that of its last checkpoint
        warnings.warn(
            f"{self.description} goes back from step {noticed} to {self.last_checkpoint}, and on with "
            f"1/{2**halvings} of the scheduled learning rate, {lr:.4g} in the next step: {reason}",
            RuntimeWarning,
            stacklevel=4,
        )

    def _run_on(self, batches: Batches, stop: StopRequest) -> None:
        begun, start = time.perf_counter() - self.state["seconds"], self.state["step"]
        if start == self.steps or self._out_of_patience():
            return
        stream = batches(start) if callable(batches) else advanced(batches, start)
        hidden = not (self.progress and self.accelerator.is_main_process)
        pending: list[dict[str, Tensor]] = []
        self.model.train()
        self.looked_at = time.perf_counter()
        with tqdm(total=self.steps, initial=start, desc=self.description, disable=hidden, leave=False) as bar:
            for step, batch in self._fetched_batches(stream):
                pending.append(self._step(step, batch))
                self.state["step"], self.state["seconds"] = step, time.perf_counter() - begun
                validating = step % self.validate_every == 0 or step == self.steps
                saving = self.folder is not None and (step % self._checkpoint_every == 0 or step == self.steps)
                regular = step % self.execution.check_every == 0 or validating or saving
                stopping = self._stopping(stop, regular)
                if regular or stopping:
                    self._look_at(pending, bar)
                if validating:
                    self._validate()
                    self.state["seconds"] = time.perf_counter() - begun
                done = self._out_of_patience()
                if saving or stopping or (done and self.folder is not None):
                    self._save()
                if stopping:
                    raise TrainingInterrupted(
                        f"{self.description} stopped by {stop.signal_name or 'a signal'} after step {step} of "
                        f"{self.steps}; saved in {self.last_checkpoint}"
                    )
                if done:
                    return
        if self.state["step"] < self.steps:
            raise ValueError(f"batches must be at least {self.steps}, ended after {self.state['step']}")

    def _fetched_batches(self, stream: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """The steps to come and their batches; what is random in an iterable draws from (seed, step) too."""
        batches = iter(stream)
        for step in range(self.state["step"] + 1, self.steps + 1):
            _random.reseed(_random.derived_seed(self.seed, step, FETCH))
            try:
                batch = next(batches)
            except StopIteration:
                return
            yield step, batch

    def _step(self, step: int, batch: Any) -> dict[str, Tensor]:
        """One optimiser step over this process's shards; the loss terms, averaged over them."""
        scale = self.factor(step - 1) * 0.5 ** len(self.state["recoveries"])
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * scale
        self.rows = num_rows(batch)
        accumulation = self.execution.gradient_accumulation
        total: dict[str, Tensor] = {}
        for i in range(accumulation):
            shard = i * self.accelerator.num_processes + self.accelerator.process_index
            _random.reseed(_random.derived_seed(self.seed, step, shard))
            with self.accelerator.accumulate(self.module) if accumulation > 1 else nullcontext():
                terms = self.module(shard_of(batch, shard, self.shards))
                self.accelerator.backward(next(iter(terms.values())))
                norms = limited_gradients(self.accelerator, self.module, self.execution)
                # terms are averaged below, but there is one norm
                terms = {**terms, **{name: norm * accumulation for name, norm in norms.items()}}
                if self.accelerator.scaler is not None:
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                elif i == accumulation - 1:  # accelerate's wrapper looks for packages at every step
                    if not norms.get("skipped", False):
                        self.optimizer.optimizer.step()
                    self.optimizer.optimizer.zero_grad()
            for name, term in terms.items():
                share = term.detach() / accumulation if accumulation > 1 else term.detach()
                total[name] = total[name] + share if name in total else share
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        return total

    def _stopping(self, stop: StopRequest, regular: bool) -> bool:
        """Whether a signal asks to stop after this step; processes agree on that at regular looks only."""
        if self.accelerator.num_processes == 1:
            return bool(stop)
        if not regular:
            return False
        wish = torch.tensor([float(bool(stop))], device=self.accelerator.device)
        return bool(self.accelerator.reduce(wish, "sum") > 0)

    def _look_at(self, pending: list[dict[str, Tensor]], bar: tqdm) -> None:
        """Fetch the pending terms in one transfer, check, average, log and show them."""
        for row in self._as_numbers(pending):
            self.since_validation.add(row)
            self.since_log.add(row)
        bar.update(len(pending))
        now = time.perf_counter()
        rate, self.looked_at = len(pending) * self.rows / (now - self.looked_at), now
        bar.set_postfix({k: f"{v:.4g}" for k, v in row.items()} | {"samples/s": f"{rate:.0f}"}, refresh=False)
        pending.clear()
        step = self.state["step"]
        if step % self._log_every == 0 or step == self.steps:
            lr = self.optimizer.param_groups[0]["lr"]
            record = {"step": step, "split": "train", **self.since_log.take(), "lr": lr}
            self._write(record | {"samples_per_second": rate, "seconds": self.state["seconds"]})

    def _as_numbers(self, pending: list[dict[str, Tensor]]) -> list[dict[str, float]]:
        """The pending terms as numbers, means over all processes; raises at the first that is not finite."""
        names = list(pending[0])
        values = torch.stack([terms[name].float() for terms in pending for name in names]).view(-1, len(names))
        table = self.accelerator.reduce(values, "mean").tolist()
        rows = [dict(zip(names, values, strict=True)) for values in table]
        for step, row in enumerate(rows, self.state["step"] - len(rows) + 1):
            check_finite(step, row, scaled=self.accelerator.scaler is not None)
        return rows

    # --- now and then ----------------------------------------------------------------------------------------------

    def _validate(self) -> None:
        step = self.state["step"]
        record: dict[str, float] = {"step": step, **self.since_validation.take()}
        if self.validate is not None:
            self.agree_on_buffers()
            self.model.eval()
            with torch.no_grad(), self._averaged_weights():
                _random.reseed(_random.derived_seed(self.seed, VALIDATION))
                values = self.module(_Call(self.validate)) if self.sharded else self.validate()
                values = {name: float(value) for name, value in values.items()}
                held_out = ranks().gather(values)[0]  # decisions are the first process's
                if not held_out:
                    raise ValueError("validate must return named figures, got none")
                value = next(iter(held_out.values()))
                if not math.isfinite(value):
                    raise TrainingDiverged(
                        f"{self.description}: validation {next(iter(held_out))} is {value} at step {step}"
                    )
                self.state["stale"] += 1
                if self.state["best_value"] is None or value < self.state["best_value"]:
                    self.state |= {"stale": 0, "best_value": value, "best_step": step}
                    self.best_weights = checkpoint.weights_of(self.model)
            self.model.train()
            self._write({"step": step, "split": "validation", **held_out})
            record |= {f"validation_{name}": value for name, value in held_out.items()}
        self.state["history"].append(record)
        if self.accelerator.is_main_process:
            for hook in self.hooks:
                hook(record)

    def _out_of_patience(self) -> bool:
        return self.patience is not None and self.state["stale"] >= self.patience

    def agree_on_buffers(self) -> None:
        """BatchNorm's running statistics differ between processes, which see their own shards: take the first's."""
        if self.accelerator.num_processes > 1:
            for module in [self.model] if self.ema is None else [self.model, self.ema.module]:
                for buffer in module.buffers():
                    torch.distributed.broadcast(buffer, src=0)

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """Within the block the model has the averaged weights, where there are any."""
        if self.ema is None:
            yield
            return
        raw = checkpoint.weights_of(self.model)
        self.model.load_state_dict(self.ema.module.state_dict())
        try:
            yield
        finally:
            self.model.load_state_dict(raw)

    @property
    def _checkpoint_every(self) -> int:
        return self.execution.checkpoint_every or self.validate_every

    @property
    def _log_every(self) -> int:
        """About 2,000 records a run, in multiples of `check_every`; a short run has one a look."""
        return self.execution.check_every * max(1, self.steps // (2000 * self.execution.check_every))

    def _save(self) -> None:
        assert self.folder is not None
        if not all(ranks().gather(checkpoint.finite(self.model))):  # sharded weights differ between processes
            raise TrainingDiverged(f"training stopped at step {self.state['step']}: weights are not finite")
        self.log.sync()
        state = self.state | {"since_validation": self.since_validation.state(), "since_log": self.since_log.state()}
        tensors = {} if self.best_weights is None else {"best": self.best_weights}
        tensors |= {} if self.ema is None else {"ema": self.ema.state_dict()}
        self.last_checkpoint = checkpoint.save(
            self.folder / "checkpoints",
            self.accelerator,
            self.state["step"],
            state | {"settings": self.settings | {"shards": self.shards}},
            tensors,
            self.execution.keep_checkpoints,
        )

    def _write(self, record: dict[str, Any]) -> None:
        self.log.write(record)
        if self.accelerator.trackers:
            values = {f"{record['split']}/{k}": v for k, v in record.items() if k not in ("step", "split")}
            self.accelerator.log(values, step=record["step"])

    def leave_best_weights(self) -> None:
        """End with the best weights, or the averaged ones without validation; in eval mode."""
        if self.best_weights is not None:
            checkpoint.set_weights(self.model, self.best_weights)
        elif self.ema is not None and self.state["step"]:
            self.model.load_state_dict(self.ema.module.state_dict())
        self.model.eval()
