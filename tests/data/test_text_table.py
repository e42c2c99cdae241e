"""Every kind of table gives the same text, as it is written; no type is guessed, whatever stands in the first rows."""

import io
import json
import os
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ping_llm.data.text_table import BATCH_ROWS, Number, open_table

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
ROWS = [{"id": "a", "x": "1", "note": "n"}, {"id": "b", "x": None, "note": "ü"}, {"id": "c", "x": "3.50", "note": None}]
COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}
CSV = "id,x,note\na,1,n\nb,,ü\nc,3.50,\n"


def text(source, *columns):
    """The columns as lists, of all batches put together."""
    table = open_table(io.BytesIO(source) if isinstance(source, bytes) else source)
    found = {name: [] for name in columns or table.names}
    for batch in table.batches(list(found)):
        for name, values in found.items():
            values += batch.column(name).to_pylist()
    return found


def json_lines(rows=ROWS):
    return "".join(json.dumps(row) + "\n" for row in rows)


TABLE = pa.table(COLUMNS)


def arrow(open_writer, table=TABLE):
    sink = io.BytesIO()
    with open_writer(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def parquet(table=TABLE):
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


FILES = {
    "CSV": CSV.encode(),
    "CSV with a mark": b"\xef\xbb\xbf" + CSV.encode(),
    "CSV with Windows line ends and blank lines": b"\r\n" + CSV.replace("\n", "\r\n\r\n").encode(),
    "CSV with old Mac line ends": CSV.replace("\n", "\r").encode(),
    "CSV without a last line end": CSV.removesuffix("\n").encode(),
    "CSV in UTF-16": CSV.encode("utf-16"),
    "CSV in quotes": b'"id", x ,"note"\n"a","1",n\n"b",,\xc3\xbc\n"c","3.50",\n',
    "TSV": CSV.replace(",", "\t").encode(),
    "semicolons": CSV.replace(",", ";").encode(),
    "JSON lines": json_lines().encode(),
    "JSON lines in UTF-16": json_lines().encode("utf-16"),
    "JSON lines without a last line end": json_lines().encode().rstrip(),
    "JSON array": json.dumps(ROWS).encode(),
    "JSON array, indented": b"\n " + json.dumps(ROWS, indent=2).encode(),
    "JSON objects, indented": "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
    "JSON objects on one line": "".join(json.dumps(row) for row in ROWS).encode(),
    "JSON without what is null": json_lines([{k: v for k, v in row.items() if v is not None} for row in ROWS]).encode(),
    "Parquet": parquet(),
    "Arrow file": arrow(pa.ipc.new_file),
    "Arrow stream": arrow(pa.ipc.new_stream),
}
each_file = pytest.mark.parametrize("content", FILES.values(), ids=FILES)


@each_file
def test_every_format_is_the_same_text(content, tmp_path):
    assert text(content) == COLUMNS
    assert text(content, "absent", "x") == {"absent": [None] * 3, "x": COLUMNS["x"]}
    (tmp_path / "table").write_bytes(content)  # known by its content: it has no suffix
    assert text(tmp_path / "table") == COLUMNS
    for size in (1, 7, 1000):  # as what unpacks a file hands it out
        assert text(content[at : at + size] for at in range(0, len(content), size)) == COLUMNS


@each_file
def test_what_cannot_be_sought_in_is_read_too(content, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=[content])
    writer.start()
    assert text(pipe) == COLUMNS
    writer.join()


@each_file
def test_a_table_that_is_cut_off_is_refused_or_misses_no_more_than_the_end_of_its_last_value(content):
    whole = [tuple(row.values()) for row in ROWS]
    for length in range(0, len(content), 3):
        try:
            table = text(content[:length], *COLUMNS)
        except ValueError as error:
            assert "\n" not in str(error)
            continue
        rows = list(zip(*table.values(), strict=True))
        assert rows[:-1] == whole[: len(rows[:-1])]
        for one, full in zip(rows[-1], whole[len(rows) - 1], strict=True) if rows else ():
            assert (full or "").startswith(one or "")


def test_text_is_what_is_written_and_no_type_is_guessed():
    assert text("".join(["id,note\n", *(f"{one},x\n" for one in AS_WRITTEN)]).encode(), "id")["id"] == AS_WRITTEN
    numbers = ["1e3", "1.10", "98446744073709551615", "-0.0", "1E400"]
    lines = "".join(f'{{"id": {one}}}\n' for one in (*numbers, '"1e3"', "null", "true", "NaN"))
    assert text(lines.encode())["id"] == [*numbers, "1e3", None, "true", None]
    assert text(json.dumps([{"id": one} for one in AS_WRITTEN]).encode())["id"] == AS_WRITTEN
    typed = pa.table(
        {
            "x": pa.array([12.4, None]),
            "y": pa.array([2**64 - 1, 0], pa.uint64()),
            "z": pa.array([0, 1], pa.timestamp("ns")),
        }
    )
    expected = {
        "x": ["12.4", None],
        "y": ["18446744073709551615", "0"],
        "z": ["1970-01-01T00:00:00", "1970-01-01T00:00:00.000000001"],
    }
    assert text(parquet(typed)) == text(arrow(pa.ipc.new_file, typed)) == expected


def test_of_csv_an_empty_text_in_quotes_is_text_and_nothing_is_missing():
    assert text(b'id,x\n"",1\n,2\nNULL,3\n"a,b",4\n"a\nb",5\n"say ""a""",6\n')["id"] == [
        "",
        None,
        "NULL",
        "a,b",
        "a\nb",
        'say "a"',
    ]


@pytest.mark.parametrize("late", ["0.4", "2026-01-05 17:30:00", "0020489"])
def test_what_stands_after_many_rows_is_read_as_what_stands_before(late):
    early = 60_000
    assert text(("value\n" + "-1\n" * early + f"{late}\n").encode())["value"] == ["-1"] * early + [late]
    lines = '{"value": -1}\n' * early + f'{{"note": [1], "value": "{late}"}}\n'
    assert text(lines.encode(), "value")["value"] == ["-1"] * early + [late]


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_a_table_comes_in_batches_while_it_is_read(kind):
    rows, came, in_time = BATCH_ROWS * (40 if kind == "csv" else 5), threading.Event(), []

    def content():
        yield b"a,b\n" if kind == "csv" else b""
        for at in range(0, rows, BATCH_ROWS):
            if at == rows * 4 // 5:
                in_time.append(came.wait(60))
            form = b"%d,abcdefghij\n" if kind == "csv" else b'{"a": %d, "b": "x"}\n'
            yield b"".join(form % i for i in range(at, at + BATCH_ROWS))

    batches = open_table(content()).batches(["a"])
    first = next(batches)
    came.set()
    assert first.num_rows <= BATCH_ROWS
    count, last = first.num_rows, first
    for last in batches:
        assert last.column("a")[0].as_py() == str(count) and last.num_rows <= BATCH_ROWS
        count += last.num_rows
    assert count == rows and in_time == [True]


def test_the_blocks_in_which_a_file_is_read_change_nothing(monkeypatch):
    monkeypatch.setattr("ping_llm.data.text_table.MOST_BYTES", 16)
    monkeypatch.setattr("ping_llm.data.text_table.BATCH_ROWS", 3)
    ids = [f"a{i}\n{'b' * (i % 40)}" for i in range(100)]
    quoted = b"id\n" + b"".join(f'"{one}"\n'.encode() for one in ids)
    assert text(quoted)["id"] == ids
    with pytest.raises(ValueError, match="row 101: it has 2 fields, the header 1"):
        text(quoted + b"c,d\n" * 100)
    with pytest.raises(ValueError, match="row 101: id: it is no UTF-8"):
        text(quoted + b"\xff\n")
    table = pa.table({"id": pa.array([*[b"a"] * 100, b"\xff"])})
    with pytest.raises(ValueError, match="row 101: id: it is no UTF-8"):
        text(parquet(table))


def test_all_of_a_table_has_the_types_of_its_format():
    assert open_table(io.BytesIO(CSV.encode())).read_as_given().equals(TABLE)
    typed = pa.table({"x": pa.array([12.4, None]), "z": pa.array([0, 1], pa.timestamp("ns"))})
    assert open_table(io.BytesIO(parquet(typed))).read_as_given().equals(typed)
    lists = open_table(io.BytesIO(b'{"id": 7, "x": 1.10}\n{"id": "7", "y": [1]}\n')).read_as_given()
    assert lists == {"id": ["7", "7"], "x": ["1.10", None], "y": [None, ["1"]]}
    assert [type(value) for value in lists["id"]] == [Number, str]


NOTHING = {
    **{str(content): content for content in (b"", b"\n", b"id,x\n", b"[]", b" [ ]\n")},
    "arrow": arrow(pa.ipc.new_file, TABLE.slice(3)),
    "parquet": parquet(TABLE.slice(3)),
}


@pytest.mark.parametrize("content", NOTHING.values(), ids=NOTHING)
def test_a_table_may_have_no_rows(content):
    assert text(content, "id") == {"id": []}
    given = open_table(io.BytesIO(content)).read_as_given()
    assert not len(given)


@pytest.mark.parametrize("name", ["q[1].csv", "q*.csv", "run [v2]/q.csv", "100%.csv", "~q.csv"])
def test_a_name_is_no_pattern(tmp_path, name):
    for other in ("q1.csv", "qq.csv", name):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_text(f"id\n{other}\n")
    assert text(tmp_path / name) == {"id": [name]}


MALFORMED = {
    "too few fields": (b"id,x\na,1\nb\nc,3\n", "row 2: it has 1 fields, the header 2: 'b'"),
    "too many fields": (b"id,x\na,1\nb,2,\nc,3\n", "row 2: it has 3 fields, the header 2"),
    "a line of no JSON": (b'{"id": "a"}\n{"id": b}\n{"id": "c"}\n', "row 2: it is no JSON"),
    "no object": (b'{"id": "a"}\n"b"\n{"id": "c"}\n', "row 2: it is no JSON object"),
    "a string that does not end": (b'{"id": "a"}\n{"id": "b}\n{"id": "c"}\n', "row 2: it is no JSON"),
    "no UTF-8 in CSV": (b"id,x\na,1\n\xff,2\nc,\xff\n", "row 2: id: it is no UTF-8"),
    "no UTF-8 in JSON": (b'{"id": "a"}\n{"id": "\xff"}\n{"id": "c", "x": "\xff"}\n', "row 2: id: it is no UTF-8"),
    "a list": (b'{"id": "a"}\n{"id": ["b"]}\n{"id": "c"}\n', "row 2: id: a list is neither text"),
}


@pytest.mark.parametrize(("content", "message"), MALFORMED.values(), ids=MALFORMED)
def test_a_row_that_cannot_be_read_is_named_or_told_and_left_out(content, message):
    with pytest.raises(ValueError, match=message):
        text(content, "id")
    told = []
    table = open_table(io.BytesIO(content)).batches(["id"], lambda row, why: told.append(f"row {row}: {why}"))
    ids = [value for batch in table for value in batch.column("id").to_pylist()]
    assert [value for value in ids if value] == ["a", "c"]
    assert len(told) == 1 and message.startswith(told[0][:20])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"id": "a"}, {"id": "b"}', "row 3: the array has no end: the file is cut off"),
        (b'{"id": "a"}]', "row 2: an array ends that has no begin"),
        (parquet()[:-9], "is cut off or corrupt"),
        (arrow(pa.ipc.new_file)[:-9], "is cut off or corrupt"),
        (arrow(pa.ipc.new_stream)[:-120], "is cut off or corrupt"),
        (b"id,id\n1,2\n", "has the column id twice; rename one"),
        (parquet(pa.table([[1], [2]], names=["id", "id"])), "has the column id twice; rename one"),
        (b'{"id": "' + b"a" * (3 << 20) + b'"}', "row 1: it is no JSON"),
        (b'{"id": "' + b"a" * (1 << 19), "row 1: it is no JSON"),
    ],
)
def test_damage_is_told(content, message):
    with pytest.raises(ValueError, match=message):
        text(content, "id")


def test_a_column_that_is_not_wanted_may_stand_twice():
    assert text(b"id,x,x\n1,2,3\n", "id") == {"id": ["1"]}


def test_an_error_of_what_hands_out_the_blocks_is_passed_on():
    class Damaged(ValueError):
        pass

    def content(begin):
        yield begin
        raise Damaged("cut off at byte 7")

    for begin in (b"id,x\n" + b"a,1\n" * (1 << 19), b'{"id": "a"}\n' * (1 << 17)):
        with pytest.raises(Damaged, match="cut off at byte 7"):
            text(content(begin), "id")


@pytest.mark.parametrize("name", ["absent.csv", "."])
def test_a_file_that_cannot_be_opened_is_one_line(tmp_path, name):
    with pytest.raises(ValueError, match="cannot be read"):
        open_table(tmp_path / name)
