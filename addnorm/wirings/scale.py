"""How much of the branch, and of the skip, is let in: scalars, vectors, gates, chance.

Letters: x the stream `(..., D)`, F the branch without its norm, N a norm over the last axis, L
layers, K connections, l the layer counted from 1, sigma the logistic function. Gate matrices are
`(D, D)` and start Xavier-normal unless said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from addnorm.branches import Branch, Context, Site, keep_mask, wide
from addnorm.contract import Drawing, Group, Wiring, register


@register
class ReZero(Wiring):
    """x <- x + alpha F(x), alpha a learned scalar that starts at 0; no norm.

    Bachlechner et al. 2020 (arXiv:2003.04887), equation 1. One alpha for each connection; the
    authors' Transformer code shares one between the two sublayers of a layer.
    """

    name = "rezero"
    equation = "x <- x + alpha F(x)"
    paper = "Bachlechner et al. 2020, arXiv:2003.04887"
    year = 2020
    at_start = "x"
    start = "fairseq"
    stream_law = "constant"
    gradient_law = "constant"
    drawing = Drawing(write="alpha")

    def __init__(self, branch: Branch, site: Site) -> None:
        super().__init__(branch, site)
        self.alpha = self.new_parameter(1)

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return x + alpha F(x)."""
        return stream + self.alpha * self.branch(stream, context)

    def reset_parameters(self) -> None:
        """Start alpha at 0."""
        super().reset_parameters()
        nn.init.zeros_(self.alpha)


@register
class SkipInit(Wiring):
    """x <- x + alpha F(x), alpha a learned scalar that starts at 0, F without batch norm.

    De and Smith 2020 (arXiv:2002.10444), section 4: ReZero's equation for ResNets, whose branches
    start He-normal. NF-ResNets (arXiv:2102.06171) add fixed scales around the branch that follow
    the expected variance; these belong to the branch.
    """

    name = "skipinit"
    equation = "x <- x + alpha F(x)"
    paper = "De and Smith 2020, arXiv:2002.10444"
    year = 2020
    at_start = "x"
    start = "he"
    stream_law = "constant"
    gradient_law = "constant"
    drawing = Drawing(write="alpha")
    ships = "NFNet (DeepMind; timm with skipinit=True)"

    def __init__(self, branch: Branch, site: Site) -> None:
        super().__init__(branch, site)
        self.alpha = self.new_parameter(1)

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return x + alpha F(x)."""
        return stream + self.alpha * self.branch(stream, context)

    def reset_parameters(self) -> None:
        """Start alpha at 0."""
        super().reset_parameters()
        nn.init.zeros_(self.alpha)


@register
class LayerScale(Wiring):
    """x <- x + gamma * F(N(x)), gamma a learned vector that starts small.

    Touvron et al. 2021, CaiT (arXiv:2103.17239), equation 4. The paper starts gamma at 1e-5 for 24
    layers and 1e-6 for 36 and more; the default of its code, and here, is 1e-4.
    """

    name = "layerscale"
    equation = "x <- x + gamma * F(N(x))"
    paper = "Touvron et al. 2021, arXiv:2103.17239"
    year = 2021
    at_start = "x + init F(N(x))"
    final_norm = True
    start = "normal"
    stream_law = "constant"
    gradient_law = "constant"
    drawing = Drawing(read="N", write="gamma")
    ships = "CaiT, DeiT III, DINOv2, ConvNeXt"

    def __init__(self, branch: Branch, site: Site, *, init: float = 1e-4) -> None:
        super().__init__(branch, site)
        self.init = init
        self.norm_in = self.new_norm()
        self.gamma = self.new_parameter(site.dim)

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return x + gamma * F(N(x))."""
        return stream + self.gamma * self.branch(self.norm_in(stream), context)

    def reset_parameters(self) -> None:
        """Start gamma at `init`."""
        super().reset_parameters()
        nn.init.constant_(self.gamma, self.init)


