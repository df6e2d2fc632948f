"""What to say of a file that is not UTF-8: what it seems to be, and what would help."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

HEAD = 2**13  # bytes that tell what a file is
MAGIC = {
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"GIF8": "a GIF picture",
    b"RIFF": "a RIFF file, such as WebP or WAV",
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a zip archive, as .docx and .epub are",
    b"\x1f\x8b": "a gzip archive",
}
MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}  # byte order marks


def not_utf8(path: Path, place: int, value: int, source: str, parts: Sequence[object]) -> str:
    """Return the message for the file `path` of `source`, whose byte `place` is `value`.

    `parts`: all that `source` stands for. Of a folder with other texts in it, how to name those.
    """
    head = _head(path)
    found = f"{path} is not UTF-8 (byte {place} is 0x{value:02x})"
    texts = _texts(path, source, parts)
    if what := _no_text(head):
        advice = f"it is no text but {what}: {texts or 'leave it out'}"
    else:
        known = MARKS.get(head[:2])
        encoding, like = (known, "") if known else ("ENCODING", " (for instance latin1 or gb18030)")
        command = f"iconv -f {encoding} -t utf-8 {shlex.quote(str(path))} > NEW"
        advice = f"convert it, with its own encoding{like}: {command}"
        advice += f"; or {texts}" if texts else ""
    return f"{found}; {advice}; or read bytes: --tokenizer byte"


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(HEAD)


def _no_text(head: bytes) -> str:
    """Say what a file is that begins like this, or nothing where it may be text."""
    known = (what for magic, what in MAGIC.items() if head.startswith(magic))
    if head[:2] in MARKS:
        return ""
    return next(known, "a binary file (it has NUL bytes)" if b"\0" in head else "")


def _texts(path: Path, source: str, parts: Sequence[object]) -> str:
    """Return how to name the texts of a folder without `path`, by the ending most of them have."""
    if not Path(source).expanduser().is_dir():
        return ""
    others = [p for p in parts if isinstance(p, Path) and p.suffix not in ("", path.suffix)]
    endings = Counter(p.suffix for p in others if not _no_text(_head(p)))
    if not endings:
        return ""
    pattern = Path(source) / "**" / f"*{endings.most_common(1)[0][0]}"
    return f"name the texts: --data {shlex.quote(str(pattern))}"
