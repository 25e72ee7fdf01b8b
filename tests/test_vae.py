import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence

import ncpvae
from ncpvae import objectives


def tiny_vae(out_shape=(1, 8, 8), latent=3):
    torch.manual_seed(0)
    encoder = ncpvae.MLPEncoder(64, [16], latent)
    decoder = ncpvae.MLPDecoder(latent, [16], out_shape)
    return ncpvae.VAE(encoder, decoder, ncpvae.BernoulliLikelihood(), ncpvae.Normal(latent))


def test_forward_gives_every_part_its_shape():
    out = tiny_vae()(torch.rand(5, 1, 8, 8))
    assert out.z.shape == (5, 3)
    assert out.likelihood.batch_shape == out.posterior.batch_shape == (5,)
    assert out.likelihood.event_shape == (1, 8, 8)
    assert out.posterior.event_shape == out.prior.event_shape == (3,)


def test_decode_takes_any_leading_dimensions():
    vae = tiny_vae()
    z = torch.randn(4, 5, 3)
    many = vae.decode(z)
    assert many.batch_shape == (4, 5)
    torch.testing.assert_close(many.mean[2], vae.decode(z[2]).mean)


@pytest.mark.parametrize("scale", ["softplus", "exp", "tanh"])
def test_gaussian_encoder_has_positive_bounded_scale(scale):
    encoder = ncpvae.GaussianEncoder(nn.Identity(), scale=scale)
    std = encoder(torch.tensor([[0.0, 1e4], [0.0, -1e4]])).base_dist.scale
    assert (std > 0).all() and torch.isfinite(std).all()


def test_gaussian_encoder_centres_its_input():
    encoder = ncpvae.GaussianEncoder(nn.Identity(), input_mean=torch.tensor([1.0, 2.0]))
    assert encoder(torch.tensor([[3.0, 2.0]])).mean.item() == 2.0


def test_bad_scale_is_named():
    with pytest.raises(ValueError, match="GaussianEncoder: scale must be .*'sigmoid'"):
        ncpvae.GaussianEncoder(nn.Identity(), scale="sigmoid")


def test_convolutional_pair_of_the_rae_paper_maps_64_pixels_and_back():
    encoder = ncpvae.ConvEncoder((3, 64, 64), (8, 16, 32, 64), 64, scale="tanh")
    decoder = ncpvae.ConvDecoder(64, (64, 32, 16, 8), (3, 64, 64))
    x = torch.rand(2, 3, 64, 64)
    z = encoder(x).rsample()
    assert z.shape == (2, 64)
    assert decoder(z).shape == x.shape


def test_convolutional_decoder_refuses_sizes_it_cannot_reach():
    with pytest.raises(ValueError, match=r"ConvDecoder: out_shape's height and width must be multiples of 8"):
        ncpvae.ConvDecoder(4, (8, 8, 8, 8), (1, 28, 28))
    with pytest.raises(ValueError, match="kernel_size must be odd, got 4"):
        ncpvae.ConvDecoder(4, (8, 8), (1, 28, 28), kernel_size=4)


def test_elbo_uses_the_closed_form_kl_and_agrees_with_its_estimate():
    torch.manual_seed(0)
    posterior = Independent(Normal(torch.tensor([[0.3, -1.0]]), torch.tensor([[0.5, 0.8]])), 1)
    prior = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
    likelihood = Independent(Normal(torch.zeros(1, 4), 1.0), 1)
    x = torch.randn(1, 4)
    terms = objectives.elbo(x, likelihood, posterior, prior, posterior.sample())
    torch.testing.assert_close(terms.kl, kl_divergence(posterior, prior))
    torch.testing.assert_close(terms.elbo, likelihood.log_prob(x) - terms.kl)
    z = posterior.sample((100_000,))
    mixture = ncpvae.DiagonalMixture(torch.zeros(1), torch.zeros(1, 2), torch.ones(1, 2))  # no closed form is known
    many = [d.expand((len(z),)) for d in (likelihood, posterior)]
    estimate = objectives.elbo(x.expand(len(z), -1), *many, mixture, z[:, 0]).kl
    assert abs(estimate.mean() - terms.kl.item()) < 5 * estimate.std() / len(z) ** 0.5


