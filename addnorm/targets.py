"""What `addnorm xray` takes: a run, a Hugging Face folder, or a function that returns a model.

A target is loaded with inputs that suit it, and says what they are. Nothing is fetched from a
network, and pickled weights are never opened.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from addnorm import runs
from addnorm.data.corpora import load_corpus
from addnorm.data.sets import Dataset
from addnorm.data.text import TextData
from addnorm.files import read_json
from addnorm.interop import load_gpt2
from addnorm.plugins import own_code, resolve
from addnorm.probe.losses import Loss, call_model
from addnorm.probe.purity import untouched
from addnorm.training.loop import to_device

BATCH = 4  # windows, images or vectors, where nothing says how many
WINDOW = 64  # tokens, where the model takes as many
LENGTHS = (64, 32, 16, 8)  # windows and image sides that are tried on a model without inputs
SIDES = (64, 224, 32, 28)
TEXT = "pydoc"  # the built-in text
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
# transformers' lists of architectures, what they are loaded with, and whether they take labels.
TASKS = (
    ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM", True),
    ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "AutoModelForMaskedLM", True),
    ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "AutoModelForSeq2SeqLM", True),
    ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "AutoModelForImageClassification", False),
    ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "AutoModelForSequenceClassification",
     False),
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A model and what it is given."""

    model: nn.Module
    inputs: Any  # as `xray` takes them
    targets: Any = None
    loss: Loss | None = None
    fed: str = ""  # what the inputs are, in a few words


def load_target(name: str, text: str = "", seed: int = 0) -> Target:
    """Return what `name` stands for: a run folder, a Hugging Face folder, or a function.

    A run is given its first validation batch. A Hugging Face folder, with `config.json` and
    safetensors, is given windows of the built-in text where it has a `tokenizer.json`, else random
    tokens, and random pixels where it reads images; language models are given the tokens as labels
    too. `pkg.module:function` or `file.py:function` returns a model, (model, inputs), (model,
    inputs, targets) or (model, inputs, targets, loss); a model alone is given random inputs of the
    first shape that it takes. `text`: a UTF-8 file, a folder or a glob in place of the text.
    `seed` draws what is random.

    Raises `ValueError` for a target that is not there, pickled weights, an architecture that is
    not known, or a function that fails or returns something else.
    """
    path = Path(name)
    if path.is_dir():
        config = path / "config.json"
        facts = read_json(config) if config.is_file() else {}
        if isinstance(facts, dict) and "model_type" in facts:
            return _hugging_face(path, facts, text, seed)
        if not config.is_file() and (pickled := _pickled(path)):
            raise ValueError(f"{path} holds {pickled}, which is pickled and never opened")
        return _run(path, text)
    if ":" in name and not path.exists():
        if text:
            raise ValueError(f"--text goes with a run or a Hugging Face folder, not with {name}")
        return _function(name, seed)
    if any(path.match(pattern) for pattern in (*PICKLES, "*.safetensors")):
        raise ValueError(f"{path} holds weights alone; give the folder with its config.json")
    raise ValueError(
        f"no run or Hugging Face folder {name!r}; give one, a saved trace, or pkg.module:function"
    )


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- runs --------------------------------------------------------------------------------------


def _run(folder: Path, text: str) -> Target:
    run = runs.load_run(folder)
    if text:
        if not isinstance(run.data, TextData):
            raise ValueError(f"{folder} was trained on images; leave --text out")
        ids = _windows(run.data.tokenizer.encode(_read(text)), run.data.context + 1, text)
        given = f"{len(ids)} windows of {ids.shape[1] - 1} tokens of {text}"
        return Target(run.model, ids[:, :-1], ids[:, 1:], fed=given)
    assert isinstance(run.data, Dataset)
    device = next(run.model.parameters()).device
    batch = next(run.data.validation_batches(run.config.batch, 1))
    inputs, targets = to_device(batch, device)
    source = run.data.describe()["source"]
    if isinstance(run.data, TextData):
        what = f"{len(inputs)} windows of {inputs.shape[1]} tokens"
    else:
        what = f"{len(inputs)} images"
    return Target(run.model, inputs, targets, fed=f"{what}, validation batch of {source}")


