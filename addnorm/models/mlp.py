"""MLP: a residual network of dense layers over any wiring of the catalogue.

Shapes: x `(..., in_dim)`, stream `(..., D)`, output `(..., out_dim)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from addnorm.branches import Branch, Context, Matrix
from addnorm.contract import Stack, parameter_groups, unknown
from addnorm.models.layers import ACTIVATIONS, NORMS


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
    """layers in the stack, each one connection"""
    wiring: str = "residual"
    """how the layers join the stream; `plain` for a network without shortcuts"""
    activation: str = "gelu"
    """gelu, gelu-tanh, relu, tanh or sigmoid"""
    norm: str = "layernorm"
    """layernorm or rmsnorm, wherever the wiring has one"""
    head_activation: bool = False
    """whether the activation follows the output layer too"""
    start: str = ""
    """a named start in place of the one the wiring asks for"""

    def __post_init__(self) -> None:
        for name in ("in_dim", "dim", "out_dim", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.activation not in ACTIVATIONS:
            raise ValueError(unknown("activation", self.activation, ACTIVATIONS))
        if self.norm not in NORMS:
            raise ValueError(unknown("norm", self.norm, NORMS))


class Dense(Branch):
    """act(W x + b), `(..., D) -> (..., D)`: a branch of one linear layer."""

    def __init__(self, dim: int, activation: str) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Return act(W x + b)."""
        out: Tensor = self.activation(self.linear(x))
        return out

    def matrices(self) -> Sequence[Matrix]:
        """Return the one matrix, as out."""
        return [Matrix("out", self.linear.weight)]


class MLP(nn.Module):
    """`(..., in_dim)` to `(..., out_dim)` through `depth` dense layers of width D.

    Input layer (only where in_dim differs from dim), stack of act(W x + b), final norm where the
    wiring asks for one, output layer. `MLPConfig(3, 3, 1, depth=4, head_activation=True,
    start="torch")` is the five-layer example network of Raschka 2024, section 4.4.
    """

    def __init__(self, config: MLPConfig) -> None:
        super().__init__()
        self.config = config
        D = config.dim
        self.input = nn.Linear(config.in_dim, D) if config.in_dim != D else nn.Identity()
        layers = [Dense(D, config.activation) for _ in range(config.depth)]
        norm = NORMS[config.norm]
        self.stack = Stack(layers, config.wiring, dim=D, norm=norm, start=config.start)
        self.norm = norm(D) if self.stack.final_norm else nn.Identity()
        self.head = nn.Linear(D, config.out_dim)
        after = ACTIVATIONS[config.activation] if config.head_activation else nn.Identity
        self.activation = after()

    def forward(self, x: Tensor) -> Tensor:
        """Return the output `(..., out_dim)`."""
        y: Tensor = self.activation(self.head(self.norm(self.stack(self.input(x)))))
        return y

    def reset_parameters(self) -> None:
        """Start the input layer, the stack, the norm and the head, in this order.

        Input layer and head start as `nn.Linear` does, the stack by the wiring or `config.start`.
        """
        for part in (self.input, self.stack, self.norm, self.head):
            if not isinstance(part, nn.Identity):
                part.reset_parameters()

    def parameter_groups(self, weight_decay: float) -> list[dict[str, object]]:
        """Return the optimiser's groups: matrices decay, the rest follows the wiring's facts."""
        return parameter_groups(self, weight_decay)
