"""Hierarchical noise contrastive priors, above all on two linear-Gaussian groups of which everything is known."""

import math
import shutil

import pytest
import torch
from processes import run_processes
from torch import Tensor, nn
from torch.distributions import Distribution

from ncpvae import SIR, Langevin, MLPClassifier, NoiseContrastivePrior, Normal, Pretrained
from ncpvae.distributions import SoftClampedNormal, diagonal_normal
from ncpvae.hierarchy import Ancestral, Given, Group, Posterior, walk_groups
from ncpvae.metrics import conditional_log_normalizers, hierarchical_log_normalizer, hierarchical_nll, kl_per_group
from ncpvae.nvae import NVAE
from ncpvae.objectives import nce
from ncpvae.priors import HierarchicalNCP, Reweighted, group_classifiers
from ncpvae.train import Execution, TrainingDiverged, fit_hierarchical_ncp

MIX = torch.tensor([[0.8, -0.5], [0.3, 0.6]])
BASE_STD = 0.7  # of z_2 given z_1
MEANS, STDS = (torch.tensor([0.6, -0.4]), torch.tensor([-0.3, 0.5])), (0.6, 0.5)  # of the targets, beside the context
LOG_Z = (1.3, -0.7)
DATA_STD = 0.3  # of q(z_1 | x); x is such that q's aggregate is the target


class TwoGroups(nn.Module):
    """z_1 ~ N(0, I), z_2 ~ N(MIX z_1, BASE_STD²), x ~ N(z_2, 1); c_2 = MIX z_1.

    The aggregate of q(z_1 | x) is N(MEANS[0], STDS[0]²) for the data of `observations`, q(z_2 | z_1, x) is
    N(c_2 + MEANS[1], STDS[1]²).
    """

    def __init__(self):
        super().__init__()
        self.groups = (Group((2,), None, 1), Group((2,), (2,), 2))
        self.unused = nn.Parameter(torch.zeros(()))

    def encode(self, x: Tensor) -> Tensor:
        return x

    def posterior(self, k: int, base: Distribution, context: Tensor | None, encoded: Tensor) -> Distribution:
        if k == 0:
            return diagonal_normal(encoded, torch.full_like(encoded, DATA_STD))
        return diagonal_normal(context + MEANS[1], torch.full_like(context, STDS[1]))

    def walk(self, select, batch: int) -> Distribution:
        zero = torch.zeros(batch, 2)
        context = select(0, diagonal_normal(zero, torch.ones_like(zero)), None) @ MIX.T
        z = select(1, diagonal_normal(context, torch.full_like(context, BASE_STD)), context)
        return diagonal_normal(z, torch.ones_like(z))


class KnownRatio(nn.Module):
    """log r_k = log N(z; c + mean, std²) − log N(z; c, base std²) + log Z."""

    def __init__(self, k: int):
        super().__init__()
        self.k = k

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        centre = torch.zeros(2) if context is None else context.view(len(context), *(1,) * (z.dim() - 2), 2)
        base_std = (1.0, BASE_STD)[self.k]
        target = diagonal_normal((centre + MEANS[self.k]).expand(z.shape), torch.full_like(z, STDS[self.k]))
        base = diagonal_normal(centre.expand(z.shape), torch.full_like(z, base_std))
        return target.log_prob(z) - base.log_prob(z) + LOG_Z[self.k]


def observations(count: int, generator: torch.Generator | None = None) -> Tensor:
    return MEANS[0] + math.sqrt(STDS[0] ** 2 - DATA_STD**2) * torch.randn(count, 2, generator=generator)


def known() -> HierarchicalNCP:
    return HierarchicalNCP(TwoGroups(), [KnownRatio(0), KnownRatio(1)])


