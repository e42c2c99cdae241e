"""What repeats what: packets of results by their place, rows of a packet by how often the other file holds them."""

from collections import Counter

import numpy as np
import pytest
from pings import ndjson, ping, write
from test_tables import TIME_S, exported, row, save

from ping_llm.data.ingest import tables
from ping_llm.data.ingest.prepare import prepare
from ping_llm.data.ingest.repeats import number_packets
from ping_llm.data.ingest.results import ROW_PACKET
from ping_llm.data.rows import RowReader


def kept(folder, *inputs, **options):
    """Lines kept and repeated, and the RTTs of all measurements, ascending."""
    manifest = prepare(list(inputs), folder, workers=1, split="none", shards=2, **options)
    rtts = [rtt for one in RowReader(folder, "train") for rtt in one.to_measurements()["rtt_ms"].to_pylist()]
    counters = manifest["lines"]["counters"]
    return counters["kept"], counters["duplicate"], sorted(round(rtt, 2) for rtt in rtts)


@pytest.mark.parametrize("whole_ms", [False, True])
def test_equal_packets_of_one_ping_are_no_repeats(tmp_path, whole_ms, monkeypatch):
    monkeypatch.setattr(tables, "BATCH_ROWS", 7)  # a ping's rows lie in two batches
    rows = [
        row(event_time=TIME_S + 60 * i, rtt=-1.0 if i % 2 else 10.0 if whole_ms else 10 + k / 4)
        for i in range(100)
        for k in range(3)
    ]
    lines, repeated, rtts = kept(tmp_path / "out", save(tmp_path / "packets.parquet", rows))
    assert (lines, repeated, len(rtts)) == (300, 0, 300)
    assert rtts.count(-1) == 150  # every second ping lost all three


def test_where_two_tables_overlap_rows_are_kept_once(tmp_path):
    first = [row(event_time=TIME_S + i, rtt=rtt) for i in range(4) for rtt in (-1.0, -1.0, 5.0)]
    second = [row(event_time=TIME_S + i, rtt=rtt) for i in range(2, 6) for rtt in (5.0, -1.0, -1.0, -1.0)]
    a, b = save(tmp_path / "a.parquet", first), save(tmp_path / "b.parquet", second)
    # Of seconds 2 and 3 the second table repeats the reply and two of its three losses.
    want = Counter({-1.0: 2 * 2 + 2 * 3 + 2 * 3, 5.0: 6})
    for i, inputs in enumerate([(a, b), (b, a)]):
        lines, repeated, rtts = kept(tmp_path / f"out{i}", *inputs)
        assert (lines, repeated) == (22, 6)
        assert Counter(rtts) == want
    copy = save(tmp_path / "copy.parquet", first[::-1])
    assert kept(tmp_path / "twice", a, copy)[:2] == (12, 12)


def test_rows_that_differ_in_anything_are_no_repeats(tmp_path):
    changes = [{}, {"msm_id": 1002}, {"src_addr": "192.0.2.2"}, {"dst_addr": "198.51.100.8"}, {"rtt": 19.625}]
    tables_ = [save(tmp_path / f"{i}.parquet", [row(**change)]) for i, change in enumerate(changes)]
    assert kept(tmp_path / "out", *tables_)[:2] == (5, 0)


@pytest.mark.parametrize("packets", ["one", "all"])
def test_the_packets_of_a_result_may_be_equal_and_a_result_that_stands_twice_is_kept_once(tmp_path, packets):
    lost = [{"x": "*"}] * 3
    dump = write(tmp_path / "a.json", ndjson(ping(result=lost), ping(result=lost, timestamp=TIME_S + 9)))
    again = write(tmp_path / "b.json", ndjson(ping(result=lost)))
    each = 3 if packets == "all" else 1
    assert kept(tmp_path / "json", dump, again, packets=packets) == (2, 1, [-1] * 2 * each)
    export = save(tmp_path / "e.parquet", [exported([{"timeout": True}] * 3)] * 2)
    assert kept(tmp_path / "export", export, packets=packets) == (1, 1, [-1] * each)


def test_numbers_agree_with_a_slow_count():
    rng = np.random.default_rng(0)
    count = 400
    file, packet = rng.integers(0, 3, count), np.where(rng.random(count) < 0.7, ROW_PACKET, rng.integers(0, 3, count))
    rtt_ms = rng.choice(np.array([-1, 1.5, 2.5], np.float32), count)
    same = (rng.integers(0, 3, count), rng.integers(0, 2, count))
    number = number_packets(packet.astype(np.uint32), rtt_ms, file, same)
    seen, want = Counter(), []
    for i in range(count):
        pair = tuple(int(column[i]) for column in same)
        if packet[i] != ROW_PACKET:
            want.append((*pair, "packet", int(packet[i])))
            continue
        equal = (*pair, "row", float(rtt_ms[i]))
        want.append((*equal, seen[(*equal, int(file[i]))]))
        seen[(*equal, int(file[i]))] += 1
    got = [(int(number[i]), *(int(column[i]) for column in same)) for i in range(count)]
    assert Counter(Counter(got).values()) == Counter(Counter(want).values())
    assert len(set(zip(got, want, strict=True))) == len(set(got)) == len(set(want))
