"""Traceroute results in, measurements out: each reply gives the RTT from the source to the address that sent it.

    target   only replies of the destination, in the last hop
    hops     replies of every public address on the way

A packet without reply is no measurement: which address did not reply is unknown. So traceroutes say nothing about loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ping_llm.data.hashing import hash_below, hash_keys, int64_bytes
from ping_llm.data.ingest.choices import Packets, Traceroute
from ping_llm.data.ingest.results import MAX_RTT_MS, MIN_RTT_MS, destination_faults, drop, read_addresses, result_table
from ping_llm.data.measurement import KINDS

REPLIES = {
    "reply_used": "that became measurements",
    "reply_absent": "no reply (x), one without an address, or a packet that never left",
    "reply_late": "after the time-out: to which packet it replies is not sure",
    "reply_duplicate": "second replies to one packet",
    "reply_icmp_error": "of a router that could not forward (!N, !H, !A …): it may have waited before it said so",
    "reply_without_rtt": "without an RTT between 1 ns and 71 minutes",
    "reply_bad_address": "of what is not an address",
    "reply_private_address": "of a private, link-local, multicast, reserved or other address that is no host",
    "reply_not_of_target": "not of the destination, or before the last hop (--traceroute target)",
    "reply_of_dropped_line": "of lines that were dropped for another reason",
    "reply_not_picked": "of hops of which another reply was kept (--packets one)",
}
"""Counters of the entries of traceroutes, one a packet; after the first, in the order in which they apply."""

_BY_DESTINATION_ITSELF = ("P", "p")
"""Protocol or port unreachable is how a host replies to a UDP traceroute; routers send the other ICMP errors."""


@dataclass(frozen=True)
class _Entries:
    """The R entries of the H hops of all lines, in order."""

    line: np.ndarray  # (R,) int64
    hop: np.ndarray  # (R,) int64 among all hops
    in_last_hop: np.ndarray  # (R,) bool
    columns: dict[str, pa.Array]  # (R,) each: from, rtt, x, err, late, dup


def measure_traceroutes(fields: pa.Table, traceroute: Traceroute, packets: Packets) -> tuple[pa.Table, dict[str, int]]:
    """Fields of n traceroutes to a table of RESULT_SCHEMA, and the counters of DROPPED_LINES and REPLIES.

    `fields` has a column `hops` besides: a list of hops, each a list of replies. `packets` "one" keeps of each hop one of
    the replies that can be used, picked by a hash of probe, measurement, time and hop; "all" keeps each.
    """
    entries = _flatten(fields["hops"])
    src, other_src, dst, hop = read_addresses(
        *(fields[name] for name in ("src", "from", "dst")), pa.chunked_array([entries.columns["from"]])
    )
    src = src.or_else(other_src)
    faults = _reply_faults(entries) | {"reply_bad_address": ~hop.valid, "reply_private_address": ~hop.public}
    of_target = (hop.packed == dst.packed[entries.line]).all(axis=1) & entries.in_last_hop
    if traceroute == "target":
        faults["reply_not_of_target"] = ~of_target
    usable, counters = drop(np.ones(len(entries.line), dtype=bool), faults, REPLIES)
    silent, unused = (
        np.bincount(entries.line[replies], minlength=len(fields)) == 0 for replies in (~faults["reply_absent"], usable)
    )
    destination = destination_faults(fields, dst)
    if traceroute == "hops":  # where the path leads does not matter to what was met on it
        destination = {"no_destination": destination["no_destination"] & unused}
    faults = {name: fields[name].to_numpy() for name in ("no_timestamp", "unsynced_clock")}
    faults |= destination | {"no_result": unused, "no_source": ~src.public}
    faults["local_error"] = fields["has_error"].to_numpy() & silent
    keep, dropped = drop(np.ones(len(fields), dtype=bool), faults)
    usable, counts = drop(usable, {"reply_of_dropped_line": ~keep[entries.line]}, REPLIES)
    counters |= counts
    if packets == "one":
        usable, counts = drop(usable, {"reply_not_picked": ~_picked(fields, entries, usable)}, REPLIES)
        counters |= counts
    taken = np.flatnonzero(usable)
    line = entries.line[taken]
    packet = hash_keys(np.hstack([dst.packed[line], int64_bytes(taken - _first_of_each(entries.line)[taken])]))
    rtt_ms = entries.columns["rtt"].to_numpy(zero_copy_only=False)[taken]
    kind = np.where(of_target[taken], KINDS.index("target"), KINDS.index("hop"))
    table = result_table(fields, line, src.packed[line], hop.packed[taken], rtt_ms, packet, kind)
    return table, dropped | counters | {"reply_used": len(taken)}


def _flatten(hops: pa.ChunkedArray) -> _Entries:
    """(n,) lists of hops, each a list of replies, to one column of replies."""
    lists = hops.combine_chunks()
    line_of_hop = pc.list_parent_indices(lists).to_numpy()
    per_hop = pc.list_flatten(lists)
    hop = pc.list_parent_indices(per_hop).to_numpy()
    replies = pc.list_flatten(per_hop)
    last = np.diff(line_of_hop, append=-1) != 0
    columns = {field.name: pc.struct_field(replies, field.name) for field in replies.type}
    return _Entries(line_of_hop[hop], hop, last[hop], columns)


def _reply_faults(entries: _Entries) -> dict[str, np.ndarray]:
    """What can be wrong with each entry by itself, each (R,) bool."""
    column = entries.columns
    error = pc.is_in(column["err"], pa.array(_BY_DESTINATION_ITSELF))
    rtt_ms = column["rtt"].fill_null(0)
    faults = {
        "reply_absent": pc.or_(pc.is_valid(column["x"]), pc.is_null(column["from"])),
        "reply_late": pc.not_equal(column["late"].fill_null("0"), "0"),
        "reply_duplicate": pc.not_equal(column["dup"].fill_null(0), 0),
        "reply_icmp_error": pc.and_(pc.is_valid(column["err"]), pc.invert(error)),
        "reply_without_rtt": pc.invert(
            pc.and_(pc.greater_equal(rtt_ms, MIN_RTT_MS), pc.less_equal(rtt_ms, MAX_RTT_MS))
        ),
    }
    return {name: fault.to_numpy(zero_copy_only=False) for name, fault in faults.items()}


def _picked(fields: pa.Table, entries: _Entries, usable: np.ndarray) -> np.ndarray:
    """(R,) bool: one of the usable replies of each hop that has any."""
    taken = np.flatnonzero(usable)
    _, begin, count = np.unique(entries.hop[taken], return_index=True, return_counts=True)
    line = entries.line[taken[begin]]
    first_hop = entries.hop[_first_of_each(entries.line)[taken[begin]]]
    identity = (fields[name].to_numpy()[line] for name in ("probe_id", "msm_id", "time_s"))
    keys = int64_bytes(*identity, entries.hop[taken[begin]] - first_hop)
    picked = np.zeros(len(usable), dtype=bool)
    picked[taken[begin + hash_below(hash_keys(keys), count)]] = True
    return picked


def _first_of_each(line: np.ndarray) -> np.ndarray:
    """For each of (R,) ascending lines, the index at which that line begins."""
    begins = np.flatnonzero(np.diff(line, prepend=-1))
    return np.repeat(begins, np.diff(begins, append=len(line)))