def deviation(z: list[Tensor], scale: float = 0.0) -> float:
    """How far first and second moments of (z_1, z_2) are from the target's: the largest z-score.

    `scale` adds to every standard error a share of the moment's own size, for samplers that are not exact.
    """
    spread = STDS[0] ** 2 * torch.eye(2)
    mean = torch.cat([MEANS[0], MIX @ MEANS[0] + MEANS[1]])
    covariance = torch.cat(
        [
            torch.cat([spread, spread @ MIX.T], dim=1),
            torch.cat([MIX @ spread, MIX @ spread @ MIX.T + STDS[1] ** 2 * torch.eye(2)], dim=1),
        ]
    )
    joint, variance = torch.cat(z, dim=1), covariance.diagonal()
    error = joint.mean(0) - mean
    first = error.abs() / ((variance / len(joint)).sqrt() + scale * variance.sqrt())
    found = joint.T.cov()
    allowed = ((variance[:, None] * variance + covariance.square()) / len(joint)).sqrt()
    second = (found - covariance).abs() / (allowed + scale * (variance[:, None] * variance).sqrt())
    return float(torch.cat([first, second.flatten()]).max())


def drawn(prior: HierarchicalNCP, sampler, count: int = 4000, batch: int = 500) -> list[Tensor]:
    draws = [draw.z for _, draw in prior.draw_blocks(count, sampler, seed=1, block_size=batch)]
    return [torch.cat(parts) for parts in zip(*draws, strict=True)]


# --- sampling -------------------------------------------------------------------------------------------------------


def test_sir_is_exact():
    assert deviation(drawn(known(), SIR(1024))) < 4.5


class WrongContext(KnownRatio):
    """The ratio under another path's context."""

    def forward(self, z, context=None):
        return super().forward(z, None if context is None else context.roll(1, 0))


@pytest.mark.parametrize(
    ("make", "sampler"),
    [
        (known, SIR(1)),
        (known, [SIR(1024), None]),
        (known, [None, SIR(1024)]),
        (lambda: HierarchicalNCP(TwoGroups(), [KnownRatio(0), WrongContext(1)]), SIR(1024)),
    ],
)
def test_samplers_that_are_wrong_are_seen_to_be(make, sampler):
    assert deviation(drawn(make(), sampler)) > 7


@pytest.mark.parametrize(
    "sampler",
    [
        Langevin(150, 0.02),
        Langevin(150, 0.03, space="epsilon"),
        [SIR(1024), Langevin(150, 0.02)],
        [Langevin(150, 0.02), SIR(1024)],
    ],
)
def test_langevin_and_samplers_of_each_group_are_right_to_the_step_size(sampler):
    assert deviation(drawn(known(), sampler, 2000), scale=0.02) < 4.5
    assert deviation(drawn(known(), [None, None], 2000), scale=0.02) > 7


def test_a_flat_ratio_gives_back_the_base():
    prior = known()
    prior.jsd.copy_(torch.tensor([0.1, -1e-4]))
    assert prior.flat == {1}
    likelihood, z, diagnostics = prior.draw(3000, SIR(512), generator=0)
    residual = (z[1] - z[0] @ MIX.T) / BASE_STD
    assert residual.mean(0).abs().max() < 0.08 and (residual.std(0) - 1).abs().max() < 0.06
    assert diagnostics[1] is None and len(diagnostics[0].ess) == 3000
    torch.testing.assert_close(likelihood.mean, z[1])
    assert torch.equal(prior.log_ratio(1, diagonal_normal(z[1], z[1].exp()), z[1], z[1]), torch.zeros(3000))
    assert HierarchicalNCP(TwoGroups(), [KnownRatio(0), KnownRatio(1)]).flat == frozenset(), "not known is not flat"


def test_a_temperature_scales_the_bases_that_are_reweighted():
    """N(c, (0.5 s)²) times exp(a·(z − c)) is N(c + a (0.5 s)², (0.5 s)²)."""

    class Tilted(nn.Module):
        def forward(self, z, context=None):
            return 2.0 * (z if context is None else z - context[:, None]).sum(-1)

    prior = HierarchicalNCP(TwoGroups(), [Tilted(), Tilted()])
    _, z, _ = prior.draw(4000, SIR(1024), temperature=0.5, generator=1)
    for value, std in ((z[0], 0.5), (z[1] - z[0] @ MIX.T, 0.5 * BASE_STD)):
        torch.testing.assert_close(value.mean(0), torch.full((2,), 2 * std**2), atol=0.04, rtol=0.0)
        torch.testing.assert_close(value.std(0), torch.full((2,), std), atol=0.03, rtol=0.0)


