"""Runs with critics from training to the comparison, and the recipes of the critics' experiments."""

import json
import shutil
import statistics
from dataclasses import replace

import pytest
import torch

from ncpvae.critics import HybridCritic, NeuralCritic, SelfCritic
from ncpvae.data import load_vocabulary
from ncpvae.recipes import RECIPES, CriticSettings, Remedies, initialised
from ncpvae.runs import comparison, evaluation, open_run, sampling, training
from ncpvae.text_vae import TextDistribution

QUICK = {"importance_samples": 4, "snis_proposals": 10, "test_examples": 20, "samples": 60, "sir_proposals": 50}


def run_of(folder, name, **settings):
    """A trained and measured run of a few steps."""
    recipe = replace(RECIPES[name], **{"steps": 4, "batch_size": 64, "validate_every": 2, **settings})
    recipe = replace(recipe, evaluation=replace(recipe.evaluation, **QUICK, pictures=4))
    run, _ = training.train(folder, name, recipe, f"ncpvae train {name}", progress=False)
    evaluation.evaluate(run)
    return run


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder, critic = tmp_path_factory.mktemp("toys"), RECIPES["toy-gmm"].critic
    return [
        run_of(folder / f"{kind}-{seed}", "toy-gmm", seed=seed, critic=replace(critic, kind=kind))
        for kind in ("none", "neural")
        for seed in (0, 1, 2)
    ]


def test_runs_that_differ_by_the_seed_are_one_row_with_mean_and_deviation(toys):
    figures = [{f.name: f for f in evaluation.read_figures(run)} for run in toys[:3]]
    values = [f[evaluation.MI].base for f in figures]
    text = comparison.compare([run.folder for run in toys])
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    assert {"critic.kind none", "critic.kind neural"} <= rows.keys()
    assert f"{statistics.fmean(values):.4g} ({statistics.stdev(values):.2g})" in rows["critic.kind none"]
    assert rows["critic.kind none"].split()[2] == "3"  # runs
    assert "mean (standard deviation) over runs that differ by the seed alone" in text
    assert "144.09 (12.59)" in text and "MI within minibatches" in text  # what was published, and how


def test_figures_measured_differently_are_not_averaged(toys, tmp_path):
    folders = [shutil.copytree(run.folder, tmp_path / run.folder.name) for run in toys[:2]]
    run = open_run(folders[1])
    evaluation.evaluate(run, replace(run.recipe.evaluation, test_examples=7))
    text = comparison.compare(folders, tmp_path / "figures.json")
    assert "runs that differ by the seed alone" not in text
    remarks = json.loads((tmp_path / "figures.json").read_text())["remarks"]
    assert any(remark.startswith("not measured alike, test NLL") for remark in remarks)
    assert "not measured alike, test NLL" in text and "7 examples" in text


def test_published_figures_stand_beside_models_they_are_of(toys, tmp_path):
    """And what the runs have otherwise than the source is said."""
    text = comparison.compare([run.folder for run in toys])
    assert "critic.kind neural: not as published but with steps = 4 (4740), batch_size = 64 (1024)" in text
    other = run_of(tmp_path / "other", "toy-gmm", critic=replace(RECIPES["toy-gmm"].critic, kind="self", weight=1.0))
    assert "159.54" not in comparison.compare([other.folder])


def test_the_record_holds_every_run_with_settings_and_protocols(toys, tmp_path):
    comparison.compare([run.folder for run in toys], tmp_path / "figures.json")
    found = json.loads((tmp_path / "figures.json").read_text())
    assert [(m["label"], [r["seed"] for r in m["runs"]]) for m in found["models"]] == [
        ("critic.kind none", [0, 1, 2]),
        ("critic.kind neural", [0, 1, 2]),
    ]
    first = found["models"][0]["runs"][0]
    assert first["settings"]["critic"]["kind"] == "none" and first["stage_one"]["seconds"] > 0
    assert all({"name", "base", "protocol"} <= figure.keys() for figure in first["figures"])
    assert any(remark.startswith("published: ") for remark in found["remarks"])


def test_single_runs_keep_their_names_and_errors(toys):
    text = comparison.compare([toys[0].folder, toys[3].folder])
    assert "none-0: base" in text and "neural-0: base" in text
    mi = next(f for f in evaluation.read_figures(toys[0]) if f.name == evaluation.MI)
    assert f"{mi.base:.4g} ± {mi.base_error:.2g}" in text


def test_equal_seeds_are_not_averaged(toys):
    groups = comparison.grouped([toys[0], toys[0], toys[1]])
    assert sorted(len(group.runs) for group in groups) == [1, 2]


def test_a_neural_critic_of_a_run_starts_with_weights_of_its_own(tmp_path):
    recipe = replace(RECIPES["digits"], critic=CriticSettings("neural"), steps=1, batch_size=8)
    run, _ = training.train(tmp_path / "run", "digits", recipe, "ncpvae train digits", progress=False)
    vae = run.vae()
    heads = dict(run.critic(vae).heads.x_head[0].named_parameters())
    for name, weight in vae.encoder.network.named_parameters():
        if weight.dim() > 1:  # biases of norms begin at 0 in both
            assert (heads[name] - weight).abs().mean() > 0.01  # a step of Adam moves a weight by 0.001


def test_every_evaluation_tells_what_the_codes_hold(toys):
    figures = {f.name: f for f in evaluation.read_figures(toys[0])}
    assert figures[evaluation.CAP].base == pytest.approx(9.903, abs=1e-3)  # log 20,000
    assert figures[evaluation.KL].base == pytest.approx(
        figures[evaluation.MI].base + figures[evaluation.MARGINAL_KL].base, rel=0.1
    )
    assert "for comparison with published tables only" in figures["units with std of sampled z > 0.1"].protocol


