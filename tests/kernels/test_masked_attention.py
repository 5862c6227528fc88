import importlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from harmony_fast.kernels import _attention_layout, dispatch, masked_attention_triton
from harmony_fast.kernels._attention_layout import Layout, layout_of
from harmony_fast.kernels.masked_attention import masked_attention, reference
from harmony_fast.kernels.masked_attention_triton import TUNING, Tiles
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
HALF = (torch.float16, torch.bfloat16)
lengths_lists = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)
layouts = st.sampled_from(["fused", "apart", "spaced", "transposed"])


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def tensors(
    lengths: list[int], heads: int = 2, width: int = 16, dtype: torch.dtype = torch.float64, seed: int = 0,
    layout: str = "fused",
) -> list[Tensor]:  # fmt: skip
    """q, k, v [T, H, D]: views of one projection, apart, every other row of wider ones, or D not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(sum(lengths), 3, heads, width, generator=generator, dtype=torch.float64).to(dtype)
    if layout == "apart":
        return [x.contiguous() for x in qkv.unbind(1)]
    if layout == "spaced":
        wide = torch.zeros(2 * sum(lengths) + 1, 3, heads, width + 3, dtype=dtype)
        wide[1::2, ..., 3:] = qkv
        return list(wide[1::2, ..., 3:].unbind(1))
    if layout == "transposed":
        return [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in qkv.unbind(1)]
    return list(qkv.unbind(1))


def key_masks(lengths: list[int], seed: int) -> Tensor:
    """About half of the keys, and for one sequence in three none."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(sum(lengths), generator=generator) < 0.5
    for start, length in zip(offsets_of(lengths).tolist(), lengths, strict=False):
        if torch.rand((), generator=generator) < 1 / 3:
            mask[start : start + length] = False
    return mask


def run(function: object, inputs: list[Tensor], dout: Tensor, *arguments: object, **options: object) -> list[Tensor]:
    """out, dq, dk, dv."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves, *arguments, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def check(
    lengths: list[int], inputs: list[Tensor], seed: int = 0, offsets: Tensor | None = None, **options: object
) -> list[Tensor]:
    """out, dq, dk, dv, held against the float64 reference; the error in units of the dtype's rounding."""
    dtype = inputs[0].dtype
    offsets = offsets_of(lengths) if offsets is None else offsets
    dout = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    results = run(masked_attention, inputs, dout, offsets, max(lengths), **options)
    expected = run(reference, [x.double() for x in inputs], dout.double(), offsets, **options)
    roundings = 2 if dtype in HALF else 50
    for bound, ours, theirs in (
        (max(1.0, float(expected[0].abs().max())), results[:1], expected[:1]),
        (max(1.0, *(float(x.abs().max()) for x in expected[1:])), results[1:], expected[1:]),
    ):
        for x, y in zip(ours, theirs, strict=True):
            assert x.dtype == dtype
            torch.testing.assert_close(x.double(), y, rtol=0, atol=roundings * torch.finfo(dtype).eps * bound)
    return results


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that is allocated and not written holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def torch_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "torch")


# The torch backend; float64 takes it by itself.


@settings(max_examples=40)
@given(lengths=lengths_lists, causal=st.booleans(), masked=st.booleans(), layout=layouts, seed=st.integers(0, 99))
def test_torch_equals_the_reference(lengths: list[int], causal: bool, masked: bool, layout: str, seed: int) -> None:
    key_mask = key_masks(lengths, seed) if masked else None
    check(lengths, tensors(lengths, seed=seed, layout=layout), causal=causal, key_mask=key_mask)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("causal", [False, True])
def test_torch_in_low_precision(torch_backend: None, dtype: torch.dtype, causal: bool) -> None:
    lengths = [9, 9, 4, 0, 4, 1]
    inputs = tensors(lengths, dtype=dtype)
    check(lengths, inputs, causal=causal, key_mask=key_masks(lengths, 3), scale=0.5)
    check(lengths, inputs, causal=causal)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(("longest", "few"), [(70, False), (600, False), (70, True)])
