"""Configuration: typed, unknown keys refused with the nearest valid one, written and read back unchanged."""

from pathlib import Path

import pytest
import yaml
from harmony_fast.engine.config import REFERENCE_COMPAT, differences, dump_config, load_config, parse_config
from harmony_fast.engine.errors import UserError
from hypothesis import given
from hypothesis import strategies as st

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_committed_configurations_are_valid_and_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    again = tmp_path / "config.yaml"
    again.write_text(dump_config(config))
    assert differences(load_config(again), config) == []


@pytest.mark.parametrize(("override", "message"), [
    ("epoch=3", "unknown key 'epoch'; did you mean 'epochs'?"),
    ("data.batchsize=3", "unknown key 'data.batchsize'; did you mean 'data.batch_size'?"),
    ("objectives.contrastive.hard_wieght=1", "did you mean 'objectives.contrastive.hard_weight'?"),
    ("objectives.contrastiv={}", "did you mean 'objectives.contrastive'?"),
    ("model.image.zzz=1", "unknown key 'model.image.zzz'; valid: depth,"),
    ("epochs=many", "'epochs': input should be a valid integer"),
    ("data.batch_size=-1", "'data.batch_size': input should be greater than 0"),
    ("precision=fp8", "'precision': input should be 'auto', 'fp32', 'bf16' or 'fp16' (given: 'fp8')"),
    ("views.global_scale=[0.9, 0.1]", "the lower bound 0.9 is above the upper bound 0.1"),
    ("views.global_size=33", "views.global_size 33 is not a multiple of the patch size 8"),
    ("model.image.name=ViT-X/16", "'ViT-X/16' is none of ViT-Ti/16"),
    ("model.image.heads=5", "width 32 is not divisible by heads 5"),
    ("evaluate.templates=[photo]", "'photo' has no {} for the class name"),
    ("objectives=3", "'objectives'"),
    ("max_time=[]", "'max_time': input should be a valid string, or input should be a valid integer (given: [])"),
    ("data.train=5", "c.yaml: 'data.train': input is not a valid path"),
    ("evaluate.neighbours=[1, -2]", "'evaluate.neighbours.1': input should be greater than 0 (given: -2)"),
    ("epochs", "'epochs' is not of the form key=value"),
])  # fmt: skip
def test_mistakes_are_named(tiny: dict, tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(tiny))
    with pytest.raises(UserError) as error:
        load_config(path, [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["a: [1,", "- 1\n- 2", "!!python/object/apply:os.system ['true']", "\x00", "", "a: !!int b"]
)
def test_what_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"c\.yaml"):
        load_config(path)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such configuration file"):
        load_config(Path("nowhere.yaml"))


def test_overrides_reach_their_places(tiny: dict, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(tiny))
    config = load_config(path, ["optimizer.lr=1e-3", "objectives.reconstruction=null", "views.local_crops=0", "seed=7"])
    assert config.optimizer.lr == 1e-3
    assert "reconstruction" not in config.objectives.active()
    assert (config.views.local_crops, config.seed) == (0, 7)


def test_a_date_is_a_name(tiny: dict, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(tiny) + "run_dir: 2026-02-31\n")
    assert load_config(path).run_dir == Path("2026-02-31")
    config = load_config(path, ["run_dir=2026-02-28"])
    assert config.run_dir == Path("2026-02-28")
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_a_batch_is_shared_equally(tiny: dict) -> None:
    data = parse_config({**tiny, "data": {**tiny["data"], "batch_size": 8}}, "test").data
    assert data.samples_per_rank(2) == 4
    for ranks in (3, 16):
        with pytest.raises(UserError, match=f"data.batch_size 8 cannot be divided among {ranks} ranks"):
            data.samples_per_rank(ranks)


def test_no_objective_is_refused(tiny: dict) -> None:
    with pytest.raises(UserError, match="name at least one of contrastive"):
        parse_config({**tiny, "objectives": {}}, "test")


def test_reference_compat_sets_what_is_not_said(tiny: dict) -> None:
    def value(config: object, key: str) -> object:
        for part in key.split("."):
            config = getattr(config, part)
        return config

    plain = parse_config(tiny, "test")
    tiny["objectives"]["self_distillation"]["patch_center"] = "masked"
    compat = parse_config({**tiny, "reference_compat": True}, "test")
    for key, expected in REFERENCE_COMPAT.items():
        assert value(plain, key) != expected
        said = key == "objectives.self_distillation.patch_center"
        assert value(compat, key) == ("masked" if said else expected)


@given(st.dictionaries(st.text(max_size=8), st.none() | st.integers() | st.text(max_size=5) | st.lists(st.integers())))
def test_any_mapping_gives_a_configuration_or_a_message(raw: dict) -> None:
    with pytest.raises(UserError):  # data and objectives are required and never in it
        parse_config(raw, "test")


def test_a_base_is_read_first(tmp_path: Path, tiny: dict) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**tiny, "seed": 3}))
    middle = {
        "base": "../tiny.yaml",
        "epochs": 9,
        "objectives": {"reconstruction": None, "contrastive": {"weight": 2.0}},
    }
    (tmp_path / "sub" / "middle.yaml").write_text(yaml.safe_dump(middle))
    (tmp_path / "sub" / "top.yaml").write_text("base: middle.yaml\nepochs: 5\nviews: {local_crops: 0}\n")
    config = load_config(tmp_path / "sub" / "top.yaml", ["objectives.contrastive.embed_dim=8"])
    assert (config.seed, config.epochs, config.views.local_crops) == (3, 5, 0)
    assert config.views.global_size == tiny["views"]["global_size"]
    assert "reconstruction" not in config.objectives.active() and "masked_language" in config.objectives.active()
    assert (config.objectives.contrastive.weight, config.objectives.contrastive.embed_dim) == (2.0, 8)
    assert "base" not in yaml.safe_load(dump_config(config))


@pytest.mark.parametrize(("text", "message"), [
    ("base: nowhere.yaml", "nowhere.yaml: no such configuration file"),
    ("base: c.yaml", "c.yaml: is its own base (c.yaml)"),
    ("base: 3", "c.yaml: 'base' must be the path of a configuration file (given: 3)"),
])  # fmt: skip
def test_a_base_that_cannot_be_read_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        load_config(tmp_path / "c.yaml")
    assert message in str(error.value)
