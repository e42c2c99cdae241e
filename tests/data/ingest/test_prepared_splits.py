"""What `prepare` makes of the split: the parts of a folder, its time cut, and the way there through a job array."""

import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from pings import ndjson, ping, write
from reference_split import reference_parts

from ping_llm.cli import main
from ping_llm.data.ingest.job_array import TASKS_NAME, TaskFile, read_tasks, run_strided
from ping_llm.data.ingest.prepare import prepare
from ping_llm.data.ingest.splits import PARTS, SplitRule, TimeCut
from ping_llm.data.ingest.tasks import ReduceTask, reduce_bucket
from ping_llm.data.rows import RowReader, read_manifest

RULE = SplitRule()
CUT = TimeCut(1_600_000_700, 1_600_000_850)
SEEN = ("train", "val-s1", "test-s1")


def prepared_mesh(folder, **options):
    """60 probes that ping each other, every fourth through the address of another; in four buckets. The manifest."""
    rng = np.random.default_rng(0)
    address = [f"192.{i}.2.1" for i in range(60)]
    lines = [
        ping(
            prb_id=probe,
            msm_id=target,
            timestamp=1_700_000_000 + int(rng.integers(100_000)),
            src_addr=address[probe - (probe % 4 == 0 and i % 2)],
            dst_addr=address[target],
        )
        for i in range(2)
        for probe in range(60)
        for target in range(60)
    ]
    dumps = [write(folder / f"{i}.json", ndjson(*lines[i::3], *lines[:10])) for i in range(3)]
    return prepare(dumps, folder / "rows", workers=1, **options)


def test_the_parts_of_a_prepared_folder_keep_apart_what_the_rule_keeps_apart(tmp_path):
    manifest = prepared_mesh(tmp_path)
    parts, measurements = manifest["parts"], manifest["measurements"]
    assert measurements["dropped_repeated"] == 30 and measurements["dropped_held_out"] > 100
    counted = ("written", "dropped_repeated", "dropped_held_out")
    assert sum(measurements[name] for name in counted) == 2 * 60 * 60 + 30 == manifest["lines"]["read"]
    table = {
        part: pa.concat_tables([row.to_measurements() for row in RowReader(tmp_path / "rows", part)])
        for part in PARTS
        if parts[part]
    }
    directed = {
        part: set(zip(rows["src"].to_pylist(), rows["dst"].to_pylist(), strict=True)) for part, rows in table.items()
    }
    seen = set().union(*(directed[part] for part in SEEN))
    new = [part for part in table if part not in SEEN]
    assert {"val-s2", "val-s3", "val-s4", "test-s2", "test-s3", "test-s4"} <= set(new)
    for part in new:
        assert not (directed[part] | {(dst, src) for src, dst in directed[part]}) & seen
    seen_hosts = {host for pair in seen for host in pair}
    for name in new:
        for i in {"3": [0], "4": [1], "5": [0, 1]}.get(name[-1], []):
            assert not {pair[i] for pair in directed[name]} & seen_hosts
    cut = manifest["split"]
    train, val, test = (table[part]["time_s"].to_numpy() for part in SEEN)
    assert train.max() < cut["val_from_s"] <= val.min() and val.max() < cut["test_from_s"] <= test.min()
    everything = pa.concat_tables(table.values())
    assert everything.group_by(["probe_id", "msm_id", "time_s"]).aggregate([]).num_rows == len(everything)


