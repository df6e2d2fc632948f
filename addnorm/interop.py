"""Weights of other libraries: read and write the folder of a Hugging Face GPT-2.

Such a folder holds `config.json` and `model.safetensors`, or shards of it that
`model.safetensors.index.json` lists. Reading and writing it needs safetensors only, not
transformers. Pickled weights (`pytorch_model.bin`) are never opened.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from addnorm.contract import parse_spec, unknown
from addnorm.files import read_json, write_atomic, write_json
from addnorm.models.gpt import GPT, GPTConfig
from addnorm.models.layers import AttentionConfig, EmbeddingConfig, FeedForwardConfig

# Activations by their names there; the first name of ours is the one that is written.
ACTIVATIONS = {
    "gelu_new": "gelu-tanh",
    "gelu_pytorch_tanh": "gelu-tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
}
# What a config may say besides the sizes: only this, which is also the default.
FIXED: Mapping[str, Any] = {
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
SIZES = {"depth": "n_layer", "dim": "n_embd", "heads": "n_head", "context": "n_positions"}
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
LISTED = 6  # names that a message lists before it says how many more there are


# -- reading -----------------------------------------------------------------------------------


def load_gpt2(folder: str | Path) -> GPT:
    """Return the GPT that a Hugging Face GPT-2 folder holds, in evaluation mode, on the CPU.

    Its logits equal those of `transformers.GPT2LMHeadModel` up to rounding. Names with and
    without the prefix `transformer.` are read, the masks that old files carry are left out, and
    weights of 16 bits are widened to float32.

    Raises `ValueError` for a folder without config or weights, pickled weights, files that are not
    whole, an option that this GPT does not have, and tensors whose names or shapes do not fit,
    which are listed; nothing is half-loaded.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no folder {str(folder)!r}; give one with config.json and weights")
    config = _read_config(folder / "config.json")
    tensors = _read_tensors(folder)
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    if config.tied:
        model.head.weight = model.token.weight
    own = _own(model)
    _check(tensors, own, config.tied, folder)
    assert not dict(model.named_buffers()), "a buffer would stay unfilled"
    with torch.no_grad():
        for name, parameter in own.items():
            theirs = tensors[name]
            parameter.copy_(theirs.T if _transposed(name) else theirs)
    return model.eval()


