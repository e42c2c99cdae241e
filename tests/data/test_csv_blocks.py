"""What Arrow reads of a CSV: nothing is swallowed by an open quote, and no thread outlives the reading."""

import io
import subprocess
import sys

import pytest

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


def test_a_program_that_ends_right_after_it_read_a_csv_ends_with_its_own_exit_code():
    # With torch Python takes long to end: without the wait every other one of these is aborted by Arrow's thread.
    program = """
import io, sys, torch
from ping_llm.data.text_table import open_table
open_table(io.BytesIO(b"a,b\\nx,y\\n")).read_as_given()
sys.exit(7)"""
    ended = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True) for _ in range(4)]
    assert [(one.returncode, one.stderr) for one in ended] == [(7, "")] * 4
