"""Where the space is, as a table for people; what is in it adds up to its last line."""

from __future__ import annotations

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from watcher.decide.findings import is_blind
from watcher.model import Evidence, Sizes, Space, Use, UseKind
from watcher.ollama import names
from watcher.show.lines import count

#: So many models are shown one by one, the largest ones.
_SHOWN_MODELS = 20
_WORDS = {
    UseKind.SHARED: "layers that several models name",
    UseKind.OTHER_STORE: "blobs that only another store in the same folder names",
    UseKind.ORPHAN: "orphans: blobs that no model names",
    UseKind.TEMPORARY: "left-overs of ollama create",
    UseKind.FOREIGN: "foreign files",
    UseKind.QUARANTINE: "quarantine",
    UseKind.OURS: "memory and logs of ollama-watch",
    UseKind.MANIFESTS: "manifests",
    UseKind.FOLDERS: "the store's folders themselves",
}


def table(
    seen: Evidence, space: Space, uses: tuple[Use, ...], total: Sizes, *, verbose: bool
) -> list[object]:
    """The uses, the largest first; `verbose`: every model, not only the largest."""
    place = seen.place
    shown: list[object] = [
        Text(names.printable(place.path), style="bold"),
        f"{place.file_system or 'unknown file system'}, {decimal(place.free_bytes)} free",
        "",
    ]
    rows = Table.grid(padding=(0, 2))
    for _ in range(3):
        rows.add_column(justify="right", no_wrap=True)
    rows.add_column(overflow="fold")
    rows.add_row(*(Text(word, style="bold") for word in ("on disk", "apparent", "freed", "")))
    for sizes, what in _lines(uses, None if verbose else _SHOWN_MODELS):
        rows.add_row(*map(decimal, _columns(sizes)), what)
    exact = Text(f"total: {total.allocated} bytes on disk", style="bold")
    rows.add_row(*map(decimal, _columns(total)), exact)
    shown.append(rows)
    if is_blind(seen) and any(use.kind is UseKind.ORPHAN for use in uses):
        shown.append("what can't be read may name the orphans: `audit` shows what it is")
    shown.extend(
        f"{each}/ is a link: what lies behind it is counted, which du does not follow"
        for each in space.linked
    )
    return shown


def _lines(uses: tuple[Use, ...], most: int | None) -> list[tuple[Sizes, str]]:
    """Uses that take room, those of all but `most` models together in one line."""
    taking = [use for use in uses if use.sizes.allocated or use.sizes.apparent]
    models = [use for use in taking if use.kind is UseKind.MODEL]
    others = [use for use in taking if use.kind is not UseKind.MODEL]
    shown, smaller = models[:most], [] if most is None else models[most:]
    lines = [(use.sizes, _words(use)) for use in (*shown, *others)]
    if smaller:
        together = Sizes(*map(sum, zip(*(use.sizes for use in smaller), strict=True)))
        lines.append((together, f"{count(len(smaller), 'smaller model')}: -v has them all"))
    return sorted(lines, key=lambda line: -line[0].allocated)


def _words(use: Use) -> str:
    if use.kind is UseKind.MODEL:
        return use.name
    if use.kind is UseKind.PARTIAL:
        return f"unfinished downloads: {use.name}"
    return _WORDS[use.kind]


def _columns(sizes: Sizes) -> tuple[int, int, int]:
    return sizes.allocated, sizes.apparent, sizes.freed
