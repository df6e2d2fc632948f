"""Image sets: three sources, normalisation, crops and flips, epochs, the cache, what is refused."""

import hashlib
import json
import math
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from addnorm.data import images
from addnorm.data.images import ImageData, ImageSet, load_images


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def picture(path, size=(8, 8), mode="RGB", seed=0):
    """Write a picture of noise and return its pixels."""
    random = np.random.default_rng([seed, *path.name.encode(), *path.parent.name.encode()])
    shape = size[::-1] if mode == "L" else (*size[::-1], len(mode))
    pixels = random.integers(256, size=shape, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def folder_of(root, counts, **options):
    """Write `counts[class]` pictures for each class."""
    for name, count in counts.items():
        for i in range(count):
            picture(root / name / f"{i:02}.png", **options)
    return root


def cifar(root, per_file=10, classes=10):
    """Write a small CIFAR-10 folder and return its records `(6, per_file, 3073)`."""
    root.mkdir(parents=True, exist_ok=True)
    records = np.random.default_rng(1).integers(256, size=(6, per_file, 3073), dtype=np.uint8)
    records[:, :, 0] = np.arange(6 * per_file).reshape(6, per_file) % classes
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    for name, record in zip(names, records, strict=True):
        (root / name).write_bytes(record.tobytes())
    text = "".join(f"class{i}\n" for i in range(classes)) + "\n"
    (root / "batches.meta.txt").write_text(text, encoding="utf-8")
    return records


def noise(n=23, channels=3, size=16, classes=3, **facts):
    """Return a set of noise in memory, every fourth image a test image."""
    random = np.random.default_rng(5)
    return ImageSet(
        "noise",
        random.integers(256, size=(n, channels, size, size), dtype=np.uint8),
        np.arange(n) % classes,
        np.arange(n) % 4 == 3,
        tuple(f"c{i}" for i in range(classes)),
        "0" * 64,
        facts.get("photographs", True),
    )


def refused(call, *args, **options):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        call(*args, **options)
    return str(error.value)


# -- digits ------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn_split_by_class():
    from sklearn.datasets import load_digits

    found, data = load_digits(), load_images("digits")
    assert data.shape == {"classes": 10, "channels": 1, "size": 8, "pixels": 64}
    assert (len(data.training), len(data.validation)) == (1438, 359)
    assert not data.crops
    assert not data.flips
    assert data.location == "digits"
    seen = {int(i) for i in data.training} | {int(i) for i in data.validation}
    assert seen == set(range(1797))
    for digit in range(10):
        own = [i for i in range(1797) if found.target[i] == digit]
        tested = [i for i in range(1797) if i in set(data.validation.tolist()) and i in set(own)]
        assert tested == own[2::5]
    trained = found.images[data.training]
    x, labels = next(data.validation_batches(359, 1))
    want = (found.images[data.validation] - trained.mean()) / trained.std()
    order = [int(i) for i in data.validation]
    assert np.abs(x[:, 0] - want).max() < 1e-5
    assert labels.tolist() == found.target[order].tolist()


# -- CIFAR-10 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", ["", "cifar-10-batches-bin"])
def test_cifar_is_read_as_its_page_describes_it(tmp_path, inside):
    """A record is the label, then 1,024 bytes of red, of green, of blue, row by row."""
    records = cifar(tmp_path / "c" / inside)
    data = load_images(str(tmp_path / "c"))
    assert data.shape == {"classes": 10, "channels": 3, "size": 32, "pixels": 3072}
    assert data.classes == tuple(f"class{i}" for i in range(10))
    assert (len(data.training), len(data.validation)) == (50, 10)
    assert data.crops
    assert data.flips
    for i, (channel, row, column) in enumerate([(0, 0, 0), (1, 3, 5), (2, 31, 30)]):
        byte = records[i, 7, 1 + channel * 1024 + row * 32 + column]
        assert data.images.pixels[i * 10 + 7, channel, row, column] == byte
    labels = np.concatenate([y for _, y in data.validation_batches(3, 100)])
    assert sorted(labels) == sorted(records[5, :, 0])


def test_torn_and_foreign_cifar_folders_are_refused_in_one_line(tmp_path):
    root = tmp_path / "c"
    cifar(root)
    whole = (root / "data_batch_2.bin").read_bytes()
    (root / "data_batch_2.bin").write_bytes(whole[:-7])
    text = refused(load_images, str(root))
    assert text.endswith(
        "data_batch_2.bin has 30,723 bytes, not a multiple of 3,073 (a label and 3 planes of 32x32 "
        "pixels); fetch it again"
    )
    (root / "data_batch_2.bin").write_bytes(b"")
    assert "data_batch_2.bin has 0 bytes" in refused(load_images, str(root))
    (root / "data_batch_2.bin").write_bytes(whole[:-3073])
    assert "data_batch_2.bin has 9 images, data_batch_1.bin has 10" in refused(
        load_images, str(root)
    )
    wrong = bytearray(whole)
    wrong[3 * 3073] = 17
    (root / "data_batch_2.bin").write_bytes(wrong)
    assert refused(load_images, str(root)).endswith(
        "data_batch_2.bin: image 3 has the label 17; labels go from 0 to 9"
    )
    (root / "data_batch_2.bin").unlink()
    (root / "test_batch.bin").unlink()
    assert "it lacks data_batch_2.bin, test_batch.bin" in refused(load_images, str(root))
    (root / "batches.meta.txt").write_text("one\n", encoding="utf-8")
    (root / "data_batch_2.bin").write_bytes(whole)
    (root / "test_batch.bin").write_bytes(whole)
    assert "batches.meta.txt has 1 class names" in refused(load_images, str(root))


def test_the_pickled_cifar_is_never_opened(tmp_path):
    (tmp_path / "data_batch_1").write_bytes(b"\x80\x02not opened")
    assert "pickled and never opened; take the binary version" in refused(
        load_images, str(tmp_path)
    )


# -- folders -----------------------------------------------------------------------------------


def test_a_folder_by_class_holds_every_picture_once(tmp_path):
    root = folder_of(tmp_path / "zoo", {"cat": 7, "ant": 2, "bee": 3})
    (root / "cat" / "notes.txt").write_text("no picture", encoding="utf-8")
    (root / "cat" / ".hidden.png").write_bytes(b"hidden")
    (root / "readme.txt").write_text("no class", encoding="utf-8")
    data = load_images(str(root))
    assert data.classes == ("ant", "bee", "cat")
    assert data.images.labels.tolist() == [0] * 2 + [1] * 3 + [2] * 7
    assert np.flatnonzero(data.images.test).tolist() == [1, 3, 7]  # at least one of each class
    assert data.describe()["ignored"] == 1
    assert data.location == str(root)
    listed = [(name, i) for name, n in (("ant", 2), ("bee", 3), ("cat", 7)) for i in range(n)]
    for at, (name, number) in enumerate(listed):
        stored = np.asarray(Image.open(root / name / f"{number:02}.png"))
        assert np.array_equal(data.images.pixels[at].transpose(1, 2, 0), stored)


@pytest.mark.parametrize("held_out", ["val", "test", "validation"])
def test_train_and_test_folders_are_the_split(tmp_path, held_out):
    folder_of(tmp_path / "z" / "train", {"a": 3, "b": 2})
    folder_of(tmp_path / "z" / held_out, {"b": 4}, seed=1)
    data = load_images(str(tmp_path / "z"))
    assert data.images.test.tolist() == [False] * 5 + [True] * 4
    assert data.images.labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1]
    picture(tmp_path / "z" / held_out / "bb" / "x.png")
    text = refused(load_images, str(tmp_path / "z"))
    assert f"the class 'bb' of {tmp_path / 'z' / held_out} is not in" in text
    assert "did you mean 'b'?" in text


