"""Checkpoints of the authors' code into runs and back: bit for bit, and nothing in a file is ever run."""

import argparse
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from authors_checkpoints import (
    HEADS,
    Weights,
    assert_same,
    authors_state,
    checkpoint,
    fixture_weights,
    saved,
    text_names,
)
from harmony_fast.engine.checkpoint import load_run, write_weights_only
from harmony_fast.engine.cli import app
from harmony_fast.engine.config import dump_config, parse_config
from harmony_fast.engine.convert import from_run, our_name, to_run
from harmony_fast.engine.errors import UserError
from harmony_fast.harmony.model import Harmony
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def golden() -> Weights:
    """The fixture's weights, under its names."""
    return fixture_weights()


def refusal(paths: list[Path], run: Path, overrides: list[str] | None = None) -> str:
    with pytest.raises(UserError) as error:
        to_run(paths, run, HEADS if overrides is None else overrides)
    assert "\n" not in str(error.value)
    assert not run.exists()
    return str(error.value)


def test_the_fixture_s_names_go_in_and_come_back(golden: Weights, tmp_path: Path) -> None:
    path = saved(tmp_path / "checkpoint.pth", golden)
    config, report = to_run([path], tmp_path / "run", HEADS)
    gains = sum(name.endswith("weight_g") for name in golden)
    assert (report.placed, report.kept, report.fresh) == (len(golden) - gains, [], [])
    model = load_run(tmp_path / "run").model
    state = model.state_dict()
    assert set(state) == {our_name(name) for name in golden if not name.endswith("weight_g")}
    for name, value in golden.items():
        if not name.endswith("weight_g"):
            assert torch.equal(state[our_name(name)].flatten(), value.flatten()), name
    assert config.views.global_size == 64 and config.views.local_size == 32 and config.model.image.patch_size == 16
    assert from_run(tmp_path / "run", tmp_path / "back.pth") == []
    assert_same(golden, torch.load(tmp_path / "back.pth", weights_only=True))


