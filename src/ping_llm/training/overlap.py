"""New rows and what a base has learned in, a clear line out if one holds as unseen what the other learns from.

A fine-tuned model is measured on the parts val and test of its own rows and of those of its base. Both are only worth
something if neither training has seen them: not the measurements, and of the parts s3 to s5 not the endpoints either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from ping_llm.data.measurement import format_address, is_ipv4, network_of
from ping_llm.data.mesh import destination_keys
from ping_llm.data.rows import MANIFEST_NAME, RowReader, is_part_of, read_manifest
from ping_llm.inference.familiar import Familiar
from ping_llm.training.base import ROWS_MANIFEST_NAME, Base, inputs_of, read_kept

NEW_SOURCES, NEW_DESTINATIONS = ("s3", "s5"), ("s4", "s5")  # of val and of test: parts whose endpoints are held out
_KEYS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F)  # odd: what the keys of a destination and of a time are multiplied by


def check_rows(new: Path, base: Base, base_rows: Path | None, base_run: Path) -> None:
    """ValueError if `new` rows and those of a base show each other's held-out parts in training.

    `base_rows` are those that the base learned from, None if they are not to be had: then input files are compared by their
    hashes, and endpoints by what the base's calibration knows that it has met.
    """
    if base_rows is None:
        _check_inputs(new, base, base_run)
        met = base.familiar
    else:
        if (base_rows / MANIFEST_NAME).read_bytes() == (new / MANIFEST_NAME).read_bytes():
            return  # the very same rows: what was held out still is
        _check_measurements(new, base_rows)
        met = Familiar.of_rows(_rows(base_rows, ("train",)))
        own = Familiar.of_rows(_rows(new, ("train",)))
        if shown := held_out(base_rows, own):
            raise ValueError(
                f"the part train of {new} shows {_named(shown)} that {base_rows} holds out for val and test, by which "
                "the base was judged; leave pings from and to there out"
            )
    if met is not None and (shown := held_out(new, met)):
        raise ValueError(
            f"{new} holds out {_named(shown)} for val and test that the base has learned from; leave pings from and to "
            "there out, or the table would flatter it"
        )


def _check_inputs(new: Path, base: Base, base_run: Path) -> None:
    """ValueError if the rows were made of a file that the base's were made of, but with another split."""
    theirs, ours = read_kept(base_run / ROWS_MANIFEST_NAME), read_manifest(new)
    shared = [name for sha256, name in inputs_of(ours).items() if sha256 in base.inputs]
    if shared and theirs.get("split") != ours.get("split"):
        raise ValueError(
            f"{new} and the rows that the base learned from were both made of {shared[0]}, with another split: one's val "
            "and test may be the other's train; prepare it with the base's --time-cut, or without that file"
        )


def _check_measurements(new: Path, old: Path) -> None:
    """ValueError if a measurement stands in the part train of one and in val or test of the other."""
    held = ("val", "test")
    for ours, theirs, said in (
        (("train",), held, "the part train of {new} holds {count} that {old} keeps for val and test"),
        (held, ("train",), "val and test of {new} hold {count} of the part train of {old}, which the base has learned"),
    ):
        spans = [[reader.first_time_s.min(), reader.last_time_s.max()] for reader in _readers(new, ours)]
        if not spans:
            continue
        span = min(first for first, _ in spans), max(last for _, last in spans)
        shared = np.intersect1d(_keys(_rows(new, ours)), _keys(_rows(old, theirs, span)))
        if len(shared):
            count = f"{len(shared):,} measurement{'s' * (len(shared) > 1)}"
            problem = said.format(new=new, old=old, count=count)
            raise ValueError(f"{problem}; prepare both with one --time-cut, or leave the dumps that they share out")


def held_out(folder: Path, met: Familiar) -> list[str]:
    """The endpoints that the parts s3 to s5 of rows hold out, sources as addresses and destinations as networks, of those
    that something has met as either endpoint."""
    manifest = read_manifest(folder)
    bands = [band for band in ("val", "test") if any(is_part_of(part, band) for part in manifest["parts"])]
    sources = [f"{band}-{number}" for band in bands for number in NEW_SOURCES]
    destinations = [f"{band}-{number}" for band in bands for number in NEW_DESTINATIONS]
    src = _distinct([row.src_addresses for row in _rows(folder, sources)])
    dst = _distinct([network_of(row.dst_addresses) for row in _rows(folder, destinations)])
    found = [format_address(one.tobytes()) for one in src[_met(met, src, 4, 16)]]
    networks = dst[_met(met, dst, 3, 6)]
    lengths = np.where(is_ipv4(networks), 24, 48).tolist() if len(networks) else []
    return found + [f"{format_address(one.tobytes())}/{bits}" for one, bits in zip(networks, lengths, strict=True)]


def _met(met: Familiar, addresses: np.ndarray, ipv4_bytes: int, ipv6_bytes: int) -> np.ndarray:
    """Whether so many bytes of (n, 16) addresses were met as source or as destination, (n,) bool."""
    if not len(addresses):
        return np.zeros(0, dtype=bool)
    known = np.maximum(met.known_bytes("src", addresses), met.known_bytes("dst", addresses))
    return known >= np.where(is_ipv4(addresses), ipv4_bytes, ipv6_bytes)


def _readers(folder: Path, names: Iterable[str]) -> list[RowReader]:
    """Of the parts of these names or bands that hold anything."""
    parts = [part for part, count in read_manifest(folder)["parts"].items() if count]
    return [RowReader(folder, part) for part in parts if any(is_part_of(part, name) for name in names)]


def _rows(folder: Path, names: Iterable[str], span: tuple[int, int] | None = None) -> Iterator:
    """The rows of some parts, or those of them that reach into a span of Unix seconds."""
    for reader in _readers(folder, names):
        within = np.ones(len(reader), dtype=bool)
        if span is not None:
            within = (reader.first_time_s <= span[1]) & (reader.last_time_s >= span[0])
        yield from (reader[int(number)] for number in np.flatnonzero(within))


def _keys(rows: Iterator) -> np.ndarray:
    """Of source, destination and second of each measurement of rows, (n,) uint64 that are as good as different."""
    found = [np.zeros(0, np.uint64)]
    for row in rows:
        src, dst = destination_keys(row.src_addresses)[row.src], destination_keys(row.dst_addresses)[row.dst]
        found.append(src + dst * np.uint64(_KEYS[0]) + row.time_s.astype(np.uint64) * np.uint64(_KEYS[1]))
    return np.unique(np.concatenate(found))


def _distinct(addresses: list[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate([np.zeros((0, 16), np.uint8), *addresses]), axis=0)


def _named(endpoints: list[str]) -> str:
    """The first of some endpoints, and how many more there are."""
    more = f" and {len(endpoints) - 1} more endpoints" if len(endpoints) > 1 else ""
    return f"{endpoints[0]}{more}"
