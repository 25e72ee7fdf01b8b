"""What is saved is what is loaded, and what is loaded from a stranger is a module of ours or an error."""

import copy
import inspect
import json
import math
import os
import pickle
import re
import shutil
import signal
import threading
import warnings

import pytest
import torch
from huggingface_hub import ModelHubMixin
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributions import Distribution, Independent

import ncpvae
from ncpvae import _description
from ncpvae.distributions import LogisticMixtureLikelihood, PixelNormalLikelihood
from ncpvae.hierarchy import Given
from ncpvae.nvae import NVAE
from ncpvae.pixelcnn import PixelCNNLikelihood
from ncpvae.pretrained import PartNeeded, Pretrained
from ncpvae.priors import HierarchicalNCP, group_classifiers
from ncpvae.text_vae import LatentContext, TextEncoder, TextLikelihood, text_vae


def mlp_vae(prior=None):
    encoder = ncpvae.MLPEncoder(12, (8,), 3, nn.Tanh, input_mean=torch.rand(1, 3, 4))
    decoder = ncpvae.MLPDecoder(3, [8], (1, 3, 4), activation=nn.ReLU)
    return ncpvae.VAE(encoder, decoder, ncpvae.BernoulliLikelihood(), prior or ncpvae.Normal(3))


def conv_vae():
    encoder = ncpvae.ConvEncoder((1, 8, 8), (4, 6), 3, kernel_size=3, scale="tanh")
    decoder = ncpvae.ConvDecoder(3, (6, 4), (1, 8, 8), kernel_size=3)
    return ncpvae.VAE(encoder, decoder, ncpvae.NormalLikelihood(0.3, learn_std=True), ncpvae.Normal(3, learn=True))


def mixture(full: bool):
    scale = torch.linalg.cholesky(torch.eye(3) + 0.2).expand(4, 3, 3) if full else torch.rand(4, 3) + 0.1
    return ncpvae.GaussianMixture(torch.randn(4), torch.randn(4, 3), scale)


def reweighted(base=None):
    return ncpvae.NoiseContrastivePrior(base or ncpvae.Normal(3), ncpvae.MLPClassifier(3, (8,), nn.LeakyReLU))


X, X8, Z, MAPS = torch.rand(5, 1, 3, 4), torch.rand(5, 1, 8, 8), torch.randn(5, 3), torch.randn(5, 2, 4, 8)
TEXT = torch.tensor([[2, 4, 5, 6, 3], *[[2, 1, 6, 3, 0]] * 4])


#: name → a module, and something to see that another does the same
def hierarchical():
    vae = NVAE((1, 8, 8), channels=2, groups_per_scale=(1, 1), latent_channels=1, halvings=0)
    return HierarchicalNCP(vae, group_classifiers(vae, channels=8, blocks=1))


