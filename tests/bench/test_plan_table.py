"""`bench plan` takes long: what it found is there at any moment, and is not looked for again."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harmony_fast.bench import plan


def test_it_goes_on_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    gone_through: list[int] = []

    def cells(config: Any, ranks: int, cards: list[int]) -> Iterator[tuple[str, dict[str, Any]]]:
        if ranks == 4 and 4 not in gone_through:
            gone_through.append(4)
            raise KeyboardInterrupt
        gone_through.append(ranks)
        yield from ((str(card), {"largest_micro_batch": card * ranks, "samples_per_second": 1.0}) for card in cards)

    monkeypatch.setattr(plan, "_cells", cells)
    out = tmp_path / "new" / "plan.json"
    command = ["--towers", "ViT-S/16", "--cards", "8", "24", "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        plan.main(command)
    assert [row["gpus"] for row in json.loads(out.read_text())["rows"]] == [1, 2]
    assert plan.main(command) == 0
    assert gone_through == [1, 2, 4, 4, 8]
    assert "| ViT-S/16 | 8 | 64, 1/s | 192, 1/s |" in capsys.readouterr().out

    for damaged in (b"{", b"[]", b"{}", json.dumps({**json.loads(out.read_text()), "commit": "other"}).encode()):
        gone_through[:] = [4]
        out.write_bytes(damaged)
        assert plan.main([*command, "--ranks", "1"]) == 0 and gone_through == [4, 1]
