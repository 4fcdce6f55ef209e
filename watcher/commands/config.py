"""``config``: effective settings, and where each comes from."""

import os
import sys
from collections.abc import Iterator

from watcher import config as settings
from watcher.commands import declare
from watcher.commands.context import Context
from watcher.ollama import names


@declare.group(
    near={"show": "list get ls", "check": "test"},
    examples=["config show", "config check"],
    read_on="docs/reference/settings.md: every setting",
)
def config() -> None:
    """Show or check the settings."""


@config.command(settings=False, examples=["config show", "config show --json"])
def show(context: Context) -> None:
    """Show effective settings and where each comes from."""
    found = list(_settings(context))
    if context.json:
        rows = [{"key": key, "value": value, "source": source} for key, value, source in found]
        shown = names.everywhere(rows, names.exact)
        context.document({"schema": "ollama-watch/config/1", "settings": shown})
        return
    texts = [(key, _shown(value), names.printable(source)) for key, value, source in found]
    first, second = (max(len(row[column]) for row in texts) for column in (0, 1))
    for key, value, source in texts:
        sys.stdout.write(f"{key:<{first}}  {value:<{second}}  {source}\n")


@config.command(
    settings=False, examples=["config check", "config check --config ./ollama-watch.toml"]
)
def check(context: Context) -> None:
    """Check the settings; exit with 2 if one is invalid."""
    settings.load(context.config_file, os.environ)
    file = context.config_file or settings.SYSTEM_FILE
    found = file.exists()
    if context.json:
        path = names.exact(str(file)) if found else None
        context.document({"schema": "ollama-watch/config-check/1", "file": path, "sound": True})
    elif not context.quiet:
        none = "" if found else " (the file does not exist; defaults apply)"
        sys.stdout.write(f"{names.printable(str(file))}: valid{none}\n")


def _settings(context: Context) -> Iterator[tuple[str, object, str]]:
    """Each setting, its value (None for a store that is found automatically), and its source."""
    found = settings.given(context.config_file, os.environ)
    if context.stores:
        found["store"] = list(context.stores), "--store"
    yield "store", *found.get("store", (None, "default"))
    for key, known in settings.KEYS.items():
        value, source = found.get(key, (known.metadata["default"], "default"))
        if isinstance(known.metadata["default"], bool | list):  # in a variable it is words
            value = known.metadata["read"](value)
        yield key, list(value) if isinstance(value, tuple) else value, source


def _shown(value: object) -> str:
    if value is None:
        return "(found automatically)"
    if value in ("", []):
        return "(none)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return names.printable(str(value))
