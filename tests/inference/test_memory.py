"""A memory finds what a look at all measurements would find, and nothing later or of another part."""

import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from conftest import make_row, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from ping_llm.data.measurement import pack_address
from ping_llm.data.rows import MANIFEST_NAME, ProbeRow
from ping_llm.inference.memory import ANY_TIME, Memory

# Three of one /24, its neighbour, two of one /48 and one that shares 32 bits; two of ::/48, where IPv4 is mapped to.
TEXTS = (
    "198.51.100.1",
    "198.51.100.2",
    "198.51.100.255",
    "198.51.101.0",
    "2001:db8:1::1",
    "2001:db8:1:9::",
    "2001:db8::1",
)
TEXTS += ("::5", "0:0:0:1::5")
HOSTS = np.array(
    [list(pack_address(text)) for text in (*TEXTS, "192.0.2.1", "192.0.2.2", "203.0.113.9")], dtype=np.uint8
)
KINDS = ("pair", "of_source", "to_destination")

pings = st.lists(st.tuples(st.integers(0, 10), st.integers(0, 10), st.integers(0, 6)), min_size=1, max_size=60)
seconds = st.sampled_from([*range(8), ANY_TIME])
asked = st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11), seconds), min_size=1, max_size=9)


def row_of(lines: list[tuple[int, int, int]], probe_id: int = 1) -> ProbeRow:
    """(source, destination, second) into HOSTS, each with an RTT of its own."""
    src, dst, time_s = np.array(sorted(lines, key=lambda line: line[2])).T
    zeros, rtt_ms = np.zeros(len(src), dtype=np.int64), np.arange(1, len(src) + 1, dtype=np.float32)
    return ProbeRow.from_codes(probe_id, time_s, zeros, src, dst, rtt_ms, zeros.astype(np.uint8), HOSTS, HOSTS)


def memory_of(folder: Path, *parts: list[tuple[int, int, int]]) -> Memory:
    """Of rows of these measurements, half in each of two rows."""
    halves = [[part[::2], part[1::2]] for part in parts]
    rows = {
        name: [row_of(half, probe) for probe, half in enumerate(own) if half]
        for name, own in zip(("train", "val"), halves, strict=False)
    }
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return Memory.open(write_rows(folder, rows, shards=1))


def slowly(memory: Memory, kind: str, src: bytes, dst: bytes, before_s: int) -> list[int]:
    """All places that a query is after, newest first, by looking at every measurement."""
    found = []
    for place in range(len(memory)):
        source, destination = (memory.addresses[ids[place]].tobytes() for ids in (memory.src_id, memory.dst_id))
        wanted = {
            "pair": (source, destination) == (src, dst),
            "of_source": source == src,
            "to_destination": destination == dst,
        }
        if wanted[kind] and memory.time_s[place] < before_s:
            found.append(place)
    return sorted(found, key=lambda place: (memory.time_s[place], place), reverse=True)


@settings(deadline=None, max_examples=60)
@given(lines=pings, queries=asked, count=st.integers(0, 5))
def test_each_query_finds_what_a_look_at_every_measurement_finds(tmp_path_factory, lines, queries, count):
    memory = memory_of(tmp_path_factory.getbasetemp() / "searched", lines)
    src, dst, before_s = np.array(queries).T
    src, dst = HOSTS[src], HOSTS[dst]
    arguments = {"of_source": (src,), "to_destination": (dst,)}
    for kind in KINDS:
        found = getattr(memory, kind)(*arguments.get(kind, (src, dst)), before_s, count)
        assert found.shape == (len(queries), count) and found.dtype == np.int64
        for row, source, destination, second in zip(found, src, dst, before_s, strict=True):
            expected = slowly(memory, kind, source.tobytes(), destination.tobytes(), second)[:count]
            assert row.tolist() == expected + [-1] * (count - len(expected))


def test_the_measurements_are_those_of_the_rows_by_source_destination_and_time(tmp_path):
    lines = [(10, 0, 5), (9, 3, 1), (9, 0, 4), (9, 0, 2), (2, 4, 3)]
    memory = memory_of(tmp_path / "rows", lines)
    ends = [[memory.addresses[i].tobytes() for i in ids] for ids in (memory.src_id, memory.dst_id)]
    held = list(zip(*ends, memory.time_s.tolist(), strict=True))
    assert held == sorted((HOSTS[src].tobytes(), HOSTS[dst].tobytes(), time_s) for src, dst, time_s in lines)
    firsts = [row_of(lines[::2]), row_of(lines[1::2])]
    rtt_ms = {(int(time_s), float(rtt)) for row in firsts for time_s, rtt in zip(row.time_s, row.rtt_ms, strict=True)}
    assert set(zip(memory.time_s.tolist(), memory.rtt_ms.tolist(), strict=True)) == rtt_ms
    assert len(memory) == len(lines) and (memory.ids(HOSTS[[0, 1]]) == [memory.ids(HOSTS[:1])[0], -1]).all()


