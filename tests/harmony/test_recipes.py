"""The recipes: valid at full size, trained for two steps at a tiny size, and nothing built that is not used."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from commands import ROOT, log, run
from drawn import draw_views
from harmony_fast.engine.config import RunConfig, dump_config, load_config
from harmony_fast.engine.data.prepare import prepare
from harmony_fast.engine.errors import UserError
from harmony_fast.harmony.model import Harmony
from harmony_fast.harmony.objectives import Collectives
from harmony_fast.harmony.schedules import Clock
from harmony_fast.harmony.views import Views
from harmony_fast.kernels import contrastive_loss
from safetensors.torch import load_file
from tiny import tiny_config

RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
BOTH = "student.image student.text"
ALL = f"{BOTH} teacher.image teacher.text"
HEAD, WORDS = "heads.self_distillation", "heads.text_distillation"
# What each recipe is made of: objectives, towers, heads (of student and teacher), single parameters and buffers.
PARTS = {
    "clip": ("contrastive", BOTH, "", "contrastive_projection text_projection ln_final"),
    "siglip": ("contrastive", BOTH, "", "contrastive_projection text_projection ln_final logit_bias"),
    "mae": ("reconstruction", "student.image", "", "decoder"),
    "clip-mae": ("contrastive reconstruction", BOTH, "", "contrastive_projection text_projection ln_final decoder"),
    "ibot": ("self_distillation", "student.image teacher.image", HEAD, "masked_embed patch_center class_center"),
    "dino": ("self_distillation", "student.image teacher.image", HEAD, "class_center"),
    "scfs": ("scfs self_distillation", "student.image teacher.image", f"{HEAD} heads.scfs", "class_center"),
    "slip": (
        "contrastive self_distillation", f"{BOTH} teacher.image", HEAD,
        "contrastive_projection text_projection ln_final class_center",
    ),
    "silc": (
        "contrastive self_distillation", f"{BOTH} teacher.image", HEAD,
        "contrastive_projection text_projection ln_final class_center",
    ),
    "maskclip": (
        "contrastive self_distillation", f"{BOTH} teacher.image", HEAD,
        "contrastive_projection text_projection ln_final masked_embed patch_center class_center",
    ),
    "harmony": (
        "contrastive masked_language reconstruction self_distillation text_distillation", ALL, f"{HEAD} {WORDS}",
        "contrastive_projection text_projection ln_final masked_embed patch_center class_center decoder",
    ),
    "harmony-minus-contrastive": (
        "masked_language reconstruction self_distillation text_distillation", ALL, f"{HEAD} {WORDS}",
        "ln_final masked_embed patch_center class_center decoder",
    ),
    "harmony-minus-self-distillation": (
        "contrastive masked_language reconstruction text_distillation", ALL, WORDS,
        "contrastive_projection text_projection ln_final decoder",
    ),
    "harmony-minus-reconstruction": (
        "contrastive masked_language self_distillation text_distillation", ALL, f"{HEAD} {WORDS}",
        "contrastive_projection text_projection ln_final masked_embed patch_center class_center decoder",
    ),
    "harmony-minus-masked-language": (
        "contrastive reconstruction self_distillation text_distillation", ALL, f"{HEAD} {WORDS}",
        "contrastive_projection text_projection ln_final masked_embed patch_center class_center decoder",
    ),
    "harmony-minus-text-distillation": (
        "contrastive masked_language reconstruction self_distillation", ALL, HEAD,
        "contrastive_projection text_projection ln_final masked_embed patch_center class_center decoder",
    ),
}  # fmt: skip
SINGLE = ("masked_embed", "patch_center", "class_center", "contrastive_projection", "text_projection", "ln_final",
          "logit_bias", "decoder")  # fmt: skip


def tiny_overrides(path: Path) -> list[str]:
    """Every size of the tiny configuration, for the objectives that the recipe has."""
    tiny = tiny_config()
    tiny["model"]["image"]["drop_path"] = 0.0
    sizes = {
        "model.image": tiny["model"]["image"], "model.text": tiny["model"]["text"],
        "views.global_size": 32, "views.local_size": 16,
    }  # fmt: skip
    objectives = {**tiny["objectives"], "scfs": {"prototypes": 24, "hidden": 32, "bottleneck": 16}}
    for name in load_config(path).objectives.active():
        sizes.update({f"objectives.{name}.{key}": value for key, value in objectives[name].items()})
        if name in ("self_distillation", "scfs"):
            sizes[f"objectives.{name}.freeze_last_layer"] = 0
    return [f"{key}={json.dumps(value)}" for key, value in sizes.items()]


def has(part: str, names: list[str]) -> bool:
    return any(re.search(rf"(^|\.){re.escape(part)}(\.|$)", name) for name in names)


def build(config: RunConfig) -> Harmony:
    torch.manual_seed(0)
    return Harmony(config)


def views_of(config: RunConfig, batch: int = 4) -> Views:
    torch.manual_seed(1)
    end = config.model.text.vocabulary - 1
    tokens = torch.zeros(batch, 16, dtype=torch.int64)
    for i, row in enumerate(tokens):
        row[0], row[10 + i] = end - 1, end
        row[1 : 10 + i] = torch.randint(1, end - 1, (9 + i,))
    v = config.views
    sizes = ((v.global_crops, v.global_size), (v.local_crops, v.local_size))
    return draw_views(v, 8, *(torch.randn(n, batch, 3, s, s) for n, s in sizes), tokens, torch.arange(batch), 0, 0)


def loss_of(model: Harmony, views: Views, clock: Clock) -> torch.Tensor:
    return model.losses(views, model.teach(views), clock, Collectives()).loss


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of two steps for each recipe."""
    folder = tmp_path_factory.mktemp("recipes")
    prepare([ROOT / "demo" / "noto.tar"], folder / "train.beton", context=16, limit=16, workers=1, progress=False)
    common = [
        "epochs=2", "max_steps=2", "log_every=1", "checkpoint_every=1", "precision=fp32", "optimizer.warmup_epochs=0",
        f"data.train={folder / 'train.beton'}", "data.batch_size=8", "data.workers=1",
    ]  # fmt: skip
    for path in RECIPES:
        run("train", path, *common, *tiny_overrides(path), f"run_dir={folder / path.stem}")
    return folder


