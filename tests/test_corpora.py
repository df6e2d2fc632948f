"""Corpora: read in blocks, found again by their records, mapped whole or not at all, built."""

import base64
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from addnorm import GPT, GPTConfig, TrainConfig, load_run, sample, train
from addnorm.cli import main
from addnorm.data import corpora, text
from addnorm.data.corpora import Corpus, load_corpus
from addnorm.data.text import TextData, load_text, load_tokenizer
from addnorm.files import cache_folder, write_json
from addnorm.training.tune import Choice

LINES = [f"line {i} 春江潮水连海平 {'é€𝄞'[i % 3]}\n" for i in range(300)]
TEXT = "".join(LINES)


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def settled(monkeypatch):
    """Trust the times of files that were written just now."""
    monkeypatch.setattr(corpora, "SETTLED", -10.0)


@pytest.fixture
def poem(tmp_path):
    path = tmp_path / "poem.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def left(folder: str) -> list[str]:
    return sorted(os.listdir(cache_folder() / folder))


# Reading in blocks


@pytest.mark.parametrize("block", [1, 2, 3, 5, 64, 2**20])
def test_blocks_of_any_size_read_the_same(block, tmp_path, monkeypatch):
    """Blocks cut characters, byte order marks and lines."""
    folder = tmp_path / "texts"
    folder.mkdir()
    whole = []
    for i, content in enumerate(["\ufeff" + LINES[0], "", "\ufeff", "𝄞春\r\n", "a\ufeffb"]):
        (folder / f"{i}.txt").write_bytes(content.encode())
        whole.append(content.removeprefix("\ufeff"))
    expected = "\n".join(whole)
    monkeypatch.setattr(corpora, "BLOCK", max(block, 3))  # a mark is in one block
    corpus = load_corpus("texts")
    assert corpus.text == expected
    assert b"".join(corpus.blocks()) == expected.encode()
    assert corpus.sha256 == hashlib.sha256(expected.encode()).hexdigest()
    assert (corpus.size, corpus.length) == (len(expected.encode()), len(expected))
    assert corpus.characters == "".join(sorted(set(expected)))
    assert Corpus.of("texts", expected).sha256 == corpus.sha256


@pytest.mark.parametrize("block", [1, 3, 16, 100, 2**20])
def test_lines_come_whole(block, monkeypatch, poem):
    monkeypatch.setattr(corpora, "BLOCK", block)
    lines = list(Corpus.of("poem", TEXT).lines())
    assert "".join(lines) == TEXT
    if block > max(map(len, LINES)):
        assert all(line.endswith("\n") for line in lines)


def test_a_line_longer_than_a_block_is_cut_at_a_space(monkeypatch):
    monkeypatch.setattr(corpora, "BLOCK", 16)
    long = "word " * 40
    lines = list(Corpus.of("long", long).lines())
    assert "".join(lines) == long
    assert len(lines) > 5
    assert all(line.startswith(" word") for line in lines[1:])
    assert "".join(Corpus.of("long", "x" * 100).lines()) == "x" * 100


