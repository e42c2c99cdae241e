"""What Arrow reads of a CSV: nothing is swallowed by an open quote, and no thread outlives the reading."""

import io

import pyarrow as pa
import pytest

from ping_llm.data import csv_blocks
from ping_llm.data.csv_blocks import header_of
from ping_llm.data.text_table import open_table


def rows(text):
    return open_table(io.BytesIO(text.encode()), "q.csv").read_as_given().to_pylist()


@pytest.mark.parametrize("text", ['a,b\n"x,1\ny,2\n', 'a\nx\n"y\nz\n', 'a,b\nx,1\n"y\n'])
def test_a_quote_without_an_end_is_told_and_swallows_no_rows_in_silence(text):
    with pytest.raises(ValueError, match=r"q\.csv: a quote has no end, and all rows after it are part of it"):
        rows(text)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ('a\n"x\ny"\n', ["x\ny"]),
        ('a\n"x""y"', ['x"y']),
        ('a\nx"y\n', ['x"y']),
        ('a\n"x"', ["x"]),
        ("a\n\x03\n", ["\x03"]),
        ("a\rx\ry\r", ["x", "y"]),
        ("a\n", []),
    ],
)
def test_the_last_row_is_read_as_it_is_however_it_ends(text, values):
    assert [row["a"] for row in rows(text)] == values


@pytest.mark.parametrize("text", ["a" * 200_000, '"' + "a" * 200_000])
def test_a_header_that_is_no_csv_is_an_error_of_the_table(text):
    with pytest.raises(ValueError, match="the header cannot be read as CSV: field larger than field limit"):
        header_of(text)


@pytest.mark.parametrize("bad_row", ["", "x\n"])
def test_one_thread_of_arrow_reads_and_has_done_another_task_at_the_end(monkeypatch, bad_row):
    # What it lets go of while Python ends aborts the process: about every other time in a program that imports torch.
    threads, tasks, open_csv = pa.io_thread_count(), [], csv_blocks.pyarrow.csv.open_csv

    def watched(file, *options):
        tasks.append((type(file), pa.io_thread_count()))
        return open_csv(file, *options)

    monkeypatch.setattr(csv_blocks.pyarrow.csv, "open_csv", watched)
    try:
        assert rows(f"a,b\n{bad_row}x,y\n") == [{"a": "x", "b": "y"}]
    except ValueError as error:
        assert bad_row and "it has 1 fields" in str(error)
    assert tasks == [(pa.PythonFile, 1), (pa.BufferReader, 1)]
    assert pa.io_thread_count() == threads > 1
