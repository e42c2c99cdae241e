"""Searches for addresses are exact: they equal the enumeration of every address, token by token and without a cache."""

import dataclasses
import ipaddress
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ping_llm.config import ModelConfig
from ping_llm.data import tokenization as tk
from ping_llm.data.measurement import pack_address
from ping_llm.inference.calibration import Calibration
from ping_llm.inference.context import Context
from ping_llm.inference.distribution import RTTDistribution
from ping_llm.inference.engine import read_beginnings
from ping_llm.inference.model import PingModel
from ping_llm.inference.prompt import DST_ROLES, SRC_ROLES, address_tokens, opening
from ping_llm.inference.query import Endpoint, Query
from ping_llm.inference.search import AddressSearch
from ping_llm.model.gpt import GPT

SRC = "192.0.2.1"
SHARES = Calibration({"ipv4": {"none": 0.1, "/8": 0.2, "/16": 0.15, "/24": 0.25, "all": 0.3}})
CONTEXT = [
    {"src_addr": SRC, "dst_addr": "198.51.100.9", "rtt": 12.5, "event_time": "2026-01-01T00:00:00Z"},
    {"src_addr": SRC, "dst_addr": "198.51.100.7", "rtt": 80.0, "event_time": "2026-01-02T00:00:00Z"},
]


@pytest.fixture(scope="module")
def model() -> PingModel:
    torch.manual_seed(3)
    gpt = GPT(ModelConfig(n_layer=2, n_embd=32, n_head=2, seq_len=160)).eval()
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    torch.nn.init.normal_(gpt.head.weight, std=1.0)  # sharp enough that few prefixes of all addresses matter
    return PingModel(gpt, torch.device("cpu"), SHARES, least_mass=0.0)


