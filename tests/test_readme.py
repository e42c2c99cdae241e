"""Every command block of README.md and CONTRIBUTING.md runs as it stands there, on small inputs, in order."""

import glob
import re
import shlex
import textwrap
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from paths import ROOT

from ping_llm.cli import main
from ping_llm.demo import INTERNET
from ping_llm.eval.baselines import TreeSettings

DOCUMENTS = ("README.md", "CONTRIBUTING.md")
CANNOT_RUN = {
    "make demo": "trains for minutes and runs all tests; tests/test_demo.py and this file run its commands",
    "pip install": "downloads packages",
    "ping-llm fetch": "downloads dumps; tests/data/ingest/test_fetch.py fetches from a server of its own",
    "slurm/submit": "needs SLURM; tests/launch/test_slurm.py starts one",
    "modal volume": "needs an account; tests/launch/test_modal.py runs the script on a stub",
    "ping-llm launch watch": "needs an account; tests/launch/test_gpu_watch.py runs it on a server of its own",
    "ping-llm serve": "answers until it is stopped; tests/serve/test_process.py starts and asks it",
    "ping-llm export exported --push": "needs an account; tests/hf/test_hub.py pushes to a server of its own",
    "src=192.0.2.1 dst=": "is text, no command; tests/hf/test_text.py reads such",
    "ping-llm watch": "listens until it is stopped; tests/watch/test_watch_feeds.py runs it on a server of its own",
    "docker compose": "needs Docker; tests/launch/test_deploy.py builds what the image holds",
    "host1$ torchrun": "needs two machines; tests/training/test_two_hosts.py runs two hosts in name spaces",
}
"""Beginnings of blocks, and why."""
SMALLER = {
    "eval": ["--quick", "--queries", "6", "--model-queries", "1", "--counts", "0", "2", "--src-known", "all"],
    "finetune": ["--train.total-steps", "4"],
}
"""Options that are added to a command, so that it takes seconds. With them, some are the same: one runs."""
FILES = ("csv", "yaml", "text")
"""Languages of blocks that show a file; with a title, a command reads it."""
CONFIG = """
[model]
n_layer = 1
n_embd = 32
n_head = 2
seq_len = 256
[train]
run_dir = "runs/{name}"
batch_size = 8
total_steps = 4
eval_windows = 4
eval_queries = 4
sample_every = 2
device = "cpu"
"""
PING = {"src_addr": "192.0.2.1", "dst_addr": "198.51.100.7"}
PYTHON_NAMES = {
    "queries": pa.Table.from_pylist([PING | {"query_id": "a"}]),
    "pings": pa.Table.from_pylist([PING | {"query_id": "a", "rtt": 12.5}]),
    "src": "211.209.198.145",
    "dst": "199.243.231.233",
    "time_s": 1_767_500_000,
}
"""What the Python blocks take for given."""


