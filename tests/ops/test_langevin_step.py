"""langevin_step: the formula, the noise, and the stationary law of a chain."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ncpvae import ops
from ncpvae.ops import reference

INF, NAN = math.inf, math.nan
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FEW = settings(max_examples=40, deadline=None, derandomize=True, database=None)
BASE_SHAPES = {"[D]": (6,), "[B,1]": (4, 1), "[1]": (1,), "full": (4, 6), "0-dim": (), "[1,D]": (1, 6)}


def wide(dtype):
    """What an op computes in, at least: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tensors(shape, dtype, device, mean_shape=None, std_shape=None):
    """z, score and, where shapes are given, a base."""
    z, score = (torch.randn(shape, dtype=torch.float64).to(dtype).to(device) for _ in range(2))
    if mean_shape is None:
        return z, score, None, None
    mean = torch.randn(mean_shape, dtype=torch.float64).to(dtype).to(device)
    std = (0.5 + torch.rand(std_shape, dtype=torch.float64)).to(dtype).to(device)
    return z, score, mean, std


def formula(z, score, noise, step_size, mean=None, std=None, temperature=1.0):
    drift = score if mean is None else score + (mean - z) / std**2
    return z + step_size / 2 * drift + math.sqrt(step_size * temperature) * noise


def double(*values):
    return [None if v is None else v.detach().double().cpu() for v in values]


def noise_of(z, seed):
    return reference.standard_normal(z.shape, seed.cpu(), wide(z.dtype))


# --- against the formula ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", [None, *BASE_SHAPES])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.0])
def test_is_the_formula_given_the_reference_noise(base, temperature, dtype, device, make_seed, assert_accurate):
    shapes = (None, None) if base is None else (BASE_SHAPES[base], BASE_SHAPES[base])
    (z, score, mean, std), seed = tensors((4, 6), dtype, device, *shapes), make_seed(device)
    got = ops.langevin_step(z, score, seed, 0.2, mean, std, temperature)
    assert got.dtype == dtype and got.shape == z.shape and got.device == z.device
    noise = noise_of(z, seed)
    truth = formula(*double(z, score, noise), 0.2, *double(mean, std), temperature)
    eager = formula(z, score, noise.to(dtype).to(device), 0.2, mean, std, temperature)
    assert_accurate(got, eager, truth, dtype, factor=1, units=4)
    if dtype == torch.float64:
        torch.testing.assert_close(got.cpu(), truth, rtol=1e-13, atol=1e-13)


