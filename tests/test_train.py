import math
import shutil

import pytest
import torch
from torch import nn
from toy import MEAN, STD

import ncpvae
from ncpvae import MLPClassifier, NoiseContrastivePrior, Normal, TrainingDiverged, fit_ncp, fit_vae
from ncpvae.critics import HybridCritic, NeuralCritic, SelfCritic
from ncpvae.distributions import diagonal_normal
from ncpvae.objectives import CyclicalAnnealing, FreeBits, LinearAnnealing
from ncpvae.train import Aggressive, CheckpointError, adamw
from ncpvae.train.batches import minibatches
from ncpvae.train.engine import learning_rate_factor, train


def codes(n=20_000, dim=2):
    return MEAN + STD * torch.randn(n, dim)


def toy_prior(dim=2):
    torch.manual_seed(0)
    return NoiseContrastivePrior(Normal(dim), MLPClassifier(dim, (64, 64)))


def toy_vae():
    torch.manual_seed(0)
    encoder, decoder = ncpvae.MLPEncoder(2, [16], 2), ncpvae.MLPDecoder(2, [16], (2,))
    return ncpvae.VAE(encoder, decoder, ncpvae.NormalLikelihood(0.3), Normal(2))


def weights(module):
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


@pytest.fixture(scope="module")
def fitted():
    torch.manual_seed(0)
    prior = toy_prior()
    return prior, fit_ncp(prior, codes(), steps=1500, progress=False)


def test_learned_ratio_is_the_known_one(fitted):
    prior, _ = fitted
    z = codes(2000)
    truth = diagonal_normal(torch.full((2,), MEAN), torch.full((2,), STD)).log_prob(
        z
    ) - prior.base_distribution().log_prob(z)
    error = (prior.log_ratio(z) - truth).abs()
    assert error.mean() < 0.1
    assert (truth - truth.mean()).abs().mean() > 5 * error.mean()  # a constant ratio would not do


def test_learned_prior_is_normalised_and_samples_right(fitted):
    prior, _ = fitted
    estimate = prior.estimate_log_normalizer(200_000)
    assert abs(estimate.value) < 0.05
    z = prior.sample((4000,), sampler=ncpvae.SIR(1000))
    assert z.mean().item() == pytest.approx(MEAN, abs=0.05)
    assert z.std().item() == pytest.approx(STD, abs=0.05)


def test_loss_and_jsd_are_those_of_the_optimal_classifier(fitted):
    _, result = fitted
    q, p = codes(400_000), torch.randn(400_000, 2)
    log_r = [
        diagonal_normal(torch.full((2,), MEAN), torch.full((2,), STD)).log_prob(z)
        - diagonal_normal(torch.zeros(2), torch.ones(2)).log_prob(z)
        for z in (q, p)
    ]
    optimum = ncpvae.objectives.nce(*log_r).item()
    assert result.loss == pytest.approx(optimum, abs=0.05)
    assert result.jsd == pytest.approx(math.log(2) - 0.5 * result.loss)
    assert result.trustworthy and 0.5 < result.accuracy < 0.9


def test_equal_distributions_teach_nothing():
    result = fit_ncp(toy_prior(), torch.randn(20_000, 2), steps=200, progress=False)
    assert result.loss == pytest.approx(2 * math.log(2), abs=0.01)
    assert result.accuracy == pytest.approx(0.5, abs=0.03)


def test_easily_separated_classes_warn():
    with pytest.warns(RuntimeWarning, match="too easily.*Normal.fit"):
        result = fit_ncp(toy_prior(), 20 + 0.1 * torch.randn(2000, 2), steps=300, progress=False)
    assert not result.trustworthy


