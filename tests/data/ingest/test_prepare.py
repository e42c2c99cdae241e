import io
import json
import os
import tarfile

import numpy as np
import pyarrow as pa
import pytest
from paths import SHARED_DATA
from pings import ndjson, ping, read_lines, write
from traceroutes import reply, trace

from ping_llm.data.ingest import prepare as prepare_module
from ping_llm.data.ingest import tasks
from ping_llm.data.ingest.prepare import prepare, summary
from ping_llm.data.ingest.results import DROPPED_LINES
from ping_llm.data.ingest.splits import PARTS
from ping_llm.data.measurement import format_address
from ping_llm.data.rows import RowReader

SINCE_PARSED = ("written", "dropped_repeated", "dropped_held_out")
REAL = SHARED_DATA / "atlas"


def results(hour, probes=40, each=12):
    """An hour of pings of `probes` probes to five hosts, some of them without reply."""
    rng = np.random.default_rng(hour)
    for probe in range(probes):
        for i in range(each):
            rtt = rng.gamma(2, 20, 3).round(3).tolist()
            yield ping(
                prb_id=probe,
                msm_id=2000 + i % 5,
                timestamp=1_700_000_000 + 3600 * hour + 300 * i,
                src_addr=f"192.0.2.{probe}",
                dst_addr=f"198.51.{i % 5}.7" if i % 2 else f"2001:db8:{i % 5 + 1}::7",
                result=[{"x": "*"} if rng.random() < 0.1 else {"rtt": value} for value in rtt],
            )


@pytest.fixture(scope="module")
def dumps(tmp_path_factory):
    """Three hours; the last one repeats 50 results of the first and holds three bad lines."""
    folder = tmp_path_factory.mktemp("dumps")
    first, second, third = (list(results(hour)) for hour in range(3))
    third += [*first[:50], b"", b"<html>", ping(lts=-1)]
    return [
        write(folder / "a.bz2", ndjson(*first)),
        write(folder / "b.gz", ndjson(*second)),
        write(folder / "c.zst", ndjson(*third)),
    ]


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def all_rows(folder, manifest):
    parts = [part for part in PARTS if manifest["parts"][part]]
    return {part: pa.concat_tables([row.to_measurements() for row in RowReader(folder, part)]) for part in parts}


def test_every_line_and_measurement_is_accounted_for(dumps, tmp_path):
    manifest = prepare(dumps, tmp_path, workers=1)
    counters = {name: count for name, count in manifest["lines"]["counters"].items() if count}
    assert counters == {"kept": 3 * 480, "duplicate": 50, "blank_line": 1, "malformed_json": 1, "unsynced_clock": 1}
    assert manifest["lines"]["read"] == sum(counters.values()) == sum(entry["lines"] for entry in manifest["inputs"])
    assert sum(manifest["measurements"][name] for name in SINCE_PARSED) == 3 * 480 + 50
    assert manifest["measurements"]["dropped_repeated"] == 50
    assert sum(manifest["parts"].values()) == manifest["measurements"]["written"]
    for part, table in all_rows(tmp_path, manifest).items():
        assert table.num_rows == manifest["parts"][part]
        assert len(RowReader(tmp_path, part)) == manifest["rows"][part]
        assert len(list(tmp_path.glob(f"{part}-*-of-{manifest['shards'][part]:05d}.*"))) == manifest["shards"][part]
    assert manifest == json.loads((tmp_path / "manifest.json").read_text())
    assert not (tmp_path / ".partial").exists()
    assert "duplicate" in summary(manifest)


