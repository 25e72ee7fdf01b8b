import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from ncpvae import Langevin
from ncpvae.cli import main
from ncpvae.recipes import RECIPES
from ncpvae.runs import evaluation, open_run
from ncpvae.train.log import read_metrics

pytest.importorskip("tyro")


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "ncpvae", *arguments], capture_output=True, text=True, env=os.environ | environment
    )


SMALL = ["--no-progress", "--no-page", "--execution.check-every", "5"]
FEW = ["--importance-samples", "4", "--snis-proposals", "8", "--sir-proposals", "20", "--samples", "60"]


@pytest.mark.parametrize("name", ["gaussians", "digits"])
def test_demo_leaves_a_table_a_picture_and_a_page(name, tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(RECIPES, name, short(RECIPES[name]))
    monkeypatch.setattr(evaluation, "LANGEVIN", Langevin(5, 1e-3))
    arguments = ["demo", name, "--steps", "60", "--output", str(tmp_path), "--no-progress"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "SNIS bound" in printed and "JSD" in printed
    for line in printed.splitlines():
        if line.startswith(("picture: ", "page: ")):
            assert os.path.getsize(line.partition(": ")[2]) > 1000
    weights = (tmp_path / name / "vae" / "model.safetensors").read_bytes()
    assert main(arguments) == 0, "a demo that is there is gone on with"
    assert (tmp_path / name / "vae" / "model.safetensors").read_bytes() == weights


def short(recipe):
    e = replace(
        recipe.evaluation, importance_samples=2, snis_proposals=8, sir_proposals=20, samples=40, test_examples=50
    )
    return replace(recipe, evaluation=replace(e, pictures=16), prior=replace(recipe.prior, log_z_samples=100))


def test_the_whole_way_by_commands(tmp_path, capsys):
    pytest.importorskip("sklearn")
    run = str(tmp_path / "run")
    train = ["train", "digits", "--steps", "20", "--prior.steps", "10", "--output", run, *SMALL]
    assert main([*train, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "parameters of the VAE: 55,061" in printed and '"steps": 20' in printed and "MiB" in printed
    assert not (tmp_path / "run").exists()
    assert main(train) == 0
    assert f"next: ncpvae fit-prior {run}" in capsys.readouterr().out
    assert main(["fit-prior", run, "--batch-size", "64", "--no-progress"]) == 0
    printed = capsys.readouterr().out
    assert "10 steps" in printed, "the run's own recipe has the defaults"
    assert f"page: {run}/report.html" in printed and (tmp_path / "run" / "report.html").is_file()
    assert main(["evaluate", run, *FEW, "--no-page"]) == 0
    assert "test NLL, SNIS bound" in capsys.readouterr().out
    for command in (["sample", run, "--count", "8", "--proposals", "10"], ["reconstruct", run], ["interpolate", run]):
        assert main(command) == 0
    assert main(["compare", run, run]) == 0
    assert main(["report", run]) == 0
    assert (tmp_path / "run" / "report.html").is_file()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["prior"]["batch_size"] == 64


def test_every_field_of_a_recipe_is_a_flag(tmp_path, capsys):
    for name, recipe in RECIPES.items():
        assert main(["train", name, "--help"]) == 0
        flags = capsys.readouterr().out
        for path in fields_of(recipe):
            assert f"--{path.replace('_', '-')}" in flags, f"{name}: {path}"


def fields_of(recipe, prefix=""):
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        yield from (
            fields_of(value, f"{prefix}{field.name}.") if dataclasses.is_dataclass(value) else [prefix + field.name]
        )


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "ncpvae", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},  # sums are rounded as threads share them
    )


def wait_for(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_killed_interrupted_and_resumed_a_run_ends_with_the_same_weights(tmp_path):
    """By the command line itself: SIGKILL, then SIGTERM, then the command that the latter names."""
    pytest.importorskip("sklearn")
    options = ["--steps", "400", "--channels", "4", "8", "--execution.checkpoint-every", "20", *SMALL]
    assert main(["train", "digits", *options, "--output", str(tmp_path / "whole")]) == 0
    run = tmp_path / "run"

    def checkpoints():
        return sorted(p.name for p in run.glob("checkpoints/step-*"))

    killed = start("train", "digits", *options, "--output", str(run))
    wait_for(checkpoints)
    killed.kill()
    assert killed.wait() == -9
    seen = checkpoints()
    stopped = start("train", "digits", *options, "--output", str(run), "--resume", "auto")
    wait_for(lambda: checkpoints() != seen)
    stopped.send_signal(signal.SIGTERM)
    message = stopped.communicate()[1]
    assert stopped.returncode == 130
    command = shlex.split(message.partition("to go on: ")[2])
    assert command[0] == "ncpvae" and command[-2:] == ["--resume", "auto"]
    assert main(command[1:]) == 0
    assert (run / "vae/model.safetensors").read_bytes() == (tmp_path / "whole/vae/model.safetensors").read_bytes()


def test_stage_two_interrupted_names_a_command_that_goes_on(tmp_path):
    pytest.importorskip("sklearn")
    run = tmp_path / "run"
    assert main(["train", "digits", "--steps", "5", "--channels", "4", "8", "--output", str(run), *SMALL]) == 0
    fit = ["fit-prior", str(run), "--steps", "3000", "--hidden", "8", "--execution.checkpoint-every", "20"]
    assert main([*fit, "--steps", "5", "--no-progress", "--no-page"]) == 0
    stopped = start(*fit, "--overwrite", "--no-progress", "--no-page")
    wait_for(lambda: "step-00000020" in str(sorted(run.glob("prior/checkpoints/step-*"))))
    stopped.send_signal(signal.SIGINT)
    message = stopped.communicate()[1]
    assert stopped.returncode == 130, message
    assert main(shlex.split(message.partition("to go on: ")[2])[1:]) == 0


def test_a_diverging_run_is_a_failure(tmp_path, capsys):
    pytest.importorskip("sklearn")
    arguments = ["train", "digits", "--steps", "60", "--lr", "1e25", "--output", str(tmp_path / "run"), *SMALL]
    assert main(arguments) == 1
    assert "loss term" in capsys.readouterr().err


def test_torchrun_trains_in_two_processes(tmp_path):
    pytest.importorskip("sklearn")
    run = tmp_path / "run"
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    train = ["-m", "ncpvae", "train", "digits", "--steps", "20", "--channels", "4", "8", "--output", str(run), *SMALL]
    done = subprocess.run(
        [sys.executable, *launch, *train],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("20 steps") == 1, "one process speaks"
    assert open_run(run).vae() is not None
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl") if r["split"] == "train"] == [5, 10, 15, 20]


def test_features_are_trained_and_name_their_figures(tmp_path, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("torchmetrics")
    run, features = str(tmp_path / "run"), str(tmp_path / "features")
    assert main(["train-features", "digits", "--steps", "150", "--output", features, "--no-progress"]) == 0
    name = capsys.readouterr().out
    assert "classifier trained on scikit-learn's load_digits" in name
    assert main(["train-features", "digits", "--output", features]) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert main(["train", "digits", "--steps", "10", "--output", run, *SMALL]) == 0
    assert main(["fit-prior", run, "--steps", "10", "--no-progress", "--no-page"]) == 0
    assert main(["evaluate", run, *FEW[:-1], "200", "--features", features, "--no-page"]) == 0
    assert "Fréchet distance (classifier trained on" in capsys.readouterr().out
    assert main(["train-features", "gaussians"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "cifar"], "demo must be one of gaussians, digits, mnist, got 'cifar'"),
        (["demo", "mnist", "--data-dir", "/no/such/folder", "--output", "OUT"], "is not a folder"),
        (["demo", "gaussians", "--steps", "0"], "--steps must be ≥ 1, got 0"),
        (["demo", "gaussians", "--output", "FILE/sub"], "cannot be written"),
        (["train", "digits", "--output", "FILE/sub"], "cannot be written"),
        (["train", "digits", "--output", "OUT", "--resume", "/no/such"], "not found"),
        (["evaluate", "OUT"], "is not the folder of a run"),
        (["fit-prior", "OUT", "--overwrite", "--resume", "auto"], "--overwrite starts afresh and --resume goes on"),
        (["compare"], "name the folders of runs"),
        (["train", "gaussians", "--output", "OUT", "--device", "toaster"], "device must be auto, cpu, cuda"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, tmp_path, capsys):
    (tmp_path / "FILE").write_text("")
    arguments = [a.replace("FILE", str(tmp_path / "FILE")).replace("OUT", str(tmp_path / "out")) for a in arguments]
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed
    assert len([line for line in printed.strip().splitlines() if line.startswith("ncpvae")]) == 1


@pytest.mark.parametrize(
    "line",
    ["dance", "", "train", "train nothing", "train digits --stepz 3", "train digits --steps x", "train digits --lr"],
)
def test_usage_errors_have_status_2(line, capsys):
    assert main(line.split()) == 2
    assert capsys.readouterr().err


def test_letters_that_the_terminal_does_not_have_stop_nothing():
    done = run("train", "--help", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stdout


def test_info_names_every_op():
    done = run("info")
    assert done.returncode == 0
    for op in ("sir_resample", "langevin_step", "similarity_logsumexp", "gaussian_logsumexp"):
        assert op in done.stdout
    assert subprocess.run([sys.executable, "-m", "ncpvae.info"], capture_output=True, text=True).stdout == done.stdout
