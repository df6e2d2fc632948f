"""How much of the branch is let in: scalars, vectors and gates on the update.

Letters: x the stream `(..., D)`, F the branch without its norm, N a norm over the last axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from addnorm.branches import Branch, Context, Site
from addnorm.contract import Group, Wiring


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

    def __init__(self, branch: Branch, site: Site) -> None:
        super().__init__(branch, site)
        self.alpha = self.new_parameter(1)
        self.reset_parameters()

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return x + alpha F(x)."""
        return stream + self.alpha * self.branch(stream, context)

    def groups(self) -> Mapping[str, Group]:
        """Alpha does not decay."""
        return {"alpha": Group(weight_decay=0.0)}

    def reset_parameters(self) -> None:
        """Start alpha at 0."""
        super().reset_parameters()
        nn.init.zeros_(self.alpha)


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

    def __init__(self, branch: Branch, site: Site, *, init: float = 1e-4) -> None:
        super().__init__(branch, site)
        self.init = init
        self.norm = self.new_norm()
        self.gamma = self.new_parameter(site.dim)
        self.reset_parameters()

    @staticmethod
    def check(options: Mapping[str, Any]) -> None:
        """Refuse a start that is not finite."""
        init = options.get("init", 0.0)
        if not math.isfinite(init):
            raise ValueError(f"init={init} of layerscale must be finite; papers use 1e-6 to 1e-4")

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return x + gamma * F(N(x))."""
        return stream + self.gamma * self.branch(self.norm(stream), context)

    def groups(self) -> Mapping[str, Group]:
        """Gamma does not decay."""
        return {"gamma": Group(weight_decay=0.0)}

    def reset_parameters(self) -> None:
        """Start gamma at `init`."""
        super().reset_parameters()
        nn.init.constant_(self.gamma, self.init)
