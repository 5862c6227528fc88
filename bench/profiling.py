"""Where a step's time goes, by operator or kernel, from torch.profiler; plain data."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

SHOWN = 25
"""Operators or kernels that are named"""
PRODUCTS = ("mm", "bmm", "baddbmm", "conv", "gemm", "dot_product", "linear", "cutlass", "attention", "wgmma", "cublas")
"""Parts of the names of what multiplies matrices"""


def summarise(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """One step, after another one that warms the profiler up.

    On a GPU: milliseconds by kernel, of all kernels, and of the gaps between the first and the last in which none ran.
    On a CPU: milliseconds by operator, its own alone, summed over threads.
    """
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA, ProfilerActivity.CPU] if gpu else [ProfilerActivity.CPU]
    for _ in range(2):
        with profile(activities=activities) as profiler:
            step()
            if gpu:
                torch.cuda.synchronize(device)
    return _kernels(profiler) if gpu else _operators(profiler)


def _operators(profiler: profile) -> dict[str, Any]:
    time: defaultdict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    for event in profiler.key_averages():
        time[event.key] += event.self_cpu_time_total / 1e3
        calls[event.key] += event.count
    return _summary(time, calls)


def _kernels(profiler: profile) -> dict[str, Any]:
    time: defaultdict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    spans = []
    for event in profiler.events():
        # Ranges that code has named (the optimizer's step, a compiled graph) are drawn over the kernels in them.
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            span = event.time_range
            time[event.name] += (span.end - span.start) / 1e3
            calls[event.name] += 1
            spans.append((span.start, span.end))
    return _summary(time, calls) | {"gaps_ms": gaps(spans) / 1e3}


def _summary(time: dict[str, float], calls: dict[str, int]) -> dict[str, Any]:
    total = sum(time.values())
    products = sum(t for name, t in time.items() if any(p in name.lower() for p in PRODUCTS))
    longest = sorted(time.items(), key=lambda item: item[1], reverse=True)[:SHOWN]
    top = [{"name": n[:100], "milliseconds": t, "calls": calls[n]} for n, t in longest]
    return {"total_ms": total, "products_ms": products, "top": top}


def gaps(spans: list[tuple[float, float]]) -> float:
    """Time between the first start and the last end that no span covers."""
    idle, end = 0.0, min((start for start, _ in spans), default=0.0)
    for start, stop in sorted(spans):
        idle += max(0.0, start - end)
        end = max(end, stop)
    return idle
