"""`ping-llm inspect-model` draws what it found and writes it down; what it cannot look at is one clear line."""

import json
import shutil

import numpy as np
import pytest
from conftest import make_row, write_rows
from lookable import lookable, write_run

from ping_llm.cli import main
from ping_llm.data import tokenization as tk
from ping_llm.inference.query import Query
from ping_llm.inside.inspect import PICTURES, fitting, query_window
from ping_llm.inside.layout import Layout

CONTEXT = "src_addr,dst_addr,rtt,event_time\n" + "".join(
    f"192.0.2.1,198.51.100.{i % 3},{5 + i}.5,2026-01-01T00:{i:02}:00Z\n" for i in range(6)
)
PING = ["--src", "192.0.2.1", "--dst", "198.51.100.1"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Several prefixes of both families, so that there is a map."""
    made = []
    for seed in range(4):
        row = make_row(300, seed=seed, probe_id=seed)
        last = np.where(row.dst_is_ipv4, 14, 5)
        row.dst_addresses[np.arange(20), last] = np.arange(20)
        made.append(row)
    return write_rows(tmp_path_factory.mktemp("rows"), {"train": made, "val": made[:2]})


@pytest.fixture(scope="module")
def run(tmp_path_factory, rows):
    return write_run(tmp_path_factory.mktemp("runs") / "small", rows)


@pytest.mark.slow
@pytest.mark.parametrize("field_aware", [False, True])
def test_pictures_and_numbers_of_windows_of_val(field_aware, rows, tmp_path, capsys):
    run, out = write_run(tmp_path / "run", rows, field_aware), tmp_path / "out"
    assert main(["inspect-model", str(run), "--windows", "3", "--out", str(out), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    for picture in PICTURES:
        assert (out / picture).read_bytes().startswith(b"\x89PNG") and str(out / picture) in printed
    found = json.loads((out / "inside.json").read_text())
    path, attention, maps = found["path"], found["attention"], found["prefixes"]
    places = np.array(path["places"])
    assert places.shape == (3, len(path["tokens"]), 2) and path["tokens"][0] == "start"
    assert path["ping"] in printed and " → " in path["ping"] and "/" not in path["ping"]
    shares = np.array(attention["shares"])
    assert shares.shape == (2, 2, 7, 2, 5)
    np.testing.assert_allclose(shares.sum(axis=(2, 3, 4)), 1, atol=1e-5)
    assert [one["of"] for one in maps] == ["embedding" if field_aware else "state", "answer"] * 2
    assert len(maps[0]["prefixes"]) == len(maps[0]["median_ms"]) == len(maps[0]["places"]) >= 4
    assert {"." in one["prefixes"][0] for one in maps} == {True, False}
    assert not list(run.glob("inside*"))


@pytest.mark.slow
def test_a_ping_and_its_context_are_looked_at_instead(run, rows, tmp_path, capsys):
    (tmp_path / "context.csv").write_text(CONTEXT)
    given = [
        *PING,
        "--context",
        str(tmp_path / "context.csv"),
        "--at",
        "2026-01-02",
        "--rtt",
        "12.5",
        "--data",
        str(rows),
    ]
    assert main(["inspect-model", str(run), *given]) == 0
    assert "path of 192.0.2.1 → 198.51.100.1, 12.5 ms, after 6 measurements" in capsys.readouterr().out
    found = json.loads((run / "inside/inside.json").read_text())
    shutil.rmtree(run / "inside")
    attention = found["attention"]
    assert (attention["results"], attention["met_before"], attention["least_earlier"]) == (1, 1, 6)


@pytest.mark.slow
def test_without_rows_a_ping_is_looked_at_and_the_map_is_what_the_model_expects(run, tmp_path, capsys):
    moved = shutil.copytree(run, tmp_path / "run")
    config = json.loads((moved / "config.json").read_text())
    config["config"]["data"]["rows"] = str(tmp_path / "gone")
    (moved / "config.json").write_text(json.dumps(config))
    assert main(["inspect-model", str(moved)]) == 1
    assert f"no rows in {tmp_path / 'gone'}; name them with --data, or name a ping" in capsys.readouterr().err
    assert main(["inspect-model", str(moved), *PING]) == 0
    maps = json.loads((moved / "inside/inside.json").read_text())["prefixes"]
    assert len(maps) == 2 and maps[0]["prefixes"][0] == "1.0.0.0/8" and not any(maps[0]["replies"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--src", "192.0.2.1"], "give both --src and --dst"),
        (["--at", "2026-01-01"], "--at, --context and --rtt go with --src and --dst"),
        ([*PING, "--rtt", "-1"], "--rtt -1.0 must be 0 or more ms"),
        (["--src", "192.0.2.0/23", "--dst", "198.51.100.1"], "prefixes of whole bytes"),
        (["--windows", "0"], "--windows 0 must be at least 1"),
        (["--part", "test-s9"], 'holds no "test-s9" rows'),
        (["--data", "absent"], "no rows in absent; name them with --data"),
        (["--out", "file"], "file is a file, no folder"),
    ],
)
def test_what_cannot_be_looked_at_is_one_clear_line(run, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(["inspect-model", str(run), *argv]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (run / "inside/inside.json").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert main(["inspect-model", str(tmp_path)]) == 1
    assert "no checkpoint in" in capsys.readouterr().err


def test_the_window_of_a_ping_ends_with_its_rtt():
    model = lookable()
    layout = Layout.of(query_window(model, Query.parse("192.0.2.1", "198.51.100.7"), 12.5))
    (ping,) = tk.decode(layout.tokens.tolist())
    assert (ping.src, ping.dst, ping.time_s) == ("192.0.2.1", "198.51.100.7", None)
    assert ping.rtt_ms == pytest.approx(12.5, rel=3e-4)
    assert layout.place_of_rtt(0) == len(layout) - 3
    likely = tk.decode(query_window(model, Query.parse("192.0.2.1", "198.51.100.7")).tolist())[0].rtt_ms
    assert likely == pytest.approx(model.rtt("192.0.2.1", "198.51.100.7", src_known="all").median, rel=3e-4)


def test_a_context_that_does_not_fit_is_cut_so_that_the_ping_fits():
    pings = [{"src_addr": "2001:db8::1", "dst_addr": f"2001:db8::{i:x}", "rtt": 5.0} for i in range(2, 40)]
    window = query_window(lookable(), Query.parse("2001:db8::1", "2001:db8::99", None, pings))
    assert len(window) <= 192 and Layout.of(window).measurements > 3


def test_a_window_is_read_in_whole_measurements():
    window = np.array([tk.MEASUREMENT_START, 1, 2, 3, tk.MEASUREMENT_START, 5, 6, tk.PADDING])
    assert fitting(window, 7).tolist() == window[:7].tolist()
    assert fitting(window, 6).tolist() == fitting(window, 5).tolist() == window[:4].tolist()
    assert fitting(np.append(window[:7], tk.MEASUREMENT_START), 7).tolist() == window[:7].tolist()
    assert fitting(np.append(window[:6], window[:2]), 3).tolist() == []
    assert fitting(np.append(window[:6], window[:2]), 5).tolist() == window[:4].tolist()
