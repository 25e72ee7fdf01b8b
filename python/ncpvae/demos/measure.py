"""What the demos measure alike: the likelihood under base and noise contrastive prior, and the table's common rows."""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import metrics
from ..priors import LogNormalizer, NoiseContrastivePrior
from ..samplers import Diagnostics
from ..train import NCPResult
from ..vae import VAE
from .report import Report


def likelihoods(
    vae: VAE,
    prior: NoiseContrastivePrior,
    test: Tensor,
    num_samples: int,
    num_proposals: int,
    transform: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
) -> dict[str, metrics.Likelihood]:
    """Importance-weighted NLL of `test` by the same draws under "base", NCP with log Ẑ ("log_z") and "snis"."""
    log_priors = {
        "base": vae.prior_distribution().log_prob,
        "log_z": prior.log_prob,
        "snis": lambda z: prior.snis_log_prob(z, num_proposals),
    }
    return metrics.importance_weighted_nll(
        test, vae.encode, vae.decode, log_priors, num_samples, transform=transform, seed=seed
    )


@torch.no_grad()
def decode_mean(vae: VAE, z: Tensor) -> Tensor:
    """The mean of p(x|z): the picture to look at."""
    return vae.decode(z).mean


def image_rows(
    report: Report,
    nll: dict[str, metrics.Likelihood],
    log_z: LogNormalizer,
    stage_two: NCPResult,
    drawn: Diagnostics,
    decimals: int,
) -> None:
    """The rows and figures that all image demos have."""
    for name, label in (("log_z", "log Ẑ"), ("snis", "SNIS bound")):
        cells = (f"{nll[key].nll:.{decimals}f}" for key in ("base", name))
        report.row(f"test NLL, {label} (nats)", *cells)
    gain = nll["base"].per_example - nll["snis"].per_example
    gain_error = float(gain.std()) / len(gain) ** 0.5
    report.row("  gain per image ± standard error", "", f"{gain.mean():.3f} ± {gain_error:.3f}")
    ratio_rows(report, log_z, stage_two, drawn)
    report.figure(
        nll_base=nll["base"].nll,
        nll_ncp_log_z=nll["log_z"].nll,
        nll_ncp_snis=nll["snis"].nll,
        gain_snis=float(gain.mean()),
        gain_snis_standard_error=gain_error,
    )


def ratio_rows(report: Report, log_z: LogNormalizer, stage_two: NCPResult, drawn: Diagnostics) -> None:
    """The rows and figures about the classifier and its ratio."""
    report.row("log Ẑ ± standard error (nats)", "", f"{log_z.value:.3f} ± {log_z.standard_error:.3f}")
    report.row("classifier's held-out loss (1.386 = equal)", "", f"{stage_two.loss:.3f}")
    report.row("JSD(q, base) (nats, ≤ 0.693)", f"{stage_two.jsd:.3f}")
    report.row(f"ESS of {drawn.num_proposals:,} proposals", "", f"{float(drawn.ess.mean()):.1f}")
    report.figure(
        log_z=log_z.value,
        log_z_standard_error=log_z.standard_error,
        nce_loss=stage_two.loss,
        jsd=stage_two.jsd,
        ess=float(drawn.ess.mean()),
        ess_proposals=drawn.num_proposals,
        ncp_steps=stage_two.steps,
        ncp_seconds=stage_two.seconds,
    )
