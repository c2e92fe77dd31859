"""Scores mean the same on any number of processes, and only scores of one protocol are compared."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import on_ranks, packed, run
from PIL import Image

from gandist import checkpoint
from gandist.data.sources.generated import mixture
from gandist.evaluate import read_for
from gandist.exported import Discriminator, load
from gandist.game import Evaluation, Game
from gandist.metrics.features import ExportedOptions, PixelsOptions
from gandist.metrics.parzen import parzen
from gandist.restored import restored

SCORES = ["game.scores.features={kind: pixels, size: 7}", "game.scores.fakes=200", "game.scores.reals=300"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test has a cache of its own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("GANDIST_CACHE", str(folder))
    return folder


def _scores(folder: str, overrides: list[str], cached: str) -> Evaluation | None:
    os.environ["GANDIST_CACHE"] = cached
    found = checkpoint.find(Path(folder))
    recipe = read_for(found, overrides)
    _, players = restored(found, torch.device("cpu"))
    assert isinstance(recipe.game, Game)
    return recipe.game.evaluator(recipe.data, found.state.spec, torch.device("cpu"))(players)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, fashion: Path) -> Path:
    """A conditional run of ten steps with the embedded garments."""
    folder = tmp_path_factory.mktemp("trained")
    path = folder / "recipe.yaml"
    path.write_text(f"""\
data: {{path: {fashion}}}
game:
  kind: gan
  noise: 8
  conditional: projection
  generator: {{network: {{kind: dcgan, width: 4}}}}
  discriminator: {{network: {{kind: dcgan, width: 4}}}}