def test_the_rows_hold_the_measurements_of_the_dump_in_time_order(dumps, tmp_path):
    manifest = prepare(dumps, tmp_path, workers=1, packets="all", split="none", shards=2)
    assert manifest["parts"]["train"] == manifest["measurements"]["written"] == 3 * 480 * 3
    reader = RowReader(tmp_path, "train")
    assert sorted(reader.probe_id) == list(range(40))
    assert all((np.diff(row.time_s) >= 0).all() for row in reader)
    got = all_rows(tmp_path, manifest)["train"].to_pylist()
    got = [
        (r["probe_id"], r["msm_id"], r["time_s"], *map(format_address, (r["src"], r["dst"])), r["rtt_ms"]) for r in got
    ]
    want = [
        (r["prb_id"], r["msm_id"], r["timestamp"], r["src_addr"], r["dst_addr"], float(np.float32(e.get("rtt", -1))))
        for hour in range(3)
        for r in results(hour)
        for e in r["result"]
    ]
    assert sorted(got) == sorted(want)


def test_workers_and_the_order_of_inputs_leave_no_trace(dumps, tmp_path):
    prepare(dumps, tmp_path / "a", workers=1)
    prepare(dumps[::-1], tmp_path / "b", workers=2)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_compression_and_the_cut_into_chunks_leave_no_trace_in_the_rows(dumps, tmp_path, monkeypatch):
    prepare(dumps, tmp_path / "a", workers=1, shards=3)
    monkeypatch.setattr(tasks, "CHUNK_BYTES", 20_000)
    lines = [b"".join(read_lines(path)) for path in dumps]
    one = write(tmp_path / "all.ndjson", b"".join(lines[::-1]))
    prepare([one], tmp_path / "b", workers=1, shards=3)
    a, b = files(tmp_path / "a"), files(tmp_path / "b")
    assert a.pop("manifest.json") != b.pop("manifest.json")
    assert a == b


def test_a_repeated_result_is_dropped_within_and_across_files_whatever_its_other_fields(tmp_path):
    result = next(results(0))
    late = {**result, "stored_timestamp": 1_800_000_000}
    one, two = write(tmp_path / "a.json", ndjson(result, result)), write(tmp_path / "b.json", ndjson(late))
    for packets, size in (("one", 1), ("all", 3)):
        manifest = prepare([one, two], tmp_path / packets, workers=1, packets=packets, split="none")
        assert manifest["lines"]["counters"]["kept"] == 1
        assert manifest["lines"]["counters"]["duplicate"] == 2
        assert manifest["measurements"]["written"] == size


def test_an_address_of_a_held_out_group_is_dropped_and_counted(tmp_path):
    lines = [ping(prb_id=probe, timestamp=1_700_000_000 + probe, src_addr="192.0.2.1") for probe in range(200)]
    manifest = prepare([write(tmp_path / "a", ndjson(*lines))], tmp_path / "out", workers=1)
    held = manifest["parts"]["test-s3"] + manifest["parts"]["test-s5"]
    assert 0 < held < 30
    counted = {"dropped_repeated": 0, "dropped_held_out": 200 - held, "clamped_rtt": 0}
    assert manifest["measurements"] == {"written": held, **counted}


def test_rtts_that_no_code_can_tell_are_counted(tmp_path):
    rtts = [0.0001, 0.0005, 0.002, 80.0]
    lines = [ping(timestamp=1_700_000_000 + i, result=[{"rtt": rtt}]) for i, rtt in enumerate(rtts)]
    manifest = prepare([write(tmp_path / "a", ndjson(*lines))], tmp_path / "out", workers=1)
    assert manifest["measurements"]["written"] == 4 and manifest["measurements"]["clamped_rtt"] == 2


def test_a_finished_folder_is_left_as_it_is(dumps, tmp_path, capsys):
    manifest = prepare(dumps, tmp_path, workers=1)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert prepare(dumps[::-1], tmp_path, workers=1) == manifest
    assert "already holds these rows; nothing to do" in capsys.readouterr().err
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