def test_chunks_of_whole_tiles_give_the_same_draw():
    prior = known()
    one = prior.draw(6, SIR(5000, chunk_size=1024), generator=3)
    other = prior.draw(6, SIR(5000, chunk_size=4096), generator=3)
    for a, b in zip(one.z, other.z, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(prior.draw(6, SIR(5000), generator=4).z[0], one.z[0])


def test_proposals_are_held_a_chunk_at_a_time_whatever_their_number():
    rows = []

    class Counting(KnownRatio):
        def forward(self, z, context=None):
            rows.append(z.shape[:-1].numel())
            return super().forward(z, context)

    largest = []
    for proposals in (2048, 16384):
        rows.clear()
        HierarchicalNCP(TwoGroups(), [Counting(0), Counting(1)]).draw(4, SIR(proposals))
        assert sum(rows) == 2 * 4 * proposals
        largest.append(max(rows))
    assert largest[0] == largest[1] == 4 * 1024


def test_adaptive_sir_draws_more_for_the_group_that_needs_them():
    class Peaked(KnownRatio):
        def forward(self, z, context=None):
            return 4 * super().forward(z, context)

    prior = HierarchicalNCP(TwoGroups(), [Peaked(0), KnownRatio(1)])
    first, second = prior.draw(8, SIR(1024, min_ess=300.0, max_proposals=65536), generator=0).diagnostics
    assert first.stopped == second.stopped == "min_ess" and min(first.ess.min(), second.ess.min()) >= 300
    assert first.num_proposals > second.num_proposals


def test_one_group_is_the_noise_contrastive_prior():
    class OneGroup(TwoGroups):
        def __init__(self):
            super().__init__()
            self.groups = self.groups[:1]

        def walk(self, select, batch):
            zero = torch.zeros(batch, 2)
            z = select(0, diagonal_normal(zero, torch.ones_like(zero)), None)
            return diagonal_normal(z, torch.ones_like(z))

    classifier = MLPClassifier(2, (16,))
    for sampler in (SIR(3000), Langevin(20, 0.02), Langevin(20, 0.02, space="epsilon")):
        flat = NoiseContrastivePrior(Normal(2), classifier).sample((5,), sampler, torch.Generator().manual_seed(1))
        deep = HierarchicalNCP(OneGroup(), [classifier]).draw(5, sampler, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(deep.z[0], flat)


# --- NVAE with the paper's classifier -------------------------------------------------------------------------------


def small_nvae() -> NVAE:
    torch.manual_seed(0)
    sizes = {"channels": 4, "groups_per_scale": (1, 2), "latent_channels": 2, "halvings": 1, "flows": 1}
    model = NVAE((1, 16, 16), preprocess_cells=1, postprocess_cells=1, encoder_cells=1, decoder_cells=1, **sizes)
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(8, 1, 16, 16).round())
    return model.eval()


def nvae_prior() -> HierarchicalNCP:
    vae = small_nvae()
    return HierarchicalNCP(vae, group_classifiers(vae, 4, 1))


@pytest.mark.parametrize("sampler", [SIR(3000), Langevin(5, 1e-3), Langevin(5, 1e-3, space="epsilon")])
def test_the_context_is_convolved_once_for_each_group(sampler):
    prior, calls = nvae_prior(), []
    for classifier in prior.classifiers[1:]:
        classifier.context_stem.register_forward_hook(lambda module, *_: calls.append(module))
    _, z, _ = prior.draw(3, sampler)
    assert [len(part) for part in z] == [3, 3, 3]
    assert calls == [classifier.context_stem for classifier in prior.classifiers[1:]]


def test_a_remembered_context_changes_neither_the_ratio_nor_its_gradient():
    classifier = group_classifiers(small_nvae(), 4, 1)[1].eval()
    z, context = torch.randn(2, 3, 2, 8, 8, requires_grad=True), torch.randn(2, classifier.context_channels, 8, 8)
    values = []
    for form in (classifier, classifier.remembering()):
        total = form(z, context).sum()
        values.append((total.detach(), torch.autograd.grad(total, z)[0]))
    torch.testing.assert_close(values[0], values[1])
    assert group_classifiers(small_nvae(), 4, 1)[0].remembering().context_stem is None


def test_proposals_of_nvaes_own_normal_are_of_that_normal():
    prior = HierarchicalNCP(small_nvae(), [ConstantRatio() for _ in range(3)])
    base = SoftClampedNormal(torch.randn(2, 2, 8, 8), torch.randn(2, 2, 8, 8), 3)
    z = SIR(1).sample(prior.conditional(1, base, None), (2000,)).z
    assert ((z.mean(0) - base.mean) / base.stddev).abs().max() < 5 / math.sqrt(2000)
    assert (z.std(0) / base.stddev - 1).abs().max() < 0.1


class ConstantRatio(nn.Module):
    def forward(self, z, context=None):
        return z.flatten(-3).sum(-1) * 0.0


def test_it_is_saved_and_loaded_with_all_its_parts(tmp_path):
    prior = nvae_prior()
    prior.jsd.copy_(torch.tensor([0.2, -0.1, 0.3]))
    prior.save_pretrained(tmp_path / "prior", protocol={"steps": 3})
    loaded = Pretrained.from_pretrained(tmp_path / "prior")
    assert isinstance(loaded, HierarchicalNCP) and loaded.flat == {1} and loaded.protocol == {"steps": 3}
    for a, b in zip(prior.draw(2, SIR(64), generator=0).z, loaded.draw(2, SIR(64), generator=0).z, strict=True):
        assert torch.equal(a, b)


def test_a_classifier_of_ones_own_is_handed_in_when_it_is_loaded(tmp_path):
    vae = small_nvae()
    classifiers = [*group_classifiers(vae, 4, 1)[:2], ConstantRatio()]
    HierarchicalNCP(vae, classifiers).save_pretrained(tmp_path / "prior")
    with pytest.raises(ValueError, match=r"its classifiers\.2 is of the class 'ConstantRatio'"):
        HierarchicalNCP.from_pretrained(tmp_path / "prior")
    own = ConstantRatio()
    assert HierarchicalNCP.from_pretrained(tmp_path / "prior", **{"classifiers.2": own}).classifiers[2] is own


def test_classifiers_are_made_for_maps_and_vectors():
    prior = HierarchicalNCP(TwoGroups(), group_classifiers(TwoGroups(), hidden=(4,)))
    assert [len(z) for z in prior.draw(3, SIR(8)).z] == [3, 3]
    model = TwoGroups()
    model.groups = (Group((2, 2), None),)
    with pytest.raises(ValueError, match=r"group 1 of 1 must have the shape \[C, H, W\] or \[D\], got \[2, 2\]"):
        group_classifiers(model)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: HierarchicalNCP(nn.Linear(1, 1), []), TypeError, "vae must be an nn.Module with groups"),
        (lambda: HierarchicalNCP(TwoGroups(), [KnownRatio(0)]), ValueError, "one for each of 2 groups, got 1"),
        (lambda: HierarchicalNCP(TwoGroups(), [KnownRatio(0), len]), TypeError, "the classifier of group 2 must be"),
        (lambda: HierarchicalNCP(TwoGroups(), KnownRatio(0)), TypeError, "must be a list of modules, got KnownRatio"),
        (lambda: HierarchicalNCP(TwoGroups(), [KnownRatio(0)] * 2, math.nan), ValueError, "min_jsd must be a number"),
        (lambda: known().draw(0), ValueError, "draw: batch must be an integer ≥ 1, got 0"),
        (lambda: known().draw(2, [SIR()]), ValueError, "one for each of 2 groups, got 1"),
        (lambda: known().draw(2, [SIR(), "sir"]), TypeError, "sampler of group 2 of 2 must be SIR"),
        (lambda: known().draw_blocks(4, [SIR()]), ValueError, "one for each of 2 groups, got 1"),
        (lambda: known().draw_blocks(4, seed=-1), ValueError, "draw_blocks: seed must be ≥ 0"),
        (
            lambda: HierarchicalNCP(TwoGroups(), [KnownRatio(0), MLPClassifier(2)]).draw(2, SIR(8)),
            ValueError,
            "group 2 of 2 (scale 2 of 2): MLPClassifier: context must be none (E = 0), got shape (2, 2)",
        ),
        (
            lambda: nvae_odd().draw(2, SIR(8)),
            ValueError,
            "group 1 of 1 (scale 1 of 1): ",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)


