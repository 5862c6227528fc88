"""The streaming loader: same interface and crops as the other, exact resume, and the net at its worst."""

import gzip
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bad_server import serving
from harmony_fast.engine.data import lanes, remote
from harmony_fast.engine.data.batch import RawBatch
from harmony_fast.engine.data.loader import Loader
from harmony_fast.engine.data.prepare import prepare
from harmony_fast.engine.data.remote import Cache
from harmony_fast.engine.data.samples import ShardDamaged
from harmony_fast.engine.data.shards import read_any
from harmony_fast.engine.data.webdataset_loader import PLACE_BITS, WebdatasetLoader
from harmony_fast.engine.errors import DataError
from harmony_fast.harmony.views import ViewsConfig

VIEWS = ViewsConfig(global_size=32, local_size=16, local_crops=3)
SIZES = [7, 5, 9, 6]
OPTIONS = {"context": 16, "batch_size": 8, "seed": 11, "workers": 2, "shuffle": 12}


@pytest.fixture
def shards(tar: Callable, pairs: Callable) -> list[Path]:
    """Four tars, 27 samples."""
    return [tar(f"{n}.tar", pairs(size, 100 * n)) for n, size in enumerate(SIZES)]


def batches(sources: object, epoch: int = 0, start_step: int = 0, **options: object) -> list[RawBatch]:
    with WebdatasetLoader(sources, VIEWS, **{**OPTIONS, **options}) as loader:
        return list(loader.epoch(epoch, start_step))


