"""CSV, JSON lines and Parquet of any types as dumps: the same rows whatever they are written as, counted by hand."""

import csv
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pings import ndjson, ping, write
from test_repeats import kept

from ping_llm.data import text_table
from ping_llm.data.ingest import job_array
from ping_llm.data.ingest.prepare import plan_rows, prepare
from ping_llm.data.measurement import format_address
from ping_llm.data.rows import RowReader

SOURCE = "203.0.113.5"


def row(**changes):
    given = {
        "src_addr": "192.0.2.1",
        "dst_addr": "198.51.100.7",
        "event_time": "2023-11-14T22:13:20.7Z",
        "rtt": "19.5",
        "msm_id": "1001",
    }
    return given | changes


def as_csv(rows, delimiter=","):
    names = list(dict.fromkeys(name for one in rows for name in one))
    file = io.StringIO()
    writer = csv.DictWriter(file, names, delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def measured(folder, path, **options):
    """(probe, source, destination, time, RTT) of all measurements, and the counters."""
    manifest = prepare([path], folder / "out", workers=1, split="none", **options)
    rows = [r for one in RowReader(folder / "out", "train") for r in one.to_measurements().to_pylist()]
    counters = {name: count for name, count in manifest["lines"]["counters"].items() if count}
    assert sum(counters.values()) == manifest["lines"]["read"]
    found = [
        (r["probe_id"], format_address(r["src"]), format_address(r["dst"]), r["time_s"], round(r["rtt_ms"], 4))
        for r in rows
    ]
    return sorted(found), counters


ROWS = [
    row(),
    row(rtt="-1"),
    row(rtt="-1"),
    row(event_time="1700000060", rtt="1e1"),
    row(event_time="2023-11-14 22:15:20", rtt="7", src_addr="2001:db8::1", dst_addr="2001:db8::7"),
]
T = 1_700_000_000
PAIR = (-1, "192.0.2.1", "198.51.100.7")
MEASURED = [
    *((*PAIR, T, -1.0),) * 2,
    *((*PAIR, T, 19.5), (*PAIR, T + 60, 10.0)),
    (-1, "2001:db8::1", "2001:db8::7", T + 120, 7.0),
]


def files(folder):
    """The same table in every format."""
    typed = [one | {"rtt": float(one["rtt"])} for one in ROWS]
    numbers = [json.dumps(one | {"rtt": float(one["rtt"])}).encode() for one in ROWS]
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "text.parquet")
    pq.write_table(pa.Table.from_pylist(typed), folder / "typed.parquet")
    content = {
        "a.csv": as_csv(ROWS),
        "a.csv.gz": as_csv(ROWS),
        "a.tsv": as_csv(ROWS, "\t"),
        "semicolon": as_csv(ROWS, ";"),
        "marked.csv": b"\xef\xbb\xbf" + as_csv(ROWS),
        "a.jsonl": ndjson(*numbers),
        "text.jsonl.bz2": ndjson(*ROWS),
        "array.json": json.dumps(ROWS, indent=1).encode(),
    }
    return [write(folder / name, plain) for name, plain in content.items()] + sorted(folder.glob("*.parquet"))


def test_a_table_gives_the_same_rows_in_every_format(tmp_path):
    for path in files(tmp_path):
        assert measured(tmp_path / f"{path.name}.d", path) == (MEASURED, {"kept": 5}), path.name


@pytest.mark.parametrize(
    ("bad", "counter"),
    [
        (dict.fromkeys(row(), ""), "malformed_json"),
        (row(event_time=""), "no_timestamp"),
        (row(event_time="14.11.2023"), "no_timestamp"),
        (row(event_time="20231114"), "no_timestamp"),
        (row(event_time="2290-01-01T00:00:00Z"), "no_timestamp"),
        (row(dst_addr=""), "no_destination"),
        (row(dst_addr="host.example"), "bad_destination"),
        (row(dst_addr="10.0.0.1"), "private_destination"),
        (row(rtt=""), "no_result"),
        (row(rtt="fast"), "no_result"),
        (row(rtt="-2"), "no_result"),
        (row(rtt="1e9"), "no_result"),
        (row(src_addr="192.168.0.1"), "no_source"),
        (row(src_addr=""), "no_source"),
        ("192.0.2.1,198.51.100.7\n", "malformed_json"),
    ],
)
@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_bad_row_goes_to_its_counter_and_its_neighbours_live(tmp_path, bad, counter, form):
    first, last = row(rtt="1.5"), row(rtt="2.5")
    if isinstance(bad, str):
        pack = {"csv": as_csv([first]) + bad.encode() + as_csv([last]).partition(b"\n")[2]}
        pack["jsonl"] = ndjson(first, b'{"src_addr": "192.0.2.1", "rtt', last)
    else:
        pack = {"csv": as_csv([first, bad, last]), "jsonl": ndjson(first, bad, last)}
    found, counters = measured(tmp_path, write(tmp_path / "a", pack[form]))
    assert [one[-1] for one in found] == [1.5, 2.5]
    assert counters == {"kept": 2, counter: 1}


