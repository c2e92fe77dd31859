"""The command line: one verb a function, arguments only; what a verb does stands where it belongs."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gandist.recipe import Failure, InputError

STOPPED = 75

app = typer.Typer(
    name="gandist",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Trains networks that play against each other. On many processes: `accelerate launch … -m gandist train RECIPE`.",
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="a YAML file, such as configs/demo.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="such as run.images=1000000")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="a run folder, or one of its checkpoints/images_…")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"gandist {version('gandist')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None: ...


def _bar(what: str) -> Progress:
    return Progress(
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def _table(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _describe_dataset(dataset: Any) -> None:
    from gandist.data.dataset import Dataset

    assert isinstance(dataset, Dataset)
    manifest = dataset.manifest
    image, label = manifest.image, manifest.label
    size = f"{image.width}×{image.height}" if image.height else "of several sizes"
    _table(
        [
            ("dataset", str(dataset.folder)),
            *(
                (
                    f"split {n}",
                    f"{sum(s.samples for s in shards):,} samples in {len(shards)} shard{'s' * (len(shards) > 1)}",
                )
                for n, shards in manifest.splits.items()
            ),
            ("images", f"{size}, {image.channels} channel{'s' * (image.channels > 1)}"),
            ("classes", f"{label.classes} {', '.join(label.names)}".strip() if label else "none"),
            ("digest", dataset.digest),
        ]
    )


@app.command()
def pack(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="a folder of images or of IDX files, an IDX or NPZ file, or embedded:fashion-mnist"
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="the dataset folder to make")],
    size: Annotated[
        int | None, typer.Option(help="cut out the central square and resize it to SIZE pixels a side")
    ] = None,
    shard_samples: Annotated[int, typer.Option(min=1, help="samples of a shard")] = 4096,
) -> None:
    """Turn images into shards with an index; the same input gives the same bytes.

    Folders: png, jpg, jpeg, webp and bmp files are stored as they are; subfolders become classes, in alphabetical order, or
    splits where they are called train, test and validation. NPZ files: uint8 arrays `images` and `labels`, or `x_train`, `y_train`,
    `x_test`, `y_test`; (N, H, W) or (N, H, W, C). IDX files: images with their labels beside them, plain or gzipped.

    A generator makes images of one size: give --size unless all images have the same.
    """
    from gandist.data import pack as packing

    with _bar("packing") as bar:
        task = bar.add_task("", total=None)
        dataset, made = packing.pack(
            source,
            out,
            size=size,
            shard_samples=shard_samples,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if not made:
        print(f"{out}: packed already from the same source; nothing to do")
    _describe_dataset(dataset)
    if dataset.manifest.image.height is None:
        print("\nTo train the gan game on it, pack it with --size, since a generator makes images of one size.")
        return
    recipe = "configs/dcgan.yaml"
    print(f"\ntrain on it:  gandist train {recipe} data.path={out} run.folder=runs/{out.name}")


@app.command()
def index(
    shards: Annotated[
        list[Path], typer.Argument(metavar="SHARDS…", help="tar files of one folder, written by anybody")
    ],
    split: Annotated[str, typer.Option(help="the split that they are")] = "train",
) -> None:
    """Index WebDataset shards that somebody else wrote, and describe them as a dataset."""
    from gandist.data import pack as packing

    with _bar("indexing") as bar:
        task = bar.add_task("", total=None)
        dataset = packing.index(shards, split=split, progress=lambda done: bar.advance(task, done))
    _describe_dataset(dataset)
    print(f"\ntrain on it:  gandist train RECIPE data.path={dataset.folder}")


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="a dataset folder, a run folder, or one checkpoint")],
) -> None:
    """Check a dataset or a checkpoint to the last byte; exit code 1 names the fault."""
    from gandist import checkpoint
    from gandist.data.dataset import NAME, Dataset

    if (path / NAME).exists():
        try:
            dataset = Dataset(path)
            with _bar("verifying") as bar:
                task = bar.add_task(
                    "", total=sum(s.samples for shards in dataset.manifest.splits.values() for s in shards)
                )
                dataset.verify(lambda done: bar.advance(task, done))
        except InputError as error:
            raise Failure(str(error)) from None
        _describe_dataset(dataset)
        print("every byte is as it was packed")
        return
    root = path / "checkpoints"
    paths = checkpoint.folders(root) if root.is_dir() else [path]
    if not paths or not (root.is_dir() or (path / checkpoint.MANIFEST).exists() or path.name.startswith("images_")):
        raise InputError(f"{path}: neither a dataset, nor a run with checkpoints, nor a checkpoint")
    faults = []
    for folder in paths:
        try:
            found = checkpoint.Checkpoint(folder)
            for name in found.files:
                if name.endswith(".safetensors"):
                    found.tensors(name.removesuffix(".safetensors"))
            print(f"{folder}  {found.state.images:,} images  sound  {found.digest}")
        except Failure as fault:
            faults.append(str(fault))
    if faults:
        raise Failure("\n".join(faults))


@app.command()
def describe(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Show the resolved recipe, the players, and what a run takes; nothing is trained."""
    from gandist.check import read_recipe
    from gandist.data.dataset import Dataset
    from gandist.describe import sides
    from gandist.game import Clock

    loaded = read_recipe(recipe, overrides or [])
    dataset = Dataset(Path(loaded.data.path))
    spec = dataset.spec(loaded.data.split)
    print(loaded.to_yaml())
    players = sides(loaded, spec)
    steps = Clock(loaded.run.batch, loaded.run.images).steps_wanted
    rows = [
        (
            name,
            f"{p.parameters:,} parameters, {p.forward_flops / 1e6:,.1f} MFLOP forward an image, {p.state_bytes / 2**20:,.1f} MiB of weights, gradients, moments and averages",
        )
        for name, p in players.items()
    ]
    _table(
        [
            *rows,
            ("data", f"{spec.samples:,} samples, each seen {steps * loaded.run.batch / spec.samples:,.1f} times"),
            ("steps", f"{steps:,} of {loaded.run.batch} images"),
            (
                "state",
                f"{sum(p.state_bytes for p in players.values()) / 2**20:,.1f} MiB on each process, activations apart",
            ),
        ]
    )


