"""The `.beton` files we write are FFCV's, and what is not one is refused in one line."""

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from harmony_fast.engine.data import beton
from harmony_fast.engine.data.beton import BetonWriter, open_beton
from harmony_fast.engine.errors import DataError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

Sample = tuple[bytes, int, int, np.ndarray, str]


def some_samples(picture: Callable[..., Image.Image], encoded: Callable[..., bytes], count: int) -> list[Sample]:
    tokens = np.arange(count * 16, dtype=np.int32).reshape(count, 16)
    return [(encoded(picture(i), quality=90), 96, 64, tokens[i], f"dir/ключ-{i}") for i in range(count)]


def write(path: Path, samples: list[Sample], page_size: int = beton.PAGE) -> Path:
    with BetonWriter(path, len(samples), 16, page_size) as writer:
        for sample in samples:
            writer.write(*sample)
    return path


@pytest.fixture
def samples(picture: Callable[..., Image.Image], encoded: Callable[..., bytes]) -> list[Sample]:
    return some_samples(picture, encoded, 5)


def test_record_types_are_those_of_ffcv() -> None:
    from ffcv import types
    from ffcv.fields import BytesField, NDArrayField, RGBImageField

    fields = [RGBImageField(write_mode="jpg"), NDArrayField(np.dtype("int32"), (77,)), BytesField()]
    assert (types.CURRENT_VERSION, types.HeaderType, types.FieldDescType) == (beton.VERSION, beton.HEADER, beton.FIELD)
    assert types.ALLOC_TABLE_TYPE == beton.ALLOCATION
    theirs = types.get_metadata_type(fields)
    assert [theirs.fields[name] for name in theirs.names] == [beton.METADATA.fields[n] for n in beton.METADATA.names]
    assert theirs.itemsize == beton.METADATA.itemsize
    for ours, field in zip(beton.descriptors(77), fields, strict=True):
        assert types.TYPE_ID_HANDLER[int(ours["type_id"])] is type(field)
        assert ours["arguments"].tobytes() == field.to_binary().tobytes()


@pytest.mark.parametrize("page_size", [beton.PAGE, 4096])
@pytest.mark.parametrize("os_cache", [True, False])
def test_stock_ffcv_reads_it(samples: list[Sample], tmp_path: Path, page_size: int, os_cache: bool) -> None:
    from ffcv.fields.decoders import SimpleRGBImageDecoder
    from ffcv.libffcv import imdecode
    from ffcv.loader import Loader

    path = write(tmp_path / "x.beton", samples, page_size)
    assert path.stat().st_size < 60_000  # nothing is padded to whole pages
    loader = Loader(
        str(path), 2, 1, os_cache, drop_last=False, pipelines={"image": [SimpleRGBImageDecoder()], "tokens": None}
    )
    tokens = Loader(str(path), 2, 1, os_cache, drop_last=False, pipelines={"image": None, "key": None})
    assert loader.reader.field_names == ["image", "tokens", "key"]
    images, keys = zip(*((images.copy(), keys.numpy().copy()) for images, keys in loader), strict=True)
    for image, key, (jpeg, width, height, _, name) in zip(
        np.concatenate(images), np.concatenate(keys), samples, strict=True
    ):
        expected = np.empty((height, width, 3), np.uint8)
        imdecode(np.frombuffer(jpeg, np.uint8), expected, height, width, height, width, 0, 0, 1, 1, False, False)
        np.testing.assert_array_equal(image, expected)
        assert key[: len(name.encode())].tobytes().decode() == name
    read = np.concatenate([batch[0].numpy().copy() for batch in tokens])
    np.testing.assert_array_equal(read, np.stack([sample[3] for sample in samples]))


def test_no_sample_crosses_a_page(samples: list[Sample], tmp_path: Path) -> None:
    path = write(tmp_path / "x.beton", samples, 4096)
    table = np.fromfile(path, beton.ALLOCATION, offset=path.stat().st_size - 15 * beton.ALLOCATION.itemsize)
    pages = table["ptr"].reshape(5, 3) // 4096, (table["ptr"] + table["size"] - 1).reshape(5, 3) // 4096
    assert (pages[0] == pages[0][:, :1]).all() and (pages[1] == pages[0]).all()
    with pytest.raises(ValueError, match="does not fit a page"):
        write(tmp_path / "y.beton", samples, 1024)


