"""`prepare` when its processes are killed: never a hang, nothing lost, the same bytes when it is run again."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from commands import start
from counting import Faults
from harmony_fast.engine.data.prepare import Summary, prepare
from harmony_fast.engine.errors import DataError
from PIL import Image


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
    tar: Callable, picture: Callable, encoded: Callable, tmp_path: Path, faults: Faults
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
    faults.injected("SIGKILL of a worker of prepare")


def test_kill_9_and_again_gives_the_same_bytes(
    tar: Callable, picture: Callable, encoded: Callable, pairs: Callable, tmp_path: Path, faults: Faults
) -> None:
    shards = [tar("first.tar", [*pairs(20), ("a.txt", b"alone")]), *slow_shards(tar, picture, encoded, [40, 40])]
    output = tmp_path / "killed.beton"
    process = start("prepare", *shards, output, "--context", 16)
    wait_for(lambda: list(Path(f"{output}.parts").glob("*.json")) and workers_at(output))
    pids = workers_at(output)
    process.kill()
    process.communicate()
    wait_for(lambda: not any(map(alive, pids)), 10)  # no orphan goes on writing
    assert not output.exists()

    finished = {p: p.stat().st_mtime_ns for p in Path(f"{output}.parts").glob("*.json")}
    again, undisturbed = run(shards, output), run(shards, tmp_path / "undisturbed.beton")
    assert finished and again.path.read_bytes() == undisturbed.path.read_bytes()
    assert again.rejects_path.read_bytes() == undisturbed.rejects_path.read_bytes()
    assert again.left_out == undisturbed.left_out == {"no image": 1}
    assert not Path(f"{output}.parts").exists()
    faults.injected("SIGKILL of prepare")


def test_two_runs_on_one_output_do_not_mix(tar: Callable, picture: Callable, encoded: Callable, tmp_path: Path) -> None:
    shards, output = slow_shards(tar, picture, encoded, [40]), tmp_path / "x.beton"
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(run, shards, output)
        wait_for(lambda: workers_at(output))
        with pytest.raises(DataError, match=rf"process {os.getpid()} on .* is at work there"):
            run(shards, output)
        assert first.result(60).written == 40


def large_shards(tar: Callable, encoded: Callable) -> list[Path]:
    """Three tars, 90 MB of noise that is passed through: laying them end to end takes a while."""
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    jpeg = encoded(Image.fromarray(noise), quality=95)
    files = [[(f"{i:03d}.jpg", jpeg), (f"{i:03d}.txt", b"noise")] for i in range(70)]
    return [tar(f"{n}.tar", [file for sample in files for file in sample]) for n in range(3)]


def test_kill_9_at_any_moment(tar: Callable, encoded: Callable, tmp_path: Path, faults: Faults) -> None:
    """At once, in the middle of reading, while the file is written, and right after it appeared."""
    shards, output = large_shards(tar, encoded), tmp_path / "killed.beton"
    parts = Path(f"{output}.parts")
    moments = [
        parts.exists, lambda: list(parts.glob("*.data")), output.with_name("killed.beton.tmp").exists,
        output.exists,
    ]  # fmt: skip
    for moment in moments:
        process = start("prepare", *shards, output, "--context", 16)
        while not moment() and process.poll() is None:
            time.sleep(0.0005)
        process.kill()
        process.communicate()
        assert not output.exists() or moment == output.exists
        faults.injected("SIGKILL of prepare")
    undisturbed = run(shards, tmp_path / "undisturbed.beton")
    assert output.read_bytes() == undisturbed.path.read_bytes()  # whole as soon as it is there
    assert run(shards, output).path.read_bytes() == undisturbed.path.read_bytes()
    assert not parts.exists() and not list(tmp_path.glob("*.tmp"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """small_disk(kilobytes): a folder on a file system of that size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kilobytes: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("file systems cannot be mounted here")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


@pytest.mark.parametrize("room", [0.6, 1.7])  # of the finished file: full while parts are made, or at the end
def test_a_full_disk(
    tar: Callable, pairs: Callable, small_disk: Callable, room: float, tmp_path: Path, faults: Faults
) -> None:
    shards = [tar(f"{n}.tar", pairs(40, 100 * n)) for n in range(2)]
    undisturbed = run(shards, tmp_path / "x.beton").path
    size = undisturbed.stat().st_size
    folder = small_disk(int(room * size / 1024))
    with pytest.raises(DataError, match="No space left on device") as error:
        run(shards, folder / "x.beton")
    message = str(error.value)
    assert "\n" not in message and message.startswith(str(folder / "x.beton")) and not (folder / "x.beton").exists()
    needed = float(re.search(r"about ([\d.]+) MiB are needed beside it in all", message)[1])
    assert 1.9 * size < needed * 2**20 < 4 * size
    subprocess.run(["mount", "-o", f"remount,size={int(1024 * (needed + 0.1))}k", str(folder)], check=True)
    assert run(shards, folder / "x.beton").path.read_bytes() == undisturbed.read_bytes()  # what it said was enough
    faults.injected("disk full under prepare")


def test_a_shard_that_changes_between_runs_is_read_again(tar: Callable, pairs: Callable, tmp_path: Path) -> None:
    first, second = tar("0.tar", pairs(3)), tar("1.tar", [("x.txt", b"alone")])
    second.write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"1\.tar"):
        run([first, second], tmp_path / "x.beton")
    tar("1.tar", pairs(2, 10))
    assert run([first, second], tmp_path / "x.beton").written == 5
    listed = [json.loads(line) for line in (tmp_path / "x.rejects.jsonl").read_text().splitlines()]
    assert listed == []
