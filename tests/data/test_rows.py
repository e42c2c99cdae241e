import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_row, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from ping_llm.cli import main
from ping_llm.config import Config, ModelConfig
from ping_llm.data import rows as rows_module
from ping_llm.data.measurement import MEASUREMENT_SCHEMA, byte_matrix, pack_address
from ping_llm.data.pipeline import WindowBlocks
from ping_llm.data.rows import (
    FORMAT_VERSION,
    INDEX_NAME,
    INDEX_SCHEMA,
    MANIFEST_NAME,
    ProbeRow,
    RowReader,
    ShardWriter,
    read_manifest,
    shard_name,
)

HOSTS = [pack_address(text) for text in ("192.0.2.1", "198.51.100.7", "203.0.113.9", "2001:db8::1", "2001:db8:1::2")]


def table(size, seed=0, probe_id=7):
    rng = np.random.default_rng(seed)
    dst = rng.integers(5, size=size)
    columns = {
        "probe_id": np.full(size, probe_id),
        "msm_id": rng.integers(1, 4, size),
        "time_s": np.sort(rng.integers(1_600_000_000, 1_700_000_000, size)),
        "src": pa.array([HOSTS[i] for i in rng.integers(2, size=size)], pa.binary(16)),
        "dst": pa.array([HOSTS[i] for i in dst], pa.binary(16)),
        "ip_version": np.where(dst < 3, 4, 6),
        "rtt_ms": np.where(rng.random(size) < 0.2, -1, rng.gamma(2, 30, size)),
        "kind": rng.integers(0, 3, size),
    }
    return pa.table({name: pa.array(columns[name], MEASUREMENT_SCHEMA.field(name).type) for name in columns})


def row_of(measurements):
    """A row of a table with the columns of MEASUREMENT_SCHEMA, of one probe and already in time order."""
    src, dst = (measurements[name].combine_chunks().dictionary_encode() for name in ("src", "dst"))
    columns = {name: measurements[name].to_numpy() for name in ("time_s", "msm_id", "rtt_ms", "kind")}
    columns |= {"src": src.indices.to_numpy(), "dst": dst.indices.to_numpy()}
    addresses = {"src_addresses": byte_matrix(src.dictionary), "dst_addresses": byte_matrix(dst.dictionary)}
    return ProbeRow.from_codes(measurements["probe_id"][0].as_py(), **columns, **addresses)


def write_folder(folder, rows, max_row_bytes=8_000_000):
    with ShardWriter(folder / shard_name("train", 0, 1), "train", 0, max_row_bytes) as shard:
        for row in rows:
            shard.write(row)
    pq.write_table(pa.Table.from_pylist(shard.index, INDEX_SCHEMA), folder / INDEX_NAME)
    (folder / MANIFEST_NAME).write_text(f'{{"format_version": {FORMAT_VERSION}, "parts": {{"train": 1, "val": 0}}}}')
    return RowReader(folder, "train")


@settings(deadline=None, max_examples=30)
@given(size=st.integers(1, 400), seed=st.integers(0, 1000))
def test_a_row_survives_the_way_to_bytes_and_back(size, seed):
    measurements = table(size, seed)
    row = ProbeRow.from_bytes(row_of(measurements).to_bytes())
    assert row.to_measurements() == measurements


def test_codes_into_larger_tables_keep_only_their_addresses():
    everything = np.frombuffer(b"".join(HOSTS), dtype=np.uint8).reshape(-1, 16)
    columns = (
        np.array([5, 6]),
        np.array([1, 1]),
        np.array([2, 2]),
        np.array([4, 0]),
        np.array([1, -1], np.float32),
        np.zeros(2, np.uint8),
    )
    row = ProbeRow.from_bytes(ProbeRow.from_codes(7, *columns, everything, everything).to_bytes())
    assert row.src_addresses.tolist() == everything[[2]].tolist()
    assert row.dst_addresses[row.dst].tolist() == everything[[4, 0]].tolist()


def test_a_large_row_is_halved_until_its_records_fit(tmp_path):
    measurements = table(5000)
    row = row_of(measurements)
    limit = len(row.to_bytes()) // 3
    reader = write_folder(tmp_path, [row], limit)
    assert len(reader) == 4
    assert all(len(part.to_bytes()) <= limit for part in reader)
    assert pa.concat_tables([part.to_measurements() for part in reader]) == measurements


