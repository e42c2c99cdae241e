"""Fields of ping results in, measurements out; every line ends in exactly one named counter.

What is read from JSON or from a table is first brought to the same columns, here called fields:

    malformed_json, traceroute_off, not_ping, no_timestamp, unsynced_clock, has_error     bool
    probe_id, msm_id, time_s     int64          src, from, dst     text          packets     list of RTT in ms, −1 = lost

and, where the packets of one line have times and numbers of their own, lists of them: times, numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ping_llm.data.hashing import hash_below, hash_keys, int64_bytes
from ping_llm.data.ingest.choices import Packets
from ping_llm.data.measurement import MEASUREMENT_SCHEMA, binary_column, is_ipv4, is_public, pack_addresses

RESULT_SCHEMA = MEASUREMENT_SCHEMA.append(pa.field("packet", pa.uint32())).append(pa.field("first_of_line", pa.bool_()))
"""A measurement; `packet` numbers those of one result, alike in each copy of it; one of each line is `first_of_line`."""

ROW_PACKET = 2**32 - 1
"""The `packet` of a row of one packet, of which nothing says which of its ping's it is (see repeats)."""

MAX_TIME_S = 2**32 - 1
MIN_RTT_MS = 1e-6
MAX_RTT_MS = 4_294_967.0  # 2³² µs, 71 minutes, the end of the RTT code; a longer one is an error of the probe
MAX_CLOCK_SKEW_S = 86_400
"""Largest `lts`. At 20 ppm a clock that was set a day ago is off by 2 s, about the resolution of whole seconds."""

DROPPED_LINES = {
    "blank_line": "nothing but white space",
    "malformed_json": "not a JSON object with a field of a ping in it, not UTF-8, or longer than 1 MB; a row of NULLs",
    "traceroute_off": "traceroutes, which only --traceroute target or hops uses",
    "not_ping": "of another type than ping and traceroute",
    "no_timestamp": "without a timestamp between 1970 and 2106",
    "no_destination": "without a destination address, most often because its name was not resolved",
    "bad_destination": "whose destination is not an address",
    "private_destination": "whose destination is private, link-local, multicast, reserved or otherwise no host",
    "local_error": "of packets that never left: address not allowed, socket, bind or connect failed",
    "no_result": "without a packet known to be answered or lost, as the first line of a log; of traceroutes, without a "
    "reply that is used",
    "no_source": "with neither a public src_addr nor a public from",
    "unsynced_clock": "whose clock was last set longer ago than allowed, or never (lts −1)",
}
"""Counters of dropped lines, in the order in which they apply: a line goes to the first that fits."""


@dataclass(frozen=True)
class Addresses:
    """n addresses as read from text."""

    packed: np.ndarray  # (n, 16) uint8
    valid: np.ndarray  # (n,) bool: the text is an address
    public: np.ndarray  # (n,) bool

    def or_else(self, other: Addresses) -> Addresses:
        """These where they are public, else the others."""
        use = self.public
        packed = np.where(use[:, None], self.packed, other.packed)
        return Addresses(packed, np.where(use, self.valid, other.valid), use | other.public)


def measure_pings(
    fields: pa.Table, packets: Packets, rows_are_packets: bool = False
) -> tuple[pa.Table, dict[str, int]]:
    """Fields of n results to a table of RESULT_SCHEMA, and how many lines each of DROPPED_LINES took.

    `packets` "one" keeps one packet a result, picked by a hash of probe, measurement and time, so that a packet's chance
    to be kept does not depend on its RTT; "all" keeps each. `rows_are_packets`: results of one packet each, of which several
    may be of one ping.
    """
    src, other_src, dst = read_addresses(*(fields[name] for name in ("src", "from", "dst")))
    src = src.or_else(other_src)
    empty = pc.list_value_length(fields["packets"]).to_numpy() == 0
    faults = {name: fields[name].to_numpy() for name in DROPPED_LINES if name in fields.column_names}
    faults |= destination_faults(fields, dst) | {"no_result": empty, "no_source": ~src.public}
    faults["local_error"] = fields["has_error"].to_numpy() & empty
    keep, dropped = drop(np.ones(len(fields), dtype=bool), faults)
    kept = fields.select(["probe_id", "msm_id", "time_s", "packets"]).filter(pa.array(keep))
    line, taken, packet = _take_packets(kept, packets)
    rtt_ms = pc.list_flatten(kept["packets"]).to_numpy()[taken]
    at = np.flatnonzero(keep)[line]
    time_s = fields["time_s"].to_numpy()[at]
    if rows_are_packets:
        packet = np.full(len(packet), ROW_PACKET)
    elif "times" in fields.column_names:
        time_s, packet = (
            pc.list_flatten(fields[name].filter(pa.array(keep))).to_numpy()[taken] for name in ("times", "numbers")
        )
    return result_table(fields, at, src.packed[at], dst.packed[at], rtt_ms, packet, time_s=time_s), dropped


