"""Measurements in, probe rows in ArrayRecord shards out; and the other way round.

A probe row is one ArrayRecord record: up to 8 MB of one probe's measurements in time order, as one uncompressed Arrow
IPC stream (ArrayRecord's zstd compresses it). A folder of rows is

    train-00000-of-00004.arrayrecord …   one set of shards a part (train, val-s1 … val-s5, test-s1 … test-s5)
    index.parquet                        one line a row: where it lies and what it holds
    manifest.json                        inputs and their hashes, counters, parts, split rule; written last
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ping_llm.data.measurement import MEASUREMENT_SCHEMA, binary_column, byte_matrix, is_ipv4

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Version 1 had one part `val` and no `kind`: all of its measurements count as pings."""
MAX_ROW_BYTES = 8_000_000
# The rows of a small part stay in memory once read, some 60 MB at most: unpacking one takes half of the time of a window.
_KEPT_MEASUREMENTS, _MEASUREMENTS_OF_A_ROW = 1 << 21, 100  # what a row takes beside its measurements
INDEX_NAME = "index.parquet"
MANIFEST_NAME = "manifest.json"
INDEX_SCHEMA = pa.schema(
    [
        ("part", pa.string()),
        ("shard", pa.int32()),
        ("record", pa.int32()),
        ("probe_id", pa.int64()),
        ("measurements", pa.int64()),
        ("ipv6_measurements", pa.int64()),
        ("first_time_s", pa.int64()),
        ("last_time_s", pa.int64()),
    ]
)


