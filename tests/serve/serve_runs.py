"""A tiny run, a service of it in this process, and what tests request of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from starlette.testclient import TestClient
from waiting import HANG_S

from ping_llm.config import Config, ModelConfig
from ping_llm.inference.model import PingModel
from ping_llm.model.checkpoint import save, save_config
from ping_llm.model.gpt import GPT
from ping_llm.serve.app import make_app
from ping_llm.serve.limits import Limits
from ping_llm.serve.rows import RowsFolder
from ping_llm.serve.service import Service
from ping_llm.serve.worker import Job, Kind

SRC, DST, OTHER = "192.0.2.1", "198.51.100.7", "203.0.113.9"
PING = {"src": SRC, "dst": DST, "src_known": "all"}
CONTEXT = [
    {"src_addr": SRC, "dst_addr": f"198.51.100.{i}", "rtt": 5.0 + i, "event_time": f"2026-01-01T00:{i:02}:00Z"}
    for i in range(1, 13)
]


def make_run(folder: Path) -> Path:
    """A run folder whose model learned nothing."""
    config = ModelConfig(n_layer=1, n_embd=32, n_head=2, seq_len=128)
    gpt, generator = GPT(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.normal_(std=0.1, generator=generator)
    save_config(folder, Config(model=config))
    save(folder, 1, {name: p.contiguous() for name, p in gpt.state_dict().items()}, {}, {})
    return folder


@contextmanager
def serving(
    model: PingModel, limits: Limits | None = None, rows: RowsFolder | None = None, **options: object
) -> Iterator[tuple[TestClient, Service]]:
    """A service and a client of it; `options` are those of `make_app`."""
    service = Service(model, "run", limits or Limits(answer_s=HANG_S), rows)
    with TestClient(make_app(service, **options)) as client:
        yield client, service


@contextmanager
def held(service: Service) -> Iterator[None]:
    """Inside, the thread of the model is kept from all work."""
    begun, released = threading.Event(), threading.Event()

    def hold(_: object) -> list[None]:
        begun.set()
        assert released.wait(HANG_S)
        return [None]

    service.worker.submit(Job(Kind(hold), None, lambda answer: answer, deadline=float("inf")))
    assert begun.wait(HANG_S)
    try:
        yield
    finally:
        released.set()
