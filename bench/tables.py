"""`harmony-fast bench tables [--check]`: the measured numbers in README.md and docs/, made from the committed results.

What lies between `<!-- bench: NAME MACHINE -->` and `<!-- /bench -->` is written by this command from
bench/results/MACHINE/NAME.json (or bench/results/NAME.json) and by nobody else; NAME.brief is a shorter table of the
same results. --check says which parts are not what the results say, and changes nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..engine.errors import UserError
from ..engine.sweep_results import heading
from .comparison import UNCHECKED
from .loader import AUTHORS, OURS, OURS_AUGMENTED, PIL_CROPS, STREAMED, TEN
from .machine import RESULTS, ROOT
from .peaks import table as peaks_table
from .plan import markdown as plan_table
from .scaling_report import hours_table, memory_table
from .step import OURS as OUR_STEP
from .step_report import in_order, ratio

PART = re.compile(r"(<!-- bench: (\S+)(?: (\S+))? -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check; the exit status is 1 if --check finds a part that is not what the results say."""
    parser = argparse.ArgumentParser(prog="harmony-fast bench tables", description=__doc__.split("\n\n")[1])
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if anything differs")
    options = parser.parse_args(arguments)
    stale = 0
    for path in documents():
        before = path.read_text(encoding="utf-8")
        after = renewed(before, path)
        if before != after:
            stale += 1
            print(f"{path.relative_to(ROOT)}: {'is not what the results say' if options.check else 'written'}")
            if not options.check:
                path.write_text(after, encoding="utf-8")
    print("run harmony-fast bench tables" if stale and options.check else f"{stale} files changed")
    return 1 if stale and options.check else 0


def documents() -> list[Path]:
    """The files that may have such parts."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def renewed(text: str, origin: Path) -> str:
    """A document with its parts made anew. Raises UserError for a part that cannot be made."""

    def make(found: re.Match) -> str:
        name, machine = found[2], found[3]
        path = (RESULTS / machine if machine else RESULTS) / f"{name.removesuffix('.brief')}.json"
        if name not in TABLES:
            raise UserError(f"{origin}: no table is called '{name}'; there are {', '.join(TABLES)}")
        if not path.is_file():
            return f"{found[1]}Not measured yet.\n{found[5]}"
        try:
            lines = TABLES[name](json.loads(path.read_text(encoding="utf-8")))
        except (OSError, json.JSONDecodeError, KeyError) as error:
            raise UserError(f"{origin}: table {name}: {path}: {type(error).__name__}: {error}") from None
        return f"{found[1]}{lines}\n{found[5]}"

    return PART.sub(make, text)


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in (heading, *rows)]
    return "\n".join([lines[0], "|---" * len(heading) + "|", *lines[1:]])


CROPS, AUGMENTED = "crops only", "with augmentation"
"""What a loader was asked for: only like is compared with like"""


def loader(report: dict[str, Any]) -> str:
    """Images per second by rival and size of the sources, and the other parts in a sentence."""
    words: dict[str, tuple[str, str | None]] = {  # crops only, and with augmentation
        "ours": (OURS, OURS_AUGMENTED), "ours, from tars (`data.loader: webdataset`)": (STREAMED, None),
        TEN: (TEN, None), "the authors' way: PIL in worker processes": (PIL_CROPS, AUTHORS),
    }  # fmt: skip
    cases, machine = report["loaders"], report["machine"]
    headings = [f"{case['side']} px, {what}" for what in (CROPS, AUGMENTED) for case in cases]
    rows = [[text, *(_images(case, name) for name in names for case in cases)] for text, names in words.items()]
    large = next(case["images_per_second"] for case in report["dct"] if case["side"] == 1024)
    gain = large["with DCT scaling"] / large["decoded whole"]
    opening, prepared = report["opening"], report["prepare"]["images_per_second"]
    return (
        f"Images of 2 global and 8 local crops a second on {_machine(machine)}, medians of {report['rounds']} "
        "alternating rounds:\n\n"
        + table(["JPEGs of", *headings], rows)
        + "\n\nOn a GPU augmentation is the GPU's work, and the loader makes crops only.\n\n"
        f"`prepare` passes {prepared:,.0f} JPEGs of 256 px a second through. A file "
        f"of {opening['samples'] / 1e6:.0f} million samples is open in {opening['seconds_to_open']:.2f} s.\n"
        "DCT scaling is used where an image is larger than its crops need: at 1,024 px it makes decoding and\n"
        f"cutting {gain:.1f} times as fast."
    )


def loader_brief(report: dict[str, Any]) -> str:
    """A row per size of the sources: ours against the authors' way and against FFCV as it comes."""
    names = {
        OURS: f"harmony-fast, {CROPS}", TEN: f"FFCV, a pipeline per crop, {CROPS}",
        PIL_CROPS: f"PIL in worker processes, {CROPS}", OURS_AUGMENTED: f"harmony-fast, {AUGMENTED}",
        AUTHORS: f"PIL in worker processes, {AUGMENTED}",
    }  # fmt: skip
    rows = [[f"{case['side']} px", *(_images(case, name) for name in names)] for case in report["loaders"]]
    return f"Images/s on {_machine(report['machine'])}, {report['machine']['date']}:\n\n" + table(
        ["JPEGs of", *names.values()], rows
    )