@pytest.mark.parametrize("block", [3, 4, 5, 2**20])
@pytest.mark.parametrize(
    ("content", "byte", "value"),
    [
        (b"caf\xe9", 3, "e9"),
        (b"\xef\xbb\xbfcaf\xe9!", 6, "e9"),
        ("春江".encode() + b"\xff", 6, "ff"),
        ("春江".encode()[:-1], 3, "e6"),  # a character that the end of the file cuts
        ("春".encode() + "江".encode()[:2] + b"abc", 3, "e6"),
    ],
)
def test_what_is_not_utf8_is_named_with_its_byte(block, content, byte, value, monkeypatch):
    monkeypatch.setattr(corpora, "BLOCK", block)
    Path("bad.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        load_corpus("bad.txt")
    assert f"bad.txt is not UTF-8 (byte {byte} is 0x{value}); convert it, " in str(error.value)
    assert "iconv -f ENCODING -t utf-8 bad.txt > NEW; or read bytes: --tokenizer byte" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("é".encode("latin1"), "convert it, with its own encoding (for instance latin1 or gb18030"),
        ("a江".encode("utf-16"), "its own encoding: iconv -f utf-16 -t utf-8 'in a/b' > NEW; or"),
        (b"\x89PNG\r\n", "it is no text but a PNG picture: leave it out; or read bytes"),
        (b"\xff\xd8\xff\xe0", "it is no text but a JPEG picture: leave it out"),
        (b"%PDF-1.7\n\xe2\xe3", "it is no text but a PDF document: leave it out"),
        (b"PK\x03\x04\xff", "it is no text but a zip archive, as .docx and .epub are: leave"),
        (b"\x80\0\0\0", "it is no text but a binary file (it has NUL bytes): leave it out"),
    ],
)
def test_what_is_no_text_is_told_from_text_in_another_encoding(content, said):
    """The advice names no encoding that may be wrong; the command has the whole path."""
    Path("in a").mkdir()
    Path("in a/b").write_bytes(content)
    with pytest.raises(ValueError, match=r"^in a/b is not UTF-8 \(byte \d is 0x\w\w\); ") as error:
        load_corpus("in a/b")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"z.png": b"\x89PNG"},
            "z.png .* a PNG picture: name the texts: --data 'd/\\*\\*/\\*.md'; or",
        ),
        ({"z.md": b"\x89PNG"}, "z.md .* a PNG picture: leave it out"),
        ({"z.txt": b"caf\xe9"}, "z.txt .* > NEW; or name the texts: --data 'd/\\*\\*/\\*.md'; or"),
        # The endings of other files that are no texts do not count.
        (
            dict.fromkeys(("1.png", "x.gif", "y.gif", "z.gif"), b"GIF8\xff"),
            r"1.png .* --data 'd/.*\.md'",
        ),
    ],
)
def test_one_file_that_is_no_text_in_a_folder_of_texts(files, said):
    """The message names the file, and a glob that leaves it out and finds the texts."""
    Path("d/e").mkdir(parents=True)
    Path("d/a.md").write_text(TEXT, encoding="utf-8")
    Path("d/e/b.md").write_text(TEXT, encoding="utf-8")
    for name, content in files.items():
        Path("d", name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        load_corpus("d")
    if "z.md" not in files:
        assert load_corpus("d/**/*.md").text == f"{TEXT}\n{TEXT}"


def test_a_character_cut_by_the_end_of_one_file_is_not_joined_with_the_next(tmp_path):
    first, second = "春".encode()[:1], "春".encode()[1:]
    (tmp_path / "a.txt").write_bytes(first)
    (tmp_path / "b.txt").write_bytes(second)
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 \(byte 0 is 0xe6\)"):
        load_corpus("*.txt")


def test_any_file_is_bytes(settled):
    content = np.random.default_rng(0).integers(0, 256, 5000, np.uint8)
    Path("noise.bin").write_bytes(b"\xff" + content.tobytes())
    for _ in range(2):  # read, and from the record
        data = load_text("noise.bin", 16, "byte")
        assert np.array_equal(data.tokens[1:], content)
        assert data.describe()["characters_per_token"] is None
        assert data.bytes_per_token == 1.0
        with pytest.raises(ValueError, match="is not UTF-8"):
            load_text("noise.bin", 16)
    with pytest.raises(ValueError, match=r"'noise\.bin' is not UTF-8; read it as"):
        TextData(load_corpus("noise.bin", binary=True), 16)


@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe:270"])
def test_empty_and_short_texts_are_refused_by_every_tokenizer(tokenizer):
    Path("empty.txt").write_bytes(b" \n")
    with pytest.raises(ValueError, match=r"the text 'empty.txt' is empty"):
        load_text("empty.txt", 8, tokenizer)
    Path("short.txt").write_text("春江 " * 3, encoding="utf-8")
    told = {"byte": "21 bytes", "char": "9 characters", "bpe:270": r"gives 26\d pieces, not 270"}
    with pytest.raises(ValueError, match=told[tokenizer]):
        load_text("short.txt", 8, tokenizer)


def test_memory_does_not_grow_with_the_text(monkeypatch, tmp_path):
    """The map of 24 MB is written with less than 12 MB, 6 of which are tables."""
    size = 24_000_000
    with open("large.txt", "wb") as file:
        for _ in range(100):
            file.write((TEXT * 40).encode()[: size // 100 - 4].decode("utf-8", "ignore").encode())
    monkeypatch.setattr(corpora, "BLOCK", 2**16)
    load_text("pydoc", 64)  # what is imported once
    tracemalloc.start()
    data = load_text("large.txt", 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert data.size > 0.9 * size
    assert peak < 12e6


def test_progress_counts_the_bytes_of_every_pass(poem, monkeypatch, settled):
    monkeypatch.setattr(corpora, "BLOCK", 1000)
    size, seen = len(TEXT.encode()), []
    load_text(str(poem), 16, progress=lambda done, total: seen.append((done, total)))
    assert {total for _, total in seen} == {size}
    starts = [i for i, (done, _) in enumerate(seen) if not i or done < seen[i - 1][0]]
    assert len(starts) == 2
    assert seen[starts[1] - 1] == seen[-1] == (size, size)
    seen.clear()
    load_text(str(poem), 16, progress=lambda done, total: seen.append((done, total)))
    assert seen == [], "nothing is read a second time"


# Records of what reading told


def test_a_text_that_did_not_change_is_not_read_again(poem, monkeypatch, settled):
    first = load_text(str(poem), 16)
    monkeypatch.setattr(corpora, "_scan", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr(text, "_write_map", lambda *_: pytest.fail("encoded again"))
    again = load_text(str(poem), 16)
    assert again.describe() == first.describe()


def test_a_change_that_keeps_size_and_date_is_seen(poem, settled):
    before, times = load_text(str(poem), 16), poem.stat()
    poem.write_text(TEXT.replace("line", "LINE"), encoding="utf-8")
    os.utime(poem, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert poem.stat().st_mtime_ns == times.st_mtime_ns
    after = load_text(str(poem), 16)
    assert after.sha256 == hashlib.sha256(poem.read_bytes()).hexdigest() != before.sha256
    assert "L" in after.tokenizer.characters


def test_a_file_written_just_now_leaves_no_record(poem):
    load_text(str(poem), 16)
    assert not (cache_folder() / "sources").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"sha256": 1}', "\x00"])
def test_a_spoilt_record_is_written_anew(poem, settled, content):
    right = load_text(str(poem), 16).sha256
    (record,) = (cache_folder() / "sources").iterdir()
    kept = record.read_text()
    record.write_text(content)
    assert load_text(str(poem), 16).sha256 == right
    assert record.read_text() == kept


def test_a_file_that_changes_while_it_is_read_is_refused(poem, monkeypatch):
    corpus = load_corpus(str(poem))
    poem.write_text(TEXT + "more", encoding="utf-8")
    with pytest.raises(ValueError, match="changed while they were read; try again"):
        TextData(corpus, 16)
    assert left("tokens") == []


# The map


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe:280"])
@pytest.mark.parametrize("block", [100, 2**20])
def test_the_map_is_the_whole_text_encoded(tokenizer, block, poem, monkeypatch):
    monkeypatch.setattr(corpora, "BLOCK", block)
    data = load_text(str(poem), 16, tokenizer)
    assert np.asarray(data.tokens).tolist() == data.tokenizer.encode(TEXT)
    assert data.shape == {"vocab_size": len(data.tokenizer), "context": 16}
    facts = data.describe()
    assert facts["tokenizer"] == tokenizer
    held = [i for a, b in data.validation_spans for i in data.tokens[a:b].tolist()]
    said = b"".join(data.tokenizer.pieces[i] for i in held)
    assert facts["bytes_per_token"] == pytest.approx(len(said) / len(held))
    characters = sum(byte >> 6 != 2 for byte in said)
    assert facts["characters_per_token"] == pytest.approx(characters / len(held))
    nats = data.unigram * len(held)
    assert facts["unigram_bits_per_byte"] == pytest.approx(nats / np.log(2) / len(said))


@pytest.mark.parametrize("context", [1, 8, 16, 100, 1100])
@pytest.mark.parametrize("total", [4410, 9000, 60_000, 130_001])
def test_spans_equal_a_naive_split(context, total):
    data = TextData(Corpus.of("x", "ab" * (total // 2) + "c" * (total % 2)), context)
    chunk = max(2 * (context + 1), min(2048, total // 50))
    chunks = [[begin, begin + chunk] for begin in range(0, total - chunk + 1, chunk)]
    chunks[-1][1] = total
    every = min(10, len(chunks))
    held = [c for i, c in enumerate(chunks) if i % every == every // 2]
    assert data.validation_spans.tolist() == held
    covered = np.zeros(total, bool)
    for begin, end in data.training_spans:
        assert not covered[begin:end].any()
        covered[begin:end] = True
        assert begin < end
        assert begin == 0 or [begin] == [e for _, e in held if e == begin]
    for begin, end in held:
        assert not covered[begin:end].any()
        covered[begin:end] = True
    assert covered.all()


KILLED = """
import os, signal
from addnorm.data import corpora, text
from addnorm.data.tokenizers import CharTokenizer
corpora.BLOCK, done, encode = 1000, [], CharTokenizer.encode_array
def dying(self, part):
    done.append(part)
    if len(done) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(self, part)
CharTokenizer.encode_array = dying
text.load_text("poem.txt", 16)
"""


def test_a_kill_leaves_no_half_map(poem):
    killed = subprocess.run([sys.executable, "-c", KILLED])
    assert killed.returncode == -signal.SIGKILL
    (partial,) = left("tokens")
    assert partial.endswith(".npy.partial")
    with open(cache_folder() / "tokens" / partial, "ab") as file:
        file.write(bytes(10**6))  # as if it had come further
    data = load_text(str(poem), 16)
    assert data.tokenizer.decode(np.asarray(data.tokens).tolist()) == TEXT
    assert not any(name.endswith(".partial") for name in left("tokens"))
    assert Path(data.tokens.filename).stat().st_size == data.tokens.offset + data.tokens.nbytes


def test_an_error_leaves_nothing(poem, monkeypatch):
    monkeypatch.setattr(text.CharTokenizer, "encode_array", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load_text(str(poem), 16)
    assert left("tokens") == []


def test_processes_that_start_together_write_one_map(poem):
    code = "import sys; from addnorm.data.text import load_text as l; sys.stdin.read(1)\n"
    code += "d = l('poem.txt', 16); print(d.tokenizer.decode(d.tokens.tolist()), end='')"
    processes = [
        subprocess.Popen(
            [sys.executable, "-X", "utf8", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for _ in range(4)
    ]
    for process in processes:
        process.stdin.write(b"x")
        process.stdin.flush()
    for process in processes:
        assert process.communicate()[0].decode() == TEXT
        assert process.returncode == 0
    assert len(left("tokens")) == 2


@pytest.mark.parametrize("tokenizer", ["char", "bpe:280"])
@pytest.mark.parametrize("spoil", ["cut", "empty", "zeros", "counts", "mixed", "no counts"])
def test_a_spoilt_map_is_written_anew(poem, tokenizer, spoil):
    data = load_text(str(poem), 16, tokenizer)
    path, right = Path(data.tokens.filename), np.array(data.tokens)
    del data
    counts = path.with_suffix(".counts.npy")
    if spoil == "cut":
        os.truncate(path, path.stat().st_size - 10)
    elif spoil == "empty":
        path.write_bytes(b"")
    elif spoil == "zeros":
        np.save(path, np.zeros(len(right) - 1, right.dtype))
    elif spoil == "counts":
        np.save(counts, np.zeros(5, np.int64))
    elif spoil == "mixed":
        np.save(counts, np.roll(np.load(counts), 1))
    else:
        counts.unlink()
    assert np.array_equal(load_text(str(poem), 16, tokenizer).tokens, right)


def test_without_a_cache_folder_the_map_is_temporary(poem, monkeypatch, tmp_path):
    right = np.array(load_text(str(poem), 16).tokens)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(text.tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    data = load_text(str(poem), 16)
    assert np.array_equal(data.tokens, right)
    assert data.training_batch(0, 0, 2)[0].shape == (2, 16)
    assert list((tmp_path / "scratch").iterdir()) == []


# The tokenizer of a run


@pytest.mark.parametrize("name", ["char", "byte", "bpe:280"])
def test_the_tokenizer_of_a_run_reads_the_text_as_it_did(name, poem, tmp_path):
    data = load_text(str(poem), 16, name)
    write_json(tmp_path / "tokenizer.json", data.tokenizer.to_dict())
    kept = load_tokenizer(tmp_path / "tokenizer.json")
    again = load_text(str(poem), 16, kept)
    assert again.tokenizer is kept
    assert again.tokens.filename == data.tokens.filename
    assert again.describe() == data.describe()


@pytest.mark.parametrize("name", ["char", "byte", "bpe:280"])
def test_a_run_goes_on_with_its_own_tokenizer(name, poem, tmp_path):
    """What the cache holds, or another version of the library would learn, does not matter."""
    data = load_text(str(poem), 16, name)
    config = GPTConfig(depth=1, dim=8, heads=2, context=16, vocab_size=data.vocab_size)
    steps = TrainConfig(steps=2, warmup=0, batch=2, eval_batches=1)
    run = train(GPT(config), data, steps, out=tmp_path / "run", choice=Choice(threads=1))
    text_after = sample(run, "春江", tokens=30)
    other = load_text("pydoc", 16, "bpe:280").tokenizer
    for path in (cache_folder() / "tokens").glob("*.json"):
        write_json(path, other.to_dict())
    again = load_run(tmp_path / "run")
    assert again.data.tokenizer.to_dict() == data.tokenizer.to_dict()
    assert sample(again, "春江", tokens=30) == text_after
    poem.write_text(TEXT + "€", encoding="utf-8")
    with pytest.raises(ValueError, match=r"are not those of this run"):
        load_run(tmp_path / "run")


def test_byte_pairs_of_another_text_have_a_map_of_their_own(poem):
    own = load_text(str(poem), 16, "bpe:280")
    other = load_text("pydoc", 16, "bpe:280").tokenizer
    data = load_text(str(poem), 16, other)
    assert data.tokenizer.decode(np.asarray(data.tokens).tolist()) == TEXT
    assert data.tokens.filename != own.tokens.filename


def test_a_spoilt_tokenizer_is_learned_again_or_refused(poem, tmp_path):
    right = load_text(str(poem), 16, "bpe:280").tokenizer.to_dict()
    (path,) = (cache_folder() / "tokens").glob("*.bpe-280.json")
    path.write_text("{}")
    assert load_text(str(poem), 16, "bpe:280").tokenizer.to_dict() == right
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^tokenizer.json cannot be read: [^\n]+$"):
        load_tokenizer("tokenizer.json")


def test_byte_pairs_of_a_long_text_are_learned_from_a_part(poem, monkeypatch):
    monkeypatch.setattr(corpora, "BLOCK", 1000)
    monkeypatch.setattr(text, "SAMPLE", 3000)
    learned, trained = [], text.BpeTokenizer.trained
    monkeypatch.setattr(
        text.BpeTokenizer,
        "trained",
        lambda texts, *rest: trained((learned.append(t) or t for t in texts), *rest),
    )
    data = load_text(str(poem), 16, "bpe:270")
    size = len("".join(learned).encode())
    assert 1500 < size < 4500
    starts = [TEXT.index(part) / len(TEXT) for part in learned]
    assert len(starts) >= 3
    assert max(starts) > 0.6, "from all over the text"
    assert data.tokenizer.decode(np.asarray(data.tokens).tolist()) == TEXT


# Built-in corpora


def test_stdlib_is_the_library_itself(monkeypatch, tmp_path):
    home = tmp_path / "python3"
    for name, content in {
        "b.py": b"b = 2\n",
        "a.py": b"a = '\xc3\xa9'\n",
        "test/test_a.py": b"assert a\n",
        "test/latin.py": b"# -*- coding: latin-1 -*-\n# \xe9\n",
        "notes.txt": b"no source",
        "site-packages/other.py": b"other",
        "dist-packages/other.py": b"other",
        "__pycache__/a.py": b"other",
        ".hidden.py": b"other",
    }.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(content)
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(home))
    corpus = load_corpus("stdlib")
    assert corpus.text == "a = 'é'\n\nb = 2\n\nassert a\n"
    assert corpus.left_out == 1
    (tmp_path / "bare").mkdir()
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path / "bare"))
    with pytest.raises(ValueError, match="has no source files of its standard library in "):
        load_corpus("stdlib")


def test_stdlib_of_this_python():
    corpus = load_corpus("stdlib")
    assert 8e6 < corpus.size < 60e6
    assert all(part.suffix == ".py" for part in corpus.parts)
    assert {"argparse.py", "ast.py"} <= {part.name for part in corpus.parts}


POEMS = {
    "package/dist/songci/ci.song.10000.json": [("third", "C", ["gamma。"])],
    "package/dist/songci/ci.song.2000.json": [("second", "B", ["beta，", "beta。"])],
    "package/dist/songci/ci.song.0.json": [("first", "A", ["alpha。"] * 60)],
    "package/dist/songci/ci.song.2019y.json": [("fourth", "D", ["delta。"])],
    "package/dist/wudaishici/nantang/poetrys.json": [("相见欢", "李煜", ["林花谢了春红。"])],
}
SONGCI = (
    "first A\n" + "alpha。\n" * 60 + "\nsecond B\nbeta，\nbeta。\n\nthird C\ngamma。\n\n"
    "fourth D\ndelta。\n\n相见欢 李煜\n林花谢了春红。\n\n"
)
NPM = """#!/bin/sh
echo "$@" >> {folder}/calls
[ "$1" = pack ] && cp {archive} chinese-poetry-2.0.1.tgz
"""


def member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small package in the layout of the real one, and an npm that fetches it."""
    archive = tmp_path / "package.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, poems in POEMS.items():
            rows = [{"rhythmic": r, "author": a, "paragraphs": p} for r, a, p in poems]
            member(tar, name, json.dumps(rows).encode())
        member(tar, "package/LICENSE", b"The MIT License (MIT)")
        member(tar, "package/dist/songci/author.song.json", b"not poems")
        member(tar, "../../escape.json", b"outside")
        link = tarfile.TarInfo("package/dist/songci/ci.song.7.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    npm(tmp_path, monkeypatch, NPM.format(folder=tmp_path, archive=archive))
    trust(monkeypatch, archive)
    return archive


def npm(folder: Path, monkeypatch, script: str) -> None:
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "npm").write_text(script)
    (folder / "bin" / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")


def trust(monkeypatch, archive: Path) -> None:
    digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    right = corpora.Package("chinese-poetry", "2.0.1", f"sha512-{digest}")
    monkeypatch.setattr(corpora, "POETRY", right)


def test_songci_is_built_once_from_the_package(package, tmp_path, monkeypatch):
    monkeypatch.setattr(tarfile.TarFile, "extractall", lambda *_: pytest.fail("unpacked"))
    seen = []
    corpus = load_corpus("songci", progress=lambda done, total: seen.append((done, total)))
    assert corpus.text == SONGCI
    assert seen
    assert left("corpora") == ["songci-LICENSE.txt", "songci.txt"]
    assert "MIT" in (cache_folder() / "corpora" / "songci-LICENSE.txt").read_text()
    assert load_corpus("songci").sha256 == hashlib.sha256(SONGCI.encode()).hexdigest()
    assert (tmp_path / "calls").read_text() == (
        "pack chinese-poetry@2.0.1 --ignore-scripts --fetch-retries=1 --loglevel=error\n"
    )
    assert load_text("songci", 8).location == "songci"


def test_songci_is_built_from_an_archive_put_there_by_hand(package, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"^songci is built .* no npm here; [^\n]+$") as error:
        load_corpus("songci")
    url, place = "https://registry.npmjs.org/chinese-poetry/-/chinese-poetry-2.0.1.tgz", " to "
    assert f"download {url}{place}" in str(error.value)
    assert "or give a text of your own: --data FILE" in str(error.value)
    target = Path(str(error.value).split(place)[1].split(", or")[0])
    target.write_bytes(package.read_bytes())
    assert load_corpus("songci").text == SONGCI


def test_another_archive_is_refused(package, monkeypatch):
    monkeypatch.setattr(corpora, "POETRY", corpora.Package("chinese-poetry", "2.0.1", "sha512-A"))
    with pytest.raises(ValueError, match=r"is not chinese-poetry 2.0.1: its checksum is sha512-"):
        load_corpus("songci")
    assert left("corpora") == []


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'npm error code ENOTFOUND' >&2; exit 1", r" \(npm error code ENOTFOUND\);"),
        ("echo 'npm ERR! offline' >&2; exit 1", r" \(npm ERR! offline\);"),
        ("exit 3", r" 2\.0\.1; try again with a network, download "),
        ("exit 0", r" 2\.0\.1; try again with a network, download "),
    ],
)
def test_an_npm_that_fails_says_why_in_one_line(script, said, tmp_path, monkeypatch):
    npm(tmp_path, monkeypatch, f"#!/bin/sh\n{script}\n")
    with pytest.raises(ValueError, match=r"^npm could not fetch [^\n]+$") as error:
        load_corpus("songci")
    assert error.match(said)
    assert left("corpora") == []


def test_nothing_else_runs_npm(package, tmp_path, capsys):
    assert main(["data", "list"]) == 0
    load_text("pydoc", 8)
    assert not (tmp_path / "calls").exists()
    assert "addnorm data get songci" in capsys.readouterr().out


# The command line


def test_data_list_and_get(package, poem, capsys):
    assert main(["data", "list", "--json", "-"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {"pydoc", "stdlib", "songci", "digits"} <= set(listed)
    assert listed["songci"]["ready"] is False
    assert main(["data", "get", "songci", "--tokenizer", "byte", "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["bytes"] == len(SONGCI.encode())
    assert captured.err == "npm fetches the package chinese-poetry 2.0.1 (MIT, 85 MB)\n"
    assert main(["data", "list"]) == 0
    assert str(cache_folder() / "corpora" / "songci.txt") in capsys.readouterr().out
    assert main(["data", "get", str(poem), "--out", "copy.txt"]) == 0
    assert Path("copy.txt").read_bytes() == poem.read_bytes()
    assert main(["data", "get", "digits", "--json", "-"]) == 0
    capsys.readouterr()
    for argv, message in [
        (["digits", "--out", "x"], "--out writes text, and digits is a set of images"),
        (["poem.txt", "--tokenizer", "bpx"], "unknown tokenizer 'bpx'; did you mean "),
    ]:
        assert main(["data", "get", *argv]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(corpora.BUILT_IN))
def test_built_in_corpora_are_found_again_by_name(name, package):
    assert load_text(name, 8).location == name