@FEW
@given(
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=4).map(tuple),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
    step_size=st.floats(1e-6, 10),
    temperature=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_any_shape_and_broadcast(device, shape, dtype, data, step_size, temperature):
    def broadcastable():
        kept = shape[data.draw(st.integers(0, len(shape))) :]
        return tuple(data.draw(st.sampled_from([1, size])) for size in kept)

    z, score, mean, std = tensors(shape, dtype, device, broadcastable(), broadcastable())
    seed = torch.tensor([3, 4], device=device)
    got = ops.langevin_step(z, score, seed, step_size, mean, std, temperature)
    truth = formula(*double(z, score, noise_of(z, seed)), step_size, *double(mean, std), temperature)
    assert got.dtype == dtype and got.shape == z.shape
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(got.double().cpu(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 15, 16, 17, 1000, 70_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_kernel_makes_the_same_noise(count, dtype, device, make_seed):
    """Counts that are no multiple of a Philox block or a vector; to rounding of the map from words to Normals."""
    zero, seed = torch.zeros(count, dtype=dtype, device=device), make_seed(device)
    got = ops.langevin_step(zero, zero, seed, 1.0).cpu()
    expected = reference.langevin_step(zero.cpu(), zero.cpu(), seed.cpu(), 1.0)
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("shape", [(3, 5, 4), (3, 4, 5), (2, 3, 5, 8), (6, 1, 8), (5, 257)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_every_way_to_broadcast_a_base(shape, dtype, device, make_seed):
    """All choices of kept and broadcast dimensions, aligned and not, against copies spelled out."""
    z, score, *_ = tensors(shape, dtype, device)
    for kept in range(1 << len(shape)):
        own = tuple(size if kept >> i & 1 else 1 for i, size in enumerate(shape))
        *_, mean, std = tensors(shape, dtype, device, own, own)
        mean = torch.cat([mean.new_zeros(1), mean.flatten()])[1:].view(own)  # starts between two boundaries
        got = ops.langevin_step(z, score, make_seed(device), 0.2, mean, std)
        spelled_out = (t.expand(shape).contiguous() for t in (mean, std))
        assert torch.equal(got, ops.langevin_step(z, score, make_seed(device), 0.2, *spelled_out)), own


@pytest.mark.parametrize("rows", [1, 64])
def test_a_std_whose_square_is_zero(rows, device, make_seed):
    mean = torch.arange(1.0, 9.0, device=device)
    z, std = mean.repeat(rows, 1), torch.full((8,), 1e-30, device=device)
    assert torch.equal(ops.langevin_step(z, torch.zeros_like(z), make_seed(device), 0.1, mean, std, 0.0), z)


def test_noise_depends_on_the_element_number_alone(device, make_seed):
    """Neither shape nor batch size: the first elements of a larger tensor get the same noise."""
    zero, seed = torch.zeros(10, 7, device=device), make_seed(device)
    whole = ops.langevin_step(zero, zero, seed, 1.0)
    part = ops.langevin_step(zero[:3], zero[:3], seed, 1.0)
    flat = ops.langevin_step(zero.flatten(), zero.flatten(), seed, 1.0)
    torch.testing.assert_close(part, whole[:3], rtol=0, atol=5e-6)
    torch.testing.assert_close(flat, whole.flatten(), rtol=0, atol=5e-6)


def test_same_seed_same_noise_other_seed_other_noise(device, make_seed):
    zero = torch.zeros(1000, device=device)
    step = lambda **words: ops.langevin_step(zero, zero, make_seed(device, **words), 1.0)  # noqa: E731
    assert torch.equal(step(), step())
    assert (step() == step(key=5)).double().mean() < 0.01
    assert (step() == step(stream=8)).double().mean() < 0.01


def test_temperature_zero_is_gradient_ascent_for_any_seed(device, make_seed):
    z, score, *_ = tensors((5, 3), torch.float32, device)
    one, two = (ops.langevin_step(z, score, make_seed(device, key=k), 0.2, temperature=0.0) for k in (1, 2))
    assert torch.equal(one, two)
    torch.testing.assert_close(one, z + 0.1 * score)


# --- awkward input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["strided", "transposed", "offset", "padded_rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_layout_changes_nothing(layout, dtype, device, make_seed, layouts):
    values, seed = tensors((5, 7, 6), dtype, device, (7, 1), (5, 1, 6)), make_seed(device)
    z, score, mean, std = values
    expected = ops.langevin_step(z, score, seed, 0.2, mean, std)
    z, score, mean, std = map(layouts[layout], values)
    got = ops.langevin_step(z, score, seed, 0.2, mean, std)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert got.is_contiguous()


def test_expanded_state_gets_fresh_noise_everywhere(device, make_seed):
    z, seed = torch.randn(1, 6, device=device), make_seed(device)
    got = ops.langevin_step(z.expand(4, -1), torch.zeros(1, 1, device=device).expand(4, 6), seed, 0.2)
    torch.testing.assert_close(got, ops.langevin_step(z.repeat(4, 1), torch.zeros(4, 6, device=device), seed, 0.2))
    assert got.unique().numel() == 24


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (2, 0, 5)], ids=str)
def test_empty_state(shape, device, make_seed):
    z, score, mean, std = tensors(shape, torch.float32, device, (1,), ())
    assert ops.langevin_step(z, score, make_seed(device), 0.2, mean, std).shape == shape
    assert ops.langevin_step_(z, score, make_seed(device), 0.2, mean, std) is z


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_bad_values_stay_in_their_element(bad, device, make_seed):
    (z, score, mean, std), seed = tensors((4, 6), torch.float32, device, (6,), (6,)), make_seed(device)
    expected = ops.langevin_step(z, score, seed, 0.2, mean, std)
    z[1, 2], score[3, 0] = bad, bad
    got = ops.langevin_step(z, score, seed, 0.2, mean, std)
    assert not got[1, 2].isfinite() and not got[3, 0].isfinite()
    touched = torch.zeros(4, 6, dtype=torch.bool, device=device)
    touched[1, 2] = touched[3, 0] = True
    assert torch.equal(got[~touched], expected[~touched])


def test_float16_extremes_are_stepped_in_float32(device, make_seed):
    """(mean − z)/std² passes float16's largest value on the way to a result that fits."""
    z = torch.tensor([60000.0, -60000.0, 6e-8], dtype=torch.float16, device=device)
    mean, std = torch.zeros_like(z), torch.full_like(z, 0.01)
    got = ops.langevin_step(z, torch.zeros_like(z), make_seed(device), 1e-4, mean, std, temperature=0.0)
    torch.testing.assert_close(got.double(), z.double() * (1 - 0.5e-4 / std.double() ** 2), rtol=1e-3, atol=1e-7)


# --- in place -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["plain", "strided", "transposed", "offset", "padded_rows"])
def test_in_place_is_the_same_step(layout, dtype, device, make_seed, layouts):
    (z, score, mean, std), seed = tensors((5, 6), dtype, device, (5, 1), (6,)), make_seed(device)
    expected = ops.langevin_step(z, score, seed, 0.2, mean, std, 0.5)
    target = z if layout == "plain" else layouts[layout](z)
    result = ops.langevin_step_(target, score, seed, 0.2, mean, std, 0.5)
    assert result is target
    torch.testing.assert_close(target, expected, rtol=1e-6, atol=1e-6)


def test_in_place_writes_nothing_but_its_own_elements(device, make_seed):
    buffer = torch.full((8, 9), 99.0, device=device)
    z = buffer[1:7:2, 2:8:3]
    ops.langevin_step_(z, torch.zeros_like(z), make_seed(device), 0.2)
    assert int((buffer != 99).sum()) == z.numel() == int((z != 99).sum())


def test_in_place_reads_before_it_writes(device, make_seed):
    """Arguments that share z's memory are read as they were before the step."""
    (z, *_), seed = tensors((5, 5), torch.float32, device), make_seed(device)
    std = torch.ones(1, device=device)
    for score, mean in ((z, z), (z.T, z[:1]), (z, z[2:3, 2:3])):
        expected = ops.langevin_step(z, score, seed, 0.2, mean, std)
        mine = z.clone()
        same_view = lambda t, mine=mine: mine.as_strided(t.shape, t.stride(), t.storage_offset())  # noqa: E731
        ops.langevin_step_(mine, same_view(score), seed, 0.2, same_view(mean), std)
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)


def test_in_place_refuses_memory_that_overlaps_itself(device, make_seed):
    z = torch.zeros(1, 3, device=device).expand(4, 3)
    with pytest.raises((ValueError, RuntimeError)):
        ops.langevin_step_(z, torch.zeros(4, 3, device=device), make_seed(device), 0.1)
    assert (z == 0).all()


@pytest.mark.parametrize("position", range(4))
def test_in_place_refuses_gradients(position, device, make_seed):
    values, seed = list(tensors((4, 6), torch.float32, device, (6,), (6,))), make_seed(device)
    values[position].requires_grad_()
    z, score, mean, std = values
    with pytest.raises(ValueError, match=r"langevin_step_: .*require grad.*no_grad"):
        ops.langevin_step_(z, score, seed, 0.1, mean, std)
    before = z.detach().clone()
    with torch.no_grad():
        ops.langevin_step_(z, score, seed, 0.1, mean, std)
    assert not torch.equal(z, before)


def test_in_place_is_seen_by_autograd_as_a_change(device, make_seed):
    """A graph that saved z must notice that z is not what it was."""
    weight, z = torch.ones(3, device=device, requires_grad=True), torch.ones(3, device=device)
    product = weight * z
    ops.langevin_step_(z, z.clone(), make_seed(device), 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


# --- chains -------------------------------------------------------------------------------------------------


def run_chain(step, chains, steps, device, dimensions=()):
    """The last two states of a chain from zero, the step's number added to the seed's stream."""
    z = torch.zeros(chains, *dimensions, device=device)
    seed, increment = torch.tensor([77, 0], device=device), torch.tensor([0, 1], device=device)
    for _ in range(steps):
        before, z = z, step(z, seed)
        seed = seed + increment
    return before.double().cpu(), z.double().cpu()


CHAINS = 1 << 17


def check_autoregression(before, after, mean, variance, decay):
    """Mean, variance and lag-one correlation of a stationary AR(1) process, within five standard errors."""
    five = 5 / math.sqrt(CHAINS)
    assert abs(float(after.mean()) - mean) < five * math.sqrt(variance)
    assert abs(float(after.var()) / variance - 1) < five * math.sqrt(2)
    assert abs(float(torch.corrcoef(torch.stack([before, after]))[0, 1]) - decay) < five * (1 - decay**2)


@pytest.mark.parametrize("temperature", [1.0, 0.25])
@pytest.mark.parametrize("target", ["score", "base", "score and base", "in place"])
def test_chain_has_the_stationary_law_of_unadjusted_langevin(target, temperature, device):
    """On N(m, σ²) a step is z ← m + a(z − m) + √(λτ) ε with a = 1 − λ/2σ², stationary at λτ/(1 − a²)."""
    mean, std, step_size = 1.0, 0.8, 0.7
    m, s = torch.tensor([mean], device=device), torch.tensor([std], device=device)
    other_m, other_s = m - 0.3, s + 0.5

    def step(z, seed):
        if target == "score":
            return ops.langevin_step(z, (m - z) / s**2, seed, step_size, temperature=temperature)
        if target == "base":
            return ops.langevin_step(z, torch.zeros_like(z), seed, step_size, m, s, temperature)
        if target == "in place":
            return ops.langevin_step_(z.clone(), torch.zeros_like(z), seed, step_size, m, s, temperature)
        log_ratio_gradient = (m - z) / s**2 - (other_m - z) / other_s**2
        return ops.langevin_step(z, log_ratio_gradient, seed, step_size, other_m, other_s, temperature)

    decay = 1 - step_size / (2 * std**2)
    variance = step_size * temperature / (1 - decay**2)
    before, after = run_chain(step, CHAINS, 25, device)
    check_autoregression(before, after, mean, variance, decay)
    with pytest.raises(AssertionError):  # the statistics would notice the target's own variance: 27 % less
        check_autoregression(before, after, mean, std**2 * temperature, decay)


def test_chain_on_a_correlated_gaussian(device):
    """On N(0, P⁻¹) the stationary covariance is λ(I − A²)⁻¹ with A = I − λP/2."""
    precision = torch.tensor([[2.0, -1.2], [-1.2, 1.5]], device=device)
    step_size = 0.5
    _, z = run_chain(lambda z, seed: ops.langevin_step(z, -z @ precision, seed, step_size), CHAINS, 60, device, (2,))
    A = torch.eye(2, dtype=torch.float64) - step_size / 2 * precision.double().cpu()
    expected = step_size * torch.linalg.inv(torch.eye(2, dtype=torch.float64) - A @ A)
    spread = (expected.diagonal()[:, None] * expected.diagonal() + expected**2).sqrt() / math.sqrt(CHAINS)
    assert ((z.T.cov() - expected).abs() < 5 * spread).all()


# --- threads, gradients, torch.library, torch.compile -------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_threads_change_nothing(dtype, make_seed):
    (z, score, mean, std), results = tensors((37, 3001), dtype, "cpu", (3001,), (37, 1)), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(ops.langevin_step(z, score, make_seed(), 0.2, mean, std))
    assert torch.equal(*results)


@pytest.mark.parametrize("base", [None, *BASE_SHAPES])
def test_gradients_once_and_twice(base, device, make_seed):
    shapes = (None, None) if base is None else (BASE_SHAPES[base], BASE_SHAPES[base])
    seed = make_seed(device)
    inputs = [t.requires_grad_() for t in tensors((4, 6), torch.float64, device, *shapes) if t is not None]

    def step(z, score, mean=None, std=None):
        return ops.langevin_step(z, score, seed, 0.3, mean, std)

    assert torch.autograd.gradcheck(step, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(step, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_error_is_bounded_by_eager(dtype, device, make_seed, assert_accurate):
    values, seed = [t.requires_grad_() for t in tensors((40, 6), dtype, device, (6,), (40, 1))], make_seed(device)
    cotangent = torch.randn(40, 6, dtype=torch.float64).to(dtype)

    def gradients(step, values, cotangent):
        return torch.autograd.grad(step(*values), values, cotangent)

    got = gradients(lambda z, s, m, d: ops.langevin_step(z, s, seed, 0.3, m, d), values, cotangent.to(device))
    plain = lambda z, s, m, d: formula(z, s, 0.0, 0.3, m, d)  # noqa: E731
    eager = gradients(plain, values, cotangent.to(device))
    truth = gradients(plain, [v.requires_grad_() for v in double(*values)], cotangent.double())
    for one, two, three in zip(got, eager, truth, strict=True):
        assert one.dtype == dtype
        assert_accurate(one, two, three, dtype, units=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("base", [None, (3,), (4, 1)], ids=str)
def test_opcheck(base, dtype, device, make_seed):
    (z, score, mean, std), seed = tensors((4, 3), dtype, device, base, base), make_seed(device)
    arguments = (seed, 0.2, mean, std, 0.7)
    torch.library.opcheck(torch.ops.ncpvae.langevin_step_.default, (z.clone(), score, *arguments))
    for t in (z, score, mean, std):
        if t is not None:
            t.requires_grad_()
    torch.library.opcheck(torch.ops.ncpvae.langevin_step.default, (z, score, *arguments))


def test_opcheck_on_a_transposed_state(device, make_seed):
    """What the shape function promises of the strides must be what the kernel returns."""
    z, score, *_ = tensors((3, 4), torch.float32, device)
    torch.library.opcheck(torch.ops.ncpvae.langevin_step.default, (z.T, score.T, make_seed(device), 0.2))
    torch.library.opcheck(torch.ops.ncpvae.langevin_step_.default, (z.T, score.T, make_seed(device), 0.2))


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize("in_place", [False, True], ids=["", "in place"])
def test_compiles_whole_with_draw_seed_inside(in_place, device):
    def two_steps(z, mean, std):
        for _ in range(2):
            if in_place:
                ops.langevin_step_(z, -z, ops.draw_seed(device), 0.2, mean, std)
            else:
                z = ops.langevin_step(z, -z, ops.draw_seed(device), 0.2, mean, std)
        return z

    z, _, mean, std = tensors((4, 3), torch.float32, device, (3,), (4, 1))
    results = []
    for function in (two_steps, compiled(two_steps)):
        torch.manual_seed(6)
        results.append(function(z.clone(), mean, std))
    torch.testing.assert_close(*results)


def test_compiled_gradient(device, make_seed):
    values, seed = [t.requires_grad_() for t in tensors((4, 3), torch.float32, device, (3,), (4, 1))], make_seed(device)

    def step(z, score, mean, std):
        return ops.langevin_step(z, score, seed, 0.2, mean, std)

    expected, got = (torch.autograd.grad(f(*values).square().sum(), values) for f in (step, compiled(step)))
    torch.testing.assert_close(got, expected)


def test_compiles_for_an_annealed_step_size(device, make_seed):
    """A step size and a temperature that change from call to call are checked and compiled anew."""
    (z, score, *_), seed = tensors((4, 3), torch.float32, device), make_seed(device)

    def step(z, score, step_size, temperature):
        return ops.langevin_step(z, score, seed, step_size, temperature=temperature)

    fast = compiled(step)
    for t in range(1, 5):
        arguments = z, score, 0.3 / t, 1.0 / t
        torch.testing.assert_close(fast(*arguments), step(*arguments))


# --- bad input ----------------------------------------------------------------------------------------------

Z, SEED = torch.zeros(4, 3), torch.tensor([1, 2])
ONE = torch.ones(3)


@pytest.mark.parametrize("op", ["langevin_step", "langevin_step_"])
@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([0.0], Z, SEED, 0.1), TypeError, ["z", "tensor", "list"]),
        ((Z.int(), Z, SEED, 0.1), TypeError, ["z", "float32", "torch.int32"]),
        ((Z, None, SEED, 0.1), TypeError, ["score", "tensor", "NoneType"]),
        ((Z, Z.double(), SEED, 0.1), TypeError, ["score", "z's dtype torch.float32", "torch.float64"]),
        ((Z, Z[:2], SEED, 0.1), ValueError, ["score", "(4, 3)", "(2, 3)"]),
        ((Z, Z[:, :1], SEED, 0.1), ValueError, ["score", "(4, 3)", "(4, 1)"]),
        ((Z, Z.to("meta"), SEED, 0.1), ValueError, ["score", "device", "cpu", "meta"]),
        ((Z, Z, 1, 0.1), TypeError, ["seed", "int64 tensor", "int"]),
        ((Z, Z, SEED.int(), 0.1), TypeError, ["seed", "int64", "torch.int32"]),
        ((Z, Z, SEED[:1], 0.1), ValueError, ["seed", "(2,)", "(1,)"]),
        ((Z, Z, SEED, 0.0), ValueError, ["step_size", "> 0", "0.0"]),
        ((Z, Z, SEED, -0.1), ValueError, ["step_size", "> 0", "-0.1"]),
        ((Z, Z, SEED, NAN), ValueError, ["step_size", "finite", "nan"]),
        ((Z, Z, SEED, INF), ValueError, ["step_size", "finite", "inf"]),
        ((Z, Z, SEED, "0.1"), TypeError, ["step_size", "number", "str"]),
        ((Z, Z, SEED, True), TypeError, ["step_size", "number", "bool"]),
        ((Z, Z, SEED, torch.tensor(0.1)), TypeError, ["step_size", "number", "Tensor"]),
        ((Z, Z, SEED, 0.1, None, None, -1.0), ValueError, ["temperature", "≥ 0", "-1.0"]),
        ((Z, Z, SEED, 0.1, None, None, NAN), ValueError, ["temperature", "finite", "nan"]),
        ((Z, Z, SEED, 0.1, None, None, None), TypeError, ["temperature", "number", "NoneType"]),
        ((Z, Z, SEED, 0.1, ONE), ValueError, ["base_mean and base_std", "together", "only one"]),
        ((Z, Z, SEED, 0.1, None, ONE), ValueError, ["base_mean and base_std", "together", "only one"]),
        ((Z, Z, SEED, 0.1, 0.0, ONE), TypeError, ["base_mean", "tensor", "float"]),
        ((Z, Z, SEED, 0.1, ONE, 1.0), TypeError, ["base_std", "tensor", "float"]),
        ((Z, Z, SEED, 0.1, ONE.double(), ONE), TypeError, ["base_mean", "torch.float32", "torch.float64"]),
        ((Z, Z, SEED, 0.1, ONE, ONE.long()), TypeError, ["base_std", "float32", "torch.int64"]),
        ((Z, Z, SEED, 0.1, ONE[:2], ONE), ValueError, ["base_mean", "broadcast", "(4, 3)", "(2,)"]),
        ((Z, Z, SEED, 0.1, ONE, torch.ones(4)), ValueError, ["base_std", "broadcast", "(4, 3)", "(4,)"]),
        ((Z, Z, SEED, 0.1, torch.ones(1, 4, 3), ONE), ValueError, ["base_mean", "broadcast", "(4, 3)", "(1, 4, 3)"]),
    ],
)
def test_names_what_is_wrong(op, arguments, error, words):
    with pytest.raises(error) as caught:
        getattr(ops, op)(*arguments)
    assert type(caught.value) is error
    assert all(word in str(caught.value) for word in [f"{op}:", *words]), str(caught.value)
