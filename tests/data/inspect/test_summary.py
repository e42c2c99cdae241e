"""What `ping-llm inspect` says of rows and dumps is what plain Python counts in the measurements themselves."""

import datetime as dt
import json
from collections import Counter

import matplotlib.image
import numpy as np
import pyarrow as pa
import pytest
from conftest import make_row, write_rows
from hypothesis import given
from hypothesis import strategies as st
from pings import ndjson, ping, write

from ping_llm.cli import main
from ping_llm.data.inspect import summary as summary_module
from ping_llm.data.inspect.plots import hilbert_positions
from ping_llm.data.inspect.summary import Tally, count_quantiles, summarize
from ping_llm.data.inspect.tables import print_summary
from ping_llm.data.measurement import format_address
from ping_llm.data.rows import RowReader


@pytest.fixture(scope="module")
def measurements(rows_folder) -> pa.Table:
    """Every measurement of the shared rows."""
    rows = [row for part in ("train", "val") for row in RowReader(rows_folder, part)]
    return pa.concat_tables(row.to_measurements() for row in rows)


@pytest.mark.parametrize("batch", [1, 5000, 1 << 18])
def test_numbers_are_those_of_the_measurements_however_they_are_batched(rows_folder, measurements, batch, monkeypatch):
    monkeypatch.setattr(summary_module, "BATCH_MEASUREMENTS", batch)
    found = summarize(rows_folder).to_json(top=3)
    rtt_ms, family = measurements["rtt_ms"].to_numpy(), measurements["ip_version"].to_numpy()
    assert found["measurements"] == len(measurements) and found["rows"] == 48 and found["probes"] == 40
    assert found["first_time_s"] == measurements["time_s"].to_numpy().min()
    assert found["last_time_s"] == measurements["time_s"].to_numpy().max()
    for version, name in ((4, "ipv4"), (6, "ipv6")):
        mine = rtt_ms[family == version]
        assert found["families"][name]["measurements"] == len(mine)
        assert found["families"][name]["failed_share"] == pytest.approx((mine < 0).mean())
        for quantile, value in found["families"][name]["rtt_ms"].items():
            expected = np.quantile(mine[mine >= 0], float(quantile), method="inverted_cdf")
            assert value == pytest.approx(expected, rel=2**-11)
    for end, column in (("sources", "src"), ("destinations", "dst")):
        counts = Counter(format_address(a) for a in measurements[column].to_pylist())
        assert found[end]["distinct"] == len(counts)
        assert list(found[end]["top"].values()) == [count for _, count in counts.most_common(3)]
        assert all(counts[address] == count for address, count in found[end]["top"].items())


def test_gaps_are_counted_within_rows_alone(rows_folder):
    rows = [row for part in ("train", "val") for row in RowReader(rows_folder, part)]
    gaps = np.concatenate([np.diff(row.time_s) for row in rows])
    summary = summarize(rows_folder)
    assert summary.gaps_s.sum() == len(gaps)
    assert (summary.gaps_s == np.bincount(gaps, minlength=len(summary.gaps_s))).all()


def test_measurements_over_time_and_tokens_are_those_of_the_measurements(rows_folder, measurements):
    summary = summarize(rows_folder)
    time_s = measurements["time_s"].to_numpy()
    edges = summary.over_time_start_s + summary.over_time_step_s * np.arange(summary.over_time.shape[1] + 1)
    assert edges[0] <= time_s.min() and time_s.max() < edges[-1] and 40 < len(edges) <= 242
    assert (summary.over_time.sum(axis=0) == np.histogram(time_s, edges)[0]).all()
    failed, width = measurements["rtt_ms"].to_numpy() < 0, 4 + 12 * (measurements["ip_version"].to_numpy() == 6)
    untimed = (3 + 2 * width + np.where(failed, 1, 3)).mean()
    tokens = summary.tokens_per_measurement()
    assert tokens["untimed"] == pytest.approx(untimed)
    assert untimed + 2 <= tokens["timed"] <= untimed + 5


@pytest.mark.parametrize("bits", [8, 16])
def test_network_medians_are_those_of_the_answers(tmp_path, bits):
    folder = write_rows(tmp_path, {"train": [make_row(900, i, ipv6_share=0.2, probe_id=i) for i in range(3)]})
    table = pa.concat_tables(row.to_measurements() for row in RowReader(folder, "train"))
    rtt_ms = table["rtt_ms"].to_numpy()[(table["ip_version"].to_numpy() == 4)]
    networks, medians = summarize(folder).network_medians(bits)
    assert networks.tolist() == [198 if bits == 8 else 198 << 8 | 51]
    assert medians[0] == pytest.approx(np.median(rtt_ms[rtt_ms >= 0]), rel=0.02)


@given(st.lists(st.dictionaries(st.integers(0, 50), st.integers(1, 9), min_size=1), min_size=1), st.integers(1, 100))
def test_a_tally_adds_up_whenever_it_compacts(portions, limit):
    tally = Tally()
    tally._compact_at = limit
    expected = Counter()
    for portion in portions:
        tally.add(np.array(list(portion)), np.array(list(portion.values())))
        expected.update(portion)
    keys, counts = tally.totals()
    assert dict(zip(keys.tolist(), counts.tolist(), strict=True)) == expected and (np.diff(keys) > 0).all()


