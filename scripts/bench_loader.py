"""Prints how fast training windows are made, from ArrayRecord on the local disk to a tensor of (batch, 1025) tokens.

    python scripts/bench_loader.py [--rows DIR] [--quick] [--json FILE]

Two kinds of rows: those of DIR (without it, synthetic ones of the sizes of a small dump), and synthetic rows of 8 MB. Three
things are compared in the same run: two loader processes with one; half of the windows of several probes, or a fifth of
synthetic Internets, with none; and the encoder with a plain one of the same grammar that takes one measurement after the
other. The share of a core that the trainer itself takes limits the scaling on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np

from ping_llm.cli import exit_code
from ping_llm.config import Config, DataConfig, ModelConfig, TrainConfig
from ping_llm.data.measurement import pack_address
from ping_llm.data.pipeline import WindowBlocks, block_steps, keep_buffers
from ping_llm.data.rows import (
    FORMAT_VERSION,
    INDEX_NAME,
    INDEX_SCHEMA,
    MANIFEST_NAME,
    ProbeRow,
    RowReader,
    ShardWriter,
    shard_name,
)
from ping_llm.data.tokenization import PADDING, Fields, encode
from ping_llm.data.windows import encode_windows, sample_window, window_fields
from ping_llm.system.files import try_file

LARGEST_ROW = 720_000  # measurements in 8 MB
EFFORT = {"seconds": 2.0, "rounds": 4}
SHARES = {"mesh": 0.5}, {"synthetic": 0.2}
QUICK = {"seconds": 1.0, "rounds": 2}
_ADDRESSES = np.array(
    [list(pack_address(f"198.51.100.{i}")) for i in range(25)]
    + [list(pack_address(f"2001:db8::{i}")) for i in range(5)]
    + [list(pack_address("192.0.2.7")), list(pack_address("2001:db8:7::7"))],
    dtype=np.uint8,
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, help="folder that `ping-llm prepare` wrote")
    parser.add_argument("--quick", action="store_true", help="a minute instead of three")
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    options = parser.parse_args(argv)
    try_file(options.json)
    effort = QUICK if options.quick else EFFORT

    with tempfile.TemporaryDirectory() as scratch:
        sizes = np.random.default_rng(0).lognormal(4.5, 1.5, 400).astype(int) + 1
        folders = {"small rows": options.rows or write_rows(Path(scratch) / "small", sizes)}
        folders["8 MB rows"] = write_rows(Path(scratch) / "large", np.full(4 if options.quick else 16, LARGEST_ROW))
        report = {"load_average_before": os.getloadavg()[0]}  # above 0.5, the scaling says little
        report |= bench_encoder(config_of(folders["small rows"]))
        for kind, folder in folders.items():
            report[kind] = bench_rows(config_of(folder), **effort)
    for name in ("tokens_per_s_per_worker", "scaling_2_workers"):
        report[name] = min(report[kind][name] for kind in folders)
    report["padding"] = report["small rows"]["padding"]
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report))


def config_of(rows: Path, workers: int = 0) -> Config:
    """64 windows of 1,024 tokens a batch."""
    data = DataConfig(rows=rows, workers=workers)
    return Config(model=ModelConfig(seq_len=1024), data=data, train=TrainConfig(batch_size=64))


def bench_encoder(config: Config) -> dict[str, float]:
    """Tokens a second of the encoder, of a plain one on the same windows, and the ratio; both must agree."""
    blocks = new_blocks(config)
    fields = window_fields([look.window for place in range(16) for look in blocks.draw(0, place)])
    tokens, _ = encode(fields)
    started = time.perf_counter()
    assert plain_encode(fields) == tokens.tolist()
    plain_s = time.perf_counter() - started
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        encode(fields)
        seconds.append(time.perf_counter() - started)
    return {
        "encoder_tokens_per_s": round(len(tokens) / np.median(seconds)),
        "plain_encoder_tokens_per_s": round(len(tokens) / plain_s),
        "encoder_ratio_to_plain": round(float(plain_s / np.median(seconds)), 1),
    }


def bench_rows(config: Config, seconds: float, rounds: int) -> dict:
    """The whole line in loader processes, the best of several rounds each, and where the time goes in one process."""
    mesh, synthetic = (dataclasses.replace(config, data=dataclasses.replace(config.data, **share)) for share in SHARES)
    tries = ((config, 1), (config, 2), (mesh, 1), (synthetic, 1))
    tried = [[tokens_per_s(*which, seconds) for which in tries] for _ in range(rounds)]
    # Other work on the machine only ever slows a round down.
    one, two, of_mesh, of_synthetic = map(max, zip(*tried, strict=True))
    return {
        "mesh_ratio": round(of_mesh / one, 3),
        "synthetic_ratio": round(of_synthetic / one, 3),
        "tokens_per_s_per_worker": round(one),
        "tokens_per_s_2_workers": round(two),
        "scaling_2_workers": round(two / one, 2),
        **time_shares(config, seconds),
    }


def tokens_per_s(config: Config, workers: int, seconds: float) -> float:
    """Places in the batches, padding too, that the trainer gets in a second from `workers` processes."""
    from ping_llm.data.loader import training_batches
    from ping_llm.system.hardware import pick_device

    config = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=workers))
    steps = block_steps(config.data.windows_per_read)
    with closing(training_batches(config, 0, pick_device("auto"))) as batches:
        for _ in range(2 * workers * steps):  # until every process is at work
            next(batches)
        started, places = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            places += sum(next(batches).numel() for _ in range(workers * steps))
        return places / (time.perf_counter() - started)


def time_shares(config: Config, seconds: float) -> dict:
    """What one process spends on each stage, in µs a window, and the padding."""
    import torch

    from ping_llm.data.loader import to_device
    from ping_llm.system.hardware import pick_device

    torch.set_num_threads(1)
    keep_buffers()
    blocks, device = new_blocks(config), pick_device("auto")
    spent, windows, padding, block = Counter(), 0, 0, 0
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        columns = []
        for place in range(blocks.batch_size):
            numbers = blocks.row_numbers(block, place)
            with timed(spent, "read"):
                records = {number: blocks.rows.record(number) for number in set(numbers)}
            with timed(spent, "decode"):
                rows = {number: ProbeRow.from_bytes(record) for number, record in records.items()}
            with timed(spent, "sample"):
                drawn = []
                for step, number in enumerate(numbers):
                    rng = np.random.default_rng((0, 0, block, place, step))
                    drawn.append(sample_window(rows[number], config.data, blocks.tokens, rng))
            with timed(spent, "encode"):
                columns.append(encode_windows(drawn, blocks.tokens))
        with timed(spent, "batch"):
            out = np.stack(columns, axis=1)
        with timed(spent, "transfer"):
            for step in to_device(out, device):
                step.long()
        windows, padding, block = windows + out.shape[0] * out.shape[1], padding + (out == PADDING).mean(), block + 1
    return {
        "us_per_window": {stage: round(s / windows * 1e6, 1) for stage, s in spent.items()},
        "tokens_per_s_1_thread": round(windows * blocks.tokens / spent.total()),
        "padding": round(float(padding / block), 4),
    }


def new_blocks(config: Config) -> WindowBlocks:
    rows = RowReader(config.data.rows, "train")
    return WindowBlocks(rows, config, config.train.batch_size, config.data.windows_per_read)


@contextmanager
def timed(spent: Counter, stage: str) -> Iterator[None]:
    """Adds the seconds that pass inside to a stage."""
    started = time.perf_counter()
    yield
    spent[stage] += time.perf_counter() - started


def write_rows(folder: Path, sizes: np.ndarray) -> Path:
    """A folder of rows of given numbers of measurements: 30 destinations, 6 s apart, 5 % lost, one shard."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    with ShardWriter(folder / shard_name("train", 0, 1), "train", 0) as shard:
        for probe_id, size in enumerate(sizes):
            rng = np.random.default_rng(probe_id)
            dst = rng.integers(30, size=size)
            rtt_ms = (5 + 5 * dst) * rng.lognormal(0, 0.1, size)
            rtt_ms[rng.random(size) < 0.05] = -1
            time_s = 1_700_000_000 + np.arange(size) * 6 + rng.integers(0, 5, size)
            columns = (
                time_s,
                1000 + dst,
                np.where(dst < 25, 30, 31),
                dst,
                rtt_ms.astype(np.float32),
                np.zeros(size, np.uint8),
            )
            shard.write(ProbeRow.from_codes(probe_id, *columns, _ADDRESSES, _ADDRESSES))
    pq.write_table(pa.Table.from_pylist(shard.index, schema=INDEX_SCHEMA), folder / INDEX_NAME)
    manifest = {"format_version": FORMAT_VERSION, "parts": {"train": int(sizes.sum())}}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    return folder


