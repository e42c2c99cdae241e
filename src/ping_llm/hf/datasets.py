"""Probe rows in, a folder of token windows out that `datasets.load_dataset` reads: the windows that `ping-llm train` learns.

    README.md                             says what the splits are
    data/train-00000-of-00002.parquet …   the windows of the run with this config in their order, each followed by the
                                          short ones beside it, if there are any
    data/validation-00000-of-00001.parquet   the fixed windows that every evaluation of such a run scores

Columns are `input_ids` and, where the config shifts pairs, `labels`: the same, but −100 where a token is no target.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from ping_llm.config import Config
from ping_llm.data.loader import fixed_windows, windows_of
from ping_llm.data.pipeline import WindowBlocks
from ping_llm.data.rows import RowReader, is_part_of
from ping_llm.data.tokenization import MUTED, PADDING
from ping_llm.data.windows import windows_per_row
from ping_llm.system.files import try_new_folder, whole_folder

IGNORED = -100
"""The label of a token that is no target, as transformers has it."""
_WINDOWS_OF_A_SHARD = 1 << 16
_WINDOWS_OF_A_GROUP = 1 << 10  # which are read at once
_CARD = """---
configs:
- config_name: default
  data_files:
{files}---

Windows of ping measurements as token ids of ping-llm, up to {tokens} each; its tokenizer shows them as text.

{counts}

They hold addresses of sources and destinations as the rows do that they were drawn from. Data of RIPE Atlas is subject to
its [terms](https://www.ripe.net/about-us/legal/ripe-atlas-service-terms-and-conditions/).
"""


def write_dataset(rows: Path, to: Path, config: Config, windows: int = 0) -> dict[str, int]:
    """Writes the folder `to`, which is new, and returns the number of windows of each split; it is whole or not there.

    `windows` of train, short ones too; 0 = as many as the rows fill, at most 16 of each, and the short ones beside them.
    Rows without val give no validation.
    """
    try_new_folder(to, "--to-dataset")
    train = RowReader(rows, "train")
    tokens = config.model.seq_len + 1
    filled = math.ceil(windows_per_row(train.measurements, train.ipv6_measurements, tokens).sum())
    count = windows or filled * (1 + config.data.short_windows)
    with whole_folder(to) as aside:
        (aside / "data").mkdir()
        counts = {"train": _write_split(aside / "data", "train", training_windows(train, config, count), count, config)}
        if any(number for part, number in train.manifest["parts"].items() if is_part_of(part, "val")):
            fixed = fixed_windows(config, rows, "val", config.train.eval_windows).numpy()
            counts["validation"] = _write_split(aside / "data", "validation", iter([fixed]), len(fixed), config)
        _write_card(aside / "README.md", counts, tokens)
    return counts


def training_windows(rows: RowReader, config: Config, count: int) -> Iterator[np.ndarray]:
    """The first `count` windows of a run in blocks of (n, seq_len + 1) int16, PADDING at the right, muted below it; each is
    followed by the short ones beside it."""
    blocks = WindowBlocks(rows, config, config.train.batch_size, config.data.windows_per_read)
    block = 0
    while count > 0:
        lines = torch.from_numpy(blocks[block]).flatten(0, 1)
        kinds = windows_of(lines, config.data)
        padded = [F.pad(some, (0, blocks.tokens - some.shape[1]), value=PADDING) for some in kinds]
        of_lines = [some.unflatten(0, (len(lines), -1)) for some in padded]  # (lines, windows of each, tokens)
        windows = torch.cat(of_lines, dim=1).flatten(0, 1)[:count].numpy()
        yield windows
        count, block = count - len(windows), block + 1


def _write_split(folder: Path, split: str, parts: Iterator[np.ndarray], count: int, config: Config) -> int:
    """Parquet files of `count` windows; the number of windows."""
    shards = max(1, -(-count // _WINDOWS_OF_A_SHARD))
    with_labels = config.data.shifted_pairs > 0
    tables = _in_groups(_table(part, with_labels) for part in parts)
    table = next(tables)
    for shard in range(shards):
        path, written = folder / f"{split}-{shard:05d}-of-{shards:05d}.parquet", 0
        with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
            while table.num_rows and written < _WINDOWS_OF_A_SHARD:
                writer.write_table(table)
                written += table.num_rows
                table = next(tables, table.slice(0, 0))
    return count


def _in_groups(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The rows of the tables, as many at a time as a group takes."""
    held: pa.Table | None = None
    for table in tables:
        held = table if held is None else pa.concat_tables([held, table])
        while held.num_rows >= _WINDOWS_OF_A_GROUP:
            yield held.slice(0, _WINDOWS_OF_A_GROUP).combine_chunks()
            held = held.slice(_WINDOWS_OF_A_GROUP)
    if held is not None and held.num_rows:
        yield held.combine_chunks()


def _table(windows: np.ndarray, with_labels: bool) -> pa.Table:
    """Windows (n, T + 1) as lists of their tokens."""
    real = windows != PADDING
    ends = np.concatenate([[0], np.cumsum(real.sum(axis=1))]).astype(np.int32)
    tokens = windows[real].astype(np.int16)
    muted = tokens <= MUTED
    values = {"input_ids": np.where(muted, MUTED - tokens, tokens).astype(np.int16)}
    if with_labels:
        values["labels"] = np.where(muted, IGNORED, tokens).astype(np.int16)
    return pa.table({name: pa.ListArray.from_arrays(ends, pa.array(column)) for name, column in values.items()})


def _write_card(path: Path, counts: dict[str, int], tokens: int) -> None:
    files = "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in counts)
    listed = "\n".join(f"- {split}: {count:,} windows" for split, count in counts.items())
    path.write_text(_CARD.format(files=files, tokens=tokens, counts=listed))
