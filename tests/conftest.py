"""Rows that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # files run side by side; threads of torch that spin would slow them all
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest
from gpu_cloud_server import fake_machine, serving_gpus
from hypothesis import settings
from servers import serving

from ping_llm.data import rows
from ping_llm.data.measurement import pack_address
from ping_llm.data.rows import ProbeRow

settings.register_profile("repeatable", derandomize=True)  # the same examples in every run
settings.load_profile("repeatable")


def make_row(count: int, seed: int = 0, ipv6_share: float = 0.3, probe_id: int = 7) -> ProbeRow:
    """A probe that pings 20 destinations at random times, about one a minute; 5 % fail."""
    rng = np.random.default_rng(seed)
    texts = [f"2001:db8::{i:x}" if rng.random() < ipv6_share else f"198.51.100.{i}" for i in range(20)]
    dst_addresses = np.array([list(pack_address(text)) for text in texts], dtype=np.uint8)
    src_addresses = np.array([list(pack_address(a)) for a in ("192.0.2.7", "2001:db8:7::7")], dtype=np.uint8)
    dst = rng.integers(len(texts), size=count).astype(np.uint8)
    ipv6 = np.array([":" in text for text in texts])[dst]
    rtt_ms = (dst + 1) * 5 * rng.lognormal(0, 0.1, count)
    rtt_ms[rng.random(count) < 0.05] = -1
    return ProbeRow.from_codes(
        probe_id=probe_id,
        time_s=1_700_000_000 + np.sort(rng.integers(0, 60 * count, count)),
        msm_id=1000 + dst.astype(np.int64),
        src=ipv6.astype(np.uint8),
        dst=dst,
        rtt_ms=rtt_ms.astype(np.float32),
        kind=np.zeros(count, dtype=np.uint8),
        src_addresses=src_addresses,
        dst_addresses=dst_addresses,
    )


@pytest.fixture(scope="session")
def long_row() -> ProbeRow:
    return make_row(5000)


def write_rows(folder: Path, parts: dict[str, list[ProbeRow]], shards: int = 2) -> Path:
    """A folder of rows as `ping-llm prepare` leaves it, dealt to the shards of each part in turn."""
    rows.write_rows(folder, parts, shards)
    return folder


@pytest.fixture(scope="session")
def rows_folder(tmp_path_factory) -> Path:
    """40 probes with 3 to 6,000 measurements in train, 8 in val."""
    sizes = np.geomspace(3, 6000, 40).astype(int)
    train = [make_row(int(size), seed=i, probe_id=i) for i, size in enumerate(sizes)]
    val = [make_row(500, seed=100 + i, probe_id=i) for i in range(8)]
    return write_rows(tmp_path_factory.mktemp("rows"), {"train": train, "val": val})


@pytest.fixture
def server(monkeypatch):
    """An HTTP server on the loopback interface; a test writes down its replies."""
    monkeypatch.setenv("no_proxy", "*")
    with serving() as server:
        yield server


@pytest.fixture
def gpus(monkeypatch):
    """A server on the loopback interface that rents out GPUs."""
    monkeypatch.setenv("no_proxy", "*")
    with serving_gpus() as server:
        yield server


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """The folder of the machine that is rented; the current folder is a checkout."""
    machine, checkout = tmp_path / "machine", tmp_path / "checkout"
    for name, value in fake_machine(machine).items():
        monkeypatch.setenv(name, value)
    (checkout / "configs").mkdir(parents=True)
    (checkout / "configs" / "tiny.toml").write_text("[model]\n")
    monkeypatch.chdir(checkout)
    return machine
