"""What a user names in, dumps out: files, folders, patterns; standard input and pipes, which are read once, into files."""

from __future__ import annotations

import glob
import os
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ping_llm.data.ingest.decompress import codec_of
from ping_llm.data.ingest.tables import is_parquet
from ping_llm.system.files import file_sha256
from ping_llm.system.progress import cores

DUMP_SUFFIXES = (".bz2", ".gz", ".zst", ".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".tsv", ".log")
STDIN = Path("-")
SPOOL_NAME = "spool"
_STDIN_NAMES = ("/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
_NO_NAMES = ("/dev/fd/", "/proc/")  # a pipe there has a number that it does not have in the next run
_NO_DUMPS = ("truth.json", "fetch.json")  # the truth of a synthetic dump, the record of a fetch
_MAGIC_BYTES = 16


@dataclass(frozen=True)
class Dump:
    """One input, as the manifest names it: equal dumps give equal rows."""

    path: Path
    name: str
    bytes: int
    sha256: str

    def identity(self) -> dict[str, Any]:
        """Equal for equal dumps."""
        return {name: value for name, value in vars(self).items() if name != "path"}


def find_inputs(inputs: Sequence[str | Path]) -> dict[Path, str]:
    """The path of every input, and its name; ValueError if there is none of that name."""
    if not inputs:
        raise ValueError("no input; name the dumps, for example dump/ping-*.bz2, or their folder")
    paths: dict[Path, str] = {}
    for path in map(Path, inputs):
        if path == STDIN or (str(path) in _STDIN_NAMES and path.exists() and not path.is_file()):
            paths[STDIN] = "stdin"
        elif path.is_dir():
            dumps = [one for one in path.iterdir() if one.suffix in DUMP_SUFFIXES and one.name not in _NO_DUMPS]
            if not dumps:
                raise ValueError(f"{path} holds no dumps, that is, no files ending in {', '.join(DUMP_SUFFIXES)}")
            paths |= dict(map(_located, dumps))
        elif not path.exists():
            matches = [match for match in map(Path, glob.glob(str(path), recursive=True)) if match.is_file()]
            if not matches:
                raise ValueError(f"no file {path}; check the name")
            paths |= dict(map(_located, matches))
        else:
            paths |= dict([_located(path)])
    return paths


def streams(paths: dict[Path, str]) -> list[str]:
    """The names of those inputs that can be read only once, and have no size."""
    return [name for path, name in paths.items() if path == STDIN or _is_stream(path)]


@contextmanager
def spooled(paths: dict[Path, str], folder: Path) -> Iterator[dict[Path, str]]:
    """The same inputs, those that can be read only once as files in `folder`, which are gone at the end."""
    with ExitStack() as stack:
        for left in folder.glob(f"{SPOOL_NAME}-*"):  # of a process that was killed
            shutil.rmtree(left)
        files: dict[Path, str] = {}
        for number, (path, name) in enumerate(paths.items()):
            if streams({path: name}):
                spool = folder / f"{SPOOL_NAME}-{number:05d}" / name  # a message about it names it
                stack.callback(shutil.rmtree, spool.parent, ignore_errors=True)
                _copy(path, spool)
                path = spool
            files[path] = name
        yield files


def read_inputs(paths: dict[Path, str]) -> list[Dump]:
    """Every input with its hash, in an order that depends on names and contents alone."""
    with ThreadPoolExecutor(cores()) as threads:
        hashes = list(threads.map(file_sha256, paths))
    dumps = [Dump(path, name, path.stat().st_size, h) for (path, name), h in zip(paths.items(), hashes, strict=True)]
    return sorted(dumps, key=lambda dump: (dump.name, dump.sha256))


def packed_suffix(path: Path) -> str:
    """The suffix that a file of such content has; empty if it is plain or cannot be read."""
    try:
        with path.open("rb") as file:
            codec = codec_of(file.read(_MAGIC_BYTES))
    except OSError:
        return ""
    return codec.suffix if codec else ".parquet" if is_parquet(path) else ""


def _located(path: Path) -> tuple[Path, str]:
    """Where an input lies, one path for one file, and its name."""
    if not path.exists():
        raise ValueError(f"{path} is a link to a file that is not there; delete it or bring the file")
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise ValueError(f"{path} is a folder, though its name is that of a dump; name the files in it")
    if stat.S_ISBLK(mode) or (stat.S_ISCHR(mode) and path.resolve() != Path(os.devnull)):
        raise ValueError(f"{path} is a device; name files, pipes, or - for standard input")
    if stat.S_ISREG(mode) and not _is_stream(path):
        return path.resolve(), path.name
    return path.absolute(), "pipe" if str(path.absolute()).startswith(_NO_NAMES) else path.name


def _is_stream(path: Path) -> bool:
    """Whether what lies there can be read only once: a pipe, or a file that is open but was deleted."""
    return path.exists() and not (path.is_file() and path.resolve().exists())


def _copy(path: Path, spool: Path) -> None:
    """Reads a stream to its end; a pipe without a writer waits for one."""
    spool.parent.mkdir(parents=True, exist_ok=True)
    with spool.open("wb") as file:
        if path != STDIN:
            with path.open("rb") as stream:
                return shutil.copyfileobj(stream, file, 1 << 20)
        if sys.stdin is None:
            raise ValueError("standard input is closed; name files")
        return shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
