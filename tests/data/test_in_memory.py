"""Tables of any library are columns by name, and an answer is of the kind that was given."""

import numpy as np
import pyarrow as pa
import pytest

from ping_llm.data.in_memory import columns_of, count_rows, extended, held, kind_of, taken
from ping_llm.data.text_table import table_of

ROWS = [{"id": "a", "x": 1}, {"id": "b", "x": None}, {"id": "c", "x": 3}]
ANSWERS = pa.table({"p": [0.5, None, 0.25]})


class Stream:
    """Hands out Arrow data once, as a cursor of a database does."""

    def __init__(self, table):
        self.reader = table.to_reader()

    def __arrow_c_stream__(self, schema=None):
        return self.reader.__arrow_c_stream__(schema)


def lists(table):
    """The columns of a table of any kind as lists."""
    return {
        name: column.to_pylist() if hasattr(column, "to_pylist") else list(column)
        for name, column in columns_of(table).items()
    }


def make(kind):
    if kind in ("pandas", "polars"):
        return pytest.importorskip(kind).DataFrame(ROWS)
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    return {"records": ROWS, "columns": columns, "arrow": pa.table(columns)}[kind]


@pytest.mark.parametrize("kind", ["arrow", "pandas", "polars", "records", "columns"])
def test_an_answer_is_of_the_kind_that_was_given(kind):
    given = make(kind)
    assert kind_of(given) == kind and count_rows(given) == 3 and held(given) is given
    answer = extended(given, ["id"], ANSWERS)
    assert type(answer) is type(given) and list(columns_of(answer)) == ["id", "p"]
    assert table_of(answer).read_text(["id", "p"]).to_pydict() == {"id": ["a", "b", "c"], "p": ["0.5", None, "0.25"]}
    assert type(extended(given, [], ANSWERS)) is type(given) and list(columns_of(extended(given, [], ANSWERS))) == ["p"]
    some = taken(given, [2, 0])
    assert type(some) is type(given) and table_of(some).read_text(["id", "x"]).to_pydict() == {
        "id": ["c", "a"],
        "x": ["3", "1"],
    }
    assert table_of(given).read_text(["x"]).to_pydict() == {"x": ["1", None, "3"]}


def test_an_answer_of_pandas_has_the_index_of_the_table_even_if_it_repeats():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(ROWS, index=["u", "v", "u"])
    answer = extended(frame, ["x"], ANSWERS)
    assert list(answer.index) == ["u", "v", "u"] and answer["p"].to_list()[::2] == [0.5, 0.25]
    assert list(frame.columns) == ["id", "x"]


def test_what_hands_out_arrow_data_is_read_once():
    table = pa.table({"id": ["a", "b", "c"]})
    for given in (Stream(table), table.to_reader(), table.to_batches()[0]):
        kept = held(given)
        assert table_of(kept).read_text(["id"]).equals(table) and extended(kept, ["id"], ANSWERS).num_columns == 2


def test_the_columns_of_records_are_all_their_keys():
    records = [{"a": 1}, {"b": 2}, {}]
    assert lists(records) == {"a": [1, None, None], "b": [None, 2, None]} and count_rows(records) == 3
    assert count_rows([{}, {}]) == table_of([{}, {}]).num_rows == 2
    assert extended(records, ["a"], ANSWERS)[1] == {"a": None, "p": None}


def test_columns_may_be_of_any_library():
    given = {
        "a": (1, "x"),
        "b": np.array([1.5, 2]),
        "c": pa.array(["u", None]),
        "d": np.array(["2026-01-03T12", "NaT"], "M8[h]"),
    }
    expected = {"a": ["1", "x"], "b": ["1.5", "2"], "c": ["u", None], "d": ["2026-01-03T12", None]}
    assert table_of(given).read_text(list(given)).to_pydict() == expected


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("queries.csv", "a str is no table; pass one of Arrow"),
        (b"", "a bytes is no table"),
        (7, "a int is no table"),
        (None, "a NoneType is no table"),
        ([{"a": 1}, 2], "a list of int is no table; pass dicts, one a row"),
        ({"a": 1}, "the column a is a int; pass a list"),
        ({"a": "xyz"}, "the column a is a str; pass a list"),
        ({"a": [1], "b": [1, 2]}, "the columns differ in length: .*'a': 1, 'b': 2"),
        (pa.table([[1], [2]], names=["a", "a"]), "the table has the column a twice"),
        (pa.array([1]), "a Int64Array is no table"),
    ],
)
def test_what_is_no_table_says_what_to_pass(table, message):
    with pytest.raises(ValueError, match=message):
        table_of(table)


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_columns_of_frames_that_arrow_cannot_take_are_read_value_by_value(library):
    frames = pytest.importorskip(library)
    mixed = frames.Series([7, "a", None], dtype=object if library == "pandas" else frames.Object)
    large = frames.Series([2**70, 1, 2], dtype=object if library == "pandas" else frames.Int128)
    text = table_of(frames.DataFrame({"mixed": mixed, "large": large})).read_text(["mixed", "large"]).to_pydict()
    assert text == {"mixed": ["7", "a", None], "large": [str(2**70), "1", "2"]}


def test_types_of_pandas_are_read_or_refused_by_their_name():
    pandas = pytest.importorskip("pandas")
    import datetime as dt

    frame = pandas.DataFrame(
        {
            "float": [1, 2, None],
            "nullable": pandas.array([1, 2, None], "Int64"),
            "category": pandas.Categorical([dt.date(2026, 1, 3), dt.datetime(2026, 1, 4, 12), None]),
            "dates": pandas.Series([dt.date(2026, 1, 3), dt.datetime(2026, 1, 4, 12), pandas.NaT], dtype=object),
            "na": pandas.Series(["x", pandas.NA, float("nan")], dtype=object),
            "time": pandas.to_datetime(["2026-01-03T12:00:00.000000001", "2026-01-04T12:00", None], format="ISO8601"),
        }
    )
    dates = ["2026-01-03", "2026-01-04T12:00:00", None]
    assert table_of(frame).read_text(list(frame)).to_pydict() == {
        "float": ["1", "2", None],
        "nullable": ["1", "2", None],
        "category": dates,
        "dates": dates,
        "na": ["x", None, None],
        "time": ["2026-01-03T12:00:00.000000001", "2026-01-04T12:00:00", None],
    }
    for values, message in (
        (pandas.period_range("2026", periods=3, freq="Y"), "x is of type pandas.period"),
        (
            pandas.Series(list(pandas.period_range("2026", periods=3, freq="Y")), dtype=object),
            "row 1: x: a Period is neither",
        ),
        (pandas.to_timedelta([1, 2, 3], unit="s"), "x is of type duration"),
    ):
        with pytest.raises(ValueError, match=message):
            table_of(pandas.DataFrame({"x": values})).read_text(["x"])
    with pytest.raises(ValueError, match="the column x twice"):
        table_of(pandas.DataFrame([[1, 2]], columns=["x", "x"]))