def _images(case: dict[str, Any], name: str | None) -> str:
    """A second, of a rival."""
    return f"{case['results'][name]['images_per_second']:,.0f}" if name else "-"


def demo(report: dict[str, Any]) -> str:
    """What `make demo` takes and reaches."""
    minutes, seconds = divmod(round(report["seconds_train_and_evaluate"]), 60)
    metrics = report["metrics"]
    there, back = metrics["retrieval"]["image_to_text"], metrics["retrieval"]["text_to_image"]

    def percent(*shares: float) -> str:
        return " / ".join(f"{100 * share:.1f}" for share in shares)

    rows = [
        ["zero-shot over 1,911 names, top-1", percent(metrics["zero_shot"]["top1"]), "0.05"],
        ["zero-shot, top-10", percent(metrics["zero_shot"]["top10"]), "0.5"],
        ["image to caption, recall@1 / @10", percent(there["r1"], there["r10"]), "0.05 / 0.5"],
        ["caption to image, recall@1 / @10", percent(back["r1"], back["r10"]), "0.05 / 0.5"],
        ["nearest neighbours over 99 subcategories, top-1", percent(metrics["knn"]["top1"]), "3.2"],
    ]
    return (
        f"Training and evaluation took {minutes} min {seconds} s on {_machine(report['machine'])}, "
        f"{report['machine']['date']}.\n\n" + table(["on the held-out artist's drawings", "%", "chance"], rows)
    )


def aot(report: dict[str, Any]) -> str:
    """How many rows, and how many spill."""
    lines = []
    for compiler, part in report.items():
        hot = [row for row in part["rows"] if row["hot"]]
        spilling = sum(bool(row["spills"]) for row in hot)
        lines.append(
            f"{compiler.capitalize()}: {len(part['rows'])} rows; of the {len(hot)} hot ones "
            f"{'none spills' if not spilling else f'{spilling} spill'}."
        )
    return "\n".join(lines)


def step(report: dict[str, Any]) -> str:
    """A row per case and rival."""
    rows = []
    for case in in_order(report["cases"]):
        for name, r in case["results"].items():
            low, high = (1e3 * case["micro"] / t for t in reversed(r["quartiles"]))
            rows.append([
                _case(case) if name == OUR_STEP else "",
                _way(name, case), f"{r['samples_per_second']:.3f} ({low:.3f} - {high:.3f})", ratio(r, "speedup"),
                f"{r['peak_mib'] / 1024:.2f} GiB", ratio(r, "memory"),
                f"{r['flops_per_sample'] / 1e9:.0f}", f"{100 * r['mfu']:.0f} %",
            ])  # fmt: skip
    return f"Measured on {_machine(report['machine'])}, {report['machine']['date']}:\n\n" + table(
        ["", "", "samples/s (quartiles)", "ratio", "peak", "ratio", "GFLOP a sample", "MFU"], rows
    )


def step_brief(report: dict[str, Any]) -> str:
    """Speed and memory alone."""
    rows = [
        [
            _case(case) if name == OUR_STEP else "", _way(name, case), f"{r['samples_per_second']:#.3g}",
            ratio(r, "speedup"), f"{r['peak_mib'] / 1024:.1f} GiB", ratio(r, "memory"),
        ]
        for case in in_order(report["cases"]) for name, r in case["results"].items()
    ]  # fmt: skip
    return f"Measured on {_machine(report['machine'])}, {report['machine']['date']}:\n\n" + table(
        ["", "", "samples/s", "", "peak", ""], rows
    )


def _case(case: dict[str, Any]) -> str:
    """In words."""
    what = "all objectives" if case["kind"] == "step" else "CLIP alone"
    return f"{what}, {case['tower']}, {case['micro']} samples, {case['precision']}"


def _way(name: str, case: dict[str, Any]) -> str:
    """A rival, and how ours went through the step."""
    size, kept = case["micro_batch"], case.get("kept_graphs", 1)
    if name != OUR_STEP or size == case["micro"]:
        return name
    return f"{name}, micro-batches of {size}" + (f", {kept} graphs kept" if kept > 1 else "")


SWEPT = ("zero_shot/top10", "retrieval/image_to_text/r10", "retrieval/text_to_image/r10", "knn/top1")
"""Metrics of a sweep that its page shows"""


