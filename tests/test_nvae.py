import copy
import math
from functools import partial

import pytest
import torch
from processes import run_processes
from torch import nn
from torch.distributions import Normal, TransformedDistribution

import ncpvae
from ncpvae.distributions import LogisticMixtureLikelihood, PixelNormalLikelihood, SoftClampedNormal, diagonal_normal
from ncpvae.hierarchy import (
    Ancestral,
    Given,
    Group,
    HierarchicalLoss,
    HierarchicalVAE,
    KLWarmup,
    Posterior,
    balance_kl,
    group_sizes,
    infer,
    readjust_batch_norm,
)
from ncpvae.nn import BatchNorm, BottomUpCell, Cells, SpectralNorms, TopDownCell, WeightNormConv2d, batch_norm_scales
from ncpvae.nvae import NVAE, AutoregressiveFlow, AutoregressiveShift, adaptive_groups
from ncpvae.train import Execution, WarmupCosine
from ncpvae.train.engine import train

SMALL = {
    "channels": 4,
    "groups_per_scale": (2, 1),
    "latent_channels": 2,
    "halvings": 1,
    "preprocess_cells": 1,
    "postprocess_cells": 1,
    "encoder_cells": 1,
    "decoder_cells": 1,
}


def small(shape=(1, 8, 8), likelihood=None, **changes):
    torch.manual_seed(0)
    return NVAE(shape, likelihood, **{**SMALL, **changes})


