"""The command line. Heavy imports wait until a command runs, so that --help answers at once."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .data import ensure_data
from .errors import StartAgain, UserError
from .host_memory import keep_pages
from .shipped import find_config

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train Harmony (CLIP + iBOT + MAE + caption MLM + text self-distillation) fast, on little hardware.",
)

Run = Annotated[Path, typer.Argument(help="A run folder, as made by train.")]
Configuration = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        help="A YAML file, or the name of a configuration that comes with the project: demo, cc3m, or a recipe such as "
        "clip, siglip, mae, harmony. A file of that path wins.",
    ),
]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings as key=value, e.g. data.batch_size=128.")]


def print_version(wanted: bool) -> None:
    """What --version does."""
    if wanted:
        print(f"harmony-fast {importlib.metadata.version('harmony-fast')}")
        raise typer.Exit


@app.callback()
def before_commands(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options that stand before the command."""


@app.command()
def prepare(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SRC... OUT.beton",
            help="Webdataset tars (globs and {00..99} allowed), folders of tars, folder trees of images with .txt or "
            ".json, CSV/TSV/parquet tables with paths; last the file to write.",
        ),
    ] = None,
    verify: Annotated[Path | None, typer.Option(help="Only check every sample of this .beton file.")] = None,
    max_side: Annotated[int, typer.Option(help="Larger images are reduced to this longer side, pixels.")] = 512,
    min_side: Annotated[int, typer.Option(help="Images with a smaller side are left out.")] = 8,
    quality: Annotated[int, typer.Option(help="JPEG quality where an image must be encoded.")] = 92,
    context: Annotated[int, typer.Option(help="Tokens per caption, start and end included.")] = 77,
    tokenizer: Annotated[
        str, typer.Option(help="clip, the name of an open_clip model, or a file of byte-pair merges as CLIP's.")
    ] = "clip",
    captions: Annotated[
        str, typer.Option(help="Of several captions of an image: keep one (the first), or all (training draws one).")
    ] = "one",
    dedup: Annotated[bool, typer.Option("--dedup", help="Leave out images whose file is an earlier one's.")] = False,
    where: Annotated[
        str | None, typer.Option(help='Keep samples whose metadata fulfil this: "punsafe < 0.3 and width > 200".')
    ] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of image paths, where its name is unusual.")] = None,
    caption_column: Annotated[
        list[str] | None, typer.Option(help="Column of captions, where its name is unusual; may be given repeatedly.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one per core.")] = None,
    limit: Annotated[int | None, typer.Option(help="Stop after this many samples.")] = None,
) -> None:
    """Turn image-caption data into one .beton file, or check one."""
    if verify is not None:
        from .data.verify import verify as check

        if sources:
            raise UserError("--verify FILE stands alone: give no sources with it")
        print(f"{verify}: {check(verify, workers):,} samples, all good")
        return
    from .data.prepare import prepare as run

    if not sources or len(sources) < 2 or not sources[-1].endswith(".beton"):
        raise UserError("give at least one source and then the file to write: prepare SRC... OUT.beton")
    run(
        sources[:-1], Path(sources[-1]), context=context, max_side=max_side, min_side=min_side, quality=quality,
        workers=workers, limit=limit, tokenizer=tokenizer, captions=captions, dedup=dedup, where=where,
        image_column=image_column, caption_columns=caption_column or (),
    )  # fmt: skip


@app.command()
def train(
    config: Configuration,
    overrides: Overrides = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Local processes.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="The same, where there are GPUs.")] = None,
    max_time: Annotated[
        str | None, typer.Option(help="Save and stop in time for so much time to have passed: 23:50:00.")
    ] = None,
) -> None:
    """Train; goes on by itself where the run folder has a checkpoint."""
    keep_pages()
    from .config import load_config
    from .distributed import launch, leave, started_by_launcher

    if ranks and gpus and ranks != gpus:
        raise UserError("--ranks and --gpus say the same thing; give one")
    overrides = [*(overrides or []), *([f'max_time="{max_time}"'] if max_time else [])]
    resolved = load_config(config, overrides)
    count = ranks or gpus or 1
    resolved.data.samples_per_rank(count)  # before anything is started
    if started_by_launcher():
        train_here(resolved)
        leave()
    ensure_data(resolved)
    if count > 1:
        launch(count, ["train", str(config), *overrides])
    else:
        train_here(resolved)
        leave()


