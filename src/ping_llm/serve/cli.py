"""The command line of `ping-llm serve` in, a service that runs out; the signature is what `--help` shows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ping_llm.serve.limits import Limits

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Bounds = tyro.conf.OmitArgPrefixes[Limits]


def serve(
    limits: Bounds,
    model: str | None = None,
    memory: Path | None = None,
    rows: Path | None = None,
    device: str = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
    host: str = "127.0.0.1",
    port: int = 8000,
    token_file: Path | None = None,
    log_addresses: Flag = False,
) -> None:
    """Answer queries over HTTP, until SIGTERM or ctrl-C: an API, its description at /docs, /metrics, and a page.

    Args:
        limits: what is taken, at most.
        model: run folder of a trained model, a folder that ping-llm export wrote, or OWNER/NAME of the Hugging Face hub; if
            absent, the model that comes with the package.
        memory: folder of rows; what its train part holds of a query's source and pair before it joins a short context.
        rows: folder of rows that the page shows: its anomalies over time, and an example from it.
        device: cpu, cuda or auto.
        precision: bf16 is faster; probabilities differ by some percent of themselves.
        host: address to listen at; one that other machines reach needs --token-file.
        port: to listen at; 0 takes a free one.
        token_file: file with a word that clients have to send: Authorization: Bearer WORD.
        log_addresses: let the log say addresses: of clients, of queries in messages.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin would take the time of those that answer
    from ping_llm.inference.model import PingModel
    from ping_llm.inference.sources import name_of
    from ping_llm.serve.rows import RowsFolder
    from ping_llm.serve.server import listen_at, read_token, run
    from ping_llm.serve.service import Service

    token = read_token(token_file)
    listening = listen_at(host, port, token is not None)
    shown = None if rows is None else RowsFolder(rows)
    service = Service(PingModel.load(model, device, precision, memory), name_of(model), limits, shown)
    run(service, listening, token, log_addresses)