@register
class Stable(Wiring):
    """x <- x + F(N(x)) / sqrt(K): a constant 1/sqrt(2L) on every update.

    Hayou et al. 2020, Stable ResNet (arXiv:2010.12859), section 3. Every matrix starts with
    N(0, 0.02); at the start it equals pre-norm with the start `gpt2` where F is linear in its
    output matrix.
    """

    name = "stable"
    equation = "x <- x + F(N(x)) / sqrt(K)"
    paper = "Hayou et al. 2020, arXiv:2010.12859"
    year = 2020
    at_start = "x + F(N(x)) / sqrt(K)"
    final_norm = True
    start = "normal"
    stream_law = "constant"
    gradient_law = "constant"
    drawing = Drawing(read="N", write="1/sqrt(K)")

    def __init__(self, branch: Branch, site: Site) -> None:
        super().__init__(branch, site)
        self.scale: float = site.connections**-0.5
        self.norm_in = self.new_norm()

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return x + F(N(x)) / sqrt(K)."""
        return stream + self.scale * self.branch(self.norm_in(stream), context)


@register
class CompleteP(Wiring):
    """x <- x + m^(-exponent) F(N(x)), m = L / base_depth; the rates of the layers follow m.

    Dey et al. 2025 (arXiv:2505.01618), table 1: exponent 1 is CompleteP, 0.5 is depth-muP (Yang
    et al. 2023, arXiv:2310.02244). Below the stack, learning rates are multiplied by
    m^(exponent - 1) and Adam's epsilon by m^(-exponent). The part for width (muP) is not here.
    """

    name = "completep"
    equation = "x <- x + m^(-exponent) F(N(x)),  m = L / base_depth"
    paper = "Dey et al. 2025, arXiv:2505.01618"
    year = 2025
    at_start = "x + m^(-exponent) F(N(x))"
    final_norm = True
    start = "normal"
    stream_law = "constant"
    gradient_law = "constant"
    limits = {"base_depth": (1, math.inf), "exponent": (0, 1)}
    drawing = Drawing(read="N", write="m^-a")
    ships = "Cerebras, nanoGPT-mup"

    def __init__(
        self, branch: Branch, site: Site, *, base_depth: int = 2, exponent: float = 1.0
    ) -> None:
        super().__init__(branch, site)
        self.base_depth = base_depth
        self.exponent = exponent
        self.depth_ratio = site.layers / base_depth  # m
        self.scale: float = self.depth_ratio**-exponent
        self.norm_in = self.new_norm()

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return x + m^(-exponent) F(N(x))."""
        f = self.branch(self.norm_in(stream), context)
        return stream + self.scale * f

    def groups(self) -> Mapping[str, Group]:
        """Scale the rate and the epsilon of every parameter of the layer by its depth."""
        lr = self.depth_ratio ** (self.exponent - 1)
        return {n: Group(lr, eps=self.scale) for n, _ in self.named_parameters()}


