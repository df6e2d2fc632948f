"""Generation: draw the next token again and again, from one prompt or many at once.

Shapes: B rows (prompts), T tokens so far, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addnorm.branches import Context
from addnorm.models.gpt import GPT
from addnorm.models.ngpt import NGPT


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits, and how many are."""

    tokens: int = 200
    """tokens to generate"""
    temperature: float = 0.8
    """0 takes the most likely token"""
    top_k: int = 0
    """draw from so many tokens; 0 is all"""
    top_p: float = 1.0
    """draw from the most likely tokens that together have this probability; 1 is all"""
    seed: int = 0
    """seed of the draws; the i-th of several prompts draws with seed + i"""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens {self.tokens} must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature {self.temperature} must be at least 0 and finite")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} must be at least 0 (0: all tokens)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be above 0 and at most 1 (1: all tokens)")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} must be at least 0 and below 2^63")


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    context: int,
    sampling: Sampling | None = None,
) -> Iterator[list[int]]:
    """Yield the next token id of every prompt, B at a time, as they are drawn.

    `model` maps tokens `(B, T)` to logits `(B, T, V)` or to something with `logits`; our GPTs keep
    keys and values in a cache. `context` is the most positions it sees: a longer prompt is
    cut to its end, and when the window is full it restarts from its later half, because learned
    positions cannot be shifted, and the cache is filled again.

    Each row draws by its own generator, the i-th by `seed + i`, and prompts are computed together
    only where they have the same number of tokens: without padding no model needs to be told what
    to overlook, and a convolution or a scheme that reads earlier tokens stays exact. So row i
    is what `prompts[i]` gives alone with `seed + i`, up to the rounding of the logits, which
    matrix products of another number of rows may change in the last digit.

    Raises `ValueError`, before anything is computed, for no prompts, an empty one, ids that are not
    in the vocabulary, and a context below 1 or above the model's; and for logits that are NaN.
    """
    sampling = sampling or Sampling()
    own = model.config.context if isinstance(model, GPT | NGPT) else math.inf
    if not 1 <= context <= own:
        raise ValueError(
            f"context {context} must be from 1 to {own}, which the model was built for"
        )
    if not prompts:
        raise ValueError("there is no prompt; give at least one")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"{_prompt(row, len(prompts))} is empty; give at least one token")
        if isinstance(model, GPT | NGPT):
            V = model.config.vocab_size
            wrong = next((i for i in prompt if not 0 <= i < V), None)
            if wrong is not None:
                where = _prompt(row, len(prompts))
                raise ValueError(f"{where} has the token {wrong}; the model knows 0 to {V - 1}")
    return _steps(model, [list(prompt) for prompt in prompts], context, sampling)


def _prompt(row: int, rows: int) -> str:
    return "the prompt" if rows == 1 else f"prompt {row + 1} of {rows}"


@torch.no_grad()
def _steps(
    model: nn.Module, prompts: list[list[int]], context: int, sampling: Sampling
) -> Iterator[list[int]]:
    windows = _Window.of_equal_length(model, prompts, context)
    generators = [torch.Generator().manual_seed(sampling.seed + row) for row in range(len(prompts))]
    for _ in range(sampling.tokens):
        drawn = [0] * len(prompts)
        for window in windows:
            logits = window.logits()  # (rows of the window, V)
            for row, line in zip(window.rows, logits, strict=True):
                drawn[row] = draw(line, sampling, generators[row])
            window.append([drawn[row] for row in window.rows])
        yield drawn


class _Window:
    """Rows with the same number of tokens, and the cache that they share."""

    def __init__(self, model: nn.Module, rows: list[int], ids: Tensor, context: int) -> None:
        self.model, self.rows, self.ids, self.context = model, rows, ids, context
        self.cached = isinstance(model, GPT | NGPT)
        self.cache: Context | None = None

    @classmethod
    def of_equal_length(
        cls, model: nn.Module, prompts: list[list[int]], context: int
    ) -> list[_Window]:
        """Return windows that hold each prompt, cut to its last `context` tokens, once."""
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        rows: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows.setdefault(min(len(prompt), context), []).append(row)
        return [
            cls(model, own, torch.tensor([prompts[r][-T:] for r in own], device=device), context)
            for T, own in rows.items()
        ]

    def logits(self) -> Tensor:
        """Return the logits `(B, V)` of the next token, in float32 on the CPU."""
        if self.ids.shape[1] > self.context:
            self.ids, self.cache = self.ids[:, -max(1, self.context // 2) :], None
        if not self.cached:
            logits = _logits(self.model(self.ids))
        elif self.cache is None:
            self.cache = Context(cache={})
            logits = self.model(self.ids, self.cache)
        else:
            logits = self.model(self.ids[:, -1:], replace(self.cache, past=self.ids.shape[1] - 1))
        return logits[:, -1].float().cpu()

    def append(self, drawn: list[int]) -> None:
        """Add one token to each row."""
        self.ids = torch.cat((self.ids, self.ids.new_tensor(drawn)[:, None]), dim=1)


def _logits(output: Any) -> Tensor:
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw one id from logits `(V,)` by their `distribution`; temperature 0 draws no number."""
    probabilities = distribution(logits, sampling)
    if sampling.temperature == 0:
        return int(probabilities.argmax())
    return int(torch.multinomial(probabilities.float(), 1, generator=generator))


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the probabilities `(V,)`, float64, that the next token is drawn by.

    In this order: divide by the temperature (0: the largest logit has it all, of equal ones the
    first), keep the `top_k` largest (of equal ones the first), keep the fewest most likely of those
    whose probabilities reach `top_p` of theirs (nucleus sampling, Holtzman et al. 2019,
    arXiv:1904.09751, section 3.1). Raises `ValueError` for logits with NaN or +infinity, or all of
    them -infinity.
    """
    largest = logits.max()
    if not largest.isfinite():
        raise ValueError(f"the largest logit is {largest.item()}: the model has diverged")
    if sampling.temperature == 0:
        return F.one_hot(logits.argmax(), len(logits)).double()
    scaled = (logits.double() - largest) / sampling.temperature  # double: any temperature will do
    probabilities = torch.softmax(scaled, dim=-1)
    if 0 < sampling.top_k < len(logits) or sampling.top_p < 1:
        order = scaled.argsort(descending=True, stable=True)
        kept = probabilities[order][: sampling.top_k or None]
        before = F.pad(kept.cumsum(0)[:-1], (1, 0))  # what the more likely ones have together
        kept = kept.where(before < sampling.top_p * kept.sum(), 0.0)
        kept = kept / kept.sum()
        probabilities = torch.zeros_like(probabilities).scatter_(0, order[: len(kept)], kept)
    return probabilities
