"""Labelled sets for evaluation, and the demo's two artists."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from harmony_fast.engine.data import labelled
from harmony_fast.engine.data.labelled import LabelledSample
from harmony_fast.engine.data.pictures import Reading
from harmony_fast.engine.errors import DataError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

DEMO = Path(__file__).parents[3] / "demo"


def read_labelled(*sources: Path) -> list[LabelledSample]:
    return labelled.read_labelled([str(source) for source in sources], Reading(("name", "kind")))


def test_reads_images_captions_and_labels(tar: Callable, picture: Callable, encoded: Callable) -> None:
    clear = Image.new("RGBA", (32, 16), (255, 0, 0, 0))
    labels = json.dumps({"name": "a", "caption": "from json"}).encode()
    files = [("a.png", encoded(clear, "PNG")), ("a.json", labels), ("b.jpg", encoded(picture())), ("b.txt", b"two")]
    first, second = read_labelled(tar("x.tar", files))
    assert (first.key, first.caption, first.labels["name"]) == ("a", "from json", "a")
    assert first.image.size == (32, 16) and (np.asarray(first.image) == 255).all()
    assert (second.key, second.caption, second.labels, second.image.mode) == ("b", "two", {}, "RGB")


def test_leaves_out_and_counts_what_is_unreadable(
    tar: Callable, pairs: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    good = pairs(2)
    bad = [("x.jpg", good[0][1][:300]), ("x.txt", b"cut"), ("y.txt", b"alone"), ("z.jpg", good[0][1]), ("z.json", b"{")]
    with caplog.at_level(logging.WARNING):
        assert len(read_labelled(tar("x.tar", good + bad))) == 2
    assert "3 of 5 samples left out" in caplog.text and "no image 1" in caplog.text


def test_refuses_sets_without_a_usable_sample(tar: Callable, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image 1"):
        read_labelled(tar("x.tar", [("a.txt", b"alone")]))
    with pytest.raises(DataError, match="there is none"):
        read_labelled(tar("y.tar", []))
    with pytest.raises(DataError, match="no such file"):
        read_labelled(tmp_path / "z.tar")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_tar_is_read_as_far_as_it_goes_or_refused(
    data: st.DataObject, tar: Callable, pairs: Callable, tmp_path: Path
) -> None:
    content = bytearray(tar("whole.tar", pairs(2)).read_bytes())
    starts = [content.index(name) for name in (b"000000.jpg", b"000001.txt")]
    headers = st.builds(int.__add__, st.sampled_from(starts), st.integers(0, 511))
    for place in data.draw(st.lists(headers | st.integers(0, len(content) - 1), max_size=8)):
        content[place] = data.draw(st.integers(0, 255))
    (tmp_path / "damaged.tar").write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    try:
        assert len(read_labelled(tmp_path / "damaged.tar")) in (1, 2, 3)
    except DataError as error:
        assert "\n" not in str(error)


def test_all_that_is_evaluated_on_can_be_shown(tmp_path: Path, picture: Callable) -> None:
    """Folders of classes, captions of COCO; what has neither is left out."""
    for i, kind in enumerate(("cat", "dog")):
        (tmp_path / "classes" / kind).mkdir(parents=True)
        picture(i, 900, 30).save(tmp_path / "classes" / kind / "1.png")
    cat, dog = read_labelled(tmp_path / "classes")
    assert (cat.key, cat.caption, cat.labels) == ("cat/1.png", "cat", {"name": "cat", "kind": "cat"})
    assert dog.caption == "dog" and dog.image.size == (labelled.SIDE, 17)
    entries = [{"filename": f"classes/{kind}/1.png", "split": "test", "sentences": [{"raw": text} for text in texts]}
               for kind, texts in (("cat", ["a cat", "another"]), ("dog", []))]  # fmt: skip
    (tmp_path / "coco.json").write_text(json.dumps({"images": entries}))
    (captioned,) = read_labelled(tmp_path / "coco.json")
    assert (captioned.key, captioned.caption, captioned.labels) == ("classes/cat/1.png", "a cat", {})


def test_of_large_sets_some_are_drawn(tar: Callable, pairs: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tar("x.tar", pairs(20))
    every = [sample.key for sample in read_labelled(source)]
    monkeypatch.setattr(labelled, "MOST", 8)
    some = [sample.key for sample in read_labelled(source)]
    assert len(some) == 8 and some == sorted(some) == [key for key in every if key in some] != every[:8]
    assert some == [sample.key for sample in read_labelled(source)]


def test_both_artists_drew_the_same_concepts() -> None:
    noto, twemoji = (read_labelled(DEMO / name) for name in ("noto.tar", "twemoji.tar"))
    assert [(s.key, s.caption, s.labels) for s in noto] == [(s.key, s.caption, s.labels) for s in twemoji]
    assert len({s.labels["name"] for s in noto}) == len(noto) == 1911
    assert all(s.image.size == (64, 64) and s.image.mode == "RGB" for s in noto + twemoji)
    assert not any(a.image.tobytes() == b.image.tobytes() for a, b in zip(noto, twemoji, strict=True))
    assert sum(path.stat().st_size for path in DEMO.glob("*.tar")) < 12_000_000
