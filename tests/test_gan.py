"""The gan game: on one process or two, in either order of updates, by the loop or by hand, it comes to the same weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import Table, on_ranks, open_stream, packed, tensor_files, tensors
from torch import Tensor, nn

from gandist import checkpoint
from gandist.check import read_recipe
from gandist.data.dataset import Dataset
from gandist.data.stream import Batch
from gandist.game import Clock, Phase, Players, draws, draws_each_step
from gandist.games.gan import Gan
from gandist.launcher import World
from gandist.log import Meter
from gandist.losses import ADVERSARIAL
from gandist.networks.noise import BLOCK, SPREAD
from gandist.recipe import DataOptions, Recipe, RunOptions
from gandist.run import make_players, running
from gandist.steps import reseed

CPU = torch.device("cpu")
NOISE, BATCH = 8, 16
RATES = {"generator": 0.5, "discriminator": 0.1}


def gan(generator: dict[str, Any] | None = None, discriminator: dict[str, Any] | None = None, **options: Any) -> Gan:
    """A small game of players that descend without adapting, so that what rounding adds stays as small as it is."""
    sides = {
        name: {
            "network": {"kind": "mlp", "width": 8},
            "optimizer": {"kind": "sgd", "learning_rate": RATES[name]},
            **(more or {}),
        }
        for name, more in (("generator", generator), ("discriminator", discriminator))
    }
    return Gan.model_validate({"kind": "gan", "noise": NOISE, **options, **sides})


def table(data: object, game: Gan) -> Table:
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    options = DataOptions(path=str(data), workers=0)
    run = RunOptions(folder="none", images=10**6, batch=BATCH)
    recipe = Recipe.model_construct(data=options, game=game, run=run)
    parts = ("image", "label") if game.conditional else ("image",)
    recall = draws_each_step(game.phases(Dataset(data).spec("train")))
    stream = open_stream(data, parts=parts, batch=BATCH, rank=rank, ranks=ranks, recall=recall, workers=0)
    players = make_players(recipe, stream.spec, CPU, "fp32")
    return Table(recipe, World(CPU, rank, ranks, "fp32", ""), players, stream, Clock(BATCH, 10**6), Meter())


# ---- the number of processes

DCGAN = {"network": {"kind": "dcgan", "width": 4, "norm": "none"}}
SPECTRAL = {"network": {"kind": "mlp", "width": 8, "spectral_norm": True}}
CASES: dict[str, dict[str, Any]] = {
    **{loss: {"loss": loss} for loss in ADVERSARIAL},
    "clipped weights": {"loss": "wasserstein", "discriminator": {"clip_weights": 0.1}},
    "smoothing": {"label_smoothing": 0.1},
    "projection": {"conditional": "projection"},
    "classifier": {"conditional": "classifier", "classifier_weight": 0.5},
    "diffaugment": {"augment": {"kind": "diffaugment"}},
    "diffaugment of convolutions": {"augment": {"kind": "diffaugment"}, "generator": DCGAN, "discriminator": DCGAN},
    "ada of fixed p": {"augment": {"kind": "ada", "p": 0.7}},
    "ada": {"augment": {"kind": "ada", "start": 0.5, "every": 2, "speed_images": 200}},
    "r1": {"regularisers": {"r1": {"weight": 5.0, "every": 2}}},
    "r2": {"regularisers": {"r2": {"weight": 5.0}}},
    "gradient_penalty": {"regularisers": {"gradient_penalty": {"weight": 1.0}}},
    "zero_centred": {"regularisers": {"zero_centred": {"weight": 5.0}}},
    "dragan": {"regularisers": {"dragan": {"weight": 1.0}}},
    "lecam": {"regularisers": {"lecam": {"weight": 1.0, "decay": 0.5}}},
    "consistency": {"regularisers": {"consistency": {"weight": 5.0}}},
    "balanced consistency": {
        "augment": {"kind": "diffaugment"}, "regularisers": {"consistency": {"weight": 5.0, "fakes": True}},
    },
    "path_length": {"regularisers": {"path_length": {"weight": 1.0, "every": 1, "decay": 0.5}}},
    "matched means": {
        "regularisers": {"feature_matching": {"weight": 5.0, "norm": "l1"}},
        "discriminator": {"network": {"kind": "mlp", "width": 64}},  # so many that the halves differ in a sign
    },
    "matched mean squares": {"regularisers": {"feature_matching": {"weight": 5.0}}},
    "augmented penalties": {
        "augment": {"kind": "ada", "start": 0.9}, "conditional": "projection",
        "regularisers": {"r1": {"weight": 0.5}, "r2": {"weight": 0.5}, "gradient_penalty": {"weight": 0.5}},
    },
    "spectral norm": {"discriminator": SPECTRAL},
    "historical averaging": {"generator": {"historical_averaging": 0.5}, "discriminator": {"historical_averaging": 0.5}},
    "clipped": {"discriminator": {"clip_norm": 0.1}},
    "uniform noise": {"noise_distribution": "uniform"},
    "shared noise": {"fresh_noise": False},
    "simultaneous": {"order": "simultaneous"},
    "more steps": {"discriminator_steps": 2, "generator_steps": 2},
}  # fmt: skip


def _play_cases(data: str) -> dict[str, dict[str, np.ndarray]]:
    found = {}
    for name, options in CASES.items():
        at = table(data, gan(**options))
        before = {f"start of {key}": value for key, value in tensors(at.players).items()}
        at.play(3)
        at.stream.close()
        found[name] = before | tensors(at.players)
    return found


@dataclass
class Played:
    """All cases on one process, and on the two ranks of a pair."""

    one: dict[str, dict[str, np.ndarray]]
    two: Sequence[dict[str, dict[str, np.ndarray]]]


@pytest.fixture(scope="module")
def played(fashion: Path) -> Played:
    pair: Any = on_ranks(2, _play_cases, str(fashion))
    return Played(_play_cases(str(fashion)), pair)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_with_half_the_rows_each_play_the_game_of_one_process(played: Played, case: str) -> None:
    one, (first, second) = played.one[case], (found[case] for found in played.two)
    assert one.keys() == first.keys() == second.keys()
    for name, value in one.items():
        assert np.array_equal(first[name], second[name]), name
        assert np.abs(value - first[name]).max() < 1e-5 * max(1, np.abs(value).max()), name
    memory = [name for name in one if "/memory/" in name and not name.startswith("start of ")]
    assert not memory or any(one[name] != one[f"start of {name}"] for name in memory)


@pytest.mark.parametrize("case", CASES)
def test_each_setting_moves_the_players_elsewhere(played: Played, case: str) -> None:
    """Otherwise one process and two would agree on nothing."""
    ours, plain = played.one[case], played.one["spectral norm" if case == "non_saturating" else "non_saturating"]
    for player in ("generator", "discriminator"):
        weights = [name for name in ours if name.startswith(f"{player}//")]
        assert max(np.abs(ours[name] - ours[f"start of {name}"]).max() for name in weights) > 1e-3
    assert any(
        name not in plain or plain[name].shape != value.shape or np.abs(plain[name] - value).max() > 1e-4
        for name, value in ours.items()
        if "//" in name
    )


MINIBATCH = {"network": {"kind": "mlp", "width": 8, "minibatch": {"kernels": 4, "dimensions": 2}}}


@pytest.mark.parametrize("discriminator", [{}, MINIBATCH], ids=["rows", "rows that see each other"])
def test_r1_and_r2_together_are_what_each_is_alone(fashion: Path, discriminator: dict[str, Any]) -> None:
    """Augmented and by class, so that rows, labels and what is seen of them must stay together."""
    shared = {"augment": {"kind": "diffaugment"}, "conditional": "projection", "discriminator": discriminator}

    def penalties_of(**regularisers: Any) -> dict[str, float]:
        at = table(fashion, gan(**shared, regularisers=regularisers))
        at.play(1)
        at.stream.close()
        return {name: value for name, value in at.meter.read().items() if name.startswith("penalty/")}

    r1, r2 = {"weight": 1.0}, {"weight": 2.0}
    alone = penalties_of(r1=r1) | penalties_of(r2=r2)
    assert penalties_of(r1=r1, r2=r2) == pytest.approx(alone, rel=1e-5)
    assert alone["penalty/r1"] != pytest.approx(alone["penalty/r2"], rel=1e-2)
    lazy = penalties_of(r1={"weight": 1.0, "every": 2}, r2=r2)
    assert lazy == pytest.approx(alone, rel=1e-5)  # both are due at step 0


def test_hidden_noise_is_drawn_by_seed_phase_draw_and_rank_as_manual_seed_draws_it() -> None:
    for seed in (0, 1, 2**63 - 1):
        reseed(seed, CPU)
        ours = torch.rand(8)
        torch.manual_seed(seed)
        assert torch.equal(ours, torch.rand(8))


# ---- stopping


def test_memory_and_history_are_part_of_the_resume(gandist: Callable, recipe: Callable, tmp_path: Path) -> None:
    network = "{kind: mlp, width: 8, spectral_norm: true}"
    options = [
        "game.augment={kind: ada, start: 0.5, every: 3, speed_images: 500}",
        "game.regularisers={lecam: {weight: 0.3, decay: 0.8}, path_length: {every: 3, decay: 0.8}, r1: {weight: 1, every: 4}}",
        "game.generator.historical_averaging=0.1",
        "game.discriminator.historical_averaging=0.1",
    ]
    paths = {name: recipe(name, generator="{kind: mlp, width: 8}", discriminator=network) for name in ("a", "b")}
    assert gandist("train", paths["a"], *options).code == 0
    assert gandist("train", paths["b"], *options, "run.images=80").code == 0
    again = gandist("train", paths["b"], *options)
    assert again.code == 0
    assert "going on at 80 images" in again.err
    found = [tensor_files(checkpoint.folders(tmp_path / name / "checkpoints")[0]) for name in ("a", "b")]
    kept = {"generator.memory", "discriminator.memory", "generator.history", "discriminator.history"}
    assert {f"{name}.safetensors" for name in kept} <= found[0].keys()
    assert found[0] == found[1]
    memory = checkpoint.find(tmp_path / "a").tensors("discriminator.memory")
    assert 0 < float(memory["lecam_mass"]) < 1  # after ten turns: 1 − 0.8¹⁰
    assert float(memory["lecam_mass"]) == pytest.approx(1 - 0.8**10, rel=1e-5)
    assert float(memory["ada_turns"]) == 1  # of three, after nine turns that were counted


# ---- the order of updates


def _moved(player: str, module: nn.Module, loss: Tensor) -> list[Tensor]:
    """The weights after one step of descent."""
    weights = [*module.parameters()]
    return [w.detach() - RATES[player] * g for w, g in zip(weights, torch.autograd.grad(loss, weights), strict=True)]


def _same(module: nn.Module, weights: list[Tensor], tolerance: float = 1e-6) -> bool:
    return all(torch.allclose(a, b, rtol=0, atol=tolerance) for a, b in zip(module.parameters(), weights, strict=True))


@pytest.mark.parametrize("order", ["simultaneous", "alternating"])
@pytest.mark.parametrize("fresh", [True, False])
def test_simultaneous_moves_both_by_gradients_of_the_old_weights(fashion: Path, order: str, fresh: bool) -> None:
    at = table(fashion, gan(order=order, fresh_noise=fresh))
    old_g, old_d = (copy.deepcopy(at.players[name].module).requires_grad_(True) for name in at.players)
    batch = at.draw(0)
    noise = batch.normal("noise/discriminator", NOISE)
    answers = batch.normal("noise/generator", NOISE) if fresh else noise
    fake = old_g(noise).detach()
    judged = F.softplus(-old_d(batch["image"]).logits).mean() + F.softplus(old_d(fake).logits).mean()
    new_d = _moved("discriminator", old_d, judged)
    later_d = copy.deepcopy(old_d)
    with torch.no_grad():
        for weight, value in zip(later_d.parameters(), new_d, strict=True):
            weight.copy_(value)
    to_old = _moved("generator", old_g, F.softplus(-old_d(old_g(answers)).logits).mean())
    to_new = _moved("generator", old_g, F.softplus(-later_d(old_g(answers)).logits).mean())
    at.play(1)
    at.stream.close()
    assert _same(at.players["discriminator"].module, new_d)
    assert _same(at.players["generator"].module, to_old if order == "simultaneous" else to_new)
    assert not _same(at.players["generator"].module, to_new if order == "simultaneous" else to_old, 1e-5)


@dataclass(frozen=True)
class Seen:
    """What a turn asked of the generator: whose turn, of which draw, from which noise, and what it made."""

    player: str
    draw: int
    noise: Tensor
    made: Tensor


def _watched(data: Path, game: Gan, steps: int) -> list[Seen]:
    at = table(data, game)
    turn: list[tuple[str, int]] = []
    seen: list[Seen] = []

    def watch(phase: Phase) -> Phase:
        def loss(players: Players, batch: Batch, clock: Clock, /) -> tuple[Tensor, dict[str, Tensor]]:
            turn.append((phase.player, batch.draw))
            return phase.loss(players, batch, clock)

        return replace(phase, loss=loss)

    def note(module: nn.Module, inputs: tuple[Tensor], made: Tensor) -> None:
        seen.append(Seen(*turn[-1], inputs[0].clone(), made.detach().clone()))

    at.players["generator"].module.register_forward_hook(note)
    at.play(steps, tuple(watch(phase) for phase in at.phases))
    at.stream.close()
    assert [(found.player, found.draw) for found in seen] == turn
    return seen


def test_every_repeat_of_a_turn_has_a_draw_and_noise_of_its_own(fashion: Path) -> None:
    game = gan(discriminator_steps=3, generator_steps=2)
    seen = _watched(fashion, game, 2)
    assert [found.player for found in seen] == 2 * (3 * ["discriminator"] + 2 * ["generator"])
    of_discriminator, of_generator = (
        [found.draw for found in seen if found.player == name] for name in ("discriminator", "generator")
    )
    assert len({*of_discriminator}) == 6
    assert len({*of_generator}) == 4
    assert sorted({*of_discriminator, *of_generator}) == list(range(8))  # nothing of the data is passed over
    assert draws(game.phases(Dataset(fashion).spec("train")), 1) == [of_discriminator[3:], of_generator[2:]]
    for place, found in enumerate(seen):
        assert not any(torch.equal(found.noise, other.noise) for other in seen[:place])


def test_without_fresh_noise_the_generator_answers_for_the_fakes_that_were_judged(fashion: Path) -> None:
    for order in ("simultaneous", "alternating"):
        judged, answered, *_ = _watched(fashion, gan(order=order, fresh_noise=False), 2)
        assert torch.equal(judged.noise, answered.noise)
        assert torch.equal(judged.made, answered.made)
    judged, answered, *_ = _watched(fashion, gan(), 1)
    assert judged.draw == answered.draw
    assert not torch.equal(judged.noise, answered.noise)


# ---- noise and samples


def test_uniform_noise_has_variance_1_within_the_square_root_of_3(fashion: Path) -> None:
    game = gan(noise_distribution="uniform")
    at = table(fashion, game)
    trained = torch.cat([game.fresh_latents(at.draw(number), "generator") for number in range(100)])
    at.stream.close()
    sampled = torch.cat([game.latents(block, 0, CPU) for block in range(25)])
    for noise in (trained, sampled):
        assert noise.abs().max() <= SPREAD == pytest.approx(3**0.5)
        assert noise.abs().max() > 0.99 * SPREAD
        assert noise.mean().abs() < 4 / noise.numel() ** 0.5
        assert noise.var().item() == pytest.approx(1, abs=4 * 0.8**0.5 / noise.numel() ** 0.5)  # E x⁴ = 9/5


@pytest.mark.parametrize("bound", [0.1, 0.7, 2.0, 9.0])
def test_truncation_bounds_the_noise_and_keeps_its_shape(bound: float) -> None:
    game = gan()
    noise = torch.cat([game.latents(block, 0, CPU, truncation=bound) for block in range(50)]).double()
    assert noise.abs().max() <= bound
    density = math.exp(-(bound**2) / 2) / math.sqrt(2 * math.pi)
    variance = 1 - 2 * bound * density / math.erf(bound / math.sqrt(2))  # of the normal distribution within ± bound
    assert noise.mean().abs() < 4 * (variance / noise.numel()) ** 0.5
    assert noise.var().item() == pytest.approx(variance, rel=0.03)


def test_samples_do_not_depend_on_who_makes_them_nor_on_how_many_are_made(fashion: Path) -> None:
    at = table(fashion, gan(conditional="projection"))
    at.stream.close()
    spec, game = at.stream.spec, at.game

    def made(count: int, **how: Any) -> dict[int, Tensor]:
        return dict(game.made(at.players, spec, count, 3, **how))

    whole = made(150)
    assert {first: len(rows) for first, rows in whole.items()} == {0: BLOCK, BLOCK: BLOCK, 2 * BLOCK: 150 - 2 * BLOCK}
    for every in (2, 3, 4):
        shares = [made(150, first=first, every=every) for first in range(every)]
        assert sum(len(share) for share in shares) == len(whole)
        for share in shares:
            assert all(torch.equal(rows, whole[first]) for first, rows in share.items())
    everything = torch.cat([*whole.values()])
    for count in (1, 63, 64, 65, 149):
        assert torch.equal(torch.cat([*made(count).values()]), everything[:count])
    turns, asked = torch.arange(150) % 10, torch.arange(150) % 7
    assert torch.equal(torch.cat([*made(150, labels=turns).values()]), everything)
    with at.players["generator"].evaluating() as module:
        second = module(game.latents(1, 3, CPU), asked[BLOCK : 2 * BLOCK])
    assert torch.equal(made(150, labels=asked)[BLOCK], second)
    assert not torch.equal(torch.cat([*game.samples(at.players, spec, 150, 4)]), everything)


# ---- weights that begin with the data

GREYS = np.tile(np.arange(80, dtype=np.uint8)[:, None, None] * 3, (1, 6, 6))
GREYS[:, 0] = 0  # a border that is always black
GREYS[:, 1, ::2] //= 4
MARGINAL = "{kind: mlp, width: 8, output: sigmoid, marginal_bias: true}"
TURNED = ["game.generator.historical_averaging=0.1", "game.generator.optimizer={kind: sgd, learning_rate: 1.0}"]


def _bias(module: nn.Module) -> Tensor:
    bias = [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1].bias
    return bias.detach().reshape(6, 6)


def _start(path: str) -> list[np.ndarray]:
    """The last bias of the generator, of its average and of its history as a run begins."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    overrides = [f"run.folder={Path(path).with_suffix('')}-{ranks}", *TURNED]
    with running(read_recipe(Path(path), overrides), World(CPU, rank, ranks, "fp32", "")) as run:
        player = run.players["generator"]
        assert player.ema is not None
        last = [name for name, _ in player.module.named_parameters()][-1]
        history = player.history[last].reshape(6, 6)
        return [found.numpy().copy() for found in (_bias(player.module), _bias(player.ema), history)]