def test_half_precision_on_processors_with_and_without_products_in_it(
    torch_backend: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, native: bool, longest: int, few: bool
) -> None:
    """Where bf16 products are native the backward pass writes attention weights out, but not of long sequences, and
    takes PyTorch's operator in fp32 for runs of few weights."""
    module = importlib.import_module("harmony_fast.kernels.masked_attention")
    monkeypatch.setattr(module, "half_products", lambda _: native)
    monkeypatch.setattr(module, "_WRITTEN_ON_CPU", 3 * 70**2)
    lengths = [longest, 37, 37, 37, 37, 37, 37, 37, 37, 37, 0, 5, 1]
    inputs = tensors(lengths, dtype=dtype)
    weights = 2 * sum(n**2 for n in lengths)  # in four runs
    monkeypatch.setattr(module, "_FEW_WEIGHTS", weights / 4 + (1 if few else 0))
    with Operators() as called:
        check(lengths, inputs)
        check(lengths, inputs, causal=True)
        check(lengths, inputs, causal=True, key_mask=key_masks(lengths, 3), scale=0.5)
    taken = called.dtypes.get("aten._scaled_dot_product_flash_attention_for_cpu_backward.default", set())
    if not native or dtype != torch.bfloat16:
        assert taken == {dtype}
    elif few:
        assert taken == {torch.float32}
    else:
        assert taken == ({dtype} if longest > 512 else set())


class Operators(TorchDispatchMode):
    """The operators that are called, with the dtypes of their first arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if args and isinstance(args[0], Tensor):
            self.dtypes.setdefault(str(func), set()).add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal: bool) -> None:
    lengths = [4, 4, 1, 3]
    key_mask = torch.tensor([1, 0, 1, 1, 0, 0, 0, 0, 1, 0, 1, 1]).bool()
    leaves = [x.contiguous().requires_grad_() for x in tensors(lengths, heads=1, width=2)]
    for mask in (None, key_mask):
        assert torch.autograd.gradcheck(
            lambda q, k, v, mask=mask: masked_attention(q, k, v, offsets_of(lengths), 4, causal=causal, key_mask=mask),
            leaves,
        )


def test_what_attention_gives_is_kept_once(torch_backend: None) -> None:
    """On a CPU, for sequences of several lengths: the result itself, beside q, k, v and a log-sum-exp per head."""
    lengths = [7, 7, 3, 2]
    leaves = [x.requires_grad_() for x in tensors(lengths, dtype=torch.float32, layout="apart")]
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = masked_attention(*leaves, offsets_of(lengths), 7)
    assert out.untyped_storage().data_ptr() in kept
    sums = 4 * out.shape[0] * out.shape[1]
    assert sum(kept.values()) == 4 * out.nbytes + sums


@pytest.mark.parametrize("weights", [0, 150, 10**6])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_operators_gradients_some_sequences_at_a_time(
    monkeypatch: pytest.MonkeyPatch, weights: int, causal: bool, masked: bool
) -> None:
    """What the torch backend does under torch.compile, with at most so many attention weights stored."""
    monkeypatch.setattr(importlib.import_module("harmony_fast.kernels.masked_attention"), "_WRITTEN_ON_CPU", weights)
    lengths = [6, 6, 6, 0, 9, 6]
    offsets, inputs, dout = offsets_of(lengths), tensors(lengths), tensors(lengths, seed=1)[0]
    key_mask = key_masks(lengths, 5) if masked else None

    def operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.harmony_fast.masked_attention(q, k, v, offsets, key_mask, 9, causal, 0.3)[0]

    expected = run(reference, inputs, dout, offsets, causal=causal, key_mask=key_mask, scale=0.3)
    for x, y in zip(run(operator, inputs, dout), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_weights_written_out_at_once_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than the limit, unless one sequence has more; every token once."""
    module = importlib.import_module("harmony_fast.kernels.masked_attention")
    monkeypatch.setattr(module, "_WRITTEN_ON_CPU", 400)
    lengths = [6, 6, 6, 6, 6, 6, 0, 20, 3]
    pieces = list(module._pieces(layout_of(offsets_of(lengths), sum(lengths), 20), tensors(lengths, heads=2)[0]))
    assert [shape for _, shape in pieces] == [(5, 6), (1, 6), (1, 20), (1, 3)]
    assert [i for piece, _ in pieces for i in range(piece.start, piece.stop)] == [*range(sum(lengths))]


