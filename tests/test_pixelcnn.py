"""What a masked network sees, that its probabilities are probabilities, and that its draws follow them."""

import pytest
import torch
from torch import nn

import ncpvae
from ncpvae import metrics
from ncpvae.pixelcnn import MaskedConv2d, PixelCNNLikelihood


def small(kernel_sizes=(3, 3), channels=6, context_channels=2, spread=3.0):
    """In float64, its weights enlarged so that pixels depend visibly on each other."""
    network = PixelCNNLikelihood(context_channels, channels, kernel_sizes).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(spread)
    return network


def all_images(height, width):
    """[2^(H·W), 1, H, W] float64, image n holding the bits of n."""
    pixels = height * width
    bits = torch.arange(2**pixels)[:, None] >> torch.arange(pixels) & 1
    return bits.double().view(-1, 1, height, width)


def reached(kernel_sizes, height, width, i, j):
    """Brute force: the pixels that logit (i, j) may depend on, walking back through the windows of the layers."""
    here = {(i, j)}
    for number, k in reversed(list(enumerate(kernel_sizes))):
        window = [(a, b) for a in range(-(k // 2), 1) for b in range(-(k // 2), k // 2 + 1)]
        window = [offset for offset in window if offset < (0, 0) or (number > 0 and offset == (0, 0))]
        here = {(p + a, q + b) for p, q in here for a, b in window}
        here = {(p, q) for p, q in here if 0 <= p < height and 0 <= q < width}
    return here


@pytest.mark.parametrize("kernel_sizes", [(3,), (5,), (3, 3), (3, 1, 5), (5, 3, 3)])
def test_a_logit_sees_the_pixels_before_it_and_the_context_around_it(kernel_sizes):
    height, width, network = 5, 6, small(kernel_sizes)
    for i, j in [(0, 0), (0, 3), (2, 0), (2, 3), (3, 5), (4, 5)]:
        x = torch.rand(4, 1, height, width, dtype=torch.float64, requires_grad=True)
        context = torch.randn(4, 2, height, width, dtype=torch.float64, requires_grad=True)
        of_x, of_context = torch.autograd.grad(network.logits(x, context)[:, 0, i, j].sum(), (x, context))
        seen = {tuple(place) for place in of_x.abs().sum((0, 1)).nonzero().tolist()}
        assert seen == reached(kernel_sizes, height, width, i, j)
        assert all(place < (i, j) for place in seen)
        half = kernel_sizes[0] // 2
        around = of_context[:, :, max(0, i - half) : i + half + 1, max(0, j - half) : j + half + 1]
        assert (around.abs().sum((0, 1)) > 0).all()  # pixels after this one too


def test_changing_a_pixel_changes_no_logit_before_it_or_at_it():
    network = small((5, 3, 3)).train()  # in training too
    x, context = (torch.rand(3, 1, 4, 5) < 0.5).double(), torch.randn(3, 2, 4, 5).double()
    before = network.logits(x, context).flatten(1)
    for pixel in range(20):
        changed = x.flatten(1).clone()
        changed[:, pixel] = 1 - changed[:, pixel]
        after = network.logits(changed.view_as(x), context).flatten(1)
        assert torch.equal(after[:, : pixel + 1], before[:, : pixel + 1])
        assert pixel == 19 or not torch.equal(after, before)


@pytest.mark.parametrize("kernel_size", [1, 3, 7])
def test_a_masked_convolution_is_the_convolution_with_zeros_in_the_hidden_places(kernel_size):
    convolution = MaskedConv2d(2, 3, kernel_size, centre=True).double()
    visible, places = convolution.weight.shape[2], kernel_size**2
    assert visible == (places + 1) // 2
    kernel = torch.zeros(3, 2, places, dtype=torch.float64)
    kernel[:, :, :visible] = convolution.weight
    x = torch.randn(4, 2, 5, 8).double()
    full = kernel.unflatten(2, (kernel_size, kernel_size))
    expected = nn.functional.conv2d(x, full, convolution.bias, padding=kernel_size // 2)
    torch.testing.assert_close(convolution(x), expected)


@pytest.mark.parametrize("kernel_sizes", [(3,), (5, 3), (3, 3, 3)])
def test_the_probabilities_of_all_images_sum_to_one(kernel_sizes):
    p = small(kernel_sizes)(torch.randn(3, 1, 2, 2, 3).double(), 3)  # batch [3, 1]
    log_p = p.log_prob(all_images(2, 3))
    assert log_p.shape == (3, 64) and log_p.std() > 0.1
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(3).double(), rtol=1e-12, atol=0)


def test_draws_have_the_frequencies_that_log_prob_says():
    p, num = small((3, 3))(torch.randn(2, 2, 2, 3).double(), 3), 20_000
    assert p.batch_shape == (2,) and p.event_shape == (1, 2, 3)
    x = p.sample((num,))
    assert x.shape == (num, 2, 1, 2, 3) and not x.requires_grad
    expected = num * p.log_prob(all_images(2, 3)[:, None]).exp()  # [64, 2]
    index = (x.flatten(2) * 2.0 ** torch.arange(6)).sum(2).long()
    for row in range(2):
        counts, means = index[:, row].bincount(minlength=64), expected[:, row]
        often = means > 5
        rest = (means[~often].sum() - counts[~often].sum()).abs()
        chi_square, freedom = ((counts - means)[often].square() / means[often]).sum(), int(often.sum()) - 1
        assert chi_square < freedom + 5 * (2 * freedom) ** 0.5
        assert rest < 6 * means[~often].sum().sqrt() + 1


@pytest.mark.parametrize(("kernel_sizes", "size"), [((3,), (1, 1)), ((5, 3, 1), (6, 7)), ((9, 7, 3), (4, 9))])
def test_drawing_with_kept_inputs_is_drawing_with_the_whole_network(kernel_sizes, size):
    network, context = small(kernel_sizes), torch.randn(7, 2, *size).double()
    uniform = torch.rand(7, 1, *size).double()
    x = torch.zeros_like(uniform)
    for i in range(size[0]):
        for j in range(size[1]):
            x[:, :, i, j] = (uniform < network.logits(x, context).sigmoid()).double()[:, :, i, j]
    assert torch.equal(network.draw(context, uniform), x)


def test_draws_do_not_depend_on_how_many_are_made_at_a_time(monkeypatch):
    p = small()(torch.randn(2, 3, 2, 4, 4).double(), 3)
    torch.manual_seed(1)
    together = p.sample((2,))
    monkeypatch.setattr("ncpvae.pixelcnn.IMAGES_AT_ONCE", 5)
    torch.manual_seed(1)
    assert torch.equal(p.sample((2,)), together) and not torch.equal(p.sample((2,)), together)
    assert p.sample((0,)).shape == (0, 2, 3, 1, 4, 4)


def test_images_and_feature_maps_are_broadcast():
    network, x = small(), (torch.rand(5, 1, 4, 4) < 0.5).double()
    context = torch.randn(3, 5, 2, 4, 4).double()
    log_p = network(context, 3).log_prob(x)
    assert log_p.shape == (3, 5)
    one_by_one = [[network(c, 3).log_prob(row) for c, row in zip(part, x, strict=True)] for part in context]
    torch.testing.assert_close(log_p, torch.stack([torch.stack(part) for part in one_by_one]))


def test_without_gradients_many_rows_are_computed_in_parts(monkeypatch):
    network, x, context = small(), (torch.rand(5, 1, 4, 4) < 0.5).double(), torch.randn(3, 5, 2, 4, 4).double()
    together, passes = network.logits(x, context), []
    monkeypatch.setattr("ncpvae.pixelcnn.ROWS_AT_ONCE", {"cpu": 4})
    network.see_x.register_forward_hook(lambda module, inputs, output: passes.append(len(output)))
    with torch.no_grad():
        torch.testing.assert_close(network.logits(x, context), together.detach())
        assert network.logits(x[:0], context[:, :0]).shape == (3, 0, 1, 4, 4)
    assert passes == [4, 4, 4, 3, 0]


def pixel_vae(size=8, latent=2):
    encoder, decoder = ncpvae.MLPEncoder(size**2, [32], latent), ncpvae.MLPDecoder(latent, (), (2, size, size))
    return ncpvae.VAE(encoder, decoder, PixelCNNLikelihood(2, 8, (5, 3, 3)), ncpvae.Normal(latent))


def crosses(num):
    """Binary [num, 1, 8, 8]: a row and a column at random places; 64 images, an entropy of log 64 = 4.2 nats."""
    x, places = torch.zeros(num, 1, 8, 8), torch.randint(8, (2, num))
    x[torch.arange(num), 0, places[0]] = 1
    x[torch.arange(num), 0, :, places[1]] = 1
    return x


def test_a_vae_trains_with_it_and_is_loaded_as_it_was_saved(tmp_path):
    vae, losses = pixel_vae(), []
    optimizer = torch.optim.Adam(vae.parameters(), 1e-2)
    for _ in range(200):
        x = crosses(64)
        out = vae(x)
        loss = -ncpvae.objectives.elbo(x, *out).elbo.mean()
        optimizer.zero_grad()
        loss.backward()
        assert losses or all(p.grad.abs().max() > 0 for p in vae.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 40 and sum(losses[-20:]) / 20 < 8
    vae.eval().save_pretrained(tmp_path)
    loaded, z = ncpvae.VAE.from_pretrained(tmp_path), torch.randn(200, 2)
    assert torch.equal(vae.decode(z).log_prob(x[:1]), loaded.decode(z).log_prob(x[:1]))
    drawn = loaded.decode(z).sample()
    assert drawn.shape == (200, 1, 8, 8)
    columns, rows = ((drawn.mean(axis) == 1).sum((1, 2)) for axis in (2, 3))
    assert ((columns == 1) & (rows == 1)).float().mean() > 0.3  # measured 0.47 to 0.8, of 6 seeds


def test_the_importance_weighted_likelihood_takes_it():
    vae, x = pixel_vae(), crosses(6)
    log_priors = {"prior": vae.prior_distribution().log_prob}
    with torch.no_grad():  # the posterior is the prior, and the decoder sees no z: the bound is −log p(x), any z
        vae.decoder[0].weight.zero_()
        found = metrics.importance_weighted_nll(
            x, lambda x: vae.prior_distribution().expand((len(x),)), vae.decode, log_priors, 7, max_rows=10
        )
        exact = -vae.decode(torch.zeros(6, 2)).log_prob(x)
    torch.testing.assert_close(found["prior"].per_example, exact)


def test_under_autocast_log_likelihoods_stay_float32():
    network, x, context = PixelCNNLikelihood(2, 16, (5, 3)), crosses(4), torch.randn(4, 2, 8, 8)
    exact = network(context, 3).log_prob(x)
    with torch.autocast("cpu", torch.bfloat16):
        p = network(context.bfloat16(), 3)
        log_p, drawn = p.log_prob(x), p.sample()
    assert log_p.dtype == drawn.dtype == torch.float32
    torch.testing.assert_close(log_p, exact, rtol=5e-3, atol=0)
    assert network.bfloat16()(context.bfloat16(), 3).log_prob(x).dtype == torch.float32


X, CONTEXT = torch.zeros(2, 1, 4, 4), torch.zeros(2, 2, 4, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: p(CONTEXT, 1), ValueError, r"context must be feature maps.*\[..., 2, H, W\].*event dimensions 1"),
        (lambda p: p(CONTEXT[:, :1], 3), ValueError, r"\[..., 2, H, W\], got shape \(2, 1, 4, 4\)"),
        (lambda p: p(torch.zeros(2, 4), 3), ValueError, r"context must be .* got shape \(2, 4\)"),
        (
            lambda p: p(CONTEXT, 3).log_prob(X[..., 1:]),
            ValueError,
            r"images \(1, 4, 4\).* shape \(2, 1, 4, 3\)",
        ),
        (lambda p: p(CONTEXT, 3).log_prob(X[:1].expand(3, -1, -1, -1)), ValueError, r"the batch's, \(2,\), got \(3,\)"),
        (lambda p: p(CONTEXT, 3).log_prob(X + 0.5), ValueError, "0 or 1 in every pixel, got values from 0.5 to 0.5"),
        (lambda p: p(CONTEXT, 3).log_prob(X * torch.nan), ValueError, "got values from nan to nan"),
        (lambda p: p(CONTEXT, 3).mean, NotImplementedError, r"no closed form.*use sample\(\)"),
        (lambda p: PixelCNNLikelihood(0), ValueError, "must be ≥ 1, got 0, 32"),
        (lambda p: PixelCNNLikelihood(2, 4, (3, 4)), ValueError, r"kernel_sizes must be odd.*got \(3, 4\)"),
        (lambda p: PixelCNNLikelihood(2, 4, (1, 3)), ValueError, r"the first ≥ 3, got \(1, 3\)"),
        (lambda p: PixelCNNLikelihood(2, 4, ()), ValueError, r"at least one.*got \(\)"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(PixelCNNLikelihood(2, 4, (3, 3)))
