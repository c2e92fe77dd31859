"""How good a classifier gets from few labels, with the game and without it: budgets of labels × seeds, reported whole.

    python benchmarks/semi.py RECIPE [KEY=VALUE …] [--labels 20,50,100,200] [--seeds 10] [--jobs N] [--out DIR]

For each budget and seed it trains the recipe, and the same discriminator on the labelled rows alone (`game.supervised_only`), with
`run.seed` and `data.subset.seed` both set to the seed; then it writes, from the test split of the recipe: mean ± standard deviation of
the errors over the seeds, the errors of their ensemble (the mean of their probabilities), every single run, and the curves
over training, as semi.json, semi.md and semi.png. All seeds are reported, and none is chosen.

`--jobs` runs train side by side, one a core unless given, with the cores shared between them: small networks use one core better
than two. Stopped at any moment, the same command goes on: finished runs are read, unfinished ones resumed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor
from trials import Help, Trial, curve, finish, machine, options, refuse_few, refuse_ours, train_all

from gandist import checkpoint
from gandist.check import read_recipe
from gandist.data.opening import data_spec
from gandist.games.classification import scores
from gandist.games.semi import Semi
from gandist.plots import Curve, learning_curves
from gandist.recipe import InputError
from gandist.restored import restored
from gandist.run import versions

OURS = ("data.subset", "run.seed", "run.folder", "game.supervised_only")
ARMS = {"semi": "the game", "supervised": "labels alone"}


class Job(NamedTuple):
    """One run: with the game or without it, from how many labels, by which seed."""

    arm: str
    labels: int
    seed: int

    def folder(self, out: Path) -> Path:
        """Where the run lies."""
        return out / f"{self.arm}_{self.labels}_{self.seed}"


class Result(NamedTuple):
    """What a run gave: probabilities (N, K) and labels (N,) of the test split, and errors by images trained on."""

    job: Job
    probabilities: Tensor
    labels: Tensor
    curve: Curve
    seconds: float

    @property
    def errors(self) -> int:
        """Of the test split."""
        return int(scores(self.probabilities, self.labels)["errors"])


def settings(job: Job, classes: int) -> list[str]:
    """What sets a run apart, as overrides of the recipe."""
    return [
        f"data.subset={{per_class: {job.labels // classes}, seed: {job.seed}}}",
        f"run.seed={job.seed}",
        f"game.supervised_only={str(job.arm == 'supervised').lower()}",
    ]


def result(job: Job, arguments: argparse.Namespace) -> Result:
    """The answers of a finished run, of the weights that its recipe scores."""
    found = checkpoint.find(job.folder(arguments.out))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = read_recipe(job.folder(arguments.out) / "recipe.yaml", [])
    _, players = restored(found, device)
    assert isinstance(recipe.game, Semi)
    probabilities, labels = recipe.game.evaluator(recipe.data, data_spec(recipe.data), device).answers(players)
    points = curve(job.folder(arguments.out), "errors")
    return Result(job, probabilities.cpu(), labels.cpu(), points, found.state.seconds)


def jobs(arguments: argparse.Namespace) -> Iterator[Job]:
    """All runs, seed by seed, so that a report can be had of those that are done."""
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for labels in arguments.labels:
            for arm in ARMS:
                yield Job(arm, labels, seed)


def report(results: list[Result], arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything, as the JSON that is written."""
    budgets = []
    for labels in arguments.labels:
        entry: dict[str, Any] = {"labels": labels}
        for arm in ARMS:
            several = [one for one in results if (one.job.arm, one.job.labels) == (arm, labels)]
            errors = [one.errors for one in several]
            together = scores(torch.stack([one.probabilities for one in several]).mean(0), several[0].labels)
            entry[arm] = {
                "errors": errors,
                "seeds": [one.job.seed for one in several],
                "mean": mean(errors),
                "standard_deviation": stdev(errors) if len(errors) > 1 else None,
                "ensemble": int(together["errors"]),
                "seconds": [one.seconds for one in several],
            }
        budgets.append(entry)
    return {
        "benchmark": "semi",
        "recipe": arguments.recipe.name,
        "overrides": arguments.overrides,
        "samples": len(results[0].labels),
        "budgets": budgets,
        "machine": machine(),
        "versions": versions(),
    }


