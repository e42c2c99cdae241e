"""Parquet files in, measurements out: tables of one packet a row, and exports of the Atlas table of pings in BigQuery.

    a packet a row    msm_id, event_time, src_addr, dst_addr, rtt (ms, −1 = failed)           prb_id where it is known
    BigQuery          prb_id, msm_id, start_time, src_addr, dst_addr, pings: a list of packets

Every row is counted as a line is (see results). Parquet is recognised by the first bytes of a file, the kind by its columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ping_llm.data.ingest.choices import Packets
from ping_llm.data.ingest.results import MAX_RTT_MS, MAX_TIME_S, MIN_RTT_MS, database, measure_pings
from ping_llm.data.ingest.unpack import DamagedDump
from ping_llm.data.measurement import FAILED_RTT_MS

MAGIC = b"PAR1"
BATCH_ROWS = 200_000  # rows parsed at once: about 100 MB with the texts of their addresses
_TIME_COLUMNS = ("event_time", "start_time")


def is_parquet(path: Path) -> bool:
    """By its content, not its name. What cannot be read is none: reading it as lines says why."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def is_typed(path: Path) -> bool:
    """Whether a Parquet file has the columns of one of these kinds, of their types; else its values are read as text."""
    try:
        schema = pq.ParquetFile(path).schema_arrow
    except (pa.ArrowException, OSError):
        return True  # reading it says what is wrong
    if "pings" in schema.names:
        return True
    time = next((schema.field(name).type for name in _TIME_COLUMNS if name in schema.names), None)
    if time is None or not {"src_addr", "dst_addr", "rtt"} <= set(schema.names):
        return False
    halves = any(pa.types.is_float16(field.type) for field in schema)
    return (pa.types.is_timestamp(time) or pa.types.is_integer(time)) and not halves


def read_rows(path: Path) -> Iterator[pa.Table]:
    """The rows of a Parquet file, at most BATCH_ROWS at a time; DamagedDump at the end of what is readable."""
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        where = f"no Parquet footer at byte {path.stat().st_size:,}"
        raise DamagedDump(f"{path.name} is cut off or corrupt: {where} ({_cause(error)}); get it again") from None
    names = _needed_columns(file.schema_arrow, path.name)
    for group in range(file.num_row_groups):
        try:
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=names):
                yield pa.Table.from_batches([batch])
        except (pa.ArrowException, OSError) as error:
            chunks = map(file.metadata.row_group(group).column, range(file.metadata.num_columns))
            begin = min(chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks)
            where = f"in row group {group}, from byte {begin:,} on"
            raise DamagedDump(f"{path.name} is corrupt {where} ({_cause(error)}); get it again") from None


def parse_rows(rows: pa.Table, packets: Packets) -> tuple[pa.Table, dict[str, int]]:
    """A table of RESULT_SCHEMA of rows as `read_rows` gives them, and how many each of DROPPED_LINES took.

    Rows of one packet each are all kept, whatever `packets` says: which of them are of one ping is unknown.
    """
    time = next(name for name in _TIME_COLUMNS if name in rows.column_names)
    seconds = rows[time]
    if pa.types.is_timestamp(seconds.type):  # without a zone it is UTC
        seconds = seconds.cast(pa.timestamp("s", seconds.type.tz), safe=False)
    rows = rows.set_column(rows.column_names.index(time), "time_s", seconds.cast(pa.int64(), safe=False))
    fields = database().from_arrow(rows).query("rows", _query(rows.schema)).to_arrow_table().combine_chunks()
    return measure_pings(fields, packets, rows_are_packets="pings" not in rows.column_names)


def _needed_columns(schema: pa.Schema, name: str) -> list[str]:
    """The columns to read; DamagedDump if the table is of another kind."""
    times = [time for time in _TIME_COLUMNS if time in schema.names]
    packets = [column for column in ("pings", "rtt") if column in schema.names]
    if not (times and packets and {"src_addr", "dst_addr"} <= set(schema.names)):
        raise DamagedDump(
            f"{name} is no table of pings: it has the columns {', '.join(schema.names)}, but needed are src_addr, dst_addr, "
            "event_time and rtt, or start_time and pings; leave it out"
        )
    kind = schema.field(times[0]).type
    if not (pa.types.is_timestamp(kind) or pa.types.is_integer(kind)):
        raise DamagedDump(f"{name}: {times[0]} is of type {kind}; make it a timestamp, or whole seconds")
    if packets[0] == "pings" and _packet_type(schema.field("pings").type) is None:
        raise DamagedDump(f"{name}: pings is of type {schema.field('pings').type}; make it a list of structs")
    optional = [column for column in ("prb_id", "msm_id", "from") if column in schema.names]
    needed = [*optional, "src_addr", "dst_addr", times[0], packets[0]]
    for column in needed:
        if pa.types.is_float16(schema.field(column).type):
            raise DamagedDump(f"{name}: {column} is of type halffloat; make it a float or a double")
    return needed