def test_fit_ncp_is_deterministic_and_leaves_the_generator_alone():
    data, results = codes(2000), []
    for seed in (0, 0, 1):
        prior = toy_prior()
        torch.manual_seed(len(results))  # the caller's generator has no say
        before = torch.get_rng_state()
        fit_ncp(prior, data, steps=50, seed=seed, progress=False)
        assert torch.equal(before, torch.get_rng_state())
        results.append(weights(prior.classifier))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_fit_ncp_touches_only_the_classifier():
    vae = toy_vae()
    prior = NoiseContrastivePrior(Normal(2, learn=True), MLPClassifier(2, (8,)))
    base, encoder, classifier = weights(prior.base), weights(vae), weights(prior.classifier)
    fit_ncp(prior, vae=vae, data=torch.randn(500, 2), steps=20, progress=False)
    assert torch.equal(base, weights(prior.base)) and torch.equal(encoder, weights(vae))
    assert not torch.equal(classifier, weights(prior.classifier))
    assert not prior.classifier.training


def test_training_forgets_an_old_log_normalizer():
    prior = toy_prior()
    prior.estimate_log_normalizer(100)
    fit_ncp(prior, codes(500), steps=2, progress=False)
    with pytest.raises(RuntimeError, match="estimate_log_normalizer"):
        prior.log_prob(torch.zeros(2))


@pytest.mark.parametrize("kind", ["distribution", "draws", "module"])
def test_any_vae_will_do(kind):
    class Foreign(nn.Module):
        def encode(self, x):
            return diagonal_normal(x, torch.full_like(x, 0.1))

    module = Foreign()
    vae = {"distribution": module.encode, "draws": lambda x: module.encode(x).sample(), "module": module}[kind]
    result = fit_ncp(toy_prior(), vae=vae, data=codes(2000), steps=100, progress=False)
    assert result.loss < 1.3


def test_own_base_samples_are_used():
    result = fit_ncp(toy_prior(), torch.randn(4000, 2) + 3, torch.randn(4000, 2) + 3, steps=100, progress=False)
    assert result.loss == pytest.approx(2 * math.log(2), abs=0.05)  # against the prior's own base it would fall


def test_early_stopping_keeps_the_best_weights():
    prior = NoiseContrastivePrior(Normal(2), MLPClassifier(2, (256, 256)))
    result = fit_ncp(prior, codes(60), steps=2000, validate_every=20, patience=3, lr=3e-3, progress=False)
    assert result.stopped_early and result.steps < 2000
    losses = {record["step"]: record["validation_nce"] for record in result.history}
    assert result.loss == min(losses.values()) == losses[result.best_step]


def test_fit_vae_learns_and_reports():
    vae, data = toy_vae(), torch.randn(2000, 2)
    result = fit_vae(vae, data, validation=torch.randn(500, 2), steps=300, lr=5e-3, progress=False)
    assert result.history[-1]["validation_loss"] < result.history[0]["validation_loss"] - 0.5
    assert set(result.history[0]) >= {"step", "loss", "reconstruction", "kl", "validation_loss"}
    assert not vae.training


def test_fit_vae_is_deterministic_for_a_seed():
    data, runs = torch.randn(500, 2), []
    for seed in (0, 0, 1):
        vae = toy_vae()
        fit_vae(vae, data, steps=30, seed=seed, progress=False)
        runs.append(weights(vae))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_batches_are_a_function_of_seed_and_step():
    stream = minibatches(10, 3, seed=4)
    all_batches = [next(stream) for _ in range(9)]
    resumed = minibatches(10, 3, seed=4, start_step=5)
    assert torch.equal(next(resumed), all_batches[5])
    epoch = torch.cat(all_batches[:3])
    assert len(set(epoch.tolist())) == 9


def test_learning_rate_schedules():
    cosine = learning_rate_factor("cosine", 100)
    assert cosine(0) == 1 and cosine(50) == pytest.approx(0.5) and cosine(100) == pytest.approx(0)
    assert learning_rate_factor("constant", 100)(70) == 1
    with pytest.raises(ValueError, match="schedule must be 'constant' or 'cosine', got 'step'"):
        learning_rate_factor("step", 100)


def test_nan_names_the_very_step_and_term():
    model = nn.Linear(1, 1)
    seen = iter(range(1, 1000))

    def loss(_):
        step = next(seen)
        good = model.weight.sum() ** 2
        return {"total": good, "penalty": good * (math.nan if step == 37 else 1.0)}

    with pytest.raises(TrainingDiverged, match="step 37: loss term 'penalty' is nan"):
        train(model, loss, iter(int, 1), steps=100, lr=1e-3, progress=False)