RESULT = {"fw": 5080, "lts": 21, "af": 4, "dst_addr": "198.51.100.7", "src_addr": "192.168.1.7", "from": "203.0.113.7"}
RESULT |= {
    "dup": 0,
    "rcvd": 2,
    "sent": 3,
    "min": 30.5,
    "avg": -1,
    "msm_id": 99,
    "prb_id": 7,
    "timestamp": T,
    "type": "ping",
}
EXPLODED = [
    {"rtt": "31.25", "x": "", "error": ""} | RESULT,
    {"rtt": "", "x": "*", "error": ""} | RESULT,
    {"rtt": "", "x": "*", "error": ""} | RESULT,
    {"rtt": "", "x": "", "error": "sendto failed: no route"} | RESULT,
    {"rtt": "", "x": "", "error": "socket failed"} | RESULT,
    {"rtt": "9.5", "x": "", "error": ""} | RESULT | {"lts": -1},
    {"rtt": "9.5", "x": "", "error": ""} | RESULT | {"type": "traceroute"},
    {"rtt": "9.5", "x": "", "error": ""} | RESULT | {"type": "dns"},
    {"rtt": "9.5", "x": "", "error": ""} | RESULT | {"dup": 1},
    {"rtt": "8.5", "x": "", "error": ""} | RESULT | {"prb_id": "8.0", "timestamp": f"{T}.0", "lts": ""},
]


@pytest.mark.parametrize("packets", ["one", "all"])
def test_an_export_of_a_packet_a_row_follows_the_rules_of_results(tmp_path, packets):
    found, counters = measured(tmp_path, write(tmp_path / "a.csv", as_csv(EXPLODED)), packets=packets)
    ends = ("203.0.113.7", "198.51.100.7", T)
    assert found == [*((7, *ends, -1.0),) * 3, (7, *ends, 31.25), (8, *ends, 8.5)]
    dropped = {"local_error": 1, "unsynced_clock": 1, "traceroute_off": 1, "not_ping": 1, "no_result": 1}
    assert counters == {"kept": 5} | dropped


@pytest.mark.parametrize("form", ["result{}{}", "result_{}_{}", "result.{}.{}", "result[{}].{}"])
def test_an_export_of_a_result_a_row_is_the_same_as_the_results_in_json(tmp_path, form):
    results = [
        [{"rtt": 31.25}, {"rtt": 30.5}, {"x": "*"}],
        [{"rtt": 140.125}, {"rtt": 61.5, "dup": 1}, {"error": "sendto failed: x"}],
        [{"error": "socket failed"}],
        [{"x": "*"}, {"x": "*"}, {"x": "*"}],
    ]
    lines = [ping(result=result, timestamp=T + 60 * i, prb_id=i % 2) for i, result in enumerate(results)]
    lines.append(lines[0])  # a repeat
    flat = []
    for line in lines:
        packets = {form.format(i, name): value for i, one in enumerate(line["result"]) for name, value in one.items()}
        flat.append({name: value for name, value in line.items() if name != "result"} | packets)
    table, dump = write(tmp_path / "a.csv", as_csv(flat)), write(tmp_path / "a.json", ndjson(*lines))
    for packets in ("one", "all"):
        want = measured(tmp_path / f"json-{packets}", dump, packets=packets)
        assert measured(tmp_path / f"csv-{packets}", table, packets=packets) == want
    assert want[1] == {"kept": 3, "duplicate": 1, "local_error": 1} and len(want[0]) == 8


def test_of_a_flattened_result_with_duplicates_nothing_is_kept_if_none_says_which_they_are(tmp_path):
    rows = [RESULT | {"result0rtt": 30.5, "result1rtt": 61.5, "dup": dup, "prb_id": dup} for dup in (0, 1)]
    found, counters = measured(tmp_path, write(tmp_path / "a.csv", as_csv(rows)), packets="all")
    assert [one[0] for one in found] == [0, 0] and counters == {"kept": 1, "no_result": 1}


PING_CSV = (
    b"date,host,ip,icmp,ttl,rtt,pack_loss\n"
    b"2023-11-14 22:13:20,host.example,198.51.100.20,1,53,31.2,33.3%\n"
    b"2023-11-14 22:13:21,host.example,198.51.100.20,2,53,,33.3%\n"
    b"2023-11-14 22:13:22,host.example,2001:db8::20,3,53,-1,33.3%\n"
)


def test_a_table_of_ping_takes_the_source_from_the_option(tmp_path):
    path = write(tmp_path / "a.csv", PING_CSV)
    found, counters = measured(tmp_path, path, source=SOURCE)
    assert found == [(-1, SOURCE, "198.51.100.20", T, 31.2), (-1, SOURCE, "2001:db8::20", T + 2, -1.0)]
    assert counters == {"kept": 2, "no_result": 1}
    with pytest.raises(ValueError, match=r"a\.csv is a table with no address of the source \(src_addr, or --source"):
        measured(tmp_path / "b", path)


