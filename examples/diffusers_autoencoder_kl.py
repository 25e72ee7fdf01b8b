"""A noise contrastive prior for a diffusers AutoencoderKL.

    pip install 'ncpvae[diffusers,data,plot]'
    python examples/diffusers_autoencoder_kl.py --output out

Trains a small AutoencoderKL on MNIST, padded to 32×32, by the plain ELBO. Its latents [4, 4, 4] carry diffusers'
scaling factor, and so lie far from N(0, I): a classifier tells the two apart without learning a ratio. Against a
Gaussian fitted channel by channel it learns one, and the prior that this makes is measured, drawn from and shown on a
page, `report.html`. A few minutes on one core.
"""

import argparse
import json
import warnings
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ncpvae import (
    SIR,
    NoiseContrastivePrior,
    Normal,
    NormalLikelihood,
    ResidualClassifier,
    data,
    fit_ncp,
    metrics,
    plots,
)
from ncpvae.adapters import AdaptedVAE, StandardizedClassifier, codes, from_diffusers, prior_for_codes
from ncpvae.report import Metric, ReportData, Samples, write_report

SIZE = 32
CHANNELS = (8, 16, 32, 32)  # halved three times: 4 × 4 latents
NOISE_STD = 0.7  # σ of p(x|z), x in [−1, 1]; a smaller one makes sharper pictures of latents further from Gaussian
TEST_IMAGES, IMPORTANCE_SAMPLES = 100, 50
PROPOSALS = 5000
COLUMNS = ("JSD(q, base)", "ESS of SIR", "−log p(x), base", "−log p(x), NCP", "trustworthy")  # nats


def build_model() -> AutoencoderKL:
    """AutoencoderKL with 0.2 million parameters; the scaling factor is diffusers' default, 0.18215."""
    stages = len(CHANNELS)
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=CHANNELS,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )


def train_vae(model: AutoencoderKL, images: Tensor, steps: int, batch_size: int = 64, lr: float = 2e-3) -> None:
    """Maximise the ELBO with N(·, σ²) as p(x|z) and N(0, I) as the prior of the latents before they are scaled."""
    optimizer = torch.optim.Adam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        x = images[torch.randint(len(images), (batch_size,))].float() / 127.5 - 1
        q = model.encode(x).latent_dist
        error = (model.decode(q.sample()).sample - x).square().sum((1, 2, 3)) / (2 * NOISE_STD**2)
        loss = (error + q.kl()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"VAE step {step}: −ELBO {loss.item():.1f} nats + const, KL {q.kl().mean().item():.1f}", flush=True)


def candidates(vae: AdaptedVAE, latents: Tensor) -> dict[str, NoiseContrastivePrior]:
    """The same classifier over two bases."""
    small, other = (ResidualClassifier(4, channels=16, blocks=1) for _ in range(2))  # the default is larger
    standard = StandardizedClassifier(small, latents.mean(), latents.std())
    return {
        "N(0, I)": NoiseContrastivePrior(Normal(vae.latent_shape), standard),
        "channel-wise Gaussian": prior_for_codes(latents, "channel", other),
    }