def test_of_twenty_thousand_queries_at_once_each_finds_what_it_finds_alone(rows_folder):
    memory = Memory.open(rows_folder)
    rng = np.random.default_rng(0)
    src, dst = (memory.addresses[rng.integers(len(memory.addresses), size=20_000)] for _ in range(2))
    before_s = rng.integers(memory.time_s.min(), memory.time_s.max(), 20_000)
    found = memory.pair(src, dst, before_s, 300)
    assert (found >= 0).sum() > 100_000
    for query in rng.integers(20_000, size=50):
        own = slice(query, query + 1)
        assert np.array_equal(memory.pair(src[own], dst[own], before_s[own], 300)[0], found[query])


def test_a_memory_holds_nothing_that_is_held_out(tmp_path):
    train, held_out = [(9, 0, 1), (9, 1, 1)], [(9, 0, 2), (10, 0, 2), (9, 3, 0)]
    memory = memory_of(tmp_path / "rows", train, held_out)
    assert len(memory) == 2 and set(memory.time_s) == {1}
    assert (memory.pair(HOSTS[[9, 10, 9]], HOSTS[[0, 0, 3]], np.full(3, ANY_TIME), 4)[:, 1:] == -1).all()
    assert memory.ids(HOSTS[[10, 3]]).tolist() == [-1, -1]
    assert len(Memory.open(tmp_path / "rows", "val")) == 3


def test_what_is_sorted_once_is_mapped_and_not_sorted_again(tmp_path, monkeypatch):
    first = memory_of(tmp_path / "rows", [(9, 0, 1), (9, 0, 2)])
    monkeypatch.setattr("ping_llm.inference.memory.RowReader", None)
    again = Memory.open(tmp_path / "rows")
    assert np.array_equal(again.rtt_ms, first.rtt_ms) and not again.rtt_ms.flags.owndata
    assert len(list((tmp_path / "rows").glob("memory-*"))) == 1


def test_rows_that_were_made_anew_are_sorted_anew_and_what_was_sorted_is_deleted(tmp_path):
    assert len(memory_of(tmp_path / "rows", [(9, 0, 1)])) == 1
    (old,) = (tmp_path / "rows").glob("memory-*")
    kept = tmp_path / "old"
    old.rename(kept)
    memory_of(tmp_path / "rows", [(9, 0, 1), (9, 0, 2)])
    kept.rename(old)
    (tmp_path / "rows" / MANIFEST_NAME).write_text((tmp_path / "rows" / MANIFEST_NAME).read_text() + " ")
    assert len(Memory.open(tmp_path / "rows")) == 2
    assert len(list((tmp_path / "rows").glob("memory-*"))) == 1 and not old.exists()


@pytest.mark.parametrize("kept", [0, 100, -300])
def test_a_damaged_file_of_what_was_sorted_is_made_again(tmp_path, kept):
    memory_of(tmp_path / "rows", [(9, 0, 1), (9, 0, 2)])
    (path,) = (tmp_path / "rows").glob("memory-*")
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[:kept])
    assert len(Memory.open(tmp_path / "rows")) == 2
    assert path.read_bytes() == whole


def test_beside_rows_that_cannot_be_written_it_is_kept_among_the_caches_or_not_at_all(tmp_path, monkeypatch, caplog):
    memory_of(tmp_path / "rows", [(9, 0, 1), (9, 0, 2)])
    (path,) = (tmp_path / "rows").glob("memory-*")
    path.unlink()
    path.mkdir()  # so that no file can be written there, by root neither
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert len(Memory.open(tmp_path / "rows")) == 2
    assert (tmp_path / "cache" / "ping-llm" / "memory" / path.name).is_file() and not caplog.records
    monkeypatch.setenv("XDG_CACHE_HOME", str(path / "file"))
    (path / "file").touch()
    assert len(Memory.open(tmp_path / "rows")) == 2
    assert "are sorted again each time" in caplog.text


def test_processes_that_sort_at_once_all_find_everything(tmp_path):
    write_rows(tmp_path, {"train": [make_row(5000, seed) for seed in range(4)]})
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        assert list(pool.map(_count, [tmp_path] * 3)) == [20_000] * 3
    assert [path.suffix for path in tmp_path.glob("memory-*")] == [".arrow"]


def _count(folder: Path) -> int:
    return len(Memory.open(folder))


def test_a_folder_without_rows_of_the_part_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"no rows in {tmp_path}; run"):
        Memory.open(tmp_path)
    write_rows(tmp_path, {"val": [make_row(9)]})
    with pytest.raises(ValueError, match=f'{tmp_path} holds no "train" rows'):
        Memory.open(tmp_path)


def test_each_process_writes_aside_under_a_name_of_its_own_and_leaves_nothing(tmp_path, monkeypatch):
    asides = []

    def refuse(aside, path):
        asides.append((aside.name, aside.stat().st_size > 0))
        raise PermissionError("nothing is moved here")

    monkeypatch.setattr("ping_llm.inference.memory.move_atomically", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in range(2):
        assert len(memory_of(tmp_path / "rows", [(9, 0, 1), (9, 0, 2)])) == 2
    assert len({name for name, _ in asides}) == len(asides) == 4 and all(written for _, written in asides)
    assert not list(tmp_path.rglob("memory-*"))
