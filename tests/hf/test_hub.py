"""A model goes to the hub and comes back as it was; what fails there is one line, and nothing is half-written."""

import os
import subprocess
import sys

import pytest
import torch
from exports import random_run
from hub_server import OWNER, TOKEN, hub

from ping_llm import PingModel
from ping_llm.cli import main
from ping_llm.hf.export import export
from ping_llm.hf.hub import push
from ping_llm.inference.sources import load
from ping_llm.model.checkpoint import MODEL_NAME

NAME = f"{OWNER}/pings"
PAIR = ("192.0.2.7", "198.51.100.3")


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A hub that this process takes for the real one, with the token of its owner and a cache that is empty."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with hub() as server:
        constants = {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_DISABLE_XET": True,
        }
        for name, value in constants.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)  # before it tries again
        monkeypatch.chdir(tmp_path)
        yield server


@pytest.fixture
def run(tmp_path):
    return random_run(tmp_path, field_aware=True)


@pytest.fixture
def folder(run, tmp_path):
    return export(run, tmp_path / "out", address=NAME)


def refused(action, *given) -> str:
    with pytest.raises(ValueError) as error:
        action(*given)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_pushed_model_comes_back_as_it_was(server, run, folder):
    assert push(folder, NAME) == f"{server.url}/{NAME}"
    assert server.files(NAME) == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert server.repos[NAME].private and len(server.repos[NAME].commits) == 2  # the empty one, and all in one
    asked, found = PingModel.load(run), PingModel.load(NAME)
    assert found.rtt(*PAIR).quantile(0.9) == asked.rtt(*PAIR).quantile(0.9)
    assert found.calibration.experts == asked.calibration.experts is not None
    assert load(NAME).name == NAME
    fetched = [request for request in server.requests if request.startswith("GET") and "/resolve/" in request]
    assert len(fetched) == len(set(fetched)) == 4 and not any(request.endswith(".py") for request in fetched)


@pytest.mark.parametrize("refuses", [True, False], ids=["no server", "broken"])
def test_what_was_fetched_needs_no_network(server, run, folder, monkeypatch, refuses):
    push(folder, NAME)
    first = PingModel.load(NAME).rtt(*PAIR).median
    server.down = True
    if refuses:
        nowhere = "http://127.0.0.1:9"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", nowhere)
        template = nowhere + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    assert PingModel.load(NAME).rtt(*PAIR).median == first
    said = refused(PingModel.load, f"{OWNER}/other")
    assert "is no folder here, and cannot be loaded from the hub" in said and "was not fetched before" in said


def test_a_new_push_replaces_the_files_of_an_export_and_no_others(server, run, folder, tmp_path):
    push(folder, NAME)
    first, files = server.repos[NAME].commits[-1]
    server.repos[NAME].commits.append(("a" * 40, files | {"notes.txt": b"by hand"}))
    old = load(NAME).gpt
    (run / "calibration.json").unlink()
    newer = export(run, tmp_path / "newer", "bf16")
    (newer / "rows.parquet").write_bytes(b"not for everybody")
    push(newer, NAME)
    assert set(server.files(NAME)) == set(files) - {"calibration.json"} | {"notes.txt"}
    now, then = load(NAME), load(f"{NAME}@{first}")
    assert torch.equal(then.gpt.embedding.weight, old.embedding.weight) and then.calibration.src_weights
    assert torch.equal(now.gpt.embedding.weight, old.embedding.weight.bfloat16().float())
    assert not now.calibration.src_weights


def test_a_model_is_public_only_when_that_is_said(server, folder):
    push(folder, f"{OWNER}/seen", public=True)
    assert not server.repos[f"{OWNER}/seen"].private


