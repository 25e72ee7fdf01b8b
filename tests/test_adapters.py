import copy
import math
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Independent
from torch.distributions import Normal as TorchNormal

from ncpvae import (
    SIR,
    VAE,
    MLPClassifier,
    MLPDecoder,
    MLPEncoder,
    NoiseContrastivePrior,
    Normal,
    NormalLikelihood,
    ResidualClassifier,
    fit_ncp,
)
from ncpvae.adapters import (
    AdaptedVAE,
    PointMass,
    StandardizedClassifier,
    codes,
    from_callables,
    from_diffusers,
    from_pythae,
    prior_for_codes,
)
from ncpvae.distributions import BernoulliLikelihood, diagonal_normal
from ncpvae.metrics import importance_weighted_nll

DOWN, UP = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2


def diffusers_model(kind: str, **config) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    blocks = {"in_channels": 1, "out_channels": 1, "down_block_types": DOWN, "up_block_types": UP}
    blocks |= {"norm_num_groups": 4, "sample_size": 16}
    stages = {f"{part}_{what}": value for part in ("encoder", "decoder") for what, value in (
        ("block_out_channels", (8, 8)), ("layers_per_block", (1, 1)), ("qkv_multiscales", ((), ())),
    )}  # fmt: skip
    defaults = {
        "AutoencoderKL": {**blocks, "block_out_channels": (8, 8)},
        "AsymmetricAutoencoderKL": {**blocks, "down_block_out_channels": (8, 8), "up_block_out_channels": (8, 8)},
        "VQModel": {**blocks, "block_out_channels": (8, 8), "scaling_factor": 0.5},
        "AutoencoderDC": {"in_channels": 1, "latent_channels": 4, "attention_head_dim": 8, **stages},
        "AutoencoderTiny": {
            **{"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "in_channels": 1},
            **{"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1), "out_channels": 1},
        },
    }[kind]
    return getattr(diffusers, kind)(**{**defaults, **config}).eval()


def pythae_model(kind: str, **config) -> nn.Module:
    models = pytest.importorskip("pythae.models")
    names = (f"{kind}Config", f"{kind}_Config")
    make = next(getattr(models, name) for name in names if hasattr(models, name))
    return getattr(models, kind)(make(input_dim=(1, 4, 4), latent_dim=3, **config)).eval()


@torch.no_grad()
def test_autoencoder_kl_has_diffusers_posterior_in_the_scale_of_its_pipelines():
    model = diffusers_model("AutoencoderKL", scaling_factor=0.3, shift_factor=0.2)
    vae, x = from_diffusers(model), torch.rand(5, 1, 16, 16) * 2 - 1
    theirs, ours = model.encode(x).latent_dist, vae.encode(x)
    assert vae.latent_shape == (4, 8, 8) == ours.event_shape and vae.name == "AutoencoderKL"
    torch.testing.assert_close(ours.mean, (theirs.mean - 0.2) * 0.3)
    torch.testing.assert_close(ours.stddev, theirs.std * 0.3)
    z = ours.sample()
    torch.testing.assert_close(vae.decode(z).mean, model.decode(z / 0.3 + 0.2).sample)
    torch.testing.assert_close(vae.decode(ours.mean).mean, model.decode(theirs.mean).sample, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_autoencoder_kl_with_channel_statistics():
    mean, std = (0.5, -0.5, 1.0, 0.0), (2.0, 0.5, 1.0, 3.0)
    model = diffusers_model("AutoencoderKL", scaling_factor=0.5, latents_mean=mean, latents_std=std)
    vae, x = from_diffusers(model), torch.rand(3, 1, 16, 16)
    theirs = model.encode(x).latent_dist
    mean, std = (torch.tensor(v)[:, None, None] for v in (mean, std))
    torch.testing.assert_close(vae.encode(x).mean, (theirs.mean - mean) * 0.5 / std)
    torch.testing.assert_close(vae.encode(x).stddev, theirs.std * 0.5 / std)
    z = torch.randn(3, 4, 8, 8)
    torch.testing.assert_close(vae.decode(z).mean, model.decode(z * std / 0.5 + mean).sample)


@pytest.mark.parametrize("kind", ["AutoencoderDC", "AutoencoderTiny", "VQModel", "AsymmetricAutoencoderKL"])
@torch.no_grad()
def test_other_diffusers_autoencoders(kind):
    model = diffusers_model(kind, scaling_factor=0.5)
    vae, x = from_diffusers(model, (16, 24)), torch.rand(3, 1, 16, 24)
    latent, gaussian = model.encode(x, return_dict=False)[0], kind == "AsymmetricAutoencoderKL"
    latent = latent.mode() if gaussian else latent
    q = vae.encode(x)
    torch.testing.assert_close(q.mean, latent * 0.5)
    assert q.event_shape == vae.latent_shape == latent.shape[1:]
    assert isinstance(q, PointMass) != gaussian
    torch.testing.assert_close(vae.decode(q.mean).mean, model.decode(latent).sample, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_half_precision_models_give_float32_codes_and_images():
    model = diffusers_model("AutoencoderKL", scaling_factor=0.5)
    vae = from_diffusers(copy.deepcopy(model).to(torch.bfloat16))
    x = torch.rand(2, 1, 16, 16)
    q = vae.encode(x)
    assert q.mean.dtype == torch.float32 == vae.decode(q.mean).mean.dtype
    torch.testing.assert_close(q.mean, from_diffusers(model).encode(x).mean, atol=0.1, rtol=0.1)


def test_a_copy_of_an_adapted_vae_is_a_copy():
    vae = from_diffusers(diffusers_model("AutoencoderKL"))
    other, x = copy.deepcopy(vae), torch.rand(2, 1, 16, 16)
    before = other.encode(x).mean
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.zero_()
    assert torch.equal(other.encode(x).mean, before) and not torch.equal(vae.encode(x).mean, before)


@pytest.mark.parametrize("base", ["channel", "coordinate"])
def test_a_prior_for_autoencoder_kl_end_to_end(base):
    vae = from_diffusers(diffusers_model("AutoencoderKL"))
    images = torch.randint(0, 256, (64, 1, 16, 16), dtype=torch.uint8)
    prior = prior_for_codes(codes(vae, images), base, ResidualClassifier(4, channels=8, blocks=1))
    result = fit_ncp(
        prior, vae=vae, data=images, transform=vae.prepare, steps=3, batch_size=16, validate_every=3, progress=False
    )
    assert math.isfinite(result.loss) and result.trustworthy
    pictures = vae.images(prior.sample((5,), SIR(50)))
    assert pictures.shape == (5, 1, 16, 16) and 0 <= pictures.min() <= pictures.max() <= 1


def test_refitting_the_base_is_what_makes_scaled_latents_learnable():
    """Codes in diffusers' default scale: N(0, I) separates from them at once, the Gaussian fitted to them does not."""
    z = 0.18 * torch.randn(1000, 4, 4, 4)

    def classifier():
        return ResidualClassifier(4, channels=8, blocks=1)

    standard = NoiseContrastivePrior(Normal((4, 4, 4)), StandardizedClassifier(classifier(), z.mean(), z.std()))
    options = {"steps": 40, "batch_size": 64, "lr": 1e-2, "progress": False}
    with pytest.warns(RuntimeWarning, match="too easily"):
        far = fit_ncp(standard, z, **options)
    near = fit_ncp(prior_for_codes(z, classifier=classifier()), z, **options)
    assert far.jsd > 0.65 and near.jsd < 0.05 and near.trustworthy and not far.trustworthy


@pytest.mark.parametrize("kind", ["VAE", "BetaVAE", "INFOVAE_MMD", "VAMP"])
@torch.no_grad()
def test_pythae_vaes_have_the_posterior_of_their_encoder(kind):
    model = pythae_model(kind)
    vae, x = from_pythae(model), torch.rand(6, 1, 4, 4)
    output, q = model.encoder(x), vae.encode(x)
    assert vae.latent_shape == (3,) and vae.name == kind
    torch.testing.assert_close(q.mean, output.embedding)
    torch.testing.assert_close(q.variance, output.log_covariance.exp())
    torch.testing.assert_close(vae.decode(q.mean).mean, model.decoder(output.embedding)["reconstruction"])


@pytest.mark.parametrize("loss", ["mse", "bce"])
@torch.no_grad()
def test_pythae_likelihood_is_that_of_its_loss(loss):
    model = pythae_model("VAE", reconstruction_loss=loss)
    vae, x, z = from_pythae(model), (torch.rand(6, 1, 4, 4) < 0.5).float(), torch.randn(6, 3)
    recon_x = model.decoder(z)["reconstruction"]
    _, expected, _ = model.loss_function(recon_x, x, z, z, z)
    constant = 8 * math.log(2 * math.pi) if loss == "mse" else 0.0
    assert -vae.decode(z).log_prob(x).mean() == pytest.approx(expected.item() + constant, rel=1e-4)


@pytest.mark.parametrize("kind", ["AE", "RAE_L2", "RAE_GP", "WAE_MMD"])
def test_pythae_deterministic_models_end_to_end(kind):
    model = pythae_model(kind)
    vae, x = from_pythae(model), torch.rand(40, 1, 4, 4)
    with torch.no_grad():
        assert torch.equal(vae.encode(x).sample(), model.encoder(x).embedding)
    prior = prior_for_codes(codes(vae, x), classifier=MLPClassifier(3, (8,)))
    fit_ncp(prior, vae=vae, data=x, steps=2, batch_size=8, validate_every=2, progress=False)
    assert vae.images(prior.sample((2,), SIR(10))).shape == (2, 1, 4, 4)
    log_priors = {"base": prior.base_distribution().log_prob}
    with_likelihood = from_pythae(model, likelihood=NormalLikelihood(0.1))
    with pytest.raises(NotImplementedError, match=f"{kind}'s encoder is deterministic"):
        importance_weighted_nll(x, with_likelihood.encode, with_likelihood.decode, log_priors, num_samples=2)


def test_pythae_adversarial_autoencoder_may_be_deterministic():
    noisy, exact = (pythae_model("Adversarial_AE", deterministic_posterior=d) for d in (False, True))
    x = torch.rand(2, 1, 4, 4)
    assert not isinstance(from_pythae(noisy).encode(x), PointMass)
    assert isinstance(from_pythae(exact).encode(x), PointMass)


def test_likelihood_of_an_adapted_vae_is_that_of_the_vae_itself():
    vae = VAE(MLPEncoder(4, (8,), 2), MLPDecoder(2, (8,), (4,)), BernoulliLikelihood(), Normal(2))
    x = (torch.rand(20, 4) < 0.5).float()
    direct = from_callables(vae.encode, vae.decode, 2)
    by_likelihood = from_callables(vae.encode, vae.decoder, 2, likelihood=BernoulliLikelihood())
    values = [
        importance_weighted_nll(x, v.encode, v.decode, {"base": vae.prior_distribution().log_prob}, 30)["base"].nll
        for v in (vae, direct, by_likelihood)
    ]
    assert values[1] == pytest.approx(values[0], rel=1e-5) and values[2] == pytest.approx(values[0], rel=1e-5)


def test_callables_may_be_modules_functions_and_distributions_of_coordinates():
    network = nn.Linear(4, 2)
    vae = from_callables(network, lambda z: TorchNormal(torch.cat([z, -z], 1), 0.5), 2, name="mine")
    assert [id(p) for p in vae.parameters()] == [id(p) for p in network.parameters()]
    z = torch.randn(3, 5, 2)
    p = vae.decode(z)
    assert p.batch_shape == (3, 5) and p.event_shape == (4,)
    mean = torch.cat([z, -z], -1)
    torch.testing.assert_close(p.mean, mean)
    torch.testing.assert_close(p.variance, torch.full((3, 5, 4), 0.25))
    x = torch.randn(5, 4)
    expected = diagonal_normal(mean, torch.full_like(mean, 0.5)).log_prob(x)
    torch.testing.assert_close(p.log_prob(x), expected)
    torch.testing.assert_close(p.log_prob(torch.stack([x.expand(3, 5, 4)] * 2)), torch.stack([expected] * 2))
    assert p.sample((7,)).shape == (7, 3, 5, 4)
    torch.testing.assert_close(p.sample((4000,)).mean(0), mean, atol=0.05, rtol=0)


def test_one_code_without_batch_is_decoded_too():
    vae = from_callables(lambda x: x, lambda z: z, 2)
    z = torch.randn(2)
    assert torch.equal(vae.decode(z).mean, z)


def test_point_mass_has_moments_and_draws_but_no_density():
    value = torch.randn(3, 2)
    point = PointMass(value, 1)
    assert (point.batch_shape, point.event_shape) == ((3,), (2,))
    assert torch.equal(point.sample((4,)), value.expand(4, 3, 2)) and torch.equal(point.variance, torch.zeros(3, 2))
    with pytest.raises(NotImplementedError, match="a point mass has no density"):
        point.log_prob(value)


def test_bytes_are_prepared_to_the_range_and_images_come_back():
    x = torch.arange(256, dtype=torch.uint8).view(16, 16)
    vae = from_callables(lambda x: x, lambda z: z, 16, value_range=(-1.0, 1.0))
    prepared = vae.prepare(x)
    assert (prepared.min(), prepared.max()) == (-1, 1) and vae.prepare(prepared) is prepared
    torch.testing.assert_close(vae.images(prepared, batch_size=5), x / 255)


def test_codes_come_in_order_in_chunks_and_by_the_seed():
    def encode(x):
        assert not torch.is_grad_enabled()
        return Independent(TorchNormal(x, 0.1), 1)

    x = torch.arange(20.0).view(10, 2)
    before = torch.get_rng_state()
    z = codes(encode, x, batch_size=3)
    assert z.shape == (10, 2) and (z - x).abs().max() < 1
    assert torch.equal(z, codes(encode, x, batch_size=3)) and not torch.equal(z, codes(encode, x, batch_size=3, seed=1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(codes(encode, list(x.split(3))), z)
    assert torch.equal(codes(lambda x: x, x.byte()), x)  # float32 by default
    assert torch.equal(codes(lambda x: x, x, transform=lambda x: -x), -x)


def test_codes_of_a_module_are_drawn_in_eval_mode():
    network = nn.Sequential(nn.Dropout(0.5), nn.Identity()).train()
    assert torch.equal(codes(network, torch.ones(50, 2)), torch.ones(50, 2))


def test_padded_feature_maps_are_classified_whatever_their_size():
    z = torch.randn(8, 3, 7, 5) * 0.2 + 4
    prior = prior_for_codes(z, classifier=ResidualClassifier(3, channels=8, blocks=1))
    assert prior.sample((2,), SIR(20)).shape == (2, 3, 7, 5)
    inner = torch.nn.functional.pad((z - prior.classifier.mean) / prior.classifier.std, (0, 3, 0, 1))
    torch.testing.assert_close(prior.log_ratio(z), prior.classifier.classifier(inner))
    assert prior.log_ratio(z[None].expand(2, -1, -1, -1, -1)).shape == (2, 8)


def test_default_classifiers_and_bases():
    vectors, maps = torch.randn(50, 5), torch.randn(50, 3, 4, 4)
    assert isinstance(prior_for_codes(vectors).classifier.classifier, MLPClassifier)
    assert isinstance(prior_for_codes(maps).classifier.classifier, ResidualClassifier)
    torch.testing.assert_close(prior_for_codes(maps).base.mean, maps.mean((0, 2, 3))[:, None, None].expand(3, 4, 4))
    torch.testing.assert_close(prior_for_codes(maps, "coordinate").base.mean, maps.mean(0))
    mine = Normal((3, 4, 4))
    assert prior_for_codes(maps, mine).base is mine


def test_standardizing_makes_the_classifier_blind_to_the_scale_of_codes():
    z = torch.randn(100, 2) * torch.tensor([3.0, 0.01]) + 5
    torch.manual_seed(1)
    prior = prior_for_codes(z)
    torch.manual_seed(1)
    scaled = prior_for_codes(1000 * z - 7)
    torch.testing.assert_close(prior.log_ratio(z), scaled.log_ratio(1000 * z - 7), atol=1e-3, rtol=1e-3)


def identity() -> AdaptedVAE:
    return from_callables(lambda x: x, lambda z: z, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: from_callables(3, len, 2), TypeError, "from_callables: encode must be callable, got int"),
        (lambda: from_callables(len, None, 2), TypeError, "from_callables: decode must be callable, got NoneType"),
        (lambda: from_callables(len, len, ()), ValueError, "latent_shape must be one or more positive integers"),
        (lambda: from_callables(len, len, (2, 0)), ValueError, r"positive integers, got \(2, 0\)"),
        (lambda: from_callables(len, len, 2, likelihood=0.1), TypeError, "likelihood must be callable"),
        (lambda: from_callables(len, len, 2, value_range=(1, 0)), ValueError, "low < high"),
        (lambda: identity().encode(torch.zeros(3, 2, dtype=torch.uint8)), TypeError, r"uint8; prepare\(x\) converts"),
        (lambda: identity().encode([1.0]), TypeError, "x must be a floating-point tensor .* got list"),
        (lambda: identity().encode(torch.zeros(3, 5)), ValueError, r"shape latent_shape \(2,\), got \(5,\)"),
        (lambda: identity().decode(torch.zeros(3, 5)), ValueError, r"z must be \[..., 2\], got shape \(3, 5\)"),
        (lambda: identity().prepare(torch.zeros(3, dtype=torch.int64)), TypeError, "uint8 or floating point, got"),
        (
            lambda: from_callables(lambda x: x[:1], len, 2).encode(torch.zeros(3, 2)),
            ValueError,
            r"one result for each of 3 inputs, got batch \(1,\)",
        ),
        (
            lambda: from_callables(lambda x: (x, x), len, 2).encode(torch.zeros(3, 2)),
            TypeError,
            "must return a Distribution or a tensor, got tuple",
        ),
        (
            lambda: identity().decode(torch.zeros(1, 2)).log_prob(torch.zeros(1, 2)),
            NotImplementedError,
            "VAE's decoder has no likelihood; give one",
        ),
        (lambda: codes(3, torch.zeros(3, 2)), TypeError, "codes: vae must be a function"),
        (lambda: codes(lambda x: x, 5), TypeError, "codes: data must be a tensor .* got int"),
        (lambda: codes(lambda x: x, [[1.0]]), ValueError, "codes: data must be .* got list"),
        (lambda: codes(lambda x: x, torch.zeros(3)), ValueError, r"got shape \(3,\)"),
        (lambda: codes(lambda x: x, torch.zeros(0, 2)), ValueError, "one example at least"),
        (lambda: codes(lambda x: x, torch.zeros(3, 2), batch_size=0), ValueError, "batch_size must be an integer ≥ 1"),
        (lambda: codes(lambda x: x[:1], torch.zeros(3, 2)), ValueError, "one code for each of 3 examples"),
        (lambda: prior_for_codes(torch.randn(9, 2), "pixel"), ValueError, "per must be 'coordinate' or 'channel'"),
        (lambda: prior_for_codes(torch.randn(9, 2), 3), TypeError, "base must be a Distribution or a module, got int"),
        (lambda: prior_for_codes(torch.randn(9, 2, 2)), ValueError, "where no classifier is given"),
        (lambda: prior_for_codes(torch.randn(9, 2), classifier=len), TypeError, "classifier must be a module"),
        (
            lambda: StandardizedClassifier(MLPClassifier(2), torch.zeros(2), torch.zeros(2)),
            ValueError,
            "std finite and > 0",
        ),
        (
            lambda: StandardizedClassifier(MLPClassifier(2), torch.zeros(2), torch.ones(2), 0),
            ValueError,
            "multiple must be an integer ≥ 1, got 0",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"scaling_factor": 0.0}, {}, "config.scaling_factor must be > 0, got 0"),
        ({}, {"image_size": 17}, "image_size must be multiples of 2, got 17×17"),
        (
            {"shift_factor": 1.0, "latents_mean": (0.0,) * 4, "latents_std": (1.0,) * 4},
            {},
            "shift_factor or latents_mean, got both",
        ),
    ],
)
def test_diffusers_configs_that_do_not_fit_are_named(config, options, message):
    with pytest.raises(ValueError, match=message):
        from_diffusers(diffusers_model("AutoencoderKL", **config), **options)


def test_diffusers_bad_input_is_named():
    diffusers = pytest.importorskip("diffusers")
    with pytest.raises(TypeError, match="one of diffusers' AutoencoderKL, .* got Linear; from_callables"):
        from_diffusers(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="got AutoencoderOobleck"):
        from_diffusers(diffusers.AutoencoderOobleck(8, [2], [1], 4, 4, 1))
    with pytest.raises(ValueError, match="image_size must be given"):
        from_diffusers(diffusers_model("AutoencoderDC"))
    vae = from_diffusers(diffusers_model("AutoencoderKL"))
    with pytest.raises(ValueError, match=r"AutoencoderKL.encode: x must be \[B, 1, H, W\], got \(2, 3, 16, 16\)"):
        vae.encode(torch.zeros(2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"latent_shape \(4, 8, 8\), got \(4, 16, 16\) for x of shape"):
        vae.encode(torch.zeros(2, 1, 32, 32))


@pytest.mark.parametrize("kind", ["HVAE", "VAE_IAF", "VAE_LinNF", "SVAE", "PoincareVAE", "VQVAE"])
def test_pythae_models_with_another_posterior_are_refused_by_name(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = pythae_model(kind)
    with pytest.raises(TypeError, match=f"Gaussian or deterministic encoder, got {kind}; from_callables"):
        from_pythae(model)


def test_pythae_bad_input_is_named():
    pytest.importorskip("pythae")
    with pytest.raises(TypeError, match="got Linear"):
        from_pythae(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="one result for each of 3 inputs"):  # pythae's encoder would mix the images
        from_pythae(pythae_model("VAE")).encode(torch.zeros(3, 2, 4, 4))


@pytest.mark.parametrize(("make", "package"), [(from_diffusers, "diffusers"), (from_pythae, "pythae")])
def test_missing_packages_are_named_with_what_to_install(make, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"pip install 'ncpvae\[{package}\]'"):
        make(nn.Linear(2, 2))


def test_bernoulli_values_of_other_distributions_pass_through():
    vae = from_callables(lambda x: x, lambda z: Bernoulli(logits=z), 2)
    assert torch.equal(vae.decode(torch.zeros(3, 2)).log_prob(torch.ones(3, 2)), torch.full((3,), 2 * math.log(0.5)))
