"""The oracle of what stands inside a branch, one token at a time, importing nothing from addnorm.

Letters: x the tokens `(B, T, D)`, p the parameters of the branch by name. An option is there when
its parameter is.
"""

import math

import naive
import torch


def normed(kind, x, p, name):
    """Return the norm `name` of one vector, or the vector where p has no such norm."""
    gains = [p[key] for key in (f"{name}.weight", f"{name}.bias") if key in p]
    return kind(x, *gains) if gains else x


def canon(h, p, name):
    """Return h_t + sum_j w_j h_{t-3+j}, h before the first token being 0."""
    if f"{name}.weight" not in p:
        return h
    w = p[f"{name}.weight"][:, 0]  # (C, 4)
    rows = []
    for b in range(h.shape[0]):
        for t in range(h.shape[1]):
            seen = [(j, t - 3 + j) for j in range(4) if t - 3 + j >= 0]
            rows.append(h[b, t] + sum(w[:, j] * h[b, s] for j, s in seen))
    return torch.stack(rows).reshape(h.shape)


def attention(x, p, heads, first):
    """Return the causal attention; `first` is a dict that keeps the first values of a stack."""
    B, T, D = x.shape
    E = D // heads
    x = canon(x, p, "canon_a")
    qkv = canon(naive.by_token(lambda token: naive.linear(token, p, "qkv"), x), p, "canon_b")
    out = []
    for b in range(B):
        joined = [[] for _ in range(T)]
        for h in range(heads):
            q, k, v = (qkv[b, :, i * D + h * E : i * D + (h + 1) * E] for i in range(3))
            q = torch.stack([normed(naive.rmsnorm, row, p, "q_norm") for row in q])
            k = torch.stack([normed(naive.rmsnorm, row, p, "k_norm") for row in k])
            v = torch.stack([normed(naive.rmsnorm, row, p, "v_norm") for row in v])
            if "value_residual.weight" in p:
                one, two = p["value_residual.weight"]
                v = one * first.setdefault((b, h), v) + two * v
            for t in range(T):
                scores = [sum(q[t] * k[s]) / math.sqrt(E) for s in range(t + 1)]
                weights = [torch.exp(score - max(scores)) for score in scores]
                y = sum(weight * v[s] for s, weight in enumerate(weights)) / sum(weights)
                joined[t].append(y * p["head_scale.weight"][h] if "head_scale.weight" in p else y)
        for t in range(T):
            y = normed(naive.layernorm, torch.cat(joined[t]), p, "joined_norm")
            out.append(normed(naive.layernorm, naive.linear(y, p, "out"), p, "output_norm"))
    return torch.stack(out).reshape(B, T, D)


def feedforward(x, p):
    """Return W_out N(gelu(canon(W_in canon(x)))), each part where p has it."""
    h = naive.by_token(lambda token: naive.linear(token, p, "lift"), canon(x, p, "canon_c"))

    def rest(row):
        hidden = normed(naive.layernorm, naive.gelu(row), p, "hidden_norm")
        return naive.linear(hidden, p, "out")

    return naive.by_token(rest, canon(h, p, "canon_d"))
