"""The loader: what it yields is a pure function of (seed, epoch, index), and it never hangs or hides a bad image."""

import ctypes
import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from harmony_fast.engine.data.batch import RawBatch
from harmony_fast.engine.data.beton import BetonWriter, open_beton
from harmony_fast.engine.data.crops import MultiCrop
from harmony_fast.engine.data.loader import Loader
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


def batches(path: Path, epoch: int = 3, start_step: int = 0, **options: int) -> list[RawBatch]:
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
        keys = sample_keys(11, 0, torch.arange(SAMPLES), Purpose.ORDER).tolist()
        assert orders[0].tolist() == sorted(range(SAMPLES), key=lambda i: (keys[i], i))


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


def raises_in_time(epoch: Iterator[RawBatch], message: str) -> None:
    start = time.monotonic()
    with pytest.raises(DataError, match=message):
        list(epoch)
    assert time.monotonic() - start < 10


def test_an_error_in_the_thread_reaches_the_consumer(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def generate_code(self: MultiCrop):  # type: ignore[no-untyped-def]
        def decode(indices, memory, records, storage):  # type: ignore[no-untyped-def]
            raise MemoryError("no room for the picture")

        return decode

    monkeypatch.setattr(MultiCrop, "generate_code", generate_code)
    with Loader(beton, VIEWS, batch_size=8, seed=11) as loader:
        raises_in_time(loader.epoch(0), "train.beton: the loader's thread died .*no room")


def test_a_killed_thread_does_not_hang(beton: Path) -> None:
    with Loader(beton, VIEWS, batch_size=2, seed=11) as loader:
        epoch = loader.epoch(0)
        next(epoch)
        (thread,) = [t for t in threading.enumerate() if type(t).__name__ == "_EpochThread"]
        while thread.is_alive():  # the exception is lost where Python ignores one, as in a callback
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
            thread.join(0.2)
        raises_in_time(epoch, "train.beton: the loader's thread died .*System(Exit|Error)")
