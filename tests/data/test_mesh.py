"""Windows of several probes hold measurements of rows that share destinations, as many of each as they should."""

from __future__ import annotations

import dataclasses
import pickle
from collections import Counter
from itertools import chain, islice

import numpy as np
import pytest
import torch
from conftest import write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from ping_llm.config import Config, DataConfig, ModelConfig, TrainConfig
from ping_llm.data import mesh as mesh_module
from ping_llm.data import pipeline
from ping_llm.data import rows as rows_module
from ping_llm.data.loader import training_batches, validation_windows
from ping_llm.data.measurement import pack_address
from ping_llm.data.mesh import DestinationIndex, Mesh, _dealt, _near, destination_keys
from ping_llm.data.pipeline import WindowBlocks
from ping_llm.data.rows import ProbeRow, RowReader

PLAIN = {"src_prefix_dropout": 0.0, "dst_prefix_dropout": 0.0}


def address(text: str) -> np.ndarray:
    return np.frombuffer(pack_address(text), np.uint8)


def row_to(destinations: list[int], count: int, probe: int, start_s: int = 1_700_000_000) -> ProbeRow:
    """`count` measurements, about one a minute, of one probe with a source of its own to numbered destinations."""
    rng = np.random.default_rng((probe, count))
    dst = np.append(np.arange(len(destinations)), rng.integers(len(destinations), size=count))[:count]
    src = np.tile(address(f"10.{probe >> 8}.{probe & 255}.1"), (count, 1))
    all_dst = np.array([address(f"192.0.{n >> 8}.{n & 255}") for n in destinations])
    rtt_ms = rng.lognormal(3, 1, count).astype(np.float32)
    time_s = start_s + np.sort(rng.integers(0, 60 * count, count))
    nothing = np.zeros(count, np.uint8)
    return ProbeRow.from_addresses(probe, time_s, nothing.astype(np.int64), src, all_dst[dst], rtt_ms, nothing)


class Rows(list):
    """Rows in memory, in place of a RowReader."""

    part, paths = "train", ()

    @property
    def measurements(self):
        return np.array([len(row) for row in self])

    @property
    def probe_id(self):
        return np.array([row.probe_id for row in self])


def measurements_of(row: ProbeRow, index=slice(None)) -> list[tuple]:
    ends = row.src_addresses[row.src[index]], row.dst_addresses[row.dst[index]]
    return list(
        zip(*(map(bytes, end) for end in ends), row.times(index).tolist(), row.rtt_ms[index].tolist(), strict=True)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """30 probes of train and 10 of val, each with some 12 of 40 destinations; one of train shares none."""
    rng = np.random.default_rng(0)

    def row(probe):
        return row_to(rng.choice(40, 12, replace=False).tolist(), int(rng.integers(200, 900)), probe)

    train = [row(probe) for probe in range(30)] + [row_to([500], 400, 31)]
    return write_rows(tmp_path_factory.mktemp("rows"), {"train": train, "val-s1": [row(100 + i) for i in range(10)]})


@pytest.fixture(scope="module")
def config(folder):
    data = DataConfig(rows=folder, windows_per_read=3, mesh=1.0, full_time=1.0, partial_time=0.0, **PLAIN)
    return Config(model=ModelConfig(seq_len=512), data=data, train=TrainConfig(batch_size=8, eval_windows=16))


def blocks_of(config, **changes):
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))
    return WindowBlocks(RowReader(config.data.rows, "train"), config, 8, config.data.windows_per_read)


held = st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=6, unique=True), min_size=1, max_size=9)


@settings(max_examples=100, deadline=None)
@given(held)
def test_the_index_holds_the_rows_of_each_destination_that_several_hold(destinations):
    index = DestinationIndex(Rows(row_to(own, len(own), i) for i, own in enumerate(destinations)))
    for number in range(14):
        rows = [i for i, own in enumerate(destinations) if number in own]
        (start,), (count,) = index.places(address(f"192.0.0.{number}")[None])
        assert index.rows[start : start + count].tolist() == (rows if len(rows) > 1 else [])
    assert len(index.keys) == sum(n > 1 for n in Counter(chain(*destinations)).values())


