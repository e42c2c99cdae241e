"""What a file is packed with is told by its bytes; what a few bytes become takes no more memory than any other dump."""

import bz2
import gzip
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import duckdb
import pytest
import zstandard
from pings import ndjson, ping, read_lines, write

from ping_llm.data.ingest import decompress, tasks
from ping_llm.data.ingest.decompress import plain_blocks
from ping_llm.data.ingest.tasks import MapTask, map_dump
from ping_llm.data.ingest.unpack import DamagedDump

PACK = {"bz2": bz2.compress, "gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}
SKIPPABLE = b"\x5e\x2a\x4d\x18" + struct.pack("<I", 5) + b"hello"
PEAK = """
import re, sys
from pathlib import Path
from ping_llm.data.ingest.unpack import read_chunks
lines = list(read_chunks(Path(sys.argv[1]), Path(sys.argv[2]), 64 << 20))
print(sum(lines), int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10)
"""


def result(time_s):
    return ndjson(ping(timestamp=time_s))


def read(path):
    return b"".join(read_lines(path))


def bomb(kind, size):
    """A result, `size` zeros, a newline and a result, packed without ever being whole."""
    new = {"bz2": bz2.BZ2Compressor, "gz": lambda: zlib.compressobj(wbits=31)}
    packer = new.get(kind, zstandard.ZstdCompressor(level=19).compressobj)()
    parts = [result(1), *[bytes(1 << 20)] * (size >> 20), b"\n" + result(2)]
    return b"".join(map(packer.compress, parts)) + packer.flush()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of a process in /proc")
@pytest.mark.parametrize("kind", ["bz2", "gz", "zst", "zst in gz", "gz in bz2"])
def test_few_bytes_that_become_many_take_little_memory(tmp_path, kind):
    inner, _, outer = kind.partition(" in ")
    packed = PACK.get(outer, bytes)(bomb(inner, 256 << 20))
    assert len(packed) < 300_000
    path = tmp_path / "bomb"
    path.write_bytes(packed)
    command = [sys.executable, "-c", PEAK, path, tmp_path / "scratch"]
    lines, peak_mb = map(int, subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.split())
    assert lines == 3
    assert peak_mb < 200


def test_a_chunk_of_too_many_values_is_parsed_by_halves_and_a_line_of_too_many_is_malformed(tmp_path, monkeypatch):
    path = write(tmp_path / "a.json", b"".join(result(i) for i in range(1, 12)) + b"[7]\n")
    whole = map_dump(MapTask(path, "a.json", tmp_path / "whole", 2, "one", 86_400))
    real, sizes = tasks.parse_results, []

    def forgetful(chunk, lines, *options):
        sizes.append(lines)
        if lines > 3 or b'"timestamp": 5,' in chunk.read_bytes():
            raise duckdb.OutOfMemoryException("Out of Memory Error")
        return real(chunk, lines, *options)

    monkeypatch.setattr(tasks, "parse_results", forgetful)
    halves = map_dump(MapTask(path, "a.json", tmp_path / "halves", 2, "one", 86_400))
    assert sizes[:3] == [12, 6, 3] and halves["lines"] == whole["lines"] == 12
    assert (whole["counters"]["malformed_json"], halves["counters"]["malformed_json"]) == (1, 2)
    assert sum(whole["times"].values()) == 11 and sum(halves["times"].values()) == 10
    assert not [file for file in (tmp_path / "halves").iterdir() if "ndjson" in file.name]


@pytest.mark.parametrize("first", PACK)
@pytest.mark.parametrize("second", PACK)
def test_streams_of_any_kind_may_follow_each_other_with_zeros_between_and_behind(tmp_path, first, second):
    path = tmp_path / "a"
    for zeros in (0, 1, 511, 100_000):
        path.write_bytes(PACK[first](result(1)) + bytes(zeros) + PACK[second](result(2)) + bytes(zeros))
        assert read(path) == result(1) + result(2)


def test_empty_streams_and_streams_of_a_byte_hide_no_shape(tmp_path):
    path = tmp_path / "a"
    text = json.dumps([ping(timestamp=i) for i in range(1, 4)]).encode()
    path.write_bytes(gzip.compress(b"") + b"".join(gzip.compress(text[i : i + 1]) for i in range(len(text))))
    assert read(path) == b"".join(result(i) for i in range(1, 4))


@pytest.mark.parametrize("name", ["a.json", "a.bz2", "a.zst"])
def test_layers_are_unpacked_one_by_one_whatever_the_name(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(bz2.compress(PACK["zst"](result(1)) + bytes(9)) + bz2.compress(b"")))
    assert read(path) == result(1)


def test_layers_without_end_are_refused(tmp_path):
    packed = result(1)
    for _ in range(decompress.MOST_LAYERS):
        packed = gzip.compress(packed)
    (tmp_path / "a.gz").write_bytes(packed)
    assert read(tmp_path / "a.gz") == result(1)
    (tmp_path / "a.gz").write_bytes(gzip.compress(packed))
    with pytest.raises(DamagedDump, match=r"a\.gz is packed more than 4 times over; unpack it first"):
        read(tmp_path / "a.gz")


@pytest.mark.parametrize("cut", [0, 1, 6, 12])
def test_skippable_frames_hold_nothing_and_hide_no_damage(tmp_path, cut):
    path, frame = tmp_path / "a.zst", PACK["zst"](result(1))
    packed = SKIPPABLE + frame + SKIPPABLE + SKIPPABLE + frame + SKIPPABLE
    path.write_bytes(packed[: len(packed) - cut])
    damage = []
    assert b"".join(plain_blocks(path, damage)) == result(1) + result(1)
    assert bool(damage) == (0 < cut < len(SKIPPABLE)), damage


def test_a_window_beyond_the_default_is_named(tmp_path):
    path = tmp_path / "a.zst"
    for log, refused in ((27, False), (28, True), (31, True)):
        packer = zstandard.ZstdCompressor(
            compression_params=zstandard.ZstdCompressionParameters(window_log=min(log, 28), write_content_size=False)
        ).compressobj()
        packed = bytearray(packer.compress(result(1)) + packer.flush())
        packed[5] = (log - 10) << 3  # the window descriptor: its logarithm is kept from 10 up
        path.write_bytes(packed)
        if not refused:
            assert read(path) == result(1)
            continue
        with pytest.raises(DamagedDump) as error:
            read(path)
        assert f"a window of {2**log >> 20:,} MiB, more than the 128 MiB that are read; repack it" in str(error.value)
        assert "corrupt" not in str(error.value)


def test_a_dictionary_is_named(tmp_path):
    samples = [json.dumps(ping(timestamp=i, prb_id=i * 7)).encode() for i in range(2000)]
    trained = zstandard.train_dictionary(4096, samples)
    path = tmp_path / "a.zst"
    path.write_bytes(zstandard.ZstdCompressor(dict_data=trained).compress(result(1)))
    with pytest.raises(DamagedDump, match=rf"packed with a dictionary \(number {trained.dict_id()}\)"):
        read(path)


@pytest.mark.parametrize(
    ("begin", "kind"),
    [
        (b"PK\x03\x04", "a zip archive"),
        (b"\xfd7zXZ\x00", "packed by xz"),
        (b"\x04\x22\x4d\x18", "packed by lz4"),
        (bytes(257) + b"ustar\x00", "a tar archive"),
    ],
)
@pytest.mark.parametrize("outer", ["", "gz"])
def test_other_formats_are_named(tmp_path, begin, kind, outer):
    path = tmp_path / "a.json"
    path.write_bytes(PACK.get(outer, bytes)(begin + result(1)))
    with pytest.raises(DamagedDump, match=f"a.json is {kind}, which is not read; unpack it first"):
        read(path)


@pytest.mark.parametrize("behind", [b"x", b"no stream", b"PK\x03\x04zip"])
def test_what_lies_behind_the_last_stream_is_named_with_its_place(tmp_path, behind):
    path, packed = tmp_path / "a.gz", gzip.compress(result(1)) + bytes(3)
    path.write_bytes(packed + behind)
    damage = []
    assert b"".join(plain_blocks(path, damage)) == result(1)
    assert len(damage) == 1 and f"a.gz is corrupt from byte {len(packed)} on" in damage[0]


def test_blocks_are_of_one_size_however_they_were_packed(tmp_path):
    text = b"".join(result(i) for i in range(1, 8000))
    for suffix in ("json", *PACK):
        sizes = [len(block) for block in plain_blocks(write(tmp_path / f"a.{suffix}", text), [])]
        assert sizes == [*[1 << 20] * (len(text) >> 20), len(text) % (1 << 20)]