@app.command()
def inspect(
    recipe: RecipeFile,
    overrides: Overrides = None,
    draws: Annotated[str, typer.Option(help="draws A to B-1, as A:B")] = "0:2",
    world_size: Annotated[int, typer.Option(min=1, help="processes to divide each draw over")] = 1,
    out: Annotated[Path, typer.Option(help="where the contact sheet goes")] = Path("inspect.png"),
) -> None:
    """Print the keys of the samples that each process reads, and draw what the players see.

    A draw is one global batch: `run.batch` samples in the order of training. The contact sheet shows the first 64 images.
    """
    from gandist.check import read_recipe
    from gandist.inspection import inspect as look

    for line in look(read_recipe(recipe, overrides or []), draws, world_size, out):
        print(line)


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    init_from: Annotated[
        Path | None, typer.Option(help="start a new run from the weights of this run or checkpoint")
    ] = None,
) -> None:
    """Train, or go on: the same command resumes from the newest valid checkpoint.

    Ctrl-C, SIGTERM or SIGUSR1 write a checkpoint and exit with 75. Other exit codes: 0 done, 1 failed, 2 the input is at fault.
    """
    from gandist.check import read_recipe
    from gandist.launcher import World
    from gandist.train import train as run

    loaded = read_recipe(recipe, overrides or [])
    world = World.join(loaded.run.precision, loaded.run.accumulate)
    try:
        code = run(loaded, world, init_from)
    finally:
        world.leave()
    raise typer.Exit(code)


@app.command()
def sample(
    run: RunPath,
    count: Annotated[int, typer.Option(min=1, max=1_000_000, help="images to make")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="which images")] = 0,
    out: Annotated[Path | None, typer.Option(help="folder; by default one in RUN/samples")] = None,
    single: Annotated[bool, typer.Option("--single", help="one PNG an image instead of a grid")] = False,
) -> None:
    """Make images with the generator of a run."""
    import torch

    from gandist import checkpoint
    from gandist.sample import sample as make
    from gandist.sample import write_images

    found = checkpoint.find(run)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    folder = out or found.folder.parent.parent / "samples" / f"{found.folder.name}_seed_{seed}"
    paths = write_images(make(found, count, seed, device or torch.device("cpu")), folder, single)
    print(f"{count} images of {found.folder} (seed {seed}): {paths[0] if len(paths) == 1 else folder}")


def main() -> None:
    """Runs a verb; exit codes: 0 done, 1 failed, 2 the input is at fault, 75 stopped on request with a checkpoint."""
    code: str | int | None = 1
    note = os.environ.get("GANDIST_EXIT_FILE")
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # one voice a machine
    try:
        app()
    except SystemExit as leave:
        code = leave.code or 0
    except InputError as error:
        code = 2
        if first:
            print(f"gandist: {error}", file=sys.stderr)
    except Failure as error:
        print(f"gandist: {error}", file=sys.stderr)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"gandist: {error.filename}: {error.strerror}", file=sys.stderr)
    finally:
        if first and note:
            Path(note).write_text(str(code))  # launch/node.sh hands it on: launchers exit 1 whatever their ranks return
    # With the note written, an orderly stop of all ranks is no failure that the launcher need print a traceback for.
    sys.exit(0 if note and code == STOPPED else code)
