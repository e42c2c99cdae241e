"""Whatever a dump holds, nothing crashes, every line ends in one counter, and the counters add up."""

import json
import random

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pings import ndjson, ping, read_lines, write
from traceroutes import reply, trace

from ping_llm.data.ingest.atlas import _TRACEROUTE_COLUMNS, parse_results
from ping_llm.data.ingest.prepare import prepare
from ping_llm.data.ingest.results import DROPPED_LINES
from ping_llm.data.ingest.tasks import MapTask, map_dump
from ping_llm.data.ingest.traceroute import REPLIES
from ping_llm.data.ingest.unpack import DamagedDump

MODES = st.sampled_from(["off", "target", "hops"])
PACKETS = st.sampled_from(["one", "all"])
FUZZ = settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["192.0.2.1", "198.51.100.7", "2001:db8::1", "10.0.0.1", "*", "ping", "traceroute", "-1", "1e3"])
)
NAMES = st.sampled_from([*_TRACEROUTE_COLUMNS, "rtt", "x", "error", "err", "late", "dup", "hop"]) | st.text(max_size=3)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=5), max_leaves=20
)
REPLY_LIKE = (
    st.builds(
        lambda known, changes: known | changes,
        st.just(reply("203.0.113.1", 5.5)),
        st.dictionaries(NAMES, VALUES, max_size=2),
    )
    | VALUES
)
HOP_LIKE = st.builds(lambda entries: {"hop": 1, "result": entries}, st.lists(REPLY_LIKE, max_size=3) | VALUES) | VALUES
RESULT_LIKE = st.builds(
    lambda known, changes: known | changes,
    st.just(ping()) | st.builds(lambda hops: trace() | {"result": hops}, st.lists(HOP_LIKE, max_size=3) | VALUES),
    st.dictionaries(NAMES, VALUES, max_size=3),
)
LINES = (RESULT_LIKE | VALUES).map(lambda value: json.dumps(value).encode()) | st.binary(max_size=40)


def damaged(line: bytes, seed: int) -> bytes:
    """The line with a few bytes cut out, doubled or changed."""
    rng, line = random.Random(seed), bytearray(line)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(line) + 1)
        line[at : at + rng.randint(0, 5)] = rng.randbytes(rng.randint(0, 2)) * rng.randint(1, 3)
    return bytes(line)


HURT = st.builds(
    damaged,
    st.sampled_from([ping(), trace([reply("203.0.113.1", 5.5), {"x": "*"}])]).map(json.dumps).map(str.encode),
    st.integers(0, 2**32),
)


def assert_adds_up(counters: dict, kept: int, lines: int) -> None:
    assert kept + sum(counters.get(name, 0) for name in DROPPED_LINES) == lines
    assert set(counters) <= {*DROPPED_LINES, *REPLIES}
    assert min(counters.values(), default=0) >= 0


@FUZZ
@given(lines=st.lists(LINES | HURT, min_size=1, max_size=8), traceroute=MODES, packets=PACKETS)
@example(lines=[b'{"result": [{"result": [{"from": "203.0.113.1", "rtt": 1e999}]}]}'], traceroute="hops", packets="one")
@example(
    lines=[b'{"type": "\\ud800", "timestamp": 1}', b'{"prb_id": 99999999999999999999}'],
    traceroute="hops",
    packets="one",
)
def test_a_line_of_anything_is_counted_once(tmp_path_factory, lines, traceroute, packets):
    lines = [line.replace(b"\n", b" ") for line in lines]
    path = write(tmp_path_factory.mktemp("fuzz") / "dump", b"".join(line + b"\n" for line in lines))
    table, counters = parse_results(path, len(lines), packets, traceroute=traceroute)
    assert_adds_up(counters, sum(table["first_of_line"].to_pylist()), len(lines))
    rtts = [rtt for rtt in table["rtt_ms"].to_pylist() if rtt != -1]
    assert all(0 < rtt < 4.3e6 for rtt in rtts)


@FUZZ
@given(data=st.binary(max_size=600), suffix=st.sampled_from(["json", "bz2", "gz", "zst"]), cut=st.integers(0, 60))
def test_a_file_of_any_bytes_is_read_to_its_end_or_named_as_damaged(tmp_path_factory, data, suffix, cut):
    path = write(tmp_path_factory.mktemp("fuzz") / f"a.{suffix}", data)
    path.write_bytes(path.read_bytes()[: max(path.stat().st_size - cut, 0)])
    lines = b""
    try:
        for block in read_lines(path):
            lines += block
    except DamagedDump as error:
        assert error.args[0].startswith(f"a.{suffix} is ") and "\n" not in error.args[0]
    else:
        assert lines.endswith(b"\n") or not lines


@settings(FUZZ, max_examples=40)
@given(lines=st.lists(LINES | HURT, max_size=6), shape=st.sampled_from(["lines", "array", "latest"]), traceroute=MODES)
def test_a_dump_of_any_shape_adds_up(tmp_path_factory, lines, shape, traceroute):
    folder = tmp_path_factory.mktemp("fuzz")
    texts = {
        "lines": b"\n".join(lines),
        "array": b"[" + b",".join(lines) + b"]",
        "latest": b'{"7": [' + b",".join(lines) + b"]}",
    }
    path = write(folder / "a.json", texts[shape])
    report = map_dump(MapTask(path, path.name, folder / "input-00000", 3, "one", 86_400, traceroute))
    dropped = sum(report["counters"].get(name, 0) for name in DROPPED_LINES)
    assert 0 <= dropped <= report["lines"]
    assert report["problem"] is None or "\n" not in report["problem"]


@settings(FUZZ, max_examples=25)
@given(
    dumps=st.lists(st.lists(LINES | HURT, max_size=5), min_size=1, max_size=3),
    traceroute=MODES,
    packets=PACKETS,
    split=st.sampled_from(["pingbench", "none"]),
)
def test_whatever_the_dumps_a_run_adds_up_to_every_line(tmp_path_factory, dumps, traceroute, packets, split):
    folder = tmp_path_factory.mktemp("fuzz")
    paths = [write(folder / f"{i}.json", ndjson(*lines)) for i, lines in enumerate(dumps)]
    paths.append(write(folder / "good.json", ndjson(ping(), ping(), trace([reply("203.0.113.1", 5.5)]))))
    options = {"packets": packets, "split": split, "traceroute": traceroute, "keep_going": True, "workers": 1}
    manifest = prepare(paths, folder / "out", **options)
    lines, measurements = manifest["lines"], manifest["measurements"]
    assert lines["read"] == sum(lines["counters"].values()) == sum(entry["lines"] for entry in manifest["inputs"])
    assert lines["read"] >= 3 and lines["counters"]["kept"] >= 1
    assert sum(manifest["parts"].values()) == measurements["written"]
    if traceroute != "off" and packets == "all":
        pings = measurements["written"] + measurements["dropped_repeated"] + measurements["dropped_held_out"]
        assert pings >= measurements["reply_used"] >= 0


@pytest.mark.parametrize("depth", [10, 1000, 100_000])
@pytest.mark.parametrize("begin", ['{"result":', '{"a":', "["])
def test_deep_nesting_is_one_bad_line_or_one_damaged_dump(tmp_path, depth, begin):
    path = write(tmp_path / "a", begin.encode() * depth + b"\n" + ndjson(ping()))
    lines = b""
    try:
        for block in read_lines(path):
            lines += block
    except DamagedDump:
        assert begin == "["
    else:
        path.write_bytes(lines)
        table, counters = parse_results(path, 2, traceroute="hops")
        assert (table.num_rows, counters["malformed_json"]) == (1, 1)
