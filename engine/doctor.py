"""`harmony-fast doctor`: what this machine has, which backend each kernel will use and why, and whether it is right."""

from __future__ import annotations

import contextlib
import ctypes.util
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from rich.console import Console
from rich.text import Text

from ..kernels.dispatch import half_products
from .doctor_kernels import Check, check_kernels
from .host_memory import host_memory
from .sizes import GIB

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

OPTIONAL = {
    "xformers": "only for kernels.attention=xformers: pip install xformers",
}
LIBRARIES = {"opencv_imgproc": "libopencv-dev", "turbojpeg": "libturbojpeg0-dev"}
COLOURS = {"ok": "green", "missing": "yellow", "broken": "bold red"}


class Finding(NamedTuple):
    """state: ok; missing, if runs can do without; broken, if they cannot. cure: what to do, or empty."""

    topic: str
    name: str
    state: str
    detail: str
    cure: str = ""


def run(as_json: bool) -> int:
    """Examine, print as it goes (or plain data at the end); the exit status is 1 if something required is broken."""
    console = Console(highlight=False)
    findings, checks = [], []
    for finding in examine():
        findings.append(finding)
        if not as_json:
            _print_finding(console, finding, new_topic=len(findings) < 2 or findings[-2].topic != finding.topic)
    try:
        for check in check_kernels():
            checks.append(check)
            if not as_json:
                _print_check(console, check, new_device=len(checks) < 2 or checks[-2].device != check.device)
    except ValueError as refusal:  # HARMONY_FAST_KERNELS asks for what cannot be
        findings.append(
            Finding("kernels", "dispatcher", "broken", str(refusal), "change or unset HARMONY_FAST_KERNELS")
        )
        if not as_json:
            _print_finding(console, findings[-1], new_topic=True)
    broken = any(f.state == "broken" for f in findings) or any(c.problem for c in checks)
    if as_json:
        data = {"ok": not broken, "findings": [f._asdict() for f in findings], "kernels": [c._asdict() for c in checks]}
        print(json.dumps(data, indent=1))
    elif broken:
        console.print("\nsomething that runs need is broken; see above", style=COLOURS["broken"])
    return 1 if broken else 0


def examine() -> Iterator[Finding]:
    """Everything but the kernels, topic by topic."""
    for look in (_system, _processor, _gpus, _packages, _libraries, _tools):
        yield from look()


def _system() -> Iterator[Finding]:
    version = sys.version_info
    known = (3, 10) <= version[:2] <= (3, 12)
    yield Finding("system", "python", "ok", platform.python_version() + ("" if known else ", tried are 3.10 to 3.12"))
    yield Finding("system", "memory", "ok", f"{host_memory() / GIB:.0f} GiB")
    for name, folder, enough, cure in (
        ("disk", Path.cwd(), 5, "free some space, or set run_dir and data.train to another disk"),
        ("shared memory", Path("/dev/shm"), 0.5, "in a container: --shm-size=8g or --ipc=host"),
    ):
        if folder.is_dir():
            free = shutil.disk_usage(folder).free / GIB
            state, cure = ("ok", "") if free >= enough else ("missing", cure)
            yield Finding("system", name, state, f"{free:.1f} GiB free in {folder}", cure)


def _processor() -> Iterator[Finding]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    pairs = (line.partition(":") for line in lines if ":" in line)
    fields = {name.strip(): value.strip() for name, _, value in pairs}
    flags = fields.get("flags", fields.get("Features", "")).split()
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "avx512_fp16", "asimd") if flag in flags]
    cores = len(os.sched_getaffinity(0))
    name = fields.get("model name", platform.processor() or platform.machine())
    yield Finding(
        "processor", "cores", "ok", f"{cores} usable, {name}; {' '.join(known) or 'no vector extensions known'}"
    )
    native = half_products(torch.bfloat16)
    yield Finding(
        "processor", "bf16", "ok" if native else "missing",
        "multiplies in bf16" if native else "no bf16 instructions: products run in fp32",
        "" if native else "on this CPU train with precision=fp32",
    )  # fmt: skip


