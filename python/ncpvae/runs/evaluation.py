"""The figures of a run, base prior against noise contrastive prior, each with its protocol."""

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from .. import metrics
from .._files import read_json
from ..distributions import normal_parameters
from ..metrics import Likelihood
from ..priors import NoiseContrastivePrior
from ..recipes import Evaluation
from ..report import GroupFigures, Metric
from ..samplers import SIR, Diagnostics, Langevin
from ..sharding import sample_sharded
from ..train.execution import processes
from ..vae import VAE
from . import hierarchical
from .figures import (
    AU,
    CAP,
    JSD,
    KL,
    MARGINAL_KL,
    MI,
    check_test_examples,
    compared_likelihoods,
    feature_extractor,
    fidelity,
    finite,
    row,
)
from .folder import Run, as_json, environment, write_json
from .sampling import decoded, from_base, has_mean

FILE = "evaluation.json"
SIDES = {"base": "base", "ncp": "snis"}  # of a Metric, and the likelihood that stands there
LANGEVIN, LANGEVIN_CHAINS = Langevin(1000, 1e-3), 1000  # in two dimensions, where they can be looked at
MODES = "samples within 4σ of a mode"


def evaluate(
    run: Run,
    evaluation: Evaluation | None = None,
    features: str | None = None,
    seed: int | None = None,
    command: str = "",
) -> list[Metric]:
    """Measure the run and write `evaluation.json`. The work is shared out over the processes there are.

    Args:
        run: with a VAE; without a noise contrastive prior only the base is measured.
        evaluation: settings that take the place of the recipe's.
        features: where images are compared in a feature space: the folder of a classifier that
            `ncpvae train-features` wrote, or `inception:FILE` with the weights of Inception. Pixels by default.
        seed: the recipe's by default.
        command: the command line, for the report.
    """
    started, seed = time.perf_counter(), run.recipe.seed if seed is None else seed
    if evaluation is not None:
        run = replace(run, recipe=replace(run.recipe, evaluation=evaluation))
    groups: list[GroupFigures] = []
    check_test_examples(run, "evaluate")
    extractor = feature_extractor(features, run)
    if run.hierarchical:
        figures, groups = hierarchical.measure(run, extractor, seed)
    else:
        figures = measure(run, extractor, seed)
    if processes().is_main_process:
        record = {
            "figures": [asdict(figure) for figure in figures],
            **({"groups": [asdict(group) for group in groups]} if groups else {}),
            "seed": seed,
            "command": command,
            "of": weights_digest(run),
            "recipe": run.name,
            "settings": as_json(run.recipe),
            "stage_one": run.config.get("stage_one"),
            "environment": environment(run.device),
            "seconds": round(time.perf_counter() - started, 1),
            "caution": run.config.get("data", {}).get("caution", ""),
        }
        write_json(run.folder / FILE, record)
    processes().wait_for_everyone()
    return figures


def measure(run: Run, extractor: torch.nn.Module | None, seed: int) -> list[Metric]:
    """The figures of a run of a VAE with one group of latent variables."""
    vae, prior = run.vae(), run.prior() if run.has_prior() else None
    figures = likelihoods(run, vae, prior, seed)
    figures += information(run, vae, seed)
    if prior is not None:
        figures += ratio(run)
    base, ncp, diagnostics = drawn(run, vae, prior, seed)
    if run.recipe.shape == (2,) and run.recipe.data == "gaussians":
        figures += modes(run, vae, prior, base, ncp, seed)
    means = len(run.recipe.shape) != 3 or has_mean(vae)
    figures += fidelity(run, means, base, ncp, extractor, seed)
    if diagnostics is not None:
        ess, count = float(diagnostics.ess.mean()), diagnostics.num_proposals
        how = f"mean over {len(base):,} samples, of {count:,} base draws each; seed {seed}"
        figures.append(Metric("effective sample size", "draws", None, ess, None, protocol=how))
    return figures


def weights_digest(run: Run) -> str:
    """Tells the VAE and prior that figures belong to from others."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (run.folder / "vae", run.prior_folder / "model"):
        file = part / "model.safetensors"
        digest.update(file.read_bytes() if file.is_file() else b"none")
    return digest.hexdigest()


def read_evaluation(run: Run) -> dict[str, Any] | None:
    """What `evaluation.json` holds; None where the run's present VAE and prior have not been measured."""
    if not (run.folder / FILE).is_file():
        return None
    record = read_json(run.folder / FILE, "evaluation")
    return record if record.get("of") == weights_digest(run) else None


