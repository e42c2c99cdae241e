"""Logs of ping -D: replies, losses and their times, counted by hand."""

import json

import pytest
from pings import write
from test_repeats import kept

from ping_llm.data.ingest import tasks
from ping_llm.data.ingest.prepare import prepare
from ping_llm.data.measurement import format_address
from ping_llm.data.rows import RowReader

SOURCE = "203.0.113.5"
LOG = """PING host.example (198.51.100.20) 56(84) bytes of data.
[1700000000.250000] 64 bytes from 198.51.100.20: icmp_seq=1 ttl=53 time=31.2 ms
no answer yet for icmp_seq=2
[1700000002.250000] 64 bytes from 198.51.100.20: icmp_seq=3 ttl=53 time=30.9 ms

--- host.example ping statistics ---
3 packets transmitted, 2 received, 33.3333% packet loss, time 2003ms
rtt min/avg/max/mdev = 30.900/31.050/31.200/0.150 ms
"""


def stamped(second, text):
    return f"[{1_700_000_000 + second:.6f}] {text}\n"


def reply(second, seq, rtt="20.5", host="198.51.100.20"):
    return stamped(second, f"64 bytes from {host}: icmp_seq={seq} ttl=53 time={rtt} ms")


def measured(folder, text, source=SOURCE, **options):
    """(seconds, source, destination, RTT) of each measurement in time order, and the counters."""
    path = write(folder / "ping.log", text.encode() if isinstance(text, str) else text)
    manifest = prepare([path], folder / "out", workers=1, split="none", source=source, **options)
    rows = [r for row in RowReader(folder / "out", "train") for r in row.to_measurements().to_pylist()]
    found = [
        (r["time_s"] - 1_700_000_000, format_address(r["src"]), format_address(r["dst"]), round(r["rtt_ms"], 3))
        for r in rows
    ]
    counters = {name: count for name, count in manifest["lines"]["counters"].items() if count}
    assert sum(counters.values()) == manifest["lines"]["read"]
    return sorted(found), counters


def times_and_rtts(folder, text, **options):
    found, counters = measured(folder, text, **options)
    return [(time, rtt) for time, _, _, rtt in found], counters


@pytest.mark.parametrize("packets", ["one", "all"])
def test_a_log_gives_its_replies_and_its_lost_packet_between_them(tmp_path, packets):
    found, counters = measured(tmp_path, LOG, packets=packets)
    ends = (SOURCE, "198.51.100.20")
    assert found == [(0, *ends, 31.2), (1, *ends, -1.0), (2, *ends, 30.9)]
    assert counters == {"kept": 3, "blank_line": 1, "no_result": 4}


@pytest.mark.parametrize(
    "line",
    [
        "no answer yet for icmp_seq=2\n",
        stamped(2, "no answer yet for icmp_seq=2"),
        stamped(4, "From 192.0.2.1 icmp_seq=2 Destination Host Unreachable"),
        stamped(4, "From gw.example (192.0.2.1) icmp_seq=2 Time to live exceeded"),
        stamped(1, "From 192.0.2.1: icmp_seq=2 Packet filtered"),
        stamped(2, "no answer yet for icmp_seq=2")
        + stamped(4, "From 192.0.2.1 icmp_seq=2 Destination Host Unreachable"),
        "Request timeout for icmp_seq 2\n",
        "",
    ],
)
def test_a_packet_is_lost_however_the_log_says_so_and_if_only_its_number_is_missing(tmp_path, line):
    text = LOG.splitlines(keepends=True)[0] + reply(0.25, 1) + line + reply(2.25, 3)
    assert times_and_rtts(tmp_path, text)[0] == [(0, 20.5), (1, -1.0), (2, 20.5)]


def test_a_late_reply_is_an_answer_and_a_second_one_is_none(tmp_path):
    text = reply(0, 1) + "no answer yet for icmp_seq=2\n" + reply(2, 3) + reply(2.3, 2, "1300.5") + reply(3, 4)
    text += stamped(3.1, "64 bytes from 198.51.100.20: icmp_seq=4 ttl=53 time=99.5 ms (DUP!)")
    text += stamped(3.2, "From 192.0.2.1: icmp_seq=4 Redirect Host(New nexthop: 192.0.2.2)")
    found, counters = times_and_rtts(tmp_path, text)
    assert found == [(0, 20.5), (2, 20.5), (2, 1300.5), (3, 20.5)]
    assert counters == {"kept": 4, "no_result": 3}


def test_packets_lost_at_the_begin_and_at_the_end_are_known_by_the_header_and_the_statistics(tmp_path):
    head = "PING 198.51.100.20 (198.51.100.20) 56(84) bytes of data.\n"
    tail = "\n--- 198.51.100.20 ping statistics ---\n6 packets transmitted, 2 received, 66% packet loss, time 5000ms\n"
    body = reply(20, 3) + reply(30, 4)
    want = [(0, -1.0), (10, -1.0), (20, 20.5), (30, 20.5), (40, -1.0), (50, -1.0)]
    assert times_and_rtts(tmp_path, head + body + tail)[0] == want


