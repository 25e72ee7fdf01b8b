"""Langevin dynamics on the energy of a reweighted distribution."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import _random, ops
from ..distributions import normal_parameters
from .base import (
    Diagnostics,
    ReweightedDistribution,
    SampleResult,
    check_bool,
    check_number,
    check_positive_int,
    checked_shape,
    keep_freed_memory,
)
from .graph import CUDARecorder, replayed


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
        cuda_graph: on a CUDA device, capture the steps as a CUDA graph and replay it, which spares small networks the
            launch of every kernel. The samples are the same. The classifier must be in eval mode and do nothing that
            a graph cannot hold, such as waiting for a value or drawing from a generator on the CPU.
    """

    num_steps: int = 1000
    step_size: float = 1e-2
    space: str = "z"
    temperature: float = 1.0
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        check_positive_int("Langevin", "num_steps", self.num_steps)
        check_number("Langevin", "step_size", self.step_size, strict=True)
        check_number("Langevin", "temperature", self.temperature)
        check_bool("Langevin", "cuda_graph", self.cuda_graph)
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
            ValueError: where a chain leaves the finite numbers, with the advice to take smaller steps; for
                `cuda_graph` on another device or with a classifier in training mode.
            RuntimeError: under `torch.inference_mode()`, which forbids the gradients that the steps need; for
                `cuda_graph` where the steps cannot be captured.
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
        if self.cuda_graph:
            _check_can_be_captured(distribution, z)
        keep_freed_memory()
        log_ratio = distribution.log_ratio(z)
        if log_ratio.isnan().any():
            raise ValueError("Langevin: log_ratio must be a number at every draw of the base, got NaN")
        if self.space == "epsilon":
            assert normal is not None
            mean, std = normal
            z = (z - mean) / std
            self._run(
                z,
                seed,
                lambda e: std * _score(distribution, mean + std * e),
                (torch.zeros_like(std), torch.ones_like(std)),
            )
            z = mean + std * z
        elif normal is not None:
            self._run(z, seed, lambda v: _score(distribution, v), normal)
        else:
            self._run(z, seed, lambda v: gradient_of(lambda u: distribution.log_ratio(u) + base.log_prob(u), v), None)
        if not torch.isfinite(z).all():
            raise ValueError(f"Langevin: a chain diverged; step_size must be smaller than {self.step_size} here")
        batch, count = distribution.batch_shape, shape.numel()
        rows = log_ratio.reshape(count, -1).T
        base_draws = ops.sir_update(ops.sir_state(len(rows), device=rows.device), rows, ops.draw_seed(rows.device))
        log_normalizer = base_draws.log_mean_weight.view(batch)
        return SampleResult(
            z, Diagnostics(base_draws.ess, log_normalizer, count, "num_steps", time.perf_counter() - start)
        )

    def _run(
        self, state: Tensor, seed: Tensor, score: Callable[[Tensor], Tensor], normal: tuple[Tensor, Tensor] | None
    ) -> None:
        """T steps of `state`, in place; `normal` is the base whose gradient the op adds to `score`."""
        next_step = torch.tensor([0, 1], device=seed.device)
        mean, std = normal or (None, None)

        def step() -> None:
            ops.langevin_step_(state, score(state).contiguous(), seed, self.step_size, mean, std, self.temperature)
            seed.add_(next_step)

        if self.cuda_graph:
            replayed(step, self.num_steps, CUDARecorder(state.device))
        else:
            for _ in range(self.num_steps):
                step()


def gradient_of(function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """∇ of the sum of `function`'s values with respect to z."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        values = function(z)
        return torch.autograd.grad(values, z, torch.ones_like(values))[0]


def _score(distribution: ReweightedDistribution, z: Tensor) -> Tensor:
    """∇ log r(z), by the distribution's own `score` where it has one."""
    own = getattr(distribution, "score", None)
    return gradient_of(distribution.log_ratio, z) if own is None else own(z)


def _check_can_be_captured(distribution: ReweightedDistribution, z: Tensor) -> None:
    if z.device.type != "cuda":
        raise ValueError(f"Langevin: cuda_graph needs a base on a CUDA device, got one on {z.device}")
    classifier = getattr(distribution, "classifier", None)
    if isinstance(classifier, nn.Module) and any(module.training for module in classifier.modules()):
        raise ValueError("Langevin: cuda_graph needs the classifier in eval mode, got one in training mode")
