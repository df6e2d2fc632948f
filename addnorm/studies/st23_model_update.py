"""ST-23 The exploding model update: how far one step moves the output, by depth and wiring."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from addnorm.models.gpt import GPT
from addnorm.models.layers import FeedForwardConfig
from addnorm.studies import bench
from addnorm.studies.frame import Contrast, Metric, Mode, Plot, Published, Rows, Study, Words

CONTEXT, HEADS, HIDDEN = 32, 2, 128  # the paper's tiny networks: width 64, hidden 128, 2 heads
DEPTHS = (6, 12, 24, 48, 96)  # layers of two connections
WIRINGS = {"post-norm": "postnorm", "DeepNorm": "deepnorm", "pre-norm": "prenorm"}
# One step so small that the output moves in proportion to the rate.
STEPS: Mapping[str, Mapping[str, Any]] = {
    "SGD": {"optimizer": "sgd", "lr": 1e-3, "betas": (0.0, 0.999)},
    "Adam": {"optimizer": "adamw", "lr": 1e-6, "betas": (0.9, 0.999)},
}


def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Take one step with one network and return how far its last hidden state has moved."""
    relu = FeedForwardConfig(activation="relu", hidden=HIDDEN)
    model = bench.gpt(
        cell["seed"], cell["depth"], WIRINGS[cell["wiring"]], CONTEXT,
        heads=HEADS, start="xavier", feedforward=relu,
    )  # fmt: skip
    x, _ = bench.windows(CONTEXT, 32)
    before, parameters = hidden(model, x), _flat(model)
    step = STEPS[cell["optimizer"]]
    run = bench.trained(
        model, bench.text(CONTEXT), cell["seed"], **step,
        steps=1, batch=16, warmup=0, schedule="constant", weight_decay=0.0, clip=0.0, eval_batches=1,
    )  # fmt: skip
    if run.status != "finished":
        return {"update": math.nan, "gradient": math.nan}
    moved = (hidden(model, x) - before).square().mean().sqrt()
    return {
        "update": moved.item() / step["lr"],
        "gradient": (_flat(model) - parameters).norm().item() / step["lr"],
    }


@torch.no_grad()
def hidden(model: GPT, x: Tensor) -> Tensor:
    """Return what the head reads, `(B, T, D)`: it is normalised, so that its RMS is 1."""
    seen: list[Tensor] = []
    handle = model.head.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    model.eval()(x)
    handle.remove()
    return seen[0]


def _flat(model: nn.Module) -> Tensor:
    """Return a copy of all parameters in one vector."""
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


# -- what is made of the rows --------------------------------------------------------------------


def _ends(rows: Rows, metric: str, wiring: str, optimizer: str) -> tuple[float, float]:
    """Return the metric of the shallowest and of the deepest network."""
    depths = sorted(set(rows.column("depth")))
    shallow, deep = (
        rows.value(metric, wiring=wiring, optimizer=optimizer, depth=d)
        for d in (depths[0], depths[-1])
    )
    return shallow, deep


def _growth(rows: Rows, wiring: str, optimizer: str, metric: str = "update") -> float:
    """Return log10 of the metric of the deepest network over that of the shallowest."""
    shallow, deep = _ends(rows, metric, wiring, optimizer)
    return math.log10(deep / shallow)


def _grows(wiring: str, optimizer: str, metric: str = "update") -> Callable[[Rows], float]:
    return lambda rows: _growth(rows, wiring, optimizer, metric)


def _deepest(one: str, other: str, optimizer: str) -> Callable[[Rows], float]:
    """Return log10 of one wiring's update over another's, at the largest depth."""

    def effect(rows: Rows) -> float:
        return math.log10(
            _ends(rows, "update", one, optimizer)[1] / _ends(rows, "update", other, optimizer)[1]
        )

    return effect


DECADES = Words("powers of ten", "个数量级")

