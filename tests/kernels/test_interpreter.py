"""The repairs of Triton's interpreter: bfloat16 against torch, when the variable is read, what is left behind."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from harmony_fast.kernels import interpreter
from harmony_fast.kernels.aot import AotCase, compile_case

N = 16
BF16 = torch.bfloat16


@triton.jit
def device_function(x, y):
    return x * y - x


@triton.jit
def arithmetic(a, b, out, compared, sums, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(a + i), tl.load(b + i)
    tl.store(out + i, x + y)
    tl.store(out + N + i, device_function(x, y))
    tl.store(out + 2 * N + i, -x)
    tl.store(out + 3 * N + i, tl.where(x < y, tl.abs(x), y))
    tl.store(out + 4 * N + i, tl.maximum(x, y))
    tl.store(out + 5 * N + i, x + 0.1)
    tl.store(compared + i, x > y)
    tl.store(sums, tl.sum(x.to(tl.float32)) + tl.max(x, 0).to(tl.float32))
    tl.store(sums + 1, x.to(tl.float32).sum(0))


@triton.jit
def product(a, b, out, low, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    acc = tl.dot(tl.load(a + i * N + j), tl.load(b + i * N + j))
    tl.store(out + i * N + j, acc)
    tl.store(low + i * N + j, acc.to(tl.bfloat16))


@triton.jit
def convert(a, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(a + i).to(out.dtype.element_ty))


@triton.jit
def convert_down(a, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(a + i).to(tl.bfloat16, fp_downcast_rounding="rtz"))


def test_arithmetic_is_that_of_torch() -> None:
    x, y = torch.randn(2, N).to(BF16)
    out, compared, sums = torch.empty(6, N, dtype=BF16), torch.empty(N, dtype=torch.bool), torch.empty(2)
    arithmetic[(1,)](x, y, out, compared, sums, N)
    assert torch.equal(out[0], x + y)
    assert torch.equal(out[1], x * y - x)
    assert torch.equal(out[2], -x)
    assert torch.equal(out[3], torch.where(x < y, x.abs(), y))
    assert torch.equal(out[4], torch.maximum(x, y))
    assert torch.equal(out[5], x + torch.tensor(0.1, dtype=BF16))
    assert torch.equal(compared, x > y)
    torch.testing.assert_close(sums[0], x.float().sum() + x.max().float())
    torch.testing.assert_close(sums[1], x.float().sum())


def test_matrix_product_has_fp32_accumulators() -> None:
    a, b = torch.randn(2, N, N).to(BF16)
    out, low = torch.empty(N, N), torch.empty(N, N, dtype=BF16)
    product[(1,)](a, b, out, low, N)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)
    assert torch.equal(low, out.to(BF16))


@pytest.mark.parametrize("other", [torch.float32, torch.float16, torch.float64, torch.int32])
def test_conversions_are_those_of_torch(other: torch.dtype) -> None:
    values = 3 * torch.randn(N, dtype=torch.float64)
    for source, to in ((other, BF16), (BF16, other)):
        x, out = values.to(source), torch.empty(N, dtype=to)
        convert[(1,)](x, out, N)
        assert torch.equal(out, x.to(to))


def test_rounding_of_every_kind_of_number() -> None:
    bits = np.concatenate([
        np.random.default_rng(0).integers(0, 2**32, 5000, np.uint32),
        np.array([0, 0x80000000, 1, 0x7F800000, 0xFF800000, 0x7FC00001, 0x7F7FFFFF, 0x3F808000, 0x3F818000], np.uint32),
    ])  # fmt: skip
    values = torch.from_numpy(bits.view(np.float32).copy())
    found = torch.from_numpy(interpreter.to_bfloat16(values.numpy()).view(np.int16)).view(BF16)
    expected = values.to(BF16)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found[~found.isnan()].view(torch.int16), expected[~found.isnan()].view(torch.int16))
    assert torch.equal(
        torch.from_numpy(interpreter.to_float(found.view(torch.uint16).numpy())).to(BF16).isnan(), found.isnan()
    )


def test_rounding_to_zero_where_a_kernel_asks_for_it() -> None:
    x, out = torch.tensor([1.999, -1.999, 1.0, 0.3] * 4), torch.empty(N, dtype=BF16)
    convert_down[(1,)](x, out, N)
    assert (out.float().abs() <= x.abs()).all() and out[0] == 1.9921875


def test_language_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {**vars(tl)}, {**vars(tl.core)}, {**vars(tl.tensor)}
    x, out = torch.randn(N), torch.empty(N, dtype=BF16)
    convert[(1,)](x, out, N)
    assert ({**vars(tl)}, {**vars(tl.core)}, {**vars(tl.tensor)}) == before
    monkeypatch.delenv("TRITON_INTERPRET")
    case = AotCase("convert", convert, {"a": "*fp32", "out": "*bf16"}, {"N": N}, ("a", "out"))
    assert compile_case(case, 90)["registers"] > 0


def test_kernels_need_a_gpu_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError):
        convert[(1,)](torch.randn(N), torch.empty(N), N)


SCRIPT = """
import os, sys, torch
if {late}:
    from harmony_fast.kernels import interpreter
    assert not interpreter._done and "triton" not in sys.modules
    import triton.language
    os.environ["TRITON_INTERPRET"] = "1"
from harmony_fast.kernels import ema_update_, interpreter
ema, source, copy = torch.randn(99), torch.randn(99).bfloat16(), torch.empty(99, dtype=torch.bfloat16)
expected = 0.9 * ema + 0.1 * source.float()
ema_update_(ema, source, 0.9, copy)
torch.testing.assert_close(ema, expected)
assert torch.equal(copy, ema.bfloat16()) and interpreter._done
"""


@pytest.mark.parametrize("late", [False, True])
def test_installs_itself_whenever_the_variable_is_set(late: bool) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0" if late else "1", "OMP_NUM_THREADS": "1"}
    script = SCRIPT.format(late=late)
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=250)
