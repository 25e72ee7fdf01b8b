"""Runs of hierarchical VAEs, from the recipe to the page."""

import json
import shutil
from dataclasses import replace

import numpy
import pytest
import torch
from safetensors.torch import load_file

from ncpvae import cli
from ncpvae.metrics import hierarchical_nll, kl_per_group
from ncpvae.recipes import RECIPES, HierarchicalRecipe, StageTwo
from ncpvae.runs import (
    comparison,
    diagnosis,
    evaluation,
    figures,
    hierarchical,
    open_run,
    reporting,
    sampling,
    training,
)
from ncpvae.samplers import SIR

PAPERS = ["nvae-mnist-small", "nvae-mnist", "nvae-cifar10", "nvae-celeba64", "nvae-celebahq256"]


def shrunk(recipe, **changes):
    """The recipe with fewer and smaller layers, on 16×16 images; what is left of it are its likelihood and scales."""
    scales = min(len(recipe.groups_per_scale), 2)
    small = {"channels": 4, "latent_channels": 2}
    ladder = {"groups_per_scale": (2,) * scales, "halvings": 3 - scales}  # the smallest maps are of 4×4
    cells = dict.fromkeys(("preprocess_cells", "postprocess_cells", "encoder_cells", "decoder_cells"), 1)
    e = replace(
        recipe.evaluation,
        importance_samples=2,
        snis_proposals=8,
        sir_proposals=20,
        samples=40,
        pictures=4,
        test_examples=30,
        temperatures=(0.7,),
    )
    small_classifiers = {"steps": 6, "batch_size": 16, "channels": 4, "blocks": 1}
    prior = replace(recipe.prior, **small_classifiers, log_z_samples=50, log_z_repeats=2, min_jsd=-1.0)  # none is flat
    settings = {"shape": (recipe.shape[0], 16, 16), "steps": 6, "batch_size": 16, "warmup_steps": 2}
    return replace(recipe, **settings, **small, **ladder, **cells, evaluation=e, prior=prior, **changes)


def images(path, channels):
    """Bright bars on black, at random heights and widths, as a data set of its own."""
    generator = numpy.random.default_rng(0)
    parts = {}
    for name, count in (("train", 120), ("validation", 40), ("test", 40)):
        x = numpy.zeros((count, channels, 16, 16), dtype=numpy.uint8)
        for image in x:
            row, height = generator.integers(0, 12), generator.integers(1, 5)
            image[:, row : row + height] = generator.integers(100, 255)
        parts[name] = x
    numpy.savez(path, **parts)
    return f"npz:{path}"


@pytest.fixture(autouse=True, scope="module")
def few_held_out_codes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "MIN_VALIDATION", 40)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    recipe = shrunk(RECIPES["nvae-cpu"], data=images(folder / "bars.npz", 1))
    run, result = training.train(folder / "nvae", "nvae-cpu", recipe, "ncpvae train nvae-cpu", progress=False)
    assert result.history[-1].keys() >= {"loss", "kl", "regularization", "validation_loss"}
    training.fit_prior(run, command="ncpvae fit-prior nvae", progress=False)
    return open_run(folder / "nvae")


def test_all_figures_are_of_both_priors_and_of_every_group(run):
    found = {figure.name: figure for figure in evaluation.evaluate(run)}
    assert {figures.NLL, "test NLL, log Ẑ", figures.KL, "log Ẑ", "density", "coverage", "time of a sample"} <= set(
        found
    )
    assert found[figures.NLL].base == found["test NLL, log Ẑ"].base
    groups = evaluation.read_groups(open_run(run.folder))
    result = json.loads((run.prior_folder / "result.json").read_text())
    assert [group.loss for group in groups] == result["loss"]
    assert found[figures.KL].base == pytest.approx(sum(group.kl for group in groups))
    prior = run.hierarchical_prior()
    for k, group in enumerate(groups):
        assert not group.flat and k not in prior.flat and 1.0 <= group.ess <= 20.0 and group.log_mean_std > 0
    assert found[figures.NLL].base != found[figures.NLL].ncp
    table = comparison.compare([run.folder], run.folder / "compared.json")
    assert figures.NLL in table
    record = json.loads((run.folder / "compared.json").read_text())
    assert [g["loss"] for g in record["models"][0]["runs"][0]["groups"]] == result["loss"]


def test_the_page_shows_groups_samples_at_each_temperature_and_neighbours(run):
    evaluation.evaluate(run)
    text = reporting.report(run).read_text()
    for part in ("Latent groups", "Nearest training", "Reconstructions", "0.7", figures.NLL, "ncpvae fit-prior nvae"):
        assert part in text, part


