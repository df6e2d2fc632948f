"""Where the norm sits: the update is normalised before, after or not at all.

Letters: x the stream `(..., D)`, F the branch without its norm, N a norm over the last axis
(LayerNorm or RMSNorm), L layers and K connections of the network, l the layer counted from 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from addnorm.branches import Branch, Context, Site
from addnorm.contract import Drawing, Wiring, register

Activation = Literal["none", "relu", "gelu", "silu", "tanh"]


def activate(name: Activation, x: Tensor) -> Tensor:
    """Return the activation of that name, or x itself."""
    return x if name == "none" else getattr(F, name)(x)


@register
class Plain(Wiring):
    """x <- act(F(N(x))), by default without N and act: no residual connection, the baseline.

    He et al. 2015 (arXiv:1512.03385), the "plain" networks of section 3.3.
    """

    name = "plain"
    equation = "x <- F(x)"
    paper = "He et al. 2015, arXiv:1512.03385"
    year = 2015
    at_start = "F(x)"
    start = "fairseq"
    stream_law = "vanishing"
    gradient_law = "vanishing"
    expected = frozenset({"vanishing-gradient", "rank-collapse"})
    drawing = Drawing(skip="none")
    ships = "VGG and the other nets before ResNet"

    def __init__(
        self, branch: Branch, site: Site, *, norm: bool = False, act: Activation = "none"
    ) -> None:
        super().__init__(branch, site)
        self.norm = norm
        self.act: Activation = act
        self.norm_in = self.new_norm() if norm else None

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return act(F(N(x)))."""
        x = stream if self.norm_in is None else self.norm_in(stream)
        return activate(self.act, self.branch(x, context))


@register
class Residual(Wiring):
    """x <- x + F(x): the identity shortcut alone, without a norm.

    He et al. 2015 (arXiv:1512.03385), equation 1; with a pre-activation branch it is the unit of
    He et al. 2016 (arXiv:1603.05027), equation 4: ResNet v2.
    """

    name = "residual"
    equation = "x <- x + F(x)"
    paper = "He et al. 2015, arXiv:1512.03385"
    year = 2015
    at_start = "x + F(x)"
    start = "fairseq"
    stream_law = "geometric"
    gradient_law = "geometric"
    expected = frozenset({"exploding-gradient"})
    ships = "ResNet v2 (pre-activation)"

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return x + F(x)."""
        return stream + self.branch(stream, context)


@register
class PostAct(Wiring):
    """x <- act(x + F(x)): the activation after the addition, ResNet v1.

    He et al. 2015 (arXiv:1512.03385), equation 1 and figure 2, act = ReLU. The branch is
    conv-BN-ReLU-conv-BN; no final norm.
    """

    name = "postact"
    equation = "x <- act(x + F(x))"
    paper = "He et al. 2015, arXiv:1512.03385"
    year = 2015
    at_start = "relu(x + F(x))"
    start = "he"
    stream_law = "geometric"
    gradient_law = "geometric"
    expected = frozenset({"exploding-gradient", "non-finite", "rank-collapse"})
    drawing = Drawing(after="act")
    ships = "ResNet v1 (torchvision, timm)"

    def __init__(self, branch: Branch, site: Site, *, act: Activation = "relu") -> None:
        super().__init__(branch, site)
        self.act: Activation = act

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return act(x + F(x))."""
        return activate(self.act, stream + self.branch(stream, context))


