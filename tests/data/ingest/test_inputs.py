"""Pipes and standard input are read once and leave nothing behind; two processes never write into one folder."""

import gzip
import json
import os
import socket
import subprocess
import sys
import threading

import pytest
from pings import ndjson, ping, write

from ping_llm.cli import main
from ping_llm.data.ingest import inputs, job_array, tasks
from ping_llm.data.ingest import prepare as prepare_module
from ping_llm.data.ingest.inputs import find_inputs, packed_suffix, streams
from ping_llm.data.ingest.prepare import plan_rows, prepare
from ping_llm.system.files import write_lock

RESULTS = [ping(timestamp=1_700_000_000 + i, prb_id=i % 7, src_addr=f"192.0.2.{i % 7}") for i in range(300)]
PREPARE = [sys.executable, "-m", "ping_llm", "prepare"]


@pytest.fixture
def dump(tmp_path):
    return write(tmp_path / "a.gz", ndjson(*RESULTS))


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def shards(folder):
    return {name: content for name, content in files(folder).items() if name != "manifest.json"}


def shell(tmp_path, text):
    """Runs bash in a folder with `ping-llm` as a function."""
    command = f'ping-llm() {{ {sys.executable} -m ping_llm "$@"; }}; {text}'
    return subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120)


def scratch_left(tmp_path, out):
    return [path.name for path in (tmp_path / out / ".partial").glob("spool*")]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("ping-llm prepare <(cat a.gz) --out out", "pipe"),
        ("ping-llm prepare <(zcat a.gz) --out out", "pipe"),
        ("cat a.gz | ping-llm prepare /dev/stdin --out out", "stdin"),
        ("cat a.gz | ping-llm prepare - --out out", "stdin"),
        ("ping-llm prepare /dev/stdin --out out < a.gz", "stdin"),
        ("mkfifo f.json; cat a.gz > f.json & ping-llm prepare f.json --out out", "f.json"),
        ("mkfifo d/f.json; cat a.gz > d/f.json & ping-llm prepare d --out out", "f.json"),
    ],
)
def test_a_pipe_is_a_dump_whatever_it_is_called(dump, tmp_path, text, name):
    (tmp_path / "d").mkdir()
    done = shell(tmp_path, f"{text} --workers 1")
    assert done.returncode == 0, done.stderr
    prepare([dump], tmp_path / "want", workers=1)
    assert shards(tmp_path / "out") == shards(tmp_path / "want")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [entry["name"] for entry in manifest["inputs"]] == [name]
    assert not (tmp_path / "out" / ".partial").exists()


def test_the_same_pipes_again_are_the_same_rows(dump, tmp_path):
    more = write(tmp_path / "b.gz", ndjson(*(result | {"timestamp": 1_800_000_000} for result in RESULTS[:9])))
    for pipes in (f"<(cat {dump}) <(cat {more})", f"<(cat {more}) <(true) 5< <(cat {dump}) /dev/fd/5"):
        done = shell(tmp_path, f"ping-llm prepare {pipes.replace('<(true) ', '')} --out out --workers 1")
        assert done.returncode == 0, done.stderr
    assert "already holds these rows" in done.stderr


def test_inspect_reads_a_pipe_and_leaves_nothing_in_the_scratch_folder(dump, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    done = shell(tmp_path, f"TMPDIR={scratch} ping-llm inspect <(cat a.gz) --json")
    assert json.loads(done.stdout)["measurements"] == len(RESULTS), done.stderr
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("content", [gzip.compress(ndjson(*RESULTS))[:-20], b"<html>\n", b"PK\x03\x04"])
def test_after_an_error_nothing_is_left_of_a_pipe_and_a_second_try_works(dump, tmp_path, content):
    (tmp_path / "bad").write_bytes(content)
    done = shell(tmp_path, "cat bad | ping-llm prepare - a.gz --out out --workers 1")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: stdin is "), done.stderr
    assert scratch_left(tmp_path, "out") == []
    done = shell(tmp_path, "cat a.gz | ping-llm prepare - --out out --workers 1")
    assert done.returncode == 0, done.stderr


def test_an_interrupted_run_leaves_nothing_of_a_pipe(dump, tmp_path, monkeypatch):
    fifo = tmp_path / "f.json"
    os.mkfifo(fifo)
    writer = threading.Thread(target=lambda: fifo.write_bytes(dump.read_bytes()))
    writer.start()
    seen = []

    def interrupted(*_):
        seen.extend(scratch_left(tmp_path, "out"))
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, "_run_maps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare([fifo], tmp_path / "out", workers=1)
    writer.join()
    assert len(seen) == 1 and scratch_left(tmp_path, "out") == []


def test_what_a_killed_run_left_of_a_pipe_is_gone_after_the_next(dump, tmp_path, monkeypatch):
    left = tmp_path / "out" / ".partial" / "spool-00000" / "stdin"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"old")
    monkeypatch.setattr(prepare_module, "_run_maps", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare([dump], tmp_path / "out", workers=1)
    assert scratch_left(tmp_path, "out") == []


def test_what_can_be_read_only_once_is_neither_planned_for_nor_given_to_a_job_array(tmp_path):
    fifo = tmp_path / "f.json"
    os.mkfifo(fifo)
    with pytest.raises(ValueError, match=r"f\.json cannot be planned for, its size is not known; name files"):
        plan_rows([fifo])
    with pytest.raises(ValueError, match=r"f\.json can be read only once, and by no other job; name files"):
        prepare([fifo], tmp_path / "out", executor="array")
    assert not (tmp_path / "out").exists()


def test_devices_and_folders_with_the_name_of_a_dump_are_refused(tmp_path, monkeypatch):
    (tmp_path / "d" / "a.json").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"/dev/zero is a device"):
        find_inputs(["/dev/zero"])
    with pytest.raises(ValueError, match=r"a\.json is a folder, though its name is that of a dump"):
        find_inputs([tmp_path / "d"])
    with pytest.raises(ValueError, match="null is empty"):
        prepare(["/dev/null"], tmp_path / "out", workers=1)
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ValueError, match="standard input is closed"):
        prepare(["-"], tmp_path / "out2", workers=1)
    assert not (tmp_path / "out2").exists()


