"""Ways back from divergence: the last checkpoint again with half the learning rate, `Execution.halve_lr`."""

import math
import os
import signal
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import run_processes
from torch import nn

from ncpvae.runs.reporting import curves
from ncpvae.train import CheckpointError, Execution, TrainingDiverged, TrainingInterrupted, checkpoint, engine
from ncpvae.train.batches import minibatches
from ncpvae.train.checkpoint import checkpoints_in
from ncpvae.train.divergence import way_back
from ncpvae.train.engine import train
from ncpvae.train.log import read_metrics

DATA = torch.randn(256, 8, generator=torch.Generator().manual_seed(1))
LR = 4e-3
ONCE = Execution(checkpoint_every=7, check_every=5, halve_lr=1)
FEATURES = replace(ONCE, ema_decay=0.9, max_grad_norm=1.0, gradient_accumulation=2)


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 8))


class Stop(Exception):
    """Stands for a kill."""


class Denoising:
    """A denoising autoencoder of 45 steps, with noise, dropout and BatchNorm, whose rate of learning it can see.

    Args:
        terms: step → highest rate at which its loss is not NaN.
        weights: the same of its gradient; the loss stays finite.
        validation: the same of the validation after the step.
        stop: number of the loss's call that is killed.
    """

    def __init__(self, model, terms=None, weights=None, validation=None, stop=None):
        self.model, self.stop, self.calls, self.step = model, stop, 0, 0
        self.terms, self.weights, self.validation = terms or {}, weights or {}, validation or {}

    def bad(self, limits):
        return self.optimizer.param_groups[0]["lr"] > limits.get(self.step, math.inf)

    def loss(self, batch):
        rows, self.step = batch[0], batch[1] + 1
        self.calls += 1
        if self.calls == self.stop:
            raise Stop
        x = DATA[rows]
        loss = (self.model(x + 0.3 * torch.randn_like(x)) - x).square().mean()
        if self.bad(self.weights):
            loss = loss + (self.model[0].weight * 0).sum().sqrt()
        return {"loss": loss, "twice": 2 * loss * (math.nan if self.bad(self.terms) else 1.0)}

    def validate(self):
        error = float((self.model(DATA[:64] + 0.1 * torch.randn(64, 8)) - DATA[:64]).square().mean())
        return {"error": math.inf if self.bad(self.validation) else error}

    def adam(self, parameters):
        self.optimizer = torch.optim.Adam(parameters, lr=LR)
        return self.optimizer

    def fit(self, folder, execution=ONCE, schedule="constant", **options):
        def batches(start):
            return zip(minibatches(len(DATA), 32, 5, start), count(start), strict=False)

        options = {"validate": self.validate, "validate_every": 15, "seed": 5, "progress": False} | options
        return train(self.model, self.loss, batches, steps=45, lr=LR, schedule=schedule, optimizer=self.adam,
                     execution=execution, folder=folder, **options)  # fmt: skip


def weights(model):
    return torch.cat([tensor.double().flatten() for tensor in model.state_dict().values()])


def records(folder, splits=("train", "validation", "recovery")):
    timed = ("seconds", "samples_per_second")
    found = [{k: v for k, v in r.items() if k not in timed} for r in read_metrics(folder / "metrics.jsonl")]
    return [r for r in found if r["split"] in splits]


def halved(*back):
    """The schedule of a run that never goes back, with the rates of one that has done so, to these steps in turn."""
    return lambda step: 0.5 ** max((i for i, first in enumerate(back, 1) if first <= step), default=0)


HALF, QUARTER, EIGHTH = 0.6 * LR, 0.3 * LR, 0.2 * LR  # limits that one, two, three halvings meet


@pytest.mark.parametrize(
    ("trouble", "back", "execution"),
    [
        ({"terms": {38: HALF}}, [35], ONCE),
        ({"weights": {42: HALF}}, [35], ONCE),
        ({"validation": {30: HALF}}, [28], FEATURES),
        ({"terms": {10: HALF, 44: QUARTER}}, [7, 42], FEATURES),
        ({"terms": {38: EIGHTH}}, [35, 28, 21], FEATURES),
        ({"terms": {3: QUARTER}}, [0, 0], FEATURES),
    ],
    ids=["a term", "weights", "validation", "twice", "in vain at first", "before any checkpoint"],
)
def test_a_run_goes_back_and_on_as_if_the_schedule_had_been_lower(trouble, back, execution, tmp_path):
    """The same batches, noise, moments, averages, best weights and log: equal bit for bit."""
    lower = net()
    expected = Denoising(lower).fit(tmp_path / "lower", execution, halved(*back))
    model = net()
    with pytest.warns(RuntimeWarning, match="of the scheduled learning rate") as warned:
        result = Denoising(model, **trouble).fit(tmp_path / "run", replace(execution, halve_lr=len(back)))
    assert len([w for w in warned if w.category is RuntimeWarning]) == len(back)
    assert torch.equal(weights(model), weights(lower))
    assert (result.steps, result.best_step, result.history) == (45, expected.best_step, expected.history)
    assert records(tmp_path / "run", ["train", "validation"]) == records(tmp_path / "lower")
    told = [(r["step"], r["halvings"], r["lr"]) for r in records(tmp_path / "run", ["recovery"])]
    assert told == [(step, i, LR / 2**i) for i, step in enumerate(back, 1)]