def read_figures(run: Run) -> list[Metric]:
    """The figures of a run; OSError where it has not been evaluated, ValueError for a damaged file."""
    path, record = run.folder / FILE, read_evaluation(run)
    if record is None:
        raise OSError(f"the VAE and prior of {run.folder} have not been evaluated: ncpvae evaluate {run.folder}")
    try:
        return [Metric(**figure) for figure in record["figures"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} does not hold figures: {error}") from error


def read_groups(run: Run) -> list[GroupFigures]:
    """The figures of the groups of a hierarchical VAE; none where it has not been evaluated."""
    record = read_evaluation(run) or {}
    try:
        return [GroupFigures(**figures) for figures in record.get("groups", [])]
    except TypeError as error:
        raise ValueError(f"{run.folder / FILE} does not hold figures of groups: {error}") from error


def likelihoods(run: Run, vae: VAE, prior: NoiseContrastivePrior | None, seed: int) -> list[Metric]:
    """Importance-weighted negative log-likelihood of the test examples by the same draws for all priors."""
    e = run.recipe.evaluation
    log_priors: dict[str, Callable[[Tensor], Tensor]] = {"base": vae.prior_distribution().log_prob}
    if prior is not None:
        distribution = prior()
        log_priors |= {"own base": distribution.base.log_prob, "log_z": distribution.log_prob}
        log_priors["snis"] = lambda z: distribution.snis_log_prob(z, e.snis_proposals)
    test = run.dataset.splits.test[: e.test_examples]
    nll = metrics.importance_weighted_nll(
        test,
        vae.encode,
        vae.decode,
        log_priors,
        e.importance_samples,
        transform=run.recipe.evaluation_transform,
        seed=seed,
        device=run.device,
        distributed=True,
    )
    protocol = f"{nll['base'].protocol}; seed {seed}"
    ways = {
        "log_z": "by the estimated log Z, optimistic on average",
        "snis": f"by the SNIS bound with {e.snis_proposals:,} proposals, shared between examples of a chunk",
    }
    rows = [] if run.dataset.lengths is None else [perplexities(run, nll, protocol, ways["snis"])]
    unit = f"nats per {'image' if len(run.recipe.shape) == 3 else 'example'}"
    rows += compared_likelihoods(nll, unit, protocol, ways)
    if prior is None:
        return rows
    if run.vae_recipe.prior.base != "prior":
        own, how = nll["own base"], f"{protocol}; in the NCP column the refitted base, before any reweighting"
        name = "test NLL of the refitted base"
        base = {"base": nll["base"].nll, "base_error": finite(nll["base"].standard_error)}
        error = finite(own.standard_error)
        rows.append(Metric(name, unit, ncp=own.nll, lower_is_better=True, ncp_error=error, protocol=how, **base))
    return rows


def information(run: Run, vae: VAE, seed: int) -> list[Metric]:
    """What the codes of the test examples hold, by estimators over all of them, and by those of published tables."""
    test, prior = run.dataset.splits.test, vae.prior_distribution()
    found = metrics.collect_posteriors(
        test, vae.encode, transform=run.recipe.evaluation_transform, seed=seed, device=run.device, distributed=True
    )
    mi = metrics.mutual_information(found, prior.log_prob, seed=seed, device=run.device, distributed=True)
    units = metrics.active_units(found)
    dimensions, minibatch = found.mean[0].numel(), min(run.recipe.batch_size, len(found))
    how = f"{mi.protocol}; seed {seed}"
    rows = [
        Metric(MI, "nats", mi.value, None, None, finite(mi.standard_error), protocol=how),
        Metric(CAP, "nats", mi.log_n, None, None, protocol=f"no estimate over {len(found):,} examples can exceed it"),
        Metric(AU, f"of {dimensions}", float(units.count), None, None, protocol=units.protocol),
    ]
    if normal_parameters(prior) is not None:
        kl = metrics.kl_per_dimension(found, prior)
        rows.append(Metric(KL, "nats", kl.total, None, None, finite(kl.standard_error), protocol=kl.protocol))
    assert mi.marginal_kl is not None
    error = finite(mi.marginal_kl_standard_error)
    rows.append(Metric(MARGINAL_KL, "nats", mi.marginal_kl, None, None, error, protocol=f"{how}; too high at the cap"))
    if minibatch < 2:
        return rows
    small = metrics.minibatch_mutual_information(found, minibatch, seed=seed, device=run.device, distributed=True)
    std = metrics.active_units_by_sampled_std(found, seed=seed)
    note = "biased; for comparison with published tables only; "
    name = f"mutual information within minibatches of {minibatch:,}"
    rows.append(Metric(name, "nats", small.value, None, None, protocol=f"{note}{small.protocol}; seed {seed}"))
    name = "units with std of sampled z > 0.1"
    return [*rows, Metric(name, f"of {dimensions}", float(std.count), None, None, protocol=note + std.protocol)]


def perplexities(run: Run, nll: dict[str, Likelihood], protocol: str, how: str) -> Metric:
    """Of text: exp of the nats per word, `<eos>` counted as one and `<bos>` not."""
    assert run.dataset.lengths is not None
    words = run.dataset.lengths.test[: run.recipe.evaluation.test_examples] - 1
    found = {side: metrics.perplexity(nll[key].per_example, words) for side, key in SIDES.items() if key in nll}
    protocol = f"{found['base'].protocol}; {protocol}; NCP {how}"
    return row("perplexity", "", found, "value", True, protocol, "standard_error")


def ratio(run: Run) -> list[Metric]:
    """What stage two found out about q(z) and the base."""
    path = run.prior_folder / "result.json"
    result = read_json(path, "result of stage two")
    log_z = result.get("log_normalizer")
    wanted = {"loss", "jsd", "accuracy", "best_step"}, {"value", "standard_error", "ess", "num_samples"}
    if not isinstance(log_z, dict) or not (wanted[0] <= result.keys() and wanted[1] <= log_z.keys()):
        raise ValueError(f"{path} does not hold the result of stage two")
    held_out = f"on held-out draws after {result['best_step']:,} steps"
    draws = f"{log_z['num_samples']:,} base draws, ESS {log_z['ess']:,.0f}"
    loss, accuracy = "classifier's loss", "classifier's accuracy"
    refitted = run.vae_recipe.prior.base != "prior"
    hole = {"base": None, "ncp": result["jsd"]} if refitted else {"base": result["jsd"], "ncp": None}
    named = f"JSD(q(z) ‖ {run.vae_recipe.prior.base} fitted to q(z))" if refitted else JSD
    return [
        Metric(named, "nats, ≤ 0.693", **hole, lower_is_better=None, protocol=f"lower bound {held_out}"),
        Metric(loss, "nats, 1.386 where they agree", None, result["loss"], None, protocol=held_out),
        Metric(accuracy, "", None, result["accuracy"], None, protocol=held_out),
        Metric("log Ẑ", "nats", None, log_z["value"], None, ncp_error=log_z["standard_error"], protocol=draws),
    ]


def modes(
    run: Run, vae: VAE, prior: NoiseContrastivePrior | None, base: Tensor, ncp: Tensor | None, seed: int
) -> list[Metric]:
    """25 Gaussians: the share of samples within 4σ of a mode, and the best likelihood there is."""
    from .. import data

    def share(x: Tensor) -> float:
        distance = torch.cdist(x, data.gaussian_grid_means()).amin(1)
        return float((distance <= 4 * data.GAUSSIANS_STD).float().mean())

    entropy, num = data.gaussian_grid_entropy(), f"{len(base):,} samples"
    rows = [Metric("entropy of the data, which no NLL can be below", "nats per example", entropy, entropy, None)]
    if prior is None or ncp is None:
        return [*rows, Metric(MODES, "", share(base), None, lower_is_better=False, protocol=f"{num}; seed {seed}")]

    def both(name: str, value: float, draws: int, how: str) -> Metric:
        first, second = (math.sqrt(p * (1 - p) / n) for p, n in ((share(base), len(base)), (value, draws)))
        return Metric(name, "", share(base), value, False, first, second, how)

    how = f"{num}, SIR of {run.recipe.evaluation.sir_proposals:,} proposals; seed {seed}"
    rows.append(both(MODES, share(ncp), len(ncp), how))
    chains = sample_sharded(prior(), LANGEVIN_CHAINS, LANGEVIN, seed)
    how = f"{LANGEVIN_CHAINS:,} chains of {LANGEVIN.num_steps:,} steps of {LANGEVIN.step_size:g}; seed {seed}"
    langevin = share(decoded(run, vae, chains.z, seed))
    return [*rows, both(f"{MODES}, Langevin", langevin, LANGEVIN_CHAINS, how)]


def drawn(
    run: Run, vae: VAE, prior: NoiseContrastivePrior | None, seed: int
) -> tuple[Tensor, Tensor | None, Diagnostics | None]:
    """Samples as pictures or points from the base and, by SIR, from the noise contrastive prior; its diagnostics."""
    e = run.recipe.evaluation
    base = decoded(run, vae, from_base(vae.prior_distribution(), e.samples, seed), seed)
    if prior is None:
        return base, None, None
    result = sample_sharded(prior(), e.samples, SIR(e.sir_proposals), seed)
    return base, decoded(run, vae, result.z, seed), result.diagnostics


def cautions(run: Run) -> list[str]:
    """What is to be said beside figures on the run's data."""
    caution = run.config.get("data", {}).get("caution")
    return [caution] if caution else []


def cell(figure: Metric | None, side: str) -> str:
    value = None if figure is None else getattr(figure, side)
    if value is None:
        return ""
    error = getattr(figure, f"{side}_error")
    return f"{value:.4g}" + (f" ± {error:.2g}" if error is not None else "")


def table(lines: list[list[str]]) -> str:
    """Rows of cells as text in columns, the first to the left and the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    first, *others = widths
    return "\n".join(
        "  ".join([line[0].ljust(first), *(c.rjust(w) for c, w in zip(line[1:], others, strict=True))]).rstrip()
        for line in lines
    )


def table_of(figures: list[Metric]) -> str:
    """The figures of one run, as text."""
    rows = [[f"{f.name} ({f.unit})" if f.unit else f.name, cell(f, "base"), cell(f, "ncp")] for f in figures]
    return table([["", "base", "NCP"], *rows])
