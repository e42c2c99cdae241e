"""A machine that ssh reaches in; a command that runs there once, whatever becomes of the connection, and its files out.

Files lie in the folder `ping-llm` of the user there, at the same relative paths as here. Beside them, a folder of marks
keeps the command from starting twice: a lock that it holds while it runs, and its exit code once it has ended.
"""

from __future__ import annotations

import codecs
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = "ping-llm"
ANSWER_S = 120.0
LOST = 255  # exit code of ssh without a connection
_TURN = 75  # exit code of _FOLLOW while the command runs
_MISSING, _VANISHED = 23, 24  # exit codes of rsync: a file is not there; it went while others were copied
_OPTIONS = (
    "BatchMode=yes",
    "ConnectTimeout=15",
    "ServerAliveInterval=15",
    "ServerAliveCountMax=4",
    "StrictHostKeyChecking=accept-new",
    "LogLevel=ERROR",
)
_STATE = """
cd {folder} 2>/dev/null && mkdir -p {marks} || {{ echo new; exit; }}
if ! flock --nonblock --shared {marks}/lock true; then echo running
elif [ -e {marks}/code ]; then echo ended "$(cat {marks}/code)"
elif [ -e {marks}/started ]; then echo cut
else echo new; fi
"""
_START = """
mkdir -p {folder}/{marks} && cd {folder} || exit 1
setsid flock --wait 5 --close {marks}/lock sh -c '
  [ -e {marks}/started ] && exit
  : >{marks}/log && : >{marks}/started || exit
  bash -lc "$1" >>{marks}/log 2>&1 </dev/null
  echo $? >{marks}/code.part && mv {marks}/code.part {marks}/code
' sh {command} >/dev/null 2>&1 </dev/null &
for i in $(seq 100); do
  [ -e {marks}/started ] && exit
  sleep 0.1
done
echo 'the command did not start' >&2
exit 1
"""
_FOLLOW = """
cd {folder} || exit 1
n={offset} i=0
while :; do
  flock --nonblock --shared {marks}/lock true && ended=1 || ended=
  size=$(stat -c %s {marks}/log) || exit 1
  if [ "$size" -gt "$n" ]; then
    tail -c "+$((n + 1))" {marks}/log | head -c "$((size - n))" || exit 1
    n=$size
  fi
  [ "$ended" ] && exit 0
  i=$((i + 1))
  [ "$i" -gt {rounds} ] && exit 75
  sleep {pause_s}
done
"""


class Unreachable(ValueError):
    """There is no connection to the machine."""


@dataclass(frozen=True)
class Machine:
    """A user at a machine; `known_hosts` is a file of this machine alone, for addresses are given to others later."""

    host: str
    user: str
    options: tuple[str, ...]
    known_hosts: Path
    marks: str  # name of the folder that keeps the command from starting twice

    @property
    def _options(self) -> list[str]:
        # The first value of an option counts: those of the user come first.
        settings = (*self.options, *_OPTIONS, f"UserKnownHostsFile={self.known_hosts}")
        return [word for setting in settings for word in ("-o", setting)]

    @property
    def _login(self) -> list[str]:
        return ["ssh", *self._options, self._address]

    @property
    def _address(self) -> str:
        return f"{self.user}@{self.host}"

    def reach(self) -> None:
        """Unreachable, with what ssh says, if nobody can log in."""
        self._ask("true")

    def state(self) -> tuple[str, int | None]:
        """What became of the command: new, running, cut (by a restart), or ended and its exit code."""
        word, *code = self._ask(_STATE.format(folder=FOLDER, marks=self.marks)).split() or ["nothing"]
        if word not in ("new", "running", "cut", "ended") or (word == "ended") != bool(code):
            raise ValueError(f"{self.host} cannot say what became of the command: {word}")
        return word, int(code[0]) if code else None

    def start(self, command: str) -> None:
        """Starts the command, unless it was started before; it goes on without a connection."""
        self._ask(_START.format(folder=FOLDER, marks=self.marks, command=shlex.quote(command)))

    def follow(self, log: Path, seconds: float, pause_s: float = 1.0) -> bool:
        """Prints what the command prints, and adds it to `log`; gives whether it has ended within so many seconds.

        What the log already holds is not fetched again.
        """
        offset, decoder = log.stat().st_size if log.exists() else 0, codecs.getincrementaldecoder("utf-8")("replace")
        rounds = max(int(seconds / pause_s), 1)
        script = _FOLLOW.format(folder=FOLDER, marks=self.marks, offset=offset, rounds=rounds, pause_s=pause_s)
        with tempfile.TemporaryFile() as errors, log.open("ab", buffering=0) as file:
            process = subprocess.Popen(
                [*self._login, _sh(script)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
            )
            with process:
                assert process.stdout
                while block := process.stdout.read1():  # type: ignore[attr-defined]
                    file.write(block)
                    print(decoder.decode(block), end="", flush=True)
            errors.seek(0)
            if process.returncode not in (0, _TURN):
                raise self._failure(process.returncode, errors.read())
        return process.returncode == 0

    def copy(self, paths: Sequence[str]) -> None:
        """Copies relative paths of the current folder there; what links point to is copied, not the links."""
        if paths:
            self._rsync("--relative", "--no-implied-dirs", "--copy-links", "--", *paths, f"{self._address}:{FOLDER}/")

    def bring(self, paths: Sequence[str]) -> None:
        """Copies relative paths from there into the current folder; ValueError if one is not there."""
        for path in map(Path, paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            # One at a time: rsync writes through no link below the folder that it is given, and `runs` may be one.
            self._rsync("--", f"{self._address}:{FOLDER}/{path}", f"{path.parent}/")

    def _rsync(self, *words: str) -> None:
        remote_shell = shlex.join(["ssh", *self._options])
        options = ["--archive", "--no-owner", "--no-group", "--partial", "--protect-args"]
        done = subprocess.run(
            ["rsync", *options, "--timeout=120", f"--rsh={remote_shell}", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        if done.returncode == _MISSING:
            raise ValueError(f"rsync to or from {self.host} did not copy everything: {_lines(done.stderr)[0]}")
        if done.returncode not in (0, _VANISHED):
            raise Unreachable(f"rsync to or from {self.host} failed ({done.returncode}): {_lines(done.stderr)[0]}")

    def _ask(self, script: str) -> str:
        """What a script prints there."""
        command = [*self._login, _sh(script)]
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=ANSWER_S)
        except subprocess.TimeoutExpired:
            raise Unreachable(f"{self.host} did not answer within {ANSWER_S:.0f} s") from None
        if done.returncode:
            raise self._failure(done.returncode, done.stderr)
        return done.stdout.decode(errors="replace")

    def _failure(self, code: int, errors: bytes) -> ValueError:
        if code == LOST:
            return Unreachable(f"no connection to {self.host}: {_lines(errors)[-1]}")
        return ValueError(f"{self.host}: {_lines(errors)[-1]} (exit code {code})")


def _sh(script: str) -> str:
    """One word for the shell of the user there, whichever that is."""
    return f"sh -c {shlex.quote(script)}"


def _lines(errors: bytes) -> list[str]:
    """What a program said of its failure."""
    return errors.decode(errors="replace").strip().splitlines() or ["it did not say why"]
