"""Checkpoints: tensors in safetensors, facts as JSON in the header, one atomic file; no pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from addnorm.files import write_atomic


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers that a state dict keeps, tied ones once."""
    kept = model.state_dict().keys()
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor.detach() for name, tensor in named.items() if name in kept}


@torch.no_grad()
def load_weights(model: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Copy `tensors` into the model. Raises `ValueError` when names or shapes differ."""
    own = weights(model)
    missing, foreign = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    wrong = [k for k in own if k in tensors and own[k].shape != tensors[k].shape]
    for problem, names in (
        ("lacks", missing),
        ("has unknown", foreign),
        ("has other shapes for", wrong),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(
                f"{source} does not belong to this model: it {problem} {names[0]}{more}"
            )
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def save_file(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors and facts to one safetensors file, atomically."""
    data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with write_atomic(path) as file:
        file.write(save(data, {"facts": json.dumps(facts)}))


def load_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and facts. Raises `ValueError` for a missing, truncated or foreign file."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); pickled weights are never opened"
        ) from None
    return tensors, json.loads(metadata.get("facts", "{}"))


class TrainState:
    """All that a run needs to go on bitwise: weights, the optimizer's moments, generator, step."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer

    def _names(self) -> dict[int, str]:
        return {id(p): name for name, p in self.model.named_parameters()}

    def save(self, path: Path, facts: dict[str, Any]) -> None:
        """Write the state to `path`, atomically. `facts` holds the step and the like."""
        tensors = {f"model.{k}": v for k, v in weights(self.model).items()}
        names = self._names()
        for parameter, state in self.optimizer.state.items():
            kept = {k: v for k, v in state.items() if isinstance(v, Tensor)}
            tensors |= {f"optimizer.{k}.{names[id(parameter)]}": v for k, v in kept.items()}
        tensors["random.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        save_file(path, tensors, facts)

    def load(self, path: Path) -> dict[str, Any]:
        """Read the state from `path` into model and optimizer and return the facts."""
        tensors, facts = load_file(path)
        own = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        load_weights(self.model, own, path)
        parameters = dict(self.model.named_parameters())
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, moment, name = key.split(".", 2)
                parameter = parameters[name]
                # `step` stays on the CPU unless the optimizer is fused on a GPU.
                device = parameter.device if value.dim() or parameter.is_cuda else "cpu"
                self.optimizer.state[parameter][moment] = value.to(device)
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random.cuda"])
        return facts
