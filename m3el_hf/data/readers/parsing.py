"""Reads the rows of a file one by one: JSON, JSON lines or Python literals, whole or damaged.

A file is never in memory as a whole. Quotes and brackets alone say where an element ends; each is parsed by itself, so
one that is damaged costs no other, and a Python literal, whose parser needs two hundred times its size, stays small.
"""

from __future__ import annotations

import ast
import codecs
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from m3el_hf.data.readers.fields import skip_row
from m3el_hf.data.schema import Report
from m3el_hf.errors import M3ELError

CHUNK = 1 << 20
"""Bytes read at a time, at least."""

LARGEST = 1 << 24
"""Characters of an element, at most: what is larger is a file whose quotes or brackets do not close."""

LARGEST_LITERAL = 1 << 20
"""The same for a Python literal, whose parser takes some 200 MB for it."""

_AHEAD = 1 << 20  # characters looked through for the next row after a damaged one, and for the end of a first line
_TRIES = 200  # places looked at there

_CLOSING = {"[": "]", "(": ")", "{": "}"}
_QUOTES = "\"'"
_STRING = r""""(?:[^"\\]++|\\.)*+"|'(?:[^'\\]++|\\.)*+\'"""
_INSIDE = re.compile(rf"""(?:[^"'()\[\]{{}}]++|{_STRING})*+""", re.DOTALL)
_OUTSIDE = re.compile(rf"""(?:[^"'()\[\]{{}},]++|{_STRING})*+""", re.DOTALL)
_GAP = re.compile(r"[\s,]*+")
_decode = json.JSONDecoder(strict=False).decode  # not strict: a text may hold any control character as it is

Skip = Callable[[Report, str, str], None]
"""Takes note of an element that cannot be used: the report, the place and the reason."""


class _FlawError(ValueError):
    """What is wrong with an element, and at which of its characters."""

    def __init__(self, reason: str, at: int = 0) -> None:
        super().__init__(reason)
        self.at = at


def parse_elements(path: Path, report: Report, skip: Skip = skip_row) -> Iterator[tuple[int, Any]]:
    """Yields the rows of a file with their numbers, from 0.

    The file is a JSON or Python list, one JSON or Python value a line, or objects one after another, each over several
    lines. Commas that are too many or too few between rows are forgiven. Lines end at line feeds alone: a text may hold
    U+2028. A row that cannot be parsed is skipped and reported; where its quotes or brackets do not close, reading goes
    on with the next that is built like the row before it.

    Args:
        path: The file, in UTF-8, with a byte order mark or without.
        report: Where ``skip`` takes note of what cannot be parsed; rows that are yielded are left to be counted.
        skip: `skip_row`, or `skip_entity` if the rows are entities.

    Raises:
        M3ELError: If the file cannot be read, is of none of these forms, or goes on or ends within a row such that no
            further row can be told.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "rows.json"
        ...     _ = path.write_text("[{'Qid': 'Q1'}, {'Qid': 'Q2}, {'Qid': 'Q3'}]")
        ...     report = Report()
        ...     list(parse_elements(path, report))
        [(0, {'Qid': 'Q1'}), (2, {'Qid': 'Q3'})]
        >>> report.skipped
        ['rows.json row 1: cannot be parsed (it does not end: line 1 column 17); 14 characters passed over']
    """
    with _Source.open(path) as source:
        if source.peek() not in ("[", "(", "{"):
            source.fail_as_foreign()
        if _is_lines(source):
            yield from _lines(source, report, skip)
        elif source.peek() == "{":
            yield from _elements(source, None, _ROWS, report, skip)
        else:
            closing = _CLOSING[source.peek()]
            source.start += 1
            yield from _elements(source, closing, _ROWS, report, skip)


def parse_entries(path: Path, report: Report, skip: Skip = skip_row) -> Iterator[tuple[int, str, Any]]:
    """Yields the entries of a file that is one JSON or Python mapping: number from 0, key, value.

    Otherwise like `parse_elements`. A key that comes twice is yielded twice.

    Raises:
        M3ELError: As for `parse_elements`, or if the file is no mapping.
    """
    with _Source.open(path) as source:
        if source.peek() != "{":
            source.fail_as_foreign("one mapping of ids to rows")
        source.start += 1
        for row, (key, value) in _elements(source, "}", _ENTRIES, report, skip):
            yield row, key, value


