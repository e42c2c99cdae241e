# ruff: noqa: F811  fixtures of another file
"""A sweep on Modal: priced and looked at before a GPU is taken, then each run that is left in a container of its own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from test_modal import call, config, save_step, script  # noqa: F401

from ping_llm.config import load_config
from ping_llm.launch.modal_job import Order
from ping_llm.launch.plan import GPU, plan_cost
from ping_llm.launch.sweep import read_sweep

pytestmark = pytest.mark.filterwarnings("ignore:.*executing locally")


@pytest.fixture
def sweep(tmp_path, config) -> Path:
    """Of four runs over the small config, whose rows are in the Volume."""
    path = tmp_path / "sweep.toml"
    path.write_text("base = 'config.toml'\nout = 'runs/sweep'\nseeds = [0, 1]\n[grid]\nmodel.n_layer = [1, 2]\n")
    return path


@pytest.fixture
def started(script, monkeypatch) -> list[tuple]:
    """What was started on which machines; `look` looks, training fails where there are two layers."""
    started = []

    def train(toml: str, options: list[str], *_) -> dict | Exception:
        if "n_layer = 2" in toml:
            return {"error": "no good"} if "seed=0" in options[-1] else RuntimeError("lost")
        return {"step": 12}

    def there(name, answer):
        def with_options(**machine):
            def starmap(calls, **options):
                return [started.append((name, machine, one, options)) or answer(*one) for one in calls]

            return SimpleNamespace(starmap=starmap)

        monkeypatch.setattr(script, name, SimpleNamespace(with_options=with_options))

    there("look", script.look.local)
    there("train_run", train)
    return started


def test_every_run_that_is_left_is_trained_and_those_that_fail_are_named(script, sweep, started, tmp_path, capsys):
    runs = read_sweep(sweep)
    save_step(tmp_path / runs[0].folder, 12)  # the last one of its run
    with pytest.raises(SystemExit, match="1"):
        script.sweep("--gpu", "L4:2", "--local-disk", "none", str(sweep))
    out, errors = capsys.readouterr()
    names = [f"n_layer={layers},seed={seed}" for layers in (1, 2) for seed in (0, 1)]
    assert "1 of 4 runs are done\n" in out and "runs/sweep/n_layer=1,seed=1: all 12 steps are done" in out
    assert "n_layer=2,seed=0: no good" in out and "n_layer=2,seed=1: lost" in out
    failed = ", ".join(f"runs/sweep/{name}" for name in names[2:])
    assert errors == f"error: 2 of 4 runs failed: {failed}; the lines above say why\n"
    assert [name for name, *_ in started] == ["look"] * 4 + ["train_run"] * 3
    for run, (_, machine, (toml, options, gpus, disk), how) in zip(runs[1:], started[4:], strict=True):
        assert (machine["gpu"], gpus, disk, how) == ("L4:2", 2, "none", {"return_exceptions": True})
        (tmp_path / "there.toml").write_text(toml)
        assert load_config(tmp_path / "there.toml") == run.config
        rows, folder = tmp_path / "data/rows", tmp_path / "runs/sweep" / run.name
        assert options == ["--data.rows", str(rows), "--train.run-dir", str(folder)]


def test_its_price_is_that_of_all_its_runs(script, sweep, started, capsys):
    orders = Order.of_sweep(["--gpu", "L4", str(sweep)], "sweep", "/tmp", lambda name, path: str(path))
    plans = [plan_cost(order.config, GPU.named("l4"), 1) for order in orders]
    assert [order.price() for order in orders] == [(plan.hours, plan.dollars) for plan in plans]
    with pytest.raises(SystemExit):
        script.sweep("--gpu", "L4", str(sweep))
    assert f"4 runs, {sum(plan.dollars for plan in plans):,.2f} dollars in all" in capsys.readouterr().out


def test_a_run_that_ends_by_the_clock_costs_its_minutes_at_most(sweep):
    sweep.write_text(sweep.read_text() + "[config]\ntrain.max_minutes = 90.0\ntrain.total_steps = 1000000000000\n")
    order = Order.of_sweep(["--gpu", "L4:2", str(sweep)], "sweep", "/tmp", lambda name, path: str(path))[0]
    assert order.price() == (1.5, pytest.approx(3 * GPU.named("l4").dollars_per_hour))


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("[grid]\nmodel.n_layers = [1]\n", [], "unknown key model.n_layers; did you mean model.n_layer?"),
        ("[config]\ndata.rows = 'data/none'\n", [], "the Volume ping-llm-data holds no rows at data/none"),
        ("", ["--out", "elsewhere/x"], "must lie below runs/, the Volume ping-llm-runs"),
        ("", ["--gpu", "H100:3"], "train.batch_size=8 must be a multiple of"),
        ("", ["--gpu", "K80"], "has no price of 'K80'"),
    ],
)
def test_what_cannot_be_trained_is_one_clear_line_and_takes_no_gpu(
    script,
    sweep,
    started,
    capsys,
    text,
    options,
    message,
):
    sweep.write_text("base = 'config.toml'\nout = 'runs/sweep'\n" + text)
    with pytest.raises(SystemExit, match="1"):
        script.sweep(*options, str(sweep))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert "train_run" not in [name for name, *_ in started]


def test_a_look_says_whether_a_run_is_done(script, config, tmp_path):
    save_step(tmp_path / "runs/small", 4)
    assert script.look.local(*call(script, config))["done"] is False
    save_step(tmp_path / "runs/small", 12)
    assert script.look.local(*call(script, config))["done"] is True
