"""Dumps of every shape and compression as lines; damage is named after all that could be read."""

import bz2
import gzip
import json
import random
import re
import string
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pings import ndjson, ping, read_lines, write

from ping_llm.data.ingest import atlas, decompress, unpack
from ping_llm.data.ingest.tasks import MapTask, map_dump


def read(path):
    return b"".join(read_lines(path))


@pytest.mark.parametrize("suffix", ["bz2", "gz", "zst", "ndjson"])
def test_every_compression_is_recognised_by_its_content(tmp_path, suffix):
    plain = ndjson(*(ping(timestamp=i) for i in range(1, 5000)))
    path = write(tmp_path / f"a.{suffix}", plain)
    assert read(path) == plain
    assert read(path.rename(tmp_path / "renamed")) == plain


@pytest.mark.parametrize("pack", [bz2.compress, gzip.compress, zstandard.ZstdCompressor().compress])
def test_streams_that_follow_each_other_in_a_file_are_all_read(tmp_path, pack):
    path = tmp_path / "a"
    path.write_bytes(b"".join(pack(ndjson(ping(timestamp=i))) for i in range(1, 40)))
    assert read(path) == ndjson(*(ping(timestamp=i) for i in range(1, 40)))


@pytest.mark.parametrize("suffix", ["bz2", "gz", "zst"])
def test_a_truncated_stream_gives_what_it_holds_then_names_the_byte(tmp_path, suffix):
    rng = random.Random(0)
    noise = ("".join(rng.choices(string.ascii_letters, k=300)) for _ in range(10_000))
    path = write(tmp_path / f"a.{suffix}", ndjson(*(ping(msm_name=text) for text in noise)))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 3 // 4])
    size, blocks = path.stat().st_size, read_lines(path)
    readable = b""
    with pytest.raises(unpack.DamagedDump, match=rf"a.{suffix} is cut off: .* byte {size:,}; get it again"):
        for block in blocks:
            readable += block
    assert readable.count(b"\n") > 3000


