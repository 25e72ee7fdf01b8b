"""Sampling end to end, by SIR and by Langevin chains, against the loops one would write in plain torch."""

from collections.abc import Callable
from functools import partial

import torch
from end_to_end import main
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ncpvae import SIR, Langevin, MLPClassifier, NoiseContrastivePrior, Normal, ResidualClassifier, ops
from ncpvae.bench import Case, Function, Workload, require_memory

D = 50
WIDTH, LAYERS = 256, 2
MAPS, CHANNELS, CONTEXT = (20, 8, 8), 32, 16
STEP = 1e-2


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    """SIR over B and M for each classifier, and chains of T steps for each energy."""
    large = device.type == "cuda"
    counts = (1000, 5000) if quick else (1000, 5000, 20_000)
    mlp = [Case("prior.sample", {"B": 64, "M": M, "D": D}, settings={"classifier": "mlp"}) for M in counts]
    B, M = (64, 5000) if large else (2, 1000)
    maps = [
        Case("prior.sample", {"B": B, "M": M, "C": MAPS[0], "H": MAPS[1], "W": MAPS[2]}, settings={"classifier": name})
        for name in ("residual", "residual with context")
    ]
    lengths = {"none": (1000,), "mlp": (5, 50, 1000), "conv": (1000,)}
    chains = [
        Case("langevin_chain", {"B": 64, "T": T // 10 if quick and T > 50 else T}, settings={"energy": energy})
        for energy, steps in lengths.items()
        for T in steps
    ]
    return [*mlp, *([] if quick else maps), *chains]


def workload(case: Case, device: torch.device) -> Workload:
    torch.manual_seed(0)
    return _chain(case, device) if case.op == "langevin_chain" else _resampling(case, device)


# ---------------------------------------------------------------------------------------------------------
# Sampling-importance-resampling
# ---------------------------------------------------------------------------------------------------------


def _resampling(case: Case, device: torch.device) -> Workload:
    B, M, kind = case.shape["B"], case.shape["M"], case.settings["classifier"]
    channels = CONTEXT if kind == "residual with context" else 0
    if kind == "mlp":
        event, classifier = (D,), MLPClassifier(D, (WIDTH,) * LAYERS, nn.SiLU)
    else:
        event, classifier = MAPS, ResidualClassifier(MAPS[0], CHANNELS, channels)
    context = torch.randn(B, channels, *MAPS[1:], device=device) if channels else None
    classifier = classifier.to(device).eval()
    one = [torch.randn(1, *event, device=device), *([] if context is None else [context[:1]])]
    base = Normal(event).to(device)()
    if context is not None:
        base = base.expand(context.shape[:1])
    distribution = NoiseContrastivePrior(base, classifier)(context)
    shape = (B,) if context is None else ()

    def eager(loop: Callable[..., Tensor], rows: int) -> Function:
        row = WIDTH if kind == "mlp" else CHANNELS * MAPS[1] * MAPS[2]
        require_memory(4 * rows * row * 4, device, f"the activations of {rows:,} rows")
        return lambda: loop(classifier, context, B, M, event, device)

    return Workload(
        own=lambda: distribution.sample(shape, sampler=SIR(num_proposals=M)),
        peers={
            "eager_all_at_once": lambda: eager(all_at_once, B * M),
            "eager_row_by_row": lambda: eager(row_by_row, M),
            "ncpvae_bfloat16": lambda: (
                lambda: distribution.sample(shape, sampler=SIR(num_proposals=M, dtype=torch.bfloat16))
            ),
            # A further way of sampling that is to be compared is a line here: name → what makes the function.
        },
        unit="proposal",
        elements=B * M,
        flops=flops_of(classifier, *one) * B * M,
        products=True,
    )


def flops_of(network: nn.Module, *inputs: Tensor) -> int:
    """Of one call, counted where they happen: in convolutions and linear layers."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*inputs)
    return counter.get_total_flops()


@torch.no_grad()
def all_at_once(
    classifier: nn.Module, context: Tensor | None, B: int, M: int, event: tuple[int, ...], device: torch.device
) -> Tensor:
    """The loop without a loop: all proposals, softmax, multinomial, gather."""
    z = torch.randn(B, M, *event, device=device)
    weights = torch.softmax(classifier(z, context), 1)
    index = torch.multinomial(weights, 1)[:, 0]
    return z[torch.arange(B, device=device), index]


@torch.no_grad()
def row_by_row(
    classifier: nn.Module, context: Tensor | None, B: int, M: int, event: tuple[int, ...], device: torch.device
) -> Tensor:
    """One sample after the other, the M proposals of each at once."""
    chosen = []
    for row in range(B):
        z = torch.randn(1, M, *event, device=device)
        log_ratio = classifier(z, None if context is None else context[row : row + 1])
        chosen.append(z[0, torch.multinomial(torch.softmax(log_ratio, 1), 1)[0, 0]])
    return torch.stack(chosen)


# ---------------------------------------------------------------------------------------------------------
# Langevin dynamics
# ---------------------------------------------------------------------------------------------------------


class SmallConv(nn.Module):
    """Two convolutions and a mean."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = (nn.Conv2d(MAPS[0], CHANNELS, 3, padding=1), nn.Conv2d(CHANNELS, 1, 3, padding=1))
        self.network = nn.Sequential(convolutions[0], nn.SiLU(), convolutions[1])

    def forward(self, z: Tensor) -> Tensor:
        return self.network(z.flatten(0, -4)).mean((1, 2, 3)).view(z.shape[:-3])


def _chain(case: Case, device: torch.device) -> Workload:
    B, T, energy = case.shape["B"], case.shape["T"], case.settings["energy"]
    event = MAPS if energy == "conv" else (D,)
    network: nn.Module | None = None
    flops, own = 0, partial(chain_of_steps, B, T, event, device)
    if energy != "none":
        network = SmallConv() if energy == "conv" else MLPClassifier(D, (WIDTH,) * LAYERS, nn.SiLU)
        prior = NoiseContrastivePrior(Normal(event), network).to(device)
        own = partial(prior.sample, (B,), sampler=Langevin(T, STEP))
        flops = 2 * flops_of(network, torch.randn(1, *event, device=device))  # forward, and backward to z alone
    return Workload(
        own=own,
        peers={
            "eager_loop": lambda: partial(eager_chain, network, B, T, event, device),
            # A further way of running the chain is a line here, such as the sampler with cuda_graph=True.
        },
        unit="step",
        elements=T,
        bytes_moved=12 * B * torch.Size(event).numel() * T,
        flops=flops * B * T,
        products=True,
    )


def chain_of_steps(B: int, T: int, event: tuple[int, ...], device: torch.device) -> Tensor:
    """The op in a loop, with no energy but the base's: what a chain costs without its network."""
    z, seed = torch.randn(B, *event, device=device), ops.draw_seed(device)
    score, mean, std = torch.zeros_like(z), torch.zeros(event, device=device), torch.ones(event, device=device)
    next_step = torch.tensor([0, 1], device=device)
    for _ in range(T):
        ops.langevin_step_(z, score, seed, STEP, mean, std)
        seed = seed + next_step
    return z


def eager_chain(network: nn.Module | None, B: int, T: int, event: tuple[int, ...], device: torch.device) -> Tensor:
    """z + ½λ∇(log r + log p) + √λ ε; the gradient of log p = log N(0, I) is written out, since it is just −z."""
    z = torch.randn(B, *event, device=device)
    for _ in range(T):
        gradient = -z
        if network is not None:
            (score,) = torch.autograd.grad(network(z.requires_grad_()).sum(), z)
            z, gradient = z.detach(), score - z.detach()
        z = z + 0.5 * STEP * gradient + STEP**0.5 * torch.randn_like(z)
    return z


if __name__ == "__main__":
    main("bench_sample")
