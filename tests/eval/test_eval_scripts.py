"""The thin scripts over the library, the earlier protocol, and reading the output of ping."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from paths import SCRIPTS

from ping_llm.config import Config, DataConfig, ModelConfig, TrainConfig
from ping_llm.data.ingest.prepare import prepare
from ping_llm.data.synthetic.synthesize import synthesize
from ping_llm.eval.columns import Measurements
from ping_llm.eval.destinations import prefix_ranks_of
from ping_llm.eval.earlier import CONTEXT, EarlierProtocol
from ping_llm.eval.live import parse_ping, ping_all


def run_script(name: str, *argv: object) -> None:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(word) for word in argv])


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with rows of a synthetic Internet, and a run that hardly learned anything."""
    from ping_llm.training.trainer import train

    folder = tmp_path_factory.mktemp("world")
    synthesize(folder / "dump", probes=30, targets=15, days=0.1, seed=1, workers=1)
    prepare([str(folder / "dump")], folder / "rows", workers=1)
    steps = TrainConfig(
        run_dir=folder / "run",
        total_steps=4,
        batch_size=4,
        eval_windows=4,
        eval_queries=0,
        device="cpu",
        sample_every=0,
    )
    model = ModelConfig(n_layer=1, n_embd=32, n_head=2, seq_len=96)
    train(Config(model=model, data=DataConfig(rows=folder / "rows", workers=0), train=steps))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "check"),
    [
        ("eval_conditional_rtt", ("--queries", 4), lambda lines: len(lines) == 4 and lines[0]["questions"] == 4),
        (
            *("eval_partial_ip", ("--queries", 6, "--completions", 1, "--top", 3)),
            lambda lines: {line["bits"] for line in lines if line["family"] == "ipv4"} == {8, 16, 24, 32},
        ),
        ("eval_ordering", ("--queries", 5), lambda lines: len(lines) == 7 and lines[-1]["mean_log_prob_nats"] >= 0),
        (
            *("eval_next_token", ("--windows", 3)),
            lambda lines: {"MEASUREMENT_START", "RTT_START byte 2"} <= {line["token"] for line in lines},
        ),
        (
            *("eval_destinations", ("--queries", 2)),
            lambda lines: [line["method"] for line in lines] == ["model", "destination_bayes"],
        ),
    ],
)
def test_scripts_print_a_table_and_write_it(world, tmp_path, capsys, name, options, check):
    run_script(name, world / "run", "--data", world / "rows", "--json", tmp_path / "out.json", *options)
    lines = json.loads((tmp_path / "out.json").read_text())
    assert check(lines)
    printed = capsys.readouterr().out
    assert all(str(key) in printed for key in lines[0])


@pytest.mark.skipif(shutil.which("ping") is None, reason="the system has no ping")
def test_loopback_answers():
    measured = ping_all("192.0.2.1", ["127.0.0.1"], 2)
    assert [one["dst_addr"] for one in measured] == ["127.0.0.1"] * 2
    assert all(0 <= one["rtt"] < 1000 for one in measured)


IPUTILS = """PING dns.google (8.8.8.8) 56(84) bytes of data.
64 bytes from 8.8.8.8: icmp_seq=1 ttl=117 time=12.3 ms
64 bytes from 8.8.8.8: icmp_seq=3 ttl=117 time=11 ms
64 bytes from 8.8.8.8: icmp_seq=3 ttl=117 time=15.1 ms (DUP!)

--- dns.google ping statistics ---
4 packets transmitted, 2 received, +1 duplicates, 50% packet loss, time 3004ms
rtt min/avg/max/mdev = 11.000/11.650/12.300/0.650 ms
"""


@pytest.mark.parametrize(
    ("text", "address", "rtts"),
    [
        (IPUTILS, "8.8.8.8", [12.3, 11.0, -1.0, -1.0]),
        (
            "PING 2001:db8::1(2001:db8::1) 56 data bytes\n64 bytes from 2001:db8::1: icmp_seq=1 ttl=57 time=0.045 ms\n\n"
            "--- 2001:db8::1 ping statistics ---\n1 packets transmitted, 1 received, 0% packet loss, time 0ms\n",
            *("2001:db8::1", [0.045]),
        ),
        (
            "PING 192.0.2.9 (192.0.2.9): 56 data bytes\n64 bytes from 192.0.2.9: seq=0 ttl=64 time=0.071 ms\n\n"
            "--- 192.0.2.9 ping statistics ---\n2 packets transmitted, 1 packets received, 50% packet loss\n",
            *("192.0.2.9", [0.071, -1.0]),
        ),
        (
            "PING host(host (2001:db8::2)) 56 data bytes\n\n--- host ping statistics ---\n"
            "3 packets transmitted, 0 received, 100% packet loss, time 2031ms\n",
            *("2001:db8::2", [-1.0] * 3),
        ),
    ],
)
def test_the_output_of_ping_is_read(text, address, rtts):
    assert parse_ping(text) == (address, rtts)


