"""`ModelDownloadManager`: the downloads of a model store, for programs.

::

    from watcher import ModelDownloadManager, StoreFiles

    manager = ModelDownloadManager(StoreFiles("/usr/share/ollama/.ollama/models"))
    for partial in manager.detect_partial_downloads():
        print(partial["models"], partial["partial_size"], partial["can_resume"])
    manager.download_model("llama3", progress=lambda now: print(now["progress_percent"]))

Everything goes through reconciles, and through the records in ``models.json``: this sees what the
command line, the daemon and other processes do, and the other way round. All of it may be called
from several threads and processes. Bytes are integers, times seconds since the epoch.
"""

from __future__ import annotations

import contextlib
import heapq
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypedDict, cast

import orjson

from watcher import reconcile
from watcher.act import journal
from watcher.config import Settings
from watcher.decide import conditions, modes, remaining
from watcher.errors import (
    DownloadError,
    ManifestError,
    NoPermissionError,
    NoStoreError,
    RecordError,
    RefusedError,
)
from watcher.model import ActionKind, Condition, Diagnosed, Mode, Plan, Result, Scope
from watcher.observe import place, scan
from watcher.observe.host import Host
from watcher.ollama import manifests, names, ranges
from watcher.pull import target
from watcher.pull.account import Options, Update
from watcher.pull.driver import Pull
from watcher.reconcile import Reconciler
from watcher.state import event_log, folders, records, registry_cache
from watcher.state.event_log import Event, EventType
from watcher.state.memory import FOLDER
from watcher.state.records import Record, State
from watcher.system import advice
from watcher.transfer import questions


class FileManager(Protocol):
    """The two places that a manager needs."""

    @property
    def store_path(self) -> str | os.PathLike[str]:
        """The models folder: ``OLLAMA_MODELS`` of the server."""

    @property
    def state_path(self) -> str | os.PathLike[str]:
        """The folder in whose ``.ollama-watch`` the records are kept; most likely the store.

        Logs, and what repairs need, are in the store's own.
        """


@dataclass(frozen=True, slots=True)
class StoreFiles:
    """A store that keeps its own state.

    Raises NoStoreError for a folder that does not exist, and for one that holds something and no
    store; NoPermissionError for one that can't be read. An empty one becomes a store with the
    server's first pull.
    """

    store_path: str | os.PathLike[str]

    def __post_init__(self) -> None:
        path = os.path.abspath(os.fsdecode(self.store_path))
        shown = names.printable(path)
        try:
            with folders.opened_store(path) as store:
                found = set(os.listdir(store))
        except (FileNotFoundError, NotADirectoryError) as error:
            why = f"the folder {shown} does not exist: {error.strerror}"
            raise NoStoreError(why, "create it first, or name the models folder") from None
        except folders.NotRootsError as error:
            raise place.not_roots(path, error.uid) from None
        except PermissionError:
            raise place.no_permission(path) from None
        if found <= _NO_CONTENT or found & _CONTENT:
            return
        inner = os.path.join(path, "models")
        name = names.printable(inner) if os.path.isdir(inner) else "the folder that holds them"
        why = f"{shown} is not a model store: it has neither blobs/ nor manifests/"
        raise NoStoreError(why, f"name {name}")

    @property
    def state_path(self) -> str | os.PathLike[str]:
        """The store itself."""
        return self.store_path


class DownloadState(TypedDict):
    """A model's record. `status` is one of the nine states, `stage` the same for people."""

    status: str
    stage: str
    total_bytes: int | None
    downloaded_bytes: int
    present_bytes: int
    progress_percent: float
    bytes_per_second: float | None
    #: Of the pull that downloads it, or was the last to: bytes that arrived and were lost, how
    #: often that happened, and how often none arrived for long.
    lost_bytes: int
    resets: int
    stalls: int
    error: str
    manifest_pulled: bool
    resume_supported: bool
    started_at: float | None
    updated_at: float


class DownloadWaiting(TypedDict):
    """What the next attempt of a download waits for (such as ``the network``), and why.

    It is attempt number `attempt` of `attempts`, None for no limit. At `until` it begins, or the
    waiting is given up; None for never.
    """

    awaited: str
    why: str
    attempt: int
    attempts: int | None
    until: float | None


class DownloadProgress(TypedDict):
    """How far a model's download is; it never falls within one download."""

    status: str
    stage: str
    progress_percent: float
    downloaded_bytes: int
    total_bytes: int | None
    #: Bytes per second, and seconds left; None for unknown.
    speed: float | None
    eta_seconds: float | None
    resume_supported: bool
    can_resume: bool
    partial_size: int


