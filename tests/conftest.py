"""What every test starts from: one thread and the same seed."""

import pytest
import torch

torch.set_num_threads(1)  # the machine is shared, and pytest-xdist brings its own processes


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
