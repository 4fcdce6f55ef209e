"""The server's log: one line on stderr for each thing to tell."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime


def log(text: str) -> None:
    """Write a line, in the form of the real server's."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    sys.stderr.write(f"time={now} level=INFO source=engine.py msg={json.dumps(text)}\n")
    sys.stderr.flush()
