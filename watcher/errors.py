"""Each error with its message for people and its exit code; `cli` maps them to exits."""

from __future__ import annotations

import enum


class Exit(enum.IntEnum):
    """Exit codes of the command line."""

    HEALTHY = 0
    FINDINGS = 1
    USAGE = 2
    REFUSED = 3
    FAILED = 4
    NO_STORE = 10
    LOCKED = 11
    INTERRUPTED = 130


class WatchError(Exception):
    """An error that names the thing, the reason and the next step."""

    exit_code = Exit.FAILED

    def __init__(self, message: str, next_step: str = "", command: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.next_step = next_step
        #: The next step as a command that can be pasted, made by `advice`; "" where none helps.
        self.command = command

    def __str__(self) -> str:
        step = f"\n  {self.next_step}" if self.next_step else ""
        return self.message + step + (f"\n  -> {self.command}" if self.command else "")


class NoStoreError(WatchError):
    """There is no model store where one was looked for."""

    exit_code = Exit.NO_STORE


class SettingsError(WatchError):
    """A setting has an unknown key or a bad value."""

    exit_code = Exit.USAGE


class TargetError(WatchError):
    """A command names a model or a digest that no store has, or several."""

    exit_code = Exit.USAGE


class RecordError(WatchError):
    """A change of a download's record has an unknown key, a bad value or an illegal transition."""

    exit_code = Exit.USAGE


class ManifestError(WatchError):
    """What was given as a manifest is none."""


class DownloadError(WatchError):
    """A model has not arrived. `cause` is one of `pull.causes.Cause`."""

    def __init__(self, message: str, next_step: str, cause: str) -> None:
        super().__init__(message, next_step)
        self.cause = cause


class NoPermissionError(WatchError):
    """Something may not be read or changed by this user."""


class RefusedError(WatchError):
    """Something could be done, and would do harm, or not last."""

    exit_code = Exit.REFUSED


class LockedError(WatchError):
    """Another ollama-watch is at work on this store."""

    exit_code = Exit.LOCKED


class ListenError(WatchError):
    """An address that the settings name can't be listened at."""


class ChangedError(WatchError):
    """The store is not what it was when the act was planned; nothing was done."""
