"""Tokenizers: names, round trips, streaming, and byte pairs against a naive statement of them."""

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from addnorm.data import tokenizers
from addnorm.data.tokenizers import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    from_dict,
    parse_tokenizer,
)

WORDS = "the tide of the spring river joins the level sea and the moon of the sea is born\n"
TEXT = (WORDS * 3 + "春江潮水连海平 海上明月共潮生\n  def f(x):\n    return x\n") * 4
BPE = BpeTokenizer.trained([TEXT], 300, "text")
ALL = [CharTokenizer.of(TEXT), ByteTokenizer(), BPE]


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("char", ("char", 0)),
        ("byte", ("byte", 0)),
        ("bpe", ("bpe", 2048)),
        ("bpe:257", ("bpe", 257)),
        ("bpe:262144", ("bpe", 262144)),
    ],
)
def test_names(name, parsed):
    assert parse_tokenizer(name) == parsed


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("chars", "unknown tokenizer 'chars'; did you mean 'char'? (known: char, byte, bpe, "),
        ("bpe4096", "unknown tokenizer 'bpe4096'; did you mean 'bpe'? "),
        ("words", "unknown tokenizer 'words' (known: "),
        ("char:9", "unknown tokenizer 'char:9'; did you mean 'char'? "),
        ("bpe:256", "the vocabulary '256' of the tokenizer 'bpe:256' must be a whole number from "),
        ("bpe:262145", "from 257 (256 bytes and one pair) to 262144"),
        ("bpe:9999999999999999999999", "to 262144"),
        ("bpe:", "the vocabulary '' of the tokenizer 'bpe:' must be "),
        ("bpe:-300", "the vocabulary '-300' "),
        ("bpe:٣٠٠", "the vocabulary '٣٠٠' "),
    ],
)
def test_names_that_are_refused(name, message):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        parse_tokenizer(name)
    assert message in str(error.value)