FAMILY = {
    "VAE of MLPs": (mlp_vae, lambda m: [m.encode(X), m.decode(Z), m.prior_distribution()]),
    "VAE of convolutions": (conv_vae, lambda m: [m.encode(X8), m.decode(Z), m.prior_distribution()]),
    "VAE with a reweighted prior": (lambda: mlp_vae(reweighted()), lambda m: [m.decode(Z), m.prior.log_ratio(Z)]),
    "MLPEncoder": (lambda: ncpvae.MLPEncoder(12, [8], 3, nn.GELU, scale="exp"), lambda m: m(X)),
    "ConvEncoder": (lambda: ncpvae.ConvEncoder((1, 8, 8), (4,), 3, input_mean=torch.rand(8, 8)), lambda m: m(X8)),
    "MLPDecoder": (lambda: ncpvae.MLPDecoder(3, (), torch.Size((2, 2))), lambda m: m(Z)),
    "ConvDecoder": (lambda: ncpvae.ConvDecoder(3, (4, 4), (3, 4, 6)), lambda m: m(Z)),
    "StackedConvEncoder": (lambda: ncpvae.StackedConvEncoder((1, 8, 8), ((2, 3, 2),), 3), lambda m: m(X8)),
    "StackedConvDecoder": (lambda: ncpvae.StackedConvDecoder(3, ((2, 3, 2),), (1, 8, 8)), lambda m: m(Z)),
    "BernoulliLikelihood": (ncpvae.BernoulliLikelihood, lambda m: m(Z, 1)),
    "BinomialLikelihood": (lambda: ncpvae.BinomialLikelihood(16), lambda m: m(Z, 1)),
    "NormalLikelihood": (lambda: ncpvae.NormalLikelihood(0.2), lambda m: m(Z, 1)),
    "PixelCNNLikelihood": (
        lambda: PixelCNNLikelihood(2, 3, range(5, 0, -2)),
        lambda m: m(MAPS, 3).log_prob((MAPS[:, :1] > 0).float()),
    ),
    "PixelNormalLikelihood": (PixelNormalLikelihood, lambda m: m(MAPS, 3)),
    "LogisticMixtureLikelihood": (
        lambda: LogisticMixtureLikelihood(1, bits=5),
        lambda m: m(MAPS[:, [0, 1, 0]], 3).mean,
    ),
    "NVAE": (
        lambda: NVAE((1, 6, 7), channels=2, groups_per_scale=(2, 1), latent_channels=1, halvings=1, flows=1),
        lambda m: m.walk(Given([torch.ones(2, *group.shape) for group in m.groups]), 2),
    ),
    "NormalLikelihood, learned": (lambda: ncpvae.NormalLikelihood(0.2, True), lambda m: m(Z, 1)),
    "TextEncoder": (lambda: TextEncoder(7, 4, 5, 3), lambda m: m(TEXT)),
    "TextLikelihood": (lambda: TextLikelihood(7, 4, 5, 3, 9, word_dropout=0.2), lambda m: m(Z).log_prob(TEXT)),
    "LatentContext": (LatentContext, lambda m: m(Z)),
    "VAE of text": (
        lambda: text_vae(7, 3, ncpvae.Normal(3), embedding_dim=4, hidden_dim=5),
        lambda m: [m.encode(TEXT), m.decode(Z).log_prob(TEXT)],
    ),
    "FeatureClassifier": (
        lambda: ncpvae.metrics.FeatureClassifier((1, 8, 8), 3, (4,)).trained("digits", 0.9),
        lambda m: m(X8),
    ),
    "Normal": (lambda: ncpvae.Normal(3), lambda m: m()),
    "Normal, given and learned": (
        lambda: ncpvae.Normal((3, 2, 2), torch.randn(3, 1, 1), torch.rand(2) + 1, learn=True),
        lambda m: m(),
    ),
    "Normal, fitted": (lambda: ncpvae.Normal.fit(torch.randn(9, 2, 4, 8)), lambda m: m()),
    "GaussianMixture, diagonal": (lambda: mixture(full=False), lambda m: m().log_prob(Z)),
    "GaussianMixture, full": (lambda: mixture(full=True), lambda m: m().log_prob(Z)),
    "MLPClassifier": (lambda: ncpvae.MLPClassifier(3), lambda m: m(Z)),
    "MLPClassifier with a context": (
        lambda: ncpvae.MLPClassifier(3, range(4, 8), nn.PReLU, context_features=2),
        lambda m: m(Z, Z[:, :2]),
    ),
    "StandardizedClassifier": (
        lambda: ncpvae.adapters.StandardizedClassifier(ncpvae.MLPClassifier(3), torch.rand(3), torch.rand(3) + 1, 2),
        lambda m: m.classifier(Z) + m.mean.sum() / m.std.sum() * m.multiple,
    ),
    "ResidualClassifier": (lambda: ncpvae.ResidualClassifier(2, channels=8, blocks=1), lambda m: m(MAPS)),
    "ResidualClassifier with a context": (
        lambda: ncpvae.ResidualClassifier(2, 8, context_channels=3, blocks=1),
        lambda m: m(MAPS, torch.ones(5, 3, 4, 8)),
    ),
    "NoiseContrastivePrior": (reweighted, lambda m: m.unnormalized_log_prob(Z)),
    "NoiseContrastivePrior over a mixture": (lambda: reweighted(mixture(full=True)), lambda m: m.log_ratio(Z)),
    "HierarchicalNCP": (hierarchical, lambda m: m.draw(2, ncpvae.SIR(8), generator=0).likelihood),
    "NoiseContrastivePrior over another": (lambda: reweighted(reweighted()), lambda m: m.log_ratio(Z)),
}


def numbers(output):
    """The tensors in what a module returns, a distribution's parameters for it."""
    if isinstance(output, list):
        return [tensor for part in output for tensor in numbers(part)]
    if isinstance(output, Independent):
        return numbers(output.base_dist)
    if isinstance(output, Distribution):
        return [getattr(output, name).expand(output.batch_shape) for name in ("mean", "variance")]
    return [output]


