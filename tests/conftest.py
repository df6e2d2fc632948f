"""What every test starts from: one thread and the same seed."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from addnorm import contract

torch.set_num_threads(1)  # the machine is shared, and pytest-xdist brings its own processes


def _torchvision_beside_a_torch_for_cpus():
    """Declare the operators of torchvision where its extension is built for another torch.

    pip takes torchvision's CUDA build from PyPI also beside a torch for CPUs. Its extension, which
    timm and transformers need nothing of here, does not load then, and neither of them imports.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return
    try:
        torch.ops.load_library(str(Path(found.origin).parent / "_C.so"))
    except OSError:
        for operator in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{operator}", "(Tensor a, Tensor b, float c) -> Tensor"
            )


_torchvision_beside_a_torch_for_cpus()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _catalogue():
    """A wiring that one test defines is unknown to the next."""
    contract.catalogue()
    before, modules = dict(contract._CATALOGUE), set(sys.modules)
    yield
    contract._CATALOGUE.clear()
    contract._CATALOGUE.update(before)
    for name in set(sys.modules) - modules:
        if name.startswith("addnorm_plugin_"):
            del sys.modules[name]
