"""Parquet as a dump: tables of one packet a row, and exports of the Atlas table in BigQuery."""

import datetime as dt

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pings import ndjson, ping, write

from ping_llm.data.ingest import tables
from ping_llm.data.ingest.prepare import prepare
from ping_llm.data.ingest.results import DROPPED_LINES
from ping_llm.data.ingest.unpack import DamagedDump
from ping_llm.data.measurement import format_address
from ping_llm.data.rows import RowReader

WHEN = dt.datetime(2023, 11, 14, 22, 13, 20, 700_000)
TIME_S = 1_700_000_000


def row(**changes):
    """A row of the reference schema."""
    return {
        "msm_id": 1001,
        "event_time": WHEN,
        "src_addr": "192.0.2.1",
        "dst_addr": "198.51.100.7",
        "ip_version": 4,
        "rtt": 19.5,
        "size": 48,
        "packet_error_count": 0,
    } | changes


def exported(pings, **changes):
    """A row of a BigQuery export; each of `pings` changes the fields of a packet."""
    packet = dict.fromkeys(("timeout", "error", "error_message", "rtt", "reply_src_addr", "ttl", "dup"))
    return {
        "af": 4,
        "prb_id": 7,
        "msm_id": 1001,
        "src_addr": "192.0.2.1",
        "dst_addr": "198.51.100.7",
        "start_time": WHEN,
        "size": 48,
        "packets_sent": 3,
        "packets_received": 2,
        "pings": [packet | changed for changed in pings],
    } | changes


def save(path, rows, **options):
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    pq.write_table(table, path, **options)
    return path


def parse(folder, rows, packets="all"):
    """Measurements and counters of all batches of a file."""
    measurements, counters = [], {}
    for batch in tables.read_rows(save(folder / "rows", rows)):
        table, counts = tables.parse_rows(batch, packets)
        measurements += table.to_pylist()
        counters |= {name: counters.get(name, 0) + count for name, count in counts.items()}
    return measurements, {name: count for name, count in counters.items() if count}


@pytest.mark.parametrize(
    "event_time",
    [
        pa.array([WHEN], pa.timestamp("us")),
        pa.array([WHEN], pa.timestamp("ns")),
        pa.array([WHEN], pa.timestamp("ms", "UTC")),
        pa.array([WHEN.replace(tzinfo=dt.timezone(dt.timedelta(hours=5)))], pa.timestamp("us", "Asia/Karachi")),
        pa.array([TIME_S]),
    ],
)
def test_a_row_of_the_reference_schema_is_one_packet_of_an_unknown_probe(tmp_path, event_time):
    table = pa.Table.from_pylist([row()])
    table = table.set_column(table.column_names.index("event_time"), "event_time", event_time)
    ((measurement,), counters) = parse(tmp_path, table)
    want_time = TIME_S - 5 * 3600 if "Karachi" in str(event_time.type) else TIME_S
    assert (format_address(measurement["src"]), format_address(measurement["dst"])) == ("192.0.2.1", "198.51.100.7")
    assert (measurement["probe_id"], measurement["msm_id"], measurement["time_s"]) == (-1, 1001, want_time)
    assert (measurement["rtt_ms"], measurement["first_of_line"]) == (19.5, True)
    assert not counters


@pytest.mark.parametrize(
    ("bad", "counter"),
    [
        (dict.fromkeys(row()), "malformed_json"),
        (row(event_time=None), "no_timestamp"),
        (row(event_time=dt.datetime(1960, 1, 1)), "no_timestamp"),
        (row(dst_addr=None), "no_destination"),
        (row(dst_addr="host.example"), "bad_destination"),
        (row(dst_addr="10.1.2.3"), "private_destination"),
        (row(rtt=None), "no_result"),
        (row(rtt=float("nan")), "no_result"),
        (row(rtt=-2.0), "no_result"),
        (row(rtt=0.0), "no_result"),
        (row(rtt=1e9), "no_result"),
        (row(src_addr="192.168.0.1"), "no_source"),
        (row(src_addr=None), "no_source"),
    ],
)
def test_a_bad_row_goes_to_its_counter_and_its_neighbours_live(tmp_path, bad, counter):
    rows, counters = parse(tmp_path, [row(rtt=1.5), bad, row(rtt=-1.0)])
    assert [r["rtt_ms"] for r in rows] == [1.5, -1]
    assert counters == {counter: 1}


