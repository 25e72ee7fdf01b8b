"""How far a base and a reweighted distribution are apart, from importance weights."""

import torch
from torch import Tensor


def effective_sample_size(log_weights: Tensor, dim: int = -1) -> Tensor:
    """(Σw)²/Σw² over `dim`: how many equally weighted draws the weighted ones are worth; 1 … M, 0 without weight.

    Args:
        log_weights: nats, unnormalised.

    Source: Kong, "A note on importance sampling using standardized weights", 1992; NCP-VAE, footnote 3.
    """
    total = 2 * torch.logsumexp(log_weights, dim) - torch.logsumexp(2 * log_weights, dim)
    return torch.where((log_weights == -torch.inf).all(dim), 0.0, total.exp())
