"""Containers of Modal prepare rows together: a folder stands for what each of them sees of the Volume."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from pings import ndjson, ping, write
from test_modal import load_script

from ping_llm.data.ingest.prepare import prepare

pytestmark = pytest.mark.filterwarnings("ignore:.*executing locally")


@pytest.fixture(scope="module")
def dumps(tmp_path_factory):
    """Three dumps of 100 results each of 20 probes."""
    folder, rng = tmp_path_factory.mktemp("dumps"), np.random.default_rng(0)
    for i in range(3):
        times = rng.integers(1_700_000_000, 1_700_009_000, 100).tolist()
        sources = [{"prb_id": n % 20, "src_addr": f"192.0.2.{n % 20}", "msm_id": 1000 * i + n} for n in range(100)]
        lines = (ping(timestamp=time_s, **source) for time_s, source in zip(times, sources, strict=True))
        write(folder / f"{i}.bz2", ndjson(*lines))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class Volume:
    """What was committed. A container sees, in `seen`, what there was when it last reloaded, and what it writes itself."""

    def __init__(self, held: Path, seen: Path) -> None:
        self.held, self.seen = held, seen

    def commit(self) -> None:
        self.replace(self.seen, self.held)

    def reload(self) -> None:
        self.replace(self.held, self.seen)

    def in_another_container(self, function):
        """A function that sees an old state of the Volume: here, from before there was anything in it."""

        def run(*given):
            here = self.seen.rename(self.seen.with_name("of the caller"))
            self.seen.mkdir()
            try:
                return function(*given)
            finally:
                shutil.rmtree(self.seen)
                here.rename(self.seen)

        return run

    @staticmethod
    def replace(source: Path, target: Path) -> None:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)


def test_containers_make_the_same_bytes_over_a_volume_that_is_kept_up_to_date(dumps, tmp_path, monkeypatch):
    script, volume = load_script(), Volume(tmp_path / "volume", tmp_path / "data")
    for folder in (volume.held, volume.seen):
        shutil.copytree(dumps, folder / "dumps")
    monkeypatch.setattr(script, "WORK", tmp_path)
    monkeypatch.setattr(script, "data_volume", volume)
    monkeypatch.setattr(script, "CONTAINERS", 1)  # one thread: here the tasks share a process
    remote = volume.in_another_container(script.run_task.local)
    monkeypatch.setattr(script, "run_task", SimpleNamespace(remote=remote))
    options = {"packets": "one", "split": "pingbench", "traceroute": "off"}
    counts = script.prepare_rows.local([str(tmp_path / "data/dumps")], str(tmp_path / "data/rows"), options)
    prepare([dumps], tmp_path / "here", workers=1)
    assert files(volume.held / "rows") == files(tmp_path / "here")
    assert (
        sum(counts["parts"].values()) + counts["measurements"]["dropped_held_out"] == 300 and counts["parts"]["test-s4"]
    )