@app.command()
def plan(
    config: Configuration,
    overrides: Overrides = None,
    memory: Annotated[str, typer.Option(help="Memory of a card, e.g. 24GiB.")] = "24GiB",
    gpus: Annotated[int, typer.Option(min=1, help="How many cards.")] = 1,
    host_memory: Annotated[
        str | None, typer.Option(help="Host memory for all of them; default: this machine's.")
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="A key that stays as the configuration has it; may be given repeatedly.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Take this machine's rates, and run three steps of the best plan here.")
    ] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw the plans into this PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print plain data.")] = False,
) -> None:
    """The fastest settings that fit in so much memory, and where it goes; without --measure nothing is run."""
    from .plan_report import run

    run(config, overrides or [], memory, gpus, host_memory, keep or [], measure, picture, as_json)


@app.command(hidden=True)
def measure(out: Path, config: Annotated[Path | None, typer.Argument()] = None) -> None:
    """What `plan --measure` starts: rates of this machine, or what a configuration's steps take, as JSON."""
    from .distributed import leave
    from .measure import answer

    answer(out, config)
    leave()


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder, or what export wrote.")],
    tasks: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TASK]... [KEY=VALUE]...",
            help="zero-shot, retrieval, knn (these three by default), linear, few-shot, finetune, segmentation; and "
            "settings such as evaluate.neighbours=20.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="What to evaluate on: a folder of classes, tars, a karpathy .json, a .beton; repeatable."),
    ] = None,
    bank: Annotated[list[str] | None, typer.Option(help="Labelled samples to learn from, likewise.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images that a karpathy .json names.")] = None,
    classes: Annotated[str | None, typer.Option(help="Class names: imagenet, or a file.")] = None,
    templates: Annotated[str | None, typer.Option(help="Prompts: imagenet, simple, or a file with one a line.")] = None,
    branch: Annotated[str | None, typer.Option(help="teacher or student.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Processes that share the encoding, one per GPU.")] = None,
) -> None:
    """Zero-shot, retrieval, neighbours, linear probe, few-shot, finetuning, segmentation; writes metrics.json."""
    import yaml

    from .distributed import join, launch, leave, started_by_launcher
    from .evaluate import evaluate_run
    from .evaluate.share import Share

    if gpus and gpus > 1 and not started_by_launcher():
        launch(gpus, sys.argv[1:])
        return
    given = {"data": data, "bank": bank, "images": images and str(images), "classes": classes, "templates": templates,
             "branch": branch}  # fmt: skip
    words = tasks or []
    settings = [f"evaluate.{key}={yaml.safe_dump(value)}" for key, value in given.items() if value]
    settings += [word for word in words if "=" in word]
    ranks = join() if started_by_launcher() else None
    share = Share(ranks.rank, ranks.world_size) if ranks else Share()
    evaluate_run(run, [word for word in words if "=" not in word], settings, share)
    if ranks:
        ranks.barrier()
        leave()


@app.command()
def export(
    run: Run,
    form: Annotated[str, typer.Argument(metavar="FORMAT", help="timm, open_clip, safetensors or hf (transformers).")],
    destination: Annotated[
        Path | None, typer.Argument(metavar="[DEST]", help="A folder; default: RUN/export/FORMAT.")
    ] = None,
    branch: Annotated[str | None, typer.Option(help="teacher or student; default: the teacher, if whole.")] = None,
) -> None:
    """The towers as files of timm, open_clip or transformers, or plain safetensors; with a model card."""
    from .export import export as run_export

    print(run_export(run, form, destination, branch))


