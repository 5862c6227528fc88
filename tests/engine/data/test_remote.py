"""Shards from afar: streams that break and go on, commands, and the cache."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bad_server import serving
from harmony_fast.engine.data import remote
from harmony_fast.engine.data.remote import Cache, Copy, Stream
from harmony_fast.engine.errors import DataError


@pytest.mark.usefixtures("impatient")
def test_a_server_without_ranges_is_read_from_the_start_again(tar: Callable, pairs: Callable, tmp_path: Path) -> None:
    shard = tar("a.tar", pairs(8))
    data = shard.read_bytes()
    with serving(tmp_path) as (server, address):
        server.ranges, server.drop_after, server.pause = False, len(data) // 2, 0.5
        stream = Stream(f"{address}/a.tar")
        first = stream.read(len(data) // 2)
        server.drop_after = 0
        assert first + stream.read() == data and stream.ended
        stream.close()
        assert len(server.requests) == 2


def test_the_least_lately_used_shard_goes_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 250)
    for n, source in enumerate("abc"):
        assert cache.make_room(100)
        cache.path(source).write_bytes(bytes(100))
        os.utime(cache.path(source), (1000 + n, 1000 + n))
    assert [source for source in "abc" if cache.find(source)] == ["b", "c"]  # and both are new again
    os.utime(cache.path("c"), (1, 1))
    assert cache.make_room(100) and cache.find("b") and not cache.find("c")
    assert not cache.make_room(251)


def test_a_cache_that_is_removed_while_it_is_written(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 1000)
    copies = [Copy(cache, source) for source in "ab"]
    for copy in copies:
        copy.write(b"some")
    shutil.rmtree(cache.folder)
    copies[0].finish(True)
    copies[1].write(b"more")
    copies[1].finish(True)
    assert not cache.find("a") and not cache.find("b")


def test_a_stream_goes_forward_and_a_little_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "CHUNK", 64)
    monkeypatch.setattr(remote, "TAIL", 256)
    data = np.random.default_rng(0).bytes(5000)
    (tmp_path / "x").write_bytes(data)
    stream = Stream(f"file://{tmp_path}/x")
    assert stream.read(100) == data[:100] and stream.seek(10) == 10 and stream.read(500) == data[10:510]
    assert stream.seek(400) == 400 and stream.read(1) == data[400:401] and stream.tell() == 401
    assert stream.seek(4000) == 4000 and stream.read() == data[4000:] and stream.read(5) == b""
    with pytest.raises(OSError, match="cannot go there"):
        stream.seek(0)
    stream.close()


@pytest.mark.usefixtures("impatient")
def test_a_command_that_fails_is_started_again(tmp_path: Path) -> None:
    shard, tried = tmp_path / "shard", tmp_path / "tried"
    shard.write_bytes(np.random.default_rng(0).bytes(20_000))
    once = f"[ -e {tried} ] && exec cat {shard}; touch {tried}; head -c 9000 {shard}; exit 3"
    assert Stream(f"pipe:{once}").read() == shard.read_bytes()
    with pytest.raises(DataError, match="ended with status 3"):
        Stream("pipe:exit 3").read()
