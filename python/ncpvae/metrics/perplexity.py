"""Perplexity of held-out text. Letters: N texts."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._common import check_numbers, in_float64
from .likelihood import Likelihood


@dataclass(frozen=True)
class Perplexity:
    """Perplexity per word of a set of texts.

    Attributes:
        value: exp(nll_per_word); infinite where that passes float64's range.
        standard_error: of the value over texts, to first order (delta method for a ratio of means); NaN for one text.
        nll_per_word: total negative log-likelihood over total words, nats.
        num_words: predicted words in all texts.
        protocol: how it was computed.
    """

    value: float
    standard_error: float
    nll_per_word: float
    num_words: int
    protocol: str


@torch.no_grad()
def perplexity(nll: Tensor | Likelihood, num_words: Tensor) -> Perplexity:
    """exp(Σ_n −log p(x_n) / Σ_n words of x_n): the totals are divided, not the texts' own ratios averaged.

    With the bound of `importance_weighted_nll` it is an upper bound of the model's perplexity.

    Args:
        nll: [N], negative log-likelihood of each whole text, nats; or `Likelihood`, whose protocol is then kept.
        num_words: [N], integers ≥ 1: the words that the model predicts, so `</s>` counts and `<s>` does not.
    """
    owner = "perplexity"
    values, source = (nll.per_example, nll.protocol) if isinstance(nll, Likelihood) else (nll, "as given")
    check_numbers(owner, "nll", values)
    if not isinstance(num_words, Tensor):
        raise TypeError(f"{owner}: num_words must be a tensor [N], got {type(num_words).__name__}")
    if num_words.is_floating_point() or num_words.is_complex() or num_words.dtype == torch.bool:
        raise TypeError(f"{owner}: num_words must be integers, got {num_words.dtype}")
    if num_words.shape != values.shape:
        raise ValueError(f"{owner}: num_words must be {tuple(values.shape)} as nll, got shape {tuple(num_words.shape)}")
    if int(num_words.min()) < 1:
        raise ValueError(f"{owner}: num_words must be ≥ 1, since </s> counts, got {int(num_words.min())}")
    values, words, n = in_float64(values).cpu(), num_words.cpu().double(), len(values)
    rate = values.sum() / words.sum()
    residuals = values - rate * words
    rate_error = residuals.square().sum().mul(n / (n - 1)).sqrt() / words.sum() if n > 1 else rate.new_tensor(math.nan)
    return Perplexity(
        float(rate.exp()),
        float(rate.exp() * rate_error),
        float(rate),
        int(num_words.sum()),
        f"exp(total nats / {int(num_words.sum())} words) of {n} texts, </s> counted and <s> not; nats: {source}",
    )
