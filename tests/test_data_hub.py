"""Data sets in the hub's layout: the real ones where they are at hand, and made ones of a few rows."""

import io
import random

import numpy
import pytest
import torch

from ncpvae import data
from ncpvae.data import hub

datasets = pytest.importorskip("datasets")
Image = pytest.importorskip("PIL.Image")


def parquet_pixels(folder, name, split, column, rows):
    """Pixels of some rows of a parquet file, read by pyarrow and Pillow alone."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(f"{folder}/{name}/data/{split}-00000-of-00001.parquet")
    cells = table[column].take(rows).to_pylist()
    images = [numpy.array(Image.open(io.BytesIO(cell["bytes"]))) for cell in cells]
    return torch.from_numpy(numpy.stack(images)), table


@pytest.fixture(scope="module")
def mnist(data_folder):
    return data.load("mnist", data_folder)


def test_mnist_is_cut_and_its_pixels_are_the_source_s(mnist, data_folder):
    assert [tuple(s.shape) for s in mnist.splits] == [(50_000, 1, 28, 28), (10_000, 1, 28, 28), (10_000, 1, 28, 28)]
    assert all(s.dtype == torch.uint8 for s in mnist.splits)
    assert mnist.splits.test.float().mean().item() == pytest.approx(33.79, abs=0.01)  # known mean of the test images
    rows = [0, 257, 49_999, 50_000, 59_999]
    pixels, table = parquet_pixels(data_folder, "mnist", "train", "image", rows)
    read = torch.cat([mnist.splits.train, mnist.splits.validation])
    assert torch.equal(read[rows][:, 0], pixels)
    assert torch.cat([mnist.labels.train, mnist.labels.validation]).tolist() == table["label"].to_pylist()


def test_mnist_is_binarised_and_padded_on_demand(mnist):
    assert (mnist.name, mnist.kind, mnist.levels, mnist.source, mnist.caution) == (
        "mnist",
        "image",
        255,
        "folder mnist",
        "",
    )
    x = mnist.transform()(mnist.splits.test[:100])
    assert x.shape == (100, 1, 28, 28) and set(x.unique().tolist()) == {0.0, 1.0}
    padded = mnist.padded().transform(training=False)(mnist.splits.test[:100])
    assert padded.shape == (100, 1, 32, 32) and set(padded.unique().tolist()) == {0.0, 1.0}
    assert padded[..., :2].sum() == 0
    assert abs(float(padded.sum() / x.sum()) - 1) < 0.02


def test_omniglot_is_read_under_the_name_of_its_folder(data_folder):
    omniglot = data.load("omniglot", data_folder)
    assert [tuple(s.shape) for s in omniglot.splits] == [(22_345, 1, 28, 28), (2_000, 1, 28, 28), (8_070, 1, 28, 28)]
    assert omniglot.source == "folder omniglot28" and "chardata.mat" in omniglot.caution
    rows = [0, 1000, 1999]
    pixels, table = parquet_pixels(data_folder, "omniglot28", "validation", "image", rows)
    assert torch.equal(omniglot.splits.validation[rows][:, 0], pixels)
    assert omniglot.labels.validation.tolist() == table["alphabet"].to_pylist()
    assert omniglot.labels.train.unique().tolist() == list(range(50))


def test_the_jpeg_subset_goes_by_its_own_name(data_folder):
    subset = data.load("cifar10_jpeg_subset", data_folder)
    assert (subset.name, subset.source) == ("cifar10_jpeg_subset", "folder cifar10_jpeg_subset")
    assert [tuple(s.shape) for s in subset.splits] == [(9_000, 3, 32, 32), (1_000, 3, 32, 32), (2_000, 3, 32, 32)]
    assert "not those of CIFAR-10" in subset.caution
    pixels, table = parquet_pixels(data_folder, "cifar10_jpeg_subset", "test", "img", [3, 1999])
    assert torch.equal(subset.splits.test[[3, 1999]], pixels.permute(0, 3, 1, 2))
    assert subset.labels.test.tolist() == table["label"].to_pylist()
    x = subset.transform()(subset.splits.test[:64])
    assert x.dtype == torch.float32 and x.min() >= 0 and 0.9 < x.max() <= 1


def test_cifar10_is_never_that_subset(data_folder):
    with pytest.raises(OSError, match="holds no 'cifar10', only cifar10_jpeg_subset, mnist"):
        data.load("cifar10", data_folder)


# Made data: the same code on a few rows


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Writes parquet files in the hub's layout: made(name, {split: {column: values}})."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.delenv("NCPVAE_DATA", raising=False)
    folder = tmp_path / "data"

    def write(name, splits):
        for split, columns in splits.items():
            (folder / name / "data").mkdir(parents=True, exist_ok=True)
            rows = datasets.Dataset.from_dict(columns)
            for column in ("image", "img"):
                if column in columns:
                    rows = rows.cast_column(column, datasets.Image())
            rows.to_parquet(folder / name / "data" / f"{split}-00000-of-00001.parquet")
        return folder

    return write


def encoded(array, file_format="PNG"):
    stream = io.BytesIO()
    Image.fromarray(numpy.asarray(array, dtype="uint8")).save(stream, file_format)
    return {"bytes": stream.getvalue(), "path": None}


def grey(count, size=28, seed=0):
    """PNGs of random pixels, and the pixels."""
    pixels = numpy.random.default_rng(seed).integers(0, 256, (count, size, size), dtype="uint8")
    return [encoded(p) for p in pixels], torch.from_numpy(pixels)[:, None]


def small_mnist(**changed):
    images, pixels = grey(12)
    test, _ = grey(3, seed=1)
    splits = {
        "train": {"image": images, "label": list(range(12))},
        "test": {"image": test, "label": [7, 8, 9]},
    }
    return {**splits, **changed}, pixels


def test_a_small_mnist_is_cut_in_the_same_proportion(made):
    splits, pixels = small_mnist()
    folder = made("mnist", splits)
    loaded = data.load("mnist", folder)
    assert torch.equal(loaded.splits.train, pixels[:10]) and torch.equal(loaded.splits.validation, pixels[10:])
    assert [x.tolist() for x in loaded.labels] == [list(range(10)), [10, 11], [7, 8, 9]]
    assert all(torch.equal(a, b) for a, b in zip(data.mnist(folder), loaded.splits, strict=True))


def test_the_environment_names_the_folder(made, monkeypatch):
    monkeypatch.setenv("NCPVAE_DATA", str(made("mnist", small_mnist()[0])))
    assert data.load("mnist").source == "folder mnist"


def celeba(count, mode="RGB", size=(178, 218)):
    """Pictures whose red is their column and whose green is their row; the blue of picture n is n."""
    x, y = numpy.meshgrid(numpy.arange(size[0]), numpy.arange(size[1]))
    pictures = [numpy.stack([x, y, numpy.full_like(x, n)], -1) for n in range(count)]
    return {
        "image": [encoded(p if mode == "RGB" else p[..., 0]) for p in pictures],
        "celeb_id": list(range(count)),
        "Smiling": [n % 2 == 0 for n in range(count)],
        "Young": [n < 2 for n in range(count)],
    }


def test_celeba_is_cropped_at_its_box_and_resized(made):
    loaded = data.load("celeba64", made("celeba64", {"train": celeba(4), "valid": celeba(2), "test": celeba(3)}))
    assert [tuple(s.shape) for s in loaded.splits] == [(4, 3, 64, 64), (2, 3, 64, 64), (3, 3, 64, 64)]
    # Output pixel j is centred at (j + ½)·148/64 − ½ in the box; a linear ramp survives a bilinear filter.
    centres = (torch.arange(64) + 0.5) * 148 / 64 - 0.5
    inner = slice(2, 62)
    for picture in loaded.splits.train.float():
        torch.testing.assert_close(picture[0, inner, inner], (15 + centres)[inner].expand(60, 60), atol=0.51, rtol=0)
        torch.testing.assert_close(picture[1, inner, inner].T, (40 + centres)[inner].expand(60, 60), atol=0.51, rtol=0)
    assert loaded.splits.train[:, 2].flatten(1).unique(dim=1).tolist() == [[0], [1], [2], [3]]
    assert loaded.labels.train.tolist() == [[True, True], [False, True], [True, False], [False, False]]
    assert loaded.labels.train.dtype == torch.bool
    flipped = loaded.transform()(loaded.splits.train[:1].expand(200, 3, 64, 64))
    straight = loaded.transform(training=False)(loaded.splits.train[:1])
    same = (flipped == straight).flatten(1).all(1)
    mirrored = (flipped == straight.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all() and 60 < int(same.sum()) < 140


def test_celeba_hq_joins_its_splits_and_quantises(made):
    rng = numpy.random.default_rng(0)
    pixels = rng.integers(0, 256, (30, 256, 256, 3), dtype="uint8")
    images = [encoded(p, "BMP") for p in pixels]
    splits = {"train": {"image": images[:28]}, "validation": {"image": images[28:]}}
    loaded = data.load("celebahq256", made("celebahq256", splits))
    assert [len(s) for s in loaded.splits] == [27, 1, 2]
    assert torch.equal(torch.cat(loaded.splits), torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert (loaded.levels, loaded.labels) == (31, None)
    seen = loaded.transform(training=False)(loaded.splits.train[:1]) * 31
    assert torch.equal(seen.round(), (loaded.splits.train[:1].double() / 8).floor().float())


def test_celeba_hq_of_1024_pixels_is_resized(made):
    picture = numpy.full((512, 512, 3), 9)
    loaded = data.load("celebahq256", made("celebahq256", {"train": {"image": [encoded(picture)] * 30}}))
    assert loaded.splits.train.shape == (27, 3, 256, 256) and (loaded.splits.train == 9).all()


def test_threads_change_nothing(made):
    images = celeba(270)
    folder = made("celeba64", {"train": images, "valid": celeba(1), "test": celeba(1)})
    before, threads = data.load("celeba64", folder), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(data.load("celeba64", folder).splits.train, before.splits.train)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("name", "sizes", "expected"),
    [
        ("mnist", {"train": 60_000, "test": 10_000}, [50_000, 10_000, 10_000]),
        ("cifar10", {"train": 50_000, "test": 10_000}, [45_000, 5_000, 10_000]),
        ("celeba64", {"train": 162_770, "valid": 19_867, "test": 19_962}, [162_770, 19_867, 19_962]),
        ("celebahq256", {"train": 28_000, "validation": 2_000}, [27_000, 1_000, 2_000]),
        ("omniglot", {"full": 32_460}, [22_390, 2_000, 8_070]),
    ],
)
def test_splits_of_the_full_data_sets(name, sizes, expected):
    plan = hub.HUB[name].plan(name, sizes)
    rows = {part: [(piece.split, i) for piece in pieces for i in piece.indices] for part, pieces in plan.items()}
    assert list(rows) == ["train", "validation", "test"] and [len(r) for r in rows.values()] == expected
    everything = [row for part in rows.values() for row in part]
    assert sorted(everything) == sorted((split, i) for split, size in sizes.items() for i in range(size))


def test_omniglot_drawings_are_inverted_filtered_and_split_at_random(made):
    """105×105 drawings with black ink in one split, as the hub has them."""
    drawing = numpy.full((105, 105), 255)
    drawing[:15, :30] = 0  # 4 × 8 of the 28×28 pixels
    splits = {"full": {"image": [encoded(drawing)] * 40, "label": list(range(40))}}
    loaded = data.load("omniglot", made("omniglot28", splits))
    expected = torch.zeros(28, 28)
    expected[:4, :8] = 255
    assert [len(s) for s in loaded.splits] == [28, 2, 10]
    assert torch.equal(loaded.splits.train[0, 0].float(), expected)
    labels = torch.cat(loaded.labels).tolist()
    assert sorted(labels) == list(range(40)) and labels != sorted(labels)


def test_without_a_folder_the_hub_is_read_with_the_same_code(made, monkeypatch):
    splits, _ = small_mnist()
    pictures = [encoded(numpy.full((32, 32, 3), n)) for n in range(10)]
    folder = made("mnist", splits)
    made("cifar10", {"train": {"img": pictures, "label": [0] * 10}, "test": {"img": pictures, "label": [0] * 10}})
    asked, read = [], datasets.load_dataset

    def remote(source):
        asked.append(source)
        return read(str(folder / source.split("/")[1]))

    monkeypatch.setattr(datasets, "load_dataset", remote)
    assert data.load("mnist").source == "hub ylecun/mnist"
    cifar = data.load("cifar10")
    assert cifar.source == "hub uoft-cs/cifar10" and cifar.splits.test[:, 0, 0, 0].tolist() == list(range(10))
    assert asked == ["ylecun/mnist", "uoft-cs/cifar10"]


def with_row(index, cell):
    """A small MNIST with another image at one row of the training split."""
    splits, _ = small_mnist()
    splits["train"]["image"][index] = cell
    return splits


TRUNCATED = {"bytes": encoded(numpy.random.default_rng(0).integers(0, 256, (28, 28)))["bytes"][:200], "path": None}


@pytest.mark.parametrize(
    ("splits", "error", "message"),
    [
        (
            with_row(11, {"bytes": b"no image", "path": None}),
            OSError,
            "split 'train', row 11: the image cannot be decoded",
        ),
        (with_row(3, TRUNCATED), OSError, "split 'train', row 3: the image cannot be decoded"),
        (with_row(3, None), OSError, "split 'train', row 3: the image is missing"),
        (
            with_row(5, encoded(numpy.zeros((28, 28, 3)))),
            ValueError,
            "split 'train', row 5: image is 28×28 RGB, expected 28×28 L",
        ),
        (with_row(0, encoded(numpy.zeros((28, 30)))), ValueError, "row 0: image is 30×28 L, expected 28×28 L"),
        (
            {"train": small_mnist()[0]["train"]},
            ValueError,
            r"has no rows in a split 'test'; its splits are 'train' \(12 rows\)",
        ),
        (small_mnist(test={"label": [1]})[0], OSError, "split 'test', row 0: the image is missing"),
        (
            {"train": {"pixels": [1] * 12}, "test": {"pixels": [1]}},
            ValueError,
            "split 'train': no column of images, only 'pixels'",
        ),
        (
            {"train": {"image": grey(5)[0]}, "test": {"image": grey(1)[0]}},
            ValueError,
            "split 'train': 5 rows are too few to hold out one in 6",
        ),
        (
            {
                "train": {"image": grey(6)[0], "label": [1, None, 1, 1, 1, 1]},
                "test": {"image": grey(1)[0], "label": [1]},
            },
            ValueError,
            "split 'train': column 'label' must hold a label in every row, got",
        ),
    ],
)
def test_bad_rows_are_named(made, splits, error, message):
    folder = made("mnist", splits)
    with pytest.raises(error, match=f"data set 'mnist'.*{message}"):
        data.load("mnist", folder)


def test_the_row_named_in_a_shuffled_split_is_the_source_s(made):
    drawings, _ = grey(40)
    bad = random.Random(0).randrange(40)
    drawings[bad] = {"bytes": b"?", "path": None}
    folder = made("omniglot28", {"full": {"image": drawings}})
    with pytest.raises(OSError, match=f"data set 'omniglot', split 'full', row {bad}: the image cannot be decoded"):
        data.load("omniglot", folder)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"mode": "L"}, "image is 178×218 L, expected 178×218 RGB"),
        ({"size": (64, 64)}, "image is 64×64 RGB, expected 178×218 RGB"),
    ],
)
def test_celeba_of_another_kind_is_refused(made, splits, message):
    folder = made("celeba64", {split: celeba(1, **splits) for split in ("train", "validation", "test")})
    with pytest.raises(ValueError, match=f"data set 'celeba64', split 'train', row 0: {message}"):
        data.load("celeba64", folder)


def test_celeba_hq_that_is_no_square_is_refused(made):
    folder = made("celebahq256", {"train": {"image": [encoded(numpy.zeros((300, 256, 3)))] * 30}})
    with pytest.raises(
        ValueError, match="row 0: image is 256×300 RGB, expected a square RGB image of at least 256×256"
    ):
        data.load("celebahq256", folder)


def test_missing_and_unreadable_folders_are_named(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="data folder '/no/such/folder'.*is not a folder"):
        data.mnist("/no/such/folder")
    monkeypatch.setenv("NCPVAE_DATA", str(tmp_path / "gone"))
    with pytest.raises(OSError, match="gone'.*is not a folder"):
        data.mnist()
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "train.parquet").write_bytes(b"not parquet")
    with pytest.raises(OSError, match="data set 'mnist' could not be read from"):
        data.mnist(tmp_path)
    with pytest.raises(OSError, match="holds no 'omniglot28', only mnist"):
        data.load("omniglot", tmp_path)
    monkeypatch.delenv("NCPVAE_DATA")
    with pytest.raises(OSError, match="'cifar10_jpeg_subset' is not on the hub: give a data folder"):
        data.load("cifar10_jpeg_subset")
