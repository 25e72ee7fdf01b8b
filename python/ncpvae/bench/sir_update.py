"""sir_update: proposals drawn, weighted and dropped chunk by chunk, against all of them at once."""

import torch
from torch import Tensor

from .. import ops
from .case import Case, Function, Workload, require_memory
from .sir_resample import eager_multinomial

NAME = "sir_update"
B, D = 16, 8
COUNTS = (1_000, 10_000, 100_000, 1_000_000)


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    return [Case(NAME, {"B": B, "M": M, "D": D}) for M in (COUNTS[:2] if quick else COUNTS)]


def workload(case: Case, device: torch.device) -> Workload:
    """Proposals are standard Normal and their log-weight is linear, so that little but the resampling is timed."""
    B, M, D = (case.shape[letter] for letter in "BMD")
    direction = torch.randn(D, device=device, generator=torch.Generator(device).manual_seed(0))

    def proposals(count: int) -> Tensor:
        return torch.randn(count, B, D, device=device)

    def at_once(resample) -> Tensor:
        z = proposals(M)
        indices, *_ = resample((z @ direction).T)
        return z[indices[:, 0], torch.arange(B, device=device)]

    def streamed() -> Tensor:
        seed, state, chosen = ops.draw_seed(device), ops.sir_state(B, device=device), torch.zeros(B, D, device=device)
        row = torch.arange(B, device=device)
        for start in range(0, M, ops.reference.TILE):
            z = proposals(min(ops.reference.TILE, M - start))
            before = state.indices[:, 0]
            state = ops.sir_update(state, (z @ direction).T, seed)
            index = state.indices[:, 0]
            chosen = torch.where((index != before)[:, None], z[(index - start).clamp_min(0), row], chosen)
        return chosen

    def eager() -> Function:
        require_memory(8 * B * M * (D + 4), device, "all proposals")
        return lambda: at_once(lambda w: eager_multinomial(w, 1))

    return Workload(
        own=streamed,
        peers={
            "sir_resample": lambda: lambda: at_once(lambda w: ops.sir_resample(w, ops.draw_seed(device))),
            "eager_multinomial": eager,
        },
        unit="proposal",
        elements=B * M,
        bytes_moved=4 * B * M * (D + 1),
    )
