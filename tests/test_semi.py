"""The semi game: its laws, on one process or two, and what its recipes refuse."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ENVIRONMENT, ROOT, Table, on_ranks, open_stream, packed, run, tensors
from PIL import Image
from torch import Tensor, nn

from gandist import checkpoint
from gandist.check import read_recipe
from gandist.data.dataset import Dataset
from gandist.data.leaks import refuse_leaks
from gandist.data.opening import open_reader
from gandist.data.pack import shares
from gandist.game import Clock, draws_each_step
from gandist.games.classification import scores
from gandist.games.semi import Semi, VirtualAdversarial, judge, virtual_adversarial
from gandist.launcher import World
from gandist.log import Meter
from gandist.losses import (
    conditional_entropy,
    divergence,
    evidence,
    pseudo_labels,
    pull_away,
)
from gandist.networks import Classifies, salimans
from gandist.networks.heads import MinibatchDiscrimination, MinibatchOptions
from gandist.networks.starting import Normed, start_by
from gandist.networks.virtual import VirtualBatchNorm, WithReference
from gandist.player import EmaOptions, Player, PlayerOptions
from gandist.recipe import DataOptions, InputError, Recipe, RunOptions, SubsetOptions
from gandist.run import make_players, running

CPU = torch.device("cpu")
BATCH, NOISE = 16, 8


@pytest.fixture(scope="session")
def garments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded garments in two splits; not to be written to."""
    folder = tmp_path_factory.mktemp("garments") / "data"
    packed("embedded:fashion-mnist", folder, splits=shares(["train=8000,test=2000"]))
    return folder