def test_4096_tokens_by_torch(torch_backend: None) -> None:
    lengths = [4096, 3]
    check(lengths, tensors(lengths, heads=1, dtype=torch.float32), causal=True)


@given(lengths=lengths_lists)
def test_runs_cover_every_sequence_once(lengths: list[int]) -> None:
    runs = Layout(offsets_of(lengths)).runs
    assert [length for _, count, length in runs for _ in range(count)] == [n for n in lengths if n]
    assert [start for start, _, _ in runs] == [
        sum(count * length for _, count, length in runs[:i]) for i in range(len(runs))
    ]


# Triton, interpreted.


@settings(max_examples=16, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=3).filter(any), heads=st.integers(1, 2),
    width=st.sampled_from([16, 48, 64, 112]), dtype=st.sampled_from([torch.float32, *HALF]),
    causal=st.booleans(), masked=st.booleans(), layout=layouts, seed=st.integers(0, 99),
)  # fmt: skip
def test_short_sequences(
    poisoned: None, lengths: list[int], heads: int, width: int, dtype: torch.dtype, causal: bool, masked: bool,
    layout: str, seed: int,
) -> None:  # fmt: skip
    key_mask = key_masks(lengths, seed) if masked else None
    check(lengths, tensors(lengths, heads, width, dtype, seed, layout), seed, causal=causal, key_mask=key_mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("causal", "masked"), [(False, False), (True, True)])
def test_a_mix_takes_a_launch_for_each_class(
    poisoned: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, causal: bool, masked: bool
) -> None:
    monkeypatch.setattr(masked_attention_triton, "FEW", 1)
    lengths = [197, 50, 37, 20, 0, 100, 1]
    plan = masked_attention_triton.plan(Layout(offsets_of(lengths)), [32, 64, 128, 256], (64,), CPU)
    assert [(keys, len(table)) for keys, table in plan.short] == [(32, 2), (64, 2), (128, 1), (256, 1)]
    key_mask = key_masks(lengths, 5) if masked else None
    check(lengths, tensors(lengths, heads=1, width=32, dtype=dtype), causal=causal, key_mask=key_mask)


@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.tuples(st.integers(0, 60), st.integers(257, 600)), width=st.sampled_from([16, 32]),
    causal=st.booleans(), masked=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_long_sequences(
    poisoned: None, lengths: tuple[int, int], width: int, causal: bool, masked: bool, seed: int
) -> None:
    key_mask = key_masks([*lengths], seed) if masked else None
    check([*lengths], tensors([*lengths], 1, width, torch.bfloat16, seed), seed, causal=causal, key_mask=key_mask)


def test_long_sequences_in_fp32(poisoned: None) -> None:
    check([77, 39], tensors([77, 39], 1, 96, torch.float32), causal=True, key_mask=key_masks([77, 39], 0))


@pytest.mark.parametrize("length", [64, 128, 129, 256, 257, 384])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths_at_the_edges_of_blocks(poisoned: None, length: int, causal: bool) -> None:
    check([length], tensors([length], 1, 16, torch.bfloat16), causal=causal)


def test_4096_tokens(poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    large = Tiles(512, 512, 8, 1)  # the interpreter's time goes with the number of tiles
    tuning = replace(TUNING[2, 32], forward_long=large, dq=large, dkdv=large)
    monkeypatch.setitem(TUNING, (2, 32), tuning)
    check([4096], tensors([4096], 1, 16, torch.bfloat16), causal=True)


@pytest.mark.parametrize("lengths", [[20, 9], [70]])
def test_gradients_are_the_same_bits_in_every_run(lengths: list[int]) -> None:
    inputs = tensors(lengths, width=96, dtype=torch.float32)
    first, second = check(lengths, inputs, causal=True), check(lengths, inputs, causal=True)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [7, 260])
