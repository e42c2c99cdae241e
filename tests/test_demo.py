"""The rows of the demo's table are what their labels say."""

import pyarrow as pa
import pytest

from ping_llm.cli import main
from ping_llm.data.ingest.splits import PARTS
from ping_llm.data.rows import RowReader
from ping_llm.demo import INTERNET
from ping_llm.demo import PARTS as SHOWN

SMALL = ("--probes", "60", "--targets", "40", "--days", "0.2")


@pytest.mark.parametrize("size", [SMALL, pytest.param(INTERNET, marks=pytest.mark.slow)])
def test_what_the_demo_calls_never_seen_is_nowhere_in_train(tmp_path, size):
    assert main(["synth", "--out", str(tmp_path / "dump"), *size, "--workers", "1"]) == 0
    assert main(["prepare", str(tmp_path / "dump"), "--out", str(tmp_path / "rows"), "--workers", "1"]) == 0
    tables = {
        part: pa.concat_tables([row.to_measurements() for row in RowReader(tmp_path / "rows", part)]) for part in PARTS
    }
    assert all(table.num_rows >= (100 if size == INTERNET else 1) for table in tables.values())
    src, dst = ({part: set(table[end].to_pylist()) for part, table in tables.items()} for end in ("src", "dst"))
    pairs = {
        part: set(zip(table["src"].to_pylist(), table["dst"].to_pylist(), strict=True))
        for part, table in tables.items()
    }
    assert not src[SHOWN["unseen_sources"]] & (src["train"] | dst["train"])
    unseen = pairs[SHOWN["unseen_pairs"]]
    assert not (unseen | {(d, s) for s, d in unseen}) & pairs["train"]
    hosts = src["train"] | dst["train"]
    assert all(s in hosts and d in hosts for s, d in unseen)
    assert pairs[SHOWN["seen_pairs"]] <= pairs["train"]
    train, later = (tables[part]["time_s"].to_numpy() for part in ("train", SHOWN["seen_pairs"]))
    assert train.max() < later.min()
