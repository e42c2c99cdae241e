"""The options of a script in, its lines printed and written out: what scripts/eval_*.py share."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ping_llm.eval.conditionals import open_questions
from ping_llm.eval.report import lines_as_text


def script_parser(description: str, run: bool = True) -> argparse.ArgumentParser:
    """Options of every script: --device and --json, and the run folder as the first argument."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if run:
        parser.add_argument("run", type=Path, help="run folder of a trained model")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    return parser


def question_parser(description: str, queries: int) -> argparse.ArgumentParser:
    """Options of the scripts that ask about measurements of one part of a folder of rows; see `questions`."""
    parser = script_parser(description)
    parser.add_argument("--data", type=Path, required=True, help="folder of rows")
    parser.add_argument("--part", default="test-s1", help="part of the rows")
    parser.add_argument("--queries", type=int, default=queries, help="measurements at most")
    parser.add_argument("--seed", type=int, default=0, help="the same seed asks the same")
    return parser


def questions(options: argparse.Namespace):
    """The model, and the queries of the part, that the options of `question_parser` name."""
    return open_questions(options.run, options.data, options.part, options.queries, options.seed, options.device)


def run_script(
    parser: argparse.ArgumentParser,
    answer: Callable[[argparse.Namespace], list[dict]],
    argv: Sequence[str] | None,
) -> int:
    """Prints the lines of `answer`, and writes them to --json; the exit code: 1 after one line that says what was wrong."""
    options = parser.parse_args(argv)
    try:
        lines = answer(options)
        print(lines_as_text(lines))
        if options.json:
            options.json.write_text(json.dumps(lines, indent=1) + "\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
