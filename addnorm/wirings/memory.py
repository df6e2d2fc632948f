"""What else is read: the embedding, the outputs of earlier layers, attention over depth.

Letters: x the stream `(..., D)`, x0 the embedding, F the branch without its norm, N a norm over
the last axis, L layers, l the layer counted from 0. A history is a tuple of tensors `(..., D)`
that are passed on, never copied; where there is a present x it stands first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from addnorm.branches import Branch, Context, Site, wide
from addnorm.contract import Drawing, Wiring, register


@register
class Inject(Wiring):
    """x <- r x + m x0 at the start of a layer; x <- x + F(N(x)): the embedding comes back.

    Karpathy 2026, nanochat (github.com/karpathy/nanochat, gpt.py): r starts at 1.15 - 0.10 l/(L-1)
    and m at 0.20 - 0.15 l/(L-1), learned scalars of the layer; x0 = N(embedding). nanochat's norms
    have no gain, and it trains r and m at rates of their own.
    """

    name = "inject"
    equation = "x <- x + F(N(x)); at a layer's start x <- r x + m x0"
    paper = "Karpathy 2026, github.com/karpathy/nanochat"
    year = 2026
    at_start = "r x + m x0, then x + F(N(x)); r = 1.15 - 0.10 l/(L-1), m = 0.20 - 0.15 l/(L-1)"
    final_norm = True
    stream_law = "geometric"
    gradient_law = "geometric"
    drawing = Drawing(read="N", skip="r x + m x0", stream="x, x0")
    ships = "nanochat, modded-nanogpt"

    def __init__(self, branch: Branch, site: Site) -> None:
        super().__init__(branch, site)
        self.norm_open = self.new_norm() if site.first else None
        self.norm_in = self.new_norm()
        self.mixes = site.part == 0
        if self.mixes:
            self.keep = self.new_parameter(1)  # r
            self.inject = self.new_parameter(1)  # m

    def open(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (x0, x0), x0 = N(x)."""
        assert self.norm_open is not None
        x = self.norm_open(x)
        return x, x

    def forward(self, stream: tuple[Tensor, Tensor], context: Context) -> tuple[Tensor, Tensor]:
        """Return (x + F(N(x)), x0), x mixed with x0 before at the start of a layer."""
        x, x0 = stream
        if self.mixes:
            x = self.keep * x + self.inject * x0
        return x + self.branch(self.norm_in(x), context), x0

    def close(self, stream: tuple[Tensor, Tensor]) -> Tensor:
        """Return x."""
        return stream[0]

    def reset_parameters(self) -> None:
        """Start r and m by the layer."""
        super().reset_parameters()
        if self.mixes:
            depth = self.site.layer / max(self.site.layers - 1, 1)
            nn.init.constant_(self.keep, 1.15 - 0.10 * depth)
            nn.init.constant_(self.inject, 0.20 - 0.15 * depth)