@pytest.mark.parametrize(("make", "use"), FAMILY.values(), ids=FAMILY)
def test_what_is_loaded_is_what_was_saved(make, use, tmp_path):
    module = make()
    for m in module.modules():  # running statistics that are not the initial ones
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(), m.running_var.uniform_(0.5, 2)
    module.save_pretrained(tmp_path / "m")
    before = torch.get_rng_state()
    loaded = type(module).from_pretrained(tmp_path / "m")
    assert torch.equal(torch.get_rng_state(), before)
    assert type(loaded) is type(module) and not any(m.training for m in loaded.modules())
    assert repr(loaded) == repr(module)
    state, expected = loaded.state_dict(), module.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[k], v) or v.isnan().all() for k, v in expected.items())
    parameters = [(n, p.requires_grad) for n, p in loaded.named_parameters()]
    assert parameters == [(n, p.requires_grad) for n, p in module.named_parameters()]
    for ours, theirs in zip(numbers(use(loaded)), numbers(use(module.eval())), strict=True):
        assert torch.equal(ours, theirs)
    loaded.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (tmp_path / "m" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def classes_of_ours():
    found, todo = set(), [Pretrained]
    while todo:
        found |= (new := set(todo.pop().__subclasses__()))
        todo += new
    return {cls.__name__ for cls in found if cls.__module__.startswith("ncpvae.")}


def test_every_class_of_ours_may_be_named_and_every_one_is_tested():
    named = {name for names in _description.CLASSES.values() for name in names}
    assert named == classes_of_ours()
    assert named - {type(make()).__name__ for make, _ in FAMILY.values()} == {"GaussianEncoder"}  # custom, below
    for name in named:
        assert _description._class(name).__name__ == name
    for name in _description.ACTIVATIONS:
        assert issubclass(getattr(nn, name), nn.Module)


@pytest.mark.parametrize("name", _description.ACTIVATIONS)
def test_every_activation_can_be_made_anew(name, tmp_path):
    ncpvae.MLPClassifier(2, (2,), getattr(nn, name)).save_pretrained(tmp_path)
    assert type(ncpvae.MLPClassifier.from_pretrained(tmp_path).network[1]) is getattr(nn, name)


def test_a_loaded_module_trains_on(tmp_path):
    conv_vae().save_pretrained(tmp_path)
    vae = ncpvae.VAE.from_pretrained(tmp_path).train()
    (-vae(X8).likelihood.log_prob(X8).sum() - vae(X8).prior.log_prob(Z).sum()).backward()
    assert all(p.grad is not None for p in vae.parameters())
    copy.deepcopy(vae).save_pretrained(tmp_path / "copy")
    pickle.loads(pickle.dumps(vae)).save_pretrained(tmp_path / "pickled")
    assert (tmp_path / "copy/config.json").read_bytes() == (tmp_path / "pickled/config.json").read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_are_kept(dtype, tmp_path):
    vae = conv_vae().to(dtype)
    vae.save_pretrained(tmp_path)
    loaded = ncpvae.VAE.from_pretrained(str(tmp_path))
    assert {k: v.dtype for k, v in loaded.state_dict().items()} == {k: v.dtype for k, v in vae.state_dict().items()}


def test_the_device_can_be_chosen(tmp_path):
    reweighted().save_pretrained(tmp_path)
    assert {p.device.type for p in ncpvae.NoiseContrastivePrior.from_pretrained(tmp_path).parameters()} == {"cpu"}
    loaded = ncpvae.NoiseContrastivePrior.from_pretrained(tmp_path, map_location=torch.device("meta"))
    assert {p.device.type for p in loaded.parameters()} == {"meta"}


# --- a prior brings log Z and its protocol with it ---


def test_a_prior_brings_log_z_and_its_protocol_with_it(tmp_path):
    prior = reweighted()
    estimate = prior.estimate_log_normalizer(2000)
    protocol = {"steps": 1000, "σ": [0.5, None, {"final": True}], "codes": (1, 2)}
    prior.save_pretrained(tmp_path, protocol=protocol)
    loaded = ncpvae.NoiseContrastivePrior.from_pretrained(tmp_path)
    assert loaded.log_normalizer == estimate and isinstance(loaded.log_normalizer, ncpvae.LogNormalizer)
    assert torch.equal(loaded.log_prob(Z), prior.log_prob(Z))
    assert loaded.protocol == {"steps": 1000, "σ": [0.5, None, {"final": True}], "codes": [1, 2]}
    loaded.forget_log_normalizer()
    loaded.save_pretrained(tmp_path)
    again = ncpvae.NoiseContrastivePrior.from_pretrained(tmp_path)
    assert again.log_normalizer is None and again.protocol == loaded.protocol
    with pytest.raises(RuntimeError, match="estimate_log_normalizer"):
        again.log_prob(Z)


def test_log_z_is_no_victim_of_the_modules_dtype():
    prior = reweighted()
    estimate = prior.estimate_log_normalizer(2000)
    prior.to(torch.bfloat16).to("meta")
    assert prior.log_normalizer == estimate
    assert prior.state_dict()["_extra_state"].tolist() == list(estimate)


def test_without_a_protocol_there_is_none(tmp_path):
    ncpvae.Normal(2).save_pretrained(tmp_path)
    assert ncpvae.Normal.from_pretrained(tmp_path).protocol is None


@pytest.mark.parametrize(
    "protocol",
    [[1], {"a": torch.ones(1)}, {"a": "\ud800"}, {"a": "x" * (1 << 24)}],
    ids=["list", "tensor", "surrogate", "long"],
)
def test_a_protocol_that_is_no_json_is_refused_before_anything_is_written(protocol, tmp_path):
    with pytest.raises(TypeError, match="protocol must be a JSON object"):
        ncpvae.Normal(2).save_pretrained(tmp_path / "m", protocol=protocol)
    assert not any(tmp_path.iterdir())


# --- parts of somebody else's class ---


class MyNet(nn.Module):
    def __init__(self, width: int = 4):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, z, context=None):
        return self.layers(z).squeeze(-1)


class MyPrior(Pretrained):
    def __init__(self, base: nn.Module, scale: float, table: torch.Tensor, activation=nn.Tanh):
        super().__init__()
        self.base, self.scale = base, scale
        self.activation = activation()
        self.register_buffer("table", table)
        self.register_buffer("fixed", torch.arange(3.0), persistent=False)

    def forward(self, context=None):
        return self.base()


