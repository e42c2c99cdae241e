"""Claims about the rates of a log line, by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ping_llm.config import Config, DataConfig, ModelConfig, TrainConfig
from ping_llm.training import speed
from ping_llm.training.distributed import Ranks
from ping_llm.training.speed import Speed

CONFIG = Config(model=ModelConfig(n_layer=2, n_embd=64, n_head=2, seq_len=128), train=TrainConfig(batch_size=8))
STEP_FLOPS = 8 * 128 * (6 * (2 * 12 * 64 * 64 + 267 * 64) + 12 * 2 * 64 * 128)
"""1,024 places of 6 FLOPs for each of 98,304 weights in blocks and 17,088 of the head, and those of attention."""


@pytest.fixture
def peak(monkeypatch) -> float:
    """Of a device whose data sheet gives one."""
    monkeypatch.setattr(speed, "peak_flops", lambda _: 1e12)
    return 1e12


@pytest.mark.parametrize("world", [1, 4])
def test_mfu_is_the_share_of_the_peaks_of_all_processes_and_padding_counts(peak, world):
    """Two steps of 0.5 s in all; 2,048 places, 1,536 of them trained on; a tenth of the time waits."""
    rates = Speed(CONFIG, Ranks(torch.device("cpu"), 0, world), compiling=False)
    rates.add(0.3, 0.02, 1000, 8)
    rates.add(0.2, 0.03, 536, 8)
    rates.held_s = 0.125
    line = rates.rates()
    assert line.pop("peak_memory_gb") > 0
    assert line == pytest.approx(
        {
            "tokens_per_s": 1536 / 0.5,
            "padding": 0.25,
            "data_wait_share": 0.1,
            "save_share": 0.2,
            "mfu": 2 * STEP_FLOPS / world / 0.5 / peak,
        }
    )
    assert list(rates.rates()) == ["peak_memory_gb"]  # all that was counted is said


def test_the_step_that_compiles_has_no_rates(peak):
    rates = Speed(CONFIG, Ranks(torch.device("cpu")), compiling=True)
    rates.add(60.0, 1.0, 1024, 8)
    assert not rates.compiling and list(rates.rates()) == ["peak_memory_gb"]
    rates.add(0.5, 0.0, 1024, 8)
    assert rates.rates()["tokens_per_s"] == 2048


def test_short_windows_are_places_too(peak):
    """Of 8 places each 128 + 2 · 64, of which the short ones attend to 64."""
    config = dataclasses.replace(CONFIG, data=DataConfig(short_windows=2, short_len=64))
    rates = Speed(config, Ranks(torch.device("cpu")), compiling=False)
    rates.add(0.5, 0.0, 1024, 8)
    found = rates.rates()
    assert found["padding"] == 0.5
    assert found["mfu"] == pytest.approx((2 * STEP_FLOPS - 8 * 2 * 64 * 12 * 2 * 64 * 64) / 0.5 / peak)
