"""Pictures and tensors out of a run: samples, reconstructions, interpolations."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import Distribution

from .. import _random, plots
from .._files import atomic_file, save_tensors, write_atomic
from ..data import load_vocabulary, to_text
from ..distributions import temper
from ..hierarchy import readjust_batch_norm
from ..metrics import nearest_neighbours
from ..priors import HierarchicalNCP
from ..recipes.base import check_choices
from ..samplers import SIR, Langevin, Sampler, SampleResult
from ..sharding import sample_sharded
from ..text_vae import TextLikelihood
from ..train.execution import check_count, processes
from ..vae import VAE
from . import hierarchical
from .figures import AT_ONCE
from .folder import Run

ROWS_AT_ONCE = 256
READJUSTING = 32  # images in each draw for BatchNorm


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn from the noise contrastive prior."""

    sampler: Literal["sir", "langevin"] = "sir"
    """sampling-importance-resampling, or Langevin dynamics"""
    proposals: int | None = None
    """of SIR; the recipe's by default"""
    langevin_steps: int = 1000
    """of Langevin dynamics"""
    step_size: float = 1e-2
    """of Langevin dynamics, in squared units of z, or of ε"""
    space: Literal["z", "epsilon"] = "z"
    """of Langevin dynamics; in that of ε, z = μ + σε, the base's σ scales out"""
    min_ess: float | None = None
    """go on with SIR's proposals until every sample has this effective sample size, up to 100 times as many"""
    batch_norm_draws: int = 0
    """of a hierarchical VAE at the temperature, which BatchNorm's statistics are taken from first; NVAE takes 500"""

    def __post_init__(self) -> None:
        check_choices(self)

    def build(self, run: Run) -> Sampler:
        if self.proposals is not None:
            check_count("proposals", self.proposals)
        if self.sampler == "langevin":
            return Langevin(self.langevin_steps, self.step_size, self.space)
        return SIR(self.proposals or run.recipe.evaluation.sir_proposals, min_ess=self.min_ess)


@torch.no_grad()
def has_mean(vae: VAE) -> bool:
    """Whether p(x|z) has a mean in closed form; that of an autoregressive decoder has none."""
    device = next(vae.parameters()).device
    try:
        vae.decode(torch.zeros(1, *vae.prior_distribution().event_shape, device=device)).mean  # noqa: B018
    except NotImplementedError:
        return False
    return True


@torch.no_grad()
def decode_mean(vae: VAE, z: Tensor) -> Tensor:
    """The mean of p(x|z), the picture to look at; where it has none a draw, or a text decoded greedily."""
    mean = has_mean(vae)
    distributions = (vae.decode(part) for part in z.split(ROWS_AT_ONCE))
    likeliest = (lambda p: p.greedy()) if isinstance(vae.likelihood, TextLikelihood) else (lambda p: p.sample())
    return torch.cat([p.mean if mean else likeliest(p) for p in distributions])


def decoded(run: Run, vae: VAE, z: Tensor, seed: int) -> Tensor:
    """z [N, D] → pictures [N, C, H, W] in [0, 1], the decoder's mean; points and texts are drawn from the decoder."""
    with torch.no_grad(), _random.scoped(_random.derived_seed(seed, 1)):  # z may have been drawn from `seed` itself
        if len(run.recipe.shape) == 3:
            return run.recipe.pictures(decode_mean(vae, z)).clamp(0, 1).cpu()
        return run.recipe.pictures(vae.decode(z).sample()).cpu()


def from_base(base: Distribution, num: int, seed: int, temperature: float = 1.0) -> Tensor:
    with _random.scoped(seed):
        return temper(base, temperature).sample((num,))


