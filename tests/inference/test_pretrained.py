"""The model of the package: small, without hosts of volunteers, within the grammar, as good as its card says."""

import json
import subprocess
import sys

import numpy as np
import pytest
from paths import CONFIGS, SHARED_DATA

from ping_llm import PingModel
from ping_llm.cli import main
from ping_llm.config import load_config
from ping_llm.data.loader import fixed_windows
from ping_llm.eval.tokens import score_tokens
from ping_llm.inference.cli import OF_PRETRAINED
from ping_llm.inference.sources import PRETRAINED, load

HOSTS = "193.0.14.129", "198.41.0.4"  # of two root servers


@pytest.fixture(scope="module")
def model() -> PingModel:
    return PingModel.load()


def test_it_is_small_calibrated_and_reads_sources_as_networks():
    assert sum(file.stat().st_size for file in PRETRAINED.iterdir()) <= 6.5e6
    loaded = load(None)
    assert (loaded.config.model.src_bits_ipv4, loaded.config.model.src_bits_ipv6) == (24, 48)
    assert loaded.config.model == load_config(CONFIGS / "quality.toml").model
    calibration = loaded.calibration
    assert calibration.experts is not None and calibration.surprise.count > 10_000
    assert calibration.familiar is not None and calibration.familiar.src_bytes == (3, 6)


def test_hosts_of_one_network_have_one_answer(model):
    first, other = (model.rtt(src, HOSTS[1]) for src in (HOSTS[0], HOSTS[0].rpartition(".")[0] + ".7"))
    assert np.array_equal(first.code_probability, other.code_probability)
    assert not np.array_equal(first.code_probability, model.rtt("203.0.113.7", HOSTS[1]).code_probability)


def test_answers_for_strange_addresses_are_results(model):
    rng = np.random.default_rng(0)
    for at in (None, "2026-01-04T12:00:00Z"):
        for _ in range(8):
            first, last = rng.integers(1, 224, 2), rng.integers(0, 256, (2, 3))
            ipv4 = [".".join(map(str, [a, *b])) for a, b in zip(first, last, strict=True)]
            ipv6 = [f"2a00:{a:x}:{b:x}::{c:x}" for a, b, c in rng.integers(1, 1 << 16, (2, 3))]
            for src, dst in (ipv4, ipv6):
                found = model.rtt(src, dst, at=at)
                assert found.total_probability >= 0.99 and found.quantile(0.05) < found.median < found.quantile(0.95)


def test_context_makes_an_answer_narrower(model):
    context = [
        {"src_addr": HOSTS[0], "dst_addr": HOSTS[1], "rtt": 42.0, "event_time": f"2026-01-04T12:0{minute}:00Z"}
        for minute in range(6)
    ]
    alone, told = (model.rtt(*HOSTS, at="2026-01-04T12:10:00Z", context=given) for given in (None, context))
    assert told.median == pytest.approx(42, rel=0.02) and told.quantile(0.9) - told.quantile(0.1) < 4
    assert alone.quantile(0.9) - alone.quantile(0.1) > 40


def test_without_a_model_the_command_says_what_answers(capsys):
    assert main(["inference", "rtt", "--src", HOSTS[0], "--dst", HOSTS[1], "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) and OF_PRETRAINED in printed.err


def test_its_card_names_what_it_learned_from_its_limits_and_its_source():
    card = " ".join((PRETRAINED / "README.md").read_text().split())
    for words in (
        "6,592 addresses of sources, 290 of destinations",
        "October 2015 to February 2020",
        "wide on purpose",
    ):
        assert words in card
    assert "**geometric mean**" in card and "https://atlas.ripe.net" in card and "PingModel.load(" in card


@pytest.mark.slow
@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="needs the real results in ../shared/data")
def test_on_val_of_its_rows_it_loses_what_its_card_says(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inputs = [str(SHARED_DATA / folder) for folder in ("atlas", "more")]
    options = ["--traceroute", "target", "--time-cut", "2020-02-16", "2020-02-19"]
    assert main(["prepare", *inputs, "--out", "rows", *options]) == 0
    windows = fixed_windows(load(None).config, tmp_path / "rows", "val", 256)
    loss = score_tokens(model, windows).loss_per_field()["rtt"]
    assert loss == pytest.approx(3.527, abs=0.01)  # over seeds it deviates by 0.017
    assert f"| RTT (nats per token) | {loss:.3f}" in (PRETRAINED / "README.md").read_text()


def test_an_answer_loads_nothing_of_what_compiles_models():
    code = (
        "import sys; from ping_llm import PingModel; PingModel.load().rtt(*sys.argv[1:]).median; "
        "print([name for name in ('torch._dynamo', 'transformers', 'pandas', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *HOSTS], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