def sweep(report: dict[str, Any]) -> str:
    """A row per recipe: mean and deviation over seeds, in percent; what guessing scores."""

    def cell(summary: dict[str, Any] | None) -> str:
        if summary is None:
            return "-"
        assert summary["n"] == report["seeds"], "a sweep is shown when it is complete"
        return f"{100 * summary['mean']:.1f} ± {100 * summary['std']:.1f}"

    rows = [[f"`{name}`", *(cell(r["summary"].get(key)) for key in SWEPT)] for name, r in report["recipes"].items()]
    rows.append(["*guessing*", *(f"{100 * report['chance'][key]:.2g}" for key in SWEPT)])
    return (
        f"In percent, mean ± sample standard deviation over {report['seeds']} seeds ({report['date']}, "
        f"torch {report['torch']}).\n\n" + table(["recipe", *map(heading, SWEPT)], rows)
    )


def kernels(report: dict[str, Any]) -> str:
    """Ours beside the best of the others, by operation and case."""
    rows = []
    for c in report["comparisons"]:
        ours = c["results"].get(OUR_STEP, {}).get("milliseconds")
        failed = "not checked" if c["not_run"].get(OUR_STEP) == UNCHECKED else "failed"
        shown = failed if ours is None else f"{ours:.3f}" if ours < 10 else f"{ours:,.1f}"
        rows.append([c["operation"], c["case"], shown, f"{c['speedup']:.2f} x" if c["speedup"] else ""])
    return f"Measured on {_machine(report['machine'])}, {report['machine']['date']}:\n\n" + table(
        ["operation", "case", "ours, ms", "the best other takes"], rows
    )


def memory(report: dict[str, Any]) -> str:
    """Predicted peaks beside those of steps that were run."""
    rows = []
    for case in report["cases"]:
        found = ["out of memory", ""] if case["measured"] is None else [
            f"{case['measured'] / 2**30:.2f}", f"{100 * case['error']:+.1f} %",
        ]  # fmt: skip
        rows.append([case["tower"], str(case["micro"]), case["setting"], f"{case['predicted'] / 2**30:.2f}", *found])
    counted = "allocated by torch" if report["device"] == "cuda" else "of live tensors"
    return f"GiB {counted} on {_machine(report['machine'])}, {report['machine']['date']}:\n\n" + table(
        ["tower", "samples", "setting", "predicted", "found", "error"], rows
    )


def _machine(machine: dict[str, Any]) -> str:
    """In words."""
    if machine.get("gpu"):
        return f"one {machine['gpu']['name']}"
    cores = f"{machine['cores']} cores of an {machine['processor']}" if "cores" in machine else machine["processor"]
    known = f", {machine['instructions']}" if "instructions" in machine else ""
    return f"{cores}{known}, {machine['memory_gib']:.0f} GiB"


def plan(report: dict[str, Any]) -> str:
    """What is predicted to fit."""
    return (
        "The largest micro-batch that is predicted to fit in bf16 without offload, with every block checkpointed and "
        f"the best\nof packed or split passes, ZeRO stages and optimizer states; and the samples a second expected of "
        f"the best plan, offload\nincluded, for the paper's batch of {report['batch']}. Predictions, by data sheets; "
        "`harmony-fast bench plan` makes them.\n\n" + plan_table(report)
    )


def checkpoints(report: dict[str, Any]) -> str:
    """How long saving and loading take."""
    took = {name: f"{timing['median']:.1f} s" for name, timing in report["seconds"].items()}
    return (
        f"A checkpoint of {report['trained_parameters'] / 1e6:.0f} M trained parameters in {report['precision']}, "
        f"{report['bytes'] / 2**30:.2f} GiB, on\n{_machine(report['machine'])}: training stands still for "
        f"{took['copy']}; writing, syncing and hashing take {took['write']}\nbeside it; finding the newest whole "
        f"checkpoint takes {took['verify']}, loading it {took['load']}. So a signal is followed by the\nstep's end, "
        f"{took['copy']} and {took['write']}."
    )


def faults(report: dict[str, Any]) -> str:
    """How many were caused, and what was lost."""
    counts = report["faults"].values()
    return (
        f"The last whole run of `make test-faults` caused {sum(c['injected'] for c in counts)} faults of {len(counts)} "
        f"kinds, and lost {sum(c['lost'] for c in counts)} steps, samples or runs."
    )


def peaks_brief(report: dict[str, Any]) -> str:
    """The largest batch alone."""
    largest = max(case["batch"] for case in report["cases"])
    return peaks_table({"cases": [case for case in report["cases"] if case["batch"] == largest]})


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "loader": loader, "loader.brief": loader_brief, "demo": demo, "aot": aot, "step": step, "step.brief": step_brief,
    "sweep": sweep, "kernels": kernels, "scaling": memory_table, "hours": hours_table, "plan": plan,
    "checkpoints": checkpoints, "faults": faults, "peaks": peaks_table,
    "peaks.brief": peaks_brief, "memory": memory,
}  # fmt: skip
"""What makes the part of each name"""


if __name__ == "__main__":
    sys.exit(main())