def test_the_index_reads_evenly_spaced_rows_and_a_bounded_number_of_destinations_of_each(monkeypatch):
    rows = Rows(row_to(list(range(10)), 10, i) for i in range(12))
    monkeypatch.setattr(mesh_module, "_AT_ONCE", 2)
    monkeypatch.setattr(mesh_module, "MOST_DESTINATIONS", 3)
    index = DestinationIndex(rows)
    assert index.rows.tolist() == list(range(12)) * 3  # of each row the same three
    assert index.keys.tolist() == sorted(destination_keys(rows[0].dst_addresses).tolist())[:3]
    monkeypatch.setattr(mesh_module, "MOST_ROWS", 4)
    assert DestinationIndex(rows).rows.tolist() == [0, 3, 6, 9] * 3
    monkeypatch.setattr(mesh_module, "MOST_MEASUREMENTS", 30)
    assert DestinationIndex(rows).rows.tolist() == [0, 4, 8] * 3


def test_other_rows_are_drawn_in_proportion_to_the_destinations_that_they_share():
    rows = Rows([row_to([1, 2, 3, 4], 4, 0), row_to([1, 9], 2, 1), row_to([2, 3, 4], 3, 2), row_to([7, 8, 9], 3, 3)])
    index, rng = DestinationIndex(rows), np.random.default_rng(0)
    drawn = Counter(index.others(0, rows[0].dst_addresses, 1, rng)[0] for _ in range(2000))
    assert set(drawn) == {1, 2} and abs(drawn[2] / 2000 - 3 / 4) < 0.04
    assert sorted(index.others(0, rows[0].dst_addresses, 12, rng)) == [1, 2]
    assert index.others(3, rows[3].dst_addresses[:2], 12, rng) == []  # 7 and 8 are its own alone


def test_rows_of_the_same_probe_are_no_others_unless_the_probe_is_unknown():
    for probe, others in ((5, []), (-1, [1])):
        rows = Rows(dataclasses.replace(row_to([1, 2], 4, 5), probe_id=probe) for _ in range(2))
        assert DestinationIndex(rows).others(0, rows[0].dst_addresses, 3, np.random.default_rng(0)) == others


def test_a_row_that_shares_nothing_has_no_mesh_and_gives_windows_of_its_own(config):
    rows = Rows([row_to([1], 4, 0), row_to([2], 4, 1)])
    assert DestinationIndex(rows).mesh(0, rows[0], np.random.default_rng(0)) is None
    alone = [
        (row, window) for place in range(8) for row, window, _ in blocks_of(config).draw(0, place) if row.probe_id == 31
    ]
    assert alone and all(len(row) == 400 for row, _ in alone)


def test_every_measurement_of_a_mesh_window_is_one_of_the_rows_of_train_once(config):
    held = Counter(m for row in RowReader(config.data.rows, "train") for m in measurements_of(row))
    several = 0
    for block in range(3):
        for place in range(8):
            for row, window, _ in blocks_of(config).draw(block, place):
                ends = (map(bytes, end) for end in (window.src, window.dst))
                shown = Counter(zip(*ends, window.time_s.tolist(), window.rtt_ms.tolist(), strict=True))
                assert not shown - held
                assert window.time_s.tolist() == sorted(window.time_s.tolist()) and window.timed.all()
                assert (row.dst_addresses[row.dst[window.index]] == window.dst).all()
                several += len({end.tobytes() for end in window.src}) > 1
    assert several > 0.9 * 3 * 8 * 12


