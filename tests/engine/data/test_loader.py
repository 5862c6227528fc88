"""The loader: what it yields is a pure function of (seed, epoch, index), and it never hangs or hides a bad image."""

import ctypes
import io
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from harmony_fast.engine.data import crops as crops_module
from harmony_fast.engine.data import loader as loader_module
from harmony_fast.engine.data import reading as reading_module
from harmony_fast.engine.data.batch import RawBatch
from harmony_fast.engine.data.beton import BetonWriter, open_beton
from harmony_fast.engine.data.beton_format import HEADER, METADATA, data_start, descriptors
from harmony_fast.engine.data.loader import Loader
from harmony_fast.engine.data.order import Blocks, QuasiRandomOrder
from harmony_fast.engine.errors import DataError
from harmony_fast.harmony.randomness import Purpose, sample_keys, split
from harmony_fast.harmony.views import ViewsConfig, crop_boxes
from PIL import Image

SAMPLES, CONTEXT = 26, 6
VIEWS = ViewsConfig(global_size=32, local_size=16, local_crops=3)


def jpeg(index: int) -> tuple[bytes, int, int]:
    """A smooth picture of its own size: bytes, width, height."""
    width, height = 40 + index, 70 - index
    noise = np.random.default_rng(index).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    return file.getvalue(), width, height


def tokens(index: int) -> np.ndarray:
    return np.arange(CONTEXT, dtype=np.int32) + 1000 * index


def write(path: Path, images: list[tuple[bytes, int, int]]) -> Path:
    with BetonWriter(path, len(images), CONTEXT) as writer:
        for i, (data, width, height) in enumerate(images):
            writer.write(data, width, height, tokens(i), f"shard/{i:03d}")
    return path


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("loader") / "train.beton", [jpeg(i) for i in range(SAMPLES)])


def batches(path: Path | list[Path], epoch: int = 3, start_step: int = 0, **options: object) -> list[RawBatch]:
    with Loader(path, VIEWS, **{"batch_size": 8, "seed": 11, **options}) as loader:
        return list(loader.epoch(epoch, start_step))


