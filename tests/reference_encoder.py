"""The token grammar, one measurement at a time and slowly: what the vectorised encoder must agree with."""

from __future__ import annotations

import math

from ping_llm.data.measurement import IPV4_MAPPED_PREFIX

ROLES = {"src4": 1, "src6": 2, "dst4": 3, "dst6": 4, "abs": 5, "delta1": 6, "delta4": 7, "rtt": 8, "failed": 10}


def rtt_code(rtt_ms: float) -> int:
    """The nearest of all 65,536 values 2^e · (1 + f/2048) µs; of two that are equally near, the even one."""
    us = rtt_ms * 1000
    if us <= 1:
        return 0
    exponent = min(math.floor(math.log2(us)), 31)
    candidates = [(e, f) for e in (exponent - 1, exponent, exponent + 1) for f in range(2048) if 0 <= e <= 31]
    e, f = min(candidates, key=lambda ef: (abs(2.0 ** ef[0] * (1 + ef[1] / 2048) - us), ef[1] % 2))
    return e * 2048 + f


def _bytes(value: bytes) -> list[int]:
    return [11 + b for b in value]


def _address(kind: str, packed: bytes, known: int) -> list[int]:
    if packed.startswith(IPV4_MAPPED_PREFIX):
        return [ROLES[kind + "4"], *_bytes(packed[12:][:known])]
    return [ROLES[kind + "6"], *_bytes(packed[:known])]


def encode(measurements: list[dict]) -> list[int]:
    """Tokens of one window. Each measurement: src, dst (packed bytes), src_bytes, dst_bytes, rtt_ms, time_s or None,
    order (names of its fields)."""
    tokens: list[int] = []
    clock = None
    for m in measurements:
        tokens.append(0)
        for field in m["order"]:
            if field == "src":
                tokens += _address("src", m["src"], m["src_bytes"])
            elif field == "dst":
                tokens += _address("dst", m["dst"], m["dst_bytes"])
            elif field == "result" and m["rtt_ms"] < 0:
                tokens.append(ROLES["failed"])
            elif field == "result":
                tokens += [ROLES["rtt"], *_bytes(rtt_code(m["rtt_ms"]).to_bytes(2, "big"))]
            elif m["time_s"] is not None and clock is None:
                tokens += [ROLES["abs"], *_bytes(m["time_s"].to_bytes(8, "big"))]
                clock = m["time_s"]
            elif m["time_s"] is not None:
                delta = m["time_s"] - clock
                kind, width = ("delta1", 1) if delta < 256 else ("delta4", 4)
                tokens += [ROLES[kind], *_bytes(delta.to_bytes(width, "big"))]
                clock = m["time_s"]
    return tokens