def test_a_mesh_has_its_share_of_the_first_row_and_three_quarters_to_shared_destinations():
    rows = Rows(row_to(list(range(12 * (i % 2), 12 * (i % 2) + 24)), 3000, i) for i in range(14))
    index = DestinationIndex(rows)
    numbers, of_first, to_shared = [], [], []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        mesh = index.mesh(0, rows[0], rng)
        row = mesh.row(200, rng)
        assert 200 <= len(row) <= 214 and row.probe_id == 0
        numbers.append((len(mesh.rows) - 1, len(mesh.shared_keys)))
        of_first.append((row.src_addresses[row.src] == address("10.0.0.1")).all(axis=1).mean())
        to_shared.append(np.isin(destination_keys(row.dst_addresses), mesh.shared_keys)[row.dst].mean())
    others, shared = np.array(numbers).T
    assert set(others.tolist()) == set(shared.tolist()) == set(range(1, 13))
    for count in (others, shared):  # log-uniform: half of them below √13
        assert abs((count < 13**0.5).mean() - 0.54) < 0.08
    assert min(of_first) > 0.18 and max(of_first) < 0.62 and abs(np.mean(of_first) - 0.4) < 0.02
    assert abs(np.mean(to_shared) - 0.75) < 0.02 and np.std(to_shared) < 0.05


def test_a_mesh_lies_in_a_span_of_the_first_row_and_the_others_as_near_to_it_as_can_be():
    day_s = 86_400
    rows = [row_to([1, 2], 5000, 0), row_to([1, 2], 5000, 1), row_to([1, 2], 300, 2, 1_700_000_000 + 30 * day_s)]
    spans = []
    for seed in range(300):
        mesh = Mesh(rows, destination_keys(rows[0].dst_addresses[:1]))
        row = mesh.row(60, np.random.default_rng(seed))
        time_s = [row.times(np.flatnonzero(row.src == i)) for i in range(3)]
        spans.append(np.ptp(time_s[0]))
        assert np.ptp(time_s[1]) <= 1.5 * spans[-1] + 10 * 3600
        assert time_s[2].max() - rows[2].first_time_s < 3 * 3600  # its earliest ones, which begin a month later
    assert np.quantile(spans, 0.1) < 3600 * 2 and np.quantile(spans, 0.9) > day_s


@settings(max_examples=200)
@given(st.integers(1, 100), st.floats(0.2, 0.6), st.lists(st.integers(1, 60), min_size=1, max_size=13))
def test_rows_give_what_is_wanted_or_all_they_have(size, share, lengths):
    lengths = np.array(lengths)
    counts = _dealt(size, share, lengths)
    assert (counts >= 1).all() and (counts <= lengths).all()
    assert min(size, lengths.sum()) <= counts.sum() <= size + len(lengths)
    if lengths.min() >= size and size >= 60:
        assert abs(counts[0] - share * size) <= 1


@settings(max_examples=200)
@given(st.data(), st.lists(st.integers(0, 50), min_size=1, max_size=30).map(sorted))
def test_the_nearest_measurements_are_taken_where_a_span_holds_too_few(data, offsets):
    row = dataclasses.replace(row_to([1], len(offsets), 0), offset_s=np.array(offsets, np.uint32), first_time_s=1000)
    chosen = sorted(data.draw(st.sets(st.integers(0, len(offsets) - 1), min_size=1)))
    count = data.draw(st.integers(1, len(chosen)))
    begin_s, end_s = sorted(data.draw(st.tuples(st.integers(950, 1100), st.integers(950, 1100))))
    near = _near(row, np.array(chosen), count, begin_s, end_s, np.random.default_rng(0)).tolist()
    inside = [i for i in chosen if begin_s <= 1000 + offsets[i] <= end_s]
    assert len(near) == count and near == sorted(set(near)) and set(near) <= set(chosen)
    if len(inside) >= count:
        assert set(near) <= set(inside) or count == len(chosen)
    else:
        first = chosen.index(near[0])
        assert set(inside) <= set(near) and near == chosen[first : first + count]


def test_the_span_holds_its_last_second_and_grows_to_both_sides():
    row = dataclasses.replace(row_to([1], 9, 0), offset_s=np.arange(9, dtype=np.uint32) * 10, first_time_s=1000)
    near = [_near(row, np.arange(9), 2, 1030, 1040, np.random.default_rng(seed)).tolist() for seed in range(9)]
    assert near == [[3, 4]] * 9
    assert _near(row, np.arange(9), 5, 1030, 1040, np.random.default_rng(0)).tolist() == [2, 3, 4, 5, 6]
    assert _near(row, np.arange(9), 4, 1000, 1000, np.random.default_rng(0)).tolist() == [0, 1, 2, 3]
    assert _near(row, np.arange(9), 4, 1090, 1099, np.random.default_rng(0)).tolist() == [5, 6, 7, 8]