def nvae_odd() -> HierarchicalNCP:
    """Maps of 6×6, which cannot be halved twice."""
    vae = NVAE((1, 6, 6), channels=2, groups_per_scale=(1,), latent_channels=2, halvings=0)
    return HierarchicalNCP(vae, group_classifiers(vae, 4, 1))


# --- likelihood -----------------------------------------------------------------------------------------------------


def test_log_z_is_that_of_the_joint_density_and_its_error_is_seen_over_repeats():
    found = hierarchical_log_normalizer(known(), 2000, repeats=10)
    assert abs(found.value - sum(LOG_Z)) < 4 * found.standard_error < 0.2
    assert len(found.repeats) == 10 and found.repeat_std == pytest.approx(float(found.repeats.std()))
    assert found.repeat_std == pytest.approx(found.standard_error * math.sqrt(10), rel=0.8)
    flat = known()
    flat.jsd.fill_(-1.0)
    assert hierarchical_log_normalizer(flat, 20, repeats=1)[:2] == pytest.approx((0.0, 0.0), abs=1e-7)


@pytest.mark.parametrize("along", ["base", "prior"])
def test_each_group_has_its_own_normalizer(along):
    log_mean, ess = conditional_log_normalizers(known(), 12, 4096, along)
    assert log_mean.shape == ess.shape == (12, 2) and (ess > 1).all() and (ess < 4096).all()
    torch.testing.assert_close(log_mean, torch.tensor([LOG_Z]).expand(12, 2), atol=0.3, rtol=0.0)
    torch.testing.assert_close(log_mean.mean(0), torch.tensor(LOG_Z), atol=0.1, rtol=0.0)