def test_a_diverging_quadratic_ends_at_a_rate_that_lets_it_converge(tmp_path):
    """Gradient descent on ½w² multiplies w by 1 − rate: above 2 it diverges.

    Near the overflow there are finite weights whose loss is infinite, beyond the help of any rate.
    """
    model = nn.Linear(4, 1, bias=False)
    with pytest.warns(RuntimeWarning, match="goes back from step"):
        train(model, lambda _: {"loss": model.weight.square().sum() / 2}, [0] * 200, steps=200, lr=10.0,
              schedule="constant", optimizer=lambda p: torch.optim.SGD(p, lr=10.0), folder=tmp_path, progress=False,
              execution=Execution(checkpoint_every=7, halve_lr=8))  # fmt: skip
    tried = [r["lr"] for r in records(tmp_path, ["recovery"])]
    assert tried[:3] == [5.0, 2.5, 1.25] and len(tried) <= 5
    assert model.weight.abs().max() < 1e-6


def test_the_way_back():
    found = [Path(f"step-{step:08d}") for step in (21, 28, 35)]
    before = [{"step": 28, "noticed_at": 40}]
    assert way_back(found[2], found, [], 40) == found[2], "the last one"
    assert way_back(found[2], found, before, 41) == found[2], "the run has come further than the time before"
    assert way_back(found[2], found, before, 40) == found[0], "it has not"
    assert way_back(found[2], found[1:], before, 40) == found[1], "no older one is kept"
    assert way_back(found[2], found[2:], before, 40) == found[2]
    assert way_back(Path("elsewhere"), found, before, 40) == Path("elsewhere")


def test_it_tells_step_term_rate_and_place(tmp_path):
    message = (
        r"training goes back from step 40 to .*step-00000035, and on with 1/2 of the scheduled learning rate, "
        r"0.002 in the next step: training stopped at step 38: loss term 'twice' is nan"
    )
    with pytest.warns(RuntimeWarning, match=message) as warned:
        Denoising(net(), {38: HALF}).fit(tmp_path)
    assert warned[0].filename == __file__
    (record,) = records(tmp_path, ["recovery"])
    reason = "training stopped at step 38: loss term 'twice' is nan"
    assert (record["step"], record["noticed_at"], record["reason"]) == (35, 40, reason)


def test_time_lost_counts_and_a_report_draws_no_recoveries(tmp_path):
    run = Denoising(net(), {38: HALF})
    own = run.loss

    def loss(batch):
        if run.calls == 37:
            time.sleep(0.3)  # in a step that is made again
        return own(batch)

    run.loss = loss
    with pytest.warns(RuntimeWarning):
        result = run.fit(tmp_path)
    seconds = {r["step"]: r["seconds"] for r in read_metrics(tmp_path / "metrics.jsonl") if r["split"] == "train"}
    assert seconds[40] > seconds[35] + 0.3 and result.seconds >= seconds[45]
    charts = curves(SimpleNamespace(folder=tmp_path, prior_folder=tmp_path / "none"))
    assert {name.removeprefix("VAE: ") for name in charts} == {"loss, nats", "twice", "lr", "error"}


def test_without_the_option_and_after_the_last_halving_it_is_an_error(tmp_path):
    with pytest.raises(TrainingDiverged, match=r"step 38: loss term 'twice' is nan; the last .*step-00000035$"):
        Denoising(net(), {38: HALF}).fit(tmp_path / "off", replace(ONCE, halve_lr=0))
    assert not (tmp_path / "off" / "checkpoints" / "step-00000000").exists()
    model = net()
    message = r"step 38: .*; the last good .*step-00000035; the learning rate had been halved 2 times$"
    with pytest.warns(RuntimeWarning), pytest.raises(TrainingDiverged, match=message):
        Denoising(model, {38: EIGHTH}).fit(tmp_path / "twice", replace(ONCE, halve_lr=2))
    assert not model.training and torch.isfinite(weights(model)).all()


