"""A request log in compact columns, read once and in a stream: :func:`read`."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import stat
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kvbench.errors import InputError
from kvbench.traffic import readers
from kvbench.traffic.readers.base import Broken, Format, Malformed, Request, fingerprint

#: Tokens of the finest block that texts are cut into: the smallest that engines use.
FINEST_BLOCK = 16
#: Bytes that count as one token where only a text is known: about four characters of English.
BYTES_PER_TOKEN = 4
#: Most block references that are held; beyond it every second one is dropped, blocks double.
MOST_REFERENCES = 12_000_000
#: Most questions whose text is kept for the semantic part, and the longest that is (characters);
#: no sentence encoder reads a longer one whole.
MOST_QUESTIONS = 2_000
LONGEST_QUESTION = 4_000
_HEAD = 2**16
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_WIDE = (b"\xff\xfe", b"\xfe\xff")
#: Beginnings of files that hold logs in another wrapping, and what a person calls them.
_WRAPPED = {
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
    b"PAR1": "Parquet",
    b"\x04\x22\x4d\x18": "lz4",
}


@dataclass
class Log:
    """The requests of one log, in the order in which they came; arrays have one item a request.

    Attributes
    ----------
    format:
        Name of the format.
    keys:
        Number of the request's identity, counted from 0 in order of first appearance; None where
        the log does not show contents.
    times_s:
        Seconds since the first request; None where the log has no times.
    clients:
        Number of the client; None where the log names none.
    input_tokens, output_tokens:
        Lengths; None where they are neither stated nor known from texts.
    cut_tokens:
        Lengths in the unit that blocks were cut in. It differs from ``input_tokens`` where the log
        states token counts and texts were cut by bytes.
    answer_bytes:
        Size of the answer; 0 where unknown. None if no answer's size is known.
    offsets, blocks, block_tokens:
        Blocks of request ``i`` are ``blocks[offsets[i]:offsets[i+1]]``, each the number of a
        prefix of whole blocks of ``block_tokens`` tokens.
    partial_blocks:
        Whether a last, incomplete block has a number too (as in Mooncake's traces).
    sampled:
        How many requests may be answered differently each time; None where the log does not say.
    questions, question_of, contexts, lines:
        Texts of the first questions, cut at :data:`LONGEST_QUESTION`; for each of the first
        requests which question it asks, in which context, and where in the log it stands.
    tokens_from:
        Where ``input_tokens`` come from: ``log`` if lengths are its own, ``tokenizer``, or
        ``estimate`` from bytes. Lengths of answers that the log does not state are estimates.
    skipped:
        Records that were left out, by reason.
    """

    sources: tuple[str, ...]
    format: str
    requests: int = 0
    keys: np.ndarray | None = None
    times_s: np.ndarray | None = None
    clients: np.ndarray | None = None
    input_tokens: np.ndarray | None = None
    cut_tokens: np.ndarray | None = None
    output_tokens: np.ndarray | None = None
    answer_bytes: np.ndarray | None = None
    sampled: int | None = None
    offsets: np.ndarray | None = None
    blocks: np.ndarray | None = None
    block_tokens: int | None = None
    partial_blocks: bool = False
    questions: list[str] = field(default_factory=list)
    question_of: list[int] = field(default_factory=list)
    contexts: list[int] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    tokens_from: str = "log"
    skipped: dict[str, int] = field(default_factory=dict)
    digest: str = ""

    @property
    def span_s(self) -> float | None:
        """Seconds between the first and the last request."""
        return None if self.times_s is None else float(self.times_s[-1])

    @property
    def prompt_tokens(self) -> int | None:
        """Input tokens of all requests."""
        return None if self.input_tokens is None else int(self.input_tokens.sum())


def read(
    paths: Sequence[Path],
    *,
    skip_bad: bool = False,
    tokenizer: Path | None = None,
    most_references: int = MOST_REFERENCES,
) -> Log:
    """Read the parts of one log, in the order given.

    Parameters
    ----------
    paths:
        Files of one format; ``.gz`` and ``.zst`` are unpacked on the way.
    skip_bad:
        Leave malformed records out and count them, instead of stopping at the first.
    tokenizer:
        A ``tokenizer.json`` by which texts become tokens; without it a token is
        :data:`BYTES_PER_TOKEN` bytes.
    most_references:
        Bound on the memory of the blocks, see :data:`MOST_REFERENCES`.

    Raises
    ------
    InputError
        A file that is missing, empty, of no known or of another format, cut short, that grew
        meanwhile, or has a malformed record; fewer than two requests. One line, with file and
        line.
    """
    if not paths:
        raise InputError("no log was given; name at least one file")
    columns = _Columns(_cutter(tokenizer), most_references)
    kind: type[Format] | None = None
    state = hashlib.sha256()
    for path in paths:
        with _opened(path) as (stream, head):
            found = readers.detect(_head_text(head, path), str(path))
            if kind is not None and found is not kind:
                raise InputError(
                    f"{path}: mixed formats: this is {found.title}, {paths[0]} is {kind.title}; "
                    "give logs of one format"
                )
            kind = found
            _read_one(kind(), stream, path, columns, skip_bad, state)
    assert kind is not None
    return columns.finish(tuple(map(str, paths)), kind, state.hexdigest())


def _read_one(
    reader: Format,
    stream: BinaryIO,
    path: Path,
    columns: _Columns,
    skip_bad: bool,
    state: Any,
) -> None:
    try:
        for number, raw in reader.records(stream):
            state.update(raw)
            where = f"{path.name}:{number}"
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                for request in reader.parse(text):
                    columns.add(request, where)
            except UnicodeDecodeError:
                reason = "not UTF-8 text"
            except Malformed as error:
                reason = str(error)
            except RecursionError:
                reason = "nested too deeply"
            else:
                continue
            if not skip_bad:
                raise InputError(
                    f"{path}: {reader.record} {number}: {reason}; mend it, or leave such records "
                    "out with --skip-bad"
                )
            columns.skip(reason)
    except Broken as error:
        raise InputError(
            f"{path}: {reader.record} {error.number}: {error}; nothing behind it can be read, with "
            "--skip-bad neither; mend it"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: cannot be unpacked ({error}); the file is cut short") from None


def _head_text(head: bytes, path: Path) -> str:
    if head.startswith(_WIDE):
        raise InputError(f"{path}: UTF-16 text; save it as UTF-8")
    for magic, name in _WRAPPED.items():
        if head.startswith(magic):
            raise InputError(f"{path}: a {name} file; unpack it, or pack the text as .gz or .zst")
    text = head.decode("utf-8-sig", errors="replace")
    if "\0" in text:
        raise InputError(f"{path}: binary data; a log is text, perhaps packed as .gz or .zst")
    return text


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, bytes]]:
    """The unpacked stream of a file or pipe and its first bytes; a file must stay as it is."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    with file:
        before = os.fstat(file.fileno())
        # Looked at, not read: a pipe cannot be wound back.
        magic = file.peek(4)[:4]
        stream: BinaryIO = file
        if magic.startswith(_GZIP):
            stream = gzip.GzipFile(fileobj=file)
        elif magic == _ZSTD:
            stream = _zstandard(file, path)
        buffered = io.BufferedReader(stream, _HEAD)
        try:
            head = buffered.peek(_HEAD)[:_HEAD]
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{path}: cannot be unpacked ({error}); pack it anew") from None
        yield buffered, head
        after = os.fstat(file.fileno())
        if stat.S_ISREG(before.st_mode) and (before.st_size, before.st_mtime_ns) != (
            after.st_size,
            after.st_mtime_ns,
        ):
            raise InputError(
                f"{path}: changed while it was read (from {before.st_size} to {after.st_size} "
                "bytes); copy the log and replay the copy"
            )


def _zstandard(file: BinaryIO, path: Path) -> BinaryIO:
    try:
        import zstandard
    except ImportError:
        raise InputError(f"{path}: packed with zstd; install zstandard, or unpack it") from None

    class Stream(io.RawIOBase):
        """Frames of a file one after the other; one that was cut short is an error."""

        def __init__(self) -> None:
            self._frame = None
            self._rest, self._ready = b"", b""

        def readable(self) -> bool:
            return True

        def readinto(self, buffer) -> int:
            while not self._ready:
                packed = self._rest or file.read(_HEAD)
                self._rest = b""
                if not packed:
                    if self._frame is not None:
                        raise EOFError("the last frame has no end")
                    return 0
                if self._frame is None:
                    self._frame = zstandard.ZstdDecompressor().decompressobj()
                try:
                    self._ready = self._frame.decompress(packed)
                except zstandard.ZstdError as error:
                    raise EOFError(str(error)) from None
                if self._frame.eof:
                    self._rest, self._frame = self._frame.unused_data, None
            count = min(len(buffer), len(self._ready))
            buffer[:count], self._ready = self._ready[:count], self._ready[count:]
            return count

    return Stream()


class _Columns:
    """Columns while they grow; what the first request has, all later ones must have."""

    def __init__(self, cut: Callable[[str], tuple[list[int], int]], most_references: int) -> None:
        self._cut = cut
        self._most = most_references
        self._numbers: dict[int, int] = {}
        self._clients: dict[str, int] = {}
        self._keys, self._who = array("i"), array("i")
        self._times, self._inputs, self._outputs = array("d"), array("q"), array("q")
        self._measured = array("q")
        self._answers = array("q")
        self._lengths, self._blocks = array("I"), array("Q")
        self._step = 1
        self._first: Request | None = None
        self._stated = 0
        self._answered = False
        self._sampled: int | None = None
        self._texts: dict[int, int] = {}
        self.questions: list[str] = []
        self.question_of: list[int] = []
        self.contexts: list[int] = []
        self.lines: list[str] = []
        self.skipped: dict[str, int] = {}

    def skip(self, reason: str) -> None:
        """Count a record that is left out."""
        # A reason quotes what it found. What is counted and published says only what kind it was.
        named = re.fullmatch(r"(.+?) is .*; (.+)", reason, re.DOTALL)
        kind = f"{named[1]}: {named[2]}" if named else reason
        kind = re.sub(r"'[^']*'|\d[\d.]*", "#", kind)
        if kind not in self.skipped and len(self.skipped) >= 20:
            kind = "other reasons"
        self.skipped[kind] = self.skipped.get(kind, 0) + 1

    def add(self, request: Request, where: str) -> None:
        """Append one request."""
        first = self._first
        if first is None:
            self._first = first = request
        if (request.time_s is None) != (first.time_s is None):
            raise Malformed(
                "the timestamp is missing, and records before have one"
                if request.time_s is None
                else "a timestamp, and records before have none"
            )
        if request.time_s is not None:
            if self._times and request.time_s < self._times[-1]:
                back = self._times[-1] - request.time_s
                raise Malformed(f"the timestamp goes back by {back:g} s; sort the log by time")
            self._times.append(request.time_s)
        if request.identity is not None:
            number = fingerprint(request.identity)
            self._keys.append(self._numbers.setdefault(number, len(self._numbers)))
        client = request.client or ""
        self._who.append(self._clients.setdefault(client, len(self._clients)))
        self._add_blocks(request)
        self._outputs.append(-1 if request.output_tokens is None else request.output_tokens)
        self._answers.append(request.answer_bytes or 0)
        self._answered |= request.answer_bytes is not None
        if request.sampled is not None:
            self._sampled = (self._sampled or 0) + request.sampled
        if request.question is not None and len(self.question_of) < 5 * MOST_QUESTIONS:
            self._add_question(request, where)

    def _add_question(self, request: Request, where: str) -> None:
        text = request.question or ""
        number = fingerprint(text)
        if number not in self._texts and len(self._texts) >= MOST_QUESTIONS:
            return
        if len(self.question_of) < len(self._who) - 1:
            return  # Only an unbroken beginning of the log can be replayed.
        if number not in self._texts:
            self._texts[number] = len(self._texts)
            # Half of a surrogate pair is no text; an encoder would stop at it.
            clean = text[:LONGEST_QUESTION].encode("utf-8", "replace").decode("utf-8")
            self.questions.append(clean)
        self.question_of.append(self._texts[number])
        self.contexts.append(fingerprint(request.context))
        self.lines.append(where)

    def _add_blocks(self, request: Request) -> None:
        stated = request.input_tokens
        measured = -1
        if request.prompt is not None:
            ids, measured = self._cut(request.prompt)
        else:
            ids = list(request.blocks or ())
        if self._step > 1:
            ids = ids[self._step - 1 :: self._step]
        self._lengths.append(len(ids))
        self._blocks.extend(ids)
        self._stated += stated is not None
        self._inputs.append(-1 if stated is None else stated)
        self._measured.append(measured)
        if request.prompt is not None and len(self._blocks) > self._most:
            self._coarsen()

    def _coarsen(self) -> None:
        """Double the block: a block stands for its whole prefix, so every second one will do."""
        flat = np.frombuffer(self._blocks, dtype=np.uint64)
        lengths = np.frombuffer(self._lengths, dtype=np.uint32).astype(np.int64)
        starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
        kept = (np.arange(len(flat)) - starts) % 2 == 1
        self._blocks = array("Q", flat[kept].tobytes())
        self._lengths = array("I", (lengths // 2).astype(np.uint32).tobytes())
        self._step *= 2

    def finish(self, sources: tuple[str, ...], kind: type[Format], digest: str) -> Log:
        """The log, once all parts have been read."""
        count = len(self._who)
        left_out = sum(self.skipped.values())
        if count == 0:
            why = f"all {left_out} records were left out" if left_out else "the log is empty"
            raise InputError(f"{sources[0]}: no request: {why}; a replay needs at least two")
        if count == 1:
            raise InputError(
                f"{sources[0]}: one request only"
                + (f" ({left_out} malformed left out)" if left_out else "")
                + "; a cache can reuse nothing before the second"
            )
        log = Log(sources, kind.name, count, skipped=self.skipped, digest=digest)
        log.keys = np.array(self._keys, dtype=np.int32) if len(self._keys) == count else None
        if self._times:
            times = np.array(self._times)
            log.times_s = times - times[0]
        if len(self._clients) > 1:
            log.clients = np.array(self._who, dtype=np.int32)
        self._set_lengths(log)
        if len(self._blocks):
            log.offsets = np.zeros(count + 1, dtype=np.int64)
            lengths = np.frombuffer(self._lengths, dtype=np.uint32)
            np.cumsum(lengths, dtype=np.int64, out=log.offsets[1:])
            log.block_tokens = (kind.block_tokens or FINEST_BLOCK) * self._step
            log.partial_blocks = kind.block_tokens is not None
            log.blocks = renumbered(np.frombuffer(self._blocks, dtype=np.uint64))
            self._blocks = array("Q")
        if self._answered:
            log.answer_bytes = np.array(self._answers, dtype=np.int64)
        log.sampled = self._sampled
        log.questions = self.questions
        log.question_of, log.contexts, log.lines = self.question_of, self.contexts, self.lines
        return log

    def _set_lengths(self, log: Log) -> None:
        stated, measured = np.array(self._inputs), np.array(self._measured)
        log.cut_tokens = measured if (measured >= 0).all() else None
        if self._stated == log.requests:
            log.input_tokens, log.tokens_from = stated, "log"
            if log.cut_tokens is None:
                log.cut_tokens = stated
        elif (measured >= 0).all():
            log.input_tokens = measured
            log.tokens_from = "tokenizer" if getattr(self._cut, "exact", False) else "estimate"
        outputs = np.array(self._outputs)
        if (outputs >= 0).all():
            log.output_tokens = outputs
        elif self._answered and log.input_tokens is not None:
            # Texts are answered by texts. Objects without a prompt are of any kind: no tokens.
            log.output_tokens = np.where(
                outputs >= 0, outputs, np.array(self._answers) // BYTES_PER_TOKEN
            )


def renumbered(ids: np.ndarray) -> np.ndarray:
    """Identities as 32-bit numbers below their count, equal where they were equal.

    Sorted rather than kept in a table: tens of millions fit, and numpy's own ``unique`` would take
    several times the memory.
    """
    if not len(ids) or int(ids.max()) < len(ids) + 1024:
        return ids.astype(np.uint32)
    known = np.sort(ids)
    known = known[np.concatenate([[True], known[1:] != known[:-1]])]
    result = np.empty(len(ids), dtype=np.uint32)
    for start in range(0, len(ids), 2**20):
        part = slice(start, start + 2**20)
        result[part] = np.searchsorted(known, ids[part])
    return result


class _ByBytes:
    """Texts cut by bytes: a token is four of them."""

    exact = False

    def __call__(self, text: str) -> tuple[list[int], int]:
        data = text.encode("utf-8", "surrogatepass")
        size = FINEST_BLOCK * BYTES_PER_TOKEN
        return _chain(data, size), -(-len(data) // BYTES_PER_TOKEN)


class _ByTokenizer:
    """Texts cut by a model's own tokenizer."""

    exact = True

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise InputError(f"{path}: install tokenizers, or leave the tokenizer out") from None
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{path}: no tokenizer.json can be read there ({reason})") from None

    def __call__(self, text: str) -> tuple[list[int], int]:
        clean = text.encode("utf-8", "replace").decode("utf-8")
        ids = np.array(self._tokenizer.encode(clean, add_special_tokens=False).ids, dtype=np.uint32)
        return _chain(ids.tobytes(), FINEST_BLOCK * ids.itemsize), len(ids)


def _cutter(tokenizer: Path | None) -> Callable[[str], tuple[list[int], int]]:
    return _ByBytes() if tokenizer is None else _ByTokenizer(tokenizer)


def _chain(data: bytes, size: int) -> list[int]:
    """Identities of whole blocks of ``size`` bytes; each stands for everything up to its end."""
    state = hashlib.blake2b(digest_size=8)
    ids = []
    for end in range(size, len(data) + 1, size):
        state.update(data[end - size : end])
        ids.append(int.from_bytes(state.digest(), "little"))
    return ids
