"""What happens in, one line of JSON on standard error out; without addresses, unless they are wanted."""

from __future__ import annotations

import datetime as dt
import json
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ping_llm.system.progress import say

_LOGGERS = ("ping_llm", "uvicorn.error", "uvicorn.access", "asyncio")
log = logging.getLogger("ping_llm.serve")


class JsonLines(logging.Handler):
    """A line for each record. What `extra={"facts": {…}}` holds is said in fields of its own.

    The arguments of a message may be addresses, and so may the text of an error: without `addresses` neither is said.
    """

    def __init__(self, addresses: bool) -> None:
        super().__init__(logging.INFO)
        self.addresses = addresses

    def emit(self, record: logging.LogRecord) -> None:
        time = dt.datetime.fromtimestamp(record.created, dt.UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": time.replace("+00:00", "Z"), "level": record.levelname.lower()}
        line |= {"event": record.getMessage() if self.addresses else str(record.msg)} | getattr(record, "facts", {})
        if record.exc_info and (error := record.exc_info[1]) is not None:
            line["error"] = f"{type(error).__name__}: {error}" if self.addresses else type(error).__name__
            line["at"] = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
        say(json.dumps(line, default=str))


@contextmanager
def json_logs(addresses: bool) -> Iterator[None]:
    """Inside, what the package and the server log goes out as JSON lines alone."""
    handler = JsonLines(addresses)
    before = []
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        before.append((logger, logger.handlers, logger.level, logger.propagate))
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name == "ping_llm" else logging.WARNING)
    try:
        yield
    finally:
        for logger, handlers, level, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