def test_a_part_of_a_log_says_nothing_of_packets_before_it(tmp_path):
    assert times_and_rtts(tmp_path, reply(20, 3) + reply(30, 4))[0] == [(20, 20.5), (30, 20.5)]


def test_numbers_begin_again_after_65535_and_a_new_run_begins_at_1(tmp_path):
    text = reply(0, 65534) + reply(2, 0) + reply(3, 1) + reply(100, 40_000) + reply(200, 1) + reply(201, 2)
    found, _ = times_and_rtts(tmp_path, text.replace("icmp_seq=40000", "icmp_seq=3"))
    assert [time for time, rtt in found if rtt < 0] == [1, 51]
    assert [time for time, rtt in found if rtt > 0] == [0, 2, 3, 100, 200, 201]


def test_each_run_of_a_file_has_its_own_destination(tmp_path):
    other = LOG.replace("198.51.100.20", "198.51.100.21").replace("[1700000", "[1700009")
    found, counters = measured(tmp_path, LOG + other)
    assert [(time, dst) for time, _, dst, _ in found] == [
        *((second, "198.51.100.20") for second in range(3)),
        *((9000 + second, "198.51.100.21") for second in range(3)),
    ]
    assert counters == {"kept": 6, "blank_line": 2, "no_result": 8}


@pytest.mark.parametrize(
    ("header", "host"),
    [
        ("PING host.example (2001:db8::20) 56 data bytes", "2001:db8::20"),
        ("PING host.example(host.example (2001:db8::20)) 56 data bytes", "host.example (2001:db8::20)"),
        ("PING 2001:db8::20(2001:db8::20) 56 data bytes", "2001:db8::20"),
        ("", "2001:db8::20"),
        ("", "host.example (2001:db8::20)"),
        ("PING host.example (2001:db8::20) from 2001:db8:9::5 eth0: 56 data bytes", "host.example"),
    ],
)
def test_logs_of_ipv6_are_read(tmp_path, header, host):
    text = (header + "\n" if header else "") + reply(0, 1, host=host) + reply(1, 2, host=host)
    found, _ = measured(tmp_path, text, source="2001:db8:1::7")
    source = "2001:db8:9::5" if "from" in header else "2001:db8:1::7"
    assert found == [(second, source, "2001:db8::20", 20.5) for second in range(2)]


def test_a_log_that_names_its_source_needs_no_option(tmp_path):
    text = LOG.replace("(198.51.100.20) 56", "(198.51.100.20) from 192.0.2.5 eth0: 56")
    assert {src for _, src, _, _ in measured(tmp_path, text, source=None)[0]} == {"192.0.2.5"}


@pytest.mark.parametrize(
    ("text", "source", "message"),
    [
        (
            LOG,
            None,
            r"ping\.log is a log of ping that holds no address of the source \(give it with --source ADDRESS\)",
        ),
        (LOG.replace("[1700000000.250000] ", "").replace("[1700000002.250000] ", ""), SOURCE, r"holds no times \(run"),
        (LOG, "host.example", "--source host.example is not an IPv4 or IPv6 address"),
        (LOG, "192.168.1.7", "--source 192.168.1.7 is private or reserved; give the public address"),
    ],
)
def test_what_is_missing_is_named(tmp_path, text, source, message):
    with pytest.raises(ValueError, match=message):
        measured(tmp_path, text, source=source)


def test_lines_that_are_none_of_ping_are_counted_as_malformed(tmp_path):
    text = LOG.replace(
        "no answer yet", "ping: sendmsg: Network is unreachable\nkernel: oops\n[1700000001.5] what\nno answer yet"
    )
    assert measured(tmp_path, text)[1] == {"kept": 3, "blank_line": 1, "no_result": 5, "malformed_json": 2}


@pytest.mark.parametrize("name", ["a.log", "a.log.gz", "a.bz2", "no_suffix"])
def test_logs_are_recognised_by_content_whatever_is_cut_where(tmp_path, name, monkeypatch):
    text = "".join(reply(second, second + 1, f"{20 + second}.5") for second in range(0, 300, 3))
    path = write(tmp_path / name, text.encode())
    whole = kept(tmp_path / "whole", path, source=SOURCE)
    assert whole[:2] == (100, 0) and len(whole[2]) == 298 and whole[2].count(-1) == 198
    monkeypatch.setattr(tasks, "CHUNK_BYTES", 500)
    assert kept(tmp_path / "cut", path, source=SOURCE) == whole
    again = write(tmp_path / "again", text.encode())
    assert kept(tmp_path / "twice", path, again, source=SOURCE) == (100, 100, whole[2])


def test_ten_packets_a_second_are_ten_measurements(tmp_path):
    text = "".join(reply(second / 10, second + 1) for second in range(20))
    assert kept(tmp_path / "out", write(tmp_path / "a.log", text.encode()), source=SOURCE)[:2] == (20, 0)


def test_the_source_is_part_of_what_makes_rows_the_same(tmp_path):
    path = write(tmp_path / "a.log", LOG.encode())
    prepare([path], tmp_path / "out", workers=1, split="none", source=SOURCE)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["options"]["source"] == SOURCE
    with pytest.raises(ValueError, match="other inputs or options"):
        prepare([path], tmp_path / "out", workers=1, split="none", source="203.0.113.6")
