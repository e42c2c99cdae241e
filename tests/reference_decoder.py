"""Tokens in, measurements out: a parser of the grammar that says which token breaks it, to check the encoder by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ping_llm.data import tokenization
from ping_llm.data.measurement import FAILED_RTT_MS, IPV4_MAPPED_PREFIX, format_address
from ping_llm.data.tokenization import (
    BYTE_0,
    DST_IPV4,
    DST_IPV6,
    FAILED,
    MEASUREMENT_START,
    ROLE_NAMES,
    RTT_START,
    SRC_IPV4,
    SRC_IPV6,
    TIMESTAMP_ABS,
    TIMESTAMP_DELTA1,
    TIMESTAMP_DELTA4,
    VOCAB_SIZE,
    decode_rtt,
    token_name,
)

TIME_BYTES = {TIMESTAMP_ABS: 8, TIMESTAMP_DELTA1: 1, TIMESTAMP_DELTA4: 4}
ADDRESS_BYTES = {SRC_IPV4: (0, 4), SRC_IPV6: (0, 16), DST_IPV4: (1, 4), DST_IPV6: (1, 16)}


@dataclass(frozen=True)
class Decoded(tokenization.Decoded):
    """One measurement, and where it stands."""

    start: int  # position of its MEASUREMENT_START


def decode(tokens: Sequence[int]) -> list[Decoded]:
    """Parses a window, one measurement or more; ValueError says which token breaks the grammar."""
    tokens = [int(token) for token in tokens]
    measurement, clock, at = _decode_one(tokens, 0, None)
    decoded = [measurement]
    while at < len(tokens):
        measurement, clock, at = _decode_one(tokens, at, clock)
        decoded.append(measurement)
    return decoded


def _decode_one(tokens: list[int], start: int, clock: int | None) -> tuple[Decoded, int | None, int]:
    if start == len(tokens) or tokens[start] != MEASUREMENT_START:
        raise _broken(tokens, start, "MEASUREMENT_START")
    found: dict[str, object] = {}
    at = start + 1
    while at < len(tokens) and tokens[at] != MEASUREMENT_START:
        role, field = tokens[at], _FIELD_NAMES.get(tokens[at])
        if field is None or field in found:
            missing = [name for name in ("source", "destination", "result", "time") if name not in found]
            complete = ["MEASUREMENT_START"] if set(missing) <= {"time"} else []
            raise _broken(tokens, at, " or ".join([*(f"a {name}" for name in missing), *complete]))
        end = at + 1
        while end < len(tokens) and tokens[end] >= BYTE_0:
            end += 1
        wrong = next((i for i in range(at + 1, end) if tokens[i] >= VOCAB_SIZE), None)
        if wrong is not None:
            raise _broken(tokens, wrong, f"a token below {VOCAB_SIZE}")
        value = bytes(token - BYTE_0 for token in tokens[at + 1 : end])
        least, most = ADDRESS_BYTES.get(role) or (TIME_BYTES.get(role, 2 if role == RTT_START else 0),) * 2
        if not least <= len(value) <= most:
            position = min(end, at + 1 + most)
            raise _broken(
                tokens, position, f"{least if least == most else f'{least}–{most}'} bytes after {ROLE_NAMES[role]}"
            )
        if field == "time":
            if (clock is None) != (role == TIMESTAMP_ABS):
                raise _broken(tokens, at, "TIMESTAMP_ABS" if clock is None else "TIMESTAMP_DELTA1 or TIMESTAMP_DELTA4")
            clock = int.from_bytes(value, "big") + (clock or 0)
        found[field] = clock if field == "time" else (role, value)
        at = end
    for name in ("source", "destination", "result"):
        if name not in found:
            raise _broken(tokens, at, f"the {name} of the measurement at token {start}")
    src, src_bits = _prefix(*found["source"])
    dst, dst_bits = _prefix(*found["destination"])
    role, value = found["result"]
    rtt_ms = FAILED_RTT_MS if role == FAILED else float(decode_rtt(int.from_bytes(value, "big")))
    return Decoded(src, src_bits, dst, dst_bits, rtt_ms, found.get("time"), start), clock, at


_FIELD_NAMES = {
    **dict.fromkeys((SRC_IPV4, SRC_IPV6), "source"),
    **dict.fromkeys((DST_IPV4, DST_IPV6), "destination"),
    **dict.fromkeys((RTT_START, FAILED), "result"),
    **dict.fromkeys(TIME_BYTES, "time"),
}


def _prefix(role: int, value: bytes) -> tuple[str, int]:
    width, lead = (4, IPV4_MAPPED_PREFIX) if role in (SRC_IPV4, DST_IPV4) else (16, b"")
    return format_address(lead + value.ljust(width, b"\0")), 8 * len(value)


def _broken(tokens: list[int], at: int, expected: str) -> ValueError:
    found = token_name(tokens[at]) if at < len(tokens) else "the end"
    return ValueError(f"token {at}: expected {expected}, found {found}")