@register
class StochasticDepth(Wiring):
    """x <- x + b F(N(x)) / p in training, b = 1 with probability p, else 0.

    Huang et al. 2016 (arXiv:1603.09382). per="sample" is the form of timm's DropPath: b for each
    sample, update divided by p, drop rates linear from 0 in the first layer to `rate` in the
    last, off in evaluation. per="batch" is the paper's: one b for the mini-batch, not divided,
    and p F in evaluation, with 1 - p = rate l / L.
    """

    name = "droppath"
    equation = "x <- x + b F(N(x)) / p,  b ~ Bernoulli(p)"
    paper = "Huang et al. 2016, arXiv:1603.09382"
    year = 2016
    at_start = "x + F(N(x)) on average"
    final_norm = True
    stream_law = "sqrt"
    gradient_law = "sqrt"
    limits = {"rate": (0, 0.99)}
    drawing = Drawing(read="N", write="b/p")
    ships = "timm: ViT, ConvNeXt, Swin, DeiT"

    def __init__(
        self,
        branch: Branch,
        site: Site,
        *,
        rate: float = 0.1,
        per: Literal["sample", "batch"] = "sample",
    ) -> None:
        super().__init__(branch, site)
        self.rate = rate
        self.per = per
        last = max(site.layers - 1, 1)
        drop = site.layer / last if per == "sample" else (site.layer + 1) / site.layers
        self.keep = 1 - rate * drop
        self.norm_in = self.new_norm()

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return x + b F(N(x)) / p in training; x + F(N(x)), or x + p F(N(x)), in evaluation."""
        f = self.branch(self.norm_in(stream), context)
        if self.per == "sample":
            return stream + (f * keep_mask(f, self.keep) / self.keep if self.training else f)
        b = keep_mask(f, self.keep, per_sample=False) if self.training else self.keep
        return stream + b * f


@register
class Highway(Wiring):
    """x <- T * F(x) + (1 - T) * x, T = sigma(W x + b), b starts at `bias`.

    Srivastava et al. 2015 (arXiv:1505.00387), equation 3; a negative bias lets x pass at the
    start, the paper tries -1 to -10. No norm.
    """

    name = "highway"
    equation = "x <- T * F(x) + (1 - T) * x,  T = sigma(W x + b)"
    paper = "Srivastava et al. 2015, arXiv:1505.00387"
    year = 2015
    at_start = "T * F(x) + (1 - T) * x, T about sigma(bias)"
    start = "fairseq"
    stream_law = "vanishing"
    gradient_law = "vanishing"
    expected = frozenset({"vanishing-gradient"})
    drawing = Drawing(write="T", skip="1-T")

    def __init__(self, branch: Branch, site: Site, *, bias: float = -1.0) -> None:
        super().__init__(branch, site)
        self.bias = bias
        self.gate = self.new_linear(site.dim, site.dim, bias=True)

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return T * F(x) + (1 - T) * x."""
        T = torch.sigmoid(self.gate(stream))
        return T * self.branch(stream, context) + (1 - T) * stream

    def reset_parameters(self) -> None:
        """Start the gate's bias at `bias`."""
        super().reset_parameters()
        nn.init.xavier_normal_(self.gate.weight)
        nn.init.constant_(self.gate.bias, self.bias)


