"""The training loop as something that survives: resume, kills, signals, divergence, precision, several options."""

import contextlib
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import threading
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ncpvae.train import CheckpointError, Execution, TrainingDiverged, TrainingInterrupted
from ncpvae.train.batches import minibatches, source
from ncpvae.train.checkpoint import checkpoints_in
from ncpvae.train.engine import train
from ncpvae.train.log import read_metrics

DATA = torch.randn(512, 8, generator=torch.Generator().manual_seed(1))
STEPS = 60


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(0.1), nn.Linear(32, 8))


def fit(model, folder=None, steps=STEPS, loss=None, **options):
    """A denoising autoencoder: noise, dropout and BatchNorm, so that randomness and buffers matter."""

    def denoise(index):
        x = DATA[index]
        noisy = x + 0.3 * torch.randn_like(x)
        return {"loss": (model(noisy) - x).square().mean(), "size": model(noisy).abs().mean()}

    def validate():
        return {"error": float((model(DATA[:64] + 0.1 * torch.randn(64, 8)) - DATA[:64]).square().mean())}

    options = {"validate": validate, "validate_every": 15, "lr": 3e-3, "seed": 5, "progress": False} | options
    return train(
        model, loss or denoise, lambda start: minibatches(512, 64, 5, start), steps=steps, folder=folder, **options
    )


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


FEATURES = Execution(ema_decay=0.9, max_grad_norm=1.0, gradient_accumulation=2, checkpoint_every=7, check_every=5)


@pytest.mark.parametrize("execution", [Execution(checkpoint_every=7), FEATURES], ids=["plain", "all features"])
@pytest.mark.parametrize("stop_at", [9, 30, 44])
def test_a_stopped_run_goes_on_exactly(execution, stop_at, tmp_path):
    whole = net()
    result = fit(whole, tmp_path / "whole", execution=execution)

    broken = net()
    count = iter(range(10**6))

    class Stop(Exception):
        pass

    def failing(index):
        if next(count) >= stop_at * execution.gradient_accumulation:
            raise Stop
        x = DATA[index]
        noisy = x + 0.3 * torch.randn_like(x)
        return {"loss": (broken(noisy) - x).square().mean(), "size": broken(noisy).abs().mean()}

    with pytest.raises(Stop):
        fit(broken, tmp_path / "broken", loss=failing, execution=execution)
    resumed = net(seed=1)  # its own weights must not matter
    again = fit(resumed, tmp_path / "broken", execution=execution, resume="auto")
    assert (again.steps, again.best_step) == (result.steps, result.best_step)
    assert again.history == result.history
    assert same(state(whole), state(resumed))
    logs = [untimed(tmp_path / name / "metrics.jsonl") for name in ("whole", "broken")]
    assert logs[0] == logs[1]


def untimed(path):
    return [{k: v for k, v in r.items() if k not in ("seconds", "samples_per_second")} for r in read_metrics(path)]


@pytest.mark.parametrize(
    "options",
    [{"execution": Execution(compile="eager", checkpoint_every=7)}, {"execution": Execution(mixed_precision="bf16")}],
    ids=["compiled", "bf16"],
)
def test_other_ways_of_execution_resume_too(options, tmp_path):
    model, again = net(), net(seed=1)
    fit(model, tmp_path, steps=16, **options)
    shutil.rmtree(newest(tmp_path))
    fit(again, tmp_path, steps=16, resume="auto", **options)
    assert same(state(model), state(again))


