"""A hierarchical VAE of your own: a ladder VAE with the protocol of `ncpvae.hierarchy`.

    pip install 'ncpvae[data,plot]'
    python examples/ladder_vae.py --output out

What the protocol wants is `groups`, `encode`, `posterior` and `walk`. With these the model has the training objective,
draws at a temperature, draws below given latents, and whatever else asks for nothing but the walk.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent
from torch.nn import functional as F

from ncpvae import data, plots
from ncpvae.distributions import diagonal_normal, normal_parameters
from ncpvae.hierarchy import Ancestral, Given, Group, HierarchicalLoss, KLWarmup, Select, check_selected, infer
from ncpvae.train.engine import train

TEST_IMAGES = 1000


class LadderVAE(nn.Module):
    """K groups of vectors; q(z_k | z_<k, x) is the product of the base and of a Normal that the encoder sees in x.

    Args:
        pixels: of x, which is flattened.
        dims: of z_1 … z_K, from the top.
        width: of the layers.

    Source: Sønderby, Raiko, Maaløe, Sønderby, Winther, "Ladder variational autoencoders", NeurIPS 2016.
    """

    def __init__(self, pixels: int, dims: Sequence[int] = (8, 16, 32), width: int = 256):
        super().__init__()
        self.groups = tuple(Group((dim,), (width,) if k else None, k + 1) for k, dim in enumerate(dims))
        sizes, up = [pixels] + [width] * (len(dims) - 1), tuple(reversed(dims))
        self.up = nn.ModuleList(self.layer(size, width) for size in sizes)
        self.evidence = nn.ModuleList(nn.Linear(width, 2 * dim) for dim in up)
        self.down = nn.ModuleList(self.layer(dim, width) for dim in dims)
        self.base = nn.ModuleList(nn.Linear(width, 2 * dim) for dim in dims[1:])
        self.image = nn.Linear(width, pixels)

    @staticmethod
    def layer(before: int, after: int) -> nn.Module:
        return nn.Sequential(nn.Linear(before, after), nn.BatchNorm1d(after), nn.LeakyReLU(0.1))

    @staticmethod
    def normal(parameters: Tensor) -> Distribution:
        mean, raw = parameters.chunk(2, dim=1)
        return diagonal_normal(mean, F.softplus(raw) + 1e-3)

    def encode(self, x: Tensor) -> list[Distribution]:
        """The encoder's Normals, from the top."""
        h, seen = x.flatten(1), []
        for layer, head in zip(self.up, self.evidence, strict=True):
            h = layer(h)
            seen.append(self.normal(head(h)))
        return seen[::-1]

    def posterior(self, k: int, base: Distribution, context: Tensor | None, encoded: list[Distribution]):
        if k == 0:
            return encoded[0]
        (mean, std), (base_mean, base_std) = normal_parameters(encoded[k]), normal_parameters(base)
        precision, base_precision = std**-2, base_std**-2
        total = precision + base_precision
        return diagonal_normal((mean * precision + base_mean * base_precision) / total, total**-0.5)

    def walk(self, select: Select, batch: int) -> Distribution:
        zero = self.image.weight.new_zeros(batch, *self.groups[0].shape)
        base, context = diagonal_normal(zero, torch.ones_like(zero)), None
        for k, layer in enumerate(self.down):
            if k > 0:
                base = self.normal(self.base[k - 1](context))
            z = check_selected("LadderVAE", self.groups, k, select(k, base, context), batch)
            context = layer(z) if k == 0 else context + layer(z)
        return Independent(Bernoulli(logits=self.image(context)), 1)


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--data-dir", help="folder that holds mnist; NCPVAE_DATA, or the hub, otherwise")
    parser.add_argument("--output", type=Path, default=Path("ladder-vae"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    splits = data.mnist(args.data_dir)
    shape = splits.train.shape[1:]
    vae = LadderVAE(shape.numel())
    loss, weight = HierarchicalLoss(vae), KLWarmup(args.steps)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(args.steps):
            chosen = splits.train[torch.randint(0, len(splits.train), (128,))].flatten(1)
            yield torch.bernoulli(chosen / 255), torch.full((128,), weight(step))

    def terms(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        x, kl_weight = batch
        return loss(x, float(kl_weight[0]))

    train(loss, terms, batches(), steps=args.steps, lr=1e-3, seed=args.seed, progress=False)

    test = torch.bernoulli(splits.test[:TEST_IMAGES].flatten(1) / 255)
    with torch.no_grad():
        figures = {name: float(value) for name, value in loss(test).items()}
        _, path = infer(vae, test)
        figures |= {f"kl of group {k + 1}": float(kl) for k, kl in enumerate(path.kl().mean(0))}
        top = [path.z[0][:1].expand(64, -1)]
        panels = [("prior", vae.walk(Ancestral(), 64).mean), ("prior at 0.7", vae.walk(Ancestral(0.7), 64).mean)]
        panels += [("one first group, the others drawn", vae.walk(Given(top, otherwise=Ancestral()), 64).mean)]
    for name, value in figures.items():
        print(f"{name:>15}  {value:.2f}")
    plots.save_images(args.output / "samples.png", [(title, x.view(-1, *shape)) for title, x in panels])
    (args.output / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"pictures and figures are in {args.output}")
    return figures


if __name__ == "__main__":
    main()