def test_progress_bar_is_shown_or_not(capfd):
    data = torch.randn(100, 2)
    fit_vae(toy_vae(), data, steps=5, progress=False)
    assert capfd.readouterr().err == ""
    fit_vae(toy_vae(), data, steps=5, progress=True)
    assert "VAE" in capfd.readouterr().err


def test_held_out_base_draws_are_not_trained_on(monkeypatch):
    seen = []
    base = Normal(2)().__class__
    original = base.sample
    monkeypatch.setattr(base, "sample", lambda self, shape=(): seen.append(original(self, shape)) or seen[-1])
    fit_ncp(toy_prior(), codes(500), steps=5, progress=False)
    held_out, trained = seen[0], torch.cat(seen[1:])
    assert len(held_out) == 4096 and len(trained) >= 5 * 450
    both = torch.cat([held_out, trained[len(trained) % 2 :]])
    assert len(both.unique(dim=0)) == len(both)  # no pair of coordinates is drawn twice


def test_a_failed_run_leaves_finite_weights_in_eval_mode():
    model = nn.Linear(1, 1)
    values = iter(range(1, 1000))

    def loss(_):
        return {"total": (model.weight * (math.nan if next(values) > 30 else 1.0)).sum() ** 2}

    with pytest.raises(TrainingDiverged):
        train(
            model, loss, iter(int, 1), steps=100, lr=0.1, validate=lambda: {"v": 1.0}, validate_every=10, progress=False
        )
    assert torch.isfinite(weights(model)).all() and not model.training


def test_other_dtypes_are_brought_to_the_classifiers():
    fit_ncp(toy_prior(), codes(100).double(), torch.randn(100, 2).double(), steps=2, progress=False)
    fit_ncp(toy_prior(), vae=lambda x: x.double(), data=codes(100), steps=2, progress=False)


class TwoLogits(nn.Linear):
    def forward(self, z, context=None):
        return super().forward(z)