def loader_run(folder, resume="never", stop_at=None):
    """A shuffling DataLoader with noise of its own: its order and noise too are functions of seed and step."""
    model, seen = nn.Linear(8, 1), []
    nn.init.ones_(model.weight)
    nn.init.zeros_(model.bias)
    noisy = type("Noisy", (), {"__len__": lambda s: 64, "__getitem__": lambda s, i: DATA[i] + 0.1 * torch.randn(8)})()
    loader = torch.utils.data.DataLoader(noisy, batch_size=16, shuffle=True)
    batches, examples = source("test", "data", loader, 16, seed=5)

    def loss(batch):
        if stop_at is not None and len(seen) == stop_at:
            raise KeyboardInterrupt
        seen.append(examples(batch).sum().item())
        return {"loss": model(examples(batch)).square().mean()}

    torch.manual_seed(len(str(folder)))  # the caller's generator has no say
    with contextlib.suppress(KeyboardInterrupt):
        options = {"execution": Execution(checkpoint_every=3), "resume": resume, "progress": False}
        train(model, loss, batches, steps=14, lr=1e-2, seed=5, folder=folder, **options)
    return model.weight.detach().clone(), seen


def test_a_shuffling_loader_is_resumed_exactly(tmp_path):
    whole, batches = loader_run(tmp_path / "whole")
    loader_run(tmp_path / "broken", stop_at=8)
    resumed, rest = loader_run(tmp_path / "broken", resume="auto")
    assert rest == batches[6:] and torch.equal(whole, resumed)
    assert len(set(batches)) == 14, "every epoch has an order of its own"


def test_going_back_to_an_older_checkpoint_gives_up_the_later_ones(tmp_path):
    fit(net(), tmp_path)
    first = checkpoints_in(tmp_path / "checkpoints")[0]
    before = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()
    calls = iter(range(10**6))
    model = net()

    def loss(index):
        if next(calls) == 7:
            raise RuntimeError("stop")
        return {"loss": model(DATA[index]).square().mean()}

    with pytest.raises(RuntimeError, match="stop"):
        fit(model, tmp_path, loss=loss, resume=first, execution=Execution(checkpoint_every=5))
    assert [p.name for p in checkpoints_in(tmp_path / "checkpoints")] == [first.name, "step-00000035"]
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_a_finished_run_resumes_to_the_same_weights(tmp_path):
    first, second = net(), net(seed=1)
    fit(first, tmp_path)
    fit(second, tmp_path, resume="auto")
    assert same(state(first), state(second))


KILL_STEPS = 800


def killable(folder, started):
    """A run that tells when it is under way, and leaves its last weights in `final.pt`."""
    torch.set_num_threads(1)
    model = net()

    def denoise(index):
        started.set()
        x = DATA[index]
        return {"loss": (model(x + 0.3 * torch.randn_like(x)) - x).square().mean()}

    execution = Execution(ema_decay=0.9, checkpoint_every=10, check_every=5)
    fit(model, Path(folder), KILL_STEPS, denoise, execution=execution, resume="auto")
    torch.save(state(model), Path(folder) / "final.pt")


def test_a_run_killed_at_twenty_random_moments_ends_as_if_it_never_was(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "ncpvae"])
    chance, events = random.Random(0), []

    def start(folder, wait=True):
        folder.mkdir(exist_ok=True)
        started = context.Event()
        process = context.Process(target=killable, args=(str(folder), started))
        events.append(started)  # it must live as long as the process
        process.start()
        assert not wait or started.wait(60)
        return process

    def finish(folder):
        process = start(folder, wait=False)
        process.join(120)
        assert process.exitcode == 0
        return torch.load(folder / "final.pt", weights_only=True)

    expected = finish(tmp_path / "whole")
    killed, resumed, runs = 0, 0, [tmp_path / "0"]
    while killed < 20:
        resumed += bool(checkpoints_in(runs[-1] / "checkpoints"))
        process = start(runs[-1], wait=killed % 4 > 0)  # every fourth may die before its first step
        process.join(chance.uniform(0.0, 0.3))
        process.kill()
        process.join()
        if process.exitcode == 0:  # it was done first: another run takes its place
            runs.append(tmp_path / str(len(runs)))
            continue
        assert process.exitcode == -signal.SIGKILL
        killed += 1
    assert resumed >= 8
    for folder in runs:
        assert same(finish(folder), expected)
        assert not list((folder / "checkpoints").glob(".*")), "unfinished checkpoints are cleared away"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_where(number, tmp_path):
    model, whole = net(), net()
    fit(whole, tmp_path / "whole")
    before = signal.getsignal(number)
    threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
    with pytest.raises(
        TrainingInterrupted, match=rf"stopped by {number.name} after step \d+ of 100000; saved in .*step-"
    ):
        fit(model, tmp_path / "run", 100_000, schedule="constant")
    assert signal.getsignal(number) == before
    assert len(checkpoints_in(tmp_path / "run" / "checkpoints")) >= 1
    assert issubclass(TrainingInterrupted, KeyboardInterrupt)


