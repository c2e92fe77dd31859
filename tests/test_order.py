"""The order of samples is a bijection of every epoch, the same for any number of processes, and well mixed."""

import numpy as np
import pytest

from gandist.data.order import Permutation, samples


@pytest.mark.parametrize("length", [1, 2, 3, 17, 1000, 4096, 50_001, 1_000_003])
def test_every_epoch_is_a_bijection(length: int) -> None:
    items = Permutation(length, 0, "order", 0)(np.arange(length, dtype=np.uint64))
    assert np.array_equal(np.sort(items), np.arange(length))


def test_seeds_and_epochs_do_not_share_orders() -> None:
    places = np.arange(1000, dtype=np.uint64)
    orders = {tuple(Permutation(1000, seed, "order", epoch)(places)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


@pytest.mark.parametrize("length", [1000, 50_000, 60_000])
def test_the_shuffle_passes_a_position_table_and_a_serial_correlation(length: int) -> None:
    tables, serial = [], []
    for seed in range(40):
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
