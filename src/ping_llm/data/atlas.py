"""Atlas JSON in, measurements out; every line ends in exactly one named counter.

Fields differ by firmware: 1 gives `addr` and no `result`, 4400 adds `result` and `srcaddr`, 4460 `dst_addr`, `src_addr`
and `type`, 4540 `lts`. Numbers may be strings. DuckDB reads the lines against explicit columns: what is of the wrong type
is NULL, and a line that is no JSON object is a row of NULLs.
"""

from __future__ import annotations

import glob
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ping_llm.data.hashing import hash_below, hash_keys, int64_bytes
from ping_llm.data.measurement import (
    ADDRESS_BYTES,
    FAILED_RTT_MS,
    MEASUREMENT_SCHEMA,
    is_ipv4,
    is_public,
    pack_addresses,
)

Packets = Literal["one", "all"]

RESULT_SCHEMA = MEASUREMENT_SCHEMA.append(pa.field("packet", pa.uint16()))
"""A measurement, and which packet of its result it is: 0 for the first one kept."""

MAX_TIME_S = 2**32 - 1
MAX_RTT_MS = 4_294_967.0
"""2³² µs, 71 minutes, the end of the RTT code; a longer one is an error of the probe."""
MAX_CLOCK_SKEW_S = 86_400
"""Largest `lts`. At 20 ppm a clock that was set a day ago is off by 2 s, about what whole seconds leave open anyway."""

DROPPED_LINES = {
    "blank_line": "nothing but white space",
    "malformed_json": "not a JSON object with a field of a ping in it, not UTF-8, or longer than 1 MB",
    "not_ping": "of another type, such as traceroute",
    "no_timestamp": "without a timestamp between 1970 and 2106",
    "no_destination": "without a destination address, most often because its name was not resolved",
    "bad_destination": "whose destination is not an address",
    "private_destination": "whose destination is private, link-local, multicast or reserved",
    "local_error": "of packets that never left: address not allowed, socket, bind or connect failed",
    "no_result": "without a packet whose fate is told",
    "no_source": "with neither a public src_addr nor a public from",
    "unsynced_clock": "whose clock was last set longer ago than allowed, or never (lts −1)",
}
"""Counters of dropped lines, in the order in which they apply: a line goes to the first that fits."""

_COLUMNS = {
    **dict.fromkeys(("fw", "lts", "prb_id", "msm_id", "timestamp", "sent", "rcvd"), "BIGINT"),
    **dict.fromkeys(("type", "src_addr", "srcaddr", "from", "dst_addr", "addr"), "VARCHAR"),
    **dict.fromkeys(("min", "avg", "max"), "DOUBLE"),
    "result": "STRUCT(rtt DOUBLE, x VARCHAR, error VARCHAR, dup BIGINT)[]",
}

# A duplicate is a second reply to one packet. "sendto failed" is a packet that was tried and lost; the other errors come
# from before the first packet. Firmware 1 gives no packets, but of up to three of them min, avg and max tell the RTT of
# each, and sent − rcvd were lost: a fair sample, which min or avg alone are not.
_PACKETS = f"""
    CASE WHEN result IS NOT NULL THEN list_transform(
        list_filter(result, lambda p: coalesce(p.dup, 0) = 0
            AND (p.rtt BETWEEN 1e-6 AND {MAX_RTT_MS} OR p.x IS NOT NULL OR starts_with(p.error, 'sendto failed'))),
        lambda p: CASE WHEN p.rtt BETWEEN 1e-6 AND {MAX_RTT_MS} THEN p.rtt ELSE {FAILED_RTT_MS} END)
    WHEN fw < 4400 AND sent BETWEEN 1 AND 3 AND rcvd BETWEEN 0 AND sent
        AND (rcvd = 0 OR (1e-6 <= min AND min <= avg AND avg <= max AND max <= {MAX_RTT_MS}))
    THEN list_resize(
        CASE rcvd WHEN 0 THEN [] WHEN 1 THEN [min] WHEN 2 THEN [min, max]
            ELSE [min, least(greatest(3 * avg - min - max, min), max), max] END, sent, {FAILED_RTT_MS})
    END"""

_QUERY = f"""
    SELECT {" AND ".join(f'"{name}" IS NULL' for name in _COLUMNS)} AS malformed_json,
        coalesce(type <> 'ping', false) AS not_ping,
        coalesce(timestamp NOT BETWEEN 1 AND {MAX_TIME_S}, true) AS no_timestamp,
        coalesce(lts < 0 OR lts > $max_clock_skew_s, false) AS unsynced_clock,
        coalesce(packets = [] AND len(list_filter(result, lambda p: p.error IS NOT NULL)) > 0, false) AS local_error,
        greatest(coalesce(prb_id, -1), -1) AS probe_id, coalesce(msm_id, -1) AS msm_id, coalesce(timestamp, 0) AS time_s,
        coalesce(src_addr, srcaddr) AS src, "from", nullif(coalesce(dst_addr, addr), '') AS dst,
        coalesce(packets, []) AS packets
    FROM (SELECT *, {_PACKETS} AS packets FROM read_json(
        $path, format = 'newline_delimited', ignore_errors = true, maximum_object_size = 4194304,
        columns = {{{", ".join(f"'{name}': '{kind}'" for name, kind in _COLUMNS.items())}}}))"""