def test_a_classifier_of_ones_own_is_handed_in_when_it_is_loaded(tmp_path):
    prior = ncpvae.NoiseContrastivePrior(ncpvae.Normal(3), MyNet())
    prior.save_pretrained(tmp_path)
    with pytest.raises(PartNeeded, match=r"classifier is of the class 'MyNet'.*classifier=…"):
        ncpvae.NoiseContrastivePrior.from_pretrained(tmp_path)
    net = MyNet()
    loaded = ncpvae.NoiseContrastivePrior.from_pretrained(tmp_path, classifier=net)
    assert loaded.classifier is net and torch.equal(loaded.log_ratio(Z), prior.log_ratio(Z))


def test_a_part_further_down_has_a_dotted_name(tmp_path):
    vae = mlp_vae(ncpvae.NoiseContrastivePrior(mixture(full=False), MyNet()))
    vae.save_pretrained(tmp_path)
    with pytest.raises(PartNeeded, match=re.escape('**{"prior.classifier": …}')):
        ncpvae.VAE.from_pretrained(tmp_path)
    loaded = ncpvae.VAE.from_pretrained(tmp_path, **{"prior.classifier": MyNet()})
    assert torch.equal(loaded.prior.log_ratio(Z), vae.prior.log_ratio(Z))


def test_a_network_of_torchs_own_modules_is_handed_in(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
    encoder = ncpvae.GaussianEncoder(network, input_mean=torch.rand(4))
    encoder.save_pretrained(tmp_path)
    with pytest.raises(PartNeeded, match="network is of the class 'Sequential'"):
        ncpvae.GaussianEncoder.from_pretrained(tmp_path)
    loaded = ncpvae.GaussianEncoder.from_pretrained(tmp_path, network=copy.deepcopy(network))
    assert torch.equal(loaded(X).mean, encoder(X).mean)


def test_an_activation_of_ones_own_is_handed_in(tmp_path):
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    classifier = ncpvae.MLPClassifier(3, (4,), Double)
    classifier.save_pretrained(tmp_path)
    with pytest.raises(PartNeeded, match="activation is of the class '.*Double'"):
        ncpvae.MLPClassifier.from_pretrained(tmp_path)
    assert torch.equal(ncpvae.MLPClassifier.from_pretrained(tmp_path, activation=Double)(Z), classifier(Z))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"classifier": MyNet(5)}, r"classifier.layers.0.bias must be \(5,\), got \(4,\)"),
        ({"classifier": nn.Linear(3, 1)}, "missing: classifier.bias, classifier.weight"),
        ({"classifier": 3}, "classifier must be a module, got int"),
        ({"classifier": MyNet(), "clasifier": MyNet()}, "got clasifier, but NoiseContrastivePrior was saved with no"),
    ],
    ids=["shape", "names", "type", "misspelt"],
)
def test_a_part_that_does_not_fit_is_named(parts, message, tmp_path):
    ncpvae.NoiseContrastivePrior(ncpvae.Normal(3), MyNet()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        ncpvae.NoiseContrastivePrior.from_pretrained(tmp_path, **parts)


def test_a_class_of_ones_own_is_saved_and_loaded_by_itself(tmp_path):
    prior = MyPrior(ncpvae.Normal(3, torch.randn(3)), 0.5, torch.randn(2, 2), nn.ReLU)
    prior.save_pretrained(tmp_path)
    loaded = MyPrior.from_pretrained(tmp_path)
    assert type(loaded) is MyPrior and loaded.scale == 0.5 and type(loaded.activation) is nn.ReLU
    assert torch.equal(loaded.table, prior.table) and torch.equal(loaded.base.mean, prior.base.mean)
    assert torch.equal(loaded.fixed, prior.fixed)
    with pytest.raises(PartNeeded, match="'MyPrior', not a class of ncpvae"):
        Pretrained.from_pretrained(tmp_path)


def test_a_class_of_ones_own_with_a_name_of_ours_is_not_taken_for_ours(tmp_path):
    class Normal(nn.Module):
        forward = ncpvae.Normal.forward

    vae = mlp_vae(Normal())
    vae.save_pretrained(tmp_path)
    with pytest.raises(PartNeeded, match="prior is of the class '.*Normal'"):
        ncpvae.VAE.from_pretrained(tmp_path)


def test_a_plain_distribution_cannot_be_saved_and_the_error_says_what_can(tmp_path):
    base = Independent(torch.distributions.Normal(torch.zeros(3), 1.0), 1)
    for module in (ncpvae.NoiseContrastivePrior(base, ncpvae.MLPClassifier(3)), mlp_vae(base)):
        with pytest.raises(ValueError, match=r"torch Distribution \(Independent\).*ncpvae.Normal"):
            module.save_pretrained(tmp_path / "m")
    assert not any(tmp_path.iterdir())


def test_a_module_changed_after_it_was_made_is_refused_and_one_with_new_parts_is_not(tmp_path):
    prior = reweighted()
    prior.base, prior.classifier = mixture(full=False), ncpvae.MLPClassifier(3, (5, 5))
    prior.save_pretrained(tmp_path / "m")
    loaded = ncpvae.NoiseContrastivePrior.from_pretrained(tmp_path / "m")
    assert torch.equal(loaded.log_ratio(Z), prior.log_ratio(Z)) and isinstance(loaded.base, ncpvae.GaussianMixture)
    prior.classifier.network.append(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="not what its arguments make any more"):
        prior.save_pretrained(tmp_path / "m")
    assert ncpvae.NoiseContrastivePrior.from_pretrained(tmp_path / "m") is not None


def test_positional_arguments_without_names_are_refused(tmp_path):
    class Many(Pretrained):
        def __init__(self, *layers):
            super().__init__()

    with pytest.raises(ValueError, match=r"Many was made with \*args"):
        Many(nn.Linear(1, 1)).save_pretrained(tmp_path / "m")


# --- memory that is shared ---


def test_tied_weights_are_written_once_and_tied_again(tmp_path):
    decoder = ncpvae.MLPDecoder(3, (3,), (3,))
    decoder[2].weight = decoder[0].weight
    decoder.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == {"0.weight", "0.bias", "2.bias"}
    loaded = ncpvae.MLPDecoder.from_pretrained(tmp_path)
    assert loaded[2].weight is loaded[0].weight and isinstance(loaded[0].weight, nn.Parameter)
    assert torch.equal(loaded(Z), decoder(Z))


def test_a_module_that_is_two_parts_at_once_is_saved(tmp_path):
    base = mixture(full=False)
    prior = ncpvae.NoiseContrastivePrior(ncpvae.NoiseContrastivePrior(base, net := ncpvae.MLPClassifier(3, (4,))), net)
    prior.save_pretrained(tmp_path)
    loaded = ncpvae.NoiseContrastivePrior.from_pretrained(tmp_path)
    assert loaded.classifier.network[0].weight is loaded.base.classifier.network[0].weight
    vae = mlp_vae(base)
    ncpvae.NoiseContrastivePrior(vae.prior, net).save_pretrained(tmp_path)
    assert torch.equal(ncpvae.NoiseContrastivePrior.from_pretrained(tmp_path).base.mean, base.mean)


def test_views_of_one_memory_are_written_as_they_are(tmp_path):
    memory = torch.randn(20)
    parts = memory[:4], memory[2:14].view(4, 3), memory[:12].view(3, 4).T.abs()
    mixed = ncpvae.GaussianMixture(*parts)
    assert mixed.mean.untyped_storage().data_ptr() == mixed.log_weight.untyped_storage().data_ptr()
    mixed.save_pretrained(tmp_path)
    loaded = ncpvae.GaussianMixture.from_pretrained(tmp_path)
    assert torch.equal(loaded().log_prob(Z), mixed().log_prob(Z))
    assert (tmp_path / "model.safetensors").stat().st_size < 2000


# --- files ---


def test_the_folder_holds_safetensors_and_json_and_a_card(tmp_path):
    reweighted().save_pretrained(tmp_path / "new" / "prior")
    folder = tmp_path / "new" / "prior"
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["format"], config["version"], config["library_version"]) == ("ncpvae", 1, ncpvae.__version__)
    assert config["model"]["class"] == "NoiseContrastivePrior"
    assert config["model"]["arguments"]["base"]["class"] == "Normal"
    assert config["model"]["arguments"]["classifier"]["arguments"]["activation"] == {"type": "torch.nn.LeakyReLU"}
    card = (folder / "README.md").read_text()
    assert "library_name: ncpvae" in card and "`NoiseContrastivePrior`" in card


