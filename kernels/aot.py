"""Ahead-of-time compilation of the Triton kernels: what a GPU would run, looked at on a machine without one."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one block may use, by compute capability (CUDA programming guide, technical
specifications per compute capability)."""

# Matrix instructions of Ampere and Ada (HMMA), Hopper (HGMMA) and Blackwell (UTCHMMA): half, bf16 and tf32 operands.
_TENSOR_CORE = re.compile(r"\b(HGMMA|HMMA|UTC[A-Z]*MMA)\b")
_USAGE = {
    "registers": re.compile(r"Used (\d+) registers"),
    "stack": re.compile(r"(\d+) bytes stack frame"),
    "spill_stores": re.compile(r"(\d+) bytes spill stores"),
    "spill_loads": re.compile(r"(\d+) bytes spill loads"),
}


@dataclass(frozen=True)
class AotCase:
    """One way in which a kernel is launched.

    name: unique, e.g. "masked_attention.forward.bf16.d64". kernel: a `triton.jit` function, decorated without
    TRITON_INTERPRET (autotune and heuristics are unwrapped). signature: the type of each argument that is not a
    constexpr, in Triton's words: "*bf16", "*fp32", "*i32", "i32", "fp32". constexprs: the values of the others.
    divisible_by_16: arguments, pointers and integers, that are multiples of 16 where it counts.
    hot: on the path of every training step; then spills are an error.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    divisible_by_16: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    hot: bool = True


def compile_case(case: AotCase, capability: int) -> dict[str, Any]:
    """Compile for a compute capability (80, 90, 100) and say what the code needs.

    Returns registers (per thread), stack, spill_stores, spill_loads, spills (their sum) and shared (bytes),
    tensor_core (instructions by name). Raises ValueError for a case that does not fit its kernel;
    what the compiler raises passes through.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = _jit_function(case)
    source = ASTSource(
        fn=kernel, signature=_full_signature(case, kernel.arg_names), constexprs=dict(case.constexprs),
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in case.divisible_by_16},
    )  # fmt: skip
    log = io.StringIO()
    knobs = triton.knobs
    # A cache of its own: a cubin that is found there would not be assembled again, and nothing would be logged.
    with tempfile.TemporaryDirectory() as cache, knobs.cache.scope(), knobs.nvidia.scope():
        knobs.cache.dir, knobs.nvidia.dump_ptxas_log = cache, True
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(
                source, target=GPUTarget("cuda", capability, 32),
                options={"num_warps": case.num_warps, "num_stages": case.num_stages},
            )  # fmt: skip
    usage = {name: _sum_of(pattern, log.getvalue()) for name, pattern in _USAGE.items()}
    return {
        **usage,
        "spills": usage["spill_stores"] + usage["spill_loads"],
        "shared": compiled.metadata.shared,
        "tensor_core": _tensor_core_instructions(compiled.asm["cubin"], knobs.nvidia.cuobjdump.path),
    }


def fingerprint(case: AotCase) -> str:
    """A hash of everything of ours that the compiled code depends on: sources of the kernel and of the functions that
    it calls, constants, types and options. Raises ValueError as `compile_case`."""
    kernel = _jit_function(case)
    text: list[object] = [_full_signature(case, kernel.arg_names), sorted(case.constexprs.items(), key=str)]
    text += [sorted(case.divisible_by_16), case.num_warps, case.num_stages, *_sources(kernel, set())]
    return hashlib.sha256(repr(text).encode()).hexdigest()[:16]


def _sources(function: Any, seen: set[str]) -> Iterator[str]:
    """Sources of a function and of those of ours that it calls, and the constants that they read."""
    from triton.runtime.jit import JITFunction

    name = f"{function.fn.__module__}.{function.fn.__qualname__}"
    if name in seen or name.startswith("triton."):
        return
    seen.add(name)
    yield inspect.getsource(function.fn)
    names = set(function.fn.__code__.co_names)  # globals, and attributes, which are no globals
    for used in sorted(names & set(function.fn.__globals__)):
        value = function.fn.__globals__[used]
        if isinstance(value, JITFunction):
            yield from _sources(value, seen)
        elif not isinstance(value, (ModuleType, FunctionType)):  # a host function has a parameter's name
            yield f"{used} = {value!r}"


def _jit_function(case: AotCase) -> Any:
    """The kernel below autotune and heuristics."""
    from triton.runtime.jit import JITFunction

    kernel = case.kernel
    while not isinstance(kernel, JITFunction):
        if type(kernel).__name__ == "InterpretedFunction" or not hasattr(kernel, "fn"):
            raise ValueError(f"{case.name}: the kernel was decorated with TRITON_INTERPRET set, or by no triton.jit")
        kernel = kernel.fn
    return kernel


def _full_signature(case: AotCase, names: list[str]) -> dict[str, str]:
    """The type of every argument, in their order."""
    given = {**case.signature, **dict.fromkeys(case.constexprs, "constexpr")}
    if wrong := set(given) ^ set(names) | (set(case.divisible_by_16) - set(case.signature)):
        raise ValueError(f"{case.name}: arguments missing, unknown, or divisible though constexpr: {sorted(wrong)}")
    return {name: given[name] for name in names}


def _sum_of(pattern: re.Pattern[str], log: str) -> int:
    """Over all functions of a kernel: device functions that are not inlined have a line each."""
    found = pattern.findall(log)
    if not found:
        raise ValueError(f"the assembler's log says nothing of '{pattern.pattern}'")
    return sum(map(int, found))


def _tensor_core_instructions(cubin: bytes, cuobjdump: str) -> dict[str, int]:
    """How many matrix instructions the machine code has, by name."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        sass = subprocess.run([cuobjdump, "-sass", str(file)], capture_output=True, text=True, check=True).stdout
    return dict(sorted(Counter(_TENSOR_CORE.findall(sass)).items()))
