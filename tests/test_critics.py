"""Critics against all pairs written out, their gradients, their bound on I(x; z), their negatives across processes."""

import math
import subprocess
import sys

import pytest
import torch
from processes import run_processes
from torch import distributed as dist
from torch import nn
from torch.distributions import Independent, Laplace, MultivariateNormal

from ncpvae import VAE, ConvEncoder, MLPDecoder, MLPEncoder, Normal, NormalLikelihood, fit_vae
from ncpvae.critics import HybridCritic, NeuralCritic, SelfCritic
from ncpvae.distributions import BernoulliLikelihood, diagonal_normal
from ncpvae.info import info
from ncpvae.nn import mlp
from ncpvae.objectives import VAELoss, info_nce
from ncpvae.train import Execution, adamw
from ncpvae.train.engine import train
from ncpvae.vae import GaussianEncoder, StackedConvDecoder, StackedConvEncoder

LAYERS = ((4, 3, 1), (8, 4, 2), (6, 2, 1))


def posterior_of(n, d, log_std=-1.0, dtype=torch.float64):
    std = (log_std + 0.3 * torch.randn(n, d, dtype=dtype)).exp()
    return diagonal_normal(torch.randn(n, d, dtype=dtype).requires_grad_(), std.requires_grad_())


def all_pairs(posterior, z):
    """log q(z_n|x_k): rows are codes, columns examples."""
    return posterior.log_prob(z[:, None])


def small_vae(d=3, features=4):
    return VAE(MLPEncoder(features, [16, 8], d), MLPDecoder(d, [16], (features,)), NormalLikelihood(0.3), Normal(d))


def conv_vae():
    shape = (1, 8, 8)
    decoder = StackedConvDecoder(2, LAYERS, shape)
    return VAE(StackedConvEncoder(shape, LAYERS, 2, scale="exp"), decoder, NormalLikelihood(0.5), Normal(2))


# --- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_std", [0.5, -1.0, -4.0])
def test_the_self_critic_sums_the_posterior_over_all_pairs(log_std):
    q = posterior_of(33, 5, log_std)
    z = q.rsample()
    dense = all_pairs(q, z)
    found = SelfCritic(min_log_std=-10.0, symmetric=True)(None, q, z)
    torch.testing.assert_close(found.positive, dense.diagonal())
    torch.testing.assert_close(found.log_sum_x, dense.logsumexp(1))
    torch.testing.assert_close(found.log_sum_z, dense.logsumexp(0))
    assert SelfCritic()(None, q, z).log_sum_z is None


def test_the_sum_over_codes_is_exact_down_to_the_lowest_floor():
    mean, z = torch.randn(2, 20, 32, dtype=torch.float64)
    std = torch.full((20, 32), math.exp(-10.0), dtype=torch.float64)
    z = mean + std * z
    dense = all_pairs(diagonal_normal(mean, std), z)
    found = SelfCritic(min_log_std=-10.0, symmetric=True)(None, diagonal_normal(mean, std), z)
    torch.testing.assert_close(found.log_sum_z, dense.logsumexp(0), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="min_log_std must be ≥ -10 where symmetric, .* got -10.5"):
        SelfCritic(min_log_std=-10.5, symmetric=True)


def test_the_self_critic_has_the_gradient_of_all_pairs():
    q = posterior_of(12, 3)
    z = q.rsample()
    parameters = [q.base_dist.loc, q.base_dist.scale]
    dense = all_pairs(q, z)
    expected = (dense.diagonal() - dense.logsumexp(1)).mean()
    found = info_nce(*SelfCritic(min_log_std=-20.0)(None, q, z))
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        torch.autograd.grad(found, parameters, retain_graph=True),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_the_self_critic_takes_any_posterior_that_broadcasts():
    q = Independent(Laplace(torch.randn(7, 2), torch.ones(7, 2)), 1)
    z = q.rsample()
    found = SelfCritic(symmetric=True)(None, q, z)
    torch.testing.assert_close(found.log_sum_x, all_pairs(q, z).logsumexp(1))
    full = MultivariateNormal(torch.randn(7, 2), torch.eye(2).expand(7, 2, 2))
    assert SelfCritic()(None, full, full.rsample()).log_sum_x.shape == (7,)