run: {{folder: {folder / "run"}, images: 160, batch: 16}}
""")
    assert run("train", path).code == 0
    return folder / "run"


def test_one_two_and_three_processes_give_the_same_scores_to_the_last_bit(trained: Path, tmp_path: Path) -> None:
    single = _scores(str(trained), SCORES, str(tmp_path / "1"))
    assert single is not None
    assert {"fd", "kd", "precision", "recall", "density", "coverage"} <= single.scores.keys()
    assert not {"fid", "kid"} & single.scores.keys()
    for ranks in (2, 3):
        first, *others = on_ranks(ranks, _scores, str(trained), SCORES, str(tmp_path / str(ranks)))
        assert others == [None] * (ranks - 1)
        assert first == single


def test_the_real_side_is_computed_once_and_found_again_by_its_protocol(trained: Path, cache: Path) -> None:
    first = _scores(str(trained), SCORES, str(cache))
    (kept,) = (cache / "statistics").iterdir()
    before = kept.read_bytes()
    kept.write_bytes(before[: len(before) // 2])  # a damaged one is made anew
    assert _scores(str(trained), SCORES, str(cache)) == first
    assert kept.read_bytes() == before
    stamp = kept.stat().st_mtime_ns
    assert _scores(str(trained), SCORES, str(cache)) == first
    assert kept.stat().st_mtime_ns == stamp
    _scores(str(trained), [*SCORES, "game.scores.seed=1"], str(cache))
    assert len([*(cache / "statistics").iterdir()]) == 2


def test_the_last_weights_are_scored_where_that_is_asked_for_and_the_card_says_so(
    gandist: Callable, trained: Path, cache: Path, tmp_path: Path
) -> None:
    average = _scores(str(trained), SCORES, str(cache))
    last = _scores(str(trained), [*SCORES, "game.scores.average=false"], str(cache))
    assert average is not None
    assert last is not None
    assert (average.protocol["ema"], last.protocol["ema"]) == (True, False)
    assert average.scores["fd"] != last.scores["fd"]
    found = checkpoint.find(trained)
    _, players = restored(found, torch.device("cpu"))
    players["generator"].ema = None
    recipe = read_for(found, SCORES)
    assert isinstance(recipe.game, Game)
    bare = recipe.game.evaluator(recipe.data, found.state.spec, torch.device("cpu"))(players)
    assert bare is not None
    assert bare.scores == last.scores
    path = tmp_path / "bare.yaml"
    path.write_text((trained / "recipe.yaml").read_text())
    refused = gandist("describe", path, "game.generator.ema=null", "game.scores.average=false")
    assert refused.code == 2
    assert "`game.scores.average`: has no effect" in refused.err


def test_an_exported_discriminator_is_a_feature_network_of_safetensors(
    gandist: Callable, trained: Path, cache: Path, tmp_path: Path
) -> None:
    for player in ("generator", "discriminator"):
        assert gandist("export", trained, tmp_path / player, "--player", player).code == 0
    judge = tmp_path / "discriminator"
    features = f"game.scores.features={{kind: exported, path: {judge}}}"
    found = _scores(str(trained), [features, *SCORES[1:]], str(cache))
    assert found is not None
    assert {"fd", "kd", "precision"} <= found.scores.keys()
    config = json.loads((judge / "config.json").read_text())
    assert found.protocol["features_digest"] == config["weights"]["sha256"]
    images = 2 * torch.rand(5, 1, 28, 28) - 1
    network = ExportedOptions(kind="exported", path=str(judge)).build()
    module = load(judge)
    assert isinstance(module, Discriminator)
    expected = module((127.5 * (images + 1)).round() / 127.5 - 1, torch.arange(5))
    torch.testing.assert_close(network(images).pool, expected.features)  # a class does not change them
    for features, rule in (
        (f"{{kind: exported, path: {tmp_path / 'generator'}}}", "holds a generator"),
        (f"{{kind: exported, path: {tmp_path / 'none'}}}", "gandist export RUN"),
    ):
        refused = gandist("evaluate", trained, f"game.scores.features={features}", *SCORES[1:])
        assert refused.code == 2, refused.err
        assert rule in refused.err
        assert "`game.scores.features`" in refused.err
    (other,) = ExportedOptions(kind="exported", path=str(judge)).faults((3, 32, 32))
    assert "28×28 in 1 channel," in other
    assert "32×32 in 3 channels" in other


def test_evaluate_prints_writes_and_compares_scores_of_one_protocol_alone(
    gandist: Callable, trained: Path, tmp_path: Path
) -> None:
    result = gandist("evaluate", trained, *SCORES, "--json", "--out", tmp_path)
    assert result.code == 0, result.err
    printed = json.loads(result.out.strip().splitlines()[-1])
    (written,) = (tmp_path / "evaluations").iterdir()
    kept = json.loads(written.read_text())
    assert printed["fd"] == kept["scores"]["fd"]
    assert printed["protocol"] == kept["protocol"]
    assert kept["images"] == 160
    assert kept["protocol"]["labels"] == "each class equally often"
    again = gandist("evaluate", trained, *SCORES, "--against", written, "--out", tmp_path / "again")
    assert again.code == 0, again.err
    assert "before:" in again.out
    other = gandist("evaluate", trained, *SCORES[:2], "game.scores.reals=400", "--against", written, "--out", tmp_path)
    assert other.code == 2
    assert "`reals`" in other.err
    refused = gandist("evaluate", trained, "run.batch=3")
    assert refused.code == 2
    assert "only `data.…` and `game.scores.…`" in refused.err
    too_many = gandist("evaluate", trained, "game.scores.reals=99999", *SCORES[:2])
    assert too_many.code == 2
    assert "99999" in too_many.err


def test_scores_stand_in_the_record_every_so_many_images_and_at_the_end(recipe: Callable, tmp_path: Path) -> None:
    path = recipe(images=160)
    result = run("train", path, "run.evaluate_images=64", *SCORES, GANDIST_CACHE=str(tmp_path / "cache"))
    assert result.code == 0, result.err
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    scored = {line["images"]: line["score/fd"] for line in lines if "score/fd" in line}
    assert [*scored] == [64, 128, 160]
    assert len([*(tmp_path / "run" / "evaluations").iterdir()]) == 3
    # a later look at the last checkpoint says the same as the run itself did
    evaluation = _scores(str(tmp_path / "run"), SCORES, str(tmp_path / "cache"))
    assert evaluation is not None
    assert evaluation.scores["fd"] == scored[160]


def test_features_that_are_not_there_are_refused_before_anything_is_written(recipe: Callable, tmp_path: Path) -> None:
    options = ["game.scores.features={kind: inception, path: nowhere.pt}", "run.evaluate_images=64"]
    result = run("train", recipe(), *options)
    assert result.code == 2
    assert "nowhere.pt" in result.err
    assert not (tmp_path / "run").exists()


def test_real_samples_scored_as_fakes_are_as_good_as_real(trained: Path, fashion: Path) -> None:
    """Precision, recall, density and coverage near 1 and a distance near 0, through the real path of features."""
    from gandist.data.opening import data_spec
    from gandist.games.scores import GeneratorScores
    from gandist.metrics.distribution import DistributionOptions, RealStatistics, score

    found = checkpoint.find(trained)
    recipe = read_for(found, [*SCORES[:1], "game.scores.fakes=300", "game.scores.reals=300"])
    scores = recipe.game.evaluator(recipe.data, data_spec(recipe.data), torch.device("cpu"))  # type: ignore[attr-defined]
    assert isinstance(scores, GeneratorScores)
    features = scores._features(scores._blocks(1000, "train"))
    real = RealStatistics.of(features.pool[:500])
    same = score(real, features._replace(pool=features.pool[500:]), 0, DistributionOptions())
    assert same.manifold is not None
    assert same.manifold.precision > 0.8
    assert same.manifold.coverage > 0.85
    noise = score(real, features._replace(pool=torch.rand_like(features.pool[500:]) * 2 - 1), 0, DistributionOptions())
    assert noise.frechet > 20 * same.frechet
    assert noise.manifold is not None
    assert noise.manifold.precision < 0.1


def test_modes_and_likelihood_are_scored_where_the_data_has_them(
    tmp_path: Path, fashion: Path, recipe: Callable
) -> None:
    packed("generated:ring-8", tmp_path / "ring")
    path = tmp_path / "ring.yaml"
    path.write_text(f"""\
