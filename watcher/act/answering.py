"""Answering what has to be known before anything is decided: registries asked, files hashed.

Files are hashed on all cores, in big reads, sparing others' page cache. No lock is held meanwhile
and nothing is changed; what was found out goes to the memory.
"""

import contextlib
import errno
import os
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from rich.filesize import decimal

from watcher.act.journal import Journal, locked
from watcher.decide import transitions
from watcher.errors import EndedError, LockedError, WatchError
from watcher.model import (
    UNREADABLE,
    Action,
    ActionKind,
    Entry,
    Outcome,
    Ranges,
    Refusal,
    RefusalKind,
    Result,
    Rules,
)
from watcher.observe import parts, place, scan
from watcher.observe.host import Host
from watcher.ollama import manifests, names, ranges
from watcher.ollama.names import ModelName
from watcher.state import folders, fs, state_folder, sums, transfers
from watcher.state.sums import Chunk, Chunks

_KEEP_SECONDS = 30.0  #: answers are written down this often, so that a kill loses little
_SILENT_TIMES = 3  #: so often a registry may leave one question after another unanswered
_READ = 1 << 20  #: fits into a core's own cache together with what hashes it
_SECTOR = 4096  #: what is left out at first of what can't be read
_WATCH_SECONDS = 0.5
_MOST_RANGES = 1000  #: of one file: what lies behind them counts as one


def answer(
    host: Host, rules: Rules, questions: Iterable[Action]
) -> tuple[tuple[Outcome, ...], bool]:
    """Ask and hash, with no lock held; the answers, and whether the memory could keep them."""
    asked = [action for action in questions if action.kind is ActionKind.ASK_REGISTRY]
    hashed = [action for action in questions if action.kind is ActionKind.HASH]
    proved = [action for action in questions if action.kind is ActionKind.PROVE]
    answers: list[Outcome] = []
    kept, is_kept = 0, True
    with folders.opened_store(host.store) as store:
        keep_at = time.monotonic() + _KEEP_SECONDS
        for outcome in chain(
            ask(asked, host), _hash(store, hashed, host), _prove(store, proved, host)
        ):
            answers.append(outcome)
            if time.monotonic() >= keep_at:
                is_kept &= _keep(host, rules, store, answers[kept:])
                kept, keep_at = len(answers), time.monotonic() + _KEEP_SECONDS
        is_kept &= _keep(host, rules, store, answers[kept:])
    return tuple(answers), is_kept


def _keep(host: Host, rules: Rules, store: int, answers: list[Outcome]) -> bool:
    # Where nothing can be written, or another process acts for long, the answers count all the
    # same, and are written with what is learned at the end; the act reports where that fails, too.
    with contextlib.suppress(OSError, LockedError), locked(store, rules.mode.lock_seconds):
        journal = Journal(store, rules.settings, host)
        boot, at, now = place.boot(host), place.started_at(host), host.clock()
        return journal.save(transitions.proved(journal.recall(), answers, now, boot, at))
    return False


def ask(actions: Iterable[Action], host: Host) -> Iterator[Outcome]:
    """Ask for each action's digest, by its models in turn until one's registry knows it.

    The length of an unfinished download is believed only if the manifest of the registry which its
    first model comes from has it, too: whoever runs a registry can claim anything about a digest.
    """
    silent: Counter[str] = Counter()
    for action in actions:
        if host.stops():
            return
        length, reply = None, "the registry has nothing"
        models = list(filter(None, map(names.parse_model, action.models)))
        if action.expects:
            models = [each for each in models if each.host == models[0].host]
        for model in models:
            if silent[model.host] >= _SILENT_TIMES:
                reply = f"{model.host} does not answer"
                continue
            try:
                assert host.registry_length is not None
                length = host.registry_length(model, action.subject)
                doubt = _doubt(host, model, action, length)
            except OSError as error:
                silent[model.host] += 1
                reply = f"{model.host} does not answer: {error.strerror or error}"
                continue
            silent[model.host] = 0
            if doubt:
                length, reply = None, doubt
            elif length is not None:
                reply = f"the registry has {decimal(length)} of it"
                break
        yield Outcome(action, Result.DONE, reply, length=length)


def _doubt(host: Host, model: ModelName, action: Action, length: int | None) -> str:
    if length is None or not action.expects:
        return ""
    assert host.registry_manifest is not None
    raw = host.registry_manifest(None, model).raw
    if raw is None:
        return f"{model.host} says {length:,} bytes, and gives no manifest of {model.shown}"
    named = manifests.sizes(raw).get(action.subject)
    if named == length:
        return ""
    names_it = "does not name it" if named is None else f"says {named:,}"
    return f"{model.host} says {length:,} bytes, and its manifest of {model.shown} {names_it}"


class _StoppedError(Exception):
    """The time is over; the rest comes another time."""