@register
class PostNorm(Wiring):
    """x <- N(x + F(x)): the Add & Norm of the original Transformer.

    Vaswani et al. 2017 (arXiv:1706.03762), section 3.1. Deep stacks need learning-rate warm-up
    (Xiong et al. 2020, arXiv:2002.04745).
    """

    name = "postnorm"
    equation = "x <- N(x + F(x))"
    paper = "Vaswani et al. 2017, arXiv:1706.03762"
    year = 2017
    at_start = "N(x + F(x))"
    start = "fairseq"
    stream_law = "constant"
    gradient_law = "constant"
    expected = frozenset({"post-norm-needs-warmup"})
    drawing = Drawing(after="N")
    ships = "the original Transformer, BERT"

    def __init__(self, branch: Branch, site: Site) -> None:
        super().__init__(branch, site)
        self.norm = self.new_norm()

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return N(x + F(x))."""
        return self.norm(stream + self.branch(stream, context))


@register
class PreNorm(Wiring):
    """x <- x + F(N(x)): the norm inside the branch, the stream left alone.

    Xiong et al. 2020 (arXiv:2002.04745), figure 1b; GPT-2. Needs a final norm. The code that
    OpenAI published for GPT-2 starts every matrix with 0.02; the 1/sqrt(K) on the output
    matrices, used here, stands in the report, section 2.3.
    """

    name = "prenorm"
    equation = "x <- x + F(N(x))"
    paper = "Xiong et al. 2020, arXiv:2002.04745"
    year = 2020
    at_start = "x + F(N(x))"
    final_norm = True
    stream_law = "sqrt"
    gradient_law = "sqrt"
    drawing = Drawing(read="N")
    ships = "GPT-2, LLaMA, Qwen 3, Mistral and most others"

    def __init__(self, branch: Branch, site: Site) -> None:
        super().__init__(branch, site)
        self.norm_in = self.new_norm()

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return x + F(N(x))."""
        return stream + self.branch(self.norm_in(stream), context)


@register
class Sandwich(Wiring):
    """x <- x + N_out(F(N_in(x))): a norm on both sides of the branch.

    Ding et al. 2021, CogView (arXiv:2105.13290), section 2.4 "Sandwich-LN". CogView's code also
    divides by the maximum over the whole tensor; that mixes examples and is left out.
    """

    name = "sandwich"
    equation = "x <- x + N_out(F(N_in(x)))"
    paper = "Ding et al. 2021, arXiv:2105.13290"
    year = 2021
    at_start = "x + N(F(N(x)))"
    final_norm = True
    stream_law = "sqrt"
    gradient_law = "sqrt"
    drawing = Drawing(read="N", write="N")
    ships = "CogView; Gemma 2, 3 and 4 with RMSNorm"

    def __init__(self, branch: Branch, site: Site) -> None:
        super().__init__(branch, site)
        self.norm_in = self.new_norm()
        self.norm_out = self.new_norm()

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return x + N_out(F(N_in(x)))."""
        return stream + self.norm_out(self.branch(self.norm_in(stream), context))


@register
class Peri(Wiring):
    """x <- x + N_out(F(N_in(x))), and x0 <- N_0(x0): sandwich with a norm on the embedding.

    Kim et al. 2025, Peri-LN (arXiv:2502.02732), section 3. OLMo-core's block of this name leaves
    the norm on the embedding out, as `sandwich` does; the paper has it.
    """

    name = "peri"
    equation = "x <- x + N_out(F(N_in(x)))"
    paper = "Kim et al. 2025, arXiv:2502.02732"
    year = 2025
    at_start = "x + N(F(N(x))), x0 = N(embedding)"
    final_norm = True
    stream_law = "sqrt"
    gradient_law = "sqrt"
    drawing = Drawing(read="N", write="N")
    ships = "OLMo-core (without the norm on the embedding)"

    def __init__(self, branch: Branch, site: Site) -> None:
        super().__init__(branch, site)
        self.norm_open = self.new_norm() if site.first else None
        self.norm_in = self.new_norm()
        self.norm_out = self.new_norm()

    def open(self, x: Tensor) -> Tensor:
        """Return N_0(x)."""
        assert self.norm_open is not None
        return self.norm_open(x)

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return x + N_out(F(N_in(x)))."""
        return stream + self.norm_out(self.branch(self.norm_in(stream), context))


