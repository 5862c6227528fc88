"""No number of a benchmark in README.md or docs/ that does not come from a committed result."""

import re
from pathlib import Path

import pytest
from harmony_fast.bench import tables
from harmony_fast.engine.errors import UserError

RATE = re.compile(
    r"\d[\d,.]*\s*(?:k|M|million\s)?\s*(?:samples?|images?|tokens?|captions?|steps?|JPEGs?|[TGM]?FLOPs?|[TGM]B)"
    r"(?:/s\b| (?:a|per) second)|\d(?:\.\d+)?\s*(?:x|times)\s+(?:as fast|faster|the (?:speed|samples))|MFU of \d",
    re.IGNORECASE,
)
"""How a measured speed looks"""


def test_the_tables_are_what_the_results_say(capsys: pytest.CaptureFixture) -> None:
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_every_number_of_a_table_is_in_its_result() -> None:
    """Independent of how tables are written: the loader's rates, read back from the docs."""
    import json

    text = (tables.ROOT / "docs" / "data.md").read_text()
    part = next(found for found in tables.PART.finditer(text) if found[2] == "loader")
    report = json.loads((tables.RESULTS / part[3] / "loader.json").read_text())
    measured = {f"{r['images_per_second']:,.0f}" for case in report["loaders"] for r in case["results"].values()}
    cells = re.findall(r"(?<=\| )[\d,]+(?= \|)", part[4])
    assert len(cells) == 12 and set(cells) == measured


@pytest.mark.parametrize("path", tables.documents(), ids=lambda path: path.name)
def test_speeds_outside_of_tables_have_a_source(path: Path) -> None:
    """A section that gives a speed that was not measured here links to where it comes from."""
    text = tables.PART.sub("", path.read_text())
    for section in re.split(r"^#+ ", text, flags=re.MULTILINE):
        prose = re.sub(r"```.*?```", "", section, flags=re.DOTALL)
        if found := RATE.search(prose):
            assert "](https://" in prose, f"{path.name}, {section.splitlines()[0]}: {found[0]}"


def test_a_changed_digit_is_found() -> None:
    path = tables.ROOT / "docs" / "data.md"
    text = path.read_text()
    assert tables.renewed(text, path) == text
    part = next(found for found in tables.PART.finditer(text) if found[2] == "loader")
    place = part.start(4) + re.search(r"\d", part[4]).start()
    digit = "1" if text[place] != "1" else "2"
    assert tables.renewed(text[:place] + digit + text[place + 1 :], path) == text


def test_a_table_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.md: no table is called 'speed'"):
        tables.renewed("<!-- bench: speed -->\n<!-- /bench -->", tmp_path / "a.md")


def test_what_was_not_measured_says_so() -> None:
    made = tables.renewed("<!-- bench: step no-such-machine -->\nfast\n<!-- /bench -->", Path("a.md"))
    assert made == "<!-- bench: step no-such-machine -->\nNot measured yet.\n<!-- /bench -->"
