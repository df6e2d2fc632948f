"""Text corpora: reading, encoding, the split by chunks, batches, and what is refused."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from addnorm.data.text import CharTokenizer, load_corpus, load_text


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def poem(tmp_path):
    path = tmp_path / "poem.txt"
    lines = [f"line {i} 春江潮水连海平 {'abc'[i % 3]}\n" for i in range(400)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def test_pydoc_is_the_language_reference():
    corpus = load_corpus("pydoc")
    assert 300_000 < len(corpus.text) < 800_000
    assert 90 < len(set(corpus.text)) < 130
    assert "The" in corpus.text


def test_a_folder_and_a_glob_join_their_files_in_order(tmp_path):
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_text("second", encoding="utf-8")
    (folder / "a.txt").write_text("first", encoding="utf-8")
    (folder / "sub" / "c.txt").write_text("third", encoding="utf-8")
    (folder / ".hidden").write_text("hidden", encoding="utf-8")
    assert load_corpus(str(folder)).text == "first\nsecond\nthird"
    assert load_corpus(str(folder / "*.txt")).text == "first\nsecond"


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert load_corpus(str(tmp_path / "bom.txt")).text == "hello"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no text at"),
        (b"", "is empty"),
        (b" \n ", "is empty"),
        (b"caf\xe9", "is not UTF-8 (byte 3 is 0xe9)"),
    ],
)
def test_bad_texts_are_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        load_corpus(str(path))
    assert message in str(error.value)


def test_a_text_too_short_says_how_much_is_needed(tmp_path):
    (tmp_path / "short.txt").write_text("too short", encoding="utf-8")
    with pytest.raises(ValueError, match=r"has 9 characters, too short for a context of 8: .* 36"):
        load_text(str(tmp_path / "short.txt"), 8)


def test_the_shortest_text_that_is_accepted_gives_batches(tmp_path):
    (tmp_path / "t.txt").write_text("abcdefgh" * 5, encoding="utf-8")
    data = load_text(str(tmp_path / "t.txt"), 8)
    inputs, targets = data.training_batch(0, 0, 3)
    assert inputs.shape == targets.shape == (3, 8)
    assert len(list(data.validation_batches(2, 2))) >= 1


def test_encoding_round_trips_and_is_read_from_the_memory_map(poem):
    first = load_text(str(poem), 16)
    again = load_text(str(poem), 16)
    assert isinstance(again.tokens, np.memmap)
    text = poem.read_text(encoding="utf-8")
    assert again.tokenizer.decode(np.asarray(again.tokens).tolist()) == text
    assert np.array_equal(first.tokens, again.tokens)
    assert first.sha256 == again.sha256


def test_a_spoilt_cache_file_is_written_anew(poem):
    data = load_text(str(poem), 16)
    path, right = Path(data.tokens.filename), np.array(data.tokens)
    del data
    np.save(path, np.zeros(3, np.uint16))
    assert np.array_equal(load_text(str(poem), 16).tokens, right)


def test_targets_are_the_inputs_shifted_by_one(poem):
    data = load_text(str(poem), 16)
    inputs, targets = data.training_batch(3, 7, 5)
    assert np.array_equal(inputs[:, 1:], targets[:, :-1])
    assert inputs.dtype == np.int64


def test_a_batch_depends_on_seed_and_step_alone(poem):
    data = load_text(str(poem), 16)
    same = [load_text(str(poem), 16).training_batch(1, 5, 4)[0], data.training_batch(1, 5, 4)[0]]
    assert np.array_equal(*same)
    assert not np.array_equal(data.training_batch(1, 6, 4)[0], same[0])
    assert not np.array_equal(data.training_batch(2, 5, 4)[0], same[0])


def test_no_training_window_touches_validation_and_both_cover_the_text(tmp_path):
    """Every token is distinct, so a window tells where it lies."""
    text = "".join(chr(0x4E00 + i) for i in range(20_000))
    (tmp_path / "distinct.txt").write_text(text, encoding="utf-8")
    data = load_text(str(tmp_path / "distinct.txt"), 16)
    trained = set()
    for step in range(400):
        inputs, targets = data.training_batch(0, step, 64)
        trained |= set(inputs.ravel().tolist()) | set(targets.ravel().tolist())
    held = set()
    for inputs, targets in data.validation_batches(8, 1000):
        held |= set(inputs.ravel().tolist()) | set(targets.ravel().tolist())
    assert trained.isdisjoint(held)
    assert len(trained) > 0.85 * 0.9 * len(text)
    fifths = [sum(i // (len(text) // 5) == part for i in held) for part in range(5)]
    assert min(fifths) > 0.15 * len(held), "validation must be spread over the whole text"
    assert 0.07 < len(held) / len(text) < 0.13


def test_unigram_and_uniform_lines_equal_a_naive_count(poem):
    data = load_text(str(poem), 16)
    text = poem.read_text(encoding="utf-8")
    train = Counter(c for a, b in data.training_spans for c in text[a:b])
    held = [c for a, b in data.validation_spans for c in text[a:b]]
    total = sum(train.values()) + data.vocab_size
    naive = -sum(math.log((train[c] + 1) / total) for c in held) / len(held)
    assert data.unigram == pytest.approx(naive, rel=1e-12)
    assert data.uniform == math.log(len(set(text)))


def test_a_character_never_seen_is_named():
    tokenizer = CharTokenizer.of("abc")
    with pytest.raises(ValueError, match=r"'€' \(U\+20AC, position 1\) is not among the 3"):
        tokenizer.encode("a€")
