import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch.distributions import MultivariateNormal
from toy import LOG_Z, MEAN, STD, ExactRatio, exact_prior, expected_ess_fraction

from ncpvae import SIR, Langevin, MLPClassifier, NoiseContrastivePrior, Normal, ResidualClassifier, samplers
from ncpvae.distributions import diagonal_normal
from ncpvae.samplers.graph import STEPS_PER_GRAPH, WARM_UP, replayed


def test_sir_draws_from_the_target():
    result = SIR(2000).sample(exact_prior()(), (3000,))
    for coordinate in result.z.T:
        assert stats.kstest(coordinate, "norm", args=(MEAN, STD)).pvalue > 1e-4
    assert abs(torch.corrcoef(result.z.T)[0, 1]) < 5 / math.sqrt(3000)


def test_the_base_alone_would_fail_that_test():
    base = exact_prior().base_distribution().sample((3000,))
    assert stats.kstest(base[:, 0], "norm", args=(MEAN, STD)).pvalue < 1e-10


def test_sir_with_one_proposal_is_the_base():
    z = SIR(1).sample(exact_prior()(), (4000,)).z
    assert stats.kstest(z[:, 0], "norm").pvalue > 1e-4


def test_sir_diagnostics_hold_ess_and_log_z():
    d = SIR(5000).sample(exact_prior()(), (64,)).diagnostics
    assert d.ess.shape == (64,)
    assert d.ess.mean() / 5000 == pytest.approx(expected_ess_fraction(2), rel=0.05)
    assert float(d.log_normalizer) == pytest.approx(LOG_Z, abs=0.02)
    assert (d.num_proposals, d.stopped) == (5000, "num_proposals")
    assert d.seconds > 0


@pytest.mark.parametrize("chunk_size", [1024, 2048, 5120, 8192])
def test_chunk_size_changes_nothing(chunk_size):
    generator = torch.Generator().manual_seed(3)
    reference = SIR(5000, chunk_size=1024).sample(exact_prior()(), (600,), torch.Generator().manual_seed(3))
    chunked = SIR(5000, chunk_size=chunk_size).sample(exact_prior()(), (600,), generator)
    assert torch.equal(reference.z, chunked.z)
    torch.testing.assert_close(reference.diagnostics.ess, chunked.diagnostics.ess)


def test_odd_chunk_sizes_still_draw_from_the_target():
    z = SIR(500, chunk_size=37).sample(exact_prior()(), (2000,)).z
    assert stats.kstest(z[:, 0], "norm", args=(MEAN, STD)).pvalue > 1e-4


def test_min_ess_draws_on_until_reached_or_says_that_it_was_not():
    reached = SIR(100, min_ess=1500).sample(exact_prior()(), (3,)).diagnostics
    assert reached.stopped == "min_ess" and (reached.ess >= 1500).all() and reached.num_proposals > 100
    limited = SIR(100, min_ess=1e6, max_proposals=3000).sample(exact_prior()(), (3,)).diagnostics
    assert limited.stopped == "max_proposals" and limited.num_proposals == 3000


def test_draws_per_row_shares_proposals_and_keeps_the_distribution():
    result = SIR(4000, draws_per_row=50).sample(exact_prior()(), (60, 70))
    assert result.z.shape == (60, 70, 2)
    assert len(result.diagnostics.ess) == 84
    assert result.z.mean().item() == pytest.approx(MEAN, abs=0.05)
    assert result.z.std().item() == pytest.approx(STD, abs=0.05)


def test_batch_of_contexts_keeps_its_rows_apart():
    means = torch.tensor([-5.0, 0.0, 5.0])[:, None].expand(3, 2)
    distribution = NoiseContrastivePrior(diagonal_normal(means, torch.ones(3, 2)), _Flat())()
    for sampler in (SIR(50), SIR(50, draws_per_row=2), Langevin(3, 1e-3)):
        z = sampler.sample(distribution, (4,)).z
        assert z.shape == (4, 3, 2)
        assert (z.mean(0) - means).abs().max() < 3


