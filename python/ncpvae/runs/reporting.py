"""A run collected for its page, `RUN/report.html`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _random
from .._distributed import rank, ranks
from ..priors import NoiseContrastivePrior
from ..report import Metric, ReportData, Samples, write_report
from ..samplers import SIR
from ..sharding import sample_sharded
from ..train.log import RECOVERY, read_metrics
from ..vae import VAE
from . import hierarchical
from .evaluation import cautions, read_evaluation, read_figures, read_groups
from .figures import JSD, NLL
from .folder import Run, as_json
from .sampling import ROWS_AT_ONCE, decoded, from_base, nearest_training, reconstructions_of

LATENTS = 3000  # draws of each distribution in the scatter of latents
LOG_WEIGHTS = 20_000  # base draws in the histogram of log r
RECONSTRUCTIONS = 16


def report(run: Run) -> Path:
    """Write the page of a run from what is in its folder, with fresh samples; `ncpvae evaluate` adds the figures."""
    recipe, config, seed, settings = run.recipe, run.config, run.recipe.seed, as_json(run.recipe)
    evaluation = read_evaluation(run)
    figures = [] if evaluation is None else read_figures(run)
    notes = [f"Data: {config.get('data', {}).get('source', recipe.data)}.", *cautions(run)]
    commands, surroundings = list(config["commands"]), config["environment"] | {"seed": str(seed)}
    if evaluation is None:
        notes.append(f"This VAE and prior have not been measured: ncpvae evaluate {run.folder.name}.")
    else:
        commands += [evaluation["command"]] if evaluation.get("command") else []
        surroundings |= {f"evaluation's {key}": str(value) for key, value in evaluation["environment"].items()}
        surroundings["evaluation's seed"] = str(evaluation["seed"])
        settings["evaluation"] = evaluation["settings"]["evaluation"]
    parts = hierarchical_parts(run) if run.hierarchical else parts_of(run, notes)
    page = ReportData(
        title=f"{run.name}: {run.folder.resolve().name}",
        summary=summary(run, figures),
        commands=commands,
        settings=settings,
        environment=surroundings,
        curves=curves(run),
        metrics=figures,
        notes=notes,
        **parts,
    )
    path = run.folder / "report.html"
    with ranks().failing_together("report"):
        if rank() == 0:
            write_report(page, path)
    return path


def parts_of(run: Run, notes: list[str]) -> dict[str, Any]:
    """What the page of a VAE with one group of latent variables shows; what has to be said of it goes to `notes`."""
    vae, prior, recipe = run.vae(), run.prior() if run.has_prior() else None, run.vae_recipe
    if recipe.prior.base != "prior":
        notes.append(
            f"The classifier reweights a base of its own, {recipe.prior.base} fitted to q(z): log-weights and "
            "effective sample sizes are those of its draws. In samples and latent space p(z) is the VAE's prior."
        )
    drawable = len(recipe.shape) == 3 or recipe.shape == (2,)
    test = run.dataset.splits.test[:RECONSTRUCTIONS]
    samples: list[Samples] = []
    ess, neighbours = None, None
    if prior is not None and drawable:
        samples, ess, neighbours = sample_grids(run, vae, prior)
    elif prior is not None:
        sampler = SIR(recipe.evaluation.sir_proposals)
        ess = sample_sharded(prior(), recipe.evaluation.pictures, sampler, recipe.seed).diagnostics.ess.cpu()
    return {
        "samples": samples,
        "reconstructions": reconstructions_of(run, vae, test) if drawable else None,
        "neighbours": neighbours,
        "log_weights": None if prior is None else log_weights(run, prior),
        "ess": ess,
        "num_proposals": None if ess is None else recipe.evaluation.sir_proposals,
        "latents": latents(run, vae, prior),
    }


def hierarchical_parts(run: Run) -> dict[str, Any]:
    """What the page of a hierarchical VAE shows."""
    vae, prior = run.nvae(), run.hierarchical_prior() if run.has_prior() else None
    e, seed = run.recipe.evaluation, run.recipe.seed
    samples: list[Samples] = []
    neighbours = None
    for temperature in dict.fromkeys((1.0, *e.temperatures)):
        if prior is None:
            break
        base = hierarchical.draw(run, vae, e.pictures, None, temperature, seed)
        ncp = hierarchical.draw(run, prior, e.pictures, SIR(e.sir_proposals), temperature, seed)
        samples.append(Samples(temperature, base.x, ncp.x))
        if temperature == 1.0:
            neighbours = nearest_training(run, ncp.x[: 2 * RECONSTRUCTIONS])
    record = read_evaluation(run)  # its groups' ESS are of its own number of proposals
    measured = e.sir_proposals if record is None else record["settings"]["evaluation"]["sir_proposals"]
    return {
        "samples": samples,
        "reconstructions": hierarchical.reconstructions_of(run, vae, run.dataset.splits.test[:RECONSTRUCTIONS]),
        "neighbours": neighbours,
        "groups": read_groups(run),
        "num_proposals": None if prior is None else measured,
    }


def summary(run: Run, figures: list[Metric]) -> str:
    """A paragraph with the headline numbers."""
    stage_one = run.config.get("stage_one", {})
    text = f"A VAE trained on {run.dataset.name} for {stage_one.get('steps', run.recipe.steps):,} steps"
    by = "a classifier for each group of latent variables" if run.hierarchical else "a classifier"
    text += f", its prior then reweighted by {by}." if run.has_prior() else "."
    by_name = {figure.name: figure for figure in figures}
    nll = by_name.get(NLL)
    if nll is not None and nll.base is not None and nll.ncp is not None:
        text += (
            f" The noise contrastive prior takes the test negative log-likelihood from {nll.base:.2f} to {nll.ncp:.2f} "
            f"{nll.unit} by the SNIS bound."
        )
    jsd = by_name.get(JSD)
    if jsd is not None and jsd.base is not None:
        text += f" The prior hole was at least {jsd.base:.3f} of 0.693 nats wide (JSD between q(z) and the base)."
    return text


def sample_grids(
    run: Run, vae: VAE, prior: NoiseContrastivePrior
) -> tuple[list[Samples], Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Samples at each temperature, the ESS behind those at 1, and their nearest training examples."""
    e, seed = run.recipe.evaluation, run.recipe.seed
    grids: list[Samples] = []
    for temperature in dict.fromkeys((1.0, *e.temperatures)):
        base = decoded(run, vae, from_base(vae.prior_distribution(), e.pictures, seed, temperature), seed)
        result = sample_sharded(prior().tempered(temperature), e.pictures, SIR(e.sir_proposals), seed)
        ncp = decoded(run, vae, result.z, seed)
        grids.append(Samples(temperature, base, ncp))
        if temperature == 1.0:
            ess = result.diagnostics.ess
            neighbours = nearest_training(run, ncp[: 2 * RECONSTRUCTIONS])
    return grids, ess.cpu(), neighbours


