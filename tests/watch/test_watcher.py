"""Each result is scored once, its context is what came before, and file and state agree whatever is interrupted."""

import json
import sqlite3

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from watching import START_S, changes, events, identities, lines, outage, result, watcher

from ping_llm.data.ingest.results import DROPPED_LINES
from ping_llm.watch.arrivals import parse
from ping_llm.watch.hysteresis import Rule
from ping_llm.watch.state import Bounds, State
from ping_llm.watch.watcher import OWN_COUNTERS


def in_batches(watcher, given_lines, size):
    """The counters of all of them."""
    taken = [watcher.take(given_lines[at : at + size]) for at in range(0, len(given_lines), size)]
    return sum((one.lines for one in taken[1:]), taken[0].lines)


def test_an_outage_opens_and_closes_once_for_each_source(tmp_path):
    in_batches(watcher(tmp_path), lines(*outage()), 10)
    found = [event for event in events(tmp_path / "out.jsonl") if event["src"] == "193.0.0.1"]
    assert [event["event"] for event in found] == ["opened", "closed"]
    opened, closed = found
    assert opened["since"] == closed["since"] == "2023-11-14T23:33:20Z"  # of the 20th
    assert opened["time"] == "2023-11-14T23:33:20Z" and closed["until"] == "2023-11-15T00:09:20Z"  # 20th and 29th
    assert opened["rtt_ms"] == [None] * 3 and opened["expected"] == {
        "p_fail": 0.02,
        "q0.05": 20,
        "q0.5": 20,
        "q0.95": 20,
    }
    # Of 100 packets one was lost before, and of the 60 of the pair none: 2 · P(3 of 3).
    rate = 30 * 1 / 100 / (60 + 30)
    assert opened["p_value"] == pytest.approx(2 * rate**3, rel=1) and opened["combined_p_value"] < 0.001
    assert (opened["dst"], opened["msm_id"], opened["prb_id"]) == ("193.0.14.129", 1001, 1)
    assert len(changes(tmp_path / "out.jsonl")) == 6


@pytest.mark.parametrize("size", [1, 7])
def test_what_is_written_does_not_depend_on_how_lines_come_in_batches(tmp_path, size):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    given_lines = lines(*outage(probes=2, results=36))
    in_batches(watcher(tmp_path / "a", every=True), given_lines, 50)
    in_batches(watcher(tmp_path / "b", every=True), given_lines, size)
    key = lambda event: (event["time"], event["src"], event["event"])  # noqa: E731
    a, b = (sorted(events(tmp_path / name / "out.jsonl"), key=key) for name in "ab")
    assert a == b and len(a) == 72


def test_every_line_ends_in_one_counter_whatever_its_firmware(tmp_path):
    old = {"fw": 4400, "dst_addr": None, "addr": "193.0.14.129", "mode": "ICMP4", "type": None}
    oldest = {
        "fw": "1",
        "dst_addr": None,
        "addr": "193.0.14.129",
        "type": None,
        "result": None,
        "rcvd": "3",
        "sent": "3",
    }
    given_lines = lines(result(0), result(1, **old), result(2, **oldest), result(0), b"", b"{", b"[1]")
    given_lines += lines(result(3, lts=-1), result(4, dst_addr="10.0.0.1"), result(5, type="traceroute"))
    given_lines += lines(result(6, result=[{"error": "connect failed"}]), result(7, prb_id=8, timestamp=1 << 31))
    given_lines += [*lines(result(8, rtt_ms=-1)), b'{"x": "' + b"y" * (1 << 20) + b'"}\n']
    taken = watcher(tmp_path, every=True).take(given_lines)
    assert taken.lines == {
        "scored": 4,
        "repeated": 1,
        "blank_line": 1,
        "malformed_json": 3,
        "unsynced_clock": 1,
        "private_destination": 1,
        "traceroute_off": 1,
        "local_error": 1,
        "in_future": 1,
    }
    assert sum(taken.lines.values()) == len(given_lines)
    assert set(taken.lines) <= set(DROPPED_LINES) | set(OWN_COUNTERS)
    assert [event["rtt_ms"] for event in taken.events] == [[20.0] * 3] * 2 + [[19.5, 19.875, 20.25], [None] * 3]


@settings(max_examples=8, deadline=None)
@given(st.permutations(range(24)), st.lists(st.integers(0, 23), max_size=20), st.integers(1, 9))
def test_repeated_and_in_any_order_every_result_is_scored_once(tmp_path_factory, order, again, size):
    folder = tmp_path_factory.mktemp("watch")
    results = outage(probes=2, results=12)
    shuffled = [results[i] for i in [*order, *again]]
    taken = in_batches(watcher(folder, every=True), lines(*shuffled), size)
    assert (taken["scored"], taken["repeated"]) == (24, len(again))
    assert len(set(identities(folder / "out.jsonl"))) == len(identities(folder / "out.jsonl")) == 24


