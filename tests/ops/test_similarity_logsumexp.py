"""similarity_logsumexp: both directions of the scores' logsumexp, and their gradients, as torch has them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ncpvae import ops
from ncpvae.ops import reference

INF, NAN = math.inf, math.nan
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(1, 1, 1), (5, 3, 1), (4, 1, 7), (1, 9, 16), (33, 65, 17), (130, 257, 64)]
LARGE = (40, 35, 50)  # as much as matrix registers are worth it for, where a processor has them
FEW = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def wide(dtype):
    """What an op computes in, at least: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tensors(N, K, D, dtype, device, normalise=False):
    z, x = torch.randn(N, D, dtype=torch.float64), torch.randn(K, D, dtype=torch.float64)
    if normalise:
        z, x = (torch.nn.functional.normalize(t, dim=1) for t in (z, x))
    return z.to(dtype).to(device), x.to(dtype).to(device)


def dense(z, x, scale):
    s = scale * (z @ x.T)
    return s.logsumexp(1), s.logsumexp(0)


def double(*values):
    return [v.detach().double().cpu() for v in values]


# --- against the dense formula ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, -2.0, 0.0, 100.0])
def test_matches_the_dense_scores(shape, scale, dtype, device, assert_accurate):
    z, x = tensors(*shape, dtype, device, normalise=abs(scale) == 100)
    width = wide(dtype)
    truth = dense(*double(z, x), scale)
    eager = dense(z.to(width), x.to(width), scale)
    defined = reference.similarity_logsumexp(*double(z, x), torch.tensor(scale, dtype=torch.float64))
    for got, one, two, three in zip(ops.similarity_logsumexp(z, x, scale), eager, truth, defined, strict=True):
        assert got.dtype == width
        assert_accurate(got, one, two, width, units=8)
        torch.testing.assert_close(three, two, rtol=1e-13, atol=1e-13)


@FEW
@given(
    N=st.integers(0, 40),
    K=st.integers(1, 40),
    D=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    scale=st.floats(-30, 30),
)
def test_any_shape(device, N, K, D, dtype, scale):
    z, x = tensors(N, K, D, dtype, device)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5 * (1 + abs(scale))
    for got, truth in zip(ops.similarity_logsumexp(z, x, scale), dense(*double(z, x), scale), strict=True):
        torch.testing.assert_close(got.double().cpu(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_is_a_number_or_a_tensor_of_any_floating_dtype(dtype, device):
    z, x = tensors(5, 4, 3, dtype, device)
    expected = ops.similarity_logsumexp(z, x, 2)
    for scale in (2.0, *(torch.tensor(2.0, dtype=d, device=device) for d in DTYPES)):
        for got, want in zip(ops.similarity_logsumexp(z, x, scale), expected, strict=True):
            torch.testing.assert_close(got, want)


def test_arguments_change_places(device):
    z, x = tensors(20, 30, 8, torch.float64, device)
    (lse_z, lse_x), (other_x, other_z) = ops.similarity_logsumexp(z, x, 3.0), ops.similarity_logsumexp(x, z, 3.0)
    torch.testing.assert_close(lse_z, other_z)
    torch.testing.assert_close(lse_x, other_x)


def test_info_nce_of_matched_pairs_is_torchs_cross_entropy(device):
    """What the op is for: both directions of a symmetric contrastive loss."""
    z, x = tensors(40, 40, 16, torch.float64, device, normalise=True)
    lse_z, lse_x = ops.similarity_logsumexp(z, x, 14.0)
    scores, target = 14 * z @ x.T, torch.arange(40, device=device)
    loss = (lse_z - scores.diagonal()).mean(), (lse_x - scores.diagonal()).mean()
    torch.testing.assert_close(loss[0], torch.nn.functional.cross_entropy(scores, target))
    torch.testing.assert_close(loss[1], torch.nn.functional.cross_entropy(scores.T, target))


# --- around the tiles that kernels cut the scores into ---------------------------------------------------------

EDGES = [(127, 129, 7), (128, 128, 8), (129, 1, 17), (1, 127, 1), (2, 130, 130), (5, 6, 520), (33, 129, 65)]


def values_and_gradients(op, inputs, cotangents):
    inputs = [t.detach().requires_grad_() for t in inputs]
    outputs = op(*inputs)
    cotangents = [c.to(o.dtype).to(o.device) for c, o in zip(cotangents, outputs, strict=True)]
    return *(o.detach() for o in outputs), *torch.autograd.grad(outputs, inputs, cotangents)


def gradients(op, inputs, cotangents):
    return values_and_gradients(op, inputs, cotangents)[2:]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_edges_of_tiles(shape, dtype, device, assert_accurate):
    inputs = [*tensors(*shape, dtype, device, normalise=True), torch.tensor(10.0, dtype=dtype, device=device)]
    cotangents = torch.randn(shape[0], dtype=torch.float64), torch.randn(shape[1], dtype=torch.float64)
    width = wide(dtype)
    eager, truth = dense(*(t.to(width) for t in inputs)), dense(*double(*inputs))
    for one, two, three in zip(ops.similarity_logsumexp(*inputs), eager, truth, strict=True):
        assert_accurate(one, two, three, width, units=8)
    *got, dscale = gradients(ops.similarity_logsumexp, inputs, cotangents)
    *eager, _ = gradients(dense, inputs, cotangents)
    *truth, true_dscale = gradients(dense, double(*inputs), cotangents)
    for one, two, three in zip(got, eager, truth, strict=True):
        assert_accurate(one, two, three, dtype, units=4)
    # A sum of terms of either sign, which may all but cancel: eager torch's own error is a matter of luck.
    terms = sum(c.abs().sum() for c in cotangents)  # at least Σ |∂/∂score · dot|: dots are cosines
    bound = 4 * torch.finfo(width).eps * terms + torch.finfo(dtype).eps * true_dscale.abs()
    assert (dscale.double().cpu() - true_dscale).abs() <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e3])
