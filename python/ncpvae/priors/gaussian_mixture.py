"""A mixture of Gaussians, fitted to codes by expectation-maximisation."""

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, MixtureSameFamily, MultivariateNormal

from ..distributions import DiagonalMixture
from ..pretrained import Pretrained


class GaussianMixture(Pretrained):
    """Σ_k w_k N(z; mean_k, covariance_k) over z [..., D].

    Args:
        log_weight: [K], nats.
        mean: [K, D].
        scale: standard deviations [K, D] for diagonal covariances, lower Cholesky factors [K, D, D] for full ones.

    Source of the use as a prior: Ghosh et al., "From variational to deterministic autoencoders", ICLR 2020.
    """

    log_weight: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, log_weight: Tensor, mean: Tensor, scale: Tensor):
        super().__init__()
        K, D = mean.shape if mean.dim() == 2 else (-1, -1)
        if log_weight.shape != (K,) or scale.shape not in ((K, D), (K, D, D)):
            raise ValueError(
                "GaussianMixture: log_weight must be [K], mean [K, D] and scale [K, D] or [K, D, D], got shapes "
                f"{tuple(log_weight.shape)}, {tuple(mean.shape)}, {tuple(scale.shape)}"
            )
        if not (torch.isfinite(log_weight).all() and torch.isfinite(mean).all()):
            raise ValueError("GaussianMixture: log_weight and mean must be finite")
        if not (torch.diagonal(scale, dim1=-2, dim2=-1) if scale.dim() == 3 else scale).gt(0).all():
            raise ValueError("GaussianMixture: scale must be > 0, on the diagonal of Cholesky factors")
        self.register_buffer("log_weight", log_weight)
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    def forward(self, context: Tensor | None = None) -> Distribution:
        if self.scale.dim() == 2:
            return DiagonalMixture(self.log_weight, self.mean, self.scale)
        components = MultivariateNormal(self.mean, scale_tril=self.scale, validate_args=False)
        weights = Categorical(logits=self.log_weight, validate_args=False)
        return MixtureSameFamily(weights, components, validate_args=False)

    @classmethod
    def fit(
        cls, codes: Tensor, num_components: int = 10, covariance: str = "full", max_iter: int = 200, seed: int = 0
    ) -> "GaussianMixture":
        """Fit to codes [N, D] by scikit-learn's EM.

        Args:
            codes: on any device; the fit runs on the CPU in float64.
            num_components: K, at most N.
            covariance: "diag" or "full".
            max_iter: EM iterations.
            seed: of the k-means initialisation.
        """
        try:
            from sklearn.mixture import GaussianMixture as EM
        except ImportError as error:
            raise ImportError("GaussianMixture.fit needs scikit-learn: pip install 'ncpvae[data]'") from error
        if covariance not in ("diag", "full"):
            raise ValueError(f"GaussianMixture.fit: covariance must be 'diag' or 'full', got {covariance!r}")
        if not isinstance(codes, Tensor) or not codes.is_floating_point():
            got = getattr(codes, "dtype", type(codes))
            raise TypeError(f"GaussianMixture.fit: codes must be a floating-point tensor, got {got}")
        if codes.dim() != 2 or len(codes) < max(2, num_components):
            raise ValueError(
                f"GaussianMixture.fit: codes must be [N, D] with N ≥ max(2, K = {num_components}), "
                f"got shape {tuple(codes.shape)}"
            )
        if not torch.isfinite(codes).all():
            raise ValueError("GaussianMixture.fit: codes must be finite, got NaN or infinity")
        em = EM(num_components, covariance_type=covariance, max_iter=max_iter, random_state=seed)
        em.fit(codes.detach().double().cpu().numpy())
        weight, mean, spread = (torch.as_tensor(v) for v in (em.weights_, em.means_, em.covariances_))
        scale = spread.sqrt() if covariance == "diag" else torch.linalg.cholesky(spread)
        return cls(*(v.to(codes) for v in (weight.log(), mean, scale)))