class DownloadUpdate(DownloadProgress):
    """The same while `download_model` runs."""

    note: str  #: a message, once; "" for none
    waiting: DownloadWaiting | None  #: None while something is done


class PartialDownload(TypedDict):
    """An unfinished layer."""

    #: ``sha256:<64 hex>``, and the models that are known to have it.
    digest: str
    models: list[str]
    #: See `docs/reference/conditions.md`; such as ``paused``, ``behind``, ``blocked``.
    condition: str
    stale: bool
    #: Bytes on the disk, and of the whole layer where that is known.
    partial_size: int
    total_bytes: int | None
    can_resume: bool
    age_seconds: float


class CheckedDownload(PartialDownload):
    """An unfinished layer after a check."""

    #: What the policy allowed about it and was refused: why, and the step that helps.
    refused: list[str]


class Cleanup(TypedDict):
    """What a cleanup removed, and why something stays."""

    removed: list[str]
    freed_bytes: int
    refused: list[str]


class ModelDownloadManager:
    """Reports, repairs, removes and drives the downloads of one store.

    `server`: the URL of the server; by default that of ``OLLAMA_HOST``, or of the one that has the
    store. `policy`: what `check_partial_model_downloads` may do; by default it repairs, and cleans
    nothing.
    Raises NoStoreError where one of the two folders does not exist, and NoPermissionError where
    root asks for another user's store: a program chooses its user itself.
    """

    def __init__(
        self,
        file_manager: FileManager,
        *,
        server: str | None = None,
        policy: Settings | None = None,
    ) -> None:
        self._store = os.path.abspath(os.fsdecode(file_manager.store_path))
        self._state = os.path.abspath(os.fsdecode(file_manager.state_path))
        for folder in (self._store, self._state):
            if not os.path.isdir(folder):
                missing = f"the folder {names.printable(folder)} does not exist"
                raise NoStoreError(missing, "create it first")
            place.check_rights(folder)
        self._server = server
        self._settings = policy or Settings()
        self._host = questions.asking(Host(self._store))

    # ------------------------------------------------------------ records

    def get_download_state(self, model: str) -> DownloadState:
        """The record of a model; ``idle`` where there is none. Raises TargetError for no model."""
        return _state(self._record(model))

    def update_download_state(self, model: str, changes: Mapping[str, object]) -> DownloadState:
        """Change the record of a model, on the disk when this returns; gives it back.

        `changes` may have ``status`` and the other keys of the record but for ``stage`` and times.
        Raises RecordError for an unknown key, a bad value or a transition that can't be, naming it;
        nothing is changed then.
        """
        unknown = [names.printable(str(key)) for key in changes if key not in _CHANGEABLE]
        if unknown:
            why = f"{names.printable(model)}: unknown: {', '.join(unknown)}"
            raise RecordError(why, f"known: {', '.join(_CHANGEABLE)}")
        given = {_CHANGEABLE[key]: value for key, value in changes.items()}
        with place.opened(self._state) as folder:
            return _state(records.change(folder, model, given))

    def get_download_progress(self, model: str) -> DownloadProgress:
        """How far the download of a model is, and what of it can be resumed."""
        return _progress(self._record(model), self.detect_partial_downloads(model))

    def handle_manifest_pull(
        self, model: str, manifest: bytes | str | Mapping[str, Any]
    ) -> DownloadState:
        """Take up a model's manifest: the bytes of its layers and its config, each digest once.

        `present_bytes` counts those that are in the store already. Raises ManifestError for what is
        not a manifest; the record is then ``error``.
        """
        shown = names.printable(names.to_model(model).shown)
        try:
            raw, sizes = _read_manifest(manifest)
        except ValueError as error:
            message = f"the manifest of {shown} is damaged: {error}"
            self._enter(model, State.ERROR, error=message)
            self.log_download_event(model, EventType.ERROR, message)
            raise ManifestError(message, "pull it again") from None
        with place.opened(self._store) as store:
            registry_cache.keep(store, names.to_model(model), raw, "", time.time())
            present = sum(sizes[each] for each in scan.present(store, sizes))
        total = sum(sizes.values())
        record = self._enter(
            model,
            State.PULLING_MANIFEST,
            total_bytes=total,
            present_bytes=present,
            downloaded_bytes=present,
            manifest_pulled=True,
            resume_supported=total > 0,
        )
        details = {"layers": len(sizes), "total_size": total, "present_bytes": present}
        message = f"the manifest of {shown} names {len(sizes)} layers, including its config"
        self.log_download_event(model, EventType.MANIFEST_PULLED, message, details)
        return _state(record)

    # ------------------------------------------------------------ partial downloads

    def detect_partial_downloads(self, model: str | None = None) -> list[PartialDownload]:
        """The unfinished layers of a model, or of the whole store; nothing is changed.

        Raises NoPermissionError where what is unfinished can't be listed.
        """
        key = None if model is None else names.to_model(model).key
        report = Reconciler(self._host, self._settings).inspect()
        blind = [each for each in remaining.out_of_sight(report.evidence) if each.path == "blobs"]
        if blind:
            raise NoPermissionError(
                f"{names.printable(self._store)}/blobs: {blind[0].why}, so its unfinished "
                "downloads are unknown",
                "make it readable",
                *remaining.opening(blind, report.diagnosis)[:1],
            )
        return [_partial(each) for each in report.diagnosis.diagnosed if _is_of(each, key)]

    def check_partial_model_downloads(self) -> list[CheckedDownload]:
        """What a service does at its start: find unfinished downloads, repair or clean by policy.

        The records of their models are then ``error``, unless they are being pulled; events report
        all of it. Returns what is unfinished now, and what was refused.
        """
        message = "Checking for partial model downloads..."
        event = Event(time.time(), EventType.CHECK_STARTED, message)
        journal.announce(self._host, self._settings, event)
        mode = Mode(repair=self._settings.repair, clean=self._settings.clean, announce=True)
        report = Reconciler(self._host, self._settings).reconcile(mode)
        by_model: dict[str, list[Diagnosed]] = {}
        for diagnosed in report.diagnosis.diagnosed:
            for shown in diagnosed.download.models:
                by_model.setdefault(names.to_model(shown).key, []).append(diagnosed)
        with place.opened(self._state) as folder:
            known = records.read(folder)
        for key, unfinished in by_model.items():
            state = known.get(key, Record()).state
            if any(each.condition is Condition.LIVE for each in unfinished):
                if not state.active:
                    self._enter(key, State.DOWNLOADING)
            elif state is not State.ERROR:
                worst = max(unfinished, key=lambda each: conditions.badness(each.condition))
                self._enter(key, State.ERROR, error=conditions.why(worst))
        for key in known.keys() - by_model.keys():
            # A killed process may have left the record of a download with nothing unfinished.
            if known[key].state.active and time.time() - known[key].updated_at >= _DEAD_SECONDS:
                self._enter(key, State.ERROR, error="the process that downloaded it ended")
        return [_checked(each, report) for each in report.diagnosis.diagnosed]

    def can_resume(self, model: str) -> bool:
        """Whether some of a model's download need not be downloaded again."""
        return any(each["can_resume"] for each in self.detect_partial_downloads(model))

    def cleanup_partial_download(self, model: str) -> Cleanup:
        """Remove the unfinished data of a model, however young; what is being pulled stays."""
        key = names.to_model(model).key
        digests = frozenset(
            each["digest"].removeprefix("sha256:") for each in self.detect_partial_downloads(model)
        )
        if not digests:
            return Cleanup(removed=[], freed_bytes=0, refused=[])
        settings = replace(self._settings, stale_after=0.0)

        def approve(planned: Plan) -> Plan:
            mine = planned.only(lambda models, _: key in map(str.lower, models))
            return mine.filtered(lambda each: each.kind in _REMOVALS)

        # Only these are scanned: by this policy everything else would be stale as well.
        report = Reconciler(self._host, settings).reconcile(modes.CLEAN, Scope(digests), approve)
        done = [each for each in report.outcomes if each.result is Result.DONE]
        # No cleanup ever plans to remove these.
        staying = (Condition.LIVE, Condition.UNKNOWN)
        mine = (each for each in report.diagnosis.diagnosed if _is_of(each, key))
        stays = (each for each in mine if each.condition in staying)
        why = [f"{names.short(each.digest)}: {each.because}" for each in stays]
        why += [
            f"{names.short(each.subject)}: {each.why}; {each.remedy}"
            for each in approve(report.plan).refusals
        ]
        why += [each.message for each in report.outcomes if each.result is not Result.DONE]
        return Cleanup(
            removed=[f"sha256:{each.action.subject}" for each in done],
            freed_bytes=sum(each.freed for each in done),
            refused=why,
        )

    def reset_download(self, model: str) -> DownloadState:
        """Forget the download of a model and remove its unfinished data.

        Raises RefusedError where something must stay, saying why; the record is unchanged then.
        """
        record, shown = self._record(model), names.printable(model)
        # The record of a killed process stays active for ever.
        if record.state.active and time.time() - record.updated_at < _RECENT_SECONDS:
            message = f"{shown} is being downloaded: {record.state.stage}"
            step = f"stop it first, or try again in {advice.duration(_RECENT_SECONDS)}"
            raise RefusedError(message, step)
        cleanup = self.cleanup_partial_download(model)
        if cleanup["refused"]:
            message = f"the download of {shown} can't be removed: {cleanup['refused'][0]}"
            raise RefusedError(message, "stop the pull if one is running, and try again")
        record = self._enter(model, State.RESET)
        freed = {"freed_bytes": cleanup["freed_bytes"]}
        message = f"the download of {shown} is reset"
        self.log_download_event(model, EventType.DOWNLOAD_RESET, message, freed)
        return _state(record)

    # ------------------------------------------------------------ events

    def log_download_event(
        self, model: str, event_type: str, message: str, details: Mapping[str, object] | None = None
    ) -> None:
        """Write an event into the log of a model and into the one for all.

        Raises RecordError for what JSON can't hold.
        """
        shown = names.to_model(model).shown
        given = {"models": [shown], **(details or {})}
        event = Event(time.time(), str(event_type), str(message), shown, given)
        try:
            _ = event.line
        except TypeError as error:
            message = f"{names.printable(shown)}: details of {event_type}: {error}"
            raise RecordError(message, "give what JSON can hold") from None
        journal.announce(self._host, self._settings, event)

    def get_download_log(self, model: str) -> list[dict[str, Any]]:
        """The events of a model, the oldest first, each with its five keys."""
        wanted = names.file_safe(names.to_model(model).shown).lower()
        try:
            # The server ignores case, and each spelling has a log of its own.
            spelled = [log for log in event_log.logs(self._store) if log.lower() == wanted]
            lines = [event_log.Log(self._store, log).read(to_the_end=True) for log in spelled]
            merged = heapq.merge(*lines, key=lambda line: line.at)
            return [orjson.loads(line.line) for line in merged]
        except PermissionError:
            raise place.no_permission(self._store) from None

    def cleanup_old_logs(self, days: float) -> None:
        """Remove logs to which nothing was written for so many days."""
        if isinstance(days, bool) or not isinstance(days, int | float) or not 0 <= days < math.inf:
            raise RecordError(f"days = {days!r}: want a number, 0 or more")
        try:
            with place.opened(self._store) as store:
                event_log.expire(store, time.time(), replace(self._settings, log_keep_days=days))
        except PermissionError:
            raise place.no_permission(self._store) from None

    # ------------------------------------------------------------ driving

    def download_model(
        self,
        model: str,
        progress: Callable[[DownloadUpdate], None] = lambda _: None,
        cancel: Callable[[], bool] = lambda: False,
        options: Options | None = None,
    ) -> DownloadProgress:
        """Download a model through the server, over resets, stalls and the server's death.

        `progress` is called several times a second, and with what a next attempt waits for, and
        why. When `cancel` returns True, or one of the two raises, the download ends so that it can
        be resumed. Returns the last progress. Raises DownloadError if the download failed, with its
        `cause`, its words and the step that helps; and what the two raised.
        """
        raised: list[BaseException] = []

        def cancelled() -> bool:
            with _kept(raised):
                return bool(raised or cancel())
            return True

        if self._server is None:
            found = target.of_store(self._host, self._settings, os.environ)
        else:
            url = target.server_url(self._server, os.environ)
            found = target.find(url, self._host, self._settings)
        found = replace(found, records=self._state)
        pull = Pull(found, model, options or Options(), cancelled)
        for update in pull.updates():
            if not raised:
                with _kept(raised):
                    progress(_update(update))
        if raised:
            raise raised[0]
        if pull.end.cause is None:
            return _progress(pull.record, [])
        message = f"download of {names.printable(model)} failed: {pull.end.text}"
        raise DownloadError(message, pull.step, pull.end.cause.code, pull.command)

    def _record(self, model: str) -> Record:
        with place.opened(self._state) as folder:
            return records.read(folder).get(names.to_model(model).key, Record())

    def _enter(self, model: str, state: State, **changes: object) -> Record:
        """Bring a record into a state, by a new attempt, or the end of one, if it takes that."""
        with place.opened(self._state) as folder:
            return records.change(folder, model, {"state": state, **changes}, detour=True)