@register
class GTrXL(Wiring):
    """x <- (1 - z) * x + z * h, y = relu(F(N(x))): a gated recurrent unit in place of the sum.

    Parisotto et al. 2019 (arXiv:1910.06764), section 3.2, "GRU gating" and "identity map
    reordering": r = sigma(W_r y + U_r x), z = sigma(W_z y + U_z x - b), h = tanh(W_h y + U_h (r *
    x)), b a learned vector that starts at 2. The ReLU on the branch stands before the gate; many
    re-implementations leave it out, or b (x-transformers' GRUGating has biases and no b).
    """

    name = "gtrxl"
    equation = "x <- (1 - z) * x + z * h,  z, h gated by y = relu(F(N(x)))"
    paper = "Parisotto et al. 2019, arXiv:1910.06764"
    year = 2019
    at_start = "(1 - z) * x + z * h, z about sigma(-2)"
    stream_law = "vanishing"
    gradient_law = "vanishing"
    drawing = Drawing(read="N", write="relu, z h", skip="1-z")
    ships = "DI-engine, RLlib"

    def __init__(self, branch: Branch, site: Site) -> None:
        super().__init__(branch, site)
        D = site.dim
        self.norm_in = self.new_norm()
        self.reset_y, self.reset_x = self.new_linear(D, D), self.new_linear(D, D)  # W_r, U_r
        self.update_y, self.update_x = self.new_linear(D, D), self.new_linear(D, D)  # W_z, U_z
        self.new_y, self.new_x = self.new_linear(D, D), self.new_linear(D, D)  # W_h, U_h
        self.bias = self.new_parameter(D)

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return (1 - z) * x + z * h."""
        x = stream
        y = torch.relu(self.branch(self.norm_in(x), context))
        r = torch.sigmoid(self.reset_y(y) + self.reset_x(x))
        z = torch.sigmoid(self.update_y(y) + self.update_x(x) - self.bias)
        h = torch.tanh(self.new_y(y) + self.new_x(r * x))
        return (1 - z) * x + z * h

    def reset_parameters(self) -> None:
        """Start b at 2; the matrices start as `nn.Linear` does."""
        super().reset_parameters()
        nn.init.constant_(self.bias, 2.0)


@register
class DeepDelta(Wiring):
    """x <- x + beta (v - k.x) k, k = f / |f|, f = F(N(x)): erase along k, then write.

    Zhang et al. 2026, Deep Delta Learning (arXiv:2601.00417), the form of one value channel, as
    in the authors' code: beta = 2 sigma(w.N(x) + b) in (0, 2), v = 4 sigma(u.x + c). beta 0 keeps
    x, 1 replaces its part along k by v, 2 with v = 0 reflects. w and u start with N(0, 1/(4 D)), b
    and c at 0. |f| is sqrt(f.f + 1e-10).
    """

    name = "deep-delta"
    equation = "x <- x + beta (v - k.x) k,  k = F(N(x)) / |F(N(x))|"
    paper = "Zhang et al. 2026, arXiv:2601.00417"
    year = 2026
    at_start = "x + beta (v - k.x) k, beta about 1, v about 2"
    final_norm = True
    stream_law = "sqrt"
    gradient_law = "sqrt"
    drawing = Drawing(read="N", write="delta")

    def __init__(self, branch: Branch, site: Site) -> None:
        super().__init__(branch, site)
        self.norm_in = self.new_norm()
        self.step = self.new_linear(site.dim, 1, bias=True)  # w, b
        self.value = self.new_linear(site.dim, 1, bias=True)  # u, c

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return x + beta (v - k.x) k."""
        x, normed = stream, self.norm_in(stream)
        f = wide(self.branch(normed, context))  # 16 bits cannot hold small squares
        k = (f * torch.rsqrt(f.square().sum(-1, keepdim=True) + 1e-10)).to(x.dtype)
        beta = 2 * torch.sigmoid(self.step(normed))  # (..., 1)
        v = 4 * torch.sigmoid(self.value(x))  # (..., 1)
        return x + beta * (v - (k * x).sum(-1, keepdim=True)) * k

    def reset_parameters(self) -> None:
        """Start w and u small, b and c at 0."""
        super().reset_parameters()
        for linear in (self.step, self.value):
            nn.init.normal_(linear.weight, std=0.5 * self.site.dim**-0.5)
            nn.init.zeros_(linear.bias)


@register
class Orthogonal(Wiring):
    """x <- x + f - (f.x / (x.x + eps)) x, f = F(N(x)): only what is orthogonal to x is added.

    Oh et al. 2025 (arXiv:2505.11881), equation 4; eps = 1e-6.
    """

    name = "orthogonal"
    equation = "x <- x + f - (f.x / x.x) x,  f = F(N(x))"
    paper = "Oh et al. 2025, arXiv:2505.11881"
    year = 2025
    at_start = "x + f - (f.x / x.x) x"
    final_norm = True
    stream_law = "sqrt"
    gradient_law = "sqrt"
    drawing = Drawing(read="N", write="- along x")
    ships = "x-transformers"

    def __init__(self, branch: Branch, site: Site) -> None:
        super().__init__(branch, site)
        self.norm_in = self.new_norm()

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return x + f - (f.x / (x.x + eps)) x."""
        x = wide(stream)  # 16 bits cannot hold x.x
        f = wide(self.branch(self.norm_in(stream), context))
        along = (f * x).sum(-1, keepdim=True) / (x.square().sum(-1, keepdim=True) + 1e-6)
        return (x + f - along * x).to(stream.dtype)


# -- the shortcut zoo: He et al. 2016 (arXiv:1603.05027), figures 2 and 4 -----------------------
# What they tried in place of the identity shortcut and of pre-activation on ResNet-110. ReLU
# follows the addition in all of section 3. Their CIFAR-10 errors: original unit 6.61 %.


@register
class ConstantScaling(Wiring):
    """x <- relu(skip x + branch F(x)): both sides scaled by constants.

    He et al. 2016 (arXiv:1603.05027), section 3.1 and table 1: 0.5 and 0.5 gave 12.35 % error,
    0.5 and 1 did not converge.
    """

    name = "constant-scaling"
    equation = "x <- relu(skip x + scale F(x))"
    paper = "He et al. 2016, arXiv:1603.05027"
    year = 2016
    at_start = "relu(x / 2 + F(x) / 2)"
    start = "he"
    stream_law = "vanishing"
    gradient_law = "vanishing"
    expected = frozenset({"rank-collapse", "vanishing-gradient"})
    drawing = Drawing(write="scale", skip="skip", after="relu")

    def __init__(
        self, branch: Branch, site: Site, *, skip: float = 0.5, scale: float = 0.5
    ) -> None:
        super().__init__(branch, site)
        self.skip = skip
        self.scale = scale

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return relu(skip x + scale F(x))."""
        return torch.relu(self.skip * stream + self.scale * self.branch(stream, context))


