"""A path in, its hash or its whole new content out: what is written here stands complete or not at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def file_sha256(path: Path) -> str:
    """The hash of a file in hexadecimal; ValueError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); check the file and its permissions") from None


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


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