def test_without_a_folder_signals_are_left_alone(tmp_path):
    handlers = []
    model = net()

    def loss(index):
        handlers.append(signal.getsignal(signal.SIGTERM))
        return {"loss": model(DATA[index]).square().mean()}

    before = signal.getsignal(signal.SIGTERM)
    fit(model, loss=loss, steps=2)
    fit(model, tmp_path, loss=loss, steps=2)
    assert handlers[0] == before != handlers[-1]


def test_divergence_names_step_term_and_last_good_checkpoint(tmp_path):
    model = net()
    calls = iter(range(1, 1000))

    def loss(index):
        good = model(DATA[index]).square().mean()
        return {"total": good, "penalty": good * (math.inf if next(calls) == 38 else 1.0)}

    with pytest.raises(TrainingDiverged, match=r"step 38: loss term 'penalty' is inf; the last good .*step-00000035"):
        fit(model, tmp_path, loss=loss, execution=Execution(checkpoint_every=7))
    kept = checkpoints_in(tmp_path / "checkpoints")
    assert kept[-1].name == "step-00000035" and len(kept) == 3


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    model = net()

    def loss(index):
        out = model(DATA[index]).square().mean()
        return {"total": out + (model[0].weight * 0).sum().sqrt()}  # finite itself, its gradient is not

    with pytest.raises(TrainingDiverged, match="weights are not finite|is nan"):
        fit(model, tmp_path, loss=loss, validate=None, execution=Execution(checkpoint_every=1))
    assert not checkpoints_in(tmp_path / "checkpoints")


def test_what_a_run_writes(tmp_path):
    seen = []
    result = fit(net(), tmp_path, execution=Execution(check_every=20, keep_checkpoints=2), hooks=[seen.append])
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records if r["split"] == "train"] == [20, 40, 60]
    assert [r["step"] for r in records if r["split"] == "validation"] == [15, 30, 45, 60]
    assert all(
        {"loss", "size", "lr", "samples_per_second", "seconds"} <= r.keys() for r in records if r["split"] == "train"
    )
    assert [p.name for p in checkpoints_in(tmp_path / "checkpoints")] == ["step-00000045", "step-00000060"]
    assert seen == result.history
    names = {p.suffix for p in tmp_path.rglob("*") if p.is_file()}
    assert names <= {".jsonl", ".json", ".safetensors", ".bin", ".pkl"}


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(net(), steps=5)
    assert not list(tmp_path.iterdir())


def test_the_global_generators_and_accelerates_settings_are_left_as_they_were(tmp_path):
    from accelerate import Accelerator

    theirs = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=3)
    before = torch.get_rng_state()
    fit(net(), tmp_path, steps=3)
    assert torch.equal(before, torch.get_rng_state())
    assert theirs.mixed_precision == "bf16" and theirs.gradient_accumulation_steps == 3
    theirs.state._reset_state(reset_partial_state=False)


