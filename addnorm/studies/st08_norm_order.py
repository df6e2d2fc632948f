"""ST-08 Pre-norm against post-norm: the gradient at the start, and training without warm-up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from addnorm.models.gpt import GPT
from addnorm.models.layers import FeedForward
from addnorm.probe.vitals import xray
from addnorm.studies import bench
from addnorm.studies.frame import (
    Claim,
    Contrast,
    Metric,
    Mode,
    Plot,
    Published,
    Rows,
    Study,
    Words,
)
from addnorm.training.objective import cross_entropy

CONTEXT = 32
WIDE = 128  # width of the networks that are only looked at, at the start
DEPTHS = (2, 4, 8, 16, 32)
DEEP = 8  # least depth that counts in a slope: below, the embedding is a large part of the stream
LAYERS = 12  # depth of the profile over layers and of the trainings
WIRINGS = {"pre": "prenorm", "post": "postnorm"}
START = "fairseq"  # Xavier's, as fairseq has it: gain 1/sqrt(2) for queries, keys and values
RATE = 1e-3
POWER = Words("exponent of the depth", "深度的指数")
NATS = Words("nats", "nat")


def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Look at networks of five depths at the start, and train one of twelve layers."""
    wiring, seed, steps = WIRINGS[cell["norm"]], cell["seed"], cell["steps"]
    found = _start(seed, wiring)
    model = bench.gpt(seed, LAYERS, wiring, CONTEXT, start=START)
    settings = bench.ADAM | {"batch": 12, "betas": (0.9, 0.98), "clip": 1.0}
    warmup = round(cell["warmup"] * steps)
    run = bench.trained(
        model,
        bench.text(CONTEXT),
        seed,
        **settings | {"lr": cell["rate"], "steps": steps, "warmup": warmup},
    )
    shown = range(0, steps - steps % 10, 10)
    finished = run.status == "finished"
    return found | {
        "loss": min(run.validation, bench.UNIFORM) if finished else math.nan,
        "train": min(run.training_loss, bench.UNIFORM) if finished else math.nan,
        "curve": [float(np.mean(run.losses[i : i + 10])) for i in shown],
        "step": [i + 5 for i in shown],
    }


def _start(seed: int, wiring: str) -> dict[str, Any]:
    """Return what the networks look like before training."""
    x, y = bench.windows(CONTEXT, 16)
    last = []
    for depth in DEPTHS:
        model = bench.gpt(seed, depth, wiring, CONTEXT, dim=WIDE, start=START)
        last.append(last_gradient(model, x, y))
    depths, deep = np.array(DEPTHS), np.array(DEPTHS) >= DEEP
    model = bench.gpt(seed, LAYERS, wiring, CONTEXT, dim=WIDE, start=START)
    trace = xray(model.eval(), x, y)
    torch.autograd.backward(cross_entropy(model(x), y))
    after = [c.stream_after**2 for c in trace.connections[1::2]]
    return {
        "depth": list(DEPTHS),
        "gradient": last,
        "slope": np.polyfit(np.log(depths[deep]), np.log(np.array(last)[deep]), 1)[0],
        "layer": list(range(1, LAYERS + 1)),
        "profile": [_gradient_norm(f) for f in _feedforwards(model)],
        "stream": after,
        "growth": (after[-1] - trace.connections[0].stream_before ** 2) / LAYERS,
        "alike": trace.token_similarity,
    }


def _feedforwards(model: GPT) -> list[FeedForward]:
    return [c.branch for c in model.stack if isinstance(c.branch, FeedForward)]


def _gradient_norm(branch: FeedForward) -> float:
    """Return the Frobenius norm of the gradient of the output matrix W2."""
    assert branch.out is not None
    assert branch.out.weight.grad is not None
    return float(branch.out.weight.grad.norm())


