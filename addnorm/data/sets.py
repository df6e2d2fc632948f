"""One name for any data: text where a network reads tokens, images where it reads images.

No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from addnorm.data.corpora import Progress, load_corpus, silent
from addnorm.data.images import IMAGE_SETS, ImageData, holds_images, load_images
from addnorm.data.text import TextData, load_text
from addnorm.data.tokenizers import Tokenizer

Dataset = TextData | ImageData


@dataclass(frozen=True)
class DataConfig:
    """Which data, and how they are read."""

    data: str = ""
    """pydoc, stdlib, songci, digits, a text file, a folder, or a glob in quotes; by default pydoc
    for networks that read text and digits for those that read images"""
    tokenizer: str = "char"
    """what a text is cut into: char, byte, bpe or bpe:VOCABULARY"""
    augment: Literal["auto", "on", "off"] = "auto"
    """random crops and flips of training images; auto: of photographs, not of digits"""
    size: int = 0
    """height and width that images are resized to; 0: they must all have one size"""
    corrupt: Literal["refuse", "skip"] = "refuse"
    """what to do with a picture that cannot be read"""


def load_data(config: DataConfig, reads: str, context: int, progress: Progress = silent) -> Dataset:
    """Return the text for windows of `context` tokens, or the images where `reads` is `images`.

    `progress` is told of the bytes of a text while they are read and encoded.
    Raises `ValueError` where there is none.
    """
    if reads == "images":
        source = config.data or "digits"
        return load_images(source, augment=config.augment, size=config.size, corrupt=config.corrupt)
    source = config.data or "pydoc"
    if is_images(source, config.tokenizer):
        raise ValueError(
            f"{source} is a set of images; give a network that reads them, --model resnet"
        )
    return load_text(source, context, config.tokenizer, progress)


def is_images(source: str, tokenizer: str) -> bool:
    """Say whether `source` holds images; any files may be read as bytes, so then it is a text."""
    return holds_images(source) and (source in IMAGE_SETS or tokenizer != "byte")


def reload_data(known: Mapping[str, Any], tokenizer: Tokenizer | None = None) -> Dataset:
    """Return the data that `describe()` described, a text in the tokens of a run's `tokenizer`.

    Raises `ValueError` when they have changed.
    """
    if known["unit"] == "images":
        images = load_images(known["source"], **known["options"])
        _check_same(known, images.sha256)
        return images
    corpus = load_corpus(known["source"], binary=known["tokenizer"] == "byte")
    _check_same(known, corpus.sha256)
    return TextData(corpus, known["context"], tokenizer or known["tokenizer"])


def _check_same(known: Mapping[str, Any], sha256: str) -> None:
    if sha256 != known["sha256"]:
        raise ValueError(
            f"the data {known['source']!r} are not those of this run or comparison: their sha256 "
            f"is {sha256[:12]}, recorded is {known['sha256'][:12]}"
        )
