"""Reports that hold Atlas results in, the results out: {"measurement_id": …, "raw": [result, …], …}, one or several.

What stands in a report beside its results may be of any length, and is passed over. Bytes are taken for Latin-1: what JSON
is made of is ASCII, and the rest comes out as it went in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain

LISTS = ("raw", "results", "data")
"""Members of a report that hold a list of results."""

_OF_RESULT = ("fw", "result", "rtt")  # members of every result, which no report has
_TOKEN = re.compile(r'"((?:[^"\\]|\\.)*)(?:"(\s*:)?|\\?\Z)|[\[\]{}]', re.DOTALL)
_LIST = re.compile(r"\s*(?:\Z|\[\s*(?:\Z|[{\]]))")
_MOST_HELD = 1 << 26  # bytes before it is clear what a file holds
_LONGEST_TEXT = 1 << 24


class _Scanner:
    """JSON in parts in, its members and brackets out; a token that is cut at the end of a part waits for the next."""

    def __init__(self) -> None:
        self.stack: list[str] = []
        self._rest = ""

    def scan(self, part: bytes) -> Iterator[tuple[str, int, int, str]]:
        """Of each token: the text that it is in, its begin and end there, and the key, if it is one, else "".

        The last is of no length: what comes after it waits. `stack` holds the brackets that are open before a token.
        """
        text, at = self._rest + part.decode("latin-1"), 0
        while token := _TOKEN.search(text, at):
            if token.end() == len(text) and token[0][0] == '"':
                break  # the string goes on, or a colon may follow
            yield text, token.start(), token.end(), token[1] if token[2] else ""
            if token[0] in "[{":
                self.stack.append(token[0])
            elif token[0] in "]}" and self.stack:
                self.stack.pop()
            at = token.end()
        end = token.start() if token and len(text) - token.start() < _LONGEST_TEXT else len(text)
        yield text, end, end, ""
        self._rest = text[end:]

    def in_report(self) -> bool:
        """Whether the next token is a member of an object that is in no other."""
        return self.stack.count("{") == 1 and self.stack[-1] == "{"


def find_reports(parts: Iterable[bytes]) -> tuple[bool, Iterator[bytes]]:
    """Whether JSON holds reports rather than results, by the first member that tells; and the same parts again."""
    parts = iter(parts)
    held: list[bytes] = []
    scanner = _Scanner()
    for part in parts:
        held.append(part)
        for text, begin, end, key in scanner.scan(part):
            if not scanner.in_report():
                continue
            if key in LISTS and _LIST.match(text, end):
                return True, chain(held, parts)
            if key in _OF_RESULT or text[begin:end] == "}":
                return False, chain(held, parts)
        if sum(map(len, held)) > _MOST_HELD:
            break
    return False, chain(held, parts)


def results_of(parts: Iterable[bytes], name: str, damage: list[str]) -> Iterator[bytes]:
    """The lists of results of all reports, brackets included, in parts; `damage` says if the last report has no end."""
    scanner = _Scanner()
    depth = 0  # of the list that is being read; 0 = none
    list_next = False
    for part in parts:
        begin = 0
        for text, start, end, key in scanner.scan(part):
            token = text[start:end]
            if not depth and list_next and token == "[":
                depth, begin = len(scanner.stack), start
            elif depth and (not token or (token == "]" and len(scanner.stack) == depth + 1)):
                yield text[begin:end].encode("latin-1")
                depth = depth if not token else 0
            if token:
                list_next = key in LISTS and scanner.in_report()
    if scanner.stack:
        damage.append(f"{name} is cut off: a report in it has no end; get it again")
