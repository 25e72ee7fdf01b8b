import math

import pytest
import torch

from ncpvae import data


def test_gaussians_are_25_modes_of_the_stated_width():
    x = data.gaussians(50_000, seed=1)
    distance, mode = torch.cdist(x, data.gaussian_grid_means()).min(1)
    assert distance.max() < 6 * data.GAUSSIANS_STD
    counts = mode.bincount(minlength=25).double()
    assert ((counts - 2000).square() / 2000).sum() < 60  # χ² with 24 degrees of freedom
    assert distance.square().mean().item() == pytest.approx(2 * data.GAUSSIANS_STD**2, rel=0.03)
    assert torch.equal(x, data.gaussians(50_000, seed=1)) and not torch.equal(x, data.gaussians(50_000, seed=2))


def test_entropy_bound_is_the_mean_log_density():
    x = data.gaussians(20_000).double()
    square = torch.cdist(x, data.gaussian_grid_means().double()).square()
    log_p = torch.logsumexp(-0.5 * square / data.GAUSSIANS_STD**2, 1)
    log_p = log_p - math.log(25) - math.log(2 * math.pi * data.GAUSSIANS_STD**2)
    assert -log_p.mean().item() == pytest.approx(data.gaussian_grid_entropy(), abs=0.03)


def test_gaussians_by_name_are_the_draws_of_three_seeds():
    loaded = data.load("gaussians", seed=5)
    assert (loaded.name, loaded.kind, loaded.levels, loaded.source) == (
        "gaussians",
        "vector",
        None,
        "drawn with seed 5",
    )
    assert [len(x) for x in loaded.splits] == [200_000, 10_000, 50_000]
    assert torch.equal(loaded.splits.validation, data.gaussians(10_000, seed=6))
    nearest = torch.cdist(loaded.splits.test, data.gaussian_grid_means()).argmin(1)
    assert torch.equal(nearest, loaded.labels.test)
    assert loaded.transform()(loaded.splits.test) is loaded.splits.test


def test_the_toy_mixture_has_the_parameters_it_says_and_its_classes_as_labels():
    loaded, (mean, std) = data.load("toy-gmm", seed=3), data.gaussian_mixture_parameters(3)
    assert (loaded.name, loaded.kind, loaded.source) == ("toy-gmm", "vector", "mixture and draws with seed 3")
    assert [x.shape for x in loaded.splits] == [(162_000, 16), (18_000, 16), (20_000, 16)]
    assert loaded.splits.train.dtype == torch.float32
    assert mean.norm(dim=1).max() < 40 and std.max() < 8**0.5
    x, label = torch.cat(loaded.splits).double(), torch.cat(loaded.labels)
    assert label.bincount().tolist() == [20_000] * 10
    assert loaded.labels.test.bincount(minlength=10).double().std() < 100  # shuffled: it is 42 on average
    residuals = (x - mean[label]) / std[label, None]
    for k in range(10):
        own = residuals[label == k]
        assert own.mean(0).abs().max() < 5 / 20_000**0.5
        torch.testing.assert_close(own.T.cov(), torch.eye(16).double(), atol=5 * (2 / 20_000) ** 0.5, rtol=0)
    same, other = data.load("toy-gmm", seed=3), data.gaussian_mixture_parameters()
    assert all(torch.equal(a, b) for a, b in zip(loaded.splits, same.splits, strict=True))
    assert not torch.equal(other[0], mean)


def test_radii_and_variances_of_toy_mixtures_are_uniform_and_directions_have_none():
    drawn = [data.gaussian_mixture_parameters(seed) for seed in range(300)]
    mean, std = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    grid = (torch.arange(3000) + 0.5) / 3000
    for uniform in (mean.norm(dim=1) / 40, std.square() / 8):
        assert (uniform.sort().values - grid).abs().max() < 2 / 3000**0.5  # Kolmogorov-Smirnov, p < 0.001
    direction = mean / mean.norm(dim=1, keepdim=True)
    torch.testing.assert_close(16 * direction.T.cov(), torch.eye(16).double(), atol=0.12, rtol=0)


@pytest.mark.parametrize("seed", [0, 3])
def test_the_entropy_of_a_toy_mixture_is_its_mean_negative_log_density(seed):
    found, (mean, std) = data.gaussian_mixture_entropy(seed), data.gaussian_mixture_parameters(seed)
    components = torch.distributions.Independent(torch.distributions.Normal(mean, std[:, None].expand_as(mean)), 1)
    weights = torch.distributions.Categorical(logits=torch.zeros(10).double())
    x = data.load("toy-gmm", seed=seed).splits.validation.double()
    nll = -torch.distributions.MixtureSameFamily(weights, components).log_prob(x)
    assert abs(nll.mean() - found.value) < 4 * nll.std() / len(x) ** 0.5
    assert 0 < found.standard_error < 0.01
    few = [data.gaussian_mixture_entropy(seed, per_class=2**n) for n in range(6, 12)]
    assert all(abs(e.value - found.value) < 5 * (e.standard_error + found.standard_error) for e in few)