def _read_config(path: Path) -> GPTConfig:
    """Return our config of theirs. Raises `ValueError` for what a GPT of ours cannot be."""
    known = read_json(path)
    if not isinstance(known, dict):
        raise ValueError(f"{path} is not the config of a model")
    if "model_type" not in known:
        raise ValueError(f"{path} does not say its model_type; this reads gpt2")
    for option, only in FIXED.items():
        value = known.get(option, only)
        if value != only:
            raise ValueError(f"{path}: {option}={value!r} is not supported (only {only!r})")
    activation = known.get("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{path}: {unknown('activation_function', str(activation), ACTIVATIONS)}")
    sizes = {"vocab_size": "vocab_size", **SIZES}
    for theirs in sizes.values():
        if type(known.get(theirs)) is not int or known[theirs] < 1:
            raise ValueError(f"{path}: {theirs} must be a whole number of at least 1")
    hidden = known.get("n_inner")
    if hidden is not None and (type(hidden) is not int or hidden < 1):
        raise ValueError(f"{path}: n_inner must be null or a whole number of at least 1")
    for rate in DROPOUTS:
        if not isinstance(known.get(rate, 0.1), int | float):
            raise ValueError(f"{path}: {rate} must be a number")
    resid, embd, attn = (float(known.get(rate, 0.1)) for rate in DROPOUTS)
    try:
        return GPTConfig(
            **{ours: known[theirs] for ours, theirs in sizes.items()},
            dropout=resid,
            tied=known.get("tie_word_embeddings", True) is True,
            embedding=EmbeddingConfig(embedding_dropout=embd),
            attention=AttentionConfig(attention_dropout=attn),
            feedforward=FeedForwardConfig(
                activation=ACTIVATIONS[activation],  # type: ignore[arg-type]
                hidden=hidden or 0,
            ),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors by name without prefix, the masks of the attention left out."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if whole.is_file():
        files = [whole]
    elif index.is_file():
        listed = read_json(index)
        if not isinstance(listed, dict) or not isinstance(listed.get("weight_map"), dict):
            raise ValueError(f"{index} has no weight_map")
        names = sorted({str(name) for name in listed["weight_map"].values()})
        for name in names:
            if Path(name).name != name:
                raise ValueError(f"{index} lists {name!r}, which is not a file beside it")
        files = [folder / name for name in names]
    else:
        if list(folder.glob("*.bin")):
            raise ValueError(
                f"{folder} holds pickled weights (.bin), which are never opened; write them with "
                "save_pretrained(folder, safe_serialization=True)"
            )
        raise ValueError(f"{folder} holds no model.safetensors")
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is missing; {index.name} lists it")
        try:
            with safe_open(file, framework="pt") as opened:
                found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is not a whole safetensors file ({error})") from None
        for name, tensor in found.items():
            short = name.removeprefix("transformer.")
            if short in tensors:
                raise ValueError(f"{file} holds {name} for the second time")
            if not short.endswith((".attn.bias", ".attn.masked_bias")):
                tensors[short] = tensor
    return tensors


def _check(
    tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], tied: bool, folder: Path
) -> None:
    """Raise `ValueError` unless the tensors are those that `own` needs."""
    extra = tensors.keys() - own.keys()
    if tied and "lm_head.weight" in extra and "wte.weight" in tensors:
        if not torch.equal(tensors["lm_head.weight"], tensors["wte.weight"]):
            raise ValueError(
                f"{folder}: lm_head.weight is not wte.weight, but config.json ties them "
                "(tie_word_embeddings)"
            )
        extra = extra - {"lm_head.weight"}
    wrong = []
    for name in sorted(own.keys() & tensors.keys()):
        shape, theirs = own[name].shape, tensors[name]
        wanted = shape[::-1] if _transposed(name) else shape
        if theirs.shape != wanted:
            wrong.append(f"{name} {tuple(theirs.shape)}, expected {tuple(wanted)}")
        elif not theirs.is_floating_point():
            wrong.append(f"{name} of {theirs.dtype}, expected floating point")
    problems = [
        f"{what}: {_listed(names)}"
        for what, names in (
            ("missing", sorted(own.keys() - tensors.keys())),
            ("unknown", sorted(extra)),
            ("unfit", wrong),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"the weights in {folder} do not fit its config.json: {'; '.join(problems)}"
        )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _own(model: GPT) -> dict[str, Tensor]:
    """Return our parameters by their names; a tied head, which they do not store, is left out.

    | theirs | ours |
    |---|---|
    | `wte`, `wpe`, `ln_f`, `lm_head` | token, position, final norm, head |
    | `h.l.ln_1`, `h.l.ln_2` | norms of the connections 2 l and 2 l + 1 |
    | `h.l.attn.c_attn`, `h.l.attn.c_proj` | query, key and value fused; out |
    | `h.l.mlp.c_fc`, `h.l.mlp.c_proj` | in; out |
    """
    ours = {"token": "wte", "position": "wpe", "norm": "ln_f"}
    if not model.config.tied:
        ours["head"] = "lm_head"
    for layer in range(model.config.depth):
        attention = f"stack.connections.{2 * layer}"
        feedforward = f"stack.connections.{2 * layer + 1}"
        ours |= {
            f"{attention}.norm_in": f"h.{layer}.ln_1",
            f"{attention}.branch.qkv": f"h.{layer}.attn.c_attn",
            f"{attention}.branch.out": f"h.{layer}.attn.c_proj",
            f"{feedforward}.norm_in": f"h.{layer}.ln_2",
            f"{feedforward}.branch.lift": f"h.{layer}.mlp.c_fc",
            f"{feedforward}.branch.out": f"h.{layer}.mlp.c_proj",
        }
    named: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        if module not in ours:
            raise ValueError(f"GPT-2 has no place for the parameter {name}")
        named[f"{ours[module]}.{kind}"] = parameter
    return named


def _transposed(name: str) -> bool:
    """Say whether they store it `(in, out)`: the matrices of the branches, as their Conv1D has."""
    return name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))


