"""Runs: put a model, its data and the trainer together, keep them in a folder, and sample.

A run folder holds `config.json` (model, data, training, how it is computed), `tokenizer.json`,
`metrics.jsonl`, `watch.jsonl` (what passed the connections), `model.safetensors`,
`checkpoint.safetensors` and `summary.json`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast, overload

import torch
from torch import Tensor, nn

from addnorm import __version__
from addnorm.checking import checked
from addnorm.data.sets import Dataset, reload_data
from addnorm.data.text import TextData, load_tokenizer
from addnorm.files import locked, read_json, read_lines, write_json
from addnorm.generation import Sampling, generate
from addnorm.models.zoo import KINDS, fitted, kind_of
from addnorm.plugins import absolute, load_plugins, own_code, resolve
from addnorm.probe.loggers import JsonLines
from addnorm.probe.trace import Finding, Trace
from addnorm.probe.vitals import xray
from addnorm.probe.watch import Watch, describe_finding, watch
from addnorm.training.checkpoint import load_file, load_weights
from addnorm.training.config import Runtime, TrainConfig
from addnorm.training.loop import Observer, pick_device, to_device, train_loop
from addnorm.training.run import Run
from addnorm.training.tune import Choice, choice_from


def build_model(description: dict[str, Any], data: Dataset) -> nn.Module:
    """Return the model that a run's configuration describes, fitted to `data`.

    Raises `ValueError` when a user's function fails to return a module.
    """
    if "function" in description:
        return _own_model(description["function"], data.shape)
    kind = KINDS[description["kind"]]
    config = kind.config(**{k: v for k, v in description.items() if k != "kind"})
    return kind.model(fitted(description["kind"], config, data.shape))


def _own_model(target: str, offered: Mapping[str, int]) -> nn.Module:
    """Call the user's function with those facts about the data that it takes."""
    function = resolve(target)
    try:
        taken = inspect.signature(function).parameters
        given = {k: v for k, v in offered.items() if k in taken}
        inspect.signature(function).bind(**given)
    except TypeError as error:
        raise ValueError(
            f"{target} could not be called: {error}; it may take {' and '.join(offered)}, all int"
        ) from None
    with own_code(target):
        model = function(**given)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{target} returned {type(model).__name__}, not a torch.nn.Module")
    return model


def _describe(model: nn.Module) -> dict[str, Any]:
    kind = kind_of(model)
    if kind:
        return {"kind": kind, **asdict(cast(Any, model).config)}
    return {"kind": type(model).__name__}


def train(
    model: nn.Module,
    data: Dataset,
    config: TrainConfig | None = None,
    runtime: Runtime | None = None,
    *,
    out: str | Path | None = None,
    observer: Observer | None = None,
    choice: Choice | None = None,
    description: dict[str, Any] | None = None,
    plugins: tuple[str, ...] = (),
) -> Run:
    """Train `model` on `data` and return the run.

    The model maps tokens `(B, T)` to logits `(B, T, V)`, or images `(B, C, H, W)` to `(B, V)`.
    With `out` the run is kept in that folder, which must not hold a run yet. `description` is what
    the folder records of the model: `{"function": "pkg.module:function"}` for one of the user's.
    Raises `ValueError` for a folder in use, and for outputs of the wrong shape.
    """
    config, runtime = config or TrainConfig(), runtime or Runtime()
    device = pick_device(runtime.device)
    _check_output(model.to(device), data, config, device)
    if out is None:
        with _watching(model, runtime, None, observer) as watcher:
            return train_loop(
                model, data, config, runtime, choice=choice, observer=observer, watcher=watcher
            )
    folder = Path(out)
    with locked(folder):
        if (folder / "config.json").exists():
            raise ValueError(
                f"{folder} holds a run already; go on with --resume {folder}, or choose "
                "another --out"
            )
        if isinstance(data, TextData):
            write_json(folder / "tokenizer.json", data.tokenizer.to_dict())
        facts = {
            "addnorm": __version__,
            "torch": torch.__version__,
            "model": description or _describe(model),
            "data": data.describe(),
            "plugins": absolute(plugins),
        }
        with _watching(model, runtime, folder, observer) as watcher:
            return train_loop(
                model,
                data,
                config,
                runtime,
                choice=choice,
                folder=folder,
                facts=facts,
                observer=observer,
                watcher=watcher,
            )


