"""Hand-written ping results in the shape of Atlas firmware 5080, and dumps of them, for the tests of preparing data."""

import bz2
import gzip
import json
from pathlib import Path

import zstandard

from ping_llm.data.ingest import unpack


def ping(**changes) -> dict:
    """One result; a change to None leaves the field out. `from_` is `from`."""
    result = {
        "fw": 5080,
        "mver": "2.6.2",
        "lts": 41,
        "dst_name": "198.51.100.7",
        "af": 4,
        "dst_addr": "198.51.100.7",
        "src_addr": "192.0.2.1",
        "proto": "ICMP",
        "ttl": 59,
        "size": 48,
        "dup": 0,
        "rcvd": 3,
        "sent": 3,
        "result": [{"rtt": 19.5}, {"rtt": 20.25}, {"x": "*"}],
        "min": 19.5,
        "max": 20.25,
        "avg": 19.875,
        "msm_id": 1001,
        "prb_id": 7,
        "timestamp": 1_700_000_000,
        "msm_name": "Ping",
        "from_": "203.0.113.9",
        "type": "ping",
        "step": 240,
    } | changes
    result["from"] = result.pop("from_")
    return {name: value for name, value in result.items() if value is not None}


def ndjson(*results) -> bytes:
    """Results, or lines given as bytes, one a line."""
    return b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in results)


def write(path: Path, plain: bytes) -> Path:
    """Compresses as the suffix of the path says."""
    pack = {".bz2": bz2.compress, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
    path.write_bytes(pack.get(path.suffix, bytes)(plain))
    return path


def read_lines(path):
    """Blocks of whole lines of a dump; DamagedDump at the end of what is readable."""
    damage = []
    yield from unpack.read_lines(path, damage)
    if damage:
        raise unpack.DamagedDump(damage[0])