def plain_encode(fields: Fields) -> list[int]:
    """The tokens of `fields`, one measurement after the other."""
    tokens: list[int] = []
    window, clock = -1, None
    columns = (
        fields.src_bytes,
        fields.dst_bytes,
        fields.rtt_ms,
        fields.time_s,
        fields.timed,
        fields.order,
        fields.window,
    )
    addresses = ([packed.tobytes() for packed in column] for column in (fields.src, fields.dst))
    for src, dst, src_bytes, dst_bytes, rtt_ms, time_s, timed, order, number in zip(
        *addresses, *(column.tolist() for column in columns), strict=True
    ):
        if number != window:
            window, clock = number, None
        fields = [plain_address(1, src, src_bytes), plain_address(3, dst, dst_bytes), plain_result(rtt_ms), []]
        if timed:
            fields[3] = plain_time(time_s, clock)
            clock = time_s
        tokens.append(0)
        for _, field in sorted(zip(order, fields, strict=True)):
            tokens += field
    return tokens


def plain_address(ipv4_role: int, packed: bytes, known: int) -> list[int]:
    """The role and the known bytes of an address."""
    ipv4 = packed.startswith(bytes(10) + b"\xff\xff")
    role, address = (ipv4_role, packed[12:]) if ipv4 else (ipv4_role + 1, packed)
    return [role, *(11 + byte for byte in address[:known])]


def plain_result(rtt_ms: float) -> list[int]:
    """FAILED, or the RTT as a 16-bit float."""
    if rtt_ms < 0:
        return [10]
    mantissa, exponent = math.frexp(max(rtt_ms * 1000, 1.0))
    code = min((exponent - 1) * 2048 + round((2 * mantissa - 1) * 2048), 65_535)
    return [8, 11 + (code >> 8), 11 + (code & 255)]


def plain_time(time_s: int, clock: int | None) -> list[int]:
    """The time, or how long it is after `clock`."""
    if clock is None:
        role, value = 5, time_s.to_bytes(8, "big")
    elif time_s - clock < 256:
        role, value = 6, bytes([time_s - clock])
    else:
        role, value = 7, (time_s - clock).to_bytes(4, "big")
    return [role, *(11 + byte for byte in value)]


if __name__ == "__main__":
    sys.exit(exit_code(main))
