"""Every kind of table gives the same text, as it is written; no type is guessed, whatever stands in the first rows."""

import io
import json

import pytest

from ping_llm.data.text_table import BATCH_ROWS, open_table

AS_WRITTEN = [
    "1e3",
    "1.10",
    "007",
    "98446744073709551615",
    "6F9619FF-8B86-D011-B42D-00CF4FC964FF",
    "t",
    "12:30",
    "2026-1-4",
]


def text(source, *columns):
    """The columns as lists, in batches put together."""
    table = source if hasattr(source, "batches") else open_table(source)
    batches = list(table.batches(columns or table.names))
    return {name: [v for batch in batches for v in batch.column(name).to_pylist()] for name in columns or table.names}


def blocks(content: bytes, size: int):
    return (content[at : at + size] for at in range(0, len(content), size))


def test_text_of_csv_and_json_is_what_is_written(tmp_path):
    csv = "id,note\n" + "".join(f"{one},x\n" for one in AS_WRITTEN)
    assert text(io.BytesIO(csv.encode()), "id")["id"] == AS_WRITTEN
    numbers = ["1e3", "1.10", "98446744073709551615", "-0.0", "1E400"]
    lines = "".join(f'{{"id": {one}}}\n' for one in (*numbers, '"1e3"', "null", "true"))
    assert text(io.BytesIO(lines.encode()))["id"] == [*numbers, "1e3", None, "true"]
    array = json.dumps([{"id": one} for one in AS_WRITTEN], indent=2)
    assert text(io.BytesIO(array.encode()))["id"] == AS_WRITTEN


@pytest.mark.parametrize("late", ["0.4", "2026-01-05 17:30:00", "0020489"])
def test_what_stands_after_many_rows_is_read_as_what_stands_before(late):
    early = 60_000
    csv = "value\n" + "-1\n" * early + f"{late}\n"
    assert text(io.BytesIO(csv.encode()))["value"] == ["-1"] * early + [late]
    lines = '{"value": -1}\n' * early + f'{{"note": [1], "value": "{late}"}}\n'
    assert text(io.BytesIO(lines.encode()), "value")["value"] == ["-1"] * early + [late]


def test_a_table_comes_in_batches_and_nothing_is_read_before_it_is_wanted():
    rows, taken = 3 * BATCH_ROWS + 7, []

    def content():
        yield b"a,b\n"
        for at in range(0, rows, 1000):
            taken.append(at)
            yield b"".join(b"%d,x\n" % i for i in range(at, min(at + 1000, rows)))

    batches = open_table(content()).batches(["a", "absent"])
    first = next(batches)
    assert len(taken) < 250 and first.num_rows <= BATCH_ROWS  # 9 MB of 1.2 MB: all; of more it would not be
    values = first.column("a").to_pylist() + [v for batch in batches for v in batch.column("a").to_pylist()]
    assert values == [str(i) for i in range(rows)] and first.column("absent").null_count == first.num_rows