class _ReadError(OSError):
    """The disk can't give back a file's bytes; the text is the offset."""


class _Progress:
    def __init__(self, host: Host) -> None:
        self.done, self.ended = 0, False
        self._host = host
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self.done += count

    def over(self) -> bool:
        return self.ended or self._host.stops()


def _hash(store: int, actions: Sequence[Action], host: Host) -> Iterator[Outcome]:
    from concurrent.futures import ThreadPoolExecutor, wait  # a pull has nothing to hash so

    total, progress = sum(action.expects[0].size for action in actions), _Progress(host)
    with (
        folders.opened_blobs(store, foreign_too=True) as blobs,
        ThreadPoolExecutor(os.cpu_count() or 1) as pool,
    ):
        try:
            futures = [pool.submit(_hashed, store, blobs, each, progress) for each in actions]
            for future in futures:
                while not wait([future], _WATCH_SECONDS).done:
                    host.watch(progress.done, total)
                outcome = future.result()
                if outcome is not None:
                    yield outcome
        finally:
            progress.ended = True


def _hashed(store: int, blobs: int, action: Action, progress: _Progress) -> Outcome | None:
    entry, digest = action.expects[0], action.subject.lower()
    changed = Outcome(action, Result.REFUSED, "it has changed meanwhile")
    if progress.over():
        return None
    known = _sums(store, digest)
    whole = sums.Whole(with_sums=not known and entry.size >= sums.FROM)
    try:
        fd = fs.open_followed(entry.name, blobs)
        with fs.closing(fd):
            lost = _read(fd, entry.size, whole, progress)
            if not _is_as_it_was(fd, blobs, entry):
                return changed
            sha256 = UNREADABLE if lost else whole.hexdigest()
            wrong = () if sha256 == digest else _wrong(fd, known, lost, progress)
    except _StoppedError:
        return None
    except FileNotFoundError:
        return changed
    except OSError as error:
        is_read = isinstance(error, _ReadError)
        why = f"read error at byte {error}" if is_read else f"it can't be read: {error.strerror}"
        return Outcome(action, Result.FAILED, f"{names.printable(entry.name)}: {why}")
    made = whole.sums() if sha256 == digest else b""
    if made or (known and sha256 != digest and not wrong):  # those are of something else
        _keep_sums(store, digest, made)
    message = "checksum verified"
    if lost:
        size, start = decimal(ranges.size(lost)), lost[0][0]
        message = f"the disk can't give back {size} of it, starting at byte {start:,}"
    elif sha256 != digest:
        message = f"checksum mismatch: its hash is {names.short(sha256)}"
    return Outcome(action, Result.DONE, message, sha256=sha256, wrong=wrong)


def hash_of(fd: int, size: int, host: Host) -> str | None:
    """The SHA-256 of a file, `UNREADABLE` if the disk can't give all of it; None: no time."""
    whole = sums.Whole(with_sums=False)
    with contextlib.suppress(_StoppedError):
        return UNREADABLE if _read(fd, size, whole, _Progress(host)) else whole.hexdigest()
    return None


def _read(fd: int, size: int, whole: sums.Whole, progress: _Progress) -> Ranges:
    """Hash all of a file; gives back what of it the disk can't, which is left out."""
    at, buffer = 0, memoryview(bytearray(min(_READ, size + 1)))
    lost, step = list[tuple[int, int]](), _SECTOR
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    while True:
        if progress.over():
            raise _StoppedError
        try:
            count = os.preadv(fd, [buffer], at)
        except OSError as error:
            if error.errno != errno.EIO or at >= size:
                raise _ReadError(str(at)) from None
            # Neighbors are as bad, and a disk takes seconds for each: ever further steps.
            lost.append((at, min(at + step, size)))
            at, step = lost[-1][1], min(2 * step, _READ)
            continue
        if not count:
            break
        step = _SECTOR
        whole.update(buffer[:count])
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, at, count, os.POSIX_FADV_DONTNEED)
        at += count
        progress.add(count)
    return ranges.normal(lost)


def _is_as_it_was(fd: int, blobs: int, entry: Entry) -> bool:
    if not os.path.samestat(os.fstat(fd), os.stat(entry.name, dir_fd=blobs)):
        return False
    now = scan.content(entry.name, blobs)
    if now is None or now.identity != entry.identity:
        return False
    return (now.size, now.mtime_ns) == (entry.size, entry.mtime_ns)


def _wrong(fd: int, known: Chunks, lost: Ranges, progress: _Progress) -> Ranges:
    """The ranges of a damaged file that are wrong by the sums of its chunks, too much, or lost."""
    size, each = os.fstat(fd).st_size, (chunk for chunk in known if _is_wrong(fd, chunk, progress))
    found = [*lost, *(_wrong_part(chunk, size) for chunk in each)]
    if known and size > known[-1].end:
        found.append((known[-1].end, size))
    joined = ranges.normal(found)
    if len(joined) > _MOST_RANGES:
        joined = (*joined[: _MOST_RANGES - 1], (joined[_MOST_RANGES - 1][0], joined[-1][1]))
    return joined