STUDY = Study(
    id="ST-23",
    name="model-update",
    title=Words("The exploding model update", "模型更新的爆炸"),
    question=Words(
        "Does one optimiser step move the output of a post-norm network further the deeper it is, and "
        "does DeepNorm stop that?",
        "post-norm 的网络越深，一步优化使输出移动得越远吗？DeepNorm 能阻止吗？",
    ),
    design=Words(
        "Character GPTs of 6 to 96 layers, 64 wide, hidden width 128, two heads (the tiny networks of "
        "Wang et al. 2022), with post-norm, DeepNorm and pre-norm, take one step on one batch, with SGD "
        "and with Adam. Measured is how far the hidden state in front of the head has moved on other "
        "text, ‖F(x, θ₁) - F(x, θ₀)‖ as RMS over its entries, divided by the rate.",
        "字符 GPT，6 至 96 层，宽 64，前馈宽 128，两个头（即 Wang 等 2022 的小网络），接法为 post-norm、DeepNorm "
        "和 pre-norm，各用 SGD 和 Adam 在一个批次上走一步。测量输出层之前的隐状态在另一段文本上移动了多远："
        "‖F(x, θ₁) - F(x, θ₀)‖ 各分量的均方根，再除以学习率。",
    ),
    controls=Words(
        "The hidden state is normalised in all three, so a larger one cannot explain a larger move. All "
        "start as Xavier; DeepNorm's factor β is part of it. The step is so small that the output moves in "
        "proportion to the rate. Adam's first step moves every parameter by the rate, whatever its "
        "gradient, so under Adam the growth cannot come from larger gradients.",
        "三种接法的隐状态都经过归一化，因此移动更大不会是因为它本身更大。都用 Xavier 初始化，DeepNorm 的系数 β 属于"
        "方法本身。步长很小，输出的移动与学习率成正比。Adam 的第一步使每个参数都移动一个学习率，与梯度大小无关，因此"
        "在 Adam 下增长不会来自更大的梯度。",
    ),
    lesson=Words(
        "How far a step moves the output is another quantity than the gradient. From 6 to 96 layers one step of "
        "Adam moves post-norm's output 19 times as far, and one of SGD 14 times, while the length of its gradient "
        "grows by about half. DeepNorm's update is 9 times smaller at 6 layers and 33 times at 96 (Adam). But "
        "smaller is not constant: it grows fivefold under Adam and under SGD, where the theory bounds it by a "
        "constant; both statements of a factor below two are refuted here. Pre-norm lies between the two. What "
        "was measured is the first step at a rate far below that of a training, not a training.",
        "一步使输出移动多远，与梯度大小不是一回事。从 6 层到 96 层，post-norm 输出的移动量在 Adam 的一步下增至 19 倍，在 SGD 的一步下增至 14 倍，"
        "而梯度长度只增大约一半。DeepNorm 的移动量在 6 层时小 9 倍，96 层时小 33 倍（Adam）。但更小不等于不变：无论 Adam 还是 SGD，"
        "它都增至五倍，而理论给出的上界是常数；“不到两倍”的两个命题在此都被否定。pre-norm 介于两者之间。这里测的是训练第一步，且学习率远小于训练所用，"
        "不是整个训练。",
    ),
    claims=(),
    factors={"wiring": tuple(WIRINGS), "depth": DEPTHS, "optimizer": ("Adam", "SGD")},
    measure=measure,
    metrics={
        "update": Metric(Words("move of the output over the rate", "输出的移动量除以学习率")),
        "gradient": Metric(Words("length of the step over the rate", "步长的范数除以学习率")),
    },
    primary=Contrast(
        Words(
            "From 6 to 96 layers the update of post-norm grows at least twice as much as that of DeepNorm "
            "(one step of Adam).",
            "从 6 层到 96 层，post-norm 的模型更新的增长倍数至少是 DeepNorm 的两倍（Adam 一步）。",
        ),
        lambda rows: _growth(rows, "post-norm", "Adam") - _growth(rows, "DeepNorm", "Adam"),
        limit=math.log10(2),
        unit=DECADES,
    ),
    secondary=(
        Contrast(
            Words("Under SGD, which the theory is about, DeepNorm's update grows by less than a factor of two.",
                  "理论所讨论的 SGD 下，DeepNorm 的模型更新增长不到一倍。"),
            _grows("DeepNorm", "SGD"), limit=math.log10(2), rule="below", unit=DECADES, name="flat-sgd",
        ),
        Contrast(
            Words("Under Adam as well.", "Adam 下也是如此。"),
            _grows("DeepNorm", "Adam"), limit=math.log10(2), rule="below", unit=DECADES, name="flat-adam",
        ),
        Contrast(
            Words("In the deepest network DeepNorm's update is at least ten times smaller than post-norm's.",
                  "在最深的网络里，DeepNorm 的模型更新不到 post-norm 的十分之一。"),
            _deepest("post-norm", "DeepNorm", "Adam"), limit=1, unit=DECADES, name="smaller",
        ),
        Contrast(
            Words("Pre-norm's update there is at least twice as small as post-norm's.",
                  "此时 pre-norm 的模型更新至多是 post-norm 的一半。"),
            _deepest("post-norm", "pre-norm", "Adam"), limit=math.log10(2), unit=DECADES, name="pre-smaller",
        ),
        Contrast(
            Words("The length of post-norm's whole gradient stays within a factor of two.",
                  "post-norm 的总梯度范数变化不到一倍。"),
            _grows("post-norm", "SGD", "gradient"), limit=math.log10(2), rule="within", unit=DECADES,
            name="no-explosion",
        ),
    ),
    modes={
        "quick": Mode(8, 0.5, {"depth": (6, 96)}),
        "default": Mode(8, 1),
    },
    plots=(
        Plot("lines", Words("How far one step moves the output", "一步使输出移动多远"), x="depth",
             y="update", color="wiring", facet="optimizer", log_x=True, log_y=True,
             x_title=Words("layers", "层数")),
        Plot("lines", Words("Length of the gradient", "梯度的范数"), x="depth", y="gradient",
             color="wiring", log_x=True, log_y=True, x_title=Words("layers", "层数"),
             only={"optimizer": "SGD"}),
    ),
    published=(
        Published(
            Words("update of tiny networks of 6 to 100 layers early in training: DeepNorm's much smaller "
                  "and nearly constant, post-norm's growing",
                  "6 至 100 层小网络训练早期的模型更新：DeepNorm 小得多且几乎不变，post-norm 不断增长"),
            Words("figure only", "仅有图"),
            "Wang et al. 2022 (arXiv:2203.00555), figure 5",
        ),
    ),
    heavy=True,
)  # fmt: skip
