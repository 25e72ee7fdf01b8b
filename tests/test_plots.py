import pytest
import torch

from ncpvae import plots


def test_grid_puts_images_row_by_row():
    images = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 1, 2, 3)
    grid = plots.image_grid(images, columns=3, padding=1, background=-1.0)
    assert grid.shape == (1, 7, 13)
    assert grid[0, 1, 1:13:4].tolist() == [0.0, 1.0, 2.0]
    assert grid[0, 4, 1:13:4].tolist() == [3.0, 4.0, -1.0]
    assert (grid[0, 0] == -1).all()


def test_grid_refuses_what_is_no_batch_of_images():
    with pytest.raises(ValueError, match=r"image_grid: images must be \[N, C, H, W\]"):
        plots.image_grid(torch.zeros(3, 4))


def test_pictures_are_png_files(tmp_path):
    pytest.importorskip("matplotlib")
    for path in (
        plots.save_images(tmp_path / "a.png", [("one", torch.rand(4, 1, 8, 8)), ("colour", torch.rand(3, 3, 8, 8))]),
        plots.save_scatter(tmp_path / "b.png", [("points", torch.randn(50, 2))], limit=3),
    ):
        assert path.read_bytes()[:4] == b"\x89PNG"
