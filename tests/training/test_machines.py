"""What a run keeps when it goes on elsewhere: its number format, and the facts of every machine that it was on."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from training_runs import assert_same_weights, losses, make_batches, make_config, run

from ping_llm.model.checkpoint import load_latest
from ping_llm.training import objective, run_state
from ping_llm.training.metrics import add_machine, read_machines, write_machines
from ping_llm.training.report import write_report


@pytest.fixture
def machine(monkeypatch):
    """A function that makes this machine another one: its name, and whether it multiplies bf16 natively."""

    def become(device: str, bf16: bool) -> None:
        monkeypatch.setattr(objective, "native_bf16", lambda _: bf16)
        monkeypatch.setattr(run_state, "machine_facts", lambda _: {"host": f"of {device}", "device": device})

    return become


def stopped_after(steps: int):
    """Batches of a run that is sent a signal to stop in a step."""

    def batches(config, start_step, *given):
        for step, batch in enumerate(make_batches(config, start_step, *given), start_step):
            if step == steps - 1:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    return batches


def auto(run_dir: Path):
    return make_config(run_dir, precision="auto", total_steps=6)


@pytest.mark.parametrize(("first", "then", "precision"), [(True, False, "bf16"), (False, True, "fp32")])
def test_auto_stays_the_precision_that_the_run_began_with(tmp_path, machine, first, then, precision):
    machine("one", bf16=first)
    run(auto(tmp_path / "whole"))
    assert run(auto(tmp_path / "moved"), stopped_after(3)).precision == precision
    machine("other", bf16=then)
    assert run(auto(tmp_path / "moved")).precision == precision
    assert_same_weights(tmp_path / "whole", tmp_path / "moved")
    assert losses(tmp_path / "whole") == losses(tmp_path / "moved")
    assert [facts["precision"] for facts in read_machines(tmp_path / "moved")] == [precision] * 2
    machine("other", bf16=then)
    assert run(auto(tmp_path / "new")).precision == {"bf16": "fp32", "fp32": "bf16"}[precision]


def test_a_run_of_before_takes_the_precision_from_its_machine(tmp_path, machine):
    """Its checkpoints did not hold it, and its machine.json was of one machine, with no step."""
    machine("one", bf16=True)
    run(auto(tmp_path), stopped_after(3))
    (state,) = tmp_path.glob("checkpoints/*/state.json")
    values = json.loads(state.read_text())
    state.write_text(json.dumps({k: v for k, v in values.items() if k not in ("precision", "state_sha256")}))
    (tmp_path / "machine.json").write_text('{"device": "one", "processes": 1, "precision": "bf16"}')
    machine("other", bf16=False)
    assert run(auto(tmp_path)).precision == "bf16" == load_latest(tmp_path).state["precision"]
    assert [(facts["device"], facts.get("from_step", 0)) for facts in read_machines(tmp_path)] == [
        ("one", 0),
        ("other", 3),
    ]


def test_every_machine_of_a_run_is_kept_with_its_first_step(tmp_path, machine):
    for name, steps in (("a", 2), ("a", 3), ("b", 4), ("a", 5)):
        machine(name, bf16=False)
        run(auto(tmp_path), stopped_after(steps))
    machine("c", bf16=False)
    run(auto(tmp_path))
    facts = json.loads((tmp_path / "machine.json").read_text())
    assert facts["device"] == "c" and facts["from_step"] == 5 and facts["deterministic"] is False
    assert [(each["device"], each["from_step"]) for each in facts["earlier"]] == [("a", 0), ("b", 3), ("a", 4)]
    report = write_report(tmp_path).read_text()
    assert "|  | after step 0 | after step 3 | after step 4 | after step 5 |" in report
    assert "| device | a | b | a | c |" in report and "from_step" not in report and "earlier" not in report


def test_a_machine_whose_steps_are_all_repeated_is_not_of_the_run():
    a, b, c = ({"device": name} for name in "abc")
    machines = add_machine(add_machine([], a, 0), b, 10)
    assert add_machine(machines, c, 10) == [a | {"from_step": 0}, c | {"from_step": 10}]
    assert add_machine(machines, a, 10) == [a | {"from_step": 0}]
    assert add_machine(machines, b, 20) == machines
    assert add_machine(machines, c, 0) == [c | {"from_step": 0}]


def test_machines_read_back_as_they_were_written(tmp_path):
    machines = [{"device": name, "from_step": step} for step, name in enumerate("abc")]
    write_machines(tmp_path, machines)
    assert read_machines(tmp_path) == machines and read_machines(tmp_path / "none") == []
    for damaged in ("[1]", "{", '{"earlier": 1}'):
        (tmp_path / "machine.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"machine.json is damaged; remove it to go on without it$"):
            read_machines(tmp_path)
