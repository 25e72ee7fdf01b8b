import hashlib
import json
import os
import pickle

import pytest
import torch
from processes import run_processes
from torch import nn

from ncpvae.metrics import (
    FeatureClassifier,
    Features,
    InceptionFeatures,
    classification_accuracy,
    extract_features,
    features,
)


class Moments(nn.Module):
    """Mean and standard deviation of every image."""

    def forward(self, x):
        return torch.stack([x.flatten(1).mean(1), x.flatten(1).std(1)], 1)


def test_batches_and_iterables_give_the_features_of_the_whole():
    images = torch.rand(23, 1, 4, 4)
    whole = extract_features(images, Moments(), batch_size=100)
    torch.testing.assert_close(whole.values, Moments()(images))
    assert whole.extractor == "Moments" and len(whole) == 23
    for given in (images, images.split(9), (batch for batch in [images[:1], images[1:]])):
        torch.testing.assert_close(extract_features(given, Moments(), batch_size=5).values, whole.values)


def test_an_extractor_may_name_itself():
    extractor = Moments()
    extractor.name = "mean and spread"
    assert extract_features(torch.rand(2, 1, 4, 4), extractor).extractor == "mean and spread"


def test_extraction_is_in_evaluation_mode_and_restores_each_part_s_own():
    extractor = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4, affine=False), nn.Dropout(0.5))
    extractor.train()
    extractor[2].eval()
    images = torch.rand(8, 1, 2, 2)
    values = extract_features(images, extractor).values
    torch.testing.assert_close(values, images.flatten(1) / (1 + 1e-5) ** 0.5)  # running statistics: mean 0, variance 1
    assert (extractor.training, extractor[1].training, extractor[2].training) == (True, True, False)
    assert extractor[1].num_batches_tracked == 0
    assert not values.requires_grad


def test_of_a_feature_classifier_the_penultimate_layer_is_taken():
    classifier = FeatureClassifier((1, 9, 7), 3, channels=(4, 6)).eval()
    images = torch.randint(0, 256, (5, 1, 9, 7), dtype=torch.uint8)
    extracted = extract_features(images, classifier)
    assert extracted.values.shape == (5, 6) and classifier.num_features == 6
    torch.testing.assert_close(extracted.values, classifier.features(images))
    torch.testing.assert_close(classifier(images), classifier.logits(extracted.values))
    assert classifier(images).shape == (5, 3)


