"""The collapse report: permutation test, verdict, file and page, on VAEs whose collapse was planted."""

import dataclasses
import json
import math
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import toy
from processes import run_processes
from torch import nn
from torch.distributions import Distribution

from ncpvae import Normal
from ncpvae.cli import main
from ncpvae.distributions import NormalLikelihood, diagonal_normal
from ncpvae.metrics import Posteriors, decoder_use
from ncpvae.recipes import RECIPES
from ncpvae.report.diagnosis import Bars, Traversals, render
from ncpvae.runs import diagnosis, open_run, training
from ncpvae.runs.folder import new_run
from ncpvae.runs.verdict import Diagnosis, Estimate, judge
from ncpvae.vae import VAE, GaussianEncoder

pytest.importorskip("sklearn")
D, PIXELS = 10, 64


# The permutation test


def linear(weights, std=0.1, noise=1.0):
    """Encode and decode of x [B, D]: q(z|x) = N(x, std²), p(x|z) = N(weights · z, noise²)."""
    weights = torch.tensor(weights)

    def encode(x):
        return diagonal_normal(x, torch.full_like(x, std))

    def decode(z):
        return diagonal_normal(weights * z, torch.full_like(z, noise))

    return encode, decode


def test_the_rise_is_that_of_the_linear_gaussian_model():
    """x ~ N(0, I): exchanging z_d costs w_d · Cov(x_d, z_d) / noise² = w_d / noise² nats."""
    weights, noise = [1.0, 0.5, -0.25], 0.8
    found = decoder_use(torch.randn(20_000, 3), *linear(weights, noise=noise), batch_size=1000)
    expected = torch.tensor(weights, dtype=torch.float64) / noise**2
    errors = found.rise_per_dimension_standard_error
    assert ((found.rise_per_dimension - expected).abs() < 4 * errors).all() and errors.max() < 0.03
    assert abs(found.rise - expected.sum()) < 4 * found.rise_standard_error


def test_figures_equal_brute_force():
    x = torch.randn(7, 2).double()
    encode, decode = linear([1.0, 2.0])
    torch.manual_seed(3)
    found = decoder_use(x, encode, decode, transform=lambda x: x, batch_size=7, seed=None)
    torch.manual_seed(3)
    z = encode(x).sample()
    others = torch.stack([z[n - 1] for n in range(7)])
    own = [-float(decode(z[n]).log_prob(x[n])) for n in range(7)]
    rises = [[-float(decode(code[n]).log_prob(x[n])) - own[n] for n in range(7)] for code in exchanged(z, others)]
    assert found.nll == pytest.approx(sum(own) / 7)
    for value, error, rise in zip(
        [found.rise, *found.rise_per_dimension.tolist()],
        [found.rise_standard_error, *found.rise_per_dimension_standard_error.tolist()],
        rises,
        strict=True,
    ):
        mean = sum(rise) / 7
        assert value == pytest.approx(mean)
        assert error == pytest.approx(math.sqrt(sum((r - mean) ** 2 for r in rise) / 6 / 7))


def exchanged(z, others):
    yield others
    for d in range(z.shape[1]):
        code = z.clone()
        code[:, d] = others[:, d]
        yield code


def test_what_the_decoder_ignores_costs_exactly_nothing():
    x = torch.randn(500, 3)
    found = decoder_use(x, *linear([1.0, 0.0, 1.0]))
    assert found.rise_per_dimension[1] == 0 and found.rise_per_dimension_standard_error[1] == 0
    assert (found.rise_per_dimension[[0, 2]] > 0.5).all()
    assert decoder_use(x, *linear([0.0, 0.0, 0.0])).rise == 0


def test_no_example_keeps_its_code_and_every_one_is_asked_once():
    """Codes are their examples' numbers: the decoder's loss tells who was paired with whom."""
    x = torch.arange(103.0)[:, None]
    met = []

    def decode(z):
        met.append(z.flatten())
        return diagonal_normal(z, torch.ones_like(z))

    found = decoder_use(x, linear([1.0], std=1e-6)[0], decode, batch_size=10)
    own, others = torch.cat(met[0::3]).round(), torch.cat(met[1::3]).round()
    assert torch.equal(own, x.flatten()) and (own != others).all()
    assert torch.equal(others.sort().values, own)
    assert found.rise > 0


