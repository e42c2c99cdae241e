"""The looks at a model: by `ping-llm eval --diagnose`, --live, and scripts; and reading the output of ping."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
from paths import SCRIPTS

from ping_llm import cli
from ping_llm.config import Config, DataConfig, ModelConfig, TrainConfig
from ping_llm.data.ingest.prepare import prepare
from ping_llm.data.synthetic.synthesize import synthesize
from ping_llm.eval.diagnose import prefix_ranks_of
from ping_llm.eval.live import parse_ping, ping_host


def run_script(name: str, *argv: object) -> None:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where a dataclass looks for its module
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
        ("order", ("--queries", 5), lambda lines: len(lines) == 7 and lines[-1]["mean_log_prob_nats"] >= 0),
        (
            *("tokens", ("--queries", 3)),
            lambda lines: {"MEASUREMENT_START", "RTT_START byte 2"} <= {line["token"] for line in lines},
        ),
        (
            *("destinations", ("--queries", 2)),
            lambda lines: [line["method"] for line in lines] == ["model", "destination_bayes"],
        ),
    ],
)
def test_a_look_prints_a_table_and_writes_it(world, tmp_path, capsys, name, options, check):
    argv = [world / "run", "--data", world / "rows", "--json", tmp_path / "out.json", *options]
    if name.startswith("eval_"):
        run_script(name, *argv)
    else:
        assert cli.main(["eval", "--diagnose", name, *map(str, argv)]) == 0
    lines = json.loads((tmp_path / "out.json").read_text())
    assert check(lines)
    printed = capsys.readouterr().out
    assert all(str(key) in printed for key in lines[0])


@pytest.mark.skipif(shutil.which("ping") is None, reason="the system has no ping")
def test_loopback_answers():
    measured = ping_host("192.0.2.1", "127.0.0.1", 2)
    assert [one["dst_addr"] for one in measured] == ["127.0.0.1"] * 2
    assert all(0 <= one["rtt"] < 1000 for one in measured)


def test_live_without_a_host_is_one_clear_error(tmp_path, capsys):
    assert cli.main(["eval", str(tmp_path / "run"), "--live"]) == 1
    assert "--live needs hosts to ping" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ping") is None, reason="the system has no ping")
def test_hosts_are_pinged_and_compared_with_what_the_model_expected(world, tmp_path, capsys):
    argv = ["eval", world / "run", "--live", "127.0.0.1", "127.0.0.1", "--count", "1", "--json", tmp_path / "out.json"]
    assert cli.main([str(word) for word in argv]) == 1
    assert "--src ADDRESS" in capsys.readouterr().err
    assert cli.main([str(word) for word in (*argv, "--src", "192.0.2.1")]) == 0
    lines = json.loads((tmp_path / "out.json").read_text())
    assert [line["told"] for line in lines] == [0, 1] and all(line["low_ms"] <= line["high_ms"] for line in lines)


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
        ping_host("192.0.2.1", "-f", 1)


def test_prefixes_are_ranked_by_the_mass_of_their_addresses():
    found = [("192.0.2.1", 0.3), ("198.51.100.1", 0.25), ("198.51.100.2", 0.25), ("203.0.113.5", 0.2)]
    rows = [{"dst_addr": address, "probability": mass} for address, mass in found]
    assert prefix_ranks_of(rows, "192.0.2.1") == {8: 1, 16: 1, 24: 1, 32: 0}
    assert prefix_ranks_of(rows, "203.0.113.99") == {8: 2, 16: 2, 24: 2, 32: 100}
    assert prefix_ranks_of([], "203.0.113.99") == dict.fromkeys((8, 16, 24, 32), 100)
