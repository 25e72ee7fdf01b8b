"""Training in two real processes against one: the same weights to rounding, logs, checkpoints, ways to stop."""

import math
import os
import signal
from pathlib import Path

import pytest
import torch
from processes import run_processes
from torch import nn

from ncpvae import (
    VAE,
    HybridCritic,
    MLPClassifier,
    MLPDecoder,
    MLPEncoder,
    NoiseContrastivePrior,
    Normal,
    NormalLikelihood,
    SelfCritic,
    fit_ncp,
    fit_vae,
)
from ncpvae.train import Execution
from ncpvae.train.batches import minibatches
from ncpvae.train.checkpoint import checkpoints_in
from ncpvae.train.engine import train
from ncpvae.train.log import read_metrics

DATA = torch.randn(256, 4, generator=torch.Generator().manual_seed(3)) * torch.tensor([1.0, 2.0, 0.5, 1.0])


def parts(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = VAE(MLPEncoder(4, [32], 3), MLPDecoder(3, [32], (4,)), NormalLikelihood(0.3), Normal(3))
        return vae, NoiseContrastivePrior(vae.prior, MLPClassifier(3, (32,)))


def both_stages(folder, accumulation, resume="never"):
    """Both stages, with noise in each; the weights and the history, the same in whatever process."""
    vae, prior = parts()
    execution = Execution(
        gradient_accumulation=accumulation, max_grad_norm=5.0, ema_decay=0.9, check_every=5, checkpoint_every=10
    )
    common = {"batch_size": 32, "steps": 40, "progress": False, "execution": execution, "resume": resume}
    one = fit_vae(vae, DATA, validation=DATA[:50], lr=5e-3, folder=folder and Path(folder, "vae"), **common)
    two = fit_ncp(prior, vae=vae, data=DATA, validation=DATA[:50], folder=folder and Path(folder, "ncp"), **common)
    weights = torch.cat([p.detach().flatten() for m in (vae, prior.classifier) for p in m.parameters()])
    return weights, one.history, two.history


def without_noise(batch_size=32):
    """A loss without noise does not know how a batch is cut: two processes are one with the whole batch."""
    model = nn.Linear(4, 4)
    nn.init.eye_(model.weight)
    nn.init.zeros_(model.bias)
    train(
        model,
        lambda i: {"loss": (model(DATA[i]) - DATA[i].square()).square().mean()},
        lambda start: minibatches(len(DATA), batch_size, 0, start),
        steps=30,
        lr=1e-2,
        progress=False,
    )
    return model.weight.detach().clone()


def in_two(folder):
    return both_stages(folder, 1), without_noise()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, run_processes(in_two, 2, str(folder), timeout=120)


def test_two_processes_train_as_one_does_with_twice_the_accumulation(two, tmp_path):
    _, results = two
    expected, *histories = both_stages(tmp_path, 2)
    for (weights, *their), _ in results:
        assert torch.allclose(weights, expected, atol=2e-4)
        for ours, theirs in zip(histories, their, strict=True):
            assert [r["step"] for r in ours] == [r["step"] for r in theirs]
            for mine, other in zip(ours, theirs, strict=True):
                assert mine == pytest.approx(other, rel=1e-2)
    assert torch.equal(results[0][0][0], results[1][0][0]), "both processes end with the same weights"
    other, *_ = both_stages(None, 1)
    assert not torch.allclose(other, expected, atol=2e-3), "noise drawn otherwise would be seen"


def test_without_noise_two_processes_are_one_with_the_whole_batch(two):
    expected = without_noise()
    for _, weight in two[1]:
        assert torch.allclose(weight, expected, atol=1e-5)
    assert not torch.allclose(without_noise(16), expected, atol=1e-3)


def test_one_process_writes(two):
    folder, _ = two
    steps = [r["step"] for r in read_metrics(folder / "vae" / "metrics.jsonl") if r["split"] == "train"]
    assert steps == sorted(set(steps)) and len(steps) == 8
    assert [p.name for p in checkpoints_in(folder / "vae" / "checkpoints")] == [f"step-000000{n}" for n in (20, 30, 40)]


def test_a_run_of_two_processes_is_resumed_by_one(two, tmp_path):
    """At 30 of 40 steps, with the accumulation that makes the same shards."""
    folder, results = two
    import shutil

    shutil.copytree(folder, tmp_path / "run")
    for stage in ("vae", "ncp"):
        shutil.rmtree(checkpoints_in(tmp_path / "run" / stage / "checkpoints")[-1])
    weights, *_ = both_stages(tmp_path / "run", 2, resume="auto")
    assert torch.allclose(weights, results[0][0][0], atol=2e-4)


def diverging():
    model = nn.Linear(4, 1)
    rank = int(os.environ["RANK"])
    calls = iter(range(1, 1000))

    def loss(index):
        bad = rank == 1 and next(calls) == 7
        return {"total": model(DATA[index]).square().mean() * (math.nan if bad else 1.0)}

    try:
        train(model, loss, lambda s: minibatches(256, 32, 0, s), steps=60, lr=1e-3, progress=False)
    except FloatingPointError as error:
        return str(error)


def stopped(folder):
    model = nn.Linear(4, 1)
    calls = iter(range(1, 10**9))

    def loss(index):
        if int(os.environ["RANK"]) == 1 and next(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)  # one of the two is told; both must stop at the same step
        return {"total": model(DATA[index]).square().mean()}

    try:
        train(model, loss, lambda s: minibatches(256, 32, 0, s), steps=10**6, lr=1e-3, progress=False,
              folder=Path(folder), execution=Execution(check_every=10))  # fmt: skip
    except KeyboardInterrupt as error:
        return str(error)


def test_what_happens_to_one_process_stops_both(tmp_path):
    first, second = run_processes(diverging_then_stopped, 2, str(tmp_path), timeout=120)
    for diverged, stopped_at in (first, second):
        assert "step 7: loss term 'total' is nan" in diverged
        assert "after step 10 of 1000000" in stopped_at
    assert (tmp_path / "checkpoints" / "step-00000010").is_dir()


def diverging_then_stopped(folder):
    return diverging(), stopped(folder)


def sharded():
    """Weights go out of a model that torch's FSDP shards, and back in."""
    from torch.distributed.fsdp import fully_shard

    from ncpvae.train.checkpoint import finite, set_weights, weights_of

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    model = fully_shard(plain)
    out = weights_of(model)
    assert finite(model) and all(torch.equal(before[name], out[name]) for name in before)
    set_weights(model, {name: tensor * 2 for name, tensor in out.items()})
    assert all(torch.equal(2 * before[name], tensor) for name, tensor in weights_of(model).items())
    set_weights(
        model, {name: tensor * math.nan if tensor.is_floating_point() else tensor for name, tensor in out.items()}
    )
    return finite(model)


def test_weights_of_a_sharded_model_are_gathered_and_dealt_out():
    assert run_processes(sharded, 2) == [False, False]


def tracked_then_fully_sharded(folder):
    """Trackers leave the process group alone. Then FSDP, by pretending to accelerate that there are GPUs."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    from ncpvae.train.execution import processes

    def denoise(name, steps=20, resume="never", **options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4))

        def error(x):
            return (model(x) - x).square().mean()

        result = train(
            model,
            lambda i: {"loss": error(DATA[i])},
            lambda s: minibatches(256, 32, 0, s),
            steps=steps,
            lr=1e-2,
            progress=False,
            validate=lambda: {"error": float(error(DATA[:64]))},
            validate_every=10,
            folder=Path(folder, name),
            resume=resume,
            **options,
        )
        return result.history[-1]["validation_error"]

    plain = denoise("plain", execution=Execution(trackers=("tensorboard",)))
    processes().wait_for_everyone()
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}
    results = [plain]
    for resume in ("never", "auto"):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        results.append(denoise("sharded", resume=resume))
    return results


def test_trackers_and_fsdp(tmp_path):
    pytest.importorskip("tensorboard")
    for plain, sharded_, resumed in run_processes(tracked_then_fully_sharded, 2, str(tmp_path), timeout=120):
        assert sharded_ == pytest.approx(plain, rel=1e-4) and resumed == sharded_
    assert list((tmp_path / "plain").rglob("events.out.tfevents*"))


def critics_plain_then_fully_sharded(kind):
    """The held-out figures of a VAE with a critic, under DistributedDataParallel and under FSDP."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    def trained():
        with torch.random.fork_rng():
            torch.manual_seed(1)
            vae = VAE(MLPEncoder(4, [16, 16], 3), MLPDecoder(3, [16], (4,)), NormalLikelihood(0.3), Normal(3))
            critic = SelfCritic() if kind == "self" else HybridCritic(vae, 1, hidden=8, width=4)
        result = fit_vae(
            vae, DATA, validation=DATA[:64], critic=critic, steps=10, batch_size=32, lr=1e-2, progress=False
        )
        return [result.history[-1][f"validation_{name}"] for name in ("loss", "critic")]

    plain = trained()
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return plain, trained()


@pytest.mark.parametrize("kind", ["self", "hybrid"])
def test_critics_are_trained_alike_where_weights_are_sharded(kind):
    for plain, sharded_ in run_processes(critics_plain_then_fully_sharded, 2, kind, timeout=120):
        assert sharded_ == pytest.approx(plain, rel=1e-4)
