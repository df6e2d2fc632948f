"""The oracle of the catalogue: every scheme as a whole stack, one token at a time, in loops.

A formula takes one token `x (D,)`, the connections in order and a norm, and returns what the stack
returns. It imports nothing from addnorm. Letters: D width, K connections, L layers, X a list of n
streams. All of it carries autograd, so gradients come from it too.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from naive import feedforward, gelu, layernorm, rmsnorm


@dataclass(frozen=True)
class Connection:
    """One connection: its parameters by name, its place, and the norm of the stack."""

    p: dict
    index: int
    K: int
    parts: int
    norm: object

    @property
    def layer(self):
        return self.index // self.parts

    @property
    def L(self):
        return self.K // self.parts

    @property
    def first_part(self):
        return self.index % self.parts == 0

    @property
    def last_part(self):
        return self.index % self.parts == self.parts - 1

    def F(self, x):
        """The branch: a feed-forward with tanh."""
        return feedforward(x, self.p, torch.tanh, prefix="branch.")

    def N(self, name, x):
        """The norm called `name`, with its gain, and its shift where there is one."""
        gains = [self.p[key] for key in (f"{name}.weight", f"{name}.bias") if key in self.p]
        assert gains, name
        return self.norm(x, *gains)


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def product(W, x):
    """W x, a sum for each row."""
    return torch.stack([dot(row, x) for row in W])


def affine(x, p, name):
    return product(p[f"{name}.weight"], x) + p[f"{name}.bias"]


def sigma(x):
    return 1 / (1 + torch.exp(-x))


def relu(x):
    return torch.stack([value if value > 0 else 0 * value for value in x])


def silu(x):
    return x * sigma(x)


ACTS = {"none": lambda x: x, "relu": relu, "gelu": gelu, "silu": silu, "tanh": torch.tanh}


# -- norm ----------------------------------------------------------------------------------------


def plain(x, stack, norm=False, act="none"):
    for c in stack:
        x = ACTS[act](c.F(c.N("norm_in", x) if norm else x))
    return x


def residual(x, stack):
    for c in stack:
        x = x + c.F(x)
    return x


def postact(x, stack, act="relu"):
    for c in stack:
        x = ACTS[act](x + c.F(x))
    return x


def postnorm(x, stack, skip=lambda c: 1.0):
    for c in stack:
        x = c.N("norm", skip(c) * x + c.F(x))
    return x


def prenorm(x, stack, scale=lambda c: 1.0):
    for c in stack:
        x = x + scale(c) * c.F(c.N("norm_in", x))
    return x


def sandwich(x, stack):
    for c in stack:
        x = x + c.N("norm_out", c.F(c.N("norm_in", x)))
    return x


def peri(x, stack):
    return sandwich(stack[0].N("norm_open", x), stack)


def reordered(x, stack):
    for c in stack:
        x = x + c.N("norm_out", c.F(x))
    return x


def mixln(x, stack, fraction=0.25):
    for c in stack:
        x = postnorm(x, [c]) if c.layer + 1 <= fraction * c.L else prenorm(x, [c])
    return x


def deepnorm(x, stack):
    return postnorm(x, stack, lambda c: math.sqrt(math.sqrt(c.K)))


def admin(x, stack, omega=None):
    """`omega(K)` is its start; None for the learned vector."""
    return postnorm(x, stack, lambda c: c.p["omega"] if omega is None else omega(c.K))


def b2t(x, stack):
    bottom = x
    for c in stack:
        if c.first_part:
            bottom = x
        update = x + c.F(x)
        if c.last_part and c.parts > 1:
            update = update + bottom
        x = c.N("norm", update)
    return x


def resi_dual(x, stack):
    r = x
    for c in stack:
        f = c.F(x)
        x, r = c.N("norm", x + f), r + f
    return x + stack[-1].N("norm_close", r)


def lns(x, stack):
    for c in stack:
        x = x + c.F(c.N("norm_in", x) / math.sqrt(c.layer + 1))
    return x


def gpas(x, stack):
    for c in stack:
        y = prenorm(x, [c])
        x = y - silu(c.p["gate"]) * y.detach()
    return x


def keel(x, stack):
    for c in stack:
        alpha = 1 if c.layer == 0 else c.K
        x = alpha * x + c.F(c.N("norm_in", x))
        x = c.N("norm", x) if c.index else x
    return x


def siamese(x, stack):
    y = x
    for c in stack:
        x = c.N("norm_x", x)
        z = c.F(c.N("norm_in", x + c.N("norm_y", y)))
        x, y = x + z / (2 * (c.layer + 1)) ** 0.5, y + z
    return c.N("norm_close", c.N("close_x", x) + c.N("close_y", y))


def hybridnorm(x, stack):
    for c in stack:
        u = c.N("norm_between", x) if c.last_part else x
        x = u + c.F(u)
    return x


# -- scale ---------------------------------------------------------------------------------------


def rezero(x, stack, alpha=None):
    for c in stack:
        x = x + (c.p["alpha"] if alpha is None else alpha) * c.F(x)
    return x


def identity(x, stack):
    return x


def layerscale(x, stack, init=None):
    for c in stack:
        gamma = c.p["gamma"] if init is None else [init] * len(x)
        f = c.F(c.N("norm_in", x))
        x = torch.stack([x[i] + gamma[i] * f[i] for i in range(len(x))])
    return x


def stable(x, stack):
    return prenorm(x, stack, lambda c: 1 / math.sqrt(c.K))


def completep(x, stack, base_depth=2, exponent=1.0):
    return prenorm(x, stack, lambda c: (base_depth / c.L) ** exponent)


def droppath(x, stack, rate=0.1, per="sample"):
    """In evaluation."""
    if per == "sample":
        return prenorm(x, stack)
    return prenorm(x, stack, lambda c: 1 - rate * (c.layer + 1) / c.L)


def highway(x, stack, bias=None):
    for c in stack:
        shift = c.p["gate.bias"] if bias is None else bias
        T = sigma(product(c.p["gate.weight"], x) + shift)
        x = T * c.F(x) + (1 - T) * x
    return x


def gtrxl(x, stack, bias=None):
    for c in stack:
        p, y = c.p, relu(c.F(c.N("norm_in", x)))
        b = p["bias"] if bias is None else bias
        r = sigma(product(p["reset_y.weight"], y) + product(p["reset_x.weight"], x))
        z = sigma(product(p["update_y.weight"], y) + product(p["update_x.weight"], x) - b)
        h = torch.tanh(product(p["new_y.weight"], y) + product(p["new_x.weight"], r * x))
        x = (1 - z) * x + z * h
    return x


def deep_delta(x, stack, biases=True):
    for c in stack:
        p, normed = c.p, c.N("norm_in", x)
        f = c.F(normed)
        k = f / (dot(f, f) + 1e-10) ** 0.5
        beta = 2 * sigma(dot(p["step.weight"][0], normed) + biases * p["step.bias"])
        v = 4 * sigma(dot(p["value.weight"][0], x) + biases * p["value.bias"])
        x = x - beta * dot(k, x) * k + beta * v * k  # (I - beta k k^T) x + beta v k
    return x


def orthogonal(x, stack):
    for c in stack:
        f = c.F(c.N("norm_in", x))
        x = x + f - dot(f, x) / (dot(x, x) + 1e-6) * x
    return x


def constant_scaling(x, stack, skip=0.5, scale=0.5):
    for c in stack:
        x = relu(skip * x + scale * c.F(x))
    return x


def exclusive_gating(x, stack, bias=None):
    for c in stack:
        x = relu(highway(x, [c], bias))
    return x


def shortcut_gating(x, stack, bias=None):
    for c in stack:
        shift = c.p["gate.bias"] if bias is None else bias
        x = relu((1 - sigma(product(c.p["gate.weight"], x) + shift)) * x + c.F(x))
    return x


def linear_shortcut(x, stack):
    for c in stack:
        x = relu(product(c.p["shortcut.weight"], x) + c.F(x))
    return x


def dropout_shortcut(x, stack, rate=0.5):
    """In evaluation."""
    for c in stack:
        x = relu((1 - rate) * x + c.F(x))
    return x


def norm_after_addition(x, stack):
    for c in stack:
        x = relu(c.N("norm", x + c.F(x)))
    return x


def relu_before_addition(x, stack):
    for c in stack:
        x = x + relu(c.F(x))
    return x


# -- memory --------------------------------------------------------------------------------------


def inject(x, stack, start=False):
    x = x0 = stack[0].N("norm_open", x)
    for c in stack:
        if c.first_part:
            t = c.layer / (c.L - 1) if c.L > 1 else 0
            r, m = (1.15 - t / 10, 0.2 - 0.15 * t) if start else (c.p["keep"], c.p["inject"])
            x = r * x + m * x0
        x = prenorm(x, [c])
    return x


def unet(x, stack, start=False):
    after = {}
    for c in stack:
        half = c.L // 2
        if c.first_part and half <= c.layer < 2 * half:
            x = x + (1 if start else c.p["weight"]) * after.pop(max(after))
        x = prenorm(x, [c])
        if c.last_part and c.layer < half:
            after[c.layer] = x
    return x


def denseformer(x, stack, dilation=1, period=1):
    outputs = [x]
    for c in stack:
        x = prenorm(x, [c])
        if c.last_part:
            i = c.layer
            outputs.append(x)
            if (i + 1) % period == 0:
                read = [X for j, X in enumerate(outputs) if (i + 1 - j) % dilation == 0]
                x = dot(c.p["alpha"], read)
    return x


def laurel(x, stack):
    for c in stack:
        f = prenorm(x, [c]) - x
        x = x + f + product(c.p["up.weight"], product(c.p["down.weight"], x))
    return x


def depth_attention(p, name, sources):
    keys = [rmsnorm(v, p[f"{name}.gain"]) for v in sources]
    weights = [torch.exp(dot(p[f"{name}.query"], key)) for key in keys]
    return dot(weights, sources) / sum(weights)


def attnres(x, stack):
    v = [x]
    for c in stack:
        h = depth_attention(c.p, "read", v) if c.index else x
        v.append(c.F(c.N("norm_in", h)))
    return depth_attention(c.p, "read_close", v)


def attnres_start(x, stack):
    v = [x]
    for c in stack:
        v.append(c.F(c.N("norm_in", sum(v) / len(v))))
    return sum(v) / len(v)


def attnres_block(x, stack, size=4):
    blocks, partial = [x], None
    for c in stack:
        if c.index % size == 0 and partial is not None:
            blocks.append(partial)
            partial = None
        sources = blocks if partial is None else [*blocks, partial]
        h = depth_attention(c.p, "read", sources) if c.index else x
        f = c.F(c.N("norm_in", h))
        partial = f if partial is None else partial + f
    return depth_attention(c.p, "read_close", [*blocks, partial])


def attnres_block_start(x, stack, size=4):
    sums = [x] + [None] * math.ceil(len(stack) / size)
    for c in stack:
        have = [s for s in sums if s is not None]
        f, n = c.F(c.N("norm_in", sum(have) / len(have))), 1 + c.index // size
        sums[n] = f if sums[n] is None else sums[n] + f
    return sum(sums) / len(sums)


# -- streams -------------------------------------------------------------------------------------


def hyper(x, stack, n=4, dynamic=True):
    X = [x] * n
    for c in stack:
        p = c.p
        a = [p["read"][j] for j in range(n)]
        B = [p["write"][j] for j in range(n)]
        A = [[p["mix"][j, k] for k in range(n)] for j in range(n)]
        if dynamic:
            s, t = p["scale"]
            for j in range(n):
                g = torch.tanh(product(p["generate.weight"], layernorm(X[j])))
                a[j] = a[j] + s * g[0]
                A[j] = [A[j][k] + s * g[1 + k] for k in range(n)]
                B[j] = B[j] + t * g[n + 1]
        f = c.F(c.N("norm_in", dot(a, X)))
        X = [sum(A[j][k] * X[j] for j in range(n)) + B[k] * f for k in range(n)]
    return sum(X)


def hyper_start(x, stack, n=4):
    """One stream is read in turn, all are written; their sum grows by n f."""
    X = [x] * n
    for c in stack:
        f = c.F(c.N("norm_in", X[c.index % n]))
        X = [row + f for row in X]
    return sum(X)


def frac(x, stack, m=4):
    for c in stack:
        p, size = c.p, len(x) // m
        pieces = [x[i * size : (i + 1) * size] for i in range(m)]
        g = [torch.tanh(product(p["generate.weight"], layernorm(piece))) for piece in pieces]
        s, t = p["scale"]
        Y = [[p["read"][j, k] + s * g[j][k] for k in range(m)] for j in range(m)]
        A = [[p["mix"][j, k] + s * g[j][m + k] for k in range(m)] for j in range(m)]
        B = [p["write"][j] + t * g[j][2 * m] for j in range(m)]
        h = torch.cat([sum(Y[j][k] * pieces[j] for j in range(m)) for k in range(m)])
        f = c.F(c.N("norm_in", h))
        x = torch.cat(
            [
                sum(A[j][k] * pieces[j] for j in range(m)) + B[k] * f[k * size : (k + 1) * size]
                for k in range(m)
            ]
        )
    return x


def generated(p, name, X, sizes, eps, alpha=None, bias=None):
    """alpha_i r(vec X) phi_i + b_i, for maps of the given sizes."""
    x = torch.cat(X)
    normed = x / (dot(x, x) / len(x) + eps) ** 0.5
    out, at = [], 0
    for i, size in enumerate(sizes):
        a = p[f"{name}.alpha"][i] if alpha is None else alpha
        rows = range(at, at + size)
        b = [p[f"{name}.bias"][r] if bias is None else bias for r in rows]
        out.append([a * dot(p[f"{name}.phi"][r], normed) + b[r - at] for r in rows])
        at += size
    return out


def matrix_times(H, X):
    return [dot(row, X) for row in H]


def sinkhorn(logits, iterations):
    """exp, then columns and rows divided by their sums in turn."""
    n = len(logits)
    M = [[torch.exp(value) for value in row] for row in logits]
    for _ in range(iterations):
        sums = [sum(M[i][j] for i in range(n)) for j in range(n)]
        M = [[M[i][j] / sums[j] for j in range(n)] for i in range(n)]
        M = [[value / sum(row) for value in row] for row in M]
    return M


def mhc_family(x, stack, n, mixing, size, everywhere):
    """`mixing(values)` is the matrix of a connection; the ends have one only `everywhere`."""
    X = [x] * n
    for c in stack:
        mixes = everywhere or 0 < c.index < c.K - 1
        sizes = (n, n, size) if mixes else (n, n)
        pre, post, *res = generated(c.p, "generate", X, sizes, 1e-20)
        f = c.F(c.N("norm_in", dot([sigma(value) for value in pre], X)))
        X = matrix_times(mixing(res[0]), X) if mixes else X
        X = [row + 2 * sigma(value) * f for row, value in zip(X, post, strict=True)]
    return sum(X) / n


def mhc(x, stack, n=4, iterations=20, everywhere=False):
    def mixing(values):
        return sinkhorn([values[i * n : (i + 1) * n] for i in range(n)], iterations)

    return mhc_family(x, stack, n, mixing, n * n, everywhere)


def mhc_lite(x, stack, n=4, everywhere=False):
    orders = list(itertools.permutations(range(n)))

    def mixing(values):
        weights = [torch.exp(value) for value in values]
        total = sum(weights)
        H = [[0.0] * n for _ in range(n)]
        for weight, order in zip(weights, orders, strict=True):
            for i, j in enumerate(order):
                H[i][j] = H[i][j] + weight / total
        return H

    return mhc_family(x, stack, n, mixing, len(orders), everywhere)


def krom(x, stack, n=4, everywhere=False):
    bits = n.bit_length() - 1

    def mixing(values):
        stay = [sigma(values[2 * b] - values[2 * b + 1]) for b in range(bits)]

        def entry(i, j):
            out = 1.0
            for b in range(bits):  # the first factor stands for the highest bit
                same = (i >> (bits - 1 - b) & 1) == (j >> (bits - 1 - b) & 1)
                out = out * (stay[b] if same else 1 - stay[b])
            return out

        return [[entry(i, j) for j in range(n)] for i in range(n)]

    return mhc_family(x, stack, n, mixing, 2 * bits, everywhere)


def ihc(x, stack, n=4):
    X = [x] * n
    for c in stack:
        pre, post = generated(c.p, "generate", X, (n, n), 1e-20)
        f = c.F(c.N("norm_in", dot([sigma(value) for value in pre], X)))
        X = [row + 2 * sigma(value) * f for row, value in zip(X, post, strict=True)]
    return sum(X) / n


def mhc_start(x, stack, n=4, entry=lambda i, j: float(i == j)):
    """One stream ahead: sigma(+-1); `entry` is the start of the mixing matrix."""
    X = [x] * n
    for c in stack:
        ahead = [sigma(torch.tensor(1.0 if i == c.index % n else -1.0).double()) for i in range(n)]
        f = c.F(c.N("norm_in", dot(ahead, X)))
        if 0 < c.index < c.K - 1:
            X = matrix_times([[entry(i, j) for j in range(n)] for i in range(n)], X)
        X = [row + 2 * a * f for row, a in zip(X, ahead, strict=True)]
    return sum(X) / n


def near_identity(n):
    """Diagonal 1, off the diagonal e^-8, rows divided by their sums."""
    off = math.exp(-8)
    return lambda i, j: (1.0 if i == j else off) / (1 + (n - 1) * off)


def near_identity_permutation(n):
    """The identity with weight 1, the n! - 1 other permutations with e^-8, over the sum."""
    others, fix = math.exp(-8), math.factorial(n - 1)  # permutations that take i to a given j
    total = 1 + (math.factorial(n) - 1) * others
    return lambda i, j: (1 + (fix - 1) * others if i == j else fix * others) / total


def near_identity_factors(n):
    p = 1 / (1 + math.exp(-8))
    return lambda i, j: (
        p ** (n.bit_length() - 1 - (i ^ j).bit_count()) * (1 - p) ** ((i ^ j).bit_count())
    )


def mhc_v4(x, stack, n=4, alpha=None, bias=None, everywhere=False):
    X = [x] * n
    for c in stack:
        mixes = everywhere or c.index
        sizes = (n, n, n * n) if mixes else (n, n)
        pre, post, *comb = generated(c.p, "generate", X, sizes, 1e-6, alpha, bias)
        f = c.F(c.N("norm_in", dot([sigma(value) + 1e-6 for value in pre], X)))
        if mixes:
            C = deepseek_sinkhorn([comb[0][i * n : (i + 1) * n] for i in range(n)])
            X = [sum(C[j][k] * X[j] for j in range(n)) for k in range(n)]
        X = [row + 2 * sigma(value) * f for row, value in zip(X, post, strict=True)]
    (weights,) = generated(c.p, "generate_close", X, (n,), 1e-6, alpha, bias)
    return dot([sigma(value) + 1e-6 for value in weights], X)


def deepseek_sinkhorn(logits, eps=1e-6):
    n = len(logits)
    M = [[torch.exp(value) for value in row] for row in logits]
    M = [[value / sum(row) + eps for value in row] for row in M]
    for step in range(20):
        if step:
            M = [[value / (sum(row) + eps) for value in row] for row in M]
        sums = [sum(M[i][j] for i in range(n)) + eps for j in range(n)]
        M = [[M[i][j] / sums[j] for j in range(n)] for i in range(n)]
    return M


def gated_read(p, name, X, n, gain=True):
    Z = [
        rmsnorm(X[i]) * (1 + (p[f"{name}.gain"][i] if gain else 0 * p[f"{name}.gain"][i]))
        for i in range(n)
    ]
    z = torch.cat(Z)
    hidden = silu(product(p[f"{name}.down.weight"], z / n))
    G = sigma(product(p[f"{name}.up.weight"], hidden))
    D = len(X[0])
    return sum(G[i * D : (i + 1) * D] * Z[i] for i in range(n)) / n, z


def gated_residual(x, stack, n=4, gain=True):
    X = [x] * n
    for c in stack:
        h, z = gated_read(c.p, "read", X, n, gain)
        s = 2 * sigma(product(c.p["write.weight"], z / n))
        f = c.F(h)
        X = [X[i] + s[i] * f for i in range(n)]
    return gated_read(c.p, "read_close", X, n, gain)[0]


def reversible(x, stack):
    """y1 = x1 + F(x2), y2 = x2 + G(y1), the two in turn; their mean."""
    pair = [x, x]
    for c in stack:
        into = c.index % 2
        pair[into] = pair[into] + c.F(c.N("norm_in", pair[1 - into]))
    return (pair[0] + pair[1]) / 2
