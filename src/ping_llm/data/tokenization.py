"""Measurements in, tokens out: the vocabulary, the codecs and the grammar.

    window      = measurement+
    measurement = MEASUREMENT_START, then source, destination, result and (maybe) time, in any order
    source      = SRC_IPV4 + 0–4 bytes | SRC_IPV6 + 0–16 bytes       fewer than all = a prefix
    destination = DST_IPV4 + 1–4 bytes | DST_IPV6 + 1–16 bytes
    result      = RTT_START + 2 bytes | FAILED
    time        = TIMESTAMP_ABS + 8 bytes for the first timestamped measurement of a window (Unix seconds),
                  TIMESTAMP_DELTA1 + 1 byte or TIMESTAMP_DELTA4 + 4 bytes after the previous timestamped one (seconds)

Bytes are tokens 11–266, most significant first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from ping_llm.data.measurement import FAILED_RTT_MS, IPV4_MAPPED_PREFIX, format_address, is_ipv4

(
    MEASUREMENT_START,
    SRC_IPV4,
    SRC_IPV6,
    DST_IPV4,
    DST_IPV6,
    TIMESTAMP_ABS,
    TIMESTAMP_DELTA1,
    TIMESTAMP_DELTA4,
    RTT_START,
    THROUGHPUT_START,
    FAILED,
) = range(11)
ROLE_NAMES = (
    *("MEASUREMENT_START", "SRC_IPV4", "SRC_IPV6", "DST_IPV4", "DST_IPV6", "TIMESTAMP_ABS", "TIMESTAMP_DELTA1"),
    *("TIMESTAMP_DELTA4", "RTT_START", "THROUGHPUT_START", "FAILED"),
)
BYTE_0 = len(ROLE_NAMES)
VOCAB_SIZE = BYTE_0 + 256
PADDING = -1
MUTED = -2  # a token t that is read but no target of training stands as MUTED − t

# Which of config.FIELDS (structure, src, dst, time, rtt) a role is reported under, and the bytes after it. A role chooses
# what comes next, which is structure, but FAILED is itself a result.
FIELD_OF_ROLE = np.array([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4], dtype=np.int64)
FIELD_OF_BYTES_AFTER = np.array([0, 1, 1, 2, 2, 3, 3, 3, 4, 0, 0], dtype=np.int64)

RTT_CODES = 1 << 16
_FRACTION = 1 << 11
DELTA1_MAX_S = 0xFF
DELTA4_MAX_S = 0xFFFF_FFFF
_TIME_BYTES = {TIMESTAMP_ABS: 8, TIMESTAMP_DELTA1: 1, TIMESTAMP_DELTA4: 4}
_TIME_BYTES_OF_ROLE = np.array([_TIME_BYTES.get(role, 0) for role in range(BYTE_0)], dtype=np.int64)

# Columns of `Fields.order`.
SRC, DST, RESULT, TIME = range(4)
RESULT_LAST = np.array([0, 1, 3, 2], dtype=np.float32)  # src, dst, time, result: the order of a query
RESULT_LAST_DST_FIRST = np.array([1, 0, 3, 2], dtype=np.float32)


def encode_rtt(rtt_ms: np.ndarray) -> np.ndarray:
    """RTTs in ms to 16-bit float codes: 5-bit exponent e and 11-bit fraction f of µs = 2^e · (1 + f/2048), to nearest.

    Codes are monotone in the RTT and every code is valid; the relative error is at most 2⁻¹² from 1 µs to 71.6 min.
    RTTs outside are clamped to the first or the last code; `clamped_rtts` counts them.
    """
    mantissa, exponent = np.frexp(np.maximum(np.asarray(rtt_ms, dtype=np.float64) * 1000, 1.0))
    code = (exponent - 1) * _FRACTION + np.rint((2 * mantissa - 1) * _FRACTION)
    return np.minimum(code, RTT_CODES - 1).astype(np.int64)


def decode_rtt(code: np.ndarray) -> np.ndarray:
    """Codes 0–65,535 to ms (float64); the inverse of `encode_rtt`."""
    code = np.asarray(code)
    return np.ldexp(1.0 + (code % _FRACTION) / _FRACTION, code // _FRACTION) / 1000


def rtt_code_edges_ms() -> np.ndarray:
    """The borders of the RTT intervals that share a code: (65,537,) ms; code c holds edges[c] to edges[c + 1].

    The first and the last interval, which clamping makes unbounded, are cut half a step beyond their code.
    """
    values = decode_rtt(np.arange(RTT_CODES + 1))  # one past the end is 2^32 µs: the next step is as wide
    inner = (values[:-2] + values[1:-1]) / 2
    first = values[0] - (values[1] - values[0]) / 2
    last = (values[-2] + values[-1]) / 2
    return np.concatenate([[first], inner, [last]])


def clamped_rtts(rtt_ms: np.ndarray) -> int:
    """How many of the RTTs (ms) of pings with a reply lie outside the range of the codes."""
    rtt_ms = np.asarray(rtt_ms)
    edges = rtt_code_edges_ms()[[0, -1]]
    return int(((rtt_ms >= 0) & ((rtt_ms < edges[0]) | (rtt_ms >= edges[1]))).sum())


@dataclass(frozen=True)
class Fields:
    """What the tokens of n measurements hold, in sequence order; several windows may follow one another."""

    src: np.ndarray  # (n, 16) uint8, packed
    dst: np.ndarray  # (n, 16) uint8, packed
    src_bytes: np.ndarray  # (n,) known bytes: 0–4 or 0–16
    dst_bytes: np.ndarray  # (n,) known bytes: 1–4 or 1–16
    rtt_ms: np.ndarray  # (n,) −1 = failed
    time_s: np.ndarray  # (n,) int64; read where timed
    timed: np.ndarray  # (n,) bool: whether the time is known
    order: np.ndarray  # (n, 4) sort keys of src, dst, result, time within the measurement; ties are not allowed
    window: np.ndarray  # (n,) number of the window, ascending: the first timestamp in each is absolute
    muted: np.ndarray | None = None  # (n,) bool: the bytes of the RTT are no targets of training


def encode(fields: Fields) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of all measurements, one after the other, as (N,) int16, and the (n + 1,) offsets where each starts.

    Muted ones are below PADDING.
    """
    n = len(fields.src)
    src4, dst4 = is_ipv4(fields.src), is_ipv4(fields.dst)
    failed = fields.rtt_ms < 0
    time_value, time_role = _times(fields)

    length = np.empty((4, n), dtype=np.int64)  # tokens of src, dst, result, time
    length[SRC] = 1 + fields.src_bytes
    length[DST] = 1 + fields.dst_bytes
    length[RESULT] = np.where(failed, 1, 3)
    length[TIME] = np.where(fields.timed, 1 + _TIME_BYTES_OF_ROLE[time_role], 0)
    start = np.zeros(n + 1, dtype=np.int64)
    np.cumsum(1 + length.sum(axis=0), out=start[1:])
    at = _places(start[:-1] + 1, length, fields.order)  # (4, n) position of each field's role token

    tokens = np.empty(start[-1], dtype=np.int16)
    tokens[start[:-1]] = MEASUREMENT_START
    tokens[at[SRC]] = np.where(src4, SRC_IPV4, SRC_IPV6)
    tokens[at[DST]] = np.where(dst4, DST_IPV4, DST_IPV6)
    tokens[at[RESULT]] = np.where(failed, FAILED, RTT_START)
    tokens[at[TIME, fields.timed]] = time_role[fields.timed]

    _put_address(tokens, at[SRC], fields.src, fields.src_bytes, src4)
    _put_address(tokens, at[DST], fields.dst, fields.dst_bytes, dst4)
    replied = np.flatnonzero(~failed)
    code = encode_rtt(fields.rtt_ms[replied])
    tokens[at[RESULT, replied] + 1] = BYTE_0 + (code >> 8)
    tokens[at[RESULT, replied] + 2] = BYTE_0 + (code & 0xFF)
    if fields.muted is not None:
        muted = at[RESULT, np.flatnonzero(fields.muted & ~failed)]
        for place in (muted + 1, muted + 2):
            tokens[place] = MUTED - tokens[place]
    for role, width in _TIME_BYTES.items():
        chosen = np.flatnonzero(fields.timed & (time_role == role))
        if len(chosen):
            value = time_value[chosen].astype(">u8").view(np.uint8).reshape(-1, 8)[:, 8 - width :]
            tokens[at[TIME, chosen][:, None] + np.arange(1, width + 1)] = value.astype(np.int16) + BYTE_0
    return tokens, start