def test_metadata_is_flushed_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: list[Sample]) -> None:
    whole = write(tmp_path / "whole.beton", samples).read_bytes()
    monkeypatch.setattr(beton, "CHUNK", 2)
    assert write(tmp_path / "chunks.beton", samples).read_bytes() == whole
    assert len(open_beton(tmp_path / "chunks.beton")) == 5


class Slow(io.FileIO):
    """A file of which the system writes at most 100 bytes at a time."""

    def write(self, data: object) -> int:
        return super().write(memoryview(data)[:100])


def test_a_disk_that_takes_little_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: list[Sample]
) -> None:
    """Whichever call writes: what was not taken is offered again."""
    whole, pwrite = write(tmp_path / "whole.beton", samples).read_bytes(), os.pwrite
    monkeypatch.setattr(beton, "open", lambda path, *_, **__: io.BufferedWriter(Slow(path, "w")), raising=False)
    monkeypatch.setattr(os, "pwrite", lambda file, data, place: pwrite(file, data[:100], place))
    assert write(tmp_path / "slow.beton", samples).read_bytes() == whole


def test_opened_file_knows_its_context_and_keys(samples: list[Sample], tmp_path: Path) -> None:
    opened = open_beton(write(tmp_path / "x.beton", samples))
    assert (len(opened), opened.context, opened.page_size) == (5, 16, beton.PAGE)
    assert opened.keys([4, 0, -1]) == ["dir/ключ-4", "dir/ключ-0", "dir/ключ-4"]
    assert opened.keys() == [f"dir/ключ-{i}" for i in range(5)]
    assert opened.metadata["image"]["width"].tolist() == [96] * 5
    with pytest.raises(IndexError):
        opened.keys([5])


def test_a_file_appears_whole_or_not_at_all(samples: list[Sample], tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    for announced in (4, 6):
        with pytest.raises(ValueError, match="announced"), BetonWriter(path, announced, 16) as writer:
            for sample in samples:
                writer.write(*sample)
                assert not path.exists()
    with pytest.raises(ValueError, match="int32 tokens"), BetonWriter(path, 1, 16) as writer:
        writer.write(samples[0][0], 96, 64, np.zeros(16, np.int64), "key")
    assert list(tmp_path.iterdir()) == []


def test_refuses_what_is_not_a_beton(samples: list[Sample], tmp_path: Path) -> None:
    path = write(tmp_path / "x.beton", samples)
    content = path.read_bytes()

    def refused(data: bytes, message: str) -> None:
        path.write_bytes(data)
        with pytest.raises(DataError, match=message) as error:
            open_beton(path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)

    refused(b"", "not an FFCV file")
    refused(b"PK\3\4 something else entirely, and long enough for a header", "not an FFCV file")
    refused(content[:-1], "cut short")
    refused(content[:1000], "cut short")
    refused(content.replace(b"tokens", b"labels"), r"its fields \(image, labels, key\)")
    refused(content[:8] + bytes(8) + content[16:], "holds no sample")
    refused(content[:-24] + b"\xff" * 24, "outside the file")
    with pytest.raises(DataError, match="no such file"):
        open_beton(tmp_path / "missing.beton")
    with pytest.raises(DataError, match="cannot be read"):
        open_beton(tmp_path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_refused_or_opened(data: st.DataObject, samples: list[Sample], tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    if not path.exists():
        write(path, samples)
        (tmp_path / "content").write_bytes(path.read_bytes())
    content = bytearray((tmp_path / "content").read_bytes())
    tables = st.integers(0, beton.DATA_START + 5 * beton.METADATA.itemsize) | st.integers(
        len(content) - 360, len(content) - 1
    )
    for place in data.draw(st.lists(tables | st.integers(0, 24), max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    damaged = tmp_path / "damaged.beton"
    damaged.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    try:
        assert len(open_beton(damaged).keys()) >= 1
    except DataError as error:
        assert "\n" not in str(error)
    os.unlink(damaged)