@given(st.lists(st.integers(0, 30), min_size=1, max_size=50), st.floats(0.01, 1))
def test_quantiles_of_counts_are_those_of_the_values(values, quantile):
    expected = np.quantile(values, quantile, method="inverted_cdf")
    found = count_quantiles(np.bincount(values), [quantile])[0]
    assert found == expected or np.isclose(quantile * len(values), round(quantile * len(values)))


@pytest.mark.parametrize("order", [1, 4, 8])
def test_the_hilbert_curve_fills_the_square_step_by_step(order):
    x, y = hilbert_positions(np.arange(4**order), order)
    assert len({*zip(x.tolist(), y.tolist(), strict=True)}) == 4**order
    assert (np.abs(np.diff(x)) + np.abs(np.diff(y)) == 1).all()
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 2**order - 1, 0)


def test_a_16_lies_in_the_square_of_its_8():
    coarse, fine = hilbert_positions(np.arange(256), 4), hilbert_positions(np.arange(65536), 8)
    for line, exact in zip(coarse, fine, strict=True):
        assert (exact // 16 == line[np.arange(65536) >> 8]).all()


def test_tables_fit_80_columns_and_hold_the_numbers(rows_folder, capsys):
    summary = summarize(rows_folder)
    print_summary(summary, top=4)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for number in (summary.measurements.sum(), summary.measurements[1], summary.sources[1][0]):
        assert f"{number:,}" in text
    assert "…" not in text  # nothing was cut to make it fit


def test_inspect_of_a_dump_shows_where_each_line_went(tmp_path, capsys):
    results = [ping(timestamp=1_700_000_000 + 240 * i, prb_id=i % 3) for i in range(30)]
    dump = write(tmp_path / "ping.bz2", ndjson(*results, ping(lts=-1), b"{", results[0]))
    assert main(["inspect", str(dump), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    counters = {name: count for name, count in found["lines"]["counters"].items() if count}
    assert counters == {"kept": 30, "duplicate": 1, "malformed_json": 1, "unsynced_clock": 1}
    assert found["measurements"] == 30 and found["probes"] == 3
    assert found["destinations"] == {"distinct": 1, "top": {"198.51.100.7": 30}}
    assert found["last_time_s"] - found["first_time_s"] == 240 * 29
    assert main(["inspect", str(tmp_path)]) == 0
    assert "unsynced_clock" in capsys.readouterr().out


@pytest.mark.parametrize("shape", [["--json"], []])
def test_inspect_of_what_is_mostly_no_dump_shows_it_and_fails_unless_it_may_keep_going(tmp_path, capsys, shape):
    results = [ping(timestamp=1_700_000_000 + i) for i in range(30)]
    commas = ndjson(*results).replace(b"}\n", b"},\n")
    dump = write(tmp_path / "a.gz", ndjson(*results[:29]) + commas)
    assert main(["inspect", str(dump), *shape]) == 1
    out, err = capsys.readouterr()
    assert "29" in out and err.splitlines()[-1].startswith(
        "error: a.gz is mostly no Atlas dump: 30 of its 59 lines are no"
    )
    assert main(["inspect", str(dump), "--keep-going", *shape]) == 0
    assert "mostly no Atlas dump" in capsys.readouterr().out
    write(dump, ndjson(*results) + commas)  # a half is not most
    assert main(["inspect", str(dump), *shape]) == 0


def test_inspect_of_rows_that_were_prepared_of_damaged_dumps_is_no_failure(tmp_path, capsys):
    dump = write(tmp_path / "a.gz", ndjson(*(ping(timestamp=1_700_000_000 + i) for i in range(2000))))
    dump.write_bytes(dump.read_bytes()[:-100])
    assert main(["inspect", str(dump)]) == 1
    assert main(["prepare", str(dump), "--out", str(tmp_path / "rows"), "--workers", "1", "--keep-going"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "rows")]) == 0
    assert "is cut off" in capsys.readouterr().out


def test_inspect_writes_pictures(rows_folder, tmp_path, capsys):
    assert main(["inspect", str(rows_folder), "--plots", str(tmp_path / "plots"), "--networks", "16"]) == 0
    named = [line for line in capsys.readouterr().err.splitlines() if line.endswith(".png")]
    pictures = sorted((tmp_path / "plots").iterdir())
    assert [path.name for path in pictures] == ["ipv4_world_16.png", "over_time.png", "rtt.png"]
    assert sorted(named) == [str(path) for path in pictures]
    for path in pictures:
        pixels = matplotlib.image.imread(path)
        assert min(pixels.shape[:2]) > 300 and pixels[..., :3].std() > 0.05


def test_rows_that_never_answered_are_shown_too(tmp_path, capsys):
    results = [ping(timestamp=1_700_000_000 + i, result=[{"x": "*"}]) for i in range(9)]
    dump = write(tmp_path / "ping.json", ndjson(*results))
    assert main(["inspect", str(dump), "--plots", str(tmp_path / "plots")]) == 0
    assert "100.0%" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["over_time.png"]


def test_one_measurement_is_enough(tmp_path, capsys):
    dump = write(tmp_path / "ping.json", ndjson(ping()))
    assert main(["inspect", str(dump)]) == 0
    day = dt.datetime.fromtimestamp(1_700_000_000, dt.UTC).date()
    assert str(day) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"), [("absent", "no file"), ("empty", "holds no dumps"), ("a.arrayrecord", "inspect the folder")]
)
def test_what_cannot_be_inspected_is_one_clear_line(tmp_path, capsys, name, message):
    (tmp_path / "empty").mkdir()
    assert main(["inspect", str(tmp_path / name)]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
