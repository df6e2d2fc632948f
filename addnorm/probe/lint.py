"""The linter for residual blocks: what a block must not do, tried on a copy of it.

Nothing is read from the code of a block: its branches are silenced, its inputs are disturbed, it is
stacked on itself. Shapes: x `(B, ..., D)` for a norm, any shape `(B, ...)` for the rest.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addnorm.contract import Wiring
from addnorm.probe.losses import call_model, floats_in
from addnorm.probe.purity import untouched, unwrap
from addnorm.probe.trace import Finding

SEVERITIES = ("sick", "warning", "note")
DRAWS = 4  # calls that may show a random mask on the stream
CLOSE = 1e-4  # share of the RMS that rounding may make
AFFINE = ("weight", "gamma", "scale"), ("bias", "beta", "shift")  # gain, shift of a norm
TORCH_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,  # batch and instance norms of every kind
)
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
SKIP_SOURCE = "He et al. 2015, arXiv:1512.03385, equation 1: y = F(x) + x"


class Form(NamedTuple):
    """What a block returns when its branches return 0."""

    name: str  # x, act(x), N(x), S(x), something of x, nothing of x
    meaning: str


def lint(block: nn.Module, example: Any, *, batch_dim: int = 0, seed: int = 0) -> list[Finding]:
    """Return what is wrong with a residual block, the worst first; an empty list says nothing is.

    `example`: what the block is called with, a tensor, a tuple of arguments or a dict of keyword
    arguments; the first floating-point tensor in it is the stream, whose entries lie along
    `batch_dim`, and of what the block returns the first floating-point tensor. Everything is
    tried on copies: block and example stay as they are.

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

    Raises `ValueError` where the example holds no floating-point tensor with a batch axis, or the
    block cannot be copied.
    """
    block = unwrap(block)
    stream = _stream(example)
    if not -stream.dim() <= batch_dim < stream.dim():
        raise ValueError(f"batch_dim {batch_dim} must be an axis of {tuple(stream.shape)}")
    trial = _Trial(block, example, batch_dim, seed)
    with untouched(block), torch.random.fork_rng(devices=[stream.device] if stream.is_cuda else []):
        found = trial.raises()
        if not found:
            for rule in (
                trial.mutates,
                trial.loses_its_skip,
                trial.drops_the_stream,
                trial.cannot_be_stacked,
                trial.mixes_entries,
                trial.divides_by_too_few,
            ):
                torch.manual_seed(seed)
                found += rule()
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def _stream(example: Any) -> Tensor:
    """Return the first floating-point tensor of the example."""
    found = floats_in(list(example.values()) if isinstance(example, Mapping) else example)
    if not found or not found[0].dim():
        raise ValueError("the example must hold a floating-point tensor (B, ...)")
    return found[0]


def _with(example: Any, stream: Tensor) -> Any:
    """Return the example with another stream, and clones of the other tensors."""
    left = [stream]

    def change(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if left and value.is_floating_point():
            return left.pop()
        return value.detach().clone()

    if isinstance(example, Tensor):
        return change(example)
    if isinstance(example, Mapping):
        return {key: change(value) for key, value in example.items()}
    return tuple(change(value) for value in example)


class _Trial:
    """A block, its example, and the rules; every rule works on a copy of its own."""

    def __init__(self, block: nn.Module, example: Any, batch_dim: int, seed: int) -> None:
        self._block = block
        self._example = example
        self._batch_dim = batch_dim
        self._seed = seed
        self._name = type(block).__name__
        self._x = _stream(example).detach()
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
        found = floats_in(call_model(block, _with(self._example, stream)))
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
                )
        return []

    @torch.no_grad()
    def loses_its_skip(self) -> list[Finding]:
        """Silence the branches and look at what is left."""
        if not self._branches():
            return []
        silent = self._silent()
        x = _lively(self._x)
        form = _form(lambda z: self._call(silent, z), x)
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
        )

    @torch.no_grad()
    def drops_the_stream(self) -> list[Finding]:
        """Call the silenced block in training under several random states."""
        if not self._branches():
            return []
        silent = self._silent(training=True)
        x = _lively(self._x)
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
        )

    @torch.no_grad()
    def mixes_entries(self) -> list[Finding]:
        """Disturb one entry of the batch with noise and look at the others."""
        block = self._copy()
        for parameter in block.parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.normal_(std=0.1)  # a branch that starts silent would mix unseen
        axis, x = self._batch_dim, _lively(self._x)
        if x.shape[axis] < 2:
            return []  # the other arguments may belong to this size of the batch
        before = self._call(block, x.clone())
        disturbed = x.clone()
        last = disturbed.select(axis, -1)
        last.add_(torch.randn(last.shape).to(last) * _rms(x))
        after = self._call(block, disturbed)
        if before.dim() <= axis or before.shape[axis] != x.shape[axis]:
            return []
        others = (after - before).narrow(axis, 0, x.shape[axis] - 1)
        scale = max(_rms(before), 1e-30)
        if not float(others.abs().max()) > CLOSE / 10 * scale:
            return []
        return self._finding(
            "mixed-batch",
            "sick",
            value=f"noise in one entry changes the others by {_rms(others) / scale:.2g} of the RMS",
            expected="0",
            why=f"The block mixes the entries along axis {axis}: attention, or a statistic, runs "
            "over the batch.",
            remedy="nn.MultiheadAttention(..., batch_first=True) for (B, T, D); batch_dim=1 here "
            "if the example is (T, B, D).",
            source="torch: nn.MultiheadAttention, batch_first",
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
            ratio = _norm_ratio(block.get_submodule(name), shape)
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
        x = _lively(self._x)
        through = [name for name in holders if _depends(self._through(name), x)]
        return len(holders) > 1 and 0 < len(through) < len(holders)

    def _through(self, name: str) -> Callable[[Tensor], Tensor]:
        block = self._silent(but=name)
        return lambda x: self._call(block, x)


def _line(error: Exception) -> str:
    """Return the first line of an error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def _lively(x: Tensor) -> Tensor:
    """Return x, or noise where x varies too little to show what depends on it."""
    if float(x.double().std()) > CLOSE * max(_rms(x), 1e-30):
        return x.clone()
    return torch.randn(x.shape).to(x)


