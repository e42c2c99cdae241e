"""Printing ends no run: in any locale, and with streams that are closed, left by their reader, or on a full disk."""

import os
import subprocess
import sys

import pytest
from paths import CONFIGS
from training_runs import last_step, write_config

from ping_llm.cli import _COMMANDS, main
from ping_llm.inference.cli import COMMANDS
from ping_llm.system.streams import _in_plain_characters

ASCII = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"}
"""A locale whose text files and streams are ASCII, on any machine."""
PLAN = ["plan", CONFIGS / "tiny.toml"]
EVERY_HELP = f"""
import sys
from ping_llm.cli import main
for command in {[["--help"], *([name, "--help"] for name in _COMMANDS)]!r}:
    try: main(command)
    except SystemExit as stopped: assert not stopped.code, (command, stopped.code)
for name in {list(COMMANDS)!r}:
    try: main(["inference", name, "--help"])
    except SystemExit as stopped: assert not stopped.code, (name, stopped.code)
"""


def shell(command: str, *argv, env=None) -> subprocess.CompletedProcess:
    """`command` in a shell, where $@ is `ping-llm` with `argv`."""
    words = [sys.executable, "-m", "ping_llm", *map(str, argv)]
    return subprocess.run(["bash", "-c", command, "bash", *words], capture_output=True, text=True, env=env)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_help_is_printed_in_any_encoding(encoding):
    done = subprocess.run(
        [sys.executable, "-c", EVERY_HELP], capture_output=True, env=ASCII | {"PYTHONIOENCODING": encoding}
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode(encoding).count("usage: ") == 1 + len(_COMMANDS) + len(COMMANDS)


_PLAIN = {
    "→": "->",
    "−": "-",
    "≤": "<=",
    "…": "...",
    "³": "3",
    "é": "e",
    "━": "-",
    "┃": "|",
    "┏": "+",
    "█": "#",
    "中": "?",
}
_PLAIN |= {chr(0xDCFF): b"\xff", chr(0xD800): "?"}  # a byte of a file name, and half a character


@pytest.mark.parametrize(("character", "plain"), list(_PLAIN.items()))
def test_a_character_that_an_encoding_lacks_has_a_plain_form(character, plain):
    error = UnicodeEncodeError("ascii", f"a{character}b", 1, 2, "")
    assert _in_plain_characters(error) == (plain, 2)


@pytest.mark.parametrize("stream", ["<&-", "2>&-", "<&- 2>&-"])
def test_a_closed_stream_that_is_not_needed_changes_nothing(stream):
    done = shell(f'"$@" {stream}', "fetch", "--help")
    assert done.returncode == 0 and "usage: ping-llm fetch" in done.stdout


@pytest.mark.parametrize(("stream", "why"), [(">&-", "it is closed"), (">/dev/full", "No space left on device")])
def test_an_answer_that_cannot_be_printed_is_one_line_and_files_are_written_all_the_same(tmp_path, stream, why):
    lost = f"standard output did not take what was printed ({why})"
    for argv in (PLAN, ["plan", "--help"]):
        done = shell(f'"$@" {stream}', *argv)
        assert (done.returncode, done.stderr) == (1, f"error: {lost}\n")
    done = shell(
        f'"$@" {stream}', "synth", "--out", tmp_path, "--probes", 5, "--targets", 3, "--days", 0.1, "--workers", 1
    )
    assert done.returncode == 0 and done.stderr.endswith(f"\nwarning: {lost}\n")
    assert (tmp_path / "truth.json").is_file() and "Traceback" not in done.stderr


def test_a_reader_that_leaves_as_head_does_is_no_error():
    done = shell('exec 3>&1; { "$@" || echo failed >&3; } | head -n 0', *PLAN, env=ASCII)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_answers_for_programs_are_utf8_in_any_locale_and_refused_at_once_where_they_could_not_go(tmp_path):
    argv = ["inference", "batch", "--model", tmp_path, "--input", "-", "--output", "-"]
    done = shell('"$@" >&-', *argv)
    assert (done.returncode, done.stderr) == (1, "error: standard output is closed; name a file\n")
    done = shell('"$@" <&-', *argv)
    assert (
        done.returncode == 1
        and done.stderr.startswith("error: nothing came on standard input")
        and done.stderr.count("\n") == 1
    )
    code = (
        "import sys; from ping_llm.system.streams import print_data, steady_streams\n"
        "with steady_streams(): print_data(sys.stdin.read()); print(chr(0x2192))"
    )
    done = subprocess.run([sys.executable, "-c", code], input="é中\n".encode(), capture_output=True, env=ASCII)
    assert done.stdout == "é中\n->\n".encode(), done.stderr.decode()


def test_a_file_name_that_is_no_text_is_printed_as_it_is():
    done = subprocess.run([sys.executable, "-m", "ping_llm", "inspect", b"/caf\xe9"], capture_output=True, env=ASCII)
    assert done.returncode == 1 and b"/caf\xe9" in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.slow
def test_a_run_whose_output_goes_nowhere_loses_nothing(tmp_path, rows_folder):
    config = write_config(tmp_path / "config.toml", rows_folder, sample_every=6)
    lost = shell('"$@" <&- 2>&- | head -n 1', "train", config, env=ASCII)
    assert lost.stdout.endswith("starts: 41,664 parameters, cpu in fp32\n")
    assert last_step(tmp_path / "run") == 12
    assert " → " in (tmp_path / "run" / "samples.txt").read_text("utf-8")
    assert (tmp_path / "run" / "report.md").is_file()


def test_streams_that_others_have_put_in_place_are_left_alone(capsys, tmp_path):
    before = sys.stdout, sys.stderr, os.environ.get("PYTHONUTF8")
    assert main(list(map(str, PLAN))) == 0
    assert (sys.stdout, sys.stderr, os.environ.get("PYTHONUTF8")) == before
    assert "parameters" in capsys.readouterr().out
