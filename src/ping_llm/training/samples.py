"""A trained model in, probe rows of measurements that it makes up out: to remind another one of what it knows.

Where the rows that a model learned from are not at hand, a run that goes on from its weights learns from these beside its
own (pseudo-rehearsal; Robins, Catastrophic forgetting, rehearsal and pseudorehearsal, 1995).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa

from ping_llm.data.measurement import pack_addresses
from ping_llm.data.rows import ProbeRow, write_rows
from ping_llm.inference.model import PingModel

MEASUREMENTS = 8192
LONGEST = 47  # tokens of a measurement: both addresses of IPv6, a whole time, an RTT
_VAL_EVERY = 8  # sequence, of which one is kept for val


def sample_rows(model: PingModel, folder: Path, model_sha256: str, seed: int, measurements: int = 0) -> Path:
    """Writes rows of about so many measurements, by default MEASUREMENTS, with parts train and val, a row a source.

    Gives their folder. The model draws as long sequences as surely fit its window. A measurement without a time has that of
    the one before it, else of the next; sequences without any have the median of the others. ValueError: none fits.
    """
    length = max(1, model.seq_len // LONGEST)
    table = model.generate(-(-(measurements or MEASUREMENTS) // length), seed=seed, measurements=length)
    columns = (table.column(name).to_pylist() for name in ("src_addr", "dst_addr"))
    src, dst = (pack_addresses(column)[0] for column in columns)
    time_s = _times(table.column("event_time"), length)
    rtt_ms = table.column("rtt").to_numpy().astype(np.float32)
    of_val = table.column("sequence").to_numpy() % _VAL_EVERY == _VAL_EVERY - 1
    parts = {
        part: _rows(src[chosen], dst[chosen], time_s[chosen], rtt_ms[chosen])
        for part, chosen in (("train", ~of_val), ("val", of_val))
    }
    aside = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write_rows(aside, parts, samples_of={"model_sha256": model_sha256, "seed": seed})
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    return folder


def _times(column: pa.ChunkedArray, length: int) -> np.ndarray:
    """Unix seconds (n,) of sequences of `length` measurements each, where some lack."""
    known = np.array([np.nan if time is None else time.timestamp() for time in column.to_pylist()])
    known = known.reshape(-1, length)
    for turned in (known, known[:, ::-1]):  # views: each takes what is before it, then what is after
        for place in range(1, length):
            lacking = np.isnan(turned[:, place])
            turned[lacking, place] = turned[lacking, place - 1]
    some = known[~np.isnan(known)]
    return np.nan_to_num(known, nan=np.median(some) if len(some) else 0.0).astype(np.int64).reshape(-1)


def _rows(src: np.ndarray, dst: np.ndarray, time_s: np.ndarray, rtt_ms: np.ndarray) -> list[ProbeRow]:
    """Measurements (n,) as rows, one for each source; their probe is unknown."""
    order = np.lexsort((time_s, *src.T[::-1]))
    src, dst, time_s, rtt_ms = src[order], dst[order], time_s[order], rtt_ms[order]
    starts = np.flatnonzero((src[1:] != src[:-1]).any(axis=1)) + 1
    rows = []
    for own in np.split(np.arange(len(src)), starts):
        nothing = np.zeros(len(own), np.int64)
        columns = time_s[own], nothing, src[own], dst[own], rtt_ms[own], nothing.astype(np.uint8)
        rows.append(ProbeRow.from_addresses(-1, *columns))
    return rows