@torch.no_grad()
def page(vae, name, prior, fitted, nll, drawn, images: Tensor, test: Tensor, reconstructions: Tensor) -> ReportData:
    """What there is to show of one prior: figures, samples against the base, neighbours, latents, weights."""
    base = prior.base_distribution()
    ncp, train = vae.images(drawn.z), images.float() / 255
    nearest = metrics.nearest_neighbours(ncp[:32], train)
    some = vae.prepare(test[:1000])
    clouds = {"q(z)": vae.encode(some).sample(), "p(z)": base.sample((1000,))}
    clouds["p_NCP(z)"] = SIR(1000, draws_per_row=4).sample(prior(), (400,)).z
    how = f"importance-weighted bound, {IMPORTANCE_SAMPLES} draws for each of {TEST_IMAGES} test images"
    rows = [
        Metric("test NLL, SNIS bound", "nats per image", nll["base"].nll, nll["NCP"].nll, True,
               nll["base"].standard_error, nll["NCP"].standard_error, how),
        Metric("JSD(q(z) ‖ base)", "nats, ≤ 0.693", fitted.jsd, None, None, protocol="held-out codes"),
    ]  # fmt: skip
    return ReportData(
        title=f"{vae.name}, {name}",
        summary="A diffusers autoencoder, a Gaussian fitted to its latents, and the noise contrastive prior over that.",
        curves={"NCP: nce, nats": {"held out": [(r["step"], r["validation_nce"]) for r in fitted.history]}},
        samples=[Samples(1.0, vae.images(base.sample((64,))), ncp)],
        reconstructions=(test[:16].float() / 255, reconstructions[:16]),
        neighbours=(ncp[:32], train[nearest.indices[:, 0]], nearest.distances[:, 0]),
        log_weights=prior.log_ratio(base.sample((5000,))).detach(),
        ess=drawn.diagnostics.ess,
        num_proposals=drawn.diagnostics.num_proposals,
        latents={which: z.flatten(1) for which, z in clouds.items()},
        metrics=rows,
    )


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500, help="of the VAE and of each classifier")
    parser.add_argument("--data-dir", help="folder that holds mnist; NCPVAE_DATA, or the hub, otherwise")
    parser.add_argument("--output", type=Path, default=Path("diffusers-autoencoder-kl"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    splits = data.mnist(args.data_dir)
    images, test = (data.pad(x, SIZE) for x in (splits.train, splits.test))  # uint8 [N, 1, 32, 32]
    model = build_model()
    train_vae(model, images, args.steps)

    vae = from_diffusers(model, likelihood=NormalLikelihood(NOISE_STD))
    latents = codes(vae, images)  # [N, 4, 4, 4], encoded once; fit_ncp(vae=vae, …) would draw anew at every step
    figures: dict = {"latent_mean": latents.mean().item(), "latent_std": latents.std().item()}
    print(f"{vae.name}: latents {vae.latent_shape}, mean {latents.mean():.3f}, std {latents.std():.3f}")

    panels = []
    print(f"{'base':>22}  {'  '.join(COLUMNS)}")
    for name, prior in candidates(vae, latents).items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of a base too far off; the table tells of it
            fitted = fit_ncp(prior, latents, steps=args.steps, batch_size=256, seed=args.seed, progress=False)
        drawn = SIR(PROPOSALS).sample(prior(), (64,), torch.Generator().manual_seed(args.seed))
        base = prior.base_distribution()
        nll = metrics.importance_weighted_nll(
            test[:TEST_IMAGES],
            vae.encode,
            vae.decode,
            {"base": base.log_prob, "NCP": prior.snis_log_prob},
            num_samples=IMPORTANCE_SAMPLES,
            transform=vae.prepare,
        )
        shown = name, prior, fitted, nll, drawn  # the last one is the page's
        values = fitted.jsd, float(drawn.diagnostics.ess.mean()), nll["base"].nll, nll["NCP"].nll, fitted.trustworthy
        figures[name] = dict(zip(COLUMNS, values, strict=True))
        cells = (f"{value:{len(column)}.3f}" for column, value in zip(COLUMNS[:-1], values, strict=False))
        print(f"{name:>22}  {'  '.join(cells)}  {fitted.trustworthy}", flush=True)
        panels += [(name, vae.images(base.sample((64,)))), (f"NCP, {name}", vae.images(drawn.z))]

    with torch.no_grad():
        reconstructions = vae.images(vae.encode(vae.prepare(test[:64])).mean)
    plots.save_images(args.output / "samples.png", panels)
    panels = [("test images", test[:64].float() / 255), ("reconstructions", reconstructions)]
    plots.save_images(args.output / "reconstructions.png", panels)
    write_report(page(vae, *shown, images, test, reconstructions), args.output / "report.html")
    (args.output / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"pictures and figures are in {args.output}")
    return figures


if __name__ == "__main__":
    main()
