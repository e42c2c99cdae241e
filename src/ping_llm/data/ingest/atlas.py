"""Atlas JSON in, measurements out; every line ends in exactly one named counter.

Fields differ by firmware: 1 gives `addr` and no `result`, 4400 adds `result` and `srcaddr`, 4460 `dst_addr`, `src_addr`
and `type`, 4540 `lts`. Numbers may be strings. DuckDB reads the lines against explicit columns: what is of the wrong type
is NULL, and a line that is no JSON object is a row of NULLs.
"""

from __future__ import annotations

import glob
from collections import Counter
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from ping_llm.data.ingest.choices import Packets, Traceroute
from ping_llm.data.ingest.results import MAX_CLOCK_SKEW_S, MAX_RTT_MS, MAX_TIME_S, MIN_RTT_MS, database, measure_pings
from ping_llm.data.ingest.traceroute import measure_traceroutes
from ping_llm.data.measurement import FAILED_RTT_MS

_COLUMNS = {
    **dict.fromkeys(("fw", "lts", "prb_id", "msm_id", "timestamp", "sent", "rcvd"), "BIGINT"),
    **dict.fromkeys(("type", "src_addr", "srcaddr", "from", "dst_addr", "addr"), "VARCHAR"),
    **dict.fromkeys(("min", "avg", "max"), "DOUBLE"),
    "result": "STRUCT(rtt DOUBLE, x VARCHAR, error VARCHAR, dup BIGINT)[]",
}
_REPLIES = 'STRUCT("from" VARCHAR, rtt DOUBLE, x VARCHAR, err VARCHAR, late VARCHAR, dup BIGINT)[]'
_TRACEROUTE_COLUMNS = _COLUMNS | {"result": f"{_COLUMNS['result'].removesuffix(')[]')}, result {_REPLIES})[]"}

# A duplicate is a second reply to one packet. "sendto failed" is a packet that was tried and lost; the other errors come
# from before the first packet. Firmware 1 gives no packets, but of up to three of them min, avg and max give the RTT of
# each, and sent − rcvd were lost: a fair sample, which min or avg alone are not.
_PACKETS = f"""
    CASE WHEN result IS NOT NULL THEN list_transform(
        list_filter(result, lambda p: coalesce(p.dup, 0) = 0
            AND (p.rtt BETWEEN {MIN_RTT_MS} AND {MAX_RTT_MS} OR p.x IS NOT NULL OR starts_with(p.error, 'sendto failed'))),
        lambda p: CASE WHEN p.rtt BETWEEN {MIN_RTT_MS} AND {MAX_RTT_MS} THEN p.rtt ELSE {FAILED_RTT_MS} END)
    WHEN fw < 4400 AND sent BETWEEN 1 AND 3 AND rcvd BETWEEN 0 AND sent
        AND (rcvd = 0 OR ({MIN_RTT_MS} <= min AND min <= avg AND avg <= max AND max <= {MAX_RTT_MS}))
    THEN list_resize(
        CASE rcvd WHEN 0 THEN [] WHEN 1 THEN [min] WHEN 2 THEN [min, max]
            ELSE [min, least(greatest(3 * avg - min - max, min), max), max] END, sent, {FAILED_RTT_MS})
    END"""

# Before firmware 4460 no line names its type; a traceroute is recognised by its hops.
_HOPS = """
        coalesce(type = 'traceroute', len(list_filter(result, lambda h: h.result IS NOT NULL)) > 0, false) AS is_traceroute,
        list_transform(result, lambda h: h.result) AS hops,"""


def parse_results(
    path: Path,
    lines: int,
    packets: Packets = "one",
    max_clock_skew_s: int = MAX_CLOCK_SKEW_S,
    traceroute: Traceroute = "off",
) -> tuple[pa.Table, dict[str, int]]:
    """Reads `lines` plain lines of results: a table of RESULT_SCHEMA, and how many lines each of DROPPED_LINES took.

    `packets`: see measure_pings and measure_traceroutes. `max_clock_skew_s` bounds `lts`, the seconds since the clock was
    set. Unless `traceroute` is "off", the counters hold what became of the replies too, by the names in REPLIES.
    """
    parameters = {"path": glob.escape(str(path)), "max_clock_skew_s": max_clock_skew_s}
    fields = database().sql(_query(traceroute != "off"), params=parameters).to_arrow_table().combine_chunks()
    counters = Counter(blank_line=lines - fields.num_rows)  # DuckDB passes over them in silence
    assert counters["blank_line"] >= 0, f"{fields.num_rows} rows of {lines} lines in {path}"
    tables = []
    if traceroute != "off":
        table, counts = measure_traceroutes(fields.filter(fields["is_traceroute"]), traceroute, packets)
        tables.append(table)
        counters.update(counts)
        fields = fields.filter(pc.invert(fields["is_traceroute"]))
    table, counts = measure_pings(fields, packets)
    counters.update(counts)
    return pa.concat_tables([table, *tables]), dict(counters)


@cache
def _query(with_hops: bool) -> str:
    """The fields of each line that is not blank, under one name over all firmware."""
    columns = _TRACEROUTE_COLUMNS if with_hops else _COLUMNS
    return f"""
    SELECT {" AND ".join(f'"{name}" IS NULL' for name in columns)} AS malformed_json,
        coalesce(type = 'traceroute', false) AS traceroute_off,
        coalesce(type NOT IN ('ping', 'traceroute'), false) AS not_ping,
        coalesce(timestamp NOT BETWEEN 1 AND {MAX_TIME_S}, true) AS no_timestamp,
        coalesce(lts < 0 OR lts > $max_clock_skew_s, false) AS unsynced_clock,
        CASE WHEN len(packets) > 0 THEN false
            ELSE coalesce(len(list_filter(result, lambda p: p.error IS NOT NULL)) > 0, false) END AS has_error,
        greatest(coalesce(prb_id, -1), -1) AS probe_id, coalesce(msm_id, -1) AS msm_id, coalesce(timestamp, 0) AS time_s,
        coalesce(src_addr, srcaddr) AS src, "from", nullif(coalesce(dst_addr, addr), '') AS dst,{_HOPS if with_hops else ""}
        coalesce(packets, []) AS packets
    FROM (SELECT *, {_PACKETS} AS packets FROM read_json(
        $path, format = 'newline_delimited', ignore_errors = true, maximum_object_size = 4194304,
        columns = {{{", ".join(f"'{name}': '{kind}'" for name, kind in columns.items())}}}))"""
