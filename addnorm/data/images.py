"""Image sets: find, check, decode once into a memory map, normalise, crop, flip, gather batches.

No torch here: images are uint8 at rest and float32 in a batch.
Shapes: B batch, N images, C channels (1 gray, 3 RGB), S height and width.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from addnorm.files import cache_folder, read_json, write_atomic, write_json

Augment = Literal["auto", "on", "off", "crop", "flip"]
Corrupt = Literal["refuse", "skip"]
Labels = NDArray[np.int64]
Pixels = NDArray[np.uint8]

IMAGE_SETS = {
    "digits": "1,797 gray images 8x8 of handwritten digits, inside scikit-learn",
}
AUGMENT = ("auto", "on", "off", "crop", "flip")
CORRUPT = ("refuse", "skip")
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
)
TEST_FOLDERS = ("val", "valid", "validation", "test")  # the first one that exists is read
TEST_EVERY = 5  # without a split of its own every fifth image of a class is a test image


@dataclass(frozen=True)
class ImageSet:
    """Labelled images as they are at rest, split into training and test."""

    name: str
    pixels: Pixels  # (N, C, S, S)
    labels: Labels  # (N,)
    test: NDArray[np.bool_]  # (N,), True for a test image
    classes: tuple[str, ...]  # names by label
    sha256: str  # of names, labels and the source's bytes
    photographs: bool  # whether a shifted or mirrored image is still one of its class
    skipped: tuple[str, ...] = ()  # pictures that could not be read
    ignored: int = 0  # files that are no pictures


def load_images(
    source: str, *, augment: Augment = "auto", size: int = 0, corrupt: Corrupt = "refuse"
) -> ImageData:
    """Return the images that `source` names: `digits`, a CIFAR-10 folder, or a folder of images.

    - `digits`: scikit-learn's 1,797 gray 8x8 images. Every fifth image of each digit, in the
      order of the file, is a test image. The digits come from several writers in order, so
      every writer is in both parts: the test tells of new images by known hands.
    - a folder with the binary version of CIFAR-10 (`data_batch_1.bin` ... `test_batch.bin`,
      `batches.meta.txt`), or that holds `cifar-10-batches-bin`; its test batch is the test.
    - a folder with one subfolder of images for each class. With `train` and one of `val`, `valid`,
      `validation`, `test` in it the classes lie in those, otherwise every fifth image of a
      class, in the order of the names, is a test image. Gray if all pictures are, else RGB. The
      decoded images are kept in the cache folder and found again by the names, sizes and times
      of the files.

    `augment`: crops and flips of training images; `auto` is `on` for CIFAR-10 and folders of RGB
    images, `off` otherwise: a mirrored 2 is no 2. `size`: height and width of the images; 0 takes
    them as they are. In a folder the shorter side is scaled to it and the middle cut out.
    `corrupt`: refuse a picture that cannot be read, or leave it out and count it.

    Raises `ValueError` for an unknown source or option, a folder without images or with a single
    class, a class with a single image, pictures of several sizes, labels out of range, and files
    that are torn.
    """
    for name, value, known in (("augment", augment, AUGMENT), ("corrupt", corrupt, CORRUPT)):
        if value not in known:
            raise ValueError(
                f"unknown {name} {value!r}{_hint(value, known)} (known: {', '.join(known)})"
            )
    if size < 0:
        raise ValueError(f"size {size} must be at least 1, or 0 for images that have one size")
    return ImageData(_find(source, size, corrupt), augment=augment, size=size, corrupt=corrupt)


def _find(source: str, size: int, corrupt: Corrupt) -> ImageSet:
    if source == "digits":
        return _fixed_size(_digits(), size)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"no images at {source!r}{_hint(source, IMAGE_SETS) or ';'} give digits, a CIFAR-10 "
            "folder (binary version), or a folder with one subfolder of images for each class"
        )
    for inside in (folder, folder / "cifar-10-batches-bin"):
        if (inside / "batches.meta.txt").exists() or list(inside.glob("data_batch_*.bin")):
            return _fixed_size(_cifar(source, inside), size)
    for inside in (folder, folder / "cifar-10-batches-py"):
        if (inside / "data_batch_1").is_file():
            raise ValueError(
                f"{inside} is the Python version of CIFAR-10, which is pickled and never opened; "
                "take the binary version, cifar-10-binary.tar.gz"
            )
    return _folder(source, folder, size, corrupt)


def holds_images(source: str) -> bool:
    """Say whether `source` names a built-in set, a CIFAR-10 folder, or a folder of pictures mostly.

    Hidden files do not count, and endings decide what a picture is.
    """
    folder = Path(source).expanduser()
    if source in IMAGE_SETS or not folder.is_dir():
        return source in IMAGE_SETS
    if any(next(folder.glob(f"{sub}data_batch_*"), None) for sub in ("", "cifar-10-batches-*/")):
        return True
    files = [p for p in folder.rglob("*") if p.is_file() and not _hidden(p.relative_to(folder))]
    return 2 * sum(p.suffix.lower() in SUFFIXES for p in files) > len(files)


def _fixed_size(images: ImageSet, size: int) -> ImageSet:
    own = images.pixels.shape[-1]
    if size not in (0, own):
        raise ValueError(
            f"size {size}: the images of {images.name} are {own}x{own}; leave size out"
        )
    return images


def _hint(name: str, known: Sequence[str] | dict[str, str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _optional(module: str, package: str, why: str) -> Any:
    """Import what only some users need. Raises `ValueError` that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(
            f"{why} needs {package}, which is not installed; install it with: pip install {package}"
        ) from None