def _read(text: str) -> str:
    """Return the start of a text: more than any window needs."""
    return next(load_corpus(text or TEXT).texts())


def _windows(ids: list[int], length: int, text: str) -> Tensor:
    """Return `(B, length)` tokens, as many windows as there are up to `BATCH`, one at least."""
    rows = min(BATCH, len(ids) // length)
    if not rows:
        raise ValueError(f"the text {text!r} has {len(ids)} tokens; a window needs {length}")
    return torch.tensor(ids[: rows * length]).view(rows, length)


# -- Hugging Face folders ----------------------------------------------------------------------


def _pickled(folder: Path) -> str:
    return next((f.name for pattern in PICKLES for f in sorted(folder.glob(pattern))), "")


def _hugging_face(folder: Path, facts: Mapping[str, Any], text: str, seed: int) -> Target:
    if not list(folder.glob("*.safetensors")):
        pickled = _pickled(folder)
        what = f"only {pickled}, which is pickled and never opened" if pickled else "no weights"
        raise ValueError(
            f"{folder} holds {what}; write them with save_pretrained(folder, "
            "safe_serialization=True)"
        )
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        if facts["model_type"] != "gpt2":
            raise ValueError(
                f"{folder} holds a model of type {facts['model_type']!r}, which needs "
                "transformers: pip install 'addnorm[hf]' (gpt2 is read without)"
            ) from None
        model = load_gpt2(folder)
        ids, what = _tokens(folder, model.config.vocab_size, model.config.context, text, seed)
        return Target(model, ids[:, :-1], ids[:, 1:], fed=what)
    with _quiet(transformers), own_code(f"loading {folder} with transformers"):
        hf, takes_labels = _load(transformers, folder, facts)
    hf.eval().float()
    return _given(hf, folder, takes_labels, text, seed)


def _load(transformers: Any, folder: Path, facts: Mapping[str, Any]) -> tuple[Any, bool]:
    """Load with the Auto class of the architecture that the config names; say if it has labels."""
    listed = importlib.import_module("transformers.models.auto.modeling_auto")
    named = (facts.get("architectures") or [""])[0]
    auto, labels = "AutoModel", False
    for names, way, takes in TASKS:
        known = getattr(listed, names).get(facts["model_type"], ())
        if named and named in ((known,) if isinstance(known, str) else known):
            auto, labels = way, takes
            break
    model, found = getattr(transformers, auto).from_pretrained(
        folder,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    if found["missing_keys"]:
        first = sorted(found["missing_keys"])[0]
        raise ValueError(f"{first} is missing, one of {len(found['missing_keys'])} tensors")
    return model, labels


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep transformers from drawing bars and warning on the terminal."""
    logs = transformers.utils.logging
    level, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        if bars:
            logs.enable_progress_bar()


def _given(model: Any, folder: Path, takes_labels: bool, text: str, seed: int) -> Target:
    """Make the inputs of a model of transformers."""
    config = model.config
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (BATCH, getattr(config, "num_channels", 3), height, width)
        pixels = torch.randn(shape, generator=_generator(seed))
        return Target(model, {"pixel_values": pixels}, fed=_pixels(pixels))
    if model.main_input_name != "input_ids":
        raise ValueError(
            f"{folder} takes {model.main_input_name}, which is neither tokens nor pixels; give "
            "pkg.module:function that returns (model, inputs)"
        )
    if hasattr(config, "use_cache"):
        config.use_cache = False
    longest = getattr(config, "max_position_embeddings", None) or WINDOW
    ids, what = _tokens(folder, config.vocab_size, min(WINDOW, longest), text, seed)
    inputs = {"input_ids": ids}
    if takes_labels:
        inputs["labels"] = ids
        what += ", as labels too"
    elif config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return Target(model, inputs, fed=what)


def _tokens(folder: Path, vocabulary: int, length: int, text: str, seed: int) -> tuple[Tensor, str]:
    """Return `(B, length)` tokens and what they are: a text where there is a tokenizer."""
    file = folder / "tokenizer.json"
    length = min(length, WINDOW)
    if not file.is_file():
        if text:
            raise ValueError(f"{folder} has no tokenizer.json to read {text!r} with")
        ids = torch.randint(vocabulary, (BATCH, length), generator=_generator(seed))
        return ids, f"{BATCH} windows of {length} random tokens: no tokenizer.json"
    from tokenizers import Tokenizer

    with own_code(f"reading {file}"):
        encoded = Tokenizer.from_file(str(file)).encode(_read(text)[:100_000]).ids
    if encoded and max(encoded) >= vocabulary:
        raise ValueError(
            f"{file} does not fit the model: token {max(encoded)} of a vocabulary of {vocabulary}"
        )
    ids = _windows(encoded, length, text or TEXT)
    return ids, f"{len(ids)} windows of {length} tokens of {text or TEXT}"


# -- functions ---------------------------------------------------------------------------------


def _function(name: str, seed: int) -> Target:
    function = resolve(name)
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise ValueError(f"{name} must need no arguments: {error}") from None
    with own_code(name):
        made = function()
    parts = made if isinstance(made, tuple) else (made,)
    if not 1 <= len(parts) <= 4 or not isinstance(parts[0], nn.Module):
        got = f"({', '.join(type(p).__name__ for p in parts)})" if len(parts) > 1 else type(made)
        raise ValueError(
            f"{name} must return a model, (model, inputs), (model, inputs, targets) or (model, "
            f"inputs, targets, loss); got {got if isinstance(got, str) else got.__name__}"
        )
    if len(parts) == 4 and parts[3] is not None and not callable(parts[3]):
        raise ValueError(f"{name} must return a loss(output, targets) that can be called")
    if len(parts) == 1:
        inputs, what = _guessed(name, parts[0], seed)
        return Target(parts[0], inputs, fed=what)
    model, inputs, targets, loss = (*parts, None, None)[:4]
    return Target(model, inputs, targets, loss, fed=f"what {name} returned")


def _guessed(name: str, model: nn.Module, seed: int) -> tuple[Tensor, str]:
    """Return random inputs of the first shape that a model takes, and what they are."""
    failed = "it has no embedding, convolution or linear map"
    for inputs, what in _candidates(model, _generator(seed)):
        try:
            with untouched(model), torch.no_grad():
                call_model(model, inputs)
        except Exception as error:  # noqa: BLE001  # a shape that does not fit may raise anything
            failed = f"{what}: {type(error).__name__}: {error}"
            continue
        return inputs, what
    raise ValueError(
        f"{name} returns a model alone, and no inputs were found for it ({failed}); return "
        "(model, inputs)"
    )


def _candidates(model: nn.Module, generator: torch.Generator) -> Iterator[tuple[Tensor, str]]:
    """Yield inputs for the first module that can read some."""
    kinds = nn.Embedding | nn.Conv2d | nn.Linear
    match next((m for m in model.modules() if isinstance(m, kinds)), None):
        case nn.Embedding(num_embeddings=count):
            for n in LENGTHS:
                ids = torch.randint(count, (BATCH, n), generator=generator)
                yield ids, f"{BATCH} windows of {n} random tokens"
        case nn.Conv2d(in_channels=channels):
            for n in SIDES:
                images = torch.randn(BATCH, channels, n, n, generator=generator)
                yield images, _pixels(images)
        case nn.Linear(in_features=width):
            rows = 8 * BATCH
            yield torch.randn(rows, width, generator=generator), f"{rows} random vectors"
            positions = torch.randn(BATCH, 16, width, generator=generator)
            yield positions, f"{BATCH} windows of 16 random vectors"


def _pixels(images: Tensor) -> str:
    shape = " x ".join(map(str, images.shape[1:]))
    return f"{len(images)} random images, {shape}"
