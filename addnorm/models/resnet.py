"""ResNet: convolutional networks of residual units over any wiring that makes sense on images.

Shapes: images `(B, C, H, W)`, as data sets hand them out; inside, streams are channel-last, `(B, H,
W, D)`, so that every wiring and norm of the catalogue works on the last axis. Seen by a
convolution, `x.movedim(-1, 1)`, they are torch's `channels_last` format: nothing is copied.

A stage is one resolution and one width: a unit that changes them, then a stack of units that keep
them. The unit that changes them is no connection of the wiring: its shortcut is not the stream.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from addnorm import branches
from addnorm.branches import STARTS, Branch, Context, DropPath, Matrix, Site
from addnorm.contract import Stack, Wiring, options_of, parse_spec, unknown
from addnorm.groups import parameter_groups
from addnorm.norms import BATCH_NORMS, BatchNormName

BlockName = Literal["", "basic", "bottleneck"]
ShortcutName = Literal["", "A", "B", "C"]
StemName = Literal["cifar", "imagenet"]
StrideIn = Literal["1x1", "3x3"]
NewNorm = Callable[[int], nn.Module]

# The networks of He et al. 2015, table 1: the block, and units in each stage.
IMAGENET: Mapping[int, tuple[BlockName, tuple[int, ...]]] = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
}
LAYERS = {"basic": 6, "bottleneck": 9}  # layers that one more unit in each of three stages adds
EXPANSION = 4  # width of a bottleneck's stream over that of its 3x3 convolution
# Wirings around the original unit, conv-BN-ReLU-conv-BN; all others get the pre-activation unit.
# What follows the addition is the wiring's business: the activation here, or its option `act`.
ORIGINAL = {
    "postact": "relu",
    "constant-scaling": "relu",
    "exclusive-gating": "relu",
    "shortcut-gating": "relu",
    "linear-shortcut": "relu",
    "dropout-shortcut": "relu",
    "norm-after-addition": "relu",
    "relu-before-addition": "none",
}
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": F.tanh,
}


@dataclass(frozen=True)
class ResNetConfig:
    """The shape of a ResNet and the wiring of its stages."""

    depth: int = 20
    """layers with weights, which name the network: 20, 56, 110, 164; 18, 50, 152 with imagenet"""
    width: int = 0
    """channels of the first stage; 0 stands for 16, with the imagenet stem 64"""
    wiring: str = "postact"
    """how the units join the stream: postact is v1, residual v2, plain without shortcuts"""
    shortcut: ShortcutName = ""
    """where the width changes: A pads with zeros, B projects, C projects everywhere; empty: A, B"""
    block: BlockName = ""
    """basic or bottleneck; empty: what the depth stands for"""
    stem: StemName = "cifar"
    """cifar: 3x3 convolution, three stages; imagenet: 7x7, max-pool, four stages"""
    classes: int = 10
    """classes of the data"""
    channels: int = 3
    """channels of the images"""
    norm: BatchNormName = "batchnorm"
    """the norm in the units and wherever the wiring has one"""
    zero_last: bool = False
    """whether every unit starts at 0: its last scale (v1) or its last convolution (v2)"""
    drop_path: float = 0.0
    """stochastic depth: the rate at the last unit, rising linearly from 0 at the first"""
    stride_in: StrideIn = "3x3"
    """what halves the image in a bottleneck: its 1x1 as in the paper, its 3x3 as in torchvision"""
    start: str = "he-out"
    """the named start of the convolutions; empty: the one the wiring asks for"""

    def __post_init__(self) -> None:
        if self.width < 0:
            raise ValueError(f"width {self.width} must be at least 1, or 0 for the usual one")
        for name in ("classes", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        for name, kind in (
            ("shortcut", ShortcutName),
            ("block", BlockName),
            ("stem", StemName),
            ("stride_in", StrideIn),
        ):
            value, known = getattr(self, name), [k for k in typing.get_args(kind) if k]
            if value not in typing.get_args(kind):
                raise ValueError(unknown(name, str(value), known))
        if self.norm not in BATCH_NORMS:
            raise ValueError(unknown("norm", self.norm, BATCH_NORMS))
        if self.start and self.start not in STARTS:
            raise ValueError(unknown("start", self.start, STARTS))
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path {self.drop_path} must be at least 0 and less than 1")
        plan(self)


class Plan(NamedTuple):
    """What a config stands for once its empty fields are filled in."""

    block: str  # basic or bottleneck
    units: tuple[int, ...]  # in each stage
    width: int  # of the first stage, before a bottleneck's expansion
    shortcut: str  # A, B or C
    original: bool  # whether the units are v1, with the norm behind each convolution
    act: str  # what follows the addition where the width changes
    skips: bool  # whether there is a shortcut at all

    @property
    def expansion(self) -> int:
        """The width of the stream over `width`."""
        return EXPANSION if self.block == "bottleneck" else 1


def plan(config: ResNetConfig) -> Plan:
    """Return what is built. Raises `ValueError` for an impossible depth, wiring or combination."""
    block, units = _imagenet(config) if config.stem == "imagenet" else _cifar(config)
    spec = parse_spec(config.wiring)
    if spec.wiring.asks:
        asked = ", ".join(spec.wiring.asks)
        raise ValueError(f"{spec.name} asks {asked} of an attention, which a ResNet does not have")
    declared = options_of(spec.wiring)
    act = spec.options.get("act", declared["act"].default if "act" in declared else "none")
    original = spec.name in ORIGINAL or (spec.name == "plain" and act != "none")
    act = act if "act" in declared else ORIGINAL.get(spec.name, "none")
    skips = spec.name != "plain"
    usual = "A" if config.stem == "cifar" and block == "basic" else "B"
    shortcut = config.shortcut or usual
    if shortcut == "C" and str(spec) not in ("postact", "residual"):
        raise ValueError(
            f"shortcut C puts a projection in place of the stream in every unit, which leaves "
            f"nothing to {spec}; use it with postact or residual"
        )
    if config.zero_last and not skips:
        raise ValueError("zero_last needs a shortcut: every unit of a plain network would give 0")
    if config.zero_last and original and config.norm == "scalenorm":
        raise ValueError("zero_last of scalenorm would divide by 0; use residual or another norm")
    width = config.width or (64 if config.stem == "imagenet" else 16)
    return Plan(block, units, width, shortcut, original, str(act), skips)


def _imagenet(config: ResNetConfig) -> tuple[str, tuple[int, ...]]:
    """Return the block and the units of each stage by the table of He et al. 2015."""
    if config.depth not in IMAGENET:
        known = ", ".join(map(str, IMAGENET))
        raise ValueError(f"depth {config.depth} with the imagenet stem is not one of {known}")
    block, units = IMAGENET[config.depth]
    if config.block not in ("", block):
        raise ValueError(f"depth {config.depth} with the imagenet stem has {block} blocks")
    return block, units


def _cifar(config: ResNetConfig) -> tuple[str, tuple[int, ...]]:
    """Return the block and the units of each stage: 6n + 2 basic, 9n + 2 bottleneck.

    A depth that is both, such as 20, is basic, except 164, which was published as bottleneck.
    """
    depth = config.depth
    fits = [name for name, k in LAYERS.items() if depth > 2 and (depth - 2) % k == 0]
    wanted = [config.block] if config.block else list(LAYERS)
    fits = [name for name in fits if name in wanted]
    if not fits:
        forms = " or ".join(f"{LAYERS[name]}n + 2 ({name})" for name in wanted)
        ns = {LAYERS[name]: max(1, (depth - 2) // LAYERS[name]) for name in wanted}
        near = {k * (n + i) + 2 for k, n in ns.items() for i in (0, 1)}
        lower = max((d for d in near if d < depth), default=min(near))
        upper = min((d for d in near if d > depth), default=lower)
        nearest = sorted({lower, upper})
        raise ValueError(
            f"depth {depth} is not {forms}; the nearest: {', '.join(map(str, nearest))}"
        )
    block = "bottleneck" if depth == 164 and "bottleneck" in fits else fits[0]
    return block, ((depth - 2) // LAYERS[block],) * 3


# -- parts -------------------------------------------------------------------------------------


class Convolution(nn.Conv2d):
    """A convolution without bias on channel-last images: `(B, H, W, C)` to `(B, H', W', D)`.

    Zeros are padded so that stride 1 keeps the size.
    """

    if typing.TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor:
            """Map `x`."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolved images."""
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)

    def shrink(self, size: int) -> int:
        """Return the height or width of the output for that of the input."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        return (size + 2 * (kernel // 2) - kernel) // stride + 1

    def flops(self, height: int, width: int) -> int:
        """Return multiply-adds for an output of that size."""
        return self.weight.numel() * height * width


class Unit(Branch):
    """The branch of a residual unit: `(B, H, W, C)` to `(B, H/stride, W/stride, D)`.

    `basic`: two 3x3 convolutions; `bottleneck`: 1x1, 3x3, 1x1, the first two of `width` channels.
    v1 (`original`) conv-N-ReLU-conv-N (He et al. 2015, figure 2 and 5); v2 N-ReLU-conv-N-ReLU-conv
    (He et al. 2016, figure 1b). `lead`: what of v2's first N-ReLU is the branch's own: "norm",
    "relu" where a norm of the wiring stands in front, or "" where both were applied before.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        block: str = "basic",
        width: int = 0,
        stride: int = 1,
        stride_in: StrideIn = "3x3",
        norm: NewNorm = BATCH_NORMS["batchnorm"],
        original: bool = True,
        last_norm: bool = True,
        lead: Literal["", "relu", "norm"] = "",
    ) -> None:
        super().__init__()
        width = width or outputs
        if block == "basic":
            shapes = [(inputs, width, 3), (width, outputs, 3)]
            strides = [stride, 1]
        else:
            shapes = [(inputs, width, 1), (width, width, 3), (width, outputs, 1)]
            strides = [stride, 1, 1] if stride_in == "1x1" else [1, stride, 1]
        convs = [Convolution(*shape, stride=s) for shape, s in zip(shapes, strides, strict=True)]
        norms = [norm(conv.out_channels) for conv in convs[:-1]]
        if original and last_norm:
            norms.append(norm(outputs))
        self.convs = nn.ModuleList(convs)
        self.norms = nn.ModuleList(norms)
        self.lead = norm(inputs) if lead == "norm" else None
        self.relu_first = bool(lead)

    @property
    def chain(self) -> list[Convolution]:
        """The convolutions in order."""
        return [typing.cast(Convolution, conv) for conv in self.convs]

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Return the update."""
        x = x if self.lead is None else self.lead(x)
        x = F.relu(x) if self.relu_first else x
        for i, conv in enumerate(self.chain):
            x = conv(F.relu(x) if i else x)
            x = self.norms[i](x) if i < len(self.norms) else x
        return x

    def normed_before(self) -> None:
        """Leave the first norm out: the wiring has one there."""
        self.lead = None
        self.relu_first = True

    def matrices(self) -> Sequence[Matrix]:
        """Return the convolutions: the last as out, the others as in."""
        *others, last = (conv.weight for conv in self.chain)
        return [*(Matrix("in", weight) for weight in others), Matrix("out", last)]

    def reset_parameters(self) -> None:
        """Start the norms."""
        for norm in (*self.norms, self.lead):
            if norm is not None:
                branches.reset(norm)

    def zero_last(self) -> None:
        """Start at 0: the gain of the last norm (v1), or the last convolution (v2)."""
        last = self.norms[-1] if len(self.norms) == len(self.convs) else self.convs[-1]
        for parameter in last.parameters():
            nn.init.zeros_(parameter)


class Subsample(nn.Module):
    """Shortcut A: every `stride`-th pixel, zeros in the new channels; no parameters.

    He et al. 2015, section 3.3. `(B, H, W, C)` to `(B, H/stride, W/stride, D)`.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.more = outputs - inputs
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Return the smaller images."""
        return F.pad(x[:, :: self.stride, :: self.stride], (0, self.more))

    def extra_repr(self) -> str:
        """Show the stride and the zeros."""
        return f"stride={self.stride}, zeros={self.more}"


class Projection(nn.Module):
    """Shortcuts B and C: a 1x1 convolution, and a norm where one is given.

    He et al. 2015, section 3.3. `(B, H, W, C)` to `(B, H/stride, W/stride, D)`.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, norm: NewNorm | None) -> None:
        super().__init__()
        self.conv = Convolution(inputs, outputs, 1, stride)
        self.norm = None if norm is None else norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return the projected images."""
        x = self.conv(x)
        return x if self.norm is None else typing.cast(Tensor, self.norm(x))


class Change(nn.Module):
    """The unit that changes width or resolution: act(S(x) + F(x)), S the shortcut.

    v2 shares its first norm and ReLU, `lead`, between both: S(a) + F(a), a = relu(N(x)) (He et al.
    2016, section 5). Without a shortcut it is act(F(x)). `site` says where in the network it lies
    and what its convolutions start as, where `start` of it is empty he-out.
    """

    def __init__(
        self,
        branch: Branch,
        shortcut: nn.Module | None,
        site: Site,
        *,
        lead: nn.Module | None = None,
        act: str = "relu",
    ) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut
        self.lead = lead
        self.act = act
        self.site = site
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Return act(S(x) + F(x))."""
        x = x if self.lead is None else F.relu(self.lead(x))
        update = self.branch(x, Context())
        return ACTIVATIONS[self.act](update if self.shortcut is None else self.shortcut(x) + update)

    def reset_parameters(self) -> None:
        """Start the norms at one and zero, the convolutions as named."""
        start = self.site.start or "he-out"
        self.branch.reset_parameters()
        branches.start(self.branch, start, self.site, {})
        for module in (self.shortcut, self.lead):
            if module is not None:
                branches.reset(module)
        if isinstance(self.shortcut, Projection):
            he_out(self.shortcut.conv)


