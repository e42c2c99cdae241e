"""The command line: help without heavy imports, and one clear line with a non-zero exit for whatever a user gets wrong."""

import bz2
import io
import json
import logging
import os
import shutil
import subprocess
import sys

import pytest
from waiting import HANG_S

from ping_llm.cli import exit_code, main
from ping_llm.data.synthetic.truth import Truth

RESULT = {
    "fw": 5080,
    "type": "ping",
    "af": 4,
    "prb_id": 7,
    "msm_id": 1001,
    "timestamp": 1_700_000_000,
    "lts": 10,
    "proto": "ICMP",
    "from": "192.0.2.1",
    "src_addr": "192.0.2.1",
    "dst_addr": "198.51.100.7",
    "sent": 1,
    "rcvd": 1,
    "result": [{"rtt": 12.5}],
}


def run(*argv) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "ping_llm", *map(str, argv)], capture_output=True, text=True, timeout=HANG_S
    )


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["fetch", "--help"],
        ["prepare", "--help"],
        ["inspect", "--help"],
        ["train", "--help"],
        ["sweep", "--help"],
        ["compare", "--help"],
        ["inspect-model", "--help"],
        ["inference", "rtt", "--help"],
    ],
)
def test_help_answers_without_the_imports_that_take_a_second(argv):
    code = (
        "import sys; from ping_llm.cli import main\n"
        f"try: main({argv!r})\nexcept SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'numpy', 'pyarrow', 'duckdb', 'grain', 'matplotlib'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


@pytest.mark.parametrize(
    "module",
    ["ping_llm", "ping_llm.train", "ping_llm.inference"],
)
def test_commands_are_modules_too(module):
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "usage" in done.stdout


def bad_inputs(tmp_path):
    """What a user may hand to `prepare` by mistake, and what the one line must say."""
    packed = bz2.compress("".join(json.dumps(RESULT | {"timestamp": i}) + "\n" for i in range(9000)).encode())
    (tmp_path / "empty.json").write_bytes(b"")
    (tmp_path / "page.json").write_text("<!DOCTYPE html>\n<html><body>404</body></html>\n")
    (tmp_path / "cut.bz2").write_bytes(packed[: len(packed) // 2])
    return {"absent.bz2": "no file", "empty.json": "is empty", "page.json": "no Atlas dump", "cut.bz2": "is cut off"}


@pytest.mark.parametrize("name", ["absent.bz2", "empty.json", "page.json", "cut.bz2"])
def test_a_bad_dump_is_one_clear_line(tmp_path, name):
    message = bad_inputs(tmp_path)[name]
    done = run("prepare", tmp_path / name, "--out", tmp_path / "rows", "--workers", 1)
    assert_one_line(done, message)
    assert name in done.stderr and not (tmp_path / "rows" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inference", "rtt", "--model", "RUN", "--src", "192.0.2.1", "--dst", "198.51.100.7"], "no checkpoint in"),
        (["inference", "rtt", "--model", "RUN"], "give --src ADDRESS, --dst ADDRESS"),
        (["train", "CONFIG"], 'run "ping-llm prepare'),
        (["train", "absent.toml"], "no config file absent.toml"),
        (["train"], "needs a config file as its first argument"),
        (["inference", "rt"], "no command 'rt'; there are rtt"),
        (
            ["retrain"],
            "no command 'retrain'; there are synth, fetch, prepare, inspect, train, finetune, plot, sweep, compare, eval,",
        ),
    ],
)
def test_a_bad_command_is_one_clear_line(tmp_path, argv, message):
    (tmp_path / "run").mkdir()
    (tmp_path / "config.toml").write_text(f"[data]\nrows = '{tmp_path}'\n[train]\nrun_dir = '{tmp_path}/new'\n")
    places = {"RUN": tmp_path / "run", "CONFIG": tmp_path / "config.toml"}
    assert_one_line(run(*(places.get(word, word) for word in argv)), message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model]\nn_layers = 3", "unknown key model.n_layers; did you mean model.n_layer?"),
        ("[modle]\nn_layer = 3", "unknown key modle; did you mean model?"),
        ("[model]\nn_layer = 'three'", "model.n_layer='three' must be of type int"),
        ("[model]\nn_embd = 650\nn_head = 7", "model.n_embd=650 must be a multiple of model.n_head=7"),
        ("[train]\nprecision = 'fp4'", "train.precision='fp4' must be one of auto, fp32, bf16"),
        ("[optim]\nfinal_lr_share = 0", "a step at rate 0 trains nothing"),
        ("[optim]\nmuon_lr = -1", "optim.muon_lr=-1.0 must be at least 0"),
        ("[optim]\nadam_beta2 = 1.5", "optim.adam_beta2=1.5 must be between 0 and 1"),
        ("[train]\nmax_minutes = nan", "train.max_minutes=nan must be a finite number"),
        ("[model]\nseq_len = 32", "model.seq_len=32 must be at least 64"),
        ("[data", "is not a readable TOML file"),
    ],
)
def test_a_bad_config_is_one_clear_line(tmp_path, capsys, text, message):
    (tmp_path / "c.toml").write_text(text)
    assert main(["train", str(tmp_path / "c.toml")]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def assert_one_line(done, message):
    lines = [line for line in done.stderr.splitlines() if "MB" not in line]  # progress is no message
    assert done.returncode not in (0, None) and "Traceback" not in done.stderr + done.stdout
    assert len(lines) == 1 and message in lines[0], done.stderr


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda rows: (rows / "index.parquet").unlink(), "index.parquet in"),
        (lambda rows: (rows / "index.parquet").write_bytes(b"PAR1"), "index.parquet in"),
        (lambda rows: [shard.write_bytes(b"x" * 100_000) for shard in rows.glob("train-*")], "a shard of train in"),
        (lambda rows: (rows / "manifest.json").write_text("[]"), "is damaged (it is no JSON object)"),
    ],
)
def test_damaged_rows_are_one_clear_line(rows_folder, tmp_path, capsys, spoil, message):
    rows = shutil.copytree(rows_folder, tmp_path / "rows")
    spoil(rows)
    (tmp_path / "c.toml").write_text(
        f"[data]\nrows = '{rows}'\n[train]\nrun_dir = '{tmp_path}/run'\neval_windows = 8\n"
    )
    assert main(["train", str(tmp_path / "c.toml"), "--train.total-steps", "1"]) == 1
    err = capsys.readouterr().err
    assert message in err and "prepare" in err and err.count("\n") == 1