def test_other_files_of_the_folder_stay(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "notes").write_text("mine")
    for module in (reweighted(), mlp_vae()):
        module.save_pretrained(tmp_path)
        assert isinstance(Pretrained.from_pretrained(tmp_path), type(module))
    assert (tmp_path / "README.md").read_text() == (tmp_path / "sub" / "notes").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_others_may_read_what_they_may_read_of_any_file(tmp_path):
    ncpvae.Normal(2).save_pretrained(tmp_path)
    (tmp_path / "any").touch()
    assert len({(tmp_path / name).stat().st_mode for name in ("any", "config.json", "model.safetensors")}) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("existing", [False, True], ids=["new folder", "existing folder"])
def test_a_process_killed_while_it_saves_leaves_the_old_module_or_the_new_one(existing, tmp_path):
    old, new = ncpvae.Normal(2, torch.ones(2)), ncpvae.MLPClassifier(3, (2,))
    new.generate_model_card()  # what it imports is imported before the fork
    old.save_pretrained(tmp_path / "template")
    found, moment, killed = [], 0, True
    while killed:
        shutil.rmtree(folder := tmp_path / "m", ignore_errors=True)
        if existing:
            shutil.copytree(tmp_path / "template", folder)
        killed = save_and_die(new, folder, moment)
        moment += 1
        if existing or folder.exists():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # config.json may be the old one still
                found.append(Pretrained.from_pretrained(folder))
        else:
            found.append(None)
    assert {type(m) for m in found} == {ncpvae.Normal if existing else type(None), ncpvae.MLPClassifier}
    assert isinstance(found[-1], ncpvae.MLPClassifier) and len(found) > 10
    for module in found:
        if isinstance(module, ncpvae.Normal):
            assert torch.equal(module.mean, old.mean)
        elif module is not None:
            assert torch.equal(module(Z), new(Z))


