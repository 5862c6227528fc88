"""`harmony-fast bench loader`: loading multi-crop batches, and preparing and opening the files they come from.

In one run, in alternating rounds: the authors' way (PIL, all crops and augmentation in worker processes), ten FFCV
pipelines on one field (what FFCV-SSL does), and ours, from JPEGs of 256 and 512 px; then what DCT scaling gains on
1,024 px, the augmentation alone, `prepare`, and opening a file of many samples. The images are synthetic, with the
spectrum of photographs. Writes loader.json and loader.png to bench/results/<machine>/.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ..engine.data import crops
from ..engine.data.augment import Augment, AugmentConfig
from ..engine.data.beton import open_beton
from ..engine.data.beton_format import ALLOCATION, HEADER, METADATA, VERSION, data_start, descriptors
from ..engine.data.loader import BATCHES_AHEAD, Loader
from ..engine.data.prepare import prepare
from ..harmony.randomness import Purpose, sample_keys
from ..harmony.views import ViewsConfig
from .loader_pil import Batches, pil
from .loader_rivals import CONTEXT, SEED, ours, streamed, ten_pipelines, write_images
from .machine import caption, describe_machine, results_folder, usable_cores
from .timing import Timing, alternate, summary

AUTHORS, PIL_CROPS = "PIL in workers, with augmentation (authors)", "PIL in workers, crops only"
TEN, OURS = "ten FFCV pipelines on one field", "ours"
OURS_AUGMENTED, STREAMED = "ours, with augmentation on the CPU", "ours, from tars (data.loader: webdataset)"
GOALS = {AUTHORS: 10.0, TEN: 2.5}
"""How many times the images per second of each of these ours is to reach, on 2 cores."""
PARTS = ("loaders", "dct", "augmentation", "prepare", "opening")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 0 whatever the numbers are."""
    options = _parse(arguments)
    folder = options.out or results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 120)
    views = ViewsConfig()
    report: dict[str, Any] = {
        "machine": describe_machine(), "batch": options.batch, "seconds_a_round": options.seconds,
        "rounds": options.rounds, "views": views.model_dump(mode="json"),
    }  # fmt: skip
    work = {
        "loaders": lambda scratch: [loaders(scratch, side, views, options) for side in options.sides],
        "dct": lambda scratch: dct(scratch, views, options),
        "augmentation": lambda scratch: augmentation(views, options),
        "prepare": lambda scratch: prepared(scratch, options),
        "opening": lambda scratch: opening(scratch, options.samples),
    }
    for name in options.only or PARTS:
        with tempfile.TemporaryDirectory(dir=options.scratch, prefix="bench-loader-") as scratch:
            report[name] = work[name](Path(scratch))
        # After each: what was measured stays if the machine is taken away.
        (folder / "loader.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        show(name, report[name], console)
    if "loaders" in report:
        plot(report, folder / "loader.png")
    console.print(f"results in {folder}", soft_wrap=True)
    return 0


def loaders(scratch: Path, side: int, views: ViewsConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Images per second of all rivals on JPEGs whose longer side is `side` pixels."""
    path = write_images(scratch, side, options.images)
    batch, cores, augment = options.batch, usable_cores(), AugmentConfig()
    rivals = {
        AUTHORS: pil(path, views, batch, cores, augment),
        PIL_CROPS: pil(path, views, batch, cores, None),
        TEN: ten_pipelines(path, views, batch, cores),
        OURS: ours(path, views, batch, cores, None),
        OURS_AUGMENTED: ours(path, views, batch, cores, augment),
        STREAMED: streamed(path.with_suffix(".tar"), views, batch, cores),
    }
    rates: dict[str, list[float]] = {name: [] for name in rivals}
    names = list(rivals)
    for done in range(options.rounds):
        for name in names[done % len(names) :] + names[: done % len(names)]:
            rates[name].append(images_per_second(rivals[name], options.seconds))
    found = {name: _rate(summary(values), cores) for name, values in rates.items()}
    middle = {name: result["images_per_second"] for name, result in found.items()}
    return {
        "side": side, "jpeg_bytes": _mean_bytes(path), "results": found,
        "times": {name: middle[OURS] / middle[name] for name in middle if name != OURS}, "goals": GOALS,
    }  # fmt: skip


def images_per_second(start: Batches, seconds: float) -> float:
    """Of a loader that was just started, once the batches it makes ahead are used up."""
    with start() as batches:
        for _ in range(BATCHES_AHEAD + 2):
            next(batches)
        begin, images = time.perf_counter(), 0
        while (passed := time.perf_counter() - begin) < seconds or not images:
            images += next(batches)
        return images / max(passed, time.perf_counter() - begin)


def _rate(timing: Timing, cores: int) -> dict[str, Any]:
    return {
        "images_per_second": timing.median, "per_core": timing.median / cores,
        "quartiles": [timing.low, timing.high], "rounds": timing.samples,
    }  # fmt: skip


def _mean_bytes(path: Path) -> float:
    beton = open_beton(path)
    return float(beton.image_sizes(np.arange(len(beton))).mean())


def dct(scratch: Path, views: ViewsConfig, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Decoding and cutting a batch with and without DCT scaling, by the size of the source."""
    found = []
    for side in (512, 768, 1024, 2048):
        path = write_images(scratch, side, options.batch, different=16)
        content, beton = np.memmap(path, np.uint8, "r"), open_beton(path)
        image, count = beton.metadata["image"], options.batch
        shapes = (views.global_crops, views.global_size), (views.local_crops, views.local_size)
        large, small = (np.empty((count, number, size, size, 3), np.uint8) for number, size in shapes)
        index, status = np.arange(count), np.empty(count, np.int32)
        addresses = content.ctypes.data + image["data_ptr"].astype(np.int64)
        given = (
            index, image["mode"].astype(np.int64), image["height"].astype(np.int64),
            image["width"].astype(np.int64), addresses, beton.image_sizes(index), crops.epoch_key(SEED, 0),
            crops.geometry(views),
        )  # fmt: skip
        rivals = {
            "decoded whole": partial(crops.cut_batch, *given, 1, large, small, status),
            "with DCT scaling": partial(crops.cut_batch, *given, crops.MOST_REDUCED, large, small, status),
        }
        timed = alternate(rivals, torch.device("cpu"), rounds=options.rounds, seconds=options.seconds)
        rates = {name: 1e3 * count / timing.median for name, timing in timed.items()}
        found.append({"side": side, "images_per_second": rates})
    return found


def augmentation(views: ViewsConfig, options: argparse.Namespace) -> dict[str, Any]:
    """All crops of a batch, augmented on the GPU where there is one, and on the CPU."""
    batch, found = options.batch, {}
    index = torch.arange(batch)
    keys, augment = sample_keys(SEED, 0, index, Purpose.AUGMENT), Augment(AugmentConfig())

    def both(large: torch.Tensor, small: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return augment(large, keys, "global"), augment(small, keys, "local")

    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        large, small = (
            torch.randint(0, 256, (batch, number, size, size, 3), dtype=torch.uint8, device=device)
            for number, size in ((views.global_crops, views.global_size), (views.local_crops, views.local_size))
        )
        work = {"all crops": partial(both, large, small)}
        (timing,) = alternate(work, torch.device(device), rounds=options.rounds, seconds=options.seconds).values()
        found[device] = {"milliseconds_a_batch": timing.median, "images_per_second": 1e3 * batch / timing.median}
    return found


def prepared(scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """`prepare` of 256-px JPEGs that are passed through, in a tar whose like img2dataset writes."""
    source = write_images(scratch, 256, options.prepare_images).with_suffix(".tar")
    cores = usable_cores()
    summaries = []
    for _ in range(2):  # the first starts the processes and reads the source from the disk
        summaries.append(prepare(source, scratch / "out.beton", workers=cores, progress=False))
    rate = summaries[-1].written / summaries[-1].seconds
    return {
        "images": summaries[-1].written, "passed_through": summaries[-1].passed_through, "workers": cores,
        "images_per_second": rate, "first_run_images_per_second": summaries[0].written / summaries[0].seconds,
        "goal": 700 * cores / 2,
    }  # fmt: skip


def opening(scratch: Path, samples: int) -> dict[str, Any]:
    """Seconds until the first batch of a file of `samples` samples that share one image, and memory of its own."""
    path = write_many(scratch / "many.beton", samples)
    views = ViewsConfig(local_crops=0)
    with Loader(write_images(scratch, 64, 16), views, batch_size=16, seed=SEED) as loader:
        next(loader.epoch(0))  # compiles
    before, start = _own_memory(), time.perf_counter()
    with Loader(path, views, batch_size=64, seed=SEED) as loader:
        opened = time.perf_counter() - start
        next(loader.epoch(0))
        first = time.perf_counter() - start
        own = _own_memory() - before
    return {
        "samples": samples, "table_gib": (path.stat().st_size) / 2**30, "seconds_to_open": opened,
        "seconds_to_first_batch": first, "own_memory_mib": own / 2**20,
    }  # fmt: skip


def write_many(path: Path, samples: int, chunk: int = 1 << 20) -> Path:
    """A `.beton` with the real tables of `samples` samples, all of which are the same one."""
    model = write_images(path.parent, 256, 1)
    opened, data = open_beton(model), model.read_bytes()
    start = data_start(3)
    sample = data[start + METADATA.itemsize : opened.data_end]
    shift = (samples - 1) * METADATA.itemsize
    row, table = opened.metadata[:1].copy(), opened.allocations[:1].copy()
    row["image"]["data_ptr"] += shift
    row["tokens"] += shift
    row["key"]["ptr"] += shift
    table["ptr"] += shift
    end = start + samples * METADATA.itemsize + len(sample)
    header = np.array((VERSION, 3, opened.page_size, samples, end), HEADER)
    with open(path, "wb") as file:
        file.write(header.tobytes() + descriptors(CONTEXT).tobytes())
        for first in range(0, samples, chunk):
            file.write(np.repeat(row, min(chunk, samples - first)).tobytes())
        file.write(sample)
        for first in range(0, samples, chunk):
            part = np.repeat(table, min(chunk, samples - first), 0)
            part["sample_id"] = np.arange(first, first + len(part))[:, None]
            file.write(part.tobytes())
    assert file.closed and path.stat().st_size == end + samples * 3 * ALLOCATION.itemsize
    return path


def _own_memory() -> int:
    """Bytes that are this process's alone, not the page cache's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) << 10


def show(name: str, result: Any, console: Console) -> None:
    """A part's numbers for the terminal."""
    if name != "loaders":
        console.print(f"[bold]{name}[/bold]", json.dumps(result, indent=1))
        return
    for case in result:
        title = f"sources of {case['side']} px, {case['jpeg_bytes'] / 1024:.0f} KiB each"
        made = Table(title=title, title_justify="left", min_width=100)
        for heading in ("", "images/s", "quartiles", "per core", "ours is", "goal"):
            made.add_column(heading, justify="left" if not heading else "right")
        for rival, found in case["results"].items():
            low, high = found["quartiles"]
            times, goal = case["times"].get(rival), GOALS.get(rival)
            made.add_row(
                rival, f"{found['images_per_second']:,.0f}", f"{low:,.0f} - {high:,.0f}", f"{found['per_core']:,.0f}",
                f"{times:.1f} x" if times else "", f"{goal:.1f} x" if goal else "",
            )  # fmt: skip
        console.print(made)


def plot(report: dict[str, Any], path: Path) -> None:
    """A panel per source size: images per second as bars, quartiles as whiskers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = report["loaders"]
    figure, axes = plt.subplots(len(cases), 1, figsize=(9, 2.6 * len(cases) + 0.4), squeeze=False, layout="constrained")
    for axis, case in zip(axes[:, 0], cases, strict=True):
        names = list(case["results"])[::-1]
        found = [case["results"][name] for name in names]
        middles = [r["images_per_second"] for r in found]
        spread = [[abs(r["quartiles"][i] - r["images_per_second"]) for r in found] for i in (0, 1)]
        colours = ["#1f6f8b" if name.startswith(OURS) else "#b8c4cc" for name in names]
        axis.barh(names, middles, xerr=spread, color=colours, error_kw={"lw": 1})
        axis.set_title(f"JPEGs of {case['side']} px, 2 global and 8 local crops", fontsize=9, loc="left")
        axis.set_xlabel("images/s", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(caption(report), fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="harmony-fast bench loader", description=__doc__.split("\n\n")[1])
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts; default: all")
    parser.add_argument("--sides", nargs="+", type=int, default=[256, 512], help="longer sides of the sources, pixels")
    parser.add_argument("--batch", type=int, default=64, help="images a batch (default: %(default)s)")
    parser.add_argument("--images", type=int, default=2048, help="images in the files (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of every rival (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=6.0, help="of a rival in a round (default: %(default)s)")
    parser.add_argument("--prepare-images", type=int, default=20_000, help="images to prepare (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=50_000_000, help="in the file to open (default: %(default)s)")
    parser.add_argument("--scratch", type=Path, help="folder for up to 6 GB of temporary files; default: the system's")
    parser.add_argument("--out", type=Path, help="folder for loader.json and loader.png")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
