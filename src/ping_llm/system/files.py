"""A path in, its hash or its whole new content out: what is written here stands complete or not at all."""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import inspect
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import ParamSpec, TextIO, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_TRIED_BYTES = 1 << 16
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The disk, the user's share of it, or the size that a file may have, is used up."""
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
_TRIES = 100

log = logging.getLogger(__name__)


def file_sha256(path: Path) -> str:
    """The hash of a file in hexadecimal; ValueError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); check the file and its permissions") from None


def cache_folder(name: str) -> Path:
    """Where what can be made again is kept from run to run; it may not be there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ping-llm" / name


def write_atomically(path: Path, text: str) -> None:
    """Writes aside, waits for the disk, renames."""
    aside = path.with_name(f"{path.name}.tmp")
    aside.write_text(text)
    move_atomically(aside, path)


def move_atomically(aside: Path, path: Path) -> None:
    """Renames a finished file of the same disk, once its content is on the disk."""
    sync(aside)
    aside.replace(path)
    sync(path.parent)


def try_file(path: Path | None) -> None:
    """ValueError, before any work is done, if a file could not be written at `path`, if there is one: by writing one beside
    it."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a pipe or a device, which a file would replace; name a file")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}; make it first")
    aside = path.with_name(f"{path.name}.tmp")  # as `write_atomically` names it
    try:
        aside.write_bytes(bytes(_TRIED_BYTES))
        aside.unlink()
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise ValueError(f"{path} cannot be written ({error.strerror})") from None


def try_folder(folder: Path, *names: str) -> None:
    """Makes the folder; ValueError, before any work is done, if it cannot be made, if files could not be written in it, or
    if one of those names is taken by a folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_TRIED_BYTES))
            file.flush()
    except (FileExistsError, NotADirectoryError):
        file_in_the_way = next(path for path in (folder, *folder.parents) if path.exists())
        raise ValueError(f"{file_in_the_way} is a file, no folder; move it away or name another folder") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            full = f"no space left in {folder} ({error.strerror})"
            raise ValueError(f"{full}; free some and repeat the command: it continues") from None
        raise ValueError(f"{folder} cannot be written ({error.strerror})") from None
    if taken := [folder / name for name in names if (folder / name).is_dir()]:
        raise ValueError(f"{taken[0]} is a folder, where a file is to be written; move it away")


def try_new_folder(folder: Path, option: str) -> None:
    """ValueError, before any work is done, unless a folder can be made at `folder`, or an empty one is there; `option` is
    what names it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and not empty; name a new folder with {option}")
    try_folder(folder.absolute().parent)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write into, which becomes `folder` once all of it is on the disk; gone if that fails."""
    folder = folder.absolute()
    aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    try:
        aside.chmod(0o755)  # as others that are made here; the library makes it for one user
        yield aside
        for path in aside.rglob("*"):
            sync(path)
        sync(aside)
        if folder.exists():
            folder.rmdir()
        aside.rename(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


@contextmanager
def write_lock(folder: Path, file: Path, shared: bool = False) -> Iterator[None]:
    """Keeps other processes from writing into a folder, by a lock on a file; ValueError if one does.

    Processes that share it may write together. It ends with the process, however that ends. Its holder may delete the file.
    """
    with _locked_file(folder, file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
        yield


def _locked_file(folder: Path, file: Path, kind: int) -> TextIO:
    """The open file, locked; a file that its last holder deleted meanwhile locks nothing, so another is made."""
    for _ in range(_TRIES):
        file.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                lock = stack.enter_context(file.open("a+"))  # over NFS a shared lock reads, and the other one writes
                fcntl.flock(lock, kind | fcntl.LOCK_NB)
                if not os.path.samestat(os.fstat(lock.fileno()), file.stat()):
                    continue
            except FileNotFoundError:
                continue
            except BlockingIOError:
                raise ValueError(f"another process writes to {folder}; wait for it, or choose another folder") from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                log.warning("%s lies where files cannot be locked: see that no other process writes to it", folder)
            stack.pop_all()
            return lock
    raise ValueError(f"{file} cannot be made, or vanishes again and again; check the folder")


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def full_disk_is_one_line(function: Callable[P, T]) -> Callable[P, T]:
    """Makes a function that writes into the folder `out`, one of its parameters, raise ValueError where that is full."""

    @functools.wraps(function)
    def explained(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except (OSError, RuntimeError) as error:  # RuntimeError: what ArrayRecord makes of it
            for code in _FULL:
                if getattr(error, "errno", None) == code or os.strerror(code) in str(error):
                    out = inspect.signature(function).bind(*args, **kwargs).arguments["out"]
                    raise ValueError(
                        f"no space left in {out} ({os.strerror(code)}); free some and repeat the command: it continues"
                    ) from None
            raise

    return explained
