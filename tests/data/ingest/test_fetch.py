"""Fetching dumps and results from a real server, by real processes that get killed."""

import bz2
import gzip
import hashlib
import json
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pings import ndjson, ping
from servers import NOON_S, QUICK, RECENT_DAY, chunks, content, dumps, file, noise, serving, status, stream, wait_for
from waiting import HANG_S

from ping_llm.cli import main
from ping_llm.data.ingest.download import Manners
from ping_llm.data.ingest.fetch import ATTRIBUTION, Wanted, fetch, hourly_dumps, results
from ping_llm.data.ingest.prepare import prepare

SECRET = "1f3e-not-to-be-seen"


def test_dumps_come_byte_for_byte_with_record_and_terms_and_are_not_requested_again(server, tmp_path, capsys):
    bodies = [noise(0), noise(1)]
    wanted = dumps(server, [file(bodies[0], Last_Modified="Sun, 01 Nov 2026 02:00:00 GMT")], [file(bodies[1], None)])
    begun = datetime.now(UTC).replace(microsecond=0)
    record = fetch(wanted, tmp_path, QUICK)
    day = str(RECENT_DAY)
    assert sorted(server.paths()) == [f"/{day}/ping-{day}T0000.bz2", f"/{day}/ping-{day}T0100.bz2"]
    assert content(tmp_path) == {one.name: body for one, body in zip(wanted, bodies, strict=True)}
    assert record == json.loads((tmp_path / "fetch.json").read_text())
    first, second = record["files"]
    assert first["bytes"] == len(bodies[0]) and first["sha256"] == hashlib.sha256(bodies[0]).hexdigest()
    assert first["url"] == wanted[0].url and first["name"] == wanted[0].name
    assert first["etag"] == '"v1"' and first["last_modified"] == "Sun, 01 Nov 2026 02:00:00 GMT"
    assert second["etag"] is None and second["last_modified"] is None
    assert begun <= datetime.fromisoformat(first["fetched_at"]) <= datetime.now(UTC)
    assert not (tmp_path / ".fetch").exists()
    assert (tmp_path / "ATTRIBUTION.txt").read_text() == ATTRIBUTION + "\n"
    assert fetch(wanted, tmp_path, QUICK) == record
    assert len(server.requests) == 2
    assert capsys.readouterr().out.count(ATTRIBUTION) == 1


def test_a_day_outside_the_archive_is_said_to_be_so_at_once(server, tmp_path):
    wanted = hourly_dumps(server.url, "ping", "2020-02-28/2020-03-01")
    assert len(wanted) == 72
    with pytest.raises(ValueError, match=r"404 Not Found: the archive keeps about 30 days; .* --msm"):
        fetch(wanted, tmp_path, Manners(requests_per_s=5))
    assert len(server.requests) == 1


def test_hours_that_are_missing_do_not_keep_the_others_back(server, tmp_path):
    body = noise(0)
    wanted = dumps(server, [status(404)], [file(body)], [status(404)])
    with pytest.raises(ValueError, match=r"T0000.bz2: 404 .* does not have that hour; 2 of 3 files are not there"):
        fetch(wanted, tmp_path, QUICK)
    assert content(tmp_path) == {wanted[1].name: body}
    assert [entry["name"] for entry in json.loads((tmp_path / "fetch.json").read_text())["files"]] == [wanted[1].name]
    fresh = hourly_dumps(server.url, "ping", str(datetime.now(UTC).date()), [datetime.now(UTC).hour])
    with pytest.raises(ValueError, match="not published yet"):
        fetch(fresh, tmp_path, QUICK)


