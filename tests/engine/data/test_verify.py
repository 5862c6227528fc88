"""`prepare --verify`: a good file passes, every kind of damage is found and named, from the command line too."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import call
from harmony_fast.engine.data.beton import BetonWriter, open_beton
from harmony_fast.engine.data.prepare import prepare
from harmony_fast.engine.data.verify import verify
from harmony_fast.engine.errors import DataError

COUNT = 12


@pytest.fixture(params=[False, True], ids=["one", "several"])
def path(request: pytest.FixtureRequest, tmp_path: Path, picture: Callable, encoded: Callable) -> Path:
    """A file of 12 samples, with one or several captions each."""
    tokens = np.zeros((3, 8), np.int32)
    tokens[:, :4] = 90, 5, 6, 91
    with BetonWriter(tmp_path / "x.beton", COUNT, 8, several=request.param) as writer:
        for i in range(COUNT):
            rows = tokens[: 1 + i % 3] if request.param else tokens[0]
            writer.write(encoded(picture(i), quality=90), 96, 64, rows, f"key-{i}")
    return tmp_path / "x.beton"


def changed(path: Path, change: Callable[[np.memmap, np.memmap, bytearray], object]) -> None:
    """Apply `change` to the metadata, the allocation table, or the bytes of a file."""
    opened, data = open_beton(path), bytearray(path.read_bytes())
    metadata = np.frombuffer(data, opened.metadata.dtype, COUNT, opened.metadata.offset)
    table = np.frombuffer(data, opened.allocations.dtype, opened.allocations.size, opened.allocations.offset)
    change(metadata, table.reshape(COUNT, -1), data)
    path.write_bytes(data)


def put(data: bytearray, start: int, new: bytes) -> None:
    data[start : start + len(new)] = new


def test_a_good_file(path: Path) -> None:
    assert verify(path, progress=False) == COUNT


CHANGES = {
    "its image cannot be decoded": lambda m, t, d: put(d, int(m[7]["image"]["data_ptr"]) + 2, bytes(300)),
    "its image lies outside": lambda m, t, d: m["image"]["data_ptr"].__setitem__(7, 2**40),
    "its caption is not start": lambda m, t, d: put(d, int(m[7]["tokens"]) + 4 * 6, b"\x05"),
    "its caption lies outside": lambda m, t, d: m["tokens"].__setitem__(7, 2**63),
    "its key cannot be read": lambda m, t, d: m["key"]["ptr"].__setitem__(7, 2**50),
    "its data have changed": lambda m, t, d: put(d, int(m[7]["key"]["ptr"]), b"KEY"),
    "the allocation table": lambda m, t, d: t["size"].__setitem__((7, 1), 2**40),
}


@pytest.mark.parametrize("message", CHANGES)
def test_damage_is_named(path: Path, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from harmony_fast.engine.data import beton

    monkeypatch.setattr(beton, "PROBES", 2)  # opening looks at the first and the last sample only
    changed(path, CHANGES[message])
    with pytest.raises(DataError, match=rf"1 of 12 samples are damaged: sample 7 \(key .*{message}") as error:
        verify(path, progress=False)
    assert "\n" not in str(error.value)


def test_any_changed_byte_of_a_sample_is_found(path: Path) -> None:
    opened, whole = open_beton(path), path.read_bytes()
    first = opened.metadata.offset + opened.metadata.nbytes
    for place in np.random.default_rng(0).integers(first, opened.data_end, 60).tolist():
        # Between a sample's end and the checksums, at most seven bytes belong to nobody.
        if place >= int(opened.allocations["ptr"].max() + opened.allocations["size"][-1, -1]):
            continue
        data = bytearray(whole)
        data[place] ^= 0x41
        path.write_bytes(data)
        with pytest.raises(DataError, match="1 of 12 samples are damaged"):
            verify(path, workers=1, progress=False)


def test_a_wrong_size_is_found(path: Path) -> None:
    changed(path, lambda m, t, d: m["image"]["width"].__setitem__(3, 95))
    with pytest.raises(DataError, match=r"sample 3 \(key 'key-3'\): its image cannot be decoded"):
        verify(path, progress=False)


def test_many_faults_are_counted_and_some_named(path: Path) -> None:
    changed(path, lambda m, t, d: m["image"]["height"].__setitem__(slice(None), 1))
    with pytest.raises(DataError, match=r"12 of 12 samples are damaged: sample 0 .*sample 9 .*; \.\.\.; prepare"):
        verify(path, progress=False)


def test_what_prepare_writes_passes(tar: Callable, pairs: Callable, tmp_path: Path) -> None:
    for captions in ("one", "all"):
        prepare(tar("a.tar", pairs(9)), tmp_path / "y.beton", context=16, captions=captions, progress=False)
        assert verify(tmp_path / "y.beton", progress=False) == 9


def test_from_the_command_line(path: Path) -> None:
    good = call("prepare", "--verify", path)
    assert (good.returncode, good.stdout) == (0, f"{path}: 12 samples, all good\n")
    changed(path, CHANGES["its data have changed"])
    bad = call("prepare", "--verify", path)
    assert bad.returncode == 1 and bad.stderr.splitlines()[-1].startswith(f"error: {path}: 1 of 12 samples")
    assert call("prepare", "--verify", path, "a.tar").returncode == 1
