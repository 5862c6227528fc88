"""The report: one self-contained page, whatever a run has and whatever its captions hold."""

from __future__ import annotations

import io
import json
import re
import tarfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harmony_fast.engine.config import RunConfig, dump_config, parse_config
from harmony_fast.engine.data.beton import BetonWriter
from harmony_fast.engine.data.images import to_jpeg
from harmony_fast.engine.data.parts import tokenize
from harmony_fast.engine.errors import UserError
from harmony_fast.engine.report import write_report
from harmony_fast.engine.report_curves import read_log
from harmony_fast.harmony.model import Harmony
from PIL import Image
from safetensors.torch import save_file

HOSTILE = '<script>alert("caption")</script> & <img src=https://example.com/x.png>'
CONTEXT = 12
SAMPLES = 10
ALL: dict[str, Any] = {
    "contrastive": {"embed_dim": 8},
    "self_distillation": {"prototypes": 16, "hidden": 16, "bottleneck": 8},
    "reconstruction": {"width": 16, "depth": 1, "heads": 2},
    "masked_language": {"depth": 1},
    "text_distillation": {"prototypes": 16, "hidden": 16, "bottleneck": 8},
}


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


def drawing(i: int, artist: int) -> Image.Image:
    """A small picture that depends on both."""
    pixels = np.full((40, 36, 3), 255, np.uint8)
    pixels[5 + i : 25 + i, 4 : 20 + artist] = [25 * i, 250 - 20 * i, 90 * artist]
    return Image.fromarray(pixels)


def write_tar(path: Path, artist: int, caption: str, label: Any = None) -> str:
    """Ten labelled drawings; the caption, and the class of the first, are given."""
    with tarfile.open(path, "w") as tar:
        for i in range(SAMPLES):
            png = io.BytesIO()
            drawing(i, artist).save(png, "PNG")
            labels = {"name": label if label and i == 0 else f"thing {i}", "subcategory": f"group {i % 3}"}
            text = f"{caption} {i}"
            for name, data in (("png", png.getvalue()), ("txt", text.encode()), ("json", json.dumps(labels).encode())):
                member = tarfile.TarInfo(f"{i:04d}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return str(path)


def configuration(folder: Path, objectives: dict[str, Any], **more: Any) -> RunConfig:
    return parse_config(
        {
            "run_dir": str(folder),
            "data": {"train": str(folder / "train.beton"), "batch_size": 4},
            "model": {
                "image": {"width": 16, "depth": 2, "heads": 2, "patch_size": 8},
                "text": {"width": 16, "depth": 1, "heads": 2, "context": CONTEXT},
            },
            "views": {"global_size": 32, "local_size": 16, "local_crops": 2},
            "objectives": objectives,
            **more,
        },
        "test",
    )


def write_run(config: RunConfig) -> Path:
    """A run folder as training leaves it, with the initial weights."""
    folder = config.run_dir
    checkpoint = folder / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    (folder / "checkpoints" / "latest").write_text(checkpoint.name)
    torch.manual_seed(0)
    model = Harmony(config)
    save_file({k: v.clone() for k, v in model.state_dict().items()}, checkpoint / "weights.safetensors")
    lines = []
    for step in range(1, 40):
        losses = {f"loss/{name}": 3.0 / step for name in model.objectives}
        entry = {"step": step, "loss": 9.0 / step, **losses, "lr": 1e-3, "samples_per_second": 100.0}
        lines.append(json.dumps({**entry, "contrastive/accuracy": 0.5}))
    (folder / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 40, "lo')
    return folder


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
    assert full_page.images["zero-shot"] == 8
    assert "Reconstruction (MAE)" in full_page.parts["losses"]
    assert "Contrastive: accuracy" in full_page.parts["training"]


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
        "retrieval": {"image_to_text": {"r1": 0.5}},
        "knn": {"top1": 0.375, "chance": {"top1": 0.125}},
    }
    (full / "metrics.json").write_text(json.dumps(metrics))
    try:
        text = Page(write_report(full)).parts["metrics"]
    finally:
        (full / "metrics.json").unlink()
    assert "25.0 %top-12.5 × chance (10.0 %)" in text  # ten classes
    assert "37.5 %top-13 × chance (12.5 %)" in text  # as the file says
    assert "50.0 %recall@1" in text
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
    assert page.absent() == {"metrics", "zero-shot", "neighbours"}
    assert "no contrastive objective" in page.parts["zero-shot"]
    assert "evaluate.bank" in page.parts["neighbours"]
    assert "student" in page.parts["attention"]
    assert "mask tokens (iBOT)" not in page.parts["views"]
    assert "Text tower" not in page.text


def test_a_run_without_reconstruction(full: Path, tmp_path: Path) -> None:
    evaluate = {"data": [str(full / "queries.tar")], "bank": [str(full / "bank.tar")]}
    page = Page(write_report(write_run(configuration(tmp_path, {"contrastive": {"embed_dim": 8}}, evaluate=evaluate))))
    assert page.absent() == {"metrics", "reconstructions"}
    assert "local crops" not in page.parts["views"]
    assert HOSTILE in page.parts["views"]
    assert "<script" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_run_of_captions_only(full: Path, tmp_path: Path) -> None:
    evaluate = {"data": [str(full / "queries.tar")]}
    page = Page(write_report(write_run(configuration(tmp_path, {"masked_language": {"depth": 1}}, evaluate=evaluate))))
    assert page.absent() == {"metrics", "zero-shot", "neighbours", "attention", "reconstructions"}
    assert "alert" in page.parts["views"]


def test_without_held_out_samples_the_training_file_is_shown(tmp_path: Path) -> None:
    folder = write_run(configuration(tmp_path, ALL))
    assert Page(write_report(folder)).absent() >= {"views", "attention", "reconstructions", "zero-shot", "neighbours"}

    with BetonWriter(tmp_path / "train.beton", 5, CONTEXT) as writer:
        for i in range(5):
            png = io.BytesIO()
            drawing(i, 0).save(png, "PNG")
            jpeg = to_jpeg(png.getvalue(), 512, 8, 90)
            writer.write(jpeg.data, jpeg.width, jpeg.height, tokenize(f"thing {i}, <u>", CONTEXT)[0], f"key {i}")
    page = Page(write_report(folder))
    assert page.absent() == {"metrics", "zero-shot", "neighbours"}
    assert "data.train" in page.parts["views"]
    assert "key 3" in page.parts["attention"]
    assert re.search(r"thing \d, < ?u ?>", page.parts["views"])
    assert "of 25" in page.text  # epochs of one step


def test_without_a_log(full: Path, tmp_path: Path) -> None:
    folder = write_run(configuration(tmp_path, {"reconstruction": ALL["reconstruction"]}))
    (folder / "log.jsonl").unlink()
    assert Page(write_report(folder)).absent() >= {"losses", "training"}


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path)


def test_the_log_is_read_as_far_as_it_is_whole(full: Path) -> None:
    assert [entry["step"] for entry in read_log(full / "log.jsonl")] == list(range(1, 40))