@pytest.mark.parametrize("tokenizer", ALL, ids=lambda t: t.name)
def test_round_trip_of_its_own_text(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    array = tokenizer.encode_array(TEXT)
    assert array.tolist() == ids
    assert array.dtype == tokenizer.dtype
    assert max(ids) < len(tokenizer)
    assert tokenizer.lengths[ids].sum() == len(TEXT.encode())
    assert tokenizer.starts[ids].sum() == len(TEXT)
    assert tokenizer.encode("") == tokenizer.encode_array("").tolist() == []
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("tokenizer", ALL[1:], ids=lambda t: t.name)
@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_bytes_and_byte_pairs_take_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("tokenizer", ALL, ids=lambda t: t.name)
def test_streamed_text_is_the_text_and_no_character_is_torn(tokenizer):
    pieces = list(tokenizer.decode_stream(tokenizer.encode(TEXT)))
    assert "".join(pieces) == TEXT
    assert "" not in pieces
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > len(TEXT) / 10, "it must come bit by bit"


@pytest.mark.parametrize("tokenizer", ALL, ids=lambda t: t.name)
@given(draws=st.lists(st.integers(0, 2**16)))
@settings(max_examples=200, deadline=None)
def test_streaming_any_tokens_equals_decoding_them(tokenizer, draws):
    ids = [i % len(tokenizer) for i in draws]
    assert "".join(tokenizer.decode_stream(ids)) == tokenizer.decode(ids)


def test_a_half_character_waits_and_one_that_never_ends_is_marked():
    first, second, third = "春".encode()
    taken = []
    stream = ByteTokenizer().decode_stream(
        taken.append(i) or i for i in (97, first, second, third, first)
    )
    assert next(stream) == "a"
    assert taken == [97]
    assert next(stream) == "春"
    assert taken == [97, first, second, third]
    assert next(stream) == "\ufffd"


@pytest.mark.parametrize("tokenizer", ALL, ids=lambda t: t.name)
def test_json_keeps_a_tokenizer(tokenizer):
    again = from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert type(again) is type(tokenizer)
    assert again.name == tokenizer.name
    assert list(again.pieces) == list(tokenizer.pieces)
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert again.digest == tokenizer.digest


def test_digests_tell_tokenizers_apart():
    other = BpeTokenizer.trained([TEXT.upper()], 300, "text")
    assert len({t.digest for t in [*ALL, other, CharTokenizer.of("ab")]}) == 5


@pytest.mark.parametrize(
    "kept",
    [
        {},
        {"name": "words"},
        {"name": "char"},
        {"name": "char", "characters": 3},
        {"name": "bpe:300"},
        {"name": "bpe:300", "bpe": {"model": 1}},
    ],
)
def test_json_that_is_no_tokenizer_is_refused(kept):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        from_dict(kept)


def test_one_id_more_takes_a_larger_type():
    for vocabulary, kind in ((256, np.uint8), (257, np.uint16), (2**16, np.uint16)):
        text = "".join(
            chr(0x4E00 + i) if i < 20_000 else chr(0x20000 + i) for i in range(vocabulary)
        )
        array = CharTokenizer.of(text).encode_array(text)
        assert array.dtype == kind
        assert np.array_equal(array, np.arange(vocabulary))
    assert CharTokenizer([chr(0x20000 + i) for i in range(2**16 + 1)]).dtype == np.uint32


@pytest.mark.parametrize("vocabulary", [3, 256])
def test_a_character_never_seen_is_named(vocabulary):
    tokenizer = CharTokenizer([chr(0x4E00 + i) for i in range(vocabulary)])
    for encode in (tokenizer.encode, tokenizer.encode_array):
        with pytest.raises(ValueError, match=rf"'€' \(U\+20AC, position 1\) .* {vocabulary} "):
            encode("一€")
        with pytest.raises(ValueError, match=r"U\+DC80"):
            encode("\udc80")


@pytest.mark.parametrize("tokenizer", ALL[1:], ids=lambda t: t.name)
def test_half_a_surrogate_pair_is_no_text(tokenizer):
    with pytest.raises(ValueError, match=r"position 2 is half of a surrogate pair"):
        tokenizer.encode("ab\udc80")


# Byte pairs


def naive_pairs(text: str, merges: list[tuple[bytes, bytes]]) -> list[bytes]:
    """Apply the merges in their order to each word, which takes the space before it along."""
    pieces = []
    for line in text.splitlines(keepends=True):
        words = line.rstrip("\n").split(" ")
        for word in [words[0], *(f" {w}" for w in words[1:]), "\n"]:
            parts = [bytes([b]) for b in word.encode()]
            for left, right in merges:
                i = 0
                while i < len(parts) - 1:
                    if (parts[i], parts[i + 1]) == (left, right):
                        parts[i : i + 2] = [left + right]
                    i += 1
            pieces += parts
    return pieces


def test_byte_pairs_equal_a_naive_statement():
    byte_of = tokenizers._byte_alphabet()
    assert sorted(byte_of.values()) == list(range(256))
    kept = BPE.to_dict()["bpe"]["model"]["merges"]
    merges = [tuple(bytes(byte_of[c] for c in side) for side in pair) for pair in kept]
    assert len(merges) == 300 - 256
    text = WORDS + "春江 潮水\nthe the\n"
    assert [BPE.pieces[i] for i in BPE.encode(text)] == naive_pairs(text, merges)


def test_the_pair_learned_first_is_the_most_frequent():
    tokenizer = BpeTokenizer.trained([WORDS * 5], 257, "text")
    (piece,) = set(tokenizer.pieces) - {bytes([b]) for b in range(256)}
    words = WORDS.replace(" ", "| ").split("|")  # the newline is a word of its own
    counts = Counter(p for w in words for p in pairwise(w.rstrip("\n")))
    assert counts[tuple(piece.decode())] == max(counts.values())


def test_learning_is_the_same_every_time():
    again = BpeTokenizer.trained(iter([TEXT]), 300, "text")
    assert again.to_dict() == BPE.to_dict()


@given(st.lists(st.text("ab \n\t春'1,", max_size=20), max_size=8), st.lists(st.text(), max_size=4))
@settings(max_examples=200, deadline=None)
def test_lines_encode_alone_as_they_do_together(plain, odd):
    lines = [line.replace("\n", "") + "\n" for line in [*plain, *odd]]
    assert BPE.encode("".join(lines)) == [i for line in lines for i in BPE.encode(line)]


@pytest.mark.parametrize("line", [1, 7, 100])
def test_parts_do_not_change_the_tokens(line, monkeypatch):
    whole = BPE.encode(TEXT)
    monkeypatch.setattr(tokenizers, "LINE", line)
    assert BPE.encode(TEXT) == whole
    assert BPE.encode(TEXT.rstrip("\n")) == whole[:-1]


def test_a_text_with_too_few_pairs_says_how_many_it_has():
    with pytest.raises(ValueError, match=r"the text 'small' gives 2\d\d pieces, not 4,096; use "):
        BpeTokenizer.trained(["abc abc abc"], 4096, "small")