class _Source:
    """The characters of a file; those from the current element on are kept.

    Attributes:
        path: The file.
        text: The characters at hand.
        start: Where in ``text`` the current element starts.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.text = ""
        self.start = 0
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._line, self._column = 1, 1  # of the first character at hand

    @classmethod
    def open(cls, path: Path) -> _Source:
        """Opens a file."""
        try:
            return cls(path, path.open("rb"))
        except OSError as error:
            raise M3ELError(f"{path} cannot be read ({error.strerror or error})") from error

    def __enter__(self) -> _Source:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def more(self) -> bool:
        """Reads on, and forgets what stands before ``start``; False at the end of the file."""
        kept = len(self.text) - self.start
        self._line, self._column = self._place(self.start)
        # By doubling: an element is scanned again from a quote that is open, at the cost of what is at hand.
        data = self._read(max(CHUNK, kept))
        self.text, self.start = self.text[self.start :] + data, 0
        return bool(data)

    def _read(self, size: int) -> str:
        while True:
            try:
                data = self._file.read(size)
                text = self._decoder.decode(data, final=not data)
            except OSError as error:
                raise M3ELError(f"{self.path} cannot be read ({error.strerror or error})") from error
            except UnicodeDecodeError as error:
                at = self._file.tell() - len(error.object) + error.start
                reason = f"{self.path} is not UTF-8 text ({error.reason} at byte {at}): convert it first"
                raise M3ELError(reason) from error
            if text or not data:  # a few bytes may be less than a character
                return text

    def peek(self) -> str:
        """Moves ``start`` over blanks and commas and returns the character there; empty at the end of the file."""
        while True:
            self.start = _end(_GAP, self.text, self.start)
            if self.start < len(self.text):
                return self.text[self.start]
            if not self.more():
                return ""

    def end(self) -> int:
        """Returns where in ``text`` the current element ends.

        Raises:
            _FlawError: If it does not, or is too large.
        """
        if self.text[self.start] in ")]}":
            raise _FlawError(f"a stray {self.text[self.start]}")
        open_: list[str] = []
        at = self.start
        while True:
            try:
                at, ended = _scan(self.text, at, len(self.text), open_)
            except _FlawError as flaw:
                raise _FlawError(str(flaw), flaw.at - self.start) from None
            scanned = at - self.start
            if (scanned if ended else len(self.text) - self.start) > LARGEST:
                raise _FlawError(f"it is larger than {LARGEST:,} characters")
            if ended:
                return at
            if not self.more():
                if open_ or scanned < len(self.text):
                    raise _FlawError("it does not end")
                return len(self.text)
            at = self.start + scanned

    def where(self, at: int) -> str:
        """Names a place, counted from ``start``, as editors do."""
        line, column = self._place(self.start + at)
        return f"line {line} column {column}"

    def _place(self, at: int) -> tuple[int, int]:
        lines = self.text.count("\n", 0, at)
        return self._line + lines, at - self.text.rfind("\n", 0, at) if lines else self._column + at

    def fail_as_foreign(self, expected: str = "neither JSON, JSON lines nor Python literals") -> NoReturn:
        """Says that the file is nothing that can be read."""
        while len(self.text) - self.start < 20 and self.more():
            pass
        head = self.text[self.start : self.start + 20]
        reason = f"it begins with {ascii(head)}" if head else "it is empty"
        negation = "" if expected.startswith("neither") else "not "
        raise M3ELError(f"{self.path} is {negation}{expected} ({reason}): fix it or fetch it again")

    def line(self) -> int:
        """The number of the line in which ``start`` is, from 1."""
        return self._place(self.start)[0]


def _end(pattern: re.Pattern[str], text: str, at: int, limit: int | None = None) -> int:
    match = pattern.match(text, at, len(text) if limit is None else limit)
    return match.end() if match else at


def _scan(text: str, at: int, limit: int, open_: list[str]) -> tuple[int, bool]:
    """Scans an element on; ``open_`` holds the closing brackets still to come and is carried from call to call.

    An element ends behind the bracket that closes its first, or before a comma or another's bracket.

    Returns:
        Where it ends, and True; or where to scan on once there is more text, and False.

    Raises:
        _FlawError: If a bracket closes another kind's; its place counts from the start of ``text``.
    """
    while True:
        at = _end(_INSIDE if open_ else _OUTSIDE, text, at, limit)
        if at == limit or text[at] in _QUOTES:  # a quote at which the pattern stops is one that is not closed here
            return at, False
        mark = text[at]
        if mark in _CLOSING:
            open_.append(_CLOSING[mark])
        elif not open_:
            return at, True
        elif mark != open_.pop():
            raise _FlawError(f"a {mark} that closes nothing", at)
        at += 1
        if not open_:
            return at, True


def _parse(text: str) -> Any:
    """Parses a value as JSON, else as a Python literal.

    Raises:
        _FlawError: If it is neither; with the reason of the parser that came further.
    """
    try:
        return _decode(text)
    except RecursionError:
        raise _FlawError("nested too deeply") from None
    except json.JSONDecodeError as error:
        flaw = _FlawError(error.msg, error.pos)
    except ValueError as error:  # a number of thousands of digits
        flaw = _FlawError(str(error))
    if str(flaw) == "Extra data":  # which would make a tuple of what is before a comma and what is behind it
        raise flaw
    if len(text) > LARGEST_LITERAL:
        reason = f"{flaw}; and for a Python literal it is too large, with more than {LARGEST_LITERAL:,} characters"
        raise _FlawError(reason, flaw.at)
    try:
        return ast.literal_eval(text.strip())
    except SyntaxError as error:
        at = _offset(text, error.lineno or 1, error.offset or 1)
        raise _FlawError(error.msg, at) if at > flaw.at else flaw from None
    except (TypeError, ValueError, MemoryError, RecursionError):
        raise flaw from None


def _offset(text: str, line: int, column: int) -> int:
    """Where a place of the stripped text is in ``text``; lines and columns count from 1."""
    start = len(text) - len(text.lstrip())
    for _ in range(line - 1):
        start = text.find("\n", start) + 1
    return start + column - 1


def _parse_entry(text: str) -> tuple[str, Any]:
    """Parses ``key: value``."""
    try:
        entry = _parse("{" + text + "}")
    except _FlawError as flaw:
        raise _FlawError(str(flaw), flaw.at - 1) from None
    if not isinstance(entry, dict) or len(entry) != 1:
        raise _FlawError("no key with a value")
    ((key, value),) = entry.items()
    return str(key), value


def _shape(value: Any) -> object:
    """What two rows have in common that are built alike."""
    if isinstance(value, dict):
        return frozenset(value)
    return tuple(type(item) for item in value) if isinstance(value, list | tuple) else type(value)


@dataclass(frozen=True)
class _Form:
    """How elements are written.

    Attributes:
        parse: Makes a value of an element.
        shape: `_shape` of the row in that value.
        opening: Matches what stands before an element.
    """

    parse: Callable[[str], Any]
    shape: Callable[[Any], object]
    opening: re.Pattern[str]


_ROWS = _Form(_parse, _shape, re.compile(r"[,\n]\s*+(?=[\[({])"))
_ENTRIES = _Form(_parse_entry, lambda entry: _shape(entry[1]), re.compile(r""",\s*+(?=["'])"""))