def tokens_of(values: str, role: int, bits: int | None = None) -> list[int]:
    """The role and the bytes of an address, the first `bits` of them."""
    raw = ipaddress.ip_address(values).packed
    return [role, *(tk.BYTE_0 + b for b in raw[: len(raw) if bits is None else bits // 8])]


def chain(model, before: list[int], after: list[int]) -> float:
    """log P of the tokens `after`, each among the others of its kind, in one pass without cache."""
    with torch.no_grad():
        logits = model.gpt(torch.tensor([before + after]))[0].double()
    total = 0.0
    for place, token in enumerate(after, start=len(before)):
        kinds = [DST_ROLES, SRC_ROLES, (tk.RTT_START, tk.FAILED), range(tk.BYTE_0, tk.VOCAB_SIZE)]
        kind = next(list(kind) for kind in kinds if token in kind)
        total += float(logits[place - 1, kind].log_softmax(0)[kind.index(token)])
    return total


def enumerate_within(model, before: list[int], values: list[range]) -> dict[tuple[int, ...], float]:
    """Probability of each choice of the last bytes, all but the last in a sequence of their own."""
    heads = list(itertools.product(*values[:-1]))
    rows = torch.tensor([before + [tk.BYTE_0 + b for b in head] for head in heads])
    with torch.no_grad():
        log_p = model.gpt(rows)[:, len(before) - 1 :, tk.BYTE_0 :].double().log_softmax(-1).numpy()
    distribution = {
        (*head, last): sum(log_p[i, place, byte] for place, byte in enumerate((*head, last)))
        for i, head in enumerate(heads)
        for last in values[-1]
    }
    total = np.logaddexp.reduce(list(distribution.values()))
    return {key: float(np.exp(value - total)) for key, value in distribution.items()}


def rtt_tokens(rtt_ms: float) -> list[int]:
    code = int(tk.encode_rtt(np.array(rtt_ms)))
    return [tk.RTT_START, tk.BYTE_0 + code // 256, tk.BYTE_0 + code % 256]


BEFORE = [tk.MEASUREMENT_START, *tokens_of(SRC, tk.SRC_IPV4)]


@pytest.mark.parametrize(
    ("prefix", "values"),
    [
        ("198.51.100.0/24", [range(256)]),
        ("198.51.0.0/16", [range(256), range(256)]),
        ("198.51.160.0/19", [range(160, 192), range(256)]),
        ("2001:db8::/120", [range(256)]),
        ("2001:db8::8000/113", [range(128, 256), range(256)]),
    ],
)
@pytest.mark.parametrize("rtt", [None, 23.5])
def test_search_equals_the_enumeration_of_every_address(model, prefix, values, rtt):
    address, bits = prefix.split("/")
    role = tk.DST_IPV6 if ":" in prefix else tk.DST_IPV4
    before = BEFORE + (rtt_tokens(rtt) if rtt else []) + tokens_of(address, role, int(bits) // 8 * 8)
    distribution = enumerate_within(model, before, values)
    assert sum(distribution.values()) == pytest.approx(1)
    lead = ipaddress.ip_address(address).packed[: -len(values)]
    true = {str(ipaddress.ip_address(lead + bytes(key))): p for key, p in distribution.items()}
    found = model.destinations(SRC, rtt=rtt, prefix=prefix, top=20, src_known="all")
    got = dict(zip(*(found.table.column(i).to_pylist() for i in range(2)), strict=True))
    best = sorted(true.values(), reverse=True)
    np.testing.assert_allclose(list(got.values()), best[:20], rtol=1e-4)
    np.testing.assert_allclose([true[address] for address in got], list(got.values()), rtol=1e-4)
    assert found.proven and best[20] <= found.bound * (1 + 1e-4) and found.bound <= best[19] * (1 + 1e-4)
    assert found.covered == pytest.approx(sum(best[:20]), rel=1e-4)
    assert model.complete(prefix, src=SRC, rtt=rtt, top=20, src_known="all").table == found.table


def test_probabilities_of_all_addresses_of_a_prefix_sum_to_one_and_none_comes_twice(model):
    found = model.destinations(SRC, prefix="198.51.100.0/23", top=1000, at="2026-01-01")
    assert found.table.num_rows == len(set(found.table["dst_addr"].to_pylist())) == 512
    assert found.covered == pytest.approx(1) and found.bound == 0 and found.proven


@pytest.mark.parametrize("batch", [1, 5, 64])
@pytest.mark.parametrize(("prefix", "count"), [(None, 10), ("198.51.0.0/16", 200)])
def test_order_and_probabilities_do_not_depend_on_how_many_are_expanded_at_once(model, batch, prefix, count):
    inside = Endpoint.parse(prefix) if prefix else None
    begun = [opening(Query.parse(src, None, 0), 160) for src in (SRC, "203.0.113.0/24")]
    lines = [np.append(line, address_tokens(DST_ROLES, inside)) if inside else line for line in begun]
    read = read_beginnings(model, lines, [len(line) for line in begun])
    searches = [AddressSearch(model, read, np.log([0.7, 0.3]), DST_ROLES, inside, batch=n) for n in (16, batch)]
    expected, found = ([next(search) for _ in range(count)] for search in searches)
    assert [a.end for a in found] == [a.end for a in expected]
    np.testing.assert_allclose([a.log_p for a in found], [a.log_p for a in expected], rtol=1e-4)
    probabilities = [a.probability for a in found]
    assert probabilities == sorted(probabilities, reverse=True) and searches[1].bound <= probabilities[-1]
    assert searches[1].expansions > 20


@pytest.mark.parametrize("rtt", [None, 30.0])
def test_family_and_source_lengths_are_mixed_by_what_each_makes_of_the_rtt(model, rtt):
    found = model.destinations(SRC, rtt=rtt, top=4)
    result = rtt_tokens(rtt) if rtt else []
    shares = list(SHARES.src_weights["ipv4"].values())
    evidence = []
    for bits, share in zip((0, 8, 16, 24, 32), shares, strict=True):
        start = [tk.MEASUREMENT_START, *tokens_of(SRC, tk.SRC_IPV4, bits)]
        evidence.append((start + result, share * np.exp(chain(model, start, result))))
    total = sum(weight for _, weight in evidence)
    assert found.proven and found.table.num_rows == 4
    for row in found.table.to_pylist():
        after = tokens_of(row["dst_addr"], DST_ROLES[":" in row["dst_addr"]])
        p = sum(weight * np.exp(chain(model, start, after)) for start, weight in evidence) / total
        assert row["probability"] == pytest.approx(p, rel=1e-4)
    alone = model.destinations(SRC, families=("ipv4",), top=1, src_known="all").table.to_pylist()[0]
    after = tokens_of(alone["dst_addr"], tk.DST_IPV4)
    p = np.exp(chain(model, [*BEFORE, after[0]], after[1:]))  # no chance of the other family is left
    assert alone["probability"] == pytest.approx(p, rel=1e-4)


def test_context_and_time_stand_before_what_is_searched(model):
    found = model.destinations(SRC, rtt=30.0, at=1767400000, context=CONTEXT, src_known="all", top=1)
    address, p = (found.table.column(i)[0].as_py() for i in range(2))
    context = Context.parse(CONTEXT)
    tokens, _ = tk.encode(
        tk.Fields(
            src=np.concatenate([context.src, np.frombuffer(pack_address(SRC), np.uint8)[None]]),
            dst=np.concatenate([context.dst, np.frombuffer(pack_address(address), np.uint8)[None]]),
            src_bytes=np.full(3, 4),
            dst_bytes=np.array([4, 4, 16 if ":" in address else 4]),
            rtt_ms=np.append(context.rtt_ms, 30.0),
            time_s=np.append(context.time_s, 1767400000),
            timed=np.ones(3, dtype=bool),
            order=np.array([[0, 1, 3, 2], [0, 1, 3, 2], [0, 3, 2, 1]]),
            window=np.zeros(3, dtype=np.int64),
        )
    )
    last = 17 if ":" in address else 5  # the role and the bytes of the destination
    assert p == pytest.approx(np.exp(chain(model, tokens[:-last].tolist(), tokens[-last:].tolist())), rel=1e-4)


@pytest.mark.parametrize(("top", "src_known"), [(3, "auto"), (16, "auto"), (16, "all")])
def test_destinations_within_an_rtt_equal_bayes_over_every_address(model, top, src_known):
    prefix, rtt_max = "198.51.100.48/28", 3.0
    found = model.destinations(SRC, rtt_max=rtt_max, prefix=prefix, top=top, src_known=src_known)
    known_bits = {"none": 0, "/8": 8, "/16": 16, "/24": 24, "all": 32} if src_known == "auto" else {"all": 32}
    joint, total_p = dict.fromkeys(range(48, 64), 0.0), 0.0
    for name, bits in known_bits.items():
        before = [tk.MEASUREMENT_START, *tokens_of(SRC, tk.SRC_IPV4, bits)]
        share = SHARES.src_weights["ipv4"][name] if len(known_bits) > 1 else 1.0
        for last in joint:
            p = share * np.exp(chain(model, before, tokens_of(f"198.51.100.{last}", tk.DST_IPV4)))
            distribution = model.rtt(f"{SRC}/{bits}", f"198.51.100.{last}", src_known="all")
            joint[last] += p * distribution.cdf(rtt_max) * (1 - distribution.p_fail)
            total_p += p
    best = sorted(joint, key=joint.get, reverse=True)[:top]
    assert found.proven and found.table["dst_addr"].to_pylist() == [f"198.51.100.{last}" for last in best]
    np.testing.assert_allclose(
        found.table["probability"], [joint[i] / total_p / found.p_within for i in best], rtol=1e-3
    )
    if top == 16:
        assert found.covered == pytest.approx(1) and found.p_within == pytest.approx(
            sum(joint.values()) / total_p, rel=1e-3
        )
    distribution = model.rtt(SRC, f"198.51.100.{best[0]}", src_known="all")
    if src_known == "all":
        assert found.table["p_within"][0].as_py() == pytest.approx(
            distribution.cdf(rtt_max) * (1 - distribution.p_fail), rel=1e-3
        )
        assert found.table["median_ms"][0].as_py() == pytest.approx(distribution.median, rel=1e-3)


def mixture_of(distributions, log_p):
    return RTTDistribution.concatenate(distributions).mixture(np.exp(log_p - np.logaddexp.reduce(log_p)))


@pytest.mark.parametrize("at", [None, 1767400000])
def test_prefix_that_ends_within_a_byte_is_the_mixture_of_its_values(model, at):
    time = [tk.TIMESTAMP_ABS, *(tk.BYTE_0 + b for b in at.to_bytes(8, "big"))] if at else []
    values = range(100, 104)
    got = model.rtt(SRC, "198.51.101.0/22", at, src_known="all")
    log_p = [chain(model, BEFORE + time, tokens_of(f"198.51.{b}.0", tk.DST_IPV4, 24)) for b in values]
    distribution = mixture_of(
        [model.rtt(SRC, f"198.51.{b}.0/24", at, src_known="all") for b in values], np.array(log_p)
    )
    np.testing.assert_allclose(got.code_probability, distribution.code_probability, rtol=1e-3, atol=1e-12)
    assert got.p_fail == pytest.approx(distribution.p_fail, rel=1e-4)

    # Of a source: P(byte) times what the byte makes of the destination that is given.
    got = model.rtt("192.0.101.0/22", "198.51.100.7", at, src_known="all")
    start, dst, log_p, distributions = [tk.MEASUREMENT_START], tokens_of("198.51.100.7", tk.DST_IPV4), [], []
    for b in values:
        src = tokens_of(f"192.0.{b}.0", tk.SRC_IPV4, 24)
        log_p.append(chain(model, start + time, src) + chain(model, start + src + time, dst))
        distributions.append(model.rtt(f"192.0.{b}.0/24", "198.51.100.7", at, src_known="all"))
    distribution = mixture_of(distributions, np.array(log_p))
    np.testing.assert_allclose(got.code_probability, distribution.code_probability, rtol=1e-3, atol=1e-12)


def test_partial_bytes_of_both_ends_and_all_lengths_of_the_source_are_mixed_together(model):
    got = model.rtt("192.0.2.0/23", "198.51.101.0/23")
    distributions, log_p = [], []
    shares = {0: 0.1, 8: 0.2, 16: 0.15}
    for bits, share in shares.items():
        start = [tk.MEASUREMENT_START, *tokens_of(SRC, tk.SRC_IPV4, bits)]
        own = [chain(model, start, tokens_of(f"198.51.{d}.0", tk.DST_IPV4, 24)) for d in (100, 101)]
        log_p += list(np.log(share) + own - np.logaddexp.reduce(own))
        distributions += [model.rtt(f"{SRC}/{bits}", f"198.51.{d}.0/24", src_known="all") for d in (100, 101)]
    both = []
    for s, d in itertools.product((2, 3), (100, 101)):
        src = tokens_of(f"192.0.{s}.0", tk.SRC_IPV4, 24)
        dst = tokens_of(f"198.51.{d}.0", tk.DST_IPV4, 24)
        both.append(chain(model, [tk.MEASUREMENT_START], src) + chain(model, [tk.MEASUREMENT_START, *src], dst))
        distributions.append(model.rtt(f"192.0.{s}.0/24", f"198.51.{d}.0/24", src_known="all"))
    log_p += list(np.log(0.55) + both - np.logaddexp.reduce(both))
    distribution = mixture_of(distributions, np.array(log_p))
    np.testing.assert_allclose(got.code_probability, distribution.code_probability, rtol=1e-3, atol=1e-12)
    assert got.src_weights == pytest.approx({"none": 0.1, "/8": 0.2, "/16": 0.15, "/23": 0.55})
    # In a batch of queries the others are what they are alone.
    queries = [Query.parse(SRC, "198.51.100.7"), Query.parse("192.0.2.0/23", "198.51.101.0/23")]
    one, two = model.rtt_many(queries)
    assert two.median == pytest.approx(got.median) and one.median == pytest.approx(
        model.rtt(SRC, "198.51.100.7").median
    )


def test_source_is_completed_after_its_destination_and_with_nothing_else_given(model):
    for options, before in (({"dst": "198.51.100.7"}, tokens_of("198.51.100.7", tk.DST_IPV4)), ({}, [])):
        found = model.complete("192.0.2.0/25", role="src", rtt=5.0, top=3, **options)
        start = [tk.MEASUREMENT_START, *before, *rtt_tokens(5.0), *tokens_of("192.0.2.0", tk.SRC_IPV4, 24)]
        distribution = enumerate_within(model, start, [range(128)])
        best = sorted(distribution, key=distribution.get, reverse=True)[:3]
        assert found.table["src_addr"].to_pylist() == [f"192.0.2.{last}" for (last,) in best]
        np.testing.assert_allclose(found.table["probability"], [distribution[key] for key in best], rtol=1e-4)


@pytest.mark.parametrize("expansions", [1, 20])
def test_a_search_cut_short_says_so_and_still_gives_true_probabilities(model, expansions):
    options = {"prefix": "198.0.0.0/8", "top": 50, "src_known": "all"}
    found = model.destinations(SRC, **options, expansions=expansions)
    addresses, p = (found.table.column(i).to_pylist() for i in range(2))
    assert not found.proven and len(set(addresses)) == 50
    for address, probability in zip(addresses, p, strict=True):
        log_p = chain(model, [*BEFORE, *tokens_of("198.0.0.0", tk.DST_IPV4, 8)], tokens_of(address, tk.DST_IPV4)[2:])
        assert probability == pytest.approx(np.exp(log_p), rel=1e-4)
    true = model.destinations(SRC, **options).table.to_pylist()
    missed = [row["probability"] for row in true if row["dst_addr"] not in addresses]
    assert max(missed, default=0) <= found.bound * (1 + 1e-4)
    within = model.destinations(SRC, prefix="198.51.0.0/16", rtt_max=3.0, top=3, expansions=1, src_known="all")
    assert within.table.num_rows == 3 and not within.proven and within.bound > 0


def test_no_ipv6_address_that_is_found_is_an_ipv4_one(model):
    found = model.complete("::fffe:0:0/95", top=3)
    assert all(address.startswith("::fffe:") for address in found.table["dst_addr"].to_pylist())
    assert found.table.num_rows == 3


def test_more_context_than_fits_leaves_room_for_result_and_address(model):
    context = [CONTEXT[0] | {"event_time": 1000 * i} for i in range(40)]
    query = Query.parse(SRC, None, 10**6, Context.parse(context))
    assert 130 < len(opening(query, 160, 5.0)) + 17 <= 160


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtt": 5.0, "rtt_max": 9.0}, "not both"),
        ({"rtt": -5.0}, "rtt=-5.0 must be a finite number of ms"),
        ({"rtt": float("nan")}, "rtt=nan must be a finite number"),
        ({"rtt_max": float("inf")}, "rtt_max=inf must be a finite number"),
        ({"rtt_max": 0.0}, "knows no RTT below"),
        ({"top": 0}, "top=0 must be at least 1"),
        ({"prefix": "2001:db8::/32", "families": ("ipv4",)}, "no address of ipv4 lies in 2001:db8::/32"),
        ({"families": ()}, "must be one or both of ipv4, ipv6"),
        ({"families": ("ipv5",)}, "must be one or both of ipv4, ipv6"),
        ({"prefix": "198.51.100.0/40"}, "from 0 to 32"),
        ({"src_known": "some"}, "src_known='some'"),
    ],
)
def test_bad_queries_for_destinations_are_one_clear_error(model, options, message):
    with pytest.raises(ValueError, match=r".") as error:
        model.destinations(SRC, **options)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (lambda m: m.destinations(None), "give the source"),
        (lambda m: m.complete("192.0.2.1"), "is a whole address; give a prefix like 192.0.2.1/16"),
        (lambda m: m.complete("192.0.2.0/24", role="to"), "role='to' must be dst or src"),
        (lambda m: m.complete("192.0.2.0/24", dst="192.0.2.1"), "is the dst that is completed"),
        (lambda m: m.complete("192.0.2.0/24", context=CONTEXT), "a context is of one source"),
    ],
)
def test_bad_queries_for_completions_are_one_clear_error(model, query, message):
    with pytest.raises(ValueError, match=r".") as error:
        query(model)
    assert message in str(error.value) and "\n" not in str(error.value)


@given(st.ip_addresses(v=4) | st.ip_addresses(v=6).filter(lambda a: a.ipv4_mapped is None), st.data())
def test_endpoint_covers_what_its_network_does(address, data):
    bits = data.draw(st.integers(0, address.max_prefixlen))
    end = Endpoint.parse(f"{address}/{bits}")
    network = ipaddress.ip_network(f"{address}/{bits}", strict=False)
    assert end.known_bits == bits
    assert str(end) == (str(network) if bits < address.max_prefixlen else str(network.network_address))
    others = [address, *(type(address)(int(address) ^ (1 << i)) for i in range(address.max_prefixlen))]
    packed = np.stack([np.frombuffer(pack_address(str(other)), np.uint8) for other in others])
    assert end.covers(packed).tolist() == [other in network for other in others]
    assert dataclasses.replace(end).cut(end.known_bytes + 1) == end and not end.cut(end.known_bytes).extra_bits
