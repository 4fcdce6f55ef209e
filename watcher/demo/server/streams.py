"""Work that goes on in a thread of its own, and the client that may go away meanwhile."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable

from watcher.demo.server.context import Context
from watcher.demo.server.errors import BadRequestError, EngineError
from watcher.demo.server.statuses import Emit, Line

Work = Callable[[Context, Emit], None]


class AbandonedError(Exception):
    """Nobody listens to this work any more: the real server's goroutine waits there for ever."""


class Stream:
    """Hands a worker's lines to the handler of its request, one by one."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._lines: list[Line] = []
        self._ended = False
        self._abandoned = False

    def put(self, line: Line) -> None:
        """Wait until the handler takes the line. Raises AbandonedError where it is gone."""
        with self._changed:
            self._lines.append(line)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._abandoned or not self._lines)
            if self._lines:
                raise AbandonedError

    def end(self) -> None:
        """No more lines."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def take(self) -> Line | None:
        """The next line, None after the last."""
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._ended)
            line = self._lines.pop(0) if self._lines else None
            self._changed.notify_all()
            return line

    def abandon(self) -> None:
        """Take no more lines."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()


class Watched:
    """A request's context, given up as soon as its client closes the connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.context = Context()
        self._connection = connection
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def end(self) -> None:
        """The handler returns."""
        self._ended.set()
        self.context.cancel()

    def _watch(self) -> None:
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        with contextlib.suppress(OSError, ValueError):
            while not self._ended.is_set():
                if not poll.poll(100):
                    continue
                if self._connection.recv(1, socket.MSG_PEEK):
                    # The client sends more: it is there, and can't be watched any longer.
                    return
                break
        self.context.cancel()


def run(work: Work, context: Context, stream: Stream) -> None:
    """Do the work and hand its lines to the stream, an error as the last one."""
    try:
        work(context, stream.put)
    except AbandonedError:
        return
    except EngineError as error:
        with contextlib.suppress(AbandonedError):
            code = {"code": 400} if isinstance(error, BadRequestError) else {}
            stream.put({"error": str(error), **code})
    finally:
        stream.end()
