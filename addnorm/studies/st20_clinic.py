"""ST-20 The clinic: every printed block and drawing of the documents beside its corrected form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from addnorm.models.layers import Attention
from addnorm.studies.clinic_cases import Case, pairs
from addnorm.studies.clinic_examination import CHECKS, examined
from addnorm.studies.frame import (
    Claim,
    Contrast,
    Metric,
    Mode,
    Plot,
    Rows,
    Study,
    Words,
)


def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Examine one side of one twin: 1 for a check that is passed, 0 for one that is failed."""
    torch.manual_seed(cell["seed"])
    pair = pairs()[cell["twin"]]()
    case = pair.printed if cell["side"] == "printed" else pair.corrected
    found = examined(case)
    named = pair.fails if cell["side"] == "printed" else ()
    said = pair.errors if cell["side"] == "printed" else ()
    checks = {name: float(found[name]) for name in CHECKS}
    return {
        **checks,
        "failed_checks": sum(1 - v for v in checks.values()),
        "sick": float(bool(pair.fails)),
        "named": float(all(not found[name] for name in named)),
        "said": float(bool(found["errors"]) == bool(said) and all(s in found["errors"] for s in said)),
        "left": found["left"],
        "parameters": found["parameters"],
        **_facts(case),
    }  # fmt: skip


def _facts(case: Case) -> dict[str, int]:
    """Return norms and layers of the network that the block belongs to; of none, 0."""
    modules = list(case.network().modules()) if case.network else []
    return {
        "norms": sum(isinstance(m, nn.LayerNorm) for m in modules),
        "layers": sum(isinstance(m, Attention) for m in modules),
    }


def _sum(rows: Rows, metric: str, **levels: Any) -> float:
    return float(sum(rows.only(**levels).column(metric)))


def _wrong(rows: Rows) -> float:
    """Return how many sick twins keep their defect to themselves, and healthy ones fail a check."""
    missed = [row for row in rows if row["sick"] and not row["named"]]
    unexpected = [row for row in rows if not row["said"]]
    alarms = [
        row
        for row in rows
        if row["failed_checks"] and (row["side"] == "corrected" or not row["sick"])
    ]
    return float(len(missed) + len(unexpected) + len(alarms))


def _missed(twin: str) -> Callable[[Rows], float]:
    """Return whether a printed side passes what names its defect, 1 or 0."""

    def effect(rows: Rows) -> float:
        (row,) = rows.only(twin=twin, side="printed")
        return float(not row["named"] or not row["said"])

    return effect


def _failed(twin: str) -> Callable[[Rows], float]:
    return lambda rows: _sum(rows, "failed_checks", twin=twin, side="printed")


def _fact(metric: str, twin: str, value: int) -> Callable[[Rows], float]:
    return lambda rows: float(rows.value(metric, twin=twin, side="corrected") - value)


def _norms(rows: Rows) -> float:
    """Return how far v7 is from no norm, and v9 from one per sublayer and one at the end."""
    expected = {"000 v7-block": 0, "000 v9-block": 7}
    return sum(abs(_fact("norms", twin, count)(rows)) for twin, count in expected.items())


def _added(rows: Rows) -> float:
    """Return the parameters that two skips add to a layer that had none."""
    both = [rows.value("parameters", twin="004 doubled", side=s) for s in ("printed", "corrected")]
    return float(both[1] - both[0])


def _exact(name: str, effect: Callable[[Rows], float], en: str, zh: str, unit: Words) -> Contrast:
    return Contrast(Words(en, zh), effect, limit=0, rule="exact", unit=unit, name=name)


MISSED, FAILED = Words("defects missed", "漏检的缺陷"), Words("failed checks", "未通过的检查")
TITLES: Mapping[str, Words] = {
    "built": Words("it can be built and called", "能够构造并调用"),
    "skip": Words("silent branches: the stream comes out", "分支输出零时残差流原样输出"),
    "jacobian": Words("silent branches: the Jacobian is the stream's", "分支输出零时雅可比矩阵正确"),
    "input": Words("the caller's tensor is not changed", "不改动调用者的张量"),
    "steady": Words("nothing random on the stream", "残差流上没有随机性"),
    "trains": Words("two in a row train", "两个相接可以训练"),
    "apart": Words("entries stay apart", "样本互不混合"),
    "norm": Words("the norm divides by D", "归一化除以 D"),
    "dropout": Words("dropout falls on what is added", "dropout 作用于所加的量"),
    "repeat": Words("asked twice, the same answer", "重复调用结果相同"),
    "edges": Words("no doubled edge, no lonely addition", "没有重复的边和单输入的加法"),
    "agree": Words("descriptions agree", "各种描述一致"),
    "lines": Words("cited lines are right", "引用的行号正确"),
}  # fmt: skip

