"""Philox4x32-10 and the maps from its words to variates: known answers first, statistics second."""

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ncpvae import ops
from ncpvae.ops import reference

KNOWN_ANSWERS = {  # Random123 1.14, tests/kat_vectors: philox4x32 10
    "zeros": ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
}
WORD = st.integers(0, 2**32 - 1)
FEW = settings(max_examples=50, deadline=None, derandomize=True, database=None)


def words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


def reference_philox(counter, key) -> tuple[int, ...]:
    return tuple(int(w) for w in reference.philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key))))


def python_philox(counter, key) -> tuple[int, ...]:
    """The paper's recurrence in Python integers, which cannot overflow."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b % 2**32, (a >> 32) ^ c3 ^ k1, a % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@pytest.fixture(scope="module")
def native():
    """The compiled module; missing is a failure where NCPVAE_REQUIRE_NATIVE=1 promises it."""
    try:
        from ncpvae import _C
    except ImportError as error:
        if os.environ.get("NCPVAE_REQUIRE_NATIVE", "0") == "1":
            pytest.fail(f"NCPVAE_REQUIRE_NATIVE=1, but ncpvae._C does not import: {error}")
        pytest.skip(f"ncpvae._C is not built: {error}")
    return _C


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_reference_gives_the_known_answers(name):
    counter, key, answer = map(words, KNOWN_ANSWERS[name])
    assert reference_philox(counter, key) == answer == python_philox(counter, key)


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_native_gives_the_known_answers(native, name):
    counter, key, answer = map(words, KNOWN_ANSWERS[name])
    assert tuple(native.philox4x32(counter, key)) == answer


@FEW
@given(counter=st.tuples(WORD, WORD, WORD, WORD), key=st.tuples(WORD, WORD))
def test_reference_is_philox_for_any_counter(counter, key):
    assert reference_philox(counter, key) == python_philox(counter, key)


@FEW
@given(counter=st.tuples(WORD, WORD, WORD, WORD), key=st.tuples(WORD, WORD))
def test_native_is_philox_for_any_counter(native, counter, key):
    assert tuple(native.philox4x32(counter, key)) == reference_philox(counter, key)


@FEW
@given(
    key=st.integers(-(2**63), 2**63 - 1), stream=st.integers(-(2**63), 2**63 - 1), index=st.integers(0, 2**62), sub=WORD
)
def test_words_are_addressed_by_key_stream_index_and_sub(key, stream, index, sub):
    got = reference.random_words(torch.tensor([key, stream]), torch.tensor(index), sub)
    low, high = index % 2**32, index >> 32
    expected = python_philox((low, high, sub, stream % 2**32), (key % 2**32, key % 2**64 >> 32))
    assert tuple(map(int, got)) == expected


def test_uniform52_stays_strictly_inside_the_unit_interval():
    extremes = torch.tensor([0, 1, 2**31, 2**32 - 1])
    u = reference.uniform52(extremes[:, None], extremes)
    assert u.dtype == torch.float64 and (u > 0).all() and (u < 1).all()
    assert u[0, 0] == 2.0**-53 and u[-1, -1] == 1 - 2.0**-53  # midpoints of the first and the last cell
    assert reference.gumbel(u).isfinite().all()


def test_uniform52_uses_52_bits():
    high, low = torch.tensor(0x80000000), torch.tensor([0, 1 << 12, 0xFFF])
    u = reference.uniform52(high, low)
    assert u[1] - u[0] == 2.0**-52 and u[2] == u[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normals_are_finite_at_extreme_words(dtype):
    extremes = torch.tensor([0, 1, 2**31, 2**32 - 1])
    a, b = reference.normal_pair(extremes[:, None], extremes, dtype)
    assert a.isfinite().all() and b.isfinite().all()
    radius = torch.hypot(a, b)
    torch.testing.assert_close(radius[0], torch.full_like(radius[0], math.sqrt(66 * math.log(2))))  # u = 2⁻³³
    assert (radius[-1] < 1e-4).all()


# --- statistics of the noise that the kernels really make: z = 0, score = 0, step size 1 is pure noise ----------

COUNT = 1 << 19


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=str)
def noise(request, device):
    zero = torch.zeros(COUNT, dtype=request.param, device=device)
    seed = torch.tensor([20_07_10, 3], device=device)
    return ops.langevin_step(zero, zero, seed, 1.0).double().cpu()


def standardised_moments(x):
    """(mean, variance, skewness, excess kurtosis), each in standard errors of N(0, 1) sampling."""
    count = x.numel()
    moments = x.mean(), x.square().mean() - 1, x.pow(3).mean(), x.pow(4).mean() - 3
    spreads = 1, 2, 15, 96  # variances of x, x², x³, x⁴
    return torch.stack([m * (count / s) ** 0.5 for m, s in zip(moments, spreads, strict=True)])


def chi_square_z(counts, expected):
    """(χ² − df) / √(2 df): roughly standard Normal when the counts follow `expected`."""
    df = counts.numel() - 1
    return float((((counts - expected) ** 2 / expected).sum() - df) / math.sqrt(2 * df))


def cells(x, bins):
    return (torch.special.ndtr(x) * bins).long().clamp(0, bins - 1)


def neighbour_z(x, lag, bins=16):
    """χ² of the joint cells of (x_i, x_{i+lag}) against independence."""
    joint = cells(x[:-lag], bins) * bins + cells(x[lag:], bins)
    counts = torch.bincount(joint, minlength=bins * bins).double()
    return chi_square_z(counts, counts.sum() / bins**2)


def test_noise_has_the_moments_of_a_normal(noise):
    assert standardised_moments(noise).abs().max() < 5
    assert standardised_moments(noise * 1.01).abs().max() > 5  # one percent off in scale is seen


def test_noise_has_the_distribution_of_a_normal(noise):
    bins = 1000
    assert abs(chi_square_z(torch.bincount(cells(noise, bins), minlength=bins).double(), COUNT / bins)) < 5


def test_noise_has_the_tails_of_a_normal(noise):
    for threshold in (3.0, 4.0):
        expected = COUNT * math.erfc(threshold / math.sqrt(2))
        assert abs(int((noise.abs() > threshold).sum()) - expected) < 5 * math.sqrt(expected)
        assert abs(int((noise > threshold).sum()) - expected / 2) < 5 * math.sqrt(expected / 2)
    assert 4.3 < noise.abs().max() < 6.77  # √(−2 log 2⁻³³) is the largest possible


def test_neighbouring_noise_is_independent(noise):
    for lag in (1, 2, 3, 4, 8, 256):
        assert abs(neighbour_z(noise, lag)) < 5, lag
        for f in (lambda x: x, lambda x: x.square() - 1):
            a, b = f(noise[:-lag]), f(noise[lag:])
            assert abs((a * b).mean() / (a.std() * b.std())) * math.sqrt(COUNT) < 5, lag
    doubled = noise.clone()
    doubled[1::100] = doubled[::100][: doubled[1::100].numel()]  # one value in a hundred copies its neighbour
    assert neighbour_z(doubled, 1) > 5


@pytest.mark.parametrize("change", [(1, 0), (0, 1), (1 << 40, 0)], ids=["key", "stream", "key's high half"])
def test_noise_of_neighbouring_seeds_is_independent(noise, change, device):
    zero = torch.zeros(COUNT, dtype=torch.float32, device=device)
    other = ops.langevin_step(zero, zero, torch.tensor([20_07_10 + change[0], 3 + change[1]], device=device), 1.0)
    joint = cells(noise, 16) * 16 + cells(other.double().cpu(), 16)
    assert abs(chi_square_z(torch.bincount(joint, minlength=256).double(), COUNT / 256)) < 5