def exact_log_likelihood(x: Tensor, mended: bool) -> Tensor:
    """log p(x), [N] nats, of the model itself or with the target as its prior."""
    if mended:
        mean = MIX @ MEANS[0] + MEANS[1]
        covariance = MIX @ MIX.T * STDS[0] ** 2 + (STDS[1] ** 2 + 1) * torch.eye(2)
    else:
        mean, covariance = torch.zeros(2), MIX @ MIX.T + (BASE_STD**2 + 1) * torch.eye(2)
    return torch.distributions.MultivariateNormal(mean, covariance).log_prob(x)


class Wide(TwoGroups):
    """With a q(z | x) that is wider than either prior, whose weights have a small variance."""

    def posterior(self, k, base, context, encoded):
        mean = torch.zeros_like(encoded) if k == 0 else context
        return diagonal_normal(mean, torch.full_like(mean, (1.2, 0.9)[k]))


def test_the_likelihoods_are_the_exact_ones():
    x = (observations(8) + torch.tensor([0.5, 1.5])).repeat(40, 1)
    prior = HierarchicalNCP(Wide(), [KnownRatio(0), KnownRatio(1)])
    found = hierarchical_nll(prior, x, 200, log_normalizer=sum(LOG_Z), num_proposals=128, batch_size=320)
    assert set(found) == {"base", "log_z", "snis"}
    base, mended = (-exact_log_likelihood(x, m).mean() for m in (False, True))
    assert (base - mended).abs() > 0.15, "the two can be told apart"
    assert found["base"].nll == pytest.approx(float(base), abs=0.02)
    assert found["log_z"].nll == pytest.approx(float(mended), abs=0.02)
    assert found["snis"].nll == pytest.approx(float(mended), abs=0.05)


def test_with_one_proposal_snis_is_the_base_and_the_base_does_not_know_what_else_is_asked():
    x = observations(10)
    with_one = hierarchical_nll(known(), x, 5, num_proposals=1)
    torch.testing.assert_close(with_one["snis"].per_example, with_one["base"].per_example)
    alone = hierarchical_nll(known(), x, 5)
    assert torch.equal(alone["base"].per_example, with_one["base"].per_example) and set(alone) == {"base"}
    flat = known()
    flat.jsd.fill_(-1.0)
    mended = hierarchical_nll(flat, x, 5, log_normalizer=0.0, num_proposals=64)
    assert torch.equal(mended["snis"].per_example, alone["base"].per_example)
    assert torch.equal(mended["log_z"].per_example, alone["base"].per_example)