def ready(model, shape=(1, 8, 8)):
    """The model in evaluation mode, BatchNorm having seen some images."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(16, *shape).round())
    return model.eval()


# --- the model --------------------------------------------------------------------------------------------------


def test_it_has_the_protocol_and_the_shapes_of_the_paper_from_the_top():
    model = small()
    assert isinstance(model, HierarchicalVAE)
    assert model.groups == (Group((2, 2, 2), None, 1), Group((2, 2, 2), (16, 2, 2), 1), Group((2, 4, 4), (8, 4, 4), 2))
    seen = []

    def select(k, base, context):
        seen.append(
            (k, tuple(base.batch_shape), tuple(base.event_shape), context if context is None else context.shape)
        )
        return base.sample()

    likelihood = model.walk(select, 5)
    assert likelihood.batch_shape == (5,) and likelihood.event_shape == (1, 8, 8)
    contexts = [g.context_shape and torch.Size((5, *g.context_shape)) for g in model.groups]
    assert seen == [(k, (5,), g.shape, c) for k, (g, c) in enumerate(zip(model.groups, contexts, strict=True))]


@pytest.mark.parametrize(
    ("scales", "groups", "minimum", "expected"),
    [
        (2, 10, 1, (5, 10)),
        (3, 20, 1, (5, 10, 20)),
        (5, 16, 4, (4, 4, 4, 8, 16)),
        (1, 30, 1, (30,)),
        (3, 1, 1, (1, 1, 1)),
    ],
)
def test_adaptive_groups_are_those_of_the_published_configurations(scales, groups, minimum, expected):
    assert adaptive_groups(scales, groups, minimum) == expected


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 7), (2, 1, 5)])
def test_images_of_odd_sizes_are_padded_and_come_back(shape):
    model = small(shape)
    likelihood, path = model(torch.rand(3, *shape).round())
    assert likelihood.event_shape == shape and path.kl().shape == (3, 3)
    left, right, top, bottom = model.padding
    assert 0 <= right - left <= 1 and 0 <= bottom - top <= 1
    assert (shape[1] + top + bottom, shape[2] + left + right) == tuple(2 * n for n in model.groups[-1].shape[1:])


@pytest.mark.parametrize(
    "changes",
    [
        {"groups_per_scale": (1,)},
        {"groups_per_scale": (1,), "halvings": 0, "channels": 1, "latent_channels": 1},
        {"encoder_cells": 0, "decoder_cells": 0, "residual": False},
        {"latent_channels": 1, "flows": 2},
        {"groups_per_scale": (1, 1, 2)},
    ],
)
def test_the_smallest_and_unusual_configurations_can_be_trained(changes):
    model = small(**changes)
    terms = HierarchicalLoss(model, regularization=1e-2)(torch.rand(4, 1, 8, 8).round(), 0.5)
    terms["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small(channels=3), "NVAE: channels must be even for 2 factorised reductions, got 3"),
        (lambda: small(shape=(1, 0, 8)), "NVAE: shape must be (C, H, W)"),
        (lambda: small(groups_per_scale=(2, 0)), "NVAE: groups_per_scale must be a number ≥ 1 for each scale"),
        (lambda: small(flows=-1), "NVAE: flows must be an integer ≥ 0, got -1"),
        (lambda: small(latent_channels=0), "NVAE: latent_channels must be an integer ≥ 1, got 0"),
        (lambda: small().encode(torch.rand(2, 1, 8, 9)), "NVAE: x must be [B, 1, 8, 8], got shape (2, 1, 8, 9)"),
        (lambda: adaptive_groups(0, 3), "adaptive_groups: scales, groups and minimum must be ≥ 1, got 0, 3, 1"),
        (
            lambda: small().walk(Given([torch.zeros(2, 2, 2, 2), torch.zeros(2, 2, 4, 4)]), 2),
            "NVAE: z of group 2 of 3 (scale 1 of 2) must be [2, 2, 2, 2], got shape (2, 2, 4, 4)",
        ),
        (lambda: small().walk(Given([torch.zeros(2, 2, 2, 2)]), 2), "Given: z must have a tensor for every group"),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


def test_a_likelihood_that_does_not_say_its_channels_is_refused():
    with pytest.raises(TypeError, match="likelihood must have a method parameter_channels, got ReLU"):
        small(likelihood=nn.ReLU())


@pytest.mark.parametrize("likelihood", [LogisticMixtureLikelihood(3, bits=5), PixelNormalLikelihood(), None])
def test_every_decoder_gives_one_number_per_image_and_draws_images(likelihood):
    model = ready(small((3, 8, 8), likelihood), (3, 8, 8))
    out, _ = model(torch.rand(4, 3, 8, 8).round())
    assert out.log_prob(torch.rand(4, 3, 8, 8).round()).shape == (4,)
    assert out.mean.shape == out.sample().shape == (4, 3, 8, 8)


# --- the walk ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flows", [0, 1])
def test_the_posteriors_draws_given_back_have_the_same_image_distribution(flows):
    model = ready(small(flows=flows))
    x = torch.rand(6, 1, 8, 8).round()
    likelihood, path = infer(model, x)
    again = model.walk(Given(path.z), 6)
    torch.testing.assert_close(again.mean, likelihood.mean, rtol=0, atol=0)


def test_ancestral_draws_given_back_are_the_same_walk():
    model, drawn = ready(small()), []

    def select(k, base, context):
        drawn.append(Ancestral(0.7)(k, base, context))
        return drawn[-1]

    first = model.walk(select, 4)
    torch.testing.assert_close(model.walk(Given(drawn), 4).mean, first.mean, rtol=0, atol=0)


def test_upper_groups_given_and_the_others_drawn():
    model = ready(small())
    top = [torch.randn(5, 2, 2, 2)]
    path = Posterior(model, model.encode(torch.rand(5, 1, 8, 8)))
    mixed = model.walk(Given(top, otherwise=lambda k, base, context: path(k, base, context)), 5)
    torch.testing.assert_close(model.walk(Given([*top, *path.z]), 5).mean, mixed.mean, rtol=0, atol=0)


def test_temperature_scales_the_bases_deviation_and_nothing_else():
    model = ready(small())
    bases = []
    torch.manual_seed(1)
    model.walk(lambda k, base, context: bases.append(base) or base.mean, 3)
    for k, base in enumerate(bases):
        draws = []
        for temperature in (1.0, 0.5):
            torch.manual_seed(2)
            draws.append(Ancestral(temperature)(k, base, None))
        torch.testing.assert_close(draws[1] - base.mean, 0.5 * (draws[0] - base.mean))


def test_the_recorded_densities_are_those_of_the_distributions():
    model = ready(small())
    x = torch.rand(5, 1, 8, 8).round()
    _, path = infer(model, x)
    assert path.log_prior().shape == path.log_posterior().shape == path.kl().shape == (5, 3)
    standard = Normal(0.0, 1.0).log_prob(path.z[0]).sum((1, 2, 3))
    torch.testing.assert_close(path.log_prior()[:, 0], standard)
    torch.testing.assert_close(path.log_posterior()[:, 2], path.posteriors[2].log_prob(path.z[2]))


def test_without_residuals_the_posterior_does_not_lean_on_the_base():
    x, means = torch.rand(4, 1, 8, 8), {}
    for residual in (True, False):
        model = ready(small(residual=residual))
        encoded = model.encode(x)
        context = torch.zeros(4, 16, 2, 2)
        raw = torch.randn(2, 4, 2, 2, 2)
        bases = [SoftClampedNormal(raw[0], raw[1], 3), SoftClampedNormal(raw[0] + 1, raw[1], 3)]
        means[residual] = [model.posterior(1, base, context, encoded).raw_mean for base in bases]
    torch.testing.assert_close(means[True][1], means[True][0] + 1)
    torch.testing.assert_close(means[False][1], means[False][0])


# --- flows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mirror", [False, True])
def test_the_shift_is_strictly_triangular_in_its_order(mirror):
    shift = AutoregressiveShift(3, mirror).double()
    z = torch.randn(1, 3, 3, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(shift, z).view(36, 36)
    order = torch.arange(36).view(3, 3, 4).permute(1, 2, 0).flatten()  # pixel by pixel, channel by channel
    order = order.flip(0) if mirror else order
    jacobian = jacobian[order][:, order]
    assert torch.equal(jacobian.triu(), torch.zeros_like(jacobian))
    assert (jacobian.tril(-1) != 0).any(1)[1:].all(), "every element depends on one before it"
    assert (jacobian[1, 0], jacobian[2, 1]) != (0.0, 0.0), "a channel depends on the channel before it"


def test_a_flowed_posterior_has_the_density_of_its_draws_and_its_inverse():
    flows = [AutoregressiveFlow(AutoregressiveShift(2, mirror).double()) for mirror in (False, True)]
    base = SoftClampedNormal(torch.randn(4, 2, 3, 3).double(), torch.randn(4, 2, 3, 3).double(), 3)
    flowed = TransformedDistribution(base, flows)
    with torch.no_grad():
        z = flowed.rsample()
        cached = flowed.log_prob(z)
        inverted = TransformedDistribution(base, [AutoregressiveFlow(f.shift) for f in flows]).log_prob(z.clone())
    torch.testing.assert_close(inverted, cached)
    jacobian = torch.autograd.functional.jacobian(lambda z: flows[1](flows[0](z)), z[:1]).view(18, 18)
    assert abs(torch.linalg.det(jacobian).item() - 1) < 1e-9


def test_with_flows_the_kl_is_the_draws_estimate():
    model = ready(small(flows=1))
    _, path = infer(model, torch.rand(3, 1, 8, 8).round())
    torch.testing.assert_close(path.kl(), path.log_posterior() - path.log_prior())
    ratio = path.posteriors[1].log_prob(path.z[1].clone()) - path.log_posterior()[:, 1]
    assert ratio.abs().max() < 1e-3


# --- cells ------------------------------------------------------------------------------------------------------


def test_weight_norm_sets_the_norm_of_every_kernel():
    convolution = WeightNormConv2d(3, 5, 3)
    expected = nn.Conv2d(3, 5, 3, padding=1)
    expected.load_state_dict({"weight": convolution.effective_weight().detach(), "bias": convolution.bias.detach()})
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(convolution(x), expected(x))
    with torch.no_grad():
        convolution.log_scale.copy_(torch.arange(5.0).view(5, 1, 1, 1))
        convolution.weight.mul_(7)
    norms = convolution.effective_weight().flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.arange(5.0).exp(), rtol=1e-4, atol=0)


def test_cells_halve_and_double():
    x = torch.randn(2, 8, 4, 6)
    assert BottomUpCell(8, down=True)(x).shape == (2, 16, 2, 3)
    assert TopDownCell(8, 6, up=True)(x).shape == (2, 4, 8, 12)
    assert BottomUpCell(8)(x).shape == TopDownCell(8, 3)(x).shape == x.shape


def test_recomputed_activations_give_the_same_gradients_and_statistics():
    x = torch.rand(6, 1, 8, 8).round()
    plain, saving = small(), small()
    saving.recompute = True
    assert saving.recompute and not plain.recompute
    inside = [0, 0]
    for i, model in enumerate((plain, saving)):
        model.levels[1].cells[0].register_forward_pre_hook(lambda *_, i=i: inside.__setitem__(i, inside[i] + 1))
        torch.manual_seed(3)
        HierarchicalLoss(model)(x)["loss"].backward()
    assert inside == [1, 2], "the cell was to be computed twice"
    for p, q in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    for (name, p), q in zip(plain.named_buffers(), saving.buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


def test_batch_norm_is_torchs_where_there_is_one_process():
    x = torch.randn(5, 3, 4, 4)
    ours, theirs = BatchNorm(3), nn.BatchNorm2d(3, momentum=0.05)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(nn.SyncBatchNorm.forward(ours, x), theirs(x), msg="what it does on a GPU")
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


# --- regularisation ---------------------------------------------------------------------------------------------


def test_spectral_norms_are_those_of_svd_also_while_weights_move():
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3), WeightNormConv2d(6, 6, 5, groups=6), nn.Linear(3, 3)
    )

    def by_svd():
        kernels = [network[0].weight, network[1].weight, network[2].effective_weight()]
        return sum(torch.linalg.svdvals(kernel.flatten(1))[0] for kernel in kernels)

    for convolution in network[:3]:  # singular values apart, without which an iteration is slow
        rows, columns = convolution.weight.flatten(1).shape
        nn.init.normal_(convolution.weight, std=0.1)
        convolution.weight.data += torch.outer(torch.randn(rows), torch.randn(columns)).view_as(convolution.weight)
    norms = SpectralNorms(network)
    assert not list(norms.parameters())
    torch.testing.assert_close(norms(), by_svd(), rtol=1e-5, atol=0)
    for _ in range(20):
        with torch.no_grad():
            for p in network.parameters():
                p.add_(0.02 * torch.randn_like(p))
        norms()
    torch.testing.assert_close(norms(), by_svd(), rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(f(), network[0].weight)[0] for f in (norms, by_svd)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-3)


def test_batch_norm_scales_are_the_largest_of_each_layer():
    network = nn.Sequential(BatchNorm(2), nn.BatchNorm1d(2), nn.BatchNorm2d(2, affine=False))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([-3.0, 1.0]))
        network[1].weight.copy_(torch.tensor([0.5, 0.25]))
    assert batch_norm_scales(network).item() == 3.5 and batch_norm_scales(nn.Linear(2, 2)).item() == 0


# --- the objective ----------------------------------------------------------------------------------------------


def test_kl_warmup_is_the_published_schedule():
    weight = KLWarmup(10_000)
    assert weight(0) == weight(1) == 1e-4 and weight(3_001) == weight(10_000) == 1.0
    assert weight(1_501) == pytest.approx(1_500 / 3_000)
    with pytest.raises(ValueError, match="KLWarmup: steps must be ≥ 1"):
        KLWarmup(0)


def test_the_cosine_stays_at_its_end():
    rate = WarmupCosine(50, minimum=0.1)
    assert rate(50) == rate(75) == rate(1000) == pytest.approx(0.1)


def test_beyond_its_weight_of_one_the_regularization_is_what_it_was():
    vae = NVAE((1, 16, 16), channels=4, groups_per_scale=(2,), latent_channels=2, halvings=2)
    loss = HierarchicalLoss(vae.double(), regularization=1e-2, initial_regularization=10.0)
    assert loss.regularization_weight(1.0) == loss.regularization_weight(2.0) == pytest.approx(1e-2)
    assert loss(torch.rand(2, 1, 16, 16, dtype=torch.float64))["regularization"].dtype == torch.float64


def test_balanced_kl_is_the_papers_formula():
    groups = [Group((2, 4, 4), None, 1)] * 5 + [Group((2, 8, 8), (3, 8, 8), 2)] * 10
    alpha = group_sizes(groups)
    torch.testing.assert_close(alpha, torch.tensor([1.0] * 5 + [2.0] * 10))  # 1²/5 and 2²/10, over the smaller
    kl = torch.rand(7, 15, requires_grad=True)
    charged = balance_kl(kl, alpha)
    total = (kl.abs().mean(0) + 0.01) / alpha
    gamma = (total / total.mean()).detach()
    torch.testing.assert_close(charged, kl * gamma)
    torch.testing.assert_close(torch.autograd.grad(charged.sum(), kl)[0], gamma.expand(7, 15))
    one = torch.rand(4, 1)
    torch.testing.assert_close(balance_kl(one, torch.ones(1)), one)


def test_the_loss_is_the_negative_bound_and_its_terms():
    model = small()
    x = torch.rand(6, 1, 8, 8).round()
    loss = HierarchicalLoss(model, regularization=1e-2, initial_regularization=1.0)
    assert loss.regularization_weight(0.0) == 1.0 and loss.regularization_weight(0.5) == pytest.approx(0.1)
    for beta, balanced in ((1.0, False), (0.5, True)):
        torch.manual_seed(5)
        terms = loss(x, beta)
        torch.manual_seed(5)
        likelihood, path = copy.deepcopy(model).train()(x)
        kl = path.kl()
        charged = balance_kl(kl, loss.alpha) if balanced else kl
        regularization = loss.regularization_weight(beta) * terms["regularization"]
        expected = -likelihood.log_prob(x).mean() + beta * charged.sum(1).mean() + regularization
        torch.testing.assert_close(terms["loss"], expected)
        torch.testing.assert_close(terms["kl"], kl.sum(1).mean())
        assert list(terms) == ["loss", "reconstruction", "kl", "regularization"]
    terms = loss.eval()(x, 0.5)
    assert list(terms) == ["loss", "reconstruction", "kl"]
    torch.testing.assert_close(terms["loss"], terms["reconstruction"] + 0.5 * terms["kl"])


def test_a_loss_for_something_else_is_refused():
    with pytest.raises(TypeError, match="vae must be an nn.Module with groups, encode, posterior and walk, got Linear"):
        HierarchicalLoss(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="balance must be True or False, got 'no'"):
        HierarchicalLoss(small(), balance="no")
    with pytest.raises(ValueError, match="regularization must be finite and ≥ 0, got -1"):
        HierarchicalLoss(small(), regularization=-1)
    with pytest.raises(ValueError, match="must both be 0 or neither"):
        HierarchicalLoss(small(), initial_regularization=1.0)
    with pytest.raises(ValueError, match="network must have convolutions"):
        SpectralNorms(nn.Linear(2, 2))


def bars(count):
    """Images [count, 1, 8, 8] with one bright column."""
    x = torch.zeros(count, 1, 8, 8)
    x[torch.arange(count), :, :, torch.randint(0, 8, (count,))] = 1.0
    return x


def fit(model, steps, execution=None, **more):
    torch.manual_seed(0)
    loss = HierarchicalLoss(model, regularization=1e-3)
    adamax = lambda parameters: torch.optim.Adamax(parameters, lr=1e-2)  # noqa: E731
    batches = [bars(32) for _ in range(steps)]
    options = {"steps": steps, "lr": 1e-2, "optimizer": adamax, "progress": False, "validate_every": max(1, steps // 4)}
    return train(loss, lambda x: loss(x, 0.5), batches, execution=execution, **options, **more)


def test_training_lowers_the_loss():
    first, *_, last = fit(small(groups_per_scale=(1, 1)), 40).history
    assert first["step"] == 10 and last["loss"] < 0.85 * first["loss"] and last["loss"] < 0.6 * 64 * math.log(2)


def test_two_steps_in_bfloat16_keep_densities_in_float32():
    model = small(flows=1)
    result = fit(model, 2, Execution(mixed_precision="bf16", check_every=1))
    assert all(math.isfinite(row["loss"]) for row in result.history)
    with torch.autocast("cpu", torch.bfloat16):
        likelihood, path = model(bars(4))
        assert likelihood.base_dist.logits.dtype == path.kl().dtype == torch.float32
        assert all(z.dtype == torch.float32 for z in path.z)


def test_a_resumed_run_goes_on_exactly(tmp_path):
    whole, resumed = small(), small()
    every_two = Execution(checkpoint_every=2)
    fit(whole, 4, every_two, folder=tmp_path)
    first, _ = sorted((tmp_path / "checkpoints").iterdir())
    fit(resumed, 4, every_two, folder=tmp_path, resume=first)
    for (name, value), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def three_steps(accumulation):
    model = small()
    model.recompute = accumulation == 1
    loss = HierarchicalLoss(model)
    options = {"steps": 3, "lr": 1e-2, "progress": False, "execution": Execution(gradient_accumulation=accumulation)}
    options["optimizer"] = partial(torch.optim.SGD, lr=1e-2)  # Adam blows rounding errors up
    train(loss, lambda x: loss(x, 0.5), [bars(16) for _ in range(3)], **options)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_two_processes_do_what_one_does_in_two_parts():
    one, two = run_processes(three_steps, 2, 1)
    assert torch.equal(one, two)
    torch.testing.assert_close(three_steps(2), one, rtol=1e-3, atol=1e-4)
    assert (three_steps(1) - one).abs().max() > 1e-3, "what one does at once is something else: BatchNorm saw all"


def test_a_copys_norms_are_those_of_its_own_convolutions():
    loss = HierarchicalLoss(small(), regularization=1e-2)
    moved = copy.deepcopy(loss)
    moved(bars(4))["loss"].backward()
    assert all(p.grad is None for p in loss.parameters())


# --- statistics, saving -----------------------------------------------------------------------------------------


def test_readjusted_statistics_are_those_of_ancestral_draws():
    model = ready(small())
    before = copy.deepcopy(model.state_dict())
    readjust_batch_norm(model, 64, temperature=0.7, draws=20, generator=1)
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("running" in name or "num_batches" in name for name in changed)
    assert not any(name.startswith(("encoder", "preprocess", "stem")) for name in changed)
    norm, seen = model.postprocess[0].residual[1], []
    handle = norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for module in model.modules():
        module.training = isinstance(module, BatchNorm)
    with torch.no_grad():
        for _ in range(20):
            copy_of_state = copy.deepcopy(model.state_dict())
            model.walk(Ancestral(0.7), 64)
            model.load_state_dict(copy_of_state)
    handle.remove()
    x = torch.cat(seen)
    std = x.std((0, 2, 3))
    assert ((norm.running_mean - x.mean((0, 2, 3))).abs() < 0.15 * std).all()
    torch.testing.assert_close(norm.running_var.sqrt(), std, rtol=0.15, atol=0)


def test_statistics_that_are_not_finite_are_not_taken():
    model = ready(small())
    model.levels[-1].combine.log_scale.data.fill_(float("inf"))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match="statistics at temperature 1.0 are not finite"):
        readjust_batch_norm(model, 4, draws=2)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    norms = [m for m in model.modules() if isinstance(m, BatchNorm)]
    assert {norm.momentum for norm in norms} == {0.05}


def test_saved_and_loaded_it_gives_the_same_images(tmp_path):
    model = ready(small((3, 9, 8), LogisticMixtureLikelihood(2, bits=5), flows=1), (3, 9, 8))
    model.save_pretrained(tmp_path / "model")
    loaded = ncpvae.Pretrained.from_pretrained(tmp_path / "model")
    assert isinstance(loaded, NVAE) and loaded.groups == model.groups and loaded.likelihood.bits == 5
    z = [torch.randn(2, *group.shape) for group in model.groups]
    torch.testing.assert_close(loaded.walk(Given(z), 2).mean, model.walk(Given(z), 2).mean)
    x = torch.rand(2, 3, 9, 8)
    torch.manual_seed(1)
    expected = model(x)[1].z
    torch.manual_seed(1)
    for ours, theirs in zip(loaded(x)[1].z, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_cells_without_gradients_are_computed_once():
    cells = Cells(BottomUpCell(4), BottomUpCell(4)).eval()
    cells.recompute = True
    x = torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(cells(x), cells[1](cells[0](x)))


def test_a_diagonal_base_is_taken_for_the_first_group():
    model = ready(small())
    base = diagonal_normal(torch.zeros(2, 2, 2, 2), torch.ones(2, 2, 2, 2), 3)
    posterior = model.posterior(0, base, None, model.encode(bars(2)))
    assert posterior.event_shape == (2, 2, 2) and posterior.batch_shape == (2,)


def test_a_base_that_is_not_the_walks_own_is_refused():
    model = ready(small())
    base = diagonal_normal(torch.zeros(2, 2, 2, 2), torch.ones(2, 2, 2, 2), 3)
    with pytest.raises(TypeError, match="NVAE: base of group 2 must be the walk's own, got Independent"):
        model.posterior(1, base, torch.zeros(2, 16, 2, 2), model.encode(bars(2)))
