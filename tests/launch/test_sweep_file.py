"""A sweep file becomes runs that are checked before any of them starts, with names that say what differs."""

import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paths import CONFIGS

from ping_llm.config import config_to_dict, differing_fields, load_config
from ping_llm.launch.sweep import CONFIG_NAME, check_sweep, describe, flatten, read_sweep, short_name, standing
from ping_llm.launch.sweep_array import main, ranges
from ping_llm.model.checkpoint import save_config

BASE = "[model]\nn_embd = 64\nn_head = 2\n[train]\nbatch_size = 8\n"


@pytest.fixture
def write(tmp_path):
    """Writes a sweep file over a small base config."""
    (tmp_path / "base.toml").write_text(BASE)

    def write(text: str, base: bool = True) -> Path:
        path = tmp_path / "sweep.toml"
        path.write_text(('base = "base.toml"\n' if base else "") + text)
        return path

    return write


def names(runs):
    return [run.name for run in runs]


def test_a_grid_is_every_combination_with_every_seed(write):
    runs = read_sweep(write("seeds = [0, 7]\n[grid]\nmodel.n_layer = [2, 4]\n'optim.muon_lr' = [0.01, 0.02]\n"))
    assert names(runs) == [
        f"n_layer={layers},muon_lr={rate},seed={seed}" for layers in (2, 4) for rate in (0.01, 0.02) for seed in (0, 7)
    ]
    assert [(r.config.model.n_layer, r.config.optim.muon_lr, r.config.seed) for r in runs] == [
        (layers, rate, seed) for layers in (2, 4) for rate in (0.01, 0.02) for seed in (0, 7)
    ]
    assert {run.config.model.n_embd for run in runs} == {64}
    assert [run.folder for run in runs] == [Path("runs/sweeps/sweep") / run.name for run in runs]


def test_a_list_of_overrides_goes_over_the_config_and_that_over_the_base(write):
    text = "out = 'runs/x'\n[config]\nmodel.n_embd = 32\ntrain.batch_size = 16\n"
    text += "[[runs]]\nname = 'wide'\nmodel.n_embd = 128\n[[runs]]\nmodel.n_head = 4\n[[runs]]\n"
    runs = read_sweep(write(text))
    assert names(runs) == ["wide,seed=0", "n_head=4,seed=0", "base,seed=0"]
    assert [(r.config.model.n_embd, r.config.model.n_head) for r in runs] == [(128, 2), (32, 4), (32, 2)]
    assert {run.config.train.batch_size for run in runs} == {16} and runs[0].folder == Path("runs/x/wide,seed=0")
    assert read_sweep(write(text), Path("elsewhere"))[0].folder == Path("elsewhere/wide,seed=0")


def test_a_list_and_a_grid_make_each_pair(write):
    runs = read_sweep(write("[grid]\nmodel.n_layer = [1, 2]\n[[runs]]\nname = 'a'\n[[runs]]\nmodel.n_embd = 32\n"))
    pairs = ["a,n_layer=1", "a,n_layer=2", "n_embd=32,n_layer=1", "n_embd=32,n_layer=2"]
    assert names(runs) == [f"{pair},seed=0" for pair in pairs]


def test_training_seeds_and_seeds_of_the_initial_weights_vary_apart(write):
    runs = read_sweep(write("seeds = [0, 1]\ninit_seeds = [1, 5]\n"))
    assert [(r.name, r.config.seed, r.config.weights_seed) for r in runs] == [
        (f"base,seed={seed},init={init}", seed, init) for seed in (0, 1) for init in (1, 5)
    ]
    (alone,) = read_sweep(write("seeds = [3]\n"))
    assert (alone.config.init_seed, alone.config.weights_seed) == (0, 3)


def test_the_config_of_a_run_is_written_whole(write, tmp_path):
    (run,) = read_sweep(write(f"out = '{tmp_path}/runs'\n[config]\ndata.rows = 'a \"b\" é'\n"))
    path = run.write_config()
    assert path == tmp_path / "runs/base,seed=0" / CONFIG_NAME
    assert load_config(path) == run.config and tomllib.loads(path.read_text()) == config_to_dict(run.config)


def test_without_a_base_the_defaults_hold(write):
    (run,) = read_sweep(write("[config]\nmodel.n_layer = 1\n", base=False))
    assert (run.config.model.n_layer, run.config.model.n_embd) == (1, 160)