def _query(schema: pa.Schema) -> str:
    """Rows to fields (see results)."""
    has = set(schema.names)
    packets, has_error = _listed_packets(schema) if "pings" in has else (_PACKET, "false")
    ids = {name: f"TRY_CAST({name} AS BIGINT)" if name in has else "NULL" for name in ("prb_id", "msm_id")}
    texts = {name: f'CAST("{name}" AS VARCHAR)' if name in has else "NULL::VARCHAR" for name in ("src_addr", "from")}
    return f"""
    SELECT {" AND ".join(f'"{name}" IS NULL' for name in schema.names)} AS malformed_json,
        false AS traceroute_off, false AS not_ping, false AS unsynced_clock,
        coalesce(time_s NOT BETWEEN 1 AND {MAX_TIME_S}, true) AS no_timestamp,
        coalesce({has_error}, false) AS has_error,
        greatest(coalesce({ids["prb_id"]}, -1), -1)::BIGINT AS probe_id, coalesce({ids["msm_id"]}, -1)::BIGINT AS msm_id,
        coalesce(time_s, 0) AS time_s,
        {texts["src_addr"]} AS src, {texts["from"]} AS "from", nullif(CAST(dst_addr AS VARCHAR), '') AS dst,
        coalesce({packets}, []) AS packets
    FROM rows"""


_PACKET = f"""
    CASE WHEN TRY_CAST(rtt AS DOUBLE) BETWEEN {MIN_RTT_MS} AND {MAX_RTT_MS} THEN [TRY_CAST(rtt AS DOUBLE)]
        WHEN TRY_CAST(rtt AS DOUBLE) = {FAILED_RTT_MS} THEN [{FAILED_RTT_MS}::DOUBLE] END"""


def _listed_packets(schema: pa.Schema) -> tuple[str, str]:
    """The SQL of the list of RTTs in `pings`, and of whether one of them has an error, by the rules of pings in JSON.

    Some exports wrap a list, and some each of its elements, in a struct of one field.
    """
    packet_type = _packet_type(schema.field("pings").type)
    assert packet_type, schema
    pings, element, kind = packet_type
    there = {field.name for field in kind}

    def field(name: str) -> str:
        return f'CAST({element}."{name}" AS VARCHAR)' if name in there else "NULL::VARCHAR"

    error = f"coalesce({field('error_message')}, nullif(lower({field('error')}), 'false'))"
    rtt = f"TRY_CAST({field('rtt')} AS DOUBLE)"
    replied = f"coalesce({rtt} BETWEEN {MIN_RTT_MS} AND {MAX_RTT_MS}, false)"
    lost = f"coalesce(TRY_CAST({field('timeout')} AS BOOLEAN) OR starts_with({error}, 'sendto failed'), false)"
    once = f"coalesce(lower({field('dup')}), 'false') IN ('false', '0')"
    packets = f"""list_transform(
        list_filter({pings}, lambda p: {once} AND ({replied} OR {lost})),
        lambda p: CASE WHEN {replied} THEN {rtt} ELSE {FAILED_RTT_MS}::DOUBLE END)"""
    return packets, f"len(list_filter({pings}, lambda p: {error} IS NOT NULL)) > 0"


def _packet_type(kind: pa.DataType) -> tuple[str, str, pa.StructType] | None:
    """How SQL names the list in `pings` and the packet in its element p, and the type of a packet; None if there is none."""
    pings, element = "pings", "p"
    if pa.types.is_struct(kind) and kind.num_fields == 1:
        pings, kind = f'pings."{kind.field(0).name}"', kind.field(0).type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return None
    kind = kind.value_type
    if pa.types.is_struct(kind) and kind.num_fields == 1 and pa.types.is_struct(kind.field(0).type):
        element, kind = f'p."{kind.field(0).name}"', kind.field(0).type
    return (pings, element, kind) if pa.types.is_struct(kind) else None


def _cause(error: Exception) -> str:
    return str(error).partition("\n")[0]