def _wrong_part(chunk: Chunk, size: int) -> tuple[int, int]:
    """Of a wrong chunk of a file of so many bytes.

    What is there of the one that the file ends in can't be compared: the hash of the whole decides.
    """
    return (size if chunk.start < size < chunk.end else chunk.start), chunk.end


def _is_wrong(fd: int, chunk: Chunk, progress: _Progress) -> bool:
    if progress.over():
        raise _StoppedError
    found = sums.wrong(fd, chunk)
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, chunk.start, chunk.end - chunk.start, os.POSIX_FADV_DONTNEED)
    return found


def _prove(store: int, actions: Iterable[Action], host: Host) -> Iterator[Outcome]:
    """Compare files with the sums of their chunks, which their registries are asked for."""
    for action in actions:
        with contextlib.suppress(_StoppedError, EndedError):
            try:
                yield _proved(store, action, host)
            except (WatchError, OSError) as error:
                yield Outcome(action, Result.FAILED, str(error))


def _proved(store: int, action: Action, host: Host) -> Outcome:
    chunks, (entry,) = _sums_of_registry(store, action, host), action.expects
    is_blob, right, wrong = names.is_blob(entry.name), Ranges(), Ranges()
    if not chunks:
        return _unproven(action, "its registry serves no sums of its chunks: nothing was compared")
    with _opened(store, action) as (fd, folder, name):
        progress = _Progress(host)
        is_measured = is_blob or name != entry.name
        written = action.doubts if is_measured else parts.segments(fd, entry.size)
        for chunk in chunks:
            piece = ((chunk.start, chunk.end),)
            if ranges.difference(piece, written):
                continue
            host.watch(chunk.end, action.length)
            if not _is_wrong(fd, chunk, progress):
                right = ranges.union(right, piece)
            elif not ranges.difference(piece, action.doubts):
                wrong = ranges.union(wrong, (_wrong_part(chunk, entry.size),))
        if not _is_as_it_was(fd, folder, entry._replace(name=name)):
            return Outcome(action, Result.REFUSED, "it has changed meanwhile")
    if wrong and not right:
        return _unproven(action, "no chunk matches its sum, which may be that of other data")
    if not right:
        return Outcome(action, Result.DONE, "no chunk of it is there as a whole yet")
    found = f"{decimal(ranges.size(right))} match the sums of their chunks"
    found += f", {decimal(ranges.size(wrong))} don't" if wrong else ""
    sha256 = entry.sha256 if is_blob else None
    return Outcome(action, Result.DONE, found, sha256=sha256, wrong=wrong, right=right)


@contextlib.contextmanager
def _opened(store: int, action: Action) -> Iterator[tuple[int, int, str]]:
    """The file of an action: its descriptor, its folder's, and its name there."""
    (entry,) = action.expects
    with contextlib.ExitStack() as held:
        folder, name = held.enter_context(folders.opened_blobs(store)), entry.name
        if "/" in name:  # of a transfer of ours
            ours = held.enter_context(state_folder.opened(store))
            folder = held.enter_context(transfers.opened(ours, action.subject))
            name = transfers.DATA
        yield held.enter_context(fs.closing(fs.open_followed(name, folder))), folder, name


def _unproven(action: Action, why: str) -> Outcome:
    """What is damaged is as damaged without sums; a server's download was to be proven."""
    name = action.expects[0].name
    if names.is_blob(name) or "/" in name:
        return Outcome(action, Result.DONE, why)
    remedy = "pull it: at the end of the pull the hash of the whole decides"
    refusal = Refusal(RefusalKind.REGISTRY, action.subject, action.kind, why, remedy)
    return Outcome(action, Result.REFUSED, why, refusal=refusal._replace(models=action.models))


def _sums_of_registry(store: int, action: Action, host: Host) -> Chunks:
    """The registry's sums of a layer's chunks, else ours. Raises as `host.sums` does."""
    known = _sums(store, action.subject.lower(), action.length)
    if host.sums is None or (known and known[0].kind == sums.REGISTRY):
        return known
    host.sums(action)
    return _sums(store, action.subject.lower(), action.length)


def _sums(store: int, digest: str, size: int | None = None) -> Chunks:
    with contextlib.suppress(OSError), state_folder.opened(store) as ours:
        return sums.kept(ours, digest, size)
    return ()


def _keep_sums(store: int, digest: str, raw: bytes) -> None:
    with contextlib.suppress(OSError), state_folder.made(store) as ours:
        sums.keep(ours, digest, raw)
