"""Checkpoints that were damaged are found out; the ones before them are used."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import newest, run
from counting import Faults
from harmony_fast.engine.checkpoint import load_run
from harmony_fast.engine.checkpoint_folder import CheckpointFolder, damage, describe
from harmony_fast.engine.errors import UserError

STEPS = 4


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory, beton: Path) -> Path:
    """A run with a checkpoint of each of its STEPS steps."""
    import yaml
    from tiny import tiny_config

    folder, raw = tmp_path_factory.mktemp("saved"), tiny_config()
    raw["data"]["train"] = str(beton)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(raw))
    words = (f"run_dir={folder / 'run'}", f"max_steps={STEPS}", "checkpoint_every=1", "keep_checkpoints=9")
    run("train", folder / "tiny.yaml", *words)
    return folder / "run"


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    place = random.Random(path.name).randrange(len(content))
    content[place] ^= 0x10
    path.write_bytes(content)


def lose(path: Path) -> None:
    path.unlink()


DAMAGES: list[Callable[[Path], None]] = [cut, flip, lose]


@pytest.mark.parametrize("how", DAMAGES)
def test_any_damaged_file_is_found_out(copied: Path, faults: Faults, how: Callable[[Path], None]) -> None:
    for file in sorted(newest(copied).iterdir()):
        original = file.read_bytes()
        how(file)
        found, problems = CheckpointFolder(copied).newest()
        assert found.name == f"step-{STEPS - 1:08d}" and file.name in problems[0], file
        file.write_bytes(original)
        faults.injected(f"checkpoint file: {how.__name__}")
    assert CheckpointFolder(copied).newest() == (newest(copied), [])


def test_training_goes_on_from_the_one_before(copied: Path, config: Path, faults: Faults) -> None:
    flip(newest(copied) / "weights.safetensors")
    cut(copied / "checkpoints" / f"step-{STEPS - 1:08d}" / "ema-rank-0.pt")
    loaded = load_run(copied)  # it reads the weights alone, which are whole in the one before
    assert (loaded.config.max_steps, loaded.checkpoint.name) == (STEPS, f"step-{STEPS - 1:08d}")
    words = (f"run_dir={copied}", f"max_steps={STEPS}")
    message = run("train", config, *words)
    assert message.count("is damaged") == 2 and f"resumed at step {STEPS - 2} of {STEPS}" in message
    assert damage(newest(copied)) is None
    faults.injected("checkpoint file: flip")
    faults.injected("checkpoint file: cut")


def test_if_none_is_whole_that_is_said(copied: Path, faults: Faults) -> None:
    for folder in (copied / "checkpoints").glob("step-*"):
        (folder / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"no checkpoint can be used: .*manifest\.json"):
        load_run(copied)
    faults.injected("manifests emptied")


@pytest.mark.parametrize("pointer", [b"", b"step-00000099", b"\xff\xfe", b"../../etc", None])
def test_a_pointer_that_is_wrong_does_not_matter(copied: Path, faults: Faults, pointer: bytes | None) -> None:
    path = copied / "checkpoints" / "latest"
    path.unlink() if pointer is None else path.write_bytes(pointer)
    assert CheckpointFolder(copied).newest()[0].name == f"step-{STEPS:08d}"
    faults.injected("pointer to the newest checkpoint")


def test_what_is_newer_than_a_damaged_past_goes(copied: Path, tmp_path: Path, faults: Faults) -> None:
    """After going on from an older one: a new checkpoint between damaged ones is not taken for an old one."""
    folder = CheckpointFolder(copied)
    for step in (3, 4):
        lose(folder.path / f"step-{step:08d}" / "weights.safetensors")
    assert folder.newest()[0].name == "step-00000002"
    shutil.rmtree(folder.path / "step-00000003")
    (folder.begin(3) / "file").write_bytes(b"new")
    folder.publish(3, {"file": describe(folder.temporary(3) / "file")})
    folder.prune(3, keep=1, keep_every=None)
    assert sorted(p.name for p in folder.path.iterdir()) == ["latest", "step-00000003"]
    assert folder.newest() == (folder.path / "step-00000003", [])
    faults.injected("damaged future")


def test_what_stays(config: Path, tmp_path: Path) -> None:
    words = (f"run_dir={tmp_path / 'run'}", "max_steps=8", "checkpoint_every=1", "keep_checkpoints=2", "keep_every=3")
    run("train", config, *words)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["latest", *(f"step-{k:08d}" for k in (3, 6, 7, 8))]
    manifest = json.loads((newest(tmp_path / "run") / "manifest.json").read_text())["files"]
    assert {"weights.safetensors", "progress.json", "ema-rank-0.pt"} < manifest.keys()
