"""Every kind of labelled set, read as one stream."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from harmony_fast.engine.data.beton import open_beton
from harmony_fast.engine.data.pictures import LeftOut, PictureSet, Reading, decoded, open_pictures
from harmony_fast.engine.data.prepare import prepare
from harmony_fast.engine.errors import DataError

HOW = Reading(label_keys=("name", "kind"))


def listed(pictures: PictureSet) -> list[tuple[tuple[str, ...], dict]]:
    """Captions and labels of all pictures, each of which must decode."""
    found = list(pictures.read())
    assert all(picture.load().mode == "RGB" for picture in found)
    assert pictures.count in (None, len(found))
    return [(picture.captions, dict(picture.labels)) for picture in found]


@pytest.fixture
def classes(tmp_path: Path, encoded: Callable, picture: Callable) -> Path:
    """A folder with subfolders `cat` and `dog` of two pictures each."""
    for i, name in enumerate(("cat/a.jpg", "cat/deep/b.png", "dog/a.JPEG", "dog/z.webp")):
        path = tmp_path / "classes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(i), "PNG" if name.endswith("png") else "JPEG"))
    (tmp_path / "classes" / "names.txt").write_text("not a sample")
    return tmp_path / "classes"


def test_subfolders_are_classes(classes: Path) -> None:
    found = listed(open_pictures([str(classes)], HOW))
    assert [labels for _, labels in found] == [{"name": n, "kind": n} for n in ("cat", "cat", "dog", "dog")]
    (classes / "names.txt").unlink()
    (classes / "cat" / "a.txt").write_text("a caption")  # then it is a tree of images with captions
    assert [captions for captions, _ in listed(open_pictures([str(classes)], HOW))] == [("a caption",), (), (), ()]


def test_tars_tables_and_folders_with_captions(tar: Callable, pairs: Callable, tmp_path: Path) -> None:
    files = [*pairs(2), ("000002.jpg", pairs(1)[0][1]), ("000002.cls", b"7\n"), ("000002.json", b'{"name": "x"}')]
    path = tar("a.tar", files)
    expected = [(("picture number 0",), {}), (("picture number 1",), {}), ((), {"cls": "7", "name": "x"})]
    assert listed(open_pictures([str(path)], HOW)) == expected
    for name, content in pairs(2):
        (tmp_path / "tree" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(content)
    assert listed(open_pictures([str(tmp_path / "tree")], HOW)) == expected[:2]
    table = tmp_path / "pairs.csv"
    table.write_text("image,caption\ntree/000000.jpg,picture number 0\n")
    assert [captions for captions, _ in listed(open_pictures([str(table)], HOW))] == [("picture number 0",)]
    assert len(listed(open_pictures([str(path), str(tmp_path / "tree")], HOW))) == 5


def test_karpathy_files(tmp_path: Path, encoded: Callable, picture: Callable) -> None:
    def entry(name: str, split: str, **more: str) -> dict:
        return {"filename": name, "split": split, "sentences": [{"raw": "one"}, {"raw": "two"}], **more}

    (tmp_path / "images" / "val2014").mkdir(parents=True)
    (tmp_path / "images" / "val2014" / "a.jpg").write_bytes(encoded(picture(0)))
    (tmp_path / "images" / "b.jpg").write_bytes(encoded(picture(1)))
    content = {
        "images": [
            entry("a.jpg", "test", filepath="val2014"),
            entry("b.jpg", "test", filepath="elsewhere"),
            entry("c.jpg", "val"),
        ]
    }
    file = tmp_path / "dataset.json"
    file.write_text(json.dumps(content))
    pictures = open_pictures([str(file)], Reading(images=tmp_path / "images"))
    assert pictures.own_captions
    assert listed(pictures) == [(("one", "two"), {})] * 2
    with pytest.raises(DataError, match="no split 'dev'; it has: test, val"):
        open_pictures([str(file)], Reading(split="dev"))
    file.write_text('{"images": [{"file_name": "a.jpg"}]}')
    with pytest.raises(DataError, match="not a karpathy file"):
        open_pictures([str(file)], HOW)


@pytest.mark.parametrize("captions", ["one", "all"])
def test_beton_files_give_their_captions_back(tar: Callable, pairs: Callable, tmp_path: Path, captions: str) -> None:
    files = pairs(3)
    files[1] = ("000000.json", json.dumps({"captions": ["First, one's own!", "a second one"]}).encode())
    out = tmp_path / "set.beton"
    prepare([str(tar("a.tar", files))], out, context=16, workers=1, captions=captions, progress=False)
    found = listed(open_pictures([str(out)], HOW))
    several = ("first , one 's own !", "a second one")
    assert [captions for captions, _ in found] == [
        several if captions == "all" else several[:1], ("picture number 1",), ("picture number 2",)
    ]  # fmt: skip


@pytest.mark.parametrize("several", [False, True])
def test_a_damaged_beton_gives_what_it_has(tar: Callable, pairs: Callable, tmp_path: Path, several: bool) -> None:
    path = tmp_path / "set.beton"
    captions = "all" if several else "one"
    prepare(tar("a.tar", pairs(5)), path, context=16, workers=1, captions=captions, progress=False)
    metadata = open_beton(path).metadata
    writable = np.memmap(path, metadata.dtype, "r+", metadata.offset, metadata.shape)
    writable["image"]["data_ptr"][1] = 2**63
    if several:
        writable["captions"]["ptr"][2] = 2**63
        writable["captions"]["size"][3] = 2**62
    else:
        writable["tokens"][2:4] = 2**63, path.stat().st_size - 4
    writable.flush()
    left_out = LeftOut()
    pictures = open_pictures([str(path)], HOW)
    found = [picture.captions for picture, _ in decoded(pictures.read(), np.asarray, 2, left_out)]
    assert found == [("picture number 0",), ("picture number 4",)]
    reason = "image or caption outside the file's data"
    assert left_out.lines() == [f"left out: {path}: 00000{i}: {reason}" for i in (1, 2, 3)]


def test_captions_of_another_tokenizer_are_left_out(tar: Callable, pairs: Callable, tmp_path: Path) -> None:
    merges = tmp_path / "merges.txt.gz"
    merges.write_bytes(gzip.compress(b"#version\nt h\n"))
    path = tmp_path / "set.beton"
    prepare(tar("a.tar", pairs(2)), path, context=16, workers=1, progress=False)
    left_out = LeftOut()
    pictures = open_pictures([str(path)], Reading(tokenizer=str(merges)))
    assert list(decoded(pictures.read(), np.asarray, 1, left_out)) == []
    reason = "caption with token ids that the tokenizer (data.tokenizer) does not know"
    assert left_out.lines() == [f"left out: {path}: 00000{i}: {reason}" for i in (0, 1)]


def test_images_in_a_table_are_no_labels(tmp_path: Path, encoded: Callable, picture: Callable) -> None:
    import pyarrow
    from pyarrow import parquet

    files = [encoded(picture(i)) for i in range(2)]
    images = [{"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(files)]
    columns = {"image": images, "text": ["a", "b"], "thumbnail": files, "kind": ["x", "y"]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "set.parquet")
    found = listed(open_pictures([str(tmp_path / "set.parquet")], HOW))
    assert found == [(("a",), {"text": "a", "kind": "x"}), (("b",), {"text": "b", "kind": "y"})]


def test_what_cannot_be_decoded_is_named(classes: Path) -> None:
    (classes / "cat" / "a.jpg").write_bytes(b"no image")
    (classes / "dog" / "a.JPEG").write_bytes((classes / "dog" / "a.JPEG").read_bytes()[:-200])
    left_out = LeftOut()
    pictures = open_pictures([str(classes)], HOW)
    found = [labels for _, labels in decoded(pictures.read(), np.asarray, 2, left_out)]
    assert len(found) == 2
    assert left_out.lines() == [
        f"left out: {classes / 'cat' / 'a.jpg'}: image not readable",
        f"left out: {classes / 'dog' / 'a.JPEG'}: image truncated or corrupt",
    ]
