"""The command line: one verb a function, arguments only; what a verb does stands where it belongs."""

from __future__ import annotations

import errno
import io
import json
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
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Trains networks that play against each other. On many processes: `accelerate launch … -m gandist train RECIPE`.",
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="a YAML file, such as configs/demo.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="such as run.images=1000000")]
AllowPipe = Annotated[bool, typer.Option("--allow-pipe", help="let `data.path` run commands: pipe:COMMAND")]
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
        print(printable(f"{name:<{width}}  {value}"))


def _describe_dataset(dataset: Any) -> None:
    from gandist.data.dataset import Dataset

    assert isinstance(dataset, Dataset)
    manifest = dataset.manifest
    image, label, mask, signal = manifest.image, manifest.label, manifest.mask, manifest.signal
    rows = [("dataset", dataset.location)]
    if manifest.shards_at:
        rows.append(("shards", manifest.shards_at))
    for name, shards in manifest.splits.items():
        skipped = manifest.counts[name].skipped if name in manifest.counts else 0
        count = f"{sum(s.samples for s in shards):,} samples in {len(shards)} shard{'s' * (len(shards) > 1)}"
        rows.append(
            (f"split {name}", count + f", {skipped:,} bad file{'s' * (skipped > 1)} passed over" * bool(skipped))
        )
    if image:
        sizes = [size for counts in manifest.counts.values() for size in counts.sizes]
        most = f", at most {max(width for _, width in sizes)}×{max(height for height, _ in sizes)}" if sizes else ""
        size = f"{image.width}×{image.height}" if image.height else f"of several sizes{most}"
        rows.append(("images", f"{size}, {image.channels} channel{'s' * (image.channels > 1)}"))
    if signal:
        rows.append(("signals", f"{signal.channels} channel{'s' * (signal.channels > 1)} of {signal.length:,} values"))
    rows.append(("classes", f"{label.classes} {', '.join(label.names)}".strip() if label else "none"))
    if mask:
        ignored = f", {mask.ignore} is ignored" if mask.ignore is not None else ""
        rows.append(("mask classes", f"{mask.classes} {', '.join(mask.names)}".strip() + ignored))
    for name, counts in manifest.counts.items():
        if counts.labels and len(counts.labels) <= 100:
            rows.append((f"samples of {name}", "by class " + " ".join(f"{count:,}" for count in counts.labels)))
        if counts.mask_pixels:
            total = max(1, sum(counts.mask_pixels) + counts.ignored_pixels)
            shares = " ".join(f"{count / total:.1%}" for count in counts.mask_pixels)
            rows.append((f"pixels of {name}", f"by class {shares}, ignored {counts.ignored_pixels / total:.1%}"))
    _table([*rows, ("digest", dataset.digest)])


