"""A provider of GPUs, and the machine that it rents out."""

from __future__ import annotations

import pytest
from gpu_cloud_server import fake_machine, serving_gpus


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