@pytest.mark.parametrize("change", [{"packets": "all"}, {"split": "none"}, {"max_clock_skew_s": 5}, {"shards": 3}])
def test_other_options_or_inputs_do_not_touch_a_finished_folder(dumps, tmp_path, change):
    prepare(dumps, tmp_path, workers=1)
    before = files(tmp_path)
    for inputs, options in ((dumps, change), (dumps[:2], {})):
        with pytest.raises(ValueError, match="holds the rows of other inputs or options; choose another --out"):
            prepare(inputs, tmp_path, workers=1, **options)
    assert files(tmp_path) == before


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", [("map_dump", 2), ("merge_sources", 1), ("reduce_bucket", 3), ("shard_name", 4)])
def test_a_killed_run_that_is_repeated_ends_with_the_same_bytes(dumps, tmp_path, monkeypatch, step):
    prepare(dumps, tmp_path / "whole", workers=1)
    name, survives = step
    real, calls = getattr(prepare_module, name), []

    def killed(*args):
        calls.append(args)
        if len(calls) == survives:
            raise Killed
        return real(*args)

    monkeypatch.setattr(prepare_module, name, killed)
    with pytest.raises(Killed):
        prepare(dumps, tmp_path / "killed", workers=1)
    assert not (tmp_path / "killed" / "manifest.json").exists()
    monkeypatch.undo()
    prepare(dumps, tmp_path / "killed", workers=1)
    assert files(tmp_path / "whole") == files(tmp_path / "killed")


def test_a_repeated_run_does_not_parse_again_what_is_done(dumps, tmp_path, monkeypatch):
    def killed(*_):
        raise Killed

    monkeypatch.setattr(prepare_module, "merge_sources", killed)
    with pytest.raises(Killed):
        prepare(dumps, tmp_path, workers=1)
    monkeypatch.undo()
    monkeypatch.setattr(tasks, "parse_results", killed)
    assert prepare(dumps, tmp_path, workers=1)["lines"]["counters"]["kept"] == 3 * 480


def test_a_process_left_by_a_killed_run_cannot_write_where_its_successor_works(dumps, tmp_path, monkeypatch):
    task = tasks.MapTask(dumps[0], "a.bz2", tmp_path / "input-00000", 2, "one", 86_400)
    real, successor = tasks.parse_results, []

    def overtaken(*args):
        """Before the first task has written a piece, its successor begins."""
        parsed = real(*args)
        successor.append(tasks._fresh_folder(task.folder))
        return parsed

    monkeypatch.setattr(tasks, "parse_results", overtaken)
    with pytest.raises(FileNotFoundError):  # its folder is gone
        tasks.map_dump(task)
    assert list(tmp_path.iterdir()) == successor
    assert not list(successor[0].iterdir())


def test_of_two_processes_that_finish_one_task_the_first_stays(dumps, tmp_path, monkeypatch):
    task = tasks.MapTask(dumps[0], "a.bz2", tmp_path / "input-00000", 2, "one", 86_400)
    finish = tasks._finish

    def late(aside, folder, report):
        folder.mkdir()
        (folder / tasks.REPORT_NAME).write_text("the first")
        return finish(aside, folder, report)

    monkeypatch.setattr(tasks, "_finish", late)
    assert tasks.map_dump(task)["lines"] == 480
    assert [path.name for path in tmp_path.iterdir()] == ["input-00000"]
    assert (tmp_path / "input-00000" / tasks.REPORT_NAME).read_text() == "the first"


def test_a_dump_with_a_problem_is_looked_at_again(tmp_path):
    path = write(tmp_path / "a.json", b"<html>")
    task = tasks.MapTask(path, "a.json", tmp_path / "input-00000", 2, "one", 86_400)
    assert "no Atlas dump" in tasks.map_dump(task)["problem"]
    write(path, ndjson(ping()))
    report = {
        "lines": 1,
        "counters": dict.fromkeys(DROPPED_LINES, 0),
        "times": {1_700_000_000 // 60: 1},
        "problem": None,
    }
    assert tasks.map_dump(task) == report


def test_unfinished_work_on_other_inputs_is_not_used(dumps, tmp_path, monkeypatch):
    def killed(*_):
        raise Killed

    monkeypatch.setattr(prepare_module, "merge_sources", killed)
    with pytest.raises(Killed):
        prepare(dumps, tmp_path / "a", workers=1)
    monkeypatch.undo()
    prepare(dumps[1:], tmp_path / "a", workers=1)
    prepare(dumps[1:], tmp_path / "b", workers=1)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_shards_without_a_manifest_are_not_overwritten(dumps, tmp_path):
    (tmp_path / "train-00000-of-00001.arrayrecord").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"holds shards but no manifest\.json; choose another --out"):
        prepare(dumps, tmp_path, workers=1)
    assert (tmp_path / "train-00000-of-00001.arrayrecord").read_bytes() == b"precious"


