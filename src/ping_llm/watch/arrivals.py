"""Lines of Atlas results in, results with an identity out."""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ping_llm.data.ingest.atlas import parse_results
from ping_llm.data.ingest.unpack import MAX_LINE_BYTES
from ping_llm.data.measurement import byte_matrix

MOST_PACKETS = 64
"""Packets of a result that are looked at, the first ones; Atlas sends up to 16."""
_UNREADABLE_LINE = b"!\n"


@dataclass(frozen=True)
class Result:
    """One ping result: of one measurement, by one probe, at one second."""

    msm_id: int  # −1 if unknown
    probe_id: int  # −1 if unknown
    time_s: int
    src: bytes  # 16, as packed by data.measurement
    dst: bytes
    rtt_ms: tuple[float, ...]  # of each packet, −1 = lost

    @property
    def id(self) -> int:
        """64 bits by which a repeat is known: of what a result is of, whatever it says."""
        key = struct.pack("<qqq16s16s", self.msm_id, self.probe_id, self.time_s, self.src, self.dst)
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little", signed=True)

    @property
    def of_context(self) -> float:
        """RTT of the packet that may become context: one, as in training, chosen by the identity and not by the RTT."""
        return self.rtt_ms[self.id % len(self.rtt_ms)]


def parse(lines: Sequence[bytes], scratch: Path) -> tuple[list[Result], Counter[str]]:
    """Results of any firmware in the order of their lines, and how many lines were dropped, by the counters of `prepare`.

    `scratch` is a file that is written over.
    """
    lines = [_one_line(line) for line in lines]
    scratch.write_bytes(b"".join(lines))
    table, dropped = parse_results(scratch, len(lines), "all")
    result = np.cumsum(table["first_of_line"].to_numpy()) - 1
    first = np.flatnonzero(np.diff(result, prepend=-1))
    rtt_ms = np.split(table["rtt_ms"].to_numpy().astype(float), first[1:]) if len(first) else []
    src, dst = (byte_matrix(table[name])[first] for name in ("src", "dst"))
    numbers = (table[name].to_numpy()[first].tolist() for name in ("msm_id", "probe_id", "time_s"))
    columns = zip(*numbers, src, dst, rtt_ms, strict=True)
    found = [
        Result(m, p, t, s.tobytes(), d.tobytes(), tuple(r[:MOST_PACKETS].tolist())) for m, p, t, s, d, r in columns
    ]
    return found, Counter({name: count for name, count in dropped.items() if count})


def _one_line(line: bytes) -> bytes:
    line = line.rstrip(b"\r\n")
    return line + b"\n" if len(line) < MAX_LINE_BYTES else _UNREADABLE_LINE
