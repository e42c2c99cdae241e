"""JSON of shapes other than one result a line: objects of several lines, reports that hold results, nothing at all."""

import gzip
import json

import pytest
from pings import ndjson, ping, read_lines, write

from ping_llm.data.ingest import decompress, unpack
from ping_llm.data.ingest.prepare import prepare
from ping_llm.data.ingest.unpack import DamagedDump

RESULTS = [ping(timestamp=1_700_000_000 + i, msm_name='"raw": [ } é\\') for i in range(30)]


def report(results, **beside):
    """A report as a campaign writes it: what it found of each probe, then the results."""
    found = [{"probe_id": i, "state": "OK", "raw": [{"rtt": 5}], "note": '\\" ] } "raw": ['} for i in range(20)]
    return {"measurement_id": 1001, "type": "ping", "counts": {"OK": 2}, "classified": found, "raw": results} | beside


def read(path):
    return [json.loads(line) for line in b"".join(read_lines(path)).splitlines()]


@pytest.mark.parametrize("indent", [1, 4, "\t"])
@pytest.mark.parametrize("between", ["\n", "", "\r\n\r\n", ",\n"])
@pytest.mark.parametrize("block", [100, 1 << 20])
def test_indented_objects_one_after_another_are_results(tmp_path, monkeypatch, indent, between, block):
    monkeypatch.setattr(decompress, "BLOCK_BYTES", block)
    path = write(tmp_path / "a.json", between.join(json.dumps(r, indent=indent) for r in RESULTS).encode())
    assert read(path) == RESULTS


def test_an_object_whose_first_member_stands_beside_the_brace_is_read_on(tmp_path):
    text = "\n".join('{ "fw": 5080,\n' + json.dumps(r, indent=2).partition("\n")[2] for r in RESULTS)
    assert [r["timestamp"] for r in read(write(tmp_path / "a.json", text.encode()))] == [
        r["timestamp"] for r in RESULTS
    ]


def test_a_broken_first_line_does_not_make_lines_an_object_of_several(tmp_path):
    dump = write(tmp_path / "a.json", b'{"fw": 5080, "prb_id": 7,\n' + ndjson(*RESULTS))
    assert b"".join(read_lines(dump)).splitlines()[1:] == ndjson(*RESULTS).splitlines()


def test_objects_that_are_cut_off_are_an_error_after_the_whole_ones(tmp_path):
    path = write(tmp_path / "a.json", "\n".join(json.dumps(r, indent=1) for r in RESULTS).encode()[:-50])
    blocks, lines = read_lines(path), []
    with pytest.raises(DamagedDump, match=r"a\.json is cut off"):
        for block in blocks:
            lines += block.splitlines()
    assert [json.loads(line) for line in lines[:-1]] == RESULTS[:-1]


REPORTS = {
    "one": report(RESULTS),
    "list": [report(RESULTS[:10]), report([]), report(RESULTS[10:])],
    "results": {"count": 2, "next": None, "results": RESULTS},
    "first": {"raw": RESULTS, "classified": [{"raw": [1]}], "msm_id": 5},
}


@pytest.mark.parametrize("shape", REPORTS)
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("block", [1, 7, 100, 1 << 20])
def test_results_are_taken_out_of_reports_however_these_are_cut(tmp_path, monkeypatch, shape, indent, block):
    monkeypatch.setattr(decompress, "BLOCK_BYTES", block)
    path = write(tmp_path / "a.json", json.dumps(REPORTS[shape], indent=indent).encode())
    assert read(path) == RESULTS


def test_reports_one_a_line_and_reports_longer_than_a_line_may_be_are_read(tmp_path):
    lines = write(tmp_path / "a.json", ndjson(report(RESULTS[:20]), report(RESULTS[20:])))
    assert read(lines) == RESULTS
    many = [ping(timestamp=i) for i in range(1, 8000)]
    assert len(json.dumps(many)) > 2 * unpack.MAX_LINE_BYTES
    found = [{"probe_id": i, "state": "OK"} for i in range(40_000)]
    assert len(json.dumps(found)) > unpack.MAX_LINE_BYTES
    assert read(write(tmp_path / "b.json", json.dumps(report(many, classified=found)).encode())) == many


@pytest.mark.parametrize("cut", [1, 40, 2000, 9000])
def test_a_report_that_is_cut_off_is_an_error_after_its_whole_results(tmp_path, cut):
    path = write(tmp_path / "a.json", json.dumps([report(RESULTS[:10]), report(RESULTS[10:])]).encode()[:-cut])
    blocks, lines = read_lines(path), []
    with pytest.raises(DamagedDump, match=r"a\.json is cut off"):
        for block in blocks:
            lines += block.splitlines()
    assert lines[:10] == ndjson(*RESULTS[:10]).splitlines()


EMPTY = [b"", b"[]", b"[]\n", b" \n\n", b"{}", b"[\n]\n", b'{"1001": []}', json.dumps(report([])).encode()]


@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize("packed", [False, True])
def test_an_empty_file_among_good_ones_is_counted_and_a_file_by_itself_is_refused(tmp_path, empty, packed):
    good = write(tmp_path / "a.json", ndjson(*RESULTS))
    path = tmp_path / "nothing.json"
    path.write_bytes(gzip.compress(empty) if packed else empty)
    manifest = prepare([good, path], tmp_path / "out", workers=1, split="none")
    assert manifest["lines"]["counters"]["kept"] == 30
    assert manifest["empty_inputs"] == 1
    assert "problem" not in manifest["inputs"][1]
    for keep_going in (False, True):
        with pytest.raises(ValueError, match=r"nothing\.json is empty: it holds no results"):
            prepare([path], tmp_path / "alone", workers=1, keep_going=keep_going)
    other = write(tmp_path / "other.json", b"")
    with pytest.raises(ValueError, match="all 2 inputs are empty"):
        prepare([path, other], tmp_path / "alone", workers=1)