def test_more_proposals_bring_the_snis_bound_closer_to_the_target():
    x = observations(100)
    snis = [hierarchical_nll(known(), x, 20, num_proposals=m)["snis"].nll for m in (1, 4, 32, 256)]
    assert snis == sorted(snis, reverse=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hierarchical_log_normalizer(known(), 0), "num_samples must be an integer ≥ 1, got 0"),
        (lambda: conditional_log_normalizers(known(), along="both"), "along must be 'base' or 'prior', got 'both'"),
        (lambda: hierarchical_nll(known(), torch.zeros(0, 2)), "data must be a tensor [N, …] with N ≥ 1"),
        (lambda: hierarchical_nll(known(), torch.full((2, 2), math.nan)), "data must be finite, got NaN or infinity"),
        (lambda: known().draw_blocks(4, SIR(8, shard_proposals=True)), "sampler must not shard its proposals"),
        (lambda: hierarchical_nll(known(), observations(2), log_normalizer=math.inf), "log_normalizer must be finite"),
        (lambda: hierarchical_nll(known(), observations(2), num_proposals=0), "num_proposals must be an integer ≥ 1"),
    ],
)
def test_what_the_measures_are_not_given_right_is_named(call, message):
    with pytest.raises(ValueError) as raised:
        call()
    assert message in str(raised.value)


def test_measuring_leaves_the_model_and_its_mode_as_they_were():
    vae = NVAE((1, 16, 16), channels=4, groups_per_scale=(2,), latent_channels=2, halvings=2, preprocess_cells=1)
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    x = torch.rand(4, 1, 16, 16).round()
    trained = hierarchical_nll(vae.train(), x, 2)["base"].nll
    kl_per_group(vae, x)
    assert vae.training and all(torch.equal(before[name], tensor) for name, tensor in vae.state_dict().items())
    assert hierarchical_nll(vae.eval(), x, 2)["base"].nll == trained


def test_one_walk_has_no_error_to_tell():
    assert math.isnan(hierarchical_log_normalizer(known(), 1, repeats=1).standard_error)


def test_a_threshold_set_later_is_saved(tmp_path):
    prior = HierarchicalNCP(NVAE((1, 16, 16), channels=4, groups_per_scale=(2,), latent_channels=2, halvings=2), [
        MLPClassifier(2) for _ in range(2)
    ])  # fmt: skip
    prior.min_jsd = 0.25
    prior.jsd[:] = torch.tensor([0.1, 0.3])
    prior.save_pretrained(tmp_path)
    assert HierarchicalNCP.from_pretrained(tmp_path).flat == prior.flat == {0}


# --- stage two ------------------------------------------------------------------------------------------------------

DATA = observations(600, torch.Generator().manual_seed(1))


def untrained(dropout: float = 0.0) -> HierarchicalNCP:
    torch.manual_seed(5)
    classifiers = [MLPClassifier(2, (32,)), MLPClassifier(2, (32,), context_features=2)]
    for classifier in classifiers:
        classifier.network.insert(2, nn.Dropout(dropout))
    return HierarchicalNCP(TwoGroups(), classifiers)


def fit(prior: HierarchicalNCP, **changes):
    common = {"steps": 30, "batch_size": 64, "progress": False, "lr": 1e-2, "validate_every": 5}
    return fit_hierarchical_ncp(prior, DATA, **{**common, **changes})


def weights(prior: HierarchicalNCP, k: int) -> Tensor:
    return torch.cat([value.flatten().float() for value in prior.classifiers[k].state_dict().values()])


