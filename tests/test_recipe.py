"""A recipe is checked strictly, and every fault is told at once, before anything is written."""

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from gandist.check import read_recipe
from gandist.recipe import InputError, Source, parse


def test_every_fault_of_a_file_is_listed_at_once_and_nothing_is_written(
    gandist: Callable, tmp_path: Path, fashion: Path
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(f"""\
data:
  path: {fashion}
  splitt: train
game:
  kind: gan
  loss: hindge
  generator:
    network: {{kind: dcgan, widht: 64}}
    ema: {{half_life_images: 0}}
  discriminator:
    network: {{kind: dcgen}}
run:
  folder: {tmp_path / "run"}
  images: many
  images: 100
  batch: 2.5
  zzz: 3
""")
    result = gandist("train", path, "run.seed=-1", "run.precission=fp32")
    assert result.code == 2
    assert "Traceback" not in result.err
    for fault in [
        "line 3: `data.splitt`: unknown key; did you mean `split`?",
        "line 6: `game.loss`: must be 'minimax', 'non_saturating', 'least_squares', 'hinge', 'wasserstein', 'relativistic' or 'relativistic_average', not 'hindge'",
        "line 8: `game.generator.network.widht`: unknown key; did you mean `width`?",
        "line 9: `game.generator.ema.half_life_images`: must be at least 1, not 0",
        "line 11: `game.discriminator.network`: 'dcgen' is not a discriminator; did you mean `dcgan`?",
        "line 15: `run.images`: stands twice; the first is on line 14",
        "line 16: `run.batch`: must be a whole number, not 2.5",
        "line 17: `run.zzz`: unknown key; known:",
        "override 'run.seed=-1': `run.seed`: must be at least 0, not -1",
        "override 'run.precission=fp32': `run.precission`: unknown key; did you mean `precision`?",
    ]:
        assert fault in result.err, fault
    assert not (tmp_path / "run").exists()


def test_values_that_contradict_the_data_are_refused_together(gandist: Callable, recipe: Callable) -> None:
    result = gandist("train", recipe(), "run.batch=20000", "run.images=40000", "data.split=tset")
    assert result.code == 2
    assert "'tset' is not a split" in result.err
    result = gandist("train", recipe(), "run.batch=20000", "run.images=40000")
    assert "20000 is more than the 10000 samples" in result.err


def test_a_batch_that_does_not_split_over_the_processes_is_refused(
    gandist: Callable, recipe: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    result = gandist("train", recipe())
    assert result.code == 2
    assert "16 images cannot be split over 3 processes with 1 micro-batches each; use a multiple of 3" in result.err


def test_settings_without_effect_are_refused(gandist: Callable, recipe: Callable) -> None:
    result = gandist("train", recipe(), "game.generator.schedule.final=0.1", "game.discriminator.schedule.kind=linear")
    assert result.code == 2
    assert "have no effect on a `constant` schedule" in result.err
    assert "a `linear` schedule needs `until_images`" in result.err


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("a: !!python/object/apply:os.system ['touch /tmp/x']", "tag"),
        ("a: &x 1\nb: *x", "anchors and aliases"),
        ("[" * 4000, "nested deeper"),
        ("a: {b: [1, 2", "not YAML"),
        ("? {a: 1}\n: 2", "a key must be a word"),
    ],
)
def test_hostile_yaml_is_refused_by_rule(text: str, rule: str) -> None:
    source = Source("hostile")
    parse(text, source)
    assert any(rule in fault for fault in source.faults), source.faults


def test_numbers_mean_what_they_look_like() -> None:
    values = parse("a: 1e-4\nb: 200_000\nc: no\nd: 010\ne: 2.5\nf: '3'\ng: -7", Source("numbers"))
    assert values == {"a": 1e-4, "b": 200_000, "c": "no", "d": 10, "e": 2.5, "f": "3", "g": -7}
    assert isinstance(values["b"], int)


@pytest.mark.parametrize("value", [".nan", ".inf", "1e999", "-1.0"])
def test_a_learning_rate_must_be_a_finite_positive_number(recipe: Callable, value: str) -> None:
    with pytest.raises(InputError, match="learning_rate"):
        read_recipe(recipe(), [f"game.generator.optimizer.learning_rate={value}"])


def test_a_resolved_recipe_reads_back_as_itself_and_is_frozen(recipe: Callable, tmp_path: Path) -> None:
    loaded = read_recipe(recipe(), ["run.trackers=[tensorboard]", "game.generator.optimizer.learning_rate=1e-3"])
    (tmp_path / "resolved.yaml").write_text(loaded.to_yaml())
    again = read_recipe(tmp_path / "resolved.yaml", [])
    assert again.to_yaml() == loaded.to_yaml()
    assert again.game.generator.optimizer.learning_rate == 1e-3  # type: ignore[attr-defined]
    with pytest.raises(ValidationError):
        loaded.run.seed = 5  # type: ignore[misc]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"just text", b"[1, 2]", b"a" * 300_000])
def test_a_file_that_is_no_recipe_is_refused_without_a_traceback(
    gandist: Callable, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "x.yaml").write_bytes(content)
    result = gandist("train", tmp_path / "x.yaml")
    assert result.code == 2
    assert str(tmp_path / "x.yaml") in result.err
    assert "Traceback" not in result.err


def test_a_missing_recipe_and_a_missing_dataset_say_what_to_do(
    gandist: Callable, recipe: Callable, tmp_path: Path
) -> None:
    assert "name a recipe" in gandist("train", tmp_path / "none.yaml").err
    result = gandist("train", recipe(data=tmp_path / "nowhere"))
    assert result.code == 2
    assert "gandist pack SOURCE" in result.err
