"""Small files that are replaced whole."""

import json
from multiprocessing import get_context
from pathlib import Path

import pytest
from harmony_fast.engine.disk import replace_text
from harmony_fast.engine.errors import UserError

LONG = json.dumps(list(range(20_000)))


def write_often(path: Path) -> None:
    for _ in range(100):
        replace_text(path, LONG)


def test_a_reader_sees_the_old_text_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "made" / "rollbacks.json"
    replace_text(path, LONG)
    writers = [get_context("fork").Process(target=write_often, args=(path,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert path.read_text() == LONG
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [file.name for file in path.parent.iterdir()] == ["rollbacks.json"]


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/plan\.json: cannot be written: "):
        replace_text(tmp_path / "file" / "plan.json", "")
