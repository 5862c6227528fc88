"""`prepare` when its processes are killed: never a hang, nothing lost, the same bytes when it is run again."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harmony_fast.engine.data.prepare import Summary, prepare
from harmony_fast.engine.errors import DataError

PREPARE = """
from sys import argv
from harmony_fast.engine.data.prepare import prepare
prepare(argv[2:], argv[1], context=16)
"""


def run(sources: list[Path], output: Path) -> Summary:
    return prepare(sources, output, context=16, workers=2, progress=False)


def wait_for(condition: Callable[[], object], seconds: float = 60) -> object:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.01)
    raise TimeoutError


def slow_shards(tar: Callable, picture: Callable, encoded: Callable, sizes: list[int]) -> list[Path]:
    """Shards whose images take about 20 ms each: many pixels in few bytes."""
    png = encoded(picture(0, 1200, 1200).quantize(8), "PNG")
    shards = [[(f"{i:04d}.png", png), (f"{i:04d}.txt", b"slow")] for i in range(max(sizes))]
    return [tar(f"{n}.tar", [f for sample in shards[:size] for f in sample]) for n, size in enumerate(sizes)]


def workers_at(output: Path) -> dict[int, Path]:
    """Processes that are writing a part, and the file each writes."""
    return {int(p.name.split(".")[-2]): p for p in Path(f"{output}.parts").glob("*.data.*.tmp")}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_worker_is_an_error_that_names_its_shard(
    tar: Callable, picture: Callable, encoded: Callable, tmp_path: Path
) -> None:
    shards, output = slow_shards(tar, picture, encoded, [150, 150]), tmp_path / "x.beton"
    with ThreadPoolExecutor(1) as thread:
        prepared = thread.submit(run, shards, output)
        pids = wait_for(lambda: len(workers_at(output)) == 2 and workers_at(output))
        os.kill(next(iter(pids)), signal.SIGKILL)
        with pytest.raises(DataError, match=r"[01]\.tar: a worker died while reading it \(signal 9") as error:
            prepared.result(timeout=30)
    assert "\n" not in str(error.value) and not output.exists()
    wait_for(lambda: not any(map(alive, pids)))
    assert not [p for p in multiprocessing.active_children() if p.pid in pids]


def test_kill_9_and_again_gives_the_same_bytes(
    tar: Callable, picture: Callable, encoded: Callable, pairs: Callable, tmp_path: Path
) -> None:
    shards = [tar("first.tar", [*pairs(20), ("a.txt", b"alone")]), *slow_shards(tar, picture, encoded, [40, 40])]
    output = tmp_path / "killed.beton"
    process = subprocess.Popen([sys.executable, "-c", PREPARE, output, *shards], stderr=subprocess.DEVNULL)
    wait_for(lambda: list(Path(f"{output}.parts").glob("*.json")) and workers_at(output))
    pids = workers_at(output)
    process.kill()
    process.wait()
    wait_for(lambda: not any(map(alive, pids)), 10)  # no orphan goes on writing
    assert not output.exists()

    finished = {p: p.stat().st_mtime_ns for p in Path(f"{output}.parts").glob("*.json")}
    again, undisturbed = run(shards, output), run(shards, tmp_path / "undisturbed.beton")
    assert finished and again.path.read_bytes() == undisturbed.path.read_bytes()
    assert again.rejects_path.read_bytes() == undisturbed.rejects_path.read_bytes()
    assert again.left_out == undisturbed.left_out == {"no image": 1}
    assert not Path(f"{output}.parts").exists()


def test_two_runs_on_one_output_do_not_mix(tar: Callable, picture: Callable, encoded: Callable, tmp_path: Path) -> None:
    shards, output = slow_shards(tar, picture, encoded, [40]), tmp_path / "x.beton"
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(run, shards, output)
        wait_for(lambda: workers_at(output))
        with pytest.raises(DataError, match="another"):
            run(shards, output)
        assert first.result(60).written == 40
