"""``service``: install, show or remove the service."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from watcher.commands import declare

if TYPE_CHECKING:
    from watcher.commands.context import Context
    from watcher.commands.installing import InstallOptions, Target
    from watcher.errors import Exit

_READ_ON = "docs/service.md: systemd, cron, one user without root, containers"


@declare.group(
    near={
        "show": "status ls list",
        "install": "add enable start",
        "uninstall": "remove rm delete",
    },
    examples=["service show", "service install --clean weekly"],
    read_on=_READ_ON,
)
def service() -> None:
    """Install, show or remove the service."""


def _target_options(command: Any) -> Any:
    """Where an installation's files go."""
    root = click.Path(exists=True, file_okay=False, readable=False, resolve_path=True)
    user = click.option("--user", is_flag=True, help="Install for your own systemd.")
    other = click.option(
        "--root", type=root, metavar="DIR", help="Root folder of a system that is not running."
    )
    return other(user(command))


def _install_options(command: Any) -> Any:
    """What is to be installed."""
    cron = click.option("--cron", is_flag=True, help="Install for cron instead of systemd.")
    rhythm = click.Choice(["daily", "weekly", "monthly"])
    clean = click.option("--clean", type=rhythm, help="Also clean regularly.")
    return clean(cron(command))


def _target(root: str | None, user: bool, cron: bool = False) -> Target:
    from watcher.commands.installing import Target

    if user and (root is not None or cron):
        raise click.UsageError("--user can't be combined with --root or --cron")
    if root == "/":
        raise click.UsageError("--root is for another system: leave it out for this one")
    return Target(root or "", user)


def _options(context: Context, clean: str | None, cron: bool) -> InstallOptions:
    from watcher.commands.installing import InstallOptions

    config = None if context.config_file is None else str(context.config_file)
    return InstallOptions(clean, cron, config)


@service.command(
    examples=["service install", "service install --clean weekly"],
    read_on=_READ_ON,
)
@_target_options
@_install_options
@declare.yes
def install(
    context: Context, root: str | None, user: bool, clean: str | None, cron: bool, yes: bool
) -> Exit:
    """Install and start the service.

    Shows the files that it writes, and asks.
    """
    from watcher.commands import installing

    target, options = _target(root, user, cron), _options(context, clean, cron)
    return installing.install(context, target, options, yes=yes)


@service.command(examples=["service uninstall"], read_on=_READ_ON)
@_target_options
@declare.yes
def uninstall(context: Context, root: str | None, user: bool, yes: bool) -> Exit:
    """Stop the service and remove its files.

    Only files that it wrote. Shows them, and asks.
    """
    from watcher.commands import installing

    return installing.uninstall(context, _target(root, user), yes=yes)


@service.command(examples=["service show", "service show --cron"], read_on=_READ_ON)
@_target_options
@_install_options
def show(context: Context, root: str | None, user: bool, clean: str | None, cron: bool) -> Exit:
    """Print the files that install writes."""
    from watcher.commands import installing

    target, options = _target(root, user, cron), _options(context, clean, cron)
    return installing.show(context, target, options)
