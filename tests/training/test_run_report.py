"""The report and the curves of a run say what its metrics.jsonl, config.json and machine.json say."""

import json
import math
import re
import subprocess
import sys
import tomllib

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ping_llm.config import FIELDS, Config, ModelConfig, OptimConfig, TrainConfig, config_from_dict, config_to_dict
from ping_llm.training.metrics import read_metrics
from ping_llm.training.plots import plot_run, running_mean, thin
from ping_llm.training.report import to_toml, write_report

PICTURES = ["loss.png", "validation.png", "optimizer.png", "throughput.png"]
VALIDATION_ORANGE, SKIPPED_RED = (0xD1, 0x66, 0x0F), (0xCF, 0x22, 0x2E)
CONFIG = Config(
    model=ModelConfig(n_layer=6),
    optim=OptimConfig(adam_eps=1e-12),
    train=TrainConfig(total_steps=50, max_minutes=30.0, compile=True, wandb_project='a "b" \\ é'),
    seed=3,
)
MACHINE = {"device": "NVIDIA H200", "parameters": 98_600_000, "peak_flops": 9.89e14, "compiled": True, "torch": None}


def evaluation(loss: float | None, error: float) -> dict:
    fields = {f"val_loss_{name}": (i + 1) * 0.1 for i, name in enumerate(FIELDS)}
    return {"val_loss": loss, **fields, "val_rtt_bits": 8 * error, "val_median_rel_error": error}


def training(step: int, **changes) -> dict:
    line = {
        "step": step,
        "time_s": 20.0 * step,
        "tokens": 60_000 * step,
        "loss": 10 / step,
        "lr": 0.02,
        "grad_norm": 0.5,
    }
    line |= {f"loss_{name}": 10 / step for name in FIELDS}
    line |= {"skipped_steps": 0, "tokens_per_s": 3000.0, "mfu": 0.25, "data_wait_share": 0.02, "padding": 0.03}
    return line | {"peak_memory_gb": step / 10} | changes


LINES = [
    {"step": 0, "time_s": 0.0, **evaluation(5.5, 7.0)},
    training(10, tokens_per_s=100.0, mfu=0.01),
    training(20, **evaluation(1.25, 0.1875)),
    training(30, grad_norm=None, skipped_steps=2, loss_rtt=None, **evaluation(None, 0.0625)),
    training(40, skipped_steps=2, **evaluation(1.5, 0.125)),
]


def write_run(folder, lines=LINES, config=CONFIG, machine=MACHINE):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if config:
        (folder / "config.json").write_text(json.dumps({"format_version": 1, "config": config_to_dict(config)}))
    if machine:
        (folder / "machine.json").write_text(json.dumps(machine))
    return folder


def cells(report: str) -> dict[str, list[str]]:
    """First cell of each table row → the others; without the heads."""
    rows = [line.strip("| ").split(" | ") for line in report.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows if row[0] not in ("", "---")}


def has_color(path, color) -> bool:
    pixels = matplotlib.image.imread(path)[:, :, :3]
    return bool((np.abs(pixels - np.array(color) / 255).max(axis=2) < 0.01).any())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("runs") / "a")
    write_report(folder)
    return folder


def test_report_names_the_best_and_the_last_evaluation(run):
    report = cells((run / "report.md").read_text())
    assert report["lowest validation loss"] == ["1.25 nats per token, step 20"]
    assert report["median relative error of the RTT (%), there"] == ["18.75"]
    assert "| lowest loss (step 20) | last (step 40) |" in (run / "report.md").read_text()
    assert report["weighted loss (nats per token)"] == ["1.25", "1.5"]
    assert report["destination (nats per token)"] == ["0.3", "0.3"]
    assert report["RTT (nats per token)"] == ["0.5", "0.5"]
    assert report["bits per RTT"] == ["1.5", "1"]
    assert report["median relative error of the RTT (%)"] == ["18.75", "12.5"]