def _depends(call: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether the output changes with the input."""
    other = x + torch.randn(x.shape).to(x) * _rms(x)
    first, second = call(x.clone()), call(other)
    return _rms(second - first) > CLOSE * max(_rms(first), _rms(x) * 1e-4)


def _form(call: Callable[[Tensor], Tensor], x: Tensor) -> Form:
    """Say what of x leaves a silent block."""
    out = call(x.clone())
    if not _depends(call, x):
        return Form("nothing of x", "no skip")
    if out.shape != x.shape:
        return Form("S(x)", "a shortcut that changes the shape")
    if _same(out, x):
        return Form("x", "the identity")
    factor = float((out * x).sum() / (x * x).sum())
    if _same(out, factor * x):
        return Form("c x", f"the input times {factor:.4g}")
    for name, function in ACTIVATIONS.items():
        if _same(out, function(x)):
            return Form(f"{name}(x)", "an activation after the addition")
        positive = function(x)
        factor = float((out * positive).sum() / (positive * positive).sum().clamp_min(1e-30))
        if name == "relu" and factor > 0 and _same(out, factor * positive):
            return Form(f"{name}(c x)", f"an activation after the addition, x times {factor:.4g}")
    for name, normed in _normed(x).items():
        for inner, function in {"": lambda z: z, **ACTIVATIONS}.items():
            if _affine(out, function(normed)):
                what = f" and {inner}" if inner else ""
                return Form(f"{inner}({name})" if inner else name, f"a norm{what} after the sum")
    if _affine(out, x) or (x.dim() > 2 and _affine(out.movedim(1, -1), x.movedim(1, -1))):
        return Form("a * x + b", "every channel times a factor, as an evaluated batch norm does")
    return Form("something of x", "a gate, a norm or a projection on the stream")


def _normed(x: Tensor) -> dict[str, Tensor]:
    """Return the two norms over the last axis."""
    centred = x - x.mean(-1, keepdim=True)
    return {
        "N(x), a layer norm": centred / centred.square().mean(-1, keepdim=True).add(1e-5).sqrt(),
        "N(x), an RMS norm": x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt(),
    }


def _same(one: Tensor, other: Tensor) -> bool:
    return _rms(one - other) <= CLOSE * max(_rms(other), 1e-30)


def _affine(out: Tensor, of: Tensor) -> bool:
    """Whether every channel (last axis) of `out` is an affine function of the same one of `of`.

    Needs four positions and more, for two always lie on a line.
    """
    slope, _, rest = _fit(out, of)
    varies = slope.abs().max() > 0
    return slope.numel() > 0 and bool(varies) and rest <= 10 * CLOSE * max(_rms(out), 1e-30)


def _fit(out: Tensor, of: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return slope and shift of every channel, least squares over positions, and the RMS left."""
    y, z = out.double().flatten(0, -2), of.double().flatten(0, -2)
    if y.shape[0] < 4:
        return torch.empty(0), torch.empty(0), math.inf
    y0, z0 = y - y.mean(0), z - z.mean(0)
    slope = (y0 * z0).sum(0) / z0.square().sum(0).clamp_min(1e-30)
    return slope, y.mean(0) - slope * z.mean(0), _rms(y0 - slope * z0)


def _norm_ratio(module: nn.Module, shape: Sequence[int]) -> float | None:
    """Return by what factor a layer norm is too small for its variance; None for any other module.

    A gain (a vector of the module's) is divided out. NaN where the width 1 makes it so.
    """
    width = shape[-1]
    trial = copy.deepcopy(module).double()
    rows = max(2, math.ceil(16 / max(1, math.prod(shape[1:-1]))))
    z = torch.randn(rows, *shape[1:]) if len(shape) > 1 else torch.randn(shape)
    device = next((p.device for p in trial.parameters()), torch.device("cpu"))
    z = 100 * z.double().to(device)  # so large that the small constant under the root is nothing
    with contextlib.suppress(RuntimeError, TypeError, ValueError):  # it cannot be called so
        out = trial(z.clone())
        if width == 1:
            bad = bool(out.isnan().all()) and not bool(z.isnan().any())
            return math.nan if bad else None
        slope, _, rest = _fit(out, _normed(z)["N(x), a layer norm"])
        if not slope.numel() or rest > CLOSE * max(_rms(out), 1e-30):
            return None
        expected = math.sqrt((width - 1) / width)
        for gain in _gains(trial, width):
            ratio = slope / gain
            if bool(((ratio - expected).abs() < (1 - expected) / 4).all()):
                return float(ratio.mean())
    return None


def _gains(module: nn.Module, width: int) -> Iterator[Tensor]:
    """Yield 1 and every vector of the module that may be its gain."""
    yield torch.ones(width).double()
    for parameter in module.parameters():
        if parameter.numel() == width and bool((parameter != 0).all()):
            yield parameter.detach().flatten()
