"""Rows of small synthetic Internets hold packets of the true distribution, between addresses that no other row has."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import make_row, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from ping_llm.config import Config, DataConfig, ModelConfig, TrainConfig
from ping_llm.data.augmentation import fresh_addresses
from ping_llm.data.measurement import format_address, is_ipv4
from ping_llm.data.pipeline import WindowBlocks
from ping_llm.data.rows import RowReader
from ping_llm.data.synthetic import internets
from ping_llm.data.synthetic.internets import Internet, internet
from ping_llm.data.synthetic.truth import Truth
from ping_llm.data.synthetic.world import build_world

FIRST_S, LAST_S = 1_700_000_000, 1_700_600_000


@pytest.fixture(scope="module")
def some() -> Internet:
    return Internet(3)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 120), st.sampled_from([0, 5, 600_000]))
def test_a_row_has_its_size_and_time_order_and_is_a_pure_function_of_the_rng(some, seed, size, length_s):
    row, again = (some.row(FIRST_S, FIRST_S + length_s, size, np.random.default_rng(seed)) for _ in range(2))
    assert row.to_bytes() == again.to_bytes()
    assert size <= len(row) <= size + 2 and (np.diff(row.time_s) >= 0).all()
    assert row.time_s[0] >= FIRST_S and row.time_s[-1] <= FIRST_S + max(60, length_s)
    assert len(row.src_addresses) <= 2 * 12 and (row.src_is_ipv4[row.src] == row.dst_is_ipv4[row.dst]).all()
    assert ((row.rtt_ms > 0) | (row.rtt_ms == -1)).all()


def test_packets_are_draws_of_the_true_distribution(some, monkeypatch):
    monkeypatch.setattr(internets, "fresh_addresses", lambda src, dst, rng: (src, dst))
    truth, levels, failed, p_fail = Truth(build_world(3, 32, 32)), [], [], []
    for seed in range(60):
        row = some.row(FIRST_S, LAST_S, 25, np.random.default_rng(seed))
        src, dst = row.src_addresses[row.src], row.dst_addresses[row.dst]
        for one, other, time_s, rtt_ms in zip(src, dst, row.time_s.tolist(), row.rtt_ms.tolist(), strict=True):
            known = truth.rtt_distribution(format_address(one.tobytes()), format_address(other.tobytes()), time_s)
            failed.append(rtt_ms < 0)
            p_fail.append(known.p_fail)
            if rtt_ms > 0:
                levels.append(float(known.cdf(rtt_ms)))
    levels = np.sort(levels)
    assert np.abs(levels - (np.arange(len(levels)) + 0.5) / len(levels)).max() < 1.63 / len(levels) ** 0.5  # 1 %
    assert abs(np.mean(failed) - np.mean(p_fail)) < 3 * (np.mean(p_fail) / len(failed)) ** 0.5


def test_half_of_the_rows_are_of_one_source_and_no_two_have_an_address_in_common(some):
    seen: set[bytes] = set()
    sources, spans = [], []
    for seed in range(300):
        row = some.row(FIRST_S, LAST_S, 60, np.random.default_rng(seed))
        ends = {end.tobytes() for end in np.concatenate([row.src_addresses, row.dst_addresses])}
        assert not ends & seen
        seen |= ends
        sources.append(len(row.src_addresses) if row.src_is_ipv4.all() else 0)
        spans.append(np.ptp(row.time_s))
    own = np.array(sources)[np.array(sources) > 0]
    assert abs((own == 1).mean() - 0.5) < 0.1 and own.max() >= 8
    assert np.quantile(spans, 0.1) < 600 and np.quantile(spans, 0.9) > 86_400


@settings(max_examples=100)
@given(st.integers(0, 1000))
def test_fresh_addresses_share_as_many_bits_as_the_true_ones(some, seed):
    def shared_bits(one, other):
        return np.cumprod(np.unpackbits(one) == np.unpackbits(other)).sum()

    chosen = np.random.default_rng(seed).integers(len(some.src), size=6)
    true = np.concatenate([some.src[chosen], some.dst[chosen]])
    fresh = np.concatenate(fresh_addresses(some.src[chosen], some.dst[chosen], np.random.default_rng(seed)))
    assert (is_ipv4(fresh) == is_ipv4(true)).all()
    assert (fresh[~is_ipv4(fresh), 0] >> 5 == 1).all()  # 2000::/3
    for i in range(len(true)):
        for j in range(i):
            assert shared_bits(true[i], true[j]) == shared_bits(fresh[i], fresh[j])


def test_no_probe_pings_itself_and_every_probe_reaches_a_destination(some):
    assert (some.src != some.dst).any(axis=1).all() and (some.pair >= 0).any(axis=1).all()


def test_a_source_that_cannot_reach_a_destination_has_no_measurement_of_it(some):
    """Its turn is the first source's."""
    assert (some.pair < 0).any()
    beside = 0
    for seed in range(200):
        pairs = some._pairs(40, np.random.default_rng(seed))
        assert len(pairs) == 40 and (pairs >= 0).all()
        sources, targets = np.nonzero(np.isin(some.pair, pairs))
        firsts = [one for one in set(sources.tolist()) if (some.pair[one, targets] >= 0).all()]
        assert firsts  # one of them reaches every destination
        beside += (some.pair[sources][:, targets] < 0).any()
    assert beside > 10


def test_an_internet_is_known_by_its_numbers():
    assert internet(1, 0, 5) is internet(1, 0, 5)
    assert (internet(1, 0, 5).pair.shape != internet(1, 0, 6).pair.shape) or (
        internet(1, 0, 5).src != internet(1, 0, 6).src
    ).any()


def test_windows_are_synthetic_as_often_as_the_config_says_and_at_the_times_of_their_rows(tmp_path):
    folder = write_rows(tmp_path, {"train": [make_row(500, i, probe_id=i) for i in range(4)]})
    data = DataConfig(rows=folder, synthetic=0.3, windows_per_read=1)
    config = Config(model=ModelConfig(seq_len=128), data=data, train=TrainConfig(batch_size=64))
    blocks = WindowBlocks(RowReader(folder, "train"), config, 64, 1)
    real = {end.tobytes() for row in blocks.rows for end in (*row.src_addresses, *row.dst_addresses)}
    rows = [row for block in range(20) for place in range(64) for row, *_ in blocks.draw(block, place)]
    synthetic = [row for row in rows if row.probe_id == -1]
    assert abs(len(synthetic) / len(rows) - 0.3) < 0.05
    assert not real & {end.tobytes() for row in synthetic for end in (*row.src_addresses, *row.dst_addresses)}
    first_s, last_s = blocks.rows.first_time_s.min(), blocks.rows.last_time_s.max()
    assert all(first_s <= row.time_s[0] <= row.time_s[-1] <= last_s for row in synthetic)
    again = dataclasses.replace(config, seed=1)
    assert not (WindowBlocks(blocks.rows, again, 64, 1)[0] == blocks[0]).all()
    assert (blocks[7] == WindowBlocks(blocks.rows, config, 64, 1)[7]).all()