def prior_of(classifier, dim=2):
    return NoiseContrastivePrior(Normal(dim), classifier)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fit_ncp(nn.Linear(2, 1), codes(10)), TypeError, "prior must be a NoiseContrastivePrior, got Linear"),
        (lambda: fit_ncp(toy_prior()), ValueError, "exactly one of posterior_samples and vae"),
        (lambda: fit_ncp(toy_prior(), vae=toy_vae()), ValueError, "vae and data must be given together"),
        (lambda: fit_ncp(toy_prior(), torch.zeros(0, 2)), ValueError, r"posterior_samples must be \[N, …\] with N ≥ 2"),
        (lambda: fit_ncp(toy_prior(), codes().tolist()), TypeError, "posterior_samples must be a tensor"),
        (lambda: fit_ncp(toy_prior(), codes(dim=3)), ValueError, r"base's event shape \(2,\) per row, got \(3,\)"),
        (
            lambda: fit_ncp(toy_prior(), codes(50), codes(50, 3)),
            ValueError,
            "base_samples must have the base's event shape",
        ),
        (lambda: fit_ncp(prior_of(MLPClassifier(4)), codes(50)), ValueError, "MLPClassifier: z must be"),
        (lambda: fit_ncp(prior_of(TwoLogits(2, 2)), codes(50)), ValueError, "one logit per z"),
        (lambda: fit_ncp(prior_of(nn.Identity()), codes(50)), ValueError, "must have parameters to train"),
        (lambda: fit_ncp(toy_prior(), torch.full((50, 2), math.nan)), ValueError, "NaN or infinity in row 0"),
        (lambda: fit_ncp(toy_prior(), codes(50), steps=0), ValueError, "steps must be ≥ 1, got 0"),
        (lambda: fit_ncp(toy_prior(), codes(50), lr=-1.0), ValueError, "lr must be finite and > 0, got -1.0"),
        (
            lambda: fit_ncp(toy_prior(), codes(50), validation_fraction=0.0),
            ValueError,
            "validation_fraction must be between",
        ),
        (lambda: fit_ncp(toy_prior(), vae=lambda x: "q", data=codes(50)), TypeError, "vae must return a Distribution"),
        (
            lambda: fit_ncp(toy_prior(), codes(50), validation=codes(50, 3)),
            ValueError,
            "validation must have the base's",
        ),
        (lambda: fit_ncp(toy_prior(), codes(50, 3), validation=codes(50)), ValueError, "posterior_samples must have"),
        (
            lambda: fit_ncp(toy_prior(), codes(50), batch_size=12.5),
            TypeError,
            "batch_size must be an integer, got float",
        ),
        (lambda: fit_ncp(toy_prior(), codes(50), patience=-1), ValueError, "patience must be ≥ 1, got -1"),
        (lambda: fit_ncp(toy_prior(), codes(50), seed=2**70), ValueError, "seed must be ≥ 0"),
        (lambda: fit_ncp(toy_prior(), codes(50), lr="a"), ValueError, "lr must be finite and > 0, got 'a'"),
        (lambda: fit_ncp(toy_prior(), torch.zeros(50, 2, dtype=torch.cfloat)), TypeError, "must be real"),
        (lambda: fit_vae(nn.Linear(2, 2), codes(50)), TypeError, "vae must be a VAE, got Linear"),
        (lambda: fit_vae(toy_vae(), torch.zeros(0, 2)), ValueError, r"fit_vae: data must be \[N, …\]"),
        (lambda: fit_vae(toy_vae(), torch.tensor([[1.0, math.inf]])), ValueError, "data must be finite.*row 0"),
        (lambda: fit_vae(toy_vae(), codes(50), schedule="step"), ValueError, "schedule must be"),
        (lambda: fit_vae(toy_vae(), codes(50), batch_size=0), ValueError, "batch_size must be ≥ 1, got 0"),
        (
            lambda: fit_vae(toy_vae(), codes(50), validation=(x for x in [codes(9)]), steps=4, validate_every=2),
            ValueError,
            "validation must be an iterable of batches that can be gone through again, got no batch",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- critics and remedies against collapse ---------------------------------------------------------------------------


def test_beta_follows_its_schedule():
    seen = []

    def beta(step):
        seen.append(step)
        return 0.0

    x = torch.randn(64, 2)
    result = fit_vae(
        toy_vae(), x, validation=x, steps=6, validate_every=3, kl_weight=beta, batch_size=16, progress=False
    )
    assert list(dict.fromkeys(seen)) == [0, 1, 2, 5, 3, 4]  # validation, after three steps, asks for the last one's
    assert set(seen) == {*range(6)}
    record = result.history[-1]
    assert record["validation_loss"] == pytest.approx(record["validation_reconstruction"])


def test_aggressive_steps_leave_the_decoder_alone():
    vae, x = toy_vae(), torch.randn(64, 2)
    decoder, encoder = weights(vae.decoder), weights(vae.encoder)
    common = {"batch_size": 16, "progress": False, "lr": 0.01, "schedule": "constant"}
    fit_vae(vae, x, steps=3, aggressive=Aggressive(inner_steps=3, steps=100), **common)
    assert torch.equal(weights(vae.decoder), decoder)
    assert not torch.equal(weights(vae.encoder), encoder)
    assert all(p.requires_grad for p in vae.parameters())
    vae = toy_vae()
    fit_vae(vae, x, steps=4, aggressive=Aggressive(inner_steps=3, steps=100), **common)
    assert not torch.equal(weights(vae.decoder), decoder)
    only = [Aggressive(2, 5).encoder_only(step) for step in range(8)]
    assert only == [True, True, False, True, True, False, False, False]
    with pytest.raises(ValueError, match=r"Aggressive: inner_steps must be ≥ 1, got 0"):
        Aggressive(0, 5)


def test_free_bits_keep_the_kl_from_falling():
    x = torch.randn(256, 2)

    def kl(free_bits):
        vae = toy_vae()
        vae.likelihood = ncpvae.NormalLikelihood(5.0)
        options = {"steps": 200, "batch_size": 64, "lr": 0.01, "free_bits": free_bits, "progress": False}
        return fit_vae(vae, x, validation=x, **options).history[-1]["validation_kl"]

    assert kl(None) < 0.2
    assert kl(ncpvae.objectives.FreeBits(1.0)) > 0.7


@pytest.mark.parametrize("kind", ["self", "hybrid"])
def test_a_run_with_a_critic_resumes_to_the_same_weights(kind, tmp_path):
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(1))

    def run(folder, steps, **options):
        vae = toy_vae()
        torch.manual_seed(1)
        critic = SelfCritic() if kind == "self" else HybridCritic(vae, 1, hidden=8, width=4)
        fit_vae(
            vae, x, validation=x[:20], critic=critic, critic_weight=5.0, steps=12, validate_every=4, batch_size=16,
            optimizer=adamw(0.01, 0.01), progress=False, folder=folder, **options,
        )  # fmt: skip
        return torch.cat([weights(vae), weights(critic) if kind == "hybrid" else torch.zeros(0)])

    whole = run(tmp_path / "whole", 12)
    torch.testing.assert_close(run(None, 12), whole, rtol=0, atol=0)
    cut = tmp_path / "cut"
    run(cut, 12)
    for later in sorted((cut / "checkpoints").iterdir())[1:]:
        shutil.rmtree(later)
    torch.testing.assert_close(run(cut, 12, resume="auto"), whole, rtol=0, atol=0)