def resume(folder: str | Path, observer: Observer | None = None) -> Run:
    """Go on with the run in `folder` from its last checkpoint, with the recorded choices.

    Raises `ValueError` for a folder that holds no run, a corpus that has changed, a checkpoint
    that is not whole, or a run that another process is training.
    """
    folder = Path(folder)
    facts = _facts(folder)
    with locked(folder):
        data = _data(folder, facts)
        config, runtime = TrainConfig(**facts["train"]), Runtime(**facts["runtime"])
        torch.manual_seed(config.seed)
        model = build_model(facts["model"], data).to(pick_device(runtime.device))
        with _watching(model, runtime, folder, observer) as watcher:
            return train_loop(
                model,
                data,
                config,
                runtime,
                choice=choice_from(facts["choice"]),
                folder=folder,
                resume=(folder / "checkpoint.safetensors").exists(),
                observer=observer,
                watcher=watcher,
            )


@contextlib.contextmanager
def _watching(
    model: nn.Module, runtime: Runtime, folder: Path | None, observer: Observer | None
) -> Iterator[Watch | None]:
    """Watch a model that is on its device; yield None where that is off or it has no blocks.

    The observer hears of a finding when it is made; without one it is a warning.
    """
    if not runtime.watch:
        yield None
        return
    path = None if folder is None else folder / "watch.jsonl"

    def tell(finding: Finding, step: int) -> None:
        (observer or Observer()).say(describe_finding(finding, step))

    try:
        watched = watch(
            model,
            runtime.watch,
            None if path is None else JsonLines(path),
            on_finding=None if observer is None else tell,
        )
    except ValueError as error:  # one of the user's own
        (observer or Observer()).say(f"not watched: {error}")
        yield None
        return
    before = read_lines(path) if path is not None else []
    if before:  # where the run resumes
        watched.first = before[0]
    with watched:
        yield watched


def load_run(folder: str | Path) -> Run:
    """Return the run in `folder` with its weights, in evaluation mode, on the CPU.

    Raises `ValueError` for a folder that holds no run, and for weights that are missing, not whole,
    or of another model.
    """
    folder = Path(folder)
    facts = _facts(folder)
    data = _data(folder, facts)
    model = build_model(facts["model"], data)
    path = folder / "model.safetensors"
    tensors, header = load_file(path)
    load_weights(model, tensors, path)
    choice = choice_from(facts["choice"])
    choice.choose(model)
    run = Run(model.eval(), data, TrainConfig(**facts["train"]), choice, folder)
    run.step = int(header.get("step", 0))
    run.status = read_json(folder / "summary.json")["status"]
    return run


def _data(folder: Path, facts: Mapping[str, Any]) -> Dataset:
    """Return the data of a run, a text in the tokens that the run was trained on."""
    known = facts["data"]
    kept = None if known["unit"] == "images" else load_tokenizer(folder / "tokenizer.json")
    return reload_data(known, kept)


def _facts(folder: Path) -> dict[str, Any]:
    """Return `config.json` of a run folder, its plug-ins loaded."""
    if not folder.is_dir():
        raise ValueError(f"no run folder {str(folder)!r}")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a run folder: it has no config.json")
    facts = read_json(folder / "config.json")
    missing = [key for key in ("model", "data", "train", "runtime", "choice") if key not in facts]
    if missing:
        raise ValueError(f"{folder} is not a run folder: its config.json has no {missing[0]!r}")
    load_plugins(facts.get("plugins", []))
    return dict(facts)


@torch.no_grad()
def _check_output(
    model: nn.Module, data: Dataset, config: TrainConfig, device: torch.device
) -> None:
    """Raise `ValueError` unless the model maps a batch to logits of the targets' shape."""
    inputs, targets = to_device(data.training_batch(config.seed, 0, 2), device)
    training = model.training
    model.eval()  # a batch must not move the statistics of a norm
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        own_code(f"a forward pass of {type(model).__name__}"),
        checked(model),
    ):
        output = model(inputs)
    model.train(training)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    wanted = (*targets.shape, data.shape.get("vocab_size") or data.shape["classes"])
    got = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
    if got != wanted:
        raise ValueError(
            f"{type(model).__name__} returns {got} for a batch {tuple(inputs.shape)}; the trainer "
            f"needs logits {wanted}"
        )