def test_every_recipe_is_described_here() -> None:
    assert {path.stem for path in RECIPES} == set(PARTS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_is_valid_says_who_made_it_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    text = path.read_text()
    assert re.search(r"arXiv \d{4}\.\d{5}", text.split("base:")[0])
    assert yaml.safe_load(text)["run_dir"] == f"runs/{path.stem}"
    config = load_config(path)
    assert (config.model.image.width, config.views.global_size, config.data.batch_size) == (768, 224, 768)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize("name", sorted(PARTS))
def test_two_steps_of_a_recipe(trained: Path, name: str) -> None:
    folder = trained / name
    entries = log(folder)
    objectives = PARTS[name][0].split()
    assert [entry["step"] for entry in entries] == [1, 2]
    for entry in entries:
        assert {key for key in entry if key.startswith("loss/")} == {f"loss/{o}" for o in objectives}
        assert all(torch.tensor(value).isfinite() for value in entry.values() if isinstance(value, float))
    before, after = (load_file(folder / f"checkpoints/step-0000000{i}/weights.safetensors") for i in (1, 2))
    model = build(load_config(folder / "config.yaml"))
    learned = [n for n, p in model.named_parameters() if p.requires_grad]
    followed = [n for n, _ in model.named_parameters() if n.startswith("teacher.")]
    assert [n for n in learned + followed if torch.equal(before[n], after[n])] == []
    assert all(value.isfinite().all() for value in after.values())


@pytest.mark.parametrize("name", sorted(PARTS))
def test_unused_parts_are_absent(trained: Path, name: str) -> None:
    names = list(load_file(trained / name / "checkpoints/step-00000002/weights.safetensors"))
    _, towers, heads, single = (part.split() for part in PARTS[name])
    for tower in ALL.split():
        assert has(tower, names) == (tower in towers), tower
    for head in (HEAD, WORDS, "heads.scfs"):
        for branch in ("student", "teacher"):
            assert has(f"{branch}.{head}", names) == (head in heads), (branch, head)
    for part in SINGLE:
        assert has(part, names) == (part in single), part
    decoders = [o for o in ("reconstruction", "masked_language") if has(f"objectives.{o}.decoder", names)]
    assert decoders == [o for o in ("reconstruction", "masked_language") if o in PARTS[name][0].split()]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_parameter_is_used(path: Path) -> None:
    """A trainable one gets a gradient; one of the teacher makes the loss or a center NaN if it is."""
    config = load_config(path, [*tiny_overrides(path), "model.text.vocabulary=50"])
    model, views = build(config).train(), views_of(config)
    clock = Clock(30, 3, 25)  # soft labels count by now
    loss_of(model, views, clock).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    centers = {name: value.clone() for name, value in model.named_buffers() if "center" in name}
    for name, parameter in model.teacher.named_parameters():
        if name == "image.contrastive_projection" and model.teacher.text is None:
            continue  # an average that is kept, though nothing is compared with it
        before = parameter.data.clone()
        parameter.data.fill_(float("nan"))
        with torch.no_grad():
            loss = loss_of(model, views, clock)
            model.end_step(Collectives())
        reached = [loss, *(value.sum() for n, value in model.named_buffers() if "center" in n)]
        assert not torch.stack(reached).isfinite().all(), name
        parameter.data.copy_(before)
        model.load_state_dict(centers, strict=False)


def test_a_class_token_recipe_shows_the_student_unmasked_crops() -> None:
    path = ROOT / "configs" / "recipes" / "dino.yaml"
    config = load_config(path, ["views.block_ratios=[0.5]", *tiny_overrides(path)])
    model, views = build(config), views_of(config)
    blind = Views(
        **{**vars(views), "block_mask": torch.zeros_like(views.block_mask), "block_index": views.block_index[:0]}
    )
    assert views.block_mask.any()
    assert torch.equal(loss_of(model, views, Clock(0, 3, 25)), loss_of(model, blind, Clock(0, 3, 25)))


@pytest.mark.parametrize(("override", "message"), [
    ("contrastive.hard_weight_end=0.2", "kind: sigmoid has no soft targets; set hard_weight and hard_weight_end to 1"),
    ("self_distillation={patch_weight: null, patch_prototypes: 8}", "patch_prototypes is set, but patch_weight is"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(ROOT / "configs" / "recipes" / "siglip.yaml", [f"objectives.{override}"])


def test_sigmoid_starts_as_siglip_does_and_softmax_as_clip() -> None:
    started = {}
    for path in RECIPES:
        if path.stem in ("clip", "siglip"):
            started[path.stem] = build(load_config(path, tiny_overrides(path))).objectives["contrastive"]
    torch.testing.assert_close(started["siglip"].logit_scale, torch.tensor([10.0]).log())
    assert started["siglip"].logit_bias.item() == -10 and started["siglip"].upper_bounds() == []
    torch.testing.assert_close(started["clip"].logit_scale, torch.tensor([1 / 0.07]).log())
    assert started["clip"].logit_bias is None


def test_sigmoid_alone_needs_no_further_key() -> None:
    config = load_config(ROOT / "configs" / "recipes" / "clip.yaml", ["objectives.contrastive={kind: sigmoid}"])
    assert config.objectives.contrastive.hard_weight_end == 1.0


def test_the_sigmoid_loss_of_the_authors_numbers() -> None:
    from safetensors import safe_open

    with safe_open(ROOT / "tests" / "golden" / "tiny_a.safetensors", "pt") as f:
        image, text = (
            torch.nn.functional.normalize(f.get_tensor(f"inter.clip.{n}_embed"), dim=-1) for n in ("image", "text")
        )
        expected = f.get_tensor("loss.siglip_hard")
    loss = contrastive_loss(image, text, 10.0, kind="sigmoid", logit_bias=-10.0)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