def test_digits_split_without_overlap():
    pytest.importorskip("sklearn")
    splits = data.digits()
    assert [len(s) for s in splits] == [1297, 200, 300]
    assert splits.train.dtype == torch.uint8 and splits.train.shape[1:] == (1, 8, 8) and splits.train.max() == 16


def test_digits_by_name_have_one_split_and_their_labels():
    datasets = pytest.importorskip("sklearn.datasets")
    loaded = data.load("digits", seed=3)
    assert all(torch.equal(a, b) for a, b in zip(loaded.splits, data.digits(0), strict=True))
    assert (loaded.kind, loaded.levels) == ("image", 16)
    seen = loaded.transform()(loaded.splits.train)
    assert seen.dtype == torch.float32 and torch.equal(seen, loaded.splits.train.float())
    source = datasets.load_digits()
    rows = {image.astype("uint8").tobytes(): label for image, label in zip(source.images, source.target, strict=True)}
    for images, labels in zip(loaded.splits, loaded.labels, strict=True):
        assert [rows[image.numpy().tobytes()] for image in images] == labels.tolist()


# Transforms


def test_binarization_has_the_pixels_as_means():
    x = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(20_000, 3)
    drawn = data.binarize(x)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(drawn.mean(0), torch.tensor([0.0, 0.2, 1.0]), atol=0.02, rtol=0)


def test_flips_mirror_half_of_the_images_and_nothing_else():
    x = torch.arange(2 * 3 * 4, dtype=torch.uint8).view(1, 2, 3, 4).expand(2000, 2, 3, 4)
    flipped = data.random_flip(x)
    mirrored = (flipped == x.flip(-1)).flatten(1).all(1)
    assert ((flipped == x).flatten(1).all(1) ^ mirrored).all()
    assert flipped.dtype == torch.uint8 and 900 < int(mirrored.sum()) < 1100


@pytest.mark.parametrize("transform", [data.binarize, data.random_flip])
def test_the_global_generator_governs_what_is_random(transform):
    x = torch.randint(0, 256, (64, 1, 4, 4), dtype=torch.uint8)
    torch.manual_seed(1)
    first, second = transform(x), transform(x)
    torch.manual_seed(1)
    assert torch.equal(transform(x), first) and not torch.equal(first, second)


def test_padding_puts_the_image_in_the_middle():
    x = torch.randint(1, 256, (5, 1, 28, 28), dtype=torch.uint8)
    padded = data.pad(x)
    assert padded.shape == (5, 1, 32, 32) and padded.dtype == torch.uint8
    assert torch.equal(padded[..., 2:30, 2:30], x) and int((padded > 0).sum()) == x.numel()
    odd = data.pad(x[..., :27], 32)
    assert odd.shape == (5, 1, 32, 32) and torch.equal(odd[..., 2:30, 2:29], x[..., :27])


@pytest.mark.parametrize("bits", [1, 5, 8])
def test_quantisation_keeps_the_leading_bits(bits):
    x = torch.arange(256, dtype=torch.uint8)
    kept = data.quantize(x, bits)
    assert torch.equal(kept.double(), (x.double() / 2 ** (8 - bits)).floor())
    assert kept.dtype == torch.uint8 and kept.max() == 2**bits - 1
    assert data.scale(kept, 2**bits - 1).max() == 1


def test_composition_goes_from_first_to_last_and_keeps_nothing_needless():
    x = torch.tensor([255], dtype=torch.uint8)
    assert data.compose(data.quantize, data.to_float)(x).tolist() == [31.0]
    assert data.compose() is data.as_is and data.compose(data.as_is, data.scale) is data.scale


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: data.random_flip(torch.zeros(2, 3)), ValueError, "random_flip: x must be images.*got shape (2, 3)"),
        (lambda: data.pad(torch.zeros(1, 1, 40, 8)), ValueError, "pad: size must be at least.*40×8, got 32"),
        (lambda: data.quantize(torch.zeros(2)), TypeError, "quantize: x must be uint8, got torch.float32"),
        (lambda: data.quantize(torch.zeros(2, dtype=torch.uint8), 9), ValueError, "quantize: bits must be.*got 9"),
        (lambda: data.scale(torch.zeros(2), 0), ValueError, "scale: levels must be ≥ 1, got 0"),
        (lambda: data.load("gaussians").padded(), ValueError, "Dataset.padded: only images.*got kind 'vector'"),
        (
            lambda: data.load("cifar11"),
            ValueError,
            "load: name must be one of gaussians, toy-gmm, digits,.*got 'cifar11'",
        ),
        (lambda: data.gaussian_mixture_entropy(per_class=1), ValueError, "per_class must be ≥ 2, got 1"),
        (lambda: data.load("npz:"), ValueError, "load: name must be one of .*npz:PATH, text:PATH, got 'npz:'"),
        (lambda: data.load(3), TypeError, "load: name must be a string, got int"),
        (lambda: data.load("npz:/no/such"), OSError, "load: '/no/such' does not exist"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message.replace("(", r"\(").replace(")", r"\)")):
        call()
