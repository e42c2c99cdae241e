"""Kinds and sizes of dumps in, the plan of their preparation out: its tasks, and what they will take.

Every number but the sizes of the files is an estimate. Rates are of one core at about 3 GHz, by scripts/bench_prepare.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from ping_llm.data.ingest.choices import Packets
from ping_llm.data.ingest.shuffle import MAX_BUCKETS, PORTION_MEASUREMENTS
from ping_llm.data.ingest.splits import PARTS
from ping_llm.data.ingest.tasks import CHUNK_BYTES

BUCKET_MEASUREMENTS = (
    1_000_000  # aimed at; sorting and writing takes about 300 bytes each, and groups are of uneven size
)
MIN_BUCKETS = 4
PACKETS_OF_A_RESULT = 3
# Of a kind of dump: least bytes of a result (for the number of buckets only), usual bytes, results unpacked a second.
_PLAIN = (400, 480, float("inf"))
_KINDS = {
    ".bz2": (30, 37, 95_000),
    ".gz": (40, 55, 600_000),
    ".zst": (40, 55, 2_000_000),
    ".csv": (50, 70, float("inf")),  # a packet a row
    ".log": (60, 80, float("inf")),
    ".parquet": (10, 11, 10_000_000),
}
PARSE_RESULTS_PER_S = 500_000
REDUCE_MEASUREMENTS_PER_S = 500_000
BATCH_WRITE_S, BATCH_READ_S = 0.00008, 0.0002  # of a bucket's share of a piece, by `bench_prepare.py --scale`
PORTION_MEASUREMENTS_PER_S = 2_000_000
ROW_BYTES = 7  # of a measurement in the finished rows
SHARD_BYTES = 90_000  # of a shard that holds next to nothing: ArrayRecord fills blocks of 64 kB
SCRATCH_BYTES = 25  # of a measurement in the pieces between the two rounds


@dataclass(frozen=True)
class Plan:
    """What is to be done with dumps of known (suffix of such content, bytes)."""

    dumps: tuple[tuple[str, int], ...]
    packets: Packets
    buckets: int
    workers: int
    executor: str

    @property
    def results(self) -> float:
        """Lines of all dumps."""
        return sum(size / _kind(suffix)[1] for suffix, size in self.dumps)

    @property
    def measurements(self) -> float:
        return self.results * (PACKETS_OF_A_RESULT if self.packets == "all" else 1)

    @property
    def pieces(self) -> int:
        """Files of parsed results between the two rounds of tasks, a batch of each bucket in each."""
        return sum(_pieces(*dump) for dump in self.dumps)

    @property
    def portions(self) -> int:
        """Parts of a bucket that are sorted one after another."""
        share = self.measurements / self.buckets / PORTION_MEASUREMENTS
        return 1 if share <= 1.5 else ceil(share)

    @property
    def shuffle_seconds(self) -> float:
        """Processor time of writing and reading the batches of pieces, once more where buckets are cut into portions."""
        return self.pieces * self.buckets * BATCH_WRITE_S + self._read_seconds

    @property
    def _read_seconds(self) -> float:
        reads = 1 if self.portions == 1 else 2 + 1.5 / self.portions  # to count, to cut, and what was read before that
        seconds = self.pieces * self.buckets * reads * BATCH_READ_S
        return seconds + (self.measurements / PORTION_MEASUREMENTS_PER_S if self.portions > 1 else 0)

    @property
    def row_bytes(self) -> float:
        """Bytes of the finished rows."""
        return self.measurements * ROW_BYTES + self.buckets * len(PARTS) * SHARD_BYTES

    @property
    def core_seconds(self) -> float:
        """Processor time of all tasks."""
        return sum(self._rounds[0]) + self._rounds[1]

    @property
    def seconds(self) -> float:
        """Wall-clock time of both rounds of tasks: spread evenly, but no less than their longest one takes."""
        of_dumps, of_buckets = self._rounds
        first = max([sum(of_dumps) / self.workers, *of_dumps])  # a dump is one task, however large
        return first + of_buckets / min(self.workers, self.buckets)

    @property
    def _rounds(self) -> tuple[list[float], float]:
        """Processor time of each dump, and of all buckets together."""
        of_dumps = []
        for suffix, size in self.dumps:
            _, usual, unpacked_per_s = _kind(suffix)
            results = size / usual
            writing = _pieces(suffix, size) * self.buckets * BATCH_WRITE_S
            of_dumps.append(results / unpacked_per_s + results / PARSE_RESULTS_PER_S + writing)
        return of_dumps, self._read_seconds + self.measurements / REDUCE_MEASUREMENTS_PER_S

    def describe(self) -> str:
        """The plan as a table of text."""
        size = sum(size for _, size in self.dumps)
        table = [
            ("inputs", f"{len(self.dumps):,} files, {_megabytes(size)}"),
            ("executor", f"{self.executor}, {self.workers:,} workers"),
            ("unpack, parse", f"{len(self.dumps):,} tasks, about {_rounded(self.results)} results"),
            ("group, sort, split", f"{self.buckets:,} tasks, about {_rounded(self.measurements)} measurements"),
            (
                "shuffle",
                f"{self.pieces:,} pieces × {self.buckets:,} buckets, about {_duration(self.shuffle_seconds)} of a core",
            ),
            ("shards", f"at most {self.buckets:,} of each part"),
            ("scratch", f"about {_megabytes(self.measurements * SCRATCH_BYTES)}"),
            ("rows", f"about {_megabytes(self.row_bytes)}"),
            ("time", f"about {_duration(self.seconds)}"),
        ]
        return "\n".join(f"{name:<20} {text}" for name, text in table)


def bucket_count(dumps: Sequence[tuple[str, int]], packets: Packets) -> int:
    """So many that a bucket fits well in memory, up to MAX_BUCKETS; by the inputs alone: shards are the same everywhere."""
    results = sum(size / _kind(suffix)[0] for suffix, size in dumps)
    buckets = round(results * (PACKETS_OF_A_RESULT if packets == "all" else 1) / BUCKET_MEASUREMENTS)
    return min(max(buckets, MIN_BUCKETS), MAX_BUCKETS)


def packed_share(suffix: str) -> float:
    """Bytes in a dump of one plain byte."""
    return _kind(suffix)[1] / _PLAIN[1]


def _pieces(suffix: str, size: int) -> int:
    return ceil(size / packed_share(suffix) / CHUNK_BYTES)


def _kind(suffix: str) -> tuple[int, int, float]:
    return _KINDS.get(suffix, _PLAIN)


def _rounded(count: float) -> str:
    """Two digits of a count, as an estimate deserves."""
    digits = max(len(str(round(count))) - 2, 0)
    return f"{round(count, -digits):,.0f}"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.1f} GB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
