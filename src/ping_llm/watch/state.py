"""What a watch knows in, the same on the disk out: results seen, contexts, pairs, marks, and the file of anomalies.

One transaction of SQLite holds all that a batch of results changes, and the text that it adds to the file of anomalies with
the place where that belongs. The text is written to the file only then. Whenever the process is killed, the next one writes
the text of the last transaction once more, at its place: file and state agree, and what was not committed never happened.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from ping_llm.system.files import sync
from ping_llm.watch.history import ROW
from ping_llm.watch.hysteresis import Pair
from ping_llm.watch.reading import Habit, Reading

_T = TypeVar("_T")
FORMAT = 2
_PAIRS_A_SOURCE = 50  # are kept on average
_VARIABLES = 500  # of one statement
_TABLES = """
    CREATE TABLE seen (id INTEGER PRIMARY KEY, time_s INTEGER NOT NULL);
    CREATE INDEX seen_time ON seen (time_s);
    CREATE TABLE source (src BLOB PRIMARY KEY, used INTEGER NOT NULL, rows BLOB NOT NULL) WITHOUT ROWID;
    CREATE INDEX source_used ON source (used);
    CREATE TABLE pair (ends BLOB PRIMARY KEY, used INTEGER NOT NULL, rows BLOB NOT NULL, judged TEXT NOT NULL,
        open INTEGER NOT NULL) WITHOUT ROWID;
    CREATE INDEX pair_used ON pair (used);
    CREATE TABLE number (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
    CREATE TABLE reading (one INTEGER PRIMARY KEY CHECK (one = 1), text TEXT NOT NULL);
    CREATE TABLE outbox (one INTEGER PRIMARY KEY CHECK (one = 1), place INTEGER NOT NULL, text BLOB NOT NULL);
"""


@dataclass
class Known:
    """A pair with its context: the last measurements of it that are no anomaly, in time order."""

    pair: Pair
    rows: np.ndarray  # (p,) ROW
    habit: Habit = field(default_factory=Habit)


@dataclass(frozen=True)
class Bounds:
    """How much is kept."""

    sources: int = 20_000
    """Sources whose pings are kept as context, at most; those that were silent for longest are forgotten first."""
    rows: int = 24
    """Pings of a source that are kept, and of each pair."""
    late_hours: float = 24.0
    """Results that are older than the newest by more than this are counted and left out, for it is no longer known whether
    they were scored before."""

    def __post_init__(self) -> None:
        if self.sources < 1 or not 1 <= self.rows <= 1000 or not 0 < self.late_hours < 1e5:
            raise ValueError(
                f"sources={self.sources} must be at least 1, rows={self.rows} from 1 to 1000, "
                f"late_hours={self.late_hours} above 0"
            )


@dataclass
class Changes:
    """What one batch of results changes."""

    seen: dict[int, int] = field(default_factory=dict)  # time of each result by its id
    sources: dict[bytes, np.ndarray] = field(default_factory=dict)
    pairs: dict[bytes, Known] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)  # that are added
    marks: dict[str, int] = field(default_factory=dict)  # that are set
    events: list[dict[str, Any]] = field(default_factory=list)  # lines for the file
    reading: Reading | None = None
    forget_sources: Sequence[bytes] = ()
    forget_pairs: Sequence[bytes] = ()


class State:
    """The state of one watch, and its file of anomalies; a context manager. ValueError says what is wrong with them."""

    def __init__(self, path: Path, out: Path, bounds: Bounds) -> None:
        self.path, self.out, self.bounds = path, out, bounds
        if out.exists() and not out.is_file():
            raise ValueError(
                f"--out {out} is no regular file, so nothing could be taken up again there; name another one"
            )
        is_new = not path.exists() or not path.stat().st_size
        if is_new and out.exists() and out.stat().st_size:
            raise ValueError(
                f"{out} is there, but not the state that it belongs to, {path}: name another --out, or move it away"
            )
        self._db = sqlite3.connect(path, isolation_level=None, timeout=1)
        try:
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            if not self._db.execute("PRAGMA user_version").fetchone()[0]:
                self._db.executescript(
                    f"BEGIN; {_TABLES} INSERT INTO outbox VALUES (1, 0, x''); PRAGMA user_version = {FORMAT}; COMMIT"
                )
            if self._db.execute("PRAGMA user_version").fetchone()[0] != FORMAT:
                raise ValueError(f"{path} is of another version of ping-llm; name another --out to begin anew")
            with self._transaction():  # a reader alone takes no lock
                self._db.execute("UPDATE outbox SET one = 1")
            self._deliver()
        except sqlite3.Error as error:
            self._db.close()
            raise ValueError(_explained(path, error)) from None
        except BaseException:
            self._db.close()
            raise

    def __enter__(self) -> State:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._db.close()

    def unseen(self, ids: Iterable[int]) -> set[int]:
        """Those that were not scored."""
        ids = set(ids)
        return ids - {found for (found,) in self._select("SELECT id FROM seen WHERE id IN", list(ids))}

    def sources(self, of: Iterable[bytes]) -> dict[bytes, np.ndarray]:
        """Rows (s,) of ROW of each of the sources; none of one that is new."""
        found = dict.fromkeys(of, np.empty(0, ROW))
        for src, rows in self._select("SELECT src, rows FROM source WHERE src IN", list(found)):
            found[src] = self._parsed(np.frombuffer, rows, ROW)
        return found

    def pairs(self, of: Iterable[bytes]) -> dict[bytes, Known]:
        """What is known of each of the pairs, whose keys are source and destination, 32 bytes."""
        found = {ends: Known(Pair(), np.empty(0, ROW)) for ends in of}
        for ends, rows, judged in self._select("SELECT ends, rows, judged FROM pair WHERE ends IN", list(found)):
            found[ends] = self._parsed(_known, rows, judged)
        return found

    def number(self, name: str) -> int:
        """A mark or a count; 0 if there is none."""
        found = self._read("SELECT value FROM number WHERE name = ?", [name])
        return found[0][0] if found else 0

    def reading(self) -> Reading:
        """What the results so far were."""
        found = self._read("SELECT text FROM reading")
        return self._parsed(Reading.of_json, found[0][0]) if found else Reading()

    def size(self) -> dict[str, int]:
        """Sources, pairs, and open anomalies that are kept."""
        queries = {"sources": "source", "pairs": "pair", "open": "pair WHERE open"}
        return {name: self._read(f"SELECT count(*) FROM {what}")[0][0] for name, what in queries.items()}

    def excess(self) -> tuple[list[bytes], dict[bytes, Known]]:
        """Sources, and pairs, that are more than are kept: those that were silent for longest."""
        size, most = self.size(), self.bounds.sources
        sources = self._read("SELECT src FROM source ORDER BY used LIMIT ?", [max(size["sources"] - most, 0)])
        pairs = self._read(
            "SELECT ends, rows, judged FROM pair ORDER BY used LIMIT ?",
            [max(size["pairs"] - most * _PAIRS_A_SOURCE, 0)],
        )
        return [src for (src,) in sources], {ends: self._parsed(_known, rows, judged) for ends, rows, judged in pairs}

    def commit(self, changes: Changes) -> None:
        """Makes all of it so, or nothing; then the file of anomalies has the text too."""
        text = "".join(json.dumps(event) + "\n" for event in changes.events).encode()
        try:
            with self._transaction():
                self._write(changes)
                if text:
                    self._db.execute("UPDATE outbox SET place = place + length(text), text = ?", (text,))
        except sqlite3.Error as error:
            raise ValueError(_explained(self.path, error)) from None
        if text:
            self._deliver()

    def _write(self, changes: Changes) -> None:
        run, many = self._db.execute, self._db.executemany
        used = self.number("batches") + 1
        many("INSERT INTO seen VALUES (?, ?)", changes.seen.items())
        many(
            "INSERT OR REPLACE INTO source VALUES (?, ?, ?)",
            ((src, used, rows[-self.bounds.rows :].tobytes()) for src, rows in changes.sources.items()),
        )
        many(
            "INSERT OR REPLACE INTO pair VALUES (?, ?, ?, ?, ?)",
            (
                (ends, used, known.rows[-self.bounds.rows :].tobytes(), *_text_of(known))
                for ends, known in changes.pairs.items()
            ),
        )
        if changes.reading is not None:
            run("INSERT OR REPLACE INTO reading VALUES (1, ?)", (changes.reading.to_json(),))
        many("DELETE FROM source WHERE src = ?", ((src,) for src in changes.forget_sources))
        many("DELETE FROM pair WHERE ends = ?", ((ends,) for ends in changes.forget_pairs))
        numbers = {name: self.number(name) + count for name, count in changes.counts.items()}
        numbers |= {"batches": used, **changes.marks}
        many("INSERT OR REPLACE INTO number VALUES (?, ?)", numbers.items())
        if "newest_s" in changes.marks:
            run("DELETE FROM seen WHERE time_s < ?", (self.oldest_s(changes.marks["newest_s"]),))

    def oldest_s(self, newest_s: int) -> int:
        """The time before which results are left out, for it is no longer known which were scored."""
        return newest_s - int(self.bounds.late_hours * 3600)

    def _deliver(self) -> None:
        """Writes the text of the last transaction to its place, where a process that was killed may not have come to."""
        place, text = self._db.execute("SELECT place, text FROM outbox").fetchone()
        with self.out.open("ab") as file:
            there = file.tell()
            if not place <= there <= place + len(text):
                raise ValueError(
                    f"{self.out} has {there:,} bytes, and {place:,} to {place + len(text):,} by {self.path}: another "
                    "program changed it; give both back, or name another --out"
                )
            if there == place + len(text):
                return
            file.truncate(place)
            file.write(text)
        sync(self.out)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self._db.in_transaction:  # where the disk is full, SQLite itself may have rolled back
                self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _select(self, query: str, keys: list[Any]) -> Iterator[tuple[Any, ...]]:
        for first in range(0, len(keys), _VARIABLES):
            some = keys[first : first + _VARIABLES]
            yield from self._read(f"{query} ({', '.join('?' * len(some))})", some)

    def _read(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise ValueError(_explained(self.path, error)) from None

    def _parsed(self, parse: Callable[..., _T], *stored: Any) -> _T:
        """What is stored in a row; ValueError if it is damaged."""
        try:
            return parse(*stored)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(_explained(self.path, error)) from None


def _known(rows: bytes, text: str) -> Known:
    fields, habit = json.loads(text)
    pair = Pair(**fields | {name: tuple(map(tuple, fields[name])) for name in ("recent", "held")})
    return Known(pair, np.frombuffer(rows, ROW), Habit.of_json(habit))


def _text_of(known: Known) -> tuple[str, bool]:
    return json.dumps([asdict(known.pair), asdict(known.habit)]), known.pair.since_s is not None


def _explained(path: Path, error: Exception) -> str:
    if "locked" in str(error):
        return f"another watch uses {path}; wait for it, or name another --out"
    if isinstance(error, sqlite3.OperationalError):
        return f"{path}, the state of the watch, cannot be used ({error}); free some space, or name another --out"
    return f"{path}, the state of the watch, is damaged ({error}); name another --out to begin anew"