def test_each_context_has_a_log_normalizer_of_its_own():
    base = diagonal_normal(torch.zeros(2, 2), torch.ones(2, 2))
    distribution = NoiseContrastivePrior(base, _ContextOffset())()
    distribution.classifier.offsets = torch.tensor([0.0, 10.0])
    for sampler in (SIR(200), Langevin(2, 1e-3)):
        diagnostics = sampler.sample(distribution, (50,)).diagnostics
        torch.testing.assert_close(diagnostics.log_normalizer.float(), torch.tensor([0.0, 10.0]))


def test_langevin_says_that_inference_mode_will_not_do():
    with torch.inference_mode(), pytest.raises(RuntimeError, match="use torch.no_grad"):
        Langevin(2).sample(exact_prior()())


def test_empty_shape_gives_one_sample():
    assert SIR(10).sample(exact_prior()()).z.shape == (2,)
    assert Langevin(2).sample(exact_prior()()).z.shape == (2,)


@pytest.mark.parametrize("space", ["z", "epsilon"])
def test_langevin_reaches_its_known_stationary_law(space):
    """ULA on N(m, s²) is an AR(1) with coefficient a = 1 − λ/(2s²) and stationary variance λ/(1 − a²)."""
    step = 0.1
    z = Langevin(60, step, space=space).sample(exact_prior()(), (20_000,)).z
    a = 1 - step / (2 * STD**2)
    variance = step / (1 - a**2)
    assert z.mean().item() == pytest.approx(MEAN, abs=5 * math.sqrt(variance / 40_000))
    assert z.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / 40_000))


def test_epsilon_space_does_not_depend_on_the_scale_of_the_base():
    """With z = μ + σε the chain for (μ, σ) is the standard chain, moved and scaled."""

    def chain(mean, std):
        prior = NoiseContrastivePrior(Normal(2, mean, std), _Standardised(mean, std))
        generator = torch.Generator().manual_seed(1)
        return Langevin(20, 0.05, space="epsilon").sample(prior(), (50,), generator).z

    torch.testing.assert_close((chain(3.0, 0.01) - 3.0) / 0.01, chain(0.0, 1.0), rtol=1e-3, atol=1e-3)


def test_other_bases_are_differentiated_through():
    """A MultivariateNormal base with the identity covariance gives the chain of the Normal base."""
    joint = MultivariateNormal(torch.zeros(2), torch.eye(2))
    other = NoiseContrastivePrior(joint, ExactRatio())
    a = Langevin(10, 0.05).sample(exact_prior()(), (50,), torch.Generator().manual_seed(1)).z
    b = Langevin(10, 0.05).sample(other(), (50,), torch.Generator().manual_seed(1)).z
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_temperature_zero_climbs_to_the_mode():
    z = Langevin(300, 0.1, temperature=0.0).sample(exact_prior()(), (10,)).z
    torch.testing.assert_close(z, torch.full_like(z, MEAN), atol=1e-3, rtol=0)


def test_hooks_and_replaced_networks_of_a_classifier_are_honoured():
    classifier = MLPClassifier(2, (8,))
    classifier.register_forward_hook(lambda module, inputs, output: 0 * output)
    z = Langevin(200, 0.02).sample(NoiseContrastivePrior(Normal(2), classifier)(), (2000,)).z
    assert z.mean(0).abs().max() < 0.15  # the base's
    other = MLPClassifier(2, (8,))
    prior = NoiseContrastivePrior(Normal(2), other)
    expected = Langevin(3).sample(prior(), (4,), torch.Generator().manual_seed(0)).z
    other.network = torch.nn.Sequential(other.network)
    z = Langevin(3).sample(prior(), (4,), torch.Generator().manual_seed(0)).z
    torch.testing.assert_close(z, expected)


def test_a_ratio_that_is_nan_is_not_blamed_on_the_step_size():
    prior = NoiseContrastivePrior(Normal(2), ExactRatio(log_z=math.nan))
    with pytest.raises(ValueError, match="log_ratio must be a number at every draw of the base, got NaN"):
        Langevin(2).sample(prior(), (4,))


def test_langevin_leaves_no_gradient_behind():
    prior = NoiseContrastivePrior(Normal(2), MLPClassifier(2, (8,), torch.nn.Softplus))  # by autograd
    Langevin(3).sample(prior(), (4,))
    assert all(p.grad is None for p in prior.parameters()) and len([*prior.parameters()]) == 4