def test_the_identity_is_of_measurement_probe_and_second(tmp_path):
    same = {"result": [{"rtt": 99.0}], "lts": 3, "from_": "193.0.0.1"}
    others = [{"msm_id": 1002}, {"prb_id": 2}, {"timestamp": START_S + 1}, {"dst_addr": "193.0.14.130"}]
    found, _ = parse(lines(result(0), result(0) | same, *(result(0) | other for other in others)), tmp_path / "lines")
    ids = [one.id for one in found]
    assert ids[0] == ids[1] and len(set(ids)) == 5


def test_the_context_is_of_earlier_seconds_and_leaves_anomalies_out(tmp_path):
    one = watcher(tmp_path)
    seen = {}
    p_values = one.scorer.p_values
    one.scorer.p_values = lambda asked: seen.update({a.result.time_s: a for a in asked}) or p_values(asked)
    in_batches(one, lines(*outage(probes=1)), 3)
    for time_s, asked in seen.items():
        rows = asked.context(256)
        assert (rows["time_s"] < time_s).all() and (np.diff(rows["time_s"]) > 0).all()
    after = seen[START_S + 240 * 45].of_pair
    assert len(after) == 24 and (after["rtt_ms"] == 20).all()
    assert (seen[START_S + 240 * 29].of_pair["rtt_ms"] == 20).all()  # and not in the midst of it


def test_of_other_destinations_what_fits_beside_the_pair_is_context(tmp_path):
    one = watcher(tmp_path, bounds=Bounds(rows=100))
    results = [result(n, dst_addr=f"193.0.14.{n % 20}") for n in range(60)]
    in_batches(one, lines(*results), 60)
    (of_source,) = one.state.sources([parse(lines(result(0)), tmp_path / "x")[0][0].src]).values()
    assert len(of_source) == 60
    asked = []
    one.scorer.p_values = lambda some: asked.extend(some) or [[0.5] * 3] * len(some)
    one.take(lines(result(60, dst_addr="193.0.14.0")))
    rows = asked[0].context(256)
    same = (rows["dst"] == np.frombuffer(asked[0].result.dst, "u1")).all(axis=1)
    assert same.sum() == 3 and len(rows) == 10  # of 19 tokens each, in 256 less 18 and 38
    assert rows["time_s"][~same].min() == START_S + 240 * 53  # the last seven others; the 40th is of the pair


def test_state_is_bounded_and_who_is_forgotten_has_no_open_anomaly(tmp_path):
    bounds = Bounds(sources=1, rows=3)  # and so 50 pairs
    one = watcher(tmp_path, bounds=bounds)
    in_batches(one, lines(*[result(n, 20.0 if n < 10 else -1) for n in range(14)]), 5)
    assert changes(tmp_path / "out.jsonl") == [("opened", "193.0.0.1", "2023-11-14T22:53:20Z")]
    in_batches(one, lines(*[result(20, probe=p) for p in range(2, 80)]), 10)
    assert one.state.size() == {"sources": 1, "pairs": 50, "open": 0}
    assert changes(tmp_path / "out.jsonl")[1:] == [("forgotten", "193.0.0.1", "2023-11-14T22:53:20Z")]
    in_batches(one, lines(*[result(20 + n, probe=2) for n in range(20)]), 10)
    assert all(len(rows) <= 3 for rows in one.state.sources(one.state.sources([]).keys()).values())


def test_results_that_come_too_late_to_be_known_are_left_out_and_counted(tmp_path):
    one = watcher(tmp_path, bounds=Bounds(late_hours=1))
    taken = one.take(lines(*[result(n) for n in range(100)]))  # over more than six hours, in one batch
    assert taken.lines == {"scored": 100}
    again = one.take(lines(*[result(n) for n in range(100)])).lines
    assert again == {"too_late": 84, "repeated": 16}  # an hour before the newest holds 15 and itself
    assert one.state._db.execute("SELECT count(*) FROM seen").fetchone() == (16,)


@pytest.mark.parametrize("written", [0, 1, 100, -1])
def test_what_was_committed_but_not_written_is_written_at_the_next_start(tmp_path, monkeypatch, written):
    expected = tmp_path / "expected"
    expected.mkdir()
    in_batches(watcher(expected, every=True), lines(*outage(1)), 10)
    whole = (expected / "out.jsonl").read_bytes()
    out, at = tmp_path / "out.jsonl", [0]

    def cut_off(state):
        _, text = state._db.execute("SELECT place, text FROM outbox").fetchone()
        if at[0] == 3:
            with out.open("ab") as file:
                file.write(text[:written])
            raise KeyboardInterrupt
        at[0] += 1
        deliver(state)

    deliver = State._deliver
    monkeypatch.setattr(State, "_deliver", cut_off)
    one = watcher(tmp_path, every=True)
    with pytest.raises(KeyboardInterrupt):
        in_batches(one, lines(*outage(1)), 10)
    one.state._db.close()
    monkeypatch.setattr(State, "_deliver", deliver)
    assert out.read_bytes() != whole[: len(out.read_bytes()) + 1]
    in_batches(watcher(tmp_path, every=True), lines(*outage(1)), 10)
    assert out.read_bytes() == whole


