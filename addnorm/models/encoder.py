"""Encoder: a Transformer that looks both ways, over any wiring of the catalogue.

Shapes: B batch, T positions, V vocabulary, D width, C width of the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addnorm.branches import Context
from addnorm.contract import parse_spec
from addnorm.groups import parameter_groups
from addnorm.models.layers import (
    ATTENTION_PATHS,
    Activation,
    AttentionConfig,
    EmbeddingConfig,
    FeedForwardConfig,
    asked,
    build_stack,
    check_choice,
    check_transformer,
    choose_attention,
    hidden_width,
    start_ends,
)
from addnorm.norms import NORMS, NormName

Pool = Literal["none", "mean", "first"]
FinalNorm = Literal["auto", "yes", "no"]


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of an encoder and the wiring of its stack."""

    depth: int = 4
    """layers, each an attention and a feed-forward connection"""
    dim: int = 128
    """width of the stream, D"""
    heads: int = 4
    """attention heads; must divide dim"""
    context: int = 64
    """positions that a learned position embedding knows; others have no limit"""
    wiring: str = "prenorm"
    """how the branches join the stream; `postnorm` is the original Transformer's"""
    norm: NormName = "layernorm"
    """the norm wherever the wiring or a branch has one"""
    final_norm: FinalNorm = "auto"
    """whether a norm follows the stack; auto: where the wiring needs one"""
    dropout: float = 0.0
    """dropout on the output of every branch, never on the stream"""
    drop_path: float = 0.0
    """stochastic depth in the last layer, rising linearly from 0 in the first"""
    start: str = ""
    """a named start of the branches in place of the one the wiring asks for"""
    vocab_size: int = 0
    """tokens in the vocabulary; 0: the inputs are vectors of width dim"""
    out_dim: int = 0
    """width of a linear head, for instance the number of classes; 0: no head"""
    pool: Pool = "none"
    """none: one output for each position; mean or first: one for the whole"""
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    """what stands in front of the stack"""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """what stands inside the attention"""
    feedforward: FeedForwardConfig = field(default_factory=FeedForwardConfig)
    """what stands inside the feed-forward"""

    def __post_init__(self) -> None:
        check_transformer(self)
        for name in ("vocab_size", "out_dim"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 0")
        check_choice("pool", self.pool, Pool)
        check_choice("final_norm", self.final_norm, FinalNorm)


class Encoder(nn.Module):
    """Tokens `(B, T)` or vectors `(B, T, D)` to `(B, T, D)`, to `(B, T, C)` with a head.

    Vaswani et al. 2017, section 3: token embedding (where there is a vocabulary), positions as in
    a GPT (learned, rotary or none; learned ones are added to vectors too), a stack of 2 depth
    connections, self-attention and feed-forward in turn, a final norm where the wiring needs one,
    and, where `out_dim` says so, a linear head with bias. `pool` takes the mean over the kept
    positions, or the first, in front of the head: then the output is `(B, D)` or `(B, C)`. An
    option that the wiring asks of its branches is on. Raises `ValueError` for a configuration that
    does not fit.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        D, learned = config.dim, config.embedding.positions == "learned"
        self.token = nn.Embedding(config.vocab_size, D) if config.vocab_size else None
        self.position = nn.Embedding(config.context, D) if learned else None
        self.dropout = nn.Dropout(config.embedding.embedding_dropout)
        self.stack = build_stack(config, causal=False)
        normed = {"yes": True, "no": False}.get(config.final_norm, self.stack.final_norm)
        self.norm = NORMS[config.norm](D) if normed else nn.Identity()
        self.head = nn.Linear(D, config.out_dim) if config.out_dim else None
        self.reset_parameters()

    def forward(
        self, inputs: Tensor, *, keep: Tensor | None = None, look: Tensor | None = None
    ) -> Tensor:
        """Return the output `(B, T, D)`, without the T where pooled, C for D with a head.

        `keep (B, T)` is True at a position and False at padding, which no one looks at; what
        stands in the output at padding means nothing. `look (T, T)` or `(B, T, T)` is True where
        the query (first T) may look at the key. Both are the negation of torch's
        `src_key_padding_mask` and `mask`. A query that may look nowhere gets 0 from the attention.

        Raises `ValueError` for inputs or masks of another shape or type, and for more positions
        than a learned embedding has.
        """
        x = self._embedded(inputs)  # (B, T, D)
        x = self.norm(self.stack(self.dropout(x), Context(_mask(x, keep, look))))
        if self.config.pool == "first":
            x = x[:, 0]  # (B, D)
        elif self.config.pool == "mean" and keep is None:
            x = x.mean(dim=1)
        elif self.config.pool == "mean":
            assert keep is not None
            counted = keep.sum(dim=1, keepdim=True).clamp(min=1)
            x = x.masked_fill(~keep[..., None], 0.0).sum(dim=1) / counted
        out: Tensor = x if self.head is None else self.head(x)
        return out

    def _embedded(self, inputs: Tensor) -> Tensor:
        """Return the vectors of the inputs with their positions, `(B, T, D)`."""
        D, shape = self.config.dim, tuple(inputs.shape)
        if inputs.is_floating_point():
            if len(shape) != 3 or shape[2] != D:
                raise ValueError(f"vectors of shape {shape}, but the encoder reads (B, T, {D})")
            x = inputs
        elif self.token is None:
            raise ValueError(f"the encoder has no vocabulary; it reads vectors (B, T, {D})")
        elif len(shape) != 2:
            raise ValueError(f"tokens of shape {shape}, but the encoder reads (B, T)")
        else:
            x = self.token(inputs)
        if self.position is None:
            return x
        if shape[1] > self.config.context:
            raise ValueError(
                f"{shape[1]} positions, but the encoder was built for {self.config.context}"
            )
        return x + self.position.weight[: shape[1]]

    def reset_parameters(self) -> None:
        """Start all parameters, as a GPT does (`start_ends`, the wiring's start, norms at 1)."""
        start_ends(self.config.embedding.embedding_start, self.token, self.position, self.head)
        self.stack.reset_parameters()
        if not isinstance(self.norm, nn.Identity):
            self.norm.reset_parameters()

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


def _mask(x: Tensor, keep: Tensor | None, look: Tensor | None) -> Tensor | None:
    """Return where a query may look, broadcastable to `(B, heads, T, T)`, or None for anywhere."""
    B, T, _ = x.shape
    for name, mask, allowed in (
        ("keep", keep, [(B, T)]),
        ("look", look, [(T, T), (B, T, T)]),
    ):
        if mask is None:
            continue
        if mask.dtype != torch.bool:
            raise ValueError(f"{name} must be boolean, True where one may look, not {mask.dtype}")
        if tuple(mask.shape) not in allowed:
            raise ValueError(
                f"{name} has shape {tuple(mask.shape)}, not {' or '.join(map(str, allowed))}"
            )
    wide = None if look is None else look.unsqueeze(-3)  # (1, T, T) or (B, 1, T, T)
    if keep is None:
        return wide
    keys = keep[:, None, None, :]  # (B, 1, 1, T)
    return keys if wide is None else keys & wide


# -- the layers of torch.nn --------------------------------------------------------------------

Layers = nn.TransformerEncoder | Sequence[nn.TransformerEncoderLayer]


def from_torch_layers(layers: Layers) -> Encoder:
    """Return an encoder of vectors that equals layers of `torch.nn`, with their weights.

    It has no positions of its own, and no head; a final norm where the `nn.TransformerEncoder` has
    one, none for a list. The outputs are equal in eval mode, or without dropout; in training its
    dropout falls where theirs does, but draws other numbers. Mode, device and dtype are theirs.
    Raises `ValueError` for layers that read `(T, B, D)`, and as `load_torch_layers`.
    """
    rows, norm = _rows(layers)
    facts, first = _facts(rows[0]), rows[0]
    if unknown := [name for name, value in facts.items() if value is None]:
        raise ValueError(f"no option of an encoder is what the layers have: {', '.join(unknown)}")
    if not all(row.self_attn.batch_first for row in rows):
        raise ValueError(
            "the layers read (T, B, D) and an encoder (B, T, D): make them with batch_first=True, "
            "or set self_attn.batch_first of each to True, which changes no weight"
        )
    config = EncoderConfig(
        depth=len(rows),
        dim=facts["dim"],
        heads=facts["heads"],
        wiring=facts["wiring"],
        final_norm="no" if norm is None else "yes",
        dropout=first.dropout1.p,
        embedding=EmbeddingConfig(positions="none"),
        attention=AttentionConfig(
            attention_biases=facts["attention_biases"], attention_dropout=first.self_attn.dropout
        ),
        feedforward=FeedForwardConfig(
            activation=facts["activation"],
            hidden=facts["hidden"],
            feedforward_bias=facts["feedforward_bias"],
            feedforward_dropout=first.dropout.p,
        ),
    )
    weight = first.linear1.weight
    encoder = Encoder(config).to(device=weight.device, dtype=weight.dtype).train(first.training)
    load_torch_layers(encoder, layers)
    return encoder


def load_torch_layers(encoder: Encoder, layers: Layers) -> None:
    """Copy the weights of `nn.TransformerEncoderLayer`s into the encoder's stack.

    `layers`: an `nn.TransformerEncoder`, whose final norm goes along, or layers in a row, which
    leave the encoder's final norm as it is. `norm_first=True` is our `prenorm`, False our
    `postnorm`; `batch_first` changes no weight. A norm without a bias gets one of 0. Embeddings and
    head stay as they are, and so do the dropouts. With dropout off, outputs and gradients are then
    those of the layers, for `keep = ~src_key_padding_mask` and `look = ~mask`.

    Raises one `ValueError` that lists all that does not fit, and then has changed nothing.
    """
    rows, norm = _rows(layers)
    have = _own_facts(encoder.config)
    found: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        for name, value in _facts(row).items():
            if value != have[name]:
                here = "something else" if value is None else value
                found.setdefault(f"{name} {have[name]}, theirs {here}", []).append(index)
    problems = [
        text + ("" if len(where) == len(rows) else f" (layer {', '.join(map(str, where))})")
        for text, where in found.items()
    ]
    if len(rows) != encoder.config.depth:
        problems.append(f"depth {encoder.config.depth}, theirs {len(rows)}")
    ours = not isinstance(encoder.norm, nn.Identity)
    if isinstance(layers, nn.TransformerEncoder) and ours != (norm is not None):
        problems.append(f"final norm {_yes(ours)}, theirs {_yes(norm is not None)}")
    if norm is not None and _eps(norm) != 1e-5:
        problems.append(f"eps of the final norm 1e-05, theirs {_eps(norm) or 'something else'}")
    if problems:
        raise ValueError(f"the layers do not fit the encoder: {'; '.join(problems)}")
    pairs = [pair for i, row in enumerate(rows) for pair in _pairs(encoder, i, row).items()]
    if norm is not None:
        pairs += [("norm.weight", norm.weight), ("norm.bias", norm.bias)]
    parameters = dict(encoder.named_parameters())
    wrong = [
        f"{name} {tuple(parameters[name].shape)}, theirs {tuple(value.shape)}"
        for name, value in pairs
        if value is not None and value.shape != parameters[name].shape
    ]
    if wrong:
        raise ValueError(f"the layers do not fit the encoder: {'; '.join(wrong)}")
    with torch.no_grad():
        for name, value in pairs:
            if value is None:
                parameters[name].zero_()
            else:
                parameters[name].copy_(value)


def _rows(layers: Any) -> tuple[list[nn.TransformerEncoderLayer], Any]:
    """Return the layers and the final norm. Raises `ValueError` for modules of another class."""
    whole = isinstance(layers, nn.TransformerEncoder)
    rows: list[Any] = list(layers.layers if whole else layers)
    if not rows:
        raise ValueError("there are no layers to read")
    for index, row in enumerate(rows):
        if type(row) is not nn.TransformerEncoderLayer:  # a subclass may compute something else
            raise ValueError(
                f"layer {index} is of class {type(row).__name__}, not nn.TransformerEncoderLayer"
            )
    return rows, layers.norm if whole else None


def _facts(layer: nn.TransformerEncoderLayer) -> dict[str, Any]:
    """Return what a layer of torch is, in the words of our configs; None for what we lack."""
    attention = layer.self_attn
    return {
        "dim": attention.embed_dim,
        "heads": attention.num_heads,
        "hidden": layer.linear1.out_features,
        "wiring": "prenorm" if layer.norm_first else "postnorm",
        "activation": _activation(layer.activation),
        "attention_biases": "none" if attention.in_proj_bias is None else "all",
        "feedforward_bias": layer.linear1.bias is not None,
        "norm": "layernorm",
        "eps of the norms": _same(_eps(layer.norm1), _eps(layer.norm2)),
        "positions in the attention": "none",
        "options of the branches": "none",
    }


def _own_facts(config: EncoderConfig) -> dict[str, Any]:
    """Return the same of an encoder of ours."""
    attention, feedforward = asked(config)
    plain = (
        AttentionConfig(
            kv_heads=attention.kv_heads if attention.kv_heads == config.heads else 0,
            attention_biases=attention.attention_biases,
            attention_dropout=attention.attention_dropout,
        ),
        FeedForwardConfig(
            activation=feedforward.activation,
            hidden=feedforward.hidden,
            feedforward_bias=feedforward.feedforward_bias,
            feedforward_dropout=feedforward.feedforward_dropout,
        ),
    )
    return {
        "dim": config.dim,
        "heads": config.heads,
        "hidden": hidden_width(config.dim, feedforward),
        "wiring": str(parse_spec(config.wiring)),
        "activation": feedforward.activation,
        "attention_biases": attention.attention_biases,
        "feedforward_bias": feedforward.feedforward_bias,
        "norm": config.norm,
        "eps of the norms": 1e-5,
        "positions in the attention": "rotary"
        if config.embedding.positions == "rotary"
        else "none",
        "options of the branches": "none" if (attention, feedforward) == plain else "some",
    }


def _activation(function: Any) -> Activation | None:
    """Return our name of a layer's activation, or None."""
    if isinstance(function, nn.GELU):
        return "gelu" if function.approximate == "none" else "gelu-tanh"
    known: list[tuple[Activation, tuple[Any, ...], type[nn.Module]]] = [
        ("relu", (F.relu, torch.relu), nn.ReLU),
        ("gelu", (F.gelu,), nn.GELU),
        ("silu", (F.silu,), nn.SiLU),
        ("tanh", (F.tanh, torch.tanh), nn.Tanh),
    ]
    for name, functions, module in known:
        if function in functions or isinstance(function, module):
            return name
    return None


def _eps(norm: Any) -> float | None:
    """Return the epsilon of a layer norm with a gain, or None of another module."""
    return norm.eps if type(norm) is nn.LayerNorm and norm.elementwise_affine else None


def _same(one: float | None, other: float | None) -> float | None:
    return one if one == other else None


def _yes(there: bool) -> str:
    return "yes" if there else "none"


def _pairs(
    encoder: Encoder, index: int, layer: nn.TransformerEncoderLayer
) -> dict[str, Tensor | None]:
    """Return our names of the parameters of layer `index`, and their values; None is zeros."""
    norm = "norm_in" if layer.norm_first else "norm"
    attention, feedforward = (f"stack.connections.{2 * index + part}" for part in (0, 1))
    inside = layer.self_attn
    modules: list[tuple[str, Any, Any]] = [
        (f"{attention}.branch.qkv", inside.in_proj_weight, inside.in_proj_bias),
        (f"{attention}.branch.out", inside.out_proj.weight, inside.out_proj.bias),
        (f"{feedforward}.branch.lift", layer.linear1.weight, layer.linear1.bias),
        (f"{feedforward}.branch.out", layer.linear2.weight, layer.linear2.bias),
        (f"{attention}.{norm}", layer.norm1.weight, layer.norm1.bias),
        (f"{feedforward}.{norm}", layer.norm2.weight, layer.norm2.bias),
    ]
    ours = dict(encoder.named_parameters())
    values: dict[str, Tensor | None] = {}
    for name, weight, bias in modules:
        values[f"{name}.weight"] = weight
        if f"{name}.bias" in ours:
            values[f"{name}.bias"] = bias
    return values
