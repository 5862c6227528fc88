"""One operation against what a user would pick instead: first whether it is right, then how fast and how large."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .timing import alternate, peak_memory, release

OURS = "harmony-fast"
TOLERANCE_OF_RIVALS = 0.05
"""A rival that is further off computes something else."""
UNCHECKED = "reference: out of memory"
"""Why nobody is timed where there is nothing to check against"""
Result = tuple[Tensor | None, ...]


@dataclass
class Comparison:
    """A case of an operation.

    operation, case: what is compared, and its sizes in words. inputs: draws fresh random inputs. rivals: by name,
    functions of the inputs that return the output and the gradients (None: not to be checked); OURS among them.
    reference: the same in fp64.
    tolerance: largest relative error, |x - reference| / |reference| in the 2-norm of each tensor, that is right.
    Rivals must come within TOLERANCE_OF_RIVALS at least. unavailable: rivals that this machine cannot run, and why.
    bytes_moved: for operations bound by memory bandwidth. yardsticks: timed with the others, not rivals.
    """

    operation: str
    case: str
    inputs: Callable[[], tuple]
    rivals: dict[str, Callable[..., Result]]
    reference: Callable[..., tuple[Tensor, ...]]
    tolerance: float
    unavailable: dict[str, str] = field(default_factory=dict)
    bytes_moved: int | None = None
    yardsticks: dict[str, Callable[..., Result]] = field(default_factory=dict)


def compare(comparison: Comparison, device: torch.device, *, seed: int, seconds: float) -> dict[str, Any]:
    """Errors, then times and memory, as plain data. A rival that fails, is wrong or cannot be checked is named, and not
    timed.

    The result's keys: operation, case, tolerance, right and repeatable (ours: within tolerance; the same bits twice),
    results by rival (milliseconds, quartiles, samples, peak_mib, relative_error, gigabytes_per_second),
    not_run by rival, speedup (the best baseline's time through ours).
    """
    failed = dict(comparison.unavailable)
    errors: dict[str, float] = {}
    torch.manual_seed(seed)
    expected: tuple[Tensor, ...] = ()
    try:
        expected = comparison.reference(*comparison.inputs())
    except torch.OutOfMemoryError:
        failed |= dict.fromkeys(comparison.rivals, UNCHECKED)
    for name in [name for name in comparison.rivals if name not in failed]:
        torch.manual_seed(seed)
        problem, error = _check(comparison, name, expected)
        release(device)
        if error is not None:
            errors[name] = error
        if problem:
            failed[name] = problem
    del expected
    release(device)
    results = _time(comparison, [name for name in comparison.rivals if name not in failed], errors, device, seconds)
    baselines = [r["milliseconds"] for n, r in results.items() if n in comparison.rivals and n != OURS]
    return {
        "operation": comparison.operation, "case": comparison.case, "tolerance": comparison.tolerance,
        "right": OURS in results, "repeatable": OURS in results and _repeatable(comparison, seed), "results": results,
        "not_run": failed,
        "speedup": min(baselines) / results[OURS]["milliseconds"] if OURS in results and baselines else None,
    }  # fmt: skip


def _time(
    comparison: Comparison, sound: list[str], errors: dict[str, float], device: torch.device, seconds: float
) -> dict[str, dict[str, Any]]:
    """Time and memory of the rivals that are right, and of the yardsticks; nothing if none is right."""
    if not sound:
        return {}
    inputs = comparison.inputs()
    rivals = {name: comparison.rivals[name] for name in sound} | comparison.yardsticks
    work = {name: partial(rival, *inputs) for name, rival in rivals.items()}
    results: dict[str, dict[str, Any]] = {}
    for name, timing in alternate(work, device, seconds=seconds).items():
        results[name] = {
            "milliseconds": timing.median, "quartiles": [timing.low, timing.high], "samples": timing.samples,
            "peak_mib": peak_memory(work[name], device), "relative_error": errors.get(name),
        }  # fmt: skip
        if comparison.bytes_moved:
            results[name]["gigabytes_per_second"] = comparison.bytes_moved / timing.median / 1e6
    return results


def _repeatable(comparison: Comparison, seed: int) -> bool:
    """Whether ours gives the same bits twice."""
    runs = []
    for _ in range(2):
        torch.manual_seed(seed)
        runs.append(comparison.rivals[OURS](*comparison.inputs()))
    return all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def _check(comparison: Comparison, name: str, expected: tuple[Tensor, ...]) -> tuple[str | None, float | None]:
    """(what is wrong, or None; the largest relative error) of a rival on inputs of its own, drawn as `expected`'s."""
    inputs = comparison.inputs()
    try:
        # Baselines may be compiled, and determinism would compile them anew: only our own memory is poisoned.
        with poisoned(name == OURS):
            found = comparison.rivals[name](*inputs)
        error = max(relative_error(x, e) for x, e in zip(found, expected, strict=True) if x is not None)
    except torch.OutOfMemoryError:
        return "out of memory", None
    except Exception as problem:  # a rival may fail in any way; the others go on
        return f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}", None
    allowed = comparison.tolerance if name == OURS else max(comparison.tolerance, TOLERANCE_OF_RIVALS)
    return (None if error <= allowed else f"wrong: relative error {error:.2e}"), error


def relative_error(x: Tensor, expected: Tensor) -> float:
    """|x - expected| / |expected| in the 2-norm; infinite where x is not finite."""
    expected = expected.double()
    error = float((x.double() - expected).norm() / expected.norm().clamp_min(1e-30))
    return error if error == error else float("inf")


@contextmanager
def poisoned(on: bool) -> Iterator[None]:
    """Fill all memory that torch hands out uninitialised with NaN, so that what a kernel forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(on or before, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=True)


def gradients(output: Tensor, *inputs: Tensor, of: Tensor | None = None) -> tuple[Tensor, ...]:
    """(output, gradients to inputs); `of` is the gradient of the output, left out for a scalar."""
    return output.detach(), *torch.autograd.grad(output, inputs, of)