def test_elbo_refuses_distributions_that_do_not_fit():
    x, z = torch.zeros(2, 2), torch.zeros(2, 2)
    one = Independent(Normal(torch.zeros(2, 2), 1.0), 1)
    prior = Independent(Normal(torch.zeros(2), 1.0), 1)
    with pytest.raises(ValueError, match="wrap distributions in torch.distributions.Independent"):
        objectives.elbo(x, one, Normal(torch.zeros(2, 2), 1.0), Normal(torch.zeros(2), 1.0), z)
    with pytest.raises(ValueError, match="posterior and prior must have one event shape"):
        objectives.elbo(x, one, one, Independent(Normal(torch.zeros(1), 1.0), 1), z)
    objectives.elbo(x, one, one, prior, z)


def test_kl_weight_scales_only_the_kl():
    vae = tiny_vae()
    x = torch.rand(5, 1, 8, 8).round()
    out = vae(x)
    one, half = objectives.elbo(x, *out), objectives.elbo(x, *out, kl_weight=0.5)
    torch.testing.assert_close(half.elbo - one.elbo, 0.5 * one.kl)


def test_vae_takes_a_plain_distribution_as_prior():
    vae = tiny_vae()
    plain = ncpvae.VAE(vae.encoder, vae.decoder, vae.likelihood, Independent(Normal(torch.zeros(3), torch.ones(3)), 1))
    assert plain(torch.rand(2, 1, 8, 8)).prior.event_shape == (3,)


LAYERS = ((32, 3, 1), (64, 4, 2), (128, 4, 2), (256, 3, 2), (512, 2, 1))


@pytest.mark.parametrize("size", [(1, 28, 28), (3, 32, 20)])
def test_stacked_convolutions_mirror_each_other(size):
    encoder, decoder = ncpvae.StackedConvEncoder(size, LAYERS, 4), ncpvae.StackedConvDecoder(4, LAYERS, size)
    x = torch.rand(2, *size)
    assert decoder(encoder(x).mean).shape == x.shape
    kernels = [m.weight.shape for m in encoder.network if isinstance(m, nn.Conv2d)]
    assert kernels == [m.weight.shape for m in decoder if isinstance(m, nn.ConvTranspose2d)][::-1]
    assert encoder.num_layers == 6


def test_stacked_convolutions_that_leave_nothing_are_named():
    with pytest.raises(ValueError, match=r"StackedConvEncoder: layers must leave something .* \(8, 2, 2\) as layer 2"):
        ncpvae.StackedConvEncoder((1, 4, 4), ((8, 2, 2), (8, 9, 2), (8, 2, 2), (8, 2, 2)), 2)


@pytest.mark.parametrize("scale", ["softplus", "exp", "tanh"])
@pytest.mark.parametrize("min_kl", [0.1, 3.0, 20.0])
def test_the_committed_rate_is_a_floor_under_the_kl(scale, min_kl):
    encoder = ncpvae.GaussianEncoder(nn.Identity(), scale=scale, min_kl=min_kl)
    raw = 6 * torch.randn(500, 8)
    raw[0] = torch.tensor([0.0] * 4 + [50.0] * 4)  # means at the prior's, σ as large as it gets
    prior = Independent(Normal(torch.zeros(4), torch.ones(4)), 1)
    kl = kl_divergence(encoder(raw), prior)
    assert kl.min() >= min_kl * (1 - 1e-4)
    assert kl[0] < 1.1 * min_kl + 0.05
    plain = ncpvae.GaussianEncoder(nn.Identity(), scale=scale)(raw)
    narrow = plain.stddev < 1e-3
    torch.testing.assert_close(encoder(raw).stddev[narrow], plain.stddev[narrow], rtol=0.6, atol=0)


def test_a_floor_that_is_none_is_refused():
    for min_kl in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"min_kl must be finite and ≥ 0"):
            ncpvae.GaussianEncoder(nn.Identity(), min_kl=min_kl)
    with pytest.raises(ValueError, match="min_kl must be ≤ 80 nats for each coordinate, got 100"):
        ncpvae.MLPEncoder(3, [], 2, min_kl=200.0)(torch.zeros(1, 3))


def test_a_convolutional_encoder_refuses_kernels_that_do_not_halve():
    with pytest.raises(ValueError, match="ConvEncoder: kernel_size must be odd, got 4"):
        ncpvae.ConvEncoder((1, 8, 8), (4,), 2, kernel_size=4)


def test_under_autocast_densities_keep_their_precision():
    vae = tiny_vae()
    with torch.autocast("cpu", torch.bfloat16):
        out = vae(torch.rand(5, 1, 8, 8).round())
    assert out.posterior.mean.dtype == out.z.dtype == out.likelihood.mean.dtype == torch.float32
