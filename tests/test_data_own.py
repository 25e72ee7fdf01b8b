"""One's own data: a folder of images, an .npz file, text."""

import dataclasses
import io
import itertools
import json
import pickle
import zipfile

import numpy
import pytest
import torch

from ncpvae import data
from ncpvae.data.corpus import CORPORA
from ncpvae.data.dataset import held_out


def test_held_out_examples_are_a_fixed_random_tenth():
    train, validation, test = held_out("x", 1000)
    assert [len(p) for p in (train, validation, test)] == [800, 100, 100]
    assert torch.cat([train, validation, test]).sort().values.tolist() == list(range(1000))
    assert test.tolist() == sorted(test.tolist()) and test[-1] - test[0] > 500
    torch.manual_seed(1)
    assert torch.equal(held_out("x", 1000)[2], test)
    assert [len(p) for p in held_out("x", 3)] == [1, 1, 1] and [len(p) for p in held_out("x", 2, test=False)] == [
        1,
        1,
        0,
    ]
    with pytest.raises(ValueError, match="x: 2 examples cannot be split into 3 parts"):
        held_out("x", 2)


# A folder of images


@pytest.fixture
def pictures(tmp_path):
    """pictures({path: array}) writes image files."""
    image = pytest.importorskip("PIL.Image")

    def write(files):
        for path, array in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            image.fromarray(numpy.asarray(array, dtype="uint8")).save(tmp_path / path)
        return tmp_path

    return write


def solid(value, shape=(6, 5, 3)):
    return numpy.full(shape, value)


def test_a_plain_folder_is_split_and_read_in_order(pictures):
    folder = pictures({f"{n:02}.png": solid(n) for n in range(20)})
    (folder / "notes.md").write_text("no image")
    (folder / ".hidden.png").write_text("no image")
    loaded = data.load(f"imagefolder:{folder}")
    assert [tuple(s.shape) for s in loaded.splits] == [(16, 3, 6, 5), (2, 3, 6, 5), (2, 3, 6, 5)]
    values = [s[:, 0, 0, 0].tolist() for s in loaded.splits]
    assert sorted(itertools.chain(*values)) == list(range(20)) and all(v == sorted(v) for v in values)
    assert (loaded.kind, loaded.levels, loaded.labels) == ("image", 255, None)
    assert loaded.name == loaded.source == f"imagefolder:{folder.name}"
    assert loaded.transform()(loaded.splits.test).max() == loaded.splits.test.max() / 255


def test_split_and_class_folders_give_splits_and_labels(pictures):
    grey = (4, 4)
    files = {
        f"train/{kind}/{n}.png": solid(10 * i + n, grey) for i, kind in enumerate(("cat", "dog")) for n in range(5)
    }
    files |= {"val/dog/a.png": solid(77, grey), "val/cat/b.png": solid(78, grey)}
    loaded = data.load(f"imagefolder:{pictures(files)}")
    assert [len(s) for s in loaded.splits] == [9, 2, 1]
    assert loaded.splits.validation[:, 0, 0, 0].tolist() == [78, 77] and loaded.labels.validation.tolist() == [0, 1]
    for images, labels in ((loaded.splits.train, loaded.labels.train), (loaded.splits.test, loaded.labels.test)):
        assert (images[:, 0, 0, 0] // 10).tolist() == labels.tolist()


def test_pixels_survive_and_palettes_become_rgb(pictures):
    image = pytest.importorskip("PIL.Image")
    pixels = numpy.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype="uint8")
    folder = pictures({"train/a.png": pixels, "validation/a.png": pixels, "test/a.png": pixels})
    image.fromarray(numpy.zeros((5, 7, 3), "uint8")).convert("P").save(folder / "train" / "b.png")
    splits = data.image_folder(folder).splits
    assert torch.equal(splits.train[0], torch.from_numpy(pixels).permute(2, 0, 1)) and splits.train[1].sum() == 0