# -- digits and CIFAR-10 -----------------------------------------------------------------------


def _digits() -> ImageSet:
    datasets = _optional("sklearn.datasets", "scikit-learn", "the image set digits")
    found = datasets.load_digits()
    pixels: Pixels = np.asarray(found.images).astype(np.uint8)[:, None]  # whole numbers 0 to 16
    labels: Labels = np.asarray(found.target).astype(np.int64)
    digest = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
    names = tuple("0123456789")
    return ImageSet("digits", pixels, labels, _every_fifth(labels), names, digest, False)


def _every_fifth(labels: Labels) -> NDArray[np.bool_]:
    """Mark every fifth image of each class as test, of a small class at least one."""
    test = np.zeros(len(labels), np.bool_)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        every = min(TEST_EVERY, len(own))
        test[own[every // 2 :: every]] = True
    return test


CIFAR_RECORD = 1 + 3 * 32 * 32  # a byte of label, then the red, green and blue plane, row by row


def _cifar(source: str, folder: Path) -> ImageSet:
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    missing = [name for name in (*names, "batches.meta.txt") if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} is not a whole CIFAR-10 folder: it lacks {', '.join(missing)}")
    text = (folder / "batches.meta.txt").read_text(encoding="utf-8", errors="replace")
    classes = tuple(line.strip() for line in text.splitlines() if line.strip())
    if len(classes) < 2 or len(classes) > 256:
        raise ValueError(
            f"{folder / 'batches.meta.txt'} has {len(classes)} class names, one a line; CIFAR-10 "
            "has 10"
        )
    digest = hashlib.sha256("\n".join(classes).encode())
    records: list[Pixels] = []
    for name in names:
        data = (folder / name).read_bytes()
        if not data or len(data) % CIFAR_RECORD:
            raise ValueError(
                f"{folder / name} has {len(data):,} bytes, not a multiple of {CIFAR_RECORD:,} (a "
                "label and 3 planes of 32x32 pixels); fetch it again"
            )
        digest.update(data)
        record: Pixels = np.frombuffer(data, np.uint8).reshape(-1, CIFAR_RECORD)
        if records and len(record) != len(records[0]):
            raise ValueError(
                f"{folder / name} has {len(record):,} images, {names[0]} has {len(records[0]):,}; "
                "the files of CIFAR-10 have as many each: fetch them again"
            )
        wrong = np.flatnonzero(record[:, 0] >= len(classes))
        if len(wrong):
            raise ValueError(
                f"{folder / name}: image {wrong[0]} has the label {record[wrong[0], 0]}; labels go "
                f"from 0 to {len(classes) - 1}"
            )
        records.append(record)
    joined = np.concatenate(records)
    test = np.zeros(len(joined), np.bool_)
    test[-len(records[-1]) :] = True
    pixels = np.ascontiguousarray(joined[:, 1:]).reshape(-1, 3, 32, 32)
    labels = joined[:, 0].astype(np.int64)
    return ImageSet(source, pixels, labels, test, classes, digest.hexdigest(), True)


# -- a folder of images ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Picture:
    path: Path
    label: int
    test: bool


def _folder(source: str, folder: Path, size: int, corrupt: Corrupt) -> ImageSet:
    classes, pictures, ignored, split = _scan(source, folder)
    stats = [(p.path, p.path.stat()) for p in pictures]
    listing = [
        [str(path.relative_to(folder)), stat.st_size, stat.st_mtime_ns] for path, stat in stats
    ]
    quick = json.dumps(["1", os.path.abspath(folder), listing, size, corrupt])
    key = hashlib.sha256(quick.encode()).hexdigest()
    path = cache_folder() / "images" / f"{key}.npy"
    facts, pixels = _cached(path)
    if pixels is None:
        decoder = _Decoder(folder, pictures, size, corrupt)
        pixels = decoder.decoded_to(path)
        facts = {"sha256": decoder.digest.hexdigest(), "skipped": decoder.skipped}
        try:
            if isinstance(pixels, np.memmap):
                write_json(path.with_suffix(".json"), facts | {"shape": pixels.shape})
        except OSError:
            pass  # the cache saves time only
    gone = set(facts["skipped"])
    kept = [p for p in pictures if str(p.path.relative_to(folder)) not in gone]
    labels = np.array([p.label for p in kept], np.int64)
    test = np.array([p.test for p in kept], np.bool_) if split else _every_fifth(labels)
    return ImageSet(
        source,
        pixels,
        labels,
        test,
        classes,
        facts["sha256"],
        pixels.shape[1] == 3,
        tuple(facts["skipped"]),
        ignored,
    )


def _scan(source: str, folder: Path) -> tuple[tuple[str, ...], list[_Picture], int, bool]:
    """Return class names, pictures in order, the number of other files, and if it is split."""
    folders = _subfolders(folder)
    if not folders:
        raise ValueError(
            f"{source!r} has no subfolders; put the images of each class into a folder of its own"
        )
    held_out = next((name for name in TEST_FOLDERS if name in folders), "")
    split = "train" in folders and bool(held_out) and set(folders) <= {"train", *TEST_FOLDERS}
    parts = [("train", False), (held_out, True)] if split else [("", False)]
    classes = _subfolders(folder / parts[0][0])
    if len(classes) == 1:
        more = "; beside train there must be val or test" if classes == ["train"] else ""
        raise ValueError(
            f"{source!r} has one class only, {classes[0]!r}; a classifier needs two{more}"
        )
    pictures, ignored = [], 0
    for part, test in parts:
        for name in _subfolders(folder / part):
            if name not in classes:
                raise ValueError(
                    f"the class {name!r} of {folder / part} is not in {folder / 'train'}"
                    f"{_hint(name, classes)}"
                )
            home = folder / part / name
            inside = sorted(p for p in home.rglob("*") if p.is_file())
            files = [p for p in inside if not _hidden(p.relative_to(home))]
            found = [p for p in files if p.suffix.lower() in SUFFIXES]
            ignored += len(files) - len(found)
            pictures += [_Picture(p, classes.index(name), test) for p in found]
    if not pictures:
        raise ValueError(
            f"{source!r} has {len(classes)} subfolders but no image in them (known endings: "
            f"{' '.join(SUFFIXES)})"
        )
    return tuple(classes), pictures, ignored, split


def _subfolders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


class _Decoder:
    """Reads the pictures of a folder one after the other, so that memory stays bounded."""

    GRAY = ("1", "L", "LA")

    def __init__(
        self, folder: Path, pictures: Sequence[_Picture], size: int, corrupt: Corrupt
    ) -> None:
        why = "a folder of images"
        self.image = _optional("PIL.Image", "pillow", why)
        self.ops = _optional("PIL.ImageOps", "pillow", why)
        self.folder, self.pictures, self.size, self.corrupt = folder, pictures, size, corrupt
        self.digest = hashlib.sha256()
        self.skipped: list[str] = []
        self.mode = "L" if all(map(self._gray, pictures)) else "RGB"

    def _gray(self, picture: _Picture) -> bool:
        """Say whether a picture is gray by its header; one that has none is met again later."""
        try:
            with self.image.open(picture.path) as image:
                return image.mode in self.GRAY
        except (OSError, ValueError, SyntaxError):
            return True

    def decode(self) -> Iterator[Pixels]:
        """Yield each picture as `(C, S, S)`; start the digest and the list of skipped anew."""
        self.digest, self.skipped = hashlib.sha256(self.mode.encode()), []
        expected: tuple[int, int] | None = (self.size, self.size) if self.size else None
        first = ""
        for picture in self.pictures:
            name = str(picture.path.relative_to(self.folder))
            try:
                data = picture.path.read_bytes()
                with self.image.open(picture.path) as opened:
                    opened.load()
                    image = self.ops.exif_transpose(opened)
            except (OSError, ValueError, SyntaxError, self.image.DecompressionBombError) as error:
                if self.corrupt == "skip":
                    self.skipped.append(name)
                    continue
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise ValueError(
                    f"{picture.path} cannot be read as a picture ({reason}); mend or remove it, or "
                    "leave such pictures out: --corrupt skip (corrupt='skip' in Python)"
                ) from None
            if image.mode[0] in "IF":
                raise ValueError(
                    f"{picture.path} has pixels of more than 8 bits (mode {image.mode}); convert "
                    "it to 8 bits"
                )
            image = image.convert(self.mode)
            if self.size:
                image = self.ops.fit(image, (self.size, self.size), self.image.Resampling.BILINEAR)
            width, height = image.size
            if expected is None:
                expected, first = image.size, name
                if width != height:
                    raise ValueError(
                        f"{picture.path} is {width}x{height}, not square; scale and cut all images "
                        f"with --size {min(width, height)} (size={min(width, height)} in Python)"
                    )
            if image.size != expected:
                raise ValueError(
                    f"{picture.path} is {width}x{height}, but {first} is {expected[0]}x"
                    f"{expected[1]}; scale and cut all images with --size {expected[0]} "
                    f"(size={expected[0]} in Python)"
                )
            self.digest.update(f"\n{name}\n{len(data)}\n".encode() + data)
            pixels: Pixels = np.asarray(image)
            yield pixels[None] if self.mode == "L" else pixels.transpose(2, 0, 1)

    def decoded_to(self, path: Path) -> Pixels:
        """Return all images `(N, C, S, S)`: the memory map of `path`, which it writes, or an array.

        Where the cache folder cannot be written the array stays in memory.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with write_atomic(path) as file:
                self._write(file)
        except OSError:
            return np.stack(list(self.decode()))
        mapped: Pixels = np.load(path, mmap_mode="r", allow_pickle=False)
        return mapped

    def _write(self, file: IO[bytes]) -> None:
        """Write a .npy file; how many images there are stands in its header only at the end."""
        count, shape = 0, (0, 0, 0)
        for pixels in self.decode():
            if count == 0:
                shape = pixels.shape
                begin = _header(file, (len(self.pictures), *shape))
            file.write(np.ascontiguousarray(pixels).tobytes())
            count += 1
        if count == 0:
            raise ValueError(f"none of the {len(self.pictures)} pictures of {self.folder} was read")
        file.seek(0)
        assert _header(file, (count, *shape)) == begin  # the format leaves room for the number


def _header(file: IO[bytes], shape: tuple[int, ...]) -> int:
    facts = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, facts)
    return file.tell()


def _cached(path: Path) -> tuple[dict[str, Any], Pixels | None]:
    """Return the facts and the memory map of decoded images; None where they are not whole."""
    try:
        facts = read_json(path.with_suffix(".json"))
        pixels: Pixels = np.load(path, mmap_mode="r", allow_pickle=False)
        whole = pixels.dtype == np.uint8 and list(pixels.shape) == facts["shape"]
        return facts, pixels if whole else None
    except (ValueError, OSError, KeyError, TypeError):  # missing, torn, or of another make
        return {}, None


# -- batches -----------------------------------------------------------------------------------


class ImageData:
    """A set of images in batches: normalised float32 `(B, C, S, S)`, int64 labels `(B,)`.

    Normalised by mean and standard deviation of each channel of the training images. Training
    goes by epochs: a permutation from the seed, every image once in an epoch. Crops and flips
    come from seed and step, so a batch depends on seed, step and size alone.

    A crop shifts the image by up to S/8 pixels (4 of 32, He et al. 2015, section 4.2), each
    offset as likely; what comes in from outside is 0, the mean colour. A flip mirrors left and
    right with probability 1/2.

    `unigram` is the loss in nats on the test labels of knowing only the frequencies of the
    training labels, `uniform` that of knowing nothing. Raises `ValueError` for a class without
    a training image or with one image in all.
    """

    unit = "images"

    def __init__(
        self,
        images: ImageSet,
        *,
        augment: Augment = "auto",
        size: int = 0,
        corrupt: Corrupt = "refuse",
    ) -> None:
        _check_classes(images)
        self.images = images
        self.source, self.sha256, self.classes = images.name, images.sha256, images.classes
        self.augment, self.size, self.corrupt = augment, size, corrupt
        on = augment == "on" or (augment == "auto" and images.photographs)
        self.crops, self.flips = on or augment == "crop", on or augment == "flip"
        self.training = np.flatnonzero(~images.test)
        # Sorted by label, so that an even spread takes of every class its share.
        held_out = np.flatnonzero(images.test)
        self.validation = held_out[np.argsort(images.labels[held_out], kind="stable")]
        self.mean, self.std = _moments(images.pixels, self.training)
        self._orders: dict[tuple[int, int], NDArray[np.int64]] = {}
        counts = np.bincount(images.labels[self.training], minlength=len(self.classes))
        of_test = images.labels[self.validation]
        self.uniform = math.log(len(self.classes))
        self.unigram = float(-np.log(counts / counts.sum())[of_test].mean())

    @property
    def shape(self) -> dict[str, int]:
        """What a model must fit."""
        _, C, S, _ = self.images.pixels.shape
        return {"classes": len(self.classes), "channels": C, "size": S, "pixels": C * S * S}

    @property
    def location(self) -> str:
        """What finds the same images again, from any working directory."""
        if self.source in IMAGE_SETS:
            return self.source
        return os.path.abspath(Path(self.source).expanduser())

    def training_batch(
        self, seed: int, step: int, size: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return images and labels of one step; seed, step and size alone decide them."""
        N = len(self.training)
        places = np.arange(step * size, (step + 1) * size)
        epochs = places // N  # a batch may reach into the next epoch
        chosen = np.empty(size, np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            chosen[here] = self._order(seed, epoch)[places[here] % N]
        x, labels = self._gather(self.training[chosen])
        random = np.random.default_rng((seed, 1, step))
        if self.crops:
            x = _shifted(x, random)
        if self.flips:
            mirrored = random.random(size) < 0.5
            x[mirrored] = x[mirrored, :, :, ::-1]
        return x, labels

    def _order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Return the permutation of an epoch; the last two are kept."""
        order = self._orders.get((seed, epoch))
        if order is None:
            order = np.random.default_rng((seed, 0, epoch)).permutation(len(self.training))
            newest = list(self._orders.items())[-1:]
            self._orders = dict([*newest, ((seed, epoch), order)])
        return order

    def validation_batches(
        self, size: int, batches: int
    ) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        """Yield up to `batches` batches of at most `size` test images, the same at every call.

        They are spread evenly over the classes. Where there are batches enough, every test image
        comes once; the sizes of the batches then differ by at most one.
        """
        total = len(self.validation)
        wanted = min(size * batches, total)
        chosen = self.validation[np.arange(wanted) * total // wanted]
        dealt = -(-wanted // size)
        for first in range(dealt):
            yield self._gather(chosen[first::dealt])

    def _gather(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        x = self.images.pixels[indices].astype(np.float32)
        x -= self.mean[:, None, None]
        x /= self.std[:, None, None]
        return x, self.images.labels[indices]

    def describe(self) -> dict[str, object]:
        """Return the facts that a run stores; `load_images(source, **options)` finds them again."""
        skipped = self.images.skipped
        return {
            "unit": self.unit,
            "source": self.location,
            "sha256": self.sha256,
            "options": {"augment": self.augment, "size": self.size, "corrupt": self.corrupt},
            **self.shape,
            "names": list(self.classes),
            "training": len(self.training),
            "validation": len(self.validation),
            "crops": self.crops,
            "flips": self.flips,
            "mean": [float(value) for value in self.mean],
            "std": [float(value) for value in self.std],
            "skipped": len(skipped),
            "skipped_names": list(skipped[:20]),
            "ignored": self.images.ignored,
            "unigram": self.unigram,
            "uniform": self.uniform,
        }


def _check_classes(images: ImageSet) -> None:
    """Raise `ValueError` unless every class can be learned, and some of them be tested."""
    K = len(images.classes)
    counts = np.bincount(images.labels, minlength=K)
    trained = np.bincount(images.labels[~images.test], minlength=K)
    left = f" (after {len(images.skipped)} skipped)" if images.skipped else ""
    for name, count, training in zip(images.classes, counts, trained, strict=True):
        if count < 2:
            images_of = "one image only" if count else "no image"
            raise ValueError(
                f"the class {name!r} of {images.name!r} has {images_of}{left}; it needs one to "
                "train on and one to test"
            )
        if training == 0:
            raise ValueError(f"the class {name!r} of {images.name!r} has no training image{left}")
    if not images.test.any():
        raise ValueError(f"{images.name!r} has no test image{left}")


def _moments(
    pixels: Pixels, chosen: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return mean and standard deviation `(C,)` of each channel; 1 where all pixels are equal.

    The sums are of whole numbers and exact, a thousand images at a time.
    """
    first = np.zeros(pixels.shape[1], np.int64)
    second = first.copy()
    for begin in range(0, len(chosen), 1024):
        part = pixels[chosen[begin : begin + 1024]].astype(np.uint16)
        first += part.sum(axis=(0, 2, 3), dtype=np.int64)
        second += (part * part).sum(axis=(0, 2, 3), dtype=np.int64)  # 255^2 fits 16 bits
    n = len(chosen) * pixels.shape[2] * pixels.shape[3]
    sums = [(int(a), int(b)) for a, b in zip(first, second, strict=True)]
    mean = np.array([a / n for a, _ in sums], np.float32)
    std = np.array([math.sqrt(n * b - a * a) / n or 1.0 for a, b in sums], np.float32)
    return mean, std


def _shifted(x: NDArray[np.float32], random: np.random.Generator) -> NDArray[np.float32]:
    """Return each image of `x (B, C, S, S)` shifted by its own random offset, 0 coming in."""
    B, _, S, _ = x.shape
    pad = max(1, S // 8)
    down, right = random.integers(2 * pad + 1, size=(2, B))
    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (S, S), axis=(2, 3))
    return np.asarray(windows[np.arange(B), :, down, right])