@pytest.mark.parametrize("suffix", ["bz2", "gz", "zst"])
def test_a_corrupt_stream_is_one_clear_error(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", ndjson(*(ping(timestamp=i) for i in range(1, 20_000))))
    packed = bytearray(path.read_bytes())
    packed[len(packed) // 2 :] = random.Random(0).randbytes(len(packed) - len(packed) // 2)
    path.write_bytes(packed)
    with pytest.raises(
        unpack.DamagedDump, match=rf"a.{suffix} is corrupt between bytes .* \(.*\); get it again$"
    ) as error:
        read(path)
    begin, end = (int(number.replace(",", "")) for number in re.findall(r" ([\d,]+)", str(error.value))[:2])
    assert len(packed) // 2 <= end <= len(packed) and end - 2**14 <= begin < end


def test_a_first_block_whose_header_is_damaged_is_not_passed_over(tmp_path):
    packed = bytearray(bz2.compress(b"".join(ndjson(ping(timestamp=i)) for i in range(1, 10_000)), 1))  # several blocks
    packed[4] ^= 1  # of the magic number of the first block
    (tmp_path / "a.bz2").write_bytes(packed)
    with pytest.raises(unpack.DamagedDump, match=r"a\.bz2 is corrupt"):
        read(tmp_path / "a.bz2")


def test_a_disk_that_cannot_be_read_is_damage(tmp_path):
    unreadable = Path("/proc/self/mem")  # nothing lies at its byte 0: an I/O error
    if not unreadable.exists():
        pytest.skip("needs a file that gives an I/O error")
    with pytest.raises(
        unpack.DamagedDump, match=r"mem cannot be read at byte 0 \(Input/output error\); check the file"
    ):
        list(read_lines(unreadable))
    report = map_dump(MapTask(unreadable, "mem", tmp_path / "input-00000", 2, "one", 86_400))
    assert "cannot be read at byte 0" in report["problem"]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("block", [7, 1000, 1 << 20])
def test_api_arrays_become_lines(tmp_path, monkeypatch, indent, block):
    monkeypatch.setattr(decompress, "BLOCK_BYTES", block)
    results = [ping(timestamp=i, msm_name='] } , "x": é') for i in range(1, 30)]
    path = tmp_path / "a.json"
    shapes = {"array": results, "latest": {"7": results[:10], "-3": [], "12": results[10:]}}
    for shape in shapes.values():
        path.write_text(json.dumps(shape, indent=indent))
        assert [json.loads(line) for line in read(path).splitlines()] == results


@pytest.mark.parametrize("cut", [1, 300, 700])
def test_a_truncated_array_gives_its_whole_elements_and_is_an_error(tmp_path, cut):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([ping(timestamp=i) for i in range(1, 30)])[:-cut])
    blocks, lines = read_lines(path), []
    with pytest.raises(unpack.DamagedDump, match=r"a\.json is cut off"):
        for block in blocks:
            lines += block.splitlines()
    assert 27 <= sum(line.endswith(b"}") for line in lines) <= 29


def test_elements_that_are_no_results_still_count(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[1, "12", null, {"a": [{}]}, [3], 45]')
    assert read(path).splitlines() == [b"1", b'"12"', b"null", b'{"a": [{}]}', b"3", b"45"]


def test_an_enormous_line_counts_as_one_malformed_line(tmp_path):
    good = ndjson(ping())
    path = write(tmp_path / "a", good + b'{"fw":1,"a":"' + b"x" * (20 << 20) + b'"}\n' + good)
    chunks = [
        atlas.parse_results(tmp_path / "scratch", lines)
        for lines in unpack.read_chunks(path, tmp_path / "scratch", chunk_bytes=1 << 16)
    ]
    assert sum(table.num_rows for table, _ in chunks) == 2
    assert sum(dropped["malformed_json"] for _, dropped in chunks) == 1


def test_a_line_counts_by_its_length_wherever_blocks_are_cut():
    whole = b"a" * (unpack.MAX_LINE_BYTES - 1) + b"\n"
    for before in (b"", b"{}\n", b"b" * 700_000 + b"\n"):
        for line, want in (
            (whole, whole),
            (b"a" + whole, b"a" + whole),
            (b"aa" + whole, b"!\n"),
            (whole * 3, whole * 3),
        ):
            text = before + line + b"{}\n"
            for size in (1 << 20, 999_999):
                blocks = (text[at : at + size] for at in range(0, len(text), size))
                assert b"".join(unpack.whole_lines(blocks)) == before + want + b"{}\n"


def test_an_enormous_last_line_counts_though_nothing_follows(tmp_path):
    assert read(write(tmp_path / "a", ndjson(ping()) + b"x" * (3 << 20))) == ndjson(ping()) + b"!\n"


@pytest.mark.parametrize(
    "element",
    [
        '{"a": "%s"}',
        '{"a": ["%s", {"b": "]}\\\\\\""}]}',
        '"%s"',
        '{"a": "\\"%s\\\\", "b": 1}',
        '{"a": "%s", "result": [}]',
    ],
)
def test_an_enormous_element_counts_as_one_malformed_line(tmp_path, element):
    element = element % ("x\\n" * (1 << 20))
    text = json.dumps([ping(timestamp=1), "ELEMENT", ping(timestamp=2)]).replace('"ELEMENT"', element)
    path = write(tmp_path / "a.json", text.encode())
    assert [line[:12] for line in read(path).splitlines()] == [b'{"fw": 5080,', b"!", b'{"fw": 5080,']


TEXT = st.text('a\\"[]{}', max_size=6)
ELEMENTS = st.recursive(TEXT, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))


@settings(derandomize=True)
@given(element=ELEMENTS, behind=TEXT, sizes=st.lists(st.integers(1, 5), min_size=1))
def test_the_end_of_a_skipped_element_is_that_of_its_json_wherever_it_is_cut(element, behind, sizes):
    text, skipped, at, turn = json.dumps(element), unpack._Skipped(), 0, 0
    whole = text + behind
    while at < len(whole) and (not at or skipped.open):
        size = sizes[turn % len(sizes)]
        at, turn = at + skipped.end(whole[at : at + size]), turn + 1
    assert at == len(text)


def test_a_chunk_of_the_shortest_lines_holds_not_many_more_lines_than_one_of_results(tmp_path):
    path, scratch = write(tmp_path / "a.zst", b"0\n" * 3_000_000), tmp_path / "scratch"
    lines = list(unpack.read_chunks(path, scratch, chunk_bytes=64 << 20))
    assert sum(lines) == 3_000_000
    assert max(lines) <= unpack.CHUNK_LINES + decompress.BLOCK_BYTES // 2


MARK = b"\xef\xbb\xbf"


def test_byte_order_marks_and_a_missing_last_newline_are_nothing(tmp_path):
    path = write(tmp_path / "a", MARK + MARK + ndjson(ping(), ping()) + MARK + ndjson(ping()).rstrip())
    assert read(path) == ndjson(ping(), ping(), ping())
    array = b"[" + ndjson(ping()).rstrip() + b"]"
    assert read(write(tmp_path / "b.gz", MARK + array + b"\n" + MARK + array)) == ndjson(ping(), ping())


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_text_of_another_encoding_is_told_by_its_byte_order_mark(tmp_path, encoding):
    results = [ping(timestamp=i, msm_name="é 語") for i in range(1, 3000)]
    lines = "".join(json.dumps(result, ensure_ascii=False) + "\r\n" for result in results)
    mark = "" if encoding in ("utf-16", "utf-32") else "\ufeff"
    for text in (lines, json.dumps(results, ensure_ascii=False)):
        path = write(tmp_path / "a.bz2", (mark + text).encode(encoding))
        assert [json.loads(line) for line in read(path).splitlines()] == results


def test_white_space_of_any_length_may_stand_between_elements(tmp_path):
    path = write(tmp_path / "a.gz", b"[1," + b" \n" * (2 << 20) + b"2" + b" " * (3 << 20) + b"]")
    assert read(path) == b"1\n2\n"


@settings(derandomize=True)
@given(data=st.binary(max_size=400), sizes=st.lists(st.integers(1, 50), min_size=1))
def test_blocks_cut_anywhere_give_the_same_lines(data, sizes):
    blocks, at = [], 0
    while at < len(data):
        size = sizes[len(blocks) % len(sizes)]
        blocks.append(data[at : at + size])
        at += size
    lines = list(unpack.whole_lines(blocks))
    assert all(block.endswith(b"\n") for block in lines)
    assert b"".join(lines) == data + (b"" if data.endswith(b"\n") or not data else b"\n")
