"""What the X-ray says in fixed English phrases, in Chinese; no torch.

The probe speaks English only, and its phrases hold names and numbers. The table below turns each
into Chinese for the terminal and the page; what it does not know stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# English with a group for each name or number, and Chinese with {0}, {1} in their places. What a
# group has matched is translated too, where a phrase holds another one.
PHRASES = (
    # losses
    ("cross-entropy", "交叉熵"),
    ("random direction", "与随机方向的内积"),
    ("the model's own loss", "模型自身的损失"),
    ("the loss that was given", "给定的损失"),
    # how the connections were found
    (r"(\d+) connections of our stacks", "addnorm 的 Stack 中有 {0} 个连接"),
    (r"(\d+) connections found by their additions", "由加法识别出 {0} 个连接"),
    (r"(\d+) blocks of class (\S+) \((.+)\)", "{0} 个 {1} 类的块（{2}）"),
    (r"(\d+) modules named (.+)", "{0} 个名为 {1} 的模块"),
    # coverage
    ("of one tensor with itself or of strangers", "张量与自身相加，或相加的两者无关"),
    ("without a parameterised map on one side", "两侧都没有带参数的映射"),
    ("inside a branch", "位于分支内部"),
    ("no residual addition was seen in it", "其中没有看到残差加法"),
    # what the model was given
    (r"(\d+) windows of (\d+) tokens of (.+), as labels too", "{2} 的 {0} 段文本，每段 {1} 个词元，同时作为标签"),
    (r"(\d+) windows of (\d+) tokens of (.+)", "{2} 的 {0} 段文本，每段 {1} 个词元"),
    (r"(\d+) windows of (\d+) tokens, validation batch of (.+)", "{2} 的验证批次：{0} 段，每段 {1} 个词元"),
    (r"(\d+) images, validation batch of (.+)", "{1} 的验证批次：{0} 张图像"),
    (r"(\d+) windows of (\d+) random tokens: no tokenizer.json, as labels too",
     "{0} 段，每段 {1} 个随机词元，同时作为标签（没有 tokenizer.json）"),
    (r"(\d+) windows of (\d+) random tokens: no tokenizer.json", "{0} 段，每段 {1} 个随机词元（没有 tokenizer.json）"),
    (r"(\d+) windows of (\d+) random tokens", "{0} 段，每段 {1} 个随机词元"),
    (r"(\d+) windows of (\d+) random vectors", "{0} 段，每段 {1} 个随机向量"),
    (r"(\d+) random vectors", "{0} 个随机向量"),
    (r"(\d+) random images, (\d+ x \d+ x \d+)", "{0} 张随机图像，{1}"),
    (r"what (.+) returned", "{0} 返回的输入"),
    # where
    ("the head or the loss", "输出头或损失"),
    ("the whole model", "整个模型"),
    (r"the input of (.+)", "{0} 的输入"),
    (r"after (.+)", "{0} 之后"),
    # findings: what was measured, what was expected
    ("NaN or infinity", "NaN 或无穷"),
    ("finite values", "有限值"),
    (r"x \+ x of what the branch returned", "分支输出的 x + x"),
    (r"the block's input \+ what the branch returns", "块的输入 + 分支的输出"),
    (r"identity gain (\S+)", "恒等增益 {0}"),
    ("about 1, the stream as it is", "约为 1，即残差流原样通过"),
    (r"gradient RMS (\S+), against (\S+) after (.+)", "梯度 RMS {0}，而 {2} 之后为 {1}"),
    (r"a factor below (\S+) \(the larger of (\S+) and K\^2\) between them", "两者之比低于 {0}（{1} 与 K² 中较大者）"),
    (r"stream RMS (\S+), (\S+) at the end", "残差流 RMS {0}，末端为 {1}"),
    (r"below (\S+), (\S+) times the law of depth", "低于 {0}，即深度规律的 {1} 倍"),
    (r"the last (\d+) branches add at most (\S+) of the stream", "最后 {0} 个分支加入的量至多为残差流的 {1}"),
    (r"at least (\S+): median before (\S+), law 1/sqrt\(depth\)", "至少 {0}：此前的中位数为 {1}，规律为 1/√深度"),
    ("it adds 0", "输出恒为 0"),
    ("it adds the same at every position", "各位置输出相同"),
    ("no gradient reaches its parameters", "梯度到不了它的参数"),
    ("an output that depends on the stream, or a gradient that opens it", "输出依赖于残差流，或有梯度使其开启"),
    (r"token similarity (\S+), (\S+) at the end", "位置相似度 {0}，末端为 {1}"),
    (r"below (\S+); (\S+) after the first connection", "低于 {0}；第一个连接之后为 {1}"),
    (r"branch / stream (\S+), (.+)", "分支/残差流为 {0}，{1}"),
    (r"(\S+) times its neighbours", "是相邻连接的 {0} 倍"),
    ("its neighbours 0", "相邻连接为 0"),
    (r"below (\S+), or like its neighbours", "低于 {0}，或与相邻连接相近"),
    (r"the head reads the stream at RMS (\S+)", "输出头读到的残差流 RMS 为 {0}"),
    ("a norm between the last connection and the head", "最后一个连接与输出头之间有归一化"),
    (r"(\d+) layers of post-norm, token similarity (\S+)", "{0} 层后置归一化，位置相似度 {1}"),
    (r"at most (\d+) layers, or token similarity below (\S+)", "至多 {0} 层，或位置相似度低于 {1}"),
    (r"(\S+) of the input's values changed", "输入中 {0} 的值被改动"),
    ("the input as it was", "输入保持原样"),
    (r"(\S+) of the output differs between two draws with silent branches", "分支静默时，两次抽样的输出有 {0} 不同"),
    ("no randomness on the stream", "残差流上没有随机性"),
    (r"(\S+) times the layer norm", "层归一化的 {0} 倍"),
    # notes of the deeper looks
    (r"each lesion runs the whole network: calls cannot be left out \((.+)\)",
     "每次去除都运行整个网络：无法省去调用（{0}）"),
    (r"the loss is then (\S+) and not (\S+)", "否则损失为 {0} 而非 {1}"),
    (r"the budget of (\S+) s ended after (\d+) of (\d+) evaluations", "{0} 秒的预算在 {1}/{2} 次计算后用完"),
    (r"the budget of (\S+) s ended after (\d+) of (\d+) samples", "{0} 秒的预算在 {1}/{2} 个样本后用完"),
    ("no two neighbouring blocks are interchangeable", "没有两个相邻的块可以互换"),
    (r"the model did not run in (\d+) of (\d+) orders", "模型在 {1} 种顺序中的 {0} 种下无法运行"),
    (r"stopped at (\d+) nodes to an axis: (.+)", "停在每轴 {0} 个节点：{1}"),
    ("the finest grid", "已是最细的网格"),
    (r"(\d+) nodes to an axis would pass (\S+) evaluations", "每轴 {0} 个节点会超过 {1} 次计算"),
    (r"(\d+) nodes to an axis would pass (\S+) s", "每轴 {0} 个节点会超过 {1} 秒"),
    ("the held-out error is small enough", "留出点误差已足够小"),
    (r"(.+) changes the shape and always works", "{0} 改变形状，始终起作用"),
)  # fmt: skip
_TABLE = tuple((re.compile(en), zh) for en, zh in PHRASES)


def chinese(text: object) -> str:
    """Return a phrase of the X-ray in Chinese; what is not known stays English.

    Phrases joined by `; ` or `, ` are taken one by one.
    """
    whole = str(text)
    if (turned := _joined(whole, "; ", "；")) or (turned := _phrase(whole)):
        return turned
    return _joined(whole, ", ", "，") or whole


def _phrase(whole: str) -> str:
    for pattern, zh in _TABLE:
        if found := pattern.fullmatch(whole):
            return zh.format(*map(chinese, found.groups()))
    return ""


def _joined(whole: str, between: str, joint: str) -> str:
    """Return the Chinese of both parts, where both are known."""
    first, more, rest = whole.partition(between)
    if not more:
        return ""
    turned = chinese(first), chinese(rest)
    return joint.join(turned) if turned[0] != first and turned[1] != rest else ""


def said(row: Mapping[str, object], key: str, zh: bool) -> str:
    """Return a text of a finding: its own Chinese, else that of a known phrase, else English."""
    text = str(row[key])
    return str(row.get(f"{key}_zh") or "") or chinese(text) if zh else text
