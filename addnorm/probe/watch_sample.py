"""One measured step of a training, and the verdict on it beside the first one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from addnorm.probe.trace import UNDERFLOW, Finding

# A gradient that differs by more decades between the first and the last connection has nothing left
# of the smaller end in float32, and one optimizer cannot serve both.
DECADES = 6.0
# The stream at the end of the network beside that of the first sample. Training makes it grow: by
# 10 to 100 is seen in healthy pre-norm networks, so only far beyond that is a verdict.
GROWTH = {"sick": 3000.0, "warning": 300.0}
RANK = {"note": 0, "warning": 1, "sick": 2}


@dataclass(frozen=True)
class Vital:
    """What one call of a connection carried, as RMS; None where it was not measured."""

    label: str
    path: str
    stream_before: float | None
    stream_after: float | None
    update: float | None  # what the branch returned; of a block what it added
    gradient_before: float | None  # dLoss/dstream where it enters
    gradient_after: float | None  # and where it leaves

    @property
    def lost_forward(self) -> bool:
        """Whether something is not finite on the way forward."""
        return any(map(_lost, (self.stream_before, self.update, self.stream_after)))

    @property
    def lost_backward(self) -> bool:
        """Whether something is not finite on the way back."""
        return _lost(self.gradient_before) or _lost(self.gradient_after)


@dataclass(frozen=True)
class Sample:
    """One measured step."""

    vitals: tuple[Vital, ...]
    weights: Mapping[str, float]
    loss: float | None
    scaled: bool  # by a loss scale that is allowed to overflow

    @property
    def growth(self) -> float | None:
        """RMS of the stream after the last connection / before the first."""
        first, last = self.vitals[0].stream_before, self.vitals[-1].stream_after
        return None if not first or last is None else last / first

    @property
    def slope(self) -> float | None:
        """Decades of gradient RMS by 10 connections, least squares; None where one is unknown."""
        heard = [v.gradient_after for v in self.vitals if v.gradient_after is not None]
        if len(heard) < 2 or any(map(_lost, heard)):
            return None
        rows = [math.log10(max(g, UNDERFLOW)) for g in heard]
        middle, mean = (len(rows) - 1) / 2, sum(rows) / len(rows)
        spread = sum((i - middle) ** 2 for i in range(len(rows)))
        return 10 * sum((i - middle) * (y - mean) for i, y in enumerate(rows)) / spread

    def row(self) -> dict[str, float]:
        """Return the numbers by name."""
        row: dict[str, float | None] = {}
        for v in self.vitals:
            share = v.update / v.stream_before if v.update is not None and v.stream_before else None
            row[f"stream/{v.label}/rms_before"] = v.stream_before
            row[f"stream/{v.label}/rms_after"] = v.stream_after
            row[f"branch/{v.label}/share"] = share
            row[f"gradient/{v.label}/rms_before"] = v.gradient_before
            row[f"gradient/{v.label}/rms_after"] = v.gradient_after
        row |= self.weights
        row["gradient/slope"] = self.slope
        row["stream/growth"] = self.growth
        row["non_finite"] = float(sum(v.lost_forward or v.lost_backward for v in self.vitals))
        row["loss"] = self.loss
        return {name: value for name, value in row.items() if value is not None}


def _lost(value: float | None) -> bool:
    return value is not None and not math.isfinite(value)


def judge_sample(sample: Sample, first: Mapping[str, float]) -> list[Finding]:
    """Return what is wrong in a sample; `first` is the row of the first one of the run."""
    lost = _non_finite(sample)
    if lost is not None:
        return [lost]
    return [found for found in (_gradient(sample), _stream(sample, first)) if found is not None]


def _non_finite(sample: Sample) -> Finding | None:
    forward = next((v.path for v in sample.vitals if v.lost_forward), None)
    backward = next((v.path for v in reversed(sample.vitals) if v.lost_backward), None)
    if forward is not None:
        where, why = forward, "The first value that is not finite is on the way forward there."
        why_zh = "首个非有限值出现在此处的前向计算中。"
    elif _lost(sample.loss):
        where, why = "the head or the loss", "Every connection before it is finite."
        why_zh = "此前的所有连接都是有限值。"
    elif backward is not None and not sample.scaled:
        where, why = backward, "The first value that is not finite is on the way back there."
        why_zh = "首个非有限值出现在此处的反向计算中。"
    else:
        return None
    return Finding(
        code="non-finite",
        severity="sick",
        where=where,
        value="NaN or infinity",
        expected="finite values",
        why=why,
        remedy="Lower the learning rate, clip the gradient, or take a wiring with a norm.",
        source="IEEE 754: a value that is not finite spreads through every sum",
        why_zh=why_zh,
        remedy_zh="降低学习率，裁剪梯度，或换用带归一化的接法。",
    )


def _gradient(sample: Sample) -> Finding | None:
    """Compare the gradient at the first and at the last connection."""
    heard = [(v.path, g) for v in sample.vitals if (g := v.gradient_after) is not None]
    if len(heard) < 2 or any(_lost(g) for _, g in heard):
        return None
    (first, low), (last, high) = heard[0], heard[-1]
    if low == high == 0:
        return None  # nothing to learn from this batch, at any depth
    decades = math.log10(max(high, UNDERFLOW)) - math.log10(max(low, UNDERFLOW))
    if abs(decades) < DECADES:
        return None
    code = "vanishing-gradient" if decades > 0 else "exploding-gradient"
    why, why_zh = {
        "vanishing-gradient": (
            "On its way back the gradient shrinks from connection to connection, so the first "
            "ones do not learn.",
            "梯度在反向传播中逐层缩小，靠前的层学不到东西。",
        ),
        "exploding-gradient": (
            "On its way back the gradient grows from connection to connection, so no learning "
            "rate suits both ends.",
            "梯度在反向传播中逐层增大，没有一个学习率能同时适合两端。",
        ),
    }[code]
    return Finding(
        code=code,
        severity="sick",
        where=first,
        value=f"gradient RMS {low:.2g}, against {high:.2g} at {last}",
        expected=f"less than {DECADES:.0f} decades between the first and the last connection",
        why=why,
        remedy="Keep an identity path: wiring prenorm, or layerscale(init=1e-5) around each block.",
        source="He et al. 2016 (arXiv:1603.05027), section 2",
        why_zh=why_zh,
        remedy_zh="保留恒等路径：用接法 prenorm，或在每个块外用 layerscale(init=1e-5)。",
    )


def _stream(sample: Sample, first: Mapping[str, float]) -> Finding | None:
    """Compare the stream that leaves the last connection with that of the first sample."""
    last = sample.vitals[-1]
    was, now = first.get(f"stream/{last.label}/rms_after"), last.stream_after
    if not was or now is None:
        return None
    severity = next((s for s, limit in GROWTH.items() if now / was > limit), None)
    if severity is None:
        return None
    return Finding(
        code="stream-blow-up",
        severity=severity,
        where=last.path,
        value=f"stream RMS {now:.3g}, {now / was:.3g} times that of the first sample",
        expected=f"at most {GROWTH['warning']:.0f} times",
        why="The branches write ever more into a stream that nothing brings back.",
        remedy="Lower the learning rate or lengthen the warm-up; wiring sandwich bounds a branch.",
        source="Ding et al. 2021 (arXiv:2105.13290), section 2.4",
        why_zh="各分支不断往流里写入，而没有什么把它拉回来。",
        remedy_zh="降低学习率或延长预热；接法 sandwich 能约束分支。",
    )