def table(found: dict[str, Any]) -> str:
    """The report for a reader, as Markdown."""
    lines = [
        f"Errors on {found['samples']:,} test samples, {found['recipe']}"
        + (f" with {' '.join(found['overrides'])}" if found["overrides"] else "")
        + ": mean ± standard deviation over the seeds, and of the ensemble of all seeds.",
        "",
        "| labels | seeds | labels alone | ensemble | the game | ensemble | fewer errors |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for budget in found["budgets"]:
        cells = []
        for arm in ("supervised", "semi"):
            one = budget[arm]
            spread = f" ± {one['standard_deviation']:.1f}" if one["standard_deviation"] is not None else ""
            cells += [f"{one['mean']:.1f}{spread}", str(one["ensemble"])]
        gain = 1 - budget["semi"]["mean"] / max(budget["supervised"]["mean"], 1e-9)
        lines.append(f"| {budget['labels']} | {len(budget['semi']['seeds'])} | {' | '.join(cells)} | {gain:.0%} |")
    return "\n".join(lines)


def plural(text: str) -> list[int]:
    """Whole numbers with commas between."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: must be whole numbers with commas between, such as 20,100"
        ) from None


def measure(arguments: argparse.Namespace) -> int:
    """Trains what is not trained yet, and reports; the exit code."""
    first = read_recipe(arguments.recipe, [*arguments.overrides, "run.folder=unused"])
    spec = data_spec(first.data)
    if not isinstance(first.game, Semi) or spec.label is None:
        raise InputError(f"{arguments.recipe}: its game is not `semi`; use one such as configs/fashion_semi.yaml")
    classes = spec.label.classes
    for labels in arguments.labels:
        if labels < classes or labels % classes:
            raise InputError(
                f"--labels {labels}: not the same number for each of {classes} classes; use a multiple of it"
            )
        job = Job("semi", labels, 0)
        overrides = [*arguments.overrides, *settings(job, classes), f"run.folder={job.folder(arguments.out)}"]
        read_recipe(arguments.recipe, overrides)
    if arguments.first_seed < 0:
        raise InputError(f"--first-seed {arguments.first_seed}: must be 0 or more")
    refuse_ours(arguments.overrides, OURS)
    if len({*arguments.labels}) < len(arguments.labels):
        raise InputError(f"--labels {arguments.labels}: names a budget twice")
    refuse_few(arguments, "seeds", "jobs")
    wanted = [*jobs(arguments)]
    trials = [Trial(job.folder(arguments.out), [*arguments.overrides, *settings(job, classes)]) for job in wanted]
    train_all(arguments.recipe, trials, arguments.jobs, arguments.out)
    results = [result(job, arguments) for job in wanted]
    found = report(results, arguments)
    text = table(found)
    (arguments.out / "semi.json").write_text(json.dumps(found, indent=1) + "\n")
    (arguments.out / "semi.md").write_text(text + "\n")
    curves = {
        f"{labels} labels, {words}": [one.curve for one in results if (one.job.arm, one.job.labels) == (arm, labels)]
        for labels in arguments.labels
        for arm, words in ARMS.items()
    }
    learning_curves(curves, f"errors of {found['samples']:,}", arguments.out / "semi.png")
    print(text)
    print(f"\nwritten to {arguments.out}: semi.json, semi.md, semi.png")
    return 0


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="of the game `semi`")
    parser.add_argument(
        "--labels", type=plural, default=[20, 50, 100, 200], metavar="N,…", help="budgets, of all classes together"
    )
    options(parser, 10, "runs/semi")
    arguments = parser.parse_intermixed_args()
    finish("semi", lambda: measure(arguments))


if __name__ == "__main__":
    main()