def test_a_batch_that_fails_never_happened(tmp_path, monkeypatch):
    one = watcher(tmp_path, every=True)
    one.take(lines(result(0)))
    monkeypatch.setattr(one.scorer, "p_values", lambda asked: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        one.take(lines(result(1)))
    monkeypatch.undo()
    write = State._write
    monkeypatch.setattr(State, "_write", lambda state, what: write(state, what) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        one.take(lines(result(1)), {"polled 1": 7})
    monkeypatch.undo()
    assert one.state.number("scored") == 1 and not one.state.number("polled 1")
    assert one.take(lines(result(0), result(1)), {"polled 1": 7}).lines == {"scored": 1, "repeated": 1}
    assert one.state.number("polled 1") == 7 and len(events(tmp_path / "out.jsonl")) == 2


def test_a_file_that_another_program_changed_is_refused_and_left_alone(tmp_path):
    one = watcher(tmp_path, every=True)
    in_batches(one, lines(*outage(1)), 10)
    one.state._db.close()
    out = tmp_path / "out.jsonl"
    for content in (out.read_bytes() + b"x", b"", out.read_bytes()[:100]):
        out.write_bytes(content)
        with pytest.raises(ValueError, match=r"another program changed it"):
            State(tmp_path / "out.jsonl.state", out, Bounds())
        assert out.read_bytes() == content


def test_a_second_watch_and_files_that_do_not_belong_together_are_refused(tmp_path):
    one = watcher(tmp_path, every=True)
    with pytest.raises(ValueError, match="another watch uses"):
        State(tmp_path / "out.jsonl.state", tmp_path / "out.jsonl", Bounds())
    one.take(lines(result(0)))
    with pytest.raises(ValueError, match="not the state that it belongs to"):
        State(tmp_path / "other.state", tmp_path / "out.jsonl", Bounds())
    (tmp_path / "text").write_text("no database, but a text that is as long as a page of one\n" * 30)
    with pytest.raises(ValueError, match="is damaged"):
        State(tmp_path / "text", tmp_path / "new.jsonl", Bounds())
    with sqlite3.connect(tmp_path / "later") as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(ValueError, match="another version"):
        State(tmp_path / "later", tmp_path / "new.jsonl", Bounds())


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE pair SET judged = '{'",
        "UPDATE pair SET judged = '[{}, {}]'",
        "UPDATE pair SET rows = x'00'",
        "UPDATE source SET rows = x'00'",
        "UPDATE reading SET text = '[1]'",
        "DROP TABLE number",
        "DROP TABLE source",
        None,  # bytes in its midst
    ],
)
def test_a_state_that_is_damaged_is_one_line(tmp_path, damage):
    one = watcher(tmp_path)
    in_batches(one, lines(*outage()), 10)
    one.state._db.close()
    path = tmp_path / "out.jsonl.state"
    if damage:
        with sqlite3.connect(path, isolation_level=None) as db:
            db.execute(damage)
        db.close()
    else:
        content = path.read_bytes()
        path.write_bytes(content[: 2 * 4096] + b"\xff" * (len(content) - 3 * 4096) + content[-4096:])
    with pytest.raises(ValueError, match=r"out\.jsonl\.state, the state of the watch, (is damaged|cannot be used)"):
        watcher(tmp_path).take(lines(*[result(n) for n in range(60, 70)]))


def test_a_state_that_finds_no_room_is_one_line_and_goes_on_once_there_is_some(tmp_path):
    one = watcher(tmp_path, every=True)
    (pages,) = one.state._db.execute("PRAGMA page_count").fetchone()
    one.state._db.execute(f"PRAGMA max_page_count = {pages + 1}")
    with pytest.raises(ValueError, match=r"disk is full\); free some space"):
        in_batches(one, lines(*outage()), 60)
    one.state._db.execute("PRAGMA max_page_count = 100000")
    in_batches(one, lines(*outage()), 60)
    found = identities(tmp_path / "out.jsonl")
    assert len(found) == len(set(found)) == 180
    assert one.state.number("scored") == 180


def test_a_result_of_very_many_packets_is_judged_by_the_first(tmp_path):
    """It would cost what so many results cost, and the binomials of 2,000 are no floats."""
    one = watcher(tmp_path, every=True)
    huge = result(20) | {"result": [{"rtt": 20.0}] * 63 + [{"x": "*"}] * 2000}
    assert in_batches(one, lines(*[result(n) for n in range(20)], huge, result(21)), 5) == {"scored": 22}
    assert events(tmp_path / "out.jsonl")[20]["rtt_ms"] == [20.0] * 63 + [None]


def test_a_change_that_lasts_is_accepted(tmp_path):
    results = [result(n, 20.0 if n < 10 else 50.0) for n in range(60)]
    in_batches(watcher(tmp_path, Rule(accept=12)), lines(*results), 9)
    assert [event["event"] for event in events(tmp_path / "out.jsonl")] == ["opened", "accepted"]
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])["rtt_ms"] == [50.0] * 3


@pytest.mark.parametrize("bounds", [{"sources": 0}, {"rows": 0}, {"late_hours": 0}])
def test_bounds_that_cannot_be_are_refused(bounds):
    with pytest.raises(ValueError, match=next(iter(bounds))):
        Bounds(**bounds)
