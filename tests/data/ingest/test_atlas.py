import ipaddress
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pings import ndjson, ping, write

from ping_llm.data.ingest import atlas
from ping_llm.data.ingest.results import DROPPED_LINES
from ping_llm.data.measurement import MEASUREMENT_SCHEMA, format_address

NOT_PUBLIC = [
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16"),
    *("192.0.0.0/24", "192.88.99.0/24", "198.18.0.0/15", "224.0.0.0/4", "240.0.0.0/4"),
    *("::/128", "::1/128", "100::/64", "2001:2::/48", "fe80::/10", "fec0::/10", "fc00::/7", "ff00::/8"),
]


def parse(path, *lines, **options):
    path = path / "dump"
    path.write_bytes(ndjson(*lines))
    table, dropped = atlas.parse_results(path, len(lines), **options)
    return table.to_pylist(), {name: count for name, count in dropped.items() if count}


def reason(path, *lines, **options):
    rows, dropped = parse(path, *lines, **options)
    assert not rows
    return dropped


def rtts(path, **changes):
    rows, _ = parse(path, ping(**changes), packets="all")
    return [row["rtt_ms"] for row in rows]


def test_a_result_becomes_a_measurement_of_the_schema(tmp_path):
    path = write(tmp_path / "dump", ndjson(ping()))
    table, _ = atlas.parse_results(path, 1, "all")
    assert table.schema.names == [*MEASUREMENT_SCHEMA.names, "packet", "first_of_line"]
    first = table.to_pylist()[0]
    assert (format_address(first.pop("src")), format_address(first.pop("dst"))) == ("192.0.2.1", "198.51.100.7")
    want = {"probe_id": 7, "msm_id": 1001, "time_s": 1_700_000_000, "ip_version": 4, "rtt_ms": 19.5}
    want |= {"kind": 0, "packet": 0, "first_of_line": True}
    assert first == want


@pytest.mark.parametrize(
    ("line", "counter"),
    [
        (b"", "blank_line"),
        (b"  \r", "blank_line"),
        (b'{"fw": 5080, "prb_id": 7, "src_a', "malformed_json"),
        (b"5", "malformed_json"),
        (b"[]", "malformed_json"),
        (b"{}", "malformed_json"),
        (b"\x00\x00", "malformed_json"),
        (b"[" * 5000, "malformed_json"),
        (ndjson(ping(msm_name="@")).replace(b"@", b"\xff\xfe").strip(), "malformed_json"),
        (ndjson(ping()).strip() * 2, "malformed_json"),
        (ping(type="traceroute"), "traceroute_off"),
        (ping(type="dns"), "not_ping"),
        (ping(timestamp=None), "no_timestamp"),
        (ping(timestamp="soon"), "no_timestamp"),
        (ping(timestamp=-5), "no_timestamp"),
        (ping(timestamp=1_700_000_000_000), "no_timestamp"),
        (
            ping(dst_addr=None, src_addr=None, result=[{"error": "dns resolution failed: x"}], avg=-1),
            "no_destination",
        ),
        (ping(dst_addr=""), "no_destination"),
        (ping(dst_addr="host.example"), "bad_destination"),
        (ping(dst_addr="192.0.2.256"), "bad_destination"),
        (ping(dst_addr="192.168.1.1"), "private_destination"),
        (ping(dst_addr="::ffff:10.0.0.1"), "private_destination"),
        (ping(dst_addr="fe80::1%eth0"), "private_destination"),
        (ping(dst_addr="224.0.0.1"), "private_destination"),
        (ping(dst_addr="198.18.0.1"), "private_destination"),
        (ping(dst_addr="64:ff9b::10.0.0.1"), "private_destination"),
        (ping(dst_addr="ff02::1"), "private_destination"),
        (ping(src_addr=None, result=[{"error": "address not allowed"}]), "local_error"),
        (ping(sent=0, result=[{"error": "connect failed: Network is unreachable"}]), "local_error"),
        (ping(result=[{"error": "socket failed"}, {"error": "bind to interface failed"}]), "local_error"),
        (ping(result=[]), "no_result"),
        (ping(result=None), "no_result"),
        (ping(result={"rtt": 1.5}), "no_result"),
        (ping(result="timeout"), "no_result"),
        (ping(result=[{"rtt": "fast"}, {"rtt": None}, {"rtt": [1]}, {}, 5, None]), "no_result"),
        (ping(result=[{"rtt": 0}, {"rtt": -1}, {"rtt": 1e300}]), "no_result"),
        (ping(result=[{"dup": 1, "rtt": 1.5}]), "no_result"),
        (ping(src_addr=None, from_=""), "no_source"),
        (ping(src_addr="10.0.0.1", from_=None), "no_source"),
        (ping(src_addr="nonsense", from_="100.64.3.4"), "no_source"),
        (ping(lts=-1), "unsynced_clock"),
        (ping(lts=86_401), "unsynced_clock"),
    ],
)
def test_a_bad_line_goes_to_its_counter_and_its_neighbours_live(tmp_path, line, counter):
    rows, dropped = parse(tmp_path, ping(timestamp=1_700_000_001), line, ping(timestamp=1_700_000_002))
    assert dropped == {counter: 1}
    assert [row["time_s"] for row in rows] == [1_700_000_001, 1_700_000_002]


