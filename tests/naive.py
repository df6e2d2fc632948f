"""The oracle: every formula restated naively, one token at a time, importing nothing from addnorm.

Letters: x one token `(D,)`, p the wiring's own parameters by name, F the branch of one token,
norm one of `layernorm` and `rmsnorm`. All of it carries autograd, so gradients come from it too.
"""

import math

import torch

# -- parts -------------------------------------------------------------------------------------


def by_token(function, x):
    """Apply a function of one token `(D,)` to every token of `x (..., D)`, in a loop."""
    if x.dim() == 1:
        return function(x)
    return torch.stack([by_token(function, row) for row in x])


def layernorm(x, gain=1.0, shift=0.0):
    """Return (x - mean) / sqrt(variance + 1e-5) gain + shift, the variance divided by D."""
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    return (x - mean) / (variance + 1e-5) ** 0.5 * gain + shift


def rmsnorm(x, gain=1.0):
    """Return x / sqrt(mean square + eps) gain; eps is 1e-6."""
    mean_square = sum(value**2 for value in x) / len(x)
    return x / (mean_square + 1e-6) ** 0.5 * gain


def gelu(x):
    """Return x Phi(x), Phi the normal distribution function."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def linear(x, p, name):
    """Return W x + b, a sum for each output."""
    weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
    return torch.stack([sum(w * x) + b for w, b in zip(weight, bias, strict=True)])


def feedforward(x, p, activation, prefix=""):
    """Return W_out act(W_in x + b_in) + b_out."""
    return linear(activation(linear(x, p, f"{prefix}lift")), p, f"{prefix}out")


def attention(x, p, heads, mask=None):
    """Causal attention over `x (B, T, D)`, query by query; `mask (B, heads, T, T)` or None.

    A query that may look nowhere gets 0 from its head.
    """
    B, T, D = x.shape
    E = D // heads
    out = []
    for b in range(B):
        fused = [linear(x[b, t], p, "qkv") for t in range(T)]  # (3 D,): query, key, value
        for t in range(T):
            mixed = []
            for h in range(heads):
                own = range(h * E, (h + 1) * E)
                query = fused[t][:D][own]
                seen = [s for s in range(t + 1) if mask is None or mask[b, h, t, s]]
                if not seen:
                    mixed.append(torch.zeros(E, dtype=x.dtype))
                    continue
                scores = [sum(query * fused[s][D : 2 * D][own]) / math.sqrt(E) for s in seen]
                weights = [torch.exp(score - max(scores)) for score in scores]
                values = [fused[s][2 * D : 3 * D][own] for s in seen]
                pairs = zip(weights, values, strict=True)
                mixed.append(sum(weight * value for weight, value in pairs) / sum(weights))
            out.append(linear(torch.cat(mixed), p, "out"))
    return torch.stack(out).reshape(B, T, D)
