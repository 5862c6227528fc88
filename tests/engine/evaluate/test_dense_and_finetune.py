"""Segmentation and finetuning: scores as torchmetrics', and training that learns what there is to learn."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from harmony_fast.engine.checkpoint import write_weights_only
from harmony_fast.engine.config import dump_config, parse_config
from harmony_fast.engine.errors import UserError
from harmony_fast.engine.evaluate import evaluate_run
from harmony_fast.engine.evaluate.segmentation import LinearHead, _starts, confusion_of, predict, reduced, scores_of
from harmony_fast.engine.evaluate.share import Share
from harmony_fast.harmony.image_encoder import ImageConfig, ImageEncoder
from harmony_fast.harmony.model import Harmony
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index

SMALL = ["evaluate.batch_size=8", "evaluate.workers=1"]


@given(classes=st.integers(2, 7), seed=st.integers(0, 999))
def test_scores_are_torchmetrics(classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(-1, classes, (2, 9, 8), generator=generator)
    truth[truth == classes // 2] = 0  # a class that never occurs, though it may be answered
    found = torch.where(torch.rand(truth.shape, generator=generator) < 0.5, truth.clamp(0), 0 * truth + seed % classes)
    ours = scores_of(sum(confusion_of(f, t, classes) for f, t in zip(found, truth, strict=True)))
    kept = truth >= 0
    miou = multiclass_jaccard_index(found[kept], truth[kept], classes, average="macro")
    accuracy = multiclass_accuracy(found[kept], truth[kept], classes, average="micro")
    assert ours["miou"] == pytest.approx(float(miou), abs=1e-6)
    assert ours["pixel_accuracy"] == pytest.approx(float(accuracy), abs=1e-6)
    recalls = [(found[truth == c] == c).double().mean() for c in truth[kept].unique()]
    assert ours["mean_accuracy"] == pytest.approx(float(torch.stack(recalls).mean()))


def test_background_can_be_reduced() -> None:
    mask = np.array([[0, 1, 150, 255]])
    assert reduced(mask, 255, True).tolist() == [[-1, 0, 149, -1]]
    assert reduced(mask, 255, False).tolist() == [[0, 1, 150, -1]]


@given(length=st.integers(16, 200))
def test_windows_cover_every_pixel(length: int) -> None:
    starts = _starts(length, 16)
    covered = np.zeros(length, int)
    for start in starts:
        assert 0 <= start <= length - 16
        covered[start : start + 16] += 1
    assert covered.min() >= 1 and len(starts) == len(set(starts))


@torch.inference_mode()
def test_one_window_is_the_whole_square_image(tiny: dict) -> None:
    config = parse_config(tiny, "test")
    encoder = ImageEncoder(ImageConfig(width=32, depth=1, heads=2, patch_size=8), 32, None, False).eval()
    head = LinearHead(32, 3).eval()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    scores = predict(head, encoder, image, config, 32)
    assert scores.shape == (3, 32, 32)
    wide = predict(head, encoder, Image.fromarray(np.concatenate([np.asarray(image)] * 3, 1)), config, 32)
    torch.testing.assert_close(wide[:, :, :5], scores[:, :, :5])  # where only the first window looks


@pytest.fixture
def run(tiny: dict, tmp_path: Path) -> Path:
    """A run of a random model: patch tokens still tell colours."""
    config = parse_config(tiny, "test")
    torch.manual_seed(0)
    write_weights_only(tmp_path / "run", 1, Harmony(config).state_dict())
    (tmp_path / "run" / "config.yaml").write_text(dump_config(config))
    return tmp_path / "run"


def halves(seed: int, side: int = 48) -> tuple[Image.Image, Image.Image]:
    """Red and blue with a border somewhere, and the mask: 1 for red, 2 for blue, 0 for a strip that does not count."""
    border = 16 + 8 * (seed % 3)
    pixels = np.random.default_rng(seed).integers(0, 60, (side, side + 8, 3), np.uint8)
    pixels[:, :border, 0] += 180
    pixels[:, border:, 2] += 180
    mask = np.ones(pixels.shape[:2], np.uint8)
    mask[:, border:] = 2
    mask[:2] = 0
    return Image.fromarray(pixels), Image.fromarray(mask)


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """ADE20K's layout, with its list of names."""
    root = tmp_path / "scenes"
    for part, seeds in (("training", range(8)), ("validation", range(8, 11))):
        for seed in seeds:
            image, mask = halves(seed)
            for kind, picture, ending in (("images", image, "png"), ("annotations", mask, "png")):
                path = root / kind / part / f"{seed}.{ending}"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)
    return root


def test_segmentation_learns_two_colours(run: Path, scenes: Path) -> None:
    settings = [
        *SMALL, f"evaluate.data={scenes}", "evaluate.segmentation.epochs=15", "evaluate.segmentation.batch_size=4",
        "evaluate.segmentation.lr=0.05", "evaluate.segmentation.reduce_zero_label=true",
    ]  # fmt: skip
    found = evaluate_run(run, ["segmentation"], settings)["segmentation"]
    assert found["miou"] > 0.8 and found["pixel_accuracy"] > 0.9
    assert found == evaluate_run(run, ["segmentation"], settings)["segmentation"]  # nothing depends on chance
    (scenes / "objectInfo150.txt").touch()  # then the background is known not to count, and there are 150 classes
    settings[3:] = ["evaluate.segmentation.epochs=10", "evaluate.segmentation.batch_size=8"]  # ten steps
    assert evaluate_run(run, ["segmentation"], settings)["segmentation"].keys() == found.keys()


