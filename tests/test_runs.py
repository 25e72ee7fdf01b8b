"""A run from its recipe to its page, and everything that can be asked of its folder."""

import dataclasses
import html
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy
import pytest
import torch
from safetensors.torch import load_file

from ncpvae import NoiseContrastivePrior
from ncpvae.metrics import FeatureClassifier
from ncpvae.recipes import RECIPES, Recipe, StageTwo, VAERecipe, from_dict
from ncpvae.runs import comparison, diagnosis, evaluation, features, open_run, reporting, sampling, training
from ncpvae.runs import figures as names
from ncpvae.runs.folder import as_json, new_run
from ncpvae.vae import VAE

pytest.importorskip("sklearn")


def small(seed=0):
    recipe = replace(RECIPES["digits"], steps=60, seed=seed, channels=(8, 16))
    e = replace(recipe.evaluation, importance_samples=20, snis_proposals=20, sir_proposals=50, samples=60, pictures=9)
    return replace(recipe, evaluation=e, prior=replace(recipe.prior, steps=40, hidden=(16,), log_z_samples=500))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "digits"
    run, _ = training.train(folder, "digits", small(), "ncpvae train digits", progress=False)
    training.fit_prior(run, command="ncpvae fit-prior digits", progress=False)
    return open_run(folder)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_frozen_documented_and_go_through_json(name):
    recipe = RECIPES[name]
    assert isinstance(recipe, Recipe) and recipe.__doc__ and len(recipe.__doc__) > 100
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.steps = 1
    assert from_dict(recipe, json.loads(json.dumps(as_json(recipe))), "test") == recipe


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if isinstance(recipe, VAERecipe)])
def test_recipes_models_fit_each_other(name):
    recipe = RECIPES[name]
    if name == "images-conv":  # the same architecture, for a smaller picture
        recipe = replace(recipe, shape=(3, 16, 16), channels=(8, 16))
    if name == "text-lstm":
        recipe = replace(recipe, shape=(12,), vocabulary=50, embedding_dim=4, hidden_dim=8)
    vae, classifier = recipe.vae(), recipe.classifier()
    x = recipe.example(4).to(torch.uint8) if len(recipe.shape) == 3 else recipe.example(4)
    out = vae(recipe.transform(x))
    assert out.likelihood.log_prob(recipe.transform(x, training=False)).shape == (4,)
    assert classifier(out.z).shape == (4,)
    assert recipe.pictures(sampling.decode_mean(vae, out.z)).shape == x.shape
    assert set(training.plan(recipe)["parameters"]) == {"VAE", "classifier"}
    neural = training.plan(replace(recipe, critic=replace(recipe.critic, kind="neural")))
    assert neural["parameters"]["critic"] > 0
    assert neural["memory"]["activations of a batch"] > training.plan(recipe)["memory"]["activations of a batch"]


def test_the_planned_memory_counts_parameters_and_activations():
    recipe = RECIPES["mnist-mlp"]
    plan = training.plan(recipe)
    vae = recipe.vae()
    assert plan["parameters"]["VAE"] == sum(p.numel() for p in vae.parameters())
    kept = plan["memory"]["activations of a batch"]
    assert kept > 4 * recipe.batch_size * (784 + 4 * 300)  # input and the hidden layers at least
    twice = training.plan(replace(recipe, batch_size=2 * recipe.batch_size))
    assert twice["memory"]["activations of a batch"] == 2 * kept


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": 3}, "stepz is no field of Digits"),
        ({"prior": 3}, "prior must be an object"),
        ({"shape": 3}, "shape must be a list"),
        ({"channels": []}, "channels must hold numbers ≥ 1"),
        ({"evaluation": {"test_examples": -5}}, "test_examples must be ≥ 1, got -5"),
        ({"prior": {"steps": 0}}, "prior.steps must be ≥ 1, got 0"),
        ({"steps": "many"}, "steps must be like 3000, got 'many'"),
        ({"execution": {"gradient_accumulation": 0}}, "gradient_accumulation must be ≥ 1"),
    ],
)
def test_damaged_settings_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(RECIPES["digits"], values, "config.json")