def test_the_authors_names_mean_the_same(golden: Weights, tmp_path: Path) -> None:
    content = checkpoint(
        golden, epochs=7, lr=1e-3, lambda1=0.25, lambda2=0.75, hard_labels_weight_end=0.4,
        warmup_teacher_patch_temp=0.03, local_crops_number=4, global_crops_scale=[0.3, 0.9], pred_ratio=0.3,
        pred_ratio_var=0.1, drop_path_rate=0.1, data="CC3M:somewhere", norm_in_head=None,
    )  # fmt: skip
    path = saved(tmp_path / "checkpoint.pth", content)
    config, report = to_run([path], tmp_path / "run", HEADS)
    assert (report.kept, report.fresh, report.left_out) == ([], [], ["checkpoint.pth: optimizer"])
    to_run([saved(tmp_path / "other.pth", golden)], tmp_path / "other", HEADS)
    ours, theirs = (load_run(tmp_path / run)[1].state_dict() for run in ("run", "other"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)

    o = config.objectives
    assert (config.epochs, config.optimizer.lr, config.model.image.drop_path) == (7, 1e-3, 0.1)
    assert (o.self_distillation.class_weight, o.self_distillation.patch_weight) == (0.25, 0.75)
    assert o.contrastive.hard_weight_end == 0.4 and o.text_distillation.teacher_temperature_start == 0.03
    assert (config.views.local_crops, config.views.global_scale) == (4, (0.3, 0.9))
    assert (config.views.block_ratios, config.views.block_ratio_spreads) == ((0.3,), (0.1,))

    from_run(tmp_path / "run", tmp_path / "checkpoint.pth")
    back = torch.load(tmp_path / "checkpoint.pth", weights_only=False)
    assert_same(content["model"], back["model"])
    assert_same(content["disc_loss"], back["disc_loss"])
    assert back["epoch"] == 3 and back["args"].lr == 1e-3


def test_wrappers_names_are_seen_through(golden: Weights, tmp_path: Path) -> None:
    wrapped = {f"module.{name}": value for name, value in authors_state(golden).items()}
    _, report = to_run([saved(tmp_path / "a.pth", {"model": wrapped})], tmp_path / "run", HEADS)
    assert report.kept == []
    from_run(tmp_path / "run", tmp_path / "back.pth")
    assert_same(wrapped, torch.load(tmp_path / "back.pth", weights_only=True)["model"])


def towers(golden: Weights, folder: Path) -> tuple[Path, Path]:
    """`main_vit_checkpoint.pth` and `main_text_checkpoint.pth`: the teacher's towers."""
    vit = {name[14:]: value for name, value in golden.items() if name.startswith("teacher.image.")}
    text = {text_names(name[13:]): value for name, value in golden.items() if name.startswith("teacher.text.")}
    return saved(folder / "main_vit_checkpoint.pth", vit), saved(folder / "main_text_checkpoint.pth", text)


@pytest.mark.parametrize(("which", "objective", "kept"), [
    ("vit", "reconstruction", ["contrastive_projection"]),
    ("text", "masked_language", ["text_norm.bias", "text_norm.weight", "text_projection"]),
    ("vit text", "contrastive", []),
])  # fmt: skip
def test_towers_alone(golden: Weights, tmp_path: Path, which: str, objective: str, kept: list[str]) -> None:
    paths = [path for path in towers(golden, tmp_path) if path.name.split("_")[1] in which]
    heads = [override for override in HEADS if override.split(".")[1] in which.replace("vit", "image")]
    config, report = to_run(paths, tmp_path / "run", heads)
    assert list(config.objectives.active()) == [objective]
    assert sorted(report.kept) == kept
    assert all(name.startswith(f"objectives.{objective}.") for name in report.fresh) and report.fresh
    model = load_run(tmp_path / "run").model
    assert not list(model.teacher.parameters())
    if "vit" in which:
        assert torch.equal(model.student.image.cls_token, golden["teacher.image.cls_token"])
    for path in paths:
        (tmp_path / "out").mkdir(exist_ok=True)
        assert sorted(from_run(tmp_path / "run", tmp_path / "out" / path.name)) == sorted(report.fresh)
        assert_same(*(torch.load(p, weights_only=True) for p in (path, tmp_path / "out" / path.name)))
    if len(paths) > 1:
        with pytest.raises(UserError, match=r"call the output main_vit_checkpoint\.pth or main_text_checkpoint\.pth"):
            from_run(tmp_path / "run", tmp_path / "out" / "else.pth")


def test_a_teacher_that_is_not_given_starts_as_the_student(golden: Weights, tmp_path: Path) -> None:
    vit, _ = towers(golden, tmp_path)
    overrides = [
        HEADS[0], "objectives.reconstruction=null",
        "objectives.self_distillation={prototypes: 8, hidden: 8, bottleneck: 4}",
    ]  # fmt: skip
    _, report = to_run([vit], tmp_path / "run", overrides)
    state = load_run(tmp_path / "run")[1].state_dict()
    assert all(
        torch.equal(v, state[n.replace("teacher.", "student.")]) for n, v in state.items() if n[:8] == "teacher."
    )
    lines = "\n".join(report.lines(tmp_path / "run"))
    assert "not given, a copy of the student's: teacher.image.*" in lines
    assert "not given, initialised: student.image.masked_embed (1)" in lines
    assert "no place in this run" in lines and "contrastive_projection" in lines


def test_separate_output_layers_stay_apart(golden: Weights, tmp_path: Path) -> None:
    state = authors_state(golden)
    for name in [n for n in state if "last_layer2" in n]:
        state[name] = torch.randn(24, 16) if name.endswith("_v") and "student" in name else torch.ones(24, 1)
    for branch in ("student", "teacher"):
        second = torch.randn(24, 16)
        state.update({n: second for n in state if branch in n and n.endswith("last_layer2.weight_v")})
    for name in ("discriminative_path.loss.center2",):
        state[name] = torch.randn(1, 1, 24)
    config, report = to_run([saved(tmp_path / "a.pth", {"model": state})], tmp_path / "run", HEADS)
    assert config.objectives.self_distillation.patch_prototypes == 24 and report.kept == report.fresh == []
    from_run(tmp_path / "run", tmp_path / "back.pth")
    assert_same(state, torch.load(tmp_path / "back.pth", weights_only=True)["model"])


def test_class_tokens_alone_are_dino(golden: Weights, tmp_path: Path) -> None:
    parts = ("student.image.", "teacher.image.", "student.head.", "teacher.head.", "center.cls")
    kept = {n: v for n, v in golden.items() if n.startswith(parts) and "masked_embed" not in n}
    content = {"model": authors_state(kept), "args": argparse.Namespace(lambda1=0.5, lambda2=0.5)}
    config, report = to_run([saved(tmp_path / "a.pth", content)], tmp_path / "run", HEADS[:1])
    assert list(config.objectives.active()) == ["self_distillation"]
    assert config.objectives.self_distillation.patch_weight is None
    assert config.objectives.self_distillation.class_weight == 1.0
    assert report.fresh == [] and all("contrastive_projection" in name for name in report.kept)


def test_siglip_has_its_bias(golden: Weights, tmp_path: Path) -> None:
    kept = {
        n: v
        for n, v in golden.items()
        if n.startswith(("student.image", "student.text.", "logit")) and "masked" not in n
    }
    state = {**authors_state(kept), "contrastive_path.logit_bias": torch.tensor(-9.5)}
    config, report = to_run([saved(tmp_path / "a.pth", {"model": state})], tmp_path / "run", HEADS[:2])
    assert list(config.objectives.active()) == ["contrastive"] and config.objectives.contrastive.kind == "sigmoid"
    assert load_run(tmp_path / "run")[1].objectives["contrastive"].logit_bias.item() == -9.5
    assert report.kept == report.fresh == []


def test_half_precision_weights_come_back_in_their_precision(golden: Weights, tmp_path: Path) -> None:
    half = {name: value.bfloat16() if i % 2 else value.double() / 3 for i, (name, value) in enumerate(golden.items())}
    half = {name: torch.ones_like(v) if name.endswith("weight_g") else v for name, v in half.items()}
    to_run([saved(tmp_path / "a.pth", half)], tmp_path / "run", HEADS)
    from_run(tmp_path / "run", tmp_path / "back.pth")
    assert_same(half, torch.load(tmp_path / "back.pth", weights_only=True))


def test_what_has_no_place_is_named_and_kept(golden: Weights, tmp_path: Path) -> None:
    odd = {**golden, "student.image.register_tokens": torch.randn(1, 4, 48), "something": torch.arange(3)}
    _, report = to_run([saved(tmp_path / "a.pth", {**odd, "note": "hello"})], tmp_path / "run", HEADS)
    assert report.kept == ["student.image.register_tokens", "something"] and report.left_out == ["a.pth: note"]
    from_run(tmp_path / "run", tmp_path / "back.pth")
    assert_same(odd, torch.load(tmp_path / "back.pth", weights_only=True))


def without(golden: Weights, name: str) -> Weights:
    return {n: v for n, v in golden.items() if n != name}


@pytest.mark.parametrize(("change", "message"), [
    (lambda g: {**g, "student.head.last_layer.weight_g": torch.full((40, 1), 1.5)},
     "student.head.last_layer.weight_g is not 1: the output layer was trained with --norm_last_layer false"),
    (lambda g: without(g, "student.image.blocks.1.mlp.fc2.bias"), "the file lacks student.image.blocks.1.mlp.fc2.bias"),
    (lambda g: without(g, "student.image.patch_embed.proj.weight"), "patch_embed.proj.weight' is missing"),
    (lambda g: {**g, "mlm.head.weight": torch.zeros(7, 32)},
     "objectives.masked_language.decoder.head.weight: the file's shape is (7, 32), the model's (101, 32)"),
    (lambda g: {**g, "image_encoder.cls_token": torch.zeros(1, 1, 48)},
     "image_encoder.cls_token differs from another weight that should be the same (student.image.cls_token)"),
    (lambda g: {n: v for n, v in g.items() if n.startswith("mlm")}, "holds neither an image nor a text tower"),
    (lambda g: {"layer1.0.conv1.weight": torch.zeros(3)}, "no weight in it has a name that the authors' code uses"),
    (lambda g: [1, 2], "holds a list, not the weights of a model"),
    (lambda g: {}, "found: no tensors"),
])  # fmt: skip
def test_what_is_not_one_model_is_refused(
    golden: Weights, tmp_path: Path, change: Callable[[Weights], object], message: str
) -> None:
    path = saved(tmp_path / "a.pth", change(golden))
    text = refusal([path], tmp_path / "run")
    assert message in text


def test_settings_that_we_have_no_counterpart_of_are_told_or_refused(golden: Weights, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pth", checkpoint(golden, norm_pix_loss=False, act_in_head="gelu", random_masking=False))
    _, report = to_run([path], tmp_path / "told", HEADS)
    assert report.left_out == ["a.pth: optimizer", "setting norm_pix_loss=False"]
    path = saved(tmp_path / "b.pth", checkpoint(golden, act_in_head="relu"))
    assert "its heads have the activation relu, ours GELU" in refusal([path], tmp_path / "run")


def test_gains_that_an_average_has_rounded_are_ones(golden: Weights, tmp_path: Path) -> None:
    near = {**golden, "teacher.head.last_layer.weight_g": torch.full((40, 1), 1 + 1e-6)}
    to_run([saved(tmp_path / "a.pth", near)], tmp_path / "run", HEADS)
    from_run(tmp_path / "run", tmp_path / "back.pth")
    assert_same(near, torch.load(tmp_path / "back.pth", weights_only=True))


def test_unknown_heads_are_asked_for(golden: Weights, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pth", golden)
    message = refusal([path], tmp_path / "run", [])
    assert (
        "say model.image.heads=N (width 48) model.text.heads=N (width 32) objectives.reconstruction.heads=N" in message
    )
    config, _ = to_run([path], tmp_path / "run", HEADS[1:], heads=6)
    assert config.model.image.heads == 6


def test_a_folder_in_use_and_a_missing_file_are_refused(golden: Weights, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pth", golden)
    with pytest.raises(UserError, match="is there already and not empty"):
        to_run([path], tmp_path, HEADS)
    assert "no such file" in refusal([tmp_path / "nowhere.pth"], tmp_path / "run")
    with pytest.raises(UserError, match=r"a\.pth/run: cannot be written"):
        to_run([path], path / "run", HEADS)
    with pytest.raises(UserError, match="not a run folder"):
        from_run(tmp_path, tmp_path / "out.pth")


class Malice:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


class Sly:
    """Calls a function by way of a name that checkpoints may hold."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return eval, (f"open({str(self.target)!r}, 'w').close()",)


@pytest.mark.parametrize("where", ["top", "model", "args", "optimizer", "pickle", "legacy", "eval"])
def test_a_file_that_would_run_code_is_refused_and_does_not_run(golden: Weights, tmp_path: Path, where: str) -> None:
    proof, path = tmp_path / "proof", tmp_path / "a.pth"
    malice = Sly(proof) if where == "eval" else Malice(f"touch {proof}")
    content = checkpoint(golden)
    if where in ("top", "legacy", "pickle", "eval"):
        content["extra"] = malice
    elif where == "args":
        content["args"] = argparse.Namespace(arch=malice)
    else:
        content[where] = {**content[where], "image_encoder.extra": malice}
    if where == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=where != "legacy")
    message = refusal([path], tmp_path / "run")
    assert message.startswith(f"{path}: refused: ") and "can run code" in message
    assert not proof.exists()
    torch.load(path, weights_only=False) if where != "pickle" else pickle.loads(path.read_bytes())
    assert proof.exists()  # it would have


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x02}q\x00."])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    assert str(tmp_path / "a.pth") in refusal([tmp_path / "a.pth"], tmp_path / "run")


def test_a_file_that_is_cut_is_refused(golden: Weights, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pth", golden)
    path.write_bytes(path.read_bytes()[:-1000])
    assert "refused" in refusal([path], tmp_path / "run")


def test_a_run_of_ours_gets_the_authors_names(tiny: dict, tmp_path: Path) -> None:
    tiny["run_dir"] = str(tmp_path / "run")
    tiny["objectives"]["scfs"] = {"prototypes": 8, "hidden": 8, "bottleneck": 4}
    config = parse_config(tiny, "test")
    torch.manual_seed(0)
    model = Harmony(config)
    for value in model.state_dict().values():
        value.normal_()
    write_weights_only(tmp_path / "run", 5, model.state_dict())
    (tmp_path / "run" / "config.yaml").write_text(dump_config(config))
    missing = from_run(tmp_path / "run", tmp_path / "checkpoint.pth")
    assert missing and all("scfs" in name for name in missing)

    heads = ["model.image.heads=2", "model.text.heads=2", "objectives.reconstruction.heads=2"]
    _, report = to_run([tmp_path / "checkpoint.pth"], tmp_path / "again", heads)
    assert report.kept == report.fresh == []
    again = load_run(tmp_path / "again")[1].state_dict()
    assert set(again) == {name for name in model.state_dict() if "scfs" not in name}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.items())

    from_run(tmp_path / "run", tmp_path / "main_vit.pth")
    vit = torch.load(tmp_path / "main_vit.pth", weights_only=True)
    assert torch.equal(vit["blocks.0.attn.qkv.weight"], model.teacher.image.blocks[0].attn.qkv.weight)
    from_run(tmp_path / "run", tmp_path / "main_text.pth")
    text = torch.load(tmp_path / "main_text.pth", weights_only=True)
    assert torch.equal(text["text_norm.weight"], model.teacher.text.ln_final.weight)


def test_the_command_line(golden: Weights, tmp_path: Path) -> None:
    runner = CliRunner()
    path, run, out = saved(tmp_path / "a.pth", golden), tmp_path / "run", tmp_path / "out.pth"
    told = runner.invoke(app, ["convert", str(path), str(run), *HEADS[1:], "--heads", "3", "--step", "12"])
    assert told.exit_code == 0 and "185 weights placed" in told.stdout
    assert (run / "checkpoints" / "latest").read_text() == "step-00000012"
    assert runner.invoke(app, ["convert", str(run), str(out)]).exit_code == 0
    assert_same(golden, torch.load(out, weights_only=True))
    for more in (["other.pth"], ["seed=3"], ["--heads", "3"], ["--step", "1"]):
        refused = runner.invoke(app, ["convert", str(run), str(out), *more])
        assert isinstance(refused.exception, UserError) and "takes nothing else" in str(refused.exception)
    alone = runner.invoke(app, ["convert", str(path)])
    assert isinstance(alone.exception, UserError) and "say what from and what to" in str(alone.exception)
