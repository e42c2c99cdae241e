"""Every oddity that Atlas results are known for has a line, written by hand, and an outcome."""

import json
from collections import Counter
from pathlib import Path

import pytest
from paths import SHARED_DATA
from pings import ndjson, ping

from ping_llm.data.ingest.atlas import parse_results
from ping_llm.data.ingest.results import DROPPED_LINES
from ping_llm.data.measurement import format_address

ODDITIES = [
    json.loads(line) for line in (Path(__file__).parent / "fixtures" / "oddities.jsonl").read_text().splitlines()
]
REAL = SHARED_DATA / "fixtures" / "real_variety.jsonl"


def outcome(folder: Path, line: dict | bytes) -> str | dict:
    """The counter that took the line, or its source, destinations and RTTs; between two lines that are as usual."""
    path = folder / "dump"
    path.write_bytes(ndjson(ping(prb_id=1), line, ping(prb_id=2)))
    table, counters = parse_results(path, 3, "all", traceroute="hops")
    rows = table.to_pylist()
    own = [row for row in rows if row["probe_id"] not in (1, 2)]
    assert len(rows) - len(own) == 6, "the neighbours are hurt"
    counted = [name for name in DROPPED_LINES if counters[name]] if not own else []
    assert sum(counters.get(name, 0) for name in DROPPED_LINES) == (0 if own else 1)
    if counted:
        return counted[0]
    (src,) = {format_address(row["src"]) for row in own}
    return {"src": src, "dst": [format_address(row["dst"]) for row in own], "rtt_ms": [row["rtt_ms"] for row in own]}


@pytest.mark.parametrize("oddity", ODDITIES, ids=[oddity["why"] for oddity in ODDITIES])
def test_an_oddity_has_its_outcome(tmp_path, oddity):
    line = oddity["line"] if "line" in oddity else oddity["raw"].encode("latin-1")  # so that any byte can be written
    assert outcome(tmp_path, line) == oddity["expect"]


def test_every_counter_of_lines_has_an_oddity():
    taken = {oddity["expect"] for oddity in ODDITIES if isinstance(oddity["expect"], str)}
    assert taken == set(DROPPED_LINES) - {"traceroute_off"}  # which needs the option


def counter_by_tags(tags: list[str], result: dict) -> str:
    """What must become of a real result, by what its tags say is odd about it."""
    errors = [entry["error"] for entry in result["result"] if "error" in entry]
    if "error" in tags and len(errors) == len(result["result"]) and not any(e.startswith("sendto") for e in errors):
        return "local_error"
    if "no_from" in tags:  # in all of these, src_addr is private
        return "no_source"
    if "lts_bad" in tags and not 0 <= result["lts"] <= 86_400:
        return "unsynced_clock"
    return "kept"


def counted_by_tags(folder: Path, tagged: list[tuple[list[str], dict]]) -> Counter:
    """What became of results, which must be what their tags say."""
    counted = Counter()
    for tags, result in tagged:
        got = outcome(folder, result)
        want = counter_by_tags(tags, result)
        assert (got if isinstance(got, str) else "kept") == want, tags
        counted[want] += 1
        if want == "kept":
            packets = [entry for entry in result["result"] if "dup" not in entry]
            assert got["rtt_ms"] == pytest.approx([entry.get("rtt", -1) for entry in packets])
    return counted


def test_results_that_are_odd_in_several_ways_land_in_the_right_counter(tmp_path):
    errors = [{"error": "connect failed: Network is unreachable"}]
    tagged = [
        (["dup"], ping(result=[{"rtt": 30.5}, {"rtt": 61.5, "dup": 1}, {"rtt": 29.5}])),
        (["timeout"], ping(result=[{"x": "*"}, {"rtt": 2000.5}, {"x": "*"}])),
        (["error", "no_src"], ping(result=errors, src_addr=None)),
        (["error"], ping(result=[{"error": "sendto failed: no route"}, {"rtt": 5.5}])),
        (["error"], ping(result=[{"error": "sendto failed: no route"}] * 3)),
        (["no_from"], ping(src_addr="192.168.1.7", from_="")),
        (["no_src"], ping(src_addr=None)),
        (["lts_bad"], ping(lts=-1)),
        (["lts_bad"], ping(lts=86_401)),
        (["lts_bad"], ping(lts=86_400)),
        (["old"], ping(fw=4460, mver=None, type=None)),
    ]
    assert counted_by_tags(tmp_path, tagged) == {"kept": 7, "local_error": 1, "no_source": 1, "unsynced_clock": 2}


def test_real_results_land_in_the_right_counter(tmp_path):
    if not REAL.exists():
        pytest.skip("needs the real results in ../shared/data, which are not part of the project")
    lines = map(json.loads, REAL.read_text().splitlines())
    counted = counted_by_tags(tmp_path, [(line["tags"], line["result"]) for line in lines])
    assert counted == {"kept": 95, "local_error": 10, "no_source": 11, "unsynced_clock": 8}
