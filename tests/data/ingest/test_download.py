"""Bringing files from a real server that drops, truncates, stalls, refuses and changes what it serves."""

import hashlib
import re
import threading
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pings import ndjson, ping
from servers import QUICK, chunks, content, dumps, file, noise, status, stream, wait_for

from ping_llm.data.ingest.download import LONGEST_RETRY_AFTER_S, Clock, Manners, retry_after_s
from ping_llm.data.ingest.fetch import fetch


class VirtualTime:
    """A clock of its own for each thread; waits take no time, but move it on."""

    def __init__(self):
        self.now, self.slept, self.begin = {}, [], 0.0
        self.clock = Clock(self.read, self.wait)

    def read(self):
        return self.now.get(threading.get_ident(), self.begin)

    def wait(self, _, seconds):
        self.now[threading.get_ident()] = self.read() + seconds
        self.slept.append(seconds)
        return False


def test_a_broken_transfer_goes_on_where_it_broke_off(server, tmp_path):
    body = noise(0)
    for number, validator in enumerate(
        [{"etag": '"v1"'}, {"etag": 'W/"v1"', "Last_Modified": "Sun, 01 Nov 2026 02:00:00 GMT"}]
    ):
        cuts = [file(body, upto=upto, **validator) for upto in (100_000, 200_000, 250_000, 260_000)]
        wanted = dumps(server, [*cuts, file(body, **validator)])
        server.requests.clear()
        record = fetch(wanted, tmp_path / str(number), QUICK)  # 4 failures with 3 tries: each brought bytes
        assert content(tmp_path / str(number)) == {wanted[0].name: body}
        assert record["files"][0]["sha256"] == hashlib.sha256(body).hexdigest()
        requested = [(headers.get("Range"), headers.get("If-Range")) for _, headers in server.requests]
        strong = validator.get("Last_Modified", '"v1"')
        assert requested == [(None, None)] + [(f"bytes={n}-", strong) for n in (100_000, 200_000, 250_000, 260_000)]


@pytest.mark.parametrize(
    "second",
    [
        pytest.param(file(noise(2), '"v2"'), id="the server sends all of the new file"),
        pytest.param(
            status(206, b"x" * 10, Content_Range="bytes 100000-100009/100010", ETag='"v1"'), id="another size"
        ),
        pytest.param(
            status(206, b"x" * 10, Content_Range="bytes 100000-100009/100010", ETag='"v2"'), id="another ETag"
        ),
        pytest.param(status(416), id="the new file is shorter"),
    ],
)
def test_a_file_that_changed_between_tries_is_fetched_from_its_beginning(server, tmp_path, second):
    new = noise(2)
    wanted = dumps(server, [file(noise(0), upto=100_000), second, file(new, '"v2"')])
    record = fetch(wanted, tmp_path, QUICK)
    assert content(tmp_path) == {wanted[0].name: new}
    assert record["files"][0]["etag"] == '"v2"'
    assert "Range" in server.requests[1][1]


def test_a_range_that_nobody_requested_is_not_taken_for_a_file(server, tmp_path):
    body = noise(0)
    rest = status(206, body[1000:], Content_Range=f"bytes 1000-{len(body) - 1}/{len(body)}", ETag='"v1"')
    wanted = dumps(server, [rest, file(body)])
    fetch(wanted, tmp_path, QUICK)
    assert content(tmp_path) == {wanted[0].name: body}


def test_a_file_that_cannot_be_distinguished_from_another_is_never_resumed(server, tmp_path):
    body = noise(0)
    wanted = dumps(server, [file(noise(1), None, upto=100_000), file(body, None)])
    fetch(wanted, tmp_path, QUICK)
    assert content(tmp_path) == {wanted[0].name: body}
    assert "Range" not in server.requests[1][1]


def test_429_is_waited_out_by_all_threads_as_long_as_the_server_demands(server, tmp_path):
    bodies, times = [noise(seed, 1000) for seed in range(3)], VirtualTime()

    def after(condition, reply):
        return lambda handler: (wait_for(condition), reply(handler))

    # The second thread is between its two files while the first one waits.
    refused = [status(429, Retry_After="1"), after(lambda: len(server.requests) == 4, file(bodies[0]))]
    between = after(lambda: 1 in map(round, times.slept), file(bodies[1]))
    wanted = dumps(server, refused, [between], [file(bodies[2])])
    fetch(wanted, tmp_path, Manners(requests_per_s=20, parallel=2, backoff_s=0.01), clock=times.clock)
    assert len(content(tmp_path)) == 3 and len(server.requests) == 4
    assert len(times.now) == 2 and min(times.now.values()) >= 1


def test_503_is_retried_after_growing_waits_that_the_seed_decides(server, tmp_path, capsys):
    def waits(folder, seed):
        wanted, times = dumps(server, [*[status(503)] * 3, file(noise(0))]), VirtualTime()
        fetch(wanted, tmp_path / folder, Manners(requests_per_s=1000, backoff_s=0.2, seed=seed), clock=times.clock)
        slept = [seconds for seconds in times.slept if seconds > 0.01]
        announced = re.findall(r"503 Service Unavailable; again in ([\d.]+) s", capsys.readouterr().err)
        assert announced == [f"{seconds:.1f}" for seconds in slept]
        return slept

    first, same, other = waits("a", 1), waits("b", 1), waits("c", 2)
    assert first == same != other and len(first) == 3
    for number, wait_s in enumerate(first):
        assert 0.1 * 2**number <= wait_s <= 0.2 * 2**number