@register
class UNet(Wiring):
    """x <- x + F(N(x)); a layer of the second half starts with x <- x + w s, s the last left.

    Modded-nanogpt, November 2024 (github.com/KellerJordan/modded-nanogpt): the first L // 2 layers
    leave their output on a stack, as many after them take one each, in reverse order. w is a
    learned scalar of the layer that starts at 1; parameter-golf has a vector. With an odd L the
    last layer takes none, as in parameter-golf; modded-nanogpt is defined for an even L.
    """

    name = "unet"
    equation = "x <- x + F(N(x)); in the second half of the layers x <- x + w s before"
    paper = "Jordan et al. 2024, github.com/KellerJordan/modded-nanogpt"
    year = 2024
    at_start = "x + F(N(x)), and x + s before"
    final_norm = True
    stream_law = "linear"
    gradient_law = "linear"
    drawing = Drawing(read="N", skip="+ w s", stream="x, s..")
    ships = "modded-nanogpt (2024), parameter-golf"

    def __init__(self, branch: Branch, site: Site) -> None:
        super().__init__(branch, site)
        layer, half = site.index // site.parts, site.count // site.parts // 2  # of the stack
        takes = site.part == 0 and half <= layer < 2 * half
        self.leaves = site.part == site.parts - 1 and layer < half
        self.norm_in = self.new_norm()
        self.weight = self.new_parameter(1) if takes else None

    def open(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return (x,)."""
        return (x,)

    def forward(self, stream: tuple[Tensor, ...], context: Context) -> tuple[Tensor, ...]:
        """Return (x + F(N(x)), s...) with one s more or less."""
        x, *left = stream
        if self.weight is not None:
            x = x + self.weight * left.pop()
        x = x + self.branch(self.norm_in(x), context)
        return (x, *left, x) if self.leaves else (x, *left)

    def close(self, stream: tuple[Tensor, ...]) -> Tensor:
        """Return x."""
        return stream[0]

    def reset_parameters(self) -> None:
        """Start w at 1."""
        super().reset_parameters()
        if self.weight is not None:
            nn.init.ones_(self.weight)


@register
class DenseFormer(Wiring):
    """x <- x + F(N(x)); after layer l x <- sum_j alpha_j X_j over the outputs of all layers.

    Pagliardini et al. 2024 (arXiv:2402.02622), section 3. X_0 is the embedding, X_{j+1} what layer
    j put out before its average. alpha starts at 1 for the newest and 0 for the others. Of the
    outputs only every `dilation`-th back from the newest is read, and only every `period`-th layer
    averages.
    """

    name = "denseformer"
    equation = "x <- x + F(N(x)); at a layer's end x <- sum_j alpha_j X_j"
    paper = "Pagliardini et al. 2024, arXiv:2402.02622"
    year = 2024
    at_start = "x + F(N(x))"
    final_norm = True
    stream_law = "sqrt"
    gradient_law = "sqrt"
    limits = {"dilation": (1, math.inf), "period": (1, math.inf)}
    drawing = Drawing(read="N", after="sum a X", stream="x, X..")

    def __init__(self, branch: Branch, site: Site, *, dilation: int = 1, period: int = 1) -> None:
        super().__init__(branch, site)
        self.dilation = dilation
        self.period = period
        self.norm_in = self.new_norm()
        self.ends_layer = site.part == site.parts - 1
        newest = site.index // site.parts + 1  # the index of what this layer puts out
        self.sources = range(newest % dilation, newest + 1, dilation)
        averages = self.ends_layer and newest % period == 0
        self.alpha = self.new_parameter(len(self.sources)) if averages else None

    def open(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return (x, X_0)."""
        return x, x

    def forward(self, stream: tuple[Tensor, ...], context: Context) -> tuple[Tensor, ...]:
        """Return (x, X_0, ...), with one X more at the end of a layer."""
        x, *outputs = stream
        x = x + self.branch(self.norm_in(x), context)
        if self.ends_layer:
            outputs.append(x)
        if self.alpha is not None:
            terms = zip(self.alpha, self.sources, strict=True)
            x = sum_of(a * outputs[j] for a, j in terms)
        return (x, *outputs)

    def close(self, stream: tuple[Tensor, ...]) -> Tensor:
        """Return x."""
        return stream[0]

    def reset_parameters(self) -> None:
        """Start alpha one-hot on the newest."""
        super().reset_parameters()
        if self.alpha is not None:
            with torch.no_grad():
                self.alpha.zero_()[-1] = 1.0


@register
class Laurel(Wiring):
    """x <- x + F(N(x)) + A B x: a learned low-rank shortcut beside the identity.

    Menghani et al. 2024, LAuReL-LR (arXiv:2411.07501), section 2. The paper leaves the start of A
    `(D, rank)` and B `(rank, D)` open: B is N(0, 1/D), A is 0 here, so that it starts as pre-norm,
    and `verified` is false. Gemma 3n ships another form around its attention: x and u + N(A B u),
    u = N(x), are added and divided by sqrt(2), rank 64.
    """

    name = "laurel"
    equation = "x <- x + F(N(x)) + A B x"
    paper = "Menghani et al. 2024, arXiv:2411.07501"
    year = 2024
    at_start = "x + F(N(x))"
    final_norm = True
    stream_law = "sqrt"
    gradient_law = "sqrt"
    verified = False
    limits = {"rank": (1, math.inf)}
    drawing = Drawing(read="N", skip="1 + A B")
    ships = "Gemma 3n (another form)"

    def __init__(self, branch: Branch, site: Site, *, rank: int = 16) -> None:
        super().__init__(branch, site)
        self.rank = rank
        self.norm_in = self.new_norm()
        self.down = self.new_linear(site.dim, rank)  # B
        self.up = self.new_linear(rank, site.dim)  # A

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return x + F(N(x)) + A B x."""
        f = self.branch(self.norm_in(stream), context)
        shortcut: Tensor = self.up(self.down(stream))
        return stream + f + shortcut

    def reset_parameters(self) -> None:
        """Start B with N(0, 1/D) and A at 0."""
        super().reset_parameters()
        nn.init.normal_(self.down.weight, std=self.site.dim**-0.5)
        nn.init.zeros_(self.up.weight)


class DepthAttention(nn.Module):
    """h = sum_i p_i v_i, p = softmax_i(w . RMSNorm(v_i)): attention over depth with one query.

    `sources` of S tensors `(..., D)` to `(..., D)`. w starts at 0, as the paper demands, so that h
    is their mean. Scores and softmax are taken in float32 at least; there is no 1/sqrt(D).
    """

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.query = site.new_parameter(site.dim)
        self.gain = site.new_parameter(site.dim)  # of the RMSNorm
        self.reset_parameters()

    def forward(self, sources: tuple[Tensor, ...]) -> Tensor:
        """Return h."""
        w = wide(self.query) * self.gain
        scores = [self.score(v, w) for v in sources]  # S of (...)
        p = torch.stack(scores, -1).softmax(-1).to(sources[0].dtype)  # (..., S)
        return sum_of(q * v for q, v in zip(torch.split(p, 1, -1), sources, strict=True))

    @staticmethod
    def score(v: Tensor, w: Tensor) -> Tensor:
        """Return w . RMSNorm(v), without a wide copy of v, which autograd would keep each time."""
        length = torch.linalg.vector_norm(v, dim=-1, dtype=w.dtype)
        return (v * w).sum(-1) * torch.rsqrt(length.square() / v.shape[-1] + 1e-6)

    def reset_parameters(self) -> None:
        """Start w at 0 and the gain at 1."""
        nn.init.zeros_(self.query)
        nn.init.ones_(self.gain)


@register
class AttnRes(Wiring):
    """x <- F(N(h)), h = sum_i softmax_i(w . RMSNorm(v_i)) v_i over v_0 = x0 and all outputs v_i.

    Kimi Team 2026, Attention Residuals (arXiv:2603.15031), equations 4 and 5: there is no sum, each
    connection attends over the embedding and the outputs of all earlier connections with one
    learned query. A last query reads what the final norm gets. The first connection has one source
    and no query.
    """

    name = "attnres"
    equation = "x <- F(N(h)),  h = sum_i softmax_i(w . RMSNorm(v_i)) v_i"
    paper = "Kimi Team 2026, arXiv:2603.15031"
    year = 2026
    at_start = "F(N(h)), h the mean of x0 and all outputs"
    final_norm = True
    stream_law = "constant"
    gradient_law = "constant"
    drawing = Drawing(read="attend, N", stream="v..", join="append")

    def __init__(self, branch: Branch, site: Site) -> None:
        super().__init__(branch, site)
        self.read = None if site.first else DepthAttention(site)
        self.norm_in = self.new_norm()
        self.read_close = DepthAttention(site) if site.last else None

    def open(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return (v_0,)."""
        return (x,)

    def forward(self, stream: tuple[Tensor, ...], context: Context) -> tuple[Tensor, ...]:
        """Return (v_0, ..., F(N(h)))."""
        h = stream[0] if self.read is None else self.read(stream)
        f = self.branch(self.norm_in(h), context)
        return (*stream, f.to(h.dtype))  # 16 bits under autocast, and kept for all that follow

    def close(self, stream: tuple[Tensor, ...]) -> Tensor:
        """Return one more read."""
        assert self.read_close is not None
        h: Tensor = self.read_close(stream)
        return h

    def present(self, stream: tuple[Tensor, ...]) -> Tensor:
        """Return the newest."""
        return stream[-1]


@register
class BlockAttnRes(Wiring):
    """x <- b + F(N(h)), b the sum in the present block, h attends over blocks instead of outputs.

    Kimi Team 2026, Attention Residuals (arXiv:2603.15031), section 3.2: `size` connections make a
    block; a connection attends over the embedding, the sums of the completed blocks, and the
    running sum of its own unless it is the first there. "Layer" in the paper is a connection here.
    The paper recommends about 8 blocks; one block of all is not pre-norm, because the embedding
    stays a source of its own. Other code (open-attention-residuals) keeps a cumulative sum and
    adds a recency bias; that is not the paper's.
    """

    name = "attnres-block"
    equation = "x <- b + F(N(h)),  h = sum_i softmax_i(w . RMSNorm(b_i)) b_i"
    paper = "Kimi Team 2026, arXiv:2603.15031"
    year = 2026
    at_start = "b + F(N(h)), h the mean of x0 and the blocks' sums"
    final_norm = True
    stream_law = "constant"
    gradient_law = "constant"
    limits = {"size": (1, math.inf)}
    drawing = Drawing(read="attend, N", skip="b", stream="b..")
    ships = "Kimi K3, and an experiment with Kimi-Linear-48B"

    def __init__(self, branch: Branch, site: Site, *, size: int = 4) -> None:
        super().__init__(branch, site)
        self.size = size
        self.starts_block = site.index % size == 0
        self.read = None if site.first else DepthAttention(site)
        self.norm_in = self.new_norm()
        self.read_close = DepthAttention(site) if site.last else None

    def open(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return (b_0,), the embedding."""
        return (x,)

    def forward(self, stream: tuple[Tensor, ...], context: Context) -> tuple[Tensor, ...]:
        """Return (b_0, ..., b_n) with the update in b_n, a new one at the start of a block."""
        h = stream[0] if self.read is None else self.read(stream)
        f = self.branch(self.norm_in(h), context).to(h.dtype)
        if self.starts_block:
            return (*stream, f)
        return (*stream[:-1], stream[-1] + f)

    def close(self, stream: tuple[Tensor, ...]) -> Tensor:
        """Return one more read."""
        assert self.read_close is not None
        h: Tensor = self.read_close(stream)
        return h

    def present(self, stream: tuple[Tensor, ...]) -> Tensor:
        """Return the newest."""
        return stream[-1]


def sum_of(terms: Iterator[Tensor]) -> Tensor:
    """Return the sum of at least one tensor; each is made when it is added, so no copy of all."""
    total = next(terms)
    for term in terms:
        total = total + term
    return total
