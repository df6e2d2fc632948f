"""Text corpora: find, read, encode once into a memory map, split by chunks, gather batches.

No torch here: arrays are numpy, tokens are uint16 or uint32 on disk and int64 in a batch.
Shapes: B batch, T positions, N tokens of the corpus, V vocabulary.
"""

from __future__ import annotations

import glob
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from addnorm.files import cache_folder, write_atomic

Tokens = NDArray[np.integer]

BUILT_IN = {
    "pydoc": "the Python language reference inside every CPython, about 465,000 characters",
}


@dataclass(frozen=True)
class Corpus:
    """A text with a name and the sha256 of its UTF-8 bytes."""

    name: str
    text: str
    sha256: str


def load_corpus(source: str) -> Corpus:
    """Return the corpus that `source` names: `pydoc`, a UTF-8 file, a folder, or a glob.

    Files of a folder or glob are joined in the order of their paths, hidden ones left out.
    Raises `ValueError` for what is missing, empty, unreadable, or not UTF-8.
    """
    text = _pydoc() if source == "pydoc" else "\n".join(_read(path) for path in _paths(source))
    if not text.strip():
        raise ValueError(f"the text {source!r} is empty; give a UTF-8 file with some text")
    return Corpus(source, text, hashlib.sha256(text.encode()).hexdigest())


def _pydoc() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def _paths(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_dir():
        found = [p for p in path.rglob("*") if not _hidden(p.relative_to(path))]
    elif path.exists():
        found = [path]
    else:
        found = [Path(p) for p in glob.glob(str(path), recursive=True)]
    files = sorted(p for p in found if p.is_file())
    if not files:
        known = ", ".join(BUILT_IN)
        raise ValueError(
            f"no text at {source!r}; give a UTF-8 file, a folder, a glob in quotes, "
            f"or one of: {known}"
        )
    return files


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x}); "
            f"convert it, for instance with: iconv -f gb18030 -t utf-8 {path.name}"
        ) from None


class CharTokenizer:
    """Characters to numbers and back; the vocabulary is every character of the corpus, sorted."""

    def __init__(self, characters: Sequence[str]) -> None:
        self.characters = list(characters)
        self._ids = {c: i for i, c in enumerate(self.characters)}

    @classmethod
    def of(cls, text: str) -> CharTokenizer:
        """Return the tokenizer of all the characters in `text`."""
        return cls(sorted(set(text)))

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`. Raises `ValueError` for a character it never saw."""
        for position, character in enumerate(text):
            if character not in self._ids:
                raise ValueError(
                    f"the character {character!r} (U+{ord(character):04X}, position {position}) is "
                    f"not among the {len(self)} characters that this model was trained on"
                )
        return [self._ids[c] for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`."""
        return "".join(self.characters[i] for i in ids)

    def encode_array(self, text: str) -> Tokens:
        """Return the ids of a corpus as the smallest unsigned array that holds them."""
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        table = np.zeros(max(map(ord, self.characters)) + 1, _dtype(len(self)))
        table[[ord(c) for c in self.characters]] = np.arange(len(self))
        return np.asarray(table[points])


def _dtype(vocabulary: int) -> type[np.unsignedinteger]:
    return np.uint16 if vocabulary <= 2**16 else np.uint32


class TextData:
    """A corpus encoded once, split into training and validation chunks, gathered in batches.

    Every tenth chunk of the text is validation, so that the split covers the whole text and not
    its tail; no training window touches a validation chunk. The batch of a step depends on
    nothing but the seed and the step, so runs with one seed see the same data in the same order.

    Raises `ValueError` when the text is too short for windows of `context + 1` characters.
    """

    VALIDATION_EVERY = 10

    def __init__(self, corpus: Corpus, context: int) -> None:
        self.source = corpus.name
        self.sha256 = corpus.sha256
        self.context = context
        self.tokenizer = CharTokenizer.of(corpus.text)
        self.tokens = _encoded(corpus, self.tokenizer)
        window, total = context + 1, len(self.tokens)
        chunk = max(2 * window, min(2048, total // 50))
        bounds = np.arange(0, total + 1, chunk)
        bounds[-1] = total  # the last chunk takes the remainder
        spans = list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
        if len(spans) < 2:
            raise ValueError(
                f"the text {corpus.name!r} has {total:,} characters, too short for a context of "
                f"{context}: it needs at least {4 * window:,}"
            )
        every = min(self.VALIDATION_EVERY, len(spans))
        validation = set(range(every // 2, len(spans), every))
        self.training_spans = _merge([s for i, s in enumerate(spans) if i not in validation])
        self.validation_spans = [s for i, s in enumerate(spans) if i in validation]
        # Where a window may start: `_firsts` of each span, `_cumulated` windows before it.
        lengths = [end - begin - context for begin, end in self.training_spans]
        self._firsts = np.array([begin for begin, _ in self.training_spans])
        self._cumulated = np.concatenate([[0], np.cumsum(lengths)])
        self._offsets = np.arange(window)
        counts = self._count(self.training_spans) + 1.0  # add one: no character has probability 0
        held_out = self._count(self.validation_spans)
        self.uniform = math.log(self.vocab_size)
        self.unigram = float(-(held_out @ np.log(counts / counts.sum())) / held_out.sum())

    @property
    def location(self) -> str:
        """What finds the same corpus again, from any working directory."""
        return self.source if self.source in BUILT_IN else os.path.abspath(self.source)

    @property
    def vocab_size(self) -> int:
        """The number of distinct characters, V."""
        return len(self.tokenizer)

    def _count(self, spans: Sequence[tuple[int, int]]) -> NDArray[np.float64]:
        counts = np.zeros(self.vocab_size)
        for begin, end in spans:
            counts += np.bincount(self.tokens[begin:end], minlength=self.vocab_size)
        return counts

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
            "context": self.context,
            "tokens": len(self.tokens),
            "vocab_size": self.vocab_size,
            "unigram": self.unigram,
            "uniform": self.uniform,
        }


def load_text(source: str, context: int) -> TextData:
    """Return the data that `source` names (see `load_corpus`), for windows of `context` tokens."""
    return TextData(load_corpus(source), context)


def _merge(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join spans that touch, so that windows may cross the chunk borders between them."""
    merged: list[tuple[int, int]] = []
    for begin, end in spans:
        if merged and merged[-1][1] == begin:
            begin = merged.pop()[0]
        merged.append((begin, end))
    return merged


def _encoded(corpus: Corpus, tokenizer: CharTokenizer) -> Tokens:
    """Return the memory map of the encoded corpus, written on the first call.

    Where the cache folder cannot be written the array stays in memory: the cache saves time only.
    """
    path = cache_folder() / "tokens" / f"{corpus.sha256}.char.npy"
    if not path.exists():
        array = tokenizer.encode_array(corpus.text)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with write_atomic(path) as file:
                np.save(file, array)
        except OSError:
            return array
    mapped: Tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    # The map is a view of a file that others may shorten; a wrong size is written anew.
    if len(mapped) != len(corpus.text):
        os.unlink(path)
        return _encoded(corpus, tokenizer)
    return mapped