@app.command()
def pack(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="a folder, an archive, arrays, a CSV, shards by pattern or URL, embedded:fashion-mnist, or generated:NAME",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="the dataset folder to make")],
    size: Annotated[int | None, typer.Option(help="resize images to SIZE pixels, as --fit says")] = None,
    fit: Annotated[
        str,
        typer.Option(
            help="crop: the central square becomes SIZE×SIZE; shorter: the shorter side becomes SIZE; stretch: the whole becomes SIZE×SIZE"
        ),
    ] = "crop",
    split: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SHARE,…",
            help="divide the source's train (other splits stay): fractions by chance, such as train=0.8,validation=0.1,test=0.1; "
            "whole numbers in its order, such as train=50000,validation=10000",
        ),
    ] = None,
    shuffle: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=2**63 - 1,
            metavar="SEED",
            help="the order in the shards, and the division into splits (0 unless given)",
        ),
    ] = None,
    no_shuffle: Annotated[bool, typer.Option("--no-shuffle", help="keep the order of the source")] = False,
    shard_samples: Annotated[int, typer.Option(min=1, help="samples of a shard")] = 4096,
    bad: Annotated[
        str, typer.Option(help="what becomes of damaged files: refuse (and name the first), or skip (and count)")
    ] = "refuse",
    names: Annotated[str | None, typer.Option(metavar="NAME,…", help="names of the classes, from class 0 on")] = None,
    ignore: Annotated[
        int, typer.Option(min=-1, max=255, help="the mask value of pixels without a class; -1 for none")
    ] = 255,
    workers: Annotated[int | None, typer.Option(min=1, help="processes (one a core unless given)")] = None,
    part: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="write the I-th of N parts only, from 1/N to N/N; finish with --merge"),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="when all parts are written: describe them as one dataset")
    ] = False,
    allow_pipe: Annotated[bool, typer.Option("--allow-pipe", help="let SOURCE run commands: pipe:COMMAND")] = False,
) -> None:
    """Turn images, masks or signals into shards with an index; the same input gives the same bytes.

    SOURCE is one of: a folder of png, jpg, jpeg, webp or bmp files, whose subfolders become classes, in alphabetical order, or
    splits where they are called train, test and validation; a folder with images/ and masks/ (or labels/), paired by name; a .tar or
    .zip of such folders; a CSV of paths with labels and splits; IDX, NPZ and NPY arrays; CIFAR's binary version; 1-D signals as CSV or
    NPY; or WebDataset shards: 'data/train-{000..127}.tar', https://…, s3://…. Without any files: embedded:fashion-mnist, 10,000
    garments; generated:grid-25 and generated:ring-8, points of a mixture of Gaussians in the plane, generated:gaussian, numbers
    of N(0, 1), and generated:strings, waveforms of a plucked guitar, all as signals; generated:fashion-scenes, several garments on
    textured grounds, with masks.

    Files are stored as they are, unless --size asks for another one. A packing that was stopped goes on where it was, and any
    number of processes writes the same bytes. On several machines with one disk, run --part 1/N to N/N with otherwise the same
    options, then once --merge.

    A generator makes images of one size: give --size, or crop while training with data.transform.crop.
    """
    from gandist.data import pack as packing

    if shuffle is not None and no_shuffle:
        raise InputError("--shuffle and --no-shuffle contradict each other; give one")
    packed = packing.Packing(
        source,
        out,
        packing.Options(
            size=size,
            fit=fit,
            shard_samples=shard_samples,
            shuffle=None if no_shuffle else shuffle or 0,
            splits=packing.shares(split) if split else (),
            ignore=None if ignore < 0 else ignore,
            names=_names(names),
            bad=bad,
        ),
        allow_pipe,
    )
    with _bar("packing") as bar:
        task = bar.add_task("", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        if part is not None:
            if merge:
                raise InputError("--part and --merge contradict each other; run the parts first, then --merge alone")
            number, parts = _part(part)
            written = packing.pack_part(packed, number - 1, parts, progress)
        elif merge:
            dataset, made = packing.merge(packed)
        else:
            dataset, made = packing.pack(packed, workers or _cores(), progress)
    if part is not None:
        print(
            f"{out}: part {part} is written, {written} shards; when all parts are: the same command with --merge for --part"
        )
        return
    if not made:
        print(f"{out}: packed already from the same source (by its names, sizes and some of its bytes); nothing to do")
    _describe_dataset(dataset)
    _print_hint(dataset)


def _print_hint(dataset: Any) -> None:
    """The command that trains on a dataset as it is."""
    from gandist.data.transform import resized

    image, place = dataset.manifest.image, dataset.location
    if image is None:
        print(printable(f"\ntrain on it:  see configs/strings.yaml and configs/grid25.yaml; data.path={place}"))
        return
    spec = dataset.spec(next(iter(dataset.manifest.splits)))
    words = []
    if dataset.manifest.mask is not None:
        recipe, batch = "stanford_best", 16
        known = spec.sizes or (((image.height, image.width),) if image.height else ())
        sizes = [resized(height, width, 120) for height, width in known]  # as the recipe makes them
        words += [f'"data.transform.canvas=[{max(h for h, _ in sizes)},{max(w for _, w in sizes)}]"'] if sizes else []
        words += ["run.evaluate_images=null"] if "test" not in dataset.manifest.splits else []
    elif dataset.manifest.source.get("kind") == "embedded":
        recipe, batch = "demo", 32
    else:
        recipe, batch = "dcgan", 64
        words += ["data.transform.size=64", "data.transform.crop=64"] if image.height is None else []
    words += [f"run.batch={spec.samples}"] if spec.samples < batch else []
    command = f"gandist train configs/{recipe}.yaml data.path={place} run.folder=runs/{Path(place).name}"
    print(printable(f"\ntrain on it:  {' '.join([command, *words])}"))
    if recipe == "stanford_best":
        print("              (that recipe makes the shorter side of each image 120 pixels: data.transform.size)")


def _names(text: str | None) -> tuple[str, ...]:
    """NAME,… as it was given; raises InputError where a class has no name or two have one."""
    found = tuple(name.strip() for name in text.split(",")) if text else ()
    if "" in found:
        raise InputError(f"--names {text}: class {found.index('')} has no name; name every class, from 0 on")
    if twice := [name for name in found if found.count(name) > 1]:
        raise InputError(f"--names {text}: two classes are called {twice[0]!r}; scores are told apart by name")
    return found


def _part(text: str) -> tuple[int, int]:
    number, slash, parts = text.partition("/")
    if not (slash and text.isascii() and number.isdigit() and parts.isdigit() and len(text) < 20):
        raise InputError(f"--part {text!r}: must read I/N, such as 1/8")
    return int(number), int(parts)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@app.command()
def index(
    shards: Annotated[
        list[str],
        typer.Argument(metavar="SHARDS…", help="tars of one folder or URL, written by anybody; braces stand for many"),
    ],
    split: Annotated[str, typer.Option(help="the split that they are")] = "train",
    out: Annotated[
        Path | None, typer.Option(help="the folder for the indexes (beside the shards unless given)")
    ] = None,
    decode: Annotated[
        bool, typer.Option("--decode", help="decode every image, to find damage that its head does not show")
    ] = False,
    names: Annotated[str | None, typer.Option(metavar="NAME,…", help="names of the classes, from class 0 on")] = None,
    ignore: Annotated[
        int, typer.Option(min=-1, max=255, help="the mask value of pixels without a class; -1 for none")
    ] = 255,
) -> None:
    """Index WebDataset shards that somebody else wrote, and describe them as a dataset.

    The shards stay where they are and as they are. Those behind a URL (s3://…, gs://…, https://…) are read once, and their
    indexes go to the folder --out; `data.path` is then that folder.
    """
    from gandist.data import pack as packing
    from gandist.data.storage import expand

    with _bar("indexing") as bar:
        task = bar.add_task("", total=None)
        dataset = packing.index(
            [found for shard in shards for found in expand(shard)],
            split=split,
            out=out,
            decode=decode,
            names=_names(names),
            ignore=None if ignore < 0 else ignore,
            progress=lambda done: bar.advance(task, done),
        )
    _describe_dataset(dataset)
    _print_hint(dataset)


@app.command()
def verify(
    where: Annotated[
        str, typer.Argument(metavar="PATH", help="a dataset folder or URL, a run folder, or one checkpoint")
    ],
) -> None:
    """Check a dataset or a checkpoint to the last byte; exit code 1 names the fault."""
    from gandist import checkpoint
    from gandist.data.dataset import NAME, Dataset
    from gandist.data.storage import Store, is_remote

    path = Path(where) if is_remote(where) else Store.at(where).local or Path(where)
    if is_remote(where) or (path / NAME).exists():
        try:
            dataset = Dataset(where)
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
def describe(
    recipe: RecipeFile,
    overrides: Overrides = None,
    allow_pipe: AllowPipe = False,
    world_size: Annotated[int, typer.Option(min=1, help="processes that share each batch")] = 1,
) -> None:
    """Show the resolved recipe, the players, and what a run takes; nothing is trained."""
    from gandist.check import read_recipe
    from gandist.data.opening import data_spec
    from gandist.describe import data_in_words, sides
    from gandist.game import Clock
    from gandist.memory import memory_in_words

    loaded = read_recipe(recipe, overrides or [], allow_pipe)
    spec = data_spec(loaded.data, allow_pipe)
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
            *(("data", text) for text in data_in_words(loaded, spec, steps)),
            ("steps", f"{steps:,} of {loaded.run.batch} images"),
            ("state", f"{sum(p.state_bytes for p in players.values()) / 2**20:,.1f} MiB on each process"),
            ("memory", memory_in_words(loaded, spec, world_size)),
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
        print(printable(line, limit=1 << 24).replace("\n", "\\n"))


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    init_from: Annotated[
        Path | None, typer.Option(help="start a new run from the weights of this run or checkpoint")
    ] = None,
    allow_pipe: AllowPipe = False,
) -> None:
    """Train, or go on: the same command resumes from the newest valid checkpoint.

    Ctrl-C, SIGTERM or SIGUSR1 write a checkpoint and exit with 75. Other exit codes: 0 done, 1 failed, 2 the input is at fault.
    """
    from gandist.check import read_recipe
    from gandist.launcher import World
    from gandist.train import train as run

    loaded = read_recipe(recipe, overrides or [], allow_pipe)
    world = World.join(loaded.run.precision, loaded.run.accumulate)
    try:
        code = run(loaded, world, init_from, allow_pipe)
    finally:
        world.leave()
    raise typer.Exit(code)


