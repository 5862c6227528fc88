"""The package list against the folders, the import rule, what is committed, and what is in wheel and sdist."""

import ast
import importlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
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
    folders = {str(path.parent.relative_to(ROOT)) for top in (*MAY_IMPORT, "configs", "demo") for path in sources(top)}
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
    installed_here = [PROJECT["project"]["optional-dependencies"][name] for name in ("test", "lint", "docs")]
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


BUILD = """
import json, sys
from setuptools import build_meta
_, out, *kinds = sys.argv  # setuptools changes it
print("\\n" + json.dumps([getattr(build_meta, f"build_{kind}")(out) for kind in kinds]))
"""


def build(source: Path, out: Path, *kinds: str) -> list[Path]:
    """What setuptools makes of a source tree, without a word of complaint about the packages."""
    command = [sys.executable, "-c", BUILD, str(out), *kinds]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not re.search("deprecat|absent from|would be ignored", done.stdout + done.stderr, re.IGNORECASE), done.stderr
    return [out / name for name in json.loads(done.stdout.splitlines()[-1])]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """sdist and wheel of the working tree, and the wheel that is made from the sdist."""
    if not (ROOT / ".git").exists():
        pytest.skip("which files belong to the project is known to git alone")
    folder = tmp_path_factory.mktemp("built")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(lambda name: (ROOT / name).is_file(), names):
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "tree" / name)
    sdist, wheel = build(folder / "tree", folder, "sdist", "wheel")
    shutil.unpack_archive(sdist, folder / "unpacked")
    (folder / "again").mkdir()
    (again,) = build(folder / "unpacked" / sdist.name.removesuffix(".tar.gz"), folder / "again", "wheel")
    return {"sdist": sdist, "wheel": wheel, "again": again}


def names_in(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_has_all_that_runs_and_no_more(built: dict[str, Path]) -> None:
    folders = PROJECT["tool"]["setuptools"]["package-dir"].values()
    modules = [path for folder in folders for path in sources(folder)]
    data = [path for pattern in ("configs/**/*.yaml", "demo/*.tar", "demo/LICENSE*", "engine/**/*.css")
            for path in ROOT.glob(pattern)]  # fmt: skip
    assert len(data) > 20
    own = {str(path.relative_to(ROOT)).removeprefix("harmony_fast/") for path in (*modules, *data)}
    names = names_in(built["wheel"])
    assert {name for name in names if ".dist-info/" not in name} == {f"harmony_fast/{name}" for name in own}
    licences = {name.partition("/licenses/")[2] for name in names}
    assert {"LICENSE", "demo/LICENSES.md", "demo/LICENSE-CC-BY-4.0.txt"} <= licences
    assert built["wheel"].stat().st_size < 15e6


def test_the_sdist_gives_the_same_wheel_and_has_the_tests(built: dict[str, Path]) -> None:
    assert names_in(built["again"]) == names_in(built["wheel"])
    with tarfile.open(built["sdist"]) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {"CHANGELOG.md", "Makefile", "constraints.txt", "scripts/setup.sh", "tests/test_packaging.py",
            "tests/conftest.py", "docs/data.md", "bench/results/guard.json"} <= names  # fmt: skip
    assert not [name for name in names if name.endswith((".pyc", ".beton")) or name.startswith(("runs", ".venv"))]


def test_what_is_shipped_is_found_where_the_wheel_is_unpacked(built: dict[str, Path], tmp_path: Path) -> None:
    zipfile.ZipFile(built["wheel"]).extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    program = (
        "from harmony_fast.engine.shipped import find_config; from harmony_fast.engine.data.sources import find_chunks;"
        "print(find_config('demo'), find_config('clip'), find_chunks(['demo/noto.tar'], 1)[0].path)"
    )
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); {program}"]
    done = subprocess.run(command, cwd=tmp_path / "empty", capture_output=True, text=True, check=True)
    package = tmp_path / "site" / "harmony_fast"
    found = ["configs/demo.yaml", "configs/recipes/clip.yaml", "demo/noto.tar"]
    assert done.stdout.split() == [str(package / name) for name in found]


def test_the_changelog_begins_with_this_version() -> None:
    import harmony_fast

    released = re.findall(r"^## \[?([\d.]+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert released[0] == harmony_fast.__version__


def test_the_folder_found_as_another_package_defines_no_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers looks for a package named kernels. Operators defined twice are operators in memory that is gone."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    found = importlib.import_module("kernels")
    assert Path(found.__file__).parent == ROOT / "kernels"
    assert not hasattr(found, "ema_update_") and "kernels.ema" not in sys.modules