@pytest.mark.parametrize(
    ("modes", "channels"),
    [(("L", "L"), 1), (("L", "RGB"), 3), (("LA", "L"), 1), (("RGBA",) * 2, 3)],
)
def test_gray_only_where_all_are_gray(tmp_path, modes, channels):
    for i in range(4):
        picture(tmp_path / "z" / "ab"[i % 2] / f"{i}.png", mode=modes[i % 2])
    data = load_images(str(tmp_path / "z"))
    assert data.shape["channels"] == channels
    assert (data.crops, data.flips) == ((channels == 3,) * 2)


def test_size_scales_the_shorter_side_and_cuts_the_middle(tmp_path):
    """A wide picture in three plain colours keeps the middle one."""
    for i in range(4):
        stripes = np.zeros((10, 30, 3), np.uint8)
        stripes[:, :10, 0], stripes[:, 10:20, 1], stripes[:, 20:, 2] = 200, 100 + i, 50
        path = tmp_path / "z" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(stripes).save(path)
    text = refused(load_images, str(tmp_path / "z"))
    assert "0.png is 30x10, not square; scale and cut all images with --size 10 (size=10 in" in text
    data = load_images(str(tmp_path / "z"), size=5)
    assert data.shape["size"] == 5
    middle = data.images.pixels[:, :, 1:-1, 1:-1]
    assert (middle[:, 1] == np.array([100, 102, 101, 103])[:, None, None]).all()
    assert (middle[:, [0, 2]] == 0).all()


