"""Claims about runs of a model with every switch on."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from switches import ALL
from training_runs import assert_same_weights, losses, make_batches, make_config, make_windows, run

from ping_llm.model.checkpoint import load_latest, load_model
from ping_llm.training.objective import Objective


def test_a_resumed_run_with_every_switch_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    """To the bit, and with weights that are averaged: what is left out of a step is a function of its number."""
    configs, steps, backward = [], [], Objective.backward
    noted = lambda self, *args, **options: steps.append(options["step"]) or backward(self, *args, **options)  # noqa: E731
    monkeypatch.setattr(Objective, "backward", noted)
    for name in ("whole", "resumed"):
        config = make_config(tmp_path / name, total_steps=6, checkpoint_every=3, eval_every=3, average=0.5)
        switches = ALL | {"n_head": 4, "field_aware": True, "prefix_rows": 64}
        configs.append(dataclasses.replace(config, model=dataclasses.replace(config.model, **switches)))
    whole, resumed = configs
    run(whole)

    def ends_at_4(config, start_step, device, rank, world):
        for number, batch in enumerate(make_batches(config, start_step, device, rank, world), start_step):
            if number == 4:
                raise RuntimeError("power cut")
            yield batch

    with pytest.raises(RuntimeError, match="power cut"):
        run(resumed, ends_at_4)
    assert load_latest(resumed.train.run_dir).step == 3
    run(resumed)
    assert losses(resumed.train.run_dir) == losses(whole.train.run_dir)
    assert_same_weights(resumed.train.run_dir, whole.train.run_dir)
    assert steps == [*range(6), *range(4), *range(3, 6)]  # each leaves something else out
    model, _, _ = load_model(whole.train.run_dir)
    with torch.no_grad():
        assert model(make_windows(2, 0)[:, :30]).isfinite().all()
