"""What the environment says.

OLLAMA_MODELS, OLLAMA_HOST and OLLAMA_NOPRUNE mean what they mean to Ollama (port 0: a free one).
For tests, the real server's constants can be made smaller:

DEMO_PART_BYTES     smallest part (100,000,000; the real maximum 1,000,000,000 stays)
DEMO_RETRY_SECONDS  wait before the first retry of a part, doubled each time (1)
DEMO_STALL_SECONDS  silence after which a part is fetched anew (30)
DEMO_DIRECT_SECONDS how long the address of a layer's data is tried for (30)
DEMO_EXIT           what SIGTERM and SIGINT leave of a download: `well` (sidecars written) or, as
                    the real server does at times, `lost` (not written) or `torn` (one left empty)
"""

from __future__ import annotations

import os

VERSION = "0.0.0-demo"


def setting(name: str, default: str = "") -> str:
    """An environment variable without blanks and quotes around it; where empty, the default."""
    return os.environ.get(name, "").strip().strip("\"'") or default


def models_dir() -> str:
    """The store that the environment names."""
    return setting("OLLAMA_MODELS", os.path.join(os.path.expanduser("~"), ".ollama", "models"))


def no_prune() -> bool:
    """Whether cleaning up is off: any value that is not a false one."""
    return setting("OLLAMA_NOPRUNE") not in ("", "0", "f", "F", "false", "FALSE", "False")


def listen_address() -> tuple[str, int]:
    """Host and port to listen on."""
    text = setting("OLLAMA_HOST").rpartition("://")[2].partition("/")[0]
    host, _, port = text.rpartition(":")
    if not port.isdigit():
        host, port = text, "11434"
    return host.strip("[]") or "127.0.0.1", int(port)


def smallest_part() -> int:
    """Bytes that a part of a download has at least."""
    return int(setting("DEMO_PART_BYTES", "100_000_000"))


def retry_seconds() -> float:
    """The wait before the first retry of a part."""
    return float(setting("DEMO_RETRY_SECONDS", "1"))


def stall_seconds() -> float:
    """The silence after which a part is fetched anew."""
    return float(setting("DEMO_STALL_SECONDS", "30"))


def direct_seconds() -> float:
    """How long the address of a layer's data is tried for."""
    return float(setting("DEMO_DIRECT_SECONDS", "30"))


def exit_kind() -> str:
    """What a signal leaves of a download: `well`, `lost` or `torn`."""
    return setting("DEMO_EXIT", "well")