def sample(
    run: Run,
    num: int,
    sampling: Sampling,
    temperature: float = 1.0,
    base: bool = False,
    seed: int = 0,
    output: Path | None = None,
) -> tuple[Path, SampleResult | hierarchical.Draws | None]:
    """Draw `num` samples, shared out over the processes there are; write z and x, and a picture of the first.

    Args:
        run: with a noise contrastive prior, unless `base`.
        num: samples of all processes together; they do not depend on how many there are.
        sampling: how.
        temperature: of the base prior (NCP-VAE, section 5.2).
        base: from the base prior instead.
        seed: governs the draws.
        output: a `.safetensors` file; `RUN/samples/…` by default. The picture lies beside it.

    Returns:
        The file, and the sampler's result with its diagnostics, None for the base of a VAE with one group of latents.
    """
    check_count("count", num)
    if output is not None and output.suffix != ".safetensors":
        raise ValueError(f"sample: output must be a .safetensors file, got {output}")
    name = "base" if base else sampling.sampler
    path = output or run.folder / "samples" / f"{name}-temperature-{temperature:g}-seed-{seed}.safetensors"
    if run.hierarchical:
        draws = _walked(run, num, sampling, temperature, base, seed)
        _keep(
            run, path, {f"z_{k + 1}": z for k, z in enumerate(draws.z)}, draws.x, f"{name}, temperature {temperature:g}"
        )
        return path, draws
    if sampling.batch_norm_draws:
        raise ValueError(f"sample: batch_norm_draws must be 0 for {run.name}, got {sampling.batch_norm_draws}")
    vae, result = run.vae(), None
    if base:
        z = from_base(vae.prior_distribution(), num, seed, temperature)
    else:
        result = sample_sharded(run.prior()().tempered(temperature), num, sampling.build(run), seed)
        z = result.z
    _keep(run, path, {"z": z.cpu()}, decoded(run, vae, z, seed), f"{name}, temperature {temperature:g}")
    return path, result


def _walked(run: Run, num: int, sampling: Sampling, temperature: float, base: bool, seed: int) -> hierarchical.Draws:
    """`sample` for a hierarchical VAE."""
    model = run.nvae() if base else run.hierarchical_prior()
    if sampling.batch_norm_draws:
        vae = model.vae if isinstance(model, HierarchicalNCP) else model
        readjust_batch_norm(vae, READJUSTING, temperature=temperature, draws=sampling.batch_norm_draws, generator=seed)
    return hierarchical.draw(run, model, num, sampling.build(run), temperature, seed)


def _keep(run: Run, path: Path, z: dict[str, Tensor], x: Tensor, title: str) -> None:
    """The main process writes latents and pictures, and shows the first of these."""
    if processes().is_main_process:
        _write(path, {**z, "x": x})
        show(run, path, [(title, x[:100])])
    processes().wait_for_everyone()


@torch.no_grad()
def reconstruct(run: Run, num: int, output: Path | None = None) -> Path:
    """The first `num` test examples, and the decoder's mean at their codes' mean, of hierarchical VAEs at a draw."""
    check_count("count", num)
    originals, reconstructions = reconstructed(run, run.dataset.splits.test[:num])
    path = output or run.folder / "samples" / "reconstructions.safetensors"
    _write(path, {"x": originals, "reconstruction": reconstructions})
    show(run, path, [("test examples", originals[:100]), ("reconstructions", reconstructions[:100])])
    return path


def reconstructed(run: Run, examples: Tensor) -> tuple[Tensor, Tensor]:
    """Examples as they are stored [N, …] → the same as pictures, and their reconstructions by the run's VAE."""
    if run.hierarchical:
        return hierarchical.reconstructions_of(run, run.nvae(), examples)
    return reconstructions_of(run, run.vae(), examples)


@torch.no_grad()
def reconstructions_of(run: Run, vae: VAE, examples: Tensor) -> tuple[Tensor, Tensor]:
    """Examples as they are stored [N, …] → the same as pictures, and their reconstructions."""
    x = run.on_device(examples)
    with _random.scoped(run.recipe.seed):
        codes = [vae.encode(run.recipe.evaluation_transform(part)).mean for part in x.split(ROWS_AT_ONCE)]
        copies = run.recipe.pictures(decode_mean(vae, torch.cat(codes))).cpu()
        copies = copies.clamp(0, 1) if len(run.recipe.shape) == 3 else copies
    return run.recipe.originals(x).cpu(), copies


