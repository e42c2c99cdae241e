"""One process at a time writes into a folder, or those that share it; a lock is of the file that is there now."""

import errno
import fcntl
import logging
import os
import subprocess
import sys

import pytest

from ping_llm.system.files import try_file, write_lock

TAKE = """
import sys
from pathlib import Path
from ping_llm.system.files import write_lock
try:
    with write_lock(Path("rows"), Path(sys.argv[1]), shared=sys.argv[2] == "shared"):
        print("taken")
except ValueError as error:
    print(error)
"""


def other_process(file, kind):
    done = subprocess.run([sys.executable, "-c", TAKE, file, kind], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


@pytest.mark.parametrize(("held", "wanted", "free"), [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 1)])
def test_a_lock_is_refused_unless_both_share_it(tmp_path, held, wanted, free):
    file = tmp_path / "partial" / "lock"
    with write_lock(tmp_path, file, shared=bool(held)):
        answer = other_process(file, ("alone", "shared")[wanted])
        assert answer == ("taken" if free else "another process writes to rows; wait for it, or choose another folder")
    assert other_process(file, "alone") == "taken"


@pytest.mark.parametrize("with_folder", [False, True])
def test_a_file_that_its_holder_deletes_while_another_opens_it_locks_nothing(tmp_path, monkeypatch, with_folder):
    file, flock = tmp_path / "partial" / "lock", fcntl.flock
    locked = []

    def holder_ends(descriptor, kind):
        """Between open and lock the holder deletes the file."""
        if not locked:
            file.unlink()
            if with_folder:
                file.parent.rmdir()
        locked.append(descriptor)
        return flock(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", holder_ends)
    with write_lock(tmp_path, file):
        assert len(locked) == 2
        assert other_process(file, "alone").startswith("another process writes to")


def test_where_files_cannot_be_locked_a_warning_says_so(tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with caplog.at_level(logging.WARNING), write_lock(tmp_path, tmp_path / "lock"):
        assert "lies where files cannot be locked" in caplog.text


def test_a_lock_that_cannot_be_made_is_one_clear_line(tmp_path):
    (tmp_path / "lock").symlink_to(tmp_path / "nowhere" / "lock")
    with pytest.raises(ValueError, match="cannot be made, or vanishes again and again"), \
            write_lock(tmp_path, tmp_path / "lock"):  # fmt: skip
        pass


def test_a_pipe_is_no_file_to_write_and_stays_one(tmp_path):
    pipe = tmp_path / "a.csv"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match=r"a\.csv is a pipe or a device, which a file would replace; name a file"):
        try_file(pipe)
    assert pipe.is_fifo()
