"""The project's own configurations and the demo's data are found by name, from any folder; what lies there wins."""

from pathlib import Path

import pytest
from commands import run
from harmony_fast.engine.config import load_config
from harmony_fast.engine.data.sources import find_chunks
from harmony_fast.engine.errors import UserError
from harmony_fast.engine.report.samples import licence_note
from harmony_fast.engine.shipped import CONFIGS, DEMO, find_config, shipped_configs
from harmony_fast.engine.sweep_recipes import recipe_keys, settle_budget


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, where each test works."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_configuration_has_a_name_of_its_own() -> None:
    assert len(shipped_configs()) == len(list(CONFIGS.rglob("*.yaml"))) > 10
    for name, path in shipped_configs().items():
        assert find_config(name) == find_config(Path(name)) == path
        assert load_config(Path(name)) == load_config(path)


def test_a_file_wins_and_a_folder_does_not(empty: Path) -> None:
    (empty / "demo").mkdir()
    assert find_config("demo") == CONFIGS / "demo.yaml"
    (empty / "clip").write_text("base: cc3m\nrun_dir: mine\n")
    assert find_config("clip") == Path("clip")
    assert load_config(Path("clip")).run_dir == Path("mine")


def test_a_base_may_be_a_name(empty: Path) -> None:
    (empty / "sub").mkdir()
    (empty / "sub" / "own.yaml").write_text("base: siglip\nseed: 3\n")
    config = load_config(Path("sub/own.yaml"))
    assert (config.seed, config.objectives.contrastive.kind) == (3, "sigmoid")
    assert recipe_keys(Path("sub/own.yaml")) == {**recipe_keys(find_config("siglip")), "seed": 3}


@pytest.mark.parametrize(("given", "message"), [
    ("siglpi", "siglpi: no such configuration file; did you mean siglip"),
    ("configs/cc3m.yaml", "configs/cc3m.yaml: no such configuration file; did you mean cc3m"),
    ("xyzzy", "xyzzy: no such configuration file; the project's own are cc3m, demo, clip"),
    (".", ".: is a folder, not a configuration file; the project's own are"),
    ("y" * 300, "no such configuration file"),
])  # fmt: skip
def test_unknown_names_are_answered_with_the_nearest(given: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        find_config(given)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_commands_take_names() -> None:
    assert "cc3m: unknown key 'epoch'" in run("train", "cc3m", "epoch=3", fails=True)
    assert "did you mean clip" in run("sweep", "clpi", fails=True)
    assert run("--version").startswith("harmony-fast ")


def test_a_sweep_shares_a_configuration_by_name() -> None:
    with pytest.raises(UserError, match=r"data/cc3m\.beton"):  # the name was known, its data are not here
        settle_budget("cc3m", [], 3)
    with pytest.raises(UserError, match=r"or its name\) that all recipes share; did you mean cc3m"):
        settle_budget("cc3", [], 3)


def test_the_demos_data_are_found_from_anywhere(empty: Path) -> None:
    assert [chunk.path for chunk in find_chunks(["demo/noto.tar"], 1)] == [DEMO / "noto.tar"]
    assert licence_note(["demo/noto.tar", "demo/twemoji.tar"]) == " Licences and credits: demo/LICENSES.md."
    with pytest.raises(UserError, match=r"demo/nothing\.tar: no such file"):
        find_chunks(["demo/nothing.tar"], 1)
    (empty / "demo").mkdir()
    (empty / "demo" / "noto.tar").write_text("not a tar")
    with pytest.raises(UserError, match=r"^demo/noto\.tar: not a tar"):
        find_chunks(["demo/noto.tar"], 1)