def test_a_rotated_photograph_is_turned_upright(tmp_path):
    pixels = picture(tmp_path / "z" / "a" / "0.png")
    exif = Image.Exif()
    exif[0x0112] = 3  # orientation: half a turn
    Image.fromarray(pixels).save(tmp_path / "z" / "a" / "0.png", exif=exif)
    folder_of(tmp_path / "z", {"b": 2})
    picture(tmp_path / "z" / "a" / "1.png")
    data = load_images(str(tmp_path / "z"))
    assert np.array_equal(data.images.pixels[0].transpose(1, 2, 0), pixels[::-1, ::-1])


def bad_folders():
    def sizes(root):
        folder_of(root, {"a": 2, "b": 2})
        picture(root / "b" / "01.png", size=(9, 8))

    def torn(root):
        folder_of(root, {"a": 2, "b": 2})
        path = root / "b" / "00.png"
        path.write_bytes(path.read_bytes()[:-60])

    def deep(root):
        folder_of(root, {"a": 2, "b": 1})
        Image.fromarray(np.full((8, 8), 1000, np.uint16)).save(root / "b" / "01.png")

    yield (
        sizes,
        "b/01.png is 9x8, but a/00.png is 8x8; scale and cut all images with --size 8 (size=8 in",
    )
    yield torn, "b/00.png cannot be read as a picture ("
    yield deep, "b/01.png has pixels of more than 8 bits (mode I;16); convert it to 8 bits"
    yield lambda root: folder_of(root, {"a": 3, "b": 1}), "the class 'b' of"
    yield lambda root: folder_of(root, {"a": 3}), "has one class only, 'a'"
    yield lambda root: folder_of(root / "train", {"a": 3, "b": 2}), "there must be val or test"
    yield lambda root: root.mkdir(), "has no subfolders; put the images of each class"
    yield (
        lambda root: [(root / c).mkdir(parents=True) for c in "ab"],
        "has 2 subfolders but no image",
    )


@pytest.mark.parametrize(("make", "message"), list(bad_folders()))
def test_bad_folders_are_refused_in_one_line(tmp_path, make, message):
    make(tmp_path / "z")
    assert message in refused(load_images, str(tmp_path / "z"))
    assert not list((tmp_path / "cache").rglob("*.npy")) or "class" in message


def test_a_class_without_a_training_image_and_a_set_without_test_are_refused(tmp_path):
    folder_of(tmp_path / "z" / "train", {"a": 2, "b": 0})
    (tmp_path / "z" / "train" / "b").mkdir()
    folder_of(tmp_path / "z" / "test", {"a": 1, "b": 2})
    assert "the class 'b' of" in refused(load_images, str(tmp_path / "z"))
    assert "has no training image" in refused(load_images, str(tmp_path / "z"))
    none = noise()
    none.test[:] = False
    assert "'noise' has no test image" in refused(ImageData, none)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("digts", {}, "no images at 'digts'; did you mean 'digits'? give digits, a CIFAR-10"),
        ("/nowhere", {}, "no images at '/nowhere'; give digits"),
        ("digits", {"augment": "of"}, "unknown augment 'of'; did you mean 'off'? (known: auto, on"),
        ("digits", {"corrupt": "drop"}, "unknown corrupt 'drop' (known: refuse, skip)"),
        ("digits", {"size": -1}, "size -1 must be at least 1, or 0"),
        ("digits", {"size": 32}, "size 32: the images of digits are 8x8; leave size out"),
    ],
)
def test_unknown_sources_and_options_are_refused(source, options, message):
    assert message in refused(load_images, source, **options)