@register
class ExclusiveGating(Wiring):
    """x <- relu((1 - g) * x + g * F(x)), g = sigma(W x + b): a highway with ReLU after it.

    He et al. 2016 (arXiv:1603.05027), section 3.2 and table 1: b started between 0 and -10; -6
    gave the best error, 8.70 %, and from 0 to -5 it did not converge.
    """

    name = "exclusive-gating"
    equation = "x <- relu((1 - g) * x + g * F(x)),  g = sigma(W x + b)"
    paper = "He et al. 2016, arXiv:1603.05027"
    year = 2016
    at_start = "relu((1 - g) * x + g * F(x)), g about sigma(bias)"
    start = "he"
    stream_law = "constant"
    gradient_law = "constant"
    drawing = Drawing(write="g", skip="1-g", after="relu")

    def __init__(self, branch: Branch, site: Site, *, bias: float = -6.0) -> None:
        super().__init__(branch, site)
        self.bias = bias
        self.gate = self.new_linear(site.dim, site.dim, bias=True)

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return relu((1 - g) * x + g * F(x))."""
        g = torch.sigmoid(self.gate(stream))
        return torch.relu((1 - g) * stream + g * self.branch(stream, context))

    def reset_parameters(self) -> None:
        """Start the gate's bias at `bias`."""
        super().reset_parameters()
        nn.init.xavier_normal_(self.gate.weight)
        nn.init.constant_(self.gate.bias, self.bias)


@register
class ShortcutGating(Wiring):
    """x <- relu((1 - g) * x + F(x)), g = sigma(W x + b): only the shortcut is gated.

    He et al. 2016 (arXiv:1603.05027), section 3.2 and table 1: b from 0 gave 12.86 % error, from
    -6, where 1 - g is nearly 1, 6.91 %.
    """

    name = "shortcut-gating"
    equation = "x <- relu((1 - g) * x + F(x)),  g = sigma(W x + b)"
    paper = "He et al. 2016, arXiv:1603.05027"
    year = 2016
    at_start = "relu((1 - g) * x + F(x)), g about sigma(bias)"
    start = "he"
    stream_law = "geometric"
    gradient_law = "geometric"
    expected = frozenset({"exploding-gradient", "non-finite"})
    drawing = Drawing(skip="1-g", after="relu")

    def __init__(self, branch: Branch, site: Site, *, bias: float = -6.0) -> None:
        super().__init__(branch, site)
        self.bias = bias
        self.gate = self.new_linear(site.dim, site.dim, bias=True)

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return relu((1 - g) * x + F(x))."""
        g = torch.sigmoid(self.gate(stream))
        return torch.relu((1 - g) * stream + self.branch(stream, context))

    def reset_parameters(self) -> None:
        """Start the gate's bias at `bias`."""
        super().reset_parameters()
        nn.init.xavier_normal_(self.gate.weight)
        nn.init.constant_(self.gate.bias, self.bias)


