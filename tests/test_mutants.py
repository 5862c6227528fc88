"""scripts/mutants.py on a toy: what is changed, what is left out, and what becomes of a mutant."""

import ast
import importlib.util
from itertools import chain
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "mutants.py"
TOY = '''"""A toy."""

BLOCK = 64
SHIFT = 1.5


def smallest(values: list[int], start: "int | None" = None) -> int:
    """Of the values, counted from a start."""
    if not values:
        raise ValueError(f"{len(values) - 1} is not enough")
    for value in values:
        start = value if start is None or value < start else start
    return start
'''
EXPECTED = """
toy.py:4:9 1.5 -> 2.5
toy.py:4:9 1.5 -> 0.5
toy.py:9:8 not values -> values
toy.py:12:26 start is None or value < start -> (start is None and value < start)
toy.py:12:26 start is None or value < start -> (not (start is None or value < start))
toy.py:12:26 start is None -> (start is not None)
toy.py:12:43 value < start -> (value <= start)
toy.py:13:5 return start -> return None
"""
TEST = """
from toy import smallest


def test_smallest():
    assert smallest([3, 1, 2]) == 1 and smallest([2]) == 2
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutants", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_thing_is_changed_and_what_no_test_should_hold_is_left(script: ModuleType) -> None:
    found = script.mutants("toy.py", TOY)
    assert sorted(map(str, found)) == sorted(EXPECTED.strip().splitlines())
    for mutant in found:
        changed = mutant.apply(TOY)
        ast.parse(changed)
        lines = zip(changed.splitlines(), TOY.splitlines(), strict=True)
        assert [i for i, (a, b) in enumerate(lines, 1) if a != b] == [mutant.line]


def test_every_file_gets_its_share(script: ModuleType) -> None:
    every = {name: script.mutants(name, TOY * times) for name, times in (("a", 1), ("b", 10), ("c", 0))}
    drawn = script.draw(every, 11, seed=1)
    assert [m.file for m in drawn] == ["a"] + ["b"] * 10 and len(set(drawn)) == 11
    assert drawn == script.draw(every, 11, seed=1) != script.draw(every, 11, seed=2)


def test_every_file_of_the_project_has_tests(script: ModuleType) -> None:
    for folder in script.FOLDERS:
        for path in (script.ROOT / folder).rglob("*.py"):
            for test in chain(*script.stages(str(path.relative_to(script.ROOT)))):
                name = test.removeprefix("--deselect=").partition("::")[0]
                assert (script.ROOT / name).exists(), test


def test_mutants_are_tried_one_by_one(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "stages", lambda file: [["test_toy.py"]])
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "test_toy.py").write_text(TEST)
    trial = script.Trial(tmp_path)
    outcomes = {}
    for mutant in script.mutants("toy.py", TOY)[-3:]:
        outcomes[str(mutant)] = trial.judge(mutant, quick=True)
        assert (tmp_path / "toy.py").read_text() == TOY
    assert outcomes == {
        "toy.py:12:26 start is None -> (start is not None)": "test_toy.py::test_smallest",
        "toy.py:12:43 value < start -> (value <= start)": "survived",  # it is as good
        "toy.py:13:5 return start -> return None": "test_toy.py::test_smallest",
    }
    assert script.shares({f"kernels/{name}": outcome for name, outcome in outcomes.items()})["kernels"] == {
        "mutants": 3, "equivalent": 0, "caught": 2, "share": 0.667,
    }  # fmt: skip
    (tmp_path / "test_toy.py").write_text("while True:\n    pass")
    assert script.outcome(tmp_path, ["test_toy.py"], 0.5) == "time is over"
    with pytest.raises(SystemExit, match=r"without a change: test_toy\.py"):
        (tmp_path / "test_toy.py").write_text("def test() -> None:\n    assert False")
        script.Trial(tmp_path).judge(mutant, quick=True)