def test_samples_are_those_of_the_seed_by_every_sampler(run, tmp_path):
    ways = {
        "sir": sampling.Sampling(proposals=10),
        "adaptive": sampling.Sampling(proposals=10, min_ess=2.0),
        "langevin": sampling.Sampling("langevin", langevin_steps=2, step_size=1e-3, space="epsilon"),
        "readjusted": sampling.Sampling(proposals=10, batch_norm_draws=2),
    }
    files = {}
    for name, way in ways.items():
        path, draws = sampling.sample(run, 18, way, 0.9, seed=3, output=tmp_path / f"{name}.safetensors")
        files[name] = load_file(path)
        assert draws.ess.shape == (18, 2) and path.with_suffix(".png").is_file()
        assert draws.ess.isnan().all() == (name == "langevin")
    again = load_file(sampling.sample(run, 18, ways["sir"], 0.9, seed=3, output=tmp_path / "again.safetensors")[0])
    assert again.keys() == {"x", "z_1", "z_2"}
    assert all(torch.equal(again[name], tensor) for name, tensor in files["sir"].items())
    assert not torch.equal(files["sir"]["x"], files["readjusted"]["x"])
    assert len({files[name]["x"].sum().item() for name in files}) == 4
    base, draws = sampling.sample(run, 18, ways["sir"], base=True, seed=3)
    assert draws.ess.isnan().all() and load_file(base)["x"].shape == (18, 1, 16, 16)


def test_base_samples_are_the_models_own_ancestral_draws(run):
    vae = run.nvae()
    draws = hierarchical.draw(run, vae, 20, seed=1)
    assert torch.equal(draws.x, hierarchical.draw(run, vae, 20, seed=1).x)
    given = vae.walk(lambda k, base, context: draws.z[k], 20).mean.detach()
    torch.testing.assert_close(draws.x, given, rtol=1e-4, atol=1e-5)
    assert not torch.equal(draws.x, hierarchical.draw(run, vae, 20, seed=2).x)


def test_reconstructions_are_pictures_of_the_test_examples(run):
    made = load_file(sampling.reconstruct(run, 5))
    assert made["x"].shape == made["reconstruction"].shape == (5, 1, 16, 16)
    assert made["x"].max() <= 1.0 and made["x"].max() > 0.3


