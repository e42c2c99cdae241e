"""Lines come in from pipes, dumps and a server that drops, repeats and reorders; every result is scored once."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
from atlas_server import serving_atlas
from paths import ROOT
from servers import wait_for
from waiting import HANG_S
from watching import QUICK, START_S, ByMedian, changes, events, identities, lines, outage, result

from ping_llm import cli
from ping_llm.watch import feeds
from ping_llm.watch.atlas import Live, follow
from ping_llm.watch.hysteresis import Rule
from ping_llm.watch.run import Feed, watch
from ping_llm.watch.state import Bounds, State


def run(feed, out, every=True, **options):
    return watch(feed, ByMedian, out, Rule(), Bounds(), every, manners=QUICK, **options)


def recent(count: int = 200) -> list[dict]:
    """Results of ten probes in the last quarter of an hour."""
    now_s = int(time.time())
    return [result(0, probe=1 + n % 10, timestamp=now_s - 2 - 4 * (n // 10)) for n in range(count)]


def started(*argv: object, stdin: object = subprocess.DEVNULL) -> subprocess.Popen:
    """A watch in a process of its own."""
    path = os.pathsep.join(map(str, (ROOT / "src", ROOT / "tests", ROOT / "tests" / "watch")))
    script = ROOT / "tests" / "watch" / "watching.py"
    pipes = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, script, *map(str, argv)], env=os.environ | {"PYTHONPATH": path}, **pipes)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def end(process: subprocess.Popen) -> dict:
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=HANG_S)
    assert process.returncode == 0, err.decode()
    return json.loads(out.splitlines()[-1])


@pytest.mark.slow
def test_killed_at_random_moments_beside_a_bad_server_every_result_is_scored_once(tmp_path):
    """Kill −9 four times, each once the file has grown by a random number of bytes; then let it end."""
    out, results, rng = tmp_path / "out.jsonl", recent(), random.Random(1)
    with serving_atlas(results) as server:
        server.api_faults = 1.0  # so that there is work for all of them
        for _ in range(4):
            process = started(out, server.url, server.url)
            grown = size(out) + rng.randrange(1, 8_000)
            wait_for(
                lambda grown=grown, p=process: size(out) >= grown or p.poll() is not None or len(events_of(out)) >= 150
            )
            assert process.poll() is None, process.stderr.read().decode()
            process.kill()
            process.wait()
        server.api_faults = 0.3
        process = started(out, server.url, server.url)
        wait_for(lambda: len(events_of(out)) >= len(results) or process.poll() is not None)
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.5)  # for what might come twice
        end(process)
    found = identities(out)
    assert len(found) == len(set(found)) == len(results)
    with State(tmp_path / "out.jsonl.state", out, Bounds()) as state:
        assert state.number("scored") == len(results)


def events_of(out: Path) -> list[bytes]:
    """Whole lines of a file that is being written."""
    return out.read_bytes().split(b"\n")[:-1] if out.exists() else []


@pytest.mark.slow
def test_killed_while_it_reads_a_pipe_it_goes_on_to_the_same_file(tmp_path):
    given_lines, rng = lines(*outage(probes=3)), random.Random(2)
    expected = tmp_path / "expected.jsonl"
    (tmp_path / "all").write_bytes(b"".join(given_lines))
    run(Feed(tmp_path / "all"), expected)
    out, whole = tmp_path / "out.jsonl", expected.read_bytes()
    for _ in range(2):
        process = started(out, stdin=subprocess.PIPE)
        grown = size(out) + rng.randrange(1, len(whole) // 3)
        writer = threading.Thread(target=pour, args=(given_lines, process.stdin), daemon=True)
        writer.start()
        wait_for(lambda grown=grown: size(out) >= grown)
        process.kill()
        process.wait()
        writer.join()
        assert whole.startswith(out.read_bytes()[: out.read_bytes().rfind(b"\n") + 1])
    process = started(out, stdin=(tmp_path / "all").open("rb"))
    assert process.wait(HANG_S) == 0
    assert out.read_bytes() == whole and len(changes(out)) == 6


def pour(given_lines, file) -> None:
    try:
        for line in given_lines:
            file.write(line)
            file.flush()
            time.sleep(0.002)
        file.close()
    except OSError:
        pass


@pytest.mark.slow
def test_a_signal_ends_it_once_the_batch_is_committed(tmp_path):
    process = started(tmp_path / "out.jsonl", stdin=subprocess.PIPE)
    process.stdin.write(b"".join(lines(*outage(probes=1))))
    process.stdin.flush()
    wait_for(lambda: len(events_of(tmp_path / "out.jsonl")) >= 60)
    assert end(process) == {"scored": 60}
    assert [event["event"] for event in events(tmp_path / "out.jsonl")].count("closed") == 1


def watched_live(live, out, server, enough):
    """Watches until `enough()`, then sends the signal that ends a watch."""

    def stop():
        wait_for(enough)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    return run(Feed(live=live), out)


def test_what_the_stream_loses_the_results_api_brings(tmp_path):
    out, results = tmp_path / "out.jsonl", recent(100)
    with serving_atlas(results, faults=0.5) as server:
        live = Live((1001,), every_s=1, api=server.url, stream_api=server.url)
        total = watched_live(live, out, server, lambda: len(events_of(out)) >= len(results))
        (stream, *_) = server.queries("/stream/")
        asked = server.queries("/measurements/1001/results/")
    assert total["scored"] == len(results) and len(set(identities(out))) == len(results)
    assert stream == {"streamType": "result", "client": "ping-llm", "msm": "1001"}
    assert int(asked[0]["stop"]) - int(asked[0]["start"]) == 900 and asked[0]["format"] == "txt"


def test_a_watch_that_was_down_queries_from_where_it_ended_less_the_overlap_an_hour_at_a_time(tmp_path):
    out, now_s = tmp_path / "out.jsonl", int(time.time())
    then_s = now_s - 3 * 3600
    with State(tmp_path / "out.jsonl.state", out, Bounds()) as state:
        from ping_llm.watch.state import Changes

        state.commit(Changes(marks={"polled 1001": then_s}))
    results = [result(0, timestamp=time_s) for time_s in range(then_s - 890, now_s - 10, 400)]
    with serving_atlas(results, faults=0) as server:
        live = Live((1001,), (1, 2), every_s=1, stream=False, api=server.url)
        watched_live(live, out, server, lambda: len(events_of(out)) >= len(results))
        asked = server.queries("/measurements/1001/results/")
        assert not server.queries("/stream/")
    begins, ends = ([int(query[name]) for query in asked] for name in ("start", "stop"))
    assert begins[:3] == [then_s - 900 + 3600 * i for i in range(3)] and asked[0]["probe_ids"] == "1,2"
    assert ends[:3] == [then_s + 3600 * i for i in (1, 2, 3)]
    with State(tmp_path / "out.jsonl.state", out, Bounds()) as state:
        assert state.number("polled 1001") >= now_s


def test_a_query_that_breaks_off_is_no_query():
    """The mark comes after all results of a query that came to its end, and no line is cut."""
    results, inbox, items = recent(50), feeds.Inbox(), []
    with serving_atlas(results, faults=0) as server:
        server.plan = ["cut", "503", "cut"]
        live = Live((1001,), every_s=1, stream=False, api=server.url)
        client = follow(live, inbox, lambda name: 0, QUICK)
        while not items or not isinstance(items[-1], dict):
            items.append(inbox._queue.get(timeout=HANG_S))
        client.stop()
        inbox.stop()
        assert len(server.queries("/measurements/1001/results/")) >= 4
    *came, mark = items
    assert [json.loads(line)["msm_id"] for line in came] == [1001] * len(came)
    assert 50 < len(came) < 100 and {json.dumps(json.loads(line)) for line in came} == set(map(json.dumps, results))
    assert list(mark) == ["polled 1001"]


def test_a_server_that_refuses_ends_the_watch_with_its_reason(tmp_path, monkeypatch):
    with serving_atlas([], faults=0) as server:
        monkeypatch.setattr(
            "atlas_server._Handler._stream",
            lambda handler: handler._begin(200) or handler._chunk(b'["atlas_error", "no such measurement"]\n'),
        )
        live = Live((1001,), every_s=1, api=server.url, stream_api=server.url)
        with pytest.raises(ValueError, match="the stream refuses: no such measurement"):
            run(Feed(live=live), tmp_path / "out.jsonl")
        monkeypatch.setattr("atlas_server._Handler._results", lambda handler, query: handler._end(404))
        live = Live((1001,), every_s=1, stream=False, api=server.url)
        with pytest.raises(ValueError, match="404"):
            run(Feed(live=live), tmp_path / "out.jsonl")


def test_metrics_say_what_was_done(tmp_path, capsys, monkeypatch):
    def looked(*given):
        port = int(capsys.readouterr().err.partition("127.0.0.1:")[2].partition("/")[0])
        yield from replay(*given)
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        for line in ('lines_total{what="scored"} 180.0', 'events_total{event="opened"} 3.0', 'kept{what="pairs"} 3.0'):
            assert f"ping_llm_watch_{line}" in text
        seen.append(text)

    replay, seen = feeds.replay, []
    monkeypatch.setattr("ping_llm.watch.run.replay", looked)
    dump = tmp_path / "dump.ndjson"
    dump.write_bytes(b"".join(lines(*outage())))
    run(Feed(replay=(dump,)), tmp_path / "out.jsonl", every=False, metrics_port=0)
    assert seen


@pytest.mark.parametrize(("speed", "seconds"), [(100.0, 240 * 59 / 100), (0.0, 0.0)])
def test_a_dump_is_played_so_many_times_as_fast_as_it_was_measured(tmp_path, speed, seconds):
    dump = tmp_path / "dump.ndjson"
    dump.write_bytes(b"".join(lines(*random.Random(0).sample(outage(1), 60))))
    now = [0.0]
    batches = list(
        feeds.replay([dump, dump], speed, lambda: False, 7, lambda: now[0], lambda s: now.__setitem__(0, now[0] + s))
    )
    assert now[0] == pytest.approx(seconds, abs=1e-6)
    times = [json.loads(line)["timestamp"] for some, _ in batches for line in some]
    assert times == sorted(times) and len(times) == 120 and {len(some) for some, _ in batches} == {7, 1}


def test_a_replay_waits_for_no_line_without_a_time_and_no_wrong_clock(tmp_path):
    """The clock of one probe is 70 years ahead, and the second dump is of a week later."""
    one, two = tmp_path / "one.ndjson", tmp_path / "two.ndjson"
    wrong = result(5) | {"timestamp": 4_000_000_000}
    one.write_bytes(b"garbage\n{}\n" + b"".join(lines(*[result(n) for n in range(60)], wrong)))
    week = 7 * 86_400
    two.write_bytes(b"".join(lines(*[result(n) | {"timestamp": START_S + week + 240 * n} for n in range(60)])))
    now = [0.0]
    sleep = lambda s: now.__setitem__(0, now[0] + max(s, 1e-6))  # noqa: E731
    for dump in (one, two):
        assert sum(len(some) for some, _ in feeds.replay([dump], 100.0, lambda: False, 9, lambda: now[0], sleep)) >= 60
    both = list(feeds.replay([one, two], 100.0, lambda: False, 9, lambda: now[0], sleep))
    assert sum(len(some) for some, _ in both) == 123
    played_s = 4 * 240 * 60 / 100
    assert 0.8 * played_s < now[0] < 1.01 * played_s


def test_replayed_again_nothing_is_scored_twice(tmp_path):
    dump = tmp_path / "dump.ndjson"
    dump.write_bytes(b"".join(lines(*outage())))
    assert run(Feed(replay=(dump,)), tmp_path / "out.jsonl") == {"scored": 180}
    before = (tmp_path / "out.jsonl").read_bytes()
    assert run(Feed(replay=(dump,)), tmp_path / "out.jsonl") == {"repeated": 180}
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_a_damaged_dump_is_an_error_after_what_can_be_read(tmp_path):
    import bz2

    dump = tmp_path / "dump.bz2"
    dump.write_bytes(bz2.compress(b"".join(lines(*outage())))[:-20])
    with pytest.raises(ValueError, match=r"dump\.bz2"):
        run(Feed(replay=(dump,)), tmp_path / "out.jsonl")


def test_a_line_that_is_too_long_is_one_line_that_cannot_be_read(tmp_path):
    pipe = tmp_path / "pipe"
    long = b'{"x": "' + b"y" * (3 << 20) + b'"}\n'
    pipe.write_bytes(b"".join(lines(result(0))) + long + b"".join(lines(result(1))))
    assert run(Feed(pipe), tmp_path / "out.jsonl") == {"scored": 2, "malformed_json": 1}


def test_an_inbox_makes_those_wait_who_bring_too_much(monkeypatch):
    monkeypatch.setattr(feeds, "_WAITING", 10)
    inbox, brought = feeds.Inbox(), Counter()

    def bring():
        for number in range(25):
            inbox.put(b"%d\n" % number)
            brought["lines"] += 1

    feeds.start("test", inbox, bring, ends=True)
    wait_for(lambda: inbox.waiting == 10)
    time.sleep(0.05)
    assert brought["lines"] <= 11
    found = [line for some, _ in inbox.batches(lambda: False) for line in some]
    assert found == [b"%d\n" % number for number in range(25)]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "name what to watch, in one way"),
        (["--model", "nowhere"], "name what to watch, in one way"),
        (["--model", "nowhere", "--msm", "1", "--input", "-"], "name what to watch, in one way"),
        (["--model", "nowhere", "--replay", "no-dump"], "no file no-dump"),
        (["--model", "nowhere", "--msm", "0"], "must be above 0"),
        (["--model", "nowhere", "--probe", "1", "--no-stream"], "needs --msm"),
        (["--model", "nowhere", "--probe", *map(str, range(1, 40))], "39 streams, more than 32"),
        (["--model", "nowhere", "--input", "-", "--at", "2"], "at=2"),
        (["--model", "nowhere", "--input", "-", "--out", "no-folder/out.jsonl"], "there is no folder"),
        (["--model", "nowhere", "--input", "-", "--metrics-port", "99999"], "--metrics-port 99999"),
        (["--model", "nowhere", "--input", "-", "--out", "/dev/null"], "--out /dev/null is no regular file"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, monkeypatch, capsys, argv, says):
    monkeypatch.chdir(tmp_path)
    try:
        code = cli.main(["watch", *argv])
    except SystemExit as stopped:  # by the parser of options
        code = stopped.code
    assert code in (1, 2)
    err = capsys.readouterr().err
    assert says in err and "Traceback" not in err