@pytest.mark.parametrize("src", ["192.168.0.5", "192.0.0.2", "198.18.0.1", "100::5", "fec0::1", "2002:c0a8:1::1"])
def test_the_public_from_takes_over_where_src_addr_is_no_host(tmp_path, src):
    rows, _ = parse(tmp_path, ping(src_addr=src), ping(src_addr=src, from_="192.0.0.1"), packets="all")
    assert {format_address(row["src"]) for row in rows} == {"203.0.113.9"}
    assert reason(tmp_path, ping(src_addr=src, from_="192.0.0.1")) == {"no_source": 1}


def test_the_limit_of_the_clock_is_an_option(tmp_path):
    assert reason(tmp_path, ping(lts=601), max_clock_skew_s=600) == {"unsynced_clock": 1}
    assert len(parse(tmp_path, ping(lts=600), max_clock_skew_s=600)[0]) == 1


def test_packets_are_replies_and_losses_and_never_duplicates(tmp_path):
    entries = [{"x": "*"}, {"dup": 1, "rtt": 1210.5, "ttl": 40}, {"rtt": 30.5}, {"dup": 0, "rtt": 31.5}]
    assert rtts(tmp_path, result=entries) == [-1, 30.5, 31.5]
    assert rtts(tmp_path, result=[{"rtt": 30.5}, {"error": "sendto failed: Network is unreachable"}]) == [30.5, -1]
    assert rtts(tmp_path, result=[{"rtt": 30.5}, {"error": "socket failed"}]) == [30.5]


def test_min_avg_max_are_never_read_as_a_latency(tmp_path):
    for value in (-1, None, 12.5, "x"):
        assert rtts(tmp_path, result=[{"x": "*"}], avg=value, min=value, max=value) == [-1]


def test_numbers_may_be_strings(tmp_path):
    line = ping(prb_id="7", msm_id="1001", timestamp="1700000000", lts="3", result=[{"rtt": "19.5"}])
    assert parse(tmp_path, line) == parse(tmp_path, ping(result=[{"rtt": 19.5}]))


@pytest.mark.parametrize(
    ("src_addr", "from_", "source"),
    [
        ("192.0.2.1", "203.0.113.9", "192.0.2.1"),
        ("192.168.1.2", "203.0.113.9", "203.0.113.9"),
        ("fd00::5", "2001:db8::9", "2001:db8::9"),
        (None, "203.0.113.9", "203.0.113.9"),
        ("192.0.2.1", "", "192.0.2.1"),
        ("::ffff:192.0.2.1", None, "192.0.2.1"),
    ],
)
def test_the_source_is_a_public_src_addr_else_a_public_from(tmp_path, src_addr, from_, source):
    rows, _ = parse(tmp_path, ping(src_addr=src_addr, from_=from_))
    assert format_address(rows[0]["src"]) == source