@cache
def database() -> Any:
    """A connection to DuckDB that reads into fields, of this process."""
    import duckdb

    return duckdb.connect(config={"threads": 1, "memory_limit": "500MB", "autoinstall_known_extensions": False})


def destination_faults(fields: pa.Table, dst: Addresses) -> dict[str, np.ndarray]:
    """What can be wrong with the destination of a line, each (n,) bool."""
    return {
        "no_destination": fields["dst"].is_null().to_numpy(),
        "bad_destination": ~dst.valid,
        "private_destination": ~dst.public,
    }


def drop(
    keep: np.ndarray, faults: dict[str, np.ndarray], order: Iterable[str] = DROPPED_LINES
) -> tuple[np.ndarray, dict[str, int]]:
    """Which of (n,) bool are left without fault, and how many each fault took; a line goes to the first that fits."""
    dropped = {}
    for name in order:
        if name in faults:
            dropped[name] = int((keep & faults[name]).sum())
            keep = keep & ~faults[name]
    return keep, dropped


def read_addresses(*columns: pa.ChunkedArray) -> list[Addresses]:
    """Columns of n texts each; the distinct ones are parsed, of all columns together."""
    encoded = pa.chunked_array([column.combine_chunks() for column in columns], pa.string()).combine_chunks()
    encoded = encoded.dictionary_encode()
    # fe80::1%eth0: the scope is no part of the address
    unique = [text.partition("%")[0] for text in encoded.dictionary.to_pylist()]
    packed, valid = pack_addresses([*unique, None])
    public = valid & is_public(packed)
    indices = np.split(encoded.indices.fill_null(len(unique)).to_numpy(), np.cumsum([len(c) for c in columns])[:-1])
    return [Addresses(packed[i], valid[i], public[i]) for i in indices]


def result_table(
    fields: pa.Table,
    line: np.ndarray,
    src: np.ndarray,
    dst: np.ndarray,
    rtt_ms: np.ndarray,
    packet: np.ndarray,
    kind: np.ndarray | int = 0,
    time_s: np.ndarray | None = None,
) -> pa.Table:
    """n measurements with (n, 16) addresses as a table of RESULT_SCHEMA; `line` (n,) ascends and is their row in fields.

    `kind` indexes KINDS. `time_s` (n,) is that of the line unless given.
    """
    columns = [
        *(fields[name].to_numpy()[line] for name in ("probe_id", "msm_id")),
        fields["time_s"].to_numpy()[line] if time_s is None else time_s,
        binary_column(src),
        binary_column(dst),
        np.where(is_ipv4(dst), 4, 6).astype(np.uint8),
        rtt_ms.astype(np.float32),
        np.broadcast_to(np.asarray(kind, dtype=np.uint8), len(line)),
        packet.astype(np.uint32),
        np.diff(line, prepend=-1) != 0,
    ]
    return pa.Table.from_arrays([pa.array(column) for column in columns], schema=RESULT_SCHEMA)


def _take_packets(kept: pa.Table, packets: Packets) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of n kept results: the result of each packet taken, its index among the packets of all, and that in the result."""
    length = pc.list_value_length(kept["packets"]).to_numpy()
    begin = np.cumsum(length) - length
    if packets == "one":
        keys = int64_bytes(*(kept[name].to_numpy() for name in ("probe_id", "msm_id", "time_s")))
        return np.arange(len(length)), begin + hash_below(hash_keys(keys), length), np.zeros(len(length), np.uint32)
    line = np.repeat(np.arange(len(length)), length)
    taken = np.arange(len(line))
    return line, taken, taken - begin[line]
