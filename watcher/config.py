"""Reading `Settings`: a TOML file, then ``OLLAMA_WATCH_*``, then flags; later ones win."""

import contextlib
import errno
import ipaddress
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from watcher.errors import SettingsError, as_root, shown

SYSTEM_FILE = Path("/etc/ollama-watch.toml")
_READ_LIMIT = 1 << 20  #: what is larger is no file of settings, and may have no end
ENVIRONMENT_PREFIX = "OLLAMA_WATCH_"
_MOST_CONNECTIONS = 64  #: a registry takes more for an attack, and they bring nothing
_LEAST_RATE = 1000  #: with less a registry closes the connections

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_MOST_SECONDS, _MOST_BYTES, _LARGEST_PORT = 1e14, (1 << 63) - 1, 65535  #: beyond is an error


def duration(value: object) -> float:
    """Seconds of ``90s``, ``30m``, ``2h``, ``7d``, ``1w`` or a number of seconds."""
    seconds = None
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = value
    elif isinstance(value, str):
        match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([smhdw]?)\s*", value.lower())
        if match:
            seconds = float(match[1]) * _SECONDS[match[2] or "s"]
    if seconds is not None and 0 <= seconds <= _MOST_SECONDS:
        return float(seconds)
    raise ValueError("expected a duration such as 90s, 30m, 2h, 7d or 1w")


def stall(value: object) -> float:
    """Seconds without a byte after which a connection is replaced."""
    if (seconds := duration(value)) >= 1:
        return seconds
    raise ValueError("expected a duration of at least 1s")


def moment(text: str, now: float) -> float:
    """Seconds since the epoch of ``2h`` (ago), ``2026-11-24`` or RFC 3339, local without a zone."""
    with contextlib.suppress(ValueError):
        return now - duration(text)
    with contextlib.suppress(ValueError, OverflowError):
        return datetime.fromisoformat(text.strip()).timestamp()
    raise ValueError("expected a duration such as 2h, a date such as 2026-11-24, or RFC 3339")


def size(value: object) -> int:
    """Bytes of ``50GB``, ``10 MiB`` or a number of bytes."""
    count = None
    if isinstance(value, int) and not isinstance(value, bool):
        count = value
    elif isinstance(value, str):
        number = r"(\d{1,15}(?:\.\d{1,9})?)"
        match = re.fullmatch(rf"\s*{number}\s*(?:([kmgt])(i?))?b?\s*", value.lower())
        if match:
            base = 1024 if match[3] else 1000
            count = int(float(match[1]) * base ** " kmgt".index(match[2] or " "))
    if count is not None and 0 <= count <= _MOST_BYTES:
        return count
    raise ValueError("expected a size such as 50GB or 10MiB")


def rate(value: object) -> int:
    """Bytes per second of ``5MB/s`` or a number of them; 0 for no limit."""
    with contextlib.suppress(ValueError):
        count = size(value.lower().strip().removesuffix("/s") if isinstance(value, str) else value)
        if count == 0 or count >= _LEAST_RATE:
            return count
    raise ValueError("expected a rate such as 5MB/s, of at least 1KB/s, or 0 for no limit")


def connections(value: object) -> tuple[int, int]:
    """How many at first and at most, of ``8-16`` or one number for both."""
    text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
    match = re.fullmatch(r"([0-9]{1,3})(?:-([0-9]{1,3}))?", text, re.ASCII)
    if match is not None:
        first, most = int(match[1]), int(match[2] or match[1])
        if 0 < first <= most <= _MOST_CONNECTIONS:
            return first, most
    raise ValueError(f"expected a number from 1 to {_MOST_CONNECTIONS}, or two such as 8-16")


def mirrors(value: object) -> tuple[str, ...]:
    """The addresses of mirrors: a list, or in one text with spaces between."""
    found = value.split() if isinstance(value, str) else value
    if isinstance(found, list | tuple) and all(map(_is_mirror, found)):
        return tuple(each.rstrip("/") for each in found)
    raise ValueError("expected a list of addresses such as http://registry.lan:5000")


def _is_mirror(value: object) -> bool:
    # A user and a password would be in logs.
    pattern = r"https?://([a-z0-9.-]+|\[[0-9a-f:]+\])(:[0-9]{1,5})?(/[a-z0-9._~/-]*)?"
    return isinstance(value, str) and re.fullmatch(pattern, value, re.IGNORECASE) is not None


def boolean(value: object) -> bool:
    """A TOML boolean, or the words for one in an environment variable."""
    if isinstance(value, bool):
        return value
    word = value.strip().lower() if isinstance(value, str) else None
    if word in ("true", "yes", "on", "1"):
        return True
    if word in ("false", "no", "off", "0"):
        return False
    raise ValueError("expected true or false")


def metrics_file(value: object) -> str:
    """The path of a textfile that node_exporter reads; "" for none."""
    if value == "":
        return ""
    # It passes over all files that are named otherwise.
    if isinstance(value, str) and re.fullmatch(r"/[^\0]*[^/\0]\.prom", value):
        return value
    raise ValueError("expected an absolute path that ends in .prom")


def endpoint(value: object) -> tuple[str, int]:
    """Address and port of ``127.0.0.1:9464`` or ``[::1]:9464``; port 0 is any that is free."""
    pattern = r"(?:\[([0-9a-fA-F:]+)\]|([0-9.]+|localhost)):([0-9]{1,5})"
    match = re.fullmatch(pattern, value) if isinstance(value, str) else None
    if match is not None and int(match[3]) <= _LARGEST_PORT:
        with contextlib.suppress(ValueError):
            host = (match[1] or match[2]).replace("localhost", "127.0.0.1")
            return str(ipaddress.ip_address(host)), int(match[3])
    raise ValueError("expected an address and a port, such as 127.0.0.1:9464")


