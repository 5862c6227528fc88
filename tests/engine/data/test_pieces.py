"""Large tars are cut into pieces for several workers, which changes nothing in the file."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from harmony_fast.engine.data import sources
from harmony_fast.engine.data.beton import open_beton
from harmony_fast.engine.data.prepare import prepare
from harmony_fast.engine.data.sources import find_chunks


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE", 10_000)


def outputs(source: Path, folder: Path, **options: object) -> list[tuple[bytes, bytes]]:
    """With pieces and two workers, then whole and with one: the file and its rejects."""
    found = []
    for workers in (2, 1):
        if workers == 1:
            sources.PIECE = 10**12  # `small_pieces` puts back what it was
        output = folder / f"{workers}.beton"
        summary = prepare(source, output, context=16, workers=workers, progress=False, **options)
        found.append((output.read_bytes(), summary.rejects_path.read_bytes()))
    return found


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("damage", ["none", "cut", "header"])
def test_pieces_change_nothing(tar: Callable, pairs: Callable, tmp_path: Path, damage: str) -> None:
    twice = [*pairs(3, 5), ("late.txt", b"alone"), ("000001.png", b"again"), ("000001.txt", b"x")]
    shard = tar("a.tar", [*pairs(30), ("README", b"x"), *twice, *pairs(10, 40)])
    data = bytearray(shard.read_bytes())
    if damage == "cut":
        shard.write_bytes(data[: len(data) * 5 // 6])
    if damage == "header":
        place = data.index(b"000020.jpg")
        data[place : place + 200] = b"\xff" * 200
        shard.write_bytes(data)
    assert len(find_chunks(shard, 2)) > 5
    cut, whole = outputs(shard, tmp_path)
    assert cut == whole
    reasons = [json.loads(line)["reason"] for line in cut[1].splitlines()]
    assert reasons.count("shard cut short or damaged") == (damage != "none")
    if damage != "cut":  # where that is depends on the encoder
        assert reasons.count("key seen before in this shard") == (4 if damage == "none" else 0)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("limit", [1, 7, 24, 25, 60])
def test_limits_and_duplicates_with_pieces(tar: Callable, pairs: Callable, tmp_path: Path, limit: int) -> None:
    renamed = [(f"copy-{name}", data) for name, data in pairs(20)]
    shard = tar("a.tar", pairs(20) + renamed + pairs(20, 50))
    cut, whole = outputs(shard, tmp_path, limit=limit, dedup=True)
    assert cut == whole
    keys = [f"{i:06d}" for i in (*range(20), *range(50, 70))][:limit]
    assert open_beton(tmp_path / "2.beton").keys() == keys
    assert cut[1].count(b"duplicate of an earlier image") == (20 if limit > 20 else 0)


@pytest.mark.usefixtures("small_pieces")
def test_a_compressed_tar_stays_whole(tar: Callable, pairs: Callable, tmp_path: Path) -> None:
    shard, packed = tar("a.tar", pairs(30)), tmp_path / "b.tar.gz"
    packed.write_bytes(gzip.compress(shard.read_bytes()))
    assert packed.stat().st_size > 2 * sources.PIECE  # large enough to be cut
    assert len(find_chunks(shard, 2)) > 1 and len(find_chunks(packed, 2)) == 1
