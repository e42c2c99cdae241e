"""What a program does in, its exit code and one line about what went wrong out."""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter
from collections.abc import Callable

from ping_llm.system.streams import lost_output, steady_streams

_EXTRAS = {"matplotlib": "plots", "lightgbm": "baselines", "scipy": "baselines"}
_EXTRAS |= dict.fromkeys(("transformers", "huggingface_hub"), "hf")
_EXTRAS |= dict.fromkeys(("dask", "distributed", "dask_jobqueue"), "cluster")
_EXTRAS |= dict.fromkeys(("fastapi", "fastapi_swagger", "prometheus_client", "uvicorn"), "serve")
_WARNINGS_OF_A_KIND = 3


def exit_code(command: Callable[[], int | None], needs_stdout: bool = True) -> int:
    """Calls what a program does, and returns the program's exit code; errors are one line each, and printing ends nothing.

    Output that could not be printed is an error of a program that `needs_stdout`, for its answer is lost. Of one whose files
    are the result it is a warning.
    """
    with steady_streams():
        try:
            code = _one_line_errors(command)
        except SystemExit as stopped:  # of a parser that has printed help, or what is wrong
            if stopped.code or not lost_output():
                raise
            code, needs_stdout = 0, True
        if lost := lost_output():
            kind = "error" if needs_stdout else "warning"
            print(f"{kind}: standard output did not take what was printed ({lost})", file=sys.stderr)
            return code or int(needs_stdout)
        return code


def _one_line_errors(command: Callable[[], int | None]) -> int:
    """What `command` returns; 1 after one line that says what was wrong, 130 if interrupted."""
    log, warnings = logging.getLogger("ping_llm"), _WarningLines()
    log.addHandler(warnings)
    passed_on, log.propagate = log.propagate, False  # libraries that are imported print what reaches the root once more
    try:
        return command() or 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        text = f"{error.name} is not installed; pip install 'ping-llm[{_EXTRAS[error.name]}]'"
    except (ValueError, OSError) as error:
        if os.environ.get("PING_LLM_TRACEBACK"):
            raise
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
    finally:
        log.removeHandler(warnings)
        log.propagate = passed_on
        warnings.close()
    print(f"error: {' '.join(line.strip() for line in text.splitlines())}", file=sys.stderr)
    return 1


class _WarningLines(logging.Handler):
    """Warnings of the package as lines on standard error; of one kind the first few, and how many more there were."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.counts: Counter[str] = Counter()  # by the text before its arguments are filled in

    def emit(self, record: logging.LogRecord) -> None:
        self.counts[record.msg] += 1
        if self.counts[record.msg] <= _WARNINGS_OF_A_KIND:
            print(f"warning: {' '.join(record.getMessage().split())}", file=sys.stderr)

    def close(self) -> None:
        if more := sum(max(count - _WARNINGS_OF_A_KIND, 0) for count in self.counts.values()):
            print(f"warning: {more:,} more of the kinds above", file=sys.stderr)
        super().close()
