import pytest
import torch
from harmony_fast.kernels import ema_update_
from harmony_fast.kernels.ema import ema_reference
from hypothesis import given, settings
from hypothesis import strategies as st

BACKENDS = ("triton", "torch")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HARMONY_FAST_KERNELS", request.param)
    return request.param


def at_offset(n: int, offset: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random numbers whose first element lies `offset` elements behind an aligned address."""
    return torch.randn(n + offset).to(dtype)[offset:]


@settings(max_examples=25)
@given(
    n=st.one_of(st.integers(1, 300), st.integers(4000, 9000)),
    momentum=st.floats(0, 1),
    dtypes=st.tuples(st.sampled_from(FLOATS), st.sampled_from((*FLOATS, None))),
    offsets=st.tuples(*[st.integers(0, 5)] * 3),
)
def test_equals_the_formula(n: int, momentum: float, dtypes: tuple, offsets: tuple) -> None:
    ema, source = at_offset(n, offsets[0]), at_offset(n, offsets[1], dtypes[0])
    copy = at_offset(n, offsets[2], dtypes[1]) if dtypes[1] else None
    expected, before = ema_reference(ema, source, momentum), source.clone()
    ema_update_(ema, source, momentum, copy)
    torch.testing.assert_close(ema.double(), expected, rtol=2e-7, atol=4e-7)
    assert torch.equal(source, before)
    assert copy is None or torch.equal(copy, ema.to(copy.dtype))


def test_writes_nothing_beside_the_shard() -> None:
    whole, copies = torch.full((5003,), 7.0), torch.full((5003,), 7.0, dtype=torch.bfloat16)
    ema_update_(whole[3:4500], torch.randn(4497), 0.5, copies[3:4500])
    for x in (whole, copies):
        assert (x[:3] == 7).all() and (x[4500:] == 7).all() and (x[3:4500] != 7).any()


@pytest.mark.parametrize("dtype", FLOATS)
def test_meets_the_ends_exactly(dtype: torch.dtype) -> None:
    ema, source = torch.randn(100), torch.randn(100).to(dtype)
    start = ema.clone()
    ema_update_(ema, source, 1.0)
    assert torch.equal(ema, start)
    ema_update_(ema, source, 0)
    assert torch.equal(ema, source.float())
    ema_update_(ema, source, 0.3)
    assert torch.equal(ema, source.float())


def test_small_updates_are_not_rounded_away() -> None:
    ema, source = torch.ones(8), torch.full((8,), 1.001)
    for _ in range(300):
        ema_update_(ema, source, 0.999)
    torch.testing.assert_close(ema, torch.full((8,), 1.001 - 0.001 * 0.999**300), rtol=1e-5, atol=0)


def test_what_is_not_finite_stays_where_it_is() -> None:
    source = torch.zeros(50)
    source[7], source[9] = float("nan"), float("inf")
    ema, copy = torch.ones(50), torch.empty(50, dtype=torch.bfloat16)
    ema_update_(ema, source, 0.9, copy)
    assert ema.isfinite().sum() == 48 and copy[7].isnan() and ema[9] == copy[9] == float("inf")


def test_copy_may_be_the_average_and_the_shard_empty() -> None:
    ema, source = torch.randn(2, 33)
    expected = ema_reference(ema, source, 0.9)
    ema_update_(ema, source, 0.9, ema)
    torch.testing.assert_close(ema.double(), expected, rtol=1e-6, atol=1e-6)
    ema_update_(torch.empty(0), torch.empty(0), 0.9, torch.empty(0))


def test_parameters_are_moved_without_a_graph() -> None:
    ema, source = (torch.nn.Parameter(x) for x in torch.randn(2, 5))
    ema_update_(ema, source, 0.5)
    assert ema.grad_fn is None and ema.is_leaf


def test_wrong_input_is_named() -> None:
    ema = torch.zeros(3)
    for arguments, message in (
        ((ema.bfloat16(), ema, 0.9), "ema must be float32"),
        ((ema, torch.zeros(4), 0.9), "source must have ema's shape"),
        ((ema, torch.zeros(3, dtype=torch.int32), 0.9), "source must have a float dtype"),
        ((ema, torch.zeros(3, device="meta"), 0.9), "source must be on ema's device"),
        ((ema, ema, 0.9, torch.zeros(2)), "copy must have ema's shape"),
        ((ema, ema, 0.9, torch.zeros(3, dtype=torch.bool)), "copy must have a float dtype"),
        ((ema, ema, 1.1), "momentum must lie in"),
        ((ema, ema, float("nan")), "momentum must lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            ema_update_(*arguments)


def strided(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape[:-1], shape[-1] * 2).to(dtype)[..., ::2]


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (300_000,)])
def test_other_layouts_and_dtypes_go_to_torch(shape: tuple, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ema = strided(shape, torch.float64) if shape else torch.randn((), dtype=torch.float64)
    source, copy = torch.randn(shape).to(torch.bfloat16), torch.empty(shape, dtype=torch.float16)
    if backend == "triton":
        with pytest.raises(ValueError, match="asks for triton, but ema is"):
            ema_update_(ema, source, 0.7, copy)
        monkeypatch.delenv("HARMONY_FAST_KERNELS")
    expected = ema_reference(ema, source, 0.7)
    ema_update_(ema, source, 0.7, copy)
    torch.testing.assert_close(ema, expected)
    assert torch.equal(copy, ema.to(copy.dtype))


def test_compiles_into_one_graph() -> None:
    def step(ema: torch.Tensor, source: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
        ema_update_(ema, source * 2, 0.75, copy)
        return copy.float() + 1

    ema, source = torch.randn(2, 65)
    twin, copy = ema.clone(), torch.empty(65, dtype=torch.bfloat16)
    expected = step(twin, source, torch.empty_like(copy))
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(ema, source, copy), expected)
    assert torch.equal(ema, twin)


def test_the_operator_is_well_formed() -> None:
    ema, source = torch.randn(2, 20)
    torch.library.opcheck(
        torch.ops.harmony_fast.ema_update_.default, (ema, source, 0.5, torch.empty(20, dtype=torch.bfloat16))
    )
    torch.library.opcheck(torch.ops.harmony_fast.ema_update_.default, (ema, source, 0.5, None))