def test_corrupt_pictures_are_skipped_and_counted(tmp_path):
    root = folder_of(tmp_path / "z", {"a": 6, "b": 6})
    (root / "a" / "02.png").write_bytes(b"no picture")
    (root / "b" / "05.png").write_bytes((root / "b" / "05.png").read_bytes()[:-60])
    text = refused(load_images, str(root))
    assert "a/02.png cannot be read as a picture (" in text
    assert "leave such pictures out: --corrupt skip (corrupt='skip' in Python)" in text
    for _ in range(2):  # decoded, then from the cache
        data = load_images(str(root), corrupt="skip")
        assert data.images.pixels.shape == (10, 3, 8, 8)
        assert data.images.labels.tolist() == [0] * 5 + [1] * 5
        stated = data.describe()
        assert (stated["skipped"], stated["skipped_names"]) == (2, ["a/02.png", "b/05.png"])
        stored = np.asarray(Image.open(root / "a" / "03.png"))
        assert np.array_equal(data.images.pixels[2].transpose(1, 2, 0), stored)
    for i in range(1, 6):
        (root / "a" / f"{i:02}.png").write_bytes(b"no picture")
    text = refused(load_images, str(root), corrupt="skip")
    assert "the class 'a' of" in text
    assert "has one image only (after 6 skipped)" in text
    for path in root.rglob("*.png"):
        path.write_bytes(b"no picture")
    assert "none of the 12 pictures" in refused(load_images, str(root), corrupt="skip")


# -- the cache ---------------------------------------------------------------------------------


def test_decoded_images_are_found_again_without_opening_a_file(tmp_path, monkeypatch):
    root = folder_of(tmp_path / "z", {"a": 3, "b": 3})
    first = load_images(str(root))

    def never(*args):
        raise AssertionError("a picture was opened")

    monkeypatch.setattr(images, "_Decoder", never)
    again = load_images(str(root))
    assert isinstance(again.images.pixels, np.memmap)
    assert np.array_equal(first.images.pixels, again.images.pixels)
    assert first.sha256 == again.sha256


@pytest.mark.parametrize("spoil", ["short", "json", "other", "list"])
def test_a_spoilt_cache_is_written_anew(tmp_path, cache, spoil):
    root = folder_of(tmp_path / "z", {"a": 3, "b": 3})
    right = np.array(load_images(str(root)).images.pixels)
    (path,) = cache.rglob("*.npy")
    if spoil == "short":
        path.write_bytes(path.read_bytes()[:-5])
    elif spoil == "other":
        np.save(path, np.zeros((2, 3, 8, 8), np.uint8))
    else:
        path.with_suffix(".json").write_text("{" if spoil == "json" else "[1]", encoding="utf-8")
    assert np.array_equal(load_images(str(root)).images.pixels, right)


def test_changed_pictures_are_decoded_anew_and_change_the_digest(tmp_path):
    root = folder_of(tmp_path / "z", {"a": 3, "b": 3})
    before = load_images(str(root))
    picture(root / "a" / "01.png", seed=9)
    after = load_images(str(root))
    assert before.sha256 != after.sha256
    assert not np.array_equal(before.images.pixels[1], after.images.pixels[1])
    moved = tmp_path / "elsewhere"
    root.rename(moved)
    assert load_images(str(moved)).sha256 == after.sha256


def test_without_a_cache_folder_images_stay_in_memory(tmp_path, monkeypatch):
    root = folder_of(tmp_path / "z", {"a": 3, "b": 3})
    kept = np.array(load_images(str(root)).images.pixels)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    data = load_images(str(root))
    assert not isinstance(data.images.pixels, np.memmap)
    assert np.array_equal(data.images.pixels, kept)


# -- batches -----------------------------------------------------------------------------------


