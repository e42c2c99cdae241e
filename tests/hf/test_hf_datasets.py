"""A folder of rows becomes a dataset of the windows that a run with the same config learns, whole or not at all."""

import json
from dataclasses import replace

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_row, write_rows

import ping_llm.hf.datasets as module
from ping_llm.cli import main
from ping_llm.config import Config, DataConfig, ModelConfig, TrainConfig
from ping_llm.data import tokenization as tk
from ping_llm.data.loader import training_batches, validation_windows, windows_of
from ping_llm.hf.datasets import write_dataset
from ping_llm.hf.tokenization import PingTokenizer


def config_of(rows, **data) -> Config:
    train = TrainConfig(batch_size=8, eval_windows=5, device="cpu")
    return Config(model=ModelConfig(seq_len=128), data=DataConfig(rows=rows, windows_per_read=2, **data), train=train)


def load(folder, tmp_path) -> datasets.DatasetDict:
    return datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_window_i_is_window_i_of_a_run_and_validation_is_what_a_run_is_evaluated_on(rows_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_WINDOWS_OF_A_SHARD", 16)
    monkeypatch.setattr(module, "_WINDOWS_OF_A_GROUP", 8)
    config = config_of(rows_folder)
    assert write_dataset(rows_folder, tmp_path / "set", config, windows=44) == {"train": 44, "validation": 5}
    names = sorted(path.name for path in (tmp_path / "set" / "data").iterdir())
    assert names == [*(f"train-0000{i}-of-00003.parquet" for i in range(3)), "validation-00000-of-00001.parquet"]
    files = [pq.ParquetFile(tmp_path / "set" / "data" / name).metadata for name in names]
    assert [file.num_rows for file in files] == [16, 16, 12, 5] and files[0].num_row_groups == 2
    read = load(tmp_path / "set", tmp_path)
    assert {split: part.num_rows for split, part in read.items()} == {"train": 44, "validation": 5}
    assert read["train"].column_names == ["input_ids"]
    batches = training_batches(config, 0, torch.device("cpu"))
    learned = torch.cat([next(batches) for _ in range(6)])[:44]
    batches.close()
    for split, windows in (("train", learned), ("validation", validation_windows(config))):
        for example, window in zip(read[split], windows, strict=True):
            assert example["input_ids"] == window[window != tk.PADDING].tolist()
            tokenizer = PingTokenizer()
            assert tokenizer.encode(tokenizer.decode(example["input_ids"])) == example["input_ids"]


def test_short_windows_follow_the_one_beside_which_they_stand(rows_folder, tmp_path):
    config = config_of(rows_folder, short_windows=2)
    assert write_dataset(rows_folder, tmp_path / "set", config, windows=20)["train"] == 20
    batches = training_batches(config, 0, torch.device("cpu"))
    long, short = windows_of(next(batches), config.data)
    batches.close()
    expected = [window for i, window in enumerate(long) for window in (window, *short[2 * i : 2 * i + 2])][:20]
    for example, window in zip(load(tmp_path / "set", tmp_path)["train"], expected, strict=True):
        assert example["input_ids"] == window[window != tk.PADDING].tolist()


def test_what_the_rows_fill_has_its_short_windows_beside_it(rows_folder, tmp_path):
    alone, beside = (
        write_dataset(rows_folder, tmp_path / f"set{short}", config_of(rows_folder, short_windows=short))["train"]
        for short in (0, 2)
    )
    assert beside == 3 * alone


def test_muted_tokens_are_read_and_are_no_targets(rows_folder, tmp_path):
    config = config_of(rows_folder, shifted_pairs=1.0)
    write_dataset(rows_folder, tmp_path / "set", config, windows=8)
    batches = training_batches(config, 0, torch.device("cpu"))
    learned = next(batches)
    batches.close()
    assert (learned <= tk.MUTED).any()
    for example, window in zip(load(tmp_path / "set", tmp_path)["train"], learned, strict=True):
        window = window[window != tk.PADDING]
        assert example["input_ids"] == torch.where(window <= tk.MUTED, tk.MUTED - window, window).tolist()
        assert example["labels"] == torch.where(window <= tk.MUTED, -100, window).tolist()


def test_the_command_takes_the_config_of_a_run_and_fills_as_many_windows_as_there_are_measurements(tmp_path, capsys):
    rows = write_rows(tmp_path, {"train": [make_row(100, seed=i, probe_id=i) for i in range(3)]})
    (tmp_path / "run.toml").write_text("seed = 3\n[model]\nseq_len = 256\n[train]\nbatch_size = 8\n")
    to = ["--to-dataset", str(tmp_path / "set")]
    assert main(["rows", str(rows), *to, "--config", str(tmp_path / "run.toml")]) == 0
    (count,) = [int(word) for word in capsys.readouterr().out.split() if word.isdigit()]
    tokens = pq.read_table(tmp_path / "set" / "data").column("input_ids").to_pylist()
    assert len(tokens) == count and max(map(len, tokens)) in range(240, 258)
    measurements = sum(line.count(tk.MEASUREMENT_START) for line in tokens)
    assert 0.7 < measurements / 300 < 1.4  # each about once
    other = write_dataset(rows, tmp_path / "other", replace(config_of(rows), seed=4), windows=count)
    assert other == {"train": count}  # rows without val


def test_a_folder_that_is_there_rows_that_are_not_and_a_break_leave_nothing_half_written(
    rows_folder, tmp_path, monkeypatch, capsys
):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main(["rows", str(rows_folder), "--to-dataset", str(tmp_path / "full")]) == 1
    assert "full is there already and not empty; name a new folder with --to-dataset" in capsys.readouterr().err
    assert main(["rows", str(tmp_path), "--to-dataset", str(tmp_path / "set")]) == 1
    assert 'run "ping-llm prepare' in capsys.readouterr().err
    assert main(["rows", str(rows_folder), "--to-dataset", str(tmp_path / "set"), "--windows", "-1"]) == 1
    assert "--windows -1 must be a number of windows" in capsys.readouterr().err
    both = ["--model", "a/b", "--config", "run.toml"]
    assert main(["rows", str(rows_folder), "--to-dataset", str(tmp_path / "set"), *both]) == 1
    assert "--model and --config both say how windows are drawn" in capsys.readouterr().err

    def breaks(*_):
        raise OSError("no space")

    monkeypatch.setattr(module, "_write_card", breaks)
    with pytest.raises(OSError, match="no space"):
        write_dataset(rows_folder, tmp_path / "set", config_of(rows_folder), windows=8)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_an_empty_folder_is_taken_and_the_card_says_what_is_in_it(rows_folder, tmp_path):
    (tmp_path / "set").mkdir()
    write_dataset(rows_folder, tmp_path / "set", config_of(rows_folder), windows=8)
    card = (tmp_path / "set" / "README.md").read_text()
    assert "- split: validation\n    path: data/validation-*" in card and "- train: 8 windows" in card
    assert str(rows_folder) not in card and "RIPE Atlas" in card
    read = np.concatenate(pq.read_table(tmp_path / "set" / "data").column("input_ids").to_numpy())
    assert read.dtype == np.int16 and json.dumps(read.tolist())