def test_gradient_accumulation_is_the_whole_batch_for_a_loss_without_noise():
    ends = []
    for accumulation in (1, 4):
        model = nn.Linear(8, 8)
        nn.init.eye_(model.weight)
        nn.init.zeros_(model.bias)
        execution = Execution(gradient_accumulation=accumulation)
        loss = lambda i, model=model: {"loss": (model(DATA[i]) - 1).square().mean()}  # noqa: E731
        result = fit(model, loss=loss, validate=None, execution=execution)
        ends.append((model.weight.detach().clone(), result.history[-1]["loss"]))
    assert torch.allclose(ends[0][0], ends[1][0], atol=1e-5)
    assert ends[0][1] == pytest.approx(ends[1][1], abs=1e-5)


def test_averaged_weights_follow_the_raw_ones():
    raw, averaged = net(), net()
    fit(raw, validate=None, steps=20)
    fit(averaged, validate=None, steps=20, execution=Execution(ema_decay=0.95))
    start = net()
    distance = [(m[0].weight - start[0].weight).norm() for m in (raw, averaged)]
    assert 0 < distance[1] < 0.9 * distance[0]


def test_clipping_bounds_the_step_and_is_logged(tmp_path):
    model = nn.Linear(8, 8)
    before = model.weight.detach().clone()
    sgd = lambda p: torch.optim.SGD(p, lr=1.0)  # noqa: E731
    loss = lambda i: {"loss": 1e4 * model(DATA[i]).square().mean()}  # noqa: E731
    fit(model, tmp_path, loss=loss, validate=None, steps=1, optimizer=sgd, execution=Execution(max_grad_norm=0.5))
    assert (model.weight - before).norm() < 0.5 + 1e-4
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["grad_norm"] > 100


def test_steps_with_too_large_a_gradient_are_left_out(tmp_path):
    model, factors = nn.Linear(8, 8), iter([1.0, 1e4, None, 1.0])
    seen = []

    def loss(i):
        seen.append(model.weight.detach().clone())
        total, factor = model.weight.sum(), next(factors)
        zero = total - total.detach()
        return {"loss": zero.abs().sqrt() if factor is None else factor * zero}  # gradients of norm 8·factor; NaN

    sgd = lambda p: torch.optim.SGD(p, lr=1.0)  # noqa: E731
    execution = Execution(skip_grad_norm=100.0, check_every=1)
    fit(model, tmp_path, loss=loss, validate=None, steps=4, optimizer=sgd, execution=execution)
    seen.append(model.weight.detach())
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert moved == [True, False, False, True]
    records = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["split"] == "train"]
    assert [r["skipped"] for r in records] == [0.0, 1.0, 1.0, 0.0]
    assert [r["grad_norm"] for r in records] == pytest.approx([8.0, 100.0, 100.0, 8.0])


def test_bf16_runs_the_loss_under_autocast():
    model, seen = nn.Linear(8, 8), []

    def loss(index):
        out = model(DATA[index])
        seen.append(out.dtype)
        return {"loss": out.float().square().mean()}

    fit(model, loss=loss, validate=None, steps=2, execution=Execution(mixed_precision="bf16"))
    fit(model, loss=loss, validate=None, steps=2)
    assert seen == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    assert model.weight.dtype == torch.float32


def test_torch_compile_gives_the_same_training():
    ends = []
    for backend in (None, "eager"):
        model = nn.Linear(8, 8)
        nn.init.eye_(model.weight)
        nn.init.zeros_(model.bias)
        loss = lambda i, model=model: {"loss": (model(DATA[i]) - 1).square().mean()}  # noqa: E731
        fit(model, loss=loss, validate=None, steps=3, execution=Execution(compile=backend))
        ends.append(model.weight.detach().clone())
    assert torch.allclose(*ends, atol=1e-5)


def test_tensorboard_gets_what_the_log_gets(tmp_path):
    pytest.importorskip("tensorboard")
    fit(net(), tmp_path, execution=Execution(trackers=("tensorboard",)))
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_own_optimiser_and_schedule():
    model = nn.Linear(8, 8)
    seen = []

    def optimizer(parameters):
        seen.append(torch.optim.Adamax([{"params": parameters, "lr": 0.5}]))
        return seen[0]

    fit(model, loss=lambda i: {"loss": model(DATA[i]).square().mean()}, validate=None, steps=3, optimizer=optimizer,
        schedule=lambda step: 1 / (1 + step))  # fmt: skip
    assert seen[0].param_groups[0]["lr"] == pytest.approx(0.5 / 3)