def last_gradient(model: GPT, x: Tensor, y: Tensor) -> float:
    """Return |dLoss/dW2| of the last feed-forward for the loss of one position, RMS over all.

    Behind that branch nothing mixes positions: the gradient of position i is the outer product of
    the gradient at the branch's output (D) with its hidden vector (4 D), both of position i.
    """
    out = _feedforwards(model)[-1].out
    assert out is not None
    seen: list[Tensor] = []

    def look(_: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        seen.extend((inputs[0], output))

    handle = out.register_forward_hook(look)
    torch.autograd.backward(cross_entropy(model(x), y) * y.numel())
    handle.remove()
    hidden, update = seen
    assert update.grad is not None
    squares = hidden.square().sum(-1) * update.grad.square().sum(-1)  # (B, T)
    return squares.mean().sqrt().item()


def _slope(rows: Rows, norm: str) -> float:
    return float(rows.only(norm=norm, warmup=0.0, rate=RATE)[0]["slope"])


def _loss(rows: Rows, norm: str, warmup: float) -> float:
    return float(rows.value("loss", norm=norm, warmup=warmup, rate=RATE))


def _best(rows: Rows, norm: str, warmup: float) -> float:
    """Return the validation loss at the rate with the lowest training loss."""
    return float(min(rows.only(norm=norm, warmup=warmup), key=lambda row: row["train"])["loss"])


def _interaction(rows: Rows) -> float:
    """Return by how much more warm-up lowers post-norm's loss than pre-norm's, in nats."""
    post, pre = (_loss(rows, n, 0.0) - _loss(rows, n, 0.5) for n in ("post", "pre"))
    return post - pre


def _turn(rows: Rows) -> float:
    """Return the smaller of post-norm's rise of the gradient over layers and pre-norm's fall."""
    post, pre = (rows.only(norm=n, warmup=0.0, rate=RATE)[0]["profile"] for n in ("post", "pre"))
    return min(math.log10(post[-1] / post[0]), -math.log10(pre[-1] / pre[0]))


STUDY = Study(
    id="ST-08",
    name="norm-order",
    title=Words("Norm before or after", "归一化放在前面还是后面"),
    question=Words(
        "How does the place of the norm change the gradient at the start, and who needs warm-up?",
        "归一化的位置怎样改变初始时的梯度？谁需要学习率预热？",
    ),
    design=Words(
        "Character GPTs with the norm in front of each branch (pre-norm) or after each addition "
        f"(post-norm). At the start, {WIDE} wide and 2 to 32 layers deep: the gradient of the last "
        "feed-forward's output matrix for the loss of one position, as in the theorem of Xiong et al. "
        f"2020, its slope over the depth from {DEEP} layers on, the gradient by layer, and the growth of "
        f"the stream. Then {LAYERS} layers, 64 wide, are trained with Adam, without warm-up and with "
        "warm-up over half of the steps.",
        f"字符级 GPT，归一化放在每个分支之前（pre-norm）或每次相加之后（post-norm）。初始时（宽 {WIDE}，深 2 至 "
        "32 层）测量最后一个前馈层输出矩阵对单个位置损失的梯度（与 Xiong 等 2020 的定理相同）、"
        f"它从 {DEEP} 层起随深度的斜率、各层的梯度以及残差流的增长。再用 Adam 训练 {LAYERS} 层、宽 64 的模型：不预热，"
        "或用一半步数预热。",
    ),
    controls=Words(
        "Both have the same branches, start and batches, and Xavier's start, the one of the theorem "
        "(fairseq's form of it). With GPT-2's start, whose branches are small, post-norm mostly trains "
        "without warm-up too. Post-norm is also trained at a third of the rate, since a lower rate is the "
        "other cure; where the better of the two rates counts, it is the one with the lower training loss. "
        "After warm-up the rate is constant, so that the trainings differ in nothing else. A loss above "
        "that of uniform guessing counts as that, and so does a training that diverges.",
        "两者的分支、初始值与批次都相同，采用定理所用的 Xavier 初始化（fairseq 的形式）。若用 GPT-2 的初始化，"
        "分支很小，post-norm 不预热大多也能训练。降低学习率是另一种办法，因此 post-norm 另以三分之一的学习率训练；"
        "凡取较好的学习率，均指训练损失较低者。预热之后学习率保持不变，各次训练别无差异。损失高于均匀猜测的，"
        "以及发散的训练，一律按均匀猜测计。",
    ),
    lesson=Words(
        "The place of the norm is judged in two ways. At the start, as Xiong et al. derive, the last "
        "feed-forward's gradient falls with the depth in pre-norm (exponent -0.61; the theory has -0.5) and stays "
        "level in post-norm (0.00). From the first to the last layer of one network it falls in pre-norm and "
        "shows no trend in post-norm. In training at a rate of 0.001, post-norm without warm-up is stuck near the "
        "loss of letter frequencies (3.24 against 3.27 nats) and learns with it (2.71); pre-norm learns without "
        "(2.59). But warm-up is one cure and a lower rate another: at 0.0003 post-norm learns without warm-up as "
        "well (2.79).",
        "归一化位置的影响从两方面判断。在起点，正如 Xiong 等人推导的那样，最后一个前馈层的梯度在 pre-norm 中随深度下降（指数 -0.61，"
        "理论为 -0.5），在 post-norm 中基本不变（0.00）。在同一网络中，从第一层到最后一层，pre-norm 的梯度下降，post-norm 看不出趋势。"
        "以 0.001 的学习率训练时，post-norm 不预热就停在按字符频率猜测的损失附近（3.24，后者为 3.27），预热后能学（2.71）；pre-norm 不预热也能学（2.59）"
        "。但预热只是一种办法，降低学习率是另一种：0.0003 时 post-norm 不预热也能学（2.79）。",
    ),
    claims=(
        Claim("1.33", "001", 228, Words(
            "Whether the norm stands before the branch or after the addition matters much for stability; "
            "before it, training is more stable (here: whether warm-up is needed, at a rate of 0.001).",
            "归一化在分支之前还是在加法之后，很影响训练是否稳定；放在前面更稳定（此处指：学习率 0.001 时是否需要预热）。",
        ), by="warm-up"),
        Claim("1.35", "001", 245, Words(
            "Post-norm puts norms on the gradient's path, which changes its scale (here: how the last "
            "feed-forward's gradient goes with the depth).",
            "post-norm 的梯度须经过归一化，梯度的尺度因此改变（此处指：最后一个前馈层的梯度怎样随深度变化）。",
        )),
    ),
    factors={"norm": ("pre", "post"), "warmup": (0.0, 0.5), "rate": (3e-4, RATE)},
    skip=lambda cell: cell["norm"] == "pre" and cell["rate"] < RATE,
    measure=measure,
    metrics={
        "loss": Metric(Words("validation loss", "验证损失"), NATS, bench.UNIFORM),
        "train": Metric(Words("training loss, last tenth of the steps", "最后十分之一步数的训练损失"),
                        NATS, bench.UNIFORM),
        "curve": Metric(Words("training loss", "训练损失"), NATS),
        "step": Metric(Words("step", "步数")),
        "depth": Metric(Words("layers", "层数")),
        "gradient": Metric(Words("gradient of the last feed-forward", "最后一个前馈层的梯度")),
        "slope": Metric(Words("its slope over the depth", "梯度随深度的斜率"), POWER),
        "layer": Metric(Words("layer", "层")),
        "profile": Metric(Words("gradient of the feed-forward by layer", "各层前馈层的梯度")),
        "stream": Metric(Words("mean square of the stream by layer", "各层残差流的均方")),
        "growth": Metric(Words("growth of that per layer", "残差流均方每层的增量")),
        "alike": Metric(Words("cosine between positions behind the last layer",
                              "最后一层之后各位置间的余弦")),
    },
    primary=Contrast(
        Words(
            "At the start the last feed-forward's gradient falls faster with the depth in pre-norm than in "
            "post-norm: as powers of the depth they differ by more than 1/4 (theory: 1/2).",
            "初始时，最后一个前馈层的梯度随深度的下降，pre-norm 快于 post-norm：写成深度的幂，指数相差超过 1/4（理论值 1/2）。",
        ),
        lambda rows: _slope(rows, "post") - _slope(rows, "pre"),
        limit=0.25,
        unit=POWER,
    ),
    secondary=(
        Contrast(
            Words(
                "In pre-norm the slope of that gradient over the depth lies within 0.15 of -1/2.",
                "pre-norm 中该梯度随深度的斜率与 -1/2 之差小于 0.15。",
            ),
            lambda rows: _slope(rows, "pre") + 0.5,
            limit=0.15, rule="within", name="pre-slope",
            unit=Words("from an exponent of -1/2", "（与指数 -1/2 之差）"),
        ),
        Contrast(
            Words(
                "In post-norm the slope of that gradient over the depth lies within 0.15 of 0.",
                "post-norm 中该梯度随深度的斜率与 0 之差小于 0.15。",
            ),
            lambda rows: _slope(rows, "post"),
            limit=0.15, rule="within", unit=POWER, name="post-slope",
        ),
        Contrast(
            Words(
                "From the first to the last layer of one network the gradient of the feed-forward rises in "
                "post-norm and falls in pre-norm.",
                "在同一网络中，从第一层到最后一层，前馈层的梯度在 post-norm 中上升，在 pre-norm 中下降。",
            ),
            _turn,
            limit=0.0, unit=Words("powers of ten", "个数量级"), name="profile",
        ),
        Contrast(
            Words(
                "In pre-norm the stream's mean square grows by 1/2 to 3/2 per layer.",
                "pre-norm 残差流的均方每层增长 1/2 至 3/2。",
            ),
            lambda rows: rows.only(norm="pre", warmup=0.0)[0]["growth"] - 1,
            limit=0.5, rule="within", unit=Words("beside 1 per layer", "与每层 1 之差"), name="stream",
        ),
        Contrast(
            Words(
                f"At a rate of {RATE:g} warm-up lowers the loss of post-norm by at least 0.3 nats more than "
                "that of pre-norm.",
                f"学习率为 {RATE:g} 时，预热使 post-norm 的损失降低，比 pre-norm 至少多降 0.3 nat。",
            ),
            _interaction,
            limit=0.3, unit=NATS, name="warm-up",
        ),
        Contrast(
            Words(
                "Each at its better rate, post-norm without warm-up ends less than 0.15 nats above "
                "post-norm with it.",
                "各取较好的学习率时，post-norm 不预热的损失比预热时高不到 0.15 nat。",
            ),
            lambda rows: _best(rows, "post", 0.0) - _best(rows, "post", 0.5),
            limit=0.15, rule="below", unit=NATS, name="lower-rate",
        ),
    ),
    modes={
        "quick": Mode(8, 2.1, settings={"steps": 120}),
        "default": Mode(8, 4.4, settings={"steps": 300}),
    },
    plots=(
        Plot(
            "profile",
            Words("Gradient of the last feed-forward at the start", "初始时最后一个前馈层的梯度"),
            x="depth", y="gradient", color="norm", log_x=True, log_y=True,
            only={"warmup": 0.0, "rate": RATE},
            x_title=Words("layers of the network", "网络的层数"),
        ),
        Plot(
            "profile",
            Words(f"Training at a rate of {RATE:g}", f"学习率 {RATE:g} 时的训练"),
            x="step", y="curve", color="norm", facet="warmup", only={"rate": RATE},
            x_title=Words("step", "步"),
            reference=bench.UNIGRAM,
            reference_title=Words("guessing by frequency", "按字符频率猜测"),
        ),
        Plot(
            "dots", Words("Validation loss of post-norm", "post-norm 的验证损失"),
            x="warmup", y="loss", color="rate", only={"norm": "post"},
            x_title=Words("warm-up, as a share of the steps", "预热占总步数的比例"),
            reference=bench.UNIGRAM,
            reference_title=Words("guessing by frequency", "按字符频率猜测"),
        ),
        Plot(
            "profile", Words("Gradient by layer, 12 layers", "各层的梯度（12 层）"),
            x="layer", y="profile", color="norm", log_y=True, only={"warmup": 0.0, "rate": RATE},
            x_title=Words("layer", "层"),
        ),
    ),
    published=(
        Published(
            Words(
                "The theorem: at the start the last feed-forward's gradient goes as 1/sqrt(L) in pre-norm and "
                "does not depend on L in post-norm",
                "定理：初始时，最后一个前馈层的梯度在 pre-norm 中按 1/sqrt(L) 变化，在 post-norm 中与 L 无关",
            ),
            Words("slopes -1/2 and 0", "斜率 -1/2 与 0"),
            "Xiong et al. 2020 (arXiv:2002.04745), Theorem 1",
        ),
        Published(
            Words(
                "Measured on IWSLT14 De-En, 6 to 14 layers: that gradient in post-norm, level; it falls in "
                "pre-norm",
                "IWSLT14 德英翻译实测（6 至 14 层）：post-norm 的该梯度基本不变，pre-norm 的则下降",
            ),
            Words("about 1.6", "约 1.6"),
            "Xiong et al. 2020 (arXiv:2002.04745), section 3.4",
        ),
        Published(
            Words(
                "BLEU of post-norm with Adam on IWSLT14, without and with warm-up",
                "IWSLT14 上用 Adam 训练 post-norm 的 BLEU：不预热与预热",
            ),
            Words("8.45, about 34", "8.45；约 34"),
            "Xiong et al. 2020 (arXiv:2002.04745), section 3.2",
        ),
    ),
    relied=True,
)  # fmt: skip
