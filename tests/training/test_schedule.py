"""Claims about rates over the run."""

from __future__ import annotations

import pytest

from ping_llm.config import OptimConfig, TrainConfig
from ping_llm.training import schedule

CONFIG = OptimConfig(warmup_share=0.2, cooldown_share=0.4, final_lr_share=0.1, weight_decay=0.1)


def test_learning_rate_table():
    scales = [schedule.lr_scale(step / 10, CONFIG) for step in range(10)]
    assert scales == pytest.approx([0.1, 0.55, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325])


def test_weight_decay_table():
    decays = [schedule.weight_decay(step / 5, CONFIG) for step in range(6)]
    assert decays == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02, 0])


def test_weight_decay_stays_or_falls_as_a_cosine():
    constant, cosine = (OptimConfig(weight_decay=0.1, weight_decay_schedule=name) for name in ("constant", "cosine"))
    assert [schedule.weight_decay(done, constant) for done in (0.0, 0.5, 1.0)] == [0.1, 0.1, 0.1]
    decays = [schedule.weight_decay(done, cosine) for done in (0.0, 0.25, 0.5, 0.75, 1.0, 1.3)]
    assert decays == pytest.approx([0.1, 0.0853553, 0.05, 0.0146447, 0, 0], abs=1e-7)


def test_momentum_table():
    momenta = [schedule.momentum(step, OptimConfig()) for step in (0, 150, 300, 10_000)]
    assert momenta == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert schedule.momentum(0, OptimConfig(momentum_warmup_steps=0)) == pytest.approx(0.95)


@pytest.mark.parametrize("shares", [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (0.02, 0.4), (0.5, 0.5)])
def test_rate_is_above_zero_and_at_most_the_peak_at_every_step(shares):
    config = OptimConfig(warmup_share=shares[0], cooldown_share=shares[1])
    scales = [schedule.lr_scale(step / 137, config) for step in range(137)]
    assert min(scales) >= config.final_lr_share and max(scales) <= 1


def test_progress_is_by_steps_or_by_time_whichever_is_further():
    by_steps = TrainConfig(total_steps=100)
    assert [schedule.progress(step, 10**9, 1e9, by_steps) for step in (0, 50, 100)] == [0, 0.5, 1]
    by_both = TrainConfig(total_steps=100, max_minutes=2)
    assert schedule.progress(10, 0, 60, by_both) == 0.5
    assert schedule.progress(90, 0, 60, by_both) == 0.9
    assert schedule.progress(1, 0, 120, by_both) == 1


def test_without_a_rise_or_a_fall_the_rate_is_the_peak():
    config = OptimConfig(warmup_share=0.0, cooldown_share=0.0)
    assert [schedule.lr_scale(done, config) for done in (0.0, 0.5, 1.0)] == [1, 1, 1]


def test_cosine_table():
    config = OptimConfig(schedule="cosine", warmup_share=0.2, final_lr_share=0.1)
    scales = [schedule.lr_scale(step / 10, config) for step in range(11)]
    falling = [1, 0.965746, 0.868198, 0.722208, 0.55, 0.377792, 0.231802, 0.134254, 0.1]
    assert scales == pytest.approx([0.1, 0.55, *falling], abs=1e-6)
    assert schedule.lr_scale(1.3, config) == pytest.approx(0.1)  # as a run by the clock may end
    rising = OptimConfig(schedule="cosine", warmup_share=1.0, cooldown_share=0.0, final_lr_share=0.1)
    assert [schedule.lr_scale(done, rising) for done in (0.0, 0.5, 1.0)] == pytest.approx([0.1, 0.55, 1.0])


def test_linear_table():
    config = OptimConfig(schedule="linear", warmup_share=0.2, final_lr_share=0.1)
    scales = [schedule.lr_scale(step / 10, config) for step in range(11)]
    falling = [1, 0.8875, 0.775, 0.6625, 0.55, 0.4375, 0.325, 0.2125, 0.1]
    assert scales == pytest.approx([0.1, 0.55, *falling])
    assert schedule.lr_scale(1.3, config) == pytest.approx(0.1)  # as a run by the clock may end


def test_rates_of_the_last_step_of_a_run_are_those_of_its_progress_before():
    assert schedule.lr_scale(0.99, OptimConfig()) == pytest.approx(0.01 + 0.99 * 0.01 / 0.4)
    assert schedule.lr_scale(1.0, OptimConfig()) == pytest.approx(0.01)


def test_progress_by_tokens_does_not_depend_on_the_clock():
    by_tokens = TrainConfig(total_steps=0, target_tokens=1000)
    assert [schedule.progress(7, tokens, 1e9, by_tokens) for tokens in (0, 250, 1000)] == [0, 0.25, 1]
    by_both = TrainConfig(total_steps=10, target_tokens=1000)
    assert [schedule.progress(3, tokens, 0.0, by_both) for tokens in (100, 500)] == [0.3, 0.5]
