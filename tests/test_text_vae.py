"""VAEs of text: likelihoods against sums over tokens, decoding against all texts there are."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

import ncpvae
from ncpvae import data, metrics, objectives, text_vae
from ncpvae._tokens import BOS, EOS, PAD, UNK
from ncpvae.text_vae import TextEncoder, TextLikelihood
from ncpvae.train import fit_ncp, fit_vae

V, D, LONGEST = 7, 2, 3  # words <unk>, 4, 5, 6


def tiny(vocabulary_size=V, spread=0.5, **options):
    """A VAE of text in eval mode whose distributions over tokens are far from uniform."""
    torch.manual_seed(0)
    options = {"embedding_dim": 5, "hidden_dim": 8, "max_length": LONGEST} | options
    vae = text_vae.text_vae(vocabulary_size, D, ncpvae.Normal(D), **options)
    with torch.no_grad():
        for p in vae.parameters():
            p.copy_(spread * torch.randn(p.shape))
    return vae.eval()


def rows(*texts):
    """Texts as lists of words → padded rows."""
    longest = max(map(len, texts)) + 2
    return torch.tensor([[BOS, *t, EOS, *[PAD] * (longest - len(t) - 2)] for t in texts])


def all_texts(words=(UNK, *range(4, V)), longest=LONGEST):
    return [t for n in range(longest + 1) for t in itertools.product(words, repeat=n)]


def same(a, b):
    """Rows are alike up to their padding."""
    width = max(a.shape[-1], b.shape[-1])
    return F.pad(a, (0, width - a.shape[-1])).equal(F.pad(b, (0, width - b.shape[-1])))


X = rows([4, 5, 6], [1], [], [6, 6, 6, 5, 4])


# The likelihood


@torch.no_grad()
def test_log_prob_is_the_sum_over_tokens_up_to_eos():
    vae = tiny()
    z = torch.randn(len(X), D)
    network, expected = vae.likelihood, []
    for row, code in zip(X, z, strict=True):
        state, total = network.first_state(code[None]), 0.0
        for before, after in itertools.pairwise(row[row != PAD]):
            logits, state = network.advance(before[None], code[None], state)
            total += float(logits.log_softmax(1)[0, after])
        expected.append(total)
    torch.testing.assert_close(vae.decode(z).log_prob(X), torch.tensor(expected))


def test_the_probabilities_of_all_texts_add_up_to_one():
    vae = tiny()
    z = torch.randn(1, D)
    finished = rows(*(t for t in all_texts() if len(t) < LONGEST))
    cut = torch.tensor([[BOS, *t] for t in all_texts() if len(t) == LONGEST])
    total = sum(vae.decode(z).log_prob(x).exp().sum().item() for x in (finished, cut))
    assert total == pytest.approx(1.0, abs=1e-5)


def test_log_prob_broadcasts_over_draws_and_does_not_see_the_padding():
    vae = tiny()
    z = torch.randn(3, len(X), D)
    many = vae.decode(z)
    assert many.batch_shape == (3, len(X)) and many.event_shape == (LONGEST + 2,)
    log_p = many.log_prob(F.pad(X, (0, 4)))
    assert log_p.shape == (3, len(X))
    for s, b in itertools.product(range(3), range(len(X))):
        alone = vae.decode(z[s, b]).log_prob(X[b : b + 1, : int((X[b] != PAD).sum())])
        torch.testing.assert_close(log_p[s, b], alone[0])
    pairs = vae.decode(z[0][:, None]).log_prob(X)  # every z with every x
    torch.testing.assert_close(pairs.diagonal(), log_p[0])


def test_parts_change_nothing_and_bound_what_is_held(monkeypatch):
    vae, widest = tiny(), []
    z = torch.randn(6, len(X), D)
    whole = vae.decode(z).log_prob(X)
    monkeypatch.setattr(text_vae, "MAX_ELEMENTS", 100)
    logits = TextLikelihood.logits
    monkeypatch.setattr(TextLikelihood, "logits", lambda *a: widest.append((out := logits(*a)).numel()) or out)
    with torch.no_grad():
        torch.testing.assert_close(vae.decode(z).log_prob(X), whole.detach())
        assert max(widest) <= 100 and len(widest) > 6
        assert same(vae.decode(z).greedy().flatten(0, 1)[:4], vae.decode(z[0]).greedy())
        assert max(widest) <= 100


def test_gradients_reach_everything_but_the_impossible_tokens():
    vae = tiny().train()
    out = vae(X)
    objectives.elbo(X, out.likelihood, out.posterior, out.prior, out.z).elbo.sum().backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name
    assert not vae.likelihood.output.weight.grad[[PAD, BOS]].any()


def test_dropout_of_elements_and_of_words_is_for_training_only():
    z = torch.randn(len(X), D)
    for options in ({"dropout": 0.5}, {"dropout": 0.0, "word_dropout": 0.5}):
        likelihood = tiny(**options).likelihood
        assert likelihood(z).log_prob(X).equal(likelihood(z).log_prob(X))
        assert likelihood(z).greedy().equal(likelihood.train()(z).greedy())
        assert not likelihood(z).log_prob(X).equal(likelihood(z).log_prob(X))


def test_word_dropout_replaces_the_share_it_says_and_never_bos():
    likelihood = tiny(word_dropout=0.3).likelihood.train()
    before = torch.full((100, 101), 5)
    before[:, 0] = BOS
    dropped = likelihood._with_words_dropped(before)
    assert (dropped[:, 0] == BOS).all() and set(dropped[:, 1:].unique().tolist()) == {UNK, 5}
    assert (dropped == UNK).sum() / 10_000 == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / 10_000))


# Decoding


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_a_wide_beam_finds_the_best_of_all_texts(length_penalty):
    vae, x = tiny(spread=1.0), rows(*all_texts())
    with torch.no_grad():
        vae.likelihood.output.bias[EOS] -= 3.0  # the shortest text would be the best
    z = torch.randn(50, D)
    distribution = vae.decode(z)
    lengths = (x != PAD).sum(1) - 1
    score = vae.decode(z[:, None]).log_prob(x) / lengths**length_penalty
    best = x[score.argmax(1)]
    assert same(distribution.beam(4**LONGEST * 2, length_penalty), best)
    assert len({tuple(row) for row in best.tolist()}) > 3 and not same(distribution.greedy(), best)  # it takes a search


def test_a_beam_of_one_is_greedy_and_a_wider_one_is_no_worse_on_average():
    vae = tiny(vocabulary_size=30, spread=1.0, max_length=8)
    distribution = vae.decode(torch.randn(50, D))
    greedy = distribution.greedy()
    assert same(distribution.beam(1), greedy) and same(distribution.beam(1, 1.0), greedy)
    better = distribution.log_prob(distribution.beam(5)) - distribution.log_prob(greedy)
    assert better.mean() > 0.01


def test_greedy_takes_the_most_probable_token_at_every_step():
    vae = tiny()
    z = torch.randn(30, D)
    for row, code in zip(vae.decode(z).greedy(), z[:, None], strict=True):
        for t in range(1, int((row != PAD).sum()) - 1):
            prefixes = torch.cat([row[:t].expand(V - 2, -1), torch.tensor([[UNK], [EOS], [4], [5], [6]])], dim=1)
            assert prefixes[vae.decode(code).log_prob(prefixes).argmax(), -1] == row[t]


def test_generated_rows_are_rows_of_data():
    vae = tiny()
    z = torch.randn(4, 50, D)
    distribution = vae.decode(z)
    for x in (distribution.sample(), distribution.greedy(), distribution.beam(3)):
        assert x.shape == (4, 50, LONGEST + 2) and x.dtype == torch.int64
        assert ((x == EOS).sum(-1) == 1).all() and (x[..., 0] == BOS).all() and not (x[..., 1:] == BOS).any()
        assert ((x != PAD).sum(-1) == (x == EOS).int().argmax(-1) + 1).all()
        assert vae.encode(x.flatten(0, 1)).batch_shape == (200,)
        assert distribution.log_prob(x).isfinite().all()
    assert distribution.sample((2,)).shape == (2, 4, 50, LONGEST + 2)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_come_as_often_as_their_probability_says(temperature):
    vae, count = tiny(), 40_000
    z = torch.randn(1, D)
    if temperature != 1.0:  # the distribution of one token is all that a temperature makes simple
        first = vae.likelihood.advance(torch.tensor([BOS]), z, vae.likelihood.first_state(z))[0][0]
        expected = {(t,): float(p) for t, p in enumerate((first / temperature).softmax(0).tolist()) if p}
        drawn = [(t,) for t in vae.decode(z).sample((count,), temperature)[:, 0, 1].tolist()]
    else:
        expected = {t: float(vae.decode(z).log_prob(rows(t)[:, : LONGEST + 1]).exp().detach()) for t in all_texts()}
        drawn = [tuple(w for w in x if w not in (BOS, EOS, PAD)) for x in vae.decode(z).sample((count,))[:, 0].tolist()]
    assert sum(expected.values()) == pytest.approx(1.0, abs=1e-5)
    for text, p in expected.items():
        assert abs(drawn.count(text) / count - p) < 5 * math.sqrt(p * (1 - p) / count) + 1e-4, text


def test_the_seed_governs_what_is_drawn():
    distribution = tiny().decode(torch.randn(20, D))
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(distribution.sample())
    assert draws[0].equal(draws[1]) and not draws[0].equal(draws[2])


def test_next_to_no_temperature_is_greedy():
    distribution = tiny().decode(torch.randn(20, D))
    assert distribution.sample(temperature=1e-40).equal(distribution.greedy())


@pytest.mark.parametrize("decode", [lambda d: d.sample(), lambda d: d.greedy(), lambda d: d.beam(2)])
def test_nothing_is_generated_from_nan(decode):
    with pytest.raises(ValueError, match="TextLikelihood: z and the weights must be finite to generate text"):
        decode(tiny().decode(torch.tensor([[0.0, 0.0], [0.0, math.nan]])))


# The encoder


def test_the_posterior_is_of_the_last_token_s_state_whatever_the_padding():
    encoder = tiny().encoder
    embedding, state, linear = encoder.layers
    together = encoder(F.pad(X, (0, 5)))
    for i, row in enumerate(X):
        hidden, _ = state.lstm(embedding.embedding(row[None, row != PAD]))
        mean, log_std = linear(hidden[:, -1]).chunk(2, dim=1)
        torch.testing.assert_close(together.mean[i], mean[0])
        torch.testing.assert_close(together.stddev[i], log_std.exp()[0])


def test_sigma_is_bounded():
    encoder = tiny().encoder
    for bias, limit in ((1e3, 10.0), (-1e3, -10.0)):
        torch.nn.init.constant_(encoder.layers[2].bias, bias)
        assert encoder(X).stddev.log().allclose(torch.tensor(limit))


@pytest.mark.parametrize("share", [0, 1, 2])
def test_the_first_layers_can_be_shared(share):
    encoder = tiny().encoder
    h = encoder.begin(X, share)
    whole, halves = encoder(X), encoder.finish(h, share)
    assert halves.mean.equal(whole.mean) and halves.stddev.equal(whole.stddev)
    rest = encoder.remainder(share)
    assert rest(h).shape == (len(X), 2 * D) and not rest(h)[:, :D].equal(whole.mean)
    own = {p.data_ptr() for p in encoder.parameters()}
    assert not own & {p.data_ptr() for p in rest.parameters()}
    shapes = [tuple(p.shape) for p in encoder.parameters()]
    assert [tuple(p.shape) for p in rest.parameters()] == shapes[len(shapes) - len(list(rest.parameters())) :]


@pytest.mark.parametrize("share", [-1, 3, True, 1.0])
def test_a_share_that_the_encoder_does_not_have_is_named(share):
    encoder = tiny().encoder
    for method in (lambda: encoder.begin(X, share), lambda: encoder.finish(X, share), lambda: encoder.remainder(share)):
        with pytest.raises(ValueError, match=rf"TextEncoder: share must be an integer in 0 … 2.*, got {share}"):
            method()


# With the rest of the package


def test_it_trains_saves_and_is_measured_as_any_vae(tmp_path):
    vocabulary = (*data.corpus.SPECIAL, *"abcdefgh")
    x = data.from_text([f"{a} {b} {a}" for a in "abcdefgh" for b in "abcdefgh"], vocabulary)
    vae = text_vae.text_vae(
        len(vocabulary), 2, ncpvae.Normal(2), embedding_dim=8, hidden_dim=16, max_length=4, dropout=0.0
    )
    before = objectives_of(vae, x)
    result = fit_vae(
        vae, x, validation=x, transform=data.as_is, steps=150, batch_size=32, lr=2e-2, kl_weight=0.1, progress=False
    )
    assert result.steps == 150 and objectives_of(vae, x) < before - 2.0
    vae.save_pretrained(tmp_path)
    again = ncpvae.VAE.from_pretrained(tmp_path)
    log_priors = {"base": vae.prior_distribution().log_prob}
    first, second = (
        metrics.importance_weighted_nll(x, v.encode, v.decode, log_priors, 50, max_rows=400, transform=data.as_is)
        for v in (vae, again)
    )
    assert first["base"].per_example.equal(second["base"].per_example)
    assert first["base"].nll < objectives_of(vae, x) + 0.1
    z = torch.randn(9, 2)
    assert again.decode(z).beam(3).equal(vae.decode(z).beam(3))
    prior = ncpvae.NoiseContrastivePrior(ncpvae.Normal(2), ncpvae.MLPClassifier(2, (8,)))
    fit_ncp(prior, vae=vae, data=x, transform=data.as_is, steps=5, progress=False)
    words = data.to_text(vae.decode(prior().sample((4,))).greedy(), vocabulary)
    assert all(set(line.split()) <= set("abcdefgh") for line in words)


@torch.no_grad()
def objectives_of(vae, x):
    """The mean negative bound, nats."""
    out = vae.eval()(x)
    return -float(objectives.elbo(x, out.likelihood, out.posterior, out.prior, out.z).elbo.mean())


def test_under_autocast_densities_are_of_float32():
    vae = tiny()
    with torch.autocast("cpu", torch.bfloat16):
        out = vae(X)
        log_p = out.likelihood.log_prob(X)
    assert out.posterior.mean.dtype == log_p.dtype == torch.float32
    torch.testing.assert_close(log_p, vae.decode(out.z).log_prob(X), rtol=0.05, atol=0.1)


# Bad input


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([[BOS, 4, V, EOS]], ValueError, "hold ids of the vocabulary, 0 … 6; row 0 has 7 at position 2"),
        ([[BOS, 4, EOS], [BOS, -1, EOS]], ValueError, "0 … 6; row 1 has -1 at position 1"),
        ([[BOS, EOS], [PAD, PAD]], ValueError, "hold more than <pad>; row 1"),
        ([[BOS, EOS, PAD], [4, 5, EOS]], ValueError, "begin with <bos>, 2; row 1 has 4 at position 0"),
        ([[BOS, 4, BOS, EOS]], ValueError, "hold <bos> only at its beginning; row 0 has 2 at position 2"),
        ([[BOS, 4, PAD, EOS]], ValueError, "hold <pad> only at its end; row 0 has 3 at position 3"),
        ([[BOS, 4, EOS, PAD], [BOS, EOS, 5, EOS]], ValueError, "hold nothing but <pad> after <eos>; row 1 has 5 at"),
        ([BOS, 4, EOS], ValueError, r"x must be \[B, T\] with T ≥ 1, got shape \(3,\)"),
        ([[], []], ValueError, r"with T ≥ 1, got shape \(2, 0\)"),
        ([[2.0, 4.0, 3.0]], TypeError, r"x must be token ids, int64 \[B, T\], got torch.float32"),
    ],
)
def test_bad_rows_are_named_before_they_are_looked_up(x, error, message):
    vae, x = tiny(), torch.tensor(x)
    x = x.long() if not x.numel() else x
    with pytest.raises(error, match=f"TextEncoder: .*{message}"):
        vae.encode(x)
    with pytest.raises(error, match=f"TextDistribution.log_prob: .*{message}"):
        vae.decode(torch.zeros(1, D)).log_prob(x)


def test_bad_arguments_are_named():
    vae = tiny()
    distribution = vae.decode(torch.zeros(3, D))
    sizes = (V, 4, 4, 2)
    for call, message in [
        (lambda: TextEncoder(3, 4, 4, 2), "TextEncoder: vocabulary_size must be an integer ≥ 4, got 3"),
        (lambda: TextLikelihood(V, 4, 0, 2), "TextLikelihood: hidden_dim must be an integer ≥ 1, got 0"),
        (lambda: TextLikelihood(*sizes, max_length=0), "TextLikelihood: max_length must be an integer ≥ 1, got 0"),
        (
            lambda: TextLikelihood(*sizes, word_dropout=1.5),
            r"TextLikelihood: word_dropout must be in \[0, 1\], got 1.5",
        ),
        (lambda: vae.likelihood(torch.zeros(3, 5)), r"TextLikelihood: context must be z \[..., 2\].*\(3, 5\)"),
        (lambda: vae.encode(X[:0]), r"TextEncoder: x must be \[B, T\] with B ≥ 1, got shape \(0, 7\)"),
        (lambda: distribution.log_prob(X), r"go with the batch \(3,\), got shape \(4, 7\)"),
        (lambda: distribution.sample(temperature=0.0), "temperature must be finite and > 0, got 0.0"),
        (lambda: distribution.beam(0), "beam: width must be an integer ≥ 1, got 0"),
        (lambda: distribution.beam(2, -1.0), "beam: length_penalty must be finite and ≥ 0, got -1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_no_rows_are_no_error():
    distribution = tiny().decode(torch.zeros(0, 4, D))
    assert distribution.sample((2,)).shape == (2, 0, 4, LONGEST + 2)
    assert distribution.log_prob(X).shape == (0, 4)
    assert tiny().decode(torch.zeros(3, D)).log_prob(torch.tensor([[BOS]])).tolist() == [0.0] * 3  # nothing is said
