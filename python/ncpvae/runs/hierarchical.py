"""What is drawn and measured in the runs of hierarchical VAEs."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from .. import _distributed, _random, metrics
from .._files import read_json
from ..hierarchy import Ancestral, Select, infer
from ..nvae import NVAE
from ..priors import HierarchicalDraw, HierarchicalNCP
from ..report import GroupFigures, Metric
from ..samplers import SIR, Sampler
from .figures import KL, compared_likelihoods, fidelity
from .folder import Run

WALKS = 16  # samples of one walk
IMAGES_AT_ONCE = 100


@dataclass(frozen=True)
class Draws:
    """Samples of a hierarchical VAE, [N, …] on the CPU.

    Attributes:
        x: pictures in [0, 1], the decoder's means.
        z: of every group.
        ess: effective sample size, [N, K]; NaN where z_k came from the base or by Langevin dynamics.
        log_mean: log E_p[r_k | c_k] of each sample's path, [N, K] nats; NaN likewise.
        num_proposals: of each group for a sample; the most where their number adapts.
        seconds: for all N, decoding included.
    """

    x: Tensor
    z: list[Tensor]
    ess: Tensor
    log_mean: Tensor
    num_proposals: int
    seconds: float


@dataclass
class Kept:
    """Select what `select` does, and remember it."""

    select: Select
    z: list[Tensor] = field(default_factory=list)

    def __call__(self, k: int, base: Distribution, context: Tensor | None) -> Tensor:
        self.z.append(self.select(k, base, context))
        return self.z[-1]


@torch.no_grad()
def draw(
    run: Run,
    model: NVAE | HierarchicalNCP,
    num: int,
    sampler: Sampler | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    walks: int = WALKS,
) -> Draws:
    """`num` samples from the base of an NVAE or from a noise contrastive prior, by all processes together.

    Args:
        num: the samples are the same for any number of processes.
        sampler: of the noise contrastive prior; `SIR()` by default.
        temperature: of the bases.
        seed: governs the draws.
        walks: samples of one walk; another number gives other samples.
    """
    started, ranks = time.perf_counter(), _distributed.ranks()
    _distributed.check_seed("draw", seed)
    with ranks.failing_together("draw"):
        if isinstance(model, HierarchicalNCP):
            blocks = model.draw_blocks(num, sampler, temperature, seed, walks)
        else:
            blocks = _base_blocks(model, num, temperature, seed, walks)
        mine = [(first, _on_cpu(run, block)) for first, block in blocks]
    parts = [block for _, block in sorted((b for part in ranks.gather(mine) for b in part), key=lambda b: b[0])]
    return Draws(
        x=torch.cat([part.x for part in parts]),
        z=[torch.cat(group) for group in zip(*(part.z for part in parts), strict=True)],
        ess=torch.cat([part.ess for part in parts]),
        log_mean=torch.cat([part.log_mean for part in parts]),
        num_proposals=max(part.num_proposals for part in parts),
        seconds=time.perf_counter() - started,
    )


def _base_blocks(
    vae: NVAE, num: int, temperature: float, seed: int, walks: int
) -> Iterator[tuple[int, HierarchicalDraw]]:
    """This process's share of walks with latents from the base; see `HierarchicalNCP.draw_blocks`."""
    for block in _distributed.ranks().mine(-(-num // walks)):
        first, kept = block * walks, Kept(Ancestral(temperature))
        with _random.scoped(_distributed.block_seed(seed, block)):
            likelihood = vae.walk(kept, min(walks, num - first))
        yield first, HierarchicalDraw(likelihood, kept.z, [None] * len(vae.groups))


def _on_cpu(run: Run, block: HierarchicalDraw) -> Draws:
    rows = len(block.z[0])
    unknown = torch.full((rows,), torch.nan)
    # a chain of Langevin dynamics starts from one draw, which has no effective sample size
    weighed = [None if d is None or d.stopped == "num_steps" else d for d in block.diagnostics]
    told = [d for d in weighed if d is not None]
    ess, log_mean = (
        torch.stack([unknown if d is None else getattr(d, name).float().cpu() for d in weighed], dim=1)
        for name in ("ess", "log_normalizer")
    )
    x = run.recipe.pictures(block.likelihood.mean).clamp(0, 1).cpu()
    proposals = max((d.num_proposals for d in told), default=0)
    return Draws(x, [z.cpu() for z in block.z], ess, log_mean, proposals, 0.0)


@torch.no_grad()
def reconstructions_of(run: Run, vae: NVAE, examples: Tensor) -> tuple[Tensor, Tensor]:
    """Examples as they are stored [N, …] → the same as pictures, and the decoder's means at draws of q(z|x)."""
    x = run.on_device(examples)
    with _random.scoped(run.recipe.seed):
        copies = [infer(vae, run.recipe.evaluation_transform(part))[0].mean for part in x.split(IMAGES_AT_ONCE)]
    pictures = run.recipe.pictures(torch.cat(copies)).clamp(0, 1).cpu()
    return run.recipe.originals(x).cpu(), pictures


def measure(run: Run, extractor: torch.nn.Module | None, seed: int) -> tuple[list[Metric], list[GroupFigures]]:
    """The figures of a run, and those of its groups; see `evaluation.evaluate`."""
    prior = run.hierarchical_prior() if run.has_prior() else None
    vae, e = run.nvae(), run.recipe.evaluation
    base = draw(run, vae, e.samples, seed=seed)
    ncp = None if prior is None else draw(run, prior, e.samples, SIR(e.sir_proposals), seed=seed)
    groups = groups_of(run, vae, prior, ncp, seed)
    figures = likelihoods(run, vae, prior, seed)
    figures += summed(run, groups)
    figures += fidelity(run, True, base.x, None if ncp is None else ncp.x, extractor, seed)
    how = f"{e.samples:,} samples in walks of {WALKS}"
    if ncp is not None:
        how += f", NCP by SIR of {e.sir_proposals:,} proposals for each group"
    speeds = [None if draws is None else draws.seconds / len(draws.x) for draws in (base, ncp)]
    figures.append(Metric("time of a sample", "s", speeds[0], speeds[1], None, protocol=f"{how}; wall clock"))
    return figures, groups


def likelihoods(run: Run, vae: NVAE, prior: HierarchicalNCP | None, seed: int) -> list[Metric]:
    """Importance-weighted negative log-likelihood of the test images by the same draws for both priors."""
    e = run.recipe.evaluation
    ways: dict[str, str] = {}
    settings: dict[str, Any] = {}
    if prior is not None:
        log_z = stage_two(run)["log_normalizer"]
        settings = {"log_normalizer": log_z["value"], "num_proposals": e.snis_proposals}
        ways = {
            "log_z": f"by the joint density with log Ẑ = {log_z['value']:.3f} ± {log_z['standard_error']:.2g}, "
            "optimistic on average",
            "snis": f"by the SNIS bound of ancestral SIR with {e.snis_proposals:,} proposals for each group",
        }
    nll = metrics.hierarchical_nll(
        vae if prior is None else prior,
        run.dataset.splits.test[: e.test_examples],
        e.importance_samples,
        transform=run.recipe.evaluation_transform,
        batch_size=IMAGES_AT_ONCE,
        seed=seed,
        device=run.device,
        distributed=True,
        **settings,
    )
    return compared_likelihoods(nll, "nats per image", f"{nll['base'].protocol}; seed {seed}", ways)


def stage_two(run: Run) -> dict[str, Any]:
    """What stage two found out: `prior/result.json`."""
    path = run.prior_folder / "result.json"
    result = read_json(path, "result of stage two")
    log_z, count = result.get("log_normalizer"), sum(run.hierarchical_recipe.groups_per_scale)
    lists = [result.get(name) for name in ("groups", "loss", "jsd", "accuracy", "best_step")]
    whole = isinstance(log_z, dict) and {"value", "standard_error", "ess", "num_samples", "repeats"} <= log_z.keys()
    if not whole or not all(isinstance(part, list) and len(part) >= count for part in lists):
        raise ValueError(f"{path} does not hold the result of stage two")
    return result


def groups_of(run: Run, vae: NVAE, prior: HierarchicalNCP | None, draws: Draws | None, seed: int) -> list[GroupFigures]:
    """What each group's KL is, and what its classifier and SIR tell of it."""
    kl = metrics.kl_per_group(
        vae,
        run.dataset.splits.test[: run.recipe.evaluation.test_examples],
        transform=run.recipe.evaluation_transform,
        batch_size=IMAGES_AT_ONCE,
        seed=seed,
        device=run.device,
        distributed=True,
    )
    found: list[dict[str, Any]] = [{"kl": value} for value in kl.value.tolist()]
    if prior is not None and draws is not None:
        result = stage_two(run)
        for i, k in enumerate(result["groups"]):
            found[k] |= {name: result[name][i] for name in ("loss", "jsd", "accuracy")}
        for k, figures in enumerate(found):
            figures["flat"] = k in prior.flat
            if not figures["flat"]:
                mean = draws.log_mean[:, k]
                figures |= {"ess": float(draws.ess[:, k].mean()), "log_mean": float(mean.mean())}
                figures |= {"log_mean_std": float(mean.std())} if len(mean) > 1 else {}
    return [
        GroupFigures(number=k + 1, scale=group.scale, shape=group.shape, **figures)
        for k, (group, figures) in enumerate(zip(vae.groups, found, strict=True))
    ]


def summed(run: Run, groups: list[GroupFigures]) -> list[Metric]:
    """Figures of all groups together."""
    count = len(groups)
    how = f"sum over {count} groups, which have their own figures; test images"
    rows = [Metric(KL, "nats", sum(group.kl or 0.0 for group in groups), None, None, protocol=how)]
    if not run.has_prior():
        return rows
    result = stage_two(run)
    log_z = result["log_normalizer"]

    def mean(name: str) -> float:
        return sum(result[name]) / len(result[name])

    steps = f"{min(result['best_step']):,} to {max(result['best_step']):,} steps"
    held_out = f"mean over {count} groups, on held-out draws after {steps}"
    repeats = len(log_z["repeats"])
    draws = f"{log_z['num_samples'] * repeats:,} walks from the base, ESS {log_z['ess']:,.0f}"
    if repeats > 1:
        draws += f"; of {log_z['num_samples']:,} walks alone the standard deviation is {log_z['repeat_std']:.2g} nats"
    rows += [
        Metric("JSD(q(z_k | z_<k) ‖ base)", "nats, ≤ 0.693", mean("jsd"), None, None, protocol=held_out),
        Metric("classifiers' loss", "nats, 1.386 where they agree", None, mean("loss"), None, protocol=held_out),
        Metric("log Ẑ", "nats", None, log_z["value"], None, ncp_error=log_z["standard_error"], protocol=draws),
    ]
    known = [group.ess for group in groups if group.ess is not None]
    if known:
        proposals = run.recipe.evaluation.sir_proposals
        how = f"mean over samples and {len(known)} groups, of {proposals:,} base draws each"
        rows.append(Metric("effective sample size", "draws", None, sum(known) / len(known), None, protocol=how))
    return rows