def test_a_checkpoint_of_another_objective_is_refused(tmp_path):
    """Whatever changes the objective is compared, what is off included."""
    x = torch.randn(64, 2)

    def run(folder, resume="never", **options):
        torch.manual_seed(1)
        common = {"steps": 4, "validate_every": 2, "batch_size": 16, "progress": False, "resume": resume}
        fit_vae(toy_vae(), x, validation=x[:20], folder=folder, **common, **options)

    def neural(**options):
        return NeuralCritic(torch.nn.Linear(2, 4), torch.nn.Linear(2, 4), **options)

    first = {"free_bits": FreeBits(1.0), "aggressive": Aggressive(1, 2), "kl_weight": LinearAnnealing(4)}
    cases = [({name: value}, {}) for name, value in first.items()]
    cases += [
        ({"kl_weight": LinearAnnealing(4)}, {"kl_weight": CyclicalAnnealing(4)}),
        ({"kl_weight": 0.1}, {"kl_weight": LinearAnnealing(4)}),
        ({"critic": SelfCritic()}, {"critic": SelfCritic(symmetric=True)}),
        ({"critic": SelfCritic()}, {"critic": SelfCritic(min_log_std=-3.0)}),
        ({"critic": neural()}, {"critic": neural(scale="linear")}),
        ({"critic": neural()}, {"critic": neural(max_scale=50.0)}),
    ]
    for number, (before, after) in enumerate(cases):
        run(tmp_path / str(number), **before)
        with pytest.raises(CheckpointError, match=r"is of a run with (free_bits|aggressive|kl_weight|critic) = "):
            run(tmp_path / str(number), resume="auto", **after)


def test_a_critic_needs_two_examples_to_validate_on():
    x = torch.randn(40, 2)
    with pytest.raises(ValueError, match=r"at least 2 rows for z to be told apart, got 1"):
        fit_vae(toy_vae(), x, validation=x[:1], critic=SelfCritic(), steps=2, batch_size=8, progress=False)
    result = fit_vae(toy_vae(), x, validation=x[:17], critic=SelfCritic(), steps=2, batch_size=8, progress=False)
    assert result.history[-1]["validation_critic"] <= 0  # in three parts, none of a single row
    result = fit_vae(toy_vae(), x, validation=x[:5], critic=SelfCritic(), steps=2, batch_size=2, progress=False)
    assert result.history[-1]["validation_critic"] <= 0  # in two
