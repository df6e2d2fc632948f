"""Runs: put a model, its data and the trainer together, keep them in a folder, and sample.

A run folder holds `config.json` (model, data, training, how it is computed), `tokenizer.json`,
`metrics.jsonl`, `model.safetensors`, `checkpoint.safetensors` and `summary.json`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from addnorm import __version__
from addnorm.branches import Context
from addnorm.data.text import CharTokenizer, TextData, load_text
from addnorm.files import locked, read_json, read_lines, write_json
from addnorm.models.gpt import GPT, GPTConfig
from addnorm.plugins import absolute, load_plugins, own_code, resolve
from addnorm.probe.trace import Trace
from addnorm.probe.vitals import xray
from addnorm.training.checkpoint import load_file, load_weights
from addnorm.training.config import Runtime, TrainConfig
from addnorm.training.loop import Observer, Run, pick_device, to_device, train_loop
from addnorm.training.tune import Choice, choice_from


def build_model(description: dict[str, Any], data: TextData) -> nn.Module:
    """Return the model that a run's configuration describes, for the vocabulary of `data`.

    Raises `ValueError` when a user's function fails to return a module.
    """
    if "function" in description:
        return _own_model(description["function"], data.vocab_size, data.context)
    known = {f.name for f in fields(GPTConfig)}
    config = GPTConfig(**{k: v for k, v in description.items() if k in known})
    return GPT(replace(config, vocab_size=data.vocab_size))


def _own_model(target: str, vocab_size: int, context: int) -> nn.Module:
    """Call the user's function with those of vocab_size and context that it takes."""
    function = resolve(target)
    offered = {"vocab_size": vocab_size, "context": context}
    try:
        taken = inspect.signature(function).parameters
        given = {k: v for k, v in offered.items() if k in taken}
        inspect.signature(function).bind(**given)
    except TypeError as error:
        raise ValueError(
            f"{target} could not be called: {error}; it may take vocab_size and context, both int"
        ) from None
    with own_code(target):
        model = function(**given)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{target} returned {type(model).__name__}, not a torch.nn.Module")
    return model


def _describe(model: nn.Module) -> dict[str, Any]:
    if isinstance(model, GPT):
        return {"kind": "gpt", **asdict(model.config)}
    return {"kind": type(model).__name__}


def train(
    model: nn.Module,
    data: TextData,
    config: TrainConfig | None = None,
    runtime: Runtime | None = None,
    *,
    out: str | Path | None = None,
    observer: Observer | None = None,
    choice: Choice | None = None,
    description: dict[str, Any] | None = None,
    plugins: tuple[str, ...] = (),
) -> Run:
    """Train `model` (tokens `(B, T)` to logits `(B, T, V)`) on `data` and return the run.

    With `out` the run is kept in that folder, which must not hold a run yet. `description` is what
    the folder records of the model: `{"function": "pkg.module:function"}` for one of the user's.
    Raises `ValueError` for a folder in use, and for outputs of the wrong shape.
    """
    config, runtime = config or TrainConfig(), runtime or Runtime()
    device = pick_device(runtime.device)
    _check_output(model.to(device), data, config, device)
    if out is None:
        return train_loop(model, data, config, runtime, choice=choice, observer=observer)
    folder = Path(out)
    with locked(folder):
        if (folder / "config.json").exists():
            raise ValueError(
                f"{folder} holds a run already; go on with --resume {folder}, or choose "
                "another --out"
            )
        write_json(folder / "tokenizer.json", {"characters": data.tokenizer.characters})
        facts = {
            "addnorm": __version__,
            "torch": torch.__version__,
            "model": description or _describe(model),
            "data": data.describe(),
            "plugins": absolute(plugins),
        }
        return train_loop(
            model,
            data,
            config,
            runtime,
            choice=choice,
            folder=folder,
            facts=facts,
            observer=observer,
        )


def resume(folder: str | Path, observer: Observer | None = None) -> Run:
    """Go on with the run in `folder` from its last checkpoint, with the recorded choices.

    Raises `ValueError` for a folder that holds no run, a corpus that has changed, a checkpoint
    that is not whole, or a run that another process is training.
    """
    folder = Path(folder)
    facts = _facts(folder)
    with locked(folder):
        data = _data(facts)
        config, runtime = TrainConfig(**facts["train"]), Runtime(**facts["runtime"])
        torch.manual_seed(config.seed)
        return train_loop(
            build_model(facts["model"], data),
            data,
            config,
            runtime,
            choice=choice_from(facts["choice"]),
            folder=folder,
            resume=(folder / "checkpoint.safetensors").exists(),
            observer=observer,
        )