def test_a_run_holds_what_it_should(run):
    names = {str(p.relative_to(run.folder)) for p in run.folder.rglob("*") if p.is_file()}
    wanted = {"config.json", "metrics.jsonl", "vae/config.json", "vae/model.safetensors", "prior/metrics.jsonl"}
    assert wanted | {"prior/result.json", "prior/model/config.json", "prior/model/model.safetensors"} <= names
    config = run.config
    assert config["commands"] == ["ncpvae train digits", "ncpvae fit-prior digits"]
    assert config["settings"]["steps"] == 60 and config["environment"]["torch"] == torch.__version__
    assert run.recipe == small()


def test_vae_and_prior_are_read_back(run):
    vae, prior = run.vae(), run.prior()
    assert isinstance(vae, VAE) and isinstance(prior, NoiseContrastivePrior) and not vae.training
    assert prior.protocol["recipe"] == "digits" and prior.protocol["settings"]["steps"] == 40
    assert torch.isfinite(prior.log_prob(torch.zeros(10)))
    assert torch.equal(
        VAE.from_pretrained(run.folder / "vae").decode(torch.zeros(1, 10)).mean, vae.decode(torch.zeros(1, 10)).mean
    )


def test_the_same_seed_gives_the_same_weights(run, tmp_path):
    weights = {}
    for seed in (0, 1):
        again, _ = training.train(tmp_path / str(seed), "digits", small(seed), "again", progress=False)
        training.fit_prior(again, progress=False)
        weights[seed] = [load_file(again.folder / part / "model.safetensors") for part in ("vae", "prior/model")]
    first = [load_file(run.folder / part / "model.safetensors") for part in ("vae", "prior/model")]
    for mine, theirs in zip(first, weights[0], strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert any(not torch.equal(first[0][name], weights[1][0][name]) for name in first[0])


def test_evaluation_measures_and_keeps_its_protocols(run):
    figures = {f.name: f for f in evaluation.evaluate(run)}
    assert set(figures) >= {names.NLL, names.JSD, "log Ẑ", "density", "coverage", "memorisation C_T"}
    nll = figures[names.NLL]
    assert nll.base > 0 and nll.ncp > 0 and "20 draws per example, 300 examples" in nll.protocol
    gain = figures["gain per example, SNIS bound"]
    assert gain.ncp == pytest.approx(nll.base - nll.ncp, abs=1e-3)
    assert evaluation.read_figures(run) == list(figures.values())
    table = evaluation.table_of(list(figures.values()))
    assert names.NLL in table and f"{nll.ncp:.4g}" in table
    assert comparison.compare([run.folder, run.folder]).count("digits: NCP") == 2


def test_plain_torch_gives_the_same_figures_to_rounding(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run")
    command = [sys.executable, "-m", "ncpvae", "evaluate", str(tmp_path / "run")]
    figures = {}
    for disabled in ("0", "1"):
        done = subprocess.run(
            command, env=os.environ | {"NCPVAE_DISABLE_NATIVE": disabled}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        figures[disabled] = evaluation.read_figures(open_run(tmp_path / "run"))
        kernels = json.loads((tmp_path / "run" / "evaluation.json").read_text())["environment"]["kernels"]
        assert disabled == "0" or kernels == "plain torch"
    for native, plain in zip(figures["0"], figures["1"], strict=True):
        for side in ("base", "ncp"):
            a, b = getattr(native, side), getattr(plain, side)
            assert a == b or a == pytest.approx(b, rel=1e-4), f"{native.name}, {side}"


def test_evaluation_without_a_prior_measures_the_base(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run", ignore=shutil.ignore_patterns("prior"))
    figures = evaluation.evaluate(open_run(tmp_path / "run"))
    assert figures[0].base > 0 and all(f.ncp is None for f in figures)
    assert reporting.report(open_run(tmp_path / "run")).is_file()


def test_nearest_training_examples_are_found_part_by_part(run, monkeypatch):
    train = run.dataset.splits.train
    chosen = torch.tensor([3, 40, 700])
    found, nearest, distances = sampling.nearest_training(run, train[chosen].float() / 16 + 0.01)
    monkeypatch.setattr(sampling, "AT_ONCE", 37)
    again = sampling.nearest_training(run, found)
    assert torch.equal(nearest, train[chosen].float() / 16) and torch.equal(again[1], nearest)
    torch.testing.assert_close(again[2], distances)
    torch.testing.assert_close(distances, torch.full((3,), 0.01 * found[0].numel() ** 0.5))


def test_the_page_shows_the_run(run):
    evaluation.evaluate(run)
    text = reporting.report(run).read_text()
    for part in ("digits", "ncpvae fit-prior digits", names.NLL, "Nearest training", "Reconstructions", "Latent"):
        assert part in text, part


def test_samples_are_reproducible_and_of_both_priors(run, tmp_path):
    files = []
    for i, base in enumerate((False, False, True)):
        path, result = sampling.sample(
            run, 12, sampling.Sampling(), 0.8, base, seed=3, output=tmp_path / f"{i}.safetensors"
        )
        assert (result is None) == base and path.with_suffix(".png").is_file()
        files.append(load_file(path))
    assert files[0]["z"].shape == (12, 10) and files[0]["x"].shape == (12, 1, 8, 8)
    assert torch.equal(files[0]["z"], files[1]["z"]) and not torch.equal(files[0]["z"], files[2]["z"])
    with pytest.raises(ValueError, match=r"output must be a \.safetensors file, got .*x\.png"):
        sampling.sample(run, 4, sampling.Sampling(), output=tmp_path / "x.png")
    with pytest.raises(ValueError, match="proposals must be ≥ 1, got 0"):
        sampling.sample(run, 4, sampling.Sampling(proposals=0))


def test_reconstructions_and_interpolations(run):
    made = load_file(sampling.reconstruct(run, 5))
    assert made["x"].shape == made["reconstruction"].shape == (5, 1, 8, 8)
    between = load_file(sampling.interpolate(run, 3, 4))
    assert between["x"].shape == (12, 1, 8, 8)
    with pytest.raises(ValueError, match="rows must be ≤ 150, got 200"):
        sampling.interpolate(run, 200, 4)


def test_spherical_interpolation_keeps_the_norm_and_ends():
    a, b = torch.nn.functional.normalize(torch.randn(2, 5, 3), dim=-1)
    path = sampling.spherical(a, b, torch.linspace(0, 1, 7))
    assert torch.allclose(path.norm(dim=-1), torch.ones(5, 7), atol=1e-5)
    assert torch.allclose(path[:, 0], a, atol=1e-6) and torch.allclose(path[:, -1], b, atol=1e-6)
    straight = sampling.spherical(a, 2 * a, torch.linspace(0, 1, 3))
    assert torch.allclose(straight[:, 1], 1.5 * a)


def test_langevin_samples_and_a_refitted_base(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run")
    copy = open_run(tmp_path / "run")
    stage = replace(copy.recipe.prior, base="normal", steps=20)
    with pytest.raises(ValueError, match="has checkpoints of an earlier run"):
        training.fit_prior(copy, stage, progress=False)
    training.fit_prior(copy, stage, overwrite=True, progress=False)
    again = open_run(tmp_path / "run")
    assert again.recipe.prior == stage
    assert not torch.equal(again.prior().base.mean, torch.zeros(10))
    assert "test NLL of the refitted base" in {f.name for f in evaluation.evaluate(again)}
    _, result = sampling.sample(again, 4, sampling.Sampling("langevin", langevin_steps=5))
    assert result.diagnostics.stopped == "num_steps"


def test_figures_belong_to_the_weights_they_were_measured_on(run, tmp_path):
    evaluation.evaluate(run, command="ncpvae evaluate digits --seed 1", seed=1)
    shutil.copytree(run.folder, tmp_path / "run")
    copy = open_run(tmp_path / "run")
    text = reporting.report(copy).read_text()
    assert "ncpvae evaluate digits --seed 1" in text and "evaluation's seed" in html.unescape(text)
    training.fit_prior(copy, replace(copy.recipe.prior, steps=5), overwrite=True, progress=False)
    with pytest.raises(OSError, match="have not been evaluated: ncpvae evaluate"):
        comparison.compare([copy.folder])
    assert "have not been measured" in reporting.report(open_run(copy.folder)).read_text()


def test_comparisons_say_what_was_measured_otherwise(run, tmp_path):
    evaluation.evaluate(run)
    shutil.copytree(run.folder, tmp_path / "other")
    other = open_run(tmp_path / "other")
    evaluation.evaluate(other, replace(other.recipe.evaluation, test_examples=50))
    table = comparison.compare([run.folder, other.folder])
    assert "not measured alike, test NLL, SNIS bound" in table and "50 examples" in table


def test_data_that_cannot_be_drawn_have_a_page_without_pictures(tmp_path):
    numpy.savez(tmp_path / "five.npz", train=torch.randn(500, 5).numpy())
    recipe = replace(RECIPES["gaussians"], data=f"npz:{tmp_path / 'five.npz'}", shape=(5,), steps=10, hidden=(8,))
    e = replace(recipe.evaluation, importance_samples=2, snis_proposals=8, sir_proposals=20, samples=30, pictures=8)
    recipe = replace(recipe, evaluation=e, prior=replace(recipe.prior, steps=5, hidden=(8,), log_z_samples=100))
    run, _ = training.train(tmp_path / "run", "gaussians", recipe, "x", progress=False)
    training.fit_prior(run, progress=False)
    assert evaluation.evaluate(open_run(tmp_path / "run"))
    assert "Weights" in reporting.report(open_run(tmp_path / "run")).read_text()


def test_models_of_another_run_are_refused(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run")
    other = RECIPES["gaussians"].vae()
    other.save_pretrained(tmp_path / "run" / "vae")
    with pytest.raises(ValueError, match=r"is not of this run: it makes \(2,\), not \(1, 8, 8\)"):
        open_run(tmp_path / "run").vae()
    replace(small(), latent_dim=3).vae().save_pretrained(tmp_path / "run" / "vae")
    with pytest.raises(ValueError, match=r"is a prior of \(10,\), and the VAE has codes of \(3,\)"):
        open_run(tmp_path / "run").prior()


def test_a_refitted_base_is_not_called_the_prior(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run")
    copy = open_run(tmp_path / "run")
    training.fit_prior(copy, replace(copy.recipe.prior, base="mixture", steps=5), overwrite=True, progress=False)
    figures = {f.name: f for f in evaluation.evaluate(open_run(copy.folder))}
    assert names.JSD not in figures and figures["JSD(q(z) ‖ mixture fitted to q(z))"].base is None
    text = reporting.report(open_run(copy.folder)).read_text()
    assert "reweights a base of its own" in text and "The prior hole was" not in text


def test_examples_encoded_once_train_the_same_classifier_where_nothing_is_augmented(run, tmp_path, monkeypatch):
    encoded = []
    encode = VAE.encode
    monkeypatch.setattr(VAE, "encode", lambda self, x: (encoded.append(len(x)), encode(self, x))[1])
    weights, counts = [], []
    for once in (False, True):
        folder = tmp_path / f"{once}"
        shutil.copytree(run.folder, folder)
        copy = open_run(folder)
        stage = replace(copy.recipe.prior, encode_once=once)
        encoded.clear()
        training.fit_prior(copy, stage, overwrite=True, progress=False)
        counts.append(sum(encoded))
        weights.append(load_file(folder / "prior" / "model" / "model.safetensors"))
    examples, held_out = (len(part) for part in run.dataset.splits[:2])
    assert counts[1] == examples + -(-training.MIN_VALIDATION // held_out) * held_out
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-4)


def test_stage_two_and_the_execution_may_differ_when_stage_one_is_resumed(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run")
    changed = replace(small(), prior=replace(small().prior, steps=7))
    changed = replace(changed, execution=replace(changed.execution, keep_checkpoints=1))
    again, _ = training.train(tmp_path / "run", "digits", changed, "x", resume="auto", progress=False)
    weights = [load_file(folder / "vae" / "model.safetensors") for folder in (run.folder, again.folder)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    begun = {"format": "ncpvae-run", "version": 1, "recipe": "digits", "settings": {}}
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_text(json.dumps(begun))  # nothing has been trained: it is no run yet
    assert new_run(tmp_path / "new", "digits", small(), "x").recipe == small()


def test_other_settings_do_not_go_into_the_same_folder(run):
    with pytest.raises(ValueError, match=r"is of another run \(steps = 60, now 61\); take another --output"):
        new_run(run.folder, "digits", replace(small(), steps=61), "again")
    with pytest.raises(ValueError, match="is of another run"):
        new_run(run.folder, "gaussians", RECIPES["gaussians"], "again")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not the folder of a run"),
        ("{", "no usable JSON"),
        ('{"format": "ncpvae-run", "version": 9}', "must be 'ncpvae-run' of version 1"),
        ('{"format": "ncpvae-run", "version": 1, "recipe": "nope"}', "recipe must be one of"),
        ('{"format": "ncpvae-run", "version": 1, "recipe": "digits", "settings": 3}', "settings must be an object"),
        ('{"format": "ncpvae-run", "version": 1, "recipe": "digits", "settings": {}}', "commands must be a list"),
    ],
)
def test_what_is_no_run_is_said_to_be_none(content, message, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises((OSError, ValueError), match=message):
        open_run(tmp_path)


def test_unfinished_runs_say_what_to_do(tmp_path):
    run = new_run(tmp_path, "digits", small(), "x")
    with pytest.raises(OSError, match="no trained VAE yet: finish it with --resume auto"):
        run.vae()
    with pytest.raises(OSError, match="no noise contrastive prior yet: ncpvae fit-prior"):
        run.prior()
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda"):
        open_run(tmp_path, device="toaster")


def test_the_shape_must_be_that_of_the_data(tmp_path):
    with pytest.raises(ValueError, match=r"that of the examples of 'digits', \(1, 8, 8\), got \(1, 28, 28\)"):
        training.train(tmp_path, "mnist-mlp", replace(RECIPES["mnist-mlp"], data="digits"), "x", progress=False)


def test_pixels_of_another_scale_are_refused(tmp_path):
    recipe = replace(RECIPES["mnist-mlp"], data="digits", shape=(1, 8, 8))
    message = "data must be images with pixels in 0 … 255 for mnist-mlp, got images with pixels in 0 … 16 of 'digits'"
    with pytest.raises(ValueError, match=message):
        training.train(tmp_path / "mnist", "mnist-mlp", recipe, "x", progress=False)
    recipe = replace(RECIPES["gaussians"], data="digits", shape=(1, 8, 8))
    with pytest.raises(ValueError, match="data must be vectors or text for gaussians, got images with"):
        training.train(tmp_path / "points", "gaussians", recipe, "x", progress=False)


def test_the_decoders_noise_is_not_that_of_the_prior(tmp_path):
    recipe = replace(RECIPES["gaussians"], latent_dim=2, hidden=(4,), steps=1)
    run, _ = training.train(tmp_path / "run", "gaussians", recipe, "x", progress=False)
    vae = run.vae()
    z = sampling.from_base(vae.prior_distribution(), 2000, 0)
    noise = sampling.decoded(run, vae, z, 0) - sampling.decode_mean(vae, z)
    for a, b in zip(z.T, noise.T, strict=True):
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.1


def test_features_are_tried_before_anything_is_measured(run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "likelihoods", None)
    with pytest.raises(OSError, match="missing"):
        evaluation.evaluate(run, features=str(tmp_path / "missing"))
    other = FeatureClassifier([1, 16, 16], 2, maximum=255)
    other.trained("squares", 1.0).save_pretrained(tmp_path / "features")
    with pytest.raises(ValueError, match="FeatureClassifier"):
        evaluation.evaluate(run, features=str(tmp_path / "features"))
    recipe = replace(RECIPES["gaussians"], hidden=(4,), steps=1)
    points, _ = training.train(tmp_path / "points", "gaussians", recipe, "x", progress=False)
    with pytest.raises(ValueError, match="features must be None for gaussians, whose examples are"):
        evaluation.evaluate(points, features="anything")


@pytest.mark.parametrize(("held_out", "missing"), [(12, {"memorisation C_T"}), (4, {"density", "memorisation C_T"})])
def test_few_test_examples_cost_the_figures_that_need_more(tmp_path, held_out, missing):
    splits = {"train": 100, "validation": 10, "test": held_out}
    numpy.savez(tmp_path / "x.npz", **{name: torch.randn(count, 3).numpy() for name, count in splits.items()})
    recipe = replace(RECIPES["gaussians"], data=f"npz:{tmp_path / 'x.npz'}", shape=(3,), steps=2, hidden=(4,))
    e = replace(recipe.evaluation, importance_samples=2, samples=30, test_examples=1)
    run, _ = training.train(tmp_path / "run", "gaussians", replace(recipe, evaluation=e), "x", progress=False)
    with pytest.warns(UserWarning, match=f"there are {held_out}"):
        found = {figure.name: figure for figure in evaluation.evaluate(run)}
    assert not missing & found.keys() and {"test NLL", "active units"} <= found.keys()
    assert found["test NLL"].base_error is None  # of one example
    assert "NaN" not in (run.folder / "evaluation.json").read_text()


def test_one_test_example_is_trained_with_and_named_where_it_is_too_few(tmp_path):
    splits = {"train": 30, "validation": 5, "test": 1}
    numpy.savez(tmp_path / "x.npz", **{name: torch.randn(count, 2).numpy() for name, count in splits.items()})
    recipe = replace(RECIPES["gaussians"], data=f"npz:{tmp_path / 'x.npz'}", steps=2, hidden=(4,))
    run, _ = training.train(tmp_path / "run", "gaussians", recipe, "x", progress=False)
    text = reporting.report(run).read_text()
    assert "A VAE trained on npz:x.npz for 2 steps" in html.unescape(text)
    for measure in (evaluation.evaluate, diagnosis.diagnose):
        with pytest.raises(ValueError, match=r"the test split of 'npz:.*' must hold 2 examples or more, got 1"):
            measure(run)


def test_means_outside_of_pictures_are_shown_as_black_and_white(tmp_path):
    x = numpy.repeat(numpy.array([0, 255], dtype=numpy.uint8), 100)[:, None, None, None] * numpy.ones((1, 1, 8, 8))
    numpy.savez(tmp_path / "x.npz", train=x.astype(numpy.uint8)[numpy.random.default_rng(0).permutation(200)])
    recipe = replace(RECIPES["images-conv"], data=f"npz:{tmp_path / 'x.npz'}", shape=(1, 8, 8), channels=(4, 8))
    recipe = replace(recipe, latent_dim=2, steps=3, batch_size=16, lr=1.0, schedule="constant")
    run, _ = training.train(tmp_path / "run", "images-conv", recipe, "x", progress=False)
    _, copies = sampling.reconstructed(run, run.dataset.splits.test)
    assert copies.min() >= 0 and copies.max() <= 1
    diagnosis.diagnose(run)
    assert reporting.report(run).is_file()
    vae, examples = run.vae(), run.dataset.splits.test
    shown = diagnosis.traversals(run, vae, examples, diagnosis.measure(run, vae, examples, 4, 0), 0)
    assert shown.decoded.min() >= 0 and shown.decoded.max() <= 1


def test_samples_are_written_without_matplotlib(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.warns(UserWarning, match="no picture beside .*pictures need matplotlib"):
        path, _ = sampling.sample(run, 2, sampling.Sampling(), output=tmp_path / "x.safetensors")
    assert load_file(path)["x"].shape == (2, 1, 8, 8)


def test_features_need_a_folder_and_classes(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        features.train_features("digits", tmp_path / "file" / "out", steps=1)
    x = numpy.zeros((40, 1, 8, 8), dtype=numpy.uint8)
    numpy.savez(tmp_path / "x.npz", train=x, train_labels=numpy.arange(40) % 3 - 1)
    with pytest.raises(ValueError, match=r"labels must be classes 0 … 1, .* got -1 … 1 in split 'train'"):
        features.train_features(f"npz:{tmp_path / 'x.npz'}", tmp_path / "out", steps=1, progress=False)
    numpy.savez(tmp_path / "x.npz", train=x, train_labels=numpy.arange(40) * 10**9)
    with pytest.raises(ValueError, match=r"labels must be classes 0, 1, …, fewer than the 32 training images, got"):
        features.train_features(f"npz:{tmp_path / 'x.npz'}", tmp_path / "out", steps=1, progress=False)
    assert not (tmp_path / "out").exists()


def test_mnist_from_end_to_end(data_folder, tmp_path):
    pytest.importorskip("datasets")
    recipe = RECIPES["mnist-mlp"]
    e = replace(
        recipe.evaluation,
        importance_samples=2,
        snis_proposals=8,
        sir_proposals=20,
        samples=40,
        pictures=4,
        test_examples=50,
    )
    recipe = replace(recipe, steps=20, evaluation=e, prior=StageTwo(hidden=(8,), steps=10, log_z_samples=100))
    run, result = training.train(tmp_path, "mnist-mlp", recipe, "x", data_folder=data_folder, progress=False)
    assert result.history[-1]["validation_loss"] < 400
    training.fit_prior(run, progress=False)
    assert evaluation.evaluate(open_run(tmp_path, data_folder=data_folder))[0].base > 50
    assert reporting.report(open_run(tmp_path, data_folder=data_folder)).stat().st_size > 50_000