def _protocol_in_words(protocol: dict[str, Any]) -> str:
    """What of a protocol a reader of the scores should see; the whole card stands in the file."""
    names = ("features", "split", "samples", "reals", "fakes", "seed")
    words = [f"{name} {protocol[name]}" for name in names if name in protocol]
    words.append("average weights" if protocol["ema"] else "last weights")
    words += [f"truncation {protocol['truncation']:g}"] if protocol.get("truncation") is not None else []
    words += [f"classes {protocol['labels']}"] if protocol.get("labels") is not None else []
    return ", ".join(words)


@app.command()
def evaluate(
    run: RunPath,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]…", help="of data, game.scores and game.inference, such as game.scores.fakes=50000"
        ),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="FILE", help="print the scores beside those of an earlier evaluation")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder for evaluations/; that of the run unless given")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")] = False,
) -> None:
    """Score a run on its data: the game's scores, each with the protocol that defines it.

    `data.…`, `game.scores.…` and, of a segmenter, `game.inference.…` may be changed: game.scores.fakes=50000, 'game.scores.features={kind: efficientnet_lite0}',
    game.scores.split=test. On many processes (accelerate launch … -m gandist evaluate …) the result is the same.
    """
    from gandist import checkpoint
    from gandist.evaluate import compared
    from gandist.evaluate import earlier as read
    from gandist.evaluate import evaluate as judge
    from gandist.launcher import World

    found = checkpoint.find(run)
    before = read(against) if against is not None else None
    world = World.join(found.state.precision)
    try:
        evaluation, path = judge(found, overrides or [], world, out)
    finally:
        world.leave()
    if evaluation is None:
        return
    try:
        earlier, warnings = compared(evaluation, before) if before is not None else ({}, [])
    except InputError:
        _table([(name, f"{value:.6g}") for name, value in evaluation.scores.items()] + [("written to", str(path))])
        raise
    for warning in warnings:
        print(f"gandist: {printable(warning)}", file=sys.stderr)
    if as_json:
        beside = {"before": earlier} if before is not None else {}
        print(
            json.dumps(
                {"images": found.state.images, **nested(evaluation.scores), **beside, "protocol": evaluation.protocol}
            )
        )
        return
    _table(
        [
            (name, f"{value:.6g}" + (f"  (before: {earlier[name]:.6g})" if name in earlier else ""))
            for name, value in evaluation.scores.items()
        ]
        + [("protocol", _protocol_in_words(evaluation.protocol))]
        + [("written to", str(path))]
    )


