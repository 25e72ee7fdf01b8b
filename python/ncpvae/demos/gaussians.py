"""25 Gaussians on a grid (NCP-VAE, Appendix I): the prior hole in two dimensions, and how it closes."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import data, plots
from ..classifiers import MLPClassifier
from ..distributions import NormalLikelihood
from ..priors import NoiseContrastivePrior, Normal
from ..samplers import SIR, Langevin
from ..train import fit_ncp, fit_vae
from ..vae import VAE, MLPDecoder, MLPEncoder
from .measure import likelihoods, ratio_rows
from .report import Report

LATENT_DIM = 20
HIDDEN = [256, 256, 256]  # with the output layer: the paper's four fully connected layers
STEPS = 10_000
NCP_STEPS = 10_000
STAGE_ONE: dict[str, Any] = {"batch_size": 128, "lr": 2e-3}
STAGE_TWO: dict[str, Any] = {"batch_size": 256, "lr": 4e-3, "patience": None}
PROPOSALS = 1000
LANGEVIN = Langevin(1000, 1e-3)
NUM_LOG_Z = 20_000
IMPORTANCE_SAMPLES = 32


def build_vae() -> VAE:
    """The VAE of Appendix I; the appendix leaves the decoder's σ open, which is the data's own 0.05 here."""
    encoder = MLPEncoder(2, HIDDEN, LATENT_DIM, nn.LeakyReLU)
    decoder = MLPDecoder(LATENT_DIM, HIDDEN, (2,), nn.LeakyReLU)
    return VAE(encoder, decoder, NormalLikelihood(data.GAUSSIANS_STD), Normal(LATENT_DIM))


def share_near_modes(points: Tensor) -> float:
    """Share of points [N, 2] within 4σ of one of the 25 means."""
    distance = torch.cdist(points, data.gaussian_grid_means()).amin(1)
    return float((distance <= 4 * data.GAUSSIANS_STD).float().mean())


def run(folder: Path, steps: int = STEPS, seed: int = 0, progress: bool = True) -> Report:
    """Train both stages, measure, draw; returns the report."""
    report = Report("gaussians", folder, ("base", "NCP, SIR", "NCP, Langevin"))
    torch.manual_seed(seed)
    train, validation, test = (
        data.gaussians(200_000, seed),
        data.gaussians(10_000, seed + 1),
        data.gaussians(50_000, seed + 2),
    )
    vae = build_vae()
    stage_one = fit_vae(vae, train, steps=steps, seed=seed, progress=progress, **STAGE_ONE)
    prior = NoiseContrastivePrior(vae.prior, MLPClassifier(LATENT_DIM, HIDDEN, nn.LeakyReLU))
    stage_two = fit_ncp(
        prior,
        vae=vae,
        data=train,
        validation=validation,
        steps=max(1, steps * NCP_STEPS // STEPS),
        seed=seed,
        progress=progress,
        **STAGE_TWO,
    )
    log_z = prior.estimate_log_normalizer(NUM_LOG_Z)

    nll = likelihoods(vae, prior, test, IMPORTANCE_SAMPLES, PROPOSALS, seed=seed)
    base = vae.prior_distribution()

    def decode(z: Tensor) -> Tensor:
        with torch.no_grad():
            return vae.decode(z).sample()

    sir = SIR(PROPOSALS).sample(prior(), (3000,))
    langevin = LANGEVIN.sample(prior(), (1000,))
    points = {"base": decode(base.sample((3000,))), "SIR": decode(sir.z), "Langevin": decode(langevin.z)}
    shares = {name: share_near_modes(p) for name, p in points.items()}
    bound = -data.gaussian_grid_entropy()

    report.row("log-likelihood, log Ẑ (nats)", f"{-nll['base'].nll:.3f}", f"{-nll['log_z'].nll:.3f}")
    report.row("log-likelihood, SNIS bound (nats)", f"{-nll['base'].nll:.3f}", f"{-nll['snis'].nll:.3f}")
    report.row("  no model can exceed (nats)", f"{bound:.3f}", f"{bound:.3f}")
    report.row("within 4σ of a mode", *(f"{100 * shares[k]:.1f} %" for k in ("base", "SIR", "Langevin")))
    ratio_rows(report, log_z, stage_two, sir.diagnostics)
    report.row(
        "seconds for the samples drawn", "", f"{sir.diagnostics.seconds:.1f}", f"{langevin.diagnostics.seconds:.1f}"
    )
    report.figure(
        log_likelihood_base=-nll["base"].nll,
        log_likelihood_ncp_log_z=-nll["log_z"].nll,
        log_likelihood_ncp_snis=-nll["snis"].nll,
        log_likelihood_bound=bound,
        share_base=shares["base"],
        share_sir=shares["SIR"],
        share_langevin=shares["Langevin"],
        vae_seconds=stage_one.seconds,
        decoder_std=data.GAUSSIANS_STD,
    )
    report.protocol += [
        f"25 Gaussians, σ = {data.GAUSSIANS_STD}; {len(test):,} fresh test points; importance-weighted bound with "
        f"{IMPORTANCE_SAMPLES} draws per point;",
        f"log Z by {NUM_LOG_Z:,} base draws; SNIS and SIR with {PROPOSALS:,} proposals; "
        f"Langevin {LANGEVIN.num_steps:,} steps of {LANGEVIN.step_size:g};",
        f"VAE {stage_one.steps:,} and classifier {stage_two.steps:,} steps; decoder's σ {data.GAUSSIANS_STD}; "
        f"seed {seed}.",
    ]
    panels = [
        ("data", test[:3000]),
        ("base prior", points["base"]),
        ("NCP, SIR", points["SIR"]),
        ("NCP, Langevin", points["Langevin"]),
    ]
    report.pictures.append(plots.save_scatter(folder / "gaussians.png", panels, limit=5.5))
    report.finish()
    return report
