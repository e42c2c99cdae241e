"""What a run on Modal is said to cost before it is paid for, by the price table or by a speed that was measured."""

from __future__ import annotations

import dataclasses
import json

import pytest
from paths import ROOT

from ping_llm.launch.modal_job import Order, measured, parse_gpu
from ping_llm.launch.plan import GPU, plan_cost
from ping_llm.model.gpt import flops_per_token


def test_a_speed_that_was_measured_on_the_same_gpus_counts(tmp_path):
    order = Order.parse(["--gpu", "H100:8", str(ROOT / "configs/full.toml")], "train", "/tmp", lambda *_: "")
    run, gpu, flops = tmp_path / "run", GPU.named("h100"), flops_per_token(order.config.model)
    assert measured(run) is None
    run.mkdir()
    (run / "metrics.jsonl").write_text(
        '{"step": 0}\n{"step": 1, "tokens_per_s": 9.0}\n{"step": 2, "tokens_per_s": 5e5}\n'
    )
    (run / "machine.json").write_text(json.dumps({"device": "NVIDIA H100 80GB HBM3", "processes": 8}))
    plan = plan_cost(order.config, gpu, 8, mfu=5e5 * flops / (8 * gpu.peak_flops))
    assert plan.hours == pytest.approx(plan.tokens / 5e5 / 3600)
    assert order.cost(measured(run)) == [*plan.lines, "500,000 tokens/s were measured; CPUs and memory come on top"]
    devices = ("A100-SXM4-80GB", "H100 PCIe", "H100 NVL", "GH200 480GB", "H200", "H100 80GB HBM3 MIG 3g.40gb")
    for other in (*({"device": f"NVIDIA {device}"} for device in devices), {"processes": 4}):
        assumed = order.cost(measured(run) | other)
        assert assumed[:-1] == plan_cost(order.config, gpu, 8).lines and "no speed was measured" in assumed[-1]
    assert dataclasses.replace(order, tokens_per_s=5e5).cost() == order.cost(measured(run))


def test_a_speed_that_was_measured_is_that_of_short_windows_too():
    argv = ["--gpu", "H100", str(ROOT / "configs/full.toml"), "--data.short-windows", "16"]
    order = Order.parse(argv, "train", "/tmp", lambda *_: "")
    (line,) = (
        line for line in order.cost({"tokens_per_s": 5e4, "device": "NVIDIA H100", "processes": 1}) if "/s  " in line
    )
    assert line.split()[1] == "50,000"


@pytest.mark.parametrize(
    ("gpu", "device", "same"),
    [("l4", "L40S", False), ("l4", "L4", True), ("l40s", "L40S", True), ("a100", "A100-PCIE-40GB", True),
     ("b200", "GB200", False), ("h200", "H200 NVL", False)],
)  # fmt: skip
def test_a_speed_of_a_gpu_whose_name_is_alike_does_not_count(gpu, device, same):
    order = Order.parse(["--gpu", gpu, str(ROOT / "configs/small.toml")], "train", "/tmp", lambda *_: "")
    lines = order.cost({"tokens_per_s": 1234.0, "device": f"NVIDIA {device}", "processes": 1})
    assert lines[-1].startswith("1,234 tokens/s were measured" if same else "no speed was measured")


def test_a_speed_counts_for_the_machine_that_it_was_measured_on(tmp_path):
    """The run has gone on to an H100, which has not logged anything yet."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "tokens_per_s": 9.0}\n')
    machines = [
        {"device": f"NVIDIA {name}", "processes": 1, "from_step": step} for name, step in (("L4", 0), ("H100", 5))
    ]
    (tmp_path / "machine.json").write_text(json.dumps(machines[1] | {"earlier": machines[:1]}))
    assert measured(tmp_path) == {"tokens_per_s": 9.0, "device": "NVIDIA L4", "processes": 1}
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "tokens_per_s": 80.0}\n')
    assert measured(tmp_path) == {"tokens_per_s": 80.0, "device": "NVIDIA H100", "processes": 1}


def test_a_run_that_ends_by_the_clock_costs_its_minutes():
    arguments = [
        "--gpu",
        "H100:2",
        str(ROOT / "configs/small.toml"),
        "--train.max-minutes",
        "90",
        "--train.total-steps",
        "0",
    ]
    order = Order.parse(arguments, "train", "/tmp", lambda *_: "")
    assert order.cost() == [f"at most 1.5 hours, {1.5 * 2 * 3.95:.2f} dollars"]
    assert parse_gpu("l4") == ("l4", 1)
