"""The report: one self-contained page, whatever a run has and whatever its captions hold."""

from __future__ import annotations

import gzip
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from harmony_fast.engine.data.beton import BetonWriter
from harmony_fast.engine.data.images import to_jpeg
from harmony_fast.engine.data.parts import tokenize
from harmony_fast.engine.errors import UserError
from harmony_fast.engine.report import write_report
from harmony_fast.engine.report.curves import read_log
from harmony_fast.engine.report.run import read_runs, short_names
from harmony_fast.engine.report.samples import HeldOut, gather
from report_runs import ALL, CONTEXT, HOSTILE, configuration, drawing, write_run, write_tar


class Page(HTMLParser):
    """What a browser would make of it, as far as the tests ask."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.section = ""
        self.parts: dict[str, str] = {}
        self.images: dict[str, int] = {}
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.tags.append((name, values))
        if name == "section":
            self.section = values["id"] or ""
        if name == "img":
            self.images[self.section] = self.images.get(self.section, 0) + 1
        if name not in self.VOID:
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        self.text += data
        self.parts[self.section] = self.parts.get(self.section, "") + data

    def absent(self) -> set[str]:
        """Anchors of the parts that say why they are not shown."""
        return {anchor for anchor, text in self.parts.items() if "Not shown: " in text}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all objectives, held-out sets with a hostile caption, and no metrics."""
    folder = tmp_path_factory.mktemp("full <b>")
    queries = write_tar(folder / "queries.tar", 0, HOSTILE, label="<b>bold</b> \ud800")
    bank = write_tar(folder / "bank.tar", 1, "plain")
    evaluate = {"data": [queries], "bank": [bank]}
    return write_run(configuration(folder, ALL, evaluate=evaluate))


@pytest.fixture(scope="module")
def full_page(full: Path) -> Page:
    return Page(write_report(full))


def test_everything_is_there(full_page: Page) -> None:
    assert full_page.absent() == {"metrics"}
    assert "harmony-fast evaluate" in full_page.parts["metrics"]
    assert full_page.images["views"] >= 4 * (1 + 3 * 2 + 2)
    assert full_page.images["reconstructions"] == 8 * 3
    assert full_page.images["attention"] == 8 * (1 + 1 + 2)
    assert full_page.images["neighbours"] == 8 * (1 + 6)
    assert full_page.images["names"] == 8
    assert full_page.images["pairs"] == 8 + 8 * 6
    assert full_page.images["patches"] == 8 * 2
    assert full_page.images["targets"] == 3
    assert "Reconstruction (MAE)" in full_page.parts["losses"]
    assert "Contrastive (CLIP)Accuracy" in full_page.parts["others"]
    assert "Samples per second" in full_page.parts["speed"]
    assert all(attributes.get("alt") for name, attributes in full_page.tags if name == "img")
    assert not {"input", "fieldset"} & {name for name, _ in full_page.tags}  # nothing to choose between


def test_nothing_is_fetched_and_nothing_runs(full: Path, full_page: Page) -> None:
    loading = {"src", "href", "srcset", "data", "poster", "action", "xlink:href"}
    for name, attributes in full_page.tags:
        assert name not in {"script", "link", "iframe", "object", "embed", "base"}
        for key, value in attributes.items():
            assert key not in loading or (value or "").startswith(("data:image/", "#"))
            assert not key.startswith("on")
    style = full.joinpath("report.html").read_text(encoding="utf-8").split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_hostile_texts_are_shown_as_text(full: Path, full_page: Page) -> None:
    content = (full / "report.html").read_text(encoding="utf-8")
    assert "<script" not in content
    assert "<b>bold" not in content
    assert "<b>bold</b>" in full_page.text
    assert "full <b>" in full_page.text  # the folder's name


def test_the_same_run_gives_the_same_page(full: Path) -> None:
    first = write_report(full).read_bytes()
    assert write_report(full).read_bytes() == first


def test_metrics_are_shown_with_the_level_of_guessing(full: Path) -> None:
    metrics = {
        "zero_shot": {"top1": 0.25, "top10": 1.0, "classes": 10},
        "retrieval": {"image_to_text": {"r1": 0.5}, "chance": {"image_to_text": {"r1": 0.1}}},
        "knn": {"k5": {"top1": 0.375}, "chance": {"top1": 0.125}},
    }
    (full / "metrics.json").write_text(json.dumps(metrics))
    try:
        text = Page(write_report(full)).parts["metrics"]
    finally:
        (full / "metrics.json").unlink()
    assert "25.0 %top-1100.0 %top-10" in text  # the file does not say
    assert "37.5 %top-13 × chance (12.5 %)" in text
    assert "50.0 %recall@15 × chance (10.0 %)" in text
    assert "classes" not in text


