"""ST-19 The cost of a shortcut: parameters, operations, traffic, memory, time."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from addnorm.branches import Branch
from addnorm.contract import Stack, parse_spec
from addnorm.cost import cost
from addnorm.models.layers import Attention, FeedForward
from addnorm.models.mlp import Dense
from addnorm.models.resnet import Unit
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

D, COUNT = 64, 4  # width, connections
WARM = 3  # passes that are not timed
WIRINGS = {
    "plain": "plain",
    "residual": "residual",
    "pre-norm": "prenorm",
    "projection": "linear-shortcut",
}
TIMED = ("plain", "residual", "pre-norm")
SHAPES = {"dense": (512,), "convolution": (2, 8, 8), "transformer": (2, 64)}  # of x, without D


def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Build one stack of branches with four wirings, count, and time forward and backward."""
    kind = cell["branch"]
    torch.manual_seed(cell["seed"])
    stacks = {name: _stack(kind, wiring) for name, wiring in WIRINGS.items()}
    x = torch.randn(*SHAPES[kind], D)
    sizes = {name: sum(p.numel() for p in stack.parameters()) for name, stack in stacks.items()}
    bytes_kept = {name: saved(stacks[name], x) for name in TIMED}
    seconds = timed({name: stacks[name] for name in TIMED}, x, cell["repeats"], cell["seed"])
    added, branch = _joining("residual") - _joining("plain"), products(stacks["plain"], x)
    return {
        "parameters": sizes["residual"] - sizes["plain"],
        "projected": (sizes["projection"] - sizes["plain"]) / COUNT,
        "share": added / branch,
        "traffic": _traffic("residual") - _traffic("plain"),
        "memory": (bytes_kept["residual"] - bytes_kept["plain"]) / bytes_kept["plain"],
        "norm_memory": (bytes_kept["pre-norm"] - bytes_kept["residual"]) / bytes_kept["plain"],
        "time": longer(seconds["residual"], seconds["plain"]),
        "least": min(seconds["residual"]) / min(seconds["plain"]) - 1,
        "norm_time": longer(seconds["pre-norm"], seconds["residual"]),
        "pass": 1000 * statistics.median(seconds["plain"]),
    }


def _stack(kind: str, wiring: str) -> Stack:
    """Return the stack in training mode; Xavier keeps every number far from those that underflow."""
    layers: list[Branch]
    if kind == "dense":
        layers = [Dense(D, "relu", hidden=D) for _ in range(COUNT)]
    elif kind == "convolution":
        layers = [Unit(D, D) for _ in range(COUNT)]
    else:
        parts = (lambda: Attention(D, 4, path="matmul"), lambda: FeedForward(D))
        layers = [parts[i % 2]() for i in range(COUNT)]
    return Stack(layers, wiring, dim=D, start="xavier")


def products(stack: Stack, x: Tensor) -> float:
    """Return the multiply-adds of one connection for one position, the mean over the stack."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        stack(x)
    return counter.get_total_flops() / 2 / COUNT / (x.numel() // D)


@functools.cache
def _joining(name: str) -> float:
    """Return the operations of the wiring itself for one position and connection."""
    return cost(parse_spec(WIRINGS[name])).flops.at(D)


@functools.cache
def _traffic(name: str) -> float:
    """Return the elements that the wiring moves for one position and connection, over D."""
    return cost(parse_spec(WIRINGS[name])).traffic.at(D) / D


def saved(stack: Stack, x: Tensor) -> int:
    """Return the bytes of activations that autograd keeps for the way back, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in stack.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # or another would get its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        stack(x).sum()
    return sum(kept.values())


def timed(
    stacks: Mapping[str, Stack], x: Tensor, repeats: int, first: int
) -> dict[str, list[float]]:
    """Return seconds of forward and backward; the stacks take turns, and turns at being first.

    Seconds of the processor for this process: what others take of it does not count.
    """
    names = list(stacks)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(WARM + repeats):
        begin = (first + turn) % len(names)
        for name in names[begin:] + names[:begin]:
            stacks[name].zero_grad(set_to_none=True)
            began = time.process_time()
            stacks[name](x).sum().backward()
            if turn >= WARM:
                seconds[name].append(time.process_time() - began)
    return seconds


