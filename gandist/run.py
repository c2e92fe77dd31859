"""The run around the loop: its folder, players, stream and log; what is written when, and how it goes on after a stop."""

from __future__ import annotations

import fcntl
import hashlib
import json
import platform
import resource
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from gandist import checkpoint
from gandist.data.dataset import Spec
from gandist.data.leaks import refuse_leaks
from gandist.data.opening import data_digest, data_spec, open_batches
from gandist.data.stream import PARTS, Batch, Fault, Share, Stream
from gandist.evaluations import channels, in_words, write_evaluation
from gandist.game import Clock, Evaluator, Game, Generative, draws, draws_each_step
from gandist.health import Health
from gandist.launcher import World
from gandist.log import Bar, Log, Meter
from gandist.metrics.duplicates import duplicates
from gandist.pictures import captioned, sheet, shown
from gandist.player import Player
from gandist.recipe import Failure, InputError, Recipe
from gandist.seeding import derive
from gandist.sharding import Sharding

MAX_RATIO = 1e9  # of gradients that is logged; more, where one has vanished
MAX_SKIPPED = 100  # turns in a row without a finite gradient: the game is lost
MAX_FAILED_SAVES = 3


def make_players(
    recipe: Recipe, spec: Spec, device: torch.device, precision: Any, sharding: Sharding | None = None
) -> dict[str, Player]:
    """The players with their initial weights, which depend on the seed and each player's name alone."""
    assert isinstance(recipe.game, Game)
    players = {}
    for name, side in recipe.game.sides(spec).items():
        torch.manual_seed(derive(recipe.run.seed, f"weights/{name}"))
        players[name] = Player(
            name, side.build(), side.options, device=device, precision=precision, remembered=side.remembered,
            compiled=recipe.run.compile, sharding=sharding,
        )  # fmt: skip
    return players