def test_below_the_floor_smaller_sigma_is_not_rewarded():
    mean = 3 * torch.randn(20, 4)
    log_std = torch.full((20, 4), -7.0, requires_grad=True)
    z = mean + 0.001 * torch.randn(20, 4)  # not by way of σ: only the score's own gradient is looked at
    c = info_nce(*SelfCritic(min_log_std=-5.0)(None, diagonal_normal(mean, log_std.exp()), z))
    assert torch.autograd.grad(c, log_std)[0].abs().max() == 0
    c = info_nce(*SelfCritic(min_log_std=-9.0)(None, diagonal_normal(mean, log_std.exp()), z))
    assert torch.autograd.grad(c, log_std)[0].abs().max() > 0


def test_posteriors_as_narrow_as_encoders_make_them_give_finite_scores():
    q = diagonal_normal(torch.randn(50, 32), torch.full((50, 32), math.exp(-10)))
    for symmetric in (False, True):
        c = info_nce(*SelfCritic(symmetric=symmetric)(None, q, q.sample()))
        assert -1e-3 < c <= 1e-6


@pytest.mark.parametrize("scale", ["exp", "linear"])
def test_the_neural_critic_scores_all_cosines(scale):
    x_head, z_head = (mlp([d, 6, 5]).double() for d in (4, 3))
    critic = NeuralCritic(x_head, z_head, scale=scale, symmetric=True).double()
    x, q = torch.randn(21, 4, dtype=torch.float64), posterior_of(21, 3)
    z = q.rsample()
    cosine = torch.cosine_similarity(z_head(z)[:, None], x_head(x)[None], dim=2)
    assert critic.scale().item() == pytest.approx(1 / 0.07 if scale == "exp" else math.log(1 / 0.07))
    scores = critic.scale() * cosine
    found = critic(x, q, z)
    torch.testing.assert_close(found.positive, scores.diagonal())
    torch.testing.assert_close(found.log_sum_x, scores.logsumexp(1))
    torch.testing.assert_close(found.log_sum_z, scores.logsumexp(0))


def test_the_scale_stops_at_its_limit_and_comes_back():
    critic = NeuralCritic(nn.Linear(2, 2), nn.Linear(2, 2), max_scale=20.0)
    with torch.no_grad():
        critic.scale_parameter.fill_(10.0)
    assert critic.scale().item() == pytest.approx(20.0)
    assert torch.autograd.grad(-critic.scale(), critic.scale_parameter)[0] == 0  # to make it larger still
    assert torch.autograd.grad(critic.scale(), critic.scale_parameter)[0] > 0
    linear = NeuralCritic(nn.Linear(2, 2), nn.Linear(2, 2), scale="linear")
    with torch.no_grad():
        linear.scale_parameter.fill_(-1.0)
    assert linear.scale() == 0
    assert torch.autograd.grad(-linear.scale(), linear.scale_parameter)[0] < 0


def test_one_critic_scores_two_draws_of_a_batch():
    critic, q = NeuralCritic(nn.Linear(4, 5), nn.Linear(3, 5)), posterior_of(6, 3, dtype=torch.float32)
    x = torch.randn(6, 4)
    (info_nce(*critic(x, q, q.rsample())) + info_nce(*critic(x, q, q.rsample()))).backward()
    assert critic.scale_parameter.grad is not None


def test_a_sigma_of_zero_has_finite_gradients():
    mean, std = torch.randn(6, 3, requires_grad=True), torch.zeros(6, 3, requires_grad=True)
    c = info_nce(*SelfCritic()(None, diagonal_normal(mean, std), mean.detach()))
    for gradient in torch.autograd.grad(c, (mean, std)):
        assert torch.isfinite(gradient).all()


def test_under_autocast_the_bound_still_holds():
    """Cosines of 1 at a scale of 100: rounded to 16 bits, the sum over all would fall below its own part."""
    x = torch.randn(64, 8)
    critic = NeuralCritic(nn.Identity(), nn.Identity(), initial_scale=100.0)
    q = diagonal_normal(x, torch.ones_like(x))
    with torch.autocast("cpu", torch.bfloat16):
        found = critic(x, q, x)
    assert (found.positive <= found.log_sum_x + 1e-4).all()