@pytest.mark.parametrize("maximum", [255, 16])
def test_uint8_and_unit_floats_are_the_same_images(maximum):
    classifier = FeatureClassifier((1, 8, 8), 2, channels=(4,), maximum=maximum).eval()
    images = torch.randint(0, maximum + 1, (3, 1, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(classifier(images), classifier(images.double() / maximum))
    torch.testing.assert_close(classifier(images), classifier(images / maximum + 1e-7))


def stripes(count):
    """Horizontal or vertical stripes of random phase in noise, and which."""
    label = torch.randint(0, 2, (count,))
    phase = torch.randint(0, 4, (count, 1, 1))
    grid = torch.arange(8)
    along = torch.where(label[:, None, None] == 0, grid[:, None], grid[None, :])
    return ((along + phase) % 4 < 2)[:, None] * 0.6 + 0.4 * torch.rand(count, 1, 8, 8), label


def test_a_classifier_learns_and_its_accuracy_says_so():
    classifier = FeatureClassifier((1, 8, 8), 2, channels=(8, 8))
    optimizer = torch.optim.Adam(classifier.parameters(), 1e-2)
    test_images, test_labels = stripes(200)
    for _ in range(40):
        images, labels = stripes(48)
        loss = nn.functional.cross_entropy(classifier(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert classification_accuracy(classifier, test_images, test_labels, batch_size=70) > 0.95
    assert classification_accuracy(classifier, test_images, 1 - test_labels) < 0.05
    assert classifier.training


def test_the_record_of_training_is_part_of_plain_arguments():
    classifier = FeatureClassifier((1, 8, 8), 10, channels=(4, 8)).double()
    assert classifier.name == "classifier without a record of its training"
    trained = classifier.trained("digits", 0.9912)
    assert trained.name == "classifier trained on digits, 99.1 % test accuracy"
    assert classifier.trained("digits", None).name == "classifier trained on digits, accuracy not measured"
    images = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(trained(images), classifier.eval()(images))
    assert trained(images).dtype == torch.float64 and not trained.training


def test_a_saved_classifier_is_named_in_figures_as_before(tmp_path):
    trained = FeatureClassifier((1, 8, 8), 10, channels=(4, 8), maximum=16).trained("digits", 0.9912)
    trained.save_pretrained(tmp_path)
    arguments = json.loads((tmp_path / "config.json").read_text())["model"]["arguments"]
    assert (arguments["dataset"], arguments["test_accuracy"]) == ("digits", 0.9912)
    again = FeatureClassifier.from_pretrained(tmp_path)
    images = torch.randint(0, 17, (5, 1, 8, 8), dtype=torch.uint8)
    mine, its = extract_features(images, trained), extract_features(images, again)
    assert torch.equal(mine.values, its.values) and mine.extractor == its.extractor == trained.name


def shared_extraction(lengths, rank_that_fails=None):
    rank = torch.distributed.get_rank()
    start = sum(lengths[:rank])
    mine = torch.arange(start, start + lengths[rank]).float()[:, None].expand(-1, 3)
    if rank == rank_that_fails:
        mine = mine[:, :, None, None].expand(-1, 3, 2, 2)
    values = extract_features(mine, nn.Identity(), batch_size=2, across_ranks=True).values
    own = extract_features(mine, nn.Identity()).values
    return values[:, 0].tolist(), len(own)


def test_processes_share_the_extraction():
    everything = [float(i) for i in range(8)]
    assert run_processes(shared_extraction, 2, (3, 5)) == [(everything, 3), (everything, 5)]


def test_a_process_that_fails_fails_all():
    with pytest.raises(RuntimeError, match="extract_features: failed on rank 1: ValueError: extract_features: extr"):
        run_processes(shared_extraction, 2, (3, 5), 1)


def test_inception_is_never_downloaded(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no weights at .*checkpoints.*https://.*ncpvae train-features"):
        InceptionFeatures()
    with pytest.raises(FileNotFoundError, match="no weights at .*mine.pth"):
        InceptionFeatures(tmp_path / "mine.pth")


def test_other_weights_are_not_inception_s(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"must be torch-fidelity's .*SHA-256 6726825d.*got SHA-256 [0-9a-f]{8}…"):
        InceptionFeatures(path)


class Hostile:
    def __reduce__(self):
        return eval, ("__import__('os').environ.update(NCPVAE_TEST_HOSTILE='ran')",)


def test_a_pickle_with_the_right_digest_is_not_run(monkeypatch, tmp_path):
    path = tmp_path / "weights.pth"
    monkeypatch.delenv("NCPVAE_TEST_HOSTILE", raising=False)
    path.write_bytes(pickle.dumps(Hostile(), protocol=2))
    pretend_reference(monkeypatch, path)
    with pytest.raises(ValueError, match="must hold tensors alone"):
        InceptionFeatures(path)
    assert "NCPVAE_TEST_HOSTILE" not in os.environ


def pretend_reference(monkeypatch, path):
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(features, "INCEPTION_FILE", f"weights-{digest[:8]}.pth")


def test_inception_features_of_any_picture(monkeypatch, tmp_path):
    """With weights that are random here: only their form matters."""
    pytest.importorskip("torch_fidelity")
    fid = pytest.importorskip("torchmetrics.image.fid")
    inception = "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url"
    with monkeypatch.context() as patch:
        patch.setattr(inception, lambda *_, **__: {})
        patch.setattr(fid.NoTrainInceptionV3, "load_state_dict", lambda self, state: None)
        network = fid.NoTrainInceptionV3("inception-v3-compat", ["2048"])
    path = tmp_path / "weights.pth"
    torch.save(network.state_dict(), path)
    pretend_reference(monkeypatch, path)
    extractor = InceptionFeatures(path)
    grey = torch.randint(0, 256, (2, 1, 20, 30), dtype=torch.uint8)
    colour = grey.expand(-1, 3, -1, -1)
    expected = network(colour)
    for images in (grey, colour, colour / 255):
        extracted = extract_features(images, extractor)
        torch.testing.assert_close(extracted.values, expected)
        assert extracted.extractor == InceptionFeatures.name
    assert expected.shape == (2, InceptionFeatures.num_features)


IMAGES = torch.zeros(3, 1, 8, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: extract_features(IMAGES, lambda x: x), TypeError, "extractor must be a torch.nn.Module, got function"),
        (lambda: extract_features(IMAGES, Moments(), 0), ValueError, "batch_size must be ≥ 1, got 0"),
        (lambda: extract_features(IMAGES[:0], Moments()), ValueError, "at least one image, got none"),
        (lambda: extract_features([], Moments()), ValueError, "at least one image, got none"),
        (lambda: extract_features(3, Moments()), TypeError, "a tensor or an iterable of tensors, got int"),
        (lambda: extract_features([(IMAGES, 1)], Moments()), TypeError, r"give tensors \[B, …\], got tuple"),
        (lambda: extract_features(torch.zeros(3), Moments()), ValueError, r"must be \[N, …\].*got \(3,\)"),
        (lambda: extract_features(IMAGES, nn.Identity()), ValueError, r"with B = 3, got \(3, 1, 8, 8\)"),
        (lambda: extract_features(IMAGES * torch.nan, Moments()), ValueError, "of 'Moments' must be finite, got NaN"),
        (lambda: Features(torch.zeros(3), "x"), ValueError, r"values must be \[N, F\].*got shape \(3,\)"),
        (lambda: Features(torch.zeros(3, 1, dtype=torch.int32), "x"), TypeError, "floating point, got torch.int32"),
        (lambda: Features([[1.0]], "x"), TypeError, r"values must be a tensor \[N, F\], got list"),
        (lambda: FeatureClassifier((8, 8), 2), ValueError, r"in_shape must be \(C, H, W\), each ≥ 1, got \(8, 8\)"),
        (lambda: FeatureClassifier((1, 8, 8), 1), ValueError, r"num_classes must be ≥ 2.*got 1, \(32, 64, 128\), 255"),
        (lambda: FeatureClassifier((1, 8, 8), 2, ()), ValueError, "channels not empty"),
        (lambda: FeatureClassifier((1, 8, 8), 2).trained("x", 99.1), ValueError, r"share in \[0, 1\], got 99.1"),
        (lambda: FeatureClassifier((1, 8, 9), 2)(IMAGES), ValueError, r"must be \[B, 1, 8, 9\], got \(3, 1, 8, 8\)"),
        (lambda: FeatureClassifier((1, 8, 8), 2)(IMAGES - 0.5), ValueError, r"lie in \[0, 1\], got -0.5 … -0.5"),
        (lambda: FeatureClassifier((1, 8, 8), 2)(IMAGES * torch.nan), ValueError, r"lie in \[0, 1\], got nan"),
        (lambda: FeatureClassifier((1, 8, 8), 2)(IMAGES.long()), TypeError, "uint8 or floating point, got torch.int64"),
        (
            lambda: classification_accuracy(Moments(), IMAGES, torch.zeros(2)),
            ValueError,
            r"labels must be \[N\].*got shapes \(2,\) and \(3, 1, 8, 8\)",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