@pytest.mark.parametrize("text", ["[1]", "{}", '{"format_version": 1}', "not JSON"])
def test_a_damaged_truth_is_one_clear_error(tmp_path, text):
    (tmp_path / "truth.json").write_text(text)
    with pytest.raises(ValueError, match=r'is damaged|is of format.*run "ping-llm synth" again'):
        Truth.load(tmp_path)


def test_a_folder_that_is_a_file_is_one_clear_line(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps(RESULT) + "\n")
    (tmp_path / "out").write_text("")
    assert main(["prepare", str(tmp_path / "a.json"), "--out", str(tmp_path / "out"), "--workers", "1"]) == 1
    err = capsys.readouterr().err
    assert str(tmp_path / "out") in err and err.count("\n") == 1


def test_train_sets_up_threads_memory_and_the_cache_of_what_is_compiled_unless_the_user_did(tmp_path):
    """Before torch is imported, which reads them then."""
    (tmp_path / "config.toml").write_text("")
    code = (
        "import os, sys\n"
        "from ping_llm.cli import train\n"
        "class Stop:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n"
        "            names = 'OMP_WAIT_POLICY', 'PYTORCH_ALLOC_CONF', 'TORCHINDUCTOR_CACHE_DIR'\n"
        "            print([os.environ.get(name) for name in names])\n"
        "            os._exit(0)\n"
        "sys.meta_path.insert(0, Stop())\n"
        f"train([{str(tmp_path / 'config.toml')!r}])"
    )
    names = {"OMP_WAIT_POLICY", "PYTORCH_ALLOC_CONF", "TORCHINDUCTOR_CACHE_DIR"}
    bare = {name: value for name, value in os.environ.items() if name not in names}
    own = {"OMP_WAIT_POLICY": "ACTIVE", "PYTORCH_ALLOC_CONF": "", "TORCHINDUCTOR_CACHE_DIR": "here"}
    cache = str(tmp_path / "ping-llm" / "compiled")
    bare["XDG_CACHE_HOME"] = str(tmp_path)
    for given, expected in (
        ({}, ["PASSIVE", "expandable_segments:True", cache]),
        (own, ["ACTIVE", "", "here"]),
    ):
        done = subprocess.run([sys.executable, "-uc", code], capture_output=True, text=True, env=bare | given)
        assert done.stdout == f"{expected}\n", done.stderr


def test_a_warning_is_one_line_though_a_library_prints_what_reaches_the_root(capsys):
    root, stream = logging.getLogger(), io.StringIO()
    handler = logging.StreamHandler(stream)  # as logging.basicConfig of a library adds one
    root.addHandler(handler)
    try:
        assert exit_code(lambda: logging.getLogger("ping_llm.part").warning("it is %s", "so")) == 0
    finally:
        root.removeHandler(handler)
    assert capsys.readouterr().err == "warning: it is so\n" and not stream.getvalue()
    assert logging.getLogger("ping_llm").propagate
