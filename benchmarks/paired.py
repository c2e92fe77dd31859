"""What one part of a recipe is worth: the same runs with it and without it, several seeds, and the difference.

    python benchmarks/paired.py RECIPE [KEY=VALUE …] [--without game.adversary=null] [--seeds 5] [--jobs N] [--out DIR]

For each seed it trains the recipe twice, with `run.seed` set to the seed: as it is, and with the overrides of `--without`. Both have the
same initial weights, data order and steps, so that a pair differs by nothing else. Then it writes, of every score of the game: mean ±
standard deviation over the seeds of either, and of their differences with a 95 % confidence interval (Student's t), every single run, and the
curves over training on held-out and, with `game.scores.train_samples`, on training images, as paired.json, paired.md and paired.png. All
seeds are reported, and none is chosen. With `--at` it trains nothing and compares what the runs had after so many images, as paired-at-IMAGES.json and so on. `{seed}` in an override becomes the seed: data.path=datasets/stanford-{seed} gives each pair a
division of its own.

`--jobs` runs train side by side, one a core unless given, with the cores shared between them. Stopped at any moment, the same command goes
on: finished runs are read, unfinished ones resumed.
"""

from __future__ import annotations

import argparse
import json
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml
from trials import Help, Trial, curve, finish, machine, options, refuse_few, refuse_ours, train_all

from gandist.check import read_recipe
from gandist.checkpoint import newest
from gandist.data.opening import data_digest
from gandist.metrics.protocol import card
from gandist.plots import learning_curves
from gandist.recipe import Failure, InputError, Recipe
from gandist.run import versions

OURS = ("run.seed", "run.folder")
ARMS = ("with", "without")
# Student's t at 97.5 % for 1, 2, … degrees of freedom.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093,
     2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip


def trial(arm: str, seed: int, arguments: argparse.Namespace) -> Trial:
    """One run."""
    given = [*arguments.overrides, *(arguments.without if arm == "without" else [])]
    overrides = [override.replace("{seed}", str(seed)) for override in given]
    return Trial(arguments.out / f"{arm}_{seed}", [*overrides, f"run.seed={seed}"])


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, standard deviation and the half width of the 95 % confidence interval of the mean; None with one value."""
    if len(values) < 2:
        return {"values": values, "mean": mean(values), "standard_deviation": None, "half_width": None}
    deviation = stdev(values)
    t = T[min(len(values) - 1, len(T)) - 1]
    half = t * deviation / sqrt(len(values))
    return {"values": values, "mean": mean(values), "standard_deviation": deviation, "half_width": half}


def record(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run, but for one that is being written; raises Failure where there is no run."""
    try:
        lines = (folder / "log.jsonl").read_text().splitlines()
    except OSError as error:
        raise Failure(f"{folder}: no run to read: {error.strerror}; the same command without --at trains it") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise Failure(
                    f"{folder / 'log.jsonl'}: line {number} is damaged; restore it, or delete the line"
                ) from None
    return found


def differ(old: Any, new: Any) -> bool:
    """Whether two parts of recipes say otherwise; keys that an older version did not have are no difference."""
    if isinstance(old, dict) and isinstance(new, dict):
        return any(differ(old[key], new[key]) for key in old.keys() & new.keys())
    return bool(old != new)


def refuse_others(folder: Path, recipe: Recipe) -> None:
    """Raises InputError where a run that is there was trained or scored otherwise than the recipe says."""
    try:
        text = (folder / "recipe.yaml").read_text()
    except OSError:
        return  # not begun yet
    old, new = yaml.safe_load(text), recipe.model_dump(mode="json")
    wanted = [("game", key) for key in new["game"]]
    wanted += [("run", key) for key in ("seed", "batch", "precision")]
    wanted += [("data", key) for key in ("split", "transform", "subset", "unlabelled_split", "unlabelled_transform")]
    for section, key in wanted:
        if key in old[section] and differ(old[section][key], new[section][key]):
            raise InputError(
                f"{folder}: is a run with another `{section}.{key}`; name another folder by --out, or take the override back"
            )
    begun, _ = newest(folder / "checkpoints")
    for known, key, data in (
        ("data", "path", recipe.data),
        ("data.unlabelled_path", "unlabelled_path", recipe.data.unlabelled()),
    ):
        digest = None if data is None else data_digest(data)
        if begun is not None and begun.state.decisive.get(known) != digest:
            raise InputError(
                f"{folder}: is a run of another dataset than `data.{key}` names; name another folder by --out"
            )


