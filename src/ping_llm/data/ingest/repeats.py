"""The packets of a bucket in, what makes one a repeat of another out.

Of equal second, source, destination and msm_id, by the shape of the input:

    a result         JSON, an export with `pings` or result0rtt …: the same packet of a result repeats it, whatever its
                     other fields. So a result that was fetched twice is kept once
    a ping's log     the same icmp_seq
    a row a packet   nothing in the same file: three lost packets of one ping are three equal rows. Of two files the n-th
                     of some equal rows is the same packet in both, so where files overlap, rows are kept once
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ping_llm.data.ingest.results import ROW_PACKET


def number_packets(packet: np.ndarray, rtt_ms: np.ndarray, file: np.ndarray, same: Sequence[np.ndarray]) -> np.ndarray:
    """(n,) int64, equal for measurements that repeat each other if `same`, (n,) each, are.

    `packet` is that of RESULT_SCHEMA; `file` numbers the input that a measurement is from.
    """
    number = packet.astype(np.int64)
    rows = np.flatnonzero(packet == ROW_PACKET)
    if not len(rows):
        return number
    bits = rtt_ms[rows].view(np.uint32).astype(np.int64)
    equal = (file[rows], bits, *(column[rows] for column in same))
    order = np.lexsort(equal)
    differs = np.logical_or.reduce([np.diff(column[order]) != 0 for column in equal])
    first = np.flatnonzero(np.append(True, differs))
    rank = np.arange(len(rows)) - np.repeat(first, np.diff(np.append(first, len(rows))))  # n-th of equal rows of a file
    number[rows[order]] = (1 + rank) << 32 | bits[order]
    return number