#: What a change may have, as it is called here and in the records.
_CHANGEABLE = {"status" if key == "state" else key: key for key in records.CHANGEABLE}
#: What a store has, and what may lie in a folder that is to become one.
_CONTENT = frozenset({"blobs", "manifests"})
_NO_CONTENT = frozenset({FOLDER, "lost+found"})
_REMOVALS = frozenset(
    {ActionKind.REMOVE_DOWNLOAD, ActionKind.REMOVE_SURPLUS, ActionKind.REMOVE_TRANSFER}
)
#: A record that changed within that time is right, and a driver that waits for the server or hashes
#: a layer is silent for long.
_RECENT_SECONDS, _DEAD_SECONDS = 10.0, 900.0


def _is_of(diagnosed: Diagnosed, key: str | None) -> bool:
    return key is None or key in map(str.lower, diagnosed.download.models)


def _read_manifest(manifest: object) -> tuple[bytes, dict[str, int]]:
    """A manifest's bytes, and its digests with their sizes. Raises ValueError with the reason."""
    if isinstance(manifest, Mapping):
        try:
            raw = orjson.dumps(dict(manifest))
        except TypeError as error:
            raise ValueError(str(error)) from None
    elif isinstance(manifest, str):
        raw = manifest.encode()
    elif isinstance(manifest, bytes | bytearray | memoryview):
        raw = bytes(manifest)
    else:
        raise ValueError(f"a {type(manifest).__name__} is none")
    if flaw := manifests.flaw(raw):
        raise ValueError(flaw)
    return raw, manifests.sizes(raw)


