"""More than one stream: hyper-connections and their relatives, and the reversible pair.

Letters: X the streams `(..., n, D)`, one row each; F the branch without its norm, N a norm over
the last axis, e_k the k-th unit vector, vec(X) `(..., n D)`, sigma the logistic function, k the
connection counted from 0, r(x) = x / sqrt(mean x^2 + eps). What generates or mixes streams is
computed in float32 under autocast, but for the gates of gated-residual, which are matrices.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addnorm.branches import Branch, Context, Site, wide
from addnorm.contract import Drawing, Group, Wiring, register
from addnorm.wirings.inversion import Inverted, Pair

Owner = TypeVar("Owner")
Result = TypeVar("Result")
Maps = tuple[Tensor, Tensor, Tensor]  # read (..., n), write (..., n), mix (..., n, n)


def in_float32(method: Callable[[Owner, Tensor], Result]) -> Callable[[Owner, Tensor], Result]:
    """Run a method of one tensor outside autocast, on float32 where that is of 16 bits."""

    @functools.wraps(method)
    def outside(self: Owner, x: Tensor) -> Result:
        with no_autocast(x):
            return method(self, wide(x))

    return outside


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context without autocast on the device of `x`; some devices (meta) have none."""
    if torch.amp.is_autocast_available(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def rows(x: Tensor, n: int) -> Tensor:
    """Return `(..., n m)` as n rows, `(..., n, m)`."""
    return x.reshape(*x.shape[:-1], n, x.shape[-1] // n)


def mix(matrix: Tensor, streams: Tensor) -> Tensor:
    """Return `matrix (..., m, n)` times `streams (..., n, D)`: `(..., m, D)`, outside autocast.

    Written as a sum of products for the compiler, which fuses it with what stands around; eager,
    a matrix product makes one pass.
    """
    if torch.compiler.is_compiling():
        mixed = (matrix.unsqueeze(-1) * streams.unsqueeze(-3)).sum(-2)
    else:
        with no_autocast(streams):
            mixed = matrix @ streams.to(matrix.dtype)
    return mixed.to(streams.dtype)


def read(weights: Tensor, streams: Tensor) -> Tensor:
    """Return sum_i weights_i X_i: `(..., n)`, `(..., n, D)` to `(..., D)`."""
    return mix(weights.unsqueeze(-2), streams).squeeze(-2)


def write(weights: Tensor, update: Tensor, streams: Tensor) -> Tensor:
    """Return weights_i f as row i, in the dtype of the streams: `(..., n)`, `(..., D)` to both."""
    return (weights.unsqueeze(-1) * update.unsqueeze(-2)).to(streams.dtype)


class Streams(Wiring):
    """What n streams have in common: they open as n copies and close as their mean.

    A final norm does not see whether it gets the mean or the sum.
    """

    final_norm = True
    limits = {"n": (2, 16)}

    def __init__(self, branch: Branch, site: Site, n: int) -> None:
        super().__init__(branch, site)
        self.n = n
        self.norm_in = self.new_norm()

    def open(self, x: Tensor) -> Tensor:
        """Return n rows of x `(..., D)`: `(..., n, D)`."""
        return x.unsqueeze(-2).expand(*x.shape[:-1], self.n, x.shape[-1])

    def close(self, stream: Tensor) -> Tensor:
        """Return the mean of the streams `(..., D)`."""
        return stream.mean(-2)

    def present(self, stream: Tensor) -> Tensor:
        """Return the mean of the streams."""
        return stream.mean(-2)


@register
class Hyper(Streams):
    """X <- A^T X + B f, f = F(N(a.X)): hyper-connections with learned read, mix and write.

    Zhu et al. 2024 (arXiv:2409.19606), equations 1 to 5 and 10 to 13. Static a = e_{k mod n}, A =
    I, B = 1; dynamic adds s tanh(LN(X) W), LN without gain, to each, W = 0, s = 0.01, one s for a
    and A. Output matrices start sqrt(n) wider; the static parts do not decay. k counts
    connections, as in the paper; the code of LIMe takes the layer for both sublayers. The
    HyperConnection of x-transformers (9252ed7) is another scheme: its Sinkhorn runs over an axis of
    size 1, which makes every entry 1, and its B passes a sigmoid twice.
    """

    name = "hyper"
    equation = "x <- A^T X + B f,  f = F(N(a.X))"
    paper = "Zhu et al. 2024, arXiv:2409.19606"
    year = 2024
    at_start = "x + F(N(x)) in the sum, F with output matrices sqrt(n) wider"
    stream_law = "sqrt"
    gradient_law = "sqrt"
    drawing = Drawing(read="a, N", write="B", skip="A^T", stream="X")
    ships = "hyper-connections (lucidrains), LIMe"

    def __init__(self, branch: Branch, site: Site, *, n: int = 4, dynamic: bool = True) -> None:
        super().__init__(branch, site, n)
        self.dynamic = dynamic
        self.read = self.new_parameter(n)  # a
        self.mix = self.new_parameter(n, n)  # A
        self.write = self.new_parameter(n)  # B
        if dynamic:
            self.generate = self.new_linear(site.dim, n + 2)  # W of a, A and B
            self.scale = self.new_parameter(2)  # s of (a, A) and of B

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return A^T X + B f."""
        a, B, A = self.maps(stream)
        f = self.branch(self.norm_in(read(a, stream)), context)
        return mix(A.mT, stream) + write(B, f, stream)

    @in_float32
    def maps(self, streams: Tensor) -> Maps:
        """Return a `(..., n)`, B `(..., n)` and A `(..., n, n)`."""
        a, B, A = wide(self.read), wide(self.write), wide(self.mix)
        if not self.dynamic:
            return a, B, A
        generated = F.layer_norm(streams, streams.shape[-1:]) @ wide(self.generate.weight).mT
        generated = torch.tanh(generated)  # (..., n, n + 2)
        one, many, last = torch.split(generated, [1, self.n, 1], -1)
        s, t = wide(self.scale)
        return a + s * one.squeeze(-1), B + t * last.squeeze(-1), A + s * many

    def close(self, stream: Tensor) -> Tensor:
        """Return the sum of the streams `(..., D)`."""
        return stream.sum(-2)

    def gains(self) -> Mapping[str, float]:
        """Start output matrices sqrt(n) wider."""
        return {"out": math.sqrt(self.n)}

    def groups(self) -> Mapping[str, Group]:
        """The static maps do not decay, whatever their axes."""
        return dict.fromkeys(("read", "mix", "write"), Group(weight_decay=0.0))

    def reset_parameters(self) -> None:
        """Start as one stream that is read and n that are written."""
        super().reset_parameters()
        with torch.no_grad():
            self.read.zero_()[self.site.index % self.n] = 1.0
        nn.init.eye_(self.mix)
        nn.init.ones_(self.write)
        if self.dynamic:
            nn.init.zeros_(self.generate.weight)
            nn.init.constant_(self.scale, 0.01)


@register
class Frac(Wiring):
    """x <- A^T x_m + B * f_m, f = F(N(Y^T x_m)): the stream split into m pieces, not widened.

    Zhu et al. 2025, Frac-Connections (arXiv:2503.14125), equations 6 to 11. x_m is x as m rows of
    D/m. Y = A = I, B = 1, each with s tanh(LN(x_m) W) added, W = 0, s = 0.01, as in
    hyper-connections. The paper's algorithm 3 joins the pieces to a width that equals D only for
    m = 2; this follows its equations.
    """

    name = "frac"
    equation = "x <- A^T x_m + B * f_m,  f = F(N(Y^T x_m))"
    paper = "Zhu et al. 2025, arXiv:2503.14125"
    year = 2025
    at_start = "x + F(N(x))"
    final_norm = True
    stream_law = "sqrt"
    gradient_law = "sqrt"
    limits = {"m": (1, 64)}
    drawing = Drawing(read="Y^T, N", write="B", skip="A^T")

    def __init__(self, branch: Branch, site: Site, *, m: int = 4) -> None:
        super().__init__(branch, site)
        if site.dim % m:
            raise ValueError(f"m={m} of frac must divide the width {site.dim}")
        self.m = m
        self.norm_in = self.new_norm()
        self.read = self.new_parameter(m, m)  # Y
        self.mix = self.new_parameter(m, m)  # A
        self.write = self.new_parameter(m)  # B
        self.generate = self.new_linear(site.dim // m, 2 * m + 1)  # W of Y, A and B
        self.scale = self.new_parameter(2)  # s of (Y, A) and of B

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return A^T x_m + B * f_m, joined again."""
        pieces = rows(stream, self.m)  # (..., m, D/m)
        Y, A, B = self.maps(pieces)
        f = self.branch(self.norm_in(mix(Y.mT, pieces).flatten(-2)), context)
        f = rows(f, self.m)
        joined: Tensor = mix(A.mT, pieces) + (B.unsqueeze(-1) * f).to(stream.dtype)
        return joined.flatten(-2)

    @in_float32
    def maps(self, pieces: Tensor) -> Maps:
        """Return Y and A `(..., m, m)` and B `(..., m)`."""
        generated = F.layer_norm(pieces, pieces.shape[-1:]) @ wide(self.generate.weight).mT
        generated = torch.tanh(generated)  # (..., m, 2 m + 1)
        one, two, last = torch.split(generated, [self.m, self.m, 1], -1)
        s, t = wide(self.scale)
        B = wide(self.write) + t * last.squeeze(-1)
        return wide(self.read) + s * one, wide(self.mix) + s * two, B

    def groups(self) -> Mapping[str, Group]:
        """The static maps do not decay, whatever their axes."""
        return dict.fromkeys(("read", "mix", "write"), Group(weight_decay=0.0))

    def reset_parameters(self) -> None:
        """Start as one stream."""
        super().reset_parameters()
        nn.init.eye_(self.read)
        nn.init.eye_(self.mix)
        nn.init.ones_(self.write)
        nn.init.zeros_(self.generate.weight)
        nn.init.constant_(self.scale, 0.01)


# -- manifold-constrained hyper-connections -----------------------------------------------------
# All generate their maps from r(vec(X)) phi. While the n streams are equal, and where their mean
# is taken next, a matrix with unit row and column sums changes nothing: the first and the last
# connection of the schemes that close by the mean have none.


class Generator(nn.Module):
    """alpha_i r(vec(X)) phi_i + b_i for maps of the given sizes: `(..., n, D)` to `(..., size)`s.

    phi `(sum of sizes, n D)`, b `(sum,)`, one alpha for each map. The division by the RMS follows
    the product, as in the mHC paper's kernels.
    """

    def __init__(self, site: Site, n: int, sizes: Sequence[int], eps: float) -> None:
        super().__init__()
        self.sizes = list(sizes)
        self.eps = eps
        self.phi = site.new_parameter(sum(sizes), n * site.dim)
        self.bias = site.new_parameter(sum(sizes))
        self.alpha = site.new_parameter(len(sizes))
        self.reset_parameters()

    @in_float32
    def forward(self, streams: Tensor) -> tuple[Tensor, ...]:
        """Return one tensor for each map."""
        x = streams.flatten(-2)
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        raw = torch.split(x @ wide(self.phi).mT * scale, self.sizes, -1)
        biases = torch.split(wide(self.bias), self.sizes)
        alphas = wide(self.alpha).unbind()
        return tuple(a * y + b for a, y, b in zip(alphas, raw, biases, strict=True))

    def reset_parameters(self) -> None:
        """Start phi and b at 0 and alpha at 0.01; the schemes add what differs."""
        nn.init.zeros_(self.phi)
        nn.init.zeros_(self.bias)
        nn.init.constant_(self.alpha, 0.01)

    @torch.no_grad()
    def fill(self, *biases: Sequence[float]) -> None:
        """Start b with the given values, map by map."""
        self.bias.copy_(torch.tensor(list(itertools.chain(*biases))))


def one_of(index: int, n: int) -> list[float]:
    """Return +1 for one stream and -1 for the others: what keeps the streams from being equal."""
    return [1.0 if i == index % n else -1.0 for i in range(n)]


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """Return exp(logits) `(..., n, n)` with columns, then rows, divided by their sums, repeatedly.

    Rows sum to 1; columns nearly, the less so the larger the logits: with logits near 8 the error
    is 1e-2 after 20 iterations. The largest logit is taken off first, which changes nothing.
    """
    below = logits - logits.amax((-2, -1), keepdim=True)
    matrix = torch.exp(below.clamp(min=-80))  # or a row or column of zeros would be divided by 0
    for _ in range(iterations):
        matrix = matrix / matrix.sum(-2, keepdim=True)
        matrix = matrix / matrix.sum(-1, keepdim=True)
    return matrix


@register
class MHC(Streams):
    """X <- H_res X + h_post f, f = F(N(h_pre.X)), H_res doubly stochastic by Sinkhorn.

    Xie et al. 2025, mHC (arXiv:2512.24880), equations 5 to 9: h_pre = sigma(.), h_post = 2
    sigma(.), H_res = Sinkhorn(exp(.)), columns first, rows last, 20 iterations; each argument is
    alpha r(vec(X)) phi + b, alpha = 0.01, eps 1e-20. The paper leaves phi and b open, and with phi
    = b = 0 the streams stay equal for ever: here phi = 0, b of h_pre and h_post is +1 for stream k
    mod n and -1 for the others, b of H_res 0 on and -8 off the diagonal, the start of the code of
    mHC-lite. The paper does not say how the streams are joined at the end: the mean, as in
    Megatron. Megatron takes rows first; lucidrains' hyper-connections feeds an identity through
    sigma and Sinkhorn, and starts elsewhere.

    The first and the last connection have no H_res: on n equal streams, and before their mean, a
    doubly stochastic matrix changes nothing. After 20 iterations H_res is that to 1e-6 for logits
    near 1 and to 1e-2 for logits near 8. With this eps the gradient of a token of zeros is of the
    order 1e10 alpha phi: finite in float32 and bfloat16, not in float16.
    """

    name = "mhc"
    equation = "x <- H_res X + h_post f,  f = F(N(h_pre.X)),  H_res = Sinkhorn(.)"
    paper = "Xie et al. 2025, arXiv:2512.24880"
    year = 2025
    at_start = "X + h_post F(N(h_pre.X)), nearly, h_pre = sigma(+-1), h_post = 2 sigma(+-1)"
    stream_law = "sqrt"
    gradient_law = "sqrt"
    limits = {"n": (2, 16), "iterations": (1, 1000)}
    drawing = Drawing(read="h_pre, N", write="h_post", skip="H_res", stream="X")
    ships = "GLM-5.3, openPangu-2.0-Flash, Megatron-LM"

    def __init__(self, branch: Branch, site: Site, *, n: int = 4, iterations: int = 20) -> None:
        super().__init__(branch, site, n)
        self.iterations = iterations
        self.mixes = not (site.first or site.last)
        self.generate = Generator(site, n, (n, n, n * n) if self.mixes else (n, n), 1e-20)

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return H_res X + h_post f."""
        pre, post, *res = self.generate(stream)
        f = self.branch(self.norm_in(read(torch.sigmoid(pre), stream)), context)
        if self.mixes:
            stream = mix(sinkhorn(rows(res[0], self.n), self.iterations), stream)
        return stream + write(2 * torch.sigmoid(post), f, stream)

    def reset_parameters(self) -> None:
        """Start with one stream ahead, nearly unmixed."""
        super().reset_parameters()
        ahead = one_of(self.site.index, self.n)
        near = [0.0 if i == j else -8.0 for i in range(self.n) for j in range(self.n)]
        self.generate.fill(ahead, ahead, *([near] if self.mixes else []))


@register
class MHCV4(Streams):
    """X <- C^T X + post f, f = F(N(pre.X)), C nearly doubly stochastic: mHC as DeepSeek-V4 ships.

    DeepSeek 2026 (arXiv:2606.19348; transformers `deepseek_v4`, TileKernels). As `mhc`, but: pre =
    sigma(.) + 1e-6, post = 2 sigma(.), C = softmax over rows + 1e-6, divided by column sums + 1e-6,
    then 19 times rows and columns; C is H_res transposed; eps 1e-6 in r. Start: phi N(0, 0.02), b =
    0, scales 1. Out: sum_i (sigma(s r(vec(X)) phi_o + b_o) + 1e-6)_i X_i. The TileKernels functions
    default to post without its 2 and 10 iterations, and its reference operations round to bfloat16;
    the model passes 2 and 20. The start is that of the code before weights are loaded; the one of
    the training is not known. Early transformers commits had another form. V4.1 shifts `pre` by a
    connection; that is not here. The first connection has no C: all streams are equal.
    """

    name = "mhc-v4"
    equation = "x <- C^T X + post f,  f = F(N(pre.X)),  C = Sinkhorn(softmax(.))"
    paper = "DeepSeek 2026, arXiv:2606.19348"
    year = 2026
    at_start = "mean of X + post F(N(pre.X)), nearly, pre = 1/2, post = 1"
    stream_law = "sqrt"
    gradient_law = "sqrt"
    drawing = Drawing(read="pre, N", write="post", skip="C^T", stream="X")
    ships = "DeepSeek-V4"

    def __init__(self, branch: Branch, site: Site, *, n: int = 4) -> None:
        super().__init__(branch, site, n)
        self.mixes = not site.first  # nothing to mix while all are equal
        sizes = (n, n, n * n) if self.mixes else (n, n)
        self.generate = Generator(site, n, sizes, 1e-6)
        self.generate_close = Generator(site, n, (n,), 1e-6) if site.last else None

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return C^T X + post f."""
        pre, post, *comb = self.generate(stream)
        f = self.branch(self.norm_in(read(torch.sigmoid(pre) + 1e-6, stream)), context)
        if self.mixes:
            C = self.normalise(rows(comb[0], self.n))
            stream = mix(C.mT, stream)
        return stream + write(2 * torch.sigmoid(post), f, stream)

    @staticmethod
    def normalise(logits: Tensor) -> Tensor:
        """Return C `(..., n, n)`: softmax; columns 20 and rows 19 times, columns last."""
        C = logits.softmax(-1) + 1e-6
        C = C / (C.sum(-2, keepdim=True) + 1e-6)
        for _ in range(19):
            C = C / (C.sum(-1, keepdim=True) + 1e-6)
            C = C / (C.sum(-2, keepdim=True) + 1e-6)
        return C

    def close(self, stream: Tensor) -> Tensor:
        """Return the streams joined by generated weights `(..., D)`."""
        assert self.generate_close is not None
        (weights,) = self.generate_close(stream)
        return read(torch.sigmoid(weights) + 1e-6, stream)

    def reset_parameters(self) -> None:
        """Start phi with N(0, 0.02), which tells the streams apart, and scales at 1."""
        super().reset_parameters()
        for generator in (self.generate, self.generate_close):
            if generator is not None:
                nn.init.normal_(generator.phi, std=0.02)
                nn.init.ones_(generator.alpha)


@register
class IHC(Streams):
    """X <- X + h_post f, f = F(N(h_pre.X)): mHC with the identity in place of its mixing matrix.

    Xie et al. 2025 (arXiv:2512.24880), ablation of H_res; deployed by Chimera (arXiv:2607.28611).
    h_pre = sigma(.), h_post = 2 sigma(.) and their start as in `mhc`.
    """

    name = "ihc"
    equation = "x <- X + h_post f,  f = F(N(h_pre.X))"
    paper = "Xie et al. 2025, arXiv:2512.24880"
    year = 2025
    at_start = "X + h_post F(N(h_pre.X)), h_pre = sigma(+-1), h_post = 2 sigma(+-1)"
    stream_law = "sqrt"
    gradient_law = "sqrt"
    drawing = Drawing(read="h_pre, N", write="h_post", stream="X")
    ships = "Chimera"

    def __init__(self, branch: Branch, site: Site, *, n: int = 4) -> None:
        super().__init__(branch, site, n)
        self.generate = Generator(site, n, (n, n), 1e-20)

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return X + h_post f."""
        pre, post = self.generate(stream)
        f = self.branch(self.norm_in(read(torch.sigmoid(pre), stream)), context)
        return stream + write(2 * torch.sigmoid(post), f, stream)

    def reset_parameters(self) -> None:
        """Start with one stream ahead."""
        super().reset_parameters()
        ahead = one_of(self.site.index, self.n)
        self.generate.fill(ahead, ahead)


@register
class MHCLite(Streams):
    """X <- H_res X + h_post f, f = F(N(h_pre.X)), H_res = sum_p softmax(.)_p P_p.

    Yang et al. 2026, mHC-lite (arXiv:2601.05732): a mean of all n! permutation matrices is doubly
    stochastic exactly, without iterations. h_pre = sigma(.), h_post = 2 sigma(.); arguments alpha
    r(vec(X)) phi + b, alpha 0.01, phi 0; b is +1 for stream k mod n and -1 for the others in h_pre
    and h_post, 0 for the identity and -8 for the other permutations. The authors' code takes a
    random stream in place of k mod n, applies H_res transposed (the same family of matrices), and
    normalises each stream before it adds them at the end; here the model's final norm gets their
    mean. The first and the last connection have no H_res, as in `mhc`.
    """

    name = "mhc-lite"
    equation = "x <- H_res X + h_post f,  f = F(N(h_pre.X)),  H_res = sum_p softmax(.)_p P_p"
    paper = "Yang et al. 2026, arXiv:2601.05732"
    year = 2026
    at_start = "X + h_post F(N(h_pre.X)), nearly, h_pre = sigma(+-1), h_post = 2 sigma(+-1)"
    stream_law = "sqrt"
    gradient_law = "sqrt"
    limits = {"n": (2, 5)}
    drawing = Drawing(read="h_pre, N", write="h_post", skip="H_res", stream="X")

    permutations: Tensor  # P `(n!, n, n)`: row i of P_p has its 1 in column p_i, identity first

    def __init__(self, branch: Branch, site: Site, *, n: int = 4) -> None:
        super().__init__(branch, site, n)
        self.mixes = not (site.first or site.last)
        sizes = (n, n, math.factorial(n)) if self.mixes else (n, n)
        self.generate = Generator(site, n, sizes, 1e-20)
        empty = torch.empty(math.factorial(n), n, n, device=site.device, dtype=site.dtype)
        self.register_buffer("permutations", empty)  # saved, or loading after meta would miss it

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return H_res X + h_post f."""
        pre, post, *res = self.generate(stream)
        f = self.branch(self.norm_in(read(torch.sigmoid(pre), stream)), context)
        if self.mixes:
            stream = mix(self.permute(res[0].softmax(-1)), stream)
        return stream + write(2 * torch.sigmoid(post), f, stream)

    @in_float32
    def permute(self, weights: Tensor) -> Tensor:
        """Return the mean of permutation matrices `(..., n, n)` by `weights (..., n!)`."""
        return rows(weights @ wide(self.permutations).flatten(1), self.n)

    def reset_parameters(self) -> None:
        """Start with one stream ahead, nearly unmixed."""
        super().reset_parameters()
        ahead = one_of(self.site.index, self.n)
        orders = torch.tensor(list(itertools.permutations(range(self.n))))
        self.permutations.copy_(F.one_hot(orders, self.n))
        near = [0.0] + [-8.0] * (math.factorial(self.n) - 1)
        self.generate.fill(ahead, ahead, *([near] if self.mixes else []))


@register
class Krom(Streams):
    """X <- H_res X + h_post f, f = F(N(h_pre.X)), H_res a Kronecker product of 2x2 matrices.

    Zhou et al. 2026, KromHC (arXiv:2601.21579): n = 2^m, H_res = U_1 x ... x U_m, U = [[p, 1 - p],
    [1 - p, p]], (p, 1 - p) = softmax(.), doubly stochastic exactly with 2 m numbers. The arguments
    and the start of h_pre and h_post are those of mHC-lite; b of each U is (0, -8). The first and
    the last connection have no H_res, as in `mhc`.
    """

    name = "krom"
    equation = "x <- H_res X + h_post f,  f = F(N(h_pre.X)),  H_res = U_1 x ... x U_m"
    paper = "Zhou et al. 2026, arXiv:2601.21579"
    year = 2026
    at_start = "X + h_post F(N(h_pre.X)), nearly, h_pre = sigma(+-1), h_post = 2 sigma(+-1)"
    stream_law = "sqrt"
    gradient_law = "sqrt"
    drawing = Drawing(read="h_pre, N", write="h_post", skip="H_res", stream="X")

    def __init__(self, branch: Branch, site: Site, *, n: int = 4) -> None:
        super().__init__(branch, site, n)
        self.factors = n.bit_length() - 1
        self.mixes = not (site.first or site.last)
        sizes = (n, n, 2 * self.factors) if self.mixes else (n, n)
        self.generate = Generator(site, n, sizes, 1e-20)

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        """Refuse a number of streams that is not a power of 2."""
        super().check(options)
        n = options.get("n", 4)
        if n & (n - 1):
            raise ValueError(f"n={n} of krom must be a power of 2: 2, 4, 8 or 16")

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return H_res X + h_post f."""
        pre, post, *res = self.generate(stream)
        f = self.branch(self.norm_in(read(torch.sigmoid(pre), stream)), context)
        if self.mixes:
            stream = mix(self.kronecker(rows(res[0], self.factors).softmax(-1)), stream)
        return stream + write(2 * torch.sigmoid(post), f, stream)

    @staticmethod
    def kronecker(pairs: Tensor) -> Tensor:
        """Return H_res `(..., n, n)` from the `pairs (..., m, 2)` of p and 1 - p."""
        factors = torch.stack((pairs, pairs.flip(-1)), -2).unbind(-3)  # m of (..., 2, 2)
        product = factors[0]
        for U in factors[1:]:
            blocks = product[..., :, None, :, None] * U[..., None, :, None, :]
            product = blocks.flatten(-4, -3).flatten(-2)
        return product

    def reset_parameters(self) -> None:
        """Start with one stream ahead, nearly unmixed."""
        super().reset_parameters()
        ahead = one_of(self.site.index, self.n)
        self.generate.fill(ahead, ahead, *([[0.0, -8.0] * self.factors] if self.mixes else []))


class GatedRead(nn.Module):
    """h = (1/n) sum_i G_i * Z_i, Z_i = RMSNorm(X_i) (1 + g_i), G = sigma(U silu(V vec(Z) / n)).

    X `(..., n, D)` to h `(..., D)` and vec(Z) `(..., n D)`. V `(rank, n D)` and U `(n D, rank)`
    start with N(0, 0.02), g `(n, D)` at 0.
    """

    def __init__(self, site: Site, n: int, rank: int) -> None:
        super().__init__()
        self.n = n
        self.gain = site.new_parameter(n, site.dim)  # g
        self.down = site.new_linear(n * site.dim, rank)  # V
        self.up = site.new_linear(rank, n * site.dim)  # U
        self.reset_parameters()

    def forward(self, streams: Tensor) -> tuple[Tensor, Tensor]:
        """Return h and vec(Z)."""
        Z = F.rms_norm(streams, streams.shape[-1:], eps=1e-6) * (1 + self.gain)
        z = Z.flatten(-2)
        G = rows(torch.sigmoid(self.up(F.silu(self.down(z / self.n)))), self.n)
        return (G * Z).mean(-2), z

    def reset_parameters(self) -> None:
        """Start V and U small and g at 0."""
        nn.init.zeros_(self.gain)
        nn.init.normal_(self.down.weight, std=0.02)
        nn.init.normal_(self.up.weight, std=0.02)


@register
class GatedResidual(Wiring):
    """X <- X + s f^T, f = F(h), h = mean_i G_i * Z_i: each stream read through its own gate.

    Qiu et al. 2026, Gated Residual of Qwen3.8-Next (arXiv:2608.30320), equations 30 to 34: Z_i =
    RMSNorm(X_i) (1 + g_i), G = sigma(U silu(V vec(Z) / n)) elementwise, s = 2 sigma(W vec(Z) / n),
    no norm before F and no mixing matrix. Out: one more read, in place of the final norm. U, V and
    W start with N(0, 0.02), g at 0, as in the code before weights are loaded; the start of the
    training is not known. rank 0 stands for D / 8. With an optimiser that orthogonalises matrices
    (Muon) these three stay on AdamW.
    """

    name = "gated-residual"
    equation = "x <- X + s f^T,  f = F(mean_i G_i * Z_i),  Z_i = RMSNorm(X_i)"
    paper = "Qiu et al. 2026, arXiv:2608.30320"
    year = 2026
    at_start = "X + F(RMSNorm(x) / 2), nearly, in every stream"
    stream_law = "sqrt"
    gradient_law = "sqrt"
    limits = {"n": (1, 16), "rank": (0, math.inf)}
    drawing = Drawing(read="gated mean", write="s", stream="X")
    ships = "Qwen3.8-Flash-Next"

    def __init__(self, branch: Branch, site: Site, *, n: int = 4, rank: int = 0) -> None:
        super().__init__(branch, site)
        self.n = n
        self.rank = rank
        width = rank or max(1, site.dim // 8)
        self.read = GatedRead(site, n, width)
        self.write = self.new_linear(n * site.dim, n)  # W
        self.read_close = GatedRead(site, n, width) if site.last else None

    def open(self, x: Tensor) -> Tensor:
        """Return n rows of x `(..., D)`: `(..., n, D)`."""
        return x.unsqueeze(-2).expand(*x.shape[:-1], self.n, x.shape[-1])

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return X + s f^T."""
        h, z = self.read(stream)
        s = 2 * torch.sigmoid(self.write(z / self.n))  # (..., n)
        return stream + write(s, self.branch(h, context), stream)

    def close(self, stream: Tensor) -> Tensor:
        """Return one more read `(..., D)`, which is normalised."""
        assert self.read_close is not None
        h: Tensor = self.read_close(stream)[0]
        return h

    def present(self, stream: Tensor) -> Tensor:
        """Return the mean of the streams."""
        return stream.mean(-2)

    def groups(self) -> Mapping[str, Group]:
        """The gains of the norms do not decay, although they have two axes."""
        names = (name for name, _ in self.named_parameters() if name.endswith(".gain"))
        return {name: Group(weight_decay=0.0) for name in names if "branch" not in name}

    def reset_parameters(self) -> None:
        """Start W small."""
        super().reset_parameters()
        nn.init.normal_(self.write.weight, std=0.02)


@register
class Reversible(Wiring):
    """(a, b) <- (b, a + F(N(b))): two streams in turn, whose past can be computed back.

    Gomez et al. 2017, RevNet (arXiv:1707.04585), equations 6 and 7; Kitaev et al. 2020, Reformer
    (arXiv:2001.04451), section 3: y1 = x1 + F(x2), y2 = x2 + G(y1). a and b start as copies of x
    and end as their mean. In training the stack keeps no activations: on the way back each
    connection inverts itself, so activation memory does not grow with depth (but for 5 KB where a
    branch draws random numbers), for one more forward pass and some rounding (float32: gradients to
    1e-5; bfloat16: twice the usual error). It takes the plain path under the compiler, where no
    gradient is recorded, with a key-value cache, under torch.func's transforms, and for parameters
    sharded by FSDP2. A branch runs twice a step: one
    that counts its calls (batch norm's running statistics) counts both, one that leaves values for
    later branches is refused, and a tensor that it holds beside its parameters gets no gradient.
    Under DDP all gradients arrive at once, at the end. Forward-mode differentiation and a second
    backward pass are refused by autograd; with `stack.observed = True` the plain loop does both.
    """

    name = "reversible"
    equation = "x <- a + F(N(b)), then a and b in turn"
    paper = "Gomez et al. 2017, arXiv:1707.04585"
    year = 2017
    at_start = "(b, a + F(N(b)))"
    final_norm = True
    stream_law = "sqrt"
    gradient_law = "sqrt"
    drawing = Drawing(read="N", after="swap", stream="a, b")
    ships = "Reformer (transformers, trax)"

    def __init__(self, branch: Branch, site: Site) -> None:
        super().__init__(branch, site)
        self.norm_in = self.new_norm()

    def open(self, x: Tensor) -> Pair:
        """Return (x, x)."""
        return x, x

    def forward(self, stream: Pair, context: Context) -> Pair:
        """Return (b, a + F(N(b)))."""
        a, b = stream
        return b, a + self.branch(self.norm_in(b), context)

    def close(self, stream: Pair) -> Tensor:
        """Return (a + b) / 2."""
        return (stream[0] + stream[1]) / 2

    def present(self, stream: Pair) -> Tensor:
        """Return the one that was written last."""
        return stream[1]

    @classmethod
    def run(cls, connections: Iterable[Wiring], stream: Pair, context: Context) -> Pair:
        """Run without keeping activations where that can be done, else the plain loop."""
        connections = list(connections)
        own = [{n: p for n, p in c.named_parameters() if p.requires_grad} for c in connections]
        parameters = [p for named in own for p in named.values()]
        if (
            torch.compiler.is_compiling()
            or not torch.is_grad_enabled()
            or context.cache is not None
            or torch._C._functorch.peek_interpreter_stack() is not None
            or any(type(p) not in (nn.Parameter, Tensor) for p in parameters)  # DTensor
        ):
            plain: Pair = super().run(connections, stream, context)
            return plain
        names = [list(named) for named in own]
        inputs = (connections, names, context, *stream, *parameters)
        done: Pair = Inverted.apply(*inputs)  # type: ignore[no-untyped-call]
        if context.values:
            raise ValueError(
                "reversible computes each branch again by itself; "
                f"a branch that leaves {', '.join(context.values)} for later ones cannot be used"
            )
        return done