def load_run(folder: str | Path) -> Run:
    """Return the run in `folder` with its weights, in evaluation mode, on the CPU.

    Raises `ValueError` for a folder that holds no run, and for weights that are missing, not whole,
    or of another model.
    """
    folder = Path(folder)
    facts = _facts(folder)
    data = _data(facts)
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


def _data(facts: dict[str, Any]) -> TextData:
    known = facts["data"]
    data = load_text(known["source"], known["context"])
    if data.sha256 != known["sha256"]:
        raise ValueError(
            f"the text {known['source']!r} is not the one that this run was trained on: its sha256 "
            f"is {data.sha256[:12]}, the run recorded {known['sha256'][:12]}"
        )
    return data


@torch.no_grad()
def _check_output(
    model: nn.Module, data: TextData, config: TrainConfig, device: torch.device
) -> None:
    """Raise `ValueError` unless the model maps tokens `(B, T)` to logits `(B, T, V)`."""
    inputs, targets = to_device(data.training_batch(config.seed, 0, 2), device)
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        own_code(f"a forward pass of {type(model).__name__}"),
    ):
        output = model(inputs)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    wanted = (*inputs.shape, data.vocab_size)
    got = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
    if got != wanted:
        raise ValueError(
            f"{type(model).__name__} returns {got} for tokens {tuple(targets.shape)}; the trainer "
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
    assert isinstance(run.data, TextData)
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
    if lang == "zh":
        return f"验证损失 {loss:.3f}（一元熵 {data.unigram:.3f}，均匀猜测 {data.uniform:.3f}）"
    return f"validation loss {loss:.3f} (unigram {data.unigram:.3f}, uniform {data.uniform:.3f})"


def sample(
    run: Run,
    prompt: str = "\n",
    *,
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    seed: int = 0,
) -> str:
    """Return `prompt` and what the run's model writes after it.

    `temperature` 0 takes the most likely character; `top_k` above 0 leaves only so many to draw
    from. Raises `ValueError` for an empty prompt, a character that the model never saw, and
    settings out of range.
    """
    return prompt + "".join(
        stream(run, prompt, tokens=tokens, temperature=temperature, top_k=top_k, seed=seed)
    )


def stream(
    run: Run, prompt: str, *, tokens: int, temperature: float, top_k: int, seed: int
) -> Iterator[str]:
    """Yield the characters that `sample` appends, as they are drawn."""
    if not prompt:
        raise ValueError("the prompt is empty; give at least one character")
    if tokens < 1:
        raise ValueError(f"tokens {tokens} must be at least 1")
    if not temperature >= 0:
        raise ValueError(f"temperature {temperature} must be at least 0")
    if top_k < 0:
        raise ValueError(f"top_k {top_k} must be at least 0 (0: all characters)")
    assert isinstance(run.data, TextData)
    tokenizer: CharTokenizer = run.data.tokenizer
    ids = torch.tensor([tokenizer.encode(prompt)])  # (1, T)
    for token in generate(
        run.model.eval(), ids, run.data.context, tokens, temperature, top_k, seed
    ):
        yield tokenizer.decode([token])


@torch.no_grad()
def generate(
    model: nn.Module,
    ids: Tensor,
    context: int,
    tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
) -> Iterator[int]:
    """Yield the next token ids after `ids (1, T)`, with a key-value cache where the model has one.

    Positions are learned, so when the context is full the window restarts from its later half and
    the cache is filled again.
    """
    generator = torch.Generator().manual_seed(seed)
    cached = isinstance(model, GPT)
    ids = ids[:, -context:]
    cache: Context | None = None
    for _ in range(tokens):
        if ids.shape[1] > context:
            ids, cache = ids[:, -max(1, context // 2) :], None
        if not cached:
            logits = _logits(model(ids))
        elif cache is None:
            cache = Context(cache={})
            logits = model(ids, cache)
        else:
            logits = model(ids[:, -1:], replace(cache, past=ids.shape[1] - 1))
        choice = draw(logits[0, -1].float(), temperature, top_k, generator)
        ids = torch.cat((ids, torch.tensor([[choice]])), dim=1)
        yield choice


def _logits(output: Any) -> Tensor:
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def draw(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """Draw one id from logits `(V,)`; temperature 0 takes the largest."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        least = logits.topk(min(top_k, logits.numel())).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = torch.softmax(logits / temperature, dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))
