"""What a reader of request logs has to give: one :class:`Request` per request, or a reason."""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, BinaryIO, ClassVar

#: Longest line that is read as one; a longer one is no request log but something else.
LONGEST_LINE = 64 * 2**20
_CHUNK = 2**20
_BLANKS = re.compile(r"[ \t\r\n]*")


class Malformed(ValueError):
    """One record of a log cannot be used; the message says why, without the record's text."""


class Broken(Malformed):
    """A JSON list that cannot be read on: where its next item begins, nobody knows.

    ``number`` is that of the item at which it breaks.
    """

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(reason)
        self.number = number


@dataclass(slots=True)
class Request:
    """One request of a log, as far as the log tells.

    Attributes
    ----------
    identity:
        What makes two requests the same request, or None where the log does not show contents.
    time_s:
        Arrival in seconds, from whatever moment.
    client:
        Who asks: user, session or conversation.
    input_tokens, output_tokens:
        Lengths as the log states them.
    blocks:
        Identities of the prompt's blocks, each standing for the whole prefix that ends with it.
    prompt:
        The whole prompt as text, for formats that have no ``blocks``.
    question:
        The user's last message.
    context:
        Everything else that the answer depends on; answers are only shared within one context.
    answer_bytes:
        Size of the answer's text.
    sampled:
        Whether the same request may be answered differently each time (temperature above 0).
    """

    identity: Any = None
    time_s: float | None = None
    client: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    blocks: Sequence[int] | None = None
    prompt: str | None = None
    question: str | None = None
    context: Any = ""
    answer_bytes: int | None = None
    sampled: bool | None = None


class Format(ABC):
    """One format; an instance reads one log and may remember its header.

    Attributes
    ----------
    name, title:
        Short name, and what a person calls the format.
    rank:
        Formats of a higher rank are tried first.
    block_tokens:
        Tokens of a block, for formats that name blocks.
    record:
        What a record is called in messages: a line, or an item of a list.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    rank: ClassVar[int] = 1
    block_tokens: ClassVar[int | None] = None
    record: str = "line"

    @classmethod
    @abstractmethod
    def matches(cls, lines: Sequence[str]) -> bool:
        """Whether a log whose first lines (not empty ones) are these is of this format."""

    @abstractmethod
    def parse(self, text: str) -> Iterable[Request]:
        """The requests of one record; raises :class:`Malformed`."""

    def records(self, stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
        """Numbered raw records of a log; lines that are not blank, from 1."""
        number = 0
        while line := stream.readline(LONGEST_LINE):
            number += 1
            if line.strip():
                yield number, line


class Objects(Format):
    """A format of JSON objects: one a line, or all in a list, which is read in a stream as well.

    Attributes
    ----------
    item:
        What a record of a list is called in messages.
    """

    item: ClassVar[str] = "item"

    def records(self, stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
        """Numbered raw objects of a log, from 1."""
        # Looked at, not read: a pipe cannot be wound back.
        head = stream.peek(1)  # type: ignore[attr-defined]
        if head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            self.record = self.item
            return items(stream)
        return super().records(stream)


def items(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Numbered items of a JSON list, as texts, without reading the list whole.

    Raises
    ------
    Broken
        An item that is no JSON, or a list that has no end.
    """
    decoder, scan = codecs.getincrementaldecoder("utf-8-sig")(), json.JSONDecoder()
    text, place, number = "", 0, 0
    inside = ended = False
    while True:
        place = _BLANKS.match(text, place).end()  # type: ignore[union-attr]
        if place < len(text):
            mark = text[place]
            if mark == "," or (mark == "[" and not inside) or (mark == "]" and inside):
                inside = mark != "]" if mark != "," else inside
                place += 1
                continue
            try:
                end = scan.raw_decode(text, place)[1]
            except RecursionError:
                raise Broken(number + 1, "nested too deeply") from None
            except ValueError as error:
                if ended or len(text) - place > LONGEST_LINE:
                    reason = getattr(error, "msg", "too many digits")
                    raise Broken(number + 1, f"not JSON ({reason})") from None
            else:
                # A number at the end of what was read may go on in what was not.
                if end < len(text) or ended:
                    number += 1
                    yield number, text[place:end].encode("utf-8", "surrogatepass")
                    place = end
                    continue
        elif ended:
            break
        text, place = text[place:], 0
        # Doubling keeps the number of attempts at a long item small.
        chunk = stream.read(max(_CHUNK, len(text)))
        ended = not chunk
        text += decoder.decode(chunk, final=ended)
    if inside:
        raise Broken(number, "the list has no end after it: the file is cut short, or lacks its ]")