def test_packets_of_an_export_follow_the_rules_of_json(tmp_path):
    pings = [
        {"timeout": True},
        {"rtt": 30.5, "dup": False, "timeout": False, "error": False},
        {"rtt": 1210.5, "dup": True},
        {"error": True, "error_message": "sendto failed: Network is unreachable"},
        {"error": True, "error_message": "socket failed"},
        {},
    ]
    rows, counters = parse(tmp_path, [exported(pings), exported([{"rtt": 7.5}], prb_id=8)])
    assert [(r["probe_id"], r["rtt_ms"], r["packet"]) for r in rows] == [
        (7, -1, 0),
        (7, 30.5, 1),
        (7, -1, 2),
        (8, 7.5, 0),
    ]
    assert not counters
    lines = [ping(result=[{"rtt": 5.5}, {"x": "*"}, {"rtt": 7.5}], timestamp=TIME_S + i) for i in range(50)]
    json_rows = prepare([write(tmp_path / "a.json", ndjson(*lines))], tmp_path / "json", workers=1, split="none")
    export = [
        exported([{"rtt": 5.5}, {"timeout": True}, {"rtt": 7.5}], start_time=WHEN + dt.timedelta(seconds=i))
        for i in range(50)
    ]
    table_rows = prepare([save(tmp_path / "a.parquet", export)], tmp_path / "table", workers=1, split="none")
    assert json_rows["lines"] == table_rows["lines"]
    shards = [next((tmp_path / name).glob("train-*")).read_bytes() for name in ("json", "table")]
    assert shards[0] == shards[1]


@pytest.mark.parametrize(
    ("bad", "counter"),
    [
        (exported([]), "no_result"),
        (exported([]) | {"pings": None}, "no_result"),
        (exported([{"rtt": 5.5, "dup": True}]), "no_result"),
        (exported([{"error": True, "error_message": "address not allowed"}], src_addr=None), "local_error"),
        (exported([{"error_message": "dns resolution failed"}], src_addr=None, dst_addr=None), "no_destination"),
    ],
)
def test_a_bad_row_of_an_export_goes_to_its_counter(tmp_path, bad, counter):
    good = exported([{"rtt": 5.5, "timeout": False, "error": False, "dup": False, "error_message": "x"}])
    assert parse(tmp_path, [good, bad])[1] == {counter: 1}


def test_lists_that_are_wrapped_in_structs_are_lists(tmp_path):
    plain = pa.Table.from_pylist([exported([{"rtt": 5.5}, {"rtt": 6.5}])])
    packets = plain["pings"].combine_chunks()
    elements = pa.StructArray.from_arrays([packets.values], names=["element"])
    wrapped = pa.StructArray.from_arrays([pa.ListArray.from_arrays(packets.offsets, elements)], names=["list"])
    table = plain.set_column(plain.column_names.index("pings"), "pings", wrapped)
    assert parse(tmp_path, table) == parse(tmp_path, plain)


def test_a_table_is_recognised_by_content_and_prepared_beside_dumps(tmp_path):
    rows = [row(event_time=WHEN + dt.timedelta(seconds=i), src_addr=f"192.0.2.{i}") for i in range(200)]
    table = save(tmp_path / "no_suffix", rows, row_group_size=30)
    dump = write(tmp_path / "a.bz2", ndjson(ping()))
    manifest = prepare([table, dump], tmp_path / "out", workers=1, split="none", traceroute="hops")
    assert (manifest["lines"]["read"], manifest["lines"]["counters"]["kept"]) == (201, 201)


def test_batches_leave_no_trace(tmp_path, monkeypatch):
    rows = [row(rtt=float(i)) for i in range(1, 100)]
    whole = parse(tmp_path, rows)
    monkeypatch.setattr(tables, "BATCH_ROWS", 7)
    assert parse(tmp_path, rows) == whole


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"a": [1]},
            r"a\.parquet is a table with no address of the source .*, no address of the dest.*: it has a; leave it out",
        ),
        (
            {"src_addr": ["192.0.2.1"], "dst_addr": ["192.0.2.2"], "rtt": [1.0], "event_time": ["today"]},
            r"no measurement is left of 1 lines \(no_timestamp 1\)",
        ),
        (
            {"src_addr": ["192.0.2.1"], "dst_addr": ["192.0.2.2"], "pings": [[{"rtt": 1.0}]], "start_time": ["today"]},
            "start_time is of type string; make it a timestamp",
        ),
        (
            {"src_addr": ["192.0.2.1"], "dst_addr": ["192.0.2.2"], "pings": [1.0], "start_time": [1]},
            "pings is of type double; make it a list of structs",
        ),
    ],
)
def test_another_table_is_one_clear_line(tmp_path, table, message):
    path = save(tmp_path / "a.parquet", pa.table(table))
    with pytest.raises(ValueError, match=message):
        prepare([path], tmp_path / "out", workers=1)