def test_the_index_says_what_a_row_holds_without_reading_it(tmp_path):
    tables = [table(50, seed, probe_id=seed) for seed in range(3)]
    reader = write_folder(tmp_path, map(row_of, tables))
    assert reader.probe_id.tolist() == [0, 1, 2]
    assert reader.measurements.tolist() == [50, 50, 50]
    assert reader.ipv6_measurements.tolist() == [int((t["ip_version"].to_numpy() == 6).sum()) for t in tables]
    assert reader.first_time_s.tolist() == [t["time_s"][0].as_py() for t in tables]
    assert reader.last_time_s.tolist() == [t["time_s"][-1].as_py() for t in tables]
    assert [row.to_measurements() for row in pickle.loads(pickle.dumps(reader))] == tables


def test_shards_with_the_same_rows_are_the_same_bytes(tmp_path):
    shards = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_folder(tmp_path / name, [row_of(table(20_000, seed)) for seed in range(4)])
        shards.append((tmp_path / name / shard_name("train", 0, 1)).read_bytes())
    assert shards[0] == shards[1]


class FirstVersionRow(ProbeRow):
    """A row whose record has no kinds, as in version 1 of the format."""

    def to_bytes(self):
        with pa.ipc.open_stream(super().to_bytes()) as reader:
            old = reader.read_next_batch().drop_columns(["kind"])
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, old.schema) as writer:
            writer.write_batch(old)
        return sink.getvalue().to_pybytes()


@pytest.fixture
def first_version(tmp_path):
    """A folder as version 1 of the format left it, with the one part val; and its tables by part."""
    tables = {"train": table(3000, 1), "val": table(200, 2)}
    index = []
    for part, measurements in tables.items():
        with ShardWriter(tmp_path / shard_name(part, 0, 1), part, 0) as shard:
            shard.write(FirstVersionRow(**vars(row_of(measurements))))
        index += shard.index
    pq.write_table(pa.Table.from_pylist(index, INDEX_SCHEMA), tmp_path / INDEX_NAME)
    parts = {"train": 3000, "val": 200, "test-s1": 0}
    manifest = {"format_version": 1, "parts": parts, "lines": {"read": 3200, "counters": {"kept": 3200}}}
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(manifest))
    return tmp_path, tables


def test_rows_of_version_1_are_read_as_pings(first_version):
    folder, tables = first_version
    for part, measurements in tables.items():
        (row,) = RowReader(folder, part)
        assert row.kind.dtype == np.uint8 and not row.kind.any()
        assert row.to_measurements().drop("kind") == measurements.drop("kind")


def test_windows_are_drawn_from_rows_of_version_1_and_they_can_be_inspected(first_version, capsys):
    folder, _ = first_version
    config = Config(model=ModelConfig(seq_len=128))
    for part in ("train", "val"):
        windows = WindowBlocks(RowReader(folder, part), config, 4, 1)[0]
        assert windows.shape[-1] == 129 and (windows >= 0).any()
    assert main(["inspect", str(folder), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["measurements"] == 3200 and summary["parts"]["val"] == 200
    assert main(["inspect", str(folder)]) == 0


def test_val_is_all_parts_of_its_band_in_order(tmp_path):
    parts = {part: [make_row(40 + i, seed=i)] for i, part in enumerate(("train", "val-s1", "val-s3", "test-s1"))}
    folder = write_rows(tmp_path, parts, shards=1)
    reader = RowReader(folder, "val")
    assert reader.parts == ["val-s1", "val-s3"]
    assert reader.measurements.tolist() == [len(row) for row in reader] == [41, 42]
    assert [len(row) for row in RowReader(folder, "val-s3")] == [42]
    (folder / shard_name("val-s1", 0, 1)).unlink()
    with pytest.raises(ValueError, match=r"every shard of val-s1 in .* is missing or damaged"):
        RowReader(folder, "val")


def test_missing_rows_and_parts_are_reported_with_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r'no rows in .*; run "ping-llm prepare'):
        RowReader(tmp_path, "train")
    write_folder(tmp_path, [row_of(table(5))])
    with pytest.raises(ValueError, match=r'holds no "val" rows, only train \(1\)'):
        RowReader(tmp_path, "val")
    (tmp_path / MANIFEST_NAME).write_text('{"format_version": 0}')
    with pytest.raises(ValueError, match="is of row format 0, this program reads"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST_NAME).write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        read_manifest(tmp_path)


def test_rows_of_a_small_part_are_read_once_and_those_of_a_larger_one_each_time(rows_folder, monkeypatch):
    for kept, times in ((1 << 21, 1), (100, 2)):
        monkeypatch.setattr(rows_module, "_KEPT_MEASUREMENTS", kept)
        reader, read = RowReader(rows_folder, "train"), []
        record = reader.record
        monkeypatch.setattr(reader, "record", lambda i, record=record, read=read: read.append(i) or record(i))
        assert [reader[3].to_bytes(), reader[5].to_bytes()] == [reader[3].to_bytes(), record(5)]
        assert read.count(3) == times and len(read) == times + 1
