"""Steps: what a GPU replays from a recording is what the step computes as it is written, and samples are read once."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import open_stream, packed, scenes_on_disk, tensor_files
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from gandist import augment
from gandist.check import read_recipe
from gandist.data.opening import data_spec, open_batches
from gandist.data.stream import Share
from gandist.game import Clock, Game, unchanging
from gandist.launcher import World
from gandist.log import Meter
from gandist.memory import peak_bytes
from gandist.optimizers import AdamOptions, ScheduleOptions
from gandist.player import EmaOptions, Player, PlayerOptions
from gandist.recipe import InputError, Recipe
from gandist.run import make_players, running
from gandist.steps import Fixed, Sources, Unknown, Unread, moves, plain_step, play
from gandist.train import train

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
CPU = torch.device("cpu")

GAN = """\
data: {{path: {fashion}}}
game:
  kind: gan
  noise: 16
  generator: {{network: {{kind: dcgan, width: 16}}, ema: {{half_life_images: 500}}}}
  discriminator: {{network: {{kind: dcgan, width: 16, norm: none}}}}
  augment: {{kind: ada, start: 0.3, every: 2, groups: [colour]}}
  regularisers: {{r1: {{weight: 1.0, every: 3}}}}
run: {{folder: {folder}, images: 640, batch: 32, precision: {precision}, log_every: 5, save_images: 100_000}}
"""
HELD = """\
data: {{path: {fashion}}}
game:
  kind: gan
  noise: 16
  order: simultaneous
  generator: {{network: {{kind: mlp, width: 32}}, clip_norm: 1.0}}
  discriminator:
    network: {{kind: mlp, width: 32, hidden_dropout: 0.3, spectral_norm: true}}
    optimizer: {{kind: sgd, learning_rate: 0.05, momentum: 0.5, final_momentum: 0.7, momentum_images: 320}}
run: {{folder: {folder}, images: 640, batch: 32, accumulate: 2, precision: {precision}, log_every: 5, save_images: 100_000}}
"""
REPEATED = """\
data: {{path: {fashion}}}
game:
  kind: gan
  noise: 16
  loss: wasserstein
  conditional: projection
  discriminator_steps: 3
  generator: {{network: {{kind: resnet, width: 8}}, schedule: {{kind: linear, until_images: 640}}}}
  discriminator: {{network: {{kind: resnet, width: 8}}}}
  regularisers: {{gradient_penalty: {{weight: 10.0}}}}
run: {{folder: {folder}, images: 640, batch: 32, precision: {precision}, log_every: 5, save_images: 100_000}}
"""
SEMI = """\
data: {{path: {fashion}, subset: {{per_class: 5, seed: 0}}}}
game:
  kind: semi
  generator: {{network: {{kind: salimans_mlp}}, optimizer: {{learning_rate: 3e-3, eps_inside_root: true}}}}
  discriminator:
    network: {{kind: salimans_mlp}}
    optimizer: {{learning_rate: 3e-3, eps_inside_root: true}}
    ema: {{half_life_images: 1000, ramp_up: null, from_zero: true}}
  pseudo_labels: {{weight: 0.1, from_images: 320}}
run: {{folder: {folder}, images: 640, batch: 32, precision: {precision}, log_every: 5, save_images: 100_000}}
"""
SEGMENT = """\
data: {{path: {scenes}}}
game:
  kind: segment
  segmenter:
    network: {{kind: unet, width: 8, blocks: [1, 1], decoder: 16, drop_path: 0.1}}
    optimizer: {{kind: adam, learning_rate: 2e-3, weight_decay: 0.05}}
    ema: {{half_life_images: 400}}
  adversary: {{network: {{kind: patch, width: 8, layers: 2}}}}
  adversarial: {{weight: 0.1, input: scaling, from_images: 160}}
  dice: 0.5
  augmentation: {{crop: [48, 48], scale: [0.8, 1.2], flip: true, hue: 0.1}}
run: {{folder: {folder}, images: 320, batch: 16, precision: {precision}, log_every: 5, save_images: 100_000}}
"""
RECIPES = {"gan": GAN, "held": HELD, "repeated": REPEATED, "semi": SEMI, "segment": SEGMENT}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "packed"
    packed(scenes_on_disk(tmp_path_factory.mktemp("scenes") / "raw", 32, [(64, 64)]), folder)
    return folder


@pytest.fixture
def written(fashion: Path, scenes: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe of RECIPES and returns its path."""

    def write(text: str, name: str = "run", precision: str = "fp32") -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(text.format(fashion=fashion, scenes=scenes, folder=tmp_path / name, precision=precision))
        return path

    return write


