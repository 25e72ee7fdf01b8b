"""The noise contrastive prior p_NCP(z) = r(z) p(z) / Z (NCP-VAE, section 3).

A classifier told draws of the aggregate posterior q(z) from draws of the base prior p(z); its logit is log r.
"""

import copy
import math
from contextlib import nullcontext
from functools import reduce
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from .. import _distributed, _random, ops
from ..distributions import temper
from ..nn import fused
from ..pretrained import Pretrained
from ..samplers import SIR, TILE, Langevin, base_draws, gather_states, gradient_of, skip_proposals

ROWS_AT_ONCE = 1 << 14  # z given to the classifier at a time where no gradient is kept …
ELEMENTS_AT_ONCE = 1 << 22  # … and fewer where they are large …
CACHE_BYTES = 1 << 22  # … and on a CPU as many as keep the largest activation in the second- and third-level cache
SNIS_SETS = 16  # independent sets of proposals in one call of snis_log_prob


class LogNormalizer(NamedTuple):
    """An estimate of log Z = log E_p[r(z)].

    Attributes:
        value: log of the mean of r over base draws, nats. On average below log Z, by Jensen's inequality, so that
            a likelihood computed with it is optimistic, the more so the larger `standard_error`.
        standard_error: of `value`, by the delta method: √(1/ESS − 1/n).
        ess: effective sample size of the draws.
        num_samples: n.
    """

    value: float
    standard_error: float
    ess: float
    num_samples: int


