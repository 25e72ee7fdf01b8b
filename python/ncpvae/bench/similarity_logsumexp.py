"""similarity_logsumexp against logsumexp of the dense scores."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from .case import BOTH, FORWARD, Absent, Case, Function, Workload, call, largest_error, require_memory
from .peers import compiled, keops

NAME = "similarity_logsumexp"
TEMPERATURES = (0.07, 0.01)
CHECKED_ROWS = 256
CHUNK_ROWS = 512  # of the float64 truth
KEOPS_PAIRS = {FORWARD: 1 << 24, BOTH: 1 << 20}  # beyond, its generic loop takes minutes on a CPU


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    both = (FORWARD, BOTH)
    if quick:
        small = [_case(N, 128, d) for N in (64, 256) for d in both]
        return [_case(2, 2, FORWARD), *small, _case(4096, 128, BOTH)]
    rows = (64, 256, 1024, 4096, 16_384, 65_536) if device.type == "cuda" else (64, 256, 1024, 4096, 16_384)
    sizes = [(N, 128) for N in rows] + [(4096, D) for D in (16, 64, 512)]
    cold = [_case(4096, 128, d, temperature=TEMPERATURES[1]) for d in both]
    return [_case(2, 2, FORWARD), *(_case(N, D, d) for N, D in sizes for d in both), *cold]


def _case(N: int, D: int, direction: str, temperature: float = TEMPERATURES[0]) -> Case:
    return Case(NAME, {"N": N, "K": N, "D": D}, "float32", direction, {"temperature": temperature})


def workload(case: Case, device: torch.device) -> Workload:
    N, K, D = (case.shape[letter] for letter in "NKD")
    generator, dtype = torch.Generator(device).manual_seed(0), case.torch_dtype
    z, x = (F.normalize(torch.randn(n, D, device=device, generator=generator)).to(dtype) for n in (N, K))
    arguments = (z, x, torch.tensor(1 / case.settings["temperature"], dtype=dtype, device=device))
    passes = 1 if case.direction == FORWARD else 4  # scores; backward the scores again, and a product for each gradient

    def dense(function: Callable[..., Any]) -> Function:
        require_memory((2 if case.direction == FORWARD else 6) * N * K * z.element_size(), device, "N×K scores")
        return call(case, function, *arguments)

    return Workload(
        own=call(case, ops.similarity_logsumexp, *arguments),
        peers={
            "eager_dense": partial(dense, eager_dense),
            "eager_scaled_first": partial(dense, eager_scaled_first),
            "compile_dense": lambda: dense(compiled(eager_dense)),
            "linear_cross_entropy": lambda: call(case, _cross_entropy(N, K, device), *arguments),
            "pykeops": lambda: call(case, _keops(case), *arguments),
        },
        unit="pair",
        elements=N * K,
        bytes_moved=(z.nbytes + x.nbytes) * (1 if case.direction == FORWARD else 3),
        flops=2 * passes * N * K * D,
        products=True,
        exponentials=N * K if case.direction == FORWARD else 2 * N * K,
        error=partial(_error, case, arguments),
        error_of=("logsumexp, nats" if case.direction == FORWARD else "gradient in z, relative to its largest")
        + f", largest of {min(N, CHECKED_ROWS)} rows",
    )


def eager_dense(z: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """What one would write."""
    s = scale * (z @ x.T)
    return s.logsumexp(1), s.logsumexp(0)


def eager_scaled_first(z: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The same with the scale in the smaller factor, one pass over the scores less."""
    s = (scale * z) @ x.T
    return s.logsumexp(1), s.logsumexp(0)


def _cross_entropy(N: int, K: int, device: torch.device) -> Callable[..., Any]:
    """torch's chunked cross entropy in both directions: logsumexp less the diagonal, the InfoNCE objective."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Absent(f"torch {torch.__version__} has no linear_cross_entropy")
    if N != K:
        raise Absent("linear_cross_entropy needs a target in each row and column")
    options, target = torch.nn.LinearCrossEntropyOptions(), torch.arange(N, device=device)

    def losses(z: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        scaled = scale * z
        rows = F.linear_cross_entropy(scaled, x, target, options=options)
        return rows, F.linear_cross_entropy(x, scaled, target, options=options)

    return losses


def _keops(case: Case) -> Callable[..., Any]:
    """KeOps, one reduction for each direction."""
    N, K, D = (case.shape[letter] for letter in "NKD")
    if KEOPS_PAIRS[case.direction] < N * K:
        raise Absent(f"more than {KEOPS_PAIRS[case.direction]:,} pairs are left out, for time")
    genred = keops().Genred
    variables = [f"z=Vi({D})", f"x=Vj({D})"]
    rows, columns = (genred("(z|x)", variables, reduction_op="LogSumExp", axis=axis) for axis in (1, 0))

    def both_directions(z: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        scaled = scale * z
        return rows(scaled, x)[:, 0], columns(scaled, x)[:, 0]

    return both_directions


def _error(case: Case, arguments: tuple[Tensor, ...], outputs: Any) -> float | None:
    """Of logsumexp, or of the gradient in z, over the first rows; None for peers that compute something related."""
    z, x, scale = (t.detach().double() for t in arguments)
    scores = scale * (z[:CHECKED_ROWS] @ x.T)
    rows, columns = outputs if case.direction == FORWARD else outputs[0]
    if rows.dim() == 0:
        return None
    if case.direction == FORWARD:
        of_columns = (scale * (x[:CHECKED_ROWS] @ z.T)).logsumexp(1)
        truths = ((rows, scores.logsumexp(1)), (columns, of_columns))
        return max(largest_error(values[:CHECKED_ROWS], truth) for values, truth in truths)
    parts = [(scale * (part @ x.T)).logsumexp(0) for part in z.split(CHUNK_ROWS)]
    of_columns = torch.stack(parts).logsumexp(0)
    weights = torch.softmax(scores, 1) / len(z) + torch.exp(scores - of_columns) / len(x)
    return largest_error(outputs[1][0][:CHECKED_ROWS], scale * (weights @ x), relative=True)