def he_out(conv: nn.Conv2d) -> None:
    """Start a convolution with N(0, 2 / fan_out)."""
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")


# -- the network -------------------------------------------------------------------------------


class ResNet(nn.Module):
    """Images `(B, C, H, W)` to logits `(B, classes)`.

    He et al. 2015 (arXiv:1512.03385): stem, stages whose width doubles as the resolution halves,
    mean over the pixels, a linear layer. Wirings around v1 units (`ORIGINAL`, and `plain` with an
    activation) end there; all others hold v2 units (He et al. 2016, arXiv:1603.05027), which have
    the first norm and ReLU behind the stem and the last ones behind the last stage. Where a wiring
    has a norm of its own in front of the branch (`norm_in`), it takes the place of the unit's, so
    `prenorm` is v2 as well, but for the first unit. The unit that opens a stage of another width
    joins S(x) + F(x) whatever the wiring; constants by depth count it, and `drop_path` reaches it.

    Under `reversible` batch norm sees every batch twice in a step, which moves the running
    statistics twice. Raises `ValueError` for a configuration that does not fit.
    """

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.config = config
        self.plan = plan(config)
        p, norm = self.plan, BATCH_NORMS[config.norm]
        large = config.stem == "imagenet"
        D = p.width
        self.stem = Convolution(config.channels, D, 7 if large else 3, 2 if large else 1)
        self.stem_norm = norm(D)
        self.pool = nn.MaxPool2d(3, 2, padding=1) if large else nn.Identity()
        stages, before = [], 0
        for index, units in enumerate(p.units):
            outputs = p.width * 2**index * p.expansion
            stages.append(self._stage(D, outputs, units, before, stride=2 if index else 1))
            D, before = outputs, before + units
        self.stages = nn.ModuleList(stages)
        self.norm = nn.Identity() if p.original else norm(D)
        self.head = nn.Linear(D, config.classes)
        self.reset_parameters()

    def _stage(self, inputs: int, outputs: int, units: int, before: int, stride: int) -> nn.Module:
        """Return a stage: what changes the width or the resolution, then a stack of the rest."""
        config, p, total = self.config, self.plan, sum(self.plan.units)
        norm = BATCH_NORMS[config.norm]
        spec = parse_spec(config.wiring)

        def unit(width: int, stride: int, lead: Literal["", "norm"]) -> Unit:
            return Unit(
                width, outputs, block=p.block, width=outputs // p.expansion, stride=stride,
                stride_in=config.stride_in, norm=norm, original=p.original,
                last_norm=spec.name != "norm-after-addition" or width != outputs, lead=lead,
            )  # fmt: skip

        def change(place: int, inputs: int, stride: int) -> Change:
            site = Site(outputs, place, total, norm=norm, start=config.start)
            branch = unit(inputs, stride, "")
            shortcut: nn.Module | None = None
            if p.skips and p.shortcut == "A":
                shortcut = Subsample(inputs, outputs, stride)
            elif p.skips:
                shortcut = Projection(inputs, outputs, stride, norm if p.original else None)
            lead = norm(inputs) if not p.original and place else None  # the stem activates
            joint = Change(branch, shortcut, site, lead=lead, act=p.act)
            if config.drop_path:
                DropPath(config.drop_path * place / max(total - 1, 1)).drop(joint)
            return joint

        made: list[nn.Module] = []
        if p.shortcut == "C":
            made = [change(before, inputs, stride)]
            made += [change(before + i, outputs, 1) for i in range(1, units)]
        elif stride > 1 or inputs != outputs:
            made = [change(before, inputs, stride)]
        first, rest = before + len(made), units - len(made)
        if rest:
            leads: list[Literal["", "norm"]] = [
                "" if p.original or first + i == 0 else "norm" for i in range(rest)
            ]
            stack = Stack(
                [unit(outputs, 1, lead) for lead in leads], spec, dim=outputs, norm=norm,
                start=config.start, drop_path=config.drop_path, before=first, total=total,
            )  # fmt: skip
            if not p.original:
                for connection in stack:
                    if "norm_in" in dict(connection.named_children()):
                        unit_of(connection).normed_before()
            made.append(stack)
        return nn.Sequential(*made)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(B, classes)` for `images (B, C, H, W)`.

        Raises `ValueError` for images of another shape or number of channels.
        """
        C = self.config.channels
        if images.dim() != 4 or images.shape[1] != C:
            raise ValueError(
                f"images of shape {tuple(images.shape)}, but the model reads (B, {C}, H, W)"
            )
        x = self.stem(images.movedim(1, -1).contiguous()).contiguous()  # (B, H, W, D)
        x = self.pool(F.relu(self.stem_norm(x)).movedim(-1, 1)).movedim(1, -1)
        for stage in self.stages:
            x = stage(x)
        if not self.plan.original:
            x = F.relu(self.norm(x))
        logits: Tensor = self.head(x.mean((1, 2)))
        return logits

    def reset_parameters(self) -> None:
        """Start all parameters; works after the meta device.

        | part | start |
        |---|---|
        | stem, projections | N(0, 2 / fan_out) |
        | convolutions of the units | `config.start`, or the one the wiring asks for |
        | norms | gain 1, bias 0; with `zero_last` the last gain of a v1 unit 0 |
        | head | as `nn.Linear` |

        With `zero_last` the last convolution of a v2 unit is 0.
        """
        he_out(self.stem)
        branches.reset(self.stem_norm)
        for stage in self.stages:
            for part in typing.cast(nn.Sequential, stage):
                branches.reset(part)
        branches.reset(self.norm)
        self.head.reset_parameters()
        if self.config.zero_last:
            for unit in self.units():
                unit.zero_last()

    def joints(self) -> Iterator[Change | Wiring]:
        """Yield what holds the units, in order: connections, and units that change the width."""
        for stage in self.stages:
            for part in typing.cast(nn.Sequential, stage):
                if isinstance(part, Stack):
                    yield from part
                else:
                    yield typing.cast(Change, part)

    def units(self) -> Iterator[Unit]:
        """Yield the units in order."""
        return (unit_of(joint) for joint in self.joints())

    def parameters_by_part(self) -> dict[str, int]:
        """Return the number of parameters by part; the parts add up to the whole."""

        def count(*modules: nn.Module | None) -> int:
            return sum(p.numel() for m in modules if m is not None for p in m.parameters())

        changes = [joint for joint in self.joints() if isinstance(joint, Change)]
        wirings = [joint for joint in self.joints() if isinstance(joint, Wiring)]
        parts = {
            "stem": count(self.stem, self.stem_norm),
            "units": count(*self.units(), *(change.lead for change in changes)),
            "shortcuts": count(*(change.shortcut for change in changes)),
            "wiring": count(*wirings) - count(*(unit_of(wiring) for wiring in wirings)),
            "final norm": count(self.norm),
            "head": count(self.head),
        }
        assert sum(parts.values()) == count(self), parts
        return parts

    def flops(self, size: int) -> int:
        """Return multiply-adds of the forward pass on one image of `size` x `size` pixels.

        Convolutions, head, and matrices of the wiring, as He et al. 2015 count in table 1; norms,
        activations and additions are left out.
        """
        side = self.stem.shrink(size)
        total = self.stem.flops(side, side) + self.head.weight.numel()
        if isinstance(self.pool, nn.MaxPool2d):
            side = (side - 1) // 2 + 1
        for joint in self.joints():
            for conv in unit_of(joint).chain:
                side = conv.shrink(side)
                total += conv.flops(side, side)
            inside = joint.shortcut if isinstance(joint, Change) else joint
            unit = {id(p) for p in unit_of(joint).parameters()}
            own = [] if inside is None else [p for p in inside.parameters() if id(p) not in unit]
            total += sum(p.numel() for p in own if p.dim() >= 2) * side * side
        return total

    def parameter_groups(self, weight_decay: float, every: bool = False) -> list[dict[str, object]]:
        """Return the optimiser's groups: kernels decay, the rest follows the wiring's facts."""
        return parameter_groups(self, weight_decay, every)


def unit_of(joint: Change | Wiring) -> Unit:
    """Return the unit inside a connection, or inside one that changes the width."""
    branch = joint.branch
    assert isinstance(branch, Unit)
    return branch


# -- the names of torchvision and timm ---------------------------------------------------------


def torchvision_names(model: ResNet) -> dict[str, str]:
    """Return the name in torchvision's and timm's `ResNet` of every tensor, by our name.

    Raises `ValueError` for a network that theirs cannot hold: they have v1 units with batch norm.
    """
    config = model.config
    if config.wiring != "postact" or config.norm != "batchnorm":
        raise ValueError(
            f"torchvision's ResNet has the wiring postact and batchnorm, not {config.wiring} and "
            f"{config.norm}"
        )
    ours = {id(module): name for name, module in model.named_modules()}
    theirs: dict[str, nn.Module] = {
        "conv1": model.stem,
        "bn1": model.stem_norm,
        "fc": model.head,
    }
    joints = model.joints()
    for stage, units in enumerate(model.plan.units, 1):
        for index in range(units):
            joint, name = next(joints), f"layer{stage}.{index}"
            unit = unit_of(joint)
            for i, (conv, norm) in enumerate(zip(unit.convs, unit.norms, strict=True), 1):
                theirs |= {f"{name}.conv{i}": conv, f"{name}.bn{i}": norm}
            if isinstance(joint, Change) and isinstance(joint.shortcut, Projection):
                shortcut = joint.shortcut
                assert shortcut.norm is not None
                theirs[f"{name}.downsample.0"] = shortcut.conv
                theirs[f"{name}.downsample.1"] = shortcut.norm
    return {
        f"{ours[id(module)]}.{tensor}": f"{name}.{tensor}"
        for name, module in theirs.items()
        for tensor in module.state_dict()
    }


def to_torchvision(model: ResNet) -> dict[str, Tensor]:
    """Return the state of the model under torchvision's names; the tensors are the model's own.

    Raises `ValueError` for a network that torchvision's cannot hold.
    """
    names = torchvision_names(model)
    return {names[name]: tensor for name, tensor in model.state_dict().items()}


def load_torchvision(model: ResNet, state: Mapping[str, Tensor]) -> None:
    """Copy a state dict with torchvision's or timm's names into the model.

    Their networks have `stride_in="3x3"`. Counts of batches may be absent, as in old files.
    Raises `ValueError` that lists every missing, unknown or misshapen tensor; nothing is loaded
    then.
    """
    names = torchvision_names(model)
    own = {names[name]: tensor for name, tensor in model.state_dict().items()}
    optional = {name for name in own if name.endswith("num_batches_tracked")}
    missing = [name for name in own if name not in state and name not in optional]
    extra = [name for name in state if name not in own]
    wrong = [
        f"{name} {tuple(state[name].shape)} in place of {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    faults = {"missing": missing, "unknown": extra, "of another shape": wrong}
    if any(faults.values()):
        listed = "; ".join(f"{what}: {', '.join(found)}" for what, found in faults.items() if found)
        raise ValueError(f"these weights are not those of the model: {listed}")
    model.load_state_dict(
        {ours: state[name] for ours, name in names.items() if name in state}, strict=False
    )