def test_queries_without_keys_give_zeros(
    poisoned: None, monkeypatch: pytest.MonkeyPatch, backend: str, causal: bool, length: int
) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, backend)
    lengths = [length, 5]
    key_mask = torch.ones(length + 5, dtype=torch.bool)
    key_mask[:3] = False
    key_mask[length:] = False
    out, dq, dk, dv = check(lengths, tensors(lengths, 1, dtype=torch.bfloat16), causal=causal, key_mask=key_mask)
    for x in (out, dq, dk, dv):
        assert not x[length:].any()
    assert not dk[:3].any() and not dv[:3].any()
    if causal:
        assert not out[:3].any() and not dq[:3].any()
    assert out[3:length].any(-1).all()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_sequence_does_not_see_another(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, backend)
    lengths = [5, 7, 270, 3]
    inputs = tensors(lengths, 1, dtype=torch.bfloat16)
    dout = torch.randn_like(inputs[0])
    before = run(masked_attention, inputs, dout, offsets_of(lengths), 270)
    for x in (*inputs, dout):
        x[5:12] = float("nan")
        x[282:] = float("nan")
    after = run(masked_attention, inputs, dout, offsets_of(lengths), 270)
    own = torch.cat([torch.arange(5), torch.arange(12, 282)])
    assert all(torch.equal(x[own], y[own]) for x, y in zip(before, after, strict=True))
    assert after[0][5:12].isnan().all()


