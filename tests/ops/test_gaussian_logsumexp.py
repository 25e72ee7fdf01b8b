"""gaussian_logsumexp: the log-density of a mixture of diagonal Gaussians, accurate where components are narrow."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from ncpvae import ops
from ncpvae.ops import reference

INF, NAN = math.inf, math.nan
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(1, 1, 1), (5, 3, 1), (4, 1, 7), (1, 9, 16), (33, 65, 17), (70, 130, 32)]
FEW = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def wide(dtype):
    """What an op computes in, at least: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tensors(N, K, D, dtype=torch.float64, device="cpu", std=0.5):
    """z near some component, mean, log_std, log_weight."""
    mean = torch.randn(K, D, dtype=torch.float64)
    log_std = math.log(std) + 0.2 * torch.randn(K, D, dtype=torch.float64)
    z = mean[torch.randint(K, (N,))] + std * torch.randn(N, D, dtype=torch.float64)
    return [t.to(dtype).to(device) for t in (z, mean, log_std, torch.randn(K, dtype=torch.float64))]


def dense(z, mean, log_std, log_weight=None):
    """The N×K×D broadcast, one torch.distributions log-density per pair."""
    joint = Normal(mean, log_std.exp(), validate_args=False).log_prob(z[:, None]).sum(2)
    return torch.logsumexp(joint if log_weight is None else joint + log_weight, 1)


def double(*values):
    return [v.detach().double().cpu() for v in values]


def gradients(op, inputs, cotangent):
    """Of ⟨cotangent, op⟩ in every input."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = op(*inputs)
    return torch.autograd.grad(out, inputs, cotangent.to(out.dtype).to(out.device))


# --- against torch.distributions ----------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_dense_formula(shape, dtype, weighted, device, assert_accurate):
    inputs = tensors(*shape, dtype, device)[: 4 if weighted else 3]
    width = wide(dtype)
    got, truth = ops.gaussian_logsumexp(*inputs), dense(*double(*inputs))
    assert got.dtype == width and got.shape == (shape[0],)
    assert_accurate(got, dense(*(t.to(width) for t in inputs)), truth, width, units=16)
    torch.testing.assert_close(reference.gaussian_logsumexp(*double(*inputs)), truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "shape",
    [(127, 129, 7), (128, 128, 8), (129, 127, 9), (64, 256, 31), (65, 257, 33), (1, 700, 16), (300, 1, 17)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_edges_of_tiles(shape, dtype, device, assert_accurate):
    """Rows, components and dimensions around the kernels' tiles and chunks, forward and backward."""
    inputs, cotangent = tensors(*shape, dtype, device), torch.randn(shape[0], dtype=torch.float64)

    def values(op, inputs):
        inputs = [t.detach().requires_grad_() for t in inputs]
        out = op(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, cotangent.to(out.dtype).to(out.device))]

    for got, eager, truth in zip(
        values(ops.gaussian_logsumexp, inputs), values(dense, inputs), values(dense, double(*inputs)), strict=True
    ):
        assert_accurate(got, eager, truth, dtype)


@pytest.mark.parametrize("narrow", [1e-4, 0.01, 0.03])
def test_wide_and_narrow_dimensions_side_by_side(narrow, device, assert_accurate):
    """Every other dimension is narrow, and means far from zero: each keeps the digits that z and the mean share."""
    torch.manual_seed(2)
    mean = torch.randn(200, 20, dtype=torch.float64) + 3
    log_std = 0.2 * torch.randn(200, 20, dtype=torch.float64)
    log_std[:, ::2] += math.log(narrow)
    z = mean[:70] + log_std[:70].exp() * torch.randn(70, 20, dtype=torch.float64)
    inputs = [t.float().to(device) for t in (z, mean, log_std)]
    got, truth = ops.gaussian_logsumexp(*inputs), dense(*double(*inputs))
    assert_accurate(got, dense(*inputs), truth, torch.float32, factor=2, units=4)


