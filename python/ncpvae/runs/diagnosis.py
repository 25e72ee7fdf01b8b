"""`ncpvae diagnose`: whether a run's code has collapsed, measured, judged and put on a page."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from .. import _random, metrics
from .._distributed import block_seed, check_seed, rank, ranks
from .._files import read_json
from ..critics import Critic
from ..metrics._common import mean_and_error, shared_blocks
from ..report.diagnosis import Bars, DiagnosisData, Figure, Traversals, write_diagnosis
from ..train.execution import processes
from ..vae import VAE
from .evaluation import cautions, table, weights_digest
from .figures import check_test_examples
from .folder import Run, environment, write_json
from .verdict import ACTIVE, RULES, Diagnosis, Estimate, judge, nats

FILE, PAGE = "diagnosis.json", "diagnosis.html"
ROWS_AT_ONCE = 256  # examples encoded, decoded and shown to the critic at once
DECODED = 512  # examples that the decoder is asked about, D + 2 times each
TRAVERSED = 8  # dimensions, the ones with the largest KL
REACH = 3.0  # standard deviations of q(z) to either side


def diagnose(
    run: Run, examples: int | None = None, seed: int | None = None, command: str = "", decoded: int = DECODED
) -> Diagnosis:
    """Measure what the code of a run's VAE holds, and write figures and verdict to `diagnosis.json`.

    The work is shared out over the processes there are.

    Args:
        examples: test examples, drawn by the seed; all by default. More of them raise the cap log N of the mutual
            information.
        seed: of all draws; the recipe's by default.
        command: the command line, for the page.
        decoded: of the examples, at most so many go through the decoder, D + 2 times each.

    Raises:
        OSError: where the run has no VAE yet.
        ValueError: for a number of examples that the test set does not have.
        TypeError: where posterior or prior are no Normals with independent coordinates.
    """
    started, seed = time.perf_counter(), run.recipe.seed if seed is None else seed
    check_seed("diagnose", seed)
    check_test_examples(run, "diagnose")
    vae, data = run.vae(), chosen_examples(run, examples, decoded, seed)
    diagnosis = measure(run, vae, data, decoded, seed)
    if processes().is_main_process:
        record = {
            "diagnosis": dataclasses.asdict(diagnosis),
            "verdict": dataclasses.asdict(judge(diagnosis)),
            "rules": RULES,
            "seed": seed,
            "command": command,
            "of": weights_digest(run),
            "recipe": run.name,
            "environment": environment(run.device),
            "seconds": round(time.perf_counter() - started, 1),
            "caution": run.config.get("data", {}).get("caution", ""),
        }
        write_json(run.folder / FILE, record)
    processes().wait_for_everyone()
    return diagnosis


def read_diagnosis(run: Run) -> Diagnosis:
    """The figures in `diagnosis.json`.

    Raises:
        OSError: where the run's present VAE and prior have not been diagnosed.
        ValueError: for a damaged file.
    """
    return _read(run)[0]


def _read(run: Run) -> tuple[Diagnosis, dict[str, Any]]:
    """The figures, and all that is written beside them."""
    path = run.folder / FILE
    record = read_json(path, "diagnosis") if path.is_file() else {}
    if record.get("of") != weights_digest(run):
        raise OSError(f"the VAE and prior of {run.folder} have not been diagnosed: ncpvae diagnose {run.folder}")
    try:
        return Diagnosis.from_dict(record["diagnosis"]), record
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} does not hold a diagnosis: {error}") from error


def write_page(run: Run) -> Path:
    """Write `diagnosis.html` from what `diagnose` left, with traversals decoded afresh.

    Raises:
        OSError: where the run's present VAE and prior have not been diagnosed.
        ImportError: without matplotlib, Pillow or Jinja2.
    """
    diagnosis, record = _read(run)
    data = chosen_examples(run, diagnosis.num_examples, diagnosis.num_decoded, diagnosis.seed)
    shown = page(run, diagnosis, traversals(run, run.vae(), data, diagnosis, diagnosis.seed), record)
    path = run.folder / PAGE
    with ranks().failing_together("diagnose"):
        if rank() == 0:
            write_diagnosis(shown, path)
    return path


def chosen_examples(run: Run, examples: int | None, decoded: int, seed: int) -> Tensor:
    """Test examples in an order drawn by the seed, so that neighbours are no more alike than any two."""
    test = run.dataset.splits.test
    count = len(test) if examples is None else examples
    if isinstance(count, bool) or not isinstance(count, int) or not 2 <= count <= len(test):
        raise ValueError(f"diagnose: examples must be 2 … {len(test)}, those of the test set, got {count!r}")
    if isinstance(decoded, bool) or not isinstance(decoded, int) or decoded < 2:
        raise ValueError(f"diagnose: decoded must be an integer ≥ 2, got {decoded!r}")
    return test[torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))[:count]]


def measure(run: Run, vae: VAE, data: Tensor, decoded: int, seed: int) -> Diagnosis:
    """The figures of a diagnosis, on examples [N, …] as they are stored."""
    shared: dict[str, Any] = {"seed": seed, "device": run.device, "distributed": True}
    seen: dict[str, Any] = {"transform": run.recipe.evaluation_transform, "batch_size": ROWS_AT_ONCE}
    posteriors = metrics.collect_posteriors(data, vae.encode, **seen, **shared)
    base = vae.prior_distribution()
    kl, active = metrics.kl_per_dimension(posteriors, base), metrics.active_units(posteriors, ACTIVE)
    mi = metrics.mutual_information(posteriors, base.log_prob, **shared)
    assert mi.marginal_kl is not None and mi.marginal_kl_standard_error is not None
    use = metrics.decoder_use(data[:decoded], vae.encode, vae.decode, **seen, **shared)
    critic = run.critic(vae)
    bound = None if critic is None else critic_bound(run, vae, critic, data, seed)
    return Diagnosis(
        num_examples=len(data),
        num_decoded=min(decoded, len(data)),
        seed=seed,
        log_n=mi.log_n,
        kl=Estimate(kl.total, kl.standard_error, kl.protocol),
        mutual_information=Estimate(mi.value, mi.standard_error, mi.protocol),
        marginal_kl=Estimate(mi.marginal_kl, mi.marginal_kl_standard_error, f"log q(z) − log p(z); {mi.protocol}"),
        reconstruction=Estimate(use.nll, use.standard_error, use.protocol),
        rise=Estimate(use.rise, use.rise_standard_error, use.protocol),
        kl_per_dimension=_numbers(kl.per_dimension),
        variances=_numbers(active.variances),
        rises=_numbers(use.rise_per_dimension),
        rise_errors=_numbers(use.rise_per_dimension_standard_error),
        info_nce=None if bound is None else Estimate(bound.value, bound.standard_error, bound.protocol),
        info_nce_cap=None if bound is None else bound.log_n,
        prior_gain=prior_gain(run, posteriors, base, seed) if run.has_prior() else None,
    )


@torch.no_grad()
def critic_bound(run: Run, vae: VAE, critic: Critic, data: Tensor, seed: int) -> metrics.InfoNCEBound:
    """InfoNCE's bound by the run's own critic, in batches of one size; what is left over is not asked."""
    candidates = min(ROWS_AT_ONCE, len(data))
    batches = [part for part in data.split(candidates) if len(part) == candidates]

    def scores(number: int) -> Tensor:
        with _random.scoped(block_seed(seed, number)):
            x = run.recipe.evaluation_transform(run.on_device(batches[number]))
            posterior, looked_at = critic.encode(vae, x)
            found = critic(looked_at, posterior, posterior.sample())
            return torch.stack([found.positive, found.log_sum_x])

    every = shared_blocks("diagnose", len(batches), scores, lambda: {"examples": len(data), "seed": seed}, True)
    positive, log_sum = torch.cat(every, 1)
    return metrics.info_nce_bound(positive, log_sum, candidates)


@torch.no_grad()
def prior_gain(run: Run, posteriors: metrics.Posteriors, base: Distribution, seed: int) -> Estimate:
    """E_q(z)[log p_NCP(z) − log p(z)] by one draw z ~ q(z|x) per example and the SNIS bound on log p_NCP."""
    prior, proposals = run.prior()(), run.recipe.evaluation.snis_proposals
    means, log_stds = posteriors.mean.split(ROWS_AT_ONCE), posteriors.log_std.split(ROWS_AT_ONCE)

    def gains(number: int) -> Tensor:
        with _random.scoped(block_seed(seed, len(means) + number)):
            mean, log_std = means[number], log_stds[number]
            z = mean + log_std.exp() * torch.randn(mean.shape, dtype=mean.dtype).to(mean.device)
            return prior.snis_log_prob(z, proposals) - base.log_prob(z)

    every = shared_blocks("diagnose", len(means), gains, lambda: {"seed": seed}, True)
    how = f"log p_NCP(z) − log p(z) by the SNIS bound with {proposals:,} proposals, one draw z of {len(posteriors):,} "
    return Estimate(*mean_and_error(torch.cat(every)), f"{how}examples each, seed {seed}")


@torch.no_grad()
def traversals(run: Run, vae: VAE, data: Tensor, d: Diagnosis, seed: int) -> Traversals | str:
    """What the decoder makes of the first example's code with one coordinate moved; a reason where that is not shown.

    The moved coordinate runs over REACH standard deviations of q(z) to either side of its mean.
    """
    shape = run.recipe.shape
    if shape != (2,) and not (len(shape) == 3 and shape[0] in (1, 3)):
        return "only pictures and points in the plane can be shown"
    with _random.scoped(seed):
        q = vae.encode(run.recipe.evaluation_transform(run.on_device(data[:ROWS_AT_ONCE])))
    mean, spread = q.mean.mean(0), (q.mean.var(0, correction=0) + q.variance.mean(0)).sqrt()  # of q(z), [D]
    order = sorted(range(len(d.kl_per_dimension)), key=lambda number: -d.kl_per_dimension[number])[:TRAVERSED]
    steps = torch.linspace(-REACH, REACH, 7 if len(shape) == 3 else 49, device=mean.device)
    z = q.mean[0].expand(len(order), len(steps), -1).clone()  # [dimensions, T, D]
    for row, number in enumerate(order):
        z[row, :, number] = mean[number] + steps * spread[number]
    try:
        x = run.recipe.pictures(_centres(vae.decode, z.flatten(0, 1), seed)).float().cpu()
    except NotImplementedError:
        return "the decoder's distribution has neither a mean nor samples"
    x = x.clamp(0, 1) if len(shape) == 3 else x
    original = run.recipe.originals(data[:1])[0]
    some = data[:1000].float() if shape == (2,) else None
    return Traversals(tuple(order), steps.tolist(), x.view(len(order), len(steps), *shape), original, some)


def _centres(decode: Callable[[Tensor], Distribution], z: Tensor, seed: int) -> Tensor:
    """Means of p(x|z), or draws from it where it has none, as autoregressive ones."""
    likelihoods = [decode(part) for part in z.split(ROWS_AT_ONCE)]
    try:
        return torch.cat([likelihood.mean for likelihood in likelihoods])
    except (NotImplementedError, AttributeError):
        with _random.scoped(seed):
            return torch.cat([likelihood.sample() for likelihood in likelihoods])


def figures_of(d: Diagnosis) -> list[Figure]:
    """The table of figures."""

    def figure(name: str, estimate: Estimate, remark: str) -> Figure:
        return Figure(name, *estimate.rounded(), remark, estimate.protocol)

    def count(name: str, chosen: tuple[bool, ...], remark: str) -> Figure:
        return Figure(name, f"{sum(chosen)} of {len(chosen)}", None, remark, "")

    capped = f"at most log N = {nats(d.log_n)}" + (": at its cap" if d.capped else "")
    found = [
        figure("KL(q(z|x) ‖ p(z))", d.kl, "the KL term of the ELBO, on average the sum of the next two"),
        figure("mutual information I(x; z)", d.mutual_information, capped),
        figure("KL(q(z) ‖ p(z))", d.marginal_kl, "an upper bound here" if d.capped else "0 where p(z) fits the codes"),
    ]
    if d.info_nce is not None and d.info_nce_cap is not None:
        found.append(figure("I(x; z) by the critic", d.info_nce, f"a lower bound, at most {nats(d.info_nce_cap)}"))
    if d.prior_gain is not None:
        found.append(figure("KL(q(z) ‖ p(z)) − KL(q(z) ‖ p_NCP(z))", d.prior_gain, "a lower bound"))
    return [
        *found,
        figure("reconstruction −log p(x|z)", d.reconstruction, "with the example's own code"),
        figure("its rise with another's code", d.rise, "0 where the decoder ignores z, or z says nothing of x"),
        count("active units", d.active, f"variance of the posterior mean > {ACTIVE:g}"),
        count("dimensions that the decoder uses", d.used, "exchanged one at a time"),
    ]


def text_of(d: Diagnosis) -> str:
    """Verdict and figures, as text."""
    verdict = judge(d)
    lines = [[f.name, f.value, "" if f.error is None else f"± {f.error} nats"] for f in figures_of(d)]
    return "\n".join([verdict.headline, *verdict.findings, *verdict.advice, "", table(lines)])


def page(run: Run, d: Diagnosis, traversed: Traversals | str, record: dict[str, Any]) -> DiagnosisData:
    """What `diagnosis.html` shows."""
    verdict, command = judge(d), record.get("command")
    surroundings = record.get("environment", {}) | {"seed": str(d.seed), "seconds": str(record.get("seconds", ""))}
    return DiagnosisData(
        title=f"Diagnosis of {run.name}: {run.folder.resolve().name}",
        kind=verdict.kind,
        headline=verdict.headline,
        findings=verdict.findings,
        advice=verdict.advice,
        rules=RULES,
        figures=figures_of(d),
        bars=Bars(d.kl_per_dimension, d.variances, d.rises, d.rise_errors, d.active, d.used, ACTIVE),
        num_examples=d.num_examples,
        num_decoded=d.num_decoded,
        traversals=traversed,
        notes=[f"Data: {run.config.get('data', {}).get('source', run.recipe.data)}.", *cautions(run)],
        environment=surroundings,
        commands=[*run.config["commands"], *([command] if command else [])],
    )


def _numbers(values: Tensor) -> tuple[float, ...]:
    return tuple(values.flatten().tolist())
