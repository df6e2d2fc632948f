"""Where the norm sits: one stream, whose update is normalised before, after or not at all.

Letters: x the stream `(..., D)`, F the branch without its norm, N a norm over the last axis
(LayerNorm or RMSNorm), L layers, K connections, l the connection.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from addnorm.branches import Branch, Context, Site
from addnorm.contract import Wiring


class Plain(Wiring):
    """x <- F(x), or x <- F(N(x)) with `norm=true`: no residual connection, the baseline.

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

    def __init__(self, branch: Branch, site: Site, *, norm: bool = False) -> None:
        super().__init__(branch, site)
        self.norm = self.new_norm() if norm else None
        self.reset_parameters()

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return F(x), or F(N(x))."""
        x = stream if self.norm is None else self.norm(stream)
        return self.branch(x, context)

    def extra_repr(self) -> str:
        """Show whether there is a norm."""
        return f"norm={str(self.norm is not None).lower()}"


class Residual(Wiring):
    """x <- x + F(x): the identity shortcut alone, without a norm.

    He et al. 2015 (arXiv:1512.03385), equation 1; with a pre-activation branch it is the unit of
    He et al. 2016 (arXiv:1603.05027), equation 4.
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

    def __init__(self, branch: Branch, site: Site) -> None:
        super().__init__(branch, site)
        self.reset_parameters()

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return x + F(x)."""
        return stream + self.branch(stream, context)


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

    def __init__(self, branch: Branch, site: Site) -> None:
        super().__init__(branch, site)
        self.norm = self.new_norm()
        self.reset_parameters()

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return N(x + F(x))."""
        return self.norm(stream + self.branch(stream, context))


class PreNorm(Wiring):
    """x <- x + F(N(x)): the norm inside the branch, the stream left alone.

    Xiong et al. 2020 (arXiv:2002.04745), figure 1b; GPT-2. Needs a final norm.
    """

    name = "prenorm"
    equation = "x <- x + F(N(x))"
    paper = "Xiong et al. 2020, arXiv:2002.04745"
    year = 2020
    at_start = "x + F(N(x))"
    final_norm = True
    stream_law = "sqrt"
    gradient_law = "sqrt"

    def __init__(self, branch: Branch, site: Site) -> None:
        super().__init__(branch, site)
        self.norm = self.new_norm()
        self.reset_parameters()

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return x + F(N(x))."""
        return stream + self.branch(self.norm(stream), context)


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

    def __init__(self, branch: Branch, site: Site) -> None:
        super().__init__(branch, site)
        self.norm_in = self.new_norm()
        self.norm_out = self.new_norm()
        self.reset_parameters()

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return x + N_out(F(N_in(x)))."""
        return stream + self.norm_out(self.branch(self.norm_in(stream), context))


class DeepNorm(Wiring):
    """x <- N(alpha x + F(x)), alpha = K^(1/4): post-norm with a heavier skip.

    Wang et al. 2022 (arXiv:2203.00555), table 2, decoder-only or encoder-only with N layers:
    alpha = (2N)^(1/4), beta = (8N)^(-1/4). In connections, K = 2N: alpha = K^(1/4) and
    beta = (4K)^(-1/4). The value, feed-forward and output matrices start as Xavier times beta,
    query and key as Xavier.
    """

    name = "deepnorm"
    equation = "x <- N(alpha x + F(x)),  alpha = K^(1/4)"
    paper = "Wang et al. 2022, arXiv:2203.00555"
    year = 2022
    at_start = "N(alpha x + F(x)), with F scaled by beta = (4K)^(-1/4)"
    start = "xavier"
    stream_law = "constant"
    gradient_law = "constant"

    def __init__(self, branch: Branch, site: Site) -> None:
        super().__init__(branch, site)
        self.alpha = site.count**0.25
        self.beta = (4 * site.count) ** -0.25
        self.norm = self.new_norm()
        self.reset_parameters()

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return N(alpha x + F(x))."""
        return self.norm(self.alpha * stream + self.branch(stream, context))

    def gains(self) -> Mapping[str, float]:
        """Put beta on value, in and out; query and key keep gain 1."""
        return {"value": self.beta, "in": self.beta, "out": self.beta}