def naive_batch(found, row, down, right, mirrored, pad):
    """Return one training image with loops: normalise, shift with 0 around, mirror."""
    trained = found.pixels[~found.test].astype(np.float64)
    C, S = found.pixels.shape[1], found.pixels.shape[3]
    out = np.zeros((C, S, S))
    for c, i, j in product(range(C), range(S), range(S)):
        y, x = i + down - pad, j + right - pad
        value = 0.0
        if 0 <= y < S and 0 <= x < S:
            mean, std = trained[:, c].mean(), trained[:, c].std()
            value = (float(found.pixels[row, c, y, x]) - mean) / std
        out[c, i, S - 1 - j if mirrored else j] = value
    return out


@pytest.mark.parametrize(
    ("augment", "crops", "flips"),
    [("on", True, True), ("crop", True, False), ("flip", False, True), ("off", False, False)],
)
def test_crops_and_flips_equal_a_naive_loop(augment, crops, flips):
    """Whatever was drawn, each image is one of the shifts and mirrors that are allowed."""
    found = noise(n=8, channels=2, size=8, classes=2)
    data = ImageData(found, augment=augment)
    pad = 1
    offsets = list(product(range(2 * pad + 1), repeat=2)) if crops else [(pad, pad)]
    allowed = {
        (row, *offset, mirrored): naive_batch(found, row, *offset, mirrored, pad)
        for row, offset, mirrored in product(data.training, offsets, [False, True][: 1 + flips])
    }
    seen = set()
    for step in range(40):
        x, labels = data.training_batch(3, step, 6)
        assert (x.dtype, x.shape) == (np.float32, (6, 2, 8, 8))
        assert (labels.dtype, labels.shape) == (np.int64, (6,))
        for image, label in zip(x, labels, strict=True):
            near = [key for key, want in allowed.items() if np.abs(image - want).max() < 1e-5]
            assert len(near) == 1
            assert found.labels[near[0][0]] == label
            seen.add(near[0][1:])
    assert len(seen) == len(offsets) * (1 + flips), "every shift and mirror occurs"


