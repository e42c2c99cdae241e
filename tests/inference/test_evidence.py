"""What a memory adds to a query: the pair, the source, and other sources of the destination; earlier, bounded, not twice."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from random_model import random_model

from ping_llm.data.measurement import format_address, pack_address
from ping_llm.data.rows import ProbeRow
from ping_llm.inference import evidence as module
from ping_llm.inference.context import Context
from ping_llm.inference.evidence import OTHERS, OWN, PAIR, SHARED, evidence, recalled
from ping_llm.inference.memory import Memory
from ping_llm.inference.prompt import build_prompt
from ping_llm.inference.query import Query

ME, DST, AT = "192.0.2.1", "198.51.100.7", 1_700_000_000
ALL = 1 << 20  # tokens: everything fits


def memory_of(folder: Path, lines: list[tuple[str, str, int, float]], other_sources: bool = False) -> Memory:
    """Of (source, destination, seconds before AT, ms)."""
    texts = sorted({text for line in lines for text in line[:2]})
    packed = np.array([list(pack_address(text)) for text in texts], dtype=np.uint8)
    lines = sorted(lines, key=lambda line: -line[2])
    src, dst = (np.array([texts.index(line[end]) for line in lines]) for end in (0, 1))
    time_s, rtt_ms = AT - np.array([line[2] for line in lines]), np.array([line[3] for line in lines], dtype=np.float32)
    zeros = np.zeros(len(lines), dtype=np.int64)
    row = ProbeRow.from_codes(1, time_s, zeros, src, dst, rtt_ms, zeros.astype(np.uint8), packed, packed)
    folder.mkdir(exist_ok=True)
    return replace(Memory.open(write_rows(folder, {"train": [row]}, shards=1)), other_sources=other_sources)


def query(context=None, at: int | None = AT, src: str = ME, dst: str | None = DST, **flags) -> Query:
    return Query.parse(src, dst, at, Context.parse(context, **flags))


def seen(context: Context) -> list[tuple[str, str, int, float]]:
    """The measurements of a context, as `memory_of` takes them."""
    ends = [[format_address(packed.tobytes()) for packed in end] for end in (context.src, context.dst)]
    return list(zip(*ends, (AT - context.time_s).tolist(), context.rtt_ms.tolist(), strict=True))


def ping(seconds: int, rtt: float, src: str = ME, dst: str = DST) -> dict:
    return {"src_addr": src, "dst_addr": dst, "rtt": rtt, "event_time": AT - seconds}


PAIR_LINES = [(ME, DST, 100 - i, 10.0 + i) for i in range(8)]
OWN_LINES = [(ME, f"203.0.113.{i}", 300 - 10 * i - j, 20.0 + i + j) for i in range(14) for j in range(2)]


def test_the_evidence_is_the_latest_of_the_pair_or_else_of_the_source_to_other_destinations(tmp_path):
    memory = memory_of(tmp_path, PAIR_LINES + OWN_LINES + [("192.0.2.9", DST, 5, 1.0)])
    assert seen(evidence(memory, query(), ALL)) == PAIR_LINES[-PAIR:]
    latest = [(ME, f"203.0.113.{i}", 299 - 10 * i, 21.0 + i) for i in range(14)] + PAIR_LINES[-1:]
    for unknown in ("198.51.100.8", "198.51.0.0/16", None):
        assert seen(evidence(memory, query(dst=unknown), ALL)) == latest[-OWN:]
    assert not len(evidence(memory, query(src="192.0.2.7"), ALL))
    for src in (None, "192.0.2.0/24"):
        with pytest.raises(ValueError, match="of one source; give its whole address"):
            evidence(memory, Query.parse(src, DST, AT), ALL)


def test_evidence_is_from_before_the_query(tmp_path):
    memory = memory_of(tmp_path, PAIR_LINES + OWN_LINES, other_sources=True)
    assert seen(evidence(memory, query(at=AT - 98), ALL))[-2:] == PAIR_LINES[:2]
    assert seen(evidence(memory, query(at=AT - 300), ALL)) == []
    assert seen(evidence(memory, query(at=None), ALL))[-1] == PAIR_LINES[-1]


NEAR, FAR, ALIEN = "203.0.112.1", "192.0.2.200", "100.64.0.1"
"""Sources: one with RTTs like mine, one of my /24 with others, and one that pings nothing that I ping."""


def other_lines() -> list[tuple[str, str, int, float]]:
    mine = [(ME, f"203.0.113.{i}", 200 - i, 20.0 + i) for i in range(6)]
    near = [(NEAR, f"203.0.113.{i}", 400 - i, 21.0 + i) for i in range(3)] + [
        (NEAR, DST, 50, 31.0),
        (NEAR, DST, 60, 99.0),
    ]
    far = [(FAR, f"203.0.113.{i}", 500 - i, 90.0) for i in (2, 5)] + [(FAR, DST, 40, 95.0)]
    return mine + near + far + [(ALIEN, DST, 30, 7.0), (ALIEN, "203.0.115.1", 20, 7.0)]


def test_of_other_sources_it_holds_the_destinations_latest_and_what_compares_them_with_the_source(tmp_path):
    found = seen(evidence(memory_of(tmp_path, other_lines(), True), query(), ALL))
    assert [line for line in found if line[1] == DST] == [
        (NEAR, DST, 50, 31.0),
        (FAR, DST, 40, 95.0),
        (ALIEN, DST, 30, 7.0),
    ]
    shared = [line for line in found if line[1] != DST and line[0] != ME]
    assert shared == [
        *[(FAR, f"203.0.113.{i}", 500 - i, 90.0) for i in (2, 5)],
        *[(NEAR, f"203.0.113.{i}", 400 - i, 21.0 + i) for i in range(3)],
    ]
    beside_pair = seen(evidence(memory_of(tmp_path / "pair", [*other_lines(), (ME, DST, 9, 33.0)], True), query(), ALL))
    for lines in (found, beside_pair):
        own = {line[1] for line in lines if line[0] == ME} - {DST}
        assert len(own) == OWN and {f"203.0.113.{i}" for i in (0, 1, 2, 5)} < own  # which the others ping
    assert not [line for line in seen(evidence(memory_of(tmp_path, other_lines()), query(), ALL)) if line[0] != ME]


def test_later_pings_of_other_sources_are_neither_evidence_nor_compare_them(tmp_path):
    found = seen(evidence(memory_of(tmp_path / "a", other_lines(), True), query(), ALL))
    mine = [(ME, f"203.0.113.{i}", 0, 90.0) for i in range(6)]
    later = [(source, f"203.0.113.{i}", -i, 20.0 + i) for source in (NEAR, FAR) for i in range(6)]
    later += [(source, DST, 0, 7.0) for source in (NEAR, FAR, "203.0.112.9")]
    memory = memory_of(tmp_path / "b", other_lines() + mine + later, True)
    assert seen(evidence(memory, query(), ALL)) == found


def test_the_nearest_sources_are_those_of_like_rtts_and_then_those_of_like_addresses(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "OTHERS", 1)
    lines = other_lines()
    memory = memory_of(tmp_path / "a", lines, True)
    first = [line for line in seen(evidence(memory, query(), ALL)) if line[1] == DST]
    assert first == [(NEAR, DST, 50, 31.0)]
    strangers = [line for line in lines if line[1] == DST]
    memory = memory_of(tmp_path / "b", [*strangers, (ME, "203.0.113.9", 9, 1.0)], True)
    assert [line for line in seen(evidence(memory, query(), ALL)) if line[1] == DST] == [(FAR, DST, 40, 95.0)]
    # A source of which nothing is known counts as 1 apart, and 0.1 more for 20 bits fewer that are mine. FAR is so by
    # (log 90/22 + log 90/25 + 3) / 5 = 1.14 or, of 40 ms, by (log 40/22 + log 40/25 + 3) / 5 = 0.81.
    for number, (rtt, nearest) in enumerate(((90.0, (NEAR, DST, 50, -1.0)), (40.0, (FAR, DST, 40, 95.0)))):
        unanswered = [(*line[:3], -1.0) if line[0] == NEAR else line for line in lines if line[0] != ALIEN]
        unanswered = [(*line[:3], rtt) if line[3] == 90.0 else line for line in unanswered]
        memory = memory_of(tmp_path / f"c{number}", unanswered, True)
        assert [line for line in seen(evidence(memory, query(), ALL)) if line[1] == DST] == [nearest]


def test_of_many_other_sources_each_has_its_turn(tmp_path):
    sources = [f"203.0.112.{i}" for i in range(12)]
    lines = [(ME, f"203.0.113.{j}", 200 - j, 20.0) for j in range(OWN)]
    for i, source in enumerate(sources):
        pinged = [4] if i == 0 else range(4) if i < 3 else range(5)  # the first one pings only what fewest do
        lines += [(source, f"203.0.113.{j}", 300 + i, 20.0 * 1.1**i) for j in pinged] + [(source, DST, 50 - i, 30.0)]
    found = seen(evidence(memory_of(tmp_path, lines, True), query(), ALL))
    assert [line[0] for line in found if line[1] == DST] == sources[:OTHERS]
    shared = [line[0] for line in found if line[1] != DST and line[0] != ME]
    assert sorted(shared) == sorted(sources[:SHARED])


hosts = st.sampled_from([ME, NEAR, FAR, "2001:db8::1"])
lines_of = st.lists(
    st.tuples(
        hosts, st.sampled_from([DST, "203.0.113.1", "2001:db8::7"]), st.integers(-2, 9), st.sampled_from([-1.0, 9.0])
    ),
    min_size=1,
    max_size=30,
)


def counted(context: Context, timed: bool) -> Counter:
    """How often each measurement is in a context, by address, RTT and, if wanted, time."""
    times = context.time_s.tolist() if timed and context.time_s is not None else [0] * len(context)
    ends = (map(bytes, end) for end in (context.src, context.dst))
    return Counter(zip(*ends, context.rtt_ms.tolist(), times, strict=True))


@settings(deadline=None, max_examples=40)
@given(lines=lines_of, others=st.booleans(), seq_len=st.integers(20, 400), most=st.integers(0, 4), timed=st.booleans())
def test_recalled_contexts_are_earlier_bounded_and_hold_nothing_twice(
    tmp_path_factory, lines, others, seq_len, most, timed
):
    memory = memory_of(tmp_path_factory.getbasetemp() / "recalled", lines, others)
    rows = [ping(seconds, rtt, src, dst) for src, dst, seconds, rtt in lines if src == ME and seconds > 0][:most]
    rows.sort(key=lambda row: row["event_time"])
    asked = query([row if timed else row | {"event_time": None} for row in rows])
    (filled,) = recalled(memory, [asked], seq_len)
    assert replace(filled, context=asked.context).__dict__ == asked.__dict__
    given, context = counted(asked.context, timed), counted(filled.context, timed)
    assert {key: context[key] for key in given} == given
    if timed or not rows:
        held = counted(Context(*memory_columns(memory)), True)
        assert all(context[key] <= held[key] and key[3] < AT for key in context - given)
        assert not len(filled.context) or (np.diff(filled.context.time_s) >= 0).all()
    else:
        assert filled.context.time_s is None
    tokens, before = (len(build_prompt(one, ALL).context) for one in (filled, asked))
    assert tokens == before or before < tokens <= seq_len * module.SHARE
    assert others or filled.src.covers(filled.context.src).all()


def memory_columns(memory: Memory):
    ends = (memory.addresses[ids] for ids in (memory.src_id, memory.dst_id))
    return *ends, memory.rtt_ms.astype(np.float64), memory.time_s


def test_a_context_of_one_host_gets_none_of_other_sources_and_stays_one(tmp_path):
    memory = memory_of(tmp_path, other_lines() + PAIR_LINES, True)
    own = [ping(500, 3.0, "2001:db8::1")]
    (host,), (other,) = (recalled(memory, [query(own, **{flag: True})], 512) for flag in ("one_host", "any_source"))
    assert host.context.one_host and not host.context.any_source
    assert {line[0] for line in seen(host.context)} == {ME, "2001:db8::1"}
    assert other.context.any_source and NEAR in {line[0] for line in seen(other.context)}


def test_queries_are_recalled_together_as_alone(tmp_path):
    memory = memory_of(tmp_path, other_lines() + PAIR_LINES + OWN_LINES, True)
    queries = [
        query(),
        query(at=None),
        query(dst=None),
        query(src="192.0.2.0/24"),
        query([ping(9, 2.0)]),
        query(at=AT - 98),
    ]
    queries.append(Query.parse(None, DST))
    together = recalled(memory, queries, 256)
    for asked, found in zip(queries, together, strict=True):
        (alone,) = recalled(memory, [asked], 256)
        assert counted(alone.context, True) == counted(found.context, True)
    assert together[3] is queries[3] and together[6] is queries[6]
    assert recalled(memory, [], 256) == []


def test_a_model_answers_from_what_its_memory_holds(tmp_path):
    alone = random_model(16, 256, knows_bytes=True)
    memory = memory_of(tmp_path, PAIR_LINES + OWN_LINES)
    model = replace(alone, memory=memory)
    (filled,) = recalled(memory, [query()], 256)
    found = model.rtt(ME, DST, AT)
    assert found.context_measurements == len(filled.context) == PAIR
    assert found.mean == next(alone.distributions([filled]))[0].mean != alone.rtt(ME, DST, AT).mean
    assert model.rtt_many([query()])[0].mean == found.mean
    table = [{"src_addr": ME, "dst_addr": DST, "event_time": AT}]
    assert model.rtt_many(table)[0]["mean_ms"] == pytest.approx(found.mean, rel=1e-6)
    assert model.rtt(ME, DST, AT - 1000).context_measurements == 0
