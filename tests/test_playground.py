"""The notebook runs from its first cell to its last on a small run, and is kept without what it showed."""

import base64
import json
import os
from pathlib import Path

import nbformat
import pytest
import torch
from conftest import make_row, write_rows
from nbclient import NotebookClient
from paths import ROOT
from waiting import HANG_S

from ping_llm.config import Config, DataConfig, ModelConfig
from ping_llm.model.checkpoint import save, save_config
from ping_llm.model.gpt import GPT

NOTEBOOK = ROOT / "notebooks" / "playground.ipynb"


@pytest.fixture
def run(tmp_path) -> Path:
    """Two checkpoints of a model that learned nothing, and rows with some prefixes."""
    rows = [make_row(120, seed=seed, probe_id=seed) for seed in range(2)]
    for row in rows:
        row.dst_addresses[:, 14] = range(20)
    (tmp_path / "rows").mkdir()
    write_rows(tmp_path / "rows", {"train": rows, "val": rows[:1]}, shards=1)
    config = ModelConfig(n_layer=1, n_embd=32, n_head=2, seq_len=192)
    save_config(tmp_path / "run", Config(model=config, data=DataConfig(rows=tmp_path / "rows")))
    for step in (1, 2):
        gpt, generator = GPT(config), torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in gpt.parameters():
                parameter.normal_(std=0.1, generator=generator)
        save(tmp_path / "run", step, gpt.state_dict(), {}, {"val_loss": 3.0 - step})
    return tmp_path / "run"


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last(run, monkeypatch):
    monkeypatch.setenv("PING_LLM_RUN", str(run))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=HANG_S, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.get("name") == "stderr" and "Error" in output.text]
    shown = [output.data for output in outputs if "data" in output]
    pictures = [base64.b64decode(data["image/png"]) for data in shown if "image/png" in data]
    assert len(pictures) == 6 and all(
        picture.startswith(b"\x89PNG") for picture in pictures
    )  # RTT, four of inside, steps
    text = "".join(output.text for output in outputs if output.get("name") == "stdout")
    text += "".join(data.get("text/plain", "") for data in shown)
    for piece in ("1 blocks of width 32, 192 tokens", "given the pings before", "as the model has learned", "2, best"):
        assert piece in text


def test_the_notebook_is_kept_without_outputs_and_without_places_of_a_machine():
    notebook = json.loads(NOTEBOOK.read_text())
    for cell in notebook["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    nbformat.validate(nbformat.from_dict(notebook))
    text = NOTEBOOK.read_text()
    assert not any(place in text for place in ("/home/", "/root/", "/work/", "/tmp/", "/Users/"))
