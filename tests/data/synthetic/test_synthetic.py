"""A synthetic dump looks like Atlas, follows its distribution exactly, and depends on nothing but its arguments."""

from __future__ import annotations

import bz2
import dataclasses
import ipaddress
import itertools
import json
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from ping_llm.data.measurement import is_public, pack_addresses
from ping_llm.data.synthetic import synthesize as synthetic
from ping_llm.data.synthetic.synthesize import synthesize
from ping_llm.data.synthetic.truth import Truth
from ping_llm.data.synthetic.world import build_world

ARGUMENTS = {"probes": 30, "targets": 24, "days": 1.0, "seed": 5, "interval_s": 1800}
START_S = 1_767_225_600  # 2026-01-01T00:00:00Z
EVENING_S = START_S + 20 * 3600.0


@pytest.fixture(scope="session")
def dump(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dump")
    return folder, synthesize(folder, workers=1, **ARGUMENTS)


@pytest.fixture(scope="session")
def truth(dump):
    return Truth.load(dump[0])


@pytest.fixture(scope="session")
def lines(dump):
    """The lines of each file."""
    return [bz2.decompress(path.read_bytes()).decode().splitlines() for path in sorted(dump[0].glob("ping-*.bz2"))]


@pytest.fixture(scope="session")
def results(lines):
    return [json.loads(line) for line in dict.fromkeys(line for file in lines for line in file)]


@pytest.fixture(scope="session")
def packets(results):
    """Columns src, dst, time_s, rtt_ms (−1 lost) of every packet to a target, read back from the JSON."""
    columns = {"src": [], "dst": [], "time_s": [], "rtt_ms": []}
    for result in results:
        private_or_absent = not result.get("src_addr") or ipaddress.ip_address(result["src_addr"]).is_private
        entries = [entry for entry in result["result"] if "dup" not in entry]
        if result["sent"] == 0:
            continue
        for entry in entries:
            columns["src"].append(result["from"] if private_or_absent else result["src_addr"])
            columns["dst"].append(result["dst_addr"])
            columns["time_s"].append(result["timestamp"])
            columns["rtt_ms"].append(entry.get("rtt", -1.0))
    return columns


def pit(truth: Truth, packets: dict, delay_s: float = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the replies lie in their distribution (uniform if it is theirs), what was lost, and how likely that was."""
    time_s, rtt_ms = np.array(packets["time_s"]), np.array(packets["rtt_ms"])
    p_fail, floor_ms, scale_ms, shape = truth.paths(packets["src"], packets["dst"]).at(time_s + delay_s)
    excess = np.maximum(rtt_ms - floor_ms, 1e-12) / scale_ms
    return (1 / (1 + excess**-shape))[rtt_ms >= 0], rtt_ms < 0, p_fail


def test_every_packet_of_the_dump_follows_the_distribution_of_its_pair_and_time(truth, packets):
    u, lost, p_fail = pit(truth, packets)
    assert len(u) > 50_000
    assert stats.kstest(u, "uniform").pvalue > 0.01
    assert abs(lost.sum() - p_fail.sum()) < 4 * np.sqrt((p_fail * (1 - p_fail)).sum())


def test_loss_follows_the_truth_at_every_level(truth, packets):
    _, lost, p_fail = pit(truth, packets)
    for group in np.array_split(np.argsort(p_fail), 10):
        expected = p_fail[group]
        assert abs(lost[group].sum() - expected.sum()) < 4 * np.sqrt((expected * (1 - expected)).sum())


def test_the_distribution_of_another_time_does_not_fit(truth, packets):
    u, _, _ = pit(truth, packets, delay_s=12 * 3600)
    assert stats.kstest(u, "uniform").pvalue < 1e-6


def test_packets_of_one_result_are_independent(truth, packets):
    time_s, rtt_ms = np.array(packets["time_s"]), np.array(packets["rtt_ms"])
    u = np.full(len(rtt_ms), np.nan)
    u[rtt_ms >= 0] = pit(truth, packets)[0]
    first, second = u[:-1], u[1:]
    same = (time_s[:-1] == time_s[1:]) & (np.array(packets["dst"])[:-1] == np.array(packets["dst"])[1:])
    both = same & ~np.isnan(first) & ~np.isnan(second)
    assert both.sum() > 30_000
    assert abs(np.corrcoef(first[both], second[both])[0, 1]) < 4 / np.sqrt(both.sum())


def test_rtt_distribution_is_the_one_that_paths_give_in_bulk(truth, packets):
    i = 1234
    true = truth.rtt_distribution(packets["src"][i], packets["dst"][i], packets["time_s"][i])
    bulk = truth.paths(packets["src"], packets["dst"]).at(np.array(packets["time_s"]))
    assert [float(column[i]) for column in bulk] == [float(getattr(true, f.name)[0]) for f in dataclasses.fields(true)]


def test_any_number_of_workers_writes_the_same_bytes(dump, tmp_path):
    synthesize(tmp_path, workers=2, **ARGUMENTS)
    names = sorted(path.name for path in dump[0].iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert all((tmp_path / name).read_bytes() == (dump[0] / name).read_bytes() for name in names)


def test_another_seed_gives_other_networks_and_another_dump(dump, tmp_path):
    synthesize(tmp_path, workers=1, **(ARGUMENTS | {"seed": 6, "days": 0.1}))
    hosts = [{p["ipv4"] for p in Truth.load(folder).world["probes"]} for folder in (dump[0], tmp_path)]
    assert not hosts[0] & hosts[1]


def test_counts_are_those_of_the_files(dump, lines, results):
    counts = dump[1]
    flat = [line for file in lines for line in file]
    assert counts["files"] == len(lines)
    assert counts["lines"] == len(flat)
    assert counts["results"] == len(set(flat)) == len(results)
    assert counts["repeated"] == len(flat) - len(results) > 0
    assert counts["packets"] == 3 * len(results)
    assert counts["json_bytes"] == sum(len(line) + 1 for line in flat)


def test_repeated_lines_come_in_the_next_file_and_late_ones_only_there(lines, truth):
    files = [set(file) for file in lines]
    assert all(len(file) == len(unique) for file, unique in zip(lines, files, strict=True))
    assert any(a & b for a, b in itertools.pairwise(files))
    span_s = 86_400 // len(files)
    late = [json.loads(line)["timestamp"] < START_S + span_s for line in files[1] - files[0]]
    assert any(late)


def test_every_scheduled_result_is_there_once(results, truth):
    keys = Counter((r["prb_id"], r["msm_id"], r["timestamp"]) for r in results)
    assert max(keys.values()) == 1
    rounds = Counter((r["prb_id"], r["msm_id"]) for r in results)
    assert set(rounds.values()) == {48}  # a day of 1800 s
    assert all(START_S <= r["timestamp"] < START_S + 86_400 for r in results)


def test_statistics_of_a_line_agree_with_its_packets(results):
    for result in results:
        entries = result["result"]
        replies = [e["rtt"] for e in entries if "rtt" in e and "dup" not in e]
        errors = sum("error" in e for e in entries)
        assert result["rcvd"] == len(replies)
        assert result["dup"] == sum("dup" in e for e in entries)
        assert result["sent"] == (0 if len(entries) == 1 else 3 - errors)
        expected = [min(replies), max(replies), sum(replies) / len(replies)] if replies else [-1, -1, -1]
        assert [result["min"], result["max"], result["avg"]] == pytest.approx(expected, abs=1e-9)
        assert ("ttl" in result) == bool(replies)
        assert all(round(rtt, 6) == rtt and rtt > 0 for rtt in replies)


def test_results_have_every_field_of_their_firmware(results):
    always = {
        "af",
        "avg",
        "dst_name",
        "dup",
        "from",
        "fw",
        "lts",
        "max",
        "min",
        "msm_id",
        "msm_name",
        "prb_id",
        "proto",
    }
    always |= {"rcvd", "result", "sent", "size", "step", "stored_timestamp", "timestamp", "type"}
    optional = {"dst_addr", "src_addr", "ttl", "group_id"}
    for result in results:
        modern = result["fw"] >= 5000
        assert always <= set(result) <= always | optional | ({"mver", "ttr"} if modern else set())
        assert modern == ("mver" in result)
        assert modern or list(result) == sorted(result)
        assert ("group_id" in result) == (result["msm_id"] > 3000)
        assert ipaddress.ip_address(result["from"]).version == result["af"]
        assert result["stored_timestamp"] > result["timestamp"]


def test_the_oddities_of_real_dumps_are_there(results):
    texts = [json.dumps(result["result"]) for result in results]
    for oddity in (
        "sendto failed",
        "connect failed",
        "dns resolution failed",
        "address not allowed",
        '"x"',
        '"dup"',
        '"ttl"',
    ):
        assert any(oddity in text for text in texts), oddity
    dns = [r for r in results if "dns" in json.dumps(r["result"])]
    assert not any({"dst_addr", "src_addr"} & set(r) for r in dns)
    not_allowed = [r for r in results if "not allowed" in json.dumps(r["result"])]
    assert all("dst_addr" in r and "src_addr" not in r for r in not_allowed)
    assert any(r["rcvd"] == 0 and r["dup"] for r in results)
    assert any(r["lts"] == -1 for r in results) and any(r["lts"] > 10_000 for r in results)
    private = [r for r in results if ipaddress.ip_address(r.get("src_addr", "192.0.2.1")).is_private]
    private = [r for r in private if r.get("src_addr")]
    assert private and all(r["af"] == 4 and not ipaddress.ip_address(r["from"]).is_private for r in private)


def test_hosts_are_public_and_sit_in_their_network_and_prefixes_are_disjoint():
    world = build_world(3, 600, 200)
    networks = {n["asn"]: [ipaddress.ip_network(p) for p in n["prefixes"]] for n in world["networks"]}
    hosts = [(p["asn"], p[f]) for p in world["probes"] for f in ("ipv4", "ipv6") if p[f]]
    anchors = {address for _, address in hosts}
    hosts += [(m["asn"], m["dst_addr"]) for m in world["measurements"] if m["dst_addr"] not in anchors]
    assert len({address for _, address in hosts}) == len(hosts)
    packed, valid = pack_addresses([address for _, address in hosts])
    assert valid.all() and is_public(packed).all()
    for asn, address in hosts:
        assert any(ipaddress.ip_address(address) in prefix for prefix in networks[asn])
    for version in (4, 6):
        prefixes = sorted(p for owned in networks.values() for p in owned if p.version == version)
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(prefixes))
    reserved = [ipaddress.ip_network(n) for n in ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "198.18.0.0/15")]
    assert not any(p.overlaps(r) for owned in networks.values() for p in owned if p.version == 4 for r in reserved)


@pytest.mark.parametrize("seed", range(3))
def test_the_global_median_is_a_poor_guess_and_the_pair_is_a_good_one(seed):
    world = build_world(seed, 60, 40)
    schedule = {"start_s": 0, "end_s": 3600, "interval_s": 3600, "measured_share": 0.7}
    dump = synthetic.Dump(world | {"schedule": schedule}, None)
    _, floor_ms, scale_ms, shape = dump.paths.at(EVENING_S)
    median = floor_ms + scale_ms
    guess = np.abs(np.median(median) - median) / median
    assert np.median(guess) > 0.6
    assert np.quantile(median, 0.01) < 6 and np.quantile(median, 0.99) > 200
    share = scale_ms / median
    assert np.quantile(share, 0.05) > 0.004 and np.quantile(share, 0.95) < 0.06
    rtt_ms = floor_ms + scale_ms * (lambda u: (u / (1 - u)) ** (1 / shape))(np.random.default_rng(0).random(len(share)))
    assert np.median(np.abs(median - rtt_ms) / rtt_ms) < 0.01
    ipv6 = np.array([m["ip_version"] == 6 for m in world["measurements"]])[dump.pairs[1]]
    assert 0.55 < 1 - ipv6.mean() < 0.75


def test_some_pairs_are_never_measured_though_both_endpoints_are(packets):
    measured = set(zip(packets["src"], packets["dst"], strict=True))
    four = [(s, d) for s in set(packets["src"]) for d in set(packets["dst"]) if ":" not in s + d]
    assert 0.2 < np.mean([pair not in measured for pair in four]) < 0.4
    assert set(packets["src"]) & set(packets["dst"])  # some probes are pinged as well


@pytest.mark.parametrize(
    "wrong",
    [
        {"probes": 1},
        {"targets": 0},
        {"days": 0},
        {"days": float("nan")},
        {"seed": -1},
        {"interval_s": 0},
        {"workers": -1},
        {"start": "yesterday"},
        {"start": "2026-01-01T00:30:00Z"},
        {"measured_share": 0},
    ],
)
def test_arguments_out_of_range_are_named(wrong, tmp_path):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        synthesize(tmp_path / "dump", **wrong)
    assert not (tmp_path / "dump").exists()


def test_a_folder_with_another_dump_is_refused_and_the_same_dump_is_not(tmp_path):
    arguments = {"probes": 4, "targets": 2, "days": 0.2, "workers": 1}
    counts = synthesize(tmp_path, **arguments)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="holds another dump"):
        synthesize(tmp_path, seed=1, **arguments)
    assert synthesize(tmp_path, **arguments) == counts
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_interrupted_file_never_stands_under_its_name(tmp_path, monkeypatch):
    class Broken:
        def __init__(self) -> None:
            self.left = 1

        def compress(self, text: bytes) -> bytes:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return text

    monkeypatch.setattr(synthetic.bz2, "BZ2Compressor", Broken)
    monkeypatch.setattr(synthetic, "_BLOCK_RESULTS", 1000)
    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path, workers=1, **ARGUMENTS)
    assert [path.name for path in tmp_path.iterdir()] == ["truth.json"]


def test_blocks_bound_memory_and_lose_nothing(monkeypatch, tmp_path):
    arguments = ARGUMENTS | {"days": 0.25, "workers": 1}
    whole = synthesize(tmp_path / "whole", **arguments)
    monkeypatch.setattr(synthetic, "_BLOCK_RESULTS", 3000)
    assert synthesize(tmp_path / "blocks", **arguments)["results"] == whole["results"]
    dump = synthetic.Dump(Truth.load(tmp_path / "blocks").world, tmp_path)
    assert dump.blocks > 2
    assert max(len(part) for part, _ in dump.contents(1)) < 5000


def test_progress_is_plain_lines_without_a_terminal(tmp_path, capsys):
    counts = synthesize(tmp_path, probes=4, targets=2, days=0.2, workers=1)
    assert f"synth: {counts['results']:,} of {counts['results']:,} results" in capsys.readouterr().err