def test_results_come_in_chunks_that_cover_the_span_and_only_a_broken_one_is_repeated(server, tmp_path):
    lines = [ndjson(*(ping(prb_id=p, timestamp=NOON_S + 3600 * hour + 60) for p in range(30))) for hour in range(3)]
    broken = [stream(lines[1], whole=False), stream(lines[1][:-20]), stream(lines[1])]
    wanted = chunks(server, [stream(lines[0])], broken, [stream(lines[2])])
    record = fetch(wanted, tmp_path, QUICK)
    counts = {path: server.paths().count(path) for path in server.replies}
    assert list(counts.values()) == [1, 3, 1]
    base = f"/measurements/1001/results/?start={NOON_S}&stop={NOON_S + 3600}&format=txt"
    assert min(server.paths()) == base  # two are under way at once: either may arrive first
    held = content(tmp_path)
    assert [gzip.decompress(held[name]) for name in sorted(held)] == lines
    assert [entry["results"] for entry in record["files"]] == [30, 30, 30]
    assert all(entry["bytes"] == len(held[entry["name"]]) for entry in record["files"])
    fetch(wanted, tmp_path / "again", QUICK)
    assert content(tmp_path / "again") == held


def test_results_come_as_json_and_plain_and_of_some_probes(server, tmp_path):
    body = json.dumps([ping(), ping(prb_id=8)]).encode()
    options = {"format": "json", "packed": False, "probes": [8, 7]}
    wanted = chunks(server, [stream(body)], [status(200, b"[]")], **options)
    record = fetch(wanted, tmp_path, QUICK)
    assert content(tmp_path) == {wanted[0].name: body} and wanted[0].name.endswith("0000.json")
    assert server.paths()[0].endswith("&format=json&probe_ids=7,8")
    assert [entry["bytes"] for entry in record["files"]] == [len(body), 0]
    other = chunks(server, [stream(body)], format="json", packed=False)
    with pytest.raises(ValueError, match=r"of other options .*; choose another --out"):
        fetch(other, tmp_path, QUICK)


def test_a_span_without_results_leaves_no_file_and_is_not_requested_again(server, tmp_path):
    wanted = chunks(server, [stream(b"")], [stream(ndjson(ping()))])
    record = fetch(wanted, tmp_path, QUICK)
    assert list(content(tmp_path)) == [wanted[1].name]
    assert [(entry["bytes"], entry["results"]) for entry in record["files"]] == [
        (0, 0),
        (len(content(tmp_path)[wanted[1].name]), 1),
    ]
    fetch(wanted, tmp_path, QUICK)
    assert len(server.requests) == 2
    with pytest.raises(ValueError, match="have no results in that time"):
        fetch(wanted[:1], tmp_path / "alone", QUICK)


def test_an_error_of_the_api_is_passed_on(server, tmp_path):
    error = json.dumps({"error": {"status": 400, "detail": "start:\n not a valid time"}}).encode()
    with pytest.raises(ValueError, match=r"400 Bad Request \(start: not a valid time\)$"):
        fetch(chunks(server, [status(400, error)]), tmp_path, QUICK)
    with pytest.raises(ValueError, match="there is no such measurement; check its id"):
        fetch(chunks(server, [status(404)]), tmp_path, QUICK)
    wanted = chunks(server, [status(200, error), stream(ndjson(ping()))])  # an error within an answer that began well
    fetch(wanted, tmp_path, QUICK)
    assert len(content(tmp_path)) == 1


def run(*argv, largest_file=None):
    """The command in a process of its own, which may write no larger file."""
    command = [sys.executable, "-m", "ping_llm", "fetch", "--requests-per-s", "1000", *map(str, argv)]

    def begin() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may ignore it
        if largest_file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=begin)


def span(hours=1):
    stop = datetime.fromtimestamp(NOON_S + 3600 * hours, UTC)
    return ["--msm", 1001, "--start", datetime.fromtimestamp(NOON_S, UTC).isoformat(), "--stop", stop.isoformat()]