def test_a_prepared_folder_is_split_as_slowly_by_quantiles_of_all_its_inputs(tmp_path):
    manifest = prepared_mesh(tmp_path)
    lines = [line for i in range(3) for line in (tmp_path / f"{i}.json").read_text().splitlines()]
    minutes = np.sort([json.loads(line)["timestamp"] // 60 for line in lines])
    cut = [int(minutes[int(np.ceil(share * len(minutes))) - 1] + 1) * 60 for share in (0.75, 0.85)]
    assert [manifest["split"]["val_from_s"], manifest["split"]["test_from_s"]] == cut
    results = {
        tuple(json.loads(line)[name] for name in ("prb_id", "timestamp", "src_addr", "dst_addr")) for line in lines
    }
    want = Counter(reference_parts(sorted(results), RULE, TimeCut(*cut)))
    assert manifest["measurements"]["dropped_held_out"] == want.pop("dropped")
    assert {part: count for part, count in manifest["parts"].items() if count} == want


def test_the_time_cut_is_given_or_taken_from_the_measurements(tmp_path, capsys):
    manifest = prepared_mesh(tmp_path)
    assert manifest["options"]["time_cut"] is None
    assert manifest["split"]["val_from_s"] == pytest.approx(1_700_075_000, abs=2_000)
    assert manifest["split"]["test_from_s"] == pytest.approx(1_700_085_000, abs=2_000)
    arguments = ["prepare", *(str(tmp_path / f"{i}.json") for i in range(3)), "--workers", "1", "--out"]
    given = ["--time-cut", "2023-11-15T00:00", "2023-11-15T11:00+01:00"]  # midnight and ten o'clock, UTC
    assert main([*arguments, str(tmp_path / "cut"), *given]) == 0
    cut = {"val_from_s": 1_700_006_400, "test_from_s": 1_700_042_400}
    manifest = read_manifest(tmp_path / "cut")
    assert manifest["options"]["time_cut"] == cut and cut.items() <= manifest["split"].items()
    train, val, test = [RowReader(tmp_path / "cut", part) for part in SEEN]
    assert train.last_time_s.max() < cut["val_from_s"] <= val.first_time_s.min()
    assert val.last_time_s.max() < cut["test_from_s"] <= test.first_time_s.min()
    assert main([*arguments, str(tmp_path / "cut"), *given]) == 0
    assert "already holds these rows" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "cut")]) == 1
    assert "holds the rows of other inputs or options" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["2023-11-15", "2023-11-15"], "must name two times, the earlier one first"),
        (["2023-11-16", "2023-11-15"], "must name two times, the earlier one first"),
        (["2023-11-15", "2023-11-16", "--split", "none"], 'a time cut goes with the split "pingbench", not "none"'),
        (["yesterday", "2023-11-16"], "'yesterday' is not a time"),
    ],
)
def test_a_time_cut_that_makes_no_sense_is_refused(tmp_path, capsys, options, message):
    dump = write(tmp_path / "a.json", ndjson(ping()))
    for dry_run in ([], ["--dry-run"]):
        assert main(["prepare", str(dump), "--out", str(tmp_path / "rows"), "--time-cut", *options, *dry_run]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "rows").exists()


@pytest.mark.parametrize("cut", [None, CUT])
def test_the_tasks_of_a_job_array_survive_the_way_through_their_file(tmp_path, cut):
    tasks = [
        ReduceTask(
            i, (tmp_path / "input-0",), tmp_path / "sources", tmp_path / f"bucket-{i}", RULE if cut else None, cut
        )
        for i in range(3)
    ]
    with pytest.raises(SystemExit):
        TaskFile().run(reduce_bucket, tasks, lambda *_: None)
    assert read_tasks(tmp_path / TASKS_NAME) == (reduce_bucket, tasks)


def test_a_job_array_writes_the_same_bytes(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "array").mkdir()
    cut = TimeCut(1_700_050_000, 1_700_080_000)
    for _ in range(2):  # the maps, then the reduces
        with pytest.raises(SystemExit):
            prepared_mesh(tmp_path / "array", time_cut=cut, executor="array")
        run_strided(tmp_path / "array" / "rows" / ".partial" / TASKS_NAME, 0, 1)
    assert prepared_mesh(tmp_path / "array", time_cut=cut, executor="array") == prepared_mesh(
        tmp_path / "whole", time_cut=cut
    )
    a, b = ({p.name: p.read_bytes() for p in (tmp_path / name / "rows").iterdir()} for name in ("whole", "array"))
    assert a == b
