"""Stage two for hierarchical VAEs: K classifiers from one frozen walk."""

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from .. import _distributed, _random, objectives
from ..hierarchy import Posterior, walk_groups
from ..priors import HierarchicalNCP, NoiseContrastive
from ..priors.hierarchical import naming_group
from .batches import Data, held_out_split, mean_over_parts, parts, source
from .divergence import TrainingDiverged
from .engine import Schedule, TrainResult, train
from .execution import Execution, check_count, processes
from .ncp import EASY_LOSS


@dataclass(frozen=True)
class HierarchicalNCPResult:
    """What stage two found out, group by group in the order of `groups`.

    Attributes:
        groups: the groups that were trained, numbered from 0.
        loss: held-out noise contrastive loss, nats, 2·log 2 where base and posterior agree (NCP-VAE, Eq. 4).
        jsd: log 2 − ½·loss, nats; see `NCPResult`.
        accuracy: held-out accuracy of the classifier.
        best_step: the step whose weights the classifier now has.
        trustworthy: False where the classes separate so easily that the ratio cannot be trusted.
        steps, seconds, stopped_early, history: of the run, see `TrainResult`; where groups are shared out among
            processes, of this process's run.
    """

    groups: list[int]
    loss: list[float]
    jsd: list[float]
    accuracy: list[float]
    best_step: list[int]
    trustworthy: list[bool]
    steps: int
    seconds: float
    stopped_early: bool
    history: list[dict[str, float]] = field(repr=False)


