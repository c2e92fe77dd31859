"""The order of samples is a bijection of every epoch, the same for any number of processes, and well mixed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from conftest import samples

from gandist.data.order import Full, Integers, Permutation, Windowed, uniform


@pytest.mark.parametrize("length", [1, 2, 3, 17, 1000, 4096, 50_001, 1_000_003])
def test_every_epoch_is_a_bijection(length: int) -> None:
    items = Permutation(length, 0, "order", 0)(np.arange(length, dtype=np.uint64))
    assert np.array_equal(np.sort(items), np.arange(length))


def test_seeds_and_epochs_do_not_share_orders() -> None:
    places = np.arange(1000, dtype=np.uint64)
    orders = {tuple(Permutation(1000, seed, "order", epoch)(places)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


@pytest.mark.parametrize("length", [1000, 50_000, 60_000, 1_280_000])
def test_the_shuffle_passes_a_position_table_and_a_serial_correlation(length: int) -> None:
    tables, serial = [], []
    for seed in range(40 if length < 10**6 else 8):
        items = Permutation(length, seed, "order", 0)(np.arange(length, dtype=np.uint64)).astype(float)
        table, _, _ = np.histogram2d(np.arange(length), items, bins=32)
        expected = length / 1024
        tables.append(((table - expected) ** 2 / expected).sum() / 31**2)
        serial.append(np.corrcoef(items[:-1], items[1:])[0, 1] * np.sqrt(length))
    assert 0.95 < np.mean(tables) < 1.05
    assert np.abs(serial).max() < 4


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_the_union_of_all_ranks_over_an_epoch_is_the_dataset_once_each(ranks: int) -> None:
    batch, length = 48, 1008  # 21 batches
    share = batch // ranks
    read = [
        item
        for draw in range(length // batch)
        for rank in range(ranks)
        for item in samples(draw, range(rank * share, (rank + 1) * share), batch=batch, length=length, seed=3)
    ]
    assert sorted(read) == list(range(length))


def test_batches_run_across_the_end_of_an_epoch_and_drop_nothing() -> None:
    batch, length = 64, 1000
    read = np.concatenate([samples(draw, range(batch), batch=batch, length=length, seed=0) for draw in range(125)])
    for epoch in range(8):
        assert np.array_equal(np.sort(read[epoch * length : (epoch + 1) * length]), np.arange(length))


def test_a_far_draw_costs_no_walk_to_it() -> None:
    items = samples(10**8, range(64), batch=64, length=1_280_000, seed=0)
    assert len(set(items.tolist())) == 64
    assert items.max() < 1_280_000


SIZES = [100, 60, 140, 100, 90, 10, 100, 100, 77, 123]


def test_the_windowed_order_has_each_sample_once_an_epoch_and_whole_windows_of_shards() -> None:
    order = Windowed(SIZES, 3, seed=4)
    length = sum(SIZES)
    shard_of = np.repeat(np.arange(len(SIZES)), SIZES)
    epochs = [order(np.arange(e * length, (e + 1) * length, dtype=np.uint64)) for e in range(3)]
    for number, epoch in enumerate(epochs):
        assert np.array_equal(np.sort(epoch), np.arange(length))
        place = number * length
        for window in order.windows(place, 4):
            count = sum(SIZES[shard] for shard in window)
            begin = place - number * length
            assert set(shard_of[epoch[begin : begin + count]]) == set(window)
            place += count
        assert place == (number + 1) * length
    assert not np.array_equal(epochs[0], epochs[1])
    alone = Windowed([50], 1, seed=0)(np.arange(100, dtype=np.uint64))
    assert not np.array_equal(alone[:50], alone[50:])  # within a window, too
    assert not np.array_equal(epochs[0], Windowed(SIZES, 3, seed=5)(np.arange(length, dtype=np.uint64)))


def test_any_piece_of_an_order_is_the_same_as_in_the_whole() -> None:
    length = sum(SIZES)
    for order in (Full(length, 1), Windowed(SIZES, 2, 1)):
        places = np.arange(5 * length, dtype=np.uint64)
        whole = order(places)
        pick = np.random.default_rng(0)
        for _ in range(50):
            begin = int(pick.integers(0, 5 * length - 64))
            assert np.array_equal(order(places[begin : begin + 64]), whole[begin : begin + 64])


def test_a_long_permutation_is_a_bijection_in_every_block() -> None:
    for length in (1000, 65_536, 1_000_003, 10_000_000):
        seen = np.zeros(length, bool)
        for first in range(0, length, 1 << 20):
            seen[
                Permutation(length, 2, "order", 0)(np.arange(first, min(first + (1 << 20), length), dtype=np.uint64))
            ] = True
        assert seen.all()


def test_batches_of_class_sorted_shards_are_as_mixed_as_by_a_true_shuffle() -> None:
    """The variance of class counts in a batch, as a share of the hypergeometric one."""
    classes, each, batch = 10, 1000, 64
    length = classes * each
    label = np.arange(length) // each
    shards = [250] * 40  # each of one class
    expected = batch * 0.1 * 0.9 * (length - batch) / (length - 1)

    def variance(order: Callable[[Integers], Integers]) -> float:
        counts = []
        for epoch in range(6):
            found = label[order(np.arange(epoch * length, epoch * length + length // batch * batch, dtype=np.uint64))]
            counts.append(np.stack([(found.reshape(-1, batch) == c).sum(1) for c in range(classes)], 1))
        return float(((np.concatenate(counts) - batch / 10) ** 2).mean() / expected)

    assert 0.95 < variance(Full(length, 0)) < 1.05
    packed_order = Permutation(length, 0, "pack", 0)(np.arange(length, dtype=np.uint64))
    windowed = Windowed(shards, 16, 0)
    assert 0.95 < variance(lambda places: packed_order[windowed(places)]) < 1.05  # shuffled by `pack`
    assert variance(windowed) > 1.2  # sorted shards: the warning at the start is due


def test_uniform_numbers_are_uniform_independent_and_a_function_of_the_place() -> None:
    places = np.arange(100_000, dtype=np.uint64)
    a, b = uniform(places, 0, "a"), uniform(places, 0, "b")
    for numbers in (a, b):
        counts = np.histogram(numbers, 64, (0, 1))[0]
        assert ((counts - 1562.5) ** 2 / 1562.5).sum() < 64 + 4 * np.sqrt(128)
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) * np.sqrt(len(places)) < 4
    assert abs(np.corrcoef(a, b)[0, 1]) * np.sqrt(len(places)) < 4
    assert np.array_equal(uniform(places[500:600], 0, "a"), a[500:600])
    assert not np.array_equal(uniform(places, 1, "a"), a)