def test_what_is_no_output_of_ping_is_refused():
    with pytest.raises(ValueError, match="cannot be read: it said 'ping: unknown host'"):
        parse_ping("ping: unknown host\n")
    with pytest.raises(ValueError, match="cannot be pinged"):
        ping_all("192.0.2.1", ["-f"], 1)


def test_prefixes_are_ranked_by_the_mass_of_their_addresses():
    found = [("192.0.2.1", 0.3), ("198.51.100.1", 0.25), ("198.51.100.2", 0.25), ("203.0.113.5", 0.2)]
    rows = [{"dst_addr": address, "probability": mass} for address, mass in found]
    assert prefix_ranks_of(rows, "192.0.2.1") == {8: 1, 16: 1, 24: 1, 32: 0}
    assert prefix_ranks_of(rows, "203.0.113.99") == {8: 2, 16: 2, 24: 2, 32: 100}
    assert prefix_ranks_of([], "203.0.113.99") == dict.fromkeys((8, 16, 24, 32), 100)


def make_mesh(nodes: int = 20, repeats: int = 40) -> Measurements:
    """Every node pings every other at random times; node i is 1 + |i − j| ms from node j; addresses 20 … 24 only answer."""
    rng = np.random.default_rng(0)
    src, dst = (axis.ravel() for axis in np.indices((nodes, nodes + 5)))
    src, dst = np.tile(src[src != dst], repeats), np.tile(dst[src != dst], repeats)
    addresses = np.zeros((nodes + 5, 16), dtype=np.uint8)
    addresses[:, 10:12], addresses[:, 15] = 255, np.arange(nodes + 5)
    rtt_ms = (1 + np.abs(src - dst)).astype(np.float32)
    rtt_ms[rng.random(len(src)) < 0.1] = -1
    ids = (src.astype(np.int32), dst.astype(np.int32), src.astype(np.int64), rng.integers(0, 10_000, len(src)))
    return Measurements(*ids, rtt_ms, np.zeros(len(src), np.int8), addresses, ("all",))


def test_earlier_protocol_learns_near_pairs_first_and_asks_far_pairs_later():
    protocol = EarlierProtocol.of(make_mesh(), neighbours=6)
    table = protocol.measurements
    assert protocol.nodes == 20 and table.dst_id.max() == 19  # what only answers is out
    train, test = table.take(protocol.train), table.take(protocol.test)
    assert train.time_s.max() <= protocol.middle_s < test.time_s.min()
    near = {*zip(train.src_id.tolist(), train.dst_id.tolist(), strict=True)}
    asked = {*zip(test.src_id.tolist(), test.dst_id.tolist(), strict=True)}
    assert len(near) == 20 * 6 and not asked & near and not {(d, s) for s, d in asked} & near
    assert (test.rtt_ms >= 0).all()
    distance = np.array([abs(s - d) for s, d in near])
    assert distance.mean() < 0.75 * np.array([abs(s - d) for s, d in asked]).mean()  # drawn by 1 / RTT
    queries = protocol.queries(100)
    context = queries.context
    assert context.shape == (100, CONTEXT) and (context >= 0).all() and np.isin(context, protocol.train).all()
    assert (table.src_id[context] == table.src_id[queries.rows][:, None]).all()
    assert (np.diff(table.time_s[context], axis=1) <= 0).all()
    assert (EarlierProtocol.of(make_mesh(), neighbours=6).test == protocol.test).all()


def test_earlier_protocol_needs_nodes_that_ping_each_other():
    with pytest.raises(ValueError, match="0 addresses are both a source and a destination"):
        EarlierProtocol.of(make_mesh(5, 2).take(make_mesh(5, 2).dst_id >= 5))
