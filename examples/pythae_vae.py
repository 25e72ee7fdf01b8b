"""A noise contrastive prior for a VAE of pythae.

    pip install 'ncpvae[pythae,data,plot]'
    python examples/pythae_vae.py --output out

Trains pythae's VAE with its own encoder, decoder and loss on binarised MNIST. Its prior while training was N(0, I), so
that is the base here too, and the test likelihoods under base and noise contrastive prior can be compared.
"""

import argparse
import json
from pathlib import Path

import torch
from pythae.models import VAE, VAEConfig
from torch import Tensor

from ncpvae import SIR, MLPClassifier, NoiseContrastivePrior, Normal, data, fit_ncp, metrics, plots
from ncpvae.adapters import from_pythae

LATENT_DIM = 16
PROPOSALS = 5000
TEST_IMAGES, IMPORTANCE_SAMPLES = 500, 100


def train_vae(model: VAE, images: Tensor, steps: int, batch_size: int = 128, lr: float = 1e-3) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for step in range(steps):
        x = data.binarize(images[torch.randint(len(images), (batch_size,))])
        loss = model({"data": x}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 500 == 0 or step == steps - 1:
            print(f"VAE step {step}: −ELBO {loss.item():.1f} nats", flush=True)


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5000, help="of the VAE; the classifier takes half as many")
    parser.add_argument("--data-dir", help="folder that holds mnist; NCPVAE_DATA, or the hub, otherwise")
    parser.add_argument("--output", type=Path, default=Path("pythae-vae"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    splits = data.mnist(args.data_dir)
    config = VAEConfig(input_dim=tuple(splits.train.shape[1:]), latent_dim=LATENT_DIM, reconstruction_loss="bce")
    model = VAE(config)
    train_vae(model, splits.train, args.steps)

    vae = from_pythae(model)
    prior = NoiseContrastivePrior(Normal(vae.latent_shape), MLPClassifier(LATENT_DIM))
    steps = max(1, args.steps // 2)
    fitted = fit_ncp(
        prior, vae=vae, data=splits.train, transform=data.binarize, steps=steps, seed=args.seed, progress=False
    )
    log_z = prior.estimate_log_normalizer(100_000)
    nll = metrics.importance_weighted_nll(
        splits.test[:TEST_IMAGES],
        vae.encode,
        vae.decode,
        {"base": prior.base_distribution().log_prob, "NCP": prior.log_prob, "NCP, SNIS bound": prior.snis_log_prob},
        num_samples=IMPORTANCE_SAMPLES,
        transform=data.binarize,
        seed=args.seed,
    )
    drawn = SIR(PROPOSALS).sample(prior(), (64,))
    figures = {
        "jsd": fitted.jsd,
        "log_z": log_z.value,
        "log_z_standard_error": log_z.standard_error,
        "ess": float(drawn.diagnostics.ess.mean()),
        **{f"nll {name}": likelihood.nll for name, likelihood in nll.items()},
    }
    for name, value in figures.items():
        print(f"{name:>22}  {value:.3f}")
    panels = [
        ("test images", splits.test[:64].float() / 255),
        ("N(0, I)", vae.images(prior.base_distribution().sample((64,)))),
        ("noise contrastive prior", vae.images(drawn.z)),
    ]
    plots.save_images(args.output / "samples.png", panels)
    (args.output / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"pictures and figures are in {args.output}")
    return figures


if __name__ == "__main__":
    main()
