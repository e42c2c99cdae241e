"""A folder of rows in; what it holds, stretches of it with how surprising each measurement is, and an example out."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ping_llm.data.measurement import format_address
from ping_llm.data.rows import ProbeRow, RowReader, read_manifest
from ping_llm.inference.context import Context
from ping_llm.inference.files import records
from ping_llm.inference.score import HISTORY
from ping_llm.serve.tables import as_rows, iso

if TYPE_CHECKING:
    from ping_llm.inference.model import PingModel

MOST_LISTED = 64  # rows of a part
MOST_TOLD = 10  # anomalies of a stretch
BEFORE = 3 * HISTORY  # measurements read before a stretch: a row may be of several sources
EXAMPLE_CONTEXT, EXAMPLE_DESTINATIONS = 6, 3
_LATEST = 5_000  # measurements of the source that are looked at: a row may hold some hundred thousand
_BETWEEN = 0.3, 0.7  # of the destinations by RTT: an axis that has room for the nearest shows little of the others
# Without rows: root servers, which most pings of RIPE Atlas go to, from a network in Amsterdam. The RTTs are made up.
NO_ROWS_EXAMPLE: dict[str, Any] = {
    "src": "193.0.6.139",
    "dst": ["193.0.14.129", "198.41.0.4", "202.12.27.33"],
    "at": None,
    "context": [
        {"src_addr": "193.0.6.139", "dst_addr": "192.5.5.241", "rtt": 1.4},
        {"src_addr": "193.0.6.139", "dst_addr": "199.7.83.42", "rtt": 2.1},
    ],
    "made_up": True,
}


class RowsFolder:
    """Rows that the service shows; may be read by several threads."""

    def __init__(self, folder: Path) -> None:
        self.parts = {part: count for part, count in read_manifest(folder)["parts"].items() if count}
        if not self.parts:
            raise ValueError(f"{folder} holds no measurements; prepare some, or leave out --rows")
        self._folder = folder
        self._readers: dict[str, RowReader] = {}
        self._reading = threading.Lock()

    def listed(self, part: str) -> dict[str, Any]:
        """The busiest rows of a part, the busiest first: place, probe, measurements, first and last time."""
        with self._reading:
            reader = self._reader(part)
        busiest = np.argsort(-reader.measurements, kind="stable")[:MOST_LISTED]
        columns = {"row": busiest, "probe_id": reader.probe_id[busiest], "measurements": reader.measurements[busiest]}
        columns |= {"first_time_s": reader.first_time_s[busiest], "last_time_s": reader.last_time_s[busiest]}
        values = zip(*(column.tolist() for column in columns.values()), strict=True)
        rows = [dict(zip(columns, one, strict=True)) for one in values]
        return {"part": part, "rows_of_part": len(reader), "rows": rows}

    def measurements(self, part: str, row: int) -> int:
        """How many a row has; ValueError if there is no such row."""
        with self._reading:
            reader = self._reader(part)
        if row >= len(reader):
            raise ValueError(f"{part} has {len(reader):,} rows; row={row} must be less")
        return int(reader.measurements[row])

    def row(self, part: str, row: int) -> ProbeRow:
        with self._reading:
            return self._reader(part)[row]

    def example(self) -> dict[str, Any]:
        """A query: an unfamiliar source of val, if there is one, and some of its pings as context of others."""
        part = min(self.parts, key=_as_example)
        busiest = self.listed(part)["rows"][0]["row"]
        return example_of(self.row(part, busiest))

    def _reader(self, part: str) -> RowReader:
        if part not in self.parts:
            raise ValueError(f"part={part!r} is none of {', '.join(self.parts)}")
        if part not in self._readers:
            self._readers[part] = RowReader(self._folder, part)
        return self._readers[part]


def _as_example(part: str) -> int:
    """Which parts are looked into first: sources of val that train does not have."""
    return 0 if part == "val-s3" else 1 if part.startswith("val") else 2


def anomalies(model: PingModel, row: ProbeRow, first: int, count: int, at: float) -> dict[str, Any]:
    """Times, RTTs, p-values and PITs of `count` measurements of a row from `first` on, and which of them are anomalies.

    They are scored as by `PingModel.score` of them and of the BEFORE measurements before them. Told are the most
    surprising anomalies, at most MOST_TOLD, with what was expected.
    """
    begin = max(first - BEFORE, 0)
    table = pa.Table.from_pylist(as_rows(context_of(row, slice(begin, first + count))))
    scored = model.score(table, anomaly_at=at, quiet=True)
    p_value = scored.column("p_value").to_numpy()
    found = np.flatnonzero((p_value <= at) & (np.arange(len(p_value)) >= first - begin))
    told = model.expected(scored, found[np.argsort(p_value[found], kind="stable")][:MOST_TOLD])
    return {
        "measurements": len(row),
        "first": first,
        "time_s": row.times(slice(first, first + count)).tolist(),
        "rtt": table.column("rtt").to_pylist()[first - begin :],
        "p_value": p_value[first - begin :].tolist(),
        "pit": scored.column("pit").to_pylist()[first - begin :],
        "anomalies": records(told),
    }


def context_of(row: ProbeRow, places: slice | np.ndarray) -> Context:
    """Measurements of a row."""
    addresses = row.src_addresses[row.src[places]], row.dst_addresses[row.dst[places]]
    return Context(*addresses, row.rtt_ms[places].astype(np.float64), row.times(places))


def example_of(row: ProbeRow) -> dict[str, Any]:
    """A query of the busiest source of a row, after its last ping: some destinations, and as context the last
    pings to others."""
    source = np.bincount(row.src).argmax()
    own = np.flatnonzero(row.src == source)[-_LATEST:]
    answered = own[row.rtt_ms[own] >= 0] if (row.rtt_ms[own] >= 0).any() else own
    rtt_ms = {
        int(dst): np.median(row.rtt_ms[answered][row.dst[answered] == dst]) for dst in np.unique(row.dst[answered])
    }
    by_rtt = sorted(rtt_ms, key=lambda dst: rtt_ms[dst])
    places = np.linspace(*_BETWEEN, EXAMPLE_DESTINATIONS) * (len(by_rtt) - 1)
    chosen = sorted({by_rtt[int(place)] for place in places})
    others = own[~np.isin(row.dst[own], chosen)]
    latest = others[len(others) - 1 - np.unique(row.dst[others][::-1], return_index=True)[1]]  # one a destination
    context = as_rows(context_of(row, np.sort(latest)[-EXAMPLE_CONTEXT:]))
    return {
        "src": format_address(row.src_addresses[source].tobytes()),
        "dst": [format_address(row.dst_addresses[dst].tobytes()) for dst in sorted(chosen, key=by_rtt.index)],
        "at": iso(int(row.time_s[-1]) + 1),
        "context": context,
        "made_up": False,
    }
