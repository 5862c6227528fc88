"""Input made to do harm: never code that runs, never a hang, one clear line."""

import copy
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import newest, run
from counting import Faults
from harmony_fast.engine.checkpoint import load_run
from harmony_fast.engine.checkpoint_folder import damage, describe
from harmony_fast.engine.config import RunConfig, load_config, parse_config, plain
from harmony_fast.engine.errors import UserError
from harmony_fast.engine.nested import dotted
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny_config

KEYS = sorted(dotted(plain(parse_config(tiny_config(), "tiny"))))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["auto", "1e400", "\0", "~"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FAST = settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


def is_one_line(error: UserError) -> bool:
    return "\n" not in str(error)


@FAST
@given(key=st.sampled_from(KEYS), value=VALUES)
def test_any_value_of_any_key_is_taken_or_refused(key: str, value: Any) -> None:
    raw = copy.deepcopy(tiny_config())
    *path, last = key.split(".")
    node: Any = raw
    for part in path:
        node = node.setdefault(part, {}) if isinstance(node, dict) else {}
    if not isinstance(node, dict):
        return
    node[last] = value
    try:
        assert isinstance(parse_config(raw, "fuzzed"), RunConfig)
    except UserError as error:
        assert str(error).startswith("fuzzed: ")


@FAST
@given(text=st.text() | st.binary())
def test_any_text_as_a_configuration(text: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(text.encode(errors="surrogatepass") if isinstance(text, str) else text)
    with pytest.raises(UserError) as error:
        load_config(path)
    assert is_one_line(error.value) and "x.yaml" in str(error.value)


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/object/new:os.system"])
def test_tags_of_yaml_run_nothing(tmp_path: Path, faults: Faults, tag: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"data: {tag} ['touch {tmp_path / 'harm'}']\n")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(path)
    assert not (tmp_path / "harm").exists()
    faults.injected("YAML tag")


def test_a_yaml_bomb_ends(tmp_path: Path, faults: Faults) -> None:
    """Nine levels of nine references each."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 9)]
    path = tmp_path / "x.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match="unknown key 'a0'") as error:
        load_config(path)
    assert len(str(error.value)) < 10_000
    faults.injected("YAML bomb")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, beton: Path) -> Path:
    folder, raw = tmp_path_factory.mktemp("trained"), tiny_config()
    raw["data"]["train"] = str(beton)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(raw))
    run("train", folder / "tiny.yaml", f"run_dir={folder / 'run'}", "max_steps=1")
    return folder


def forge(checkpoint: Path) -> None:
    """A manifest that fits whatever the files have become."""
    files = {p.name: describe(p) for p in checkpoint.iterdir() if p.name != "manifest.json"}
    (checkpoint / "manifest.json").write_text(json.dumps({"files": files}))
    assert damage(checkpoint) is None


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_pickle_in_place_of_weights_runs_nothing(copied: Path, faults: Faults) -> None:
    checkpoint = newest(copied / "run")
    (checkpoint / "weights.safetensors").write_bytes(pickle.dumps(Bomb(copied / "harm")))
    forge(checkpoint)
    with pytest.raises(UserError, match="cannot be read") as error:
        load_run(copied / "run")
    assert is_one_line(error.value) and not (copied / "harm").exists()
    faults.injected("pickle in place of safetensors")


OPTIMIZER, MODEL, EMA = "zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt", "ema-rank-0.pt"


@pytest.mark.parametrize(("name", "ranks"), [(OPTIMIZER, 1), (MODEL, 1), (EMA, 1), (OPTIMIZER, 2), (MODEL, 2)])
def test_a_pickle_in_a_state_file_runs_nothing(copied: Path, faults: Faults, name: str, ranks: int) -> None:
    """On another number of ranks the files are taken apart by DeepSpeed's converter."""
    import torch

    checkpoint = newest(copied / "run")
    content = torch.load(checkpoint / name, weights_only=False)  # of this test's own making
    torch.save([content, Bomb(copied / "harm")], checkpoint / name)
    forge(checkpoint)
    words = ("train", copied / "tiny.yaml", f"run_dir={copied / 'run'}", "max_steps=2", "--ranks", ranks)
    message = run(*words, fails=True)
    assert "error: " in message and not (copied / "harm").exists()
    faults.injected("pickle in a state file")


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_weights_with_any_bytes_changed_load_or_are_refused(data: st.DataObject, trained: Path, tmp_path: Path) -> None:
    copied = tmp_path / "run"
    if not copied.exists():
        shutil.copytree(trained / "run", copied)
    path = newest(copied) / "weights.safetensors"
    content = bytearray((newest(trained / "run") / "weights.safetensors").read_bytes())
    header = int.from_bytes(content[:8], "little")
    for place in data.draw(st.lists(st.integers(0, header + 8), max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    forge(newest(copied))
    try:
        load_run(copied)
    except UserError as error:
        assert is_one_line(error)


NOTES: dict[str, Callable[[Path], None]] = {
    "log.jsonl": lambda path: path.write_bytes(b'{"step": 1}\nnot json\n\xff\xfe{"step": 2'),
    "plan.json": lambda path: path.write_text("[[[["),
    "rollbacks.json": lambda path: path.write_text("[1, "),
    "config.yaml": lambda path: path.write_text("data: ["),
}


@pytest.mark.parametrize("name", NOTES)
def test_damaged_notes_in_the_run_folder(copied: Path, faults: Faults, name: str) -> None:
    NOTES[name](copied / "run" / name)
    fatal = name in ("rollbacks.json", "config.yaml")
    words = ("train", copied / "tiny.yaml", f"run_dir={copied / 'run'}", "max_steps=2")
    message = run(*words, fails=fatal)
    assert (name in message) if fatal else "resumed at step 1" in message
    faults.injected(f"damaged {name}")


CAPTIONS = [
    "\0\0", "\x1b[31mred\x1b[0m", "\u202egnirts", "a" * 100_000, "\r\n\t", "<|endoftext|> again", "\ufffe", "😀" * 50,
]  # fmt: skip


def test_captions_of_any_characters(tar: Callable, pairs: Callable, tmp_path: Path, faults: Faults) -> None:
    """Each becomes tokens or a reject; the terminal and the log get no control character."""
    from harmony_fast.engine.data.beton import open_beton
    from harmony_fast.engine.data.prepare import prepare
    from harmony_fast.engine.data.verify import verify

    files = []
    for k, caption in enumerate(CAPTIONS):
        [(image, content), (text, _)] = pairs(1, start=k)
        files += [(image, content), (text, caption.encode(errors="surrogatepass"))]
    files += [(name, content) for name, content in pairs(1, start=90)[:1]] + [("000090.txt", b"\xff\xfe\x80")]
    summary = prepare([tar("a.tar", files)], tmp_path / "x.beton", context=16, workers=1, progress=False)
    assert summary.written + summary.left_out.total() == len(CAPTIONS) + 1
    assert verify(tmp_path / "x.beton", 1) == summary.written == len(open_beton(tmp_path / "x.beton").keys())
    rejects = summary.rejects_path
    assert not any(c < " " and c != "\n" for c in rejects.read_text())
    faults.injected("captions of control characters")