def test_a_link_is_the_file_that_it_leads_to_under_its_own_name(dump, tmp_path):
    (tmp_path / "link.json").symlink_to(dump)
    assert find_inputs([dump, tmp_path / "link.json", tmp_path / "*.gz"]) == {dump: "a.gz"}
    assert find_inputs([tmp_path / "link.json"]) == {dump: "link.json"}
    assert streams(find_inputs([dump])) == []
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "b.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"b\.json is a link to a file that is not there"):
        prepare([tmp_path / "d"], tmp_path / "out", workers=1)


def test_a_file_that_was_deleted_while_it_is_open_is_read_as_a_pipe_is(dump, tmp_path):
    done = shell(tmp_path, "exec 5< a.gz; rm a.gz; ping-llm prepare /dev/fd/5 --out out --workers 1")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["lines"]["read"] == len(RESULTS)


def test_standard_input_may_be_a_socket(dump, tmp_path):
    here, there = socket.socketpair()
    with here, there:
        here.sendall(dump.read_bytes())
        here.shutdown(socket.SHUT_WR)
        command = [*PREPARE, "/dev/stdin", "--out", tmp_path / "out", "--workers", "1"]
        done = subprocess.run(command, stdin=there, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_size_of_a_plan_depends_on_the_content_of_a_file_not_on_its_name(dump, tmp_path):
    assert packed_suffix(dump) == ".gz"
    renamed = tmp_path / "renamed.json"
    renamed.write_bytes(dump.read_bytes())
    assert plan_rows([renamed]).results == plan_rows([dump]).results


def test_a_second_process_is_refused_and_the_first_one_makes_the_rows_of_a_run_alone(dump, tmp_path):
    """The first one holds the folder while it reads a pipe, which the test writes once the second one has ended."""
    fifo, out = tmp_path / "f.json", tmp_path / "out"
    other = write(tmp_path / "b.gz", ndjson(*RESULTS[:50]))
    os.mkfifo(fifo)
    first = subprocess.Popen(
        [*PREPARE, fifo, "--out", out, "--workers", "1"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with fifo.open("wb") as file:  # opens when the first process has opened it to read
        second = subprocess.run([*PREPARE, other, "--out", out, "--workers", "1"], capture_output=True, text=True)
        refused = f"error: another process writes to {out}; wait for it, or choose another folder\n"
        assert (second.returncode, second.stderr) == (1, refused)
        file.write(dump.read_bytes())
    _, err = first.communicate(timeout=120)
    assert first.returncode == 0, err
    prepare([dump], tmp_path / "want", workers=1)
    assert shards(out) == shards(tmp_path / "want")
    assert main(["prepare", str(other), "--out", str(out), "--workers", "1"]) == 1  # other inputs, and nobody writes


def test_parts_of_a_job_array_run_side_by_side_but_no_other_prepare_does(dump, tmp_path, monkeypatch):
    out, command = tmp_path / "out", ["prepare", str(dump), "--out", str(tmp_path / "out"), "--workers", "1"]
    other = write(tmp_path / "b.gz", ndjson(*RESULTS[:50]))
    with pytest.raises(SystemExit):
        main([*command, "--executor", "array"])
    path, real = out / ".partial" / "tasks.json", tasks.map_dump
    answers = []

    def busy(task):
        with pytest.raises(ValueError, match="another process writes to"):
            prepare([other], out, workers=1)
        with write_lock(out, out / ".partial" / "lock", shared=True):  # as another part of the array has it
            answers.append(real(task)["lines"])
        return {}

    monkeypatch.setitem(job_array._KINDS, "map_dump", (busy, tasks.MapTask))
    assert job_array.main([str(path), "0", "1"]) == 0
    assert answers == [len(RESULTS)]
    with write_lock(out, out / ".partial" / "lock"):
        assert job_array.main([str(path), "0", "1"]) == 1
    monkeypatch.undo()
    with pytest.raises(SystemExit):
        main([*command, "--executor", "array"])
    assert job_array.main([str(path), "0", "1"]) == 0
    assert main([*command, "--executor", "array"]) == 0
    prepare([dump], tmp_path / "want", workers=1)
    assert files(out) == files(tmp_path / "want")


def test_rows_in_a_folder_that_may_not_be_written_are_left_as_they_are(dump, tmp_path, monkeypatch):
    out = tmp_path / "out"
    manifest = prepare([dump], out, workers=1)
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(prepare_module, "write_lock", lambda *_: 1 / 0)
    assert prepare([dump], out, workers=1) == manifest


def unreadable(path):
    raise ValueError(f"{path} cannot be read")


def test_a_refused_run_leaves_no_trace(dump, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patched, pytest.raises(ValueError, match="cannot be read"):
        patched.setattr(inputs, "file_sha256", unreadable)
        prepare([dump], out, workers=1)
    assert not out.exists()
    prepare([dump], out, workers=1)
    before = files(out)
    with pytest.raises(ValueError, match="holds the rows of other inputs or options"):
        prepare([dump], out, workers=1, split="none")
    assert files(out) == before
