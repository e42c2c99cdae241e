"""Preparing data by real processes that are killed, run out of disk, or are given damaged dumps."""

import json
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zstandard
from pings import ndjson, ping, write
from traceroutes import reply, trace
from waiting import HANG_S

OPTIONS = ("--traceroute", "hops", "--packets", "all", "--shards", "3")


def command(*argv) -> list[str]:
    return [sys.executable, "-m", "ping_llm", "prepare", *map(str, argv)]


def run(*argv, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command(*argv), capture_output=True, text=True, timeout=HANG_S, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def results(hour: int, count: int = 8000):
    """Pings, and a traceroute after each fourth of them; their RTTs do not compress."""
    rng = np.random.default_rng(hour)
    for i, rtts in enumerate(rng.gamma(2, 20, (count, 3)).tolist()):
        shape = {"prb_id": i % 50, "timestamp": 1_700_000_000 + 3600 * hour + i // 3, "src_addr": f"192.0.2.{i % 50}"}
        if i % 4:
            yield ping(**shape, dst_addr=f"198.51.100.{i % 7}", result=[{"rtt": rtt} for rtt in rtts])
        else:
            yield trace([reply(f"203.0.113.{i % 9}", rtt) for rtt in rtts], **shape)


@pytest.fixture(scope="module")
def dumps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dumps")
    return [
        write(folder / f"hour-{hour}.{kind}", ndjson(*results(hour))) for hour, kind in enumerate(("bz2", "gz", "zst"))
    ]


@pytest.fixture(scope="module")
def whole(dumps, tmp_path_factory):
    """The files of a run that nothing happened to, and the seconds it took."""
    out, begin = tmp_path_factory.mktemp("rows"), time.monotonic()
    done = run(*dumps, "--out", out, "--workers", 1, *OPTIONS)
    assert done.returncode == 0, done.stderr
    return files(out), time.monotonic() - begin


def processes_of_session(session: int) -> list[int]:
    """Living processes, read from /proc: the sixth field of stat is the session, the third the state."""
    living = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            living.append(int(stat.parent.name))
    return living


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds orphaned workers by /proc")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_killed_at_random_moments_ends_with_the_same_bytes_and_leaves_no_process(dumps, whole, tmp_path, workers):
    want, seconds = whole
    rng, sessions, killed = random.Random(workers), [], 0
    for _ in range(20):
        if killed == 4:
            break
        process = subprocess.Popen(
            command(*dumps, "--out", tmp_path / "rows", "--workers", workers, *OPTIONS),
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        sessions.append(process.pid)
        try:
            process.wait(rng.uniform(0.4, 1.0) * seconds)
            assert files(tmp_path / "rows") == want
            shutil.rmtree(tmp_path / "rows")
            seconds *= 0.8  # the machine is calmer than when the whole run was timed
        except subprocess.TimeoutExpired:
            process.kill()  # the parent alone: its workers must find out by themselves
            process.wait()
            killed += 1
    assert killed == 4
    done = run(*dumps, "--out", tmp_path / "rows", "--workers", workers, *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "rows") == want
    deadline = time.monotonic() + HANG_S
    while any(map(processes_of_session, sessions)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(processes_of_session, sessions))


@pytest.fixture
def small_disk(tmp_path):
    """Makes a file system of some kB in memory; it needs the right to mount."""
    folder, mounted = tmp_path / "disk", []

    def mount(kilobytes: int) -> Path:
        folder.mkdir(exist_ok=True)
        how = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        if mounted:
            how[4] = f"remount,{how[4]}"
        if not shutil.which("mount") or subprocess.run(how, capture_output=True).returncode:
            pytest.skip("may not mount a small file system")
        mounted.append(folder)
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def assert_full(done: subprocess.CompletedProcess, out: Path) -> None:
    message = [line for line in done.stderr.splitlines() if " MB/s" not in line and " buckets/s" not in line]
    assert done.returncode == 1 and len(message) == 1, done.stderr
    assert message[0].startswith(f"error: no space left in {out} ("), message
    assert message[0].endswith("free some and repeat the command: it continues")
    assert not (out / "manifest.json").exists()


@pytest.mark.parametrize("kilobytes", [40, 300, 3000])
def test_a_full_disk_is_one_clear_line_and_with_space_the_run_goes_on(dumps, whole, small_disk, kilobytes):
    out = small_disk(kilobytes) / "rows"
    done = run(*dumps, "--out", out, "--workers", 1, *OPTIONS)
    assert_full(done, out)
    assert not list(out.glob("*.arrayrecord")) or (out / ".partial").exists()
    small_disk(100_000)
    done = run(*dumps, "--out", out, "--workers", 1, *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert files(out) == whole[0]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_may_not_grow_is_a_full_disk(dumps, whole, tmp_path, workers):
    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = run(*dumps, "--out", tmp_path, "--workers", workers, *OPTIONS, preexec_fn=limit_file_size)
    assert_full(done, tmp_path)
    done = run(*dumps, "--out", tmp_path, "--workers", workers, *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path) == whole[0]


def test_a_shard_that_could_not_be_closed_is_not_published(dumps, whole, tmp_path):
    """The limit is too small for the largest shard alone: pieces and indices are smaller."""
    sizes = sorted(len(data) for name, data in whole[0].items() if name.endswith(".arrayrecord"))
    code = (
        "import resource, sys; from ping_llm.data.ingest import prepare, tasks\n"
        "write = tasks._write_shards\n"
        "def limited(*arguments):\n"
        f"    resource.setrlimit(resource.RLIMIT_FSIZE, ({sizes[-1] - 1}, {sizes[-1] - 1}))\n"
        "    return write(*arguments)\n"
        "tasks._write_shards = limited\n"
        "from ping_llm.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    argv = command(*dumps, "--out", tmp_path, "--workers", 1, *OPTIONS)
    argv[1:4] = ["-c", code]
    argv.insert(3, "prepare")
    done = subprocess.run(argv, capture_output=True, text=True, timeout=HANG_S)
    assert_full(done, tmp_path)
    assert not list(tmp_path.glob("*.arrayrecord"))
    assert run(*dumps, "--out", tmp_path, "--workers", 1, *OPTIONS).returncode == 0
    assert files(tmp_path) == whole[0]


@pytest.mark.parametrize("kind", ["bz2", "gz", "zst"])
@pytest.mark.parametrize("damage", ["is cut off", "is corrupt"])
def test_damage_names_file_and_byte_and_only_keep_going_succeeds(tmp_path, kind, damage):
    path, plain = tmp_path / f"hour.{kind}", ndjson(*results(0, 12_000))
    if kind == "zst":  # without a checksum in it, some damage is no more than other letters
        packed = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(plain))
    else:
        packed = bytearray(write(path, plain).read_bytes())
    if damage == "is cut off":
        del packed[-2000:]
    else:
        middle = len(packed) * 7 // 8
        packed[middle : middle + 500] = random.Random(0).randbytes(500)
    path.write_bytes(packed)
    done = run(path, "--out", tmp_path / "rows", "--workers", 1)
    message = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and message.startswith(f"error: hour.{kind} {damage}") and " byte" in message
    assert message.endswith("get it again, or --keep-going with what can be read")
    assert not (tmp_path / "rows" / "manifest.json").exists()
    done = run(path, "--out", tmp_path / "rows", "--workers", 1, "--keep-going")
    assert done.returncode == 0 and f"kept going: hour.{kind} {damage}" in done.stdout, done.stderr
    lines = json.loads((tmp_path / "rows" / "manifest.json").read_text())["lines"]
    assert lines["read"] == sum(lines["counters"].values()) > 3000


def test_patterns_that_the_shell_left_alone_are_files(dumps, tmp_path):
    done = run(dumps[0].parent / "hour-[01].*", "--out", tmp_path / "rows", "--workers", 1)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "rows" / "manifest.json").read_text())
    assert [entry["name"] for entry in manifest["inputs"]] == ["hour-0.bz2", "hour-1.gz"]
    done = run(dumps[0].parent / "*.xz", "--out", tmp_path / "none")
    assert done.returncode == 1 and "*.xz; check the name" in done.stderr