@FEW
@given(
    N=st.integers(0, 40),
    K=st.integers(1, 40),
    D=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    weighted=st.booleans(),
    std=st.sampled_from([0.1, 1.0, 5.0]),
)
def test_any_shape(device, N, K, D, dtype, weighted, std):
    inputs = tensors(N, K, D, dtype, device, std)[: 4 if weighted else 3]
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    got, truth = ops.gaussian_logsumexp(*inputs), dense(*double(*inputs))
    torch.testing.assert_close(got.double().cpu(), truth, rtol=tolerance, atol=tolerance)


def test_is_the_log_density_of_a_mixture(device):
    z, mean, log_std, log_weight = tensors(50, 7, 4, device=device)
    mixture = MixtureSameFamily(Categorical(logits=log_weight), Independent(Normal(mean, log_std.exp()), 1))
    got = ops.gaussian_logsumexp(z, mean, log_std, log_weight.log_softmax(0))
    torch.testing.assert_close(got, mixture.log_prob(z))


def test_one_component_is_a_normal(device):
    z, mean, log_std, _ = tensors(50, 1, 6, device=device)
    expected = Normal(mean[0], log_std[0].exp()).log_prob(z).sum(1)
    torch.testing.assert_close(ops.gaussian_logsumexp(z, mean, log_std), expected)


def test_density_integrates_to_the_sum_of_weights(device):
    _, mean, log_std, log_weight = tensors(1, 5, 1, device=device)
    z = torch.linspace(-15, 15, 20_001, dtype=torch.float64, device=device)
    density = ops.gaussian_logsumexp(z[:, None], mean, log_std, log_weight).exp()
    torch.testing.assert_close(torch.trapezoid(density, z), log_weight.exp().sum())


def test_default_weights_are_all_one(device):
    z, mean, log_std, log_weight = tensors(9, 5, 3, device=device)
    expected = ops.gaussian_logsumexp(z, mean, log_std, torch.zeros_like(log_weight))
    torch.testing.assert_close(ops.gaussian_logsumexp(z, mean, log_std), expected)


def test_narrow_components_keep_their_accuracy(device):
    """std 0.01, D = 32: the expanded square, which the op must not use, is a thousand times worse."""
    inputs = tensors(256, 128, 32, torch.float32, device, std=0.01)[:3]
    truth = dense(*double(*inputs))
    z, mean, log_std = inputs
    precision = torch.exp(-2 * log_std)
    square = z**2 @ precision.T - 2 * z @ (mean * precision).T + (mean**2 * precision).sum(1)
    expanded = torch.logsumexp(-0.5 * square - log_std.sum(1) - 16 * math.log(2 * math.pi), 1)
    error = lambda lse: float((lse.double().cpu() - truth).abs().max())  # noqa: E731
    assert error(ops.gaussian_logsumexp(*inputs)) < 1e-4
    assert error(expanded) > 1e-2


def value_and_gradients(op, inputs, cotangent):
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = op(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent.to(out.dtype).to(out.device))]


