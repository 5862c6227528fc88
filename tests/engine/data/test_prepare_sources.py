"""`prepare` from folders and tables; several captions, duplicates, conditions, another tokenizer."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from harmony_fast.engine.config import parse_config
from harmony_fast.engine.data import assemble, ensure_data
from harmony_fast.engine.data.assemble import first_occurrences
from harmony_fast.engine.data.beton import open_beton
from harmony_fast.engine.data.prepare import Summary, prepare
from harmony_fast.engine.data.sources import find_chunks
from harmony_fast.engine.data.tokens import tokenize
from harmony_fast.engine.errors import DataError


def run(sources: object, output: Path, **options: object) -> Summary:
    return prepare(sources, output, **{"context": 16, "workers": 2, "progress": False, **options})


def rejects(summary: Summary) -> list[tuple[str | None, str]]:
    lines = [json.loads(line) for line in summary.rejects_path.read_text().splitlines()]
    return [(line["key"], line["reason"]) for line in lines]


def captions(path: Path) -> dict[str, list[list[int]]]:
    """Key -> token rows of all captions."""
    beton, content = open_beton(path), path.read_bytes()
    rows = {}
    for key, record in zip(beton.keys(), beton.metadata, strict=True):
        start, size = record["captions"].tolist() if beton.several else (int(record["tokens"]), 4 * beton.context)
        rows[key] = np.frombuffer(content[start : start + size], "<i4").reshape(-1, beton.context).tolist()
    return rows


def tokens(*texts: str) -> list[list[int]]:
    return [tokenize(text, 16)[0].tolist() for text in texts]


def images(path: Path) -> list[bytes]:
    beton, content = open_beton(path), path.read_bytes()
    sizes = beton.image_sizes(np.arange(len(beton)))
    starts = beton.metadata["image"]["data_ptr"].tolist()
    return [content[start : start + size] for start, size in zip(starts, sizes.tolist(), strict=True)]


@pytest.fixture
def jpegs(picture: Callable, encoded: Callable) -> list[bytes]:
    return [encoded(picture(i), quality=90) for i in range(8)]


# Sources


def test_a_folder_tree(jpegs: list[bytes], picture: Callable, encoded: Callable, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    files = {
        "b/IMG.2020.01.JPG": jpegs[0], "b/IMG.2020.01.txt": b"with dots", "a.png": encoded(picture(9), "PNG"),
        "a.json": b'{"caption": "json"}', "c/d/e/deep.jpeg": jpegs[1], "c/d/e/deep.txt": b"deep", "alone.jpg": jpegs[2],
        "text.txt": b"no image", ".hidden.jpg": jpegs[3], "00000_stats.json": b"{}", "notes.md": b"x",
        "broken.jpg": jpegs[4][:-300], "broken.txt": b"x",
    }  # fmt: skip
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    (root / "gone.jpg").symlink_to(root / "nowhere.jpg")
    (root / "loop").symlink_to(root)
    (root / "sink.jpg").symlink_to("/dev/null")
    summary = run(root, tmp_path / "x.beton")
    assert captions(summary.path) == dict(
        zip(["a", "b/IMG.2020.01", "c/d/e/deep"], ([row] for row in tokens("json", "with dots", "deep")), strict=True)
    )
    assert rejects(summary) == [
        ("alone", "caption missing"), ("broken", "image truncated or corrupt"), ("gone", "file not found"),
        ("sink", "file not readable"), ("text", "no image"),
    ]  # fmt: skip
    assert images(summary.path)[1:] == [jpegs[0], jpegs[1]]


def test_a_folder_in_many_chunks_does_not_depend_on_workers(
    jpegs: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harmony_fast.engine.data import folders

    monkeypatch.setattr(folders, "SAMPLES_PER_CHUNK", 3)
    for i in range(20):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / f"{i}.jpg").write_bytes(jpegs[i % 8])
        (tmp_path / "set" / f"{i}.txt").write_text(f"number {i}")
    assert len(find_chunks(tmp_path / "set", 1)) == 7
    one, two = (run(tmp_path / "set", tmp_path / f"{n}.beton", workers=n) for n in (1, 2))
    assert one.written == 20 and one.path.read_bytes() == two.path.read_bytes()


def write_table(path: Path, columns: list[str], rows: list[list[object]]) -> Path:
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        columns_of = {name: [row[i] for row in rows] for i, name in enumerate(columns)}
        parquet.write_table(pyarrow.table(columns_of), path, row_group_size=3)
        return path
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([columns, *rows])
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_tables(jpegs: list[bytes], tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from harmony_fast.engine.data import tables

    monkeypatch.setattr(tables, "ROWS_PER_CHUNK", 2)
    monkeypatch.setattr(tables, "PARQUET_ROWS_PER_CHUNK", 2)
    (tmp_path / "img").mkdir()
    for i, data in enumerate(jpegs):
        (tmp_path / "img" / f"{i}.jpg").write_bytes(data)
    texts = ["plain", 'quotes " and, commas', "two\nlines", "Ünï ☃", "", "last"]
    rows = [[f"img/{i}.jpg", text, i] for i, text in enumerate(texts)]
    rows += [["img/none.jpg", "lost", 6], ["", "no name", 7], [str(tmp_path / "img" / "6.jpg"), "absolute", 8]]
    summary = run(write_table(tmp_path / f"t{suffix}", ["filepath", "title", "number"], rows), tmp_path / "x.beton")
    kept = {f"img/{i}.jpg": text for i, text in enumerate(texts) if text} | {str(tmp_path / "img/6.jpg"): "absolute"}
    assert captions(summary.path) == {key: tokens(text) for key, text in kept.items()}
    assert images(summary.path) == [jpegs[i] for i in (0, 1, 2, 3, 5, 6)]
    assert rejects(summary) == [
        ("img/4.jpg", "caption empty"), ("img/none.jpg", "file not found"), ("000000007", "no image")
    ]  # fmt: skip
    assert json.loads(summary.rejects_path.read_text().splitlines()[0])["shard"] == str(tmp_path / f"t{suffix}")
    where = run(tmp_path / f"t{suffix}", tmp_path / "y.beton", where="number >= 2 and number != 3")
    assert list(captions(where.path)) == ["img/2.jpg", "img/5.jpg", str(tmp_path / "img/6.jpg")]


def test_rows_of_the_same_image_are_its_captions(
    jpegs: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harmony_fast.engine.data import tables

    monkeypatch.setattr(tables, "ROWS_PER_CHUNK", 2)
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(jpegs[i])
    rows = [[f"{i}.jpg", n, f"caption {i} {n}"] for i, count in enumerate((5, 1, 3)) for n in range(count)]
    table = write_table(tmp_path / "flickr.csv", ["image", "number", "comment"], rows)
    every = captions(run(table, tmp_path / "all.beton", captions="all").path)
    assert every == {
        f"{i}.jpg": tokens(*(f"caption {i} {n}" for n in range(count))) for i, count in enumerate((5, 1, 3))
    }
    assert captions(run(table, tmp_path / "one.beton").path) == {key: rows[:1] for key, rows in every.items()}


def test_columns_are_found_or_asked_for(jpegs: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(jpegs[0])
    odd = write_table(tmp_path / "odd.csv", ["bild", "de", "en"], [["0.jpg", "ein Bild", "a picture"]])
    for options, message in (
        ({}, r"odd.csv: which column is the image\? give --image-column; it has: bild, de, en"),
        ({"image_column": "bild"}, r"which column is the caption\? give --caption-column"),
        ({"image_column": "bilt"}, "has no column 'bilt'"),
    ):
        with pytest.raises(DataError, match=message):
            run(odd, tmp_path / "x.beton", **options)
    chosen = {"image_column": "bild", "caption_columns": ["en", "de"]}
    assert captions(run(odd, tmp_path / "x.beton", **chosen).path) == {"0.jpg": tokens("a picture")}
    both = run(odd, tmp_path / "y.beton", **chosen, captions="all")
    assert captions(both.path) == {"0.jpg": tokens("a picture", "ein Bild")}
    numbered = write_table(tmp_path / "n.csv", ["image", "caption_1", "caption_2"], [["0.jpg", "first", "second"]])
    assert captions(run(numbered, tmp_path / "z.beton", captions="all").path) == {"0.jpg": tokens("first", "second")}


def test_tables_that_cannot_be_used(tmp_path: Path) -> None:
    write_table(tmp_path / "url.csv", ["url", "caption"], [["https://example.org/a.jpg", "a"]])
    (tmp_path / "not.parquet").write_bytes(b"not parquet at all, though long enough for one")
    (tmp_path / "empty.csv").touch()
    (tmp_path / "head.csv").write_text("image,caption\n")
    for name, message in {
        "url.csv": "holds web addresses .* img2dataset first", "not.parquet": "not a parquet file",
        "empty.csv": "the first line must name the columns", "head.csv": "nothing to read",
    }.items():  # fmt: skip
        with pytest.raises(DataError, match=message) as error:
            run(tmp_path / name, tmp_path / "x.beton")
        assert "\n" not in str(error.value) and name in str(error.value)


def test_damaged_parquet_files_are_named(tar: Callable, pairs: Callable, tmp_path: Path) -> None:
    """Their tables at the end are whole, so the damage shows only when the pages are read."""
    shard = tar("00000.tar", pairs(2))
    for name, column in (("t", "image"), ("00000", "key")):
        path = write_table(tmp_path / f"{name}.parquet", [column, "caption"], [[f"{i}.jpg", f"{i}"] for i in range(9)])
        content = bytearray(path.read_bytes())
        content[4:60] = b"\xff" * 56
        path.write_bytes(content)
    for source, options in ((tmp_path / "t.parquet", {}), (shard, {"where": "caption == 'x'"})):
        with pytest.raises(DataError, match=rf"{source.stem}\.parquet: not a parquet file, or damaged: ") as error:
            run(source, tmp_path / "x.beton", **options)
        assert "\n" not in str(error.value)


def test_images_inside_a_parquet_file(jpegs: list[bytes], tmp_path: Path) -> None:
    rows = [[{"bytes": data, "path": f"{i}.jpg"}, [f"number {i}", "again"]] for i, data in enumerate(jpegs)]
    summary = run(write_table(tmp_path / "hf.parquet", ["image", "captions"], rows), tmp_path / "x.beton")
    assert images(summary.path) == jpegs
    assert captions(summary.path)["000000007"] == tokens("number 7")


def test_training_data_are_made_as_they_are_read(tiny: dict, tar: Callable, pairs: Callable, tmp_path: Path) -> None:
    merges = tmp_path / "merges.txt.gz"
    merges.write_bytes(gzip.compress(b"#version\nt h\n"))
    files = [pairs(1)[0], ("000000.json", b'["the first", "another"]')]
    tiny["data"] |= {
        "train": str(tmp_path / "x.beton"), "prepare_from": [str(tar("a.tar", files))], "tokenizer": str(merges),
        "captions": "all",
    }  # fmt: skip
    ensure_data(parse_config(tiny, "test"))
    expected = [tokenize(text, 16, str(merges))[0].tolist() for text in ("the first", "another")]
    assert captions(tmp_path / "x.beton") == {"000000": expected}


def test_what_img2dataset_writes_beside_the_tars(tar: Callable, pairs: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for n in (0, 1):
        tar(f"set/0000{n}.tar", pairs(2, 2 * n))
        (folder / f"0000{n}_stats.json").write_text("{}")
        write_table(folder / f"0000{n}.parquet", ["key", "url"], [["000000", "https://example.org"]])
    for source in (folder, f"{folder}/*", f"{folder}/{{00000..00001}}.tar"):
        assert run(source, tmp_path / "out" / "x.beton").written == 4


def test_sources_of_all_kinds_together(tar: Callable, pairs: Callable, jpegs: list[bytes], tmp_path: Path) -> None:
    shard = tar("a.tar", pairs(2))
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "x.jpg").write_bytes(jpegs[5])
    (tmp_path / "tree" / "x.txt").write_text("tree")
    table = write_table(tmp_path / "t.tsv", ["image", "caption"], [["tree/x.jpg", "row"]])
    summary = run([table, shard, tmp_path / "tree"], tmp_path / "x.beton")
    assert open_beton(summary.path).keys() == ["tree/x.jpg", "000000", "000001", "x"]


# Several captions


LISTS = {
    "json-list": {"json": b'["one", "two", " "]'},
    "in-caption": {"json": b'{"caption": ["one", "two"]}', "txt": b"['one', 'two']"},
    "captions": {"json": b'{"captions": ["one", "two"], "caption": "other"}'},
    "txt-json": {"txt": b'["one", "two"]'},
    "txt-python": {"txt": b"['one', \"two\"]"},
}


def test_lists_of_captions(tar: Callable, jpegs: list[bytes], tmp_path: Path) -> None:
    samples = {**LISTS, "lines": {"txt": b"one\n\n two \n"}, "single": {"txt": b"[not a list"}}
    samples["unhashable"] = {"txt": b"[{[]: 1}]"}
    files = [f for key, parts in samples.items() for f in ((f"{key}.jpg", jpegs[0]), *(
        (f"{key}.{extension}", data) for extension, data in parts.items()))]  # fmt: skip
    shard = tar("a.tar", files)
    one, every = (captions(run(shard, tmp_path / f"{c}.beton", captions=c).path) for c in ("one", "all"))
    assert {key: one[key] for key in LISTS} == dict.fromkeys(LISTS, tokens("one"))
    assert {key: every[key] for key in LISTS} == dict.fromkeys(LISTS, tokens("one", "two"))
    assert (one["lines"], every["lines"]) == (tokens("one\n\n two \n"), tokens("one", " two "))
    assert one["single"] == every["single"] == tokens("[not a list")
    assert one["unhashable"] == every["unhashable"] == tokens("[{[]: 1}]")


def test_a_file_with_several_captions_is_still_ffcvs(tar: Callable, jpegs: list[bytes], tmp_path: Path) -> None:
    from ffcv.loader import Loader

    files = [
        f for i in range(6) for f in ((f"{i}.jpg", jpegs[i]), (f"{i}.json", json.dumps([f"{i}"] * (i + 1)).encode()))
    ]
    path = run(tar("a.tar", files), tmp_path / "x.beton", captions="all").path
    loader = Loader(str(path), 3, 1, pipelines={"image": None, "key": None, "captions": None})
    assert loader.reader.field_names == ["image", "tokens", "key", "captions"]
    read = np.concatenate([batch[0].numpy().copy() for batch in loader])
    assert read.tolist() == [rows[0] for rows in captions(path).values()]
    assert [len(rows) for rows in captions(path).values()] == [1, 2, 3, 4, 5, 6]


def test_a_sample_as_large_as_a_page(
    tar: Callable, picture: Callable, encoded: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several captions the first is stored twice: where image, caption and key fill a page, the page is larger."""
    monkeypatch.setattr(assemble, "PAGE", 4096)
    size = 4096 - 4 * 16 - len("k")
    image = encoded(picture(), comment=b"x" * (size - len(encoded(picture(), comment=b"x")) + 1))
    assert len(image) == size
    shard = tar("a.tar", [("k.jpg", image), ("k.txt", b"words")])
    files = [run(shard, tmp_path / f"{c}.beton", captions=c).path for c in ("one", "all")]
    assert [open_beton(file).page_size for file in files] == [4096, 8192]


