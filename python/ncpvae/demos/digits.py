"""scikit-learn's 8×8 digits with a small convolutional VAE."""

from pathlib import Path

import torch
from torch import nn

from .. import data, plots
from ..classifiers import MLPClassifier
from ..distributions import BinomialLikelihood
from ..priors import NoiseContrastivePrior, Normal
from ..samplers import SIR
from ..train import fit_ncp, fit_vae
from ..vae import VAE, ConvDecoder, ConvEncoder
from .measure import decode_mean, image_rows, likelihoods
from .report import Report

LEVELS = 16
LATENT_DIM = 10
STEPS = 3000
NCP_STEPS = 1500
NUM_LOG_Z = 100_000
PROPOSALS = 1000
IMPORTANCE_SAMPLES = 500


def build_vae() -> VAE:
    """Two stride-2 convolutions down and two up. A pixel counts the set ones of 4×4, hence the binomial likelihood."""
    encoder = ConvEncoder((1, 8, 8), (32, 64), LATENT_DIM, kernel_size=3)
    decoder = ConvDecoder(LATENT_DIM, (64, 32, 32), (1, 8, 8), kernel_size=3)
    return VAE(encoder, decoder, BinomialLikelihood(LEVELS), Normal(LATENT_DIM))


def run(folder: Path, steps: int = STEPS, seed: int = 0, progress: bool = True) -> Report:
    """Train both stages, measure, draw; returns the report."""
    report = Report("digits", folder, ("base", "NCP"))
    torch.manual_seed(seed)
    splits = data.digits(seed)
    vae = build_vae()
    stage_one = fit_vae(vae, splits.train, validation=splits.validation, steps=steps, seed=seed, progress=progress)
    prior = NoiseContrastivePrior(vae.prior, MLPClassifier(LATENT_DIM, (128, 128), nn.SiLU))
    stage_two = fit_ncp(
        prior,
        vae=vae,
        data=splits.train,
        validation=splits.validation.repeat_interleave(10, 0),
        steps=max(1, steps * NCP_STEPS // STEPS),
        seed=seed,
        progress=progress,
    )
    log_z = prior.estimate_log_normalizer(NUM_LOG_Z)
    nll = likelihoods(vae, prior, splits.test, IMPORTANCE_SAMPLES, PROPOSALS, seed=seed)

    sir = SIR().sample(prior(), (64,))
    image_rows(report, nll, log_z, stage_two, sir.diagnostics, decimals=3)
    report.figure(vae_seconds=stage_one.seconds)
    report.protocol += [
        f"{len(splits.test)} test digits, importance-weighted bound with {IMPORTANCE_SAMPLES} draws per image;",
        f"log Z by {NUM_LOG_Z:,} base draws; SNIS with {PROPOSALS:,} proposals; VAE {stage_one.steps:,} and classifier "
        f"{stage_two.steps:,} steps,",
        f"weights best on {len(splits.validation)} other digits kept; seed {seed}.",
    ]
    samples = decode_mean(vae, sir.z) / LEVELS
    test = splits.test[:64]
    with torch.no_grad():
        codes = vae.encode(test.float()).mean
    neighbours = plots.nearest(samples, splits.train / LEVELS)
    panels = [("base prior", decode_mean(vae, vae.prior_distribution().sample((64,))) / LEVELS), ("NCP", samples)]
    report.pictures.append(plots.save_images(folder / "digits-samples.png", panels))
    panels = [("test images", test / LEVELS), ("reconstructions", decode_mean(vae, codes) / LEVELS)]
    report.pictures.append(plots.save_images(folder / "digits-reconstructions.png", panels))
    panels = [("NCP", samples), ("nearest training images", neighbours)]
    report.pictures.append(plots.save_images(folder / "digits-neighbours.png", panels))
    report.finish()
    return report