@contextlib.contextmanager
def _kept(raised: list[BaseException]) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        raised.append(error)


def _state(record: Record) -> DownloadState:
    of_state = {"status": record.state.value, "stage": record.state.stage}
    keys = DownloadState.__annotations__.keys()
    shown = {key: of_state[key] if key in of_state else getattr(record, key) for key in keys}
    return cast(DownloadState, shown)


def _progress(
    record: Record, partials: list[PartialDownload] | None, left: float | None = None
) -> DownloadProgress:
    """`partials`: None while they grow; the record then has what arrived."""
    if partials is None:
        size = max(0, record.downloaded_bytes - record.present_bytes)
        can_resume = record.resume_supported and size > 0
    else:
        size = sum(each["partial_size"] for each in partials)
        can_resume = any(each["can_resume"] for each in partials)
    if left is None and record.bytes_per_second and record.total_bytes is not None:
        missing = max(0, record.total_bytes - record.downloaded_bytes)
        left = missing / record.bytes_per_second
    return DownloadProgress(
        status=record.state.value,
        stage=record.state.stage,
        progress_percent=record.progress_percent,
        downloaded_bytes=record.downloaded_bytes,
        total_bytes=record.total_bytes,
        speed=record.bytes_per_second,
        eta_seconds=left,
        resume_supported=record.resume_supported,
        can_resume=can_resume,
        partial_size=size,
    )