def test_the_key_goes_to_the_api_alone_and_is_written_nowhere(server, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("RIPE_ATLAS_API_KEY", f"{SECRET}\n")
    with serving() as elsewhere:
        path = f"/{chunks(server, [status(302, Location=f'{elsewhere.url}/moved')])[0].request}"
        elsewhere.replies["/moved"] = [stream(ndjson(ping()))]
        argv = ["fetch", *map(str, span()), "--requests-per-s", "1000", "--api", server.url]
        assert main([*argv, "--out", str(tmp_path / "a")]) == 0
    assert server.requests[0][1]["Authorization"] == f"Key {SECRET}"
    assert len(elsewhere.requests) == 1 and "Authorization" not in elsewhere.requests[0][1]
    for code in (401, 403):
        server.replies[path] = [status(code)]
        assert main([*argv, "--out", str(tmp_path / str(code))]) == 1
    day = dumps(server, [file(noise(0))])
    assert (
        main(
            ["fetch", "--dump", str(RECENT_DAY), "--hours", "0", "--archive", server.url, "--out", str(tmp_path / "d")]
        )
        == 0
    )
    assert server.paths()[-1] == f"/{day[0].request}" and "Authorization" not in server.requests[-1][1]
    monkeypatch.setenv("RIPE_ATLAS_API_KEY", f"{SECRET}\n{SECRET}")
    assert main([*argv, "--out", str(tmp_path / "b")]) == 1
    out, err = capfd.readouterr()
    assert err.count("give a key that may read it in the environment variable RIPE_ATLAS_API_KEY") == 2
    assert "the API key holds spaces or characters that no key has" in err
    assert SECRET not in out + err
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 4 and not any(SECRET.encode() in path.read_bytes() for path in written)


def test_a_killed_fetch_goes_on_and_fetches_nothing_whole_again(server, tmp_path):
    bodies = [noise(seed) for seed in range(3)]
    stalled = file(bodies[1], upto=100_000, then=server.release.wait)
    wanted = dumps(server, [file(bodies[0])], [stalled, file(bodies[1])], [file(bodies[2])])
    argv = ["--dump", RECENT_DAY, "--hours", 0, 1, 2, "--parallel", 1, "--archive", server.url, "--out", tmp_path]
    killed = run(*argv)
    part = tmp_path / ".fetch" / wanted[1].name
    wait_for(lambda: part.exists() and part.stat().st_size == 100_000)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert list(content(tmp_path)) == [wanted[0].name]
    server.release.set()
    again = run(*argv)
    out, err = again.communicate(timeout=HANG_S)
    assert again.returncode == 0 and "3 files" in out, err
    assert content(tmp_path) == {one.name: body for one, body in zip(wanted, bodies, strict=True)}
    assert server.paths() == [f"/{wanted[i].request}" for i in (0, 1, 1, 2)]
    assert server.requests[2][1]["Range"] == "bytes=100000-"
    record = json.loads((tmp_path / "fetch.json").read_text())
    assert [e["sha256"] for e in record["files"]] == [hashlib.sha256(body).hexdigest() for body in bodies]


def test_a_fetch_killed_again_and_again_ends_with_the_same_files(server, tmp_path):
    def slow(body):
        return lambda handler: (time.sleep(0.02), stream(body)(handler))

    hours = 24
    lines = [ndjson(*(ping(prb_id=p, timestamp=NOON_S + 3600 * hour) for p in range(20))) for hour in range(hours)]
    chunks(server, *([slow(line)] for line in lines))
    argv = [*span(hours), "--api", server.url, "--out", tmp_path]
    for requests in (1, 7, 20):
        killed = run(*argv)
        wait_for(lambda requests=requests: len(server.requests) >= requests)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
    again = run(*argv)
    _, err = again.communicate(timeout=HANG_S)
    assert again.returncode == 0, err
    held = content(tmp_path)
    assert [gzip.decompress(held[name]) for name in sorted(held)] == lines
    # Two are under way at once, so each kill costs two requests at most.
    assert len(server.requests) <= hours + 3 * 2


def test_a_fetch_killed_between_the_note_and_the_file_fetches_it_again(server, tmp_path):
    body = noise(0)
    wanted = dumps(server, [file(body)])
    entry = fetch(wanted, tmp_path, QUICK)["files"][0]
    for path in tmp_path.iterdir():
        path.unlink()
    (tmp_path / ".fetch").mkdir()
    (tmp_path / ".fetch" / f"{wanted[0].name}.done").write_text(json.dumps(entry))
    fetch(wanted, tmp_path, QUICK)
    assert content(tmp_path) == {wanted[0].name: body} and len(server.requests) == 2


def test_a_fetch_killed_when_all_bytes_were_there_requests_none(server, tmp_path):
    body = noise(0)
    wanted = dumps(server, [file(body)])
    (tmp_path / ".fetch").mkdir()
    (tmp_path / ".fetch" / wanted[0].name).write_bytes(body)
    version = {"url": wanted[0].url, "bytes": len(body), "etag": '"v1"', "last_modified": None}
    (tmp_path / ".fetch" / f"{wanted[0].name}.json").write_text(json.dumps(version))
    fetch(wanted, tmp_path, QUICK)
    assert content(tmp_path) == {wanted[0].name: body} and not server.requests


def test_a_full_disk_is_one_clear_line_and_leaves_nothing_that_looks_whole(server, tmp_path):
    body = noise(0)
    wanted = dumps(server, [file(body)])
    argv = ["--dump", RECENT_DAY, "--hours", 0, "--archive", server.url, "--out", tmp_path]
    _, err = (full := run(*argv, largest_file=len(body) - 10)).communicate(timeout=HANG_S)
    assert full.returncode == 1 and err.count("\n") == 1 and f"no space left in {tmp_path}" in err
    assert content(tmp_path) == {} and not (tmp_path / "fetch.json").exists()
    fetch(wanted, tmp_path, QUICK)
    assert content(tmp_path) == {wanted[0].name: body} and "Range" in server.requests[-1][1]


def test_offline_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        for argv in (["--dump", RECENT_DAY, "--archive", url], [*span(24), "--api", url]):
            done = run(*argv, "--out", tmp_path)
            out, err = done.communicate(timeout=HANG_S)
            assert done.returncode == 1 and out == ""
            assert err.count("\n") == 1 and "Connection refused" in err and "is this machine offline" in err


def test_an_interrupted_fetch_ends_soon_and_keeps_what_is_whole(server, tmp_path):
    body = noise(0)
    wanted = dumps(server, [file(body)], [status(503, Retry_After="599")])
    fetching = run("--dump", RECENT_DAY, "--hours", 0, 1, "--archive", server.url, "--out", tmp_path, "--parallel", 1)
    while "again in 599" not in fetching.stderr.readline():
        assert fetching.poll() is None
    fetching.send_signal(signal.SIGINT)
    _, err = fetching.communicate(timeout=HANG_S)
    assert len(server.requests) == 2  # it did not wait to the end, after which it would have requested once more
    assert fetching.returncode == 130 and "stopped" in err and "Traceback" not in err
    assert content(tmp_path) == {wanted[0].name: body} and (tmp_path / "fetch.json").exists()


def test_two_fetches_do_not_write_to_one_folder(server, tmp_path):
    body = noise(0)
    wanted = dumps(server, [file(body, upto=100_000, then=server.release.wait), file(body)])
    first = threading.Thread(target=fetch, args=(wanted, tmp_path, QUICK))
    first.start()
    wait_for(lambda: server.requests)
    with pytest.raises(ValueError, match="another process writes to"):
        fetch(wanted, tmp_path, QUICK)
    server.release.set()
    first.join()
    assert content(tmp_path) == {wanted[0].name: body}


def test_a_file_that_no_fetch_wrote_is_not_overwritten(server, tmp_path):
    wanted = dumps(server, [file(noise(0))])
    (tmp_path / wanted[0].name).write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"is there, but not as fetch.json knows it; move it away"):
        fetch(wanted, tmp_path, QUICK)
    assert content(tmp_path) == {wanted[0].name: b"mine"} and not server.requests


