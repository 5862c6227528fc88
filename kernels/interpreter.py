"""Repairs of Triton's interpreter, which runs the kernels on CPU tensors where TRITON_INTERPRET=1.

Three faults of Triton 3.6 to 3.9 are mended:
1. bfloat16 is wrong without a word: the interpreter keeps it as uint16 and multiplies, adds and compares the raw bits;
   conversions cut off instead of rounding to nearest even. Here operands are raised to fp32 and results rounded.
2. Triton reads the variable when it is imported and when a function is decorated. Any library may import Triton first
   (timm does), and then its own functions, `tl.sum` among them, refuse to be called. Here it is read at each launch.
3. Each call of a device function replaces `triton.language` anew, slowly, and never puts it back.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

_done = False


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def install() -> None:
    """Repair the interpreter of this process, once. Nothing changes for kernels compiled for a GPU."""
    global _done
    if _done or importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter, jit

    _repair_bfloat16(interpreter)
    _repair_language_scope(interpreter)
    _read_variable_at_launch(interpreter, jit)
    _done = True


def to_float(bits: np.ndarray) -> np.ndarray:
    """bf16 as uint16, any shape, to the fp32 of the same value."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: np.ndarray, round_to_zero: bool = False) -> np.ndarray:
    """Numbers of any shape to bf16 as uint16, rounded to nearest even; NaN stays NaN."""
    values = np.asarray(values)
    with np.errstate(over="ignore"):
        bits = np.ascontiguousarray(values.astype(np.float32)).view(np.uint32).reshape(values.shape)
    carry = np.uint32(0) if round_to_zero else np.uint32(0x7FFF) + ((bits >> 16) & 1)
    rounded = ((bits + carry) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _repair_bfloat16(interpreter: Any) -> None:
    """Arithmetic, conversion and reduction of bf16 in fp32."""
    import triton.language as tl

    Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def is_bf16(handle: Any) -> bool:
        return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16

    def raised(handle: Any) -> Any:
        return Handle(to_float(handle.data), tl.float32) if is_bf16(handle) else handle

    def lowered(handle: Any) -> Any:
        if handle.data.dtype == np.bool_:
            return Handle(handle.data, tl.int1)
        return Handle(to_bfloat16(handle.data), tl.bfloat16)

    def in_float(name: str) -> None:
        """Make a method of the builder work on raised operands, and round its result where all of them were bf16."""
        original = getattr(Builder, name)

        def method(self: Any, *arguments: Any) -> Any:
            handles = [a for a in arguments if isinstance(a, Handle)]
            if not any(map(is_bf16, handles)):
                return original(self, *arguments)
            result = original(self, *[raised(a) if isinstance(a, Handle) else a for a in arguments])
            return lowered(result) if is_bf16(handles[-1]) else result

        setattr(Builder, name, method)

    for name in ("binary_op", "unary_op", "ternary_op", "create_fma", "create_dot"):
        in_float(name)

    original_cast = Builder.cast_impl

    def cast(self: Any, source: Any, to: Any, round_to_zero: bool = False) -> Any:
        if to.scalar == tl.bfloat16 and source.dtype.scalar != tl.bfloat16:
            return Handle(to_bfloat16(source.data, round_to_zero), tl.bfloat16)
        return original_cast(self, raised(source), to) if to.scalar != tl.bfloat16 else source

    def convert(self: Any, source: Any, to: Any, rounding: Any) -> Any:
        pair = {source.dtype.scalar, to.scalar}
        if tl.bfloat16 in pair and pair <= {tl.bfloat16, tl.float16, tl.float32, tl.float64}:
            return cast(self, source, to, rounding == interpreter._ir.ROUNDING_MODE.RTZ)
        return original_convert(self, source, to, rounding)

    def touches_bf16(source: Any, to: Any) -> bool:
        return tl.bfloat16 in (source.dtype.scalar, to.scalar)

    original_convert = Builder.create_fp_to_fp
    Builder.cast_impl = lambda self, source, to: (cast if touches_bf16(source, to) else original_cast)(self, source, to)
    Builder.create_fp_to_fp = convert
    Builder.get_bf16 = lambda self, value: Handle(to_bfloat16(np.array([value])), tl.bfloat16)
    for reducer in (interpreter.ReduceOps, interpreter.ScanOps):
        _reduce_in_float(reducer, tl, raised, lowered)


def _reduce_in_float(reducer: Any, tl: Any, raised: Callable[[Any], Any], lowered: Callable[[Any], Any]) -> None:
    """Reductions and scans of bf16 tensors: in fp32, rounded at the end."""
    original = reducer.apply_impl

    def retyped(kind: Any, dtype: Any) -> Any:
        return tl.core.block_type(dtype, list(kind.shape)) if kind.is_block() else dtype

    def floated(x: Any) -> Any:
        return tl.core.tensor(raised(x.handle), retyped(x.type, tl.float32)) if x.dtype == tl.bfloat16 else x

    def apply_impl(self: Any, inputs: tuple) -> Any:
        if not any(x.dtype == tl.bfloat16 for x in inputs):
            return original(self, inputs)
        result = original(self, tuple(floated(x) for x in inputs))
        listed = result if isinstance(result, (list, tuple)) else [result]
        # An index, as of argmax, is no number to round.
        return [
            tl.core.tensor(lowered(r.handle), retyped(r.type, tl.bfloat16)) if r.dtype == tl.float32 else r
            for r in listed
        ]

    reducer.apply_impl = apply_impl


def _repair_language_scope(interpreter: Any) -> None:
    """Replace `triton.language` once a launch, wholly, and put it back; device functions find it replaced."""
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    original = interpreter._patch_lang
    whole = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def bound(function: Any) -> Any:
        return lambda *arguments, **options: function(*arguments, **options)

    def patch_language(_function: Any) -> Any:
        scope = original(whole)
        # Methods such as x.sum(0): a JITFunction as a class attribute would not receive x.
        for name, member in list(vars(tl.tensor).items()):
            if isinstance(member, JITFunction):
                scope.set_attr(tl.tensor, name, bound(member))
        # numpy 2.4 refuses int() of an array with one dimension, which Triton 3.6 asks for.
        scope.set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.item()))
        return scope

    interpreter._patch_lang = patch_language
    interpreter.InterpretedFunction.__call__ = lambda self, *arguments, **options: self.rewrite()(*arguments, **options)


def _read_variable_at_launch(interpreter: Any, jit: Any) -> None:
    """Let functions that were decorated without the variable run interpreted where it is set now."""
    original_run, original_call = jit.JITFunction.run, jit.JITFunction.__call__
    twins: dict[Any, Any] = {}

    def twin(function: Any) -> Any:
        # By the plain function: the hash of a JITFunction is that of its source and all it refers to.
        if function.fn not in twins:
            twins[function.fn] = interpreter.InterpretedFunction(function.fn)
        return twins[function.fn]

    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        return twin(self).run(*arguments, **options) if interpreting() else original_run(self, *arguments, **options)

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        return twin(self)(*arguments, **options) if interpreting() else original_call(self, *arguments, **options)

    jit.JITFunction.run, jit.JITFunction.__call__ = run, call
