"""A noise contrastive prior for any two functions: one that encodes, one that decodes.

    pip install 'ncpvae[data,plot]'
    python examples/two_callables.py --output out

The two are principal component analysis and its inverse here, an autoencoder that is no network and has no prior. The
Gaussian that fits its codes is the classical way to draw from it; the classifier learns what that Gaussian misses.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from ncpvae import SIR, MLPClassifier, data, fit_ncp, plots
from ncpvae.adapters import codes, from_callables, prior_for_codes

LATENT_DIM = 12
PROPOSALS = 20_000


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000, help="of the classifier")
    parser.add_argument("--data-dir", help="folder that holds mnist; NCPVAE_DATA, or the hub, otherwise")
    parser.add_argument("--output", type=Path, default=Path("two-callables"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    images = data.mnist(args.data_dir).train
    flat = images.flatten(1).float() / 255
    mean = flat.mean(0)
    *_, components = torch.pca_lowrank(flat - mean, LATENT_DIM, center=False)  # [784, D]

    def encode(x: Tensor) -> Tensor:
        return (x.flatten(1) - mean) @ components

    def decode(z: Tensor) -> Tensor:
        return (z @ components.T + mean).view(-1, *images.shape[1:])

    vae = from_callables(encode, decode, LATENT_DIM, name="PCA")
    z = codes(vae, images)
    prior = prior_for_codes(z, classifier=MLPClassifier(LATENT_DIM))
    fitted = fit_ncp(prior, z, steps=args.steps, seed=args.seed, progress=False)
    drawn = SIR(PROPOSALS).sample(prior(), (64,))
    figures = {"jsd": fitted.jsd, "accuracy": fitted.accuracy, "ess": float(drawn.diagnostics.ess.mean())}
    for name, value in figures.items():
        print(f"{name:>9}  {value:.3f}")
    panels = [
        ("images, decoded from their codes", vae.images(z[:64])),
        ("Gaussian", vae.images(prior.base_distribution().sample((64,)))),
        ("noise contrastive prior", vae.images(drawn.z)),
    ]
    plots.save_images(args.output / "samples.png", panels)
    (args.output / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"pictures and figures are in {args.output}")
    return figures


if __name__ == "__main__":
    main()