def save_and_die(module, folder, moment: int) -> bool:
    """Save in a process that is killed at the system call of that number; whether it came to that."""
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    count = 0

    def stopping(call):
        def wrapped(*args, **kwargs):
            nonlocal count
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return call(*args, **kwargs)

        return wrapped

    try:
        for name in ("fsync", "rename", "replace", "mkdir", "chmod", "close", "open"):
            setattr(os, name, stopping(getattr(os, name)))
        module.save_pretrained(folder)
    finally:
        os._exit(0)


def test_a_save_that_fails_leaves_the_old_module(tmp_path, monkeypatch):
    ncpvae.Normal(2).save_pretrained(tmp_path / "m")

    def fails(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fails)
    for folder in ("m", "new"):
        with pytest.raises(OSError, match="disk full"):
            reweighted().save_pretrained(tmp_path / folder)
    assert isinstance(Pretrained.from_pretrained(tmp_path / "m"), ncpvae.Normal)
    assert [p.name for p in tmp_path.iterdir()] == ["m"] and len(list((tmp_path / "m").iterdir())) == 3


def test_weights_without_the_description_in_their_header_are_read_with_config_json(tmp_path):
    classifier = ncpvae.MLPClassifier(3, (4,))
    classifier.save_pretrained(tmp_path)
    save_file(classifier.state_dict(), tmp_path / "model.safetensors")
    assert torch.equal(ncpvae.MLPClassifier.from_pretrained(tmp_path)(Z), classifier(Z))
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        ncpvae.MLPClassifier.from_pretrained(tmp_path)


def test_where_config_json_is_of_something_else_the_weights_own_description_is_used(tmp_path):
    classifier = ncpvae.MLPClassifier(3, (4,))
    classifier.save_pretrained(tmp_path / "a", protocol={"steps": 1})
    ncpvae.Normal(3).save_pretrained(tmp_path / "b")
    shutil.copy(tmp_path / "b" / "config.json", tmp_path / "a" / "config.json")
    with pytest.warns(UserWarning, match="config.json is not what .*model.safetensors was saved with"):
        loaded = ncpvae.MLPClassifier.from_pretrained(tmp_path / "a")
    assert torch.equal(loaded(Z), classifier(Z)) and loaded.protocol == {"steps": 1}


# --- the hub ---


def test_it_is_the_hubs_mixin_and_has_its_arguments():
    assert issubclass(ncpvae.VAE, ModelHubMixin)
    reading = {"force_download", "token", "cache_dir", "local_files_only", "revision"}
    for name, arguments in {
        "save_pretrained": {"save_directory", "config", "repo_id", "push_to_hub", "model_card_kwargs"},
        "from_pretrained": {"pretrained_model_name_or_path", *reading},
    }.items():
        for cls in (ModelHubMixin, ncpvae.VAE):
            assert arguments <= set(inspect.signature(getattr(cls, name)).parameters)


def test_a_model_of_the_hub_is_read_from_its_cache(tmp_path):
    prior = reweighted()
    prior.save_pretrained(tmp_path / "saved")
    repository, commit = tmp_path / "cache" / "models--someone--prior", "0" * 40
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for file in (tmp_path / "saved").iterdir():
        shutil.copy(file, repository / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    hub = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    loaded = ncpvae.NoiseContrastivePrior.from_pretrained("someone/prior", **hub)
    assert torch.equal(loaded.log_ratio(Z), prior.log_ratio(Z))
    with pytest.raises(OSError):
        ncpvae.NoiseContrastivePrior.from_pretrained("someone/other", **hub)
    with pytest.raises(OSError):
        ncpvae.NoiseContrastivePrior.from_pretrained("someone/prior", revision="v2", **hub)


def test_push_to_hub_uploads_what_save_pretrained_writes(tmp_path, monkeypatch):
    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **_):
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id, folder_path, commit_message, **_):
            shutil.copytree(folder_path, tmp_path / "hub" / repo_id)
            return f"https://hub/{repo_id}/{commit_message}"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    prior = reweighted()
    prior.protocol = {"steps": 3}
    assert prior.push_to_hub("someone/prior", commit_message="first") == "https://hub/someone/prior/first"
    url = prior.save_pretrained(tmp_path / "local", push_to_hub=True, repo_id="someone/again", commit_message="second")
    assert url == "https://hub/someone/again/second"
    for repository in ("prior", "again"):
        loaded = Pretrained.from_pretrained(tmp_path / "hub" / "someone" / repository)
        assert loaded.protocol == {"steps": 3} and torch.equal(loaded.log_ratio(Z), prior.log_ratio(Z))


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "../nowhere"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(path):
    with pytest.raises(OSError, match="no folder"):
        ncpvae.VAE.from_pretrained(path)


def test_a_config_of_ones_own_is_refused(tmp_path):
    with pytest.raises(TypeError, match="protocol"):
        ncpvae.Normal(2).save_pretrained(tmp_path, config={"a": 1})