@pytest.fixture
def logits() -> Tensor:
    return 3 * torch.randn(64, 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


# ---- K + 1 classes


def test_a_fake_logit_of_zero_is_a_softmax_over_k_plus_1(logits: Tensor) -> None:
    explicit = torch.cat([logits, torch.zeros(64, 1, dtype=torch.float64)], 1).softmax(1)
    real = evidence(logits, 10).sigmoid()
    torch.testing.assert_close(real, 1 - explicit[:, 10])
    z = logits.exp().sum(1)
    torch.testing.assert_close(real, z / (z + 1))
    torch.testing.assert_close(evidence(torch.cat([logits, torch.zeros(64, 1).double()], 1), 10), evidence(logits, 10))


def test_moving_all_k_plus_1_logits_together_moves_nothing(logits: Tensor) -> None:
    both = torch.cat([logits, logits[:, :1]], 1)
    torch.testing.assert_close(evidence(both + 7, 10), evidence(both, 10))


def test_evidence_is_finite_where_exponentials_are_not() -> None:
    found = evidence(torch.tensor([[1e4, 0.0], [-1e4, -1e4]]), 2)
    torch.testing.assert_close(found, torch.tensor([1e4, -1e4 + float(np.log(2))]))
    assert torch.isfinite(F.softplus(found)).all()


@pytest.mark.parametrize("fake_class", ["zero", "learned"])
def test_the_discriminators_loss_is_its_three_terms_by_hand(garments: Path, fake_class: str) -> None:
    """Of the probabilities themselves: −log p(y | x, y ≤ K), or p(y | x) over K + 1; and half of −log D(x) − log(1 − D(G(z)))."""
    at = table(garments, semi(fake_class=fake_class))
    batch = at.draw(0)
    at.players["discriminator"].module.eval()
    _, values = at.game.discriminator_loss(at.players, batch, at.clock)
    noise = (2 * batch.uniform("noise/discriminator", NOISE) - 1) * 3**0.5
    with torch.no_grad():
        fake = at.players["generator"](noise)
        inner = at.players["discriminator"].module
        found = [inner.outputs(inner.trunk(part)) for part in (batch["image"], batch["unlabelled"], fake)]
    if fake_class == "zero":
        found = [torch.cat([part, torch.zeros(len(part), 1)], 1) for part in found]
    labelled, unlabelled, made = (part.double().softmax(1) for part in found)
    right = labelled.gather(1, batch["label"][:, None])[:, 0]
    if fake_class == "zero":
        right = right / labelled[:, :10].sum(1)
    expected = {
        "supervised": -right.log().mean(),
        "unlabelled": -0.5 * unlabelled[:, :10].sum(1).log().mean(),
        "fake": -0.5 * made[:, 10].log().mean(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(values[f"loss/discriminator/{name}"].double(), value, rtol=1e-4, atol=1e-6)


def test_smoothing_is_one_sided(garments: Path) -> None:
    """The target of unlabelled rows is 0.9, that of fakes stays 0."""
    plain, smooth = (table(garments, semi(label_smoothing=s)) for s in (0.0, 0.1))
    values = []
    for at in (plain, smooth):
        at.players["discriminator"].module.eval()
        values.append(at.game.discriminator_loss(at.players, at.draw(0), at.clock)[1])
    assert values[0]["loss/discriminator/fake"] == values[1]["loss/discriminator/fake"]
    expected = values[0]["loss/discriminator/unlabelled"] + 0.5 * 0.1 * values[0]["logits/real"]
    torch.testing.assert_close(values[1]["loss/discriminator/unlabelled"], expected)


def test_terms_of_certainty_have_their_extremes(logits: Tensor) -> None:
    even, sure = torch.zeros(4, 10), 100 * torch.eye(10)
    torch.testing.assert_close(conditional_entropy(even), torch.tensor(10.0).log())
    torch.testing.assert_close(conditional_entropy(sure), torch.tensor(0.0))
    assert pseudo_labels(even, 0.5) == 0
    kept = torch.cat([even, sure[:4]])
    torch.testing.assert_close(pseudo_labels(2 * kept, 0.9), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert divergence(logits, logits).abs() < 1e-12
    assert divergence(logits, logits.roll(1, 0)) > 0
    torch.testing.assert_close(divergence(logits, logits + 5), torch.tensor(0.0, dtype=torch.float64))


def test_features_pull_away_by_the_mean_squared_cosine_of_their_pairs() -> None:
    features = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = 0.0
    for i in range(6):
        for j in range(6):
            if i != j:
                total += float(F.cosine_similarity(features[i], features[j], dim=0)) ** 2
    assert pull_away(features) == pytest.approx(total / 30)
    torch.testing.assert_close(pull_away(torch.eye(4)), torch.tensor(0.0))


def test_the_virtual_adversary_finds_a_worse_direction_than_chance(garments: Path) -> None:
    at = table(garments, semi())
    player, rows = at.players["discriminator"], at.draw(0)["unlabelled"]
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    options = VirtualAdversarial(radius=2.0)
    with torch.enable_grad():
        found = virtual_adversarial(player, rows, noise, options)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    clean = player.precise(rows).classes
    by_chance = []
    for number in range(5):
        direction = torch.randn(rows.shape, generator=torch.Generator().manual_seed(number))
        direction = 2.0 * F.normalize(direction.flatten(1), dim=1).view_as(rows)
        torch.set_rng_state(state)
        by_chance.append(float(divergence(clean, player.precise(rows + direction).classes)))
    assert float(found) > max(by_chance) > 0


# ---- layers that start by data


@pytest.mark.parametrize("starts_at", [1.0, 0.1])
def test_a_normed_layer_starts_with_mean_0_and_the_deviation_asked_for(starts_at: float) -> None:
    torch.manual_seed(0)
    layers: list[tuple[nn.Module, Tensor]] = [
        (nn.Linear(12, 7, bias=False), 5 * torch.randn(500, 12) + 3),
        (nn.Conv2d(3, 7, 3, bias=False), 5 * torch.randn(64, 3, 8, 8) + 3),
        (nn.ConvTranspose2d(3, 7, 5, 2, 2, output_padding=1, bias=False), 5 * torch.randn(64, 3, 4, 4) + 3),
    ]
    for layer, inputs in layers:
        normed = Normed(layer, deviation=0.05, learns_gain=False, starts_at=starts_at)
        start_by(normed, inputs)
        rows = normed(inputs).movedim(1, -1).flatten(0, -2)
        torch.testing.assert_close(rows.mean(0), torch.zeros(7), atol=1e-4, rtol=0)
        torch.testing.assert_close(rows.std(0, correction=0), torch.full((7,), starts_at), rtol=1e-4, atol=0)
        lengths = (
            torch._weight_norm(layer.weight, normed.gain, normed.axis).movedim(normed.axis, 0).flatten(1).norm(dim=1)
        )
        torch.testing.assert_close(lengths, normed.gain.flatten())  # W = g θ / ‖θ‖


def test_every_layer_of_the_papers_discriminator_starts_by_the_layers_before_it() -> None:
    """Without noise, on the batch that set it, each layer and the logits have mean 0 and deviation 1; hidden gains do not learn."""
    torch.manual_seed(0)
    options = salimans.MlpDiscriminator(kind="salimans_mlp", widths=(40, 30, 20), input_noise=0.0, hidden_noise=0.0)
    network = options.build_classifier((1, 8, 8), 10, Classifies())
    samples = 2 * torch.rand(500, 1, 8, 8) - 1
    options.start(network, samples)
    seen: list[Tensor] = []
    normed = [layer for layer in network.modules() if isinstance(layer, Normed)]
    hooks = [layer.register_forward_hook(lambda _, __, out: seen.append(out.clone())) for layer in normed]
    with torch.no_grad():
        network(samples)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 4
    for outputs in seen:
        torch.testing.assert_close(outputs.mean(0), torch.zeros(outputs.shape[1]), atol=1e-3, rtol=0)
        torch.testing.assert_close(outputs.std(0, correction=0), torch.ones(outputs.shape[1]), atol=1e-3, rtol=0)
    assert [name for name, _ in network.named_parameters() if name.endswith("gain")] == ["outputs.0.gain"]


def test_the_papers_networks_have_the_papers_layers() -> None:
    """Parameters by hand: MNIST's 784-1000-500-250-250-250-10 and 100-500-500-784; CIFAR-10's nine convolutions."""

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    judge = salimans.MlpDiscriminator(kind="salimans_mlp").build_classifier((1, 28, 28), 10, Classifies())
    widths = [784, 1000, 500, 250, 250, 250, 10]
    assert count(judge) == sum(a * b + b for a, b in pairwise(widths)) + 10  # the last gains learn
    make = salimans.MlpGenerator(kind="salimans_mlp").build(100, (1, 28, 28))
    assert count(make) == 100 * 500 + 500 + 500 * 500 + 500 + 500 * 784 + 2 * 784
    conv = salimans.ConvDiscriminator(kind="salimans_conv").build_classifier((3, 32, 32), 10, Classifies())
    kernels = [(3, 96, 9), (96, 96, 9), (96, 96, 9), (96, 192, 9), (192, 192, 9), (192, 192, 9), (192, 192, 9), (192, 192, 1), (192, 192, 1)]  # fmt: skip
    assert count(conv) == sum(a * b * k + b for a, b, k in kernels) + 192 * 10 + 10 + 10
    assert conv(torch.zeros(2, 3, 32, 32)).features.shape == (2, 192)
    up = salimans.ConvGenerator(kind="salimans_conv").build(100, (3, 32, 32))
    assert count(up) == 100 * 8192 + 8192 + 512 * 256 * 25 + 256 + 256 * 128 * 25 + 128 + 128 * 3 * 25 + 6
    assert up(torch.zeros(2, 100)).shape == (2, 3, 32, 32)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 20, 36)])
def test_the_conv_generator_starts_with_a_deviation_of_a_tenth_before_its_tanh(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    options = salimans.ConvGenerator(kind="salimans_conv", width=32)
    network = options.build(20, shape)
    kept = {name: buffer.clone() for name, buffer in network.named_buffers()}
    noise = (2 * torch.rand(500, 20) - 1) * 3**0.5
    options.start(network, torch.empty(0), (noise,))
    made = network(noise)
    assert made.shape == (500, *shape)
    assert float(made.detach().atanh().std()) == pytest.approx(0.1, rel=0.1)
    for name, buffer in options.build(20, shape).named_buffers():
        assert torch.equal(kept[name], buffer)  # running statistics wait for training


def test_frozen_gains_stand_still_and_reach_the_average(garments: Path) -> None:
    at = table(garments, semi())
    gain = at.players["discriminator"].module.get_buffer("trunk.1.0.gain")
    assert not any(
        gain is buffer for buffer in at.players["discriminator"]._buffers
    )  # whose mean over 7 ranks may differ
    before = gain.clone()
    at.play(3)
    assert torch.equal(gain, before)
    ema = at.players["discriminator"].ema
    assert ema is not None
    assert torch.equal(ema.get_buffer("trunk.1.0.gain"), before)


def test_virtual_batch_norm_is_the_plain_loop() -> None:
    """Each row with weight 1 / (N + 1) beside the reference, and the reference by itself; rows do not see each other."""
    torch.manual_seed(0)
    layer = VirtualBatchNorm(3)
    nn.init.normal_(layer.shift)
    reference, rows = torch.randn(5, 3, 4, 4), 2 * torch.randn(7, 3, 4, 4) + 1
    whole = WithReference(layer, reference)
    found = whole(rows)
    n = len(reference)
    mean_ref = reference.mean((0, 2, 3))
    square_ref = reference.square().mean((0, 2, 3))
    for row, normed in zip(rows, found, strict=True):
        mean = (row.mean((1, 2)) + n * mean_ref) / (n + 1)
        square = (row.square().mean((1, 2)) + n * square_ref) / (n + 1)
        deviation = torch.sqrt(1e-5 + square - mean.square())
        expected = (row - mean[:, None, None]) / deviation[:, None, None] * layer.gain[:, None, None] + layer.shift[:, None, None]  # fmt: skip
        torch.testing.assert_close(normed, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole(rows[2:3])[0], found[2])
    itself = layer(torch.cat([reference, rows]))[:n]
    centred = (reference - mean_ref[:, None, None]) / torch.sqrt(1e-5 + square_ref - mean_ref.square())[:, None, None]
    torch.testing.assert_close(itself, centred * layer.gain[:, None, None] + layer.shift[:, None, None], rtol=1e-4, atol=1e-5)  # fmt: skip


def test_minibatch_discrimination_starts_by_the_distances_of_its_first_batch() -> None:
    """Half the mean distance of nearest rows is 1 in each kernel, and what is added to the features has mean 0."""
    torch.manual_seed(0)
    layer = MinibatchDiscrimination(6, MinibatchOptions(kernels=4, dimensions=3))
    features = 10 * torch.randn(40, 6)
    start_by(layer, features)
    with torch.no_grad():
        found = layer(features)[:, 6:]
        matrices = layer._matrices(features)
    torch.testing.assert_close(found.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    for kernel in range(4):
        nearest = []
        for i in range(40):
            away = [float((matrices[i, kernel] - matrices[j, kernel]).abs().sum()) for j in range(40) if j != i]
            nearest.append(min(away))
        assert 0.5 * np.mean(nearest) == pytest.approx(1.0, rel=1e-4)


# ---- the players


def test_eps_inside_the_root_is_adam_by_hand() -> None:
    """v̂ / √(m̂ + ε) with bias correction, for ten steps; a step with a gradient that is not finite leaves no trace."""
    from gandist.optimizers import AdamOptions

    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(50))
    options = AdamOptions(learning_rate=0.01, beta1=0.5, beta2=0.9, eps=1e-4, eps_inside_root=True)
    optimizer = options.build([weight])
    expected = weight.detach().double().clone()
    first, second = torch.zeros(50).double(), torch.zeros(50).double()
    for number in range(1, 11):
        gradient = torch.randn(50) * 0.02
        weight.grad = gradient.clone()
        optimizer.found_inf = torch.tensor(0.0)
        optimizer.step()
        first = 0.5 * first + 0.5 * gradient.double()
        second = 0.9 * second + 0.1 * gradient.double() ** 2
        expected -= 0.01 * (first / (1 - 0.5**number)) / (second / (1 - 0.9**number) + 1e-4).sqrt()
        torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-6)
    before = {name: value.clone() for name, value in optimizer.state[weight].items()}
    weight.grad = torch.full((50,), float("nan"))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    for name, value in before.items():
        assert torch.equal(optimizer.state[weight][name], value), name


def test_an_average_from_zero_is_the_released_codes() -> None:
    """a ← a + 1e-4 (p − a) from 0, without correction: after t steps of constant weights (1 − (1 − 1e-4)^t) p."""
    rate, batch = 1e-4, 100
    half_life = round(batch * np.log(2) / -np.log1p(-rate))
    options = PlayerOptions(ema=EmaOptions(half_life_images=half_life, ramp_up=None, from_zero=True))
    player = Player("discriminator", nn.Linear(3, 2), options, device=CPU)
    assert player.ema is not None
    assert all(not p.any() for p in player.ema.parameters())
    for number in range(1, 21):
        player.schedule((number - 1) * batch, batch)
        player._average()
    for average, weight in zip(player.ema.parameters(), player.module.parameters(), strict=True):
        torch.testing.assert_close(
            average.double(), (1 - (1 - rate) ** 20) * weight.detach().double(), rtol=1e-4, atol=0
        )
    player.restart_average()
    assert all(not p.any() for p in player.ema.parameters())
    with pytest.raises(ValueError, match="ramp_up: null"):
        EmaOptions(from_zero=True)


# ---- a small game on real garments


def semi(
    generator: dict[str, Any] | None = None,
    discriminator: dict[str, Any] | None = None,
    **options: Any,
) -> Semi:
    """Without hidden noise, whose draws depend on the rank."""
    network = {"kind": "salimans_mlp", "widths": [16, 12], "input_noise": 0.0, "hidden_noise": 0.0}
    sides = {
        "generator": {"network": {"kind": "salimans_mlp", "width": 12}, "optimizer": {"kind": "sgd", "learning_rate": 0.1}, **(generator or {})},
        "discriminator": {"network": network, "optimizer": {"kind": "sgd", "learning_rate": 0.1}, **(discriminator or {})},
    }  # fmt: skip
    return Semi.model_validate({"kind": "semi", "noise": NOISE, **options, **sides})


def table(data: object, game: Semi, start: bool = True) -> Table:
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    options = DataOptions(path=str(data), workers=0, subset=SubsetOptions(per_class=2, seed=0))
    recipe = Recipe.model_construct(data=options, game=game, run=RunOptions(folder="none", images=10**6, batch=BATCH))
    stream = open_stream(
        data, parts=("unlabelled", "unlabelled_again", "image", "label"), batch=BATCH, rank=rank, ranks=ranks,
        recall=draws_each_step(game.phases(Dataset(data).spec("train"))), workers=0, subset=options.subset,
    )  # fmt: skip
    players = make_players(recipe, stream.spec, CPU, "fp32")
    if start and game.start_samples:
        everything = open_stream(data, parts=("unlabelled",), batch=200, workers=0)
        torch.manual_seed(1)
        game.start(players, stream.spec, everything.read(0)[0]["unlabelled"])
        for player in players.values():
            player.restart_average()
    return Table(recipe, World(CPU, rank, ranks, "fp32", ""), players, stream, Clock(BATCH, 10**6), Meter())


def _played(data: str, options: dict[str, Any], steps: int) -> dict[str, np.ndarray]:
    at = table(data, semi(**options))
    at.play(steps)
    return tensors(at.players)


WIDE = {"network": {"kind": "salimans_mlp", "widths": [16, 12], "input_noise": 0.0, "hidden_noise": 0.0, "minibatch": {"kernels": 4, "dimensions": 3}}}  # fmt: skip
CONV = {
    "generator": {"network": {"kind": "salimans_conv", "width": 8}},
    "discriminator": {"network": {"kind": "salimans_conv", "width": 4, "input_dropout": 0.0, "hidden_dropout": 0.0}},
}
VIRTUAL = {"kind": "salimans_conv", "width": 8, "norm": "virtual", "reference": 6}
CASES: dict[str, dict[str, Any]] = {
    "feature matching, l2": {},
    "feature matching, l1, of an earlier layer": {"feature_matching": {"norm": "l1", "layer": 1}},
    "minibatch discrimination": {"discriminator": WIDE, "feature_matching": None, "adversarial": "minimax"},
    "three generator steps": {"generator_steps": 3, "adversarial": "non_saturating"},
    "a learned fake class": {"fake_class": "learned", "label_smoothing": 0.1},
    "classes asked of the generator": {"conditional": True},
    "sure of each row": {"conditional_entropy": 0.1, "pseudo_labels": {"threshold": 0.2}},
    "convolutions": CONV,
    "virtual batch norm": {**CONV, "generator": {"network": VIRTUAL}},
    "convolutions asked for classes": {**CONV, "conditional": True},
    "virtual batch norm asked for classes": {**CONV, "generator": {"network": VIRTUAL}, "conditional": True},
    "virtual adversarial training": {"virtual_adversarial": {"radius": 1.0}},
    "historical averaging": {
        "generator": {"historical_averaging": 1.0},
        "discriminator": {"historical_averaging": 1.0},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_one_and_two_processes_play_the_same_game(garments: Path, case: str) -> None:
    """Batch norm, batch means of features and minibatch discrimination are of the whole batch, whoever holds its rows."""
    rate = 1e-3 if "conv" in json.dumps(CASES[case]) else 5e-3  # what rounding adds would grow with the steps
    options = {name: value for name, value in CASES[case].items() if name not in ("generator", "discriminator")}
    for name in ("generator", "discriminator"):
        options[name] = {"optimizer": {"kind": "sgd", "learning_rate": rate}, **CASES[case].get(name, {})}
    (one,) = on_ranks(1, _played, str(garments), options, 3)
    for other in on_ranks(2, _played, str(garments), options, 3):
        assert one.keys() == other.keys()
        for name, values in one.items():
            np.testing.assert_allclose(other[name], values, rtol=1e-3, atol=1e-5, err_msg=name)


def _of_two(data: str) -> tuple[float, list[list[float]]]:
    """The loss of feature matching on these rows, and the gradient of the generator, as DDP means it."""
    at = table(data, semi())
    with at.players["generator"].turn(0, BATCH, hold=True) as turn:
        loss, _ = at.game.generator_loss(at.players, at.draw(0), at.clock)
        turn.backward(loss)
    at.players["generator"].wait()
    return float(loss), [p.grad.flatten().tolist() for p in at.players["generator"].parameters if p.grad is not None]


def test_the_gradient_of_feature_matching_is_that_of_the_whole_batch(garments: Path) -> None:
    (one,) = on_ranks(1, _of_two, str(garments))
    for loss, gradients in on_ranks(2, _of_two, str(garments)):
        assert loss == pytest.approx(one[0], rel=1e-5)
        for mine, whole in zip(gradients, one[1], strict=True):
            np.testing.assert_allclose(mine, whole, rtol=1e-3, atol=1e-6)


def test_both_players_move_and_neither_moves_in_the_others_turn(garments: Path) -> None:
    at = table(garments, semi())
    for phase, mover in zip(at.phases, ("discriminator", "generator"), strict=True):
        before = tensors(at.players)
        with at.players[phase.player].turn(0, BATCH) as turn:
            loss, _ = phase.loss(at.players, at.draw(0), at.clock)
            turn.backward(loss)
        changed = {name.partition("/")[0] for name, value in tensors(at.players).items() if not np.array_equal(value, before[name])}  # fmt: skip
        assert changed == {mover}


def test_one_forward_of_three_batches_is_three_forwards(garments: Path) -> None:
    at = table(garments, semi())
    batch = at.draw(0)
    together = judge(at.players["discriminator"], batch["image"], batch["unlabelled"])
    for verdict, part in zip(together, ("image", "unlabelled"), strict=True):
        alone = at.players["discriminator"](batch[part])
        for one, other in zip(verdict, alone, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_features_match_at_the_layer_and_in_the_norm_asked_for(garments: Path, norm: str) -> None:
    for layer, width in ((0, 12), (1, 16)):
        at = table(garments, semi(feature_matching={"layer": layer, "norm": norm, "weight": 2.0}))
        batch = at.draw(0)
        noise = (2 * batch.uniform("noise/generator", NOISE) - 1) * 3**0.5
        trunk = at.players["discriminator"].module.trunk
        real, fake = (
            trunk[: len(trunk) - layer](part) for part in (batch["unlabelled_again"], at.players["generator"](noise))
        )
        assert real.shape == (BATCH, width)
        difference = real.mean(0) - fake.mean(0)
        expected = 2.0 * (difference.abs().mean() if norm == "l1" else difference.square().mean())
        _, values = at.game.generator_loss(at.players, batch, at.clock)
        torch.testing.assert_close(values["loss/generator/feature_matching"], expected)


def test_labels_cycle_and_the_unlabelled_come_in_two_orders(garments: Path) -> None:
    """20 labelled garments each come once in 20 rows; both orders have each of the 8,000 once an epoch, and differ."""
    at = table(garments, semi())
    numbers = [number for draw in range(5) for number in at.draw(draw).numbers["image"]]
    for first in range(0, 80, 20):
        assert sorted(numbers[first : first + 20]) == sorted(at.stream.subset.tolist())  # type: ignore[union-attr]
    orders = [
        [n for draw in range(3) for n in at.draw(draw).numbers[part]] for part in ("unlabelled", "unlabelled_again")
    ]
    assert orders[0] != orders[1]
    assert len(set(orders[0])) == len(set(orders[1])) == 3 * BATCH


# ---- as a user has it

RECIPE = """\
data: {{path: {data}, workers: 0, subset: {{per_class: 4, seed: 0}}}}
game:
  kind: semi
  noise: 8
  generator: {{network: {{kind: salimans_mlp, width: 16}}}}
  discriminator: {{network: {{kind: salimans_mlp, widths: [32, 16]}}}}
run: {{folder: {folder}, images: {images}, batch: 32, log_every: 4, precision: fp32}}
"""


@pytest.fixture
def semi_recipe(garments: Path, tmp_path: Path) -> Callable[..., Path]:
    def write(name: str = "run", images: int = 640, data: object = None) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(RECIPE.format(data=data or garments, folder=tmp_path / name, images=images))
        return path

    return write


def test_a_run_is_trained_scored_and_resumed_to_the_same_bytes(
    semi_recipe: Callable[..., Path], gandist: Callable, tmp_path: Path
) -> None:
    whole, parts = semi_recipe("whole"), semi_recipe("parts")
    assert gandist("train", whole).code == 0
    assert gandist("train", parts, "run.images=320").code == 0
    assert gandist("train", parts).code == 0
    one, other = (checkpoint.find(tmp_path / name) for name in ("whole", "parts"))
    for name in ("generator", "discriminator", "discriminator.ema", "discriminator.optimizer"):
        for key, value in one.tensors(name).items():
            assert torch.equal(value, other.tensors(name)[key]), (name, key)
    found = json.loads(gandist("evaluate", tmp_path / "whole", "--json").out)
    assert found["samples"] == 2000
    assert found["errors"] == round(2000 * found["error_rate"])
    assert found["protocol"]["split"] == "test"
    two = run("evaluate", tmp_path / "parts", "--json", ranks=2)
    assert json.loads(two.out.strip().splitlines()[-1])["errors"] == found["errors"]
    subset = json.loads((tmp_path / "whole" / "subset.json").read_text())
    assert len(subset["samples"]) == 40
    assert gandist("sample", tmp_path / "whole", "--count", 8).code == 0


def test_unlabelled_images_of_another_dataset_teach_and_are_not_needed_afterwards(
    semi_recipe: Callable[..., Path], garments: Path, gandist: Callable, tmp_path: Path
) -> None:
    other, third = tmp_path / "other", tmp_path / "third"
    packed("embedded:fashion-mnist", other, splits=(("train", 0.05), ("left", 0.95)))
    packed("embedded:fashion-mnist", third, splits=(("train", 0.1), ("left", 0.9)))
    given = f"data.unlabelled_path={other}"
    for name, counts in (("whole", (640,)), ("parts", (320, 640))):
        for images in counts:
            done = gandist("train", semi_recipe(name), given, f"run.images={images}")
            assert done.code == 0, done.err
    assert gandist("train", semi_recipe("alone")).code == 0
    one, same, alone = (
        checkpoint.find(tmp_path / name).tensors("discriminator") for name in ("whole", "parts", "alone")
    )
    assert all(torch.equal(value, same[key]) for key, value in one.items())
    assert not all(torch.equal(value, alone[key]) for key, value in one.items())
    assert "500 unlabelled samples" in gandist("describe", semi_recipe(), given).out
    for change in ([], [f"data.unlabelled_path={third}"]):
        refused = gandist("train", semi_recipe("whole"), *change, "run.images=960")
        assert refused.code == 2
        assert "`data.unlabelled_path`" in refused.err
    shutil.move(other, tmp_path / "elsewhere")
    moved = gandist("train", semi_recipe("whole"), f"data.unlabelled_path={tmp_path / 'elsewhere'}", "run.images=672")
    assert moved.code == 0, moved.err
    shutil.rmtree(tmp_path / "elsewhere")
    assert gandist("evaluate", tmp_path / "whole").code == 0
    assert gandist("predict", tmp_path / "whole", garments, "--split", "test", "--out", tmp_path / "answers").code == 0
    assert gandist("sample", tmp_path / "whole", "--count", 8, "--neighbours", 2).code == 0


def test_a_row_of_each_of_two_processes_is_a_batch(semi_recipe: Callable[..., Path], gandist: Callable) -> None:
    assert run("train", semi_recipe(), "run.batch=2", "run.images=4", ranks=2).code == 0
    refused = gandist("train", semi_recipe("alone"), "run.batch=1", "run.images=2")
    assert refused.code == 2
    assert "1 leaves one image to a batch norm of the generator" in refused.err


def test_weights_start_by_500_unlabelled_images_whatever_the_labels(semi_recipe: Callable[..., Path]) -> None:
    recipe = read_recipe(semi_recipe(), [])
    with running(recipe, World(CPU, 0, 1, "fp32", "")) as started:
        assert len(started._some_samples(started.game.start_samples)) == 500


@pytest.mark.parametrize("norm", ["batch", "virtual"])
def test_convolutions_start_and_train_on_two_processes(semi_recipe: Callable[..., Path], norm: str, tmp_path: Path) -> None:  # fmt: skip
    """Weights start on one process alone, while the other waits for them: nothing there may wait for the other."""
    options = [f"game.generator.network={{kind: salimans_conv, width: 8, norm: {norm}}}", "run.images=64"]
    options += ["game.discriminator.network={kind: salimans_conv, width: 4, minibatch: {kernels: 2}}"]
    done = run("train", semi_recipe(), *options, ranks=2)
    assert done.code == 0, done.out
    found = checkpoint.find(tmp_path / "run").tensors("generator")
    if norm == "virtual":
        assert found["noise"].std() > 0.9


def test_the_labelled_rows_alone_train_the_baseline(semi_recipe: Callable[..., Path], gandist: Callable, tmp_path: Path) -> None:  # fmt: skip
    """The generator keeps its first weights, and no unlabelled image is a loss."""
    assert gandist("train", semi_recipe("base"), "game.supervised_only=true").code == 0
    assert gandist("train", semi_recipe("first"), "run.images=32", "game.supervised_only=true").code == 0
    one, other = (checkpoint.find(tmp_path / name).tensors("generator") for name in ("base", "first"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    log = (tmp_path / "base" / "log.jsonl").read_text()
    assert "loss/discriminator/supervised" in log
    assert "loss/discriminator/unlabelled" not in log


def test_labelled_images_that_lie_in_another_split_are_refused_before_anything_is_written(
    semi_recipe: Callable[..., Path], gandist: Callable, tmp_path: Path
) -> None:
    """A test image that is also a training image of the budget; another seed of the budget is free of it."""
    from gandist.data.sources.open import open_source

    source = open_source("embedded:fashion-mnist", scratch=tmp_path)
    images = [[source.splits["train"].read(n) for n in numbers] for numbers in (range(300), range(300, 350))]

    def arrays(items: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        from gandist.data.sources.arrays import npy_view

        return np.stack([npy_view(item.members["npy"]) for item in items]), np.array([int(item.members["cls"]) for item in items])  # fmt: skip

    (train, labels), (test, test_labels) = arrays(images[0]), arrays(images[1])
    spoiled, folder = tmp_path / "spoiled.npz", tmp_path / "sound"
    np.savez(spoiled, x_train=train, y_train=labels, x_test=test, y_test=test_labels)
    packed(spoiled, folder)
    options = DataOptions(path=str(folder), subset=SubsetOptions(per_class=4, seed=0))
    refuse_leaks(options)
    chosen = open_stream(folder, parts=("image",), batch=1, subset=options.subset, workers=0).subset
    assert chosen is not None
    test[7] = train[int(chosen[3])]
    np.savez(spoiled, x_train=train, y_train=labels, x_test=test, y_test=test_labels)
    leaky = tmp_path / "leaky"
    packed(spoiled, leaky)
    with pytest.raises(InputError, match="1 of 40 labelled images are in the split `test` as well"):
        refuse_leaks(options.model_copy(update={"path": str(leaky)}))
    refused = gandist("train", semi_recipe("refused", data=leaky))
    assert refused.code == 2
    assert "data.subset.seed" in refused.err
    assert not (tmp_path / "refused").exists()
    for seed in range(1, 5):
        other = options.model_copy(update={"path": str(leaky), "subset": SubsetOptions(per_class=4, seed=seed)})
        numbers = open_stream(leaky, parts=("image",), batch=1, subset=other.subset, workers=0).subset
        if int(chosen[3]) not in numbers.tolist():  # type: ignore[union-attr]
            refuse_leaks(other)
            break
    else:
        raise AssertionError("every seed chose the same image")


FAULTS = {
    "game.feature_matching=null": "without `feature_matching` the generator needs one",
    "game.feature_matching.layer=9": "lies before the first of the 3 parts",
    "game.scores.split=train": "is what the run learns from",
    "game.discriminator.ema={from_zero: true}": "ramp_up: null",
    "game.generator.ema={from_zero: true, ramp_up: null}": "samples of weights near zero are none",
    "game.discriminator.network.spectral_norm=true": "whose weights have the length of their gains",
    "data.unlabelled_transform={range: [0, 1]}": "beside generated ones in −1 … 1",
    "game.generator.network.class_embedding=3": "class_embedding",
    "game.discriminator.network={kind: salimans_conv, input_noise: 0.1}": "in the place of `input_dropout`",
    "game.generator.network={kind: salimans_conv, width: 6}": "use a multiple of 4",
    "game.generator.network={kind: salimans_conv, reference: 5}": "no effect on `norm: batch`",
    "game.label_smoothing=1.0": "less than 1",
    "game.virtual_adversarial={radius: 0}": "greater than 0",
}


@pytest.mark.parametrize("override", FAULTS)
def test_a_contradiction_is_named_before_anything_is_written(semi_recipe: Callable[..., Path], gandist: Callable, tmp_path: Path, override: str) -> None:  # fmt: skip
    found = gandist("train", semi_recipe("run"), "run.evaluate_images=320", override)
    assert found.code == 2, found.err
    assert FAULTS[override] in found.err
    assert not (tmp_path / "run").exists()


def test_virtual_adversarial_training_needs_rows_by_themselves(semi_recipe: Callable[..., Path], gandist: Callable) -> None:  # fmt: skip
    found = gandist("describe", semi_recipe(), "game.virtual_adversarial={}", "game.discriminator.network.minibatch={}")
    assert found.code == 2
    assert "rows see each other (`minibatch`)" in found.err


def test_data_without_labels_is_no_game(gandist: Callable, tmp_path: Path, semi_recipe: Callable[..., Path]) -> None:
    np.save(tmp_path / "images.npy", np.zeros((40, 8, 8), np.uint8))
    packed(tmp_path / "images.npy", tmp_path / "plain")
    found = gandist("describe", semi_recipe(data=tmp_path / "plain"))
    assert found.code == 2
    assert "label" in found.err


# ---- predict


@pytest.fixture(scope="module")
def trained(garments: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "recipe.yaml").write_text(RECIPE.format(data=garments, folder=folder / "run", images=30_000))
    assert run("train", folder / "recipe.yaml", "run.batch=100").code == 0
    return folder / "run"


def table_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((path / "predictions.csv").open()))


def test_predictions_of_the_test_split_are_those_that_evaluate_counts(trained: Path, garments: Path, gandist: Callable, tmp_path: Path) -> None:  # fmt: skip
    scored = json.loads(gandist("evaluate", trained, "--json").out)
    told = gandist("predict", trained, garments, "--out", tmp_path / "out")
    assert told.code == 0, told.err
    found = [row for row in table_of(tmp_path / "out") if row["name"].startswith("test/")]
    assert len(found) == 2000
    assert sum(row["class"] != row["label"] for row in found) == scored["errors"] < 1500
    for row in found[:50]:
        shares = [float(value) for name, value in row.items() if name.startswith("p_")]
        assert sum(shares) == pytest.approx(1, abs=1e-4)
        assert max(shares) == float(row["probability"]) == shares[int(row["class"])]
        assert 0 <= float(row["fake"]) <= 1
    for sheet in ("least_certain.png", "likeliest_fakes.png"):
        assert Image.open(tmp_path / "out" / sheet).size[0] > 700


def test_an_image_is_answered_alike_as_a_file_in_a_folder_in_an_array_and_in_any_company(trained: Path, garments: Path, gandist: Callable, tmp_path: Path) -> None:  # fmt: skip
    stream = open_stream(garments, parts=("image",), batch=5, split="test", workers=0)
    pixels = ((stream.read(0)[0]["image"] + 1) * 127.5).round().to(torch.uint8)[:, 0].numpy()
    folder = tmp_path / "images"
    folder.mkdir()
    for number, one in enumerate(pixels):
        Image.fromarray(one).save(folder / f"{number}.png")
        Image.fromarray(np.kron(one, np.ones((2, 2), np.uint8))).save(tmp_path / f"large{number}.png")
    np.save(tmp_path / "array.npy", pixels)
    places = {"folder": [folder], "array": [tmp_path / "array.npy"], "files": sorted(folder.iterdir())}
    answers = {}
    for name, inputs in places.items():
        assert gandist("predict", trained, *inputs, "--out", tmp_path / name).code == 0
        answers[name] = [(row["probability"], row["fake"]) for row in table_of(tmp_path / name)]
    assert answers["folder"] == answers["array"] == answers["files"]
    large = gandist("predict", trained, tmp_path / "large3.png", "--out", tmp_path / "large")
    assert "1 image was cut to the shape of training and resized to 28×28" in large.out
    with Image.open(tmp_path / "files" / "least_certain.png") as sheet:
        assert sheet.mode == "RGB"


def test_what_is_no_garment_is_likelier_a_fake(trained: Path, garments: Path, gandist: Callable, tmp_path: Path) -> None:  # fmt: skip
    """Uniform noise, which no garment is: the probability of a fake ranks it above real garments, in 0.94 of all pairs here."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 28, 28), dtype=np.uint8)
    np.save(tmp_path / "noise.npy", noise)
    assert gandist("predict", trained, tmp_path / "noise.npy", "--out", tmp_path / "noise").code == 0
    assert gandist("predict", trained, garments, "--out", tmp_path / "real").code == 0
    strange = np.array([float(row["fake"]) for row in table_of(tmp_path / "noise")])
    known = np.array([float(row["fake"]) for row in table_of(tmp_path / "real")])
    assert (strange[:, None] > known[None]).mean() > 0.75


def test_damaged_images_are_named_or_counted_and_bad_inputs_refused(trained: Path, gandist: Callable, tmp_path: Path) -> None:  # fmt: skip
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(folder / "good.png")
    (folder / "damaged.png").write_bytes((folder / "good.png").read_bytes()[:60])
    refused = gandist("predict", trained, folder, "--out", tmp_path / "out")
    assert refused.code == 1
    assert "damaged.png" in refused.err
    assert not (tmp_path / "out").exists()
    counted = gandist("predict", trained, folder, "--out", tmp_path / "out", "--bad", "skip")
    assert counted.code == 0
    assert "1 damaged image passed over" in counted.out
    assert [row["name"] for row in table_of(tmp_path / "out")] == ["good.png"]
    assert gandist("predict", trained, tmp_path / "nowhere").code == 2
    assert gandist("predict", trained, folder, "--bad", "ignore").code == 2
    np.save(tmp_path / "colours.npy", np.zeros((2, 28, 28, 3), np.uint8))
    assert gandist("predict", trained, tmp_path / "colours.npy", "--out", tmp_path / "no").code == 1


def test_labels_are_compared_by_name_and_damage_in_shards_is_skipped(trained: Path, garments: Path, gandist: Callable, tmp_path: Path) -> None:  # fmt: skip
    """A folder has classes of its own, in an order of its own; a flipped bit in a packed dataset is one damaged image."""
    names = Dataset(garments).manifest.label.names  # type: ignore[union-attr]
    folder = tmp_path / "photos"
    for name in (names[5], "holiday"):
        (folder / name.replace("/", "-")).mkdir(parents=True)
        Image.fromarray(np.zeros((28, 28), np.uint8)).save(folder / name.replace("/", "-") / "one.png")
    assert gandist("predict", trained, folder, "--out", tmp_path / "named").code == 0
    assert {row["name"].split("/")[0]: row["label"] for row in table_of(tmp_path / "named")} == {names[5]: "5", "holiday": ""}  # fmt: skip
    spoiled = tmp_path / "spoiled"
    shutil.copytree(garments, spoiled)
    reader = open_reader(DataOptions(path=str(spoiled), split="test"))
    (shard,), (place,) = reader.locate(np.array([7], np.uint64))
    index = reader._index(shard)
    reader.close()
    path = spoiled / reader.shards[shard].name
    data = bytearray(path.read_bytes())
    data[index.offset[place] + index.start["image"][place] + 200] ^= 1
    path.write_bytes(data)
    assert gandist("predict", trained, spoiled, "--out", tmp_path / "no").code == 1
    counted = gandist("predict", trained, spoiled, "--out", tmp_path / "skipped", "--bad", "skip")
    assert counted.code == 0, counted.err
    assert "1 damaged image passed over" in counted.out
    assert len(table_of(tmp_path / "skipped")) == 9999
    again = gandist("predict", trained, spoiled, "--out", tmp_path / "skipped", "--bad", "skip")
    assert again.code == 2
    assert "holds predictions.csv already" in again.err


def test_the_report_of_budgets_and_seeds_is_whole_and_goes_on(semi_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """One seed, then a second one beside it: the first is not trained again, and means and ensembles are those of the runs."""
    path = semi_recipe("report", images=320)

    def report(*more: object) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            ROOT / "benchmarks" / "semi.py",
            path,
            "run.evaluate_images=160",
            "--labels",
            "20",
            *more,
        ]
        words = [*map(str, command), "--out", str(tmp_path / "table"), "--jobs", "2"]
        return subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, timeout=200, check=False)

    first = report("--seeds", 1)
    assert first.returncode == 0, first.stderr
    written = tmp_path / "table" / "semi_20_0" / "checkpoints" / "images_000000320" / "state.json"
    before = written.stat().st_mtime_ns
    both = report("--seeds", 2)
    assert both.returncode == 0, both.stderr
    assert written.stat().st_mtime_ns == before
    (budget,) = json.loads((tmp_path / "table" / "semi.json").read_text())["budgets"]
    for arm in ("semi", "supervised"):
        alone = [checkpoint.find(tmp_path / "table" / f"{arm}_20_{seed}") for seed in (0, 1)]
        assert budget[arm]["seeds"] == [0, 1]
        for errors, found in zip(budget[arm]["errors"], alone, strict=True):
            files = sorted((found.folder.parent.parent / "evaluations").glob("images_000000320*.json"))
            assert json.loads(files[0].read_text())["scores"]["errors"] == errors
        assert budget[arm]["mean"] == sum(budget[arm]["errors"]) / 2
        assert 0 < budget[arm]["ensemble"] < 2000
    assert "| 20 | 2 |" in (tmp_path / "table" / "semi.md").read_text()
    assert (tmp_path / "table" / "semi.md").read_text() in both.stdout
    assert Image.open(tmp_path / "table" / "semi.png").size[0] > 500
    assert len({checkpoint.find(tmp_path / "table" / f"semi_20_{seed}").digest for seed in (0, 1)}) == 2
    for wrong in (("--seeds", 0), ("--labels", 25), ("--labels", "20,20")):
        refused = report(*wrong)
        assert refused.returncode == 2, refused.stderr
        assert "Traceback" not in refused.stderr


def test_scores_by_hand() -> None:
    found = scores(torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3]]), torch.tensor([0, 0, 1]))
    assert (found["errors"], found["samples"]) == (2, 3)
    assert found["error_rate"] == pytest.approx(2 / 3)
    assert found["log_loss"] == pytest.approx(-np.log([0.9, 0.4, 0.3]).mean(), rel=1e-6)