def protocol(folder: Path, images: int, found: dict[str, float]) -> dict[str, Any]:
    """The card of these scores, as the run wrote it; raises Failure where it is not there."""
    for path in sorted((folder / "evaluations").glob(f"images_{images:09d}_*.json")):
        try:
            written = json.loads(path.read_text())
            if written["scores"] == found:
                return card(written["protocol"]).defining()
        except (ValueError, KeyError, TypeError):
            raise Failure(f"{path}: is no evaluation of this version; restore it, or train anew") from None
    raise Failure(
        f"{folder / 'evaluations'}: the file of the scores at {images:,} images is not there; restore it, or train anew"
    )


def refuse_protocols(cards: dict[tuple[str, int], dict[str, Any]]) -> None:
    """Raises InputError where scores that would be averaged or subtracted are not of one protocol.

    Seeds may have divisions of their own. What is compared may compute and answer otherwise, but is scored on the same data by the same rules.
    """
    (first, seed), *_ = cards
    for (arm, other), found in cards.items():
        for left, right, loose in (
            ((arm, seed), (arm, other), {"dataset", "samples"}),
            ((first, other), (arm, other), {"ema", "precision", "transform"}),
        ):
            before = cards[left]
            if left[0] != arm:
                before, found = ({**one, "settings": one["settings"] | {"inference": ""}} for one in (before, found))
            differing = [name for name in found if name not in loose and found[name] != before.get(name)]
            if differing:
                name = differing[0]
                raise InputError(
                    f"{left[0]}_{left[1]} and {right[0]}_{right[1]} were scored otherwise: `{name}` {before.get(name)!r} and {found[name]!r}; train one of "
                    "them anew, in another --out"
                )


def scores(folder: Path, at: int | None) -> tuple[dict[str, float], dict[str, Any]]:
    """The evaluation of a run at its end, or at so many images, and its card; raises Failure where there is none."""
    found = record(folder)
    images = max((row["images"] for row in found if "images" in row), default=0) if at is None else at
    scored = [row for row in found if any(name.startswith("score/") for name in row)]
    last = [row for row in scored if row.get("images") == images]
    if not last:
        there = ", ".join(f"{count:,}" for count in sorted({row["images"] for row in scored})) or "none"
        raise Failure(
            f"{folder}: has no scores at {images:,} images; it has some at {there}; the same command without --at goes on"
        )
    values = {name.removeprefix("score/"): value for name, value in last[-1].items() if name.startswith("score/")}
    return values, protocol(folder, images, values)


def began(folder: Path) -> dict[str, Any]:
    """Where a run was begun, as its record says."""
    found = record(folder)
    first: dict[str, Any] = next((row for row in found if row.get("event") == "start"), {})
    return {name: first.get(name) for name in ("device", "precision", "torch", "gandist")}


def report(arguments: argparse.Namespace, seeds: list[int]) -> dict[str, Any]:
    """Everything, as the JSON that is written."""
    scored = {(arm, seed): scores(trial(arm, seed, arguments).folder, arguments.at) for arm in ARMS for seed in seeds}
    refuse_protocols({run: protocol for run, (_, protocol) in scored.items()})
    found = {arm: [scored[arm, seed][0] for seed in seeds] for arm in ARMS}
    names = [name for name in found["with"][0] if all(name in one for several in found.values() for one in several)]
    table = {}
    for name in names:
        here, there = ([one[name] for one in found[arm]] for arm in ARMS)
        differences = [a - b for a, b in zip(here, there, strict=True)]
        table[name] = {"with": spread(here), "without": spread(there), "difference": spread(differences)}
    return {
        "benchmark": "paired",
        "recipe": arguments.recipe.name,
        "overrides": arguments.overrides,
        "without": arguments.without,
        "seeds": seeds,
        "at_images": arguments.at,
        "scores": table,
        "machine": machine() if arguments.at is None else None,  # that of the runs may have been another
        "versions": versions() if arguments.at is None else None,
        "began_on": [began(trial(arm, seed, arguments).folder) for seed in seeds for arm in ARMS],
    }