# --- files of strangers ---


def stranger(folder, model, weights=None, **config):
    """A folder as somebody else may write it, `model` being the description."""
    config = {"format": "ncpvae", "version": 1, "model": model, **config}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(ncpvae.MLPClassifier(3, (4,)).state_dict() if weights is None else weights, folder / "model.safetensors")


def mlp_description(**arguments):
    return {"class": "MLPClassifier", "arguments": {"latent_dim": 3, "hidden": [4], **arguments}}


def test_a_strangers_folder_that_is_in_order_is_read(tmp_path):
    stranger(tmp_path, mlp_description())
    assert isinstance(Pretrained.from_pretrained(tmp_path), ncpvae.MLPClassifier)


NET = {"class": "Normal", "arguments": {"shape": 3}}
for _ in range(30):
    NET = {"class": "VAE", "arguments": {"encoder": NET, "decoder": 1, "likelihood": 1, "prior": 1}}

STRANGE = {
    "no description": (None, "names a class that ncpvae does not have"),
    "a list": ([], "names a class that ncpvae does not have"),
    "a function": ({"class": "os.system", "arguments": {"command": "true"}}, "does not have: 'os.system'"),
    "a builtin": ({"class": "eval", "arguments": {"source": "1"}}, "does not have: 'eval'"),
    "our own function": ({"class": "fit_ncp", "arguments": {}}, "does not have: 'fit_ncp'"),
    "a dunder": ({"class": "__import__", "arguments": {"name": "os"}}, "does not have"),
    "a class as a list": ({"class": ["VAE"], "arguments": {}}, "does not have"),
    "no arguments": ({"class": "MLPClassifier"}, "must give the arguments of MLPClassifier"),
    "arguments that are none": ({"class": "MLPClassifier", "arguments": [3]}, "must give the arguments"),
    "an unknown argument": (mlp_description(depth=3), "unexpected keyword argument 'depth'"),
    "self": (mlp_description(self=3), "no MLPClassifier can be made"),
    "cls": (mlp_description(cls=3), "no MLPClassifier can be made"),
    "a wrong type": (mlp_description(hidden="wide"), "no MLPClassifier can be made"),
    "a string as activation": (mlp_description(activation="torch.nn.Tanh"), "not callable"),
    "a function as activation": (mlp_description(activation={"type": "os.system"}), "must be an activation"),
    "a module as activation": (mlp_description(activation={"type": "torch.nn.Linear"}), "must be an activation"),
    "a path as activation": (mlp_description(activation={"type": "torch.nn.modules.Tanh"}), "must be an activation"),
    "a huge layer": (mlp_description(hidden=[10**12]), r"network.0.bias must be \(1000000000000,\), got \(4,\)"),
    "layers too large for torch": (mlp_description(hidden=[10**12, 10**12]), "no MLPClassifier can be made"),
    "a number beyond 64 bits": (mlp_description(hidden=[10**30]), "no MLPClassifier can be made"),
    "a negative size": (mlp_description(hidden=[-4]), "no MLPClassifier can be made"),
    "a million layers": (mlp_description(hidden=[4] * 10**5), "far more parameters than there are weights"),
    "a billion blocks": (
        {"class": "ResidualClassifier", "arguments": {"in_channels": 3, "blocks": 10**9}},
        "far more parameters than there are weights",
    ),
    "a huge buffer": ({"class": "Normal", "arguments": {"shape": 10**12}}, "missing: log_std, mean"),
    "a huge placeholder": (
        {"class": "GaussianEncoder", "arguments": {"network": mlp_description(), "input_mean": {"tensor": [10**12]}}},
        "missing: input_mean, network.network.0.bias",
    ),
    "a placeholder that is no shape": (
        {"class": "GaussianEncoder", "arguments": {"network": mlp_description(), "input_mean": {"tensor": "wide"}}},
        "input_mean must be a tensor's shape",
    ),
    "another of our classes": ({"class": "Normal", "arguments": {"shape": 3}}, "too many: network.0.bias"),
    "deeply nested": (NET, "not the weights of this VAE"),
}


@pytest.mark.parametrize(("model", "message"), STRANGE.values(), ids=STRANGE)
@pytest.mark.parametrize("header", [False, True], ids=["config.json", "header"])
def test_a_description_that_cannot_be_is_named(model, message, header, tmp_path):
    stranger(tmp_path, model)
    if header:
        text = (tmp_path / "config.json").read_text()
        save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors", {"config": text})
    with pytest.raises(ValueError, match=message) as caught:
        Pretrained.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"format": "pytorch"}, "format must be 'ncpvae', got 'pytorch'"),
        ({"version": 2, "library_version": "9.0"}, r"version 2 is of a newer ncpvae \(9.0\)"),
        ({"version": "1"}, "version must be an integer"),
        ({"version": True}, "version must be an integer"),
        ({"version": 0}, "version must be an integer"),
        ({"tied": ["a"]}, "tied must map names"),
        ({"tied": {"network.0.bias": ["a"]}}, "tied must map names"),
        ({"tied": {"network.9.bias": "network.0.bias"}}, "too many: network.9.bias"),
        ({"tied": {"network.0.bias": "../../etc/passwd"}}, r"network.0.bias must be \(4,\), got None"),
        ({"protocol": "long"}, "protocol must be an object"),
    ],
)
def test_a_config_that_cannot_be_is_named(config, message, tmp_path):
    stranger(tmp_path, mlp_description(), **config)
    with pytest.raises(ValueError, match=message) as caught:
        Pretrained.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xfe", b'{"a":' * 100_000])
