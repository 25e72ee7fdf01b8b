"""langevin_step against the same update in plain torch with randn."""

import math
from functools import partial

import torch
from torch import Tensor

from .. import ops
from .case import OWN, Case, Function, Workload, largest_error
from .peers import compiled, imported

NAME = "langevin_step"
SHAPES = [(1, 2), (64, 2), (4096, 2), (64, 128), (64, 5120), (64, 20, 8, 8), (64, 20, 16, 16), (64, 20, 32, 32)]
STEP = 1e-2


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    if quick:
        return [_case(shape) for shape in [(1, 2), (64, 2), (64, 128), (64, 5120)]]
    return [*(_case(shape) for shape in SHAPES), _case((64, 5120), "bfloat16")]


def _case(shape: tuple[int, ...], dtype: str = "float32") -> Case:
    return Case(NAME, {"z": list(shape)}, dtype)


def workload(case: Case, device: torch.device) -> Workload:
    generator, dtype = torch.Generator(device).manual_seed(0), case.torch_dtype
    z, score = (torch.randn(case.shape["z"], device=device, generator=generator).to(dtype) for _ in range(2))
    mean, std = torch.zeros_like(z[0]), torch.full_like(z[0], 0.5)
    seed = ops.draw_seed(device, generator)
    arguments = (z, score, mean, std)
    noise = ops.reference.standard_normal(z.shape, seed, torch.float64)
    truth = eager_formula(z.double(), score.double(), mean.double(), std.double(), noise)
    given = noise.to(dtype)
    own = partial(ops.langevin_step, z, score, seed, STEP, mean, std)

    return Workload(
        own=own,
        peers={
            "eager_formula": lambda: partial(eager_formula, *arguments),
            "eager_in_place": lambda: partial(eager_in_place, *arguments),
            "compile_formula": lambda: partial(compiled(eager_formula), *arguments),
            "torchebm": partial(torchebm_step, *arguments),
        },
        unit="element",
        elements=z.numel(),
        bytes_moved=3 * z.nbytes,
        error=lambda output: largest_error(output, truth),
        error_of="the next state, largest absolute error; eager is given the float64 noise of the same words, rounded",
        outputs={
            OWN: own,
            "eager_formula": partial(eager_formula, *arguments, given),
            "eager_in_place": partial(eager_in_place, *arguments, given),
        },
    )


def eager_formula(z: Tensor, score: Tensor, mean: Tensor, std: Tensor, noise: Tensor | None = None) -> Tensor:
    """What one would write."""
    noise = torch.randn_like(z) if noise is None else noise
    return z + 0.5 * STEP * (score + (mean - z) / std.square()) + math.sqrt(STEP) * noise


def eager_in_place(z: Tensor, score: Tensor, mean: Tensor, std: Tensor, noise: Tensor | None = None) -> Tensor:
    """The same with as few passes and new tensors as torch allows."""
    result = torch.randn_like(z) if noise is None else noise.clone()
    result.mul_(math.sqrt(STEP)).add_(z).add_(score, alpha=0.5 * STEP)
    return result.addcdiv_(mean - z, std.square(), value=0.5 * STEP)


def torchebm_step(z: Tensor, score: Tensor, mean: Tensor, std: Tensor) -> Function:
    """torchebm's Euler-Maruyama step, whose step size is half of ours; on CUDA its fused kernel."""
    if z.is_cuda:
        fused = imported("torchebm.cuda.fused_langevin").fused_langevin_step
        return lambda: fused(z, (z - mean) / std.square() - score, 0.5 * STEP)
    integrator = imported("torchebm.integrators").EulerMaruyamaIntegrator(device=z.device, dtype=z.dtype)
    step, scale = (torch.tensor(v, dtype=z.dtype, device=z.device) for v in (0.5 * STEP, 1.0))

    def drift(state: Tensor, _time: Tensor) -> Tensor:
        return score + (mean - state) / std.square()

    return lambda: integrator.step(state={"x": z}, step_size=step, noise_scale=scale, drift=drift)["x"]