def nested(scores: dict[str, float]) -> dict[str, Any]:
    """Scores of classes, `iou/NAME`, as one mapping by name."""
    found: dict[str, Any] = {name: value for name, value in scores.items() if not name.startswith("iou/")}
    by_class = {name.removeprefix("iou/"): value for name, value in scores.items() if name.startswith("iou/")}
    return found | ({"iou": by_class} if by_class else {})


@app.command()
def sample(
    run: RunPath,
    count: Annotated[
        int | None,
        typer.Option(
            min=1, max=1_000_000, help="samples, strips or rows; 64 unless given, 8 with --interpolate or --neighbours"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="which samples")] = 0,
    out: Annotated[Path | None, typer.Option(help="folder; by default one in RUN/samples")] = None,
    classes: Annotated[
        str | None,
        typer.Option("--class", metavar="CLASS,…", help="names or numbers; all classes take turns unless given"),
    ] = None,
    truncation: Annotated[
        float | None, typer.Option(metavar="T", help="noise within ±T alone: fewer odd samples, and fewer kinds")
    ] = None,
    single: Annotated[bool, typer.Option("--single", help="a file for each: PNG, of signals .npy")] = False,
    shards: Annotated[bool, typer.Option("--shards", help="a dataset, as `pack` makes it")] = False,
    interpolate: Annotated[
        int | None, typer.Option(metavar="FRAMES", help="strips from one sample to another in so many steps")
    ] = None,
    video: Annotated[
        bool, typer.Option("--video", help="the strips as a video as well (WebP, and its frames)")
    ] = False,
    neighbours: Annotated[
        int | None, typer.Option(metavar="K", help="each sample beside the K nearest real ones of the run's dataset")
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            metavar="KIND", help="what --neighbours measures in, such as inception; else pixels, or the values"
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(metavar="PATH", help="another dataset for --neighbours")] = None,
) -> None:
    """Make samples with the generator of a run: a sheet of them, unless something else is asked for.

    The same seed gives the same samples, whatever their count; docs/sampling.md says more.
    """
    import torch

    from gandist import checkpoint
    from gandist import sample as making
    from gandist.neighbours import write_neighbours
    from gandist.pictures import shown

    asked = {"--single": single, "--shards": shards, "--interpolate": interpolate is not None, "--neighbours": neighbours is not None}  # fmt: skip
    forms = [name for name, given in asked.items() if given]
    if len(forms) > 1:
        raise InputError(f"{' and '.join(forms)} contradict each other; give one")
    for name, given, form in (("--video", video, "--interpolate"), ("--features", features, "--neighbours"), ("--data", data, "--neighbours")):  # fmt: skip
        if given and form not in forms:
            raise InputError(f"{name}: has no effect without {form}")
    found = checkpoint.find(run)
    device = (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None) or torch.device(
        "cpu"
    )
    strips = interpolate is not None or neighbours is not None
    wanted = making.Asked(count or (8 if strips else shown(found.state.spec)), seed, classes, truncation)
    sampler = making.Sampler(found, device, wanted)
    kind = "_single" * single + "_shards" * shards
    if sampler.classes and classes is not None:
        kind += "_class_" + "_".join(map(str, sampler.classes))
    kind += f"_truncation_{truncation:g}" if truncation is not None else ""
    folder = out or found.folder.parent.parent / "samples" / f"{found.folder.name}_seed_{seed}{kind}"
    checkpoint.outside(folder)
    if out is not None:
        taken = "interpolation" if interpolate is not None else "neighbours" if neighbours is not None else "grid"
        making.refuse_taken(folder, f"{taken}.png")
    with _bar("sampling") as bar:
        task = bar.add_task("", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        if single:
            lines = making.write_single(sampler, folder, progress)
        elif shards:
            lines = making.write_shards(sampler, folder, progress)
        elif interpolate is not None:
            lines = making.write_interpolation(sampler, folder, interpolate, video)
        elif neighbours is not None:
            lines = write_neighbours(sampler, folder, neighbours, features, data, progress)
        else:
            lines = making.write_sheet(sampler, folder)
        told = [*lines]
    for line in told:
        print(printable(line))


@app.command()
def predict(
    run: RunPath,
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUTS…",
            help="images, folders of them, archives, arrays, or packed datasets: whatever `pack` reads",
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="folder; RUN/predictions/images_… unless given")] = None,
    split: Annotated[str | None, typer.Option(help="of inputs that have some; all of them unless given")] = None,
    bad: Annotated[
        str, typer.Option(help="what becomes of damaged images: refuse (and name the first), or skip (and count)")
    ] = "refuse",
    inference: Annotated[
        str | None,
        typer.Option(
            metavar="YAML",
            help="of a segmenter, such as '{flip: true, window: [512, 512]}'; as the run says unless given",
        ),
    ] = None,
) -> None:
    """Name the class of each image, with the classifier of a run of the game `semi`, or of each pixel, with the segmenter of `segment`.

    The segmenter writes for each image a mask (palette PNG of its size, class numbers as values), an overlay with a legend, and a row
    of predictions.csv.

    The classifier writes predictions.csv: for each image its likeliest class, that one's probability, how much it looks like the generator's
    samples (`fake`, 0 … 1), its label where the input has one, and the probabilities of all classes; and sheets of the least certain
    images and of the likeliest fakes. docs/semi.md says what `fake` does not tell.
    """
    import torch

    from gandist import checkpoint
    from gandist.masks import MaskPredictor, inference_of, write_masks
    from gandist.predict import Predictor, write_predictions
    from gandist.sample import refuse_taken

    if bad not in ("refuse", "skip"):
        raise InputError(f"--bad {bad}: must be one of refuse, skip")
    found = checkpoint.find(run)
    device = (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None) or torch.device(
        "cpu"
    )
    options: Any = {"skip": bad == "skip", "split": split}
    segments = found.state.spec.mask is not None and "segmenter.safetensors" in found.files
    if inference is not None and not segments:
        raise InputError(f"--inference: has no effect on {found.folder}, which has no segmenter")
    predictor = None if segments else Predictor(found, device, **options)
    if inference is not None:
        options["inference"] = inference_of(inference)
    segmenter = MaskPredictor(found, device, **options) if segments else None
    folder = checkpoint.outside(out or found.folder.parent.parent / "predictions" / found.folder.name)
    refuse_taken(folder, "predictions.csv")
    with _bar("predicting") as bar:
        task = bar.add_task("", total=None)

        def progress(done: int, _: int) -> None:
            bar.update(task, completed=done)

        if segmenter is not None:
            told = [*write_masks(segmenter, inputs, folder, progress)]
        else:
            assert predictor is not None
            told = [*write_predictions(predictor, inputs, folder, progress)]
    for line in told:
        print(printable(line))