def longer(seconds: Sequence[float], reference: Sequence[float]) -> float:
    """Return by what share one takes longer: the median over the turns, where both are neighbours."""
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True)) - 1


def _mean(metric: str) -> Callable[[Rows], float]:
    """Return the mean of a share over the three kinds of branches."""
    return lambda rows: sum(float(v) for v in rows.column(metric)) / len(rows)


def _largest(metric: str) -> Callable[[Rows], float]:
    return lambda rows: max(abs(float(v)) for v in rows.column(metric))


SHARE = Words("share", "比例")

STUDY = Study(
    id="ST-19",
    name="cost",
    title=Words("What a shortcut costs", "捷径的代价"),
    question=Words(
        "Does a shortcut add parameters, operations, memory or time?",
        "捷径会增加参数、运算、内存或时间吗？",
    ),
    design=Words(
        "Four branches, 64 wide, of three kinds (two dense layers; two 3x3 convolutions with "
        "BatchNorm; attention and feed-forward in turn), without shortcuts, with them, and with "
        "pre-norm. Counted are parameters, operations, the stream's elements that are moved, and the "
        "bytes that autograd keeps. Forward and backward are timed in turns; "
        "what is given is the median ratio of neighbouring passes.",
        "四个宽 64 的分支，三种类型（两层全连接；两个带 BatchNorm 的 3x3 卷积；注意力与前馈交替），分别无捷径、有捷径、"
        "pre-norm。统计参数量、运算量、搬运的元素数、自动微分保存的字节数；前向加反向轮流计时，取相邻两次之比的中位数。",
    ),
    controls=Words(
        "All timings of a cell are processor time of one process with one thread, and every network "
        "goes first as often as the others, so that a busy machine disturbs all alike; where it "
        "disturbs too much the timing decides nothing. A shortcut with a matrix of its own shows what counting would find.",
        "同一单元的计时都是一个单线程进程的处理器时间，各网络轮流排在最先，机器繁忙时大家受到同样的干扰；"
        "干扰太大时，计时就不下结论。"
        "另有带自身矩阵的捷径，用来说明计数确实能发现差别。",
    ),
    lesson=Words(
        "An identity shortcut has no parameters, one addition for 2 D multiply-adds of a two-layer branch "
        "(0.8 % at D = 64, less when wider), and autograd keeps nothing more for it. What it costs is traffic, and a few percent of time at "
        "most. A norm in front of every branch is dearer: about a tenth of the time here, and its input "
        "is kept too.",
        "恒等捷径没有参数；两层分支每 2D 次乘加才多一次加法（D = 64 时为 0.8 %，越宽越少），自动微分也不因它多保存什么。它的代价是数据搬运，时间上至多百分之几。"
        "每个分支之前的归一化更贵：这里约占十分之一的时间，还要多保存它的输入。",
    ),
    claims=(
        Claim("4.19", "004", 145, Words(
            "Shortcuts add parameters and so may overfit.", "捷径会增加参数量，可能导致过拟合。",
        ), stands=False),
        Claim("4.20", "004", 146, Words(
            "Shortcuts add noticeably to the computation.", "捷径明显增加计算量。",
        ), by="operations", stands=False),
        Claim("4.20b", "004", 146, Words(
            "They may lengthen training.", "可能延长训练时间。",
        ), by="time", stands=False),
        Claim("4.21", "004", 156, Words(
            "Layer normalisation takes additional time.", "层归一化需要额外的计算时间。",
        ), by="norm-takes-time"),
    ),
    factors={"branch": tuple(SHAPES)},
    measure=measure,
    metrics={
        "parameters": Metric(Words("parameters that shortcuts add", "捷径增加的参数")),
        "projected": Metric(Words("parameters that a projection adds to each", "投影捷径各增加的参数")),
        "share": Metric(Words("additions for each multiply-add of the branch", "每次乘加对应的额外加法"), SHARE),
        "traffic": Metric(Words("elements moved, in streams", "搬运的元素，以残差流计")),
        "memory": Metric(Words("activations kept more, with shortcuts", "捷径多保存的激活值"), SHARE),
        "norm_memory": Metric(Words("activations kept more, with pre-norm", "pre-norm 多保存的激活值"), SHARE),
        "time": Metric(Words("time of shortcuts", "捷径所需时间"), SHARE),
        "least": Metric(Words("the same by the fastest pass", "同上，按最快一次计"), SHARE),
        "norm_time": Metric(Words("time of the norm", "归一化所需时间"), SHARE),
        "pass": Metric(Words("time without shortcuts", "无捷径时的时间"), Words("ms", "毫秒")),
    },
    primary=Contrast(
        Words(
            "Networks with and without identity shortcuts have the same number of parameters.",
            "有无恒等捷径，网络的参数量相同。",
        ),
        _largest("parameters"), limit=0, rule="exact", unit=Words("parameters", "个参数"),
    ),
    secondary=(
        Contrast(
            Words("The additions of a shortcut are less than 1 % of its branch's multiply-adds.",
                  "捷径的加法不到其分支乘加的 1 %。"),
            _largest("share"), limit=0.01, rule="exact", unit=SHARE, name="operations",
        ),
        Contrast(
            Words("A shortcut with a matrix of its own does add parameters: D² or more.",
                  "带自身矩阵的捷径确实增加参数：至少 D²。"),
            lambda rows: min(0.0, min(rows.column("projected")) - D * D),
            limit=0, rule="exact", name="projection-adds",
        ),
        Contrast(
            Words("Autograd keeps no more activations with shortcuts.", "有捷径时，自动微分并不多保存激活值。"),
            _largest("memory"), limit=0, rule="exact", unit=SHARE, name="memory",
        ),
        Contrast(
            Words("What it costs is traffic: three streams, two read and one written.",
                  "代价在于数据搬运：读两份、写一份，共三份残差流。"),
            lambda rows: max(abs(v - 3) for v in rows.column("traffic")),
            limit=1e-9, rule="exact", unit=Words("streams", "份"), name="traffic",
        ),
        Contrast(
            Words("Forward and backward with shortcuts take less than 5 % longer or shorter.",
                  "有捷径时，前向加反向的时间变化不到 5 %。"),
            _mean("time"), limit=0.05, rule="within", unit=SHARE, name="time",
        ),
        Contrast(
            Words("A norm in front of every branch takes more than 1 % longer.",
                  "每个分支之前加归一化，时间增加 1 % 以上。"),
            _mean("norm_time"), limit=0.01, unit=SHARE, name="norm-takes-time",
        ),
    ),
    modes={
        "quick": Mode(8, 0.3, settings={"repeats": 30}),
        "default": Mode(12, 0.5, settings={"repeats": 60}),
    },
    plots=(
        Plot(
            "dots", Words("Time that shortcuts take", "捷径所需的时间"),
            x="branch", y="time", x_title=Words("branch", "分支"),
            reference=0.0, reference_title=Words("none", "无"),
        ),
        Plot(
            "dots", Words("Time that a norm takes", "归一化所需的时间"),
            x="branch", y="norm_time", x_title=Words("branch", "分支"),
            reference=0.0, reference_title=Words("none", "无"),
        ),
        Plot(
            "dots", Words("Additions for each multiply-add", "每次乘加对应的额外加法"),
            x="branch", y="share", log_y=True, x_title=Words("branch", "分支"),
            reference=0.01, reference_title=Words("1 %", "1 %"),
        ),
    ),
    published=(
        Published(
            Words(
                "identity shortcuts need no parameters and next to no computation; multiply-adds of the "
                "34-layer networks with and without them",
                "恒等捷径不需要参数，几乎不增加计算；34 层网络有无捷径的乘加数",
            ),
            Words("3.6 billion both", "均为 36 亿"),
            "He et al. 2015 (arXiv:1512.03385), section 3.2 and figure 3",
        ),
    ),
)  # fmt: skip