# -- writing -----------------------------------------------------------------------------------


def save_gpt2(model: GPT, folder: str | Path) -> None:
    """Write a folder that `transformers.GPT2LMHeadModel.from_pretrained` reads.

    The folder appears whole or not at all. Raises `ValueError` for a folder that exists and is not
    empty, and for a model that GPT-2 cannot express: another wiring or norm, or any option of
    embedding, attention or feed-forward that it lacks, each of which is named.
    """
    folder = Path(folder)
    if not isinstance(model, GPT):
        raise ValueError(f"{type(model).__name__} is not a GPT; only a GPT can be written as GPT-2")
    _check_expressible(model.config)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; choose another folder")
    tensors = {
        f"{'' if name.startswith('lm_head') else 'transformer.'}{name}": (
            (p.detach().T if _transposed(name) else p.detach()).cpu().contiguous()
        )
        for name, p in _own(model).items()
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        os.chmod(made, 0o755)
        with write_atomic(made / "model.safetensors") as file:
            file.write(save(tensors, {"format": "pt"}))
        write_json(made / "config.json", _their_config(model))
        os.replace(made, folder)  # takes the place of an empty folder too
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def _their_config(model: GPT) -> dict[str, Any]:
    c = model.config
    activation = next(k for k, v in ACTIVATIONS.items() if v == c.feedforward.activation)
    return {
        "architectures": ["GPT2LMHeadModel"],
        **FIXED,
        **{theirs: getattr(c, ours) for ours, theirs in SIZES.items()},
        "vocab_size": c.vocab_size,
        "n_inner": c.feedforward.hidden or None,
        "activation_function": activation,
        "resid_pdrop": c.dropout,
        "embd_pdrop": c.embedding.embedding_dropout,
        "attn_pdrop": c.attention.attention_dropout,
        "tie_word_embeddings": c.tied,
        "dtype": str(model.token.weight.dtype).removeprefix("torch."),
        "bos_token_id": None,  # theirs by default is 50256, which few vocabularies have
        "eos_token_id": None,
    }


def _check_expressible(config: GPTConfig) -> None:
    """Raise `ValueError` that names every field which a GPT-2 does not have like this."""
    c = replace(config, wiring=str(parse_spec(config.wiring)))
    if c.attention.kv_heads == c.heads:
        c = replace(c, attention=replace(c.attention, kv_heads=0))
    embedding = EmbeddingConfig(
        embedding_dropout=c.embedding.embedding_dropout,
        embedding_start=c.embedding.embedding_start,
    )
    attention = AttentionConfig(attention_dropout=c.attention.attention_dropout)
    feedforward = FeedForwardConfig(hidden=c.feedforward.hidden)
    activations = set(ACTIVATIONS.values())
    if c.feedforward.activation in activations:
        feedforward = replace(feedforward, activation=c.feedforward.activation)
    allowed = GPTConfig(
        depth=c.depth,
        dim=c.dim,
        heads=c.heads,
        context=c.context,
        wiring="prenorm",
        dropout=c.dropout,
        tied=c.tied,
        start=c.start,
        vocab_size=c.vocab_size,
        embedding=embedding,
        attention=attention,
        feedforward=feedforward,
    )
    # Every field counts, so that one which comes later is refused and not dropped.
    had, has = _flat(asdict(c)), _flat(asdict(allowed))
    wrong = [
        f"{name} {had[name]!r} (allowed: "
        + (" ".join(sorted(activations)) if name == "activation" else repr(has[name]))
        + ")"
        for name in had
        if had[name] != has[name]
    ]
    if wrong:
        raise ValueError(f"GPT-2 cannot express {', '.join(wrong)}")


def _flat(nested: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat |= _flat(value) if isinstance(value, dict) else {name: value}
    return flat
