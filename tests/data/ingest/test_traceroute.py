"""Traceroutes: which replies become measurements, and the counter that each of the others ends in."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pings import ndjson, ping, write
from test_atlas import ADDRESSES, address_of, is_public_address
from traceroutes import reply, trace

from ping_llm.data.ingest.atlas import parse_results
from ping_llm.data.ingest.prepare import prepare, summary
from ping_llm.data.ingest.results import DROPPED_LINES
from ping_llm.data.ingest.traceroute import REPLIES
from ping_llm.data.measurement import KINDS, format_address
from ping_llm.data.rows import RowReader

TARGET = "198.51.100.7"
PATH = (
    [reply("192.168.0.1", 0.5), reply("192.168.0.1", 0.4), reply("192.168.0.1", 0.6)],
    [reply("203.0.113.1", 5.5), {"x": "*"}, reply("203.0.113.2", 6.5)],
    [{"x": "*"}, {"x": "*"}, {"x": "*"}],
    [reply(TARGET, 19.5), reply(TARGET, 20.5), {"x": "*"}],
)


def parse(folder, *lines, traceroute="hops", packets="all"):
    path = folder / "dump"
    path.write_bytes(ndjson(*lines))
    table, counters = parse_results(path, len(lines), packets, traceroute=traceroute)
    return table.to_pylist(), {name: count for name, count in counters.items() if count}


def replies_of(rows):
    return [(format_address(row["dst"]), row["rtt_ms"]) for row in rows]


def test_hops_takes_every_public_reply_and_target_those_of_the_destination_alone(tmp_path):
    rows, counters = parse(tmp_path, trace(*PATH))
    assert replies_of(rows) == [("203.0.113.1", 5.5), ("203.0.113.2", 6.5), (TARGET, 19.5), (TARGET, 20.5)]
    assert counters == {"reply_used": 4, "reply_absent": 5, "reply_private_address": 3}
    assert {format_address(row["src"]) for row in rows} == {"192.0.2.1"}
    assert {(row["probe_id"], row["msm_id"], row["time_s"]) for row in rows} == {(7, 5001, 1_700_000_000)}
    rows, counters = parse(tmp_path, trace(*PATH), traceroute="target")
    assert replies_of(rows) == [(TARGET, 19.5), (TARGET, 20.5)]
    assert counters == {"reply_used": 2, "reply_absent": 5, "reply_private_address": 3, "reply_not_of_target": 2}


def test_rows_know_pings_from_replies_of_targets_and_of_hops(tmp_path):
    dump = write(tmp_path / "a.json", ndjson(trace(*PATH, timestamp=1_700_000_100), ping(result=[{"rtt": 3.5}])))
    prepare([dump], tmp_path / "rows", workers=1, packets="all", split="none", traceroute="hops")
    table = next(iter(RowReader(tmp_path / "rows", "train"))).to_measurements()
    kinds = [
        (KINDS[kind], rtt_ms) for kind, rtt_ms in zip(*(table[n].to_pylist() for n in ("kind", "rtt_ms")), strict=True)
    ]
    hops = [("hop", 5.5), ("hop", 6.5), ("target", 19.5), ("target", 20.5)]
    assert kinds[0] == ("ping", 3.5) and sorted(kinds[1:]) == hops
    prepare([dump], tmp_path / "target", workers=1, packets="all", split="none", traceroute="target")
    table = next(iter(RowReader(tmp_path / "target", "train"))).to_measurements()
    assert table["kind"].to_pylist() == [0, 1, 1]


def test_a_destination_that_answers_before_the_last_hop_is_a_hop_there(tmp_path):
    rows, _ = parse(tmp_path, trace([reply(TARGET, 9.5)], [reply(TARGET, 19.5)]))
    assert [(KINDS[row["kind"]], row["rtt_ms"]) for row in rows] == [("hop", 9.5), ("target", 19.5)]


def test_without_the_option_traceroutes_are_counted_and_dropped(tmp_path):
    assert parse(tmp_path, trace(*PATH), ping(), traceroute="off")[1] == {"traceroute_off": 1}


def test_a_destination_that_did_not_answer_in_the_last_hop_gives_nothing_to_target(tmp_path):
    for last in ([{"x": "*"}], [], {"hop": 5, "error": "sendto failed"}, [reply("203.0.113.9", 9.5)]):
        rows, counters = parse(tmp_path, trace(*PATH, last), traceroute="target")
        assert not rows and counters["no_result"] == 1


@pytest.mark.parametrize(
    ("entry", "counter"),
    [
        ({"x": "*"}, "reply_absent"),
        ({"error": "sendto failed: Network is unreachable"}, "reply_absent"),
        ({"rtt": 5.5}, "reply_absent"),
        (None, "reply_absent"),
        (5, "reply_absent"),
        (reply("203.0.113.1", late=2), "reply_late"),
        (reply("203.0.113.1", 4321.5, late=1), "reply_late"),
        (reply("203.0.113.1", 5.5, dup=True), "reply_duplicate"),
        (reply("203.0.113.1", 5.5, dup=1), "reply_duplicate"),
        (reply("203.0.113.1", 3001.5, err="H"), "reply_icmp_error"),
        (reply("203.0.113.1", 5.5, err="N"), "reply_icmp_error"),
        (reply("203.0.113.1", 5.5, err="A"), "reply_icmp_error"),
        (reply("203.0.113.1", 5.5, err="X"), "reply_icmp_error"),
        (reply("203.0.113.1", 5.5, err=10), "reply_icmp_error"),
        (reply("203.0.113.1"), "reply_without_rtt"),
        (reply("203.0.113.1", "fast"), "reply_without_rtt"),
        (reply("203.0.113.1", 0), "reply_without_rtt"),
        (reply("203.0.113.1", -1), "reply_without_rtt"),
        (reply("203.0.113.1", 1e300), "reply_without_rtt"),
        (reply("router.example", 5.5), "reply_bad_address"),
        (reply({"a": 1}, 5.5), "reply_bad_address"),
        (reply("10.188.1.2", 5.5), "reply_private_address"),
        (reply("240.1.2.3", 5.5), "reply_private_address"),
        (reply("fe80::1%2", 5.5), "reply_private_address"),
        (reply("192.0.0.1", 5.5), "reply_private_address"),
        (reply("198.18.0.9", 5.5), "reply_private_address"),
        (reply("64:ff9b::10.0.0.1", 5.5), "reply_private_address"),
    ],
)
def test_a_bad_reply_goes_to_its_counter_and_its_neighbours_live(tmp_path, entry, counter):
    rows, counters = parse(tmp_path, trace([reply("203.0.113.8", 1.5), entry, reply("203.0.113.9", 2.5)]))
    assert replies_of(rows) == [("203.0.113.8", 1.5), ("203.0.113.9", 2.5)]
    assert counters == {"reply_used": 2, counter: 1}


@pytest.mark.parametrize(
    "entry",
    [
        reply("203.0.113.1", "5.5"),
        reply("::ffff:203.0.113.1", 5.5),
        reply("203.0.113.1", 5.5, dup=False, late=0, err="p"),
        reply("203.0.113.1", 5.5, err="P", edst="10.0.0.1", ittl=3, itos=72),
        reply("203.0.113.1", 5.5, flags="RA", hdropts=[{"mss": 1420}]),
        reply("203.0.113.1", 5.5, icmpext={"version": 2, "rfc4884": 0, "obj": [{"class": 1, "mpls": [{"label": 9}]}]}),
    ],
)
def test_what_else_a_reply_says_does_not_matter(tmp_path, entry):
    rows, counters = parse(tmp_path, trace([entry]))
    assert replies_of(rows) == [("203.0.113.1", 5.5)] and counters == {"reply_used": 1}


@pytest.mark.parametrize(
    ("line", "counter"),
    [
        (trace(*PATH, timestamp=None), "no_timestamp"),
        (trace({"error": "dns resolution failed: x"}, dst_addr=None), "no_destination"),
        (trace({"hop": 1, "error": "connect failed: Network is unreachable"}), "local_error"),
        (trace(), "no_result"),
        (trace(result=None), "no_result"),
        (trace(result="timeout"), "no_result"),
        (trace(result={"hop": 1}), "no_result"),
        (trace([], {"hop": 2}, 5, None, {"hop": 3, "result": "x"}), "no_result"),
        (trace(PATH[0], PATH[2]), "no_result"),
        (trace(*PATH, src_addr="10.0.0.1", from_=""), "no_source"),
        (trace(*PATH, lts=-1), "unsynced_clock"),
    ],
)
@pytest.mark.parametrize("traceroute", ["target", "hops"])
def test_a_bad_line_goes_to_its_counter_with_all_its_replies(tmp_path, line, counter, traceroute):
    rows, counters = parse(tmp_path, ping(), line, ping(timestamp=1_700_000_002), traceroute=traceroute, packets="one")
    assert len(rows) == 2
    assert {name: count for name, count in counters.items() if name in DROPPED_LINES} == {counter: 1}
    hops = [h["result"] for h in line.get("result", []) if isinstance(h, dict) and isinstance(h.get("result"), list)]
    assert sum(counters.get(name, 0) for name in REPLIES) == sum(map(len, hops))


def test_hops_do_not_mind_where_the_path_was_to_lead(tmp_path):
    for dst in ("10.0.0.9", "nowhere.example", None):
        assert len(parse(tmp_path, trace(*PATH, dst_addr=dst))[0]) == 4
    assert parse(tmp_path, trace(*PATH, dst_addr="10.0.0.9"), traceroute="target")[1]["private_destination"] == 1


def test_a_line_without_a_type_is_a_traceroute_by_its_hops(tmp_path):
    old = trace(*PATH, type=None, dst_addr=None, addr=TARGET, src_addr=None, srcaddr="192.0.2.1", fw=4430)
    assert replies_of(parse(tmp_path, old)[0]) == replies_of(parse(tmp_path, trace(*PATH))[0])
    assert parse(tmp_path, old, traceroute="off")[1] == {"no_result": 1}


def test_one_keeps_of_each_hop_one_usable_reply_unbiased_and_repeatable(tmp_path):
    hop = [reply("203.0.113.1", 10), reply("203.0.113.2", 20), {"x": "*"}, reply("203.0.113.3", 30)]
    lines = [trace(hop, hop, prb_id=p, timestamp=1_700_000_000 + 900 * i) for p in range(20) for i in range(75)]
    rows, counters = parse(tmp_path, *lines, packets="one")
    assert counters == {"reply_used": 3000, "reply_absent": 3000, "reply_not_picked": 6000}
    rtts = np.array([row["rtt_ms"] for row in rows]).reshape(-1, 2)
    for value in (10, 20, 30):
        assert abs((rtts == value).mean() - 1 / 3) < 0.03  # 3.5 standard deviations of 3000 draws
    assert abs((rtts[:, 0] == rtts[:, 1]).mean() - 1 / 3) < 0.045  # hops are drawn apart
    assert parse(tmp_path, *lines, packets="one")[0] == rows


def test_pings_come_out_the_same_whether_traceroutes_are_read_or_not(tmp_path):
    lines = [
        ping(timestamp=1_700_000_000 + i, result=[{"rtt": i}, {"dup": 1, "rtt": 5}, {"x": "*"}]) for i in range(1, 9)
    ]
    lines += [b"", b"<html>", ping(lts=-1), ping(type="dns"), ping(dst_addr=None)]
    off, hops, target = (parse(tmp_path, *lines, traceroute=mode) for mode in ("off", "hops", "target"))
    assert off == hops == target


def reference(r: dict, traceroute: str):
    """The slow, readable reader of one line: (source, address, RTT) of each reply used, and its counters."""
    target = address_of(r.get("dst_addr"))
    hops = [hop.get("result") or [] for hop in r["result"]]
    used, counters = [], Counter()
    for i, hop in enumerate(hops):
        for e in hop:
            address = address_of(e.get("from"))
            checks = [
                ("reply_absent", "x" in e or e.get("from") is None),
                ("reply_late", e.get("late")),
                ("reply_duplicate", e.get("dup")),
                ("reply_icmp_error", "err" in e and e["err"] != "p"),
                ("reply_without_rtt", not e.get("rtt")),
                ("reply_bad_address", address is None),
                ("reply_private_address", not is_public_address(address)),
                ("reply_not_of_target", traceroute == "target" and (address != target or i < len(hops) - 1)),
            ]
            fault = next((name for name, true in checks if true), None)
            if fault:
                counters[fault] += 1
            else:
                used.append((address, e["rtt"]))
    source = next((a for a in map(address_of, (r.get("src_addr"), r.get("from"))) if is_public_address(a)), None)
    strict = traceroute == "target"
    checks = [
        ("no_timestamp", "timestamp" not in r),
        ("no_destination", not r.get("dst_addr") and (strict or not used)),
        ("bad_destination", strict and target is None),
        ("private_destination", strict and not is_public_address(target)),
        ("local_error", any("error" in hop for hop in r["result"]) and counters["reply_absent"] == sum(map(len, hops))),
        ("no_result", not used),
        ("no_source", source is None),
        ("unsynced_clock", not 0 <= r.get("lts", 0) <= 86_400),
    ]
    fault = next((name for name, true in checks if true), None)
    if fault:
        return [], counters + Counter({fault: 1, "reply_of_dropped_line": len(used)})
    return [(str(source), str(a), np.float32(rtt)) for a, rtt in used], counters + Counter(reply_used=len(used))


ENTRIES = st.just({"x": "*"}) | st.builds(
    lambda address, rtt, more: reply(address, rtt, **more),
    ADDRESSES,
    st.none() | st.floats(0.01, 5e5),
    st.sampled_from([{}, {}, {}, {"late": 1}, {"dup": True}, {"err": "H"}, {"err": 10}, {"err": "p"}, {"x": "*"}]),
)
HOPS = st.lists(ENTRIES, max_size=4) | st.sampled_from([{"hop": 1, "error": "connect failed"}, {"hop": 255}])
LINES = st.builds(
    lambda hops, changes: trace(*hops, **changes),
    st.lists(HOPS, max_size=4),
    st.fixed_dictionaries(
        {
            "src_addr": ADDRESSES,
            "from_": ADDRESSES,
            "dst_addr": ADDRESSES,
            "lts": st.sampled_from([None, -1, 0, 50]),
            "timestamp": st.sampled_from([1_700_000_000, 1_700_000_000, None]),
        }
    ),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(lines=st.lists(LINES, min_size=1, max_size=8), traceroute=st.sampled_from(["target", "hops"]))
def test_the_parser_agrees_with_a_slow_reference(tmp_path_factory, lines, traceroute):
    rows, counters = parse(tmp_path_factory.mktemp("dump"), *lines, traceroute=traceroute)
    want = [reference(line, traceroute) for line in lines]
    assert counters == sum((count for _, count in want), Counter())
    got = [(format_address(row["src"]), format_address(row["dst"]), row["rtt_ms"]) for row in rows]
    assert got == [measurement for used, _ in want for measurement in used]
    assert sum(row["first_of_line"] for row in rows) == sum(bool(used) for used, _ in want)


def test_lines_of_a_mixed_dump_are_counted_once_and_repeats_found(tmp_path):
    lines = [ping(), trace(*PATH), trace(*PATH, timestamp=1_700_000_900), ping(lts=-1), trace(PATH[2])]
    one, two = write(tmp_path / "a.bz2", ndjson(*lines)), write(tmp_path / "b.json", ndjson(lines[1], lines[0]))
    for packets, used in (("one", 2), ("all", 4)):
        out = tmp_path / packets
        manifest = prepare([one, two], out, workers=1, packets=packets, split="none", traceroute="hops")
        counters = {name: count for name, count in manifest["lines"]["counters"].items() if count}
        assert counters == {"kept": 3, "duplicate": 2, "no_result": 1, "unsynced_clock": 1}
        measurements = manifest["measurements"]
        pings = 3 if packets == "all" else 1
        assert (measurements["written"], measurements["dropped_repeated"]) == (2 * used + pings, used + pings)
        assert measurements["reply_used"] == 3 * used and measurements["reply_private_address"] == 9
        assert sum(measurements[name] for name in REPLIES) == 3 * 12 + 3
        assert sum(len(row) for row in RowReader(out, "train")) == 2 * used + pings
        assert "reply_private_address" in summary(manifest)


def test_two_paths_of_one_second_that_share_their_first_hop_are_no_repeats(tmp_path):
    hop = [reply("203.0.113.1", 5.5)]
    path = write(tmp_path / "a.json", ndjson(trace(hop), trace(hop, dst_addr="198.51.100.8")))
    manifest = prepare([path], tmp_path / "out", workers=1, split="none", traceroute="hops")
    assert manifest["lines"]["counters"]["kept"] == manifest["measurements"]["written"] == 2


def test_a_copy_that_lost_a_reply_is_a_repeat_whichever_comes_first(tmp_path):
    whole = trace([reply("203.0.113.1", 5.5)], [reply("203.0.113.2", 6.5)])
    copy = trace([reply("203.0.113.1", late=1)], [reply("203.0.113.2", 6.5)])
    for order, lines in {"ab": (whole, copy), "ba": (copy, whole)}.items():
        paths = [write(tmp_path / f"{order}-{i}.json", ndjson(line)) for i, line in enumerate(lines)]
        manifest = prepare(paths, tmp_path / order, workers=1, packets="all", split="none", traceroute="hops")
        counters = manifest["lines"]["counters"]
        assert (counters["kept"], counters["duplicate"], manifest["measurements"]["written"]) == (1, 1, 2)