def same(a: RawBatch, b: RawBatch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def joined(parts: tuple[RawBatch, ...]) -> RawBatch:
    return RawBatch(*(torch.cat(column) for column in zip(*(vars(p).values() for p in parts), strict=True)))


def test_shapes_types_and_ids(beton: Path) -> None:
    with Loader(beton, VIEWS, batch_size=8, seed=11) as loader:
        assert (loader.samples, loader.context, loader.steps_per_epoch) == (SAMPLES, CONTEXT, 3)
        got = list(loader.epoch(0))
        assert len(got) == 3
        batch = got[1]
        assert batch.global_crops.shape == (8, 2, 32, 32, 3) and batch.global_crops.dtype == torch.uint8
        assert batch.local_crops.shape == (8, 3, 16, 16, 3) and batch.local_crops.dtype == torch.uint8
        assert batch.tokens.dtype == batch.index.dtype == torch.int64
        assert batch.tokens.tolist() == [tokens(i).tolist() for i in batch.index.tolist()]
        assert loader.sample_ids(batch.index) == [f"shard/{i:03d}" for i in batch.index.tolist()]
    assert len({int(i) for b in got for i in b.index}) == 24  # no sample twice


def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch(beton: Path) -> None:
    with Loader(beton, VIEWS, batch_size=8, seed=11) as a, Loader(beton, VIEWS, batch_size=4, seed=12) as b:
        orders = [a.order(0), a.order(1), b.order(0)]
        assert all(sorted(order.tolist()) == list(range(SAMPLES)) for order in orders)
        assert len({tuple(order.tolist()) for order in orders}) == 3
        taken = torch.cat([batch.index for batch in a.epoch(0)])
        assert taken.tolist() == orders[0][:24].tolist()


def test_same_batches_with_any_number_of_workers(beton: Path) -> None:
    one, two = batches(beton, workers=1), batches(beton, workers=2)
    assert len(one) == 3 and all(map(same, one, two))


def test_ranks_share_the_same_global_batches(beton: Path) -> None:
    whole = batches(beton)
    parts = [batches(beton, rank=rank, world_size=2) for rank in (0, 1)]
    assert all(len(b.index) == 4 for b in parts[0])
    assert all(same(joined(pair), b) for *pair, b in zip(*parts, whole, strict=True))


def test_resuming_in_the_middle_of_an_epoch(beton: Path) -> None:
    assert all(map(same, batches(beton, start_step=1), batches(beton)[1:]))
    assert batches(beton, start_step=3) == []
    with pytest.raises(ValueError, match="step 4"):
        batches(beton, start_step=4)


def test_what_is_compiled_ahead_is_what_batches_call(beton: Path) -> None:
    """Or the first run after set-up would compile for 20 s."""
    crops_module.compile_ahead()
    known = list(crops_module.cut_batch.signatures)
    batches(beton)
    assert crops_module.cut_batch.signatures == known


def test_epochs_differ_and_repeat(beton: Path) -> None:
    with Loader(beton, VIEWS, batch_size=8, seed=11) as loader:
        first, second, again = (list(loader.epoch(e)) for e in (0, 1, 0))
    assert all(map(same, first, again))
    a, b = joined(tuple(first)), joined(tuple(second))
    shared = sorted(set(a.index.tolist()) & set(b.index.tolist()))
    pairs = [(a.index.tolist().index(i), b.index.tolist().index(i)) for i in shared]
    assert not any(torch.equal(a.global_crops[i], b.global_crops[j]) for i, j in pairs)


def test_what_was_yielded_stays(beton: Path) -> None:
    with Loader(beton, VIEWS, batch_size=2, seed=11) as loader:
        kept, sums = [], []
        for batch in loader.epoch(0):
            kept.append(batch)
            sums.append(int(batch.global_crops.sum()))
    assert [int(b.global_crops.sum()) for b in kept] == sums and len(sums) == 13


def test_crops_are_the_documented_boxes_of_the_decoded_image(beton: Path) -> None:
    batch = batches(beton)[0]
    kinds = split(sample_keys(11, 3, batch.index, Purpose.CROP), 2)
    for slot, index in enumerate(batch.index.tolist()):
        data, width, height = jpeg(index)
        image = Image.open(io.BytesIO(data))
        size = torch.tensor([height]), torch.tensor([width])
        cases = ((0, batch.global_crops, VIEWS.global_scale), (1, batch.local_crops, VIEWS.local_scale))
        for kind, crops, scale in cases:
            count, side = crops.shape[1:3]
            boxes = crop_boxes(kinds[slot, kind][None], *size, count, scale, VIEWS.aspect)[0].tolist()
            for crop, (top, left, h, w) in zip(crops[slot], boxes, strict=True):
                expected = image.resize((side, side), Image.Resampling.BILINEAR, (left, top, left + w, top + h))
                assert (crop.int() - torch.from_numpy(np.array(expected)).int()).abs().float().mean() < 4


def test_no_local_crops(beton: Path) -> None:
    views = ViewsConfig(global_size=32, local_crops=0)
    with Loader(beton, views, batch_size=8, seed=0) as loader:
        assert next(iter(loader.epoch(0))).local_crops.shape == (8, 0, 96, 96, 3)


def test_threads_of_torch_stay_and_none_of_ours_is_left(beton: Path) -> None:
    before, threads = set(threading.enumerate()), torch.get_num_threads()
    with Loader(beton, VIEWS, batch_size=2, seed=11, workers=1) as loader:
        epoch = loader.epoch(0)
        next(epoch)
        assert set(threading.enumerate()) - before
    assert set(threading.enumerate()) <= before
    assert torch.get_num_threads() == threads
    with pytest.raises(DataError, match="this epoch was closed"):
        list(epoch)


def test_a_second_epoch_closes_the_first(beton: Path) -> None:
    with Loader(beton, VIEWS, batch_size=2, seed=11) as loader:
        first, second = loader.epoch(0), loader.epoch(1)
        next(first), next(second)
        with pytest.raises(DataError, match="one epoch at a time"):
            list(first)
        assert len(list(second)) == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 27}, "26 samples are fewer than one batch of 27"),
        ({"batch_size": 9, "world_size": 2}, "batch size 9 cannot be shared equally by 2 ranks"),
        ({"batch_size": 0}, "batch size 0"),
    ],
)
def test_impossible_batches(beton: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        Loader(beton, VIEWS, **{"seed": 0, **options})
    assert "\n" not in str(raised.value)


def test_files_that_are_not_betons(beton: Path, tmp_path: Path) -> None:
    (tmp_path / "text.beton").write_text("not a beton " * 1000)
    (tmp_path / "cut.beton").write_bytes(beton.read_bytes()[:-100])
    for name in ("text", "cut", "missing"):
        with pytest.raises(DataError, match=f"{name}.beton"):
            Loader(tmp_path / f"{name}.beton", VIEWS, batch_size=8, seed=0)


def corrupted(beton: Path, path: Path, index: int) -> Path:
    """A copy of `beton` in which the middle of sample `index`'s JPEG is overwritten."""
    data = bytearray(beton.read_bytes())
    start = int(open_beton(beton).metadata["image"]["data_ptr"][index])
    data[start + 2 : start + 400] = bytes(398)
    path.write_bytes(data)
    return path


def truncated(path: Path, index: int) -> Path:
    """A beton in which sample `index`'s JPEG ends too early."""
    images = [jpeg(i) for i in range(SAMPLES)]
    data, width, height = images[index]
    images[index] = data[: len(data) // 2], width, height
    return write(path, images)


@pytest.mark.parametrize("damage", ["corrupted", "truncated"])
def test_a_damaged_image_is_named(beton: Path, tmp_path: Path, damage: str) -> None:
    with Loader(beton, VIEWS, batch_size=8, seed=11) as loader:
        index = int(loader.order(0)[9])  # in the second batch
    path = tmp_path / "bad.beton"
    _ = corrupted(beton, path, index) if damage == "corrupted" else truncated(path, index)
    with Loader(path, VIEWS, batch_size=8, seed=11) as loader:
        epoch = loader.epoch(0)
        next(epoch)
        with pytest.raises(DataError, match=rf"bad.beton: sample {index} \(key 'shard/{index:03d}'\)") as raised:
            next(epoch)
    assert "\n" not in str(raised.value)


def test_a_record_that_points_nowhere_is_named(beton: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.beton"
    path.write_bytes(beton.read_bytes())
    metadata = open_beton(path).metadata
    writable = np.memmap(path, metadata.dtype, "r+", metadata.offset, metadata.shape)
    writable["image"]["data_ptr"][5] += 1
    writable.flush()
    with Loader(path, VIEWS, batch_size=26, seed=11) as loader, pytest.raises(DataError, match=r"sample 5 .* outside"):
        next(loader.epoch(0))


@pytest.mark.parametrize("reading", ["page_cache", "direct"])
def test_a_token_that_the_model_does_not_know_is_named(beton: Path, reading: str) -> None:
    largest = 1000 * (SAMPLES - 1) + CONTEXT - 1
    assert len(batches(beton, batch_size=26, reading=reading, vocabulary=largest + 1)) == 1
    message = rf"sample 25 \(key 'shard/025'\): its caption has the token id {largest}, the text tower knows {largest}:"
    with pytest.raises(DataError, match=message):
        batches(beton, batch_size=26, reading=reading, vocabulary=largest)


def raises_in_time(epoch: Iterator[RawBatch], message: str) -> None:
    start = time.monotonic()
    with pytest.raises(DataError, match=message):
        list(epoch)
    assert time.monotonic() - start < 10


def test_an_error_in_the_thread_reaches_the_consumer(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object) -> None:
        raise MemoryError("no room for the picture")

    monkeypatch.setattr(loader_module, "cut_batch", no_room)
    with Loader(beton, VIEWS, batch_size=8, seed=11) as loader:
        first = int(loader.order(0)[0])
        named = rf"train.beton: the loader's thread died .*no room.*sample {first} \(key 'shard/{first:03d}'\)"
        raises_in_time(loader.epoch(0), named)


def test_a_killed_thread_does_not_hang(beton: Path) -> None:
    with Loader(beton, VIEWS, batch_size=2, seed=11) as loader:
        epoch = loader.epoch(0)
        next(epoch)
        (thread,) = [t for t in threading.enumerate() if t.name == "harmony-fast-loader"]
        while thread.is_alive():  # the exception is lost where Python ignores one, as in a callback
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
            thread.join(0.2)
        raises_in_time(epoch, r"train.beton: the loader's thread died .*System(Exit|Error).* sample \d+ \(key")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same samples as `beton` holds, in three files of different sizes."""
    folder, images = tmp_path_factory.mktemp("parts"), [jpeg(i) for i in range(SAMPLES)]
    paths = []
    for first, end in ((0, 3), (3, 20), (20, SAMPLES)):
        paths.append(folder / f"{first}.beton")
        with BetonWriter(paths[-1], end - first, CONTEXT) as writer:
            for i in range(first, end):
                writer.write(*images[i], tokens(i), f"shard/{i:03d}")
    return paths


def test_several_files_are_one_data_set(beton: Path, parts: list[Path]) -> None:
    assert all(map(same, batches(parts), batches(beton)))
    with Loader(parts, VIEWS, batch_size=8, seed=11) as loader:
        assert (loader.samples, loader.context) == (SAMPLES, CONTEXT)
        assert loader.sample_ids(torch.tensor([2, 3, 19, 25])) == ["shard/002", "shard/003", "shard/019", "shard/025"]


def test_files_that_do_not_go_together(beton: Path, tmp_path: Path) -> None:
    with BetonWriter(tmp_path / "other.beton", 1, 9) as writer:
        writer.write(*jpeg(0), np.zeros(9, np.int32), "a")
    with pytest.raises(DataError, match=r"other.beton: has captions of 9 tokens, .*train.beton of 6"):
        Loader([beton, tmp_path / "other.beton"], VIEWS, batch_size=8, seed=0)
    with pytest.raises(DataError, match=r"no .beton file"):
        Loader([], VIEWS, batch_size=8, seed=0)


def test_a_damaged_image_in_one_of_several_files_is_named(parts: list[Path], tmp_path: Path) -> None:
    bad = corrupted(parts[1], tmp_path / "bad.beton", 4)
    for reading in ("page_cache", "direct"):
        with Loader([parts[0], bad, parts[2]], VIEWS, batch_size=26, seed=11, reading=reading) as loader:
            raises_in_time(loader.epoch(0), r"bad.beton: sample 4 \(key 'shard/007'\): its image cannot be decoded")


def test_direct_reads_give_the_same_batches(beton: Path, parts: list[Path]) -> None:
    for path in (beton, parts):
        assert all(map(same, batches(path, reading="direct"), batches(beton, reading="page_cache")))


@pytest.mark.parametrize("reading", ["direct", "page_cache"])
def test_quasi_random_order_through_the_loader(parts: list[Path], reading: str) -> None:
    whole = batches(parts, order="quasi_random", reading=reading)
    taken = torch.cat([batch.index for batch in whole])
    assert len(set(taken.tolist())) == 24
    plain = {int(i): crop for b in batches(parts) for i, crop in zip(b.index, b.global_crops, strict=True)}
    shared = [(i, c) for b in whole for i, c in zip(b.index.tolist(), b.global_crops, strict=True) if i in plain]
    assert len(shared) > 20 and all(torch.equal(crop, plain[i]) for i, crop in shared)  # crops go by the sample
    ranks = [batches(parts, order="quasi_random", reading=reading, rank=r, world_size=2) for r in (0, 1)]
    assert all(same(joined(pair), b) for *pair, b in zip(*ranks, whole, strict=True))
    assert all(map(same, batches(parts, start_step=2, order="quasi_random", reading=reading), whole[2:]))


def test_files_larger_than_memory_are_read_directly(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Loader(beton, VIEWS, batch_size=8, seed=11) as loader:
        assert (loader.order_kind, loader.reading) == ("random", "page_cache")
    monkeypatch.setattr(reading_module, "host_memory", lambda: beton.stat().st_size)
    with Loader(beton, VIEWS, batch_size=8, seed=11) as loader:
        assert (loader.order_kind, loader.reading) == ("quasi_random", "direct")
        assert len(list(loader.epoch(0))) == 3
    with Loader(beton, VIEWS, batch_size=8, seed=11, order="random", reading="page_cache") as loader:
        assert (loader.order_kind, loader.reading) == ("random", "page_cache")


def test_direct_reading_asks_ahead_and_drops_behind(parts: list[Path]) -> None:
    """Every block is asked for once, before its window begins, and dropped only when all ranks are past it."""
    order = QuasiRandomOrder(Blocks(np.array([0, 3, 20, 26]), 260, 20), seed=11, epoch=0, window=2)
    with Loader(parts, VIEWS, batch_size=4, seed=11, order="quasi_random", reading="direct") as loader:
        log: list[tuple[str, int, int]] = []
        loader._storage.expect = lambda blocks: log.extend(("expect", step, int(b)) for b in blocks)  # type: ignore[method-assign]
        loader._storage.forget = lambda blocks: log.extend(("forget", step, int(b)) for b in blocks)  # type: ignore[method-assign]
        window = None
        for step in range(6):
            window = loader._look_ahead(order, np.arange(4 * step, 4 * step + 4), window)
    window_of = {int(b): w for w in range(20) for b in order.blocks_of(w)}
    expected = {b: step for kind, step, b in log if kind == "expect"}
    assert len([1 for kind, *_ in log if kind == "expect"]) == len(expected) >= 12
    for block, window in window_of.items():
        first, end = order.window_starts[window : window + 2]
        if window >= 2 and first < 24:
            assert expected[block] * 4 <= first
        forgotten = [step for kind, step, b in log if kind == "forget" and b == block]
        assert all(4 * step >= end for step in forgotten) and len(forgotten) <= 1


def test_several_captions_are_drawn_by_seed_epoch_and_sample(tmp_path: Path) -> None:
    counts = [1 + i % 3 for i in range(SAMPLES)]
    with BetonWriter(tmp_path / "x.beton", SAMPLES, CONTEXT, several=True) as writer:
        for i, count in enumerate(counts):
            rows = np.stack([tokens(i) + 100 * c for c in range(count)])
            writer.write(*jpeg(i), rows, f"shard/{i:03d}")
    seen: list[set[int]] = [set() for _ in counts]
    for epoch in range(30):
        got = batches(tmp_path / "x.beton", epoch, batch_size=26)
        again = batches(tmp_path / "x.beton", epoch, batch_size=26, workers=1, reading="direct")
        assert all(map(same, got, again))
        for index, row in zip(got[0].index.tolist(), got[0].tokens.numpy(), strict=True):
            drawn = (int(row[0]) - 1000 * index) // 100
            assert row.tolist() == (tokens(index) + 100 * drawn).tolist()
            seen[index].add(drawn)
    assert seen == [set(range(count)) for count in counts]


def test_opening_takes_no_longer_for_many_samples(tmp_path: Path) -> None:
    """Two million samples that share one image: opening and a batch touch a few pages of their 130 MB of tables."""
    path, count = many(tmp_path / "many.beton", 2_000_000), 2_000_000
    resident = psutil.Process().memory_info
    with Loader(path, VIEWS, batch_size=8, seed=11) as loader:  # compiles, imports
        next(loader.epoch(0))
    before = resident().rss
    start = time.process_time()
    with Loader(path, VIEWS, batch_size=8, seed=11) as loader:
        assert loader.samples == count
        assert time.process_time() - start < 0.5
        epoch = loader.epoch(0, start_step=200_000)
        assert len({int(i) for _ in range(20) for i in next(epoch).index}) == 160
    assert resident().rss - before < 40 << 20


def many(path: Path, count: int) -> Path:
    """A `.beton` of `count` samples with real tables, all of which point at the same few bytes."""
    write(path, [jpeg(0)])
    opened, data = open_beton(path), path.read_bytes()
    start = data_start(3)
    sample = data[start + METADATA.itemsize : opened.data_end]
    shift = (count - 1) * METADATA.itemsize
    metadata, table = np.repeat(opened.metadata, count), np.repeat(opened.allocations, count, 0)
    metadata["image"]["data_ptr"] += shift
    metadata["tokens"] += shift
    metadata["key"]["ptr"] += shift
    table["ptr"] += shift
    table["sample_id"] = np.arange(count)[:, None]
    header = np.frombuffer(data[: HEADER.itemsize], HEADER).copy()
    header["num_samples"], header["alloc_table_ptr"] = count, start + metadata.nbytes + len(sample)
    fields = descriptors(CONTEXT).tobytes()
    path.write_bytes(b"".join([header.tobytes(), fields, metadata.tobytes(), sample, table.tobytes()]))
    return path


RANKS = """
import sys
from pathlib import Path
from harmony_fast.engine.data.loader import Loader
from harmony_fast.harmony.views import ViewsConfig
def own():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("RssAnon")]
    return int(line.split()[1]) << 10

views = ViewsConfig(global_size=32, local_size=16, local_crops=3)
rank, world_size = map(int, sys.argv[2:4])
with Loader(Path(sys.argv[1]), views, batch_size=8, seed=11, rank=rank, world_size=world_size, workers=1) as loader:
    epoch = loader.epoch(0)
    next(epoch)
    before = own()
    for _ in range(300):
        next(epoch)
    print(own() - before)
"""


def test_memory_of_a_rank_does_not_grow(tmp_path: Path) -> None:
    """Memory that is a rank's own, not the page cache's, over many batches of a file with tables of 112 MB."""
    path = many(tmp_path / "many.beton", 1_000_000)
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANKS, path, str(rank), "2"], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    grown = [int(rank.communicate(timeout=120)[0]) for rank in ranks]
    assert max(grown) < 8 << 20


def test_ffcvs_own_loader_runs_the_operation(beton: Path) -> None:
    from ffcv.loader import Loader as FFCVLoader
    from harmony_fast.engine.data.ffcv_operation import MultiCrop

    operation = MultiCrop(VIEWS, seed=11)
    pipelines = {"image": [operation], "tokens": None, "key": None}
    loader = FFCVLoader(str(beton), 13, num_workers=1, os_cache=False, pipelines=pipelines)
    for epoch in (0, 3):
        operation.set_epoch(epoch)
        ours = {int(i): (g, c) for b in batches(beton, epoch, batch_size=26) for i, g, c in zip(
            b.index, b.global_crops, b.local_crops, strict=True)}  # fmt: skip
        got = [[part.copy() for part in output] for (output,) in loader]
        large, small, status = (np.concatenate(parts) for parts in zip(*got, strict=True))
        assert not status.any() and len(large) == SAMPLES
        assert all((large[i] == ours[i][0].numpy()).all() and (small[i] == ours[i][1].numpy()).all() for i in ours)
