"""Texts as data: encoded once into a memory map, split by chunks, gathered in batches.

No torch here: arrays are numpy, tokens are the smallest unsigned type on disk and int64 in a batch.
Files are read in blocks, so a text may be larger than memory.
Shapes: B batch, T positions, N tokens of the corpus, V vocabulary, S spans.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from addnorm.data.corpora import BUILT_IN, Corpus, Progress, load_corpus, silent
from addnorm.data.tokenizers import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    Tokens,
    from_dict,
    parse_tokenizer,
)
from addnorm.files import cache_folder, read_json, write_atomic, write_json

SAMPLE = 2**25  # bytes, about, that byte pairs are learned from
Counts = NDArray[np.int64]


class TextData:
    """A corpus encoded once, split into training and validation chunks, gathered in batches.

    Every tenth chunk of the text is validation, so that the split covers the whole text and not
    its tail; no training window touches a validation chunk. The batch of a step depends on
    nothing but the seed and the step, so runs with one seed see the same data in the same order.

    Raises `ValueError` when the text is too short for windows of `context + 1` tokens.
    """

    VALIDATION_EVERY = 10
    unit = "tokens"

    def __init__(
        self,
        corpus: Corpus,
        context: int,
        tokenizer: str | Tokenizer = "char",
        progress: Progress = silent,
    ) -> None:
        self.source = corpus.name
        self.sha256 = corpus.sha256
        self.size = corpus.size
        self.left_out = corpus.left_out
        self.context = context
        with contextlib.ExitStack() as stack:
            try:
                folder = cache_folder() / "tokens"
                folder.mkdir(parents=True, exist_ok=True)
                encoded = _encoded(folder, corpus, tokenizer, progress)
            except OSError:  # the cache saves time only; a map outlives its file
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                encoded = _encoded(folder, corpus, tokenizer, progress)
            self.tokenizer, self.tokens, counts = encoded
            self.training_spans, self.validation_spans = self._split()
            held_out = self._count(self.validation_spans)
        # Where a window may start: `_firsts` of each span, `_cumulated` windows before it.
        self._firsts = self.training_spans[:, 0]
        lengths = self.training_spans[:, 1] - self._firsts - context
        self._cumulated = np.concatenate([[0], np.cumsum(lengths)])
        self._offsets = np.arange(context + 1)
        trained = counts - held_out + 1.0  # add one: no token has probability 0
        self.uniform = math.log(self.vocab_size)
        self.unigram = float(
            -(held_out.astype(float) @ np.log(trained / trained.sum())) / held_out.sum()
        )
        self.bytes_per_token = float(held_out @ self.tokenizer.lengths / held_out.sum())
        self.characters_per_token = (
            None  # it is no text
            if corpus.length is None
            else float(held_out @ self.tokenizer.starts / held_out.sum())
        )

    def _split(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return where the training and the validation spans begin and end, `(S, 2)`."""
        window, total = self.context + 1, len(self.tokens)
        chunk = max(2 * window, min(2048, total // 50))
        bounds = np.arange(0, total + 1, chunk)
        bounds[-1] = total  # the last chunk takes the remainder
        chunks = len(bounds) - 1
        if chunks < 2:
            raise ValueError(
                f"the text {self.source!r} has {total:,} {self.tokenizer.noun}, too short for a "
                f"context of {self.context}: it needs at least {4 * window:,}"
            )
        every = min(self.VALIDATION_EVERY, chunks)
        held_out = np.arange(every // 2, chunks, every)
        validation = np.stack((bounds[held_out], bounds[held_out + 1]), axis=1)
        # Training windows may cross the chunk borders between two validation chunks.
        begins = np.concatenate(([0], validation[:, 1]))
        ends = np.concatenate((validation[:, 0], [total]))
        training = np.stack((begins, ends), axis=1)
        return training[ends > begins], validation

    def _count(self, spans: NDArray[np.int64]) -> Counts:
        """Count the tokens of the spans, `(V,)`.

        The file is read, not the map, whose pages would stay in memory.
        """
        counts = np.zeros(self.vocab_size, np.int64)
        assert isinstance(self.tokens, np.memmap)
        assert self.tokens.filename is not None
        kind = self.tokens.dtype
        with open(self.tokens.filename, "rb") as file:
            for group in np.array_split(spans, math.ceil(len(spans) / 256)):
                rows = []
                for begin, end in group.tolist():
                    file.seek(self.tokens.offset + begin * kind.itemsize)
                    rows.append(file.read((end - begin) * kind.itemsize))
                counts += np.bincount(np.frombuffer(b"".join(rows), kind), minlength=len(counts))
        return counts

    @property
    def location(self) -> str:
        """What finds the same corpus again, from any working directory."""
        if self.source in BUILT_IN:
            return self.source
        return os.path.abspath(Path(self.source).expanduser())

    @property
    def vocab_size(self) -> int:
        """The number of tokens to choose from, V."""
        return len(self.tokenizer)

    @property
    def shape(self) -> dict[str, int]:
        """What a model must fit."""
        return {"vocab_size": self.vocab_size, "context": self.context}

    def bits_per_byte(self, loss: float) -> float:
        """Return a loss in nats a token as bits a byte, which compares across tokenizers.

        The bytes of a token are those of the validation text on average.
        """
        return loss / math.log(2) / self.bytes_per_token

    def training_batch(self, seed: int, step: int, size: int) -> tuple[Tokens, Tokens]:
        """Return the inputs and targets `(B, T)` of one step; seed and step alone decide them."""
        draws = np.random.default_rng((seed, step)).integers(self._cumulated[-1], size=size)
        span = np.searchsorted(self._cumulated, draws, side="right") - 1
        return self._windows(self._firsts[span] + draws - self._cumulated[span])

    def validation_batches(self, size: int, batches: int) -> Iterator[tuple[Tokens, Tokens]]:
        """Yield `batches` batches of windows spread evenly over the validation chunks."""
        begins = np.concatenate(
            [
                np.arange(begin, end - self.context, self.context)
                for begin, end in self.validation_spans
            ]
        )
        wanted = min(size * batches, len(begins))
        chosen = begins[np.linspace(0, len(begins) - 1, wanted).astype(np.int64)]
        for first in range(0, wanted, size):
            yield self._windows(chosen[first : first + size])

    def _windows(self, starts: NDArray[np.int64]) -> tuple[Tokens, Tokens]:
        rows = self.tokens[starts[:, None] + self._offsets].astype(np.int64)  # (B, T + 1)
        return rows[:, :-1], rows[:, 1:]

    def describe(self) -> dict[str, object]:
        """Return the facts that a run stores: source, sha256, sizes, the two reference losses."""
        return {
            "source": self.location,
            "sha256": self.sha256,
            "unit": self.unit,
            "tokenizer": self.tokenizer.name,
            "context": self.context,
            "bytes": self.size,
            "tokens": len(self.tokens),
            "vocab_size": self.vocab_size,
            "unigram": self.unigram,
            "uniform": self.uniform,
            "unigram_bits_per_byte": self.bits_per_byte(self.unigram),
            "bytes_per_token": self.bytes_per_token,
            "characters_per_token": self.characters_per_token,
            "left_out": self.left_out,
        }


def load_text(
    source: str,
    context: int,
    tokenizer: str | Tokenizer = "char",
    progress: Progress = silent,
) -> TextData:
    """Return the data that `source` names (see `load_corpus`), for windows of `context` tokens.

    `tokenizer` is `char`, `byte`, `bpe` (2,048 pieces), `bpe:VOCABULARY`, or the tokenizer of a
    run. `progress(done, total)` is called with bytes while the text is read, and again while it
    is encoded; a text that did not change is neither read nor encoded a second time.
    Raises `ValueError` for an unknown tokenizer and a text that it cannot read.
    """
    kind = parse_tokenizer(tokenizer)[0] if isinstance(tokenizer, str) else tokenizer.name
    corpus = load_corpus(source, binary=kind == "byte", progress=progress)
    return TextData(corpus, context, tokenizer, progress)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Return the tokenizer of a run's `tokenizer.json`. Raises `ValueError` where it is none."""
    try:
        return from_dict(read_json(Path(path)))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _tokenizer(folder: Path, corpus: Corpus, name: str, progress: Progress) -> Tokenizer:
    """Return the tokenizer of that name for the corpus; byte pairs are learned only once.

    They are learned from the whole text, or from blocks spread evenly over a long one.
    """
    kind, vocabulary = parse_tokenizer(name)
    if kind == "byte":
        return ByteTokenizer()
    if kind == "char":
        return CharTokenizer(corpus.characters)
    path = folder / f"{corpus.sha256}.bpe-{vocabulary}.json"
    if path.exists():
        with contextlib.suppress(ValueError):  # spoilt: learned anew
            kept = from_dict(read_json(path))
            if len(kept) == vocabulary:
                return kept
    every = math.ceil(corpus.size / SAMPLE)
    texts = (text for i, text in enumerate(corpus.lines(progress)) if i % every == 0)
    trained = BpeTokenizer.trained(texts, vocabulary, corpus.name)
    write_json(path, trained.to_dict())
    return trained


def _encoded(
    folder: Path, corpus: Corpus, tokenizer: str | Tokenizer, progress: Progress
) -> tuple[Tokenizer, Tokens, Counts]:
    """Return the tokenizer, the memory map of the encoded corpus, and how often each token comes.

    The map is written on the first call, and anew where it is spoilt.
    """
    if isinstance(tokenizer, str):
        tokenizer = _tokenizer(folder, corpus, tokenizer, progress)
    path = folder / f"{corpus.sha256}.{tokenizer.digest}.npy"
    mapped = _mapped(path, corpus, tokenizer)
    if mapped is None:
        with _alone(path) as file:
            # Another process may have written it while this one waited.
            mapped = _mapped(path, corpus, tokenizer)
            if mapped is None:
                _write_map(file, path, corpus, tokenizer, progress)
        mapped = mapped or _mapped(path, corpus, tokenizer)
    assert mapped is not None, "the map must be whole right after it was written"
    return tokenizer, *mapped


def _counts_path(path: Path) -> Path:
    return path.with_suffix(".counts.npy")


def _mapped(path: Path, corpus: Corpus, tokenizer: Tokenizer) -> tuple[Tokens, Counts] | None:
    """Return the map and its counts, or None unless they are whole.

    The map is a view of a file that others may shorten: the tokens must be as many as were
    counted, and together as long as the text.
    """
    try:
        counts = np.load(_counts_path(path), allow_pickle=False)
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    whole = (
        counts.shape == (len(tokenizer),)
        and tokens.shape == (counts.sum(),)
        and tokens.dtype == tokenizer.dtype
        and counts @ tokenizer.lengths == corpus.size
    )
    return (tokens, counts) if whole else None


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[IO[bytes]]:
    """Open `path.partial` for writing once no other process does.

    The name stays the same, so what a killed process has left is written over.
    """
    partial = path.with_name(f"{path.name}.partial")
    while True:
        with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_open_at(file, partial):
                continue  # the process before has renamed or removed it
            try:
                yield file
                return
            finally:
                if _is_open_at(file, partial):  # else it has become the map
                    partial.unlink()


def _is_open_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _write_map(
    file: IO[bytes], path: Path, corpus: Corpus, tokenizer: Tokenizer, progress: Progress
) -> None:
    """Write the tokens block by block to `file` and rename it to `path`, the counts beside it."""
    counts = np.zeros(len(tokenizer), np.int64)
    file.truncate(0)
    _write_header(file, tokenizer, 0)
    for array in _arrays(corpus, tokenizer, progress):
        counts += np.bincount(array, minlength=len(counts))
        file.write(array.data)
    file.seek(0)
    _write_header(file, tokenizer, int(counts.sum()))
    file.flush()
    os.fsync(file.fileno())
    with write_atomic(_counts_path(path)) as beside:
        np.save(beside, counts)
    os.replace(path.with_name(f"{path.name}.partial"), path)


def _write_header(file: IO[bytes], tokenizer: Tokenizer, tokens: int) -> None:
    """Write the head of a .npy file; numpy leaves room for any number of rows in it."""
    descr = np.lib.format.dtype_to_descr(np.dtype(tokenizer.dtype))
    header = {"descr": descr, "fortran_order": False, "shape": (tokens,)}
    np.lib.format.write_array_header_1_0(file, header)


def _arrays(corpus: Corpus, tokenizer: Tokenizer, progress: Progress) -> Iterator[Tokens]:
    """Yield the tokens of the corpus in blocks."""
    if isinstance(tokenizer, ByteTokenizer):
        for block in corpus.blocks(progress):
            yield np.frombuffer(block, np.uint8)
    else:
        for text in corpus.lines(progress):
            yield tokenizer.encode_array(text)