@given(lengths=st.lists(st.integers(0, 700), min_size=1, max_size=200).filter(any), few=st.sampled_from([1, 64]))
def test_tables_cover_every_row_once(lengths: list[int], few: int) -> None:
    classes, rows = [32, 64, 128], (64, 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masked_attention_triton, "FEW", few)
        short, long = masked_attention_triton.plan(Layout(offsets_of(lengths)), classes, rows, CPU)
    for size in range(len(long) or 1):
        seen = torch.zeros(sum(lengths), dtype=torch.int64)
        for tile, table in [*short, *zip(rows[size:], long[size:], strict=False)][: len(short) + 1]:
            for start, length, row in table.tolist():
                assert 0 <= row < length and start in offsets_of(lengths)[:-1].tolist()
                seen[start + row : start + min(length, row + tile)] += 1
        assert (seen == 1).all()
    assert all((table[:, 1] <= keys).all() for keys, table in short)
    assert few != 1 or all((table[:, 1] > keys // 2).all() for keys, table in short if keys > 32)


# What is remembered, and what torch.compile sees.


def test_offsets_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    original = Layout.__init__
    monkeypatch.setattr(Layout, "__init__", lambda self, offsets: (read.append(offsets), original(self, offsets))[1])
    inputs, offsets = tensors([9, 3], dtype=torch.float32), offsets_of([9, 3])
    for _ in range(2):
        check([9, 3], inputs, offsets=offsets)
    layout = layout_of(offsets, 12, 9)
    tables = masked_attention_triton.plan(layout, [32], (64,), CPU)
    assert masked_attention_triton.plan(layout, [32], (64,), CPU) is tables
    assert len(read) == 1
    offsets[1] = 4
    check([4, 8], inputs, offsets=offsets)
    assert len(read) == 2
    known = len(_attention_layout._layouts)
    del read[:], offsets
    assert len(_attention_layout._layouts) == known - 1


def test_offsets_on_a_device_are_known_by_their_version() -> None:
    layout, elsewhere = Layout(offsets_of([9, 3])), torch.empty(3, dtype=torch.int32, device="meta")
    assert layout.holds_for(elsewhere)
    assert not layout.holds_for(elsewhere.add_(1))


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("masked", [False, True])
def test_compile_keeps_one_graph(monkeypatch: pytest.MonkeyPatch, backend: str, masked: bool) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, backend)
    torch.compiler.reset()

    def layers(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, length: int, key_mask: Tensor | None) -> Tensor:
        x = masked_attention(q, k, v, offsets, length, causal=True, key_mask=key_mask)
        return masked_attention(x, k, v, offsets, length, key_mask=key_mask, scale=0.3)

    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    for lengths in ([6, 6, 2], [11, 3]):
        inputs = tensors(lengths, dtype=torch.float32)
        rest = offsets_of(lengths), max(lengths), key_masks(lengths, 0) if masked else None
        dout = torch.randn_like(inputs[0])
        for x, y in zip(run(layers, inputs, dout, *rest), run(compiled, inputs, dout, *rest), strict=True):
            torch.testing.assert_close(x, y)
    with pytest.raises(ValueError, match="max_length is 10"):
        compiled(*inputs, rest[0], 10, rest[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operators_are_registered_as_torch_wants(dtype: torch.dtype) -> None:
    q, k, v = tensors([5, 7], dtype=dtype)
    rest = offsets_of([5, 7]), key_masks([5, 7], 1), 7, True, 0.25
    operators = torch.ops.harmony_fast
    torch.library.opcheck(operators.masked_attention, (*(x.clone().requires_grad_() for x in (q, k, v)), *rest))
    out, lse = operators.masked_attention(q, k, v, *rest)
    torch.library.opcheck(operators.masked_attention_backward, (torch.randn_like(q), q, k, v, out, lse, *rest))


# Bad input.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=lambda x: x[1:]), "one shape"),
        (dict(k=lambda x: x[:, :1]), "one shape"),
        (dict(v=lambda x: x[..., :8]), "one shape"),
        (dict(q=lambda x: x[0], k=lambda x: x[0], v=lambda x: x[0]), "q, k, v must be"),
        (dict(q=lambda x: x[:0], k=lambda x: x[:0], v=lambda x: x[:0]), "q, k, v hold no"),
        (dict(q=torch.Tensor.int, k=torch.Tensor.int, v=torch.Tensor.int), "q must be float16"),
        (dict(k=torch.Tensor.half), "k must be torch.float"),
        (dict(v=lambda x: x.to("meta")), "v must be .* on cpu"),
        (dict(offsets=torch.Tensor.long), "offsets must be int32"),
        (dict(offsets=lambda x: x[None]), "offsets must be int32"),
        (dict(offsets=lambda x: x[:1]), "offsets must be int32"),
        (dict(offsets=lambda x: x.to("meta")), "offsets must be on the host"),
        (dict(offsets=lambda x: x + 1), "offsets must start at 0"),
        (dict(offsets=lambda x: x[[0, 2, 1, 2]]), "offsets must be increasing, but 12 comes before 5"),
        (dict(offsets=lambda x: x[:2]), "offsets end at 5, but there are 12"),
        (dict(max_length=lambda x: 6), "max_length is 6, but the longest sequence in offsets has 7"),
        (dict(max_length=lambda x: 8), "max_length is 8"),
        (dict(max_length=lambda x: 0), "max_length must"),
        (dict(key_mask=torch.Tensor.int), "key_mask must be bool"),
        (dict(key_mask=lambda x: x[1:]), "key_mask must be bool"),
        (dict(key_mask=lambda x: x.to("meta")), "key_mask must be on cpu"),
        (dict(scale=lambda x: float("nan")), "scale must be finite"),
    ],
)
def test_bad_input_is_named(dtype: torch.dtype, change: dict, message: str) -> None:
    q, k, v = tensors([5, 7], dtype=dtype)
    arguments = dict(q=q, k=k, v=v, offsets=offsets_of([5, 7]), max_length=7, key_mask=torch.ones(12).bool(), scale=1.0)
    masked_attention(**arguments)
    with pytest.raises(ValueError, match=message):
        masked_attention(**{name: change.get(name, lambda x: x)(value) for name, value in arguments.items()})


def test_backends_say_what_they_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors([5], width=144, dtype=torch.float32)
    masked_attention(q, k, v, offsets_of([5]), 5)
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    with pytest.raises(ValueError, match=r"asks for triton, but .* heads of up to 128, not 144"):
        masked_attention(q, k, v, offsets_of([5]), 5)
    monkeypatch.setenv(dispatch.VARIABLE, "xformers")
    with pytest.raises(ValueError, match=r"asks for xformers, but .* take no key_mask"):
        masked_attention(q, k, v, offsets_of([5]), 5, key_mask=torch.ones(5).bool())