BAD = {
    "seedz = [1]": "sweep.toml: unknown key seedz; did you mean seeds?",
    "[grid]\nmodel.n_layers = [1]": "run model.n_layers=1,seed=0: unknown key model.n_layers; did you mean model.n_layer?",
    "[config]\ntrain.total_step = 1": "sweep.toml: unknown key train.total_step; did you mean train.total_steps?",
    "[[runs]]\nmodle.n_layer = 1": "unknown key modle; did you mean model?",
    "[[runs]]\n'seeds.a' = 1": "unknown key seeds; did you mean seed?",
    "[grid]\nn_embd = [64]": "run n_embd=64,seed=0: unknown key n_embd; did you mean model.n_embd?",
    "[grid]\nn_layers = [64]": "unknown key n_layers; did you mean model.n_layer?",
    "[grid]\nxyzzy = [64]": "unknown key xyzzy; known: model, data, loss",
    "[config]\n'model.n_layer.x' = 1": "unknown key model.n_layer.x; n_layer is no table",
    "[grid]\nmodel.n_layer = [1, 'two']": "model.n_layer='two' must be of type int",
    "[grid]\nmodel.n_layer = [1, 0]": "run n_layer=0,seed=0: model.n_layer=0 must be at least 1",
    "[grid]\nmodel.n_layer = 2": "grid model.n_layer=2 must be a list of values",
    "[grid]\nmodel.n_layer = []": "grid model.n_layer=[] must be a list of values",
    "[grid]\nmodel.n_head = [2, 3]": "run n_head=3,seed=0: model.n_embd=64 must be a multiple of model.n_head=3",
    "[grid]\nmodel.n_layer = [2, 2]": "runs two called n_layer=2,seed=0 are the same",
    "[[runs]]\nmodel.n_layer = 4\n[[runs]]": "runs n_layer=4,seed=0 and base,seed=0 are the same",
    "[[runs]]\nname = 'a'\n[[runs]]\nname = 'a'\nmodel.n_layer = 1": "two called a,seed=0",
    "[[runs]]\nname = 'a/b'": "name='a/b' of run 1 must be of letters",
    "[[runs]]\nmodel.n_layer = 1\n[grid]\nmodel.n_layer = [1]": "model.n_layer stands in [grid] and in [[runs]]",
    "[grid]\nseed = [0, 1]": "seed is set by the sweep; give seeds at the top of the file",
    "[config]\ntrain.run_dir = 'x'": "train.run_dir is set by the sweep; give out at the top of the file",
    "seeds = [1, 1]": "seeds=[1, 1] holds a seed twice",
    "init_seeds = [0, 1]": "init_seeds=[0, 1] must be 1 or more",
    "seeds = []": "seeds=[] must hold one seed or more",
    "seeds = 3": "seeds=3 must be of type list of int",
    "seeds = ['a']": "seeds=['a'] must be of type list of int",
    "seeds = [-1]": "seed=-1 must be between 0 and",
    "grid = 3": "grid=3 must be of type dict",
    "out = 3": "out=3 must be of type str",
    f"seeds = {[*range(1001)]}": "has 1,001 runs, more than 1,000",
    "[config": "is not a readable TOML file",
}  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_a_mistake_is_named_before_any_run_starts(write, text):
    with pytest.raises(ValueError, match=re.escape(BAD[text])):
        read_sweep(write(text + "\n"))


def test_a_mistake_of_the_base_is_said_to_be_there(write, tmp_path):
    path = write("")
    (tmp_path / "base.toml").write_text("[model]\nn_layr = 1\n")
    with pytest.raises(ValueError, match=r"base\.toml: unknown key model\.n_layr; did you mean model\.n_layer\?"):
        read_sweep(path)
    (tmp_path / "base.toml").unlink()
    with pytest.raises(ValueError, match=r"no config file .*base\.toml"):
        read_sweep(path)
    with pytest.raises(ValueError, match=r"no config file .*none\.toml; configs/sweeps/example\.toml is one"):
        read_sweep(tmp_path / "none.toml")


def test_the_sweeps_of_the_project_are_what_they_say():
    example, noise = (read_sweep(CONFIGS / "sweeps" / f"{name}.toml") for name in ("example", "noise"))
    assert len(example) == 4 and {run.folder.parent for run in example} == {Path("runs/sweeps/example")}
    assert sum(r.config.train.total_steps * r.config.train.batch_size for r in example) * 256 <= 4 * 60 * 2 * 18_000 / 2
    assert len({(run.config.seed, run.config.init_seed) for run in noise}) == len(noise) == 16
    of_record = load_config(CONFIGS / "quality.toml")
    assert set(differing_fields(of_record, noise[0].config)) == {
        "train.total_steps", "train.batch_size", "train.eval_queries", "data.replay_share", "init_seed",
        "model.value_embeddings", "data.short_windows",
    }  # fmt: skip
    switches = read_sweep(CONFIGS / "sweeps/switches.toml")
    plain, *turned = [run for run in switches if run.config.seed == 0]
    assert plain.name == "base,seed=0" and len(turned) >= 12 and len(switches) == 2 * (1 + len(turned))
    exceptions = {"residual_scalars", "first_batch_size", "short_windows"}  # two fields that go together
    for run in turned:
        fields = differing_fields(plain.config, run.config)
        assert len(fields) == (2 if any(name in run.name for name in exceptions) else 1), run.name