def test_mapped_destinations_are_ipv4_whatever_af_says(tmp_path):
    rows, _ = parse(tmp_path, ping(af=6, dst_addr="::ffff:198.51.100.7"), ping(af=4, dst_addr="2001:db8::1"))
    assert [(format_address(row["dst"]), row["ip_version"]) for row in rows] == [
        ("198.51.100.7", 4),
        ("2001:db8::1", 6),
    ]


def test_older_firmware_names_its_fields_otherwise(tmp_path):
    old = ping(fw=4420, dst_addr=None, addr="198.51.100.7", src_addr=None, srcaddr="192.0.2.1", type=None, mode="ICMP4")
    assert parse(tmp_path, old) == parse(tmp_path, ping())


@pytest.mark.parametrize(
    ("sent", "rcvd", "low", "avg", "high", "want"),
    [
        (3, 3, 10, 14, 20, [10, 12, 20]),
        (3, 2, 10, 15, 20, [10, 20, -1]),
        (3, 1, 10, 10, 10, [10, -1, -1]),
        (3, 0, -1, -1, -1, [-1, -1, -1]),
        (3, 0, None, None, None, [-1, -1, -1]),
        (3, 3, -1, -1, -1, []),
        (3, 3, None, 14, None, []),
        (5, 4, 10, 14, 20, []),
        (2, 3, 10, 14, 20, []),
    ],
)
def test_firmware_1_gives_up_to_three_packets_by_min_avg_max(tmp_path, sent, rcvd, low, avg, high, want):
    line = {
        "fw": 1,
        "dst_addr": None,
        "addr": "198.51.100.7",
        "src_addr": None,
        "type": None,
        "result": None,
        "lts": None,
    }
    assert rtts(tmp_path, **line, sent=sent, rcvd=rcvd, min=low, avg=avg, max=high) == want


def test_firmware_0_is_malformed_by_its_missing_source(tmp_path):
    line = {"fw": "0", "addr": "198.51.100.7", "prb_id": "7", "timestamp": "1300000000", "sent": "3", "rcvd": "0"}
    assert reason(tmp_path, line) == {"no_source": 1}


def test_an_unknown_probe_is_minus_one(tmp_path):
    assert parse(tmp_path, ping(prb_id=None, msm_id=None))[0][0]["probe_id"] == -1


def test_the_packet_that_is_kept_is_unbiased_and_repeatable(tmp_path):
    entries = [{"rtt": 10}, {"x": "*"}, {"rtt": 30}]
    lines = [ping(prb_id=p, timestamp=1_700_000_000 + 240 * i, result=entries) for p in range(20) for i in range(150)]
    rows, _ = parse(tmp_path, *lines)
    kept = np.array([row["rtt_ms"] for row in rows])
    for value in (10, -1, 30):
        assert abs((kept == value).mean() - 1 / 3) < 0.03  # 3.5 standard deviations of 3000 draws
    assert abs((kept[1:] == kept[:-1]).mean() - 1 / 3) < 0.03  # and it does not follow from the time before
    assert parse(tmp_path, *lines)[0] == rows


def address_of(text):
    try:
        parsed = ipaddress.ip_address((text or "").partition("%")[0])
    except ValueError:
        return None
    return getattr(parsed, "ipv4_mapped", None) or parsed


def is_public_address(a):
    return a is not None and not any(a in ipaddress.ip_network(n) for n in NOT_PUBLIC)


