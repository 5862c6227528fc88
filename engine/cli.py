"""The command line. Heavy imports wait until a command runs, so that --help answers at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import UserError
from .host_memory import keep_pages

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train Harmony (CLIP + iBOT + MAE + caption MLM + text self-distillation) fast, on little hardware.",
)

Run = Annotated[Path, typer.Argument(help="A run folder, as made by train.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings as key=value, e.g. data.batch_size=128.")]


@app.command()
def prepare(
    sources: Annotated[
        list[str], typer.Argument(help="Webdataset tars (globs allowed), last the .beton file to write.")
    ],
    max_side: Annotated[int, typer.Option(help="Larger images are reduced to this longer side, pixels.")] = 512,
    min_side: Annotated[int, typer.Option(help="Images with a smaller side are left out.")] = 8,
    quality: Annotated[int, typer.Option(help="JPEG quality where an image must be encoded.")] = 92,
    context: Annotated[int, typer.Option(help="Tokens per caption, start and end included.")] = 77,
    workers: Annotated[int | None, typer.Option(help="Processes; default: one per core.")] = None,
    limit: Annotated[int | None, typer.Option(help="Stop after this many samples.")] = None,
) -> None:
    """Turn image-caption data into one .beton file: SRC... OUT.beton."""
    from .data.prepare import prepare as run

    if len(sources) < 2 or not sources[-1].endswith(".beton"):
        raise UserError("give at least one source and then the file to write: prepare SRC... OUT.beton")
    run(
        sources[:-1], Path(sources[-1]), context=context, max_side=max_side, min_side=min_side, quality=quality,
        workers=workers, limit=limit,
    )  # fmt: skip


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A YAML file, e.g. configs/demo.yaml.")],
    overrides: Overrides = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Local processes.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="The same, where there are GPUs.")] = None,
) -> None:
    """Train; goes on by itself where the run folder has a checkpoint."""
    keep_pages()
    from .config import load_config
    from .distributed import launch, leave, started_by_launcher

    if ranks and gpus and ranks != gpus:
        raise UserError("--ranks and --gpus say the same thing; give one")
    resolved = load_config(config, overrides or [])
    count = ranks or gpus or 1
    if resolved.data.batch_size % count:
        raise UserError(f"data.batch_size {resolved.data.batch_size} cannot be divided among {count} ranks")
    if started_by_launcher():
        train_here(resolved)
        leave()
    ensure_data(resolved)
    if count > 1:
        launch(count, ["train", str(config), *(overrides or [])])
    else:
        train_here(resolved)
        leave()


@app.command()
def evaluate(
    run: Run,
    tasks: Annotated[
        list[str] | None, typer.Argument(help="zero-shot, retrieval, knn (default: all), and evaluate.key=value.")
    ] = None,
) -> None:
    """Zero-shot classification, retrieval, nearest neighbours; writes metrics.json."""
    from .evaluate import evaluate_run

    words = tasks or []
    evaluate_run(run, [w for w in words if "=" not in w], [w for w in words if "=" in w])


@app.command()
def report(run: Run) -> None:
    """One HTML page with curves, metrics and pictures."""
    from .report import write_report

    print(write_report(run))


def train_here(config: Any) -> None:
    """Train on this process's rank."""
    from .train import train as run

    run(config)


def ensure_data(config: Any) -> None:
    """Make the training file if it is missing and the configuration says what from."""
    if not config.data.train.exists() and config.data.prepare_from:
        from .data.prepare import prepare as run

        run(config.data.prepare_from, config.data.train, context=config.model.text.context)


def _guarded(function: Any, *arguments: Any) -> None:
    """Call; a UserError becomes one line and exit status 1."""
    try:
        function(*arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        # Not sys.exit: threads of the loader and exit handlers of libraries must not keep a failed run alive.
        os._exit(1)


def main() -> None:
    """The console script."""
    _guarded(app)


if __name__ == "__main__":
    main()
