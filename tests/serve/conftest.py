"""A tiny model for all tests of a file."""

import pytest
from serve_runs import make_run

from ping_llm.inference.model import PingModel


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def model(run_dir):
    return PingModel.load(run_dir, "cpu")