@pytest.mark.parametrize("D", [9, 60])
def test_small_and_large_scores_in_one_tile(D, scale, dtype, device, assert_accurate):
    """No common origin serves all rows: exp of one row's scores is out of range where another's is 1."""
    z, x = tensors(70, 60, D, torch.float64, "cpu")
    z, x = z * torch.logspace(-3, 1, 70, dtype=z.dtype)[:, None], x * torch.logspace(1, -2, 60, dtype=x.dtype)[:, None]
    inputs = [z.to(dtype).to(device), x.to(dtype).to(device), torch.tensor(scale, device=device)]
    cotangents = torch.randn(70, dtype=torch.float64), torch.randn(60, dtype=torch.float64)
    eager, truth = dense(*(t.float() for t in inputs)), dense(*double(*inputs))
    for one, two, three in zip(ops.similarity_logsumexp(*inputs), eager, truth, strict=True):
        assert_accurate(one, two, three, torch.float32, units=8)
    got, eager = (
        gradients(op, arguments, cotangents)
        for op, arguments in ((ops.similarity_logsumexp, inputs), (dense, [t.float() for t in inputs]))
    )
    for one, two, three in zip(got, eager, gradients(dense, double(*inputs), cotangents), strict=True):
        assert_accurate(one, two, three, one.dtype, units=8)


