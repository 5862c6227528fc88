"""The production model gives the numbers of the authors' implementation."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from parity import Golden, compare

FILE = Path(__file__).parents[1] / "golden" / "tiny_a.safetensors"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_losses_gradients_and_centers(dtype: torch.dtype) -> None:
    rows = compare(Golden.read(FILE), dtype)
    assert len(rows) > 100
    assert not [row for row in rows if row[1] > row[2]]
