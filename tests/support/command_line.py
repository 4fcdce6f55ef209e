"""Whether a command line is one of ours."""

from __future__ import annotations

import shlex

import click

from watcher import cli


def understand(line: str) -> None:
    """Parse what stands behind ``ollama-watch``, and run nothing. Raises click.UsageError."""
    at: click.Context = cli.program.make_context("x", shlex.split(line))
    words = [*at._protected_args, *at.args]
    while isinstance(at.command, click.Group):
        found, inner, words = at.command.resolve_command(at, words)
        assert inner is not None
        if "--help" in words:
            break
        at = inner.make_context(found, words, parent=at)
        words = [*getattr(at, "_protected_args", ()), *at.args]