def test_the_option_does_not_replace_a_source_that_is_in_the_table(tmp_path):
    rows = [row(), row(src_addr="192.168.0.1")]
    found, counters = measured(tmp_path, write(tmp_path / "a.csv", as_csv(rows)), source=SOURCE)
    assert [one[1] for one in found] == ["192.0.2.1"] and counters == {"kept": 1, "no_source": 1}


SOURCELESS = r"no address of the source \(src_addr"


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        (
            "probe_id,rtt,hop_count\n1001,17.25,0\n",
            rf"{SOURCELESS}.*no address of the destination.*no time \(event_time\)",
        ),
        ("#hostname\tlatitude\tlongitude\tmin(rtt)[ms]\nnode.example\t41.25\t2.25\t12.5\n", SOURCELESS),
        ("src_addr,dst_addr,event_time\n192.0.2.1,198.51.100.7,1700000000\n", r"table with no RTT \(rtt\): it has src"),
        ("src_addr,rtt,event_time\n192.0.2.1,5.5,1700000000\n", "table with no address of the destination"),
        ('[{"dst_name": "h.example", "timestamp": 1700000000, "avg_rtt": 3.5, "prb_id": 7}]', SOURCELESS),
        (json.dumps({"id": "x", "type": "ping", "results": [{"probe": {"asn": 1}, "result": {"rtt": 5}}]}), SOURCELESS),
        ('{"src_addr": "192.0.2.1", "dst_addr": "198.51.100.7", "rtt": 5.5}\n', r"table with no time \(event_time\)"),
        (
            '{"from": "192.0.2.1", "timestamp": 5, "result": []}\n',
            r"holds no address of the destination \(dst_addr\); l",
        ),
    ],
)
def test_what_a_file_lacks_is_named_beside_good_ones_too(tmp_path, text, missing):
    good = write(tmp_path / "good.json", ndjson(ping()))
    bad = write(tmp_path / "bad.gz", text.encode())
    with pytest.raises(ValueError, match=rf"bad\.gz .*{missing}"):
        prepare([good, bad], tmp_path / "out", workers=1)
    manifest = prepare([good, bad], tmp_path / "out", workers=1, keep_going=True, split="none")
    assert manifest["lines"]["counters"]["kept"] == 1 and "problem" in manifest["inputs"][0]


def test_results_whose_names_were_never_resolved_are_counted_though_none_has_a_destination(tmp_path):
    lost = ping(dst_addr=None, src_addr=None, result=[{"error": "dns resolution failed: x"}])
    paths = [write(tmp_path / "a.json", ndjson(ping())), write(tmp_path / "b.json", ndjson(lost, lost))]
    counters = prepare(paths, tmp_path / "out", workers=1, split="none")["lines"]["counters"]
    assert (counters["kept"], counters["no_destination"]) == (1, 2)


def test_batches_leave_no_trace_and_quoted_fields_may_hold_anything(tmp_path, monkeypatch):
    rows = [row(rtt=f"{i}.5", note='a,"b"\nc') for i in range(1, 100)]
    path = write(tmp_path / "a.csv", as_csv(rows))
    whole = kept(tmp_path / "whole", path)
    assert whole == (99, 0, [i + 0.5 for i in range(1, 100)])
    monkeypatch.setattr(text_table, "BATCH_ROWS", 7)
    assert kept(tmp_path / "cut", path) == whole


def test_a_mixed_folder_is_planned_prepared_and_done_by_a_job_array(tmp_path, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    write(folder / "a.json.bz2", ndjson(ping()))
    write(folder / "b.csv", as_csv(ROWS))
    write(folder / "c.log", b"[1700000000.5] 64 bytes from 198.51.100.20: icmp_seq=1 ttl=53 time=31.2 ms\n")
    write(folder / "d.csv.gz", PING_CSV)
    write(folder / "e.json", json.dumps({"raw": [ping(timestamp=T + 900)]}).encode())
    write(folder / "f.json", b"[]")
    assert "6 files" in plan_rows([folder]).describe()
    want = prepare([folder], tmp_path / "here", workers=1, split="none", source=SOURCE)
    assert want["lines"]["counters"]["kept"] == 1 + 5 + 1 + 2 + 1
    assert want["empty_inputs"] == 1 and want["measurements"]["written"] == 10
    for _ in range(2):
        with pytest.raises(SystemExit):
            prepare([folder], tmp_path / "array", split="none", source=SOURCE, executor="array")
        assert job_array.main([str(tmp_path / "array" / ".partial" / job_array.TASKS_NAME), "0", "1"]) == 0
    assert prepare([folder], tmp_path / "array", split="none", source=SOURCE, executor="array") == want
    shards = [[path.read_bytes() for path in sorted((tmp_path / name).glob("train-*"))] for name in ("here", "array")]
    assert shards[0] == shards[1]