@app.command()
def sweep(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG... [KEY=VALUE]...",
            help="Recipes, as files or by the names of the project's own, and settings that all of them share.",
        ),
    ],
    data: Annotated[
        str, typer.Option(help="demo, a .beton file, or a configuration whose data, towers and schedule all share.")
    ] = "demo",
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps of each run; default: as --data.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each recipe.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder of runs and results.")] = Path("runs/sweep"),
    ranks: Annotated[int, typer.Option("--ranks", "--gpus", min=1, help="Processes of each run.")] = 1,
) -> None:
    """Train recipes under the same budget; table and plot that compare them. Goes on where it was interrupted."""
    from .sweep import run

    recipes, overrides = [find_config(w) for w in words if "=" not in w], [w for w in words if "=" in w]
    if not recipes:
        raise UserError("name at least one recipe: sweep clip siglip --data demo")
    run(recipes, overrides, data, steps, seeds, out, ranks)


@app.command()
def convert(
    words: Annotated[
        list[str],
        typer.Argument(metavar="SRC... DEST [KEY=VALUE]...", help="Checkpoints and a run folder, or a run and a .pth."),
    ],
    heads: Annotated[
        int | None, typer.Option(min=1, help="Attention heads of the image tower; else width / 64.")
    ] = None,
    step: Annotated[int, typer.Option(min=0, help="Optimizer steps that count as done when training goes on.")] = 0,
) -> None:
    """Checkpoints of the authors' code into a run folder (CKPT.pth... RUN_DIR), and back (RUN_DIR OUT.pth)."""
    from .convert import from_run, to_run

    paths, overrides = [Path(w) for w in words if "=" not in w], [w for w in words if "=" in w]
    if len(paths) < 2:
        raise UserError("say what from and what to: convert CKPT.pth RUN_DIR, or convert RUN_DIR OUT.pth")
    if paths[0].is_dir():
        if len(paths) > 2 or overrides or heads is not None or step:
            raise UserError(f"{paths[0]} is a run: convert RUN_DIR OUT.pth takes nothing else")
        for name in from_run(paths[0], paths[1]):
            print(f"has no place there: {name}")
        print(paths[1])
        return
    config, became = to_run(paths[:-1], paths[-1], overrides, heads, step)
    print(*became.lines(paths[-1]), sep="\n")
    print(f"objectives: {', '.join(config.objectives.active())}; training data: {config.data.train}")
    print(paths[-1])


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders; several are laid side by side.")],
    out: Annotated[Path | None, typer.Option(help="File to write; default: report.html in the run's folder.")] = None,
) -> None:
    """One HTML page with curves, metrics and pictures."""
    from .report import write_report

    print(write_report(*runs, out=out))


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print plain data.")] = False,
) -> None:
    """What this machine has, which backend each kernel will use, and why; fails if something needed is broken."""
    from .doctor import run

    raise typer.Exit(run(as_json=json))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="kernels, aot, ...; `bench NAME --help` says more.")] = "--help",
) -> None:
    """Benchmarks: a table, and JSON and plots in bench/results."""
    # By name: benchmarks use the engine, and the engine knows of none of them.
    package = importlib.import_module("harmony_fast.bench")
    raise typer.Exit(package.run(name, context.args))


def train_here(config: Any) -> None:
    """Train on this process's rank."""
    from .train import train as run

    run(config)


def _guarded(function: Any, *arguments: Any) -> None:
    """Call; a UserError becomes one line and exit status 1, StartAgain another start."""
    try:
        function(*arguments)
    except StartAgain as reason:
        from .distributed import started_by_launcher

        print(f"warning: {reason}", file=sys.stderr, flush=True)
        if started_by_launcher():
            os._exit(StartAgain.STATUS)
        os.execv(sys.executable, [sys.executable, "-m", "harmony_fast.engine.cli", *sys.argv[1:]])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        # Not sys.exit: threads of the loader and exit handlers of libraries must not keep a failed run alive.
        os._exit(1)


def main() -> None:
    """The console script."""
    # deepspeed's launcher adds an option before all others; the environment says the same.
    sys.argv = [word for word in sys.argv if not word.startswith("--local_rank=")]
    _guarded(app)


if __name__ == "__main__":
    main()