def _elements(
    source: _Source, closing: str | None, form: _Form, report: Report, skip: Skip
) -> Iterator[tuple[int, Any]]:
    """Yields elements up to a closing bracket, or to the end of the file where that is None."""
    shape: object = None
    for row in count():
        head = source.peek()
        if head == (closing or ""):
            break
        if not head:
            raise M3ELError(f"{source.path} is cut off after its row {row - 1}: fix it or fetch it again")
        end: int | None = None
        try:
            end = source.end()
            value = form.parse(source.text[source.start : end])
        except _FlawError as flaw:
            reason = f"{flaw}: {source.where(flaw.at)}"
            end = _next_row(source, form, shape, end)
            if end is None:
                raise M3ELError(
                    f"{source.path} cannot be read from its row {row} on ({reason}): it is cut off, or a quote or a "
                    "bracket is not closed; fix it or fetch it again"
                ) from None
            passed = f"{end - source.start:,} characters passed over"  # they may hold more rows than this one
            skip(report, f"{source.path.name} row {row}", f"cannot be parsed ({reason}); {passed}")
        else:
            yield row, value
            shape = form.shape(value)
        source.start = end
    source.start += len(closing or "")
    if source.peek():
        raise M3ELError(f"{source.path} goes on after its end ({source.where(0)}): fix it or fetch it again")


