"""Days of the Atlas archive, or measurements and a span of time, in; a folder of dumps for `prepare` out.

Every file is whole or not there. `fetch.json` says of each where it came from, its size, hash and time, ATTRIBUTION.txt
under which terms. What is under way is in the folder `.fetch`; a fetch that was killed goes on where it stopped.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlencode, urlsplit

from ping_llm.data.ingest.download import Client, Clock, Manners, Refused, download_file, download_results
from ping_llm.system.files import file_sha256, full_disk_is_one_line, move_atomically, write_atomically, write_lock
from ping_llm.system.progress import by_part, show_progress

RECORD_NAME = "fetch.json"
ATTRIBUTION_NAME = "ATTRIBUTION.txt"
SCRATCH_NAME = ".fetch"
KEY_VARIABLE = "RIPE_ATLAS_API_KEY"
ARCHIVE_DAYS = 30  # the archive keeps its hourly dumps for about so long
MAX_FILES = 100_000
ATTRIBUTION = (
    "Data: RIPE Atlas, https://atlas.ripe.net, a service of the RIPE NCC. Its terms apply, and ask that it is named as the "
    "source: https://atlas.ripe.net/legal/terms-conditions/"
)
_HOUR_S, _DAY_S = 3600, 86_400


@dataclass(frozen=True)
class Wanted:
    """One file to fetch, and the time that it covers in Unix seconds."""

    name: str
    base: str
    request: str  # path and query below the base
    format: Literal["bz2", "txt", "json"]
    start_s: int
    stop_s: int

    @property
    def url(self) -> str:
        return f"{self.base}/{self.request}"


def hourly_dumps(archive: str, kind: str, days: str, hours: Sequence[int] = ()) -> list[Wanted]:
    """The dumps of a day (2026-11-01), or of the days from a first to a last one (2026-11-01/2026-11-03).

    archive: URL of the archive. kind: ping or traceroute. hours: of each day, UTC; all if empty.
    """
    try:
        first, last = date.fromisoformat(days.partition("/")[0]), date.fromisoformat(days.rpartition("/")[2])
    except ValueError:
        raise ValueError(f"{days!r} is no day; write 2026-11-01, or 2026-11-01/2026-11-03 for several") from None
    if last < first:
        raise ValueError(f"{days!r} ends before it begins")
    if wrong := [hour for hour in hours if not 0 <= hour < 24]:
        raise ValueError(f"hours={wrong[0]} must be from 0 to 23")
    _check_count((last - first).days * 24, "fewer days")
    wanted = []
    for number in range((last - first).days + 1):
        day = first + timedelta(number)
        for hour in sorted(set(hours)) or range(24):
            name, begin = f"{kind}-{day}T{hour:02}00.bz2", datetime(day.year, day.month, day.day, hour, tzinfo=UTC)
            start_s = int(begin.timestamp())
            wanted.append(Wanted(name, _checked_base(archive), f"{day}/{name}", "bz2", start_s, start_s + _HOUR_S))
    return wanted


def results(
    api: str,
    msm: Sequence[int],
    start_s: int,
    stop_s: int,
    probes: Sequence[int] = (),
    format: Literal["txt", "json"] = "txt",
    chunk_hours: float = 1.0,
    packed: bool = True,
) -> list[Wanted]:
    """The results of measurements from `start_s` to `stop_s`, in files of `chunk_hours` each.

    api: URL of the Atlas API. msm: ids. probes: ids; all if empty. packed: as gzip.
    """
    chunk_s = int(min(chunk_hours * _HOUR_S, stop_s) if chunk_hours > 0 else 0)  # NaN is not above 0 either
    if chunk_s < 1 or min(msm, default=0) < 1 or min(probes, default=1) < 1:
        raise ValueError(f"{chunk_hours=} and the ids of measurements and probes must be above 0")
    if stop_s <= start_s:
        raise ValueError(f"stop={_iso(stop_s)} must be later than start={_iso(start_s)}")
    if stop_s > time.time():
        raise ValueError(
            f"stop={_iso(stop_s)} is in the future: its results would be missing; choose a time that is past"
        )
    _check_count(len(set(msm)) * (stop_s - start_s) // chunk_s, "--chunk-hours that are longer")
    # On a grid of the clock, so that a longer span has the same chunks and finds them here.
    edges = [start_s, *range((start_s // chunk_s + 1) * chunk_s, stop_s, chunk_s), stop_s]
    suffix = {"txt": ".ndjson", "json": ".json"}[format] + (".gz" if packed else "")
    wanted = []
    for measurement in sorted(set(msm)):
        for begin, end in pairwise(edges):
            # Both neighbours request the second at the end: `prepare` drops what comes twice.
            query = {"start": begin, "stop": end, "format": format}
            if probes:
                query["probe_ids"] = ",".join(map(str, sorted(set(probes))))
            name = f"msm-{measurement}-{_stamp(begin)}-{_stamp(end)}{suffix}"
            request = f"measurements/{measurement}/results/?{urlencode(query, safe=',')}"
            wanted.append(Wanted(name, _checked_base(api), request, format, begin, end))
    return wanted


@full_disk_is_one_line
def fetch(
    wanted: Sequence[Wanted], out: Path | str, manners: Manners | None = None, key: str = "", clock: Clock | None = None
) -> dict[str, Any]:
    """Fetches the files into `out`; gives what fetch.json then says.

    key: of the Atlas API, for measurements that are not public; no file and no message holds it.
    ValueError says what was wrong; what is whole by then stays, and is not fetched again.
    """
    client = Client(manners or Manners(), key, clock)
    out = Path(out)
    with write_lock(out, out / SCRATCH_NAME / "lock"):
        ledger = Ledger(out)
        todo = [file for file in wanted if not ledger.holds(file)]
        try:
            absent = _fetch_all(todo, ledger, client)
        finally:
            record = ledger.publish()
    if absent:
        raise ValueError(f"{absent[0]}; {len(absent)} of {len(wanted)} files are not there, the others are in {out}")
    names = {file.name for file in wanted}
    if not any(entry["bytes"] for entry in record["files"] if entry["name"] in names):
        raise ValueError("the measurements have no results in that time, or not of those probes; check ids and times")
    shutil.rmtree(out / SCRATCH_NAME)
    return record


class Ledger:
    """What is whole in a folder: by fetch.json, and by a note per file until that is written."""

    def __init__(self, out: Path) -> None:
        self.out, self.scratch = out, out / SCRATCH_NAME
        self._lock = threading.Lock()
        record = out / RECORD_NAME
        try:
            entries = json.loads(record.read_text())["files"] if record.exists() else []
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{record} is no record of a fetch; choose another --out or delete the folder") from None
        entries += [json.loads(note.read_text()) for note in sorted(self.scratch.glob("*.done"))]
        # A note without its file is of a fetch that was killed between the two.
        self._entries = {entry["name"]: entry for entry in entries if self._is_whole(entry)}

    def holds(self, file: Wanted) -> bool:
        """Whether the file is whole; ValueError if another one has its name."""
        entry = self._entries.get(file.name)
        if entry is None and (self.out / file.name).exists():
            raise ValueError(f"{self.out / file.name} is there, but not as {RECORD_NAME} knows it; move it away")
        if entry is not None and not entry["url"].endswith(f"/{file.request}"):
            raise ValueError(f"{self.out} holds {file.name} of other options ({entry['url']}); choose another --out")
        return entry is not None

    def add(self, file: Wanted, part: Path, answer: dict[str, Any]) -> None:
        """Moves a fetched file to its place and notes it; an empty one leaves the note alone, as `prepare` reads no such."""
        empty = answer.pop("empty", False)
        entry = {"name": file.name, "url": file.url, "bytes": 0 if empty else part.stat().st_size}
        entry |= {"sha256": None if empty else file_sha256(part), "fetched_at": _iso(time.time())} | answer
        with self._lock:
            if not (self.out / ATTRIBUTION_NAME).exists():
                write_atomically(self.out / ATTRIBUTION_NAME, ATTRIBUTION + "\n")
                print(ATTRIBUTION, flush=True)
            write_atomically(self.scratch / f"{file.name}.done", json.dumps(entry))
            if empty:
                part.unlink()
            else:
                move_atomically(part, self.out / file.name)
            self._entries[file.name] = entry

    def publish(self) -> dict[str, Any]:
        """Writes fetch.json."""
        record = {"source": ATTRIBUTION, "files": [self._entries[name] for name in sorted(self._entries)]}
        if self._entries:
            write_atomically(self.out / RECORD_NAME, json.dumps(record, indent=1) + "\n")
        return record

    def _is_whole(self, entry: dict[str, Any]) -> bool:
        path = self.out / entry["name"]
        return not entry["bytes"] or (path.exists() and path.stat().st_size == entry["bytes"])


def summary(record: dict[str, Any], out: Path) -> str:
    """What a folder holds, in one line."""
    files = [entry for entry in record["files"] if entry["bytes"]]
    empty = len(record["files"]) - len(files)
    text = f"{len(files):,} files, {sum(entry['bytes'] for entry in files) / 1e6:,.1f} MB, in {out}"
    return text + (f"; {empty:,} spans of time have no results" if empty else "")


def _fetch_all(todo: Sequence[Wanted], ledger: Ledger, client: Client) -> list[str]:
    """Fetches all files, several at once; gives why each that the archive does not have is not there."""
    if not todo:
        return []
    with (
        show_progress("fetch", len(todo), "files") as advance,
        ThreadPoolExecutor(client.manners.parallel) as threads,
    ):
        try:  # from the first file on: whatever ends this must wake the threads, or they wait as long as a server wishes
            reach = by_part(advance)
            futures = [threads.submit(_fetch_one, file, ledger, client, partial(reach, file.name)) for file in todo]
            return sorted(filter(None, (future.result() for future in as_completed(futures))))
        except BaseException:
            client.stop()
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def _fetch_one(file: Wanted, ledger: Ledger, client: Client, progress: Callable[[float], None]) -> str | None:
    """Brings one file to its place; gives why not if only this one is missing in the archive."""
    part = ledger.scratch / file.name
    if file.format == "bz2":
        attempt = partial(download_file, client, file.url, part, progress)
    else:
        attempt = partial(download_results, client, file.url, part, file.format, file.name.endswith(".gz"))
    try:
        answer = client.persist(file.name, attempt)
    except Refused as error:
        hint, for_all = _hint(file, error.status)
        text = f"{error}: {hint}" if hint else str(error)
        if for_all:
            raise ValueError(text) from None
        return text
    ledger.add(file, part, answer)
    part.with_name(f"{part.name}.json").unlink(missing_ok=True)
    progress(1.0)
    return None


def _hint(file: Wanted, status: int) -> tuple[str, bool]:
    """What a refusal most likely means, and whether the other files would meet it too."""
    if file.format != "bz2":
        key = (
            f"if the measurement is not public, give a key that may read it in the environment variable {KEY_VARIABLE}"
        )
        return {401: key, 403: key, 404: "there is no such measurement; check its id"}.get(status, ""), True
    if status != 404:
        return "", True
    age_s = time.time() - file.stop_s
    if age_s > ARCHIVE_DAYS * _DAY_S:
        older = "older results come by measurement: --msm ID --start … --stop …"
        return f"the archive keeps about {ARCHIVE_DAYS} days; {older}", True
    if age_s < _DAY_S:
        return "the dump of that hour is not published yet; try again later", False
    return "the archive does not have that hour", False


def _checked_base(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise ValueError(f"{url!r} is no address of a server; write it like https://atlas.ripe.net/api/v2")
    return url.rstrip("/")


def _check_count(files: int, instead: str) -> None:
    if files > MAX_FILES:
        raise ValueError(f"that would be {files:,} files, more than {MAX_FILES:,}; choose {instead}")


def _iso(time_s: float) -> str:
    return datetime.fromtimestamp(int(time_s), UTC).isoformat().replace("+00:00", "Z")


def _stamp(time_s: int) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y%m%dT%H%M%S")
