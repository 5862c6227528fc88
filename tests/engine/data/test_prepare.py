"""`prepare` end to end: good data is kept exactly, bad data is listed, killed processes cost nothing but time."""

import gzip
import io
import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from ffcv.reader import Reader
from harmony_fast.engine.data.beton import open_beton
from harmony_fast.engine.data.prepare import Summary, prepare
from harmony_fast.engine.data.tokens import tokenize
from harmony_fast.engine.errors import DataError
from PIL import Image


def run(sources: object, output: Path, **options: object) -> Summary:
    return prepare(sources, output, **{"context": 16, "workers": 2, "progress": False, **options})


def rejects(summary: Summary) -> dict[str | None, str]:
    lines = [json.loads(line) for line in summary.rejects_path.read_text().splitlines()]
    assert sum(summary.left_out.values()) == len(lines)
    return {line["key"]: line["reason"] for line in lines}


def stored(path: Path) -> dict[str, tuple[bytes, np.ndarray]]:
    """Key -> JPEG bytes and tokens, found by way of FFCV's own reader."""
    reader, content = Reader(str(path)), path.read_bytes()
    sizes = dict(zip(reader.alloc_table["ptr"].tolist(), reader.alloc_table["size"].tolist(), strict=True))

    def at(ptr: int) -> bytes:
        return content[ptr : ptr + sizes[ptr]]

    rows = [(row[0]["data_ptr"], row[1], row[2]["ptr"]) for row in reader.metadata]
    return {at(int(k)).decode(): (at(int(i)), np.frombuffer(at(int(t)), np.int32)) for i, t, k in rows}