def test_report_tells_length_speed_skipped_steps_and_machine(run):
    report = cells((run / "report.md").read_text())
    assert report["steps"] == ["40 (limit: 50)"] and report["tokens trained"] == ["2,400,000"]
    assert report["time in training steps"] == ["13 min (limit: 30 min)"]
    assert report["tokens/s"][0] == "3,000" and report["model FLOPs utilisation (%)"][0] == "25.0"
    assert report["time waiting for data (%)"][0] == "2.00" and report["padding (%)"][0] == "3.00"
    assert "Peak memory: 4.0 GB" in (run / "report.md").read_text()
    assert report["skipped steps (gradients not finite)"] == ["2"]
    assert report["device"] == ["NVIDIA H200"] and report["parameters"] == ["98,600,000"]
    assert report["peak of a device (TFLOP/s)"] == ["989"] and report["compiled"] == ["yes"]
    assert "PyTorch" not in report and "damaged" not in (run / "report.md").read_text()


def test_every_picture_the_report_links_to_stands_beside_it(run):
    links = re.findall(r"!\[\w+\]\((.+)\)", (run / "report.md").read_text())
    assert links == [f"plots/{name}" for name in PICTURES]
    for link in links:
        height, width, _ = matplotlib.image.imread(run / link).shape
        assert 800 < width < 2000 and 500 < height < 1500 and 10_000 < (run / link).stat().st_size < 400_000
    assert has_color(run / "plots/loss.png", VALIDATION_ORANGE)
    assert has_color(run / "plots/optimizer.png", SKIPPED_RED)


def test_config_in_the_report_is_the_config_of_the_run(run):
    changed, everything = re.findall(r"```toml\n(.*?)```", (run / "report.md").read_text(), re.DOTALL)
    assert config_from_dict(tomllib.loads(everything), "report") == CONFIG
    assert tomllib.loads(changed) == {
        "seed": 3,
        "model": {"n_layer": 6},
        "optim": {"adam_eps": 1e-12},
        "train": {"total_steps": 50, "max_minutes": 30.0, "compile": True, "wandb_project": CONFIG.train.wandb_project},
    }


@given(st.text(st.characters(codec="utf-8", exclude_characters="\x7f")), st.floats(allow_nan=False), st.integers(0))
def test_toml_reads_back_as_what_was_written(text, number, seed):
    values = {"seed": seed % 2**63, "train": {"run_dir": text, "share": number, "compile": True}}
    assert tomllib.loads(to_toml(values)) == values


def test_a_run_that_logged_little_has_a_report_without_what_it_did_not_log(tmp_path):
    lines = [{"step": step, "loss": 3.0, "grad_norm": None if step == 2 else 1.0} for step in (1, 2, 3)]
    text = write_report(write_run(tmp_path / "old", lines, config=None, machine=None)).read_text()
    assert cells(text) == {"steps": ["3"], "skipped steps (gradients not finite)": ["1"]}
    assert not re.search(r"nan|None|inf\b|Machine|Config|Throughput|Validation", text)
    assert "plots/loss.png" in text and "plots/throughput.png" not in text
    assert not has_color(tmp_path / "old/plots/loss.png", VALIDATION_ORANGE)