@app.command()
def export(
    run: RunPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="the folder to make; new, or empty")],
    player: Annotated[str, typer.Option(help="generator or discriminator")] = "generator",
    onnx: Annotated[
        bool,
        typer.Option(
            "--onnx", help="write model.onnx as well, and compare it with PyTorch (pip install 'gandist[onnx]')"
        ),
    ] = False,
) -> None:
    """Write the average weights of a generator or a discriminator as safetensors, JSON and a card, for `gandist.load(OUT)` and for the
    Hugging Face hub. Those of the game `segment` are not exported yet."""
    from gandist import checkpoint
    from gandist.export import export as write

    found = checkpoint.find(run)
    written = write(found, out, player, onnx)
    weights = "average weights" if written.config.average else "weights"
    print(
        printable(f"{out}: the {player} of {found.folder}, {written.parameters:,} {weights}: {' '.join(written.files)}")
    )
    for rows, difference in written.differences.items():
        print(f"model.onnx and PyTorch differ by at most {difference:.1e} for {rows} row{'s' * (rows > 1)}")


def printable(text: str, limit: int = 200_000) -> str:
    """Text of strangers for a terminal: control characters are written out, and what is endless is cut."""
    shown = "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape", "replace").decode() for c in text[:limit]
    )
    return shown + "…" * (len(text) > limit)


def main() -> None:
    """Runs a verb; exit codes: 0 done, 1 failed, 2 the input is at fault, 75 stopped on request with a checkpoint."""
    code: str | int | None = 1
    note = os.environ.get("GANDIST_EXIT_FILE")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show ends nothing
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # one voice a machine
    try:
        app()
    except SystemExit as leave:
        code = leave.code or 0
    except InputError as error:
        code = 2
        if first:
            print(printable(f"gandist: {error}"), file=sys.stderr)
    except Failure as error:
        print(printable(f"gandist: {error}"), file=sys.stderr)
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        advice = "; free some, and the same command goes on" if error.errno == errno.ENOSPC else ""
        where = f"{error.filename}: " if error.filename else ""
        print(printable(f"gandist: {where}{error.strerror}{advice}"), file=sys.stderr)
    finally:
        if first and note:
            Path(note).write_text(str(code))  # launch/node.sh hands it on: launchers exit 1 whatever their ranks return
    # With the note written, an orderly stop of all ranks is no failure that the launcher need print a traceback for.
    sys.exit(0 if note and code == STOPPED else code)