def normal_base():
    return diagonal_normal(torch.tensor([3.0, -1.0]), torch.tensor([0.5, 2.0]))


def test_a_normal_base_is_drawn_with_its_mean_and_std():
    torch.manual_seed(1)
    z = samplers.base_draws(normal_base(), (5,)).draw(4000)
    assert z.shape == (4000, 5, 2)
    for coordinate, (mean, std) in zip(z.flatten(0, 1).T, [(3.0, 0.5), (-1.0, 2.0)], strict=True):
        assert stats.kstest(coordinate, "norm", args=(mean, std)).pvalue > 1e-4
    tiles = ((z - normal_base().mean) / normal_base().stddev)[:3072].view(3, -1)
    assert torch.corrcoef(tiles).fill_diagonal_(0).abs().max() < 0.05  # no tile repeats another's noise
    assert len(z.flatten(0, 1).unique(dim=0)) == 20_000


class _OwnNormal(torch.distributions.Normal):
    """Draws in a way of its own: always its mean."""

    def sample(self, sample_shape=()):
        return self.loc.expand(*sample_shape, *self.loc.shape)


@pytest.mark.parametrize(
    "base",
    [
        normal_base(),
        diagonal_normal(torch.zeros(40, 64, 128), torch.ones(40, 64, 128), 3),  # one proposal is more than a unit
        MultivariateNormal(torch.zeros(2), torch.eye(2)),
    ],
    ids=["Normal", "large Normal", "MultivariateNormal"],
)
def test_base_draws_depend_neither_on_chunks_nor_on_what_was_skipped(base):
    torch.manual_seed(1)
    draws = samplers.base_draws(base, (3,))
    if base.event_shape.numel() < 100:
        counts = (2048, 1024, 10)
        whole = draws.draw(sum(counts)).clone()
    else:  # lengths below a tile are chunks, each of which begins another tile
        counts = (2, 1, 1)
        whole = torch.cat([draws.draw(count).clone() for count in counts])
    torch.manual_seed(1)
    draws = samplers.base_draws(base, (3,))
    first = draws.draw(counts[0]).clone()
    draws.skip(counts[1])
    assert torch.equal(whole[: counts[0]], first)
    assert torch.equal(whole[-counts[2] :], draws.draw(counts[2]))


def test_a_class_of_ones_own_draws_in_its_own_way():
    z = samplers.base_draws(torch.distributions.Independent(_OwnNormal(torch.ones(2), torch.ones(2)), 1)).draw(5)
    assert torch.equal(z, torch.ones(5, 2))


def mlp_prior(dim=4):
    torch.manual_seed(2)
    prior = NoiseContrastivePrior(Normal(dim), MLPClassifier(dim, (32, 32)))
    for parameter in prior.classifier.parameters():
        parameter.data *= 2
    return prior


