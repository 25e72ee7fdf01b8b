"""`fit_ncp` against the bare loop that it wraps: forward, backward and Adam on the same batches, with no engine at all.

Both build and train the same classifier on 60,000 codes of 50 dimensions held in memory, with a fresh batch of base
draws at every step. The engine's share in a step is what the ratio leaves below 1; it includes the held-out loss.
"""

from itertools import pairwise

import torch
from end_to_end import main
from torch import Tensor, nn

from ncpvae import MLPClassifier, NoiseContrastivePrior, Normal, fit_ncp, objectives
from ncpvae.bench import Case, Workload

N, D, STEPS = 60_000, 50, 300
SIZES = [(512, (256, 256, 256)), (512, (100, 100)), (128, (100, 100))]


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    sizes, steps = (SIZES[1:2], STEPS // 10) if quick else (SIZES, STEPS)
    return [
        Case("fit_ncp", {"N": N, "D": D, "batch": batch, "steps": steps}, settings={"hidden": list(hidden)})
        for batch, hidden in sizes
    ]


def workload(case: Case, device: torch.device) -> Workload:
    batch, steps, hidden = case.shape["batch"], case.shape["steps"], tuple(case.settings["hidden"])
    codes = torch.randn(case.shape["N"], D, device=device) * 0.8 + 0.2
    widths = [D, *hidden, 1]
    multiply_adds = sum(a * b for a, b in pairwise(widths))
    return Workload(
        own=lambda: engine(codes, batch, steps, hidden),
        peers={"eager_loop": lambda: lambda: bare(codes, batch, steps, hidden)},
        unit="step",
        elements=steps,
        flops=3 * 2 * multiply_adds * 2 * batch * steps,  # forward, and backward to weights and activations
        products=True,
    )


def bare(codes: Tensor, batch: int, steps: int, hidden: tuple[int, ...]) -> nn.Module:
    """The loop one would write by hand."""
    classifier = MLPClassifier(D, hidden, nn.SiLU).to(codes.device)
    base = Normal(D).to(codes.device)()
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-3, fused=True)
    for _ in range(steps):
        q = codes[torch.randint(len(codes), (batch,), device=codes.device)]
        logits = classifier(torch.cat([q, base.sample((batch,))]))
        loss = objectives.nce(logits[:batch], logits[batch:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return classifier


def engine(codes: Tensor, batch: int, steps: int, hidden: tuple[int, ...]) -> nn.Module:
    prior = NoiseContrastivePrior(Normal(D), MLPClassifier(D, hidden, nn.SiLU)).to(codes.device)
    fit_ncp(prior, codes, steps=steps, batch_size=batch, progress=False, validate_every=steps)
    return prior


if __name__ == "__main__":
    main("bench_fit_ncp")