def test_size_crops_the_middle(pictures):
    wide = numpy.zeros((8, 24, 3))
    wide[:, 8:16] = 200
    folder = pictures({f"{n}.png": wide if n % 2 else wide.transpose(1, 0, 2) for n in range(10)})
    splits = data.image_folder(folder, size=8).splits
    assert all(s.shape[1:] == (3, 8, 8) and (s == 200).all() for s in splits)


def broken_folder(folder):
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:45])


def with_alpha(folder):
    from PIL import Image

    Image.new("RGBA", (5, 6)).save(folder / "1.png")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (broken_folder, OSError, "image_folder: '.*1.png': the image cannot be decoded"),
        (with_alpha, ValueError, "image_folder: '.*1.png': image is 5×6 RGBA, expected mode L or RGB"),
        (lambda f: [p.unlink() for p in f.glob("*.png")], ValueError, "image_folder: no images under"),
        (lambda f: [p.unlink() for p in f.glob("[2-9].png")], ValueError, "2 examples cannot be split into 3 parts"),
        (lambda f: [(f / n).mkdir() for n in ("train", "val", "valid")], ValueError, "both 'valid' and 'val' could be"),
    ],
)
def test_bad_folders_are_named(pictures, change, error, message):
    folder = pictures({f"{n}.png": solid(n) for n in range(5)})
    change(folder)
    with pytest.raises(error, match=message):
        data.load(f"imagefolder:{folder}")


def test_links_to_folders_are_followed_once(pictures):
    folder = pictures({f"{name}/{n}.png": solid(n) for name in ("root/a", "elsewhere") for n in range(10)}) / "root"
    (folder / "b").symlink_to(folder.parent / "elsewhere")
    (folder / "a" / "again").symlink_to(folder)
    loaded = data.load(f"imagefolder:{folder}")
    assert sum(map(len, loaded.splits)) == 20 and set(torch.cat([*loaded.labels]).tolist()) == {0, 1}


def test_other_splits_without_a_train_split_are_refused(pictures):
    folder = pictures({f"{name}/{n}.png": solid(n) for name in ("Training", "test", "val") for n in range(5)})
    with pytest.raises(ValueError, match="must have a subfolder 'train' beside 'val', 'test'"):
        data.load(f"imagefolder:{folder}")


