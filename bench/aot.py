"""`harmony-fast bench aot`: every configuration of every Triton kernel, compiled for GPUs that need not be here.

Prints and writes registers, spills, shared memory and matrix instructions for compute capabilities 8.0, 9.0 and 10.0.
The committed table is bench/results/aot.json, with a part for each version of Triton; a run renews its own part.
A row whose kernel, constants and options are unchanged (`fingerprint`) is taken over, unless --fresh.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from ..kernels.aot import SHARED_LIMIT, AotCase, compile_case, fingerprint
from .machine import RESULTS, versions

MODULES = ("masked_attention_triton", "contrastive_triton", "prototype_ce_triton", "ema_triton")
CAPABILITIES = (80, 90, 100)
COMMITTED = RESULTS / "aot.json"
CONSUMER_LIMIT = SHARED_LIMIT[89]


class Job(NamedTuple):
    """A case by name, for a capability: what can be sent to another process, and what tells whether it changed."""

    module: str
    name: str
    capability: int
    hot: bool
    fingerprint: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile everything; the exit status is 1 if a case failed, spilled on a hot path, or asks for too much."""
    options = _parse(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        print("TRITON_INTERPRET is set: then there is nothing to compile; unset it", file=sys.stderr)
        return 1
    every = list_jobs()
    jobs = [job for job in list_jobs(options.capability) if options.match in job.name]
    known = {} if options.json is None else read(options.json)
    todo = [job for job in jobs if options.fresh or job not in known]
    others = [known[job] for job in every if job in known and job not in jobs]
    rows = [known[job] for job in jobs if job not in todo]
    for done, row in enumerate(run(todo, options.processes), 1):
        rows.append(row)
        if sys.stderr.isatty() or done % 20 == 0 or "error" in row:
            trouble = f": {row['error']}" if "error" in row else ""
            print(f"{done} of {len(todo)}: {row['name']} on sm_{row['capability']}{trouble}", file=sys.stderr)
        if options.json and (done % 20 == 0 or done == len(todo)):
            write(options.json, others + rows)
    rows.sort(key=_place)
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table(rows))
    found = problems(rows)
    for problem in found:
        console.print(problem, style="red", soft_wrap=True)
    return 1 if found else 0


def cases(module: str) -> dict[str, AotCase]:
    """The cases of one of `MODULES`, by name. Raises ValueError if a name is used twice."""
    listed = importlib.import_module(f"harmony_fast.kernels.{module}").aot_cases()
    named = {case.name: case for case in listed}
    if len(named) != len(listed):
        raise ValueError(f"{module}.aot_cases: a name is used twice")
    return named


def list_jobs(capabilities: Sequence[int] = CAPABILITIES) -> list[Job]:
    """All cases for all capabilities."""
    named = [(module, case, fingerprint(case)) for module in MODULES for case in cases(module).values()]
    return [Job(m, case.name, cap, case.hot, mark) for m, case, mark in named for cap in capabilities]


def run(jobs: Sequence[Job], processes: int) -> Iterator[dict[str, Any]]:
    """Compile in several processes; a row per job, as they are done: `compile_case`'s result, or an "error"."""
    # Fresh processes: Triton's compiler is neither safe in threads nor across a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        for future in as_completed([pool.submit(compile_job, job) for job in jobs]):
            yield future.result()


def compile_job(job: Job) -> dict[str, Any]:
    """One row of the table."""
    warnings.filterwarnings("ignore", module="triton")
    case = cases(job.module)[job.name]
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    row = {**job._asdict(), **options}
    try:
        return {**row, **compile_case(case, job.capability)}
    except Exception as error:  # whatever the compiler raises becomes a row that says so
        return {**row, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}


def problems(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What must not be, one line each: errors, spills on a hot path, more shared memory than the chip has."""
    found = []
    for row in rows:
        name, limit = f"{row['name']} on sm_{row['capability']}", SHARED_LIMIT[row["capability"]]
        if "error" in row:
            found.append(f"{name}: {row['error']}")
            continue
        if row["hot"] and row["spills"]:
            found.append(f"{name}: spills {row['spills']} bytes on a hot path")
        if row["shared"] > limit:
            found.append(f"{name}: {row['shared']} bytes of shared memory, the chip has {limit}")
    return found


def read(path: Path) -> dict[Job, dict[str, Any]]:
    """The rows of a table for this version of Triton, by what they were compiled from; failures are left out."""
    import triton

    report = json.loads(path.read_text()) if path.is_file() else {}
    rows = report.get(f"triton {triton.__version__}", {"rows": []})["rows"]
    return {Job(**{key: row[key] for key in Job._fields}): row for row in rows if "error" not in row}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Put the rows into the file as the part of this version of Triton; other parts stay."""
    import triton

    report = json.loads(path.read_text()) if path.is_file() else {}
    report[f"triton {triton.__version__}"] = {"versions": versions(), "rows": sorted(rows, key=_place)}
    lines = [f"{json.dumps(part)}: {_one_row_a_line(report[part])}" for part in sorted(report)]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _place(row: dict[str, Any]) -> tuple[str, int]:
    return row["name"], row["capability"]


def _one_row_a_line(part: dict[str, Any]) -> str:
    """So that a difference between two commits can be read."""
    rows = ",\n".join(f"  {json.dumps(row)}" for row in part["rows"])
    return f'{{"versions": {json.dumps(part["versions"])}, "rows": [\n{rows}\n ]}}'


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """All rows for the terminal."""
    made = Table()
    for heading in ("kernel", "sm", "hot", "warps", "stages", "registers", "spills", "shared", "fits 99 KB", "matrix"):
        made.add_column(heading, justify="left" if heading in ("kernel", "matrix") else "right", no_wrap=True)
    for row in rows:
        start = (row["name"], str(row["capability"]), "x" if row["hot"] else "")
        if "error" in row:
            made.add_row(*start, *[""] * 6, "failed")
            continue
        made.add_row(
            *start, str(row["num_warps"]), str(row["num_stages"]), str(row["registers"]), str(row["spills"] or ""),
            str(row["shared"]), "x" if row["shared"] <= CONSUMER_LIMIT else "",
            " ".join(f"{count} {name}" for name, count in row["tensor_core"].items()),
        )  # fmt: skip
    return made


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="harmony-fast bench aot", description=__doc__.split("\n\n")[1])
    parser.add_argument("--json", type=Path, help=f"write the table here (the committed one: {COMMITTED})")
    parser.add_argument("--fresh", action="store_true", help="compile what is unchanged as well")
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument(
        "--capability", type=int, nargs="+", choices=sorted(SHARED_LIMIT), default=list(CAPABILITIES),
        help="default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
