"""gaussian_logsumexp against the expanded matrix products and the broadcast in plain torch."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .case import BOTH, FORWARD, Absent, Case, Function, Workload, call, largest_error, require_memory
from .peers import compiled, keops

NAME = "gaussian_logsumexp"
SIZES = [(64, 64, 32), (512, 512, 32), (4096, 4096, 32), (1024, 60_000, 32)]
STDS = (0.1, 0.01)
CHECKED_ROWS = 256
BROADCAST_BYTES = 1 << 30  # beyond, the N×K×D form is left out


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    both = (FORWARD, BOTH)
    sizes = [(64, 64, 32), (512, 512, 32), (4096, 4096, 32)] if quick else SIZES
    narrow = [] if quick else [_case((1024, 4096, 32), d, std) for std in STDS for d in both]
    return [_case((2, 2, 2), FORWARD), *(_case(size, d) for size in sizes for d in both), *narrow]


def _case(size: tuple[int, int, int], direction: str, std: float = 1.0) -> Case:
    return Case(NAME, dict(zip("NKD", size, strict=True)), "float32", direction, {"std": std})


def workload(case: Case, device: torch.device) -> Workload:
    N, K, D = (case.shape[letter] for letter in "NKD")
    generator, std = torch.Generator(device).manual_seed(0), case.settings["std"]
    mean, log_std = (torch.randn(K, D, device=device, generator=generator) for _ in range(2))
    log_std = math.log(std) + 0.1 * log_std
    noise = torch.randn(N, D, device=device, generator=generator)
    z = mean[torch.arange(N, device=device) % K] + log_std[torch.arange(N, device=device) % K].exp() * noise
    arguments = tuple(t.to(case.torch_dtype) for t in (z, mean, log_std))
    # The square takes two multiply-adds; backward again, and two for each of the gradients in z, mean and log std.
    fused = 2 if case.direction == FORWARD else 2 + 2 + 2 * 3

    def eager(function: Callable[..., Any], per_pair: int) -> Function:
        size = per_pair * N * K * arguments[0].element_size() * (1 if case.direction == FORWARD else 2)
        require_memory(2 * size, device, f"{per_pair}·N·K numbers")
        return call(case, function, *arguments)

    def broadcast(function: Callable[..., Any]) -> Function:
        if N * K * D * 4 > BROADCAST_BYTES:
            raise Absent(f"would hold N×K×D numbers, {4e-9 * N * K * D:.1f} GB")
        return eager(function, D)

    return Workload(
        own=call(case, ops.gaussian_logsumexp, *arguments),
        peers={
            "eager_two_products": partial(eager, eager_two_products, 3),
            "eager_one_product": partial(eager, eager_one_product, 2),
            "eager_broadcast": partial(broadcast, eager_broadcast),
            "compile_one_product": lambda: eager(compiled(eager_one_product), 2),
            "compile_broadcast": lambda: eager(compiled(eager_broadcast), 1),
            "pykeops": lambda: call(case, _keops(D), *arguments),
        },
        unit="pair·dimension",
        elements=N * K * D,
        bytes_moved=sum(t.nbytes for t in arguments) * (1 if case.direction == FORWARD else 3),
        flops=2 * fused * N * K * D,
        exponentials=N * K if case.direction == FORWARD else 2 * N * K,
        error=partial(_error, case, arguments),
        error_of=("log-density, nats" if case.direction == FORWARD else "gradient in z, relative to its largest")
        + f", largest of {min(N, CHECKED_ROWS)} rows",
    )


def _constant(log_std: Tensor) -> Tensor:
    return -log_std.sum(1) - 0.5 * log_std.shape[1] * math.log(2 * math.pi)


def eager_two_products(z: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """The square expanded into z²·σ⁻² − 2z·μσ⁻² + μ²σ⁻², as it is usually written. Inaccurate at small std."""
    precision = torch.exp(-2 * log_std)
    square = z.square() @ precision.T - 2 * z @ (mean * precision).T + (mean.square() * precision).sum(1)
    return torch.logsumexp(-0.5 * square + _constant(log_std), 1)


def eager_one_product(z: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """The same as one product of twice the depth with everything else in its bias: the fewest passes over N×K."""
    precision = torch.exp(-2 * log_std)
    bias = _constant(log_std) - 0.5 * (mean.square() * precision).sum(1)
    columns = torch.cat([-0.5 * precision, mean * precision], 1)
    return torch.addmm(bias, torch.cat([z.square(), z], 1), columns.T).logsumexp(1)


def eager_broadcast(z: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """The square as it stands, through an N×K×D tensor."""
    square = ((z[:, None] - mean) * torch.exp(-log_std)).square().sum(2)
    return torch.logsumexp(-0.5 * square + _constant(log_std), 1)


def _keops(D: int) -> Callable[..., Any]:
    """KeOps, the square as it stands."""
    variables = [f"z=Vi({D})", f"m=Vj({D})", f"s=Vj({D})", "c=Vj(1)"]
    reduce = keops().Genred("c-IntCst(1)/IntCst(2)*SqNorm2((z-m)*s)", variables, reduction_op="LogSumExp", axis=1)

    def logsumexp(z: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
        return reduce(z, mean, torch.exp(-log_std), _constant(log_std)[:, None])[:, 0]

    return logsumexp


def _error(case: Case, arguments: tuple[Tensor, ...], outputs: Any) -> float:
    """Of the log-density, or of the gradient of its mean in z, over the first rows."""
    z, mean, log_std = (t.detach().double() for t in arguments)
    rows = z[:CHECKED_ROWS].requires_grad_()
    truth = ops.reference.gaussian_logsumexp(rows, mean, log_std)
    if case.direction == FORWARD:
        return largest_error(outputs[:CHECKED_ROWS], truth)
    (gradient,) = torch.autograd.grad(truth.sum() / len(z), rows)
    return largest_error(outputs[1][0][:CHECKED_ROWS], gradient, relative=True)
