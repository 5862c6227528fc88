"""Exports, loaded by the libraries they are for: same features, same embeddings; and back into `evaluate`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from harmony_fast.engine.checkpoint import load_run, write_weights_only
from harmony_fast.engine.cli import app
from harmony_fast.engine.config import dump_config, parse_config
from harmony_fast.engine.errors import UserError
from harmony_fast.engine.evaluate import evaluate_run
from harmony_fast.engine.evaluate.features import pixels, text_embeddings
from harmony_fast.engine.evaluated import choose_branch
from harmony_fast.engine.export import FORMATS, export
from harmony_fast.engine.export.metadata import load_exported
from harmony_fast.harmony.model import Harmony
from torch.nn.functional import normalize
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
WORDS = ["a cat", "a photo of two dogs on a very long and winding road to somewhere far away", "!"]
TOLERANCE = {"rtol": 0, "atol": 1e-5}


def save_run(folder: Path, raw: dict[str, Any]) -> Path:
    """A run of a model with random weights, all of which matter: no zero biases, no unit gains."""
    config = parse_config(raw, "test")
    torch.manual_seed(0)
    state = {
        name: value + 0.1 * torch.randn_like(value) if value.is_floating_point() else value
        for name, value in Harmony(config).state_dict().items()
    }
    write_weights_only(folder, 1200, state)
    (folder / "config.yaml").write_text(dump_config(config))
    return folder


@pytest.fixture(params=["softmax", "sigmoid"])
def run(request: pytest.FixtureRequest, tiny: dict, tmp_path: Path) -> Path:
    if request.param == "sigmoid":
        tiny["objectives"]["contrastive"] = {"kind": "sigmoid", "embed_dim": 16, "hard_weight_end": 1.0}
    return save_run(tmp_path / "my run", tiny)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def test_timm_gives_the_same_features(run: Path, images: torch.Tensor, tmp_path: Path) -> None:
    config, model, _ = load_run(run)
    expected = choose_branch(config, model).image.features(images)
    file = export(run, "timm", tmp_path / "out")
    arguments = json.loads((tmp_path / "out" / "config.json").read_text())
    for theirs in (
        timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True),
        timm.create_model(
            arguments["architecture"], pretrained=True, num_classes=0, pretrained_cfg_overlay={"file": str(file)},
            **arguments["model_args"],
        ),
    ):  # fmt: skip
        theirs.eval()
        torch.testing.assert_close(theirs.forward_features(images), expected, **TOLERANCE)
        torch.testing.assert_close(theirs(images), expected[:, 0], **TOLERANCE)


@pytest.mark.parametrize("place", ["out", "out.safetensors"])
def test_the_cards_code_works_as_it_stands(
    tiny: dict, images: torch.Tensor, picture: Callable, tmp_path: Path, place: str
) -> None:
    tiny["data"]["augment"] = {"mean": [0.4, 0.5, 0.6]}
    run = save_run(tmp_path / "run", tiny)
    file = export(run, "timm", tmp_path / place)
    card = file.with_suffix(".md") if place == file.name else file.parent / "README.md"
    names: dict[str, Any] = {"images": images}
    exec(card.read_text().split("```python")[1].split("```")[0], names)
    assert names["features"].shape == (3, 32)
    config = load_run(run).config
    torch.testing.assert_close(names["transform"](picture(1, 40, 97)), pixels(picture(1, 40, 97), config))


@torch.inference_mode()
def test_a_named_size_needs_no_arguments(tiny: dict, tmp_path: Path) -> None:
    tiny["model"]["image"] = {"name": "ViT-Ti/16"}
    tiny["views"] |= {"global_size": 224, "local_size": 96}
    run = save_run(tmp_path / "run", tiny)
    images = torch.randn(1, 3, 224, 224)
    model = load_run(run).model
    file = export(run, "timm", tmp_path / "weights" / "vit.safetensors")
    assert file == tmp_path / "weights" / "vit.safetensors" and file.with_suffix(".md").is_file()
    overlay = {"file": str(file)}
    theirs = timm.create_model("vit_tiny_patch16_224", pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)
    expected = model.teacher.image.features(images)
    torch.testing.assert_close(theirs.eval().forward_features(images), expected, **TOLERANCE)
    export(run, "open_clip", tmp_path / "clip")
    (tmp_path / "clip").rename(tmp_path / "moved")  # nothing in it knows where it lies
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'moved'}")
    embedded = model.teacher.image.project(expected[:, 0])
    torch.testing.assert_close(theirs.encode_image(images), embedded, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_open_clip_gives_the_same_embeddings(
    run: Path, images: torch.Tensor, picture: Callable, tmp_path: Path
) -> None:
    config, model, _ = load_run(run)
    export(run, "open_clip", tmp_path / "out")
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")(WORDS)
    theirs.eval()
    teacher = choose_branch(config, model)
    expected = normalize(teacher.image.project(teacher.image.features(images)[:, 0]), dim=-1)
    torch.testing.assert_close(theirs.encode_image(images, normalize=True), expected, **TOLERANCE)
    expected = text_embeddings(teacher, WORDS, config)
    torch.testing.assert_close(theirs.encode_text(tokens, normalize=True), expected, **TOLERANCE)
    torch.testing.assert_close(theirs.logit_scale, model.objectives["contrastive"].logit_scale.reshape(()))
    if (bias := model.objectives["contrastive"].logit_bias) is not None:
        torch.testing.assert_close(theirs.logit_bias, bias.reshape(()))
    for size in ((40, 97), (97, 40), (33, 33)):
        torch.testing.assert_close(preprocess(picture(1, *size)), pixels(picture(1, *size), config))


@torch.inference_mode()
def test_transformers_gives_the_same_embeddings(
    run: Path, images: torch.Tensor, picture: Callable, tmp_path: Path
) -> None:
    config, model, _ = load_run(run)
    export(run, "hf", tmp_path / "out")
    theirs, info = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    words = tokenizer(WORDS, padding=True, truncation=True, return_tensors="pt")
    found = theirs.eval()(pixel_values=images, **words)
    teacher = choose_branch(config, model)
    expected = normalize(teacher.image.project(teacher.image.features(images)[:, 0]), dim=-1)
    torch.testing.assert_close(found.image_embeds, expected, **TOLERANCE)
    torch.testing.assert_close(found.text_embeds, text_embeddings(teacher, WORDS, config), **TOLERANCE)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    pixel_values = processor(picture(1, 40, 97), return_tensors="pt")["pixel_values"][0]
    assert (pixel_values - pixels(picture(1, 40, 97), config)).abs().max() < 0.05  # resized by another library


@torch.inference_mode()
def test_a_run_without_text(tiny: dict, images: torch.Tensor, tmp_path: Path) -> None:
    tiny["objectives"] = {"self_distillation": tiny["objectives"]["self_distillation"]}
    run = save_run(tmp_path / "run", tiny)
    export(run, "hf", tmp_path / "out")
    model = load_run(run).model
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    expected = model.teacher.image.features(images)
    torch.testing.assert_close(theirs(images).last_hidden_state, expected, **TOLERANCE)
    with pytest.raises(UserError, match="open_clip needs both towers"):
        export(run, "open_clip", tmp_path / "clip")


def test_the_documented_backbone_works(tiny: dict, tmp_path: Path) -> None:
    tiny["model"]["image"] |= {"depth": 12, "patch_size": 16}
    tiny["views"] |= {"global_size": 64, "local_size": 32}
    export(save_run(tmp_path / "run", tiny), "timm", tmp_path / "out")
    (code,) = [b for b in (ROOT / "docs" / "export.md").read_text().split("```python") if "class Backbone" in b]
    names: dict[str, Any] = {}
    exec(code.split("```")[0], names)
    levels = names["Backbone"](str(tmp_path / "out"))(torch.randn(1, 3, 96, 128))
    assert [tuple(level.shape) for level in levels] == [(1, 256, 96 // s, 128 // s) for s in (4, 8, 16, 32)]


@torch.inference_mode()
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("branch", ["teacher", "student"])
def test_what_was_exported_comes_back(run: Path, images: torch.Tensor, tmp_path: Path, form: str, branch: str) -> None:
    config, model, _ = load_run(run)
    if form == "open_clip" and getattr(model, branch).image.contrastive_projection is None:
        with pytest.raises(UserError, match="open_clip needs both towers"):
            export(run, form, branch=branch)
        return
    file = export(run, form, branch=branch)
    assert file.parent == run / "export" / form
    restored, towers = load_exported(file)
    expected = getattr(model, branch)
    assert restored.evaluate.branch == branch and restored.model == config.model
    assert restored.data.train == ["none.beton"]
    assert torch.equal(towers.image.features(images), expected.image.features(images))
    if form != "timm" and expected.image.contrastive_projection is not None:
        assert torch.equal(text_embeddings(towers, WORDS, restored), text_embeddings(expected, WORDS, config))


def test_evaluate_takes_an_export(
    run: Path, tar: Callable, picture: Callable, encoded: Callable, tmp_path: Path
) -> None:
    files = []
    for i in range(4):
        label = json.dumps({"name": f"thing {i}", "subcategory": str(i % 2), "caption": f"thing {i}"}).encode()
        files += [(f"{i}.png", encoded(picture(i, 40, 30), "PNG")), (f"{i}.json", label)]
    data = str(tar("set.tar", files))
    settings = [f"evaluate.data={data}", f"evaluate.bank={data}", "evaluate.neighbours=3"]
    expected = evaluate_run(run, [], settings)
    for form in FORMATS:
        file = export(run, form, tmp_path / form)
        found = evaluate_run(tmp_path / form if form != "hf" else file, [], settings)
        assert found == ({"knn": expected["knn"]} if form == "timm" else expected)
        assert json.loads((tmp_path / form / "metrics.json").read_text()) == found
    card = (tmp_path / "timm" / "README.md").read_text()
    top1 = f"{100 * expected['knn']['top1']:.2f}"
    assert f"| knn top1 | {top1} | 50.00 | set.tar; learned from set.tar; step-00001200 |" in card
    assert "chance top1" not in card
    assert "not chosen yet" in card and "| optimizer steps | 1,200 |" in card and str(tmp_path) not in (
        card.replace(str(tmp_path / "timm"), "")
    )  # fmt: skip
    with pytest.raises(UserError, match=r"holds the (teacher, not the student|student, not the teacher)"):
        other = {"teacher": "student", "student": "teacher"}[load_exported(file)[0].evaluate.branch]
        evaluate_run(tmp_path / "timm", [], [*settings, f"evaluate.branch={other}"])
    with pytest.raises(UserError, match="cannot do zero-shot"):
        evaluate_run(tmp_path / "timm", ["zero-shot"], settings)


def test_the_card_names_folders_of_any_name(run: Path, tmp_path: Path) -> None:
    file = export(run, "timm", tmp_path / "FILES of a FOLDER")
    card = (file.parent / "README.md").read_text()
    assert f'timm.create_model("local-dir:{file.parent}", pretrained=True)' in card and f'file="{file}"' in card


@pytest.mark.parametrize(("source", "name"), [
    ("data/cc3m.beton", "cc3m.beton"),
    ("https://me:secret@host/folder/{00..99}.tar?token=secret#secret", "{00..99}.tar"),
    ("s3://secret@bucket", "an address"),
    ("https://me:sec#ret@host/a.tar", "an address"),
    ("zip://a.tar::https://me:secret@host/b.zip?to=https://host/secret", "b.zip"),
    ("pipe:curl -H 'Key: secret' https://host/a.tar", "a command"),
])  # fmt: skip
def test_data_are_named_without_what_is_secret(tiny: dict, tmp_path: Path, source: str, name: str) -> None:
    tiny["data"] |= {"train": [source], "loader": "webdataset"}
    run = save_run(tmp_path / "run", tiny)
    file = export(run, "safetensors", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| data | {name} |" in card and "secret" not in card
    assert load_exported(file)[0].data.train == [name] and b"secret" not in file.read_bytes()


def test_a_file_is_written_over_an_earlier_export_only(tiny: dict, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", tiny)
    for name in ("x.safetensors", "x.md", "x.json"):
        (tmp_path / name).write_bytes(b"of somebody else")
        with pytest.raises(UserError, match=rf"{name}: is there already and not of an earlier export"):
            export(run, "timm", tmp_path / "x.safetensors")
        assert (tmp_path / name).read_bytes() == b"of somebody else"
        (tmp_path / name).unlink()
    export(run, "safetensors", tmp_path / "x.safetensors")
    (tmp_path / "x.json").write_text("of somebody else")  # such an export has none
    with pytest.raises(UserError, match=r"x.json: is there already"):
        export(run, "timm", tmp_path / "x.safetensors")
    (tmp_path / "x.json").unlink()
    for _ in range(2):
        export(run, "timm", tmp_path / "x.safetensors")
    assert not list(tmp_path.glob("*.tmp"))


def test_the_commands(run: Path, tar: Callable, picture: Callable, encoded: Callable, tmp_path: Path) -> None:
    for i in range(4):
        path = tmp_path / "set" / f"class {i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(i, 40, 30), "PNG"))
    data = str(tmp_path / "set")
    shell = CliRunner()
    assert shell.invoke(app, ["export", str(run), "timm", str(tmp_path / "out")]).output.strip() == str(
        tmp_path / "out" / "model.safetensors"
    )
    words = ["evaluate", str(tmp_path / "out"), "knn", "--data", data, "--bank", data, "evaluate.neighbours=1"]
    said = shell.invoke(app, words)
    assert said.exit_code == 0 and "100.00" in said.output, said.output
    assert isinstance(shell.invoke(app, ["evaluate", str(run), "nap"]).exception, UserError)
    assert isinstance(shell.invoke(app, [*words[:3], "--data", data, "--branch", "aunt"]).exception, UserError)


def test_mistakes_are_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    (tmp_path / "weights.safetensors").write_bytes(b"")
    for arguments, message in (
        ((run, "onnx"), "unknown format 'onnx'; one of timm"),
        ((run, "timm", tmp_path / "full"), "holds other files"),
        ((run, "hf", tmp_path / "x.safetensors"), "name a folder"),
        ((run, "timm", tmp_path / "weights.safetensors" / "x"), "cannot be written"),
        ((tmp_path / "full", "timm"), "not a run folder"),
        ((run, "timm", None, "aunt"), "unknown branch 'aunt'"),
    ):
        with pytest.raises(UserError, match=message):
            export(*arguments)
    with pytest.raises(UserError, match="not a weights file of `harmony-fast export`"):
        evaluate_run(tmp_path / "weights.safetensors", [], [])
    (tmp_path / "disk" / "model.safetensors.tmp").mkdir(parents=True)  # of an earlier export, and it cannot be written
    with pytest.raises(UserError, match=r"model.safetensors: cannot be written: .*Is a directory"):
        export(run, "timm", tmp_path / "disk")
    file = export(run, "safetensors", tmp_path / "x.safetensors")
    export(run, "safetensors", tmp_path / "x.safetensors")  # over its own
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"x.safetensors"):
        evaluate_run(file, [], [])