def blocks(text: str) -> list[tuple[str, str]]:
    """Language, empty for commands, and content of each fenced block of a document."""
    found = re.findall(r"^ *```(\w*)[^\n`]*\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [(language, textwrap.dedent(content)) for language, content in found]


def commands(block: str) -> list[list[str]]:
    """The words of each command: of lines with a prompt, if there are such, for the others are output."""
    lines = block.replace("\\\n", " ").splitlines()
    prompted = [line[2:] for line in lines if line.startswith("$ ")]
    words = [shlex.split(line, comments=True) for line in prompted or lines]
    return [line for line in words if line]


def cannot_run(block: str) -> bool:
    return any(block.startswith(beginning) for beginning in CANNOT_RUN)


@pytest.fixture
def small_inputs(tmp_path, monkeypatch) -> Path:
    """A folder with all that the blocks take for given: small configs, the dumps, and the results of `make demo`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # else commands set them for good
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(
        "ping_llm.eval.run.QUICK_TREES", TreeSettings(trees=3, leaves=15, practice_queries=400, threads=1)
    )
    for name in ("WINDOWS", "QUERIES"):
        monkeypatch.setattr(f"ping_llm.training.finetune.{name}", 4)
    for name in ("QUICK_WINDOWS", "QUICK_MEASUREMENTS", "QUICK_DESTINATIONS"):
        monkeypatch.setattr(f"ping_llm.eval.diagnose.{name}", 2)
    (tmp_path / "configs" / "sweeps").mkdir(parents=True)
    example = (ROOT / "configs" / "sweeps" / "example.toml").read_text()
    smaller = re.sub(r"(total_steps|eval_every|eval_windows) = \d+", r"\1 = 4", example)
    (tmp_path / "configs" / "sweeps" / "example.toml").write_text(smaller)
    for name in ("tiny", "small", "full"):
        assert (ROOT / "configs" / f"{name}.toml").is_file()
        (tmp_path / "configs").mkdir(exist_ok=True)
        (tmp_path / "configs" / f"{name}.toml").write_text(CONFIG.format(name=name))
    assert main(["synth", "--out", "dumps", *INTERNET[:4], "--days", "0.1", "--workers", "1"]) == 0
    (tmp_path / "out" / "demo").mkdir(parents=True)
    made = {"dump": "dumps", "out/demo/dump": "dumps", "out/demo/run": "runs/tiny", "out/demo/rows": "data/rows"}
    for link, to in made.items():
        (tmp_path / link).symlink_to(tmp_path / to)
    return tmp_path


def run_blocks(
    document: str, run: list[list[str]], capsys: pytest.CaptureFixture, skipped: Callable = cannot_run
) -> None:
    """Runs the blocks of a document in order, but for `skipped` ones, and for what was `run` before, to which it is added;
    blocks of Python share their names."""
    names = dict(PYTHON_NAMES)
    for language, block in blocks((ROOT / document).read_text()):
        if language == "python":
            exec(compile(block, document, "exec"), names)
            continue
        if skipped(block) or language in FILES:
            continue
        for program, *argv in commands(block):
            assert not language and program == "ping-llm", f"{document} has a block that no test runs:\n{block}"
            argv = [file for word in argv for file in (sorted(glob.glob(word)) if "*" in word else [word])]
            argv += [option for option in SMALLER.get(argv[0], []) if option not in argv]
            code = 0 if argv in run else main(argv)
            run.append(argv)
            assert code == 0, f"{document}: {argv} ended with {code}: {capsys.readouterr().err}"


@pytest.mark.slow
def test_every_command_block_runs_as_it_stands(small_inputs, capsys):
    run: list[list[str]] = []
    for document in DOCUMENTS:
        run_blocks(document, run, capsys)
    assert (small_inputs / "runs/sweeps/example/curves.png").is_file()
    assert (small_inputs / "results" / "report.md").is_file() and (
        small_inputs / "runs" / "small" / "report.md"
    ).is_file()


def test_what_cannot_run_is_still_there_and_names_files_that_are():
    listed = [
        block for document in DOCUMENTS for _, block in blocks((ROOT / document).read_text()) if cannot_run(block)
    ]
    assert len(listed) == len(CANNOT_RUN), "an entry of CANNOT_RUN stands for no block, or for several"
    for reason in CANNOT_RUN.values():
        assert all((ROOT / file).is_file() for file in re.findall(r"tests/[\w/]+\.py", reason))
    named = [word for block in listed for word in re.findall(r"(?:configs|scripts|slurm|deploy)/[\w./]+", block)]
    assert len(named) > 5 and all((ROOT / file).is_file() for file in named)


def test_blocks_and_commands_are_found():
    text = "a\n   ```\n   $ ping-llm rtt --src A \\\n         --dst B   # why\n   RTT A → B\n   ```\n```python\nx = 1\n```\n"
    (_, shown), (language, code) = blocks(text)
    assert commands(shown) == [["ping-llm", "rtt", "--src", "A", "--dst", "B"]]
    assert (language, code) == ("python", "x = 1\n")
    assert commands("ping-llm plan a  # b\n\nping-llm plan c\n") == [
        ["ping-llm", "plan", "a"],
        ["ping-llm", "plan", "c"],
    ]
