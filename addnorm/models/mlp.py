"""MLP: a residual network of dense layers over any wiring of the catalogue.

Shapes: x `(..., in_dim)`, stream `(..., D)`, output `(..., out_dim)`; images `(B, C, H, W)` with
`flatten`.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from addnorm import branches
from addnorm.branches import STARTS, Branch, Context, Matrix
from addnorm.contract import Stack, unknown
from addnorm.groups import parameter_groups
from addnorm.models.layers import ACTIVATIONS
from addnorm.norms import BATCH_NORMS, BatchNormName

InnerNorm = Literal["none", "batchnorm", "layernorm"]


@dataclass(frozen=True)
class MLPConfig:
    """The shape of an MLP and the wiring of its stack."""

    in_dim: int = 64
    """width of the input; where it equals dim there is no input layer"""
    dim: int = 64
    """width of the stream, D"""
    out_dim: int = 10
    """width of the output"""
    depth: int = 8
    """branches in the stack, each one connection"""
    wiring: str = "residual"
    """how the branches join the stream; `plain` for a network without shortcuts"""
    activation: str = "gelu"
    """gelu, gelu-tanh, relu, relu2, silu, tanh or sigmoid"""
    norm: BatchNormName = "layernorm"
    """layernorm, rmsnorm, scalenorm, dyt, derf or batchnorm, wherever the wiring has one"""
    head_activation: bool = False
    """whether the activation follows the output layer too"""
    start: str = ""
    """a named start in place of the one the wiring asks for"""
    branch_layers: int = 1
    """linear layers in a branch, 1 or 2"""
    hidden_ratio: float = 1.0
    """width between the two layers of a branch, in widths of the stream"""
    inner_norm: InnerNorm = "none"
    """none, batchnorm or layernorm at every linear layer of a branch"""
    preactivation: bool = False
    """whether norm and activation stand in front of a branch's linear layers, as in ResNet v2"""
    flatten: bool = False
    """whether the input is images (B, C, H, W), which are read as rows of C H W numbers"""

    def __post_init__(self) -> None:
        for name in ("in_dim", "dim", "out_dim", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.activation not in ACTIVATIONS:
            raise ValueError(unknown("activation", self.activation, ACTIVATIONS))
        if self.norm not in BATCH_NORMS:
            raise ValueError(unknown("norm", self.norm, BATCH_NORMS))
        if self.inner_norm not in typing.get_args(InnerNorm):
            raise ValueError(unknown("inner_norm", self.inner_norm, typing.get_args(InnerNorm)))
        if self.start and self.start not in STARTS:
            raise ValueError(unknown("start", self.start, STARTS))
        if self.branch_layers not in (1, 2):
            raise ValueError(f"branch_layers {self.branch_layers} must be 1 or 2")
        if self.branch_layers == 1 and self.hidden_ratio != 1:
            raise ValueError(
                f"hidden_ratio {self.hidden_ratio:g} needs branch_layers 2: one layer has no width "
                "inside"
            )
        if not 0.5 < self.hidden_ratio * self.dim < 2**31:  # which is rounded
            raise ValueError(f"hidden_ratio {self.hidden_ratio:g} gives no width at dim {self.dim}")


class Dense(Branch):
    """act(N(W x + b)), `(..., D) -> (..., D)`: a branch of one linear layer; of two, W' after it.

    `hidden` 0: one layer, act(N(W x + b)). Else two, N'(W' act(N(W x + b)) + b'), the form of a
    ResNet's first unit (He et al. 2015, figure 2). With `before` norm and activation stand in front
    of each layer: W act(N(x)) + b, and W' act(N'(W act(N(x)) + b)) + b', the form of the second (He
    et al. 2016, figure 1b). N is absent where `norm` is None.
    """

    def __init__(
        self,
        dim: int,
        activation: str,
        *,
        hidden: int = 0,
        norm: str | None = None,
        before: bool = False,
    ) -> None:
        super().__init__()
        widths = [dim, hidden, dim] if hidden else [dim, dim]
        self.linear = nn.Linear(dim, widths[1])
        self.out = nn.Linear(hidden, dim) if hidden else None
        normed = widths[:-1] if before else widths[1:]
        self.norms = nn.ModuleList(BATCH_NORMS[norm](width) for width in normed if norm)
        self.activation = ACTIVATIONS[activation]()
        self.before = before

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Return the update."""
        layers = [self.linear] if self.out is None else [self.linear, self.out]
        for i, linear in enumerate(layers):
            if self.before:
                x = linear(self.activation(self._normed(i, x)))
            else:
                x = self._normed(i, linear(x))
                x = x if i else self.activation(x)
        return x

    def _normed(self, index: int, x: Tensor) -> Tensor:
        """Return x through the norm of that layer, if there is one."""
        return typing.cast(Tensor, self.norms[index](x)) if len(self.norms) else x

    def matrices(self) -> Sequence[Matrix]:
        """Return the last matrix as out, one in front of it as in."""
        if self.out is None:
            return [Matrix("out", self.linear.weight)]
        return [Matrix("in", self.linear.weight), Matrix("out", self.out.weight)]

    def reset_parameters(self) -> None:
        """Start the norms."""
        for norm in self.norms:
            branches.reset(norm)


class MLP(nn.Module):
    """`(..., in_dim)` to `(..., out_dim)` through `depth` branches of width D.

    Input layer (only where in_dim differs from dim), stack of act(W x + b) or of branches with two
    layers (`Dense`), final norm where the wiring asks for one, output layer. `MLPConfig(3, 3, 1,
    depth=4, head_activation=True, start="torch")` is the five-layer example network of Raschka
    2024, section 4.4. With `branch_layers=2`, `activation="relu"` and `inner_norm="batchnorm"` it
    is a ResNet without convolutions: v1 with the wiring `postact`, v2 with `residual` and
    `preactivation`, which then ends with a norm and an activation as v2 does.
    """

    def __init__(self, config: MLPConfig) -> None:
        super().__init__()
        self.config = config
        D, inner = config.dim, None if config.inner_norm == "none" else config.inner_norm
        hidden = round(config.hidden_ratio * D) if config.branch_layers == 2 else 0
        self.input = nn.Linear(config.in_dim, D) if config.in_dim != D else nn.Identity()
        layers = [
            Dense(D, config.activation, hidden=hidden, norm=inner, before=config.preactivation)
            for _ in range(config.depth)
        ]
        norm = BATCH_NORMS[config.norm]
        self.stack = Stack(layers, config.wiring, dim=D, norm=norm, start=config.start)
        self.norm: nn.Module = nn.Identity()
        if config.preactivation:
            last = BATCH_NORMS[inner](D) if inner else norm(D)
            self.norm = nn.Sequential(last, ACTIVATIONS[config.activation]())
        elif self.stack.final_norm:
            self.norm = norm(D)
        self.head = nn.Linear(D, config.out_dim)
        after = ACTIVATIONS[config.activation] if config.head_activation else nn.Identity
        self.activation = after()

    def forward(self, x: Tensor) -> Tensor:
        """Return the output `(..., out_dim)`, of images `(B, out_dim)`.

        Raises `ValueError` for an input of another width.
        """
        given = tuple(x.shape)
        x = x.flatten(1) if self.config.flatten else x
        if x.shape[-1] != self.config.in_dim:
            raise ValueError(
                f"an input of shape {given}, but the model reads rows of {self.config.in_dim}"
                + ("" if self.config.flatten or x.dim() < 4 else "; say flatten=True for images")
            )
        y: Tensor = self.activation(self.head(self.norm(self.stack(self.input(x)))))
        return y

    def reset_parameters(self) -> None:
        """Start the input layer, the stack, the norm and the head, in this order.

        Input layer and head start as `nn.Linear` does, the stack by the wiring or `config.start`.
        """
        for part in (self.input, self.stack, self.norm, self.head):
            branches.reset(part)

    def parameter_groups(self, weight_decay: float, every: bool = False) -> list[dict[str, object]]:
        """Return the optimiser's groups: matrices decay, the rest follows the wiring's facts."""
        return parameter_groups(self, weight_decay, every)