# Names


@given(
    st.dictionaries(
        st.sampled_from(["model.n_layer", "data.rows", "train.precision", "optim.muon_lr", "loss.rtt"]),
        st.one_of(st.integers(), st.floats(allow_nan=False), st.text(max_size=200), st.booleans()),
        min_size=1,
    )
)
def test_a_name_is_a_file_name_of_its_own_and_depends_on_the_overrides_alone(overrides):
    name = describe(overrides)
    assert re.fullmatch(r"[A-Za-z0-9_.,=+-]{1,100}", name) and name == describe(dict(overrides))
    for key, value in overrides.items():
        assert describe(overrides | {key: f"{value} "}) != name


def test_names_are_short_where_they_can_be():
    assert [short_name(key) for key in ("model.n_layer", "train.rtt", "model.unknown")] == [
        "n_layer", "rtt", "model.unknown"
    ]  # fmt: skip
    assert describe({"model.field_aware": True, "optim.muon_lr": 1e-5}) == "field_aware=true,muon_lr=1e-05"
    assert re.fullmatch(r"rows=-data-x-[0-9a-f]{8}", describe({"data.rows": "/data/x"}))


def test_tables_become_dotted_keys():
    assert flatten({"a": {"b": 1, "c": {"d": []}}, "e.f": 2}) == {"a.b": 1, "a.c.d": [], "e.f": 2}


# Folders of runs


def test_a_folder_of_another_run_and_absent_rows_are_refused(write, tmp_path, rows_folder):
    text = f"out = '{tmp_path}/runs'\n[config]\ndata.rows = '{{}}'\ntrain.batch_size = {{}}\n"
    with pytest.raises(ValueError, match=r"no rows in nowhere; run"):
        check_sweep(read_sweep(write(text.format("nowhere", 8))))
    (run,) = runs = read_sweep(write(text.format(rows_folder, 8)))
    assert check_sweep(runs) == runs and standing(run) == "not begun"
    save_config(run.folder, run.config)
    assert check_sweep(runs) == runs
    (run.folder / "DONE").touch()
    assert check_sweep(runs) == [] and standing(run) == "done"
    with pytest.raises(ValueError, match=r"holds a run with another train\.batch_size; give the sweep another --out"):
        check_sweep(read_sweep(write(text.format(rows_folder, 16))))


# Job arrays


@given(st.sets(st.integers(0, 200), min_size=1))
def test_ranges_stand_for_the_numbers_that_they_are_made_of(numbers):
    spans = [list(map(int, part.split("-"))) for part in ranges(sorted(numbers)).split(",")]
    assert sorted(numbers) == [n for span in spans for n in range(span[0], span[-1] + 1)]


def test_the_list_of_an_array_holds_every_run_and_the_numbers_are_of_those_that_are_left(
    write, tmp_path, rows_folder, capsys
):
    text = "out = '{}'\n[config]\ndata.rows = '{}'\n[grid]\nmodel.n_layer = [1, 2, 3, 4]\n"
    path = write(text.format(tmp_path / "runs", rows_folder))
    runs = read_sweep(path)
    for done in (1, 3):
        runs[done].folder.mkdir(parents=True)
        (runs[done].folder / "DONE").touch()
    assert main([str(path)]) == 0
    listed, numbers = capsys.readouterr().out.split()
    assert numbers == "0,2"
    configs = Path(listed).read_text().splitlines()
    assert [load_config(config) for config in configs] == [run.config for run in runs]
    assert main([str(path)]) == 0 and capsys.readouterr().out.split()[0] == listed
    for run in runs:
        run.folder.mkdir(exist_ok=True)
        (run.folder / "DONE").touch()
    assert main([str(path)]) == 0
    assert capsys.readouterr() == ("", f"all 4 runs in {tmp_path / 'runs'} are done\n")
    path.write_text("grod = 1")
    assert main([str(path)]) == 1
    assert capsys.readouterr().err == f"error: {path}: unknown key grod; did you mean grid?\n"
