"""Every kernel compiles for the GPUs we care about; the hot ones spill nothing and fit the chip; the table is fresh."""

import json
from dataclasses import replace

import pytest
import triton
from harmony_fast.bench import aot
from harmony_fast.kernels.aot import SHARED_LIMIT, AotCase, _jit_function, _sources, compile_case, fingerprint
from triton import language as tl


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled here, in processes that inherit this environment."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.timeout(1200)
def test_every_case_compiles_and_the_hot_ones_do_not_spill() -> None:
    """What changed since the committed table was made is compiled, and a sample of the rest, which must not differ.

    Without a part for this version of Triton: the hot cases for one architecture, and the sample.
    """
    table, jobs = aot.read(aot.COMMITTED), aot.list_jobs()
    changed = [job for job in jobs if job not in table and (table or (job.hot and job.capability == 90))]
    sample = [job for job in jobs[::47] if job not in changed]
    rows = list(aot.run([*changed, *sample], processes=2))
    assert aot.problems(rows) == []
    for job, row in table.items():
        assert job not in jobs or aot.problems([row]) == []
    for row in rows:
        known = table.get(aot.Job(**{key: row[key] for key in aot.Job._fields}))
        assert known is None or known == row, f"{row['name']}: run harmony-fast bench aot --fresh --json FILE"


def test_the_committed_table_is_sound() -> None:
    parts = json.loads(aot.COMMITTED.read_text())
    for part in parts.values():
        assert aot.problems(part["rows"]) == []
        assert {row["capability"] for row in part["rows"]} == set(aot.CAPABILITIES)
        assert {"torch", "triton", "python"} <= set(part["versions"])


def test_fingerprints_do_not_depend_on_where_things_lie_in_memory() -> None:
    for module in aot.MODULES:
        for case in aot.cases(module).values():
            assert " at 0x" not in "".join(_sources(_jit_function(case), set())), case.name


def test_a_fingerprint_changes_with_what_is_compiled() -> None:
    case = AotCase("scale", scale, SIGNATURE, {"BLOCK": 128})
    marks = {fingerprint(c) for c in (
        case, replace(case, kernel=scale_by_two), replace(case, constexprs={"BLOCK": 256}), replace(case, num_warps=8),
        replace(case, divisible_by_16=("x",)), replace(case, signature={**SIGNATURE, "n": "i64"}),
    )}  # fmt: skip
    assert len(marks) == 6 and fingerprint(replace(case, name="other", hot=False)) in marks


def test_a_fingerprint_changes_with_a_device_function(monkeypatch: pytest.MonkeyPatch) -> None:
    case = AotCase("calls", calls, {"x": "*fp32"})
    before = fingerprint(case)
    monkeypatch.setitem(calls.fn.__globals__, "WEIGHT", tl.constexpr(3))
    changed = fingerprint(case)
    monkeypatch.setitem(calls.fn.__globals__, "helper", scale)
    assert len({before, changed, fingerprint(case)}) == 3


def test_all_four_operations_have_hot_cases() -> None:
    hot = {job.name.split(".")[0] for job in aot.list_jobs() if job.hot}
    assert len(hot) >= 4, hot


@triton.jit
def scale(x, out, n, factor, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) * factor, mask=i < n)


@triton.jit
def scale_by_two(x, out, n, factor, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) * 2, mask=i < n)


WEIGHT = tl.constexpr(2)


@triton.jit
def helper(x):
    return x * WEIGHT


@triton.jit
def calls(x):
    tl.store(x, helper(tl.load(x)))


@triton.jit
def square(x, out, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    tile = tl.load(x + i * N + j)
    tl.store(out + i * N + j, tl.dot(tile, tile))


SIGNATURE = {"x": "*fp32", "out": "*fp32", "n": "i32", "factor": "fp32"}


def test_usage_is_read_from_the_machine_code() -> None:
    case = AotCase("square", square, {"x": "*bf16", "out": "*fp32"}, {"N": 64}, ("x", "out"))
    ampere, hopper = compile_case(case, 80), compile_case(case, 90)
    assert set(ampere["tensor_core"]) == {"HMMA"} and set(hopper["tensor_core"]) == {"HGMMA"}
    assert ampere["registers"] > 16 and ampere["shared"] >= 64 * 64 * 2 and ampere["spills"] == 0
    large = compile_case(AotCase("square", square, {"x": "*bf16", "out": "*fp32"}, {"N": 128}, num_warps=2), 80)
    assert large["spills"] > 0 and large["stack"] > 0


def test_cases_that_do_not_fit_their_kernel() -> None:
    with pytest.raises(ValueError, match=r"scale: arguments missing.*\['factor'\]"):
        compile_case(AotCase("scale", scale, {k: v for k, v in SIGNATURE.items() if k != "factor"}, {"BLOCK": 128}), 90)
    with pytest.raises(ValueError, match=r"\['BLOCK'\]"):
        compile_case(AotCase("scale", scale, SIGNATURE, {"BLOCK": 128}, ("BLOCK",)), 90)
    with pytest.raises(ValueError, match=r"no triton\.jit"):
        compile_case(AotCase("plain", scale.fn, SIGNATURE, {"BLOCK": 128}), 90)


def test_what_must_not_be_is_reported() -> None:
    row = {"name": "k", "capability": 80, "hot": True, "spills": 0, "shared": SHARED_LIMIT[80]}
    assert aot.problems([row, {**row, "hot": False, "spills": 8}]) == []
    assert "spills 8 bytes" in aot.problems([{**row, "spills": 8}])[0]
    assert "the chip has 166912" in aot.problems([{**row, "shared": SHARED_LIMIT[80] + 1}])[0]
    assert aot.problems([{**row, "error": "CompilationError: no"}]) == ["k on sm_80: CompilationError: no"]


def test_a_compile_error_becomes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = AotCase("bad", scale, {**SIGNATURE, "factor": "*fp32"}, {"BLOCK": 100})
    monkeypatch.setattr(aot, "cases", lambda module: {"bad": bad})
    row = aot.compile_job(aot.Job("any", "bad", 90, True, ""))
    assert row["name"] == "bad" and "error" in row
    assert aot.problems([row])
