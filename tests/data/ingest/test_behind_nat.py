"""Probes behind a NAT: the private src_addr gives way to the public `from`, and no result is lost by it."""

import bz2
import ipaddress
import json
from collections import Counter

import pytest
from paths import SHARED_DATA
from pings import ndjson, ping, write

from ping_llm.data.ingest.prepare import prepare
from ping_llm.data.measurement import format_address
from ping_llm.data.rows import RowReader

REAL = SHARED_DATA / "more"
PRIVATE = [
    ipaddress.ip_network(n) for n in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "192.0.0.0/24")
]


def is_private(text):
    return text is None or any(ipaddress.ip_address(text) in network for network in PRIVATE)


def all_are_kept(dumps, out):
    """That each result of a synced clock is a measurement from its public address; the share of private src_addr."""
    results = [json.loads(line) for path in dumps for line in bz2.decompress(path.read_bytes()).splitlines()]
    synced = [r for r in results if 0 <= r["lts"] <= 86_400]
    want = Counter(
        (r["prb_id"], r["timestamp"], r["from"] if is_private(r.get("src_addr")) else r["src_addr"]) for r in synced
    )
    manifest = prepare(dumps, out, workers=1, split="none")
    counters = {name: count for name, count in manifest["lines"]["counters"].items() if count}
    assert counters == {"kept": len(synced)} | (
        {"unsynced_clock": lost} if (lost := len(results) - len(synced)) else {}
    )
    got = Counter(
        (r["probe_id"], r["time_s"], format_address(r["src"]))
        for row in RowReader(out, "train")
        for r in row.to_measurements().to_pylist()
    )
    assert got == want
    return sum(is_private(r.get("src_addr")) for r in results) / len(results)


def test_of_private_sources_the_public_address_is_kept_and_no_result_is_lost(tmp_path):
    private = ["10.1.2.3", "192.168.1.7", "172.20.0.9", "100.64.3.4", "192.0.0.2", None]
    results = [
        ping(
            prb_id=i,
            src_addr=private[i % 6] if i else "192.0.2.1",
            from_=f"203.0.113.{i + 1}",
            lts=-1 if i == 7 else 20,
        )
        for i in range(15)
    ]
    dumps = [write(tmp_path / f"{i}.bz2", ndjson(*results[i::2])) for i in range(2)]
    assert all_are_kept(dumps, tmp_path / "out") == 14 / 15


def test_of_the_real_probes_behind_nats_no_result_is_lost(tmp_path):
    dumps = sorted(REAL.glob("cities2023-ping-*"))
    if not dumps:
        pytest.skip("needs the real dumps in ../shared/data, which are not part of the project")
    assert 0.9 < all_are_kept(dumps, tmp_path / "out") < 0.96
