"""Claims about the rows of a fine-tuning: windows mixed in, measurements that a base makes up, and rows that are refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_row, write_rows
from finetune_runs import MODEL, START_S, row
from hypothesis import given
from hypothesis import strategies as st

from ping_llm import PingModel
from ping_llm.config import Config, DataConfig, ModelConfig, TrainConfig
from ping_llm.data.loader import training_batches
from ping_llm.data.measurement import pack_address
from ping_llm.data.rows import RowReader, manifest_sha256, read_manifest
from ping_llm.inference.familiar import Familiar
from ping_llm.model.gpt import GPT
from ping_llm.training.base import Base, union
from ping_llm.training.overlap import check_rows
from ping_llm.training.samples import _rows, _times, sample_rows

CPU = torch.device("cpu")


def batch_config(rows: Path, replay: Path | None = None, share: float = 0.0, batch_size: int = 8) -> Config:
    data = DataConfig(rows=rows, windows_per_read=2, replay=str(replay or ""), replay_share=share)
    return Config(model=ModelConfig(seq_len=64), data=data, train=TrainConfig(batch_size=batch_size))


def batches(config: Config, count: int, first: int = 0, rank: int = 0, world: int = 1) -> list[torch.Tensor]:
    read = training_batches(config, first, CPU, rank, world)
    found = [next(read) for _ in range(count)]
    read.close()
    return found


@pytest.fixture(scope="module")
def two_folders(tmp_path_factory) -> tuple[Path, Path]:
    """Rows of IPv4 and, to be mixed in, of IPv6."""
    parts = [{"train": [make_row(300 + i, i, ipv6, i) for i in range(3)]} for ipv6 in (0.0, 1.0)]
    return tuple(write_rows(tmp_path_factory.mktemp("rows"), part, shards=1) for part in parts)


def of_ipv6(batch: torch.Tensor) -> torch.Tensor:
    """Which windows hold a destination of IPv6, (B,)."""
    return (batch == 4).any(dim=1)


@pytest.mark.parametrize(("share", "batch_size", "count"), [(0.25, 8, 2), (0.5, 8, 4), (0.1, 12, 1), (0.9, 8, 7)])
def test_a_share_of_each_batch_is_of_the_rows_mixed_in_and_the_rest_as_without(two_folders, share, batch_size, count):
    rows, replay = two_folders
    mixed = batches(batch_config(rows, replay, share, batch_size), 9)
    plain = batches(batch_config(rows, batch_size=batch_size), 9)
    for with_others, without in zip(mixed, plain, strict=True):
        others = of_ipv6(with_others)
        assert others.sum() == count and not of_ipv6(without).any()
        assert torch.equal(with_others[~others], without[~others])


def test_the_windows_mixed_in_lie_evenly_in_the_batch(two_folders):
    """So that a batch that is cut into pieces, as while it grows, gives each piece its share."""
    (batch,) = batches(batch_config(*two_folders, 0.25, 16), 1)
    assert [int(of_ipv6(piece).sum()) for piece in batch.split(4)] == [1, 1, 1, 1]


def test_mixed_batches_depend_neither_on_processes_nor_on_where_a_run_goes_on(two_folders):
    config = batch_config(*two_folders, 0.25)
    whole = batches(config, 12)
    for rank in range(2):
        for mine, batch in zip(batches(config, 5, 7, rank, 2), whole[7:], strict=True):
            assert torch.equal(mine, batch[rank::2])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"replay": "rows"}, r"data.replay='rows' and data.replay_share=0.0 go together"),
        ({"replay_share": 0.5}, r"data.replay='' and data.replay_share=0.5 go together"),
        ({"replay": "rows", "replay_share": 0.05}, r"data.replay_share=0.05 of train.batch_size=8 is 0 windows"),
        ({"replay": "rows", "replay_share": 0.95}, r"data.replay_share=0.95 of train.batch_size=8 is 8 windows"),
    ],
)
def test_a_share_that_is_none_or_all_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        Config(data=DataConfig(**data), train=TrainConfig(batch_size=8))


@pytest.fixture(scope="module")
def untrained() -> PingModel:
    model = GPT(dataclasses.replace(MODEL, seq_len=160), generator=torch.Generator().manual_seed(0))
    return PingModel(model.eval(), CPU)


def test_samples_are_rows_by_source_and_the_same_for_a_seed(tmp_path, untrained):
    folders = [
        sample_rows(untrained, tmp_path / name, "ab", seed, 120) for name, seed in (("a", 3), ("b", 3), ("c", 4))
    ]
    drawn = [
        {part: [one.to_bytes() for one in RowReader(folder, part)] for part in ("train", "val")} for folder in folders
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert manifest_sha256(folders[0]) == manifest_sha256(folders[1]) != manifest_sha256(folders[2])
    assert read_manifest(folders[0])["parts"] == {"train": 105, "val": 15}  # 40 sequences of 3, every eighth for val
    generated = untrained.generate(40, seed=3, measurements=3)
    found = [one for part in ("train", "val") for one in RowReader(folders[0], part)]
    pairs = [(one.src_addresses[s].tobytes(), one.dst_addresses[d].tobytes(), float(r)) for one in found
             for s, d, r in zip(one.src, one.dst, one.rtt_ms, strict=True)]  # fmt: skip
    texts = (generated.column(name).to_pylist() for name in ("src_addr", "dst_addr", "rtt"))
    wanted = [(pack_address(s), pack_address(d), float(np.float32(r))) for s, d, r in zip(*texts, strict=True)]
    assert sorted(pairs) == sorted(wanted)
    assert all(len(one.src_addresses) == 1 and (np.diff(one.time_s) >= 0).all() for one in found)


def test_rows_of_samples_are_in_order_of_time():
    """Draws of one source come from several sequences, whose times do not ascend from one to the next."""
    src, dst = (np.tile(np.frombuffer(pack_address(one), np.uint8), (3, 1)) for one in ("192.0.2.1", "198.51.100.7"))
    (one,) = _rows(src, dst, START_S + np.array([60, 0, 30]), np.array([1.0, 2.0, 3.0], np.float32))
    assert (one.time_s - one.time_s[0]).tolist() == [0, 30, 60] and one.rtt_ms.tolist() == [2.0, 3.0, 1.0]


def test_a_sample_without_a_time_has_that_of_its_neighbour():
    import pyarrow as pa

    nothing = None
    seconds = [nothing, 10, nothing, 20, nothing, nothing, nothing, nothing, nothing, 60, 61, nothing]
    known = pa.chunked_array([pa.array(seconds, pa.int64()).cast(pa.timestamp("s", "UTC"))])
    assert _times(known, 3).tolist() == [10, 10, 10, 20, 20, 20, 20, 20, 20, 60, 61, 61]
    none = pa.chunked_array([pa.array([None, None], pa.timestamp("s", "UTC"))])
    assert _times(none, 2).tolist() == [0, 0]


@given(st.lists(st.one_of(st.none(), st.integers(0, 2**31)), min_size=6, max_size=6))
def test_times_that_are_known_stay(seconds):
    import pyarrow as pa

    column = pa.chunked_array([pa.array(seconds, pa.int64()).cast(pa.timestamp("s", "UTC"))])
    found = _times(column, 3).tolist()
    assert all(own == given_s for own, given_s in zip(found, seconds, strict=True) if given_s is not None)


def pings(*given_pings: tuple[str, str, int]) -> list:
    """A row of pings: source, destination, second after START_S."""
    src, dst = (np.array([list(pack_address(one[end])) for one in given_pings], np.uint8) for end in (0, 1))
    seconds = START_S + np.array([one[2] for one in given_pings])
    return [row(src, dst, seconds, np.full(len(src), 5, np.float32))]


A, B, C, D, E, F = (f"198.18.{i}.7" for i in range(6))
OLD = {"train": pings((A, B, 0), (A, B, 60)), "val-s1": pings((A, B, 120)), "test-s1": pings((A, B, 180))}
OLD |= {"test-s3": pings((C, B, 5)), "val-s4": pings((A, D, 6))}
NOTHING = Base("runs/base", 10, "0" * 64, {}, None)


def folders_of(tmp_path: Path, new: dict[str, list], old: dict[str, list] = OLD) -> tuple[Path, Path]:
    found = []
    for name, parts in (("new", new), ("old", old)):
        (tmp_path / name).mkdir()
        found.append(write_rows(tmp_path / name, parts, shards=1))
    return found[0], found[1]


@pytest.mark.parametrize(
    "new",
    [
        {"train": pings((E, B, 0), (A, B, 240)), "val-s1": pings((A, B, 300))},  # later pings of the same pair
        {"train": pings((E, F, 0)), "val-s3": pings(("198.18.9.9", F, 0)), "test-s4": pings((E, "198.18.8.8", 0))},
        OLD,
    ],
)
def test_rows_that_hold_nothing_of_the_others_held_out_parts_are_taken(tmp_path, new):
    new, old = folders_of(tmp_path, new)
    check_rows(new, NOTHING, old, tmp_path)


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (
            {"train": pings((E, F, 0), (A, B, 120), (A, B, 180)), "val-s1": pings((E, F, 60))},
            r"^the part train of \S+/new holds 2 measurements that \S+/old keeps for val and test; prepare both",
        ),
        (
            {"train": pings((E, F, 0)), "val-s1": pings((A, B, 60)), "test-s1": pings((E, F, 500))},
            r"^val and test of \S+/new hold 1 measurement of the part train of \S+/old, which the base has learned; prepare",
        ),
        (
            {"train": pings((C, F, 900)), "val-s1": pings((E, F, 60))},
            rf"^the part train of \S+/new shows {C} that \S+/old holds out for val and test",
        ),
        (
            {"train": pings(("198.18.3.99", F, 900)), "val-s1": pings((E, F, 60))},  # as a source, of the same /24
            r"^the part train of \S+/new shows 198.18.3.0/24 that \S+/old holds out",
        ),
        (
            {"train": pings((E, F, 900)), "val-s1": pings((E, F, 60)), "test-s5": pings((B, "198.18.0.1", 900))},
            rf"^\S+/new holds out {B} and 1 more endpoints for val and test that the base has learned from; leave",
        ),
    ],
)
def test_rows_that_one_learns_from_and_the_other_holds_out_are_refused_in_one_line(tmp_path, new, message):
    new, old = folders_of(tmp_path, new)
    with pytest.raises(ValueError, match=message) as refused:
        check_rows(new, NOTHING, old, tmp_path)
    assert "\n" not in str(refused.value)


def test_without_the_rows_of_the_base_its_calibration_says_what_it_has_met(tmp_path):
    new, old = folders_of(tmp_path, {"train": pings((E, F, 0)), "val-s3": pings((A, F, 0))})
    check_rows(new, NOTHING, None, tmp_path)  # nothing is known of it
    known = dataclasses.replace(NOTHING, familiar=Familiar.of_rows(RowReader(old, "train")))
    with pytest.raises(ValueError, match=rf"^\S+/new holds out {A} for val and test that the base has learned from"):
        check_rows(new, known, None, tmp_path)


@pytest.mark.parametrize(("split", "refused"), [({"val_from_s": 1}, False), ({"val_from_s": 2}, True), (None, True)])
def test_without_the_rows_of_the_base_a_file_that_both_were_made_of_must_be_split_alike(tmp_path, split, refused):
    new, _ = folders_of(tmp_path, {"train": pings((E, F, 0)), "val-s1": pings((E, F, 60))})
    made_of = {"inputs": [{"name": "monday.bz2", "sha256": "aa"}], "split": split}
    (new / "manifest.json").write_text(json.dumps(read_manifest(new) | made_of))
    (tmp_path / "rows_manifest.json").write_text(json.dumps(made_of | {"split": {"val_from_s": 1}}))
    learned = dataclasses.replace(NOTHING, inputs={"aa": "monday.bz2"})
    if not refused:
        return check_rows(new, learned, None, tmp_path)
    with pytest.raises(ValueError, match=r"were both made of monday.bz2, with another split"):
        check_rows(new, learned, None, tmp_path)


def test_what_two_have_met_together_is_what_either_has(tmp_path):
    new, old = folders_of(tmp_path, {"train": pings((E, F, 0))})
    each = [Familiar.of_rows(RowReader(folder, "train")) for folder in (new, old)]
    both = Familiar.of_rows([*RowReader(new, "train"), *RowReader(old, "train")])
    assert union(each) == both and union(each[:1]) == each[0]