data: {{path: {tmp_path / "ring"}}}
game:
  kind: gan
  noise: 4
  generator: {{network: {{kind: mlp, width: 8}}}}
  discriminator: {{network: {{kind: mlp, width: 8}}}}
run: {{folder: {tmp_path / "points"}, images: 64, batch: 16}}
""")
    assert run("train", path).code == 0
    small = ["game.scores.fakes=128", "game.scores.reals=200"]
    evaluation = _scores(str(tmp_path / "points"), small, str(tmp_path / "cache"))
    assert evaluation is not None
    assert 0 <= evaluation.scores["modes"] <= len(mixture("ring-8")[0])
    assert 0 <= evaluation.scores["good"] <= 1

    packed("embedded:fashion-mnist", tmp_path / "parts", splits=(("train", 9000), ("validation", 500), ("test", 500)))
    assert run("train", recipe(data=tmp_path / "parts", images=32)).code == 0
    options = [*SCORES, "game.scores.parzen={samples: 100}"]
    evaluation = _scores(str(tmp_path / "run"), options, str(tmp_path / "cache"))
    assert evaluation is not None
    found = checkpoint.find(tmp_path / "run")
    game, players = restored(found, torch.device("cpu"))
    made = torch.cat([rows for _, rows in game.made(players, found.state.spec, 200, 0)])[:100]  # type: ignore[attr-defined]
    recipe_ = read_for(found, options)
    scores = recipe_.game.evaluator(recipe_.data, found.state.spec, torch.device("cpu"))  # type: ignore[attr-defined]
    parts = [torch.cat([rows for _, rows in scores._blocks(500, split)]) for split in ("validation", "test")]
    expected = parzen(*[(part.flatten(1) + 1) / 2 for part in (made, *parts)])  # type: ignore[arg-type]
    assert evaluation.scores["parzen"] == pytest.approx(expected.mean)
    assert evaluation.scores["parzen_standard_error"] == pytest.approx(expected.standard_error)


def test_fakes_have_the_classes_in_the_proportions_of_the_split(trained: Path) -> None:
    found = checkpoint.find(trained)
    recipe = read_for(found, SCORES)
    scores = recipe.game.evaluator(recipe.data, found.state.spec, torch.device("cpu"))  # type: ignore[attr-defined]
    scores.weights = torch.tensor([1.0, 2.0, 5.0])
    assert scores._labels(800).bincount().tolist() == [100, 200, 500]
    assert scores._labels(9).bincount(minlength=3).sum() == 9


def test_pixels_are_the_default_of_points_and_the_spectrum_that_of_signals() -> None:
    from gandist.games.scores import ScoreOptions

    assert isinstance(ScoreOptions().chosen((2, 1)), PixelsOptions)
    assert [ScoreOptions().chosen(shape).kind for shape in ((1, 1024), (3, 64, 64))] == ["spectrum", "inception"]
    assert [place for place, _ in ScoreOptions(parzen={}).faults((1, 1024))] == [("parzen",)]


def test_signals_are_scored_by_their_spectra_which_are_drawn_side_by_side(gandist: Callable, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(80, 2, 64)).astype(np.float32)
    np.save(tmp_path / "signals.npy", values)
    packed(tmp_path / "signals.npy", tmp_path / "data")
    path = tmp_path / "signals.yaml"
    path.write_text(f"""\
data: {{path: {tmp_path / "data"}}}
game:
  kind: gan
  noise: 4
  scores: {{fakes: 64}}
  generator: {{network: {{kind: mlp, width: 8}}}}
  discriminator: {{network: {{kind: mlp, width: 8}}}}
run: {{folder: {tmp_path / "run"}, images: 32, batch: 16}}
""")
    assert gandist("train", path).code == 0
    result = gandist("evaluate", tmp_path / "run", "--json")
    assert result.code == 0, result.err
    (written,) = (tmp_path / "run" / "evaluations").glob("*.json")
    curves = json.loads(written.read_text())["curves"]
    assert len(curves["spectrum/real"]) == len(curves["spectrum/fake"]) == 2 * 33
    magnitudes = np.log(np.abs(np.fft.rfft(values, norm="ortho")) + 1e-3).mean(0).reshape(-1)
    assert np.allclose(curves["spectrum/real"], magnitudes, atol=2e-3)
    assert Image.open(written.with_suffix(".png")).size[0] > 500