def _update(update: Update) -> DownloadUpdate:
    now = _progress(update.record, None, update.seconds_left)
    waiting = None if update.waiting is None else update.waiting._asdict()
    return DownloadUpdate(**now, note=update.note, waiting=cast(DownloadWaiting | None, waiting))


def _checked(diagnosed: Diagnosed, report: reconcile.Report) -> CheckedDownload:
    refusals = [each for each in report.plan.refusals if each.subject == diagnosed.digest]
    refused = ["; ".join(filter(None, (each.why, each.remedy, each.command))) for each in refusals]
    undone = (each for each in report.outcomes if each.result is not Result.DONE)
    refused += [each.message for each in undone if each.action.subject == diagnosed.digest]
    return CheckedDownload(**_partial(diagnosed), refused=list(dict.fromkeys(refused)))


def _partial(diagnosed: Diagnosed) -> PartialDownload:
    download = diagnosed.download
    kept = conditions.resumes(diagnosed.condition) or ranges.size(download.trust.trusted) > 0
    known = download.total is not None and diagnosed.condition is not Condition.UNKNOWN
    return PartialDownload(
        digest=f"sha256:{download.digest}",
        models=list(download.models),
        condition=diagnosed.condition.value,
        stale=diagnosed.stale,
        partial_size=ranges.size(download.trust.present),
        total_bytes=download.total,
        can_resume=kept and known,
        age_seconds=diagnosed.age,
    )