def _gpus() -> Iterator[Finding]:
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield _gpu(index)
        return
    if torch.version.cuda is None and torch.version.hip is None:
        cure = "this torch is built for the CPU; for a GPU install torch from PyPI, or the build for your system"
    elif shutil.which("nvidia-smi"):
        driver = _output(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]) or "none answers"
        cure = f"the driver says: {driver}; torch needs one for CUDA {torch.version.cuda}"
    else:
        cure = "for training on a GPU install its driver"
    yield Finding("GPU", "cuda", "missing", "none that torch can use; everything runs on the CPU", cure)


def _gpu(index: int) -> Finding:
    try:
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:  # in use by somebody who shares it with nobody, out of memory, out of order
        reason = " ".join(str(error).split())[:200]
        return Finding("GPU", f"cuda:{index}", "broken", reason, "see nvidia-smi; CUDA_VISIBLE_DEVICES leaves it out")
    detail = f"{properties.name}, capability {properties.major}.{properties.minor}, "
    return Finding("GPU", f"cuda:{index}", "ok", f"{detail}{free / GIB:.1f} of {total / GIB:.1f} GiB free")


def _packages() -> Iterator[Finding]:
    """The project's requirements: there, of a known version, and importable."""
    from packaging.requirements import Requirement

    modules = {name.lower().replace("-", "_"): tops for name, tops in _top_modules().items()}
    for text in importlib.metadata.requires("harmony-fast") or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            name = requirement.name
            yield _package(name, requirement.specifier, modules.get(name.lower().replace("-", "_"), []))
    for name, purpose in OPTIONAL.items():
        finding = _package(name, None, [name])
        yield finding if finding.state == "ok" else finding._replace(state="missing", cure=purpose)


def _top_modules() -> dict[str, list[str]]:
    """Distribution name to the modules it brings."""
    brought: dict[str, list[str]] = {}
    for module, names in importlib.metadata.packages_distributions().items():
        for name in names:
            brought.setdefault(name, []).append(module)
    return brought


def _package(name: str, wanted: SpecifierSet | None, modules: list[str]) -> Finding:
    cure = f"pip install '{name}{wanted or ''}'"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding("packages", name, "broken", "not installed", cure)
    if wanted is not None and not wanted.contains(version, prereleases=True):
        return Finding("packages", name, "broken", f"{version}, wanted is {wanted}", cure)
    for module in modules:
        if module.startswith("_") or not importlib.util.find_spec(module):
            continue
        try:
            # What libraries print when they are imported must not get into --json.
            with contextlib.redirect_stdout(sys.stderr):
                importlib.import_module(module)
        except Exception as error:  # an import may fail in any way; it is reported
            return Finding("packages", name, "broken", f"{version}: {type(error).__name__}: {error}", cure)
    return Finding("packages", name, "ok", version)


def _libraries() -> Iterator[Finding]:
    """What ffcv is built with, and loads."""
    for library, package in LIBRARIES.items():
        found = ctypes.util.find_library(library)
        yield (
            Finding("libraries", library, "ok", found)
            if found
            else Finding("libraries", library, "missing", "not found; ffcv needs it", f"apt-get install {package}")
        )


def _tools() -> Iterator[Finding]:
    for tool, purpose in (
        ("c++", "builds ffcv: apt-get install g++"),
        ("nvcc", "only for DeepSpeed's CUDA operators, which the default settings do not use"),
    ):
        found = shutil.which(tool, path=os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)]))
        yield Finding("tools", tool, "ok" if found else "missing", found or "not found", "" if found else purpose)


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip().replace("\n", ", ")
    except (OSError, subprocess.SubprocessError):
        return ""


def _print_finding(console: Console, finding: Finding, new_topic: bool) -> None:
    if new_topic:
        console.print(f"\n{finding.topic}", style="bold")
    _print_line(console, finding.state, finding.name, finding.detail, finding.cure)


def _print_check(console: Console, check: Check, new_device: bool) -> None:
    if new_device:
        console.print(f"\nkernels on {check.device}, checked in {check.dtype}", style="bold")
    found = f"relative error {check.error:.0e}" if check.problem is None else check.problem
    state = "ok" if check.problem is None else "broken"
    _print_line(console, state, check.operation, f"{check.backend}, because {check.reason}; {found}", "")


def _print_line(console: Console, state: str, name: str, detail: str, cure: str) -> None:
    advice = (f"  -> {cure}", "dim") if cure else ""
    line = Text.assemble("  ", (f"{state:8}", COLOURS[state]), f"{name:16}{detail}", advice)
    console.print(line, soft_wrap=True)