def spoil(path, name, content=None, size=None):
    data = (path / name).read_bytes() if content is None else content
    (path / name).write_bytes(data if size is None else data[:size])


def record(path, **changes):
    content = json.loads((path / "trainer.json").read_text()) | changes
    (path / "trainer.json").write_text(json.dumps(content))


def change(path, **changes):
    content = json.loads((path / "trainer.json").read_text())
    record(path, state=content["state"] | changes)


def without(path, name):
    return {k: v for k, v in json.loads((path / "trainer.json").read_text())["files"].items() if k != name}


def tensor_only(path, name):
    torch.save(torch.zeros(3), path / name)
    record(path, files=without(path, name) | {name: (path / name).stat().st_size})


def other_best(path):
    save_file({"0.weight": torch.zeros(3)}, path / "best.safetensors")
    size = (path / "best.safetensors").stat().st_size
    record(path, files=without(path, "best.safetensors") | {"best.safetensors": size})


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch " + os.environ["NCPVAE_BOMB"],))


def bomb(path, name):
    torch.save({"state": Bomb(), "param_groups": []}, path / name)
    sizes = json.loads((path / "trainer.json").read_text())["files"]
    record(path, files=sizes | {name: (path / name).stat().st_size})


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda p: spoil(p, "model.safetensors", size=100), "model.safetensors.*must have .* bytes, got 100"),
        (lambda p: spoil(p, "optimizer.bin", size=50), "optimizer.bin.*must have"),
        (lambda p: spoil(p, "trainer.json", size=40), "trainer.json"),
        (lambda p: spoil(p, "trainer.json", b"\x80\x04K\x01."), "trainer.json"),
        (lambda p: (p / "optimizer.bin").unlink(), "optimizer.bin.*missing"),
        (lambda p: bomb(p, "optimizer.bin"), "cannot be read"),
        (lambda p: bomb(p, "model.safetensors"), "safetensors"),
        (lambda p: bomb(p, "best.safetensors"), "safetensors"),
        (lambda p: record(p, version=99), "version must be 1, got 99"),
        (lambda p: record(p, format="other"), "format must be"),
        (lambda p: record(p, step="ten"), "step must be an integer"),
        (lambda p: record(p, files={"../../etc/passwd": 10}), "not the name of a file beside it"),
        (lambda p: record(p, state={}), "settings must be an object"),
        (lambda p: record(p, state={"settings": {"seed": 5}}), "is of a run with steps = None"),
        (lambda p: record(p, step=1000), "step must be 15, as the folder is named, got 1000"),
        (lambda p: (p / "more").mkdir(), "must hold files alone, got the folder 'more'"),
        (lambda p: change(p, best_value="low"), "best_value must be a number, got str"),
        (lambda p: change(p, stale=None), "stale must be an integer"),
        (lambda p: change(p, history="abc"), "history must be a list of records"),
        (lambda p: change(p, history=[]), "history must hold the best step 15"),
        (lambda p: change(p, since_log={"sums": {"a": "b"}}), "running means must be numbers"),
        (lambda p: record(p, files=without(p, "best.safetensors")), "best.safetensors does not hold the weights"),
        (lambda p: other_best(p), "best.safetensors does not hold the weights"),
        (lambda p: tensor_only(p, "optimizer.bin"), "cannot be read"),
    ],
)
def test_a_bad_checkpoint_is_a_clear_error_and_runs_nothing(harm, message, tmp_path, monkeypatch):
    fit(net(), tmp_path, steps=15)
    monkeypatch.setenv("NCPVAE_BOMB", str(tmp_path / "exploded"))
    harm(checkpoints_in(tmp_path / "checkpoints")[-1])
    with pytest.raises(CheckpointError, match=message):
        fit(net(), tmp_path, steps=15, resume=newest(tmp_path))
    assert not (tmp_path / "exploded").exists()