def test_stage_two_learns_the_known_ratios_and_mends_the_prior():
    prior = untrained()
    result = fit(prior, steps=600, batch_size=256, validate_every=100)
    assert result.groups == [0, 1] and result.trustworthy == [True, True] and len(result.loss) == 2
    held_out = observations(20000)
    path = Posterior(prior.vae, held_out)
    losses = []

    def select(k, base, context):
        z = path(k, base, context)
        ratio = KnownRatio(k)
        p = base.sample()
        losses.append(float(nce(ratio(z, context) - LOG_Z[k], ratio(p, context) - LOG_Z[k])))
        return z

    walk_groups(prior.vae, select, 20000)
    for k in range(2):
        assert result.loss[k] == pytest.approx(losses[k], abs=0.2)
        assert result.jsd[k] == pytest.approx(math.log(2) - 0.5 * result.loss[k])
        assert 0.6 < result.accuracy[k] < 0.9
    torch.testing.assert_close(prior.jsd, torch.tensor(result.jsd))
    assert deviation(drawn(prior, SIR(512)), scale=0.1) < 2 < deviation(drawn(prior, [None, None]), scale=0.1)
    assert {f"validation_{name}_{k}" for name in ("nce", "accuracy") for k in (1, 2)} <= set(result.history[0])


@pytest.mark.parametrize("patience", [None, 2])
def test_all_groups_at_once_are_the_groups_one_by_one_bit_for_bit(patience):
    together, apart = untrained(0.2), untrained(0.2)
    setting = {"steps": 60, "validate_every": 3, "patience": patience, "lr": 0.2, "schedule": "constant"}
    joint = fit(together, **setting)
    for k in range(2):
        alone = fit(apart, groups=[k], **setting)
        assert alone.groups == [k] and alone.loss == joint.loss[k : k + 1]
        assert alone.best_step == joint.best_step[k : k + 1]
        assert torch.equal(weights(together, k), weights(apart, k))
    assert joint.best_step[0] != joint.best_step[1], "each group has its own best weights"
    assert torch.equal(together.jsd, apart.jsd)
    other = untrained(0.2)
    fit(other, seed=1, **setting)
    assert not torch.equal(weights(together, 0), weights(other, 0))


def test_groups_that_are_not_trained_stay():
    prior = untrained()
    before = weights(prior, 0)
    fit(prior, groups=[1])
    assert torch.equal(weights(prior, 0), before) and prior.jsd[0].isnan() and not prior.jsd[1].isnan()


def test_a_resumed_run_goes_on_exactly(tmp_path):
    whole, resumed = untrained(0.2), untrained(0.2)
    expected = fit(whole, folder=tmp_path / "whole", patience=None)
    checkpoints = sorted((tmp_path / "whole" / "checkpoints").glob("step-*"))
    assert [path.name for path in checkpoints] == ["step-00000020", "step-00000025", "step-00000030"]
    for path in checkpoints[1:]:
        shutil.rmtree(path)
    found = fit(resumed, folder=tmp_path / "whole", patience=None, resume="auto")
    assert found.loss == expected.loss and found.best_step == expected.best_step
    for k in range(2):
        assert torch.equal(weights(whole, k), weights(resumed, k))


def test_the_walk_leaves_the_vae_as_it_was_and_needs_no_image():
    vae = small_nvae()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    calls = []
    vae.postprocess.register_forward_hook(lambda *_: calls.append(None))
    prior = HierarchicalNCP(vae, group_classifiers(vae, 4, 1))
    images = torch.rand(40, 1, 16, 16).round()
    result = fit_hierarchical_ncp(prior, images, steps=2, batch_size=8, progress=False)
    assert len(result.loss) == 3 and not calls
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert not prior.training and not any(module.training for module in prior.modules())


class Diverging(MLPClassifier):
    def forward(self, z, context=None):
        return super().forward(z, context) * (math.nan if self.training else 1.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fit_hierarchical_ncp(None, DATA), TypeError, "prior must be a HierarchicalNCP, got NoneType"),
        (lambda: fit(known()), ValueError, "the classifier of group 1 of 2 must have parameters to train"),
        (lambda: fit(untrained(), groups=[2]), ValueError, "groups must be different numbers of 0 … 1, got [2]"),
        (lambda: fit(untrained(), steps=0), ValueError, "fit_hierarchical_ncp: steps must be ≥ 1, got 0"),
        (lambda: fit(untrained(), patience=0), ValueError, "fit_hierarchical_ncp: patience must be ≥ 1, got 0"),
        (lambda: fit(untrained(), groups=[]), ValueError, "groups must be different numbers of 0 … 1, got []"),
        (lambda: fit(untrained(), validation_fraction=1.0), ValueError, "validation_fraction must be between 0 and 1"),
        (
            lambda: fit(untrained(), execution=Execution(max_grad_norm=1.0)),
            ValueError,
            "execution.max_grad_norm must be None, got 1.0",
        ),
        (
            lambda: fit(HierarchicalNCP(TwoGroups(), [MLPClassifier(2), MLPClassifier(3, context_features=2)])),
            ValueError,
            "group 2 of 2 (scale 2 of 2): ",
        ),
        (
            lambda: fit(HierarchicalNCP(TwoGroups(), [MLPClassifier(2), Diverging(2, (8,), context_features=2)])),
            TrainingDiverged,
            "loss term 'nce' is nan ('nce_2' too)",
        ),
    ],
)
def test_what_stage_two_is_not_given_right_is_named(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)