@pytest.mark.parametrize("share", range(4))
def test_a_hybrid_critic_shares_the_first_layers_and_no_others(share):
    vae = conv_vae()
    critic = HybridCritic(vae, share, hidden=8, width=4)
    x = torch.rand(5, 1, 8, 8)
    posterior, seen = critic.encode(vae, x)
    torch.testing.assert_close(posterior.mean, vae.encode(x).mean)
    info_nce(*critic(seen, posterior, posterior.rsample().detach())).backward()
    weights = [m.weight for m in vae.encoder.network if hasattr(m, "weight")]
    assert [w.grad is not None for w in weights] == [i < share for i in range(4)]
    own = {id(p) for p in critic.parameters()}
    assert not own & {id(p) for p in vae.parameters()}
    fresh = [m.weight for m in critic.heads.x_head[0] if hasattr(m, "weight")]
    assert len(fresh) == 4 - share
    assert all(not torch.equal(a, b) for a, b in zip(fresh, weights[share:], strict=True))


def test_an_encoder_in_batches_is_shared_as_well():
    vae = VAE(ConvEncoder((1, 8, 8), (4, 8), 2, kernel_size=3), nn.Identity(), NormalLikelihood(), Normal(2))
    assert vae.encoder.num_layers == 3  # norms are no layers of their own
    vae.eval()
    x = torch.rand(4, 1, 8, 8)
    for share in range(3):
        torch.testing.assert_close(HybridCritic(vae, share).encode(vae, x)[0].mean, vae.encode(x).mean)


def test_a_share_past_the_end_and_encoders_without_layers_are_refused():
    vae = conv_vae()
    for share in (4, -1, 1.0, True):
        with pytest.raises(ValueError, match=r"share must be an integer in 0 … 3 for an encoder of 4 layers"):
            HybridCritic(vae, share)
    vae.encoder = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"vae.encoder must offer begin, finish and remainder"):
        HybridCritic(vae, 0)
    with pytest.raises(ValueError, match=r"0 … 0"):
        GaussianEncoder(nn.Bilinear(2, 2, 2)).begin(torch.zeros(2, 2), 1)


# --- the objective --------------------------------------------------------------------------------------------------


def test_the_heads_of_a_deep_encoder_tell_examples_apart_from_the_start():
    """With torch's own initialisation they hardly do, and the critic learns so late that z may have collapsed."""
    encoder = MLPEncoder(20, [32] * 10, 4, nn.ReLU)
    vae = VAE(encoder, MLPDecoder(4, [8], (20,)), BernoulliLikelihood(), Normal(4))
    torch.manual_seed(0)
    x = torch.rand(100, 20).round()

    def likeness(head):
        features = nn.functional.normalize(head(x).flatten(1), dim=1)
        return float((features.detach() @ features.detach().T).mean())

    critic = HybridCritic(vae, 0)
    assert likeness(encoder.remainder(0)) > 0.99 and likeness(critic.heads.x_head) < 0.97
    assert all(not p.any() for name, p in critic.heads.x_head.named_parameters() if name.endswith("bias"))


def test_the_bound_holds_and_is_tight_for_the_optimal_critic():
    """x ~ N(0, I), q(z|x) = N(x, s²): I(x; z) = D/2·log(1 + 1/s²); with the posterior as critic N must exceed e^I."""
    d, s, n = 2, 0.4, 4096
    x = torch.randn(n, d, dtype=torch.float64)
    q = diagonal_normal(x, torch.full_like(x, s))
    information = 0.5 * d * math.log(1 + 1 / s**2)
    bound = float(info_nce(*SelfCritic()(None, q, q.sample()))) + math.log(n)
    assert bound == pytest.approx(information, abs=0.06)
    few = diagonal_normal(x[:4], torch.full_like(x[:4], 0.01))
    assert float(info_nce(*SelfCritic()(None, few, few.sample()))) <= 1e-12


def test_both_directions_are_averaged():
    a, b, c = torch.randn(3, 9)
    assert float(info_nce(a, b, c)) == pytest.approx(0.5 * float(info_nce(a, b) + info_nce(a, c)), abs=1e-6)
    assert math.isnan(info_nce(torch.tensor([0.0, math.nan]), torch.ones(2)))
    with pytest.raises(ValueError, match=r"info_nce: positive and the log-sums must be \[N\] alike"):
        info_nce(a, b[:5])


