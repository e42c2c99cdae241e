"""However a bucket is cut into portions, its rows are those of the bucket sorted at once; the plan counts what it costs."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pings import ndjson, ping, write

from ping_llm.data.ingest import shuffle, tasks
from ping_llm.data.ingest.plan import Plan, bucket_count
from ping_llm.data.ingest.prepare import plan_rows, prepare
from ping_llm.data.ingest.shuffle import MAX_BUCKETS, read_portions


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def dumps(tmp_path_factory):
    """3,000 results of 60 probes of very different shares, a tenth of them twice, and 500 rows of sources alone."""
    folder, rng = tmp_path_factory.mktemp("dumps"), np.random.default_rng(1)
    probes = np.minimum(rng.geometric(0.05, 3000), 60)
    lines = [
        ping(
            prb_id=int(probe),
            timestamp=1_700_000_000 + 60 * i,
            src_addr=f"192.0.2.{probe}",
            dst_addr=f"198.51.{i % 50}.7",
            result=[{"rtt": float(rng.gamma(2, 20))} for _ in range(3)],
        )
        for i, probe in enumerate(probes)
    ]
    write(folder / "a.gz", ndjson(*lines[:2000], *lines[:150]))
    write(folder / "b.gz", ndjson(*lines[1900:], *lines[:50]))
    table = {
        "src_addr": [f"203.0.113.{i % 17}" for i in range(500)],
        "dst_addr": [f"198.51.{i % 50}.9" for i in range(500)],
        "event_time": [1_700_000_000 + 300 * i for i in range(500)],
        "rtt": rng.gamma(2, 20, 500).tolist(),
    }
    pq.write_table(pa.table(table), folder / "c.parquet")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("portion", [1, 40, 700])
@pytest.mark.parametrize("options", [{}, {"split": "none", "packets": "all", "shards": 2}])
def test_portions_leave_no_trace_in_the_rows(dumps, tmp_path, monkeypatch, portion, options):
    monkeypatch.setattr(tasks, "CHUNK_BYTES", 100_000)
    prepare(dumps, tmp_path / "whole", workers=1, **options)
    monkeypatch.setattr(shuffle, "PORTION_MEASUREMENTS", portion)
    real, sizes = tasks.read_portions, []

    def counted(*arguments):
        tables = list(real(*arguments))
        sizes.append(len(tables))
        return tables

    monkeypatch.setattr(tasks, "read_portions", counted)
    prepare(dumps, tmp_path / "portions", workers=1, **options)
    assert max(sizes) > (2 if portion < 700 else 0)
    assert files(tmp_path / "portions") == files(tmp_path / "whole")


def test_a_portion_holds_whole_groups_that_ascend_and_little_more_than_it_may(dumps, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "CHUNK_BYTES", 100_000)
    monkeypatch.setattr(shuffle, "PORTION_MEASUREMENTS", 200)
    inputs = [tmp_path / dump.name for dump in dumps]
    for dump, folder in zip(dumps, inputs, strict=True):
        tasks.map_dump(tasks.MapTask(dump, dump.name, folder, 1, "one", 86_400))
    portions = list(read_portions(inputs, 0, tmp_path / "scratch"))
    assert not (tmp_path / "scratch").exists() and len(portions) > 10
    keys = [
        {
            (p < 0, p if p >= 0 else src)
            for p, src in zip(*map(pa.Table.to_pydict(t).get, ("probe_id", "src")), strict=True)
        }
        for t in portions
    ]
    assert all(max(one) < min(other) for one, other in pairwise(keys))
    group = max(np.unique(pa.concat_tables(portions)["probe_id"].to_numpy(), return_counts=True)[1][1:])
    assert max(map(len, portions)) < 200 + group
    assert sum(map(len, portions)) == 2150 + 1150 + 500
    assert [sorted(set(t["input"].to_pylist())) for t in portions][-1] == [2]


def test_one_group_that_is_larger_than_a_portion_stays_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(shuffle, "PORTION_MEASUREMENTS", 10)
    dump = write(tmp_path / "a", ndjson(*(ping(timestamp=i) for i in range(1, 100))))
    tasks.map_dump(tasks.MapTask(dump, "a", tmp_path / "in", 1, "one", 86_400))
    assert [len(table) for table in read_portions([tmp_path / "in"], 0, tmp_path / "scratch")] == [99]


def test_a_month_is_shuffled_into_256_buckets_and_the_plan_counts_what_that_costs(tmp_path):
    hours = [(".bz2", 260_000_000)] * 720
    plan = Plan(tuple(hours), "one", bucket_count(hours, "one"), 16, "local")
    assert plan.buckets == MAX_BUCKETS == 256
    assert 36_000 < plan.pieces < 40_000  # 7 million results of 480 bytes an hour
    assert plan.portions == 20  # of 5 thousand million measurements
    unpack = 720 * 260e6 / 37 / 95_000
    assert 0 < plan.shuffle_seconds < unpack / 4
    assert f"{plan.pieces:,} pieces × 256 buckets" in plan.describe()
    # Each batch is written once and read twice, and once more up to 1.5 portions; then all are cut at 2 million a second.
    batches, measurements = plan.pieces * 256, 720 * 260e6 / 37
    assert plan.shuffle_seconds == pytest.approx(
        batches * (80e-6 + (2 + 1.5 / 20) * 200e-6) + measurements / 2e6, rel=1e-9
    )
    assert plan.row_bytes == pytest.approx(7 * measurements + 256 * 11 * 90_000)  # 11 parts
    small = Plan(((".bz2", 10_000_000),), "one", 4, 1, "local")
    assert small.portions == 1 and small.shuffle_seconds < 0.01 * small.seconds


def test_the_plan_takes_no_less_than_its_largest_dump_whatever_the_workers():
    """37 MB of bz2 are a million results: 10.53 s to unpack, 2 to parse, and 8 pieces of 4 batches of 80 µs. The
    four buckets take 2 s to sort, and 8 × 4 reads of 200 µs."""
    dump = (".bz2", 37_000_000)
    of_dump, of_buckets = 1e6 / 95_000 + 2 + 32 * 80e-6, 2 + 32 * 200e-6
    for workers, dumps, expected in (
        (1, 1, of_dump + of_buckets),
        (2, 1, of_dump + of_buckets / 2),
        (500, 1, of_dump + of_buckets / 4),
        (2, 4, 2 * of_dump + 4 * of_buckets / 2),
    ):
        plan = Plan((dump,) * dumps, "one", 4, workers, "local")
        assert plan.seconds == pytest.approx(expected, rel=1e-9)
        assert plan.core_seconds == pytest.approx(dumps * (of_dump + of_buckets), rel=1e-9)


def test_more_shards_than_buckets_may_be_are_as_many_as_may_be(tmp_path):
    dump = write(tmp_path / "a.json", ndjson(ping()))
    assert plan_rows([dump], shards=7).buckets == 7
    assert plan_rows([dump], shards=6000).buckets == 256
