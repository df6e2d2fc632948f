"""The plain reference: a GPT and its loop as most people write them, without any tricks.

Eager, float32, `scaled_dot_product_attention`, AdamW as it comes, `torch.stack` of slices,
`loss.item()` at every step. Nothing of addnorm is used here. Shapes: B batch, T positions, V
vocabulary, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


class Block(nn.Module):
    """x <- x + A(N(x)); x <- x + M(N(x))."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = (
            part.view(B, T, self.heads, D // self.heads).transpose(1, 2)  # (B, H, T, D / H)
            for part in self.qkv(self.norm1(x)).split(D, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).contiguous().view(B, T, D))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return x


class ReferenceGPT(nn.Module):
    """Tokens `(B, T)` to logits `(B, T, V)`: learned positions, pre-norm blocks, untied head."""

    def __init__(self, vocab: int, depth: int, heads: int, dim: int, context: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocab, dim), nn.Embedding(context, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def sample_batch(text: Tensor, batch: int, context: int, device: torch.device) -> Batch:
    """Return `batch` random windows of the encoded `text (N,)` and their targets."""
    starts = torch.randint(len(text) - context, (batch,)).tolist()
    inputs = torch.stack([text[i : i + context] for i in starts])
    targets = torch.stack([text[i + 1 : i + 1 + context] for i in starts])
    return inputs.to(device), targets.to(device)


def train(
    model: nn.Module,
    next_batch: Callable[[int], Batch],
    steps: int,
    rate: Callable[[int], float],
    on_step: Callable[[int, float], None] = lambda _step, _loss: None,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.01,
    clip: float = 1.0,
    bfloat16: bool = False,
    compiled: bool = False,
) -> None:
    """Train `model`; `rate` gives the learning rate of a step, `on_step` hears step and loss."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate(0), betas=betas, weight_decay=weight_decay)
    forward = torch.compile(model) if compiled else model
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        inputs, targets = next_batch(step)
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=bfloat16):
            logits = forward(inputs)
            loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        on_step(step + 1, loss.item())