def test_batches_that_do_not_fit_are_named():
    q, critic = posterior_of(6, 3), NeuralCritic(nn.Linear(4, 5).double(), nn.Linear(3, 5).double())
    z = q.rsample()
    with pytest.raises(ValueError, match=r"NeuralCritic: x must have as many rows as z, 6, got 5"):
        critic(torch.randn(5, 4, dtype=torch.float64), q, z)
    with pytest.raises(ValueError, match=r"SelfCritic: posterior must have as many rows as z, 5, got 6"):
        SelfCritic()(None, q, z[:5])
    with pytest.raises(ValueError, match=r"at least 2 rows for z to be told apart, got 1"):
        SelfCritic()(None, posterior_of(1, 3), z[:1])
    with pytest.raises(ValueError, match=r"z must be \[N, D\], got shape \(6,\)"):
        SelfCritic()(None, q, z[:, 0])
    wide = NeuralCritic(nn.Linear(4, 5).double(), nn.Linear(3, 7).double())
    with pytest.raises(ValueError, match=r"features of one shape \[N, E\], got \(6, 5\) and \(6, 7\)"):
        wide(torch.randn(6, 4, dtype=torch.float64), q, z)
    for options in ({"scale": "log"}, {"initial_scale": 200.0}, {"initial_scale": 0.0}):
        with pytest.raises(ValueError, match=r"NeuralCritic: (scale|initial_scale) must be"):
            NeuralCritic(nn.Identity(), nn.Identity(), **options)


@pytest.mark.parametrize("kind", ["self", "neural"])
def test_the_loss_is_the_bound_less_the_weighted_critic(kind):
    vae = small_vae()
    critic = SelfCritic() if kind == "self" else HybridCritic(vae, 0, hidden=8, width=4)
    x = torch.randn(10, 4)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        terms = VAELoss(vae, critic, 3.0)(x, 0.5)
    expected = terms["reconstruction"] + 0.5 * terms["kl"] - 3.0 * terms["critic"]
    torch.testing.assert_close(terms["loss"], expected)
    assert terms["critic"] <= 0
    terms["loss"].backward()
    assert all(p.grad is not None for p in vae.encoder.parameters())
    assert all(p.grad is not None for p in critic.parameters())


def test_training_with_a_critic_raises_the_information_in_z():
    """A decoder that can do without z: the KL of a plain VAE goes to zero, and with a critic it does not."""
    x = torch.randn(512, 4, generator=torch.Generator().manual_seed(0))

    def kl(build):
        torch.manual_seed(0)
        vae = small_vae()
        vae.likelihood = NormalLikelihood(4.0)
        options = {"critic": build(vae), "critic_weight": 2.0} if build else {}
        result = fit_vae(vae, x, validation=x, steps=500, batch_size=64, lr=3e-3, progress=False, **options)
        return result.history[-1]["validation_kl"]

    plain, self_critic, hybrid = (kl(b) for b in (None, lambda vae: SelfCritic(), lambda vae: HybridCritic(vae, 1)))
    assert plain < 0.2
    assert self_critic > 0.5
    assert hybrid > 0.5


@pytest.mark.parametrize("kind", ["self", "hybrid"])
def test_a_compiled_loss_with_a_critic_trains_the_same(kind):
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))

    def trained(execution):
        torch.manual_seed(0)
        vae = small_vae()
        critic = SelfCritic() if kind == "self" else HybridCritic(vae, 1, hidden=8, width=4)
        settings = {"steps": 3, "batch_size": 16, "validation": x, "progress": False, "execution": execution}
        return fit_vae(vae, x, critic=critic, critic_weight=2.0, **settings).history[-1]["validation_critic"]

    assert trained(Execution(compile="aot_eager")) == pytest.approx(trained(Execution()), rel=1e-5)


def test_the_moving_average_is_of_the_critic_too():
    """One that hardly moves: its weights are those of the first step, from which it starts."""
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))

    def trained(steps, execution):
        torch.manual_seed(0)
        vae = small_vae()
        critic = HybridCritic(vae, 1, hidden=8, width=4)
        settings = {"batch_size": 64, "schedule": "constant", "progress": False, "execution": execution}
        fit_vae(vae, x, critic=critic, steps=steps, **settings)
        return torch.cat([p.detach().flatten() for p in critic.parameters()])

    first, fifth = trained(1, Execution()), trained(5, Execution())
    assert not torch.allclose(first, fifth, atol=1e-4)
    torch.testing.assert_close(trained(5, Execution(ema_decay=1 - 1e-7)), first, rtol=0, atol=1e-6)