def test_damaged_metrics_do_not_stop_the_report(full: Path) -> None:
    (full / "metrics.json").write_text("{")
    try:
        assert "cannot be read" in Page(write_report(full)).parts["metrics"]
    finally:
        (full / "metrics.json").unlink()


def test_a_run_without_text_and_without_teacher(full: Path, tmp_path: Path) -> None:
    evaluate = {"data": [str(full / "queries.tar")]}
    page = Page(
        write_report(write_run(configuration(tmp_path, {"reconstruction": ALL["reconstruction"]}, evaluate=evaluate)))
    )
    assert page.absent() == {"metrics"}
    assert not page.parts.keys() & {"names", "pairs", "targets"}  # no heading of what it cannot have
    assert "student" in page.parts["attention"]
    assert "mask tokens (iBOT)" not in page.parts["views"]
    assert "Text tower" not in page.text


def test_a_run_without_reconstruction(full: Path, tmp_path: Path) -> None:
    evaluate = {"data": [str(full / "queries.tar")], "bank": [str(full / "bank.tar")]}
    page = Page(write_report(write_run(configuration(tmp_path, {"contrastive": {"embed_dim": 8}}, evaluate=evaluate))))
    assert page.absent() == {"metrics"}
    assert "reconstructions" not in page.parts
    assert "local crops" not in page.parts["views"]
    assert HOSTILE in page.parts["views"]
    assert "<script" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_run_of_captions_only(full: Path, tmp_path: Path) -> None:
    evaluate = {"data": [str(full / "queries.tar")]}
    page = Page(write_report(write_run(configuration(tmp_path, {"masked_language": {"depth": 1}}, evaluate=evaluate))))
    assert page.absent() == {"metrics"}
    assert page.parts.keys() - {""} == {"metrics", "losses", "schedules", "speed", "others", "views"}
    assert "alert" in page.parts["views"]
    assert page.images["views"] == 4  # the samples; nobody sees crops


def test_without_held_out_samples_the_training_file_is_shown(tmp_path: Path) -> None:
    folder = write_run(configuration(tmp_path, ALL))
    page = Page(write_report(folder))
    assert page.absent() == {"metrics", "pairs"}  # one line says what all pictures lack
    assert "train.beton: no such file" in page.parts["pairs"]
    assert not page.images

    with BetonWriter(tmp_path / "train.beton", 5, CONTEXT) as writer:
        for i in range(5):
            png = io.BytesIO()
            drawing(i, 0).save(png, "PNG")
            jpeg = to_jpeg(png.getvalue(), 512, 8, 90)
            writer.write(jpeg.data, jpeg.width, jpeg.height, tokenize(f"thing {i}, <u>", CONTEXT)[0], f"key {i}")
    page = Page(write_report(folder))
    assert page.absent() == {"metrics"}
    assert "names" not in page.parts
    assert "data.train" in page.parts["views"]
    assert page.images["neighbours"] == 5 * (1 + 4)  # each other
    assert "thing 3" in page.parts["attention"]
    assert re.search(r"thing \d, < ?u ?>", page.parts["views"])
    assert "39 of 25" in page.text  # epochs of one step
    assert "Contrastive: weight of hard targets1 → 0.2" in page.parts["schedules"]
    assert "Self distillation: patch temperature0.04 → 0.07" in page.parts["schedules"]
    assert "The same at every step: " in page.parts["schedules"]


def test_captions_are_read_with_the_tokenizer_of_the_run(tmp_path: Path) -> None:
    merges = tmp_path / "merges.txt.gz"
    merges.write_bytes(gzip.compress(b"#version\nt h\n"))
    config = configuration(tmp_path, {"masked_language": {"depth": 1}})
    config.data.tokenizer = str(merges)
    with BetonWriter(config.data.train, 1, CONTEXT) as writer:
        png = io.BytesIO()
        drawing(0, 0).save(png, "PNG")
        jpeg = to_jpeg(png.getvalue(), 512, 8, 90)
        tokens = tokenize("the hat, 1", CONTEXT, str(merges))[0]
        writer.write(jpeg.data, jpeg.width, jpeg.height, tokens, "key")
    gallery = gather(config, HeldOut(config), 1)
    assert gallery.samples[0].caption == "the hat, 1"
    assert gallery.views.tokens[0].tolist() == tokens.tolist()


