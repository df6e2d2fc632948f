"""The linter for residual blocks: what a block must not do, tried on a copy of it.

Nothing is read from the code of a block: its branches are silenced, its inputs are disturbed, it is
stacked on itself. Shapes: x `(B, ..., D)` for a norm, any shape `(B, ...)` for the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from addnorm.contract import Wiring, unknown
from addnorm.probe.findings import worst_first
from addnorm.probe.forms import (
    CLOSE,
    Form,
    depends,
    form_of,
    lively,
    norm_ratio,
    rms,
    stream_of,
    with_stream,
)
from addnorm.probe.losses import call_model, floats_in
from addnorm.probe.purity import untouched, unwrap
from addnorm.probe.trace import Finding

DRAWS = 4  # calls that may show a random mask on the stream
AFFINE = ("weight", "gamma", "scale"), ("bias", "beta", "shift")  # gain, shift of a norm
TORCH_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,  # batch and instance norms of every kind
)
SKIP_SOURCE = "He et al. 2015, arXiv:1512.03385, equation 1: y = F(x) + x"


def lint(
    block: nn.Module,
    example: Any,
    *,
    batch_dim: int = 0,
    seed: int = 0,
    rules: Collection[str] | None = None,
) -> list[Finding]:
    """Return what is wrong with a residual block, the worst first; an empty list says nothing is.

    `example`: what the block is called with, a tensor, a tuple of arguments or a dict of keyword
    arguments; the first floating-point tensor in it is the stream, whose entries lie along
    `batch_dim`, and of what the block returns the first floating-point tensor. Everything is
    tried on copies: block and example stay as they are. `rules`: the codes to look for, by default
    all; `raises` is always among them.

    - `raises`: the block cannot be called so.
    - `broken-skip`: with its branches silent it returns nothing of its input.
    - `changed-skip`: it returns something else than its input. A note for what is known, an
      activation or a norm after the addition, a factor, a projection; a warning else.
    - `stream-dropout`: with its branches silent it is random in training.
    - `mutated-input`: it changes the tensor that it is given.
    - `unstackable`: no gradient arrives at its input, or two in a row cannot train.
    - `mixed-batch`: an entry of the batch changes the output of another, in evaluation.
    - `unbiased-norm`: an inner layer norm divides the variance by D - 1, or is NaN at D = 1.

    Silent: the branch of one of our `Wiring`s returns 0; in any other block all parameters of two
    axes and more are 0, and so are the biases beside them and those of norms, whose gains are 1.
    A block without any, such as a bare norm, has no skip to lose. `mixed-batch` needs two entries;
    a norm written without a module of its own is not seen. A wiring whose drawing says that its
    skip is none, or not plain, is as it was meant: its skip makes a note.

    Raises `ValueError` where the example holds no floating-point tensor with a batch axis, the
    block cannot be copied, or a rule is unknown.
    """
    known = [code for codes in RULES for code in sorted(codes)]
    for code in rules or ():
        if code not in known:
            raise ValueError(unknown("rule", code, known))
    block = unwrap(block)
    stream = stream_of(example)
    if not -stream.dim() <= batch_dim < stream.dim():
        raise ValueError(f"batch_dim {batch_dim} must be an axis of {tuple(stream.shape)}")
    trial = _Trial(block, example, batch_dim, seed)
    with untouched(block), torch.random.fork_rng(devices=[stream.device] if stream.is_cuda else []):
        found = trial.raises()
        if not found:
            for codes, rule in RULES.items():
                if rules is None or not codes.isdisjoint(rules):
                    torch.manual_seed(seed)
                    found += rule(trial)
    return worst_first(found)


class _Trial:
    """A block, its example, and the rules; every rule works on a copy of its own."""

    def __init__(self, block: nn.Module, example: Any, batch_dim: int, seed: int) -> None:
        self._block = block
        self._example = example
        self._batch_dim = batch_dim
        self._seed = seed
        self._name = type(block).__name__
        self._x = stream_of(example).detach()
        self._wirings = [m for m in block.modules() if isinstance(m, Wiring)]

    def _copy(self, *, training: bool = False) -> nn.Module:
        """Return a copy; in training its batch norms stay in evaluation, whose output is theirs."""
        try:
            made = copy.deepcopy(self._block)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{self._name} cannot be copied: {_line(error)}") from error
        for parameter in made.parameters():
            parameter.grad = None
        made.train(training)
        for module in made.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.eval()
        return made

    def _call(self, block: nn.Module, stream: Tensor) -> Tensor:
        found = floats_in(call_model(block, with_stream(self._example, stream)))
        if not found:
            raise TypeError("the block returned no floating-point tensor")
        return found[0]

    def _finding(self, code: str, severity: str, **facts: str) -> list[Finding]:
        return [Finding(code=code, severity=severity, where=self._name, **facts)]

    # -- the rules ---------------------------------------------------------------------------------

    def raises(self) -> list[Finding]:
        """Call the block once in evaluation and once in training."""
        for training in (False, True):
            try:
                with torch.no_grad():
                    self._call(self._copy(training=training), self._x.clone())
            except ValueError as error:
                if "cannot be copied" in str(error):
                    raise
                return self._raised(error)
            except Exception as error:  # noqa: BLE001  # whatever a user's block may raise
                return self._raised(error)
        return []

    def _raised(self, error: Exception) -> list[Finding]:
        return self._finding(
            "raises",
            "sick",
            value=f"{type(error).__name__}: {_line(error)}",
            expected="an output",
            why="The block cannot be called with this example, so nothing else was tried.",
            remedy="Give arguments that the called modules know (nn.MultiheadAttention: "
            "attn_mask=, not mask=) in the shape that they expect.",
            source="the error itself",
            why_zh="这个块不能以此例调用，其余检查都没有进行。",
            remedy_zh="传入被调用模块认识的参数，形状也要相符"
            "（nn.MultiheadAttention 用 attn_mask=，不是 mask=）。",
        )

    @torch.no_grad()
    def mutates(self) -> list[Finding]:
        """Compare the input after the call with what it was."""
        for training in (False, True):
            given = self._x.clone()
            self._call(self._copy(training=training), given)
            if not torch.equal(given, self._x):
                changed = (given != self._x).double().mean().item()
                return self._finding(
                    "mutated-input",
                    "sick",
                    value=f"{changed:.0%} of the input's values changed",
                    expected="the input as it was",
                    why="The block changes its input in place: the skip carries what is left of "
                    "it, and whoever holds the tensor sees another one.",
                    remedy="nn.ReLU(inplace=False) on the input, x = x + f instead of x += f.",
                    source="torch: in-place correctness checks of autograd",
                    why_zh="块就地修改了输入：跳跃连接只带着剩下的部分，持有该张量的人看到的也变了。",
                    remedy_zh="输入上用 nn.ReLU(inplace=False)，用 x = x + f 代替 x += f。",
                )
        return []

    @torch.no_grad()
    def loses_its_skip(self) -> list[Finding]:
        """Silence the branches and look at what is left."""
        if not self._branches():
            return []
        silent = self._silent()
        x = lively(self._x)
        form = form_of(lambda z: self._call(silent, z), x)
        if form.name == "nothing of x" and self._projects():
            form = Form("S(x)", "a projected shortcut, which silencing the matrices cut as well")
        if form.name == "x":
            return []
        planned = bool(self._wirings) and any(w.drawing.skip for w in self._wirings)
        if form.name == "nothing of x":
            equations = "; ".join(dict.fromkeys(w.equation for w in self._wirings))
            return self._finding(
                "broken-skip",
                "note" if planned else "sick",
                value="with silent branches the output does not depend on the input",
                expected="the input",
                why=f"No skip connection, as the wiring says: {equations}."
                if planned
                else "Nothing but the branch leaves the block: there is no path around it.",
                remedy="The wiring 'prenorm' adds one."
                if planned
                else "y = f(norm(x)); x = x + y: keep x until the addition.",
                source=SKIP_SOURCE,
                why_zh=f"没有跳跃连接，正如接法所述：{equations}。"
                if planned
                else "离开块的只有分支：没有绕过它的通路。",
                remedy_zh="wiring='prenorm' 会加上一条。"
                if planned
                else "y = f(norm(x)); x = x + y：相加之前不要覆盖 x。",
            )
        known = form.name != "something of x" or bool(self._wirings)
        return self._finding(
            "changed-skip",
            "note" if known else "warning",
            value=f"with silent branches the output is {form.name}: {form.meaning}",
            expected="x",
            why="What lies on the stream acts once in every block, and so as often as the network "
            "is deep.",
            remedy="x + F(N(x)) leaves the stream alone; a norm or an activation belongs into F.",
            source="He et al. 2016, arXiv:1603.05027, section 3",
            why_zh="放在流上的操作每个块都作用一次，网络有多深就作用多少次。",
            remedy_zh="x + F(N(x)) 不改动流；归一化和激活应放进 F。",
        )

    @torch.no_grad()
    def drops_the_stream(self) -> list[Finding]:
        """Call the silenced block in training under several random states."""
        if not self._branches():
            return []
        silent = self._silent(training=True)
        x = lively(self._x)
        outputs = []
        for draw in range(DRAWS):
            torch.manual_seed(self._seed + draw)
            outputs.append(self._call(silent, x.clone()))
        both_nan = [o.isnan() & outputs[0].isnan() for o in outputs[1:]]
        apart = sum(
            ((o != outputs[0]) & ~nan).double().mean().item()
            for o, nan in zip(outputs[1:], both_nan, strict=True)
        ) / len(both_nan)
        if apart == 0:
            return []
        planned = bool(self._wirings) and any(w.drawing.skip for w in self._wirings)
        return self._finding(
            "stream-dropout",
            "note" if planned else "sick",
            value=f"{apart:.0%} of the output differs between two draws with silent branches",
            expected="no randomness on the stream",
            why="Dropout acts on the skip: after L blocks a value has survived with (1 - p)^L.",
            remedy="x = x + dropout(f(x)) instead of x = dropout(x + f(x)).",
            source="He et al. 2016, arXiv:1603.05027, table 1: dropout shortcut",
            why_zh="dropout 作用在跳跃连接上：经过 L 个块，一个值留下的概率是 (1 - p)^L。",
            remedy_zh="用 x = x + dropout(f(x)) 代替 x = dropout(x + f(x))。",
        )

    def cannot_be_stacked(self) -> list[Finding]:
        """Send a gradient through the block from a leaf, then through the block twice."""
        for twice in (False, True):
            block = self._copy(training=True)
            leaf = self._x.clone().requires_grad_()
            times = "twice" if twice else "once, on a leaf that requires a gradient"
            try:
                with torch.enable_grad():
                    out = self._call(block, leaf * 1.0 if twice else leaf)
                    if twice and (out.shape != leaf.shape or out.dtype != leaf.dtype):
                        return []  # it changes the width: the next block is another one
                    out = self._call(block, out) if twice else out
                    probe = torch.randn(out.shape).to(out)
                    total = (out * probe).sum()
                    reached: tuple[Tensor | None, ...] = (None,)
                    if total.requires_grad:
                        reached = torch.autograd.grad(total, leaf, allow_unused=True)
            except RuntimeError as error:
                return self._unstackable(times, _line(error))
            if reached[0] is None:
                return self._unstackable(times, "no gradient arrives at the input")
        return []

    def _unstackable(self, times: str, what: str) -> list[Finding]:
        return self._finding(
            "unstackable",
            "sick",
            value=f"called {times}: {what}",
            expected="a gradient at the input",
            why="The backward pass needs what was overwritten or cut off, so the network that is "
            "made of such blocks cannot train.",
            remedy="inplace=False, x = x + f instead of x += f, no detach() on the stream.",
            source="torch: in-place correctness checks of autograd",
            why_zh="反向传播需要的内容被覆盖或切断，由这种块堆成的网络不能训练。",
            remedy_zh="inplace=False，x = x + f 代替 x += f，流上不要用 detach()。",
        )

    @torch.no_grad()
    def mixes_entries(self) -> list[Finding]:
        """Disturb one entry of the batch with noise and look at the others."""
        block = self._copy()
        for parameter in block.parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.normal_(std=0.1)  # a branch that starts silent would mix unseen
        axis, x = self._batch_dim, lively(self._x)
        if x.shape[axis] < 2:
            return []  # the other arguments may belong to this size of the batch
        before = self._call(block, x.clone())
        disturbed = x.clone()
        last = disturbed.select(axis, -1)
        last.add_(torch.randn(last.shape).to(last) * rms(x))
        after = self._call(block, disturbed)
        if before.dim() <= axis or before.shape[axis] != x.shape[axis]:
            return []
        others = (after - before).narrow(axis, 0, x.shape[axis] - 1)
        scale = max(rms(before), 1e-30)
        if not float(others.abs().max()) > CLOSE / 10 * scale:
            return []
        return self._finding(
            "mixed-batch",
            "sick",
            value=f"noise in one entry changes the others by {rms(others) / scale:.2g} of the RMS",
            expected="0",
            why=f"The block mixes the entries along axis {axis}: attention, or a statistic, runs "
            "over the batch.",
            remedy="nn.MultiheadAttention(..., batch_first=True) for (B, T, D); batch_dim=1 here "
            "if the example is (T, B, D).",
            source="torch: nn.MultiheadAttention, batch_first",
            why_zh=f"块沿第 {axis} 轴混合了批中的样本：注意力或统计量在批上计算。",
            remedy_zh="(B, T, D) 用 nn.MultiheadAttention(..., batch_first=True)；"
            "若此例是 (T, B, D)，这里用 batch_dim=1。",
        )

    @torch.no_grad()
    def divides_by_too_few(self) -> list[Finding]:
        """Hold every module that acts like a layer norm against the biased variance."""
        block = self._copy()
        shapes: dict[str, torch.Size] = {}
        handles = []
        for name, module in block.named_modules():
            if all(p.dim() < 2 for p in module.parameters()):

                def note(_m: nn.Module, args: Any, out: Any, name: str = name) -> None:
                    alone = len(args) == 1 and isinstance(args[0], Tensor)
                    if alone and isinstance(out, Tensor) and out.shape == args[0].shape:
                        shapes.setdefault(name, out.shape)

                handles.append(module.register_forward_hook(note))
        try:
            self._call(block, self._x.clone())
        finally:
            for handle in handles:
                handle.remove()
        found: list[Finding] = []
        for name, shape in shapes.items():
            ratio = norm_ratio(block.get_submodule(name), shape)
            if ratio is None or any(name.startswith(f"{f.where}.") for f in found):
                continue
            width = shape[-1]
            found += [
                Finding(
                    code="unbiased-norm",
                    severity="sick" if width == 1 else "warning",
                    where=name or self._name,
                    value=f"{ratio:.6g} times the layer norm",
                    expected="1",
                    why=f"The variance is divided by D - 1 = {width - 1} instead of D: a factor "
                    "sqrt((D - 1) / D), and NaN at D = 1.",
                    remedy="x.var(-1, keepdim=True, unbiased=False), or nn.LayerNorm.",
                    source="Ba et al. 2016, arXiv:1607.06450, equation 3",
                    why_zh=f"方差除以 D - 1 = {width - 1} 而不是 D：差一个因子 sqrt((D - 1) / D)，"
                    "D = 1 时为 NaN。",
                    remedy_zh="x.var(-1, keepdim=True, unbiased=False)，或 nn.LayerNorm。",
                )
            ]
        return found

    # -- silencing ---------------------------------------------------------------------------------

    def _silent(self, *, training: bool = False, but: str | None = None) -> nn.Module:
        """Return a copy whose branches return 0; the module named `but` keeps its matrices."""
        block = self._copy(training=training)
        wirings = [m for m in block.modules() if isinstance(m, Wiring)]
        for wiring in wirings:
            wiring.branch.register_forward_hook(lambda _m, _a, out: torch.zeros_like(out))
        if wirings:
            return block
        for name, module in block.named_modules():
            own = dict(module.named_parameters(recurse=False))
            matrices = any(p.dim() >= 2 for p in own.values())
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
                assert module.running_mean is not None
                module.running_mean.zero_()  # else BN(0) is not 0
            for leaf, parameter in own.items():
                if matrices and not isinstance(module, TORCH_NORMS):
                    if name != but:
                        parameter.zero_()
                elif leaf in AFFINE[1]:
                    parameter.zero_()
                elif leaf in AFFINE[0] and isinstance(module, TORCH_NORMS):
                    parameter.fill_(1.0)
        return block

    def _branches(self) -> bool:
        """Whether there is a branch: a wiring's, or a matrix; a bare norm is no residual block."""
        return bool(self._wirings or self._holders())

    def _holders(self) -> list[str]:
        """Return the names of the modules that hold matrices."""
        return [
            name
            for name, module in self._block.named_modules()
            if not isinstance(module, TORCH_NORMS)
            and any(p.dim() >= 2 for p in module.parameters(recurse=False))
        ]

    def _projects(self) -> bool:
        """Whether one matrix of several, kept alone, lets the input through: a shortcut's."""
        if self._wirings:
            return False
        holders = self._holders()
        x = lively(self._x)
        through = [name for name in holders if depends(self._through(name), x)]
        return len(holders) > 1 and 0 < len(through) < len(holders)

    def _through(self, name: str) -> Callable[[Tensor], Tensor]:
        block = self._silent(but=name)
        return lambda x: self._call(block, x)


# By what a rule may find; broken and changed skips are one trial.
RULES: Mapping[frozenset[str], Callable[[_Trial], list[Finding]]] = {
    frozenset({"mutated-input"}): _Trial.mutates,
    frozenset({"broken-skip", "changed-skip"}): _Trial.loses_its_skip,
    frozenset({"stream-dropout"}): _Trial.drops_the_stream,
    frozenset({"unstackable"}): _Trial.cannot_be_stacked,
    frozenset({"mixed-batch"}): _Trial.mixes_entries,
    frozenset({"unbiased-norm"}): _Trial.divides_by_too_few,
}


def _line(error: Exception) -> str:
    """Return the first line of an error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
