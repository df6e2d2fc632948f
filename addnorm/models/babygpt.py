"""The babygpt ladder: five small character models, each one step from the last, as GPT configs.

simpx, "build your own LLM" (github.com/simpx/buildyourownllm), `babygpt_v6_block.py` to
`babygpt_v12_wandb.py`. `GPT(GPTConfig(**LADDER["babygpt-v7"], vocab_size=6148))` builds one.

| name | step | parameters at V = 6,148 |
|---|---|---|
| babygpt-v6 | blocks of attention and one dense layer with ReLU, no residual | 412,260 |
| babygpt-v7 | the residual connection | 412,260 |
| babygpt-v8 | output matrix of the attention, feed-forward through 4 D | 437,316 |
| babygpt-v9 | pre-norm and a final norm | 437,764 |
| babygpt-v12 | v9 six layers deep, 384 wide, over 256 characters, dropout 0.2 | 15,466,756 |

All have learned positions, scores over sqrt(E), queries, keys and values without biases, biases
everywhere else, a head of its own, and start as torch's modules do: N(0, 1) in the embeddings. The
dropout of v12 is on the attention weights and on the output of every branch, not on the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from addnorm.models.layers import AttentionConfig, EmbeddingConfig, FeedForwardConfig

_V6: Mapping[str, Any] = {
    "depth": 3,
    "dim": 32,
    "heads": 4,
    "context": 8,
    "wiring": "plain",
    "start": "torch",
    "head_bias": True,
    "embedding": EmbeddingConfig(embedding_start="torch"),
    "attention": AttentionConfig(attention_biases="none", attention_projection=False),
    "feedforward": FeedForwardConfig(activation="relu", feedforward_projection=False),
}
_V7 = {**_V6, "wiring": "residual"}
_V8 = {
    **_V7,
    "attention": AttentionConfig(attention_biases="out"),
    "feedforward": FeedForwardConfig(activation="relu"),
}
_V9 = {**_V8, "wiring": "prenorm"}
_V12 = {
    **_V9,
    "depth": 6,
    "dim": 384,
    "heads": 6,
    "context": 256,
    "dropout": 0.2,
    "attention": AttentionConfig(attention_biases="out", attention_dropout=0.2),
}
# Fields of GPTConfig by name; the vocabulary is the data's.
LADDER: Mapping[str, Mapping[str, Any]] = {
    "babygpt-v6": _V6,
    "babygpt-v7": _V7,
    "babygpt-v8": _V8,
    "babygpt-v9": _V9,
    "babygpt-v12": _V12,
}
