"""What benchmarks change in the process that runs them."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def threads():
    """Its threads and its determinism, put back at the end."""
    before, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(before)
    torch.use_deterministic_algorithms(deterministic)