def test_an_easy_group_is_warned_of():
    prior = untrained()
    with pytest.warns(RuntimeWarning, match=r"the classifiers of groups 1 separate"):
        fit_hierarchical_ncp(prior, 20 + DATA, steps=60, batch_size=64, lr=0.05, progress=False, groups=[0])


# --- several processes ----------------------------------------------------------------------------------------------


def in_two(folder):
    by_groups, by_rows = untrained(0.2), untrained()
    groups = fit(by_groups, shard_groups=True, folder=folder)
    assert fit(untrained(0.2), shard_groups=True, folder=folder, resume="auto").loss == groups.loss
    rows = fit(by_rows)
    measures = hierarchical_log_normalizer(known(), 100, repeats=3, block_size=16, distributed=True).value
    nll = hierarchical_nll(known(), DATA[:30], 4, num_proposals=8, batch_size=8, distributed=True)["snis"].nll
    blocks = [(first, draw.z[1]) for first, draw in known().draw_blocks(10, SIR(64), block_size=4)]
    with pytest.raises((TrainingDiverged, RuntimeError)) as raised:
        diverging = HierarchicalNCP(TwoGroups(), [MLPClassifier(2), Diverging(2, (8,), context_features=2)])
        fit(diverging, shard_groups=True)
    assert "loss term 'nce' is nan ('nce_2' too)" in str(raised.value)
    return groups.loss, [weights(by_groups, k) for k in range(2)], rows.loss, weights(by_rows, 1), measures, nll, blocks


def test_two_processes_share_the_groups_the_rows_and_the_measures(tmp_path):
    results = run_processes(in_two, 2, tmp_path, timeout=120)
    by_groups, by_rows = untrained(0.2), untrained()
    expected = fit(by_groups)
    accumulated = fit(by_rows, execution=Execution(gradient_accumulation=2))
    value = hierarchical_log_normalizer(known(), 100, repeats=3, block_size=16).value
    nll = hierarchical_nll(known(), DATA[:30], 4, num_proposals=8, batch_size=8)["snis"].nll
    for loss, classifiers, row_loss, row_weights, their_value, their_nll, _ in results:
        assert loss == expected.loss, "bit for bit"
        assert all(torch.equal(classifiers[k], weights(by_groups, k)) for k in range(2))
        assert row_loss == pytest.approx(accumulated.loss, abs=1e-3)
        torch.testing.assert_close(row_weights, weights(by_rows, 1), atol=2e-3, rtol=0.0)
        assert their_value == value and their_nll == nll
    together = sorted((block for result in results for block in result[-1]), key=lambda block: block[0])
    assert [first for first, _ in together] == [0, 4, 8]
    own = torch.cat([draw.z[1] for _, draw in known().draw_blocks(10, SIR(64), block_size=4)])
    assert torch.equal(torch.cat([z for _, z in together]), own)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part-0", "part-1"]


def test_selectors_go_together():
    """The first group drawn from the mended prior, the second from the base below it."""
    prior = known()
    first = Reweighted(prior, SIR(1024))
    z = []

    def select(k, base, context):
        z.append(first(k, base, context) if k == 0 else Given(first.z, Ancestral())(k, base, context))
        return z[-1]

    prior.vae.walk(select, 4000)
    torch.testing.assert_close(z[0].mean(0), MEANS[0], atol=0.06, rtol=0.0)
    torch.testing.assert_close((z[1] - z[0] @ MIX.T).std(0), torch.full((2,), BASE_STD), atol=0.04, rtol=0.0)