@pytest.mark.parametrize(("settings", "message"), [
    (["evaluate.segmentation.size=33"], "size 33 is not a multiple of the patch size 8"),
    (["evaluate.segmentation.reduce_zero_label=true", "evaluate.segmentation.ignore=2"], "at least two classes"),
    (["evaluate.bank=[nowhere]"], "nowhere: no folder of images in it"),
])  # fmt: skip
def test_segmentation_mistakes_are_named(run: Path, scenes: Path, settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate_run(run, ["segmentation"], [*SMALL, f"evaluate.data={scenes}", *settings])


def test_images_to_learn_from_are_not_tested_on(run: Path, scenes: Path) -> None:
    shutil.rmtree(scenes / "images" / "validation")
    with pytest.raises(UserError, match=r"images/validation: no such folder, though there is one called training"):
        evaluate_run(run, ["segmentation"], [*SMALL, f"evaluate.data={scenes}"])


def test_a_class_that_was_not_learned_is_named(run: Path, scenes: Path) -> None:
    _, mask = halves(9)
    Image.fromarray(np.asarray(mask) + 3).save(scenes / "annotations" / "validation" / "9.png")
    settings = [*SMALL, f"evaluate.data={scenes}", "evaluate.segmentation.epochs=1"]
    with pytest.raises(UserError, match=r"9.png: holds class 5; the labelled masks to learn from have 3"):
        evaluate_run(run, ["segmentation"], settings)


@pytest.fixture
def colours(tmp_path: Path, encoded: Callable) -> Path:
    """Folders `train` and `test` of two classes, red and blue."""
    for part, count in (("train", 16), ("test", 6)):
        for channel, name in ((0, "red"), (2, "blue")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(count * i + channel).integers(0, 60, (36, 40, 3), np.uint8)
                pixels[..., channel] += 180
                (tmp_path / part / name / f"{i}.png").write_bytes(encoded(Image.fromarray(pixels), "PNG"))
    return tmp_path


def test_finetuning_learns_two_colours(run: Path, colours: Path) -> None:
    settings = [
        *SMALL, f"evaluate.data={colours / 'test'}", f"evaluate.bank={colours / 'train'}", "evaluate.finetune.epochs=6",
        "evaluate.finetune.batch_size=8", "evaluate.finetune.lr=0.1", "evaluate.finetune.warmup_epochs=1",
        "evaluate.finetune.augment=null", "evaluate.finetune.layer_decay=0.9",
    ]  # fmt: skip
    assert evaluate_run(run, ["finetune"], settings)["finetune"]["top1"] > 0.9
    plain = [*settings, "evaluate.finetune.mixup=0", "evaluate.finetune.cutmix=0", "evaluate.finetune.epochs=1"]
    assert evaluate_run(run, ["finetune"], plain)["finetune"].keys() == {"top1", "top5", "chance"}
    with pytest.raises(UserError, match=r"diverged: lower evaluate.finetune.lr"):
        evaluate_run(run, ["finetune"], [*plain, "evaluate.finetune.lr=1e30", "evaluate.finetune.warmup_epochs=0"])
    (colours / "train" / "red" / "0.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"red/0.png: image not readable"):
        evaluate_run(run, ["finetune"], settings)
    with pytest.raises(UserError, match=r"no subcategory of evaluate.data occurs in evaluate.bank"):
        (colours / "test" / "red").rename(colours / "test" / "green")
        (colours / "test" / "blue").rename(colours / "test" / "yellow")
        evaluate_run(run, ["finetune"], settings)


def work_on_a_share(rank: int, run: Path, store: Path, task: str, settings: list[str]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    evaluate_run(run, [task], settings, Share(rank, 2))


@pytest.mark.parametrize("task", ["segmentation", "finetune"])
def test_two_ranks_learn_together(
    run: Path, scenes: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    settings = {
        "segmentation": [
            f"evaluate.data={scenes}", "evaluate.segmentation.epochs=15", "evaluate.segmentation.batch_size=4",
            "evaluate.segmentation.lr=0.05", "evaluate.segmentation.reduce_zero_label=true",
        ],
        "finetune": [
            f"evaluate.data={colours / 'test'}", f"evaluate.bank={colours / 'train'}", "evaluate.finetune.epochs=6",
            "evaluate.finetune.batch_size=9", "evaluate.finetune.lr=0.1", "evaluate.finetune.warmup_epochs=1",
            "evaluate.finetune.augment=null", "evaluate.finetune.layer_decay=0.9",
        ],
    }[task]  # fmt: skip
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    context = torch.multiprocessing.get_context("fork")  # not spawn: importing everything again takes a while
    arguments = (run, tmp_path / "store", task, [*SMALL, *settings])
    processes = [context.Process(target=work_on_a_share, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(250)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    found = json.loads((run / "metrics.json").read_text())[task]
    assert found["miou" if task == "segmentation" else "top1"] > 0.7