def _next_row(source: _Source, form: _Form, shape: object, end: int | None) -> int | None:
    """Finds where reading goes on after a damaged element that ends at ``end``, or, None, whose end is not known.

    A quote too many makes text of what is none, up to the next damage: whole rows may be lost in one element. So a row
    is looked for in it that is built like the last good one or, before there is one, like the one that follows.

    Returns:
        The place in ``source.text``; None if it cannot be told.
    """
    length = None if end is None else end - source.start
    while len(source.text) - source.start < _AHEAD + (length or 0) and source.more():
        pass
    text, limit = source.text, len(source.text)
    if length is not None:
        end = limit = source.start + length
        following = _end(_GAP, text, limit)
        if shape is None:
            if following == len(text) or text[following] in _CLOSING.values():
                return end
            shape = _shape_at(text, following, form)
    if shape is None:
        return None
    places = islice(form.opening.finditer(text, source.start + 1, limit), _TRIES)
    return next((place.end() for place in places if _alike(_shape_at(text, place.end(), form), shape)), end)


def _alike(one: object, other: object) -> bool:
    """Whether two rows are built alike: objects, if at most one key is missing, as one may be optional."""
    if isinstance(one, frozenset) and isinstance(other, frozenset):
        return len(one ^ other) <= 1
    return one is not None and one == other


def _shape_at(text: str, at: int, form: _Form) -> object:
    """The shape of the element at a place; None if there is none that can be parsed."""
    try:
        end, ended = _scan(text, at, min(at + _AHEAD, len(text)), [])
        return form.shape(form.parse(text[at:end])) if ended else None
    except _FlawError:
        return None


def _is_lines(source: _Source) -> bool:
    """Whether each line holds a value of its own, which the first two that are not blank show."""
    while "\n" not in source.text[source.start :] and len(source.text) - source.start < _AHEAD and source.more():
        pass
    first, newline, rest = source.text[source.start :].partition("\n")
    while newline and not rest.strip() and source.more():
        first, newline, rest = source.text[source.start :].partition("\n")
    opening, following = first[0], rest.lstrip()[:1]
    if opening == "{" and following in ("{", ",", ""):
        return following == "{"
    if opening != "{" and following != opening:
        return False
    try:
        _parse(first)
    except _FlawError:
        return False
    return True


def _lines(source: _Source, report: Report, skip: Skip) -> Iterator[tuple[int, Any]]:
    """Yields the values of the lines that are not blank."""
    row, number, ended = 0, source.line(), False
    while not ended:
        end = source.text.find("\n", source.start)
        if (len(source.text) if end < 0 else end) - source.start > LARGEST:
            raise M3ELError(
                f"{source.path} line {number} is larger than {LARGEST:,} characters: fix it or fetch it again"
            )
        if end < 0:
            if source.more():
                continue
            end, ended = len(source.text), True
        if (line := source.text[source.start : end]).strip():
            try:
                value = _parse(line)
            except _FlawError as flaw:
                place = f"{source.path.name} row {row} (line {number})"
                skip(report, place, f"cannot be parsed ({flaw}: {source.where(flaw.at)})")
            else:
                yield row, value
            row += 1
        source.start, number = end + 1, number + 1