def test_a_wait_of_hours_is_left_to_the_user(server, tmp_path):
    wanted = dumps(server, [status(503, Retry_After="7200")])
    with pytest.raises(ValueError, match=r"asks to wait 7,200 s \(503 Service Unavailable\); run the command again"):
        fetch(wanted, tmp_path, QUICK)
    assert len(server.requests) == 1


def test_a_server_that_always_cuts_off_is_given_up_and_the_next_command_continues(server, tmp_path):
    body = noise(0)
    wanted = dumps(server, [file(body, upto=100_000)])
    with pytest.raises(
        ValueError, match=r"received 0 bytes, expected \d+\)\), 3 times in a row; run the command again"
    ):
        fetch(wanted, tmp_path, QUICK)
    assert content(tmp_path) == {} and not (tmp_path / "fetch.json").exists()
    dumps(server, [file(body)])
    fetch(wanted, tmp_path, QUICK)
    assert content(tmp_path) == {wanted[0].name: body}
    assert server.requests[-1][1]["Range"] == "bytes=100000-"


PAGE = b"<!DOCTYPE html><html><body>Log in to the network</body></html>"


@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/octet-stream"])
@pytest.mark.parametrize("source", ["dump", "results"])
def test_a_web_page_instead_of_data_is_never_kept(server, tmp_path, kind, source):
    page = status(200, PAGE, Content_Type=kind)
    body = noise(0) if source == "dump" else ndjson(ping())
    wanted = (
        dumps(server, [page, file(body)]) if source == "dump" else chunks(server, [page, stream(body)], packed=False)
    )
    fetch(wanted, tmp_path / "then", QUICK)
    assert content(tmp_path / "then") == {wanted[0].name: body}
    server.replies = {f"/{wanted[0].request}": [page]}
    with pytest.raises(ValueError, match="3 times in a row"):
        fetch(wanted, tmp_path / "never", QUICK)
    assert content(tmp_path / "never") == {}


def test_a_web_page_amid_a_transfer_does_not_cost_what_was_there(server, tmp_path):
    body = noise(0)
    wanted = dumps(server, [file(body, upto=100_000), status(200, PAGE, Content_Type="text/html"), file(body)])
    fetch(wanted, tmp_path, QUICK)
    assert content(tmp_path) == {wanted[0].name: body}
    assert server.requests[-1][1]["Range"] == "bytes=100000-"


@pytest.mark.parametrize("format", ["txt", "json"])
def test_an_answer_that_only_ends_like_results_is_not_kept(server, tmp_path, format):
    body = {"txt": ndjson(ping()), "json": b'[{"prb_id": 7}]'}[format]
    wanted = chunks(server, [stream(b"oops: " + body), stream(body)], format=format, packed=False)
    fetch(wanted, tmp_path, QUICK)
    assert content(tmp_path) == {wanted[0].name: body}


def test_an_answer_of_unknown_length_is_refused(server, tmp_path):
    def endless(handler):
        handler.begin(200)
        handler.wfile.write(ndjson(ping()))

    with pytest.raises(ValueError, match="does not say how long its answer is"):
        fetch(chunks(server, [endless]), tmp_path, QUICK)


def test_a_stalled_connection_is_broken_off_and_resumed(server, tmp_path):
    body = noise(0)

    def stall_once(handler):
        """At 100,000 bytes, however often the connection was broken off before; a busy machine may stall, too."""
        resumed = handler.headers["Range"] == "bytes=100000-"
        (file(body) if resumed else file(body, upto=100_000, then=server.release.wait))(handler)

    wanted = dumps(server, [stall_once])
    fetch(wanted, tmp_path, Manners(requests_per_s=1000, backoff_s=0.01, timeout_s=0.5, tries=1000))
    assert content(tmp_path) == {wanted[0].name: body}
    assert len(server.requests) >= 2 and server.requests[-1][1]["Range"] == "bytes=100000-"


def test_requests_keep_to_the_rate_and_to_the_number_at_once(server, tmp_path):
    def together(count):
        """A reply that comes once so many requests are being served."""
        return lambda handler: (wait_for(lambda: server.most_at_once >= count), stream(ndjson(ping()))(handler))

    fetch(chunks(server, *[[together(3)]] * 12), tmp_path / "a", Manners(requests_per_s=1000, parallel=3))
    assert server.most_at_once == 3
    times = VirtualTime()
    fetch(
        chunks(server, *[[together(6)]] * 6), tmp_path / "b", Manners(requests_per_s=10, parallel=6), clock=times.clock
    )
    assert sorted(times.now.values()) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])


@given(st.text() | st.from_regex(r"\A[A-Z][a-z]{2}, \d{1,2} (Jan|Dec) \d{2,5} \d\d:\d\d:\d\d [A-Z+\d]{1,5}\Z"))
def test_any_retry_after_is_a_wait_in_seconds(text):
    assert 0 <= retry_after_s(text) < float("inf")


def test_retry_after_is_read_as_seconds_or_as_a_date():
    assert retry_after_s("120") == 120 and retry_after_s(None) == 0 and retry_after_s("-5") == 0
    begun = datetime.now(UTC)
    soon = begun.replace(microsecond=0) + timedelta(seconds=LONGEST_RETRY_AFTER_S)
    left_s = retry_after_s(soon.strftime("%a, %d %b %Y %H:%M:%S GMT"))
    assert (soon - datetime.now(UTC)).total_seconds() <= left_s <= (soon - begun).total_seconds()
    assert retry_after_s("Sun, 01 Nov 2020 00:00:00 GMT") == 0