def spelled(host: str, port: int) -> str:
    """An address and a port as `endpoint` reads them, and a URL has them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def address(value: object) -> tuple[str, int] | None:
    """The same with a port; None for ""."""
    if value == "":
        return None
    found = endpoint(value)
    if not found[1]:
        raise ValueError("expected an address and a port that is not 0")
    return found


def loopback(value: object) -> tuple[str, int] | None:
    """The same of this machine alone."""
    found = address(value)
    if found is None or ipaddress.ip_address(found[0]).is_loopback:
        return found
    raise ValueError("expected an address of loopback, such as 127.0.0.1:9465")


def _setting(read: Callable[[object], Any], default: object, key: str = "") -> Any:
    """A field that `read` makes of what is written; `key`: its name in the file, if another."""
    return field(default=read(default), metadata={"key": key, "read": read, "default": default})


@dataclass(frozen=True, slots=True)
class Settings:
    """What people set, and nothing else: `docs/reference/settings.md` explains each."""

    stores: tuple[str, ...] = ()
    stores_by: str = ""  #: who named them: a file, or a variable
    stale_after: float = _setting(duration, "7d")
    repair: bool = _setting(boolean, True)
    fetch: bool = _setting(boolean, False)
    clean: bool = _setting(boolean, False)
    queue: bool = _setting(boolean, False)
    connections: tuple[int, int] = _setting(connections, "8-16")
    rate: int = _setting(rate, 0)
    mirrors: tuple[str, ...] = _setting(mirrors, [])
    writers_visible: bool = _setting(boolean, False)
    quarantine_keep: float = _setting(duration, "30d")
    quarantine_max_bytes: int = _setting(size, "200GB", "quarantine_max_size")
    log_max_bytes: int = _setting(size, "10MB", "log_max_size")
    log_keep_days: float = _setting(lambda value: duration(value) / 86400, "90d", "log_keep")
    metrics_file: str = _setting(metrics_file, "")
    metrics_listen: tuple[str, int] | None = _setting(address, "")
    metrics_allow_remote: bool = _setting(boolean, False)
    web_listen: tuple[str, int] | None = _setting(loopback, "")


#: The fields by their keys in the file, which has `store` besides.
KEYS = {each.metadata["key"] or each.name: each for each in fields(Settings) if each.metadata}


def stores(value: object) -> tuple[str, ...]:
    found = (value,) if isinstance(value, str) else value
    if isinstance(found, list | tuple) and all(isinstance(each, str) and each for each in found):
        return tuple(found)
    raise ValueError("expected a folder, or a list of folders")


_READ = {"store": stores, **{key: each.metadata["read"] for key, each in KEYS.items()}}


Given = tuple[object, str]  #: a value as somebody gave it, and where: a file, or a variable


def load(file: Path | None, environment: Mapping[str, str]) -> Settings:
    """Read the settings; `file` must exist, None is the system's. Raises SettingsError."""
    values = given(file, environment)
    store, named_by = values.pop("store", ((), ""))
    fields = {KEYS[key].name: _READ[key](value) for key, (value, _) in values.items()}
    found = replace(Settings(), stores=stores(store), stores_by=named_by, **fields)
    listens = found.metrics_listen
    if listens and not (found.metrics_allow_remote or ipaddress.ip_address(listens[0]).is_loopback):
        value, source = values["metrics_listen"]
        where = source if source.startswith(ENVIRONMENT_PREFIX) else f"{source}: metrics_listen"
        why = "other machines could read the metrics, which have no authentication"
        step = "use a loopback address such as 127.0.0.1:9464, or set metrics_allow_remote = true"
        raise SettingsError(f"{where} = {value!r}: {why}", step)
    return found


def given(file: Path | None, environment: Mapping[str, str]) -> dict[str, Given]:
    """Each key that somebody has set to what counts. Takes and raises the same as `load`."""
    found: dict[str, Given] = {}
    path = SYSTEM_FILE if file is None else file
    for key, value in _read(path, needed=file is not None).items():
        _check(key, value, f"{path}: {key}")
        found[key] = value, str(path)
    for variable, value in environment.items():
        if variable.startswith(ENVIRONMENT_PREFIX):
            key = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
            _check(key, value, f"{ENVIRONMENT_PREFIX}{key.upper()}")
            found[key] = value, variable
    return found


def _read(path: Path, *, needed: bool) -> dict[str, object]:
    """What a file of settings has; nothing where there is none and it is not `needed`."""
    named = "check the path of --config"
    try:
        with path.open("rb") as file:
            raw = file.read(_READ_LIMIT + 1)
    except OSError as error:
        if not needed and isinstance(error, FileNotFoundError | NotADirectoryError):
            return {}
        why = f"reading the settings {shown(path)} failed: {error.strerror}"
        if path != SYSTEM_FILE or error.errno != errno.EACCES:
            raise SettingsError(why, named) from None
        command = as_root(f"chmod a+r {path}")
        raise SettingsError(why, "let every user read it", command) from None
    if len(raw) > _READ_LIMIT:
        raise SettingsError(f"{path} is too large for a settings file", named)
    import tomllib  # not loaded where there is no such file

    try:
        return tomllib.loads(raw.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not valid TOML: {error}", "fix that line") from None


def _check(key: str, value: object, where: str) -> None:
    if key not in _READ:
        known = f"known settings: {', '.join(_READ)}"
        known = textwrap.fill(known, 78, subsequent_indent="    ")
        raise SettingsError(f"{where}: there is no such setting", known)
    try:
        _READ[key](value)
    except ValueError as error:
        raise SettingsError(f"{where} = {value!r}: {error}") from None
