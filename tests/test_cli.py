import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from ncpvae.cli import main


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "ncpvae", *arguments], capture_output=True, text=True, env=os.environ | environment
    )


@pytest.mark.parametrize("name", ["gaussians", "digits"])
def test_demo_leaves_a_table_figures_and_pictures(name, tmp_path, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    assert main(["demo", name, "--steps", "60", "--output", str(tmp_path), "--no-progress"]) == 0
    printed = capsys.readouterr().out
    assert "SNIS bound" in printed and "JSD" in printed
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["protocol"] and record["figures"]["seconds"] > 0
    for line in printed.splitlines():
        if line.startswith("picture: "):
            assert os.path.getsize(line.removeprefix("picture: ")) > 1000


def test_mnist_demo_reads_real_images_and_reuses_a_trained_vae(data_folder, tmp_path, capsys, monkeypatch):
    pytest.importorskip("datasets")
    pytest.importorskip("matplotlib")
    from ncpvae.demos import mnist

    monkeypatch.setattr(mnist, "IMPORTANCE_SAMPLES", 2)
    monkeypatch.setattr(mnist, "NUM_LOG_Z", 1000)
    monkeypatch.setattr(mnist, "PROPOSALS", 16)
    common = ["demo", "mnist", "--steps", "20", "--output", str(tmp_path), "--data-dir", data_folder, "--no-progress"]
    assert main(common) == 0
    assert main([*common, "--vae", str(tmp_path / "mnist-vae.safetensors")]) == 0
    assert "VAE from mnist-vae.safetensors" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "cifar"], "demo must be one of gaussians, digits, mnist, got 'cifar'"),
        (["demo", "gaussians", "--data-dir", "x"], "--data-dir and --vae are for the demo mnist"),
        (["demo", "mnist", "--vae", "/no/such.safetensors"], "'/no/such.safetensors' is not a file"),
        (["demo", "mnist", "--data-dir", "/tmp"], "'/tmp' holds no 'mnist'"),
        (["demo", "gaussians", "--steps", "0"], "--steps must be ≥ 1, got 0"),
        (["demo", "gaussians", "--output", "FILE/sub"], "cannot be written"),
        (["demo", "mnist", "--data-dir", "/no/such/folder"], "is not a folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, tmp_path):
    (tmp_path / "FILE").write_text("")
    arguments = [a.replace("FILE", str(tmp_path / "FILE")) for a in arguments]
    if "--output" not in arguments:
        arguments += ["--output", str(tmp_path)]
    done = run(*arguments, NCPVAE_DISABLE_NATIVE="1")
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a file"),
        (b"not safetensors", "does not hold the weights"),
        ("other", "does not hold the weights"),
    ],
)
def test_weights_that_are_none_are_one_line_and_status_2(content, message, data_folder, tmp_path, capsys):
    file = tmp_path / "weights.safetensors"
    if content == "other":
        save_file({"a": torch.zeros(3)}, file)
    elif content is not None:
        file.write_bytes(content)
    arguments = ["demo", "mnist", "--vae", str(file), "--data-dir", data_folder, "--output", str(tmp_path)]
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert message in printed and len(printed.strip().splitlines()) == 1


def test_usage_errors_have_status_2_too():
    assert run("dance", NCPVAE_DISABLE_NATIVE="1").returncode == 2


def test_info_names_every_op():
    done = run("info")
    assert done.returncode == 0
    for op in ("sir_resample", "langevin_step", "similarity_logsumexp", "gaussian_logsumexp"):
        assert op in done.stdout
    assert subprocess.run([sys.executable, "-m", "ncpvae.info"], capture_output=True, text=True).stdout == done.stdout
