"""Addresses, times and earlier measurements as a user gives them in, the prompt of a query out."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from ping_llm.data.measurement import ADDRESS_BYTES, is_ipv4, pack_address, pack_addresses
from ping_llm.data.tokenization import (
    BYTE_0,
    RESULT_LAST,
    RESULT_LAST_DST_FIRST,
    TIMESTAMP_ABS,
    VOCAB_SIZE,
    Fields,
    encode,
)


@dataclass(frozen=True)
class Endpoint:
    """An address, or a prefix of it: what is told of one end of a ping."""

    packed: bytes
    told_bytes: int

    @property
    def is_prefix(self) -> bool:
        """Whether not all bytes are told."""
        return self.told_bytes < (4 if is_ipv4(np.frombuffer(self.packed, np.uint8)) else 16)

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Reads `192.0.2.1`, `192.0.2.0/24`, `2001:db8::/32`; prefixes must end on a byte."""
        address, slash, length = text.partition("/")
        packed = pack_address(address)
        width = 32 if is_ipv4(np.frombuffer(packed, np.uint8)) else 128
        if not slash:
            return cls(packed, width // 8)
        if not length.isdigit() or int(length) > width:
            raise ValueError(f"{text!r}: the prefix length must be a number from 0 to {width}")
        if int(length) % 8:
            near = int(length) // 8 * 8
            raise ValueError(f"{text!r}: the model reads whole bytes; use a prefix length like /{near} or /{near + 8}")
        return cls(packed, int(length) // 8)


@dataclass(frozen=True)
class Context:
    """Earlier measurements of one source, in time order where times are known."""

    src: np.ndarray  # (n, 16) uint8
    dst: np.ndarray  # (n, 16) uint8
    rtt_ms: np.ndarray  # (n,) float64
    time_s: np.ndarray | None  # (n,) int64

    def __len__(self) -> int:
        return len(self.rtt_ms)

    @classmethod
    def parse(cls, measurements: pa.Table | Sequence[dict] | None) -> Context:
        """Takes a table, or records, with src_addr, dst_addr, rtt (ms, −1 = failed) and, optionally, event_time."""
        if measurements is None or len(measurements) == 0:
            nothing = np.zeros((0, ADDRESS_BYTES), dtype=np.uint8)
            return cls(nothing, nothing, np.zeros(0), None)
        table = measurements if isinstance(measurements, pa.Table) else pa.Table.from_pylist(list(measurements))
        for column in ("src_addr", "dst_addr", "rtt"):
            if column not in table.column_names:
                raise ValueError(f"the context has no column {column}; it has {', '.join(table.column_names)}")
        src, dst = (_addresses(table.column(name).to_pylist()) for name in ("src_addr", "dst_addr"))
        rtt_ms = np.array([_number(value) for value in table.column("rtt").to_pylist()])
        wrong = ~np.isfinite(rtt_ms) | ((rtt_ms < 0) & (rtt_ms != -1))
        if wrong.any():
            raise ValueError(f"context row {wrong.argmax() + 1}: rtt must be ms, or −1 for a failed ping")
        if "event_time" not in table.column_names:
            return cls(src, dst, rtt_ms, None)
        time_s = np.array([parse_time(value) for value in table.column("event_time").to_pylist()], dtype=np.int64)
        order = np.argsort(time_s, kind="stable")
        return cls(src[order], dst[order], rtt_ms[order], time_s[order])

    @classmethod
    def of_measurements(cls, table: pa.Table | None) -> Context:
        """Takes a table of MEASUREMENT_SCHEMA, in time order."""
        if table is None:
            return cls.parse(None)
        src, dst = (
            np.frombuffer(b"".join(table.column(name).to_pylist()), dtype=np.uint8).reshape(-1, ADDRESS_BYTES)
            for name in ("src", "dst")
        )
        return cls(src, dst, table.column("rtt_ms").to_numpy().astype(np.float64), table.column("time_s").to_numpy())

    def last(self, count: int) -> Context:
        """The last `count` measurements."""
        keep = slice(max(len(self) - count, 0), None)
        time_s = None if self.time_s is None else self.time_s[keep]
        return Context(self.src[keep], self.dst[keep], self.rtt_ms[keep], time_s)


@dataclass(frozen=True)
class Query:
    """One question: the law of the result of a ping from src to dst, at a time or at any, after a context."""

    src: Endpoint
    dst: Endpoint
    time_s: int | None
    context: Context

    @classmethod
    def parse(cls, src: str, dst: str, at: dt.datetime | str | float | None, context: Context) -> Query:
        """Checks what belongs together; ValueError says what does not."""
        query = cls(Endpoint.parse(src), Endpoint.parse(dst), None if at is None else parse_time(at), context)
        if query.dst.told_bytes < 1:
            raise ValueError(f"{dst!r}: at least 8 bits of the destination must be told")
        if query.time_s is not None and context.time_s is not None and (context.time_s > query.time_s).any():
            raise ValueError("the context holds measurements later than the time asked for; leave those out")
        return query


@dataclass(frozen=True)
class Prompt:
    """Tokens up to where the result of the query comes next.

    `also_legal` are the tokens other than a result that the grammar allows there: a query does not ask for them.
    """

    tokens: np.ndarray  # (T,) int64
    also_legal: np.ndarray  # (n,) int64
    context_measurements: int


def build_prompt(query: Query, seq_len: int) -> Prompt:
    """Context and query as tokens; of a context that does not fit in seq_len tokens, the most recent part."""
    context = query.context
    while True:
        tokens, starts = encode(_fields(query, context))
        surplus = len(tokens) + 1 - seq_len  # the query's 1 FAILED token gives way to RTT_START and byte 1
        if surplus <= 0 or not len(context):
            break
        fits = len(context) - int(np.searchsorted(starts, surplus))
        context = context.last(min(fits, len(context) - 1))
    return Prompt(tokens[:-1].astype(np.int64), _also_legal(query), len(context))


def parse_time(value: dt.datetime | dt.date | str | float) -> int:
    """Unix seconds of a datetime, a date (its first second), ISO 8601 text or a number; without a zone it is UTC."""
    if isinstance(value, str):
        try:
            value = dt.datetime.fromisoformat(value)
        except ValueError:
            raise ValueError(f"{value!r} is not a time; write it like 2026-01-31T12:00:00Z") from None
    if isinstance(value, dt.date) and not isinstance(value, dt.datetime):
        value = dt.datetime.combine(value, dt.time())
    if isinstance(value, dt.datetime):
        value = (value if value.tzinfo else value.replace(tzinfo=dt.UTC)).timestamp()
    if not isinstance(value, int | float) or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is not a time between 1970 and the end of the calendar")
    return int(value)


def read_table(path: Path | str) -> pa.Table:
    """A table of measurements or queries from .parquet, .csv, .json or .jsonl."""
    import duckdb

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file {path}")
    readers = {".parquet": "read_parquet", ".csv": "read_csv", ".json": "read_json", ".jsonl": "read_json"}
    reader = readers.get(path.suffix)
    if reader is None:
        raise ValueError(f"{path}: a table must be .parquet, .csv, .json or .jsonl")
    try:
        return duckdb.connect().sql(f"SELECT * FROM {reader}($path)", params={"path": str(path)}).to_arrow_table()
    except duckdb.Error as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def _also_legal(query: Query) -> np.ndarray:
    """A timestamp, if none is told; and more bytes of the address told last, if it is a prefix."""
    if query.time_s is not None:
        return np.zeros(0, dtype=np.int64)
    more_bytes = np.arange(BYTE_0, VOCAB_SIZE) if query.src.is_prefix and query.dst.is_prefix else []
    return np.array([TIMESTAMP_ABS, *more_bytes])


def _fields(query: Query, context: Context) -> Fields:
    """The context, then the query as a failed ping: its FAILED token stands where the result comes."""
    count = len(context) + 1
    src = np.concatenate([context.src, np.frombuffer(query.src.packed, np.uint8)[None]])
    dst = np.concatenate([context.dst, np.frombuffer(query.dst.packed, np.uint8)[None]])
    src_bytes, dst_bytes = (np.where(is_ipv4(packed), 4, 16) for packed in (src, dst))
    share = query.src.told_bytes / src_bytes[-1]
    src_bytes = (share * src_bytes).astype(np.int64)  # a window cuts all its sources alike
    dst_bytes[-1] = query.dst.told_bytes
    timed, time_s = np.zeros(count, dtype=bool), np.zeros(count, dtype=np.int64)
    if query.time_s is not None:
        timed[-1], time_s[-1] = True, query.time_s
        if context.time_s is not None:
            timed[:-1], time_s[:-1] = True, context.time_s
    return Fields(
        src=src,
        dst=dst,
        src_bytes=src_bytes,
        dst_bytes=dst_bytes,
        rtt_ms=np.append(context.rtt_ms, -1.0),
        time_s=time_s,
        timed=timed,
        order=np.concatenate([np.tile(RESULT_LAST, (len(context), 1)), [_order(query)]]),
        window=np.zeros(count, dtype=np.int64),
    )


def _order(query: Query) -> np.ndarray:
    """Of the query's fields. A prefix goes first: after a whole address it is plain that no more of it comes."""
    return RESULT_LAST_DST_FIRST if query.dst.is_prefix and not query.src.is_prefix else RESULT_LAST


def _number(value: object) -> float:
    """NaN for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def _addresses(texts: list[str]) -> np.ndarray:
    packed, valid = pack_addresses(texts)
    if not valid.all():
        row = int((~valid).argmax())
        raise ValueError(f"context row {row + 1}: {texts[row]!r} is not an IPv4 or IPv6 address")
    return packed
