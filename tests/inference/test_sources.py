"""A model is found by the name of a folder or of a model of the hub, or is the one that comes with the package."""

import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ping_llm import PingModel
from ping_llm.cli import main
from ping_llm.config import Config, ModelConfig, config_to_dict
from ping_llm.inference import sources
from ping_llm.inference.cli import OF_PRETRAINED
from ping_llm.model.gpt import GPT


@pytest.fixture
def exported(tmp_path) -> Path:
    """A folder as transformers' classes of ours save one, without its code and without what an export adds."""
    config = Config(model=ModelConfig(n_layer=1, n_embd=16, n_head=2, seq_len=64))
    folder = tmp_path / "exported"
    folder.mkdir()
    weights = GPT(config.model, torch.Generator().manual_seed(0)).bfloat16().state_dict()
    save_file({f"model.gpt.{name}": weight for name, weight in weights.items()}, folder / "model.safetensors")
    about = {"format_version": 1, "config": config_to_dict(config)}
    (folder / "config.json").write_text(json.dumps({"model_type": "ping_gpt", "ping_llm": about}))
    return folder


@pytest.fixture
def asked(monkeypatch) -> list:
    """The names that the hub was asked for; it has none of them."""
    names = []

    def refuse(name, files, proof):
        names.append(name)
        raise ValueError("not there")

    monkeypatch.setattr(sources, "download", refuse)
    return names


def test_a_folder_is_read_without_transformers_and_answers_in_fp32(exported, monkeypatch):
    for name in ("transformers", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    model = PingModel.load(exported)
    assert {weight.dtype for weight in model.gpt.parameters()} == {torch.float32} and model.rtt(
        "192.0.2.1", None
    ).p_fail > 0
    assert str(PingModel.load(str(exported)).gpt.config) == str(model.gpt.config)
    assert not sources.load(exported).config.data.rows.exists()  # whatever folder of rows there is here


def test_without_a_name_the_model_of_the_package_answers(exported, monkeypatch, capsys):
    monkeypatch.setattr(sources, "PRETRAINED", exported)
    assert sources.load(None).folder == exported and sources.name_of(None) == "pretrained"
    assert main(["inference", "rtt", "--src", "192.0.2.1", "--json"]) == 0
    printed = capsys.readouterr()
    assert "p_fail" in json.loads(printed.out) and printed.err == f"{OF_PRETRAINED}\n"


def test_without_a_name_and_without_a_model_of_the_package_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources, "PRETRAINED", tmp_path)
    with pytest.raises(ValueError, match=r"^no model comes with this installation; name one: a run folder"):
        PingModel.load()
    commands = (
        ["rtt", "--src", "192.0.2.1"],
        ["dst", "--src", "192.0.2.1"],
        ["rank", "--src", "192.0.2.1", "--dst", "192.0.2.2"],
        ["sample"],
    )
    for argv in commands:
        assert main(["inference", *argv]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: no model comes with this installation")


def test_a_folder_goes_before_the_hub_and_a_path_is_never_of_it(exported, asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    with pytest.raises(
        ValueError,
        match=r"^no checkpoint in owner/model; .*hub is not asked .* a folder owner\)",
    ):
        sources.load("owner/model")
    for source in (
        Path("owner/model"),
        "./a/b",
        "/a/b",
        "a/b/c",
        "name",
        "a/b@",
        "~/b",
        ".a/b",
        Path("a/b"),
        Path("absent"),
    ):
        with pytest.raises(ValueError, match="no checkpoint in"):
            sources.load(source)
    exported.rename(tmp_path / "owner" / "model")
    assert sources.load("owner/model").name == "model" and not asked
    for source in ("a/b", "some-one/pings_2", "a/b@v1.0", "a/b@refs/pr/1"):
        with pytest.raises(ValueError, match="not there"):
            sources.load(source)
        assert asked.pop() == source and sources.name_of(source) == source and not asked


def test_without_the_client_of_the_hub_the_extra_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["inference", "rtt", "--src", "192.0.2.1", "--model", "someone/pings"]) == 1
    assert capsys.readouterr().err == "error: huggingface_hub is not installed; pip install 'ping-llm[hf]'\n"


def test_a_calibration_of_other_weights_is_left_out_with_a_warning(exported, caplog):
    values = {"src_weights": {"ipv4": {"all": 1.0}}, "model_sha256": "ab" * 32}
    (exported / "calibration.json").write_text(json.dumps(values))
    with caplog.at_level(logging.WARNING):
        assert not sources.load(exported).calibration.src_weights
    assert "was fitted for another checkpoint" in caplog.text