def test_float32_keeps_its_error(device):
    """Scores of many positive terms, where what rounds in one direction adds up. With one column, lse_z is a score."""
    z, x = (t.abs() for t in tensors(96, 1, 512, torch.float32, device))
    truth = dense(*double(z, x), 1.0)[0]
    error = (double(ops.similarity_logsumexp(z, x, 1.0)[0])[0] / truth - 1).abs().max()
    assert error <= 4 * torch.finfo(torch.float32).eps, error


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_score_alone_in_its_row_takes_the_whole_gradient(dtype, device):
    """exp(score − lse) is 1 even where scores have no digits after the point: the score is formed as it was before."""
    z, x = tensors(9, 1, 33, dtype, device)
    z, x, grad = 100 * z, 100 * x, torch.linspace(-1, 1, 9, device=device)
    for flipped in (False, True):
        inputs = (x, z) if flipped else (z, x)
        inputs = [t.clone().requires_grad_() for t in inputs]
        alone = ops.similarity_logsumexp(*inputs, 1.0)[int(flipped)]
        (got,) = torch.autograd.grad(alone, inputs[int(flipped)], grad)
        torch.testing.assert_close(got, (grad[:, None] * x).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scores_that_dominate_take_the_whole_gradient(dtype, device):
    """The same among others: every row has one score that leaves the others nothing."""
    x = 3 * torch.randn(40, 64, device=device).to(dtype)
    z = (30 * x).requires_grad_()
    grad = torch.linspace(-1, 1, 40, device=device)
    (got,) = torch.autograd.grad(ops.similarity_logsumexp(z, x, 1.0)[0], z, grad)
    torch.testing.assert_close(got, (grad[:, None] * x).to(dtype))


@pytest.mark.parametrize("size", [1e-36, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_extreme_gradients_keep_their_digits(dtype, size):
    """On the CPU: products on matrix registers take the smallest numbers for zero."""
    inputs = [*tensors(64, 70, 64, dtype, "cpu"), torch.tensor(0.1)]
    cotangents = [size * torch.randn(n, dtype=torch.float64) for n in (64, 70)]
    got, truth = (
        gradients(op, arguments, cotangents)
        for op, arguments in ((ops.similarity_logsumexp, inputs), (dense, double(*inputs)))
    )
    for one, two in zip(got[:2], truth[:2], strict=True):
        assert (one.double() - two).norm() <= (1e-2 if dtype == torch.bfloat16 else 2e-6) * two.norm()


@pytest.mark.parametrize("size", [1e-17, 1e-8, 1e8])
def test_extreme_vectors_keep_the_gradient_of_the_scale(size):
    z, x = (size * t for t in tensors(64, 70, 64, torch.float32, "cpu"))
    inputs = [z, x, torch.tensor(1.0 if size < 1 else 1e-16)]
    cotangents = [torch.rand(n, dtype=torch.float64) for n in (64, 70)]
    got, truth = gradients(ops.similarity_logsumexp, inputs, cotangents), gradients(dense, double(*inputs), cotangents)
    for one, two in zip(got, truth, strict=True):
        assert (one.double() - two).norm() <= 2e-5 * two.norm()


def test_an_infinite_gradient_is_not_lost_in_nan():
    z, x = tensors(64, 64, 64, torch.float32, "cpu")
    grad = torch.zeros(64)
    grad[3] = INF
    inputs = [z, x, torch.tensor(0.1)]
    (_, got, _), (_, truth, _) = (
        torch.autograd.grad(op(*leaves)[0], leaves, grad)
        for op, leaves in (
            (op, [t.clone().requires_grad_() for t in inputs]) for op in (ops.similarity_logsumexp, dense)
        )
    )
    assert truth.isinf().all() and torch.equal(got, truth)


def test_gradients_below_the_range_of_float16_count(device):
    """Each score's share of the gradient is below float16's smallest number; their sum is not."""
    z, x = tensors(50, 400, 8, torch.float64, "cpu")
    z, x = (0.002 * z).half().to(device), (1000 * x).half().to(device)
    cotangents = torch.full((50,), 1e-8), torch.zeros(400)
    got = gradients(lambda z: ops.similarity_logsumexp(z, x, 1.0), [z], cotangents)[0]
    truth = gradients(lambda z: dense(z, *double(x), 1.0), double(z), cotangents)[0]
    assert truth.abs().max() > 1e-6
    torch.testing.assert_close(got.double().cpu(), truth, rtol=0.01, atol=6e-8)


def test_the_same_bits_every_time(device):
    (z, x), scale = tensors(150, 140, 20, torch.float32, device), torch.tensor(3.0, device=device)
    results = []
    for _ in range(2):
        lse = ops.similarity_logsumexp(z, x, scale)
        results.append([*lse, *torch.ops.ncpvae.similarity_logsumexp_backward(*lse, z, x, scale, *lse)])
    assert all(map(torch.equal, *results))


# --- awkward input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["strided", "transposed", "offset", "padded_rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_layout_changes_nothing(layout, dtype, device, layouts):
    z, x = tensors(33, 21, 10, dtype, device)
    expected, got = ops.similarity_logsumexp(z, x, 1.5), ops.similarity_logsumexp(*map(layouts[layout], (z, x)), 1.5)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_expanded_rows(device):
    z, x = tensors(1, 6, 5, torch.float32, device)
    got, expected = ops.similarity_logsumexp(z.expand(7, -1), x, 1.0), ops.similarity_logsumexp(z.repeat(7, 1), x, 1.0)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows(dtype, device):
    z, x = (t.requires_grad_() for t in tensors(0, 5, 3, dtype, device))
    scale = torch.tensor(2.0, device=device, requires_grad=True)
    lse_z, lse_x = ops.similarity_logsumexp(z, x, scale)
    assert lse_z.shape == (0,) and (lse_x == -INF).all() and lse_x.shape == (5,)
    gradients = torch.autograd.grad(lse_z.sum(), (z, x, scale))
    assert gradients[0].shape == (0, 3) and all((g == 0).all() for g in gradients)


def test_ties_count_each(device):
    z, x = torch.ones(6, 4, device=device), torch.ones(5, 4, device=device)
    lse_z, lse_x = ops.similarity_logsumexp(z, x, 10.0)
    torch.testing.assert_close(lse_z, torch.full_like(lse_z, 40 + math.log(5)))
    torch.testing.assert_close(lse_x, torch.full_like(lse_x, 40 + math.log(6)))


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float16, 65504.0),
        (torch.float16, 6e-8),
        (torch.bfloat16, 1e18),
        (torch.float32, 1e18),
        (torch.float32, 1e-30),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(9, 11, 4), LARGE], ids=str)