def xray_run(
    run: Run, batch: tuple[Tensor, Tensor] | None = None, blocks: str | None = None
) -> Trace:
    """X-ray the model of a run on its first validation batch, or on `batch`."""
    device = next(run.model.parameters()).device
    if batch is None:
        batch = to_device(next(run.data.validation_batches(run.config.batch, 1)), device)
    return xray(run.model, *batch, blocks=blocks)


def write_report(folder: str | Path, lang: str = "en", page: Path | None = None) -> Path:
    """Write the page of a run, by default `report.html` in its folder, and return its path."""
    from addnorm.reports.pages import write_run_page

    folder = Path(folder)
    page = page or folder / "report.html"
    metrics = read_lines(folder / "metrics.jsonl")
    summary = read_json(folder / "summary.json")
    write_run_page(_facts(folder), metrics, summary, page, lang)
    return page


def describe_outcome(run: Run, lang: str = "en") -> str:
    """Return one sentence on how a run ended; for a diverged one the first bad block is named."""
    assert isinstance(run.data, Dataset)
    if run.status == "diverged":
        assert run.failed_batch is not None
        finding = next(iter(xray_run(run, run.failed_batch).findings), None)
        where = f"{finding.where}: {finding.why} {finding.remedy}" if finding else "the optimizer"
        kept = "the last checkpoint stays" if run.folder else "no checkpoint was kept"
        if lang == "zh":
            return f"第 {run.step + 1} 步的损失或梯度不是有限值，训练停止，保留最后的检查点。首个异常处：{where}"
        return (
            f"the loss or its gradient is not finite at step {run.step + 1}: training stopped, "
            f"{kept}. First bad block: {where}"
        )
    data, loss = run.data, run.validation
    right, among = run.evaluations[-1].accuracy, run.evaluations[-1].top5
    if data.unit == "images":
        if lang == "zh":
            return f"测试准确率 {right:.2%}（前五 {among:.2%}），测试损失 {loss:.3f}，训练损失 {run.training_loss:.3f}"
        return (
            f"test accuracy {right:.2%} (top five {among:.2%}), test loss {loss:.3f}, training "
            f"loss {run.training_loss:.3f}"
        )
    assert isinstance(data, TextData)
    bits = f"{data.bits_per_byte(loss):.3f}"
    if lang == "zh":
        lines = f"一元熵 {data.unigram:.3f}，均匀猜测 {data.uniform:.3f}"
        return f"验证损失 {loss:.3f}（{lines}），即每字节 {bits} 比特"
    lines = f"unigram {data.unigram:.3f}, uniform {data.uniform:.3f}"
    return f"validation loss {loss:.3f} ({lines}), {bits} bits per byte"


@overload
def sample(
    run: Run,
    prompt: str = "\n",
    *,
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> str: ...


@overload
def sample(
    run: Run,
    prompt: list[str] | tuple[str, ...],
    *,
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]: ...


def sample(
    run: Run,
    prompt: str | list[str] | tuple[str, ...] = "\n",
    *,
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> str | list[str]:
    """Return `prompt` and what the run's model writes after it; of several prompts a list.

    `temperature` 0 takes the most likely token; `top_k` above 0 leaves only so many to draw from,
    `top_p` below 1 the most likely ones that together have this probability. The i-th of several
    prompts draws with `seed + i`. Raises `ValueError` for a run on images, an empty prompt, a
    character that the model never saw, and settings out of range.
    """
    sampling = Sampling(tokens, temperature, top_k, top_p, seed)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    drawn = list(_generate(run, prompts, sampling))  # tokens times prompts
    decode = _text(run).tokenizer.decode
    texts = [p + decode(ids) for p, ids in zip(prompts, zip(*drawn, strict=True), strict=True)]
    return texts[0] if isinstance(prompt, str) else texts


def stream(
    run: Run,
    prompt: str,
    *,
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """Yield the text that `sample` appends, piece by piece as it is drawn."""
    sampling = Sampling(tokens, temperature, top_k, top_p, seed)
    ids = (row for (row,) in _generate(run, [prompt], sampling))
    return _text(run).tokenizer.decode_stream(ids)


def _generate(run: Run, prompts: list[str], sampling: Sampling) -> Iterator[list[int]]:
    data = _text(run)
    ids = [data.tokenizer.encode(prompt) for prompt in prompts]
    return generate(run.model.eval(), ids, data.context, sampling)


def _text(run: Run) -> TextData:
    if not isinstance(run.data, TextData):
        raise ValueError("this run was trained on images; only a run on text can be sampled")
    return run.data
