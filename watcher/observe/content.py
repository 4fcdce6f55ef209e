"""The bytes of one data file, read where zeros end, and what an earlier scan read there."""

from __future__ import annotations

import os

from watcher.model import MIB, Reads

#: No allocation unit is larger: this many zeros at an end are enough to stop looking further back.
ZEROS_ENOUGH = 16 * MIB
#: So many zeros before the start of a part of old are no content, in a file without holes.
NOTHING = 64 * 1024
#: The first piece that is read on a way through zeros, and each further one.
_PIECE, _CHUNK = 4096, MIB
#: What lies behind less than a piece, at a part's end, is the next part's beginning: it is read
#: along.
_WINDOW = 16 * 1024
#: So many zeros are stripped as fast as they are told otherwise.
_FEW = 64
#: A file with more answers than this is odd: they are found anew each time.
_MOST_ANSWERS = 1000


class Content:
    """A data file, up to `size` bytes, and where in it zeros end.

    `known`: answers of an earlier scan, of the very same bytes. Raises OSError where it can't be
    read.
    """

    def __init__(self, fd: int, size: int, known: Reads | None = None) -> None:
        self.fd, self.size = fd, size
        self._known = _parsed(known.answers) if known is not None else {}
        #: What was asked: where a look for bytes ends, where it starts, and where they are.
        self._asked: list[int] = []
        #: What was read last around a short piece, and before offsets.
        self._window_at, self._window = 0, b""
        self._before: dict[int, bytes] = {}

    @property
    def answers(self) -> str:
        """What was asked, with the answers: to be known at the next scan."""
        return " ".join(map(str, self._asked)) if len(self._asked) <= 3 * _MOST_ANSWERS else ""

    def written_end(self, start: int, end: int, enough: int = ZEROS_ENOUGH) -> int:
        """Where the last non-zero byte of ``[start, end)`` ends, looking back over `enough`."""
        stop = max(start, end - enough)
        found = self._known.get((stop, end), -1)
        if not stop <= found <= end:
            found = self._last(stop, end)
        self._asked += (stop, end, found)
        return found

    def written_start(self, start: int, end: int) -> int:
        """Where the first non-zero byte of ``[start, end)`` is, looking at `ZEROS_ENOUGH`."""
        stop = min(end, start + ZEROS_ENOUGH)
        found = self._known.get((stop, start), -1)
        if not start <= found <= stop:
            found = self._first(start, stop)
        self._asked += (stop, start, found)
        return found

    def is_zeros_before(self, offset: int) -> bool:
        """Whether there are `NOTHING` zeros before an offset."""
        low, high = offset - NOTHING, min(offset, self.size)
        if low >= high:
            return False
        if (low, high) not in self._known:
            self._before[high] = os.pread(self.fd, high - low, low)
        return self.written_end(low, high) == low

    def _last(self, stop: int, end: int) -> int:
        chunk = len(self._before.get(end, b"")) or _PIECE
        while end > stop:
            low = max(stop, end - chunk)
            read = self._read(low, end)
            if read != bytes(len(read)):
                return low + _last_written(read)
            end, chunk = low, _CHUNK
        return end

    def _first(self, start: int, stop: int) -> int:
        chunk = _PIECE
        while start < stop:
            read = self._read(start, min(start + chunk, stop))
            if not read:
                break
            if read != bytes(len(read)):
                return start + len(read) - len(read.lstrip(b"\0"))
            start, chunk = start + len(read), _CHUNK
        return start

    def _read(self, low: int, high: int) -> bytes:
        length, at = high - low, low - self._window_at
        if 0 <= at <= len(self._window) - length:
            return self._window[at : at + length]
        before = self._before.get(high, b"")
        if length <= len(before):
            return before[-length:]
        if length >= _PIECE:
            return os.pread(self.fd, length, low)
        self._window_at, self._window = low, os.pread(self.fd, _WINDOW, low)
        return self._window[:length]


def _parsed(answers: str) -> dict[tuple[int, int], int]:
    """Answers as they were written down; none of a text that is none of ours."""
    try:
        numbers = list(map(int, answers.split()))
        return {(a, b): found for a, b, found in zip(*[iter(numbers)] * 3, strict=True)}
    except ValueError:
        return {}


def data_behind(fd: int, start: int) -> int | None:
    """Where the first bytes other than zeros lie from `start` on; None where there are none.

    Blocks that a file system has reserved hold zeros; of such no more than `ZEROS_ENOUGH` are read.
    """
    read, at = 0, start
    while read < ZEROS_ENOUGH:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            return None  # a hole up to the end
        piece = os.pread(fd, _CHUNK, at)
        if not piece:
            return None
        if left := len(piece.lstrip(b"\0")):
            return at + len(piece) - left
        read, at = read + len(piece), at + len(piece)
    return None


def _last_written(read: bytes) -> int:
    """Where the last non-zero byte of `read` ends."""
    end = run = len(read)
    # Many zeros at once are told far sooner than stripped one by one.
    while run > _FEW and not read[end - 1]:
        run //= 2
        if read.endswith(bytes(run), 0, end):
            end -= run
    return len(read[:end].rstrip(b"\0"))