def test_seeds_govern_all_draws_and_leave_no_trace():
    x, model = torch.randn(60, 2), linear([1.0, 1.0])
    state = torch.get_rng_state()
    first, again, other = (decoder_use(x, *model, transform=noisy, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.nll == again.nll and torch.equal(first.rise_per_dimension, again.rise_per_dimension)
    assert first.nll != other.nll


def noisy(x):
    return x + torch.randn_like(x)


def shared(distributed):
    x = torch.randn(90, 2, generator=torch.Generator().manual_seed(0))
    return decoder_use(x, *linear([1.0, 0.3]), transform=noisy, batch_size=20, distributed=distributed)


def test_processes_share_the_work_and_agree():
    alone = shared(False)
    for found in run_processes(shared, 2, True):
        assert (found.nll, found.rise, found.protocol) == (alone.nll, alone.rise, alone.protocol)
        assert torch.equal(found.rise_per_dimension, alone.rise_per_dimension)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": [1.0]}, TypeError, r"data must be a tensor \[N, …\], got list"),
        ({"data": torch.randn(1, 2)}, ValueError, r"data must be \[N, …\] with N ≥ 2 .* got shape \(1, 2\)"),
        ({"data": torch.full((4, 2), math.nan)}, ValueError, "data must be finite"),
        ({"batch_size": 1}, ValueError, "batch_size must be ≥ 2"),
        ({"batch_size": 0}, ValueError, "batch_size must be an integer ≥ 1"),
        ({"seed": -1}, ValueError, "seed must be ≥ 0"),
        ({"encode": lambda x: x}, ValueError, r"encode must return q\(z\|x\) with batch \[4\], got Tensor"),
        ({"decode": lambda z: torch.distributions.Normal(z, 1.0)}, ValueError, r"batch \[4\], got log-likelihoods of"),
        ({"decode": lambda z: diagonal_normal(z * math.nan, torch.ones_like(z))}, ValueError, "finite log-likelihoods"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    encode, decode = linear([1.0, 1.0])
    arguments = {"data": torch.randn(4, 2), "encode": encode, "decode": decode} | changes
    with pytest.raises(error, match=message):
        decoder_use(**arguments)


# Planted runs


class Planted(nn.Module):
    """Encoder network and decoder at once: the first `live` of D coordinates hold as many projections of x."""

    def __init__(self, live, scale=1.0):
        super().__init__()
        basis = torch.linalg.qr(torch.randn(PIXELS, PIXELS, generator=torch.Generator().manual_seed(1)))[0]
        self.register_buffer("basis", basis[:, :live])
        self.live, self.scale = live, scale


class PlantedEncoder(Planted):
    def forward(self, x):
        mean = self.scale * 0.2 * ((x.flatten(1) - 5.0) @ self.basis)
        rest = x.new_zeros(len(x), D - self.live)
        log_std = torch.full_like(mean, math.log(self.scale * 0.3))
        return torch.cat([mean, rest, log_std, rest], 1)


class PlantedDecoder(Planted):
    def forward(self, z):
        x = 5.0 + (z[:, : self.live] / self.scale / 0.2) @ self.basis.T
        return x.view(-1, 1, 8, 8)


def planted(live, heard=None, scale=1.0):
    """A VAE whose encoder writes `live` coordinates, and whose decoder listens to the first `heard` of them."""
    encoder = GaussianEncoder(PlantedEncoder(live, scale), scale="exp")
    decoder = PlantedDecoder(live if heard is None else heard, scale)
    return VAE(encoder, decoder, NormalLikelihood(4.0), Normal(D)).eval()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The folder of a short run, with a critic and a noise contrastive prior."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    recipe = replace(
        RECIPES["digits"], steps=30, channels=(4, 8), critic=replace(RECIPES["digits"].critic, kind="self")
    )
    evaluation = replace(recipe.evaluation, snis_proposals=20)
    recipe = replace(
        recipe, prior=replace(recipe.prior, steps=20, hidden=(8,), log_z_samples=100), evaluation=evaluation
    )
    run, _ = training.train(folder, "digits", recipe, "ncpvae train digits", progress=False)
    training.fit_prior(run, command="ncpvae fit-prior digits", progress=False)
    return folder


@pytest.fixture
def measured(tmp_path):
    """diagnosis.measure on the digits' test set with a planted VAE in the run's place."""
    run = new_run(tmp_path / "planted", "digits", RECIPES["digits"], "")

    def of(vae):
        data = diagnosis.chosen_examples(run, None, 300, 0)
        return diagnosis.measure(run, vae, data, 300, 0)

    return of


def test_a_planted_collapse_is_called_one(measured):
    d = measured(planted(0))
    assert d.mutual_information.value == pytest.approx(0, abs=1e-5)
    assert d.rise.value == 0 and d.rises == (0.0,) * D and d.variances == (0.0,) * D
    assert d.kl.value == pytest.approx(0, abs=1e-6) and not any(d.carrying)
    verdict = judge(d)
    assert verdict.kind == "collapsed" and verdict.headline.startswith("Collapsed")
    assert "--critic.kind hybrid" in str(verdict) and "fit-prior" not in str(verdict)


def test_partial_collapse_names_the_dimensions(measured):
    d = measured(planted(3))
    assert d.carrying == d.active == d.used == (True,) * 3 + (False,) * (D - 3)
    assert d.rises[3:] == (0.0,) * (D - 3)
    verdict = judge(d)
    assert verdict.kind == "partly collapsed"
    assert "3 of 10 dimensions (0, 1 and 2)" in verdict.headline


def test_an_informative_vae_is_not_collapsed(measured):
    d = measured(planted(D))
    assert all(d.carrying) and d.rise.value > 5
    assert d.capped and d.mutual_information.value <= d.log_n == pytest.approx(math.log(d.num_examples))
    verdict = judge(d)
    assert verdict.kind == "not collapsed" and "all 10 dimensions" in verdict.headline
    assert "at its cap" in str(verdict) and "KL(q(z) ‖ p(z)) ≤" in str(verdict)
    total = d.mutual_information.value + d.marginal_kl.value
    assert total == pytest.approx(d.kl.value, abs=5 * d.marginal_kl.standard_error)


def test_information_that_the_decoder_ignores_is_told_from_collapse(measured):
    ignored = judge(measured(planted(3, heard=0)))
    assert ignored.kind == "ignored" and "weaken the decoder" in str(ignored)
    d = measured(planted(3, heard=2))
    assert d.active[:3] == (True, True, True) and d.used[:3] == (True, True, False)
    assert "no measurable use to the decoder: dimensions 2." in str(judge(d))


def test_codes_of_a_small_scale_are_no_collapse(measured):
    """Active units count a variance of the means in units of z: the decoder's use of the code does not."""
    d = measured(planted(2, scale=0.01))
    assert not any(d.active) and d.used[:2] == (True, True)
    assert judge(d).kind == "partly collapsed" and "2 of 10 dimensions (0 and 1)" in judge(d).headline


def test_the_gain_of_a_prior_is_the_divergence_it_closes():
    """Where q(z) is what the noise contrastive prior is, the gain is KL(q(z) ‖ p(z)), by 2,000 proposals nearly."""
    n, dim = 4000, 2
    posteriors = Posteriors(torch.full((n, dim), toy.MEAN), torch.full((n, dim), math.log(toy.STD)))
    settings = SimpleNamespace(evaluation=replace(RECIPES["digits"].evaluation, snis_proposals=2000))
    run = SimpleNamespace(prior=toy.exact_prior, recipe=settings)
    found = diagnosis.prior_gain(run, posteriors, Normal(dim)(), 0)
    divergence = dim * (-math.log(toy.STD) + (toy.STD**2 + toy.MEAN**2 - 1) / 2)
    assert found.value == pytest.approx(divergence, abs=4 * found.standard_error + 0.02)


# The verdict by its rules


def figures(information=(2.0, 0.01), rise=(5.0, 0.1), marginal=(0.5, 0.01), **changes):
    d = Diagnosis(
        num_examples=1000,
        num_decoded=512,
        seed=0,
        log_n=math.log(1000),
        kl=Estimate(3.0, 0.01, "closed form"),
        mutual_information=Estimate(*information, "whole set"),
        marginal_kl=Estimate(*marginal, "whole set"),
        reconstruction=Estimate(80.0, 1.0, "one draw"),
        rise=Estimate(*rise, "exchanged"),
        kl_per_dimension=(2.0, 1.0),
        variances=(0.8, 0.5),
        rises=(3.0, 2.0),
        rise_errors=(0.1, 0.1),
    )
    return replace(d, **changes)


def test_nothing_is_at_the_cap_where_there_is_no_information():
    assert not figures(information=(0.0, 0.01), log_n=math.log(2)).capped
    assert figures(information=(0.5, 0.01), log_n=math.log(2)).capped


@pytest.mark.parametrize(
    ("information", "rise", "kind"),
    [
        ((0.05, 0.001), (0.05, 0.001), "collapsed"),
        ((0.5, 0.3), (0.5, 0.3), "collapsed"),  # neither stands out from 0
        ((-0.01, 0.001), (-0.2, 0.05), "collapsed"),
        ((0.5, 0.1), (0.05, 0.001), "ignored"),
        ((0.05, 0.001), (0.5, 0.1), "not collapsed"),
        ((2.0, 0.01), (5.0, 0.1), "not collapsed"),
    ],
)
def test_thresholds_of_the_verdict(information, rise, kind):
    assert judge(figures(information, rise)).kind == kind


def test_dimensions_need_three_standard_errors():
    d = figures(variances=(0.8, 0.0), rise_errors=(0.1, 0.8))
    assert d.active == (True, False) and d.used == (True, False)
    assert judge(d).kind == "partly collapsed"
    assert figures(rise_errors=(0.1, 0.6)).used == (True, True)
    assert figures(rises=(3.0, 0.009), rise_errors=(0.1, 0.0)).used == (True, False)


def test_the_prior_hole():
    assert "fit-prior" not in str(judge(figures()))
    assert "fit-prior" not in str(judge(figures(marginal=(1.1, 0.1)))), "not by two standard errors"
    assert "The prior misses the codes" in str(judge(figures(marginal=(3.0, 0.1))))
    capped = str(judge(figures(information=(6.5, 0.01), marginal=(3.0, 0.1))))
    assert "does not tell a prior hole from too few examples" in capped and "The prior misses" not in capped
    mended = str(judge(figures(marginal=(3.0, 0.1), prior_gain=Estimate(1.5, 0.1, "SNIS"))))
    assert "by at least 1.50 ± 0.10 nats" in mended and "fit-prior" not in mended
    assert "By that much p(z) misses them" in mended


def test_figures_go_through_json_and_damaged_ones_are_named():
    d = figures(info_nce=Estimate(1.0, 0.1, "critic"), info_nce_cap=5.5)
    written = json.loads(json.dumps(dataclasses.asdict(d)))
    assert Diagnosis.from_dict(written) == d
    for damage, message in (
        ({"rise": None}, "rise must be an Estimate, got NoneType"),
        ({"rises": [1.0]}, r"lengths \[2, 2, 1, 2\]"),
        ({"extra": 1}, "fields must be"),
        ({"kl": {"value": 1.0}}, "not the figures of a diagnosis"),
    ):
        with pytest.raises(ValueError, match=message):
            Diagnosis.from_dict(written | damage)


# File, page and command


def test_the_command_writes_figures_and_a_page_that_needs_nothing_else(digits, capsys):
    pytest.importorskip("tyro")
    pytest.importorskip("matplotlib")
    assert main(["diagnose", str(digits), "--examples", "200", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "mutual information I(x; z)" in printed and f"page: {digits}/diagnosis.html" in printed
    run, record = open_run(digits), json.loads((digits / "diagnosis.json").read_text())
    found = diagnosis.read_diagnosis(run)
    assert found.num_examples == found.num_decoded == 200 and found.info_nce_cap == pytest.approx(math.log(200))
    assert found.prior_gain is not None and len(found.rises) == D
    # The self critic of one batch with all examples is the estimator of the mutual information, with other draws.
    errors = found.info_nce.standard_error + found.mutual_information.standard_error
    assert found.info_nce.value == pytest.approx(found.mutual_information.value, abs=4 * errors)
    assert printed.startswith(record["verdict"]["headline"]) and record["verdict"]["kind"] == judge(found).kind
    assert {"seed", "of", "environment", "seconds", "command"} <= record.keys()
    assert diagnosis.diagnose(run, 200) == found, "the same seed gives the same figures"
    html = (digits / "diagnosis.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|url\((?!#)|<script|<link|<iframe", html)
    assert html.count("data:image/png") == 1 + diagnosis.TRAVERSED and html.count("<svg") == 3
    for words in (record["verdict"]["headline"], "ncpvae diagnose", "Rules", "scikit-learn"):
        assert words.replace("'", "&#39;") in html


def test_the_same_figures_give_the_same_page(digits, tmp_path):
    pytest.importorskip("matplotlib")
    folder = shutil.copytree(digits, tmp_path / "digits")
    diagnosis.diagnose(open_run(folder), 50, seed=3)
    first = diagnosis.write_page(open_run(folder)).read_bytes()
    torch.manual_seed(9)
    assert diagnosis.write_page(open_run(folder)).read_bytes() == first


def test_points_are_traversed_in_the_plane(tmp_path):
    pytest.importorskip("matplotlib")
    folder, recipe = tmp_path / "gaussians", replace(RECIPES["gaussians"], steps=20, hidden=(16,), latent_dim=4)
    run, _ = training.train(folder, "gaussians", recipe, "ncpvae train gaussians", progress=False)
    found = diagnosis.diagnose(run, 300, decoded=100)
    assert found.info_nce is None and found.prior_gain is None and found.num_decoded == 100
    html = diagnosis.write_page(run).read_text()
    assert html.count("<svg") == 4 and "data:image/png" in html and "the ring is the example itself" in html


class Unfriendly(Distribution):
    """A likelihood that can only be evaluated, or sampled too."""

    def __init__(self, like, samples):
        self.like, self.samples = like, samples
        super().__init__(like.batch_shape, like.event_shape, validate_args=False)

    def log_prob(self, value):
        return self.like.log_prob(value)

    def sample(self, sample_shape=()):
        if not self.samples:
            raise NotImplementedError
        return self.like.sample(sample_shape)


@pytest.mark.parametrize("samples", [True, False])
def test_likelihoods_without_a_mean_are_sampled_or_left_out(digits, samples, monkeypatch):
    pytest.importorskip("matplotlib")
    run, vae = open_run(digits), open_run(digits).vae()
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda z: Unfriendly(decode(z), samples))
    data = diagnosis.chosen_examples(run, 20, 20, 0)
    d = diagnosis.measure(run, vae, data, 20, 0)
    shown = diagnosis.traversals(run, vae, data, d, 0)
    html = render(diagnosis.page(run, d, shown, {}))
    assert ("data:image/png" in html) == samples
    assert ("Not on this page: traversals, because the decoder" in html) != samples


def test_other_data_than_pictures_and_points_have_no_traversals(digits):
    run = open_run(digits)
    vectors = replace(run, recipe=replace(run.recipe, shape=(64,)))
    assert diagnosis.traversals(vectors, run.vae(), torch.zeros(2, 64), figures(), 0).startswith("only pictures")


def test_text_of_the_page_is_escaped(digits):
    pytest.importorskip("matplotlib")
    run = open_run(digits)
    data = diagnosis.page(run, figures(), "<script>", {"command": "<script>"})
    html = render(replace(data, title="<script>", findings=["<script>"], advice=["<script> --a.b c"]))
    assert "<script" not in html and html.count("&lt;script&gt;") >= 5
    assert "<code>--a.b</code>" in html


def test_what_a_page_cannot_show_is_named():
    with pytest.raises(ValueError, match=r"Bars: rises must be finite numbers \[2\]"):
        Bars((1.0, 2.0), (1.0, 2.0), (1.0, math.nan), (0.1, 0.1), (True, True), (True, True), 0.01)
    with pytest.raises(ValueError, match=r"Bars: used must be \[2\] as kl, got 1"):
        Bars((1.0, 2.0), (1.0, 2.0), (1.0, 2.0), (0.1, 0.1), (True, True), (True,), 0.01)
    with pytest.raises(ValueError, match=r"decoded must be \[1, 2, …\]"):
        Traversals((0,), (-1.0, 1.0), torch.zeros(1, 3, 2), torch.zeros(2), torch.zeros(5, 2))
    with pytest.raises(ValueError, match="around must be given for points"):
        Traversals((0,), (-1.0, 1.0), torch.zeros(1, 2, 2), torch.zeros(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--examples", "9999"], "diagnose: examples must be 2 … 300, those of the test set, got 9999"),
        (["--examples", "1"], "diagnose: examples must be 2 … 300"),
        (["--seed", "-1"], "seed must be ≥ 0"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, digits, capsys):
    pytest.importorskip("tyro")
    assert main(["diagnose", str(digits), *arguments]) == 2
    printed = capsys.readouterr().err
    assert message in printed and len(printed.strip().splitlines()) == 1


def test_a_run_without_a_vae_or_a_diagnosis_says_what_to_do(digits, tmp_path, capsys):
    pytest.importorskip("tyro")
    new_run(tmp_path / "new", "digits", RECIPES["digits"], "")
    assert main(["diagnose", str(tmp_path / "new")]) == 2
    assert "has no trained VAE yet" in capsys.readouterr().err
    folder = shutil.copytree(digits, tmp_path / "digits", ignore=shutil.ignore_patterns("diagnosis.*"))
    with pytest.raises(OSError, match="have not been diagnosed: ncpvae diagnose"):
        diagnosis.read_diagnosis(open_run(folder))
    diagnosis.diagnose(open_run(folder), 20)
    shutil.rmtree(folder / "prior")
    with pytest.raises(OSError, match="have not been diagnosed"):
        diagnosis.read_diagnosis(open_run(folder))