def parse_results(
    path: Path, lines: int, packets: Packets = "one", max_clock_skew_s: int = MAX_CLOCK_SKEW_S
) -> tuple[pa.Table, dict[str, int]]:
    """Reads `lines` plain lines of ping results: a table of RESULT_SCHEMA, and how many lines each of DROPPED_LINES took.

    `packets` "one" keeps one packet a result, picked by a hash of probe, measurement and time, so that a packet's chance
    to be kept does not depend on its RTT; "all" keeps each. `max_clock_skew_s` bounds `lts`, the seconds since the clock
    was set.
    """
    raw = _read(path, max_clock_skew_s)
    src, dst, has_src, is_address, is_public_dst = _addresses(raw)
    column = {name: raw.column(name).to_numpy() for name in raw.column_names if pa.types.is_boolean(raw[name].type)}
    column |= {
        "no_destination": raw.column("dst").is_null().to_numpy(),
        "bad_destination": ~is_address,
        "private_destination": ~is_public_dst,
        "no_result": pc.list_value_length(raw.column("packets")).to_numpy() == 0,
        "no_source": ~has_src,
    }
    dropped = {"blank_line": lines - raw.num_rows}  # DuckDB passes over them in silence
    assert dropped["blank_line"] >= 0, f"{raw.num_rows} rows of {lines} lines in {path}"
    keep = np.ones(raw.num_rows, dtype=bool)
    for name in DROPPED_LINES:
        if name != "blank_line":
            dropped[name] = int((keep & column[name]).sum())
            keep &= ~column[name]
    return _measurements(raw.filter(pa.array(keep)), src[keep], dst[keep], packets), dropped


@cache
def _database():
    import duckdb

    return duckdb.connect(config={"threads": 1, "memory_limit": "500MB", "autoinstall_known_extensions": False})


def _read(path: Path, max_clock_skew_s: int) -> pa.Table:
    """The fields of each line that is not blank, under one name over all firmware."""
    parameters = {"path": glob.escape(str(path)), "max_clock_skew_s": max_clock_skew_s}
    return _database().sql(_QUERY, params=parameters).to_arrow_table().combine_chunks()


def _addresses(raw: pa.Table) -> tuple[np.ndarray, ...]:
    """(n, 16) source and destination; (n,) bool: has a public source, destination is an address, destination is public."""
    texts = pa.chunked_array([raw[name].combine_chunks() for name in ("src", "from", "dst")]).combine_chunks()
    encoded = texts.dictionary_encode()
    unique = [
        text.partition("%")[0] for text in encoded.dictionary.to_pylist()
    ]  # fe80::1%eth0: the scope is no address
    packed, valid = pack_addresses([*unique, None])
    public = valid & is_public(packed)
    src, other_src, dst = encoded.indices.fill_null(len(unique)).to_numpy().reshape(3, -1)
    src = np.where(public[src], src, other_src)
    return packed[src], packed[dst], public[src], valid[dst], public[dst]


def _measurements(raw: pa.Table, src: np.ndarray, dst: np.ndarray, packets: Packets) -> pa.Table:
    """The kept packets of kept results, (n,) with (n, 16) addresses, as a table of RESULT_SCHEMA."""
    lists = raw.column("packets").combine_chunks()
    begin = lists.offsets.to_numpy()[:-1]
    length = np.diff(lists.offsets.to_numpy())
    probe_id, msm_id, time_s = (raw.column(name).to_numpy() for name in ("probe_id", "msm_id", "time_s"))
    if packets == "one":
        result = slice(None)
        packet = np.zeros(len(length), dtype=np.uint16)
        taken = begin + hash_below(hash_keys(int64_bytes(probe_id, msm_id, time_s)), length)
    else:
        result = np.repeat(np.arange(len(length)), length)
        taken = np.arange(len(result)) + (begin[0] if len(begin) else 0)
        packet = (taken - begin[result]).astype(np.uint16)
    src, dst = src[result], dst[result]
    columns = [
        *(probe_id[result], msm_id[result], time_s[result]),
        *(
            pa.FixedSizeBinaryArray.from_buffers(pa.binary(ADDRESS_BYTES), len(a), [None, pa.py_buffer(a)])
            for a in (src, dst)
        ),
        np.where(is_ipv4(dst), 4, 6).astype(np.uint8),
        lists.values.to_numpy()[taken].astype(np.float32),
        packet,
    ]
    return pa.Table.from_arrays([pa.array(column) for column in columns], schema=RESULT_SCHEMA)