@torch.no_grad()
def log_weights(run: Run, prior: NoiseContrastivePrior) -> Tensor:
    with _random.scoped(run.recipe.seed):
        return prior.log_ratio(prior.base_distribution().sample((LOG_WEIGHTS,))).cpu()


@torch.no_grad()
def latents(run: Run, vae: VAE, prior: NoiseContrastivePrior | None) -> dict[str, Tensor] | None:
    """Draws from q(z) of test examples, the base and the noise contrastive prior, each [N, D]; None for one example."""
    test, seed = run.dataset.splits.test[:LATENTS], run.recipe.seed
    if len(test) < 2:
        return None
    with _random.scoped(seed):
        parts = [
            vae.encode(run.recipe.evaluation_transform(run.on_device(x))).sample() for x in test.split(ROWS_AT_ONCE)
        ]
        found = {"q(z)": torch.cat(parts), "p(z)": vae.prior_distribution().sample((len(test),))}
    if prior is not None:
        sampler = SIR(
            run.recipe.evaluation.sir_proposals, draws_per_row=8
        )  # a cloud to look at: proposals may be shared
        found["p_NCP(z)"] = sample_sharded(prior(), len(test), sampler, seed).z
    return {name: z.flatten(1).cpu() for name, z in found.items()}


def curves(run: Run) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Charts from the logs of both stages: one for each term, training and held-out together, and the learning rate."""
    charts: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for stage, folder in (("VAE", run.folder), ("NCP", run.prior_folder)):
        if not (folder / "metrics.jsonl").is_file():
            continue
        for record in read_metrics(folder / "metrics.jsonl"):
            if record.get("split") == RECOVERY:
                continue
            split = "training" if record.get("split") == "train" else "held out"
            for name, value in record.items():
                if name not in ("step", "split", "seconds", "samples_per_second"):
                    unit = ", nats" if name in ("loss", "reconstruction", "kl", "nce") else ""
                    points = charts.setdefault(f"{stage}: {name.replace('_', ' ')}{unit}", {}).setdefault(split, [])
                    points.append((record["step"], value))
    return charts
