"""Kernel tests run the Triton kernels under Triton's interpreter, on CPU tensors.

The variable holds for these tests alone: with it the dispatcher would take the slow interpreter for the tensors of
every other test of the process. `harmony_fast.kernels.interpreter` reads it at each launch, so it does not matter who
imported Triton or the kernels first. Tests of compiled kernels start a process of their own (see test_aot.py).
"""

import importlib

import pytest
import torch
from harmony_fast.bench import aot
from harmony_fast.kernels import interpreter

interpreter.install()
# Decorated here, before the variable is set: whatever order the files run in, test_aot.py can compile the kernels.
for _module in aot.MODULES:
    importlib.import_module(f"harmony_fast.kernels.{_module}")


@pytest.fixture(autouse=True, scope="module")
def interpreted() -> object:
    """TRITON_INTERPRET=1 and automatic dispatch while the tests of a module run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.delenv("HARMONY_FAST_KERNELS", raising=False)
        yield


@pytest.fixture(autouse=True)
def one_seed() -> None:
    """The same random numbers in every order of the tests."""
    torch.manual_seed(0)
