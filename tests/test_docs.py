"""The documentation builds without a warning, loads nothing from elsewhere, and its blocks run as they stand."""

import importlib
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
import yaml
from paths import ROOT, SCRIPTS
from test_readme import CANNOT_RUN, blocks, run_blocks, small_inputs
from waiting import HANG_S

from ping_llm.cli import _COMMANDS, exit_code, main
from ping_llm.config import Config, DataConfig, ModelConfig
from ping_llm.data import tokenization as tk
from ping_llm.model.checkpoint import save, save_config
from ping_llm.model.gpt import GPT

__all__ = ["small_inputs"]  # a fixture
sys.path.append(str(SCRIPTS))
DOCS = ROOT / "docs"
MORE_CANNOT_RUN = {
    "torchrun": "needs several GPUs; tests/training/test_distributed.py runs several processes",
    "python -c 'import secrets": "needs a cluster; tests/serve/test_kubernetes.py starts the manifest's command",
}
TITLED = re.compile(r'^```\w+ title="(\S+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)
LOADS = {
    "script": "src",
    "img": "src",
    "link": "href",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
}


def cannot_run(block: str) -> bool:
    """By the list of README.md, or by the one above."""
    return any(block.startswith(beginning) for beginning in (*CANNOT_RUN, *MORE_CANNOT_RUN))


def pages() -> list[str]:
    """The pages in the order of the navigation, as paths from the root."""
    settings = re.sub(r"!!python\S*", "", (ROOT / "mkdocs.yml").read_text())
    return [f"docs/{page}" for entry in yaml.safe_load(settings)["nav"] for page in entry.values()]


def test_every_page_stands_in_the_navigation():
    assert sorted(pages()) == sorted(f"docs/{path.name}" for path in DOCS.glob("*.md"))


def with_parts(page: str) -> str:
    """A page with the parts of other files that it includes; KeyError if one of them is not there."""

    def part(named: re.Match) -> str:
        file, _, section = named[1].partition(":")
        text = (ROOT / file).read_text()
        sections = re.findall(r"\[start:([\w-]+)\] -->\n(.*?)<!-- --8<-- \[end:\1\]", text, re.DOTALL)
        return dict(sections)[section] if section else text

    return re.sub(r'^--8<-- "(\S+)"$', part, (ROOT / page).read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("command", _COMMANDS)
def test_every_command_stands_in_the_pages_and_in_the_changes(command):
    said = [with_parts(page) for page in pages() if page != "docs/changes.md"]
    assert any(f"ping-llm {command}" in text for text in said)
    assert re.search(rf"`(ping-llm )?{command}[` ]", (ROOT / "CHANGELOG.md").read_text())


@pytest.mark.slow
def test_every_block_of_the_documentation_runs_as_it_stands(small_inputs, capsys):
    assert main(["prepare", "dumps", "--out", "data/rows", "--workers", "1"]) == 0
    assert main(["train", "configs/tiny.toml", "--data.rows", "data/rows", "--train.run-dir", "runs/tiny"]) == 0
    run: list[list[str]] = []
    for page in pages():
        for name, content in TITLED.findall((ROOT / page).read_text()):
            Path(name).write_text(content)
        run_blocks(page, run, capsys, cannot_run)
    assert len(run) > 20


def test_what_cannot_run_is_still_there_and_names_files_that_are():
    listed = [block for page in pages() for _, block in blocks((ROOT / page).read_text()) if cannot_run(block)]
    assert all(any(block.startswith(beginning) for block in listed) for beginning in MORE_CANNOT_RUN)
    named = [word for block in listed for word in re.findall(r"(?:configs|scripts|slurm|deploy)/[\w./]+", block)]
    named += [file for reason in MORE_CANNOT_RUN.values() for file in re.findall(r"tests/[\w/]+\.py", reason)]
    assert len(named) > 2 and all((ROOT / file).is_file() for file in named)


class Loaded(HTMLParser):
    """What a page loads, where it leads, and the names of its places."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.leads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        place = given.get(LOADS.get(tag, ""))
        if place and given.get("rel") != "canonical":
            self.loads.append(place)
        if tag == "a" and given.get("href"):
            self.leads.append(given["href"] or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return site


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere_and_every_link_leads_somewhere(site):
    found = {path: Loaded(path.read_text()) for path in site.rglob("*.html")}
    assert len(found) > len(pages())
    for path, page in found.items():
        assert any(place.endswith(".js") for place in page.loads)
        assert "\\|" not in path.read_text(), "a | within code in a table: GitHub reads it, this site does not"
        for place in [*page.loads, *page.leads]:
            split = urlsplit(place)
            if place in page.leads and (split.scheme or split.netloc):
                continue  # a reader may follow it; nothing is loaded
            assert split.scheme in ("", "data") and not split.netloc, f"{path.name} loads {place}"
            root = site if split.path.startswith("/") else path.parent
            assert split.scheme or (root / unquote(split.path).lstrip("/")).exists(), f"{path.name}: {place}"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//|@import", style.read_text()), style


@pytest.mark.slow
def test_the_python_api_is_in_the_site_with_its_signatures(site):
    text = (site / "api.html").read_text()
    names = re.findall(r"^::: (\S+)", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert len(names) > 10
    for name in names:
        module, _, item = name.rpartition(".")
        assert getattr(importlib.import_module(module), item).__doc__, f"{name} has no docstring"
        assert f'id="{name}"' in text
    for method in ("load", "rtt", "rtt_many"):
        assert f'id="ping_llm.inference.model.PingModel.{method}"' in text


# Pictures


def test_what_a_picture_says_of_a_token():
    """By hand: 108.3 ms is 2^16 · (1 + 1336/2048) µs to nearest, and 16 · 2048 + 1336 is 133 · 256 + 56."""
    draw = importlib.import_module("draw_docs")
    code = tk.encode_rtt(108.3)
    assert divmod(int(code), 256) == (133, 56)
    lines = draw.field_lines([(tk.DST_IPV4, (199, 243, 231, 233)), (tk.RTT_START, (133, 56))])
    assert [line[4] for line in lines] == ["a byte", *["a byte or a role"] * 3, "a role", "a byte", "a byte", "a role"]
    assert lines[2][:3] == ("byte 243", "DST_IPV4, 2", "199.243")
    assert [line[3] for line in lines[5:]] == ["–", "106.5–114.7 ms", "108.29 ms"]
    (row,) = draw.measurements_of([0, tk.SRC_IPV4, tk.BYTE_0 + 7, tk.FAILED])
    assert row == [("START", "structure"), ("SRC\nIPv4", "src"), ("7", "src"), ("FAILED", "rtt")]


@pytest.mark.slow
def test_draw_docs_draws_the_pictures_that_the_pages_show(tmp_path, monkeypatch):
    draw = importlib.import_module("draw_docs")
    dump, rows = str(tmp_path / "demo" / "dump"), str(tmp_path / "demo" / "rows")
    assert main(["synth", "--out", dump, "--probes", "60", "--targets", "40", "--days", "0.2", "--workers", "1"]) == 0
    assert main(["prepare", dump, "--out", rows, "--workers", "1"]) == 0
    config = ModelConfig(n_layer=1, n_embd=32, n_head=2, seq_len=128)
    gpt, generator = GPT(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.normal_(std=0.1, generator=generator)
    save_config(tmp_path / "demo" / "run", Config(model=config, data=DataConfig(rows=Path(rows))))
    save(tmp_path / "demo" / "run", 1, gpt.state_dict(), {}, {"val_loss": 1.0})
    monkeypatch.setattr(draw, "TRIED", 8)
    argv = ["--demo", str(tmp_path / "demo"), "--out", str(tmp_path / "pictures")]
    assert exit_code(lambda: draw.main(argv)) == 0
    drawn = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert drawn == {path.name for path in (DOCS / "pictures").iterdir()}
    shown = set(re.findall(r"\(pictures/(\w+\.svg)\)", "".join((ROOT / page).read_text() for page in pages())))
    assert drawn == shown
    assert all("<svg" in (tmp_path / "pictures" / name).read_text()[:500] for name in drawn)