@pytest.mark.parametrize(
    "changes",
    [
        {"rtt": np.float16([19.5])},
        {"event_time": ["2023-11-14T22:13:20.7"]},
        {"event_time": [TIME_S + 0.7]},
        {"rtt": ["19.5"]},
        {"src_addr": pa.array(["192.0.2.1"]).dictionary_encode(), "event_time": [str(TIME_S)]},
    ],
)
def test_values_of_other_types_are_read_as_text(tmp_path, changes):
    columns = {
        "msm_id": [5],
        "event_time": [TIME_S],
        "src_addr": ["192.0.2.1"],
        "dst_addr": ["192.0.2.2"],
        "rtt": [19.5],
    }
    path = save(tmp_path / "a.parquet", pa.table(columns | changes))
    prepare([path], tmp_path / "out", workers=1, split="none")
    (found,) = next(iter(RowReader(tmp_path / "out", "train"))).to_measurements().to_pylist()
    assert (found["time_s"], round(found["rtt_ms"], 2), found["msm_id"]) == (TIME_S, 19.5, 5)


def test_a_cut_table_names_the_byte_and_a_corrupt_one_keeps_what_is_before(tmp_path):
    rng = np.random.default_rng(0)
    rows = [row(rtt=float(rng.gamma(2, 20))) for _ in range(3000)]
    path = save(tmp_path / "a.parquet", rows, row_group_size=1000, write_page_checksum=True)
    whole = path.read_bytes()
    column = pq.ParquetFile(path).metadata.row_group(1).column(5)
    path.write_bytes(whole[:5000])
    with pytest.raises(DamagedDump, match=r"a\.parquet is cut off or corrupt: no Parquet footer at byte 5,000 \("):
        list(tables.read_rows(path))
    broken = bytearray(whole)
    middle = column.dictionary_page_offset + column.total_compressed_size // 2
    broken[middle : middle + 40] = rng.bytes(40)
    path.write_bytes(broken)
    with pytest.raises(
        ValueError, match=r"a\.parquet is corrupt in row group 1, from byte [\d,]+ on .*get it again, or --"
    ):
        prepare([path], tmp_path / "out", workers=1)
    manifest = prepare([path], tmp_path / "out", workers=1, keep_going=True)
    assert manifest["lines"]["read"] == 1000


VALUES = st.none() | st.sampled_from(["192.0.2.1", "x", "", "10.0.0.1", "1", "-1", "5.5"]) | st.text(max_size=5)
COLUMN_TYPES = st.sampled_from(
    [
        *(pa.int8(), pa.int64(), pa.uint64(), pa.float32(), pa.string(), pa.large_string(), pa.binary(), pa.bool_()),
        *(pa.date32(), pa.timestamp("us", "UTC"), pa.duration("us"), pa.decimal128(10, 2), pa.null()),
        *(pa.dictionary(pa.int32(), pa.string()), pa.list_(pa.string()), pa.struct([("a", pa.int32())])),
    ]
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data(), count=st.integers(0, 5))
def test_columns_of_any_type_crash_nothing_and_every_row_is_counted_once(tmp_path_factory, data, count):
    columns = {"event_time": pa.array([TIME_S] * count, pa.int64())}
    for name in ("src_addr", "dst_addr", "rtt", "msm_id", "prb_id"):
        texts = pa.array(data.draw(st.lists(VALUES, min_size=count, max_size=count)), pa.string())
        kind = data.draw(COLUMN_TYPES)
        try:
            columns[name] = texts.cast(kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            columns[name] = pa.array([None] * count, kind)
    rows, counters = parse(tmp_path_factory.mktemp("table"), pa.table(columns))
    assert len(rows) + sum(counters.values()) == count
    assert set(counters) <= set(DROPPED_LINES)
