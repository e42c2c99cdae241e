"""A folder of probe rows in, what it holds out: counters, spans, families, endpoints, RTTs, gaps, tokens.

Rows are read in batches and leave counts behind, so memory grows with the distinct addresses and networks alone. RTTs are
counted by their 16-bit code: percentiles are exact to half a code, 0.024 %.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ping_llm.data.measurement import ADDRESS_BYTES, as_text, format_address
from ping_llm.data.rows import MANIFEST_NAME, ProbeRow, RowReader, read_manifest
from ping_llm.data.tokenization import DELTA1_MAX_S, RTT_CODES, decode_rtt, encode_rtt
from ping_llm.system.progress import show_progress

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.9, 0.99)
TIME_STEPS_S = tuple(60 * minutes for minutes in (4, 20, 60, 240, 1440, 7 * 1440, 28 * 1440, 364 * 1440))
"""Whole numbers of the 240 s after which built-in measurements repeat: other steps would show beats."""
MAX_TIME_STEPS = 240
MAX_GAP_S = 86_400  # longer gaps between measurements are counted as this one
BATCH_MEASUREMENTS = 1 << 18
_MEDIAN_BITS = 11  # of an RTT code: 64 bins an octave, 1.1 % wide, for the medians of networks
_COMPACT_AT = 1 << 20


class Summary:
    """What a folder of rows holds. Families are [IPv4, IPv6], those of the destinations.

    row_measurements     (rows,)
    failed               (2,) measurements of each family without a reply
    rtt_codes            (2, RTT_CODES) replies with each RTT code
    gaps_s               (MAX_GAP_S + 1,) pairs of successive measurements of a row so far apart
    over_time            (2, steps) measurements in each step of `over_time_step_s` seconds, one of TIME_STEPS_S
    """

    def __init__(self, folder: Path, name: str) -> None:
        """Reads every row of every part once."""
        self.name, self.manifest = name, read_manifest(folder)
        readers = [RowReader(folder, part) for part, count in self.manifest["parts"].items() if count]
        self.row_measurements = np.concatenate([reader.measurements for reader in readers])
        self.probes = len(np.unique(np.concatenate([reader.probe_id for reader in readers])))
        self.first_time_s = min(int(reader.first_time_s.min()) for reader in readers)
        self.last_time_s = max(int(reader.last_time_s.max()) for reader in readers)
        span_s = self.last_time_s - self.first_time_s
        self.over_time_step_s = next((s for s in TIME_STEPS_S if span_s < s * (MAX_TIME_STEPS - 1)), TIME_STEPS_S[-1])
        self.over_time_start_s = self.first_time_s // self.over_time_step_s * self.over_time_step_s
        steps = (self.last_time_s - self.over_time_start_s) // self.over_time_step_s + 1
        self.failed, self.over_time = np.zeros(2, dtype=np.int64), np.zeros((2, steps), dtype=np.int64)
        self.rtt_codes, self.gaps_s = np.zeros((2, RTT_CODES), dtype=np.int64), np.zeros(MAX_GAP_S + 1, dtype=np.int64)
        self._sources, self._destinations, self._networks = Tally(), Tally(), Tally()
        with show_progress("read rows", int(self.row_measurements.sum()), "measurements") as advance:
            for batch in (batch for reader in readers for batch in _batches(reader)):
                self._add(batch)
                advance(sum(map(len, batch)))

    @property
    def problems(self) -> list[str]:
        """Why not all of a dump was read, or most of it is none, of each for which that holds."""
        return [entry["problem"] for entry in self.manifest.get("inputs", ()) if "problem" in entry]

    @property
    def measurements(self) -> np.ndarray:
        """(2,) of each family."""
        return self.over_time.sum(axis=1)

    @cached_property
    def sources(self) -> tuple[np.ndarray, np.ndarray]:
        """(S, 16) uint8, and (S,) measurements, most first."""
        return _ranked(*self._sources.totals())

    @cached_property
    def destinations(self) -> tuple[np.ndarray, np.ndarray]:
        """Likewise."""
        return _ranked(*self._destinations.totals())

    def rtt_quantiles_ms(self, family: int) -> list[float] | None:
        """At QUANTILES; None without replies."""
        counts = self.rtt_codes[family]
        return [float(decode_rtt(code)) for code in count_quantiles(counts, QUANTILES)] if counts.any() else None

    def network_medians(self, bits: int) -> tuple[np.ndarray, np.ndarray]:
        """IPv4 networks of 8 or 16 bits with replies, as (N,) numbers, and their median RTTs in ms, (N,)."""
        key, count = self._networks.totals()  # destination /16 and RTT bin
        network, rtt_bin = key >> _MEDIAN_BITS, key & ((1 << _MEDIAN_BITS) - 1)
        network, order = network >> (16 - bits), np.lexsort((rtt_bin, network >> (16 - bits)))
        network, rtt_bin, count = network[order], rtt_bin[order], count[order]
        networks, first = np.unique(network, return_index=True)
        below = np.concatenate([[0], np.cumsum(count)])
        total = np.diff(np.append(below[first], below[-1]))
        middle = np.searchsorted(below[1:], below[first] + total / 2)
        half_bin = 1 << (15 - _MEDIAN_BITS)
        return networks, decode_rtt((rtt_bin[middle] << (16 - _MEDIAN_BITS)) + half_bin)

    def tokens_per_measurement(self) -> dict[str, float]:
        """With both addresses in full, and the time as a delta to the measurement before, or not at all."""
        total, failed = self.measurements.sum(), self.failed.sum()
        address = (self.measurements * (8, 32)).sum() / total  # both, in bytes
        untimed = 3 + address + (3 * (total - failed) + failed) / total
        gaps = max(self.gaps_s.sum(), 1)
        short = self.gaps_s[: DELTA1_MAX_S + 1].sum() / gaps
        return {"untimed": float(untimed), "timed": float(untimed + 2 * short + 5 * (1 - short))}

    def to_json(self, top: int) -> dict[str, Any]:
        """Plain JSON types, with the `top` busiest sources and destinations."""
        families = {}
        for family, name in enumerate(("ipv4", "ipv6")):
            quantiles = self.rtt_quantiles_ms(family)
            families[name] = {
                "measurements": int(self.measurements[family]),
                "failed_share": float(self.failed[family] / max(self.measurements[family], 1)),
                "rtt_ms": quantiles and _named(QUANTILES, quantiles),
            }
        gaps = self.gaps_s.sum()
        return {
            "name": self.name,
            "lines": self.manifest.get("lines"),
            "problems": self.problems,
            "parts": self.manifest["parts"],
            "measurements": int(self.measurements.sum()),
            "rows": len(self.row_measurements),
            "probes": self.probes,
            "first_time_s": self.first_time_s,
            "last_time_s": self.last_time_s,
            "families": families,
            "measurements_per_row": _named(QUANTILES, np.quantile(self.row_measurements, QUANTILES).tolist()),
            "gaps_s": _named(QUANTILES, count_quantiles(self.gaps_s, QUANTILES).tolist()) if gaps else None,
            "tokens_per_measurement": self.tokens_per_measurement(),
            "sources": {"distinct": len(self.sources[1]), "top": _texts(self.sources, top)},
            "destinations": {"distinct": len(self.destinations[1]), "top": _texts(self.destinations, top)},
        }

    def _add(self, rows: Sequence[ProbeRow]) -> None:
        """Counts rows: few large ones or many small ones, for each call has a fixed cost."""
        time_s, rtt_ms = (np.concatenate([getattr(row, name) for row in rows]) for name in ("time_s", "rtt_ms"))
        src, src_addresses = _joined(rows, "src")
        dst, dst_addresses = _joined(rows, "dst")
        ipv6 = np.concatenate([~row.dst_is_ipv4 for row in rows])
        family = ipv6.astype(np.int64)[dst]
        replied = rtt_ms >= 0
        code = encode_rtt(rtt_ms[replied])

        self.failed += np.bincount(family[~replied], minlength=2)
        np.add.at(self.rtt_codes, (family[replied], code), 1)
        np.add.at(self.over_time, (family, (time_s - self.over_time_start_s) // self.over_time_step_s), 1)
        same_row = np.ones(len(time_s), dtype=bool)
        same_row[np.cumsum([0, *map(len, rows[:-1])])] = False
        np.add.at(self.gaps_s, np.minimum(np.diff(time_s, prepend=0)[same_row], MAX_GAP_S), 1)

        self._sources.add(as_text(src_addresses), np.bincount(src, minlength=len(src_addresses)))
        self._destinations.add(as_text(dst_addresses), np.bincount(dst, minlength=len(dst_addresses)))
        network = dst_addresses[:, 12].astype(np.int64) << 8 | dst_addresses[:, 13]
        ipv4 = family[replied] == 0
        keys = network[dst[replied][ipv4]] << _MEDIAN_BITS | code[ipv4] >> (16 - _MEDIAN_BITS)
        self._networks.add(*np.unique(keys, return_counts=True))


def summarize(path: Path | str) -> Summary:
    """Reads a folder of rows; or a dump, or a folder of dumps, by way of rows in a scratch folder."""
    path = Path(path)
    if (path / MANIFEST_NAME).is_file():
        return Summary(path, str(path))
    if path.suffix == ".arrayrecord":
        raise ValueError(f"{path} is one shard of a folder of rows; inspect the folder, {path.parent}")
    from ping_llm.data.ingest.prepare import prepare

    with tempfile.TemporaryDirectory(prefix="ping-llm-") as scratch:
        prepare([str(path)], Path(scratch) / "rows", split="none", keep_going=True)
        return Summary(Path(scratch) / "rows", str(path))


def count_quantiles(counts: np.ndarray, quantiles: Sequence[float]) -> np.ndarray:
    """Where in a histogram (n,) of whole numbers from 0 each quantile lies: the least value that reaches it."""
    return np.searchsorted(np.cumsum(counts), np.asarray(quantiles) * counts.sum())


class Tally:
    """Counts of keys that come in portions: memory grows with the distinct ones alone."""

    def __init__(self) -> None:
        self._portions: list[tuple[np.ndarray, np.ndarray]] = []
        self._pending, self._compact_at = 0, _COMPACT_AT

    def add(self, keys: np.ndarray, counts: np.ndarray) -> None:
        """Adds (n,) counts to (n,) keys."""
        self._portions.append((keys, counts))
        self._pending += len(keys)
        if self._pending > self._compact_at:
            self._compact_at = max(_COMPACT_AT, 2 * len(self.totals()[0]))

    def totals(self) -> tuple[np.ndarray, np.ndarray]:
        """The distinct keys, ascending, and the sum of the counts of each."""
        keys, counts = (np.concatenate(columns) for columns in zip(*self._portions, strict=True))
        keys, inverse = np.unique(keys, return_inverse=True)
        counts = np.bincount(inverse, weights=counts, minlength=len(keys)).astype(np.int64)  # exact below 2⁵³
        self._portions, self._pending = [(keys, counts)], len(keys)
        return keys, counts


def _batches(reader: RowReader) -> Iterator[list[ProbeRow]]:
    """The rows of a part, in order, by about BATCH_MEASUREMENTS at once."""
    batch = (np.cumsum(reader.measurements) - reader.measurements) // BATCH_MEASUREMENTS
    for begin, end in pairwise(np.flatnonzero(np.diff(batch, prepend=-1, append=-1)).tolist()):
        yield [reader[i] for i in range(begin, end)]


def _joined(rows: Sequence[ProbeRow], side: str) -> tuple[np.ndarray, np.ndarray]:
    """One table of addresses (A, 16) of all rows, and (n,) indices into it, for `src` or `dst`."""
    tables = [getattr(row, f"{side}_addresses") for row in rows]
    before = np.cumsum([0, *map(len, tables[:-1])])
    codes = [getattr(row, side).astype(np.int64) + first for row, first in zip(rows, before, strict=True)]
    return np.concatenate(codes), np.concatenate(tables)


def _ranked(keys: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Addresses and their counts, most first, equals in the order of the addresses."""
    order = np.argsort(-counts, kind="stable")
    return keys[order].view(np.uint8).reshape(-1, ADDRESS_BYTES), counts[order]


def _texts(ranked: tuple[np.ndarray, np.ndarray], top: int) -> dict[str, int]:
    addresses, counts = ranked
    return {format_address(a.tobytes()): int(n) for a, n in zip(addresses[:top], counts[:top], strict=True)}


def _named(quantiles: Sequence[float], values: Sequence[float]) -> dict[str, float]:
    return {f"{quantile:g}": value for quantile, value in zip(quantiles, values, strict=True)}
