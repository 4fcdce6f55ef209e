"""The parts of a download, and the sidecars that remember how far each has come."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from watcher.demo.server.errors import told
from watcher.demo.server.files import read_file
from watcher.demo.server.gojson import first_json, json_fields, json_int
from watcher.demo.server.settings import smallest_part

PARTS = 16
MAX_PART = 1_000_000_000


@dataclass
class Part:
    """A range of a layer, fetched by one connection at a time; `path` is its sidecar."""

    number: int
    offset: int
    size: int
    completed: int
    path: str

    @classmethod
    def read(cls, prefix: str, path: str) -> Part:
        """From a sidecar. It is written to `<prefix>-<N>` again, whatever `path` is called."""
        data, _ = read_file(path)
        found = json_fields(first_json(data), "N", "Offset", "Size", "Completed")
        number, offset, size, completed = (
            json_int(found.get(key, 0)) for key in ("N", "Offset", "Size", "Completed")
        )
        return cls(number, offset, size, completed, f"{prefix}-{number}")

    def write(self) -> None:
        """Write the sidecar, in place. Raises NoSpaceError or EngineError."""
        text = (
            f'{{"N":{self.number},"Offset":{self.offset},"Size":{self.size},'
            f'"Completed":{self.completed}}}\n'
        )
        with told("open", self.path):
            descriptor = os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_TRUNC, 0o644)
        try:
            with told("write", self.path):
                os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)


def fresh_parts(prefix: str, total: int) -> Iterator[Part]:
    """The parts of a fresh download: each a sixteenth, within the limits."""
    size = min(max(total // PARTS, smallest_part()), MAX_PART)
    for number, offset in enumerate(range(0, total, size)):
        yield Part(number, offset, min(size, total - offset), 0, f"{prefix}-{number}")