def test_a_config_that_is_no_json_is_named(content, tmp_path):
    ncpvae.MLPClassifier(3).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="config.json is no usable JSON"):
        ncpvae.MLPClassifier.from_pretrained(tmp_path)


def without(name):
    return lambda state: {k: v for k, v in state.items() if k != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("network.0.bias"), "missing: network.0.bias"),
        (lambda s: {**s, "../../x": torch.ones(1)}, r"too many: ../../x"),
        (lambda s: {**s, "network.0.bias": torch.ones(5)}, r"network.0.bias must be \(4,\), got \(5,\)"),
        (lambda s: {**s, "network.0.bias": torch.ones(4, dtype=torch.int64)}, "network.0.bias must be of a kind with"),
        (lambda s: {}, "missing: network.0.bias"),
    ],
    ids=["missing", "too many", "shape", "dtype", "none"],
)
def test_weights_that_do_not_fit_are_named(change, message, tmp_path):
    weights = ncpvae.MLPClassifier(3, (4,)).state_dict()
    stranger(tmp_path, mlp_description(), change(weights))
    with pytest.raises(ValueError, match=message) as caught:
        ncpvae.MLPClassifier.from_pretrained(tmp_path)
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize("values", [[0.0, 1.0, math.nan, 2.0], [0.0, 1.0, 2.0, math.nan]])
def test_a_log_z_that_cannot_be_is_named_or_read(values, tmp_path):
    prior = reweighted()
    prior.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    text = (tmp_path / "config.json").read_text()
    state["_extra_state"] = torch.tensor(values, dtype=torch.float64)
    save_file(state, tmp_path / "model.safetensors", {"config": text})
    if values[3] == 2.0:
        assert ncpvae.NoiseContrastivePrior.from_pretrained(tmp_path).log_normalizer.num_samples == 2
        return
    with pytest.raises(ValueError, match="model.safetensors"):
        ncpvae.NoiseContrastivePrior.from_pretrained(tmp_path)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("pickle-was-loaded",)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pickle_is_never_loaded_whatever_its_name(name, tmp_path, monkeypatch):
    folder = tmp_path / "m"
    ncpvae.MLPClassifier(3).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"a": Payload()}, folder / name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match="model.safetensors"):
        ncpvae.MLPClassifier.from_pretrained(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_cut_off_weights_are_named(tmp_path):
    ncpvae.MLPClassifier(3).save_pretrained(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    for length in (0, 7, 100, len(content) - 1):
        (tmp_path / "model.safetensors").write_bytes(content[:length])
        with pytest.raises(ValueError, match="model.safetensors is no complete safetensors file"):
            ncpvae.MLPClassifier.from_pretrained(tmp_path)


@pytest.mark.parametrize("missing", ["model.safetensors", None])
def test_a_missing_file_is_named(missing, tmp_path):
    if missing:
        ncpvae.MLPClassifier(3).save_pretrained(tmp_path)
        (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        ncpvae.MLPClassifier.from_pretrained(tmp_path)


def test_the_folder_of_another_class_is_named(tmp_path):
    mlp_vae().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is of the class VAE, not MLPClassifier: use VAE.from_pretrained"):
        ncpvae.MLPClassifier.from_pretrained(tmp_path)
    mlp_vae().encoder.save_pretrained(tmp_path)
    assert isinstance(ncpvae.GaussianEncoder.from_pretrained(tmp_path), ncpvae.MLPEncoder)
    with pytest.raises(ValueError, match="MLPEncoder, not ConvEncoder"):
        ncpvae.ConvEncoder.from_pretrained(tmp_path)


def test_only_parameters_of_this_thread_are_counted_and_only_meanwhile():
    def make(count):
        return [nn.Linear(1, 1) for _ in range(count)]

    with _description._at_most_parameters(10):
        make(5)
        other = threading.Thread(target=make, args=(20,))
        other.start()
        other.join()
        with pytest.raises(ValueError, match="far more parameters"):
            make(1)
    assert len(make(20)) == 20


def test_a_part_without_values_is_named(tmp_path):
    net = MyNet()
    net.register_buffer("table", torch.empty(2, device="meta"), persistent=False)
    prior = ncpvae.NoiseContrastivePrior(ncpvae.Normal(3), net)
    prior.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"keeps classifier.table outside of its state"):
        ncpvae.NoiseContrastivePrior.from_pretrained(tmp_path, classifier=net)
    with pytest.raises(ValueError, match="layers.0.weight has no values"):
        ncpvae.NoiseContrastivePrior(ncpvae.Normal(3), MyNet().to("meta")).save_pretrained(tmp_path)