@pytest.mark.parametrize(
    ("token", "name", "said"),
    [
        ("hf_wrong", NAME, "wants a valid token; set HF_TOKEN"),
        (TOKEN, "stranger/pings", "does not allow it to this token: 403"),
    ],
)
def test_a_push_that_is_refused_is_one_line_and_leaves_the_export(
    server, run, tmp_path, monkeypatch, capsys, token, name, said
):
    monkeypatch.setenv("HF_TOKEN", token)
    assert main(["export", str(run), "--to", "out", "--push", name]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and f"The export is whole: ping-llm export out --push {name} repeats the push" in line
    assert not server.repos and PingModel.load(tmp_path / "out").calibration.src_weights


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--push", "pings"], "--push pings has no owner; write it as OWNER/pings"),
        (["--push", "no/such/name"], "--push no/such/name: Repo id must be"),
        (["--push", "someone/pings@main"], "--push someone/pings@main: Repo id must"),
        (["--public"], "--public says who sees what is pushed; give --push OWNER/NAME too"),
    ],
)
def test_a_name_that_is_none_is_refused_before_anything_is_written(server, run, tmp_path, capsys, argv, said):
    assert main(["export", str(run), "--to", "out", *argv]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and not (tmp_path / "out").exists() and not server.requests
    if "--push" in argv:
        assert said in refused(push, export(run, tmp_path / "out"), argv[1]) and not server.requests


def test_a_push_that_breaks_off_leaves_nothing_on_the_hub_and_can_be_repeated(server, folder, capsys):
    server.breaks = {"/commit/main": 10_000}
    assert main(["export", "out", "--push", NAME]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be pushed to someone/pings: the connection to the hub at" in line and "repeat the command" in line
    assert server.files(NAME) == {}
    server.breaks = {}
    assert main(["export", "out", "--push", NAME]) == 0
    assert MODEL_NAME in server.files(NAME) and f"pushed: {server.url}/{NAME}" in capsys.readouterr().out


def test_only_an_export_is_pushed(server, run):
    assert "is no exported folder; write one with ping-llm export" in refused(push, run, NAME)
    assert not server.requests


def test_a_download_that_breaks_off_is_one_line_and_leaves_no_half_file(server, folder, tmp_path):
    push(folder, NAME)
    server.breaks = {MODEL_NAME: 10_000}
    said = refused(PingModel.load, NAME)
    assert "the connection to the hub at" in said and "broke off" in said and "repeat the command" in said
    assert not list((tmp_path / "cache").glob(f"**/snapshots/*/{MODEL_NAME}"))
    server.breaks = {}
    assert PingModel.load(NAME).calibration.src_weights


def test_what_is_not_there_or_not_for_this_user_is_one_line(server, folder, monkeypatch):
    push(folder, NAME)
    server.repos[f"{OWNER}/prose"] = type(server.repos[NAME])(False, [("b" * 40, {"config.json": b"{}"})])
    assert "has no such model, or shows it only to a token that may" in refused(PingModel.load, f"{OWNER}/absent")
    assert "it has no such revision" in refused(PingModel.load, f"{NAME}@v9")
    said = refused(PingModel.load, f"{OWNER}/prose")
    assert said == f"{OWNER}/prose is no model of ping-llm: the hub has it, but without the file ping_llm.json, " + (
        "which ping-llm export writes"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "wants a valid token" in refused(PingModel.load, NAME)
    monkeypatch.setenv("HF_TOKEN", "")
    assert "shows it only to a token that may read it" in refused(PingModel.load, NAME)


@pytest.mark.slow  # starts processes that import torch and transformers
def test_the_commands_and_transformers_work_with_the_hub_that_the_environment_names(server, run, tmp_path):
    environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}

    def start(*argv: str) -> str:
        done = subprocess.run([sys.executable, *argv], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    start("-m", "ping_llm", "export", str(run), "--to", "out", "--push", NAME)
    asked = ["inference", "rtt", "--src", PAIR[0], "--dst", PAIR[1], "--json", "--model"]
    assert start("-m", "ping_llm", *asked, NAME) == start("-m", "ping_llm", *asked, str(run))
    code = "from transformers import AutoModelForCausalLM as A; print(type(A.from_pretrained({!r}, trust_remote_code=True)))"
    assert "PingGPTForCausalLM" in start("-c", code.format(NAME))
