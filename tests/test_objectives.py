import math

import pytest
import torch
from torch.nn import functional as F

from ncpvae import objectives


def test_nce_is_the_sum_of_two_cross_entropies():
    q, p = torch.randn(50, dtype=torch.float64), torch.randn(70, dtype=torch.float64)
    expected = -torch.sigmoid(q).log().mean() - (1 - torch.sigmoid(p)).log().mean()
    torch.testing.assert_close(objectives.nce(q, p), expected)


def test_nce_of_an_ignorant_classifier_is_two_log_two():
    zero = torch.zeros(3)
    assert objectives.nce(zero, zero).item() == pytest.approx(2 * math.log(2))
    assert objectives.jensen_shannon_divergence(2 * math.log(2)) == pytest.approx(0.0)
    assert objectives.jensen_shannon_divergence(0.0) == pytest.approx(math.log(2))


def test_label_smoothing_is_cross_entropy_against_soft_targets():
    q, p = torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    soft = F.binary_cross_entropy_with_logits(q, torch.full_like(q, 0.9))
    soft = soft + F.binary_cross_entropy_with_logits(p, torch.full_like(p, 0.1))
    torch.testing.assert_close(objectives.nce(q, p, label_smoothing=0.2), soft)
    with pytest.raises(ValueError, match=r"nce: label_smoothing must be in \[0, 1\), got 1.5"):
        objectives.nce(q, p, label_smoothing=1.5)


def test_nce_stays_finite_at_extreme_logits():
    big = torch.tensor([1e4, -1e4])
    assert torch.isfinite(objectives.nce(big, big))


def test_accuracy_counts_both_sides():
    assert objectives.nce_accuracy(torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 3.0])).item() == 0.75
