"""Change one thing at a time in harmony/ and kernels/, and see whether a test fails: `python scripts/mutants.py -h`.

A copy of the project is changed, never the project. Every mutant is tried in a fork of this process, which has PyTorch
imported already, by the tests that concern its file, and one of harmony/ that survives them by more. Its outcome is the
test that caught it, or "survived". In the file of `--json`, write "equivalent: why" if it makes no difference.

Left out are what no test should hold: annotations, decorators, messages of errors, tiles and other settings of speed,
and the lists of what is compiled ahead of time, which `bench aot` checks.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
FOLDERS = ("harmony", "kernels")
WARM = ("torch._dynamo", "torch._inductor.compile_fx", "triton.language", "open_clip", "timm", "deepspeed",
        "hypothesis", "pytest", "sklearn", "typer", "safetensors.torch")  # fmt: skip
MEMORY = 8 * 2**30
"""Bytes that a mutant may take: one that asks for more is caught."""

TESTS = {
    "kernels/_attention": "masked_attention", "kernels/masked_attention": "masked_attention",
    "kernels/contrastive": "contrastive", "kernels/prototype_ce": "prototype_ce",
    "kernels/products": "prototype_ce contrastive", "kernels/ema": "ema", "kernels/flops": "flops",
    "kernels/interpreter": "interpreter ema", "kernels/aot": "aot", "kernels/__init__": "interpreter",
    "kernels/": "dispatch ema",
    "harmony/views": "views", "harmony/randomness": "views", "harmony/image_encoder": "encoders reads",
    "harmony/text_encoder": "encoders", "harmony/packing": "encoders",
    "harmony/feature_pyramid": "feature_pyramid", "harmony/stochastic_depth": "stochastic_depth",
    "harmony/objectives/scfs": "scfs", "harmony/": "model reference_compat",
}  # fmt: skip
"""What is asked first, by the beginning of a file's path."""
LATER = [
    "tests/engine/test_config.py", "tests/test_docs.py", "tests/harmony",
    "--deselect=tests/harmony/test_parity.py::test_every_quantity_of_the_reference_files[split]",
    "--deselect=tests/harmony/test_parity.py::test_a_wrong_number_and_an_unknown_quantity_are_failures",
    "--deselect=tests/harmony/test_recipes.py::test_two_steps_of_a_recipe",
]  # fmt: skip
"""What is asked about those of harmony/ that survive."""

SPEED = {"BLOCK", "WARPS", "_CHUNK", "_LARGE_CHUNK", "ONE_PIECE", "TORCH_TILE", "TRITON_TILE", "TILES", "TUNING",
         "_NARROW", "_ONE_BLOCK", "FULL", "COMBINED", "_DENSE_BACKWARD", "backward_before_hopper", "num_warps",
         "num_stages"}  # fmt: skip
"""Constants and keywords that change how fast a result is there."""
OPERATORS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}  # fmt: skip
PAIRS = [("min", "max"), ("amin", "amax"), ("argmin", "argmax"), ("minimum", "maximum"), ("any", "all")]
NAMES = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}


class Mutant(NamedTuple):
    """One change of a file: `before`, at a byte of the text, becomes `after`."""

    file: str
    line: int
    column: int
    at: int
    before: str
    after: str

    def __str__(self) -> str:
        """In one line."""
        return f"{self.file}:{self.line}:{self.column} {' '.join(self.before.split())} -> {self.after}"

    def apply(self, text: str) -> str:
        """The changed text."""
        raw, before = text.encode(), self.before.encode()
        return (raw[: self.at] + self.after.encode() + raw[self.at + len(before) :]).decode()


def changed(node: ast.AST, **fields: object) -> Any:
    """A copy of a node with other fields."""
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


