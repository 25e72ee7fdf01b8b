import math

import pytest
import torch

from ncpvae import data


def test_gaussians_are_25_modes_of_the_stated_width():
    x = data.gaussians(50_000, seed=1)
    distance, mode = torch.cdist(x, data.gaussian_grid_means()).min(1)
    assert distance.max() < 6 * data.GAUSSIANS_STD
    counts = mode.bincount(minlength=25).double()
    assert ((counts - 2000).square() / 2000).sum() < 60  # χ² with 24 degrees of freedom
    assert distance.square().mean().item() == pytest.approx(2 * data.GAUSSIANS_STD**2, rel=0.03)
    assert torch.equal(x, data.gaussians(50_000, seed=1)) and not torch.equal(x, data.gaussians(50_000, seed=2))


def test_entropy_bound_is_the_mean_log_density():
    x = data.gaussians(20_000).double()
    square = torch.cdist(x, data.gaussian_grid_means().double()).square()
    log_p = torch.logsumexp(-0.5 * square / data.GAUSSIANS_STD**2, 1)
    log_p = log_p - math.log(25) - math.log(2 * math.pi * data.GAUSSIANS_STD**2)
    assert -log_p.mean().item() == pytest.approx(data.gaussian_grid_entropy(), abs=0.03)


def test_digits_split_without_overlap():
    pytest.importorskip("sklearn")
    splits = data.digits()
    assert [len(s) for s in splits] == [1297, 200, 300]
    assert splits.train.dtype == torch.uint8 and splits.train.shape[1:] == (1, 8, 8) and splits.train.max() == 16


def test_binarization_has_the_pixels_as_means():
    x = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(20_000, 3)
    drawn = data.binarize(x)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(drawn.mean(0), torch.tensor([0.0, 0.2, 1.0]), atol=0.02, rtol=0)


def test_mnist_from_a_folder(data_folder):
    pytest.importorskip("datasets")
    splits = data.mnist(data_folder)
    assert [tuple(s.shape) for s in splits] == [(50_000, 1, 28, 28), (10_000, 1, 28, 28), (10_000, 1, 28, 28)]
    assert splits.test.float().mean().item() == pytest.approx(33.79, abs=0.01)  # known mean of the test images


def test_missing_and_unreadable_folders_are_named(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    with pytest.raises(OSError, match="data folder '/no/such/folder'.*is not a folder"):
        data.mnist("/no/such/folder")
    monkeypatch.setenv("NCPVAE_DATA", str(tmp_path / "gone"))
    with pytest.raises(OSError, match="gone'.*is not a folder"):
        data.mnist()
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "train.parquet").write_bytes(b"not parquet")
    with pytest.raises(OSError, match="data set 'mnist' could not be read from"):
        data.mnist(tmp_path)
