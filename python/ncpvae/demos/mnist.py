"""MNIST with the small VAE of LARS and SNIS (NCP-VAE, Table 8)."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import data, plots
from ..classifiers import MLPClassifier
from ..distributions import BernoulliLikelihood
from ..priors import NoiseContrastivePrior, Normal
from ..samplers import SIR
from ..train import fit_ncp, fit_vae
from ..vae import VAE, MLPDecoder, MLPEncoder
from .measure import decode_mean, image_rows, likelihoods
from .report import Report

LATENT_DIM = 50
STEPS = 10_000
NCP_STEPS = 50_000
STAGE_ONE: dict[str, Any] = {"batch_size": 128, "lr": 3e-4, "schedule": "constant"}
STAGE_TWO: dict[str, Any] = {"batch_size": 128, "lr": 3e-4, "schedule": "cosine"}
NUM_LOG_Z = 1_000_000
PROPOSALS = 1024
IMPORTANCE_SAMPLES = 1000


def build_vae(train: Tensor, seed: int = 0) -> VAE:
    """Encoder and decoder 300-300 tanh, latent 50, Glorot uniform, input and output centred on the data's mean."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mean = train.float().mean(0) / 255
        encoder = MLPEncoder(784, [300, 300], LATENT_DIM, nn.Tanh, scale="softplus", input_mean=mean)
        decoder = MLPDecoder(LATENT_DIM, [300, 300], (1, 28, 28), nn.Tanh)
        glorot(encoder)
        glorot(decoder)
        last = [m for m in decoder if isinstance(m, nn.Linear)][-1]
        with torch.no_grad():
            last.bias.copy_(mean.flatten().clamp(0.001, 0.999).logit())
    return VAE(encoder, decoder, BernoulliLikelihood(), Normal(LATENT_DIM))


def glorot(network: nn.Module) -> None:
    """Weights Glorot uniform, biases zero."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


def load_weights(vae: VAE, file: str) -> None:
    """Weights from a safetensors file of an earlier run; OSError or ValueError where they are none."""
    try:
        vae.load_state_dict(load_file(file))
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"weights file {file!r} does not hold the weights of this VAE: {reason}") from error
    vae.eval()


def run(
    folder: Path,
    steps: int = STEPS,
    seed: int = 0,
    progress: bool = True,
    data_folder: str | None = None,
    vae_file: str | None = None,
) -> Report:
    """Train both stages, measure, draw; returns the report.

    Args:
        steps: of stage one. The VAE is saved as `mnist-vae.safetensors`.
        data_folder: holds `mnist`; see `ncpvae.data.mnist`.
        vae_file: weights saved by an earlier run, with which stage one is skipped.
    """
    report = Report("mnist", folder, ("base", "NCP"))
    torch.manual_seed(seed)
    splits = data.mnist(data_folder)
    vae = build_vae(splits.train, seed)
    if vae_file is None:
        fit_vae(
            vae,
            splits.train,
            validation=splits.validation,
            transform=data.binarize,
            steps=steps,
            seed=seed,
            progress=progress,
            validate_every=max(1, min(5000, steps // 4)),
            **STAGE_ONE,
        )
        save_file(vae.state_dict(), folder / "mnist-vae.safetensors")
    else:
        load_weights(vae, vae_file)
    classifier = MLPClassifier(LATENT_DIM, (100, 100), nn.Tanh)
    prior = NoiseContrastivePrior(vae.prior, classifier)
    stage_two = fit_ncp(
        prior,
        vae=vae,
        data=splits.train,
        validation=splits.validation,
        transform=data.binarize,
        steps=min(steps, NCP_STEPS),
        seed=seed,
        progress=progress,
        **STAGE_TWO,
    )
    log_z = prior.estimate_log_normalizer(NUM_LOG_Z)
    nll = likelihoods(vae, prior, splits.test, IMPORTANCE_SAMPLES, PROPOSALS, transform=data.binarize, seed=seed)

    sir = SIR().sample(prior(), (100,))
    image_rows(report, nll, log_z, stage_two, sir.diagnostics, decimals=2)
    first_stage = f"VAE {steps:,} steps" if vae_file is None else f"VAE from {Path(vae_file).name}"
    report.protocol += [
        f"{len(splits.test):,} test images, binarised once by Bernoulli(pixel / 255); importance-weighted bound with "
        f"{IMPORTANCE_SAMPLES:,} draws per image;",
        f"log Z by {NUM_LOG_Z:,} base draws; SNIS with {PROPOSALS:,} proposals; {first_stage}, classifier "
        f"{stage_two.steps:,} steps,",
        f"weights best on {len(splits.validation):,} other images kept; seed {seed}.",
    ]
    samples = decode_mean(vae, sir.z)
    neighbours = plots.nearest(samples, splits.train.float() / 255)
    panels = [
        ("base prior", decode_mean(vae, vae.prior_distribution().sample((100,)))),
        ("NCP", samples),
        ("nearest training images", neighbours),
    ]
    report.pictures.append(plots.save_images(folder / "mnist-samples.png", panels))
    report.finish()
    return report
