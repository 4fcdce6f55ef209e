"""The server's variables, as the server reads them (Ollama's ``envconfig/config.go``)."""

import contextlib
import ipaddress
import os
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

_PORTS = {"http": 80, "https": 443}
_PORT = 11434  #: where no scheme is given
#: Who listens on every address is reached on loopback.
_REACHED = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104
_HOST_AND_PORT = re.compile(r"\[([^\[\]]*)\]:([^:\[\]]*)|([^:\[\]]*):([^:\[\]]*)")


def trimmed(value: str) -> str:
    """A variable's value: white space and quotes around it don't count."""
    return value.strip().strip("\"'")


def models_folder(environment: Mapping[str, str]) -> str | None:
    """Where a server has its store; None where its environment does not name one."""
    models = trimmed(environment.get("OLLAMA_MODELS", ""))
    if models:
        return models
    home = environment.get("HOME")
    return os.path.join(home, ".ollama", "models") if home else None


def no_prune(environment: Mapping[str, str]) -> bool:
    """Whether the server's start and its pulls delete nothing: any value but a false one."""
    value = trimmed(environment.get("OLLAMA_NOPRUNE", ""))
    return value not in ("", "0", "f", "F", "false", "False", "FALSE")


def server_url(setting: str) -> str:
    """The URL of a server with this ``OLLAMA_HOST`` ("": the usual one). Raises ValueError."""
    scheme, named, rest = trimmed(setting).partition("://")
    if not named:
        scheme, rest = "http", scheme
    elif scheme not in _PORTS:
        raise ValueError("want http or https")
    if "@" in rest:
        raise ValueError("want an address without a user or a password")
    address, _, path = rest.partition("/")
    host, port = address, ""
    if match := _HOST_AND_PORT.fullmatch(address):
        host, port = match[1] or match[3] or "", match[2] or match[4] or ""
    else:  # brackets around an address don't count
        with contextlib.suppress(ValueError):
            host = str(ipaddress.ip_address(address.strip("[]")))
    usual = _PORTS[scheme] if named else _PORT
    number = int(port) if re.fullmatch("[0-9]{1,5}", port) and int(port) < 1 << 16 else usual
    url = at(scheme, host, number) + (f"/{path.rstrip('/')}" if path.strip("/") else "")
    with contextlib.suppress(ValueError):
        name = urlsplit(url).hostname or ""
        labels = name.removesuffix(".").split(".")
        is_valid = ":" in name or all(0 < len(label) < 64 for label in labels)
        if is_valid and not re.search(r"[\s\0-\x1f]", url):
            return url
    raise ValueError("want an address such as http://127.0.0.1:11434")


def at(scheme: str, host: str, port: int) -> str:
    """The URL of a host (a name or an address as it is listened on) and a port."""
    host = _REACHED.get(host, host)
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