# Duplicates and conditions


def test_duplicates_across_shards(tar: Callable, pairs: Callable, tmp_path: Path) -> None:
    (_, image), _ = pairs(1)
    broken = [("bad.jpg", image[:-300]), ("bad.txt", b"x")]
    tar("0.tar", [("silent.jpg", image), ("silent.txt", b""), *broken])
    tar("1.tar", pairs(4)), tar("2.tar", [*pairs(3, 2), *broken, ("copy.jpg", image), ("copy.txt", b"x")])
    plain = run(tmp_path / "{0..2}.tar", tmp_path / "plain.beton")
    assert plain.written == 8 and all(reason != "duplicate of an earlier image" for _, reason in rejects(plain))
    for workers in (1, 3):
        summary = run(tmp_path / "{0..2}.tar", tmp_path / f"{workers}.beton", dedup=True, workers=workers)
        assert open_beton(summary.path).keys() == ["000000", "000001", "000002", "000003", "000004"]
        assert rejects(summary) == [
            ("silent", "caption empty"), ("bad", "image truncated or corrupt"),
            ("000002", "duplicate of an earlier image"), ("000003", "duplicate of an earlier image"),
            ("bad", "image truncated or corrupt"), ("copy", "duplicate of an earlier image"),
        ]  # fmt: skip