def test_the_critic_is_saved_with_the_run(toys):
    run = toys[3]
    vae = run.vae()
    critic = run.critic(vae)
    assert isinstance(critic, NeuralCritic) and not critic.training
    fresh = initialised(run.recipe.seed, lambda: run.recipe.build_critic(vae))
    assert not torch.equal(critic.x_head[0].weight, fresh.x_head[0].weight)
    assert toys[0].critic(vae) is None
    other = replace(run, recipe=replace(run.recipe, critic=replace(run.recipe.critic, kind="hybrid")))
    with pytest.raises(ValueError, match=r"critic/model.safetensors is not of this run"):
        other.critic(vae)


@pytest.mark.parametrize("name", ["omniglot-conv", "omniglot-pixelcnn", "text-lstm", "mnist-mlp", "digits"])
def test_every_recipe_has_its_critics(name):
    recipe = RECIPES[name]
    if name == "text-lstm":
        recipe = replace(recipe, vocabulary=50, embedding_dim=4, hidden_dim=8, shape=(12,))
    vae = recipe.vae()
    x = recipe.example(3)
    for kind, cls in (("self", SelfCritic), ("neural", HybridCritic), ("hybrid", HybridCritic)):
        critic = replace(recipe, critic=replace(recipe.critic, kind=kind)).build_critic(vae)
        assert isinstance(critic, cls)
        posterior, seen = critic.encode(vae, x)
        assert critic(seen, posterior, posterior.sample()).positive.shape == (3,)
    shares = {"omniglot-conv": 4, "omniglot-pixelcnn": 4}
    assert recipe.critic.share == shares.get(name, 1)


def test_text_from_training_to_samples(tmp_path):
    words = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree"]
    generator = torch.Generator().manual_seed(0)
    lines = [" ".join(words[i] for i in torch.randint(10, (6,), generator=generator)) for _ in range(300)]
    (tmp_path / "corpus.txt").write_text("\n".join(lines))
    run = run_of(
        tmp_path / "run",
        "text-lstm",
        data=f"text:{tmp_path / 'corpus.txt'}",
        shape=(10,),
        batch_size=8,
        vocabulary=20,
        embedding_dim=4,
        hidden_dim=8,
        critic=CriticSettings("hybrid", 40.0, share=1),
    )
    assert set(load_vocabulary(run.folder / "vocabulary.json")) >= set(words)
    assert isinstance(run.vae().decode(torch.zeros(1, 32)), TextDistribution)
    figures = {f.name: f for f in evaluation.read_figures(run)}
    assert figures["perplexity"].base > 1
    assert "most frequent words" in figures["density"].protocol
    path, _ = sampling.sample(run, 3, sampling.Sampling(), base=True)
    assert len(path.with_suffix(".txt").read_text().splitlines()) == 4
    copies = sampling.reconstruct(run, 2).with_suffix(".txt").read_text()
    assert "# test examples" in copies and "# reconstructions" in copies
    between = sampling.interpolate(run, 2, 3).with_suffix(".txt").read_text().splitlines()
    assert [i for i, line in enumerate(between) if not line] == [4] and len(between) == 8  # a title, then each pair
    with (tmp_path / "corpus.txt").open("a") as file:
        file.write("\n" + "\n".join(["zebra tree mat"] * 100))
    with pytest.raises(ValueError, match=r"data must have the words that the run was trained with, .*vocabulary\.json"):
        evaluation.evaluate(open_run(run.folder))


def test_the_shape_of_text_is_one_number():
    for shape in ((8, 9), (2,)):
        with pytest.raises(ValueError, match="shape must be one number of tokens ≥ 3 for text, got"):
            replace(RECIPES["text-lstm"], shape=shape)


def test_an_autoregressive_decoder_from_training_to_samples(tmp_path, data_folder):
    run = run_of(tmp_path / "run", "omniglot-pixelcnn", batch_size=4, kernel_sizes=(5, 3), pixel_channels=4)
    figures = {f.name: f for f in evaluation.read_figures(run)}
    assert "samples being draws, as data" in figures["density"].protocol
    x = sampling.decoded(run, run.vae(), torch.zeros(2, 32), seed=0)
    assert set(x.unique().tolist()) <= {0.0, 1.0}
    torch.testing.assert_close(sampling.decoded(run, run.vae(), torch.zeros(2, 32), seed=0), x)


def test_remedies_become_arguments_of_the_training():
    recipe = replace(
        RECIPES["digits"], remedies=Remedies("cyclical", free_bits=2.0, free_bits_per="dimension", aggressive_steps=9)
    )
    fitting = recipe.fitting()
    assert fitting["kl_weight"](0) == 0.0 and fitting["kl_weight"](recipe.steps) == 1.0
    assert fitting["free_bits"].per == "dimension" and fitting["aggressive"].steps == 9
    linear = replace(recipe, remedies=Remedies("linear"), kl_weight=0.5).fitting()["kl_weight"]
    assert linear(recipe.steps // 6) == pytest.approx(0.25) and linear(recipe.steps) == 0.5
    assert RECIPES["digits"].fitting()["kl_weight"] == 1.0
    assert RECIPES["omniglot-conv"].vae().encoder.min_kl == 0.0
    with_floor = replace(RECIPES["omniglot-conv"], remedies=Remedies(min_kl=3.0))
    assert with_floor.vae().encoder.min_kl == 3.0
    with pytest.raises(ValueError, match=r"remedies.min_kl must be 0"):
        replace(RECIPES["text-lstm"], remedies=Remedies(min_kl=1.0)).vae()