def variants(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Changes at a node: what is replaced, and by what."""
    match node:
        case ast.Compare(ops=[operator]) if type(operator) in OPERATORS:
            yield node, changed(node, ops=[OPERATORS[type(operator)]()])
        case ast.BinOp() | ast.BoolOp() | ast.AugAssign() if type(node.op) in OPERATORS:
            yield node, changed(node, op=OPERATORS[type(node.op)]())
        case ast.UnaryOp():
            yield node, node.operand
        case ast.Constant(value=bool() as value):
            yield node, ast.Constant(not value)
        case ast.Constant(value=int() | float() as value):
            yield from ((node, ast.Constant(other)) for other in (value + 1, value - 1))
        case ast.Return(value=ast.expr()) if getattr(node.value, "value", ...) is not None:
            yield node, ast.Return(ast.Constant(None))
        case ast.Expr(value=ast.Call()):
            yield node, ast.Pass()
        case ast.Call(func=ast.Name(id=name)) if name in NAMES:
            yield node.func, ast.Name(NAMES[name])
        case ast.Call(func=ast.Attribute(attr=name)) if name in NAMES:
            yield node.func, changed(node.func, attr=NAMES[name])
        case ast.Call(func=function, args=[ast.Name() as a, ast.Name() as b, *rest]) if (
            ast.unparse(function) != "isinstance"
        ):
            yield node, changed(node, args=[b, a, *rest])
    if isinstance(node, (ast.If, ast.IfExp, ast.While)) and not isinstance(node.test, (ast.UnaryOp, ast.Compare)):
        yield node.test, ast.UnaryOp(ast.Not(), node.test)
    if isinstance(node, ast.AugAssign):
        yield node, ast.Pass()


def left_out(node: ast.AST) -> bool:
    """Whether nothing below a node is changed."""
    match node:
        case ast.Raise() | ast.JoinedStr() | ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
        case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)) | ast.keyword(arg=name):
            return name in SPEED
        case ast.FunctionDef(name=name, returns=returns):
            return name in ("__repr__", "__str__") or (returns is not None and "AotCase" in ast.unparse(returns))
    return False


def mutants(file: str, text: str) -> list[Mutant]:
    """All mutants of a file."""
    starts, found = [0], []
    for line in text.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def visit(node: ast.AST) -> None:
        if left_out(node):
            return
        for old, new in variants(node):
            at, end = starts[old.lineno - 1] + old.col_offset, starts[old.end_lineno - 1] + old.end_col_offset
            after = ast.unparse(ast.fix_missing_locations(new))
            after = after if isinstance(new, (ast.stmt, ast.Constant, ast.Name)) else f"({after})"
            found.append(Mutant(file, old.lineno, old.col_offset + 1, at, text.encode()[at:end].decode(), after))
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns", "decorator_list"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        visit(child)

    visit(ast.parse(text))
    return found


def draw(every: dict[str, list[Mutant]], count: int, seed: int) -> list[Mutant]:
    """About `count` of them, from each file by the number of its own, at least one."""
    chance, total = random.Random(seed), sum(map(len, every.values()))
    return [m for own in every.values() if own for m in chance.sample(own, max(1, round(count * len(own) / total)))]


def stages(file: str) -> list[list[str]]:
    """What pytest is asked to run for a file, in this order."""
    folder = file.partition("/")[0]
    names = next(names for start, names in TESTS.items() if file.startswith(start)).split()
    return [[f"tests/{folder}/test_{name}.py" for name in names], *[LATER] * (folder == "harmony")]


def outcome(tree: Path, tests: list[str], seconds: float) -> str:
    """What the tests say in a fork: "survived", or what caught it; more than so many seconds catch it too."""
    report, end, status = tree / "report.txt", time.monotonic() + seconds, None
    if not (pid := os.fork()):
        os.setsid()
        file = sys.stdout = sys.stderr = report.open("w")
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        os.chdir(tree)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        import pytest

        options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
        code = pytest.main([*options, "--hypothesis-profile=first-failure", *tests])
        file.flush()
        os._exit(code)
    try:
        while status is None and time.monotonic() < end:
            time.sleep(0.05)
            ended, code = os.waitpid(pid, os.WNOHANG)
            status = code if ended else None
    finally:
        if status is None:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    if status == 0:
        return "survived"
    if status is None:
        return "time is over"
    found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", report.read_text(errors="replace"), re.MULTILINE)
    return found[1] if found else "its process died"


def copy_project(tree: Path) -> None:
    """Copy the project to `tree`; forks and their children import it from there."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(lambda name: (ROOT / name).is_file(), listed):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    package = tree / "build" / "types" / "harmony_fast"
    package.mkdir(parents=True)
    for entry in ("harmony_fast/__init__.py", "kernels", "harmony", "engine", "bench", "configs", "demo"):
        (package / Path(entry).name).symlink_to(tree / entry)
    sys.path.insert(0, str(package.parent))
    sys.dont_write_bytecode = True  # a changed file of the same second and size would not be read again
    os.environ |= {"PYTHONPATH": str(package.parent), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}


class Trial:
    """A copy of the project in which mutants are tried."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        self.seconds: dict[tuple[str, ...], float] = {}
        """That tests may take, three times what they took without a change"""

    def judge(self, mutant: Mutant, quick: bool) -> str:
        """The `outcome` of a mutant; quick: by the first stage alone. Raises SystemExit if tests fail without it."""
        path = self.tree / mutant.file
        text = path.read_text()
        for tests in stages(mutant.file)[: 1 if quick else None]:
            key = tuple(sorted(tests))
            if key not in self.seconds:
                start = time.monotonic()
                if (found := outcome(self.tree, tests, 1200)) != "survived":
                    raise SystemExit(f"without a change: {found}, {' '.join(tests)}")
                self.seconds[key] = 30 + 3 * (time.monotonic() - start)
            path.write_text(mutant.apply(text))
            found = outcome(self.tree, tests, self.seconds[key])
            path.write_text(text)
            if found != "survived":
                return found
        return "survived"


def shares(outcomes: dict[str, str]) -> dict[str, dict[str, float]]:
    """How many mutants of each folder were caught, and what share of those that are mistakes."""
    found = {}
    for folder in FOLDERS:
        own = [outcome for key, outcome in outcomes.items() if key.startswith(folder)]
        same = sum(outcome.startswith("equivalent") for outcome in own)
        caught = len(own) - same - own.count("survived")
        share = round(caught / max(1, len(own) - same), 3)
        found[folder] = {"mutants": len(own), "equivalent": same, "caught": caught, "share": share}
    return found


def main() -> None:
    """Draw mutants, try them one after the other, print what becomes of each, and write a summary."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="*", help="harmony/views.py, or with a line, harmony/views.py:120: default all")
    parser.add_argument("--count", type=int, default=160, help="how many mutants, about (default 160)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="ask the tests of the file alone")
    parser.add_argument("--json", type=Path, help="where outcomes go; what it says was caught is not tried again")
    given = parser.parse_args()
    paths = sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    every = {file: mutants(file, (ROOT / file).read_text()) for file in paths}
    known = json.loads(given.json.read_text())["mutants"] if given.json and given.json.exists() else {}
    outcomes = {name: known[name] for own in every.values() for name in map(str, own) if name in known}
    if given.files:
        every = {f: [m for m in own if {f, f"{f}:{m.line}"} & set(given.files)] for f, own in every.items()}
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # the copy is removed
    for name in WARM:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        copy_project(Path(folder))
        trial = Trial(Path(folder))
        for mutant in draw(every, given.count, given.seed):
            name = str(mutant)
            if outcomes.get(name, "survived") == "survived":
                outcomes[name] = trial.judge(mutant, given.quick)
                print(f"{name}\n    {outcomes[name]}", flush=True)
            if given.json:
                kept = {"date": str(date.today()), "commit": commit, "folders": shares(outcomes), "mutants": outcomes}
                given.json.write_text(json.dumps(kept, indent=1) + "\n")
    print(json.dumps(shares(outcomes), indent=1))


if __name__ == "__main__":
    main()
