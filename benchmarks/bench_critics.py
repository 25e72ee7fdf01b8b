"""A training step with a contrastive critic against the same step of the plain VAE, on Omniglot's convolutions.

Forward, backward and AdamW on one batch of binary images, no engine and no data loading. A hybrid critic shares the
first layers of the encoder, a neural critic has an encoder of its own, whose cost it cannot save.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from end_to_end import main
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ncpvae import VAELoss
from ncpvae.bench import Case, Workload
from ncpvae.recipes import RECIPES, OmniglotConv
from ncpvae.train import adamw

BATCH = 1024
KINDS = [("self", 0), ("hybrid", 5), ("hybrid", 4), ("neural", 0)]


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    batch, kinds = (32, KINDS[:2]) if quick else (BATCH, KINDS)
    return [Case("vae_step", {"B": batch}, settings={"critic": kind, "share": share}) for kind, share in kinds]


def workload(case: Case, device: torch.device) -> Workload:
    x = torch.bernoulli(torch.full((case.shape["B"], 1, 28, 28), 0.15, device=device))
    own, plain = (step(kind, case.settings["share"], x) for kind in (case.settings["critic"], "none"))
    with FlopCounterMode(display=False) as counted:
        plain()
    return Workload(
        own=own,
        peers={"without_critic": lambda: plain},
        unit="example",
        elements=len(x),
        flops=counted.get_total_flops(),  # of the VAE alone
        products=True,
    )


def step(kind: str, share: int, x: Tensor) -> Callable[[], Tensor]:
    """A function that makes one training step."""
    recipe = RECIPES["omniglot-conv"]
    assert isinstance(recipe, OmniglotConv)
    recipe = replace(recipe, critic=replace(recipe.critic, kind=kind, share=share))  # type: ignore[arg-type]
    torch.manual_seed(0)
    vae = recipe.vae().to(x.device)
    critic = recipe.build_critic(vae)
    loss = VAELoss(vae, None if critic is None else critic.to(x.device), recipe.critic.weight)
    optimizer = adamw(0.01, recipe.lr)(list(loss.parameters()))

    def once() -> Tensor:
        total = loss(x)["loss"]
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        return total.detach()

    return once


if __name__ == "__main__":
    main("bench_critics")