@dataclass(frozen=True)
class ProbeRow:
    """One probe's measurements in time order, n of them, as the columns of its record.

    Measurements and addresses are looked up by index, and times count from the first: a row read for a few windows is
    not copied. `time_s` and `msm_id` are whole columns, made on first use.
    """

    probe_id: int
    first_time_s: int
    offset_s: np.ndarray  # (n,) uint32, after first_time_s
    msm: np.ndarray  # (n,) unsigned, into msm_ids
    src: np.ndarray  # (n,) unsigned, into src_addresses
    dst: np.ndarray  # (n,) unsigned, into dst_addresses
    rtt_ms: np.ndarray  # (n,) float32, −1 = failed
    kind: np.ndarray  # (n,) uint8, into KINDS
    msm_ids: np.ndarray  # (M,) int64
    src_addresses: np.ndarray  # (S, 16) uint8
    dst_addresses: np.ndarray  # (D, 16) uint8

    def __len__(self) -> int:
        return len(self.offset_s)

    def times(self, index: np.ndarray | slice) -> np.ndarray:
        """Unix seconds, int64, of the measurements at `index`."""
        return self.offset_s[index] + np.int64(self.first_time_s)

    @cached_property
    def time_s(self) -> np.ndarray:
        """(n,) int64."""
        return self.times(slice(None))

    @cached_property
    def msm_id(self) -> np.ndarray:
        """(n,) int64."""
        return self.msm_ids[self.msm]

    @cached_property
    def src_is_ipv4(self) -> np.ndarray:
        """(S,) bool."""
        return is_ipv4(self.src_addresses)

    @cached_property
    def dst_is_ipv4(self) -> np.ndarray:
        """(D,) bool."""
        return is_ipv4(self.dst_addresses)

    def to_bytes(self) -> bytes:
        """The record: schema metadata says probe, count, first and last time."""
        columns = {
            "offset_s": pa.array(self.offset_s),
            "msm_id": _dictionary(self.msm_ids, self.msm),
            "src": _dictionary(binary_column(self.src_addresses), self.src),
            "dst": _dictionary(binary_column(self.dst_addresses), self.dst),
            "rtt_ms": pa.array(self.rtt_ms.astype(np.float32)),
            "kind": pa.array(self.kind),
        }
        batch = pa.record_batch(columns).replace_schema_metadata(
            {
                "probe_id": str(self.probe_id),
                "count": str(len(self)),
                "first_time_s": str(self.first_time_s),
                "last_time_s": str(self.first_time_s + int(self.offset_s[-1])),
            }
        )
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return sink.getvalue().to_pybytes()

    @classmethod
    def from_bytes(cls, record: bytes) -> ProbeRow:
        """The inverse of `to_bytes`; the arrays are views of `record`."""
        with pa.ipc.open_stream(record) as reader:
            batch = reader.read_next_batch()
        metadata = batch.schema.metadata
        msm_id, src, dst = (batch.column(name) for name in ("msm_id", "src", "dst"))
        return cls(
            probe_id=int(metadata[b"probe_id"]),
            first_time_s=int(metadata[b"first_time_s"]),
            offset_s=batch.column("offset_s").to_numpy(),
            msm=msm_id.indices.to_numpy(),
            src=src.indices.to_numpy(),
            dst=dst.indices.to_numpy(),
            rtt_ms=batch.column("rtt_ms").to_numpy(),
            kind=batch.column("kind").to_numpy() if "kind" in batch.schema.names else np.zeros(len(batch), np.uint8),
            msm_ids=msm_id.dictionary.to_numpy(),
            src_addresses=byte_matrix(src.dictionary),
            dst_addresses=byte_matrix(dst.dictionary),
        )

    @classmethod
    def from_codes(
        cls,
        probe_id: int,
        time_s: np.ndarray,
        msm_id: np.ndarray,
        src: np.ndarray,
        dst: np.ndarray,
        rtt_ms: np.ndarray,
        kind: np.ndarray,
        src_addresses: np.ndarray,
        dst_addresses: np.ndarray,
    ) -> ProbeRow:
        """A row of (n,) columns in time order that index larger tables of addresses; it keeps the addresses it needs."""
        (msm_ids, msm), (src_used, src), (dst_used, dst) = (
            np.unique(column, return_inverse=True) for column in (msm_id, src, dst)
        )
        return cls(
            probe_id=probe_id,
            first_time_s=int(time_s[0]),
            offset_s=(time_s - time_s[0]).astype(np.uint32),
            msm=msm,
            src=src,
            dst=dst,
            rtt_ms=rtt_ms,
            kind=kind,
            msm_ids=msm_ids,
            src_addresses=src_addresses[src_used],
            dst_addresses=dst_addresses[dst_used],
        )

    @classmethod
    def from_addresses(
        cls,
        probe_id: int,
        time_s: np.ndarray,
        msm_id: np.ndarray,
        src: np.ndarray,
        dst: np.ndarray,
        rtt_ms: np.ndarray,
        kind: np.ndarray,
    ) -> ProbeRow:
        """A row of (n,) columns in time order, and of (n, 16) packed addresses."""
        (sources, src_code), (destinations, dst_code) = _distinct(src), _distinct(dst)
        return cls.from_codes(probe_id, time_s, msm_id, src_code, dst_code, rtt_ms, kind, sources, destinations)

    def halves(self) -> tuple[ProbeRow, ProbeRow]:
        """The earlier and the later half."""
        columns = (self.time_s, self.msm_id, self.src, self.dst, self.rtt_ms, self.kind)

        def part(cut: slice) -> ProbeRow:
            time_s, msm_id, src, dst, rtt_ms, kind = (column[cut] for column in columns)
            return ProbeRow.from_codes(
                self.probe_id, time_s, msm_id, src, dst, rtt_ms, kind, self.src_addresses, self.dst_addresses
            )

        return part(slice(len(self) // 2)), part(slice(len(self) // 2, None))

    def to_measurements(self) -> pa.Table:
        """The measurements as a table of MEASUREMENT_SCHEMA."""
        ip_version = np.where(self.dst_is_ipv4, 4, 6).astype(np.uint8)[self.dst]
        columns = [
            pa.array(np.full(len(self), self.probe_id, dtype=np.int64)),
            pa.array(self.msm_id),
            pa.array(self.time_s),
            binary_column(self.src_addresses[self.src]),
            binary_column(self.dst_addresses[self.dst]),
            pa.array(ip_version),
            pa.array(self.rtt_ms),
            pa.array(self.kind),
        ]
        return pa.Table.from_arrays(columns, schema=MEASUREMENT_SCHEMA)


class ShardWriter:
    """One shard being written: a context manager; `index` holds a line of INDEX_SCHEMA for each record."""

    def __init__(self, path: Path, part: str, shard: int, max_row_bytes: int = MAX_ROW_BYTES) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        self.part, self.shard, self.max_row_bytes = part, shard, max_row_bytes
        self.index: list[dict] = []
        self._writer = ArrayRecordWriter(str(path), "group_size:1")

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def write(self, row: ProbeRow) -> None:
        """Adds a row; one above `max_row_bytes` is written as halves, each again halved until it fits."""
        record = row.to_bytes()
        if len(record) > self.max_row_bytes and len(row) > 1:
            for half in row.halves():
                self.write(half)
            return
        self._writer.write(record)
        self.index.append(
            {
                "part": self.part,
                "shard": self.shard,
                "record": len(self.index),
                "probe_id": row.probe_id,
                "measurements": len(row),
                "ipv6_measurements": int((~row.dst_is_ipv4[row.dst]).sum()),
                "first_time_s": row.first_time_s,
                "last_time_s": row.first_time_s + int(row.offset_s[-1]),
            }
        )


def write_rows(folder: Path, parts: Mapping[str, Sequence[ProbeRow]], shards: int = 1, **said: Any) -> None:
    """Rows at hand as a folder that RowReader reads, dealt to the shards of each part in turn; the manifest also holds what
    is `said`."""
    index: list[dict] = []
    for part, rows in parts.items():
        for shard in range(shards):
            with ShardWriter(folder / shard_name(part, shard, shards), part, shard) as writer:
                for row in rows[shard::shards]:
                    writer.write(row)
            index += writer.index
    pq.write_table(pa.Table.from_pylist(index, schema=INDEX_SCHEMA), folder / INDEX_NAME)
    counts = {part: sum(map(len, rows)) for part, rows in parts.items()}
    manifest = {"format_version": FORMAT_VERSION, "parts": counts, **said}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=1) + "\n")