class NoiseContrastive(Distribution):
    """The distribution p_NCP(z) = r(z) p(z) / Z.

    Args:
        base: p(z), with event shape [*event].
        classifier: (z, context) → log r, see `ncpvae.classifiers`.
        context: [B, …] for a base with batch shape [B], handed to the classifier.
        log_normalizer: log Z in nats, where it is known; without it there is no `log_prob`.
    """

    arg_constraints: ClassVar[dict] = {}
    support = constraints.real

    def __init__(
        self,
        base: Distribution,
        classifier: nn.Module,
        context: Tensor | None = None,
        log_normalizer: float | Tensor | None = None,
    ):
        if not isinstance(base, Distribution):
            raise TypeError(f"NoiseContrastive: base must be a torch Distribution, got {type(base).__name__}")
        if not base.event_shape:
            raise ValueError(
                "NoiseContrastive: base must have an event shape, got one with a batch shape only; "
                "wrap it in torch.distributions.Independent"
            )
        if context is not None and base.batch_shape != context.shape[:1]:
            raise ValueError(
                f"NoiseContrastive: base must have the context's batch {tuple(context.shape[:1])} as its batch shape, "
                f"got {tuple(base.batch_shape)}; make it depend on the context, or expand it"
            )
        self.base, self.classifier, self.context, self.log_normalizer = base, classifier, context, log_normalizer
        self.dtype: torch.dtype | None = None  # of the classifier's products, by autocast; see `fused`
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    def log_ratio(self, z: Tensor) -> Tensor:
        """log r(z), nats: z [..., *batch, *event] → [..., *batch].

        Without gradients the classifier sees a bounded number of rows at a time.

        Raises:
            ValueError: where z does not fit the base, or the classifier's output is not one number per z.
        """
        event = self.event_shape
        if z.shape[z.dim() - len(event) :] != event:
            raise ValueError(f"log_ratio: z must be [..., {', '.join(map(str, event))}], got shape {tuple(z.shape)}")
        leading = z.shape[: z.dim() - len(event)]
        if self.context is not None:  # the classifier wants the context's B first: [B, M, *event]
            rows = z.reshape(-1, *z.shape[len(leading) - 1 :]).movedim(0, 1)
            return self._in_parts(rows).T.reshape(leading)
        return self._in_parts(z.reshape(1, -1, *event))[0].view(leading)

    def fused(self, dtype: torch.dtype | None = None) -> "NoiseContrastive":
        """The same distribution with its classifier in the form that is fastest to evaluate without gradients.

        Args:
            dtype: torch.bfloat16 or torch.float16, of the classifier's matrix products and convolutions, by autocast.
        """
        twin = copy.copy(self)
        twin.classifier, twin.dtype = fused(self.classifier, dtype), dtype
        return twin

    def _rows_at_once(self, z: Tensor) -> int:
        event = self.event_shape
        rows = min(ROWS_AT_ONCE, ELEMENTS_AT_ONCE // event.numel())
        if z.device.type == "cpu":
            rows = min(rows, CACHE_BYTES // (widest(self.classifier, event) * (self.dtype or z.dtype).itemsize))
        return max(1, rows)

    def _in_parts(self, z: Tensor) -> Tensor:
        """z [B, M, *event] → [B, M], a bounded number of rows at a time unless gradients are wanted."""
        if torch.is_grad_enabled():
            return self._classify(z)
        parts = z.split(max(1, self._rows_at_once(z) // len(z)), dim=1)
        return torch.cat([self._classify(part) for part in parts], dim=1)

    def _classify(self, z: Tensor) -> Tensor:
        """One call of the classifier, [B, M, *event] → [B, M], with what goes wrong in it named."""
        inputs = (z[0],) if self.context is None else (z, self.context)
        expected = inputs[0].shape[: inputs[0].dim() - len(self.event_shape)]
        try:
            with nullcontext() if self.dtype is None else torch.autocast(z.device.type, self.dtype):
                log_ratio = self.classifier(*inputs)
        except torch.OutOfMemoryError:  # a RuntimeError too, but not one about shapes
            raise
        except (RuntimeError, IndexError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"classifier does not take z of shape {tuple(inputs[0].shape)}: {reason}") from error
        if not isinstance(log_ratio, Tensor) or log_ratio.shape != expected:
            got = tuple(log_ratio.shape) if isinstance(log_ratio, Tensor) else type(log_ratio).__name__
            raise ValueError(f"classifier must return one logit per z, shape {tuple(expected)}, got {got}")
        return log_ratio.view(z.shape[:2])

    def score(self, z: Tensor) -> Tensor:
        """∇ log r(z), a tensor of z's shape without a gradient of its own; z [..., *batch, *event]."""
        own = getattr(type(self.classifier), "score", None)
        gradient = own(self.classifier, z) if own is not None and self.context is None else None
        return gradient_of(self.log_ratio, z) if gradient is None else gradient

    def unnormalized_log_prob(self, z: Tensor) -> Tensor:
        """log r(z) + log p(z), nats; [..., *batch]."""
        return self.log_ratio(z) + self.base.log_prob(z)

    def energy(self, z: Tensor) -> Tensor:
        """E(z) = −log r(z) − log p(z) (NCP-VAE, section 3.3)."""
        return -self.unnormalized_log_prob(z)

    def log_prob(self, z: Tensor) -> Tensor:
        """log r(z) + log p(z) − log Ẑ, nats.

        Raises:
            RuntimeError: where log Z has not been estimated.
        """
        if self.log_normalizer is None:
            raise RuntimeError(
                "log_prob needs log Z: call estimate_log_normalizer(num_samples) first, "
                "or use unnormalized_log_prob or snis_log_prob"
            )
        return self.unnormalized_log_prob(z) - self.log_normalizer

    @torch.no_grad()
    def estimate_log_normalizer(
        self, num_samples: int = 100_000, generator: torch.Generator | None = None, distributed: bool = False
    ) -> LogNormalizer:
        """Estimate log Z = log E_p[r] by base draws, streamed, and keep it in this object for `log_prob`.

        Args:
            num_samples: base draws, ≥ 2. Memory does not depend on it.
            generator: governs the draws.
            distributed: share the classifier's work with the other processes of torch.distributed's default group, if
                there is one. All must make the same call with their generators in the same state; all get the
                estimate that one process would get, to rounding.

        Raises:
            ValueError: for a distribution with a context, each of which has a Z of its own; for a ratio that is NaN;
                for processes that differ in num_samples, generator or base.
            RuntimeError: where another of the processes fails, with its number and message.
        """
        if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 2:
            raise ValueError(f"estimate_log_normalizer: num_samples must be an integer ≥ 2, got {num_samples!r}")
        if self.batch_shape or self.context is not None:
            raise ValueError(f"estimate_log_normalizer: the base must have no batch, got {tuple(self.batch_shape)}")
        state, ranks = None, _distributed.ranks(distributed)
        with _random.scoped(generator), ranks.failing_together("estimate_log_normalizer"):
            draws, fast = base_draws(self.base), self.fused()
            for number, start in enumerate(range(0, num_samples, 16 * TILE)):
                count = min(16 * TILE, num_samples - start)
                z = draws.draw(count) if number % ranks.size == ranks.rank else None
                if z is None:
                    draws.skip(count)
                if state is None:
                    state, seed = ops.sir_state(1, device=draws.like.device), ops.draw_seed(draws.like.device)
                if z is None:
                    state = skip_proposals(state, count)
                else:
                    state = ops.sir_update(state, fast.log_ratio(z)[None], seed)
        assert state is not None
        if ranks.size > 1:
            drawn = {
                "num_samples": num_samples,
                "the generator's draw": seed.tolist(),
                "the base": draws.fingerprint(),
            }
            state = reduce(ops.sir_merge, gather_states("estimate_log_normalizer", ranks, state, drawn))
        value, ess = float(state.log_mean_weight), float(state.ess)
        if not math.isfinite(value):
            raise ValueError(f"estimate_log_normalizer: log_ratio must be finite at base draws, got log Z = {value}")
        self.log_normalizer = value
        standard_error = math.sqrt(max(0.0, 1 / ess - 1 / num_samples))
        return LogNormalizer(value, standard_error, ess, num_samples)

    def snis_log_prob(self, z: Tensor, num_proposals: int = 1024, generator: torch.Generator | None = None) -> Tensor:
        """A valid bound on the log-density of the finite-K SIR sampler, nats; [..., *batch].

        log p(z) + log r(z) − log( (r(z) + Σ_{k=2…K} r(z_k)) / K ), z_k ~ p. Its expectation over z_2…z_K bounds the
        log-density of what `SIR(K)` draws from below, and needs no log Z. In an importance-weighted likelihood
        it keeps the bound valid. Gradients flow through all of it.

        Args:
            z: [..., *batch, *event]. Up to 16 slices of its first dimension have sets of K − 1 draws of their own;
                within a slice all z share one set, which blurs the mean over them by an error in common.
            num_proposals: K ≥ 1; K = 1 is the base itself.

        Source: Lawson, Tucker, Dai, Ranganath, "Energy-inspired models: learning with sampler-induced
        distributions", NeurIPS 2019.
        """
        if isinstance(num_proposals, bool) or not isinstance(num_proposals, int) or num_proposals < 1:
            raise ValueError(f"snis_log_prob: num_proposals must be an integer ≥ 1, got {num_proposals!r}")
        log_r, log_p = self.log_ratio(z), self.base.log_prob(z)
        if num_proposals == 1:
            return log_p
        sample_dims = log_r.dim() - len(self.batch_shape)
        parts = log_r.tensor_split(min(len(log_r), SNIS_SETS)) if sample_dims and len(log_r) else (log_r,)
        with _random.scoped(generator):
            others = (self.log_ratio(self.base.sample((num_proposals - 1,))).logsumexp(0) for _ in parts)
            totals = [torch.logaddexp(part, other) for part, other in zip(parts, others, strict=True)]
        log_total = torch.cat(totals) if sample_dims else totals[0]
        return log_p + log_r - log_total + math.log(num_proposals)

    def tempered(self, temperature: float) -> "NoiseContrastive":
        """The same ratio over the base with its σ scaled by `temperature` (NCP-VAE, section 5.2); its Z is unknown."""
        if temperature == 1.0:
            return self
        return NoiseContrastive(temper(self.base, temperature), self.classifier, self.context)

    def sample(  # type: ignore[override]
        self,
        sample_shape: torch.Size | tuple[int, ...] = (),
        sampler: SIR | Langevin | None = None,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Draw z [*sample_shape, *batch, *event], by SIR with 5,000 proposals unless another sampler is given.

        The sampler's own `sample` gives diagnostics too.
        """
        sampler = SIR() if sampler is None else sampler
        if not hasattr(sampler, "sample"):
            raise TypeError(
                f"sample: sampler must be a sampler such as SIR() or Langevin(), got {type(sampler).__name__}"
            )
        return sampler.sample(self.tempered(temperature), sample_shape, generator).z


def widest(classifier: nn.Module, event: torch.Size) -> int:
    """Elements of the classifier's largest activation for one z, or an upper bound where it does not say."""
    own = getattr(classifier, "widest", None)
    if callable(own):
        return own(event)
    layers = [event.numel()]
    for layer in classifier.modules():
        layers.append(getattr(layer, "out_features", 1))
        layers.append(getattr(layer, "out_channels", 1) * event[1:].numel())
    return max(layers)


class NoiseContrastivePrior(Pretrained):
    """A base prior and the classifier that mends it; `forward(context)` returns the `NoiseContrastive` distribution.

    The methods below are the distribution's, for a prior without context; see there for what they return.

    Args:
        base: p(z): a Distribution, or a module whose forward(context) returns one.
        classifier: module (z, context=None) → log r, from `ncpvae.classifiers` or your own.

    Attributes:
        log_normalizer: the last estimate of log Z, a `LogNormalizer`; None where there is none.

    Example:
        >>> prior = NoiseContrastivePrior(Normal(8), MLPClassifier(8, hidden=(64, 64)))
        >>> prior.sample((16,), sampler=SIR(num_proposals=100)).shape
        torch.Size([16, 8])

    Source: "NCP-VAE: variational autoencoders with noise contrastive priors", ICLR 2021 submission; Aneja, Schwing,
    Kautz, Vahdat, "A contrastive learning approach for training variational autoencoder priors", NeurIPS 2021.
    """

    base: nn.Module | Distribution

    def __init__(self, base: nn.Module | Distribution, classifier: nn.Module):
        super().__init__()
        if not isinstance(base, (nn.Module, Distribution)):
            raise TypeError(
                f"NoiseContrastivePrior: base must be a Distribution or a module, got {type(base).__name__}"
            )
        if not isinstance(classifier, nn.Module):
            raise TypeError(f"NoiseContrastivePrior: classifier must be a module, got {type(classifier).__name__}")
        self.base, self.classifier = base, classifier.eval()  # BatchNorm is for training alone
        self.log_normalizer: LogNormalizer | None = None

    def base_distribution(self, context: Tensor | None = None) -> Distribution:
        """p(z), or p(z | context)."""
        return self.base if isinstance(self.base, Distribution) else self.base(context)

    def forward(self, context: Tensor | None = None) -> NoiseContrastive:
        known = self.log_normalizer if context is None else None
        log_normalizer = None if known is None else known.value
        return NoiseContrastive(self.base_distribution(context), self.classifier, context, log_normalizer)

    def estimate_log_normalizer(
        self, num_samples: int = 100_000, generator: torch.Generator | None = None, distributed: bool = False
    ) -> LogNormalizer:
        """Estimate log Z and keep it with the module's state.

        `fit_ncp` forgets it; after any other change of base or classifier call `forget_log_normalizer`.
        """
        self.log_normalizer = self.forward().estimate_log_normalizer(num_samples, generator, distributed)
        return self.log_normalizer

    def forget_log_normalizer(self) -> None:
        """Mark log Z as unknown, because the base or the classifier has changed."""
        self.log_normalizer = None

    def get_extra_state(self) -> Tensor:
        """What `state_dict` holds of log Z: its value, standard error, ESS and number of draws, NaN where unknown.

        No buffer, since it must stay float64 and on the CPU wherever the module goes.
        """
        return torch.tensor(self.log_normalizer or [math.nan] * 4, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        value, standard_error, ess, num_samples = state.tolist()
        unknown = math.isnan(value)
        self.log_normalizer = None if unknown else LogNormalizer(value, standard_error, ess, int(num_samples))

    def log_ratio(self, z: Tensor) -> Tensor:
        return self.forward().log_ratio(z)

    def unnormalized_log_prob(self, z: Tensor) -> Tensor:
        return self.forward().unnormalized_log_prob(z)

    def energy(self, z: Tensor) -> Tensor:
        return self.forward().energy(z)

    def log_prob(self, z: Tensor) -> Tensor:
        return self.forward().log_prob(z)

    def snis_log_prob(self, z: Tensor, num_proposals: int = 1024, generator: torch.Generator | None = None) -> Tensor:
        return self.forward().snis_log_prob(z, num_proposals, generator)

    def sample(
        self,
        sample_shape: torch.Size | tuple[int, ...] = (),
        sampler: SIR | Langevin | None = None,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        return self.forward().sample(sample_shape, sampler, generator, temperature)
