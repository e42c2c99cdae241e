"""Small Internets as rows, and a small run that has learned one of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from conftest import write_rows

from ping_llm.config import Config, DataConfig, LossConfig, ModelConfig, TrainConfig
from ping_llm.data.measurement import is_ipv4
from ping_llm.data.rows import MANIFEST_NAME, ProbeRow
from ping_llm.data.synthetic.internets import Internet
from ping_llm.data.synthetic.truth import draw_packets

MODEL = ModelConfig(
    n_layer=1, n_embd=48, n_head=2, seq_len=96, field_aware=True, prefix_rows=4096, grammar=True
)  # learns 8 × 8 pairs in seconds
START_S = 1_767_225_600


def internet_rows(folder: Path, seed: int, measurements: int, part: str = "val") -> Path:
    """Rows of a synthetic Internet, eight sources by eight destinations: train, and the last fifth in time as val."""
    folder.mkdir(parents=True)
    internet, rng = Internet(seed), np.random.default_rng(seed)
    src, dst = internet.src, internet.dst
    ipv4 = is_ipv4(src) & is_ipv4(dst)
    sources, targets = (np.unique(end[ipv4], axis=0)[:8] for end in (src, dst))
    known = [(end[:, None] == some).all(axis=2) for end, some in ((src, sources), (dst, targets))]
    paths = np.flatnonzero(known[0].any(axis=1) & known[1].any(axis=1))
    path = rng.choice(paths, measurements)
    time_s = START_S + np.sort(rng.integers(0, 3600, measurements))
    rtt_ms = draw_packets(*internet.paths.take(path).at(time_s), rng).astype(np.float32)
    of_train, parts = np.arange(measurements) < 0.8 * measurements, {}
    for name, inside in (("train", of_train), (part, ~of_train)):
        parts[name] = [
            row(src[path[own]], dst[path[own]], time_s[own], rtt_ms[own], probe_id)
            for probe_id, source in enumerate(sources)
            if len(own := np.flatnonzero(inside & (src[path] == source).all(axis=1)))
        ]
    write_rows(folder, parts, shards=1)
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest | {"inputs": []}))
    return folder


def row(src: np.ndarray, dst: np.ndarray, time_s: np.ndarray, rtt_ms: np.ndarray, probe_id: int = 7) -> ProbeRow:
    """A row of (n, 16) addresses, times and RTTs."""
    nothing = np.zeros(len(src), np.int64)
    return ProbeRow.from_addresses(probe_id, time_s, nothing, src, dst, rtt_ms, nothing.astype(np.uint8))


def base_config(run_dir: Path, rows: Path, **train_fields) -> Config:
    """Of a run that learns such rows."""
    fields = {"total_steps": 150, "batch_size": 8, "eval_every": 150, "checkpoint_every": 150, "eval_windows": 8}
    fields |= {"eval_queries": 0, "sample_every": 0, "log_every": 1, "device": "cpu", "precision": "fp32"}
    return Config(
        model=MODEL,
        data=DataConfig(rows=rows, canonical_order=1.0, src_prefix_dropout=0.1),
        loss=LossConfig(rtt=3.0),
        train=TrainConfig(run_dir=run_dir, **fields | train_fields),
    )
