"""A quick look at the ops' speed on this machine: `ncpvae bench`. The repository's `benchmarks/` measure more."""

from collections.abc import Callable

import torch
from torch import Tensor

from . import ops
from .info import kernel_of

Case = tuple[str, str, Callable[[], object], Callable[[], object]]  # op, size, the op, eager torch


def cases(device: torch.device) -> list[Case]:
    """Each op at a size of everyday use, and what one would write without it."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    seed = ops.draw_seed(device, generator)
    w, z, score = normal(64, 5000), normal(64, 5120), normal(64, 5120)
    mean, std = torch.zeros_like(z[0]), torch.ones_like(z[0])
    a, b = (torch.nn.functional.normalize(normal(1024, 128)).requires_grad_() for _ in range(2))
    scale = torch.tensor(1 / 0.07, device=device)
    codes, means, log_stds = normal(2048, 32), normal(2048, 32), 0.1 * normal(2048, 32)

    def eager_sir() -> object:
        p = torch.softmax(w, 1)
        return torch.multinomial(p, 1, replacement=True), torch.logsumexp(w, 1), 1 / p.square().sum(1)

    def eager_similarity(z: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        s = scale * (z @ x.T)
        return s.logsumexp(1), s.logsumexp(0)

    def both_passes(function: Callable) -> object:
        rows, columns = function(a, b, scale)
        return torch.autograd.grad(rows.mean() + columns.mean(), (a, b))

    def eager_gaussian() -> object:
        inverse = (-2 * log_stds).exp()
        square = codes.square() @ inverse.T - 2 * codes @ (means * inverse).T + (means.square() * inverse).sum(1)
        return (-0.5 * square - log_stds.sum(1)).logsumexp(1)

    return [
        ("sir_resample", "64 × 5,000", lambda: ops.sir_resample(w, seed), eager_sir),
        (
            "langevin_step",
            "64 × 5,120",
            lambda: ops.langevin_step(z, score, seed, 0.01, mean, std),
            lambda: z + 0.005 * (score + (mean - z) / std.square()) + 0.1 * torch.randn_like(z),
        ),
        (
            "similarity_logsumexp",
            "1,024 × 1,024 × 128, both passes",
            lambda: both_passes(ops.similarity_logsumexp),
            lambda: both_passes(eager_similarity),
        ),
        (
            "gaussian_logsumexp",
            "2,048 × 2,048 × 32, forward",
            lambda: ops.gaussian_logsumexp(codes, means, log_stds),
            eager_gaussian,
        ),
    ]


def bench(seconds: float = 0.3) -> str:
    """A table: median time of each op and of eager torch, and their ratio.

    Args:
        seconds: of measuring for each case.
    """
    from torch.utils.benchmark import Timer

    if not seconds > 0:
        raise ValueError(f"bench: seconds must be > 0, got {seconds}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    lines = [f"{where}, torch {torch.__version__}, float32; medians, μs", ""]
    lines.append(f"{'op':<22}{'size':<34}{'kernel':<13}{'ncpvae':>10}{'eager':>10}{'ratio':>8}")
    for op, size, own, eager in cases(device):
        medians = []
        for function in (own, eager):
            timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
            medians.append(1e6 * timer.blocked_autorange(min_run_time=seconds / 2).median)
        kernel = kernel_of(op, device.type.upper())
        ratio = f"{medians[1] / medians[0]:.1f} ×"
        lines.append(f"{op:<22}{size:<34}{kernel:<13}{medians[0]:>10,.0f}{medians[1]:>10,.0f}{ratio:>8}")
    return "\n".join(lines)