def _places(first: np.ndarray, length: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Where each field of n measurements begins: (4, n), from where the first one does (n,), lengths (4, n), keys (n, 4)."""
    keys = np.ascontiguousarray(order.T)
    at = np.tile(first, (4, 1))
    for one, other in combinations(range(4), 2):
        other_first = keys[other] < keys[one]
        at[one] += other_first * length[other]
        at[other] += ~other_first * length[one]
    return at


def _times(fields: Fields) -> tuple[np.ndarray, np.ndarray]:
    """The value of the timestamp of each measurement, (n,) s, and its role, (n,)."""
    value = np.zeros(len(fields.timed), dtype=np.int64)
    role = np.full(len(fields.timed), TIMESTAMP_ABS, dtype=np.int64)
    timed = np.flatnonzero(fields.timed)
    if not len(timed):
        return value, role
    time_s, window = fields.time_s[timed], fields.window[timed]
    value[timed[0]] = time_s[0]
    follows = np.flatnonzero(window[1:] == window[:-1]) + 1
    value[timed] = time_s
    delta = time_s[follows] - time_s[follows - 1]
    if len(delta) and (delta.min() < 0 or delta.max() > DELTA4_MAX_S):
        raise ValueError("timestamps of a window must not decrease, nor leap more than 136 years; sort by time first")
    value[timed[follows]] = delta
    role[timed[follows]] = np.where(delta <= DELTA1_MAX_S, TIMESTAMP_DELTA1, TIMESTAMP_DELTA4)
    return value, role


def _put_address(tokens: np.ndarray, at: np.ndarray, packed: np.ndarray, known: np.ndarray, ipv4: np.ndarray) -> None:
    """Writes the known bytes of packed addresses after their role tokens at positions `at`."""
    for family, first in ((ipv4, 12), (~ipv4, 0)):
        chosen = np.flatnonzero(family)
        if not len(chosen):
            continue
        address = packed[chosen, first:]
        column = np.arange(address.shape[1])
        is_known = column < known[chosen, None]
        tokens[(at[chosen, None] + 1 + column)[is_known]] = address[is_known].astype(np.int16) + BYTE_0


def token_name(token: int) -> str:
    """RTT_START, 0x1f, or what is wrong with the number."""
    if 0 <= token < BYTE_0:
        return ROLE_NAMES[token]
    return f"0x{token - BYTE_0:02x}" if BYTE_0 <= token < VOCAB_SIZE else f"{token}, which is no token"


@dataclass(frozen=True)
class Decoded:
    """One measurement. Addresses are prefixes: text with the unknown bytes 0, and the number of known bits."""

    src: str
    src_bits: int
    dst: str
    dst_bits: int
    rtt_ms: float  # −1 = failed
    time_s: int | None


def decode(tokens: Sequence[int]) -> list[Decoded]:
    """The measurements of a window that follows the grammar, which is not checked."""
    window, clock, decoded = np.asarray(tokens), 0, []
    for measurement in np.split(window, np.flatnonzero(window == MEASUREMENT_START)[1:]):
        roles = np.flatnonzero(measurement < BYTE_0)
        values = {
            int(measurement[begin]): bytes((measurement[begin + 1 : end] - BYTE_0).astype(np.uint8))
            for begin, end in pairwise([*roles.tolist(), len(measurement)])
        }
        timed = [int.from_bytes(values[role], "big") for role in _TIME_BYTES if role in values]
        clock += sum(timed)
        ends = [_prefix(role, values[role]) for role in (SRC_IPV4, SRC_IPV6, DST_IPV4, DST_IPV6) if role in values]
        code = values.get(RTT_START)
        rtt_ms = FAILED_RTT_MS if code is None else float(decode_rtt(np.array(int.from_bytes(code, "big"))))
        decoded.append(Decoded(*ends[0], *ends[1], rtt_ms, clock if timed else None))
    return decoded


def _prefix(role: int, value: bytes) -> tuple[str, int]:
    width, lead = (4, IPV4_MAPPED_PREFIX) if role in (SRC_IPV4, DST_IPV4) else (16, b"")
    return format_address(lead + value.ljust(width, b"\0")), 8 * len(value)