@register
class LinearShortcut(Wiring):
    """x <- relu(W x + F(x)): a 1x1 convolution on every shortcut.

    He et al. 2016 (arXiv:1603.05027), section 3.2 and table 1: 12.22 % error. W starts He-normal.
    """

    name = "linear-shortcut"
    equation = "x <- relu(W x + F(x))"
    paper = "He et al. 2016, arXiv:1603.05027"
    year = 2016
    at_start = "relu(W x + F(x))"
    start = "he"
    stream_law = "geometric"
    gradient_law = "geometric"
    expected = frozenset({"exploding-gradient", "non-finite", "rank-collapse"})
    drawing = Drawing(skip="W", after="relu")

    def __init__(self, branch: Branch, site: Site) -> None:
        super().__init__(branch, site)
        self.shortcut = self.new_linear(site.dim, site.dim)

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return relu(W x + F(x))."""
        return torch.relu(self.shortcut(stream) + self.branch(stream, context))

    def reset_parameters(self) -> None:
        """Start W He-normal."""
        super().reset_parameters()
        nn.init.kaiming_normal_(self.shortcut.weight, nonlinearity="relu")


@register
class DropoutShortcut(Wiring):
    """x <- relu(m * x + F(x)), m 1 with probability 1 - rate, else 0: dropout on the shortcut.

    He et al. 2016 (arXiv:1603.05027), section 3.2 and table 1: with 0.5 it did not converge. As
    there the kept values are not rescaled, so that m has the mean 1 - rate; in evaluation m is
    its mean.
    """

    name = "dropout-shortcut"
    equation = "x <- relu(m * x + F(x)),  m ~ Bernoulli(1 - rate)"
    paper = "He et al. 2016, arXiv:1603.05027"
    year = 2016
    at_start = "relu(m * x + F(x))"
    start = "he"
    stream_law = "geometric"
    gradient_law = "geometric"
    expected = frozenset({"exploding-gradient"})
    limits = {"rate": (0, 1)}
    drawing = Drawing(skip="m", after="relu")

    def __init__(self, branch: Branch, site: Site, *, rate: float = 0.5) -> None:
        super().__init__(branch, site)
        self.rate = rate

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return relu(m * x + F(x))."""
        keep = 1 - self.rate
        m = (torch.rand_like(stream) < keep).to(stream.dtype) if self.training else keep
        return torch.relu(m * stream + self.branch(stream, context))


@register
class NormAfterAddition(Wiring):
    """x <- relu(N(x + F(x))): the last norm of the branch moved behind the addition.

    He et al. 2016 (arXiv:1603.05027), section 4.1, figure 4b and table 2: 8.17 % error. There N
    is batch norm.
    """

    name = "norm-after-addition"
    equation = "x <- relu(N(x + F(x)))"
    paper = "He et al. 2016, arXiv:1603.05027"
    year = 2016
    at_start = "relu(N(x + F(x)))"
    start = "he"
    stream_law = "constant"
    gradient_law = "geometric"
    expected = frozenset({"rank-collapse"})
    drawing = Drawing(after="N, relu")

    def __init__(self, branch: Branch, site: Site) -> None:
        super().__init__(branch, site)
        self.norm = self.new_norm()

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return relu(N(x + F(x)))."""
        return torch.relu(self.norm(stream + self.branch(stream, context)))


@register
class ReluBeforeAddition(Wiring):
    """x <- x + relu(F(x)): the ReLU moved before the addition; the stream can only grow.

    He et al. 2016 (arXiv:1603.05027), section 4.1, figure 4c and table 2: 7.84 % error.
    """

    name = "relu-before-addition"
    equation = "x <- x + relu(F(x))"
    paper = "He et al. 2016, arXiv:1603.05027"
    year = 2016
    at_start = "x + relu(F(x))"
    start = "he"
    stream_law = "geometric"
    gradient_law = "geometric"
    expected = frozenset({"exploding-gradient", "non-finite", "rank-collapse"})
    drawing = Drawing(write="relu")

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return x + relu(F(x))."""
        return stream + torch.relu(self.branch(stream, context))
