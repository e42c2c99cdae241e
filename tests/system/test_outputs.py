"""Outputs are tried before the work: one line, a non-zero exit code, and nothing done."""

import os
import resource
import stat
from pathlib import Path

import pytest
from training_runs import write_config

from ping_llm.cli import main
from ping_llm.system.files import try_file, try_folder

NO_WORK = {
    "synth": "ping_llm.data.synthetic.synthesize.synthesize",
    "prepare": "ping_llm.data.ingest.prepare.prepare",
    "fetch": "ping_llm.data.ingest.fetch.fetch",
    "inspect": "ping_llm.data.inspect.summary.summarize",
    "batch": "ping_llm.inference.files.read_input",
    "score": "ping_llm.inference.files.read_measurements",
    "model": "ping_llm.inference.cli.ModelOptions.load",
    "eval": "ping_llm.eval.run._open_run",
    "look": "ping_llm.eval.diagnose.diagnose",
    "train": "ping_llm.training.trainer.Training.run",
    "plot": "ping_llm.training.plots._draw",
}
"""What each command must not reach."""
ENDS = ["--src", "192.0.2.1", "--dst", "198.51.100.7"]
FOLDERS = {
    "synth": ["synth", "--out"],
    "prepare": ["prepare", "ROWS", "--out"],
    "fetch": ["fetch", "--dump", "2026-11-01", "--archive", "http://192.0.2.1", "--out"],
    "inspect": ["inspect", "ROWS", "--plots"],
    "train": ["train", "CONFIG", "--train.run-dir"],
    "plot": ["plot", "RUN", "--out"],
    "eval": ["eval", "RUN", "--model-only", "--out"],
}
FILES = {
    "batch": ["inference", "batch", "--model", "RUN", "--input", "q.csv", "--output"],
    "score": ["inference", "score", "--model", "RUN", "--input", "q.csv", "--output"],
    "dst": ["inference", "dst", "--model", "RUN", "--src", "192.0.2.1", "--output"],
    "rank": ["inference", "rank", "--model", "RUN", *ENDS, "--output"],
    "sample": ["inference", "sample", "--model", "RUN", "--output"],
    "rtt": ["inference", "rtt", "--model", "RUN", *ENDS, "--plot"],
    "look": ["eval", "RUN", "--diagnose", "order", "--json"],
}


@pytest.fixture
def refused(tmp_path, rows_folder, capsys, monkeypatch):
    """The one line with which a command refuses an output, before it does anything."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # else commands set them for good
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    config = write_config(tmp_path / "config.toml", rows_folder)
    places = {"ROWS": rows_folder, "RUN": tmp_path / "run", "CONFIG": config}

    def not_reached(*_, **__):
        raise AssertionError("work was begun")

    for name in NO_WORK.values():
        monkeypatch.setattr(name, not_reached)

    def refuse(argv: list[str], output: Path) -> str:
        assert main([*(str(places.get(word, word)) for word in argv), str(output)]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1
        return err.removeprefix("error: ").strip()

    return refuse


@pytest.mark.parametrize("argv", FOLDERS.values(), ids=FOLDERS)
def test_a_folder_that_cannot_be_written_is_refused(refused, tmp_path, argv):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert str(tmp_path / "file") in refused(argv, out)
    assert (tmp_path / "file").read_text() == "mine"
    assert "cannot be written" in refused(argv, Path("/sys/ping-llm"))  # a place that nobody writes to


@pytest.mark.parametrize("argv", FILES.values(), ids=FILES)
def test_a_file_that_cannot_be_written_is_refused(refused, tmp_path, argv):
    suffix = ".png" if argv[1] == "rtt" else ".csv"
    for name, message in ((f"folder{suffix}", "is a folder; name a file"), (f"absent/x{suffix}", "there is no folder")):
        (tmp_path / f"folder{suffix}").mkdir(exist_ok=True)
        assert message in refused(argv, tmp_path / name)
    assert "cannot be written" in refused(argv, Path(f"/sys/x{suffix}"))
    if argv[0] == "inference":
        assert "x.doc: a " in refused(argv, tmp_path / "x.doc")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.toml", f"folder{suffix}", "run"]


IN_THE_WAY = {"synth": "truth.json", "prepare": "manifest.json", "fetch": "fetch.json"}
IN_THE_WAY |= {"eval": "results.json", "train": "metrics.jsonl", "plot": "loss.png"}


@pytest.mark.parametrize(("command", "name"), IN_THE_WAY.items())
def test_a_folder_in_the_way_of_one_of_the_files_is_refused(refused, tmp_path, command, name):
    (tmp_path / "out" / name).mkdir(parents=True)
    assert refused(FOLDERS[command], tmp_path / "out").startswith(f"{tmp_path / 'out' / name} is a folder")


def test_more_distributions_than_a_picture_shows_are_refused(refused, tmp_path):
    many = [word for i in range(9) for word in ("--dst", f"198.51.100.{i}")]
    argv = ["inference", "rtt", "--model", "RUN", "--src", "192.0.2.1", *many, "--plot"]
    assert refused(argv, tmp_path / "x.png") == "9 distributions are too many for one picture; draw at most 8"


def test_a_full_disk_is_told_by_trying(tmp_path):
    """A file may be made on a full disk, but not filled; here the limit is on the size of files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        for attempt, path in ((try_file, tmp_path / "x.csv"), (try_folder, tmp_path / "out")):
            with pytest.raises(ValueError, match=r"cannot be written \(File too large\)"):
                attempt(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_permission_is_told_by_trying(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    for attempt, path in ((try_file, tmp_path / "x.csv"), (try_folder, tmp_path / "out"), (try_folder, tmp_path)):
        with pytest.raises(ValueError, match=r"cannot be written \(Permission denied\)"):
            attempt(path)


def test_trying_leaves_what_is_there(tmp_path):
    (tmp_path / "x.csv").write_text("kept")
    try_file(tmp_path / "x.csv")
    try_folder(tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x.csv", "kept")]