def test_scores_far_beyond_exp_are_no_trouble(shape, dtype, size, device):
    """The maximum comes from the data and not from an assumption that rows are normalised."""
    z, x = (size * torch.sign(t) for t in tensors(*shape, dtype, device))
    for got, truth in zip(ops.similarity_logsumexp(z, x, 1.0), dense(*double(z, x), 1.0), strict=True):
        torch.testing.assert_close(got.double().cpu(), truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("shape", [(6, 5, 3), LARGE], ids=str)
def test_bad_rows_reach_only_what_they_belong_to(shape, bad, device):
    z, x = tensors(*shape, torch.float32, device)
    expected = ops.similarity_logsumexp(z, x, 1.0)[0]
    z[2, 1] = bad
    lse_z, lse_x = ops.similarity_logsumexp(z, x, 1.0)
    keep = torch.arange(shape[0], device=device) != 2
    torch.testing.assert_close(lse_z[keep], expected[keep], rtol=1e-6, atol=1e-6)
    for got, truth in zip((lse_z, lse_x), dense(*double(z, x), 1.0), strict=True):
        torch.testing.assert_close(got.double().cpu(), truth, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("shape", [(6, 5, 3), LARGE], ids=str)
def test_the_largest_floats(shape, device):
    """They round to infinity in a format with fewer digits."""
    z, x = tensors(*shape, torch.float32, device)
    x /= 10
    z[2, 1] = torch.finfo(torch.float32).max
    for got, truth in zip(ops.similarity_logsumexp(z, x, 1.0), dense(*double(z, x), 1.0), strict=True):
        torch.testing.assert_close(got.double().cpu(), truth, rtol=1e-5, atol=1e-5)


# --- threads, gradients, torch.library, torch.compile -------------------------------------------------------


@pytest.mark.parametrize("D", [37, 70])
def test_threads_change_nothing(D):
    """Only the package's own kernel promises this: plain torch leaves its matrix products to a BLAS library."""
    from ncpvae.ops import _library

    if "CPU" in _library.NATIVE_UNAVAILABLE:
        pytest.skip("native CPU kernels are not in use")
    (z, x), scale, results = tensors(517, 391, D, torch.float32, "cpu"), torch.tensor(1.5), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        lse = ops.similarity_logsumexp(z, x, scale)
        results.append([*lse, *torch.ops.ncpvae.similarity_logsumexp_backward(lse[0], lse[1], z, x, scale, *lse)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("shape", [(5, 3, 2), (1, 4, 3), (4, 1, 1)], ids=str)
def test_gradients_once_and_twice(shape, device):
    z, x = tensors(*shape, torch.float64, device)
    scale = torch.tensor(0.7, dtype=torch.float64, device=device)
    inputs = [t.requires_grad_() for t in (z, x, scale)]
    assert torch.autograd.gradcheck(ops.similarity_logsumexp, inputs)
    assert torch.autograd.gradgradcheck(ops.similarity_logsumexp, inputs)
    for output in (0, 1):  # one direction alone
        assert torch.autograd.gradcheck(lambda *a, o=output: ops.similarity_logsumexp(*a)[o], inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [8.0, 300.0])
def test_gradient_error_is_bounded_by_eager(scale, shape, dtype, device, assert_accurate):
    inputs = [*tensors(*shape, dtype, device, normalise=True), torch.tensor(scale, dtype=dtype, device=device)]
    cotangents = torch.randn(shape[0], dtype=torch.float64), torch.randn(shape[1], dtype=torch.float64)
    got, eager = (gradients(op, inputs, cotangents) for op in (ops.similarity_logsumexp, dense))
    truth = gradients(dense, double(*inputs), cotangents)
    for one, two, three in zip(got, eager, truth, strict=True):
        assert one.dtype == dtype
        assert_accurate(one, two, three, dtype, units=4 if scale < 100 else 16)  # the scores' own digits end


# one less, just as many and one more than the rows, columns and dimensions that kernels take together
BLOCK_EDGES = [
    *((n, k, 3) for n in (3, 4, 5, 11, 12, 13, 23, 24, 25, 97) for k in (7, 15, 16, 17, 31, 33, 47, 48, 49, 191, 193)),
    *((30, 50, d) for d in (1, 7, 15, 16, 17, 31, 32, 33, 127, 128, 129, 257)),
    *((n, k, 50) for n in (31, 32, 33, 65, 520) for k in (31, 32, 33, 127, 128, 129, 257)),
    *((97, 131, d) for d in (47, 48, 49, 63, 64, 65, 159, 161, 300)),
    *((3, 4700, 2), (1000, 4700, 2), (1100, 3300, 48)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", BLOCK_EDGES, ids=str)
def test_edges_of_the_blocks(shape, dtype, device, assert_accurate):
    inputs = [*tensors(*shape, dtype, device, normalise=True), torch.tensor(8.0, dtype=dtype, device=device)]
    cotangents = torch.rand(shape[0], dtype=torch.float64), torch.rand(shape[1], dtype=torch.float64)
    got = values_and_gradients(ops.similarity_logsumexp, inputs, cotangents)
    eager = values_and_gradients(dense, inputs, cotangents)
    truth = values_and_gradients(dense, double(*inputs), cotangents)
    for one, two, three in zip(got, eager, truth, strict=True):
        assert_accurate(one, two, three, dtype)


@pytest.mark.parametrize("far", [0, 60], ids=["first_tile", "last_tile"])
@pytest.mark.parametrize("D", [9, 70])
def test_scores_of_very_different_size_in_one_call(D, far, device, assert_accurate):
    """Rows a thousand times as long as the others: no common maximum serves their tile."""
    z, x = tensors(70, 230, D, torch.float32, device)
    z[far : far + 3] *= 1000
    inputs, cotangents = [z, x, torch.tensor(1.5, device=device)], (torch.rand(70), torch.rand(230))
    got = values_and_gradients(ops.similarity_logsumexp, inputs, cotangents)
    eager = values_and_gradients(dense, inputs, cotangents)
    truth = values_and_gradients(dense, double(*inputs), cotangents)
    for one, two, three in zip(got, eager, truth, strict=True):
        assert_accurate(one, two, three, torch.float32)


@pytest.mark.parametrize("wanted", range(3))
def test_each_argument_alone_gets_its_gradient(wanted, device):
    z, x = tensors(6, 5, 4, torch.float64, device)
    inputs = [z, x, torch.tensor(1.3, dtype=torch.float64, device=device)]
    inputs[wanted].requires_grad_()
    (got,) = torch.autograd.grad(sum(o.sum() for o in ops.similarity_logsumexp(*inputs)), inputs[wanted])
    (expected,) = torch.autograd.grad(sum(o.sum() for o in dense(*inputs)), inputs[wanted])
    torch.testing.assert_close(got, expected)


def test_gradient_of_non_contiguous_inputs(device, layouts):
    z, x = tensors(7, 6, 5, torch.float64, device)
    expected = torch.func.grad(lambda z, x: sum(o.sum() for o in dense(z, x, 2.0)), argnums=(0, 1))(z, x)
    for layout in layouts.values():
        leaves = [layout(t).requires_grad_() for t in (z, x)]
        outputs = ops.similarity_logsumexp(*leaves, 2.0)
        one = torch.ones((), dtype=z.dtype, device=device)  # expanded, as sum() hands it on
        got = torch.autograd.grad(outputs, leaves, [one.expand_as(o) for o in outputs])
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_opcheck(dtype, device):
    z, x = tensors(5, 4, 3, dtype, device)
    scale = torch.tensor(1.5, dtype=dtype, device=device)
    lse_z, lse_x = ops.similarity_logsumexp(z, x, scale)
    backward = torch.ops.ncpvae.similarity_logsumexp_backward.default
    torch.library.opcheck(backward, (torch.randn_like(lse_z), torch.randn_like(lse_x), z, x, scale, lse_z, lse_x))
    inputs = tuple(t.requires_grad_() for t in (z, x, scale))
    torch.library.opcheck(torch.ops.ncpvae.similarity_logsumexp.default, inputs)


def test_opcheck_on_transposed_inputs(device):
    """What the shape functions promise of the strides must be what the kernels return."""
    z, x = (t.T for t in tensors(3, 3, 6, torch.float32, device))
    scale = torch.tensor(1.5, device=device)
    lse_z, lse_x = ops.similarity_logsumexp(z, x, scale)
    torch.library.opcheck(torch.ops.ncpvae.similarity_logsumexp.default, (z, x, scale))
    torch.library.opcheck(
        torch.ops.ncpvae.similarity_logsumexp_backward.default, (lse_z, lse_x, z, x, scale, lse_z, lse_x)
    )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("scale", [2.0, torch.tensor(2.0, dtype=torch.float64)], ids=["number", "tensor"])
def test_compiles_whole_with_its_gradient(scale, dynamic, device):
    def loss(z, x, scale):
        lse_z, lse_x = ops.similarity_logsumexp(z, x, scale)
        return lse_z.sum() - lse_x.square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    scale = scale.to(device) if isinstance(scale, torch.Tensor) else scale
    for rows in (4, 6):
        inputs = [t.requires_grad_() for t in tensors(rows, 5, 3, torch.float64, device)]
        expected, got = (torch.autograd.grad(f(*inputs, scale), inputs) for f in (loss, compiled))
        torch.testing.assert_close(got, expected)


# --- bad input ----------------------------------------------------------------------------------------------

Z, X = torch.zeros(4, 3), torch.zeros(5, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([[0.0]], X, 1.0), TypeError, ["z", "tensor", "list"]),
        ((Z.int(), X, 1.0), TypeError, ["z", "float32", "torch.int32"]),
        ((Z[0], X, 1.0), ValueError, ["z", "2 dimension", "(3,)"]),
        ((Z[:, :0], X[:, :0], 1.0), ValueError, ["z", "D ≥ 1", "(4, 0)"]),
        ((Z, None, 1.0), TypeError, ["x", "tensor", "NoneType"]),
        ((Z, X.double(), 1.0), TypeError, ["x", "z's dtype torch.float32", "torch.float64"]),
        ((Z, X[0], 1.0), ValueError, ["x", "2 dimension", "(3,)"]),
        ((Z, X[:, :2], 1.0), ValueError, ["x", "(5, 3)", "(5, 2)"]),
        ((Z, X[:0], 1.0), ValueError, ["x", "K ≥ 1", "(0, 3)"]),
        ((Z, X.to("meta"), 1.0), ValueError, ["x", "device", "cpu", "meta"]),
        ((Z, X, torch.ones(1)), ValueError, ["scale", "0 dimension", "(1,)"]),
        ((Z, X, torch.tensor(1)), TypeError, ["scale", "float32", "torch.int64"]),
        ((Z, X, torch.tensor(1.0, device="meta")), ValueError, ["scale", "device", "cpu", "meta"]),
        ((Z, X, "1"), TypeError, ["scale", "str"]),
        ((Z, X, None), TypeError, ["scale", "NoneType"]),
    ],
)
def test_names_what_is_wrong(arguments, error, words):
    with pytest.raises(error) as caught:
        ops.similarity_logsumexp(*arguments)
    assert type(caught.value) is error
    assert all(word in str(caught.value) for word in ["similarity_logsumexp:", *words]), str(caught.value)