def test_examples_are_shown_at_the_models_precision(tmp_path):
    recipe = shrunk(RECIPES["nvae-celebahq256"], data=images(tmp_path / "x.npz", 3))
    run, _ = training.train(tmp_path / "run", "nvae-celebahq256", replace(recipe, steps=1, warmup_steps=0), "x")
    stored = run.dataset.splits.test[:3]
    object.__setattr__(run.dataset, "levels", 31)  # as CelebA-HQ's images, whose bytes are not of that scale
    originals, copies = sampling.reconstructed(run, stored)
    assert torch.equal(originals, (stored // 8) / 31) and originals.max() <= 1.0 >= copies.max()
    _, nearest, distances = sampling.nearest_training(run, recipe.originals(run.dataset.splits.train[:2]))
    assert nearest.max() <= 1.0 and not distances.any()


def test_without_a_prior_the_base_is_measured(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run", ignore=shutil.ignore_patterns("prior"))
    bare = open_run(tmp_path / "run")
    assert all(figure.ncp is None for figure in evaluation.evaluate(bare))
    assert all(group.loss is None and group.kl is not None for group in evaluation.read_groups(open_run(bare.folder)))
    assert "Latent groups" in reporting.report(open_run(bare.folder)).read_text()


def test_likelihoods_of_a_vae_alone_are_those_it_has_beside_a_prior(run):
    x, prior = torch.rand(6, 1, 16, 16).round(), run.hierarchical_prior()
    alone = hierarchical_nll(prior.vae, x, 3, seed=1)
    assert alone.keys() == {"base"}
    beside = hierarchical_nll(prior, x, 3, num_proposals=4, seed=1)["base"]
    torch.testing.assert_close(alone["base"].per_example, beside.per_example)
    with pytest.raises(ValueError, match="prior must be a HierarchicalNCP for .* got NVAE"):
        hierarchical_nll(prior.vae, x, 3, num_proposals=4)


def test_kl_per_group_is_the_bounds(run):
    vae, x = run.nvae(), torch.rand(7, 1, 16, 16).round()
    kl = kl_per_group(vae, x, batch_size=7, seed=5)
    with torch.no_grad():
        from ncpvae import _distributed, _random
        from ncpvae.hierarchy import infer

        with _random.scoped(_distributed.block_seed(5, 0)):
            expected = infer(vae, x)[1].kl().double()
    torch.testing.assert_close(kl.value, expected.mean(0))
    torch.testing.assert_close(kl.standard_error, expected.std(0) / 7**0.5)
    with pytest.raises(ValueError, match=r"kl_per_group: data must be a tensor \[N, …\] with N ≥ 1"):
        kl_per_group(vae, x[:0])


def test_what_is_not_for_hierarchical_vaes_says_so(run):
    for command in (lambda: diagnosis.diagnose(run), lambda: sampling.interpolate(run, 2, 3)):
        with pytest.raises(ValueError, match="must have a VAE with one group of latent variables, got nvae-cpu"):
            command()
    with pytest.raises(TypeError, match="stage must be GroupClassifiers, got StageTwo"):
        training.fit_prior(run, StageTwo(), progress=False)


def test_a_result_that_is_damaged_is_named(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run")
    (tmp_path / "run" / "prior" / "result.json").write_text("{}")
    with pytest.raises(ValueError, match="does not hold the result of stage two"):
        evaluation.evaluate(open_run(tmp_path / "run"))


def test_the_command_line_takes_the_groups_settings(run, capsys, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run")
    again = ["fit-prior", str(tmp_path / "run"), "--overwrite", "--steps", "4", "--min-jsd", "0.5", "--no-page"]
    assert cli.main([*again, "--no-progress", "--device", "cpu"]) == 0
    assert "held-out loss 1." in capsys.readouterr().out
    assert open_run(tmp_path / "run").hierarchical_prior().flat == {0, 1}
    assert cli.main(["sample", str(tmp_path / "run"), "--count", "3", "--device", "cpu"]) == 0
    assert "ESS of each group's proposals on average none, none" in capsys.readouterr().out


def test_the_planned_memory_grows_with_the_batch_alone():
    recipe = shrunk(RECIPES["nvae-cpu"])
    memory = [training.plan(replace(recipe, batch_size=size))["memory"] for size in (8, 16)]
    weights, activations = ([plan[name] for plan in memory] for name in memory[0])
    assert activations[1] == 2 * activations[0] > 0
    assert weights[0] == weights[1] > 16 * sum(p.numel() for p in recipe.vae().parameters())  # and what is made of them


def test_a_page_is_of_the_proposals_that_were_measured(run):
    evaluation.evaluate(run, replace(run.recipe.evaluation, sir_proposals=60))
    assert "Latent groups" in reporting.report(run).read_text()
    evaluation.evaluate(run)


def test_a_prior_of_another_vae_is_refused(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run")
    run.recipe.vae().save_pretrained(tmp_path / "run" / "vae")
    with pytest.raises(ValueError, match="is a prior of another VAE than"):
        open_run(tmp_path / "run").hierarchical_prior()


def test_a_mixture_of_logistics_is_learned_as_well(tmp_path):
    recipe = shrunk(RECIPES["nvae-cifar10"], likelihood="logistic-mixture", data=images(tmp_path / "x.npz", 3))
    _, result = training.train(tmp_path / "run", "nvae-cifar10", replace(recipe, warmup_steps=0), "x", progress=False)
    assert result.history[-1]["validation_loss"] < result.history[0]["validation_loss"]


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_recipes_do_their_first_steps(name, tmp_path):
    recipe = RECIPES[name]
    recipe = shrunk(recipe, data=images(tmp_path / "x.npz", recipe.shape[0]))
    recipe = replace(recipe, steps=2, warmup_steps=0)
    run, result = training.train(tmp_path / "run", name, recipe, "x", progress=False)
    assert result.steps == 2 and torch.isfinite(torch.tensor(result.history[-1]["validation_loss"]))
    training.fit_prior(run, replace(recipe.prior, steps=2), progress=False)
    draws = hierarchical.draw(run, run.hierarchical_prior(), 2, SIR(5))
    assert set(training.plan(recipe)["parameters"]) == {"VAE", "classifier"}
    assert draws.x.shape == (2, *recipe.shape) and 0.0 <= draws.x.min() <= draws.x.max() <= 1.0


def test_a_model_of_the_papers_size_learns_from_two_images():
    recipe = replace(RECIPES["nvae-mnist-small"], lr=1e-3)  # as in the midst of the warm-up
    torch.manual_seed(0)
    loss = recipe.objective(recipe.vae())
    optimizer = recipe.fitting()["optimizer"](list(loss.parameters()))
    x = (torch.rand(2, *recipe.shape) < 0.2).float()
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        terms = loss(x, kl_weight=1e-4)
        terms["loss"].backward()
        optimizer.step()
        losses.append(float(terms["reconstruction"].detach()))
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_models_have_the_published_groups(name):
    recipe = RECIPES[name]
    expected = {
        "nvae-mnist-small": [(20, 4, 4)] * 10,
        "nvae-mnist": [(20, 4, 4)] * 5 + [(20, 8, 8)] * 10,
        "nvae-cifar10": [(20, 16, 16)] * 30,
        "nvae-celeba64": [(20, 8, 8)] * 5 + [(20, 16, 16)] * 5 + [(20, 32, 32)] * 5,
        "nvae-celebahq256": [(20, 2**i, 2**i) for i in (3, 4, 5, 6, 7) for _ in range(4)],
    }[name]
    with torch.device("meta"):
        assert [group.shape for group in recipe.vae().groups] == expected
    assert isinstance(recipe, HierarchicalRecipe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_lr": 1.0}, "min_lr must be ≤ lr, 0.005, got 1"),
        ({"warmup_steps": 6}, "warmup_steps must be ≥ 0 and < 6, got 6"),
        ({"bits": 9}, "bits must be ≥ 1 and < 9, got 9"),
        ({"likelihood": "normall"}, "likelihood must be one of bernoulli, normal, logistic-mixture, got 'normall'"),
        ({"kl_warmup": 0.0}, r"kl_warmup must be in \(0, 1\], got 0.0"),
        ({"weight_decay": -1.0}, "weight_decay must be finite and ≥ 0, got -1.0"),
    ],
)
def test_settings_that_cannot_be_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(shrunk(RECIPES["nvae-cpu"]), **changes)
