"""``config``: what the settings are, and who has set them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from watcher import config
from watcher.commands.context import Context
from watcher.errors import Exit
from watcher.ollama import names


class Setting(NamedTuple):
    """One setting as it counts. `value` is None for a store that is looked for."""

    key: str
    value: object
    source: str


def show(context: Context, file: Path | None, stores: tuple[str, ...]) -> Exit:
    """Each setting with its value and its source. `stores`: those that flags name."""
    settings = list(_settings(file, stores))
    if context.json:
        found = names.all_exact([setting._asdict() for setting in settings])
        context.document({"schema": "ollama-watch/config/1", "settings": found})
    else:
        rows = [(each.key, _shown(each.value), names.printable(each.source)) for each in settings]
        first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
        sys.stdout.writelines(
            f"{key:<{first}}  {value:<{second}}  {source}\n" for key, value, source in rows
        )
    return Exit.HEALTHY


def check(context: Context, file: Path | None) -> Exit:
    """Whether the settings are sound; that they are not is told before any command begins."""
    looked = file or config.SYSTEM_FILE
    found = looked.exists()
    if context.json:
        path = names.exact(str(looked)) if found else None
        context.document({"schema": "ollama-watch/config-check/1", "file": path, "sound": True})
    elif not context.quiet:
        none = "" if found else " (there is no such file; the defaults hold)"
        sys.stdout.write(f"{names.printable(str(looked))}: sound{none}\n")
    return Exit.HEALTHY


def _settings(file: Path | None, stores: tuple[str, ...]) -> Iterator[Setting]:
    given = config.given(file, os.environ)
    if stores:
        given["store"] = config.Given(list(stores), "--store")
    yield Setting("store", *given.get("store", (None, "default")))
    for key, known in config.KEYS.items():
        value, source = given.get(key, (known.default, "default"))
        # In a variable a boolean is one of many words.
        yield Setting(key, known.read(value) if known.read is config.boolean else value, source)


def _shown(value: object) -> str:
    if value is None:
        return "(looked for)"
    if value == "":
        return "(none)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return names.printable(str(value))