@torch.no_grad()
def interpolate(run: Run, rows: int, steps: int, output: Path | None = None) -> Path:
    """Between the codes' means of pairs of test examples, `steps` points each on the arc between them.

    Spherical interpolation keeps to the norms that codes have: White, "Sampling generative networks", 2016.
    """
    check_count("rows", rows)
    check_count("steps", steps)
    vae, test = run.vae(), run.dataset.splits.test
    if 2 * rows > len(test):
        raise ValueError(f"interpolate: rows must be ≤ {len(test) // 2}, got {rows}")
    with _random.scoped(run.recipe.seed):
        first, second = vae.encode(run.recipe.evaluation_transform(run.on_device(test[: 2 * rows]))).mean.chunk(2)
        z = spherical(first, second, torch.linspace(0, 1, steps, device=first.device))  # [rows, steps, D]
        x = run.recipe.pictures(decode_mean(vae, z.flatten(0, 1))).cpu()
    path = output or run.folder / "samples" / "interpolation.safetensors"
    _write(path, {"z": z.flatten(0, 1).cpu(), "x": x})
    show(run, path, [("interpolation between test examples", x)], columns=steps)
    return path


def spherical(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Points [B, T, D] on the arcs from a to b [B, D] at t [T] in [0, 1]; straight where they are parallel."""
    angle = torch.arccos(torch.cosine_similarity(a, b, dim=1).clamp(-1, 1))[:, None, None]
    t = t[None, :, None]
    weights = [torch.sin((1 - t) * angle) / torch.sin(angle), torch.sin(t * angle) / torch.sin(angle)]
    straight = angle.sin().abs() < 1e-4
    first, second = (torch.where(straight, linear, w) for linear, w in zip((1 - t, t), weights, strict=True))
    return first * a[:, None] + second * b[:, None]


def nearest_training(run: Run, samples: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Samples, the training example nearest to each, and the distances between them."""
    train, originals = run.dataset.splits.train, run.recipe.originals
    parts = [nearest_neighbours(samples, originals(part)) for part in train.split(AT_ONCE)]
    distances, which = torch.stack([found.distances[:, 0] for found in parts]).min(0)
    indices = torch.stack([found.indices[:, 0] for found in parts]).gather(0, which[None])[0] + which * AT_ONCE
    return samples, originals(train[indices]), distances.float()


def overview(run: Run) -> Path:
    """One picture to show: test examples, samples of both priors, and what training examples are nearest to them."""
    e, seed, vae, prior = run.recipe.evaluation, run.recipe.seed, run.vae(), run.prior()
    num = e.pictures
    test = run.recipe.originals(run.dataset.splits.test[:num])
    base = decoded(run, vae, from_base(vae.prior_distribution(), num, seed), seed)
    ncp = decoded(run, vae, sample_sharded(prior(), num, SIR(e.sir_proposals), seed).z, seed)
    panels = [("test examples", test), ("base prior", base), ("noise contrastive prior", ncp)]
    if len(run.recipe.shape) == 3:
        nearest = nearest_training(run, ncp)[1]
        panels.append(("nearest training examples", nearest))
    path = run.folder / "samples" / "overview.png"
    path.parent.mkdir(exist_ok=True)
    show(run, path, panels)
    return path


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    with atomic_file(path) as temporary:
        save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def show(run: Run, path: Path, panels: list[tuple[str, Tensor]], columns: int | None = None) -> None:
    """Beside `path`, a picture of images or points, or a file with the lines of texts; nothing for other examples.

    Warns:
        UserWarning: where there is no matplotlib for a picture.
    """
    try:
        _show(run, path, panels, columns)
    except ImportError as error:
        warnings.warn(f"no picture beside {path}: {error}", stacklevel=2)


def _show(run: Run, path: Path, panels: list[tuple[str, Tensor]], columns: int | None) -> None:
    picture = path.with_suffix(".png")
    if panels[0][1].dim() == 4:
        plots.save_images(picture, panels, columns)
    elif panels[0][1].shape[1:] == (2,):
        plots.save_scatter(picture, panels, limit=float(max(x.abs().max() for _, x in panels)) * 1.05)
    elif (run.folder / "vocabulary.json").is_file():
        size = max(int(x.max()) for _, x in panels) + 1
        words = load_vocabulary(run.folder / "vocabulary.json")
        words = (*words, *["<unused>"] * (size - len(words)))  # ids that the corpus had no word for
        lines = []
        for title, x in panels:
            texts = to_text(x.long(), words)
            row = columns or max(1, len(texts))
            groups = (texts[first : first + row] for first in range(0, len(texts), row))
            lines += [f"# {title}", *(line for group in groups for line in (*group, ""))]
        write_atomic(path.with_suffix(".txt"), "\n".join(lines))