def test_images_of_several_sizes_are_refused(pictures):
    folder = pictures(
        {f"train/{n}.png": solid(n, (4 + n // 3, 4)) for n in range(5)} | {"test/0.png": solid(0, (4, 4))}
    )
    with pytest.raises(ValueError, match=r"has shape \(1, 5, 4\) \[C, H, W\], the first image \(1, 4, 4\)"):
        data.image_folder(folder)
    folder = pictures({f"train/{n}.png": solid(n, (4, 4)) for n in range(5)} | {"test/0.png": solid(0, (4, 4, 3))})
    with pytest.raises(ValueError, match="the splits' images have different shapes"):
        data.image_folder(folder)
    with pytest.raises(ValueError, match="image_folder: size must be ≥ 1, got 0"):
        data.image_folder(folder, 0)
    with pytest.raises(OSError, match="is not a folder"):
        data.image_folder(folder / "test" / "0.png")


# An .npz file


@pytest.fixture
def npz(tmp_path):
    def write(**arrays):
        numpy.savez(tmp_path / "mine.npz", **arrays)
        return tmp_path / "mine.npz"

    return write


def test_vectors_are_read_and_split(npz):
    train = numpy.random.default_rng(0).normal(size=(100, 3))
    path = npz(train=train, test=train[:7] + 1, train_labels=numpy.arange(100), test_labels=numpy.arange(7))
    loaded = data.load(f"npz:{path}")
    assert (loaded.name, loaded.kind, loaded.levels, loaded.source) == ("npz:mine.npz", "vector", None, "npz:mine.npz")
    assert [tuple(s.shape) for s in loaded.splits] == [(90, 3), (10, 3), (7, 3)]
    assert all(s.dtype == torch.float32 for s in loaded.splits)
    for part, rows in zip(loaded.splits[:2], loaded.labels[:2], strict=True):
        torch.testing.assert_close(part.double(), torch.from_numpy(train)[rows], rtol=1e-6, atol=0)
    assert loaded.labels.test.tolist() == list(range(7))


@pytest.mark.parametrize(
    ("shape", "axes"), [((9, 4, 5), None), ((9, 3, 4, 5), None), ((9, 4, 5, 3), (0, 3, 1, 2)), ((9, 1, 4, 5), None)]
)
def test_images_are_brought_to_channels_first(npz, shape, axes):
    images = numpy.random.default_rng(0).integers(0, 256, shape, dtype="uint8")
    loaded = data.load(f"npz:{npz(train=images, validation=images, test=images)}")
    expected = torch.from_numpy(images if axes is None else images.transpose(axes)).view(9, -1, 4, 5)
    assert all(torch.equal(s, expected) for s in loaded.splits)
    assert (loaded.kind, loaded.levels) == ("image", 255) and loaded.transform()(expected).max() <= 1


def test_a_path_is_looked_up_in_the_data_folder(npz, monkeypatch):
    path = npz(train=numpy.ones((10, 2)))
    assert len(data.load("npz:mine.npz", path.parent).splits.train) == 8
    monkeypatch.setenv("NCPVAE_DATA", str(path.parent))
    assert len(data.load("npz:mine.npz").splits.train) == 8
    with pytest.raises(OSError, match="load: 'other.npz' does not exist, nor in the data folder"):
        data.load("npz:other.npz")


class Trap:
    """Unpickling it would fail the test."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


IMAGES, VECTORS = numpy.zeros((5, 4, 4), "uint8"), numpy.zeros((5, 2))
HUGE = numpy.array([[0.0, 0.0], [1e300, 0.0]])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"train": numpy.array([Trap()], dtype=object)}, "holds pickled objects or a broken array"),
        ({"data": VECTORS, "y": VECTORS}, "has no array 'train', only 'data', 'y'"),
        ({"train": numpy.zeros((0, 3))}, r"array 'train' is empty, shape \(0, 3\)"),
        ({"train": VECTORS, "test": numpy.array([[0, 0], [0, numpy.nan]])}, "array 'test', row 1 is not finite"),
        ({"train": HUGE}, "array 'train', row 1 is not finite in float32"),
        ({"train": numpy.zeros((5, 4, 4, 4), "uint8")}, r"must be uint8 images.*got uint8 \[5, 4, 4, 4\]"),
        ({"train": numpy.zeros((5, 3, 4, 4))}, r"must be uint8 images.*got float64 \[5, 3, 4, 4\]"),
        ({"train": numpy.zeros((5, 3), "int64")}, r"got int64 \[5, 3\]"),
        ({"train": IMAGES, "test": VECTORS}, "the arrays' examples differ"),
        ({"train": VECTORS[:2]}, "2 examples cannot be split into 3 parts"),
        (
            {"train": VECTORS, "train_labels": numpy.zeros(4, int)},
            r"'train_labels' must hold 5 integers, got int64 \[4\]",
        ),
        ({"train": VECTORS, "train_labels": numpy.zeros(5)}, "must hold 5 integers, got float64"),
        ({"train": VECTORS, "test": VECTORS, "test_labels": numpy.zeros(5, int)}, "for all of train, test, got test"),
    ],
)
def test_bad_arrays_are_named(npz, arrays, message):
    with pytest.raises(ValueError, match=f"npz_file: '.*mine.npz'.*{message}"):
        data.npz_file(npz(**arrays))


def test_files_that_are_no_archive_are_named(npz, tmp_path):
    path = npz(train=numpy.random.default_rng(0).normal(size=(500, 3)))
    whole = path.read_bytes()
    for content in (b"", pickle.dumps(Trap()), whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not an .npz file .*or is cut off"):
            data.npz_file(path)
    path.write_bytes(whole[:200] + b"\0" * 50 + whole[250:])
    with pytest.raises(OSError, match="could not be read: Bad CRC-32"):
        data.npz_file(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train.npy", b"text")
    with pytest.raises(ValueError, match="npz_file: .*"):
        data.npz_file(path)
    with pytest.raises(OSError, match="could not be read: .*No such file"):
        data.npz_file(tmp_path / "gone.npz")
    buffer = io.BytesIO()
    numpy.save(buffer, VECTORS)
    path.write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="is not an .npz file"):
        data.npz_file(path)


# Text


@pytest.fixture
def corpus(tmp_path):
    def write(**files):
        (tmp_path / "corpus").mkdir(exist_ok=True)
        for split, text in files.items():
            content = text if isinstance(text, bytes) else text.encode()
            (tmp_path / "corpus" / f"{split}.txt").write_bytes(content)
        return tmp_path / "corpus"

    return write


def test_a_byte_order_mark_is_no_part_of_the_first_word(corpus):
    path = corpus(train=b"\xef\xbb\xbfa b\na a\n", validation="a\n", test="b\n")
    assert data.load(f"text:{path}").vocabulary[-2:] == ("a", "b")


def test_text_is_numbered_by_the_training_vocabulary_and_padded(corpus):
    path = corpus(train="b a  a\n\n a c b <unk>\n", validation="c new\n", test="a\nb b b\n")
    loaded = data.load(f"text:{path}")
    assert (loaded.name, loaded.kind, loaded.levels) == ("text:corpus", "text", None)
    assert loaded.vocabulary == ("<pad>", "<unk>", "<bos>", "<eos>", "a", "b", "c")  # a 3, b 2, c 1
    assert loaded.splits.train.tolist() == [[2, 5, 4, 4, 3, 0], [2, 4, 6, 5, 1, 3]]
    assert loaded.splits.validation.tolist() == [[2, 6, 1, 3]]
    assert loaded.splits.test.tolist() == [[2, 4, 3, 0, 0], [2, 5, 5, 5, 3]]
    assert [x.tolist() for x in loaded.lengths] == [[5, 6], [4], [3, 5]]
    assert all(x.dtype == torch.int64 for x in (*loaded.splits, *loaded.lengths))


def test_one_file_of_text_is_split(corpus):
    path = corpus(all="".join(f"{word}\n" for word in "abcdefghijklmnopqrst")) / "all.txt"
    loaded = data.load(f"text:{path}")
    assert [tuple(s.shape) for s in loaded.splits] == [(16, 3), (2, 3), (2, 3)]
    assert len(loaded.vocabulary) == 4 + 16 and (loaded.splits.test[:, 1] == 1).all()  # words not seen in training


def test_vocabulary_and_length_are_limited(corpus):
    path = corpus(train="a a a b b c\n", validation="a b\n", test="c\n")
    loaded = data.text_lines(path, max_vocabulary=5, max_length=4)
    assert loaded.vocabulary[4:] == ("a",) and loaded.splits.train.tolist() == [[2, 4, 4, 4, 1, 3]]


def test_lines_that_are_cut_off_are_told_of(corpus):
    path = corpus(train="a a a\na\nb\nb\n", validation="a b\n", test="c\nc c c c\n")
    assert data.load(f"text:{path}", max_length=4).caution == ""
    short = data.load(f"text:{path}", max_length=2, max_vocabulary=5)
    assert short.caution == "lines cut off after 2 words: 25.0% of train, 0.0% of validation, 50.0% of test"
    assert short.splits.train.shape == (4, 4) and short.vocabulary[4:] == ("a",)
    with pytest.raises(ValueError, match="load: max_length can be given for text only, not for 'gaussians'"):
        data.load("gaussians", max_length=5)


def test_a_token_of_the_text_can_stand_for_unknown_words(corpus):
    loaded = data.text_lines(corpus(train="_UNK a _UNK\n", validation="a\n", test="_UNK <unk>\n"), unknown="_UNK")
    assert loaded.vocabulary[4:] == ("a",) and loaded.splits.test.tolist() == [[2, 1, 1, 3]]


def test_named_texts_have_their_caution(corpus, monkeypatch):
    path = corpus(train="_UNK a b\nb c\n", validation="a\n", test="a b\n")
    path.rename(path.with_name("yahoo"))
    loaded = data.load("yahoo", path.parent, max_length=2)
    assert (loaded.name, loaded.source) == ("yahoo", "folder yahoo") and "<unk>" in loaded.vocabulary
    assert loaded.caution.startswith("made of the published validation and test files")
    assert loaded.caution.endswith("; lines cut off after 2 words: 50.0% of train, 0.0% of validation, 0.0% of test")
    assert "_UNK" not in loaded.vocabulary and loaded.splits.train[0].tolist() == [2, 1, 4, 3]
    whole = dataclasses.replace(CORPORA["yahoo"], train_lines=2)
    monkeypatch.setitem(CORPORA, "yahoo", whole)  # somebody has all of the training text
    assert data.load("yahoo", path.parent).caution == ""
    monkeypatch.delenv("NCPVAE_DATA", raising=False)
    with pytest.raises(OSError, match="'war_and_peace' is not on the hub: give a data folder that holds"):
        data.load("war_and_peace")


VOCABULARY = ("<pad>", "<unk>", "<bos>", "<eos>", "a", "b")


def test_text_becomes_ids_and_ids_text():
    ids = data.from_text(["a b  a", "", "new <unk> b"], VOCABULARY)
    assert ids.tolist() == [[2, 4, 5, 4, 3], [2, 3, 0, 0, 0], [2, 1, 1, 5, 3]]
    assert data.to_text(ids, VOCABULARY) == ["a b a", "", "<unk> <unk> b"]
    assert data.to_text(torch.tensor([2, 4, 3, 5]), VOCABULARY) == ["a"]  # one row; nothing after <eos>
    assert data.to_text(torch.tensor([[[2, 4]], [[5, 5]]], dtype=torch.int32), VOCABULARY) == ["a", "b b"]
    assert data.from_text(iter(["a b a"]), list(VOCABULARY), 2, truncate=True).tolist() == [[2, 4, 5, 3]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: data.from_text([], VOCABULARY), ValueError, "from_text: lines must hold at least one line, got none"),
        (lambda: data.from_text("a b", VOCABULARY), TypeError, "from_text: lines must be several strings, got one"),
        (
            lambda: data.from_text(["a", "a b a"], VOCABULARY, 2),
            ValueError,
            "from_text: line 2 has 3 words, more than max_length, 2; truncate=True",
        ),
        (lambda: data.from_text(["a"], VOCABULARY, 0), ValueError, "from_text: max_length must be ≥ 1, got 0"),
        (lambda: data.from_text(["a <pad>"], VOCABULARY), ValueError, "line 1 holds the reserved token '<pad>'"),
        (lambda: data.from_text(["a"], VOCABULARY[1:]), ValueError, "from_text: vocabulary must be a list that begins"),
        (lambda: data.to_text(torch.tensor([[4, 6]]), VOCABULARY), ValueError, "to_text: ids must be in 0 … 5,.*got 6"),
        (lambda: data.to_text(torch.tensor([[-1]]), VOCABULARY), ValueError, "to_text: ids must be in 0 … 5,.*got -1"),
        (lambda: data.to_text(torch.tensor(4), VOCABULARY), ValueError, "to_text: ids must be .* got a single number"),
        (lambda: data.to_text(torch.ones(2), VOCABULARY), TypeError, "to_text: ids must be .* got torch.float32"),
    ],
)
def test_bad_lines_and_ids_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_vocabulary_is_saved_and_read(tmp_path):
    vocabulary = (*VOCABULARY, "é", '"', "\\")
    data.save_vocabulary(tmp_path / "vocabulary.json", vocabulary)
    assert data.load_vocabulary(tmp_path / "vocabulary.json") == vocabulary


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "vocabulary must be a list that begins with <pad>, <unk>, <bos>, <eos>"),
        ("<pad>", "vocabulary must be a list"),
        ([*VOCABULARY, "a"], "vocabulary must hold distinct words without white space, got 'a' as id 6"),
        ([*VOCABULARY, "c d"], "vocabulary must hold distinct words without white space, got 'c d' as id 6"),
        ([*VOCABULARY, ""], "vocabulary must hold distinct words without white space, got '' as id 6"),
        ([*VOCABULARY, 7], "vocabulary must hold distinct words without white space, got '7' as id 6"),
    ],
)
def test_a_file_without_a_vocabulary_is_named(content, message, tmp_path):
    (tmp_path / "v.json").write_text(json.dumps({"vocabulary": content}))
    with pytest.raises(ValueError, match=f"load_vocabulary: .*v.json': {message}"):
        data.load_vocabulary(tmp_path / "v.json")
    if content is not None:
        with pytest.raises(ValueError, match=f"save_vocabulary: {message}"):
            data.save_vocabulary(tmp_path / "new.json", content)
        assert not (tmp_path / "new.json").exists()


@pytest.mark.parametrize("name", ["war_and_peace", "yahoo"])
def test_real_text(data_folder, name):
    loaded = data.load(f"text:{name}", data_folder)
    with open(f"{data_folder}/{name}/test.txt", encoding="utf-8") as file:
        lines = [line.split() for line in file if line.strip()]
    ids, lengths = loaded.splits.test, loaded.lengths.test
    assert len(lines) == len(ids) and lengths.tolist() == [len(line) + 2 for line in lines]
    assert (ids != 0).sum(1).equal(lengths)
    known = set(loaded.vocabulary)
    words = [loaded.vocabulary[i] for i in ids[100, 1 : lengths[100] - 1].tolist()]
    assert words == [word if word in known else "<unk>" for word in lines[100]]


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({"train": ""}, ValueError, "train.txt' holds no text"),
        ({"train": "a\nb\nc\n", "test": " \n\n"}, ValueError, "test.txt' holds no text"),
        ({"train": b"a\n\xff\xfe\n"}, ValueError, "train.txt', line 2 is not UTF-8"),
        ({"train": "a\nb <eos>\n"}, ValueError, "train.txt', line 2 holds the reserved token '<eos>'"),
        ({"train": "a\nb\n"}, ValueError, "2 examples cannot be split into 3 parts"),
        ({"test": "a\n"}, OSError, "is neither a file nor a folder with train.txt"),
    ],
)
def test_bad_text_is_named(corpus, files, error, message):
    with pytest.raises(error, match=f"text_lines: .*{message}"):
        data.text_lines(corpus(**files))


def test_lines_too_long_to_be_padded_are_named(corpus, monkeypatch):
    monkeypatch.setattr("ncpvae.data.corpus.MAX_ELEMENTS", 100)
    path = corpus(train="a\n" * 10 + "a " * 20, validation="a\n", test="a\n")
    with pytest.raises(ValueError, match="corpus': 11 lines padded to 22 tokens are too much; give max_length"):
        data.text_lines(path)
    assert data.text_lines(path, max_length=5).splits.train.shape == (11, 7)


def test_bad_limits_are_named(corpus):
    path = corpus(train="a\nb\nc\n")
    with pytest.raises(ValueError, match="text_lines: max_vocabulary must be ≥ 5, got 4"):
        data.text_lines(path, max_vocabulary=4)
    with pytest.raises(ValueError, match="text_lines: max_length must be ≥ 1, got 0"):
        data.text_lines(path, max_length=0)