def test_classes_are_called_by_their_names(full: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\n".join(f"object {letter}" for letter in "ABCDEFGHIJ"))
    evaluate = {"data": [str(full / "bank.tar")], "classes": str(tmp_path / "names.txt")}
    page = Page(write_report(write_run(configuration(tmp_path, {"contrastive": {"embed_dim": 8}}, evaluate=evaluate))))
    assert page.images["names"] == 8
    assert "object" in page.parts["names"] and "thing" not in page.parts["names"]


def test_weights_are_forgotten_but_not_where_they_are_from(full: Path) -> None:
    (run,) = read_runs([full])
    assert run.model.objectives and run.gallery.names
    run.forget_weights()
    assert not {"loaded", "gallery"} & vars(run).keys()
    assert run.checkpoint == "checkpoint step-00000001" and "loaded" not in vars(run)


def test_without_a_log(full: Path, tmp_path: Path) -> None:
    folder = write_run(configuration(tmp_path, {"reconstruction": ALL["reconstruction"]}))
    (folder / "log.jsonl").unlink()
    assert Page(write_report(folder)).absent() >= {"losses", "speed", "others"}


def test_a_run_that_has_not_saved_yet(full: Path, tmp_path: Path) -> None:
    folder = write_run(configuration(tmp_path, ALL, evaluate={"data": [str(full / "queries.tar")]}))
    shutil.rmtree(folder / "checkpoints")
    page = Page(write_report(folder))
    assert page.absent() == {"metrics", "names"}
    assert "no checkpoint yet" in page.parts["names"]
    assert "Reconstruction (MAE)" in page.parts["losses"]
    assert page.images["views"] > 0  # for these the data are enough


def test_whatever_is_logged_is_shown(tmp_path: Path) -> None:
    folder = write_run(configuration(tmp_path, {"reconstruction": ALL["reconstruction"]}))
    entry = {"loss": 1.0, "memory/peak_gib": 3.0, "gradient_norm": 0.5,
             "evaluate/knn/top1": 0.25, "skipped_steps": 0, "note": "text", "broken": float("nan")}  # fmt: skip
    lines = [json.dumps({"step": step, **entry}) for step in (1, 2, 3)]
    (folder / "log.jsonl").write_text("\n".join(lines))
    page = Page(write_report(folder))
    assert "Peak memory, GiB3 → 3" in page.parts["speed"] and "memory" not in page.parts["others"].lower()
    for shown in ("Gradient norm", "Skipped steps", "EvaluateKnn: top1"):
        assert shown in page.parts["others"]
    assert not {"Note", "Broken"} & set(re.findall(r"[A-Z][a-z]+", page.parts["others"]))


def test_several_runs_are_laid_side_by_side(full: Path, tmp_path: Path) -> None:
    evaluate = {"data": [str(full / "queries.tar")], "bank": [str(full / "bank.tar")]}
    folders = []
    for name, objectives in (("one", ALL), ("two", {"reconstruction": ALL["reconstruction"]}), ("three", ALL)):
        folders.append(write_run(configuration(tmp_path / name / "seed-0", objectives, evaluate=evaluate)))
    for folder, value in zip(folders[:2], (0.25, 0.75), strict=True):
        (folder / "metrics.json").write_text(json.dumps({"knn": {"top1": value, "chance": {"top1": 0.125}}}))
    shutil.rmtree(folders[2] / "checkpoints")
    path = write_report(*folders)
    assert path == tmp_path / "report.html"
    page = Page(path)
    assert [a["id"] for n, a in page.tags if n == "input"] == ["show-0", "show-1", "show-2"]
    assert "3 runs side by side" in page.text
    assert "objectives.contrastive" in page.text  # among what differs
    assert "75.0 %" in page.parts["metrics"]
    assert "guessing12.5 %" in page.parts["metrics"]
    assert "harmony-fast evaluate" in page.parts["metrics"]  # for the third
    assert "Nothing to show" in page.parts["targets"]  # of the second
    assert page.images["reconstructions"] == 2 * 5 * 3  # fewer samples of each run, the more runs there are
    assert page.absent() == {"metrics", "names"}
    content = path.read_text(encoding="utf-8")
    losses = content.split('id="losses"')[1].split("</section>")[0]
    assert losses.count("<title>one</title>") == 2 * 6  # raw and smoothed, in every panel
    assert losses.count("<title>two</title>") == 2 * 2
    assert {"one", "two", "three"} == {name for name in re.findall(r"<bdi>(one|two|three)</bdi>", content)}


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["runs/a", "runs/b"], ["a", "b"]),
        (["s/clip/seed-0", "s/mae/seed-0"], ["clip", "mae"]),
        (["s/clip/seed-0", "s/clip/seed-1", "s/mae/seed-0"], ["clip/seed-0", "clip/seed-1", "mae/seed-0"]),
        (["a/x/1/run", "a/y/1/run"], ["x", "y"]),
    ],
)
def test_runs_are_named_by_what_tells_them_apart(folders: list[str], names: list[str]) -> None:
    assert short_names([Path(folder) for folder in folders]) == names


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path)


def test_the_log_is_read_as_far_as_it_is_whole(full: Path) -> None:
    assert [entry["step"] for entry in read_log(full / "log.jsonl")] == list(range(1, 40))
