"""Columns of ping results in, lines of RIPE Atlas JSON out, with the fields, their order and the oddities of real dumps.

Python's `%` runs over whole columns (`map(template.__mod__, zip(…))`): no loop and no json.dumps for a line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

FIRST_UNSORTED_FIRMWARE = 5000
# Older firmware sorts its keys; from 5000 on they come in the order in which they are made.
_SORTED = (
    '{"af":%(af)d,"avg":%(avg)s,%(dst_addr)s"dst_name":"%(dst_name)s","dup":%(dup)d,"from":"%(from)s","fw":%(fw)d,'
    '%(group_id)s"lts":%(lts)d,"max":%(max)s,"min":%(min)s,"msm_id":%(msm_id)d,"msm_name":"Ping","prb_id":%(prb_id)d,'
    '"proto":"ICMP","rcvd":%(rcvd)d,"result":[%(result)s],"sent":%(sent)d,"size":%(size)d,%(src_addr)s'
    '"step":%(step)d,"stored_timestamp":%(stored_timestamp)d,"timestamp":%(timestamp)d,%(ttl)s"type":"ping"}'
)
_AS_MADE = (
    '{"fw":%(fw)d,"mver":"%(mver)s","lts":%(lts)d,"dst_name":"%(dst_name)s",%(ttr)s"af":%(af)d,%(dst_addr)s%(src_addr)s'
    '"proto":"ICMP",%(ttl)s"size":%(size)d,"result":[%(result)s],"dup":%(dup)d,"rcvd":%(rcvd)d,"sent":%(sent)d,'
    '"min":%(min)s,"max":%(max)s,"avg":%(avg)s,"msm_id":%(msm_id)d,"prb_id":%(prb_id)d,"timestamp":%(timestamp)d,'
    '"msm_name":"Ping","from":"%(from)s","type":"ping",%(group_id)s"step":%(step)d,"stored_timestamp":%(stored_timestamp)d}'
)
_MVER = {5020: "2.2.1", 5080: "2.6.2"}

NO_ERROR, CONNECT_FAILED, DNS_FAILED, NOT_ALLOWED = range(4)
_ERROR_ENTRIES = {
    CONNECT_FAILED: '{"error":"connect failed: Network is unreachable"}',
    DNS_FAILED: '{"error":"dns resolution failed: non-recoverable failure in name resolution"}',
    NOT_ALLOWED: '{"error":"address not allowed"}',
}
_LOST_ENTRY = '{"x":"*"}'
_SENDTO_ENTRY = '{"error":"sendto failed: Network is unreachable"}'


@dataclass(frozen=True)
class Results:
    """n ping results of P packets each, as columns. A result with an error has lost all its packets."""

    probe: np.ndarray  # (n,) index into the probes
    measurement: np.ndarray  # (n,) index into the measurements
    time_s: np.ndarray  # (n,) Unix seconds of the probe's clock
    stored_s: np.ndarray  # (n,) Unix seconds at which the upload came in
    lts_s: np.ndarray  # (n,) seconds since the clock was synchronised, −1 unknown
    ttl: np.ndarray  # (n,) of the replies
    ttr_ms: np.ndarray  # (n,) time to resolve the name of the target
    rtt_ms: np.ndarray  # (n, P) rounded to 6 decimals, −1 lost
    dup_ms: np.ndarray  # (n, P) RTT of a second reply, −1 none
    sendto_failed: np.ndarray  # (n, P) bool, only where the packet is lost
    error: np.ndarray  # (n,) NO_ERROR, or why the result has no packets

    def __len__(self) -> int:
        return len(self.probe)

    def take(self, index: np.ndarray) -> Results:
        """The results at `index`, in its order."""
        return Results(*(getattr(self, f.name)[index] for f in fields(Results)))


class LineWriter:
    """Writes results of one schedule: what only depends on the probe or the measurement is made once."""

    def __init__(self, probes: list[dict[str, Any]], measurements: list[dict[str, Any]], interval_s: int) -> None:
        self._sorted = np.array([probe["firmware"] < FIRST_UNSORTED_FIRMWARE for probe in probes])
        self._by_probe = _columns(
            {
                "fw": p["firmware"],
                "mver": _MVER.get(p["firmware"], ""),
                "prb_id": p["probe_id"],
                "from_ipv4": p["ipv4"],
                "from_ipv6": p["ipv6"] or "",
                "src_ipv4": f'"src_addr":"{p["private_ipv4"] or p["ipv4"]}",' if p["reports_src"] else "",
                "src_ipv6": f'"src_addr":"{p["ipv6"]}",' if p["reports_src"] else "",
            }
            for p in probes
        )
        self._by_measurement = _columns(
            {
                "af": m["ip_version"],
                "msm_id": m["msm_id"],
                "dst_addr": f'"dst_addr":"{m["dst_addr"]}",',
                "dst_name": m["dst_name"],
                "named": int(m["dst_name"] != m["dst_addr"]),
                "group_id": "" if m["built_in"] else f'"group_id":{m["msm_id"]},',
                "size": 32 if m["built_in"] else 64,
                "step": interval_s,
            }
            for m in measurements
        )

    def lines(self, results: Results) -> list[str]:
        """The n lines, without line ends, in the order of the results."""
        lines = np.empty(len(results), dtype=object)
        sorted_keys = self._sorted[results.probe]
        for template, rows in ((_SORTED, sorted_keys), (_AS_MADE, ~sorted_keys)):
            if rows.any():
                lines[rows] = _fill(template, self._fields(results.take(np.flatnonzero(rows))))
        return lines.tolist()

    def _fields(self, results: Results) -> dict[str, np.ndarray]:
        """The n values of every field that a template names; optional fields are whole `"key":value,` texts or empty."""
        probe = {name: column[results.probe] for name, column in self._by_probe.items()}
        measurement = {name: column[results.measurement] for name, column in self._by_measurement.items()}
        ipv4, named = measurement["af"] == 4, measurement.pop("named").astype(bool)
        unresolved, not_allowed = results.error == DNS_FAILED, results.error == NOT_ALLOWED
        dst_addr = measurement.pop("dst_addr")
        dst_addr[unresolved], dst_addr[not_allowed] = "", '"dst_addr":"10.0.0.1",'
        src_addr = np.where(ipv4, probe.pop("src_ipv4"), probe.pop("src_ipv6"))
        src_addr[unresolved | not_allowed] = ""
        ttl = _texts('"ttl":%d,', results.ttl)
        ttl[(results.rtt_ms < 0).all(axis=1)] = ""
        ttr = np.full(len(results), "", dtype=object)
        ttr[named & ~unresolved] = _texts('"ttr":%s,', results.ttr_ms[named & ~unresolved])
        return {
            **probe,
            **measurement,
            **_packet_fields(results),
            "dst_addr": dst_addr,
            "src_addr": src_addr,
            "from": np.where(ipv4, probe["from_ipv4"], probe["from_ipv6"]),
            "ttl": ttl,
            "ttr": ttr,
            "lts": results.lts_s,
            "timestamp": results.time_s,
            "stored_timestamp": results.stored_s,
        }


def _packet_fields(results: Results) -> dict[str, np.ndarray]:
    """What is counted over the packets of a result, and the text of its `result` list."""
    replied = results.rtt_ms >= 0  # (n, P)
    received = replied.sum(axis=1)
    failed = received == 0
    low = np.where(replied, results.rtt_ms, np.inf).min(axis=1)
    total = np.where(replied, results.rtt_ms, 0).sum(axis=1)
    average = np.round(total / np.maximum(received, 1), 10)
    statistics = {"min": low, "max": results.rtt_ms.max(axis=1), "avg": average}
    texts = {name: _texts("%s", values) for name, values in statistics.items()}
    for text in texts.values():
        text[failed] = "-1"
    sent = results.rtt_ms.shape[1] - results.sendto_failed.sum(axis=1)
    return {
        **texts,
        "rcvd": received,
        "sent": np.where(results.error == NO_ERROR, sent, 0),
        "dup": (results.dup_ms > 0).sum(axis=1),
        "result": _entries(results, replied),
    }


def _entries(results: Results, replied: np.ndarray) -> np.ndarray:
    """(n,) the inside of each `result` list."""
    entries = _texts('{"rtt":%s}', results.rtt_ms.ravel()).reshape(replied.shape)
    entries[~replied] = _LOST_ENTRY
    entries[results.sendto_failed] = _SENDTO_ENTRY
    # A reply says its TTL where it differs from the one before: after a loss, the first reply does.
    late = np.flatnonzero(~replied[:, 0] & replied.any(axis=1))
    first = replied[late].argmax(axis=1)
    pairs = zip(results.rtt_ms[late, first].tolist(), results.ttl[late].tolist(), strict=True)
    entries[late, first] = list(map('{"rtt":%s,"ttl":%d}'.__mod__, pairs))
    doubled = results.dup_ms > 0
    entries[doubled] += _texts(',{"dup":1,"rtt":%s}', results.dup_ms[doubled])
    joined = np.array(list(map(",".join, entries.tolist())), dtype=object)
    for error, entry in _ERROR_ENTRIES.items():
        joined[results.error == error] = entry
    return joined


def _fill(template: str, columns: dict[str, np.ndarray]) -> list[str]:
    """The template with its `%(name)d` and `%(name)s` filled from columns, one line a row."""
    names = re.findall(r"%\((\w+)\)", template)
    positional = re.sub(r"%\(\w+\)", "%", template)
    return list(map(positional.__mod__, zip(*(columns[name].tolist() for name in names), strict=True)))


def _texts(template: str, values: np.ndarray) -> np.ndarray:
    """(n,) texts of one column; %s of a float is its shortest decimal form."""
    return np.array(list(map(template.__mod__, values.tolist())), dtype=object)


def _columns(fields: Iterable[dict[str, str | int]]) -> dict[str, np.ndarray]:
    """Columns of rows, texts as objects: fixed-width text would be copied at its full width on every take."""
    rows = list(fields)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {name: np.array(c, dtype=object if isinstance(c[0], str) else np.int64) for name, c in columns.items()}