class Table(Format):
    """A CSV format with a header: columns are found by name, upper and lower case alike."""

    #: Column that a field comes from, by the names it goes by.
    columns: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    #: Fields without which the format is another one.
    required: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self._header: list[str] | None = None
        self._places: dict[str, int] = {}

    @classmethod
    def _find(cls, header: Sequence[str]) -> dict[str, int]:
        spelled = [name.strip().strip('"').lower() for name in header]
        return {
            field: spelled.index(name)
            for field, names in cls.columns.items()
            for name in reversed(names)
            if name in spelled
        }

    @classmethod
    def matches(cls, lines: Sequence[str]) -> bool:
        """Whether the header has every required column."""
        return set(cls.required) <= set(cls._find(cells(lines[0])))

    def parse(self, text: str) -> Iterable[Request]:
        """The request of one row; the first row is the header."""
        row = cells(text)
        if self._header is None:
            places = self._find(row)
            missing = set(self.required) - set(places)
            if missing:
                raise Malformed(f"the header lacks {', '.join(sorted(missing))}")
            self._header, self._places = row, places
            return []
        if row == self._header:
            return []
        if len(row) != len(self._header):
            raise Malformed(f"{len(row)} columns where the header has {len(self._header)}")
        found = {field: row[place].strip() for field, place in self._places.items()}
        return [self.request(found)]

    @abstractmethod
    def request(self, row: Mapping[str, str]) -> Request:
        """The request of one row, by field."""


def cells(text: str) -> list[str]:
    """The cells of one CSV line."""
    try:
        return next(csv.reader([text.rstrip("\r\n")]), [])
    except csv.Error as error:
        raise Malformed(f"not CSV: {error}") from None


def document(text: str) -> dict[str, Any]:
    """One JSON object; NaN and infinities are refused."""
    try:
        found = json.loads(text, parse_constant=_refuse)
    except ValueError as error:
        reason = str(error) if isinstance(error, Malformed) else f"not JSON ({error})"
        raise Malformed(reason) from None
    except RecursionError:
        raise Malformed("JSON that is nested too deeply") from None
    if not isinstance(found, dict):
        raise Malformed(f"a JSON {type(found).__name__} where an object is needed")
    return found


def _refuse(name: str) -> float:
    raise Malformed(f"{name} is no number")


def length(value: Any, name: str) -> int:
    """A number of tokens or bytes: whole and not negative."""
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        raise Malformed(f"{name} is {str(value)[:30]!r}; it must be a whole number") from None
    if not math.isfinite(number) or number != int(number):
        raise Malformed(f"{name} is {value}; it must be a whole number")
    if number < 0:
        raise Malformed(f"{name} is {value}; a length cannot be negative")
    if number >= 2**40:
        raise Malformed(f"{name} is {value}; no request is that long")
    return int(number)


def seconds(value: Any, name: str = "timestamp", scale: float = 1.0) -> float:
    """A moment in seconds: a number times ``scale``, or a date as ISO 8601."""
    if isinstance(value, str):
        value = value.strip()
    try:
        moment = float(value) * scale if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        moment = _date(value, name)
    if not math.isfinite(moment):
        raise Malformed(f"{name} is {value}; it must be a time")
    # Moments since 1970 in milli-, micro- or nanoseconds, as loggers of several languages write.
    for unit in (1e9, 1e6, 1e3):
        if scale == 1.0 and moment > 1e8 * unit:
            return moment / unit
    return moment


def _date(value: Any, name: str) -> float:
    text = str(value).replace("Z", "+00:00")
    head, dot, tail = text.partition(".")
    if dot:
        digits = len(tail) - len(tail.lstrip("0123456789"))
        # Some loggers write seven digits of a second; a date has at most six.
        text = f"{head}.{tail[:digits][:6].ljust(6, '0')}{tail[digits:]}"
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise Malformed(f"{name} is {str(value)[:30]!r}; it must be a number or a date") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def fingerprint(value: Any) -> int:
    """64 bits that stand for an identity; the same in every process."""
    data = value if isinstance(value, bytes) else repr(value).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