@register
class Reordered(Wiring):
    """x <- x + N(F(x)): the norm moved behind the branch.

    Liu et al. 2021, Swin v2 (arXiv:2111.09883), section 3.2 "res-post-norm"; OLMo 2 (Team OLMo
    2024, arXiv:2501.00656), section 3.3.2, which adds QK-norm, an option of the attention. Every
    matrix starts with N(0, 0.02).
    """

    name = "reordered"
    equation = "x <- x + N(F(x))"
    paper = "Liu et al. 2021, arXiv:2111.09883"
    year = 2021
    at_start = "x + N(F(x))"
    final_norm = True
    start = "normal"
    stream_law = "sqrt"
    gradient_law = "sqrt"
    drawing = Drawing(write="N")
    ships = "Swin v2, OLMo 2 and 3"

    def __init__(self, branch: Branch, site: Site) -> None:
        super().__init__(branch, site)
        self.norm_out = self.new_norm()

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return x + N(F(x))."""
        return stream + self.norm_out(self.branch(stream, context))


@register
class MixLN(Wiring):
    """x <- N(x + F(x)) in the first floor(fraction L) layers, x <- x + F(N(x)) in the others.

    Li et al. 2024, Mix-LN (arXiv:2412.13795), section 3.2; fraction 0.25, about 0.06 at 7B. The
    authors' repository has a `deeppost` beside it that fixes alpha at the value of 32 layers and
    inverts DeepNorm's beta; it is not used here.
    """

    name = "mixln"
    equation = "x <- N(x + F(x)) below fraction L layers, x + F(N(x)) above"
    paper = "Li et al. 2024, arXiv:2412.13795"
    year = 2024
    at_start = "N(x + F(x)) below, x + F(N(x)) above"
    final_norm = True
    start = "normal"
    stream_law = "constant"
    gradient_law = "constant"
    limits = {"fraction": (0, 1)}
    drawing = Drawing(read="N above", after="N below")

    def __init__(self, branch: Branch, site: Site, *, fraction: float = 0.25) -> None:
        super().__init__(branch, site)
        self.fraction = fraction
        self.post = site.layer < math.floor(fraction * site.layers + 1e-9)  # 0.58 of 50 is 29
        if self.post:
            self.norm = self.new_norm()
        else:
            self.norm_in = self.new_norm()

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return N(x + F(x)) or x + F(N(x))."""
        if self.post:
            return self.norm(stream + self.branch(stream, context))
        return stream + self.branch(self.norm_in(stream), context)


@register
class DeepNorm(Wiring):
    """x <- N(alpha x + F(x)), alpha = K^(1/4): post-norm with a heavier skip.

    Wang et al. 2022 (arXiv:2203.00555), table 2, decoder-only or encoder-only with N layers:
    alpha = (2N)^(1/4), beta = (8N)^(-1/4). In connections, K = 2N: alpha = K^(1/4) and
    beta = (4K)^(-1/4). The value, feed-forward and output matrices start as Xavier times beta,
    query and key as Xavier. The encoder-decoder form is not here; in it
    torchscale's code has beta = 1.15 (N^4 M)^(-1/16) where the paper has 0.87.
    """

    name = "deepnorm"
    equation = "x <- N(alpha x + F(x)),  alpha = K^(1/4)"
    paper = "Wang et al. 2022, arXiv:2203.00555"
    year = 2022
    at_start = "N(alpha x + F(x)), with F scaled by beta = (4K)^(-1/4)"
    start = "xavier"
    stream_law = "constant"
    gradient_law = "constant"
    drawing = Drawing(skip="alpha", after="N")
    ships = "torchscale, GLM-130B"

    def __init__(self, branch: Branch, site: Site) -> None:
        super().__init__(branch, site)
        self.alpha = site.connections**0.25
        self.beta = (4 * site.connections) ** -0.25
        self.norm = self.new_norm()

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return N(alpha x + F(x))."""
        return self.norm(self.alpha * stream + self.branch(stream, context))

    def gains(self) -> Mapping[str, float]:
        """Put beta on value, in and out; query and key keep gain 1."""
        return {"value": self.beta, "in": self.beta, "out": self.beta}


@register
class Admin(Wiring):
    """x <- N(omega * x + F(x)), omega a learned vector that starts by depth: post-norm.

    Liu et al. 2020 (arXiv:2004.08249), section 4.2. The paper starts omega from the variances of
    a profiling pass over data; this is the form of the authors' later package admin-torch, which
    needs none: the output changes as `change` says when the parameters change. "log":
    sqrt((K + 1) / ln(K + 1) - 1), O(log K); "constant": sqrt(K), O(1); "linear": 1, O(K). Omega is
    a learned vector as in the paper's code; admin-torch keeps it fixed unless asked.
    """

    name = "admin"
    equation = "x <- N(omega * x + F(x))"
    paper = "Liu et al. 2020, arXiv:2004.08249"
    year = 2020
    at_start = "N(omega x + F(x)), omega = sqrt((K+1)/ln(K+1) - 1)"
    start = "fairseq"
    stream_law = "constant"
    gradient_law = "constant"
    drawing = Drawing(skip="omega", after="N")
    ships = "admin-torch, Transformer-Clinic"

    def __init__(
        self, branch: Branch, site: Site, *, change: Literal["log", "constant", "linear"] = "log"
    ) -> None:
        super().__init__(branch, site)
        self.change = change
        self.omega = self.new_parameter(site.dim)
        self.norm = self.new_norm()

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return N(omega * x + F(x))."""
        return self.norm(self.omega * stream + self.branch(stream, context))

    def reset_parameters(self) -> None:
        """Start omega by the number of connections."""
        super().reset_parameters()
        K = self.site.connections
        omega = {
            "log": math.sqrt((K + 1) / math.log(K + 1) - 1),
            "constant": math.sqrt(K),
            "linear": 1.0,
        }
        nn.init.constant_(self.omega, omega[self.change])


