"""sir_resample against softmax and a draw from it, with log-mean weight and effective sample size."""

import math
from functools import partial

import torch
from torch import Tensor

from .. import ops
from .case import Absent, Case, Function, Workload, largest_error, require_memory
from .peers import compiled

NAME = "sir_resample"
SIZES = [(1, 128), (1, 5000), (64, 1000), (64, 5000), (256, 5000), (16, 100_000), (1024, 10_000), (1024, 100_000)]
MANY_DRAWS = [(1, 5000), (64, 5000), (16, 100_000)]
CHECKED_ROWS = 64


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    if quick:
        return [*(_case(B, M) for B, M in [(1, 16), (1, 128), (64, 1000), (64, 5000)]), _case(64, 5000, n=64)]
    sizes = [_case(B, M) for B, M in [(1, 16), *SIZES]]
    return [*sizes, *(_case(B, M, n=64) for B, M in MANY_DRAWS), _case(64, 5000, dtype="bfloat16")]


def _case(B: int, M: int, n: int = 1, dtype: str = "float32") -> Case:
    return Case(NAME, {"B": B, "M": M}, dtype, settings={"n": n})


def workload(case: Case, device: torch.device) -> Workload:
    B, M, n = case.shape["B"], case.shape["M"], case.settings["n"]
    generator = torch.Generator(device).manual_seed(0)
    log_weights = torch.randn(B, M, device=device, generator=generator).to(case.torch_dtype)
    seed = ops.draw_seed(device, generator)
    rows = log_weights[:CHECKED_ROWS].double()
    log_mean, ess = rows.logsumexp(1) - math.log(M), 1 / torch.softmax(rows, 1).square().sum(1)

    def error(outputs: tuple[Tensor, ...]) -> float:
        _, own_log_mean, own_ess = (values[:CHECKED_ROWS] for values in outputs)
        return max(largest_error(own_log_mean, log_mean), largest_error(own_ess / ess, torch.ones_like(ess)))

    def numpy_peer() -> Function:
        if device.type != "cpu":
            raise Absent("NumPy runs on a CPU")
        weights = log_weights.float().numpy()
        return partial(numpy_cumsum, weights, n)

    def gumbel_peer() -> Function:
        require_memory(4 * B * M * n, device, "a Gumbel variate for each weight and draw")
        return partial(eager_gumbel, log_weights, n)

    return Workload(
        own=partial(ops.sir_resample, log_weights, seed, n),
        peers={
            "eager_multinomial": lambda: partial(eager_multinomial, log_weights, n),
            "eager_cumsum": lambda: partial(eager_cumsum, log_weights, n),
            "eager_gumbel": gumbel_peer,
            "compile_multinomial": lambda: partial(compiled(eager_multinomial), log_weights, n),
            "compile_cumsum": lambda: partial(compiled(eager_cumsum), log_weights, n),
            "numpy_cumsum": numpy_peer,
        },
        unit="weight",
        elements=B * M,
        bytes_moved=log_weights.nbytes,
        error=error,
        error_of="log-mean weight in nats and relative error of ESS, whichever is larger",
    )


def eager_multinomial(log_weights: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """What one would write: softmax, torch.multinomial, logsumexp, effective sample size."""
    log_weights = log_weights.float()
    p = torch.softmax(log_weights, 1)
    indices = torch.multinomial(p, n, replacement=True)
    return indices, torch.logsumexp(log_weights, 1) - math.log(log_weights.shape[1]), 1 / p.square().sum(1)


def eager_cumsum(log_weights: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same by inverse CDF, with one exponential. In float32 the CDF is biased where M is large."""
    log_weights = log_weights.float()
    largest = log_weights.amax(1, keepdim=True)
    weights = (log_weights - largest).exp()
    cdf = weights.cumsum(1)
    total = cdf[:, -1:]
    uniform = torch.rand(len(weights), n, device=weights.device, dtype=cdf.dtype) * total
    indices = torch.searchsorted(cdf, uniform).clamp_max(weights.shape[1] - 1)
    log_mean = (largest + total.log())[:, 0] - math.log(weights.shape[1])
    return indices, log_mean, total[:, 0].square() / weights.square().sum(1)


def eager_gumbel(log_weights: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same by a race of exponential variates, one for each weight and draw: Gumbel-max without the logarithms."""
    log_weights = log_weights.float()
    p = torch.softmax(log_weights, 1)
    noise = torch.empty(len(p), n, p.shape[1], device=p.device, dtype=p.dtype).exponential_()
    indices = (p[:, None] / noise).argmax(2)
    return indices, torch.logsumexp(log_weights, 1) - math.log(p.shape[1]), 1 / p.square().sum(1)


def numpy_cumsum(log_weights, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same in NumPy: cumsum in float64 and searchsorted, row by row."""
    import numpy as np

    largest = log_weights.max(1, keepdims=True)
    weights = np.exp(log_weights - largest)
    cdf = weights.cumsum(1, dtype=np.float64)
    uniform = np.random.default_rng().random((len(cdf), n)) * cdf[:, -1:]
    indices = np.stack([np.searchsorted(row, u) for row, u in zip(cdf, uniform, strict=True)])
    log_mean = largest[:, 0] + np.log(cdf[:, -1]) - math.log(cdf.shape[1])
    ess = cdf[:, -1] ** 2 / np.square(weights).sum(1)
    return torch.from_numpy(indices), torch.from_numpy(log_mean), torch.from_numpy(ess)
