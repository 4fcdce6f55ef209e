"""``service``: install, show or remove the service."""

import click

from watcher.commands import declare
from watcher.commands.context import Context
from watcher.errors import Exit

_FOLDER = click.Path(exists=True, file_okay=False, readable=False, resolve_path=True)
_RHYTHM = click.Choice(["daily", "weekly", "monthly"])
_root = click.option(
    "--root", type=_FOLDER, metavar="DIR", help="Root folder of a system that is not running."
)
_user = click.option("--user", is_flag=True, help="Install for your own systemd.")
_clean = click.option("--clean", type=_RHYTHM, help="Also run clean so often.")
_cron = click.option("--cron", is_flag=True, help="Install for cron instead of systemd.")


@declare.group(
    near={"show": "status ls list", "install": "add enable start", "uninstall": "remove rm delete"},
    examples=["service show", "service install --clean weekly"],
    read_on="docs/service.md: systemd, cron, one user without root, containers",
)
def service() -> None:
    """Install, show or remove the service."""


@service.command(examples=["service install", "service install --clean weekly"])
@_root
@_user
@_clean
@_cron
@declare.yes
def install(
    context: Context, root: str | None, user: bool, clean: str | None, cron: bool, yes: bool
) -> Exit:
    """Install and start the service.

    Shows the files that it writes, and asks first.
    """
    from watcher.commands.installing import Target

    return Target(context, root, user, cron).install(clean, yes=yes)


@service.command(examples=["service uninstall"])
@_root
@_user
@declare.yes
def uninstall(context: Context, root: str | None, user: bool, yes: bool) -> Exit:
    """Stop the service and remove its files.

    Removes only files that it wrote. Shows them, and asks first.
    """
    from watcher.commands.installing import Target

    return Target(context, root, user).bring({}, yes=yes)


@service.command(examples=["service show", "service show --cron"])
@_root
@_user
@_clean
@_cron
def show(context: Context, root: str | None, user: bool, clean: str | None, cron: bool) -> Exit:
    """Print the files that install writes."""
    from watcher.commands.installing import Target

    return Target(context, root, user, cron).show(clean)