def pixels(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")).astype(int)


def test_good_samples_are_kept_exactly(tar: Callable, pairs: Callable, tmp_path: Path) -> None:
    from open_clip.tokenizer import SimpleTokenizer

    shards = [tar("a.tar", pairs(3)), tar("b.tar", pairs(2, start=3))]
    summary = run(shards, tmp_path / "new" / "folder" / "x.beton")
    files = dict(pairs(5))
    assert list(stored(summary.path)) == open_beton(summary.path).keys() == [f"{i:06d}" for i in range(5)]
    for key, (jpeg, tokens) in stored(summary.path).items():
        assert jpeg == files[f"{key}.jpg"]
        assert tokens.tolist() == SimpleTokenizer(context_length=16)(files[f"{key}.txt"].decode())[0].tolist()
    assert (summary.written, summary.passed_through, summary.captions_cut) == (5, 5, 0)
    assert rejects(summary) == {} and "5 samples" in str(summary)
    assert sorted(p.name for p in summary.path.parent.iterdir()) == ["x.beton", "x.rejects.jsonl"]


def test_what_is_shown(tar: Callable, pairs: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sources = [tar("a.tar", [*pairs(2), ("alone.txt", b"x")]), tmp_path / "." / "a.tar"]  # twice the same
    summary = run(sources, tmp_path / "x.beton", progress=True)
    shown = capsys.readouterr()
    assert "100%" in shown.err and "3 images" in shown.err
    assert str(summary) == shown.out.strip() and summary.written == 2
    assert "1  no image" in shown.out and str(summary.rejects_path) in shown.out


def test_the_file_is_the_same_for_any_number_of_workers(tar: Callable, pairs: Callable, tmp_path: Path) -> None:
    for number in range(5):
        tar(f"{number}.tar", pairs(number + 1, 10 * number))
    one = run(tmp_path / "{0..4}.tar", tmp_path / "one.beton", workers=1)
    for name, sources in {"folder": tmp_path, "glob": f"{tmp_path}/*.tar"}.items():
        assert run(sources, tmp_path / f"{name}.beton", workers=3).path.read_bytes() == one.path.read_bytes()
    first = run(tmp_path, tmp_path / "first.beton", limit=4)
    assert open_beton(first.path).keys() == open_beton(one.path).keys()[:4]


def odd_images(picture: Callable, encoded: Callable) -> dict[str, bytes]:
    image = picture(0, 80, 60)
    rgba = image.convert("RGBA")
    rgba.putalpha(128)
    deep = Image.fromarray((np.asarray(image.convert("L")).astype(np.uint16) << 8) + 7)
    return {
        "gray.jpg": encoded(image.convert("L")),
        "cmyk.jpg": encoded(image.convert("CMYK"), quality=95),
        "progressive.jpg": encoded(image, progressive=True),
        "large.jpg": encoded(picture(0, 400, 300)),
        "heavy.jpg": encoded(image, comment=b"x" * 60_000) + bytes(100_000),
        # Bytes too many before a restart marker: read with a warning, by PIL without one.
        "sloppy.jpg": b"\0\x11\x22\xff\xd0".join(encoded(image, restart_marker_blocks=2).split(b"\xff\xd0", 1)),
        "alpha.png": encoded(rgba, "PNG"),
        "palette.png": encoded(image.quantize(32), "PNG"),
        "deep.png": encoded(deep, "PNG"),
        "still.gif": encoded(image, "GIF"),
        "webp.webp": encoded(image, "WEBP", quality=95),
        "misnamed.jpg": encoded(image, "PNG"),
    }


def test_odd_images_become_plain_jpegs(tar: Callable, picture: Callable, encoded: Callable, tmp_path: Path) -> None:
    odd = odd_images(picture, encoded)
    files = [pair for name, data in odd.items() for pair in ((name, data), (name.split(".")[0] + ".txt", b"words"))]
    summary = run(tar("a.tar", files), tmp_path / "x.beton", max_side=100)
    assert rejects(summary) == {} and summary.passed_through == 1
    kept = {key: jpeg for key, (jpeg, _) in stored(summary.path).items()}
    assert kept["progressive"] == odd["progressive.jpg"]
    assert pixels(kept["large"]).shape == (75, 100, 3)
    image = np.asarray(picture(0, 80, 60)).astype(int)
    gray = np.asarray(picture(0, 80, 60).convert("L"))[..., None].astype(int)
    expected = dict.fromkeys(kept, image) | {"gray": gray, "deep": gray, "alpha": (image + 255) // 2}
    for key in kept.keys() - {"large"}:
        assert Image.open(io.BytesIO(kept[key])).mode == "RGB"
        tolerance = {"palette": 20, "still": 20, "cmyk": 6}.get(key, 3)
        assert abs(pixels(kept[key]) - expected[key]).mean() < tolerance, key


def bad_samples(picture: Callable, encoded: Callable) -> dict[str, tuple[list[tuple[str, bytes]], str]]:
    good, frames = encoded(picture()), [picture(i) for i in range(3)]
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    moving = {"save_all": True, "append_images": frames[1:]}
    bomb = encoded(Image.new("1", (40_000, 10_000)), "PNG")
    images = {
        "cut": ("jpg", good[: len(good) // 2], "image truncated or corrupt"),
        "cutpng": ("png", encoded(noise, "PNG")[:5000], "image truncated or corrupt"),
        "html": ("jpg", b"<html>404</html>", "image not readable"),
        "nothing": ("jpg", b"", "image not readable"),
        "gif": ("gif", encoded(frames[0], "GIF", **moving), "image animated"),
        "webp": ("webp", encoded(frames[0], "WEBP", **moving), "image animated"),
        "apng": ("png", encoded(frames[0], "PNG", **moving), "image animated"),
        "pixel": ("png", encoded(Image.new("RGB", (1, 1)), "PNG"), "image smaller than 8 px"),
        "sliver": ("png", encoded(Image.new("RGB", (3000, 20)), "PNG"), "image smaller than 8 px"),
        "bomb": ("png", bomb, "image too large (decompression bomb)"),
    }
    captions = {
        "missing": ([], "caption missing"),
        "null": ([("null.json", b'{"caption": null}')], "caption missing"),
        "number": ([("number.json", b'{"caption": 5}')], "caption missing"),
        "object": ([("object.json", b'{"caption": {"en": "a dog"}}')], "caption missing"),
        "bare": ([("bare.json", b"true")], "caption missing"),
        "broken": ([("broken.json", b"{")], "json not readable"),
        "empty": ([("empty.txt", b"")], "caption empty"),
        "blank": ([("blank.txt", " \n\t\0\x07\u200b\u00a0".encode())], "caption empty"),
        "latin": ([("latin.txt", "café".encode("latin-1"))], "caption not UTF-8"),
        "half": ([("half.json", b'{"caption": "\\ud800"}')], "caption not UTF-8"),
    }
    samples = {key: ([(f"{key}.{ext}", data), (f"{key}.txt", b"x")], why) for key, (ext, data, why) in images.items()}
    samples |= {key: ([(f"{key}.jpg", good), *files], why) for key, (files, why) in captions.items()}
    return samples | {"alone": ([("alone.txt", b"no picture")], "no image")}


def test_bad_samples_are_left_out_and_listed(
    tar: Callable, pairs: Callable, picture: Callable, encoded: Callable, tmp_path: Path
) -> None:
    bad = bad_samples(picture, encoded)
    files = pairs(1) + [file for files, _ in bad.values() for file in files] + pairs(1, start=1)
    summary = run(tar("a.tar", files), tmp_path / "x.beton")
    assert rejects(summary) == {key: reason for key, (_, reason) in bad.items()}
    assert open_beton(summary.path).keys() == ["000000", "000001"]
    assert summary.left_out["image animated"] == 3
    assert str(tmp_path / "a.tar") in summary.rejects_path.read_text()


def test_captions_long_and_from_json(tar: Callable, picture: Callable, encoded: Callable, tmp_path: Path) -> None:
    good, words = encoded(picture()), "many words " * 909 + "!"
    marked = b"\xef\xbb\xbfmarked"
    files = [("long.jpg", good), ("long.txt", words.encode()), ("j.jpg", good), ("j.json", b'{"caption": "a dog"}')]
    summary = run(tar("a.tar", [*files, ("bom.jpg", good), ("bom.txt", marked)]), tmp_path / "x.beton")
    tokens = {key: tokens.tolist() for key, (_, tokens) in stored(summary.path).items()}
    assert summary.captions_cut == 1 and len(words) == 10_000
    assert tokens["long"][0] == 49406 and tokens["long"][-1] == 49407 and 0 not in tokens["long"]
    assert tokens["j"] == tokenize("a dog", 16)[0].tolist()
    assert tokens["bom"] == tokenize("marked", 16)[0].tolist()


@pytest.mark.parametrize(
    "caption",
    ["a cat", "word " * 14, "word " * 15, "x" * 3000, "漢字" * 400, "<b>&amp;</b> é☃", "\n " * 999 + "a cat"],
)
def test_tokens_are_those_of_open_clip(caption: str) -> None:
    from open_clip.tokenizer import SimpleTokenizer

    tokens, cut = tokenize(caption, 16)
    assert tokens.tolist() == SimpleTokenizer(context_length=16)(caption)[0].tolist()
    assert cut == (len(SimpleTokenizer().encode(caption)) > 14)


def test_keys_twice_and_names_that_climb(tar: Callable, pairs: Callable, tmp_path: Path) -> None:
    climbing = [(f"../../{name}", data) for name, data in pairs(1)]
    shards = [
        tar("a.tar", pairs(2) + pairs(1)),
        tar("b.tar", pairs(1) + climbing + [("README", b"x"), (".h.jpg", b"x")]),
    ]
    before = sorted(tmp_path.parent.rglob("*"))
    summary = run(shards, tmp_path / "x.beton")
    assert open_beton(summary.path).keys() == ["000000", "000001", "000000", "../../000000"]
    assert rejects(summary) == {"000000": "key seen before in this shard"}
    assert set(tmp_path.parent.rglob("*")) - set(before) == {summary.path, summary.rejects_path}


@pytest.mark.parametrize("compressed", [False, True])
def test_a_tar_that_breaks_off_gives_what_is_complete(
    tar: Callable, pairs: Callable, tmp_path: Path, compressed: bool
) -> None:
    content = tar("whole.tar", pairs(8)).read_bytes()
    content = gzip.compress(content) if compressed else content
    for cut in (len(content) * 5 // 8, len(content) * 3 // 4):
        (tmp_path / "cut.tar").write_bytes(content[:cut])
        summary = run(tmp_path / "cut.tar", tmp_path / "x.beton")
        assert 1 <= summary.written < 8
        assert rejects(summary) == {None: "shard cut short or damaged"}
        assert "shard cut short" in str(summary)


def test_a_tar_damaged_inside_is_not_taken_for_its_end(tar: Callable, pairs: Callable, tmp_path: Path) -> None:
    content = bytearray(tar("a.tar", pairs(4)).read_bytes())
    header = content.index(b"000002.jpg")
    content[header : header + 200] = b"\xff" * 200
    (tmp_path / "a.tar").write_bytes(content)
    summary = run(tmp_path / "a.tar", tmp_path / "x.beton")
    assert summary.written == 2 and rejects(summary) == {None: "shard cut short or damaged"}


def test_sources_and_options_that_cannot_be_used(tar: Callable, pairs: Callable, tmp_path: Path) -> None:
    good = tar("good.tar", pairs(1))
    (tmp_path / "text.tar").write_text("not a tar, though longer than a header would be\n" * 99)
    (tmp_path / "none.tar").touch()
    (tmp_path / "empty").mkdir()
    wrong = {
        "text.tar": "not a tar",
        "none.tar": "not a tar",
        "missing.tar": "no such file",
        "*.zip": "no file matches",
        "empty": "no tar in this folder",
        "{0..1}.tar": "no such file",
        "long" * 99: "File name too long",
    }
    for source, message in wrong.items():
        with pytest.raises(DataError, match=message) as error:
            run([good, f"{tmp_path}/{source}"], tmp_path / "x.beton")
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    for options in ({"context": 2}, {"quality": 101}, {"min_side": 600}, {"limit": 0}):
        with pytest.raises(DataError, match=next(iter(options))):
            run(good, tmp_path / "x.beton", **options)
    with pytest.raises(DataError, match="is a folder"):
        run(good, tmp_path / "empty")
    assert not list(tmp_path.glob("x.*"))


def test_a_pipe_is_refused(tar: Callable, pairs: Callable, tmp_path: Path) -> None:
    """As in `prepare <(command) x.beton`."""
    tar("good.tar", pairs(1))
    reading, writing = os.pipe()
    try:
        with pytest.raises(DataError, match=rf"/dev/fd/{reading}: is a pipe, .* write it to a file"):
            run([tmp_path / "good.tar", f"/dev/fd/{reading}"], tmp_path / "x.beton")
    finally:
        os.close(reading), os.close(writing)


def test_no_usable_sample_is_an_error(tar: Callable, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no sample in .*usable.*no image: 1"):
        run(tar("a.tar", [("a.txt", b"alone")]), tmp_path / "x.beton")
    assert not (tmp_path / "x.beton").exists() and not (tmp_path / "x.beton.parts").exists()


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """As on a full disk, writing further than `size` bytes into a file fails in this process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_can_be_continued(tar: Callable, pairs: Callable, tmp_path: Path) -> None:
    shard, output = tar("a.tar", pairs(30)), tmp_path / "x.beton"
    with files_at_most(10_000), pytest.raises(DataError, match=r"MiB are needed .* MiB are free|GiB are free") as error:
        run(shard, output)
    assert "\n" not in str(error.value) and not output.exists() and not output.with_name("x.beton.tmp").exists()
    assert run(shard, output).written == 30