def in_words(found: dict[str, Any], signed: bool = False) -> str:
    """Mean ± deviation."""
    text = f"{found['mean']:{'+' if signed else ''}.4f}"
    return text + (f" ± {found['standard_deviation']:.4f}" if found["standard_deviation"] is not None else "")


def table(found: dict[str, Any]) -> str:
    """The report for a reader, as Markdown."""
    count = len(found["seeds"])
    point = "" if found["at_images"] is None else f", after {found['at_images']:,} images"
    lines = [
        f"{found['recipe']}{' with ' + ' '.join(found['overrides']) if found['overrides'] else ''}, and the same with "
        f"{' '.join(found['without'])}{point}: {count} seed{'s' * (count > 1)}, mean ± standard deviation; the interval is the 95 % one of the mean difference.",
        "",
        "| score | without | with | difference | interval |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, entry in found["scores"].items():
        if name == "samples":
            continue
        difference = entry["difference"]
        half = difference["half_width"]
        interval = "" if half is None else f"{difference['mean'] - half:+.4f} … {difference['mean'] + half:+.4f}"
        cells = in_words(entry["without"]), in_words(entry["with"]), in_words(difference, signed=True)
        lines.append(f"| {name} | {' | '.join(cells)} | {interval} |")
    return "\n".join(lines)


def measure(arguments: argparse.Namespace) -> int:
    """Trains what is not trained yet, and reports; the exit code."""
    arguments.without = arguments.without or ["game.adversary=null"]
    refuse_ours([*arguments.overrides, *arguments.without], OURS)
    refuse_few(arguments, "seeds", "jobs", "at")
    if arguments.first_seed < 0:
        raise InputError(f"--first-seed {arguments.first_seed}: must be 0 or more")
    seeds = [*range(arguments.first_seed, arguments.first_seed + arguments.seeds)]
    trials = [trial(arm, seed, arguments) for seed in seeds for arm in ARMS]
    recipes = [read_recipe(arguments.recipe, [*one.overrides, f"run.folder={one.folder}"]) for one in trials]
    if recipes[0].run.evaluate_images is None:
        raise InputError(f"{arguments.recipe}: `run.evaluate_images` is not set, so that there is nothing to compare")
    first, second = (recipe.model_dump(exclude={"run": {"folder"}}) for recipe in recipes[:2])
    if first == second:
        raise InputError(
            f"--without {' '.join(arguments.without)}: changes nothing in this recipe, so that both runs of a pair would be one"
        )
    for section, key in (("game", "scores"), ("data", "path"), ("data", "split")):
        if first[section].get(key) != second[section].get(key):
            raise InputError(
                f"--without {' '.join(arguments.without)}: changes `{section}.{key}`, so that the two runs of a pair would be scored by other rules"
            )
    for one, recipe in zip(trials, recipes, strict=True):
        refuse_others(one.folder, recipe)
    if arguments.at is None:
        train_all(arguments.recipe, trials, arguments.jobs, arguments.out)
    found = report(arguments, seeds)
    score = next(iter(found["scores"])) if arguments.score is None else arguments.score
    if score not in found["scores"]:
        raise InputError(f"--score {score}: is none of {', '.join(found['scores'])}")
    text = table(found)
    name = "paired" if arguments.at is None else f"paired-at-{arguments.at}"
    (arguments.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    (arguments.out / f"{name}.md").write_text(text + "\n")
    curves = {
        f"{arm}, {words}": [curve(trial(arm, seed, arguments).folder, name) for seed in seeds]
        for arm in ARMS
        for name, words in ((score, "held out"), (f"train/{score}", "training images"))
        if name in found["scores"]
    }
    learning_curves(curves, score, arguments.out / f"{name}.png")
    print(text)
    print(f"\nwritten to {arguments.out}: {name}.json, {name}.md, {name}.png")
    return 0


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("recipe", type=Path, metavar="RECIPE")
    parser.add_argument(
        "--without",
        action="append",
        metavar="KEY=VALUE",
        help="what the other run of a pair has; game.adversary=null unless given",
    )
    parser.add_argument("--score", help="whose curves are drawn; the first unless given")
    parser.add_argument(
        "--at", type=int, metavar="IMAGES", help="train nothing, and compare what the runs had after so many images"
    )
    options(parser, 5, "runs/paired")
    arguments = parser.parse_intermixed_args()
    finish("paired", lambda: measure(arguments))


if __name__ == "__main__":
    main()