def trained(path: Path, *changes: str) -> tuple[dict[str, bytes], list[dict[str, object]]]:
    """The tensors of the last checkpoint, and the record."""
    recipe = read_recipe(path, list(changes))
    assert train(recipe, World.join(recipe.run.precision)) == 0
    folder = Path(recipe.run.folder)
    newest = max((folder / "checkpoints").iterdir())
    return tensor_files(newest), [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def said(record: list[dict[str, object]]) -> list[dict[str, object]]:
    return [row for row in record if row.get("event") == "graphs"]


# ---- memory


def measured_peak(recipe: Recipe, precision: str) -> int:
    """Bytes of all tensors at the worst moment of a step, by torch's profiler, which sees what kernels take as well."""
    assert isinstance(recipe.game, Game)
    spec = data_spec(recipe.data)
    players, phases = make_players(recipe, spec, CPU, precision), recipe.game.phases(spec)
    share = Share(
        recipe.game.parts(spec), recipe.run.batch, recipe.run.seed, CPU, accumulate=recipe.run.accumulate, recall=4
    )
    stream, clock = open_batches(recipe.data, share), Clock(recipe.run.batch, recipe.run.images)

    def one() -> None:
        turns, batches = [], stream.read(0)
        for move in moves(clock, phases):
            turns.append(play(players, clock, move, [replace(batch, made={}) for batch in batches])[0])
        for turn in turns:
            turn.finish()

    one()
    kept: dict[int, int] = {}
    for player in players.values():
        player.optimizer.zero_grad()
        player._kept = []
        tensors = [tensor for part in player.tensors().values() for tensor in part.values()]
        kept |= {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    kept |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in stream.read(0)[0].parts.values()}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        one()
        one()
    stream.close()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return sum(kept.values()) + max(itertools.accumulate(changes))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", RECIPES)
def test_the_memory_of_a_step_is_told_beforehand(written: Callable, name: str, precision: str) -> None:
    recipe = read_recipe(written(RECIPES[name], precision=precision), ["run.images=320"])
    told = peak_bytes(recipe, data_spec(recipe.data), 1, precision)
    assert told == pytest.approx(measured_peak(recipe, precision), rel=0.15)
    half = peak_bytes(recipe, data_spec(recipe.data), 2, precision)
    game = recipe.game
    assert isinstance(game, Game)
    buckets = sum(
        4 * p.numel() for side in game.sides(data_spec(recipe.data)).values() for p in side.build().parameters()
    )
    assert half < told + buckets
    if name in ("gan", "repeated", "segment"):  # which have more activations than weights
        assert half < told


def test_what_was_played_without_values_leaves_none_behind(written: Callable) -> None:
    recipe = read_recipe(written(GAN, precision="fp32"), [])
    peak_bytes(recipe, data_spec(recipe.data), 1, "fp32")
    files, _ = trained(written(GAN, precision="fp32"), "run.images=32")
    assert files
    for keep in (augment._luma, augment._raise, augment._colours):
        assert not isinstance(keep(3, CPU), FakeTensor)


BLOCKS = {
    "resnet": GAN.replace("{kind: dcgan, width: 16}}, ema: {{half_life_images: 500}}", "{kind: resnet, width: 8}}")
    .replace("{kind: dcgan, width: 16, norm: none}", "{kind: resnet, width: 8, attention: 14}")
    .replace("r1: {{weight: 1.0, every: 3}}", "r1: {{weight: 1.0}}"),
    "r3gan": GAN.replace("{kind: dcgan, width: 16}", "{kind: r3gan, width: 32, group_size: 8}").replace(
        "{kind: dcgan, width: 16, norm: none}", "{kind: r3gan, width: 32, group_size: 8}"
    ),
    "penalty": REPEATED,
    "unet": SEGMENT,
}


@pytest.mark.parametrize(
    ("name", "precision"), [("resnet", "bf16"), ("r3gan", "fp32"), ("penalty", "fp32"), ("unet", "bf16")]
)
def test_what_is_computed_again_takes_less_memory_and_gives_the_same_weights(
    written: Callable, name: str, precision: str
) -> None:
    sides = ["segmenter"] if name == "unet" else ["generator", "discriminator"]
    changes = [f"game.{side}.activation_checkpointing=true" for side in sides]
    short = ["run.images=96"]
    path = written(BLOCKS[name], "kept", precision)
    kept, _ = trained(path, *short)
    again, _ = trained(written(BLOCKS[name], "again", precision), *short, *changes)
    assert [part for part in kept if kept[part] != again[part]] == []
    recipes = [read_recipe(path, [*short, *more]) for more in ([], changes)]
    most, less = (peak_bytes(recipe, data_spec(recipe.data), 1, precision) for recipe in recipes)
    assert less < 0.9 * most


def test_a_network_without_blocks_cannot_compute_them_again(written: Callable) -> None:
    with pytest.raises(InputError, match="its network has no blocks"):
        read_recipe(written(SEMI), ["game.discriminator.activation_checkpointing=true"])


# ---- compiled


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler")
def test_what_is_compiled_computes_what_is_written_and_goes_on_bit_by_bit(
    written: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    paths = {name: written(GAN, name) for name in ("eager", "whole", "halves")}
    short = ("run.images=192", "run.log_every=1")
    _, eager = trained(paths["eager"], *short)
    whole, compiled = trained(paths["whole"], *short, "run.compile=true")
    lines = [[row for row in record if "event" not in row] for record in (eager, compiled)]
    assert len(lines[0]) == len(lines[1]) == 6
    for one, other in zip(*lines, strict=True):
        same = one.keys() - {"seconds", "images_per_second", "data_wait_fraction", "memory_bytes"}
        assert {key: other[key] for key in same} == pytest.approx({key: one[key] for key in same}, rel=2e-2, abs=1e-4)
    trained(paths["halves"], "run.images=96", "run.log_every=1", "run.compile=true")
    halves, _ = trained(paths["halves"], *short, "run.compile=true")
    assert [name for name in whole if whole[name] != halves[name]] == []
    assert {path.name for path in (tmp_path / "cache").iterdir()} & {"fxgraph", "aotautograd"} == set()  # pickles


# ---- on a GPU


@pytest.fixture
def one_order() -> Iterator[None]:
    """Convolutions of a GPU whose gradients add up in one order: others may differ in their last bits from one run to the next."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


@needs_gpu
@pytest.mark.usefixtures("one_order")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_replayed_step_is_the_step_bit_by_bit(written: Callable, name: str, precision: str) -> None:
    plain, no_graphs = trained(written(RECIPES[name], "plain", precision), "run.graphs=false")
    replayed, graphs = trained(written(RECIPES[name], "replayed", precision))
    assert [row["graphs"] for row in said(no_graphs)] == [None]
    assert said(graphs)
    assert all(row["graphs"] for row in said(graphs)), said(graphs)
    assert plain.keys() == replayed.keys()
    assert [name for name in plain if plain[name] != replayed[name]] == []
    measured = [[row for row in record if "event" not in row] for record in (no_graphs, graphs)]
    for one, other in zip(*measured, strict=True):
        same = one.keys() - {"seconds", "images_per_second", "data_wait_fraction", "memory_bytes"}
        assert {key: one[key] for key in same} == pytest.approx({key: other[key] for key in same}, rel=1e-5, abs=1e-6)


@needs_gpu
def test_a_run_that_was_stopped_between_two_replays_goes_on_bit_by_bit(written: Callable) -> None:
    whole, _ = trained(written(SEMI, "whole"))
    path = written(SEMI, "halves")
    trained(path, "run.images=320")
    halves, _ = trained(path)
    assert [name for name in whole if whole[name] != halves[name]] == []


@needs_gpu
def test_what_cannot_be_recorded_runs_as_it_is_written_and_the_record_says_why(written: Callable) -> None:
    text = SEMI.replace("  pseudo_labels: {{weight: 0.1, from_images: 320}}\n", "  virtual_adversarial: {{}}\n")
    plain, _ = trained(written(text, "plain"), "run.graphs=false")
    tried, record = trained(written(text, "tried"))
    assert [(row["graphs"], bool(row["reason"])) for row in said(record)] == [(None, True)]
    assert [name for name in plain if plain[name] != tried[name]] == []


# ---- anywhere


def test_a_loss_reads_of_the_clock_what_its_phase_says(written: Callable) -> None:
    read = 0
    for text in RECIPES.values():
        recipe = read_recipe(written(text), [])
        assert isinstance(recipe.game, Game)
        spec = data_spec(recipe.data)
        players = make_players(recipe, spec, CPU, "fp32")
        subset = recipe.data.subset
        parts, path = recipe.game.parts(spec), recipe.data.path
        (batch,) = open_stream(path, parts=parts, batch=4, workers=0, subset=subset).read(0)
        for phase in recipe.game.phases(spec):
            with players[phase.player].turn(0, 4) as turn:
                try:
                    loss, _ = phase.loss(players, batch, Unread())  # type: ignore[arg-type]
                except Unknown:
                    read += 1
                    assert phase.regime is not unchanging, phase
                    loss, _ = phase.loss(players, batch, Clock(32, 640))
                turn.backward(loss)
    assert read >= 3


def test_steps_of_one_regime_have_one_loss(written: Callable) -> None:
    """Whatever else the clock says: a graph that is replayed would not hear of it."""
    several = 0
    for text in (GAN, SEMI, SEGMENT):
        recipe = read_recipe(written(text), [])
        assert isinstance(recipe.game, Game)
        spec = data_spec(recipe.data)
        (batch,) = open_stream(
            recipe.data.path, parts=recipe.game.parts(spec), batch=8, workers=0, subset=recipe.data.subset
        ).read(0)
        for phase in recipe.game.phases(spec):
            found: dict[Any, list[tuple[float, list[str]]]] = {}
            for number in range(14):
                clock = Clock(recipe.run.batch, recipe.run.images, number)
                players = make_players(recipe, spec, CPU, "fp32")
                torch.manual_seed(0)
                with players[phase.player].turn(0, 8) as turn:
                    loss, values = phase.loss(players, replace(batch, made={}), clock)
                    turn.backward(loss)
                found.setdefault(phase.regime(clock), []).append((float(loss), sorted(values)))
            several += len(found) > 1
            for same in found.values():
                assert all(one == same[0] for one in same), phase
    assert several >= 3


def test_a_rate_on_the_device_moves_as_one_that_python_has_and_is_not_waited_for() -> None:
    options = PlayerOptions(
        optimizer=AdamOptions(eps_inside_root=True), schedule=ScheduleOptions(kind="linear", until_images=400),
        ema=EmaOptions(half_life_images=50), clip_norm=2.0,
    )  # fmt: skip
    players = []
    for on_device in (False, True):
        torch.manual_seed(0)
        player = Player("one", nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 3)), options, device=CPU)
        if on_device:
            player._pace = {name: torch.zeros(()) for name in player._pace}
        players.append(player)
        for number in range(20):
            inputs = torch.randn(8, 12, generator=torch.Generator().manual_seed(number))
            with Waits() as waits, player.turn(number * 8, 8) as turn:
                turn.backward(player(inputs).square().mean())
            assert not on_device or not set(waits.found) - {"_local_scalar_dense"}, waits.found
    here, there = (player.tensors() for player in players)
    for file in here:
        for key, tensor in here[file].items():
            torch.testing.assert_close(there[file][key], tensor, rtol=1e-5, atol=1e-7)


def test_fixed_rows_draw_what_fresh_ones_do_whenever_they_are_asked(fashion: Path) -> None:
    stream = open_stream(fashion, batch=8, seed=3, workers=0)
    sources = Sources(3, CPU)
    for draw in (0, 5, 9):
        (fresh,) = stream.read(draw)
        fixed = Fixed(fresh.parts, draw, fresh.rows, 8, 3, CPU, sources=sources, place=0)
        sources.begin(draw)
        for purpose in ("one", "two", "one"):
            assert torch.equal(fixed.normal(purpose, 4), fresh.normal(purpose, 4))
        sources.reseed(draw + 1)
        (following,) = stream.read(draw + 1)
        expected = [following.source(purpose) for purpose in ("one", "two", "one")]
        found = [torch.rand(4, generator=generator) for generator in sources.of(0)]
        assert all(torch.equal(torch.rand(4, generator=e), f) for e, f in zip(expected, found, strict=True))


def test_a_meter_means_vectors_and_values_of_one_name_together() -> None:
    meter = Meter()
    meter.add({"a": torch.tensor(1.0), "b": torch.tensor(5.0)})
    for sums in ([4.0, 2.0], [1.0, 2.0]):
        meter.add_vector(("a", "c"), torch.tensor(sums), 2)
    assert meter.read() == {"a": pytest.approx(6 / 5), "b": 5.0, "c": 1.0}
    assert meter.read() == {}


# ---- samples that are read once


@pytest.fixture
def lost(tmp_path: Path, fashion: Path) -> Callable[[], None]:
    """Empties the shards of a copy of the garments."""
    shutil.copytree(fashion, tmp_path / "copy")

    def empty() -> None:
        for shard in (tmp_path / "copy").glob("*.tar"):
            shard.write_bytes(b"")

    return empty


@pytest.mark.parametrize("transform", [{}, {"size": 20}, {"canvas": [32, 40]}])
def test_a_sample_is_read_once_where_all_of_them_fit_into_memory(
    lost: Callable[[], None], tmp_path: Path, transform: dict[str, object]
) -> None:
    streams = [
        open_stream(tmp_path / "copy", parts=("image", "label", "unlabelled", "unlabelled_again"), batch=500, workers=2, transform=transform,
                    memory_gib=gib, subset={"per_class": 100, "seed": 0})
        for gib in (1.0, 0.0)
    ]  # fmt: skip
    kept, read = streams
    epoch = -(-len(kept.reader) // 500)
    expected = [read.read(draw)[0].parts for draw in range(2 * epoch)]
    for draw in range(epoch):
        kept.read(draw)
    for ahead in kept._pending.values():
        ahead.result()
    views = {view.name: view.kept for view in kept.views}
    assert views["unlabelled"] is views["unlabelled_again"]
    assert views["unlabelled"] is not views["labelled"]
    assert all(view.kept is None for view in read.views)
    lost()
    for draw in range(epoch, 2 * epoch):
        parts = kept.read(draw)[0].parts
        assert all(torch.equal(parts[name], tensor) for name, tensor in expected[draw].items())
    for stream in streams:
        stream.close()


def test_a_subset_takes_memory_for_its_own_samples_and_all_views_share_the_limit(fashion: Path) -> None:
    def kept(**options: Any) -> dict[str, Any]:
        stream = open_stream(
            fashion, parts=("image", "label", "unlabelled", "unlabelled_again"), batch=8, workers=0, **options
        )
        stream.read(0)
        found = {view.name: view.kept for view in stream.views}
        stream.close()
        return found

    few = {"subset": {"per_class": 2, "seed": 0}}
    labelled, unlabelled = (kept(**few)[name] for name in ("labelled", "unlabelled"))
    assert labelled._arrays["image"].shape == (20, 28, 28, 1)
    assert labelled._arrays["label"].shape == (20,)
    assert len(unlabelled._arrays["image"]) == len(open_stream(fashion, batch=8, workers=0).reader)
    whole = 784 * len(unlabelled._arrays["image"]) / 2**30
    assert [name for name, found in kept(memory_gib=1.5 * whole).items() if found is None] == [
        "unlabelled",
        "unlabelled_again",
    ]
    assert None not in kept(memory_gib=2.5 * whole).values()


def test_shards_are_not_asked_for_once_all_their_samples_are_in_memory(
    fashion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = open_stream(fashion, batch=500, workers=0, shuffle="window", window_shards=1)
    asked: list[Any] = []
    monkeypatch.setattr(stream.reader, "read_ahead", lambda shards, kept: asked.append(shards))
    epoch = -(-len(stream.reader) // 500) + 1
    for draw in range(epoch):
        stream.read(draw)
    assert asked
    asked.clear()
    for draw in range(epoch, 2 * epoch):
        stream.read(draw)
    assert asked == []
    stream.close()


def test_what_changes_when_it_is_met_again_or_is_too_much_is_not_kept(fashion: Path) -> None:
    for options in (
        {"transform": {"flip": True}},
        {"transform": {"crop": 20}},
        {"memory_gib": 1e-3},
    ):
        stream = open_stream(fashion, batch=16, workers=0, **options)
        assert [view.kept for view in stream.views] == [None]
        stream.close()
    stream = open_stream(fashion, batch=16, workers=0, transform={"crop": 20, "crop_at": "centre"})
    assert stream.views[0].kept is not None
    assert not stream.views[0].kept.complete
    assert (stream.views[0].kept._slots < 0).all()
    stream.close()


# ---- nothing waits for the device


class Waits(TorchDispatchMode):
    """The operations that hand a number from the device to Python, or whose result has a size that the device must tell."""

    SIGNS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if any(name.startswith(sign) for sign in self.SIGNS):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", RECIPES)
def test_no_step_waits_for_a_number_of_the_device(written: Callable, name: str) -> None:
    recipe = read_recipe(written(RECIPES[name]), [])
    with running(recipe, World.join("fp32")) as run:
        plain_step(run)  # the first one makes constants
        run.clock.advance()
        run.data_faults()
        with Waits() as waits:
            plain_step(run)
        assert waits.found == []
        with Waits() as waits:
            float(torch.ones(3).sum())
        assert waits.found == ["_local_scalar_dense"]
