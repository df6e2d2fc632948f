"""GPT: a decoder-only Transformer over any wiring of the catalogue.

Shapes: B batch, T positions, V vocabulary, D width, K = 2 depth connections.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from addnorm.branches import Context
from addnorm.groups import parameter_groups
from addnorm.models.layers import (
    ATTENTION_PATHS,
    Attention,
    AttentionConfig,
    EmbeddingConfig,
    FeedForward,
    FeedForwardConfig,
    asked,
    build_stack,
    check_transformer,
    choose_attention,
    start_ends,
)
from addnorm.norms import NORMS, NormName

__all__ = ["GPT", "GPTConfig", "asked"]


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
    norm: NormName = "layernorm"
    """the norm wherever the wiring or a branch has one"""
    dropout: float = 0.0
    """dropout on the output of every branch, never on the stream"""
    drop_path: float = 0.0
    """stochastic depth in the last layer, rising linearly from 0 in the first"""
    tied: bool = False
    """whether the head shares the token embedding's weight"""
    start: str = ""
    """a named start of the branches in place of the one the wiring asks for"""
    vocab_size: int = 0
    """characters in the vocabulary; the trainer fills it in from the data"""
    parallel: bool = False
    """attention and feed-forward read the same input and make one connection of a layer"""
    head_bias: bool = False
    """whether the head has a bias"""
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    """what stands in front of the stack"""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """what stands inside the attention"""
    feedforward: FeedForwardConfig = field(default_factory=FeedForwardConfig)
    """what stands inside the feed-forward"""

    def __post_init__(self) -> None:
        check_transformer(self)
        if self.vocab_size < 0:
            raise ValueError(f"vocab_size {self.vocab_size} must be at least 1")


class GPT(nn.Module):
    """Tokens `(B, T)` to logits `(B, T, V)`.

    token + position embedding, a stack of 2 depth connections (depth where `parallel`), a final
    norm where the wiring needs one, a linear head. Radford et al. 2019. Without learned positions
    there is no position embedding. An option that the wiring asks of its branches is switched on.
    Raises `ValueError` for a configuration that does not fit.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError(f"vocab_size {config.vocab_size} must be at least 1")
        self.config = config
        D = config.dim
        stack = build_stack(config, causal=True, parallel=config.parallel)
        self.token = nn.Embedding(config.vocab_size, D)
        learned = config.embedding.positions == "learned"
        self.position = nn.Embedding(config.context, D) if learned else None
        self.dropout = nn.Dropout(config.embedding.embedding_dropout)
        self.stack = stack
        self.norm = NORMS[config.norm](D) if stack.final_norm else nn.Identity()
        self.head = nn.Linear(D, config.vocab_size, bias=config.head_bias)
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
        x = self.token(tokens)  # (B, T, D)
        if self.position is not None:
            x = x + self.position(torch.arange(past, past + T, device=tokens.device))
        logits: Tensor = self.head(self.norm(self.stack(self.dropout(x), context)))
        return logits

    def reset_parameters(self) -> None:
        """Start all parameters; works after the meta device.

        | part | start |
        |---|---|
        | token, position embedding | `start_ends`: N(0, 0.1); N(0, 0.02) where the head is tied |
        | matrices of the branches | the start that the wiring asks for, or `config.start` |
        | biases of the branches | 0; with the start `torch` as `nn.Linear` |
        | norms | gain 1, bias 0 |
        | head | `start_ends`: N(0, 0.02), bias 0; or the token embedding |

        `embedding_start` names other starts of embeddings and head.
        """
        if self.config.tied:  # here, because leaving the meta device unties them
            self.head.weight = self.token.weight
        start_ends(self.config.embedding.embedding_start, self.token, self.position, self.head)
        self.stack.reset_parameters()
        if not isinstance(self.norm, nn.Identity):
            self.norm.reset_parameters()

    def parameters_by_part(self) -> dict[str, int]:
        """Return the number of parameters by part; the parts add up to the whole."""

        def count(*modules: nn.Module | None) -> int:
            return sum(p.numel() for m in modules if m is not None for p in m.parameters())

        branches = [m for m in self.stack.modules() if isinstance(m, Attention | FeedForward)]
        parts = {
            "token": count(self.token),
            "position": count(self.position),
            "attention": count(*(b for b in branches if isinstance(b, Attention))),
            "feed-forward": count(*(b for b in branches if isinstance(b, FeedForward))),
            "wiring": count(self.stack) - count(*branches),
            "final norm": count(self.norm),
            "head": count(self.head) - (self.head.weight.numel() if self.config.tied else 0),
        }
        assert sum(parts.values()) == count(self), parts
        return parts

    def flops_per_token(self) -> int:
        """Return training FLOPs per token, 6 N + 12 L T D (N: parameters in matrix products).

        The second term is the products with keys and values, which take as much for fewer of
        their heads.
        """
        c = self.config
        matmul = sum(p.numel() for p in self.stack.parameters() if p.dim() >= 2)
        return 6 * (matmul + c.vocab_size * c.dim) + 12 * c.depth * c.context * c.dim

    def parameter_groups(self, weight_decay: float, every: bool = False) -> list[dict[str, object]]:
        """Return the optimiser's groups: matrices decay, the rest follows the wiring's facts."""
        return parameter_groups(self, weight_decay, every)

    def choices(self) -> dict[str, tuple[str, ...]]:
        """Return what may be computed in several ways, for the trainer to measure."""
        return {"attention": ATTENTION_PATHS}

    def choose(self, name: str, value: str) -> None:
        """Compute `name` by way of `value` from now on. Results agree to rounding."""
        assert name == "attention", name
        choose_attention(self, value)