class Run:
    """A run: its players, stream, clock and folder. Only rank 0 touches the folder."""

    def __init__(self, recipe: Recipe, world: World, init_from: Path | None = None, allow_pipe: bool = False) -> None:
        assert isinstance(recipe.game, Game)
        self.recipe, self.world, self.game = recipe, world, recipe.game
        self.folder = Path(recipe.run.folder)
        digest, self.spec = data_digest(recipe.data), data_spec(recipe.data, allow_pipe)
        other = recipe.data.unlabelled()
        self.phases = self.game.phases(self.spec)
        self.clock = Clock(recipe.run.batch, recipe.run.images)
        self.decisive = recipe.decisive() | {"data": digest, "run.precision": world.precision}
        self.decisive |= {"data.unlabelled_path": data_digest(other)} if other is not None else {}
        self.run_id = f"{derive(recipe.run.seed, 'run', time.time_ns()):016x}"
        self.found: checkpoint.Checkpoint | None = None
        self.warnings: list[str] = []
        self.init_from: str | None = None
        self.seconds = 0.0
        self.quarantined: set[int] = set()
        self.lost_data = ""
        self.allow_pipe = allow_pipe
        self._health, self._health_of_samples = Health(), Health()  # of each row, and of each sheet of samples
        self._seen: dict[str, float] = {}  # what rank 0 alone measures goes into its next row
        self._reals: Tensor | None = None
        text = recipe.to_yaml() + digest + str(self.decisive.get("data.unlabelled_path")) + world.precision
        same = hashlib.blake2b(text.encode(), digest_size=7).digest()
        world.agree("recipe, dataset and precision", int.from_bytes(same, "little"))
        self.evaluator: Evaluator | None = None
        if recipe.run.evaluate_images is not None:
            made: list[Evaluator] = []

            def prepare_scores() -> int:
                made.append(self.game.evaluator(recipe.data, self.spec, world.device))
                return 0

            world.lead(prepare_scores)  # rank 0 first: what it downloads, the others find
            self.evaluator = made[0] if made else self.game.evaluator(recipe.data, self.spec, world.device)
        self._refuse_oversized()
        world.lead(lambda: self._refuse_unfit(init_from))
        resuming = world.lead(lambda: self._open_folder(init_from))
        self.players = make_players(recipe, self.spec, world.device, world.precision, world.sharding)
        if resuming:
            self._resume()
        elif init_from is not None:
            self._start_from()
        elif self.game.starts:
            self._start_from_data()
        self.resumed_step = self.clock.step if resuming else -1
        share = Share(
            self.game.parts(self.spec),
            recipe.run.batch,
            recipe.run.seed,
            world.device,
            rank=world.rank,
            ranks=world.ranks,
            accumulate=recipe.run.accumulate,
            recall=draws_each_step(self.phases),
        )
        self.stream = open_batches(recipe.data, share, allow_pipe)
        self.meter = Meter()
        self.failed_saves = 0
        self._log: Log | None = None
        if world.leads:
            (self.folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
            self._log = Log(self.folder, self.run_id, recipe.run.trackers, recipe.model_dump(mode="json"))
            self._log.event(
                "resume" if resuming else "start",
                images=self.clock.images,
                run_id=self.run_id,
                ranks=world.ranks,
                device=device_name(world.device),
                threads=torch.get_num_threads(),
                precision=world.precision,
                **versions(),
            )
            self._write_subset()
        self.bar = Bar(recipe.run.images, self.clock.images, world.leads)
        self._greet(bool(resuming))
        self._mark = (time.monotonic(), self.clock.step, 0.0)

    # ---- starting

    def _refuse_oversized(self) -> None:
        """Raises InputError before anything is written where the players are more than all memory of the device."""
        device = self.world.device
        there = (
            torch.cuda.get_device_properties(device).total_memory
            if device.type == "cuda"
            else psutil.virtual_memory().total
        )
        for name, side in self.game.sides(self.spec).items():
            with torch.device("meta"):
                weights = sum(weight.numel() * weight.element_size() for weight in side.build().parameters())
            needed = weights * (4 + (side.options.ema is not None))  # gradients, two moments, the average
            if self.world.sharding is not None:
                needed //= self.world.ranks
            if needed > there:
                raise InputError(
                    f"`game.{name}.network`: its weights, gradients and moments are {needed / 2**30:,.0f} GiB, and the device has "
                    f"{there / 2**30:,.0f}; use a smaller one"
                )

    def _refuse_unfit(self, init_from: Path | None) -> int:
        """Raises InputError before anything is written where labelled images lie in another split of the dataset as well, where a file
        that a new run starts from is not there, or where weights are spread (FSDP) and the run needs them whole."""
        if not (self.folder / "recipe.yaml").exists():
            self.game.refuse_unready()
        if self.world.sharding is not None:
            begins = init_from is None and not checkpoint.folders(self.folder / "checkpoints")
            if begins and self.game.starts:
                raise InputError(
                    "`game`: its first weights depend on data or on a file, which no process reads into weights that are spread (FSDP): begin the run "
                    "with `--multi_gpu`, stop it, and go on with FSDP"
                )
            if self.recipe.run.compile:
                raise InputError("`run.compile` is not served beside FSDP; leave one of them out")
        if self.recipe.data.subset is not None and self.recipe.data.reader == "index":
            refuse_leaks(self.recipe.data)
        return 0

    def _open_folder(self, init_from: Path | None) -> int:
        """Takes the folder for this run; 1 where there is a checkpoint to go on from."""
        origin = checkpoint.find(init_from) if init_from is not None else None
        wanted = self.game.sides(self.spec).keys()
        if origin is not None and not wanted <= origin.state.players.keys():
            raise InputError(
                f"--init-from {origin.folder}: its players are {', '.join(origin.state.players)}, and this recipe's are {', '.join(wanted)}; name "
                "a run of the same game"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            begun = (self.folder / "recipe.yaml").exists()
            if not begun and any(path.name[0] != "." for path in self.folder.iterdir()):
                raise InputError(f"`run.folder`: {self.folder} is not empty and holds no run; name another folder")
            self._lock = (self.folder / ".lock").open("w")
        except OSError as error:
            raise InputError(
                f"`run.folder`: {error.filename}: {error.strerror}; name a folder that you may write to"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{self.folder}: another process is training there; wait for it, or name another `run.folder`"
            ) from None
        except OSError as error:
            self.warnings.append(
                f"{self.folder}: this file system has no locks ({error.strerror}): start one run at a time there"
            )
        self.found, damaged = checkpoint.newest(self.folder / "checkpoints")
        if self.found is None and damaged:
            lines = [f"{self.folder / 'checkpoints'}: no checkpoint verifies, so the run cannot go on:"]
            lines += [f"  {fault}" for fault in damaged]
            raise Failure("\n".join([*lines, "  restore one of them, or name another `run.folder` to start anew"]))
        self.warnings += [f"skipped a checkpoint: {fault}" for fault in damaged]
        if origin is not None:
            self.origin, self.init_from = origin, origin.digest
        if self.found is None:
            return 0
        state = self.found.state
        if origin is not None and state.init_from != origin.digest:
            raise InputError(
                f"{self.folder}: has a run already that did not start from {origin.folder}, and --init-from starts a new one; "
                "name another `run.folder`"
            )
        self._refuse_changes(state)
        self.run_id, self.seconds, self.init_from = state.run_id, state.seconds, state.init_from
        self.quarantined = set(state.quarantined)
        if state.ranks != self.world.ranks:
            self.warnings.append(
                f"{self.folder}: was saved by {state.ranks} processes and goes on with {self.world.ranks}: the same samples and "
                "noise, and another rounding; networks with batch statistics see other batches"
            )
        return 1

    def _refuse_changes(self, state: checkpoint.State) -> None:
        now = checkpoint.as_json(self.decisive)
        # A key that the version which began the run did not have is as if it had had the default.
        new = {key: value for key, value in self.recipe.defaults().items() if key not in state.decisive}
        changes = [
            f"  `{key}`: {state.decisive.get(key, '(absent)')} → {now.get(key, '(absent)')}"
            for key in sorted(now.keys() | state.decisive.keys())
            if now.get(key) != state.decisive.get(key, checkpoint.as_json(new).get(key)) and key != "data"
        ]
        if now["data"] != state.decisive.get("data"):
            changes.append(f"  `data.path`: {self.recipe.data.path} is not the dataset that it was begun with")
        if changes:
            raise InputError(
                "\n".join(
                    [
                        f"{self.folder}: was begun with another recipe, and going on would change its result:",
                        *changes,
                        f"  go on with the old values, or start a new run from its weights: run.folder=NEW --init-from {self.folder}",
                    ]
                )
            )

    def _parts(self) -> dict[str, dict[str, dict[str, Tensor]]]:
        """All tensors by player, part and name; all processes ask together."""
        return {name: player.tensors() for name, player in self.players.items()}

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        """Around what may use players on some processes and not on others."""
        with ExitStack() as several:
            for player in self.players.values():
                several.enter_context(player.gathered())
            yield

    def _take(self, parts: dict[str, dict[str, dict[str, Tensor]]]) -> None:
        """Gives every rank what rank 0 has read."""
        for name, player in self.players.items():
            player.take(parts[name])

    def _resume(self) -> None:
        parts, found = self._parts(), self.found

        def restore() -> int:
            assert found is not None
            state = found.state
            if state.images != state.step * self.clock.batch:
                raise Failure(f"{found.folder}: {state.images} images are not {state.step} steps of {self.clock.batch}")
            for name, player in self.players.items():
                if name not in state.players or state.players[name].keys() != player.numbers().keys():
                    raise Failure(f"{found.folder}: its state of the {name} is not one of this recipe")
            for name, tensors in _files(parts).items():
                found.restore(name, tensors)
            return found.state.step

        self.clock.step = self.world.lead(restore)
        self._take(parts)
        for name, player in self.players.items():
            numbers = found.state.players[name] if found is not None else player.numbers()
            values = torch.tensor(list(numbers.values()), dtype=torch.float64)
            if self.world.ranks > 1:
                dist.broadcast(values, 0, group=self.world.control)
            player.load_numbers(
                {key: type(old)(new) for (key, old), new in zip(numbers.items(), values.tolist(), strict=True)}
            )
        self.quarantined = set(json.loads(self.world.gather(json.dumps([*self.quarantined]))[0]))

    def _start_from(self) -> None:
        """Old weights, new everything else: the averages begin again from the weights."""
        weights = {name: {"": parts[""]} for name, parts in self._parts().items()}

        def restore() -> int:
            for name, tensors in _files(weights).items():
                self.origin.restore(name, tensors)
            return 0

        self.world.lead(restore)
        self._take(weights)
        for player in self.players.values():
            player.restart_average()

    def _some_samples(self, count: int) -> Tensor:
        """So many samples of the first part that the game reads."""
        part = self.game.parts(self.spec)[0]
        return self._some_rows(count, (part,))[part]

    def _some_rows(self, count: int, parts: tuple[str, ...] | None = None) -> Batch:
        """So many rows of some or all parts that the game reads, or all where there are fewer, on the CPU; one process asks alone."""
        parts, data = parts or self.game.parts(self.spec), self.recipe.data
        if PARTS[parts[0]].view != "labelled":  # of the whole split, or of another dataset
            data = data.unlabelled() or data.model_copy(update={"subset": None})
        count = min(count, data_spec(data, self.allow_pipe).samples or self.recipe.run.batch)
        share = Share(parts, count, self.recipe.run.seed, torch.device("cpu"))
        stream = open_batches(self.recipe.data, share, self.allow_pipe)
        try:
            for fault in stream.ready([0]):
                if fault.number < 0 or not self.recipe.data.quarantine:
                    raise Failure(fault.message)
            (batch,) = stream.read(0)
            return batch
        finally:
            stream.close()

    def _start_from_data(self) -> None:
        """Initial weights that depend on the data: rank 0 reads it, and the others get what it made of it."""

        def start() -> int:
            wanted = self.game.start_samples
            samples = self._some_samples(wanted) if wanted else torch.empty(0)
            torch.manual_seed(derive(self.recipe.run.seed, "start"))
            self.game.start(self.players, self.spec, samples)
            return 0

        self.world.lead(start)
        self._take({name: {"": parts[""]} for name, parts in self._parts().items()})
        for player in self.players.values():
            player.restart_average()

    def _greet(self, resuming: bool) -> None:
        say = self.bar.say
        for warning in [*self.warnings, *self.stream.promises()]:
            say(warning)
        if self.init_from is not None and not resuming:
            say(f"starts from the weights of {self.origin.folder}")
        if resuming and not self.clock.done:
            say(f"going on at {self.clock.images:,} images from {self.found.folder}" if self.found else "")
        where = "1 process" if self.world.ranks == 1 else f"{self.world.ranks} processes"
        where += ", their weights spread (FSDP2)," if self.world.sharding is not None else ""
        say(f"{self.folder}: {where} on {self.world.device.type}, {self.world.precision} ({self.world.reason})")
        if self.clock.done:
            say(
                f"{self.clock.images:,} images are done, and `run.images` is {self.recipe.run.images:,}; a larger one trains on"
            )

    def _write_subset(self) -> None:
        """Which samples the labels of this run come from, by number and key."""
        subset = self.recipe.data.subset
        if subset is None or not isinstance(self.stream, Stream) or self.stream.subset is None:
            return
        reader = self.stream.reader
        samples = [{"number": number, "key": reader.key(number)} for number in self.stream.subset.tolist()]
        record = {"dataset": reader.dataset.digest, "split": self.recipe.data.split, **subset.model_dump()}
        (self.folder / "subset.json").write_text(json.dumps({**record, "samples": samples}, indent=1) + "\n")

    # ---- while it runs

    def note_graphs(self, graphs: int | None, reason: str = "") -> None:
        """Says and notes that steps are replayed from so many graphs, or that they are not, and why."""
        if self._log:
            self._log.event("graphs", images=self.clock.images, graphs=graphs, reason=reason)
        self.bar.say(
            f"{self.clock.images:,} images: steps of this kind are {graphs} CUDA graphs from here on"
            if graphs is not None
            else f"{self.clock.images:,} images: no CUDA graphs: {reason}"
        )

    def data_faults(self) -> list[Fault]:
        """Waits for the data of the next step, and returns what is wrong with it on this rank."""
        if self.clock.done:
            return []
        wanted = zip(self.phases, draws(self.phases, self.clock.step), strict=True)
        return self.stream.ready(sorted({draw for phase, found in wanted if phase.when(self.clock) for draw in found}))

    def cannot_go_on(self, faults: list[Fault]) -> bool:
        """Notes the faults of all ranks; whether the data is lost, or more samples are bad than `data.quarantine` allows.

        All ranks call it together and come to the same answer.
        """
        texts = self.world.gather(json.dumps(faults))
        limit = self.recipe.data.quarantine
        for number, message in (fault for text in texts for fault in json.loads(text)):
            if number in self.quarantined:
                continue
            # A sample beyond the limit is not noted: the same command would go on past it.
            kind = "quarantine" if number >= 0 and len(self.quarantined) < limit else "data_lost"
            if self._log:
                self._log.event(kind, images=self.clock.images, sample=number, error=message)
            if kind == "data_lost":
                advice = f"; `data.quarantine` {limit} allows no more bad samples" if number >= 0 else ""
                self.lost_data = self.lost_data or message + advice
            else:
                self.quarantined.add(number)
                self.bar.say(f"quarantined {len(self.quarantined)} of at most {limit} samples: {message}")
        return bool(self.lost_data)

    def refuse_lost_data(self) -> None:
        """Ends every rank, with a checkpoint behind it, where the data did not allow going on; rank 0 says why."""
        if self.lost_data:
            if not self.world.leads:
                raise SystemExit(1)
            raise Failure(f"{self.lost_data}; a checkpoint at {self.clock.images:,} images is saved")

    def upkeep(self, last: bool) -> None:
        """Logs, samples and saves what is due; comes before the step, so that the last step needs no code of its own."""
        clock, options = self.clock, self.recipe.run
        self.bar.update(clock.images)
        if (
            clock.step == self.resumed_step
        ):  # all this was done before the stop, but for scores, which a stop does not wait for
            if clock.step and (clock.done or (clock.passed(options.evaluate_images) and not last)):
                self._make_up_scores()
            return
        if clock.step and (last or clock.step % options.log_every == 0):
            self._write_row()
        if clock.passed(options.sample_images) or (clock.done and options.sample_images is not None):
            self._sample()
        if last or (clock.step and clock.passed(options.save_images)):
            self._save(last)
        due = clock.passed(options.evaluate_images) and not (last and not clock.done)  # who stops us will not wait
        if clock.step and (due or (clock.done and self.evaluator is not None)):
            self._evaluate()

    def _make_up_scores(self) -> None:
        """Scores what was due when the run was stopped, where that was not done."""
        if self.evaluator is None:
            return
        files = f"images_{self.clock.images:09d}_*.json"
        if not self.world.lead(lambda: int(any((self.folder / "evaluations").glob(files)))):
            self._evaluate()

    def _write_row(self) -> None:
        values = self.meter.read()
        for name, player in self.players.items():
            values[f"learning_rate/{name}"] = player.learning_rate
            values[f"skipped/{name}"] = float(player.skipped)
            if player.history:
                values[f"distance_to_history/{name}"] = float(player.distance_to_history())
            if float(player.skipped_in_a_row) >= MAX_SKIPPED:
                raise Failure(
                    f"{name}: no finite gradient in {MAX_SKIPPED} steps up to {self.clock.images} images: training has diverged; "
                    f"the checkpoints in {self.folder / 'checkpoints'} are from before; lower the learning rate or clip_norm"
                )
        now, (then, step, waited) = time.monotonic(), self._mark
        seconds = max(now - then, 1e-9)
        self.seconds += seconds
        memory = torch.cuda.max_memory_allocated() if self.world.device.type == "cuda" else resident_bytes()
        row = {
            "step": self.clock.step,
            "images": self.clock.images,
            "seconds": round(self.seconds, 3),
            "images_per_second": (self.clock.step - step) * self.clock.batch / seconds,
            "data_wait_fraction": (self.stream.waited - waited) / seconds,
            "memory_bytes": memory,
            **values,
        }
        self._mark = (now, self.clock.step, self.stream.waited)
        norms = [row[f"grad_norm/{name}"] for name in self.players if f"grad_norm/{name}" in row]
        if len(norms) == 2:
            row["grad_norm/ratio"] = min(MAX_RATIO, norms[1] / norms[0] if norms[0] > 0 else MAX_RATIO * (norms[1] > 0))
        if self._log:
            self._log.row(row | self._seen)
            self._tell(self._health, row)
        self._seen = {}

    def _duplicates(self, made: Tensor) -> dict[str, float]:
        """The share of near twins; nothing where the data cannot be read, which is told when it is needed."""
        try:
            if self._reals is None:
                self._reals = self._some_samples(len(made))
            return {"duplicates": duplicates(made, self._reals)}
        except (Failure, InputError):
            return {}

    def _tell(self, health: Health, measured: dict[str, float]) -> None:
        """Says and notes what has lasted; rank 0 alone."""
        assert self._log is not None
        for name, finding, advice in health.told(self.game.symptoms(measured)):
            self._log.event("symptom", images=self.clock.images, symptom=name, finding=finding, advice=advice)
            self.bar.say(f"{self.clock.images:,} images: {finding}: {advice}")

    def _sample(self) -> None:
        with self._gathered():
            if not self._log:
                return
            count, seed = shown(self.spec), self.recipe.run.seed
            made = torch.cat([*self.game.samples(self.players, self.spec, count, seed, self._some_rows)])
            classes = self.game.classes(self.spec) if isinstance(self.game, Generative) else None
            self._log.picture("samples", sheet(made, turns=classes or 1), self.clock.images)
            if (
                isinstance(self.game, Generative) and len(made) > 1 and made[0].numel() > 2
            ):  # points of a plane are near each other by chance
                self._seen = self._duplicates(made)
                self._tell(self._health_of_samples, self._seen)

    def _evaluate(self) -> None:
        """Scores the weights of this moment, on all ranks; comes after the checkpoint, since it may take long."""
        assert self.evaluator is not None
        began = time.monotonic()
        try:
            with self._gathered():
                found = self.evaluator(self.players)
            if found is not None and self._log:
                write_evaluation(self.folder, self.clock.images, found, channels(self.spec))
                for name, panels in (
                    found.panels.items() if self.recipe.run.trackers else ()
                ):  # a sheet costs its drawing
                    self._log.mirror_picture(f"evaluation/{name}", captioned(*panels), self.clock.images)
                for name, table in found.tables.items():
                    self._log.mirror_table(f"evaluation/{name}", table, self.clock.images)
                self._log.row({"images": self.clock.images, **{f"score/{n}": v for n, v in found.scores.items()}})
                self.bar.say(
                    f"{self.clock.images:,} images: {in_words(found.scores)} ({time.monotonic() - began:.0f} s)"
                )
        except (RuntimeError, ValueError, OSError, MemoryError) as error:  # costs the scores, never the run
            said = (
                str(error) if isinstance(error, Failure | InputError | OSError) else f"{type(error).__name__}: {error}"
            )
            if self._log:
                self._log.event("evaluation_failed", images=self.clock.images, error=said)
            self.bar.say(f"{self.clock.images:,} images could not be scored: {said}")
        self._mark = (self._mark[0] + time.monotonic() - began, *self._mark[1:])  # no part of the pace of training

    def _save(self, last: bool) -> None:
        """Rank 0 writes; a disk that fails costs one checkpoint, unless it is the last or fails again and again."""
        parts = self._parts()

        def write() -> int:
            state = checkpoint.State(
                step=self.clock.step,
                images=self.clock.images,
                seconds=self.seconds,
                run_id=self.run_id,
                init_from=self.init_from,
                precision=self.world.precision,
                ranks=self.world.ranks,
                spec=self.spec,
                quarantined=tuple(sorted(self.quarantined)),
                recipe=self.recipe.model_dump(mode="json"),
                decisive=checkpoint.as_json(self.decisive),
                versions=versions(),
                players={name: player.numbers() for name, player in self.players.items()},
            )
            assert self._log is not None
            try:
                folder = checkpoint.save(
                    self.folder / "checkpoints", state, _files(parts), self.recipe.run.keep_checkpoints
                )
            except OSError as error:
                self.failed_saves += 1
                self._log.event("checkpoint_failed", images=self.clock.images, error=str(error))
                self.bar.say(f"checkpoint at {self.clock.images:,} images failed: {error}; older ones are untouched")
                if last or self.failed_saves == MAX_FAILED_SAVES:
                    raise Failure(
                        f"{self.folder}: {self.failed_saves} checkpoints in a row could not be written: {error}"
                    ) from error
                return 0
            self.failed_saves = 0
            self._log.event("checkpoint", images=self.clock.images, folder=folder.name)
            return 0

        self.world.lead(write)

    def close(self) -> None:
        """Ends threads, log and bar."""
        self.bar.close()
        self.stream.close()
        if self._log:
            self._log.close()


def _files(players: dict[str, dict[str, dict[str, Tensor]]]) -> checkpoint.Files:
    """The tensors of players by the names of their files."""
    return {
        f"{name}.{part}" if part else name: tensors
        for name, parts in players.items()
        for part, tensors in parts.items()
    }


@contextmanager
def running(recipe: Recipe, world: World, init_from: Path | None = None, allow_pipe: bool = False) -> Iterator[Run]:
    """A run that is closed in any case."""
    run = Run(recipe, world, init_from, allow_pipe)
    try:
        yield run
    finally:
        run.close()


def device_name(device: torch.device) -> str:
    """What it is, for a record."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def versions() -> dict[str, str]:
    """What the result was computed with."""
    names = ("gandist", "torch", "accelerate", "safetensors", "webdataset", "numpy")
    return {name: version(name) for name in names} | {"python": platform.python_version()}


def resident_bytes() -> int:
    """The most memory that this process has had."""
    scale = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
