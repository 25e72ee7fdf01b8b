"""Every script of examples/, run at a tiny size on made-up images in MNIST's format."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from ncpvae import data
from ncpvae.hierarchy import Given, HierarchicalVAE, infer

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NEEDS = {
    "diffusers_autoencoder_kl": "diffusers",
    "ladder_vae": "torch",
    "pythae_vae": "pythae",
    "two_callables": "torch",
}


def load(name: str):
    pytest.importorskip(NEEDS[name])
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(monkeypatch, tmp_path):
    """name, steps → the example's figures, after it was checked that it wrote them and its pictures."""

    def strokes(count):
        """A bright bar of random place in each image."""
        x = torch.randint(0, 60, (count, 1, 28, 28), dtype=torch.uint8)
        for i, column in enumerate(torch.randint(6, 20, (count,)).tolist()):
            x[i, :, 4:24, column : column + 3] = 255
        return x

    def run(name: str, steps: int) -> dict:
        folders = []
        splits = data.Splits(strokes(200), strokes(20), strokes(70))
        monkeypatch.setattr(data, "mnist", lambda folder=None: folders.append(folder) or splits)
        example = load(name)
        for constant, value in (("PROPOSALS", 50), ("TEST_IMAGES", 8), ("IMPORTANCE_SAMPLES", 2)):
            monkeypatch.setattr(example, constant, value, raising=False)
        output = tmp_path / "out"
        arguments = ["--steps", str(steps), "--data-dir", "somewhere", "--output", str(output)]
        figures = example.main(arguments)
        assert folders == ["somewhere"]
        assert json.loads((output / "figures.json").read_text()) == figures
        assert (output / "samples.png").read_bytes().startswith(b"\x89PNG")
        return figures

    return run


def test_every_example_is_run_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == NEEDS.keys()


def test_diffusers_autoencoder_kl(run, tmp_path):
    figures = run("diffusers_autoencoder_kl", steps=2)
    assert figures["latent_std"] > 0 and (tmp_path / "out" / "reconstructions.png").exists()
    for name in ("N(0, I)", "channel-wise Gaussian"):
        assert figures[name]["JSD(q, base)"] <= math.log(2) and 1 <= figures[name]["ESS of SIR"] <= 50
        assert math.isfinite(figures[name]["−log p(x), NCP"])


def test_ladder_vae(run):
    figures = run("ladder_vae", steps=4)
    assert figures["loss"] == pytest.approx(figures["reconstruction"] + figures["kl"], rel=1e-5)
    assert all(figures[f"kl of group {k}"] > 0 for k in (1, 2, 3)) and figures["loss"] < 28 * 28


def test_the_ladders_posterior_is_the_product_of_base_and_evidence():
    ladder = load("ladder_vae").LadderVAE(9, dims=(2, 3), width=4).eval()
    assert isinstance(ladder, HierarchicalVAE)
    likelihood, path = infer(ladder, torch.rand(5, 9).round())
    evidence = ladder.encode(torch.rand(5, 9).round())
    base = path.bases[1]
    product = ladder.posterior(1, base, None, evidence)
    z = torch.randn(2, 5, 3)
    both = base.log_prob(z) + evidence[1].log_prob(z) - product.log_prob(z)
    torch.testing.assert_close(both[0], both[1], msg="log p + log q̂ − log q was to be a constant in z")
    torch.testing.assert_close(ladder.walk(Given(path.z), 5).mean, likelihood.mean)


def test_pythae_vae(run):
    figures = run("pythae_vae", steps=4)
    assert math.isfinite(figures["log_z"]) and 1 <= figures["ess"] <= 50
    nll = [figures[f"nll {name}"] for name in ("base", "NCP", "NCP, SNIS bound")]
    assert all(0 < value < 28 * 28 * math.log(2) * 1.5 for value in nll)
    assert max(nll) - min(nll) < 5  # a classifier of two steps has changed the prior but little


def test_two_callables(run):
    figures = run("two_callables", steps=2)
    assert figures["jsd"] <= math.log(2) and 0 <= figures["accuracy"] <= 1


def test_a_folder_without_data_is_named(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(OSError, match="is not a folder"):
        load("two_callables").main(["--data-dir", str(tmp_path / "nothing"), "--output", str(tmp_path)])
