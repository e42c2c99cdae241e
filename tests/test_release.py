"""What is uploaded to a package index holds all that the program needs, and runs where there is no checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from paths import ROOT
from waiting import HANG_S

from ping_llm.cli import _COMMANDS
from ping_llm.config import Config, ModelConfig
from ping_llm.model.checkpoint import save, save_config
from ping_llm.model.gpt import GPT

PRETRAINED = ROOT / "src" / "ping_llm" / "pretrained"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BUILT_FROM = (
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
)
BUILT_FROM += ("PLAN.md", "constraints.txt", "configs", "src", "tests")
PROBE = """
import importlib, json, os, pkgutil, sys
from ping_llm.cli import _COMMANDS, main
from ping_llm.inference.cli import COMMANDS as inference
from ping_llm.launch.watch import COMMANDS as launch

lines = [[name] for name in _COMMANDS] + [["inference", name] for name in inference] + [["launch", name] for name in launch]
codes = {}
for line in lines:
    try:
        codes[" ".join(line)] = main([*line, "--help"])
    except SystemExit as stopped:
        codes[" ".join(line)] = stopped.code or 0
import ping_llm
modules = [one.name for one in pkgutil.walk_packages(ping_llm.__path__, "ping_llm.") if not one.name.endswith("__main__")]
files = [importlib.import_module(name).__file__ for name in modules]
found = {"codes": codes, "files": [ping_llm.__file__, *files], "path": sys.path, "version": ping_llm.__version__}
with open(sys.argv[1], "w") as out:
    json.dump(found, out)
"""


def run(*command, **options) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    options = {"capture_output": True, "text": True, "timeout": HANG_S, "env": environment} | options
    return subprocess.run([str(word) for word in command], **options)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The sdist, and the wheel that is built from it and nothing else, by what is installed here."""
    checkout, dist = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("dist")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, checkout / name)
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, checkout)
    assert done.returncode == 0, done.stderr
    return dist


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """An environment that holds the wheel and, behind it, the libraries that are installed here, but not the checkout."""
    environment = tmp_path_factory.mktemp("environment")
    assert run(sys.executable, "-m", "venv", "--without-pip", environment).returncode == 0
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", environment / "bin" / "python"]
    done = run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel)
    assert done.returncode == 0, done.stderr
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")  # .pth files there are not read
    return environment


def package_files() -> set[str]:
    """Every file of the package in the checkout, as the wheel names it."""
    paths = (path for path in (ROOT / "src" / "ping_llm").rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT / "src")) for path in paths if "__pycache__" not in path.parts}


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == package_files()
    kept = {
        "data/synthetic/cities.csv",
        "launch/prices.toml",
        "serve/docs/index.html",
        "serve/page/index.html",
        "py.typed",
    }
    assert {f"ping_llm/{name}" for name in kept} <= names


def test_the_sdist_holds_what_belongs_beside_the_code_and_no_tests(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "constraints.txt", "configs/tiny.toml"} <= names
    assert not [name for name in names if name.startswith("tests")]


def test_an_index_takes_both(built):
    done = run(sys.executable, "-m", "twine", "--no-color", "check", "--strict", *built.iterdir())
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout + done.stderr


@pytest.mark.slow
def test_the_wheel_alone_helps_with_every_command_and_imports_nothing_of_the_checkout(installed, tmp_path):
    done = run(installed / "bin" / "python", "-c", PROBE, tmp_path / "found.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(_COMMANDS) < set(found["codes"]) and not any(found["codes"].values())
    assert done.stdout.count("usage: ") == len(found["codes"])
    modules = [name for name in package_files() if name.endswith(".py") and not name.endswith("__main__.py")]
    modules = [name for name in modules if not name.startswith("ping_llm/pretrained/")]  # an export's, for transformers
    assert len(found["files"]) == len(modules)
    assert all(Path(file).is_relative_to(installed) for file in found["files"])
    assert not [place for place in found["path"] if place and Path(place) in (ROOT, ROOT / "src")]
    assert found["version"] == PROJECT["version"]


def test_the_wheel_alone_answers_a_query(installed, tmp_path):
    config = ModelConfig(n_layer=1, n_embd=32, n_head=2, seq_len=64)
    save_config(tmp_path / "run", Config(model=config))
    save(tmp_path / "run", 1, GPT(config).state_dict(), {}, {"val_loss": 1.0})
    command = [installed / "bin" / "ping-llm", "inference", "rtt", "--model", "run", "--src", "192.0.2.1"]
    done = run(*command, "--dst", "198.51.100.7", "--json", cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["median_ms"] > 0, done.stderr


@pytest.mark.skipif(not PRETRAINED.is_dir(), reason="no model is shipped")
def test_the_model_of_the_wheel_answers_where_none_is_named(installed, tmp_path):
    command = [
        installed / "bin" / "ping-llm",
        "inference",
        "rtt",
        "--src",
        "192.0.2.1",
        "--dst",
        "198.51.100.7",
        "--json",
    ]
    done = run(*command, cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["median_ms"] > 0, done.stderr


def test_the_version_stands_in_one_place():
    import ping_llm

    version = PROJECT["version"]
    assert ping_llm.__version__ == version, "the package is installed as another version; run make install"
    latest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert latest and latest[1] == version
    assert "version" not in yaml.safe_load((ROOT / "CITATION.cff").read_text())
    named = [path for path in (ROOT / "src").rglob("*.py") if f'"{version}"' in path.read_text()]
    assert not named


def test_the_citation_file_has_what_its_format_asks_for():
    """Of https://github.com/citation-file-format/citation-file-format, 1.2.0: the required keys, and authors by kind."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["title"] and citation["message"] and citation["license"] == PROJECT["license"]
    for work in (citation, *citation["references"]):
        assert work["authors"] and all("name" in one or "family-names" in one for one in work["authors"])
    assert all({"type", "title"} <= set(work) for work in citation["references"])