STUDY = Study(
    id="ST-20",
    name="clinic",
    title=Words("The clinic: code and drawings", "门诊：代码与图"),
    question=Words(
        "Do the blocks and drawings of the documents do what a residual connection must do, and which "
        "check tells a defect?",
        "各文档中的代码块和示意图是否真的实现了残差连接？哪一项检查能发现缺陷？",
    ),
    design=Words(
        "Every printed block, formula and drawing is written anew as a small module with the same "
        "behaviour, beside its corrected form; drawings and formulas are edge lists that compute. Both "
        "go through the same thirteen checks. The main one needs no knowledge of the code: silence the "
        "branches (all their matrices 0), and the stream must come out unchanged, with the Jacobian I. "
        "The others: the linter's (input changed, random stream, no backward pass, mixed batch, "
        "variance over D - 1), agreement of what describes the same thing, edges, cited lines.",
        "每个印出的代码块、公式和示意图都重写成行为相同的小模块，并配上改正后的形式；图和公式写成可以运行的边表。"
        "两者都接受同样的十三项检查。其中最主要的一项不需要读代码：让分支输出零（所有矩阵置零），残差流必须原样"
        "输出，雅可比矩阵为 I。其余各项：静态检查器所查的（改动输入、残差流随机、无法反向传播、批内混合、方差除以 "
        "D - 1）、同一事物的不同描述是否一致、图中的边、引用的行号。",
    ),
    controls=Words(
        "Eight of the 25 blocks are sound as printed: they must pass everything, as must all corrected "
        "forms, so that a check that always fails would be found out. Weights and inputs are drawn anew "
        "for every seed, and both sides of a twin have the same ones. Nothing is trained.",
        "25 个代码块、公式和图中有 8 个本来就正确：它们和所有改正后的形式一样，必须通过全部检查，这样总报错的检查也会暴露。"
        "每个种子重新抽取权重和输入，同一对的两边完全相同。不涉及训练。",
    ),
    lesson=Words(
        "Silence the branches and see whether the input comes back: this one test finds a lost skip in a "
        "module, in a description and in a drawing, without a look at the code. It names three of the 17 "
        "defects: an input changed in place, dropout on the stream, or a batch read as a sequence each "
        "need a test of their own.",
        "让分支输出零，看输入是否原样返回：不必读代码，只凭这一项就能在模块、描述和图中查出丢失的捷径。17 个缺陷中它能"
        "指出 3 个；就地修改输入、残差流上的 dropout、把批次当成序列来读等，各需要自己的检查。",
    ),
    claims=(
        Claim("0.2", "000", 29, Words(
            "A block adds attention of x to x and then the feed-forward to the sum, so that x passes on.",
            "块先把 x 的注意力加到 x 上，再加上前馈网络的输出，x 因此得以传递。",
        ), by="v7-block"),
        Claim("0.9", "000", 78, Words("Version 7 stacks three blocks.", "v7 堆叠了三个块。"), by="three-blocks"),
        Claim("0.16", "000", 90, Words(
            "Version 7 has no layer norm; version 9 has one in front of each sublayer.",
            "v7 没有层归一化；v9 在每个子层之前有一个。",
        ), by="norms"),
        Claim("0.20", "000", 101, Words(
            "The flow chart shows a skip around each of the two sublayers.",
            "流程图画出了绕过两个子层的捷径。",
        ), by="v9-drawing", stands=False),
        Claim("0.21", "000", 55, Words(
            "The cited lines hold the additions and the number of layers.",
            "引用的行号就是残差加法和层数所在之处。",
        ), by="source-lines", stands=False),
        Claim("1.17", "001", 110, Words(
            "The printed function is a residual block: what it returns is F(x) + x.",
            "印出的函数是残差块：返回 F(x) + x。",
        ), by="residual-block"),
        Claim("1.32", "001", 198, Words(
            "A pre-norm layer has two additions, one around norm and attention, one around norm and "
            "feed-forward.",
            "pre-norm 的一层有两个加法，分别绕过归一化加注意力、归一化加前馈。",
        ), by="prenorm-drawing"),
        Claim("2.3", "002", 27, Words(
            "A Transformer block adds its input once, after attention, feed-forward and norm, and puts an "
            "activation such as ReLU behind the sum.",
            "Transformer 块在注意力、前馈和归一化之后加一次输入，再经过 ReLU 之类的激活函数。",
        ), by="one-skip", stands=False),
        Claim("2.4", "002", 34, Words(
            "Words, formulas and code of the document describe one block.",
            "文档的文字、公式和代码描述的是同一个块。",
        ), by="placements", stands=False),
        Claim("2.6", "002", 60, Words(
            "Attention is softmax(Q K'/√d) V.", "注意力等于 softmax(QKᵀ/√d)V。",
        ), by="attention-formula"),
        Claim("2.7", "002", 70, Words(
            "The feed-forward is max(0, a W + b) W' + b'.", "前馈网络等于 max(0, aW + b)W' + b'。",
        ), by="ffn-formula"),
        Claim("2.8", "002", 77, Words(
            "To norm the feed-forward's output and add x is the same as to norm x plus that output.",
            "对前馈输出做归一化再加 x，等于对 x 与前馈输出之和做归一化。",
        ), by="words-formula", stands=False),
        Claim("2.9", "002", 109, Words(
            "The printed block can be called, with and without a mask.", "印出的块可以调用，带不带掩码都行。",
        ), by="mask-keyword", stands=False),
        Claim("2.11", "002", 115, Words(
            "The printed block has dropout where a Transformer has it, on what is added.",
            "印出的块与 Transformer 一样，dropout 作用于所加的量。",
        ), by="input-dropout", stands=False),
        Claim("2.12", "002", 95, Words(
            "The printed block takes a batch (B, T, D).", "印出的块可以输入 (B, T, D) 的批次。",
        ), by="batch-mixer", stands=False),
        Claim("4.5", "004", 24, Words(
            "The printed block is a residual block that can be stacked.", "印出的块是可以堆叠的残差块。",
        ), by="inplace", stands=False),
        Claim("4.17", "004", 110, Words(
            "The printed layer has residual connections around its attention and its feed-forward.",
            "印出的层在注意力和前馈之外都有残差连接。",
        ), by="doubled", stands=False),
        Claim("4.18", "004", 113, Words(
            "The printed layer can be built from the classes that it names.",
            "印出的层可以用它所写的类构造出来。",
        ), by="undefined", stands=False),
    ),
    factors={"twin": tuple(pairs()), "side": ("printed", "corrected")},
    measure=measure,
    metrics={
        "failed_checks": Metric(Words("failed checks, of 13", "未通过的检查数，共 13 项")),
        "left": Metric(Words(
            "what is wrong with the stream when the branches are silent, share of its size; 0 without a "
            "skip to look at",
            "分支输出零时残差流的相对误差；没有捷径可查时为 0",
        )),
        **{name: Metric(title, Words("1 passed", "1 为通过")) for name, title in TITLES.items()},
        "sick": Metric(Words("sick as printed", "原文有缺陷")),
        "named": Metric(Words("the check that names the defect failed", "缺陷对应的检查未通过")),
        "said": Metric(Words("errors are the expected ones", "报错与预期一致")),
        "parameters": Metric(Words("parameters of the block", "块的参数量")),
        "norms": Metric(Words("norms in the network of the block", "所属网络的归一化层数")),
        "layers": Metric(Words("layers in the network of the block", "所属网络的层数")),
    },
    primary=Contrast(
        Words(
            "Every sick block fails the check that names its defect, and every sound or corrected one "
            "passes them all.",
            "每个有缺陷的块都通不过对应的检查；每个正确的或改正后的块都通过全部检查。",
        ),
        _wrong,
        limit=0,
        rule="exact",
        unit=Words("wrong diagnoses", "误诊数"),
    ),
    secondary=(
        _exact("v7-block", _failed("000 v7-block"),
               "Block v7 passes every check and equals the wiring `residual`.",
               "v7 的块通过全部检查，与接法 residual 相同。", FAILED),
        _exact("three-blocks", _fact("layers", "000 v7-block", 3),
               "Version 7 as this package builds it, whose sizes are read off the source, has three layers.",
               "本包按源码尺寸构造的 v7 有三层。", Words("layers too many", "多出的层数")),
        _exact("norms", _norms,
               "Version 7 has no norm, version 9 has seven: two in each of three blocks and a last one.",
               "v7 没有归一化；v9 有七个：三个块各两个，末尾一个。", Words("norms apart", "相差的归一化层数")),
        _exact("v9-drawing", _missed("000 v9-drawing"),
               "As drawn, the chart has an edge twice and an addition with one input, and no skip when it "
               "is computed.",
               "照图计算：有一条边重复，一个加法只有一个输入，也没有捷径。", MISSED),
        _exact("source-lines", _missed("000 source-lines"),
               "By citation of commit 278aa76, not by computing: three cited ranges do not hold their lines.",
               "依据提交 278aa76（核对引文，并非计算）：有三处引用的行号范围不包含所指的代码。", MISSED),
        _exact("residual-block", _failed("001 residual-block"),
               "The function of document 001 passes every check and equals the wiring `residual`.",
               "文档 001 的函数通过全部检查，与接法 residual 相同。", FAILED),
        _exact("prenorm-drawing", _failed("001 prenorm-drawing"),
               "The pre-norm layer as drawn passes every check and equals the wiring `prenorm`.",
               "照图计算的 pre-norm 层通过全部检查，与接法 prenorm 相同。", FAILED),
        _exact("one-skip", _missed("002 one-skip"),
               "With silent branches the block as described does not return its input.",
               "分支输出零时，按所述结构的块不返回它的输入。", MISSED),
        _exact("placements", _missed("002 placements"),
               "Words, formulas and code, run on the same parts, compute different things.",
               "用同样的部件分别按文字、公式和代码计算，结果不同。", MISSED),
        _exact("attention-formula", _failed("002 attention-formula"),
               "The formula, tokens in rows, equals torch's attention.",
               "以行表示词元时，公式与 torch 的注意力相等。", FAILED),
        _exact("ffn-formula", _failed("002 ffn-formula"),
               "The formula equals the feed-forward of the Transformer.",
               "公式与 Transformer 的前馈网络相等。", FAILED),
        _exact("words-formula", _missed("002 words-formula"),
               "x + N(F(x)) and N(x + F(x)) differ.", "x + N(F(x)) 与 N(x + F(x)) 不相等。", MISSED),
        _exact("mask-keyword", _missed("002 mask-keyword"),
               "Every call of the printed block is a TypeError: attention knows no `mask`.",
               "印出的块一调用就是 TypeError：注意力没有参数 mask。", MISSED),
        _exact("input-dropout", _missed("002 input-dropout"),
               "In training no update of the feed-forward is dropped.",
               "训练时前馈网络的更新没有一个被丢弃。", MISSED),
        _exact("batch-mixer", _missed("002 batch-mixer"),
               "Given (B, T, D), examples of a batch change each other's outputs.",
               "输入 (B, T, D) 时，同一批的样本互相影响输出。", MISSED),
        _exact("inplace", _missed("004 inplace"),
               "The block changes its input, refuses a leaf that asks for a gradient, and two in a row have "
               "no backward pass.",
               "该块改动输入，拒绝需要梯度的叶子张量，两个相接无法反向传播。", MISSED),
        _exact("doubled", _missed("004 doubled"),
               "With silent branches the printed layer returns nothing of its input.",
               "分支输出零时，印出的层不返回输入的任何部分。", MISSED),
        _exact("undefined", lambda rows: _missed("004 undefined")(rows) + _missed("004 inner-width")(rows),
               "Building the layer is a NameError, and torch's own attention takes no hidden width.",
               "构造该层即 NameError；torch 自己的注意力也不接受隐藏宽度。", MISSED),
        _exact("free", _added,
               "Mending the two skips of that layer adds no parameter.",
               "补上该层的两个捷径不增加参数。", Words("parameters added", "增加的参数")),
    ),
    modes={
        "quick": Mode(3, 0.1),
        "default": Mode(8, 0.2),
    },
    plots=(
        Plot("dots", Words("Failed checks of each block", "各块未通过的检查数"), x="twin",
             y="failed_checks", color="side"),
        Plot("dots", Words("What silent branches leave wrong", "分支输出零时残差流的误差"), x="twin",
             y="left", color="side"),
    ),
)  # fmt: skip
