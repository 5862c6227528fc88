"""The package list against the folders, the import rule, and what is committed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAY_IMPORT = {
    "kernels": set(),
    "harmony": {"kernels"},
    "engine": {"kernels", "harmony", "configs"},
    "bench": {"kernels", "harmony", "engine", "configs"},
}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The parts of the project (kernels, harmony, engine, bench) that a file imports, however it is written."""
    package = ["harmony_fast", *path.relative_to(ROOT).parent.parts]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names |= {".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("harmony_fast.")}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_go_one_way(folder: str) -> None:
    for path in sources(folder):
        assert imported(path) - {folder} <= MAY_IMPORT[folder], path


def test_every_package_is_listed() -> None:
    listed = PROJECT["tool"]["setuptools"]["package-dir"]
    folders = {str(path.parent.relative_to(ROOT)) for top in (*MAY_IMPORT, "configs") for path in sources(top)}
    for folder in folders:
        assert (ROOT / folder / "__init__.py").is_file(), folder
    names = {
        name: name.removeprefix("harmony_fast.").replace(".", "/") for name in PROJECT["tool"]["setuptools"]["packages"]
    }
    assert set(names.values()) == folders | {"harmony_fast"}
    assert {names[name]: folder for name, folder in listed.items() if name != "harmony_fast"}.items() <= {
        folder: folder for folder in folders
    }.items()


def test_every_dependency_has_bounds_and_a_tried_version() -> None:
    from packaging.requirements import Requirement

    tried = {Requirement(line).name: Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines()
             if line and not line.startswith("#")}  # fmt: skip
    installed_here = [PROJECT["project"]["optional-dependencies"][name] for name in ("test", "lint")]
    extras = [requirement for requirements in installed_here for requirement in requirements]
    for text in PROJECT["project"]["dependencies"] + extras:
        requirement = Requirement(text)
        name = requirement.name.lower().replace("_", "-")
        assert requirement.specifier, text
        if name != "setuptools" and (requirement.marker is None or requirement.marker.evaluate()):
            (version,) = tried[name].specifier
            assert requirement.specifier.contains(version.version), text


def test_what_is_committed_is_small() -> None:
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    sizes = {name: (ROOT / name).stat().st_size for name in files if (ROOT / name).is_file()}
    assert sum(size for name, size in sizes.items() if name.startswith("demo/")) < 12e6
    assert not [name for name in files if name.endswith((".beton", ".pyc", ".pt"))]
