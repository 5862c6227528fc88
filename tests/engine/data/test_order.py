"""Orders are permutations, evenly distributed, and the same wherever they are evaluated."""

import numpy as np
import pytest
from harmony_fast.engine.data.order import Blocks, QuasiRandomOrder, RandomOrder, shuffled
from hypothesis import given, settings
from hypothesis import strategies as st


@given(st.integers(1, 5000), st.integers(-(2**63), 2**63 - 1), st.integers(1, 100))
@settings(max_examples=150)
def test_every_number_once(count: int, key: int, step: int) -> None:
    whole = shuffled(np.arange(count), count, key)
    assert sorted(whole.tolist()) == list(range(count))
    places = np.arange(0, count, step)
    assert shuffled(places, count, key).tolist() == whole[places].tolist()


@pytest.mark.parametrize("count", [2**31 + 11, 10**15])
def test_large_counts_need_no_list(count: int) -> None:
    places = np.unique(np.random.default_rng(0).integers(0, count, 20_000))
    got = shuffled(places, count, 5)
    assert len(np.unique(got)) == len(places) and got.min() >= 0 and got.max() < count
    assert abs(got.mean() / count - 0.5) < 5 / np.sqrt(12 * len(places))
    assert abs(np.corrcoef(places, got)[0, 1]) < 5 / np.sqrt(len(places))


def test_all_permutations_are_equally_likely() -> None:
    """Of four numbers, over 4,800 keys: chi-squared with 23 degrees of freedom stays below 60 (p = 4e-5)."""
    keys = np.random.default_rng(1).integers(-(2**63), 2**63, 4_800)
    seen = np.unique([shuffled(np.arange(4), 4, int(key)) for key in keys], axis=0, return_counts=True)[1]
    assert len(seen) == 24 and ((seen - 200.0) ** 2 / 200).sum() < 60


def test_a_number_is_at_every_place_equally_often() -> None:
    places = np.stack([RandomOrder(30, seed, 0).at(np.arange(30)) for seed in range(3000)])
    counts = np.stack([np.bincount(places[:, p], minlength=30) for p in range(30)])
    assert ((counts - 100.0) ** 2 / 100).sum() < 841 + 6 * np.sqrt(2 * 841)  # chi-squared, (30 - 1)**2 degrees


def blocks() -> Blocks:
    return Blocks(np.array([0, 97, 100, 260]), total_bytes=2600, block_bytes=70)  # 10 bytes a sample, 7 a block


def test_blocks_do_not_cross_files() -> None:
    starts = blocks().starts.tolist()
    assert {0, 97, 100, 260} <= set(starts) and starts == sorted(set(starts))
    assert max(np.diff(starts)) == 7 and len(blocks()) == 14 + 1 + 23


def test_quasi_random_is_a_permutation_block_by_block() -> None:
    order = QuasiRandomOrder(blocks(), seed=3, epoch=1, window=4)
    whole = order.at(np.arange(260))
    assert sorted(whole.tolist()) == list(range(260))
    for window in range(10):
        first, end = order.window_starts[window : window + 2]
        here = np.searchsorted(blocks().starts, whole[first:end], "right") - 1
        assert set(here.tolist()) == set(order.blocks_of(window).tolist())
        assert not np.array_equal(whole[first:end], np.sort(whole[first:end])) or end - first < 3
    assert len(order.window_starts) == 11 and not len(order.blocks_of(10))
    part = np.array([259, 0, 31, 30, 100])
    assert order.at(part).tolist() == whole[part].tolist()


def test_orders_depend_on_seed_and_epoch() -> None:
    seen = {tuple(QuasiRandomOrder(blocks(), s, e, 4).at(np.arange(260)).tolist()) for s in (0, 1) for e in (0, 1)}
    seen |= {tuple(RandomOrder(260, s, e).at(np.arange(260)).tolist()) for s in (0, 1) for e in (0, 1)}
    assert len(seen) == 8
