"""What every test starts from: one thread and the same seed."""

import sys

import pytest
import torch

from addnorm import contract

torch.set_num_threads(1)  # the machine is shared, and pytest-xdist brings its own processes


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