# one less, just as many and one more than the rows, components and dimensions that kernels take together
EDGES = [
    *((n, k, 3) for n in (3, 4, 5, 7, 23, 24, 25, 193) for k in (4, 15, 16, 17, 63, 64, 65, 129)),
    *((25, 66, d) for d in (1, 7, 8, 9, 15, 16, 17, 33)),
    *((50, 257, 5), (3, 4097, 2), (4097, 3, 2), (2100, 4096, 1)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_edges_of_the_blocks(shape, dtype, device, assert_accurate):
    inputs, cotangent = tensors(*shape, dtype, device), torch.randn(shape[0], dtype=torch.float64)
    got = value_and_gradients(ops.gaussian_logsumexp, inputs, cotangent)
    eager = value_and_gradients(dense, inputs, cotangent)
    truth = value_and_gradients(dense, double(*inputs), cotangent)
    for one, two, three in zip(got, eager, truth, strict=True):
        assert_accurate(one, two, three, dtype)


@pytest.mark.parametrize("std", [1.0, 0.1, 0.01])
def test_no_less_accurate_than_the_broadcast(std, device):
    """Values and gradients in float32, in the mean square, whatever the standard deviation."""
    inputs, cotangent = tensors(150, 200, 32, torch.float32, device, std), torch.randn(150, dtype=torch.float64)
    got = value_and_gradients(ops.gaussian_logsumexp, inputs, cotangent)
    eager = value_and_gradients(dense, inputs, cotangent)
    truth = value_and_gradients(dense, double(*inputs), cotangent)
    for name, one, two, three in zip(["lse", "z", "mean", "log_std", "log_weight"], got, eager, truth, strict=True):
        error, eager_error = (float((t.double().cpu() - three).square().mean().sqrt()) for t in (one, two))
        floor = torch.finfo(torch.float32).eps * float(three.square().mean().sqrt())
        assert error <= 1.2 * eager_error + floor, f"{name}: error {error:.3g}, eager torch {eager_error:.3g}"


# --- awkward input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["strided", "transposed", "offset", "padded_rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_layout_changes_nothing(layout, dtype, device, layouts):
    inputs = tensors(33, 21, 10, dtype, device)
    expected, got = ops.gaussian_logsumexp(*inputs), ops.gaussian_logsumexp(*map(layouts[layout], inputs))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_expanded_inputs(device):
    z, mean, log_std, log_weight = tensors(6, 5, 4, torch.float32, device)
    one_std, one_weight = log_std[:1, :1].expand(5, 4), log_weight[:1].expand(5)
    got = ops.gaussian_logsumexp(z[:1].expand(6, -1), mean, one_std, one_weight)
    expected = ops.gaussian_logsumexp(z[:1].repeat(6, 1), mean, one_std.clone(), one_weight.clone())
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows(dtype, device):
    inputs = [t.requires_grad_() for t in tensors(0, 5, 3, dtype, device)]
    out = ops.gaussian_logsumexp(*inputs)
    assert out.shape == (0,)
    gradients = torch.autograd.grad(out.sum(), inputs)
    assert all(g.shape == t.shape and (g == 0).all() for g, t in zip(gradients, inputs, strict=True))


def test_equal_components_count_each(device):
    z, mean, log_std, _ = tensors(6, 1, 3, torch.float32, device)
    got = ops.gaussian_logsumexp(z, mean.expand(50, 3), log_std.expand(50, 3))
    torch.testing.assert_close(got, ops.gaussian_logsumexp(z, mean, log_std) + math.log(50))


def test_a_component_of_weight_zero_is_as_if_absent(device):
    z, mean, log_std, log_weight = tensors(9, 6, 3, device=device)
    keep = [0, 2, 3, 5]
    log_weight[[1, 4]] = -INF
    inputs = [t.requires_grad_() for t in (z, mean, log_std, log_weight)]
    out = ops.gaussian_logsumexp(*inputs)
    torch.testing.assert_close(out, ops.gaussian_logsumexp(z, mean[keep], log_std[keep], log_weight[keep]))
    for gradient in torch.autograd.grad(out.sum(), inputs)[1:]:
        assert gradient.isfinite().all() and (gradient[[1, 4]] == 0).all() and (gradient[keep] != 0).all()


def test_without_any_weight_the_density_is_zero_and_so_is_the_gradient(device):
    z, mean, log_std, log_weight = tensors(4, 3, 2, torch.float32, device)
    inputs = [t.requires_grad_() for t in (z, mean, log_std, torch.full_like(log_weight, -INF))]
    out = ops.gaussian_logsumexp(*inputs)
    assert (out == -INF).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.parametrize("far", [1e18, 1e20, 3e38])
def test_a_row_without_mass_has_no_gradient_and_spoils_no_other(far, device):
    """The square overflows float32 to +inf: the density is zero there, and its gradient is zero, not NaN."""
    z, mean, log_std, log_weight = tensors(5, 3, 2, torch.float32, device)
    z[1] = far
    inputs = [t.requires_grad_() for t in (z, mean, log_std, log_weight)]
    out = ops.gaussian_logsumexp(*inputs)
    assert out[1] == -INF or far < 1e19
    clean = [t.detach().requires_grad_() for t in (z[[0, 2, 3, 4]], mean, log_std, log_weight)]
    torch.testing.assert_close(out[[0, 2, 3, 4]], ops.gaussian_logsumexp(*clean))
    got = torch.autograd.grad(out[[0, 2, 3, 4]].sum(), inputs)
    expected = torch.autograd.grad(ops.gaussian_logsumexp(*clean).sum(), clean)
    torch.testing.assert_close(got[0][[0, 2, 3, 4]], expected[0])
    torch.testing.assert_close(got[1:], expected[1:])


def test_a_component_out_of_reach_has_no_gradient(device):
    """One component so narrow that its square overflows: the others carry the density and the gradient."""
    z, mean, log_std, log_weight = tensors(5, 3, 2, torch.float32, device)
    log_std[1] = -50.0
    inputs = [t.requires_grad_() for t in (z, mean, log_std, log_weight)]
    out = ops.gaussian_logsumexp(*inputs)
    rest = [z, *(t.detach()[[0, 2]] for t in (mean, log_std, log_weight))]
    torch.testing.assert_close(out, ops.gaussian_logsumexp(*rest))
    gradients = torch.autograd.grad(out.sum(), inputs)
    assert all(g.isfinite().all() for g in gradients) and all((g[1] == 0).all() for g in gradients[1:])


@pytest.mark.parametrize("components", [3, 70])
def test_an_infinite_distance_is_not_multiplied_by_zero(components, device):
    """Where (z − mean)/std is itself infinite, among components that carry the density."""
    z, mean, log_std, log_weight = tensors(30, components, 5, torch.float32, device)
    log_std[1] = -88.0
    inputs = [t.requires_grad_() for t in (z, mean, log_std, log_weight)]
    got = torch.autograd.grad(ops.gaussian_logsumexp(*inputs).sum(), inputs)
    keep = [k for k in range(components) if k != 1]
    rest = [t.detach().requires_grad_() for t in (z, *(t[keep] for t in (mean, log_std, log_weight)))]
    expected = torch.autograd.grad(ops.gaussian_logsumexp(*rest).sum(), rest)
    torch.testing.assert_close(got[0], expected[0])
    for one, two in zip(got[1:], expected[1:], strict=True):
        assert (one[1] == 0).all()
        torch.testing.assert_close(one[keep], two)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_bad_rows_reach_only_themselves(bad, device):
    z, mean, log_std, log_weight = tensors(6, 5, 3, torch.float32, device)
    expected = ops.gaussian_logsumexp(z, mean, log_std, log_weight)
    z[2, 1] = bad
    got = ops.gaussian_logsumexp(z, mean, log_std, log_weight)
    assert torch.equal(got[[0, 1, 3, 4, 5]], expected[[0, 1, 3, 4, 5]])
    assert got[2].isnan() if math.isnan(bad) else got[2] == -INF


def test_a_component_of_nan_is_seen_in_every_row(device):
    z, mean, log_std, _ = tensors(6, 5, 3, torch.float32, device)
    mean[4, 0] = NAN
    assert ops.gaussian_logsumexp(z, mean, log_std).isnan().all()


def test_an_infinitely_far_component_carries_nothing(device):
    z, mean, log_std, _ = tensors(6, 5, 3, torch.float32, device)
    mean[4, 0] = INF
    torch.testing.assert_close(
        ops.gaussian_logsumexp(z, mean, log_std), ops.gaussian_logsumexp(z, mean[:4], log_std[:4])
    )


@pytest.mark.parametrize(
    ("dtype", "distance", "log_std"),
    [
        (torch.float16, 60000.0, 0.0),
        (torch.float16, 6e-8, -10.0),
        (torch.bfloat16, 1e10, 5.0),
        (torch.float32, 1e15, 0.0),
        (torch.float32, 1e-30, -30.0),
        (torch.float64, 1e150, 0.0),
    ],
    ids=str,
)
def test_extreme_distances(dtype, distance, log_std, device):
    z = torch.zeros(2, 3, dtype=dtype, device=device)
    mean = torch.full((4, 3), distance, dtype=dtype, device=device)
    log_std = torch.full_like(mean, log_std)
    got, truth = ops.gaussian_logsumexp(z, mean, log_std), dense(*double(z, mean, log_std))
    torch.testing.assert_close(got.double().cpu(), truth, rtol=1e-5, atol=1e-5)


# --- threads, gradients, torch.library, torch.compile -------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_threads_change_nothing(dtype):
    inputs, results = tensors(517, 391, 19, dtype), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        lse = ops.gaussian_logsumexp(*inputs)
        results.append([lse, *torch.ops.ncpvae.gaussian_logsumexp_backward(lse, *inputs, lse)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("shape", [(5, 3, 2), (1, 4, 3), (4, 1, 1)], ids=str)
def test_gradients_once_and_twice(shape, weighted, device):
    inputs = [t.requires_grad_() for t in tensors(*shape, device=device, std=1.0)[: 4 if weighted else 3]]
    assert torch.autograd.gradcheck(ops.gaussian_logsumexp, inputs)
    assert torch.autograd.gradgradcheck(ops.gaussian_logsumexp, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_error_is_bounded_by_eager(shape, dtype, device, assert_accurate):
    inputs = tensors(*shape, dtype, device)
    cotangent = torch.randn(shape[0], dtype=torch.float64)

    got, eager = gradients(ops.gaussian_logsumexp, inputs, cotangent), gradients(dense, inputs, cotangent)
    truth = gradients(dense, double(*inputs), cotangent)
    for one, two, three in zip(got, eager, truth, strict=True):
        assert one.dtype == dtype
        assert_accurate(one, two, three, dtype, units=8)


@pytest.mark.parametrize("odd", [None, 1e-6, 1e6])
def test_gradients_at_any_std(odd, device):
    """Also where one dimension's is far from the others'."""
    check_gradients(odd, device)


@pytest.mark.parametrize("odd", [1e-25, 1e25])
def test_gradients_where_a_variance_leaves_float32(odd):
    """On the CPU: CUDA's kernels are not made for that."""
    check_gradients(odd, "cpu")


def check_gradients(odd, device):
    torch.manual_seed(4)
    mean, log_std = torch.randn(60, 9, dtype=torch.float64), 0.2 * torch.randn(60, 9, dtype=torch.float64)
    if odd is not None:
        log_std[:, 4] += math.log(odd)
        mean[:, 4] = 0.0
    z = mean[:55] + log_std[:55].exp() * torch.randn(55, 9, dtype=torch.float64)
    inputs = [t.float().to(device) for t in (z, mean, log_std)]
    cotangent = torch.randn(55, dtype=torch.float64)
    got = gradients(ops.gaussian_logsumexp, inputs, cotangent)
    truth = gradients(dense, double(*inputs), cotangent)
    for one, exact in zip(got, truth, strict=True):
        largest = exact.abs().amax(0)  # a dimension's gradients have its own scale
        assert ((one.double().cpu() - exact).abs() <= 1e-5 * largest).all()


@pytest.mark.parametrize(("far", "grad"), [(1e16, 1e8), (1e20, 1.0), (1.0, 1e37), (1.0, 1e-37)])
def test_extreme_sizes_stay_within_float32(far, grad):
    """On the CPU: (z − mean)² and the gradient times it may leave the range that t² stays in."""
    inputs = [torch.full((1, 1), far), torch.zeros(1, 1), torch.full((1, 1), 11.0)]
    got = gradients(ops.gaussian_logsumexp, inputs, torch.tensor([grad]))
    for one, truth in zip(got, gradients(dense, double(*inputs), torch.tensor([grad])), strict=True):
        torch.testing.assert_close(one.double(), truth, rtol=1e-5, atol=1e-44)


@pytest.mark.parametrize("wanted", range(4))
def test_each_argument_alone_gets_its_gradient(wanted, device):
    inputs = tensors(6, 5, 4, device=device)
    inputs[wanted].requires_grad_()
    (got,) = torch.autograd.grad(ops.gaussian_logsumexp(*inputs).square().sum(), inputs[wanted])
    (expected,) = torch.autograd.grad(dense(*inputs).square().sum(), inputs[wanted])
    torch.testing.assert_close(got, expected)


def test_gradient_of_non_contiguous_inputs(device, layouts):
    values = tensors(7, 6, 5, device=device)
    leaves = [t.clone().requires_grad_() for t in values]
    expected = torch.autograd.grad(dense(*leaves).sum(), leaves)
    for layout in layouts.values():
        leaves = [layout(t).requires_grad_() for t in values]
        torch.testing.assert_close(torch.autograd.grad(ops.gaussian_logsumexp(*leaves).sum(), leaves), expected)


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_opcheck(dtype, weighted, device):
    z, mean, log_std, log_weight = tensors(5, 4, 3, dtype, device)
    log_weight = log_weight if weighted else None
    lse = ops.gaussian_logsumexp(z, mean, log_std, log_weight)
    backward = torch.ops.ncpvae.gaussian_logsumexp_backward.default
    torch.library.opcheck(backward, (torch.randn_like(lse), z, mean, log_std, log_weight, lse))
    inputs = tuple(t if t is None else t.requires_grad_() for t in (z, mean, log_std, log_weight))
    torch.library.opcheck(torch.ops.ncpvae.gaussian_logsumexp.default, inputs)


def test_opcheck_on_transposed_inputs(device):
    """What the shape functions promise of the strides must be what the kernels return."""
    z, mean, log_std = (torch.randn(3, size, device=device).T for size in (5, 4, 4))
    lse = ops.gaussian_logsumexp(z, mean, log_std)
    torch.library.opcheck(torch.ops.ncpvae.gaussian_logsumexp.default, (z, mean, log_std))
    torch.library.opcheck(torch.ops.ncpvae.gaussian_logsumexp_backward.default, (lse, z, mean, log_std, None, lse))


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_whole_with_its_gradient(dynamic, weighted, device):
    def loss(*inputs):
        return ops.gaussian_logsumexp(*inputs).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (4, 6):
        inputs = [t.requires_grad_() for t in tensors(rows, 5, 3, device=device)[: 4 if weighted else 3]]
        expected, got = (torch.autograd.grad(f(*inputs), inputs) for f in (loss, compiled))
        torch.testing.assert_close(got, expected)


# --- bad input ----------------------------------------------------------------------------------------------

Z, MEAN, WEIGHT = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(5)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([[0.0]], MEAN, MEAN), TypeError, ["z", "tensor", "list"]),
        ((Z.long(), MEAN, MEAN), TypeError, ["z", "float32", "torch.int64"]),
        ((Z[0], MEAN, MEAN), ValueError, ["z", "2 dimension", "(3,)"]),
        ((Z[:, :0], MEAN[:, :0], MEAN[:, :0]), ValueError, ["z", "D ≥ 1", "(4, 0)"]),
        ((Z, 0.0, MEAN), TypeError, ["mean", "tensor", "float"]),
        ((Z, MEAN.half(), MEAN), TypeError, ["mean", "z's dtype torch.float32", "torch.float16"]),
        ((Z, MEAN[0], MEAN), ValueError, ["mean", "2 dimension", "(3,)"]),
        ((Z, MEAN[:, :2], MEAN), ValueError, ["mean", "(5, 3)", "(5, 2)"]),
        ((Z, MEAN[:0], MEAN[:0]), ValueError, ["mean", "K ≥ 1", "(0, 3)"]),
        ((Z, MEAN.to("meta"), MEAN), ValueError, ["mean", "device", "cpu", "meta"]),
        ((Z, MEAN, 0.0), TypeError, ["log_std", "tensor", "float"]),
        ((Z, MEAN, MEAN.double()), TypeError, ["log_std", "torch.float32", "torch.float64"]),
        ((Z, MEAN, MEAN[:1]), ValueError, ["log_std", "(5, 3)", "(1, 3)"]),
        ((Z, MEAN, WEIGHT), ValueError, ["log_std", "(5, 3)", "(5,)"]),
        ((Z, MEAN, MEAN, [0.0]), TypeError, ["log_weight", "tensor", "list"]),
        ((Z, MEAN, MEAN, WEIGHT.int()), TypeError, ["log_weight", "float32", "torch.int32"]),
        ((Z, MEAN, MEAN, WEIGHT[:4]), ValueError, ["log_weight", "(5,)", "(4,)"]),
        ((Z, MEAN, MEAN, WEIGHT[:, None]), ValueError, ["log_weight", "(5,)", "(5, 1)"]),
    ],
)
def test_names_what_is_wrong(arguments, error, words):
    with pytest.raises(error) as caught:
        ops.gaussian_logsumexp(*arguments)
    assert type(caught.value) is error
    assert all(word in str(caught.value) for word in ["gaussian_logsumexp:", *words]), str(caught.value)