def test_first_occurrences() -> None:
    values = np.random.default_rng(0).integers(0, 9, (300, 2)).astype(np.uint64)
    seen, expected = set(), []
    for row in values.tolist():
        expected.append(tuple(row) not in seen)
        seen.add(tuple(row))
    assert first_occurrences(values).tolist() == expected


def test_conditions_on_json_and_on_the_table_beside(tar: Callable, jpegs: list[bytes], tmp_path: Path) -> None:
    labels = [
        {"punsafe": 0.1, "similarity": 0.3, "NSFW": "UNLIKELY"}, {"punsafe": 0.9, "similarity": 0.3, "NSFW": "NSFW"},
        {"punsafe": 0.2, "similarity": 0.2, "NSFW": "UNLIKELY"}, {"similarity": 0.9, "NSFW": None},
        {"punsafe": 0.2, "similarity": 0.4, "NSFW": "UNSURE"},
    ]  # fmt: skip
    texts = ["a cat", "b", "c", "d", "write to me@example.org"]
    files = []
    for i, label in enumerate(labels):
        files += [(f"{i}.jpg", jpegs[i]), (f"{i}.txt", texts[i].encode()), (f"{i}.json", json.dumps(label).encode())]
    shard = tar("00000.tar", files)
    safe = "punsafe < 0.3 and similarity > 0.25 and NSFW != 'NSFW'"
    summary = run(shard, tmp_path / "a.beton", where=safe)
    assert open_beton(summary.path).keys() == ["0", "4"]
    assert rejects(summary) == [
        ("1", "left out by --where"), ("2", "left out by --where"),
        ("3", "left out by --where: no usable NSFW, punsafe"),
    ]  # fmt: skip
    personal = run(shard, tmp_path / "b.beton", where=r"not matches(caption, '[^ ]+@[^ ]+')")
    assert open_beton(personal.path).keys() == ["0", "1", "2", "3"]
    with pytest.raises(DataError, match=r"no sample .* no usable nsfw"):
        run(shard, tmp_path / "c.beton", where="nsfw == 'UNLIKELY'")
    write_table(tmp_path / "00000.parquet", ["key", "aesthetic", "punsafe"], [[str(i), 5.0 + i, 0.0] for i in range(4)])
    beside = run(shard, tmp_path / "d.beton", where="aesthetic > 5.5 and punsafe < 0.3")
    assert open_beton(beside.path).keys() == ["2", "3"]  # a sample's own punsafe goes before the table's


# Tokenizers


def test_other_tokenizers(tar: Callable, pairs: Callable, tmp_path: Path) -> None:
    merges = tmp_path / "merges.txt.gz"
    merges.write_bytes(gzip.compress(b"#version\nt h\nth e</w>\np i\n"))
    shard = tar("a.tar", pairs(2))
    own = run(shard, tmp_path / "own.beton", tokenizer=str(merges))
    row = captions(own.path)["000000"][0]
    assert 515 <= row[0] == max(row) - 1 < 520 and row != tokens("picture number 0")[0]
    model = run(shard, tmp_path / "model.beton", tokenizer="ViT-B-32")
    assert captions(model.path)["000000"] == tokens("picture number 0")
    for name, message in (("ViT-B-16-SigLIP", "no start and end ids"), ("nothing", "neither 'clip'")):
        with pytest.raises(DataError, match=message):
            run(shard, tmp_path / "x.beton", tokenizer=name)
    (tmp_path / "noise").write_bytes(b"\x00\x01\x02")
    with pytest.raises(DataError, match="not a list of byte-pair merges"):
        run(shard, tmp_path / "x.beton", tokenizer=str(tmp_path / "noise"))