def test_one_that_a_validation_raises_by_itself_is_one_too(tmp_path):
    run = Denoising(net(), validation={30: HALF})
    own = run.validate

    def validate():
        if math.isinf((value := own())["error"]):
            raise TrainingDiverged("the loss of one of the groups is inf")
        return value

    with pytest.warns(RuntimeWarning, match="from step 30 to .*step-00000028.*: the loss of one of the groups is inf"):
        run.fit(tmp_path, validate=validate)


def test_a_step_broken_off_leaves_no_gradients(tmp_path):
    """A loss that raises in the second of two parts of a step: the first part's gradients are of a time given up."""
    model, lower = net(), net()
    run = Denoising(model, {38: HALF})
    own = run.loss

    def loss(batch):
        terms = own(batch)
        if run.calls % 2 == 0 and terms["twice"].isnan():
            raise TrainingDiverged("at once")
        return terms

    run.loss = loss
    with pytest.warns(RuntimeWarning, match="from step 37 to .*: at once"):
        run.fit(tmp_path / "halved", FEATURES)
    Denoising(lower).fit(tmp_path / "lower", FEATURES, halved(35))
    assert torch.equal(weights(model), weights(lower))


def test_the_loss_scale_too_is_that_of_the_checkpoint(tmp_path, monkeypatch):
    """fp16's, on the CPU, where accelerate itself would not have it: it doubles at every fifth step."""
    own, scalers = engine.own_accelerator, []

    @contextmanager
    def scaled(*arguments):
        with own(*arguments) as accelerator:
            scalers.append(torch.amp.GradScaler("cpu", growth_interval=5))
            accelerator.scaler = scalers[-1]
            yield accelerator

    monkeypatch.setattr(engine, "own_accelerator", scaled)
    model, lower = net(), net()
    with pytest.warns(RuntimeWarning, match="to .*step-00000035"):
        Denoising(model, {38: HALF}).fit(tmp_path / "run")
    Denoising(lower).fit(tmp_path / "lower", schedule=halved(35))
    assert torch.equal(weights(model), weights(lower))
    assert scalers[0].state_dict() == scalers[1].state_dict() and scalers[0].get_scale() == 2.0 ** (16 + 45 // 5)


# --- killed and resumed ---------------------------------------------------------------------------------------------

THRICE = replace(FEATURES, gradient_accumulation=1, halve_lr=3)
TROUBLE = {"terms": {24: HALF, 38: EIGHTH}}  # 25 calls, back to 21; 19, back to 35; 5, back to 28; 17


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("whole"), net()
    with pytest.warns(RuntimeWarning):
        result = Denoising(model, **TROUBLE).fit(folder, THRICE)
    return folder, model, result


def resumed_is_whole(folder, whole, execution=THRICE):
    again = net(seed=1)
    result = Denoising(again, **TROUBLE).fit(folder, execution, resume="auto")
    assert torch.equal(weights(again), weights(whole[1]))
    assert (result.best_step, result.history) == (whole[2].best_step, whole[2].history)
    assert records(folder) == records(whole[0])
    names = [[p.name for p in checkpoints_in(f / "checkpoints")] for f in (folder, whole[0])]
    assert names[0] == names[1]


@pytest.mark.filterwarnings("ignore:.*of the scheduled learning rate:RuntimeWarning")
@pytest.mark.parametrize("call", [1, 26, 44, 47, 50, 60])
def test_a_killed_run_goes_on_with_the_rate_it_had(call, whole, tmp_path):
    with pytest.raises(Stop):
        Denoising(net(), **TROUBLE, stop=call).fit(tmp_path, THRICE)
    resumed_is_whole(tmp_path, whole)


@pytest.mark.filterwarnings("ignore:.*of the scheduled learning rate:RuntimeWarning")
@pytest.mark.parametrize("way", [1, 3])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_a_run_killed_around_the_save_of_a_way_back_tells_of_it_once(late, way, whole, tmp_path, monkeypatch):
    """Right before the checkpoint that knows of it is there, and between that and the record in the log."""
    save = checkpoint.save

    def killed(folder, accelerator, step, state, *more):
        done = len(state["recoveries"])
        path = save(folder, accelerator, step, state, *more) if late or done < way else None
        if done == way:
            raise Stop
        return path

    monkeypatch.setattr(checkpoint, "save", killed)
    with pytest.raises(Stop):
        Denoising(net(), **TROUBLE).fit(tmp_path, THRICE)
    assert len(records(tmp_path, ["recovery"])) == way - 1
    monkeypatch.undo()
    resumed_is_whole(tmp_path, whole)


def test_a_run_that_diverged_without_the_option_is_resumed_with_it(whole, tmp_path):
    with pytest.raises(TrainingDiverged):
        Denoising(net(), **TROUBLE).fit(tmp_path, replace(THRICE, halve_lr=0))
    with pytest.raises(TrainingDiverged, match="step 24"):  # it is deterministic: the same step diverges again
        Denoising(net(), **TROUBLE).fit(tmp_path, replace(THRICE, halve_lr=0), resume="auto")
    with pytest.warns(RuntimeWarning):
        resumed_is_whole(tmp_path, whole)


def test_halvings_made_stay_where_no_more_are_allowed(whole, tmp_path):
    with pytest.warns(RuntimeWarning), pytest.raises(Stop):
        Denoising(net(), **TROUBLE, stop=60).fit(tmp_path, THRICE)
    resumed_is_whole(tmp_path, whole, replace(THRICE, halve_lr=0))
    path = checkpoints_in(tmp_path / "checkpoints")[-2]
    with pytest.raises(TrainingDiverged, match="halved 3 times"):
        Denoising(net(), {44: 0.0}).fit(tmp_path, replace(THRICE, halve_lr=0), resume=path)


def test_going_back_after_resuming_from_an_older_checkpoint_passes_by_the_later_ones(tmp_path):
    Denoising(net()).fit(tmp_path)
    path = checkpoints_in(tmp_path / "checkpoints")[0]
    with pytest.warns(RuntimeWarning, match="from step 40 to .*step-00000035"):
        Denoising(net(), {39: HALF}).fit(tmp_path, resume=path)


def test_a_checkpoint_from_before_there_were_halvings_has_none(tmp_path):
    whole, again = net(), net(seed=1)
    Denoising(whole).fit(tmp_path)
    path = checkpoints_in(tmp_path / "checkpoints")[-2]
    text = (path / checkpoint.STATE_FILE).read_text()
    (path / checkpoint.STATE_FILE).write_text(text.replace('"recoveries": [], ', ""))
    assert "recoveries" not in (path / checkpoint.STATE_FILE).read_text()
    Denoising(again).fit(tmp_path, resume=path)
    assert torch.equal(weights(whole), weights(again))
    path = checkpoints_in(tmp_path / "checkpoints")[-2]
    (path / checkpoint.STATE_FILE).write_text(text.replace('"recoveries": []', '"recoveries": 1'))
    with pytest.raises(CheckpointError, match="recoveries must be a list of records"):
        Denoising(net()).fit(tmp_path, resume=path)


def test_a_signal_is_not_forgotten_on_the_way_back(tmp_path):
    run = Denoising(net(), {38: HALF})
    own = run.loss

    def loss(batch):
        if run.calls == 37:
            os.kill(os.getpid(), signal.SIGTERM)  # noticed after the step that turns out to have diverged
        return own(batch)

    run.loss = loss
    with pytest.warns(RuntimeWarning), pytest.raises(TrainingInterrupted, match="SIGTERM after step 36 of 45"):
        run.fit(tmp_path)


# --- what it needs --------------------------------------------------------------------------------------------------


def test_what_it_needs_is_said_at_the_start(tmp_path):
    with pytest.raises(ValueError, match="execution.halve_lr needs the folder of the run, got 1 without one"):
        Denoising(net()).fit(None)
    with pytest.raises(TypeError, match="batches must be a function of the step, .*halve_lr = 1, got list_iterator"):
        train(net(), lambda x: {"loss": x.mean()}, iter([DATA]), steps=1, lr=LR, folder=tmp_path, execution=ONCE)
    for wrong, error, message in [
        (-1, ValueError, "halve_lr must be ≥ 0"),
        (10**6, ValueError, "halve_lr must be ≥ 0 and < 1001"),
        (True, TypeError, "halve_lr must be an integer"),
    ]:
        with pytest.raises(error, match=message):
            Execution(halve_lr=wrong)


# --- two processes --------------------------------------------------------------------------------------------------


def in_two(folder):
    """One shard of the second process is NaN, and later its weights; then the run that had the lower rates."""
    model, lower = net(), net()
    only_one = {"terms": {24: HALF}, "weights": {42: QUARTER}} if int(os.environ["RANK"]) == 1 else {}
    Denoising(model, **only_one).fit(Path(folder, "halved"), THRICE)
    Denoising(lower).fit(Path(folder, "lower"), THRICE, halved(21, 35))
    return weights(model), weights(lower)


def test_two_processes_go_back_together(tmp_path):
    (first, expected), (second, _) = run_processes(in_two, 2, str(tmp_path), timeout=120)
    assert torch.equal(first, second) and torch.equal(first, expected)
    assert [(r["step"], r["halvings"]) for r in records(tmp_path / "halved", ["recovery"])] == [(21, 1), (35, 2)]
    assert records(tmp_path / "halved", ["train", "validation"]) == records(tmp_path / "lower")