def test_windows_are_of_several_probes_and_of_synthetic_internets_as_often_as_the_config_says(config):
    blocks = blocks_of(config, mesh=0.3, synthetic=0.5)
    rows = [row for block in range(12) for place in range(8) for row, *_ in blocks.draw(block, place)]
    rows = [row for row in rows if row.probe_id != 31]
    synthetic = np.array([row.probe_id == -1 for row in rows])
    several = np.array([len(row.src_addresses) > 1 for row in rows]) & ~synthetic
    assert len(rows) > 1000 and abs(synthetic.mean() - 0.5) < 0.06 and abs(several.mean() - 0.3) < 0.05


def test_held_out_rows_never_stand_in_windows_of_train(config):
    train = {m for row in RowReader(config.data.rows, "train") for m in measurements_of(row)}
    val = {m for row in RowReader(config.data.rows, "val") for m in measurements_of(row)}
    assert {dst for _, dst, *_ in train} & {dst for _, dst, *_ in val} and not train & val  # destinations are shared
    shown = {m for place in range(8) for row, *_ in blocks_of(config).draw(1, place) for m in measurements_of(row)}
    assert shown <= train


def test_windows_of_val_are_the_same_with_and_without_a_mesh(config):
    plain = dataclasses.replace(config, data=DataConfig(rows=config.data.rows))
    assert (validation_windows(config) == validation_windows(plain)).all()


def test_a_cut_of_the_source_leaves_all_sources_of_a_window_the_same_share(config):
    blocks = blocks_of(config, src_prefix_dropout=1.0)
    lengths = [{int(n) for n in window.src_bytes} for place in range(8) for _, window, _ in blocks.draw(0, place)]
    assert all(len(own) == 1 for own in lengths) and set.union(*lengths) == {0, 1, 2, 3}


def test_blocks_of_mixed_windows_are_the_same_after_pickling_and_for_any_share_of_the_batch(config):
    mixed = dataclasses.replace(config, data=dataclasses.replace(config.data, mesh=0.5, synthetic=0.2))
    blocks = WindowBlocks(RowReader(config.data.rows, "train"), mixed, 8, 3)
    whole = blocks[5]
    assert (pickle.loads(pickle.dumps(blocks))[5] == whole).all()
    for rank in range(2):
        assert (WindowBlocks(RowReader(config.data.rows, "train"), mixed, 8, 3, rank, 2)[5] == whole[:, rank::2]).all()


def batches(config, start, count, **changes):
    data = dataclasses.replace(config.data, mesh=0.5, synthetic=0.2, **changes)
    iterator = training_batches(dataclasses.replace(config, data=data), start, torch.device("cpu"))
    try:
        return torch.stack(list(islice(iterator, count)))
    finally:
        iterator.close()


def test_a_loader_of_mixed_windows_continues_from_any_step(config):
    whole = batches(config, 0, 20)
    for start in (1, 11, 12):
        assert torch.equal(batches(config, start, 8), whole[start : start + 8])


@pytest.mark.slow
def test_loader_processes_do_not_change_the_batches_of_mixed_windows(config):
    whole = batches(config, 4, 30)
    for workers in (1, 2):
        assert torch.equal(batches(config, 4, 30, workers=workers, prefetch=1), whole)


def test_windows_of_a_large_row_share_the_rows_of_one_mesh(config, monkeypatch):
    monkeypatch.setattr(pipeline, "LARGE_ROW_MEASUREMENTS", 150)
    monkeypatch.setattr(rows_module, "_KEPT_MEASUREMENTS", 0)
    blocks, read = blocks_of(config, windows_per_read=8), []
    record = blocks.rows.record
    monkeypatch.setattr(blocks.rows, "record", lambda i: read.append(i) or record(i))
    drawn = blocks.draw(0, 0)
    assert len(drawn) == 32 and 4 < len(read) <= 4 * 13
    assert len({row.to_bytes() for row, *_ in drawn[::4]}) == 8  # each with measurements of its own