def same(a: RawBatch, b: RawBatch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def all_same(a: list[RawBatch], b: list[RawBatch]) -> bool:
    return len(a) == len(b) > 0 and all(map(same, a, b))


def test_interface_and_content(shards: list[Path], pairs: Callable) -> None:
    from harmony_fast.engine.data.tokens import tokenize

    with WebdatasetLoader(shards, VIEWS, **OPTIONS) as loader:
        assert (loader.samples, loader.context, loader.steps_per_epoch, loader.lanes) == (27, 16, 3, 4)
        got = list(loader.epoch(0))
        ids = [key for batch in got for key in loader.sample_ids(batch.index)]
    assert len(got) == 3 and got[0].global_crops.shape == (8, 2, 32, 32, 3)
    assert got[0].local_crops.shape == (8, 3, 16, 16, 3) and got[0].local_crops.dtype == torch.uint8
    captions = {key: f"picture number {int(key)}" for key in ids}
    rows = [row for batch in got for row in batch.tokens]
    assert all(row.tolist() == tokenize(captions[key], 16)[0].tolist() for key, row in zip(ids, rows, strict=True))
    assert len(set(ids)) >= 23  # only a lane that is shorter than the epoch begins again
    places = [(number >> PLACE_BITS, number % (1 << PLACE_BITS)) for batch in got for number in batch.index.tolist()]
    assert ids == [f"{100 * shard + place:06d}" for shard, place in places] and PLACE_BITS == 24
    assert all(place < SIZES[shard] for shard, place in places)


def test_batches_depend_on_seed_and_epoch_alone(shards: list[Path]) -> None:
    whole = batches(shards)
    assert all_same(batches(shards, workers=1), whole)
    for ranks in (2, 4):
        parts = [batches(shards, rank=rank, world_size=ranks) for rank in range(ranks)]
        for step, batch in enumerate(whole):
            columns = zip(*(vars(part[step]).values() for part in parts), strict=True)
            assert same(RawBatch(*map(torch.cat, columns)), batch)
    for start in (1, 2):
        assert all_same(batches(shards, start_step=start), whole[start:])
    others = [batches(shards, epoch=1), batches(shards, seed=12)]
    assert not any(torch.equal(other[0].index, whole[0].index) for other in others)
    with pytest.raises(ValueError, match="step 4"):
        batches(shards, start_step=4)


def test_crops_are_those_of_the_other_loader(tar: Callable, pairs: Callable, tmp_path: Path) -> None:
    shard = tar("one.tar", pairs(24))
    prepare(shard, tmp_path / "x.beton", context=16, workers=1, progress=False)
    with WebdatasetLoader([shard], VIEWS, **{**OPTIONS, "batch_size": 24}) as ours:
        (streamed,) = ours.epoch(5)
        ids = ours.sample_ids(streamed.index)
    assert sorted(streamed.index.tolist()) == list(range(24))  # the first shard's places are the file's
    with Loader(tmp_path / "x.beton", VIEWS, batch_size=24, seed=11) as loader:
        (decoded,) = loader.epoch(5)
        where = {int(index): slot for slot, index in enumerate(decoded.index)}
        assert ids == loader.sample_ids(streamed.index)
    slots = torch.tensor([where[int(index)] for index in streamed.index])
    for mine, theirs in ((streamed.global_crops, decoded.global_crops), (streamed.local_crops, decoded.local_crops)):
        difference = (mine.int() - theirs[slots].int()).abs().float()
        assert difference.mean() < 2 and difference.amax((2, 3, 4)).median() < 12
    assert torch.equal(streamed.tokens, decoded.tokens[slots])


def test_several_captions(tar: Callable, picture: Callable, encoded: Callable) -> None:
    texts = [f"caption {n}" for n in range(3)]
    files = [
        f for i in range(8) for f in ((f"{i}.jpg", encoded(picture(i))), (f"{i}.json", json.dumps(texts).encode()))
    ]
    shard = tar("a.tar", files)
    drawn = [batches([shard], epoch, captions="all")[0].tokens for epoch in range(12)]
    assert len({tuple(row.tolist()) for tokens in drawn for row in tokens}) == 3
    assert len({tuple(batches([shard], e)[0].tokens[0].tolist()) for e in range(3)}) == 1


def test_bad_samples_are_replaced_the_same_way_when_resuming(
    tar: Callable, pairs: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    shards = []
    for n in range(2):
        files = pairs(12, 100 * n)
        for bad in (2, 3, 9):
            name, data = files[2 * bad]
            files[2 * bad] = name, data[: len(data) // 2]
        files[2 * 5 + 1] = files[2 * 5 + 1][0], b""
        shards.append(tar(f"{n}.tar", [*files, ("alone.txt", b"x")]))
    with WebdatasetLoader(shards, VIEWS, **{**OPTIONS, "batch_size": 4}) as loader:
        whole = list(loader.epoch(0))
        keys = {key for batch in whole for key in loader.sample_ids(batch.index)}
        assert {"image truncated or corrupt", "caption empty", "no image"} <= set(loader.left_out)
    assert len(whole) == 6 and not keys & {f"{100 * n + bad:06d}" for n in (0, 1) for bad in (2, 3, 5, 9)}
    for start in range(1, 6):
        assert all_same(batches(shards, start_step=start, batch_size=4), whole[start:])
    assert "left out so far" in caplog.text and "image truncated or corrupt" in caplog.text


def test_a_bad_sample_is_counted_once(tar: Callable, pairs: Callable) -> None:
    """Also where it was looked at before its turn, to replace one of the batch before."""
    files = pairs(12)
    for bad in range(2, 9):
        name, data = files[2 * bad]
        files[2 * bad] = name, b"no image" if bad % 2 else data[: len(data) // 2]
    with WebdatasetLoader([tar("a.tar", files)], VIEWS, **{**OPTIONS, "batch_size": 2}) as loader:
        assert len(list(loader.epoch(0))) == 6
        assert loader.left_out == {"image truncated or corrupt": 4, "image not readable": 3}


def test_a_token_that_the_model_does_not_know_is_named(shards: list[Path]) -> None:
    assert len(batches(shards, vocabulary=49408)) == 3
    with pytest.raises(DataError, match=r"sample '\d+' of .*\.tar: its caption has the token id \d+, .* knows 49406"):
        batches(shards, vocabulary=49406)


def test_a_compressed_shard_is_judged_without_going_back(
    tar: Callable, pairs: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unpacking goes back by starting again, which a stream cannot."""
    seek = gzip.GzipFile.seek

    def forward(self: gzip.GzipFile, place: int, whence: int = 0) -> int:
        assert whence == 1 or place >= self.tell()  # `tell` itself is one of the first kind
        return seek(self, place, whence)

    monkeypatch.setattr(gzip.GzipFile, "seek", forward)
    content = tar("a.tar", pairs(12)).read_bytes()
    whole, broken = tmp_path / "whole.tar.gz", tmp_path / "broken.tar.gz"
    whole.write_bytes(gzip.compress(content, 1))
    place = content.index(b"000009.jpg")
    broken.write_bytes(gzip.compress(content[:place] + b"\xff" * 200 + content[place + 200 :], 1))
    assert [sample.key for sample in read_any(f"pipe:cat {whole}", None)] == [f"{i:06d}" for i in range(12)]
    with pytest.raises(ShardDamaged, match="no end of archive"):
        list(read_any(f"pipe:cat {broken}", None))


def test_images_none_of_which_can_be_decoded_end_the_epoch(
    tar: Callable, pairs: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "HOPELESS", 20)
    shard = tar("a.tar", [(name, data[: len(data) // 2] if name.endswith("jpg") else data) for name, data in pairs(9)])
    with pytest.raises(DataError, match=r"a\.tar: 20 images in succession cannot be decoded"):
        batches([shard], batch_size=4)


def test_a_shard_that_breaks_off_gives_what_it_has(tar: Callable, pairs: Callable, tmp_path: Path) -> None:
    whole = tar("whole.tar", pairs(12)).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) * 3 // 4])
    with WebdatasetLoader([tmp_path / "cut.tar"], VIEWS, **{**OPTIONS, "batch_size": 4}) as loader:
        assert 4 <= loader.samples < 12 and len(list(loader.epoch(0))) == loader.samples // 4
        assert loader.left_out["shard cut short or damaged"]


def test_what_cannot_work_is_said(shards: list[Path], tar: Callable, tmp_path: Path) -> None:
    texts = tar("texts.tar", [(f"{i}.txt", b"alone") for i in range(9)])
    cases = [
        ([texts], {}, "no sample is usable"),
        (shards, {"batch_size": 28}, "27 samples are fewer than one batch of 28"),
        (shards, {"batch_size": 9, "world_size": 2}, "batch size 9 cannot be shared equally by 2 ranks"),
        (shards[:2], {"world_size": 4}, "2 shards are fewer than 4 ranks"),
        ([tmp_path / "none.tar"], {}, "none.tar: no such file"),
        (["pipe:cat x.tar"], {}, "set data.samples"),
        (["nowhere://x/a.tar"], {"samples": 9}, "nowhere://x/a.tar"),
        ([], {}, "no shard"),
    ]
    for sources, options, message in cases:
        with pytest.raises(DataError, match=message) as error:
            batches(sources, **options)
        assert "\n" not in str(error.value)


def test_a_killed_thread_does_not_hang(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import harmony_fast.engine.data.webdataset_loader as module

    def no_room(*_: object) -> None:
        raise MemoryError("no room for the picture")

    monkeypatch.setattr(module, "cut", no_room)
    start = time.monotonic()
    with pytest.raises(DataError, match=r"thread died \(MemoryError: no room.* at sample '\d+' of .*\.tar"):
        batches(shards)
    monkeypatch.undo()
    monkeypatch.setattr(module, "read_any", no_room)
    with pytest.raises(DataError, match="thread died"):
        batches(shards)
    assert time.monotonic() - start < 10


def test_nothing_is_left_running(shards: list[Path]) -> None:
    before = set(threading.enumerate())
    with WebdatasetLoader(shards, VIEWS, **OPTIONS) as loader:
        first, second = loader.epoch(0), loader.epoch(1)
        next(first), next(second)
        with pytest.raises(DataError, match="one epoch at a time"):
            list(first)
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert set(threading.enumerate()) <= before


def test_ffcv_is_not_needed(shards: list[Path]) -> None:
    code = (
        "import sys; sys.modules.update(ffcv=None, numba=None)\n"
        "from harmony_fast.engine.data.webdataset_loader import WebdatasetLoader\n"
        "from harmony_fast.harmony.views import ViewsConfig\n"
        "import harmony_fast.engine.data.open_loader\n"
        "views = ViewsConfig(global_size=32, local_size=16, local_crops=3)\n"
        "with WebdatasetLoader(sys.argv[1:], views, context=16, batch_size=8, seed=0) as loader:\n"
        "    print(len(list(loader.epoch(0))))"
    )
    run = subprocess.run([sys.executable, "-c", code, *shards], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "3", run.stderr


# The net


def stats(shards: list[Path]) -> None:
    for shard, size in zip(shards, SIZES, strict=True):
        shard.with_name(shard.stem + "_stats.json").write_text(json.dumps({"count": size + 3, "successes": size}))


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.usefixtures("impatient")
def test_dropped_delayed_and_stalled_connections(
    shards: list[Path], tmp_path: Path, ranges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats(shards)
    monkeypatch.setattr(remote, "CHUNK", 4096)
    local = batches(shards)
    with serving(tmp_path) as (server, address):
        server.ranges, server.delay, server.failures, server.stalls = ranges, 0.02, 3, ["2.tar"]
        server.drop_after = 9_000 if ranges else 0  # one without ranges would never get further
        got = batches([f"{address}/{{0..3}}.tar"])
        assert all_same(got, local)
        assert len([r for r in server.requests if r == "/0.tar"]) > (1 if ranges else 0)


@pytest.mark.usefixtures("impatient")
def test_a_server_that_stays_away_is_an_error(shards: list[Path], tmp_path: Path) -> None:
    stats(shards)
    with serving(tmp_path) as (server, address):
        with WebdatasetLoader([f"{address}/{n}.tar" for n in range(4)], VIEWS, **OPTIONS) as loader:
            server.failures = 10**6
            with pytest.raises(DataError, match=r"/\d\.tar: reading failed at byte 0, 8 times: .*503") as error:
                list(loader.epoch(0))
        assert "\n" not in str(error.value)
        server.failures = 0
        with pytest.raises(DataError, match=r"9.tar: FileNotFoundError"):
            batches([f"{address}/9.tar"] * 4, samples=27)
        with pytest.raises(DataError, match=r"no 9_stats.json beside it .* set data.samples"):
            batches([f"{address}/9.tar"])


@pytest.mark.usefixtures("impatient")
def test_a_bounded_cache(shards: list[Path], tmp_path: Path) -> None:
    stats(shards)
    local, sizes = batches(shards), [shard.stat().st_size for shard in shards]
    with serving(tmp_path) as (server, address):
        sources = [f"{address}/{n}.tar" for n in range(4)]
        large = Cache(tmp_path / "large", 10**9)
        with WebdatasetLoader(sources, VIEWS, **OPTIONS, cache=large) as loader:
            assert all_same(list(loader.epoch(0)), local)
            list(loader.epoch(1)), list(loader.epoch(2))
            kept = {path.name: path.stat().st_size for path in large.folder.iterdir()}
            assert sorted(kept.values()) == sorted(sizes) and all(name.endswith(".tar") for name in kept)
            server.requests.clear()
            assert all_same(list(loader.epoch(0)), local)
            assert not [r for r in server.requests if r.endswith(".tar")]
        small = Cache(tmp_path / "small", max(sizes) + min(sizes) // 2)
        with WebdatasetLoader(sources, VIEWS, **OPTIONS, cache=small) as loader:
            for epoch in (0, 1, 0):
                got = list(loader.epoch(epoch))
                assert sum(path.stat().st_size for path in small.folder.iterdir()) <= small.limit
            assert all_same(got, local)
        none = Cache(tmp_path / "none", 100)
        with WebdatasetLoader(sources, VIEWS, **OPTIONS, cache=none) as loader:
            assert all_same(list(loader.epoch(0)), local) and not list(none.folder.iterdir())


def test_commands_as_sources(shards: list[Path], tmp_path: Path) -> None:
    assert all_same(batches([f"pipe:cat {tmp_path}/{{0..3}}.tar"], samples=27), batches(shards))


def test_other_file_systems_of_fsspec(shards: list[Path]) -> None:
    import fsspec

    for shard in shards:
        fsspec.filesystem("memory").pipe(f"/set/{shard.name}", shard.read_bytes())
    assert all_same(batches(["memory://set/{0..3}.tar"], samples=27), batches(shards))