@pytest.fixture
def marginal(recipe: Callable, tmp_path: Path) -> Callable[[str], Path]:
    """Writes a recipe of a generator that begins with the mean pixels of 80 greys."""
    np.savez(tmp_path / "greys.npz", images=GREYS)
    packed(tmp_path / "greys.npz", tmp_path / "greys")
    return lambda name: recipe(name, images=64, data=tmp_path / "greys", generator=MARGINAL)


def test_the_marginal_bias_is_the_logit_of_the_mean_pixels_on_one_and_on_two_ranks(marginal: Callable) -> None:
    path = str(marginal("run"))
    mean = (GREYS / 255.0).mean(0).clip(1e-7, 1 - 1e-7)
    expected = np.log(mean / (1 - mean))
    for biases in [_start(path), *on_ranks(2, _start, path)]:  # type: ignore[misc]
        for bias in biases:
            np.testing.assert_allclose(bias, expected, rtol=1e-5)


def test_a_resume_keeps_the_weights_that_began_with_the_data(
    gandist: Callable, marginal: Callable, tmp_path: Path
) -> None:
    assert gandist("train", marginal("a"), *TURNED).code == 0
    for images in (32, 64):
        assert gandist("train", marginal("b"), *TURNED, f"run.images={images}").code == 0
    found = [tensor_files(checkpoint.folders(tmp_path / name / "checkpoints")[0]) for name in ("a", "b")]
    assert found[0] == found[1]


