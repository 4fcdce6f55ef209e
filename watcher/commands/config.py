"""``config``: effective settings, and where each comes from."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from watcher.commands import declare
from watcher.commands.declare import Given
from watcher.errors import Exit

_READ_ON = "docs/reference/settings.md: every setting"


class Setting(NamedTuple):
    """One setting as it counts. `value` is None for a store that is found automatically."""

    key: str
    value: object
    source: str


@declare.group(
    near={"list": ["show"], "get": ["show"], "ls": ["show"], "test": ["check"]},
    examples=["config show", "config check"],
    read_on=_READ_ON,
)
def config() -> None:
    """Show effective settings and where each comes from."""


@config.command(context=False, examples=["config show", "config show --json"], read_on=_READ_ON)
def show(given: Given) -> Exit:
    """Show effective settings and where each comes from."""
    from watcher.ollama import names

    found = list(_settings(given.config_file, given.stores))
    if given.json:
        exact = names.all_exact([setting._asdict() for setting in found])
        _document({"schema": "ollama-watch/config/1", "settings": exact})
    else:
        rows = [(each.key, _shown(each.value), names.printable(each.source)) for each in found]
        first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
        sys.stdout.writelines(
            f"{key:<{first}}  {value:<{second}}  {source}\n" for key, value, source in rows
        )
    return Exit.HEALTHY


@config.command(
    context=False,
    examples=["config check", "config check --config ./ollama-watch.toml"],
    read_on=_READ_ON,
)
def check(given: Given) -> Exit:
    """Check the settings; a bad one exits with 2."""
    from watcher import config as settings
    from watcher.ollama import names

    settings.load(given.config_file, os.environ)
    file = given.config_file or settings.SYSTEM_FILE
    found = file.exists()
    if given.json:
        path = names.exact(str(file)) if found else None
        _document({"schema": "ollama-watch/config-check/1", "file": path, "sound": True})
    elif not given.quiet:
        none = "" if found else " (the file does not exist; defaults apply)"
        sys.stdout.write(f"{names.printable(str(file))}: valid{none}\n")
    return Exit.HEALTHY


def _document(document: dict[str, object]) -> None:
    from watcher.show import documents

    sys.stdout.buffer.write(documents.line(document))
    sys.stdout.buffer.flush()


def _settings(file: Path | None, stores: list[str]) -> Iterator[Setting]:
    from watcher import config as settings

    given = settings.given(file, os.environ)
    if stores:
        given["store"] = settings.Given(list(stores), "--store")
    yield Setting("store", *given.get("store", (None, "default")))
    for key, known in settings.KEYS.items():
        value, source = given.get(key, (known.default, "default"))
        # In a variable a boolean is one of many words.
        yield Setting(key, known.read(value) if known.read is settings.boolean else value, source)


def _shown(value: object) -> str:
    from watcher.ollama import names

    if value is None:
        return "(found automatically)"
    if value == "":
        return "(none)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return names.printable(str(value))