class _Centred(torch.nn.Module):
    """A classifier of one's own, with a buffer, BatchNorm and float32 numbers made in `forward`."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.full((4,), 0.1))
        self.norm, self.linear = torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)

    def forward(self, z, context=None):
        flat = (z - self.centre).reshape(-1, 4)
        return (self.linear(self.norm(flat) + torch.zeros(4)) * 3).squeeze(-1).view(z.shape[:-1])


@pytest.mark.parametrize("classifier", ["mlp", "own", "residual"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_chooses_among_the_same_draws(classifier, dtype):
    prior = mlp_prior()
    if classifier == "own":
        prior = NoiseContrastivePrior(Normal(4), _Centred())
    if classifier == "residual":
        prior = NoiseContrastivePrior(Normal((4, 4, 4)), ResidualClassifier(4, 8, blocks=1))
    before = {name: value.clone() for name, value in prior.classifier.state_dict().items()}
    sampler = SIR(200 if classifier == "residual" else 2000)
    exact, rounded = (
        replace(sampler, dtype=d).sample(prior(), (100,), torch.Generator().manual_seed(4)) for d in (None, dtype)
    )
    same = (exact.z == rounded.z).flatten(1).all(1)
    assert rounded.z.dtype == torch.float32 and same.float().mean() > 0.6  # none would be if the z were rounded too
    d, e = rounded.diagnostics, exact.diagnostics
    assert float(d.ess.mean()) == pytest.approx(float(e.ess.mean()), rel=0.03)
    assert float(d.log_normalizer) == pytest.approx(float(e.log_normalizer), abs=0.02)
    for name, value in prior.classifier.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name])


class _Bare:
    """A distribution with no more than samplers need."""

    base, batch_shape, event_shape = diagonal_normal(torch.zeros(2), torch.ones(2)), torch.Size(), torch.Size([2])

    def log_ratio(self, z):
        return ExactRatio()(z)


def test_a_distribution_needs_no_more_than_the_protocol():
    for sampler in (SIR(2000), Langevin(200, 0.05)):
        z = sampler.sample(_Bare(), (2000,)).z
        assert stats.kstest(z[:, 0], "norm", args=(MEAN, STD)).pvalue > 1e-4
    with pytest.raises(TypeError, match=r"SIR: dtype needs a distribution that has fused\(dtype\).*got _Bare"):
        SIR(10, dtype=torch.bfloat16).sample(_Bare())


class _StandIn:
    """A recorder that keeps the work and counts how often it is replayed."""

    def __init__(self):
        self.replays = 0

    def warm_up(self, work):
        work()

    def capture(self, work):
        def replay():
            self.replays += 1
            work()

        return replay


@pytest.mark.parametrize("num_steps", [1, WARM_UP, WARM_UP + 1, WARM_UP + STEPS_PER_GRAPH, 127])
def test_replays_make_up_the_number_of_steps(num_steps):
    done, recorder = [], _StandIn()
    replayed(lambda: done.append(None), num_steps, recorder)
    assert len(done) == num_steps
    assert recorder.replays == max(0, num_steps - WARM_UP) // STEPS_PER_GRAPH


@pytest.mark.parametrize("space", ["z", "epsilon"])
def test_a_captured_chain_works_on_the_same_memory_to_the_same_end(monkeypatch, space):
    """What the stand-in replays is the work itself; it would be seen if a step left its state in new memory."""
    prior, generator = mlp_prior(), lambda: torch.Generator().manual_seed(3)
    eager = Langevin(34, 0.05, space=space).sample(prior(), (5,), generator()).z
    recorder = _StandIn()
    monkeypatch.setattr("ncpvae.samplers.langevin.CUDARecorder", lambda device: recorder)
    monkeypatch.setattr("ncpvae.samplers.langevin._check_can_be_captured", lambda distribution, z: None)
    graph = Langevin(34, 0.05, space=space, cuda_graph=True).sample(prior(), (5,), generator()).z
    assert torch.equal(eager, graph) and recorder.replays == (34 - WARM_UP) // STEPS_PER_GRAPH


def test_what_cannot_be_captured_is_named():
    class Refusing(_StandIn):
        def capture(self, work):
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    with pytest.raises(RuntimeError, match=r"Langevin: cuda_graph cannot hold a step.*stream is capturing$"):
        replayed(lambda: None, 100, Refusing())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("space", ["z", "epsilon"])
@pytest.mark.parametrize("classifier", [MLPClassifier(64, (32,)), ResidualClassifier(4, 8, blocks=1)])
def test_cuda_graph_gives_the_chain_of_the_eager_loop_bit_for_bit(space, classifier):
    shape = 64 if isinstance(classifier, MLPClassifier) else (4, 4, 4)
    prior = NoiseContrastivePrior(Normal(shape), classifier).cuda()
    eager, graph = (
        Langevin(57, 0.01, space, cuda_graph=c).sample(prior(), (9,), torch.Generator().manual_seed(1)).z
        for c in (False, True)
    )
    assert torch.equal(eager, graph)
    prior.classifier.train()
    with pytest.raises(ValueError, match="Langevin: cuda_graph needs the classifier in eval mode"):
        Langevin(5, cuda_graph=True).sample(prior())


class _Flat(torch.nn.Module):
    def forward(self, z, context=None):
        return (0 * z).sum(-1)


class _ContextOffset(torch.nn.Module):
    """log r = the row's offset, for a base with two rows."""

    def forward(self, z, context=None):
        return (
            (0 * z).sum(-1) + self.offsets.repeat(z.shape[0] // 2) if z.dim() == 2 else (0 * z).sum(-1) + self.offsets
        )


class _Standardised(torch.nn.Module):
    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, z, context=None):
        return -((z - self.mean) / self.std - 0.5).square().sum(-1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SIR(0), ValueError, "SIR: num_proposals must be ≥ 1, got 0"),
        (lambda: SIR(2.5), TypeError, "SIR: num_proposals must be an integer, got float"),
        (lambda: SIR(10, chunk_size=0), ValueError, "SIR: chunk_size must be ≥ 1, got 0"),
        (lambda: SIR(10, min_ess=-1), ValueError, "SIR: min_ess must be finite and > 0, got -1"),
        (
            lambda: SIR(10, min_ess=1, max_proposals=5),
            ValueError,
            "SIR: max_proposals must be ≥ num_proposals, got 5 < 10",
        ),
        (lambda: SIR(10).sample(exact_prior()(), (0,)), ValueError, "SIR: shape must hold at least one sample"),
        (lambda: SIR(10, max_proposals=50), ValueError, "max_proposals is the limit of min_ess"),
        (lambda: SIR(10, min_ess="a"), TypeError, "SIR: min_ess must be a number, got str"),
        (lambda: SIR(10).sample(exact_prior()(), 5), TypeError, "SIR: shape must be a tuple of integers, got 5"),
        (
            lambda: SIR(10).sample(exact_prior()),
            TypeError,
            "SIR: distribution must have base.*got NoiseContrastivePrior",
        ),
        (lambda: SIR(10, dtype=torch.int8), ValueError, "SIR: dtype must be torch.bfloat16, .* got torch.int8"),
        (lambda: SIR(10, dtype="bf16"), ValueError, "SIR: dtype must be torch.bfloat16, .* got bf16"),
        (lambda: Langevin(5, cuda_graph=1), TypeError, "Langevin: cuda_graph must be a bool, got int"),
        (
            lambda: Langevin(5, cuda_graph=True).sample(exact_prior()()),
            ValueError,
            "Langevin: cuda_graph needs a base on a CUDA device, got one on cpu",
        ),
        (lambda: Langevin(5, "a"), TypeError, "Langevin: step_size must be a number, got str"),
        (
            lambda: Langevin(5).sample(exact_prior()(), (0,)),
            ValueError,
            "Langevin: shape must hold at least one sample",
        ),
        (lambda: Langevin(0), ValueError, "Langevin: num_steps must be ≥ 1, got 0"),
        (lambda: Langevin(5, -0.1), ValueError, "Langevin: step_size must be finite and > 0, got -0.1"),
        (lambda: Langevin(5, math.nan), ValueError, "Langevin: step_size must be finite"),
        (lambda: Langevin(5, space="x"), ValueError, "Langevin: space must be 'z' or 'epsilon', got 'x'"),
        (lambda: Langevin(5, temperature=-1.0), ValueError, "Langevin: temperature must be finite and ≥ 0"),
        (
            lambda: Langevin(5, space="epsilon").sample(
                NoiseContrastivePrior(MultivariateNormal(torch.zeros(2), torch.eye(2)), ExactRatio())()
            ),
            TypeError,
            "Langevin: space 'epsilon' needs a Normal base, got MultivariateNormal",
        ),
        (
            lambda: Langevin(200, 100.0).sample(exact_prior()(), (4,)),
            ValueError,
            "step_size must be smaller than 100.0",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


PEAK = """
import resource, sys, warnings
warnings.simplefilter("ignore")
import torch
from ncpvae import SIR, MLPClassifier, NoiseContrastivePrior, Normal
torch.set_num_threads(1)
prior = NoiseContrastivePrior(Normal(2), MLPClassifier(2, (4,)))
SIR(10_000).sample(prior(), (2,))
SIR(int(sys.argv[1])).sample(prior(), (2,))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_peak_memory_does_not_grow_with_the_number_of_proposals():
    """A million proposals for each sample peak within 10 % of ten thousand."""
    few, many = (
        int(subprocess.run([sys.executable, "-c", PEAK, count], capture_output=True, text=True, check=True).stdout)
        for count in ("10000", "1000000")
    )
    assert many < 1.1 * few