class RowReader:
    """Random access to the probe rows of one part of a folder, and what each holds without reading it.

    The part "val" of rows of version 2 is all of val-s1 … val-s5.
    `measurements` and `ipv6_measurements` are (rows,) int64. Picklable; shards are opened on first use in each process.
    """

    def __init__(self, folder: Path | str, part: str) -> None:
        self.folder, self.part = Path(folder), part
        self.manifest = read_manifest(self.folder)
        self.parts = [name for name, count in self.manifest["parts"].items() if count and is_part_of(name, part)]
        try:
            index = pq.read_table(self.folder / INDEX_NAME, filters=[("part", "in", self.parts or [part])])
        except (OSError, pa.ArrowInvalid):
            raise self._damaged(INDEX_NAME) from None
        if not index.num_rows:
            held = ", ".join(f"{name} ({count:,})" for name, count in self.manifest["parts"].items() if count)
            raise ValueError(
                f'{self.folder} holds no "{part}" rows, only {held or "none at all"}; prepare more measurements, '
                "with --split pingbench"
            )
        index = index.sort_by([("part", "ascending"), ("shard", "ascending"), ("record", "ascending")])
        self.probe_id, self.measurements, self.ipv6_measurements, self.first_time_s, self.last_time_s = (
            index.column(name).to_numpy()
            for name in ("probe_id", "measurements", "ipv6_measurements", "first_time_s", "last_time_s")
        )
        self.paths: list[Path] = []
        for name in self.parts:  # in ascending order, as in the index
            shards = shard_paths(self.folder, name)
            if not shards:
                raise self._damaged(f"every shard of {name}")
            self.paths += shards
        self._source: Any = None
        self._keeps = self.measurements.sum() + _MEASUREMENTS_OF_A_ROW * len(self) <= _KEPT_MEASUREMENTS
        self._kept: dict[int, ProbeRow] = {}

    def __len__(self) -> int:
        return len(self.measurements)

    def __getitem__(self, i: int) -> ProbeRow:
        row = self._kept.get(i) or ProbeRow.from_bytes(self.record(i))
        if self._keeps:
            self._kept[i] = row
        return row

    def __iter__(self) -> Iterator[ProbeRow]:
        return (self[i] for i in range(len(self)))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_source": None, "_kept": {}}

    def record(self, i: int) -> bytes:
        """Row i as it is stored, unpacked."""
        try:
            if self._source is None:
                import grain

                self._source = grain.sources.ArrayRecordDataSource([str(path) for path in self.paths])
            return self._source[i]
        except (RuntimeError, IndexError):  # what ArrayRecord makes of a shard that is not as it was written
            raise self._damaged(f"a shard of {self.part}") from None

    def _damaged(self, what: str) -> ValueError:
        return ValueError(
            f'{what} in {self.folder} is missing or damaged; delete the folder and run "ping-llm prepare" again'
        )


def read_manifest(folder: Path | str) -> dict:
    """manifest.json of a folder of rows; ValueError if there is none or another version of the format wrote it."""
    path = Path(folder) / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text())
        if not isinstance(manifest, dict):
            raise ValueError("it is no JSON object")
    except FileNotFoundError:
        raise ValueError(f'no rows in {folder}; run "ping-llm prepare INPUT… --out {folder}" first') from None
    except ValueError as error:
        raise ValueError(f'{path} is damaged ({error}); run "ping-llm prepare" again') from None
    if manifest.get("format_version") not in READABLE_VERSIONS:
        raise ValueError(
            f"{path} is of row format {manifest.get('format_version')}, this program reads "
            f"{' and '.join(map(str, READABLE_VERSIONS))}; "
            'run "ping-llm prepare" again'
        )
    return manifest


def manifest_sha256(folder: Path | str) -> str:
    """Identifies these rows: the manifest holds the options, and the hashes of the inputs. Empty where there is none."""
    path = Path(folder) / MANIFEST_NAME
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def is_part_of(part: str, family: str) -> bool:
    """Whether a part is the one named, or one of those of its band: "val" names all of val-s1 … val-s5."""
    return part == family or part.startswith(f"{family}-s")


def shard_name(part: str, shard: int, shards: int) -> str:
    """train-00000-of-00004.arrayrecord"""
    return f"{part}-{shard:05d}-of-{shards:05d}.arrayrecord"


def shard_paths(folder: Path, part: str) -> list[Path]:
    """The shards of a part, in order."""
    return sorted(folder.glob(f"{part}-?????-of-?????.arrayrecord"))


def _distinct(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct ones of (n, 16) addresses, (k, 16), and the place of each among them, (n,)."""
    whole = np.ascontiguousarray(packed).view("V16")[:, 0]
    _, first, code = np.unique(whole, return_index=True, return_inverse=True)
    return packed[first], code


def _dictionary(values: np.ndarray | pa.Array, indices: np.ndarray) -> pa.DictionaryArray:
    """A dictionary column whose indices take the fewest bytes; uint64 is not needed below 8 MB."""
    kind = np.min_scalar_type(max(len(values) - 1, 0))
    return pa.DictionaryArray.from_arrays(pa.array(indices.reshape(-1).astype(kind)), pa.array(values))