def reference(line: bytes, limit: int = 86_400):
    """The slow, readable parser: the counter of a line, or its source, destination and packets."""
    if not line.strip():
        return "blank_line"
    try:
        r = json.loads(line)
        assert isinstance(r, dict) and set(r) & set(atlas._COLUMNS)
    except (ValueError, AssertionError):
        return "malformed_json"

    entries = r["result"] if isinstance(r.get("result"), list) else []
    entries = [e for e in entries if isinstance(e, dict)]
    packets = [e["rtt"] if e.get("rtt") else -1.0 for e in entries if not e.get("dup") and packet_known(e)]
    dst = address_of(r.get("dst_addr"))
    checks = [
        ("not_ping", r.get("type", "ping") != "ping"),
        ("no_timestamp", not isinstance(r.get("timestamp"), int)),
        ("no_destination", not r.get("dst_addr")),
        ("bad_destination", dst is None),
        ("private_destination", not is_public_address(dst)),
        ("local_error", not packets and any(e.get("error") for e in entries)),
        ("no_result", not packets),
        (
            "no_source",
            not is_public_address(address_of(r.get("src_addr"))) and not is_public_address(address_of(r.get("from"))),
        ),
        ("unsynced_clock", r.get("lts") is not None and not 0 <= r["lts"] <= limit),
    ]
    for name, true in checks:
        if true:
            return name
    src = address_of(r.get("src_addr"))
    src = src if is_public_address(src) else address_of(r.get("from"))
    return str(src), str(dst), [np.float32(p) for p in packets]


def packet_known(e: dict) -> bool:
    return bool(e.get("rtt")) or "x" in e or e.get("error", "").startswith("sendto failed")


def is_one_line(b: bytes) -> bool:
    return b"\n" not in b and not b.startswith(b"\xef\xbb\xbf")  # a byte order mark is taken off the first line


ADDRESSES = st.sampled_from(
    [
        *("192.0.2.1", "198.51.100.7", "2001:db8::1", "10.1.2.3", "172.31.0.1", "100.100.0.1", "224.0.0.5", "x.y"),
        *("fd00::1", "fe80::1%2", "::ffff:192.0.2.77", "", None, "192.0.0.2", "198.19.0.1", "100::1", "fec0::1"),
    ]
)
ENTRIES = st.lists(
    st.sampled_from(
        [{"x": "*"}, {"error": "sendto failed: no route"}, {"error": "socket failed"}, {"x": "*", "dup": 1}]
    )
    | st.builds(lambda rtt: {"rtt": rtt}, st.floats(0.01, 5e5))
    | st.builds(lambda rtt: {"rtt": rtt, "dup": 1, "ttl": 4}, st.floats(0.01, 5e5)),
    max_size=5,
)
RESULTS = st.builds(
    ping,
    src_addr=ADDRESSES,
    from_=ADDRESSES,
    dst_addr=ADDRESSES,
    result=ENTRIES | st.sampled_from([None, {"rtt": 1}, "x"]),
    lts=st.sampled_from([None, -1, 0, 50, 86_400, 86_401]),
    type=st.sampled_from(["ping", "ping", None, "dns"]),
    timestamp=st.sampled_from([1_700_000_000, 1_600_000_000, None]),
)
LINES = RESULTS.map(lambda r: json.dumps(r).encode()) | st.binary(max_size=12).filter(is_one_line)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(lines=st.lists(LINES, min_size=1, max_size=12))
def test_the_parser_agrees_with_a_slow_reference(tmp_path_factory, lines):
    rows, dropped = parse(tmp_path_factory.mktemp("dump"), *lines, packets="all")
    want = [reference(line) for line in lines]
    counted = {name: sum(w == name for w in want) for name in DROPPED_LINES}
    assert dropped == {name: count for name, count in counted.items() if count}
    got = [(format_address(row["src"]), format_address(row["dst"]), row["rtt_ms"]) for row in rows]
    assert got == [
        (src, dst, rtt) for src, dst, packets in (w for w in want if isinstance(w, tuple)) for rtt in packets
    ]


def test_folders_with_wildcards_in_their_names_are_read(tmp_path):
    folder = tmp_path / "a[1]*?"
    folder.mkdir()
    assert len(parse(folder, ping())[0]) == 1