def test_the_learned_scale_does_not_decay():
    critic = NeuralCritic(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = adamw(0.1, 1e-3)(list(critic.parameters()))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays[id(critic.scale_parameter)] == 0.0
    assert decays[id(critic.x_head.weight)] == 0.1


# --- several processes ----------------------------------------------------------------------------------------------

PAIRS = torch.randn(48, 4 + 3, generator=torch.Generator().manual_seed(5))  # x, and the noise of z


def train_on_pairs(kind, symmetric):
    """A few steps on c alone, noise being data: the same function of the whole batch however it is cut."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        vae = small_vae()
        options = {"symmetric": symmetric}
        critic = SelfCritic(**options) if kind == "self" else HybridCritic(vae, 1, hidden=8, width=4, **options)
    model = nn.ModuleList([vae.encoder, critic])

    def loss(batch):
        posterior, seen = critic.encode(vae, batch[:, :4])
        z = posterior.mean + posterior.stddev * batch[:, 4:]
        return {"loss": -info_nce(*critic(seen, posterior, z))}

    batches = [PAIRS[i % 3 * 16 : i % 3 * 16 + 16] for i in range(6)]
    train(model, loss, batches, steps=6, lr=0.01, progress=False, schedule="constant",
          optimizer=lambda p: torch.optim.SGD(p, lr=0.05))  # fmt: skip
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", ["self", "hybrid"])
def test_two_processes_have_the_negatives_and_the_gradient_of_one(kind, symmetric):
    expected = train_on_pairs(kind, symmetric)
    first, second = run_processes(train_on_pairs, 2, kind, symmetric)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, expected, rtol=2e-5, atol=2e-6)


def scores_of_a_rank():
    """In training the sums are over both ranks' pairs; in eval mode over this rank's own, without communication."""
    mine = PAIRS.chunk(2)[dist.get_rank()]
    q = diagonal_normal(mine[:, :3], torch.full((len(mine), 3), 0.5))
    critic = SelfCritic(symmetric=True)
    training = critic(None, q, mine[:, 4:])
    return training.log_sum_x, training.log_sum_z, critic.eval()(None, q, mine[:, 4:]).log_sum_x


def test_other_ranks_are_negatives_in_training_alone():
    q = diagonal_normal(PAIRS[:, :3], torch.full((48, 3), 0.5))
    whole = SelfCritic(symmetric=True)(None, q, PAIRS[:, 4:])
    parts = run_processes(scores_of_a_rank, 2)
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), whole.log_sum_x)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), whole.log_sum_z)
    alone = diagonal_normal(PAIRS[:24, :3], torch.full((24, 3), 0.5))
    torch.testing.assert_close(parts[0][2], SelfCritic()(None, alone, PAIRS[:24, 4:]).log_sum_x)


def unequal_ranks():
    rows = PAIRS[: 4 - dist.get_rank()]
    with pytest.raises(ValueError, match="every process must have equally many rows, got 4, 3"):
        SelfCritic()(None, diagonal_normal(rows[:, :3], torch.full((len(rows), 3), 0.5)), rows[:, 4:])
    return True


def test_ranks_with_unequal_batches_are_told_so():
    assert run_processes(unequal_ranks, 2) == [True, True]


# --- memory ---------------------------------------------------------------------------------------------------------

LARGE = """
import resource, torch
from ncpvae import ops
from ncpvae.critics import NeuralCritic, SelfCritic
from ncpvae.distributions import BernoulliLikelihood, diagonal_normal
from ncpvae.objectives import info_nce
from torch import nn

def step(n):
    mean = torch.randn(n, 4, requires_grad=True)
    q = diagonal_normal(mean, torch.full((n, 4), 0.3))
    z = q.rsample()
    neural = NeuralCritic(nn.Linear(4, 4), nn.Linear(4, 4))
    (info_nce(*SelfCritic()(None, q, z)) + info_nce(*neural(mean, q, z))).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

print(step(1024), step(32768))
"""


def test_a_large_batch_needs_no_square_of_it():
    """The scores of 32,768 pairs alone would be 4 GiB for each critic."""
    if "libncpvae_cpu" not in info():
        pytest.skip("slow without the compiled kernels")
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True, timeout=300)
    small, large = map(float, done.stdout.split())
    assert large - small < 400, f"{small:.0f} MiB became {large:.0f}"