def newest(folder):
    return sorted((folder / "checkpoints").glob("step-*"))[-1]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 6}, "seed = 5, this one has 6"),
        ({"lr": 1e-2}, "lr = 0.003, this one has 0.01"),
        ({"execution": Execution(gradient_accumulation=2)}, "shards = 1, this one has 2"),
        ({"settings": {"data": "b"}}, "data = None, this one has 'b'"),
        ({"execution": Execution(ema_decay=0.9)}, "ema_decay = None, this one has 0.9"),
        ({"execution": Execution(mixed_precision="bf16")}, "mixed_precision = 'no', this one has 'bf16'"),
        ({"optimizer": lambda p: torch.optim.SGD(p, 1e-3)}, "optimizer = 'Adam', this one has 'SGD'"),
        ({"patience": 3}, "patience = None, this one has 3"),
    ],
)
def test_other_settings_do_not_go_on_from_a_checkpoint(other, message, tmp_path):
    fit(net(), tmp_path, steps=15)
    with pytest.raises(CheckpointError, match=message):
        fit(net(), tmp_path, steps=15, resume="auto", **other)


def test_another_model_does_not_go_on_from_a_checkpoint(tmp_path):
    fit(net(), tmp_path, steps=15)
    model = nn.Linear(8, 8)
    with pytest.raises(CheckpointError, match="is not one of the model's|must have shape"):
        fit(model, tmp_path, steps=15, resume="auto", validate=None, loss=lambda i: {"loss": model(DATA[i]).mean()})


def test_a_folder_is_a_path_or_its_name_and_figures_are_numbers_or_tensors(tmp_path):
    fit(net(), str(tmp_path), steps=15, validate=lambda: {"figure": torch.tensor(2.0)})
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if row["split"] == "validation"]
    assert rows and all(row["figure"] == 2.0 for row in rows)


def test_a_model_without_parameters_is_named():
    with pytest.raises(ValueError, match="model must have parameters to train, got a ReLU without"):
        train(nn.ReLU(), dict, [], steps=1, lr=1e-3)


def test_a_run_is_not_overwritten_by_accident(tmp_path):
    fit(net(), tmp_path, steps=15)
    with pytest.raises(CheckpointError, match="resume it with 'auto', or take an empty folder"):
        fit(net(), tmp_path, steps=15)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"resume": "auto"}, ValueError, "resume needs the folder"),
        ({"execution": Execution(gradient_accumulation=3)}, ValueError, "multiple of 3 rows.*got 64"),
        ({"validate": dict}, ValueError, "validate must return named figures, got none"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        fit(net(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixed_precision": "int8"}, "mixed_precision must be"),
        ({"gradient_accumulation": 0}, "gradient_accumulation must be ≥ 1, got 0"),
        ({"ema_decay": 1.0}, "ema_decay must be between 0 and 1, got 1.0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be finite and > 0"),
        ({"checkpoint_every": 0}, "checkpoint_every must be ≥ 1"),
    ],
)
def test_execution_checks_itself(options, message):
    with pytest.raises(ValueError, match=message):
        Execution(**options)


def test_too_few_batches_are_an_error():
    model = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="batches must be at least 5, ended after 2"):
        train(model, lambda x: {"loss": model(x).mean()}, [DATA[:4], DATA[4:8]], steps=5, lr=1e-3, progress=False)


def test_a_log_cut_short_by_a_crash_is_read_up_to_there(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert [r["step"] for r in read_metrics(path)] == [1, 2]
    path.write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2: not JSON"):
        read_metrics(path)
    path.write_text('{"loss": 1}\n')
    with pytest.raises(ValueError, match="line 1: must be a JSON object with a step"):
        read_metrics(path)