# ---- contradictions


@pytest.fixture(scope="module")
def signals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty waves of two channels, without labels."""
    folder = tmp_path_factory.mktemp("signals")
    waves = np.sin(np.arange(40 * 2 * 32).reshape(40, 2, 32) / 7).astype("f4")
    np.save(folder / "waves.npy", waves)
    packed(folder / "waves.npy", folder / "waves")
    return folder / "waves"


WITHOUT_EFFECT = {
    "label_smoothing": (["label_smoothing=0.1", "loss=hinge"], "has no effect on the loss `hinge`"),
    "classifier_weight": (["classifier_weight=2.0", "conditional=projection"], "without `conditional: classifier`"),
    "loss": (["loss=wasserstein"], "needs a critic of bounded slope"),
    "order": (["order=simultaneous", "discriminator_steps=2"], "takes one step of each player"),
    "fresh_noise": (["fresh_noise=false", "generator_steps=2"], "false needs one step of each player"),
    "regularisers.r1.weight": (["regularisers={r1: {weight: 0}}"], "must be greater than 0"),
    "regularisers.r3": (["regularisers={r3: {weight: 1}}"], "unknown key; known: consistency"),
    "augment": (["augment={kind: mixup}"], "'mixup' is not an augmentation"),
    "regularisers.r1": (
        ["regularisers={r1: {weight: 1}}", "discriminator.network={kind: mlp, minibatch: {}}"],
        "rows see each other (`minibatch`)",
    ),
    "regularisers.gradient_penalty": (
        ["regularisers={gradient_penalty: {weight: 1}}", "discriminator.network={kind: dcgan}"],
        "(`norm: batch`); use `norm: none`",
    ),
    "regularisers.path_length": (
        ["regularisers={path_length: {}}", "generator.network={kind: resnet, width: 4}"],
        "the generator's see each other (`kind: resnet`)",
    ),
    "scores.distribution.inception_splits": (
        ["scores={features: {kind: pixels}, distribution: {inception_splits: 4}}"],
        "come from no classifier",
    ),
    "generator.network.class_embedding": (
        ["generator.network={kind: resnet, width: 4, class_embedding: 8}"],
        "has no effect without `conditional`",
    ),
    "generator.clip_weights": (
        ["generator.clip_weights=0.1", "generator.network={kind: resnet, width: 4, spectral_norm: true}"],
        "no effect under `spectral_norm`",
    ),
    "discriminator.optimizer": (
        ["discriminator.optimizer={kind: sgd, final_momentum: 0.5, momentum_images: 9}"],
        "no effect where it is `momentum`",
    ),
    "generator.schedule": (
        ["generator.schedule={kind: linear, until_images: 9, final: 1.0}"],
        "a `final` of 1 has no effect",
    ),
    "generator.optimizer": (["generator.optimizer={kind: sgd, final_momentum: 0.7}"], "come together"),
    "discriminator.schedule": (["discriminator.schedule={kind: exponential}"], "come together"),
}


@pytest.mark.parametrize("key", WITHOUT_EFFECT)
def test_settings_without_an_effect_are_refused_by_name(gandist: Callable, recipe: Callable, key: str) -> None:
    overrides, message = WITHOUT_EFFECT[key]
    result = gandist("describe", recipe(), *(f"game.{override}" for override in overrides))
    assert result.code == 2
    assert f"`game.{key}`: " in result.err
    assert message in result.err
    assert "1 fault\n" in result.err


@pytest.mark.parametrize("key", ["range=[0, 1]", "mean=[0.5]"])
def test_real_images_must_lie_where_made_ones_do(gandist: Callable, recipe: Callable, key: str) -> None:
    more = ["data.transform.std=[0.5]"] if key.startswith("mean") else []
    result = gandist("describe", recipe(), f"data.transform.{key}", *more)
    assert result.code == 2
    assert f"`data.transform.{key.split('=')[0]}`: the game gan makes and scores images in −1 … 1" in result.err


@pytest.mark.parametrize("loss", [name for name, loss in ADVERSARIAL.items() if loss.smooths])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_where_both_are_equally_likely_the_loss_is_at_rest_on_the_border_of_accuracy(
    loss: str, smoothing: float
) -> None:
    border = ADVERSARIAL[loss].border
    assert border is not None
    logit = torch.tensor([border(smoothing)], dtype=torch.float64, requires_grad=True)
    torch.stack([*ADVERSARIAL[loss].discriminator(logit, logit, smoothing).values()]).sum().backward()
    assert logit.grad is not None
    assert abs(logit.grad.item()) < 1e-12


@pytest.mark.parametrize(
    "bound",
    [
        "game.regularisers={gradient_penalty: {weight: 10}}",
        "game.discriminator.clip_weights=0.01",
        "game.discriminator.network.spectral_norm=true",
    ],
)
def test_a_wasserstein_critic_of_bounded_slope_is_accepted(gandist: Callable, recipe: Callable, bound: str) -> None:
    assert gandist("describe", recipe(), "game.loss=wasserstein", bound).code == 0


def test_settings_for_images_are_refused_for_signals(gandist: Callable, recipe: Callable, signals: Path) -> None:
    path = recipe(data=signals)
    assert gandist("describe", path, "run.batch=8").code == 0
    faults = {
        "augment": "{kind: diffaugment}",
        "regularisers.consistency": "{weight: 1}",
        "generator.network.kind": "dcgan",
        "discriminator.network.kind": "dcgan",
        "kind": "",
    }
    for key, value in faults.items():
        override = f"game.{key}={value}" if value else "game.conditional=projection"  # the waves have no labels
        result = gandist("describe", path, override)
        assert result.code == 2
        assert f"`game.{key}`: " in result.err
        assert ("signals" in result.err and "images" in result.err) or "reads `label`" in result.err


def test_a_game_of_signals_is_played(gandist: Callable, recipe: Callable, signals: Path) -> None:
    options = ["game.regularisers={r1: {weight: 1}, path_length: {every: 1}, dragan: {weight: 1}, lecam: {weight: 1}}"]
    result = gandist("train", recipe(data=signals, images=32), *options)
    assert result.code == 0, result.err