def tar_of(content):
    archive, member = io.BytesIO(), tarfile.TarInfo("a.json")
    member.size = len(content)
    with tarfile.open(fileobj=archive, mode="w") as file:
        file.addfile(member, io.BytesIO(content))
    return archive.getvalue()


COMMAS = ndjson(*[ping()] * 9).replace(b"\n", b",\n")
HTML = b"<!DOCTYPE html>\n<html><head><title>404</title></head>\n<body>Not found</body></html>\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bz2", None, "no file .*a.bz2; check the name"),
        ("a.json", HTML, "a.json is no Atlas dump: none of its 3 lines is a JSON result"),
        ("a.gz", HTML, "a.gz is no Atlas dump"),
        ("a.json", b"[[[[", r"a\.json is cut off"),
        (
            "a.json",
            ndjson(*[ping()] * 9).replace(b"\n", b",\n"),
            r"of its 9 lines is a JSON result, such as line 1, '.* … '.*},'; ",
        ),
        (
            "a.json",
            ndjson(ping(), b"x", ping(), b"y", b"z"),
            r"mostly no Atlas dump: 3 of its 5 lines .*, such as line 2, 'x'; ",
        ),
        ("a.gz", tar_of(ndjson(*[ping()] * 9)), "a.gz is a tar archive, which is not read; unpack it first"),
    ],
)
def test_a_bad_dump_is_one_clear_line(dumps, tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        write(path, content)
    with pytest.raises(ValueError, match=message) as error:
        prepare([*dumps, path], tmp_path / "out", workers=1)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_truncated_dump_fails_unless_it_may_keep_going(dumps, tmp_path):
    rng = np.random.default_rng(0)
    lines = (ping(timestamp=1_700_000_000 + i, msm_name=rng.bytes(150).hex()) for i in range(8000))
    path = write(tmp_path / "d.bz2", ndjson(*lines))
    path.write_bytes(path.read_bytes()[:-10_000])
    size = path.stat().st_size
    with pytest.raises(ValueError, match=rf"d\.bz2 is cut off: .* at byte {size:,}; get it again, or --keep-going"):
        prepare([*dumps, path], tmp_path / "out", workers=2)
    manifest = prepare([*dumps, path], tmp_path / "out", workers=1, keep_going=True)
    (problem,) = [entry["problem"] for entry in manifest["inputs"] if "problem" in entry]
    assert problem in summary(manifest)
    assert manifest["lines"]["counters"]["malformed_json"] == 2  # of c.zst, and the line that was cut
    assert manifest["lines"]["counters"]["kept"] > 3 * 480 + 4000


def test_keep_going_counts_the_lines_of_what_is_no_dump(dumps, tmp_path):
    path = write(tmp_path / "x.json", HTML)
    manifest = prepare([*dumps, path], tmp_path / "out", workers=1, keep_going=True)
    assert manifest["lines"]["counters"]["malformed_json"] == 1 + 3


def test_a_half_that_is_malformed_is_not_most(dumps, tmp_path):
    path = write(tmp_path / "x.json", ndjson(ping(), b"", b"x", ping(), b"y", b""))
    counters = prepare([*dumps, path], tmp_path / "out", workers=1)["lines"]["counters"]
    assert counters["malformed_json"] == 1 + 2 and counters["blank_line"] == 1 + 2


def test_nothing_left_is_an_error_with_the_reasons(tmp_path):
    path = write(tmp_path / "a.json", ndjson(ping(lts=-1), ping(type="dns")))
    with pytest.raises(ValueError, match=r"no measurement is left of 2 lines \(not_ping 1, unsynced_clock 1\)"):
        prepare([path], tmp_path / "out", workers=1)


def test_a_folder_stands_for_the_dumps_in_it_but_not_for_the_truth_beside_them(dumps, tmp_path):
    folder = dumps[0].parent
    (folder / "truth.json").write_text("{}")
    (folder / "notes.txt").write_text("not a dump")
    assert prepare([folder], tmp_path / "a", workers=1) == prepare(dumps, tmp_path / "b", workers=1)


def test_a_folder_without_dumps_or_no_input_says_what_to_name(tmp_path):
    with pytest.raises(ValueError, match=r"holds no dumps, that is, no files ending in \.bz2"):
        prepare([tmp_path], tmp_path / "out")
    with pytest.raises(ValueError, match="no input; name the dumps"):
        prepare([], tmp_path / "out")


def test_standard_input_is_a_dump_of_any_compression(dumps, tmp_path, monkeypatch):
    for name in ("a", "b"):
        stdin = io.TextIOWrapper(io.BytesIO(dumps[0].read_bytes()))
        monkeypatch.setattr("sys.stdin", stdin)
        manifest = prepare(["-"], tmp_path / name, workers=1)
    assert manifest["lines"]["counters"]["kept"] == 480
    assert [entry["name"] for entry in manifest["inputs"]] == ["stdin"]
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_the_manifest_names_no_path_of_the_machine(dumps, tmp_path):
    prepare(dumps, tmp_path, workers=1)
    text = (tmp_path / "manifest.json").read_text()
    assert os.sep not in text.replace("salt/field/", "")


def test_all_lines_of_pings_and_traceroutes_together_are_accounted_for(dumps, tmp_path):
    path = [[reply("192.168.1.1", 0.5)], [reply("203.0.113.1", 5.5)] * 3, [reply("198.51.100.7", 19.5), {"x": "*"}]]
    traces = [trace(*path, timestamp=1_700_000_000 + 60 * i, prb_id=i) for i in range(20)]
    hops = write(tmp_path / "traceroute.bz2", ndjson(*traces, traces[0], trace(result=[])))
    manifest = prepare([*dumps, hops], tmp_path / "out", workers=1, traceroute="hops")
    lines, measurements = manifest["lines"], manifest["measurements"]
    assert lines["read"] == sum(lines["counters"].values()) == 3 * 480 + 50 + 3 + 22
    counters = {name: count for name, count in lines["counters"].items() if count}
    bad = {"blank_line": 1, "malformed_json": 1, "unsynced_clock": 1, "no_result": 1}
    assert counters == {"kept": 3 * 480 + 20, "duplicate": 50 + 1} | bad
    assert measurements["reply_used"] == 2 * 21  # of each hop one
    kept_pings = sum(measurements[name] for name in SINCE_PARSED) - measurements["reply_used"]
    assert kept_pings == 3 * 480 + 50


@pytest.mark.slow
def test_all_lines_of_the_shared_dumps_are_accounted_for(tmp_path):
    if not REAL.exists():
        pytest.skip("needs the real dumps in ../shared/data, which are not part of the project")
    manifest = prepare([REAL], tmp_path, traceroute="hops")
    lines, measurements = manifest["lines"], manifest["measurements"]
    assert len(manifest["inputs"]) == 62 + 72
    assert lines["read"] == sum(lines["counters"].values()) == 341_340 + 157_560
    assert lines["counters"]["kept"] > 0.99 * lines["read"]
    assert lines["counters"]["malformed_json"] == 0
    kept_pings = sum(measurements[name] for name in SINCE_PARSED) - measurements["reply_used"]
    assert 0.99 * 341_340 < kept_pings < 341_340
