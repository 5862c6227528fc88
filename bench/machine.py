"""What a benchmark ran on: processor, GPU, versions, commit and date; and where its results are kept."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from ..kernels.dispatch import half_products

ROOT = Path(__file__).resolve().parents[1]
RESULTS = (ROOT / "bench" if (ROOT / "pyproject.toml").is_file() else Path("bench")) / "results"
"""Of the checkout; where the package is installed without one, of the working folder"""
PACKAGES = ("triton", "deepspeed", "xformers", "liger_kernel", "inf_cl", "flash_attn")


def describe_machine() -> dict[str, Any]:
    """Everything that a reader needs to judge a number; plain data for JSON."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit(),
        "system": platform.platform(terse=True),
        "processor": processor(),
        "instructions": instructions(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": describe_gpu(),
        "versions": versions(),
    }


def describe_gpu() -> dict[str, Any] | None:
    """The current GPU, or None."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties()
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "driver": _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "clocks_mhz": _first_line(["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader"]),
    }


def versions() -> dict[str, str]:
    """Of Python, CUDA and the installed packages that matter to a kernel."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda or "none"}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine_name() -> str:
    """A folder name: "nvidia-h200", "cpu-2-cores", "cpu-2-cores-bf16" where the processor multiplies in bf16."""
    if torch.cuda.is_available():
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return f"cpu-{usable_cores()}-cores" + ("-bf16" if half_products(torch.bfloat16) else "")


def caption(report: dict[str, Any]) -> str:
    """Above a picture: what computed (`device`, where a report has one), torch's version, when."""
    machine, cuda = report["machine"], report.get("device") == "cuda"
    name = machine["gpu"]["name"] if cuda else f"{machine['processor']}, {machine['cores']} cores"
    return f"{name}; torch {machine['versions']['torch']}; {machine['date']}"


def results_folder() -> Path:
    """The folder of this machine's results."""
    return RESULTS / machine_name()


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The processor's name, as far as the system gives it away."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def instructions() -> str:
    """What PyTorch uses of the processor's vector instructions: "AVX2", "AVX512 with bf16"."""
    with_bf16 = " with bf16" if half_products(torch.bfloat16) else ""
    return torch.backends.cpu.get_cpu_capability() + with_bf16


def commit() -> str:
    """The commit of the checkout, with "+" where files differ from it; "unknown" without one."""
    revision = _first_line(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"])
    if not revision:
        return "unknown"
    changed = _first_line(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return revision + ("+" if changed else "")


def _first_line(command: list[str]) -> str:
    """Of a command's output; empty if it fails."""
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return output.strip().partition("\n")[0]
