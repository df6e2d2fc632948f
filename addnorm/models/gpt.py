"""GPT: a decoder-only Transformer over any wiring of the catalogue.

Shapes: B batch, T positions, V vocabulary, D width, K = 2 depth connections.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from addnorm.branches import Context
from addnorm.contract import Stack, parameter_groups, unknown
from addnorm.models.layers import (
    ATTENTION_PATHS,
    NORMS,
    Attention,
    AttentionPath,
    FeedForward,
    check_heads,
)


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT and the wiring of its stack."""

    depth: int = 4
    """layers, each an attention and a feed-forward connection"""
    dim: int = 128
    """width of the stream, D"""
    heads: int = 4
    """attention heads; must divide dim"""
    context: int = 64
    """positions that the model sees at once, T"""
    wiring: str = "prenorm"
    """how the branches join the stream: `addnorm wirings` lists them"""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """the norm wherever the wiring has one"""
    dropout: float = 0.0
    """dropout on the output of every branch, never on the stream"""
    tied: bool = False
    """whether the head shares the token embedding's weight"""
    start: str = ""
    """a named start of the branches in place of the one the wiring asks for"""
    vocab_size: int = 0
    """characters in the vocabulary; the trainer fills it in from the data"""

    def __post_init__(self) -> None:
        for name in ("depth", "dim", "heads", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        check_heads(self.heads, self.dim)
        if self.vocab_size < 0:
            raise ValueError(f"vocab_size {self.vocab_size} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} must be at least 0 and less than 1")
        if self.norm not in NORMS:
            raise ValueError(unknown("norm", self.norm, NORMS))


class GPT(nn.Module):
    """Tokens `(B, T)` to logits `(B, T, V)`.

    token + position embedding, a stack of 2 depth connections, a final norm where the wiring needs
    one, a linear head without bias. Radford et al. 2019. Raises `ValueError` for a configuration
    that does not fit.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError(f"vocab_size {config.vocab_size} must be at least 1")
        self.config = config
        D, norm = config.dim, NORMS[config.norm]
        branches: list[nn.Module] = []
        for _ in range(config.depth):
            branches.append(Attention(D, config.heads, dropout=config.dropout))
            branches.append(FeedForward(D, dropout=config.dropout))
        self.token = nn.Embedding(config.vocab_size, D)
        self.position = nn.Embedding(config.context, D)
        self.stack = Stack(branches, config.wiring, dim=D, parts=2, norm=norm, start=config.start)
        self.norm = norm(D) if self.stack.final_norm else nn.Identity()
        self.head = nn.Linear(D, config.vocab_size, bias=False)
        self.reset_parameters()

    def forward(self, tokens: Tensor, context: Context | None = None) -> Tensor:
        """Return logits `(B, T, V)` for `tokens (B, T)`, after `context.past` cached positions.

        Raises `ValueError` for more positions than the model was built with.
        """
        T, past = tokens.shape[1], context.past if context else 0
        if past + T > self.config.context:
            raise ValueError(
                f"{past + T} positions, but the model was built for {self.config.context}"
            )
        positions = torch.arange(past, past + T, device=tokens.device)
        x = self.token(tokens) + self.position(positions)  # (B, T, D)
        logits: Tensor = self.head(self.norm(self.stack(x, context)))
        return logits

    def reset_parameters(self) -> None:
        """Start all parameters; works after the meta device.

        | part | start |
        |---|---|
        | token, position embedding | N(0, 0.1); N(0, 0.02) where the head is tied |
        | matrices of the branches | the start that the wiring asks for, or `config.start` |
        | biases of the branches | 0 |
        | norms | gain 1, bias 0 |
        | head | N(0, 0.02), or the token embedding |
        """
        if self.config.tied:  # here, because leaving the meta device unties them
            self.head.weight = self.token.weight
        embedding = 0.02 if self.config.tied else 0.1  # 0.02 starves the wirings without a norm
        nn.init.normal_(self.token.weight, std=embedding)
        nn.init.normal_(self.position.weight, std=embedding)
        nn.init.normal_(self.head.weight, std=0.02)
        self.stack.reset_parameters()
        if not isinstance(self.norm, nn.Identity):
            self.norm.reset_parameters()

    def parameters_by_part(self) -> dict[str, int]:
        """Return the number of parameters by part; the parts add up to the whole."""

        def count(*modules: nn.Module) -> int:
            return sum(p.numel() for m in modules for p in m.parameters())

        branches = [connection.branch for connection in self.stack]
        parts = {
            "token": count(self.token),
            "position": count(self.position),
            "attention": count(*(b for b in branches if isinstance(b, Attention))),
            "feed-forward": count(*(b for b in branches if isinstance(b, FeedForward))),
            "wiring": count(self.stack) - count(*branches),
            "final norm": count(self.norm),
            "head": 0 if self.config.tied else count(self.head),
        }
        assert sum(parts.values()) == count(self), parts
        return parts

    def flops_per_token(self) -> int:
        """Return training FLOPs per token, 6 N + 12 L T D (N: parameters in matrix products)."""
        c = self.config
        matmul = sum(p.numel() for p in self.stack.parameters() if p.dim() >= 2)
        return 6 * (matmul + c.vocab_size * c.dim) + 12 * c.depth * c.context * c.dim

    def parameter_groups(self, weight_decay: float) -> list[dict[str, object]]:
        """Return the optimiser's groups: matrices decay, the rest follows the wiring's facts."""
        return parameter_groups(self, weight_decay)

    def choices(self) -> dict[str, tuple[str, ...]]:
        """Return what may be computed in several ways, for the trainer to measure."""
        return {"attention": ATTENTION_PATHS}

    def choose(self, name: str, value: str) -> None:
        """Compute `name` by way of `value` from now on. Results agree to rounding."""
        assert name == "attention", name
        path: AttentionPath = "sdpa" if value == "sdpa" else "matmul"
        for module in self.modules():
            if isinstance(module, Attention):
                module.path = path