@pytest.mark.parametrize(
    "cut", ['{"step": 50, "loss": 0.', '{"loss": 0.1}', "[50]", '{"step": -1}', '{"step": "50"}', "\x00\x00"]
)
def test_damaged_lines_are_left_out_and_counted(tmp_path, cut):
    folder = write_run(tmp_path / "run")
    whole = read_metrics(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(cut)
    metrics = read_metrics(folder)
    assert metrics.damaged == 1 and (metrics.steps == whole.steps).all() and whole.damaged == 0
    assert all(np.array_equal(values, whole.columns[name], equal_nan=True) for name, values in metrics.columns.items())


def test_metrics_are_one_row_a_step_in_order_and_null_is_unknown(tmp_path):
    lines = [{"step": 2, "loss": 1.0, "lr": None}, {"step": 1, "loss": 2}, {"step": 2, "val_loss": 0.5, "loss": 3.0}]
    metrics = read_metrics(write_run(tmp_path / "run", lines))
    assert metrics.steps.tolist() == [1, 2] and metrics.columns["loss"].tolist() == [2.0, 3.0]
    assert [values.tolist() for values in metrics.known("val_loss")] == [[2], [0.5]] and metrics.best_step() == 2
    assert not len(metrics.known("lr")[0]) and not len(metrics.known("absent")[0])


def test_skipped_steps_are_counted_since_the_line_before(tmp_path):
    lines = [{"step": 0}, *({"step": i + 1, "skipped_steps": n} for i, n in enumerate((0, 3, 3, 4)))]
    assert read_metrics(write_run(tmp_path / "run", lines)).skipped.tolist() == [0, 0, 3, 0, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "metrics.jsonl cannot be read"), ("", "holds no line yet"), ('{"st', "holds no line yet")],
)
def test_a_folder_without_metrics_is_refused_in_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    for reads in (plot_run, write_report):
        with pytest.raises(ValueError, match=message) as error:
            reads(tmp_path)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"no run folder .*absent"):
        plot_run(tmp_path / "absent")
    assert not (tmp_path / "plots").exists() and not (tmp_path / "report.md").exists()


def test_a_run_with_nothing_to_draw_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_run(write_run(tmp_path / "run", [{"step": 1, "time_s": 2.0, "loss": None}]))


@pytest.mark.parametrize("name", ["config.json", "machine.json"])
def test_a_damaged_file_is_named(tmp_path, name):
    folder = write_run(tmp_path / "run")
    (folder / name).write_text("[1")
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        write_report(folder)


def test_without_matplotlib_the_report_says_how_to_draw_the_curves(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = write_run(tmp_path / "run")
    text = write_report(folder).read_text()
    assert "pip install 'ping-llm[plots]'" in text and "![" not in text and not (folder / "plots").exists()
    assert cells(text)["lowest validation loss"] == ["1.25 nats per token, step 20"]


def test_a_run_of_two_lines_and_one_of_a_single_line_are_drawn_where_asked(tmp_path):
    for count, name in ((1, "$odd_{ name"), (2, "n" * 200)):
        paths = plot_run(write_run(tmp_path / name, LINES[:count]), tmp_path / f"out{count}")
        assert paths == [tmp_path / f"out{count}" / name for name in (PICTURES if count == 2 else PICTURES[:2])]
        assert all(matplotlib.image.imread(path).shape[1] < 2000 for path in paths)
        assert not (tmp_path / name / "plots").exists()


def test_a_hundred_thousand_lines_are_drawn(tmp_path):
    loss = np.exp(np.random.default_rng(0).normal(size=100_000))
    lines = [f'{{"step": {i + 1}, "loss": {value}, "grad_norm": {value}}}\n' for i, value in enumerate(loss)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert [path.name for path in plot_run(tmp_path)] == ["loss.png", "optimizer.png"]
    assert all(path.stat().st_size < 400_000 for path in (tmp_path / "plots").iterdir())


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200), st.integers(1, 20))
def test_a_thinned_curve_keeps_the_extremes_and_only_points_of_the_curve(values, buckets):
    values = np.array(values)
    steps, kept = thin(np.arange(len(values)), values, buckets)
    assert len(steps) <= 2 * buckets and (np.diff(steps) > 0).all() and (values[steps] == kept).all()
    assert kept.min() == values.min() and kept.max() == values.max()


def test_running_mean_is_the_mean_of_the_neighbours():
    values = np.random.default_rng(1).normal(size=500)
    half = 10  # 2 % of the values
    expected = [values[i - min(half, i) : i + min(half, i) + 1].mean() for i in range(500)]
    assert running_mean(values) == pytest.approx(expected)
    line = np.arange(500.0)
    assert running_mean(line)[: 500 - half] == pytest.approx(line[: 500 - half])  # it does not lag behind a trend
    assert math.isclose(running_mean(np.array([3.0]))[0], 3.0)


def test_plotting_needs_no_torch(run, tmp_path):
    code = "import sys; from ping_llm.training.plots import plot_run; plot_run(*sys.argv[1:]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, run, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