@register
class B2T(Wiring):
    """x <- N(x + F(x)), and at the end of a layer N(x0 + x + F(x)), x0 what entered the layer.

    Takase et al. 2022, bottom-to-top connection (arXiv:2206.00330), section 4. The skip starts at
    the input of the layer and joins before its last norm. A layer of one connection has no skip
    to add and is post-norm. The authors' code also multiplies every matrix by L^(-1/2); the paper
    does not, and neither does this.
    """

    name = "b2t"
    equation = "x <- N(x + F(x)); at a layer's end N(x0 + x + F(x))"
    paper = "Takase et al. 2022, arXiv:2206.00330"
    year = 2022
    at_start = "N(x + F(x)); N(x0 + x + F(x))"
    start = "fairseq"
    stream_law = "constant"
    gradient_law = "constant"
    drawing = Drawing(skip="+ x0", after="N")

    def __init__(self, branch: Branch, site: Site) -> None:
        super().__init__(branch, site)
        self.ends_layer = site.part == site.parts - 1
        self.top = self.ends_layer and site.parts > 1
        self.norm = self.new_norm()

    def open(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (x, x0)."""
        return x, x

    def forward(self, stream: tuple[Tensor, Tensor], context: Context) -> tuple[Tensor, Tensor]:
        """Return (N(x + F(x)), x0), or N(x0 + x + F(x)) as both."""
        x, bottom = stream
        x = x + self.branch(x, context)
        if self.top:
            x = bottom + x
        x = self.norm(x)
        return x, x if self.ends_layer else bottom

    def close(self, stream: tuple[Tensor, Tensor]) -> Tensor:
        """Return x."""
        return stream[0]


@register
class ResiDual(Wiring):
    """x <- N(x + F(x)), r <- r + F(x); out x + N_d(r): a post-norm and a pre-norm stream.

    Xie et al. 2023 (arXiv:2304.14802), equation 7. r starts as the embedding, N_d is the final
    norm. The scale of r that float16 needs is left out: it does not change N_d(r).
    """

    name = "resi-dual"
    equation = "x <- N(x + F(x)), r <- r + F(x); out x + N_d(r)"
    paper = "Xie et al. 2023, arXiv:2304.14802"
    year = 2023
    at_start = "N(x + F(x)), r + F(x)"
    start = "fairseq"
    stream_law = "constant"
    gradient_law = "constant"
    drawing = Drawing(after="N", stream="x, r")
    ships = "x-transformers (resi_dual)"

    def __init__(self, branch: Branch, site: Site) -> None:
        super().__init__(branch, site)
        self.norm = self.new_norm()
        self.norm_close = self.new_norm() if site.last else None

    def open(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (x, r), both x."""
        return x, x

    def forward(self, stream: tuple[Tensor, Tensor], context: Context) -> tuple[Tensor, Tensor]:
        """Return (N(x + F(x)), r + F(x))."""
        x, r = stream
        f = self.branch(x, context)
        return self.norm(x + f), r + f

    def close(self, stream: tuple[Tensor, Tensor]) -> Tensor:
        """Return x + N_d(r)."""
        x, r = stream
        assert self.norm_close is not None
        return x + self.norm_close(r)


@register
class LayerNormScaling(Wiring):
    """x <- x + F(N(x) / sqrt(l)), l the layer from 1, the same for all of its connections.

    Sun et al. 2025, "The Curse of Depth" (arXiv:2502.05795), section 4. Every matrix starts with
    N(0, 0.02): do not combine it with the start `gpt2`, whose 1/sqrt(K) would damp twice. In the
    authors' repository as last seen no branch runs (a name is lower-cased, then compared with
    capitals), so its block is the identity; this follows the paper.
    """

    name = "lns"
    equation = "x <- x + F(N(x) / sqrt(l))"
    paper = "Sun et al. 2025, arXiv:2502.05795"
    year = 2025
    at_start = "x + F(N(x) / sqrt(l))"
    final_norm = True
    start = "normal"
    stream_law = "sqrt"
    gradient_law = "sqrt"
    drawing = Drawing(read="N/sqrt(l)")
    ships = "OLMo-core"

    def __init__(self, branch: Branch, site: Site) -> None:
        super().__init__(branch, site)
        self.scale = (site.layer + 1) ** -0.5
        self.norm_in = self.new_norm()

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return x + F(N(x) / sqrt(l))."""
        return stream + self.branch(self.norm_in(stream) * self.scale, context)


@register
class GPAS(Wiring):
    """x <- y - silu(g) sg(y), y = x + F(N(x)), sg without gradient: pre-norm, damped.

    Chen et al. 2025 (arXiv:2506.22049), equation 5: the forward value shrinks, the gradient does
    not. g is a learned scalar that starts at 0. One g for each connection; the authors' code
    has one for each layer, shared by its two connections.
    """

    name = "gpas"
    equation = "x <- y - silu(g) sg(y),  y = x + F(N(x))"
    paper = "Chen et al. 2025, arXiv:2506.22049"
    year = 2025
    at_start = "x + F(N(x))"
    final_norm = True
    stream_law = "sqrt"
    gradient_law = "sqrt"
    drawing = Drawing(read="N", after="1-silu(g)")

    def __init__(self, branch: Branch, site: Site) -> None:
        super().__init__(branch, site)
        self.norm_in = self.new_norm()
        self.gate = self.new_parameter(1)

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return y - silu(g) sg(y)."""
        y = stream + self.branch(self.norm_in(stream), context)
        return y - F.silu(self.gate) * y.detach()

    def reset_parameters(self) -> None:
        """Start g at 0."""
        super().reset_parameters()
        nn.init.zeros_(self.gate)


@register
class Keel(Wiring):
    """x <- N_out(alpha x + F(N_in(x))), alpha = K: post-norm with a heavy skip.

    Chen and Wei 2026, "Post-LayerNorm Is Back" (arXiv:2601.19895). In the first layer alpha is 1,
    and the very first connection has no N_out: x + F(N_in(x)). So the paper's text; its authors
    published no code and other descriptions leave the whole first layer pre-norm, so `verified`
    is false. x-transformers' `scale_residual_constant` is 1 unless set: its `pre_and_post_norm`
    alone is not this scheme.
    """

    name = "keel"
    equation = "x <- N_out(alpha x + F(N_in(x))),  alpha = K, 1 in the first layer"
    paper = "Chen and Wei 2026, arXiv:2601.19895"
    year = 2026
    at_start = "N(K x + F(N(x))); first x + F(N(x))"
    start = "normal"
    stream_law = "constant"
    gradient_law = "constant"
    verified = False
    drawing = Drawing(read="N", skip="K", after="N")
    ships = "x-transformers (pre_and_post_norm with scale_residual_constant)"

    def __init__(self, branch: Branch, site: Site) -> None:
        super().__init__(branch, site)
        opens = site.layer == site.part == 0  # the very first connection of the network
        self.alpha = site.connections if site.layer else 1
        self.norm_in = self.new_norm()
        self.norm = None if opens else self.new_norm()
        self.final_norm = opens  # only a stack of one connection ends without a norm

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return N_out(alpha x + F(N_in(x))), without N_out in the first connection."""
        x = self.alpha * stream + self.branch(self.norm_in(stream), context)
        return x if self.norm is None else self.norm(x)


@register
class Siamese(Wiring):
    """x <- N_x(x) + z / c, y <- y + z, z = F(N_in(N_x(x) + N_y(y))), c = sqrt(2 l).

    Li et al. 2026, SiameseNorm (arXiv:2602.08064): a post-norm stream x and a pre-norm stream y
    around one branch, l the layer from 1. Out: N_f(N_x(x) + N_y(y)), the final norm. This is the
    form of the authors' DeiT code; in their OLMo variant the attention has no N_in and no N_x on
    the stream, and x is scaled by a learned vector where the attention reads it.
    """

    name = "siamese"
    equation = "x <- N_x(x) + z/sqrt(2 l), y <- y + z,  z = F(N_in(N_x(x) + N_y(y)))"
    paper = "Li et al. 2026, arXiv:2602.08064"
    year = 2026
    at_start = "N(x) + z/sqrt(2 l), y + z,  z = F(N(N(x) + N(y)))"
    start = "normal"
    stream_law = "constant"
    gradient_law = "constant"
    drawing = Drawing(read="N(N+N)", write="1/c", skip="N", stream="x, y")
    ships = "SiameseNorm's DeiT, DiT and OLMo"

    def __init__(self, branch: Branch, site: Site) -> None:
        super().__init__(branch, site)
        self.c = math.sqrt(2 * (site.layer + 1))
        self.norm_x = self.new_norm()
        self.norm_y = self.new_norm()
        self.norm_in = self.new_norm()
        if site.last:
            self.close_x = self.new_norm()
            self.close_y = self.new_norm()
            self.norm_close = self.new_norm()

    def open(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (x, y), both x."""
        return x, x

    def forward(self, stream: tuple[Tensor, Tensor], context: Context) -> tuple[Tensor, Tensor]:
        """Return (N_x(x) + z / c, y + z)."""
        x, y = stream
        x = self.norm_x(x)
        z = self.branch(self.norm_in(x + self.norm_y(y)), context)
        return x + z / self.c, y + z

    def close(self, stream: tuple[Tensor, Tensor]) -> Tensor:
        """Return N_f(N_x(x) + N_y(y))."""
        x, y = stream
        return self.norm_close(self.close_x(x) + self.close_y(y))


@register
class HybridNorm(Wiring):
    """x <- x + F(x), and at the end of a layer u + F(u), u = N(x): norms in and between.

    Zhuo et al. 2025 (arXiv:2503.04598), equations 7 and 8: the attention has no norm in front but
    one for each head on query, key and value (`asks`); the feed-forward is post-norm on what
    enters it. The variant HybridNorm*, which treats the first layer differently, is not here.
    """

    name = "hybridnorm"
    equation = "x <- x + F_qkv(x); at a layer's end u + F(u), u = N(x)"
    paper = "Zhuo et al. 2025, arXiv:2503.04598"
    year = 2025
    at_start = "x + F(x); u + F(u), u = N(x)"
    final_norm = True
    start = "normal"
    asks = {"qkv_norm": True}
    stream_law = "constant"
    gradient_law = "constant"
    drawing = Drawing(read="qkv-norm; u", skip="x; u = N")

    def __init__(self, branch: Branch, site: Site) -> None:
        super().__init__(branch, site)
        self.norm_between = self.new_norm() if site.part == site.parts - 1 else None

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return x + F(x), or N(x) + F(N(x)) at the end of a layer."""
        x = stream if self.norm_between is None else self.norm_between(stream)
        return x + self.branch(x, context)
