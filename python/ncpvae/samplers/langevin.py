"""Langevin dynamics on the energy of a reweighted distribution."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _random, ops
from ..distributions import normal_parameters
from .base import Diagnostics, ReweightedDistribution, SampleResult, check_number, check_positive_int, checked_shape


@dataclass(frozen=True)
class Langevin:
    """Unadjusted Langevin dynamics from a base draw (NCP-VAE, section 3.3): z ← z − ½λ∇E(z) + √λ ε.

    Args:
        num_steps: T.
        step_size: λ > 0, in squared units of z, or of ε where `space` is "epsilon".
        space: "z", or "epsilon": run on ε with z = μ + σε, so that the base's σ scales out. The latter, and the
            fused base gradient in the former, need a base with independent Normal coordinates; other bases are
            differentiated through `log_prob`.
        temperature: scales the noise's variance; 1 samples, 0 climbs to a mode.
    """

    num_steps: int = 1000
    step_size: float = 1e-2
    space: str = "z"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_positive_int("Langevin", "num_steps", self.num_steps)
        check_number("Langevin", "step_size", self.step_size, strict=True)
        check_number("Langevin", "temperature", self.temperature)
        if self.space not in ("z", "epsilon"):
            raise ValueError(f"Langevin: space must be 'z' or 'epsilon', got {self.space!r}")

    @torch.no_grad()
    def sample(
        self,
        distribution: ReweightedDistribution,
        shape: tuple[int, ...] = (),
        generator: torch.Generator | None = None,
    ) -> SampleResult:
        """Draw [*shape, *batch, *event]; ESS and log Z in the diagnostics are those of the starting base draws.

        Raises:
            TypeError: for "epsilon" with a base that is not Normal with independent coordinates.
            ValueError: where a chain leaves the finite numbers, with the advice to take smaller steps.
            RuntimeError: under `torch.inference_mode()`, which forbids the gradients that the steps need.
        """
        start = time.perf_counter()
        shape = checked_shape("Langevin", distribution, shape)
        if torch.is_inference_mode_enabled():
            raise RuntimeError("Langevin: needs gradients, which torch.inference_mode() forbids; use torch.no_grad()")
        base = distribution.base
        normal = normal_parameters(base)
        if self.space == "epsilon" and normal is None:
            raise TypeError(f"Langevin: space 'epsilon' needs a Normal base, got {type(base).__name__}")
        with _random.scoped(generator):
            z = base.sample(shape).contiguous()
            seed = ops.draw_seed(z.device)
        log_ratio = distribution.log_ratio(z)
        next_step = torch.tensor([0, 1], device=z.device)
        if self.space == "epsilon":
            assert normal is not None
            mean, std = normal
            to_z, state = (lambda e: mean + std * e), (z - mean) / std
            prior = {"base_mean": torch.zeros_like(std), "base_std": torch.ones_like(std)}
        else:
            to_z, state = (lambda v: v), z
            prior = {} if normal is None else {"base_mean": normal[0], "base_std": normal[1]}
        for _ in range(self.num_steps):
            score = self._score(distribution, to_z, state, with_base=normal is None)
            ops.langevin_step_(state, score, seed, self.step_size, **prior, temperature=self.temperature)
            seed = seed + next_step
        z = to_z(state)
        if not torch.isfinite(z).all():
            raise ValueError(f"Langevin: a chain diverged; step_size must be smaller than {self.step_size} here")
        batch, count = distribution.batch_shape, shape.numel()
        rows = log_ratio.reshape(count, -1).T
        base_draws = ops.sir_update(ops.sir_state(len(rows), device=rows.device), rows, ops.draw_seed(rows.device))
        log_normalizer = base_draws.log_mean_weight.view(batch)
        return SampleResult(
            z, Diagnostics(base_draws.ess, log_normalizer, count, "num_steps", time.perf_counter() - start)
        )

    @staticmethod
    def _score(distribution: ReweightedDistribution, to_z, state: Tensor, with_base: bool) -> Tensor:
        """∇ of log r, and of log base where the op does not add it, with respect to the chain's own variable."""
        with torch.enable_grad():
            state = state.detach().requires_grad_()
            z = to_z(state)
            log_p = distribution.log_ratio(z)
            if with_base:
                log_p = log_p + distribution.base.log_prob(z)
            return torch.autograd.grad(log_p.sum(), state)[0].contiguous()
