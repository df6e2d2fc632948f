"""Tokenizers: text to numbers and back, by characters, bytes, or byte pairs (BPE).

One string names a tokenizer: `char`, `byte`, `bpe` or `bpe:VOCABULARY`. Each of them is a list of
pieces, the bytes that an id stands for, so decoding, streaming and counting bytes are the same for
all. Shapes: N tokens, V vocabulary.
"""

from __future__ import annotations

import codecs
import difflib
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.integer]

TOKENIZERS = ("char", "byte", "bpe", "bpe:VOCABULARY")
VOCABULARY = 2048
SMALLEST, LARGEST = 257, 2**18
LINE = 2**15  # characters that BPE encodes in one go, up to the next line end
ALL_POINTS = 0x110000  # code points of Unicode


def parse_tokenizer(name: str) -> tuple[str, int]:
    """Return the kind, `char`, `byte` or `bpe`, and for `bpe` the vocabulary, else 0.

    Raises `ValueError` for an unknown name and a vocabulary out of range.
    """
    kind, colon, size = name.partition(":")
    if kind not in TOKENIZERS or (colon and kind != "bpe"):
        near = difflib.get_close_matches(kind, TOKENIZERS[:3], 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown tokenizer {name!r}{hint} (known: {', '.join(TOKENIZERS)})")
    if kind != "bpe":
        return kind, 0
    if not colon:
        return kind, VOCABULARY
    if not (size.isascii() and size.isdigit() and SMALLEST <= int(size[:9]) <= LARGEST):
        raise ValueError(
            f"the vocabulary {size!r} of the tokenizer {name!r} must be a whole number from "
            f"{SMALLEST} (256 bytes and one pair) to {LARGEST}"
        )
    return kind, int(size)


class Tokenizer(ABC):
    """Text to ids and back; `pieces` are the bytes of every id."""

    noun: ClassVar[str]  # what a token is, in the plural
    pieces: Sequence[bytes]

    @property
    @abstractmethod
    def name(self) -> str:
        """The string that names this tokenizer."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`. Raises `ValueError` for what has none."""

    @abstractmethod
    def encode_array(self, text: str) -> Tokens:
        """Return the ids of `text` as an unsigned array `(N,)`, as `encode` does."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return what JSON keeps of this tokenizer; `from_dict` reads it."""

    def __len__(self) -> int:
        return len(self.pieces)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", "replace")

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of `ids` as they come; a character whose bytes are not all there waits.

        What is yielded, joined, equals `decode`.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for i in ids:
            if text := decoder.decode(self.pieces[i]):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """The smallest unsigned type that holds every id."""
        return _dtype(len(self))

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """How many bytes each id stands for, `(V,)`."""
        return np.array([len(piece) for piece in self.pieces], np.int64)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """How many characters begin in each id, `(V,)`: its bytes that continue none."""
        begin = [sum(byte & 0xC0 != 0x80 for byte in piece) for piece in self.pieces]
        return np.array(begin, np.int64)

    @property
    def digest(self) -> str:
        """What tells two tokenizers apart: the start of the sha256 of `to_dict`."""
        return hashlib.sha256(json.dumps(self.to_dict()).encode()).hexdigest()[:12]


class CharTokenizer(Tokenizer):
    """Characters to numbers and back; the vocabulary is every character of the corpus, sorted."""

    noun = "characters"
    name = "char"

    def __init__(self, characters: Sequence[str]) -> None:
        self.characters = list(characters)
        self.pieces = [c.encode() for c in self.characters]
        self._ids = {c: i for i, c in enumerate(self.characters)}

    @classmethod
    def of(cls, text: str) -> CharTokenizer:
        """Return the tokenizer of all the characters in `text`."""
        return cls(sorted(set(text)))

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`. Raises `ValueError` for a character it never saw."""
        for position, character in enumerate(text):
            if character not in self._ids:
                raise ValueError(
                    f"the character {character!r} (U+{ord(character):04X}, position {position}) is "
                    f"not among the {len(self)} characters that this model was trained on"
                )
        return [self._ids[c] for c in text]

    @cached_property
    def _table(self) -> Tokens:
        """The id of every code point; V stands for those that have none."""
        table = np.full(ALL_POINTS, len(self), _dtype(len(self) + 1))
        table[[ord(c) for c in self.characters]] = np.arange(len(self))
        return table

    def encode_array(self, text: str) -> Tokens:
        """Return the ids of `text`, `(N,)`. Raises `ValueError` for a character it never saw."""
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        array = self._table[points]
        if len(array) and array.max() == len(self):
            self.encode(text)  # raises, with the character and where it stands
        return array.astype(self.dtype, copy=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the name and the characters, in the order of their ids."""
        return {"name": self.name, "characters": self.characters}


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8 text, or of any file."""

    noun = "bytes"
    name = "byte"
    pieces: Sequence[bytes] = [bytes([i]) for i in range(256)]

    def encode(self, text: str) -> list[int]:
        """Return the bytes of `text` in UTF-8."""
        return list(_utf8(text))

    def encode_array(self, text: str) -> Tokens:
        """Return the bytes of `text` in UTF-8, `(N,)`."""
        return np.frombuffer(_utf8(text), np.uint8)

    def to_dict(self) -> dict[str, Any]:
        """Return the name."""
        return {"name": self.name}


class BpeTokenizer(Tokenizer):
    """Byte-level byte-pair encoding (Sennrich et al. 2016; Radford et al. 2019).

    Any text can be encoded, since every byte is a token. Text is cut at line ends first, then as
    GPT-2 does; no token crosses a line end, so that a text encoded in pieces that end where lines
    do has the same tokens as the whole.
    """

    noun = "tokens"

    def __init__(self, description: str) -> None:
        """Take the JSON of Hugging Face's `tokenizers`."""
        from tokenizers import Tokenizer as Library

        self._library = Library.from_str(description)
        byte_of = _byte_alphabet()
        vocabulary = sorted(self._library.get_vocab().items(), key=lambda item: item[1])
        self.pieces = [bytes(byte_of[c] for c in token) for token, _ in vocabulary]

    @classmethod
    def trained(cls, texts: Iterable[str], vocabulary: int, source: str) -> BpeTokenizer:
        """Learn `vocabulary` pieces from `texts`, parts of the corpus that `source` names.

        Raises `ValueError` when the texts have fewer: a pair must come at least twice.
        """
        from tokenizers import Tokenizer as Library
        from tokenizers import models, pre_tokenizers, trainers

        library = Library(models.BPE())
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        lines = pre_tokenizers.Split("\n", "merged_with_previous")
        library.pre_tokenizer = pre_tokenizers.Sequence([lines, byte_level])
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            min_frequency=2,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        library.train_from_iterator(texts, trainer)
        if library.get_vocab_size() < vocabulary:
            raise ValueError(
                f"the text {source!r} gives {library.get_vocab_size()} pieces, not {vocabulary:,}; "
                f"use the tokenizer bpe:{library.get_vocab_size()}, a smaller one, or more text"
            )
        return cls(library.to_str())

    @property
    def name(self) -> str:
        """`bpe:VOCABULARY`."""
        return f"bpe:{len(self)}"

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`."""
        return list(map(int, self.encode_array(text)))

    def encode_array(self, text: str) -> Tokens:
        """Return the ids of `text`, `(N,)`, encoded in parallel in parts of whole lines."""
        _utf8(text)
        parts, begin = [], 0
        while begin < len(text):
            end = text.find("\n", begin + LINE) + 1 or len(text)
            parts.append(text[begin:end])
            begin = end
        ids = [np.array(e.ids, self.dtype) for e in self._library.encode_batch_fast(parts)]
        return np.concatenate(ids) if ids else np.zeros(0, self.dtype)

    def to_dict(self) -> dict[str, Any]:
        """Return the name and the library's own JSON."""
        return {"name": self.name, "bpe": json.loads(self._library.to_str())}


def from_dict(kept: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer of which `to_dict` told. Raises `ValueError` for what is none."""
    try:
        kind, _ = parse_tokenizer(kept["name"])
        if kind == "char":
            return CharTokenizer(kept["characters"])
        return ByteTokenizer() if kind == "byte" else BpeTokenizer(json.dumps(kept["bpe"]))
    except ValueError:
        raise
    except Exception as error:  # noqa: BLE001  # the library raises Exception itself
        raise ValueError(f"this is no tokenizer: {type(error).__name__}: {error}") from None


def _dtype(vocabulary: int) -> type[np.unsignedinteger]:
    if vocabulary <= 2**8:
        return np.uint8
    return np.uint16 if vocabulary <= 2**16 else np.uint32


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the character at position {error.start} is half of a surrogate pair, not text"
        ) from None


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each sign that the library writes bytes with.

    A byte that prints stands for itself, the others for the signs that are left, in their order.
    """
    from tokenizers import pre_tokenizers

    signs = set(pre_tokenizers.ByteLevel.alphabet())
    byte_of = {chr(byte): byte for byte in range(256) if chr(byte) in signs}
    others = [byte for byte in range(256) if chr(byte) not in signs]
    return byte_of | dict(zip(sorted(signs - set(byte_of)), others, strict=True))
