import json
import math
import warnings
from dataclasses import asdict

import pytest
import torch
from torch import nn

from ncpvae.metrics import Features, InceptionFeatures, extract_features, frechet_distance, kernel_distance

pytest.importorskip("torchmetrics")


def with_moments(mean, covariance, count, offset=0.0):
    """[count, F] float64 whose sample mean and covariance (divisor count − 1) are exactly these."""
    x = torch.randn(count, len(mean), dtype=torch.float64)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / (count - 1)), x.T, upper=False)
    return (torch.linalg.cholesky(covariance) @ white).T + mean + offset


def two_gaussians():
    """Means, covariances that do not commute, and the closed form of their distance."""
    a, b = (m @ m.T + 0.1 * torch.eye(3, dtype=torch.float64) for m in torch.randn(2, 3, 3, dtype=torch.float64))
    m, n = torch.randn(2, 3, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(a)
    root = vectors @ values.sqrt().diag() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b @ root).sqrt().sum()
    return (m, a), (n, b), float((m - n).square().sum() + a.trace() + b.trace() - 2 * cross)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_frechet_of_known_gaussians(offset):
    """An offset common to both changes nothing, in the value or in its accuracy."""
    first, second, truth = two_gaussians()
    x, y = with_moments(*first, 500, offset), with_moments(*second, 300, offset)
    result = frechet_distance(x, y, nn.Identity(), batch_size=64)
    assert result.value == pytest.approx(truth, rel=1e-6)
    assert (result.num_real, result.num_generated) == (500, 300)
    assert math.isnan(result.standard_error)


def test_frechet_is_zero_of_a_set_with_itself_and_symmetric():
    x, y = torch.randn(200, 5), 2 * torch.randn(200, 5) + 1
    assert frechet_distance(x, x, nn.Identity()).value == pytest.approx(0, abs=1e-9)
    one, other = frechet_distance(x, y, nn.Identity()).value, frechet_distance(y, x, nn.Identity()).value
    assert one == pytest.approx(other) and one > 5


def test_images_and_their_features_give_the_same_figures():
    real, generated = torch.rand(60, 1, 3, 3), torch.rand(50, 1, 3, 3) ** 2
    extracted = [extract_features(x, nn.Flatten()) for x in (real, generated)]
    for distance, options in ((frechet_distance, {}), (kernel_distance, {"subset_size": 20, "num_subsets": 5})):
        values = [distance(real.split(7), generated, nn.Flatten(), **options), distance(*extracted, **options)]
        assert values[0].value == pytest.approx(values[1].value, rel=1e-9)
        assert values[0].extractor == values[1].extractor == "Flatten"


def test_only_inception_s_distance_is_called_fid():
    x, y = torch.randn(40, 3), torch.randn(40, 3)
    options = {"subset_size": 10, "num_subsets": 2}
    ours = "classifier trained on mnist, 99.1 % test accuracy"
    assert frechet_distance(Features(x, ours), Features(y, ours)).name == f"Fréchet distance ({ours})"
    assert kernel_distance(Features(x, ours), Features(y, ours), **options).name == f"kernel distance ({ours})"
    theirs = InceptionFeatures.name
    assert frechet_distance(Features(x, theirs), Features(y, theirs)).name == "FID"
    kid = kernel_distance(Features(x, theirs), Features(y, theirs), **options, seed=4)
    assert kid.name == "KID"
    assert "mean of 2 subsets of 10 (seed 4) out of 40 real and 40 generated" in kid.protocol
    assert theirs in kid.protocol
    json.dumps(asdict(kid))


def test_few_examples_warn():
    x = torch.randn(8, 8)
    with pytest.warns(UserWarning, match="8 real and 20 generated examples give a singular covariance of 8 features"):
        frechet_distance(x, torch.randn(20, 8), nn.Identity())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(torch.randn(9, 8), torch.randn(9, 8), nn.Identity())
        kernel_distance(x, x, nn.Identity(), subset_size=4)


def test_kernel_distance_is_the_unbiased_estimate():
    """With one subset of all examples, the double sums without their diagonals."""
    x, y = torch.randn(2, 30, 4, dtype=torch.float64)
    y = y + 0.5
    a, b, c = ((u @ v.T / 4 + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
    off = ~torch.eye(30, dtype=torch.bool)
    truth = a[off].mean() + b[off].mean() - 2 * c.mean()
    result = kernel_distance(x, y, nn.Identity(), subset_size=30, num_subsets=1)
    assert result.value == pytest.approx(float(truth), rel=1e-9)
    assert math.isnan(result.standard_error)


def test_kernel_distance_tells_equal_from_shifted():
    x, y = torch.randn(2, 2000, 8)
    equal = kernel_distance(x, y, nn.Identity(), subset_size=200, num_subsets=50)
    assert abs(equal.value) < 4 * equal.standard_error
    shifted = kernel_distance(x, y + 0.3, nn.Identity(), subset_size=200, num_subsets=50)
    assert shifted.value > 8 * shifted.standard_error


def test_standard_error_is_the_spread_over_data_sets():
    """Up to half as much again; the subsets' bare s / √S would be a third of it."""
    results = [
        kernel_distance(
            torch.randn(300, 8), torch.randn(300, 8) + 0.5, nn.Identity(), subset_size=75, num_subsets=40, seed=i
        )
        for i in range(60)
    ]
    spread = torch.tensor([r.value for r in results]).std()
    claimed = torch.tensor([r.standard_error for r in results]).mean()
    assert 0.67 < claimed / spread < 1.5


def test_the_seed_governs_the_subsets_and_the_global_generator_is_left_alone():
    x, y = torch.randn(2, 50, 3)

    def value(seed):
        return kernel_distance(x, y, nn.Identity(), subset_size=10, num_subsets=3, seed=seed).value

    torch.manual_seed(7)
    assert value(1) == value(1) != value(2)
    untouched = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(untouched, torch.rand(1))


X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: frechet_distance(X, X), TypeError, "real must be Features, or extractor given, got Tensor without"),
        (
            lambda: frechet_distance(X[:1], X, nn.Identity()),
            ValueError,
            "frechet_distance: real and generated must hold ≥ 2 examples, got 1 and 20",
        ),
        (
            lambda: frechet_distance(Features(X, "a"), Features(X, "b")),
            ValueError,
            "must be features of one extractor, got 'a' with F = 3 and 'b' with F = 3",
        ),
        (
            lambda: kernel_distance(X, X[:, :2], nn.Identity(), 5),
            ValueError,
            "kernel_distance: real and generated must be features of one extractor, got 'Identity' with F = 3 and",
        ),
        (
            lambda: frechet_distance(Features(X, "a"), X, nn.Identity()),
            ValueError,
            "real holds features of 'a', which extractor must be or be left out, got 'Identity'",
        ),
        (lambda: frechet_distance(X * torch.inf, X, nn.Identity()), ValueError, "must be finite, got NaN or infinity"),
        (
            lambda: kernel_distance(X, X[:10], nn.Identity()),
            ValueError,
            "subset_size must be 2 … 10, the smaller set's examples, got 1000",
        ),
        (lambda: kernel_distance(X, X, nn.Identity(), 5, 0), ValueError, "num_subsets must be ≥ 1, got 0"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
