"""Cross-entropy over prototypes against a float64 formula written out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from harmony_fast.kernels import prototype_ce, prototype_ce_triton, prototype_cross_entropy, prototype_sums
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}
"""Of gradients, relative to the largest. The losses are held to fp32."""

QUICK = (Phase.explicit, Phase.reuse, Phase.generate)  # to shrink an example takes the interpreter minutes
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@contextmanager
def backend(name: str, torch_logits: int | None = None, triton_tile: tuple[int, int] | None = None) -> Iterator[None]:
    """Compute with this backend, with so many logits at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HARMONY_FAST_KERNELS", name)
        if torch_logits is not None:
            patch.setattr(prototype_ce, "ONE_PIECE", torch_logits)
        if triton_tile is not None:
            patch.setattr(prototype_ce_triton, "TRITON_TILE", triton_tile)
        yield


def problem(
    rows: int, prototypes: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64, strided: bool = False,
    teacher_width: int | None = None, teacher_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Arguments by name; features and weights are unit vectors, as they come from the head."""
    generator = torch.Generator().manual_seed(seed)

    def unit(count: int, width: int, dtype: torch.dtype) -> Tensor:
        x = F.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=1).to(dtype)
        return x.T.contiguous().T if strided else x

    teacher = {"width": teacher_width or width, "dtype": teacher_dtype or dtype}
    return {
        "student": unit(rows, width, dtype),
        "student_weight": unit(prototypes, width, dtype),
        "teacher": unit(rows, **teacher),
        "teacher_weight": unit(prototypes, **teacher),
        "center": torch.randn(prototypes, generator=generator, dtype=torch.float64) / 4,
    }


def formula(
    student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor, center: Tensor, *,
    student_temperature: float, teacher_temperature: float, row_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The loss as it is defined, in the inputs' dtype."""
    q = ((teacher @ teacher_weight.T - center) / teacher_temperature).softmax(1)
    rows = -(q * (student @ student_weight.T / student_temperature).log_softmax(1)).sum(1)
    return rows.mean() if row_weight is None else (row_weight * rows).sum()


def compare(
    tensors: dict[str, Tensor], temperatures: tuple[float, float], row_weight: Tensor | None = None,
    tolerance: float | None = None,
) -> None:  # fmt: skip
    """Loss and gradients against the formula in float64."""
    dtype = tensors["student"].dtype
    tolerance = tolerance or TOLERANCE[dtype]
    taus = {"student_temperature": temperatures[0], "teacher_temperature": temperatures[1]}
    learned = ("student", "student_weight")
    ours, theirs = (
        {n: x.detach().to(d or x.dtype).requires_grad_(n in learned) for n, x in tensors.items()}
        for d in (None, torch.float64)
    )
    loss = prototype_cross_entropy(**ours, **taus, row_weight=row_weight)
    right = formula(**theirs, **taus, row_weight=row_weight)
    wide = torch.float64 if torch.float64 in (dtype, tensors["teacher"].dtype) else torch.float32
    assert loss.dtype == wide and loss.shape == ()
    torch.testing.assert_close(loss.double(), right, rtol=min(tolerance, 5e-6), atol=min(tolerance, 5e-6))
    (-3 * loss).backward()  # not 1: the gradient that comes in counts
    (-3 * right).backward()
    terms = sizes_of_terms(**theirs, **taus, row_weight=row_weight)
    for name in learned:
        assert ours[name].grad.dtype == dtype
        size = max(theirs[name].grad.abs().max().item(), terms[name])
        error = (ours[name].grad.double() - theirs[name].grad).abs().max().item() / size
        assert error <= tolerance, f"{name}: error {error:.1e} of {size:.1e}"


@torch.no_grad()
def sizes_of_terms(
    student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor, center: Tensor, *,
    student_temperature: float, teacher_temperature: float, row_weight: Tensor | None = None,
) -> dict[str, float]:  # fmt: skip
    """What a gradient adds up, signs left out: errors are measured against it where p - q or a sum cancels."""
    p = (student @ student_weight.T / student_temperature).softmax(1)
    q = ((teacher @ teacher_weight.T - center) / teacher_temperature).softmax(1)
    rows = torch.full((len(p),), 1 / len(p), dtype=p.dtype) if row_weight is None else row_weight.abs().to(p.dtype)
    each = rows[:, None] * (p + q) / student_temperature
    return {
        "student": (each @ student_weight.abs()).max().item(),
        "student_weight": (each.T @ student.abs()).max().item(),
    }


shapes = {
    "rows": st.sampled_from([1, 3, 40, 129]),
    "width": st.sampled_from([1, 7, 16, 40]),
    "seed": st.integers(0, 99),
    "strided": st.booleans(),
    "weighted": st.booleans(),
}


def row_weights(rows: int, seed: int) -> Tensor:
    """Some zero, some negative, most of size 1/rows."""
    return torch.randn(rows, generator=torch.Generator().manual_seed(seed)).relu_().sub_(0.1) / rows


@settings(max_examples=10, phases=QUICK)
@given(**shapes, prototypes=st.sampled_from([1, 8, 65, 200]), dtype=dtypes, teacher_width=st.sampled_from([None, 9]))
@example(2, 16, 0, False, True, 700, torch.bfloat16, None)  # prototypes split over programs
def test_triton(
    rows: int, width: int, seed: int, strided: bool, weighted: bool, prototypes: int, dtype: torch.dtype,
    teacher_width: int | None,
) -> None:  # fmt: skip
    tensors = problem(rows, prototypes, width, seed, dtype, strided, teacher_width)
    with backend("triton"):
        compare(tensors, (0.1, 0.07), row_weights(rows, seed) if weighted else None)


@settings(max_examples=40)
@given(
    **shapes | {"rows": st.integers(1, 20)}, prototypes=st.integers(1, 30), teacher_width=st.sampled_from([None, 5]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), logits=st.sampled_from([10**6, 0, 50]),
)  # fmt: skip
def test_torch(
    rows: int, width: int, seed: int, strided: bool, weighted: bool, prototypes: int, teacher_width: int | None,
    dtype: torch.dtype, logits: int,
) -> None:  # fmt: skip
    tensors = problem(rows, prototypes, width, seed, dtype, strided, teacher_width)
    with backend("torch", logits):
        compare(tensors, (0.1, 0.07), row_weights(rows, seed) if weighted else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_triton_walks_over_tiles_of_gradients(dtype: torch.dtype) -> None:
    with backend("triton", triton_tile=(32, 48)):
        compare(problem(70, 100, 16, dtype=dtype), (0.1, 0.04), row_weights(70, 0))


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_extreme_temperatures(name: str) -> None:
    tensors = problem(20, 40, 8, dtype=torch.float32)
    tensors["student"][:10] = tensors["student_weight"][:10]
    tensors["teacher"][:10] = -tensors["teacher_weight"][:10]
    with backend(name, 0):
        # A logit of 100 is known to 1e-5 in fp32, and its exponential to 1e-5 of itself.
        compare(tensors, (0.01, 0.01), tolerance=3e-5)


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_small_weights_survive_half_precision(name: str) -> None:
    """With fp16's least positive number at 6e-8, rows weighted 1/20,000 need a loss scale, in time."""
    tensors = problem(8, 64, 16, dtype=torch.float16)
    learned = [tensors[n].requires_grad_() for n in ("student", "student_weight")]
    weights = torch.full((8,), 1 / 20_000 / 50)
    options = {"student_temperature": 0.1, "teacher_temperature": 0.04, "row_weight": weights}
    with backend(name, 0):
        (2.0**16 * prototype_cross_entropy(**tensors, **options)).backward()
    exact = {n: x.detach().double().requires_grad_() for n, x in tensors.items()}
    (2.0**16 * formula(**exact, **options)).backward()
    for x, y in zip(learned, (exact["student"], exact["student_weight"]), strict=True):
        assert (x.grad - y.grad).abs().max() < 2e-3 * y.grad.abs().max()


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_rows_of_weight_zero_do_not_count(name: str) -> None:
    tensors = problem(10, 12, 8, dtype=torch.float32)
    weights = torch.linspace(0.1, 1, 10)
    weights[[2, 7]] = 0
    kept = weights > 0
    results = []
    for rows in (torch.arange(10), kept.nonzero()[:, 0]):
        given = {n: x[rows] if n in ("student", "teacher") else x for n, x in tensors.items()}
        inputs = {n: x.clone().requires_grad_(n.startswith("student")) for n, x in given.items()}
        with backend(name, 0):
            loss = prototype_cross_entropy(
                **inputs, student_temperature=0.1, teacher_temperature=0.1, row_weight=weights[rows]
            )
        loss.backward()
        results.append((loss.detach(), inputs["student_weight"].grad, inputs["student"].grad))
    (loss, d_weight, d_rows), right = results
    assert not d_rows[~kept].any()
    torch.testing.assert_close((loss, d_weight, d_rows[kept]), right)
    with backend(name, 0):  # nothing counts
        zero = prototype_cross_entropy(
            **tensors, student_temperature=0.1, teacher_temperature=0.1, row_weight=torch.zeros(10)
        )
    assert zero.item() == 0


@pytest.mark.parametrize("logits", [10**6, 0, 20])
def test_gradcheck(logits: int) -> None:
    tensors = problem(5, 7, 4)
    weights = row_weights(5, 0).double()

    def loss(student: Tensor, student_weight: Tensor) -> Tensor:
        given = tensors | {"student": student, "student_weight": student_weight}
        return prototype_cross_entropy(**given, student_temperature=0.5, teacher_temperature=0.3, row_weight=weights)

    with backend("torch", logits):
        inputs = tuple(tensors[n].clone().requires_grad_() for n in ("student", "student_weight"))
        assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_gradient_only_where_asked_for(name: str) -> None:
    tensors = problem(6, 9, 8, dtype=torch.float32)
    taus = {"student_temperature": 0.1, "teacher_temperature": 0.1}
    with backend(name, 0):
        assert not prototype_cross_entropy(**tensors, **taus).requires_grad
        both = {n: x.clone().requires_grad_() for n, x in tensors.items()}
        prototype_cross_entropy(**both, **taus).backward()
        assert all((both[n].grad is not None) == n.startswith("student") for n in both)
        frozen = tensors | {"student": tensors["student"].clone().requires_grad_()}  # the prototypes' first epoch
        prototype_cross_entropy(**frozen, **taus).backward()
    torch.testing.assert_close(frozen["student"].grad, both["student"].grad)
    assert frozen["student_weight"].grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sums_are_the_sums_of_logits(dtype: torch.dtype) -> None:
    tensors = problem(50, 30, 8, dtype=dtype)
    teacher, weight = tensors["teacher"].requires_grad_(), tensors["teacher_weight"]
    with torch.autocast("cpu", torch.bfloat16):
        sums = prototype_sums(teacher, weight)
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and not sums.requires_grad
    torch.testing.assert_close(
        sums.double(), (teacher.double() @ weight.double().T).sum(0).detach(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("logits", [10**6, 40])
def test_autocast_does_not_lower_the_precision(logits: int) -> None:
    tensors = problem(20, 30, 16, dtype=torch.float32)
    with backend("torch", logits), torch.autocast("cpu", torch.bfloat16):
        loss = prototype_cross_entropy(**tensors, student_temperature=0.1, teacher_temperature=0.04)
    right = formula(**tensors, student_temperature=0.1, teacher_temperature=0.04)
    torch.testing.assert_close(loss, right.float(), rtol=1e-6, atol=1e-6)


def test_a_teacher_in_another_precision() -> None:
    with backend("triton"):
        compare(problem(20, 40, 16, dtype=torch.bfloat16, teacher_dtype=torch.float32), (0.1, 0.04))
    with backend("torch", 100):
        compare(problem(20, 40, 16, dtype=torch.float32, teacher_dtype=torch.float64), (0.1, 0.04))
    with backend("auto"):  # Triton has no float64
        compare(problem(20, 40, 16, dtype=torch.float32, teacher_dtype=torch.float64), (0.1, 0.04))


def largest_allocation(compute: Callable[[], Tensor]) -> int:
    """Bytes of the largest single allocation of a forward and backward pass."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        compute().backward()
    return max(event.self_cpu_memory_usage for event in profile.events())


def test_no_matrix_of_logits_is_allocated() -> None:
    """Of 400 x 500 logits never more than 8,000 at a time, nor anything larger than the weights."""
    tensors = problem(400, 500, 8, dtype=torch.float32)
    learned = {n: x.requires_grad_(n.startswith("student")) for n, x in tensors.items()}

    def loss() -> Tensor:
        return prototype_cross_entropy(**learned, student_temperature=0.1, teacher_temperature=0.1)

    with backend("torch", 8000):
        assert largest_allocation(loss) <= 4 * 8000
    with backend("torch"):  # one piece: the measure would see it
        assert largest_allocation(loss) >= 4 * 400 * 500


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("gradients", [True, False])
def test_operator_is_registered_right(name: str, gradients: bool) -> None:
    tensors = [
        x.requires_grad_(n.startswith("student") and gradients)
        for n, x in problem(6, 9, 4, dtype=torch.float32).items()
    ]
    # Its gradients are outputs that autograd takes for its own: they are right for the loss alone.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        prototype_ce.prototype_loss, (*tensors, 0.1, 0.04, torch.rand(6), gradients, name), test_utils=checks
    )


@pytest.mark.parametrize(("name", "logits"), [("triton", None), ("torch", None), ("torch", 20)])
def test_compiles_to_one_graph(name: str, logits: int | None) -> None:
    tensors = problem(7, 9, 8, dtype=torch.float32)

    def loss(student: Tensor, weight: Tensor) -> Tensor:
        given = tensors | {"student": student, "student_weight": weight}
        return prototype_cross_entropy(**given, student_temperature=0.1, teacher_temperature=0.04)

    results = []
    with backend(name, logits):
        for compute in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            inputs = [tensors[n].clone().requires_grad_() for n in ("student", "student_weight")]
            compute(*inputs).backward()
            results.append([x.grad for x in inputs])
    torch.testing.assert_close(*results)


GOOD = problem(4, 6, 8)
WRONG = {
    "student must be a matrix": {"student": GOOD["student"][0]},
    "student: the batch is empty": {n: GOOD[n][:0] for n in ("student", "teacher")},
    "student must be float16": {"student": GOOD["student"].long()},
    r"student_weight must be \[any, 8\]": {"student_weight": GOOD["student_weight"][:, :7]},
    "student_weight has no prototypes": {"student_weight": GOOD["student_weight"][:0]},
    "student_weight must be float64 like student": {"student_weight": GOOD["student_weight"].float()},
    r"teacher must be \[4, any\]": {"teacher": GOOD["teacher"][:3]},
    "teacher must be on cpu like student": {n: GOOD[n].to("meta") for n in ("teacher", "teacher_weight")},
    r"teacher_weight must be \[6, 8\]": {"teacher_weight": GOOD["teacher_weight"][:5]},
    "teacher_weight must be float64 like teacher": {"teacher_weight": GOOD["teacher_weight"].half()},
    "center must be a vector of 6": {"center": GOOD["center"][:5]},
    "center must be a vector of 6 floats": {"center": GOOD["center"].long()},
    "center must be on cpu": {"center": GOOD["center"].to("meta")},
    "row_weight must be a vector of 4": {"row_weight": torch.ones(6)},
    "row_weight must be on cpu": {"row_weight": torch.ones(4, device="meta")},
    "row_weight must be a vector of 4 floats, not list": {"row_weight": [1, 2, 3, 4]},
    "student_temperature must be above 0": {"student_temperature": 0.0},
    "teacher_temperature must be above 0": {"teacher_temperature": -0.1},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_input_is_named(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prototype_cross_entropy(**GOOD | {"student_temperature": 0.1, "teacher_temperature": 0.1} | WRONG[message])
    with pytest.raises(ValueError, match=r"teacher_weight must be \[any, 8\]"):
        prototype_sums(GOOD["teacher"], GOOD["teacher_weight"][:, :3])