@dataclass
class Contrast:
    """Select draws z_k ~ q(z_k | z_<k, x), and beside each draw one of p(z_k | z_<k), under the same context.

    Attributes:
        pairs: (base, context, q's draw, p's draw) of every group that the walk has been at.
    """

    path: Posterior
    pairs: list[tuple[Distribution, Tensor | None, Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, k: int, base: Distribution, context: Tensor | None) -> Tensor:
        z = self.path(k, base, context)
        self.pairs.append((base, context, z, base.sample()))
        return z


def fit_hierarchical_ncp(
    prior: HierarchicalNCP,
    data: Data,
    *,
    validation: Data | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    validation_transform: Callable[[Tensor], Tensor] | None = None,
    validation_fraction: float = 0.1,
    groups: Sequence[int] | None = None,
    shard_groups: bool = False,
    steps: int = 5000,
    batch_size: int = 512,
    lr: float = 1e-3,
    schedule: Schedule = "cosine",
    label_smoothing: float = 0.0,
    validate_every: int | None = None,
    patience: int | None = 5,
    seed: int = 0,
    execution: Execution | None = None,
    folder: Path | None = None,
    resume: str | Path = "never",
    settings: dict[str, Any] | None = None,
    progress: bool = True,
) -> HierarchicalNCPResult:
    """Train the classifiers of all groups to tell q(z_k | z_<k, x) from p(z_k | z_<k) (NCP-VAE, Eq. 4).

    One walk of the frozen VAE for each batch, in eval mode and without gradients, gives all classifiers their draws;
    their losses are summed. They have no weights in common, so that a group comes to the same weights, bit for bit,
    whichever groups are trained with it. Each keeps the weights with its own lowest held-out loss, and its held-out
    divergence goes to `prior.jsd`.

    Several processes share the rows of every batch, as in `fit_vae`, or the groups.

    Args:
        prior: its classifiers are trained in place and left in eval mode; its VAE is not touched.
        data: [N, …], the VAE's input, or any iterable of batches of it. Codes are drawn anew at every step.
        validation: held-out data; otherwise the share `validation_fraction` of the examples. It must be given with an
            iterable. Its codes are the same draws at every validation.
        transform: applied to every batch of data on the VAE's device; by default the VAE's `prepare` where it has one,
            else conversion to float32.
        validation_transform: the same for held-out data; `transform` by default.
        groups: numbers of those to train, from 0; all by default. The others keep their classifiers and `jsd`.
        shard_groups: every process trains every W-th of the groups, by whole batches, and holds the optimiser's state
            of these alone; in the end all have all classifiers, those that one process would get. The folder then
            has one of each process, `part-<rank>`. Without it each process has its share of the rows of a batch.
        steps, batch_size, lr, schedule: of Adam; the paper's are 512 (MNIST, CIFAR-10), 1e-3 and cosine.
        label_smoothing: see `objectives.nce`.
        validate_every, patience: in steps, and in validations without improvement, after which a group's weights are
            settled. The run ends when all groups' are. None never stops.
        seed: the run is deterministic for a seed.
        execution, folder, resume, settings: see `fit_vae`. `max_grad_norm` would make one group's steps depend on the
            others', and `ema_decay` average what is kept of the best: both must be None. `halve_lr` halves the rate of
            all groups that a process trains, when one of them diverges.
        progress: show a progress bar.

    Raises:
        TypeError, ValueError: naming the argument that is off, or the group whose classifier does not fit it.
        TrainingDiverged: where a loss becomes NaN or infinite; the terms are `nce`, the sum, and `nce_1` … `nce_K`.

    Warns:
        RuntimeWarning: where a held-out loss is so small that the base is too far from the posterior.
    """
    chosen, execution = _checked_groups(prior, groups), execution or Execution()
    _check_settings(execution, validation_fraction, seed, steps, batch_size, validate_every, patience)
    rows, held_out = held_out_split("fit_hierarchical_ncp", "data", data, validation, validation_fraction, seed)
    batches, gather = source("fit_hierarchical_ncp", "data", data, batch_size, seed, rows)
    prior.eval()
    device = next(prior.classifiers[chosen[0]].parameters()).device
    if shard_groups:
        processes(cpu=device.type == "cpu")  # under torchrun the group of processes exists only from here on
    ranks = _distributed.ranks(shard_groups)
    mine = [chosen[i] for i in ranks.mine(len(chosen))]
    stage = _Stage(prior, mine, label_smoothing, patience, validate_every or max(1, steps // 20), steps, device)
    prepare = transform or getattr(prior.vae, "prepare", None) or (lambda x: x.float())
    prepare_held_out = validation_transform or prepare

    def terms(batch: Any) -> dict[str, Tensor]:
        return stage.losses(prepare(gather(batch).to(device, non_blocking=True)))

    def validate() -> dict[str, float]:
        examples = parts("fit_hierarchical_ncp", "validation", held_out, batch_size)
        return stage.remember(mean_over_parts(lambda x: stage.figures(prepare_held_out(x.to(device))), examples, seed))

    known = {"stage": "hierarchical ncp", "batch_size": batch_size, "label_smoothing": label_smoothing, "groups": mine}
    run: TrainResult | None = None
    with ranks.failing_together("fit_hierarchical_ncp"), _distributed.alone() if shard_groups else nullcontext():
        if isinstance(data, Tensor):
            with torch.no_grad(), _random.scoped(seed):
                stage.figures(prepare(data[:2].to(device)))  # what does not fit is named before training
        if mine:
            try:
                run = train(
                    stage,
                    terms,
                    batches,
                    steps=steps,
                    lr=lr,
                    schedule=schedule,
                    validate=validate,
                    validate_every=stage.validate_every,
                    patience=patience,
                    seed=seed,
                    execution=execution,
                    folder=folder / f"part-{ranks.rank}" if folder is not None and ranks.size > 1 else folder,
                    resume=resume,
                    settings={**known, **(settings or {})},
                    progress=progress,
                    description="NCP",
                )
            finally:  # also after a failure the prior is left usable
                stage.leave_best()
                prior.eval()
    return _settled(prior, [result for part in ranks.gather(stage.results()) for result in part], run)


def _settled(prior: HierarchicalNCP, found: list[dict[str, Any]], run: TrainResult | None) -> HierarchicalNCPResult:
    """The prior's classifiers and divergences become those that all processes found; the figures of them."""
    found = sorted(found, key=lambda result: result["group"])
    losses = [result["loss"] for result in found]
    divergences = [float(objectives.jensen_shannon_divergence(loss)) for loss in losses]
    for result, jsd in zip(found, divergences, strict=True):
        prior.classifiers[result["group"]].load_state_dict(result["weights"])
        prior.jsd[result["group"]] = jsd
    _warn_of_easy([result["group"] for result in found if result["loss"] < EASY_LOSS])
    return HierarchicalNCPResult(
        groups=[result["group"] for result in found],
        loss=losses,
        jsd=divergences,
        accuracy=[result["accuracy"] for result in found],
        best_step=[result["best_step"] for result in found],
        trustworthy=[loss >= EASY_LOSS for loss in losses],
        steps=run.steps if run else 0,
        seconds=run.seconds if run else 0.0,
        stopped_early=run.stopped_early if run else False,
        history=run.history if run else [],
    )


class _Stage(nn.Module):
    """What the loop trains and checkpoints: classifiers of some groups, and of each the best so far.

    A group's best is settled when its patience has run out, whatever the others do, as if it were trained alone.
    """

    prior: HierarchicalNCP
    loss: Tensor
    accuracy: Tensor
    best_step: Tensor
    stale: Tensor
    validations: Tensor

    def __init__(
        self,
        prior: HierarchicalNCP,
        groups: list[int],
        label_smoothing: float,
        patience: int | None,
        validate_every: int,
        steps: int,
        device: torch.device,
    ):
        super().__init__()
        self.__dict__["prior"] = prior  # not a part: the VAE is neither trained nor saved
        self.groups, self.label_smoothing, self.patience = groups, label_smoothing, patience
        self.validate_every, self.steps = validate_every, steps
        self.current = nn.ModuleList(prior.classifiers[k] for k in groups)
        self.best = copy.deepcopy(self.current).requires_grad_(False)
        count = len(groups)
        self.register_buffer("loss", torch.full((count,), math.inf, dtype=torch.float64, device=device))
        self.register_buffer("accuracy", torch.zeros(count, dtype=torch.float64, device=device))
        self.register_buffer("best_step", torch.zeros(count, dtype=torch.int64, device=device))
        self.register_buffer("stale", torch.zeros(count, dtype=torch.int64, device=device))
        self.register_buffer("validations", torch.zeros((), dtype=torch.int64, device=device))

    def _logits(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """log r_k at q's draws and at p's, each [B], for every group of `groups`."""
        prior = self.prior
        with torch.no_grad():
            contrast = Contrast(Posterior(prior.vae, prior.vae.encode(x)))
            walk_groups(prior.vae, contrast, len(x))  # to the lowest, so that all draw alike whatever the groups
        seed = torch.initial_seed()  # the loop's, of this step and shard
        logits = []
        for k in self.groups:
            base, context, q, p = contrast.pairs[k]
            _random.reseed(_random.derived_seed(seed, k))  # a classifier's dropout does not depend on the others'
            with naming_group(prior.groups, k):  # in one pass: BatchNorm sees both classes together
                both = NoiseContrastive(base, prior.classifiers[k], context).log_ratio(torch.stack([q, p]))
            logits.append((both[0], both[1]))
        return logits

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        """The sum of the groups' losses, and each of them."""
        losses = [objectives.nce(q, p, self.label_smoothing) for q, p in self._logits(x)]
        named = {f"nce_{k + 1}": loss for k, loss in zip(self.groups, losses, strict=True)}
        return {"nce": torch.stack(losses).sum(), **named}

    def figures(self, x: Tensor) -> dict[str, Tensor]:
        """Held-out loss and accuracy of each group."""
        found: dict[str, Tensor] = {}
        for k, (q, p) in zip(self.groups, self._logits(x), strict=True):
            found |= {f"nce_{k + 1}": objectives.nce(q, p), f"accuracy_{k + 1}": objectives.nce_accuracy(q, p)}
        return found

    def remember(self, figures: dict[str, float]) -> dict[str, float]:
        """Keep the groups that are better than before; the figures for the loop, the sum of the best losses first.

        That sum falls when any group has become better, so that the loop keeps the state of the last such step, with
        the best of all groups in it, and its patience is that of the last group.
        """
        self.validations += 1
        for i, k in enumerate(self.groups):
            loss = figures[f"nce_{k + 1}"]
            if not math.isfinite(loss):
                raise TrainingDiverged(f"NCP: the held-out loss of group {k + 1} of {len(self.prior.groups)} is {loss}")
            if self.patience is not None and int(self.stale[i]) >= self.patience:
                continue
            self.stale[i] += 1
            if loss < float(self.loss[i]):
                self.loss[i], self.accuracy[i], self.stale[i] = loss, figures[f"accuracy_{k + 1}"], 0
                self.best_step[i] = min(int(self.validations) * self.validate_every, self.steps)
                self.best[i].load_state_dict(self.current[i].state_dict())
        total = sum(figures[f"nce_{k + 1}"] for k in self.groups)
        return {"best": float(self.loss.sum()), "nce": total, **figures}

    def leave_best(self) -> None:
        """Give every classifier its best weights, where there has been a validation."""
        for i in range(len(self.groups)):
            if math.isfinite(float(self.loss[i])):
                self.current[i].load_state_dict(self.best[i].state_dict())

    def results(self) -> list[dict[str, Any]]:
        """Of every group its number, figures and weights, the latter on the CPU."""
        return [
            {
                "group": k,
                "loss": float(self.loss[i]),
                "accuracy": float(self.accuracy[i]),
                "best_step": int(self.best_step[i]),
                "weights": {name: tensor.cpu() for name, tensor in self.current[i].state_dict().items()},
            }
            for i, k in enumerate(self.groups)
        ]


def _check_settings(
    execution: Execution,
    validation_fraction: float,
    seed: int,
    steps: int,
    batch_size: int,
    validate_every: int | None,
    patience: int | None,
) -> None:
    owner = "fit_hierarchical_ncp"
    for name in ("max_grad_norm", "skip_grad_norm", "ema_decay"):
        if getattr(execution, name) is not None:
            raise ValueError(f"{owner}: execution.{name} must be None, got {getattr(execution, name)}")
    if not 0.0 < validation_fraction < 1.0:
        raise ValueError(f"{owner}: validation_fraction must be between 0 and 1, got {validation_fraction}")
    check_count(f"{owner}: seed", seed, minimum=0, below=1 << 62)
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        check_count(f"{owner}: {name}", value)
    for name, optional in (("validate_every", validate_every), ("patience", patience)):
        if optional is not None:
            check_count(f"{owner}: {name}", optional)


def _checked_groups(prior: HierarchicalNCP, groups: Sequence[int] | None) -> list[int]:
    """Numbers of the groups to train, in order; their classifiers have something to train."""
    if not isinstance(prior, HierarchicalNCP):
        raise TypeError(f"fit_hierarchical_ncp: prior must be a HierarchicalNCP, got {type(prior).__name__}")
    count = len(prior.groups)
    numbers = list(range(count)) if groups is None else list(groups)
    if not numbers or len(set(numbers)) != len(numbers) or not set(numbers) <= set(range(count)):
        raise ValueError(f"fit_hierarchical_ncp: groups must be different numbers of 0 … {count - 1}, got {groups}")
    for k in numbers:
        if not any(p.requires_grad for p in prior.classifiers[k].parameters()):
            raise ValueError(
                f"fit_hierarchical_ncp: the classifier of group {k + 1} of {count} must have parameters to train, got "
                "none that require gradients"
            )
    return sorted(numbers)


def _warn_of_easy(groups: list[int]) -> None:
    if groups:
        warnings.warn(
            f"fit_hierarchical_ncp: the classifiers of groups {', '.join(str(k + 1) for k in groups)} separate "
            f"posterior and base draws too easily for their ratios to be trusted (held-out losses below {EASY_LOSS} of "
            "at most 1.386). Train the VAE longer, or divide its latent variables into more groups.",
            RuntimeWarning,
            stacklevel=4,
        )