def test_what_was_fetched_goes_into_prepare_and_the_overlap_of_chunks_is_dropped(server, tmp_path):
    hours = [[ping(prb_id=p, timestamp=NOON_S + 3600 * hour + 60 * p) for p in range(20)] for hour in range(2)]
    border = ping(prb_id=99, timestamp=NOON_S + 3600)
    wanted = chunks(server, [stream(ndjson(*hours[0], border))], [stream(ndjson(border, *hours[1]))])
    dump = bz2.compress(ndjson(*(ping(prb_id=p, msm_id=5001, timestamp=NOON_S + p) for p in range(30))))
    fetch(wanted, tmp_path / "dump", QUICK)
    fetch(dumps(server, [file(dump)]), tmp_path / "dump", QUICK)
    manifest = prepare([tmp_path / "dump"], tmp_path / "rows", workers=1, split="none")
    assert len(manifest["inputs"]) == 3
    assert manifest["lines"]["read"] == 72 and manifest["lines"]["counters"]["duplicate"] == 1
    assert manifest["parts"]["train"] == 71


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give either --msm ID --start TIME --stop TIME, or --dump DAY"),
        (["--msm", "1001", "--start", "2026-01-01"], "give either --msm ID"),
        (["--dump", "2026-01-01", "--stop", "2026-01-02"], "give either --msm ID"),
        (["--dump", "2026-01-01", "--probes", "7"], "--probes goes with --msm"),
        (["--dump", "2026-02-30"], "'2026-02-30' is no day; write 2026-11-01"),
        (["--dump", "2026-01-02/2026-01-01"], "ends before it begins"),
        (["--dump", "0001-01-01/9999-12-31"], "choose fewer days"),
        (["--dump", "2026-01-01", "--hours", "24"], "hours=24 must be from 0 to 23"),
        (["--dump", "2026-01-01", "--archive", "ftp://192.0.2.1"], "is no address of a server"),
        (["--dump", "2026-01-01", "--requests-per-s", "nan"], "requests_per_s=nan must be above 0"),
        (["--dump", "2026-01-01", "--parallel", "0"], "parallel=0 must be at least 1"),
        (
            ["--msm", "1", "--start", "2026-01-02", "--stop", "2026-01-01"],
            "must be later than start=2026-01-02T00:00:00Z",
        ),
        (["--msm", "1", "--start", "2026-01-02", "--stop", "2999-01-01"], "is in the future"),
        (["--msm", "1", "--start", "soon", "--stop", "2026-01-01"], "'soon' is not a time"),
        (
            ["--msm", "0", "--start", "2026-01-01", "--stop", "2026-01-02"],
            "ids of measurements and probes must be above 0",
        ),
        (["--msm", "1", "--start", "2026-01-01", "--stop", "2026-01-02", "--chunk-hours", "nan"], "chunk_hours=nan"),
        (["--msm", "1", "--start", "1980-01-01", "--stop", "2026-01-02"], "choose --chunk-hours that are longer"),
    ],
)
def test_a_bad_command_is_one_clear_line(tmp_path, capsys, argv, message):
    assert main(["fetch", "--out", str(tmp_path / "out"), *argv]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@given(st.integers(1, 10**9), st.integers(1, 10**6), st.floats(0.3, 10**4))
def test_chunks_cover_a_span_without_gap_and_lie_on_one_grid(start_s, length_s, chunk_hours):
    wanted = results("http://192.0.2.1", [1001], start_s, start_s + length_s, chunk_hours=chunk_hours)
    edges = [one.start_s for one in wanted] + [wanted[-1].stop_s]
    assert edges[0] == start_s and edges[-1] == start_s + length_s
    assert [one.stop_s for one in wanted] == edges[1:] and (np.diff(edges) > 0).all()
    assert len({one.name for one in wanted}) == len(wanted)
    longer = results("http://192.0.2.1", [1001], start_s, start_s + 2 * length_s, chunk_hours=chunk_hours)
    assert longer[: len(wanted) - 1] == wanted[:-1]


@given(st.text() | st.dates().map(str) | st.dates().map("{0}/{0}".format))
def test_any_text_for_days_is_read_or_is_one_clear_line(text):
    try:
        wanted = hourly_dumps("http://192.0.2.1", "ping", text)
    except ValueError as error:
        assert str(error).startswith(repr(text)) and "\n" not in str(error)
    else:
        assert len(wanted) % 24 == 0 and all(isinstance(one, Wanted) for one in wanted)