def test_the_shift_is_four_pixels_of_thirty_two():
    found = noise(n=8, size=32)
    found.pixels[:] = np.random.default_rng(0).integers(1, 200, size=found.pixels.shape)
    data = ImageData(found, augment="crop")
    rows = set()
    for step in range(60):
        x, _ = data.training_batch(0, step, 6)
        empty = (x == 0).all(axis=(1, 3))  # rows that came in from outside
        rows |= {int(row) for row in empty.sum(axis=1)}
    assert rows == {0, 1, 2, 3, 4}


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(n=st.integers(12, 40), size=st.integers(1, 50), seed=st.integers(0, 5))
def test_every_image_comes_once_in_an_epoch(n, size, seed):
    """Batches laid end to end are permutations of the training images, each another one."""
    found = noise(n=n, size=2)
    found.pixels[:, 0, 0, 0] = np.arange(n)  # tells the image
    data = ImageData(found, augment="off")
    N = len(data.training)
    steps = -(-3 * N // size)
    drawn = np.concatenate(
        [data.training_batch(seed, s, size)[0][:, 0, 0, 0] for s in range(steps)]
    )
    rows = np.rint(drawn * data.std[0] + data.mean[0]).astype(int)
    epochs = rows[: 3 * N].reshape(3, N)
    for epoch in epochs:
        assert sorted(epoch) == sorted(data.training)
    assert not np.array_equal(epochs[0], epochs[1])


def test_a_batch_depends_on_seed_step_and_size_alone():
    one, other = ImageData(noise(), augment="on"), ImageData(noise(), augment="on")
    for step in (7, 0, 3):
        other.training_batch(1, step, 5)
    for step in (0, 3, 4, 3):
        for a, b in zip(
            one.training_batch(1, step, 5), other.training_batch(1, step, 5), strict=True
        ):
            assert np.array_equal(a, b)
    assert not np.array_equal(one.training_batch(1, 3, 5)[0], one.training_batch(2, 3, 5)[0])
    assert not np.array_equal(one.training_batch(1, 3, 5)[0], one.training_batch(1, 4, 5)[0])


@pytest.mark.parametrize("augment", ["crop", "flip"])
def test_each_step_draws_its_own_crops_and_flips(augment):
    found = noise(n=48)
    found.pixels[:] = found.pixels[0]  # so that only crops and flips differ
    data = ImageData(found, augment=augment)
    drawn = {data.training_batch(0, step, 9)[0].tobytes() for step in range(12)}
    assert len(drawn) == 12


def test_two_processes_draw_the_same():
    code = (
        "import hashlib; from addnorm.data.images import load_images; "
        "x, y = load_images('digits', augment='on').training_batch(3, 20, 100); "
        "print(hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    x, y = load_images("digits", augment="on").training_batch(3, 20, 100)
    assert run.stdout.strip() == hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest()


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(n=st.integers(12, 60), size=st.integers(1, 30), batches=st.integers(1, 30))
def test_validation_is_spread_evenly_and_each_image_comes_once(n, size, batches):
    found = noise(n=n, size=2)
    found.pixels[:, 0, 0, 0] = np.arange(n)
    data = ImageData(found, augment="on")  # which validation does not heed
    got = list(data.validation_batches(size, batches))
    rows = np.concatenate([np.rint(x[:, 0, 0, 0] * data.std[0] + data.mean[0]) for x, _ in got])
    total = len(data.validation)
    assert len(rows) == len(set(rows)) == min(size * batches, total)
    assert set(rows) <= set(data.validation)
    assert max(len(x) for x, _ in got) <= size
    assert max(len(x) for x, _ in got) - min(len(x) for x, _ in got) <= 1
    shares = [len(rows) * (found.labels[data.validation] == c).sum() / total for c in range(3)]
    counts = [(found.labels[rows.astype(int)] == c).sum() for c in range(3)]
    assert all(abs(a - b) <= 1 for a, b in zip(shares, counts, strict=True))
    again = list(data.validation_batches(size, batches))
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(got, again, strict=True))


def test_batches_are_normalised_by_the_training_images():
    found = noise(n=2200, size=4)  # more than one part of the sums
    found.pixels[:, 1] = 77  # a channel without contrast stays finite
    found.pixels[found.test, 0] = 255  # test images have no say
    data = ImageData(found, augment="off")
    x, _ = data.training_batch(0, 0, len(data.training))
    assert np.abs(x[:, [0, 2]].mean(axis=(0, 2, 3), dtype=np.float64)).max() < 1e-5
    assert np.abs(x[:, [0, 2]].std(axis=(0, 2, 3), dtype=np.float64) - 1).max() < 1e-5
    assert (x[:, 1] == 0).all()
    assert (data.mean[1], data.std[1]) == (77, 1)


def test_reference_losses_equal_a_naive_sum():
    found = noise(n=40)
    found.labels[[0, 4, 8, 11]] = 0
    data = ImageData(found)
    train = [int(y) for y, held in zip(found.labels, found.test, strict=True) if not held]
    held = [int(y) for y, held in zip(found.labels, found.test, strict=True) if held]
    naive = -sum(math.log(train.count(y) / len(train)) for y in held) / len(held)
    assert data.unigram == pytest.approx(naive, rel=1e-12)
    assert data.uniform == math.log(3)


def test_what_is_described_is_json_and_finds_the_data_again(tmp_path, monkeypatch):
    root = folder_of(tmp_path / "z", {"a": 3, "b": 3})
    monkeypatch.chdir(tmp_path)
    data = load_images("z", augment="flip", size=6)
    known = json.loads(json.dumps(data.describe()))
    monkeypatch.chdir("/")
    again = load_images(known["source"], **known["options"])
    assert again.sha256 == known["sha256"] == data.sha256
    for a, b in zip(data.training_batch(0, 1, 4), again.training_batch(0, 1, 4), strict=True):
        assert np.array_equal(a, b)
    assert root.samefile(known["source"])


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("sklearn.datasets", "digits", "the image set digits needs scikit-learn, which is not"),
        ("PIL.Image", "z", "a folder of images needs pillow, which is not installed; install it"),
    ],
)
def test_missing_libraries_are_named(tmp_path, monkeypatch, module, source, message):
    folder_of(tmp_path / "z", {"a": 3, "b": 3})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    assert message in refused(load_images, source)
